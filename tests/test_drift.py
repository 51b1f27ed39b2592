"From samples of a server's inputs to a verdict on drift, in every database and store, and to a new model."
import base64, json, os, subprocess, sys
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from uuid import uuid4
import numpy as np, pandas as pd, pytest, sqlalchemy as sa
from prometheus_client import generate_latest
from helpers import input_samples, plant, plant_messages
from plant_mlops.core.config import PlantError, settings
from plant_mlops.core.store import open_store
from plant_mlops.data.synthetic import HOST, LABELS, draw, draw_jpeg, serve_synthetic, synthetic_rows
from plant_mlops.core.workload import Reader, workloads
from plant_mlops.registry import evaluate, registry
from plant_mlops.registry.model_file import linear_model
from plant_mlops.serve.prediction_log import load_log_files, feedback, delete_old_samples, open_prediction_log, predictions, read_recent_samples, samples
from plant_mlops.serve.champion import NoModelError, load_champion
from plant_mlops.serve.input_statistics import once_every
from plant_mlops.serve.prediction_spool import Spool, spool_folder, waiting_files
from plant_mlops.serve.metrics import Metrics, set_drift_metrics
from plant_mlops.registry.example_model import photo_bytes, publish_example

now = lambda: datetime.now(timezone.utc)
KEYS = ['checked_at', 'version', 'dataset', 'n', 'reference', 'score', 'threshold', 'drifted', 'enough', 'columns', 'report']

def send(s, found, version='1', at=None):
    "Leave samples as a server does."
    spool = Spool(spool_folder(s))
    for o in found: spool.add('samples', id=str(uuid4()), timestamp=at or now(), model=s.model, version=version, **o)
    spool.flush()

def count(s):
    eng = open_prediction_log(s)
    try:
        with eng.connect() as c: return c.scalar(sa.select(sa.func.count()).select_from(samples))
    finally: eng.dispose()

# -- the table

@pytest.mark.parametrize('kind', ['sqlite', 'postgres', 'mariadb'])
def test_samples_go_in_once_in_every_database(kind, request, tmp_path):
    s = settings(home=tmp_path, **({} if kind == 'sqlite' else dict(catalog_url=request.getfixturevalue(kind))))
    from plant_mlops.data.catalog import open_catalog
    eng = open_catalog(s)
    for o in (predictions, feedback): o.create(eng) # an installation from before there were samples
    eng.dispose()
    wide = np.linspace(-1, 1, 50_000).astype('<f2') # more than MySQL's BLOB would take
    start, spool = now() - timedelta(days=5), Spool(spool_folder(s))
    for i in range(10):
        spool.add('samples', id=f's{i}', timestamp=start + timedelta(days=i), model='plants', version='2' if i == 9 else '1', stats=dict(brightness=i/7, größe=1.),
                  embedding=base64.b64encode(wide.tobytes()).decode() if i else None)
    spool.flush()
    data = waiting_files(spool_folder(s))[0].read_bytes()
    eng = open_prediction_log(s)
    assert load_log_files(eng, spool_folder(s)) == 10
    (spool_folder(s)/'01-1-x.jsonl').write_bytes(data + b'{"kind": "samples", "id": "x", "timestamp": "2026-05-01T00:00:00", "model": "m", "version": "1", "stats": {}, "embedding": "?"}\n')
    load_log_files(eng, spool_folder(s))
    since = start.replace(tzinfo=None)
    found = read_recent_samples(eng, 'plants', '1', since, 100)
    assert [o['id'] for o in found] == [f's{i}' for i in range(9)] and found[3]['stats'] == dict(brightness=3/7, größe=1.)
    assert found[0]['embedding'] is None and (np.frombuffer(found[8]['embedding'], '<f2') == wide).all()
    some = read_recent_samples(eng, 'plants', '1', since, 4)
    assert len(some) == 4 and some == read_recent_samples(eng, 'plants', '1', since, 4) != read_recent_samples(eng, 'plants', '1', since, 4, seed=1)
    assert [o['id'] for o in read_recent_samples(eng, 'plants', '1', since + timedelta(days=6, hours=1), 100)] == ['s7', 's8']
    assert delete_old_samples(eng, 'plants', since + timedelta(days=1, hours=1), 1000) == 2 and delete_old_samples(eng, 'plants', since, 3) == 5 and delete_old_samples(eng, 'plants', since, 3) == 0
    assert [o['id'] for v in '12' for o in read_recent_samples(eng, 'plants', v, since, 100)] == ['s7', 's8', 's9']
    eng.dispose()

