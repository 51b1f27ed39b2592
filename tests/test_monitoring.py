"""The monitoring: rules, routes and boards, each by the program that will read it."""

import json, re, shutil, subprocess, time, urllib.error, urllib.parse, urllib.request
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
import pytest, yaml
from helpers import EXPORTED, free_port, require, root, stop, wait_for
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest

DOCKER = root/'docker'
PROM, AM, BOARDS = DOCKER/'prometheus', DOCKER/'alertmanager'/'alertmanager.yml', DOCKER/'grafana'/'dashboards'
NAMES = ('service', 'model', 'data', 'jobs')

def said_by(*command):
    "What a program prints; fails with it where the program does."
    r = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert not r.returncode, r.stdout + r.stderr
    return r.stdout

def rules(alerts=True): return [r for f in sorted(PROM.glob('rules/*.yml')) for g in yaml.safe_load(f.read_text())['groups'] for r in g['rules'] if ('alert' in r) is alerts]

# What is valid by itself

def test_prometheus_config(): assert 'SUCCESS' in said_by(require('promtool'), 'check', 'config', str(PROM/'prometheus.yml'))

@pytest.mark.parametrize('file', sorted(PROM.glob('tests/*.yml')), ids=lambda p: p.stem)
def test_rules(file): said_by(require('promtool'), 'test', 'rules', str(file))

def test_alertmanager_config(): assert 'SUCCESS' in said_by(require('amtool'), 'check-config', str(AM))

@pytest.mark.parametrize('kind', ['webhook_configs', 'slack_configs', 'email_configs'])
def test_receivers_to_choose(kind, tmp_path):
    amtool = require('amtool')
    version = subprocess.run([amtool, '--version'], capture_output=True, text=True)
    old = tuple(map(int, re.search(r'version (\d+)\.(\d+)', version.stdout + version.stderr).groups())) < (0, 26)
    text, n = re.subn(rf'# ({kind}:)', r'\1', AM.read_text())
    assert n >= 2
    if old: text = text.replace('url_file: ', 'url: http://localhost/#') # url_file came with Alertmanager 0.26
    (tmp_path/'am.yml').write_text(text)
    said_by(amtool, 'check-config', str(tmp_path/'am.yml'))

@pytest.mark.parametrize('receiver,labels', [
    ('page', dict(alertname='ApiDown', severity='page')), ('page', dict(alertname='AvailabilityBudgetBurn', severity='page', window='1h')),
    ('ticket', dict(alertname='AvailabilityBudgetBurn', severity='ticket', window='3d')), ('ticket', dict(alertname='JobFailed', severity='ticket', job='train')),
    ('ticket', dict(alertname='SomethingNew')), ('heartbeat', dict(alertname='Watchdog', severity='none'))])
def test_routes(receiver, labels):
    said_by(require('amtool'), 'config', 'routes', 'test', f'--config.file={AM}', f'--verify.receivers={receiver}', *(f'{k}={v}' for k, v in labels.items()))

# What alerts say, and whether they were tried

def test_a_job_is_late_after_two_runs_of_its_schedule_and_two_hours():
    from datetime import datetime, timedelta
    from plant_mlops.core.config import settings
    from plant_mlops.jobs.table import job_table, schedule_of
    from plant_mlops.jobs.scheduler import next_time
    def due(cron):
        first = next_time(cron, datetime(2026, 1, 1))
        return (next_time(cron, first + timedelta(seconds=1)) - first).total_seconds()*2 + 7200
    said = {r['labels']['job']: eval(re.fullmatch(r'vector\((.*)\)', r['expr'])[1]) for r in rules(alerts=False) if r['record'] == 'plant:job_due:seconds'}
    assert said == {j.name: due(schedule_of(settings(), j)) for j in job_table(settings()).jobs.values() if j.schedule}

def kebab(name): return re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '-', name).lower()

@pytest.mark.parametrize('rule', rules(), ids=lambda r: '-'.join([r['alert'], *filter(None, [r['labels'].get('window')])]))
def test_alert_says_what_to_do(rule):
    labels, a = rule['labels'], rule['annotations']
    assert labels['severity'] in ('page', 'ticket', 'none') and labels['area'] in ('api', 'model', 'data', 'jobs', 'monitoring')
    assert a['summary'] and len(a['description']) > 60
    assert a['runbook_url'] == '{{ $externalLabels.docs }}/guides/alerts.html#' + kebab(rule['alert'])

