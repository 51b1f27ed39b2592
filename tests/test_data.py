"Preparation and datasets: unusual photos, labels, several workers, killed processes, and stores on disk and on S3."
import io, json, os, random, shutil, signal, subprocess, sys, time
from dataclasses import replace
import numpy as np, pytest, sqlalchemy as sa
from PIL import Image
from plant_mlops.core.config import PlantError, settings
from plant_mlops.core.store import FolderStore, StoreError, checksum_in_key, open_store, sha256_of
from plant_mlops.data import prepare as prepare_module
from plant_mlops.data.catalog import (add_rows, count_by_status, list_rows, list_stored, open_catalog, record_results,
                                      reset_rows)
from plant_mlops.data.catalog_files import add_folder
from plant_mlops.data.synthetic import LABELS, draw, draw_jpeg
from plant_mlops.data.ingest import ingest
from plant_mlops.data.shard_cache import load_jpegs
from plant_mlops.data.shards import put_shard, read_shards
from plant_mlops.data.prepare import prepare, prepare_photo
from plant_mlops.data.splits import FRACTIONS
from plant_mlops.data.embeddings import load_embeddings
from plant_mlops.data.dataset import build_dataset, load_dataset

def store_drawings(s, n, seed=0, labels=LABELS):
    "Store n drawings and their rows as ingestion would, without fetching them; returns the catalog."
    engine, store = open_catalog(s), open_store(s)
    photos = {f'file:///drawn/{seed}/{i}.jpg': draw_jpeg(LABELS[i % 2], seed, i) for i in range(n)}
    add_rows(engine, [dict(url_source=url, label=labels[i % len(labels)]) for i, url in enumerate(photos)])
    ids = {row['url_source']: row['id'] for row in list_rows(engine)}
    results = []
    for url, data in photos.items():
        sha256 = sha256_of(data)
        store.put(f'raw/{sha256}', data)
        results.append(dict(id=ids[url], status='stored', sha256=sha256, url_s3=store.url(f'raw/{sha256}')))
    record_results(engine, results)
    return engine

def add_file(s, folder, name, data, label):
    "Write a file, and add it to the catalog."
    (folder/name).write_bytes(data)
    add_rows(open_catalog(s), [dict(url_source=(folder/name).as_uri(), label=label)])

def prepare_counts(s) -> dict:
    "Prepare the photos; returns the counts of the result."
    result = prepare(s, progress=False)
    return {key: result[key] for key in ('prepared', 'already', 'failed')}

def ingest_and_prepare(s):
    ingest(s, progress=False)
    prepare(s, progress=False)

def assert_each_photo_in_one_shard(s, n):
    "Check that each stored photo is in exactly one shard, and that each shard is undamaged and has its index."
    store = open_store(s)
    keys = [item.key for item in store.list('fmt/')]
    shards = [key for key in keys if checksum_in_key(key)]
    packed = [sha256 for key in shards for sha256 in read_shards(store, [key], ['jpeg']).sha256]
    assert sorted(packed) == sorted({row['sha256'] for row in list_stored(open_catalog(s))})
    assert len(packed) == n
    assert len(shards) * 2 == len(keys)
    assert len(read_shards(store)) == n

# -- Unusual photos

def encode(image, format='JPEG', **kw) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **kw)
    return file.getvalue()

def encode_16_bits(image) -> bytes:
    pixels = np.asarray(image.convert('L')).astype('uint16')*257
    return encode(Image.fromarray(pixels), 'PNG')

def encode_rotated(image) -> bytes:
    "A photo that its metadata rotates into the right position."
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(image.transpose(Image.ROTATE_90), exif=exif)

ENCODERS = {
    'cmyk': lambda image: encode(image.convert('CMYK')),
    'palette': lambda image: encode(image.convert('P'), 'PNG'),
    'grey': lambda image: encode(image.convert('L')),
    '16 bits': encode_16_bits,
    'turned': encode_rotated,
    'transparent': lambda image: encode(image.convert('RGBA'), 'PNG'),
    'animated': lambda image: encode(image, 'GIF', save_all=True, append_images=[image.rotate(180)]),
    'webp': lambda image: encode(image, 'WEBP')}

def grey_levels(image): return np.asarray(image.convert('L'), float)

