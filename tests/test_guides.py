"The commands of the guides are executed, in order, in a fresh copy of the project."
import re
import pytest
from helpers import draw_photos, fences, quick, root, sh

pytestmark = pytest.mark.timeout(900)
guides = {file.stem: fences(file) for file in sorted((root/'nbs/guides').glob('*.ipynb'))}
exports = 'export ' + ' '.join(f'{name}={value}' for name, value in quick.items())

KINDS = ('sh', 'text', 'python')
OTHER_KIND = r'\{\.\w+ filename="[^"]+"\}' # a file, or commands that are not executed: its title says what they need
COMMAND = r'^(plant-mlops|docker|kubectl|make|pip) '

@pytest.mark.parametrize('guide', guides)
def test_commands_are_marked_as_such_or_have_a_title_that_says_what_they_need(guide):
    for kind, text in guides[guide]:
        assert kind in KINDS or re.fullmatch(OTHER_KIND, kind), f'{kind}: {text}'
        if kind == 'text': assert not re.search(COMMAND, text, re.M), f'a command that is not marked: {text}'
        if kind == 'python': compile(text, guide, 'exec')

@pytest.fixture(scope='module')
def clone_with_photos(clone):
    "A copy of the project with photos of three classes in it."
    draw_photos(clone/'my-photos', labels=('fern', 'ivy', 'moss'))
    return clone

def test_the_commands_of_all_guides_succeed(clone_with_photos):
    "Commands of other guides need the results of the first two; test_pipeline.py tests `pipeline run`."
    first = ['photos', 'services']
    order = [guide for guide in first if guide in guides] + [guide for guide in guides if guide not in first]
    for kind, text in [block for guide in order for block in guides[guide]]:
        if kind != 'sh' or text.startswith('plant-mlops pipeline run'): continue
        sh(f'set -e\n{exports}\n{text}', clone_with_photos)