_OPS = {'=': lambda a, b: a == b, '!=': lambda a, b: a != b, '=~': lambda a, b: bool(re.fullmatch(b, a)), '!~': lambda a, b: not re.fullmatch(b, a)}

@cache
def tried():
    "Alerts that a test expects to fire, and those that one expects to be silent."
    fires, silent = set(), set()
    for t in (o for f in PROM.glob('tests/*.yml') for t in yaml.safe_load(f.read_text())['tests'] for o in t.get('promql_expr_test', ())):
        if not (m := re.search(r'ALERTS\{(.*?)\}', t['expr'])): continue
        asked = re.findall(r'(\w+)(=~|!~|!=|=)"(.*?)"', m[1])
        covered = {r['alert'] for r in rules() if all(_OPS[op](dict(r['labels'], alertname=r['alert'], alertstate='firing').get(k, ''), v) for k, op, v in asked)}
        named = {n for s in t['exp_samples'] for n in re.findall(r'alertname="(\w+)"', s['labels'])}
        if t['exp_samples'] and not named and len(covered) == 1: named = covered
        fires |= named
        silent |= covered - named
    return fires, silent

@pytest.mark.parametrize('name', sorted({r['alert'] for r in rules()}))
def test_alert_was_tried(name):
    fires, silent = tried()
    assert name in fires and (name in silent or name == 'Watchdog')

# Which metrics are named, and which there are

_WORDS = {'and', 'or', 'unless', 'bool', 'offset', 'inf', 'nan'}

def named(expr):
    "Metrics that an expression names, each with the labels that it is chosen by; labels that results are grouped or joined by."
    plain = re.sub(r'"[^"]*"', '""', re.sub(r'\[[^\]]*\]', '', expr))
    by = {o.strip() for g in re.findall(r'\b(?:by|on|ignoring|without|group_left|group_right)\s*\(([^)]*)\)', plain) for o in g.split(',') if o.strip()}
    plain = re.sub(r'\b(?:by|on|ignoring|without|group_left|group_right)\s*\([^)]*\)', '', plain)
    found = re.findall(r'(?<![\w:.])([a-zA-Z_:][\w:]*)(?![\w:])(?!\s*\()\s*(\{[^}]*\})?', plain)
    return [(n, set(re.findall(r'(\w+)\s*(?:=|!)', sel))) for n, sel in found if n not in _WORDS], by

def faults(expr, labels_of):
    "What an expression names that is not there; `labels_of` gives the labels of a metric, None where there is no such metric."
    metrics, by = named(expr)
    known = {n: labels_of(n) for n, _ in metrics}
    out = [f'there is no metric {n}' for n, v in known.items() if v is None]
    out += [f'{n} has no label {k}' for n, used in metrics if known[n] is not None for k in used - known[n]]
    there = set().union(*(v for v in known.values() if v))
    return out + [f'no metric of it has the label {k}' for k in by - there if all(known.values())]

def suffixes(kind): return dict(counter=('_total',), histogram=('_bucket', '_sum', '_count')).get(kind, ('',))

@cache
def exported():
    "Metric → its labels, by the code that exports them, and the rules that record them."
    from plant_mlops.serve.metrics import Metrics
    target, out = {'instance', 'job'}, {k: {*v, 'instance', 'job'} for k, v in EXPORTED.items()}
    for m in Metrics().collectors.values():
        for end in suffixes(m._type): out[m._name + end] = {*m._labelnames, *target, *(['le'] if end == '_bucket' else [])}
    for r in rules(alerts=False): out[r['record']] = out.get(r['record'], set()) | {*r.get('labels', {})} | named(r['expr'])[1]
    return out | dict(up=target, ALERTS={'alertname', 'alertstate', 'severity', 'area', *target})

def labels_in_code(name):
    if name.startswith(('prometheus_', 'alertmanager_')): return {'instance', 'job'}
    return exported().get(name)

@pytest.mark.parametrize('rule', rules() + rules(alerts=False), ids=lambda r: r.get('alert', r.get('record')))
def test_rule_names_what_is_exported(rule): assert not faults(rule['expr'], labels_in_code)

def charts(name): return [p for p in json.loads((BOARDS/f'{name}.json').read_text())['panels'] if p['type'] != 'row']
def asks(name): return [(p['title'], t['expr']) for p in charts(name) for t in p['targets']]

