"""Every command that a page shows can be typed: its program, options, settings and files are there.

A command is a line of a fence, or a piece of code in a sentence. That it also does what it says is
shown for the guides in tests/test_guides.py, where each is run.
"""
import json
import re
import shlex
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from enigma_lab.cli import command_line, find_notebook, read_settings
from enigma_lab.lab.notebooks import check_parameters, notebook_parameters
from enigma_lab.lab.runs import checkout

ROOT = checkout(__file__)
PAGES = sorted(str(path.relative_to(ROOT/'nbs')) for path in (ROOT/'nbs').rglob('*.ipynb')
               if not path.name.startswith('_') and '.ipynb_checkpoints' not in path.parts)
GIVEN = {'nbs/x.ipynb'} # stands for any notebook

def commands(text):
    "List what a page's Markdown tells a reader to type."
    fences = re.findall(r'(?ms)^```(?!python|bibtex)\w*\n(.*?)^```', text)
    lines = [line for fence in fences for line in fence.replace('\\\n', ' ').splitlines()]
    spans = re.findall(r'(?<!`)`([^`]+)`(?!`)', re.sub(r'(?ms)^```.*?^```', '', text))
    for line in lines + [span for span in spans if ' ' in span]:
        line = re.sub(r'\s+#.*|\s{3,}.*|\s>\s.*', '', line.strip())
        line = re.sub(r'[\[\]<>](?=[A-Z…\]])|(?<=[A-Z…])[\]>]', '', line)
        line = re.sub(r'^([A-Z_]+=\S+ )+', '', line)
        if re.match(r'(enigma-lab |papermill |python -m enigma_lab|make |pip install )', line):
            yield line.replace('…', 'X')

def settings_of(words):
    "The `-p name value` of papermill."
    return dict(zip(*[iter(word for i, word in enumerate(words)
                           if '-p' in words[max(0, i - 2):i] and word != '-p')]*2))

def check_papermill(words):
    notebook = words[0]
    if notebook in GIVEN: return
    assert (ROOT/notebook).is_file(), 'no such notebook'
    unknown = {*settings_of(words)} - {*notebook_parameters(ROOT/notebook)}
    assert not unknown, f'no settings {unknown}'

def check_enigma_lab(words):
    if words[0] in ('COMMAND', '--help', '--version'): return
    if words[-1] == '--help': words = words[:1]
    if len(words) == 1 and words[0] in command_line()._subparsers._group_actions[0].choices: return
    given = vars(command_line().parse_args(words))
    if given['command'] == 'train':
        if given['notebook'] == 'NOTEBOOK': return
        notebook = find_notebook(given['notebook'])
        check_parameters(notebook, read_settings(notebook, given['settings']))

def check_module(words):
    found = find_spec(words[0])
    assert found, 'no such module'
    source = Path(found.origin).read_text(encoding='utf-8')
    if 'main(task)' in source: source += Path(find_spec('enigma_lab.lab.task').origin).read_text()
    for word in words[1:]:
        if not word.startswith('--'): continue
        field = word[2:].replace('-', '_') # an argparse option, or a setting of its own
        assert re.search(rf"{word}\b|\b{field}\s*[:=]", source), f'no option {word}'

def check_make(words):
    targets = {*re.findall(r'(?m)^([a-z]+):', (ROOT/'Makefile').read_text())}
    for word in words: assert '=' in word or word.startswith('-') or word in targets

def check_pip(words):
    settings = (ROOT/'settings.ini').read_text(encoding='utf-8')
    extras = {'all', *re.findall(r'(?m)^([a-z]+)_requirements', settings)}
    for extra in re.findall(r'\[(\w+)\]', ' '.join(words)): assert extra in extras, 'no such extra'

CHECKS = {'enigma-lab': check_enigma_lab, 'papermill': check_papermill, 'make': check_make,
          'pip': check_pip, 'python': lambda words: check_module(words[1:])}

@pytest.mark.quick
def test_every_command_can_be_typed():
    wrong, seen = [], Counter()
    for page in PAGES:
        cells = json.loads((ROOT/'nbs'/page).read_text(encoding='utf-8'))['cells']
        text = '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
        for command in commands(text):
            words = shlex.split(command)
            seen[words[0]] += 1
            try: CHECKS[words[0]](words[1:])
            except (Exception, SystemExit) as error: wrong.append(f'{page}: {command}: {error}')
    assert not wrong, '\n'.join(wrong)
    assert seen['enigma-lab'] > 100 and seen['papermill'] > 40 and seen['python'] > 30, seen

@pytest.mark.quick
@pytest.mark.parametrize('command', [
    'enigma-lab trian train_enigma', 'enigma-lab train train_enigma sed=1', 'make tset',
    'enigma-lab generate - --temprature 1', 'papermill nbs/train_enigma.ipynb -p sed 1',
    'papermill nbs/train.ipynb', 'python -m enigma_lab.bench.rotor', 'make train tset',
    'python -m enigma_lab.bench.rotors --smal', "pip install 'enigma_lab[benc]'"])
def test_a_wrong_one_is_seen(command):
    line, = commands(f'```sh\n{command}\n```')
    words = shlex.split(line)
    with pytest.raises((Exception, SystemExit)): CHECKS[words[0]](words[1:])
