"The page, driven in a real Chromium as a user does."
import base64, contextlib, csv, io, json, socket
from pathlib import Path
import pytest
from fastapi.testclient import TestClient
from PIL import Image
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
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=require('chromium'), args=flags)
        yield browser
        browser.close()

@contextlib.contextmanager
def api_with_page(model=None, **kw):
    "Run an API and its page as two servers of this process; yields the URL of the API."
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
    "URL of an API with its page, which serves a model of synthetic photos."
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv('GRADIO_TEMP_DIR', str(site_home/'gradio'))
        with api_with_page(Model(example_model(version='3')), home=site_home) as url: yield url

@pytest.fixture(params=[(1280, 900), (390, 844)], ids=['desktop', 'phone'])
def page(request, chromium, site):
    "An open page; fails the test if it requests anything from elsewhere, or logs an error."
    width, height = request.param
    is_phone = width < 500
    permissions = ['clipboard-read', 'clipboard-write', 'camera']
    context = chromium.new_context(viewport=dict(width=width, height=height), has_touch=is_phone, is_mobile=is_phone,
                                   permissions=permissions)
    page, urls, errors = context.new_page(), [], []
    page.set_default_timeout(30_000)
    page.on('request', lambda request: urls.append(request.url))
    page.on('pageerror', lambda error: errors.append(str(error)))
    page.on('console', lambda message: message.type == 'error' and errors.append(message.text))
    page.goto(f'{site}/ui/')
    page.wait_for_selector('.pm-head h1')
    yield page
    context.close()
    assert not [url for url in urls if not url.startswith((site, 'data:', 'blob:'))]
    assert not errors

def read_answer(page) -> str:
    "The predicted label, once it is shown."
    page.wait_for_selector('.pm-card h2')
    return page.inner_text('.pm-card h2').lower()

def upload(page, path): page.set_input_files('.pm-photo input[type=file]', str(path))

def upload_bytes(page, path, data):
    path.write_bytes(data)
    upload(page, path)

def remove_photo(page): page.click('[aria-label="Remove Image"]')

def assert_not_wider_than_screen(page):
    "On a phone, `innerWidth` grows with the page."
    assert page.evaluate('document.documentElement.scrollWidth') <= page.viewport_size['width']

# -- One photo

ANSWER_IS_VISIBLE = """(() => {
    const box = document.querySelector('.pm-card h2').getBoundingClientRect()
    return box.top >= 0 && box.bottom <= innerHeight
})()"""

def test_a_photo_gets_an_answer_and_a_heatmap(page, tmp_path):
    upload_bytes(page, tmp_path/'Löwenzahn im März.jpg', photo_bytes('gold'))
    assert read_answer(page) == 'dandelion'
    assert page.locator('.pm-bars li').count() == 2
    assert 'Novelty' in page.inner_text('.pm-card:has(h2)')
    heatmap = page.locator('.pm-heat img')
    heatmap.wait_for()
    page.wait_for_function("document.querySelector('.pm-heat img').naturalWidth > 100")
    page.wait_for_function(ANSWER_IS_VISIBLE)
    assert_not_wider_than_screen(page)
    remove_photo(page)
    page.wait_for_selector('.pm-empty')
    assert not heatmap.is_visible()

def test_broken_photos_get_a_message_and_the_next_photo_an_answer(page, tmp_path):
    broken = [('cut.jpg', photo_bytes('gold')[:-200], 'damaged or cut off'),
              ('page.jpg', b'<html>404</html>', 'web page'),
              ('empty.png', b'', 'empty')]
    for name, data, message in broken:
        upload_bytes(page, tmp_path/name, data)
        page.wait_for_selector(f'.pm-error:has-text("{message}")')
        remove_photo(page)
        page.wait_for_selector('.pm-empty')
    draw('grass', 1).save(tmp_path/'good.png')
    upload(page, tmp_path/'good.png')
    assert read_answer(page)

def test_an_example_gets_an_answer_and_a_broken_photo_after_it_a_message(page, tmp_path):
    page.locator('.pm-tries .gallery-item').first.click()
    assert read_answer(page) in ('dandelion', 'grass')
    remove_photo(page)
    upload_bytes(page, tmp_path/'page.jpg', b'<html>404</html>')
    page.wait_for_selector('.pm-error:has-text("web page")')

