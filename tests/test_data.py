"Preparation and datasets: odd photos, odd labels, several workers, sudden death, two kinds of store."
import io, json, os, random, shutil, signal, subprocess, sys, time
from dataclasses import replace
import numpy as np, pytest, sqlalchemy as sa
from PIL import Image
from plant_mlops.core.config import PlantError, settings
from plant_mlops.data import prepare as module
from plant_mlops.data.catalog import add_rows, count_by_status, open_catalog, record_results, reset_rows, list_rows, list_stored
from plant_mlops.data.catalog_files import add_folder
from plant_mlops.data.dataset import build_dataset, load_dataset
from plant_mlops.data.embeddings import load_embeddings
from plant_mlops.data.splits import FRACTIONS
from plant_mlops.data.ingest import ingest
from plant_mlops.data.prepare import prepare, prepare_photo
from plant_mlops.data.quality import quality_scores
from plant_mlops.data.shards import load_jpegs, put_shard, read_shards
from plant_mlops.core.store import FolderStore, StoreError, checksum_in_key, open_store, sha256_of
from plant_mlops.data.synthetic import LABELS, draw, draw_jpeg

def fill(s, n, seed=0, labels=LABELS):
    "Store n drawings as ingestion would, without fetching them; gives the catalog."
    eng, store = open_catalog(s), open_store(s)
    make = lambda i: draw_jpeg(LABELS[i % 2], seed, i)
    todo = [(f'file:///drawn/{seed}/{i}.jpg', labels[i % len(labels)], make(i)) for i in range(n)]
    add_rows(eng, [dict(url_source=u, label=l) for u, l, _ in todo])
    ids = {r['url_source']: r['id'] for r in list_rows(eng)}
    for _, _, data in todo: store.put(f'raw/{sha256_of(data)}', data)
    record_results(eng, [dict(id=ids[u], status='stored', sha256=sha256_of(d), url_s3=store.url(f'raw/{sha256_of(d)}')) for u, _, d in todo])
    return eng

def add(s, folder, name, data, label):
    (folder/name).write_bytes(data)
    add_rows(open_catalog(s), [dict(url_source=(folder/name).as_uri(), label=label)])

def outcome(r): return {k: r[k] for k in ('prepared', 'already', 'failed')}
def shards(s): return [o.key for o in open_store(s).list('fmt/') if checksum_in_key(o.key)]

def check_whole(s, n):
    "Each stored photo is in exactly one shard, each shard is whole and has its index."
    store = open_store(s)
    keys = [o.key for o in store.list('fmt/')]
    packed = [h for k in keys if checksum_in_key(k) for h in read_shards(store, [k], ['jpeg']).sha256]
    assert sorted(packed) == sorted({r['sha256'] for r in list_stored(open_catalog(s))}) and len(packed) == n
    assert sum(map(bool, map(checksum_in_key, keys))) * 2 == len(keys)
    assert len(read_shards(store)) == n

# -- odd photos

def encode(img, format='JPEG', **kw):
    out = io.BytesIO()
    img.save(out, format, **kw)
    return out.getvalue()

def turned(img):
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(img, exif=exif)

odd = {'cmyk': lambda o: encode(o.convert('CMYK')), 'palette': lambda o: encode(o.convert('P'), 'PNG'), 'grey': lambda o: encode(o.convert('L')),
       '16 bits': lambda o: encode(Image.fromarray(np.asarray(o.convert('L')).astype('uint16')*257), 'PNG'), 'turned': lambda o: turned(o.transpose(Image.ROTATE_90)),
       'transparent': lambda o: encode(o.convert('RGBA'), 'PNG'), 'animated': lambda o: encode(o, 'GIF', save_all=True, append_images=[o.rotate(180)]), 'webp': lambda o: encode(o, 'WEBP')}

