"Certificates: what they find in anybody's module, and that looking changes nothing."
import contextlib, math, random

import numpy, pytest, torch
from torch import nn

from enigma_lab.lm.model import EnigmaConfig, EnigmaForCausalLM, presets
from enigma_lab.lm.reverse import certify_model
from enigma_lab.machine.certify import certify, log_det_error, row_jacobians, rows_apart
from enigma_lab.machine.reversible import ReversibleSequence

def certificates(preset, rows=1, **changes):
    torch.manual_seed(0)
    # the wheels' width counts, not their number
    short = dict(
        vocab_size=50, position_rows=0, max_len=16, num_positions=2, num_layers=1, dropout=0.1
    )
    model = EnigmaForCausalLM(
        EnigmaConfig.preset(preset, **short | dict(machine='input', reversible=True) | changes)
    )
    for p in model.model.enigma.rotors.parameters():
        nn.init.normal_(p, std=0.5 / model.config.dim)  # away from the special point
    return certify_model(model, torch.randint(3, 50, (2, rows)))

@pytest.mark.parametrize('preset', presets)
def test_preset(preset):
    found = certificates(preset)
    machine, blocks = found['machine'], found['blocks']
    assert machine.ok and blocks.ok, (machine, blocks)
    assert (
        machine.relative_error < 1e-5
        and machine.log_det_error < 1e-10
        and machine.rows_checked == 2
        and machine.gradient_error < 1e-4
    ), machine
    # what is added is larger than the streams
    assert blocks.relative_error < 1e-4 and blocks.gradient_error < 1e-4, blocks
    assert machine.repeatable and blocks.repeatable and 1 <= machine.condition_number < 10

@pytest.mark.parametrize(
    'preset, reciprocal', [('smoke', True), ('cpu', False), ('brief-50m', True)]
)
@pytest.mark.proof('machine.certify', 'machine.exact', seeds=(0,))
def test_exact_preset(preset, reciprocal):
    found = certificates(preset, 2, exact=True, rev_scale=False, reciprocal=reciprocal)
    machine, blocks = found['machine'], found['blocks']
    assert machine.ok and blocks.ok, (machine, blocks)
    assert machine.level == 'any batch' and blocks.level != 'floats'
    assert machine.gradient_error == blocks.gradient_error == 0 and machine.range_used < .5
    assert machine.twice_error == (0 if reciprocal else None)

# modules that are not ours

class Affine(nn.Module):
    "Scale every feature; the log-determinant is the sum of the log-scales."
    def __init__(self, dim=4, error=0., last=False, says=True):
        super().__init__()
        self.log_scale = nn.Parameter(torch.linspace(-.5, .9, dim))
        self.error, self.last, self.says = error, last, says

    def log_det(self, x, sign):
        said = sign * self.log_scale.sum() + torch.zeros(len(x), dtype=x.dtype)
        if self.error: # in all rows but the first, or in the last row alone
            said = said + self.error * (torch.arange(len(x)) >= (len(x) - 1 if self.last else 1))
        return said

    def forward(self, x):
        y = x * self.log_scale.exp()
        return (y, self.log_det(x, 1)) if self.says else y

    def inverse(self, y):
        x = y * (-self.log_scale).exp()
        return (x, self.log_det(y, -1)) if self.says else x

class Coupling(nn.Module):
    "Scale and shift one half by the other, as any flow does; channels are axis 1."
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        a, b = x.chunk(2, 1)
        s, t = self.net(a).chunk(2, 1)
        return torch.cat([a, b*s.tanh().exp() + t], 1), s.tanh().flatten(1).sum(1)

    def inverse(self, y):
        a, b = y.chunk(2, 1)
        s, t = self.net(a).chunk(2, 1)
        return torch.cat([a, (b - t)*(-s.tanh()).exp()], 1), -s.tanh().flatten(1).sum(1)

class Mixer(nn.Module):
    "Multiply the channels of pictures by a matrix."
    def __init__(self, dim, lost=False):
        super().__init__()
        self.weight, self.lost = nn.Parameter(torch.eye(dim) + .2*torch.randn(dim, dim)), lost

    def log_det(self, x): # the mistake: a matrix acts at every pixel, and not once
        return self.weight.slogdet()[1] * (1 if self.lost else x[0, 0].numel())

    def forward(self, x): return torch.einsum('ij,bjhw->bihw', self.weight, x), self.log_det(x)
    def inverse(self, y):
        return torch.einsum('ij,bjhw->bihw', self.weight.inverse(), y), -self.log_det(y)

