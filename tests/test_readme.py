"The README's commands do what it says, in a fresh copy of the project."
import json, os, re, subprocess, sys
from pathlib import Path
import pytest
from conftest import borrow_venv, copy_checkout, root

pytestmark = pytest.mark.timeout(900)
readme = (root/'README.md').read_text()
commands = [l for block in re.findall(r'```sh\n(.*?)```', readme, re.S) for l in block.splitlines() if l and not l.startswith('#')]

def sh(cmd, cwd, ok=(0,)):
    "Run a command as a person would, with this environment's programs."
    env = {k: v for k, v in os.environ.items() if not k.startswith('PLANT_')}
    env['PATH'] = f'{Path(sys.executable).parent}:{env["PATH"]}'
    r = subprocess.run(['bash', '-c', cmd], cwd=cwd, env=env, capture_output=True, text=True)
    assert r.returncode in ok, f'{cmd} ended with {r.returncode}:\n{r.stdout}{r.stderr}'
    return r.stdout

@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    "The tracked files, with this environment as .venv, so that nothing is installed twice."
    to = tmp_path_factory.mktemp('clone')/'plant_mlops'
    copy_checkout(to)
    borrow_venv(to)
    return to

def own_photos(folder):
    "Photos of somebody's own, in the folders that the README shows."
    from plant_mlops.data.synthetic import LABELS, draw
    for label, drawn in zip(('fern', 'moss'), LABELS):
        (folder/label).mkdir(parents=True)
        for i in range(20): draw(drawn, seed=i).save(folder/label/f'{i}.{"png" if i % 2 else "jpg"}')

def test_main_job_then_every_other_command(clone):
    out = sh('make run', clone)
    assert re.search(r'is (dandelion|grass), .*synthetic photos', out) and '95 % interval' in out and '/ui' in out
    for c in commands:
        if c in ('make run', 'make test') or c.startswith('source') or '--photos' in c: continue
        sh(c, clone)
    status = json.loads(sh('plant-mlops status --json', clone))
    assert status['source'] == 'synthetic' and status['version'] == '1'
    photo = next((clone/'.plant').glob('**/*.jpg'))
    answer = json.loads(sh(f'plant-mlops predict --json {photo}', clone))
    assert set(answer) >= {'file', 'prediction', 'probability', 'probabilities', 'model_version'}
    again = sh('plant-mlops prepare --json', clone)
    assert json.loads(again)['prepared'] == 0
    own_photos(clone/'my-photos')
    mine = next(c for c in commands if '--photos' in c)
    assert re.search(r'is (fern|moss), ', sh(f'PLANT_EPOCHS=0 PLANT_IMAGE_SIZE=96 {mine}', clone)) # quick: how well is not asked here