@pytest.mark.parametrize('kind', odd)
def test_odd_photos_come_out_alike(kind):
    img = draw('dandelion', 3, (360, 270))
    got = prepare_photo(odd[kind](img))
    small = Image.open(io.BytesIO(got.jpeg))
    assert (small.mode, small.size, got.width, got.height) == ('RGB', (341, 256), 360, 270)
    other, scores = img.resize((341, 256)), quality_scores([got.measured])
    assert (scores.grayscale[0] == 0) == (kind in ('grey', '16 bits'))
    assert np.abs(np.asarray(small.convert('L'), float) - np.asarray(other.convert('L'), float)).mean() < 8
    assert (int(got.phash, 16) ^ int(prepare_photo(encode(img)).phash, 16)).bit_count() <= 10

# -- labels and classes

def test_folder_with_no_photo(tmp_path):
    s = settings(home=tmp_path/'home')
    (tmp_path/'photos/grass').mkdir(parents=True)
    eng = open_catalog(s)
    with pytest.raises(PlantError, match='no photo'): add_folder(eng, tmp_path/'photos')
    assert outcome(prepare(s, progress=False)) == dict(prepared=0, already=0, failed=0)
    with pytest.raises(PlantError, match='No photo is stored'): build_dataset(s)
    with pytest.raises(PlantError, match='no dataset yet'): load_dataset(s)

def test_one_empty_class_folder(tmp_path):
    s = settings(home=tmp_path/'home')
    for o in LABELS: (tmp_path/'photos'/o).mkdir(parents=True)
    for i in range(3): (tmp_path/f'photos/grass/{i}.jpg').write_bytes(draw_jpeg('grass', 0, i))
    assert add_folder(open_catalog(s), tmp_path/'photos')['new'] == 3
    ingest(s, progress=False), prepare(s, progress=False)
    with pytest.raises(PlantError, match='needs two classes, and the photos have 1: grass'): build_dataset(s)

def test_class_with_one_photo(tmp_path):
    s = settings(home=tmp_path/'home')
    fill(s, 12, labels=('grass',))
    add(s, tmp_path, 'rose.jpg', draw_jpeg('dandelion', 9, 9), 'rose')
    ingest(s, progress=False), prepare(s, progress=False)
    build_dataset(s)
    ds = load_dataset(s)
    one = ds.manifest[ds.manifest.label == 'rose'].iloc[0]
    assert (one.split, one['flags']) == ('train', 'only_photo')
    assert 'rose has a single photo' in ds.card['warnings'][0] and 'rose has a single photo' in repr(ds)
    assert ds.classes == ['grass', 'rose']

def test_mixed_labels(tmp_path):
    "One photo under two labels counts for neither, and is not hidden."
    s = settings(home=tmp_path/'home')
    fill(s, 20)
    twice = draw_jpeg('grass', 0, 1)
    add(s, tmp_path, 'same.jpg', twice, 'grass')
    add(s, tmp_path, 'other.jpg', draw_jpeg('dandelion', 0, 2), 'grass')
    ingest(s, progress=False)
    assert outcome(prepare(s, progress=False)) == dict(prepared=20, already=0, failed=0)
    build_dataset(s)
    ds = load_dataset(s)
    m = ds.manifest.set_index('sha256')
    assert len(m) == 20 and m.index.is_unique
    conflict = m.loc[sha256_of(draw_jpeg('dandelion', 0, 2))]
    assert conflict.split == 'none' and 'label_conflict' in conflict['flags']
    assert m.loc[sha256_of(twice)].split in FRACTIONS and m.loc[sha256_of(twice)]['flags'] == 'exact_duplicate'
    assert (m.split == 'none').sum() == 1 and ds.card['flags']['label_conflict'] == 1
    assert any('label_conflict' in o['flags'] for o in ds.card['flagged'])

