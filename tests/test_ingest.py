"Ingestion: killed processes, bad photos, hostile URLs, full disks, and stores and databases that hang."
import asyncio, io, json, os, random, resource, signal, socket, subprocess, sys, threading, time, zlib
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote
import numpy as np, psutil, pytest, sqlalchemy as sa
from PIL import Image
from helpers import Site, noise_photo, serve_site
from plant_mlops.core.config import PlantError, Settings, settings
from plant_mlops.core.store import open_store, sha256_of
from plant_mlops.core import database
from plant_mlops.data.catalog import add_rows, count_by_status, list_rows, open_catalog, plants_data, reset_rows
from plant_mlops.data import safe_urls
from plant_mlops.data.ingest import ingest

# -- Photos, catalogs and results

def noise_image(seed=0, size=(64, 48), mode='RGB'):
    "An image of random pixels."
    width, height = size
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype='uint8'))
    return image if mode == 'RGB' else image.convert(mode)

def encode(image, format='JPEG', **kw) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **kw)
    return file.getvalue()

def noise_pages(n) -> dict:
    "Pages of a site: n different photos, /0.jpg and so on."
    return {f'/{i}.jpg': noise_photo(i) for i in range(n)}

def fill_catalog(s, urls):
    "Open the catalog, and add these URLs; returns its engine."
    engine = open_catalog(s)
    add_rows(engine, [dict(url_source=url, label='grass') for url in urls])
    return engine

def urls_of(site) -> list: return ['http://photos.test' + quote(path) for path in site.pages]

def file_name(url) -> str: return unquote(url).rpartition('/')[2]

def rows_by_name(engine) -> dict: return {file_name(row['url_source']): row for row in list_rows(engine)}

def counts_of(result) -> dict:
    "The counts of an ingestion that are not zero."
    return {k: v for k, v in result.items() if v and k != 'seconds'}

def ingest_site(s, site) -> dict:
    "Ingest from a site; returns the counts that are not zero."
    return counts_of(ingest(s, connect_to=site.connect_to, progress=False))

def assert_all_stored(s, n):
    "Check that every row is stored, and that the store has exactly the rows' photos, undamaged, and no temporary file."
    rows, store = list_rows(open_catalog(s)), open_store(s)
    assert [row['status'] for row in rows] == ['stored'] * n
    for row in rows:
        assert row['error'] is None
        assert row['url_s3'] == store.url(f'raw/{row["sha256"]}')
    keys = [item.key for item in store.list()]
    assert len(keys) == len(set(keys))
    assert set(keys) == {f'raw/{row["sha256"]}' for row in rows}
    for key in random.sample(keys, 10): store.get(key) # checks its checksum
    if s.store_url.startswith('/'):
        files = [path for path in Path(s.store_url).rglob('*') if path.is_file()]
        assert not [path for path in files if path.parent.name != 'raw' and path.suffix != '.lock']

def wait_until(condition, seconds=60):
    "Wait until `condition()` is true; returns its value."
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value: return value
        assert time.monotonic() < end
        time.sleep(.005)

# -- Ingestion in a process that can be killed

FORK_SERVER = '''
import json, os, sys
from plant_mlops.core.config import PlantError, settings
from plant_mlops.data.ingest import ingest

def run(options):
    "Ingest; returns the exit code."
    connect_to = {'photos.test': tuple(options['address'])}
    try: ingest(settings(**options['settings']), connect_to=connect_to, progress=False)
    except KeyboardInterrupt: return 130
    except PlantError as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    return 0

for line in sys.stdin:
    pid = os.fork()
    if not pid: os._exit(run(json.loads(line)))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
'''

class ForkServer:
    "A process that has imported everything, and forks one ingestion after another."
    def __init__(self, **kw):
        self.process = subprocess.Popen([sys.executable, '-c', FORK_SERVER], text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, **kw)

    def start(self, site, **kw) -> int:
        "Start an ingestion from a site, with these settings; returns its process ID."
        self.process.stdin.write(json.dumps(dict(settings=kw, address=site.server_address)) + '\n')
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        "Wait for the end of the ingestion; returns its exit code."
        return int(self.process.stdout.readline())

    def __enter__(self): return self

    def __exit__(self, *args):
        self.process.stdin.close()
        self.process.wait(10)

