"The load test passes on a good server, and fails on one that is down, wrong or too slow."
import json, os, subprocess, urllib.request
import pytest
from helpers import cli, free_port, programs, root, stop, wait_for
from plant_mlops.core.config import settings
from plant_mlops.registry.example_model import publish_example

@pytest.fixture(scope='module')
def server(tmp_path_factory):
    "URL of a real server with the example model."
    home, port = tmp_path_factory.mktemp('load'), free_port()
    publish_example(settings(home=home))
    command = [*cli, 'serve', '--home', str(home), '--port', str(port)]
    with open(home/'log', 'wb') as log:
        p = subprocess.Popen(command, env=os.environ | dict(PLANT_TOKEN='hush'), stdout=log, stderr=log)
    try:
        wait_for(lambda: urllib.request.urlopen(f'http://127.0.0.1:{port}/ready').status == 200)
        yield f'http://127.0.0.1:{port}'
    finally: stop(p)

def run_locust(url, seconds, *options):
    "Run the load test; returns its exit code, its statistics by name of the request, and the line that sums it up."
    command = [programs/'locust', '-f', root/'tests/load/locustfile.py', '--headless', '--json', '-u', '8', '-r', '8',
               '-t', f'{seconds}s', '--host', url, '--think-time', '.3', *options]
    r = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(PLANT_TOKEN='hush'))
    summaries = [line for line in r.stdout.splitlines() if line.startswith(('Passed', 'Failed'))]
    assert summaries, r.stderr[-2000:]
    statistics = json.loads(r.stdout[r.stdout.index('['):])
    return r.returncode, {row['name']: row for row in statistics}, summaries[0]

def test_a_good_server_passes(server):
    code, statistics, summary = run_locust(server, 12)
    assert sum(row['num_failures'] for row in statistics.values()) == 0, summary
    assert code == 0 and summary.startswith('Passed')
    assert {'/predict 256 px', '/predict 2 MP', '/predict 12 MP', '/health'} <= set(statistics)
    assert sum(row['num_requests'] for row in statistics.values()) > 30

def test_a_slow_server_fails(server):
    code, statistics, summary = run_locust(server, 3, '--max-p99', '1')
    assert code == 1 and '0.00% failed' in summary and 'limit 1 ms' in summary and statistics

def test_a_wrong_token_is_a_failure(server):
    code, statistics, _ = run_locust(server, 6, '--token', 'wrong', '--max-fail-ratio', '0')
    assert code == 1 and {name for name, row in statistics.items() if row['num_failures']} == {'/feedback'}

def test_a_server_that_is_down_fails():
    code, _, summary = run_locust(f'http://127.0.0.1:{free_port()}', 3)
    assert code == 1 and '100.00% failed' in summary
