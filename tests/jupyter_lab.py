"A real JupyterLab for the tests of all apps: a plugin of pytest (PYTEST_DONT_REWRITE)."
import json, os, re, shutil, subprocess, sys, time, warnings
from contextlib import contextmanager

import pytest
from playwright.sync_api import Error, expect

import test_docs

NBS = test_docs.ROOT/'nbs'
WAIT = 300_000  # milliseconds, for a busy machine
TOKEN = 'enigma'
QUIET = {'@jupyterlab/apputils-extension:notification': dict(
    fetchNews='false', checkForUpdates=False, doNotDisturbMode=True)}

browser = test_docs.browser

@pytest.fixture(scope='session')
def lab(tmp_path_factory):
    "The address of a JupyterLab with a copy of the apps, its own settings and no run."
    home = tmp_path_factory.mktemp('lab')
    shutil.copytree(NBS/'apps', home/'apps', ignore=shutil.ignore_patterns('.*'))
    for name in ('runs', 'settings'): (home/name).mkdir()
    (home/'settings/overrides.json').write_text(json.dumps(QUIET), encoding='utf-8')
    own = {f'JUPYTER_{kind}_DIR': home/kind.lower() for kind in ('CONFIG', 'DATA', 'RUNTIME')}
    own |= dict(VIRTUAL_ENV=sys.prefix, ENIGMA_RUNS=home/'runs', IPYTHONDIR=home/'ipython')
    env = {**os.environ, **{k: str(v) for k, v in own.items()}, 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root',
        '--ip=127.0.0.1', '--port=0', f'--IdentityProvider.token={TOKEN}',
        f'--ServerApp.root_dir={home/"apps"}', f'--LabApp.app_settings_dir={home/"settings"}',
        '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    log = home/'log.txt'
    with log.open('wb') as out:
        server = subprocess.Popen(command, env=env, stdout=out, stderr=out)
    try:
        until = time.monotonic() + WAIT/1000
        while not (found := list((home/'runtime').glob('jpserver-*.json'))):
            alive = server.poll() is None and time.monotonic() < until
            assert alive, log.read_text(encoding='utf-8')
            time.sleep(.2)
        yield json.loads(found[0].read_text(encoding='utf-8'))['url']
    finally:
        server.terminate()  # its kernels end with it
        try: server.wait(60)
        finally: server.kill()

def kernels(page, lab):
    "What the server says of its kernels: state and connections of each."
    found = page.request.get(f'{lab}api/kernels', params=dict(token=TOKEN)).json()
    return found if isinstance(found, list) else [] # an error, while one of them ends

def end_kernels(page, lab):
    "End all kernels: the next notebook has the machine to itself."
    key = dict(Authorization=f'token {TOKEN}')
    for kernel in kernels(page, lab):
        page.request.delete(f"{lab}api/kernels/{kernel['id']}", headers=key)

def click_run_all(page):
    page.locator('#jp-MainMenu').get_by_text('Run', exact=True).click()
    page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()

def run_all(page, lab, wait, notebook, widget):
    "Open a page and run it: a hand that is no faster than the kernel."
    page.set_default_timeout(wait)
    accept = page.locator('.jp-Dialog button.jp-mod-accept') # 'Select Kernel', on a slow start
    page.add_locator_handler(accept, lambda button: button.first.click(), no_wait_after=True)
    page.goto(f'{lab}lab/tree/{notebook}?reset&token={TOKEN}')
    page.locator('.jp-Notebook-ExecutionIndicator[data-status=idle]').wait_for()
    until = time.monotonic() + wait/1000
    ready = lambda kernel: kernel['execution_state'] == 'idle' and kernel['connections']
    while not any(map(ready, kernels(page, lab))):
        assert time.monotonic() < until, 'no kernel has started'
        page.wait_for_timeout(200)
    click_run_all(page)
    last = page.locator('.jp-CodeCell .jp-InputPrompt').last
    expect(last).to_have_text(re.compile(r'\[\d+\]'), timeout=wait)
    page.locator(widget).wait_for(state='attached')

@contextmanager
def opened(lab, browser, notebook, widget):
    "An app after Run All. JupyterLab may lose a widget: then a new tab, as a person would."
    for left in 2, 1, 0:
        page, said = browser.new_page(viewport=dict(width=1400, height=1000)), []
        page.on('console', lambda message: said.append(message.text))
        try: run_all(page, lab, WAIT/3, notebook, widget)
        except (AssertionError, Error) as problem:
            report = [str(problem), 'kernels', *map(str, kernels(page, lab)), 'page',
                page.locator('body').inner_text()[-3000:], 'console', *said[-20:]]
            end_kernels(page, lab)
            page.close()
            if not left: pytest.fail('\n'.join(report), pytrace=False)
            warnings.warn('\n'.join(report))
        else: break
    page.set_default_timeout(WAIT)
    yield page
    end_kernels(page, lab)
    page.close()

def no_cell_failed(page):
    bad = (f'[data-mime-type="application/vnd.jupyter.{kind}"]' for kind in ('error', 'stderr'))
    return page.locator(', '.join(bad)).count() == 0

def set_knob(page, name, value):
    "Type a number beside a slider."
    slider = page.locator('.widget-hslider', has=page.get_by_text(name, exact=True))
    readout = slider.locator('.widget-readout')
    readout.fill(str(value))
    readout.press('Enter')
    expect(readout).to_have_text(re.compile(rf'{value}0*'))

PLACES = ( # where a focus can be
    'button:enabled', 'input', 'select', 'textarea', '.widget-readout', '.noUi-handle')

def typed(page):
    "Type JupyterLab's shortcuts of one letter, and return how the number of cells went."
    cells, counts = page.locator('.jp-Notebook .jp-Cell'), []
    for keys in 'dd', 'a', 'b', 'x':
        for key in keys: page.keyboard.press(key)
        page.wait_for_timeout(200)
        counts.append(cells.count())
    return counts

def keys_stay(page, beside, shuts=''):
    "Type on what can have the focus, and after clicks `beside` it and on what `shuts` itself."
    app = page.locator('.enigma-app[tabindex]').last
    count = page.locator('.jp-Notebook .jp-Cell').count()
    assert count > 10
    if shuts:
        app.locator(shuts).click()
        expect(app.locator(shuts)).to_be_enabled(timeout=WAIT)
        assert typed(page) == [count]*4, shuts
    seen = {place: app.locator(place).and_(page.locator(':visible')) for place in PLACES}
    there = [place for place in PLACES if seen[place].count()]
    assert len(there) > 1
    for place in there:
        seen[place].first.focus()
        assert typed(page) == [count]*4, place
    app.locator(beside).first.click(position=dict(x=2, y=2))
    assert typed(page) == [count]*4, beside
