"The command line as a script and a person use it."
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest

quick = dict(PLANT_EPOCHS='0', PLANT_IMAGE_SIZE='96', PLANT_BATCH_SIZE='8')

def plant(*args, home, ok=0, **env):
    "Run `plant-mlops`; its standard output."
    r = subprocess.run([Path(sys.executable).with_name('plant-mlops'), *map(str, args), '--home', str(home)], capture_output=True, text=True, env=os.environ | env)
    assert r.returncode == ok, f'{args} ended with {r.returncode}:\n{r.stdout}{r.stderr}'
    return r.stdout if ok in (0, 3, 4, 5) else r.stderr

@pytest.mark.timeout(900)
def test_run_twice_then_on_real_photos(tmp_path):
    from plant_mlops.data.synthetic import draw
    home = tmp_path/'home'
    first = json.loads(plant('run', '--synthetic', 60, '--json', home=home, **quick))
    assert first['source'] == 'synthetic' and first['prediction']['model_version'] == '1' and first['promoted']
    again = plant('ingest', '--json', home=home), plant('prepare', '--json', home=home)
    assert json.loads(again[0])['stored'] == 0 and json.loads(again[1]) | {'seconds': 0} == dict(prepared=0, already=60, failed=0, seconds=0)
    assert json.loads(plant('dataset', '--json', home=home))['version'] == first['dataset']

    for i in range(20):
        for label, drawn in dict(dandelion='dandelion', pré='grass').items():
            f = tmp_path/'mes photos'/label/f'{i} [été].jpg'
            f.parent.mkdir(parents=True, exist_ok=True)
            draw(drawn, seed=1000 + i).save(f)
    table = tmp_path/'table.csv'
    table.write_text('url_source,label\n' + ''.join(f'{f.as_uri()},{f.parent.name}\n' for f in sorted((tmp_path/'mes photos').glob('*/*'))))
    mine = json.loads(plant('run', '--manifest', table, '--json', home=home, **quick))
    assert mine['source'] == 'photos' and set(mine['prediction']['probabilities']) >= {'dandelion', 'pré'} or not mine['promoted']
    state = json.loads(plant('status', '--json', home=home))
    assert state['catalog']['stored'] == 100 and state['version'] == mine['champion']
    photo = next((tmp_path/'mes photos').glob('*/*'))
    bad = tmp_path/'bad.jpg'
    bad.write_bytes(b'')
    lines = [json.loads(o) for o in plant('predict', photo, bad, '--json', home=home, ok=3).splitlines()]
    assert lines[0]['file'] == str(photo) and 'empty' in lines[1]['error']

def test_a_name_with_brackets_prints_as_it_is(tmp_path):
    table = tmp_path/'t.csv'
    table.write_text('url_source,label\nhttp://a.example/x[/b][old].jpg,grass\n')
    plant('catalog', 'load', table, home=tmp_path)
    assert 'x[/b][old].jpg' in plant('catalog', 'list', home=tmp_path)
    assert '[/b].csv' in plant('catalog', 'load', tmp_path/'[/b].csv', home=tmp_path, ok=1)

@pytest.mark.parametrize('args, ok, says', [
    (['predict', 'a.jpg'], 1, 'plant-mlops run'), (['train'], 1, 'no dataset yet'), (['promote'], 1, 'plant-mlops run'), (['rollback'], 1, 'go back to'),
    (['catalog', 'add', '/proc/none'], 1, 'not a folder'), (['catalog', 'list', '--status', 'lost'], 1, 'no status'),
    (['ingest', '--shard', '3/2'], 2, '2/4'), (['cross-validate', '--seeds', '1,x'], 2, '1,2,3')])
def test_what_cannot_be_done_says_why(tmp_path, args, ok, says):
    assert says in ' '.join(plant(*args, home=tmp_path, ok=ok).split())

def test_ctrl_c_says_that_nothing_is_lost(tmp_path):
    p = subprocess.Popen([Path(sys.executable).with_name('plant-mlops'), 'run', '--synthetic', '400', '--home', str(tmp_path)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (tmp_path/'catalog.db').exists(): time.sleep(.05)
    time.sleep(1.5)
    p.send_signal(signal.SIGINT)
    _, said = p.communicate(timeout=60)
    assert p.returncode == 130 and 'Nothing is lost' in said and 'Traceback' not in said, said
