"Drift: samples of a server's inputs in every database and store, the decision, and the retraining that follows."
import base64, json, shutil
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from uuid import uuid4
import numpy as np, pandas as pd, pytest, sqlalchemy as sa
from prometheus_client import generate_latest
from helpers import input_samples, plant, plant_messages, quick_settings
from plant_mlops.core.config import PlantError, settings
from plant_mlops.core.workload import Reader, workloads
from plant_mlops.core.store import open_store
from plant_mlops.data.synthetic import HOST, LABELS, draw, draw_jpeg, serve_synthetic, synthetic_rows
from plant_mlops.registry import evaluate, registry
from plant_mlops.registry.example_model import photo_bytes, publish_example
from plant_mlops.registry.model_file import linear_model
from plant_mlops.serve.champion import NoModelError, load_champion
from plant_mlops.serve.input_statistics import once_every
from plant_mlops.serve.metrics import Metrics, set_drift_metrics
from plant_mlops.serve.prediction_log import (delete_old_samples, feedback, load_log_files, open_prediction_log,
                                              predictions, read_recent_samples, samples)
from plant_mlops.serve.prediction_spool import Spool, spool_folder, waiting_files

KEYS = ['checked_at', 'version', 'dataset', 'n', 'reference', 'score', 'threshold', 'drifted', 'enough', 'columns',
        'report']

def now(): return datetime.now(timezone.utc)

def record_samples(s, new_samples, version='1', timestamp=None):
    "Write samples to the spool, as a server does."
    spool = Spool(spool_folder(s))
    for sample in new_samples:
        spool.add('samples', id=str(uuid4()), timestamp=timestamp or now(), model=s.model, version=version, **sample)
    spool.flush()

def count_samples(s) -> int:
    engine = open_prediction_log(s)
    try:
        with engine.connect() as connection: return connection.scalar(sa.select(sa.func.count()).select_from(samples))
    finally: engine.dispose()

def ids_of(rows) -> list: return [row['id'] for row in rows]

def read_json(store, key): return json.loads(store.get(key))

def drift_reports(s) -> list:
    "Keys of all files that checks of drift have left in the store."
    return [item.key for item in open_store(s).list('models/plants/drift/')]

# -- The table of samples

def create_tables_without_samples(s):
    "The tables of an installation that is older than the table `samples`."
    from plant_mlops.data.catalog import open_catalog
    engine = open_catalog(s)
    for table in (predictions, feedback): table.create(engine)
    engine.dispose()

BAD_SAMPLE = dict(
    kind='samples', id='x', timestamp='2026-05-01T00:00:00', model='m', version='1', stats={}, embedding='?')

def test_samples_of_the_same_time_are_not_deleted_apart(tmp_path):
    s = settings(home=tmp_path)
    spool, time = Spool(spool_folder(s)), now()
    for i in range(5):
        timestamp = time - timedelta(hours=1) if i == 0 else time
        spool.add('samples', id=f's{i}', timestamp=timestamp, model='plants', version='1', stats={}, embedding=None)
    spool.flush()
    engine = open_prediction_log(s)
    assert load_log_files(engine, spool_folder(s)) == 5
    assert delete_old_samples(engine, 'plants', datetime(2000, 1, 1), 3) == 1
    left = read_recent_samples(engine, 'plants', '1', datetime(2000, 1, 1), 10)
    assert ids_of(left) == ['s1', 's2', 's3', 's4']
    engine.dispose()

