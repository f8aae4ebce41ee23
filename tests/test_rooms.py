"The house in order: which module may import which, imports do nothing else, old names work."
import ast
import os
import pkgutil
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import enigma_lab
from enigma_lab.lab.aliases import MOVED, RENAMED
from enigma_lab.lab.runs import checkout

ROOT = checkout(Path(__file__).parent)
MODULES = [m.name for m in pkgutil.walk_packages(enigma_lab.__path__, 'enigma_lab.') if not m.ispkg]
MODULES = [name for name in MODULES if not name.endswith('._modidx')]
FLOORS = dict(lab=0, machine=1, data=2, ddpm=3, lm=4, flow=4, sgdd=4, maskpro=4, bench=5, apps=5,
              cli=6, dev=7, results=8)
TOP = set(
    '.ci .gitattributes .gitconfig .github .gitignore CHANGELOG.md CITATION.cff CONTRIBUTING.md '
    'LICENSE MODEL_CARD.md Makefile README.md README_ZH.md _quarto.yml configs constraints.txt '
    'enigma_lab nbs pyproject.toml runs settings.ini setup.py tests'.split())
GONE = { # without a successor: why
    'lab.docs.CSS': 'the style is that of dev.layout',
    'lab.docs.toctrees': 'the sidebar is a template of ours, dev.layout.sidebar_tree',
    'bench.maskpro.finetuned': 'maskpro.finetune.finetune is for every model',
    'bench.lm.open_run': 'bench.timing.open_record asks for the kind of record',
    'bench.reversible.open_run': 'bench.timing.open_record asks for the kind of record',
    'apps.complete.as_html': 'the page shades a text by its surprise, apps.complete.shaded_html',
    'apps.complete.write_on': 'the page asks for the next piece, apps.complete.ask_all',
    'apps.sampler.as_table': 'the page draws what `write_one` returns',
    'apps.sampler.cell': 'the page draws what `write_one` returns',
    **{f'apps.masks.{name}': 'the page draws what `MasksApp` answers' for name in (
        'change_table', 'heat_map', 'image_row', 'knobs', 'legend', 'picture', 'show_step')},
    **dict.fromkeys(('apps.chat.ChatView', 'apps.chat.INPUT_JS', 'apps.chat.input_field'),
                    'the front end is the module of apps.chat.ChatApp'),
    **dict.fromkeys(('apps.chat.Conversation', 'apps.chat.new_conversation',
                     'apps.chat.newest_conversation', 'apps.chat.export_link'),
                    "a conversation is kept in its visitor's browser"),
    'apps.chat.chat_knobs': 'the table apps.chat.KNOBS',
    'apps.chat.speak': 'the page asks for the next piece, apps.chat.ask_chat',
    'cli.run_line': 'the table of runs is made in lab.runs',
    'lab.launch.same_signals': 'the launcher works in a thread, which touches no handler',
    'machine.reversible.check_traceable': 'a compiler is told by what a function draws',
    'machine.reversible.weights': 'a step lists what it reads',
    'sgdd.loop.PROBABLE': 'a text is probable by two limits, sgdd.verdict.LIMITS',
    'lm.train.replace_resume': 'every setting goes through one function'}

def room(name): return name.removeprefix('enigma_lab.').partition('.')[0]

def imports_of(name, inside=True):
    "Modules of the library that a module imports; `inside`: in its functions, too."
    path = ROOT/(name.replace('.', '/') + '.py')
    tree = ast.parse(path.read_text(encoding='utf-8'))
    nodes = list(ast.walk(tree)) if inside else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        if not isinstance(node, ast.ImportFrom): continue
        base = '.'.join(name.split('.')[:-node.level] if node.level else [])
        source = '.'.join(filter(None, [base, node.module]))
        found |= {source, *(f'{source}.{a.name}' for a in node.names)}
    return found & {*MODULES} - {name}

def faults(graph):
    "What breaks the rules of the house: {module: modules it imports} -> words."
    wrong = []
    for name, others in graph.items():
        for other in others:
            here, there = room(name), room(other)
            if here == there: continue
            if there == 'dev' and here != 'results':
                wrong.append(f'{name} imports {other}: nothing but the results imports dev')
            elif FLOORS[there] > FLOORS[here]:
                wrong.append(f'{name} imports {other}: an arrow upward')
            elif FLOORS[there] == FLOORS[here]:
                wrong.append(f'{name} imports {other}: an arrow sideways')
    return wrong

def test_imports_point_down():
    graph = {name: imports_of(name) for name in MODULES}
    assert sum(map(len, graph.values())) > 150
    assert not faults(graph)
    with_one_more = {**graph,
                     'enigma_lab.machine.rotor': {'enigma_lab.lm.model', 'enigma_lab.dev.docs'}}
    assert len(faults(with_one_more)) == 2

