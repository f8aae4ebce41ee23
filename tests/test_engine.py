"Faults that reversible engines have had: each as a user would meet it, beside plain autograd."
import random, threading
from functools import partial

import pytest, torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.functional import dropout, scaled_dot_product_attention

from enigma_lab.machine.bijection import Bijection
from enigma_lab.machine.rev_block import RevBlock
from enigma_lab.machine.reversible import KEEP, ReversibleSequence

KEEPS = pytest.mark.parametrize('keep', [0, KEEP])

class Part(nn.Module):
    "A function of a stream, with something added to it."
    def __init__(self, then=lambda self, x: x, dim=3):
        super().__init__()
        self.up, self.down, self.then = nn.Linear(dim, 5), nn.Linear(5, dim), then

    def forward(self, x, *extras, **named):
        return self.then(self, self.down(torch.tanh(self.up(x))), *extras, **named)

def attend(self, x): return scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=.3)[0]

RANDOM = dict(dropout=lambda self, x: dropout(x, .3), attention=attend,
              noise=lambda self, x: x*torch.rand_like(x))

@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    "After an error in compiled code torch refuses what it compiles alone."
    yield
    torch._dynamo.reset()

def chain(then=None, depth=2, **kwargs):
    "Double precision, so that what differs is wrong."
    torch.manual_seed(0)
    blocks = [(Part(then) if then else Part(), Part()) for _ in range(depth)]
    return ReversibleSequence(blocks, **kwargs).double()

def stored(own): return ReversibleSequence(own.blocks, own.exact, memory='store')

X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

def differentiate(module, *others, loss=lambda y: y.pow(3).sum()):
    x = X.clone().requires_grad_()
    torch.manual_seed(2)
    return torch.autograd.grad(loss(module(x)), [x, *module.parameters(), *others])

def alike(us, vs):
    us, vs = list(us), list(vs)
    assert len(us) == len(vs)
    for u, v in zip(us, vs): torch.testing.assert_close(u, v, rtol=1e-8, atol=1e-10)

# randomness

@pytest.mark.parametrize('kind', RANDOM)
def test_random_functions_under_func(kind):
    own = chain(RANDOM[kind], keep=0)
    params = dict(own.named_parameters())
    def loss(x, params): return functional_call(own, params, (x,)).pow(3).sum()
    torch.manual_seed(2)
    gx, gp = grad(loss, argnums=(0, 1))(X, params)
    alike([gx, *gp.values()], differentiate(stored(own)))

@pytest.mark.proof('machine.compile', 'machine.steps', 'machine.reversible', 'machine.internals')
@pytest.mark.parametrize('kind', RANDOM)
def test_random_functions_are_not_compiled(kind):
    "They run outside of the graph, with the same numbers, or it is an error."
    own = chain(RANDOM[kind], depth=1, keep=0)
    for fullgraph in (True, False):
        torch._dynamo.reset()
        compiled = torch.compile(own, backend='aot_eager', fullgraph=fullgraph)
        if fullgraph or kind == 'noise':
            with pytest.raises(Exception, match='CounterDropout|another result the second time'):
                differentiate(compiled)
        else: alike(differentiate(compiled), differentiate(stored(own)))

@KEEPS
def test_modes(keep):
    "Dropout that stays on in evaluation, and a mode that is switched between the two passes."
    own = ReversibleSequence([(nn.Sequential(Part(), nn.Dropout(.5)), Part())], keep=keep).double()
    own.eval()
    own.blocks[0][0][1].train()
    found = differentiate(own)
    alike(found, differentiate(stored(own)))
    own.train()
    def switched(module, x):
        y = module(x)
        own.eval()
        return y
    x = X.clone().requires_grad_()
    torch.manual_seed(2)
    y = switched(own, x)
    alike(torch.autograd.grad(y.pow(3).sum(), [x, *own.parameters()]), found)
    assert not own.training and not own.blocks[0][0][1].training

