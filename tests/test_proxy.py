"A server behind a real nginx, over HTTPS and below a path: its pages, its redirects and its API."
import contextlib, datetime, http.client, ipaddress, os, re, socket, subprocess, time
from concurrent.futures import ThreadPoolExecutor
from string import Template
import httpx, pytest
from fastapi.testclient import TestClient
from helpers import fences, free_port, require, root, serving, stop, wait_for
from plant_mlops.core.config import PlantError, settings
from plant_mlops.registry.example_model import example_model, photo_bytes, publish_example
from plant_mlops.serve.api import create_app
from plant_mlops.serve.onnx_model import Model
from plant_mlops.serve.proxy_headers import RESERVED
from plant_mlops.serve.server import run_server

# -- What a server makes of headers

@pytest.fixture(scope='module')
def model(): return Model(example_model())

@contextlib.contextmanager
def client_at(address, model, **options):
    "A client of the API, at an address."
    with TestClient(create_app(settings(**options), model), client=(address, 1), follow_redirects=False) as client:
        yield client

def pages_of(client, **headers) -> str:
    "The text of all pages in which the root path can occur."
    responses = [client.get(path, headers=headers) for path in ('/', '/docs', '/openapi.json', '/docs/')]
    return '\n'.join(response.text + response.headers.get('location', '') for response in responses)

@pytest.mark.parametrize('prefix', [
    '//evil.org', 'https://evil.org', 'javascript:alert(1)', '/a"><script>', "/a'b", '/a b', '/../evil', '/evil//',
    '/evil\\', '/evil?x', '/evil#x', '/%65vil', '/evil, //evil', '/é', '/evil'*100, '/ui', '/models'])
def test_a_hostile_prefix_is_ignored(prefix, model):
    with client_at('127.0.0.1', model) as client:
        sent = {'X-Forwarded-Prefix': prefix.encode('latin-1')}
        assert pages_of(client, **sent) == pages_of(client)

@pytest.mark.parametrize('prefix, root_path', [
    ('/plants', '/plants'), ('/plants/', '/plants'), ('plants', '/plants'), ('/a/b', '/a/b'), ('/a, /b/', '/a/b'),
    ('/', ''), ('', '')])
def test_the_prefix_of_a_trusted_proxy_is_the_root_path(prefix, root_path, model):
    with client_at('127.0.0.1', model) as client:
        sent = {'X-Forwarded-Prefix': prefix}
        servers = client.get('/openapi.json', headers=sent).json().get('servers')
        assert servers == ([{'url': root_path}] if root_path else None)
        assert f'"{root_path}/openapi.json"' in client.get('/docs', headers=sent).text.replace("'", '"')
        assert client.get('/docs/', headers=sent).headers['location'] == f'{root_path}/docs'

@pytest.mark.parametrize('sent', [{}, {'X-Forwarded-Prefix': '/plants'}, {'X-Forwarded-Prefix': '/elsewhere'}])
@pytest.mark.parametrize('setting', ['/plants', 'plants/'])
def test_the_setting_takes_precedence_over_the_prefix(sent, setting, model):
    with client_at('10.0.0.9', model, root_path=setting, trusted_proxies='10.0.0.0/8') as client:
        for path in ('/openapi.json', '/plants/openapi.json'):
            assert client.get(path, headers=sent).json()['servers'] == [{'url': '/plants'}]

def test_headers_are_used_only_if_they_come_from_a_trusted_address(model):
    sent = {'X-Forwarded-Prefix': '/plants', 'X-Forwarded-Proto': 'https', 'X-Forwarded-Host': 'example.org'}
    for address, trusted, expected in [
            ('127.0.0.1', None, 'https://example.org/plants/predict'), ('10.0.0.9', None, 'http://testserver/predict'),
            ('10.0.0.9', '10.0.0.0/8', 'https://example.org/plants/predict'), ('10.0.0.9', '*', 'https://example.org'),
            ('127.0.0.1', '10.0.0.0/8', 'http://testserver/predict')]:
        with client_at(address, model, trusted_proxies=trusted) as client:
            assert f'{expected}' in client.get('/', headers=sent).text, (address, trusted)

