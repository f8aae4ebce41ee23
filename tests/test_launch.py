"Several processes: the same training as one, the same weights in each, and an end when one fails."
import math, os, random, signal, socket, subprocess, sys, time
from collections import Counter
from dataclasses import replace

import pytest, torch
import torch.distributed as dist
from safetensors.torch import load_file

from enigma_lab.lab.launch import launch, rank
from enigma_lab.lab.runs import checkout, list_runs, start_run
from enigma_lab.lab.checkpoint import resume_from
from enigma_lab.lab.sharded import shard_model, whole_weights
from enigma_lab.lab.train_loop import train_loop
from enigma_lab.lab.trainer import fit
from enigma_lab.lm.train import make_config, prepare, train

ROOT = checkout(__file__)

pytestmark = pytest.mark.usefixtures('own_runs')

@pytest.fixture
def data(toy_text): return str(toy_text)

def losses(run): return [row['loss'] for row in run.history if 'loss' in row]

# What follows runs in spawned processes, which import this module.

def fit_and_compare(run, config):
    parts = prepare(config)
    fit(run, config, parts.model, parts.train, parts.validation)
    mine = torch.cat([p.detach().flatten() for p in parts.model.parameters()])
    all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_them, mine)
    return dist.get_world_size(), [torch.equal(mine, other) for other in all_of_them]

def train_sharded(config):
    parts = prepare(config)
    losses, _ = train_loop(shard_model(parts.model), parts.train, config)
    return losses, whole_weights(parts.model)

def die():
    dist.init_process_group('gloo')
    if rank() == 1: os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()

# The data does not come out even: 162 windows, all different, in batches of 20.

@pytest.fixture(scope='module')
def uneven(tmp_path_factory):
    rng = random.Random(0)
    word = lambda: ''.join(rng.choice('abcdefghijklmnop') for _ in range(rng.randrange(2, 7)))
    path = tmp_path_factory.mktemp('data')/'uneven.txt'
    path.write_text('\n\n'.join(' '.join(word() for _ in range(14)) + '.' for _ in range(40)))
    return path

# What the model sees and learns from, in whatever process it stands, written down as it sees it.
SEEING = '''
import os, sys
if 'SEEN' in os.environ and not any('papermill' in word for word in sys.orig_argv):
    import functools, hashlib
    from enigma_lab.lm.model import EnigmaForCausalLM
    forward = EnigmaForCausalLM.forward
    @functools.wraps(forward)
    def seeing(self, input_ids=None, *args, labels=None, **kwargs):
        if self.training and labels is not None :
            rows = [row for row, label in zip(input_ids, labels) if (label != -100).any()]
            words = [hashlib.sha256(repr(row.tolist()).encode()).hexdigest()[:16] for row in rows]
            with open(os.path.join(os.environ['SEEN'], str(os.getpid())), 'a') as file:
                file.write(' '.join(words) + '\\n')
        return forward(self, input_ids, *args, labels=labels, **kwargs)
    EnigmaForCausalLM.forward = seeing
'''

def seen_by(folder):
    "Read the windows that each process saw, a list for each forward pass."
    return [[line.split() for line in file.read_text().splitlines()] for file in folder.iterdir()]

SAME = dict(preset='smoke', max_steps=0, epochs=2, eval_steps=2, save_steps=2, seed=3)

@pytest.fixture
def shell(tmp_path, uneven):
    "Run commands with the project's Python, a runs folder, and a list of what was seen."
    (tmp_path/'hook').mkdir()
    (tmp_path/'hook'/'sitecustomize.py').write_text(SEEING)
    def start(name, words, **more):
        (tmp_path/name).mkdir(exist_ok=True)
        env = {**os.environ, 'SEEN': str(tmp_path/name), 'ENIGMA_RUNS': str(tmp_path/'runs'),
               'PYTHONPATH': f"{tmp_path/'hook'}:{ROOT}", 'OMP_NUM_THREADS': '1', **more}
        env.pop('ENIGMA_RUN_DIR', None)
        return subprocess.Popen([sys.executable, '-m', *words], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path,
                                start_new_session=True, preexec_fn=hear_signals)
    return start

def hear_signals(): # also where this run was started with nohup
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

def settings(values): return [f'{k}={v}' for k, v in values.items()]

def ended(*processes):
    "Wait for processes; return what they said on stderr."
    said = [process.communicate(timeout=400) for process in processes]
    for process, (out, err) in zip(processes, said): assert process.returncode == 0, err
    return [err for _, err in said]

