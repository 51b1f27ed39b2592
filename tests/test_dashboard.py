"The dashboard as a person opens it: a real Voilà, driven in a real Chromium."
import contextlib, os, re, signal, subprocess, sys
from datetime import datetime, timezone
from uuid import uuid4
import httpx, psutil, pytest
from fastcore.nbio import mk_cell, read_nb, write_nb
from helpers import require, root, stop, wait_for
from plant_mlops.core.config import settings
from plant_mlops.photos.example_home import example_home
from plant_mlops.registry.example_model import photo_bytes

require('voila', at_module_level=True)
require('playwright', at_module_level=True)
from playwright.sync_api import sync_playwright
in_browser = pytest.mark.needs('chromium')
sections = ['Data', 'Models', 'Mistakes', 'Traffic', 'Drift', 'Workloads', 'Try it']

def kernels(server) -> list:
    "The kernels of a dashboard: its child processes."
    return psutil.Process(server.pid).children()

@contextlib.contextmanager
def dashboard(home, *args, **env):
    "A dashboard of a home, on a free port: its URL and its process."
    command = [sys.executable, '-m', 'plant_mlops', 'dashboard', '--home', str(home), '--port', '0', *args]
    p = subprocess.Popen(command, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        line = p.stdout.readline()
        yield re.search(r'http://\S+[^\s.]', line)[0], p
    finally:
        left = kernels(p) if p.poll() is None else []
        stop(p)
        _, alive = psutil.wait_procs(left, 10)
        assert not alive, 'kernels outlive the dashboard'

def add_predictions(s, n=1, prediction='grass'):
    "Add rows to the table `predictions`, as a server does."
    import sqlalchemy as sa
    from plant_mlops.serve.prediction_log import open_prediction_log, predictions
    now = datetime.now(timezone.utc).replace(tzinfo=None)
    row = dict(model=s.model, version='2', variant='champion', input='ab'*32, prediction=prediction, probability=.9,
               novelty=.3, novel=False, seconds=.02, timestamp=now)
    engine = open_prediction_log(s)
    with engine.begin() as connection:
        connection.execute(sa.insert(predictions), [row | dict(id=str(uuid4())) for _ in range(n)])
    engine.dispose()

@pytest.fixture(scope='module')
def s(tmp_path_factory):
    "A home with photos, versions of a model, and predictions."
    from plant_mlops.registry.evaluate import evaluate
    s = settings(home=tmp_path_factory.mktemp('board'))
    example_home(s)
    evaluate(s)
    add_predictions(s, 30)
    return s

@pytest.fixture(scope='module')
def site(s):
    "The URL of a dashboard of that home."
    with dashboard(s.home) as (url, _): yield url

@pytest.fixture(scope='module')
def chromium():
    args = ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--disable-background-networking']
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=require('chromium'), args=args)
        yield browser
        browser.close()

def wait_until_filled(page):
    "Wait until no section is being filled: then the bar shows a time."
    page.wait_for_function(r"/\d:\d\d/.test(document.querySelector('.pm-status')?.innerText)")

@contextlib.contextmanager
def opened(chromium, url, width=1280, height=900):
    "A page with all sections filled; fails if it requested anything from elsewhere, or logged an error."
    is_phone = width < 500
    viewport = dict(width=width, height=height)
    context = chromium.new_context(viewport=viewport, has_touch=is_phone, is_mobile=is_phone)
    page = context.new_page()
    page.set_default_timeout(60_000)
    requested, errors = [], []
    page.on('request', lambda request: requested.append(request.url))
    page.on('websocket', lambda socket: requested.append(socket.url.replace('ws:', 'http:')))
    page.on('pageerror', lambda error: errors.append(str(error)))
    page.on('console', lambda message: message.type == 'error' and errors.append(message.text))
    page.goto(url)
    wait_until_filled(page)
    yield page
    context.close()
    assert len(requested) > 5
    assert not [u for u in requested if not u.startswith((url, 'data:', 'blob:'))]
    assert not errors

def headings(page) -> list: return [text.replace('¶', '') for text in page.locator('h2').all_inner_texts()]

def fits(page) -> bool:
    "Whether nothing is wider than the screen."
    widths = page.evaluate("""[document.getElementById('rendered_cells').scrollWidth,
                               document.documentElement.scrollWidth]""")
    return max(widths) <= page.viewport_size['width']

def upload(page, path, content: bytes):
    "Choose a file in the section Try it."
    path.write_bytes(content)
    with page.expect_file_chooser() as chooser: page.click('.pm-upload')
    chooser.value.set_files(str(path))

