"Networks as companies have them, and S3 that is not MinIO: proxies, headers, other people's buckets, regions, clocks."
import json, os, re, time
from datetime import timedelta
import pytest
from botocore import auth
from helpers import make_authority, noise_photo, plant, plant_messages, running_proxy, serve_site
from plant_mlops.core.config import PlantError, settings
from plant_mlops.core.s3_client import S3Access, open_s3_client
from plant_mlops.core.store import StoreError, open_store, sha256_of
from plant_mlops.data.buckets import SourceBuckets
from plant_mlops.data.catalog import add_rows, list_rows, open_catalog
from plant_mlops.data.ingest import ingest

PROXY_VARIABLES = [f'{scheme}_proxy' for scheme in ('http', 'https', 'all', 'no')]

@pytest.fixture(autouse=True)
def _no_user_network(monkeypatch, tmp_path):
    "Remove the proxies and the AWS configuration of the person who runs the tests."
    for name in [*os.environ]:
        if name.startswith('AWS_') or name.lower() in PROXY_VARIABLES: monkeypatch.delenv(name)
    monkeypatch.setenv('AWS_CONFIG_FILE', str(tmp_path/'aws-config'))
    monkeypatch.setenv('AWS_SHARED_CREDENTIALS_FILE', str(tmp_path/'aws-credentials'))
    monkeypatch.setenv('AWS_EC2_METADATA_DISABLED', 'true')

def fetch(tmp_path, *urls, connect_to=None, **kw) -> list:
    "Ingest URLs with these settings; returns their rows."
    s = settings(home=tmp_path/'home', **{'ingest_retries': 1, **kw})
    engine = open_catalog(s)
    add_rows(engine, [dict(url_source=url, label='grass') for url in urls])
    ingest(s, connect_to=connect_to, progress=False)
    rows = {row['url_source']: row for row in list_rows(engine)}
    engine.dispose()
    return [rows[url] for url in urls]

@pytest.fixture
def site():
    "A site with one photo."
    with serve_site({'/a.jpg': noise_photo(1)}) as site: yield site

# -- Proxies

LOGIN = 'me@corp:p:s#'
ENCODED_LOGIN = 'me%40corp:p%3As%23'

def test_https_and_http_photos_are_fetched_through_the_proxy_of_the_environment(tmp_path):
    "With a login, a CA of one's own, secret headers, and a redirect from https to http."
    authority = make_authority(tmp_path, 'photos.example.test')
    photos = {f'/{i}.jpg': noise_photo(i) for i in range(3)}
    moved = {'/moved.jpg': (302, {'Location': 'http://photos.example.test/2.jpg'}, b'')}
    with serve_site(photos | moved, tls=authority.tls) as secure, serve_site(photos) as plain:
        hosts = {'photos.example.test': secure.server_address[:2], 'plain.example.test': plain.server_address[:2],
                 'photos.example.test:80': plain.server_address[:2]}
        with running_proxy(hosts, LOGIN) as proxy:
            urls = ['https://photos.example.test/0.jpg', 'http://plain.example.test/1.jpg',
                    'https://photos.example.test/moved.jpg', 'https://other.test/1.jpg']
            s = settings(home=tmp_path/'home')
            add_rows(open_catalog(s), [dict(url_source=url, label='grass') for url in urls])
            with_login = proxy.url.replace('://', f'://{ENCODED_LOGIN}@')
            headers = {'photos.example.test': {'Authorization': 'Bearer hush'}}
            messages = plant_messages(
                'ingest', home=s.home, ok=3, HTTPS_PROXY=with_login, http_proxy=with_login,
                SSL_CERT_FILE=str(authority.file), PLANT_INGEST_PROXY='environment',
                PLANT_INGEST_ALLOW_HOSTS='*.example.test', PLANT_INGEST_HEADERS=json.dumps(headers))
            targets = proxy.targets
            secret_headers = [request.headers for request in proxy.requests]
        rows = {row['url_source']: row for row in list_rows(open_catalog(s))}
    assert [rows[url]['status'] for url in urls] == ['stored', 'stored', 'stored', 'failed'], rows
    assert rows[urls[0]]['sha256'] == sha256_of(noise_photo(0))
    assert ('CONNECT', 'photos.example.test:443') in targets
    assert ('GET', 'http://plain.example.test/1.jpg') in targets
    assert ('GET', 'http://photos.example.test/2.jpg') in targets
    assert {header['Authorization'] for header in secure.headers} == {'Bearer hush'}
    for header in [*secure.headers, *plain.headers]: assert 'Proxy-Authorization' not in header
    for header in [*plain.headers, *secret_headers]: assert 'hush' not in str(header), 'a secret was sent without TLS'
    assert 'PLANT_INGEST_ALLOW_HOSTS' in rows[urls[3]]['error']
    assert not [target for _, target in targets if 'other.test' in target]
    for secret in ('hush', ENCODED_LOGIN.split(':')[1], 'p:s#'): assert secret not in messages

