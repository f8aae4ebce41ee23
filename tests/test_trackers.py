"Trackers: a copy is complete, and nothing that befalls one ends a run."
import gzip, io, json, os, struct, subprocess, sys, tempfile, threading
from dataclasses import replace
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from enigma_lab.lab.runs import Run, finish_run, list_runs, start_run, weights_digest
from enigma_lab.lab.trackers import (
    OPENERS, Tracker, check_tracker, open_tracker, show_results, tracker_notes)

KEY = '0123456789' * 4
LOSSES = [1/step for step in range(1, 21)]

pytestmark = pytest.mark.usefixtures('own_runs')

def one_line(caplog):
    "The only warning."
    line, = [r.getMessage() for r in caplog.records if r.name.startswith('enigma_lab')]
    assert '\n' not in line
    return line

def test_tensorboard_read_back():
    run = start_run('loop', dict(dim=8, preset='tiny'))
    with open_tracker('tensorboard', run, project='rotors', experiment='a-trial') as tracker:
        for step, loss in enumerate(LOSSES, 1):
            row = dict(step=step, loss=loss, grad_norm=None, note='text', tokens=step*100)
            run.log(**row)
            tracker.log(**row)
    events = EventAccumulator(str(run.path/'tensorboard')).Reload()
    assert events.Tags()['scalars'] == ['loss', 'tokens']
    assert [(e.step, e.value) for e in events.Scalars('loss')] == [
        (row['step'], np.float32(row['loss'])) for row in run.history
    ]
    text = events.Tensors('config/text_summary')[0].tensor_proto.string_val[0].decode()
    assert json.loads(text) == dict(dim=8, preset='tiny', project='rotors', experiment='a-trial')

def test_none_writes_nothing():
    run = start_run('loop', {})
    before = sorted(run.path.rglob('*'))
    with open_tracker('none', run) as tracker: tracker.log(1, loss=2.)
    assert sorted(run.path.rglob('*')) == before

