"""The container images: built, and run as on a cluster (read-only, unprivileged, with little memory).

Only `make test-images` runs this. It needs root, Debian's podman, buildah, runc and debootstrap, and about 40 GB.
IMAGES_BASE names the base image to build on; `real` is that of the Dockerfiles. Without it, a small Debian image is
made as a base, and kept in IMAGES_DIR."""
import http.client, json, os, re, shutil, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
import pytest
from helpers import find_program, free_port, root, wait_for

pytestmark = pytest.mark.timeout(3600)
SECRET = 'planted-' + 'f7Qz1xW9' # in two parts, so that this file is not taken for the leak
STAND_IN_BASE = 'localhost/stand-in'
BASE_PACKAGES = 'python3-minimal,python3-venv,python3-pip,ca-certificates'
CA_FILE = '/etc/ssl/certs/ca-certificates.crt'
PYTHON = '/opt/venv/bin/python3' # in our images

# -- Podman and Buildah

def run(*command, check=True, **kw) -> subprocess.CompletedProcess:
    "Run a command, which must succeed unless `check` is false."
    command = [*map(str, command)]
    result = subprocess.run(command, capture_output=True, text=True, **kw)
    message = f'{" ".join(command)[:300]}\n{result.stdout[-1500:]}\n{result.stderr[-3000:]}'
    assert result.returncode == 0 or not check, message
    return result

class Engine:
    "Podman and Buildah with a storage of their own, in a folder."
    def __init__(self, folder):
        missing = [program for program in ('podman', 'buildah', 'runc') if not find_program(program)]
        install = 'On Debian: apt install podman buildah crun runc debootstrap'
        assert not missing, f'Not installed: {", ".join(missing)}. {install}'
        assert os.getuid() == 0, 'Only root can build and run the images here.'
        self.folder = folder
        self.driver = 'overlay'
        if not self.succeeds('info'): self.driver = 'vfs' # copies every layer, and works everywhere

    def _command(self, program) -> list:
        storage = ['--root', self.folder/'root', '--runroot', self.folder/'run', '--storage-driver', self.driver]
        return [find_program(program), *storage]

    def _podman(self, *args, **kw):
        options = ['--runtime', find_program('runc'), '--cgroup-manager', 'cgroupfs']
        return run(*self._command('podman'), *options, *args, **kw)

    def buildah(self, *args, **kw) -> str: return run(*self._command('buildah'), *args, **kw).stdout

    def podman(self, *args, **kw) -> str: return self._podman(*args, **kw).stdout

    def exit_code(self, *args) -> int: return self._podman(*args, check=False).returncode

    def succeeds(self, *args) -> bool: return self.exit_code(*args) == 0

    def inspect_image(self, image) -> dict: return json.loads(self.podman('image', 'inspect', image))[0]

    def inspect_container(self, container) -> dict: return json.loads(self.podman('inspect', container))[0]

    def build(self, dockerfile, context, tag, *options) -> float:
        "Build an image; returns the seconds it took."
        start = time.monotonic()
        # Behind a proxy, the base image does not have the proxy's certificate.
        certificates = ['-v', f'{CA_FILE}:{CA_FILE}:ro'] if Path(CA_FILE).exists() else []
        self.buildah('bud', '--isolation', 'chroot', '--network', 'host', '--format', 'docker', *certificates, *options,
                     '-f', dockerfile, '-t', f'localhost/{tag}', context)
        return time.monotonic() - start

    @contextmanager
    def mounted(self, image):
        "The folder of an image's files."
        container = self.buildah('from', '--pull-never', f'localhost/{image}').strip()
        try: yield Path(self.buildah('mount', container).strip())
        finally: self.buildah('rm', container)

    def run(self, image, *args, options=()) -> str:
        "Run a container as on a cluster: a read-only root, no capabilities, no change of user; returns its output."
        limits = ['--ulimit', 'nofile=1024:1024', '--ulimit', 'nproc=4096:4096']
        restrictions = ['--read-only', '--tmpfs', '/tmp', '--cap-drop', 'ALL', '--security-opt', 'no-new-privileges']
        return self.podman('run', '--network', 'host', *limits, *restrictions, *options, f'localhost/{image}', *args)

    @contextmanager
    def running(self, image, *args, options=()):
        "Run a container in the background; yields its ID."
        container = self.run(image, *args, options=['-d', *options]).strip()
        try: yield container
        finally: self.podman('rm', '-f', container)