# -- Killed and interrupted ingestions

def kill_repeatedly(s, kw, times, seed):
    """Kill some ingestions at random moments, then let one finish.

    Returns the number of killed ingestions, and of rows that these had stored."""
    rng = random.Random(seed)
    killed, n = 0, 50 * times + 50
    with serve_site(noise_pages(n), delay=.01) as site, ForkServer() as server:
        engine = fill_catalog(s, urls_of(site))
        for _ in range(times):
            last_request = site.requests.total() + rng.randrange(40)
            pid = server.start(site, **kw)
            while site.requests.total() < last_request: time.sleep(.001)
            time.sleep(rng.uniform(0, .02))
            os.kill(pid, signal.SIGKILL)
            killed += server.wait() == -signal.SIGKILL
            counts = count_by_status(engine)
            assert counts['failed'] + counts['rejected'] == 0
        before = count_by_status(engine)
        assert ingest_site(s, site) == {'stored': before['new']}
        assert_all_stored(s, n)
        requests = site.requests.total()
        assert ingest_site(s, site) == {}
        assert site.requests.total() == requests
    return killed, before['stored']

def test_an_ingestion_killed_20_times_stores_every_photo_once(tmp_path):
    kw = dict(home=str(tmp_path), ingest_batch=7, ingest_concurrency=8)
    killed, stored = kill_repeatedly(settings(**kw), kw, 20, seed=1)
    assert killed == 20
    assert stored > 100

def test_an_ingestion_killed_while_it_writes_to_s3_stores_every_photo_once(seaweedfs, tmp_path):
    kw = dict(home=str(tmp_path), ingest_batch=7, ingest_concurrency=8, store_url='s3://killed',
              s3_endpoint_url=seaweedfs.url, s3_access_key=seaweedfs.key, s3_secret_key=seaweedfs.secret)
    killed, _ = kill_repeatedly(settings(**kw), kw, 4, seed=2)
    assert killed == 4

def test_ctrl_c_records_the_photos_that_are_stored(tmp_path):
    kw = dict(home=str(tmp_path), ingest_batch=10_000, ingest_concurrency=8)
    with serve_site(noise_pages(800), delay=.02) as site, ForkServer(stderr=subprocess.DEVNULL) as server:
        s = settings(**kw)
        engine = fill_catalog(s, urls_of(site))
        pid = server.start(site, **kw)
        while site.requests.total() < 60: time.sleep(.01)
        os.kill(pid, signal.SIGINT)
        assert server.wait() == 130
        counts = count_by_status(engine)
        assert 30 < counts['stored'] <= len(list(open_store(s).list())) < 800
        assert counts['new'] == 800 - counts['stored']

# -- Several processes

def has_ended(process) -> bool: return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE

def wait_until_ended(processes): wait_until(lambda: all(map(has_ended, processes)), 5)

def wait_for_workers(pid) -> list:
    "The three worker processes of an ingestion, once they are started."
    def workers():
        children = [child for child in psutil.Process(pid).children() if 'LokyProcess' in ' '.join(child.cmdline())]
        return children if len(children) == 3 else None
    return wait_until(workers)

class ParallelIngestion(NamedTuple):
    "An ingestion in three worker processes."
    s: Settings
    engine: sa.Engine # of the catalog
    site: Site
    server: ForkServer
    kw: dict # the settings, for the fork server

    def start(self) -> tuple:
        "Start it, and wait until all its processes have stored rows; returns its process ID, and its workers."
        before = {row['id'] for row in list_rows(self.engine, 'stored')}
        pid = self.server.start(self.site, **self.kw)
        workers = wait_for_workers(pid)
        def new_ids(): return {row['id'] for row in list_rows(self.engine, 'stored')} - before
        wait_until(lambda: len({i % 3 for i in new_ids()}) == 3)
        return pid, workers

