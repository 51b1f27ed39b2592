"The shape of the code: order of imports, short lines and modules, one meaning per name, plain words, light imports."
import ast, configparser, json, re, subprocess, sys
from collections import Counter, defaultdict
from functools import cache
import click, pytest
from typer.main import get_command
from helpers import notebook_paths, prose, root

package = root/'plant_mlops'
paths = sorted(path for path in package.rglob('*.py') if path.name != '_modidx.py')

def name_of(path) -> str:
    "Name of a module, as it is imported."
    parts = path.relative_to(root).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)

modules = {name_of(path): path for path in paths}
each_module = pytest.mark.parametrize('module', [name for name, path in modules.items() if path.name != '__init__.py'])

@cache
def tree(module): return ast.parse(modules[module].read_text())

@cache
def lines(module): return modules[module].read_text().splitlines()

def read_settings():
    "The section of settings.ini."
    config = configparser.ConfigParser(delimiters=['='])
    config.read(root/'settings.ini')
    return config['DEFAULT']

# -- Imports

def imported(module):
    "Names that a module imports, also those that a function of it imports: `a.b`, or `a.b.c` for `from a.b import c`."
    path = modules[module]
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import): yield from (alias.name for alias in node.names)
        if not isinstance(node, ast.ImportFrom): continue
        parent = path.relative_to(root).parts[:-node.level] if node.level else ()
        source = '.'.join([*parent, *([node.module] if node.module else [])])
        yield from (f'{source}.{alias.name}' for alias in node.names)

def own_imports(module) -> set:
    "Modules of this package that a module imports."
    result = set()
    for name in imported(module):
        parent = name.rpartition('.')[0]
        if name in modules: result.add(name)
        elif parent in modules: result.add(parent)
    return result - {module, 'plant_mlops'}

FOLDERS = [
    'core', 'data', 'registry', 'model', 'serve', 'batch', 'jobs', 'monitor', 'targets', 'photos', 'apps', 'stocks', 'cli']

@cache
def notebook_of() -> dict:
    "Module → the notebook that it is exported from."
    result = {}
    for path in notebook_paths():
        code = '\n'.join(''.join(cell['source']) for cell in json.loads(path.read_text())['cells'])
        export = re.search(r'^#\|\s*default_exp (\S+)', code, re.M)
        if export: result[f'plant_mlops.{export[1]}'] = path.relative_to(root/'nbs')
    return result

def position(module):
    "Position of a module in the order of imports: its folder, then its notebook's number; `__main__` is the last."
    if module == 'plant_mlops.__main__': return (len(FOLDERS), 0)
    folder = FOLDERS.index(module.split('.')[1])
    if module not in notebook_of(): return (folder, -1) # a package
    return (folder, int(notebook_of()[module].name.split('_')[0]))

@each_module
def test_every_import_goes_to_an_earlier_module(module):
    "Also an import inside a function; so there is no circle of imports."
    later = [name for name in own_imports(module) if position(name) >= position(module)]
    assert not later, f'{module} ({notebook_of().get(module)}) imports what comes after it: {", ".join(sorted(later))}'

def test_a_module_is_in_the_folder_of_its_notebook():
    assert not {module: str(path) for module, path in notebook_of().items() if module.split('.')[1] != path.parts[0]}

def test_no_two_notebooks_of_a_folder_have_the_same_number():
    numbers = Counter((path.parent, path.name.split('_')[0]) for path in notebook_of().values())
    assert not [f'{folder}/{number}' for (folder, number), n in numbers.items() if n > 1]

# -- Lines, names and words

def test_lines_have_at_most_120_columns():
    numbered = [(module, i, line) for module in modules for i, line in enumerate(lines(module), 1)]
    long = [f'{module}:{i}: {len(line)} columns' for module, i, line in numbered if len(line) > 120]
    assert not long, '\n'.join([f'{len(long)} lines have more than 120 columns. Take them apart.', *long[:40]])

def test_modules_have_at_most_350_lines():
    long = {module: len(lines(module)) for module in modules if len(lines(module)) > 350}
    assert len(long) <= 2, f'modules of more than 350 lines: {long}. Does each have one idea?'

# The verbs of the stages may recur in a layer above.
STAGES = {
    'ingest', 'prepare', 'dataset', 'load_dataset', 'Dataset', 'train', 'cross_validate', 'evaluate', 'promote',
    'rollback', 'predict', 'run', 'status', 'history', 'drift', 'serve', 'main', 'app'}