@pytest.fixture(scope='module')
def engine(pytestconfig):
    folder = Path(os.environ.get('IMAGES_DIR') or pytestconfig.cache.mkdir('images')).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    engine = Engine(folder)
    yield engine
    engine.podman('rm', '--all', '--force', check=False)
    for image in ('serve', 'train', 'bad', 'context'):
        engine.podman('rmi', '--force', f'localhost/{image}', check=False)
    engine.podman('image', 'prune', '--force', check=False)

def make_stand_in_base(engine, folder):
    "Import a small Debian as an image."
    run(find_program('debootstrap'), '--variant=minbase', f'--include={BASE_PACKAGES}', 'bookworm', folder)
    exclude = ['--exclude=./var/cache/apt/archives/*.deb', '--exclude=./var/lib/apt/lists/*']
    tar = subprocess.Popen(['tar', '-C', folder, *exclude, '-c', '.'], stdout=subprocess.PIPE)
    engine.podman('import', '-', STAND_IN_BASE, stdin=tar.stdout)
    assert tar.wait() == 0
    shutil.rmtree(folder)

@pytest.fixture(scope='module')
def base(engine, tmp_path_factory):
    "Options of a build that name the base image."
    name = os.environ.get('IMAGES_BASE')
    if name == 'real': return []
    if name: return ['--build-arg', f'BASE={name}']
    if not engine.succeeds('image', 'exists', STAND_IN_BASE):
        make_stand_in_base(engine, tmp_path_factory.mktemp('base')/'files')
    return ['--pull-never', '--build-arg', f'BASE={STAND_IN_BASE}']

# -- What is built, and with which data it runs

# Files in which people leave secrets.
SECRET_FILES = (
    '.env', 'docker/.env', 'docker/serve/.env', 'plant_mlops/.env', 'plant_mlops/serve/.env.local', '.plant/store/key',
    '.git/config', 'plant_mlops/.plant/key', 'id_rsa', 'docker/serve/token.txt')

@pytest.fixture(scope='module')
def context(tmp_path_factory):
    "A copy of the checkout, with secrets in it."
    folder = tmp_path_factory.mktemp('context')/'src'
    ignored = shutil.ignore_patterns('.venv', '.git', '.pytest_cache', '__pycache__', '_docs', '_proc')
    shutil.copytree(root, folder, symlinks=True, ignore=ignored)
    for file in SECRET_FILES:
        (folder/file).parent.mkdir(parents=True, exist_ok=True)
        (folder/file).write_text(f'PLANT_TOKEN={SECRET}\n')
    return folder

def build_image(engine, context, name, base) -> str:
    "Build one of our images; returns its name."
    seconds = engine.build(context/f'docker/{name}/Dockerfile', context, name, *base)
    print(f'\n{name}: built in {seconds:.0f} s')
    return name

@pytest.fixture(scope='module')
def serve(engine, base, context): return build_image(engine, context, 'serve', base)

@pytest.fixture(scope='module')
def train(engine, base, context): return build_image(engine, context, 'train', base)

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A home with drawn photos and a barely trained model: as large as in production, in the larger file format."
    home = tmp_path_factory.mktemp('home')
    env = {k: v for k, v in os.environ.items() if not k.startswith('PLANT_')}
    env |= dict(PLANT_EPOCHS='0', PLANT_PRECISION='fp32')
    run(sys.executable, '-m', 'plant_mlops', 'run', '--home', home, '--synthetic', 40, env=env, cwd=home)
    run('chmod', '-R', 'a+rX', home)
    return home

