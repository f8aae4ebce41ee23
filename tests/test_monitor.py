"The monitor and `stop` beside real processes: death is said, and what is stopped goes on."
import functools
import json, os, pty, select, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT
from enigma_lab.lab.checkpoint import last_checkpoint
from enigma_lab.lab.monitor import Watcher, look_at_runs, totals
from enigma_lab.lab.runs import Run, list_runs
from enigma_lab.lab.stop import stop_named
from test_door import environment, wait_for

pytestmark = pytest.mark.usefixtures('own_runs')
proof = pytest.mark.proof('lab.monitor', 'lab.stop')

def own_environment(): return dict(environment(), ENIGMA_RUNS=os.environ['ENIGMA_RUNS'])

def start_training(text, *words):
    "Start a small training of a language model."
    command = [sys.executable, '-m', 'enigma_lab.lm.train', 'preset=smoke', f'data={text}',
               'eval_steps=10', 'save_steps=10', 'test=false', 'dropout=.1', *words]
    return subprocess.Popen(command, env=own_environment(), stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)

def at_work(watcher):
    "The only run, once it has written some rows."
    found = []
    def is_here():
        found[:] = [s for s in look_at_runs(watcher) if (s.number('step') or 0) >= 20]
        return bool(found)
    wait_for(is_here)
    status, = found
    return status

def state_of(watcher):
    status, = look_at_runs(watcher)
    return status.state

def time_until(watcher, state):
    "Seconds until the monitor says so."
    begin = time.monotonic()
    while state_of(watcher) != state:
        assert time.monotonic() - begin < 30, state_of(watcher)
        time.sleep(.1)
    return time.monotonic() - begin

@proof
def test_a_training_is_watched_halted_and_killed(toy_text):
    "A process that is halted, or gone, is said well within 30 seconds, though nobody waits for it."
    process, watcher = start_training(toy_text, 'max_steps=4000'), Watcher()
    try:
        status = at_work(watcher)
        assert status.state == 'running' and status.number('loss') and status.pace_s is not None
        process.send_signal(signal.SIGSTOP)
        assert time_until(watcher, 'stalled') < 5
        process.send_signal(signal.SIGCONT)
        assert time_until(watcher, 'running') < 5
        process.kill() # a zombie until the test waits for it
        assert time_until(watcher, 'failed') < 5
    finally: process.kill(); process.wait()
    assert state_of(Watcher()) == 'failed'
    status, = look_at_runs(watcher)
    assert stop_named(status.name) == [f'{status.name} is not stopped: it is failed, '
                                       'its process is gone, and it has no result']

SILENT = """
import time
from enigma_lab.lab import runs
from enigma_lab.lab.runs import beating, start_run
runs.environment, runs.BEAT = dict, .2 # the real environment imports torch, for seconds
run = start_run('train_toy', {})
with beating(run):
    run.log(measure=dict(loss='nll_nats'))
    for step in range(8):
        run.log(step=step, progress=step/100, wall_s=step*.1, loss=1.)
        time.sleep(.1)
    time.sleep(1000) # it lives and beats, and gets on no more
"""

def start_silent():
    return subprocess.Popen([sys.executable, '-c', SILENT], env=own_environment())

def test_a_process_that_beats_and_does_nothing_is_stalled():
    process, watcher = start_silent(), Watcher(patience=2)
    try:
        wait_for(lambda: [s.number('step') for s in look_at_runs(watcher)] == [7])
        assert state_of(watcher) == 'running'
        assert 1 < time_until(watcher, 'stalled') < 6
        assert state_of(Watcher(patience=60)) == 'running' # for the patient it is not
    finally: process.kill(); process.wait()

def test_a_run_of_another_machine_is_known_by_its_beat():
    process = start_silent()
    try:
        wait_for(lambda: [s.number('step') for s in look_at_runs(Watcher())] == [7])
        run, = list_runs()
        run.note(host='elsewhere') # now the process cannot be looked up
        patient = Watcher(patience=3)
        assert state_of(patient) == 'running'
        said, = stop_named(run.name)
        assert f'is on elsewhere; there, `enigma-lab stop {run.name}` ends it' in said
        assert process.poll() is None
        process.kill()
        assert time_until(patient, 'stalled') < 10
    finally: process.kill(); process.wait()

def weights(run): return load_file(run.checkpoint/'model.safetensors')

