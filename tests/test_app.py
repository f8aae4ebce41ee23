"The completion page as a person uses it: beside Python on a bare page, without it, in JupyterLab."
import json, math, os, re
from functools import cache

import pytest
import torch
from playwright.sync_api import expect

import test_lampboard
from app_pages import open_apps # noqa: F401, a fixture
from enigma_lab.apps.complete import KNOBS, CompleteApp, load_model, split_pieces
from enigma_lab.lm.generate import stream
from jupyter_lab import NBS, WAIT, keys_stay, no_cell_failed, opened
from test_lampboard import INJECTION, NAME, WIDTHS

pytestmark = pytest.mark.proof('apps.base', 'apps.complete')

pytest_plugins = 'jupyter_lab'
axe = test_lampboard.axe
loaded = cache(load_model)

BEGIN = 'Return the number of '
# a page, and Python behind it

@pytest.fixture
def visit(open_apps): # noqa: F811
    "Open a page whose apps ask Python."
    return lambda *texts, **how: open_apps(*(CompleteApp(*loaded(), text) for text in
        texts or [BEGIN]), ready='textarea', **how)

def field(page): return page.locator('.complete textarea').last

def text(page): return field(page).input_value()

def button(page, name): return page.locator('.complete').last.get_by_role(
    'button', name=name, exact=True)

def said(page): return page.locator('.complete .said').last

def settled(page, words='Written.'):
    expect(said(page)).to_have_text(words, timeout=60_000)

def is_read(page):
    "Wait until every letter is shaded."
    page.wait_for_function("""[...document.querySelectorAll('.complete')].every(app => [
        ...app.querySelectorAll('.shade span')].map(x => x.textContent).join('') ===
        app.querySelector('textarea').value)""", timeout=120_000)

def written(prompt, seed=0, **knobs):
    "What the model writes, by the function that every other page uses."
    model, tokenizer, _ = loaded()
    start = dict(max_new_tokens=300, temperature=KNOBS['temperature'][1], top_p=KNOBS['top_p'][1])
    return ''.join(stream(model, tokenizer, prompt, seed=seed, **{**start, **knobs}))

@cache
def long_seed(prompt, least=280):
    return next(seed for seed in range(100) if len(written(prompt, seed)) >= least)

def set_knob(page, label, value):
    knobs = page.locator('.complete details').last
    if knobs.get_attribute('open') is None: knobs.locator('summary').click()
    knobs.get_by_label(label, exact=True).fill(str(value))


# what a person does

def test_a_text_grows_in_its_field(visit):
    page, whole = visit(), BEGIN + written(BEGIN, long_seed(BEGIN))
    set_knob(page, 'seed', long_seed(BEGIN))
    page.evaluate("""() => { window.seen = []; const field = document.querySelector('textarea')
        window.began = performance.now(); setInterval(() => { const last = seen.at(-1)?.[0]
        if (field.value !== last) seen.push([field.value, performance.now() - began]) }, 1) }""")
    button(page, 'Continue').dblclick()
    settled(page)
    seen = [x for x, _ in page.evaluate('window.seen')]
    assert text(page) == whole and len(seen) > 10 # written once
    assert all(b.startswith(a) for a, b in zip(seen, seen[1:]))
    writes = [m for m in page.evaluate('window.asked') if m['question'] == 'write']
    assert len(writes) == 1
    pieces = [m['value']['piece'] for m in page.sent if 'piece' in m['value']]
    assert ''.join(pieces) == whole[len(BEGIN):] and len(pieces[0]) < 5 # pieces, not the whole
    is_read(page)
    rows = [row for m in page.sent for row in m['value'].get('rows', [])]
    assert len(rows) == len(whole) # nothing was read twice

def test_the_numbers_are_those_of_torch(visit):
    sample = 'Return the <b> é 你 items.'
    page = visit(sample)
    is_read(page)
    model, tokenizer, _ = loaded()
    pieces = split_pieces(tokenizer, sample)
    ids = torch.tensor([[token for piece in pieces for token in piece.tokens]])
    with torch.no_grad(): logp = model(ids).logits[0].log_softmax(-1)
    place, row = 1, 0 # the first letter has nothing before it
    field(page).focus()
    page.keyboard.press('Control+Home')
    page.keyboard.press('ArrowRight')
    closely = page.locator('.closely')
    for piece in pieces[1:]:
        page.keyboard.press('ArrowRight')
        bits = -sum(logp[place + i - 1, token] for i, token in enumerate(piece.tokens))/math.log(2)
        expect(closely).to_contain_text(f'{bits:.2f} bits of surprise')
        five = logp[place - 1].exp().topk(5).values
        percents = [float(x) for x in re.findall(r'([\d.]+) %', closely.locator('ol').inner_text())]
        assert percents == pytest.approx([100*p for p in five.tolist()], abs=.51)
        place, row = place + len(piece.tokens), row + 1
    assert place == ids.shape[1]
    box = page.locator('.shade span').nth(4).bounding_box() # by the mouse: the second r
    page.mouse.move(box['x'] + box['width']/2, box['y'] + box['height']/2)
    bits = -logp[3, ids[0, 4]].item()/math.log(2)
    expect(closely).to_contain_text(f'r: {bits:.2f} bits of surprise')

