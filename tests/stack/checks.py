"Checks of the whole system; test_stack.py runs them in a network of their own."
import json, re, shutil, threading, time, urllib.parse, urllib.request
import psutil, pytest
from helpers import EXPORTED, noise_photo, programs, prose, quick, serve_site, wait_for
from services import Stack

S3 = dict(S3_ENDPOINT='http://seaweedfs:8333')

# -- Requests to the services

def request(url, data=None, **headers):
    "The body of a response, as text or as what its JSON means."
    headers = {name.replace('_', '-'): value for name, value in headers.items()}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as response:
        body = response.read()
    try: return json.loads(body)
    except ValueError: return body.decode()

def query_prometheus(query) -> list:
    "Labels and value of each series."
    url = 'http://prometheus:9090/api/v1/query?' + urllib.parse.urlencode(dict(query=query))
    return [(series['metric'], float(series['value'][1])) for series in request(url)['data']['result']]

def alerts() -> dict:
    "What Alertmanager has received, by name."
    return {alert['labels']['alertname']: alert for alert in request('http://alertmanager:9093/api/v2/alerts')}

def predict(photo): return request('http://api:8000/predict', photo, Content_Type='image/jpeg')

def drawn_photo(i) -> bytes:
    from plant_mlops.data.synthetic import LABELS, draw_jpeg
    return draw_jpeg(LABELS[i % 2], i, i)

def champion_answer() -> tuple:
    "The version in production, and its probabilities for a photo."
    return request('http://api:8000/model/info')['version'], predict(drawn_photo(3))['probabilities']

def count(stack, query) -> int: return stack.sql(f'SELECT count(*) FROM {query}')[0][0]

def documented_commands(heading) -> list:
    "The commands below a heading of the guide about operations."
    pattern = rf'^## {heading}$.*?^```[^\n]*\n(.*?)^```'
    return re.search(pattern, prose('nbs/guides/operations.ipynb'), re.M | re.S)[1].splitlines()

# -- Tests, in this order

@pytest.fixture(scope='module')
def stack(tmp_path_factory):
    "All services that can run without Docker, but for the API and its pages."
    stack = Stack(tmp_path_factory.mktemp('stack'), **S3)
    def are_stores_ready(): return 's3://mlflow can be written' in stack.run('stores')
    try:
        stack.start('postgres', 'seaweedfs')
        stack.wait_healthy('seaweedfs')
        wait_for(are_stores_ready, 120, 'stores') # Compose, too, starts it again if it fails
        stack.start('prometheus', 'alertmanager', 'mlflow', 'exporter')
        stack.wait_healthy('prometheus', 'alertmanager', 'mlflow', 'exporter')
        yield stack
    finally: stack.close()

def test_all_jobs_make_a_model_while_an_alert_says_that_the_api_is_down(stack):
    output = stack.run('cli', 'job', 'run', '--all', '-p', 'synthetic', '60', '-p', 'seed', '7', **quick)
    assert '✓ promote' in output, output
    wait_for(lambda: 'ApiDown' in alerts(), 240, 'the alert')
    assert [receiver['name'] for receiver in alerts()['ApiDown']['receivers']] == ['page']

def test_a_prediction_and_its_feedback_reach_the_database_and_the_alert_ends(stack):
    stack.start('api', 'app', 'dashboard')
    stack.wait_healthy('api', 'app', 'dashboard')
    assert request('http://api:8000/ready')['ready']
    services = ('api', 'app', 'dashboard', 'mlflow', 'exporter', 'prometheus', 'alertmanager')
    output = stack.run_program('api', str(programs/'python'), str(stack.folder/'docker/smoke.py'), *services)
    assert re.search('✓ Prometheus knows', output), output
    assert re.search('✓ .*dashboard', output), output
    stack.kill('app', 'dashboard')
    wait_for(lambda: count(stack, 'predictions') == 1, 30, 'the prediction in the database')
    assert count(stack, 'feedback') == 1
    wait_for(lambda: not query_prometheus('ALERTS{alertname="ApiDown"}'), 60, 'the end of the alert')

def test_prometheus_scrapes_all_targets(stack):
    wait_for(lambda: len(query_prometheus('up == 1')) == len(query_prometheus('up')) == 4, 60, 'every target')

def test_the_exporter_has_the_metrics_and_labels_of_dashboards_and_rules(stack):
    series = query_prometheus('{job!~"api|prometheus|alertmanager",__name__=~"plant_.*"}')
    labels = {metric['__name__']: {*metric} - {'__name__', 'instance', 'job'} for metric, _ in series}
    assert {*EXPORTED} <= {*labels}, {*EXPORTED} - {*labels}
    for name, expected in EXPORTED.items(): assert labels[name] >= {*expected} - {'job'}, name

class PredictionLoad:
    "Requests predictions in a thread; `ids` has those of the answers, and `errors` what failed."
    def __init__(self):
        self.ids = []
        self.errors = []
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self):
        photo = drawn_photo(0)
        while not self.stopping.wait(.2):
            try: self.ids.append(predict(photo)['id'])
            except Exception as error: self.errors.append(repr(error))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *args):
        self.stopping.set()
        self.thread.join()

