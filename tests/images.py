"""The container images: built, and run as on a cluster: read-only, as an unprivileged user, with little memory. Only `make test-images` runs this.

It needs root, Debian's podman, buildah, runc and debootstrap, and about 40 GB. IMAGES_BASE names the base to build on, `real` is that of the
Dockerfiles; without it a small Debian stands in for it, and is kept in IMAGES_DIR."""
import http.client, json, os, re, shutil, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest
from helpers import free_port, root, wait_for

pytestmark = pytest.mark.timeout(3600)
secret = 'planted-' + 'f7Qz1xW9' # in two parts, so that this file is not taken for the leak

def sh(*cmd, check=True, **kw):
    "Run a command; gives what it printed."
    r = subprocess.run([*map(str, cmd)], capture_output=True, text=True, **kw)
    assert r.returncode == 0 or not check, f'{" ".join(map(str, cmd))[:300]}\n{r.stdout[-1500:]}\n{r.stderr[-3000:]}'
    return r.stdout if check else r

class Engine:
    "Podman and Buildah with a storage of their own."
    def __init__(self, at):
        missing = [o for o in ('podman', 'buildah', 'runc') if not self.where(o)]
        assert not missing, f'Not installed: {", ".join(missing)}. On Debian: apt install podman buildah crun runc debootstrap'
        assert os.getuid() == 0, 'Only root can build and run the images here.'
        self.at = at
        for self.driver in ('overlay', 'vfs'): # vfs copies every layer, and works everywhere
            if not self.podman('info', check=False).returncode: break

    def where(self, o): return shutil.which(o) or shutil.which(o, path='/usr/sbin:/sbin')
    def at_store(self, o): return [self.where(o), '--root', self.at/'root', '--runroot', self.at/'run', '--storage-driver', self.driver]
    def buildah(self, *args, **kw): return sh(*self.at_store('buildah'), *args, **kw)
    def podman(self, *args, **kw): return sh(*self.at_store('podman'), '--runtime', self.where('runc'), '--cgroup-manager', 'cgroupfs', *args, **kw)
    def about(self, image): return json.loads(self.podman('image', 'inspect', image))[0]

    def build(self, file, context, tag, *args):
        "Build an image; gives its seconds."
        began, ca = time.monotonic(), '/etc/ssl/certs/ca-certificates.crt'
        trust = ['-v', f'{ca}:{ca}:ro'] if Path(ca).exists() else [] # behind a proxy, the base does not know whom to trust
        self.buildah('bud', '--isolation', 'chroot', '--network', 'host', '--format', 'docker', *trust, *args, '-f', file, '-t', f'localhost/{tag}', context)
        return time.monotonic() - began

    def run(self, image, *args, options=(), check=True, cmd='run'):
        "Run a container as on a cluster: a read-only root, no capability, no other user."
        return self.podman(cmd, '--network', 'host', '--ulimit', 'nofile=1024:1024', '--ulimit', 'nproc=4096:4096', '--read-only', '--tmpfs', '/tmp',
                           '--cap-drop', 'ALL', '--security-opt', 'no-new-privileges', *options, f'localhost/{image}', *args, check=check)

@pytest.fixture(scope='module')
def engine(pytestconfig):
    at = Path(os.environ.get('IMAGES_DIR') or pytestconfig.cache.mkdir('images')).absolute()
    at.mkdir(parents=True, exist_ok=True)
    e = Engine(at)
    yield e
    e.podman('rm', '--all', '--force', check=False)
    for o in ('serve', 'train', 'bad', 'context'): e.podman('rmi', '--force', f'localhost/{o}', check=False)
    e.podman('image', 'prune', '--force', check=False)

@pytest.fixture(scope='module')
def base(engine, tmp_path_factory):
    "Options of a build that say on what."
    if given := os.environ.get('IMAGES_BASE'): return [] if given == 'real' else ['--build-arg', f'BASE={given}']
    if engine.podman('image', 'exists', 'localhost/stand-in', check=False).returncode:
        files = tmp_path_factory.mktemp('base')/'files'
        sh(engine.where('debootstrap'), '--variant=minbase', '--include=python3-minimal,python3-venv,python3-pip,ca-certificates', 'bookworm', files)
        tar = subprocess.Popen(['tar', '-C', files, '--exclude=./var/cache/apt/archives/*.deb', '--exclude=./var/lib/apt/lists/*', '-c', '.'], stdout=subprocess.PIPE)
        engine.podman('import', '-', 'localhost/stand-in', stdin=tar.stdout)
        assert tar.wait() == 0
        shutil.rmtree(files)
    return ['--pull-never', '--build-arg', 'BASE=localhost/stand-in']

