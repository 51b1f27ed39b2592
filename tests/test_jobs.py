"The jobs as a person, a workflow and a scheduler run them; killed, started twice, fed rubbish."
import json, os, shutil, signal, sqlite3, subprocess, sys, time
from contextlib import suppress
from pathlib import Path
import psutil, pytest
from conftest import photos_dir, wait_for
from test_full_disk import disk, fill_up
from plant_mlops.core.config import PlantError, settings
from plant_mlops.core.store import open_store
from plant_mlops.jobs import table as table
from plant_mlops.jobs.table import Job, chain_to
from plant_mlops.jobs.runs import Busy, find_run, history

pytestmark = pytest.mark.timeout(1200)
quick = dict(PLANT_EPOCHS='0', PLANT_IMAGE_SIZE='96', PLANT_BATCH_SIZE='8', PLANT_PRECISION='fp32')

def command(*args, home=None): return [Path(sys.executable).with_name('plant-mlops'), *map(str, args), *(['--home', str(home)] if home else [])]

def plant(*args, home, ok=0, **env):
    "Run `plant-mlops`; its standard output, or what it said of its failure."
    r = subprocess.run(command(*args, home=home), capture_output=True, text=True, env=os.environ | quick | env)
    assert r.returncode == ok, f'{args} ended with {r.returncode}:\n{r.stdout}{r.stderr}'
    return r.stdout if not ok else r.stdout + ' '.join(r.stderr.split())

