"Photos as devices make them: formats, orientations, damaged metadata, colours, sizes, and files that are no photos."
import base64, io, itertools, struct, subprocess, sys, threading, time, zlib
import numpy as np, pytest
from fastapi.testclient import TestClient
from PIL import Image, ImageCms
from helpers import require, root
from plant_mlops.core.colour_profile import cicp_profile, make_rgb_profile
from plant_mlops.core.config import settings
from plant_mlops.core.file_kind import HEAD_SIZE, file_kind, photo_format
from plant_mlops.core.photo_file import clean_png
from plant_mlops.core.store import sha256_of
from plant_mlops.data.catalog import add_rows, list_rows, open_catalog
from plant_mlops.data.catalog_files import add_folder
from plant_mlops.data.ingest import ingest
from plant_mlops.data.photo import (
    PhotoError, PhotoInfo, PhotoLimits, check_photo, decode_for_model, open_photo, photo_limits)
from plant_mlops.data.prepare import prepare, prepare_photo
from plant_mlops.photos.workload import photo_inputs
from plant_mlops.registry.example_model import example_model
from plant_mlops.serve.api import create_app
from plant_mlops.serve.onnx_model import Model

require('pillow-heif', at_module_level=True)
import pillow_heif

WIDTH, HEIGHT = 360, 270
QUARTERS = ((200, 40, 40), (40, 160, 60), (50, 60, 190), (220, 200, 60)) # colours, clockwise from the upper left

def quarters(size=(WIDTH, HEIGHT)):
    "A picture whose quarters have different colours, so that a wrong rotation or colour is seen."
    small = Image.new('RGB', (2, 2))
    small.putdata([QUARTERS[0], QUARTERS[1], QUARTERS[3], QUARTERS[2]])
    return small.resize(size, Image.Resampling.NEAREST)

def encode(img, format='JPEG', **options) -> bytes:
    file = io.BytesIO()
    img.save(file, format, **options)
    return file.getvalue()

def heic(*images, **options) -> bytes:
    "A HEIC with one or more pictures."
    container = pillow_heif.from_pillow(images[0])
    for img in images[1:]: container.add_from_pillow(img)
    file = io.BytesIO()
    container.save(file, **options)
    return file.getvalue()

def heic_of_10_bits(img) -> bytes:
    deep = np.asarray(img).astype('uint16')*257
    file = io.BytesIO()
    pillow_heif.encode('RGB;16', img.size, deep.tobytes(), file, quality=90)
    return file.getvalue()

def exif_of(orientation) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()

def png_chunk(kind, data, checksum=None) -> bytes:
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', checksum or zlib.crc32(kind + data))

def with_png_chunk(png, chunk) -> bytes:
    "A PNG with another chunk behind its header."
    return png[:33] + chunk + png[33:]

def png_of_16_bits(img) -> bytes:
    "An RGB photo as a PNG with 16 bits in each channel, which Pillow does not write."
    pixels = np.asarray(img).astype('>u2')*257
    rows = b''.join(b'\0' + row.tobytes() for row in pixels)
    header = struct.pack('>IIBBBBB', *img.size, 16, 2, 0, 0, 0)
    chunks = ((b'IHDR', header), (b'IDAT', zlib.compress(rows)), (b'IEND', b''))
    return b'\x89PNG\r\n\x1a\n' + b''.join(png_chunk(*chunk) for chunk in chunks)

def transparent_palette(img) -> bytes:
    return encode(img.quantize(16), 'PNG', transparency=15)