def test_a_redirect_never_leads_to_another_server(model):
    with client_at('127.0.0.1', model) as client:
        for path in ('//evil.org/docs/', '/\\evil.org/', '//docs/', '///docs/'):
            location = client.get(f'http://testserver{path}').headers.get('location', '/')
            assert re.match(r'/[^/\\]|/$', location), location
        assert client.get('http://testserver//docs/').headers['location'] == '/docs'

def test_the_metrics_have_no_root_path(model):
    with client_at('127.0.0.1', model, root_path='/plants', models='sums') as client:
        client.get('/plants/models/sums/health')
        client.get('/health')
        text = client.get('/metrics').text
        assert 'route="/health"' in text and 'route="/models/sums/health"' in text and 'plants/' not in text

@pytest.mark.parametrize('setting', [
    dict(root_path='//evil'), dict(root_path='/a b'), dict(root_path='https://a.org/b'), dict(root_path='/docs'),
    dict(trusted_proxies='nginx')])
def test_a_setting_that_is_not_usable_is_reported_before_the_server_starts(setting):
    with pytest.raises(PlantError, match=f'PLANT_{[*setting][0].upper()}'): run_server(settings(port=0, **setting))

def test_the_reserved_paths_are_those_of_the_routes(model):
    app = create_app(settings(), model)
    assert {route.path.split('/')[1] for route in app.routes} - {''} | {'ui'} == RESERVED

# -- nginx

def write_certificate(folder):
    "A certificate for 127.0.0.1, and its key."
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, 'test')])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address('127.0.0.1'))])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - day, now + day)
    certificate = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    (folder/'cert.pem').write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder/'key.pem').write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))

NGINX = Template('''
$user
worker_processes 1;
daemon off;
pid $folder/nginx.pid;
error_log $folder/error.log;
events {}
http {
    access_log off;
    client_body_temp_path $folder/body;
    proxy_temp_path $folder/proxy;
    fastcgi_temp_path $folder/fastcgi;
    uwsgi_temp_path $folder/uwsgi;
    scgi_temp_path $folder/scgi;
    ssl_certificate $folder/cert.pem;
    ssl_certificate_key $folder/key.pem;
$servers
}
''')

@contextlib.contextmanager
def nginx(folder, **locations):
    "Run nginx with a server for each argument, whose value is its locations; yields the URL of each."
    folder.mkdir()
    write_certificate(folder)
    ports = {name: free_port() for name in locations}
    servers = [f'server {{ listen 127.0.0.1:{ports[name]} ssl;\n{text}\n}}' for name, text in locations.items()]
    user = 'user root;' if os.geteuid() == 0 else ''
    (folder/'nginx.conf').write_text(NGINX.substitute(folder=folder, servers='\n'.join(servers), user=user))
    command = [require('nginx'), '-p', folder, '-c', folder/'nginx.conf', '-e', folder/'error.log']
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: all(socket.create_connection(('127.0.0.1', port)).close() is None for port in ports.values()))
        yield {name: f'https://127.0.0.1:{port}' for name, port in ports.items()}
    finally: stop(process)

def guide_location(url) -> str:
    "The location of the guide, for an API at a URL."
    text, = [text for kind, text in fences('nbs/guides/services.ipynb') if kind.startswith('{.nginx')]
    return text.replace('http://127.0.0.1:8000', url)

def location(path, proxy_pass, *headers) -> str:
    "A location of nginx that sends a request's host, and some other headers."
    lines = [f'proxy_set_header {header};' for header in ('Host $http_host', *headers)]
    return f'location {path} {{ proxy_pass {proxy_pass}; {" ".join(lines)} client_max_body_size 20m; }}'

