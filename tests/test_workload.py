"A workload is installed without a change of the platform, and requests to its model are checked."
import ast, json, sys
from types import ModuleType
import numpy as np, pytest
from fastapi.testclient import TestClient
from helpers import plant, plant_messages, root
from plant_mlops.core.config import settings
from plant_mlops.core.store import open_store
from plant_mlops.core.workload import workloads
from plant_mlops.jobs.table import chain_for, job_table
from plant_mlops.registry.model_file import linear_model
from plant_mlops.serve.api import create_app
from plant_mlops.serve.onnx_model import Model
from plant_mlops.stocks.features import FEATURES

platform = ('core', 'registry', 'serve', 'batch', 'jobs', 'monitor', 'targets', 'apps')
modules = [p for room in platform for p in sorted((root/'plant_mlops'/room).glob('*.py'))]

def imported_packages(tree):
    "The packages of this project that a module imports."
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom): continue
        names, module = [alias.name for alias in node.names], node.module or ''
        if node.level == 2: yield from [module.split('.')[0]] if module else names
        elif module.startswith('plant_mlops.'): yield module.split('.')[1]
        elif module == 'plant_mlops': yield from names

def compared_texts(tree):
    "Texts that a module compares something with."
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare): continue
        operands = [node.left, *node.comparators]
        yield from (operand.value for operand in operands if isinstance(operand, ast.Constant))

@pytest.mark.parametrize('path', modules, ids=lambda p: f'{p.parent.name}/{p.stem}')
def test_no_module_of_the_platform_names_a_workload(path):
    tree, names = ast.parse(path.read_text()), {*workloads()}
    if path.parent.name != 'apps': assert not names & {*imported_packages(tree)} # the dashboard shows photos
    assert not names & {*compared_texts(tree)}

# -- a package that brings one

@pytest.fixture
def install(tmp_path, monkeypatch):
    "A function that installs a package with a workload, from its code."
    def install(source, value='tea:workload'):
        info = tmp_path/'site/tea-1.0.dist-info'
        info.mkdir(parents=True)
        (info/'METADATA').write_text('Metadata-Version: 2.1\nName: tea\nVersion: 1.0\n')
        (info/'entry_points.txt').write_text(f'[plant_mlops.workloads]\ntea = {value}\n')
        (tmp_path/'site/tea.py').write_text(source)
        monkeypatch.setenv('PYTHONPATH', str(tmp_path/'site'))
    return install

tea = """from plant_mlops.core.workload import Job, Reader, Workload
train = Job('tea-train', 'Train', 'tea_training', produces=('tea-model',), schedule='0 5 * * *')
workload = Workload('tea', 'Teas', Reader(None, None), jobs=(train,))
"""

def list_jobs(tmp_path, **env):
    "The job table, by name."
    return {row['job']: row for row in json.loads(plant('job', 'list', '--json', home=tmp_path/'home', **env))}

def test_an_installed_package_adds_its_workload(install, tmp_path):
    install(tea)
    jobs = list_jobs(tmp_path)
    assert jobs['tea-train']['schedule'] == '0 5 * * *'
    assert jobs['tea-promote']['after'] == 'tea-model'
    assert 'train' in jobs, 'photos are still there'
    assert [*list_jobs(tmp_path, PLANT_MODEL='tea')] == ['tea-train', 'tea-promote', 'tea-monitor']
    assert 'name: tea-train' in plant('job', 'cronjobs', home=None)

def test_settings_in_code_decide_about_the_job_table(monkeypatch):
    chai = ModuleType('chai')
    exec(tea.replace('tea', 'chai'), vars(chai))
    monkeypatch.setitem(sys.modules, 'chai', chai)
    with_chai, without = settings(workloads='chai:workload'), settings()
    assert 'chai-promote' in job_table(with_chai).jobs and 'chai-promote' not in job_table(without).jobs
    chain = chain_for(settings(workloads='chai:workload', model='chai'))
    assert [job.name for job in chain] == ['chai-train', 'chai-promote']

@pytest.mark.parametrize('source, message', [
    ('raise ValueError("no tea")', 'of the package tea cannot be loaded: ValueError: no tea'),
    ('', 'cannot be loaded: AttributeError'),
    ('workload = 5', 'is not a `Workload`'),
    (tea.replace("'tea-train'", "'train'"), "'train' has to be called tea-…"),
    (tea.replace("'tea',", "'Tea!',"), 'lowercase'),
    (tea.replace('jobs=(train,)', 'default=True'), 'Several workloads are the default')])
def test_the_error_of_a_broken_package_names_it(install, source, message, tmp_path):
    install(source)
    assert message in plant_messages('job', 'list', home=tmp_path/'home', ok=1)

@pytest.mark.parametrize('args, env, code, message', [
    ('job run train', dict(PLANT_MODEL='stocks'), 1, 'train belongs to photos'),
    ('run --workload wine', {}, 1, "no workload 'wine'"),
    ('run --workload stocks --photos /x', {}, 2, '--workload stocks'),
    ('run -p days 5', {}, 2, '--workload'),
    ('run --workload stocks -p dais 5', {}, 2, 'None of stocks-ingest')])
def test_jobs_workloads_and_options_that_do_not_match_are_refused(tmp_path, args, env, code, message):
    assert message in plant_messages(*args.split(), home=tmp_path/'home', ok=code, **env)

