"The chat page in a real JupyterLab, used as a person does."
import json, os, re, subprocess, sys

import pytest
from playwright.sync_api import expect

from enigma_lab.apps.chat import ChatApp, conversations, load_voices, open_conversation
from enigma_lab.lm.generate import stream_reply
from jupyter_lab import (
    WAIT, click_run_all, keys_stay, no_cell_failed, opened, set_knob)

pytestmark = pytest.mark.proof('apps.widget', 'apps.chat')

pytest_plugins = 'jupyter_lab'

WATCH = """log => {
    window.seen = []
    const every = {childList: true, subtree: true, characterData: true}
    new MutationObserver(() => window.seen.push(log.textContent)).observe(log, every)
}"""
QUICK_HAND = """log => {  // quicker than a hand: Stop is clicked as soon as the reply grows
    const stop = document.querySelector('.chat-stop')
    const begun = new MutationObserver(() => {
        if (stop.disabled || !log.querySelector('div > div > div')) return
        begun.disconnect(); stop.click(); window.clicked = true
    })
    begun.observe(log, {childList: true, subtree: true, characterData: true})
}"""
INJECTION = '<img src=x onerror="window.hacked = true"><script>window.hacked = true</script>'

@pytest.fixture(scope='module')
def chat(lab, browser):
    with opened(lab, browser, '10_chat.ipynb', '.chat-input textarea') as page:
        page.locator('.chat-log').evaluate(WATCH)
        page.get_by_text('model and knobs', exact=True).click()
        yield page

def long_seed(question, tokens):
    "A seed at which the toy says so many tokens or more."
    voice = load_voices()[0]
    asked, knobs = [dict(role='user', content=question)], dict(temperature=1., max_new_tokens=200)
    said = lambda seed: stream_reply(voice.model, voice.tokenizer, asked, seed=seed, **knobs)
    return next(seed for seed in range(100) if len(list(said(seed))) >= tokens)

def ask(page, text):
    page.evaluate('window.seen = []')
    page.locator('.chat-input textarea').fill(text)
    page.locator('.chat-input textarea').press('Enter')

def ended(page):
    expect(page.locator('.chat-stop')).to_be_disabled(timeout=WAIT)
    return page.locator('.chat-log').inner_text()

def test_a_reply_streams(chat, tmp_path, monkeypatch):
    monkeypatch.setenv('ENIGMA_RUNS', str(tmp_path)) # where no run is
    assert 'untrained toy' in chat.locator('.chat-meter').inner_text()
    knobs = dict(temperature=1, characters=200, seed=long_seed('the fox', 80))
    for name, value in knobs.items(): set_knob(chat, name, value)
    ask(chat, 'the fox')
    chat.wait_for_function('window.seen.length > 5')
    ended(chat)
    seen = chat.evaluate('window.seen')
    assert len(set(map(len, seen))) > 5 and 'the fox' in seen[-1]
    assert re.search(r'\d+ tokens/s · context \d+ of 256', chat.locator('.chat-meter').inner_text())

def test_regenerate_says_the_same(chat):
    before = ended(chat)
    chat.evaluate('window.seen = []')
    chat.locator('.chat-again').click()
    chat.wait_for_function('window.seen.length > 5')
    assert ended(chat) == before # the same seed

def test_stop_in_the_middle(chat):
    whole = stopped = ended(chat)
    for _ in range(10): # on a busy machine the toy is done before the click has arrived
        chat.evaluate('window.clicked = false')
        chat.locator('.chat-log').evaluate(QUICK_HAND)
        chat.locator('.chat-again').click()
        chat.wait_for_function('window.clicked')
        stopped = ended(chat)
        if stopped != whole: break
    assert len(stopped) < len(whole) and whole.startswith(stopped.rstrip('\ufffd \n'))

def test_shift_enter_begins_a_new_line(chat):
    area = chat.locator('.chat-input textarea')
    area.fill('one'); area.press('Shift+Enter'); area.type('two')
    assert area.input_value() == 'one\ntwo'
    area.fill('')

def test_markup_is_text_and_the_export_holds_it(chat):
    set_knob(chat, 'characters', 5)
    ask(chat, INJECTION)
    expect(chat.locator('.chat-log')).to_contain_text('<img src=x')
    ended(chat)
    assert chat.evaluate('window.hacked') is None
    assert chat.locator('.chat-log img, .chat-log script').count() == 0
    with chat.expect_download() as saved: chat.locator('.chat-export').click()
    turns = json.loads(saved.value.path().read_text(encoding='utf-8'))['turns']
    assert [turn['user'] for turn in turns] == ['the fox', INJECTION]
    assert all(turn['replies'] for turn in turns)

CONTRAST = """log => {  // of the text that is seen, against what lies behind it: WCAG 2.2, 1.4.3
    const linear = v => v <= .03928 ? v/12.92 : ((v + .055)/1.055)**2.4
    const light = c => {
        const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => linear(v/255))
        return .2126*r + .7152*g + .0722*b
    }
    const behind = e => {
        for (; e; e = e.parentElement) {
            const c = getComputedStyle(e).backgroundColor
            if (!/, 0\\)|transparent/.test(c)) return c
        }
        return 'rgb(255, 255, 255)'
    }
    const says = d => [...d.childNodes].some(n => n.nodeType == 3 && n.textContent.trim())
    const texts = [...log.querySelectorAll('div')].filter(says)
    const pair = d => [light(getComputedStyle(d).color), light(behind(d))].sort((a, b) => a - b)
    return texts.map(pair).map(([a, b]) => (b + .05)/(a + .05))
}"""