@contextmanager
def parallel_ingestion(tmp_path, n):
    kw = dict(home=str(tmp_path), ingest_processes=3, ingest_batch=20, ingest_per_host=9)
    s = settings(**kw)
    with serve_site(noise_pages(n), delay=.02) as site, ForkServer(stderr=subprocess.DEVNULL) as server:
        yield ParallelIngestion(s, fill_catalog(s, urls_of(site)), site, server, kw)

def test_workers_end_when_the_ingestion_is_killed_and_the_next_one_finishes(tmp_path):
    with parallel_ingestion(tmp_path, 2000) as ingestion:
        for i in range(2):
            pid, workers = ingestion.start()
            time.sleep(.05 * i)
            os.kill(pid, signal.SIGKILL)
            assert ingestion.server.wait() == -signal.SIGKILL
            wait_until_ended(workers)
        before = count_by_status(ingestion.engine)
        assert before['stored'] > 100
        assert before['new'] > 100
        assert before['failed'] + before['rejected'] == 0
        assert ingest_site(settings(home=tmp_path), ingestion.site) == {'stored': before['new']}
        assert_all_stored(ingestion.s, 2000)

def test_ctrl_c_ends_the_workers_and_records_their_photos(tmp_path):
    with parallel_ingestion(tmp_path, 1500) as ingestion:
        pid, workers = ingestion.start()
        requests = ingestion.site.requests.total()
        os.kill(pid, signal.SIGINT)
        assert ingestion.server.wait() == 130
        assert all(map(has_ended, workers))
        counts = count_by_status(ingestion.engine)
        assert requests - 30 < counts['stored'] < 1500
        assert counts['new'] == 1500 - counts['stored']

def test_the_rows_of_a_killed_worker_are_ingested_too(tmp_path):
    with parallel_ingestion(tmp_path, 1200) as ingestion:
        _, workers = ingestion.start()
        workers[0].kill()
        assert ingestion.server.wait() == 0
        assert_all_stored(ingestion.s, 1200)

def ignore_sigint(): signal.signal(signal.SIGINT, signal.SIG_IGN)

@pytest.mark.parametrize('how', ['killed', 'interrupted', 'killed, and ignores Ctrl-C'])
def test_workers_that_wait_for_a_silent_server_end_with_the_ingestion(tmp_path, how):
    is_killed = 'killed' in how
    options = dict(preexec_fn=ignore_sigint) if 'ignores' in how else {}
    kw = dict(home=str(tmp_path), ingest_processes=3)
    end = threading.Event()
    def hang(handler): end.wait(30)
    pages = {f'/{i}.jpg': hang for i in range(200)}
    with serve_site(pages) as site, ForkServer(stderr=subprocess.DEVNULL, **options) as server:
        engine = fill_catalog(settings(**kw), urls_of(site))
        pid = server.start(site, **kw)
        workers = wait_for_workers(pid)
        ids = {name: row['id'] for name, row in rows_by_name(engine).items()}
        wait_until(lambda: len({ids[path.strip('/')] % 3 for path in list(site.requests)}) == 3)
        os.kill(pid, signal.SIGKILL if is_killed else signal.SIGINT)
        assert server.wait() == (-signal.SIGKILL if is_killed else 130)
        wait_until_ended(workers)
        end.set()
    assert count_by_status(engine)['new'] == 200

def test_a_slow_host_does_not_delay_the_others(tmp_path):
    finished = {}
    photo = noise_photo(0)
    def respond_slowly(handler):
        time.sleep(.2)
        handler.respond(200, {'Content-Length': len(photo)}, photo)
        finished['slow'] = time.monotonic()
    def watch_quick_site():
        wait_until(lambda: quick_site.requests.total() == 10)
        finished['quick'] = time.monotonic()
    pages = {f'/{i}.jpg': respond_slowly for i in range(300)}
    with serve_site(pages) as slow_site, serve_site(noise_pages(10)) as quick_site:
        s = settings(home=tmp_path)
        slow_urls = [f'http://slow.test/{i}.jpg' for i in range(300)]
        fill_catalog(s, slow_urls + [f'http://quick.test/{i}.jpg' for i in range(10)])
        start = time.monotonic()
        watcher = threading.Thread(target=watch_quick_site)
        watcher.start()
        connect_to = {'slow.test': slow_site.server_address, 'quick.test': quick_site.server_address}
        ingest(s, connect_to=connect_to, progress=False)
        watcher.join()
    assert finished['quick'] - start < (finished['slow'] - start) / 2

