"The services of docker/compose.yaml together, without Docker: as processes with that file's settings."
import os, subprocess, sys
import pytest
from helpers import missing, root, search_path

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.needs('unshare', 'ip', 'dnsmasq', 'curl', 'prometheus', 'alertmanager')]

def test_stack(tmp_path):
    "Run stack/checks.py in a network of its own, where each service has its name and its port."
    own_network = ['unshare', '--net', '--mount', '--propagation', 'private']
    is_allowed = subprocess.run([*own_network, 'true'], capture_output=True).returncode == 0
    if not is_allowed: missing('root', 'for a network of its own')
    options = ['-x', '-q', '-rP', '-p', 'no:cacheprovider', '-p', 'no:xdist', f'--basetemp={tmp_path}/t']
    command = [*own_network, sys.executable, '-m', 'pytest', *options, root/'tests/stack/checks.py']
    env = os.environ | dict(PATH=search_path)
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
