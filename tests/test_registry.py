"The registry against a real MLflow server, a real S3, killed promotions and promotions at the same time."
import contextlib, errno, json, multiprocessing, os, random, re, shutil, signal, sqlite3, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np, onnx, pandas as pd
import pytest
from helpers import free_port, missing, serve_site, wait_for
from plant_mlops.core.config import PlantError, settings
from plant_mlops.core.store import FolderStore, open_store
from plant_mlops.core.workload import Reader, workloads
from plant_mlops.registry import evaluate, registry, release
from plant_mlops.registry.model_file import linear_model, read_metadata
from plant_mlops.registry.tracking import experiment_id, mlflow_client
from plant_mlops.registry.tracking_errors import restore_command

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

def pointer(s): return json.loads(open_store(s).get(f'models/{s.model}/champion.json'))

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

server_folders = {} # URL of a server → its folder

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
    server_folders[url] = folder
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
    assert x.dtype == np.uint8 and np.array_equal(x, np.stack([to_pixels(j, 96, prepared_side=128) for j in jpegs]))

# -- Homes that were moved, and objects that were deleted in MLflow

def snapshot(folder) -> dict:
    "Path, time and content of every file and folder."
    paths = sorted(folder.rglob('*'))
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b'') for path in paths}

def locations(database) -> set:
    "Every location in MLflow's database."
    columns = dict(experiments='artifact_location', runs='artifact_uri', logged_models='artifact_location',
                   model_versions='source')
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = [connection.execute(f'SELECT {column} FROM {table}').fetchall() for table, column in columns.items()]
    found = {location for table in rows for location, in table}
    return {location for location in found if not location.endswith('/mlruns/0')} # that of MLflow's own experiment

@pytest.fixture
def home(template, tmp_path):
    "A home of its own with the three versions, of which only the first one is promoted and evaluated."
    s = settings(home=tmp_path/'old home')
    shutil.copytree(template.home, s.home)
    for folder in (s.home/'store', *s.home.glob('mlartifacts/*/artifacts/evaluation')):
        shutil.rmtree(folder, ignore_errors=True)
    with mlflow_client(s) as c:
        for v in c.search_model_versions("name = 'plants'"):
            for k in v.tags:
                if k.startswith('champion/') or k == 'metrics': c.delete_model_version_tag('plants', v.version, k)
        with contextlib.suppress(Exception): c.delete_registered_model_alias('plants', 'champion')
    release.promote(s, 1)
    return s

def work(s, path):
    "Evaluate, gate, promote and roll back; a new run with files, and a new version."
    evaluate.evaluate(s, 1)
    assert release.promote(s, 2)['promoted'] and not release.promote(s, 3)['promoted']
    consistent(s, '2')
    assert release.rollback(s)['version'] == '1'
    run = new_run(s)
    with mlflow_client(s) as c: c.log_text(run, 'hello', 'notes/a.txt')
    assert (s.home/f'mlartifacts/{run}/artifacts/notes/a.txt').read_text() == 'hello'
    version = registry.register(s, run, model_file(path/'m.onnx'))
    assert registry.model_bytes(s, version)

@pytest.mark.parametrize('way', ['moved', 'copied'])
def test_a_home_that_was_moved_or_copied_finds_and_writes_its_files_below_itself(home, tmp_path, way, caplog):
    "Also where the old folder is still there: nothing is read from it, and nothing is written to it."
    new = settings(home=tmp_path/'Gärten #2'/'home')
    new.home.parent.mkdir()
    if way == 'moved': home.home.rename(new.home)
    else:
        shutil.copytree(home.home, new.home)
        for file in home.home.rglob('*.onnx'): file.write_bytes(b'old') # reading it would fail
        before = snapshot(home.home)
    work(new, tmp_path)
    assert all(location.startswith(new.home.as_uri()) for location in locations(new.home/'mlflow.db')), locations(new.home/'mlflow.db')
    assert len([r for r in caplog.records if 'was moved, copied or mounted elsewhere' in r.message]) == 1
    if way == 'moved': assert not home.home.exists()
    else:
        assert snapshot(home.home) == before
        release.history(home) # the old home opens its own files again
        assert all(location.startswith(home.home.as_uri()) for location in locations(home.home/'mlflow.db'))