def newest(note): return next(r for r in list_runs('train_enigma') if r.path.name.endswith(note))

def curve(run):
    return [(row['step'], row.get('loss', row.get('val_nll_nats'))) for row in run.history
            if 'step' in row]

def check_same_curve(one, several):
    "Compare what was recorded, and measured on validation, at each look."
    assert [step for step, _ in curve(one)] == [step for step, _ in curve(several)]
    assert max(abs(a - b) for (_, a), (_, b) in zip(curve(one), curve(several))) <= 1e-4
    counted = lambda run: [row['tokens'] for row in run.history if 'tokens' in row]
    assert counted(one) == counted(several)

def check_seen_once(several, one, processes):
    "Find each window once an epoch, and in each update what one process had in it."
    assert len(several) == processes
    updates = [Counter(sum(step, [])) for step in zip(*several, strict=True)]
    assert updates == [Counter(batch) for batch in one]
    for epoch in (updates[:9], updates[9:]):
        seen = sum(epoch, Counter())
        assert len(seen) == 162 and set(seen.values()) == {1}

# The tests.

@pytest.mark.proof('lab.launch', 'lab.shards', 'lab.task', 'lab.trainer', seeds=(3,))
def test_five_processes_and_two_machines_train_as_one(shell, uneven, tmp_path):
    """Train in one process, in five that a notebook forks, and on two machines with two each.

    The losses are the same and each window is seen once an epoch, although they do not come out
    even. The two machines are two launchers on this one, which meet at a port.
    """
    same = dict(SAME, data=uneven)
    words = [w for k, v in dict(same, processes=5, batch_size=4, note='five').items()
             for w in ('-p', k, str(v))]
    said, = ended(shell('five', ['papermill', str(ROOT/'nbs'/'train_enigma.ipynb'), *words]))
    module = ['enigma_lab.lm.train', '--no-test', *settings(same)]
    ended(shell('one', [*module, 'batch_size=20', 'note=one']))
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    machines = [shell('four', [*module, 'batch_size=5', 'note=four', 'processes=2', 'nodes=2',
                               f'node_rank={k}', f'master=127.0.0.1:{port}']) for k in (0, 1)]
    assert all('spawn, because there are several machines' in text for text in ended(*machines))
    assert len(list_runs('train_enigma')) == 3
    one, five, four = map(newest, ('one', 'five', 'four'))
    launchers = [run.env['launcher'] for run in (one, five, four)]
    assert launchers == ['this process', 'notebook_launcher', 'spawn, because there are several '
                         'machines']
    alone, = seen_by(tmp_path/'one')
    fives = [steps for steps in seen_by(tmp_path/'five') if len(steps) == len(alone)] # no probe
    for run, seen, n in ((five, fives, 5), (four, seen_by(tmp_path/'four'), 4)):
        check_same_curve(one, run)
        check_seen_once(seen, alone, n)

@pytest.mark.proof('lab.sharded', 'lab.train_loop', 'lab.shards', seeds=(3,))
def test_a_sharded_model_is_trained_as_a_whole_one(uneven):
    "Divide a model among two processes: the losses of one process, and its weights."
    config = make_config(**dict(SAME, data=str(uneven), batch_size=20, epochs=1))
    losses, weights = train_sharded(config)
    two = replace(config, processes=2, batch_size=10)
    their_losses, their_weights = launch(train_sharded, two, processes=2)
    assert len(losses) == 9 and max(abs(a - b) for a, b in zip(losses, their_losses)) <= 1e-5
    assert weights.keys() == their_weights.keys()
    # a softmax does not feel the bias of its keys: its gradient is rounding, and Adam steps by it
    felt = [k for k in weights if not k.endswith('k_proj.bias')]
    assert all(torch.allclose(weights[k], their_weights[k], atol=2e-5) for k in felt)
    whole, before = prepare(config).model, prepare(config).model.state_dict()
    whole.load_state_dict(their_weights)
    assert any(not torch.equal(whole.state_dict()[k], before[k]) for k in before)

