"Parts of a work in several processes: killed, interrupted and failing ones."
import json, os, signal, subprocess, sys, threading, time
import psutil, pytest
from helpers import wait_for
from plant_mlops.core.local_engine import LocalEngine

PARTS = '''
"A module with parts that record in a folder that they began, and how they ended."
import json, os, signal, sys, time
from contextlib import closing
from functools import partial
from pathlib import Path
from plant_mlops.core.config import PlantError
from plant_mlops.core.local_engine import LocalEngine

def record(folder, part, event): (folder/f'{part}.{event}').write_text(str(os.getpid()))

def run(folder, seconds, part):
    record(folder, part, 'begun')
    print('a part prints')
    try:
        if part == 'fails': raise PlantError('The part failed. Repair it.')
        if part == 'is wrong': raise KeyError('a mistake')
        time.sleep(seconds)
    except KeyboardInterrupt:
        time.sleep(.3) # as long as the database may take
        record(folder, part, 'interrupted')
        raise
    record(folder, part, 'ended')
    return part

def main(folder, parts, seconds):
    signal.signal(signal.SIGTERM, signal.default_int_handler) # as the command line does
    try:
        function = partial(run, Path(folder), float(seconds))
        with closing(LocalEngine(2, 'PLANT_PROCESSES').run(function, json.loads(parts))) as results:
            for result in results: print(json.dumps(result), flush=True)
    except KeyboardInterrupt: sys.exit(130)
    except PlantError as e: sys.exit(str(e))
'''

class Work:
    "A process that runs parts, each for some seconds."
    def __init__(self, folder, parts, seconds):
        self.folder = folder/'events'
        self.folder.mkdir()
        (folder/'parts.py').write_text(PARTS)
        code = 'import sys, parts; parts.main(*sys.argv[1:])'
        command = [sys.executable, '-c', code, self.folder, json.dumps(parts), str(seconds)]
        self.process = subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def files(self, event) -> list: return sorted(self.folder.glob(f'*.{event}'))

    def parts(self, event) -> list: return [file.stem for file in self.files(event)]

    def wait_for(self, n, event): wait_for(lambda: len(self.files(event)) >= n, 30, f'{n} parts that have {event}')

    def workers(self) -> list:
        "The processes that have begun parts."
        pids = {int(text) for text in (file.read_text() for file in self.files('begun')) if text}
        return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]

    def finish(self, ignored='') -> tuple:
        "Exit code, results, and what was written to standard error; some lines of standard output are ignored."
        output, error = self.process.communicate(timeout=60)
        lines = [line for line in output.splitlines() if line != ignored]
        return self.process.returncode, [json.loads(line) for line in lines], error

def assert_ended(processes):
    def has_ended(process): return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    wait_for(lambda: all(map(has_ended, processes)), 5, 'the end of the workers')

def test_all_parts_are_run_by_two_processes_and_print_to_standard_error(tmp_path):
    work = Work(tmp_path, [*range(6)], .2)
    code, results, error = work.finish()
    assert code == 0, error
    assert sorted(results) == [*range(6)]
    assert error.count('a part prints') == 6
    assert len({file.read_text() for file in work.files('ended')}) == 2

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_interrupted_parts_record_what_they_have_done_and_no_other_begins(tmp_path, number):
    work = Work(tmp_path, [*range(9)], 2)
    work.wait_for(2, 'begun')
    workers = work.workers()
    work.process.send_signal(number)
    code, results, error = work.finish()
    assert code == 130
    assert not results
    assert work.parts('interrupted') == work.parts('begun') == ['0', '1']
    assert 'Traceback' not in error
    assert_ended(workers)

def test_parts_that_were_handed_out_before_an_interruption_do_not_begin_after_it(tmp_path):
    work = Work(tmp_path, [*range(12)], 1)
    work.wait_for(3, 'ended')
    time.sleep(.3)
    begun = work.parts('begun')
    work.process.send_signal(signal.SIGINT)
    start = time.monotonic()
    code, results, error = work.finish()
    assert code == 130, error
    assert work.parts('begun') == begun
    assert sorted([*work.parts('ended'), *work.parts('interrupted')]) == begun
    assert time.monotonic() - start < 3

def test_without_processes_the_parts_run_here_and_their_results_reach_standard_output(tmp_path, monkeypatch):
    monkeypatch.setenv('JOBLIB_MULTIPROCESSING', '0')
    code, results, error = Work(tmp_path, ['a', 'b'], .1).finish(ignored='a part prints')
    assert (code, results) == (0, ['a', 'b']), error

def test_a_second_ctrl_c_does_not_wait(tmp_path):
    work = Work(tmp_path, [*range(9)], 2)
    work.wait_for(2, 'begun')
    workers = work.workers()
    work.process.send_signal(signal.SIGINT)
    time.sleep(.05)
    work.process.send_signal(signal.SIGINT)
    assert work.finish()[0] == 130
    assert_ended(workers)
    assert not work.parts('interrupted')

def test_parts_of_a_killed_process_are_run_again_and_those_that_ended_are_not(tmp_path):
    work = Work(tmp_path, [*range(6)], .5)
    work.wait_for(2, 'ended')
    work.workers()[0].kill()
    code, results, error = work.finish()
    assert code == 0, error
    assert sorted(results) == [*range(6)]

def test_the_processes_end_if_the_one_that_started_them_is_killed(tmp_path):
    work = Work(tmp_path, [*range(4)], 5)
    work.wait_for(2, 'begun')
    workers = work.workers()
    work.process.kill()
    assert_ended(workers)
    assert work.parts('interrupted') == ['0', '1']
    assert not work.parts('ended')

def test_after_an_error_the_other_parts_record_what_they_have_done(tmp_path):
    work = Work(tmp_path, ['a', 'b', 'fails', 'c', 'd'], 1)
    code, results, error = work.finish()
    assert code == 1
    assert error.rstrip().endswith('The part failed. Repair it.')
    assert 'Traceback' not in error
    assert sorted(results) == work.parts('ended')
    assert {*work.parts('begun')} == {'fails', *work.parts('ended'), *work.parts('interrupted')}
    assert 'd' not in work.parts('begun')

def test_a_mistake_in_the_code_of_a_part_shows_its_line(tmp_path):
    code, _, error = Work(tmp_path, ['is wrong', 'a'], 1).finish()
    assert code == 1
    assert "raise KeyError('a mistake')" in error

def test_an_interrupted_work_can_be_run_again_in_the_same_process():
    engine = LocalEngine(2, 'PLANT_PROCESSES')
    def interrupt_soon(): os.kill(os.getpid(), signal.SIGINT)
    threading.Timer(2, interrupt_soon).start()
    with pytest.raises(KeyboardInterrupt): list(engine.run(time.sleep, [20, 20]))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert list(engine.run(time.sleep, [.1, .1])) == [None, None]
