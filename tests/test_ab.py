"Two models side by side: started, served, judged and stopped by the commands, on the real registry and a real server."
import json, subprocess
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import httpx, pytest
from helpers import cli, logged, serving, wait_for
from plant_mlops.core.config import settings
from plant_mlops.registry.model_file import linear_model
from plant_mlops.registry.registry import register
from plant_mlops.registry.release import promote
from plant_mlops.registry.tracking import experiment_id, mlflow_client

def command(s, *args):
    "Run `plant-mlops`; gives exit code, and what it said."
    r = subprocess.run([*cli, *args, '--home', str(s.home)], capture_output=True, text=True)
    return r.returncode, r.stdout + r.stderr

@pytest.fixture(scope='module')
def versions(tmp_path_factory):
    "A home with two versions of a model of two numbers: the first is in production and often wrong, the second is right."
    with pytest.MonkeyPatch.context() as m:
        m.setenv('PLANT_HOME', str(tmp_path_factory.mktemp('ab')/'home'))
        s = settings()
        with mlflow_client(s) as c: run = c.create_run(experiment_id(c, s)).info.run_id
        for weights in ([[.2, 0], [0, .8]], [[1, 0], [0, 1]], [[1, 0, 0], [0, 1, 0]]):
            file = s.home/'model.onnx'
            file.write_bytes(linear_model(weights, ['left', 'right', 'both'][:len(weights[0])]).SerializeToString())
            register(s, run, file)
        promote(s, 1, force=True)
        yield s

def test_from_start_to_verdict(versions):
    s = versions
    assert 'no challenger' in command(s, 'ab', 'status')[1]
    with serving(s, token='hush', workers=2, reload_every=.2) as (p, c):
        code, said = command(s, 'ab', 'start', '--challenger', '2', '--share', '0.5')
        assert code == 0 and 'Version 2 answers 50% of the requests' in said
        wait_for(lambda: {httpx.get(f'{c.base_url}/model/info').json()['challenger']['version'] for _ in range(8)} == {'2'})
        rows = np.random.default_rng(0).random((400, 2)).round(4).tolist()
        with ThreadPoolExecutor(8) as pool: got = list(pool.map(lambda x: c.post('/predict', json=dict(features=x)).json(), rows))
        key = {'Authorization': 'Bearer hush'}
        truth = ['left' if a > b else 'right' for a, b in rows]
        for o, label in zip(got, truth): assert c.post('/feedback', json=dict(id=o['id'], label=label), headers=key).status_code == 202
        wait_for(lambda: len(logged(s)) == 400)
        wait_for(lambda: (r := json.loads(command(s, 'ab', 'status', '--json')[1]))['champion']['judged'] + r['challenger']['judged'] == 400)
        r = json.loads(command(s, 'ab', 'status', '--json')[1])
        for variant in ('champion', 'challenger'):
            right = [o['prediction'] == label for o, label in zip(got, truth) if o['variant'] == variant]
            assert (r[variant]['answers'], r[variant]['right']) == (len(right), sum(right)) and 140 < len(right) < 260
        assert r['challenger']['right'] == r['challenger']['answers'] and r['low'] > 0 and r['verdict'].startswith('The challenger is better')
        assert 'The challenger is better' in command(s, 'ab', 'stop')[1]
        wait_for(lambda: {httpx.get(f'{c.base_url}/model/info').json()['challenger'] is None for _ in range(8)} == {True})
        assert {c.post('/predict', json=dict(features=x)).json()['variant'] for x in rows[:20]} == {'champion'}

@pytest.mark.parametrize('args,says', [(['--challenger', '1'], 'is the champion itself'), (['--challenger', '9'], 'There is no version 9'), (['--challenger', '3'], 'other classes'),
                                       (['--challenger', '2', '--share', '1.5'], 'between 0 and 1')])
def test_what_is_no_test_is_refused(versions, args, says):
    code, said = command(versions, 'ab', 'start', *args)
    assert code == 1 and says in said and 'Traceback' not in said

def test_nothing_to_compare_with(tmp_path):
    code, said = command(settings(home=tmp_path), 'ab', 'start')
    assert code == 1 and 'Nothing is in production' in said