@pytest.mark.parametrize('kind', ['sqlite', 'postgres', 'mariadb'])
def test_samples_are_stored_once_read_by_version_and_deleted_by_age_in_every_database(kind, request, tmp_path):
    kw = {} if kind == 'sqlite' else dict(catalog_url=request.getfixturevalue(kind))
    s = settings(home=tmp_path, **kw)
    create_tables_without_samples(s)
    embedding = np.linspace(-1, 1, 50_000).astype('<f2') # more than MySQL's BLOB would take
    encoded = base64.b64encode(embedding.tobytes()).decode()
    start, folder = now() - timedelta(days=5), spool_folder(s)
    spool = Spool(folder)
    for i in range(10):
        version, stats = '2' if i == 9 else '1', dict(brightness=i/7, größe=1.)
        spool.add('samples', id=f's{i}', timestamp=start + timedelta(days=i), model='plants', version=version,
                  stats=stats, embedding=encoded if i else None)
    spool.flush()
    data = waiting_files(folder)[0].read_bytes()
    engine = open_prediction_log(s)
    assert load_log_files(engine, folder) == 10
    (folder/'01-1-x.jsonl').write_bytes(data + json.dumps(BAD_SAMPLE).encode() + b'\n')
    load_log_files(engine, folder)

    since = start.replace(tzinfo=None)
    def read(version='1', since=since, limit=100, **kw):
        return read_recent_samples(engine, 'plants', version, since, limit, **kw)
    rows = read()
    assert ids_of(rows) == [f's{i}' for i in range(9)]
    assert rows[3]['stats'] == dict(brightness=3/7, größe=1.)
    assert rows[0]['embedding'] is None
    assert (np.frombuffer(rows[8]['embedding'], '<f2') == embedding).all()
    some = read(limit=4)
    assert len(some) == 4
    assert some == read(limit=4) != read(limit=4, seed=1)
    assert ids_of(read(since=since + timedelta(days=6, hours=1))) == ['s7', 's8']

    assert delete_old_samples(engine, 'plants', since + timedelta(days=1, hours=1), 1000) == 2
    assert delete_old_samples(engine, 'plants', since, 3) == 5
    assert delete_old_samples(engine, 'plants', since, 3) == 0
    assert ids_of(read('1') + read('2')) == ['s7', 's8', 's9']
    engine.dispose()

# -- Sampling and metrics

def test_a_sample_is_taken_at_most_once_in_an_interval():
    clock = iter(np.arange(0, 10, .01))
    is_due = once_every(1, lambda: next(clock))
    assert sum(is_due() for _ in range(1000)) == 10

def test_drift_metrics_show_the_last_check_of_the_version_that_serves():
    metrics = Metrics('plants')
    with_drift = dict(checked_at='2026-05-01T12:00:00+00:00', version='1', score=.5, drifted=True,
                      columns=dict(old=dict(score=.5, drifted=True)))
    without_score = with_drift | dict(score=None, drifted=False, columns=dict(new=dict(score=.1, drifted=False)))
    set_drift_metrics(metrics, with_drift, '1')
    set_drift_metrics(metrics, without_score, '1')
    text = generate_latest(metrics.registry).decode()
    assert 'plant_drift_score{model="plants"} NaN' in text
    assert 'plant_drift_drifted{model="plants"} 0.0' in text
    assert '{column="new",model="plants"} 0.1' in text
    assert '{column="old",model="plants"} NaN' in text
    set_drift_metrics(metrics, with_drift, '2') # another version serves
    text = generate_latest(metrics.registry).decode()
    assert 'plant_drift_score{model="plants"} NaN' in text
    assert 'plant_drift_drifted{model="plants"} 0.0' in text
    assert '{column="old",model="plants"} NaN' in text

# -- The check

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A home with a dataset of drawn photos, and a hand-made model in production."
    from plant_mlops.data.catalog import add_rows, open_catalog
    from plant_mlops.data.dataset import build_dataset
    from plant_mlops.data.ingest import ingest
    from plant_mlops.data.prepare import prepare
    s = settings(home=tmp_path_factory.mktemp('drift'))
    add_rows(open_catalog(s), synthetic_rows(140, 42))
    with serve_synthetic() as address: ingest(s, connect_to={HOST: address}, progress=False)
    prepare(s, progress=False)
    publish_example(s, dataset=build_dataset(s, progress=False))
    return s.home

@pytest.fixture
def s(home, tmp_path):
    "Settings of a copy of that home."
    shutil.copytree(home, tmp_path/'home')
    return settings(home=tmp_path/'home')

def drawn_photos(n) -> list: return [draw_jpeg(LABELS[i % 2], 7, i) for i in range(n)]

