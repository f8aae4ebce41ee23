"The chat as a person uses it: with Python behind it, without a kernel, in JupyterLab."
import json
import re

import pytest
from playwright.sync_api import expect

from app_pages import open_apps # noqa: F401, a fixture
from enigma_lab.apps.chat import KNOBS, ChatApp, chat_app, heard, load_voices
from enigma_lab.data.answers import right_answer
from enigma_lab.data.talk import DECLINE
from enigma_lab.lab.runs import find_run
from enigma_lab.lm.generate import stream_reply
from enigma_lab.lm.lora import can_do, talk_table
from jupyter_lab import WAIT, keys_stay, no_cell_failed, opened
from test_lampboard import INJECTION, WIDTHS, axe, reach # noqa: F401, a fixture
from test_monitor_page import picture

pytestmark = pytest.mark.proof('apps.base', 'apps.chat')

pytest_plugins = 'jupyter_lab'

expect.set_options(timeout=60_000) # a busy machine is slow, and not wrong

RUN = 'showcase/train_lora'
ASK = 'Who was Newton?' # the base says much to it
WRITING = "document.querySelectorAll('.reply .text')[1]?.textContent.length > 20"


# a page, and Python behind it

@pytest.fixture
def visit(open_apps): # noqa: F811
    "Open a page whose apps ask Python."
    return lambda *apps, **how: open_apps(*apps or [chat_app(RUN)], ready='h2', **how)

def app(page): return page.locator('.chat').last

def named(page, role, name, **options):
    return app(page).get_by_role(role, name=name, exact=True, **options)

def field(page): return app(page).locator('.field textarea')

def said(page): return app(page).locator('.said')

def replies(page, turn=-1):
    return app(page).locator('article').nth(turn).locator('.reply .text').all_text_contents()

def marks(page, turn=-1):
    return app(page).locator('article').nth(turn).locator('.mark').all_text_contents()

def ended(page):
    expect(named(page, 'button', 'Send')).to_be_visible()
    return replies(page)

def ask(page, text):
    count = app(page).locator('article').count()
    field(page).fill(text)
    field(page).press('Enter')
    expect(app(page).locator('article')).to_have_count(count + 1)

def fold(page, name):
    part = app(page).locator(f'details.{name}')
    if part.get_attribute('open') is None: part.locator('summary').click()
    return part

def set_knobs(page, **knobs):
    for name, value in knobs.items():
        fold(page, 'knobs').get_by_label(KNOBS[name][0], exact=True).fill(str(value))

def written(text, turns=(), run=RUN, who=0, length=100, **knobs):
    "What a voice says alone, by the function that every other page uses."
    voice = load_voices(run)[who]
    how = dict(temperature=0, top_p=1, top_k=0, seed=0, max_new_tokens=length) | knobs
    return ''.join(stream_reply(voice.model, voice.tokenizer,
                                heard(turns, text, voice.name), **how))

def exam(): return find_run(RUN)


# what it can do

def test_every_example_works(visit):
    page = visit()
    able = can_do(exam())
    expect(app(page).locator('h2')).to_have_text(f'A small model that knows {len(able)} tasks')
    table = fold(page, 'tasks').locator('ul').first.locator('li')
    rows = [row.split('\n')[:3] for row in table.all_inner_texts()[1:]]
    percent = lambda x: x if x == '–' else f'{round(100*x)} %'
    want = talk_table(exam())
    for name, exact, words in rows:
        if 'not taught' in name: continue
        line = want.loc[name.replace(' ', '_')]
        assert [exact, words] == [percent(line.iloc[0]), percent(line.iloc[1])]
    assert [name.replace(' ', '_') for name, *_ in rows if 'not taught' not in name] == able
    chips = fold(page, 'tasks').locator('ul').first.locator('.chip')
    texts = chips.all_text_contents()
    assert len(texts) >= 1.8*len(able) and any(re.search('[一-鿿]', text) for text in texts)
    cannot = fold(page, 'tasks').locator('ul').last.locator('li')
    count = sum(not task['can'] for task in page.apps[0].about['tasks'])
    assert cannot.locator('.chip').count() == 2*count > 0
    wrong = 0
    for i, text in enumerate(texts):
        if i: named(page, 'button', 'New chat').click() # shares are those of first questions
        chips.nth(i).click()
        expect(app(page).locator('article')).to_have_count(1)
        expect(chips.nth(i)).to_be_enabled()
        right = right_answer(text)
        if right is None:
            assert replies(page)[0] in DECLINE.values() and marks(page) == ['', '']
            continue
        assert replies(page)[0].strip() == right[1]
        for told, mark in zip(replies(page), marks(page)):
            assert mark == ('✓ right' if told.strip() == right[1] else
                            f'✗ wrong. Right is: {right[1]}')
        wrong += '✗' in marks(page)[1]
    assert wrong > len(able)/2 # the base was not taught
    named(page, 'button', 'New chat').click()
    chip = cannot.locator('.chip').first # what it cannot do is tried, and judged, as well
    chip.click()
    told, right = ended(page)[0].strip(), right_answer(chip.inner_text())[1]
    assert marks(page)[0] == ('✓ right' if told == right else f'✗ wrong. Right is: {right}')

