"The configuration of Prometheus, Alertmanager and Grafana, each checked by the program that will read it."
import json, re, shutil, subprocess, time, urllib.error, urllib.parse, urllib.request
from datetime import datetime, timedelta
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from threading import Thread
import pytest, yaml
from helpers import EXPORTED, free_port, require, root, stop, wait_for
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from plant_mlops.core.config import settings
from plant_mlops.serve.metrics import Metrics
from plant_mlops.jobs.scheduler import next_time
from plant_mlops.jobs.table import job_table, schedule_of

docker = root/'docker'
prometheus_dir = docker/'prometheus'
prometheus_yml = prometheus_dir/'prometheus.yml'
alertmanager_yml = docker/'alertmanager/alertmanager.yml'
dashboards_dir = docker/'grafana/dashboards'
DASHBOARDS = ('service', 'model', 'data', 'jobs')

def read_yaml(file): return yaml.safe_load(file.read_text())

def read_dashboard(name): return json.loads((dashboards_dir/f'{name}.json').read_text())

def run_checked(*command) -> str:
    "Standard output of a program, which must succeed."
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert not result.returncode, result.stdout + result.stderr
    return result.stdout

def read_rules() -> list:
    "All alerting and recording rules."
    groups = [group for file in sorted(prometheus_dir.glob('rules/*.yml')) for group in read_yaml(file)['groups']]
    return [rule for group in groups for rule in group['rules']]

alert_rules = [rule for rule in read_rules() if 'alert' in rule]
recording_rules = [rule for rule in read_rules() if 'alert' not in rule]

# -- Syntax and unit tests of the configuration files

def test_prometheus_accepts_its_configuration():
    assert 'SUCCESS' in run_checked(require('promtool'), 'check', 'config', str(prometheus_yml))

@pytest.mark.slow
@pytest.mark.parametrize('file', sorted(prometheus_dir.glob('tests/*.yml')), ids=lambda file: file.stem)
def test_rules_pass_their_unit_tests(file): run_checked(require('promtool'), 'test', 'rules', str(file))

def test_alertmanager_accepts_its_configuration():
    assert 'SUCCESS' in run_checked(require('amtool'), 'check-config', str(alertmanager_yml))

def alertmanager_version(amtool) -> tuple:
    "Major and minor version."
    result = subprocess.run([amtool, '--version'], capture_output=True, text=True)
    return tuple(map(int, re.search(r'version (\d+)\.(\d+)', result.stdout + result.stderr).groups()))

@pytest.mark.parametrize('kind', ['webhook_configs', 'slack_configs', 'email_configs'])
def test_alertmanager_accepts_each_receiver_that_can_be_uncommented(kind, tmp_path):
    amtool = require('amtool')
    text, count = re.subn(rf'# ({kind}:)', r'\1', alertmanager_yml.read_text())
    assert count >= 2
    if alertmanager_version(amtool) < (0, 26): # the first version that has url_file
        text = text.replace('url_file: ', 'url: http://localhost/#')
    (tmp_path/'alertmanager.yml').write_text(text)
    run_checked(amtool, 'check-config', str(tmp_path/'alertmanager.yml'))

@pytest.mark.parametrize('receiver,labels', [
    ('page', dict(alertname='ApiDown', severity='page')),
    ('page', dict(alertname='AvailabilityBudgetBurn', severity='page', window='1h')),
    ('ticket', dict(alertname='AvailabilityBudgetBurn', severity='ticket', window='3d')),
    ('ticket', dict(alertname='JobFailed', severity='ticket', job='train')),
    ('ticket', dict(alertname='SomethingNew')),
    ('heartbeat', dict(alertname='Watchdog', severity='none'))])
def test_alert_is_routed_to_its_receiver(receiver, labels):
    options = [f'--config.file={alertmanager_yml}', f'--verify.receivers={receiver}']
    run_checked(require('amtool'), 'config', 'routes', 'test', *options, *(f'{k}={v}' for k, v in labels.items()))

# -- Annotations and test coverage of the alerts

