"Serving: bad photos, bad requests, a store that cannot be reached, and the cost of one prediction."
import asyncio, base64, contextlib, json, os, random, signal, socket, struct, subprocess, sys, threading, time, zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import httpx, numpy as np, psutil, pytest
from fastapi.testclient import TestClient
from PIL import Image
from helpers import cli, free_port, programs, running, stop, wait_for
from plant_mlops.core.config import settings
from plant_mlops.core.store import StoreError
from plant_mlops.registry.example_model import example_model, photo_bytes, publish_example
from plant_mlops.registry.model_file import linear_model
from plant_mlops.serve.api import create_app
from plant_mlops.serve.champion import NoModelError, load_champion
from plant_mlops.serve.live_model import LiveModel
from plant_mlops.serve.onnx_model import Model, predict_files
from plant_mlops.serve.sockets import listen

# -- Photos, good and bad

def yellow_and_green():
    "Yellow on the left two thirds, green on the rest, so that a wrong crop or rotation changes the pixels."
    im = Image.new('RGB', (400, 200), 'green')
    im.paste('gold', (0, 0, 260, 200))
    return im

def png_chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

def huge_png(side=50_000):
    "The header of a photo of 2.5 billion pixels, and almost nothing else."
    header = png_chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0))
    pixels = png_chunk(b'IDAT', zlib.compress(bytes(1000)))
    return b'\x89PNG\r\n\x1a\n' + header + pixels + png_chunk(b'IEND', b'')

def sideways():
    "A photo on its side whose EXIF says so."
    exif = Image.Exif()
    exif[0x0112] = 6
    return photo_bytes(yellow_and_green().rotate(90, expand=True), exif=exif)

gold = Image.new('RGB', (320, 240), 'gold')
green_frames = [Image.new('RGB', (320, 240), 'green')]*3
good = {
    'plain.jpg': photo_bytes(),
    'Löwenzahn im März (1).jpg': photo_bytes(),
    'no-extension': photo_bytes(),
    'wrong.txt': photo_bytes(),
    'photo.png': photo_bytes(format='PNG'),
    'photo.webp': photo_bytes(format='WEBP'),
    'photo.bmp': photo_bytes(format='BMP'),
    'photo.tiff': photo_bytes(format='TIFF'),
    'moving.gif': photo_bytes(format='GIF', save_all=True, append_images=green_frames),
    'cmyk.jpg': photo_bytes(gold.convert('CMYK')),
    'palette.png': photo_bytes(gold.quantize(16), 'PNG'),
    'alpha.png': photo_bytes(gold.convert('RGBA'), 'PNG'),
    'tiny.png': photo_bytes(gold.resize((3, 2)), 'PNG'),
    'sideways.jpg': sideways(),
}
bad = {
    'truncated.jpg': photo_bytes()[:-300],
    'empty.jpg': b'',
    'page.jpg': b'<!doctype html><html>404',
    'huge.png': huge_png(),
    'random.jpg': random.Random(0).randbytes(5000),
    'half-png.png': photo_bytes(format='PNG')[:60],
    'nul.jpg': bytes(2000),
    'strip.png': photo_bytes(gold.resize((2000, 2)), 'PNG'),
    'script.svg': b'<svg xmlns="http://www.w3.org/2000/svg"/>',
}

def corrupted(rng, data, changes=20) -> bytes:
    "A file with some bytes changed, cut off somewhere."
    data = bytearray(data)
    for _ in range(rng.randrange(1, changes)): data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data[:rng.randrange(1, len(data) + 1)])

@pytest.fixture(scope='module')
def model(): return Model(example_model())

@pytest.fixture
def client(model):
    with TestClient(create_app(settings(), model)) as c: yield c