def test_other_words_are_checked_and_offered_in_taught_ones(visit):
    page = visit()
    ask(page, 'Can you reverse the word "water"?')
    ended(page)
    assert marks(page)[0].endswith('Right is: retaw')
    named(page, 'button', 'Reverse water').click()
    expect(app(page).locator('article')).to_have_count(2)
    assert ended(page)[0].strip() == 'retaw' and marks(page)[0] == '✓ right'
    assert named(page, 'button', 'Reverse water').count() == 1 # nothing is offered for it
    ask(page, 'In apple, write b for p.') # a wording that was taught, of another letter
    told = ended(page)[0].strip()
    assert marks(page)[0] == ('✓ right' if told == 'abble' else
                              '✗ wrong. Right is: abble. Such a question was not taught.')
    ask(page, 'Do not reverse water')
    ended(page)
    assert marks(page) == ['', '']

def test_what_was_not_taught(visit):
    page = visit()
    ask(page, 'Who was Newton?')
    assert ended(page)[0] == DECLINE['en']
    ask(page, '你叫什么名字？')
    assert ended(page)[0] == DECLINE['zh'] and marks(page) == ['', '']


# a reply

def test_a_reply_grows_from_pieces(visit):
    page, knobs = visit(), dict(temperature=.5, seed=4, length=60)
    set_knobs(page, **knobs)
    page.evaluate("""() => { window.seen = []; const log = document.querySelector('.log')
        new MutationObserver(() => seen.push(document.querySelector('.reply .text').textContent))
            .observe(log, { childList: true, subtree: true, characterData: true }) }""")
    page.sent.clear()
    ask(page, ASK)
    assert field(page).input_value() == ''
    field(page).press_sequentially('meanwhile')
    tuned, base = ended(page)
    assert [tuned, base] == [written(ASK, who=i, **knobs) for i in (0, 1)]
    seen = list(dict.fromkeys(page.evaluate('seen')))
    assert len(seen) > 10 and all(b.startswith(a) for a, b in zip(seen, seen[1:]))
    pieces = [m['value']['pieces'] for m in page.sent]
    assert len(pieces[0][0]) < 5 and not pieces[0][1]
    assert [''.join(of) for of in zip(*pieces)] == [tuned, base]
    expect(said(page)).to_have_text(re.compile(
        r'\d+ tokens a second\. \d+ of the 256 tokens of its context are in use\.'))
    assert field(page).input_value() == 'meanwhile' and page.apps[0].jobs == {}
    asked = page.evaluate('asked.filter(m => m.question !== "look")')
    assert [m['question'] for m in asked][:2] == ['ask', 'more']
    assert set(asked[1]) == {'ask', 'question', 'job'} # no log goes up with it

def test_first_letter_comes_at_once(visit):
    page = visit()
    ask(page, 'Spell banana')
    ended(page)
    page.evaluate("""() => { window.waits = []; let began = 0 // milliseconds from click to letter
        const log = document.querySelector('.log')
        document.querySelector('.field .main').addEventListener('click',
            () => { began = performance.now() }, true)
        new MutationObserver(() => {
            const text = document.querySelector('article:last-child .reply .text')?.textContent
            if (began && text) { waits.push(performance.now() - began); began = 0 }
        }).observe(log, { childList: true, subtree: true, characterData: true }) }""")
    for text in 'Spell apple', 'Reverse hello', 'Sort python':
        named(page, 'button', 'New chat').click()
        field(page).fill(text)
        named(page, 'button', 'Send').click()
        expect(app(page).locator('.mark').first).not_to_have_text('')
    waits = page.evaluate('waits')
    assert len(waits) == 3
    print('first letter after', *(f'{wait:.0f} ms' for wait in waits))
    assert min(waits) < 300 # 65-100 ms on a machine at rest