def test_a_job_is_overdue_after_two_periods_of_its_schedule_and_two_hours():
    def overdue_seconds(cron):
        first = next_time(cron, datetime(2026, 1, 1))
        second = next_time(cron, first + timedelta(seconds=1))
        return (second - first).total_seconds()*2 + 7200
    def in_rule(rule): return eval(re.fullmatch(r'vector\((.*)\)', rule['expr'])[1])
    s = settings()
    rules = [rule for rule in recording_rules if rule['record'] == 'plant:job_due:seconds']
    scheduled = [job for job in job_table(s).jobs.values() if job.schedule]
    assert {rule['labels']['job']: in_rule(rule) for rule in rules} == \
           {job.name: overdue_seconds(schedule_of(s, job)) for job in scheduled}

def to_kebab_case(name): return re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '-', name).lower()

def alert_id(rule):
    window = rule['labels'].get('window')
    return f'{rule["alert"]}-{window}' if window else rule['alert']

@pytest.mark.parametrize('rule', alert_rules, ids=alert_id)
def test_alert_has_severity_area_description_and_link_to_its_runbook(rule):
    labels, annotations = rule['labels'], rule['annotations']
    assert labels['severity'] in ('page', 'ticket', 'none')
    assert labels['area'] in ('api', 'model', 'data', 'jobs', 'monitoring')
    assert annotations['summary']
    assert len(annotations['description']) > 60
    page = '{{ $externalLabels.docs }}/guides/alerts.html#'
    assert annotations['runbook_url'] == page + to_kebab_case(rule['alert'])

MATCHERS = {
    '=': lambda value, pattern: value == pattern,
    '!=': lambda value, pattern: value != pattern,
    '=~': lambda value, pattern: re.fullmatch(pattern, value) is not None,
    '!~': lambda value, pattern: re.fullmatch(pattern, value) is None}

def is_selected(rule, matchers) -> bool:
    "Whether `ALERTS{…}` with these matchers (label, operator, value) selects the alert while it fires."
    labels = rule['labels'] | dict(alertname=rule['alert'], alertstate='firing')
    return all(MATCHERS[operator](labels.get(label, ''), value) for label, operator, value in matchers)

@cache
def alerts_in_tests() -> tuple:
    "Names of alerts that a unit test expects to fire, and of those that one expects to be silent."
    tests = [test for file in prometheus_dir.glob('tests/*.yml') for test in read_yaml(file)['tests']]
    firing, silent = set(), set()
    for expectation in (e for test in tests for e in test.get('promql_expr_test', ())):
        selector = re.search(r'ALERTS\{(.*?)\}', expectation['expr'])
        if not selector: continue
        matchers = re.findall(r'(\w+)(=~|!~|!=|=)"(.*?)"', selector[1])
        selected = {rule['alert'] for rule in alert_rules if is_selected(rule, matchers)}
        samples = [sample['labels'] for sample in expectation['exp_samples']]
        expected = {name for labels in samples for name in re.findall(r'alertname="(\w+)"', labels)}
        if samples and not expected and len(selected) == 1: expected = selected
        firing |= expected
        silent |= selected - expected
    return firing, silent

@pytest.mark.parametrize('name', sorted({rule['alert'] for rule in alert_rules}))
def test_unit_tests_see_each_alert_fire_and_be_silent(name):
    firing, silent = alerts_in_tests()
    assert name in firing
    assert name in silent or name == 'Watchdog' # which always fires

# -- Metrics and labels in expressions exist

PROMQL_WORDS = {'and', 'or', 'unless', 'bool', 'offset', 'inf', 'nan'}
GROUPING = r'\b(?:by|on|ignoring|without|group_left|group_right)\s*\(([^)]*)\)'
SELECTOR = r'(?<![\w:.])([a-zA-Z_:][\w:]*)(?![\w:])(?!\s*\()\s*(\{[^}]*\})?'

def parse_expression(expr) -> tuple:
    "Metrics of a PromQL expression as [(name, labels that select it)], and the labels that it groups or joins by."
    plain = re.sub(r'\[[^\]]*\]', '', expr) # without ranges
    plain = re.sub(r'"[^"]*"', '""', plain) # and without values
    labels = [label.strip() for group in re.findall(GROUPING, plain) for label in group.split(',')]
    selectors = re.findall(SELECTOR, re.sub(GROUPING, '', plain))
    metrics = [(name, set(re.findall(r'(\w+)\s*(?:=|!)', matchers)))
               for name, matchers in selectors if name not in PROMQL_WORDS]
    return metrics, set(filter(None, labels))

