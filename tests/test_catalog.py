"One contract, three databases: SQLite, and real PostgreSQL and MariaDB processes."
import json, os, subprocess, sys, threading
import pytest, sqlalchemy as sa
from plant_mlops.core.config import PlantError, settings
from plant_mlops.data.catalog import (
    add_rows, count_by_status, list_labels, list_pending, list_rows, list_stored, open_catalog, record_results, reset_rows)
from plant_mlops.data.catalog_files import add_folder, load_file

@pytest.fixture(params=['sqlite', 'postgres', 'mariadb'])
def s(request, tmp_path):
    "Settings of an empty catalog."
    if request.param == 'sqlite': return settings(home=tmp_path)
    return settings(catalog_url=request.getfixturevalue(request.param))

@pytest.fixture
def eng(s):
    "An empty catalog."
    eng = open_catalog(s)
    yield eng
    eng.dispose()

def rows_of(n, label='grass') -> list:
    return [dict(url_source=f'http://photos.example/{label}/{i}.jpg', label=label) for i in range(n)]

def ids(rows) -> list: return [r['id'] for r in rows]

# -- Adding

def test_reference_script_runs_unchanged_twice(eng):
    assert load_file(eng, 'plants_data.sql').new == 400
    assert load_file(eng, 'plants_data.sql').new == 0
    labels = [r['label'] for r in list_rows(eng)]
    assert labels.count('dandelion') == labels.count('grass') == 200
    assert count_by_status(eng)['new'] == 400

def test_urls_are_unique_and_case_matters(eng):
    assert add_rows(eng, rows_of(3))['new'] == 3
    assert add_rows(eng, rows_of(5))['new'] == 2
    assert add_rows(eng, [dict(url_source=f'http://photos.example/grass/{name}.jpg') for name in 'Aa'])['new'] == 2

def test_a_label_is_corrected_by_loading_it_again(eng):
    add_rows(eng, rows_of(3))
    again = [dict(r, label=label) for r, label in zip(rows_of(4), ('grass', 'dandelion', '', 'grass'))]
    assert add_rows(eng, again) == dict(new=1, relabelled=1)
    assert [r['label'] for r in list_rows(eng)] == ['grass', 'dandelion', 'grass', 'grass']

def test_adding_a_folder_again_counts_only_its_own_missing_files(eng, tmp_path):
    for name in ('a_/x/1.jpg', 'a_/x/2.jpg', 'A_/x/1.jpg', 'ab/x/1.jpg'):
        file = tmp_path/name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b'\xff\xd8\xff')
        add_folder(eng, file.parent.parent)
    (tmp_path/'a_/x/1.jpg').unlink()
    result = add_folder(eng, tmp_path/'a_')
    assert (result.new, result.gone) == (0, 1)
    assert add_folder(eng, tmp_path/'a_', mirror=True).gone == 1
    left = [r['url_source'].removeprefix(tmp_path.as_uri()) for r in list_rows(eng)]
    assert left == ['/a_/x/2.jpg', '/A_/x/1.jpg', '/ab/x/1.jpg']

def test_urls_may_have_accents_and_percent_signs_and_at_most_10_000_characters(eng, tmp_path):
    table = tmp_path/'données.csv'
    long_url = 'http://photos.example/' + 'x' * 9000
    lines = ['url_source,label', 'http://photos.example/caf%C3%A9%20à.jpg,pâquerette 🌼', f'{long_url},grass', '']
    table.write_text('\n'.join(lines), encoding='utf-8-sig')
    assert load_file(eng, table).new == 2
    first, second = list_rows(eng)
    assert first['label'] == 'pâquerette 🌼'
    assert second['url_source'] == long_url
    with pytest.raises(PlantError, match='10,000'): add_rows(eng, [dict(url_source='http://' + 'x' * 10_000)])