class Stack(nn.Module):
    "Apply modules one after the other, and add up what they say."
    def __init__(self, *parts, forget=None):
        super().__init__()
        self.parts, self.forget = nn.ModuleList(parts), forget

    def forward(self, x):
        total = 0
        for i, part in enumerate(self.parts):
            x, said = part(x)
            if i != self.forget: total = total + said
        return x, total

    def inverse(self, y):
        total = 0
        for i, part in reversed(list(enumerate(self.parts))):
            y, said = part.inverse(y)
            if i != self.forget: total = total + said
        return y, total

def net(*inside): return nn.Sequential(nn.Linear(2, 8), *inside, nn.ReLU(), nn.Linear(8, 4))

def conv_net():
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))

@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(6, 4)

@pytest.mark.quick
def test_sound_modules_hold(x):
    "And the numbers are those of automatic differentiation."
    picture = torch.randn(3, 4, 3, 3)
    for module, given in (
            (Affine(), x), (Affine(says=False), x), (Coupling(net()), x), (Mixer(4), picture),
            (Coupling(conv_net()), picture), (Stack(Affine(), Coupling(net()), Affine()), x)):
        for dtype in (torch.float32, torch.float64):
            found = certify(module.to(dtype), given.to(dtype))
            assert found.ok, found
            says = not isinstance(module, Affine) or module.says
            assert found.rows_checked == (len(given) if says else None)
            assert not says or found.log_det_error < 1e-14
    truth = torch.autograd.functional.jacobian(lambda v: module(v[None])[0][0], given[2].double())
    rows = given.double().requires_grad_()
    assert torch.allclose(row_jacobians(module(rows)[0], rows, 1)[2], truth)

@pytest.mark.quick
def test_every_row_counts(x):
    for last, wrong in ((False, 5), (True, 1)):
        found = certify(Affine(error=.1, last=last), x)
        assert not found.ok and (found.rows_wrong, found.rows_checked) == (wrong, 6)
        assert abs(found.log_det_error - .1/4) < 1e-9 # nats per dimension
    assert certify(Affine(error=1e-10), x).ok
    class Back(Affine): # on the way back alone, in the last row alone
        def log_det(self, x, sign):
            error = .1 * (sign < 0) * (torch.arange(len(x)) == len(x) - 1)
            return super().log_det(x, sign) + error
    found = certify(Back(), x)
    assert found.rows_wrong == 1 and abs(found.log_det_error - .1/4) < 1e-9
    assert not certify(Mixer(4, lost=True), torch.randn(2, 4, 3, 3)).ok

@pytest.mark.quick
def test_the_block_at_fault_is_named(x):
    inner = Stack(Affine(), Affine(error=.2))
    found = certify(Stack(Coupling(net()), inner, Affine()), x)
    place, = found.blame
    assert place.startswith('parts.1.parts.1 (Affine)') and f'{.2/4:.1e}' in place
    place, = certify(Stack(Affine(), Affine(), forget=0), x).blame
    assert place.startswith('no part fails by itself')
    # one of a chain's blocks leaves the range of the floats; its neighbours do not
    class Loud(nn.Module):
        def forward(self, x): return 1e7 * x.sin()
    quiet = lambda: (nn.Linear(4, 4), nn.Linear(4, 4))
    found = certify(ReversibleSequence([quiet(), (Loud(), nn.Linear(4, 4)), quiet()]),
                    torch.randn(6, 8))
    assert not found.ok and [place.split(' ')[0] for place in found.blame] == ['blocks.1']

@pytest.mark.quick
def test_numbers_that_are_none_are_faults(x):
    "Not a number, or infinite in the input's dtype alone."
    found = certify(Affine(error=math.nan), x)
    assert not found.ok and found.rows_wrong == 6 and math.isnan(found.log_det_error)
    class Product(Affine): # of a hundred small scales
        def log_det(self, x, sign):
            return (sign * self.log_scale.exp().prod().log()).expand(len(x))
    module = Product(100)
    nn.init.constant_(module.log_scale, -2.)
    found = certify(module, torch.randn(3, 100))
    assert found.log_det_error < 1e-12 and found.log_det_rounding == math.inf and not found.ok