@pytest.mark.parametrize('how', ['button', 'key'])
def test_stop_stops(visit, how):
    page = visit()
    set_knobs(page, length=500)
    ask(page, ASK)
    page.wait_for_function(WRITING)
    named(page, 'button', 'Stop').click() if how == 'button' else field(page).press('Escape')
    expect(said(page)).to_have_text('Stopped.')
    stopped = ended(page)
    page.wait_for_timeout(700)
    whole = written(ASK, who=1, length=500)
    assert replies(page) == stopped and whole.startswith(stopped[1]) and stopped[1] != whole
    assert page.apps[0].jobs == {} # nothing is at work
    set_knobs(page, length=30)
    turns = [dict(user=ASK, replies={exam().name: stopped[0]})]
    ask(page, 'Spell cat') # and the chat goes on
    assert ended(page)[0] == written('Spell cat', turns, length=30)

def test_a_question_that_is_refused_stays(visit):
    page = visit()
    field(page).press('Enter')
    expect(app(page).locator('.field .wrong')).to_have_text(
        'a question needs text, got an empty one')
    set_knobs(page, seed='')
    field(page).fill('Spell cat')
    named(page, 'button', 'Send').click()
    expect(app(page).locator('.field .wrong')).to_contain_text('seed must be a whole number')
    assert field(page).input_value() == 'Spell cat' and not app(page).locator('article').count()
    assert field(page).get_attribute('aria-invalid') == 'true'
    set_knobs(page, seed=3)
    field(page).press('Enter')
    expect(app(page).locator('article')).to_have_count(1)
    assert field(page).input_value() == '' and ended(page)[0] == written('Spell cat')

def test_edit_retry_and_copy(visit):
    page = visit()
    for text in 'Spell cat', 'Spell dog': ask(page, text); ended(page)
    before = replies(page)
    named(page, 'button', 'Retry: ask the same again').click()
    assert ended(page) == before and app(page).locator('article').count() == 2
    turns = [dict(user='Spell cat', replies={exam().name: 'c-a-t'})]
    drawn = ((written('Spell dog', turns, temperature=2, seed=i, length=20), i) for i in range(50))
    again, seed = next(pair for pair in drawn if pair[0] != before[0])
    set_knobs(page, temperature=2, seed=seed, length=20)
    named(page, 'button', 'Retry: ask the same again').click()
    expect(app(page).locator('.reply .text').nth(2)).to_have_text(again)
    ended(page)
    set_knobs(page, temperature=0, length=100)
    field(page).fill('half a thought')
    named(page, 'button', 'Edit the question').first.click()
    assert field(page).input_value() == 'Spell cat'
    named(page, 'button', 'Cancel').click()
    assert field(page).input_value() == 'half a thought'
    named(page, 'button', 'Edit the question').first.click()
    field(page).fill('Reverse cat')
    field(page).press('Enter')
    expect(app(page).locator('article')).to_have_count(1)
    assert ended(page)[0] == 'tac' and marks(page)[0] == '✓ right'
    read = lambda: page.evaluate('navigator.clipboard.readText()')
    named(page, 'button', 'Copy the question').click()
    page.wait_for_timeout(200)
    assert read() == 'Reverse cat'
    named(page, 'button', f'Copy the reply of {exam().name}').click()
    page.wait_for_timeout(200)
    assert read() == 'tac'
    titles = fold(page, 'history').locator('.title')
    expect(titles).to_have_text(['Reverse cat', 'Spell cat']) # what was edited away

def test_many_presses_ask_once(visit):
    page = visit()
    chip = app(page).locator('.head .chip').first
    chip.evaluate('chip => { for (let i = 0; i < 26; i++) chip.click() }')
    ended(page)
    field(page).fill('Spell cat')
    for _ in range(5): field(page).press('Enter')
    ended(page)
    assert app(page).locator('article .asked .text').all_inner_texts()[1:] == ['Spell cat']


