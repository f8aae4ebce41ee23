"""Run other libraries' own tests on our bijections.

The tests come from the source distributions, fetched by version; nothing of them is copied, and
not a line is changed. This file is a plugin of pytest: in a test's module it puts our classes in
the place of those that it tests. `python tests/foreign.py` prints the table of what came out.
"""
import json, os, subprocess, sys, tarfile, tempfile
from collections import Counter, namedtuple
from pathlib import Path
from types import FunctionType, SimpleNamespace

import torch
from torch import nn

from enigma_lab.flow.coupling import ActNorm, Coupling, OnFirst, make_couplings
from enigma_lab.flow.density import EnigmaFlow, FlowDistribution
from enigma_lab.flow.depth import as_reversible
from enigma_lab.flow.elementwise import additive, affine, spline
from enigma_lab.flow.multiscale import Pixelwise, Squeeze, image_coupling
from enigma_lab.machine.bijection import Bijection, Chain, Inverse
from enigma_lab.machine.enigma import Enigma
from enigma_lab.machine.plugboard import FixedPermutation, Plugboard
from enigma_lab.machine.reflector import Reflector, SwapHalves
from enigma_lab.machine.rev_block import RevBlock
from enigma_lab.machine.reversible import ReversibleSequence
from enigma_lab.machine.rotor import InvertibleConv1x1, PermutationRotor, RollRotor, TableRotor

# fetching

Suite = namedtuple('Suite', 'version folder needs')
SUITES = dict(
    nflows=Suite('0.14', 'tests', ('torchtestcase==2018.2', 'UMNN==1.71')),
    normflows=Suite('1.7.3', 'normflows', ()),
    zuko=Suite('1.6.0', 'tests', ()),
    revlib=Suite('1.7.2', 'tests', ()))
NO_TESTS = dict(FrEIA='0.2', revtorch='0.2.4') # source distributions without tests

class NotFetched(Exception):
    "The package index could not be reached, or has no such version."

def pip(*args):
    "Run pip quietly; raise `NotFetched` with its last words."
    done = subprocess.run(
        [sys.executable, '-m', 'pip', *args, '--no-deps', '-q', '--disable-pip-version-check'],
        capture_output=True, text=True)
    if done.returncode: raise NotFetched(done.stderr.strip().splitlines()[-1])

def fetch_source(name, version, folder):
    "Fetch and unpack the source distribution of a package; return its folder."
    pip('download', '--no-binary', ':all:', '--no-build-isolation', '-d', folder,
        f'{name}=={version}')
    archive = Path(folder)/f'{name}-{version}.tar.gz'
    with tarfile.open(archive) as tar: tar.extractall(folder, filter='data')
    return Path(folder)/f'{name}-{version}'

def run_suite(name, folder, fault='', only=()):
    "Fetch a suite and run it in a process of its own; return a record for each test."
    suite, folder = SUITES[name], Path(folder)
    root = folder/f'{name}-{suite.version}'
    if not root.is_dir(): root = fetch_source(name, suite.version, folder)
    if suite.needs and not (folder/'needs').is_dir():
        pip('install', '--target', folder/'needs', *suite.needs)
    ours = root/suite.folder/'ours_test.py'
    ours.write_text(f'import foreign\nglobals().update(foreign.{name}_cases())\n', encoding='utf-8')
    report, here = folder/f'{name}{fault}.json', Path(__file__).resolve().parent
    env = {**os.environ, 'FOREIGN': name, 'FOREIGN_REPORT': str(report), 'FOREIGN_FAULT': fault,
           'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(
               map(str, (root, root/suite.folder, here, here.parent, folder/'needs')))}
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'foreign', '-p', 'no:cacheprovider',
         '-c', os.devnull, '--rootdir', root, '-o', 'python_files=*_test.py test_*.py',
         '-o', 'python_functions=test_* *_test', *(only or [suite.folder])],
        cwd=root, env=env, capture_output=True, text=True)
    # 0: all passed, 1: some failed; anything else, and the suite has not been run
    if done.returncode not in (0, 1) or not report.is_file():
        raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])
    return json.loads(report.read_text(encoding='utf-8'))

# adapters: our bijections, as each library has them

