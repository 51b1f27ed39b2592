"The workflows: what linters say of them, what all of them promise, what their scripts do, and a run of the one that tests."
import json, os, re, shutil, subprocess, sys
import pytest, yaml
from helpers import checkout_files, copy_checkout, require, root, search_path

pytestmark = pytest.mark.skipif(not (root/'.github/workflows').is_dir(), reason='no .github here')

def run(*cmd, cwd=root, **env):
    "Exit code and all that was said."
    env = {k: v for k, v in os.environ.items() if not k.startswith('PYTEST_')} | dict(PATH=search_path, NO_COLOR='1') | env
    r = subprocess.run(list(map(str, cmd)), cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return r.returncode, r.stdout

def found(at): return sorted(at.glob('.github/workflows/*.yml')), sorted(at.glob('.github/actions/*/action.yml'))
def steps(o): return [s for j in (o['jobs'].values() if 'jobs' in o else [o['runs']]) for s in j.get('steps', [])]
def step(file, name): return next(s for s in steps(yaml.safe_load((root/'.github'/file).read_text())) if s.get('name') == name)

# Each gives what is wrong in a folder: nothing, if all is well.

def actionlint(at):
    require('shellcheck') # without it, actionlint says nothing of scripts
    code, said = run(require('actionlint'), cwd=at)
    return said if code else ''

def zizmor(at):
    code, said = run(require('zizmor'), '--quiet', '--offline', '--persona', 'auditor', '.github', cwd=at)
    return said if code else ''

def schema(at):
    w, a = found(at)
    r = [run(require('check-jsonschema'), '--builtin-schema', f'vendor.{k}', *f, cwd=at)
         for k, f in (('github-workflows', w), ('github-actions', a), ('dependabot', [at/'.github/dependabot.yml']))]
    return ''.join(said for code, said in r if code)

def pins(at):
    "Actions of other repositories are pinned by commit, with the release in a comment, and to the same one everywhere."
    bad, seen = [], {}
    for f in sum(found(at), []):
        for uses, _, note in re.findall(r'^\s*(?:- )?uses:\s*(\S+)(\s+#\s*(\S+))?', f.read_text(), re.M):
            if uses.startswith('$/'): continue
            name, _, sha = uses.partition('@')
            if not re.fullmatch('[0-9a-f]{40}', sha) or not re.fullmatch(r'v\d+\.\d+\.\d+', note): bad.append(f'{f.name}: {uses} {note}')
            if seen.setdefault(name, (sha, note)) != (sha, note): bad.append(f'{f.name}: {name} is {note} here and {seen[name][1]} elsewhere')
    return bad

def promises(at):
    bad = []
    for f in sum(found(at), []):
        o = yaml.safe_load(f.read_text())
        say = lambda ok, what: ok or bad.append(f'{f.name}: {what}')
        if 'jobs' in o:
            say(o.get('permissions') == {}, 'permissions at the top')
            say('concurrency' in o, 'no concurrency')
            say(o.get('defaults', {}).get('run', {}).get('shell') == 'bash', 'not all shells are bash')
            for name, j in o['jobs'].items():
                say('permissions' in j, f'{name}: permissions')
                say('timeout-minutes' in j or 'uses' in j, f'{name}: timeout')
        for s in steps(o):
            say('${{' not in s.get('run', ''), f'an expression in a script: {s.get("run")}')
            say('jobs' in o or 'run' not in s or s.get('shell') == 'bash', 'shell of an action')
            say('checkout@' not in s.get('uses', '') or s.get('with', {}).get('persist-credentials') is False, 'checkout keeps credentials')
    return bad

checks = actionlint, zizmor, schema, pins, promises

@pytest.mark.parametrize('check', checks)
def test_workflows(check): assert not (bad := check(root)), bad

@pytest.mark.parametrize('check,file,old,new', [
    (actionlint, 'workflows/test.yml', 'needs: in-step', 'needs: instep'),
    (actionlint, 'workflows/train.yml', 'exit "$code"', 'exit $status'), # shellcheck
    (zizmor, 'workflows/docs.yml', 'persist-credentials: false', 'fetch-depth: 1'),
    (zizmor, 'workflows/images.yml', 'permissions: {}', 'permissions: write-all'),
    (schema, 'workflows/test.yml', 'timeout-minutes: 20', 'timeout-minutes: [20]'),
    (schema, 'dependabot.yml', 'interval: weekly', 'interval: sometimes'),
    (pins, 'workflows/docs.yml', ' # v5.0.0', ''),
    (pins, 'workflows/docs.yml', '@cd2ce8fcbc39b97be8ca5fce6e763baed58fa128', '@v5'),
    (pins, 'workflows/docs.yml', '# v7.0.1', '# v7.0.2'),
    (promises, 'workflows/train.yml', 'permissions: {}', ''),
    (promises, 'workflows/train.yml', 'timeout-minutes: 60', ''),
    (promises, 'workflows/train.yml', 'persist-credentials: false', 'fetch-depth: 1'),
    (promises, 'workflows/checks.yml', 'run: hadolint', 'run: echo ${{ github.head_ref }}; hadolint'),
    (promises, 'actions/secrets/action.yml', 'shell: bash', 'shell: sh'),
])
def test_a_fault_is_found(check, file, old, new, tmp_path):
    shutil.copytree(root/'.github', tmp_path/'.github')
    run('git', 'init', '--quiet', cwd=tmp_path)
    f = tmp_path/'.github'/file
    assert old in f.read_text()
    f.write_text(f.read_text().replace(old, new, 1))
    assert check(tmp_path)

@pytest.mark.parametrize('code,says', [(0, 'the gate said yes'), (4, 'The gate said no'), (1, 'It failed, with exit code 1')])
def test_a_training_says_what_came_of_it(code, says, tmp_path):
    (tmp_path/'.venv/bin').mkdir(parents=True)
    fake = tmp_path/'.venv/bin/plant-mlops'
    fake.write_text(f'#!/bin/sh\necho "ran: $*"\nexit {code}\n'); fake.chmod(0o755)
    script = step('workflows/train.yml', 'Run the notebooks')['run']
    assert run('bash', '--noprofile', '--norc', '-eo', 'pipefail', '-c', script, cwd=tmp_path, GITHUB_STEP_SUMMARY=str(tmp_path/'summary.md'))[0] == code
    summary = (tmp_path/'summary.md').read_text()
    assert says in summary and '    ran: job run train --ci\n' in summary

def published():
    "The images that a release makes."
    o = yaml.safe_load((root/'.github/workflows/images.yml').read_text())['jobs']['images']
    return set(o['strategy']['matrix']['image']) | {i for s in o['steps'] if (i := s.get('with', {}).get('image', '$')).isalpha()}

overlay = root/'kubernetes/overlays/production/kustomization.yaml'

def test_every_dockerfile_is_published():
    if not (root/'docker').is_dir(): pytest.skip('no docker here')
    assert published() == {o.parent.name for o in (root/'docker').glob('*/Dockerfile')}

@pytest.mark.skipif(not overlay.is_file(), reason='no overlay here')
def test_a_deployment_names_every_image_by_its_digest(tmp_path):
    "All but kustomize itself, which notes here what it was asked for."
    (tmp_path/'images').mkdir()
    for o in published(): (tmp_path/f'images/{o}.digest').write_text(f'sha256:{"a"*64}\n')
    (tmp_path/'kustomize').write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'); (tmp_path/'kustomize').chmod(0o755)
    script = step('workflows/images.yml', 'Name the images of this release by their digests')['run']
    env = dict(RUNNER_TEMP=str(tmp_path), GITHUB_REPOSITORY='Some/Plants')
    bash = lambda: run('bash', '--noprofile', '--norc', '-eo', 'pipefail', '-c', script, cwd=root/'kubernetes', **env)
    assert bash()[0] == 0
    ours = {o['name'] for o in yaml.safe_load(overlay.read_text())['images'] if o['name'].startswith('plant-mlops/')}
    want = {f'edit set image {o}=ghcr.io/some/plants/{o.split("/")[1]}@sha256:{"a"*64}' for o in ours} | {'build overlays/production'}
    said = (tmp_path/'asked').read_text().splitlines()
    assert ours and set(said) == want and len(said) == len(want) + 1, 'train is named for the CronJobs, and for the Job on a GPU'
    (tmp_path/'images/serve.digest').write_text('latest\n')
    assert bash()[0] != 0

def secrets(at, *files):
    "What looks like a key or a password. Pictures in notebooks look random, and tests have passwords: only what has a form of its own counts."
    code, said = run(require('detect-secrets'), 'scan', *(x for o in ('Base64HighEntropyString', 'HexHighEntropyString', 'KeywordDetector') for x in ('--disable-plugin', o)),
                     '--exclude-secrets', '^(password|secret)$', *files, cwd=at)
    assert code == 0, said
    return json.loads(said[said.index('{'):])['results']

def test_no_secrets(tmp_path):
    assert not (bad := secrets(root, *checkout_files())), bad
    (tmp_path/'settings.py').write_text('key = "AKIA' + 'Z7Q2M4X6B8N3V5C1"\n')
    assert secrets(tmp_path, '--all-files', '.')

@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tests_run_as_a_workflow(tmp_path):
    "Both jobs of test.yml by act, on this machine and with this environment: whether notebooks are in step, then .ci/run with one notebook."
    act, to = require('act'), tmp_path/'checkout'
    copy_checkout(to)
    for cmd in ('init --quiet', 'add --all', '-c user.name=test -c user.email=test@localhost commit --quiet --no-verify -m all', 'remote add origin https://github.com/some/plants.git'):
        code, said = run('git', *cmd.split(), cwd=to)
        assert code == 0, said
    # In place of an action that cannot be fetched: it lends this environment, so that `make` installs nothing.
    stub = tmp_path/'stub/action.yml'
    stub.parent.mkdir()
    lend = f'mkdir .venv; for f in {sys.prefix}/*; do ln -s "$f" .venv/; done; touch .venv/.installed'
    stub.write_text(yaml.safe_dump(dict(name='stub', description='stub', inputs={'python-version': dict(default='')}, runs=dict(using='composite', steps=[dict(shell='bash', run=lend)]))))
    setup = next(s['uses'] for s in steps(yaml.safe_load((root/'.github/workflows/test.yml').read_text())) if 'setup-python@' in s.get('uses', ''))
    python = f'{sys.version_info.major}.{sys.version_info.minor}'
    (temp := tmp_path/'temp').mkdir() # of the tests' own: pytest closes the usual one to all other users, and a database of this run may be in it
    code, said = run(act, 'push', '-W', '.github/workflows/test.yml', '--matrix', f'python:{python}', '-P', 'ubuntu-latest=-self-hosted', '--local-repository', f'{setup}={stub.parent}',
                     '--env', 'PYTEST_ADDOPTS=tests/test_notebooks.py -k "00_config and not warning"', '--env', f'PYTEST_DEBUG_TEMPROOT={temp}', '--env', 'REQUIRE_COMPONENTS=0', cwd=to, HOME=str(tmp_path/'home'), XDG_CACHE_HOME=str(tmp_path/'cache'))
    assert code == 0, said[-5000:]
    assert said.count('Job succeeded') == 2 and '3 passed' in said and '1 passed' in said, said[-5000:]
