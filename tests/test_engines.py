"The parts of a task on real clusters of Dask and Ray: the same results as on one machine, also where workers die."
import signal, subprocess, sys, threading, time
from contextlib import closing
import pytest
from helpers import WorkerKiller, missing, plant_messages, root, start_plant, wait_for
from plant_mlops.core.config import PlantError, settings
from plant_mlops.core.dask_engine import DaskEngine
from plant_mlops.core.store import open_store
from plant_mlops.data.catalog import list_rows, open_catalog
from plant_mlops.data.dataset import load_dataset
from plant_mlops.data.prepare import prepare
from plant_mlops.data.shards import read_shards
from plant_mlops.photos.stages import dataset, ingest, load_catalog

N_PHOTOS = 120
SMALL = dict(photo_side=64, shard_photos=20, image_size=64, seed=42)

# -- The same results

@pytest.fixture(scope='module')
def local_version(tmp_path_factory):
    "The version of the dataset of one process."
    s = settings(home=tmp_path_factory.mktemp('local'), **SMALL)
    load_catalog(s, synthetic=N_PHOTOS)
    ingest(s, progress=False)
    prepare(s, progress=False)
    return dataset(s, progress=False)['version']

def assert_complete(s):
    "Each photo is stored, and in one shard."
    rows = list_rows(open_catalog(s))
    assert [row['status'] for row in rows] == ['stored']*N_PHOTOS
    shards = read_shards(open_store(s), side=s.photo_side)
    assert sorted(shards.sha256) == sorted({row['sha256'] for row in rows})

def test_on_dask_with_a_worker_killed_in_every_stage_the_dataset_is_that_of_one_process(
        dask, seaweedfs, postgres, tmp_path, local_version):
    on_s3 = seaweedfs.settings('engines', home=tmp_path, catalog_url=postgres, **SMALL)
    s = on_s3.model_copy(update=dict(engine='dask', engine_address=dask.address))
    load_catalog(s, synthetic=N_PHOTOS)
    killer = WorkerKiller(dask.address)
    killer.run(ingest, s, progress=False)
    assert killer.run(prepare, s, progress=False)['prepared'] == N_PHOTOS
    assert killer.run(dataset, s, progress=False)['version'] == local_version
    assert killer.n_killed == 3
    assert_complete(s)

def test_on_ray_the_dataset_is_that_of_one_process(tmp_path, local_version):
    # a process of its own, since Ray stays connected until the process ends
    code = f'''
from plant_mlops.core.config import settings
from plant_mlops.data.prepare import prepare
from plant_mlops.photos.stages import dataset, ingest, load_catalog
s = settings(home={str(tmp_path)!r}, engine='ray', engine_address='local', **{SMALL})
load_catalog(s, synthetic={N_PHOTOS})
ingest(s, progress=False)
prepare(s, progress=False)
print(dataset(s, progress=False)['version'])
'''
    result = subprocess.run([sys.executable, '-c', code], text=True, capture_output=True, timeout=300)
    assert result.stdout.split()[-1:] == [local_version], result.stderr
    assert_complete(settings(home=tmp_path, **SMALL))

# -- Clusters that fail

def test_a_part_that_kills_each_worker_is_an_error(dask):
    engine = DaskEngine(dask.address)
    try:
        with pytest.raises(PlantError, match='memory'): list(engine.run(signal.raise_signal, [int(signal.SIGKILL)]))
        with closing(engine.run(abs, [-1, -2])) as results: assert sorted(results) == [1, 2]
    finally: engine.close()

def home_with_photos(folder, n=60):
    "Settings of a home whose photos are stored, and not prepared."
    s = settings(home=folder/'home', **SMALL)
    load_catalog(s, synthetic=n)
    ingest(s, progress=False)
    return s

def shard_keys(s): return [stat.key for stat in open_store(s).list('fmt/')]

def test_if_the_scheduler_is_lost_the_next_run_finishes(empty_dask, tmp_path):
    s = home_with_photos(tmp_path, 200)
    empty_dask.start_workers(1)
    on_dask = empty_dask.settings(home=s.home, **SMALL)
    def kill_scheduler():
        wait_for(lambda: len(shard_keys(s)) >= 2, 60, 'two shards', every=.01)
        empty_dask.scheduler.kill()
    thread = threading.Thread(target=kill_scheduler)
    thread.start()
    with pytest.raises(PlantError, match='was lost.*run again'): prepare(on_dask, progress=False)
    thread.join()
    wait_for(lambda: prepare(s, progress=False)['failed'] == 0)
    assert sorted(read_shards(open_store(s), side=64).sha256) == sorted(
        {row['sha256'] for row in list_rows(open_catalog(s))})