def test_threads_do_not_disturb_each_other():
    "Four chains with dropout, each in its thread: each is its own finite difference."
    # made before: a seed that one thread sets is the generator of all
    passed, chains = [], [chain(RANDOM['dropout'], keep=0) for _ in range(4)]
    def run(i):
        for _ in range(30): chains[i](X.clone().requires_grad_()).pow(2).sum().backward()
        passed.append(i)
    threads = [threading.Thread(target=run, args=[i]) for i in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert sorted(passed) == [*range(4)]

@KEEPS
def test_what_no_generator_repeats_is_refused(keep):
    own = chain(lambda self, x: x*random.random(), keep=keep)
    with pytest.raises(RuntimeError, match='another result the second time'): differentiate(own)

# derivatives

@pytest.mark.parametrize('loss', [lambda y: y.pow(3).sum(), lambda y: (y*torch.arange(6)).sum()])
def test_second_derivatives_under_func(loss):
    own = chain(keep=0)
    found, expected = ([jacrev(grad(lambda x: loss(m(x))))(X[0]),
                        jacrev(jacrev(grad(lambda x: loss(m(x)))))(X[0])]
                       for m in (own, stored(own)))
    alike(found, expected)
    torch.testing.assert_close(found[0], found[0].T)

@KEEPS
def test_gradient_penalties(keep):
    own = chain(RANDOM['dropout'], keep=keep)
    def penalty(module):
        x = X.clone().requires_grad_()
        torch.manual_seed(2)
        g, = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(g.pow(2).sum(), [x, *module.parameters()])
    alike(penalty(own), penalty(stored(own)))
    x = X[:2].clone().requires_grad_()
    def fixed(x):
        torch.manual_seed(2)
        return own(x)
    assert torch.autograd.gradgradcheck(fixed, x)

@pytest.mark.parametrize('exact', [False, True])
def test_forward_mode(exact):
    "The same verdict with `keep=0`: forward mode needs nothing on the way back."
    own = chain(keep=0, exact=exact)
    loss, params = lambda m: lambda x: m(x).pow(3).sum(), dict(own.named_parameters())
    ways = dict(
        jvp=lambda m: jvp(m, (X,), (X + 1,)),
        weights=lambda m: jvp(lambda p: functional_call(m, p, (X,)), (params,), (params,)),
        inverse=lambda m: jvp(m.inverse, (X,), (X + 1,)), jacfwd=lambda m: [jacfwd(loss(m))(X)],
        hessian=lambda m: [hessian(loss(m))(X)],
        each=lambda m: [vmap(lambda x: jvp(m, (x[None],), (x[None] + 1,))[1])(X)])
    for way in ways.values(): alike(way(own), way(stored(own)))

def test_gradients_of_each_sample():
    own = chain(keep=0)
    params = dict(own.named_parameters())
    def loss(params, x): return functional_call(own, params, (x,)).pow(3).sum()
    each = vmap(grad(loss), (None, 0))(params, X)
    for i, x in enumerate(X):
        alike([g[i] for g in each.values()],
              torch.autograd.grad(stored(own)(x).pow(3).sum(), [*own.parameters()]))

@KEEPS
def test_gradients_go_to_what_was_used(keep):
    "Weights that were given for one call, and a step of MAML."
    own = chain(keep=keep)
    def given(module):
        params = {k: (2*v).detach().requires_grad_() for k, v in module.named_parameters()}
        return torch.autograd.grad(
            functional_call(module, params, (X,)).pow(3).sum(), [*params.values()])
    alike(given(own), given(stored(own)))
    def adapted(module):
        params = dict(module.named_parameters())
        inner = torch.autograd.grad(functional_call(module, params, (X,)).pow(3).mean(),
                                    [*params.values()], create_graph=True)
        params = {k: v - .1*g for (k, v), g in zip(params.items(), inner)}
        return torch.autograd.grad(
            functional_call(module, params, (X,)).pow(2).mean(), [*module.parameters()])
    alike(adapted(own), adapted(stored(own)))

@KEEPS
def test_hooks_with_tensors_saved_elsewhere(keep):
    own, calls = chain(keep=keep), []
    for p in own.parameters(): p.register_hook(calls.append)
    with save_on_cpu(): y = own(X)
    y.pow(3).sum().backward()
    assert len(calls) == len([*own.parameters()])
    alike([p.grad for p in own.parameters()], differentiate(stored(own))[1:])

class Recurrent(nn.Module):
    "Keeps its weights in a list of its own, too."
    def __init__(self):
        super().__init__()
        self.cells = nn.LSTM(3, 3, batch_first=True)

    def forward(self, x): return self.cells(x[None])[0][0]

@KEEPS
def test_weights_in_a_list_of_the_module(keep):
    own = ReversibleSequence([(Recurrent(), Part())], keep=keep).double()
    alike(differentiate(own), differentiate(stored(own)))

# tensors that a function does not own

BORROWED = torch.ones(3, dtype=torch.float64, requires_grad=True)
BORROW = {
    'attribute': lambda self, x: x*self.other, 'made': lambda self, x: x*self.made,
    'list': lambda self, x: x*self.others[0], 'closure': lambda self, x: x*BORROWED}

@KEEPS
@pytest.mark.parametrize('how', BORROW)
def test_borrowed_tensors_are_refused(how, keep):
    own = chain(BORROW[how], keep=keep)
    for f, _ in own.blocks: f.other, f.others, f.made = BORROWED, [BORROWED], BORROWED*2
    with pytest.raises(RuntimeError, match='pass it to the chain'): differentiate(own)
    if how in ('attribute', 'list'):
        with pytest.raises(RuntimeError, match='pass it to the chain'):
            grad(lambda x: own(x).sum())(X)

@KEEPS
def test_a_loss_left_on_a_module_is_refused(keep):
    def leave(self, x):
        self.loss = x.pow(2).sum()
        return x
    with pytest.raises(RuntimeError, match='leaves Part.loss with a graph'):
        differentiate(chain(leave, keep=keep))
    def leave_detached(self, x):
        self.loss = x.detach().pow(2).sum()
        return x
    differentiate(chain(leave_detached, keep=keep))

def test_fixed_statistics():
    "Buffers have no gradient: nobody asks for one."
    own = ReversibleSequence([(nn.Sequential(Part(), nn.BatchNorm1d(3)), Part())], keep=0).double()
    own.blocks[0][0][1].running_mean.fill_(.3)
    own.eval()
    params = dict(own.named_parameters())
    found = grad(lambda p: functional_call(own, p, (X,)).pow(3).sum())(params)
    alike([*found.values()], differentiate(stored(own))[1:])
    compiled = torch.compile(own, fullgraph=True, backend='aot_eager')
    alike(differentiate(compiled), differentiate(stored(own)))
    with pytest.raises(Exception, match='changed a buffer of its own in training'):
        torch.compile(own.train(), backend='aot_eager')(X)

@KEEPS
def test_one_result_is_asked_for(keep):
    own = ReversibleSequence([(nn.LSTM(3, 3), nn.Linear(3, 3))], keep=keep).double()
    with pytest.raises(TypeError, match='LSTM must return one tensor, got tuple'): own(X[None])

@KEEPS
@pytest.mark.parametrize('part', [
    nn.BatchNorm1d(3), nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))],
    ids=['BatchNorm', 'spectral_norm'])
