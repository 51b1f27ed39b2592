"Ingestion against real servers, bad photos, hostile URLs and sudden death."
import asyncio, collections, io, os, random, resource, signal, socket, subprocess, sys, threading, time, zlib
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, unquote
import numpy as np, psutil, pytest, sqlalchemy as sa
from PIL import Image
from helpers import noise_photo, serve_site
from plant_mlops.core.config import PlantError, settings
from plant_mlops.core import database
from plant_mlops.data import safe_urls
from plant_mlops.data.catalog import add_rows, count_by_status, open_catalog, plants_data, reset_rows, list_rows
from plant_mlops.data.ingest import Worker, _stop_workers, ingest
from plant_mlops.core.store import open_store, sha256_of

def picture(seed=0, size=(64, 48), mode='RGB'):
    img = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype='uint8'))
    return img if mode == 'RGB' else img.convert(mode)

def encode(img, format='JPEG', **kw):
    out = io.BytesIO()
    img.save(out, format, **kw)
    return out.getvalue()

def fill(s, urls):
    "A catalog with these URLs."
    eng = open_catalog(s)
    add_rows(eng, [dict(url_source=o, label='grass') for o in urls])
    return eng

def urls(site): return ['http://photos.test' + quote(o) for o in site.pages]
def by_name(eng): return {unquote(r['url_source']).rpartition('/')[2]: r for r in list_rows(eng)}
def outcome(result): return {k: v for k, v in result.items() if v and k != 'seconds'}

def check_whole(s, n):
    "Every row is stored once; the store holds exactly the rows' photos, each whole, and no temporary file."
    table, store = list_rows(open_catalog(s)), open_store(s)
    assert [r['status'] for r in table] == ['stored'] * n
    assert all(r['error'] is None and r['url_s3'] == store.url(f'raw/{r["sha256"]}') for r in table)
    keys = [o.key for o in store.list()]
    assert len(keys) == len(set(keys)) and set(keys) == {f'raw/{r["sha256"]}' for r in table}
    for key in random.sample(keys, 10): store.get(key)
    if s.store_url.startswith('/'):
        assert not [o for o in Path(s.store_url).rglob('*') if o.is_file() and o.parent.name != 'raw' and o.suffix != '.lock']

# -- sudden death

nest = '''
import json, os, sys
from plant_mlops.core.config import PlantError, settings
from plant_mlops.data.ingest import ingest
for line in sys.stdin:
    kw = json.loads(line)
    pid = os.fork()
    if not pid:
        try: ingest(settings(**kw['settings']), connect_to={'photos.test': tuple(kw['at'])}, progress=False)
        except KeyboardInterrupt: os._exit(130)
        except PlantError as e: print(e, file=sys.stderr, flush=True); os._exit(1)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
'''

class Nest:
    "A process that has imported everything, and forks one ingestion after another."
    def __init__(self, **kw): self.p = subprocess.Popen([sys.executable, '-c', nest], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **kw)
    def start(self, site, **kw):
        import json
        self.p.stdin.write(json.dumps(dict(settings=kw, at=site.server_address)) + '\n')
        self.p.stdin.flush()
        return int(self.p.stdout.readline())
    def end(self): return int(self.p.stdout.readline())
    def __enter__(self): return self
    def __exit__(self, *a): self.p.stdin.close(); self.p.wait(10)

def kill_often(s, kw, times, seed):
    "Kill `times` ingestions after a random number of requests and a moment more, then let one finish; gives how many died."
    rng, hit, n = random.Random(seed), 0, 50 * times + 50
    with serve_site({f'/{i}.jpg': noise_photo(i) for i in range(n)}, delay=.01) as site, Nest() as nest:
        eng = fill(s, urls(site))
        for _ in range(times):
            until, pid = site.seen.total() + rng.randrange(40), nest.start(site, **kw)
            while site.seen.total() < until: time.sleep(.001)
            time.sleep(rng.uniform(0, .02))
            os.kill(pid, signal.SIGKILL)
            hit += nest.end() == -signal.SIGKILL
            assert count_by_status(eng)['failed'] + count_by_status(eng)['rejected'] == 0
        before = count_by_status(eng)
        last = ingest(s, connect_to=site.to, progress=False)
        assert outcome(last) == {'stored': before['new']}
        check_whole(s, n)
        asked = site.seen.total()
        assert outcome(ingest(s, connect_to=site.to, progress=False)) == {} and site.seen.total() == asked
    return hit, before