@pytest.mark.parametrize('name', NAMES)
def test_board_names_what_is_exported(name):
    assert not [(title, expr, f) for title, expr in asks(name) if (f := faults(expr, labels_in_code))]

@pytest.mark.parametrize('name', NAMES)
def test_board_is_complete(name):
    "Every panel says what it tells and in which unit, has a place of its own, and asks the provisioned source."
    d = json.loads((BOARDS/f'{name}.json').read_text())
    sources = {o['uid'] for f in (DOCKER/'grafana'/'provisioning'/'datasources').glob('*.yml') for o in yaml.safe_load(f.read_text())['datasources']}
    taken, ids = set(), [p['id'] for p in d['panels']]
    assert d['uid'] == f'plant-{name}' and d['links'] and len(ids) == len(set(ids))
    for p in d['panels']:
        g = p['gridPos']
        cells = {(x, y) for x in range(g['x'], g['x'] + g['w']) for y in range(g['y'], g['y'] + g['h'])}
        assert not cells & taken and g['x'] + g['w'] <= 24, p['title']
        taken |= cells
        if p['type'] == 'row': continue
        assert p['description'].endswith('.') and p['fieldConfig']['defaults']['unit'] and p['targets'], p['title']
        assert {t['datasource']['uid'] for t in p['targets']} | {p['datasource']['uid']} <= sources, p['title']

def test_boards_are_what_the_code_makes(tmp_path):
    require('grafana-foundation-sdk')
    from plant_mlops.monitor.boards import write_boards
    for p in write_boards(tmp_path): assert p.read_bytes() == (BOARDS/p.name).read_bytes(), f'{p.name} is old: run `make export`'

# All of it at work

def serve(page):
    "A page of figures on a free port; returns the server."
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header('Content-Type', CONTENT_TYPE_LATEST)
            self.end_headers()
            self.wfile.write(page())
        def log_message(self, *a): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    return server

def api_page():
    "The API's own figures, with some use at every look."
    from plant_mlops.serve.metrics import Metrics
    m = Metrics('plants')
    def page():
        for route, method, status in (('/predict', 'POST', 200), ('/predict', 'POST', 200), ('/predict', 'POST', 429), ('/predict/batch', 'POST', 500), ('/ready', 'GET', 503), ('/metrics', 'GET', 200)):
            m.requests.labels(route, method, status).inc()
            m.request_seconds.labels(route).observe(.03 if status == 200 else .7)
        for variant, version, novel in (('champion', '3', 'false'), ('champion', '3', 'true'), ('challenger', '4', 'false')):
            m.predictions.labels(variant, version, 'grass', novel).inc()
            m.confidence.labels(variant).observe(.66)
            m.novelty.labels(variant).observe(1.1)
            m.serving.labels(variant, version).set(1)
            m.model_error.labels(variant).set(0)
            for stage in ('decode', 'infer'): m.stage_seconds.labels(stage, variant).observe(.01)
        for o in (m.refused, m.feedback, m.log_dropped): o.inc()
        m.drift_score.set(.02)
        m.drift_drifted.set(0)
        m.drift_checked.set(time.time() - 60)
        m.drift_column.labels('brightness').set(.02)
        return generate_latest(m.registry)
    return page

def exporter_page():
    "Made-up figures of data and jobs."
    r, values = CollectorRegistry(), dict(status='new stored failed rejected', label='grass dandelion', split='train valid test', job='ingest train monitor',
                                          model='plants', version='3', dataset='41a8af589c1e', part='catalog dataset jobs champion')
    for name, labels in EXPORTED.items():
        g, sets = Gauge(name, name, labels, registry=r), [{}]
        for k in labels: sets = [o | {k: v} for o in sets for v in ('succeeded failed' if (name, k) == ('plant_job_runs', 'status') else values[k]).split()]
        for o in sets: (g.labels(**o) if o else g).set(time.time() - 3600 if name.endswith('timestamp_seconds') else .9 if 'accuracy' in name else 1)
    return lambda: generate_latest(r)

def start(*command, url):
    "A process that answers at a URL soon."
    p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try: wait_for(lambda: p.poll() is not None or urllib.request.urlopen(url, timeout=2), 30, command[0])
    finally: assert p.poll() is None, p.stderr.read()
    return p