def test_the_limit_of_requests_per_host_holds_for_all_processes_together(tmp_path):
    photo, lock = noise_photo(0), threading.Lock()
    active, most = 0, 0
    def respond(handler):
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)
        time.sleep(.02)
        with lock: active -= 1
        handler.respond(200, {'Content-Length': len(photo)}, photo)
    s = settings(home=tmp_path, ingest_processes=3, ingest_per_host=9)
    with serve_site({f'/{i}.jpg': respond for i in range(900)}) as site:
        fill_catalog(s, urls_of(site))
        assert ingest_site(s, site) == {'stored': 900}
    assert 3 < most <= 9

def test_an_error_of_a_worker_is_raised_by_its_parent(tmp_path):
    (tmp_path/'file').write_bytes(b'')
    (tmp_path/'a.jpg').write_bytes(noise_photo(1))
    s = settings(home=tmp_path/'home', store_url=str(tmp_path/'file'), ingest_processes=2)
    engine = fill_catalog(s, [(tmp_path/'a.jpg').as_uri()])
    with pytest.raises(PlantError, match='run again'): ingest(s, progress=False)
    assert count_by_status(engine)['new'] == 1

SCRIPT = '''
import sys
from plant_mlops.core.config import settings
from plant_mlops.data.ingest import ingest
print('script runs')
result = ingest(settings(home=sys.argv[1], ingest_processes=3), progress=False)
print(result['stored'])
'''

def test_workers_do_not_import_the_main_module_nor_print_to_standard_output(tmp_path):
    files = [tmp_path/f'{i}.jpg' for i in range(30)]
    for i, file in enumerate(files): file.write_bytes(noise_photo(i))
    fill_catalog(settings(home=tmp_path/'home'), [file.as_uri() for file in files])
    (tmp_path/'script.py').write_text(SCRIPT)
    output = subprocess.check_output([sys.executable, tmp_path/'script.py', tmp_path/'home'], text=True)
    assert output.split('\n') == ['script runs', '30', '']

# -- Bad photos