@pytest.mark.parametrize('kind', ENCODERS)
def test_one_photo_in_different_formats_is_prepared_alike(kind):
    image = draw('dandelion', 3, (360, 270))
    photo = prepare_photo(ENCODERS[kind](image))
    small = Image.open(io.BytesIO(photo.jpeg))
    assert (small.mode, small.size) == ('RGB', (341, 256))
    assert (photo.width, photo.height) == (360, 270)
    assert (photo.scores['grayscale'] == 0) == (kind in ('grey', '16 bits'))
    assert np.abs(grey_levels(small) - grey_levels(image.resize((341, 256)))).mean() < 8
    other_hash = prepare_photo(encode(image)).phash
    assert (int(photo.phash, 16) ^ int(other_hash, 16)).bit_count() <= 10

# -- Labels and classes

def test_without_photos_or_a_dataset_the_error_says_so(tmp_path):
    s = settings(home=tmp_path/'home')
    (tmp_path/'photos/grass').mkdir(parents=True)
    engine = open_catalog(s)
    with pytest.raises(PlantError, match='no photo'): add_folder(engine, tmp_path/'photos')
    assert prepare_counts(s) == dict(prepared=0, already=0, failed=0)
    with pytest.raises(PlantError, match='No photo is stored'): build_dataset(s)
    with pytest.raises(PlantError, match='no dataset yet'): load_dataset(s)

def test_a_dataset_needs_two_classes_with_photos(tmp_path):
    s = settings(home=tmp_path/'home')
    for label in LABELS: (tmp_path/'photos'/label).mkdir(parents=True)
    for i in range(3): (tmp_path/f'photos/grass/{i}.jpg').write_bytes(draw_jpeg('grass', 0, i))
    assert add_folder(open_catalog(s), tmp_path/'photos').new == 3
    ingest_and_prepare(s)
    with pytest.raises(PlantError, match='two classes.* 1: grass'): build_dataset(s)

def test_the_only_photo_of_a_class_is_used_for_training_with_a_warning(tmp_path):
    s = settings(home=tmp_path/'home')
    store_drawings(s, 12, labels=('grass',))
    add_file(s, tmp_path, 'rose.jpg', draw_jpeg('dandelion', 9, 9), 'rose')
    ingest_and_prepare(s)
    build_dataset(s)
    ds = load_dataset(s)
    rose = ds.manifest[ds.manifest.label == 'rose'].iloc[0]
    assert (rose.split, rose['flags']) == ('train', 'only_photo')
    assert 'rose has a single photo' in ds.card['warnings'][0]
    assert 'rose has a single photo' in repr(ds)
    assert ds.classes == ['grass', 'rose']

def test_of_a_photo_with_two_labels_the_newest_counts_with_a_flag(tmp_path):
    s = settings(home=tmp_path/'home')
    store_drawings(s, 20)
    duplicate, conflict = draw_jpeg('grass', 0, 1), draw_jpeg('dandelion', 0, 2)
    add_file(s, tmp_path, 'same.jpg', duplicate, 'grass')
    add_file(s, tmp_path, 'other.jpg', conflict, 'grass')
    ingest(s, progress=False)
    assert prepare_counts(s) == dict(prepared=20, already=0, failed=0)
    build_dataset(s)
    ds = load_dataset(s)
    manifest = ds.manifest.set_index('sha256')
    assert len(manifest) == 20
    assert manifest.index.is_unique
    row = manifest.loc[sha256_of(conflict)]
    assert row.label == 'grass'
    assert row.split in FRACTIONS
    assert row['flags'] == 'exact_duplicate,relabelled'
    row = manifest.loc[sha256_of(duplicate)]
    assert row.split in FRACTIONS
    assert row['flags'] == 'exact_duplicate'
    assert ds.card['flags'] == dict(exact_duplicate=2, relabelled=1)

def test_unlabelled_and_unprepared_photos_are_counted_in_the_card(tmp_path):
    s = settings(home=tmp_path/'home')
    engine = store_drawings(s, 20)
    prepare(s, progress=False)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE plants_data SET label = NULL WHERE id <= 3"))
    store_drawings(s, 4, seed=1)
    build_dataset(s)
    ds = load_dataset(s)
    assert len(ds.manifest) == 17
    expected = dict(rejected=0, failed=0, new=0, synthetic=0, unlabelled=3, unprepared=4)
    assert ds.card['left_out'] == expected
    assert '3 rows unlabelled' in repr(ds)

