"Try the reversible engine under autograd, autocast, compilers and wrappers."
import copy
from functools import partial

import pytest, torch
from torch import nn

from enigma_lab.bench.reversible_checks import BEHAVIOURS, ask
from enigma_lab.bench.reversible_peers import MLP, Attention, make_blocks
from enigma_lab.bench.reversible import in_process
from enigma_lab.lab.launch import launch
from enigma_lab.lm.model import EnigmaConfig, EnigmaForCausalLM
from enigma_lab.machine.dropout import CounterDropout
from enigma_lab.machine.reversible import ReversibleSequence, reversible
from enigma_lab.machine.rotor import RollRotor

engines = pytest.mark.parametrize('engine', ['ours', 'ours, exact', 'ours, default'])

# what runs twice cannot be right there, and must say so; all else must be right
REFUSED = {'a tensor in passing': 'RuntimeError: a reversible step must own what it learns from',
           'BatchNorm': 'RuntimeError: a reversible step runs twice'}

@engines
@pytest.mark.parametrize('question', [q for q in BEHAVIOURS if not q.startswith('compile')])
def test_behaviour(engine, question):
    answer = ask(engine, question)
    assert answer.startswith(REFUSED[question]) if question in REFUSED else answer == ''

@engines
@pytest.mark.parametrize('question', [q for q in BEHAVIOURS if q.startswith('compile')])
@pytest.mark.proof('machine.reversible', 'bench.reversible_checks')
def test_behaviour_compiled(engine, question):
    if engine == 'ours, default' and question == 'compile, memory': pytest.skip('the same as ours')
    assert ask(engine, question) == ''

def gradients(chain, x, amp=None, seed=5):
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    with torch.autocast('cpu', amp, enabled=amp is not None): y = chain(x*1.)
    return y.detach(), *torch.autograd.grad(
        y.float().pow(2).mean() * (64 if amp is torch.float16 else 1), [x, *chain.parameters()]
    )

@pytest.mark.parametrize('amp', [None, torch.bfloat16, torch.float16], ids=str)
def test_exact_gradients_are_bit_equal(amp):
    "Compare 256 halves with dropout to the stored run of the same forward, to the last bit."
    chain = ReversibleSequence(make_blocks(128, 16, p=.1), exact=True, keep=0)
    with torch.no_grad():
        for f, g in chain.blocks: f.out.weight.mul_(2), g.down.weight.mul_(2)
    x = torch.randn(2, 8, 32)
    found = gradients(chain, x, amp)
    chain.memory = 'store'
    expected = gradients(chain, x, amp)
    assert all(torch.equal(u, v) for u, v in zip(found, expected)) and all(
        u.isfinite().all() for u in found
    )

def test_exact_comes_back_through_2000_halves():
    chain, x = ReversibleSequence(make_blocks(1000, 8), exact=True).eval(), torch.randn(3, 5, 16)
    with torch.no_grad():
        start = torch.cat(chain.split(x), -1)
        end = chain(x)
        assert not torch.equal(end, start) and torch.equal(chain.inverse(end), start)

@pytest.mark.proof('machine.reversible', 'machine.rev_block', seeds=(0,))
@pytest.mark.parametrize('exact', [False, True])
def test_memory_does_not_grow(exact):
    "Peak resident memory of a process, depth 4 and 24, beside the stored run."
    name = 'ours, exact' if exact else 'ours'
    shallow, deep, plain = (
        in_process(name=n, depth=d) for n, d in ((name, 4), (name, 24), ('plain', 24))
    )
    assert deep < 1.05*shallow and deep < .06*plain, (shallow, deep, plain)

class Keyed(nn.Module):
    def __init__(self, part, layer):
        super().__init__()
        self.part, self.drop = part, CounterDropout(0.2, layer)

    def forward(self, x, key): return self.drop(self.part(x), key)