def test_files_are_predicted_in_order_and_bad_ones_have_an_error(model, tmp_path):
    files = good | bad
    for name, data in files.items(): (tmp_path/name).write_bytes(data)
    rows = list(predict_files(model, [tmp_path/name for name in files], batch_size=5))
    assert [Path(row['file']).name for row in rows] == list(files)
    assert {Path(row['file']).name for row in rows if 'error' in row} == set(bad)
    assert all(row['prediction'] == 'dandelion' for row in rows if 'prediction' in row)
    for error in [row['error'] for row in rows if 'error' in row]:
        assert not error[0].islower()
        assert error.endswith('.')

def test_a_file_that_cannot_be_read_has_an_error(model, tmp_path):
    missing, folder, endless = predict_files(model, [tmp_path/'none.jpg', tmp_path, '/dev/zero'], max_bytes=1000)
    assert 'No such file' in missing['error']
    assert 'directory' in folder['error']
    assert 'Larger than' in endless['error']

def test_16_bit_grey_levels_are_scaled_and_not_clipped(model):
    x = model.decode(photo_bytes(Image.fromarray(np.full((240, 320), 40_000, 'uint16')), 'PNG'))
    assert 150 < x.mean() < 160

def test_a_photo_is_rotated_as_its_metadata_says(model):
    difference = model.decode(sideways()).astype(int) - model.decode(photo_bytes(yellow_and_green()))
    assert np.abs(difference).mean() < 2

# -- Requests, good and bad

@pytest.mark.parametrize('name', good)
def test_a_good_photo_gets_a_prediction(client, name):
    r = client.post('/predict', files={'file': (name, good[name])})
    assert (r.status_code, r.json()['prediction'], r.json()['file']) == (200, 'dandelion', name)
    assert client.post('/predict', content=good[name]).json()['prediction'] == 'dandelion'

@pytest.mark.parametrize('name', bad)
def test_a_bad_photo_gets_an_error_message(client, name):
    in_form = client.post('/predict', files={'file': (name, bad[name])})
    bare = client.post('/predict', content=bad[name], headers={'content-type': 'image/jpeg'})
    for r in (in_form, bare):
        assert r.status_code in (400, 415, 422) and r.headers['content-type'] == 'application/problem+json'
        assert r.json()['detail'].endswith('.')

def test_randomly_damaged_photos_cause_no_server_error(client):
    rng, photos = random.Random(1), list(good.values())
    statuses = {client.post('/predict', content=corrupted(rng, rng.choice(photos))).status_code for _ in range(400)}
    assert statuses <= {200, 415, 422}

form_type = 'multipart/form-data; boundary=x'
def form_part(fields): return f'--x\r\nContent-Disposition: form-data; {fields}\r\n\r\n'.encode()

@pytest.mark.parametrize('content_type, body', [
    (form_type, form_part('name="file"; filename="a.jpg"')),               # nothing in it, and no end
    (form_type, b'--x--\r\n'),                                             # empty
    (form_type, b'\xff'*500),                                              # not a form
    (form_type, form_part('filename="a"') + b'text\r\n--x--\r\n'),         # no name
    ('multipart/form-data; boundary=', b'x'), ('multipart/form-data', photo_bytes())])
def test_a_malformed_form_is_refused(client, content_type, body):
    r = client.post('/predict', content=body, headers={'content-type': content_type})
    assert r.status_code == 400 and r.json()['detail']

@pytest.mark.parametrize('field, name', [
    ('name="file"; filename*=UTF-8\'\'L%C3%B6wenzahn.jpg', 'Löwenzahn.jpg'),
    ('name="file"; filename="a.jpg"; filename*=UTF-8\'en\'b.jpg', 'b.jpg'),
    ('name="file"; filename*=UTF-16\'\'%FF%FE%00', 'ÿþ'), ('name="file"; filename*=a.jpg', None),
    ('name="file"; filename="Löwenzahn.jpg"'.encode('latin-1'), 'Löwenzahn.jpg'),
    ('name="file"; filename="Löwenzahn.jpg"'.encode(), 'Löwenzahn.jpg'), ('name="file"', None),
    ('name="file"; filename=""', None), ('name="file"; filename', None), ('name="file"; filename="a"b".jpg"', 'a'),
    ('name="file"; filename="a\nb.jpg"', 'a b.jpg'), ('name="file"; filename="a\r\nb.jpg"', None),
    ('name="file"; filename="../../etc/a.jpg"', 'a.jpg'), ('name="file"; filename="C:\\fotos\\a.jpg"', 'a.jpg'),
    (f'name="file"; filename="{"x"*8000}.jpg"', 'x'*251 + '.jpg'), ('filename="a.jpg"; name="file"', 'a.jpg'),
    ('name="file"; filename="🌻\0.jpg"'.encode(), '🌻 .jpg')], ids=lambda value: repr(value)[:40])