def test_a_database_that_two_homes_share_keeps_their_files_where_they_are_until_one_is_moved(home, tmp_path):
    shared = f'sqlite:///{tmp_path}/shared.db'
    shutil.copy(home.home/'mlflow.db', tmp_path/'shared.db')
    other = settings(home=tmp_path/'other', tracking_uri=shared)
    (other.home/'mlartifacts').mkdir(parents=True)
    assert registry.model_bytes(other, 2)
    assert all(location.startswith(home.home.as_uri()) for location in locations(tmp_path/'shared.db'))
    moved = settings(home=home.home.rename(tmp_path/'moved'), tracking_uri=shared)
    assert registry.model_bytes(moved, 2)
    assert all(location.startswith(moved.home.as_uri()) for location in locations(tmp_path/'shared.db'))

def test_mlflow_itself_finds_the_files_of_a_moved_home(home, tmp_path):
    "As its page does, which knows nothing of this package."
    new = settings(home=tmp_path/'new')
    home.home.rename(new.home)
    release.history(new)
    code = ('import mlflow, sys; mlflow.set_tracking_uri(sys.argv[1]); '
            'print(mlflow.artifacts.download_artifacts("models:/plants/1"))')
    result = subprocess.run([sys.executable, '-c', code, new.tracking_uri], capture_output=True, text=True, cwd=tmp_path)
    folder = Path(result.stdout.strip())
    assert folder.is_relative_to(new.home) and (folder/'model.onnx').exists(), result.stderr

def test_a_home_that_another_process_opened_at_another_path_is_not_written_to_there(home, tmp_path):
    "A container relocates the database while a run on the host goes on: its files stay in the host's home."
    run = new_run(home)
    with mlflow_client(home) as c:
        with contextlib.closing(sqlite3.connect(home.home/'mlflow.db')) as connection, connection:
            for table, column in (('experiments', 'artifact_location'), ('runs', 'artifact_uri')):
                connection.execute(f'UPDATE {table} SET {column} = replace({column}, ?, ?)',
                                   (home.home.as_uri(), (tmp_path/'container').as_uri()))
        c.log_text(run, 'hello', 'a.txt')
    assert (home.home/f'mlartifacts/{run}/artifacts/a.txt').exists() and not (tmp_path/'container').exists()

def test_a_moved_home_that_is_read_only_can_be_evaluated_and_read(home, tmp_path):
    metrics = evaluate.evaluate(home, 1)
    mounted = tmp_path/'mounted'
    mounted.mkdir()
    bind = subprocess.run(['mount', '--bind', home.home, mounted], capture_output=True)
    if bind.returncode: missing('root', 'to mount a folder read-only')
    try:
        subprocess.run(['mount', '-o', 'remount,ro,bind', mounted], check=True)
        hidden = home.home.rename(tmp_path/'hidden')
        s = settings(home=mounted)
        assert evaluate.evaluate(s, 1) == metrics
        assert registry.model_bytes(s, 2) and release.history(s)[0]['version'] == '1'
        with pytest.raises(PlantError, match='write permission|[Rr]ead-only'): release.promote(s, 2, force=True)
        hidden.rename(home.home)
    finally: subprocess.run(['umount', '-l', mounted], check=True)

@pytest.fixture(params=['local', 'server'])
def deletable(request, home, tmp_path):
    "Three versions, the first one in production, in SQLite or with a real MLflow server."
    if request.param == 'local': return home
    s = settings(home=tmp_path/'remote', tracking_uri=request.getfixturevalue('server'), model=f'm{os.urandom(4).hex()}')
    s.home.mkdir()
    run = new_run(s)
    for w in (good, good*1.1, -good): registry.register(s, run, model_file(s.home/'m.onnx', w))
    release.promote(s, 1)
    return s

def run_mlflow(s, message) -> subprocess.CompletedProcess:
    "Run the command of MLflow that a message gives in backticks."
    command = re.search('`(MLFLOW_TRACKING_URI=[^`]+)`', message)[1]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    return subprocess.run(['bash', '-c', command], capture_output=True, text=True, env=os.environ | dict(PATH=path))