def quick_config(folder, places):
    "The configuration as it is, but with other places, and in a hurry."
    config = yaml.safe_load((PROM/'prometheus.yml').read_text())
    config['global'] |= dict(scrape_interval='1s', evaluation_interval='1s', scrape_timeout='1s')
    for o in config['scrape_configs']:
        o.pop('dns_sd_configs', None)
        o['static_configs'] = [dict(targets=[places[o['job_name']]])]
    config['alerting']['alertmanagers'] = [dict(static_configs=[dict(targets=[places['alertmanager']])])]
    (folder/'rules').mkdir()
    for f in PROM.glob('rules/*.yml'): (folder/'rules'/f.name).write_text(re.sub(r'(?m)^    interval: .*$', '', f.read_text()))
    (folder/'prometheus.yml').write_text(yaml.safe_dump(config))

@pytest.fixture(scope='module')
def prom(tmp_path_factory):
    "A function that asks a real Prometheus, and the address of a real Alertmanager."
    names, folder = (require('prometheus'), require('alertmanager')), tmp_path_factory.mktemp('prom')
    servers = dict(api=serve(api_page()), jobs=serve(exporter_page()))
    places = {k: f'127.0.0.1:{v.server_port}' for k, v in servers.items()} | dict(prometheus=f'127.0.0.1:{free_port()}', alertmanager=f'127.0.0.1:{free_port()}')
    quick_config(folder, places)
    running = [start(names[1], f'--config.file={AM}', f'--storage.path={folder}/am', f'--web.listen-address={places["alertmanager"]}', '--cluster.listen-address=', url=f'http://{places["alertmanager"]}/-/ready')]
    try:
        running.append(start(names[0], f'--config.file={folder}/prometheus.yml', f'--storage.tsdb.path={folder}/data', f'--web.listen-address={places["prometheus"]}', '--rules.alert.resend-delay=2s', url=f'http://{places["prometheus"]}/-/ready'))
        def ask(what, **params):
            try: return json.load(urllib.request.urlopen(f'http://{places["prometheus"]}/api/v1/{what}?{urllib.parse.urlencode(params)}', timeout=10))
            except urllib.error.HTTPError as e: return json.load(e)
        ask.alertmanager = places['alertmanager']
        yield ask
    finally:
        for p in reversed(running): stop(p)
        for s in servers.values(): s.shutdown()

def filled(expr): # in the way that Grafana does it
    "An expression without variables."
    for k, v in {'$__rate_interval': '10s', '$__interval': '5s', '$__range': '1m', '$instance': '.*', '$model': 'plants'}.items(): expr = expr.replace(k, v)
    return expr

def trouble(ask, expr, patience=45):
    "Why a real Prometheus has no answer to a query; '' where it has one."
    def labels_of(name):
        series = ask('series', **{'match[]': f'{{__name__="{name}"}}'})['data']
        return set().union(*series) if series else None
    end = time.monotonic() + patience
    while True:
        r = ask('query', query=filled(expr))
        if r['status'] != 'success': return r['error']
        if any(o['value'][1] != 'NaN' for o in r['data']['result']) and not (f := faults(filled(expr), labels_of)): return ''
        if time.monotonic() > end: return '; '.join(faults(filled(expr), labels_of)) or 'no answer'
        time.sleep(1)

@pytest.mark.parametrize('name', NAMES)
def test_panels_are_answered(prom, name):
    found = [(title, expr, t) for title, expr in asks(name) if (t := trouble(prom, expr))]
    assert not found, '\n'.join(map(str, found))

@pytest.mark.parametrize('name', NAMES)
def test_annotations_and_choices_are_answered(prom, name):
    d = json.loads((BOARDS/f'{name}.json').read_text())
    for o in d['annotations']['list']: assert prom('query', query=o['expr'])['status'] == 'success'
    for v in d.get('templating', {}).get('list') or []:
        metric, label = re.fullmatch(r'label_values\((.*), (\w+)\)', v['query']['query']).groups()
        assert prom('query', query=f'group by ({label}) ({metric})')['data']['result']

def test_rules_run(prom):
    assert not trouble(prom, 'sum(prometheus_rule_group_rules)')
    assert not [r for g in prom('rules')['data']['groups'] for r in g['rules'] if r['health'] == 'err']