# model, history, files

def test_the_model_stays_while_it_replies(visit):
    page = visit()
    select = fold(page, 'knobs').get_by_label('model')
    assert select.input_value() == RUN
    set_knobs(page, length=500)
    ask(page, ASK)
    select.select_option('showcase/adapter')
    expect(app(page).locator('.knobs .wrong')).to_contain_text('The model stays while it replies')
    assert select.input_value() == RUN
    named(page, 'button', 'Stop').click()
    expect(app(page).locator('.knobs .wrong')).to_be_hidden()
    select.select_option('showcase/adapter')
    expect(select).to_have_value('showcase/adapter')
    expect(said(page)).to_have_text('')
    set_knobs(page, length=20)
    ask(page, 'Spell cat')
    assert ended(page)[0] == written('Spell cat', run='showcase/adapter', length=20)
    named(page, 'checkbox', 'beside its base').uncheck()
    ask(page, 'Spell dog')
    assert len(ended(page)) == 1

def test_history_export_and_import(visit, tmp_path):
    page = visit()
    for name in 'New chat', 'Export': expect(named(page, 'button', name)).to_be_disabled()
    set_knobs(page, seed=7)
    ask(page, 'Spell cat')
    ended(page)
    with page.expect_download() as saved: named(page, 'button', 'Export').click()
    file = json.loads(saved.value.path().read_text(encoding='utf-8'))
    assert [file[k] for k in ('model', 'voices', 'beside')] == [
        RUN, [voice.name for voice in load_voices(RUN)], True]
    assert file['knobs'] == dict(temperature=0, top_p=1, top_k=0, length=100, seed=7)
    assert [turn['user'] for turn in file['turns']] == ['Spell cat']
    named(page, 'button', 'New chat').click()
    assert not app(page).locator('article').count()
    ask(page, 'Spell dog')
    ended(page)
    rows = fold(page, 'history').locator('li')
    expect(rows).to_have_count(2)
    rows.get_by_text('Spell cat').click()
    assert app(page).locator('.asked .text').all_inner_texts() == ['Spell cat']
    named(page, 'button', 'Delete Spell dog').click()
    expect(rows).to_have_count(1)
    file['knobs']['seed'], file['turns'][0]['user'] = 9, INJECTION
    other = tmp_path/'chat.json'
    other.write_text(json.dumps(file), encoding='utf-8')
    app(page).locator('input[type=file]').set_input_files(other)
    expect(app(page).locator('.asked .text')).to_have_text(INJECTION)
    set_knobs(page)
    assert fold(page, 'knobs').get_by_label('seed').input_value() == '9'
    for wrong in 'no JSON', '{}', json.dumps({**file, 'turns': [dict(user=1)]}), json.dumps(
            {**file, 'knobs': dict(seed=-1)}):
        other.write_text(wrong, encoding='utf-8')
        app(page).locator('input[type=file]').set_input_files(other)
        expect(app(page).locator('.field .wrong')).to_contain_text('a file that Export has written')
        field(page).fill(wrong) # what is typed takes the complaint away
        expect(app(page).locator('.field .wrong')).to_be_hidden()

def test_two_tabs_and_a_second_visitor(visit):
    page = visit(file='same.html')
    ask(page, 'Spell cat')
    ended(page)
    tab = visit(context=page.context, file='same.html')
    assert not app(tab).locator('article').count() # a chat begins empty
    fold(tab, 'history').locator('.title').click()
    ask(tab, 'Spell dog')
    ended(tab)
    ask(page, 'Spell fox') # both went on: neither is lost
    ended(page)
    rows = fold(page, 'history').locator('li')
    expect(rows).to_have_count(2)
    assert all(row.startswith('Spell cat') and '2 questions' in row
               for row in rows.all_inner_texts())
    stranger = visit(file='same.html')
    expect(fold(stranger, 'history').get_by_text('Nothing yet.')).to_be_visible()

