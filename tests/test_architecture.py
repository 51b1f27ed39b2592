"The shape of the code: the order of imports, short lines and modules, one meaning for a name, plain words; and a serving side that needs little."
import ast, collections, configparser, json, re, subprocess, sys
from functools import cache
import pytest
from helpers import notebook_paths, prose, root

package = root/'plant_mlops'
paths = sorted(p for p in package.rglob('*.py') if p.name != '_modidx.py')

def name_of(path) -> str:
    "Name of a module, as it is imported."
    parts = path.relative_to(root).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)

modules = {name_of(p): p for p in paths}
each_module = pytest.mark.parametrize('module', [m for m, p in modules.items() if p.name != '__init__.py'])

@cache
def tree(module): return ast.parse(modules[module].read_text())

@cache
def lines(module): return modules[module].read_text().splitlines()

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
    found = set()
    for name in imported(module):
        if name in modules: found.add(name)
        elif name.rpartition('.')[0] in modules: found.add(name.rpartition('.')[0])
    return found - {module, 'plant_mlops'}

FOLDERS = ['core', 'data', 'registry', 'model', 'serve', 'jobs', 'monitor', 'targets', 'photos', 'apps', 'stocks', 'cli']

@cache
def notebook_of() -> dict:
    "Module → the notebook that it is exported from."
    out = {}
    for path in notebook_paths():
        code = '\n'.join(''.join(c['source']) for c in json.loads(path.read_text())['cells'])
        if m := re.search(r'^#\|\s*default_exp (\S+)', code, re.M): out[f'plant_mlops.{m[1]}'] = path.relative_to(root/'nbs')
    return out

def position(module):
    "Where a module stands in the order of reading: its folder, then its notebook's number. `__main__` is the last."
    if module == 'plant_mlops.__main__': return (len(FOLDERS), 0)
    folder = FOLDERS.index(module.split('.')[1])
    if module not in notebook_of(): return (folder, -1)  # a package
    return (folder, int(notebook_of()[module].name.split('_')[0]))

@each_module
def test_every_import_goes_to_an_earlier_module(module):
    "Imports inside functions too; so no two modules can import each other in a circle."
    later = [name for name in own_imports(module) if position(name) >= position(module)]
    assert not later, f'{module} ({notebook_of().get(module)}) imports what comes after it: {", ".join(sorted(later))}'

def test_a_module_is_in_the_folder_of_its_notebook():
    assert not {m: str(nb) for m, nb in notebook_of().items() if m.split('.')[1] != nb.parts[0]}

def test_numbers_of_a_folder_are_given_once():
    numbers = collections.Counter((nb.parent, nb.name.split('_')[0]) for nb in notebook_of().values())
    assert not [f'{folder}/{number}' for (folder, number), n in numbers.items() if n > 1]

# -- Lines, names and words

def test_lines_are_short():
    long = [f'{m}:{i}: {len(line)} columns' for m in modules for i, line in enumerate(lines(m), 1) if len(line) > 120]
    assert not long, '\n'.join([f'{len(long)} lines have more than 120 columns. Take them apart.', *long[:40]])

def test_modules_are_short():
    long = {m: len(lines(m)) for m in modules if len(lines(m)) > 350}
    assert len(long) <= 2, f'modules of more than 350 lines: {long}. Does each have one idea?'

# The verbs of the stages may recur in a layer above.
STAGES = {'ingest', 'prepare', 'dataset', 'load_dataset', 'Dataset', 'train', 'cross_validate', 'evaluate', 'promote', 'rollback',
          'predict', 'run', 'status', 'history', 'drift', 'serve', 'main', 'app'}

def test_a_public_name_means_one_thing():
    where = collections.defaultdict(set)
    for m in modules:
        for node in tree(m).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): where[node.name].add(m)
    shared = {k: sorted(ms) for k, ms in where.items() if len(ms) > 1 and k not in STAGES and not k.startswith('_')}
    assert len(shared) <= 5, '\n'.join(f'{k} is defined in {", ".join(ms)}' for k, ms in sorted(shared.items()))

def test_a_function_with_a_name_is_a_def():
    bound = [f'{m}:{node.lineno}' for m in modules for node in ast.walk(tree(m))
             if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)]
    assert not bound, f'a lambda has a name: {", ".join(bound)}'

# Words of a former style of this project, which stopped readers.
ODD_WORDS = re.compile(r'\b(in force|learnt|whoever|nobody|somebody|told|beside|anew|mend|mends|mended|at hand|the way back|had better|'
                       r'is heard|deaf|whence|thereof)\b', re.I)

def odd_words(text) -> collections.Counter: return collections.Counter(m[0].lower() for m in ODD_WORDS.finditer(text))

def test_words_are_plain():
    texts = {m: modules[m].read_text() for m in modules} | {str(p.relative_to(root)): prose(p) for p in notebook_paths()}
    found = {k: odd_words(text) for k, text in texts.items()}
    assert sum(c.total() for c in found.values()) <= 40, '\n'.join(f'{k}: {dict(c)}' for k, c in found.items() if c)

def commands(group, path=()):
    "Each command below a group of commands, with its name."
    yield path, group
    for name in getattr(group, 'commands', ()): yield from commands(group.get_command(None, name), (*path, name))

def test_words_of_readme_and_help_are_plain():
    import click
    from typer.main import get_command
    from plant_mlops.cli.main import app
    texts = {'README.md': (root/'README.md').read_text()}
    for path, command in commands(get_command(app)): texts[' '.join(('plant-mlops', *path))] = command.get_help(click.Context(command))
    assert len(texts) > 30 and not {k: dict(odd_words(t)) for k, t in texts.items() if odd_words(t)}

# -- What serving needs

HEAVY = {'torch', 'torchvision', 'fastai', 'timm', 'mlflow', 'pandas', 'sklearn', 'scipy', 'pyarrow', 'onnx', 'matplotlib'}

@pytest.mark.parametrize('module', [m for m in modules if m.startswith('plant_mlops.serve.')])
def test_serving_side_never_imports_training(module):
    assert not {name.split('.')[0] for name in imported(module)} & HEAVY
    assert not [m for m in own_imports(module) if m.startswith(('plant_mlops.registry', 'plant_mlops.model'))]

def requirements(key) -> list:
    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini')
    return [line.strip() for line in cfg['DEFAULT'][key].splitlines() if line.strip()]

def test_base_install_has_no_training_packages():
    base = {line.split('>')[0].split('[')[0].strip() for line in requirements('requirements')}
    assert not base & {*HEAVY, 'scikit-learn', 'sqlalchemy', 'gradio'}

def test_every_dependency_has_a_bound():
    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini')
    keys = [key for key in cfg['DEFAULT'] if key.endswith('requirements')]
    assert len(keys) >= 9 and not [line for key in keys for line in requirements(key) if '>=' not in line and '==' not in line]

def loaded(*names) -> set:
    "Packages that are loaded once some modules are imported, in a process of its own."
    code = f'import sys, {", ".join(names)}; print(*sorted({{m.split(".")[0] for m in sys.modules}}))'
    return set(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split())

@pytest.mark.parametrize('module', ['plant_mlops.serve.onnx_model', 'plant_mlops.serve.api', 'plant_mlops.cli.main'])
def test_light_imports(module):
    "What answers a prediction loads nothing heavy, even where it is installed."
    assert not loaded(module) & (HEAVY | {'sqlalchemy', 'gradio', 'boto3'})

def test_exporter_runs_from_the_small_image():
    assert not loaded('plant_mlops.monitor.exporter', 'plant_mlops.core.backup') & (HEAVY | {'gradio', 'IPython', 'papermill'})
