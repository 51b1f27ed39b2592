"What must hold of the whole system; test_stack.py runs it in a network of its own."
import json, re, shutil, threading, time, urllib.parse, urllib.request
import psutil, pytest
from helpers import EXPORTED, noise_photo, prose, quick, serve_site, wait_for
from services import Stack, bin


def ask(url, data=None, **headers):
    "What a server answers."
    with urllib.request.urlopen(urllib.request.Request(url, data, {k.replace('_', '-'): v for k, v in headers.items()}), timeout=30) as f: body = f.read()
    try: return json.loads(body)
    except ValueError: return body.decode()

def value(query):
    "What Prometheus says to a query: labels and value of each series."
    found = ask('http://prometheus:9090/api/v1/query?' + urllib.parse.urlencode(dict(query=query)))['data']['result']
    return [(o['metric'], float(o['value'][1])) for o in found]

@pytest.fixture(scope='module')
def stack(tmp_path_factory):
    "All that can run without Docker, but for the API."
    o = Stack(tmp_path_factory.mktemp('stack'), S3_ENDPOINT='http://seaweedfs:8333')
    try:
        o.start('postgres', 'seaweedfs')
        o.healthy('seaweedfs')
        wait_for(lambda: 's3://mlflow can be written' in o.run('stores'), 120, 'stores') # which Compose starts again, too
        o.start('prometheus', 'alertmanager', 'mlflow', 'exporter')
        o.healthy('prometheus', 'alertmanager', 'mlflow', 'exporter')
        yield o
    finally: o.close()

def alerts(): return {o['labels']['alertname']: o for o in ask('http://alertmanager:9093/api/v2/alerts')}

def test_the_main_job_while_nobody_answers(stack):
    "A model is made; meanwhile there is no API, and an alert says so."
    said = stack.run('cli', 'job', 'run', '--all', '-p', 'synthetic', '60', '-p', 'seed', '7', **quick)
    assert '✓ promote' in said, said
    wait_for(lambda: 'ApiDown' in alerts(), 240, 'the alert')
    assert [o['name'] for o in alerts()['ApiDown']['receivers']] == ['page']

def test_a_photo_all_the_way(stack):
    stack.start('api', 'app', 'dashboard')
    stack.healthy('api', 'app', 'dashboard')
    assert ask('http://api:8000/ready')['ready']
    smoke = stack.folder/'docker/smoke.py'
    said = stack.run_program('api', str(bin/'python'), str(smoke), 'api', 'app', 'dashboard', 'mlflow', 'exporter', 'prometheus', 'alertmanager')
    assert re.search('✓ Prometheus knows', said) and re.search('✓ .*dashboard', said), said
    stack.kill('app', 'dashboard')
    wait_for(lambda: stack.sql('SELECT count(*) FROM predictions')[0][0] == 1, 30, 'the prediction in the database')
    assert stack.sql('SELECT count(*) FROM feedback')[0][0] == 1
    wait_for(lambda: not value('ALERTS{alertname="ApiDown"}'), 60, 'the end of the alert')

def test_all_targets_are_scraped(stack):
    wait_for(lambda: len(value('up == 1')) == len(value('up')) == 4, 60, 'every target')

def test_the_exporter_has_the_figures_that_boards_and_rules_ask_for(stack):
    there = {o['__name__']: {*o} - {'__name__', 'instance', 'job'} for o, _ in value('{job!~"api|prometheus|alertmanager",__name__=~"plant_.*"}')}
    assert {*EXPORTED} <= {*there}, {*EXPORTED} - {*there}
    for k, labels in EXPORTED.items(): assert there[k] >= {*labels} - {'job'}, k

class Asker(threading.Thread):
    "Asks for predictions all the time; `failed` says what went wrong, `answered` which predictions there were."
    def __init__(self): self.failed, self.answered, self.ending = [], [], threading.Event(); super().__init__(daemon=True)
    def run(self):
        from plant_mlops.data.synthetic import LABELS, draw_jpeg
        data = draw_jpeg(LABELS[0], 0, 0)
        while not self.ending.wait(.2):
            try: self.answered.append(ask('http://api:8000/predict', data, Content_Type='image/jpeg')['id'])
            except Exception as e: self.failed.append(repr(e))
    def __enter__(self): self.start(); return self
    def __exit__(self, *e): self.ending.set(); self.join()

class Job:
    "A job at work while services go away; where it fails it says why, and it does its work when it is begun again."
    def __init__(self, stack, name, *args, **env):
        self.stack, self.name, self.args, self.env, self.codes = stack, name, args, env, []
        self.begin()
    def begin(self): self.begun, self.p = time.time(), self.stack.begin(self.name, 'cli', 'job', 'run', self.name, *self.args, **self.env)
    def ended(self, seconds=0):
        "Whether it has ended, or does so within some seconds."
        try: self.codes.append(self.p.wait(seconds))
        except psutil.TimeoutExpired: return False
        said = (self.stack.folder/f'{self.name}.log').read_text()
        print(f'{self.name} ended with {self.codes[-1]}')
        assert 'Traceback' not in said and (self.codes[-1] == 0 or 'error' in said), said[-3000:]
        return True
    def finish(self):
        while self.ended(300) and self.codes[-1]:
            assert len(self.codes) < 9, self.stack.tail(self.name)
            self.begin()
        assert self.codes[-1] == 0, f'{self.name} does not end'

