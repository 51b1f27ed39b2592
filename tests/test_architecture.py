"The house's rules: one direction of imports, and a serving side that needs little."
import ast, configparser, subprocess, sys
import pytest
from conftest import root

order = ['core', 'data', 'registry', 'model', 'serve', 'jobs', 'monitor', 'targets', 'apps', 'photos', 'stocks', 'cli', '__main__']
heavy = {'torch', 'torchvision', 'fastai', 'timm', 'mlflow', 'pandas', 'sklearn', 'scipy', 'pyarrow', 'onnx', 'matplotlib', 'evidently'}
modules = sorted(p for p in (root/'plant_mlops').rglob('*.py') if p.name not in ('__init__.py', '_modidx.py'))

def imported(path):
    "Names of all modules that a file imports anywhere in it."
    for n in ast.walk(ast.parse(path.read_text())):
        if isinstance(n, ast.Import): yield from (a.name for a in n.names)
        elif isinstance(n, ast.ImportFrom):
            here = path.relative_to(root).parts[:-n.level] if n.level else ()
            yield '.'.join([*here, *([n.module] if n.module else [])])

def room(module): return module.split('.')[1] if '.' in module else ''

@pytest.mark.parametrize('path', modules, ids=lambda p: str(p.relative_to(root)))
def test_imports_go_one_way(path):
    mine = order.index(path.parent.name if path.parent.name != 'plant_mlops' else path.stem)
    for m in imported(path):
        if m.startswith('plant_mlops.'): assert order.index(room(m)) <= mine, f'{path.name} imports {m}, which comes after it'

@pytest.mark.parametrize('path', [p for p in modules if p.parent.name == 'serve'], ids=lambda p: p.stem)
def test_serving_side_never_imports_training(path):
    names = {m.split('.')[0] for m in imported(path)}
    assert not names & heavy
    assert not [m for m in imported(path) if m.startswith('plant_mlops.model')]

def test_base_install_has_no_training_packages():
    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini')
    base = {l.split('>')[0].split('[')[0].strip() for l in cfg['DEFAULT']['requirements'].splitlines() if l.strip()}
    assert not base & {*heavy, 'scikit-learn', 'sqlalchemy', 'gradio'}

def test_every_dependency_has_a_bound():
    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini')
    for key in cfg['DEFAULT']:
        if key.endswith('requirements'):
            for l in filter(None, map(str.strip, cfg['DEFAULT'][key].splitlines())): assert '>=' in l or '==' in l, f'{l} has no lower bound'

@pytest.mark.parametrize('module', ['plant_mlops.serve.onnx_model', 'plant_mlops.serve.api', 'plant_mlops.cli.main'])
def test_light_imports(module):
    "What answers a prediction loads nothing heavy, even where it is installed."
    code = f'import sys, {module}; print(*sorted({{m.split(".")[0] for m in sys.modules}}))'
    loaded = set(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & (heavy | {'sqlalchemy', 'gradio', 'boto3'})

def test_exporter_runs_from_the_small_image():
    code = 'import sys, plant_mlops.monitor.exporter, plant_mlops.core.backup; print(*sorted({m.split(".")[0] for m in sys.modules}))'
    loaded = set(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & (heavy | {'gradio', 'IPython', 'papermill'})