def test_typing_meanwhile_loses_nothing(visit):
    page, seed = visit(), long_seed(BEGIN)
    set_knob(page, 'seed', seed)
    field(page).focus()
    page.keyboard.press('Control+End')
    page.keyboard.press('Tab')
    page.wait_for_function("document.querySelector('textarea').value.length > 30")
    page.keyboard.type('zzz ', delay=60)
    page.keyboard.press('Control+Home')
    page.keyboard.type('Héllo, ', delay=60)
    expect(button(page, 'Stop')).to_be_enabled() # it was still at work
    page.keyboard.press('Tab') # begins no second one
    settled(page)
    assert text(page) == 'Héllo, ' + BEGIN + written(BEGIN, seed) + 'zzz '
    expect(button(page, 'Undo')).to_be_disabled() # it would take what was typed
    is_read(page)

def test_an_input_method_is_left_alone(visit):
    page, seed = visit(), long_seed(BEGIN)
    set_knob(page, 'seed', seed)
    field(page).focus()
    page.keyboard.press('Control+End')
    page.keyboard.press('Tab')
    page.wait_for_function("document.querySelector('textarea').value.length > 30")
    hand = page.context.new_cdp_session(page)
    for part in 'n', 'ni', 'nih', 'niha', 'nihao':
        hand.send('Input.imeSetComposition', dict(text=part, selectionStart=len(part),
                                                  selectionEnd=len(part)))
        page.wait_for_timeout(60)
    hand.send('Input.insertText', dict(text='你好'))
    expect(button(page, 'Stop')).to_be_enabled()
    settled(page)
    whole = BEGIN + written(BEGIN, seed)
    assert text(page).replace('你好', '') == whole and '你好' in text(page)

@pytest.mark.parametrize('how', ['button', 'key'])
def test_stop_stops(visit, how):
    page, seed = visit(), long_seed(BEGIN)
    set_knob(page, 'seed', seed)
    field(page).focus()
    page.keyboard.press('Tab')
    page.wait_for_function("document.querySelector('textarea').value.length > 30")
    button(page, 'Stop').click() if how == 'button' else page.keyboard.press('Escape')
    settled(page, 'Stopped.')
    stopped = text(page)
    page.wait_for_timeout(1000)
    assert text(page) == stopped and not page.apps[0].jobs # no page asks, nothing is at work
    whole = BEGIN + written(BEGIN, seed)
    assert whole.startswith(stopped) and len(BEGIN) < len(stopped) < len(whole)
    button(page, 'Undo').click()
    assert text(page) == BEGIN

def test_three_ways(visit):
    page = visit()
    set_knob(page, 'seed', 7)
    button(page, 'Three ways').click()
    settled(page)
    ways = page.locator('.ways button')
    assert ways.locator('.body').all_text_contents() == [written(BEGIN, 7 + i) for i in range(3)]
    ways.nth(1).click()
    assert text(page) == BEGIN + written(BEGIN, 8) and ways.count() == 0
    button(page, 'Undo').click()
    assert text(page) == BEGIN
    button(page, 'Three ways').click()
    field(page).focus()
    page.keyboard.press('Escape') # stops, and the cards stay until a second one
    expect(ways).to_have_count(3)
    page.keyboard.press('Escape')
    expect(ways).to_have_count(0)
    expect(said(page)).to_have_text('Stopped.')
    page.keyboard.type('x')
    expect(said(page)).to_have_text('') # it is of what was done before

def test_knobs_and_a_wrong_one(visit):
    page = visit()
    for label, value in dict(temperature=0, length=50, seed=3).items(): set_knob(page, label, value)
    page.get_by_label('top-p', exact=True).press('ArrowLeft')
    button(page, 'Continue').click()
    settled(page)
    assert text(page) == BEGIN + written(BEGIN, temperature=0, max_new_tokens=50)
    kept = text(page)
    for wrong in '', '-1', '2.5':
        set_knob(page, 'seed', wrong)
        button(page, 'Continue').click()
        expect(said(page)).to_contain_text('seed must be a whole number from 0 to 999,999')
        assert text(page) == kept
    set_knob(page, 'seed', 5)
    assert page.evaluate('asked.filter(m => m.question === "write").at(-2).top_p') == .9
    button(page, 'Copy the text').click()
    page.wait_for_timeout(100)
    assert page.evaluate('navigator.clipboard.readText()') == kept