@pytest.mark.parametrize('variables', [
    dict(http_proxy='{}'), dict(HTTP_PROXY='{}'), dict(ALL_PROXY='{}'),
    dict(http_proxy='{}', HTTP_PROXY='http://127.0.0.1:9'),
    dict(HTTP_PROXY='{without_scheme}'), dict(HTTP_PROXY='{}', NO_PROXY='localhost,.other.test,10.0.0.0/8')])
def test_a_proxy_of_the_environment_is_used_where_a_setting_says_so(tmp_path, site, monkeypatch, variables):
    with running_proxy({'photos.test': site.server_address[:2]}) as proxy:
        for name, value in variables.items():
            monkeypatch.setenv(name, value.format(proxy.url, without_scheme=proxy.url.removeprefix('http://')))
        row, = fetch(tmp_path, 'http://photos.test/a.jpg', ingest_proxy='environment', ingest_allow_hosts='photos.test')
        assert row['status'] == 'stored', row
        assert proxy.targets == [('GET', 'http://photos.test/a.jpg')]

@pytest.mark.parametrize('no_proxy', ['photos.test', '.test', 'a.org photos.test:80', '*', '*.test'])
def test_hosts_of_no_proxy_are_reached_directly_and_their_addresses_checked(tmp_path, site, monkeypatch, no_proxy):
    monkeypatch.setenv('NO_PROXY', no_proxy)
    with running_proxy() as proxy:
        monkeypatch.setenv('HTTP_PROXY', proxy.url)
        row, private = fetch(tmp_path, 'http://photos.test/a.jpg', f'http://127.0.0.1:{site.server_port}/a.jpg',
                             connect_to=site.connect_to, ingest_proxy='environment', ingest_allow_hosts='*')
        assert row['status'] == 'stored', row
        assert 'not a public address' in private['error']
        assert not proxy.requests

def test_a_proxy_can_be_named_by_a_setting(tmp_path, site):
    with running_proxy({'photos.test': site.server_address[:2]}, LOGIN) as proxy:
        row, = fetch(tmp_path, 'http://photos.test/a.jpg', ingest_allow_hosts='*',
                     ingest_proxy=proxy.url.replace('://', f'://{ENCODED_LOGIN}@'))
        assert row['status'] == 'stored', row

@pytest.mark.parametrize('variable', ['HTTPS_PROXY', 'https_proxy', 'ALL_PROXY'])
def test_the_error_names_a_proxy_variable_that_is_not_used(tmp_path, monkeypatch, variable):
    with running_proxy() as proxy:
        monkeypatch.setenv(variable, proxy.url)
        row, = fetch(tmp_path, 'https://no-such-host.invalid/a.jpg')
        assert not proxy.requests
    assert row['status'] == 'failed'
    assert re.search(f'no address.*{variable} is set, but not used.*PLANT_INGEST_PROXY=environment', row['error'])

def test_the_error_names_the_variable_also_where_a_firewall_drops_or_refuses_connections(tmp_path, monkeypatch):
    monkeypatch.setenv('HTTP_PROXY', 'http://127.0.0.1:9')
    with serve_site({'/slow.jpg': lambda handler: time.sleep(1)}) as site:
        hosts = {'slow.test': site.server_address[:2], 'closed.test': ('127.0.0.1', 9)}
        urls = ['http://slow.test/slow.jpg', 'http://closed.test/a.jpg']
        rows = fetch(tmp_path, *urls, connect_to=hosts, ingest_timeout=.3)
    for row, word in zip(rows, ['No complete answer', 'connection failed']):
        assert word in row['error'] and 'HTTP_PROXY is set, but not used' in row['error'], row

def test_an_allowed_host_behind_a_proxy_may_not_lead_to_another_one(tmp_path):
    "Neither by a redirect, nor as an address; and the proxy is not even asked."
    pages = {'/a.jpg': (302, {'Location': 'http://inside.test/'}, b''),
             '/b.jpg': (302, {'Location': 'http://169.254.169.254/latest/meta-data/'}, b'')}
    with serve_site(pages) as site, running_proxy({'photos.test': site.server_address[:2]}) as proxy:
        urls = ['http://photos.test/a.jpg', 'http://photos.test/b.jpg', 'http://10.0.0.7/a.jpg',
                'http://localhost/a.jpg', 'http://badphotos.test/a.jpg']
        rows = fetch(tmp_path, *urls, ingest_proxy=proxy.url, ingest_allow_hosts='photos.test')
        assert sorted(target for _, target in proxy.targets) == urls[:2]
    words = ['inside.test', '169.254.169.254', '10.0.0.7', 'localhost', 'badphotos.test']
    for row, word in zip(rows, words): assert word in row['error'] and row['status'] != 'stored', row

NTLM = 'Proxy-Authenticate: Negotiate\r\nProxy-Authenticate: NTLM\r\n'