# -- Repeated and parallel preparation

def test_a_second_preparation_computes_and_writes_nothing(tmp_path, monkeypatch):
    s = settings(home=tmp_path/'home', shard_photos=10)
    store_drawings(s, 25)
    def shard_files(): return [(item.key, item.etag) for item in open_store(s).list('fmt/')]
    assert prepare_counts(s) == dict(prepared=25, already=0, failed=0)
    before = shard_files()
    assert len(before) == 6
    monkeypatch.setattr(prepare_module, 'prepare_photo', None)
    monkeypatch.setattr(FolderStore, 'put', None)
    assert prepare_counts(s) == dict(prepared=0, already=25, failed=0)
    assert shard_files() == before

def store_prepared(s, n):
    "A catalog and a store with n photos that are prepared, in shards of 500; the files in `raw/` are missing."
    engine, store = open_catalog(s), open_store(s)
    photo = prepare_photo(draw_jpeg('grass', 0, 0))
    add_rows(engine, [dict(url_source=f'http://a.example/{i}', label='grass') for i in range(n)])
    hashes = [sha256_of(f'{i}'.encode()) for i in range(n)]
    rows = zip(list_rows(engine), hashes)
    record_results(engine, [dict(id=row['id'], status='stored', sha256=sha256, url_s3='') for row, sha256 in rows])
    for i in range(0, n, 500):
        put_shard(store, [replace(photo, sha256=sha256, jpeg=b'') for sha256 in hashes[i:i+500]], s.photo_side)

def test_a_preparation_with_nothing_to_do_takes_no_more_statements_for_more_photos(tmp_path):
    statements = {}
    for n in (500, 5_000):
        s = settings(home=tmp_path/str(n))
        store_prepared(s, n)
        executed = []
        def record(connection, cursor, statement, *_): executed.append(statement)
        sa.event.listen(sa.Engine, 'before_cursor_execute', record)
        try: assert prepare_counts(s) == dict(prepared=0, already=n, failed=0)
        finally: sa.event.remove(sa.Engine, 'before_cursor_execute', record)
        statements[n] = executed
    assert any('plants_data' in statement for statement in statements[500])
    assert statements[5_000] == statements[500]

def start_python(code, *args, **kw):
    return subprocess.Popen([sys.executable, '-c', code, *args], text=True, stdout=subprocess.PIPE, **kw)

PREPARE_SHARD = '''
import sys
from plant_mlops.core.config import settings
from plant_mlops.data.prepare import prepare
home, i = sys.argv[1:]
print(prepare(settings(home=home, shard_photos=10), (int(i), 2), False)["prepared"])
'''

@pytest.mark.slow
def test_two_workers_share_the_photos_and_omit_none(tmp_path):
    s = settings(home=tmp_path/'home', shard_photos=10)
    store_drawings(s, 40)
    workers = [start_python(PREPARE_SHARD, str(s.home), str(i)) for i in (1, 2)]
    prepared = [int(worker.communicate()[0]) for worker in workers]
    assert sum(prepared) == 40
    assert min(prepared) > 5
    assert_each_photo_in_one_shard(s, 40)
    with pytest.raises(PlantError, match='3/2'): prepare(s, (3, 2), progress=False)

# -- Killed and failing preparations

FORK_SERVER = '''
import os, sys
import plant_mlops.data.prepare as p, imagehash, scipy.fftpack
from plant_mlops.core.config import settings
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        p.prepare(settings(home=line.strip(), shard_photos=4), progress=False)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
'''

