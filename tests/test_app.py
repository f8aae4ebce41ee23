"The completion page in a real JupyterLab, used as a person does; and a front page that leads to every app."
import json, os, re, shutil, subprocess, sys, time

import pytest
from playwright.sync_api import expect

import test_docs

browser = test_docs.browser
NBS = test_docs.ROOT/'nbs'
WAIT = 300_000  # milliseconds, for a busy machine
PROMPT = '<b>x</b> & y'
QUIET = {'@jupyterlab/apputils-extension:notification': dict(fetchNews='false', checkForUpdates=False, doNotDisturbMode=True)}
WATCH = """out => {
    const text = () => out.querySelector('div > b').parentNode.textContent.slice(out.querySelector('b').textContent.length)
    new MutationObserver(() => window.seen.push(text())).observe(out, {childList: true, subtree: true, characterData: true})
}"""


# a server and a page

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "The address of a JupyterLab with a copy of the apps, settings of its own and no run to be found."
    home = tmp_path_factory.mktemp('lab')
    shutil.copytree(NBS/'apps', home/'apps', ignore=shutil.ignore_patterns('.*'))
    for name in ('runs', 'settings'): (home/name).mkdir()
    (home/'settings/overrides.json').write_text(json.dumps(QUIET), encoding='utf-8')
    own = {f'JUPYTER_{kind}_DIR': str(home/kind.lower()) for kind in ('CONFIG', 'DATA', 'RUNTIME')}
    own.update(VIRTUAL_ENV=sys.prefix, ENIGMA_RUNS=str(home/'runs'), IPYTHONDIR=str(home/'ipython'), OMP_NUM_THREADS='1')
    command = ['nice', sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', '--port=0',
        '--IdentityProvider.token=enigma', f'--ServerApp.root_dir={home/"apps"}', f'--LabApp.app_settings_dir={home/"settings"}',
        '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    with open(home/'log.txt', 'wb') as log: server = subprocess.Popen(command, env={**os.environ, **own}, stdout=log, stderr=log)
    try:
        until = time.monotonic() + WAIT/1000
        while not (found := list((home/'runtime').glob('jpserver-*.json'))):
            assert server.poll() is None and time.monotonic() < until, (home/'log.txt').read_text(encoding='utf-8')
            time.sleep(.2)
        yield json.loads(found[0].read_text(encoding='utf-8'))['url']
    finally:
        server.terminate()  # its kernels end with it
        try: server.wait(60)
        finally: server.kill()

@pytest.fixture(scope='module')
def page(lab, browser):
    "The completion page after Run All, with every state of its text kept in `window.seen`."
    page = browser.new_page(viewport=dict(width=1400, height=1000))
    page.set_default_timeout(WAIT)
    page.add_locator_handler(page.locator('.jp-Dialog button.jp-mod-accept'), lambda button: button.first.click(), no_wait_after=True)  # 'Select Kernel', on a slow start; perhaps more than once
    page.goto(f'{lab}lab/tree/05_complete.ipynb?reset&token=enigma')
    idle, prompts = page.locator('.jp-Notebook-ExecutionIndicator[data-status=idle]'), page.locator('.jp-CodeCell .jp-InputPrompt')
    idle.wait_for()
    for _ in range(5):
        page.locator('#jp-MainMenu').get_by_text('Run', exact=True).click()
        page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()
        try: expect(prompts.first).not_to_have_text('[ ]:', timeout=WAIT/10)
        except AssertionError: continue  # asked before there was a kernel
        break
    expect(prompts.last).to_have_text(re.compile(r'\[\d+\]'), timeout=WAIT)
    idle.wait_for()
    page.locator('.complete-text').evaluate(WATCH)
    yield page
    page.close()

def write(page, clicks=1, meanwhile=lambda: None):
    "Click Continue, do something once the text has begun, wait for its end: every state of the text."
    page.evaluate('window.seen = []')
    page.locator('.complete-go').click(click_count=clicks)
    page.wait_for_function('window.seen.length > 3')
    meanwhile()
    expect(page.locator('.complete-go')).to_be_enabled(timeout=WAIT)
    seen = page.evaluate('window.seen')
    assert all(later.startswith(earlier) for earlier, later in zip(seen, seen[1:])), 'the text does not only grow'
    return seen


# what a person does

def test_a_text_is_written(page):
    out = page.locator('.complete-text')
    assert 'untrained toy' in out.inner_text()
    page.locator('.complete-prompt textarea').fill(PROMPT)
    seen = write(page)
    assert len(set(map(len, seen))) > 3
    assert out.locator('b').all_text_contents() == [PROMPT]  # bold by the page, not by the user
    assert out.evaluate('out => out.scrollWidth <= out.clientWidth'), 'a long line is cut off'
    assert write(page)[-1] == seen[-1]  # the same seed

def test_a_double_click_writes_one_text(page):
    assert write(page, clicks=2)[-1] == write(page)[-1]

def test_typing_meanwhile(page):
    box = page.locator('.complete-prompt textarea')
    write(page, meanwhile=lambda: box.fill('something else'))
    assert page.locator('.complete-text b').all_text_contents() == [PROMPT]
    box.fill(PROMPT)

def test_stop(page):
    length = page.locator('.widget-hslider', has_text='characters')
    length.locator('.noUi-handle').press('End')
    expect(length.locator('.widget-readout')).to_have_text('1000')
    stopped = write(page, meanwhile=page.get_by_role('button', name='Stop', exact=True).click)[-1]
    whole = write(page)[-1]
    assert len(whole) > len(stopped) > 0 and whole.startswith(stopped)

def test_no_cell_failed(page):
    assert page.locator('[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]').count() == 0


# the page that `make lab` opens

def test_the_front_page_leads_to_every_app():
    cells = json.loads((NBS/'index.ipynb').read_text(encoding='utf-8'))['cells']
    links = re.findall(r'\]\((apps/[^)#]+)', '\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown'))
    apps = {path.relative_to(NBS).as_posix() for path in (NBS/'apps').glob('[!_]*.ipynb')}
    assert apps and apps <= set(links)
