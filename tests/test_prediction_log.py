"Metrics, logs and recorded predictions of a server, also when the database, the disk or the server itself fails."
import json, signal, socket, threading, time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
import pytest
from fastapi.testclient import TestClient
from helpers import logged_rows, metric, running, serving, start_postgres, stop, wait_for
from plant_mlops.core.config import settings
from plant_mlops.registry.example_model import example_model, photo_bytes, publish_example
from plant_mlops.serve.onnx_model import Model
from plant_mlops.serve.prediction_spool import Spool, spool_folder, waiting_files
from plant_mlops.serve.api import create_app
from plant_mlops.serve.prediction_log import (count_correct, feedback, load_in_background, load_log_files,
                                              open_prediction_log)

TOKEN = 'hush'
AUTHORIZED = {'Authorization': f'Bearer {TOKEN}'}
HTML = b'<html>'

@pytest.fixture(scope='module')
def model(): return Model(example_model())

def post_photo(client, photo=None, **kw): return client.post('/predict', content=photo or photo_bytes(), **kw)

def predict_many(client, n) -> list:
    "Answers to n photos, eight at a time."
    def predict(i): return post_photo(client, photo_bytes('gold' if i % 3 else 'green'))
    with ThreadPoolExecutor(8) as pool: responses = list(pool.map(predict, range(n)))
    return [response.json() for response in responses if response.status_code == 200]

def ids_of(answers) -> set: return {answer['id'] for answer in answers}

# -- The log of predictions

def test_every_prediction_and_its_feedback_is_in_the_database_after_sigterm(tmp_path):
    s = settings(home=tmp_path)
    publish_example(s)
    with serving(s, token=TOKEN) as (process, client):
        answers = predict_many(client, 120)
        for i, answer in enumerate(answers[:10]):
            label = answer['prediction'] if i else 'neither'
            response = client.post('/feedback', json=dict(id=answer['id'], label=label), headers=AUTHORIZED)
            assert response.status_code == 202
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    rows = {row['id']: row for row in logged_rows(s)}
    assert len(answers) == 120
    assert set(rows) == ids_of(answers)
    assert not waiting_files(spool_folder(s))
    for answer in answers:
        row = rows[answer['id']]
        assert row['prediction'] == answer['prediction']
        assert (row['version'], row['variant'], row['model']) == ('1', 'champion', 'plants')
        difference = row['timestamp'].replace(tzinfo=timezone.utc) - datetime.fromisoformat(answer['timestamp'])
        assert abs(difference) < timedelta(seconds=1)
    assert len({row['input'] for row in rows.values()}) == 2
    assert all(0 < row['seconds'] < 5 for row in rows.values())
    engine = open_prediction_log(s)
    assert count_correct(engine) == [dict(version='1', variant='champion', n=10, right=9)]
    engine.dispose()

def test_predictions_of_a_killed_server_are_loaded_by_the_next_one(tmp_path):
    s = settings(home=tmp_path)
    publish_example(s)
    with serving(s, catalog_url='postgresql+psycopg://user@127.0.0.1:9/none') as (process, client):
        answers = predict_many(client, 40)
        wait_for(lambda: waiting_files(spool_folder(s)))
        time.sleep(1.5)
        process.kill()
        process.wait()
    assert not logged_rows(s)
    with load_in_background(s): wait_for(lambda: not waiting_files(spool_folder(s)))
    assert ids_of(logged_rows(s)) == ids_of(answers)

@pytest.fixture
def database():
    "A PostgreSQL that may be stopped and started."
    with start_postgres() as server:
        server.url = server.get_uri().replace('postgresql://', 'postgresql+psycopg://')
        yield server

def test_no_prediction_is_lost_while_the_database_is_stopped_under_load(database, tmp_path):
    s = settings(home=tmp_path, catalog_url=database.url)
    publish_example(s)
    with serving(s, catalog_url=database.url) as (process, client):
        answers = predict_many(client, 40)
        wait_for(lambda: len(logged_rows(s)) == 40)
        database.stop()
        start = time.monotonic()
        while time.monotonic() - start < 6:
            new_answers = predict_many(client, 40)
            assert len(new_answers) == 40
            answers += new_answers
        assert waiting_files(spool_folder(s))
        assert metric(client.get('/metrics').text, 'plant_log_dropped_total') == 0
        database.start()
        wait_for(lambda: ids_of(logged_rows(s)) == ids_of(answers), 60)
    assert not waiting_files(spool_folder(s))
    assert 'Predictions wait' in ''.join(process.log_lines)

