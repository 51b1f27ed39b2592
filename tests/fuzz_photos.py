"""Decode damaged photos as ingestion does: `python tests/fuzz_photos.py 20000`. Fails if one crashes, hangs or leaks.

A process decodes them one after another, and reports each; a new one goes on where it crashed, or was killed because
it hung."""
import argparse, collections, gc, io, json, os, random, select, subprocess, sys, time, zlib
import numpy as np
from PIL import Image
import pillow_heif
from plant_mlops.core.colour_profile import cicp_profile
from plant_mlops.data.photo import PhotoError, check_photo, open_photo

SECONDS = 5 # longest time for a photo
MAX_GROWTH = 100 # MB that the process may have grown by at the end

# -- Photos

def encode(img, format, **options) -> bytes:
    file = io.BytesIO()
    img.save(file, format, **options)
    return file.getvalue()

def heic(*images, **options) -> bytes:
    container = pillow_heif.from_pillow(images[0])
    for img in images[1:]: container.add_from_pillow(img)
    file = io.BytesIO()
    container.save(file, **options)
    return file.getvalue()

def make_photos() -> list:
    "(format, content) of photos that are whole, of each format several."
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    img = Image.fromarray(noise).resize((160, 120))
    small = img.resize((48, 40))
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010f: 'Maker'})
    exif.get_ifd(0x8769)[0x9003] = '2024:05:01 12:00:00'
    more = dict(exif=exif.tobytes(), icc_profile=cicp_profile(12, 13))
    frames = dict(save_all=True, append_images=[small, small.rotate(90)])
    return [
        *[('JPEG', encode(img, 'JPEG', **options)) for options in (more, dict(progressive=True), dict(quality=20))],
        ('JPEG', encode(img.convert('CMYK'), 'JPEG')),
        ('JPEG', encode(img, 'MPO', save_all=True, append_images=[small])),
        *[('PNG', encode(img.convert(mode), 'PNG', **options)) for mode, options in (
            ('RGB', more), ('RGBA', {}), ('P', dict(transparency=1)), ('1', {}), ('LA', {}), ('I;16', {}))],
        ('PNG', encode(small, 'PNG', **frames)),
        *[('WEBP', encode(img, 'WEBP', **options)) for options in (more, dict(lossless=True))],
        ('WEBP', encode(small, 'WEBP', **frames)),
        *[('TIFF', encode(img, 'TIFF', **options)) for options in (
            more, dict(compression='tiff_lzw'), dict(compression='jpeg'), dict(compression='tiff_adobe_deflate'),
            dict(big_tiff=True))],
        ('TIFF', encode(img.convert('1'), 'TIFF', compression='group4')),
        ('TIFF', encode(img.convert('F'), 'TIFF')),
        ('TIFF', encode(img.resize((40, 30)), 'TIFF', tiffinfo={254: 1}, save_all=True, append_images=[img])),
        *[('GIF', encode(small, 'GIF', **options)) for options in (frames, {})],
        *[('AVIF', encode(small, 'AVIF', **options)) for options in (more, frames, dict(quality=20))],
        *[('HEIC', heic(small, **options)) for options in (more, dict(tile_size=32), {})],
        ('HEIC', heic(small, img, primary_index=1)),
        ('HEIC', heic(small.convert('RGBA'))),
    ]

NUMBERS = (
    b'\0', b'\xff', b'\x7f\xff', b'\xff\xff', b'\0\0\0\0', b'\xff\xff\xff\xff', b'\x7f\xff\xff\xff', b'\x80\0\0\0',
    b'\0\0\x40\0')

def with_checksums(png) -> bytes:
    "A PNG whose checksums are right again, so that a decoder reads what was changed."
    png, i = bytearray(png), 8
    while i + 12 <= len(png):
        end = i + 12 + int.from_bytes(png[i:i+4])
        if end <= len(png): png[end-4:end] = zlib.crc32(png[i+4:end-4]).to_bytes(4)
        i = end
    return bytes(png)

