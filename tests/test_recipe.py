"The training recipe on real photos."
import base64, io
from collections import Counter
from pathlib import Path
import numpy as np, pytest
from plant_mlops.core.config import settings
from plant_mlops.data.dataset import load_dataset
from plant_mlops.data.photo import open_photo
from plant_mlops.core.store import open_store
import tiny
from test_drift import see

PHOTOS = Path(__file__).resolve().parents[2]/'shared'/'photos'/'plants'
pytestmark = pytest.mark.skipif(not PHOTOS.is_dir(), reason=f'the real photos are not at {PHOTOS}')

def jpeg(file):
    out = io.BytesIO(); open_photo(file.read_bytes()).save(out, 'JPEG', quality=95, subsampling=0); return out.getvalue()

@pytest.fixture(scope='module')
def photos():
    "Every fifth photo of each class, prepared."
    files = sorted(PHOTOS.glob('*/*'))[::5]
    classes = sorted({o.parent.name for o in files})
    return [jpeg(o) for o in files], np.array([classes.index(o.parent.name) for o in files]), classes

def test_a_quick_training_is_already_good(photos):
    from plant_mlops.model.train import fit_learner
    jpegs, y, classes = photos
    idx = np.arange(len(y)); held = idx[idx % 3 == 0]
    t = fit_learner(jpegs, y, idx[idx % 3 > 0], held, classes, settings(image_size=192, epochs=1, arch='tf_efficientnet_lite0', pretrained=True), progress=False)
    assert Counter(y[held]).most_common()[0][1] < .7*len(held)
    assert (t.valid_logits.argmax(1) == y[held]).mean() >= .85

def test_what_is_evaluated_is_what_is_served(photos, tmp_path):
    from plant_mlops.data.photo import to_pixels
    from plant_mlops.model.export import export_onnx
    from plant_mlops.registry.model_file import run_model
    from plant_mlops.model.train import fit_learner
    jpegs, y, classes = photos
    t = fit_learner(jpegs, y, np.arange(0, 60, 2), np.arange(1, 60, 6), classes, settings(image_size=128, epochs=0, arch='tf_efficientnet_lite0', pretrained=True), progress=False)
    served = run_model(export_onnx(t, tmp_path/'model.onnx'), np.stack([to_pixels(jpegs[i], 128) for i in range(1, 60, 6)]))['probabilities']
    assert (served.argmax(1) == t.valid_logits.argmax(1)).all()

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A home with a model in production that was trained on all of the photos, and what training said of it."
    from plant_mlops.photos import stages
    s = settings(home=tmp_path_factory.mktemp('recipe')/'home', epochs=0)
    stages.fill(s, PHOTOS)
    for stage in (stages.ingest, stages.prepare, stages.dataset): stage(s, progress=False)
    t = stages.train(s, progress=False)
    stages.promote(s)
    return s, t

@pytest.mark.timeout(900)
def test_neither_is_an_answer(home):
    "Photos of other things are told from plants that were held out; the threshold comes from validation photos alone."
    from sklearn.metrics import roc_auc_score
    from plant_mlops.serve.onnx_model import load_champion
    s, _ = home
    model, m = load_champion(s), load_dataset(s).manifest
    held = [open_store(s).get(f'raw/{h}') for h in m.sha256[m.split.isin(['valid', 'test'])]]
    other = [f.read_bytes() for f in sorted((PHOTOS.parent/'neither').iterdir())]
    known, strange = (model.predict(o) for o in (held, other))
    assert roc_auc_score([0]*len(known) + [1]*len(strange), [o['novelty'] for o in known + strange]) >= .98
    assert np.mean([o['novel'] for o in strange]) > .9 and np.mean([o['novel'] for o in known]) < .2

def test_what_serves_answers_as_fp32_does(home):
    "The int8 file is the one in production, and of 300 photos it answers one otherwise at most."
    from mlflow.artifacts import download_artifacts
    from plant_mlops.serve.onnx_model import Model, load_champion
    s, t = home
    assert t['precision'] == 'int8', t['why']
    fp32 = Model(download_artifacts(artifact_uri=f"runs:/{t['run']}/quantize/fp32.onnx", dst_path=str(s.home), tracking_uri=s.tracking_uri))
    int8, files = load_champion(s), [f.read_bytes() for f in sorted(PHOTOS.glob('*/*'))]
    assert int8.metadata['provenance']['precision'] == 'int8'
    a, b = ([m.predict([f])[0]['prediction'] for f in files] for m in (fp32, int8))
    assert sum(x != y for x, y in zip(a, b)) <= len(files)/300

def test_other_plants_are_no_drift_and_other_things_are(home):
    "And so are plants in the dark."
    from PIL import ImageEnhance
    from plant_mlops.monitor.drift import judge, reference_of, table_of
    from plant_mlops.serve.onnx_model import champion_pointer, load_champion
    s, _ = home
    model, m, store = load_champion(s), load_dataset(s).manifest, open_store(s)
    table = lambda raw: table_of([o | dict(embedding=base64.b64decode(o['embedding'])) for o in see(model, raw)])
    valid, test = ([store.get(f'raw/{h}') for h in m.sha256[m.split == o]] for o in ('valid', 'test'))
    reference, dark = reference_of(s, champion_pointer(store, s.model)), [tiny.jpeg(ImageEnhance.Brightness(open_photo(o)).enhance(.4)) for o in test]
    assert len(reference) == len(valid) + len(test)
    drifted = lambda a, b: {k for k, v in judge(a, b)[0].items() if v['drifted']}
    assert not drifted(table(valid), table(test))
    assert 'novelty' in drifted(reference, table([f.read_bytes() for f in sorted((PHOTOS.parent/'neither').iterdir())[:60]]))
    assert 'brightness' in drifted(reference, table(dark))
