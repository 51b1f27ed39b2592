"Jobs started by hand, in CI and by the scheduler: killed, started twice, with bad parameters, on a full disk."
import json, os, shutil, signal, sqlite3, subprocess, sys, time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
import psutil, pytest
from helpers import draw_photos, fill_disk, plant, plant_messages, start_plant, wait_for
from plant_mlops.core.config import PlantError, settings
from plant_mlops.core.store import open_store
from plant_mlops.core.workload import Job
from plant_mlops.jobs.runs import JobBusyError, find_run, history
from plant_mlops.jobs.table import chain_for, find_job, job_table

pytestmark = pytest.mark.timeout(1200)

def reports_in_mlflow(s, run_id):
    "Suffixes of the artifacts of the job `train` in an MLflow run."
    from plant_mlops.registry.tracking import mlflow_client
    with mlflow_client(s) as c: return {Path(o.path).suffix for o in c.list_artifacts(run_id, 'jobs/train')}

# -- killed, and started twice

def count_registered(home):
    "Versions of the model that MLflow has, finished or not."
    query = "SELECT count(*) FROM model_version_tags WHERE key = 'sha256'"
    with suppress(sqlite3.OperationalError), sqlite3.connect(f'file:{home}/mlflow.db?mode=ro', uri=True) as c:
        return c.execute(query).fetchone()[0]
    return 0

def kill(process, kernel):
    "SIGKILL to the runner and to its kernel."
    for pid in (process.pid, kernel):
        with suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
    process.communicate()

def running(s, job):
    "The run of a job that is under way, or None."
    return next((r for r in history(s, job, 1) if r.status == 'running'), None)

def wait_for_run(s, job, process):
    "The run that a process begins; None if the process ends before."
    wait_for(lambda: running(s, job) or process.poll() is not None, 60, job)
    return running(s, job)

def start_and_kill(s, job, *args):
    "Start a job or a chain, and kill runner and kernel while `job` runs."
    delays = dict(ingest=.5, prepare=3) # seconds into its work
    process = start_plant('job', 'run', *args, home=s.home)
    run = wait_for_run(s, job, process)
    assert run, f'{job} ended before it could be killed: {process.communicate()}'
    time.sleep(delays.get(job, 0))
    if job == 'train': wait_for(lambda: count_registered(s.home), 120, 'the model') # registered, but not announced
    kill(process, run.pid)
    wait_for(lambda: find_run(s, run.id).status == 'killed', 10, 'the end of the run')

def unfinished_in_mlflow(s):
    "IDs of the runs that MLflow shows as RUNNING."
    from plant_mlops.registry.tracking import mlflow_client
    with mlflow_client(s) as c:
        runs = [run for experiment in c.search_experiments() for run in c.search_runs([experiment.experiment_id])]
    return [run.info.run_id for run in runs if run.info.status == 'RUNNING']