@pytest.mark.parametrize('scheme', ['http', 'https'])
@pytest.mark.parametrize('options, login, words', [
    (dict(login=LOGIN), '', ['407', 'user and password']),
    (dict(login=LOGIN), 'me:wrong@', ['407', 'Correct the user']),
    (dict(status=407, headers=NTLM), '', ['407', 'ntlm']),
    (dict(status=403), '', ['403', 'proxy']),
    (dict(status=503), '', ['503', 'proxy'])])
def test_a_proxy_that_refuses_is_named_and_the_photo_is_tried_again_in_the_next_run(
        tmp_path, monkeypatch, scheme, options, login, words):
    with running_proxy(**options) as proxy:
        monkeypatch.setenv(f'{scheme}_proxy', proxy.url.replace('://', f'://{login}'))
        row, = fetch(tmp_path, f'{scheme}://photos.test/a.jpg', ingest_proxy='environment', ingest_allow_hosts='*.test')
        assert row['status'] == 'failed', row
        for word in [*words, f'{scheme}_proxy', str(proxy.port)]: assert word in row['error'], row
        assert 'wrong' not in row['error']

def test_a_proxy_that_does_not_run_and_one_without_address_are_named(tmp_path):
    for url, words in [('http://127.0.0.1:9', ['127.0.0.1:9', 'cannot be reached']),
                       ('http://proxy.invalid:3128', ['no address for the name proxy.invalid', 'PLANT_INGEST_PROXY'])]:
        row, = fetch(tmp_path/url[-4:], 'https://a.test/a.jpg', ingest_proxy=url, ingest_allow_hosts='a.test')
        assert row['status'] == 'failed'
        for word in words: assert word in row['error'], row

def test_a_certificate_of_an_unknown_authority_is_an_error_that_says_how_to_name_it(tmp_path):
    authority = make_authority(tmp_path, 'photos.test')
    with serve_site({}, tls=authority.tls) as site, running_proxy({'photos.test': site.server_address[:2]}) as proxy:
        row, = fetch(tmp_path, 'https://photos.test/a.jpg', ingest_proxy=proxy.url, ingest_allow_hosts='photos.test')
    assert 'certificate of photos.test' in row['error'] and 'SSL_CERT_FILE' in row['error']

@pytest.mark.parametrize('value', [
    'socks5://me:{}@proxy:1080', 'http://me:{}#@proxy:3128', 'enviroment', 'http://:3128'])
def test_an_unusable_proxy_ends_the_run_with_a_message_without_the_password(tmp_path, value):
    with pytest.raises(PlantError, match='PLANT_INGEST_PROXY') as error:
        fetch(tmp_path, 'http://a.test/a.jpg', ingest_proxy=value.format('hush'))
    assert 'hush' not in str(error.value)

def test_a_proxy_that_cannot_be_used_concerns_only_the_urls_that_need_it(tmp_path, site, monkeypatch):
    monkeypatch.setenv('ALL_PROXY', 'socks5://proxy:1080')
    with running_proxy({'photos.test': site.server_address[:2]}) as proxy:
        monkeypatch.setenv('HTTP_PROXY', proxy.url)
        rows = fetch(tmp_path, 'http://photos.test/a.jpg', 'https://photos.test/a.jpg', ingest_proxy='environment',
                     ingest_allow_hosts='photos.test')
    assert [row['status'] for row in rows] == ['stored', 'failed'] and 'socks5' in rows[1]['error'], rows

def test_no_error_shows_the_password_of_a_url(tmp_path):
    for pattern in ('http://me:{}@a.test:x/', 'http://me:{}#@a.test/', 'https://me:hu/{}@a.test/', 'http://me:{}@:80/'):
        url = pattern.format('hush')
        row, = fetch(tmp_path/str(len(url)), url)
        assert row['status'] == 'rejected' and 'hush' not in row['error'] and 'hu/sh' not in row['error'], row

def test_a_photo_that_a_proxy_has_changed_is_stored(tmp_path):
    with serve_site({'/a.jpg': (203, {}, noise_photo(1))}) as site:
        row, = fetch(tmp_path, 'http://photos.test/a.jpg', connect_to=site.connect_to)
        assert row['status'] == 'stored', row

# -- Headers

def require_token(handler):
    "A page that only those see who send the token."
    if handler.headers.get('X-Token') != 'hush': return handler.respond(401, {'Content-Length': 0})
    photo = noise_photo(3)
    handler.respond(200, {'Content-Length': len(photo)}, photo)