@pytest.fixture(scope='module')
def context(tmp_path_factory):
    "A copy of the checkout, with secrets in the places where people leave them."
    at = tmp_path_factory.mktemp('context')/'src'
    shutil.copytree(root, at, symlinks=True, ignore=shutil.ignore_patterns('.venv', '.git', '.pytest_cache', '__pycache__', '_docs', '_proc'))
    for o in ('.env', 'docker/.env', 'docker/serve/.env', 'plant_mlops/.env', 'plant_mlops/serve/.env.local', '.plant/store/key', '.git/config', 'plant_mlops/.plant/key', 'id_rsa', 'docker/serve/token.txt'):
        (at/o).parent.mkdir(parents=True, exist_ok=True)
        (at/o).write_text(f'PLANT_TOKEN={secret}\n')
    return at

@pytest.fixture(scope='module')
def serve(engine, base, context):
    "The image `serve`."
    print(f"\nserve: built in {engine.build(context/'docker/serve/Dockerfile', context, 'serve', *base):.0f} s")
    return 'serve'

@pytest.fixture(scope='module')
def train(engine, base, context):
    "The image `train`."
    print(f"\ntrain: built in {engine.build(context/'docker/train/Dockerfile', context, 'train', *base):.0f} s")
    return 'train'

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A network of the real size in production, hardly trained, in the larger of the two kinds of file; and a drawn photo."
    at = tmp_path_factory.mktemp('home')
    env = {k: v for k, v in os.environ.items() if not k.startswith('PLANT_')} | dict(PLANT_EPOCHS='0', PLANT_PRECISION='fp32')
    sh(sys.executable, '-m', 'plant_mlops', 'run', '--home', at, '--synthetic', 40, env=env, cwd=at)
    sh('chmod', '-R', 'a+rX', at)
    return at

def problems(engine, image):
    "What is in an image that should not be, or is not in it that should."
    about, found = engine.about(image)['Config'], []
    m = engine.buildah('from', '--pull-never', f'localhost/{image}').strip()
    try:
        at = Path(engine.buildah('mount', m).strip())
        tools = [o for d in ('bin', 'usr/bin', 'usr/local/bin', 'opt/venv/bin') for o in ('gcc', 'cc', 'g++', 'make', 'ld', 'git', 'curl') if (at/d/o).exists()]
        found += [f'{o} is there' for o in tools]
        found += [f'{o.relative_to(at)} is there' for p in ('root/.cache', 'tmp/*', 'build', 'opt/tools', 'opt/venv/lib/*/site-packages/pip', 'opt/venv/lib/*/site-packages/plant_mlops/.*') for o in at.glob(p)]
        leaks = subprocess.run(['grep', '-rlF', '--exclude=*.so*', secret, at/'opt', at/'data', at/'root', at/'etc', at/'home', at/'srv'], capture_output=True, text=True).stdout
        found += [f'{Path(o).relative_to(at)} has the secret' for o in leaks.splitlines()]
    finally: engine.buildah('rm', m)
    if about.get('User') != '10001:10001': found.append(f"it runs as {about.get('User') or 'root'}")
    if secret in json.dumps(about): found.append('its configuration has the secret')
    if not {f'org.opencontainers.image.{o}' for o in ('title', 'description', 'version', 'revision', 'source', 'licenses')} <= set(about.get('Labels') or {}): found.append('a label is missing')
    return found

def test_only_what_an_image_needs_is_sent_to_the_build(engine, context, tmp_path):
    (tmp_path/'Dockerfile').write_text('FROM scratch\nCOPY . /\n')
    engine.build(tmp_path/'Dockerfile', context, 'context')
    m = engine.buildah('from', '--pull-never', 'localhost/context').strip()
    at = Path(engine.buildah('mount', m).strip())
    its = {str(o.relative_to(at)) for o in at.rglob('*') if o.is_file()}
    engine.buildah('rm', m)
    odd = {o for o in its if not re.fullmatch(r'LICENSE|README\.md|pyproject\.toml|settings\.ini|setup\.py|(plant_mlops|nbs/jobs|nbs/apps)/(\w+/)*\w+\.(py|sql|ipynb|html\.j2)|docker/(\w+/)?\w+\.lock|docker/airflow/(kernel\.json|plants\.py)', o)}
    assert not odd
    assert {'plant_mlops/core/config.py', 'nbs/photos/jobs/train.ipynb', 'docker/serve/requirements.lock'} <= its

