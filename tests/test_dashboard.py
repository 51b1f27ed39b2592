"The dashboard as a person opens it: a real Voilà, driven in a real Chromium."
import contextlib, os, re, shutil, signal, subprocess, sys
from datetime import datetime, timezone
from uuid import uuid4
import httpx, psutil, pytest
from fastcore.nbio import mk_cell, read_nb, write_nb
from conftest import root, stop, wait_for
from plant_mlops.core.config import settings
from tiny import jpeg, tiny_home

pytest.importorskip('voila', reason='voila (the extra `app`) is not installed')
playwright = pytest.importorskip('playwright.sync_api', reason='playwright (the extra `dev`) is not installed')
browsers = [o for o in map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome')) if o]
in_browser = pytest.mark.skipif(not browsers, reason='no Chromium is installed (on Debian: apt install chromium)')
cli = [sys.executable, '-c', 'from plant_mlops.cli.main import main; main()']
sections = ['Data', 'Models', 'Mistakes', 'Traffic', 'Drift', 'Workloads', 'Try it']

@contextlib.contextmanager
def dashboard(home, *args, **env):
    "A dashboard of a home, on a port that is free; its URL and its process."
    p = subprocess.Popen([*cli, 'dashboard', '--home', str(home), '--port', '0', *args], env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        line = p.stdout.readline()
        yield re.search(r'http://\S+[^\s.]', line)[0], p
    finally:
        left = psutil.Process(p.pid).children() if p.poll() is None else []
        stop(p)
        gone, alive = psutil.wait_procs(left, 10)
        assert not alive, 'kernels outlive the dashboard'

def predict(s, n=1, prediction='grass', **kw):
    "What a server leaves in the table `predictions`."
    import sqlalchemy as sa
    from plant_mlops.serve.prediction_log import open_log, predictions
    row = dict(model=s.model, version='2', variant='champion', input='ab'*32, prediction=prediction, probability=.9, novelty=.3, novel=False, seconds=.02) | kw
    eng = open_log(s)
    with eng.begin() as c: c.execute(sa.insert(predictions), [dict(row, id=str(uuid4()), timestamp=datetime.now(timezone.utc).replace(tzinfo=None)) for _ in range(n)])
    eng.dispose()

@pytest.fixture(scope='module')
def s(tmp_path_factory):
    "A home in which something has happened."
    from plant_mlops.registry.registry import evaluate
    s = settings(home=tmp_path_factory.mktemp('board'))
    tiny_home(s)
    evaluate(s)
    predict(s, 30)
    return s

@pytest.fixture(scope='module')
def site(s):
    with dashboard(s.home) as (url, p): yield url

@pytest.fixture(scope='module')
def chromium():
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=browsers[0], args=['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--disable-background-networking'])
        yield b
        b.close()

@contextlib.contextmanager
def opened(chromium, url, w=1280, h=900):
    "A page whose sections are all filled; fails if it asked anybody else for anything, or logged an error."
    context = chromium.new_context(viewport=dict(width=w, height=h), has_touch=w < 500, is_mobile=w < 500)
    p, asked, errors = context.new_page(), [], []
    p.set_default_timeout(60_000)
    p.on('request', lambda r: asked.append(r.url))
    p.on('websocket', lambda o: asked.append(o.url.replace('ws:', 'http:')))
    p.on('pageerror', lambda e: errors.append(str(e)))
    p.on('console', lambda m: m.type == 'error' and errors.append(m.text))
    p.goto(url)
    filled(p)
    yield p
    context.close()
    assert len(asked) > 5 and not [o for o in asked if not o.startswith((url, 'data:', 'blob:'))]
    assert not errors

def filled(page):
    "Wait until no section is being filled."
    page.wait_for_function(r"/\d:\d\d/.test(document.querySelector('.pm-said')?.innerText)")

def fits(page): return page.evaluate("document.getElementById('rendered_cells').scrollWidth <= innerWidth && document.documentElement.scrollWidth <= innerWidth")

@pytest.fixture(params=[(1280, 900), (390, 844)], ids=['desktop', 'phone'])
def page(request, chromium, site):
    with opened(chromium, site, *request.param) as p: yield p

@in_browser
@pytest.mark.timeout(900)
def test_every_section(page, tmp_path):
    assert [o.replace('¶', '') for o in page.locator('h2').all_inner_texts()][:7] == sections and page.title() == 'Dashboard'
    said = page.inner_text('#rendered_cells')
    assert page.locator('.pm-error').count() == 0, said
    for o in ('60', 'synthetic', 'near duplicate', 'Doubtful labels', 'lost.jpg', 'in production', 'Reliability', 'Last predictions', 'Not looked at yet'): assert o in said, o
    assert page.locator('.pm-plot svg').count() >= 5 and page.locator('.pm-groups .pm-twins').count() and fits(page), 'the page is wider than the screen'

    for i, n in enumerate(page.locator('.pm-cell').all_inner_texts()):
        page.locator('.pm-cell').nth(i).click()
        page.wait_for_selector(f'.pm-cell.pm-on >> nth=0')
        page.wait_for_selector(f'.pm-both h3:has-text("{n} of")')
        page.wait_for_function(f"document.querySelectorAll('.pm-both .pm-photos img').length == {n}")
    page.wait_for_function("[...document.querySelectorAll('.pm-both .pm-photos img')].every(o => o.naturalWidth > 50)")

    for name, data, says in (('a.jpg', jpeg('gold'), 'h2:has-text("dandelion")'), ('cut.jpg', jpeg('gold')[:-200], 'text=cut off'), ('b.jpg', jpeg('green'), 'h2:has-text("grass")')):
        (tmp_path/name).write_bytes(data)
        with page.expect_file_chooser() as chooser: page.click('.pm-upload')
        chooser.value.set_files(str(tmp_path/name))
        page.wait_for_selector(f'.pm-card {says}' if says.startswith('h2') else says)
    page.wait_for_function("document.querySelectorAll('.pm-large img').length == 2") # parts come one after another
    assert fits(page)

@in_browser
@pytest.mark.timeout(900)
def test_traffic_shows_up_by_itself(chromium, site, s):
    with opened(chromium, site) as page:
        page.select_option('.widget-dropdown select >> nth=0', index=1)
        predict(s, prediction='moss')
        page.wait_for_selector('td:has-text("moss")', timeout=30_000)
        page.click('button:has-text("Hour")')
        page.wait_for_selector('text=in 1 minute')
        page.click('button:has-text("Refresh")')
        page.wait_for_selector('.pm-button:disabled')
        filled(page)

@in_browser
@pytest.mark.timeout(600)
def test_empty_home(chromium, tmp_path):
    with dashboard(tmp_path/'none yet') as (url, p), opened(chromium, url, 390, 844) as page:
        assert page.locator('.pm-error').count() == 0, page.inner_text('#rendered_cells')
        assert [o.replace('¶', '') for o in page.locator('h2').all_inner_texts()] == sections and fits(page)
        for o in page.evaluate("[...document.querySelectorAll('h2')].map(o => o.closest('[cell-index]').nextElementSibling.innerText)"): assert 'plant-mlops' in o

@in_browser
@pytest.mark.timeout(600)
def test_model_of_numbers(chromium, tmp_path, monkeypatch):
    import numpy as np, onnx, pandas as pd
    from plant_mlops.registry.model_file import linear_model
    from plant_mlops.registry.registry import Reader, evaluate, promote, readers, register
    from plant_mlops.registry.tracking import experiment_id, mlflow_client
    s, x = settings(home=tmp_path, model='sums'), np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    m = pd.DataFrame(dict(id=[f'day {i}' for i in range(60)], label=np.where(x[:, 0] + .3*x[:, 1] > 0, 'up', 'down'), group=range(60), split='test'))
    onnx.save(linear_model([[-1, 1], [0, 0]], ['down', 'up'], provenance=dict(dataset='daily', source='photos')), tmp_path/'m.onnx')
    monkeypatch.setitem(readers, 'features', Reader(lambda s, d: m, lambda s, d, ids, spec: x[[int(i.split()[1]) for i in ids]]))
    with mlflow_client(s) as c: register(s, c.create_run(experiment_id(c, s)).info.run_id, tmp_path/'m.onnx')
    evaluate(s), promote(s)
    (tmp_path/'row.json').write_text('[2, 0]')
    with dashboard(tmp_path, PLANT_MODEL='sums') as (url, p), opened(chromium, url) as page:
        assert page.locator('.pm-error').count() == 0
        page.wait_for_selector('text=not photos')
        page.wait_for_selector('td:has-text("day ") >> nth=0')
        with page.expect_file_chooser() as chooser: page.click('.pm-upload')
        chooser.value.set_files(str(tmp_path/'row.json'))
        page.wait_for_selector('.pm-card h2:has-text("up")')

@in_browser
@pytest.mark.timeout(600)
def test_kernels_end_with_their_page_and_the_page_outlives_its_kernel(chromium, tmp_path):
    with dashboard(tmp_path) as (url, p):
        kernels = lambda: psutil.Process(p.pid).children()
        with opened(chromium, url) as page:
            assert len(kernels()) == 1
            page.goto('about:blank')
        wait_for(lambda: not kernels(), 30, 'the end of the kernel')
        context = chromium.new_context()
        page = context.new_page()
        page.goto(url)
        filled(page)
        page.evaluate('window.old = true')
        kernels()[0].kill()
        page.wait_for_function('!window.old', timeout=60_000)
        filled(page)
        context.close()

def test_stops_at_ctrl_c(tmp_path):
    with dashboard(tmp_path) as (url, p):
        assert httpx.get(url, timeout=60).status_code == 200 and len(left := psutil.Process(p.pid).children()) == 1
        p.send_signal(signal.SIGINT)
        assert p.wait(20) == 0
        assert not psutil.wait_procs(left, 10)[1] and 'Traceback' not in p.stdout.read()

def test_strangers_are_refused(tmp_path):
    with dashboard(tmp_path) as (url, p):
        page = httpx.get(url, timeout=60)
        assert page.status_code == 200 and "frame-ancestors 'self'" in page.headers['content-security-policy']
        assert 'board.section' not in page.text, 'the page shows its source'
        assert httpx.get(url, headers=dict(Host='evil.example')).status_code == 403
        assert httpx.get(f'{url}/voila/files/dashboard.ipynb').status_code == 403
        kernel = re.search(r'"kernelId": "([\w-]+)"', page.text)[1]
        upgrade = {'Upgrade': 'websocket', 'Connection': 'Upgrade', 'Sec-WebSocket-Version': '13', 'Sec-WebSocket-Key': 'AAAAAAAAAAAAAAAAAAAAAA=='}
        ask = lambda origin: httpx.get(f'{url}/api/kernels/{kernel}/channels', headers=upgrade | dict(Origin=origin)).status_code
        assert (ask('http://evil.example'), ask(url)) == (403, 101)

def test_other_machines_need_the_token(tmp_path):
    with dashboard(tmp_path, '--host', '0.0.0.0') as (url, p):
        assert '?token=' in url
        assert httpx.get(url.split('?')[0]).status_code == 302
        assert httpx.get(url, timeout=60, follow_redirects=True).status_code == 200
    with dashboard(tmp_path, '--host', '0.0.0.0', PLANT_TOKEN='hush') as (url, p):
        assert 'hush' not in url and httpx.get(url).status_code == 302
        assert httpx.get(f'{url}/?token=hush', timeout=60, follow_redirects=True).status_code == 200

def test_notebook_fills_every_section_of_an_empty_home(tmp_path):
    from nbdev.test import test_nb as run_notebook
    nb = read_nb(root/'nbs/apps/dashboard.ipynb')
    check = ("board.tick.click()\nawait board.done()\nsaid = [''.join(o.value for o in x.box.children) for x in board.sections]\n"
             "assert len(said) == 8 and all('plant-mlops' in o for o in said) and 'pm-error' not in ''.join(said), said")
    nb.cells.append(mk_cell(check))
    write_nb(nb, tmp_path/'dashboard.ipynb')
    assert run_notebook(tmp_path/'dashboard.ipynb')[0]