def test_narrow_light_and_dark(chat):
    log = chat.locator('.chat-log')
    shots = os.environ.get('ENIGMA_SHOTS') # a folder, for those who want to look
    change = '.lm-Menu-item[data-command="apputils:change-theme"]'
    for theme, light in (('JupyterLab Dark', 'false'), ('JupyterLab Light', 'true')):
        chat.locator('#jp-MainMenu').get_by_text('Settings', exact=True).click()
        chat.locator('.lm-Menu-item', has=chat.get_by_text('Theme', exact=True)).click()
        chat.locator(change, has=chat.get_by_text(theme, exact=True)).click()
        chat.wait_for_selector(f'body[data-jp-theme-light="{light}"]', state='attached')
        chat.set_viewport_size(dict(width=800, height=900))
        log.scroll_into_view_if_needed()
        if shots: chat.screenshot(path=f'{shots}/chat-{theme.split()[-1].lower()}.png')
        fits = log.evaluate('log => log.scrollWidth <= log.clientWidth + 1')
        assert fits, 'a long line is cut off'
        assert min(log.evaluate(CONTRAST)) > 4.5, theme
        chat.set_viewport_size(dict(width=1400, height=1000))

def test_keys_stay_in_the_chat(chat): keys_stay(chat, '.chat-meter')

def test_clear(chat):
    chat.locator('.chat-clear').click()
    expect(chat.locator('.chat-log')).not_to_contain_text('the fox')
    expect(chat.locator('.chat-meter')).to_contain_text('goes on with the last one')
    assert no_cell_failed(chat)

def test_run_again_after_clear_shows_nothing(chat):
    before = chat.locator('.enigma-app').element_handle()
    click_run_all(chat)
    before.wait_for_element_state('hidden', timeout=WAIT) # the old chat has gone from the page
    expect(chat.locator('.chat-meter')).to_contain_text('talking to', timeout=WAIT)
    assert chat.locator('.chat-log').inner_text().strip() == ''


# one conversation for each chat

FROZEN = '20261128-101500'
VISITOR = f"""
import sys
from types import SimpleNamespace
from enigma_lab.apps import chat
chat.time = SimpleNamespace(strftime=lambda form: '{FROZEN}')
app = chat.ChatApp()
print(len(app.talk.turns), flush=True)
sys.stdin.readline() # until all are here
for i in range(20):
    app.talk.ask(f'{{sys.argv[1]}} asks {{i}}')
    app.talk.reply('toy', 'x'*10_000)
print(app.name, flush=True)
sys.stdin.readline()
"""

def test_visitors_who_come_in_the_same_second(tmp_path, monkeypatch):
    monkeypatch.setenv('ENIGMA_RUNS', str(tmp_path))
    first = ChatApp()
    first.talk.ask('of somebody else')
    who = 'Ada', 'Bob', 'Eve'
    come = lambda name: subprocess.Popen(
        [sys.executable, '-c', VISITOR, name], stdin=-1, stdout=-1, text=True)
    all_ = list(map(come, who))
    try:
        empty = ['0\n']*3 # nobody sees what the first one said
        assert [visitor.stdout.readline() for visitor in all_] == empty
        for visitor in all_: print(file=visitor.stdin, flush=True)
        names = [visitor.stdout.readline().strip() for visitor in all_]
        assert set(names) == {FROZEN, f'{FROZEN}-1', f'{FROZEN}-2'}
        assert set(conversations()) == {*names, first.name}
        for name, visitor in zip(who, names):
            file = tmp_path/'chats'/f'{visitor}.json'
            turns = json.loads(file.read_text(encoding='utf-8'))['turns']
            assert [turn['user'] for turn in turns] == [f'{name} asks {i}' for i in range(20)]
            assert all(turn['replies'] == dict(toy='x'*10_000) for turn in turns)
            with pytest.raises(ValueError, match='open in another'):
                ChatApp(conversation=visitor)
    finally:
        for visitor in all_: visitor.kill(); visitor.wait()
    again = ChatApp(conversation=names[0]) # a kernel that died lets go
    assert len(again.talk.turns) == 20
    assert first.talk.turns == [dict(user='of somebody else', replies={})]

def test_an_interrupted_conversation_is_opened_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv('ENIGMA_RUNS', str(tmp_path))
    app = ChatApp()
    app.begin()
    assert not (tmp_path/'chats').exists() # nothing was said: no file
    app.talk.ask('are you there?')
    name, asked = app.name, [dict(user='are you there?', replies={})]
    for second in open_conversation, lambda name: ChatApp(conversation=name):
        with pytest.raises(ValueError, match='open in another'): second(name)
    assert app.talk.turns == asked
    app.begin()
    again = ChatApp(conversation=name)
    assert again.talk.turns == asked and 'interrupted' in again.meter.value
    assert app.talk.turns == [] and app.talk.path is None
    app.talk.ask('another thing')
    assert len(conversations()) == 2
    with pytest.raises(ValueError, match='must be one of'):
        ChatApp(conversation='19991231-235959')
