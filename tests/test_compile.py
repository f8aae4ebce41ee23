"Compare the model under torch.compile and a static cache with the plain one: no graph break."
import pytest, torch
from transformers.utils import logging

from enigma_lab.lm.generate import generate
from enigma_lab.lm.model import EnigmaConfig, EnigmaForCausalLM

def stirred(**changes):
    torch.manual_seed(0)
    model = EnigmaForCausalLM(
        EnigmaConfig.preset('smoke', vocab_size=40, max_len=32, rotor='roll', **changes)
    ).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1*torch.randn_like(p))
    return model

places = pytest.mark.parametrize(
    'changes',
    [
        dict(machine='none'),
        dict(machine='input'),
        dict(machine='both'),
        dict(machine='between', reversible=True),
    ],
    ids=lambda c: c['machine'],
)

@places
def test_one_graph(changes):
    "Forward and backward in one graph, with the gradients of the plain run."
    model, ids = (
        stirred(**changes).train(),
        torch.randint(3, 40, (2, 16), generator=torch.Generator().manual_seed(1)),
    )
    model(ids, labels=ids).loss.backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend='aot_eager')(ids, labels=ids).loss.backward()
    for a, p in zip(plain, model.parameters()):
        torch.testing.assert_close(
            p.grad, a, rtol=1e-4, atol=1e-5 if model.config.reversible else 1e-6
        )

@places
def test_static_cache(changes):
    logging.set_verbosity_error()
    model, ids = (
        stirred(**changes),
        torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1)),
    )
    theirs = model.generate(
        ids,
        do_sample=False,
        max_new_tokens=12,
        cache_implementation='static',
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(
        theirs, generate(model, ids, temperature=0, max_new_tokens=12, eos_token_id=[])
    )
