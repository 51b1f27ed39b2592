"The services of docker/compose.yaml together, without Docker: as processes with that file's settings."
import os, shutil, subprocess, sys
import pytest
from conftest import root

pytestmark = pytest.mark.timeout(1800)
need = dict(unshare='util-linux', ip='iproute2', dnsmasq='dnsmasq-base', prometheus='prometheus', **{'prometheus-alertmanager': 'prometheus-alertmanager'})

def test_stack(tmp_path):
    path = os.environ['PATH'] + ':/usr/sbin:/sbin'
    missing = [package for o, package in need.items() if not shutil.which(o, path=path)]
    if missing: pytest.skip(f'not installed: {", ".join(missing)}')
    own = ['unshare', '--net', '--mount', '--propagation', 'private']
    if subprocess.run([*own, 'true'], capture_output=True).returncode: pytest.skip('a network of its own needs root')
    cmd = [*own, sys.executable, '-m', 'pytest', '-x', '-q', '-rP', '-p', 'no:cacheprovider', '-p', 'no:xdist', f'--basetemp={tmp_path}/t', root/'tests/stack/checks.py']
    r = subprocess.run(cmd, env=os.environ | dict(PATH=path), cwd=tmp_path, capture_output=True, text=True)
    print(r.stdout)
    assert r.returncode == 0, r.stdout[-8000:] + r.stderr[-2000:]