def test_the_name_of_a_file_is_no_reason_to_refuse_it(client, field, name):
    field = field if isinstance(field, bytes) else field.encode()
    body = form_part('FIELD').replace(b'FIELD', field) + photo_bytes() + b'\r\n--x--\r\n'
    r = client.post('/predict', content=body, headers={'content-type': form_type})
    assert (r.status_code, r.json().get('file')) == (200, name), r.text
    many = client.post('/predict/batch', content=body.replace(b'name="file"', b'name="files"'),
                       headers={'content-type': form_type})
    assert [result.get('file') for result in many.json()['results']] == [name]

def post_in_pieces(app, path, *pieces):
    "The response to a form that arrives in pieces; a `TestClient` would join them."
    async def content():
        for piece in pieces: yield piece
    async def post():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url='http://testserver') as c:
            return await c.post(path, content=content(), headers={'content-type': form_type})
    return asyncio.run(post())

def test_a_value_without_a_name_before_the_file_does_not_shorten_it(client):
    "Rails puts a hidden field before each file; the file comes in several pieces, also the last of a full batch."
    expected = client.post('/predict', content=photo_bytes()).json()['probabilities']
    for path, field, n in (('/predict', 'file', 1), ('/predict/batch', 'files', 64)):
        head = form_part(f'name="{field}"') + b'\r\n'
        files = [form_part(f'name="{field}"; filename="{i}.jpg"') + photo_bytes() + b'\r\n' for i in range(n)]
        body = head + b''.join(files) + b'--x--\r\n'
        middle = len(body) - len(photo_bytes())//2
        r = post_in_pieces(client.app, path, body[:middle], body[middle:])
        results = r.json().get('results', [r.json()])
        assert [result.get('probabilities') for result in results] == [expected]*n, r.text

# -- Photos in JSON

def in_base64(data=photo_bytes()): return base64.b64encode(data).decode()

@pytest.mark.parametrize('content', [
    dict(image=in_base64()), dict(image=f'data:image/jpeg;base64,{in_base64()}'),
    dict(instances=[dict(b64=in_base64())]), dict(inputs=in_base64()), dict(b64=in_base64()),
    dict(Image_Bytes=base64.encodebytes(photo_bytes()).decode()),
    dict(data=[in_base64()]), [in_base64()], in_base64(), dict(image_url=dict(url=f'data:;base64,{in_base64()}')),
    dict(inputs=[dict(name='x', shape=[1], datatype='BYTES', data=[in_base64()])]),
    dict(image=in_base64(), name='a.jpg'), dict(file='a.jpg', data=in_base64()),
    dict(image='a.jpg', image_b64=in_base64()), dict(photo_base64=in_base64()), dict(img_b64=in_base64()),
    dict(requests=[dict(image=dict(content=in_base64()), features=[dict(type='LABEL_DETECTION')])]),
    dict(dataframe_split=dict(columns=['image', 'label'], data=[[in_base64(), 'rose']])),
    dict(messages=[dict(role='system', content='You know plants.'), dict(role='user', content=[
        dict(type='text', text='Which one?'),
        dict(type='image_url', image_url=dict(url=f'data:image/jpeg;base64,{in_base64()}'))])]), dict(image=base64.urlsafe_b64encode(photo_bytes()).decode().rstrip('='))],
    ids=lambda content: str(content)[:20])
