"Every module imports, and the lower rooms with little."
import ast, pkgutil, subprocess, sys, tempfile

import pytest

import enigma_lab
from enigma_lab.lab.runs import checkout

ROOT = checkout(__file__)
MODULES = [m.name for m in pkgutil.walk_packages(enigma_lab.__path__, 'enigma_lab.') if not m.ispkg]
HEAVY = (
    'diffusers peft trl wandb tensorboard papermill nbclient IPython ipywidgets matplotlib pandas '
    'datasets pyppmd nbdev execnb fastcore'
).split()
BARE = [*HEAVY, 'transformers', 'accelerate', 'tokenizers', 'safetensors']  # leaves torch alone
BLOCKER = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def visible(name, path=None, target=None):
    return None if name.split('.')[0] in {names!r} else find(name, path, target)
PathFinder.find_spec = staticmethod(visible)
"""

def run(code, blocked=()):
    return subprocess.run(
        [sys.executable, '-c', BLOCKER.format(names=set(blocked)) + code],
        capture_output=True,
        text=True,
    )

@pytest.mark.quick
def test_all_modules_import():
    assert len(MODULES) > 20
    result = run('import importlib\nfor name in %r: importlib.import_module(name)' % MODULES)
    assert result.returncode == 0, result.stderr

def test_the_machine_needs_torch_alone():
    names = [name for name in MODULES if name.startswith('enigma_lab.machine.')] + [
        'enigma_lab.lm.attention'
    ]
    assert len(names) >= 7
    result = run('import importlib\nfor name in %r: importlib.import_module(name)' % names, BARE)
    assert result.returncode == 0, result.stderr

def test_a_bare_gpu_machine():
    "torch, transformers and accelerate are enough to train."
    names = [
        'lm.model',
        'lm.train',
        'lm.generate',
        'lm.evaluate',
        'lab.trainer',
        'lab.train_loop',
        'data.text',
    ]
    result = run(
        'import importlib\nfor name in %r: importlib.import_module(f"enigma_lab.{name}")' % names,
        HEAVY,
    )
    assert result.returncode == 0, result.stderr

def test_the_blocker_blocks():
    assert "No module named 'fastcore'" in run('import fastcore', BARE).stderr
    assert run('import enigma_lab.lm.model', BARE).returncode != 0

def test_a_missing_library_names_its_extra(tmp_path):
    code = "from enigma_lab.data.text import load_text\nload_text('nobody/nothing')"
    assert "pip install 'enigma_lab[lm]'" in run(code, ['datasets']).stderr
    code = "from enigma_lab.lm.baselines import compressor_bits\ncompressor_bits(['a'], ['b'])"
    assert "enigma_lab[bench]" in run(code, ['pyppmd']).stderr

@pytest.mark.quick
@pytest.mark.parametrize('path', sorted((ROOT/'nbs').rglob('*.ipynb')), ids=lambda path: path.stem)
def test_a_page_tells_nothing_of_its_machine(path):
    "No output with a warning of an installed library or a temporary folder, and no error."
    text = path.read_text(encoding='utf-8')
    assert (
        'site-packages/' not in text
        and f'{tempfile.gettempdir()}/tmp' not in text
        and '"output_type": "error"' not in text
    )

def borrowed_methods(source):
    "Find methods that a module gives to the class of another: `@patch`, or an attribute set."
    tree = ast.parse(source)
    own = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    imports = [node for node in tree.body if isinstance(node, (ast.ImportFrom, ast.Import))]
    others = {alias.asname or alias.name for node in imports for alias in node.names} - own
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            marks = {ast.unparse(mark).split('(')[0] for mark in node.decorator_list}
            cls = node.args.args and node.args.args[0].annotation
            if marks & {'patch', 'patch_property', 'patch_to'} and ast.unparse(cls) not in own:
                yield f'{ast.unparse(cls)}.{node.name}'
        targets = getattr(node, 'targets', [getattr(node, 'target', None)])
        for target in targets if isinstance(node, (ast.Assign, ast.AnnAssign)) else []:
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) in others:
                if target.value.id[0].isupper(): yield ast.unparse(target)

@pytest.mark.quick
def test_a_class_is_whole_after_importing_its_module():
    found = {path.relative_to(ROOT).as_posix(): list(borrowed_methods(path.read_text('utf-8')))
             for path in (ROOT/'enigma_lab').rglob('*.py')}
    assert {name: methods for name, methods in found.items() if methods} == {}
    guest = 'from x import A\nclass B: pass\nA.g = 1\nB.g = 1\n'
    guest += '@patch\ndef f(self:A): pass\n@patch\ndef f(self:B): pass'
    assert set(borrowed_methods(guest)) == {'A.f', 'A.g'} # the positive control
