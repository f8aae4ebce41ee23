"Flows at any depth, their training from the command line, and what no density describes."
import gc
import json
import os
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from enigma_lab.flow.coupling import make_couplings
from enigma_lab.flow.data import load_points, moons_log_prob
from enigma_lab.flow.density import EnigmaFlow
from enigma_lab.flow.depth import as_reversible
from enigma_lab.flow.train import load_flow, make_flow_config, row_nats, task, train_flow
from enigma_lab.lab.runs import Run, checkout
from enigma_lab.lab.task import main

ROOT = checkout(Path(__file__).parent)

def deep(depth, reverse=True, dim=8):
    "Make a flow that is away from where it begins."
    torch.manual_seed(0)
    chain = make_couplings(dim, depth, 'affine', hidden=16)
    with torch.no_grad():
        for p in chain.parameters(): p.add_(.02*torch.randn_like(p))
    return EnigmaFlow(as_reversible(chain) if reverse else chain, dim=dim)

def kept(flow, x):
    "Bytes that autograd keeps between the two passes, parameters apart."
    own, found = {p.untyped_storage().data_ptr() for p in flow.parameters()}, {}
    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own: found[storage.data_ptr()] = storage.nbytes()
        return t
    with saved_tensors_hooks(pack, lambda t: t): flow.log_prob(x)
    return sum(found.values())

def alive(least):
    "Bytes of all tensors that are alive, of those that have so many at least."
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor]
    found = {}
    for t in tensors:
        # what another test has left of a transform of torch.func has no storage
        with suppress(NotImplementedError, RuntimeError):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(size for size in found.values() if size >= least)

def test_depth_256_keeps_what_depth_8_keeps():
    "Between the passes, and a stored one keeps twenty times as much."
    x = torch.randn(128, 8)
    assert kept(deep(256), x) <= 1.05*kept(deep(8), x)
    assert kept(deep(256, False), x) > 20*kept(deep(8, False), x)

def test_nothing_of_a_layer_stays_alive():
    "After the forward pass, and after the backward pass, while the loss is held."
    x, found = torch.randn(4096, 8), {}
    for depth in (8, 64):
        flow, before = deep(depth), alive(4096)
        loss = -flow.log_prob(x).mean()
        forward = alive(4096) - before
        loss.backward()
        found[depth] = forward, alive(4096) - before
        del flow, loss
    for small, large in zip(*found.values()): assert large <= small + 4*x.nbytes//8, found

def test_gradients_at_depth_256():
    x = torch.randn(64, 8).double()
    grads = []
    for reverse in (False, True):
        flow = deep(256, reverse).double()
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(
            -flow.log_prob(x).mean(), list(flow.parameters()))]))
    assert (grads[0] - grads[1]).norm() < 1e-10*grads[0].norm()

def test_the_showcase_is_near_the_truth():
    "The flow that comes with the repository, on new points of two moons."
    run = Run(ROOT/'runs'/'showcase'/'train_flow')
    flow, shape = load_flow(run)
    rows = load_points('moons').validation
    kl = (row_nats(flow, rows) + moons_log_prob(rows)).mean().item()
    assert kl < .03 and run.metrics['test_kl_nats'] < .03 and shape.dim == 2

def test_from_the_command_line(tmp_path):
    "Trained in a process, and in two: a record with a number of what was saved."
    env = os.environ | dict(ENIGMA_RUNS=str(tmp_path), OMP_NUM_THREADS='1')
    for more in ((), ('processes=2', 'batch_size=8')):
        words = [sys.executable, '-m', 'enigma_lab.flow.train', 'preset=smoke', *more]
        done = subprocess.run(words, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        run = Run(Path(done.stdout.strip().splitlines()[-1].split(':')[0]))
        rows = load_points('moons', max_rows=400).validation
        found = row_nats(load_flow(run)[0], rows).mean().item()
        assert found == pytest.approx(run.metrics['val_nats'], abs=1e-9)
        assert json.loads((run.checkpoint/'config.json').read_text())['names'] == ['x', 'y']

BAD = dict(hole='finite', constant='constant column', zeros='share one value',
           words='needs numbers', short='30 rows at least')

@pytest.mark.parametrize('what', BAD)
def test_what_no_density_describes_is_refused(tmp_path, own_runs, what):
    "From a file, with a word on what to do; and nothing is trained."
    g = np.random.RandomState(0)
    rows = g.randn(100, 3).tolist()
    for i, row in enumerate(rows):
        row[2] = dict(hole='' if i == 3 else row[2], constant=1.5,
                      zeros=row[2] if i % 2 else 0., words='red').get(what, row[2])
    rows = rows[:1] if what == 'short' else rows
    file = tmp_path/'table.csv'
    file.write_text('a,b,c\n' + '\n'.join(','.join(map(str, row)) for row in rows))
    with pytest.raises(SystemExit, match=BAD[what]): main(task, [f'data={file}', 'preset=smoke'])
    assert not (own_runs/'train_flow').exists()

def test_whole_numbers_get_noise(tmp_path, own_runs):
    "A table of dice: the density cannot beat the distribution's entropy."
    file = tmp_path/'dice.csv'
    dice = np.random.RandomState(0).randint(1, 7, (3000, 2))
    file.write_text('a,b\n' + '\n'.join(f'{a},{b}' for a, b in dice))
    run = train_flow(make_flow_config('smoke', data=str(file), max_rows=3000, max_steps=60,
                                      eval_steps=20, save_steps=20))
    assert run.metrics['columns_with_noise'] == 2
    assert run.metrics['test_nats'] > 2*np.log(6) - .1
