"`.env` as people write it: variables of libraries, misspelled settings, byte order marks, secrets."
import base64, errno, os, subprocess, sys
from types import SimpleNamespace
import pytest
from helpers import run_plant, serve_site
from plant_mlops.core import config
from plant_mlops.core.config import PlantError, settings

PRINT = ('import os; from plant_mlops.core.config import settings; s = settings(); '
         'print(s.seed, *(os.environ.get(name) for name in {names!r}))')

def read(folder, *names, **env) -> subprocess.CompletedProcess:
    "A process in a folder with a `.env`, which prints the seed, and variables of its environment after `settings`."
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run([sys.executable, '-c', PRINT.format(names=names)], cwd=folder, env=clean | env,
                          capture_output=True, text=True)

def values(folder, *names, **env) -> list:
    result = read(folder, *names, **env)
    assert result.returncode == 0 and not result.stderr, result.stderr
    return result.stdout.split()

def test_variables_of_libraries_in_env_reach_the_process_quoted_exported_or_with_bom(tmp_path):
    "Quotes, `export`, comments, a byte order mark and CRLF; an empty value is left out, as boto3 takes it for a profile."
    text = ('export AWS_REGION="eu-central-1" # Frankfurt\n# AWS_SESSION_TOKEN=old\nAWS_ACCESS_KEY_ID=\'AKIA#1\'\n'
            'AWS_PROFILE=\nMLFLOW_TRACKING_USERNAME=me\nhttps_proxy = http://proxy:3128\nGIT_PYTHON_REFRESH=quiet\n')
    names = ('AWS_REGION', 'AWS_SESSION_TOKEN', 'AWS_ACCESS_KEY_ID', 'AWS_PROFILE', 'MLFLOW_TRACKING_USERNAME',
             'https_proxy', 'GIT_PYTHON_REFRESH')
    expected = ['eu-central-1', 'None', 'AKIA#1', 'None', 'me', 'http://proxy:3128', 'quiet']
    for encoding in ('utf-8', 'utf-8-sig'):
        for newline in ('\n', '\r\n'):
            content = f'PLANT_SEED=7\n{text}'.replace('\n', newline)
            (tmp_path/'.env').write_bytes(content.encode(encoding))
            assert values(tmp_path, *names) == ['7', *expected], (encoding, newline)

def test_the_environment_takes_precedence_over_env_also_for_libraries(tmp_path):
    (tmp_path/'.env').write_text('PLANT_SEED=7\nAWS_REGION=eu-central-1\nMLFLOW_TRACKING_URI=http://file:5000\n'
                                 'PLANT_TRACKING_URI=http://first:5000\n')
    assert values(tmp_path, 'AWS_REGION', PLANT_SEED='8') == ['8', 'eu-central-1']
    code = 'from plant_mlops.core.config import settings; settings(); import os; print(os.environ["AWS_REGION"], settings().tracking_uri)'
    result = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=os.environ | dict(AWS_REGION='us-east-2'),
                            capture_output=True, text=True)
    assert result.stdout.split() == ['us-east-2', 'http://first:5000'], result.stderr

def test_child_processes_and_kernels_of_jobs_get_the_variables(tmp_path):
    code = ('import subprocess, sys; from plant_mlops.core.config import settings; '
            'from plant_mlops.jobs.runner import kernel_environment; s = settings(); '
            'print(kernel_environment(s)["AWS_REGION"]); sys.stdout.flush(); '
            'subprocess.run([sys.executable, "-c", "import os; print(os.environ[\'AWS_REGION\'])"])')
    (tmp_path/'.env').write_text('AWS_REGION=eu-central-1\n')
    clean = {name: value for name, value in os.environ.items() if name != 'AWS_REGION'}
    result = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert result.stdout.split() == ['eu-central-1', 'eu-central-1'], result.stderr

@pytest.mark.parametrize('line, meant', [
    ('PLANT_BACH_SIZE=8', 'PLANT_BATCH_SIZE'), ('plant_bach_size=8', 'PLANT_BATCH_SIZE'), ('seed=3', 'PLANT_SEED'),
    ('IMAGE_SIZE=96', 'PLANT_IMAGE_SIZE'), ('PLNT_SEED=3', 'PLANT_SEED'), ('MLFLOW_TRACKING_URL=x', 'MLFLOW_TRACKING_URI'),
    ('aws_region=eu-central-1', 'AWS_REGION')])