def test_killed_at_20_moments(tmp_path):
    kw = dict(home=str(tmp_path), ingest_batch=7, ingest_concurrency=8)
    hit, before = kill_often(settings(**kw), kw, 20, 1)
    assert hit == 20 and before['stored'] > 100

def test_killed_while_writing_to_s3(weed, tmp_path):
    kw = dict(home=str(tmp_path), ingest_batch=7, ingest_concurrency=8, store_url='s3://killed', s3_endpoint_url=weed.url)
    kw |= dict(s3_access_key=weed.key, s3_secret_key=weed.secret)
    hit, before = kill_often(settings(**kw), kw, 4, 2)
    assert hit == 4

def test_ctrl_c_writes_back_what_is_done(tmp_path):
    kw = dict(home=str(tmp_path), ingest_batch=10_000, ingest_concurrency=8)
    with serve_site({f'/{i}.jpg': noise_photo(i) for i in range(800)}, delay=.02) as site, Nest(stderr=subprocess.DEVNULL) as nest:
        s = settings(**kw)
        eng = fill(s, urls(site))
        pid = nest.start(site, **kw)
        while site.seen.total() < 60: time.sleep(.01)
        os.kill(pid, signal.SIGINT)
        assert nest.end() == 130
        assert 30 < count_by_status(eng)['stored'] <= len(list(open_store(s).list())) < 800
        assert count_by_status(eng)['new'] == 800 - count_by_status(eng)['stored']

# -- several processes

def until(what, seconds=30):
    "Wait until something holds."
    end = time.monotonic() + seconds
    while not (got := what()): assert time.monotonic() < end; time.sleep(.005)
    return got

def gone(p): return not p.is_running() or p.status() == psutil.STATUS_ZOMBIE

@contextmanager
def at_work(tmp_path, n, **kw):
    "An ingestion in three processes that has stored rows of each; gives settings, catalog, site, nest, its number and its workers'."
    kw = dict(home=str(tmp_path), ingest_processes=3, ingest_batch=20, ingest_per_host=9) | kw
    with serve_site({f'/{i}.jpg': noise_photo(i) for i in range(n)}, delay=.02) as site, Nest(stderr=subprocess.DEVNULL) as nest:
        s = settings(**kw)
        eng = fill(s, urls(site))
        def start():
            before = {r['id'] for r in list_rows(eng, 'stored')}
            pid = nest.start(site, **kw)
            workers = until(lambda: len(o := psutil.Process(pid).children()) == 2 and o)
            until(lambda: len({r['id'] % 3 for r in list_rows(eng, 'stored') if r['id'] not in before}) == 3)
            return pid, workers
        yield s, eng, site, nest, start

def test_killed_with_its_workers_at_work(tmp_path):
    with at_work(tmp_path, 2000) as (s, eng, site, nest, start):
        for i in range(2):
            pid, workers = start()
            time.sleep(.05 * i)
            os.kill(pid, signal.SIGKILL)
            assert nest.end() == -signal.SIGKILL
            until(lambda: all(map(gone, workers)), 5)
        before = count_by_status(eng)
        assert before['stored'] > 100 and before['new'] > 100 and before['failed'] + before['rejected'] == 0
        assert outcome(ingest(settings(home=tmp_path), connect_to=site.to, progress=False)) == {'stored': before['new']}
        check_whole(s, 2000)

def test_ctrl_c_stops_the_workers_too(tmp_path):
    with at_work(tmp_path, 1500) as (s, eng, site, nest, start):
        pid, workers = start()
        asked = site.seen.total()
        os.kill(pid, signal.SIGINT)
        assert nest.end() == 130 and all(map(gone, workers))
        assert asked - 30 < count_by_status(eng)['stored'] < 1500
        assert count_by_status(eng)['new'] == 1500 - count_by_status(eng)['stored']

