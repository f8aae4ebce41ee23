"The lampboard as a person uses it: on a page without a kernel, on a built site, in JupyterLab."
import random
import re

import pytest
import torch
from playwright.sync_api import expect

import test_docs
from enigma_lab.apps.lampboard import (
    MACHINES_JS, PRESETS, lampboard_app, make_twin, read_settings_line, twin_js,
    write_settings_line)
from enigma_lab.machine.history import GREEK, LETTERS, ROTORS, EnigmaMachine
from jupyter_lab import (
    TOKEN, WAIT, click_run_all, end_kernels, keys_stay, no_cell_failed, opened, typed)

pytestmark = pytest.mark.proof('apps.base', 'apps.lampboard', 'machine.history', 'machine.enigma')

pytest_plugins = 'jupyter_lab'

axe = test_docs.axe
WIDTHS = 390, 800, 1280
PLAIN = 'B_III-II-I_AAA_AAA_'
INJECTION = '<img src=x onerror="window.hacked = true"><script>window.hacked = true</script>'
# the base of the page, the theme, and an app or two: the head says nothing of dark or light
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Lampboard</title>
<body style="margin: 12px; background: {}"><main><h1>Lampboard</h1>{}</main></body></html>"""


# a page without a kernel

@pytest.fixture
def visit(browser, tmp_path):
    "Open a page with apps from a file; it may load nothing else and report no error."
    opened = []
    def visit(*apps, width=800, dark=False, end='', **options):
        apps = apps or [lampboard_app()]
        body = ''.join(app if isinstance(app, str) else app.static_html() for app in apps)
        path = tmp_path/f'page{len(opened)}.html'
        path.write_text(PAGE.format('#111' if dark else '#fff', body), encoding='utf-8')
        page = browser.new_page(viewport=dict(width=width, height=900),
            permissions=['clipboard-read', 'clipboard-write'], **options)
        watch(page, path.as_uri())
        page.goto(path.as_uri() + end)
        page.locator('.lampboard .key').first.wait_for()
        opened.append(page)
        return page
    yield visit
    for page in opened:
        assert not page.wrong, page.wrong
        page.close()

def watch(page, own):
    "Note errors, and requests for anything else than the page itself."
    page.set_default_timeout(20_000)
    page.wrong = []
    fine = own.rpartition('/')[0], 'data:', 'blob:'
    note = lambda bad, text: bad and page.wrong.append(text)
    page.on('request', lambda r: note(not r.url.startswith(fine), f'asks for {r.url}'))
    page.on('console', lambda m: note(m.type == 'error' and 'favicon' not in m.text, m.text))
    page.on('pageerror', lambda e: note(True, str(e)))

def board(page): return page.locator('.lampboard').last

def named(page, role, name, **options):
    return board(page).get_by_role(role, name=name, exact=True, **options)

def settings(page): return named(page, 'textbox', 'settings').input_value()

def paper(page):
    "What is on the sheets, the newest first: letters typed, letters lit."
    read = """sheets => sheets.map(sheet => ['span', 'b'].map(part =>
        [...sheet.querySelectorAll(`.group ${part}`)].map(x => x.textContent).join('')))"""
    return [tuple(pair) for pair in board(page).locator('article').evaluate_all(read)]

def lit(page):
    return board(page).locator('.lamp.lit').all_inner_texts()

def enciphered(line, text):
    "Lit letters, and the line of the settings afterwards."
    given = read_settings_line(line)
    machine = EnigmaMachine(**given)
    out = machine.encipher(text)
    return out, write_settings_line(**{**given, 'positions': machine.positions})

def set_line(page, line): named(page, 'textbox', 'settings').fill(line)

def hear_keys(page): board(page).focus()

def random_settings(rng, m4):
    letters = rng.sample(LETTERS, 2*rng.randint(0, 13))
    some = lambda: ''.join(rng.choices(LETTERS, k=3 + m4))
    return write_settings_line(
        rotors=' '.join(rng.sample(list(ROTORS), 3)), reflector=rng.choice('bc' if m4 else 'ABC'),
        rings=some(), positions=some(), greek=rng.choice(list(GREEK)) if m4 else None,
        plugs=' '.join(a + b for a, b in zip(letters[::2], letters[1::2])))


# both machines

@pytest.fixture(scope='module')
def script(browser):
    "Call JavaScript of the machines with data: (function, data) -> what it returns."
    page = browser.new_page()
    page.set_default_timeout(300_000)
    def script(function, data):
        # a block of its own for each call: its constants end with it
        machines = f'{MACHINES_JS}\n{twin_js()}'
        return page.evaluate(f'data => {{ {machines}\nreturn ({function})(data) }}', data)
    yield script
    page.close()

def test_the_machines_agree_on_1200_settings(script):
    rng = random.Random(23)
    jobs = [(random_settings(rng, n % 3 == 0), ''.join(rng.choices(LETTERS, k=400)))
            for n in range(1200)]
    assert sum(line.count('-') for line, _ in jobs) > 4000 # with cables and fourth wheels
    found = script("""jobs => jobs.map(([line, text]) => {
        const { key, lit } = encipher(readKey(line), text)
        return [lit, writeKey(key)]
    })""", jobs)
    wrong = [line for (line, text), said in zip(jobs, found)
             if tuple(said) != enciphered(line, text)]
    assert len(found) == 1200 and not wrong

def test_every_way_agrees(script):
    rng = random.Random(5)
    jobs = [random_settings(rng, n % 2 == 0) for n in range(200)]
    found = script("""lines => lines.map(readKey).map(key =>
        [...LETTERS].map(c => way(key, c).join('')))""", jobs)
    assert found == [[EnigmaMachine(**read_settings_line(line)).way(c) for c in LETTERS]
                     for line in jobs]

def test_the_twins_agree_to_the_last_bit(script):
    rng = random.Random(7)
    jobs = [[rng.randrange(26), rng.choice([rng.randrange(30), rng.randrange(30_000)])]
            for _ in range(500)]
    found = script("""jobs => jobs.map(([letter, t]) => {
        const { inside, outside } = twinWay(letterVector(LETTERS[letter]), t)
        return [inside.at(-1), outside.at(-1), twinLetter(LETTERS[letter], t).same]
    })""", jobs)
    middle, last, same = map(list, zip(*found))
    machine, letters, times = make_twin(), *torch.tensor(jobs).T
    with torch.no_grad():
        x = 8*torch.eye(26)[letters]
        y = machine(x, times)
        for part, _ in machine.route()[:4]: x = part(x, times)
    assert torch.equal(torch.tensor(last), y) and torch.equal(torch.tensor(middle), x)
    assert all(same) and y.std() > .1

@pytest.mark.parametrize('line, says', [
    ('B_I-I-II_AAA_AAA_', 'wheels: three different'), ('B_I-IX-II_AAA_AAA_', 'wheels: three'),
    ('B_Beta-I-II_AAA_AAA_', 'wheels'), ('b_I-II-III_AAA_AAA_', 'reflector: one of A, B, C'),
    ('B_Beta-I-II-III_AAAA_AAAA_', 'reflector: one of b, c'), ('B_I-II-III_AA_AAA_', 'rings: 3'),
    ('B_I-II-III_AAA_AaA_', 'windows: 3 letters'), ('B_I-II-III_AAA_AAA_AB-BC', 'got B twice'),
    ('B_I-II-III_AAA_AAA_AA', 'got A twice'), ('B_I-II-III_AAA_AAA_ABC', 'joins two letters'),
    ('hello', 'settings: write them as')])
def test_both_refuse_the_same_settings(script, line, says):
    found = script('line => { try { readKey(line) } catch (error) { return error.message } }', line)
    assert says in found
    with pytest.raises(ValueError): read_settings_line(line)


# what a person does

def test_keys_lamps_and_wires(visit):
    page = visit()
    for _ in range(3): named(page, 'button', 'key A').click()
    out, line = enciphered(PLAIN, 'AAA')
    assert (paper(page), lit(page), settings(page)) == ([('AAA', out)], [out[-1]], line)
    expect(board(page).get_by_text(f'A → {out[-1]}')).to_be_visible()
    for letter in LETTERS: named(page, 'button', f'key {letter}').click()
    out, line = enciphered(PLAIN, 'AAA' + LETTERS)
    assert (paper(page), settings(page)) == ([('AAA' + LETTERS, out)], line)
    assert board(page).locator('.way').count() == 3
    for name, letter in {'in': 'Z', 'out': out[-1]}.items():
        assert board(page).locator(f'text.{name}').text_content() == letter

def test_the_way_is_that_of_the_machine(visit):
    page = visit()
    hear_keys(page)
    page.keyboard.press('g')
    machine = EnigmaMachine()
    machine.press('G')
    way, read = [LETTERS.index(c) for c in machine.way('G')], {}
    for name in 'in', 'out':
        parts = re.findall(r'[MLC][^MLC]+', board(page).locator(f'.way.{name}').get_attribute('d'))
        ends = [float(part.split()[-1]) for part in parts] # where each part of the line ends
        read[name] = [(y - 8)/10 for y in ends] # rows of ten pixels
    assert read['in'][1:] == way[:5] and read['out'][:-1] == way[5:]

def test_a_keyboard_is_heard_and_what_is_dropped_is_said(visit):
    page = visit()
    hear_keys(page)
    page.keyboard.type('Attack at dawn')
    out, line = enciphered(PLAIN, 'ATTACKATDAWN')
    assert (paper(page), settings(page)) == ([('ATTACKATDAWN', out)], line)
    page.keyboard.press('!')
    expect(board(page).get_by_text('! is dropped: the keys are A … Z.')).to_be_visible()
    page.keyboard.press('Control+a')
    page.keyboard.press('Backspace')
    assert paper(page) == [('ATTACKATDAW', out[:-1])]
    named(page, 'button', 'key Q').click() # a click leaves the space bar to the typist
    page.keyboard.press('Space')
    assert paper(page)[0][0] == 'ATTACKATDAWQ'
    named(page, 'button', 'key Q').focus()
    page.keyboard.press('Space') # with the focus on a key it is the browser's own
    assert paper(page)[0][0] == 'ATTACKATDAWQQ'

@pytest.mark.parametrize('text, letters, says', [
    ('Attack at dawn!', 'ATTACKATDAWN', '12 letters taken, dropped: 2 spaces, 1 mark.'),
    ('abc', 'ABC', '3 letters taken, nothing dropped.'),
    (INJECTION, re.sub('[^A-Z]', '', INJECTION.upper()), 'letters taken, dropped:'),
    ('a你好b', 'AB', '2 letters taken, dropped: 2 foreign letters.'),
    ('مرحبا x', 'X', '1 letter taken, dropped: 5 foreign letters, 1 space.'),
    ('go 🚀🚀 1', 'GO', '2 letters taken, dropped: 2 spaces, 2 marks, 1 digit.'),
    ('Bärwalde', 'BRWALDE', '7 letters taken, dropped: 1 foreign letter.')])
def test_messages_of_all_kinds(visit, text, letters, says):
    page = visit()
    named(page, 'textbox', 'message').fill(text)
    named(page, 'button', 'Encipher or decipher').click()
    out, line = enciphered(PLAIN, letters)
    assert (paper(page), settings(page)) == ([(letters, out)], line)
    expect(board(page).locator('.note')).to_contain_text(says)
    assert named(page, 'textbox', 'message').input_value() == text # nothing is taken away
    assert page.evaluate('window.hacked') is None
    assert board(page).locator('img, script').count() == 0

def test_5000_characters_and_back(visit):
    page = visit()
    rng = random.Random(1)
    text = ''.join(rng.choices(LETTERS, k=5000))
    named(page, 'textbox', 'message').fill(text)
    named(page, 'button', 'Encipher or decipher').click()
    assert paper(page)[0] == (text, enciphered(PLAIN, text)[0])
    named(page, 'button', 'decipher this').click()
    assert paper(page)[0][1] == text and len(paper(page)) == 2
    hear_keys(page)
    began = page.evaluate('performance.now()')
    for _ in range(20): page.keyboard.press('e')
    assert len(paper(page)[0][0]) == 5020
    assert (page.evaluate('performance.now()') - began)/20 < 200 # milliseconds for a key
    inner, outer = page.evaluate('[document.documentElement.scrollWidth, innerWidth]')
    assert inner <= outer

def test_a_message_without_a_letter_is_refused_in_words(visit):
    page = visit()
    named(page, 'textbox', 'message').fill('你好 123 🚀')
    named(page, 'button', 'Encipher or decipher').click()
    expect(board(page).locator('.wrong:visible')).to_have_text(
        'message: it needs a letter A … Z; got “你好 123 🚀”')
    assert paper(page) == [] and named(page, 'textbox', 'message').input_value() == '你好 123 🚀'

def test_presets_and_their_messages(visit):
    page = visit()
    starts = dict(zip([p['name'] for p in PRESETS],
                      [['FEINDLIQEINFANTERIE'], ['AUFKLXABTEILUNG', 'DREIGEHTLANGSAM'],
                       ['VONVONJLOOKSJHFFTTT']]))
    for preset in PRESETS:
        named(page, 'button', preset['name']).click()
        assert settings(page) == preset['messages'][0][0]
        link = board(page).get_by_role('link')
        assert link.get_attribute('href') == preset['link']
        buttons = board(page).locator('.about button')
        assert buttons.count() == len(preset['messages'])
        for i, start in enumerate(starts[preset['name']]):
            buttons.nth(i).click()
            assert paper(page)[0][1].startswith(start)
    assert len(paper(page)) == 4
    pressed = lambda name: named(page, 'button', name).get_attribute('aria-pressed') == 'true'
    assert pressed(PRESETS[-1]['name'])
    named(page, 'combobox', 'left wheel').select_option('I') # another machine by hand
    assert not any(pressed(preset['name']) for preset in PRESETS)
    named(page, 'button', 'Undo').click()
    assert pressed(PRESETS[-1]['name'])
    set_line(page, PLAIN)
    assert not pressed(PRESETS[-1]['name'])
    seen = set()
    for _ in range(5):
        named(page, 'button', 'random day key').click()
        read_settings_line(settings(page))
        assert settings(page).count('-') == 2 + 9 # three wheels, ten cables
        seen.add(settings(page))
    assert len(seen) == 5 and len(paper(page)) == 4

def test_nothing_wipes_the_paper_and_undo_takes_all_back(visit):
    page = visit()
    hear_keys(page)
    page.keyboard.type('abc')
    kept, line = paper(page), settings(page)
    named(page, 'combobox', 'left wheel').select_option('V')
    named(page, 'combobox', 'reflector').select_option('C')
    named(page, 'button', 'add the fourth wheel').click()
    assert settings(page).startswith('c_Gamma-V-II-I_AAAA_A')
    named(page, 'button', '1930 manual').click()
    assert paper(page) == kept
    hear_keys(page)
    page.keyboard.type('x')
    assert len(paper(page)) == 2 and paper(page)[1] == kept[0] # a sheet of its own
    named(page, 'button', 'Empty the paper').click()
    assert paper(page) == []
    for _ in range(2 + 4): named(page, 'button', 'Undo').click()
    assert (paper(page), settings(page)) == (kept, line)
    for _ in range(3): named(page, 'button', 'Undo').click()
    assert (paper(page), settings(page)) == ([], PLAIN)
    expect(named(page, 'button', 'Undo')).to_be_disabled()

def test_a_wrong_field_blocks_no_other(visit):
    page = visit()
    cables = named(page, 'textbox', 'cables')
    cables.fill('AB BC')
    expect(board(page).locator('.wrong:visible')).to_have_text(
        'cables: each letter takes one; got B twice')
    assert cables.get_attribute('aria-invalid') == 'true'
    named(page, 'combobox', 'left wheel').select_option('IV')
    hear_keys(page)
    page.keyboard.type('q')
    out, _ = enciphered('B_IV-II-I_AAA_AAA_', 'Q')
    assert paper(page) == [('Q', out)] and cables.input_value() == 'AB BC'
    cables.fill('ab cd') # small letters are taken
    expect(board(page).locator('.wrong:visible')).to_have_count(0)
    assert settings(page).endswith('_AB-CD')
    set_line(page, 'nonsense')
    expect(board(page).locator('.wrong:visible')).to_contain_text('settings: write them as')
    hear_keys(page)
    page.keyboard.type('q')
    assert len(paper(page)) == 2

def test_wheels_change_places_and_never_meet(visit):
    page = visit()
    named(page, 'combobox', 'left wheel').select_option('I')
    assert settings(page) == 'B_I-II-III_AAA_AAA_'
    named(page, 'button', 'add the fourth wheel').click()
    assert settings(page) == 'b_Beta-I-II-III_AAAA_AAAA_'
    named(page, 'combobox', 'fourth wheel').select_option('Gamma')
    named(page, 'combobox', 'reflector').select_option('c')
    named(page, 'button', 'remove the fourth wheel').click()
    assert settings(page) == 'C_I-II-III_AAA_AAA_'

def drum(page, name): return named(page, 'spinbutton', name)

def test_a_wheel_is_turned_by_drag_click_and_arrows(visit):
    page = visit()
    wheel = drum(page, 'window of the middle wheel')
    wheel.scroll_into_view_if_needed()
    box = wheel.bounding_box()
    x, y = box['x'] + box['width']/2, box['y'] + box['height']/2
    page.mouse.move(x, y); page.mouse.down()
    page.mouse.move(x, y - 40, steps=8); page.mouse.move(x, y - 85, steps=8); page.mouse.up()
    assert wheel.get_attribute('aria-valuetext') == 'F' # sixteen pixels a letter
    page.mouse.click(x, y); assert settings(page).endswith('_AAA_AFA_')
    named(page, 'button', 'Undo').click()
    assert settings(page) == PLAIN # one drag is one step back
    page.mouse.click(x, box['y'] + box['height'] - 6)
    assert settings(page).endswith('_ABA_')
    page.mouse.click(x, box['y'] + 6); page.mouse.click(x, box['y'] + 6)
    assert settings(page).endswith('_AZA_')
    ring = drum(page, 'ring of the right wheel')
    for key, letter in dict(ArrowUp='B', ArrowRight='C', ArrowDown='B', PageUp='G', End='Z',
                            Home='A', ArrowLeft='Z').items():
        ring.press(key)
        assert settings(page) == f'B_III-II-I_AA{letter}_AZA_', key

def test_a_finger_on_a_phone(visit):
    page = visit(width=390, has_touch=True, is_mobile=True)
    named(page, 'button', 'key W').tap()
    out, _ = enciphered(PLAIN, 'W')
    assert (paper(page), lit(page)) == ([('W', out)], [out])
    wheel = drum(page, 'window of the left wheel')
    wheel.scroll_into_view_if_needed()
    box = wheel.bounding_box()
    x, y = box['x'] + box['width']/2, box['y'] + box['height']/2
    touch = page.context.new_cdp_session(page)
    send = lambda kind, *points: touch.send('Input.dispatchTouchEvent', dict(
        type=kind, touchPoints=[dict(x=x, y=y) for y in points]))
    send('touchStart', y)
    for i in range(1, 11): send('touchMove', y - 5*i)
    send('touchEnd')
    expect(wheel).to_have_attribute('aria-valuetext', 'D')
    page.wait_for_timeout(500) # no finger is quicker; the browser takes a tap at once for a stop
    named(page, 'button', 'socket Q, free').tap()
    expect(named(page, 'button', 'socket Q, free')).to_have_attribute('aria-pressed', 'true')
    named(page, 'button', 'socket L, free').tap()
    expect(named(page, 'button', 'socket Q, joined to L')).to_be_visible()
    assert settings(page).endswith('_LQ')
    small = board(page).locator('button, select, input, [role=spinbutton]').evaluate_all(
        'all => all.filter(x => x.offsetWidth < 24 || x.offsetHeight < 24).map(x => x.outerHTML)')
    assert small == [] # WCAG 2.2, 2.5.8

def test_cables_are_plugged_by_hand(visit):
    page = visit()
    named(page, 'button', 'socket A, free').click()
    expect(named(page, 'button', 'socket A, free')).to_have_attribute('aria-pressed', 'true')
    named(page, 'button', 'socket M, free').click()
    expect(named(page, 'button', 'socket A, joined to M')).to_be_visible()
    assert settings(page) == PLAIN + 'AM' and board(page).locator('.cable').count() == 1
    named(page, 'button', 'socket F, free').press('Enter')
    named(page, 'button', 'socket I, free').press('Enter')
    assert settings(page) == PLAIN + 'AM-FI'
    named(page, 'button', 'socket M, joined to A').click()
    assert settings(page) == PLAIN + 'FI'
    named(page, 'button', 'socket B, free').click()
    named(page, 'button', 'socket F, joined to I').click() # the other end takes its place
    assert settings(page) == PLAIN + 'BF'
    named(page, 'button', 'socket C, free').press('Enter')
    page.keyboard.press('Escape')
    expect(board(page).locator('.socket[aria-pressed=true]')).to_have_count(0)

def test_copies_and_links(visit):
    page = visit()
    named(page, 'button', '1930 manual').click()
    named(page, 'textbox', 'message').fill('attack at dawn')
    named(page, 'button', 'Encipher or decipher').click()
    out, line = enciphered(PRESETS[0]['messages'][0][0], 'ATTACKATDAWN')
    copied = lambda: page.evaluate('navigator.clipboard.readText()')
    named(page, 'button', 'Copy').click()
    expect(named(page, 'article', 'sheet 1').get_by_text('Copied')).to_be_visible()
    assert copied() == f'{out[:5]} {out[5:10]} {out[10:]}'
    named(page, 'button', 'Copy link').click()
    page.wait_for_timeout(100)
    assert copied() == page.url + '#lampboard=' + line
    named(page, 'button', 'Copy as link').click()
    page.wait_for_timeout(100)
    link = copied()
    other = visit(end='#' + link.partition('#')[2])
    assert settings(other) == PRESETS[0]['messages'][0][0]
    named(other, 'button', 'Encipher or decipher').click()
    assert paper(other)[0][1] == 'ATTACKATDAWN'
    line = settings(other)
    other.wait_for_timeout(500)
    other.reload() # what was done since the link stays
    board(other).locator('article').wait_for()
    assert settings(other) == line and paper(other)[0][1] == 'ATTACKATDAWN'
    other.evaluate("location.hash = '#lampboard=C_I-II-III_AAA_AAA_'") # another link is followed
    other.wait_for_function("document.querySelector('.line').value.startsWith('C_I')")
    broken = visit(end='#lampboard=%E0%A4%A')
    expect(board(broken).get_by_text('settings: the link is damaged')).to_be_visible()
    wrong = visit(end='#lampboard=B_I-I-I_AAA_AAA_')
    expect(board(wrong).get_by_text('wheels: three different')).to_be_visible()
    assert settings(wrong) == PLAIN

def test_the_paper_lives_as_long_as_the_tab(visit):
    page = visit()
    hear_keys(page)
    page.keyboard.type('hello')
    named(page, 'textbox', 'message').fill('not yet sent')
    kept = paper(page)
    page.wait_for_timeout(500)
    page.reload()
    board(page).locator('article').wait_for()
    assert paper(page) == kept and named(page, 'textbox', 'message').input_value() == 'not yet sent'

def test_the_neural_twin(visit):
    page = visit()
    hear_keys(page)
    page.keyboard.type('attackatdawn')
    named(page, 'button', 'neural twin').click()
    secret = make_twin()(8*torch.eye(26)[[LETTERS.index(c) for c in 'ATTACKATDAWN']],
                         torch.arange(12)).argmax(-1)
    secret = ''.join(LETTERS[i] for i in secret)
    expect(board(page).locator('.wires-panel')).to_contain_text(
        f'The neural machine makes {secret[-1]} of N')
    expect(board(page).locator('.wires-panel')).to_contain_text('every bit came back')
    expect(board(page).locator('.twin')).to_contain_text(
        f'{secret[:5]} {secret[5:10]} {secret[10:]}, and back to the last bit')
    assert board(page).locator('.dot').count() == 14*26
    named(page, 'button', 'Enigma').click()
    assert board(page).locator('.dot').count() == 0

def test_two_on_one_page(visit):
    page = visit(lampboard_app(), lampboard_app('C_I-II-III_AAA_BBB_'))
    first, second = page.locator('.lampboard').first, page.locator('.lampboard').last
    first.get_by_role('button', name='key A', exact=True).click()
    page.keyboard.type('b')
    assert paper(page) == [] # of the second
    second.get_by_role('button', name='key A', exact=True).click()
    out, _ = enciphered('C_I-II-III_AAA_BBB_', 'A')
    assert paper(page) == [('A', out)]
    ids = page.evaluate('[...document.querySelectorAll("[id]")].map(x => x.id)')
    assert len(ids) == len(set(ids)) > 5
    page.wait_for_timeout(500)
    page.reload()
    page.locator('article').nth(1).wait_for()
    assert paper(page) == [('A', out)]

NAME = """() => { // of what has the focus
    const x = document.activeElement
    if (x === document.body) return null
    return x.getAttribute('aria-label') ?? x.labels?.[0]?.textContent ?? x.textContent
}"""

def reach(page):
    "Press Tab from the top of the page to its end: the name of each place that has the focus."
    found = []
    for _ in range(150):
        page.keyboard.press('Tab')
        found.append(page.evaluate(NAME))
        if found[-1] is None: return found[:-1]
    pytest.fail(f'Tab goes round: {found}')

def test_keyboard_only(visit):
    "Every control is reached by Tab; settings, cables, a message and Undo without a mouse."
    page = visit()
    names = reach(page)
    expected = [p['name'] for p in PRESETS] + [
        'random day key', 'add the fourth wheel', 'Enigma', 'neural twin', 'reflector',
        'left wheel', 'window of the left wheel', 'ring of the right wheel', 'cables', 'message',
        'Encipher or decipher', 'settings', 'Copy link']
    expected += [f'key {c}' for c in LETTERS] + [f'socket {c}, free' for c in LETTERS]
    assert not set(expected) - set(names)
    def to(name):
        page.evaluate('document.activeElement.blur()')
        for _ in range(150):
            page.keyboard.press('Tab')
            if page.evaluate(NAME) == name: return
        pytest.fail(f'{name} is not reached')
    to('left wheel'); page.keyboard.press('ArrowDown')
    assert settings(page).startswith('B_IV-II-I')
    to('window of the right wheel'); page.keyboard.press('ArrowUp')
    assert settings(page).endswith('_AAB_')
    to('socket Q, free'); page.keyboard.press('Enter')
    to('socket W, free'); page.keyboard.press('Enter')
    assert settings(page).endswith('_AAB_QW')
    line = settings(page)
    to('message'); page.keyboard.type('attack at dawn')
    to('Encipher or decipher'); page.keyboard.press('Enter')
    assert paper(page) == [('ATTACKATDAWN', enciphered(line, 'ATTACKATDAWN')[0])]
    to('decipher this'); page.keyboard.press('Enter')
    assert paper(page)[0][1] == 'ATTACKATDAWN'
    to('Undo'); page.keyboard.press('Enter')
    assert len(paper(page)) == 1


# how it looks

@pytest.mark.parametrize('width', WIDTHS)
@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
def test_no_scroll_bars_and_the_right_colours(visit, width, dark):
    page = visit(width=width, dark=dark)
    named(page, 'button', 'M4').click()
    named(page, 'button', 'Decipher its message').click()
    for view in 'Enigma', 'neural twin':
        named(page, 'button', view).click()
        inner, outer = page.evaluate('[document.documentElement.scrollWidth, innerWidth]')
        assert inner <= outer
        over = board(page).evaluate("""app => [...app.querySelectorAll('*')].filter(x =>
            x.getBoundingClientRect().right > innerWidth + 1 || (!x.matches('input, textarea')
            && /auto|scroll/.test(getComputedStyle(x).overflowX) && x.scrollWidth > x.clientWidth))
            .map(x => x.outerHTML.slice(0, 80))""")
        assert over == []
    assert (board(page).get_attribute('data-dark') is not None) == dark

def test_the_theme_is_followed(visit):
    page = visit()
    page.evaluate("document.body.style.background = '#111'")
    expect(board(page)).to_have_attribute('data-dark', '')
    page.evaluate("document.body.style.background = '#fff'")
    expect(board(page)).not_to_have_attribute('data-dark', '')

def violations(page, axe):
    "What axe-core calls serious or critical on the lampboards of a page."
    page.wait_for_timeout(700) # colours have settled
    page.evaluate(axe)
    found = page.evaluate("axe.run('.lampboard').then(found => found.violations)")
    return [(v['id'], v['impact'], [n['html'][:90] for n in v['nodes']]) for v in found
            if v['impact'] in ('serious', 'critical')]

@pytest.mark.parametrize('width', WIDTHS)
@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
def test_axe_finds_nothing_serious(visit, axe, width, dark):
    page = visit(width=width, dark=dark)
    named(page, 'button', 'Barbarossa').click()
    named(page, 'button', 'Decipher part 1').click()
    named(page, 'textbox', 'cables').fill('AB BC')
    named(page, 'button', 'Encipher or decipher').click()
    assert violations(page, axe) == []
    named(page, 'button', 'neural twin').click()
    assert violations(page, axe) == []

def test_axe_would_find_something(visit, axe):
    page = visit()
    board(page).evaluate("app => app.append(document.createElement('input'))")
    assert [name for name, *_ in violations(page, axe)] == ['label']


# the built site

@pytest.fixture(scope='module')
def small_site(tmp_path_factory):
    root = tmp_path_factory.mktemp('site')
    test_docs.app_site(root, '30_lampboard.ipynb')
    return root/'_docs'

@pytest.mark.parametrize('width', WIDTHS)
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_the_built_page_works_without_a_kernel(small_site, browser, axe, width, scheme):
    page = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
    where = (small_site/'lampboard.html').as_uri()
    watch(page, where)
    page.goto(where)
    named(page, 'button', 'key A').click()
    page.keyboard.type('ttack')
    assert paper(page) == [('ATTACK', enciphered(PLAIN, 'ATTACK')[0])]
    assert (board(page).get_attribute('data-dark') is not None) == (scheme == 'dark')
    inner, outer = page.evaluate('[document.documentElement.scrollWidth, innerWidth]')
    assert inner <= outer and not page.wrong
    assert page.locator('[data-app]').count() == 1 and violations(page, axe) == []
    page.close()


# in JupyterLab

TITLE = 'A lampboard, a second one, and the smallest app.'
CELLS = ['from enigma_lab.apps.base import ReverseApp\n'
         'from enigma_lab.apps.lampboard import lampboard_app', 'ReverseApp()', 'lampboard_app()',
         "board = lampboard_app('C_I-II-III_AAA_BBB_'); board",
         *[f'{n}' for n in range(8)]]

@pytest.fixture(scope='module')
def notebook(lab, browser):
    "A notebook with two lampboards and the smallest app, after Run All."
    page = browser.new_page()
    made = test_docs.notebook(('markdown', TITLE, None), *(('code', text, []) for text in CELLS))
    for cell in made['cells']: cell.pop('id')
    body = dict(type='notebook', format='json', content={**made, 'nbformat_minor': 4})
    address, key = f'{lab}api/contents/two.ipynb', dict(Authorization=f'token {TOKEN}')
    assert page.request.put(address, data=body, headers=key).ok
    page.close()
    with opened(lab, browser, 'two.ipynb', '.lampboard .key >> nth=-1') as page: yield page

def app(page, i): return page.locator('.enigma-view .lampboard').nth(i)

def typed_on(app, text):
    app.locator('.lamps').first.click()
    app.page.keyboard.type(text)

def sheets(app): return ' '.join(app.locator('article b').all_text_contents())

def state_in_python(page, expression):
    "What Python prints of an expression, in a new cell at the end."
    page.locator('.jp-Notebook .jp-Cell').last.click()
    page.keyboard.press('Escape')
    page.keyboard.press('b')
    page.keyboard.press('Enter')
    page.keyboard.type(expression)
    page.keyboard.press('Control+Enter')
    out = page.locator('.jp-Notebook .jp-Cell').last.locator('.jp-OutputArea-output')
    out.wait_for()
    return out.inner_text().strip()

def test_two_widgets_and_python_reads_the_paper(notebook):
    first, second = app(notebook, 0), app(notebook, 1)
    typed_on(first, 'attack')
    typed_on(second, 'dawn')
    assert sheets(first) == _groups(PLAIN, 'ATTACK')
    assert sheets(second) == _groups('C_I-II-III_AAA_BBB_', 'DAWN')
    notebook.wait_for_timeout(1000)
    said = state_in_python(notebook, "board.paper[0]['typed'], board.paper[0]['lit']")
    assert said == repr(('DAWN', enciphered('C_I-II-III_AAA_BBB_', 'DAWN')[0]))
    assert no_cell_failed(notebook)

def _groups(line, text):
    out = enciphered(line, text)[0]
    return ' '.join(out[i:i + 5] for i in range(0, len(out), 5))

def test_keys_stay_in_the_app(notebook):
    keys_stay(notebook, '.said')

@pytest.mark.parametrize('width', WIDTHS)
def test_it_fits_jupyterlab(notebook, width):
    notebook.set_viewport_size(dict(width=width, height=1000))
    sidebar = notebook.locator('.jp-SideBar .lm-mod-current')
    if width < 800 and sidebar.count(): sidebar.first.click() # as on any small screen
    notebook.wait_for_timeout(500)
    over = app(notebook, 0).evaluate("""app => {
        const area = app.closest('.jp-OutputArea-output')
        return [area.scrollWidth - area.clientWidth, app.scrollWidth - app.clientWidth]
    }""")
    notebook.set_viewport_size(dict(width=1400, height=1000))
    assert max(over) <= 1

def test_the_kernel_answers_and_an_error_is_words(notebook):
    field = notebook.get_by_role('textbox', name='text', exact=True)
    said = notebook.locator('.enigma-view .said:not(.quiet)')
    field.fill('مرحبا 你好 🚀 <b>')
    expect(said).to_have_text('مرحبا 你好 🚀 <b>'[::-1])
    field.fill('')
    expect(said).to_have_text("text must have a character at least, got ''")

def test_the_theme_of_jupyterlab(notebook, axe):
    first = app(notebook, 0)
    assert first.get_attribute('data-dark') is None
    for name, dark in ('JupyterLab Dark', True), ('JupyterLab Light', False):
        notebook.locator('#jp-MainMenu').get_by_text('Settings', exact=True).click()
        notebook.locator('.lm-Menu-item', has_text='Theme').first.hover()
        notebook.locator('.lm-Menu-item', has_text=re.compile(f'^{name}$')).click()
        expect(first).to_have_attribute('data-dark', '') if dark else \
            expect(first).not_to_have_attribute('data-dark', '')
        assert violations(notebook, axe) == []

def test_a_kernel_restarts_in_the_middle(notebook):
    first, field = app(notebook, 0), notebook.get_by_role('textbox', name='text', exact=True)
    first.get_by_role('textbox', name='message', exact=True).fill('not yet sent')
    field.fill('half a word')
    kept = sheets(first)
    banner = notebook.locator('.enigma-view .banner')
    expect(banner.first).to_be_hidden()
    notebook.locator('#jp-MainMenu').get_by_text('Kernel', exact=True).click()
    notebook.locator('.lm-Menu-item[data-command="kernelmenu:restart"]').click()
    expect(banner.first).to_be_visible(timeout=60_000) # a handler of `opened` says Restart
    expect(banner.first).to_contain_text('The kernel is gone: run the cell again.')
    assert sheets(first) == kept and field.input_value() == 'half a word'
    assert first.get_by_role('textbox', name='message').first.input_value() == 'not yet sent'
    typed_on(first, 'x') # goes on without its kernel
    assert len(sheets(first).replace(' ', '')) == len(kept.replace(' ', '')) + 1
    click_run_all(notebook)
    expect(field).to_have_value('', timeout=WAIT) # of the new widget
    expect(notebook.locator('.enigma-view .banner:visible')).to_have_count(0)
    field.fill('abc')
    said = notebook.locator('.enigma-view .said:not(.quiet)')
    expect(said).to_have_text('cba', timeout=WAIT) # the cells below take the kernel's time

def test_a_saved_notebook_opens_without_a_kernel(notebook, lab):
    typed_on(app(notebook, 0), 'hello')
    notebook.keyboard.press('Escape')
    notebook.locator('.jp-Notebook .jp-Cell').last.click()
    notebook.keyboard.press('Control+s')
    dirty = notebook.locator('.lm-TabBar-tab.jp-mod-dirty')
    expect(dirty).to_have_count(0)
    typed_on(app(notebook, 0), 'world')
    notebook.wait_for_timeout(1500)
    expect(dirty).to_have_count(0) # use leaves the notebook as it was saved
    end_kernels(notebook, lab)
    notebook.goto(f'{lab}lab/tree/two.ipynb?reset&token={TOKEN}')
    board = notebook.locator('[data-app=lampboard] .lampboard').first
    board.wait_for()
    typed_on(board, 'abc')
    assert len(sheets(board)) >= 3
    expect(notebook.get_by_text('model not found').locator('visible=true')).to_have_count(0)

def test_beside_the_app_a_cell_is_lost(notebook):
    "The other way round, or the test of the keys would prove nothing."
    count = notebook.locator('.jp-Notebook .jp-Cell').count()
    notebook.locator('.lampboard').first.evaluate("""app => {
        const button = document.createElement('button')
        app.closest('.jp-OutputArea').append(button)
        button.focus()
    }""")
    assert typed(notebook) != [count]*4