def colours_of(img) -> list:
    "Mean colours of the quarters of an image, clockwise from the upper left."
    pixels = np.asarray(img.convert('RGB'), float)
    h, w = pixels.shape[0]//2, pixels.shape[1]//2
    parts = pixels[:h, :w], pixels[:h, w:], pixels[h:, w:], pixels[h:, :w]
    return [part[part.shape[0]//4:-part.shape[0]//4, part.shape[1]//4:-part.shape[1]//4].mean((0, 1)) for part in parts]

def assert_upright(data, size=(WIDTH, HEIGHT), eps=4):
    "Check that a photo is read with its quarters in place and in their colours."
    info = check_photo(data)
    assert (info.width, info.height) == size
    small = open_photo(data)
    assert min(small.size) == 256 and (small.width > small.height) == (size[0] > size[1])
    assert np.abs(np.subtract(colours_of(small), QUARTERS)).max() <= eps

# -- Formats

other = Image.new('RGB', (WIDTH, HEIGHT), 'white')
rotated = quarters().transpose(Image.Transpose.ROTATE_90)
# Name of a file, some of which are wrong → a function that makes it.
FORMATS = {
    'IMG_0001.HEIC': lambda: heic(quarters(), quality=90),
    'grid.heif': lambda: heic(quarters(), quality=90, tile_size=128),
    'ten bits.heic': lambda: heic_of_10_bits(quarters()),
    'second is the main picture.heic': lambda: heic(other, quarters(), primary_index=1, quality=90),
    'transparent.heic': lambda: heic(quarters().convert('RGBA'), quality=90),
    'photo.avif': lambda: encode(quarters(), 'AVIF', quality=90),
    'sequence.avif': lambda: encode(quarters(), 'AVIF', quality=90, save_all=True, append_images=[other, other]),
    'photo.jfif': lambda: encode(quarters(), quality=95),
    'photo.jpe': lambda: encode(quarters(), quality=95, progressive=True),
    'photo.pjpeg': lambda: encode(quarters().convert('CMYK'), quality=95),
    'stereo.mpo': lambda: encode(quarters(), 'MPO', quality=95, save_all=True, append_images=[other]),
    'no suffix': lambda: encode(quarters(), 'PNG'),
    'jpeg.png': lambda: encode(quarters(), quality=95),
    'heic.jpg': lambda: heic(quarters(), quality=90),
    'text.txt': lambda: encode(quarters(), 'WEBP', quality=95),
    '16 bits.png': lambda: png_of_16_bits(quarters()),
    'palette.png': lambda: transparent_palette(quarters()),
    'transparent.png': lambda: encode(quarters().convert('RGBA'), 'PNG'),
    'animated.webp': lambda: encode(quarters(), 'WEBP', quality=95, save_all=True, append_images=[other]),
    'animated.gif': lambda: encode(quarters(), 'GIF', save_all=True, append_images=[other]),
    'scan.tif': lambda: encode(quarters(), 'TIFF', compression='tiff_lzw'),
    'big.tif': lambda: encode(quarters(), 'TIFF', big_tiff=True),
    'bitmap.dib': lambda: encode(quarters(), 'BMP')}

@pytest.mark.parametrize('name', FORMATS)
def test_a_photo_of_any_format_is_read_with_its_colours(name):
    assert_upright(FORMATS[name](), eps=8 if name == 'photo.pjpeg' else 4)

def test_photos_are_ingested_by_their_content_and_read_alike_in_training_evaluation_and_serving(tmp_path):
    s = settings(home=tmp_path/'home')
    photos = {name: make() for name, make in FORMATS.items()}
    for name, data in photos.items(): (tmp_path/name).write_bytes(data)
    engine = open_catalog(s)
    add_rows(engine, [dict(url_source=(tmp_path/name).as_uri(), label='grass') for name in photos])
    result = ingest(s, progress=False)
    assert result['stored'] == len(photos), [row['error'] for row in list_rows(engine)]
    model = Model(example_model())
    ids = [sha256_of(data) for data in photos.values()]
    for name, data, evaluated in zip(photos, photos.values(), photo_inputs(s, '', ids, model.spec)):
        served = model.decode(data)
        assert (served == evaluated).all(), name
        trained = decode_for_model(prepare_photo(data).jpeg, model.spec)
        assert np.abs(served.astype(int) - trained).mean() < 1.5, name # the prepared photo is a JPEG

def test_a_heic_sent_to_the_server_gets_a_prediction_and_one_that_is_cut_off_an_error():
    photo = FORMATS['IMG_0001.HEIC']()
    with TestClient(create_app(settings(), Model(example_model()))) as client:
        assert client.post('/predict', files={'file': ('IMG_0001.HEIC', photo)}).status_code == 200
        text = base64.b64encode(photo)
        assert client.post('/predict', content=text).status_code == 200
        assert client.post('/predict', json=dict(image=text.decode())).status_code == 200
        for length in (len(photo)//2, 100, 40):
            r = client.post('/predict', content=photo[:length])
            assert r.status_code == 422 and 'cut off' in r.json()['detail'], r.text

WITHOUT_HEIF = """
import sys
sys.modules['pillow_heif'] = None
from fastapi.testclient import TestClient
from plant_mlops.core.config import settings
from plant_mlops.core.file_kind import HEAD_SIZE, file_kind, photo_format
from plant_mlops.core.photo_file import clean_png
from plant_mlops.registry.example_model import example_model
from plant_mlops.serve.api import create_app
from plant_mlops.serve.onnx_model import Model
with TestClient(create_app(settings(), Model(example_model()))) as client:
    heic = sys.stdin.buffer.read()
    for _ in range(2): r = client.post('/predict', content=heic)
print(r.status_code, r.json()['detail'])
"""

def test_without_its_decoder_a_heic_is_refused_and_the_log_says_what_to_install():
    command = [sys.executable, '-c', WITHOUT_HEIF]
    r = subprocess.run(command, input=FORMATS['IMG_0001.HEIC'](), capture_output=True, check=True)
    assert r.stdout.startswith(b'415') and b'send a JPEG, or ask the operator' in r.stdout
    assert b'pip install' not in r.stdout, 'the sender cannot install anything on the server'
    assert r.stderr.count(b'pip install "plant_mlops[heic]"') == 1, 'logged once, although two were sent'

def test_the_server_starts_without_decoders_that_most_photos_do_not_need():
    code = 'import sys, plant_mlops.serve.api; print(*sys.modules)'
    loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert not {'pillow_heif', '_pillow_heif', 'PIL.ImageCms', 'PIL.AvifImagePlugin'} & {*loaded}

# -- What is not a photo

def movie(main, *others) -> bytes:
    return struct.pack('>I', 16 + 4*len(others)) + b'ftyp' + main + bytes(4) + b''.join(others) + bytes(500)

EDITS = (b'<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN">\n'
         b'<plist version="1.0"><dict><key>adjustmentBaseVersion</key><integer>0</integer></dict></plist>')
def raw_photo(tags) -> bytes:
    "What a program that knows nothing of raw files sees of one: a small TIFF."
    return encode(quarters((160, 120)), 'TIFF', tiffinfo={254: 1, **tags})

NOT_PHOTOS = {
    'IMG_0001.MOV': (movie(b'qt  ', b'qt  '), 'MOV video'),
    'old.mov': (b'\0\0\0\x08wide' + bytes(100), 'MOV video'),
    'clip.mp4': (movie(b'isom', b'isom', b'mif1'), 'MP4 video'),
    'IMG_0001.AAE': (EDITS, 'AAE'),
    'movie.heic': (movie(b'qt  '), 'MOV video'),
    'scan.pdf': (b'%PDF-1.7\n' + bytes(100), 'PDF'),
    'notes.jpg': (b'Buy milk and eggs.\n'*10, 'text'),
    'body.jpg': (b'BMI,height\n21.3,1.80\n'*10, 'text'),
    'plants.xml': (b'<?xml version="1.0"?><table><header>Plants</header></table>', 'XML'),
    'thumbnail.tif': (raw_photo({50706: b'\1\4\0\0'}), 'raw photo (DNG)'),
    'nikon.jpg': (raw_photo({271: 'NIKON CORPORATION', 330: 8}), 'raw photo (NEF)'),
    'sony.tiff': (raw_photo({271: 'SONY', 330: 8}), 'raw photo (ARW)'),
    'other.tif': (raw_photo({330: 8}), 'raw photo'),
    'canon.tif': (b'II*\0\x10\0\0\0CR\2\0' + bytes(100), 'raw photo (CR2)'),
    'all.zip': (b'PK\x03\x04' + bytes(100), 'ZIP')}

def test_files_that_are_no_photos_are_rejected_with_their_kind(tmp_path):
    s = settings(home=tmp_path/'home')
    for name, (data, _) in NOT_PHOTOS.items(): (tmp_path/name).write_bytes(data)
    engine = open_catalog(s)
    add_rows(engine, [dict(url_source=(tmp_path/name).as_uri(), label='grass') for name in NOT_PHOTOS])
    assert ingest(s, progress=False)['rejected'] == len(NOT_PHOTOS)
    errors = {row['url_source'].rpartition('/')[2]: row['error'] for row in list_rows(engine)}
    for name, (_, kind) in NOT_PHOTOS.items():
        assert 'not a photo' in errors[name] and kind in errors[name], errors[name]

def test_a_raw_photo_whose_tags_are_at_its_end_is_rejected_by_all_of_its_bytes():
    raw = raw_photo({50706: b'\1\4\0\0'})
    tags = raw[8:]
    moved = raw[:4] + struct.pack('<I', 8 + len(tags)) + tags + tags # libtiff writes the tags behind the pixels
    assert raw[:2] == b'II' and photo_format(moved[:HEAD_SIZE]) == 'TIFF' and file_kind(moved) == 'raw photo (DNG)'
    with pytest.raises(PhotoError, match='DNG.* as a JPEG'): check_photo(moved)

def tiff_tags(*tags) -> bytes:
    "The start of a page of a TIFF: for each tag its number, type (3: 16 bits, 4: 32 bits) and value."
    entries = [struct.pack('<HHII', tag, type, 1, value) for tag, type, value in tags]
    return struct.pack('<H', len(tags)) + b''.join(entries)

def tiff_of(pixels, tags, exif=None) -> bytes:
    "A TIFF of one page of 300 × 300 pixels; `exif` makes its EXIF for the position where it will be."
    n_tags = 4 + len(tags) + (exif is not None)
    pixels_at = 8 + 2 + 12*n_tags + 4
    exif_at = pixels_at + len(pixels)
    tags = [(256, 3, 300), (257, 3, 300), *tags, (273, 4, pixels_at), (278, 3, 300)]
    if exif: tags.append((34665, 4, exif_at))
    return b'II*\0\x08\0\0\0' + tiff_tags(*sorted(tags)) + bytes(4) + pixels + (exif(exif_at) if exif else b'')

def pages(*images, **tags) -> bytes:
    "A TIFF with several pages; `first` and `rest` are their tags."
    file = io.BytesIO()
    for img, page_tags in zip(images, [tags.get('first', {})] + [tags.get('rest', {})]*(len(images) - 1)):
        img.encoderinfo = dict(tiffinfo=page_tags)
    images[0].save(file, 'TIFF', save_all=True, append_images=images[1:], tiffinfo=tags.get('first', {}))
    return file.getvalue()

FIRST_PAGES = { # name → tags of a page that is a thumbnail
    'flagged': {254: 1}, 'flagged as in old files': {255: 2}, 'not flagged': {}, 'of a scanner': {254: 1, 271: 'Nikon'}}

@pytest.mark.parametrize('first', FIRST_PAGES)
def test_the_full_page_of_a_tiff_is_read_and_not_its_thumbnail(first):
    tiff = pages(other.resize((160, 120)), quarters((1200, 900)), first=FIRST_PAGES[first])
    assert_upright(tiff, size=(1200, 900))

def test_the_first_page_of_a_tiff_is_read_if_it_is_no_thumbnail():
    assert_upright(pages(quarters(), other.resize((1200, 900)), rest={254: 1}))
    assert_upright(pages(quarters(), other.resize((1200, 900))))
    assert_upright(encode(quarters(), 'TIFF', tiffinfo={254: 1}))
    assert_upright(encode(quarters(), 'TIFF', tiffinfo={271: 'Nikon', 330: 8}), size=(WIDTH, HEIGHT))

def test_a_tiff_of_many_pages_is_refused_in_time_that_grows_with_its_size():
    page = tiff_tags((256, 4, 9), (257, 4, 9), (273, 4, 8))
    size = len(page) + 4
    def tiff(n):
        pages = (page + struct.pack('<I', 8 + size*i if i < n else 0) for i in range(1, n + 1))
        return b'II*\0\x08\0\0\0' + b''.join(pages)
    def refuse(data):
        with pytest.raises(PhotoError, match='frames'): check_photo(data)
    assert seconds(refuse, tiff(60_000)) < 25*seconds(refuse, tiff(3_000)), '20 times as many'

def seconds(f, data) -> float:
    "Processor time of a call, the shortest of three."
    times = []
    for _ in range(3):
        start = time.process_time()
        f(data)
        times.append(time.process_time() - start)
    return min(times)

def test_the_photos_of_an_iphone_are_added_and_its_videos_and_edits_counted(tmp_path):
    s, n = settings(home=tmp_path/'home'), 3
    for label in ('fern', 'moss'):
        folder = tmp_path/'photos'/label
        folder.mkdir(parents=True)
        for i in range(n):
            (folder/f'IMG_000{i}.HEIC').write_bytes(heic(quarters(), quality=70 + 2*i + (label == 'fern')))
            (folder/f'IMG_000{i}.MOV').write_bytes(NOT_PHOTOS['IMG_0001.MOV'][0])
            (folder/f'IMG_000{i}.AAE').write_bytes(EDITS)
    result = add_folder(open_catalog(s), tmp_path/'photos')
    notes = ' '.join(result.notes)
    assert result.new == 2*n and '6 MOV video' in notes and '6 AAE' in notes
    assert ingest(s, progress=False)['stored'] == 2*n
    assert prepare(s, progress=False)['failed'] == 0

# -- Orientation

TRANSPOSE = { # orientation → how a camera in that position stores an upright picture
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270}
OPTIONS = dict(JPEG=dict(quality=95), PNG={}, WEBP=dict(quality=95), TIFF={}, AVIF=dict(quality=90))

@pytest.mark.parametrize('format', [*OPTIONS, 'HEIC'])
@pytest.mark.parametrize('orientation', TRANSPOSE)
def test_a_photo_is_turned_upright_once(format, orientation):
    stored, exif = quarters().transpose(TRANSPOSE[orientation]), exif_of(orientation)
    # as an iPhone, pillow-heif says in the container and in EXIF how the photo is turned; only the container counts
    if format == 'HEIC': data = heic(stored, exif=exif, quality=90)
    else: data = encode(stored, format, exif=exif, **OPTIONS[format])
    assert_upright(data)

# -- Damaged metadata

BROKEN_EXIF = {
    'no header': b'Exif\0\0damaged',
    'header only': b'Exif\0\0II*\0\x08\0\0\0',
    'points outside': b'Exif\0\0II*\0\xff\xff\xff\x7f',
    'entries cut off': b'Exif\0\0MM\0*\0\0\0\x08\0\x50\x01\x12\0\x03\0\0',
    'bad orientation': exif_of(77)}

@pytest.mark.parametrize('damage', BROKEN_EXIF)
@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'WEBP', 'AVIF', 'HEIC'])
def test_a_photo_with_damaged_exif_is_not_rotated(format, damage):
    exif = BROKEN_EXIF[damage]
    if format == 'HEIC': data = heic(quarters(), exif=exif, quality=90)
    elif format == 'AVIF': data = avif_with_exif(exif)
    else: data = encode(quarters(), format, exif=exif, **OPTIONS[format])
    assert_upright(data)

def avif_with_exif(exif) -> bytes:
    "An AVIF with EXIF that Pillow, which checks it, would not write."
    good = Image.Exif()
    good[0x010f] = 'maker of the camera'*3
    stored = good.tobytes().removeprefix(b'Exif\0\0')
    data = encode(quarters(), 'AVIF', exif=good, quality=90)
    assert data.count(stored) == 1
    return data.replace(stored, exif.removeprefix(b'Exif\0\0').ljust(len(stored), b'\xff'))

def test_a_tiff_whose_exif_points_outside_of_the_file_is_read():
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769)[0x9003] = '2024:05:01 12:00:00' # the EXIF part of the metadata
    tiff = encode(quarters().transpose(TRANSPOSE[6]), 'TIFF', exif=exif.tobytes())
    def pack(layout, *values): return struct.pack(('<' if tiff[:2] == b'II' else '>') + layout, *values)
    entry = tiff.index(pack('HHI', 0x8769, 4, 1))
    for pointer in (0xfffffff0, len(tiff) - 3, 0):
        assert_upright(tiff[:entry + 8] + pack('I', pointer) + tiff[entry + 12:])
    assert_upright(tiff[:entry] + pack('HHIi', 0x8769, 9, 1, -5) + tiff[entry + 12:]) # a number with a sign

