"The page, driven in a real Chromium: what a person does and sees."
import base64, contextlib, csv, json, socket
from pathlib import Path
import pytest
from helpers import require, running, wait_for
from plant_mlops.core.config import settings
from plant_mlops.data.synthetic import draw
from plant_mlops.serve.api import create_app
from plant_mlops.serve.onnx_model import Model
from plant_mlops.serve.prediction_spool import spool_folder, waiting_files
from plant_mlops.serve.page_proxy import add_page_proxy
from plant_mlops.registry.example_model import example_model, photo_bytes

require('gradio', at_module_level=True)
from plant_mlops.serve.page import create_page
require('playwright', at_module_level=True)
from playwright.sync_api import sync_playwright
pytestmark = pytest.mark.needs('chromium')

@pytest.fixture(scope='module')
def chromium():
    flags = ['--no-sandbox', '--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream']
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=require('chromium'), args=flags)
        yield b
        b.close()

@contextlib.contextmanager
def paged(model=None, **kw):
    "An API with its page, as two servers of this process; gives the address."
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.create_server(('127.0.0.1', 0)))
        app = create_app(settings(token='hush', **kw), model)
        add_page_proxy(app, f'http://127.0.0.1:{sock.getsockname()[1]}')
        url = str(stack.enter_context(running(app)).base_url)
        stack.enter_context(running(create_page(settings(token='hush', api_url=url, **kw)), sock))
        yield url

@pytest.fixture(scope='module')
def site_home(tmp_path_factory): return tmp_path_factory.mktemp('site')

@pytest.fixture(scope='module')
def site(site_home):
    "The API with its page, serving a model that was trained on synthetic photos."
    tmp = site_home
    with pytest.MonkeyPatch.context() as m:
        m.setenv('GRADIO_TEMP_DIR', str(tmp/'gradio'))
        with paged(Model(example_model(version='3')), home=tmp) as url: yield url

@pytest.fixture(params=[(1280, 900), (390, 844)], ids=['desktop', 'phone'])
def page(request, chromium, site):
    "An open page; fails the test if it asked anybody else for anything, or logged an error."
    w, h = request.param
    context = chromium.new_context(viewport=dict(width=w, height=h), has_touch=w < 500, is_mobile=w < 500, permissions=['clipboard-read', 'clipboard-write', 'camera'])
    p, asked, errors = context.new_page(), [], []
    p.set_default_timeout(30_000)
    p.on('request', lambda r: asked.append(r.url))
    p.on('pageerror', lambda e: errors.append(str(e)))
    p.on('console', lambda m: m.type == 'error' and errors.append(m.text))
    p.goto(f'{site}/ui/')
    p.wait_for_selector('.pm-head h1')
    yield p
    context.close()
    assert not [o for o in asked if not o.startswith((site, 'data:', 'blob:'))]
    assert not errors

def answer(page):
    page.wait_for_selector('.pm-card h2')
    return page.inner_text('.pm-card h2').lower()

def upload(page, path): page.set_input_files('.pm-photo input[type=file]', str(path))

def test_photo_gets_an_answer_and_a_heatmap(page, tmp_path):
    photo = tmp_path/'Löwenzahn im März.jpg'
    photo.write_bytes(photo_bytes('gold'))
    upload(page, photo)
    assert answer(page) == 'dandelion'
    assert page.locator('.pm-bars li').count() == 2 and 'Novelty' in page.inner_text('.pm-card:has(h2)')
    heat = page.locator('.pm-heat img')
    heat.wait_for()
    page.wait_for_function("document.querySelector('.pm-heat img').naturalWidth > 100")
    page.wait_for_function("(() => { const r = document.querySelector('.pm-card h2').getBoundingClientRect(); return r.top >= 0 && r.bottom <= innerHeight })()")
    assert page.evaluate('document.documentElement.scrollWidth <= innerWidth'), 'the page is wider than the screen'
    page.click('[aria-label="Remove Image"]')
    page.wait_for_selector('.pm-empty')
    assert not heat.is_visible()

def test_broken_photo_is_told_and_the_next_one_works(page, tmp_path):
    for name, data, says in (('cut.jpg', photo_bytes('gold')[:-200], 'damaged or cut off'), ('page.jpg', b'<html>404</html>', 'web page'), ('empty.png', b'', 'empty')):
        (tmp_path/name).write_bytes(data)
        upload(page, tmp_path/name)
        page.wait_for_selector(f'.pm-error:has-text("{says}")')
        page.click('[aria-label="Remove Image"]')
        page.wait_for_selector('.pm-empty')
    draw('grass', 1).save(tmp_path/'good.png')
    upload(page, tmp_path/'good.png')
    assert answer(page)

def test_says_synthetic_and_what_serves(page):
    assert page.inner_text('.pm-head h1') == 'Dandelion or grass?'
    assert 'synthetic' in page.inner_text('.pm-warning')
    assert 'synthetic' in page.inner_text('.pm-tries').lower()
    page.click('text=About this model')
    about = page.locator('.pm-about')
    about.wait_for()
    said = about.inner_text()
    assert all(o in said for o in ('Version', '3', 'dandelion, grass', '90.0 %', 'mean colour'))

