"""A stranger's first minute: the core requirements alone, in an environment of its own.

Nothing is blocked and nothing is pretended. A fresh virtual environment gets the distributions
that `requirements` of settings.ini names, with what they require in turn, as links to those that
run this test (torch is large); then the built wheel of this project. Nothing else can be imported.
"""
import shutil
import subprocess
import sys
import venv
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest
from floors import floors
from packaging.requirements import Requirement

from enigma_lab.lab.runs import checkout

ROOT = checkout(__file__)
proof = pytest.mark.proof(
    'machine.reversible', 'machine.rev_block', 'machine.certify', 'machine.enigma',
    'machine.exact', 'machine.dropout', seeds=(0,))

def core_requirements():
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    return [Requirement(text) for text in config['DEFAULT']['requirements'].split()]

def with_what_they_require(requirements):
    "List the distributions that are installed for some requirements, and no other."
    found, todo = {}, [r.name for r in requirements]
    while todo:
        dist = metadata.distribution(todo.pop())
        if dist.name in found: continue
        found[dist.name] = dist
        more = map(Requirement, dist.requires or ())
        todo += [r.name for r in more if not r.marker or r.marker.evaluate({'extra': ''})]
    return found

def link(dist, folder):
    "Link what a distribution has put into site-packages into a folder."
    tops = {Path(file).parts[0] for file in dist.files} - {'..', '__pycache__'}
    for top in tops:
        source = Path(dist.locate_file(top))
        if source.exists() and not (folder/top).exists(): (folder/top).symlink_to(source)

def run(*command, cwd):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)

@pytest.fixture(scope='module')
def bare(tmp_path_factory):
    "Make the environment; return its Python."
    place = tmp_path_factory.mktemp('bare')
    source = place/'source'
    shutil.copytree(ROOT/'enigma_lab', source/'enigma_lab', ignore=shutil.ignore_patterns('__py*'))
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT/name, source)
    venv.create(place/'venv', with_pip=False)
    python = place/'venv'/'bin'/'python'
    site, = (place/'venv'/'lib').glob('*/site-packages')
    for dist in with_what_they_require(core_requirements()).values(): link(dist, site)
    pip = sys.executable, '-m', 'pip', '--disable-pip-version-check'
    built = run(*pip, 'wheel', '-q', '--no-deps', '--no-build-isolation', '--no-index', '-w',
                place, source, cwd=place)
    assert built.returncode == 0, built.stderr
    wheel, = place.glob('enigma_lab-*.whl')
    done = run(*pip, '--python', python, 'install', '-q', '--no-deps', '--no-index', wheel,
               cwd=place)
    assert done.returncode == 0, done.stderr
    checked = run(*pip, '--python', python, 'check', cwd=place)
    assert checked.returncode == 0, checked.stdout # nothing that is required is missing
    return python

def in_bare(bare, code):
    "Run code in the bare environment, from a folder that has nothing of ours."
    done = run(bare, '-I', '-c', code, cwd=bare.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

@proof
def test_the_environment_is_bare(bare):
    "What the project's other rooms need is not there; nor is the checkout."
    out = in_bare(bare, '''
import importlib.util as u
for name in ("transformers datasets accelerate tokenizers safetensors numpy pandas matplotlib "
             "nbdev IPython tqdm peft diffusers pytest pip").split():
    assert u.find_spec(name) is None, name
import enigma_lab, torch, fastcore, packaging
print(enigma_lab.__file__)''')
    assert Path(out.strip()).is_relative_to(bare.parent.parent)

@proof
def test_every_room_of_the_machine_imports(bare):
    out = in_bare(bare, '''
import importlib, pkgutil, enigma_lab.machine
names = [m.name for m in pkgutil.iter_modules(enigma_lab.machine.__path__)]
for name in names: importlib.import_module(f"enigma_lab.machine.{name}")
print(len(names))''')
    assert int(out) == len(list((ROOT/'enigma_lab'/'machine').glob('[!_]*.py'))) > 10

TRAIN = '''
import torch
from torch import nn
from enigma_lab.machine.reversible import ReversibleSequence
def net(): return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Dropout(.1))
found = []
for exact in (False, True):
    for memory in ("reverse", "store"):
        torch.manual_seed(0)
        chain = ReversibleSequence([(net(), net()) for _ in range(6)], exact=exact, memory=memory,
                                   keep=0)
        optimizer, x = torch.optim.SGD(chain.parameters(), .1), torch.randn(5, 16)
        for _ in range(3):
            torch.manual_seed(1)
            loss = chain(x).square().mean()
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        found.append([loss.item(), *(p.sum().item() for p in chain.parameters())])
reverse, store, exact, exact_store = found
assert exact == exact_store and max(abs(a - b) for a, b in zip(reverse, store)) < 1e-4
assert reverse != exact
'''

@proof
def test_a_chain_trains(bare):
    "A step with the values computed again is the step with them stored."
    in_bare(bare, TRAIN)

@proof
def test_certify_works(bare):
    out = in_bare(bare, '''
import torch
from torch import nn
from enigma_lab.machine.certify import certify
from enigma_lab.machine.enigma import Enigma
class Doubled(nn.Module):
    def forward(self, x): return 2*x, x.new_full((len(x),), 4*torch.tensor(2.).log())
    def inverse(self, y): return y/2
for found in (certify(Enigma(8, 2, 2, 4)), certify(Enigma(8, 2, 2, 4, exact=True)),
              certify(Doubled(), torch.randn(5, 4))):
    assert found.ok, found
    print(found.level)''')
    assert out.split('\n')[:3] == ['floats', 'any batch', 'any batch']

@proof
def test_a_model_is_made_reversible(bare):
    code = '''
import importlib, pkgutil, enigma_lab.machine
for m in pkgutil.iter_modules(enigma_lab.machine.__path__):
    room = importlib.import_module(f"enigma_lab.machine.{m.name}")
    if hasattr(room, "make_reversible"): print(m.name)'''
    if not in_bare(bare, code).strip(): pytest.skip('there is no make_reversible')

@proof
def test_more_than_the_core_is_asked_for_by_name(bare):
    "A room that needs more says which extra has it."
    done = run(bare, '-I', '-c', 'import enigma_lab.lm.model', cwd=bare.parent)
    assert done.returncode and 'transformers' in done.stderr

@pytest.mark.quick
def test_the_floors_are_what_is_tested():
    "A job of continuous integration installs the oldest versions, and runs this file with them."
    assert [Requirement(text).name for text in floors()] == [r.name for r in core_requirements()]
    for text, asked in zip(floors(), core_requirements()):
        version = text.partition('==')[2]
        assert not version or asked.specifier.contains(version)
        # and no older one is promised
        assert not version or not asked.specifier.contains(f'{version}.dev0', prereleases=True)
        assert version or not asked.specifier
    workflow = (ROOT/'.github'/'workflows'/'tests.yml').read_text(encoding='utf-8')
    job = workflow.partition('\n  floor:\n')[2]
    assert '$(python tests/floors.py)' in job and 'pytest' in job and 'tests/test_bare.py' in job
    installed = {r.name: metadata.version(r.name) for r in core_requirements()}
    assert all(r.specifier.contains(installed[r.name]) for r in core_requirements()), installed
