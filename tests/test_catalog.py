"One contract, three databases: SQLite, and real PostgreSQL and MariaDB processes."
import json, os, subprocess, sys, threading
import pytest
from plant_mlops.core.config import PlantError, settings
from plant_mlops.data import catalog as cat

@pytest.fixture(params=['sqlite', 'postgres', 'mariadb'])
def s(request, tmp_path):
    if request.param == 'sqlite': yield settings(home=tmp_path)
    else: yield settings(catalog_url=request.getfixturevalue(request.param))

@pytest.fixture
def eng(s):
    e = cat.open_catalog(s)
    yield e
    e.dispose()

def _rows(n, label='grass'): return [dict(url_source=f'http://photos.example/{label}/{i}.jpg', label=label) for i in range(n)]

def test_reference_script_runs_unchanged_twice(eng):
    assert cat.load_file(eng, 'plants_data.sql')['new'] == 400
    assert cat.load_file(eng, 'plants_data.sql')['new'] == 0
    labels = [r['label'] for r in cat.rows(eng)]
    assert labels.count('dandelion') == labels.count('grass') == 200
    assert cat.counts(eng)['new'] == 400

def test_urls_are_unique_and_case_matters(eng):
    assert cat.add_rows(eng, _rows(3))['new'] == 3
    assert cat.add_rows(eng, _rows(5))['new'] == 2
    assert cat.add_rows(eng, [dict(url_source='http://photos.example/grass/A.jpg'), dict(url_source='http://photos.example/grass/a.jpg')])['new'] == 2

def test_a_label_is_corrected_by_loading_it_again(eng):
    cat.add_rows(eng, _rows(3))
    again = [dict(r, label=o) for r, o in zip(_rows(4), ('grass', 'dandelion', '', 'grass'))]
    assert cat.add_rows(eng, again) == dict(new=1, relabelled=1)
    assert [r['label'] for r in cat.rows(eng)] == ['grass', 'dandelion', 'grass', 'grass']

def test_only_files_of_that_folder_are_gone(eng, tmp_path):
    for f in ('a_/x/1.jpg', 'a_/x/2.jpg', 'A_/x/1.jpg', 'ab/x/1.jpg'):
        (tmp_path/f).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/f).write_bytes(b'')
        cat.add_dir(eng, (tmp_path/f).parent.parent)
    (tmp_path/'a_/x/1.jpg').unlink()
    assert cat.add_dir(eng, tmp_path/'a_') == dict(new=0, relabelled=0, gone=1)
    assert cat.add_dir(eng, tmp_path/'a_', mirror=True)['gone'] == 1
    assert [r['url_source'].removeprefix(tmp_path.as_uri()) for r in cat.rows(eng)] == ['/a_/x/2.jpg', '/A_/x/1.jpg', '/ab/x/1.jpg']

def test_accents_percent_signs_and_long_urls(eng, tmp_path):
    f = tmp_path/'données.csv'
    long = 'http://photos.example/' + 'x' * 670
    f.write_text(f'url_source,label\nhttp://photos.example/caf%C3%A9%20à.jpg,pâquerette 🌼\n{long},grass\n', encoding='utf-8-sig')
    assert cat.load_file(eng, f)['new'] == 2
    assert cat.rows(eng)[0]['label'] == 'pâquerette 🌼' and cat.rows(eng)[1]['url_source'] == long
    with pytest.raises(PlantError, match='700'): cat.add_rows(eng, [dict(url_source='http://' + 'x' * 700)])
    sql = tmp_path/'one.sql'
    sql.write_text("-- a comment; with a semicolon\nINSERT INTO plants_data (url_source, label) VALUES ('http://photos.example/100%25.jpg', 'grass');\n")
    assert cat.load_file(eng, sql)['new'] == 1
    assert cat.rows(eng)[-1]['url_source'] == 'http://photos.example/100%25.jpg'

def test_a_bad_file_adds_nothing(eng, tmp_path):
    f = tmp_path/'bad.sql'
    f.write_text("INSERT INTO plants_data (url_source) VALUES ('http://photos.example/1');\nINSERT INTO nowhere VALUES (1);\n")
    with pytest.raises(PlantError, match='Nothing was added'): cat.load_file(eng, f)
    f = tmp_path/'bad.csv'
    for text, says in [('url_source,label\nhttp://[bad/1.jpg,grass\n', 'Row 1'), ('', 'no column'), ('a,b\n1,2\n', 'no column'), ('url_source\nhttp://ok.example/1\nftp://no.example/2\n', 'Row 2')]:
        f.write_text(text)
        with pytest.raises(PlantError, match=says): cat.load_file(eng, f)
    f.write_bytes('url_source,label\nhttp://x.example/é,é\n'.encode('latin-1'))
    with pytest.raises(PlantError, match='UTF-8'): cat.load_file(eng, f)
    assert sum(cat.counts(eng).values()) == 0

