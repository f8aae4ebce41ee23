"The sampler as a person uses it: with Python behind it, without a kernel, in JupyterLab."
import re
import shutil

import pytest
import torch
from playwright.sync_api import expect

import test_docs
from app_pages import PAGE, open_apps # noqa: F401, a fixture
from enigma_lab.apps.sampler import KNOBS, OUTSIDE, QUESTIONS, SamplerApp, open_reader
from enigma_lab.sgdd.sampling import maskgit_sample
from jupyter_lab import TOKEN, WAIT, click_run_all, keys_stay, no_cell_failed, opened
from test_lampboard import axe, reach, watch # noqa: F401, `axe` is a fixture
from test_monitor_page import picture

pytestmark = pytest.mark.proof('apps.base', 'apps.sampler')

pytest_plugins = 'jupyter_lab'

expect.set_options(timeout=60_000) # a busy machine is slow, and not wrong

WIDTHS = 390, 800, 1280
INJECTION = '<img src=x onerror="window.hacked = true"><script>window.hacked = true</script>'
READER, GRAMMAR = 'showcase/questions', 'showcase/sgdd'


# a page with Python behind it

@pytest.fixture
def visit(open_apps): # noqa: F811
    "Open a page with apps whose questions these tests answer, as a kernel does."
    return lambda *apps, **how: open_apps(*apps or [SamplerApp(READER)],
                                          ready='.main-row .piece', **how)

def app(page): return page.locator('.sampler').last

def named(page, role, name, **options):
    return app(page).get_by_role(role, name=name, exact=True, **options)

def write(page, text):
    field = named(page, 'textbox', 'sentence A')
    field.fill(text)
    field.press('Enter')

def written(page, text, reader=READER, **knobs):
    "What the sampler's own functions make of a text: a trajectory, and the text that is read."
    model = open_reader(reader)[0]
    how = dict(steps=8, generator=torch.Generator().manual_seed(0)) | knobs
    t = maskgit_sample(model, model.encoder.encode([text]), **how)
    return t, model.read(t.tokens, t.content)[0]

def filled(page): return app(page).locator('.main-row .piece:not(.empty)').count()

def shows(page, text, **knobs):
    "Wait for a text in the row, and compare each call with the sampler's."
    t, said = written(page, text, **knobs)
    expect(app(page).locator('.best')).to_have_text(said)
    known = t.canvases[:, 0] != open_reader(READER)[0].config.mask_id
    slider, calls = named(page, 'slider', 'call of the decoder'), len(t.canvases) - 1
    for k in (0, 1, calls):
        slider.fill(str(k))
        assert slider.get_attribute('aria-valuetext') == f'call {k} of {calls}'
        assert filled(page) == int(known[k].sum())
    return t

def test_a_sentence_fills_in_place(visit):
    page = visit()
    model = open_reader(READER)[0]
    expect(app(page).locator('h2').first).to_have_text(
        f'Only {model.config.encoder_dim:,} numbers pass from your sentence to its copy')
    assert str(model.config.encoder_dim) == '1536' # the number is the model's
    expect(app(page).get_by_role('img', name='the vector: 1,536 numbers')).to_be_visible()
    shows_after_play(page, QUESTIONS[0])
    app(page).evaluate("""app => { // the numbers of pieces that were seen in the row
        window.seen = []
        const row = app.querySelector('.main-row')
        const note = () => window.seen.push(row.querySelectorAll('.piece:not(.empty)').length)
        new MutationObserver(note).observe(row, { childList: true })
    }""")
    write(page, QUESTIONS[1])
    expect(app(page).locator('.best')).to_have_text(written(page, QUESTIONS[1])[1])
    t = shows_after_play(page, QUESTIONS[1])
    seen = page.evaluate('seen')
    counts = (t.canvases[:, 0] != model.config.mask_id).sum(1).tolist()
    # one call after the other, in place
    assert list(dict.fromkeys(seen)) == list(dict.fromkeys(counts))
    shows(page, QUESTIONS[1])
    app(page).get_by_text('All calls, one below the other').click()
    expect(app(page).locator('.calls li')).to_have_count(len(t.canvases) - 1)
    named(page, 'slider', 'call of the decoder').fill('0')
    named(page, 'button', 'Play').click()
    expect(named(page, 'button', 'Pause')).to_be_visible()
    named(page, 'button', 'Pause').click()
    assert filled(page) < len(t.tokens[0])

