"Every module imports, and the lower rooms with little."
import pkgutil, subprocess, sys, tempfile

import pytest

import enigma_lab
from enigma_lab.lab.runs import checkout

ROOT = checkout(__file__)
MODULES = [m.name for m in pkgutil.walk_packages(enigma_lab.__path__, 'enigma_lab.') if not m.ispkg]
HEAVY = 'diffusers peft trl wandb tensorboard papermill nbclient IPython ipywidgets matplotlib pandas datasets pyppmd nbdev execnb fastcore'.split()
BARE = [*HEAVY, 'transformers', 'accelerate', 'tokenizers', 'safetensors']  # leaves torch alone
BLOCKER = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, path=None, target=None: None if name.split('.')[0] in {names!r} else find(name, path, target))
"""

def run(code, blocked=()): return subprocess.run([sys.executable, '-c', BLOCKER.format(names=set(blocked)) + code], capture_output=True, text=True)

def test_all_modules_import():
    assert len(MODULES) > 20
    result = run('import importlib\nfor name in %r: importlib.import_module(name)' % MODULES)
    assert result.returncode == 0, result.stderr

def test_the_machine_needs_torch_alone():
    names = [name for name in MODULES if name.startswith('enigma_lab.machine.')] + ['enigma_lab.lm.attention']
    assert len(names) >= 7
    result = run('import importlib\nfor name in %r: importlib.import_module(name)' % names, BARE)
    assert result.returncode == 0, result.stderr

@pytest.mark.parametrize('module', ['lm.model', 'lm.train', 'lm.generate', 'lm.evaluate', 'lab.trainer', 'lab.train_loop', 'data.text'])
def test_a_bare_gpu_machine(module):
    "torch, transformers and accelerate are enough to train."
    result = run(f'import enigma_lab.{module}', HEAVY)
    assert result.returncode == 0, result.stderr

def test_the_blocker_blocks():
    assert "No module named 'fastcore'" in run('import fastcore', BARE).stderr
    assert run('import enigma_lab.lm.model', BARE).returncode != 0

def test_a_missing_library_names_its_extra(tmp_path):
    code = "from enigma_lab.data.text import load_text\nload_text('nobody/nothing')"
    assert "pip install 'enigma_lab[lm]'" in run(code, ['datasets']).stderr
    code = "from enigma_lab.lm.baselines import compressor_bits\ncompressor_bits(['a'], ['b'])"
    assert "enigma_lab[bench]" in run(code, ['pyppmd']).stderr

@pytest.mark.parametrize('path', sorted((ROOT/'nbs').rglob('*.ipynb')), ids=lambda path: path.stem)
def test_a_page_tells_nothing_of_its_machine(path):
    "No output with a warning of an installed library or a temporary folder, and no error."
    text = path.read_text(encoding='utf-8')
    assert 'site-packages/' not in text and f'{tempfile.gettempdir()}/tmp' not in text and '"output_type": "error"' not in text
