"Interrupted trainings."
import numpy as np, pytest
from helpers import draw_photos, quick_settings

EPOCHS = 3

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "JPEGs and labels of drawn photos."
    files = sorted(draw_photos(tmp_path_factory.mktemp('photos'), 16).glob('*/*'))
    return [file.read_bytes() for file in files], np.array([file.parent.name == 'grass' for file in files], int)

def fit(photos, file, **kw):
    "Train on drawn photos; returns the trained network."
    from plant_mlops.model.learner import fit_learner
    jpegs, labels = photos
    idx = np.arange(len(labels))
    s = quick_settings().model_copy(update=dict(epochs=EPOCHS) | kw)
    return fit_learner(jpegs, labels, idx[idx % 4 > 0], idx[idx % 4 == 0], ['dandelion', 'grass'], s,
                       progress=False, checkpoint_file=file)

class Killed(BaseException): "In place of a signal that kills the process."

@pytest.mark.parametrize('n_finished', [1, 2])
def test_a_training_that_is_killed_goes_on_from_its_last_epoch_with_the_same_result(
        n_finished, photos, tmp_path, monkeypatch):
    from plant_mlops.model import checkpoint, learner
    expected = fit(photos, None)
    file = tmp_path/'training.pt'

    save, n_saved = checkpoint.save_checkpoint, 0
    def save_then_die(*args):
        nonlocal n_saved
        save(*args)
        n_saved += 1
        if n_saved == n_finished: raise Killed
    monkeypatch.setattr(checkpoint, 'save_checkpoint', save_then_die)
    with pytest.raises(Killed): fit(photos, file)
    monkeypatch.undo()

    def no_probe(*args): raise AssertionError('the probe is fitted again')
    monkeypatch.setattr(learner, 'fit_linear_probe', no_probe)
    resumed = fit(photos, file)
    assert resumed.resumed_after == n_finished
    assert np.allclose(resumed.valid_logits, expected.valid_logits, atol=1e-5)
    assert resumed.probe == expected.probe
    assert [row['epoch'] for row in resumed.history] == [1, 2, 3]
    for name in ('valid_loss', 'accuracy'):
        assert np.allclose([row[name] for row in resumed.history], [row[name] for row in expected.history], atol=1e-5)

def test_a_damaged_checkpoint_is_ignored(photos, tmp_path):
    file = tmp_path/'training.pt'
    file.write_bytes(b'rubbish')
    assert fit(photos, file, epochs=1).resumed_after == 0

def test_a_killed_train_command_goes_on_and_leaves_one_record(tmp_path):
    import json
    from helpers import plant, start_plant, wait_for
    home = tmp_path/'home'
    plant('run', '--synthetic', 60, home=home, ok=0)
    process = start_plant('train', home=home, PLANT_EPOCHS='4', PLANT_SEED='7')
    wait_for(lambda: [*home.glob('cache/training/*.pt')], 120, 'the first epoch', every=.02)
    process.kill()
    process.wait()
    result = json.loads(plant('train', '--json', home=home, PLANT_EPOCHS='4', PLANT_SEED='7'))
    assert result['version'] == '2'
    assert not [*home.glob('cache/training/*')]
    from plant_mlops.core.config import settings
    from plant_mlops.registry.tracking import mlflow_client
    with mlflow_client(settings(home=home)) as client:
        assert client.get_run(result['run']).data.tags['resumed_after_epoch'] in '123'
        assert len(client.search_model_versions("name = 'plants'")) == 2