def shows_after_play(page, text):
    t, _ = written(page, text)
    expect(app(page).locator('.timeline .count')).to_have_text(
        f'call {len(t.canvases) - 1} of {len(t.canvases) - 1}')
    return t

def test_knobs_examples_and_readers(visit):
    page = visit()
    app(page).get_by_text('Knobs').click()
    named(page, 'slider', 'calls of the decoder').fill('3')
    shows(page, QUESTIONS[0], steps=3)
    named(page, 'combobox', 'which place is written first').select_option('remask')
    named(page, 'slider', 'temperature').fill('1.5')
    named(page, 'spinbutton', 'seed').fill('7')
    named(page, 'spinbutton', 'seed').press('Tab')
    said = written(page, QUESTIONS[0], steps=3, order='remask', temperature=1.5,
                   generator=torch.Generator().manual_seed(7))[1]
    expect(app(page).locator('.best')).to_have_text(said)
    assert said != QUESTIONS[0]
    expect(app(page).get_by_label('guidance')).to_be_hidden() # this reader knows none
    named(page, 'slider', 'temperature').fill('0')
    named(page, 'combobox', 'which place is written first').select_option('confidence')
    named(page, 'button', QUESTIONS[2]).click()
    assert named(page, 'textbox', 'sentence A').input_value() == QUESTIONS[2]
    shows(page, QUESTIONS[2], steps=3)
    named(page, 'combobox', 'reader').select_option(GRAMMAR)
    first = open_reader(GRAMMAR)[2][0]
    expect(named(page, 'textbox', 'sentence A')).to_have_value(first) # ours gives way to its own
    expect(app(page).locator('.best')).to_have_text(written(page, first, GRAMMAR, steps=3)[1])
    named(page, 'slider', 'guidance').fill('2')
    write(page, 'my own words')
    named(page, 'combobox', 'reader').select_option(READER)
    expect(app(page).get_by_label('guidance')).to_be_hidden()
    assert named(page, 'textbox', 'sentence A').input_value() == 'my own words' # yours stay

def test_the_judge_proves_without_the_sentence(visit):
    page = visit()
    expect(app(page).locator('.badge')).to_have_text('proved')
    expect(app(page).get_by_text('distance 0 · 1 text tried')).to_be_visible()
    expect(app(page).get_by_text('Write in English')).to_be_visible()
    write(page, QUESTIONS[1])
    expect(app(page).locator('.badge')).to_have_text('unknown')
    expect(app(page).locator('.judge .said')).to_contain_text(f'which is “{QUESTIONS[1]}”')
    app(page).get_by_role('button', name='Let the encoder check up to 200 texts').click()
    write_meanwhile = named(page, 'textbox', 'sentence B')
    write_meanwhile.fill('typed while it looks')
    expect(app(page).locator('.badge')).to_have_text('proved')
    expect(app(page).locator('.best')).to_have_text(QUESTIONS[1])
    expect(app(page).locator('.judge .said')).to_have_text('It is your sentence.')
    assert int(re.search(r'(\d+) texts tried', app(page).locator('.verdict').inner_text())[1]) > 1
    expect(app(page).get_by_role('button', name='Let the encoder')).to_be_hidden()
    assert write_meanwhile.input_value() == 'typed while it looks'

def test_from_one_sentence_to_another(visit):
    page = visit()
    named(page, 'textbox', 'sentence B').press('Enter')
    model, slider = open_reader(READER)[0], named(page, 'slider',
        'from the first sentence to the other')
    a, b = model.encoder.encode([QUESTIONS[0], QUESTIONS[-1]])
    for i, share in (0, 0.), (9, .45), (20, 1.):
        slider.fill(str(i))
        text = model.generate(torch.stack([a + share*(b - a)]*2), steps=8)[0]
        expect(app(page).locator('.between-text')).to_have_text(text)
        assert slider.get_attribute('aria-valuetext') == f'{round(100*share)} % of the way'
    way = app(page).locator('.between-text')
    write(page, 'why do cats sleep?') # it was the way from another sentence
    expect(way).to_be_hidden()
    named(page, 'button', 'Go from A to B').click()
    expect(way).to_be_visible()
    named(page, 'combobox', 'reader').select_option(GRAMMAR)
    expect(way).to_be_hidden()
    named(page, 'textbox', 'sentence B').fill('')
    named(page, 'button', 'Go from A to B').click()
    expect(app(page).locator('.wrong:visible')).to_contain_text('a text must hold a word at least')