@pytest.fixture(scope='module')
def sites(tmp_path_factory):
    """URLs below which nginx serves two servers, one with PLANT_ROOT_PATH=/a/b/ and one without it.

    guide: as the guide says. kept: nginx does not remove the path. bare: the location has no slash at the end, and the
    server is not told the host. nested: the path of the setting is removed. nested_kept: it is not."""
    require('nginx')
    folder = tmp_path_factory.mktemp('proxy')
    home = folder/'home'
    publish_example(settings(home=home), '3')
    with contextlib.ExitStack() as stack:
        monkeypatch = stack.enter_context(pytest.MonkeyPatch.context())
        monkeypatch.setenv('GRADIO_TEMP_DIR', str(folder/'gradio'))
        def start(**env): return str(stack.enter_context(serving(settings(home=home), workers=1, **env))[1].base_url)
        with ThreadPoolExecutor() as pool:
            plain = pool.submit(start, token='hush')
            nested = pool.submit(start, root_path='/a/b/', keep_alive=2)
        url, nested_url = plain.result().rstrip('/'), nested.result().rstrip('/')
        https = 'X-Forwarded-Proto $scheme'
        first = [guide_location(url), location('/kept', url, https, 'X-Forwarded-Prefix /kept'),
                 f'location /bare {{ proxy_pass {url}/; proxy_set_header X-Forwarded-Prefix /bare/; }}']
        second = location('/a/b/', f'{nested_url}/', https, 'X-Forwarded-Prefix /a/b')
        third = location('/', nested_url, https)
        ports = stack.enter_context(nginx(folder/'nginx', first='\n'.join(first), second=second, third=third))
        wait_for(lambda: httpx.get(f'{url}/ui/').status_code == 200, what='page')
        wait_for(lambda: httpx.get(f'{nested_url}/ui/').status_code == 200, what='page')
        yield dict(guide=f'{ports["first"]}/plants', kept=f'{ports["first"]}/kept', bare=f'{ports["first"]}/bare',
                   nested=f'{ports["second"]}/a/b', nested_kept=f'{ports["third"]}/a/b', plain=url,
                   impatient=nested_url)

ALL_SITES = ['guide', 'kept', 'bare', 'nested', 'nested_kept']

@pytest.fixture
def https():
    with httpx.Client(verify=False, timeout=20) as client: yield client

@pytest.mark.needs('nginx')
@pytest.mark.parametrize('name', ALL_SITES)
def test_every_link_and_redirect_stays_below_the_path(name, sites, https):
    site = sites[name]
    path = httpx.URL(site).path
    home = https.get(f'{site}/')
    base = home.url.join(re.search('<base href="(.*?)">', home.text)[1])
    links = re.findall(r'<(?:a|link)[^>]* href="?([^">]+)', home.text)
    assert len(links) >= 6
    for link in links:
        response = https.get(base.join(link))
        assert (response.status_code, str(response.url).startswith(site)) == (200, True), link
    for redirected in ('/docs/', '/ui', '/health/?a=1'):
        response = https.get(f'{site}{redirected}')
        target = response.headers['location']
        assert target.startswith(f'{path}/') and '//' not in target, f'{redirected} leads to {target}'
        assert https.get(response.url.join(target)).status_code == 200
    assert https.get(f'{site}/openapi.json').json()['servers'] == [{'url': path}]
    assert https.get(f'{site}/nowhere').status_code == 404
    for answered in ('/', '/health', '/ui/'): assert https.head(f'{site}{answered}').status_code == 200
    assert https.post(f'{site}/predict', content=photo_bytes('gold')).json()['prediction'] == 'dandelion'
    scheme, host = ('http', '127.0.0.1') if name == 'bare' else ('https', httpx.URL(site).netloc.decode())
    assert re.search(fr'<pre>.*{scheme}://{host}.*{path}/predict</pre>', home.text)

@pytest.mark.needs('nginx')
@pytest.mark.parametrize('name', ALL_SITES)
def test_the_path_without_its_slash_is_the_home_page(name, sites, https):
    response = https.get(sites[name], follow_redirects=True)
    assert 'Dandelion or grass?' in response.text and f'<base href="{httpx.URL(sites[name]).path}/">' in response.text

