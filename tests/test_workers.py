"A server of several processes: reloads, metrics, trials and its page, also when one of its processes is killed."
import contextlib, os, signal, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
import httpx, psutil, pytest
from helpers import logged_rows, metric, serving, wait_for
from plant_mlops.core.config import Settings, settings
from plant_mlops.core.store import open_store
from plant_mlops.registry.model_file import linear_model
from plant_mlops.registry.example_model import example_model, photo_bytes, publish_example

PHOTO = photo_bytes('gold')
TOKEN = 'hush'
AUTHORIZED = {'Authorization': f'Bearer {TOKEN}'}

def is_worker(process) -> bool:
    "Whether a process shares its metrics, as workers do; false if it has ended."
    with contextlib.suppress(psutil.Error):
        return any('/metrics/' in memory_map.path for memory_map in process.memory_maps())
    return False

def is_page(process) -> bool:
    "Whether a child of the supervisor listens on a port of its own, as the page does; false if it has ended."
    with contextlib.suppress(psutil.Error):
        return any(connection.status == psutil.CONN_LISTEN for connection in process.net_connections('inet'))
    return False

class Server(NamedTuple):
    "`plant-mlops serve` with two workers."
    s: Settings
    process: subprocess.Popen # the supervisor
    client: httpx.Client # keeps its connection, and so talks to one worker

    def children(self, recursive=False) -> list: return psutil.Process(self.process.pid).children(recursive=recursive)

    def worker_pids(self) -> set:
        "Process IDs of the workers, which are children of the fork server."
        return {child.pid for child in self.children(recursive=True) if is_worker(child)}

    def page_pids(self) -> set: return {child.pid for child in self.children() if is_page(child)}

    def get(self, path, **kw):
        "A response over a new connection, and so from any worker."
        return httpx.get(f'{self.client.base_url}{path}', **kw)

    def post(self, path, **kw): return httpx.post(f'{self.client.base_url}{path}', **kw)

    def reload(self): return self.client.post('/reload', headers=AUTHORIZED)

    def metrics(self) -> str: return self.client.get('/metrics').text

@contextlib.contextmanager
def running_server(s, **kw):
    with serving(s, token=TOKEN, workers=2, reload_every=600, **kw) as (process, client):
        server = Server(s, process, client)
        wait_for(lambda: len(server.worker_pids()) == 2)
        yield server

@pytest.fixture
def server(tmp_path):
    "A server with the example model."
    s = settings(home=tmp_path/'home')
    publish_example(s, '1')
    with running_server(s) as server: yield server

class Load:
    "Predictions from several threads with a connection each, until the end of a `with`."
    def __init__(self, url, threads=8):
        self.url = url
        self.threads = threads
        self.stopping = threading.Event()
        self.answers = [] # (time of the request, version)
        self.errors = []

    def run(self):
        with httpx.Client(base_url=self.url, timeout=30) as client:
            while not self.stopping.is_set(): self.predict(client)

    def predict(self, client):
        start = time.monotonic()
        try: response = client.post('/predict', content=PHOTO)
        except httpx.HTTPError as error: self.errors.append(repr(error))
        else:
            if response.is_success: self.answers.append((start, int(response.json()['model_version'])))
            else: self.errors.append(response.text)

    def __enter__(self):
        pool = ThreadPoolExecutor(self.threads)
        self.futures = [pool.submit(self.run) for _ in range(self.threads)]
        return self

    def __exit__(self, *_):
        self.stopping.set()
        for future in self.futures: future.result()

# -- Reloads

@pytest.mark.timeout(180)
def test_60_reloads_under_load_lose_no_request_and_no_answer_is_of_a_replaced_version(server):
    reloads = [] # (time, version)
    with Load(str(server.client.base_url)) as load:
        for version in range(2, 62):
            publish_example(server.s, str(version))
            assert server.reload().json()['model_version'] == str(version)
            reloads.append((time.monotonic(), version))
            def is_answering(version=version): return load.answers and load.answers[-1][1] == version
            wait_for(is_answering, 10, f'an answer of version {version}')
    assert not load.errors
    assert len(load.answers) > 600
    def oldest_allowed(start): return max([version for at, version in reloads if at < start], default=1)
    outdated = [version for start, version in load.answers if version < oldest_allowed(start)]
    assert not outdated, f'{len(outdated)} of {len(load.answers)} answers came from a version that had been replaced'
    assert {version for _, version in load.answers} >= set(range(2, 62))

def test_reloads_at_the_same_moment_all_succeed(server):
    publish_example(server.s, '2')
    def reload(_): return server.post('/reload', headers=AUTHORIZED, timeout=20).json()['model_version']
    with ThreadPoolExecutor(8) as pool: assert set(pool.map(reload, range(8))) == {'2'}

# -- Metrics, several models, trials

def test_metrics_are_the_sum_of_all_workers(server):
    def predict(_): return server.post('/predict', content=PHOTO)
    with ThreadPoolExecutor(8) as pool: list(pool.map(predict, range(60)))
    totals = {metric(server.metrics(), 'plant_predictions_total', variant='champion') for _ in range(6)}
    assert totals == {60.}
    text = server.metrics()
    assert metric(text, 'plant_serving', variant='champion', version='1') == 1
    assert metric(text, 'plant_in_flight') == 1

