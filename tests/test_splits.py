"Near-duplicates, given splits, and photos that are in the catalog more than once."
import io, math, re
import numpy as np, pandas as pd, pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from plant_mlops.core.config import settings
from plant_mlops.core.store import open_store, sha256_of
from plant_mlops.data.catalog import add_rows, list_rows, open_catalog, record_results
from plant_mlops.data.catalog_files import add_folder
from plant_mlops.data.dataset import (
    build_dataset, dataset_version, has_flag, load_dataset, make_card, make_manifest, merge_duplicates)
from plant_mlops.data.given_splits import assign_given_splits
from plant_mlops.data.near_duplicates import MIRROR, NearLimits, near_pairs, select_pairs
from plant_mlops.data.prepare import prepare, prepare_photo
from plant_mlops.data.shards import put_shard
from plant_mlops.data.splits import FRACTIONS, assign_splits
from plant_mlops.data.synthetic import draw
from plant_mlops.photos import stages

# -- Pictures

def encode(img, quality=90) -> bytes:
    file = io.BytesIO()
    img.save(file, 'JPEG', quality=quality)
    return file.getvalue()

def draw_leaf(i, background='white'):
    "A leaf on a plain background, all in about the same position."
    rng = np.random.default_rng([17, i])
    img = Image.new('RGB', (480, 360), background)
    d = ImageDraw.Draw(img)
    length, angle = rng.uniform(250, 330), rng.normal(0, .15)
    width = length*rng.uniform(.3, .6)
    along = np.linspace(0, 1, 50)
    half = width/2*np.sin(np.pi*along**rng.uniform(.7, 1.4))
    x = np.concatenate([along, along[::-1]])*length - length/2
    y = np.concatenate([half, -half[::-1]])
    cos, sin = math.cos(angle), math.sin(angle)
    def place(x, y): return list(zip(240 + cos*x - sin*y, 180 + sin*x + cos*y))
    green = int(rng.integers(90, 190))
    colour = int(green*rng.uniform(.2, .7)), green, int(green*rng.uniform(.1, .5))
    vein = tuple(int(.7*v) for v in colour)
    d.polygon(place(x, y), fill=colour)
    d.line(place(np.array([-.65*length, length/2]), np.zeros(2)), fill=vein, width=3)
    n_veins = int(rng.integers(4, 9))
    for start in np.linspace(-.35, .3, n_veins)*length:
        for side in (1, -1):
            d.line(place(np.array([start, start + width/4]), np.array([0, side*width*.35])), fill=vein, width=2)
    return img

def crop(img, pixels):
    w, h = img.size
    return img.crop((pixels, pixels, w - pixels, h - pixels))