def dark_photos(n) -> list: return [photo_bytes(draw(LABELS[i % 2], (8, i)).point(lambda p: p//3)) for i in range(n)]

def test_photos_as_those_of_the_dataset_are_no_drift_and_dark_ones_are(s):
    from plant_mlops.monitor.drift import drift
    model, store = load_champion(s), open_store(s)
    record_samples(s, input_samples(model, drawn_photos(80)))
    result = drift(s)
    assert list(result) == KEYS
    assert result['enough']
    assert not result['drifted']
    assert result['score'] < .1
    assert (result['n'], result['reference'], result['version']) == (80, 42, '1')
    statistics = {'brightness', 'contrast', 'saturation', 'sharpness', 'warmth'}
    assert set(result['columns']) == statistics | {'novelty', 'embedding'}
    assert not waiting_files(spool_folder(s))
    assert count_samples(s) == 80

    record_samples(s, input_samples(model, dark_photos(60)))
    result = drift(s)
    columns = result['columns']
    assert result['drifted']
    assert .1 < result['score'] < 60/140
    assert result['score'] == max(column['score'] for column in columns.values())
    assert columns['brightness']['drifted']
    assert not columns['warmth']['drifted']
    assert read_json(store, 'models/plants/drift.json') == result
    assert read_json(store, result['report'].replace('.html', '.json')) == result
    report = store.get(result['report']).decode()
    for text in ('Drift in', 'lower\nbound', 'brightness', 'embedding 3'): assert text in report
    assert report.count('<svg') > 6
    assert abs(datetime.fromisoformat(result['checked_at']) - now()) < timedelta(minutes=5)

def test_too_few_samples_or_examples_give_no_result(s):
    from plant_mlops.monitor.drift import drift
    result = drift(s)
    assert list(result) == KEYS
    assert (result['enough'], result['n'], result['score'], result['drifted']) == (False, 0, None, False)
    assert (result['columns'], result['report']) == ({}, None)
    model = load_champion(s)
    same_photo = input_samples(model, drawn_photos(1)*50)
    other_photos = input_samples(model, drawn_photos(40))
    record_samples(s, same_photo)
    record_samples(s, other_photos, version='9')
    record_samples(s, input_samples(model, drawn_photos(40)), timestamp=now() - timedelta(days=8)) # too old
    assert drift(s)['n'] == 1
    assert read_json(open_store(s), 'models/plants/drift.json')['enough'] is False
    longer = s.model_copy(update=dict(drift_min=60, drift_days=30.))
    assert not drift(longer)['enough'] # 42 examples are too few, too

def test_without_a_model_in_production_the_error_names_the_command_that_makes_one(tmp_path):
    from plant_mlops.monitor.drift import drift
    with pytest.raises(NoModelError, match='plant-mlops run'): drift(settings(home=tmp_path))

def test_a_dataset_without_held_out_examples_gives_no_result(s, monkeypatch):
    from plant_mlops.monitor.drift import drift
    photos = workloads(s)['photos'].reader
    def all_train(s, dataset): return photos.manifest(s, dataset).assign(split='train')
    monkeypatch.setitem(evaluate.readers, 'image', replace(photos, manifest=all_train))
    record_samples(s, input_samples(load_champion(s), drawn_photos(40)))
    for _ in range(2):
        result = drift(s)
        assert result['reference'] == 0
        assert not result['enough']

def test_a_model_that_does_not_name_its_dataset_is_an_error(s):
    from plant_mlops.monitor.drift import drift
    publish_example(s, '2')
    with pytest.raises(PlantError, match='which dataset'): drift(s)

def test_the_reference_is_computed_once_for_each_version_and_again_if_it_is_damaged(s, monkeypatch):
    from plant_mlops.monitor.drift import drift
    store = open_store(s)
    record_samples(s, input_samples(load_champion(s), drawn_photos(40)))
    first = drift(s)
    monkeypatch.setitem(evaluate.readers, 'image', None) # nothing can be read any more
    assert drift(s)['columns'] == first['columns']
    [key] = [key for key in drift_reports(s) if 'reference' in key]
    (store.root/key).write_bytes(b'damaged')
    with pytest.raises(AttributeError): drift(s)
    monkeypatch.undo()
    assert drift(s)['columns'] == first['columns']

def test_old_samples_and_reports_are_deleted(s, monkeypatch):
    from plant_mlops.monitor import drift as module
    monkeypatch.setattr(module, 'REPORTS', 2)
    model = load_champion(s)
    record_samples(s, input_samples(model, drawn_photos(40)))
    record_samples(s, input_samples(model, drawn_photos(5)), timestamp=now() - timedelta(days=100))
    reports = [module.drift(s)['report'] for _ in range(4)]
    files = drift_reports(s)
    assert count_samples(s) == 40
    assert sorted(file for file in files if file.endswith('.html')) == reports[2:]
    assert len(files) == 5
    module.drift(s.model_copy(update=dict(sample_max=35)))
    assert count_samples(s) == 35

def test_drift_of_a_model_of_numbers(tmp_path, monkeypatch):
    from plant_mlops.monitor.drift import drift
    rows = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)*[1, 1000, 1e6, 1] + [0, 5, 0, 0]
    rows[:, 3] = rows[:, 3] > 0 # most of these rows are alike in it
    ids = [str(i) for i in range(200)]
    def manifest(s, dataset):
        return pd.DataFrame(dict(id=ids, label='up', group=range(200), split=['train', 'test']*100))
    def read_inputs(s, dataset, ids, spec): return rows[[int(i) for i in ids]].astype(np.float32)
    def publish(version):
        model = linear_model(np.ones((4, 2)), ['up', 'down'], version=version)
        publish_example(s, version, data=model.SerializeToString(), dataset='d')
    s = settings(home=tmp_path, model='stocks')
    publish('0')
    with monkeypatch.context() as patch:
        patch.delitem(evaluate.readers, 'features', raising=False)
        with pytest.raises(PlantError, match='Install the workload'): drift(s)
    monkeypatch.setitem(evaluate.readers, 'features', Reader(manifest, read_inputs))
    publish('1')
    model = load_champion(s)
    record_samples(s, input_samples(model, rows[200:].tolist()))
    result = drift(s)
    assert (result['n'], result['reference'], result['drifted']) == (100, 100, False)
    assert list(result['columns']) == ['x0', 'x1', 'x2', 'x3']
    record_samples(s, input_samples(model, (rows[200:] + [0, 3000, 0, 0]).tolist()))
    columns = drift(s)['columns']
    assert [name for name, column in columns.items() if column['drifted']] == ['x1']

def test_drift_with_a_store_on_s3(seaweedfs, s):
    from plant_mlops.monitor.drift import drift
    s3 = seaweedfs.settings(bucket='drift', home=s.home)
    source, target = open_store(s), open_store(s3)
    for item in list(source.list('')): target.put(item.key, source.get(item.key))
    record_samples(s3, input_samples(load_champion(s3), drawn_photos(40)))
    result = drift(s3)
    assert result['enough']
    assert read_json(target, 'models/plants/drift.json') == result
    assert b'<svg' in target.get(result['report'])

@pytest.mark.parametrize('m,n', [(90, 30), (90, 120), (1000, 500)])
def test_samples_of_one_distribution_seldom_have_a_changed_fraction(m, n):
    from plant_mlops.monitor.drift_score import changed_fraction
    rng = np.random.default_rng(0)
    def largest_fraction():
        "The largest of 14 columns."
        columns = [np.split(rng.normal(size=m + n), [m]) for _ in range(14)]
        return max(changed_fraction(reference, current, columns=14) for reference, current in columns)
    assert sum(largest_fraction() > 0 for _ in range(100)) <= 12
    assert sum(largest_fraction() > .1 for _ in range(20)) == 0

# -- The command, and the retraining

@pytest.mark.timeout(900)
def test_drift_retrains_only_if_there_is_drift_and_if_there_are_new_photos(tmp_path):
    home = tmp_path/'home'
    def run_drift(*options, **kw): return plant('drift', *options, home=home, PLANT_DRIFT_MIN='10', **kw)
    def versions(): return {row['version'] for row in json.loads(plant('history', '--json', home=home))}
    assert 'plant-mlops run' in plant_messages('drift', home=home, ok=1)
    plant('run', '--synthetic', 80, '--json', home=home)
    s = quick_settings(home=home)
    output = run_drift('--retrain')
    assert 'Too few' in output
    assert 'PLANT_DRIFT_MIN' in output
    model = load_champion(s)
    record_samples(s, input_samples(model, drawn_photos(40)))
    output = run_drift('--retrain')
    assert 'No drift' in output
    assert 'file://' in output

    photos = dark_photos(80)
    record_samples(s, input_samples(model, photos))
    result = json.loads(run_drift('--json', ok=5))
    assert result['drifted']
    assert 'retrained' not in result
    result = json.loads(run_drift('--json', '--retrain', ok=5))
    assert not result['retrained']['trained']
    assert 'no new photos' in result['retrained']['reason']
    assert len(versions()) == 1

    for i, photo in enumerate(photos):
        file = tmp_path/'new'/LABELS[i % 2]/f'{i}.jpg'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(photo)
    plant('catalog', 'add', tmp_path/'new', home=home)
    output = run_drift('--retrain', ok=5)
    assert 'Drift, version 1' in output
    assert 'Version 2 was' in output
    assert registry.model_bytes(s, '2')
    if 'was promoted' in output: assert not json.loads(run_drift('--json'))['enough'] # no samples of version 2 yet
    from plant_mlops.jobs.chains import retrain
    assert not retrain(quick_settings(home=home), progress=False)['trained'] # whatever the gate decided about version 2
    with pytest.raises(PlantError, match='no version 3'): registry.model_bytes(s, '3')
