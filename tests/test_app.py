"The completion page in a real JupyterLab, used as a person does; and a front page that leads to every app."
import json, os, re, shutil, subprocess, sys, time, warnings

import pytest
from playwright.sync_api import Error, expect

import test_docs
from enigma_lab.apps.complete import load_model
from enigma_lab.lm.generate import stream

browser = test_docs.browser
NBS = test_docs.ROOT/'nbs'
WAIT = 300_000  # milliseconds, for a busy machine
TOKEN = 'enigma'
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
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', '--port=0',
        f'--IdentityProvider.token={TOKEN}', f'--ServerApp.root_dir={home/"apps"}', f'--LabApp.app_settings_dir={home/"settings"}',
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

def kernels(page, lab):
    "What the server says of its kernels: state and connections of each."
    return page.request.get(f'{lab}api/kernels', params=dict(token=TOKEN)).json()

def run_all(page, lab, wait):
    "Open the completion page and run it: a hand that is no faster than the kernel."
    page.set_default_timeout(wait)
    page.add_locator_handler(page.locator('.jp-Dialog button.jp-mod-accept'), lambda button: button.first.click(), no_wait_after=True)  # 'Select Kernel', on a slow start
    page.goto(f'{lab}lab/tree/05_complete.ipynb?reset&token={TOKEN}')
    page.locator('.jp-Notebook-ExecutionIndicator[data-status=idle]').wait_for()
    until = time.monotonic() + wait/1000
    while not any(k['execution_state'] == 'idle' and k['connections'] for k in kernels(page, lab)):
        assert time.monotonic() < until, 'no kernel has started'
        page.wait_for_timeout(200)
    page.locator('#jp-MainMenu').get_by_text('Run', exact=True).click()
    page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()
    expect(page.locator('.jp-CodeCell .jp-InputPrompt').last).to_have_text(re.compile(r'\[\d+\]'), timeout=wait)
    page.locator('.complete-text').evaluate(WATCH)

@pytest.fixture(scope='module')
def page(lab, browser):
    "The completion page after Run All, with every state of its text kept in `window.seen`. JupyterLab may lose a widget on its way to the page: then a new tab, as a person would."
    for left in 2, 1, 0:
        page, said = browser.new_page(viewport=dict(width=1400, height=1000)), []
        page.on('console', lambda message: said.append(message.text))
        try: run_all(page, lab, WAIT/3)
        except (AssertionError, Error) as problem:
            report = [str(problem), 'kernels', *map(str, kernels(page, lab)), 'page', page.locator('body').inner_text()[-3000:], 'console', *said[-20:]]
            for kernel in kernels(page, lab): page.request.delete(f"{lab}api/kernels/{kernel['id']}", headers=dict(Authorization=f'token {TOKEN}'))
            page.close()
            if not left: pytest.fail('\n'.join(report), pytrace=False)
            warnings.warn('\n'.join(report))
        else: break
    page.set_default_timeout(WAIT)
    yield page
    page.close()

def longest(prompt, length, **knobs):
    "A seed at which the toy goes on for `length` characters or more, and its text."
    model, tokenizer, _ = load_model()
    texts = ((seed, ''.join(stream(model, tokenizer, prompt, seed=seed, max_new_tokens=1000, **knobs))) for seed in range(100))
    return next((seed, text) for seed, text in texts if len(text) >= length)

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

def test_stop(page, tmp_path, monkeypatch):
    monkeypatch.setenv('ENIGMA_RUNS', str(tmp_path))  # where no run is
    seed, _ = longest(PROMPT, 600, temperature=.7, top_p=.95)
    for name, value in dict(characters=1000, seed=seed).items():
        readout = page.locator('.widget-hslider', has=page.get_by_text(name, exact=True)).locator('.widget-readout')
        readout.fill(str(value))
        readout.press('Enter')
        expect(readout).to_have_text(str(value))
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