# -- what is sampled

def test_samples_are_few():
    clock = iter(np.arange(0, 10, .01))
    due = once_every(1, lambda: next(clock))
    assert sum(due() for _ in range(1000)) == 10

def test_a_verdict_shows_among_the_figures():
    m = Metrics('plants')
    v = dict(checked_at='2026-05-01T12:00:00+00:00', version='1', score=.5, drifted=True, columns=dict(old=dict(score=.5, drifted=True)))
    set_drift_metrics(m, v, '1')
    set_drift_metrics(m, v | dict(score=None, drifted=False, columns=dict(new=dict(score=.1, drifted=False))), '1')
    text = generate_latest(m.registry).decode()
    assert 'plant_drift_score{model="plants"} NaN' in text and 'plant_drift_drifted{model="plants"} 0.0' in text and '{column="new",model="plants"} 0.1' in text and '{column="old",model="plants"} NaN' in text
    set_drift_metrics(m, v, '2')
    text = generate_latest(m.registry).decode()
    assert 'plant_drift_score{model="plants"} NaN' in text and 'plant_drift_drifted{model="plants"} 0.0' in text and '{column="old",model="plants"} NaN' in text

# -- the job

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A home with a dataset of drawn photos, and a model made by hand in production."
    from plant_mlops.data.catalog import add_rows, open_catalog
    from plant_mlops.data.dataset import build_dataset
    from plant_mlops.data.ingest import ingest
    from plant_mlops.data.prepare import prepare
    s = settings(home=tmp_path_factory.mktemp('drift'))
    add_rows(open_catalog(s), synthetic_rows(140, 42))
    with serve_synthetic() as at: ingest(s, connect_to={HOST: at}, progress=False)
    prepare(s, progress=False)
    publish_example(s, dataset=build_dataset(s, progress=False))
    return s.home

@pytest.fixture
def s(home, tmp_path):
    "The same, of one's own."
    import shutil
    shutil.copytree(home, tmp_path/'home')
    return settings(home=tmp_path/'home')

drawn = lambda n: [draw_jpeg(LABELS[i % 2], 7, i) for i in range(n)]

