"Serving: bad photos, bad requests, a store that is away, and what one prediction costs."
import contextlib, json, os, random, signal, socket, struct, subprocess, sys, threading, time, zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import httpx, pytest, uvicorn
from fastapi.testclient import TestClient
from PIL import Image
from conftest import free_port, stop, wait_for
from plant_mlops.core.config import settings
from plant_mlops.core.store import StoreError
from plant_mlops.registry.model_file import linear_model
from plant_mlops.serve.api import Live, create_app
from plant_mlops.serve.server import listen
from plant_mlops.serve.onnx_model import Model, NoModel, load_champion, predict_files
from tiny import jpeg, publish, tiny_model

cli = [sys.executable, '-m', 'plant_mlops.cli.main'] if not (Path(sys.executable).parent/'plant-mlops').exists() else [str(Path(sys.executable).parent/'plant-mlops')]

def halves():
    "Yellow on the left, green on the right: where it is cut and turned can be seen."
    im = Image.new('RGB', (400, 200), 'green')
    im.paste('gold', (0, 0, 260, 200))
    return im

def huge_png(side=50_000):
    "The header of a photo of 2.5 thousand million pixels, and hardly anything else."
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b'')

def turned():
    "A photo on its side whose EXIF says so."
    im = halves().rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(im, exif=exif)

gold = Image.new('RGB', (320, 240), 'gold')
good = {'plain.jpg': jpeg(), 'Löwenzahn im März (1).jpg': jpeg(), 'photo.png': jpeg(format='PNG'), 'photo.webp': jpeg(format='WEBP'), 'photo.bmp': jpeg(format='BMP'),
        'photo.tiff': jpeg(format='TIFF'), 'moving.gif': jpeg(format='GIF', save_all=True, append_images=[Image.new('RGB', (320, 240), 'green')]*3),
        'cmyk.jpg': jpeg(gold.convert('CMYK')), 'palette.png': jpeg(gold.quantize(16), 'PNG'), 'alpha.png': jpeg(gold.convert('RGBA'), 'PNG'),
        'tiny.png': jpeg(gold.resize((3, 2)), 'PNG'), 'no-extension': jpeg(), 'wrong.txt': jpeg(), 'sideways.jpg': turned()}
bad = {'truncated.jpg': jpeg()[:-300], 'empty.jpg': b'', 'page.jpg': b'<!doctype html><html>404', 'huge.png': huge_png(), 'random.jpg': random.Random(0).randbytes(5000),
       'half-png.png': jpeg(format='PNG')[:60], 'strip.png': jpeg(gold.resize((2000, 2)), 'PNG'), 'script.svg': b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'nul.jpg': bytes(2000)}

@pytest.fixture(scope='module')
def model(): return Model(tiny_model())

@pytest.fixture
def client(model):
    with TestClient(create_app(settings(), model)) as c: yield c

def test_files_good_and_bad(model, tmp_path):
    files = good | bad
    for name, data in files.items(): (tmp_path/name).write_bytes(data)
    rows = list(predict_files(model, [tmp_path/o for o in files], batch=5))
    assert [Path(r['file']).name for r in rows] == list(files)
    assert {Path(r['file']).name for r in rows if 'error' in r} == set(bad)
    assert all(r['prediction'] == 'dandelion' for r in rows if 'prediction' in r)
    assert all(not r['error'][0].islower() and r['error'].endswith('.') for r in rows if 'error' in r)

def test_what_cannot_be_read_is_told(model, tmp_path):
    rows = list(predict_files(model, [tmp_path/'none.jpg', tmp_path, '/dev/zero'], max_bytes=1000))
    assert ['No such file' in rows[0]['error'], 'directory' in rows[1]['error'], 'Larger than' in rows[2]['error']] == [True]*3

def test_deep_grey_is_scaled_not_cut(model):
    im = Image.fromarray(__import__('numpy').full((240, 320), 40_000, 'uint16'))
    x = model.decode(jpeg(im, 'PNG'))
    assert 150 < x.mean() < 160

