"The commands of the README do what it says, in a fresh copy of the project."
import json, re
import pytest
from helpers import draw_photos, root, sh

pytestmark = pytest.mark.timeout(900)
readme = (root/'README.md').read_text()
lines = [line for block in re.findall(r'```sh\n(.*?)```', readme, re.S) for line in block.splitlines()]
commands = [line for line in lines if line and not line.startswith('#')]

def is_run_separately(command) -> bool:
    return command == 'make run' or command.startswith(('make test', 'source')) or '--photos' in command

def test_make_run_trains_a_model_and_then_every_other_command_succeeds(clone):
    output = sh('make run', clone)
    assert re.search(r'is (dandelion|grass), .*synthetic photos', output)
    assert '95% interval' in output
    assert '/ui' in output
    for command in commands:
        if not is_run_separately(command): sh(command, clone)
    status = json.loads(sh('plant-mlops status --json', clone))
    assert status['source'] == 'synthetic'
    assert status['version'] == '1'
    photo = next((clone/'.plant').glob('**/*.jpg'))
    answer = json.loads(sh(f'plant-mlops predict --json {photo}', clone))
    assert set(answer) >= {'file', 'prediction', 'probability', 'probabilities', 'model_version'}
    assert json.loads(sh('plant-mlops prepare --json', clone))['prepared'] == 0
    draw_photos(clone/'my-photos', labels=('fern', 'moss'), suffixes=('jpg', 'png'))
    with_own_photos = next(command for command in commands if '--photos' in command)
    output = sh(f'PLANT_EPOCHS=0 PLANT_IMAGE_SIZE=96 {with_own_photos}', clone) # a quick training: any answer will do
    assert re.search(r'is (fern|moss), ', output)