@pytest.fixture(params=[(1280, 900), (390, 844)], ids=['desktop', 'phone'])
def page(request, chromium, site):
    with opened(chromium, site, *request.param) as page: yield page

@in_browser
@pytest.mark.timeout(900)
def test_every_section_is_filled(page):
    assert headings(page)[:7] == sections and page.title() == 'Dashboard'
    text = page.inner_text('#rendered_cells')
    assert page.locator('.pm-error').count() == 0, text
    expected = ('60', 'synthetic', 'near duplicate', 'Doubtful labels', 'lost.jpg', 'in production', 'Reliability',
                'Last predictions', 'Not checked yet')
    assert [word for word in expected if word not in text] == []
    assert page.locator('.pm-plot svg').count() >= 5 and page.locator('.pm-groups .pm-duplicates').count()
    assert fits(page)

@in_browser
@pytest.mark.timeout(900)
def test_a_cell_of_the_matrix_shows_its_photos(page):
    photos = "[...document.querySelectorAll('.pm-columns .pm-photos img')]"
    for i, n in enumerate(page.locator('.pm-cell').all_inner_texts()):
        page.locator('.pm-cell').nth(i).click()
        page.wait_for_selector('.pm-cell.pm-chosen >> nth=0')
        page.wait_for_selector(f'.pm-columns h3:has-text("{n} of")')
        page.wait_for_function(f'{photos}.length == {n}')
    page.wait_for_function(f'{photos}.every(image => image.naturalWidth > 50)')

@in_browser
@pytest.mark.timeout(900)
def test_an_uploaded_photo_is_answered(page, tmp_path):
    upload(page, tmp_path/'a.jpg', photo_bytes('gold'))
    page.wait_for_selector('.pm-card h2:has-text("dandelion")')
    upload(page, tmp_path/'cut.jpg', photo_bytes('gold')[:-200])
    page.wait_for_selector('text=cut off')
    upload(page, tmp_path/'b.jpg', photo_bytes('green'))
    page.wait_for_selector('.pm-card h2:has-text("grass")')
    page.wait_for_function("document.querySelectorAll('.pm-large img').length == 2") # parts come one after another
    assert fits(page)

@in_browser
@pytest.mark.timeout(900)
def test_new_predictions_appear_without_a_reload(chromium, site, s):
    with opened(chromium, site) as page:
        page.select_option('.widget-dropdown select >> nth=0', index=1)
        add_predictions(s, prediction='moss')
        page.wait_for_selector('td:has-text("moss")', timeout=30_000)
        page.click('button:has-text("Hour")')
        page.wait_for_selector('text=in 1 minute')
        page.click('button:has-text("Refresh")')
        page.wait_for_selector('.pm-button:disabled')
        wait_until_filled(page)

@in_browser
@pytest.mark.timeout(600)
def test_every_section_of_an_empty_home_says_what_to_run(chromium, tmp_path):
    first_parts = """[...document.querySelectorAll('h2')]
                     .map(heading => heading.closest('[cell-index]').nextElementSibling.innerText)"""
    with dashboard(tmp_path/'none yet') as (url, _), opened(chromium, url, 390, 844) as page:
        assert page.locator('.pm-error').count() == 0, page.inner_text('#rendered_cells')
        assert headings(page) == sections and fits(page)
        assert [text for text in page.evaluate(first_parts) if 'plant-mlops' not in text] == []

@pytest.fixture
def model_of_numbers(tmp_path, monkeypatch):
    "A home with a model whose examples are two numbers each."
    import numpy as np, onnx, pandas as pd
    from plant_mlops.core.workload import Reader
    from plant_mlops.registry.evaluate import evaluate, readers
    from plant_mlops.registry.model_file import linear_model
    from plant_mlops.registry.registry import register
    from plant_mlops.registry.release import promote
    from plant_mlops.registry.tracking import experiment_id, mlflow_client
    s = settings(home=tmp_path, model='sums')
    x = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    label = np.where(x[:, 0] + .3*x[:, 1] > 0, 'up', 'down')
    ids = [f'day {i}' for i in range(60)]
    manifest = pd.DataFrame(dict(id=ids, label=label, group=range(60), split='test'))
    def read_inputs(s, dataset, ids, spec): return x[[int(id.split()[1]) for id in ids]]
    monkeypatch.setitem(readers, 'features', Reader(lambda s, dataset: manifest, read_inputs))
    model = linear_model([[-1, 1], [0, 0]], ['down', 'up'], provenance=dict(dataset='daily', source='photos'))
    onnx.save(model, tmp_path/'m.onnx')
    with mlflow_client(s) as c: register(s, c.create_run(experiment_id(c, s)).info.run_id, tmp_path/'m.onnx')
    evaluate(s)
    promote(s)
    return s