def test_a_hidden_word_is_filled_in_again(visit):
    page = visit()
    named(page, 'button', 'piano').click()
    hole = app(page).get_by_role('button', name='piano, hidden; filled in: ')
    expect(hole).to_have_attribute('aria-pressed', 'true')
    named(page, 'button', 'learn').click()
    expect(app(page).get_by_text('2 words hidden, ')).to_be_visible()
    model = open_reader(READER)[0]
    guess = model.infill('how do i [MASK] to play the [MASK]?', QUESTIONS[0])
    words = app(page).locator('.word').all_inner_texts()
    assert words == re.findall(r'\w+|\?', guess)
    hole.click()
    app(page).locator('.word[aria-pressed=true]').click()
    expect(app(page).get_by_text('Nothing is hidden.')).to_be_visible()
    assert app(page).locator('.word').all_inner_texts() == re.findall(r'\w+|\?', QUESTIONS[0])

def test_out_of_its_world(visit):
    page = visit()
    named(page, 'button', 'Show what happens').click()
    expect(app(page).locator('.outside li')).to_have_count(len(OUTSIDE), timeout=120_000)
    said = app(page).locator('.outside .came').all_inner_texts()
    own = [written(page, text)[1] for text in OUTSIDE.values()]
    assert [' '.join(text.split()) for text in said] == [' '.join(t.split()) for t in own]
    same = sum(text == out for text, out in zip(OUTSIDE.values(), own))
    expect(app(page).get_by_text(f'{same} of {len(OUTSIDE)} texts came back.')).to_be_visible()
    assert 1 <= same < len(OUTSIDE)//2 # its own kind does, and the rest does not

TEXTS = [ # text, what is said, what is marked
    (INJECTION, 'pieces: the decoder writes 16 at most', None), ('a '*2500, 'max_tokens', ''),
    ('x'*5000, '', None), ('', 'a text must hold a word at least', ''),
    ('你好 boats', 'that the decoder has no letters for', '你好boats'),
    ('كيف حالك', '', None),
    ('go 🚀🚀 now', 'that the decoder has no letters for', '🚀🚀'),
    ('[MASK] [UNK] ##ing', '', None)]

def test_texts_of_all_kinds(visit):
    page = visit()
    for text, says, marked in TEXTS:
        write(page, text)
        app(page).get_by_text(says).locator('visible=true').first.wait_for()
        page.wait_for_timeout(500)
        assert named(page, 'textbox', 'sentence A').input_value() == text # nothing is taken away
        assert app(page).locator('img, script').count() == 0
        if marked is not None:
            lacked = app(page).locator('.marked :is(.spelled, .unknown)').all_inner_texts()
            assert ''.join(lacked) == marked
        inner, outer = page.evaluate('[document.documentElement.scrollWidth, innerWidth]')
        assert inner <= outer
    write(page, QUESTIONS[0])
    expect(app(page).locator('.badge')).to_have_text('proved')

def test_typing_is_marked_when_it_rests(visit):
    page = visit()
    named(page, 'textbox', 'sentence A').fill('')
    page.asked.clear()
    named(page, 'textbox', 'sentence A').press_sequentially('do boats dream?', delay=20)
    expect(app(page).locator('.marked .spelled').first).to_have_text('boats')
    assert named(page, 'textbox', 'sentence A').input_value() == 'do boats dream?'
    assert page.asked.count('mark') <= 5 and 'write' not in page.asked
    page.wait_for_timeout(500)
    assert page.evaluate('window.saved.text') == 'do boats dream?' # the next view begins with it

