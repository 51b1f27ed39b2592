"The files of `docker`, as far as they can be judged without an engine. What they build is in images.py, what they start in test_stack.py."
import json, re, shutil, subprocess, sys
from pathlib import Path
import pytest, yaml
from helpers import require, root

bin = Path(sys.executable).parent
docker = root/'docker'
dockerfiles = sorted(docker.glob('*/Dockerfile'))
example = (docker/'.env.example').read_text()
variables = dict(re.findall(r'^#?([A-Z0-9_]+)=(.*)$', example, re.M))
secret = [k for k, v in re.findall(r'^([A-Z0-9_]+)=(.*)$', example, re.M) if not v and k != 'VERSION']

def run(*cmd, cwd, **env):
    r = subprocess.run([*map(str, cmd)], cwd=cwd, env=dict(PATH=f'{bin}:/usr/bin:/bin', HOME=str(cwd)) | env, capture_output=True, text=True)
    return r.returncode, r.stdout + r.stderr

@pytest.fixture
def copy(tmp_path):
    "The folder as a new clone has it."
    shutil.copy(root/'settings.ini', tmp_path)
    shutil.copytree(docker, tmp_path/'docker', ignore=shutil.ignore_patterns('.env', 'photos', 'backup'))
    return tmp_path/'docker'

@pytest.mark.parametrize('file', dockerfiles, ids=lambda f: f.parent.name)
def test_dockerfile(file):
    code, said = run(require('hadolint'), file, cwd=root)
    assert code == 0, said
    text = file.read_text()
    assert re.search(r'^USER 10001:10001$', text, re.M) and re.search(r'^HEALTHCHECK ', text, re.M) and text.count('org.opencontainers.image.') == 6
    assert re.findall(r'^ARG BASE=(.*)$', text, re.M) == re.findall(r'^ARG BASE=(.*)$', dockerfiles[0].read_text(), re.M)

@pytest.mark.parametrize('file', [docker/'build.lock', *sorted(docker.glob('*/requirements.lock'))], ids=lambda f: f'{f.parent.name}/{f.name}')
def test_lock(file):
    text = file.read_text()
    packages = re.findall(r'^[\w.-]+==\S+', text, re.M)
    assert 'make locks' in text and len(packages) >= 2 and '://' not in text
    assert len(re.findall(r'^[\w.-]+==[^\n]*\\\n    --hash=sha256:', text, re.M)) == len(packages), 'a package without its checksum'

def test_setup_draws_secrets_once(copy):
    assert run(copy/'setup.sh', '--env', cwd=copy)[0] == 0
    first = (copy/'.env').read_text()
    values = dict(re.findall(r'^([A-Z0-9_]+)=(.*)$', first, re.M))
    assert len({values[k] for k in secret}) == len(secret) and all(len(values[k]) >= 40 for k in secret)
    assert (copy/'.env').stat().st_mode & 0o077 == 0 and (copy/'photos').stat().st_mode & 0o055 == 0o055 and re.search(r'^VERSION=\d', first, re.M) and first.splitlines()[0] == example.splitlines()[0]
    assert run(copy/'setup.sh', '--env', cwd=copy)[0] == 0 and (copy/'.env').read_text() == first
    (copy/'.env').write_text(re.sub(r'^GRAFANA_PASSWORD=.*\n', '', first, flags=re.M)) # of an older version
    run(copy/'setup.sh', '--env', cwd=copy)
    assert re.search(r'^GRAFANA_PASSWORD=\w{40}$', (copy/'.env').read_text(), re.M) and f"POSTGRES_PASSWORD={values['POSTGRES_PASSWORD']}" in (copy/'.env').read_text()

def test_setup_says_what_is_missing(copy):
    code, said = run('bash', copy/'setup.sh', cwd=copy, PATH=str(no_docker(copy)))
    assert code == 1 and 'Compose plugin' in said and 'none' in said

def no_docker(at):
    "Programs without docker."
    (to := at/'bin').mkdir()
    for o in ('bash', 'dirname', 'touch', 'grep', 'head', 'base64', 'tr', 'od', 'cut', 'mkdir', 'sed', 'mv', 'sort'): (to/o).symlink_to(shutil.which(o))
    return to