@pytest.mark.proof('lab.launch', 'lab.task', 'lm.train', seeds=(3,))
@pytest.mark.parametrize('launcher', ['torchrun', 'accelerate', 'accelerate --cpu'])
def test_a_world_that_is_there_is_joined(shell, uneven, launcher):
    "Start two processes by another launcher: one world, one record, and no launch inside it."
    values = dict(SAME, data=uneven, batch_size=10, epochs=1)
    words = {'torchrun': ['torch.distributed.run', '--nproc_per_node', '2', '-m'],
             'accelerate': ['accelerate.commands.launch', '--config_file',
                            str(ROOT/'configs'/'accelerate_config.yaml'), '--num_processes', '2',
                            '--mixed_precision', 'no', '-m'],
             'accelerate --cpu': ['accelerate.commands.launch', '--cpu', '--num_processes', '2',
                                  '-m']}[launcher]
    asks = {} if launcher == 'torchrun' else dict(processes=2) # or takes what is there
    said, = ended(shell('two', [*words, 'enigma_lab.lm.train', '--no-test',
                                *settings(values | asks)]))
    run, = list_runs('train_enigma')
    joined = launcher != 'accelerate --cpu' # that starts one process, which starts two
    assert run.finished and run.config['processes'] == 2
    assert run.env['launcher'] == 'joined' if joined else 'spawn' in run.env['launcher']
    assert ('2 processes were started' in said) == (not asks)
    ended(shell('one', ['enigma_lab.lm.train', '--no-test', 'note=one',
                        *settings(dict(values, batch_size=20))]))
    check_same_curve(newest('one'), run)

@pytest.mark.proof('lab.launch', 'lab.task', seeds=(3,))
@pytest.mark.parametrize('how, number', [('script', signal.SIGTERM), ('script', signal.SIGHUP),
                                         ('notebook', signal.SIGINT)],
                         ids=['script-SIGTERM', 'script-SIGHUP', 'notebook-SIGINT'])
def test_a_signal_ends_all_processes_with_a_checkpoint(shell, uneven, how, number):
    "Stop a training of two processes, and resume it: the weights of the one nobody disturbed."
    values = dict(SAME, data=uneven, processes=2, batch_size=2, epochs=0, max_steps=60,
                  eval_steps=10, save_steps=10)
    def train(note, resume='none'):
        more = values | dict(note=note, resume=resume)
        if how == 'script': return shell('seen', ['enigma_lab.lm.train', '--no-test',
                                                  *settings(more)])
        words = [w for k, v in dict(more, test=False).items() for w in ('-p', k, str(v))]
        return shell('seen', ['papermill', str(ROOT/'nbs'/'train_enigma.ipynb'), *words])
    killed = train('killed')
    while not (found := [r for r in list_runs() if [*r.path.glob('checkpoints/*/digests.json')]]):
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(.1)
    os.kill(killed.pid, number)
    out, said = killed.communicate(timeout=200)
    assert found[0].env['stopped'] == number.name and not found[0].finished
    if how == 'script':
        assert killed.returncode == 128 + number and 'resume=auto goes on' in said, said
    else: assert 'Stopped' in (found[0].path/'train_enigma.ipynb').read_text()
    ended(train('resumed', 'auto'))
    ended(train('whole'))
    resumed, whole = newest('resumed'), newest('whole')
    assert [row['resumed_from'] for row in resumed.history if 'resumed_from' in row]
    a, b = (load_file(run.checkpoint/'model.safetensors') for run in (resumed, whole))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.proof('lab.launch', 'lab.trainer', seeds=(0,))
def test_two_processes_train_as_one(data):
    "Find equal weights on both ranks, and the losses of one process with the same global batch."
    config = make_config('smoke', data=data, processes=2, batch_size=4, max_steps=30, eval_steps=10)
    two = start_run('two', config)
    assert launch(fit_and_compare, two, config, processes=2) == (2, [True, True])
    alone = replace(config, processes=1, batch_size=8)
    one, parts = start_run('one', alone), prepare(alone)
    fit(one, alone, parts.model, parts.train, parts.validation)
    assert len(losses(one)) == 3 and all(
        math.isclose(a, b, abs_tol=1e-4) for a, b in zip(losses(one), losses(two))
    )
    counts = lambda run: [row['tokens'] for row in run.history if 'step' in row]
    assert counts(one) == counts(two) and counts(one)[-1] > 0