def test_two_at_once(visit):
    page = visit(SamplerApp(READER), SamplerApp(GRAMMAR))
    first, second = page.locator('.sampler').first, page.locator('.sampler').last
    best = second.locator('.best').inner_text()
    field = first.get_by_role('textbox', name='sentence A')
    field.fill(QUESTIONS[2])
    field.press('Enter')
    expect(first.locator('.best')).to_have_text(written(page, QUESTIONS[2])[1])
    assert second.locator('.best').inner_text() == best
    assert second.get_by_role('textbox', name='sentence A').input_value() != QUESTIONS[2]
    ids = page.evaluate('[...document.querySelectorAll("[id]")].map(x => x.id)')
    assert len(ids) == len(set(ids)) > 5

def test_keyboard_only(visit):
    page = visit()
    shows_after_play(page, QUESTIONS[0])
    names = reach(page)
    words = re.findall(r'\w+|\?', QUESTIONS[0])
    assert not {'reader', 'sentence A', 'sentence B', *QUESTIONS[:-1], 'Encode and read back',
                'Knobs', 'Play', 'call of the decoder', 'All calls, one below the other', *words,
                'Go from A to B', 'Show what happens'} - set(names)
    page.evaluate('document.activeElement.blur()')
    def to(name):
        for _ in range(80):
            page.keyboard.press('Tab')
            if app(page).evaluate("""() => {
                const x = document.activeElement
                return x.getAttribute('aria-label') ?? x.labels?.[0]?.textContent ?? x.textContent
            }""") == name: return
        pytest.fail(f'{name} is not reached')
    to('sentence A')
    page.keyboard.press('Control+a')
    page.keyboard.type(QUESTIONS[3])
    page.keyboard.press('Enter')
    shows_after_play(page, QUESTIONS[3])
    to('call of the decoder')
    page.keyboard.press('Home')
    assert filled(page) == 0
    page.keyboard.press('ArrowRight')
    assert filled(page) > 0
    to(app(page).locator('.word').first.inner_text())
    page.keyboard.press('Space')
    expect(app(page).get_by_text('1 word hidden, ')).to_be_visible()
    to('Go from A to B')
    page.keyboard.press('Enter')
    expect(app(page).locator('.between-text')).to_have_text(written(page, QUESTIONS[3])[1])

@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
def test_every_width_and_both_grounds(visit, axe, dark): # noqa: F811
    page = visit(dark=dark, reduced_motion='reduce')
    write(page, '你好 zyzzyva: how do i learn to play the piano and a violin at once?')
    expect(app(page).locator('.badge')).to_have_text('unknown')
    assert filled(page) == app(page).locator('.main-row .piece').count() # without movement
    for part in 'Knobs', 'All calls, one below the other': app(page).get_by_text(part).click()
    named(page, 'button', 'Go from A to B').click()
    app(page).locator('.word').nth(1).click()
    expect(app(page).get_by_text('1 word hidden, ')).to_be_visible()
    assert (app(page).get_attribute('data-dark') is not None) == dark
    page.evaluate(axe)
    for width in WIDTHS:
        page.set_viewport_size(dict(width=width, height=900))
        page.wait_for_timeout(500) # colours have settled
        over = app(page).evaluate("""app => [...app.querySelectorAll('*')].filter(x =>
            x.getBoundingClientRect().right > innerWidth + 1 || (!x.matches('input, textarea')
            && /auto|scroll/.test(getComputedStyle(x).overflowX) && x.scrollWidth > x.clientWidth))
            .map(x => x.outerHTML.slice(0, 80))""")
        inner, outer = page.evaluate('[document.documentElement.scrollWidth, innerWidth]')
        assert over == [] and inner <= outer
        picture(page, f"sampler-{width}-{'dark' if dark else 'light'}")
        found = page.evaluate("axe.run('.sampler').then(found => found.violations)")
        assert [(v['id'], [n['html'][:90] for n in v['nodes']]) for v in found
                if v['impact'] in ('serious', 'critical')] == []


# without a kernel

@pytest.fixture(scope='module')
def still():
    "The app as a part of a page, with all that was recorded."
    return SamplerApp(READER).static_html()

