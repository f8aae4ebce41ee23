"The library on a system that has less than Linux: no `resource`, no `/proc`, no `SIGHUP`."
import ast
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jedi
import pytest

import enigma_lab
from test_imports import MODULES

TYPESHED = Path(jedi.__file__).parent/'third_party'/'typeshed'/'stdlib'
PACKAGE = Path(enigma_lab.__file__).parent
# what is used although Windows lacks it, and what is done there instead
ASKED_FIRST = {
    ('bench.timing', 'os.getloadavg'): 'a benchmark is measured on Linux',
    ('lab.launch', 'os.setpgid'): 'hasattr: one group of processes',
    ('lab.papermill_plugin', 'signal.SIGHUP'): 'os.name is asked: no signal is passed on',
    ('lab.runs', 'os.getloadavg'): 'hasattr: the load is None',
    ('lab.system', 'fcntl'): 'ImportError: msvcrt locks',
    ('lab.system', 'fcntl.LOCK_EX'): 'the same',
    ('lab.system', 'fcntl.LOCK_NB'): 'the same',
    ('lab.system', 'fcntl.flock'): 'the same',
    ('lab.system', 'resource'): 'ImportError: psutil measures',
    ('lab.system', 'resource.RUSAGE_SELF'): 'the same',
    ('lab.system', 'resource.getrusage'): 'the same'}

def names_on(body, system):
    "What a stub file defines on a system, by the conditions that it states."
    here = dict(sys=SimpleNamespace(platform=system, version_info=sys.version_info))
    for node in body:
        if isinstance(node, ast.If):
            yield from names_on(node.body if eval(ast.unparse(node.test), here) else node.orelse,
                                system)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)): yield node.name
        elif isinstance(node, ast.ImportFrom) and node.level: yield '*'
        elif isinstance(node, ast.ImportFrom) and node.module.startswith('_'):
            # the C part of a module; of `_typeshed` come types alone
            if node.module != '_typeshed': yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.AnnAssign): yield ast.unparse(node.target)
        elif isinstance(node, ast.Assign): yield from map(ast.unparse, node.targets)

@cache
def missing_on_windows(module):
    "Names that a module of the standard library has on Linux alone; with '' if all of them."
    paths = [TYPESHED/f'{module}.pyi', TYPESHED/module/'__init__.pyi']
    path = next((path for path in paths if path.is_file()), None)
    if path is None: return set()
    body = ast.parse(path.read_text(encoding='utf-8')).body
    linux, windows = ({*names_on(body, system)} for system in ('linux', 'win32'))
    alone = not any(name for name in windows if not name.startswith('_'))
    return linux - windows | ({''} if linux and alone else set())

def linux_names(path):
    "What a file uses of the standard library that Windows lacks."
    tree = ast.parse(path.read_text(encoding='utf-8'))
    found = set()
    def look(module, name):
        if module.partition('.')[0] not in sys.stdlib_module_names: return
        if name in missing_on_windows(module): found.add(f'{module}.{name}'.rstrip('.'))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names: look(alias.name, '')
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for name in ('', *(alias.name for alias in node.names)): look(node.module, name)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            look(node.value.id, node.attr)
    return found

def test_what_windows_lacks_is_asked_for_first():
    found = {('.'.join(path.relative_to(PACKAGE).with_suffix('').parts), name)
             for path in PACKAGE.rglob('*.py') for name in linux_names(path)}
    assert found == ASKED_FIRST.keys()

def test_the_oracle_knows(tmp_path):
    path = tmp_path/'a.py'
    path.write_text('import os, pwd, signal\nfrom os import fork\nos.replace\nos.sched_getaffinity'
                    '\nsignal.SIGQUIT\nsignal.SIGINT\ndef f():\n    import termios, json')
    assert linux_names(path) == {'pwd', 'os.fork', 'os.sched_getaffinity', 'signal.SIGQUIT',
                                 'termios'}

LESS = """
import builtins, importlib, io, os, signal, sys
import psutil, torch, transformers, datasets, accelerate, diffusers, peft, papermill, matplotlib

def is_ours(): # whether the library asks, itself or through pathlib
    frame = sys._getframe(2)
    while frame and frame.f_globals.get('__name__') in ('pathlib', 'os', 'genericpath', 'shutil'):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get('__name__', '').startswith('enigma_lab')

def without_modules(real, names):
    def missing(name, globals=None, *args, **kwargs):
        ours = (globals or {}).get('__name__', '').startswith('enigma_lab')
        if ours and name in names: raise ModuleNotFoundError(f'No module named {name!r}', name=name)
        return real(name, globals, *args, **kwargs)
    return missing

def without_proc(real):
    def missing(path, *args, **kwargs):
        gone = isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith('/proc')
        if gone and is_ours(): raise FileNotFoundError(2, 'No such file or directory', str(path))
        return real(path, *args, **kwargs)
    return missing

names = {'resource', 'fcntl', 'pwd', 'grp', 'termios', 'pty', 'tty', 'readline', 'syslog'}
builtins.__import__ = without_modules(builtins.__import__, names)
builtins.open = io.open = without_proc(open)
os.stat = without_proc(os.stat)
for module, gone in {signal: 'SIGHUP SIGQUIT SIGKILL SIGUSR1', os: 'fork forkpty sched_getaffinity '
                     'getloadavg killpg setsid getsid getpgid mkfifo nice uname'}.items():
    for name in gone.split(): delattr(module, name)
"""

def with_less(code):
    "Run code where the library finds what it would find on Windows."
    return subprocess.run([sys.executable, '-c', LESS + code], capture_output=True, text=True)

@pytest.mark.proof('lab.system', 'lab.task', 'lab.trainer', seeds=(0,))
def test_imports_and_a_training_with_less(own_runs, toy_text):
    result = with_less(f"""
for name in {MODULES!r}: importlib.import_module(name)
from enigma_lab.lab.system import peak_memory
from enigma_lab.lm.train import make_config, train
run = train(make_config('smoke', data={str(toy_text)!r}, max_steps=12, eval_steps=4, save_steps=4))
assert run.metrics['peak_mib'] == round(peak_memory()) > 50, (run.metrics, peak_memory())
assert run.env['load_average'] is None and run.env['kept_step'] in (4, 8, 12)
print(run.metrics['train_steps'])""")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1] == '12'

@pytest.mark.proof('lab.system')
def test_less_is_less():
    lines = ['import fcntl', 'open("/proc/self/status")', 'import signal; signal.SIGHUP',
             'from pathlib import Path; Path("/proc/cpuinfo").read_text()', 'import json']
    result = with_less(f"""
for line in {lines!r}:
    try: exec(line, dict(__name__='enigma_lab.toy'))
    except Exception as error: print(type(error).__name__)
    else: print('nothing')""")
    assert result.stdout.split() == ['ModuleNotFoundError', 'FileNotFoundError', 'AttributeError',
                                     'FileNotFoundError', 'nothing'], result.stderr