def test_the_error_of_a_deleted_experiment_names_the_command_that_restores_it(deletable):
    s = deletable
    with mlflow_client(s) as c:
        deleted = experiment_id(c, s)
        c.delete_experiment(deleted)
    with pytest.raises(PlantError, match='deleted') as e: new_run(s)
    assert 'again' not in str(e.value) and f'MLFLOW_TRACKING_URI={s.tracking_uri}' in str(e.value).replace("'", '')
    assert release.promote(s, 2)['promoted'] # it needs no new run
    assert [v['version'] for v in registry.versions(s)] == ['3', '2', '1']
    if s.tracking_uri.startswith('sqlite:'): assert run_mlflow(s, str(e.value)).returncode == 0
    else:
        assert f'restore --experiment-id {deleted}`' in str(e.value)
        with mlflow_client(s) as c: c.restore_experiment(deleted)
    assert new_run(s)

def test_a_version_whose_run_was_deleted_is_evaluated_and_promoted(home, caplog):
    s = home
    with mlflow_client(s) as c: c.delete_run(registry.versions(s)[0]['run_id'])
    assert release.promote(s, 2)['promoted']
    consistent(s, '2')
    assert 'run of version 2 was deleted' in caplog.text and 'mlflow runs restore --run-id' in caplog.text
    with mlflow_client(s) as c: c.restore_run(registry.versions(s)[0]['run_id'])
    evaluate.evaluate(s, 3)
    with mlflow_client(s) as c: assert 'test_accuracy' in c.get_run(registry.versions(s)[0]['run_id']).data.metrics

def test_a_version_whose_run_was_deleted_for_good_is_evaluated_and_promoted(home, caplog):
    "By `mlflow gc`."
    run_id = registry.versions(home)[0]['run_id']
    with mlflow_client(home) as c:
        c.delete_run(run_id)
        c._tracking_client.store._hard_delete_run(run_id)
    assert release.promote(home, 2)['promoted'] and registry.find_trained(home, 'd', {}) is None
    consistent(home, '2')

def test_a_deleted_alias_is_logged_and_does_not_weaken_the_gate(home, caplog):
    "The candidate is compared with what is in production, and `promote` puts the alias back."
    s = home
    with mlflow_client(s) as c: c.delete_registered_model_alias(s.model, 'champion')
    outcome = release.promote(s, 3)
    assert not outcome['promoted'] and outcome['gate']['champion'] == outcome['previous'] == '1'
    assert 'plant-mlops promote --version 1' in caplog.text
    with pytest.raises(PlantError, match='alias'): release.challenge(s, 2)
    assert release.promote(s, 1)['promoted']
    assert alias(s) == '1'

def test_an_alias_that_names_an_unfinished_version_is_logged_as_such(home, caplog):
    with mlflow_client(home) as c:
        unfinished = c.create_model_version('plants', 'file:///nowhere', registry.versions(home)[0]['run_id']).version
        c.set_registered_model_alias('plants', 'champion', unfinished)
    release.sync_champion(home)
    assert f'names version {unfinished}, whose registration never finished' in caplog.text and 'removed' not in caplog.text

def test_a_champion_whose_version_was_deleted_stays_what_candidates_are_compared_with(home, caplog):
    s = home
    release.promote(s, 2)
    with mlflow_client(s) as c: c.delete_model_version(s.model, '2')
    outcome = release.promote(s, 3)
    assert not outcome['promoted'] and outcome['gate']['champion'] == '2' and 'deleted in MLflow' in caplog.text
    with pytest.raises(PlantError, match='Version 2 .* was deleted in MLflow'): evaluate.evaluate(s, 2)
    assert release.rollback(s) == dict(version='1', previous='2', reason='rolled back from version 2')
    consistent(s, '1')

def test_a_rollback_says_that_the_previous_champion_was_deleted(home):
    release.promote(home, 2, force=True)
    release.promote(home, 3, force=True)
    with mlflow_client(home) as c: c.delete_model_version('plants', '2')
    result = release.rollback(home)
    assert result['version'] == '1' and 'version 2, the champion before, was deleted' in result['reason']
    consistent(home, '1')

