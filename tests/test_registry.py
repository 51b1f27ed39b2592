"The registry against a real MLflow server, a real S3, killed promotions and promotions at the same time."
import json, multiprocessing, os, random, shutil, signal, subprocess, sys
import numpy as np, onnx, pandas as pd
import pytest
from helpers import free_port, wait_for
from plant_mlops.core.config import PlantError, settings
from plant_mlops.core.store import FolderStore, open_store
from plant_mlops.core.workload import Reader, workloads
from plant_mlops.registry import evaluate, registry, release
from plant_mlops.registry.model_file import linear_model, read_metadata
from plant_mlops.registry.tracking import experiment_id, mlflow_client

names = ['dandelion', 'grass']
good = np.array([[2, -2], [0, 0]], np.float32)
key = 'models/plants/champion.json'

# Points in the plane stand in for photos; registration, evaluation and delivery are the same.
def points(): return np.random.default_rng(0).normal(size=(80, 2)).astype(np.float32)
def manifest(s, dataset):
    labels = np.where(points()[:, 0] > 0, 'dandelion', 'grass')
    return pd.DataFrame(dict(id=[str(i) for i in range(80)], label=labels, group=range(80), split=['test', 'train']*40))
def inputs(s, dataset, ids, spec): return points()[[int(i) for i in ids]]

reader = Reader(manifest, inputs)
evaluate.readers['features'] = reader # for the processes that import this file

@pytest.fixture(autouse=True)
def reader_of_points(monkeypatch): monkeypatch.setitem(evaluate.readers, 'features', reader)

def model_file(path, weights=good):
    onnx.save(linear_model(weights, names, provenance=dict(dataset='d', source='synthetic', arch='linear')), path)
    return path

def new_run(s):
    with mlflow_client(s) as c: return c.create_run(experiment_id(c, s)).info.run_id

def alias(s):
    with mlflow_client(s) as c: return str(c.get_model_version_by_alias(s.model, 'champion').version)

def pointer(s): return json.loads(open_store(s).get(key))

def consistent(s, version):
    "Alias, pointer, file and history all name this version."
    p = pointer(s)
    data = open_store(s).get(p['key'], sha256=p['sha256'])
    assert alias(s) == p['version'] == read_metadata(data)['version'] == release.history(s)[0]['version'] == version
    assert data == registry.model_bytes(s, version)

processes = multiprocessing.get_context('forkserver')
processes.set_forkserver_preload(['mlflow.onnx', 'test_registry'])

def start(f, *args):
    "A process of its own that calls a function."
    p = processes.Process(target=f, args=args)
    p.start()
    return p

@pytest.fixture(scope='module')
def template(tmp_path_factory):
    "A home with three registered versions: two good ones and a bad one, none promoted."
    s = settings(home=tmp_path_factory.mktemp('registry')/'home')
    s.home.mkdir()
    run = new_run(s)
    for w in (good, good*1.1, -good): registry.register(s, run, model_file(s.home/'m.onnx', w))
    return s

@pytest.fixture
def s(template):
    "Those three versions, first one promoted, the store empty but for it."
    s = template
    with mlflow_client(s) as c:
        for v in c.search_model_versions("name = 'plants'"):
            for k in v.tags:
                if k.startswith('champion/'): c.delete_model_version_tag('plants', v.version, k)
    shutil.rmtree(s.home/'store', ignore_errors=True)
    with mlflow_client(s) as c: c.set_registered_model_alias('plants', 'champion', '1')
    release.sync_champion(s)
    return s