def test_a_photo_in_json_gets_the_same_prediction(client, content):
    expected = client.post('/predict', content=photo_bytes()).json()['probabilities']
    for headers in ({}, {'content-type': 'application/x-www-form-urlencoded'}): # which `curl -d` sends
        r = client.post('/predict', content=json.dumps(content), headers=headers)
        assert (r.status_code, r.json().get('probabilities')) == (200, expected), r.text

@pytest.mark.parametrize('content, status', [
    ('{"image": "cat.jpg"}', 422), ('{"image": "https://example.org/a.jpg"}', 422), ('{"image": 5}', 422), ('{}', 422),
    ('{"features": [1, 2]}', 422), ('{"image": "', 422), ('[[[[0.1, 0.2], [0.3, 0.4]]]]', 422), ('['*5000, 422),
    ('{"image": "data:image/png,%89PNG"}', 422), ('[' + '0.5,'*100_000 + '1]', 422), ('{"image": ""}', 400),
    (json.dumps(dict(image='****' + in_base64())), 422), (json.dumps(dict(images=[in_base64()]*2)), 400),
    (json.dumps(dict(image=in_base64(b'<html>'))), 415)],
    ids=lambda value: str(value)[:20])
def test_json_without_a_photo_is_refused_with_a_way_to_send_one(client, content, status):
    r = client.post('/predict', content=content, headers={'content-type': 'application/json'})
    assert r.status_code == status, r.text
    if status == 422: assert '{"image": "…"}' in r.json()['detail']

@pytest.mark.parametrize('text', [in_base64(), f'data:image/jpeg;base64,{in_base64()}', f' {in_base64()}\n', f'\ufeff{in_base64()}',
                                  in_base64(photo_bytes(format='BMP'))], ids=len)
def test_a_photo_as_text_gets_a_prediction(client, text):
    "As a body, and in a form as a script of a web page sends the content of a canvas."
    in_form = form_part('name="file"') + text.encode() + b'\r\n--x--\r\n'
    responses = [client.post('/predict', content=text), client.post('/predict', files={'file': text.encode()}),
                 client.post('/predict', content=in_form, headers={'content-type': form_type})]
    assert [response.json().get('prediction') for response in responses] == ['dandelion']*3
    batch = client.post('/predict/batch', files=[('files', text.encode())]).json()
    assert batch['results'][0]['prediction'] == 'dandelion'

def test_the_fields_of_a_form_are_refused_with_a_way_to_send_a_photo(client):
    r = client.post('/predict', data=dict(image=in_base64()))
    assert (r.status_code, '{"image": "…"}' in r.json()['detail']) == (422, True)

def test_json_with_very_many_values_is_refused_before_it_is_parsed(client):
    "Ten megabytes of empty lists would take hundreds in memory."
    for path in ('/predict', '/predict/batch'):
        r = client.post(path, content='[' + '[],'*3_000_000 + '1]', headers={'content-type': 'application/json'})
        assert (r.status_code, 'too many values' in r.json()['detail']) == (422, True)