def test_a_deleted_or_renamed_registered_model_is_in_the_error_and_a_new_version_is_compared_with_production(home, tmp_path):
    s = home
    with mlflow_client(s) as c: c.rename_registered_model(s.model, f'{s.model}-old')
    for f in (evaluate.evaluate, release.promote):
        with pytest.raises(PlantError, match=f'renamed to .*PLANT_MODEL={s.model}-old'): f(s)
    with mlflow_client(s) as c: c.delete_registered_model(f'{s.model}-old')
    with pytest.raises(PlantError, match='version 1 is in production.*deleted'): release.promote(s)
    assert 'MLflow has no history' in release.describe_no_history(s) and 'another MLflow' in release.describe_no_history(s)
    bad, fine = (registry.register(s, new_run(s), model_file(tmp_path/'m.onnx', w)) for w in (-good, good*1.2))
    outcome = release.promote(s, bad)
    assert not outcome['promoted'] and 'worse than the champion' in outcome['reason']
    assert release.promote(s, fine)['promoted']
    assert alias(s) == fine

def test_a_version_whose_logged_model_was_deleted_is_evaluated(home):
    s = home
    with mlflow_client(s) as c:
        source = c.get_model_version(s.model, '2').source
        c.delete_logged_model(re.search('m-[0-9a-f]{32}', source)[0])
    assert evaluate.evaluate(s, 2)['n'] == 40 and release.promote(s, 2)['promoted']

def test_an_archived_version_is_not_the_newest(home):
    import warnings
    with mlflow_client(home) as c, warnings.catch_warnings(action='ignore'):
        c.transition_model_version_stage('plants', '3', 'Archived')
    assert evaluate.evaluate(home)['version'] == '2' and evaluate.evaluate(home, 3)['version'] == '3'
    assert registry.find_trained(home, 'd', {}) == '2' # a training that only an archived version has is done again

def test_a_model_file_that_was_deleted_is_taken_from_the_store_or_is_in_the_error(deletable, caplog, server):
    s = deletable
    folder = s.home/'mlartifacts'
    if s.tracking_uri == server:
        with mlflow_client(s) as c: source = c.get_model_version(s.model, '1').source
        folder = server_folders[server]/'artifacts'/source.removeprefix('mlflow-artifacts:/').split('/')[0]
    for file in folder.rglob('model.onnx'): file.unlink()
    assert registry.model_bytes(s, 1) == open_store(s).get(pointer(s)['key'])
    assert 'version 1' in caplog.text and 'The copy in the store is used' in caplog.text
    with pytest.raises(PlantError, match='file of version 2 .* was deleted from MLflow'): evaluate.evaluate(s, 2)
    shutil.rmtree(folder)
    evaluate.evaluate(s, 1) # its predictions are computed again

def test_the_dashboard_lists_versions_whose_runs_were_deleted(home):
    from plant_mlops.apps.models import list_training_runs, view_models
    with mlflow_client(home) as c: c.delete_experiment(experiment_id(c, home))
    assert {run.version for run in list_training_runs(home)} == {'3', '2', '1'}
    assert len(list(view_models(home))) > 2
    with mlflow_client(home) as c: c.delete_registered_model('plants')
    with pytest.raises(PlantError, match='mlflow experiments restore --experiment-id'): list_training_runs(home)

def test_the_advice_of_an_error_of_mlflow_fits_its_cause(tmp_path, monkeypatch):
    "Only where MLflow cannot be reached does it help to run the same command again."
    monkeypatch.setenv('MLFLOW_HTTP_REQUEST_MAX_RETRIES', '0')
    def error(**kw) -> str:
        with pytest.raises(PlantError) as e: registry.versions(settings(home=tmp_path, **kw))
        return str(e.value)
    assert 'run again' in error(tracking_uri=f'http://127.0.0.1:{free_port()}')
    for status, advice in ((401, 'MLFLOW_TRACKING_USERNAME'), (403, 'MLFLOW_TRACKING_USERNAME'), (503, 'run again'),
                           (500, 'log of the server'), (404, 'not the address of an MLflow server')):
        with serve_site() as site: # as a proxy in front of MLflow
            site.pages = SimpleNamespace(get=lambda path, missing: (status, {}, b''))
            message = error(tracking_uri='http://{}:{}'.format(*site.server_address))
        assert advice in message and ('run again' in message) == (status == 503) and '…' not in message, message
    (tmp_path/'mlflow.db').write_bytes(b'no database ' * 1000)
    message = error()
    assert 'back-up' in message and 'again' not in message