def test_a_png_is_read_if_only_its_metadata_are_damaged():
    png, p3 = encode(quarters(), 'PNG'), cicp_profile(12, 13)
    text = b'Comment\0\0' + zlib.compress(bytes(2_000_000))
    for chunk in (
        png_chunk(b'eXIf', exif_of(6), checksum=1),
        png_chunk(b'iCCP', b'p\0\0' + zlib.compress(p3), checksum=1),
        png_chunk(b'iCCP', b'p\0\0' + b'no zlib'),
        png_chunk(b'zTXt', text),
        png_chunk(b'tEXt', b'Raw profile type exif\0\nexif\n  12\nno hexadecimal'),
    ): assert_upright(with_png_chunk(png, chunk))
    with pytest.raises(PhotoError, match='damaged'): check_photo(png[:33] + png_chunk(b'IDAT', b'x', 1) + png[33:])

def test_a_png_of_many_chunks_is_read_in_time_that_grows_with_its_size():
    png, chunk = encode(quarters(), 'PNG'), png_chunk(b'iTXt', b'')
    few, many = png[:33] + chunk*5_000 + png[33:], png[:33] + chunk*40_000 + png[33:]
    assert clean_png(many) == png
    assert seconds(clean_png, many) < 24*seconds(clean_png, few), '8 times as many'

