"A server of several processes: one model, one set of figures, one page; and what happens when one of them dies."
import contextlib, os, signal, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
import httpx, psutil, pytest
from helpers import logged, metric, require, serving, wait_for
from plant_mlops.core.config import settings
from plant_mlops.core.store import open_store
from plant_mlops.registry.model_file import linear_model
from plant_mlops.registry.example_model import example_model, photo_bytes, publish_example

gold, key = photo_bytes('gold'), {'Authorization': 'Bearer hush'}

def _is_worker(process):
    "Whether a process shares its metrics, as workers do."
    with contextlib.suppress(psutil.Error): return any('/metrics/' in m.path for m in process.memory_maps())

def workers(p):
    "Process ids of the workers, which are children of the fork server."
    return {child.pid for child in psutil.Process(p.pid).children(recursive=True) if _is_worker(child)}

def pages(p):
    "Process ids of the page: the child that listens on a port of its own."
    def listens(child):
        with contextlib.suppress(psutil.Error): return any(c.status == psutil.CONN_LISTEN for c in child.net_connections('inet'))
    return {child.pid for child in psutil.Process(p.pid).children() if listens(child)}

@pytest.fixture
def crew(tmp_path):
    "A server of two processes: its settings, its process, a client."
    s = settings(home=tmp_path/'home')
    publish_example(s, '1')
    with serving(s, token='hush', workers=2, reload_every=600) as (p, c):
        wait_for(lambda: len(workers(p)) == 2)
        yield s, p, c

class Load:
    "Photos asked about, from several threads with a connection each, until the end of a `with`; what failed, and when who answered."
    def __init__(self, url, threads=8): self.url, self.ending, self.said, self.failed, self.n = url, threading.Event(), [], [], threads
    def one(self, i):
        with httpx.Client(base_url=self.url, timeout=30) as c:
            while not self.ending.is_set():
                start = time.monotonic()
                try: r = c.post('/predict', content=gold)
                except httpx.HTTPError as e: self.failed.append(repr(e))
                else:
                    if r.is_success: self.said.append((start, int(r.json()['model_version'])))
                    else: self.failed.append(r.text)
    def __enter__(self):
        self.pool = ThreadPoolExecutor(self.n)
        self.all = [self.pool.submit(self.one, i) for i in range(self.n)]
        return self
    def __exit__(self, *_):
        self.ending.set()
        for o in self.all: o.result()

@pytest.mark.timeout(180)
def test_sixty_reloads_under_load(crew):
    s, p, c = crew
    served = []
    with Load(str(c.base_url)) as load:
        for i in range(2, 62):
            publish_example(s, str(i))
            assert c.post('/reload', headers=key).json()['model_version'] == str(i)
            served.append((time.monotonic(), i))
            wait_for(lambda: load.said and load.said[-1][1] == i, 10, f'an answer of version {i}')
    assert not load.failed and len(load.said) > 600
    wrong = [(at, v) for at, v in load.said if v < max([i for t, i in served if t < at], default=1)]
    assert not wrong, f'{len(wrong)} of {len(load.said)} answers came from a version that had been replaced'
    assert {v for _, v in load.said} >= set(range(2, 62))

def test_figures_of_all_processes_are_one(crew):
    s, p, c = crew
    with ThreadPoolExecutor(8) as pool: list(pool.map(lambda _: httpx.post(f'{c.base_url}/predict', content=photo_bytes('gold')), range(60)))
    seen = {metric(c.get('/metrics').text, 'plant_predictions_total', variant='champion') for _ in range(6)}
    assert seen == {60.}
    text = c.get('/metrics').text
    assert metric(text, 'plant_serving', variant='champion', version='1') == 1 and metric(text, 'plant_in_flight') == 1

def test_two_models_in_two_processes(tmp_path):
    s = settings(home=tmp_path/'home')
    other, sums = s.model_copy(update=dict(model='sums')), lambda v: linear_model([[2, 0], [0, 1]], ['up', 'down'], version=v).SerializeToString()
    publish_example(s, '1')
    publish_example(other, '1', data=sums('1'))
    with serving(s, token='hush', workers=2, reload_every=600, models='sums') as (p, c):
        wait_for(lambda: len(workers(p)) == 2 and c.get('/models/sums/ready').is_success)
        publish_example(other, '2', data=sums('2'))
        assert c.post('/models/sums/reload', headers=key).json()['model_version'] == '2'
        assert {httpx.post(f'{c.base_url}/models/sums/predict', json=dict(features=[1, 0])).json()['model_version'] for _ in range(20)} == {'2'}
        text = c.get('/metrics').text
        assert [metric(text, 'plant_predictions_total', model=o) for o in ('sums', 'plants')] == [20, 0] and metric(text, 'plant_serving', model='sums', version='2') == 1
        assert metric(text, 'plant_requests_total', route='/models/sums/predict') == 20

