"The int8 file from training to serving: taken where it answers as well, refused where it does not, and never the end of a training."
import copy, dataclasses, json, logging, tempfile
from pathlib import Path
import numpy as np, pytest, torch
from plant_mlops.core.config import settings
from plant_mlops.data.dataset import build_dataset
from plant_mlops.core.store import open_store
from plant_mlops.registry import registry
from plant_mlops.registry.model_file import read_metadata
from plant_mlops.registry.tracking import experiment_id, mlflow_client
from plant_mlops.photos import stages
from plant_mlops.serve.onnx_model import load_champion

pytestmark = pytest.mark.timeout(900)

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A home with a dataset of drawn photos, and a network trained on it a little."
    from plant_mlops.model.train import train
    s = settings(home=tmp_path_factory.mktemp('quantize')/'home', image_size=128, epochs=0)
    stages.fill(s, synthetic=240)
    for stage in (stages.ingest, stages.prepare): stage(s, progress=False)
    build_dataset(s, progress=False)
    return s, train(s, progress=False)

def train_again(monkeypatch, s, network):
    "The stage `train`, with a network that is trained already."
    with mlflow_client(s) as c: run = c.create_run(experiment_id(c, s)).info.run_id
    monkeypatch.setattr('plant_mlops.model.train.train', lambda s, dataset, progress: dataclasses.replace(network, run_id=run))
    return stages.train(s, progress=False)

def kept(s, run):
    "Names of what is kept of the comparison, the comparison, and the run's tags and metrics."
    with mlflow_client(s) as c:
        names, data = {Path(o.path).name for o in c.list_artifacts(run, 'quantize')}, c.get_run(run).data
        with tempfile.TemporaryDirectory() as d: return names, json.loads(Path(c.download_artifacts(run, 'quantize/comparison.json', d)).read_text()), data.tags, data.metrics

def precision(data): return read_metadata(data)['provenance'].get('precision', 'fp32')

def spoilt(network):
    "The same answers from a network with outliers: one channel before the last convolution is a thousandth of what it was, and its weights are a thousand times as large."
    t = copy.deepcopy(network)
    norm, last = t.net[0].net.blocks[-1][0].bn3, t.net[0].net.conv_head
    with torch.no_grad():
        for o in (norm.weight, norm.bias): o[:40] /= 1000
        last.weight[:, :40] *= 1000
    return t

def test_the_chosen_file_is_judged_promoted_and_served(trained, monkeypatch, capfd):
    s, network = trained
    log = list(logging.root.handlers), logging.root.manager.disable
    t = train_again(monkeypatch, s, network)
    assert capfd.readouterr() == ('', '') and (list(logging.root.handlers), logging.root.manager.disable) == log
    names, r, tags, metrics = kept(s, t['run'])
    assert (t['precision'], names) == ('int8', {'comparison.json', 'fp32.onnx'}), t['why']
    assert tags['precision'] == r['precision'] == 'int8' and metrics['quantize_n'] == r['n'] >= 30 and r['int8_mb'] < r['fp32_mb']/2
    data = registry.model_bytes(s, t['version'])
    assert precision(data) == 'int8'
    said = registry.predictions(s, t['version'])
    x, _ = registry.examples(s, data, 'test', 1000)
    figures = stages.evaluate(s, t['version'])
    assert figures['n'] == len(x) == len(said['ids']) and stages.promote(s, t['version'])['promoted']
    model = load_champion(s)
    assert model.metadata['provenance']['precision'] == 'int8' and model.version == t['version']
    raw = [open_store(s).get(f'raw/{i}') for i in said['ids']]
    assert np.allclose([list(o['probabilities'].values()) for o in model.predict(raw)], said['probabilities'], atol=1e-5)

def test_a_network_that_rounding_spoils_stays_as_it_is(trained, monkeypatch):
    s, network = trained
    t = train_again(monkeypatch, s, spoilt(network))
    names, r, tags, _ = kept(s, t['run'])
    assert (t['precision'], names) == ('fp32', {'comparison.json', 'int8.onnx'})
    assert r['fp32_accuracy'] > r['int8_accuracy'] + .1 and r['reason'] == t['why'] == tags['precision_reason'] and 'worse' in t['why']
    assert precision(registry.model_bytes(s, t['version'])) == 'fp32' and stages.evaluate(s, t['version'])['n']

def fails(*a, **kw): raise MemoryError('not enough')

@pytest.mark.parametrize('how', ['quantizer', 'photos'])
def test_training_goes_on_without_int8(trained, monkeypatch, how, capfd):
    s, network = trained
    if how == 'quantizer': monkeypatch.setattr('onnxruntime.quantization.quantize_static', fails)
    if how == 'photos': s = s.model_copy(update=dict(photo_max_pixels=100)) # every photo has more
    t = train_again(monkeypatch, s, network)
    names, r, _, _ = kept(s, t['run'])
    assert (t['precision'], names, precision(registry.model_bytes(s, t['version']))) == ('fp32', {'comparison.json'}, 'fp32')
    assert dict(quantizer='not enough', photos='pixels')[how] in r['reason'] == t['why']
    assert capfd.readouterr().err == ''
