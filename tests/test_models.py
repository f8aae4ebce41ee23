"Mask small models of other libraries, save them, and load them with those libraries alone."
import copy

import pytest, torch
from torch import Tensor

from enigma_lab.maskpro.masks import (
    PROTECTED, apply_masks, find_masks, has_masks, remove_masks, verify_weights)
from enigma_lab.maskpro.models import MODEL_FAMILIES, by_hand, by_rule, check_family, make_family
from enigma_lab.maskpro.models import parameter_states
from enigma_lab.maskpro.roles import find_weights, plain_name
from enigma_lab.maskpro.storage import load_masks, save_masks
from enigma_lab.maskpro.subsets import subsets

pytestmark = pytest.mark.proof('maskpro.roles', 'maskpro.forward', 'maskpro.models',
                               'maskpro.layer', 'maskpro.masks', 'maskpro.storage', seeds=(0,))

def run(model, name):
    "Return what a model of a family gives for its inputs."
    with torch.no_grad(): found = model(**MODEL_FAMILIES[name].inputs())
    return found if isinstance(found, Tensor) else found[0]

def random_masks(model):
    "Put random 2:4 masks on a model."
    masks = apply_masks(model)
    generator = torch.Generator().manual_seed(0)
    masks.set(subsets(2, 4)[torch.randint(6, (masks.num_groups,), generator=generator)])
    return masks

@pytest.mark.parametrize('name', MODEL_FAMILIES)
def test_a_family_is_masked_as_by_hand(name):
    "Compare layers with the list, small and large; each masked layer has a derivative."
    family = MODEL_FAMILIES[name]
    for full in (False, True)[:1 if family.full is None else 2]:
        row = check_family(name, full)
        assert (row['missing'], row['extra']) == ([], []) and row['layers'] > 0
        # each parameter with two axes or more has a state, and no weight is counted twice
        model = make_family(family, full)
        found, reasons = by_rule(model)
        rows = parameter_states(model, found, reasons)
        wide = {plain_name(n): p.numel() for n, p in model.named_parameters() if p.ndim > 1}
        assert {r['parameter']: r['weights'] for r in rows} == wide
        assert all(r['reason'] for r in rows if r['state'] != 'masked')
    assert check_family(name)['silent'] == list(family.silent)

@pytest.mark.parametrize('name', MODEL_FAMILIES)
def test_a_family_goes_round(name, tmp_path):
    "Through a file of masks, through baking, and through the library's own files."
    dense = make_family(MODEL_FAMILIES[name])
    model = copy.deepcopy(dense)
    masks = random_masks(model)
    masked = run(model, name)
    assert not torch.equal(masked, run(dense, name))
    path = save_masks(masks, tmp_path/'masks.safetensors')
    twin = copy.deepcopy(dense)
    assert torch.equal(load_masks(path, twin).values(), masks.values())
    assert torch.equal(run(twin, name), masked)
    groups = {layer.name: layer.stop - layer.start for layer in masks.layers}
    remove_masks(model)
    assert not has_masks(model) and verify_weights(model) == groups
    # without masks torch may take a quicker path, which adds up in another order
    assert torch.allclose(run(model, name), masked, atol=1e-5)
    assert list(model.state_dict()) == list(dense.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in dense.named_parameters()]
    assert [type(m) for m in model.modules()] == [type(m) for m in dense.modules()]
    for key, p in dense.state_dict().items(): # nothing else has changed
        if plain_name(key) not in groups: assert torch.equal(model.state_dict()[key], p), key
    if hasattr(model, 'save_pretrained'):
        model.save_pretrained(tmp_path/'model')
        again = type(model).from_pretrained(tmp_path/'model').eval()
        assert verify_weights(again) == groups
        assert torch.allclose(run(again, name), masked, atol=1e-6)

@pytest.mark.parametrize('name', ['DiT', 'BERT', 'Mixtral', 'Flux'])
def test_names_alone_are_not_enough(name):
    "Without roles other layers are masked than by hand: the roles do it, not the names."
    model = make_family(MODEL_FAMILIES[name])
    names = [part for part in PROTECTED if part != 'roles']
    extra = {layer.name for layer in apply_masks(model, protect=names).layers}
    extra -= set(by_hand(make_family(MODEL_FAMILIES[name]), MODEL_FAMILIES[name]))
    assert extra if name != 'Mixtral' else not extra # its router is no linear layer

def test_the_router_of_older_experts():
    "Find a router that is a linear layer, by its shape, and by its class."
    model = make_family(MODEL_FAMILIES['Qwen 2 with experts'])
    masks = apply_masks(model)
    gates = {name: why for name, why in masks.dense.items() if name.endswith('gate')}
    assert len(gates) == 4 and set(gates.values()) == {'protected as a router'}
    assert {name.rpartition('.')[2] for name in gates} == {'gate', 'shared_expert_gate'}

@pytest.mark.parametrize('name,hidden', [
    ('Mixtral', 48), ('GPT-OSS', 48), ('Qwen 3 with experts', 24)])
def test_the_input_axis_of_experts(name, hidden):
    "The channels are those of the configuration, however a library stores them."
    weights = find_weights(make_family(MODEL_FAMILIES[name]))
    for layer, size in (('gate_up_proj', 32), ('down_proj', hidden)):
        assert weights[f'model.layers.0.mlp.experts.{layer}'].channels == size

def test_half_precision_and_optimizer():
    "Train a masked model of experts in bfloat16 for a step; the masks stay."
    model = make_family(MODEL_FAMILIES['Mixtral']).bfloat16()
    masks = random_masks(model)
    before = masks.values()
    optimizer = torch.optim.SGD(model.parameters(), .1)
    out = model(**MODEL_FAMILIES['Mixtral'].inputs()).logits
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    weight = find_masks(model).layers[0].weight
    mask = find_masks(model).layers[0].mask
    assert weight.grad.abs().sum() > 0 and not weight.grad[mask == 0].any()
    optimizer.step()
    assert torch.equal(find_masks(model).values(), before)
    assert set(find_weights(model)) >= {layer.name for layer in masks.layers}
