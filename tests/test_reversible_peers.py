"Try the engines that stand beside ours, and what is said of them: gradients, formulas, tables."
import copy, math

import pytest, torch

from enigma_lab.bench import reversible_peers
from enigma_lab.bench.bdia import BDIA, STEP, advance, odd, quantise, retreat
from enigma_lab.bench.reversible_checks import ask
from enigma_lab.bench.reversible_peers import ENGINES, Segmented, build, installed, make_blocks
from enigma_lab.lab.runs import start_run

HERE = installed('cuda')
NEW = ['checkpoint, every n', 'save_on_cpu', 'checkpoint, offloaded', 'BDIA']
QUESTIONS = ['gradients', 'dropout', 'F.dropout', 'bf16 autocast', 'weight norm', 'input untouched',
             'input without grad', 'in-place after', 'autograd.grad', 'no side effects',
             'backward twice', 'hooks once', 'partly frozen', 'inside checkpoint', 'DDP']

@pytest.mark.parametrize('engine', NEW)
@pytest.mark.parametrize('question', QUESTIONS)
def test_behaviour(engine, question): assert ask(engine, question) == ''

@pytest.mark.parametrize('engine', ENGINES)
def test_gradients_are_those_of_autograd(engine):
    if engine not in HERE: pytest.skip(f'{engine} is not installed')
    assert ask(engine, 'gradients') == ''

@pytest.mark.parametrize('engine', ['RevTorch', 'memcnn'])
def test_dropout_is_wrong_where_the_page_says_so(engine):
    if engine not in HERE: pytest.skip(f'{engine} is not installed')
    assert ask(engine, 'dropout').startswith('off by')

def test_offloading_has_no_row_on_a_cpu():
    assert {*HERE} - {*installed()} == {'save_on_cpu', 'checkpoint, offloaded'}

def test_bdia_is_its_formula_in_integers():
    "Write the paper's equation once more, in whole steps of the grid."
    torch.manual_seed(0)
    chain, x = BDIA(make_blocks(9, 8)), quantise(torch.randn(4, 5, 16))
    torch.manual_seed(1)
    found = chain(x)
    torch.manual_seed(1)
    a, b = ((t/STEP).long() for t in x.chunk(2, -1))
    for change in chain.changes:
        signs = 2*torch.randint(0, 2, (4, 1, 1)) - 1 # twice gamma
        h, state = change(b*STEP), b*STEP
        mean = (1 - signs/2)*state + (1 + signs/2)*h
        a, b = b, signs*((a + a % 2)//2) + (mean/STEP).round().long()
    assert torch.equal(found, torch.cat([a, b], -1)*STEP)

def test_bdia_comes_back_through_1000_blocks():
    torch.manual_seed(0)
    gammas = torch.randint(0, 2, (1000, 3, 1)) - .5
    changes = torch.randn(1000, 3, 7)/30
    start = a, b = quantise(torch.randn(2, 3, 7)).unbind()
    bits = []
    for gamma, h in zip(gammas, changes):
        bits.append(odd(a))
        a, b = b, advance(a, b, h, gamma)
    assert not torch.equal(b, start[1])
    for gamma, h, s in zip(gammas.flip(0), changes.flip(0), bits[::-1]):
        a, b = retreat(a, b, h, gamma, s), a
    assert torch.equal(a, start[0]) and torch.equal(b, start[1])

@pytest.mark.parametrize('p', [0., .2])
def test_bdia_gradients(p):
    "Compare with the stored run, and without dropout with the formula on real numbers, too."
    x = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(2))
    blocks = make_blocks(8, 16, p)
    def gradients(run, blocks):
        torch.manual_seed(3)
        start = x.clone().requires_grad_()
        run(start).pow(2).mean().backward()
        return torch.cat([start.grad.flatten(), *(q.grad.flatten() for q in blocks.parameters())])
    def smooth(x):
        a, b = x.chunk(2, -1)
        for f, g in blocks:
            gamma = torch.randint(0, 2, (3, 1, 1)) - .5
            first = f(b)
            a, b = b, gamma*a + (1 - gamma)*b + (1 + gamma)*(first + g(b + first))
        return torch.cat([a, b], -1)
    twin = copy.deepcopy(blocks)
    found = gradients(BDIA(blocks), blocks)
    expected = gradients(BDIA(twin, store=True), twin)
    assert (found - expected).norm() < 1e-6*expected.norm()
    blocks.zero_grad()
    if not p: assert (found - gradients(smooth, blocks)).norm() < .02*found.norm()

@pytest.mark.parametrize('depth, n', [(1, 0), (9, 0), (10, 0), (7, 3), (4, 9)])
def test_segments(depth, n, monkeypatch):
    "Count the checkpoints, and the runs of each block: one forward, and one on the way back."
    calls, runs = [], []
    def counted(function, *args, **kwargs):
        calls.append(len(args[0]))
        return reversible_peers_checkpoint(function, *args, **kwargs)
    reversible_peers_checkpoint = reversible_peers.checkpoint
    monkeypatch.setattr(reversible_peers, 'checkpoint', counted)
    blocks = make_blocks(depth, 8)
    for f, _ in blocks: f.register_forward_hook(lambda m, *_: runs.append(m))
    chain = Segmented(blocks, n)
    chain(torch.randn(2, 3, 16).requires_grad_()).sum().backward()
    assert chain.n == (n or round(math.sqrt(depth))) and max(calls) <= chain.n
    assert len(calls) == math.ceil(depth/chain.n) and sum(calls) == depth
    assert all(runs.count(f) == 2 for f, _ in blocks)

