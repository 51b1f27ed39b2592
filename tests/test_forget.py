"Photos that are deleted for good."
import io, uuid
from datetime import datetime
from shutil import copytree
import pyarrow.parquet as pq, pytest, sqlalchemy as sa
from PIL import Image
from typer.testing import CliRunner
from plant_mlops.apps.mistakes import load_photos
from plant_mlops.cli.catalog import app
from plant_mlops.core.config import PlantError, settings
from plant_mlops.core.store import FolderStore, StoreError, open_store
from plant_mlops.data.catalog import add_rows, list_rows, list_stored, open_catalog, reset_rows
from plant_mlops.data.dataset import build_dataset, load_dataset
from plant_mlops.data.embeddings import load_embeddings
from plant_mlops.data.prepare import prepare
from plant_mlops.data.shard_cache import load_jpegs
from plant_mlops.data.shards import read_shards
from plant_mlops.photos.example_home import embed_thumbnails
from plant_mlops.photos.forget import forget
from plant_mlops.photos.stages import ingest, load_catalog
from plant_mlops.serve.prediction_log import open_prediction_log, predictions, samples

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A home with a dataset of forty photos."
    s = settings(home=tmp_path_factory.mktemp('forget')/'home', shard_photos=15)
    load_catalog(s, synthetic=40)
    ingest(s, progress=False)
    prepare(s, progress=False)
    build_dataset(s, embed=embed_thumbnails, progress=False)
    return s.home

@pytest.fixture
def s(home, tmp_path):
    "Settings of a copy of that home."
    return settings(home=copytree(home, tmp_path/'home'))

@pytest.fixture
def engine(s):
    engine = open_catalog(s)
    yield engine
    engine.dispose()

def objects(s) -> dict:
    "All objects of the store: key → bytes."
    store = open_store(s)
    return {stat.key: store.get(stat.key) for stat in store.list('')}

def cached_files(s) -> list:
    "The content of all files in the cache."
    return [file.read_bytes() for file in (s.home/'cache').rglob('*') if file.is_file()]

def test_a_forgotten_photo_is_nowhere_and_the_others_are_unchanged(s, engine):
    row = list_stored(engine)[7]
    checksum = row['sha256']
    prepared = read_shards(open_store(s), columns=['jpeg'], side=s.photo_side).set_index('sha256').jpeg
    before = load_dataset(s)
    vector = load_embeddings(s)[(before.manifest.sha256 == checksum).to_numpy()].tobytes()
    load_jpegs(s, before.manifest) # copies of the shards
    assert any(prepared[checksum] in data for data in cached_files(s))
    forgotten = forget(s, [row['url_source']])
    assert (forgotten.photos, forgotten.rows, forgotten.raw, forgotten.shards, forgotten.datasets) == (1, 1, 1, 1, 1)
    everything = objects(s)
    assert f'raw/{checksum}' not in everything
    for data in [*everything.values(), *cached_files(s)]:
        assert prepared[checksum] not in data, 'the prepared JPEG is stored somewhere'
        assert vector not in data, 'the embedding is stored somewhere'
    assert not any(row['url_source'].encode() in data for key, data in everything.items() if key.endswith('.json'))
    data = load_dataset(s)
    others = data.manifest[data.manifest.sha256 != checksum]
    assert len(load_jpegs(s, others)) == 39
    assert others.equals(before.manifest[before.manifest.sha256 != checksum])
    [deleted] = data.manifest[data.manifest.sha256 == checksum].to_dict('records')
    assert (deleted['flags'], deleted['split'], deleted['url_source']) == ('deleted', 'none', 'deleted')
    embedding = load_embeddings(s)
    assert len(embedding) == 40 and not embedding[(data.manifest.sha256 == checksum).to_numpy()].any()

@pytest.mark.parametrize('n_deletions', range(3))
def test_a_deletion_that_was_interrupted_is_completed_by_the_next_one(s, engine, monkeypatch, n_deletions):
    checksum = list_stored(engine)[3]['sha256']
    delete, n_deleted = FolderStore.delete, 0
    def delete_some(self, key):
        nonlocal n_deleted
        if key.startswith('fmt/'):
            if n_deleted == n_deletions: raise StoreError('The network failed. Run again.')
            n_deleted += 1
        delete(self, key)
    monkeypatch.setattr(FolderStore, 'delete', delete_some)
    with pytest.raises(StoreError): forget(s, [checksum])
    monkeypatch.undo()
    assert f'raw/{checksum}' not in objects(s)
    forget(s, [checksum])
    tables = [key for key in objects(s) if key.startswith('fmt/')]
    assert len(tables) == 9, 'three shards, with an index and embeddings each'
    for key in tables: assert checksum not in pq.read_table(io.BytesIO(open_store(s).get(key)))['sha256'].to_pylist()

