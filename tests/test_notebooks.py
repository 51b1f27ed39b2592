"Every notebook runs and shows what it showed when it was saved; modules, notebooks and README are in step."
import filecmp, os, re, subprocess
import nbdev.test, pytest
from fastcore.nbio import read_nb
from helpers import SLOW_NOTEBOOKS, borrow_venv, copy_checkout, notebook_paths, root, search_path

nbs = root/'nbs'

def is_tested_elsewhere(path) -> bool:
    "Benchmarks take long, and are run by hand; the notebooks of jobs are run by test_jobs.py, as jobs."
    folders = path.relative_to(nbs).parts[:-1]
    return folders == ('bench',) or folders == ('jobs', 'notebooks') or folders[1:] == ('jobs',)

notebooks = [p for p in notebook_paths() if not is_tested_elsewhere(p)]

# -- What a cell shows

# Masked in this order: what differs between two runs, and the blanks and rules that a table's columns are as wide as.
MASKS = [
    (r'\x1b\[[0-9;]*m', ''),                                # colours of a terminal
    (r'(?s)<style.*?</style>|<[^>]+>', ' '),                # the tags of a table
    (r'\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b', '#'), # UUIDs
    (r'(?:file://)?(?:/[\w.@+-]+){2,}/?', 'PATH'),          # paths of this machine
    (r'0x[0-9a-f]+|\b(?=[a-f]*\d)[0-9a-f]{6,}\b', '#'),     # addresses and checksums
    (r'[-+−]?\d[\d.,:_]*(?:e[-+]?\d+)?', '#'),              # numbers, times, versions
    (r'#(?:\s*#)*\+?', '#'),                                 # a commit with changes ends in +
    (r'\bhost \S+', 'host #'),
    (r'[─━═╌▁▂▃▄▅▆▇█]+|-{2,}|={2,}', '-'),                  # rules and bars
    (r'\s+', ' '),
]

def masked(text) -> str:
    for pattern, instead in MASKS: text = re.sub(pattern, instead, text)
    return text.strip()

def joined(text) -> str: return text if isinstance(text, str) else ''.join(text)

def shown(cell) -> list:
    "What a cell shows: its printed text, then its values; a picture by its kind alone. Log lines and warnings are left out."
    printed = ''.join(joined(o['text']) for o in cell.get('outputs', ()) if o['output_type'] == 'stream' and o['name'] == 'stdout')
    out = [masked(printed)] if printed.strip() else []
    for output in cell.get('outputs', ()):
        data = output.get('data', {})
        kinds = [k for k in sorted(data) if k.startswith('image/')]
        texts = [masked(joined(data[k])) for k in ('text/markdown', 'text/html', 'text/plain') if k in data and not kinds]
        if kinds or any(texts): out.append((*kinds, *texts[:1]))
    return out

def differences(saved, executed) -> list:
    "Cells that showed something else when they were executed; those with the tag `varies` need only show as many things."
    after, out = {c.id: c for c in executed.cells}, []
    for cell in saved.cells:
        if cell.cell_type != 'code' or '#| eval: false' in cell.source: continue
        was, now = shown(cell), shown(after[cell.id])
        if 'varies' in cell.metadata.get('tags', ()): was, now = len(was), len(now)
        if was != now: out.append('\n'.join([f'cell {cell.id}', *changed_part(str(was), str(now))]))
    return out

def changed_part(was, now, around=80) -> tuple:
    "Where two texts begin to differ."
    at = len(os.path.commonprefix([was, now]))
    part = slice(max(0, at - around), at + 2*around)
    return f'  saved: {was[part]}', f'  now:   {now[part]}'