def test_a_chain_that_is_killed_in_each_job_and_resumed_has_the_results_of_one_run(tmp_path):
    expected = json.loads(plant('run', '--synthetic', 60, '--json', home=tmp_path/'run'))
    s = settings(home=tmp_path/'jobs')
    jobs = [job.name for job in chain_for(s)]
    start_and_kill(s, 'ingest', '--all', '-p', 'synthetic', 60)
    plant_messages('job', 'run', '--resume', home=s.home, ok=1, PLANT_ARCH='no_such_network') # fails in prepare
    for job in jobs[1:]: start_and_kill(s, job, '--resume')
    plant('job', 'run', '--resume', home=s.home)
    assert 'is complete' in plant_messages('job', 'run', '--resume', home=s.home, ok=1)

    runs = history(s)
    assert len({run.chain for run in runs}) == 1
    statuses = {job: [run.status for run in runs if run.job == job][::-1] for job in jobs}
    again = ['killed', 'succeeded']
    assert statuses == dict.fromkeys(jobs, again) | dict(prepare=['failed', *again])

    outputs = {run.job: run.outputs for run in runs if run.status == 'succeeded'}
    assert outputs['prepare']['dataset'] == expected['dataset']
    assert outputs['promote']['promoted'] and expected['promoted']
    for name in ('accuracy', 'n', 'ece'): assert outputs['evaluate'][name] == expected['evaluation'][name]

    assert count_registered(s.home) == 1
    assert history(s, 'train', 1)[0].news == ['model'], 'announced by the run that found it'
    assert not unfinished_in_mlflow(s)
    assert reports_in_mlflow(s, outputs['train']['run']) == {'.ipynb', '.html'}

    start_and_kill(s, 'monitor', 'monitor')
    plant('job', 'run', 'monitor', home=s.home)
    assert [run.status for run in history(s, 'monitor')] == ['succeeded', 'killed']

    repeated = {job: json.loads(plant('job', 'run', job, '--json', home=s.home))[0] for job in ('prepare', 'train')}
    assert [run['news'] for run in repeated.values()] == [[], []], 'nothing is new'
    assert not repeated['train']['outputs']['trained'] and repeated['train']['outputs']['version'] == '1'

def test_a_job_cannot_run_twice_at_a_time_and_sigterm_cancels_it(tmp_path):
    s = settings(home=tmp_path/'home')
    plant('job', 'run', 'ingest', '-p', 'synthetic', '40', home=s.home)
    plant('job', 'run', 'prepare', home=s.home)
    two = [start_plant('job', 'run', 'train', home=s.home, PLANT_EPOCHS='50') for _ in range(2)]
    wait_for(lambda: [p for p in two if p.poll() is not None], 120, 'one of the two')
    refused, accepted = sorted(two, key=lambda p: p.poll() is None)
    run, = history(s, 'train', None)
    message = ' '.join(refused.communicate()[1].split())
    assert refused.returncode == 6
    assert f'train is running already: {run.id}, process {run.pid} on' in message

    accepted.send_signal(signal.SIGTERM)
    out, err = accepted.communicate(timeout=60)
    run, = history(s, 'train', None)
    assert accepted.returncode == 130 and 'Traceback' not in err, (out, err)
    assert (run.status, run.exit) == ('cancelled', 130) and run.report
    wait_for(lambda: not psutil.pid_exists(run.pid), 10, 'the end of the kernel')

def test_two_shards_of_the_ingestion_can_run_at_the_same_time(tmp_path):
    photos, s = draw_photos(tmp_path/'photos'), settings(home=tmp_path/'home')
    shards = [['-p', 'photos', photos, '-p', 'shard', f'{i}/2'] for i in (1, 2)]
    processes = [start_plant('job', 'run', 'ingest', *options, home=s.home) for options in shards]
    assert [process.wait() for process in processes] == [0, 0], [process.communicate() for process in processes]
    assert sum(run.outputs['stored'] for run in history(s)) == 40

def test_sigterm_before_the_first_cell_cancels_the_run(tmp_path):
    s = settings(home=tmp_path/'home')
    process = start_plant('job', 'run', 'monitor', '--why', 'schedule', home=s.home)
    wait_for(lambda: psutil.Process(process.pid).children() or process.poll() is not None, 60, 'the kernel')
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and 'Traceback' not in err, err
    run = find_run(s, 'monitor')
    assert (run.status, run.why, run.exit) == ('cancelled', 'schedule', 130)