def test_a_process_that_dies_is_replaced(crew):
    s, p, c = crew
    first = workers(p)
    c.post('/predict', content=photo_bytes('gold'))
    os.kill(victim := min(first), signal.SIGKILL)
    wait_for(lambda: len(workers(p) - first) == 1 and victim not in workers(p))
    wait_for(lambda: all(httpx.get(f'{c.base_url}/ready').is_success for _ in range(10)))
    publish_example(s, '2')
    assert httpx.post(f'{c.base_url}/reload', headers=key, timeout=30).json()['model_version'] == '2'
    assert {httpx.post(f'{c.base_url}/predict', content=photo_bytes('gold')).json()['model_version'] for _ in range(20)} == {'2'}
    assert metric(httpx.get(f'{c.base_url}/metrics').text, 'plant_predictions_total') == 21
    assert any('is replaced' in line for line in p.said)

def test_nobody_outlives_a_server_that_was_killed(crew):
    s, p, c = crew
    all_of_them = psutil.Process(p.pid).children(recursive=True)
    assert len(all_of_them) >= 2
    p.kill()
    _, alive = psutil.wait_procs(all_of_them, timeout=25)
    assert not alive

def test_the_page_comes_through_and_comes_back(crew):
    require('gradio')
    s, p, c = crew
    wait_for(lambda: c.get('/ui/').is_success)
    assert 'plant_mlops' in c.get('/ui', follow_redirects=True).text
    def is_away(): # a request that comes while the next page starts waits for it, so this may take more than one try
        for pid in pages(p): os.kill(pid, signal.SIGKILL)
        return c.get('/ui/').status_code == 503
    page, = pages(p)
    wait_for(is_away, what='the end of the page')
    assert c.post('/predict', content=photo_bytes('gold')).is_success
    wait_for(lambda: c.get('/ui/').is_success and pages(p) - {page}, what='another page')

def test_a_trial_reaches_every_process_and_ends(crew):
    s, p, c = crew
    publish_example(s, '2', alias='challenger', share=.3, started_at='monday', data=example_model(version='2'))
    c.post('/reload', headers=key)
    def ask(i, **kw): return httpx.post(f'{c.base_url}/predict', content=photo_bytes('gold'), headers={'X-Client-ID': f'client {i}'}).json()
    with ThreadPoolExecutor(4) as pool: first, again = (list(pool.map(ask, range(200))) for _ in range(2))
    assert [o['variant'] for o in first] == [o['variant'] for o in again]
    share = sum(o['variant'] == 'challenger' for o in first)/200
    assert .18 < share < .42 and all((o['variant'], o['model_version']) in (('champion', '1'), ('challenger', '2')) for o in first)
    text = c.get('/metrics').text
    assert metric(text, 'plant_predictions_total', variant='challenger', version='2') == 400*share
    assert metric(text, 'plant_stage_seconds_count', stage='infer', variant='challenger') == 400*share
    publish_example(s, '3', alias='challenger', share=.3, started_at='tuesday', data=example_model()[:300])
    c.post('/reload', headers=key)
    assert metric(c.get('/metrics').text, 'plant_model_error', variant='challenger') == 1
    assert {o['variant'] for o in map(ask, range(30))} == {'champion'}
    open_store(s).delete('models/plants/challenger.json')
    c.post('/reload', headers=key)
    text = c.get('/metrics').text
    assert metric(text, 'plant_model_error', variant='challenger') == metric(text, 'plant_serving', variant='challenger') == 0

def test_reloads_at_the_same_moment_all_succeed(crew):
    s, p, c = crew
    publish_example(s, '2')
    def reload(_): return httpx.post(f'{c.base_url}/reload', headers=key, timeout=20).json()['model_version']
    with ThreadPoolExecutor(8) as pool: assert set(pool.map(reload, range(8))) == {'2'}

def test_the_supervisor_is_small(crew):
    s, p, c = crew
    c.post('/predict', content=gold)
    assert psutil.Process(p.pid).memory_info().rss < 60e6
    code = 'import sys, plant_mlops.serve.server; print(*sorted({m.split(".")[0] for m in sys.modules}))'
    imported = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert not {'fastapi', 'gradio', 'numpy', 'onnxruntime', 'PIL', 'prometheus_client', 'sqlalchemy'} & set(imported)

def test_predictions_are_written_though_the_writer_was_killed(crew):
    s, p, c = crew
    c.post('/predict', content=gold)
    wait_for(lambda: len(logged(s)) == 1)
    servers = pages(p)
    for child in psutil.Process(p.pid).children():
        with contextlib.suppress(psutil.Error):
            if 'spawn_main' in ' '.join(child.cmdline()) and child.pid not in servers: child.kill()
    c.post('/predict', content=gold)
    wait_for(lambda: len(logged(s)) == 2)
    assert any('prediction writer ended' in line for line in p.said)