def test_a_second_model_is_reloaded_in_all_workers(tmp_path):
    s = settings(home=tmp_path/'home')
    sums_settings = s.model_copy(update=dict(model='sums'))
    def publish_sums(version):
        model = linear_model([[2, 0], [0, 1]], ['up', 'down'], version=version)
        publish_example(sums_settings, version, data=model.SerializeToString())
    publish_example(s, '1')
    publish_sums('1')
    with running_server(s, models='sums') as server:
        wait_for(lambda: server.client.get('/models/sums/ready').is_success)
        publish_sums('2')
        response = server.client.post('/models/sums/reload', headers=AUTHORIZED)
        assert response.json()['model_version'] == '2'
        def predict(): return server.post('/models/sums/predict', json=dict(features=[1, 0])).json()
        assert {predict()['model_version'] for _ in range(20)} == {'2'}
        text = server.metrics()
        assert metric(text, 'plant_predictions_total', model='sums') == 20
        assert metric(text, 'plant_predictions_total', model='plants') == 0
        assert metric(text, 'plant_serving', model='sums', version='2') == 1
        assert metric(text, 'plant_requests_total', route='/models/sums/predict') == 20

def publish_challenger(s, version, started_at, data):
    publish_example(s, version, alias='challenger', share=.3, started_at=started_at, data=data)

def test_all_workers_serve_a_challenger_to_the_same_clients_until_the_trial_ends(server):
    def predict(i): return server.post('/predict', content=PHOTO, headers={'X-Client-ID': f'client {i}'}).json()
    def variants(answers): return [answer['variant'] for answer in answers]
    publish_challenger(server.s, '2', 'monday', example_model(version='2'))
    server.reload()
    with ThreadPoolExecutor(4) as pool:
        first = list(pool.map(predict, range(200)))
        second = list(pool.map(predict, range(200)))
    assert variants(first) == variants(second)
    share = variants(first).count('challenger')/200
    assert .18 < share < .42
    for answer in first: assert answer['model_version'] == dict(champion='1', challenger='2')[answer['variant']]
    text = server.metrics()
    assert metric(text, 'plant_predictions_total', variant='challenger', version='2') == 400*share
    assert metric(text, 'plant_stage_seconds_count', stage='infer', variant='challenger') == 400*share

    damaged = example_model()[:300]
    publish_challenger(server.s, '3', 'tuesday', damaged)
    server.reload()
    assert metric(server.metrics(), 'plant_model_error', variant='challenger') == 1
    assert set(variants(map(predict, range(30)))) == {'champion'}

    open_store(server.s).delete('models/plants/challenger.json')
    server.reload()
    text = server.metrics()
    assert metric(text, 'plant_model_error', variant='challenger') == 0
    assert metric(text, 'plant_serving', variant='challenger') == 0

# -- Killed processes

def test_a_killed_worker_is_replaced_and_its_metrics_are_kept(server):
    before = server.worker_pids()
    victim = min(before)
    server.client.post('/predict', content=PHOTO)
    os.kill(victim, signal.SIGKILL)
    def is_replaced():
        pids = server.worker_pids()
        return len(pids - before) == 1 and victim not in pids
    wait_for(is_replaced)
    wait_for(lambda: all(server.get('/ready').is_success for _ in range(10)))
    publish_example(server.s, '2')
    assert server.post('/reload', headers=AUTHORIZED, timeout=30).json()['model_version'] == '2'
    assert {server.post('/predict', content=PHOTO).json()['model_version'] for _ in range(20)} == {'2'}
    assert metric(server.get('/metrics').text, 'plant_predictions_total') == 21
    assert any('is replaced' in line for line in server.process.log_lines)

def test_all_processes_end_when_the_supervisor_is_killed(server):
    children = server.children(recursive=True)
    assert len(children) >= 2
    server.process.kill()
    _, alive = psutil.wait_procs(children, timeout=25)
    assert not alive

@pytest.mark.needs('gradio')
def test_a_killed_page_is_replaced_and_predictions_go_on(server):
    wait_for(lambda: server.client.get('/ui/').is_success)
    assert 'plant_mlops' in server.client.get('/ui', follow_redirects=True).text
    def is_unavailable(): # a request that comes while the next page starts waits for it: this may need several tries
        for pid in server.page_pids(): os.kill(pid, signal.SIGKILL)
        return server.client.get('/ui/').status_code == 503
    [killed] = server.page_pids()
    wait_for(is_unavailable, what='the end of the page')
    assert server.client.post('/predict', content=PHOTO).is_success
    wait_for(lambda: server.client.get('/ui/').is_success and server.page_pids() - {killed}, what='another page')

def test_predictions_are_written_after_the_prediction_writer_was_killed(server):
    def predict_and_wait(n_rows):
        server.client.post('/predict', content=PHOTO)
        wait_for(lambda: len(logged_rows(server.s)) == n_rows)
    predict_and_wait(1)
    pages = server.page_pids()
    for child in server.children():
        with contextlib.suppress(psutil.Error):
            if 'spawn_main' in ' '.join(child.cmdline()) and child.pid not in pages: child.kill()
    predict_and_wait(2)
    assert any('prediction writer ended' in line for line in server.process.log_lines)

# -- Memory

def test_the_supervisor_needs_less_than_60_mb_and_imports_no_large_package(server):
    server.client.post('/predict', content=PHOTO)
    assert psutil.Process(server.process.pid).memory_info().rss < 60e6
    code = 'import sys, plant_mlops.serve.server; print(*sorted({m.split(".")[0] for m in sys.modules}))'
    output = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    large = {'fastapi', 'gradio', 'numpy', 'onnxruntime', 'PIL', 'prometheus_client', 'sqlalchemy'}
    assert not large & set(output.split())