def test_a_photo_of_the_camera_gets_an_answer(page):
    page.click('[aria-label="Capture from camera"]')
    page.click('.pm-photo [title="grant webcam access"]')
    page.wait_for_function("document.querySelector('.pm-photo video')?.videoWidth > 0")
    page.click('.pm-photo [aria-label="capture photo"]')
    assert read_answer(page) in ('dandelion', 'grass')

COPY_PNG = """async base64 => {
    const bytes = Uint8Array.from(atob(base64), char => char.charCodeAt(0))
    const blob = new Blob([bytes], {type: 'image/png'})
    await navigator.clipboard.write([new ClipboardItem({'image/png': blob})])
}"""

def test_a_photo_of_the_clipboard_gets_an_answer(page):
    page.evaluate(COPY_PNG, base64.b64encode(photo_bytes('green', 'PNG')).decode())
    page.click('[aria-label="Paste from clipboard"]')
    assert read_answer(page) == 'grass'

# -- Feedback

def read_spool(home, kind) -> list:
    "Rows of 'predictions' or 'feedback' that wait to be loaded into the database."
    files = waiting_files(spool_folder(settings(home=home)))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [row for row in rows if row['kind'] == kind]

def test_feedback_on_the_answer_and_on_an_earlier_one_is_logged(page, site_home, tmp_path):
    before = len(read_spool(site_home, 'feedback'))
    upload_bytes(page, tmp_path/'a.jpg', photo_bytes('gold'))
    assert read_answer(page) == 'dandelion'
    page.click('.pm-truth label:has-text("neither")')
    page.wait_for_selector('text=Thank you. Noted: neither.')
    remove_photo(page)
    upload_bytes(page, tmp_path/'b.jpg', photo_bytes('green'))
    page.wait_for_selector('.pm-card h2:has-text("grass")')
    assert page.locator('text=Thank you').count() == 0
    assert page.locator('.pm-truth input:checked').count() == 0

    page.click('.pm-last button:has-text("dandelion") >> nth=0')
    page.wait_for_selector('.pm-card h2:has-text("dandelion")')
    page.click('.pm-truth label:has-text("grass")')
    page.wait_for_selector('text=Thank you. Noted: grass.')
    wait_for(lambda: len(read_spool(site_home, 'feedback')) == before + 2)
    first, second = read_spool(site_home, 'feedback')[before:]
    assert first['prediction_id'] == second['prediction_id']
    assert (first['label'], second['label']) == ('neither', 'grass')
    predictions = {row['id']: row['prediction'] for row in read_spool(site_home, 'predictions')}
    assert predictions[first['prediction_id']] == 'dandelion'

# -- Many photos

def test_many_photos_get_a_table_and_a_csv_file(page, tmp_path):
    photos = {'a.jpg': photo_bytes('gold'), 'Grün.jpg': photo_bytes('green'), 'cut.jpg': photo_bytes('gold')[:-200]}
    for name, data in photos.items(): (tmp_path/name).write_bytes(data)
    page.click('button[role=tab]:has-text("Many photos")')
    page.set_input_files('.pm-many input[type=file]', [str(tmp_path/name) for name in photos])
    page.wait_for_selector('.pm-table td:has-text("dandelion")')
    with page.expect_download() as download: page.click('text=Save as CSV')
    text = Path(download.value.path()).read_text('utf-8-sig')
    header, *rows = csv.reader(text.splitlines())
    assert header == ['file', 'answer', 'probability', 'novelty']
    assert [row[:2] for row in rows[:2]] == [['a.jpg', 'dandelion'], ['Grün.jpg', 'grass']]
    assert rows[2][0] == 'cut.jpg'
    assert 'cut off' in rows[2][1]
    assert_not_wider_than_screen(page)

def photos_of_devices() -> dict:
    "Yellow photos in formats of which browsers show only some, by the name of their file."
    pillow_heif = pytest.importorskip('pillow_heif')
    heic = io.BytesIO()
    pillow_heif.from_pillow(Image.new('RGB', (320, 240), 'gold')).save(heic)
    return {'IMG_0001.HEIC': heic.getvalue(), 'photo.avif': photo_bytes('gold', 'AVIF'),
            'photo.jfif': photo_bytes('gold'), 'scan.tif': photo_bytes('gold', 'TIFF')}