def damaged(rng, data, others) -> bytes:
    "A file with a few changes: other bytes, extreme numbers, parts cut out, doubled, or taken from another file."
    data = bytearray(data)
    head = min(len(data), 600)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        if not data: break
        i = rng.randrange(len(data) if rng.random() < .5 else min(len(data), head))
        n = rng.randrange(1, 40)
        kind = rng.randrange(7)
        if kind < 2: data[i] ^= 1 << rng.randrange(8)
        elif kind == 2: data[i:i+1] = rng.randbytes(1)
        elif kind == 3:
            number = rng.choice(NUMBERS)
            data[i:i+len(number)] = number
        elif kind == 4: del data[i:i+n]
        elif kind == 5: data[i:i] = data[i:i+n]
        else:
            other = rng.choice(others)
            j = rng.randrange(len(other))
            data[i:i+n] = other[j:j+n]
    if rng.random() < .15: del data[rng.randrange(len(data) + 1):]
    return with_checksums(data) if data[1:4] == b'PNG' and rng.random() < .7 else bytes(data)

# -- The process that decodes

def resident_megabytes() -> int:
    gc.collect()
    with open('/proc/self/statm') as f: return int(f.read().split()[1])*os.sysconf('SC_PAGE_SIZE')//2**20

def decode(seed, start, end):
    "Decode some damaged photos, and print a line of JSON for each."
    photos = make_photos()
    for format, data in photos: assert check_photo(data), format
    contents = [data for _, data in photos]
    print('{}', flush=True) # ready
    for i in range(start, end):
        rng = random.Random(f'{seed} {i}')
        format, data = photos[i % len(photos)]
        data = damaged(rng, data, contents)
        began, result = time.perf_counter(), 'accepted'
        try:
            check_photo(data)
            open_photo(data)
        except PhotoError: result = 'rejected'
        except Exception as e: result = f'raised {type(e).__name__}: {e}'
        line = dict(i=i, format=format, result=result, seconds=time.perf_counter() - began)
        if i % 500 == 499 or i == end - 1: line['megabytes'] = resident_megabytes()
        print(json.dumps(line), flush=True)

# -- The process that watches

def watch(seed, n):
    "Yield the lines of `decode`, and lines with the results `crashed` and `hung`."
    i = 0
    while i < n:
        command = [sys.executable, __file__, str(n), '--seed', str(seed), '--start', str(i), '--decode']
        process = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0)
        buffer, seconds, is_ready = b'', 60, False
        while True:
            ready = select.select([process.stdout], [], [], seconds)[0]
            chunk = ready and os.read(process.stdout.fileno(), 65536)
            if not chunk: break
            *lines, buffer = (buffer + chunk).split(b'\n')
            for line in map(json.loads, lines):
                is_ready, seconds = True, SECONDS
                if not line: continue
                i = line['i'] + 1
                yield line
        process.kill()
        code = process.wait()
        if not is_ready: sys.exit('The process that decodes did not start.')
        if i < n:
            yield dict(i=i, result='hung' if not ready else f'crashed ({code})')
            i += 1

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('n', type=int, help='number of damaged photos')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--start', type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument('--decode', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.decode: return decode(args.seed, args.start, args.n)
    counts, problems, memory, slowest = collections.Counter(), [], [], 0
    for line in watch(args.seed, args.n):
        if line['result'] in ('accepted', 'rejected'): counts[line['format'], line['result']] += 1
        else: problems.append(line)
        slowest = max(slowest, line.get('seconds', 0))
        if 'megabytes' in line: memory.append(line['megabytes'])
    formats = sorted({format for format, _ in counts})
    for format in formats:
        print(f'{format}: {counts[format, "accepted"]} accepted, {counts[format, "rejected"]} rejected')
    for line in problems: print(line)
    print(f'{sum(counts.values())} photos; slowest {slowest:.2f} s; '
          f'{memory[0]} MB after the first 500, {memory[-1]} MB at the end')
    sys.exit(1 if problems or slowest > SECONDS or memory[-1] - memory[0] > MAX_GROWTH else 0)

if __name__ == '__main__': main()