def test_a_worker_that_dies_loses_nothing(tmp_path):
    with at_work(tmp_path, 1200) as (s, eng, site, nest, start):
        pid, workers = start()
        workers[0].kill()
        assert nest.end() == 0
        check_whole(s, 1200)

@pytest.mark.parametrize('how', ['killed', 'interrupted', 'killed, and ignores Ctrl-C'])
def test_workers_that_wait_for_a_silent_server_stop_too(tmp_path, how):
    ignore = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if 'ignores' in how else {}
    hang, kw = threading.Event(), dict(home=str(tmp_path), ingest_processes=3)
    with serve_site({f'/{i}.jpg': lambda h: hang.wait(30) for i in range(200)}) as site, Nest(stderr=subprocess.DEVNULL, **ignore) as nest:
        eng = fill(settings(**kw), urls(site))
        pid = nest.start(site, **kw)
        workers = until(lambda: len(o := psutil.Process(pid).children()) == 2 and o)
        ids = {r['url_source'].rpartition('/')[2]: r['id'] for r in list_rows(eng)}
        until(lambda: len({ids[o.strip('/')] % 3 for o in list(site.seen)}) == 3)
        os.kill(pid, signal.SIGKILL if 'killed' in how else signal.SIGINT)
        assert nest.end() == (-signal.SIGKILL if 'killed' in how else 130)
        until(lambda: all(map(gone, workers)), 5)
        hang.set()
    assert count_by_status(eng)['new'] == 200

def test_a_slow_host_leaves_room_for_the_others(tmp_path):
    done = {}
    def slow(h): time.sleep(.2); h.answer(200, {'Content-Length': len(data)}, data); done['slow'] = time.monotonic()
    data = noise_photo(0)
    with serve_site({f'/{i}.jpg': slow for i in range(300)}) as site, serve_site({f'/{i}.jpg': noise_photo(i) for i in range(10)}) as quick:
        s = settings(home=tmp_path)
        fill(s, [f'http://slow.test/{i}.jpg' for i in range(300)] + [f'http://quick.test/{i}.jpg' for i in range(10)])
        start = time.monotonic()
        until_quick = threading.Thread(target=lambda: (until(lambda: quick.seen.total() == 10), done.__setitem__('quick', time.monotonic())))
        until_quick.start()
        ingest(s, connect_to={'slow.test': site.server_address, 'quick.test': quick.server_address}, progress=False)
        until_quick.join()
    assert done['quick'] - start < (done['slow'] - start) / 2

def test_one_host_is_asked_for_no_more_by_three_processes(tmp_path):
    now, most, lock = collections.Counter(), [0], threading.Lock()
    def page(h):
        with lock: now['n'] += 1; most[0] = max(most[0], now['n'])
        time.sleep(.02)
        with lock: now['n'] -= 1
        h.answer(200, {'Content-Length': len(data)}, data)
    data, s = noise_photo(0), settings(home=tmp_path, ingest_processes=3, ingest_per_host=9)
    with serve_site({f'/{i}.jpg': page for i in range(900)}) as site:
        fill(s, urls(site))
        assert outcome(ingest(s, connect_to=site.to, progress=False)) == {'stored': 900}
    assert 3 < most[0] <= 9

def test_an_error_of_a_worker_is_raised_by_its_parent(tmp_path):
    (tmp_path/'file').write_bytes(b'')
    (tmp_path/'a.jpg').write_bytes(noise_photo(1))
    s = settings(home=tmp_path/'home', store_url=str(tmp_path/'file'))
    fill(s, [(tmp_path/'a.jpg').as_uri()])
    worker = Worker(s, (1, 1))
    with pytest.raises(PlantError, match='run again'): worker.follow(print)
    _stop_workers([worker])
    assert worker.process.returncode == 0

script = '''
import sys
from plant_mlops.core.config import settings
from plant_mlops.data.ingest import ingest
print('script runs')
result = ingest(settings(home=sys.argv[1], ingest_processes=3), progress=False)
print(result['stored'])
'''

