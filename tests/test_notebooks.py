"Every notebook runs and has the outputs that were saved; modules, notebooks and README are in step."
import atexit, filecmp, os, re, subprocess
import nbdev.test, pytest
from fastcore.nbio import dict2nb, read_nb
from helpers import SLOW_NOTEBOOKS, borrow_venv, copy_checkout, notebook_name, notebook_paths, root, search_path

nbs = root/'nbs'

def is_tested_elsewhere(path) -> bool:
    "Whether a notebook is a benchmark, which is run by hand, or one of a job, which test_jobs.py runs as a job."
    folders = path.relative_to(nbs).parts[:-1]
    return folders == ('bench',) or folders == ('jobs', 'notebooks') or folders[1:] == ('jobs',)

notebooks = [path for path in notebook_paths() if not is_tested_elsewhere(path)]

def notebook_id(path) -> str: return str(path.relative_to(nbs))

# -- Outputs of a cell

# What differs between two runs is masked, in this order; so are spaces and rules, which depend on the width of columns.
MASKS = [
    (r'\x1b\[[0-9;]*m', ''), # colours of a terminal
    (r'(?s)<style.*?</style>|<[^>]+>', ' '), # the tags of a table
    (r'\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b', '#'), # UUIDs
    (r'(?:file://)?(?:/[\w.@+-]+){2,}/?', 'PATH'), # paths of this machine
    (r'0x[0-9a-f]+|(?<!\.)\b(?=[a-f]*\d)[0-9a-f]{6,}\b', '#'), # addresses and checksums, but no decimal places
    (r'[-+−]?\d+(?:[.,:_]\d+)*(?:e[-+]?\d+)?', '#'), # numbers, times, versions
    (r'just now|# \w+ ago', '# ago'),
    (r'#(?:[\s,]*#)*(?:\+|\.\.\.)?', '#'), # a commit with changes ends in +, a long checksum in ...
    (r'\bhost \S+', 'host #'),
    (r'[─━═╌▁▂▃▄▅▆▇█]+|-{2,}|={2,}', '-'), # rules and bars
    (r'\s+', ' '),
]

TEXT_TYPES = ('text/markdown', 'text/html', 'text/plain')

def mask(text) -> str:
    for pattern, replacement in MASKS: text = re.sub(pattern, replacement, text)
    return text.strip()

def join_lines(text) -> str: return text if isinstance(text, str) else ''.join(text)

def read_stream(cell, name) -> str:
    "What a cell printed to 'stdout' or 'stderr'."
    outputs = [output for output in cell.get('outputs', ()) if output['output_type'] == 'stream']
    return ''.join(join_lines(output['text']) for output in outputs if output['name'] == name)

def summarize_data(data) -> tuple:
    "The types of an output's pictures, or else its text; () if it has neither."
    pictures = tuple(kind for kind in sorted(data) if kind.startswith('image/'))
    if pictures: return pictures
    texts = [mask(join_lines(data[kind])) for kind in TEXT_TYPES if kind in data]
    return tuple(texts[:1]) if any(texts) else ()

def summarize_outputs(cell) -> list:
    "The printed text of a cell, then its values, without what differs between two runs, and without standard error."
    printed = read_stream(cell, 'stdout')
    summaries = [mask(printed)] if printed.strip() else []
    values = [summarize_data(output.get('data', {})) for output in cell.get('outputs', ())]
    return summaries + list(filter(None, values))

def find_differences(saved, executed) -> list:
    "Messages about cells whose outputs have changed; with the tag `varies`, only their number counts."
    executed_cells = {cell.id: cell for cell in executed.cells}
    messages = []
    for cell in saved.cells:
        if cell.cell_type != 'code' or '#| eval: false' in cell.source: continue
        old, new = summarize_outputs(cell), summarize_outputs(executed_cells[cell.id])
        if 'varies' in cell.metadata.get('tags', ()): old, new = len(old), len(new)
        if old != new: messages += [f'cell {cell.id}', *first_difference(str(old), str(new))]
    return messages

def first_difference(old, new, context=80) -> tuple:
    "The parts of two texts where they begin to differ."
    start = len(os.path.commonprefix([old, new]))
    part = slice(max(0, start - context), start + 2*context)
    return f'  saved: {old[part]}', f'  now:   {new[part]}'

# -- Notebooks

@pytest.fixture
def _release_shells(monkeypatch):
    "Let go of the shells that run notebooks, with all their variables; IPython would keep them until the process ends."
    shells = []
    class RecordedShell(nbdev.test.CaptureShell):
        def __init__(self, *args, **kw):
            super().__init__(*args, **kw)
            shells.append(self)
    monkeypatch.setattr(nbdev.test, 'CaptureShell', RecordedShell)
    yield
    for shell in shells:
        atexit.unregister(shell.atexit_operations)
        shell.loop.call_soon_threadsafe(shell.loop.stop)
        shell.user_ns.clear()

