"One contract, two stores: a folder and a real S3 server."
import os, resource, signal, subprocess, sys, threading
import pytest
from plant_mlops.core.config import settings
from plant_mlops.core.process import pid_namespace_id
from plant_mlops.core.store import Conflict, Corrupt, NotFound, StoreError, open_store, sha256_of

@pytest.fixture(params=['folder', 's3'])
def store(request, tmp_path):
    "An empty store."
    if request.param == 'folder': return open_store(settings(store_url=str(tmp_path/'store')))
    bucket = f'b{os.urandom(6).hex()}'
    return open_store(request.getfixturevalue('seaweedfs').settings(f'{bucket}/pre/fix'))

def keys(store, prefix='') -> list: return [stat.key for stat in store.list(prefix)]

def test_put_get_stat_list_delete(store):
    stat = store.put('a/one.txt', b'one')
    assert (stat.key, stat.size, stat.sha256) == ('a/one.txt', 3, sha256_of(b'one'))
    assert store.get('a/one.txt') == b'one'
    assert store.stat('a/one.txt').sha256 == sha256_of(b'one')
    store.put('a/two.txt', b'')
    store.put('b/three.txt', b'3')
    assert keys(store, 'a/') == ['a/one.txt', 'a/two.txt']
    assert keys(store, 'a/t') == ['a/two.txt']
    assert keys(store, 'none/') == []
    assert set(keys(store)) == {'a/one.txt', 'a/two.txt', 'b/three.txt'}
    store.delete('a/one.txt')
    store.delete('a/one.txt')
    assert store.stat('a/one.txt') is None and store.stat('a') is None
    with pytest.raises(NotFound, match='a/one.txt'): store.get('a/one.txt')

def test_overwriting_replaces_the_whole_object(store):
    first = store.put('k', b'x' * 100)
    second = store.put('k', b'y')
    assert store.get('k') == b'y'
    assert first.etag != second.etag == store.stat('k').etag

def test_wrong_checksums_are_refused(store):
    with pytest.raises(Corrupt): store.put('k', b'data', sha256=sha256_of(b'other'))
    assert store.stat('k') is None
    with pytest.raises(Corrupt): store.put(f'raw/{sha256_of(b"other")}', b'data')
    store.put('k', b'data')
    with pytest.raises(Corrupt): store.get('k', sha256=sha256_of(b'other'))

@pytest.mark.parametrize('key', ['', '/abs', '../up', 'a/../b', 'a//b', '.hidden', 'a\\b', 'a/\0'])
def test_unusable_keys_are_refused(store, key):
    with pytest.raises(StoreError, match='key'): store.put(key, b'')

def test_keys_may_have_spaces_and_accents(store):
    key = 'fête d’été/pissenlit №1.jpg'
    store.put(key, b'1')
    assert keys(store, 'fête') == [key]
    assert store.get(key) == b'1'

def test_conditional_put(store):
    first = store.put('pointer', b'1', if_absent=True)
    with pytest.raises(Conflict): store.put('pointer', b'2', if_absent=True)
    store.put('pointer', b'2', if_match=first.etag)
    with pytest.raises(Conflict): store.put('pointer', b'3', if_match=first.etag)
    with pytest.raises(Conflict): store.put('absent', b'3', if_match=first.etag)
    assert store.get('pointer') == b'2' and store.stat('absent') is None