@pytest.mark.slow
def test_after_killed_preparations_each_photo_is_in_one_shard(tmp_path):
    s, rng = settings(home=tmp_path/'home', shard_photos=4), random.Random(4)
    store_drawings(s, 120)
    server, killed = start_python(FORK_SERVER, stdin=subprocess.PIPE), 0
    for _ in range(12):
        print(s.home, file=server.stdin, flush=True)
        pid = int(server.stdout.readline())
        time.sleep(rng.uniform(.05, .25))
        os.kill(pid, signal.SIGKILL)
        killed += int(server.stdout.readline()) == -signal.SIGKILL
    server.stdin.close()
    server.wait(10)
    before = len(read_shards(open_store(s)))
    assert killed >= 4
    assert prepare(s, progress=False)['prepared'] == 120 - before
    assert_each_photo_in_one_shard(s, 120)
    assert count_by_status(open_catalog(s))['stored'] == 120
    assert prepare_counts(s) == dict(prepared=0, already=120, failed=0)
    assert not list((s.home/'store/.tmp').glob('*@*'))

def test_a_version_without_its_card_is_completed_by_the_next_build(tmp_path):
    s = settings(home=tmp_path/'home')
    store_drawings(s, 20)
    prepare(s, progress=False)
    version, store = build_dataset(s), open_store(s)
    manifest = store.get(f'agg/{version}/manifest.parquet')
    store.delete(f'agg/{version}/card.json')
    assert build_dataset(s) == version
    assert store.get(f'agg/{version}/manifest.parquet') == manifest
    assert load_dataset(s).card['version'] == version

def test_after_a_full_disk_the_next_preparation_goes_on(tmp_path, monkeypatch):
    s = settings(home=tmp_path/'home', shard_photos=5)
    store_drawings(s, 20)
    put, shards_that_fit = FolderStore.put, 2
    def put_until_full(self, key, *args, **kw):
        nonlocal shards_that_fit
        if key.startswith('fmt') and checksum_in_key(key):
            if not shards_that_fit: raise StoreError(f'{key}: No space left on device. Make room, then run again.')
            shards_that_fit -= 1
        return put(self, key, *args, **kw)
    monkeypatch.setattr(FolderStore, 'put', put_until_full)
    with pytest.raises(PlantError, match='Make room'): prepare(s, progress=False)
    monkeypatch.undo()
    assert prepare_counts(s) == dict(prepared=10, already=10, failed=0)
    assert_each_photo_in_one_shard(s, 20)

def test_an_empty_store_is_an_error_and_changes_no_row(tmp_path):
    s = settings(home=tmp_path/'home')
    engine = store_drawings(s, 12)
    empty_store = settings(home=s.home, store_url=str(tmp_path/'other'))
    with pytest.raises(PlantError, match='PLANT_STORE_URL'): prepare(empty_store, progress=False)
    assert count_by_status(engine)['stored'] == 12

def test_photos_that_are_in_the_store_are_ingested_without_their_source(tmp_path):
    s = settings(home=tmp_path/'home')
    engine = store_drawings(s, 12)
    for row in list_rows(engine): record_results(engine, [dict(id=row['id'], status='failed', error='lost')])
    open_store(s).delete('raw/' + list_rows(engine)[0]['sha256'])
    result = ingest(s, progress=False)
    assert (result['stored'], result['rejected']) == (11, 1), 'that without its photo: file:///drawn does not exist'
    assert prepare_counts(s) == dict(prepared=11, already=0, failed=0)

def test_a_rejected_photo_whose_source_was_replaced_is_fetched_again(tmp_path):
    s = settings(home=tmp_path/'home')
    good, bad = draw_jpeg('grass', 0, 1), b'no photo'
    add_file(s, tmp_path, 'a.jpg', good, 'grass')
    engine, store = open_catalog(s), open_store(s)
    store.put(f'raw/{sha256_of(bad)}', bad)
    row_id = list_rows(engine)[0]['id']
    record_results(engine, [dict(id=row_id, status='rejected', sha256=sha256_of(bad), error='damaged')])
    reset_rows(engine)
    assert ingest(s, progress=False)['stored'] == 1
    assert list_rows(engine)[0]['sha256'] == sha256_of(good)

def test_the_version_of_a_dataset_does_not_depend_on_the_shards(tmp_path):
    s = settings(home=tmp_path/'home')
    for n in (6, 12):
        store_drawings(s, n)
        prepare(s, progress=False)
    version = build_dataset(s)
    shutil.rmtree(s.home/'store/fmt')
    with pytest.raises(PlantError, match='plant-mlops prepare'): load_jpegs(s, load_dataset(s).manifest)
    prepare(s, progress=False)
    assert build_dataset(s) == version
    assert len(load_jpegs(s, load_dataset(s).manifest)) == 12