@in_browser
@pytest.mark.timeout(600)
def test_a_model_of_numbers_shows_names_and_takes_json(chromium, model_of_numbers, tmp_path):
    with dashboard(tmp_path, PLANT_MODEL='sums') as (url, _), opened(chromium, url) as page:
        assert page.locator('.pm-error').count() == 0
        page.wait_for_selector('text=not photos')
        page.wait_for_selector('td:has-text("day ") >> nth=0')
        upload(page, tmp_path/'row.json', b'[2, 0]')
        page.wait_for_selector('.pm-card h2:has-text("up")')

@in_browser
@pytest.mark.timeout(600)
def test_a_kernel_ends_with_its_page(chromium, tmp_path):
    with dashboard(tmp_path) as (url, server):
        with opened(chromium, url) as page:
            assert len(kernels(server)) == 1
            page.goto('about:blank')
        wait_for(lambda: not kernels(server), 30, 'the end of the kernel')

@in_browser
@pytest.mark.timeout(600)
def test_a_page_whose_kernel_was_killed_loads_again(chromium, tmp_path):
    with dashboard(tmp_path) as (url, server):
        context = chromium.new_context()
        page = context.new_page()
        page.goto(url)
        wait_until_filled(page)
        page.evaluate('window.old = true')
        kernels(server)[0].kill()
        page.wait_for_function('!window.old', timeout=60_000)
        wait_until_filled(page)
        context.close()

def test_ctrl_c_stops_the_dashboard(tmp_path):
    with dashboard(tmp_path) as (url, server):
        assert httpx.get(url, timeout=60).status_code == 200
        left = kernels(server)
        assert len(left) == 1
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
        assert not psutil.wait_procs(left, 10)[1]
        assert 'Traceback' not in server.stdout.read()

def test_requests_of_other_sites_are_refused(tmp_path):
    upgrade = {'Upgrade': 'websocket', 'Connection': 'Upgrade', 'Sec-WebSocket-Version': '13',
               'Sec-WebSocket-Key': 'AAAAAAAAAAAAAAAAAAAAAA=='}
    with dashboard(tmp_path) as (url, _):
        page = httpx.get(url, timeout=60)
        assert page.status_code == 200 and "frame-ancestors 'self'" in page.headers['content-security-policy']
        assert 'board.new_section' not in page.text, 'the page shows its source'
        assert httpx.get(url, headers=dict(Host='evil.example')).status_code == 403
        assert httpx.get(f'{url}/voila/files/dashboard.ipynb').status_code == 403
        kernel = re.search(r'"kernelId": "([\w-]+)"', page.text)[1]
        def status(origin):
            channels = f'{url}/api/kernels/{kernel}/channels'
            return httpx.get(channels, headers=upgrade | dict(Origin=origin)).status_code
        assert (status('http://evil.example'), status(url)) == (403, 101)

def test_other_machines_need_the_token(tmp_path):
    with dashboard(tmp_path, '--host', '0.0.0.0') as (url, _):
        assert '?token=' in url
        assert httpx.get(url.split('?')[0]).status_code == 302
        assert httpx.get(url, timeout=60, follow_redirects=True).status_code == 200
    with dashboard(tmp_path, '--host', '0.0.0.0', PLANT_TOKEN='hush') as (url, _):
        assert 'hush' not in url and httpx.get(url).status_code == 302
        assert httpx.get(f'{url}/?token=hush', timeout=60, follow_redirects=True).status_code == 200

def test_the_notebook_fills_every_section_of_an_empty_home(tmp_path):
    from nbdev.test import test_nb as run_notebook
    nb = read_nb(root/'nbs/apps/dashboard.ipynb')
    nb.cells.append(mk_cell('board.poll_button.click()\n'
                            'await board.wait()\n'
                            "html = [''.join(w.value for w in x.box.children) for x in board.sections]\n"
                            "assert len(html) == 8 and all('plant-mlops' in text for text in html), html\n"
                            "assert 'pm-error' not in ''.join(html), html"))
    write_nb(nb, tmp_path/'dashboard.ipynb')
    assert run_notebook(tmp_path/'dashboard.ipynb')[0]