def test_rows_that_mix_are_found(x):
    x = x.double().requires_grad_()
    y = x.sin()
    assert rows_apart(y, x, 1) and rows_apart(y, x, 2)
    for i in range(6):
        for j in range(6):
            mixed = y + torch.eye(6)[i, :, None] * x[j].cos()
            assert rows_apart(mixed, x, 1) == (i == j), (i, j)
    # BatchNorm in training: the volume of a batch has a meaning, that of a row has none
    torch.manual_seed(0)
    module = Coupling(net(nn.BatchNorm1d(8)))
    found = certify(module, x.float())
    assert found.rows_checked == 1 and found.log_det_error < 1e-14 and not found.ok
    assert 'but Coupling changed a buffer' in found.faults[0]
    assert certify(module.eval(), x.float()).rows_checked == 6
    class Normal(nn.Module): # it forgets that the mean is of the batch
        def forward(self, x):
            return (x - x.mean(0)/2) / 2, torch.full((len(x),), -4*math.log(2.), dtype=x.dtype)
        def inverse(self, y):
            return 2*y + 2*y.mean(0), torch.full((len(y),), 4*math.log(2.), dtype=y.dtype)
    found = certify(Normal(), x.float())
    assert found.relative_error < 1e-6 and found.rows_checked == 1
    assert abs(found.log_det_error - math.log(2.)/6) < 1e-9 and not found.ok

# looking changes nothing

class Meddler(nn.Module):
    "Change everything that a module can change, and raise an error if asked to."
    def __init__(self, fails):
        super().__init__()
        self.inner = nn.Sequential(nn.Dropout(.5), nn.BatchNorm1d(4))
        self.fails, self.calls = fails, 0
        self.weight, self.frozen = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(1), False)
        self.own, self.table = torch.Generator().manual_seed(3), torch.zeros(4)

    def forward(self, x):
        random.random(), numpy.random.rand(), torch.rand(3), torch.rand(1, generator=self.own)
        self.inner(x)
        self.calls, self.new = self.calls + 1, x
        self.weight.data, self.table = 2*self.weight.data, self.table + 1
        self.weight.grad = torch.ones_like(self.weight)
        self.frozen.grad.zero_()
        self.register_buffer('late', torch.zeros(3))
        self.inner.eval(), self.frozen.requires_grad_(), self.frozen.data.add_(1)
        if self.fails and self.calls == self.fails: raise KeyError('on purpose')
        return x.mul_(2)

    def inverse(self, y): return y/2

def everything(module):
    "Describe a module and the generators, completely."
    tensors = {**module.state_dict(), 'table': module.table}
    return (
        {name: (t.dtype, t.tolist()) for name, t in tensors.items()},
        [(name, id(p), p.data_ptr(), p.requires_grad, id(p.grad), p.grad.tolist())
         for name, p in module.named_parameters()],
        [(name, m.training) for name, m in module.named_modules()], sorted(vars(module)),
        module.calls, torch.get_rng_state().tolist(), random.getstate(),
        numpy.random.get_state()[1:3][0].tolist(), module.own.get_state().tolist())

@pytest.mark.quick
@pytest.mark.parametrize('fails', [0, 1, 4, 9])
def test_looking_changes_nothing(x, fails):
    module = Meddler(fails)
    module.inner[1].eval()
    for p in module.parameters(): p.grad = torch.full_like(p, 7.)
    before, given = everything(module), x.clone()
    raises = pytest.raises(KeyError) if fails else contextlib.nullcontext()
    with raises: certify(module, x)
    assert everything(module) == before and torch.equal(x, given)

def test_a_language_model_stays_in_its_mode():
    torch.manual_seed(0)
    config = EnigmaConfig.preset('smoke', vocab_size=50, machine='input', reversible=True)
    model = EnigmaForCausalLM(config).train()
    model.model.enigma.eval()
    modes = [m.training for m in model.modules()]
    certify_model(model, torch.randint(3, 50, (2, 2)))
    assert modes == [m.training for m in model.modules()]

