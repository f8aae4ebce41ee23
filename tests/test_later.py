"What the pages put off until later: each row is still true, or it has to go."
import importlib.util
import json
import re
import subprocess

import pytest
from conftest import ROOT

pytestmark = pytest.mark.quick

# a row of a table, a row of a dictionary (perhaps in several pieces), a claim that needs hardware
ROW = re.compile(r"^\| (?P<table>.*?) \| later \|$"
                 r"|(?:^|[{ ])'(?P<original>[^'\n]+)': 'later: (?P<plan>[^']*)'"
                 r"|_hardware\('(?P<claim>[^']*)'", re.M)

def read_rows():
    "Find all that the notebooks put off: what → the plan, where there is one."
    rows = {}
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            for match in ROW.finditer(''.join(cell['source'])):
                found = match.groupdict()
                name = found['table'] or found['original'] or found['claim']
                rows[name] = found['plan'] or ''
    return rows

def has_module(name):
    try: return importlib.util.find_spec(f'enigma_lab.{name}') is not None
    except ModuleNotFoundError: return False

def has_word(word):
    "Tell whether the source of the package uses a word."
    pattern = re.compile(rf'\b{word}\b', re.I)
    return any(pattern.search(p.read_text(encoding='utf-8'))
               for p in (ROOT/'enigma_lab').rglob('*.py'))

def has_devices(number):
    "Tell whether a committed run was made on so many GPUs."
    listed = subprocess.run(['git', 'ls-files', 'runs/**/env.json'], cwd=ROOT,
                            capture_output=True, text=True).stdout.split()
    devices = [json.loads((ROOT/name).read_text()).get('devices', ['cpu']) for name in listed]
    return any(len(d) >= number and d[0] != 'cpu' for d in devices)

HERE = { # what is put off → a question that is answered with yes as soon as it is here
    'a GPU': lambda: has_devices(1), 'five RTX 4090': lambda: has_devices(5)}

def command_exists(name):
    "Tell whether `enigma-lab` has a command."
    return bool(re.search(rf'^def {name}\(', (ROOT/'enigma_lab'/'cli.py').read_text(), re.M))

def named_in(plan):
    "Find what a plan names that could exist: modules, commands, pages."
    plan = plan.split(';')[0] # what follows is of today
    for name in re.findall(r'enigma_lab\.([\w.]*\w)', plan): yield name, has_module(name)
    for name in re.findall(r'enigma-lab (?!bench)(\w+)', plan): yield name, command_exists(name)
    for name in re.findall(r'nbs/\S+?\.ipynb', plan): yield name, (ROOT/name).is_file()

def test_every_row_has_a_question():
    assert set(read_rows()) == set(HERE)

@pytest.mark.parametrize('row', HERE)
def test_what_is_put_off_is_not_here(row):
    assert not HERE[row](), f"{row} is here: mend the row that says later"

def test_no_plan_names_what_exists():
    here = [(row, name) for row, plan in read_rows().items()
            for name, exists in named_in(plan) if exists]
    assert here == []

def test_the_questions_can_be_answered_with_yes():
    "The positive control: what was put off once, and works today."
    assert has_module('lm.lora') and has_module('flow.density') and has_word('alibi')
    assert dict(named_in('enigma_lab.lm.lora, enigma-lab chat, nbs/train_lora.ipynb')) == {
        'lm.lora': True, 'chat': True, 'nbs/train_lora.ipynb': True}