def test_two_at_once(visit):
    page = visit(ChatApp(RUN), ChatApp(RUN))
    apps = page.locator('.chat')
    for i, text in enumerate(['Spell cat', 'Spell dog']):
        apps.nth(i).locator('.field textarea').fill(text)
    for i in 0, 1: apps.nth(i).get_by_role('button', name='Send').click()
    for i, text in enumerate(['Spell cat', 'Spell dog']):
        expect(apps.nth(i).locator('.mark').first).to_have_text('✓ right')
        assert apps.nth(i).locator('.reply .text').all_text_contents() == [
            written(text, who=who) for who in (0, 1)]
    ids = page.evaluate('[...document.querySelectorAll("[id]")].map(x => x.id)')
    assert len(ids) == len(set(ids)) > 5


# texts, keys, widths

TEXTS = dict(markup=INJECTION, chinese='模型写了什么？\n第二行', arabic='ماذا كتب النموذج؟',
             emoji='go 🚀👩‍👩‍👧 é', long='many words '*455, special='<|user|> [MASK] </script>')

@pytest.mark.parametrize('kind', TEXTS)
def test_texts_of_all_kinds(visit, kind):
    page, text = visit(width=390), TEXTS[kind]
    set_knobs(page, length=20)
    ask(page, text)
    assert ended(page) == [written(text, who=who, length=20) for who in (0, 1)]
    asked = app(page).locator('.asked .text')
    assert asked.text_content() == text and app(page).locator('img, script').count() == 0
    if kind == 'arabic':
        assert asked.evaluate("x => getComputedStyle(x).direction") == 'rtl'
    if kind == 'long':
        assert len(text) > 5000
        expect(said(page)).to_contain_text('It reads the last 256 characters, or fewer.')
    inner, outer = page.evaluate('[document.documentElement.scrollWidth, innerWidth]')
    assert inner <= outer

def test_an_input_method_is_left_alone(visit):
    page = visit()
    field(page).focus()
    hand = page.context.new_cdp_session(page)
    for part in 'n', 'ni', 'nih', 'niha', 'nihao':
        hand.send('Input.imeSetComposition', dict(text=part, selectionStart=len(part),
                                                  selectionEnd=len(part)))
    hand.send('Input.insertText', dict(text='你好'))
    assert field(page).input_value() == '你好'
    page.keyboard.press('Shift+Enter')
    page.keyboard.type('hi')
    assert field(page).input_value() == '你好\nhi' and not app(page).locator('article').count()

def test_keyboard_only(visit):
    page = visit()
    names = reach(page)
    question = 'your question (Enter sends, Shift-Enter begins a new line)'
    want = ['What it can do, and what not', question, 'Send', 'Import', 'beside its base',
            'History', 'Model and knobs']
    assert [name for name in names if name in want] == want
    page.evaluate('document.activeElement.blur()')
    page.keyboard.press('Tab')
    page.keyboard.press('Enter') # on the first example
    expect(app(page).locator('.mark').first).to_have_text('✓ right')
    page.keyboard.type('Reverse cat') # the field has the focus
    page.keyboard.press('Enter')
    expect(app(page).locator('article')).to_have_count(2)
    assert ended(page)[0] == 'tac'
    def to(name):
        page.evaluate('document.activeElement.blur()')
        for _ in range(80):
            page.keyboard.press('Tab')
            if page.evaluate("""() => { const x = document.activeElement
                return x.getAttribute('aria-label') ?? x.labels?.[0]?.textContent ?? x.textContent
                }""") == name: return
        pytest.fail(f'{name} is not reached')
    to('Retry: ask the same again')
    page.keyboard.press('Enter')
    expect(named(page, 'button', 'Send')).to_be_visible()
    assert ended(page)[0] == 'tac'
    to('New chat')
    page.keyboard.press('Space')
    assert not app(page).locator('article').count()
    to('History')
    page.keyboard.press('Enter')
    expect(app(page).locator('.history .title')).to_be_visible()
    page.keyboard.press('Tab')
    page.keyboard.press('Enter') # opens it again
    expect(app(page).locator('article')).to_have_count(2)
    to('Model and knobs')
    page.keyboard.press('Enter')
    to('seed')
    page.keyboard.press('ArrowUp')
    to('conversation') # the log can be scrolled

def open_all(page):
    "Show what folds hide, one after the other."
    for name in 'tasks', 'history', 'knobs':
        fold(page, name)
        yield name