@pytest.mark.parametrize('nb', notebooks, ids=lambda p: str(p.relative_to(nbs)))
def test_notebook(nb, monkeypatch):
    executed, before = [], set(nb.parent.iterdir())
    monkeypatch.setattr(nbdev.test, 'write_nb', lambda result, path: executed.append(result))
    ok, _ = nbdev.test.test_nb(nb, save=True) # which it would write to the file
    assert ok, f'{nb.name} failed: see the traceback above'
    left = {p for p in set(nb.parent.iterdir()) - before if p.name not in ('.ipynb_checkpoints', '__pycache__')}
    assert not left, f'{nb.name} leaves {left} behind'
    stale = differences(read_nb(nb), executed[0]) if executed else []
    assert not stale, '\n'.join([f'{nb.name} shows something else than when it was saved: execute it and save it.', *stale])

@pytest.mark.parametrize('nb', notebook_paths(), ids=lambda p: str(p.relative_to(nbs)))
def test_no_notebook_shows_a_warning(nb):
    texts = [joined(o['text']) for c in read_nb(nb).cells for o in c.get('outputs', ()) if o['output_type'] == 'stream' and o['name'] == 'stderr']
    assert not [t for t in texts if re.search(r'\w+Warning:|Traceback', t)]

def test_a_stale_output_is_found():
    from fastcore.nbio import dict2nb
    def notebook(text, **data):
        outputs = [dict(output_type='stream', name='stdout', text=text), dict(output_type='display_data', data=data, metadata={})]
        return dict2nb(dict(cells=[dict(cell_type='code', id='a', source='f()', metadata={}, outputs=outputs)], metadata={}, nbformat=4, nbformat_minor=5))
    saved = notebook('ingest   0 22 * * *   3.1 s, in /tmp/x1/home\n', **{'image/png': 'aaaa', 'text/plain': '<Figure size 10x10>'})
    assert not differences(saved, notebook('ingest   10 2 * * *  12 s, in /tmp/other/home\n', **{'image/png': 'bbbb', 'text/plain': '<Figure size 9x9>'}))
    assert differences(saved, notebook('ingest   –   3.1 s, in /tmp/x1/home\n', **{'image/png': 'aaaa'}))
    assert differences(saved, notebook('ingest   0 22 * * *   3.1 s, in /tmp/x1/home\n', **{'text/plain': 'no picture'}))

def test_every_notebook_that_is_called_slow_exists():
    names = {re.sub(r'\d+_', '', str(p.relative_to(nbs).with_suffix(''))) for p in notebooks}
    assert not SLOW_NOTEBOOKS - names

# -- In step

@pytest.fixture(scope='module')
def fresh(tmp_path_factory):
    "A copy of the tracked files, with modules, notebooks and README made again."
    to = tmp_path_factory.mktemp('fresh')/'plant_mlops'
    copy_checkout(to)
    for f in (to/'plant_mlops').rglob('*.py'):
        if 'AUTOGENERATED' in f.read_text()[:400]: f.unlink()
    borrow_venv(to)
    for command in (['make', 'modules'], ['make', 'readme']):
        r = subprocess.run(command, cwd=to, env=os.environ | dict(PATH=search_path, PYTHONPATH=''), capture_output=True, text=True)
        assert r.returncode == 0, f'{command}: {r.stdout}{r.stderr}'
    return to

@pytest.mark.parametrize('what', ['plant_mlops/**/*.py', 'nbs/**/*.ipynb', 'README.md'])
def test_in_step(fresh, what):
    def files(folder): return {str(p.relative_to(folder)): p for p in folder.glob(what) if '.ipynb_checkpoints' not in str(p)}
    here, there = files(root), files(fresh)
    tracked = set(subprocess.run(['git', 'ls-files'], cwd=root, capture_output=True, text=True).stdout.split('\n'))
    assert set(there) - tracked == set(), 'made from the notebooks but not committed: run `make export` and add them'
    assert {k for k in here if k in tracked} == set(there), 'files that no notebook makes, or notebooks that made no file: run `make export`'
    stale = [k for k in there if not filecmp.cmp(here[k], there[k], shallow=False)]
    assert not stale, f'out of step: {stale}. Run `make export` and commit.'
