"The int8 file from training to serving: used where it is as good, rejected where not, and never the end of a training."
import copy, dataclasses, json, logging, tempfile
from pathlib import Path
import numpy as np, pytest, torch
from plant_mlops.core.config import settings
from plant_mlops.core.store import open_store
from plant_mlops.data.dataset import build_dataset
from plant_mlops.data.prepare import prepare
from plant_mlops.registry.evaluate import evaluate, examples, predict_test_split
from plant_mlops.registry.model_file import read_metadata
from plant_mlops.registry.registry import model_bytes
from plant_mlops.registry.release import promote
from plant_mlops.registry.tracking import experiment_id, mlflow_client
from plant_mlops.serve.champion import load_champion
from plant_mlops.photos import stages

pytestmark = pytest.mark.timeout(900)

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A home with a dataset of synthetic photos, and a network with a linear probe on it."
    from plant_mlops.model.train import train
    s = settings(home=tmp_path_factory.mktemp('quantize')/'home', image_size=128, epochs=0)
    stages.load_catalog(s, synthetic=240)
    stages.ingest(s, progress=False)
    prepare(s, progress=False)
    build_dataset(s, progress=False)
    return s, train(s, progress=False)

def train_again(monkeypatch, s, network):
    "The stage `train`, with a network that is trained already."
    with mlflow_client(s) as client: run_id = client.create_run(experiment_id(client, s)).info.run_id
    def trained_already(s, dataset, progress): return dataclasses.replace(network, run_id=run_id)
    monkeypatch.setattr('plant_mlops.model.train.train', trained_already)
    return stages.train(s, progress=False)

def logged(s, run_id):
    "Names of the logged files, the comparison, and the run's tags and metrics."
    with mlflow_client(s) as client, tempfile.TemporaryDirectory() as folder:
        names = {Path(file.path).name for file in client.list_artifacts(run_id, 'quantize')}
        path = Path(client.download_artifacts(run_id, 'quantize/comparison.json', folder))
        data = client.get_run(run_id).data
        return names, json.loads(path.read_text()), data.tags, data.metrics

def precision_of(model): return read_metadata(model)['provenance'].get('precision', 'fp32')

def with_outliers(network):
    """The same predictions from weights that rounding spoils: channels before the last convolution are a thousandth
    of what they were, and their weights a thousand times as large."""
    spoilt = copy.deepcopy(network)
    norm, last = spoilt.net[0].net.blocks[-1][0].bn3, spoilt.net[0].net.conv_head
    with torch.no_grad():
        norm.weight[:40] /= 1000
        norm.bias[:40] /= 1000
        last.weight[:, :40] *= 1000
    return spoilt

def test_int8_is_chosen_evaluated_promoted_and_served(trained, monkeypatch, capfd):
    s, network = trained
    logging_before = list(logging.root.handlers), logging.root.manager.disable
    result = train_again(monkeypatch, s, network)
    assert capfd.readouterr() == ('', '')
    assert (list(logging.root.handlers), logging.root.manager.disable) == logging_before

    names, comparison, tags, metrics = logged(s, result['run'])
    assert (result['precision'], names) == ('int8', {'comparison.json', 'fp32.onnx'}), result['why']
    assert tags['precision'] == comparison['precision'] == 'int8'
    assert metrics['quantize_n'] == comparison['n'] >= 30
    assert comparison['int8_mb'] < comparison['fp32_mb']/2

    model = model_bytes(s, result['version'])
    assert precision_of(model) == 'int8'
    predicted = predict_test_split(s, result['version'])
    x, _ = examples(s, model, 'test', 1000)
    assert evaluate(s, result['version'])['n'] == len(x) == len(predicted.ids)
    assert promote(s, result['version'])['promoted']

    served = load_champion(s)
    assert served.metadata['provenance']['precision'] == 'int8' and served.version == result['version']
    photos = [open_store(s).get(f'raw/{i}') for i in predicted.ids]
    answers = [list(answer['probabilities'].values()) for answer in served.predict(photos)]
    assert np.allclose(answers, predicted.probabilities, atol=1e-5)

def test_a_network_that_is_inaccurate_in_int8_stays_in_fp32(trained, monkeypatch):
    s, network = trained
    result = train_again(monkeypatch, s, with_outliers(network))
    names, comparison, tags, _ = logged(s, result['run'])
    assert (result['precision'], names) == ('fp32', {'comparison.json', 'int8.onnx'})
    assert comparison['fp32_accuracy'] > comparison['int8_accuracy'] + .1
    assert comparison['reason'] == result['why'] == tags['precision_reason'] and 'worse' in result['why']
    assert precision_of(model_bytes(s, result['version'])) == 'fp32'
    assert evaluate(s, result['version'])['n']

def out_of_memory(*args, **kw): raise MemoryError('not enough')

@pytest.mark.parametrize('what, message', [('quantizer', 'not enough'), ('photos', 'pixels')])
def test_training_succeeds_without_int8(trained, monkeypatch, capfd, what, message):
    s, network = trained
    if what == 'quantizer': monkeypatch.setattr('onnxruntime.quantization.quantize_static', out_of_memory)
    if what == 'photos': s = s.model_copy(update=dict(photo_max_pixels=100)) # every photo has more
    result = train_again(monkeypatch, s, network)
    names, comparison, _, _ = logged(s, result['run'])
    assert (result['precision'], names) == ('fp32', {'comparison.json'})
    assert precision_of(model_bytes(s, result['version'])) == 'fp32'
    assert message in comparison['reason'] == result['why']
    assert capfd.readouterr().err == ''