@pytest.mark.parametrize('database', ['postgres', 'mariadb'])
def test_a_job_cannot_run_twice_at_a_time_on_other_databases(database, request, tmp_path, monkeypatch):
    from plant_mlops.jobs import active_run
    s = settings(home=tmp_path, catalog_url=request.getfixturevalue(database))
    monkeypatch.setenv('PLANT_CATALOG_URL', s.catalog_url)
    monkeypatch.setenv('PLANT_HOME', str(tmp_path))
    monkeypatch.setattr(active_run, '_claim_patiently', active_run.claim_run) # without waiting
    run = active_run.begin('monitor')
    with pytest.raises(JobBusyError, match=run.id): active_run.begin('monitor')
    assert run.done(answers=3).data['outputs'] == dict(answers=3)
    active_run.begin('monitor').fail(ValueError('é'*3))
    assert [(r.status, r.error) for r in history(s)] == [('failed', 'ValueError: ééé'), ('succeeded', None)]

# -- refused, and failed

@pytest.mark.parametrize('args, code, message', [
    ('job run trian', 1, 'did you mean train'),
    ('job run train -p sed 1', 2, 'no parameter'),
    ('job run train -p seed x', 2, 'valid integer'),
    ('job run --all -p sed 1', 2, 'None of ingest'),
    ('job run ingest -p shard 3/2', 2, 'such as 2/4'),
    ('job run --resume', 1, '--all'),
    ('job run', 2, 'one job, or --all'),
    ('job run --resume --ci', 2, '--resume'),
    ('job run train -p --all', 2, 'a name and a value'),
    ('job show lost', 1, 'job history'),
    ('job keep lost.ipynb', 1, 'lost.ipynb')])
def test_wrong_arguments_are_refused_before_the_job_starts(tmp_path, args, code, message):
    home = tmp_path/'home'
    assert message in plant_messages(*args.split(), home=home, ok=code)
    assert not (home/'store').exists() and not history(settings(home=home))

@pytest.mark.parametrize('content, message', [(None, 'is missing'), ('{}', 'is not a notebook')])
def test_a_missing_or_invalid_notebook_is_an_error(tmp_path, monkeypatch, content, message):
    from plant_mlops.jobs.runner import run_job
    file = tmp_path/'bad.ipynb'
    if content: file.write_text(content)
    job = Job('bad', 'A job', 'examples', notebook=str(file), workload='photos')
    monkeypatch.setitem(job_table(settings()).jobs, 'bad', job)
    with pytest.raises(PlantError, match=message): run_job(settings(), 'bad')

def test_a_failed_job_prints_its_error_and_archives_its_report(tmp_path):
    s = settings(home=tmp_path/'home')
    message = plant_messages('job', 'run', 'train', home=s.home, ok=1)
    assert 'train failed: There is no dataset yet.' in message and 'The report: file://' in message
    run = find_run(s, 'train')
    assert (run.status, run.exit) == ('failed', 1)
    assert b'There is no dataset yet' in open_store(s).get(run.report)

def test_the_ingestion_fails_if_too_many_photos_are_lost(tmp_path):
    urls = tmp_path/'urls.csv'
    urls.write_text('url_source,label\nfile:///nowhere/1.jpg,grass\nfile:///nowhere/2.jpg,grass\n')
    message = plant_messages('job', 'run', 'ingest', '-p', 'manifest', urls, home=tmp_path/'home', ok=1)
    assert '2 of 2 photos' in message

def test_ci_fails_if_the_gate_rejects_the_model(tmp_path):
    home, photos, reports = tmp_path/'home', tmp_path/'photos', tmp_path/'reports'
    draw_photos(photos, 35, ['dandelion'])
    draw_photos(tmp_path/'more', 7, ['grass'], seed=1000)
    # these are dandelion photos too, so the labels cannot be learned
    shutil.move(tmp_path/'more'/'grass', photos/'grass')
    args = ['job', 'run', 'train', '--ci', '-p', 'photos', photos, '--reports', reports, '--json']
    rows = json.loads(plant_messages(*args, home=home, ok=4).splitlines()[0])
    assert rows[-1]['job'] == 'promote' and not rows[-1]['outputs']['promoted']
    assert len(list(reports.glob('*.ipynb'))) == len(list(reports.glob('*.html'))) == 5
    assert not (home/'store').exists(), 'CI has a home of its own'