@pytest.mark.proof('machine.reversible', 'machine.dropout', 'machine.rotor', seeds=(0,))
@pytest.mark.parametrize('exact', [False, True])
def test_compiled_with_dropout_and_wheels(exact):
    "Compile counter dropout and a bijection to one graph; what it stores does not grow."
    from enigma_lab.bench.reversible_checks import compiled_bytes
    class Whole(nn.Module):
        def __init__(self, depth):
            super().__init__()
            torch.manual_seed(0)
            blocks = [(Keyed(Attention(16), 2*i), Keyed(MLP(16), 2*i + 1)) for i in range(depth)]
            wheels = [] if exact else [RollRotor(32, 4, parametrization='orthogonal')]
            self.chain = ReversibleSequence(
                [b for block in blocks for b in (block, *wheels)], exact=exact, keep=0
            )

        def forward(self, x):
            return self.chain(x, torch.tensor(3), positions=torch.arange(x.shape[1]))

    x, sizes = torch.randn(2, 8, 32), []
    for depth in (2, 5):
        whole = Whole(depth)
        expected = gradients(whole, x)
        torch._dynamo.reset()
        found = gradients(torch.compile(whole, fullgraph=True, backend='aot_eager'), x)
        for u, v in zip(found, expected): torch.testing.assert_close(u, v, rtol=1e-4, atol=1e-6)
        sizes.append(compiled_bytes(whole, x))
    # a wheel's own matrix may be kept
    assert sizes[1] <= 1.05 * sizes[0] or not exact and sizes[1] - sizes[0] < 3 * 5 * 32**2 * 8, (
        sizes
    )

def test_drawn_dropout_cannot_be_compiled():
    torch._dynamo.reset()
    chain = ReversibleSequence(make_blocks(2, 8, p=.1))
    with pytest.raises(Exception, match='CounterDropout'):
        torch.compile(chain, backend='aot_eager', fullgraph=True)(torch.randn(2, 4, 16))

def reduced():
    "In each process: gradients over half of the batch, averaged by DDP and by FSDP2."
    import torch.distributed as dist
    dist.init_process_group('gloo')
    blocks = make_blocks(3, 8)
    x = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(2))
    own = nn.parallel.DistributedDataParallel(ReversibleSequence(blocks, keep=0))
    own(x.chunk(dist.get_world_size())[dist.get_rank()]).pow(2).mean().backward()
    ReversibleSequence(twin := copy.deepcopy(blocks), memory='store')(x).pow(2).mean().backward()
    def compare(found):
        for p, q in zip(found.parameters(), twin.parameters()):
            torch.testing.assert_close(full(p.grad), q.grad, rtol=1e-4, atol=1e-7)
    full = lambda g: g.full_tensor() if hasattr(g, 'full_tensor') else g
    compare(blocks)
    # each part in the care of FSDP2, as is usual, at any place of the chain
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    for keep in (0, 2**20):
        sharded = ReversibleSequence(make_blocks(3, 8), keep=keep)
        for f, g in sharded.blocks:
            for part in (f, g): fully_shard(part, mesh=init_device_mesh('cpu', (2,)))
        sharded(x.chunk(dist.get_world_size())[dist.get_rank()]).pow(2).mean().backward()
        compare(sharded.blocks)
    dist.destroy_process_group()

def test_two_processes(): launch(reduced, processes=2)

# the language model

def language_model(**changes):
    torch.manual_seed(0)
    model = EnigmaForCausalLM(
        EnigmaConfig.preset('smoke', vocab_size=40, max_len=32, reversible=True, **changes)
    ).train()
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1*torch.randn_like(p))
    return model

def stored(steps, a, b):
    for step in steps: a, b = step.plain(a, b)
    return a, b

@pytest.mark.parametrize('exact', [False, True])
@pytest.mark.parametrize('machine', ['none', 'input', 'both', 'between'])
def test_language_model_gradients(machine, exact, monkeypatch):
    "Compare gradients under dropout to the stored run's: bit-equal where the model is exact."
    ids, found = torch.randint(3, 40, (3, 16), generator=torch.Generator().manual_seed(1)), []
    for run in (partial(reversible, keep=0), stored):
        monkeypatch.setattr('enigma_lab.lm.model.reversible', run)
        model = language_model(
            machine=machine,
            exact=exact,
            dropout=0.1,
            attn_dropout=0.1,
            parametrization='orthogonal',
        )
        torch.manual_seed(5)
        loss = model(ids, labels=ids).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for u, v in zip(*found):
        assert v is not None and v.isfinite().all()
        if exact: assert torch.equal(u, v)
        else: torch.testing.assert_close(u, v, rtol=1e-4, atol=1e-5)

def test_language_model_memory(monkeypatch):
    "What a forward pass keeps beside the parameters does not grow with the layers."
    monkeypatch.setattr('enigma_lab.lm.model.reversible', partial(reversible, keep=0))
    ids, sizes = torch.randint(3, 40, (2, 32)), []
    for layers in (2, 6):
        model, kept = language_model(num_layers=layers), {}
        own = {p.data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (
                t.data_ptr() in own or kept.update({t.data_ptr(): t.untyped_storage().nbytes()}),
                t,
            )[1],
            lambda t: t,
        ):
            model(ids, labels=ids)
        sizes.append(sum(kept.values()))
    assert sizes[1] <= 1.02*sizes[0], sizes
