"Fixtures (real servers, on free ports of loopback), a summary of skipped tests, and the order of tests."
import os, signal, subprocess
from collections import Counter
from pathlib import Path
import pytest
from plant_mlops.core.process import raise_gc_thresholds
from helpers import (SLOW_FILES, SLOW_NOTEBOOKS, TOGETHER, borrow_venv, copy_checkout, dask_cluster, find_program,
                     free_port, missing, notebook_name, photos_dir, require, root, start_postgres, stop, wait_for)

# -- Markers, and a summary of what was skipped

def pytest_configure(config):
    raise_gc_thresholds()
    # a shell starts background jobs with SIGINT ignored, and processes that tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line('markers', 'xdist_group(name): tests that one worker runs') # for runs without pytest-xdist
    config.addinivalue_line('markers', 'slow: takes more than a few seconds; `make test-fast` omits it')
    needs = 'needs(*components): skip the test where one is not installed; see COMPONENTS in helpers.py'
    config.addinivalue_line('markers', needs)

def pytest_runtest_setup(item):
    for mark in item.iter_markers('needs'):
        for component in mark.args: require(component)

def reason_of(report) -> str:
    "Why a test was skipped."
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix('Skipped: ').splitlines()[0]

skipped_files = {} # test file → reason, where a whole file was skipped while tests were collected

def pytest_collectreport(report):
    if report.skipped: skipped_files[report.nodeid] = reason_of(report)

def pytest_sessionfinish(session):
    "Under xdist, send the files that this worker skipped to the main process."
    if hasattr(session.config, 'workeroutput'): session.config.workeroutput['skipped_files'] = skipped_files

@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    skipped_files.update(getattr(node, 'workeroutput', {}).get('skipped_files', {}))

def pytest_terminal_summary(terminalreporter):
    "Print what was missing, how to install it, and how many tests were skipped without it."
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
def _no_user_settings(monkeypatch, tmp_path):
    "Remove the settings of the person who runs the tests, and use a home that is not in the checkout."
    for name in [*os.environ]:
        is_alias = name in ('MLFLOW_TRACKING_URI', 'FORWARDED_ALLOW_IPS') # other names of settings
        if name.startswith('PLANT_') or is_alias: monkeypatch.delenv(name)
    monkeypatch.setenv('PLANT_HOME', str(tmp_path/'home'))

@pytest.fixture(scope='session', autouse=True)
def _clean_checkout():
    "Fail if the tests leave a file in the checkout, also one that git ignores."
    def files(): return {path for path in root.iterdir() if not path.name.startswith('.')}
    before = files()
    yield
    assert files() == before, f'left in the checkout: {sorted(map(str, files() - before))}'

@pytest.fixture(autouse=True)
def _restore_sigint():
    "Restore the handler of SIGINT: nbdev's runner of notebooks leaves one that ends the process."
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
    "A copy of the project's files, with this environment as its .venv, so that nothing is installed twice."
    to = tmp_path_factory.mktemp('clone')/'plant_mlops'
    copy_checkout(to)
    borrow_venv(to)
    return to

def mount_disk(folder, size):
    "Mount a small disk; skips the test where that is not allowed."
    folder.mkdir()
    result = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', folder], capture_output=True)
    if result.returncode: missing('root', 'to mount a small disk')

def unmount_disk(folder): subprocess.run(['umount', '-l', folder], check=True)

@pytest.fixture
def disk(tmp_path):
    "A disk of 60 MB."
    folder = tmp_path/'disk'
    mount_disk(folder, '60m')
    yield folder
    unmount_disk(folder)

@pytest.fixture
def tiny_disk(tmp_path):
    "A disk of 400 kB."
    folder = tmp_path/'disk'
    mount_disk(folder, '400k')
    yield folder
    unmount_disk(folder)

# -- An S3 server

class SeaweedFS:
    "A process of SeaweedFS, which speaks S3."
    key = 'plant'
    secret = 'plant-secret'

    def __init__(self, folder):
        self.port = free_port()
        self.url = f'http://127.0.0.1:{self.port}'
        ports = {name: free_port() for name in ('master', 'volume', 'filer', 'webdav', 'admin')}
        command = [find_program('weed'), 'mini', f'-dir={folder}', '-ip=127.0.0.1', '-ip.bind=127.0.0.1',
                   f'-s3.port={self.port}', *(f'-{name}.port={port}' for name, port in ports.items()),
                   '-s3.port.iceberg=0', '-s3.port.lance=0', '-master.telemetry=false', '-s3.domainName=s3.test']
        env = os.environ | dict(AWS_ACCESS_KEY_ID=self.key, AWS_SECRET_ACCESS_KEY=self.secret)
        self.log = open(folder/'weed.log', 'wb')
        self.process = subprocess.Popen(command, env=env, stdout=self.log, stderr=self.log, cwd=folder)
        s3 = self.client()
        wait_for(lambda: s3.list_buckets() is not None and self.process.poll() is None, what='SeaweedFS')

    def client(self):
        "A client of boto3."
        import boto3
        return boto3.client('s3', endpoint_url=self.url, aws_access_key_id=self.key, aws_secret_access_key=self.secret,
                            region_name='us-east-1')

    def settings(self, bucket='plants', **kw):
        "Settings whose store is a bucket of this server."
        from plant_mlops.core.config import settings
        return settings(store_url=f's3://{bucket}', s3_endpoint_url=self.url, s3_access_key=self.key,
                        s3_secret_key=self.secret, **kw)