def find_unknown_names(expr, labels_of) -> list:
    "Messages about metrics and labels that do not exist; `labels_of` maps a metric to its labels, None if unknown."
    metrics, grouping = parse_expression(expr)
    known = {name: labels_of(name) for name, _ in metrics}
    messages = [f'there is no metric {name}' for name, labels in known.items() if labels is None]
    for name, used in metrics:
        if known[name] is None: continue
        messages += [f'{name} has no label {label}' for label in used - known[name]]
    all_labels = set().union(*filter(None, known.values()))
    if all(known.values()): messages += [f'no metric of it has the label {label}' for label in grouping - all_labels]
    return messages

TARGET_LABELS = {'instance', 'job'}
SUFFIXES = dict(counter=['_total'], histogram=['_bucket', '_sum', '_count'])

@cache
def exported_metrics() -> dict:
    "Labels of each metric that the API and the exporter export and that recording rules make."
    result = {name: {*labels, *TARGET_LABELS} for name, labels in EXPORTED.items()}
    for metric in Metrics().collectors.values():
        for suffix in SUFFIXES.get(metric._type, ['']):
            result[metric._name + suffix] = {*metric._labelnames, *TARGET_LABELS}
            if suffix == '_bucket': result[metric._name + suffix].add('le')
    for rule in recording_rules:
        _, grouping = parse_expression(rule['expr'])
        result.setdefault(rule['record'], set()).update(rule.get('labels', {}), grouping)
    result['up'] = TARGET_LABELS
    result['ALERTS'] = {'alertname', 'alertstate', 'severity', 'area', *TARGET_LABELS}
    return result

def labels_in_code(name):
    "Labels of a metric by the code that exports it; None if there is no such metric."
    if name.startswith(('prometheus_', 'alertmanager_')): return TARGET_LABELS
    return exported_metrics().get(name)

@pytest.mark.parametrize('rule', alert_rules + recording_rules, ids=lambda rule: rule.get('alert', rule.get('record')))
def test_rule_uses_existing_metrics_and_labels(rule):
    assert not find_unknown_names(rule['expr'], labels_in_code)

def panel_queries(name) -> list:
    "Title of the panel and PromQL of each query of a dashboard."
    panels = [panel for panel in read_dashboard(name)['panels'] if panel['type'] != 'row']
    return [(panel['title'], target['expr']) for panel in panels for target in panel['targets']]

@pytest.mark.parametrize('name', DASHBOARDS)
def test_dashboard_uses_existing_metrics_and_labels(name):
    unknown = [(title, expr, find_unknown_names(expr, labels_in_code)) for title, expr in panel_queries(name)]
    assert not [query for query in unknown if query[-1]]

def datasource_uids() -> set:
    "Data sources that are provisioned in Grafana."
    files = (docker/'grafana/provisioning/datasources').glob('*.yml')
    return {source['uid'] for file in files for source in read_yaml(file)['datasources']}

def grid_cells(panel) -> set:
    "The cells of Grafana's grid that a panel covers."
    position = panel['gridPos']
    columns = range(position['x'], position['x'] + position['w'])
    rows = range(position['y'], position['y'] + position['h'])
    return set(product(columns, rows))

@pytest.mark.parametrize('name', DASHBOARDS)
def test_panels_have_description_unit_data_source_and_a_place_of_their_own(name):
    dashboard, sources = read_dashboard(name), datasource_uids()
    assert dashboard['uid'] == f'plant-{name}'
    assert dashboard['links']
    ids = [panel['id'] for panel in dashboard['panels']]
    assert len(ids) == len(set(ids))
    covered = set()
    for panel in dashboard['panels']:
        title, cells = panel['title'], grid_cells(panel)
        assert not cells & covered, title
        assert panel['gridPos']['x'] + panel['gridPos']['w'] <= 24, title
        covered |= cells
        if panel['type'] == 'row': continue
        assert panel['description'].endswith('.'), title
        assert panel['fieldConfig']['defaults']['unit'], title
        assert panel['targets'], title
        assert panel['datasource']['uid'] in sources, title
        assert {target['datasource']['uid'] for target in panel['targets']} <= sources, title

@pytest.mark.needs('grafana-foundation-sdk')
def test_dashboards_are_up_to_date_with_the_code(tmp_path):
    from plant_mlops.monitor.boards import write_boards
    for file in write_boards(tmp_path):
        assert file.read_bytes() == (dashboards_dir/file.name).read_bytes(), f'{file.name} is old: run `make export`'

# -- A real Prometheus and Alertmanager, which scrape made-up metrics