DROPPED = """data => {
    const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), transfer = new DataTransfer()
    transfer.items.add(new File([bytes], 'IMG_0001.HEIC'))
    return transfer
}"""

def test_photos_of_phones_and_scanners_get_an_answer(page, tmp_path):
    photos = photos_of_devices()
    for i, (name, data) in enumerate(photos.items()):
        upload_bytes(page, tmp_path/name, data)
        assert read_answer(page) == 'dandelion', name
        page.locator('.pm-last .thumbnail-item').nth(i).wait_for() # one of the last photos
        assert_not_wider_than_screen(page)
        remove_photo(page)
    data = base64.b64encode(photos['IMG_0001.HEIC']).decode()
    dropped = page.evaluate_handle(DROPPED, data)
    page.dispatch_event('.pm-photo .upload-container', 'drop', dict(dataTransfer=dropped))
    assert read_answer(page) == 'dandelion'
    page.click('button[role=tab]:has-text("Many photos")')
    page.set_input_files('.pm-many input[type=file]', [str(tmp_path/name) for name in photos])
    for name in photos: page.wait_for_selector(f'.pm-table tr:has-text("{name}"):has-text("dandelion")')

# -- The model

def test_the_page_describes_the_model_and_warns_that_it_is_synthetic(page):
    assert page.inner_text('.pm-head h1') == 'Dandelion or grass?'
    assert 'synthetic' in page.inner_text('.pm-warning')
    assert 'synthetic' in page.inner_text('.pm-tries').lower()
    page.click('text=About this model')
    about = page.locator('.pm-about')
    about.wait_for()
    for text in ('Version', '3', 'dandelion, grass', '90.0 %', 'mean colour'): assert text in about.inner_text()

def test_a_model_of_real_photos_has_no_warning(chromium, tmp_path, monkeypatch):
    monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path/'gradio'))
    with api_with_page(Model(example_model(source='photos', classes=('daisy', 'moss')))) as url:
        page = chromium.new_page()
        page.goto(f'{url}/ui/')
        page.wait_for_selector('h1:has-text("Daisy or moss?")')
        assert page.locator('.pm-warning:visible').count() == 0
        assert not page.locator('.pm-tries').is_visible(), 'examples of other classes'
        page.close()

def test_without_a_model_the_page_names_the_command_that_makes_one(chromium, tmp_path, monkeypatch):
    monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path/'gradio'))
    with api_with_page() as url:
        page = chromium.new_page()
        page.goto(f'{url}/ui/')
        page.wait_for_selector('h1:has-text("No model yet")')
        assert 'plant-mlops run' in page.inner_text('.pm-warning')
        page.goto(f'{url}/')
        assert 'plant-mlops run' in page.inner_text('body')
        page.close()

@pytest.mark.parametrize('sent, root_path', [({}, '/plants'), ({'X-Forwarded-Prefix': '/a/b'}, '')])
def test_the_page_alone_is_right_below_a_path(sent, root_path, tmp_path, monkeypatch):
    monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path/'gradio'))
    path = root_path or sent['X-Forwarded-Prefix']
    hostile = {'X-Forwarded-Host': 'evil.org', 'X-Gradio-Server': 'http://evil.org/'}
    app = create_page(settings(root_path=root_path))
    with TestClient(app, client=('127.0.0.1', 1), follow_redirects=False) as client:
        for url in ('/', f'{path}/'): assert client.get(url, headers=sent).headers['location'] == f'{path}/ui/'
        for url in ('/ui/', f'{path}/ui/'): assert f'"root":"{path}/ui"' in client.get(url, headers=sent | hostile).text
        assert client.head('/', headers=sent).status_code == 307

def test_the_page_of_the_api_requests_nothing_from_elsewhere(page, site):
    page.goto(f'{site}/docs')
    page.click('text=Predict one input')
    page.wait_for_selector('text=Try it out')
    assert page.locator('.opblock-tag').all_inner_texts() == ['Predictions', 'Service']