# -- Stores on disk and on S3

@pytest.mark.slow
def test_the_same_photos_and_labels_are_the_same_version_in_every_store_and_order(seaweedfs, tmp_path):
    disk = settings(home=tmp_path/'a', shard_photos=7)
    s3 = seaweedfs.settings('versions', home=tmp_path/'b')
    store_drawings(disk, 30)
    store_drawings(s3, 10)
    prepare(s3, progress=False)
    store_drawings(s3, 30)
    assert prepare(disk, progress=False)['prepared'] == 30
    assert prepare(s3, progress=False)['prepared'] == 20
    assert build_dataset(disk) == build_dataset(s3)
    on_disk, on_s3 = load_dataset(disk).manifest, load_dataset(s3).manifest
    assert on_disk.drop(columns='shard').equals(on_s3.drop(columns='shard'))
    with_shards_of_s3 = on_disk.merge(on_s3[['sha256', 'shard']], on='sha256', suffixes=('_disk', ''))
    assert list(load_jpegs(disk, on_disk)) == list(load_jpegs(s3, with_shards_of_s3))

def test_a_second_preparation_reads_the_indexes_of_shards_only(seaweedfs, tmp_path, monkeypatch):
    s = seaweedfs.settings('indexes', home=tmp_path, shard_photos=10)
    store_drawings(s, 25)
    prepare(s, progress=False)
    keys, store_class = [], type(open_store(s))
    get = store_class.get
    def record_get(self, key, *args):
        keys.append(key)
        return get(self, key, *args)
    monkeypatch.setattr(store_class, 'get', record_get)
    assert prepare_counts(s) == dict(prepared=0, already=25, failed=0)
    assert len(keys) == 3
    assert not any(map(checksum_in_key, keys))

@pytest.mark.slow
def test_new_photos_move_few_old_ones_to_other_splits_and_only_new_ones_are_embedded(tmp_path):
    "With another backbone, all are embedded again."
    s, batch_sizes = settings(home=tmp_path/'home'), []
    def embed(photos):
        batch_sizes.append(len(photos))
        small = [np.asarray(Image.fromarray(photo).resize((24, 24)), np.float32) for photo in photos]
        embeddings = np.stack([pixels.ravel() for pixels in small])
        embeddings -= embeddings.mean(1, keepdims=True)
        return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    def prepare_and_build(n):
        store_drawings(s, n)
        prepare(s, progress=False)
        return load_dataset(s, build_dataset(s, embed, progress=False))
    first, second = prepare_and_build(60), prepare_and_build(66)
    both = first.manifest.merge(second.manifest, on='sha256')
    assert len(both) == 60
    assert (both.split_x != both.split_y).sum() <= 6
    assert sum(batch_sizes) == 66
    assert load_embeddings(s).shape[0] == 66
    other_version = build_dataset(settings(home=s.home, arch='resnet18'), embed, progress=False)
    assert other_version != second.version
    assert sum(batch_sizes) == 132
    assert load_dataset(s).card['embedding'] == 'resnet18 True'
    build_dataset(s, embed, progress=False)
    assert first.card['source'] == 'photos'
    assert json.loads(open_store(s).get('agg/latest.json'))['version'] == second.version

# -- Real photos

@pytest.mark.slow
def test_300_real_photos_are_split_by_group_in_the_fractions_and_flagged(photos, tmp_path):
    s = settings(home=tmp_path/'home')
    assert add_folder(open_catalog(s), photos/'plants').new == 300
    ingest(s, progress=False)
    assert prepare_counts(s) == dict(prepared=300, already=0, failed=0)
    build_dataset(s)
    ds = load_dataset(s)
    assert ds.card['source'] == 'photos'
    assert len(ds.manifest) == 300
    for counts in ds.card['classes'].values():
        assert abs(counts['train'] - 105) <= 2
        assert abs(counts['test'] - 22.5) <= 2
    assert ds.manifest.groupby('group').split.nunique().max() == 1
    flagged = ds.card['flagged']
    assert 0 < len(flagged) < 40
    assert set(','.join(photo['flags'] for photo in flagged).split(',')) == set(ds.card['flags'])