CALLS = Counter() # of ours, to see that a test has reached them
FAULT = os.environ.get('FOREIGN_FAULT', '') # how to break ours on purpose

def passed(bijection, x, back=False, axis=-1):
    "Pass a batch through one of ours; return the result and a log-determinant for each entry."
    CALLS['ours'] += 1
    way = bijection.inverse_and_log_det if back else bijection.forward_and_log_det
    y, log_det = way(x.movedim(axis, -1))
    if FAULT == 'inverse' and back: y = y * 1.01
    if FAULT == 'log_det': log_det = log_det + .01
    if FAULT == 'dtype': log_det = log_det.double()
    return y.movedim(-1, axis), log_det.flatten(1).sum(1) if log_det.ndim > 1 else log_det

def stirred(bijection, std=.2):
    "Move a bijection away from its start, where most mistakes would not show."
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in bijection.parameters(): p.add_(std * torch.randn(p.shape, generator=g))
    return bijection

def bounded(dim): # what a block adds
    return nn.Sequential(nn.Linear(dim, 16), nn.Tanh(), nn.Linear(16, dim))

class ChainBijection(Bijection):
    "Present a reversible chain of blocks as a bijection."
    def __init__(self, dim):
        super().__init__()
        self.chain = ReversibleSequence([(bounded(dim//2), bounded(dim//2)) for _ in range(3)])

    def forward_and_log_det(self, x, positions=None): # additive blocks keep volume
        return self.chain(x), x.new_zeros(x.shape[:-1])

    def inverse_and_log_det(self, y, positions=None):
        return self.chain.inverse(y), y.new_zeros(y.shape[:-1])

def ours(dim):
    "Make one of each kind of bijection: name → bijection, for an even number of channels."
    made = dict(
        plugboard=Plugboard(dim), permutation=FixedPermutation(torch.randperm(dim)),
        swap=SwapHalves(dim), reflector=Reflector(dim), rev_block=RevBlock(dim),
        rev_block_of_yours=RevBlock(dim, bounded(dim//2), bounded(dim//2)),
        conv=InvertibleConv1x1(dim), orthogonal=InvertibleConv1x1(dim, 'orthogonal'),
        table=TableRotor(dim), roll=RollRotor(dim, 2), wheel=PermutationRotor(dim),
        inverse=Inverse(Chain(InvertibleConv1x1(dim), RevBlock(dim))),
        chain=Chain(InvertibleConv1x1(dim), RevBlock(dim), Reflector(dim)),
        reversible_sequence=ChainBijection(dim), enigma=Enigma(dim, 2, 2, 4),
        reciprocal=Enigma(dim, 2, 2, 4, reciprocal=True), scale=ActNorm(dim),
        **{kind: Coupling(dim, kind, hidden=16) for kind in ('additive', 'affine', 'spline')},
        turned=Coupling(dim, turn=True, hidden=16),
        on_first=OnFirst(Coupling(dim - 2, hidden=16), dim - 2, 2),
        glow=make_couplings(dim, 3, hidden=16),
        reversible_glow=as_reversible(make_couplings(dim, 3, hidden=16)))
    # three matrices and splines in a row: closer to their start, for the tolerance of float32
    return {name: stirred(bijection, .05 if 'glow' in name else .2)
            for name, bijection in made.items()}

def of_width(dim):
    "Make a coupling block, or a rotor where there are no two halves."
    return stirred(InvertibleConv1x1(dim) if dim % 2 else RevBlock(dim))

class TheirNet(nn.Module):
    "Present a network of theirs, of vectors or of images, to a coupling of ours."
    def __init__(self, net, channels, parameters, space):
        super().__init__()
        self.net, self.channels, self.parameters_each, self.space = net, channels, parameters, space

    def forward(self, x):
        images = x.reshape(-1, x.shape[-1]//max(1, self.space[0]*self.space[1]), *self.space) \
            if self.space[0] else x
        theta = self.net(images).unflatten(1, (self.channels, self.parameters_each))
        return theta.movedim(2, -1).flatten(1, -2)

def coupling_of(kind, mask, make_net, space, bound):
    "Make a coupling of ours with a network of theirs, which reads the second half of channels."
    half = len(mask)//2
    assert mask[:half].all() and not mask[half:].any()
    parameters = dict(additive=1, affine=2, spline=3*8 - 1)[kind]
    net = TheirNet(make_net(half, half*parameters), half, parameters, space)
    return Coupling(len(mask)*max(1, space[0]*space[1]), kind, True, bound=bound, network=net)

def rational_quadratic(inputs, unnormalized_widths, unnormalized_heights, unnormalized_derivatives,
                       inverse=False):
    "Call our spline as theirs that goes on beyond its bound."
    CALLS['ours'] += 1
    theta = torch.cat([unnormalized_widths, unnormalized_heights,
                       unnormalized_derivatives[..., 1:-1]], -1)
    y, log_slope = spline(inputs, theta, inverse, 1.)
    if FAULT == 'inverse' and inverse: y = y*1.01
    if FAULT == 'log_det': log_slope = log_slope + .01
    return y, log_slope

SPLINES = dict(unconstrained_rational_quadratic_spline=rational_quadratic)
BOUNDED = 'no counterpart: a spline of [0, 1] alone, with free slopes at its ends'

class Theirs(Bijection):
    "Present a part of theirs as a bijection of vectors, to be put in a chain of ours."
    def __init__(self, part):
        super().__init__()
        self.part, self.shape = part, None

    def passed(self, way, x):
        y, log_det = way(x.view(-1, *self.shape))
        return y.reshape(x.shape), log_det

    def forward_and_log_det(self, x, positions=None): return self.passed(self.part, x)
    def inverse_and_log_det(self, y, positions=None): return self.passed(self.part.inverse, y)

def replaced(module, **names):
    "Make a stand-in for a module, with some names replaced."
    return SimpleNamespace(**{**vars(module), **names})

# nflows, normflows: forward(x) -> (y, log_det), inverse(y) -> (x, log_det)

def pair_classes(base):
    "Make the adapters for libraries whose transforms return pairs."
    class Ours(base):
        def __init__(self, bijection, axis=-1):
            super().__init__()
            self.bijection, self.axis = bijection, axis

        def forward(self, inputs, context=None):
            return passed(self.bijection, inputs, axis=self.axis)

        def inverse(self, inputs, context=None):
            return passed(self.bijection, inputs, back=True, axis=self.axis)

    class OursOfImages(Ours): # made when the shape of what comes is known
        def __init__(self, make):
            super().__init__(None)
            self.make = make

        def flat(self, x, back, shape=None):
            if self.bijection is None: self.bijection = self.make(tuple(x.shape[1:]))
            y, log_det = passed(self.bijection, x.flatten(1), back)
            return y.view(x.shape), log_det

        def forward(self, inputs, context=None): return self.flat(inputs, False)
        def inverse(self, inputs, context=None): return self.flat(inputs, True)

    def piecewise(mask, transform_net_create_fn, tails=None, kind='spline'):
        def make(shape):
            space = shape[1:] if len(shape) > 1 else (0, 0)
            return coupling_of(kind, mask, transform_net_create_fn, space, 1.)
        return OursOfImages(make)

    class OursOfTheirs(Ours): # their parts, put together by ours
        def __init__(self, kind, *parts):
            super().__init__(kind(*map(Theirs, parts)))

        def flat(self, x, back):
            for part in self.bijection.modules():
                if isinstance(part, Theirs): part.shape = x.shape[1:]
            y, log_det = passed(self.bijection, x.flatten(1), back)
            return y.view(x.shape), log_det

        def forward(self, inputs, context=None): return self.flat(inputs, False)
        def inverse(self, inputs, context=None): return self.flat(inputs, True)
    Ours.of_images, Ours.piecewise = OursOfImages, staticmethod(piecewise)
    return Ours, OursOfTheirs

def nflows_patches():
    "Say which names of which test module are replaced."
    from nflows.transforms import (
        base, coupling, linear, lu, normalization as norm, orthogonal, permutations, standard)
    Ours, OursOfTheirs = pair_classes(base.Transform)

    class Linear(Ours): # y = W x
        def __init__(self, features, kind='plu', **kwargs):
            super().__init__(stirred(InvertibleConv1x1(features, kind)))
            self.bias = nn.Parameter(torch.zeros(features))
            self.forward_no_cache, self.inverse_no_cache = self.forward, self.inverse
            self.wiring = self.bijection.wiring

        def _create_lower_upper(self):
            L, U = self.wiring.factors(0)
            return L[self.wiring.permutation], U

        def matrix(self):
            Q = self.wiring.rotation(0, torch.float32)
            return (self.wiring.sign[:, None] * Q)[self.wiring.permutation]

        @property
        def _weight(self): return torch.matmul(*self._create_lower_upper()).detach()
        def weight(self): return self.forward(torch.eye(len(self.bias)))[0].T
        def weight_inverse(self): return self.inverse(torch.eye(len(self.bias)))[0].T
        def logabsdet(self): return self.forward(torch.zeros(1, len(self.bias)))[1][0]

    class Net(nn.Module): # theirs, on the last axis
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x): return self.net(x.movedim(-1, 1)).movedim(1, -1)

    class Zero(nn.Module):
        def forward(self, x): return torch.zeros_like(x)

    def additive_block(mask, transform_net_create_fn):
        half = len(mask)//2
        assert mask[:half].all() and not mask[half:].any()
        net = Net(transform_net_create_fn(half, half))
        return Ours(RevBlock(2*half, net, Zero(), scale=False), axis=1)

    class Scale(Ours): # begins with the first batch, as theirs
        def __init__(self, features):
            super().__init__(ActNorm(features), axis=1)
            self.register_buffer('initialized', torch.tensor(False))
            self.log_scale, self.shift = self.bijection.log_scale, self.bijection.shift

        def forward(self, inputs, context=None):
            if self.training and not self.initialized:
                self.bijection.take(inputs.movedim(1, -1).flatten(0, -2))
                self.initialized.fill_(True)
            return super().forward(inputs)

    class Squeezed(base.Transform): # of any shape
        def moved(self, x, shape, back):
            CALLS['ours'] += 1
            if len(x.shape) != 4: raise ValueError("an image has channels, a height and a width")
            y, log_det = passed(Squeeze(shape), x.flatten(1), back)
            C, H, W = shape
            return y.view(-1, *(shape if back else (4*C, H//2, W//2))), log_det

        def forward(self, inputs, context=None):
            return self.moved(inputs, tuple(inputs.shape[1:]), False)

        def inverse(self, inputs, context=None):
            C, H, W = (*inputs.shape[1:], 0)[:3]
            return self.moved(inputs, (C//4, 2*H, 2*W), True)

    def permutation(wiring): return Ours(Plugboard.from_permutation(wiring))
    def affine_coupling(**how): return Ours.piecewise(**how, kind='affine')
    return {
        'rational_quadratic_test': dict(splines=SimpleNamespace(**SPLINES)),
        'normalization_test': dict(norm=replaced(norm, ActNorm=Scale)),
        'reshape_test': dict(SqueezeTransform=Squeezed),
        'permutations_test': dict(permutations=replaced(
            permutations, Permutation=permutation,
            RandomPermutation=lambda n: permutation(torch.randperm(n)),
            ReversePermutation=lambda n: permutation(range(n)[::-1]))),
        'lu_test': dict(lu=replaced(lu, LULinear=Linear)),
        'transforms.linear_test': dict(linear=replaced(linear, NaiveLinear=Linear)),
        'orthogonal_test': dict(orthogonal=replaced(
            orthogonal, HouseholderSequence=lambda features, num_transforms: Linear(
                features, 'orthogonal'))),
        # at its start, as theirs: the tolerance is two roundings of the largest of 23,520 numbers
        'conv_test': dict(OneByOneConvolution=lambda c: Ours(InvertibleConv1x1(c), axis=1)),
        'standard_test': dict(standard=replaced(
            standard, IdentityTransform=lambda: Ours(Chain()))),
        'transforms.base_test': dict(base=replaced(
            base, CompositeTransform=lambda parts: OursOfTheirs(Chain, *parts),
            InverseTransform=lambda part: OursOfTheirs(Inverse, part))),
        'coupling_test': {
            'coupling': replaced(coupling, AdditiveCouplingTransform=additive_block,
                                 AffineCouplingTransform=affine_coupling),
            'PiecewiseCouplingTransformTest.classes': [Ours.piecewise]},
        'flows.base_test': dict(AffineScalarTransform=lambda scale: Ours(Plugboard(4))),
        'Ours': Ours}

NFLOWS = { # part of a test's name → why it is not for ours; the first that fits counts
    '/distributions/': 'no bijection in it: distributions',
    'realnvp_test': 'an architecture of nflows, from its own parts',
    'flows/autoregressive_test': 'an architecture of nflows, from its own parts',
    'linear_test.py::LinearTest': "nflows' cache of matrices, with mocks in the matrix's place",
    'HouseholderSequenceTest::test_matrix': 'the parity of a count of reflections: ours have none',
    'MultiscaleComposite': 'a change of shape: ours keep it',
    'test_forward_unconditional': 'the half that is read must stay: ours keeps it',
    '::RationalQuadraticSplineTest': BOUNDED,
    'splines/cubic': 'no counterpart: cubic splines',
    'splines/linear': 'no counterpart: linear splines',
    'splines/quadratic': 'no counterpart: quadratic splines',
    'AffineScalarTransform': 'no counterpart: an affine map of numbers',
    'autoregressive_test': 'no counterpart: autoregressive nets',
    'made_test': 'no counterpart: autoregressive nets',
    'BatchNormTest': 'no counterpart: BatchNorm',
    'nonlinearities_test': 'no counterpart: nonlinearities of numbers',
    'qr_test': 'no counterpart: W = Q R', 'svd_test': 'no counterpart: W = U S V'}

def nflows_cases():
    "Make a test of nflows' own checks for each of ours; they are in its base class."
    from tests.transforms.transform_test import TransformTest
    Ours = nflows_patches()['Ours']

    def case(name):
        def test(self):
            torch.manual_seed(0)
            self.eps = 1e-5
            for dtype in (torch.float32, torch.float64):
                transform = Ours(ours(6)[name].to(dtype))
                x = torch.randn(10, 6, dtype=dtype)
                for outputs, log_det in (transform(x), transform.inverse(x)):
                    self.assert_tensor_is_good(outputs, [10, 6])
                    self.assert_tensor_is_good(log_det, [10])
                    assert outputs.dtype == log_det.dtype == dtype, (outputs.dtype, log_det.dtype)
                if dtype == torch.float32: # their zeros are of the default dtype
                    self.assert_forward_inverse_are_consistent(transform, x)
        return test
    return dict(OursTest=type('OursTest', (TransformTest,), {
        f'test_{name}': case(name) for name in ours(6)}))

def normflows_patches():
    from normflows.flows.base import Flow
    Ours, OursOfTheirs = pair_classes(Flow)

    def permute(n, mode='shuffle'):
        order = torch.randperm(n) if mode == 'shuffle' else torch.arange(n).roll(n//2)
        return Ours(Plugboard.from_permutation(order))

    def glow(channels, hidden, scale=True, split_mode='channel', use_lu=True, net_actnorm=False):
        kind = 'plu' if use_lu else 'orthogonal'
        return Ours(Chain(stirred(InvertibleConv1x1(channels, kind), .05), of_width(channels)), 1)

    def masked(b, t, s): return Ours(of_width(len(b)))

    class Conditional(Ours): # a context is a condition of ours
        def moved(self, x, context, back):
            if context is None: return passed(self.bijection, x, back)
            y, log_det = passed(self.bijection, torch.cat([x, context], -1), back)
            return y[:, :x.shape[1]], log_det

        def forward(self, z, context=None): return self.moved(z, context, False)
        def inverse(self, z, context=None): return self.moved(z, context, True)

    def wrapped(channels, blocks, hidden, num_context_channels=None):
        return Conditional(stirred(make_couplings(
            channels, 2, condition=num_context_channels or 0, hidden=16), .05))

    def block(channels, hidden, scale=True, split_mode='channel', use_lu=True, net_actnorm=False):
        if channels % 2: return glow(channels, hidden, scale, split_mode, use_lu, net_actnorm)
        return Ours.of_images(lambda shape: stirred(Chain(
            Pixelwise(ActNorm(channels), shape), Pixelwise(InvertibleConv1x1(channels), shape),
            image_coupling(shape, 'affine', hidden=8)), .05))
    return {
        'neural_spline.coupling_test': dict(coupling=SimpleNamespace(
            PiecewiseRationalQuadraticCoupling=Ours.piecewise)),
        'wrapper_test': dict(CoupledRationalQuadraticSpline=wrapped,
                             AutoregressiveRationalQuadraticSpline=wrapped),
        'splines_test': dict(splines=SimpleNamespace(**SPLINES)),
        'mixing_test': dict(
            Permute=permute,
            InvertibleAffine=lambda n, use_lu: Ours(stirred(
                InvertibleConv1x1(n, 'plu' if use_lu else 'orthogonal'))),
            LULinearPermute=lambda n, identity_init: Ours(
                (lambda f: f if identity_init else stirred(f))(InvertibleConv1x1(n)))),
        'flows.base_test': dict(
            Reverse=lambda flow: OursOfTheirs(Inverse, flow),
            Composite=lambda flows: OursOfTheirs(Chain, *flows)),
        'affine.coupling_test': dict(MaskedAffineFlow=masked),
        'glow_test': dict(GlowBlock=block),
        'core_test': dict(MaskedAffineFlow=masked, GlowBlock=glow),
        'Ours': Ours}

NORMFLOWS = {
    'distributions/': 'no bijection in it: distributions', 'nets/': 'no bijection in it: nets',
    'test_cc_affine': 'no counterpart: scale and shift for each class',
    'test_conditional_normalizing_flow': 'no counterpart: a context for each row',
    'transforms_test': 'no counterpart: Logit, Shift',
    'planar_test': 'no counterpart: Planar', 'radial_test': 'no counterpart: Radial',
    'residual_test': 'no counterpart: Residual, whose log-determinant is an estimate',
    'stochastic_test': 'no bijection in it: stochastic layers',
    'periodic_test': 'no counterpart: periodic coordinates',
    '::RationalQuadraticSplineTest': BOUNDED,
    'test_rqcs_unconditional': 'the half that is read must stay: ours keeps it',
    'test_circular_nsf': 'no counterpart: periodic coordinates',
    'neural_spline/autoregressive': 'no counterpart: autoregressive nets',
    'affine/autoregressive_test': 'no counterpart: autoregressive nets'}

def normflows_cases():
    "Make a test of normflows' own check for each of ours; it is in its base class."
    from normflows.flows.flow_test import FlowTest
    Ours = normflows_patches()['Ours']

    def case(name, shape, dtype):
        def test(self):
            torch.manual_seed(0)
            flow = Ours(ours(6)[name].to(dtype))
            x = torch.randn(5, *shape, dtype=dtype)
            self.checkForwardInverse(flow, x, atol=1e-5, rtol=1e-5)
        return test
    return dict(OursTest=type('OursTest', (FlowTest,), {
        f'test_{name}_{len(shape)}_{str(dtype)[-2:]}': case(name, shape, dtype) for name in ours(6)
        for shape in ((6,), (3, 6)) for dtype in (torch.float32, torch.float64)}))

# zuko: torch.distributions.Transform, with call_and_ladj

def zuko_class():
    from torch.distributions import Transform, constraints
    class Ours(Transform):
        domain = codomain = constraints.real_vector
        bijective = True
        def __init__(self, bijection):
            super().__init__()
            self.bijection = bijection
        def _call(self, x): return passed(self.bijection, x)[0]
        def _inverse(self, y): return passed(self.bijection, y, back=True)[0]
        def log_abs_det_jacobian(self, x, y): return passed(self.bijection, x)[1]
        def call_and_ladj(self, x): return passed(self.bijection, x)
    return Ours

def zuko_maps():
    "Present our maps of one number as zuko's."
    from torch.distributions import Transform, constraints
    class Map(Transform):
        domain = codomain = constraints.real
        bijective = True
        def __init__(self, apply, theta):
            super().__init__()
            self.apply, self.theta = apply, theta
        def moved(self, x, back=False):
            CALLS['ours'] += 1
            y, log_slope = self.apply(x, self.theta.expand(*x.shape, -1), back)
            if FAULT == 'inverse' and back: y = y*1.01
            return y, log_slope + .01*(FAULT == 'log_det')
        def _call(self, x): return self.moved(x)[0]
        def _inverse(self, y): return self.moved(y, True)[0]
        def log_abs_det_jacobian(self, x, y): return self.moved(x)[1]
        def call_and_ladj(self, x): return self.moved(x)
    return dict(
        AdditiveTransform=lambda shift: Map(additive, shift[..., None]),
        MonotonicAffineTransform=lambda shift, scale: Map(affine, torch.stack([scale, shift], -1)),
        MonotonicRQSTransform=lambda *theta: Map(spline, tamed(torch.cat(theta, -1))))

def tamed(theta):
    "Bound what a spline is given, as zuko's does by itself: a flat bin loses float32's digits."
    return theta/(1 + .3*theta.abs())

class SeenDistribution(FlowDistribution):
    "Show the map of a distribution, as zuko's distributions do."
    @property
    def transform(self):
        flow, c = self.flow, self.condition
        class Condition(Bijection): # the flow's own map, at a condition
            def forward_and_log_det(self, x, positions=None): return flow.to_noise(x, c)
            def inverse_and_log_det(self, y, positions=None): return flow.to_data(y, c)
        return zuko_class()(Condition())

class ZukoFlow(EnigmaFlow):
    "Make our flows as zuko's are made: features, and channels of a condition."
    def __init__(self, features, context, kind='spline'):
        super().__init__(make_couplings(features, 3, kind, condition=context, hidden=32),
                         dim=features, condition=context)

    def forward(self, condition=None):
        CALLS['ours'] += 1
        return SeenDistribution(self, condition)

def affine_flow(features, context): return ZukoFlow(features, context, 'affine')

def zuko_patches():
    Ours = zuko_class()
    square = lambda kind: lambda A: Ours(stirred(InvertibleConv1x1(len(A), kind)))
    return {'test_transforms': dict(
        **zuko_maps(),
        FreeFormJacobianTransform=lambda *args, **kwargs: Ours(stirred(TableRotor(5))),
        PermutationTransform=lambda order: Ours(Plugboard.from_permutation(order)),
        RotationTransform=square('orthogonal'), LULinearTransform=square('plu'))}

ZUKO = {
    'test_univariate_transforms[True]':
        'its tolerance of 1e-4 in float32 asks of a spline that no part of it is nearly flat',
    **{f'test_flows[{name}]': "an architecture of zuko's, from its own parts"
       for name in ('MAF', 'SOSPF', 'NAF', 'UNAF', 'CNF', 'GF', 'BPF')},
    'test_triangular_transforms': "a layer of zuko's, from its own parts",
    'adjacency_matrix': "a layer of zuko's, from its own parts",
    'test_bayesian': 'no bijection in it: Bayesian layers',
    'test_distributions': 'no bijection in it: distributions',
    'test_mixtures': 'no bijection in it: distributions', 'test_nn': 'no bijection in it: nets',
    'test_utils': 'no bijection in it: utilities'}

def zuko_cases():
    "Make zuko's test of four transforms a test of one of ours, of 6 channels; for each of ours."
    import test_transforms
    Ours, theirs = zuko_class(), test_transforms.test_multivariate_transforms
    names = ('FreeFormJacobianTransform', 'PermutationTransform', 'RotationTransform',
             'LULinearTransform')

    def case(name):
        def test():
            torch.manual_seed(0)
            wide = lambda *shape: torch.randn(*(6 if n == 5 else n for n in shape))
            make = lambda *args, **kwargs: Ours(ours(6)[name])
            FunctionType(theirs.__code__, {
                **theirs.__globals__, 'randn': wide, **dict.fromkeys(names, make)})()
        return test
    return {f'test_{name}': case(name) for name in ours(6)}

# revlib: a sequence of modules, each of which changes one of two streams

def revlib_patches():
    import revlib
    class Zero(nn.Module): # a partner for the last of an odd number
        def forward(self, x): return torch.zeros_like(x)

    def sequence(*blocks, memory_mode):
        CALLS['ours'] += 1
        blocks = [*blocks, Zero()] if len(blocks) % 2 else blocks
        stored = memory_mode == revlib.MemoryModes.no_savings
        chain = ReversibleSequence(
            list(zip(blocks[::2], blocks[1::2])), axis=1, keep=0,
            memory='store' if stored else 'reverse')
        if FAULT == 'gradient' and not stored:
            chain.register_full_backward_hook(lambda _, got, given: tuple(1.1*g for g in got))
        return chain
    return {'backend': dict(revlib=replaced(revlib, ReversibleSequential=sequence))}

REVLIB = {'memory_test': "CUDA's memory is measured, and there is no CUDA here"}

def revlib_cases(): return {}

def without_cuda():
    "Let tests that move everything to a GPU run on the CPU, and on smaller pictures."
    torch.Tensor.cuda = nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.cuda.empty_cache = lambda: None
    torch.manual_seed(0)
    whole = torch.randn
    torch.randn = lambda *args, **kwargs: (
        whole(*args, **kwargs)[..., :24, :24] if args[0] == (1, 3, 224, 224)
        else whole(*args, **kwargs))

# the plugin

NAME = os.environ.get('FOREIGN')
REFUSED = dict(nflows=NFLOWS, normflows=NORMFLOWS, zuko=ZUKO, revlib=REVLIB)
RECORDS = {}
FLOWS = {'test_flows[NSF]': ZukoFlow, 'test_flows[NICE]': affine_flow}

def pytest_configure(config):
    if NAME == 'revlib' and not torch.cuda.is_available(): without_cuda()

def pytest_collection_modifyitems(config, items):
    "Put our classes into the modules of the tests, and skip what is not for ours."
    import pytest
    tested = {item.module for item in items}
    if NAME == 'revlib': tested = {sys.modules['backend']}
    for ending, names in globals()[f'{NAME}_patches']().items():
        for module in tested:
            if ending == 'Ours' or not f'.{module.__name__}'.endswith(f'.{ending}'): continue
            for key, value in names.items():
                owner, (*path, name) = module, key.split('.')
                for part in path: owner = getattr(owner, part)
                assert hasattr(owner, name), f'{module.__name__} has no {key}'
                setattr(owner, name, value)
    for item in items: # zuko's kinds of flows are parameters of its test
        if NAME == 'zuko' and item.name in FLOWS: item.callspec.params['F'] = FLOWS[item.name]
        reason = next((why for part, why in REFUSED[NAME].items() if part in item.nodeid), None)
        if reason: item.add_marker(pytest.mark.skip(reason=reason))

def pytest_runtest_setup(item):
    CALLS.clear()
    torch.manual_seed(0)

def pytest_runtest_logreport(report):
    "Record the outcome of a test; one that passes without ours is no pass."
    if report.when != 'call' and report.outcome == 'passed': return
    reason = report.longrepr[2] if report.skipped else str(report.longrepr or '')[-2000:]
    outcome = report.outcome
    if outcome == 'passed' and not CALLS['ours']: outcome = 'not reached'
    if outcome == 'skipped': outcome = 'refused'
    RECORDS[report.nodeid] = dict(outcome=outcome, reason=reason.removeprefix('Skipped: '))

def pytest_sessionfinish(session):
    if file := os.environ.get('FOREIGN_REPORT'):
        Path(file).write_text(json.dumps(RECORDS, indent=1), encoding='utf-8')

# the table

def table(found):
    "Write what came out: suite → records."
    lines = ['| suite | version | passes | refusals | failures |', '|:--|:--|--:|:--|--:|']
    for name, records in found.items():
        kinds = Counter(r['outcome'] for r in records.values())
        reasons = Counter(r['reason'] for r in records.values() if r['outcome'] == 'refused')
        refused = '; '.join(f'{n} × {why}' for why, n in reasons.most_common())
        failures = sum(kinds.values()) - kinds['passed'] - kinds['refused']
        lines.append(f"| {name} | {SUITES[name].version} | {kinds['passed']} | "
                     f"{kinds['refused']}: {refused} | {failures} |")
    lines += [f'| {name} | {version} | 0 | its source distribution has no tests | 0 |'
              for name, version in NO_TESTS.items()]
    return '\n'.join(lines)

if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as folder:
        found = {name: run_suite(name, folder) for name in SUITES}
    print(table(found))
    for name, records in found.items():
        for test, r in records.items():
            if r['outcome'] not in ('passed', 'refused'):
                print(name, test, r['outcome'], r['reason'])
