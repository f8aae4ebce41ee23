"Ask whether the model sees what it is to predict: perplexity of noise, with the mask and without."
import math

import pytest, torch

import enigma_lab.lm.model as lm
from enigma_lab.lm.attention import alibi_slopes

V, T = 16, 16

def original_attention(q, k, v, scale, mask=None, dropout=0.):
    "What the original network computed: symmetric distances, and no mask."
    distance = (torch.arange(q.shape[-2])[:, None] - torch.arange(k.shape[-2])).abs()
    bias = -alibi_slopes(q.shape[1])[:, None, None] * distance
    assert mask.shape[1:] == bias.shape  # a short text: distances come in the mask
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)

def perplexity_of_noise(machine, steps=200, seed=0):
    "Train on fresh independent tokens, then score 200,000 more."
    torch.manual_seed(seed)
    model = lm.EnigmaForCausalLM(
        lm.EnigmaConfig.preset('smoke', vocab_size=V, machine=machine, rotor='roll')
    )
    stream = torch.Generator().manual_seed(seed + 1) # never repeats itself
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        x = torch.randint(V, (64, T), generator=stream)
        loss = model(x, labels=x).loss
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    with torch.no_grad():
        losses = [
            model.eval()(x, labels=x).loss
            for x in torch.randint(V, (14, 1000, T), generator=stream)
        ]
    assert 14 * 1000 * (T - 1) >= 200_000
    return math.exp(torch.stack(losses).mean().item())

@pytest.mark.parametrize('machine', ['none', 'input', 'both'])
def test_noise_stays_noise(machine): assert perplexity_of_noise(machine, steps=60) >= .99 * V

@pytest.mark.proof('lm.model', 'lm.attention', seeds=(1, 2))
@pytest.mark.parametrize('seed', [1, 2])
@pytest.mark.parametrize('machine', ['none', 'input', 'both'])
def test_noise_stays_noise_for_other_seeds(machine, seed):
    "Twice as long a training finds no leak either."
    assert perplexity_of_noise(machine, steps=400, seed=seed) >= .98 * V

@pytest.mark.proof('lm.model', 'lm.attention', seeds=(0,))
def test_without_the_mask_noise_is_predicted(monkeypatch):
    "The positive control: this test can find a leak."
    monkeypatch.setattr(lm, 'causal_attention', original_attention)
    # found suddenly, after a few hundred updates
    assert (
        perplexity_of_noise('input', steps=400) < V / 2
    )
