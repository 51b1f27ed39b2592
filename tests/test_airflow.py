"A real Airflow 3 with a real PostgreSQL runs the DAGs of the job table, which start each other by asset events."
import json, os, subprocess, sys, urllib.request
from contextlib import suppress
from functools import cached_property
from pathlib import Path
import psutil, pytest
from helpers import draw_photos, free_port, missing, quick, root, start_postgres, wait_for
from plant_mlops.core.config import settings
from plant_mlops.jobs.runs import history
from plant_mlops.jobs.table import job_table

pytestmark = pytest.mark.timeout(1200)
PHOTO_DAGS = ('data_ingestion', 'training', 'model_evaluation', 'model_deployment')
STOCK_DAGS = ('stocks_ingestion', 'stocks_training', 'stocks_deployment')
dag_ids = {job.group for job in job_table(settings()).jobs.values()}

# -- Airflow

def install_airflow(venv):
    "Make an environment with Airflow, as the notebook `dags` says."
    uv = Path(sys.executable).with_name('uv')
    create = [uv, 'venv', '--quiet', '--clear', '--python', sys.executable, venv]
    install = [uv, 'pip', 'install', '--quiet', '--compile-bytecode', '--python', venv/'bin/python',
               '-e', f'{root}[airflow]']
    for command in (create, install):
        env = os.environ | dict(UV_SYSTEM_CERTS='1')
        result = subprocess.run(command, capture_output=True, text=True, env=env)
        if result.returncode: missing('package index', result.stderr[-300:])
    install_kernel = [sys.executable, '-m', 'ipykernel', 'install', '--prefix', venv, '--name', 'plant-mlops']
    subprocess.run(install_kernel, check=True, capture_output=True)

@pytest.fixture(scope='module')
def airflow_venv():
    "Airflow's own environment, which is kept, and made again if settings.ini has changed."
    venv = Path(sys.prefix)/'airflow'
    installed, requirements = venv/'.installed', (root/'settings.ini').read_text()
    if not installed.exists() or installed.read_text() != requirements:
        install_airflow(venv)
        installed.write_text(requirements)
    return venv

def airflow_variables(url, port, database) -> dict:
    "Airflow's configuration as variables of the environment; `database` is a URL without its scheme."
    secret = 'only for this test, and long enough for every library: 64 bytes'
    options = dict(
        core__executor='LocalExecutor', core__parallelism=2, core__load_examples=False,
        core__simple_auth_manager_all_admins=True, core__fernet_key='',
        core__execution_api_server_url=f'{url}/execution/', core__hostname_callable='socket.gethostname',
        database__sql_alchemy_conn=f'postgresql+psycopg2{database}',
        database__sql_alchemy_conn_async=f'postgresql+asyncpg{database}',
        api__host='127.0.0.1', api__port=port, api__base_url=url, api__secret_key=secret, api__workers=1,
        api_auth__jwt_secret=secret,
        scheduler__scheduler_heartbeat_sec=1, scheduler__job_heartbeat_sec=1, scheduler__scheduler_idle_sleep_time=1,
        dag_processor__parsing_processes=1, dag_processor__refresh_interval=3600,
        dag_processor__min_file_process_interval=3600, usage_data_collection__enabled=False)
    return {f'AIRFLOW__{name.upper()}': str(value) for name, value in options.items()}