def test_an_interrupted_command_ends_at_once_and_the_next_one_finishes(dask, tmp_path):
    s = home_with_photos(tmp_path, 200)
    env = {f'PLANT_{name.upper()}': str(value) for name, value in SMALL.items()}
    env |= dict(PLANT_ENGINE='dask', PLANT_ENGINE_ADDRESS=dask.address)
    process = start_plant('prepare', home=s.home, **env)
    wait_for(lambda: shard_keys(s), 60, 'a shard', every=.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130, error
    assert 'Traceback' not in error
    plant_messages('prepare', home=s.home, **env)
    assert len(set(read_shards(open_store(s), side=64).sha256)) == 200

# -- Clusters that cannot be used: said within 30 seconds, and nothing is written

def assert_refused(s, words):
    "A stage fails within 30 seconds, and writes nothing."
    before = shard_keys(s)
    start = time.monotonic()
    with pytest.raises(PlantError, match=words): prepare(s, progress=False)
    assert time.monotonic() - start < 30
    assert shard_keys(s) == before

@pytest.mark.parametrize('engine, address', [
    ('dask', 'tcp://127.0.0.1:1'), ('dask', 'nonsense'), ('ray', 'ray://127.0.0.1:1'), ('ray', '127.0.0.1:1'),
    ('ray', 'nonsense')])
def test_an_address_that_nobody_answers_is_an_error(engine, address, tmp_path):
    s = home_with_photos(tmp_path, 4)
    assert_refused(settings(home=s.home, engine=engine, engine_address=address, **SMALL), 'answers at.*PLANT_ENGINE_ADDRESS')

def test_a_scheduler_without_workers_is_an_error(empty_dask, tmp_path):
    s = home_with_photos(tmp_path, 4)
    assert_refused(empty_dask.settings(home=s.home, **SMALL), 'has no worker')

def test_workers_without_the_package_are_an_error(empty_dask, tmp_path):
    s = home_with_photos(tmp_path, 4)
    (tmp_path/'plant_mlops.py').write_text('') # hides the package
    empty_dask.start_workers(1, PYTHONPATH=str(tmp_path))
    assert_refused(empty_dask.settings(home=s.home, **SMALL), 'lacks plant_mlops')

def test_workers_with_other_code_are_an_error(empty_dask, tmp_path):
    s = home_with_photos(tmp_path, 4)
    subprocess.run(['cp', '-r', root/'plant_mlops', tmp_path/'plant_mlops'], check=True)
    with open(tmp_path/'plant_mlops/data/prepare.py', 'a') as file: file.write('# another line\n')
    empty_dask.start_workers(1, PYTHONPATH=str(tmp_path))
    assert_refused(empty_dask.settings(home=s.home, **SMALL), 'other code')

def test_workers_that_do_not_see_the_folder_of_the_store_are_an_error(empty_dask, tmp_path):
    s = home_with_photos(tmp_path, 4)
    hide = 'mount -t tmpfs tmpfs "$0" && exec "$@"'
    in_namespace = ['unshare', '--mount', '--propagation', 'private', 'sh', '-c', hide, s.home]
    if subprocess.run([*in_namespace, 'true'], capture_output=True).returncode: missing('root', 'to hide a folder')
    empty_dask.start_workers(1, before=in_namespace)
    assert_refused(empty_dask.settings(home=s.home, **SMALL), 'same store')

def test_workers_that_do_not_reach_the_catalog_are_an_error(empty_dask, seaweedfs, tmp_path):
    "A catalog in a SQLite file that the workers do not see."
    s = seaweedfs.settings('hidden-catalog', home=tmp_path/'home', **SMALL)
    load_catalog(s, synthetic=4)
    hide = 'mount -t tmpfs tmpfs "$0" && exec "$@"'
    in_namespace = ['unshare', '--mount', '--propagation', 'private', 'sh', '-c', hide, s.home]
    if subprocess.run([*in_namespace, 'true'], capture_output=True).returncode: missing('root', 'to hide a folder')
    empty_dask.start_workers(1, before=in_namespace)
    s = s.model_copy(update=dict(engine='dask', engine_address=empty_dask.address))
    with pytest.raises(PlantError, match='PLANT_CATALOG_URL'): ingest(s, progress=False)
    assert {row['attempts'] for row in list_rows(open_catalog(s))} == {0}

def test_a_store_that_the_workers_do_not_reach_is_an_error(empty_dask, seaweedfs, tmp_path):
    "The workers' proxy leads nowhere."
    s = seaweedfs.settings('unreachable', home=tmp_path/'home', **SMALL)
    load_catalog(s, synthetic=4)
    ingest(s, progress=False)
    empty_dask.start_workers(1, HTTP_PROXY='http://127.0.0.1:1', NO_PROXY='', no_proxy='')
    assert_refused(s.model_copy(update=dict(engine='dask', engine_address=empty_dask.address)), 'worker')
