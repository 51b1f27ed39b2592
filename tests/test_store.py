"One contract, two stores: a folder and a real S3 server."
import os, resource, subprocess, sys, threading
import pytest
from plant_mlops.core.config import settings
from plant_mlops.core.store import Conflict, Corrupt, NotFound, StoreError, open_store, sha256_of

@pytest.fixture(params=['folder', 's3'])
def store(request, tmp_path):
    if request.param == 'folder': return open_store(settings(store_url=str(tmp_path/'store')))
    return open_store(request.getfixturevalue('weed').settings(f'b{os.urandom(6).hex()}/pre/fix'[:40]))

def test_put_get_stat_list_delete(store):
    st = store.put('a/one.txt', b'one')
    assert (st.key, st.size, st.sha256) == ('a/one.txt', 3, sha256_of(b'one'))
    assert store.get('a/one.txt') == b'one'
    assert store.stat('a/one.txt').sha256 == sha256_of(b'one')
    store.put('a/two.txt', b'')
    store.put('b/three.txt', b'3')
    assert [o.key for o in store.list('a/')] == ['a/one.txt', 'a/two.txt']
    assert [o.key for o in store.list('a/t')] == ['a/two.txt']
    assert [o.key for o in store.list('none/')] == []
    assert {o.key for o in store.list()} == {'a/one.txt', 'a/two.txt', 'b/three.txt'}
    store.delete('a/one.txt')
    store.delete('a/one.txt')
    assert store.stat('a/one.txt') is None and store.stat('a') is None
    with pytest.raises(NotFound, match='a/one.txt'): store.get('a/one.txt')

def test_overwrite_is_whole(store):
    first = store.put('k', b'x' * 100)
    second = store.put('k', b'y')
    assert store.get('k') == b'y' and first.etag != second.etag == store.stat('k').etag

def test_checksums(store):
    with pytest.raises(Corrupt): store.put('k', b'data', sha256=sha256_of(b'other'))
    assert store.stat('k') is None
    with pytest.raises(Corrupt): store.put(f'raw/{sha256_of(b"other")}', b'data')
    store.put('k', b'data')
    with pytest.raises(Corrupt): store.get('k', sha256=sha256_of(b'other'))

@pytest.mark.parametrize('key', ['', '/abs', '../up', 'a/../b', 'a//b', '.hidden', 'a\\b', 'a/\0'])
def test_bad_keys(store, key):
    with pytest.raises(StoreError, match='not a usable key'): store.put(key, b'')

def test_names_with_spaces_and_accents(store):
    store.put('fête d’été/pissenlit №1.jpg', b'1')
    assert [o.key for o in store.list('fête')] == ['fête d’été/pissenlit №1.jpg']
    assert store.get('fête d’été/pissenlit №1.jpg') == b'1'

def test_conditional_put(store):
    a = store.put('pointer', b'1', if_absent=True)
    with pytest.raises(Conflict): store.put('pointer', b'2', if_absent=True)
    store.put('pointer', b'2', if_match=a.etag)
    with pytest.raises(Conflict): store.put('pointer', b'3', if_match=a.etag)
    with pytest.raises(Conflict): store.put('absent', b'3', if_match=a.etag)
    assert store.get('pointer') == b'2' and store.stat('absent') is None

def test_one_of_many_wins(store):
    seen, won = store.put('pointer', b'0'), []
    def move(i):
        try: store.put('pointer', b'%d' % i, if_match=seen.etag); won.append(i)
        except Conflict: pass
    ts = [threading.Thread(target=move, args=(i,)) for i in range(1, 9)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert len(won) == 1 and store.get('pointer') == b'%d' % won[0]

def test_large_file_in_parts(store, tmp_path):
    big = tmp_path/'big'
    big.write_bytes(os.urandom(1 << 20) * 20)
    store.put('big', big)
    store.put(f'raw/{sha256_of(big)}', big)
    assert sha256_of(store.get('big')) == sha256_of(store.get(f'raw/{sha256_of(big)}')) == sha256_of(big)
    assert store.stat('big').sha256 == sha256_of(big)

def test_many_keys(store):
    for i in range(300) if type(store).__name__ == 'FolderStore' else range(60): store.put(f'many/{i:05}', b'.')
    assert [o.key for o in store.list('many/')] == [f'many/{i:05}' for i in range(300 if type(store).__name__ == 'FolderStore' else 60)]

def test_s3_damage_is_noticed(weed):
    store = open_store(weed.settings('damage'))
    store.put('k', b'data')
    store.s3.put_object(Bucket='damage', Key='k', Body=b'dat!', Metadata={'sha256': sha256_of(b'data')})
    with pytest.raises(Corrupt): store.get('k')

def test_s3_refuses_a_wrong_secret(weed):
    with pytest.raises(StoreError, match='keys'): open_store(weed.settings('secret').model_copy(update={'s3_secret_key': settings(s3_secret_key='wrong').s3_secret_key}))

def test_s3_not_running():
    with pytest.raises(StoreError, match='Is it running'):
        open_store(settings(store_url='s3://b', s3_endpoint_url='http://127.0.0.1:9', s3_access_key='a', s3_secret_key='b', s3_timeout=1))

_killed = '''
import sys
from plant_mlops.core.config import settings
from plant_mlops.core.store import open_store
store = open_store(settings(store_url=sys.argv[1]))
print('ready', flush=True)
while True:
    for c in b'ab': store.put('k', bytes([c]) * 3_000_000)
'''

def test_killed_writer_leaves_a_whole_object(tmp_path):
    for wait in (.05, .1, .15, .2):
        p = subprocess.Popen([sys.executable, '-c', _killed, str(tmp_path/'s')], stdout=subprocess.PIPE)
        p.stdout.readline()
        try: p.wait(wait)
        except subprocess.TimeoutExpired: p.kill(); p.wait()
        store = open_store(settings(store_url=str(tmp_path/'s')))
        if store.stat('k'): assert store.get('k') in (b'a' * 3_000_000, b'b' * 3_000_000)
        assert not list(store.tmp.glob('*@*')), 'temporary files of a dead process are still there'

def _limited(*a):
    "A disk that is full: no file may grow past 1 MB."
    import signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

def test_full_disk_keeps_what_was_there(tmp_path):
    code = '''
import sys
from plant_mlops.core.config import settings
from plant_mlops.core.store import open_store, StoreError
store = open_store(settings(store_url=sys.argv[1]))
store.put('k', b'old')
try: store.put('k', b'n' * 2_000_000)
except StoreError as e: print(e)
print(store.get('k'))
'''
    out = subprocess.run([sys.executable, '-c', code, str(tmp_path/'s')], preexec_fn=_limited, capture_output=True, text=True)
    assert 'Nothing was changed' in out.stdout and "b'old'" in out.stdout, out
    assert not list((tmp_path/'s/.tmp').glob('*@*'))