def test_only_the_first_profile_of_a_png_is_decompressed():
    profile = png_chunk(b'iCCP', b'p\0\0' + zlib.compress(P3 + bytes(1_000_000)))
    png = with_png_chunk(encode(converted(P3), 'PNG'), profile*500)
    assert len(clean_png(png)) < len(png)/50
    assert_upright(png, eps=7)

def test_a_jpeg_whose_list_of_further_pictures_is_damaged_is_read():
    mpo = FORMATS['stereo.mpo']()
    at = mpo.index(b'MPF\0') + 4
    for n in (8, 14, 24, 60): assert_upright(mpo[:at + n] + b'\xff'*6 + mpo[at + n + 6:])
    assert_upright(mpo[:at + 30] + b'\5' + mpo[at + 31:]) # five pictures, of which two are listed

# -- Colours

P3 = cicp_profile(12, 13)
ADOBE_RGB = make_rgb_profile(((.64, .33), (.21, .71), (.15, .06)), lambda x: x**2.19921875)
PROPHOTO = make_rgb_profile(((.7347, .2653), (.1596, .8404), (.0366, .0001)), lambda x: x**1.8, white=(.3457, .3585))
PROFILES = {'Display P3': P3, 'Adobe RGB': ADOBE_RGB, 'ProPhoto': PROPHOTO}