def test_a_script_may_have_comments_and_percent_signs(eng, tmp_path):
    script = tmp_path/'one.sql'
    url = 'http://photos.example/100%25.jpg'
    script.write_text("-- a comment; with a semicolon\n"
                      f"INSERT INTO plants_data (url_source, label) VALUES ('{url}', 'grass');\n")
    assert load_file(eng, script).new == 1
    assert list_rows(eng)[-1]['url_source'] == url

# -- Files that are not usable

@pytest.mark.parametrize('text,message', [
    ('url_source,label\nhttp://[bad/1.jpg,grass\n', 'Row 1'), ('', 'no column'), ('a,b\n1,2\n', 'no column'),
    ('url_source,label\nftp://no.example/2,grass\n', 'Row 1')])
def test_a_bad_table_adds_nothing(eng, tmp_path, text, message):
    table = tmp_path/'bad.csv'
    table.write_text(text)
    with pytest.raises(PlantError, match=message): load_file(eng, table)
    assert list_rows(eng) == []

INSERT = "INSERT INTO plants_data (url_source) VALUES ('http://photos.example/1');\n"
BAD_INSERT = 'INSERT INTO nowhere VALUES (1);\n'

def test_a_bad_script_adds_nothing(eng, tmp_path):
    script = tmp_path/'bad.sql'
    script.write_text(INSERT + BAD_INSERT)
    with pytest.raises(PlantError, match='Nothing was added'): load_file(eng, script)
    assert list_rows(eng) == []

def test_a_bad_dump_with_its_own_transaction_adds_nothing(eng, tmp_path):
    script = tmp_path/'dump.sql'
    script.write_text(f'BEGIN TRANSACTION;\n{INSERT}COMMIT;\n{BAD_INSERT}')
    with pytest.raises(PlantError, match='Nothing was added'): load_file(eng, script)
    assert list_rows(eng) == []

# -- The life of a row

def test_a_stored_row_without_checksum_is_only_reset_with_everything(eng, tmp_path):
    script = tmp_path/'stored.sql'
    script.write_text("INSERT INTO plants_data (url_source, status) VALUES ('http://photos.example/1', 'stored');\n")
    assert load_file(eng, script).new == 1 and list_stored(eng) == []
    assert reset_rows(eng) == 0
    assert reset_rows(eng, everything=True) == 1 and len(list_pending(eng)) == 1

def test_results_change_the_status_and_failures_are_limited_until_they_are_reset(eng):
    add_rows(eng, rows_of(4))
    a, b, c, d = list_pending(eng)
    failure = dict(id=b['id'], status='failed', error='HTTP 503')
    record_results(eng, [dict(id=a['id'], status='stored', sha256='ab' * 32, url_s3='s3://b/raw/x'), failure,
                         dict(id=c['id'], status='rejected', error='not a photo')])
    assert count_by_status(eng) == dict(new=1, stored=1, failed=1, rejected=1)
    assert ids(list_pending(eng)) == [b['id'], d['id']]
    [stored] = list_stored(eng)
    assert stored.pop('added_at') == a['added_at']
    assert stored == dict(id=a['id'], url_source=a['url_source'], label='grass', split=None, sha256='ab' * 32)
    for _ in range(4): record_results(eng, [failure])
    assert ids(list_pending(eng)) == [d['id']], 'after five attempts, b is left alone'
    assert reset_rows(eng) == 2 and len(list_pending(eng)) == 3

def test_shards_share_no_row_and_miss_none(eng):
    add_rows(eng, rows_of(50))
    shards = [ids(list_pending(eng, (i, 3))) for i in (1, 2, 3)]
    assert sorted(sum(shards, [])) == ids(list_pending(eng))
    record_results(eng, [dict(id=row_id, status='stored', sha256=f'{i * 7919:08x}' + '0' * 56)
                         for i, row_id in enumerate(ids(list_pending(eng)))])
    shards = [ids(list_stored(eng, (i, 3))) for i in (1, 2, 3)]
    assert sorted(sum(shards, [])) == ids(list_stored(eng)) and all(shards)