def test_unlabelled_and_unprepared_are_counted(tmp_path):
    s = settings(home=tmp_path/'home')
    eng = fill(s, 20)
    prepare(s, progress=False)
    with eng.begin() as c: c.execute(sa.text("UPDATE plants_data SET label = NULL WHERE id <= 3"))
    fill(s, 4, seed=1)
    build_dataset(s)
    ds = load_dataset(s)
    assert len(ds.manifest) == 17 and ds.card['left_out'] == dict(rejected=0, failed=0, new=0, synthetic=0, unlabelled=3, unprepared=4)
    assert '3 rows unlabelled' in repr(ds)

# -- again, and by several workers

def test_second_prepare_touches_nothing(tmp_path, monkeypatch):
    s = settings(home=tmp_path/'home', shard_photos=10)
    fill(s, 25)
    assert outcome(prepare(s, progress=False)) == dict(prepared=25, already=0, failed=0)
    was = [(o.key, o.etag) for o in open_store(s).list('fmt/')]
    assert len(was) == 6
    monkeypatch.setattr(module, 'prepare_photo', None)
    monkeypatch.setattr(FolderStore, 'put', None)
    assert outcome(prepare(s, progress=False)) == dict(prepared=0, already=25, failed=0)
    assert [(o.key, o.etag) for o in open_store(s).list('fmt/')] == was

def test_thousands_prepared_already(tmp_path):
    "Finding that 10,000 photos are done takes a moment."
    s = settings(home=tmp_path/'home')
    eng, store, one = open_catalog(s), open_store(s), prepare_photo(draw_jpeg('grass', 0, 0))
    add_rows(eng, [dict(url_source=f'http://a.example/{i}', label='grass') for i in range(10_000)])
    hashes = [sha256_of(f'{i}'.encode()) for i in range(10_000)]
    record_results(eng, [dict(id=r['id'], status='stored', sha256=h, url_s3='') for r, h in zip(list_rows(eng), hashes)])
    for i in range(0, 10_000, 500): put_shard(store, [replace(one, sha256=h, jpeg=b'') for h in hashes[i:i+500]], 256)
    start = time.perf_counter()
    assert outcome(prepare(s, progress=False)) == dict(prepared=0, already=10_000, failed=0)
    assert time.perf_counter() - start < 3

def run(code, **kw): return subprocess.Popen([sys.executable, '-c', code], text=True, stdout=subprocess.PIPE, **kw)

def test_shard_2_of_2(tmp_path):
    "Two workers at the same time share the photos and together leave nothing out."
    s = settings(home=tmp_path/'home', shard_photos=10)
    fill(s, 40)
    code = 'from plant_mlops.core.config import settings; from plant_mlops.data.prepare import prepare; print(prepare(settings(home={!r}, shard_photos=10), ({}, 2), False)["prepared"])'
    workers = [run(code.format(str(s.home), i)) for i in (1, 2)]
    done = [int(o.communicate()[0]) for o in workers]
    assert sum(done) == 40 and min(done) > 5
    check_whole(s, 40)
    with pytest.raises(PlantError, match='Shard 3/2'): prepare(s, (3, 2), progress=False)

# -- sudden death

nest = '''
import os, sys
import plant_mlops.data.prepare as p, imagehash, pandas
from cleanvision.issue_managers.image_property_issue_manager import ImagePropertyIssueManager
from plant_mlops.core.config import settings
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        p.prepare(settings(home=line.strip(), shard_photos=4), progress=False)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
'''

def test_killed_while_preparing(tmp_path):
    s, rng, hit = settings(home=tmp_path/'home', shard_photos=4), random.Random(4), 0
    fill(s, 120)
    p = run(nest, stdin=subprocess.PIPE)
    for _ in range(12):
        print(s.home, file=p.stdin, flush=True)
        pid = int(p.stdout.readline())
        time.sleep(rng.uniform(.05, .25))
        os.kill(pid, signal.SIGKILL)
        hit += int(p.stdout.readline()) == -signal.SIGKILL
    p.stdin.close()
    p.wait(10)
    before = len(read_shards(open_store(s)))
    last = prepare(s, progress=False)
    assert hit >= 4 and last['prepared'] == 120 - before
    check_whole(s, 120)
    assert count_by_status(open_catalog(s))['stored'] == 120
    assert outcome(prepare(s, progress=False)) == dict(prepared=0, already=120, failed=0)
    assert not [o for o in (s.home/'store/.tmp').glob('*@*')]

