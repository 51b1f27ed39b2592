"The commands of the README and of the guides do what is said there, in a fresh copy of the project."
import json, re
import pytest
from helpers import draw_photos, fences, quick, root, sh

pytestmark = pytest.mark.timeout(1800)
guides = {file.stem: fences(file) for file in sorted((root/'nbs/guides').glob('*.ipynb'))}
readme_blocks = re.findall(r'```sh\n(.*?)```', (root/'README.md').read_text(), re.S)
readme = [line for block in readme_blocks for line in block.splitlines() if line and not line.startswith('#')]
exports = 'export ' + ' '.join(f'{name}={value}' for name, value in quick.items())

# -- The guides, as texts

KINDS = ('sh', 'text', 'python')
OTHER_KIND = r'\{\.\w+ filename="[^"]+"\}' # a file, or commands that are not executed: its title says what they need
COMMAND = r'^(plant-mlops|docker|kubectl|make|pip) '

@pytest.mark.parametrize('guide', guides)
def test_commands_are_marked_as_such_or_have_a_title_that_says_what_they_need(guide):
    for kind, text in guides[guide]:
        assert kind in KINDS or re.fullmatch(OTHER_KIND, kind), f'{kind}: {text}'
        if kind == 'text': assert not re.search(COMMAND, text, re.M), f'a command that is not marked: {text}'
        if kind == 'python': compile(text, guide, 'exec')

# -- Executed, in this order: `make run` with smaller photos, the trainings of the guides with quick settings

def is_run_separately(command) -> bool:
    "`make test` would start this test again; the photo guide has `run --photos`, too."
    return command == 'make run' or command.startswith(('make test', 'source')) or '--photos' in command

def test_make_run_trains_a_model_and_then_every_other_command_of_the_readme_succeeds(clone):
    smaller = 'export PLANT_IMAGE_SIZE=96\n' # 30% of the side takes a tenth of the time
    output = sh(smaller + 'make run', clone)
    assert re.search(r'is (dandelion|grass), .*synthetic photos', output)
    assert '95% interval' in output
    assert '/ui' in output
    for command in readme:
        if not is_run_separately(command): sh(smaller + command, clone)
    status = json.loads(sh('plant-mlops status --json', clone))
    assert status['source'] == 'synthetic'
    assert status['version'] == '1'
    photo = next((clone/'.plant').glob('**/*.jpg'))
    answer = json.loads(sh(f'plant-mlops predict --json {photo}', clone))
    assert set(answer) >= {'file', 'prediction', 'probability', 'probabilities', 'model_version'}
    assert json.loads(sh('plant-mlops prepare --json', clone))['prepared'] == 0

def test_the_commands_of_all_guides_succeed(clone):
    "Commands of other guides need the results of the first two; test_pipeline.py tests `pipeline run`."
    draw_photos(clone/'my-photos', labels=('fern', 'ivy', 'moss'), suffixes=('png', 'jpg'))
    first = ['photos', 'services']
    order = [guide for guide in first if guide in guides] + [guide for guide in guides if guide not in first]
    output = ''
    for kind, text in [block for guide in order for block in guides[guide]]:
        if kind != 'sh' or text.startswith('plant-mlops pipeline run'): continue
        output += sh(f'set -e\n{exports}\n{text}', clone)
    assert re.search(r'is (fern|ivy|moss), ', output)

def test_the_readme_has_the_commands_of_the_guide_for_own_photos():
    with_photos, = (command for command in readme if '--photos' in command)
    assert any(with_photos in text.splitlines() for kind, text in guides['photos'] if kind == 'sh')