def test_one_of_many_writers_wins(store):
    first, winners = store.put('pointer', b'0'), []
    def move(i):
        try: store.put('pointer', b'%d' % i, if_match=first.etag)
        except Conflict: return
        winners.append(i)
    threads = [threading.Thread(target=move, args=(i,)) for i in range(1, 9)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(winners) == 1 and store.get('pointer') == b'%d' % winners[0]

def test_a_large_file_is_stored_in_parts(store, tmp_path):
    large = tmp_path/'large'
    large.write_bytes(os.urandom(1 << 20) * 20)
    checksum = sha256_of(large)
    store.put('large', large)
    store.put(f'raw/{checksum}', large)
    assert sha256_of(store.get('large')) == sha256_of(store.get(f'raw/{checksum}')) == checksum
    assert store.stat('large').sha256 == checksum

def test_many_keys_are_listed_in_order(store):
    names = [f'many/{i:05}' for i in range(300 if type(store).__name__ == 'FolderStore' else 60)]
    for name in reversed(names): store.put(name, b'.')
    assert keys(store, 'many/') == names

def test_a_damaged_object_on_s3_is_an_error(seaweedfs):
    store = open_store(seaweedfs.settings('damage'))
    store.put('k', b'data')
    store.client.put_object(Bucket='damage', Key='k', Body=b'dat!', Metadata={'sha256': sha256_of(b'data')})
    with pytest.raises(Corrupt): store.get('k')

def test_s3_refuses_a_wrong_secret(seaweedfs):
    wrong = settings(s3_secret_key='wrong').s3_secret_key
    s = seaweedfs.settings('secret').model_copy(update={'s3_secret_key': wrong})
    with pytest.raises(StoreError, match='keys'): open_store(s)

def test_an_s3_server_that_does_not_run_is_an_error():
    s = settings(store_url='s3://b', s3_endpoint_url='http://127.0.0.1:9', s3_access_key='a', s3_secret_key='b',
                 s3_timeout=1)
    with pytest.raises(StoreError, match='running'): open_store(s)

# -- A folder, whose writer is killed or whose disk is full

_put_for_ever = '''
import sys
from plant_mlops.core.config import settings
from plant_mlops.core.store import open_store
store = open_store(settings(store_url=sys.argv[1]))
print('ready', flush=True)
while True:
    for c in b'ab': store.put('k', bytes([c]) * 3_000_000)
'''

def test_a_killed_writer_leaves_the_old_or_the_new_object(tmp_path):
    for seconds in (.05, .1, .15, .2):
        writer = subprocess.Popen([sys.executable, '-c', _put_for_ever, str(tmp_path/'s')], stdout=subprocess.PIPE)
        writer.stdout.readline()
        try: writer.wait(seconds)
        except subprocess.TimeoutExpired:
            writer.kill()
            writer.wait()
        store = open_store(settings(store_url=str(tmp_path/'s')))
        if store.stat('k'): assert store.get('k') in (b'a' * 3_000_000, b'b' * 3_000_000)
        assert not list(store.tmp.glob('*@*')), 'temporary files of a dead process are still there'

def test_files_of_dead_writers_are_removed_when_the_store_is_opened(tmp_path):
    "Those of another PID namespace, such as another container, only after a day."
    store = open_store(settings(store_url=str(tmp_path/'s')))
    store.put('k', b'data')
    dead = store.tmp/f'{2**22}@{pid_namespace_id()}@1'
    young, old = store.tmp/'1@elsewhere@1', store.tmp/'1@elsewhere@2'
    for file in (dead, young, old): file.write_bytes(b'')
    os.utime(old, (0, 0))
    open_store(settings(store_url=str(tmp_path/'s')))
    assert set(store.tmp.glob('*@*')) == {young}

_replace_on_full_disk = '''
import sys
from plant_mlops.core.config import settings
from plant_mlops.core.store import open_store, StoreError
store = open_store(settings(store_url=sys.argv[1]))
store.put('k', b'old')
try: store.put('k', b'n' * 2_000_000)
except StoreError as e: print(e)
print(store.get('k'))
'''

def _limit_file_size():
    "As a full disk does: no file may grow beyond 1 MB."
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

def test_a_full_disk_keeps_the_old_object(tmp_path):
    result = subprocess.run([sys.executable, '-c', _replace_on_full_disk, str(tmp_path/'s')],
                            preexec_fn=_limit_file_size, capture_output=True, text=True)
    assert 'Nothing was changed' in result.stdout and "b'old'" in result.stdout, result
    assert not list((tmp_path/'s/.tmp').glob('*@*'))