def test_the_checks_find_what_they_look_for(engine, base, context, tmp_path):
    (tmp_path/'Dockerfile').write_text('ARG BASE\nFROM ${BASE}\nCOPY .env /opt/venv/lib/python3/site-packages/plant_mlops/.env\nCOPY .env /usr/bin/gcc\nCOPY .env /root/.cache/pip/x\nLABEL a=b\n')
    (tmp_path/'.env').write_text(secret)
    if not base: pytest.skip('the base is in the Dockerfiles only')
    engine.build(tmp_path/'Dockerfile', tmp_path, 'bad', *base)
    found = ' '.join(problems(engine, 'bad'))
    for o in ('gcc is there', 'root/.cache is there', 'plant_mlops/.env is there', '.env has the secret', 'it runs as root', 'a label is missing'): assert o in found, found

def memory_of(pid):
    "Folder of the control group that counts a process's memory."
    for line in Path(f'/proc/{pid}/cgroup').read_text().splitlines():
        _, kind, path = line.split(':', 2)
        if kind in ('memory', ''):
            at = Path('/sys/fs/cgroup')/kind/path.lstrip('/')
            for f in ('memory.max_usage_in_bytes', 'memory.peak'):
                if (at/f).exists(): return at/f
    raise AssertionError('no control group counts its memory')

def ask(port, path, body=None, **headers):
    "Status and JSON of an answer."
    c = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
    c.request('POST' if body else 'GET', path, body, headers)
    r = c.getresponse()
    return r.status, json.loads(r.read())

def predict(port, photo):
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="p.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    return ask(port, '/predict', head + photo + b'\r\n--x--\r\n', **{'Content-Type': 'multipart/form-data; boundary=x'})

def test_serve_is_small_and_clean(engine, serve, base):
    assert problems(engine, serve) == []
    on = next((o.partition('=')[2] for o in base if o.startswith('BASE=')), None)
    whole = engine.about(f'localhost/{serve}')['Size']/1e6
    below = engine.about(on)['Size']/1e6 if on else 0 # without a name of the base, the whole counts
    print(f'\nserve: {whole:.0f} MB, {whole - below:.0f} MB of them on top of its base')
    assert whole - below <= 250

def test_serve_answers_with_little(engine, serve, home):
    port = free_port()
    little = ['--memory', '512m', '--cpus', '0.5', '-e', 'PLANT_HOST=127.0.0.1', '-e', f'PLANT_PORT={port}', '-v', f'{home}/store:/data/store:ro']
    c, began = engine.run(serve, options=['-d', *little]).strip(), time.monotonic()
    try:
        wait_for(lambda: ask(port, '/ready')[0] == 200, 60, 'the API')
        ready = time.monotonic() - began
        photo = next((home/'sample').glob('*.jpg')).read_bytes()
        status, answer = predict(port, photo)
        assert status == 200 and answer['prediction'] in ('dandelion', 'grass') and answer['model_version'] == '1'
        assert engine.podman('healthcheck', 'run', c, check=False).returncode == 0
        its = engine.podman('exec', c, 'cat', '/proc/1/status')
        assert re.search(r'Uid:\s+10001\s+10001', its) and re.search(r'CapEff:\s+0+\n', its) and re.search(r'NoNewPrivs:\s+1', its)
        for o in ('/x', '/opt/venv/x', '/data/store/x'): assert engine.podman('exec', c, 'touch', o, check=False).returncode, f'{o} can be written'
        engine.podman('exec', c, 'touch', '/data/x', '/tmp/x')

        t = time.monotonic()
        with ThreadPoolExecutor(8) as many: statuses = [*many.map(lambda _: predict(port, photo)[0], range(200))]
        seconds = time.monotonic() - t
        assert {*statuses} == {200}
        f = memory_of(json.loads(engine.podman('inspect', c))[0]['State']['Pid'])
        peak = int(f.read_text())/1e6

        t = time.monotonic()
        engine.podman('stop', '-t', 20, c)
        print(f'\nserve, half a core: ready after {ready:.1f} s, {200/seconds:.0f} photos per second, {peak:.0f} MB at most, stopped in {time.monotonic() - t:.1f} s')
        state = json.loads(engine.podman('inspect', c))[0]['State']
        assert state['ExitCode'] == 0 and not state['OOMKilled'], engine.podman('logs', c)
        assert time.monotonic() - t < 10 and peak < 512
    finally: engine.podman('rm', '-f', c)