def test_what_checkpoints_keep():
    "Weigh what autograd holds after a forward pass: segments hold less than single blocks."
    def kept(name):
        seen = {}
        def pack(t):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        chain, x = build(name, make_blocks(16, 8)), torch.randn(4, 16, 16).requires_grad_()
        weights = {p.data_ptr() for p in chain.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): y = chain(x)
        del y
        return sum(size for at, size in seen.items() if at not in weights)
    assert kept('plain') > 2*kept('checkpoint') > 4*kept('checkpoint, every n')

FIT = {'plain': (50, 40, 85, 3), 'ours': (50, 2, 51, 30), 'checkpoint': (50, 9, 60, 0)}

@pytest.fixture
def record(tmp_path, monkeypatch):
    "Make a record by hand: ours takes 1.25 times as long at the same batch, 1.6 at its largest."
    monkeypatch.setenv('ENIGMA_RUNS', str(tmp_path))
    run = start_run('bench_reversible_fit', dict(
        depth=2, dim=8, tokens=10, batch=2, budget=90, unit=8, weighings=1, rounds=7, sample_ms=0,
        device='cpu',
        engines=dict.fromkeys(FIT, 'torch')))
    run.log(case='load', beside='fit', loaded=True) # weighing may be disturbed, timing may not
    for engine, (held, above, whole, batch) in FIT.items():
        run.log(case='fit', engine=engine, held_mib=held, whole_mib=[whole, whole + 1, whole - 1],
                activations_mib=[above]*3, largest_batch=batch, longest_context=10*batch)
    run.log(case='load', beside='fit', loaded=True)
    run.log(case='load', beside='speed', loaded=False)
    slower = {('ours', 'same'): 1.25, ('ours', 'largest'): 1.6}
    for n in range(7):
        for engine, (*_, batch) in FIT.items():
            for at, texts in dict(same=2, largest=batch).items():
                if not texts: continue
                ms = texts*(1 + n)*slower.get((engine, at), 1) # the machine becomes slower
                run.log(case='speed', engine=engine, at=at, round=n, tokens=10*texts,
                        wall_ms=2*ms + 3*(engine == 'ours'), cpu_ms=ms) # another job, beside ours
    run.log(case='load', beside='speed', loaded=False)
    return run

def test_tables_by_hand(record):
    from enigma_lab.bench.reversible_fit import memory_table, speed_table, summary, verdict
    memory = memory_table(record)
    assert list(memory['step to plain']) == [1, round(60/85, 3), .6] # in the order of ENGINES
    assert list(memory.activations) == [40, 9, 2] and list(memory.spread) == [2]*3
    speed = speed_table(record).set_index(['batch', 'engine'])
    ours = speed.loc['same', 'ours']
    # the ratio is taken within a round, so that the machine's pace does not matter
    assert ours['speed to plain'] == ours['from'] == ours['to'] == .8
    assert ours['tokens/CPU s'] == round(2e4/(4*2*1.25))
    assert ours['tokens/s'] == round(2e4/(2*4*2*1.25 + 3))
    assert speed.loc['largest', 'ours']['speed to plain'] == .625
    assert ('largest', 'checkpoint') not in speed.index # nothing fits
    found = summary(record)
    assert found['ours_largest_batch'] == 30 and found['ours_same_speed_ratio'] == .8
    assert found['loaded'] is False
    said = verdict(record)
    assert '0.80 of plain' in said and 'fits 30 texts instead of 3' in said
    assert 'Fastest at its largest batch is plain, with 2500' in said

def test_a_broken_record_goes_on(record, monkeypatch):
    "Nothing that the record has is measured again."
    from enigma_lab.bench import reversible_fit
    monkeypatch.setattr(reversible_fit, 'apart', lambda *_, **__: pytest.fail('weighed again'))
    steps = []
    monkeypatch.setattr(reversible_fit, 'make_update', lambda *_: lambda *args: steps.append(args))
    before = len(record.history)
    reversible_fit.measure_fit(record)
    reversible_fit.measure_speed(record)
    assert len(record.history) == before
    assert len(steps) == 2*5 # to warm, and to count the calls of a sample
    assert {batch for batch, _ in steps} == {2, 3, 30}

@pytest.mark.proof('bench.bdia', 'bench.memory', 'bench.reversible_peers', seeds=(0,))
def test_bdia_memory_grows_by_a_bit_for_each_number():
    from enigma_lab.bench.reversible import in_process
    shallow, deep, plain = (in_process(name=n, depth=d)
                            for n, d in (('BDIA', 4), ('BDIA', 24), ('plain', 24)))
    bits = 20*4*256*128/8 / 2**20
    assert abs(deep - shallow - bits) < .5 and deep < .1*plain, (shallow, deep, plain)