def test_a_photo_in_json_has_the_same_limit_as_any_other(model):
    "The limit is that of the photo, not that of its base64."
    photo = photo_bytes(Image.effect_noise((320, 240), 50).convert('RGB'), quality=95)
    for limit, status in ((len(photo), 200), (len(photo) - 1, 413), (len(photo)//2, 413)):
        with TestClient(create_app(settings(ingest_max_bytes=limit), model)) as c:
            sent = json.dumps(dict(image=base64.encodebytes(photo).decode()))
            for content, content_type in ((sent, 'application/json'), (sent, 'application/x-www-form-urlencoded'),
                                          (in_base64(photo), 'text/plain'), (photo, 'image/jpeg'), (photo, '')):
                r = c.post('/predict', content=content, headers={'content-type': content_type})
                assert r.status_code == status, (content_type, r.text)

def test_a_batch_in_json_is_answered_in_order(client):
    photos = [in_base64(), 'cat.jpg', in_base64(photo_bytes('green'))]
    for content in (dict(images=photos), dict(instances=[dict(b64=photo) for photo in photos])):
        results = client.post('/predict/batch', json=content).json()['results']
        outcomes = [result.get('prediction') or result['status'] for result in results]
        assert outcomes == ['dandelion', 422, 'grass']
        as_text = client.post('/predict/batch', content=json.dumps(content), headers={'content-type': 'text/plain'})
        assert len(as_text.json()['results']) == 3
    assert client.post('/predict/batch', json=dict(images=[in_base64()]*65)).status_code == 413
    assert client.post('/predict/batch', json=dict(name='x')).status_code == 422

# -- HEAD

def test_head_is_answered_as_get_is_without_a_body(client):
    routes = [route for route in client.app.routes if 'GET' in getattr(route, 'methods', ())]
    assert {'/', '/health', '/ready', '/metrics'} < {route.path for route in routes}
    for path in ['/models/plants/health', *(route.path for route in routes)]:
        get, head = client.get(path), client.head(path, headers={'If-None-Match': '"a"', 'Range': 'bytes=0-1'})
        assert (head.status_code, head.content) == (get.status_code, b'') == (200, b''), path
        assert head.headers['content-type'] == get.headers['content-type']
    assert client.head('/predict').status_code == 405
    methods = {method for path in client.get('/openapi.json').json()['paths'].values() for method in path}
    assert methods == {'get', 'post'}

def memory_of_children(pid) -> float:
    "Memory of all processes that a process has started, directly or not, in MB."
    total = 0
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess): total += child.memory_info().rss
    return total/1e6

@pytest.mark.slow
def test_2000_malformed_bodies_leak_no_memory(tmp_path):
    "Corrupted, cut and repeated photos: no server error, and after 1000 of them the workers do not grow."
    publish_example(settings(home=tmp_path))
    port, rng = free_port(), random.Random(2)
    corpus = [data for data in (good | bad).values() if data]
    def malformed(): return corrupted(rng, rng.choice(corpus), changes=30) * rng.choice([1, 1, 1, 20])
    serve = [*cli, 'serve', '--home', str(tmp_path), '--port', str(port)]
    p = subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f'http://127.0.0.1:{port}', timeout=30) as c, ThreadPoolExecutor(4) as pool:
            wait_for(lambda: c.get('/ready').status_code == 200 and c.get('/ui/').status_code == 200)
            def send(data):
                if len(data) % 2: return c.post('/predict', files={'file': data}).status_code
                return c.post('/predict', content=data).status_code
            statuses = set(pool.map(send, [malformed() for _ in range(1000)]))
            before = memory_of_children(p.pid)
            statuses |= set(pool.map(send, [malformed() for _ in range(1000)]))
            assert statuses <= {200, 400, 415, 422}
            growth = memory_of_children(p.pid) - before
            assert growth < 25, f'{growth:.0f} MB' # the second thousand bodies are about 50 MB in total
            assert c.post('/predict', content=photo_bytes()).status_code == 200
    finally: stop(p)

@pytest.mark.slow
@pytest.mark.parametrize('kind', ['photos', 'numbers'])
def test_fuzzing_by_the_openapi_description_finds_no_server_error(kind, model, tmp_path):
    numbers = linear_model([[2, 0], [0, 1], [-1, 1]], ['up', 'down'], version='1').SerializeToString()
    served = model if kind == 'photos' else Model(numbers)
    with running(create_app(settings(home=tmp_path, token='hush'), served)) as c:
        command = [programs/'st', 'run', # Schemathesis
                   str(c.base_url.join('/openapi.json')), '--checks=not_a_server_error',
                   '--max-examples=50', '--seed=1', '--no-color', '-H', 'Authorization: Bearer hush']
        r = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-500:]