def converted(profile):
    "The quarters with the numbers that a colour space has for them."
    target = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    img = ImageCms.profileToProfile(quarters(), ImageCms.createProfile('sRGB'), target,
                                    renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC)
    del img.info['icc_profile']
    return img

@pytest.mark.parametrize('format', [*OPTIONS, 'HEIC'])
@pytest.mark.parametrize('name', PROFILES)
def test_colours_of_a_profile_become_those_of_srgb(name, format):
    img, profile = converted(PROFILES[name]), PROFILES[name]
    assert np.abs(np.subtract(colours_of(img), QUARTERS)).max() > 15, 'the numbers differ'
    options = dict(icc_profile=profile)
    data = heic(img, quality=95, **options) if format == 'HEIC' else encode(img, format, **options, **OPTIONS[format])
    is_coarse = name == 'ProPhoto' and format in ('AVIF', 'HEIC') # a level of ProPhoto is several of sRGB
    assert_upright(data, eps=15 if is_coarse else 7)

def test_colours_of_display_p3_are_converted_as_the_standard_says():
    "The matrix of the CSS Color Module, from light in Display P3 to light in sRGB."
    matrix = np.array([[1.2249, -.2247, 0], [-.0420, 1.0419, 0], [-.0197, -.0786, 1.0979]])
    for p3 in ((180, 60, 60), (70, 120, 60), (120, 130, 200), (128, 128, 128), (250, 240, 120)):
        x = np.array(p3)/255
        light = (matrix @ np.where(x <= .04045, x/12.92, ((x + .055)/1.055)**2.4)).clip(0, 1)
        srgb = 255*np.where(light <= .0031308, light*12.92, 1.055*light**(1/2.4) - .055)
        png = encode(Image.new('RGB', (300, 300), p3), 'PNG', icc_profile=P3)
        assert np.abs(np.subtract(open_photo(png).getpixel((9, 9)), srgb)).max() <= 2, p3

