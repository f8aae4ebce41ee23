"The completion page in a real JupyterLab, used as a person does; and the front page."
import json, re

import pytest
from playwright.sync_api import expect

from enigma_lab.apps.complete import load_model
from enigma_lab.lm.generate import stream
from jupyter_lab import NBS, WAIT, keys_stay, no_cell_failed, opened, set_knob

pytestmark = pytest.mark.proof('apps.widget', 'apps.complete') # in a real JupyterLab

pytest_plugins = 'jupyter_lab'

PROMPT = '<b>x</b> & y'
WATCH = """out => {
    const all = () => out.querySelector('div > b').parentNode.textContent
    const text = () => all().slice(out.querySelector('b').textContent.length)
    const every = {childList: true, subtree: true, characterData: true}
    new MutationObserver(() => window.seen.push(text())).observe(out, every)
}"""


# a page

@pytest.fixture(scope='module')
def page(lab, browser):
    "The completion page after Run All, with every state of its text kept in `window.seen`."
    with opened(lab, browser, '05_complete.ipynb', '.complete-text') as page:
        page.locator('.complete-text').evaluate(WATCH)
        yield page

def longest(prompt, length, **knobs):
    "A seed at which the toy goes on for `length` characters or more."
    model, tokenizer, _ = load_model()
    def text(seed):
        return ''.join(stream(model, tokenizer, prompt, seed=seed, max_new_tokens=1000, **knobs))
    return next(seed for seed in range(100) if len(text(seed)) >= length)

def write(page, clicks=1, meanwhile=lambda: None):
    "Click Continue, do something meanwhile, wait for the end: every state of the text."
    page.evaluate('window.seen = []')
    page.locator('.complete-go').click(click_count=clicks)
    page.wait_for_function('window.seen.length > 3')
    meanwhile()
    expect(page.locator('.complete-go')).to_be_enabled(timeout=WAIT)
    seen = page.evaluate('window.seen')
    grows = all(later.startswith(earlier) for earlier, later in zip(seen, seen[1:]))
    assert grows, 'the text does not only grow'
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
    set_knob(page, 'characters', 1000)
    set_knob(page, 'seed', longest(PROMPT, 600, temperature=.7, top_p=.95))
    stopped = write(page, meanwhile=page.get_by_role('button', name='Stop', exact=True).click)[-1]
    whole = write(page)[-1]
    assert len(whole) > len(stopped) > 0 and whole.startswith(stopped)

def test_keys_stay_in_the_app(page): keys_stay(page, '.complete-text', '.complete-go')

def test_no_cell_failed(page): assert no_cell_failed(page)


# the page that `make lab` opens

def test_the_front_page_leads_to_every_app():
    cells = json.loads((NBS/'index.ipynb').read_text(encoding='utf-8'))['cells']
    texts = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown']
    links = re.findall(r'\]\((apps/[^)#]+)', '\n'.join(texts))
    pages = sorted((NBS/'apps').glob('[!_]*.ipynb'))
    shown = [page for page in pages if 'eval: false' in page.read_text(encoding='utf-8')]
    apps = {page.relative_to(NBS).as_posix() for page in shown}
    assert len(apps) == 5 and apps <= set(links)