def test_openapi_describes_requests_and_answers(client):
    doc = client.get('/openapi.json').json()
    post = doc['paths']['/predict']['post']
    assert {'multipart/form-data', 'image/*', 'application/json'} <= set(post['requestBody']['content'])
    assert {'200', '400', '413', '415', '422', '503'} <= set(post['responses'])
    assert doc['components']['schemas']['Answer']['example']

def test_a_server_error_reveals_no_internals(model):
    app = create_app(settings(), model)
    app.add_api_route('/boom', lambda: 1 / 0)
    with TestClient(app, raise_server_exceptions=False) as c: r = c.get('/boom')
    assert (r.status_code, r.headers['content-type']) == (500, 'application/problem+json') and 'zero' not in r.text

# -- The store, and the local copy

@contextlib.contextmanager
def frozen(seaweedfs):
    "A store that accepts connections and never answers."
    os.kill(seaweedfs.process.pid, signal.SIGSTOP)
    try: yield
    finally: os.kill(seaweedfs.process.pid, signal.SIGCONT)

@pytest.mark.slow
def test_a_model_is_loaded_from_its_local_copy_while_s3_is_unreachable(seaweedfs, tmp_path):
    s = seaweedfs.settings('serving', home=tmp_path)
    with pytest.raises(NoModelError): load_champion(s)
    publish_example(s, '7')
    assert load_champion(s).version == '7'
    publish_example(settings(home=tmp_path), '8')
    assert load_champion(settings(home=tmp_path)).version == '8'
    with frozen(seaweedfs):
        unreachable = s.model_copy(update=dict(s3_timeout=.5))
        start = time.monotonic()
        champion = load_champion(unreachable)
        assert champion.version == '7' and champion.pointer['note'], 'version 8 was copied from another store'
        assert time.monotonic() - start < 20
        with pytest.raises(StoreError): load_champion(unreachable.model_copy(update=dict(home=tmp_path/'elsewhere')))

@pytest.mark.slow
def test_health_responds_while_the_store_hangs(tmp_path):
    with listen('127.0.0.1', 0) as silent:
        url = f'http://127.0.0.1:{silent.getsockname()[1]}'
        s3 = dict(store_url='s3://plants', s3_endpoint_url=url, s3_access_key='a', s3_secret_key='b', s3_timeout=1)
        s = settings(home=tmp_path, **s3)
        with running(create_app(s)) as c:
            start = time.monotonic()
            assert c.get('/health').json()['ready'] is False
            r = c.post('/predict', content=photo_bytes())
            assert r.status_code == 503 and r.headers['retry-after']
            assert time.monotonic() - start < 1

def test_a_model_is_loaded_if_its_copy_cannot_be_written(tmp_path):
    s = settings(home=tmp_path)
    publish_example(s, '1')
    (tmp_path/'cache').write_text('a file where the folder should be')
    assert load_champion(s).version == '1'

def test_a_damaged_copy_is_fetched_again(tmp_path):
    s = settings(home=tmp_path)
    publish_example(s, '1')
    load_champion(s)
    copy, = (tmp_path/'cache/models').glob('*.onnx')
    copy.write_bytes(copy.read_bytes()[:-50])
    assert load_champion(s).version == '1'
    assert Model(copy).classes == ['dandelion', 'grass']

def test_old_copies_of_models_are_deleted(tmp_path):
    s = settings(home=tmp_path)
    for version in '123456':
        publish_example(s, version)
        load_champion(s)
    assert len(list((tmp_path/'cache/models').glob('*.onnx'))) == 3

# -- Following what is published

crashing_graph = """
<ir_version: 8, opset_import: ["": 13]>
crash (uint8[N,64,64,3] images) => (float[N,2] probabilities) <int64[2] shape = {7, 11}> {
    pixels = Cast<to=1>(images)
    probabilities = Reshape(pixels, shape)
}
"""

