"peft's own tests of decoders, run on ours; see `foreign_peft.py`."
import foreign
import foreign_peft
import pytest

LEFT = {} # what a Llama of the same size passes and ours does not, and why

@pytest.mark.proof('lm.model', 'lm.attention', 'lm.tokenizer', 'machine.enigma')
@pytest.mark.parametrize('kind', ['none', 'both', 'quick'])
def test_a_model_with(kind, tmp_path):
    try: ours, worse = foreign_peft.run_worse(kind, tmp_path)
    except foreign.NotFetched as e: pytest.skip(f'peft could not be fetched: {e}')
    assert {name: end for name, end in worse.items() if name not in LEFT} == {}
    # what is listed has not become better
    assert worse.keys() == LEFT.keys()
    assert sum(outcome == 'passed' for outcome, _ in ours.values()) >= 300
