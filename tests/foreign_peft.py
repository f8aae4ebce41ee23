"""Run peft's own tests of decoders on our models, and on a Llama of the same size.

They come from the source distribution of the installed version, fetched when they run; no line of
them is changed. In their lists of models of a hub is the folder of ours. (The control is a Llama:
peft skips methods for GPT-2 by its name, since its layers are no `nn.Linear`.)
`python tests/foreign_peft.py KIND` prints what came out.
"""
import importlib, sys
from importlib.metadata import version
from pathlib import Path

import foreign_hf
from foreign import fetch_source

VERSION, MODEL = version('peft'), 'tiny' # the folder's name is in the names of the tests
# What asks most of a model: low rank in all of peft's ways, scales, tokens and prefixes before the
# text, a network beside it. The other methods change an `nn.Linear` in place, as LoRA does.
METHODS = ('Lora', 'AdaLora', 'IA3', 'PrefixTuning', 'PromptTuning', 'PromptEncoder', 'CPT',
           'Cartridge', 'Shadow', 'OFT')

# in the process that tests

def name_layers():
    "Tell peft the names of our layers where it knows Llama's: they are the same."
    constants = importlib.import_module('peft.utils.constants')
    for known in vars(constants).values():
        if isinstance(known, dict) and 'llama' in known: known['enigma'] = known['llama']

def cases():
    "Import the tests, with our model in the place of the hub's and the methods of the list."
    import enigma_lab.lm.model  # noqa: F401, tells transformers our classes
    name_layers()
    tests = importlib.import_module('tests.test_decoder_models')
    for models in (tests.PEFT_DECODER_MODELS_TO_TEST, tests.SMALL_GRID_MODELS): models[:] = [MODEL]
    kept = {f'{name}Config' for name in METHODS}
    tests.ALL_CONFIGS[:] = [given for given in tests.ALL_CONFIGS if given[0].__name__ in kept]
    return {name: value for name, value in vars(tests).items() if name.startswith('Test')}

# in the process that asks

def save_model(kind, folder):
    "Save a small model of a kind with its tokenizer."
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    import enigma_lab.lm.model  # noqa: F401, tells transformers our classes
    tokenizer = foreign_hf.make_tokenizer('ours')
    config = foreign_hf.make_config(kind) if kind != 'llama' else LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64)
    config.vocab_size = len(tokenizer)
    for name in ('pad', 'bos', 'eos'):
        setattr(config, f'{name}_token_id', getattr(tokenizer, f'{name}_token_id'))
    torch.manual_seed(0)
    for made in (AutoModelForCausalLM.from_config(config), tokenizer): made.save_pretrained(folder)

def fetch(folder):
    "Fetch the tests, and what they need, once; raise `NotFetched` without a package index."
    root = Path(folder)/f'peft-{VERSION}'
    if not root.is_dir():
        foreign_hf.fetch(folder) # for what both need
        fetch_source('peft', VERSION, folder)
        (root/'tests/__init__.py').touch()
        (root/'tests/ours_test.py').write_text(
            'import foreign_peft\nglobals().update(foreign_peft.cases())\n', encoding='utf-8')
    return root

def run(kind, folder, names=()):
    "Run the tests, or those of `names`, on a kind of model; return name -> (outcome, reason)."
    root, place = fetch(folder), Path(folder)/kind
    if not place.is_dir(): save_model(kind, place/MODEL)
    # a test without `MODEL` in its name asks a hub for a model of its own
    return foreign_hf.run_tests(kind, root, folder, MODEL, place=place, names=names)

def run_worse(kind, folder):
    "Run the tests; return all, and those that do not pass on ours and pass on the control."
    ours = run(kind, folder)
    rest = {name for name, (outcome, _) in ours.items() if outcome != 'passed'}
    return ours, foreign_hf.worse(ours, run('llama', folder, rest) if rest else {})

if __name__ == '__main__':
    place = Path(sys.argv[2] if len(sys.argv) > 2 else '.foreign').resolve()
    place.mkdir(exist_ok=True)
    ours, worse = run_worse(sys.argv[1], place)
    print(len(ours), 'tests,', sum(outcome == 'passed' for outcome, _ in ours.values()), 'passed')
    for name, (outcome, reason) in worse.items(): print(name, outcome, reason)