def test_the_advice_of_an_error_of_sqlite_fits_its_cause(template, tmp_path):
    file = tmp_path/'mlflow.db'
    shutil.copy(template.home/'mlflow.db', file)
    s = settings(home=tmp_path, tracking_uri=f'sqlite:///{file}?timeout=0.1')
    with contextlib.closing(sqlite3.connect(file)) as connection:
        with pytest.raises(PlantError, match='is locked.*Another program'), mlflow_client(s) as c:
            connection.execute('BEGIN EXCLUSIVE')
            c.search_model_versions()
        connection.rollback()
        with pytest.raises(PlantError, match='no such table.*incomplete') as e, mlflow_client(s) as c:
            c.search_model_versions()
            connection.execute('DROP TABLE model_versions')
            c.search_model_versions()
        assert 'again' not in str(e.value)
    with pytest.raises(PlantError, match='incomplete'): registry.versions(settings(home=tmp_path))

def test_a_server_of_mlflow_2_is_to_be_upgraded(tmp_path):
    with serve_site() as site:
        site.pages = SimpleNamespace(get=lambda path, missing: (404, {}, b''))
        s = settings(home=tmp_path, tracking_uri='http://{}:{}'.format(*site.server_address))
        with pytest.raises(PlantError, match='older than MLflow 3'), mlflow_client(s) as c: c.get_logged_model('m-1')

def test_a_database_of_another_version_of_mlflow_is_to_be_upgraded_or_needs_that_version(template, tmp_path):
    shutil.copy(template.home/'mlflow.db', tmp_path/'mlflow.db')
    s = settings(home=tmp_path)
    for revision, advice in (('0584bdc529eb', f'`mlflow db upgrade {s.tracking_uri}`'), ('ffffffffffff', 'newer MLflow')):
        with contextlib.closing(sqlite3.connect(tmp_path/'mlflow.db')) as connection, connection:
            connection.execute('UPDATE alembic_version SET version_num = ?', [revision])
        with pytest.raises(PlantError) as e: registry.versions(s)
        assert advice in str(e.value) and 'log of that server' not in str(e.value) and 'datab.' not in str(e.value)

@pytest.mark.parametrize('password', ['p/w', 'pa@ss', 'p:w', '/@/', '12/'])
def test_no_password_is_in_an_error_or_a_command(tmp_path, monkeypatch, password):
    monkeypatch.setenv('MLFLOW_HTTP_REQUEST_MAX_RETRIES', '0')
    s = settings(home=tmp_path, tracking_uri=f'http://me:{password}secret@127.0.0.1:{free_port()}')
    with pytest.raises(PlantError, match='MLFLOW_TRACKING_URI') as e: registry.versions(s)
    assert 'secret' not in str(e.value) and f'me:{password}' not in str(e.value) and '127.0.0.1' in str(e.value)
    command = restore_command(s, 'runs', 'r1')
    assert 'secret' not in command and '*' not in command
    assert 'MLFLOW_TRACKING_USERNAME=me MLFLOW_TRACKING_PASSWORD=PASSWORD mlflow runs restore --run-id r1' in command

def test_only_errors_of_mlflow_are_attributed_to_it(template, tmp_path):
    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import OperationalError
    with pytest.raises(OperationalError, match='no such table: photos'), mlflow_client(template):
        create_engine('sqlite://').connect().execute(text('SELECT * FROM photos'))
    photo = tmp_path/'a.jpg'
    with pytest.raises(PlantError, match='permission') as e, mlflow_client(template):
        raise PermissionError(errno.EACCES, 'Permission denied', str(photo))
    assert str(photo) in str(e.value) and 'MLflow' not in str(e.value)
    with pytest.raises(PlantError, match='MLflow at .* failed'), mlflow_client(template) as c: c.get_run('f'*32)

def test_two_first_trainings_at_once_share_one_experiment(template, monkeypatch):
    "The other process creates the experiment after this one has looked for it."
    from mlflow import MlflowClient
    create = MlflowClient.create_experiment
    others = []
    def create_late(*args, **kw):
        others.append(create(*args, **kw))
        return create(*args, **kw)
    monkeypatch.setattr(MlflowClient, 'create_experiment', create_late)
    s = settings(home=template.home, model='first')
    with mlflow_client(s) as c: assert [experiment_id(c, s)] == others