def serve_metrics(render):
    "A server of metrics on a free port; `render()` gives the page."
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header('Content-Type', CONTENT_TYPE_LATEST)
            self.end_headers()
            self.wfile.write(render())
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    return server

REQUESTS = [('/predict', 'POST', 200), ('/predict', 'POST', 200), ('/predict', 'POST', 429),
            ('/predict/batch', 'POST', 500), ('/ready', 'GET', 503), ('/metrics', 'GET', 200)]
PREDICTIONS = [('champion', '3', 'false'), ('champion', '3', 'true'), ('challenger', '4', 'false')]

def render_api_metrics():
    "A function that gives the API's metrics, with more requests and predictions at each call."
    metrics = Metrics('plants')
    def render():
        for route, method, status in REQUESTS:
            metrics.requests.labels(route, method, status).inc()
            metrics.request_seconds.labels(route).observe(.03 if status == 200 else .7)
        for variant, version, novel in PREDICTIONS:
            metrics.predictions.labels(variant, version, 'grass', novel).inc()
            metrics.confidence.labels(variant).observe(.66)
            metrics.novelty.labels(variant).observe(1.1)
            metrics.serving.labels(variant, version).set(1)
            metrics.model_error.labels(variant).set(0)
            for stage in ('decode', 'infer'): metrics.stage_seconds.labels(stage, variant).observe(.01)
        for counter in (metrics.refused, metrics.feedback, metrics.log_dropped): counter.inc()
        metrics.drift_score.set(.02)
        metrics.drift_drifted.set(0)
        metrics.drift_checked.set(time.time() - 60)
        metrics.drift_column.labels('brightness').set(.02)
        return generate_latest(metrics.registry)
    return render

LABEL_VALUES = dict(
    status=['new', 'stored', 'failed', 'rejected'], label=['grass', 'dandelion'], split=['train', 'valid', 'test'],
    job=['ingest', 'train', 'monitor'], model=['plants'], version=['3'], dataset=['41a8af589c1e'],
    part=['catalog', 'dataset', 'jobs', 'champion'])

def example_value(name) -> float:
    if name.endswith('timestamp_seconds'): return time.time() - 3600
    if 'accuracy' in name: return .9
    return 1

def render_exporter_metrics():
    "A function that gives made-up metrics of data and jobs."
    registry = CollectorRegistry()
    for name, labels in EXPORTED.items():
        gauge = Gauge(name, name, labels, registry=registry)
        values = LABEL_VALUES | (dict(status=['succeeded', 'failed']) if name == 'plant_job_runs' else {})
        for combination in product(*(values[label] for label in labels)):
            series = gauge.labels(*combination) if combination else gauge
            series.set(example_value(name))
    return lambda: generate_latest(registry)

def start_server(*command, url):
    "Start a program and wait until it answers at a URL."
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    def has_ended_or_answers(): return process.poll() is not None or urllib.request.urlopen(url, timeout=2)
    try: wait_for(has_ended_or_answers, 30, command[0])
    finally: assert process.poll() is None, process.stderr.read()
    return process

def start_alertmanager(storage, address):
    return start_server(require('alertmanager'), f'--config.file={alertmanager_yml}', f'--storage.path={storage}',
                        f'--web.listen-address={address}', '--cluster.listen-address=', url=f'http://{address}/-/ready')

def start_prometheus(folder, address):
    return start_server(require('prometheus'), f'--config.file={folder}/prometheus.yml',
                        f'--storage.tsdb.path={folder}/data', f'--web.listen-address={address}',
                        '--rules.alert.resend-delay=2s', url=f'http://{address}/-/ready')

def write_fast_configuration(folder, addresses):
    "Write the configuration of Prometheus with intervals of a second and other addresses (by name of the scrape job)."
    config = read_yaml(prometheus_yml)
    config['global'] |= dict(scrape_interval='1s', evaluation_interval='1s', scrape_timeout='1s')
    for job in config['scrape_configs']:
        job.pop('dns_sd_configs', None)
        job['static_configs'] = [dict(targets=[addresses[job['job_name']]])]
    config['alerting']['alertmanagers'] = [dict(static_configs=[dict(targets=[addresses['alertmanager']])])]
    (folder/'rules').mkdir()
    for file in prometheus_dir.glob('rules/*.yml'):
        (folder/'rules'/file.name).write_text(re.sub(r'(?m)^    interval: .*$', '', file.read_text()))
    (folder/'prometheus.yml').write_text(yaml.safe_dump(config))