@pytest.fixture
def data(tmp_path):
    "A folder that the user of the images may write to, for /data."
    folder = tmp_path/'data'
    folder.mkdir()
    run('chown', '-R', '10001:10001', folder)
    return folder

def variables(**env) -> list:
    "Options of `podman run` that set environment variables."
    return [option for name, value in env.items() for option in ('-e', f'{name}={value}')]

QUICK_TRAINING = variables(PLANT_EPOCHS=0, PLANT_IMAGE_SIZE=96, PLANT_PRECISION='fp32')

# -- Contents of the images

BUILD_TOOLS = ('gcc', 'cc', 'g++', 'make', 'ld', 'git', 'curl')
PROGRAM_FOLDERS = ('bin', 'usr/bin', 'usr/local/bin', 'opt/venv/bin')
UNWANTED_FILES = (
    'root/.cache', 'tmp/*', 'build', 'opt/tools', 'opt/venv/lib/*/site-packages/pip',
    'opt/venv/lib/*/site-packages/plant_mlops/.*')
LABELS = {f'org.opencontainers.image.{name}'
          for name in ('title', 'description', 'version', 'revision', 'source', 'licenses')}

def find_problems(engine, image) -> list:
    "Messages about build tools, caches and secrets that are in an image, and about a wrong user or missing labels."
    problems = []
    with engine.mounted(image) as files:
        for folder in PROGRAM_FOLDERS:
            problems += [f'{tool} is there' for tool in BUILD_TOOLS if (files/folder/tool).exists()]
        for pattern in UNWANTED_FILES:
            problems += [f'{path.relative_to(files)} is there' for path in files.glob(pattern)]
        folders = [files/folder for folder in ('opt', 'data', 'root', 'etc', 'home', 'srv')]
        grep = subprocess.run(['grep', '-rlF', '--exclude=*.so*', SECRET, *folders], capture_output=True, text=True)
        problems += [f'{Path(path).relative_to(files)} has the secret' for path in grep.stdout.splitlines()]
    config = engine.inspect_image(image)['Config']
    if config.get('User') != '10001:10001': problems.append(f"it runs as {config.get('User') or 'root'}")
    if SECRET in json.dumps(config): problems.append('its configuration has the secret')
    if not LABELS <= set(config.get('Labels') or {}): problems.append('a label is missing')
    return problems

EXPECTED_CONTEXT = '|'.join([
    r'LICENSE', r'README\.md', r'pyproject\.toml', r'settings\.ini', r'setup\.py',
    r'(plant_mlops|nbs/jobs|nbs/apps)/(\w+/)*\w+\.(py|sql|ipynb|html\.j2)',
    r'docker/(\w+/)?\w+\.lock', r'docker/airflow/(kernel\.json|plants\.py)'])

def test_only_source_and_lock_files_are_sent_to_the_build(engine, context, tmp_path):
    (tmp_path/'Dockerfile').write_text('FROM scratch\nCOPY . /\n')
    engine.build(tmp_path/'Dockerfile', context, 'context')
    with engine.mounted('context') as folder:
        files = {str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()}
    assert not [file for file in files if not re.fullmatch(EXPECTED_CONTEXT, file)]
    assert {'plant_mlops/core/config.py', 'nbs/photos/jobs/train.ipynb', 'docker/serve/requirements.lock'} <= files

BAD_DOCKERFILE = '''
ARG BASE
FROM ${BASE}
COPY .env /opt/venv/lib/python3/site-packages/plant_mlops/.env
COPY .env /usr/bin/gcc
COPY .env /root/.cache/pip/x
LABEL a=b
'''

