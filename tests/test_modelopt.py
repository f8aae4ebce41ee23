"ModelOpt's SparseGPT as a judge of ours: the same masks from the same inputs (Apache-2.0)."
import copy, warnings

import pytest, torch
from torch import nn

from enigma_lab.maskpro.masks import apply_masks, verify_weights
from enigma_lab.maskpro.sparsegpt import sparsegpt

@pytest.fixture(scope='module')
def peer():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return pytest.importorskip('modelopt.torch.sparsity',
                                   reason='nvidia-modelopt is not installed')

def linears(seed=0):
    "Three layers, and inputs that go together."
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 160), nn.GELU(),
                        nn.Linear(160, 32))
    mix = torch.randn(64, 64, generator=g)
    return net, [torch.randn(40, 64, generator=g) @ mix for _ in range(8)]

def convolutions(kernel, seed=0):
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(16, 32, kernel), nn.GELU(), nn.Conv2d(32, 16, kernel))
    mix = torch.randn(16, 16, generator=g)
    images = [torch.randn(4, 16, 9, 9, generator=g) for _ in range(8)]
    return net, [torch.einsum('nchw,cd->ndhw', x, mix) for x in images]

def theirs(peer, net, batches, damp):
    "Name -> mask, as ModelOpt finds it with its own hooks."
    net = copy.deepcopy(net)
    names = {module: name for name, module in net.named_modules()}
    config = dict(forward_loop=lambda model: [model(b.clone()) for b in batches],
                  pattern='2:4 sparsity', hessian_damp=damp, device='cpu', verbose=False)
    sparse = peer.sparsify(net, 'sparsegpt', config=config)
    return {names[module]: module._weight_mask for module in sparse.modules()
            if getattr(module, '_weight_mask', None) is not None}

def ours(net, batches, damp):
    masks = apply_masks(copy.deepcopy(net), protect=())
    masks.set(sparsegpt(masks, lambda model, b: model(b), batches, damp=damp, update=False)[0])
    return {layer.name: layer.mask.bool() for layer in masks.layers}

@pytest.mark.parametrize('damp', [.01, .1])
@pytest.mark.parametrize('make', [linears, lambda: convolutions(1)], ids=['linear', '1x1'])
def test_the_same_masks(peer, make, damp):
    "Group by group; ModelOpt computes in float32, so a tie in a thousand may fall otherwise."
    net, batches = make()
    a, b = ours(net, batches, damp), theirs(peer, net, batches, damp)
    assert a.keys() == b.keys() and len(a) >= 2
    for name in a:
        same = (a[name] == b[name].view_as(a[name])).flatten(1).reshape(-1, 4).all(1)
        assert same.double().mean() >= .999, (name, same.double().mean())

def test_another_mask_is_seen(peer):
    "The measure can fail: other inputs, or hardly any damping, give other masks."
    net, batches = linears()
    a, b = ours(net, batches, 10.), theirs(peer, net, batches, .01)
    assert min((a[name] == b[name]).float().mean() for name in a) < .99

def test_larger_kernels_are_grouped_flat(peer):
    "ModelOpt groups a 3 × 3 weight as it lies in memory; sparse kernels read other groups."
    net, batches = convolutions(3)
    found = theirs(peer, net, batches, .1)
    for name, mask in found.items(): net.get_submodule(name).weight.data *= mask
    flat = [m.flatten(1).reshape(-1, 4).sum(1) for m in found.values()]
    assert all((kept == 2).all() for kept in flat)
    with pytest.raises(ValueError): verify_weights(net)
