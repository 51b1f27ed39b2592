"The commands of the README do what it says, in a fresh copy of the project."
import json, re
import pytest
from helpers import draw_photos, root, sh

pytestmark = pytest.mark.timeout(900)
readme = (root/'README.md').read_text()
commands = [l for block in re.findall(r'```sh\n(.*?)```', readme, re.S) for l in block.splitlines() if l and not l.startswith('#')]

def test_main_job_then_every_other_command(clone):
    out = sh('make run', clone)
    assert re.search(r'is (dandelion|grass), .*synthetic photos', out) and '95% interval' in out and '/ui' in out
    for c in commands:
        if c == 'make run' or c.startswith(('make test', 'source')) or '--photos' in c: continue
        sh(c, clone)
    status = json.loads(sh('plant-mlops status --json', clone))
    assert status['source'] == 'synthetic' and status['version'] == '1'
    photo = next((clone/'.plant').glob('**/*.jpg'))
    answer = json.loads(sh(f'plant-mlops predict --json {photo}', clone))
    assert set(answer) >= {'file', 'prediction', 'probability', 'probabilities', 'model_version'}
    again = sh('plant-mlops prepare --json', clone)
    assert json.loads(again)['prepared'] == 0
    draw_photos(clone/'my-photos', labels=('fern', 'moss'), suffixes=('jpg', 'png'))
    mine = next(c for c in commands if '--photos' in c)
    assert re.search(r'is (fern|moss), ', sh(f'PLANT_EPOCHS=0 PLANT_IMAGE_SIZE=96 {mine}', clone)) # quick: how well is not asked here