def test_example_then_a_broken_photo(page, tmp_path):
    page.locator('.pm-tries .gallery-item').first.click()
    assert answer(page) in ('dandelion', 'grass')
    page.click('[aria-label="Remove Image"]')
    (tmp_path/'page.jpg').write_bytes(b'<html>404</html>')
    upload(page, tmp_path/'page.jpg')
    page.wait_for_selector('.pm-error:has-text("web page")')

def test_camera(page):
    page.click('[aria-label="Capture from camera"]')
    page.click('.pm-photo [title="grant webcam access"]')
    page.wait_for_function("document.querySelector('.pm-photo video')?.videoWidth > 0")
    page.click('.pm-photo [aria-label="capture photo"]')
    assert answer(page) in ('dandelion', 'grass')

def noted(folder):
    "What has been sent on its way to the table `feedback`."
    rows = [json.loads(o) for f in waiting_files(folder) for o in f.read_text().splitlines()]
    return [(r['prediction_id'], r['label']) for r in rows if r['kind'] == 'feedback'], {r['id']: r['prediction'] for r in rows if r['kind'] == 'predictions'}

def test_what_it_really_is_goes_to_the_log(page, site_home, tmp_path):
    folder = spool_folder(settings(home=site_home))
    before = len(noted(folder)[0])
    (tmp_path/'a.jpg').write_bytes(photo_bytes('gold'))
    (tmp_path/'b.jpg').write_bytes(photo_bytes('green'))
    upload(page, tmp_path/'a.jpg')
    assert answer(page) == 'dandelion'
    page.click('.pm-truth label:has-text("neither")')
    page.wait_for_selector('text=Thank you. Noted: neither.')
    page.click('[aria-label="Remove Image"]')
    upload(page, tmp_path/'b.jpg')
    page.wait_for_selector('.pm-card h2:has-text("grass")')
    assert page.locator('text=Thank you').count() == 0 and page.locator('.pm-truth input:checked').count() == 0
    page.click('.pm-last button:has-text("dandelion") >> nth=0')
    page.wait_for_selector('.pm-card h2:has-text("dandelion")')
    page.click('.pm-truth label:has-text("grass")')
    page.wait_for_selector('text=Thank you. Noted: grass.')
    wait_for(lambda: len(noted(folder)[0]) == before + 2)
    (first, one), (again, two) = noted(folder)[0][before:]
    assert first == again and (one, two) == ('neither', 'grass') and noted(folder)[1][first] == 'dandelion'

def test_many_photos_become_a_table_and_a_file(page, tmp_path):
    for name, data in (('a.jpg', photo_bytes('gold')), ('Grün.jpg', photo_bytes('green')), ('cut.jpg', photo_bytes('gold')[:-200])): (tmp_path/name).write_bytes(data)
    page.click('button[role=tab]:has-text("Many photos")')
    page.set_input_files('.pm-many input[type=file]', [str(tmp_path/o) for o in ('a.jpg', 'Grün.jpg', 'cut.jpg')])
    page.wait_for_selector('.pm-table td:has-text("dandelion")')
    with page.expect_download() as got: page.click('text=Save as CSV')
    rows = list(csv.reader(Path(got.value.path()).read_text('utf-8-sig').splitlines()))
    assert rows[0] == ['file', 'answer', 'probability', 'novelty'] and [r[:2] for r in rows[1:3]] == [['a.jpg', 'dandelion'], ['Grün.jpg', 'grass']]
    assert rows[3][0] == 'cut.jpg' and 'cut off' in rows[3][1] and page.evaluate('document.documentElement.scrollWidth <= innerWidth')

def test_clipboard(page):
    png = base64.b64encode(photo_bytes('green', 'PNG')).decode()
    page.evaluate("""async b => { const bytes = Uint8Array.from(atob(b), c => c.charCodeAt(0));
        await navigator.clipboard.write([new ClipboardItem({'image/png': new Blob([bytes], {type: 'image/png'})})]) }""", png)
    page.click('[aria-label="Paste from clipboard"]')
    assert answer(page) == 'grass'

def test_model_of_real_photos_has_no_banner(chromium, tmp_path, monkeypatch):
    monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path/'gradio'))
    with paged(Model(example_model(source='photos', classes=('daisy', 'moss')))) as url:
        page = chromium.new_page()
        page.goto(f'{url}/ui/')
        page.wait_for_selector('h1:has-text("Daisy or moss?")')
        assert page.locator('.pm-warning:visible').count() == 0
        assert not page.locator('.pm-tries').is_visible(), 'examples of other classes'
        page.close()

def test_no_model_yet(chromium, tmp_path, monkeypatch):
    monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path/'gradio'))
    with paged() as url:
        page = chromium.new_page()
        page.goto(f'{url}/ui/')
        page.wait_for_selector('h1:has-text("No model yet")')
        assert 'plant-mlops run' in page.inner_text('.pm-warning')
        page.goto(f'{url}/')
        assert 'plant-mlops run' in page.inner_text('body')
        page.close()

def test_the_description_of_the_api_needs_nobody_else(page, site):
    page.goto(f'{site}/docs')
    page.click('text=Answer for one photo')
    page.wait_for_selector('text=Try it out')
    assert page.locator('.opblock-tag').all_inner_texts() == ['Predictions', 'Service']
