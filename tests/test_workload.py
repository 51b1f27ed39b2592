"A workload joins without a line here that knows its name, and what is asked of its model is looked at."
import json
import numpy as np, pytest
from conftest import root
from fastapi.testclient import TestClient
from plant_mlops.core.config import settings
from plant_mlops.core.store import open_store
from plant_mlops.registry.model_file import linear_model
from plant_mlops.serve.api import create_app
from plant_mlops.serve.onnx_model import Model
from plant_mlops.stocks.features import FEATURES
from test_jobs import plant

code = [p for p in sorted((root/'plant_mlops').rglob('*.py')) if p.parent.name != 'stocks' and p.name != '_modidx.py']

@pytest.mark.parametrize('path', code, ids=lambda p: str(p.relative_to(root/'plant_mlops')))
def test_nothing_names_a_workload(path): assert 'stock' not in path.read_text().lower()

# -- a package that brings one

@pytest.fixture
def package(tmp_path, monkeypatch):
    "A function that installs a package with a workload: its code, and what the entry point names."
    def install(source, value='tea:workload'):
        about = tmp_path/'site/tea-1.0.dist-info'
        about.mkdir(parents=True)
        (about/'METADATA').write_text('Metadata-Version: 2.1\nName: tea\nVersion: 1.0\n')
        (about/'entry_points.txt').write_text(f'[plant_mlops.workloads]\ntea = {value}\n')
        (tmp_path/'site/tea.py').write_text(source)
        monkeypatch.setenv('PYTHONPATH', str(tmp_path/'site'))
    return install

tea = """from plant_mlops.core.workload import Job, Reader, Workload
workload = Workload('tea', 'Teas', Reader(None, None), jobs=(Job('tea-train', 'Train', 'tea_training', produces=('tea-model',), schedule='0 5 * * *', notebook='train'),))
"""

def test_an_installed_package_is_all_it_takes(package, tmp_path):
    package(tea)
    found = {o['job']: o for o in json.loads(plant('job', 'list', '--json', home=tmp_path/'home'))}
    assert (found['tea-train']['schedule'], found['tea-promote']['after']) == ('0 5 * * *', 'tea-model') and 'train' in found
    assert [o['job'] for o in json.loads(plant('job', 'list', '--json', home=tmp_path/'home', PLANT_MODEL='tea'))] == ['tea-train', 'tea-promote', 'tea-monitor']
    assert 'name: tea-train' in plant('job', 'cronjobs', home=None)

@pytest.mark.parametrize('source, says', [('raise ValueError("no tea")', 'of the package tea cannot be loaded: ValueError: no tea'), ('', "cannot be loaded: AttributeError"),
                                          ('workload = 5', 'is no `Workload`'), (tea.replace("'tea-train'", "'train'"), "'train' has to be called tea-…"), (tea.replace("'tea',", "'Tea!',"), 'small letters')])
def test_a_broken_package_is_named(package, source, says, tmp_path):
    package(source)
    assert says in plant('job', 'list', home=tmp_path/'home', ok=1)

def test_models_are_not_mixed_up(tmp_path):
    home = tmp_path/'home'
    assert 'train is about photos' in plant('job', 'run', 'train', home=home, ok=1, PLANT_MODEL='stocks')
    assert "no workload 'wine'. There are: photos, stocks" in plant('run', '--workload', 'wine', home=home, ok=1)
    assert 'are not for --workload stocks' in plant('run', '--workload', 'stocks', '--photos', '/x', home=home, ok=2)
    assert '-p is for --workload' in plant('run', '-p', 'days', '5', home=home, ok=2)
    assert "None of stocks-ingest" in plant('run', '--workload', 'stocks', '-p', 'dais', '5', home=home, ok=2)

def test_a_random_walk_comes_to_nothing_and_says_so(tmp_path):
    home = tmp_path/'home'
    said = plant('run', '--workload', 'stocks', '-p', 'signal', '0', '-p', 'kind', 'logistic', home=home, ok=4)
    assert 'Nothing is in production; version 1 was not promoted: no better than always answering the most common class' in said
    train = json.loads(plant('job', 'show', 'stocks-train', '--json', home=home))['outputs']
    assert train['verdict'].startswith('No better than chance') and all(.4 < train[k] < .6 for k in ('accuracy', 'majority', 'yesterday', 'reversal'))
    assert not open_store(settings(home=home)).stat('models/stocks/champion.json')

