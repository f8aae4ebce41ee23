"Fixtures that several files share, and the list of what each tier runs (`tests/tiers.txt`)."
import json
import subprocess
import sys
from collections import Counter

import pytest

from enigma_lab.dev.proof import count_notebooks
from enigma_lab.lab.runs import checkout

ROOT = checkout(__file__)
TIERS = ROOT/'tests'/'tiers.txt'
FOUND = pytest.StashKey()

@pytest.fixture
def own_runs(tmp_path, monkeypatch):
    "Set a runs folder of the test's own, and forget the run of a papermill around it."
    monkeypatch.setenv('ENIGMA_RUNS', str(tmp_path/'runs'))
    monkeypatch.delenv('ENIGMA_RUN_DIR', raising=False)
    return tmp_path/'runs'

@pytest.fixture
def toy_text(tmp_path):
    "Write a text of 150 short chapters, enough for a preset `smoke`."
    night = 'It was a dark and stormy night; the rain fell. '
    path = tmp_path/'text.txt'
    path.write_text('\n\n'.join(f'Chapter {i}. ' + night * (1 + i % 5) for i in range(150)))
    return path

@pytest.fixture
def train_from_shell(tmp_path):
    "Train a language model as a shell does, with settings from a file."
    def train(**settings):
        path = tmp_path/'c.json'
        path.write_text(json.dumps(settings))
        command = [sys.executable, '-m', 'enigma_lab.lm.train', '--config', str(path)]
        return subprocess.run(command, capture_output=True, text=True)
    return train

# tiers

def tier(item):
    "Name the first tier that runs a test."
    marks = {mark.name for mark in item.iter_markers()}
    return 'proof' if 'proof' in marks else 'quick' if 'quick' in marks else 'test'

def read_tiers():
    "Read the committed list: `tier name` → number of cases, or of cells left out."
    lines = TIERS.read_text(encoding='utf-8').splitlines() if TIERS.is_file() else []
    return {name: int(number) for name, number in (line.rsplit(' ', 1) for line in lines)}

def pytest_addoption(parser):
    parser.addoption('--write-tiers', action='store_true', help='write tests/tiers.txt')

@pytest.hookimpl(tryfirst=True) # before anything is deselected
def pytest_collection_modifyitems(config, items):
    names = (f'{tier(item)} {item.nodeid.split("[")[0]}' for item in items)
    found = config.stash[FOUND] = Counter(names)
    if not config.option.write_tiers: return
    left_out = {f'notebook {name}': left for name, (_, left) in count_notebooks(ROOT).items()}
    lines = (f'{name} {number}\n' for name, number in sorted({**found, **left_out}.items()))
    TIERS.write_text(''.join(lines), encoding='utf-8')

def pytest_terminal_summary(terminalreporter):
    "Print what was run: outcomes by file, and in all."
    by_file = {}
    for outcome in ('passed', 'failed', 'error', 'skipped'):
        for report in terminalreporter.stats.get(outcome, []):
            by_file.setdefault(report.nodeid.split('::')[0], Counter())[outcome] += 1
    count = lambda found: ', '.join(f'{n} {outcome}' for outcome, n in found.items())
    for name, found in sorted(by_file.items()):
        terminalreporter.write_line(f'{name} {count(found)}')
    total = count(sum(by_file.values(), Counter()))
    terminalreporter.write_line(f'{len(by_file)} files of tests: {total}')