def test_each_service_is_away_for_20_seconds(stack):
    "While photos are ingested, a model is trained, and predictions are asked for."
    import mlflow
    c, gone = mlflow.MlflowClient('http://mlflow:5000'), ('mlflow', 'postgres', 'seaweedfs')
    training = lambda: c.search_runs([c.get_experiment_by_name('plants').experiment_id], "attributes.status = 'RUNNING'")
    def learning(job):
        if job.ended(): job.begin()
        return training() and training()[0].info.start_time/1000 > job.begun # not one that was left open
    versions = lambda: len(c.search_model_versions("name = 'plants'"))
    before = versions()
    with serve_site({f'/{o}-{i}.jpg': noise_photo(len(o)*100 + i) for o in gone for i in range(30)}, delay=.4) as site, Asker() as asker:
        train = Job(stack, 'train', '-p', 'again', 'true', **quick | dict(PLANT_EPOCHS='30'))
        for away in gone:
            (csv := stack.folder/f'{away}.csv').write_text('url_source,label\n' + ''.join(f'http://localhost:{site.server_address[1]}{o},grass\n' for o in site.pages if away in o))
            stack.run('cli', 'catalog', 'load', str(csv))
            ingest = Job(stack, 'ingest', '-p', 'synthetic', '0', PLANT_INGEST_ALLOW_HOSTS='localhost,127.0.0.0/8,::1/128', PLANT_INGEST_PER_HOST='1', PLANT_INGEST_BATCH='5')
            wait_for(lambda: sum(away in o for o in site.seen) > 5, 60, 'ingestion')
            wait_for(lambda: learning(train), 180, 'training')
            stack.kill(away)
            time.sleep(20)
            stack.start(away)
            if away != 'postgres': stack.healthy(away)
            ingest.finish()
        train.finish()
    rows = stack.sql("SELECT status, sha256 FROM plants_data WHERE url_source LIKE 'http://localhost%'")
    assert [o for o, _ in rows] == ['stored']*90 and len({h for _, h in rows}) == 90
    assert not asker.failed and len(asker.answered) > 150
    wait_for(lambda: stack.sql(f"SELECT count(*) FROM predictions WHERE id IN ({','.join(map(repr, asker.answered))})")[0][0] == len(asker.answered), 60, 'all predictions in the database')
    assert not training() and versions() == before + train.codes.count(0)

def commands_below(heading):
    "The commands beneath a heading of the page about operations."
    return re.search(rf'^## {heading}$.*?^```[^\n]*\n(.*?)^```', prose('nbs/guides/operations.ipynb'), re.M | re.S)[1].splitlines()

def answers():
    "What is in production, and what it says to a photo."
    from plant_mlops.data.synthetic import LABELS, draw_jpeg
    return ask('http://api:8000/model/info')['version'], ask('http://api:8000/predict', draw_jpeg(LABELS[1], 3, 3), Content_Type='image/jpeg')['probabilities']

def test_back_to_the_model_before(stack):
    one = answers()
    stack.run('cli', 'promote', '--version', '2', '--force')
    wait_for(lambda: answers()[0] == '2', 30, 'version 2')
    stack.do(commands_below('Rollback'))
    wait_for(lambda: answers() == one, 30, 'version 1')

def test_backed_up_and_restored_elsewhere(stack, tmp_path_factory):
    before, rows = answers(), stack.sql('SELECT count(*) FROM plants_data')
    versions = stack.run('cli', 'history', '--json')
    stack.do(commands_below('Back-up'))
    stack.close() # and with it all that it knew
    there = Stack(tmp_path_factory.mktemp('elsewhere'), S3_ENDPOINT='http://seaweedfs:8333')
    try:
        shutil.copytree(stack.folder/'docker/backup', there.folder/'docker/backup')
        shutil.rmtree(stack.folder/'volumes')
        there.do(commands_below('Restore'))
        there.healthy('api', 'mlflow')
        wait_for(lambda: answers() == before, 30, 'the same champion')
        assert there.sql('SELECT count(*) FROM plants_data') == rows
        assert there.run('cli', 'history', '--json') == versions
        assert '"promoted": true' in there.run('cli', 'promote', '--version', '1', '--force', '--json') # its file is there, too
        assert there.services['postgres']['environment']['POSTGRES_PASSWORD'] != stack.services['postgres']['environment']['POSTGRES_PASSWORD']
    finally: there.close()