def test_the_problems_of_a_bad_image_are_found(engine, base, context, tmp_path):
    (tmp_path/'Dockerfile').write_text(BAD_DOCKERFILE.lstrip())
    (tmp_path/'.env').write_text(SECRET)
    if not base: pytest.skip('the base image is named in the Dockerfiles only')
    engine.build(tmp_path/'Dockerfile', tmp_path, 'bad', *base)
    problems = ' '.join(find_problems(engine, 'bad'))
    for problem in ('gcc is there', 'root/.cache is there', 'plant_mlops/.env is there', '.env has the secret',
                    'it runs as root', 'a label is missing'):
        assert problem in problems, problems

# -- The image `serve`

def peak_memory_file(pid) -> Path:
    "File of the control group with the largest amount of memory that a process has used."
    for line in Path(f'/proc/{pid}/cgroup').read_text().splitlines():
        _, kind, path = line.split(':', 2)
        if kind not in ('memory', ''): continue
        folder = Path('/sys/fs/cgroup')/kind/path.lstrip('/')
        for name in ('memory.max_usage_in_bytes', 'memory.peak'):
            if (folder/name).exists(): return folder/name
    raise AssertionError('no control group counts its memory')

def request(port, path, body=None, **headers):
    "Send a request; returns the status and the JSON of the response."
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
    connection.request('POST' if body else 'GET', path, body, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())

def predict(port, photo):
    header = b'Content-Disposition: form-data; name="file"; filename="p.jpg"\r\nContent-Type: image/jpeg'
    body = b'--x\r\n' + header + b'\r\n\r\n' + photo + b'\r\n--x--\r\n'
    return request(port, '/predict', body, **{'Content-Type': 'multipart/form-data; boundary=x'})

def test_serve_adds_at_most_250_mb_to_its_base_and_has_no_problems(engine, serve, base):
    assert find_problems(engine, serve) == []
    name = next((option.partition('=')[2] for option in base if option.startswith('BASE=')), None)
    size = engine.inspect_image(f'localhost/{serve}')['Size']/1e6
    base_size = engine.inspect_image(name)['Size']/1e6 if name else 0 # without a name of the base, the whole counts
    print(f'\nserve: {size:.0f} MB, {size - base_size:.0f} MB of them on top of its base')
    assert size - base_size <= 250

def check_restrictions(engine, container):
    "Check that the process runs as our user, without capabilities, and can write to /data and /tmp only."
    status = engine.podman('exec', container, 'cat', '/proc/1/status')
    assert re.search(r'Uid:\s+10001\s+10001', status)
    assert re.search(r'CapEff:\s+0+\n', status)
    assert re.search(r'NoNewPrivs:\s+1', status)
    for path in ('/x', '/opt/venv/x', '/data/store/x'):
        assert not engine.succeeds('exec', container, 'touch', path), f'{path} can be written'
    engine.podman('exec', container, 'touch', '/data/x', '/tmp/x')

def photos_per_second(port, photo, n=200) -> float:
    "Predict a photo again and again, eight at a time; all answers must be good."
    start = time.monotonic()
    with ThreadPoolExecutor(8) as pool: statuses = {*pool.map(lambda _: predict(port, photo)[0], range(n))}
    seconds = time.monotonic() - start
    assert statuses == {200}
    return n/seconds

def test_serve_answers_and_stops_in_time_with_half_a_core_and_512_mb(engine, serve, home):
    port = free_port()
    options = ['--memory', '512m', '--cpus', '0.5', *variables(PLANT_HOST='127.0.0.1', PLANT_PORT=port),
               '-v', f'{home}/store:/data/store:ro']
    with engine.running(serve, options=options) as container:
        start = time.monotonic()
        wait_for(lambda: request(port, '/ready')[0] == 200, 60, 'the API')
        seconds_to_ready = time.monotonic() - start
        photo = next((home/'sample').glob('*.jpg')).read_bytes()
        status, answer = predict(port, photo)
        assert status == 200
        assert answer['prediction'] in ('dandelion', 'grass')
        assert answer['model_version'] == '1'
        assert engine.exit_code('healthcheck', 'run', container) == 0
        check_restrictions(engine, container)
        speed = photos_per_second(port, photo)
        pid = engine.inspect_container(container)['State']['Pid']
        peak = int(peak_memory_file(pid).read_text())/1e6
        start = time.monotonic()
        engine.podman('stop', '-t', 20, container)
        seconds_to_stop = time.monotonic() - start
        print(f'\nserve, half a core: ready after {seconds_to_ready:.1f} s, {speed:.0f} photos per second, '
              f'{peak:.0f} MB at most, stopped in {seconds_to_stop:.1f} s')
        state = engine.inspect_container(container)['State']
        assert state['ExitCode'] == 0, engine.podman('logs', container)
        assert not state['OOMKilled'], engine.podman('logs', container)
        assert seconds_to_stop < 10
        assert peak < 512