@pytest.mark.parametrize('path', notebooks, ids=notebook_id)
@pytest.mark.usefixtures('_release_shells')
def test_notebook(path, monkeypatch):
    "It runs, leaves no files, and has the outputs that were saved."
    executed, files_before = [], set(path.parent.iterdir())
    monkeypatch.setattr(nbdev.test, 'write_nb', lambda notebook, path: executed.append(notebook))
    succeeded, _ = nbdev.test.test_nb(path, save=True) # calls `write_nb` with the executed notebook
    assert succeeded, f'{path.name} failed: see the traceback above'
    new_files = {file.name for file in set(path.parent.iterdir()) - files_before}
    new_files -= {'.ipynb_checkpoints', '__pycache__'}
    assert not new_files, f'{path.name} leaves {new_files}'
    differences = find_differences(read_nb(path), executed[0]) if executed else []
    message = f'{path.name} has other outputs than when it was saved: execute it and save it.'
    assert not differences, '\n'.join([message, *differences])

@pytest.mark.parametrize('path', notebook_paths(), ids=notebook_id)
def test_no_saved_output_is_a_warning(path):
    texts = [read_stream(cell, 'stderr') for cell in read_nb(path).cells]
    assert not [text for text in texts if re.search(r'\w+Warning:|Traceback', text)]

def notebook_with_outputs(text, **data):
    "A notebook with one cell, which prints a text and displays data."
    outputs = [dict(output_type='stream', name='stdout', text=text),
               dict(output_type='display_data', data=data, metadata={})]
    cell = dict(cell_type='code', id='a', source='f()', metadata={}, outputs=outputs)
    return dict2nb(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5))

def test_other_numbers_and_pictures_are_no_difference_but_other_words_and_kinds_are():
    line = 'ingest   0 22 * * *   3.1 s, in /tmp/x1/home\n'
    saved = notebook_with_outputs(line, **{'image/png': 'aaaa', 'text/plain': '<Figure size 10x10>'})
    same = notebook_with_outputs('ingest   10 2 * * *  12 s, in /tmp/other/home\n',
                                 **{'image/png': 'bbbb', 'text/plain': '<Figure size 9x9>'})
    other_text = notebook_with_outputs('ingest   –   3.1 s, in /tmp/x1/home\n', **{'image/png': 'aaaa'})
    no_picture = notebook_with_outputs(line, **{'text/plain': 'no picture'})
    assert not find_differences(saved, same)
    assert find_differences(saved, other_text)
    assert find_differences(saved, no_picture)

def test_every_slow_notebook_exists():
    assert not SLOW_NOTEBOOKS - {*map(notebook_name, map(notebook_id, notebooks))}

# -- Modules, notebooks and README are in step

@pytest.fixture(scope='module')
def fresh(tmp_path_factory):
    "A copy of the project, with modules, notebooks and README generated again."
    copy = tmp_path_factory.mktemp('fresh')/'plant_mlops'
    copy_checkout(copy)
    for file in (copy/'plant_mlops').rglob('*.py'):
        if 'AUTOGENERATED' in file.read_text()[:400]: file.unlink()
    borrow_venv(copy)
    env = os.environ | dict(PATH=search_path, PYTHONPATH='')
    for command in (['make', 'modules'], ['make', 'readme']):
        result = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
        assert result.returncode == 0, f'{command}: {result.stdout}{result.stderr}'
    return copy

def find_files(folder, pattern) -> dict:
    "Files by their path in a folder."
    files = {str(path.relative_to(folder)): path for path in folder.glob(pattern)}
    return {name: path for name, path in files.items() if '.ipynb_checkpoints' not in name}

@pytest.mark.parametrize('pattern', ['plant_mlops/**/*.py', 'nbs/**/*.ipynb', 'README.md'])
def test_in_step(fresh, pattern):
    "The checkout has exactly the files that are generated from its notebooks, with the same content."
    here, generated = find_files(root, pattern), find_files(fresh, pattern)
    git = subprocess.run(['git', 'ls-files'], cwd=root, capture_output=True, text=True)
    tracked = set(git.stdout.split('\n'))
    assert set(generated) <= tracked, 'generated from the notebooks but not committed: run `make export` and add them'
    missing = 'files that no notebook generates, or notebooks that generated no file: run `make export`'
    assert {name for name in here if name in tracked} == set(generated), missing
    stale = [name for name in generated if not filecmp.cmp(here[name], generated[name], shallow=False)]
    assert not stale, f'out of step: {stale}. Run `make export` and commit.'