def test_a_dump_with_its_own_transaction_is_whole_or_not_there(eng, tmp_path):
    f = tmp_path/'dump.sql'
    f.write_text("BEGIN TRANSACTION;\nINSERT INTO plants_data (url_source) VALUES ('http://photos.example/1');\nCOMMIT;\nINSERT INTO nowhere VALUES (1);\n")
    with pytest.raises(PlantError, match='Nothing was added'): cat.load_file(eng, f)
    assert sum(cat.counts(eng).values()) == 0
    f.write_text("INSERT INTO plants_data (url_source, status) VALUES ('http://photos.example/1', 'stored');\n")
    assert cat.load_file(eng, f)['new'] == 1 and cat.stored(eng) == []
    assert cat.retry(eng) == 0 and cat.retry(eng, everything=True) == 1 and len(cat.pending(eng)) == 1

def test_life_of_a_row(eng):
    cat.add_rows(eng, _rows(4))
    a, b, c, d = cat.pending(eng)
    cat.record(eng, [dict(id=a['id'], status='stored', sha256='ab' * 32, url_s3='s3://b/raw/x'), dict(id=b['id'], status='failed', error='HTTP 503'),
                     dict(id=c['id'], status='rejected', error='not a photo')])
    assert cat.counts(eng) == dict(new=1, stored=1, failed=1, rejected=1)
    assert [r['id'] for r in cat.pending(eng)] == [b['id'], d['id']]
    assert cat.stored(eng) == [dict(id=a['id'], url_source=a['url_source'], label='grass', sha256='ab' * 32)]
    for _ in range(4): cat.record(eng, [dict(id=b['id'], status='failed', error='HTTP 503')])
    assert [r['id'] for r in cat.pending(eng)] == [d['id']]
    assert cat.retry(eng) == 2 and len(cat.pending(eng)) == 3

def test_shards_meet_nowhere(eng):
    cat.add_rows(eng, _rows(50))
    parts = [[r['id'] for r in cat.pending(eng, (i, 3))] for i in (1, 2, 3)]
    assert sorted(sum(parts, [])) == [r['id'] for r in cat.pending(eng)]
    for i, r in enumerate(cat.pending(eng)): cat.record(eng, [dict(id=r['id'], status='stored', sha256=f'{i * 7919:08x}' + '0' * 56)])
    parts = [[r['id'] for r in cat.stored(eng, (i, 3))] for i in (1, 2, 3)]
    assert sorted(sum(parts, [])) == [r['id'] for r in cat.stored(eng)] and all(parts)

def test_a_batch_is_whole_or_not_there(eng):
    cat.add_rows(eng, _rows(2))
    a, b = cat.pending(eng)
    with pytest.raises(Exception): cat.record(eng, [dict(id=a['id'], status='stored', sha256='0' * 64), dict(id=b['id'], status=None)])
    assert cat.counts(eng)['new'] == 2

def test_many_workers_open_and_write_at_once(s):
    errors = []
    def work(k):
        try:
            e = cat.open_catalog(s)
            cat.add_rows(e, _rows(40))
            for r in cat.pending(e, (k + 1, 4)): cat.record(e, [dict(id=r['id'], status='stored', sha256='0' * 64)])
            e.dispose()
        except Exception as e: errors.append(e)
    ts = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert not errors
    e = cat.open_catalog(s)
    cat.record(e, [])
    assert sum(cat.counts(e).values()) == 40
    e.dispose()

def test_a_database_that_is_not_there():
    with pytest.raises(PlantError, match='Check PLANT_CATALOG_URL') as e: cat.open_catalog(settings(catalog_url='postgresql+psycopg://me:hush@127.0.0.1:9/x'))
    assert 'hush' not in str(e.value)
    with pytest.raises(PlantError): cat.open_catalog(settings(catalog_url='nonsense'))

@pytest.mark.timeout(600)
def test_the_whole_main_job_on_mariadb(mariadb, tmp_path):
    "On PostgreSQL it is run by test_stack.py."
    env = {k: v for k, v in os.environ.items() if not k.startswith('PLANT_')} | dict(PLANT_CATALOG_URL=mariadb, PLANT_EPOCHS='0', PLANT_IMAGE_SIZE='96', PLANT_PRECISION='fp32')
    def plant(*args):
        r = subprocess.run([sys.executable, '-m', 'plant_mlops', *args, '--home', tmp_path, '--json'], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert r.returncode == 0, r.stderr
        return json.loads(r.stdout)
    r = plant('run', '--synthetic', '40')
    assert r['champion'] == '1' and r['prediction']['prediction'] in ('dandelion', 'grass') and not (tmp_path/'catalog.db').exists()
    again = plant('ingest')
    assert again['stored'] == 0 and plant('job', 'run', 'monitor')[0]['status'] == 'succeeded'