def test_results_of_a_batch_are_recorded_all_or_none(eng):
    add_rows(eng, rows_of(2))
    a, b = list_pending(eng)
    with pytest.raises(Exception):
        record_results(eng, [dict(id=a['id'], status='stored', sha256='0' * 64), dict(id=b['id'], status=None)])
    assert count_by_status(eng)['new'] == 2

def test_a_result_without_checksum_keeps_the_one_before(eng):
    add_rows(eng, rows_of(1))
    [row_id] = ids(list_pending(eng))
    record_results(eng, [dict(id=row_id, status='stored', sha256='ab' * 32, url_s3='s3://b/raw/x')])
    record_results(eng, [dict(id=row_id, status='failed', error='lost')])
    [row] = list_rows(eng)
    assert (row['status'], row['sha256'], row['url_s3'], row['attempts']) == ('failed', 'ab' * 32, 's3://b/raw/x', 2)

# -- Rows of other programs, and tables of older versions

def test_rows_of_other_programs_are_completed_and_merged(eng):
    insert = sa.text("INSERT INTO plants_data (url_source, label, split) "
                     "VALUES ('http://photos.example/1', :label, :split)")
    with eng.begin() as c:
        for label, split in ((' fern', None), ('moss ', 'Validation')): c.execute(insert, dict(label=label, split=split))
    [row] = list_pending(eng)
    assert (row['label'], row['split'], len(row['url_hash'])) == ('fern', 'valid', 64)
    assert add_rows(eng, [dict(url_source='http://photos.example/1', label='moss')]) == dict(new=0, relabelled=1)

def test_labels_that_differ_in_case_are_different(eng):
    add_rows(eng, [dict(url_source=f'http://photos.example/{label}', label=label) for label in ('fern', 'Fern')])
    assert list_labels(eng) == ['Fern', 'fern']

FIRST_VERSION = dict(
    sqlite="""CREATE TABLE plants_data (id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, url_source VARCHAR(700) NOT NULL,
        label VARCHAR(100), url_s3 VARCHAR(1000), sha256 VARCHAR(64), status VARCHAR(16) DEFAULT 'new' NOT NULL, error TEXT,
        attempts INTEGER DEFAULT '0' NOT NULL, updated_at DATETIME DEFAULT CURRENT_TIMESTAMP, UNIQUE (url_source))""",
    postgresql="""CREATE TABLE plants_data (id SERIAL NOT NULL PRIMARY KEY, url_source VARCHAR(700) NOT NULL,
        label VARCHAR(100), url_s3 VARCHAR(1000), sha256 VARCHAR(64), status VARCHAR(16) DEFAULT 'new' NOT NULL, error TEXT,
        attempts INTEGER DEFAULT '0' NOT NULL, updated_at TIMESTAMP WITHOUT TIME ZONE DEFAULT CURRENT_TIMESTAMP,
        UNIQUE (url_source))""",
    mysql="""CREATE TABLE plants_data (id INTEGER NOT NULL AUTO_INCREMENT PRIMARY KEY,
        url_source VARCHAR(700) COLLATE utf8mb4_bin NOT NULL, label VARCHAR(100), url_s3 VARCHAR(1000), sha256 VARCHAR(64),
        status VARCHAR(16) NOT NULL DEFAULT 'new', error TEXT, attempts INTEGER NOT NULL DEFAULT '0',
        updated_at DATETIME DEFAULT CURRENT_TIMESTAMP, UNIQUE (url_source)) CHARSET=utf8mb4""")