@pytest.mark.slow
def test_a_random_walk_is_not_promoted(tmp_path):
    home = tmp_path/'home'
    args = ['run', '--workload', 'stocks', '-p', 'signal', '0', '-p', 'kind', 'logistic']
    message = plant_messages(*args, home=home, ok=4)
    assert 'Nothing is in production; version 1 was not promoted' in message and 'majority class' in message
    outputs = json.loads(plant('job', 'show', 'stocks-train', '--json', home=home))['outputs']
    assert outputs['verdict'].startswith('No better than chance')
    for k in ('accuracy', 'majority', 'yesterday', 'reversal'): assert .4 < outputs[k] < .6, k
    assert not open_store(settings(home=home)).stat('models/stocks/champion.json')

@pytest.mark.slow
@pytest.mark.parametrize('name, value, code, message', [
    ('path', '/nowhere.csv', 1, 'cannot be read'),
    ('days', '30', 1, 'longest average'),
    ('signal', '2', 1, 'correlation'),
    ('days', 'many', 2, 'valid integer')])
def test_wrong_parameters_of_an_ingestion_are_refused_and_keep_the_data(name, value, code, message, tmp_path):
    assert message in plant_messages('job', 'run', 'stocks-ingest', '-p', name, value, home=tmp_path/'home', ok=code)
    assert not [*open_store(settings(home=tmp_path/'home')).list('stocks/')]

# -- Requests to a model of numbers

@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    "A client of a server for a model of 22 numbers."
    spec = dict(kind='features', shape=[None, 22], names=FEATURES)
    file = linear_model(np.ones((22, 2)), ['DOWN', 'UP'], version='1', targets=[0, 1], input=spec)
    app = create_app(settings(home=tmp_path_factory.mktemp('rows')), Model(file.SerializeToString()))
    with TestClient(app) as client: yield client

row = [float(i) for i in range(22)]

def body_of(numbers) -> str: return json.dumps(dict(features=numbers))

def with_text(i, text) -> str:
    "The row as JSON, with a text in place of one of its numbers."
    numbers = [text if k == i else str(v) for k, v in enumerate(row)]
    return f'{{"features": [{", ".join(numbers)}]}}'

@pytest.mark.parametrize('body, message', [
    (body_of(row[:21]), 'features: the model takes 22 features, got 21'),
    (body_of([*row, 1.]), 'got 23'),
    ('{"features": []}', 'got 0'),
    (with_text(7, 'NaN'), "features.RSI: 'nan'"),
    (with_text(7, 'Infinity'), 'features.RSI'),
    (with_text(0, '-Infinity'), 'features.SMA_5'),
    (with_text(21, '1e999'), 'features.Gap'),
    (with_text(21, '1e39'), 'features.Gap'),
    (with_text(3, '"1.5"'), "features.SMA_50: '1.5'"),
    (with_text(3, 'null'), 'features.SMA_50'),
    (with_text(3, 'true'), 'features.SMA_50'),
    (with_text(3, '[1]'), 'features.SMA_50'),
    ('{"features": "x"}', 'features: not a list'),
    ('{"feature": [1]}', 'features: not a list'),
    ('[1, 2', 'features: the body is not JSON')])
def test_a_bad_row_is_refused_with_the_name_of_its_feature(rows, body, message):
    r = rows.post('/predict', content=body)
    assert r.status_code == 422 and message in r.json()['detail'], r.text

@pytest.mark.parametrize('body', ['{"features": [' + '1, '*1_000_000 + '1]}', '[' + '{},'*1_000_000 + '{}]'])
def test_a_row_that_is_too_large_is_refused(rows, body):
    r = rows.post('/predict', content=body)
    assert r.status_code == 413 and 'features: send 22 numbers' in r.json()['detail']

@pytest.mark.parametrize('item, status', [('{}', 422), ('[]', 413), ('1', 413)])
def test_a_batch_of_a_million_items_is_refused(rows, item, status):
    r = rows.post('/predict/batch', content='{"features": [' + f'{item},'*1_000_000 + f'{item}]}}')
    assert r.status_code == status and 'features: ' in r.json()['detail']

@pytest.mark.parametrize('features', [[], 'x', None, {}])
def test_a_batch_without_rows_is_refused(rows, features):
    r = rows.post('/predict/batch', content=body_of(features))
    assert r.status_code == 422 and r.json()['detail'].startswith('features:')

def million_rows():
    yield b'{"features": ['
    for _ in range(1000): yield (json.dumps(row) + ',').encode()*1000

def test_a_batch_has_at_most_ten_thousand_rows(rows):
    assert rows.post('/predict/batch', content=body_of([row]*10_000)).status_code == 200
    for body in (body_of([row]*10_001), million_rows()):
        r = rows.post('/predict/batch', content=body)
        assert r.status_code == 413 and 'features: send 10,000 rows' in r.json()['detail']

def test_a_bad_row_of_a_batch_fails_alone(rows):
    not_a_number = [*row[:7], 'x', *row[8:]]
    answer, short, text = rows.post('/predict/batch', content=body_of([row, row[:3], not_a_number])).json()['results']
    assert answer['prediction'] == 0 and (short['status'], text['status']) == (422, 422)
    assert short['error'].startswith('features.1: the model takes 22')
    assert text['error'].startswith("features.2.RSI: 'x'")

def test_a_class_may_have_a_number_and_a_name(rows):
    answer = rows.post('/predict', content=body_of(row)).json()
    assert (answer['prediction'], answer['prediction_label'], {*answer['probabilities']}) == (0, 'DOWN', {'DOWN', 'UP'})
    assert answer['probability'] == answer['probabilities']['DOWN']
    assert {'model_version', 'timestamp'} <= {*answer}
    assert 'prediction="DOWN"' in rows.get('/metrics').text

def test_the_model_names_its_features(rows):
    assert rows.get('/model/info').json()['input']['names'] == FEATURES
    assert rows.get('/predict/demo').status_code == 200