def test_a_misspelled_variable_in_env_is_warned_of_with_a_suggestion(tmp_path, line, meant):
    (tmp_path/'.env').write_text(f'{line}\nplant_port=8123\n')
    name = line.split('=')[0]
    result = read(tmp_path, name)
    assert result.stdout.split() == ['42', 'None']
    assert f'{name} in .env is not a setting; did you mean {meant}?' in result.stderr
    assert len(result.stderr.splitlines()) == 1

def test_every_command_warns_of_a_misspelled_variable_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PLANT_EPOCH', '3')
    for args in (['config'], ['catalog', 'list']):
        result = run_plant(*args)
        assert result.returncode == 0 and result.stderr.count('PLANT_EPOCH') == 2 # in one line
        assert 'PLANT_EPOCH in the environment is not a setting; did you mean PLANT_EPOCHS?' in result.stderr

def test_names_that_other_programs_use_are_handed_on_without_a_warning(tmp_path):
    names = ('HOME', 'HOST', 'PORT', 'MODEL', 'LOG_LEVEL')
    (tmp_path/'.env').write_text('\n'.join(f'{name}=/x/{name}' for name in names))
    assert values(tmp_path, *names) == ['42', *(f'/x/{name}' for name in names)]

def test_the_error_of_an_env_file_that_cannot_be_read_fits_its_cause(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'.env').write_text('PLANT_SEED=7\n')
    for error, advice in ((PermissionError(errno.EACCES, 'Permission denied', '.env'), 'permission to read'),
                          (OSError(errno.EIO, 'Input/output error', '.env'), 'Restore the file')):
        def fail(*args, **kw): raise error
        monkeypatch.setattr(config, 'dotenv_values', fail) # root may read every file
        with pytest.raises(PlantError, match=advice): settings()

def test_commands_warn_once_and_never_show_a_secret(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    secrets = 'PLANT_S3_SECRET_KEYS=hush-1\nPLANT_TOKN=hush-2\nAWS_SECRET_ACCESS_KEY=hush-3\nPLANT_TOKEN=hush-4\n'
    (tmp_path/'.env').write_text(secrets)
    for args in (['config'], ['catalog', 'list']):
        result = run_plant(*args)
        assert result.returncode == 0 and 'hush' not in result.stdout + result.stderr
        assert 'PLANT_TOKN in .env is not a setting; did you mean PLANT_TOKEN?' in result.stderr
        assert result.stderr.count('PLANT_TOKN in .env') == 1
    (tmp_path/'.env').write_text('PLANT_API_URL=postgres://me:{}@db/plants\n'.format('hush-5'))
    result = run_plant('status')
    assert result.returncode == 1 and 'PLANT_API_URL' in result.stderr and 'hush' not in result.stderr

def test_an_env_file_that_is_not_utf_8_is_an_error_that_says_so(tmp_path, monkeypatch):
    "Windows PowerShell writes UTF-16."
    monkeypatch.chdir(tmp_path)
    (tmp_path/'.env').write_bytes('PLANT_SEED=7\r\n'.encode('utf-16'))
    result = run_plant('status')
    assert result.returncode == 1 and 'Save it as UTF-8' in result.stderr and 'Traceback' not in result.stderr

def test_the_user_of_mlflow_in_env_reaches_its_server(tmp_path, monkeypatch):
    "Its error says what to check, and not the password."
    seen = []
    def refuse(handler):
        seen.append(handler.headers['Authorization'])
        handler.respond(401, {'Content-Length': 0})
    monkeypatch.chdir(tmp_path)
    with serve_site() as site:
        site.pages = SimpleNamespace(get=lambda path, missing: refuse)
        (tmp_path/'.env').write_text(
            'MLFLOW_TRACKING_URI=http://{}:{}\n'.format(*site.server_address) +
            'MLFLOW_TRACKING_USERNAME=ada\nMLFLOW_TRACKING_PASSWORD=hush-6\n')
        result = run_plant('history')
    assert {base64.b64decode(value.split()[1]) for value in seen} == {b'ada:hush-6'}
    assert result.returncode == 1 and 'MLFLOW_TRACKING_PASSWORD' in result.stderr and 'hush' not in result.stderr