def test_a_server_that_does_not_answer_is_unhealthy(engine, serve):
    c = engine.run(serve, '-c', 'import time; time.sleep(60)', options=['-d', '--entrypoint', '/opt/venv/bin/python3', '-e', f'PLANT_PORT={free_port()}']).strip()
    try: assert engine.podman('healthcheck', 'run', c, check=False).returncode == 1
    finally: engine.podman('rm', '-f', c)

def test_s3_and_its_keys_can_be_had_in_serve(engine, serve):
    code = "import boto3; [boto3.client(o, region_name='eu-west-1') for o in ('s3', 'sts', 'sso', 'sso-oidc')]; print('all')"
    assert engine.run(serve, '-c', code, options=['--rm', '--entrypoint', '/opt/venv/bin/python3']).strip() == 'all'

def test_train_does_its_work_read_only(engine, train, home, tmp_path):
    assert problems(engine, train) == []
    print(f"\ntrain: {engine.about(f'localhost/{train}')['Size']/1e9:.1f} GB")
    (data := tmp_path/'data').mkdir()
    shutil.copytree(home/'sample', photos := tmp_path/'photos'/'grass')
    shutil.copytree(home/'sample', tmp_path/'photos'/'dandelion')
    sh('chown', '-R', '10001:10001', data)
    on = ['-v', f'{data}:/data', '-v', f'{tmp_path}/photos:/photos:ro', '-e', 'PLANT_EPOCHS=0', '-e', 'PLANT_IMAGE_SIZE=96', '-e', 'PLANT_PRECISION=fp32']
    do = lambda *args, options=(): engine.run(train, *args, options=['--rm', *on, *options])
    assert 'From photo URLs to a model in production' in do('--help')
    said = do('-c', 'import torch, timm, fastai.vision.all; print(torch.version.cuda, torch.zeros(2).sum())', options=['--entrypoint', '/opt/venv/bin/python3'])
    assert re.match(r'\d+\.\d+ tensor', said), said
    t = time.monotonic()
    row, = json.loads(do('job', 'run', 'ingest', '-p', 'photos', '/photos', '--json'))
    assert row['status'] == 'succeeded' and row['report'], row
    print(f"job run ingest: {time.monotonic() - t:.0f} s, {row['outputs']}")

def test_the_pipeline_runs_in_train(engine, train, tmp_path):
    (data := tmp_path/'data').mkdir()
    sh('chown', '10001:10001', data)
    on = ['-v', f'{data}:/data', '-e', 'PLANT_EPOCHS=0', '-e', 'PLANT_IMAGE_SIZE=96', '-e', 'PLANT_PRECISION=fp32', '-e', 'PLANT_BATCH_SIZE=8']
    t = time.monotonic()
    its = json.loads(engine.run(train, 'pipeline', 'run', '-p', 'synthetic', '40', '--json', options=['--rm', *on]).splitlines()[-1])
    print(f"\npipeline run: {time.monotonic() - t:.0f} s")
    assert its['promote']['outputs']['promoted']

def test_mlflow_serves_in_train(engine, train):
    port = free_port()
    cmd = ['server', '--backend-store-uri', 'sqlite:////data/mlflow.db', '--artifacts-destination', '/data/artifacts', '--host', '127.0.0.1', '--port', port, '--workers', '1']
    c, began = engine.run(train, *cmd, options=['-d', '--entrypoint', 'mlflow']).strip(), time.monotonic()
    try:
        def up():
            h = http.client.HTTPConnection('127.0.0.1', port, timeout=5)
            h.request('GET', '/health')
            return h.getresponse().status == 200
        wait_for(up, 120, 'MLflow')
        print(f'\nmlflow server: up after {time.monotonic() - began:.0f} s')
    finally: engine.podman('rm', '-f', c)