def composed(copy, *args, **env):
    return run(require('docker-compose'), '-f', copy/'compose.yaml', *args, cwd=copy, **env)

def test_compose_is_valid_with_every_profile(copy):
    run(copy/'setup.sh', '--env', cwd=copy)
    for profiles in (['*'], ['minio', 'airflow'], ['seaweedfs', 'scheduler'], ['minio', 'mysql']):
        code, said = composed(copy, *(o for p in profiles for o in ('--profile', p)), 'config', '--quiet', COMPOSE_PROFILES='')
        assert code == 0 and not said, said
    code, said = composed(copy, '-f', copy/'gpu.yaml', '--profile', '*', 'config')
    assert code == 0 and {k for k, o in yaml.safe_load(said)['services'].items() if 'deploy' in o and 'nvidia' in str(o['deploy'])} == {'cli', 'scheduler', 'airflow-worker'}, said

def test_a_second_model_is_a_line_of_settings(copy):
    run(copy/'setup.sh', '--env', cwd=copy)
    (copy/'settings.env').write_text('PLANT_MODELS=stocks\n')
    code, said = composed(copy, 'config', '--format', 'json', COMPOSE_PROFILES='scheduler')
    env = {k: o.get('environment') or {} for k, o in json.loads(said)['services'].items()}
    assert not code and {k for k, o in env.items() if o.get('PLANT_MODELS') == 'stocks'} >= {'api', 'scheduler', 'exporter'}

def test_compose_starts_nothing_without_passwords(copy):
    code, said = composed(copy, 'config', '--quiet')
    assert code and 'run docker/setup.sh first' in said
    (copy/'.env').write_text(example) # as it comes
    code, said = composed(copy, 'config', '--quiet')
    assert code and 'run docker/setup.sh first' in said

def test_compose_promises():
    text = (docker/'compose.yaml').read_text()
    used = set(re.findall(r'\$\{([A-Z0-9_]+)', text.replace('$$', '')))
    assert used == set(variables) - {'COMPOSE_PROFILES'}, 'what the compose file asks for is what .env.example has'
    services = yaml.safe_load(re.sub(r'\$\$', '$', text))['services']
    published = [str(p) for o in services.values() for p in o.get('ports', ())]
    assert published and all(p.startswith('${BIND:-127.0.0.1}:') for p in published), 'a port is open to the network as it comes'
    ports = [p.rsplit(':', 2)[1] for p in published]
    assert len(ports) == len(set(ports)), 'two services have the same port'
    shown = re.findall(r'http://localhost:(\d+)', (docker/'setup.sh').read_text())
    assert shown and set(shown) <= set(ports), 'the start script names a port that no service has'
    for k, o in services.items():
        ours = o['image'].startswith('localhost/plant-mlops/')
        assert ours and o['read_only'] and o['cap_drop'] == ['ALL'] or re.search(r':[\w.-]+@sha256:[0-9a-f]{64}$', o['image']), k
        assert 'no-new-privileges:true' in o['security_opt'], k
        if not ours: assert o['healthcheck']['test'], k

def test_windows_does_the_same():
    "The two start scripts, side by side: PowerShell is not here to run the second."
    sh, ps = (docker/'setup.sh').read_text(), (docker/'setup.ps1').read_text()
    def shown(script):
        lines = re.findall(r'^(?:\w+  +http\S+.*|There is no model.*|  docker compose run.*)$', script, re.M)
        return [line.replace('\\', '/').replace('…', '...') for line in lines]
    assert shown(sh) and shown(sh) == shown(ps)
    for o in ('docker compose version --short', '2.33.1', 'docker info', 'docker compose up --build --detach --wait', '.env.example', 'FERNET', 'VERSION='): assert o in sh and o in ps, o
    for left, right in ('{}', '()', ("@'", "\n'@")): assert ps.count(left) == ps.count(right), f'{left} is not closed in setup.ps1'
