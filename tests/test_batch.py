"Batch prediction: from a folder, a bucket and tables; killed, on a cluster, with photos that cannot be read."
import json
from pathlib import Path
import numpy as np, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest
from helpers import WorkerKiller, noise_photo, plant, plant_messages, serve_site, start_plant, wait_for
from plant_mlops.core.config import PlantError, settings
from plant_mlops.core.store import open_store
from plant_mlops.registry.example_model import publish_example
from plant_mlops.batch.predictions import predict_batch
from plant_mlops.serve.champion import load_champion

def counts(result) -> tuple: return tuple(result[name] for name in ('predicted', 'errors', 'to_retry', 'already'))

def predict(s, source, target): return predict_batch(s, str(source), str(target), progress=False)

def write_photos(folder, n, start=0):
    folder.mkdir(exist_ok=True)
    for i in range(start, start + n): (folder/f'{i:04d}.jpg').write_bytes(noise_photo(i))
    return folder

@pytest.fixture
def s(tmp_path):
    "Settings of a home with a model in production."
    s = settings(home=tmp_path/'home')
    publish_example(s)
    return s

def assert_as_one_by_one(s, table):
    "Each photo has one row, with the prediction that the model makes of it alone."
    model = load_champion(s)
    assert table.input.is_unique
    for row in table.sample(10, random_state=0).itertuples():
        answer, = model.predict([Path(row.input).read_bytes()])
        assert row.prediction == answer['prediction']
        assert dict(row.probabilities) == pytest.approx(answer['probabilities'], abs=1e-4)
        assert row.model_version == '1'

def test_the_command_predicts_a_folder_and_then_only_new_photos(s, tmp_path):
    photos = write_photos(tmp_path/'photos', 40)
    (photos/'broken.jpg').write_bytes(noise_photo(0)[:300])
    (photos/'labels.csv').write_text('no photo')
    command = ('predict', '--from', photos, '--to', tmp_path/'out')
    result = json.loads(plant(*command, '--json', home=s.home, ok=3))
    assert counts(result) == (40, 1, 0, 0)
    assert result['notes'] == ['Files that are not photos, and were left out: 1.']
    table = pd.read_parquet(tmp_path/'out')
    assert_as_one_by_one(s, table[table.error.isna()])
    assert 'damaged' in table.error.dropna().item()
    write_photos(photos, 5, start=40)
    assert counts(json.loads(plant(*command, '--json', home=s.home))) == (5, 0, 0, 41)
    assert len(pd.read_parquet(tmp_path/'out')) == 46
    publish_example(s, version='2')
    assert counts(json.loads(plant(*command, '--json', home=s.home, ok=3))) == (45, 1, 0, 0)
    assert pd.read_parquet(tmp_path/'out').model_version.value_counts().to_dict() == {'1': 46, '2': 46}

def test_a_bucket_is_predicted_into_a_bucket(seaweedfs, tmp_path):
    s = seaweedfs.settings('batch', home=tmp_path/'home')
    publish_example(s)
    client = seaweedfs.client()
    client.create_bucket(Bucket='incoming')
    for i in range(6): client.put_object(Bucket='incoming', Key=f'today/{i}.jpg', Body=noise_photo(i))
    client.put_object(Bucket='incoming', Key='today/list.txt', Body=b'none')
    result = predict(s, 's3://incoming/today/', 's3://outgoing/results')
    assert counts(result) == (6, 0, 0, 0)
    assert counts(predict(s, 's3://incoming/today/', 's3://outgoing/results')) == (0, 0, 0, 6)
    store = open_store(s.model_copy(update=dict(store_url='s3://outgoing/results')))
    key, = (stat.key for stat in store.list())
    assert key.startswith('model=plants/version=1/part-')
    assert sorted(pq.read_table(pa.BufferReader(store.get(key)))['input'].to_pylist()) == [
        f's3://incoming/today/{i}.jpg' for i in range(6)]
    with pytest.raises(PlantError, match='bucket|Bucket'): predict(s, 's3://nothing/', tmp_path/'out')

