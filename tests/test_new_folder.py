"""A person who installs the wheel and has no clone: a folder, a training, an app in a browser.

The environment is a fresh one that has the wheel and, behind it, the libraries that run this test.
"""
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import venv
from contextlib import contextmanager
from pathlib import Path

import pytest

from enigma_lab.lab.runs import Run, checkout

ROOT = checkout(__file__)
pytestmark = pytest.mark.proof('lab.folder')

def known():
    "The environment of a person, without what this test knows of the clone."
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith('ENIGMA') and name != 'PYTHONPATH'}
    return dict(kept, JUPYTER_PATH=f'{sys.prefix}/share/jupyter') # of the libraries behind

def run(*command, cwd):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=known())

@pytest.fixture(scope='module')
def place(tmp_path_factory): return tmp_path_factory.mktemp('stranger')

@pytest.fixture(scope='module')
def lab(place):
    "Build the wheel, install it, and return the command."
    source = place/'source'
    source.mkdir()
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT/name, source)
    for name in ('enigma_lab', 'nbs'):
        shutil.copytree(ROOT/name, source/name, ignore=shutil.ignore_patterns('__py*', '.*'))
    venv.create(place/'venv', with_pip=False)
    pip = sys.executable, '-m', 'pip', '--disable-pip-version-check'
    done = run(*pip, 'wheel', '-q', '--no-deps', '--no-build-isolation', '--no-index', '-w', place,
               source, cwd=place)
    assert done.returncode == 0, done.stderr
    wheel, = place.glob('enigma_lab-*.whl')
    done = run(*pip, '--python', place/'venv'/'bin'/'python', 'install', '-q', '--no-deps',
               '--no-index', wheel, cwd=place)
    assert done.returncode == 0, done.stderr
    site, = (place/'venv'/'lib').glob('*/site-packages')
    behind = [path for path in sys.path if path.endswith('site-packages')]
    (site/'behind.pth').write_text('\n'.join(behind))
    shutil.rmtree(source)
    return place/'venv'/'bin'/'enigma-lab'

@pytest.fixture(scope='module')
def home(lab, place):
    done = run(lab, 'new', 'mine', cwd=place)
    assert done.returncode == 0, done.stderr
    return place/'mine'

def test_it_is_the_wheel(lab, place):
    done = run(lab.parent/'python', '-c', 'import enigma_lab; print(enigma_lab.__file__)',
               cwd=place)
    assert Path(done.stdout.strip()).is_relative_to(place/'venv')

def test_a_folder_is_written_once(lab, home, place):
    assert {p.name for p in home.iterdir()} == {'nbs', 'runs', 'settings.ini'}
    assert ({p.name for p in (home/'nbs').glob('train_*.ipynb')}
            == {p.name for p in (ROOT/'nbs').glob('train_*.ipynb')})
    again = run(lab, 'new', 'mine', cwd=place)
    assert again.returncode == 1 and 'must be new or empty' in again.stderr

def test_a_folder_without_notebooks_says_what_to_do(lab, place):
    done = run(lab, 'train', 'train_enigma', cwd=place)
    assert done.returncode == 2 and 'enigma-lab new FOLDER' in done.stderr

def test_it_trains(lab, home):
    done = run(lab, 'train', 'train_enigma', 'preset=smoke', cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    record, = (home/'runs'/'train_enigma').iterdir()
    assert Run(record).finished and (record/'train_enigma.ipynb').is_file()

@contextmanager
def served(lab, home, name):
    "Serve an app; give its address when it answers."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    server = subprocess.Popen([lab, 'app', name, f'--port={port}', '--no_browser'], cwd=home,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                              start_new_session=True, env=known())
    try:
        assert (address := f'http://127.0.0.1:{port}') in server.stdout.readline()
        for _ in range(300):
            time.sleep(.2)
            try: urllib.request.urlopen(address + '/static/', timeout=5)
            except urllib.error.HTTPError: break
            except OSError: continue
            break
        else: raise TimeoutError(f'{name} does not answer')
        yield address
    finally:
        os.killpg(server.pid, 15)
        server.wait()

@pytest.fixture(scope='module')
def browser():
    api = pytest.importorskip('playwright.sync_api')
    with api.sync_playwright() as p:
        path = next(filter(None, map(shutil.which, ('chromium', 'google-chrome'))), None)
        b = p.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield b
        b.close()

def test_two_visitors_do_not_see_each_other(lab, home, browser):
    "Each types into a field of the same app; nobody's text is on the other's page."
    with served(lab, home, 'complete') as address:
        pages = [browser.new_context().new_page() for _ in range(2)]
        for page, word in zip(pages, ('heron', 'otter')):
            page.goto(address, timeout=120_000)
            field = page.locator('textarea, input[type=text]').first
            field.wait_for(timeout=120_000)
            field.fill(word)
            field.press('Tab')
            page.locator('button').first.click()
        for page, mine, other in zip(pages, ('heron', 'otter'), ('otter', 'heron')):
            page.wait_for_timeout(4000)
            field = page.locator('textarea, input[type=text]').first
            assert field.input_value().startswith(mine)
            assert not re.search(other, page.locator('body').inner_text())
