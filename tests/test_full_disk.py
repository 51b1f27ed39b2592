"Every stage on a full disk: a message, nothing lost, and the same command goes on once there is space."
import json
import pytest
from helpers import draw_photos, fill_disk, run_plant

STAGES = ('ingest', 'prepare', 'dataset', 'train', 'evaluate', 'promote')

@pytest.mark.timeout(900)
def test_every_stage_fails_on_a_full_disk_with_a_message_and_then_succeeds(disk, tmp_path):
    home, photos = disk/'home', tmp_path/'photos'
    draw_photos(photos, 24)
    for command in (['catalog', 'add', photos], *([stage, '--json'] for stage in STAGES)):
        fill_disk(disk)
        full = run_plant(*command, home=home, PLANT_PRECISION='auto')
        assert full.returncode == 1 and 'Traceback' not in full.stderr, f'{command}: {full.stderr}'
        assert 'full' in full.stderr or 'space' in full.stderr, f'{command}: {full.stderr}'
        (disk/'filler').unlink()
        again = run_plant(*command, home=home, PLANT_PRECISION='auto')
        assert again.returncode == 0, f'{command}: {again.stderr}'
    fill_disk(disk)
    answer = run_plant('predict', '--json', photos/'grass/1.jpg', home=home)
    assert json.loads(answer.stdout)['prediction'] in ('dandelion', 'grass'), answer.stderr