@pytest.mark.parametrize('given, says', [(('path', '/nowhere.csv'), 'cannot be read'), (('days', '30'), 'which the longest average needs'), (('signal', '2'), 'is no correlation'), (('days', 'many'), 'valid integer')])
def test_bad_days_are_refused_and_nothing_is_lost(given, says, tmp_path):
    assert says in plant('job', 'run', 'stocks-ingest', '-p', *given, home=tmp_path/'home', ok=2 if given[1] == 'many' else 1)
    assert not [*open_store(settings(home=tmp_path/'home')).list('stocks/')]

# -- what is asked of its model

@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    "A server for a model of 22 numbers."
    file = linear_model(np.ones((22, 2)), ['DOWN', 'UP'], version='1', targets=[0, 1], input=dict(kind='features', shape=[None, 22], names=FEATURES))
    with TestClient(create_app(settings(home=tmp_path_factory.mktemp('rows')), Model(file.SerializeToString()))) as client: yield client

good = [float(i) for i in range(22)]
def but(i, text): return '{"features": [' + ', '.join(text if k == i else str(v) for k, v in enumerate(good)) + ']}'

@pytest.mark.parametrize('body, says', [
    (json.dumps(dict(features=good[:21])), 'features: the model takes 22 features, got 21'), (json.dumps(dict(features=[*good, 1.])), 'got 23'), ('{"features": []}', 'got 0'),
    (but(7, 'NaN'), "features.RSI: 'nan'"), (but(7, 'Infinity'), 'features.RSI'), (but(0, '-Infinity'), 'features.SMA_5'), (but(21, '1e999'), 'features.Gap'), (but(21, '1e39'), 'features.Gap'),
    (but(3, '"1.5"'), "features.SMA_50: '1.5'"), (but(3, 'null'), 'features.SMA_50'), (but(3, 'true'), 'features.SMA_50'), (but(3, '[1]'), 'features.SMA_50'),
    ('{"features": "x"}', 'features: not a list'), ('{"feature": [1]}', 'features: not a list'), ('[1, 2', 'features: the body is not JSON')])
def test_a_bad_row_is_refused_by_name(rows, body, says):
    r = rows.post('/predict', content=body)
    assert r.status_code == 422 and says in r.json()['detail'], r.text

@pytest.mark.parametrize('body', ['{"features": [' + '1, '*1_000_000 + '1]}', '[' + '{},'*1_000_000 + '{}]'])
def test_a_row_without_end_is_not_read(rows, body):
    r = rows.post('/predict', content=body)
    assert r.status_code == 413 and 'features: send 22 numbers' in r.json()['detail']

@pytest.mark.parametrize('row, status', [('{}', 422), ('[]', 413), ('1', 413)])
def test_a_batch_of_anything_is_not_taken_apart(rows, row, status):
    r = rows.post('/predict/batch', content='{"features": [' + f'{row},'*1_000_000 + f'{row}]}}')
    assert r.status_code == status and 'features: ' in r.json()['detail']

def test_a_bad_batch_is_refused_by_name(rows):
    post = lambda features: rows.post('/predict/batch', json=dict(features=features))
    assert [(r.status_code, r.json()['detail'][:9]) for r in map(post, ([], 'x', None, {}))] == [(422, 'features:')]*4
    assert post([good]*10_000).status_code == 200
    r = post([good]*10_001)
    assert r.status_code == 413 and 'features: send 10,000 rows' in r.json()['detail']
    def million():
        yield b'{"features": ['
        for _ in range(1000): yield (json.dumps(good) + ',').encode()*1000
    r = rows.post('/predict/batch', content=million())
    assert r.status_code == 413 and 'features: send 10,000 rows' in r.json()['detail']
    r = post([good, good[:3], [*good[:7], 'x', *good[8:]]]).json()['results']
    assert [o.get('status') for o in r] == [None, 422, 422] and r[1]['error'].startswith('features.1: the model takes 22') and r[2]['error'].startswith("features.2.RSI: 'x'")

def test_an_answer_is_what_was_promised(rows):
    r = rows.post('/predict', json=dict(features=good)).json()
    assert {'prediction', 'prediction_label', 'probability', 'probabilities', 'model_version', 'timestamp'} <= {*r}
    assert (r['prediction'], r['prediction_label'], {*r['probabilities']}) == (0, 'DOWN', {'DOWN', 'UP'}) and r['probability'] == r['probabilities']['DOWN']
    assert rows.get('/model/info').json()['input']['names'] == FEATURES and rows.get('/predict/demo').status_code == 200
    assert 'prediction="DOWN"' in rows.get('/metrics').text
