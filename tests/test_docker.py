"The files of `docker`, checked without Docker; images.py builds the images, test_stack.py starts the services."
import json, re, shutil, subprocess
import pytest, yaml
from helpers import programs, require, root

docker = root/'docker'
dockerfiles = sorted(docker.glob('*/Dockerfile'))
lock_files = [docker/'build.lock', *sorted(docker.glob('*/requirements.lock'))]
env_example = (docker/'.env.example').read_text()

def parse_env(text) -> dict:
    "Variables of a file such as .env."
    return dict(re.findall(r'^([A-Z0-9_]+)=(.*)$', text, re.M))

# Variables that .env.example leaves empty, and that setup.sh fills with random values.
PASSWORDS = [name for name, value in parse_env(env_example).items() if not value and name != 'VERSION']

def run(*command, cwd, **env):
    "Run a program; returns its exit code and its output."
    env = dict(PATH=f'{programs}:/usr/bin:/bin', HOME=str(cwd)) | env
    result = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr

def run_setup(folder):
    "Write docker/.env; returns its text."
    code, output = run(folder/'setup.sh', '--env', cwd=folder)
    assert code == 0, output
    return (folder/'.env').read_text()

def run_compose(folder, *args, **env):
    return run(require('docker-compose'), '-f', folder/'compose.yaml', *args, cwd=folder, **env)

@pytest.fixture
def copy(tmp_path):
    "The folder `docker` as a new clone has it."
    shutil.copy(root/'settings.ini', tmp_path)
    shutil.copytree(docker, tmp_path/'docker', ignore=shutil.ignore_patterns('.env', 'photos', 'backup'))
    return tmp_path/'docker'

# -- Dockerfiles and lock files

def base_images(text) -> list: return re.findall(r'^ARG BASE=(.*)$', text, re.M)

@pytest.mark.parametrize('file', dockerfiles, ids=lambda file: file.parent.name)
def test_dockerfile_is_unprivileged_labelled_and_on_the_common_base(file):
    code, output = run(require('hadolint'), file, cwd=root)
    assert code == 0, output
    text = file.read_text()
    assert re.search(r'^USER 10001:10001$', text, re.M)
    assert re.search(r'^HEALTHCHECK ', text, re.M)
    assert text.count('org.opencontainers.image.') == 6
    assert base_images(text) == base_images(dockerfiles[0].read_text())

@pytest.mark.parametrize('file', lock_files, ids=lambda file: f'{file.parent.name}/{file.name}')
def test_lock_file_has_a_checksum_of_every_package(file):
    text = file.read_text()
    packages = re.findall(r'^[\w.-]+==\S+', text, re.M)
    with_checksum = re.findall(r'^[\w.-]+==[^\n]*\\\n    --hash=sha256:', text, re.M)
    assert 'make locks' in text
    assert len(packages) >= 2
    assert '://' not in text
    assert len(with_checksum) == len(packages), 'a package without its checksum'

# -- setup.sh

def test_setup_makes_private_random_passwords_once(copy):
    text = run_setup(copy)
    values = parse_env(text)
    assert len({values[name] for name in PASSWORDS}) == len(PASSWORDS)
    assert all(len(values[name]) >= 40 for name in PASSWORDS)
    assert (copy/'.env').stat().st_mode & 0o077 == 0
    assert (copy/'photos').stat().st_mode & 0o055 == 0o055
    assert re.search(r'^VERSION=\d', text, re.M)
    assert text.splitlines()[0] == env_example.splitlines()[0]
    assert run_setup(copy) == text

def test_setup_adds_passwords_that_an_older_version_did_not_have(copy):
    text = run_setup(copy)
    (copy/'.env').write_text(re.sub(r'^GRAFANA_PASSWORD=.*\n', '', text, flags=re.M))
    updated = run_setup(copy)
    assert re.search(r'^GRAFANA_PASSWORD=\w{40}$', updated, re.M)
    assert f"POSTGRES_PASSWORD={parse_env(text)['POSTGRES_PASSWORD']}" in updated

def link_programs(folder):
    "Make a folder of programs for a shell, without docker."
    folder.mkdir()
    names = 'bash dirname touch grep head base64 tr od cut mkdir sed mv sort'
    for program in names.split(): (folder/program).symlink_to(shutil.which(program))
    return folder

def test_setup_reports_a_missing_compose_plugin(copy):
    code, output = run('bash', copy/'setup.sh', cwd=copy, PATH=str(link_programs(copy/'bin')))
    assert code == 1
    assert 'Compose plugin' in output
    assert 'none' in output