@pytest.fixture(scope='session')
def seaweedfs(tmp_path_factory):
    "A real S3 server."
    server = SeaweedFS(tmp_path_factory.mktemp('seaweedfs'))
    yield server
    stop(server.process)

# -- Databases

def drop_tables(url) -> str:
    "Empty a database; returns its URL."
    import sqlalchemy as sa
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for table in sa.inspect(engine).get_table_names(): connection.execute(sa.text(f'DROP TABLE {table}'))
    engine.dispose()
    return url

@pytest.fixture
def postgres(_postgres):
    "URL of a real PostgreSQL, empty; its log is shown where it does not answer."
    from sqlalchemy.exc import OperationalError
    url = _postgres.get_uri().replace('postgresql://', 'postgresql+psycopg://')
    try: return drop_tables(url)
    except OperationalError as e: pytest.fail(f'{e}\n{_postgres.log.read_text()[-3000:]}')

@pytest.fixture
def mariadb(_mariadb):
    "URL of a real MariaDB, empty."
    return drop_tables(_mariadb)

@pytest.fixture(scope='session')
def _postgres():
    "A real PostgreSQL."
    with start_postgres() as server: yield server

def start_mariadb(folder):
    "Start MariaDB in a folder; returns its process and port."
    server = require('mariadbd')
    port = free_port()
    options = ['--no-defaults', f'--datadir={folder}/data']
    if os.getuid() == 0: options.append('--user=root')
    install = [find_program('mariadb-install-db'), *options, '--auth-root-authentication-method=normal']
    subprocess.run(install, check=True, capture_output=True)
    command = [server, *options, f'--port={port}', f'--socket={folder}/s', '--bind-address=127.0.0.1']
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return process, port

@pytest.fixture(scope='session')
def _mariadb(tmp_path_factory):
    "URL of a real MariaDB."
    import pymysql
    process, port = start_mariadb(tmp_path_factory.mktemp('mariadb'))
    def is_ready():
        with pymysql.connect(host='127.0.0.1', port=port, user='root') as connection:
            connection.cursor().execute('CREATE DATABASE IF NOT EXISTS plants CHARACTER SET utf8mb4')
        return True
    try:
        wait_for(is_ready, what='MariaDB')
        yield f'mysql+pymysql://root@127.0.0.1:{port}/plants?charset=utf8mb4'
    finally: stop(process)

# -- Clusters

@pytest.fixture(scope='session')
def dask(tmp_path_factory):
    "A cluster of two workers."
    with dask_cluster(tmp_path_factory.mktemp('dask')) as cluster:
        cluster.start_workers()
        yield cluster

@pytest.fixture
def empty_dask(tmp_path):
    "A scheduler without workers."
    with dask_cluster(tmp_path) as cluster: yield cluster

# -- Which tests run together, in which order, and which are slow

def is_slow_notebook(item) -> bool:
    "Whether a test runs one of `SLOW_NOTEBOOKS`, or one of the folder `model`, which import PyTorch."
    if not item.name.startswith('test_notebook['): return False
    name = notebook_name(item.name.removeprefix('test_notebook[').removesuffix(']'))
    return name in SLOW_NOTEBOOKS or name.startswith('model/')

# Fixtures that take seconds to start.
SLOW_FIXTURES = {'airflow', 'base', 'checkov', 'chromium', 'clone', 'mariadb', 'postgres', 'prom', 'sites'}

def is_slow(item) -> bool:
    "Whether a test belongs to a slow file, or uses a fixture that is slow to start."
    if item.path.stem in SLOW_FILES or SLOW_FIXTURES & {*item.fixturenames}: return True
    if '[mariadb' in item.name or '[postgres' in item.name: return True
    return is_slow_notebook(item)

def group_of(item) -> str | None:
    "Name of the group of tests that one worker runs; None if any worker may run the test."
    if item.path.stem in TOGETHER: return item.path.stem
    if item.path.stem == 'test_notebooks' and 'fresh' in item.fixturenames: return 'fresh'
    return None

def rank_of(item) -> int:
    "Position of a test in the run: those of `SLOW_FILES` in their order, then other slow ones, then the rest."
    if item.path.stem in SLOW_FILES: return SLOW_FILES.index(item.path.stem)
    if item.get_closest_marker('slow'): return len(SLOW_FILES)
    return len(SLOW_FILES) + 1

@pytest.hookimpl(tryfirst=True) # before pytest-xdist, which reads the groups in the same hook
def pytest_collection_modifyitems(items):
    for item in items:
        if is_slow(item): item.add_marker('slow')
        group = group_of(item)
        if group: item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=rank_of)