def test_headers_are_sent_to_their_host_and_to_no_other(tmp_path, caplog):
    with serve_site({'/a.jpg': require_token}) as site, serve_site({'/b.jpg': noise_photo(4)}) as other:
        away = f'http://other.test:{other.server_port}/b.jpg'
        site.pages['/away.jpg'] = (302, {'Location': away}, b'')
        site.pages['/port.jpg'] = (302, {'Location': f'http://photos.test:{other.server_port}/b.jpg'}, b'')
        site.pages['/back.jpg'] = (302, {'Location': '/a.jpg'}, b'')
        hosts = {'photos.test': site.server_address[:2], 'other.test': other.server_address[:2]}
        urls = [f'http://photos.test/{name}.jpg' for name in ('a', 'away', 'back')] + [away]
        headers = json.dumps({'Photos.test': {'X-Token': 'hush'}})
        rows = fetch(tmp_path, *urls, connect_to=hosts, ingest_headers=headers)
        assert [row['status'] for row in rows] == ['stored'] * 4, rows
        for header in site.headers: assert header['X-Token'] == 'hush'
        assert len(other.headers) == 2
        for header in other.headers: assert 'X-Token' not in header
        hosts['photos.test'] = other.server_address[:2] # another port of the same host
        url = f'http://photos.test:{other.server_port}/b.jpg'
        fetch(tmp_path/'port', url, connect_to=hosts, ingest_headers=headers)
        assert 'X-Token' not in other.headers[-1]
    assert 'hush' not in caplog.text

def test_a_host_with_a_port_and_a_domain_can_have_headers(tmp_path):
    with serve_site({'/a.jpg': require_token}) as site:
        hosts = dict.fromkeys(('photos.test', 'a.b.test'), site.server_address[:2])
        for url, key in [(f'http://photos.test:{site.server_port}/a.jpg', f'photos.test:{site.server_port}'),
                         ('http://a.b.test/a.jpg', '*.b.test')]:
            headers = json.dumps({key: {'X-Token': 'hush'}})
            row, = fetch(tmp_path/url[7:10], url, connect_to=hosts, ingest_headers=headers)
            assert row['status'] == 'stored', row

def test_a_missing_or_wrong_token_is_an_error_that_names_the_setting(tmp_path):
    with serve_site({'/a.jpg': require_token}) as site:
        row, = fetch(tmp_path, 'http://photos.test/a.jpg', connect_to=site.connect_to)
        assert row['status'] == 'failed' and 'PLANT_INGEST_HEADERS has no header for photos.test' in row['error']
        headers = json.dumps({'photos.test': {'X-Token': 'wr0ng'}})
        row, = fetch(tmp_path, 'http://photos.test/a.jpg', connect_to=site.connect_to, ingest_headers=headers)
        assert '401' in row['error'] and 'X-Token' in row['error'] and 'wr0ng' not in row['error']

def test_the_values_of_headers_and_the_password_of_a_proxy_are_shown_nowhere(tmp_path):
    headers = json.dumps({'photos.test': {'Authorization': 'Bearer hush'}})
    secrets = dict(PLANT_INGEST_HEADERS=headers, PLANT_INGEST_PROXY='http://me:{}@proxy:3128'.format('hush'),
                   PLANT_INGEST_S3_SECRET_KEY='hush', PLANT_INGEST_S3_ACCESS_KEY='key')
    assert 'hush' not in plant('config', home=tmp_path, **secrets) + plant('config', '--json', home=tmp_path, **secrets)
    s = settings(**{name.removeprefix('PLANT_').lower(): value for name, value in secrets.items()})
    assert 'hush' not in repr(s) + str(s)
    for broken in (headers + '}', headers.replace('"Bearer', '["Bearer').replace('hush"', 'hush"]'), '"hush"'):
        with pytest.raises(PlantError, match='PLANT_INGEST_HEADERS') as error:
            fetch(tmp_path, 'http://photos.test/a.jpg', ingest_headers=broken)
        assert 'hush' not in str(error.value)

def test_the_user_agent_names_the_program_or_is_that_of_the_settings(tmp_path, site):
    for i, agent in enumerate(['', 'leaves/2 (me@example.org)']):
        fetch(tmp_path/str(i), 'http://photos.test/a.jpg', connect_to=site.connect_to, ingest_user_agent=agent)
    agents = [header['User-Agent'] for header in site.headers]
    assert re.fullmatch(r'plant_mlops/\d+\.\d+\S* \(\+\S+\)', agents[0])
    assert agents[1] == 'leaves/2 (me@example.org)'

# -- Other people's buckets

PUBLIC = {'Version': '2012-10-17', 'Statement': [{
    'Effect': 'Allow', 'Principal': '*', 'Action': ['s3:GetObject'], 'Resource': ['arn:aws:s3:::open/*']}]}

@pytest.fixture(scope='module')
def open_bucket(seaweedfs):
    "A bucket whose objects anyone may read, and one that is private, each with a photo."
    s3 = seaweedfs.client()
    for bucket in ('open', 'private'):
        s3.create_bucket(Bucket=bucket)
        s3.put_object(Bucket=bucket, Key='a b/1.jpg', Body=noise_photo(5))
    s3.put_bucket_policy(Bucket='open', Policy=json.dumps(PUBLIC))
    return seaweedfs.url.replace('127.0.0.1', 'localhost')