def test_the_exporters_job_is_the_job(prom):
    assert not trouble(prom, 'plant_job_running{job="train"}') and not trouble(prom, 'up{job="jobs"} == 1')

def test_an_alert_arrives(prom):
    "From rule to Alertmanager: with its link, without the label that the link was made of."
    for _ in range(60):
        found = [o for o in json.load(urllib.request.urlopen(f'http://{prom.alertmanager}/api/v2/alerts', timeout=5)) if o['labels']['alertname'] == 'Watchdog']
        if found: break
        time.sleep(.5)
    assert found[0]['annotations']['runbook_url'] == yaml.safe_load((PROM/'prometheus.yml').read_text())['global']['external_labels']['docs'] + '/guides/alerts.html#watchdog'
    assert 'docs' not in found[0]['labels'] and found[0]['receivers'] == [{'name': 'heartbeat'}]

def test_one_cause_is_one_notification(tmp_path):
    "Which alerts a real Alertmanager holds back while another says why."
    address = f'127.0.0.1:{free_port()}'
    p = start(require('alertmanager'), f'--config.file={AM}', f'--storage.path={tmp_path}', f'--web.listen-address={address}', '--cluster.listen-address=', url=f'http://{address}/-/ready')
    def post(*alerts):
        body = json.dumps([dict(labels=dict(zip(('alertname', 'severity', 'area', 'job'), o.split()))) for o in alerts]).encode()
        urllib.request.urlopen(urllib.request.Request(f'http://{address}/api/v2/alerts', body, {'Content-Type': 'application/json'}), timeout=5)
    def held():
        found = json.load(urllib.request.urlopen(f'http://{address}/api/v2/alerts', timeout=5))
        return {' '.join(o['labels'].get(k, '') for k in ('alertname', 'severity', 'job')).strip() for o in found if o['status']['inhibitedBy']}
    def soon(want):
        for _ in range(50):
            if held() == want: return True
            time.sleep(.2)
        return held()
    try:
        post('AvailabilityBudgetBurn page api', 'AvailabilityBudgetBurn ticket api', 'LatencyBudgetBurn ticket api', 'ModelStale ticket model', 'JobFailed ticket jobs train', 'JobOverdue ticket jobs train', 'JobOverdue ticket jobs ingest')
        assert soon(want := {'AvailabilityBudgetBurn ticket', 'JobOverdue ticket train'}) is True
        post('ApiHasNoModel page api', 'ModelReloadFailed ticket model')
        assert soon(want := want | {'AvailabilityBudgetBurn page', 'ModelReloadFailed ticket'}) is True
        post('ApiDown page api', 'OldModelServes ticket model', 'ExporterDown ticket monitoring')
        assert soon(want | {'LatencyBudgetBurn ticket', 'OldModelServes ticket', 'ApiHasNoModel page'}) is True
    finally: stop(p)

# Whether these checks see anything

@pytest.mark.parametrize('expr,why', [
    ('sum(plant_photoz)', 'no metric plant_photoz'), ('sum(plant_photos{state="stored"})', 'plant_photos has no label state'), ('sum by (colour) (plant_photos)', 'label colour'),
    ('plant_photos{status="eaten"}', 'no answer'), ('sum(plant_photos', 'parse error'), ('0 * plant_photos{status="stored"} / 0', 'no answer')])
def test_a_bad_panel_is_found(prom, expr, why): assert why in trouble(prom, expr, patience=3)

@pytest.mark.parametrize('expr', ['plant_requests{status="200"} > 0', 'sum by (team) (plant_serving)', 'plant_job_failed{name="train"}', 'plant:predict_errors:ratio2h > 1'])
def test_a_bad_rule_is_found(expr): assert faults(expr, labels_in_code)

@pytest.mark.slow
@pytest.mark.parametrize('old,new', [('== 0 # also', '== 7 # also'), ('for: 2m', 'for: 1h'), ('severity: page', 'severity: ticket'), ('sum(up{job="api"} or vector(0)) == 0', 'vector(1)')])
def test_a_changed_rule_is_found(old, new, tmp_path):
    promtool = require('promtool')
    shutil.copytree(PROM, tmp_path/'p')
    file = tmp_path/'p'/'rules'/'api.yml'
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    assert subprocess.run([promtool, 'test', 'rules', str(tmp_path/'p'/'tests'/'api.yml')], capture_output=True).returncode