class Airflow:
    "API server, scheduler and DAG processor on loopback; their metadata is in PostgreSQL."
    def __init__(self, venv, folder, database, **env):
        port = free_port()
        self.venv = venv
        self.folder = folder
        self.processes = []
        self.url = f'http://127.0.0.1:{port}'
        self.env = os.environ | airflow_variables(self.url, port, database) | env
        self.env |= dict(AIRFLOW_HOME=str(folder), PATH=f'{venv}/bin:{os.environ["PATH"]}')
        (folder/'dags').mkdir()
        code = 'from plant_mlops.targets.airflow import dags; globals().update(dags(retries=0))\n'
        (folder/'dags/plants.py').write_text(code)

    def start(self):
        "Create the tables, start the processes, and wait until they are healthy."
        program, kw = self.venv/'bin/airflow', dict(env=self.env, cwd=self.folder)
        subprocess.run([program, 'db', 'migrate'], **kw, check=True, capture_output=True)
        for args in (['api-server'], ['dag-processor'], ['scheduler', '--skip-serve-logs']):
            with open(self.folder/f'{args[0]}.log', 'w') as log:
                self.processes.append(psutil.Popen([program, *args], **kw, stdout=log, stderr=log))
        wait_for(self.is_healthy, 180, 'Airflow', every=1)

    def is_healthy(self) -> bool:
        if self.get('dags')['total_entries'] != len(dag_ids): return False
        return self.get('monitor/health')['scheduler']['status'] == 'healthy'

    @cached_property
    def token(self) -> str:
        "Of the user that all requests are made for."
        with urllib.request.urlopen(f'{self.url}/auth/token', timeout=10) as response:
            return json.load(response)['access_token']

    def request(self, method, path, **body):
        "Response of the REST API."
        headers = {'Authorization': f'Bearer {self.token}', 'Content-Type': 'application/json'}
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(f'{self.url}/api/v2/{path}', data, headers, method=method)
        with urllib.request.urlopen(request, timeout=10) as response: return json.load(response)

    def get(self, path): return self.request('GET', path)

    def unpause(self, dag): self.request('PATCH', f'dags/{dag}', is_paused=False)

    def runs(self, dag='~') -> list:
        "Runs of a DAG, or of all; without scheduled ones, which come if the test runs at their hour."
        runs = self.get(f'dags/{dag}/dagRuns?limit=100&order_by=run_after')['dag_runs']
        return [run for run in runs if run['run_type'] != 'scheduled']

    def events(self) -> list:
        "Names of the assets of all events, sorted."
        return sorted(event['name'] for event in self.get('assets/events?limit=100')['asset_events'])

    def wait_for_last_run(self, dag) -> str:
        "State of the last run of a DAG, once it has ended."
        wait_for(lambda: self.runs(dag)[-1]['state'] in ('success', 'failed'), 300, dag, every=1)
        return self.runs(dag)[-1]['state']

    def trigger(self, dag, **conf):
        "Run a DAG; returns its final state, and (task, state) of its tasks."
        run = self.request('POST', f'dags/{dag}/dagRuns', logical_date=None, conf=conf)['dag_run_id']
        state = self.wait_for_last_run(dag)
        tasks = self.get(f'dags/{dag}/dagRuns/{run}/taskInstances')['task_instances']
        return state, sorted((task['task_id'], task['state']) for task in tasks)

    def assert_triggered_by_assets(self, dag):
        "Wait for a run of a DAG; it has to succeed, and to have been started by asset events."
        wait_for(lambda: self.runs(dag), 120, dag, every=1)
        assert self.wait_for_last_run(dag) == 'success', dag
        assert self.runs(dag)[0]['run_type'] == 'asset_triggered', dag

    def stop(self):
        "Kill the processes and their children."
        processes = []
        for process in self.processes:
            with suppress(psutil.NoSuchProcess): processes += [*process.children(recursive=True), process]
        for process in processes:
            with suppress(psutil.NoSuchProcess): process.kill()
        psutil.wait_procs(processes, 10)

@pytest.fixture(scope='module')
def airflow(airflow_venv, tmp_path_factory):
    "A real Airflow, whose trainings take seconds."
    folder = tmp_path_factory.mktemp('airflow')
    with start_postgres() as postgres:
        for statement in ('CREATE DATABASE airflow', 'ALTER SYSTEM SET synchronous_commit = off',
                          'SELECT pg_reload_conf()'):
            postgres.psql(statement)
        database = postgres.get_uri('airflow').removeprefix('postgresql')
        server = Airflow(airflow_venv, folder, database, PLANT_HOME=str(folder/'home'), **quick)
        try:
            server.start()
            yield server
        finally: server.stop()

# -- Tests, in this order: the events of the photos do not count for the other model

def champion(airflow, model='plants') -> dict:
    "The pointer to the model in production."
    return json.loads((airflow.folder/f'home/store/models/{model}/champion.json').read_text())

def test_new_photos_become_a_model_in_production(airflow, tmp_path):
    photos = draw_photos(tmp_path/'photos')
    ingestion, *others = PHOTO_DAGS
    assert airflow.get('importErrors')['total_entries'] == 0
    for dag in PHOTO_DAGS: airflow.unpause(dag)
    state, tasks = airflow.trigger(ingestion, photos=str(photos))
    assert state == 'success'
    assert tasks == [('ingest', 'success'), ('ingest', 'success'), ('prepare', 'success'), ('shards', 'success')]
    for dag in others: airflow.assert_triggered_by_assets(dag)
    assert champion(airflow)['version'] == '1'
    events = airflow.events()
    assert {*events} == {'photos', 'dataset', 'model', 'evaluation', 'champion'}
    assert events.count('dataset') == 1

    state, _ = airflow.trigger(ingestion, photos=str(photos)) # the same photos
    assert state == 'success'
    assert airflow.events() == events, 'no new photos, and yet an event'

    state, tasks = airflow.trigger(ingestion, photos='/nowhere')
    assert state == 'failed'
    assert ('prepare', 'upstream_failed') in tasks
    assert airflow.events() == events, 'an event after a failed ingestion'
    assert len(airflow.runs()) == 6, 'a DAG ran after a failed ingestion'
    assert champion(airflow)['version'] == '1'
    runs = history(settings(home=airflow.folder/'home'), limit=None)
    for run in runs:
        assert run.report, runs
        assert run.why.startswith('airflow '), runs
    [error] = {run.error for run in runs if run.status == 'failed'}
    assert '/nowhere is not a folder' in error

def test_the_dags_of_another_workload_do_not_affect_those_of_the_photos(airflow):
    ingestion, *others = STOCK_DAGS
    before = airflow.events()
    for dag in STOCK_DAGS: airflow.unpause(dag)
    state, tasks = airflow.trigger(ingestion, days=700)
    assert state == 'success'
    assert tasks == [('stocks-ingest', 'success')]
    for dag in others: airflow.assert_triggered_by_assets(dag)
    pointer = champion(airflow, 'stocks')
    assert (pointer['version'], pointer['source'], pointer['arch']) == ('1', 'synthetic', 'random_forest')
    assert airflow.events() == sorted([*before, 'stocks-dataset', 'stocks-model', 'stocks-champion'])
    assert champion(airflow)['version'] == '1'