@pytest.fixture
def old(s):
    "Settings of a catalog that the first version made, with three rows."
    eng = sa.create_engine(s.catalog_url)
    if s.catalog_url.startswith('sqlite'): s.home.mkdir(exist_ok=True)
    values = [dict(url=f'http://photos.example/{name}.jpg', label=label) for name, label in
              (('A', 'Lo\u0308wenzahn'), ('a', 'grass'), ('b', None))]
    insert = sa.text("INSERT INTO plants_data (url_source, label, status, sha256) VALUES (:url, :label, 'stored', 'aa')")
    with eng.begin() as c:
        c.execute(sa.text(FIRST_VERSION[eng.dialect.name.replace('mariadb', 'mysql')]))
        c.execute(sa.text('CREATE INDEX ix_plants_data_sha256 ON plants_data (sha256)'))
        c.execute(sa.text('CREATE INDEX ix_plants_data_status ON plants_data (status)'))
        c.execute(insert, values)
    eng.dispose()
    return s

def test_a_table_of_the_first_version_is_upgraded_and_nothing_is_lost(old):
    eng = open_catalog(old)
    rows = list_rows(eng)
    assert [(row['id'], row['url_source'][-5:], row['label'], row['status'], row['sha256']) for row in rows] == [
        (1, 'A.jpg', 'L\u00f6wenzahn', 'stored', 'aa'), (2, 'a.jpg', 'grass', 'stored', 'aa'), (3, 'b.jpg', None, 'stored', 'aa')]
    again = [dict(url_source='http://photos.example/b.jpg', label='moss'), dict(url_source='http://photos.example/B.jpg'),
             dict(url_source='http://photos.example/' + 'x' * 1600, label='moss', split='val')]
    assert add_rows(eng, again) == dict(new=2, relabelled=1)
    assert list_rows(eng)[-1]['split'] == 'valid'
    eng.dispose()
    eng = open_catalog(old)
    assert len(list_rows(eng)) == 5
    eng.dispose()

def test_processes_that_upgrade_a_table_at_once_wait_for_each_other(old):
    errors = []
    def work():
        try: open_catalog(old).dispose()
        except Exception as error: errors.append(error)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not errors
    eng = open_catalog(old)
    assert len(list_rows(eng)) == 3 and all(row['url_hash'] for row in list_rows(eng))
    eng.dispose()

# -- The database

def test_many_workers_open_and_write_at_once(s):
    errors = []
    def work(i):
        try:
            eng = open_catalog(s)
            add_rows(eng, rows_of(40))
            for row in list_pending(eng, (i, 4)):
                record_results(eng, [dict(id=row['id'], status='stored', sha256='0' * 64)])
            eng.dispose()
        except Exception as error: errors.append(error)
    threads = [threading.Thread(target=work, args=(i,)) for i in (1, 2, 3, 4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not errors
    eng = open_catalog(s)
    record_results(eng, [])
    assert sum(count_by_status(eng).values()) == 40
    eng.dispose()

def test_the_error_of_a_missing_database_hides_the_password():
    url = 'postgresql+psycopg://{}@127.0.0.1:9/x'.format('me:hush')
    with pytest.raises(PlantError, match='PLANT_CATALOG_URL') as e: open_catalog(settings(catalog_url=url))
    assert 'hush' not in str(e.value)
    with pytest.raises(PlantError, match='PLANT_CATALOG_URL'): open_catalog(settings(catalog_url='nonsense'))

@pytest.mark.timeout(600)
def test_all_stages_run_with_a_catalog_in_mariadb(mariadb, tmp_path):
    "test_stack.py runs them with PostgreSQL."
    env = {k: v for k, v in os.environ.items() if not k.startswith('PLANT_')}
    env |= dict(PLANT_CATALOG_URL=mariadb, PLANT_EPOCHS='0', PLANT_IMAGE_SIZE='96', PLANT_PRECISION='fp32')
    def plant(*args):
        command = [sys.executable, '-m', 'plant_mlops', *args, '--home', tmp_path, '--json']
        result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)
    result = plant('run', '--synthetic', '40')
    assert result['champion'] == '1' and result['prediction']['prediction'] in ('dandelion', 'grass')
    assert not (tmp_path/'catalog.db').exists()
    assert plant('ingest')['stored'] == 0
    assert plant('job', 'run', 'monitor')[0]['status'] == 'succeeded'