def crashing_model():
    "A model file that can be opened, and fails on every input."
    from onnx import helper, parser
    model = parser.parse_model(crashing_graph.strip())
    spec = dict(kind='image', shape=[None, 64, 64, 3], resize=dict(side=64, size=64))
    meta = dict(classes=['dandelion', 'grass'], input=spec)
    helper.set_model_props(model, {k: json.dumps(v) for k, v in meta.items()})
    return model.SerializeToString()

@pytest.mark.parametrize('why, bad', [
    ('not a usable ONNX file', lambda: dict(data=example_model()[:300])),
    ('checksum', lambda: dict(sha256='0'*64)),
    ('answers in shape', lambda: dict(data=example_model(classes=['a', 'b', 'c']))),
    ('golden input', lambda: dict(data=crashing_model())),
    ('no such object', lambda: dict(key='missing.onnx', sha256='1'*64))])
def test_a_broken_model_is_refused_and_the_old_one_serves(tmp_path, why, bad):
    s = settings(home=tmp_path)
    publish_example(s, '1')
    live = LiveModel(s)
    assert live.refresh() and live.model.version == '1' and live.error is None
    publish_example(s, '2', **bad())
    assert not live.refresh() and live.model.version == '1' and why in str(live.error)
    assert load_champion(s).version == '1', 'a server that starts now serves it too'
    publish_example(s, '3')
    assert live.refresh() and live.model.version == '3' and live.error is None

@pytest.mark.slow
def test_models_change_under_load_and_each_answer_is_of_one_version(tmp_path):
    "Odd versions call gold a dandelion, even ones call it grass."
    s = settings(home=tmp_path, reload_every=.05, token='hush')
    classes = [('grass', 'dandelion'), ('dandelion', 'grass')]
    publish_example(s, '1')
    versions, failed, end = set(), [], threading.Event()
    def keep_asking(url):
        with httpx.Client(base_url=url, timeout=20) as c:
            while not end.is_set():
                r = c.post('/predict', content=photo_bytes('gold'))
                answer = r.json()
                expected = classes[int(answer['model_version']) % 2][0] if r.status_code == 200 else None
                if answer.get('prediction') != expected: failed.append(answer)
                versions.add(answer.get('model_version'))
    with running(create_app(s)) as c, ThreadPoolExecutor(4) as pool:
        for _ in range(4): pool.submit(keep_asking, str(c.base_url))
        for v in range(2, 40):
            publish_example(s, str(v), data=example_model(classes=classes[v % 2], version=str(v)))
            if v % 3 == 0:
                r = c.post('/reload', headers={'Authorization': 'Bearer hush'})
                assert r.json()['model_version'] == str(v)
            time.sleep(.1)
        end.set()
    assert not failed and None not in versions and len(versions) > 20

@pytest.mark.slow
def test_predictions_go_on_while_the_store_is_stopped(seaweedfs, tmp_path):
    s = seaweedfs.settings('under-way', home=tmp_path, s3_timeout=.3, reload_every=.1)
    publish_example(s, '1')
    with running(create_app(s)) as c:
        wait_for(lambda: c.get('/health').json()['ready'], 20)
        with frozen(seaweedfs):
            wait_for(lambda: c.get('/health').json()['detail'], 90) # botocore's backoff is random
            assert c.post('/predict', content=photo_bytes('gold')).json()['model_version'] == '1'
            assert 'cannot be used' in c.get('/model/info').json()['serving']['error']
        wait_for(lambda: c.get('/health').json()['detail'] is None, 90)
        publish_example(s, '2')
        wait_for(lambda: c.get('/health').json()['model_version'] == '2', 20)

# -- A real server

def test_many_requests_at_once_each_get_their_own_answer(model):
    labels = dict(gold='dandelion', green='grass')
    colours = [random.Random(i).choice(list(labels)) for i in range(200)]
    with running(create_app(settings(), model)) as c, ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda colour: c.post('/predict', content=photo_bytes(colour)).json(), colours))
    assert [a['prediction'] for a in answers] == [labels[colour] for colour in colours]
    assert len({a['id'] for a in answers}) == 200

