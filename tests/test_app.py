"The completion page in a real JupyterLab, used as a person does; and a front page that leads to every app."
import json
import os
import re
import shutil
import subprocess
import sys
import time
from urllib.request import urlopen

import pytest
from playwright.sync_api import TimeoutError, expect

from test_docs import ROOT, browser  # noqa: F401, a fixture

WAIT = 300  # seconds, on a busy machine
PROMPT = '<b>x</b> & y'
QUIET = {'@jupyterlab/apputils-extension:notification': dict(fetchNews='false', checkForUpdates=False, doNotDisturbMode=True)}
WATCH = """out => {
    window.seen = [];
    const text = () => { const whole = out.querySelector('div[style]'); return whole.textContent.slice(whole.querySelector('b').textContent.length); };
    new MutationObserver(() => window.seen.push(text())).observe(out, dict = {childList: true, subtree: true, characterData: true});
}"""


# a server and a page

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "JupyterLab on a copy of the apps, with settings of its own and no run to be found: its address."
    home = tmp_path_factory.mktemp('lab')
    shutil.copytree(ROOT/'nbs/apps', home/'apps', ignore=shutil.ignore_patterns('.*'))
    for name in ('runs', 'settings'): (home/name).mkdir()
    (home/'settings/overrides.json').write_text(json.dumps(QUIET), encoding='utf-8')
    own = {f'JUPYTER_{kind}_DIR': str(home/kind.lower()) for kind in ('CONFIG', 'DATA', 'RUNTIME')}
    command = ['nice', sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', '--port=0', f'--ServerApp.root_dir={home/"apps"}',
        f'--LabApp.app_settings_dir={home/"settings"}', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate', '--IdentityProvider.token=enigma']
    with open(home/'log.txt', 'wb') as log:
        server = subprocess.Popen(command, stdout=log, stderr=log,
            env={**os.environ, **own, 'ENIGMA_RUNS': str(home/'runs'), 'IPYTHONDIR': str(home/'ipython'), 'OMP_NUM_THREADS': '1'})
        try:
            until = time.monotonic() + WAIT
            while not (found := list((home/'runtime').glob('jpserver-*.json'))):
                assert server.poll() is None and time.monotonic() < until, (home/'log.txt').read_text()
                time.sleep(.2)
            yield json.loads(found[0].read_text())['url']
        finally:
            server.terminate()  # its kernels go with it
            try: server.wait(60)
            finally: server.kill()
