"The commands of the guides are executed, in order, in a fresh copy of the project; those that need more say what they need."
import re
import pytest
from helpers import draw_photos, fences, quick, root, sh

pytestmark = pytest.mark.timeout(900)
guides = {f.stem: fences(f) for f in sorted((root/'nbs/guides').glob('*.ipynb'))}
exports = 'export ' + ' '.join(f'{k}={v}' for k, v in quick.items())

@pytest.mark.parametrize('guide', guides)
def test_what_is_not_executed_says_what_it_needs(guide):
    for kind, text in guides[guide]:
        assert kind in ('sh', 'text', 'python') or re.fullmatch(r'\{\.\w+ filename="[^"]+"\}', kind), f'{kind}: {text}'
        assert kind != 'text' or not re.search(r'^(plant-mlops|docker|kubectl|make|pip) ', text, re.M), f'a command that is not marked: {text}'
        if kind == 'python': compile(text, guide, 'exec')

@pytest.fixture(scope='module')
def own(clone):
    "A copy of the project with photos of three classes in it."
    draw_photos(clone/'my-photos', labels=('fern', 'ivy', 'moss'))
    return clone

def test_commands(own):
    "Pages whose commands need what others leave come later; `pipeline run` is tested in test_pipeline.py."
    for guide in sorted(guides, key=lambda o: ['photos', 'services'].index(o) if o in ('photos', 'services') else 2):
        for kind, text in guides[guide]:
            if kind == 'sh' and not text.startswith('plant-mlops pipeline run'): sh(f'set -e\n{exports}\n{text}', own)
