"The GitHub workflows: linters, our own rules, the scripts in them, and a local run of the workflow that tests."
import json, os, re, shutil, subprocess, sys
import pytest, yaml
from helpers import checkout_files, copy_checkout, require, root, search_path

github = root/'.github'
pytestmark = pytest.mark.skipif(not (github/'workflows').is_dir(), reason='no .github here')

def run(*command, cwd=root, **env):
    "Run a program; returns its exit code and its output."
    inherited = {k: v for k, v in os.environ.items() if not k.startswith('PYTEST_')}
    env = inherited | dict(PATH=search_path, NO_COLOR='1') | env
    result = subprocess.run([*map(str, command)], cwd=cwd, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return result.returncode, result.stdout

def output_if_failed(*command, cwd) -> str:
    "Output of a program that fails; '' if it succeeds."
    code, output = run(*command, cwd=cwd)
    return output if code else ''

def run_bash(script, cwd, **env) -> int:
    "Run a script as GitHub does; returns its exit code."
    return run('bash', '--noprofile', '--norc', '-eo', 'pipefail', '-c', script, cwd=cwd, **env)[0]

def read_yaml(file): return yaml.safe_load(file.read_text())

def workflow_files(folder) -> list: return sorted(folder.glob('.github/workflows/*.yml'))

def action_files(folder) -> list: return sorted(folder.glob('.github/actions/*/action.yml'))

def steps_of(definition) -> list:
    "All steps of a workflow or an action."
    jobs = definition['jobs'].values() if 'jobs' in definition else [definition['runs']]
    return [step for job in jobs for step in job.get('steps', [])]

def find_step(file, name) -> dict: return next(s for s in steps_of(read_yaml(github/file)) if s.get('name') == name)

def write_program(path, *lines):
    "Write a shell script that can be executed."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(['#!/bin/sh', *lines, '']))
    path.chmod(0o755)

# -- Checks of a folder: each returns messages about what is wrong, nothing if all is well

def actionlint(folder) -> str:
    require('shellcheck') # without it, actionlint does not check scripts
    return output_if_failed(require('actionlint'), cwd=folder)

def zizmor(folder) -> str:
    return output_if_failed(require('zizmor'), '--quiet', '--offline', '--persona', 'auditor', '.github', cwd=folder)

def json_schema(folder) -> str:
    program = require('check-jsonschema')
    files = {'github-workflows': workflow_files(folder), 'github-actions': action_files(folder),
             'dependabot': [folder/'.github/dependabot.yml']}
    return ''.join(output_if_failed(program, '--builtin-schema', f'vendor.{schema}', *paths, cwd=folder)
                   for schema, paths in files.items())

def pinned_actions(folder) -> list:
    "Actions of others are pinned by commit, with the release in a comment, and have the same commit in all files."
    messages, pins = [], {}
    for file in workflow_files(folder) + action_files(folder):
        for uses, _, release in re.findall(r'^\s*(?:- )?uses:\s*(\S+)(\s+#\s*(\S+))?', file.read_text(), re.M):
            if uses.startswith('$/'): continue # an action of this repository
            name, _, commit = uses.partition('@')
            if not re.fullmatch('[0-9a-f]{40}', commit) or not re.fullmatch(r'v\d+\.\d+\.\d+', release):
                messages.append(f'{file.name}: {uses} {release}')
            first = pins.setdefault(name, (commit, release))
            if first != (commit, release):
                messages.append(f'{file.name}: {name} is {release} here, {first[1]} elsewhere')
    return messages

def check_workflow(workflow) -> list:
    "Permissions, concurrency, shell and time limits of a workflow."
    shell = workflow.get('defaults', {}).get('run', {}).get('shell')
    messages = []
    if workflow.get('permissions') != {}: messages.append('permissions at the top')
    if 'concurrency' not in workflow: messages.append('no concurrency')
    if shell != 'bash': messages.append('not all shells are bash')
    for name, job in workflow['jobs'].items():
        if 'permissions' not in job: messages.append(f'{name}: permissions')
        if 'timeout-minutes' not in job and 'uses' not in job: messages.append(f'{name}: timeout')
    return messages

def check_step(step, is_action) -> list:
    "Expressions in scripts, the shell of a step of an action, and credentials that a checkout keeps."
    script, messages = step.get('run', ''), []
    if '${{' in script: messages.append(f'an expression in a script: {script}')
    if is_action and 'run' in step and step.get('shell') != 'bash': messages.append('shell of an action')
    keeps_credentials = step.get('with', {}).get('persist-credentials') is not False
    if 'checkout@' in step.get('uses', '') and keeps_credentials: messages.append('checkout keeps credentials')
    return messages