def test_a_script_that_ingests_in_several_processes_runs_once(tmp_path):
    "Workers do not import the main module, and print nothing to standard output."
    for i in range(30): (tmp_path/f'{i}.jpg').write_bytes(noise_photo(i))
    fill(settings(home=tmp_path/'home'), [(tmp_path/f'{i}.jpg').as_uri() for i in range(30)])
    (tmp_path/'script.py').write_text(script)
    output = subprocess.check_output([sys.executable, tmp_path/'script.py', tmp_path/'home'], text=True)
    assert output.split('\n') == ['script runs', '30', '']

# -- bad photos

def giant_png(side=50_000):
    "A valid black PNG of 50,000 × 50,000 pixels, one bit each."
    def chunk(kind, data): return len(data).to_bytes(4, 'big') + kind + data + zlib.crc32(kind + data).to_bytes(4, 'big')
    pack, row = zlib.compressobj(1), bytes(1 + side // 8) * 100
    data = b''.join([pack.compress(row) for _ in range(side // 100)]) + pack.flush()
    head = side.to_bytes(4, 'big') * 2 + bytes([1, 0, 0, 0, 0])
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', data) + chunk(b'IEND', b'')

def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(picture(), exif=exif)

html = b'<!DOCTYPE html>\n<html><body>Not here</body></html>'
good = {'cmyk.jpg': lambda: encode(picture(1, mode='CMYK')), 'deep.png': lambda: encode(Image.fromarray(np.arange(3000, dtype='uint16').reshape(50, 60)), 'PNG'),
        'palette.png': lambda: encode(picture(2, mode='P'), 'PNG'), 'rotated.jpg': rotated, 'web.webp': lambda: encode(picture(3), 'WEBP'),
        'animated.gif': lambda: encode(picture(4), 'GIF', save_all=True, append_images=[picture(5), picture(6)]),
        'un été, à la mer 100%.jpg': lambda: noise_photo(7)}
bad = {'half.jpg': (lambda: noise_photo(8)[:1500], 'damaged or cut off'), 'empty.jpg': (lambda: b'', 'empty'),
       'page.jpg': (lambda: (200, {'Content-Type': 'image/jpeg'}, html), 'web page'), 'giant.png': (giant_png, 'pixels'),
       'noise.jpg': (lambda: os.urandom(500), 'not a photo')}

def test_bad_photos(tmp_path):
    s = settings(home=tmp_path)
    pages = {f'/{k}': v() for k, v in good.items()} | {f'/{k}': v[0]() for k, v in bad.items()}
    with serve_site(pages) as site:
        eng = fill(s, urls(site))
        assert outcome(ingest(s, connect_to=site.to, progress=False)) == dict(stored=len(good), rejected=len(bad))
        table = by_name(eng)
        for name in good: assert table[name]['status'] == 'stored', table[name]
        for name, (_, why) in bad.items(): assert table[name]['status'] == 'rejected' and why in table[name]['error'], table[name]
        assert {o.key for o in open_store(s).list()} == {f'raw/{sha256_of(pages["/" + o])}' for o in good}
        assert site.seen.total() == len(pages)

def test_files_with_spaces_and_accents(tmp_path):
    s = settings(home=tmp_path/'home')
    for name in good: (tmp_path/name).write_bytes(good[name]())
    eng = fill(s, [(tmp_path/o).as_uri() for o in good])
    assert outcome(ingest(s, progress=False)) == dict(stored=len(good))

# -- servers that misbehave

def drip(h):
    "A slow loris: a byte now and then, without end."
    h.answer(200, {'Content-Length': 10_000})
    for _ in range(100): h.wfile.write(b'\xff'); h.wfile.flush(); time.sleep(.1)

def hang_up(h): h.connection.shutdown(socket.SHUT_RDWR)
def cut(h): h.answer(200, {'Content-Length': 10_000}, b'\xff\xd8'); hang_up(h)
def endless(h):
    h.answer(200, {'Connection': 'close'})
    h.close_connection = True
    while True: h.wfile.write(bytes(1 << 16))

def once(status, then, **headers):
    "A page that fails the first time."
    def page(h):
        first = h.server.seen[unquote(h.path)] == 1
        h.answer(*((status, {'Content-Length': 0, **headers}) if first else (200, {'Content-Length': len(then)}, then)))
    return page

def test_bad_servers(tmp_path):
    to = lambda url: (302, {'Location': url}, b'')
    pages = {'/good.jpg': noise_photo(1), '/moved.jpg': to('/good.jpg'), '/flaky.jpg': once(503, noise_photo(2)), '/busy.jpg': once(429, noise_photo(3), **{'Retry-After': '1'}),
             '/drip.jpg': drip, '/bye.jpg': hang_up, '/cut.jpg': cut, '/endless.jpg': endless, '/large.jpg': (200, {}, bytes(200_001)),
             '/loop.jpg': to('/loop.jpg'), '/gone.jpg': (410, {}, b''), '/error.jpg': (500, {}, b''), '/file.jpg': to('file:///etc/hostname'),
             '/bucket.jpg': to('s3://a/b'), '/cloud.jpg': to('http://169.254.169.254/latest/meta-data/'), '/odd.jpg': to('http://2130706433/')}
    with serve_site(pages) as site:
        site.pages['/inside.jpg'] = to(f'http://127.0.0.1:{site.server_port}/secret.jpg')
        site.pages['/secret.jpg'] = noise_photo(4)
        s = settings(home=tmp_path, ingest_retries=2, ingest_timeout=1, ingest_max_bytes=200_000)
        eng = fill(s, [o for o in urls(site) if 'secret' not in o] + ['http://photos.test/none.jpg'])
        start = time.monotonic()
        result = ingest(s, connect_to=site.to, progress=False)
        assert outcome(result) == dict(stored=4, failed=4, rejected=10) and time.monotonic() - start < 10
        said = {k: (r['status'], r['error']) for k, r in by_name(eng).items()}
        expected = {'drip': ('failed', 'within 1 s'), 'bye': ('failed', 'connection'), 'cut': ('failed', 'connection'), 'error': ('failed', '500'),
                    'endless': ('rejected', 'larger than'), 'large': ('rejected', 'larger than'), 'loop': ('rejected', 'redirects'), 'gone': ('rejected', '410'),
                    'none': ('rejected', '404'), 'file': ('rejected', 'http or https'), 'bucket': ('rejected', 'http or https'),
                    'inside': ('rejected', 'not a public address'), 'cloud': ('rejected', 'not a public address'), 'odd': ('rejected', 'neither a host name nor')}
        for k, (status, why) in expected.items(): assert said[f'{k}.jpg'][0] == status and why in said[f'{k}.jpg'][1], (k, said[f'{k}.jpg'])
        assert site.seen['/secret.jpg'] == 0 and site.seen['/gone.jpg'] == 1 and site.seen['/error.jpg'] == site.seen['/flaky.jpg'] == 2

def test_failed_again_and_given_up(tmp_path):
    s = settings(home=tmp_path, ingest_retries=1, ingest_attempts=2)
    with serve_site({'/a.jpg': (500, {}, b'')}) as site:
        eng = fill(s, urls(site))
        assert [outcome(ingest(s, connect_to=site.to, progress=False)) for _ in range(3)] == [dict(failed=1), dict(failed=1), {}]
        assert list_rows(eng)[0]['attempts'] == 2
        site.pages['/a.jpg'] = noise_photo(1)
        reset_rows(eng)
        assert outcome(ingest(s, connect_to=site.to, progress=False)) == dict(stored=1)

def test_a_silent_host_does_not_hold_up_the_others(tmp_path):
    with socket.socket() as closed, serve_site({f'/{i}.jpg': noise_photo(i) for i in range(50)}) as site:
        closed.bind(('127.0.0.1', 0)) # bound and not listening: connections are refused
        s = settings(home=tmp_path, ingest_retries=2, ingest_concurrency=40, ingest_per_host=20)
        eng = fill(s, [f'http://silent.test/{i}.jpg' for i in range(1000)] + urls(site))
        start = time.monotonic()
        result = ingest(s, connect_to={**site.to, 'silent.test': closed.getsockname()}, progress=False)
        assert result['stored'] == 50 and result['skipped'] > 900 and time.monotonic() - start < 10
        assert count_by_status(eng) == dict(new=result['skipped'], stored=50, failed=result['failed'], rejected=0)

# -- names that lie

def test_name_server_that_changes_its_mind(tmp_path, monkeypatch):
    asked = collections.Counter()
    with serve_site({'/a.jpg': noise_photo(1)}, '127.0.0.2') as open_, serve_site({'/a.jpg': noise_photo(2)}, '127.0.0.3') as secret:
        async def look_up(host, port, family):
            asked[host] += 1
            if host == 'none.test': raise OSError('Name or service not known')
            to = {'evil.test': secret, 'rebind.test': open_ if asked[host] == 1 else secret, 'both.test': open_}[host].server_address
            more = [secret.server_address] if host == 'both.test' else []
            return [dict(hostname=host, host=ip, port=p, family=socket.AF_INET, proto=0, flags=0) for ip, p in [to, *more]]
        monkeypatch.setattr(safe_urls, 'look_up_addresses', look_up)
        s = settings(home=tmp_path, ingest_allow_hosts='127.0.0.2', ingest_retries=1)
        eng = fill(s, [f'http://{o}.test/{o}/../a.jpg' for o in ('evil', 'rebind', 'both', 'none')])
        assert outcome(ingest(s, progress=False)) == dict(stored=1, rejected=2, failed=1)
        said = {r['url_source'].split('/')[2]: r for r in list_rows(eng)}
        assert said['rebind.test']['sha256'] == sha256_of(noise_photo(1)) and asked['rebind.test'] == 1
        for o in ('evil.test', 'both.test'): assert '127.0.0.3, which is not a public address' in said[o]['error']
        assert 'no address for the name none.test' in said['none.test']['error']
        assert secret.seen.total() == 0

# -- several workers, a notebook, a bucket

def test_two_shards_never_meet(tmp_path):
    s = settings(home=tmp_path, ingest_batch=10)
    with serve_site({f'/{i}.jpg': noise_photo(i) for i in range(300)}, delay=.01) as site:
        fill(s, urls(site))
        results = []
        both = [threading.Thread(target=lambda i=i: results.append(ingest(s, (i, 2), site.to, progress=False))) for i in (1, 2)]
        for o in both: o.start()
        for o in both: o.join()
        assert sorted(r['stored'] for r in results) == [150, 150] and set(site.seen.values()) == {1} and len(site.seen) == 300
    check_whole(s, 300)

def test_in_a_running_event_loop(tmp_path):
    s = settings(home=tmp_path)
    with serve_site({'/1.jpg': noise_photo(1)}) as site:
        fill(s, urls(site))
        async def cell(): return ingest(s, connect_to=site.to, progress=False)
        assert outcome(asyncio.run(cell())) == dict(stored=1)

def test_interrupted_in_a_notebook(tmp_path):
    s = settings(home=tmp_path, ingest_batch=10_000, ingest_concurrency=8)
    with serve_site({f'/{i}.jpg': noise_photo(i) for i in range(800)}, delay=.02) as site:
        eng = fill(s, urls(site))
        def interrupt():
            while site.seen.total() < 60: time.sleep(.01)
            os.kill(os.getpid(), signal.SIGINT)
        async def cell(): return ingest(s, connect_to=site.to, progress=False)
        threading.Thread(target=interrupt).start()
        loop = asyncio.new_event_loop()
        with pytest.raises(KeyboardInterrupt): loop.run_until_complete(cell())
        loop.close()
        assert 30 < count_by_status(eng)['stored'] < 800

def test_s3_urls(weed, tmp_path):
    s = weed.settings('from', home=tmp_path)
    source = open_store(s)
    source.put('été 1+1.jpg', noise_photo(1))
    eng = fill(weed.settings('target', home=tmp_path), ['s3://from/été 1+1.jpg', 's3://from/none.jpg', 's3://nowhere/a.jpg'])
    s = weed.settings('target', home=tmp_path, ingest_retries=1)
    assert outcome(ingest(s, progress=False)) == dict(stored=1, rejected=2)
    assert [o.key for o in open_store(s).list()] == [f'raw/{sha256_of(noise_photo(1))}']
    assert [r['error'] and '404' in r['error'] for r in list_rows(eng)] == [None, True, True]

# -- what it writes to fails

def test_full_disk(tmp_path):
    def small_files(): resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)) # a disk that takes no large photo
    big, kw = encode(picture(0, (600, 600)), quality=95), dict(home=str(tmp_path), ingest_concurrency=1)
    assert len(big) > 300_000
    with serve_site({f'/{i}.jpg': big if i == 20 else noise_photo(i) for i in range(30)}) as site:
        s = settings(**kw)
        eng = fill(s, urls(site))
        with Nest(preexec_fn=small_files, stderr=open(tmp_path/'said', 'w')) as nest:
            nest.start(site, **kw)
            assert nest.end() == 1
        assert 'disk space' in (tmp_path/'said').read_text() and 'Traceback' not in (tmp_path/'said').read_text()
        assert count_by_status(eng) == dict(new=10, stored=20, failed=0, rejected=0)
        assert outcome(ingest(s, connect_to=site.to, progress=False)) == dict(stored=10)
    check_whole(s, 30)

def test_full_disk_mounted(tiny_disk, tmp_path):
    s = settings(home=tmp_path, store_url=str(tiny_disk/'store'), ingest_batch=5)
    with serve_site({f'/{i}.jpg': noise_photo(i) for i in range(200)}) as site:
        eng = fill(s, urls(site))
        with pytest.raises(PlantError, match='No space left on device.*disk space'): ingest(s, connect_to=site.to, progress=False)
        some = count_by_status(eng)['stored']
        assert 10 < some < 200 and count_by_status(eng)['new'] == 200 - some
        subprocess.run(['mount', '-o', 'remount,size=40m', tiny_disk], check=True)
        assert outcome(ingest(s, connect_to=site.to, progress=False)) == dict(stored=200 - some)
    check_whole(s, 200)

def test_store_that_stops_answering(weed, tmp_path):
    s = weed.settings('stopped', home=tmp_path, s3_timeout=.5, ingest_concurrency=4, ingest_batch=5)
    with serve_site({f'/{i}.jpg': noise_photo(i) for i in range(80)}, delay=.02) as site:
        eng = fill(s, urls(site))
        def freeze():
            while site.seen.total() < 25: time.sleep(.01)
            os.kill(weed.p.pid, signal.SIGSTOP)
        freezer, start = threading.Thread(target=freeze), time.monotonic()
        freezer.start()
        try:
            with pytest.raises(PlantError, match='cannot be used.*run again'): ingest(s, connect_to=site.to, progress=False)
        finally:
            freezer.join()
            os.kill(weed.p.pid, signal.SIGCONT)
        assert time.monotonic() - start < 40 and count_by_status(eng)['failed'] == count_by_status(eng)['rejected'] == 0 < count_by_status(eng)['stored']
        ingest(weed.settings('stopped', home=tmp_path), connect_to=site.to, progress=False)
    check_whole(s, 80)

def test_catalog_that_stops_answering(postgres, tmp_path, monkeypatch):
    monkeypatch.setattr(database, 'ANSWER_TIMEOUT', 2.)
    s = settings(home=tmp_path, catalog_url=postgres)
    with serve_site({f'/{i}.jpg': noise_photo(i) for i in range(20)}) as site:
        eng = fill(s, urls(site))
        try:
            with eng.begin() as c:
                c.execute(sa.text('LOCK TABLE plants_data IN EXCLUSIVE MODE')) # may be read, not written
                with pytest.raises(PlantError, match='has not answered for 2 s.*run again'): ingest(s, connect_to=site.to, progress=False)
            ingest(s, connect_to=site.to, progress=False)
            check_whole(s, 20)
        finally:
            eng.dispose()
            plants_data.drop(eng)