# The lines that both scripts print.
PRINTED_LINE = r'^(?:\w+  +http\S+.*|There is no model.*|  docker compose run.*)$'

def test_setup_for_windows_prints_and_checks_the_same():
    "The scripts are compared as texts: PowerShell is not available here."
    bash, powershell = (docker/'setup.sh').read_text(), (docker/'setup.ps1').read_text()
    def printed_lines(script):
        lines = re.findall(PRINTED_LINE, script, re.M)
        return [line.replace('\\', '/').replace('…', '...') for line in lines]
    assert printed_lines(bash)
    assert printed_lines(bash) == printed_lines(powershell)
    for text in ('docker compose version --short', '2.33.1', 'docker info', 'docker compose up --build --detach --wait',
                 '.env.example', 'FERNET', 'VERSION='):
        assert text in bash, text
        assert text in powershell, text
    for left, right in ('{}', '()', ("@'", "\n'@")):
        assert powershell.count(left) == powershell.count(right), f'{left} is not closed in setup.ps1'

# -- compose.yaml

@pytest.mark.parametrize('profiles', [['*'], ['minio', 'airflow'], ['seaweedfs', 'scheduler'], ['minio', 'mysql']])
def test_compose_file_is_valid_with_these_profiles(copy, profiles):
    run_setup(copy)
    options = [option for profile in profiles for option in ('--profile', profile)]
    code, output = run_compose(copy, *options, 'config', '--quiet', COMPOSE_PROFILES='')
    assert code == 0, output
    assert not output

def test_gpu_file_gives_a_gpu_to_the_services_that_train(copy):
    run_setup(copy)
    code, output = run_compose(copy, '-f', copy/'gpu.yaml', '--profile', '*', 'config')
    assert code == 0, output
    services = yaml.safe_load(output)['services']
    with_gpu = {name for name, service in services.items() if 'nvidia' in str(service.get('deploy'))}
    assert with_gpu == {'cli', 'scheduler', 'airflow-worker'}, output

def test_settings_env_adds_a_second_model_to_all_services(copy):
    run_setup(copy)
    (copy/'settings.env').write_text('PLANT_MODELS=stocks\n')
    code, output = run_compose(copy, 'config', '--format', 'json', COMPOSE_PROFILES='scheduler')
    assert not code
    env = {name: service.get('environment') or {} for name, service in json.loads(output)['services'].items()}
    assert {name for name in env if env[name].get('PLANT_MODELS') == 'stocks'} >= {'api', 'scheduler', 'exporter'}

@pytest.mark.parametrize('has_env', [False, True])
def test_compose_starts_nothing_without_passwords(copy, has_env):
    if has_env: (copy/'.env').write_text(env_example)
    code, output = run_compose(copy, 'config', '--quiet')
    assert code
    assert 'run docker/setup.sh first' in output

def compose_text() -> str: return (docker/'compose.yaml').read_text()

def compose_services() -> dict: return yaml.safe_load(compose_text().replace('$$', '$'))['services']

def test_compose_file_uses_exactly_the_variables_of_env_example():
    used = set(re.findall(r'\$\{([A-Z0-9_]+)', compose_text().replace('$$', '')))
    known = set(re.findall(r'^#?([A-Z0-9_]+)=', env_example, re.M))
    assert used == known - {'COMPOSE_PROFILES'}

def test_ports_are_distinct_bound_to_localhost_and_those_that_setup_prints():
    published = [str(port) for service in compose_services().values() for port in service.get('ports', ())]
    assert published
    for port in published: assert port.startswith('${BIND:-127.0.0.1}:'), 'a port is open to the network by default'
    ports = [port.rsplit(':', 2)[1] for port in published]
    assert len(ports) == len(set(ports)), 'two services have the same port'
    printed = re.findall(r'http://localhost:(\d+)', (docker/'setup.sh').read_text())
    assert printed
    assert set(printed) <= set(ports), 'the start script names a port that no service has'

@pytest.mark.parametrize('name', compose_services())
def test_service_is_restricted_and_its_image_is_ours_or_pinned(name):
    service = compose_services()[name]
    assert 'no-new-privileges:true' in service['security_opt']
    if service['image'].startswith('localhost/plant-mlops/'):
        assert service['read_only']
        assert service['cap_drop'] == ['ALL']
    else:
        assert re.search(r':[\w.-]+@sha256:[0-9a-f]{64}$', service['image'])
        assert service['healthcheck']['test']