@pytest.fixture(scope='module')
def chromium():
    require('playwright')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=require('chromium'), args=['--no-sandbox'])
        yield browser
        browser.close()

@contextlib.contextmanager
def open_page(chromium, url):
    "A page at a URL; it may request nothing from elsewhere than below the URL, and log no error."
    context = chromium.new_context(ignore_https_errors=True)
    page, urls, errors = context.new_page(), [], []
    page.set_default_timeout(90_000)
    page.on('request', lambda request: urls.append(request.url))
    page.on('pageerror', lambda error: errors.append(str(error)))
    # a browser requests the icon of the host before a script of Gradio says that the page has another one
    page.on('console', lambda message: message.type == 'error' and not message.location['url'].endswith('/favicon.ico')
            and errors.append(f'{message.text} {message.location}'))
    page.goto(f'{url}/')
    yield page
    context.close()
    assert not [requested for requested in urls if not requested.startswith((f'{url}/', 'data:', 'blob:'))]
    assert not errors

@pytest.mark.needs('nginx', 'chromium', 'gradio')
@pytest.mark.parametrize('name', ['guide', 'bare', 'nested_kept'])
def test_an_upload_gets_an_answer_in_a_browser(name, chromium, sites, tmp_path):
    (tmp_path/'a.jpg').write_bytes(photo_bytes('gold'))
    with open_page(chromium, sites[name]) as page:
        page.click('text=Try it on a photo')
        page.wait_for_selector('h1:has-text("Dandelion or grass?")')
        assert page.url == f'{sites[name]}/ui/'
        assert page.evaluate("document.querySelector('link[rel=icon]').href") == f'{sites[name]}/favicon.ico'
        page.set_input_files('.pm-photo input[type=file]', str(tmp_path/'a.jpg'))
        page.wait_for_selector('.pm-card h2:has-text("dandelion")')
        page.wait_for_function("document.querySelector('.pm-heat img')?.naturalWidth > 100")
        page.click('button[role=tab]:has-text("Many photos")')
        page.set_input_files('.pm-many input[type=file]', [str(tmp_path/'a.jpg')])
        page.wait_for_selector('.pm-table td:has-text("dandelion")')
        with page.expect_download() as download: page.click('text=Save as CSV')
        assert 'dandelion' in open(download.value.path(), encoding='utf-8-sig').read()

@pytest.mark.needs('nginx', 'chromium')
@pytest.mark.parametrize('name', ['kept', 'nested'])
def test_a_request_can_be_tried_on_the_page_of_the_api(name, chromium, sites):
    with open_page(chromium, sites[name]) as page:
        page.click('text=Documentation of the API')
        page.click('text=Check that the server is up')
        page.click('text=Try it out')
        page.click('button:has-text("Execute")')
        page.wait_for_selector('.live-responses-table .response-col_status:has-text("200")')
        assert f'{sites[name]}/health' in page.inner_text('.request-url')

@pytest.mark.needs('nginx', 'gradio')
def test_event_streams_are_not_buffered_by_nginx(sites):
    with httpx.stream('GET', f'{sites["plain"]}/ui/gradio_api/heartbeat/1') as response:
        assert response.headers['content-type'].startswith('text/event-stream')
        assert response.headers['x-accel-buffering'] == 'no'

# -- Connections

@pytest.mark.needs('nginx')
def test_an_idle_connection_is_closed_as_the_setting_says(sites):
    "The default is longer than the minute that a balancer keeps a connection."
    assert settings().keep_alive > 60
    def connect(name):
        connection = http.client.HTTPConnection(sites[name].removeprefix('http://'), timeout=5)
        connection.request('GET', '/health')
        connection.getresponse().read()
        return connection
    default, impatient = connect('plain'), connect('impatient')
    time.sleep(6) # longer than uvicorn's default of five seconds
    assert impatient.sock.recv(1) == b'', 'PLANT_KEEP_ALIVE=2 keeps a connection for six seconds'
    same = default.sock
    default.request('GET', '/health')
    assert default.getresponse().status == 200 and default.sock is same