def test_a_public_name_is_defined_in_one_module():
    modules_of = defaultdict(set)
    for module in modules:
        for node in tree(module).body:
            is_definition = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            if is_definition and node.name not in STAGES: modules_of[node.name].add(module)
    shared = [f'{name} is defined in {", ".join(sorted(where))}' for name, where in sorted(modules_of.items())
              if len(where) > 1 and not name.startswith('_')]
    assert len(shared) <= 5, '\n'.join(shared)

def test_no_lambda_has_a_name():
    def is_named_lambda(node): return isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)
    nodes = [(module, node) for module in modules for node in ast.walk(tree(module))]
    named = [f'{module}:{node.lineno}' for module, node in nodes if is_named_lambda(node)]
    assert not named, f'a lambda has a name: {", ".join(named)}'

# Words of a former style of this project, which stopped readers.
ODD_WORDS = re.compile(
    r'\b(in force|learnt|whoever|nobody|somebody|told|beside|anew|mend|mends|mended|at hand|the way back|had better|'
    r'is heard|deaf|whence|thereof)\b', re.I)

def count_odd_words(text) -> Counter: return Counter(match[0].lower() for match in ODD_WORDS.finditer(text))

def test_modules_and_notebooks_use_plain_words():
    texts = {module: path.read_text() for module, path in modules.items()}
    texts |= {str(path.relative_to(root)): prose(path) for path in notebook_paths()}
    counts = {name: count_odd_words(text) for name, text in texts.items()}
    message = '\n'.join(f'{name}: {dict(count)}' for name, count in counts.items() if count)
    assert sum(count.total() for count in counts.values()) <= 40, message

def commands(group, path=()):
    "Each command below a group of commands, with its name."
    yield path, group
    for name in getattr(group, 'commands', ()): yield from commands(group.get_command(None, name), (*path, name))

def test_the_readme_has_fewer_than_200_lines():
    assert len((root/'README.md').read_text().splitlines()) < 200

def test_readme_and_help_use_plain_words():
    from plant_mlops.cli.main import app
    texts = {'README.md': (root/'README.md').read_text()}
    for path, command in commands(get_command(app)):
        texts[' '.join(('plant-mlops', *path))] = command.get_help(click.Context(command))
    assert len(texts) > 30
    counts = {name: dict(count_odd_words(text)) for name, text in texts.items()}
    assert not {name: count for name, count in counts.items() if count}

# -- Packages that serving needs

HEAVY = {
    'torch', 'torchvision', 'fastai', 'timm', 'mlflow', 'pandas', 'sklearn', 'scipy', 'pyarrow', 'onnx', 'matplotlib'}

@pytest.mark.parametrize('module', [module for module in modules if module.startswith('plant_mlops.serve.')])
def test_serving_side_never_imports_training(module):
    assert not {name.split('.')[0] for name in imported(module)} & HEAVY
    training = ('plant_mlops.registry', 'plant_mlops.model')
    assert not [name for name in own_imports(module) if name.startswith(training)]

def requirements(key) -> list: return [line.strip() for line in read_settings()[key].splitlines() if line.strip()]

def test_base_install_has_no_training_packages():
    base = {line.split('>')[0].split('[')[0].strip() for line in requirements('requirements')}
    assert not base & {*HEAVY, 'scikit-learn', 'sqlalchemy', 'gradio'}

def test_every_dependency_has_a_bound():
    keys = [key for key in read_settings() if key.endswith('requirements')]
    assert len(keys) >= 9
    lines = [line for key in keys for line in requirements(key)]
    assert not [line for line in lines if '>=' not in line and '==' not in line]

def loaded_packages(*names) -> set:
    "Packages that are loaded when some modules are imported in a new process."
    code = f'import sys, {", ".join(names)}; print(*sorted({{m.split(".")[0] for m in sys.modules}}))'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())

@pytest.mark.parametrize('module', ['plant_mlops.serve.onnx_model', 'plant_mlops.serve.api', 'plant_mlops.cli.main'])
def test_serving_loads_no_heavy_package_even_where_it_is_installed(module):
    assert not loaded_packages(module) & (HEAVY | {'sqlalchemy', 'gradio', 'boto3'})

def test_exporter_and_backup_load_no_package_that_the_small_image_lacks():
    loaded = loaded_packages('plant_mlops.monitor.exporter', 'plant_mlops.core.backup')
    assert not loaded & (HEAVY | {'gradio', 'IPython', 'papermill'})

# -- The tests

def test_one_worker_runs_all_tests_of_a_group(request):
    "pytest-xdist finds the group in a test's ID, where some versions of pytest do not let it write."
    is_worker = hasattr(request.config, 'workerinput')
    if not is_worker or not getattr(request.config.option, 'loadgroup', True): return # run without groups
    grouped = [item.nodeid for item in request.session.items if item.get_closest_marker('xdist_group')]
    assert not [name for name in grouped if '@' not in name]