def own_rules(folder) -> list:
    messages = []
    for file in workflow_files(folder) + action_files(folder):
        definition = read_yaml(file)
        is_action = 'jobs' not in definition
        if not is_action: messages += [f'{file.name}: {message}' for message in check_workflow(definition)]
        for step in steps_of(definition):
            messages += [f'{file.name}: {message}' for message in check_step(step, is_action)]
    return messages

@pytest.mark.parametrize('check', [actionlint, zizmor, json_schema, pinned_actions, own_rules])
def test_workflows_pass(check):
    messages = check(root)
    assert not messages, messages

@pytest.mark.parametrize('check,file,old,new', [
    (actionlint, 'workflows/test.yml', 'needs: in-step', 'needs: instep'),
    (actionlint, 'workflows/train.yml', 'exit "$code"', 'exit $status'), # by shellcheck
    (zizmor, 'workflows/docs.yml', 'persist-credentials: false', 'fetch-depth: 1'),
    (zizmor, 'workflows/images.yml', 'permissions: {}', 'permissions: write-all'),
    (json_schema, 'workflows/test.yml', 'timeout-minutes: 20', 'timeout-minutes: [20]'),
    (json_schema, 'dependabot.yml', 'interval: weekly', 'interval: sometimes'),
    (pinned_actions, 'workflows/docs.yml', ' # v5.0.0', ''),
    (pinned_actions, 'workflows/docs.yml', '@cd2ce8fcbc39b97be8ca5fce6e763baed58fa128', '@v5'),
    (pinned_actions, 'workflows/docs.yml', '# v7.0.1', '# v7.0.2'),
    (own_rules, 'workflows/train.yml', 'permissions: {}', ''),
    (own_rules, 'workflows/train.yml', 'timeout-minutes: 60', ''),
    (own_rules, 'workflows/train.yml', 'persist-credentials: false', 'fetch-depth: 1'),
    (own_rules, 'workflows/checks.yml', 'run: hadolint', 'run: echo ${{ github.head_ref }}; hadolint'),
    (own_rules, 'actions/secrets/action.yml', 'shell: bash', 'shell: sh'),
])
def test_each_check_detects_a_mistake(check, file, old, new, tmp_path):
    shutil.copytree(github, tmp_path/'.github')
    run('git', 'init', '--quiet', cwd=tmp_path)
    path = tmp_path/'.github'/file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert check(tmp_path)

# -- Scripts of the workflows

@pytest.mark.parametrize('code,text', [
    (0, 'the gate said yes'), (4, 'The gate said no'), (1, 'It failed, with exit code 1')])
def test_the_summary_of_a_training_has_its_outcome(code, text, tmp_path):
    write_program(tmp_path/'.venv/bin/plant-mlops', 'echo "ran: $*"', f'exit {code}')
    script = find_step('workflows/train.yml', 'Run the notebooks')['run']
    summary = tmp_path/'summary.md'
    assert run_bash(script, tmp_path, GITHUB_STEP_SUMMARY=str(summary)) == code
    assert text in summary.read_text()
    assert '    ran: job run train --ci\n' in summary.read_text()

def published_images() -> set:
    "Names of the images that a release publishes."
    job = read_yaml(github/'workflows/images.yml')['jobs']['images']
    of_steps = [step.get('with', {}).get('image', '') for step in job['steps']]
    return {*job['strategy']['matrix']['image'], *filter(str.isalpha, of_steps)} # not those that are an expression

@pytest.mark.skipif(not (root/'docker').is_dir(), reason='no docker here')
def test_every_dockerfile_is_published():
    assert published_images() == {file.parent.name for file in (root/'docker').glob('*/Dockerfile')}

kustomization = root/'kubernetes/overlays/production/kustomization.yaml'
DIGEST = f'sha256:{"a"*64}'