def test_buffers_that_change_are_refused(part, keep):
    own = ReversibleSequence([(part, Part())], keep=keep).double()
    own.train()
    with pytest.raises(RuntimeError, match='changed a buffer of its own'): differentiate(own)
    differentiate(own.eval())

# arguments, blocks and inputs

@KEEPS
def test_arguments_of_every_kind(keep):
    def use(self, x, scale=None, *, flag=False, more=None):
        return x if scale is None else x*scale + flag*more['shift'][0]
    own = chain(use, keep=keep)
    for _, g in own.blocks: g.then = use
    scale, shift = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    def given(module):
        x = X.clone().requires_grad_()
        y = module(x, scale, flag=True, more=dict(shift=(shift, None)))
        return y, *torch.autograd.grad(y.pow(3).sum(), [x, scale, shift, *module.parameters()])
    (y, *found), (_, *expected) = given(own), given(stored(own))
    alike(found, expected)
    alike([own.inverse(y, scale, flag=True, more=dict(shift=(shift, None)))], [X])

class Masked(Part):
    def forward(self, x, mask=None): return super().forward(x) * (1 if mask is None else mask)

class Own(Part):
    def forward(self, x, *, shift): return super().forward(x) + shift

@KEEPS
def test_a_part_gets_what_it_has_a_name_for(keep):
    torch.manual_seed(0)
    own = ReversibleSequence([(Masked(), Own()) for _ in range(2)], keep=keep).double()
    mask, shift = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    def run(module):
        x = X.clone().requires_grad_()
        y = module(x, mask=mask, shift=shift)
        return y, *torch.autograd.grad(y.pow(3).sum(), [x, mask, shift, *own.parameters()])
    a, b = X.chunk(2, -1)
    for f, g in own.blocks: # by hand
        a = a + f(b, mask)
        b = b + g(a, shift=shift)
    y, *found = run(own)
    alike([y, *found], [torch.cat([a, b], -1), *run(stored(own))[1:]])
    alike(run(torch.compile(own, fullgraph=True, backend='aot_eager')), [y, *found])
    alike([own.inverse(y, mask=mask, shift=shift)], [X])
    with pytest.raises(TypeError, match="takes an argument 'msk'"): own(X, msk=mask, shift=shift)

