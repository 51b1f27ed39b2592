"The base install is enough to serve, and small."
import json, subprocess, sys
from pathlib import Path
import pytest
from helpers import copy_checkout, missing, root

LINKED = ['nbs/jobs/notebooks', 'nbs/photos/jobs', 'nbs/stocks/jobs', 'nbs/apps/dashboard.ipynb'] # from plant_mlops
PATHS = ['plant_mlops', 'settings.ini', 'setup.py', 'pyproject.toml', 'README.md', *LINKED]

@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "A virtual environment with the base install alone."
    folder = tmp_path_factory.mktemp('base')
    source, venv = folder/'src', folder/'venv'
    copy_checkout(source, *PATHS)
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', venv], check=True)
    uv = Path(sys.executable).with_name('uv')
    install = [uv, 'pip', 'install', '--quiet', '--python', venv/'bin/python', str(source)]
    r = subprocess.run(install, capture_output=True, text=True)
    if r.returncode: missing('package index', r.stderr[-300:])
    return venv

def test_every_file_of_the_package_is_installed(base):
    "Style sheets, scripts, templates, SQL and notebooks, too."
    installed, = (base/'lib').glob('python*/site-packages/plant_mlops')
    def names(folder):
        files = (f for f in folder.rglob('*') if f.is_file() and '__pycache__' not in f.parts)
        return {str(f.relative_to(folder)) for f in files}
    assert names(root/'plant_mlops') - names(installed) == set()

def test_the_base_install_is_small_and_has_no_training_packages(base):
    megabytes = sum(f.lstat().st_size for f in base.rglob('*') if not f.is_symlink())/1e6
    installed = {p.name.split('-')[0].lower() for p in (base/'lib').rglob('*.dist-info')}
    heavy = {'torch', 'fastai', 'mlflow', 'mlflow_skinny', 'pandas', 'scikit_learn', 'sqlalchemy', 'gradio'}
    print(f'{megabytes:.0f} MB')
    assert megabytes <= 300
    assert not installed & heavy

MEASURE = '''
import json, re, sys
from plant_mlops.cli.main import main
sys.argv = ['plant-mlops', 'predict', '--json', *sys.argv[1:]]
try: main()
except SystemExit as e: assert not e.code, e.code
heavy = {'torch', 'fastai', 'mlflow', 'pandas', 'sqlalchemy', 'gradio'} & {m.split('.')[0] for m in sys.modules}
# ru_maxrss would count the memory of the parent
peak = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])/1024
print(json.dumps(dict(mb=peak, heavy=sorted(heavy))), file=sys.stderr)
'''

def test_the_base_install_predicts(base, tmp_path):
    from plant_mlops.core.config import settings
    from plant_mlops.registry.example_model import photo_bytes, publish_example
    publish_example(settings(home=tmp_path/'home'))
    photo = tmp_path/'un été.jpg'
    photo.write_bytes(photo_bytes('gold'))
    command = [base/'bin/python', '-c', MEASURE, photo, '--home', tmp_path/'home']
    r = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    answer, used = json.loads(r.stdout), json.loads(r.stderr.splitlines()[-1])
    assert answer['prediction'] == 'dandelion' and answer['file'] == str(photo)
    assert not used['heavy'] and used['mb'] <= 250, used

def run_base(base, folder, *args) -> subprocess.CompletedProcess:
    "Run a command of the base install."
    command = [base/'bin/plant-mlops', *args, '--home', folder]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)

def test_the_base_install_predicts_avif_and_names_the_extra_for_heic(base, tmp_path):
    from plant_mlops.core.config import settings
    from plant_mlops.registry.example_model import photo_bytes, publish_example
    publish_example(settings(home=tmp_path/'home'))
    (tmp_path/'a.avif').write_bytes(photo_bytes('gold', 'AVIF'))
    (tmp_path/'b.heic').write_bytes(b'\0\0\0\x18ftypheic\0\0\0\0mif1heic' + bytes(100))
    command = [base/'bin/plant-mlops', 'predict', '--json', 'a.avif', 'b.heic', '--home', tmp_path/'home']
    r = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert '"prediction": "dandelion"' in r.stdout, r.stderr
    assert 'pip install' in r.stdout + r.stderr and 'plant_mlops[heic]' in r.stdout + r.stderr

@pytest.mark.parametrize('args', [['catalog', 'list'], ['train']], ids=' '.join)
def test_the_error_of_a_missing_extra_names_it(base, tmp_path, args):
    r = run_base(base, tmp_path, *args)
    assert r.returncode == 1 and 'plant_mlops[train]' in r.stderr and 'Traceback' not in r.stderr

def test_status_needs_no_extra(base, tmp_path):
    r = run_base(base, tmp_path, 'status', '--json')
    assert r.returncode == 0 and 'Traceback' not in r.stderr

@pytest.mark.parametrize('name', ['ab', 'catalog', 'drift', 'job', 'pipeline', 'promote', 'train'])
def test_help_needs_no_extra(base, name):
    r = subprocess.run([base/'bin/plant-mlops', name, '--help'], capture_output=True, text=True)
    assert r.returncode == 0 and name in r.stdout, r.stderr