@pytest.mark.skipif(not kustomization.is_file(), reason='no overlay here')
def test_a_release_names_every_image_by_its_digest_in_the_production_overlay(tmp_path):
    "In place of kustomize, a script writes its arguments to a file."
    calls = tmp_path/'calls'
    write_program(tmp_path/'kustomize', f'echo "$@" >> {calls}')
    (tmp_path/'images').mkdir()
    for image in published_images(): (tmp_path/f'images/{image}.digest').write_text(f'{DIGEST}\n')
    script = find_step('workflows/images.yml', 'Name the images of this release by their digests')['run']
    env = dict(RUNNER_TEMP=str(tmp_path), GITHUB_REPOSITORY='Some/Plants')
    assert run_bash(script, root/'kubernetes', **env) == 0
    names = {image['name'] for image in read_yaml(kustomization)['images']}
    ours = {name for name in names if name.startswith('plant-mlops/')}
    expected = {f'edit set image {name}=ghcr.io/some/plants/{name.split("/")[1]}@{DIGEST}' for name in ours}
    expected.add('build overlays/production')
    arguments = calls.read_text().splitlines()
    assert ours
    assert set(arguments) == expected
    assert len(arguments) == len(expected) + 1, 'train is named for the CronJobs, and for the Job on a GPU'
    (tmp_path/'images/serve.digest').write_text('latest\n')
    assert run_bash(script, root/'kubernetes', **env) != 0

# -- Secrets

# Pictures in notebooks look random, and tests have passwords: only secrets with a form of their own count.
DISABLED_PLUGINS = ('Base64HighEntropyString', 'HexHighEntropyString', 'KeywordDetector')

def find_secrets(folder, *files) -> dict:
    "What looks like a key or a password, by file."
    disable = [option for plugin in DISABLED_PLUGINS for option in ('--disable-plugin', plugin)]
    code, output = run(require('detect-secrets'), 'scan', *disable, '--exclude-secrets', '^(password|secret)$', *files,
                       cwd=folder)
    assert code == 0, output
    return json.loads(output[output.index('{'):])['results']

def test_the_project_has_no_secrets_and_one_would_be_found(tmp_path):
    # what is exported from a notebook would be found there, too
    files = [file for file in checkout_files() if b'# AUTOGENERATED!' not in (root/file).read_bytes()[:500]]
    secrets = find_secrets(root, *files)
    assert not secrets, secrets
    (tmp_path/'settings.py').write_text('key = "AKIA' + 'Z7Q2M4X6B8N3V5C1"\n')
    assert find_secrets(tmp_path, '--all-files', '.')

# -- A local run of a workflow

def commit_all(folder):
    "Make a repository of a copy of the project."
    for command in ('init --quiet', 'add --all',
                    '-c user.name=test -c user.email=test@localhost commit --quiet --no-verify -m all',
                    'remote add origin https://github.com/some/plants.git'):
        code, output = run('git', *command.split(), cwd=folder)
        assert code == 0, output

def write_python_action(folder):
    "In place of an action that cannot be fetched: it links this environment, so that `make` installs nothing."
    link = f'mkdir .venv; for f in {sys.prefix}/*; do ln -s "$f" .venv/; done; touch .venv/.installed'
    runs = dict(using='composite', steps=[dict(shell='bash', run=link)])
    action = dict(name='stub', description='stub', inputs={'python-version': dict(default='')}, runs=runs)
    folder.mkdir()
    (folder/'action.yml').write_text(yaml.safe_dump(action))

@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_workflow_that_tests_runs_with_act(tmp_path):
    "Both jobs of test.yml, in this environment: whether notebooks are in step, then .ci/run with one notebook."
    act, checkout = require('act'), tmp_path/'checkout'
    copy_checkout(checkout)
    commit_all(checkout)
    write_python_action(tmp_path/'stub')
    uses = [step.get('uses', '') for step in steps_of(read_yaml(github/'workflows/test.yml'))]
    setup_python = next(action for action in uses if 'setup-python@' in action)
    # A folder of its own for temporary files: pytest closes the usual one to other users, and a database may be in it.
    temp = tmp_path/'temp'
    temp.mkdir()
    options = ['-W', '.github/workflows/test.yml', '-P', 'ubuntu-latest=-self-hosted',
               '--matrix', f'python:{sys.version_info.major}.{sys.version_info.minor}',
               '--local-repository', f'{setup_python}={tmp_path/"stub"}',
               '--env', 'PYTEST_ADDOPTS=tests/test_notebooks.py -k "00_config and not warning"',
               '--env', f'PYTEST_DEBUG_TEMPROOT={temp}', '--env', 'REQUIRE_COMPONENTS=0']
    env = dict(HOME=str(tmp_path/'home'), XDG_CACHE_HOME=str(tmp_path/'cache'))
    code, output = run(act, 'push', *options, cwd=checkout, **env)
    assert code == 0, output[-5000:]
    assert output.count('Job succeeded') == 2, output[-5000:]
    assert '3 passed' in output, output[-5000:]
    assert '1 passed' in output, output[-5000:]