def test_sideways_is_seen_upright(model):
    import numpy as np
    assert np.abs(model.decode(turned()).astype(int) - model.decode(jpeg(halves()))).mean() < 2

@pytest.mark.parametrize('name', good)
def test_http_good(client, name):
    r = client.post('/predict', files={'file': (name, good[name])})
    assert (r.status_code, r.json()['prediction'], r.json()['file']) == (200, 'dandelion', name)
    assert client.post('/predict', content=good[name]).json()['prediction'] == 'dandelion'

@pytest.mark.parametrize('name', bad)
def test_http_bad(client, name):
    for r in (client.post('/predict', files={'file': (name, bad[name])}), client.post('/predict', content=bad[name], headers={'content-type': 'image/jpeg'})):
        assert r.status_code in (400, 415, 422) and r.headers['content-type'] == 'application/problem+json'
        assert r.json()['detail'].endswith('.')

def test_scratched_photos_never_break_the_server(client):
    rng, seen = random.Random(1), set()
    for i in range(400):
        data = bytearray(rng.choice(list(good.values())))
        for _ in range(rng.randrange(1, 20)): data[rng.randrange(len(data))] = rng.randrange(256)
        seen.add(client.post('/predict', content=bytes(data[:rng.randrange(1, len(data) + 1)])).status_code)
    assert seen <= {200, 415, 422}