def test_a_heic_and_an_avif_whose_colour_space_is_a_number_are_converted():
    img = converted(P3)
    assert_upright(heic(img, quality=95, color_primaries=12, transfer_characteristics=13), eps=7)
    avif = encode(img, 'AVIF', quality=95)
    nclx_of_srgb, nclx_of_p3 = (b'colrnclx' + bytes([0, primaries, 0, 13]) for primaries in (1, 12))
    assert avif.count(nclx_of_srgb) == 1
    assert_upright(avif.replace(nclx_of_srgb, nclx_of_p3), eps=7)
    assert_upright(with_png_chunk(encode(img, 'PNG'), png_chunk(b'cICP', bytes([12, 13, 0, 1]))), eps=4)

def green_of(data) -> tuple: return open_photo(data).getpixel((9, 9))

green = Image.new('RGB', (300, 300), (100, 150, 60))

def with_exif_of_a_camera(colour_space, index) -> bytes:
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({0xa001: colour_space, 0xa005: {1: index}})
    return exif.tobytes()

@pytest.mark.parametrize('format', ['JPEG', 'MPO'])
def test_adobe_rgb_that_is_named_only_in_exif_is_converted(format):
    def convert(*exif): return green_of(encode(green, format, exif=with_exif_of_a_camera(*exif), quality=95))
    assert np.abs(np.subtract(convert(65535, 'R03'), (66, 151, 48))).max() <= 3
    for exif in ((65535, 'R98'), (1, 'R98'), (1, 'R03')):
        assert np.abs(np.subtract(convert(*exif), (100, 150, 60))).max() <= 1

def test_adobe_rgb_of_a_tiff_that_is_named_only_in_exif_is_converted():
    def exif(at): # followed by the tags of the standard DCF
        tags = tiff_tags((0xa001, 3, 65535), (0xa005, 4, at + 30)) + bytes(4)
        return tags + struct.pack('<HHHI4sI', 1, 1, 2, 4, b'R03', 0)
    tiff = tiff_of(bytes([100, 150, 60])*90_000, [(258, 3, 8), (262, 3, 2), (277, 3, 3)], exif)
    assert np.abs(np.subtract(green_of(tiff), (66, 151, 48))).max() <= 3

def test_a_profile_of_a_png_may_be_large():
    large = P3 + np.random.default_rng(0).bytes(1_500_000) # Pillow's limit is a megabyte
    assert np.abs(np.subtract(green_of(encode(green, 'PNG', icc_profile=large)), (83, 152, 42))).max() <= 1
    bomb = with_png_chunk(encode(green, 'PNG'), png_chunk(b'iCCP', b'p\0\0' + zlib.compress(bytes(20_000_000))))
    assert green_of(bomb) == (100, 150, 60)

