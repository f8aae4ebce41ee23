"The cards of the API beside the source as others read it: fastcore's docments, and bytecode."
import ast
import dis
import importlib
import inspect
import pkgutil
import re

import pytest
from fastcore.docments import docments

import enigma_lab
from enigma_lab.dev.docs import (SymbolCard, check_api, find_definitions, public_methods,
                                 public_symbols, read_definitions)

MODULES = [m.name for m in pkgutil.walk_packages(enigma_lab.__path__, 'enigma_lab.')]

@pytest.fixture(scope='module')
def symbols():
    "Every public function, class and method that is written in the library."
    found = [sym for name in MODULES for sym in public_symbols(importlib.import_module(name))]
    return [sym for sym in found if find_definitions(sym)]

def place(sym): return f'{sym.__module__}.{sym.__qualname__}'

def test_everything_public_is_documented():
    "A docstring that starts with a verb, and a meaning for each parameter and return."
    assert not (found := check_api()), '\n'.join(map(str, found))

def rows(card): # of the first table: parameter -> meaning
    lines = SymbolCard(card)._repr_markdown_().partition('\n**')[0].splitlines()
    cells = [re.split(r'(?<!\\)\|', line)[1:-1] for line in lines if line.startswith('| ` ')]
    return {cell[0].strip(' `').partition('=')[0].lstrip('*'): cell[2].strip().replace(r'\|', '|')
            for cell in cells}

def header(function):
    "The definition, when each of its parameters has lines of its own; else nothing."
    source = inspect.getsource(inspect.unwrap(function))
    node = ast.parse(inspect.cleandoc('\n' + source)).body[0]
    spec = node.args
    args = [*spec.args, *filter(None, (spec.vararg, *spec.kwonlyargs, spec.kwarg))]
    lines = [a.lineno for a in args if a.arg not in ('self', 'cls')]
    apart = lines and len(set(lines)) == len(lines) and node.lineno not in lines
    return node if apart else None

def test_a_card_says_what_fastcore_reads(symbols):
    "Where each parameter has its own line; elsewhere fastcore gives one comment to the wrong name."
    compared = 0
    for sym in symbols:
        if not inspect.isfunction(sym) or not header(sym): continue
        theirs = docments(sym, args_kwargs=True, returns=False)
        for name, meaning in rows(sym).items():
            if not theirs.get(name): continue
            assert meaning == ' '.join(theirs[name].split()), f'{place(sym)}: {name}'
            compared += 1
    assert compared > 1000

def test_a_card_shows_only_parameters_that_the_library_defines(tmp_path, monkeypatch):
    "What a class inherits from another library has no row, and nothing is asked of it."
    (tmp_path/'toy_wheels').mkdir()
    (tmp_path/'toy_wheels/__init__.py').write_text('''
import argparse
__all__ = ['Words', 'Wheel', 'Geared']
class Words(argparse.ArgumentParser):
    "Read words."
class Wheel(argparse.ArgumentParser):
    "Hold a wheel."
    def __init__(
        self,
        teeth, # how many
        *args, # of the parser
    ): ...
class Geared(Wheel):
    "Hold a wheel with gears."
''')
    monkeypatch.syspath_prepend(tmp_path)
    toy = importlib.import_module('toy_wheels')
    assert len(inspect.signature(toy.Words).parameters) > 10 # the parser's own
    assert rows(toy.Words) == {}
    assert rows(toy.Wheel) == rows(toy.Geared) == dict(teeth='how many', args='of the parser')
    assert check_api('toy_wheels') == []

def test_a_comment_of_one_line_belongs_to_no_parameter():
    text = 'def f(x, y, z=lambda a: a): # HTML\n    return x'
    assert read_definitions(text)['f'].meanings == dict(x='', y='', z='', **{'return': 'HTML'})

def raising(code):
    "Whether bytecode raises a new error: not again what it caught, and not by `assert`."
    steps = list(dis.get_instructions(code))
    made = [i for i, step in enumerate(steps) if step.opname == 'RAISE_VARARGS' and step.arg]
    # the step before it, or before what follows `from`
    kinds = [steps[i - steps[i].arg].opname for i in made]
    return [kind for kind in kinds if kind.startswith(('CALL', 'LOAD_GLOBAL'))]

def test_errors_are_on_the_card_exactly_where_bytecode_raises(symbols):
    seen = 0
    for sym in symbols:
        if not inspect.isfunction(sym): continue
        shown = '| *raises* |' in SymbolCard(sym)._repr_markdown_()
        assert shown == bool(raising(inspect.unwrap(sym).__code__)), place(sym)
        seen += shown
    assert seen > 100

def test_a_class_shows_its_methods_and_their_errors(symbols):
    seen = 0
    for sym in filter(inspect.isclass, symbols):
        card = SymbolCard(sym)._repr_markdown_()
        for method in public_methods(sym):
            assert f'**` {method.__name__}(' in card, f'{sym.__qualname__}.{method.__name__}'
            seen += 1
        own = [f for f in vars(sym).values() if inspect.isfunction(f)
               and f.__module__ == sym.__module__ and '<' not in f.__code__.co_filename]
        made = [f for f in own if f.__name__ in ('__init__', '__post_init__')]
        hidden = [f for f in made if raising(f.__code__)]
        assert bool(hidden) <= ('| *raises* |' in card), sym.__qualname__
    assert seen > 100

def test_a_message_is_cut_to_its_rule():
    text = '''
def f(n):
    def inner(): raise KeyError("not f's own")
    if n: raise ValueError(f"n must be {n} or less, got {n}; take less")
    try: 1/n
    except ZeroDivisionError as error: raise
    raise FileExistsError("a file is never overwritten" + f", and {n} exists") from None
'''
    assert read_definitions(text)['f'].raises == [
        ('ValueError', 'n must be {…} or less'), ('FileExistsError', 'a file is never overwritten')]

def test_a_complaint_names_the_module_the_name_and_the_line(tmp_path, monkeypatch):
    (tmp_path/'toy_library').mkdir()
    (tmp_path/'toy_library/__init__.py').write_text('')
    (tmp_path/'toy_library/wheel.py').write_text('''
__all__ = ['turn', 'Rotor', 'hold']
def turn(x, y): # the letter
    "The letter after a turn."
def hold(
    x, # a letter
): "Hold a letter."
class Rotor:
    "Keep a wheel."
    def set(self): ...
    def forward(self, x): ...
    def _hidden(self): ...
''')
    monkeypatch.syspath_prepend(tmp_path)
    wheel = 'toy_library.wheel'
    assert [*map(str, check_api('toy_library'))] == [
        f'{wheel}.turn: its docstring must begin with a verb, not with The (line 3)',
        f'{wheel}.turn: x needs a comment on a line of its own (line 3)',
        f'{wheel}.turn: y needs a comment on a line of its own (line 3)',
        f'{wheel}.Rotor.set: it needs a docstring (line 10)']
    assert check_api('toy_library.other') == []