@pytest.mark.parametrize('kind', ['sqlite', 'postgres', 'mariadb'])
def test_a_spool_file_that_is_loaded_twice_makes_each_row_once(kind, request, tmp_path):
    kw = {} if kind == 'sqlite' else dict(catalog_url=request.getfixturevalue(kind))
    s, folder = settings(home=tmp_path, **kw), tmp_path/'spool'
    spool = Spool(folder)
    for i in range(3):
        spool.add('predictions', id=f'p{i}', timestamp=datetime(2026, 5, 1, tzinfo=timezone.utc), model='m',
                  version='1', variant='champion', input='0'*64, prediction='Löwenzahn', probability=.9, novelty=None,
                  novel=False, seconds=.1)
    spool.add('feedback', id='f', prediction_id='p1', timestamp=datetime.now(timezone.utc), label='Löwenzahn')
    spool.flush()
    data = waiting_files(folder)[0].read_bytes()
    engine = open_prediction_log(s)
    assert load_log_files(engine, folder) == 4
    (folder/'01-1-x.jsonl').write_bytes(data)
    load_log_files(engine, folder)
    engine.dispose()
    assert [row['prediction'] for row in logged_rows(s)] == ['Löwenzahn'] * 3
    assert len(logged_rows(s, feedback)) == 1

def test_a_spool_file_that_the_database_refuses_is_renamed_and_logged(tmp_path, caplog):
    s, folder = settings(home=tmp_path), tmp_path/'spool'
    folder.mkdir()
    row = dict(kind='predictions', id='a', timestamp='2026-05-01T00:00:00', model=None)
    (folder/'01-1-x.jsonl').write_text(json.dumps(row) + '\n')
    engine = open_prediction_log(s)
    assert load_log_files(engine, folder) == 0
    engine.dispose()
    assert not waiting_files(folder)
    assert [path.name for path in folder.iterdir()] == ['01-1-x.jsonl.refused']
    assert 'cannot be inserted' in caplog.text

def test_predictions_that_cannot_be_written_are_counted(model, tmp_path):
    (tmp_path/'home').mkdir()
    (tmp_path/'home/log').write_text('a file where a folder should be')
    with TestClient(create_app(settings(home=tmp_path/'home', sample_every=1000), model)) as client:
        for _ in range(5): assert post_photo(client).status_code == 200
        # five predictions, and a sample
        wait_for(lambda: metric(client.get('/metrics').text, 'plant_log_dropped_total') == 6, 10)

# -- Metrics

def test_metrics_count_predictions_requests_and_stages(model, tmp_path):
    with TestClient(create_app(settings(home=tmp_path, token=TOKEN), model)) as client:
        for name in ('gold', 'gold', 'green'): post_photo(client, photo_bytes(name))
        post_photo(client, HTML)
        client.post('/predict/batch', files=[('files', photo_bytes('gold'))] * 4)
        client.get('/predict/demo')
        for path in ('/nowhere', '/nowhere/else', '/predict'): client.get(path)
        text = client.get('/metrics').text
    assert metric(text, 'plant_predictions_total', prediction='dandelion', version='1') == 6
    assert metric(text, 'plant_predictions_total') == 7
    assert metric(text, 'plant_requests_total', route='/predict', status='200') == 3
    assert metric(text, 'plant_requests_total', route='/predict', status='415') == 1
    assert metric(text, 'plant_requests_total', route='other', status='404') == 2, 'unknown paths make no labels'
    for stage in ('decode', 'infer'): assert metric(text, 'plant_stage_seconds_count', stage=stage) == 8
    assert metric(text, 'plant_serving', version='1') == 1
    assert metric(text, 'plant_model_error') == 0

def test_metrics_show_that_a_model_cannot_be_loaded(tmp_path):
    s = settings(home=tmp_path, token=TOKEN)
    publish_example(s, '1')
    with TestClient(create_app(s)) as client:
        def metrics_after_reload():
            client.post('/reload', headers=AUTHORIZED)
            return client.get('/metrics').text
        publish_example(s, '2', data=b'not a model')
        text = metrics_after_reload()
        assert metric(text, 'plant_model_error') == 1
        assert metric(text, 'plant_serving', version='1') == 1
        publish_example(s, '3')
        text = metrics_after_reload()
        assert metric(text, 'plant_model_error') == 0
        assert metric(text, 'plant_serving', version='1') == 0
        assert metric(text, 'plant_serving', version='3') == 1

# -- Requests

def test_requests_beyond_the_queue_get_429(tmp_path):
    go, model = threading.Event(), Model(example_model())
    run = model.run
    def run_when_allowed(batch):
        go.wait(10)
        return run(batch)
    model.run = run_when_allowed
    with running(create_app(settings(home=tmp_path, queue=3), model)) as client, ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(post_photo, client) for _ in range(3)]
        wait_for(lambda: metric(client.get('/metrics').text, 'plant_in_flight') >= 4)
        refused = post_photo(client)
        assert refused.status_code == 429
        assert refused.headers['retry-after'] == '1'
        assert refused.headers['content-type'] == 'application/problem+json'
        assert client.post('/predict/batch', files={'files': photo_bytes()}).status_code == 429
        assert client.get('/health').status_code == 200
        go.set()
        assert [future.result().status_code for future in waiting] == [200] * 3
        assert post_photo(client).status_code == 200
        assert metric(client.get('/metrics').text, 'plant_refused_total') == 2