def half_size(img): return img.resize((img.width//2, img.height//2))

COPIES = {
    'saved again': lambda img: Image.open(io.BytesIO(encode(img, 50))), 'half its size': half_size,
    'cropped': lambda img: crop(img, 5), 'mirrored': ImageOps.mirror,
    'brighter': lambda img: ImageEnhance.Brightness(img).enhance(1.15)}

def store_photos(s, photos):
    "Store prepared photos and their rows, as `ingest` and `prepare` would; `photos` are pairs of a label and an image."
    engine, store = open_catalog(s), open_store(s)
    prepared = [prepare_photo(encode(img)) for _, img in photos]
    n_before = len(list_rows(engine))
    urls = [f'file:///made/{n_before + i}.jpg' for i in range(len(photos))]
    add_rows(engine, [dict(url_source=url, label=label) for url, (label, _) in zip(urls, photos)])
    ids = {row['url_source']: row['id'] for row in list_rows(engine)}
    record_results(engine, [dict(id=ids[url], status='stored', sha256=photo.sha256, url_s3='')
                            for url, photo in zip(urls, prepared)])
    put_shard(store, list({photo.sha256: photo for photo in prepared}.values()), s.photo_side)
    return [photo.sha256 for photo in prepared]

# -- Near-duplicates

@pytest.mark.slow
def test_leaves_on_a_white_background_are_no_near_duplicates_but_copies_of_one_are(tmp_path):
    s = settings(home=tmp_path)
    leaves = [draw_leaf(i) for i in range(120)]
    photos = [('leaf', img) for img in leaves] + [('grass', draw('grass', (5, i))) for i in range(20)]
    photos += [('leaf', copy(leaves[i])) for i, copy in enumerate(COPIES.values())]
    sha256 = store_photos(s, photos)
    result = stages.dataset(s, progress=False)
    assert result['warnings'] == []
    manifest = load_dataset(s).manifest.set_index('sha256')
    leaf = manifest[manifest.label == 'leaf']
    counts = leaf.split.value_counts()
    for split, fraction in FRACTIONS.items(): assert abs(counts[split] - fraction*125) <= 4, counts
    assert leaf.group.value_counts().max() <= 12, "a tenth of the class"
    for i, name in enumerate(COPIES):
        assert manifest.group[sha256[i]] == manifest.group[sha256[140 + i]], name

def test_without_embeddings_flat_photos_are_no_near_duplicates_but_copies_are(tmp_path):
    s = settings(home=tmp_path, pretrained=False)
    plain = [Image.new('RGB', (320, 240), colour) for colour in ('red', 'green', 'blue', 'white', 'black', 'grey')]
    flowers = [draw('dandelion', (6, i)) for i in range(24)]
    leaves = [draw_leaf(i, 'black') for i in range(24)]
    photos = [*(('leaf', img) for img in leaves), *(('plain', img) for img in plain)]
    photos += [('flower', img) for img in flowers]
    sha256 = store_photos(s, [*photos, ('flower', half_size(flowers[0])), ('leaf', ImageOps.mirror(leaves[1]))])
    build_dataset(s)
    manifest = load_dataset(s).manifest.set_index('sha256')
    sizes = manifest.groupby('label').group.agg(lambda group: group.value_counts().max())
    assert sizes.plain == 1
    assert sizes.flower == 2
    assert sizes.leaf <= 4
    assert manifest.group[sha256[30]] == manifest.group[sha256[-2]]
    assert manifest.group[sha256[1]] == manifest.group[sha256[-1]]

def test_without_embeddings_the_hash_decides_alone_and_identical_hashes_are_a_pair_under_any_limit():
    photos = pd.DataFrame(dict(phash=['0'*16, '0'*16, '0'*12 + '7fff'], low_information=.8))
    pairs = near_pairs(photos)
    for factor in (1, .5, .25, .1, 0):
        selected = select_pairs(pairs, NearLimits().scaled(factor))
        assert selected[['first', 'second']].values.tolist() == [[0, 1]], factor
    assert len(near_pairs(photos, limits=NearLimits(cosine=1))) == 1

def warp(img, i, amount=.02):
    "A frame of a film: everything has moved a little, each part in another direction."
    rng = np.random.default_rng([5, i])
    def displacement():
        coarse = Image.fromarray(rng.normal(0, amount*img.width, (4, 4)).astype(np.float32))
        return np.asarray(coarse.resize(img.size, Image.BICUBIC))
    y, x = np.mgrid[:img.height, :img.width]
    y = (y + displacement()).round().astype(int).clip(0, img.height - 1)
    x = (x + displacement()).round().astype(int).clip(0, img.width - 1)
    return Image.fromarray(np.asarray(img)[y, x])

def test_frames_of_a_long_film_are_in_one_split_or_have_the_flag_leak(tmp_path):
    s = settings(home=tmp_path, pretrained=False)
    film = draw('dandelion', 11)
    photos = [('film', warp(film, i)) for i in range(40)] + [('film', draw('dandelion', (12, i))) for i in range(40)]
    sha256 = store_photos(s, photos + [('grass', draw('grass', (12, i))) for i in range(10)])
    build_dataset(s)
    dataset = load_dataset(s)
    manifest = dataset.manifest.set_index('sha256')
    frames = manifest.loc[sha256[:40]]
    assert frames.split.nunique() > 1, 'some frames are in another split'
    is_alone = frames.split != frames.split.mode()[0]
    assert has_flag(frames, 'leak')[is_alone].all()
    assert not has_flag(manifest.loc[sha256[40:]], 'leak').any()
    assert any('metrics may be too good' in warning for warning in dataset.card['warnings'])

def test_similar_embeddings_of_two_photos_only_are_a_pair_with_three_times_as_many_bits():
    photos = pd.DataFrame(dict(phash=['0'*16, '0'*10 + 'f'*6, 'f'*8 + '0'*8], low_information=.8)) # 24, 32, 56 bits
    def pairs(angles, photos=photos):
        embedding = np.stack([np.cos(angles), np.sin(angles)], 1)
        return near_pairs(photos, embedding)[['first', 'second']].values.tolist()
    assert pairs([0, .1, 1.5]) == [[0, 1]]
    assert pairs([0, 1.5, .1]) == [], 'too many bits'
    third = photos.assign(phash=[*photos.phash[:2], '0'*7 + 'f'*6 + '000'])
    assert pairs([0, .1, .05], third) == [], 'neither is the only one'
    assert pairs([0, .1, 1.5], photos.assign(low_information=.2)) == [], 'flat'

def make_similar(n, seed):
    """Hashes and embeddings of n photos, and the photo that each is a copy of.

    There are similar pairs, groups and crowds of every degree, some flat, and some mirrored."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, n, dtype=np.uint64)
    embedding = rng.normal(size=(n, 200)) + 1.5*rng.normal(size=(8, 200))[rng.integers(8, size=n)]
    sources = np.arange(n)
    for i in range(n//2, n): # a copy of an earlier photo, often of the same one
        source = sources[i] = int(rng.integers(n//3)) if rng.random() < .7 else int(rng.integers(4))
        bits = rng.choice(64, rng.integers(31), replace=False)
        hashes[i] = hashes[source] ^ np.uint64(sum(1 << int(bit) for bit in bits))
        if rng.random() < .2: hashes[i] ^= MIRROR
        step = rng.normal(size=200)
        length = np.linalg.norm(embedding[source])
        embedding[i] = embedding[source] + rng.uniform(0, .6)*length*step/np.linalg.norm(step)
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    photos = pd.DataFrame(dict(phash=[f'{value:016x}' for value in hashes.tolist()],
                               low_information=np.where(rng.random(n) < .1, .3, .9)))
    return photos, embedding.astype(np.float32), sources

@pytest.mark.parametrize('seed', range(2))
def test_of_many_photos_the_indexes_find_the_pairs_that_a_comparison_of_all_finds(seed):
    photos, embedding, sources = make_similar(800, seed)
    pictures = np.random.default_rng(seed).integers(0, 255, (800, 1, 64, 64), dtype=np.uint8)
    def load_thumbnails(positions): return pictures[sources[positions]].repeat(6, axis=1)
    def pairs(**kw):
        found = near_pairs(photos, embedding, load_thumbnails=load_thumbnails, **kw)
        return {(row.first, row.second, row.needs_pixels, row.is_duplicate) for row in found.itertuples()}
    expected, found = pairs(), pairs(brute_force=0)
    assert len(expected) > 150
    assert sum(needs_pixels for _, _, needs_pixels, _ in expected) > 20
    assert len(expected ^ found) <= .001*len(expected), (expected - found, found - expected)
    without = near_pairs(photos), near_pairs(photos, brute_force=0)
    assert without[0].equals(without[1])

# -- Large groups

def fake_photos(labels, given=None, n_bursts=None):
    "Photos as `make_manifest` takes them, without a store; photos of the same burst have the same hash."
    rng = np.random.default_rng(1)
    n = len(labels)
    bursts = list(range(n)) if n_bursts is None else [i % n_bursts for i in range(n)]
    hashes = [f'{int(rng.integers(2**63)):016x}' for _ in range(max(bursts) + 1)]
    scores = dict.fromkeys(('dark', 'light', 'blurry', 'low_information', 'odd_aspect_ratio', 'grayscale'), 1.)
    return pd.DataFrame(dict(
        sha256=[sha256_of(f'{i}'.encode()) for i in range(n)], label=labels, url_source='file:///a.jpg',
        given=pd.Series(given or [None]*n, dtype=object), copies=1, relabelled=False, label_conflict=False,
        split_conflict=False, shard='fmt/a',
        phash=[hashes[burst] for burst in bursts], **scores))

def counts_of(manifest, label):
    counts = manifest.split[manifest.label == label].value_counts()
    return [int(counts.get(name, 0)) for name in FRACTIONS]

@pytest.mark.parametrize('n, n_bursts', [(60, 1), (60, 2), (120, 12), (3, 1), (30, 3)])
def test_a_class_of_bursts_has_photos_in_every_split_and_a_warning(n, n_bursts):
    photos = fake_photos(['fern']*n, n_bursts=n_bursts)
    manifest = make_manifest(photos, None)
    train, valid, test = counts_of(manifest, 'fern')
    assert min(valid, test) >= max(1, math.floor(.15*n/2))
    assert train >= n/3
    is_whole = n_bursts > 2
    assert (manifest.groupby('original_group').split.nunique().max() == 1) == is_whole
    warnings = make_card(manifest)['warnings']
    is_large = n/n_bursts > n/10
    assert any(f'of its {n} photos look alike' in warning for warning in warnings) == is_large
    assert any('metrics may be too good' in warning for warning in warnings) == (not is_whole)
    assert manifest['flags'].str.contains('leak').any() == (not is_whole)

def test_a_large_group_stays_whole_if_there_are_enough_other_photos():
    photos = fake_photos(['fern']*100)
    photos.loc[:39, 'phash'] = photos.phash[0]
    manifest = make_manifest(photos, None)
    assert manifest.group[:40].nunique() == manifest.split[:40].nunique() == 1
    assert make_card(manifest)['warnings'][0].startswith('fern: 40 of its 100 photos look alike')
    assert min(counts_of(manifest, 'fern')) >= 8

# -- Given splits

def split_of(labels, given, groups=None):
    n = len(labels)
    sha256 = pd.Series([sha256_of(f'{i}'.encode()) for i in range(n)])
    group = pd.Series(range(n) if groups is None else groups)
    return assign_given_splits(sha256, pd.Series(labels), group, pd.Series(given, dtype=object))

def test_a_given_split_is_kept_and_other_photos_are_distributed_as_usual():
    given = ['train']*30 + ['valid']*10 + ['test']*20 + [None]*40
    split = split_of(['fern']*100, given)
    assert split[:60].tolist() == given[:60]
    usual = assign_splits(pd.Series([sha256_of(f'{i}'.encode()) for i in range(60, 100)]),
                          pd.Series(['fern']*40), pd.Series(range(40)))
    assert split[60:].tolist() == usual.tolist()

def test_without_given_splits_the_splits_are_as_assign_splits_gives():
    labels, groups = ['fern', 'moss']*30, [i//3 for i in range(60)]
    sha256 = pd.Series([sha256_of(f'{i}'.encode()) for i in range(60)])
    expected = assign_splits(sha256, pd.Series(labels), pd.Series(groups))
    assert split_of(labels, [None]*60, groups).tolist() == expected.tolist()

@pytest.mark.parametrize('given, expected, lacking', [
    (dict(train=80, test=20), [66, 14, 20], ['valid']),
    (dict(train=80, valid=20), [66, 20, 14], ['test']),
    (dict(train=100), [70, 15, 15], ['test', 'valid']),
    (dict(train=10, test=50), [8, 2, 50], ['valid']), # few-shot
    (dict(train=10, test=90), [8, 2, 90], ['valid']),
    (dict(train=10, valid=50), [8, 50, 2], ['test']),
    (dict(train=2, test=50), [1, 1, 50], ['valid']),
    (dict(test=100), [70, 15, 15], ['train', 'train']), # nothing to train on: as if nothing were given
    (dict(valid=50, test=50), [70, 15, 15], ['train']*4)])
def test_missing_valid_or_test_is_filled_from_training_with_a_warning(given, expected, lacking):
    given = [split for split, n in given.items() for _ in range(n)]
    n = len(given)
    photos = fake_photos(['fern']*n + ['moss']*20, given + [None]*20)
    manifest = make_manifest(photos, None)
    assert counts_of(manifest, 'fern') == expected
    assert counts_of(manifest, 'moss') == [14, 3, 3]
    card = make_card(manifest)
    assert [re.search(r'none was given for (\w+)', warning)[1] for warning in card['warnings']] == lacking
    assert all(warning.startswith('fern: ') for warning in card['warnings'])
    assert sum(card['given_splits'].values()) == n

def test_of_large_training_groups_the_smallest_is_used_for_a_missing_split():
    split = split_of(['fern']*100, ['train']*90 + ['test']*10, [0]*50 + [1]*40 + list(range(2, 12)))
    assert (set(split[:50]), set(split[50:90])) == ({'train'}, {'valid'})

@pytest.mark.parametrize('given, expected', [(['test']*20 + [None], [1, 0, 20]), (['test']*20 + ['train'], [1, 0, 20])])
def test_a_class_with_a_single_training_photo_and_none_for_validation_is_warned_of(given, expected):
    manifest = make_manifest(fake_photos(['fern']*21 + ['moss']*20, given + [None]*20), None)
    assert counts_of(manifest, 'fern') == expected
    assert make_card(manifest)['warnings'] == ['fern has no photo in the valid split. Add more.']

def test_photos_with_train_and_test_given_that_look_alike_stay_there_with_a_warning():
    given = ['train']*60 + ['valid']*10 + ['test']*30
    photos = fake_photos(['fern']*100 + ['moss']*20, given + [None]*20)
    photos.loc[[0, 75, 100], 'phash'] = photos.phash[0]
    manifest = make_manifest(photos, None)
    assert manifest.split[[0, 75, 100]].tolist() == ['train', 'test', 'train'], 'a photo without a given split follows'
    assert all('leak' in flags for flags in manifest['flags'][[0, 75, 100]])
    warning, = make_card(manifest)['warnings']
    assert warning.startswith('1 photo for validation or the test look')

def test_a_class_whose_training_photos_all_look_like_test_photos_has_photos_in_every_split():
    photos = fake_photos(['fern']*10 + ['moss']*20, ['train']*5 + ['test']*5 + [None]*20)
    photos.loc[:9, 'phash'] = photos.phash[0]
    manifest = make_manifest(photos, None)
    assert counts_of(manifest, 'fern') == [4, 1, 5]
    assert set(manifest.split[5:10]) == {'test'}
    assert sum('metrics may be too good' in warning for warning in make_card(manifest)['warnings']) == 1

@pytest.mark.parametrize('setting', [dict(duplicate_bits=0), dict(duplicate_cosine=1)])
def test_settings_say_how_similar_near_duplicates_are(setting):
    photos = pd.DataFrame(dict(phash=['0'*16, '0'*15 + '3'], low_information=.8))
    embedding = np.array([[1, 0], [.98, .2]])
    def n_pairs(s): return len(near_pairs(photos, embedding, NearLimits.from_settings(s)))
    assert (n_pairs(settings()), n_pairs(settings(**setting))) == (1, 0)

def test_a_photo_without_a_given_split_follows_its_near_duplicate():
    photos = fake_photos(['fern']*50, ['test'] + ['train']*20 + [None]*29)
    photos.loc[[0, 30, 40], 'phash'] = photos.phash[0]
    manifest = make_manifest(photos, None)
    assert set(manifest.split[[0, 30, 40]]) == {'test'}
    assert not manifest['flags'].str.contains('leak').any()

def save_folder(folder, photos):
    "Save images as files; `photos` are pairs of a path and an image."
    for path, img in photos:
        (folder/path).parent.mkdir(parents=True, exist_ok=True)
        (folder/path).write_bytes(encode(img))

def build_from(s, folder):
    "Add a folder, and run the stages up to the dataset; returns the dataset and its manifest, by the name of the file."
    add_folder(open_catalog(s), folder)
    stages.ingest(s, progress=False)
    prepare(s, progress=False)
    build_dataset(s)
    dataset = load_dataset(s)
    names = [url.rsplit('/', 1)[1] for url in dataset.manifest.url_source]
    return dataset, dataset.manifest.assign(name=names).set_index('name')

def test_a_folder_of_train_and_test_keeps_its_splits_and_gets_a_valid_split(tmp_path):
    s, folder = settings(home=tmp_path/'home'), tmp_path/'photos'
    drawings = [(label, i, draw(label, (8, i))) for label in ('dandelion', 'grass') for i in range(12)]
    photos = [(f'{"test" if i > 8 else "train"}/{label}/{label}{i}.jpg', img) for label, i, img in drawings]
    photos += [('train/grass/both1.jpg', drawings[21][2]), ('test/grass/both2.jpg', drawings[13][2])]
    save_folder(folder, photos)
    dataset, manifest = build_from(s, folder)
    assert dataset.classes == ['dandelion', 'grass']
    assert dataset.card['classes']['dandelion'] | dict(total=0) == dict(train=7, valid=2, test=3, none=0, total=0)
    conflicts = manifest[has_flag(manifest, 'split_conflict')]
    assert set(conflicts.split) == {'test'}
    assert len(conflicts) == 2
    assert all('none was given for valid' in warning for warning in dataset.card['warnings'])
    assert len(dataset.card['warnings']) == 2
    assert 'warning: grass: ' in repr(dataset)
    assert dataset.card['warnings'] == stages.dataset(s.model_copy(update=dict(pretrained=False)), False)['warnings']

def test_a_photo_that_moves_to_another_class_counts_there(tmp_path):
    s, folder = settings(home=tmp_path/'home'), tmp_path/'photos'
    drawings = [(label, i, draw(label, (9, i))) for label in ('dandelion', 'grass') for i in range(8)]
    save_folder(folder, [(f'{label}/{label}{i}.jpg', img) for label, i, img in drawings])
    _, manifest = build_from(s, folder)
    assert (manifest.label['grass3.jpg'], set(manifest.split)) == ('grass', set(FRACTIONS))
    (folder/'grass/grass3.jpg').rename(folder/'dandelion/grass3.jpg')
    dataset, manifest = build_from(s, folder)
    assert len(manifest) == 16
    assert manifest.label['grass3.jpg'] == 'dandelion'
    assert manifest.split['grass3.jpg'] in FRACTIONS
    assert 'relabelled' in manifest['flags']['grass3.jpg']
    assert dataset.card['flags']['relabelled'] == 1

def test_given_splits_are_part_of_the_version_and_without_any_it_is_as_before():
    manifests = [make_manifest(fake_photos(['fern']*40, given), None) for given in (None, ['train'] + [None]*39)]
    manifests[1][['group', 'split', 'flags']] = manifests[0][['group', 'split', 'flags']]
    assert dataset_version(manifests[0], side=256) == '85e6d38da2bd'
    assert dataset_version(manifests[1], side=256) != dataset_version(manifests[0], side=256)

# -- One photo in several rows

def test_the_newest_row_of_a_photo_gives_its_label_and_url_and_test_counts_before_train():
    old, new = pd.Timestamp('2026-01-01'), pd.Timestamp('2026-02-01')
    rows = [
        dict(id=1, sha256='a', label='fern', url_source='file:///z', added_at=old, split='test'),
        dict(id=2, sha256='a', label='moss', url_source='file:///a', added_at=new, split='train'),
        dict(id=3, sha256='b', label='moss', url_source='file:///b', added_at=new, split=None),
        dict(id=4, sha256='b', label='fern', url_source='file:///c', added_at=old, split=None),
        dict(id=5, sha256='c', label='moss', url_source='file:///d', added_at=old, split='train'),
        dict(id=6, sha256='c', label='fern', url_source='file:///e', added_at=None, split='test'), # its file is missing
        dict(id=7, sha256='d', label='fern', url_source='file:///f', added_at=None, split='test')]
    photos = merge_duplicates(rows[::-1])
    assert photos.label.tolist() == ['moss', 'moss', 'moss', 'fern']
    assert photos.url_source.tolist() == ['file:///a', 'file:///b', 'file:///d', 'file:///f']
    assert photos.given.tolist() == ['test', None, 'train', 'test']
    assert photos.relabelled.tolist() == [True, True, True, False]
    assert photos.split_conflict.tolist() == [True, False, False, False]
    assert photos.copies.tolist() == [2, 2, 2, 1]

def test_which_of_two_labels_of_the_same_command_is_right_is_unknown():
    same, later = pd.Timestamp('2026-01-01 10:00:00.1'), pd.Timestamp('2026-01-01 10:00:00.2')
    def rows(*labels_and_times):
        return [dict(id=i, sha256='a', label=label, url_source=f'file:///{i}', added_at=time, split=None)
                for i, (label, time) in enumerate(labels_and_times)]
    for labels_and_times, expected in (
            ([('fern', same), ('moss', same)], (True, False)), ([('fern', same), ('moss', later)], (False, True)),
            ([('fern', same), ('fern', same)], (False, False)), ([('fern', same), ('moss', None)], (False, True)),
            ([('fern', same), ('moss', same), ('oak', later)], (False, True))):
        photo = merge_duplicates(rows(*labels_and_times)).iloc[0]
        assert (photo.label_conflict, photo.relabelled) == expected, labels_and_times

def test_a_photo_in_the_folders_of_two_classes_is_in_no_split_until_a_later_command_decides(tmp_path):
    s, folder = settings(home=tmp_path/'home'), tmp_path/'photos'
    drawings = [(label, i, draw(label, (9, i))) for label in ('dandelion', 'grass') for i in range(8)]
    photos = [(f'{label}/{label}{i}.jpg', img) for label, i, img in drawings]
    save_folder(folder, [*photos, ('dandelion/grass3.jpg', drawings[11][2])])
    dataset, manifest = build_from(s, folder)
    assert len(manifest) == 16
    assert (manifest.split['grass3.jpg'], manifest['flags']['grass3.jpg']) == ('none', 'exact_duplicate,label_conflict')
    assert dataset.card['flags'] == dict(exact_duplicate=1, label_conflict=1)
    assert dataset.card['warnings'] == []
    (folder/'dandelion/grass3.jpg').unlink()
    _, manifest = build_from(s, folder)
    assert (manifest.split['grass3.jpg'] in FRACTIONS, manifest.label['grass3.jpg']) == (True, 'grass')