TEXTS = dict(markup=INJECTION, chinese='模型写了什么？\n第二行', arabic='ماذا كتب النموذج؟',
             emoji='go 🚀👩‍👩‍👧 é', empty='', long=(BEGIN + 'items.\n')*185)

@pytest.mark.parametrize('kind', TEXTS)
def test_texts_of_all_kinds(visit, kind):
    page, prompt = visit(), TEXTS[kind]
    field(page).fill(prompt)
    is_read(page)
    set_knob(page, 'length', 10)
    button(page, 'Continue').click()
    settled(page)
    assert text(page) == prompt + written(prompt, max_new_tokens=10)
    assert page.evaluate('window.hacked') is None
    assert page.locator('.complete :is(img, script)').count() == 0
    is_read(page)
    wavy = page.locator('.shade .foreign').all_text_contents()
    tokenizer = loaded()[1]
    assert wavy == [p.text for p in split_pieces(tokenizer, text(page)) if not p.known]
    if kind == 'chinese': assert '模' in page.locator('.sum').inner_text()
    if kind == 'long':
        assert len(text(page)) > 5000
        a_key = page.evaluate("""() => { // milliseconds until a letter is drawn
            const field = document.querySelector('textarea'), began = performance.now()
            for (const letter of 'abcdefgh') {
                field.setRangeText(letter, field.value.length, field.value.length, 'end')
                field.dispatchEvent(new Event('input'))
                field.getBoundingClientRect()
            }
            return (performance.now() - began)/8 }""")
        assert a_key < 200 and text(page).endswith('abcdefgh')
    inner, outer = field(page).evaluate('x => [x.scrollHeight, x.clientHeight]')
    assert inner <= outer + 1 # the field is as high as its text

def reach(page):
    "Press Tab to the end, out of the editor by Esc: the name of each place that has the focus."
    found = []
    for _ in range(40):
        page.keyboard.press('Tab')
        found.append(page.evaluate(NAME))
        if found[-1] is None: return found[:-1]
        if found[-1] == 'text': page.keyboard.press('Escape')
    pytest.fail(f'Tab goes round: {found}')

def test_keyboard_only(visit):
    page = visit()
    is_read(page)
    assert reach(page) == ['text', 'Continue', 'Three ways', 'Copy the text', 'Knobs']
    page.keyboard.press('Shift+Tab')
    page.keyboard.press('Shift+Tab')
    page.keyboard.press('Tab')
    assert page.evaluate(NAME) == 'Knobs'
    page.keyboard.press('Enter')
    assert reach(page) == ['temperature', 'top-p', 'length', 'seed']
    def to(name):
        page.evaluate('document.activeElement.blur()')
        while page.evaluate(NAME) != name:
            page.keyboard.press('Tab')
            if page.evaluate(NAME) == 'text': page.keyboard.press('Escape')
    to('length')
    page.keyboard.press('Home')
    to('seed')
    page.keyboard.press('ArrowUp')
    to('Three ways')
    page.keyboard.press('Enter')
    settled(page)
    page.keyboard.press('Tab')
    if page.evaluate(NAME) == 'Undo': page.keyboard.press('Tab')
    page.keyboard.press('Tab')
    page.keyboard.press('Space') # on the first card
    assert text(page) == BEGIN + written(BEGIN, 1, max_new_tokens=10)
    assert page.evaluate(NAME) == 'text'
    page.keyboard.press('Shift+Tab') # leaves the editor at once
    assert page.evaluate(NAME) != 'text'

def test_two_at_once(visit):
    page = visit('First text. ', 'Second text. ')
    page.locator('summary').first.click()
    page.get_by_label('length').first.press('Home') # of the first alone
    apps = page.locator('.complete')
    for i in 0, 1: apps.nth(i).get_by_role('button', name='Continue').click()
    for i in 0, 1: expect(apps.nth(i).locator('.said')).to_have_text('Written.', timeout=60_000)
    assert [apps.nth(i).locator('textarea').input_value() for i in (0, 1)] == [
        'First text. ' + written('First text. ', max_new_tokens=10),
        'Second text. ' + written('Second text. ')]
    ids = page.evaluate('[...document.querySelectorAll("[id]")].map(x => x.id)')
    assert len(ids) == len(set(ids)) > 5

def test_a_lost_kernel_loses_no_text(visit):
    page = visit()
    button(page, 'Continue').click()
    field(page).fill('what I typed')
    page.evaluate('window.gone = true; models[0].tell("comm_live_update")')
    expect(page.locator('.banner')).to_be_visible()
    expect(button(page, 'Stop')).to_be_disabled()
    assert 'what I typed' in text(page)
    kept = text(page)
    page.reload()
    is_read(page)
    assert text(page) == kept
    page.reload()
    is_read(page)
    assert text(page) == BEGIN


# how it looks

