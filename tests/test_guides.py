"What the guides say: their commands are executed, in order, in a fresh copy of the project; those that need more say what."
import re
import pytest
from conftest import fences, root
from test_readme import clone, sh

pytestmark = pytest.mark.timeout(900)
guides = {f.stem: fences(f) for f in sorted((root/'nbs/guides').glob('*.ipynb'))}
quick = 'export PLANT_EPOCHS=0 PLANT_IMAGE_SIZE=96 PLANT_BATCH_SIZE=8 PLANT_PRECISION=fp32\n'

@pytest.mark.parametrize('guide', guides)
def test_what_is_not_executed_says_what_it_needs(guide):
    for kind, text in guides[guide]:
        assert kind in ('sh', 'text', 'python') or re.fullmatch(r'\{\.\w+ filename="[^"]+"\}', kind), f'{kind}: {text}'
        assert kind != 'text' or not re.search(r'^(plant-mlops|docker|kubectl|make|pip) ', text, re.M), f'a command that is not marked: {text}'
        if kind == 'python': compile(text, guide, 'exec')

@pytest.fixture(scope='module')
def own(clone):
    "Photos of somebody's own, in three classes."
    from plant_mlops.data.synthetic import LABELS, draw
    for k, label in enumerate(('fern', 'ivy', 'moss')):
        (clone/'my-photos'/label).mkdir(parents=True, exist_ok=True)
        for i in range(20): draw(LABELS[k % 2], seed=100*k + i).save(clone/'my-photos'/label/f'{i}.jpg')
    return clone

def test_commands(own):
    "Pages whose commands need what others leave come later; what `pipeline run` leaves, test_pipeline.py judges."
    for guide in sorted(guides, key=lambda o: ['photos', 'services'].index(o) if o in ('photos', 'services') else 2):
        for kind, text in guides[guide]:
            if kind == 'sh' and not text.startswith('plant-mlops pipeline run'): sh(f'set -e\n{quick}{text}', own)
