"""Run transformers' own tests of models on ours, and on a GPT-2 of the same size.

They come from the source distribution of the installed version, fetched when they run; nothing is
copied and no line of them is changed. What they import and the distribution lacks is empty here.
`python tests/foreign_hf.py KIND` prints what came out.
"""
import importlib, json, os, subprocess, sys, types, unittest
from importlib.metadata import version
from pathlib import Path

from foreign import fetch_source, pip

VERSION, NEEDS = version('transformers'), ('parameterized==0.9.0',)
BASE = dict(vocab_size=99, dim=32, num_layers=2, num_heads=4, max_len=64, num_rev_blocks=1,
            num_positions=4)
KINDS = dict(
    gpt2=None, none={}, input=dict(machine='input'), both=dict(machine='both'),
    scaled=dict(machine='both', rev_scale=True, parametrization='plu', rotor='roll'),
    between=dict(machine='between', reversible=True), reversible=dict(reversible=True),
    exact=dict(machine='both', reversible=True, exact=True),
    quick=dict(activation='relu2', norm='layer', qk_norm=True, bias=False, gram_rows=64,
               gram_copies=3, tie_word_embeddings=False))

# in the process that tests

def put(name, **attributes):
    "Put a module in the place of one that the distribution lacks."
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(attributes)

def common():
    "Import the tests of models and of configurations."
    put('tests.exporters', __path__=[])
    put('tests.exporters.test_export', ExportTesterMixin=type('ExportTesterMixin', (), {}))
    put('tests.generation', __path__=[])
    put('tests.generation.test_utils', GenerationTesterMixin=type('GenerationTesterMixin', (), {}))
    put('tests.utils', __path__=[])
    put('tests.utils.test_configuration_utils', config_common_kwargs={})
    names = 'tests.test_modeling_common', 'tests.test_configuration_common'
    return map(importlib.import_module, names)

def make_config(kind):
    "Make a small configuration of a kind."
    if kind == 'gpt2':
        from transformers import GPT2Config
        return GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                          bos_token_id=1, eos_token_id=2, pad_token_id=0)
    from enigma_lab.lm.model import EnigmaConfig
    return EnigmaConfig(**{**BASE, **KINDS[kind]})

class Tester:
    "Describe a model as the tests ask for it."
    batch_size, seq_length, is_training = 3, 7, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 99

    def __init__(self, kind, base): self.kind, self.base_model_class = kind, base
    def get_config(self): return make_config(self.kind)

    def prepare_config_and_inputs_for_common(self):
        import torch
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), dict(input_ids=ids, attention_mask=torch.ones_like(ids))

def cases():
    "Make the test case of the kind that the environment names."
    kind = os.environ['FOREIGN']
    modeling, configuration = common()
    if kind == 'gpt2': from transformers import GPT2LMHeadModel as Head, GPT2Model as Base
    else: from enigma_lab.lm.model import EnigmaForCausalLM as Head, EnigmaModel as Base
    if kind != 'gpt2': # the tests know which models have no loss by their names
        modeling.MODEL_MAPPING_NAMES['enigma'] = Base.__name__
        modeling.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES['enigma'] = Head.__name__
    class TestModel(modeling.ModelTesterMixin, unittest.TestCase):
        all_model_classes = Base, Head
        def setUp(self):
            self.model_tester = Tester(kind, Base)
            own = dict(n_embd=36) if kind == 'gpt2' else dict(dim=36)
            self.config_tester = configuration.ConfigTester(
                self, config_class=type(make_config(kind)), **own,
                common_properties=['hidden_size', 'num_hidden_layers', 'num_attention_heads'])
        def test_config(self): self.config_tester.run_common_tests()
    return dict(TestModel=TestModel)

TEXT = """This is a test of what tokens make of a text.
A second line, with numbers such as 92000, with falsé and 生活的真谛是.

An empty line is before this one; words are low, lower, lowest and newer.
"""

def make_tokenizer(kind):
    "Make our tokenizer, or a byte-level BPE as GPT-2 has it."
    from enigma_lab.lm.tokenizer import load_tokenizer
    if kind != 'gpt2': return load_tokenizer('auto', [TEXT])
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast
    made, marks = ByteLevelBPETokenizer(), ['<|pad|>', '<|bos|>', '<|eos|>']
    made.train_from_iterator([TEXT], vocab_size=300, min_frequency=1, special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, pad_token=marks[0],
                                   bos_token=marks[1], eos_token=marks[2])