@pytest.mark.parametrize('width', WIDTHS)
@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
def test_it_fits_and_axe_finds_nothing_serious(visit, axe, width, dark):
    wide = BEGIN + 'veryverylongword'*12 + ' 你好  \n\nxyz ' + 'a b'*40
    page = visit(wide, width=width, dark=dark)
    set_knob(page, 'length', 60)
    button(page, 'Three ways').click()
    settled(page)
    set_knob(page, 'seed', 1)
    field(page).focus()
    is_read(page)
    over = page.locator('.complete').evaluate("""app => [...app.querySelectorAll('*')].filter(x =>
        x.getBoundingClientRect().right > innerWidth + 1 || /auto|scroll/.test(getComputedStyle(x)
        .overflowX) && x.scrollWidth > x.clientWidth + 1).map(x => x.outerHTML.slice(0, 80))""")
    assert over == []
    inner, outer = page.evaluate('[document.documentElement.scrollWidth, innerWidth]')
    assert inner <= outer
    heights = page.evaluate("""[...document.querySelectorAll('textarea, .shade')].map(
        x => [x.scrollHeight, x.scrollWidth])""")
    assert heights[0] == heights[1] # letters lie on their colours
    assert field(page).bounding_box()['width'] <= 800 # 80 letters of 9.6 pixels, and its edges
    assert (page.locator('.complete').get_attribute('data-dark') is not None) == dark
    if folder := os.environ.get('ENIGMA_PICTURES'):
        page.screenshot(path=f'{folder}/complete-{width}-{dark}.png', full_page=True)
    page.wait_for_timeout(700)
    page.evaluate(axe)
    found = page.evaluate("axe.run('.complete').then(found => found.violations)")
    assert [(v['id'], [n['html'][:90] for n in v['nodes']]) for v in found
            if v['impact'] in ('serious', 'critical')] == []

def test_without_a_kernel_it_shows_what_was_read(visit):
    page = visit(alone=True)
    expect(page.get_by_text('This page has no kernel')).to_be_visible()
    expect(button(page, 'Continue')).to_be_disabled()
    is_read(page)
    expect(page.locator('.closely')).to_have_text(re.compile('Point at a letter'))
    field(page).focus()
    page.keyboard.press('Home')
    page.keyboard.press('End')
    assert page.locator('.closely li').count() == 5
    page.keyboard.type('x')
    page.keyboard.press('Tab')
    assert text(page) == BEGIN and page.sent == []


# in JupyterLab

@pytest.fixture(scope='module')
def notebook(lab, browser):
    "The page after Run All; there is no run, so the toy stands in."
    with opened(lab, browser, '05_complete.ipynb', '.enigma-view .complete') as page: yield page

def test_a_text_is_written_in_jupyterlab(notebook):
    page = notebook
    expect(page.locator('.enigma-view .note')).to_contain_text('untrained toy')
    area = page.locator('.enigma-view textarea')
    area.fill('<b>x</b> & y')
    area.press('Tab')
    expect(page.locator('.enigma-view .said')).to_have_text('Written.', timeout=WAIT)
    assert area.input_value().startswith('<b>x</b> & y') and len(area.input_value()) > 20
    assert page.locator('.enigma-view .shade b').count() == 0

def test_keys_stay_in_the_app(notebook): keys_stay(notebook, '.note')

def test_no_cell_failed(notebook): assert no_cell_failed(notebook)

def test_a_kernel_that_restarts_meanwhile(notebook):
    page = notebook
    area = page.locator('.enigma-view textarea')
    area.fill('what I typed')
    area.press('Tab')
    page.locator('#jp-MainMenu').get_by_text('Kernel', exact=True).click()
    page.locator('.lm-Menu-item[data-command="kernelmenu:restart"]').click()
    expect(page.locator('.enigma-view .banner')).to_be_visible(timeout=WAIT)
    kept = area.input_value()
    assert kept.startswith('what I typed')
    for i in 0, 1: # the two lines at the top
        page.locator('.jp-CodeCell').nth(i + 1).locator('.jp-InputArea-editor').click()
        page.keyboard.press('Control+Enter')
    expect(page.locator('.enigma-view .banner')).to_be_hidden(timeout=WAIT)
    expect(page.locator('.enigma-view textarea')).to_have_value(kept, timeout=WAIT)


# the page that `make lab` opens

def test_the_front_page_leads_to_every_app():
    cells = json.loads((NBS/'index.ipynb').read_text(encoding='utf-8'))['cells']
    texts = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown']
    links = re.findall(r'\]\((apps/[^)#]+)', '\n'.join(texts))
    pages = sorted((NBS/'apps').glob('[!_]*.ipynb'))
    apps = {page.relative_to(NBS).as_posix() for page in pages
            if page.stem not in ('02_base', '03_live')}
    assert len(apps) == 6 and apps <= set(links)
