"transformers' own tests of models, run on ours; see `foreign_hf.py`."
import itertools

import foreign
import foreign_hf
import pytest

# what a GPT-2 of the same size passes and ours does not, and why
BY_TEXT = 'looks in the source for a decorator; what it returns is tested by others'
DECORATOR = {name: BY_TEXT for name in (
    'test_can_capture_specific_layers_hidden_states', 'test_capture_outputs_decorator')}
NOTHING_STORED = {f'test_training_gradient_checkpointing{end}':
                  'counts second runs of a block, and the chain runs the parts of it'
                  for end in ('', '_use_reentrant_false', '_use_reentrant_true')}
REFUSED = {
    f'test_eager_matches_sdpa_inference_{first + n:02}_{dtype}_pad_{side}{mask}{kernels}':
    'exact streams need float32, and half precision is refused with the reason'
    for first, dtype in ((0, 'fp16'), (16, 'bf16')) for n, (side, mask, kernels) in enumerate(
        itertools.product(('left', 'right'), ('', '_no_attn_mask'), ('_sdpa_kernels', '')))}
LEFT = {kind: DECORATOR for kind in foreign_hf.KINDS if kind != 'gpt2'}
for kind in ('between', 'reversible', 'exact'): LEFT[kind] = DECORATOR | NOTHING_STORED
LEFT['exact'] |= REFUSED

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "Run the tests on a kind of model, and on the GPT-2 once."
    folder, found = tmp_path_factory.mktemp('transformers'), {}
    def run(kind):
        try:
            for name in ('gpt2', kind):
                if name not in found: found[name] = foreign_hf.run(name, folder)
        except foreign.NotFetched as e: pytest.skip(f'transformers could not be fetched: {e}')
        return found[kind], found['gpt2']
    return run

def check(ours, control, left, least=95):
    "Nothing is worse than the control but what is listed, and nothing listed has become better."
    worse = foreign_hf.worse(ours, control)
    assert len(left) <= 25
    assert {name: end for name, end in worse.items() if name not in left} == {}
    assert worse.keys() == left.keys()
    assert sum(outcome == 'passed' for outcome, _ in control.values()) >= least

# what a byte-level BPE of the same text passes and ours does not, and why
LEFT_TOKENS = {'test_alignment_methods': 'asks which word a token is in; characters know no words'}

@pytest.mark.proof('lm.tokenizer')
def test_tokenizers(tmp_path):
    try: ours, control = (foreign_hf.run_tokens(kind, tmp_path) for kind in ('ours', 'gpt2'))
    except foreign.NotFetched as e: pytest.skip(f'transformers could not be fetched: {e}')
    check(ours, control, LEFT_TOKENS, 50)

def test_a_plain_model(run): check(*run('none'), LEFT['none'])

@pytest.mark.proof('lm.model', 'lm.attention', 'machine.enigma', 'machine.reversible')
@pytest.mark.parametrize('kind', [kind for kind in LEFT if kind != 'none'])
def test_a_model_with(run, kind): check(*run(kind), LEFT[kind])