@pytest.mark.quick
def test_a_module_may_change_what_it_is_given(x):
    class InPlace(nn.Module):
        def forward(self, x): return x.mul_(2), x.new_full((len(x),), 4*math.log(2))
        def inverse(self, y): return y.div_(2), y.new_full((len(y),), -4*math.log(2))
    given = x.clone()
    found = certify(InPlace(), x)
    assert found.ok and found.max_error == 0 and torch.equal(x, given)

# random numbers

@pytest.mark.quick
def test_dropout_is_found_and_draws_that_do_not_count_are_not(x):
    module = Coupling(net(nn.Dropout(.5)))
    found = certify(module, x)
    assert not found.repeatable and not found.ok and 'training mode' in ' '.join(found.faults)
    assert certify(module.eval(), x).ok
    class Draws(Affine):
        def forward(self, x): torch.rand(1); return super().forward(x)
    assert certify(Draws(), x).ok

def test_the_mode_of_a_block_is_the_chains():
    "A block that draws numbers in eval mode, too."
    class Noise(nn.Module):
        def forward(self, x): return torch.randn_like(x)
    chain = ReversibleSequence([(nn.Linear(2, 2), nn.Linear(2, 2)), (Noise(), nn.Linear(2, 2))])
    for training in (True, False):
        found = certify(chain.train(training), torch.randn(4, 4))
        place, = found.blame
        assert place.startswith('blocks.1') and ('training mode' in place) == training, found

# what other libraries look like

def test_a_function_can_be_the_inverse(x):
    "And arguments are handed on, both ways."
    class OneWay(nn.Module):
        def forward(self, x, context, rev=False):
            return (x - context if rev else x + context), torch.zeros(len(x), dtype=x.dtype)
    module, context = OneWay(), torch.randn(6, 4)
    assert certify(module, x, context, inverse=lambda y, c: module(y, c, rev=True)).ok
    found = certify(module, x, context, inverse=lambda y, c: module(y, 2*c, rev=True))
    assert not found.ok and abs(found.max_error - context.abs().max()) < 1e-5

def test_a_compiled_module_and_a_parametrized_one(x):
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4, bias=False))
        def forward(self, x):
            return self.inner(x), self.inner.weight.slogdet()[1].expand(len(x))
        def inverse(self, y):
            W = self.inner.weight
            return torch.linalg.solve(W, y.mT).mT, -W.slogdet()[1].expand(len(y))
    module = Linear()
    assert certify(module, x).ok and certify(torch.compile(module, backend='eager'), x).ok

def test_what_has_no_inverse_is_refused(x):
    for module in (nn.Linear(4, 4), nn.Sequential(Affine())):
        with pytest.raises(ValueError, match='give inverse='): certify(module, x)
    class Short(Affine):
        def inverse(self, y): return y[:, :1]
    with pytest.raises(ValueError, match='give back the shape'): certify(Short(), x)
    with pytest.raises(ValueError, match='a batch of at least 2'): certify(Affine(), x[:1])

def test_what_cannot_be_differentiated_is_no_pass(x):
    class Detached(Affine):
        def forward(self, x): return super().forward(x.detach())
    module = Detached().requires_grad_(False)
    assert 'no gradient passes' in certify(module, x).faults[0]
    class Plain(Detached): # without log-determinants
        def forward(self, x): return super().forward(x)[0]
    assert 'refuses it' in certify(Plain().requires_grad_(False), x).faults[0]

def test_log_determinants_of_any_shape(x):
    class Shaped(Affine):
        def log_det(self, x, sign): return sign * self.log_scale.sum() * torch.ones(self.shape)
    for shape, good in (((), 1), ((1,), 1), ((6,), 1), ((6, 1), 1), ((4,), 0), ((2, 3), 0)):
        module = Shaped()
        module.shape = shape
        found = certify(module, x)
        assert found.ok == bool(good), (shape, found)
        assert good or 'must have a shape' in found.faults[0]
    assert log_det_error(Affine(error=.4), x) == pytest.approx(.1)
    class Short(Affine): # which adds up in float32, whatever it is given
        def log_det(self, x, sign):
            said = torch.zeros(len(x))
            for scale in self.log_scale: said = said + sign*scale.float()
            return said
    found = certify(Short(300), torch.randn(3, 300))
    assert found.ok and found.log_det_error > 1e-8 and found.log_det_dtype == 'float32'