def local_address(port): return f'127.0.0.1:{port}'

@pytest.fixture(scope='module')
def prom(tmp_path_factory):
    "A function that calls the HTTP API of a real Prometheus; `prom.alertmanager` is a real Alertmanager's address."
    require('prometheus')
    require('alertmanager')
    folder = tmp_path_factory.mktemp('prom')
    servers = dict(api=serve_metrics(render_api_metrics()), jobs=serve_metrics(render_exporter_metrics()))
    addresses = {name: local_address(server.server_port) for name, server in servers.items()}
    addresses |= {name: local_address(free_port()) for name in ('prometheus', 'alertmanager')}
    write_fast_configuration(folder, addresses)
    def call(endpoint, **params):
        url = f'http://{addresses["prometheus"]}/api/v1/{endpoint}?{urllib.parse.urlencode(params)}'
        try: return json.load(urllib.request.urlopen(url, timeout=10))
        except urllib.error.HTTPError as error: return json.load(error)
    call.alertmanager = addresses['alertmanager']
    processes = [start_alertmanager(folder/'am', addresses['alertmanager'])]
    try:
        processes.append(start_prometheus(folder, addresses['prometheus']))
        yield call
    finally:
        for process in reversed(processes): stop(process)
        for server in servers.values(): server.shutdown()

GRAFANA_VARIABLES = {
    '$__rate_interval': '10s', '$__interval': '5s', '$__range': '1m', '$instance': '.*', '$model': 'plants'}

def replace_variables(expr) -> str:
    "An expression with Grafana's variables replaced, as Grafana does it."
    for variable, value in GRAFANA_VARIABLES.items(): expr = expr.replace(variable, value)
    return expr

def has_value(response) -> bool:
    return any(series['value'][1] != 'NaN' for series in response['data']['result'])

def find_query_error(prom, expr, timeout=45) -> str:
    "Why a real Prometheus gives no value for a query; '' if it gives one within `timeout` seconds."
    def labels_of(name):
        series = prom('series', **{'match[]': f'{{__name__="{name}"}}'})['data']
        return set().union(*series) if series else None
    query = replace_variables(expr)
    end = time.monotonic() + timeout
    while True:
        response = prom('query', query=query)
        if response['status'] != 'success': return response['error']
        if has_value(response) and not find_unknown_names(query, labels_of): return ''
        if time.monotonic() > end: return '; '.join(find_unknown_names(query, labels_of)) or 'no answer'
        time.sleep(1)

@pytest.mark.parametrize('name', DASHBOARDS)
def test_prometheus_answers_the_queries_of_all_panels(prom, name):
    errors = [(title, expr, find_query_error(prom, expr)) for title, expr in panel_queries(name)]
    errors = [error for error in errors if error[-1]]
    assert not errors, '\n'.join(map(str, errors))

@pytest.mark.parametrize('name', DASHBOARDS)
def test_prometheus_answers_the_queries_of_annotations_and_variables(prom, name):
    dashboard = read_dashboard(name)
    for annotation in dashboard['annotations']['list']:
        assert prom('query', query=annotation['expr'])['status'] == 'success'
    for variable in dashboard.get('templating', {}).get('list') or []:
        metric, label = re.fullmatch(r'label_values\((.*), (\w+)\)', variable['query']['query']).groups()
        assert prom('query', query=f'group by ({label}) ({metric})')['data']['result']

def test_prometheus_evaluates_all_rules_without_errors(prom):
    assert not find_query_error(prom, 'sum(prometheus_rule_group_rules)')
    rules = [rule for group in prom('rules')['data']['groups'] for rule in group['rules']]
    assert not [rule for rule in rules if rule['health'] == 'err']

def test_the_label_job_of_job_metrics_names_the_job_and_not_the_scrape_target(prom):
    assert not find_query_error(prom, 'plant_job_running{job="train"}')
    assert not find_query_error(prom, 'up{job="jobs"} == 1')

def fetch_alerts(address) -> list:
    return json.load(urllib.request.urlopen(f'http://{address}/api/v2/alerts', timeout=5))