def token_cases():
    "Make the test case of the tokenizer that the environment names."
    kind, folder = os.environ['FOREIGN'], os.environ['FOREIGN_REPORT'] + '.tokenizer'
    names = 'tests.test_tokenization_common', 'tests.test_tokenizers_backend_mixin'
    common, backend = map(importlib.import_module, names)
    made = make_tokenizer(kind)
    made.save_pretrained(folder)
    class TestTokens(common.TokenizerTesterMixin, backend.TokenizersBackendTesterMixin,
                     unittest.TestCase):
        tokenizer_class = rust_tokenizer_class = type(made)
        from_pretrained_id = folder
    return dict(TestTokens=TestTokens)

class Reporter:
    "Run what is asked for, and note how each test ended; one that fails in part has failed."
    def __init__(self): self.found = {}

    def pytest_collection_modifyitems(self, items):
        names = json.loads(os.environ['FOREIGN_NAMES'])
        if names: items[:] = [item for item in items if item.name in names]

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.rpartition('::')[2]
        outcome, _ = self.found.get(name, ('', ''))
        if report.failed:
            text = [line for line in str(report.longrepr).splitlines() if line.startswith('E ')]
            self.found[name] = 'failed', (text or [''])[0][1:].strip()[:200]
        elif report.skipped and outcome != 'failed':
            self.found[name] = 'skipped', str(report.longrepr[2])[:200]
        elif report.when == 'call' and not outcome: self.found[name] = 'passed', ''

    def pytest_sessionfinish(self):
        Path(os.environ['FOREIGN_REPORT']).write_text(json.dumps(self.found), encoding='utf-8')

# in the process that asks

def fetch(folder):
    "Fetch the tests, and what they need, once; raise `NotFetched` without a package index."
    folder = Path(folder)
    if not (folder/'needs').is_dir():
        root = fetch_source('transformers', VERSION, folder)
        (root/'tests/__init__.py').touch()
        (root/'tests/ours_test.py').write_text(
            'import foreign_hf\nglobals().update(foreign_hf.cases())\n', encoding='utf-8')
        pip('install', '--target', folder/'needs', *NEEDS)
    return folder/f'transformers-{VERSION}'

def run_tests(kind, root, folder, only='', file='ours_test.py', place=None, names=()):
    "Run a file of tests, or `names` of it, on a kind; return name -> (outcome, reason)."
    here, report = Path(__file__).resolve().parent, Path(folder)/f'{kind}-{file}.json'
    env = {**os.environ, 'FOREIGN': kind, 'FOREIGN_REPORT': str(report), 'OMP_NUM_THREADS': '1',
           'FOREIGN_NAMES': json.dumps(sorted(names)), 'HF_HUB_OFFLINE': '1',
           'PYTHONPATH': os.pathsep.join(map(str, (root, here, here.parent, Path(folder)/'needs')))}
    code = ('import sys, pytest, foreign_hf; '
            'sys.exit(pytest.main(sys.argv[1:], [foreign_hf.Reporter()]))')
    done = subprocess.run(
        [sys.executable, '-c', code, '-q', '-p', 'no:cacheprovider', '-c', os.devnull, '--rootdir',
         root, '-W', 'ignore', '-k', only, root/'tests'/file],
        cwd=place or root, env=env, capture_output=True, text=True)
    # 0: all passed, 1: some failed; anything else, and the suite has not been run
    if done.returncode not in (0, 1): raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])
    found = json.loads(report.read_text(encoding='utf-8'))
    return {name: tuple(end) for name, end in found.items()}

def run(kind, folder, only=''):
    "Run the tests of models on a kind of model."
    return run_tests(kind, fetch(folder), folder, only)

def run_tokens(kind, folder):
    "Run the tests of tokenizers on ours, or on a byte-level BPE for comparison: 'gpt2'."
    root = fetch(folder)
    (root/'tests/fixtures').mkdir(exist_ok=True)
    (root/'tests/fixtures/sample_text.txt').write_text(TEXT, encoding='utf-8') # lacks it
    (root/'tests/tokens_test.py').write_text(
        'import foreign_hf\nglobals().update(foreign_hf.token_cases())\n', encoding='utf-8')
    return run_tests(kind, root, folder, file='tokens_test.py')

def worse(ours, control):
    "List the tests that a control passes and ours does not: name -> (outcome, reason)."
    return {name: end for name, end in ours.items()
            if end[0] != 'passed' and control.get(name, ('', ''))[0] == 'passed'}

if __name__ == '__main__':
    place = Path(sys.argv[2] if len(sys.argv) > 2 else '.foreign')
    place.mkdir(exist_ok=True)
    control = run('gpt2', place)
    for name, (outcome, reason) in worse(run(sys.argv[1], place), control).items():
        print(name, outcome, reason)