def test_killed_between_manifest_and_card(tmp_path):
    "A version without a card was never finished; it is finished by the next build."
    s = settings(home=tmp_path/'home')
    fill(s, 20)
    prepare(s, progress=False)
    version, store = build_dataset(s), open_store(s)
    manifest = store.get(f'agg/{version}/manifest.parquet')
    store.delete(f'agg/{version}/card.json')
    assert build_dataset(s) == version
    assert store.get(f'agg/{version}/manifest.parquet') == manifest and load_dataset(s).card['version'] == version

def test_store_that_fails_while_preparing(tmp_path, monkeypatch):
    "A full disk ends the run with a message; what was packed stays, the rest is prepared by the next run."
    s = settings(home=tmp_path/'home', shard_photos=5)
    fill(s, 20)
    put, left = FolderStore.put, [2]
    def full(self, key, *args, **kw):
        if key.startswith('fmt') and checksum_in_key(key):
            if not left[0]: raise StoreError(f'{key}: No space left on device. Make room, then run again.')
            left[0] -= 1
        return put(self, key, *args, **kw)
    monkeypatch.setattr(FolderStore, 'put', full)
    with pytest.raises(PlantError, match='Make room'): prepare(s, progress=False)
    monkeypatch.undo()
    assert outcome(prepare(s, progress=False)) == dict(prepared=10, already=10, failed=0)
    check_whole(s, 20)

def test_another_store_by_mistake(tmp_path):
    "A store that holds nothing is a mistake, and changes no row; a photo that its row has lost is found again without its source."
    s = settings(home=tmp_path/'home')
    eng = fill(s, 12)
    with pytest.raises(PlantError, match='PLANT_STORE_URL'): prepare(settings(home=s.home, store_url=str(tmp_path/'other')), progress=False)
    assert count_by_status(eng)['stored'] == 12
    for r in list_rows(eng): record_results(eng, [dict(id=r['id'], status='failed', error='lost')])
    open_store(s).delete('raw/' + list_rows(eng)[0]['sha256'])
    r = ingest(s, progress=False)
    assert (r['stored'], r['rejected']) == (11, 1), 'the one whose file:///drawn is gone as well'
    assert outcome(prepare(s, progress=False)) == dict(prepared=11, already=0, failed=0)

def test_a_mended_photo_is_fetched_again(tmp_path):
    "Bytes that are no photo are not found again in the store when their source has been replaced."
    s = settings(home=tmp_path/'home')
    add(s, tmp_path, 'a.jpg', draw_jpeg('grass', 0, 1), 'grass')
    eng, store, bad = open_catalog(s), open_store(s), b'no photo'
    store.put(f'raw/{sha256_of(bad)}', bad)
    record_results(eng, [dict(id=list_rows(eng)[0]['id'], status='rejected', sha256=sha256_of(bad), error='damaged')])
    reset_rows(eng)
    assert ingest(s, progress=False)['stored'] == 1 and list_rows(eng)[0]['sha256'] == sha256_of(draw_jpeg('grass', 0, 1))

def test_packed_anew_into_other_shards(tmp_path):
    s = settings(home=tmp_path/'home')
    for n in (6, 12):
        fill(s, n)
        prepare(s, progress=False)
    version = build_dataset(s)
    shutil.rmtree(s.home/'store/fmt')
    with pytest.raises(PlantError, match='plant-mlops prepare'): load_jpegs(s, load_dataset(s).manifest)
    prepare(s, progress=False)
    assert build_dataset(s) == version and len(load_jpegs(s, load_dataset(s).manifest)) == 12

