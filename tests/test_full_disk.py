"Every stage on a disk that is full: a message, nothing lost, and the same command goes on once there is room."
import json, os, subprocess, sys
from pathlib import Path
import pytest

@pytest.fixture
def disk(tmp_path):
    "A disk of 60 MB."
    at = tmp_path/'disk'
    at.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=60m', 'tmpfs', at], capture_output=True).returncode: pytest.skip('mounting a small disk needs root')
    yield at
    subprocess.run(['umount', '-l', at], check=True)

def fill_up(disk: Path):
    "Use every byte that is free."
    try:
        with open(disk/'filler', 'wb', buffering=0) as f:
            for size in (1 << 20, 1 << 12, 1):
                try:
                    while True: f.write(bytes(size))
                except OSError: pass
    except OSError: pass

def plant(*args, home, **env):
    env = os.environ | dict(PLANT_EPOCHS='0', PLANT_IMAGE_SIZE='96', PLANT_BATCH_SIZE='8') | env
    return subprocess.run([Path(sys.executable).with_name('plant-mlops'), *map(str, args), '--home', str(home)], capture_output=True, text=True, env=env)

@pytest.mark.timeout(900)
def test_every_stage_on_a_full_disk(disk, tmp_path):
    from plant_mlops.data.synthetic import draw
    home = disk/'home'
    for i in range(24):
        for label in ('dandelion', 'grass'):
            f = tmp_path/'photos'/label/f'{i}.jpg'
            f.parent.mkdir(parents=True, exist_ok=True)
            draw(label, seed=i).save(f)
    stages = (['catalog', 'add', tmp_path/'photos'], ['ingest', '--json'], ['prepare', '--json'], ['dataset', '--json'], ['train', '--json'], ['evaluate', '--json'], ['promote', '--json'])
    for args in stages:
        fill_up(disk)
        full = plant(*args, home=home)
        print(args[0], full.returncode, full.stderr[-600:])
        assert full.returncode == 1 and 'Traceback' not in full.stderr, f'{args}: {full.stderr}'
        assert 'room' in full.stderr or 'full' in full.stderr or 'space' in full.stderr, f'{args}: {full.stderr}'
        (disk/'filler').unlink()
        done = plant(*args, home=home)
        assert done.returncode == 0, f'{args}: {done.stderr}'
    fill_up(disk)
    answer = plant('predict', '--json', tmp_path/'photos/grass/1.jpg', home=home)
    assert json.loads(answer.stdout)['prediction'] in ('dandelion', 'grass'), answer.stderr