def test_slow_predictions_do_not_hold_up_other_requests(model, monkeypatch):
    run = Model.run
    def slow_run(self, batch):
        time.sleep(1)
        return run(self, batch)
    monkeypatch.setattr(Model, 'run', slow_run)
    with running(create_app(settings(), model)) as c, ThreadPoolExecutor(4) as pool:
        start = time.monotonic()
        slow = [pool.submit(c.post, '/predict', content=photo_bytes()) for _ in range(4)]
        time.sleep(.3)
        asked = time.monotonic()
        assert c.get('/health').status_code == 200
        assert time.monotonic() - asked < .5
        assert {future.result().status_code for future in slow} == {200}
        assert time.monotonic() - start > 1, 'the predictions were slow'

def test_a_body_without_end_is_refused_early(model):
    sent = 0
    def endless_body():
        nonlocal sent
        while sent < 500_000_000:
            sent += 65_536
            yield bytes(65_536)
    with running(create_app(settings(ingest_max_bytes=1_000_000), model)) as c:
        for kind in ('image/jpeg', form_type):
            with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError):
                r = c.post('/predict', content=endless_body(), headers={'content-type': kind})
                assert r.status_code in (400, 413)
        assert sent < 100_000_000
        assert c.get('/health').json()['ready']

def test_the_server_survives_clients_that_disconnect(model):
    request = b'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\nabc'
    with running(create_app(settings(), model)) as c:
        for _ in range(20):
            with socket.create_connection((c.base_url.host, c.base_url.port)) as connection: connection.sendall(request)
        assert c.post('/predict', content=photo_bytes()).status_code == 200

@pytest.mark.slow
def test_the_command_waits_for_a_model_serves_and_stops(tmp_path):
    port, s = free_port(), settings(home=tmp_path)
    serve = [*cli, 'serve', '--home', str(tmp_path), '--port', str(port)]
    p = subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        with httpx.Client(base_url=f'http://127.0.0.1:{port}', timeout=20) as c:
            wait_for(lambda: c.get('/health').json()['status'] == 'ok')
            assert c.post('/predict', content=photo_bytes()).status_code == 503
            publish_example(s, '4')
            wait_for(lambda: c.get('/health').json()['ready'], 20)
            assert c.post('/predict', content=photo_bytes()).json()['model_version'] == '4'
            assert c.get('/ui/').status_code == 200
        second = subprocess.run(serve, capture_output=True, text=True)
        assert second.returncode == 1 and 'PLANT_PORT' in second.stdout + second.stderr
        assert 'Traceback' not in second.stderr
        p.send_signal(signal.SIGTERM)
        output = p.communicate(timeout=30)[0]
        assert f'http://127.0.0.1:{port}' in output and 'Traceback' not in output
    finally: stop(p)

# -- What one prediction costs

measured_predict = """
import os, sys
from plant_mlops.cli.main import app
sys.argv = ['plant-mlops', 'predict', '--home', sys.argv[1], sys.argv[2], '--json']
try: app()
finally:
    peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))
    print(sum(os.times()[:2]), peak.split()[1], file=sys.stderr)
"""

def test_one_prediction_takes_little_time_and_memory(tmp_path):
    "CPU time is measured, because on a busy machine any process waits."
    publish_example(settings(home=tmp_path), '1')
    (tmp_path/'photo.jpg').write_bytes(photo_bytes())
    command = [sys.executable, '-c', measured_predict, str(tmp_path), str(tmp_path/'photo.jpg')]
    r = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, memory = map(float, r.stderr.split()[-2:])
    assert json.loads(r.stdout)['prediction'] == 'dandelion'
    assert seconds < 2 and memory < 250_000, f'{seconds:.1f} s, {memory/1000:.0f} MB'