def test_the_same_object_serves_the_trainer():
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Line(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = torch.nn.Parameter(torch.zeros(1))
        def forward(self, x, labels): return dict(loss=((self.slope*x - labels)**2).mean())

    class Copy(TrainerCallback):
        def __init__(self, tracker): self.tracker = tracker
        def on_log(self, args, state, control, logs=None, **kwargs):
            if state.is_world_process_zero: self.tracker.log(state.global_step, **logs)

    run = start_run('loop', {})
    data = [dict(x=torch.tensor([float(i)]), labels=torch.tensor([2.*i])) for i in range(8)]
    with open_tracker('tensorboard', run) as tracker:
        arguments = TrainingArguments(
            str(run.path / 'checkpoints'),
            use_cpu=True,
            max_steps=4,
            logging_steps=1,
            report_to='none',
            save_strategy='no',
            disable_tqdm=True,
        )
        trainer = Trainer(Line(), arguments, train_dataset=data, callbacks=[Copy(tracker)])
        trainer.train()
    events = EventAccumulator(str(run.path/'tensorboard')).Reload()
    assert [(e.step, e.value) for e in events.Scalars('loss')] == [
        (row['step'], np.float32(row['loss'])) for row in trainer.state.log_history if 'loss' in row
    ]

@pytest.mark.parametrize('kind', [
    'mlflow', 'WandB', '', None, ['wandb'], 'none,wandb', 'wandb,wandb'])
def test_unknown_kind(kind):
    with pytest.raises(ValueError) as error: check_tracker(kind)
    assert str(error.value) == (
        "tracker must be 'none', or of 'wandb', 'tensorboard', 'swanlab' one or several with "
        f"commas between them, got {kind!r}"
    )

@pytest.mark.parametrize('kind', ['wandb', 'tensorboard', 'swanlab'])
def test_missing_package(kind, monkeypatch):
    run = start_run('loop', {})
    monkeypatch.setitem(sys.modules, kind, None)
    hint = rf"pip install 'enigma_lab\[{'swanlab' if kind == 'swanlab' else 'lm'}\]'"
    for call in (lambda: check_tracker(kind), lambda: open_tracker(kind, run)):
        with pytest.raises(ModuleNotFoundError, match=hint): call()
    check_tracker('none')

def test_a_folder_called_wandb_is_no_package(tmp_path):
    (tmp_path/'wandb').mkdir()
    code = f"""import sys
sys.path[:] = [{str(tmp_path)!r}] + [p for p in sys.path if 'site-packages' not in p]
from importlib.util import find_spec
assert find_spec('wandb') and find_spec('wandb').origin is None
from enigma_lab.lab.trackers import check_tracker
check_tracker('wandb')"""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    result = subprocess.run(
        [sys.executable, '-c', code],
        env=os.environ | dict(PYTHONPATH=root),
        capture_output=True,
        text=True,
    )
    assert "ModuleNotFoundError: tracker='wandb'" in result.stderr

@pytest.mark.parametrize('fails', ['write', 'close', 'both'])
def test_a_backend_that_raises_does_not_end_the_loop(fails, monkeypatch, caplog):
    def write(step, numbers):
        if step >= 3 and fails != 'close': raise RuntimeError('the cable\nis cut')
    def close(failed):
        if fails != 'write': raise OSError('no space left')
    monkeypatch.setitem(OPENERS, 'tensorboard', lambda place: (write, close))
    run = start_run('loop', {})
    with open_tracker('tensorboard', run) as tracker:
        for step in range(1, 9):
            run.log(step=step)
            tracker.log(step, loss=1.)
    assert len(run.history) == 8 and not tracker.on
    assert one_line(caplog) == 'tracker tensorboard failed and is off, the run goes on: ' + (
        'no space left' if fails == 'close' else 'the cable'
    )

def test_a_real_writer_that_breaks_midway(monkeypatch, caplog):
    from torch.utils.tensorboard import SummaryWriter
    add, run = SummaryWriter.add_scalar, start_run('loop', {})
    def breaks(self, name, value, step):
        if step == 4: raise OSError('no space left on device')
        add(self, name, value, step)
    monkeypatch.setattr(SummaryWriter, 'add_scalar', breaks)
    with open_tracker('tensorboard', run) as tracker:
        for step in range(1, 9): tracker.log(step, loss=1.)
    assert 'no space left on device' in one_line(caplog)
    assert [
        e.step for e in EventAccumulator(str(run.path / 'tensorboard')).Reload().Scalars('loss')
    ] == [1, 2, 3]  # what came before is kept

def test_a_tracker_that_does_not_open(caplog):
    run = start_run('loop', {})
    (run.path/'tensorboard').write_text('in the way')
    with open_tracker('tensorboard', run) as tracker: tracker.log(1, loss=1.)
    told = one_line(caplog)
    assert told.startswith('tracker tensorboard could not be opened, the run goes on without it: ')
    assert tracker_notes(run)['tensorboard']['failed'] in told

def test_an_error_in_the_loop_is_passed_on_and_marked():
    closed = []
    with pytest.raises(FloatingPointError):
        with Tracker(lambda step, numbers: None, closed.append):
            raise FloatingPointError('the loss must stay finite')
    assert closed == [True]

def test_a_failed_tracker_is_left_alone_and_taken_up_by_the_resumed_run(monkeypatch, caplog):
    written, broken = [], [True]
    def write(step, values):
        if broken[0] and step == 3: raise OSError('no space left')
        written.append(step)
    monkeypatch.setitem(OPENERS, 'wandb', lambda place: (write, None))
    monkeypatch.setitem(OPENERS, 'tensorboard', lambda place: (lambda *_: None, None))
    first, second = [start_run('loop', dict(tracker='wandb,tensorboard')) for _ in range(2)]
    with open_tracker('wandb,tensorboard', first) as tracker:
        for step in range(1, 6): first.log(step=step); tracker.log(step)
        assert tracker.on # the other one
    show_results(finish_run(first, dict(loss=1.)))
    notes = tracker_notes(first)
    assert (notes['wandb']['failed'], notes['wandb']['step']) == ('no space left', 2)
    assert 'no space left' in one_line(caplog) and written == [1, 2]
    broken[0] = False
    for row in first.history[:4]: second.log(**row) # resumed at step 4
    with open_tracker('wandb', second, origin=first) as tracker: tracker.log(5)
    assert written == [1, 2, 3, 4, 5]
    assert tracker_notes(second)['wandb']['id'] == notes['wandb']['id']
    assert 'failed' not in tracker_notes(second)['wandb']

@pytest.mark.parametrize('killed', [False, True])
def test_what_a_killed_process_may_have_lost_is_written_again(killed, monkeypatch):
    written = []
    monkeypatch.setitem(
        OPENERS, 'wandb', lambda place: (lambda step, values: written.append(step), None))
    first, second = [start_run('loop', dict(tracker='wandb')) for _ in range(2)]
    tracker = open_tracker('wandb', first).__enter__()
    for step in range(1, 6): first.log(step=step); tracker.log(step)
    if not killed: tracker.__exit__(None)
    for row in first.history[:3]: second.log(**row)
    with open_tracker('wandb', second, origin=first) as tracker: tracker.log(4)
    assert written == [1, 2, 3, 4, 5] + ([1, 2, 3] if killed else []) + [4]

# a training with three trackers, taken up at step 3, and what each has of it by its own reader

TRACKED = """
import sys
from matplotlib import pyplot as plt
from enigma_lab.lab.runs import finish_run, start_run
from enigma_lab.lab.trackers import open_tracker, show_results
config = dict(tracker=sys.argv[1], dim=8)
first, run = [start_run('loop', config, note) for note in ('first', 'resumed')]
with open_tracker(config['tracker'], first) as tracker:
    for step in range(1, 6): first.log(step=step, loss=1/step); tracker.log(step, loss=1/step)
for row in first.history[:3]: run.log(**row)
with open_tracker(config['tracker'], run, origin=first) as tracker:
    for step in range(4, 9): run.log(step=step, loss=1/step); tracker.log(step, loss=1/step)
show_results(finish_run(run, dict(test_bits=1.5, warnings=['none'])))
run.figure('loss', plt.figure(figsize=(2, 1)))
run.sample('poem', 'Roses are <red>')
for _ in range(2): show_results(run)
"""

@pytest.fixture(scope='module')
def tracked(tmp_path_factory):
    "The record of the resumed run, whose trackers are those that are installed."
    folder = tmp_path_factory.mktemp('tracked')
    kinds = [kind for kind in OPENERS if find_spec(kind)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(('WANDB_', 'SWANLAB_'))}
    with tempfile.TemporaryDirectory() as scratch: # short, for wandb's socket
        env = clean | dict(HOME=str(folder), ENIGMA_RUNS=str(folder/'runs'), TMPDIR=scratch)
        done = subprocess.run(
            [sys.executable, '-c', TRACKED, ','.join(kinds)],
            env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and 'tracker ' not in done.stderr, done.stderr
    path, = folder.glob('runs/loop/*-resumed')
    assert set(kinds) < tracker_notes(Run(path)).keys()
    return Run(path)

def read_tensorboard(run, home, id):
    events = EventAccumulator(str(home/'tensorboard')).Reload()
    scalars = {k: [(e.step, e.value) for e in events.Scalars(k)] for k in events.Tags()['scalars']}
    picture, = events.Images('figures/loss')
    text, = events.Tensors('samples/poem/text_summary')
    return scalars, picture.encoded_image_string, text.tensor_proto.string_val[0].decode()

def read_wandb(run, home, id):
    scalars, media = {}, {}
    folders = sorted((home/'wandb').glob('offline-run-*'))
    for folder in folders:
        for record in records(folder/f'run-{id}.wandb'):
            if record.HasField('run'): assert record.run.run_id == id
            row = {(*i.nested_key,): json.loads(i.value_json) for i in record.history.item}
            for (key, *part), value in row.items():
                if part == ['path']: media[key] = (folder/'files'/value).read_bytes()
                if not part: scalars.setdefault(key, {})[row['_step',]] = value
    scalars = {key: [*values.items()] for key, values in scalars.items()}
    return scalars, media['figures/loss'], unescape(media['samples/poem'].decode())

def read_swanlab(run, home, id):
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader
    scalars, media = {}, {}
    for folder in sorted((home/'swanlog').glob('run-*')):
        reader = DataStoreReader()
        reader.open(folder/f'run-{id}.swanlab')
        for record in map(Record.FromString, reader):
            if record.HasField('start'): assert record.start.id == id
            if record.HasField('scalar'):
                scalars.setdefault(record.scalar.key, {})[record.scalar.step] = (
                    record.scalar.value.number)
            if record.HasField('media'):
                file, = [f for item in record.media.value.items
                         for f in folder.rglob(item.filename)]
                media[record.media.key] = file.read_bytes()
    scalars = {key: [*values.items()] for key, values in scalars.items()}
    return scalars, media['figures/loss'], media['samples/poem'].decode()

@pytest.mark.parametrize('kind', [*OPENERS])
def test_a_resumed_run_is_one_run_with_final_numbers_figure_and_sample(tracked, kind):
    pytest.importorskip(kind)
    notes = tracker_notes(tracked)[kind]
    home = tracked.path/notes['home']
    assert home.resolve().name.endswith('-first') and not (tracked.path/kind).exists()
    scalars, picture, text = globals()[f'read_{kind}'](tracked, home, notes['id'])
    kept = np.float32 if kind != 'wandb' else float
    assert [(s, kept(v)) for s, v in scalars['loss']] == [
        (row['step'], kept(row['loss'])) for row in tracked.history]
    assert [v for _, v in scalars['final/test_bits']] == [1.5]
    pixels = [np.asarray(Image.open(file).convert('RGB')) for file in
              (io.BytesIO(picture), tracked.path/'figures'/'loss.png')]
    assert np.array_equal(*pixels)
    assert 'Roses are <red>' in text

@pytest.mark.parametrize('fails', ['never', 'at the start', 'in the middle', 'at the end'])
def test_a_tracker_that_raises_leaves_the_same_weights(fails, toy_text, monkeypatch, caplog):
    from enigma_lab.lm.train import make_config, train
    def opener(place):
        if fails == 'at the start': raise ConnectionError('the cable is cut')
        def write(step, values):
            if fails == 'in the middle' and step > 1: raise ConnectionError('the cable is cut')
        def close(failed):
            if fails == 'at the end': raise ConnectionError('the cable is cut')
        return write, close
    monkeypatch.setitem(OPENERS, 'tensorboard', opener)
    plain = make_config('smoke', data=str(toy_text), max_steps=4)
    run = train(replace(plain, tracker='tensorboard'), test=False)
    assert run.finished and ('failed' in tracker_notes(run)['tensorboard']) == (fails != 'never')
    if fails != 'never': assert 'the cable is cut' in one_line(caplog)
    assert weights_digest(run.checkpoint) == weights_digest(train(plain, test=False).checkpoint)

# wandb keeps its state for the life of a process, so each of its cases gets one

LOOP = """
from enigma_lab.lab import runs
from enigma_lab.lab.runs import finish_run, start_run
from enigma_lab.lab.trackers import open_tracker
runs.environment = dict # the real one imports torch, for seconds
run = start_run('loop', dict(dim=8, seed=0))
with open_tracker('wandb', run, experiment='a-trial') as tracker:
    MIDWAY
    for step in range(1, 21):
        row = dict(step=step, loss=1/step, note=None)
        run.log(**row)
        tracker.log(**row)
finish_run(run, dict(loss=row['loss']))
"""

def loop(tmp_path, midway='', **env):
    "A run in a process of its own that must end well; returns its record and what it printed."
    clean = {k: v for k, v in os.environ.items() if not k.startswith('WANDB_') and k != 'NETRC'}
    home = dict(
        HOME=str(tmp_path / 'home'),
        WANDB_CACHE_DIR=str(tmp_path / 'cache'),
        WANDB_CONFIG_DIR=str(tmp_path / 'config'),
    )
    (tmp_path/'home').mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch: # short, for wandb's socket
        result = subprocess.run(
            [sys.executable, '-c', LOOP.replace('MIDWAY', midway)],
            env=clean | home | dict(TMPDIR=scratch) | env,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert result.returncode == 0, result.stderr
    run, = list_runs()
    assert run.finished and [row['loss'] for row in run.history] == LOSSES
    return run, result.stdout + result.stderr

def records(path):
    "The records of a .wandb file: a LevelDB log of protocol buffers."
    from wandb.proto.wandb_internal_pb2 import Record
    data, position, part = path.read_bytes(), 7, b''
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7: position += left; continue
        length, kind = struct.unpack('<HB', data[position+4:position+7])
        part += data[position+7:position+7+length]
        position += 7 + length
        if kind in (1, 4): # whole, or the last piece
            yield Record.FromString(part)
            part = b''

def losses(run, folder='offline-run-*'):
    "What wandb wrote into the run's folder."
    file, = (run.path/'wandb').glob(f'{folder}/*.wandb')
    rows = [
        {item.nested_key[0]: json.loads(item.value_json) for item in r.history.item}
        for r in records(file)
        if r.HasField('history')
    ]
    assert [row['_step'] for row in rows] == list(range(1, 21))
    return [row['loss'] for row in rows]

class Server(ThreadingHTTPServer):
    "As much of a wandb server as a run needs; falls silent when told."
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Answer)
        self.silent, self.stopped, self.losses, self.posts = False, threading.Event(), [], []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def env(self):
        return dict(WANDB_BASE_URL=f'http://127.0.0.1:{self.server_port}', WANDB_API_KEY=KEY)

class Answer(BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def do_GET(self): # the loop says that it has opened its run
        if self.path == '/silence': self.server.silent = True
        self.reply({})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get('content-length') or 0))
        if self.server.silent: return self.server.stopped.wait()
        if self.headers.get('content-encoding') == 'gzip': body = gzip.decompress(body)
        self.server.posts.append(body)
        if self.path.endswith('/file_stream'):
            lines = (
                json.loads(body).get('files', {}).get('wandb-history.jsonl', {}).get('content', [])
            )
            self.server.losses += [json.loads(line)['loss'] for line in lines]
            return self.reply({})
        project = dict(id='p', name='enigma-lab', entity=dict(id='e', name='me'))
        run = dict(
            id='r',
            name='r',
            displayName='r',
            config='{}',
            tags=[],
            historyLineCount=0,
            project=project,
        )
        # it wants no files
        self.reply(
            dict(
                data=dict(
                    viewer=dict(
                        id='v', entity='me', username='me', flags='{}', teams=dict(edges=[])
                    ),
                    upsertBucket=dict(inserted=True, bucket=run),
                    createRunFiles=dict(runID='r', uploadHeaders=[], files=[]),
                )
            )
        )

    def reply(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header('content-length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

@pytest.fixture
def server():
    server = Server()
    yield server
    server.stopped.set()
    server.shutdown()
    server.server_close()

def test_wandb_without_a_key_is_offline_and_complete(tmp_path):
    run, printed = loop(tmp_path, WANDB_BASE_URL='http://127.0.0.1:9')
    assert losses(run) == LOSSES and 'tracker' not in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        'cache',
        'home',
        'runs',
    ]  # nothing beside the run, and the cache

@pytest.mark.parametrize('mode, folders', [('offline', 1), ('disabled', 0)])
def test_wandb_mode_is_obeyed_though_there_is_a_key(mode, folders, tmp_path, server):
    run, printed = loop(tmp_path, WANDB_MODE=mode, **server.env)
    assert (
        len(list(run.path.glob('wandb/offline-run-*'))) == folders
        and not server.losses
        and 'tracker' not in printed
    )

def test_wandb_online_sends_all(tmp_path, server):
    run, printed = loop(tmp_path, **server.env)
    assert server.losses == losses(run, 'run-*') == LOSSES and 'tracker' not in printed
    sent = b''.join(server.posts)
    # the name, not the command line
    assert (
        b'a-trial' in sent and b'MIDWAY' not in sent and sys.executable.encode() not in sent
    )

def test_wandb_finds_a_key_in_netrc(tmp_path, server):
    (tmp_path/'home').mkdir()
    (tmp_path / 'home' / '.netrc').write_text(
        f'machine 127.0.0.1:{server.server_port} login user password {KEY}\n'
    )
    (tmp_path/'home'/'.netrc').chmod(0o600)
    loop(tmp_path, WANDB_BASE_URL=server.env['WANDB_BASE_URL'])
    assert server.losses == LOSSES

@pytest.mark.parametrize('what', ['refuses', 'is silent'])
def test_wandb_unreachable_goes_on_offline(what, tmp_path, server):
    server.silent = True
    env = dict(server.env, WANDB_MODE='online') | (
        dict(WANDB_BASE_URL='http://127.0.0.1:9') if what == 'refuses' else {}
    )
    run, printed = loop(tmp_path, **env)
    assert losses(run) == LOSSES
    assert (
        printed.count('tracker ') == 1
        and 'tracker wandb is not reached and goes on offline: ' in printed
    )

def test_wandb_online_without_a_key_asks_nobody(tmp_path):
    run, printed = loop(tmp_path, WANDB_MODE='online', WANDB_BASE_URL='http://127.0.0.1:9')
    assert losses(run) == LOSSES

def test_wandb_with_a_broken_key(tmp_path):
    run, printed = loop(tmp_path, WANDB_API_KEY='abc')
    assert losses(run) == LOSSES and 'goes on offline: WANDB_API_KEY invalid' in printed

def test_wandb_server_that_falls_silent_midway(tmp_path, server):
    url = server.env['WANDB_BASE_URL']
    ask = f"import urllib.request; urllib.request.urlopen('{url}/silence').close()"
    run, printed = loop(tmp_path, ask, **server.env)
    # all is on the disk, for `wandb sync`
    assert (
        server.silent and not server.losses and losses(run, 'run-*') == LOSSES
    )

def test_wandb_process_that_is_killed_midway(tmp_path):
    kill = """
    import os, signal, subprocess
    words = ['ps', '-o', 'pid=,comm=', '--ppid', str(os.getpid())]
    listed = subprocess.run(words, capture_output=True, text=True).stdout
    for line in listed.splitlines():
        if 'wandb-core' in line: os.kill(int(line.split()[0]), signal.SIGKILL)"""
    _, printed = loop(tmp_path, kill, WANDB_MODE='offline')
    assert (
        printed.count('tracker ') == 1
        and 'tracker wandb failed and is off, the run goes on: ' in printed
    )