@pytest.mark.proof('lab.launch', 'lab.task', 'lab.trainer', 'lm.train', seeds=(0,))
def test_the_notebook_with_two_processes(data, tmp_path):
    result = subprocess.run(
        [
            'papermill',
            str(ROOT / 'nbs' / 'train_enigma.ipynb'),
            '-p',
            'gpus',
            '0',
            '-p',
            'processes',
            '2',
            '-p',
            'preset',
            'smoke',
            '-p',
            'data',
            data,
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert 'Traceback' not in result.stderr
    run, = list_runs('train_enigma')
    assert (
        run.finished
        and run.config['processes'] == 2
        and (run.checkpoint / 'model.safetensors').is_file()
        and 'test_bits_per_char' in run.metrics
    )

@pytest.mark.proof('lab.launch', 'lab.task', seeds=(0,))
def test_a_failing_rank_ends_the_run(data, train_from_shell):
    "From a shell: its own traceback, exit code not 0, no result."
    result = train_from_shell(preset='smoke', data=data, processes=2, learning_rate=1e30,
                              warmup_steps=0)
    assert result.returncode == 1
    for words in ('of 2 failed', 'Traceback', 'must stay finite'): assert words in result.stderr
    assert not any(run.finished for run in list_runs())

IN_CHILDREN = """
import torch
from enigma_lab.lab.launch import in_child
torch.set_num_threads(4)
torch.get_num_threads() # from here on only the threads of a pool look for it, all at once
compute = lambda: (torch.rand(40_000, 4) < 2).all(1).sum().item()
print(sum(in_child(compute) == 40_000 for _ in range(20)))
"""

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system cannot fork')
def test_forked_children_compute_with_several_threads():
    "Without a thread that renews torch's pool alone, nearly every child dies of it."
    result = subprocess.run([sys.executable, '-c', IN_CHILDREN], capture_output=True, text=True,
                            timeout=120, env={**os.environ, 'OMP_NUM_THREADS': '4'})
    assert result.stdout.split() == ['20'], result.stderr[-2000:]

@pytest.mark.proof('lab.launch', seeds=(0,))
def test_a_killed_rank_ends_the_run():
    with pytest.raises(
        RuntimeError, match=r'process 1 of 2 failed, and the others were stopped:\nSignal 9'
    ):
        launch(die, processes=2)

@pytest.mark.proof('lab.launch', 'lab.trainer', 'lm.train', seeds=(0,))
def test_two_processes_resume_as_two(data):
    "Resume with one process: refused. With two: the weights of the uninterrupted run."
    config = make_config(
        'smoke',
        data=data,
        processes=2,
        batch_size=4,
        max_steps=40,
        eval_steps=10,
        save_steps=10,
        dropout=0.1,
    )
    whole = train(config, note='whole', test=False)
    assert load_file(whole.checkpoint/'model.safetensors')
    with pytest.raises(ValueError, match='resumed by as many processes as began it'):
        resume_from(replace(config, processes=1, resume=str(whole.path)), 'train_enigma')
    half = start_run('train_enigma', config, 'half')
    source = max((whole.path/'checkpoints').iterdir(), key=lambda p: int(p.name.split('-')[1]))
    early = sorted((whole.path/'checkpoints').iterdir(), key=lambda p: int(p.name.split('-')[1]))[0]
    assert early != source
    os.makedirs(half.path/'checkpoints'); os.rename(early, half.path/'checkpoints'/early.name)
    (half.path/'history.jsonl').write_text((whole.path/'history.jsonl').read_text())
    again = train(replace(config, resume=str(half.path)), note='again', test=False)
    a, b = (load_file(run.checkpoint/'model.safetensors') for run in (whole, again))
    assert all(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.parametrize(
    'changes, same',
    [(dict(gradient_checkpointing=True), True), (dict(precision='bf16'), False)],
    ids=['checkpointing', 'bf16'],
)
def test_other_ways_to_compute_train_alike(data, changes, same):
    "Checkpointing gives the same bits; bf16 nearly the same loss."
    config = make_config('smoke', data=data, max_steps=30)
    plain, other = train(config, test=False), train(replace(config, **changes), test=False)
    a, b = (run.metrics['val_bits_per_char'] for run in (plain, other))
    assert (a == b) if same else (a != b and abs(a - b) < .05 * a)

@pytest.mark.parametrize('tracker', ['tensorboard', 'wandb'])
def test_a_tracked_run_has_a_whole_record(data, tracker, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    run = train(make_config('smoke', data=data, tracker=tracker), test=False)
    assert run.finished and len(losses(run)) == 2
    assert any(run.path.rglob('events.out.tfevents.*' if tracker == 'tensorboard' else '*.wandb'))

FORBIDDEN = '''
import json, sys
import accelerate, torch
from IPython.core.interactiveshell import InteractiveShell
class Touched(BaseException): "A GPU was used."
def touch(*args, **kwargs): raise Touched
torch.cuda._lazy_init, torch.cuda.is_available = touch, lambda: True
torch.cuda.device_count = lambda: 2
try: torch.zeros(1).cuda()
except Touched: print('forbidden') # the oracle works
called = []
def notebook_launcher(function, args=(), num_processes=None, **kwargs):
    called.append((function.__name__, num_processes))
    raise RuntimeError('launched')
accelerate.notebook_launcher = notebook_launcher
import enigma_lab.lab.progress as progress
progress.in_child = lambda fn, *args: called.append(fn.__name__) or (.1, 100.)
import enigma_lab.maskpro.train as masks
def in_child(fn, *args): # what may use a GPU there, for the kernel has none of it
    return called.append(fn.__name__) if fn.__name__ == 'write_baseline' else fn(*args)
masks.in_child = in_child
shell = InteractiveShell.instance()
for cell in json.load(open(sys.argv[1]))['cells']:
    if cell['cell_type'] != 'code': continue
    result = shell.run_cell(''.join(cell['source']))
    if 'parameters' in cell['metadata'].get('tags', []):
        shell.run_cell("gpus, preset = 2, 'smoke'; " + sys.argv[2])
    error = result.error_in_exec or result.error_before_exec
    if error: break
print(json.dumps(called), repr(error), torch.cuda.is_initialized())
'''

@pytest.mark.proof('lab.launch', 'lab.progress', 'lab.task', seeds=(0,))
@pytest.mark.parametrize('notebook', ['train_enigma', 'train_ddpm', 'train_maskpro'])
def test_a_kernel_uses_no_gpu_before_it_forks(notebook, data, tmp_path):
    "Run a notebook with two GPUs and every CUDA call forbidden, up to the call of the launcher."
    (tmp_path/'forbidden.py').write_text(FORBIDDEN)
    dense = str(ROOT/'runs'/'showcase'/'maskpro'/'dense')
    more = dict(train_enigma=f'data = {data!r}', train_maskpro=f'model = {dense!r}')
    result = subprocess.run([sys.executable, str(tmp_path/'forbidden.py'),
                             str(ROOT/'nbs'/f'{notebook}.ipynb'), more.get(notebook, '')],
                            capture_output=True, text=True, cwd=tmp_path)
    assert 'forbidden' in result.stdout, result.stderr
    last = result.stdout.strip().splitlines()[-1]
    child = 'write_baseline' if notebook == 'train_maskpro' else 'probe_pass'
    assert last == f'["{child}", ["_one_process", 2]] RuntimeError(\'launched\') False', result
    run, = list_runs(notebook)
    assert run.env['launcher'] == 'notebook_launcher' and len(run.env['devices']) == 2

@pytest.mark.proof('lab.launch', seeds=(0,))
def test_a_lost_pool_is_found():
    "Start a pool of threads, and see that a forked child would wait for it forever."
    code = ('import torch; from enigma_lab.lab.launch import pool_is_lost\n'
            'torch.set_num_threads(2); before = pool_is_lost(2)\n'
            'torch.ones(2**21).sum(); print(before, pool_is_lost(2), pool_is_lost(1))')
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                            env={**os.environ, 'OMP_NUM_THREADS': '2'})
    assert result.stdout.split() == ['False', 'True', 'False'], result

def test_a_gpu_of_many_is_one(tmp_path, monkeypatch):
    "Ask for one GPU on a machine with five: transformers would divide each batch among all."
    from transformers import TrainingArguments
    from enigma_lab.lab.trainer import training_arguments
    config = make_config('smoke')
    assert training_arguments(config, tmp_path, 10).n_gpu == 0
    monkeypatch.setattr(TrainingArguments, '_setup_devices', 5) # what it finds there
    monkeypatch.setattr(TrainingArguments, 'n_gpu', 5)
    assert training_arguments(config, tmp_path, 10)._n_gpu == 1

def test_a_sharded_training_needs_gpus():
    "On a CPU accelerate would train plain copies."
    with pytest.raises(ValueError, match='sharded=True needs GPUs'):
        make_config('smoke', sharded=True, processes=2)

def test_machines_with_other_data_are_refused(tmp_path, monkeypatch):
    "Be told a digest that differs from one's own, and a record that is not there."
    from enigma_lab.lab import task
    from enigma_lab.lab.runs import Run
    config = make_config('smoke')
    monkeypatch.setattr(task, 'share', lambda value, gpus: (Run(tmp_path/'a'/'b'), None, 'theirs'))
    with pytest.raises(ValueError, match='must read the same data'):
        task.share_record(None, config, None, 'mine')
    with pytest.raises(FileNotFoundError, match='must share their runs folder'):
        task.share_record(None, config, None, 'theirs')