def test_blocks_are_a_list():
    own = chain(depth=3, keep=0)
    own.blocks.append((Part().double(), Part().double()))
    del own.blocks[0]
    own.blocks[1] = RevBlock(6).double()
    own.blocks.insert(0, [Part().double(), Part().double()])
    assert len(own.blocks) == 4 and len(own.steps((), None)) == 8
    alike(differentiate(own), differentiate(stored(own)))

class Twice(RevBlock):
    "A block with a way of its own."
    def forward_and_log_det(self, x, positions=None):
        y, log_det = super().forward_and_log_det(x)
        return 2*y, log_det + self.dim*torch.tensor(2.).log()

    def inverse_and_log_det(self, y, positions=None):
        x, log_det = super().inverse_and_log_det(y/2)
        return x, log_det - self.dim*torch.tensor(2.).log()

class Minus(Bijection):
    "A bijection that happens to have an f and a g."
    def __init__(self):
        super().__init__()
        self.f = self.g = nn.Identity()

    def forward_and_log_det(self, x, positions=None): return -x, x.new_zeros(x.shape[:-1])
    inverse_and_log_det = forward_and_log_det

@pytest.mark.parametrize('kind', [partial(Twice, 6), Minus])
def test_a_block_maps_as_it_says(kind):
    block = kind().double()
    own = ReversibleSequence([block], keep=0)
    y, log_det = own.forward_and_log_det(X)
    alike([own(X), y, log_det, own.inverse(y)], [block(X), *block.forward_and_log_det(X), X])

def test_channels_on_another_axis():
    parts = [nn.Conv1d(3, 3, 1) for _ in range(2)]
    own = ReversibleSequence([RevBlock(6, *(Part() for _ in range(2))), Minus(), Twice(6)]).double()
    turned = ReversibleSequence([Minus(), Twice(6), parts], axis=1, keep=0).double()
    x = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    by_hand = turned.blocks[1](-x.movedim(1, -1)).movedim(-1, 1)
    a, b = by_hand.chunk(2, 1)
    a = a + parts[0](b)
    alike([turned(x), turned.inverse(turned(x)), own.inverse(own(X))],
          [torch.cat([a, b + parts[1](a)], 1), x, X])

def test_frozen_chains():
    calls = []
    def count(self, x):
        calls.append(x)
        return x
    own = chain(count, keep=0).requires_grad_(False)
    for _ in range(3): assert not own(X).requires_grad
    assert len(calls) == 2*3 + 2 # the first time, each function is tried twice
    own.blocks[1].requires_grad_(True)
    learned = [*own.blocks[1].parameters()]
    alike(torch.autograd.grad(own(X).pow(3).sum(), learned),
          torch.autograd.grad(stored(own)(X).pow(3).sum(), learned))

def test_inputs_without_rows_or_values():
    own = chain(keep=0)
    empty = X[:0].clone().requires_grad_()
    own(empty).sum().backward()
    assert empty.grad.shape == (0, 6) and all(p.grad.eq(0).all() for p in own.parameters())
    assert chain(keep=0, exact=True)(X[:0]).shape == (0, 6)
    for bad in (X + 0j, X.long()):
        with pytest.raises(ValueError, match='needs real floats'): own(bad)
    own.to('meta')(torch.empty(4, 6, dtype=torch.float64, device='meta')).sum().backward()

@pytest.mark.proof('machine.compile', 'machine.grid')
def test_range_of_compiled_exact_streams():
    own = torch.compile(chain(keep=0, exact=True), backend='aot_eager')
    with pytest.raises((RuntimeError, OverflowError), match='must stay within'):
        own(X*1e30)
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(chain(keep=0), fullgraph=True, backend='aot_eager')
        alike([compiled(X)], [chain(keep=0)(X)])
