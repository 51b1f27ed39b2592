"The documentation: the pages that Quarto gets from the notebooks, and their links."
import json, os, re, subprocess, sys
import pytest, yaml
from helpers import copy_checkout, notebook_paths, programs, prose, root

nbs = root/'nbs'
notebooks = notebook_paths()

def notebook_id(path) -> str: return str(path.relative_to(nbs))

def cells(path) -> list: return json.loads(path.read_text())['cells']

def read_markdown_outputs(path) -> str:
    outputs = [output for cell in cells(path) for output in cell.get('outputs', [])]
    return '\n'.join(''.join(output.get('data', {}).get('text/markdown', '')) for output in outputs)

def heading_anchor(heading) -> str:
    "The anchor of a heading: a name given as {#name}, or the one that Quarto makes of its text."
    given = re.search(r'\{#([\w-]+)\}', heading)
    if given: return given[1]
    text = re.sub(r'\[(.*?)\]\(.*?\)', r'\1', heading) # links → their texts
    text = re.sub(r'[^\w\s.-]', '', text).strip().lower()
    return re.sub(r'\s+', '-', text).lstrip('0123456789.-_')

def find_anchors(path) -> set:
    "Anchors of a page: of the headings of its prose, and of its outputs."
    text = re.sub(r'^```.*?^```', '', f'{prose(path)}\n{read_markdown_outputs(path)}', flags=re.M | re.S)
    return {heading_anchor(heading) for heading in re.findall(r'^#+ +(.*)$', text, re.M)}

@pytest.mark.parametrize('path', notebooks, ids=notebook_id)
def test_links_lead_to_pages_and_headings_that_exist(path):
    text = re.sub(r'```.*?```|`[^`\n]*`', '', prose(path), flags=re.S) # without code
    for link in re.findall(r'\]\(([^)\s]+)\)', text):
        if re.match(r'\w+:', link): continue # to another site
        file, _, anchor = link.partition('#')
        target = (path.parent/file).resolve() if file else path
        assert target.is_file(), f'{link}: there is no such page'
        assert target.is_relative_to(nbs), f'{link} leads out of the site'
        if not anchor or target.suffix != '.ipynb': continue
        assert anchor in find_anchors(target), f'{link}: there is no such heading'

def test_every_page_is_in_the_sidebar():
    text = (root/'_quarto.yml').read_text()
    for path in notebooks:
        page = path.relative_to(nbs)
        assert str(page) in text or f'{page.parts[0]}/*' in text, page

def test_every_alert_has_a_section_in_the_guide():
    anchors = find_anchors(nbs/'guides/alerts.ipynb')
    files = (root/'docker/prometheus/rules').glob('*.yml')
    groups = [group for file in files for group in yaml.safe_load(file.read_text())['groups']]
    for alert in [rule for group in groups for rule in group['rules'] if 'alert' in rule]:
        anchor = alert['annotations']['runbook_url'].rpartition('#')[2]
        assert anchor in anchors, f"{alert['alert']} is not on the page: execute guides/alerts.ipynb"

# What `nbdev-proc-nbs` does, in one process, which ends at once: IPython would collect garbage once for each page.
MAKE_PAGES = '''
import os, sys
from nbdev.serve import proc_nbs
proc_nbs(n_workers=0)
sys.stdout.flush()
os._exit(0)
'''

@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nbdev_makes_every_page_for_quarto(tmp_path):
    "A script takes the place of Quarto, which nbdev only calls afterwards."
    quarto, copy = tmp_path/'bin/quarto', tmp_path/'p'
    quarto.parent.mkdir()
    quarto.write_text('#!/bin/sh\n')
    quarto.chmod(0o755)
    copy_checkout(copy)
    env = os.environ | dict(PATH=f'{quarto.parent}:{programs}:{os.environ["PATH"]}')
    result = subprocess.run([sys.executable, '-c', MAKE_PAGES], cwd=copy, env=env, capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert not re.search(r'error|traceback', output, re.I), output
    pages = {str(path.relative_to(copy/'_proc')) for path in (copy/'_proc').rglob('*.ipynb')}
    assert {notebook_id(path) for path in notebooks} <= pages

def test_the_guide_where_names_modules_and_tests_that_exist():
    "In each row, the module is exported by a notebook of that row, and the test is a file."
    lines = prose(nbs/'guides/where.ipynb').splitlines()
    rows = [re.findall(r'[^|]+', line) for line in lines if '](../' in line]
    assert len(rows) > 30
    for subject, links, modules, test in rows:
        pages = [nbs/'guides'/link for link in re.findall(r'\]\((.*?)\)', links)]
        code = '\n'.join(''.join(cell['source']) for page in pages for cell in cells(page))
        exported = set(re.findall(r'^#\|\s*default_exp (\S+)', code, re.M))
        assert set(re.findall(r'`(.*?)`', modules)) <= exported, subject
        assert (root/'tests'/f'{test.strip(" `")}.py').is_file(), subject
