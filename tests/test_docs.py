"The documentation: what Quarto gets of the notebooks, and where their links lead."
import json, os, re, subprocess, sys
from pathlib import Path
import pytest
from helpers import copy_checkout, prose, root

nbs = root/'nbs'
notebooks = sorted(p for p in nbs.rglob('*.ipynb') if not any(o.startswith(('.', '_')) for o in p.relative_to(nbs).parts))

def cells(nb): return json.loads(nb.read_text())['cells']

def anchors(nb):
    "What can be linked to in a page: its headings, as Quarto names them, and names that were given."
    made = '\n'.join(''.join(o.get('data', {}).get('text/markdown', '')) for c in cells(nb) for o in c.get('outputs', []))
    heads = re.findall(r'^#+ +(.*)$', re.sub(r'^```.*?^```', '', f'{prose(nb)}\n{made}', flags=re.M | re.S), re.M)
    slug = lambda t: re.sub(r'\s+', '-', re.sub(r'[^\w\s.-]', '', re.sub(r'\[(.*?)\]\(.*?\)', r'\1', t)).strip().lower())
    return {m[1] if (m := re.search(r'\{#([\w-]+)\}', h)) else slug(h).lstrip('0123456789.-_') for h in heads}

@pytest.mark.parametrize('nb', notebooks, ids=lambda p: str(p.relative_to(nbs)))
def test_no_dead_link(nb):
    links = re.findall(r'\]\(([^)\s]+)\)', re.sub(r'```.*?```|`[^`\n]*`', '', prose(nb), flags=re.S))
    for o in links:
        if re.match(r'\w+:', o): continue
        file, _, anchor = o.partition('#')
        to = (nb.parent/file).resolve() if file else nb
        assert to.is_file() and to.is_relative_to(nbs), f'{o} leads out of the site, or nowhere'
        if anchor and to.suffix == '.ipynb': assert anchor in anchors(to), f'{o}: there is no such heading'

def test_every_page_is_in_the_sidebar():
    text = (root/'_quarto.yml').read_text()
    for nb in notebooks:
        at = nb.relative_to(nbs)
        assert str(at) in text or f'{at.parts[0]}/*' in text, at

def test_alerts_lead_to_their_section():
    import yaml
    there = anchors(nbs/'guides/alerts.ipynb')
    for f in (root/'docker/prometheus/rules').glob('*.yml'):
        for r in (r for g in yaml.safe_load(f.read_text())['groups'] for r in g['rules'] if 'alert' in r):
            assert r['annotations']['runbook_url'].rpartition('#')[2] in there, f"{r['alert']} is not on the page: execute guides/alerts.ipynb"

@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_quarto_gets_every_page(tmp_path):
    "What nbdev makes of the notebooks for Quarto, which itself is not needed for that."
    (bin := tmp_path/'bin').mkdir()
    (bin/'quarto').write_text('#!/bin/sh\n')
    (bin/'quarto').chmod(0o755)
    to = tmp_path/'p'
    copy_checkout(to)
    env = os.environ | dict(PATH=f'{bin}:{Path(sys.executable).parent}:{os.environ["PATH"]}')
    r = subprocess.run(['nbdev-proc-nbs'], cwd=to, env=env, capture_output=True, text=True)
    assert r.returncode == 0 and not re.search(r'error|traceback', r.stdout + r.stderr, re.I), r.stdout + r.stderr
    made = {str(p.relative_to(to/'_proc')) for p in (to/'_proc').rglob('*.ipynb')}
    assert {str(p.relative_to(nbs)) for p in notebooks} <= made

def test_where_does_it_live_names_what_there_is():
    "Each row of the page: its module is exported from a notebook of the row, and its test is a file."
    rows = [re.findall(r'[^|]+', line) for line in prose(nbs/'guides/where.ipynb').splitlines() if '](../' in line]
    assert len(rows) > 30
    for what, links, modules, test in rows:
        pages = [nbs/'guides'/path for path in re.findall(r'\]\((.*?)\)', links)]
        code = '\n'.join(''.join(c['source']) for page in pages for c in cells(page))
        assert {m for m in re.findall(r'`(.*?)`', modules)} <= set(re.findall(r'^#\|\s*default_exp (\S+)', code, re.M)), what
        assert (root/'tests'/f'{test.strip(" `")}.py').is_file(), what
