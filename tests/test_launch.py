"Several processes: the same training as one, the same weights in each, and an end when one fails."
import math, os, signal, subprocess
from dataclasses import replace

import pytest, torch
import torch.distributed as dist
from safetensors.torch import load_file

from enigma_lab.lab.launch import launch, rank
from enigma_lab.lab.runs import checkout, list_runs, start_run
from enigma_lab.lab.checkpoint import resume_from
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

def die():
    dist.init_process_group('gloo')
    if rank() == 1: os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()

# The tests.

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
