"An A/B test of two models: started, served, compared and stopped by commands, with the real registry and a real server."
import json
from concurrent.futures import ThreadPoolExecutor
import httpx, numpy as np, pytest
from helpers import logged_rows, run_plant, serving, wait_for
from plant_mlops.core.config import settings
from plant_mlops.registry.model_file import linear_model
from plant_mlops.registry.tracking import experiment_id, mlflow_client
from plant_mlops.registry.registry import register
from plant_mlops.registry.release import promote

def ab(s, *args):
    "Run `plant-mlops ab`; returns the exit code and the output."
    result = run_plant('ab', *args, home=s.home)
    return result.returncode, result.stdout + result.stderr

# Weights of models of two numbers: often wrong, always right, and one of three classes.
OFTEN_WRONG = [[.2, 0], [0, .8]]
ALWAYS_RIGHT = [[1, 0], [0, 1]]
THREE_CLASSES = [[1, 0, 0], [0, 1, 0]]

@pytest.fixture(scope='module')
def s(tmp_path_factory):
    "A home with three versions, of which the first is in production."
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv('PLANT_HOME', str(tmp_path_factory.mktemp('ab')/'home'))
        s = settings()
        with mlflow_client(s) as client: run = client.create_run(experiment_id(client, s)).info.run_id
        for weights in (OFTEN_WRONG, ALWAYS_RIGHT, THREE_CLASSES):
            classes = ['left', 'right', 'both'][:len(weights[0])]
            file = s.home/'model.onnx'
            file.write_bytes(linear_model(weights, classes).SerializeToString())
            register(s, run, file)
        promote(s, 1, force=True)
        yield s

def test_a_trial_compares_the_answers_of_both_models_with_the_feedback(s):
    assert 'no challenger' in ab(s, 'status')[1]
    with serving(s, token='hush', workers=2, reload_every=.2) as (_, client):
        def predict(features): return client.post('/predict', json=dict(features=features)).json()
        def challengers():
            "Those that the workers serve, each asked over a new connection."
            return [httpx.get(f'{client.base_url}/model/info').json()['challenger'] for _ in range(8)]
        def status(): return json.loads(ab(s, 'status', '--json')[1])
        code, output = ab(s, 'start', '--challenger', '2', '--share', '0.5')
        assert code == 0
        assert 'Version 2 answers 50% of the requests' in output
        wait_for(lambda: {challenger['version'] for challenger in challengers()} == {'2'})

        rows = np.random.default_rng(0).random((400, 2)).round(4).tolist()
        labels = ['left' if a > b else 'right' for a, b in rows]
        with ThreadPoolExecutor(8) as pool: answers = list(pool.map(predict, rows))
        for answer, label in zip(answers, labels):
            feedback = dict(id=answer['id'], label=label)
            response = client.post('/feedback', json=feedback, headers={'Authorization': 'Bearer hush'})
            assert response.status_code == 202
        wait_for(lambda: len(logged_rows(s)) == 400)
        def judged():
            result = status()
            return result['champion']['judged'] + result['challenger']['judged']
        wait_for(lambda: judged() == 400)

        result = status()
        for variant in ('champion', 'challenger'):
            correct = [answer['prediction'] == label for answer, label in zip(answers, labels)
                       if answer['variant'] == variant]
            assert result[variant]['answers'] == len(correct)
            assert result[variant]['right'] == sum(correct)
            assert 140 < len(correct) < 260
        assert result['challenger']['right'] == result['challenger']['answers']
        assert result['low'] > 0
        assert result['verdict'].startswith('The challenger is better')
        assert 'The challenger is better' in ab(s, 'stop')[1]
        wait_for(lambda: challengers() == [None]*8)
        assert {predict(features)['variant'] for features in rows[:20]} == {'champion'}

@pytest.mark.parametrize('args,reason', [
    (['--challenger', '1'], 'is the champion itself'),
    (['--challenger', '9'], 'no version 9'),
    (['--challenger', '3'], 'other classes'),
    (['--challenger', '2', '--share', '1.5'], 'between 0 and 1')])
def test_a_trial_that_makes_no_sense_is_refused_with_the_reason(s, args, reason):
    code, output = ab(s, 'start', *args)
    assert code == 1
    assert reason in output
    assert 'Traceback' not in output

def test_a_trial_needs_a_model_in_production(tmp_path):
    code, output = ab(settings(home=tmp_path), 'start')
    assert code == 1
    assert 'Nothing is in production' in output