def giant_png(side=50_000) -> bytes:
    "A valid black PNG of 50,000 × 50,000 pixels, one bit each."
    def chunk(kind, data):
        checksum = zlib.crc32(kind + data)
        return len(data).to_bytes(4, 'big') + kind + data + checksum.to_bytes(4, 'big')
    header = side.to_bytes(4, 'big') * 2 + bytes([1, 0, 0, 0, 0])
    hundred_rows = bytes(1 + side // 8) * 100
    compressor = zlib.compressobj(1)
    pixels = b''.join(compressor.compress(hundred_rows) for _ in range(side // 100)) + compressor.flush()
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', pixels) + chunk(b'IEND', b'')

def rotated_jpeg() -> bytes:
    "A photo that is rotated by its metadata."
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(noise_image(), exif=exif)

def png_of_16_bits() -> bytes:
    pixels = np.arange(3000, dtype='uint16').reshape(50, 60)
    return encode(Image.fromarray(pixels), 'PNG')

def animated_gif() -> bytes:
    return encode(noise_image(4), 'GIF', save_all=True, append_images=[noise_image(5), noise_image(6)])

HTML = b'<!DOCTYPE html>\n<html><body>Not here</body></html>'

# File name → a function that makes the photo.
GOOD_PHOTOS = {
    'cmyk.jpg': lambda: encode(noise_image(1, mode='CMYK')),
    'deep.png': png_of_16_bits,
    'palette.png': lambda: encode(noise_image(2, mode='P'), 'PNG'),
    'rotated.jpg': rotated_jpeg,
    'web.webp': lambda: encode(noise_image(3), 'WEBP'),
    'animated.gif': animated_gif,
    'un été, à la mer 100%.jpg': lambda: noise_photo(7)}

# File name → a function that makes the page, and a word of the error.
BAD_PHOTOS = {
    'half.jpg': (lambda: noise_photo(8)[:1500], 'damaged or cut off'),
    'empty.jpg': (lambda: b'', 'empty'),
    'page.jpg': (lambda: (200, {'Content-Type': 'image/jpeg'}, HTML), 'web page'),
    'giant.png': (giant_png, 'pixels'),
    'noise.jpg': (lambda: os.urandom(500), 'not a photo')}

def test_unusual_photos_are_stored_and_bad_ones_are_rejected_with_the_reason(tmp_path):
    s = settings(home=tmp_path)
    pages = {f'/{name}': make_photo() for name, make_photo in GOOD_PHOTOS.items()}
    pages |= {f'/{name}': make_page() for name, (make_page, _) in BAD_PHOTOS.items()}
    with serve_site(pages) as site:
        engine = fill_catalog(s, urls_of(site))
        assert ingest_site(s, site) == dict(stored=len(GOOD_PHOTOS), rejected=len(BAD_PHOTOS))
        rows = rows_by_name(engine)
        for name in GOOD_PHOTOS: assert rows[name]['status'] == 'stored', rows[name]
        for name, (_, reason) in BAD_PHOTOS.items():
            assert rows[name]['status'] == 'rejected', rows[name]
            assert reason in rows[name]['error'], rows[name]
        expected = {f'raw/{sha256_of(pages["/" + name])}' for name in GOOD_PHOTOS}
        assert {item.key for item in open_store(s).list()} == expected
        assert site.requests.total() == len(pages)

def test_files_whose_names_have_spaces_and_accents_are_stored(tmp_path):
    s = settings(home=tmp_path/'home')
    for name, make_photo in GOOD_PHOTOS.items(): (tmp_path/name).write_bytes(make_photo())
    fill_catalog(s, [(tmp_path/name).as_uri() for name in GOOD_PHOTOS])
    assert counts_of(ingest(s, progress=False)) == dict(stored=len(GOOD_PHOTOS))

# -- Servers that misbehave

def drip(handler):
    "Send a byte now and then, without end."
    handler.respond(200, {'Content-Length': 10_000})
    for _ in range(100):
        handler.wfile.write(b'\xff')
        handler.wfile.flush()
        time.sleep(.1)

def hang_up(handler): handler.connection.shutdown(socket.SHUT_RDWR)

def cut_off(handler):
    handler.respond(200, {'Content-Length': 10_000}, b'\xff\xd8')
    hang_up(handler)

def send_without_end(handler):
    handler.respond(200, {'Connection': 'close'})
    handler.close_connection = True
    while True: handler.wfile.write(bytes(1 << 16))

def redirect(url): return 302, {'Location': url}, b''

def fail_once(status, photo, **headers):
    "A page that fails at the first request."
    def page(handler):
        is_first = handler.server.requests[unquote(handler.path)] == 1
        if is_first: handler.respond(status, {'Content-Length': 0, **headers})
        else: handler.respond(200, {'Content-Length': len(photo)}, photo)
    return page

MISBEHAVING_PAGES = {
    '/good.jpg': noise_photo(1),
    '/moved.jpg': redirect('/good.jpg'),
    '/flaky.jpg': fail_once(503, noise_photo(2)),
    '/busy.jpg': fail_once(429, noise_photo(3), **{'Retry-After': '1'}),
    '/drip.jpg': drip,
    '/bye.jpg': hang_up,
    '/cut.jpg': cut_off,
    '/endless.jpg': send_without_end,
    '/large.jpg': (200, {}, bytes(200_001)),
    '/loop.jpg': redirect('/loop.jpg'),
    '/gone.jpg': (410, {}, b''),
    '/error.jpg': (500, {}, b''),
    '/file.jpg': redirect('file:///etc/hostname'),
    '/bucket.jpg': redirect('s3://a/b'),
    '/cloud.jpg': redirect('http://169.254.169.254/latest/meta-data/'),
    '/odd.jpg': redirect('http://2130706433/')}

# File name → status, and a word of the error.
EXPECTED_ERRORS = {
    'drip.jpg': ('failed', 'within 1 s'),
    'bye.jpg': ('failed', 'connection'),
    'cut.jpg': ('failed', 'connection'),
    'error.jpg': ('failed', '500'),
    'endless.jpg': ('rejected', 'larger than'),
    'large.jpg': ('rejected', 'larger than'),
    'loop.jpg': ('rejected', 'redirects'),
    'gone.jpg': ('rejected', '410'),
    'none.jpg': ('rejected', '404'),
    'file.jpg': ('rejected', 'http or https'),
    'bucket.jpg': ('rejected', 'http or https'),
    'inside.jpg': ('rejected', 'not a public address'),
    'cloud.jpg': ('rejected', 'not a public address'),
    'odd.jpg': ('rejected', 'neither a host name nor')}

def test_misbehaving_servers_are_retried_or_rejected_with_the_reason(tmp_path):
    with serve_site(MISBEHAVING_PAGES) as site:
        site.pages['/inside.jpg'] = redirect(f'http://127.0.0.1:{site.server_port}/secret.jpg')
        urls = urls_of(site) + ['http://photos.test/none.jpg']
        site.pages['/secret.jpg'] = noise_photo(4)
        s = settings(home=tmp_path, ingest_retries=2, ingest_timeout=1, ingest_max_bytes=200_000)
        engine = fill_catalog(s, urls)
        start = time.monotonic()
        assert ingest_site(s, site) == dict(stored=4, failed=4, rejected=10)
        assert time.monotonic() - start < 10
        rows = rows_by_name(engine)
        for name, (status, reason) in EXPECTED_ERRORS.items():
            assert rows[name]['status'] == status, (name, rows[name])
            assert reason in rows[name]['error'], (name, rows[name])
        assert site.requests['/secret.jpg'] == 0
        assert site.requests['/gone.jpg'] == 1
        assert site.requests['/error.jpg'] == site.requests['/flaky.jpg'] == 2

def test_a_failed_row_is_tried_again_until_its_attempts_are_used_up_or_it_is_reset(tmp_path):
    s = settings(home=tmp_path, ingest_retries=1, ingest_attempts=2)
    with serve_site({'/a.jpg': (500, {}, b'')}) as site:
        engine = fill_catalog(s, urls_of(site))
        assert [ingest_site(s, site) for _ in range(3)] == [dict(failed=1), dict(failed=1), {}]
        assert list_rows(engine)[0]['attempts'] == 2
        site.pages['/a.jpg'] = noise_photo(1)
        reset_rows(engine)
        assert ingest_site(s, site) == dict(stored=1)

def test_a_host_that_refuses_connections_does_not_delay_the_others(tmp_path):
    with socket.socket() as closed, serve_site(noise_pages(50)) as site:
        closed.bind(('127.0.0.1', 0)) # bound and not listening: connections are refused
        s = settings(home=tmp_path, ingest_retries=2, ingest_concurrency=40, ingest_per_host=20)
        engine = fill_catalog(s, [f'http://silent.test/{i}.jpg' for i in range(1000)] + urls_of(site))
        start = time.monotonic()
        connect_to = {**site.connect_to, 'silent.test': closed.getsockname()}
        result = ingest(s, connect_to=connect_to, progress=False)
        assert time.monotonic() - start < 10
        assert result['stored'] == 50
        assert result['skipped'] > 900
        assert count_by_status(engine) == dict(new=result['skipped'], stored=50, failed=result['failed'], rejected=0)

def test_names_that_resolve_to_private_addresses_are_rejected_also_after_dns_rebinding(tmp_path, monkeypatch):
    lookups = Counter()
    public_pages, private_pages = {'/a.jpg': noise_photo(1)}, {'/a.jpg': noise_photo(2)}
    with serve_site(public_pages, '127.0.0.2') as public, serve_site(private_pages, '127.0.0.3') as private:
        def sites_of(host):
            if host == 'evil.test': return [private]
            if host == 'both.test': return [public, private]
            return [public if lookups[host] == 1 else private] # rebind.test
        async def look_up(host, port, family):
            lookups[host] += 1
            if host == 'none.test': raise OSError('Name or service not known')
            common = dict(hostname=host, family=socket.AF_INET, proto=0, flags=0)
            addresses = [site.server_address for site in sites_of(host)]
            return [dict(common, host=ip, port=port) for ip, port in addresses]
        monkeypatch.setattr(safe_urls, 'look_up_addresses', look_up)
        s = settings(home=tmp_path, ingest_allow_hosts='127.0.0.2', ingest_retries=1)
        engine = fill_catalog(s, [f'http://{name}.test/{name}/../a.jpg' for name in ('evil', 'rebind', 'both', 'none')])
        assert counts_of(ingest(s, progress=False)) == dict(stored=1, rejected=2, failed=1)
        rows = {row['url_source'].split('/')[2]: row for row in list_rows(engine)}
        assert rows['rebind.test']['sha256'] == sha256_of(noise_photo(1))
        assert lookups['rebind.test'] == 1
        for host in ('evil.test', 'both.test'): assert '127.0.0.3, which is not a public' in rows[host]['error']
        assert 'no address for the name none.test' in rows['none.test']['error']
        assert private.requests.total() == 0

# -- Shards, event loops, buckets

def test_two_shards_have_no_row_in_common(tmp_path):
    s = settings(home=tmp_path, ingest_batch=10)
    with serve_site(noise_pages(300), delay=.01) as site:
        fill_catalog(s, urls_of(site))
        results = []
        def run(i): results.append(ingest(s, (i, 2), site.connect_to, progress=False))
        threads = [threading.Thread(target=run, args=(i,)) for i in (1, 2)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert [result['stored'] for result in results] == [150, 150]
        assert len(site.requests) == 300
        assert set(site.requests.values()) == {1}
    assert_all_stored(s, 300)

def test_ingest_works_in_a_running_event_loop_as_that_of_a_notebook(tmp_path):
    s = settings(home=tmp_path)
    with serve_site({'/1.jpg': noise_photo(1)}) as site:
        fill_catalog(s, urls_of(site))
        async def cell(): return ingest_site(s, site)
        assert asyncio.run(cell()) == dict(stored=1)

def test_interrupting_a_notebook_cell_records_the_photos_that_are_stored(tmp_path):
    s = settings(home=tmp_path, ingest_batch=10_000, ingest_concurrency=8)
    with serve_site(noise_pages(800), delay=.02) as site:
        engine = fill_catalog(s, urls_of(site))
        def interrupt():
            while site.requests.total() < 60: time.sleep(.01)
            os.kill(os.getpid(), signal.SIGINT)
        async def cell(): return ingest_site(s, site)
        threading.Thread(target=interrupt).start()
        loop = asyncio.new_event_loop()
        with pytest.raises(KeyboardInterrupt): loop.run_until_complete(cell())
        loop.close()
        assert 30 < count_by_status(engine)['stored'] < 800

def test_photos_are_copied_from_other_buckets(seaweedfs, tmp_path):
    source = open_store(seaweedfs.settings('copy-source', home=tmp_path))
    source.put('été 1+1.jpg', noise_photo(1))
    s = seaweedfs.settings('copy-target', home=tmp_path, ingest_retries=1)
    engine = fill_catalog(s, ['s3://copy-source/été 1+1.jpg', 's3://copy-source/none.jpg', 's3://nowhere/a.jpg'])
    assert counts_of(ingest(s, progress=False)) == dict(stored=1, rejected=2)
    assert [item.key for item in open_store(s).list()] == [f'raw/{sha256_of(noise_photo(1))}']
    errors = [row['error'] for row in list_rows(engine)]
    assert errors[0] is None
    for error in errors[1:]: assert '404' in error
    assert len(errors) == 3

# -- Stores and catalogs that fail

def limit_file_size():
    "Let no file be larger than 300 kB."
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

def test_a_limit_of_file_sizes_ends_the_ingestion_with_a_message_and_the_next_one_goes_on(tmp_path):
    large_photo = encode(noise_image(0, (600, 600)), quality=95)
    assert len(large_photo) > 300_000
    kw = dict(home=str(tmp_path), ingest_concurrency=1)
    log = tmp_path/'log.txt'
    with serve_site(noise_pages(30) | {'/20.jpg': large_photo}) as site:
        s = settings(**kw)
        engine = fill_catalog(s, urls_of(site))
        with open(log, 'w') as stderr, ForkServer(preexec_fn=limit_file_size, stderr=stderr) as server:
            server.start(site, **kw)
            assert server.wait() == 1
        assert 'File too large. Nothing was changed. Raise the limit of file sizes' in log.read_text()
        assert 'Traceback' not in log.read_text()
        assert count_by_status(engine) == dict(new=10, stored=20, failed=0, rejected=0)
        assert ingest_site(s, site) == dict(stored=10)
    assert_all_stored(s, 30)

def test_an_ingestion_goes_on_after_a_full_disk_got_more_space(tiny_disk, tmp_path):
    s = settings(home=tmp_path, store_url=str(tiny_disk/'store'), ingest_batch=5)
    with serve_site(noise_pages(200)) as site:
        engine = fill_catalog(s, urls_of(site))
        with pytest.raises(PlantError, match='No space left on device.*disk space'): ingest_site(s, site)
        counts = count_by_status(engine)
        assert 10 < counts['stored'] < 200
        assert counts['new'] == 200 - counts['stored']
        subprocess.run(['mount', '-o', 'remount,size=40m', tiny_disk], check=True)
        assert ingest_site(s, site) == dict(stored=200 - counts['stored'])
    assert_all_stored(s, 200)

def test_a_store_that_hangs_ends_the_ingestion_and_no_row_fails(seaweedfs, tmp_path):
    s = seaweedfs.settings('stopped', home=tmp_path, s3_timeout=.5, ingest_concurrency=4, ingest_batch=5)
    with serve_site(noise_pages(80), delay=.02) as site:
        engine = fill_catalog(s, urls_of(site))
        def freeze():
            while site.requests.total() < 25: time.sleep(.01)
            os.kill(seaweedfs.process.pid, signal.SIGSTOP)
        freezer = threading.Thread(target=freeze)
        start = time.monotonic()
        freezer.start()
        try:
            with pytest.raises(PlantError, match='cannot be used.*run again'): ingest_site(s, site)
        finally:
            freezer.join()
            os.kill(seaweedfs.process.pid, signal.SIGCONT)
        assert time.monotonic() - start < 40
        counts = count_by_status(engine)
        assert counts['failed'] == counts['rejected'] == 0
        assert counts['stored'] > 0
        ingest_site(seaweedfs.settings('stopped', home=tmp_path), site)
    assert_all_stored(s, 80)

def test_a_catalog_that_hangs_ends_the_ingestion_and_the_next_one_finishes(postgres, tmp_path, monkeypatch):
    monkeypatch.setattr(database, 'ANSWER_TIMEOUT', 2.)
    s = settings(home=tmp_path, catalog_url=postgres)
    with serve_site(noise_pages(20)) as site:
        engine = fill_catalog(s, urls_of(site))
        try:
            with engine.begin() as connection:
                connection.execute(sa.text('LOCK TABLE plants_data IN EXCLUSIVE MODE')) # may be read, not written
                with pytest.raises(PlantError, match='has not answered for 2 s.*run again'): ingest_site(s, site)
            ingest_site(s, site)
            assert_all_stored(s, 20)
        finally:
            engine.dispose()
            plants_data.drop(engine)