# -- Databases and places of files

def test_the_url_of_an_sqlite_file_may_have_options(template, tmp_path):
    for folder in ('old', 'new'): (tmp_path/folder).mkdir()
    shutil.copy(template.home/'mlflow.db', tmp_path/'old/mlflow.db')
    s = settings(home=tmp_path, tracking_uri=f'sqlite:///{tmp_path}/old/mlflow.db?timeout=30')
    assert len(registry.versions(s)) == 3
    new = settings(home=tmp_path, tracking_uri=f'sqlite:///{tmp_path}/new/mlflow.db?timeout=30')
    assert new_run(new) and {file.name for file in (tmp_path/'new').iterdir()} == {'mlflow.db', 'mlflow.db.lock'}

@pytest.mark.slow
def test_files_of_a_postgresql_database_are_stored_in_the_home(postgres, tmp_path, monkeypatch):
    from sqlalchemy import create_engine, text
    with create_engine(postgres, isolation_level='AUTOCOMMIT').connect() as connection:
        name = f'mlflow{os.urandom(4).hex()}'
        connection.execute(text(f'CREATE DATABASE {name}'))
    uri = re.sub(r'/\w+(?=\?|$)', f'/{name}', postgres, count=1)
    monkeypatch.chdir(tmp_path)
    s = settings(home=tmp_path/'home', tracking_uri=uri)
    run = new_run(s)
    with mlflow_client(s) as c: c.log_text(run, 'hello', 'a.txt')
    assert (s.home/f'mlartifacts/{run}/artifacts/a.txt').read_text() == 'hello'

def test_a_model_file_that_was_deleted_from_s3_is_taken_from_the_store(seaweedfs, tmp_path, caplog, monkeypatch):
    "The experiment has its files directly in S3."
    s = seaweedfs.settings('mlflow-files', home=tmp_path/'home')
    for variable, value in dict(MLFLOW_S3_ENDPOINT_URL=s.s3_endpoint_url, AWS_REGION='us-east-1',
                                AWS_ACCESS_KEY_ID=s.s3_access_key.get_secret_value(),
                                AWS_SECRET_ACCESS_KEY=s.s3_secret_key.get_secret_value()).items():
        monkeypatch.setenv(variable, value)
    with mlflow_client(s) as c: c.create_experiment(s.model, artifact_location=f'{s.store_url}/mlartifacts')
    run = new_run(s)
    for weights in (good, good*1.1): registry.register(s, run, model_file(tmp_path/'m.onnx', weights))
    release.promote(s, 1, force=True)
    for file in open_store(s).list('mlartifacts/'):
        if file.key.endswith('model.onnx'): open_store(s).delete(file.key)
    assert registry.model_bytes(s, 1) == open_store(s).get(pointer(s)['key'])
    assert 'The copy in the store is used' in caplog.text
    with pytest.raises(PlantError, match='file of version 2 .* was deleted from MLflow'): registry.model_bytes(s, 2)
    monkeypatch.setenv('MLFLOW_S3_ENDPOINT_URL', f'http://127.0.0.1:{free_port()}')
    monkeypatch.setenv('AWS_MAX_ATTEMPTS', '1')
    with pytest.raises(PlantError, match='MLFLOW_S3_ENDPOINT_URL'): registry.model_bytes(s, 2)

# -- A database of MLflow that is created

def test_a_process_that_is_killed_while_it_creates_the_database_leaves_none_that_cannot_be_used(tmp_path):
    code = ('import sys; from plant_mlops.core.config import settings; '
            'from plant_mlops.registry.tracking import mlflow_client\n'
            'with mlflow_client(settings(home=sys.argv[1])) as client: client.search_experiments()')
    command = [sys.executable, '-c', code, tmp_path]
    process = subprocess.Popen(command, cwd=tmp_path)
    wait_for(lambda: (tmp_path/'mlflow.db.unfinished').exists() and (tmp_path/'mlflow.db.unfinished').stat().st_size > 50_000,
             what='the tables', every=.005)
    process.kill()
    process.wait()
    assert not (tmp_path/'mlflow.db').exists()
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path/'mlflow.db').exists() and not (tmp_path/'mlflow.db.unfinished').exists()
