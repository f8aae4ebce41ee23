"What a checkpoint lacks begins as in a new model: each module can reset all that it owns."
import copy, itertools

import pytest, torch, transformers

from enigma_lab.lm.model import EnigmaConfig, EnigmaForCausalLM
from enigma_lab.machine.enigma import Enigma

MACHINES = [dict(machine='input'), dict(machine='both', reciprocal=True),
            dict(machine='both', exact=True, reversible=True),
            dict(machine='between', reversible=True), dict(machine='input', rotor='permutation'),
            dict(machine='both', rotor='sinkhorn'),
            dict(machine='input', parametrization='orthogonal', rotor='table')]
machines = pytest.mark.parametrize('changes', MACHINES, ids=str)
DRAWN = '.up.weight', '.up.bias', '.down.weight', '.down.bias' # from the global generator

def make(changes):
    torch.manual_seed(0)
    return EnigmaForCausalLM(EnigmaConfig.preset('smoke', vocab_size=40, max_len=64, **changes))

def tensors(module): return dict(itertools.chain(module.named_parameters(), module.named_buffers()))

@machines
def test_every_tensor_is_reset(changes):
    "As FSDP does it: memory without values, then `reset_parameters` of every module."
    whole = make(changes)
    empty = copy.deepcopy(whole).to_empty(device='cpu')
    for t in tensors(empty).values(): t.data.fill_(float('nan') if t.is_floating_point() else -9)
    for module in empty.modules():
        if hasattr(module, 'reset_parameters'): module.reset_parameters()
    found, expected = tensors(empty), tensors(whole)
    for name, t in found.items():
        assert t.isfinite().all() if t.is_floating_point() else (t >= 0).all(), name
        if name.startswith('model.enigma') and not name.endswith(DRAWN):
            assert torch.equal(t, expected[name]), name

@machines
def test_a_checkpoint_without_a_machine(tmp_path, changes):
    plain = make({**{k: v for k, v in changes.items() if k in ('exact', 'reversible')},
                  'machine': 'none', **({'exact': False} if 'exact' in changes else {})})
    plain.save_pretrained(tmp_path)
    found = EnigmaForCausalLM.from_pretrained(tmp_path, **changes)
    new, old = tensors(make(changes)), tensors(plain)
    for name, t in tensors(found).items():
        if name in old: assert torch.equal(t, old[name]), name
        elif not name.endswith(DRAWN): assert torch.equal(t, new[name]), name
        else: assert 0 < t.std() < 2*new[name].std(), name
    ids = torch.arange(20)[None]
    with torch.no_grad(): assert found(ids).logits.isfinite().all()

def test_what_a_checkpoint_brings_is_kept(tmp_path):
    "Half of a module is missing: the other half, of another seed, is not wired anew."
    model = make(dict(machine='input'))
    wired = next(m for m in model.modules() if hasattr(m, 'permutation'))
    wired.permutation.copy_(wired.permutation.flip(0))
    name = next(n for n, m in model.named_modules() if m is wired)
    state = {k: v for k, v in model.state_dict().items()
             if not (k.startswith(name + '.') and not k.endswith('permutation'))}
    model.save_pretrained(tmp_path, state_dict=state)
    found = EnigmaForCausalLM.from_pretrained(tmp_path).get_submodule(name)
    assert torch.equal(found.permutation, wired.permutation)
    assert torch.equal(found.sign, wired.sign)

def test_a_machine_from_shapes():
    with torch.device('meta'): shape = Enigma(16)
    real, whole = shape.to_empty(device='cpu'), Enigma(16)
    for module in real.modules():
        if hasattr(module, 'reset_parameters'): module.reset_parameters()
    x = torch.randn(5, 16)
    assert torch.equal(real.plugboard(x), whole.plugboard(x))
    assert torch.allclose(real.inverse(real(x)), x, atol=1e-4)

transformers.logging.set_verbosity_error()