def test_public_buckets_are_read_without_keys_from_another_endpoint_than_the_store(
        seaweedfs, open_bucket, tmp_path, monkeypatch):
    "The requests go through a proxy, which sees whether they are signed."
    with running_proxy() as proxy:
        monkeypatch.setenv('HTTP_PROXY', proxy.url)
        monkeypatch.setenv('NO_PROXY', '127.0.0.1') # the store
        store = dict(store_url='s3://target', s3_endpoint_url=seaweedfs.url, s3_access_key=seaweedfs.key,
                     s3_secret_key=seaweedfs.secret)
        urls = ['s3://open/a b/1.jpg', 's3://private/a b/1.jpg', 's3://nowhere/1.jpg', 's3://open/none.jpg']
        rows = fetch(tmp_path, *urls, **store, ingest_s3_endpoint_url=open_bucket)
        assert [row['status'] for row in rows] == ['stored', 'rejected', 'rejected', 'rejected'], rows
        assert rows[0]['sha256'] == sha256_of(noise_photo(5))
        assert len(proxy.requests) == 4
        for request in proxy.requests: assert 'authorization' not in request.headers
    for row, words in zip(rows[1:], [('403', 'not signed', 'PLANT_INGEST_S3_ACCESS_KEY'), ('40',), ('40',)]):
        for word in words: assert word in row['error'], row

def test_a_public_bucket_is_read_without_keys_if_its_s3_rejects_them(open_bucket, tmp_path, monkeypatch):
    monkeypatch.setenv('AWS_ACCESS_KEY_ID', 'of-another')
    monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'account')
    rows = fetch(tmp_path, 's3://open/a b/1.jpg', 's3://private/a b/1.jpg', ingest_s3_endpoint_url=open_bucket)
    assert [row['status'] for row in rows] == ['stored', 'failed'], rows
    assert 'InvalidAccessKeyId' in rows[1]['error'] and 'PLANT_INGEST_S3_ACCESS_KEY' in rows[1]['error']

def test_a_source_can_have_keys_and_a_region_of_its_own(seaweedfs, open_bucket, tmp_path):
    row, = fetch(tmp_path, 's3://private/a b/1.jpg', ingest_s3_endpoint_url=open_bucket, ingest_s3_region='eu-west-3',
                 ingest_s3_access_key=seaweedfs.key, ingest_s3_secret_key=seaweedfs.secret)
    assert row['status'] == 'stored', row

def test_a_bucket_that_is_not_at_the_store_is_an_error_that_names_the_setting(seaweedfs, tmp_path):
    row, = fetch(tmp_path, 's3://inaturalist-open-data/photos/1/medium.jpg', s3_endpoint_url=seaweedfs.url,
                 s3_access_key=seaweedfs.key, s3_secret_key=seaweedfs.secret)
    assert '404' in row['error'] and 'PLANT_INGEST_S3_ENDPOINT_URL' in row['error'], row

def test_buckets_are_read_through_the_proxy_of_the_settings(open_bucket, tmp_path):
    with running_proxy(login=LOGIN) as proxy:
        row, = fetch(tmp_path, 's3://open/a b/1.jpg', ingest_s3_endpoint_url=open_bucket,
                     ingest_proxy=proxy.url.replace('://', f'://{ENCODED_LOGIN}@'))
        assert row['status'] == 'stored', row
        assert len(proxy.requests) >= 1

@pytest.mark.parametrize('scheme', ['http', 'https'])
@pytest.mark.parametrize('options, words', [
    (dict(login=LOGIN), ['407', 'Correct the user or the password in PLANT_INGEST_PROXY']),
    (dict(status=403), ['403', 'PLANT_INGEST_PROXY', 'allow the host'])])
def test_a_proxy_that_refuses_requests_to_a_bucket_is_named(tmp_path, scheme, options, words):
    with running_proxy(**options) as proxy:
        row, = fetch(tmp_path, 's3://open/1.jpg', ingest_s3_endpoint_url=f'{scheme}://s3.test:9000', ingest_retries=3,
                     ingest_proxy=proxy.url.replace('://', '://me:wr0ng@'))
        assert len(proxy.requests) == 1
    assert row['status'] == 'failed' and 'wr0ng' not in row['error'], row
    for word in words: assert word in row['error'], row

def test_a_proxy_of_a_bucket_that_does_not_run_is_named(tmp_path):
    row, = fetch(tmp_path, 's3://open/1.jpg', ingest_s3_endpoint_url='http://s3.test', ingest_proxy='http://127.0.0.1:9')
    assert 'Is the proxy of PLANT_INGEST_PROXY running' in row['error'], row

