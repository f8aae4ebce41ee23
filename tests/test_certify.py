"Certificates of the machine and of one reversible block of every preset, at their real widths."
import pytest, torch
from torch import nn

from enigma_lab.lm.model import EnigmaConfig, EnigmaForCausalLM, presets
from enigma_lab.lm.reverse import certify_model

def certificates(preset, **changes):
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
    return certify_model(model, torch.randint(3, 50, (2, 16)))

@pytest.mark.parametrize('preset', presets)
def test_preset(preset):
    found = certificates(preset)
    machine, blocks = found['machine'], found['blocks']
    assert (
        machine.relative_error < 1e-5
        and machine.log_det_error < 1e-10
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
    found = certificates(preset, exact=True, rev_scale=False, reciprocal=reciprocal)
    machine, blocks = found['machine'], found['blocks']
    assert machine.level == 'any batch' and blocks.level != 'floats'
    assert machine.gradient_error == blocks.gradient_error == 0 and machine.range_used < .5
    assert machine.twice_error == (0 if reciprocal else None)