@pytest.mark.parametrize('headers,body', [
    ({'content-type': 'multipart/form-data; boundary=x'}, b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n'),
    ({'content-type': 'multipart/form-data; boundary=x'}, b'--x--\r\n'), ({'content-type': 'multipart/form-data; boundary='}, b'x'),
    ({'content-type': 'multipart/form-data'}, jpeg()), ({'content-type': 'multipart/form-data; boundary=x'}, b'\xff' * 500),
    ({'content-type': 'multipart/form-data; boundary=x'}, b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\ntext\r\n--x--\r\n'),
    ({'content-type': 'multipart/form-data; boundary=x'}, b'--x\r\nContent-Disposition: form-data; filename="a"\r\n\r\ntext\r\n--x--\r\n')])
def test_broken_forms(client, headers, body):
    r = client.post('/predict', content=body, headers=headers)
    assert r.status_code == 400 and r.json()['detail']

def test_two_thousand_malformed_bodies(tmp_path):
    "Photos scratched, cut and grown, in forms and bare: no failure inside, and no memory kept."
    publish(settings(home=tmp_path))
    port, rng = free_port(), random.Random(2)
    corpus = [o for o in {**good, **bad}.values() if o]
    def body():
        data = bytearray(rng.choice(corpus))
        for _ in range(rng.randrange(1, 30)): data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data[:rng.randrange(1, len(data) + 1)]) * rng.choice([1, 1, 1, 3])
    p = subprocess.Popen([*cli, 'serve', '--home', str(tmp_path), '--port', str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    memory = lambda: int(next(o for o in open(f'/proc/{p.pid}/status') if o.startswith('VmRSS')).split()[1]) / 1024
    try:
        with httpx.Client(base_url=f'http://127.0.0.1:{port}', timeout=30) as c, ThreadPoolExecutor(4) as pool:
            wait_for(lambda: c.get('/ready').status_code == 200)
            def send(data): return (c.post('/predict', files={'file': data}) if len(data) % 2 else c.post('/predict', content=data)).status_code
            seen = set(pool.map(send, [body() for _ in range(1000)]))
            before = memory()
            seen |= set(pool.map(send, [body() for _ in range(1000)]))
            assert seen <= {200, 400, 415, 422} and memory() < before + 25 and c.post('/predict', content=jpeg()).status_code == 200
    finally: stop(p)

@pytest.mark.parametrize('kind', ['photos', 'numbers'])
def test_fuzzed_by_its_own_description(kind, model, tmp_path):
    numbers = linear_model([[2, 0], [0, 1], [-1, 1]], ['up', 'down'], version='1').SerializeToString()
    with running(create_app(settings(home=tmp_path, token='hush'), model if kind == 'photos' else Model(numbers))) as c:
        r = subprocess.run([Path(sys.executable).parent/'st', 'run', str(c.base_url.join('/openapi.json')), '--checks=not_a_server_error', '--max-examples=50', '--seed=1',
                            '--no-color', '-H', 'Authorization: Bearer hush'], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-500:]

def test_openapi_describes_what_is_sent_and_answered(client):
    doc = client.get('/openapi.json').json()
    post = doc['paths']['/predict']['post']
    assert {'multipart/form-data', 'image/*', 'application/json'} <= set(post['requestBody']['content'])
    assert {'200', '400', '413', '415', '422', '503'} <= set(post['responses'])
    assert doc['components']['schemas']['Answer']['example']

def test_a_failure_inside_tells_nothing_about_the_inside(model):
    app = create_app(settings(), model)
    app.add_api_route('/boom', lambda: 1 / 0)
    with TestClient(app, raise_server_exceptions=False) as c: r = c.get('/boom')
    assert (r.status_code, r.headers['content-type']) == (500, 'application/problem+json') and 'zero' not in r.text

# the store, and the copy that is kept

def test_from_s3_and_without_it(weed, tmp_path):
    s = weed.settings('serving', home=tmp_path)
    with pytest.raises(NoModel): load_champion(s)
    publish(s, '7')
    assert load_champion(s).version == '7'
    publish(settings(home=tmp_path), '8')
    assert load_champion(settings(home=tmp_path)).version == '8'
    with frozen(weed):
        away = s.model_copy(update=dict(s3_timeout=.5))
        start = time.monotonic()
        m = load_champion(away)
        assert m.version == '7' and m.origin['note'], 'what was kept of another store is another model'
        assert time.monotonic() - start < 20
        with pytest.raises(StoreError): load_champion(away.model_copy(update=dict(home=tmp_path/'elsewhere')))

@contextlib.contextmanager
def frozen(weed):
    "A store that is there and never answers."
    os.kill(weed.p.pid, signal.SIGSTOP)
    try: yield
    finally: os.kill(weed.p.pid, signal.SIGCONT)

def test_health_while_the_store_never_answers(tmp_path):
    with listen('127.0.0.1', 0) as silent:
        s = settings(home=tmp_path, store_url='s3://plants', s3_endpoint_url='http://127.0.0.1:%d' % silent.getsockname()[1], s3_access_key='a', s3_secret_key='b', s3_timeout=1)
        with running(create_app(s)) as c:
            t = time.monotonic()
            assert c.get('/health').json()['ready'] is False
            r = c.post('/predict', content=jpeg())
            assert r.status_code == 503 and r.headers['retry-after']
            assert time.monotonic() - t < 1

def test_no_room_for_a_copy(tmp_path):
    s = settings(home=tmp_path)
    publish(s, '1')
    (tmp_path/'cache').write_text('in the way')
    assert load_champion(s).version == '1'

def test_damaged_copy_is_fetched_again(tmp_path):
    s = settings(home=tmp_path)
    publish(s, '1')
    load_champion(s)
    copy, = (tmp_path/'cache/models').glob('*.onnx')
    copy.write_bytes(copy.read_bytes()[:-50])
    assert load_champion(s).version == '1'
    assert Model(copy).classes == ['dandelion', 'grass']

def test_few_copies_are_kept(tmp_path):
    s = settings(home=tmp_path)
    for v in '123456':
        publish(s, v)
        load_champion(s)
    assert len(list((tmp_path/'cache/models').glob('*.onnx'))) == 3

# following what is in production

crashing = """
<ir_version: 8, opset_import: ["": 13]>
crash (uint8[N,64,64,3] images) => (float[N,2] probabilities) <int64[2] shape = {7, 11}> {
    pixels = Cast<to=1>(images)
    probabilities = Reshape(pixels, shape)
}
"""

def crashing_model():
    "Opens, and fails on every input."
    from onnx import helper, parser
    model = parser.parse_model(crashing.strip())
    meta = dict(classes=['dandelion', 'grass'], input=dict(kind='image', shape=[None, 64, 64, 3], resize=dict(side=64, size=64)))
    helper.set_model_props(model, {k: json.dumps(v) for k, v in meta.items()})
    return model.SerializeToString()

@pytest.mark.parametrize('why, bad', [('not a usable ONNX file', lambda: dict(data=tiny_model()[:300])), ('checksum', lambda: dict(sha256='0'*64)),
    ('answers in shape', lambda: dict(data=tiny_model(classes=['a', 'b', 'c']))), ('golden input', lambda: dict(data=crashing_model())),
    ('no such object', lambda: dict(key='gone.onnx', sha256='1'*64))])
def test_a_broken_model_is_refused_and_the_old_one_serves(tmp_path, why, bad):
    s = settings(home=tmp_path)
    publish(s, '1')
    live = Live(s)
    assert live.look() and live.model.version == '1' and live.error is None
    publish(s, '2', **bad())
    assert not live.look() and live.model.version == '1' and why in str(live.error)
    assert load_champion(s).version == '1', 'a server that starts now serves it too'
    publish(s, '3')
    assert live.look() and live.model.version == '3' and live.error is None

def test_models_change_under_load(tmp_path):
    "No request fails, and each is answered by one version, whole: odd versions call gold a dandelion, even ones call it grass."
    s = settings(home=tmp_path, reload_every=.05, token='hush')
    kinds = [('grass', 'dandelion'), ('dandelion', 'grass')]
    publish(s, '1')
    seen, failed, end = set(), [], threading.Event()
    def client(url):
        with httpx.Client(base_url=url, timeout=20) as c:
            while not end.is_set():
                r = c.post('/predict', content=jpeg('gold'))
                answer = r.json()
                if r.status_code != 200 or answer['prediction'] != kinds[int(answer['model_version']) % 2][0]: failed.append(answer)
                seen.add(answer.get('model_version'))
    with running(create_app(s)) as c, ThreadPoolExecutor(4) as pool:
        for _ in range(4): pool.submit(client, str(c.base_url))
        for v in range(2, 40):
            publish(s, str(v), data=tiny_model(classes=kinds[v % 2], version=str(v)))
            if v % 3 == 0: assert c.post('/reload', headers={'Authorization': 'Bearer hush'}).json()['model_version'] == str(v)
            time.sleep(.1)
        end.set()
    assert not failed and len(seen) > 20

def test_a_store_that_stops_under_way(weed, tmp_path):
    s = weed.settings('under-way', home=tmp_path, s3_timeout=.3, reload_every=.1)
    publish(s, '1')
    with running(create_app(s)) as c:
        wait_for(lambda: c.get('/health').json()['ready'], 20)
        with frozen(weed):
            wait_for(lambda: c.get('/health').json()['detail'], 30)
            assert c.post('/predict', content=jpeg('gold')).json()['model_version'] == '1'
            assert 'cannot be used' in c.get('/model/info').json()['serving']['error']
        wait_for(lambda: c.get('/health').json()['detail'] is None, 30)
        publish(s, '2')
        wait_for(lambda: c.get('/health').json()['model_version'] == '2', 20)

# a real server

@contextlib.contextmanager
def running(app, sock=None):
    "An app in a thread, on a free port or a socket."
    with sock or listen('127.0.0.1', 0) as sock:
        server = uvicorn.Server(uvicorn.Config(app, log_level='error'))
        t = threading.Thread(target=server.run, kwargs=dict(sockets=[sock]))
        t.start()
        try:
            wait_for(lambda: server.started)
            with httpx.Client(base_url='http://127.0.0.1:%d' % sock.getsockname()[1], timeout=20) as c: yield c
        finally:
            server.should_exit = True
            t.join(20)

def test_many_at_once_get_their_own_answer(model):
    with running(create_app(settings(), model)) as c:
        colours = [random.Random(i).choice(['gold', 'green']) for i in range(200)]
        with ThreadPoolExecutor(32) as pool: said = list(pool.map(lambda o: c.post('/predict', content=jpeg(o)).json(), colours))
    assert [o['prediction'] for o in said] == [{'gold': 'dandelion', 'green': 'grass'}[o] for o in colours]
    assert len({o['id'] for o in said}) == 200

def test_slow_answers_do_not_hold_up_the_rest(model, monkeypatch):
    monkeypatch.setattr(Model, 'predict', lambda *_: time.sleep(1) or [dict(prediction='grass', probability=1., probabilities={}, novelty=0., model_version='1')])
    with running(create_app(settings(), model)) as c, ThreadPoolExecutor(8) as pool:
        slow = [pool.submit(c.post, '/predict', content=jpeg()) for _ in range(4)]
        time.sleep(.2)
        t = time.monotonic()
        assert c.get('/health').status_code == 200
        assert time.monotonic() - t < .5
        assert {o.result().status_code for o in slow} == {200}

def test_endless_body_is_cut_short(model):
    sent = 0
    def endless():
        nonlocal sent
        while sent < 500_000_000:
            sent += 65_536
            yield bytes(65_536)
    with running(create_app(settings(ingest_max_bytes=1_000_000), model)) as c:
        for kind in ('image/jpeg', 'multipart/form-data; boundary=x'):
            with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError): assert c.post('/predict', content=endless(), headers={'content-type': kind}).status_code in (400, 413)
        assert sent < 100_000_000
        assert c.get('/health').json()['ready']

def test_clients_that_go_away(model):
    with running(create_app(settings(), model)) as c:
        for _ in range(20):
            with socket.create_connection((c.base_url.host, c.base_url.port)) as o: o.sendall(b'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\nabc')
        assert c.post('/predict', content=jpeg()).status_code == 200

def test_command_serves_waits_for_a_model_and_stops(tmp_path):
    port, s = free_port(), settings(home=tmp_path)
    p = subprocess.Popen([*cli, 'serve', '--home', str(tmp_path), '--port', str(port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        with httpx.Client(base_url=f'http://127.0.0.1:{port}', timeout=20) as c:
            wait_for(lambda: c.get('/health').json()['status'] == 'ok')
            assert c.post('/predict', content=jpeg()).status_code == 503
            publish(s, '4')
            wait_for(lambda: c.get('/health').json()['ready'], 20)
            assert c.post('/predict', content=jpeg()).json()['model_version'] == '4'
            assert c.get('/ui/').status_code == 200
        second = subprocess.run([*cli, 'serve', '--home', str(tmp_path), '--port', str(port)], capture_output=True, text=True)
        assert second.returncode == 1 and 'PLANT_PORT' in second.stdout + second.stderr and 'Traceback' not in second.stderr
        p.send_signal(signal.SIGTERM)
        said = p.communicate(timeout=30)[0]
        assert f'http://127.0.0.1:{port}' in said and 'Traceback' not in said
    finally: stop(p)

# what one prediction costs

def test_one_prediction_is_quick_and_small(tmp_path):
    "CPU time is judged, since a busy machine lets any process wait; on an idle one it takes no longer than that."
    publish(settings(home=tmp_path), '1')
    (tmp_path/'photo.jpg').write_bytes(jpeg())
    code = ('import os, sys; from plant_mlops.cli.main import app; sys.argv = ["plant-mlops", "predict", "--home", sys.argv[1], sys.argv[2], "--json"]\n'
            'try: app()\n'
            'finally: print(sum(os.times()[:2]), next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1], file=sys.stderr)')
    r = subprocess.run([sys.executable, '-c', code, str(tmp_path), str(tmp_path/'photo.jpg')], capture_output=True, text=True, check=True)
    seconds, memory = map(float, r.stderr.split()[-2:])
    assert json.loads(r.stdout)['prediction'] == 'dandelion'
    assert seconds < 2 and memory < 250_000, f'{seconds:.1f} s, {memory/1000:.0f} MB'