@pytest.mark.parametrize('suffix', ['csv', 'parquet'])
def test_a_table_of_urls_and_paths_keeps_errors_and_retries_what_may_pass(suffix, s, tmp_path):
    photos = write_photos(tmp_path/'photos', 2)
    s = s.model_copy(update=dict(ingest_allow_hosts='127.0.0.1', ingest_retries=1))
    with serve_site({'/a.jpg': noise_photo(10), '/busy.jpg': (503, {}, b'')}) as site:
        url = f'http://127.0.0.1:{site.server_address[1]}'
        names = ['photos/0000.jpg', (photos/'0001.jpg').as_uri(), f'{url}/a.jpg', f'{url}/busy.jpg', f'{url}/none.jpg',
                 'photos/none.jpg', 'photos/0000.jpg', None]
        table = pd.DataFrame(dict(url_source=names, label='grass'))
        file = tmp_path/f'table.{suffix}'
        if suffix == 'csv': table.to_csv(file, index=False)
        else: table.to_parquet(file)
        assert counts(predict(s, file, tmp_path/'out')) == (3, 3, 1, 0)
        rows = pd.read_parquet(tmp_path/'out').set_index('input')
        assert rows.will_retry[rows.will_retry].index.tolist() == [f'{url}/busy.jpg']
        site.pages['/busy.jpg'] = noise_photo(11)
        assert counts(predict(s, file, tmp_path/'out')) == (1, 0, 0, 5)
    rows = pd.read_parquet(tmp_path/'out').set_index('input')
    assert rows.index.is_unique
    assert sorted(rows.error.dropna().index) == sorted([f'{url}/none.jpg', 'photos/none.jpg'])

def test_a_prediction_that_is_killed_twice_and_continued_is_complete_and_has_no_row_twice(s, tmp_path):
    photos = write_photos(tmp_path/'photos', 2400)
    command = ('predict', '--from', photos, '--to', tmp_path/'out')
    n_files = 0
    for _ in range(2):
        process = start_plant(*command, home=s.home)
        wait_for(lambda: len([*tmp_path.glob('out/**/*.parquet')]) > n_files, 60, 'a file', every=.01)
        process.kill()
        process.wait()
        n_files = len([*tmp_path.glob('out/**/*.parquet')])
    before = len(pd.read_parquet(tmp_path/'out'))
    result = predict(s, photos, tmp_path/'out')
    assert counts(result) == (2400 - before, 0, 0, before)
    table = pd.read_parquet(tmp_path/'out')
    assert len(table) == 2400
    assert_as_one_by_one(s, table)

def test_on_dask_with_a_killed_worker_the_predictions_are_those_of_one_process(dask, s, tmp_path):
    photos = write_photos(tmp_path/'photos', 2400)
    predict(s, photos, tmp_path/'here')
    on_dask = s.model_copy(update=dict(engine='dask', engine_address=dask.address))
    killer = WorkerKiller(dask.address)
    assert counts(killer.run(predict, on_dask, photos, tmp_path/'there')) == (2400, 0, 0, 0)
    assert killer.n_killed == 1
    here, there = (pd.read_parquet(tmp_path/name).set_index('input').sort_index() for name in ('here', 'there'))
    assert here.index.equals(there.index)
    assert here.prediction.equals(there.prediction)
    assert np.allclose(here.probability, there.probability, atol=1e-5)

def test_a_damaged_file_is_written_again(s, tmp_path):
    photos = write_photos(tmp_path/'photos', 3)
    predict(s, photos, tmp_path/'out')
    file, = tmp_path.glob('out/**/*.parquet')
    file.write_bytes(file.read_bytes()[:100])
    assert counts(predict(s, photos, tmp_path/'out')) == (3, 0, 0, 0)
    assert len(pd.read_parquet(tmp_path/'out')) == 3

@pytest.mark.parametrize('options, ok, words', [
    (['--from', '{photos}'], 2, 'go together'), ([], 2, 'Name files'),
    (['--from', '{nowhere}', '--to', '{out}'], 1, '--from'),
    (['--from', '{table}', '--to', '{out}'], 1, 'url_source'),
    (['--from', '{empty}', '--to', '{out}'], 1, 'no photos')])
def test_a_wrong_command_says_what_to_do_and_writes_nothing(options, ok, words, s, tmp_path):
    (tmp_path/'table.csv').write_text('image,label\n1.jpg,grass\n')
    (tmp_path/'empty').mkdir()
    write_photos(tmp_path/'photos', 1)
    places = {name: tmp_path/name for name in ('photos', 'nowhere', 'out', 'empty')} | dict(table=tmp_path/'table.csv')
    assert words in plant_messages('predict', *(text.format(**places) for text in options), home=s.home, ok=ok)
    assert not (tmp_path/'out').exists()

def test_without_a_model_the_command_says_so(tmp_path):
    photos = write_photos(tmp_path/'photos', 1)
    with pytest.raises(PlantError, match='promoted'): predict(settings(home=tmp_path/'home'), photos, tmp_path/'out')