def test_the_numbers_of_a_png_are_found_behind_large_metadata():
    cicp = png_chunk(b'cICP', bytes([12, 13, 0, 1]))
    exif = png_chunk(b'eXIf', exif_of(1).removeprefix(b'Exif\0\0') + bytes(70_000))
    for chunks in (cicp + exif, exif + cicp):
        assert np.abs(np.subtract(green_of(with_png_chunk(encode(green, 'PNG'), chunks)), (83, 152, 42))).max() <= 1

@pytest.mark.parametrize('numbers', [(2, 2), (12, 2), (77, 13), (1, 200)])
def test_numbers_that_are_not_known_do_not_hide_a_profile(numbers):
    png = with_png_chunk(encode(green, 'PNG', icc_profile=P3), png_chunk(b'cICP', bytes([*numbers, 0, 1])))
    assert np.abs(np.subtract(green_of(png), (83, 152, 42))).max() <= 1

def grey_level(greys, format='TIFF', **options) -> float:
    "The mean of a photo whose greys are these numbers."
    return np.asarray(open_photo(encode(Image.fromarray(greys), format, **options))).mean()

RAMP = np.linspace(0, 1, 90_000, dtype=np.float32).reshape(300, 300)
def flat(level): return np.full((300, 300), level, np.uint16)

GREYS = { # name → numbers of a photo, and the mean level that is expected
    'floats to 1.01': (RAMP*1.01, 128),
    'dark floats': (RAMP*.5, 64),
    'floats to 60,000': (RAMP*60_000, 127),
    'floats to 255': (RAMP*255, 127),
    'floats of which half are no numbers': (np.where(RAMP > .5, np.nan, RAMP), 32),
    'black floats': (RAMP*0, 0),
    '1 of 65535': (flat(1), 0),
    '200 of 65535': (flat(200), 0),
    '4095 of 65535': (flat(4095), 15),
    '16 bits': ((RAMP*65535).astype(np.uint16), 127),
    '32 bits': ((RAMP*255).astype(np.int32), 127)}

@pytest.mark.parametrize('name', GREYS)
def test_greys_are_scaled_by_the_depth_of_the_file(name):
    greys, expected = GREYS[name]
    assert abs(grey_level(greys) - expected) <= 1
    if greys.dtype == np.uint16: assert abs(grey_level(greys, 'PNG') - expected) <= 1

def test_a_tiff_says_which_number_is_white():
    half = np.full((300, 300), 2048, np.uint16)
    assert abs(grey_level(half, tiffinfo={341: 4095}) - 127) <= 1
    packed = b'\x80\x08\x00'*(300*150) # 12 bits a pixel: 0x800 and 0x800
    tiff = tiff_of(packed, [(258, 3, 12), (262, 3, 1)])
    assert abs(np.asarray(open_photo(tiff)).mean() - 127) <= 1