def test_the_dashboard_shows_the_mistakes_without_a_forgotten_photo(s, engine):
    first, second = [row['sha256'] for row in list_stored(engine)][:2]
    version = load_dataset(s).version
    forget(s, [first])
    photos = load_photos(s, version, [first, second])
    assert photos[0] is None and photos[1].startswith(b'\xff\xd8')
    assert load_photos(s, version, [first]) == [None]

def test_a_forgotten_photo_does_not_come_back(s, engine):
    row = list_stored(engine)[0]
    forget(s, [row['sha256']])
    reset_rows(engine, everything=True)
    assert ingest(s, progress=False)['rejected'] == 1
    [again] = [other for other in list_rows(engine) if other['url_source'] == row['url_source']]
    assert again['status'] == 'rejected' and 'deleted' in again['error'] and again['url_s3'] is None
    prepare(s, progress=False)
    assert row['sha256'] not in set(load_dataset(s, build_dataset(s, progress=False)).manifest.sha256)

def test_the_photo_of_a_prediction_is_forgotten_by_its_id(s, engine):
    checksum = list_stored(engine)[0]['sha256']
    ids = [str(uuid.uuid4()), str(uuid.uuid4())]
    log = open_prediction_log(s)
    shared = dict(timestamp=datetime(2026, 1, 1), model='plants', version='1')
    with log.begin() as c:
        for prediction_id, photo in zip(ids, (checksum, 'b' * 64)):
            c.execute(sa.insert(predictions), dict(id=prediction_id, variant='champion', input=photo, prediction='grass',
                                                   probability=.9, novel=False, **shared))
            c.execute(sa.insert(samples), dict(id=prediction_id, stats='{}', embedding=b'\0\0', **shared))
    assert forget(s, [ids[0]]).samples == 1
    with log.connect() as c: assert list(c.scalars(sa.select(samples.c.id))) == [ids[1]]
    assert open_store(s).stat(f'raw/{checksum}') is None
    forgotten = forget(s, [ids[1].upper().replace('-', '')])
    assert (forgotten.samples, forgotten.raw) == (1, 0), 'a photo that was only predicted'
    log.dispose()

def test_an_interrupted_deletion_is_completed_by_the_next(s, engine, monkeypatch):
    checksum = list_stored(engine)[0]['sha256']
    with monkeypatch.context() as patch:
        patch.setattr('plant_mlops.data.delete_photo.write_dataset', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError): forget(s, [checksum])
    assert checksum not in {row['sha256'] for row in list_stored(engine)}
    assert f'raw/{checksum}' not in objects(s)
    forgotten = forget(s, [checksum])
    assert (forgotten.raw, forgotten.datasets) == (0, 1)

@pytest.mark.parametrize('name, message', [
    ('http://a.example/unknown.jpg', 'no row'), ('0' * 64, 'No photo has'), ('photo.jpg', 'neither'), ('0' * 8 + '-1111-4111-8111-' + '0' * 12, 'no prediction')])
def test_an_unknown_photo_is_an_error_and_nothing_is_deleted(s, engine, name, message):
    known = list_stored(engine)[0]['url_source']
    with pytest.raises(PlantError, match=message): forget(s, [known, name])
    assert len(list_stored(engine)) == 40

def test_forgetting_a_photo_that_was_not_stored_is_an_error(s, engine):
    add_rows(engine, [dict(url_source='http://a.example/new.jpg')])
    with pytest.raises(PlantError, match='was not stored'): forget(s, ['http://a.example/new.jpg'])

def test_the_command_asks_before_it_deletes(s, engine):
    url = list_stored(engine)[0]['url_source']
    def run(*args, **more): return CliRunner().invoke(app, ['catalog', 'forget', *args, '--home', str(s.home)], **more)
    assert run(url, input='n\n').exit_code != 0 and len(list_stored(engine)) == 40
    assert 'Deleted: 1 photos' in run(url, '--yes').output and len(list_stored(engine)) == 39
    assert run().exit_code != 0 and run(url, '--gone').exit_code != 0

def test_rows_of_missing_files_are_deleted_with_one_command(tmp_path):
    s = settings(home=tmp_path/'home')
    for name in ('fern/1', 'fern/2', 'moss/3'):
        (tmp_path/'d'/name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((64, 64), 50 + int(name[-1])).save(tmp_path/f'd/{name}.jpg')
    load_catalog(s, tmp_path/'d')
    ingest(s, progress=False)
    (tmp_path/'d/fern/1.jpg').unlink()
    assert load_catalog(s, tmp_path/'d')['gone'] == 1
    result = load_catalog(s, (tmp_path/'d').rename(tmp_path/'e'))
    assert (result['new'], result['gone']) == (2, 2)
    ingest(s, progress=False)
    def run(**more): return CliRunner().invoke(app, ['catalog', 'forget', '--gone', '--home', str(s.home)], **more).output
    assert '1 photos are in no other row' in run(input='n\n')
    assert '3 rows were deleted' in run(input='y\n') and 'no rows' in run()
    engine = open_catalog(s)
    assert len(list_rows(engine)) == 2
    engine.dispose()