@proof
def test_stop_leaves_a_checkpoint_that_comes_to_the_same_end(toy_text):
    words = 'max_steps=120', 'decay_share=0'
    assert start_training(toy_text, *words).wait(300) == 0
    whole, = list_runs()
    kept = Path(os.environ['ENIGMA_RUNS']).rename(toy_text.parent/'whole')
    process = start_training(toy_text, *words)
    try:
        status = at_work(Watcher())
        result = piped_own('enigma-lab', 'stop', status.name)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally: process.kill()
    run = Run(status.path)
    step = run.env['stopped_step']
    assert result.returncode == 0 and 0 < step < 120
    assert result.stdout == (f'{status.name} was stopped after step {step}; '
                             f'resume=auto goes on from checkpoint-{step}\n')
    assert state_of(Watcher()) == 'stopped' and last_checkpoint(run).name == f'checkpoint-{step}'
    assert start_training(toy_text, *words, 'resume=auto').wait(300) == 0
    after, before = weights(list_runs()[-1]), weights(Run(kept/whole.name))
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in after)

def piped_own(*command):
    return subprocess.run(command, env=own_environment(), capture_output=True, text=True,
                          timeout=120)

@proof
def test_stop_ends_the_cell_of_a_notebook(toy_text):
    "The kernel is interrupted, as by Jupyter's button; papermill keeps the notebook."
    command = ['papermill', str(ROOT/'nbs'/'train_enigma.ipynb'), '-p', 'preset', 'smoke', '-p',
               'max_steps', '4000', '-p', 'test', 'False', '-p', 'data', str(toy_text)]
    process = subprocess.Popen(command, env=own_environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        status = at_work(Watcher())
        said, = stop_named(everything=True)
        assert process.wait(100) == 1
    finally: process.kill()
    run = Run(status.path)
    assert 'resume=auto goes on from' in said and run.env['stopped'] == 'SIGINT'
    assert 'stopped by SIGINT' in (run.path/'train_enigma.ipynb').read_text()

@proof
def test_stop_ends_a_sweep_and_its_trial(toy_text):
    code = (f"from enigma_lab.lab.sweep import sweep; "
            f"sweep('faults:train_enigma', dict(seed=[0, 1]), 'two', data={str(toy_text)!r}, "
            "preset='smoke', max_steps=4000, save_steps=10)")
    process = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT/'tests',
                               env=dict(own_environment(), PYTHONPATH=f'{ROOT}:{ROOT}/tests'))
    try:
        status = at_work(Watcher())
        assert status.name.startswith('sweeps/two/train_enigma/')
        said = stop_named('two')
        assert process.wait(60) == -signal.SIGTERM
    finally: process.kill()
    assert said[0].startswith(f'{status.name} was stopped after step') and len(said) == 2
    assert Run(status.path).env['stopped'] == 'SIGTERM' and last_checkpoint(Run(status.path))
    assert len(look_at_runs(Watcher())) == 1 # the other trial was not begun

# many records, and damaged ones

def write_record(root, i, finished=True):
    folder = root/f'train_{i % 5}'/f'20260101-{i:06}'
    folder.mkdir(parents=True)
    (folder/'config.json').write_text(json.dumps(dict(data='auto', seed=i)))
    env = dict(started=1.7e9 + i, host='elsewhere', wall_s=3600.) if finished else dict(
        started=1.7e9 + i, host='elsewhere', pid=1, pid_started=1.)
    (folder/'env.json').write_text(json.dumps(env))
    rows = [dict(step=s, progress=s/100, wall_s=2.*s, loss=3 - s/100) for s in range(40)]
    (folder/'history.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    if finished: (folder/'metrics.json').write_text(json.dumps(dict(
        val_bits_per_char=1.5, train_steps=100, train_tokens=1000)))
    return folder

def test_five_hundred_records_are_all_counted(own_runs):
    folders = [write_record(own_runs, i, finished=i % 10 > 0) for i in range(500)]
    found = look_at_runs(Watcher())
    assert sorted(s.path for s in found) == sorted(folders)
    assert Counter(s.state for s in found) == dict(finished=450, running=50)
    total = totals(found)
    assert (total['steps'], total['tokens']) == (450*100 + 50*39, 450_000)
    assert total['hours'] == pytest.approx(450 + 50*78/3600)
    text = piped_own('enigma-lab', 'monitor', '--once').stdout
    assert '500 runs: 50 running, 450 finished' in text
    assert sum(text.count(f'train_{i}/') for i in range(5)) == 500