def test_a_job_on_a_full_disk_fails_with_a_message_and_keeps_its_report(disk):
    home = disk/'home'
    plant('job', 'run', 'ingest', '-p', 'synthetic', '40', home=home)
    fill_disk(disk)
    assert 'is the disk full?' in plant_messages('job', 'run', 'prepare', home=home, ok=1) # it cannot start
    with open(disk/'filler', 'r+b') as filler:
        filler.truncate(filler.seek(0, 2) - 300_000) # space for a row of the history, for nothing else
    message = plant_messages('job', 'run', 'prepare', home=home, ok=1)
    assert 'Traceback' not in message and 'No space left' in message, message
    folder = Path(message.split('it is in ')[1].rstrip('. \n'))
    assert {path.suffix for path in folder.iterdir()} == {'.ipynb', '.html'}, message
    shutil.rmtree(folder)
    (disk/'filler').unlink()
    plant('job', 'run', 'prepare', home=home)

def test_files_that_a_dead_process_left_in_the_store_are_removed(tmp_path):
    from plant_mlops.core.process import pid_namespace_id
    s = settings(home=tmp_path)
    open_store(s).put('a', b'1')
    with subprocess.Popen([sys.executable, '-c', '']) as dead: pass
    left = open_store(s).tmp/f'{dead.pid}@{pid_namespace_id()}@x'
    left.touch()
    open_store(s)
    assert not left.exists()

# -- schedules and news

def test_scheduler_runs_what_is_due_and_stops_cleanly(tmp_path):
    from plant_mlops.jobs.scheduler import why_due
    s = settings(home=tmp_path/'home')
    plant('job', 'run', 'ingest', '-p', 'synthetic', '40', home=s.home) # by hand: its news count all the same
    env = dict(PLANT_SCHEDULE_EVERY='0.5', PLANT_JOB_GRACE='0', PLANT_SCHEDULES=json.dumps(dict(ingest='', monitor='')))
    scheduler = start_plant('schedule', home=s.home, **env)
    wait_for(lambda: wait_for_run(s, 'train', scheduler), 120, 'prepare, then train')
    children = psutil.Process(scheduler.pid).children(recursive=True)
    assert children
    scheduler.send_signal(signal.SIGTERM)
    _, log = scheduler.communicate(timeout=60)
    assert scheduler.returncode == 0, log
    for line in ('prepare starts (photos)', 'train starts (dataset)', 'stopping: '): assert line in log, log
    run = find_run(s, 'train')
    assert (run.status, run.why) == ('cancelled', 'dataset') and run.report and find_run(s, 'prepare').report
    assert not psutil.wait_procs(children, 10)[1], 'a child is still running'
    later = run.ended_at + timedelta(minutes=2)
    assert why_due(s, find_job(s, 'train'), history(s), later, later) == 'retry'

@pytest.mark.parametrize('schedules, message', [('{"train": "daily"}', 'not a cron expression'), ('daily', 'JSON')])
def test_bad_schedules_are_refused(tmp_path, schedules, message):
    assert message in plant_messages('schedule', home=tmp_path/'home', ok=1, PLANT_SCHEDULES=schedules)

@pytest.mark.parametrize('new, news', [(19, []), (20, ['dataset'])])
def test_training_is_triggered_only_by_enough_new_photos(tmp_path, monkeypatch, new, news):
    from plant_mlops.jobs.active_run import find_news
    from plant_mlops.jobs.runs import open_runs
    from plant_mlops.photos import stages
    from plant_mlops.registry import registry
    s = settings(home=tmp_path)
    monkeypatch.setattr(stages, 'new_photos', lambda s: new)
    monkeypatch.setattr(registry, 'versions', lambda s: [dict(version='1')])
    with open_runs(s) as engine: assert find_news(engine, s, find_job(s, 'prepare'), dict(dataset='v2')) == news