@pytest.mark.parametrize('no_proxy', ['127.0.0.0/8', '*.lan, 127.0.0.1/32'])
def test_the_store_is_reached_directly_if_no_proxy_names_its_network(seaweedfs, monkeypatch, no_proxy):
    monkeypatch.setenv('NO_PROXY', no_proxy)
    with running_proxy() as proxy:
        monkeypatch.setenv('HTTP_PROXY', proxy.url)
        store = open_store(seaweedfs.settings('direct'))
        store.put('k', b'1')
        assert store.get('k') == b'1' and not proxy.requests
    if 'lan' in no_proxy: assert open_s3_client(S3Access('http://minio.lan:9000')).meta.config.proxies == {}

@pytest.mark.parametrize('order', [1, -1])
def test_the_result_for_an_object_does_not_depend_on_those_before_it(open_bucket, monkeypatch, order):
    "Of a public bucket, with keys that its S3 does not know."
    access = S3Access(open_bucket, 'of-another', 'account')
    buckets = SourceBuckets(access)
    def outcome(url):
        try: return len(buckets.fetch(url, 10**7).data) > 0
        except PlantError as e: return f'{type(e).__name__}: {e}'
    urls = ['s3://open/none.jpg', 's3://open/a b/1.jpg', 's3://private/a b/1.jpg']
    outcomes = {url: outcome(url) for url in urls[::order]}
    assert outcomes[urls[1]] is True
    assert outcomes[urls[0]].startswith('PermanentFetchError') and '404' in outcomes[urls[0]]
    assert outcomes[urls[2]].startswith('SettingFetchError') and 'InvalidAccessKeyId' in outcomes[urls[2]]

def test_a_private_object_of_a_public_bucket_is_read_with_the_keys(tmp_path):
    "Before and after one that only those without keys may read."
    def page(signed, unsigned):
        def answer(handler): handler.respond(*(signed if handler.headers.get('Authorization') else unsigned))
        return answer
    denied, photo = amazon_error(403, 'AccessDenied'), (200, {'Content-Length': 2}, b'ok')
    pages = {'/b/public': page(denied, photo), '/b/private': page(photo, denied), '/b/secret': page(denied, denied)}
    for names in (['public', 'private', 'secret'], ['secret', 'private', 'public']):
        with serve_site(pages) as site:
            buckets = SourceBuckets(S3Access(f'http://127.0.0.1:{site.server_port}', 'a', 'b'))
            for name in names:
                if name != 'secret': assert buckets.fetch(f's3://b/{name}', 100).data == b'ok'
                else:
                    with pytest.raises(PlantError, match='Check the keys'): buckets.fetch(f's3://b/{name}', 100)

# -- S3 that is not MinIO

@pytest.mark.parametrize('kw, variables, region', [
    ({}, dict(AWS_REGION='eu-central-1'), 'eu-central-1'), ({}, dict(AWS_DEFAULT_REGION='eu-west-3'), 'eu-west-3'),
    (dict(s3_region='eu-north-1'), dict(AWS_REGION='eu-central-1'), 'eu-north-1'), ({}, {}, None),
    (dict(s3_region='us-east-1'), {}, None)])
def test_a_bucket_is_created_in_the_region(seaweedfs, monkeypatch, kw, variables, region):
    "The proxy sees the request that creates it."
    for name, value in variables.items(): monkeypatch.setenv(name, value)
    bucket = f'b{os.urandom(6).hex()}'
    with running_proxy() as proxy:
        monkeypatch.setenv('HTTP_PROXY', proxy.url)
        store = open_store(seaweedfs.settings(bucket, **kw))
        store.put('k', b'1')
        assert store.get('k') == b'1'
    creation = [request for request in proxy.requests if request[:2] == ('PUT', f'{seaweedfs.url}/{bucket}')][-1]
    text = bytes(creation.body).decode()
    if region is None: assert 'LocationConstraint' not in text
    else: assert f'<LocationConstraint>{region}</LocationConstraint>' in text
    assert f'/{region or "us-east-1"}/s3/' in creation.headers['authorization']

def test_what_no_setting_says_is_left_to_boto3(seaweedfs, monkeypatch, tmp_path):
    "Endpoint, region and keys come from the files of AWS, those of the profile that a variable names."
    (tmp_path/'aws-config').write_text(f'[profile lab]\nregion = eu-west-3\nendpoint_url = {seaweedfs.url}\n')
    keys = f'aws_access_key_id = {seaweedfs.key}\naws_secret_access_key = {seaweedfs.secret}\n'
    (tmp_path/'aws-credentials').write_text(f'[lab]\n{keys}')
    monkeypatch.setenv('AWS_PROFILE', 'lab')
    store = open_store(settings(store_url=f's3://b{os.urandom(6).hex()}'))
    store.put('k', b'1')
    assert store.get('k') == b'1'
    assert (store.client.meta.endpoint_url, store.client.meta.region_name) == (seaweedfs.url, 'eu-west-3')
    row, = fetch(tmp_path, store.url('k')) # a photo of the catalog is found in the same way
    assert row['status'] == 'rejected' and 'not a photo' in row['error'], row

