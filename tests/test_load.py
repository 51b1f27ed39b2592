"The load test: it passes on a server that is well, and fails on one that is gone, wrong or too slow."
import json, os, subprocess, sys, urllib.request
from pathlib import Path
import pytest
from conftest import free_port, root, stop, wait_for
from plant_mlops.core.config import settings
from tiny import publish

bin = Path(sys.executable).parent

@pytest.fixture(scope='module')
def server(tmp_path_factory):
    "URL of a real server with the tiny model."
    home, port = tmp_path_factory.mktemp('load'), free_port()
    publish(settings(home=home))
    with open(home/'log', 'wb') as log:
        p = subprocess.Popen([bin/'plant-mlops', 'serve', '--home', home, '--port', str(port)], env=dict(os.environ, PLANT_TOKEN='hush'), stdout=log, stderr=log)
    try:
        wait_for(lambda: urllib.request.urlopen(f'http://127.0.0.1:{port}/ready').status == 200)
        yield f'http://127.0.0.1:{port}'
    finally: stop(p)

def locust(url, seconds, *args):
    "Run the load test; gives its exit code, its figures by name, and the line it ends with."
    cmd = [bin/'locust', '-f', root/'tests/load/locustfile.py', '--headless', '--json', '-u', '8', '-r', '8', '-t', f'{seconds}s', '--host', url, '--think-time', '.3', *args]
    r = subprocess.run([str(o) for o in cmd], capture_output=True, text=True, env=dict(os.environ, PLANT_TOKEN='hush'))
    verdict = next((o for o in r.stdout.splitlines() if o.startswith(('Passed', 'Failed'))), r.stderr[-2000:])
    return r.returncode, {o['name']: o for o in json.loads(r.stdout[r.stdout.index('['):])}, verdict

def test_a_server_that_is_well_passes(server):
    code, figures, verdict = locust(server, 12)
    assert sum(o['num_failures'] for o in figures.values()) == 0, verdict
    assert code == 0 and verdict.startswith('Passed')
    assert {'/predict 256 px', '/predict 2 MP', '/predict 12 MP', '/health'} <= set(figures)
    assert sum(o['num_requests'] for o in figures.values()) > 30

def test_a_server_that_is_too_slow_fails(server):
    code, figures, verdict = locust(server, 3, '--max-p99', '1')
    assert code == 1 and '0.00% failed' in verdict and 'limit 1 ms' in verdict and figures

def test_a_wrong_token_is_a_failure(server):
    code, figures, _ = locust(server, 6, '--token', 'wrong', '--max-fail-ratio', '0')
    assert code == 1 and set(k for k, o in figures.items() if o['num_failures']) == {'/feedback'}

def test_a_server_that_is_gone_fails():
    code, figures, verdict = locust(f'http://127.0.0.1:{free_port()}', 3)
    assert code == 1 and '100.00% failed' in verdict