def test_no_circle():
    graph = {name: imports_of(name, inside=False) for name in MODULES}
    assert list(TopologicalSorter(graph).static_order())
    circle = {**graph, 'enigma_lab.lab.runs': {'enigma_lab.lab.trainer'}}
    with pytest.raises(CycleError): list(TopologicalSorter(circle).static_order())

def test_maskpro_holds_no_diffusion_model():
    names = {node.id for name in MODULES if room(name) == 'maskpro'
             for node in ast.walk(
                 ast.parse((ROOT/(name.replace('.', '/') + '.py')).read_text(encoding='utf-8')))
             if isinstance(node, ast.Name)}
    assert 'Tensor' in names and not names & {'UNet2DModel', 'DDPMScheduler', 'DDIMScheduler'}

IMPORT_ALL = """
import importlib, os, sys, warnings
warnings.simplefilter('ignore')
# libraries of others once: each child is a fresh process that has imported nothing of ours
for name in {others!r}:
    module, _, item = name.rpartition('.')
    try: importlib.import_module(name)
    except ImportError:
        try: getattr(importlib.import_module(module), item) # many are loaded when asked for
        except (ImportError, AttributeError, ValueError): pass
sys.path.insert(0, {root!r})
os.chdir({folder!r})
sys.argv = ['papermill', 'nbs/train_enigma.ipynb', '-p', 'gpus', '5']
state = lambda: dict(argv=list(sys.argv), files=sorted(os.listdir()), cwd=os.getcwd(), **os.environ)
failed = 0
for name in {modules!r}:
    child = os.fork()
    if child == 0:
        before = state()
        try: importlib.import_module(name)
        except BaseException as e: print(name, type(e).__name__, e); os._exit(1)
        after = state()
        changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
        if changed: print(name, 'changed', changed); os._exit(1)
        os._exit(0)
    failed += os.waitpid(child, 0)[1] != 0
print(failed, 'failed')
"""
LOOK_UP = """
print('names')
for line in {names!r}:
    module, _, name = line.rpartition('.')
    try: getattr(importlib.import_module('enigma_lab.' + module), name)
    except (ImportError, AttributeError) as e: print(line, e)
"""
OLD = (Path(__file__).parent/'names_0.1.0.txt').read_text(encoding='utf-8').split()

def libraries():
    "What the modules import of other libraries, at the top."
    found = set()
    for name in MODULES:
        for node in ast.parse(
            (ROOT/(name.replace('.', '/') + '.py')).read_text(encoding='utf-8')).body:
            if isinstance(node, ast.Import): found |= {a.name for a in node.names}
            if isinstance(node, ast.ImportFrom) and not node.level:
                found |= {node.module, *(f'{node.module}.{a.name}' for a in node.names)}
    return sorted(name for name in found if not name.startswith('enigma_lab'))

@pytest.fixture(scope='module')
def imported(tmp_path_factory):
    "Import everything in one process, each module in a child of it first; return what was said."
    code = IMPORT_ALL.format(root=str(ROOT), folder=str(tmp_path_factory.mktemp('empty')),
                             modules=MODULES, others=libraries()) + LOOK_UP.format(names=OLD)
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    modules, _, names = done.stdout.partition('names\n')
    return modules, names

def test_importing_does_nothing_else(imported):
    modules, _ = imported
    assert modules.strip().endswith('0 failed'), modules[-3000:]

def test_names_of_the_last_version_work(imported):
    "Every public name of 0.1.0 is found where it was, moved or renamed."
    assert len(OLD) > 1000
    _, names = imported
    lost = [line for line in names.splitlines() if line.split()[0] not in GONE]
    assert not lost, lost

def test_a_table_of_names_says_what_is_there():
    "Each row leads to a module, and each new name is in it."
    for old, places in MOVED.items():
        for place in places.split(): assert f'enigma_lab.{place}' in MODULES, (old, place)
    for module, names in RENAMED.items():
        text = (ROOT/'enigma_lab'/(module.replace('.', '/') + '.py')).read_text(encoding='utf-8')
        for old, new in names.items():
            assert f"'{new}'" in text, (module, old, new)

def test_names_of_a_module_differ_by_more_than_case():
    "The address of a card is its name in small letters: `Runs` and `runs` would share one."
    for path in sorted((ROOT/'enigma_lab').rglob('*.py')):
        names = [node.name for node in ast.parse(path.read_text(encoding='utf-8')).body
                 if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != '_'
                 and not any('patch' in ast.unparse(d) for d in node.decorator_list)] # methods
        names = sorted(set(names), key=str.lower)
        same = [pair for pair in zip(names, names[1:]) if pair[0].lower() == pair[1].lower()]
        assert not same, f'{path.name}: {same}'

@pytest.mark.skipif(not shutil.which('git') or not (ROOT/'.git').exists(), reason='needs git')
def test_the_top_level_has_its_shape():
    listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True).stdout
    assert {path.split('/')[0] for path in listed.splitlines()} == TOP