def test_damaged_records_are_counted_and_hide_nothing(own_runs):
    good, *bad = [write_record(own_runs, i, finished=i != 3) for i in range(9)]
    (bad[0]/'config.json').write_text('{"data": "au')
    (bad[1]/'metrics.json').write_bytes(b'{"val": "\xff\xfe"}')
    (bad[2]/'history.jsonl').write_text('{"step": 5, "loss": 2.5}\n{"step": \n[]\n{"step": 7')
    (bad[3]/'env.json').write_text('[1, 2]')
    (bad[4]/'metrics.json').write_text('')
    (bad[5]/'env.json').unlink()
    (bad[6]/'metrics.json').write_text('{"val_bits_per_char": "many", "warnings": 3}')
    (bad[7]/'config.json').unlink() # a folder without a config is no record
    (own_runs/'train_0'/'records.jsonl').write_text('{"name": "one", "config": {}}\n{"na\n7\n')
    watcher = Watcher()
    found = {s.path: s for s in look_at_runs(watcher)}
    assert len(found) == 9 and watcher.broken == 2
    assert {p for p, s in found.items() if s.state == 'unreadable'} == {
        bad[0], bad[1], bad[3], bad[4]}
    assert found[bad[2]].broken == 2 and found[bad[2]].number('step') == 5
    assert all(s.why for s in found.values() if s.state == 'unreadable')
    result = piped_own('enigma-lab', 'monitor', '--once')
    said = ' '.join(result.stdout.split())
    assert result.returncode == 0 and '4 unreadable, 2 packed lines unreadable' in said
    for folder in [good, *bad[:7]]: # each can be looked at closely
        result = piped_own('enigma-lab', 'monitor', folder.name)
        assert result.returncode == 0, result.stderr

# the terminal

def test_the_terminal_view_goes_on_until_ctrl_c(own_runs):
    write_record(own_runs, 1)
    ours, theirs = pty.openpty()
    # a shell that starts these tests in the background lets them ignore Ctrl-C
    hear = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(['enigma-lab', 'monitor', '--every', '.2'], stdin=theirs,
                               stdout=theirs, stderr=theirs, start_new_session=True,
                               preexec_fn=hear,
                               env=dict(own_environment(), TERM='xterm', COLUMNS='60', LINES='12'))
    os.close(theirs)
    seen = b''
    def read(seconds):
        nonlocal seen
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if not select.select([ours], [], [], .1)[0]: continue
            try: new = os.read(ours, 65536)
            except OSError: return
            if not new: return
            seen += new
    try:
        wait_for(lambda: read(.3) or b'1 run: 1 finished' in seen, 300)
        write_record(own_runs, 2)
        wait_for(lambda: read(.3) or b'2 runs: 2 finished' in seen, 300)
        process.send_signal(signal.SIGINT)
        # whose terminal is not read waits to write
        wait_for(lambda: read(.3) or process.poll() is not None, 300)
        assert process.returncode == 0
        read(1)
    finally: process.kill(); os.close(ours)
    left = seen.partition(b'\x1b[?1049l')[2] # what stays when the screen comes back
    assert b'2 runs: 2 finished' in left and b'train_2/' in left

@pytest.mark.parametrize('words, said', [
    (['monitor', 'nothing'], 'there is no run called nothing under'),
    (['monitor', '--every', '0'], 'every must be above 0 s, got 0'),
    (['monitor', '--patience', '-1'], 'patience must be above 0 s, got -1'),
    (['stop'], 'stop takes a run, a sweep or --all, got neither'),
    (['stop', 'x', '--all'], 'got x and --all'),
    (['stop', 'nothing'], 'there is no run or sweep called nothing')])
def test_wrong_questions(own_runs, words, said):
    result = piped_own('enigma-lab', *words)
    assert result.returncode == 2 and said in result.stderr and result.stdout == ''

def test_runs_are_compared_by_name(own_runs, tmp_path):
    one, two = write_record(own_runs, 1), write_record(own_runs, 2)
    command = ['enigma-lab', 'runs', 'compare', one.name, two.name]
    result = piped_own(*command, '--figure', str(tmp_path/'curves.png'))
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines == [['run', f'train_1/{one.name}', f'train_2/{two.name}'], ['seed', '1', '2']]
    assert (tmp_path/'curves.png').stat().st_size > 1000
    result = piped_own(*command[:4])
    assert result.returncode == 2 and 'comparing takes two runs' in result.stderr