def test_virtual_addressing_puts_the_bucket_into_the_host_name(seaweedfs, monkeypatch):
    with running_proxy({'plants.s3.test': ('127.0.0.1', seaweedfs.port)}) as proxy:
        monkeypatch.setenv('HTTP_PROXY', proxy.url)
        s = seaweedfs.settings('plants', s3_addressing_style='virtual')
        store = open_store(s.model_copy(update=dict(s3_endpoint_url=f'http://s3.test:{seaweedfs.port}')))
        store.put('k', b'1')
        assert store.get('k') == b'1'
        for request in proxy.requests: assert request.target.startswith(f'http://plants.s3.test:{seaweedfs.port}/')
    monkeypatch.delenv('HTTP_PROXY')
    assert open_store(seaweedfs.settings('plants')).get('k') == b'1'

def test_an_error_names_the_key(seaweedfs):
    for change, words in [(dict(s3_access_key='unknown'), 'access key is not known.*PLANT_S3_ACCESS_KEY'),
                          (dict(s3_secret_key='wrong'), 'secret key does not belong.*PLANT_S3_SECRET_KEY')]:
        wrong = {name: getattr(settings(**change), name) for name in change}
        with pytest.raises(StoreError, match=words): open_store(seaweedfs.settings('keys').model_copy(update=wrong))

def test_missing_keys_are_an_error_that_says_where_they_are_looked_for(seaweedfs):
    s = settings(store_url='s3://plants', s3_endpoint_url=seaweedfs.url)
    with pytest.raises(StoreError, match='PLANT_S3_ACCESS_KEY.*AWS_'): open_store(s)
    half = settings(store_url='s3://plants', s3_endpoint_url=seaweedfs.url, s3_access_key='a')
    with pytest.raises(StoreError, match='Set both'): open_store(half)

@pytest.mark.parametrize('hours', [-1, 25])
def test_an_error_names_the_clock(seaweedfs, monkeypatch, hours):
    real_clock = auth.get_current_datetime
    def wrong_clock(*args, **kw): return real_clock(*args, **kw) + timedelta(hours=hours)
    monkeypatch.setattr(auth, 'get_current_datetime', wrong_clock)
    with pytest.raises(StoreError, match='clock differs'): open_store(seaweedfs.settings('skewed'))

def amazon_error(status, code, region='', message='', fields='', **headers):
    "An error response of Amazon."
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message>{fields}</Error>'.encode()
    if region: headers['x-amz-bucket-region'] = region
    return status, {'Content-Type': 'application/xml', 'Content-Length': len(body), **headers}, body

def refuse_in_1970(handler):
    "A response whose server has another date."
    status, headers, body = amazon_error(403, 'AccessDenied')
    handler.send_response_only(status)
    for name, value in headers.items(): handler.send_header(name, str(value))
    handler.send_header('Date', 'Thu, 01 Jan 1970 00:00:00 GMT')
    handler.end_headers()
    if handler.command != 'HEAD': handler.wfile.write(body)

MALFORMED = "The authorization header is malformed; the region 'us-east-1' is wrong; expecting 'eu-central-1'"

@pytest.mark.parametrize('page, words', [
    (amazon_error(301, 'PermanentRedirect', 'eu-central-1'), 'region.*PLANT_S3_REGION to eu-central-1'),
    (amazon_error(400, 'AuthorizationHeaderMalformed', message=MALFORMED), 'region.*PLANT_S3_REGION to eu-central-1'),
    (amazon_error(400, 'AuthorizationHeaderMalformed', fields='<Region>eu-west-3</Region>'), '_REGION to eu-west-3'),
    (amazon_error(403, 'RequestTimeTooSkewed', message='The difference is too large.'), 'clock'),
    (refuse_in_1970, 'clock is .* minutes ahead'),
    (amazon_error(403, 'SignatureDoesNotMatch'), 'secret key'),
    (amazon_error(400, 'ExpiredToken'), 'keys have expired'),
    (amazon_error(403, 'AccessDenied'), 'policy.*another account'),
    (amazon_error(400, 'InvalidRequest', message='No.'), r'InvalidRequest: No\.$')])
def test_an_error_of_amazon_names_region_key_clock_or_policy(page, words):
    with serve_site({'/plants': page, '/plants?list-type=2&prefix=&max-keys=1&encoding-type=url': page}) as site:
        s = settings(store_url='s3://plants', s3_endpoint_url=f'http://127.0.0.1:{site.server_port}',
                     s3_access_key='a', s3_secret_key='b')
        with pytest.raises(StoreError, match=words): open_store(s)

def test_a_wrong_region_or_clock_of_a_source_does_not_reject_its_photos(tmp_path):
    for page, word in [
            (amazon_error(301, 'PermanentRedirect', 'eu-central-1'), 'PLANT_INGEST_S3_REGION to eu-central-1'),
            (amazon_error(403, 'RequestTimeTooSkewed'), 'clock')]:
        with serve_site({'/open/1.jpg': page}) as site:
            row, = fetch(tmp_path/word[-5:], 's3://open/1.jpg', ingest_s3_access_key='a', ingest_s3_secret_key='b',
                         ingest_s3_endpoint_url=f'http://127.0.0.1:{site.server_port}')
        assert row['status'] == 'failed' and word in row['error'], row

