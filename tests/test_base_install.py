"The base install is enough to serve, and small."
import json, subprocess, sys
from pathlib import Path
import pytest
from conftest import copy_checkout

def _uv():
    return str(Path(sys.executable).with_name('uv'))

@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "A virtual environment with the base install alone."
    at = tmp_path_factory.mktemp('base')
    src = at/'src'
    copy_checkout(src, 'plant_mlops', 'nbs/jobs/notebooks', 'nbs/photos/jobs', 'nbs/stocks/jobs', 'nbs/apps/dashboard.ipynb', 'settings.ini', 'setup.py', 'pyproject.toml', 'README.md') # with what plant_mlops links to
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', at/'venv'], check=True)
    r = subprocess.run([_uv(), 'pip', 'install', '--quiet', '--python', at/'venv/bin/python', str(src)], capture_output=True, text=True)
    if r.returncode: pytest.skip(f'the base install cannot be fetched here: {r.stderr[-300:]}')
    return at/'venv'

def test_small_and_without_training_packages(base):
    size = sum(f.lstat().st_size for f in base.rglob('*') if not f.is_symlink()) / 1e6
    installed = {p.name.split('-')[0].lower() for p in (base/'lib').rglob('*.dist-info')}
    print(f'{size:.0f} MB')
    assert size <= 300
    assert not installed & {'torch', 'fastai', 'mlflow', 'mlflow_skinny', 'pandas', 'scikit_learn', 'sqlalchemy', 'gradio'}

_measured = '''
import json, re, sys
from plant_mlops.cli.main import main
sys.argv = ['plant-mlops', 'predict', '--json', *sys.argv[1:]]
try: main()
except SystemExit as e: assert not e.code, e.code
heavy = {'torch', 'fastai', 'mlflow', 'pandas', 'sqlalchemy', 'gradio'} & {m.split('.')[0] for m in sys.modules}
peak = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024 # ru_maxrss would count the parent's
print(json.dumps(dict(mb=peak, heavy=sorted(heavy))), file=sys.stderr)
'''

def test_predicts(base, tmp_path):
    from tiny import jpeg, publish
    from plant_mlops.core.config import settings
    publish(settings(home=tmp_path/'home'))
    photo = tmp_path/'un été.jpg'
    photo.write_bytes(jpeg('gold'))
    r = subprocess.run([base/'bin/python', '-c', _measured, photo, '--home', tmp_path/'home'], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    answer, used = json.loads(r.stdout), json.loads(r.stderr.splitlines()[-1])
    assert answer['prediction'] == 'dandelion' and answer['file'] == str(photo)
    assert not used['heavy'] and used['mb'] <= 250, used

def test_a_missing_extra_is_named(base, tmp_path):
    for cmd in (['catalog', 'list'], ['train'], ['status', '--json']):
        r = subprocess.run([base/'bin/plant-mlops', *cmd, '--home', tmp_path], capture_output=True, text=True, cwd=tmp_path)
        assert 'Traceback' not in r.stderr, r.stderr
        if cmd[0] != 'status': assert r.returncode == 1 and "plant_mlops[train]" in r.stderr
