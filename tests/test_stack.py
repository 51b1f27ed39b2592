"The services of docker/compose.yaml together, without Docker: as processes with that file's settings."
import os, subprocess, sys
import pytest
from helpers import missing, root, search_path

pytestmark = [pytest.mark.timeout(1800), pytest.mark.needs('unshare', 'ip', 'dnsmasq', 'curl', 'prometheus', 'alertmanager')]

def test_stack(tmp_path):
    "The checks of stack/checks.py, in a network of their own, where each service has its name and its port."
    own_network = ['unshare', '--net', '--mount', '--propagation', 'private']
    if subprocess.run([*own_network, 'true'], capture_output=True).returncode: missing('root', 'for a network of its own')
    options = ['-x', '-q', '-rP', '-p', 'no:cacheprovider', '-p', 'no:xdist', f'--basetemp={tmp_path}/t']
    command = [*own_network, sys.executable, '-m', 'pytest', *options, root/'tests/stack/checks.py']
    r = subprocess.run(command, env=os.environ | dict(PATH=search_path), cwd=tmp_path, capture_output=True, text=True)
    print(r.stdout)
    assert r.returncode == 0, r.stdout[-8000:] + r.stderr[-2000:]