class RestartedJob:
    "A job that runs while services are down; it is started again until it succeeds, and has to fail with a message."
    def __init__(self, stack, name, *args, **env):
        self.stack = stack
        self.name = name
        self.args = args
        self.env = env
        self.exit_codes = []
        self.start()

    def start(self):
        self.started_at = time.time()
        self.process = self.stack.start_job(self.name, 'cli', 'job', 'run', self.name, *self.args, **self.env)

    def has_ended(self, seconds=0) -> bool:
        "Whether it has ended, or ends within some seconds."
        try: exit_code = self.process.wait(seconds)
        except psutil.TimeoutExpired: return False
        self.exit_codes.append(exit_code)
        print(f'{self.name} ended with {exit_code}')
        log = (self.stack.folder/f'{self.name}.log').read_text()
        assert 'Traceback' not in log, log[-3000:]
        assert exit_code == 0 or 'error' in log, log[-3000:]
        return True

    def finish(self):
        "Wait until it succeeds."
        while self.has_ended(300) and self.exit_codes[-1]:
            assert len(self.exit_codes) < 9, self.stack.log_tail(self.name)
            self.start()
        assert self.exit_codes[-1] == 0, f'{self.name} does not end'

class Experiment:
    "The runs and versions of the photos in MLflow."
    def __init__(self):
        import mlflow
        self.client = mlflow.MlflowClient('http://mlflow:5000')

    def running(self) -> list:
        experiment = self.client.get_experiment_by_name('plants')
        return self.client.search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'")

    def version_count(self) -> int: return len(self.client.search_model_versions("name = 'plants'"))

    def is_training(self, job) -> bool:
        "Whether a job has begun its run; starts the job again if it has ended."
        if job.has_ended(): job.start()
        runs = self.running()
        return bool(runs) and runs[0].info.start_time/1000 > job.started_at # not a run that a failed job left open

def load_urls(stack, name, urls):
    "Add URLs to the catalog, from a CSV file."
    file = stack.folder/f'{name}.csv'
    file.write_text('\n'.join(['url_source,label', *(f'{url},grass' for url in urls), '']))
    stack.run('cli', 'catalog', 'load', str(file))

def start_ingestion(stack):
    return RestartedJob(stack, 'ingest', '-p', 'synthetic', '0', PLANT_INGEST_PER_HOST='1', PLANT_INGEST_BATCH='5',
                        PLANT_INGEST_ALLOW_HOSTS='localhost,127.0.0.0/8,::1/128')

def test_ingestion_training_and_predictions_survive_20_seconds_without_each_service(stack):
    services = ('mlflow', 'postgres', 'seaweedfs')
    experiment = Experiment()
    versions_before = experiment.version_count()
    pages = {f'/{name}-{i}.jpg': noise_photo(len(name)*100 + i) for name in services for i in range(30)}
    with serve_site(pages, delay=.4) as site, PredictionLoad() as load:
        train = RestartedJob(stack, 'train', '-p', 'again', 'true', **quick | dict(PLANT_EPOCHS='2'))
        for service in services:
            port = site.server_address[1]
            load_urls(stack, service, [f'http://localhost:{port}{path}' for path in pages if service in path])
            ingest = start_ingestion(stack)
            wait_for(lambda: sum(service in path for path in site.requests) > 5, 60, 'ingestion')
            wait_for(lambda: experiment.is_training(train), 180, 'training')
            stack.kill(service)
            time.sleep(20)
            stack.start(service)
            if service != 'postgres': stack.wait_healthy(service)
            ingest.finish()
        train.finish()
    rows = stack.sql("SELECT status, sha256 FROM plants_data WHERE url_source LIKE 'http://localhost%'")
    assert [status for status, _ in rows] == ['stored']*90
    assert len({sha256 for _, sha256 in rows}) == 90
    assert not load.errors
    assert len(load.ids) > 150
    ids = ','.join(map(repr, load.ids))
    def are_all_stored(): return count(stack, f'predictions WHERE id IN ({ids})') == len(load.ids)
    wait_for(are_all_stored, 60, 'all predictions in the database')
    assert not experiment.running()
    assert experiment.version_count() == versions_before + train.exit_codes.count(0)

def test_the_documented_rollback_restores_the_version_before(stack):
    before = champion_answer()
    stack.run('cli', 'promote', '--version', '2', '--force')
    wait_for(lambda: champion_answer()[0] == '2', 30, 'version 2')
    stack.run_documented(documented_commands('Rollback'))
    wait_for(lambda: champion_answer() == before, 30, 'version 1')

def postgres_password(stack): return stack.services['postgres']['environment']['POSTGRES_PASSWORD']

def test_the_documented_backup_is_restored_on_another_machine(stack, tmp_path_factory):
    answer, rows = champion_answer(), count(stack, 'plants_data')
    history = stack.run('cli', 'history', '--json')
    stack.run_documented(documented_commands('Back-up'))
    stack.close()
    other = Stack(tmp_path_factory.mktemp('elsewhere'), **S3)
    try:
        shutil.copytree(stack.folder/'docker/backup', other.folder/'docker/backup')
        shutil.rmtree(stack.folder/'volumes')
        other.run_documented(documented_commands('Restore'))
        other.wait_healthy('api', 'mlflow')
        wait_for(lambda: champion_answer() == answer, 30, 'the same champion')
        assert count(other, 'plants_data') == rows
        assert other.run('cli', 'history', '--json') == history
        # The file of the model is there, too.
        assert '"promoted": true' in other.run('cli', 'promote', '--version', '1', '--force', '--json')
        assert postgres_password(other) != postgres_password(stack)
    finally: other.close()