def test_names_that_no_bucket_can_have_and_unknown_regions_are_errors_that_say_so():
    keys = dict(s3_access_key='a', s3_secret_key='b', s3_endpoint_url='http://127.0.0.1:9', s3_timeout=1)
    with pytest.raises(StoreError, match='lowercase letters'): open_store(settings(store_url='s3://My Plants', **keys))
    unknown_region = settings(store_url='s3://plants', s3_region='eu central', **keys)
    with pytest.raises(StoreError, match='not a region'): open_store(unknown_region)

def test_keys_that_may_list_only_the_prefix_of_the_store_are_enough():
    listing = b'<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>'
    pages = {'/company': amazon_error(403, 'AccessDenied'),
             '/company?list-type=2&prefix=plants/&max-keys=1&encoding-type=url': listing,
             '/company?list-type=2&prefix=other/&max-keys=1&encoding-type=url': amazon_error(403, 'AccessDenied')}
    with serve_site(pages) as site:
        url = f'http://127.0.0.1:{site.server_port}'
        open_store(settings(store_url='s3://company/plants', s3_endpoint_url=url, s3_access_key='a', s3_secret_key='b'))
        with pytest.raises(StoreError, match='AccessDenied'):
            open_store(settings(store_url='s3://company/other', s3_endpoint_url=url, s3_access_key='a', s3_secret_key='b'))

@pytest.mark.parametrize('status, code, outcome, words', [
    (403, 'InvalidObjectState', 'rejected', ['archived', 'restore']), (501, 'NotImplemented', 'rejected', ['501']),
    (507, 'InsufficientStorage', 'rejected', ['507']), (400, 'EntityTooLarge', 'rejected', ['EntityTooLarge'])])
def test_what_a_new_run_cannot_help_is_not_retried(tmp_path, status, code, outcome, words):
    with serve_site({'/open/1.jpg': amazon_error(status, code), '/1.jpg': amazon_error(status, code)}) as site:
        endpoint = f'http://127.0.0.1:{site.server_port}'
        rows = fetch(tmp_path, 's3://open/1.jpg', 'http://photos.test/1.jpg', connect_to=site.connect_to,
                     ingest_s3_endpoint_url=endpoint, ingest_retries=3)
        assert site.requests == {'/open/1.jpg': 1, '/1.jpg': 1}
    assert [row['status'] for row in rows] == [outcome]*2, rows
    for word in words: assert word in rows[0]['error'] and 'Run again' not in rows[0]['error'], rows

def test_the_error_of_a_source_names_the_setting_that_applies(tmp_path, monkeypatch):
    keys = dict(s3_access_key='a', s3_secret_key='b')
    cases = [ # page, settings, what the error says
        (amazon_error(403, 'AccessDenied'), keys, 'PLANT_INGEST_S3_ENDPOINT_URL'), # as MinIO, if there is no such bucket
        (amazon_error(301, 'PermanentRedirect', 'eu-west-3'), keys, 'PLANT_S3_REGION to eu-west-3'),
        (amazon_error(301, 'PermanentRedirect', 'eu-west-3'), keys | dict(ingest_s3_region='a-b'), 'PLANT_INGEST_S3_REGION'),
        (amazon_error(403, 'InvalidAccessKeyId'), keys | dict(s3_access_key='ASIA1'), 'AWS_SESSION_TOKEN')]
    for i, (page, kw, words) in enumerate(cases):
        with serve_site({'/open/1.jpg': page}) as site:
            row, = fetch(tmp_path/str(i), 's3://open/1.jpg', **kw, s3_endpoint_url=f'http://127.0.0.1:{site.server_port}')
        assert words in row['error'], row
    with pytest.raises(PlantError, match='Set both'):
        SourceBuckets(S3Access('http://127.0.0.1:9', '', 'b')).fetch('S3://open/1.jpg', 9)
    monkeypatch.setenv('AWS_PROFILE', 'nope')
    with pytest.raises(PlantError, match='configuration cannot be used.*nope'):
        SourceBuckets(S3Access('http://127.0.0.1:9')).fetch('s3://open/1.jpg', 9)

def test_a_bucket_of_the_store_that_was_removed_is_an_error_that_names_the_setting():
    with serve_site({'/plants': b'', '/plants/k': amazon_error(404, 'NoSuchBucket')}) as site:
        store = open_store(settings(store_url='s3://plants', s3_endpoint_url=f'http://127.0.0.1:{site.server_port}',
                                    s3_access_key='a', s3_secret_key='b'))
        with pytest.raises(StoreError, match='Create it, or correct PLANT_STORE_URL'): store.get('k')