def test_without_a_kernel_the_examples_work(still, browser, tmp_path):
    path = tmp_path/'still.html'
    path.write_text(PAGE.format('#fff', still), encoding='utf-8')
    page = browser.new_page()
    watch(page, path.as_uri())
    page.goto(path.as_uri())
    expect(app(page).locator('.badge')).to_have_text('proved')
    named(page, 'button', QUESTIONS[1]).click()
    expect(app(page).locator('.badge')).to_have_text('unknown')
    app(page).get_by_role('button', name='Let the encoder').click()
    expect(app(page).locator('.best')).to_have_text(QUESTIONS[1])
    named(page, 'button', 'teach').click()
    expect(app(page).get_by_text('1 word hidden, ')).to_be_visible()
    named(page, 'button', 'Go from A to B').click()
    expect(app(page).locator('.between-text')).to_have_text(written(page, QUESTIONS[1])[1])
    named(page, 'button', 'Show what happens').click()
    expect(app(page).locator('.outside li')).to_have_count(len(OUTSIDE))
    write(page, 'a sentence of my own')
    expect(app(page).locator('.wrong:visible')).to_contain_text('This page has no kernel')
    assert named(page, 'textbox', 'sentence A').input_value() == 'a sentence of my own'
    assert page.locator('.banner:visible').count() == 0 and page.wrong == []
    page.close()


# in JupyterLab

CELLS = ['from enigma_lab.apps.sampler import sampler_app', 'sampler_app()', 'sampler_app()',
         *[f'{n}' for n in range(8)]]

@pytest.fixture(scope='module')
def notebook(lab, browser, tmp_path_factory):
    "A notebook with two apps, after Run All; the reader of questions lies among its runs."
    place = tmp_path_factory.getbasetemp()/'lab0'/'runs'
    shutil.copytree(test_docs.ROOT/'runs'/READER, place/READER, dirs_exist_ok=True)
    page = browser.new_page()
    made = test_docs.notebook(('markdown', 'Two samplers.', None),
                              *(('code', text, []) for text in CELLS))
    for cell in made['cells']: cell.pop('id')
    body = dict(type='notebook', format='json', content={**made, 'nbformat_minor': 4})
    address, key = f'{lab}api/contents/sampler.ipynb', dict(Authorization=f'token {TOKEN}')
    assert page.request.put(address, data=body, headers=key).ok
    page.close()
    with opened(lab, browser, 'sampler.ipynb', '.enigma-view .main-row .piece >> nth=-1') as page:
        yield page

def test_in_jupyterlab_until_the_kernel_restarts(notebook):
    first = notebook.locator('.enigma-view .sampler').first
    field = first.get_by_role('textbox', name='sentence A')
    field.fill(QUESTIONS[2])
    field.press('Enter')
    expect(first.locator('.best')).to_have_text(written(notebook, QUESTIONS[2])[1])
    first.get_by_role('button', name='Let the encoder').click()
    expect(first.locator('.best')).to_have_text(QUESTIONS[2])
    assert no_cell_failed(notebook) # and nothing on stderr
    keys_stay(notebook, '.judge')
    field.fill('half a sentence')
    notebook.locator('#jp-MainMenu').get_by_text('Kernel', exact=True).click()
    notebook.locator('.lm-Menu-item[data-command="kernelmenu:restart"]').click()
    banner = notebook.locator('.enigma-view .banner')
    expect(banner.first).to_be_visible(timeout=60_000)
    expect(banner.first).to_contain_text('The kernel is gone: run the cell again.')
    assert field.input_value() == 'half a sentence' and first.locator('.best').is_visible()
    click_run_all(notebook)
    expect(field).to_have_value(QUESTIONS[0], timeout=WAIT) # of the new widget
    expect(first.locator('.badge')).to_have_text('proved')

def test_the_knobs_are_the_samplers():
    "What the page sends at first is what `maskgit_sample` takes."
    model, seed = open_reader(READER)[0], KNOBS['seed']
    how = {name: value for name, value in KNOBS.items() if name != 'seed'}
    t = maskgit_sample(model, model.encoder.encode([QUESTIONS[0]]),
                       generator=torch.Generator().manual_seed(seed), **how)
    assert model.read(t.tokens, t.content) == [QUESTIONS[0]]