def test_new_photos_of_the_same_kind_are_no_drift_and_others_are(s):
    from plant_mlops.monitor.drift import drift
    model, store = load_champion(s), open_store(s)
    send(s, input_samples(model, drawn(80)))
    v = drift(s)
    assert list(v) == KEYS and v['enough'] and not v['drifted'] and v['score'] < .1 and (v['n'], v['reference'], v['version']) == (80, 42, '1')
    assert set(v['columns']) == {'brightness', 'contrast', 'saturation', 'sharpness', 'warmth', 'novelty', 'embedding'}
    assert not waiting_files(spool_folder(s)) and count(s) == 80

    send(s, input_samples(model, [photo_bytes(draw(LABELS[i % 2], (8, i)).point(lambda p: p//3)) for i in range(60)]))
    v = drift(s)
    assert v['drifted'] and .1 < v['score'] < 60/140 and v['score'] == max(o['score'] for o in v['columns'].values())
    assert v['columns']['brightness']['drifted'] and not v['columns']['warmth']['drifted']
    assert json.loads(store.get('models/plants/drift.json')) == v == json.loads(store.get(v['report'].replace('.html', '.json')))
    html = store.get(v['report']).decode()
    assert all(text in html for text in ('Drift in', 'lower\nbound', 'brightness', 'embedding 3')) and html.count('<svg') > 6
    assert abs(datetime.fromisoformat(v['checked_at']) - now()) < timedelta(minutes=5)

def test_too_little_gives_no_verdict(s):
    from plant_mlops.monitor.drift import drift
    v = drift(s)
    assert list(v) == KEYS and (v['enough'], v['n'], v['score'], v['drifted'], v['columns'], v['report']) == (False, 0, None, False, {}, None)
    model = load_champion(s)
    grey = input_samples(model, drawn(1)*50)
    send(s, grey) # one photo, again and again
    send(s, input_samples(model, drawn(40)), version='9') # of another version
    send(s, input_samples(model, drawn(40)), at=now() - timedelta(days=8)) # before the days in question
    assert drift(s)['n'] == 1
    assert json.loads(open_store(s).get('models/plants/drift.json'))['enough'] is False
    assert not drift(s.model_copy(update=dict(drift_min=60, drift_days=30.)))['enough'] # 42 examples are too few, too

def test_without_a_model_there_is_nothing_to_ask(tmp_path):
    from plant_mlops.monitor.drift import drift
    with pytest.raises(NoModelError, match='plant-mlops run'): drift(settings(home=tmp_path))

def test_a_dataset_with_nothing_held_out(s, monkeypatch):
    from plant_mlops.monitor.drift import drift
    photos = workloads(s)['photos'].reader
    def all_train(s, dataset): return photos.manifest(s, dataset).assign(split='train')
    monkeypatch.setitem(evaluate.readers, 'image', replace(photos, manifest=all_train))
    send(s, input_samples(load_champion(s), drawn(40)))
    for _ in range(2): assert (v := drift(s))['reference'] == 0 and not v['enough']

def test_a_model_that_does_not_know_its_data(s):
    from plant_mlops.monitor.drift import drift
    publish_example(s, '2')
    with pytest.raises(PlantError, match='does not say which dataset'): drift(s)

def test_the_reference_is_made_once_for_each_version(s, monkeypatch):
    from plant_mlops.monitor import drift as job
    model, store = load_champion(s), open_store(s)
    send(s, input_samples(model, drawn(40)))
    first = job.drift(s)
    monkeypatch.setitem(evaluate.readers, 'image', None) # nothing can be read any more
    assert job.drift(s)['columns'] == first['columns']
    key = next(o.key for o in store.list('models/plants/drift/') if 'reference' in o.key)
    (store.root/key).write_bytes(b'damaged')
    with pytest.raises(AttributeError): job.drift(s)
    monkeypatch.undo()
    assert job.drift(s)['columns'] == first['columns']

def test_what_is_old_goes(s, monkeypatch):
    from plant_mlops.monitor import drift as job
    monkeypatch.setattr(job, 'REPORTS', 2)
    model = load_champion(s)
    send(s, input_samples(model, drawn(40)))
    send(s, input_samples(model, drawn(5)), at=now() - timedelta(days=100))
    made = [job.drift(s)['report'] for _ in range(4)]
    left = [o.key for o in open_store(s).list('models/plants/drift/')]
    assert count(s) == 40 and sorted(o for o in left if o.endswith('.html')) == made[2:] and len(left) == 5
    job.drift(s.model_copy(update=dict(sample_max=35)))
    assert count(s) == 35

def test_a_model_of_numbers(tmp_path, monkeypatch):
    from plant_mlops.monitor.drift import drift
    rows = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)*[1, 1000, 1e6, 1] + [0, 5, 0, 0]
    rows[:, 3] = rows[:, 3] > 0 # most of these rows are alike in it
    manifest = lambda s, dataset: pd.DataFrame(dict(id=[str(i) for i in range(200)], label='up', group=range(200), split=['train', 'test']*100))
    monkeypatch.setitem(evaluate.readers, 'features', Reader(manifest, lambda s, d, ids, spec: rows[[int(i) for i in ids]].astype(np.float32)))
    s = settings(home=tmp_path, model='stocks')
    with monkeypatch.context() as m:
        m.delitem(evaluate.readers, 'features')
        publish_example(s, data=linear_model(np.ones((4, 2)), ['up', 'down'], version='0').SerializeToString(), version='0', dataset='d')
        with pytest.raises(PlantError, match='install the workload of that name'): drift(s)
    publish_example(s, data=linear_model(np.ones((4, 2)), ['up', 'down'], version='1').SerializeToString(), dataset='d')
    model = load_champion(s)
    send(s, input_samples(model, rows[200:].tolist()))
    v = drift(s)
    assert (v['n'], v['reference'], v['drifted'], list(v['columns'])) == (100, 100, False, ['x0', 'x1', 'x2', 'x3'])
    send(s, input_samples(model, (rows[200:] + [0, 3000, 0, 0]).tolist()))
    v = drift(s)
    assert [k for k, o in v['columns'].items() if o['drifted']] == ['x1']

def test_on_s3(weed, s):
    from plant_mlops.monitor.drift import drift
    far = weed.settings(bucket='drift', home=s.home)
    store, there = open_store(s), open_store(far)
    for o in list(store.list('')): there.put(o.key, store.get(o.key))
    send(far, input_samples(load_champion(far), drawn(40)))
    v = drift(far)
    assert v['enough'] and json.loads(there.get('models/plants/drift.json')) == v and b'<svg' in there.get(v['report'])

def test_chance_alone_is_seldom_a_share():
    from plant_mlops.monitor.drift_score import changed_share
    rng = np.random.default_rng(0)
    for m, n in ((90, 30), (90, 120), (1000, 500)):
        share = lambda: max(changed_share(*np.split(rng.normal(size=m + n), [m]), columns=14) for _ in range(14))
        assert sum(share() > 0 for _ in range(100)) <= 12 and sum(share() > .1 for _ in range(20)) == 0

# -- the command, and what follows from it

@pytest.mark.timeout(900)
def test_retrains_only_where_there_is_drift_and_something_to_learn(tmp_path):
    home, env = tmp_path/'home', dict(PLANT_DRIFT_MIN='10')
    assert 'plant-mlops run' in plant_messages('drift', home=home, ok=1)
    plant('run', '--synthetic', 80, '--json', home=home)
    s = settings(home=home, image_size=96)
    said = plant('drift', '--retrain', home=home, **env)
    assert 'Too few' in said and 'PLANT_DRIFT_MIN' in said
    model = load_champion(s)
    send(s, input_samples(model, drawn(40)))
    said = plant('drift', '--retrain', home=home, **env)
    assert 'No drift' in said and 'file://' in said
    versions = lambda: len({o['version'] for o in json.loads(plant('history', '--json', home=home))})

    dark = [draw(LABELS[i % 2], (8, i)).point(lambda p: p//3) for i in range(80)]
    send(s, input_samples(model, [photo_bytes(o) for o in dark]))
    v = json.loads(plant('drift', '--json', home=home, ok=5, **env))
    assert v['drifted'] and 'retrained' not in v
    v = json.loads(plant('drift', '--json', '--retrain', home=home, ok=5, **env))
    assert not v['retrained']['trained'] and 'no new photos' in v['retrained']['reason'] and versions() == 1

    for i, o in enumerate(dark):
        f = tmp_path/'new'/LABELS[i % 2]/f'{i}.jpg'
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_bytes(photo_bytes(o))
    plant('catalog', 'add', tmp_path/'new', home=home)
    said = plant('drift', '--retrain', home=home, ok=5, **env)
    assert 'Drift, version 1' in said and 'Version 2 was' in said and registry.model_bytes(s, '2')
    if 'was promoted' in said: assert not json.loads(plant('drift', '--json', home=home, **env))['enough'] # of the new version nothing was sampled yet
    from plant_mlops.jobs.chains import retrain
    again = retrain(settings(home=home, image_size=96, epochs=0, batch_size=8), progress=False) # whatever the gate said of version 2
    assert not again['trained']
    with pytest.raises(PlantError, match='no version 3'): registry.model_bytes(s, '3')