@pytest.fixture(scope='module')
def server(tmp_path_factory):
    "A real MLflow server with its own database and artifacts."
    folder, port = tmp_path_factory.mktemp('mlflow'), free_port()
    env = dict(os.environ, MLFLOW_DISABLE_TELEMETRY='true', MLFLOW_SERVER_ENABLE_JOB_EXECUTION='false')
    cmd = [sys.executable, '-m', 'mlflow', 'server', '--host', '127.0.0.1', '--port', str(port), '--workers', '1',
           '--backend-store-uri', f'sqlite:///{folder}/mlflow.db', '--serve-artifacts',
           '--artifacts-destination', str(folder/'artifacts')]
    with open(folder/'log', 'wb') as log:
        p = subprocess.Popen(cmd, env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    import httpx
    url = f'http://127.0.0.1:{port}'
    try:
        wait_for(lambda: httpx.get(f'{url}/health', timeout=2).status_code == 200 and p.poll() is None, 120, 'MLflow')
        yield url
    finally:
        os.killpg(p.pid, signal.SIGTERM)
        try: p.wait(3)
        except subprocess.TimeoutExpired:
            os.killpg(p.pid, signal.SIGKILL)
            p.wait()

def check_life_cycle(s, tmp_path):
    "Register three versions, promote two (the gate rejects the third), and roll back; returns the second."
    run = new_run(s)
    a, b, bad = (registry.register(s, run, model_file(tmp_path/'m.onnx', w)) for w in (good, good*1.1, -good))
    assert release.promote(s, a)['reason'].startswith('first model')
    assert not release.promote(s, bad)['promoted']
    consistent(s, a)
    outcome = release.promote(s, b)
    gate = outcome.pop('gate')
    assert (gate['passed'], gate['champion'], gate['n'], gate['left_out'], gate['lost']) == (True, a, 40, 0, 0)
    assert outcome.pop('reason') == gate['reason'] and 'not worse' in gate['reason']
    assert outcome == dict(promoted=True, version=b, previous=a)
    consistent(s, b)
    assert release.rollback(s)['version'] == a
    consistent(s, a)
    assert [h['version'] for h in release.history(s)] == [a, b, a]
    return b

def test_versions_are_promoted_and_rolled_back_with_a_real_mlflow_server(server, tmp_path):
    "The whole life of three versions, artifacts over HTTP; MLflow serves the file with its signature."
    s = settings(home=tmp_path/'home', tracking_uri=server)
    b = check_life_cycle(s, tmp_path)
    import mlflow
    mlflow.set_tracking_uri(server)
    try:
        m = mlflow.pyfunc.load_model(f'models:/plants/{b}')
        assert [i.name for i in m.metadata.signature.inputs] == ['features']
        assert np.allclose(m.predict(points())['probabilities'].sum(1), 1)
    finally: mlflow.set_tracking_uri(None)
    assert not (s.home/'mlflow.db').exists()

def test_promotion_and_sync_work_with_s3(seaweedfs, template, tmp_path):
    "Delivery to S3, with its conditional put."
    s = seaweedfs.settings('registry', home=template.home, tracking_uri=template.tracking_uri)
    release.promote(s, 1, force=True)
    release.promote(s, 2, force=True)
    consistent(s, '2')
    open_store(s).delete(key)
    release.sync_champion(s)
    consistent(s, '2')

def die(*a): os.kill(os.getpid(), signal.SIGKILL)

def promote_and_die(home, where):
    "Promote version 2, killed at one point on the way."
    put, sync, upload = FolderStore.put, release.sync_champion, release._upload_to_store
    def at_pointer(self, k, *a, **kw):
        if k == key and where == 'before_the_pointer': die()
        put(self, k, *a, **kw)
        if k == key: die()
    def at_upload(s, store, v): return die() if str(v.version) == '2' else upload(s, store, v)
    def at_sync(s, reason=''): return die() if reason else sync(s)
    if where == 'before_the_alias': release._upload_to_store = at_upload
    elif where == 'after_the_alias': release.sync_champion = at_sync
    else: FolderStore.put = at_pointer
    release.promote(settings(home=home), 2)

@pytest.mark.parametrize('where', ['before_the_alias', 'after_the_alias', 'before_the_pointer', 'after_the_pointer'])
def test_a_killed_promotion_is_completed_by_the_next_command(s, where):
    "SIGKILL between the steps: what is served stays whole, and the next command finishes the rest."
    p = start(promote_and_die, s.home, where)
    p.join(120)
    assert p.exitcode == -signal.SIGKILL
    served = pointer(s)
    open_store(s).get(served['key'], sha256=served['sha256'])
    assert served['version'] == ('2' if where == 'after_the_pointer' else '1')
    if where == 'before_the_alias': assert alias(s) == '1'
    else:
        release.sync_champion(s)
        consistent(s, '2')
    release.promote(s, 2)
    consistent(s, '2')
    assert [h['version'] for h in release.history(s)] == ['2', '1']
    assert release.rollback(s)['version'] == '1'
    consistent(s, '1')

def promote_often(home, i, barrier):
    rng = random.Random(i)
    barrier.wait()
    for _ in range(6): release.promote(settings(home=home), rng.choice([1, 2, 3]), force=True)

def test_concurrent_promotions_leave_alias_pointer_file_and_history_consistent(s):
    "Three processes promote random versions, six times each."
    barrier = processes.Barrier(3)
    promoters = [start(promote_often, s.home, i, barrier) for i in range(3)]
    for process in promoters:
        process.join(200)
        assert process.exitcode == 0
    consistent(s, alias(s))

def test_a_slow_promotion_does_not_undo_a_later_one(s, monkeypatch):
    "One promotion stops just before its pointer; another overtakes it; the pointer stays with the alias."
    put, overtaken = FolderStore.put, []
    def slow(self, k, *a, **kw):
        if k == key and not overtaken:
            overtaken.append(1)
            release.promote(s, 3, force=True)
        return put(self, k, *a, **kw)
    monkeypatch.setattr(FolderStore, 'put', slow)
    assert release.promote(s, 2, force=True)['promoted'] is False
    consistent(s, '3')

def test_a_second_mlflow_with_the_same_version_numbers_overwrites_no_file(s, tmp_path):
    before = pointer(s)
    other = settings(home=tmp_path/'other', store_url=s.store_url)
    other.home.mkdir()
    registry.register(other, new_run(other), model_file(tmp_path/'m.onnx', good*3))
    release.promote(other, 1, force=True)
    assert pointer(s)['sha256'] != before['sha256']
    assert open_store(s).get(before['key'], sha256=before['sha256'])

def test_a_promotion_without_the_store_is_an_error_and_changes_nothing(s):
    away = settings(home=s.home, store_url='s3://plants', s3_endpoint_url=f'http://127.0.0.1:{free_port()}',
                    s3_access_key='a', s3_secret_key='b')
    with pytest.raises(PlantError, match='run again'): release.promote(away, 2)
    consistent(s, '1')

def test_a_promotion_on_a_full_disk_is_an_error_and_sync_completes_it(s, monkeypatch):
    "The disk is full when the pointer is written; until then, the old model is served."
    from plant_mlops.core.store import StoreError
    put = FolderStore.put
    def full(self, k, *a, **kw):
        if k == key: raise StoreError('No space left on device')
        return put(self, k, *a, **kw)
    with monkeypatch.context() as m:
        m.setattr(FolderStore, 'put', full)
        with pytest.raises(PlantError, match='No space left'): release.promote(s, 2)
    assert pointer(s)['version'] == '1'
    release.sync_champion(s)
    consistent(s, '2')

def test_the_error_of_an_unreachable_mlflow_names_the_setting_and_hides_the_password(s, monkeypatch):
    monkeypatch.setenv('MLFLOW_HTTP_REQUEST_MAX_RETRIES', '0')
    away = settings(home=s.home, tracking_uri=f'http://user:secret@127.0.0.1:{free_port()}')
    for f in (release.promote, release.rollback, evaluate.evaluate, release.history, registry.champion):
        with pytest.raises(PlantError, match='MLFLOW_TRACKING_URI') as e: f(away)
        assert 'secret' not in str(e.value)

def test_evaluation_decodes_photos_exactly_as_serving_does(tmp_path):
    from plant_mlops.data.photo import to_pixels
    from plant_mlops.core.store import sha256_of
    from plant_mlops.data.synthetic import draw_jpeg
    s = settings(home=tmp_path)
    jpegs = [draw_jpeg('grass', 0, i) for i in range(3)]
    ids = [sha256_of(j) for j in jpegs]
    for i, j in zip(ids, jpegs): open_store(s).put(f'raw/{i}', j)
    spec = dict(kind='image', shape=[None, 96, 96, 3], resize=dict(side=128, size=96))
    x = workloads(s)['photos'].reader.inputs(s, '', ids, spec)
    assert x.dtype == np.uint8 and np.array_equal(x, np.stack([to_pixels(j, 96, side=128) for j in jpegs]))