def test_every_response_has_a_request_id_and_security_headers(model, tmp_path):
    app = create_app(settings(home=tmp_path), model)
    app.add_api_route('/boom', lambda: 1 / 0)
    with TestClient(app, raise_server_exceptions=False) as client:
        for response in (client.get('/'), client.get('/nowhere'), post_photo(client), client.post('/predict')):
            assert len(response.headers['x-request-id']) == 32
            assert response.headers['x-content-type-options'] == 'nosniff'
        failure = client.get('/boom', headers={'X-Request-ID': 'mine'})
        assert failure.headers['x-request-id'] == 'mine'
        assert failure.headers['x-content-type-options'] == 'nosniff'
        assert client.get('/health', headers={'X-Request-ID': 'a b'}).headers['x-request-id'] != 'a b'

def test_only_configured_origins_get_cors_headers(model, tmp_path):
    def allowed_origin(client, origin):
        response = client.get('/health', headers={'Origin': origin})
        return response.headers.get('access-control-allow-origin')
    with TestClient(create_app(settings(home=tmp_path), model)) as client:
        assert allowed_origin(client, 'https://a.example') is None
    with TestClient(create_app(settings(home=tmp_path, cors_origins='https://a.example'), model)) as client:
        assert allowed_origin(client, 'https://a.example') == 'https://a.example'
        assert allowed_origin(client, 'https://b.example') is None

def read_log(process) -> list:
    "Stop a server; returns the lines of its log."
    stop(process)
    time.sleep(.2)
    return process.log_lines

def test_the_log_is_json_and_each_line_has_its_request(tmp_path):
    s = settings(home=tmp_path)
    publish_example(s)
    with serving(s) as (process, client):
        post_photo(client, headers={'X-Request-ID': 'one'})
        post_photo(client, HTML, headers={'X-Request-ID': 'two'})
        entries = map(json.loads, read_log(process))
    entries = {entry['request_id']: entry for entry in entries if entry.get('request_id')}
    one, two = entries['one'], entries['two']
    assert (one['status'], one['path'], two['status']) == (200, '/predict', 415)
    assert one['ms'] > 0

def test_a_request_cannot_forge_log_lines(tmp_path):
    s = settings(home=tmp_path)
    publish_example(s)
    with serving(s, log_format='text') as (process, client):
        client.get('/a%0a12:00:00 INFO    forged%1b[31m')
        lines = read_log(process)
    assert any('%0A' in line for line in lines)
    assert not any(line.startswith('12:00:00 INFO    forged') for line in lines)
    assert not any('\x1b' in line for line in lines)

def test_a_slow_upload_gets_408_and_frees_its_place_in_the_queue(model, tmp_path):
    with running(create_app(settings(home=tmp_path, queue=1, upload_timeout=.5), model)) as client:
        with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
            connection.sendall(b'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\nabc')
            wait_for(lambda: post_photo(client).status_code == 429)
            assert b' 408 ' in connection.recv(1000)
        assert post_photo(client).status_code == 200

# -- Feedback

def test_the_body_of_feedback_without_a_token_is_not_read(model, tmp_path):
    large = bytes(5_000_000)
    with TestClient(create_app(settings(home=tmp_path, token=TOKEN), model)) as client:
        assert client.post('/feedback', content=large).status_code == 401
        assert client.post('/feedback', content=large, headers=AUTHORIZED).status_code == 413

PREDICTION_ID = '0b0c1c9e-6f6b-4b39-8d0a-0f7b3f0c2a11'

@pytest.mark.parametrize('body,status', [
    (dict(id='no-id', label='grass'), 422),
    (dict(id=PREDICTION_ID, label='moss'), 422),
    (dict(label='grass'), 422),
    ([], 422),
    (dict(id=PREDICTION_ID, label='neither'), 202)])
def test_feedback_needs_a_token_a_log_and_a_valid_body(model, tmp_path, body, status):
    def feedback_status(body, headers=AUTHORIZED, **kw):
        with TestClient(create_app(settings(home=tmp_path, **kw), model)) as client:
            return client.post('/feedback', json=body, headers=headers).status_code
    assert feedback_status(body, token=TOKEN) == status
    assert feedback_status(dict(id=PREDICTION_ID, label='grass'), headers=None, token=TOKEN) == 401
    assert feedback_status(body) == 403
    assert feedback_status(body, token=TOKEN, log_predictions=False) in (422, 503)