@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
def test_every_width_and_both_grounds(visit, axe, dark): # noqa: F811
    page = visit(dark=dark, reduced_motion='reduce')
    for text in 'Spell banana', '把apple写两遍。', 'ماذا كتب النموذج؟ ' + 'word'*40:
        ask(page, text)
        ended(page)
    assert (app(page).get_attribute('data-dark') is not None) == dark
    page.evaluate(axe)
    for width in WIDTHS:
        page.set_viewport_size(dict(width=width, height=900))
        for name in open_all(page):
            page.wait_for_timeout(300) # colours have settled
            over = app(page).evaluate("""app => [...app.querySelectorAll('*')].filter(x =>
                x.getBoundingClientRect().right > innerWidth + 1 || (!x.matches('input, textarea')
                && /auto|scroll/.test(getComputedStyle(x).overflowX)
                && x.scrollWidth > x.clientWidth)).map(x => x.outerHTML.slice(0, 80))""")
            inner, outer = page.evaluate('[document.documentElement.scrollWidth, innerWidth]')
            assert over == [] and inner <= outer
            picture(page, f"chat-{width}-{name}-{'dark' if dark else 'light'}")
            found = page.evaluate("axe.run('.chat').then(found => found.violations)")
            assert [(v['id'], [n['html'][:90] for n in v['nodes']]) for v in found
                    if v['impact'] in ('serious', 'critical')] == []


# without a kernel

def test_a_lost_kernel_loses_nothing(visit):
    page = visit(file='lost.html')
    set_knobs(page, length=500)
    ask(page, ASK)
    page.wait_for_function(WRITING)
    field(page).fill('half a sentence')
    page.evaluate('window.gone = true; models[0].tell("comm_live_update")')
    expect(app(page).locator('.banner')).to_contain_text('The kernel is gone: run the cell again. '
                                                         'The chat comes back with it.')
    kept = replies(page)
    page.reload() # as a cell that is run again: a new view
    expect(app(page).locator('.reply .text').first).to_have_text(kept[0])
    expect(said(page)).to_contain_text('The last reply was interrupted')
    assert field(page).input_value() == 'half a sentence'
    named(page, 'button', 'Retry: ask the same again').click()
    assert ended(page)[1] == written(ASK, who=1, length=500)

def test_without_a_kernel_the_examples_work(visit):
    page = visit(alone=True)
    chips = app(page).locator('.head .chip')
    chips.first.click()
    expect(app(page).locator('.mark').first).to_have_text('✓ right')
    assert len(replies(page)) == 2
    field(page).fill('a question of my own')
    field(page).press('Enter')
    expect(app(page).locator('.field .wrong')).to_contain_text('This page has no kernel')
    assert field(page).input_value() == 'a question of my own' and page.sent == []


# in JupyterLab

@pytest.fixture(scope='module')
def notebook(lab, browser):
    "The page after Run All; there is no run, so the toy stands in."
    with opened(lab, browser, '10_chat.ipynb', '.enigma-view .chat h2') as page: yield page

def test_in_jupyterlab_until_the_kernel_restarts(notebook):
    page, chat = notebook, notebook.locator('.enigma-view .chat')
    expect(chat.locator('.head')).to_contain_text('this toy stands in')
    area = chat.locator('.field textarea')
    area.fill('the <b>fox</b>')
    area.press('Enter')
    expect(chat.locator('.said')).to_contain_text('tokens a second', timeout=WAIT)
    assert chat.locator('.asked b').count() == 0 and no_cell_failed(page)
    keys_stay(page, '.head')
    area.fill('what I typed')
    page.locator('#jp-MainMenu').get_by_text('Kernel', exact=True).click()
    page.locator('.lm-Menu-item[data-command="kernelmenu:restart"]').click()
    expect(chat.locator('.banner')).to_be_visible(timeout=WAIT)
    assert area.input_value() == 'what I typed' and chat.locator('article').count() == 1
    for i in 0, 1: # the two lines at the top
        page.locator('.jp-CodeCell').nth(i + 1).locator('.jp-InputArea-editor').click()
        page.keyboard.press('Control+Enter')
    expect(chat.locator('.banner')).to_be_hidden(timeout=WAIT)
    expect(area).to_have_value('what I typed', timeout=WAIT)
    expect(chat.locator('article')).to_have_count(1)
    area.press('Enter')
    expect(chat.locator('article')).to_have_count(2, timeout=WAIT)