def test_a_server_that_does_not_answer_is_unhealthy(engine, serve):
    options = ['--entrypoint', PYTHON, *variables(PLANT_PORT=free_port())]
    with engine.running(serve, '-c', 'import time; time.sleep(60)', options=options) as container:
        assert engine.exit_code('healthcheck', 'run', container) == 1

def test_serve_has_the_clients_of_s3_and_of_its_credentials(engine, serve):
    services = ('s3', 'sts', 'sso', 'sso-oidc')
    code = f"import boto3; [boto3.client(o, region_name='eu-west-1') for o in {services}]; print('all')"
    assert engine.run(serve, '-c', code, options=['--rm', '--entrypoint', PYTHON]).strip() == 'all'

# -- The image `train`

def test_train_imports_pytorch_and_ingests_on_a_read_only_root(engine, train, home, data, tmp_path):
    assert find_problems(engine, train) == []
    print(f"\ntrain: {engine.inspect_image(f'localhost/{train}')['Size']/1e9:.1f} GB")
    for label in ('grass', 'dandelion'): shutil.copytree(home/'sample', tmp_path/'photos'/label)
    def run_train(*args, options=()):
        volumes = ['-v', f'{data}:/data', '-v', f'{tmp_path}/photos:/photos:ro']
        return engine.run(train, *args, options=['--rm', *volumes, *QUICK_TRAINING, *options])
    assert 'From photo URLs to a model in production' in run_train('--help')
    code = 'import torch, timm, fastai.vision.all; print(torch.version.cuda, torch.zeros(2).sum())'
    output = run_train('-c', code, options=['--entrypoint', PYTHON])
    assert re.match(r'\d+\.\d+ tensor', output), output
    start = time.monotonic()
    output = run_train('job', 'run', 'ingest', '-p', 'photos', '/photos', '--json')
    seconds = time.monotonic() - start
    [job] = json.loads(output)
    assert job['status'] == 'succeeded', job
    assert job['report'], job
    print(f"job run ingest: {seconds:.0f} s, {job['outputs']}")

def test_train_runs_the_pipeline_up_to_a_promotion(engine, train, data):
    options = ['--rm', '-v', f'{data}:/data', *QUICK_TRAINING, *variables(PLANT_BATCH_SIZE=8)]
    start = time.monotonic()
    output = engine.run(train, 'pipeline', 'run', '-p', 'synthetic', '40', '--json', options=options)
    print(f'\npipeline run: {time.monotonic() - start:.0f} s')
    assert json.loads(output.splitlines()[-1])['promote']['outputs']['promoted']

def test_train_runs_an_mlflow_server(engine, train):
    port = free_port()
    command = ['server', '--backend-store-uri', 'sqlite:////data/mlflow.db', '--artifacts-destination',
               '/data/artifacts', '--host', '127.0.0.1', '--port', port, '--workers', '1']
    def is_healthy():
        connection = http.client.HTTPConnection('127.0.0.1', port, timeout=5)
        connection.request('GET', '/health')
        return connection.getresponse().status == 200
    with engine.running(train, *command, options=['--entrypoint', 'mlflow']):
        start = time.monotonic()
        wait_for(is_healthy, 120, 'MLflow')
        print(f'\nmlflow server: up after {time.monotonic() - start:.0f} s')