# -- two kinds of store

def test_same_version_anywhere(weed, tmp_path):
    "The same photos and labels are the same version, in a folder or on S3, whatever order they came in."
    a, b = settings(home=tmp_path/'a', shard_photos=7), weed.settings('versions', home=tmp_path/'b')
    fill(a, 30)
    eng = fill(b, 10, labels=LABELS)
    prepare(b, progress=False)
    fill(b, 30)
    assert prepare(a, progress=False)['prepared'] == 30 and prepare(b, progress=False)['prepared'] == 20
    assert build_dataset(a) == build_dataset(b)
    assert load_dataset(a).manifest.drop(columns='shard').equals(load_dataset(b).manifest.drop(columns='shard'))
    assert load_jpegs(a, load_dataset(a).manifest) == load_jpegs(b, load_dataset(a).manifest.merge(load_dataset(b).manifest[['sha256', 'shard']], on='sha256', suffixes=('_a', '')))

def test_s3_reads_indexes_not_pixels(weed, tmp_path, monkeypatch):
    s = weed.settings('indexes', home=tmp_path, shard_photos=10)
    fill(s, 25)
    prepare(s, progress=False)
    got, store = [], type(open_store(s))
    get = store.get
    monkeypatch.setattr(store, 'get', lambda self, key, *a: got.append(key) or get(self, key, *a))
    assert outcome(prepare(s, progress=False)) == dict(prepared=0, already=25, failed=0)
    assert len(got) == 3 and not any(map(checksum_in_key, got))

def test_growth_keeps_most_sides(tmp_path):
    "More photos move few of the old ones, and only new ones are embedded; with another backbone, all."
    s, seen = settings(home=tmp_path/'home'), []
    def embed(x):
        seen.append(len(x))
        e = np.stack([np.asarray(Image.fromarray(o).resize((24, 24)), np.float32).ravel() for o in x])
        e -= e.mean(1, keepdims=True)
        return e / np.linalg.norm(e, axis=1, keepdims=True)
    fill(s, 60)
    prepare(s, progress=False)
    first = load_dataset(s, build_dataset(s, embed, progress=False))
    fill(s, 66)
    prepare(s, progress=False)
    second = load_dataset(s, build_dataset(s, embed, progress=False))
    both = first.manifest.merge(second.manifest, on='sha256')
    assert len(both) == 60 and (both.split_x != both.split_y).sum() <= 6
    assert sum(seen) == 66 and load_embeddings(s).shape[0] == 66
    other = build_dataset(settings(home=s.home, arch='resnet18'), embed, progress=False)
    assert other != second.version and sum(seen) == 132 and load_dataset(s).card['embedding'] == 'resnet18 True'
    build_dataset(s, embed, progress=False)
    assert first.card['source'] == 'photos' and json.loads(open_store(s).get('agg/latest.json'))['version'] == second.version

# -- real photos

def test_real_photos(photos, tmp_path):
    "300 photos from the web: splits as promised, flags with reasons, nothing dropped."
    s = settings(home=tmp_path/'home')
    assert add_folder(open_catalog(s), photos/'plants')['new'] == 300
    ingest(s, progress=False)
    assert outcome(prepare(s, progress=False)) == dict(prepared=300, already=0, failed=0)
    build_dataset(s)
    ds = load_dataset(s)
    assert ds.card['source'] == 'photos' and len(ds.manifest) == 300
    for o in ds.card['classes'].values(): assert abs(o['train'] - 105) <= 2 and abs(o['test'] - 22.5) <= 2
    assert ds.manifest.groupby('group').split.nunique().max() == 1
    assert 0 < len(ds.card['flagged']) < 40 and set(','.join(o['flags'] for o in ds.card['flagged']).split(',')) == set(ds.card['flags'])