def test_alertmanager_receives_an_alert_with_its_runbook_link(prom):
    "The label `docs`, from which the link is made, is dropped."
    for _ in range(60):
        alerts = [alert for alert in fetch_alerts(prom.alertmanager) if alert['labels']['alertname'] == 'Watchdog']
        if alerts: break
        time.sleep(.5)
    docs = read_yaml(prometheus_yml)['global']['external_labels']['docs']
    assert alerts[0]['annotations']['runbook_url'] == docs + '/guides/alerts.html#watchdog'
    assert 'docs' not in alerts[0]['labels']
    assert alerts[0]['receivers'] == [{'name': 'heartbeat'}]

def post_alerts(address, *alerts):
    "Send alerts to Alertmanager, each as 'alertname severity area' or 'alertname severity area job'."
    labels = [dict(zip(('alertname', 'severity', 'area', 'job'), alert.split())) for alert in alerts]
    body = json.dumps([dict(labels=each) for each in labels]).encode()
    headers = {'Content-Type': 'application/json'}
    urllib.request.urlopen(urllib.request.Request(f'http://{address}/api/v2/alerts', body, headers), timeout=5)

def inhibited_alerts(address) -> set:
    "Alerts that Alertmanager holds back, each as 'alertname severity' or 'alertname severity job'."
    inhibited = [alert['labels'] for alert in fetch_alerts(address) if alert['status']['inhibitedBy']]
    return {' '.join(labels.get(k, '') for k in ('alertname', 'severity', 'job')).strip() for labels in inhibited}

def test_alertmanager_inhibits_alerts_that_have_the_same_cause_as_another(tmp_path):
    address = local_address(free_port())
    process = start_alertmanager(tmp_path, address)
    def assert_inhibited(expected):
        for _ in range(50):
            if inhibited_alerts(address) == expected: return
            time.sleep(.2)
        assert inhibited_alerts(address) == expected
    try:
        post_alerts(address, 'AvailabilityBudgetBurn page api', 'AvailabilityBudgetBurn ticket api',
                    'LatencyBudgetBurn ticket api', 'ModelStale ticket model', 'JobFailed ticket jobs train',
                    'JobOverdue ticket jobs train', 'JobOverdue ticket jobs ingest')
        expected = {'AvailabilityBudgetBurn ticket', 'JobOverdue ticket train'}
        assert_inhibited(expected)
        post_alerts(address, 'ApiHasNoModel page api', 'ModelReloadFailed ticket model')
        expected |= {'AvailabilityBudgetBurn page', 'ModelReloadFailed ticket'}
        assert_inhibited(expected)
        post_alerts(address, 'ApiDown page api', 'OldModelServes ticket model', 'ExporterDown ticket monitoring')
        expected |= {'LatencyBudgetBurn ticket', 'OldModelServes ticket', 'ApiHasNoModel page'}
        assert_inhibited(expected)
    finally: stop(process)

# -- The checks above detect mistakes

@pytest.mark.parametrize('expr,message', [
    ('sum(plant_photoz)', 'no metric plant_photoz'),
    ('sum(plant_photos{state="stored"})', 'plant_photos has no label state'),
    ('sum by (colour) (plant_photos)', 'label colour'),
    ('plant_photos{status="eaten"}', 'no answer'),
    ('sum(plant_photos', 'parse error'),
    ('0 * plant_photos{status="stored"} / 0', 'no answer')])
def test_a_wrong_query_is_detected(prom, expr, message): assert message in find_query_error(prom, expr, timeout=3)

@pytest.mark.parametrize('expr', [
    'plant_requests{status="200"} > 0', 'sum by (team) (plant_serving)', 'plant_job_failed{name="train"}',
    'plant:predict_errors:ratio2h > 1'])
def test_a_rule_with_an_unknown_metric_or_label_is_detected(expr):
    assert find_unknown_names(expr, labels_in_code)

@pytest.mark.slow
@pytest.mark.parametrize('old,new', [
    ('== 0 # also', '== 7 # also'), ('for: 2m', 'for: 1h'), ('severity: page', 'severity: ticket'),
    ('sum(up{job="api"} or vector(0)) == 0', 'vector(1)')])
def test_unit_tests_detect_a_changed_rule(old, new, tmp_path):
    promtool = require('promtool')
    shutil.copytree(prometheus_dir, tmp_path/'prometheus')
    file = tmp_path/'prometheus/rules/api.yml'
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    command = [promtool, 'test', 'rules', str(tmp_path/'prometheus/tests/api.yml')]
    assert subprocess.run(command, capture_output=True).returncode