def start(*args, home, **env): return subprocess.Popen(command(*args, home=home), env=os.environ | quick | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def drawn(folder, n=20, what=('dandelion', 'grass'), grass=None):
    "A folder of drawn photos: n of each class, or another number of grass; `what` is drawn for each."
    from plant_mlops.data.synthetic import draw
    for label, shown, many in zip(('dandelion', 'grass'), what, (n, grass or n)):
        (folder/label).mkdir(parents=True)
        for i in range(many): draw(shown, seed=i + 1000*(label == 'grass')).save(folder/label/f'{i}.jpg')
    return folder

def few(folder):
    "A few of the real photos where they are here, else drawn ones."
    if not (photos_dir/'plants').is_dir(): return drawn(folder)
    for label in ('dandelion', 'grass'):
        (folder/label).mkdir(parents=True)
        for f in sorted((photos_dir/'plants'/label).iterdir())[:25]: (folder/label/f.name).symlink_to(f)
    return folder

def test_the_chain_resumed_gives_what_run_gives(tmp_path):
    photos = few(tmp_path/'photos')
    env = dict(PLANT_EPOCHS='1')
    one = json.loads(plant('run', '--photos', photos, '--json', home=tmp_path/'run', **env))
    s = settings(home=tmp_path/'jobs')
    plant('job', 'run', '--all', '-p', 'photos', photos, home=s.home, ok=1, PLANT_ARCH='no_such_network', **env)
    assert {r['job']: r['status'] for r in history(s)} == dict(ingest='succeeded', prepare='failed')
    plant('job', 'run', '--resume', home=s.home, **env)
    rows = [r for r in history(s) if r['status'] == 'succeeded'][::-1]
    assert [r['job'] for r in rows] == [j.name for j in chain_to()] and len({r['chain'] for r in history(s)}) == 1
    assert 'came to its end' in plant('job', 'run', '--resume', home=s.home, ok=1)
    by = {r['job']: r['outputs'] for r in rows}
    assert by['prepare']['dataset'] == one['dataset'] and by['promote']['promoted'] == one['promoted']
    assert {k: by['evaluate'][k] for k in ('accuracy', 'n', 'ece')} == {k: one['evaluation'][k] for k in ('accuracy', 'n', 'ece')}
    from plant_mlops.registry.tracking import mlflow_client
    with mlflow_client(s) as c: assert {Path(o.path).suffix for o in c.list_artifacts(by['train']['run'], 'jobs/train')} == {'.ipynb', '.html'}
    again = [json.loads(plant('job', 'run', o, '--json', home=s.home, **env))[0] for o in ('prepare', 'train')] # learns nothing twice
    assert [r['news'] for r in again] == [[], []] and not again[1]['outputs']['trained'] and again[1]['outputs']['version'] == '1'

def registered(home):
    "Versions of the model that MLflow has, finished or not."
    with suppress(sqlite3.OperationalError), sqlite3.connect(f'file:{home}/mlflow.db?mode=ro', uri=True) as c:
        return c.execute("SELECT count(*) FROM model_version_tags WHERE key = 'sha256'").fetchone()[0]
    return 0

def kill(p, kernel):
    "SIGKILL to the runner and to its kernel."
    for o in (p.pid, kernel):
        with suppress(ProcessLookupError): os.kill(o, signal.SIGKILL)
    p.communicate()

def begun(s, job, p):
    "The row of a run that is at work."
    row = lambda: next((r for r in history(s, job, 1) if r['status'] == 'running'), None)
    wait_for(lambda: row() or p.poll() is not None, 60, job)
    return row()

def test_killed_in_each_job(tmp_path):
    home, given, at = tmp_path/'home', dict(ingest=['-p', 'synthetic', 200]), dict(ingest=.5, prepare=3) # seconds into its work
    s = settings(home=home)
    for job in ('ingest', 'prepare', 'train', 'evaluate', 'promote', 'monitor'):
        p = start('job', 'run', job, *given.get(job, []), home=home)
        row = begun(s, job, p)
        assert row, f'{job} was over before it could be killed: {p.communicate()}'
        time.sleep(at.get(job, 0))
        if job == 'train': wait_for(lambda: registered(home), 120, 'the model') # the worst moment: registered, and not yet told
        kill(p, row['pid'])
        wait_for(lambda: find_run(s, row['id'])['status'] == 'killed', 10, 'the end of it')
        plant('job', 'run', job, *given.get(job, []), home=home)
        last, dead = history(s, job, 2)
        assert (last['status'], dead['status'], dead['id']) == ('succeeded', 'killed', row['id'])
    assert registered(home) == 1 and history(s, 'train', 1)[0]['news'] == ['model'] # told by the run that found it
    assert find_run(s, 'promote')['outputs']['promoted']
    from plant_mlops.registry.tracking import mlflow_client
    with mlflow_client(s) as c: assert 'RUNNING' not in {r.info.status for e in c.search_experiments() for r in c.search_runs([e.experiment_id])}

def test_two_starts_at_once_then_sigterm(tmp_path):
    home, s = tmp_path/'home', settings(home=tmp_path/'home')
    plant('job', 'run', 'ingest', '-p', 'synthetic', '40', home=home), plant('job', 'run', 'prepare', home=home)
    two = [start('job', 'run', 'train', home=home, PLANT_EPOCHS='50') for _ in range(2)]
    wait_for(lambda: [p for p in two if p.poll() is not None], 120, 'one of the two')
    refused, works = sorted(two, key=lambda p: p.poll() is None)
    row, = history(s, 'train', None)
    said = ' '.join(refused.communicate()[1].split())
    assert refused.returncode == 6 and f"train is running already: {row['id']}, process {row['pid']} on" in said, said
    works.send_signal(signal.SIGTERM)
    out, err = works.communicate(timeout=60)
    row, = history(s, 'train', None)
    assert works.returncode == 130 and 'Traceback' not in err and (row['status'], row['exit']) == ('cancelled', 130) and row['report'], (out, err)
    wait_for(lambda: not psutil.pid_exists(row['pid']), 10, 'the end of the kernel')

def test_shards_run_side_by_side(tmp_path):
    photos, home = drawn(tmp_path/'photos'), tmp_path/'home'
    two = [start('job', 'run', 'ingest', '-p', 'photos', photos, '-p', 'shard', f'{i}/2', home=home) for i in (1, 2)]
    assert [p.wait() for p in two] == [0, 0], [p.communicate() for p in two]
    assert sum(r['outputs']['stored'] for r in history(settings(home=home))) == 40

@pytest.mark.parametrize('args, ok, says', [
    (['job', 'run', 'trian'], 1, 'did you mean train'), (['job', 'run', 'train', '-p', 'sed', '1'], 2, 'no parameter'), (['job', 'run', 'train', '-p', 'seed', 'x'], 2, 'valid integer'),
    (['job', 'run', '--all', '-p', 'sed', '1'], 2, 'None of ingest'), (['job', 'run', 'ingest', '-p', 'shard', '3/2'], 2, 'such as 2/4'), (['job', 'run', '--resume'], 1, '--all'),
    (['job', 'run'], 2, 'one job, or --all'), (['job', 'run', '--resume', '--ci'], 2, 'begun with'), (['job', 'run', 'train', '-p', '--all'], 2, 'a name and a value'), (['job', 'show', 'lost'], 1, 'job history'), (['job', 'keep', 'lost.ipynb'], 1, 'not there')])
def test_refused_before_anything_starts(tmp_path, args, ok, says):
    assert says in plant(*args, home=tmp_path/'home', ok=ok)
    assert not (tmp_path/'home/store').exists() and not history(settings(home=tmp_path/'home'))

def test_a_notebook_that_is_missing_or_none(tmp_path, monkeypatch):
    from plant_mlops.jobs.runner import run_job
    bad = tmp_path/'bad.ipynb'
    for job in (Job('gone', '', 'g', notebook=str(tmp_path/'gone.ipynb')), Job('bad', '', 'g', notebook=str(bad))):
        bad.write_text('{}')
        monkeypatch.setitem(table.jobs, job.name, job)
        with pytest.raises(PlantError, match='is missing|is not a notebook'): run_job(settings(), job.name)

def test_what_fails_says_why_and_keeps_its_report(tmp_path):
    home = tmp_path/'home'
    said = plant('job', 'run', 'train', home=home, ok=1)
    assert 'train failed: There is no dataset yet. Run `plant-mlops dataset`. The report: file://' in said, said
    row = find_run(settings(home=home), 'train')
    assert (row['status'], row['exit']) == ('failed', 1) and b'There is no dataset yet' in open_store(settings(home=home)).get(row['report'])
    urls = tmp_path/'t.csv'
    urls.write_text('url_source,label\nfile:///nowhere/1.jpg,grass\nfile:///nowhere/2.jpg,grass\n')
    assert '2 of 2 photos did not come' in plant('job', 'run', 'ingest', '-p', 'manifest', urls, home=home, ok=1)

def test_ci_fails_when_the_gate_says_no(tmp_path):
    photos, home = drawn(tmp_path/'photos', 35, ('dandelion', 'dandelion'), grass=7), tmp_path/'home' # nothing to learn: the commonest class is all there is
    rows = json.loads(plant('job', 'run', 'train', '--ci', '-p', 'photos', photos, '--reports', tmp_path/'reports', '--json', home=home, ok=4).splitlines()[0])
    assert rows[-1]['job'] == 'promote' and not rows[-1]['outputs']['promoted']
    assert len(list((tmp_path/'reports').glob('*.ipynb'))) == len(list((tmp_path/'reports').glob('*.html'))) == 5
    assert not (home/'store').exists() # it has a home of its own

def test_scheduler_runs_what_is_due_and_stops_cleanly(tmp_path):
    home, s = tmp_path/'home', settings(home=tmp_path/'home')
    plant('job', 'run', 'ingest', '-p', 'synthetic', '40', home=home) # by hand: and yet the news are told
    env = dict(PLANT_SCHEDULE_EVERY='0.5', PLANT_JOB_GRACE='0', PLANT_SCHEDULES=json.dumps(dict(ingest='', monitor='')))
    p = start('schedule', home=home, **env)
    wait_for(lambda: begun(s, 'train', p), 120, 'prepare, then train') # the photos' news, then the dataset's
    its = psutil.Process(p.pid).children(recursive=True)
    assert its
    p.send_signal(signal.SIGTERM)
    _, log = p.communicate(timeout=60)
    assert p.returncode == 0 and 'prepare starts (photos)' in log and 'train starts (dataset)' in log and 'stopping: ' in log, log
    row = find_run(s, 'train')
    assert (row['status'], row['why']) == ('cancelled', 'dataset') and row['report'] and find_run(s, 'prepare')['report']
    assert not psutil.wait_procs(its, 10)[1], 'something goes on'
    from datetime import timedelta
    from plant_mlops.jobs.scheduler import why_due
    later = row['ended_at'] + timedelta(minutes=2)
    assert why_due(s, table.jobs['train'], history(s), later, later) == 'retry'

def test_what_makes_no_sense_to_a_scheduler(tmp_path):
    assert 'not a cron expression' in plant('schedule', home=tmp_path/'home', ok=1, PLANT_SCHEDULES='{"train": "daily"}')
    assert 'has to be JSON' in plant('schedule', home=tmp_path/'home', ok=1, PLANT_SCHEDULES='daily')

@pytest.mark.parametrize('database', ['postgres', 'mariadb'])
def test_one_at_a_time_on_other_databases(database, request, tmp_path):
    from plant_mlops.jobs import runs
    s = settings(home=tmp_path, catalog_url=request.getfixturevalue(database))
    with pytest.MonkeyPatch.context() as m:
        m.setenv('PLANT_CATALOG_URL', s.catalog_url), m.setenv('PLANT_HOME', str(tmp_path))
        m.setattr(runs, '_patiently', lambda s, eng, row: runs.ask(runs._take, s, eng, row))
        one = runs.begin('monitor')
        with pytest.raises(Busy, match=one.id): runs.begin('monitor')
        assert one.done(answers=3).data['outputs'] == dict(answers=3)
        runs.begin('monitor').fail(ValueError('é' * 3))
    assert [(r['status'], r['error']) for r in history(s)] == [('failed', 'ValueError: ééé'), ('succeeded', None)]

def test_full_disk(disk):
    home = disk/'home'
    plant('job', 'run', 'ingest', '-p', 'synthetic', '40', home=home)
    fill_up(disk)
    assert 'is the disk full?' in plant('job', 'run', 'prepare', home=home, ok=1)   # it cannot even begin
    with open(disk/'filler', 'r+b') as f: f.truncate(f.seek(0, 2) - 300_000)        # room for a line in the record, and for nothing else
    said = plant('job', 'run', 'prepare', home=home, ok=1)
    assert 'Traceback' not in said and 'No space left' in said, said
    kept = Path(said.split('it is in ')[1].rstrip('. \n'))
    assert {o.suffix for o in kept.iterdir()} == {'.ipynb', '.html'}, said
    shutil.rmtree(kept)
    (disk/'filler').unlink()
    plant('job', 'run', 'prepare', home=home)

def test_a_signal_before_the_first_cell(tmp_path):
    p = start('job', 'run', 'monitor', '--why', 'schedule', home=tmp_path/'home')
    wait_for(lambda: psutil.Process(p.pid).children() or p.poll() is not None, 60, 'the kernel')
    p.send_signal(signal.SIGTERM)
    _, err = p.communicate(timeout=60)
    row = find_run(settings(home=tmp_path/'home'), 'monitor')
    assert p.returncode == 130 and (row['status'], row['why'], row['exit']) == ('cancelled', 'schedule', 130) and 'Traceback' not in err, err

def test_a_crashed_put_is_swept(tmp_path):
    from plant_mlops.core.store import place
    s = settings(home=tmp_path)
    open_store(s).put('a', b'1')
    with subprocess.Popen([sys.executable, '-c', '']) as p: pass
    left = open_store(s).tmp/f'{p.pid}@{place()}@x'
    left.touch()
    open_store(s)
    assert not left.exists()

@pytest.mark.parametrize('new, tells', [(19, []), (20, ['dataset'])])
def test_few_new_photos_are_no_news(tmp_path, monkeypatch, new, tells):
    from plant_mlops.registry import registry
    from plant_mlops.jobs import runs
    from plant_mlops.photos import stages
    monkeypatch.setattr(stages, 'new_photos', lambda s: new)
    monkeypatch.setattr(registry, 'versions', lambda s: [dict(version='1')])
    with runs.open_runs(s := settings(home=tmp_path)) as eng: assert runs._news(eng, s, table.jobs['prepare'], dict(dataset='v2')) == tells