def test_a_tiff_of_16_bits_may_say_that_0_is_white():
    tiff = encode(Image.fromarray(np.full((300, 300), 65535*3//4, np.uint16)), 'TIFF')
    entry = struct.pack('<HHI', 262, 3, 1)
    assert tiff.count(entry + b'\1\0') == 1
    assert abs(np.asarray(open_photo(tiff.replace(entry + b'\1\0', entry + b'\0\0'))).mean() - 64) <= 1

def icc_header(*fields) -> bytes:
    "The first 128 bytes of an ICC profile: size, class, colours, connection space."
    size, *names = fields
    header = struct.pack('>I4xI4s4s4s12x4s', size, 0x02400000, *names, b'acsp').ljust(68, b'\0')
    return header + struct.pack('>iii', 63190, 65536, 54061).ljust(60, b'\0')

def grey_profile(gamma) -> bytes:
    "An ICC profile of greys: light is the number to the power of gamma."
    white = b'XYZ \0\0\0\0' + struct.pack('>iii', 63190, 65536, 54061)
    curve = b'curv\0\0\0\0' + struct.pack('>IH2x', 1, round(gamma*256))
    index = struct.pack('>I', 2) + b'wtpt' + struct.pack('>II', 156, 20) + b'kTRC' + struct.pack('>II', 176, 16)
    return icc_header(192, b'mntr', b'GRAY', b'XYZ ') + index + white + curve

@pytest.mark.parametrize('mode', ['L', 'LA'])
def test_greys_of_a_profile_become_those_of_srgb(mode):
    half_the_light = Image.new(mode, (300, 300), 128 if mode == 'L' else (128, 255))
    png = encode(half_the_light, 'PNG', icc_profile=grey_profile(1.))
    assert abs(open_photo(png).getpixel((9, 9))[0] - 188) <= 2 # half the light is 188 in sRGB
    assert abs(open_photo(encode(half_the_light, 'PNG', icc_profile=P3)).getpixel((9, 9))[0] - 128) <= 1

def cmyk_profile() -> bytes:
    "An ICC profile of inks where cyan looks like pure blue, so that its use is seen."
    def lab(l, a, b): return bytes([round(l*2.55), a + 128, b + 128])
    corners = [lab(95 - 20*(c + m + y) - 30*k, 0, -60*c) for c, m, y, k in itertools.product((0, 1), repeat=4)]
    linear = bytes(range(256))
    table = b'mft1\0\0\0\0' + bytes([4, 3, 2, 0]) + struct.pack('>9i', 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table += linear*4 + b''.join(corners) + linear*3
    white = b'XYZ \0\0\0\0' + struct.pack('>iii', 63190, 65536, 54061)
    index = struct.pack('>I', 2) + b'wtpt' + struct.pack('>II', 156, 20) + b'A2B0' + struct.pack('>II', 176, len(table))
    return icc_header(176 + len(table), b'prtr', b'CMYK', b'Lab ') + index + white + table

@pytest.mark.parametrize('format', ['JPEG', 'TIFF'])
def test_cmyk_is_converted_by_its_profile(format):
    cyan = Image.new('CMYK', (300, 300), (255, 0, 0, 0))
    red, green, blue = open_photo(encode(cyan, format, icc_profile=cmyk_profile(), **OPTIONS[format])).getpixel((9, 9))
    assert blue - green > 60, 'cyan of this profile is blue'
    assert open_photo(encode(cyan, format, **OPTIONS[format])).getpixel((9, 9))[1] > 200, 'without it, cyan'

def test_a_profile_that_is_damaged_or_for_other_images_changes_nothing():
    plain = np.asarray(open_photo(encode(quarters(), 'PNG')))
    for profile in (b'junk', P3[:400], P3[:128] + bytes(2000), cmyk_profile(), grey_profile(1.), b'\0'*200_000):
        assert (np.asarray(open_photo(encode(quarters(), 'PNG', icc_profile=profile))) == plain).all()

# -- Large photos

def large_jpeg() -> bytes: return encode(Image.new('L', (12_000, 9_000), 90), quality=50)

PEAK = """
import re, sys
from plant_mlops.data.photo import PhotoLimits, check_photo, open_photo
data = sys.stdin.buffer.read()
def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])//1024
before = peak()
print(*check_photo(data).__dict__.values(), *open_photo(data).size, peak() - before)
"""

def test_a_photo_of_108_megapixels_takes_little_memory():
    r = subprocess.run([sys.executable, '-c', PEAK], input=large_jpeg(), capture_output=True, check=True)
    width, height, format, small_width, small_height, megabytes = r.stdout.decode().split()
    assert (width, height, format, small_width, small_height) == ('12000', '9000', 'JPEG', '341', '256')
    assert int(megabytes) < 60

def white_png(side) -> bytes: return encode(Image.new('1', (side, side), 1), 'PNG')

def test_photo_max_pixels_replaces_pillows_limit():
    "Pillow's own limit, which is 179 megapixels, does not count."
    png = white_png(13_500) # 182 megapixels
    assert check_photo(png, photo_limits(settings(photo_max_pixels=200_000_000))).width == 13_500
    with pytest.raises(PhotoError, match='13,500 × 13,500 .* 100,000,000 .*PLANT_PHOTO_MAX_PIXELS'):
        check_photo(png, photo_limits(settings(photo_max_pixels=100_000_000)))

@pytest.mark.parametrize('kind', ['PNG', 'progressive JPEG'])
def test_a_photo_that_needs_more_memory_than_the_setting_allows_is_rejected(kind):
    img = Image.new('RGB', (2000, 1000))
    data = encode(img, progressive=True) if kind != 'PNG' else encode(img, 'PNG')
    limits = photo_limits(settings(photo_max_memory=5_000_000))
    with pytest.raises(PhotoError, match='PLANT_PHOTO_MAX_MEMORY'): check_photo(data, limits)
    assert check_photo(encode(img), limits).width == 2000

def test_large_photos_wait_for_memory_instead_of_failing():
    limits = PhotoLimits(max_memory=10_000_000) # for one of them at a time
    png, results = encode(Image.effect_noise((1500, 1500), 50).convert('RGB'), 'PNG'), []
    threads = [threading.Thread(target=lambda: results.append(check_photo(png, limits))) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join(30)
    assert results == [PhotoInfo(1500, 1500, 'PNG')]*4

# -- Any damage

@pytest.mark.slow
def test_damaged_photos_cause_no_crash_no_hang_and_no_leak():
    r = subprocess.run([sys.executable, root/'tests/fuzz_photos.py', '600'], capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr
    assert r.stdout.count('rejected') == 7
