"The training recipe on real photos."
import base64, io
from collections import Counter
from pathlib import Path
import numpy as np, pytest
from helpers import input_samples
from plant_mlops.core.config import settings
from plant_mlops.core.store import open_store
from plant_mlops.data.dataset import load_dataset
from plant_mlops.data.photo import open_photo, to_pixels
from plant_mlops.registry.example_model import photo_bytes

PHOTOS = Path(__file__).resolve().parents[2]/'shared'/'photos'/'plants'
OTHER_PHOTOS = PHOTOS.parent/'neither' # of things that are neither class
pytestmark = pytest.mark.needs('photos')

def prepared_jpeg(file):
    photo, out = open_photo(file.read_bytes()), io.BytesIO()
    photo.save(out, 'JPEG', quality=95, subsampling=0)
    return out.getvalue()

@pytest.fixture(scope='module')
def photos():
    "Every fifth photo of each class, its label, and the names of the classes."
    files = sorted(PHOTOS.glob('*/*'))[::5]
    classes = sorted({file.parent.name for file in files})
    labels = np.array([classes.index(file.parent.name) for file in files])
    return [prepared_jpeg(file) for file in files], labels, classes

def recipe(**kw): return settings(arch='tf_efficientnet_lite0', pretrained=True, **kw)

def test_one_epoch_on_few_photos_is_accurate(photos):
    from plant_mlops.model.learner import fit_learner
    jpegs, labels, classes = photos
    idx = np.arange(len(labels))
    train_idx, valid_idx = idx[idx % 3 > 0], idx[idx % 3 == 0]
    s = recipe(image_size=192, epochs=1)
    trained = fit_learner(jpegs, labels, train_idx, valid_idx, classes, s, progress=False)
    most_common = Counter(labels[valid_idx]).most_common()[0][1]
    assert most_common < .7*len(valid_idx)
    assert (trained.valid_logits.argmax(1) == labels[valid_idx]).mean() >= .85

def test_the_exported_file_predicts_as_in_validation(photos, tmp_path):
    from plant_mlops.registry.model_file import run_model
    from plant_mlops.model.export import export_onnx
    from plant_mlops.model.learner import fit_learner
    jpegs, labels, classes = photos
    train_idx, valid_idx = np.arange(0, 60, 2), np.arange(1, 60, 6)
    s = recipe(image_size=128, epochs=0)
    trained = fit_learner(jpegs, labels, train_idx, valid_idx, classes, s, progress=False)
    pixels = np.stack([to_pixels(jpegs[i], 128) for i in valid_idx])
    probs = run_model(export_onnx(trained, tmp_path/'model.onnx'), pixels)['probabilities']
    assert (probs.argmax(1) == trained.valid_logits.argmax(1)).all()

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A home with a model in production that was trained on all of the photos, and what the stage `train` returned."
    from plant_mlops.data.prepare import prepare
    from plant_mlops.registry.release import promote
    from plant_mlops.photos import stages
    s = settings(home=tmp_path_factory.mktemp('recipe')/'home', epochs=0, image_size=224)
    stages.load_catalog(s, PHOTOS)
    for stage in (stages.ingest, prepare, stages.dataset): stage(s, progress=False)
    result = stages.train(s, progress=False)
    promote(s)
    return s, result

def raw_photos(s, *splits):
    "Photos of some splits of the dataset, as they were ingested."
    store, rows = open_store(s), load_dataset(s).manifest
    return [store.get(f'raw/{sha256}') for sha256 in rows.sha256[rows.split.isin(splits)]]

@pytest.mark.timeout(900)
def test_photos_of_other_things_are_novel(home):
    "They are distinguished from held-out plants, by a threshold that comes from validation photos alone."
    from sklearn.metrics import roc_auc_score
    from plant_mlops.serve.champion import load_champion
    s, _ = home
    model = load_champion(s)
    known = model.predict(raw_photos(s, 'valid', 'test'))
    other = model.predict([file.read_bytes() for file in sorted(OTHER_PHOTOS.iterdir())])
    is_other = [0]*len(known) + [1]*len(other)
    assert roc_auc_score(is_other, [answer['novelty'] for answer in known + other]) >= .98
    assert np.mean([answer['novel'] for answer in other]) > .9
    assert np.mean([answer['novel'] for answer in known]) < .2

def test_the_served_int8_file_predicts_as_fp32_does(home):
    "Of 300 photos, one prediction is different at most."
    from mlflow.artifacts import download_artifacts
    from plant_mlops.serve.champion import load_champion
    from plant_mlops.serve.onnx_model import Model
    s, result = home
    assert result['precision'] == 'int8', result['why']
    uri = f"runs:/{result['run']}/quantize/fp32.onnx"
    fp32 = Model(download_artifacts(artifact_uri=uri, dst_path=str(s.home), tracking_uri=s.tracking_uri))
    int8 = load_champion(s)
    assert int8.metadata['provenance']['precision'] == 'int8'
    files = [file.read_bytes() for file in sorted(PHOTOS.glob('*/*'))]
    def predict(model): return [model.predict([file])[0]['prediction'] for file in files]
    changed = sum(a != b for a, b in zip(predict(fp32), predict(int8)))
    assert changed <= len(files)/300

def test_other_plants_are_no_drift_and_other_things_are(home):
    "And so are plants in the dark."
    from PIL import ImageEnhance
    from plant_mlops.serve.champion import champion_pointer, load_champion
    from plant_mlops.monitor.drift import load_reference
    from plant_mlops.monitor.drift_score import samples_table, score_columns
    s, _ = home
    model = load_champion(s)
    def table(photos):
        samples = input_samples(model, photos)
        return samples_table([o | dict(embedding=base64.b64decode(o['embedding'])) for o in samples])
    def drifted(reference, recent):
        return {name for name, column in score_columns(reference, recent).items() if column['drifted']}
    valid, test = raw_photos(s, 'valid'), raw_photos(s, 'test')
    dark = [photo_bytes(ImageEnhance.Brightness(open_photo(photo)).enhance(.4)) for photo in test]
    other = [file.read_bytes() for file in sorted(OTHER_PHOTOS.iterdir())[:60]]
    reference = load_reference(s, champion_pointer(open_store(s), s.model))
    assert len(reference) == len(valid) + len(test)
    assert not drifted(table(valid), table(test))
    assert 'novelty' in drifted(reference, table(other))
    assert 'brightness' in drifted(reference, table(dark))
