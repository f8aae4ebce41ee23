"Language models in the browser: the tokenizer and the draw in Node, whole pages in Chromium."
import json
import math
import random
import re
import shutil
import subprocess
from urllib.parse import urlsplit

import pytest
import torch
from playwright.sync_api import expect
from transformers import AutoModelForCausalLM, AutoTokenizer

import test_docs
from enigma_lab.apps.complete import KNOBS, read_pieces, split_pieces
from enigma_lab.apps import masks
from enigma_lab.apps.masks import denoise, film, load_masked, row_names
from enigma_lab.apps.live import LIVE_JS, MOST, RUNTIME, add_live
from enigma_lab.lm.generate import fit_context, next_token_probs, stream, stream_reply

ROOT = test_docs.ROOT
browser = test_docs.browser
proof = pytest.mark.proof(
    'apps.live', 'apps.complete', 'apps.masks', 'apps.base', 'lm.onnx', seeds=(0,))
SHOWCASES = 'train_enigma', 'train_lora'

def checkpoint(name): return ROOT/'runs/showcase'/name/'checkpoint'


# the parts in JavaScript, in Node

def run_node(text, said):
    "Run a module after the parts of a live page; `said` is its input, and its result is JSON."
    if not shutil.which('node'): pytest.skip('the parts of a live page are run by Node')
    tail = "const said = JSON.parse(require('fs').readFileSync(0, 'utf-8'))\n"
    done = subprocess.run(['node', '-e', '\n'.join(LIVE_JS) + tail + text],
        input=json.dumps(said), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-500:]
    return json.loads(done.stdout)

ALPHABETS = [ # ranges of characters: all of Unicode, ASCII, Chinese, emoji, marks, and few but odd
    range(0x110000), range(128), range(0x4e00, 0xa000), range(0x1f300, 0x1faff),
    range(0x300, 0x370), [*map(ord, ' \t\n\r\0\x85\xa0\u2028\u200d\ufe0f\ufeff\ufffdéß𝔘🏽a')]]
WORDS = '<|user|>', '<|user|>!', '<|eos|>', '<|', '|>', '<0x41>', '__proto__', '👩‍👩‍👧‍👦', 'e\u0301'

def draw_strings(count):
    dice = random.Random(0)
    def part():
        if dice.random() < .1: return dice.choice(WORDS)
        letters = dice.choice(ALPHABETS)
        return ''.join(map(chr, dice.choices(letters, k=dice.randrange(8))))
    return [''.join(part() for _ in range(dice.randrange(5))) for _ in range(count)]

@pytest.mark.parametrize('name', SHOWCASES)
def test_the_same_tokens(name):
    "10,000 strings: as they stand, with marks that are read, and back; random tokens as well."
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(name))
    tokenizer.backend_tokenizer.add_special_tokens(['<|user|>!']) # the longest mark counts
    wild = draw_strings(10_000)
    # half a surrogate pair comes only from JavaScript; it counts as U+FFFD
    texts = [re.sub('[\ud800-\udfff]', '\ufffd', text) for text in wild]
    plain = dict(add_special_tokens=False, verbose=False)
    asis = tokenizer(texts, split_special_tokens=True, **plain).input_ids
    read = tokenizer(texts, **plain).input_ids
    dice, rows = random.Random(1), range(len(tokenizer))
    tokens = [*asis, *(dice.choices(rows, k=dice.randrange(9)) for _ in range(10_000))]
    text = """const tokenizer = makeTokenizer(said.file), { wild, tokens } = said
      console.log(JSON.stringify([wild.map(tokenizer.encode), wild.map(tokenizer.read),
        tokens.map(tokenizer.decode), wild.map(text => tokenizer.pieces(text))]))"""
    file = json.loads(tokenizer.backend_tokenizer.to_str())
    theirs = run_node(text, dict(file=file, wild=wild, tokens=tokens))
    decoded = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert theirs[:3] == [asis, read, decoded] and read != asis
    for text, pieces in zip(texts[:1000], theirs[3]):
        ours = [(p.text, list(p.tokens), p.known) for p in split_pieces(tokenizer, text)]
        theirs_too = [(re.sub('[\ud800-\udfff]', '\ufffd', p['text']), p['tokens'], p['known'])
                      for p in pieces]
        assert theirs_too == ours

def test_another_tokenizer_is_refused():
    file = json.loads((checkpoint('sgdd')/'tokenizer.json').read_text(encoding='utf-8'))
    text = """try { makeTokenizer(said) }
      catch ({ message }) { console.log(JSON.stringify(message)) }"""
    assert 'one of characters and bytes, got WordPiece' in run_node(text, file)

KNOB_SETS = [dict(temperature=0), dict(temperature=.7, top_p=.95), dict(temperature=2., top_k=5),
             dict(temperature=1., top_k=9, top_p=.5), dict(temperature=.3, top_p=.05)]

def test_the_same_chances():
    "Shaped as in Python; drawn as often as they say."
    torch.manual_seed(0)
    logits = 3*torch.randn(20, 40)
    text = """const shape = row => said.knobs.map(knobs => [...shapeChances(row, knobs)])
      const rows = said.logits.map(shape)
      const chance = makeChance(7), drawn = Array.from({ length: 20_000 }, chance)
      console.log(JSON.stringify([rows, drawn]))"""
    rows, drawn = run_node(text, dict(logits=logits.tolist(), knobs=KNOB_SETS))
    ours = torch.stack([next_token_probs(logits, **knobs) for knobs in KNOB_SETS], 1)
    assert torch.allclose(torch.tensor(rows), ours, atol=1e-6)
    counts = torch.histc(torch.tensor(drawn), 20, 0, 1)
    assert ((counts - 1000)**2).sum()/1000 < 43.8 # χ² with 19 degrees of freedom, p = .001


# a built page in Chromium, without a kernel

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "A site with two live pages and the models that come along; what its build printed."
    root = tmp_path_factory.mktemp('live')
    for name in (*SHOWCASES, 'maskpro'):
        shutil.copytree(ROOT/'runs/showcase'/name, root/'runs/showcase'/name)
    pages = '05_complete.ipynb', '10_chat.ipynb', '50_masks.ipynb'
    said = test_docs.app_site(root, *pages, ENIGMA_RUNS=str(root/'runs'))
    if 'is left out' in said: pytest.skip(said) # where npm is missing
    with test_docs.served(root/'_docs') as address: yield root/'_docs', address, said

@pytest.fixture(scope='module')
def page(site, browser):
    "The completion page after a click on its button; what it asked for, and how much came."
    _, address, said = site
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.asked, page.wrong = [], []
    page.on('request', lambda r: page.asked.append(r.url))
    page.on('pageerror', lambda e: page.wrong.append(str(e)))
    page.on('console', lambda m: m.type == 'error' and 'favicon' not in m.location['url']
        and page.wrong.append(m.text))
    page.goto(f'{address}/complete.html')
    field = page.get_by_role('textbox', name='text', exact=True)
    expect(field).not_to_be_editable()
    page.first_asked = [*page.asked]
    page.get_by_role('button', name='Run in this page').click()
    expect(field).to_be_editable(timeout=60_000)
    yield page
    page.close()

@pytest.fixture(scope='module')
def ours():
    found = checkpoint('train_enigma')
    return AutoModelForCausalLM.from_pretrained(found).eval(), AutoTokenizer.from_pretrained(found)

LOGITS = """async ids => { const engine = await enigmaLive['showcase/train_enigma']
  return (await engine.logits(ids)).map(row => [...row]) }"""

@proof
def test_the_logits_are_torchs(page, ours, site):
    "Texts of one token, of a few, and of a whole window; nothing came from elsewhere."
    model, tokenizer = ours
    apart, _ = 0, torch.manual_seed(0)
    for n in 1, 2, 7, model.config.max_len:
        ids = torch.randint(6, len(tokenizer), (n,))
        theirs = torch.tensor(page.evaluate(LOGITS, ids.tolist()))
        with torch.no_grad(): logits = model(ids[None], use_cache=False).logits[0]
        apart = max(apart, (theirs - logits).abs().max().item())
        assert (theirs.softmax(-1) - logits.softmax(-1)).abs().max() < 1e-4
    print(f'largest difference of a logit: {apart:.1e}')
    assert apart < 1e-4

@proof
def test_what_is_loaded(page, site):
    "Nothing before the click, nothing from elsewhere, and no more than the page says."
    folder, address, said = site
    assert all(url.startswith((f'{address}/', 'data:', 'blob:')) for url in page.asked)
    files = [folder/urlsplit(url).path[1:] for url in page.asked if url.startswith(address)]
    live = lambda file: file.is_relative_to(folder/'_static/live')
    sizes = {kind: sum(file.stat().st_size for file in files if live(file) == kind)
             for kind in (True, False)}
    print(f'first load: {sizes[False]/1e6:.1f} MB, after the click {sizes[True]/1e6:.1f} MB more')
    assert not any('/live/' in url for url in page.first_asked)
    assert f"live: showcase/train_enigma, {sizes[True]/1e6:.1f} MB" in said
    assert sum(sizes.values()) < MOST

def editor(page): return page.get_by_role('textbox', name='text', exact=True)

def written(page, text):
    "The text after a continuation, when it is done."
    expect(page.locator('.complete .said')).to_have_text('Written.', timeout=120_000)
    return editor(page).input_value().removeprefix(text)

def set_knobs(page, **knobs):
    details = page.locator('.complete details')
    if not details.evaluate('node => node.open'): details.locator('summary').click()
    for name, value in knobs.items():
        page.get_by_label(KNOBS[name][0], exact=True).fill(f'{value}')

@proof
def test_what_is_typed_is_measured(page, ours):
    "Each letter has Python's shade, and the letter at the caret Python's five likeliest."
    text = 'def sum_all(numbers): 你好 👋🏽 e\u0301\n    return the sum of the num'
    editor(page).fill('')
    editor(page).click()
    page.keyboard.insert_text(text[:-1])
    page.keyboard.type(text[-1])
    rows = [row for part in read_pieces(*ours, split_pieces(ours[1], text)) for row in part]
    shades = [(row[0], min(6, math.floor(row[1]/2)), row[2]) for row in rows]
    spans = page.locator('.complete .shade span')
    expect(spans).to_have_count(len(rows))
    found = spans.evaluate_all("""nodes => nodes.map(x => [x.textContent,
        Number(x.className[1]), !x.classList.contains('foreign')])""")
    assert list(map(tuple, found)) == shades
    editor(page).press('End')
    closely = page.locator('.complete .closely')
    expect(closely).to_contain_text(f'{rows[-1][0]}: {rows[-1][1]:.2f} bits of surprise')
    assert closely.locator('b').all_text_contents()[1:] == [
        label.replace(' ', '␣').replace('\n', '↵') for label, _ in rows[-1][3]]
    total = sum(row[1] for row in rows)/len(text)
    expect(page.locator('.complete')).to_contain_text(f'{total:.2f} bits per character')

@proof
@pytest.mark.parametrize('text, length', [('Return the number of values. '*8, 40), ('', 30)])
def test_the_likeliest_text_is_torchs(page, ours, text, length):
    "A text longer than the window, so that it goes on from half of it; a text from nothing."
    editor(page).fill(text)
    set_knobs(page, temperature=0, length=length)
    page.get_by_role('button', name='Continue').click()
    knobs = dict(temperature=0, top_p=.95, max_new_tokens=length)
    assert written(page, text) == ''.join(stream(*ours, text, **knobs))

@proof
def test_a_seed_writes_the_same_again(page):
    "Three ways are three texts; Stop ends a text; a knob out of its range is refused in words."
    set_knobs(page, temperature=1, length=20, seed=5)
    editor(page).fill('The ')
    page.get_by_role('button', name='Three ways').click()
    expect(page.locator('.complete .said')).to_have_text('Written.')
    ways = page.locator('.complete .ways .body').all_text_contents()
    assert len(set(ways)) == 3 and all(map(len, ways))
    page.locator('.complete .ways button').last.click()
    assert editor(page).input_value() == f'The {ways[2]}'
    editor(page).fill('The ')
    set_knobs(page, seed=7)
    page.get_by_role('button', name='Continue').click()
    assert written(page, 'The ') == ways[2]
    set_knobs(page, length=1000)
    page.get_by_role('button', name='Continue').click()
    page.get_by_role('button', name='Stop').click()
    expect(page.locator('.complete .said')).to_have_text('Stopped.')
    set_knobs(page, seed='')
    page.get_by_role('button', name='Continue').click()
    expect(page.locator('.complete .said')).to_have_text(
        'seed must be a number from 0 to 999999, got NaN')

asked = lambda *texts: [dict(role=role, content=text) for role, text in zip(
    ('user', 'assistant')*len(texts), texts)]
TALKS = [asked('What is 17 + 25?'), asked('Reverse the word lantern.', 'nretnal', '你好 <|eos|>!'),
         [dict(role='system', content='Be brief.'), *asked(*['Count to three. '*3, 'one']*5, 'Go')],
         asked('What is the capital of France? '*20)]

@proof
def test_the_chats_model_answers_as_in_torch(page, site):
    "The engine alone, as any page may use it: text in, text out."
    _, address, _ = site
    name, found = 'showcase/train_lora', checkpoint('train_lora')
    model = AutoModelForCausalLM.from_pretrained(found).eval()
    tokenizer = AutoTokenizer.from_pretrained(found)
    ask = """async ([root, name, talk]) => {
      const engine = await loadEngine(root, name), pieces = []
      for await (const piece of writeReply(engine, talk, { temperature: 0, length: 40 }))
        pieces.push(piece)
      return [fitTalk(engine, talk, 40), pieces.join('')]
    }"""
    give = "Object.assign(globalThis, { loadEngine, writeReply, fitTalk })"
    page.add_script_tag(content='\n'.join([*LIVE_JS, give]), type='module')
    page.wait_for_function('!!globalThis.writeReply')
    for talk in TALKS:
        ids, text = page.evaluate(ask, [f'{address}/_static/live/', name, talk])
        fits, _ = fit_context(tokenizer, talk, model.config.max_len, 40)
        knobs = dict(temperature=0, max_new_tokens=40)
        assert ids == fits and text == ''.join(stream_reply(model, tokenizer, talk, **knobs))

@proof
def test_the_chat_speaks_in_the_page(site, browser):
    "An example is checked, another question is answered as torch does, and an empty one is not."
    found, name = checkpoint('train_lora'), 'showcase/train_lora'
    model, tokenizer = AutoModelForCausalLM.from_pretrained(found).eval(), \
        AutoTokenizer.from_pretrained(found)
    page, wrong = browser.new_page(), []
    page.on('pageerror', lambda e: wrong.append(str(e)))
    page.goto(f'{site[1]}/chat.html')
    field = page.locator('.chat').get_by_role('textbox', name='question')
    def ask(text):
        field.fill(text)
        field.press('Enter')
        return page.locator('.chat article').last
    expect(ask('Reverse the word zebra.').or_(page.locator('.chat .wrong:visible')).last
           ).to_contain_text('has no kernel')
    page.get_by_role('button', name='Run in this page').click()
    expect(page.get_by_text('The model runs in this page now.')).to_be_visible(timeout=60_000)
    talk = []
    for text in 'Reverse the word zebra.', 'Sort the letters of piano.':
        talk.append(dict(role='user', content=text))
        said = ''.join(stream_reply(model, tokenizer, talk, temperature=0, max_new_tokens=100))
        talk.append(dict(role='assistant', content=said))
        expect(ask(text)).to_contain_text(said)
        assert name in page.locator('.chat article').last.inner_text()
    page.get_by_text('Model and knobs').click() # knobs are checked here as in Python
    page.locator('.chat').get_by_label('length (tokens)').fill('')
    field.fill('Spell cat.')
    field.press('Enter')
    expect(page.locator('.chat .wrong:visible')).to_have_text(
        'length (tokens) must be a number from 1 to 500, got NaN')
    assert field.input_value() == 'Spell cat.'
    assert wrong == []
    page.close()

@proof
def test_no_error_was_seen(page):
    assert page.wrong == []

@proof
def test_a_folder_is_no_host(site, browser):
    "Opened from a file, the page says what to do."
    page = browser.new_page()
    page.goto((site[0]/'complete.html').as_uri())
    page.get_by_role('button', name='Run in this page').click()
    expect(page.locator('.complete .offer')).to_contain_text('python -m http.server')
    page.close()

@proof
def test_without_npm_the_site_is_whole(site, tmp_path, monkeypatch):
    "The build says so, and the page offers nothing."
    folder = tmp_path/'site'
    shutil.copytree(site[0], folder, ignore=shutil.ignore_patterns('live'))
    before = {}
    for page in (folder/'complete.html', folder/'chat.html'):
        before[page] = re.sub(" data-bytes='\\d+'", '', page.read_text(encoding='utf-8'))
        page.write_text(before[page], encoding='utf-8')
    monkeypatch.setenv('ENIGMA_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    assert add_live(folder) == [f'live: showcase/{name} is left out: {RUNTIME} comes from npm, '
                                'and npm is not installed' for name in SHOWCASES]
    for page, text in before.items(): assert page.read_text(encoding='utf-8') == text
    assert not (folder/'_static/live').exists()

@proof
def test_the_masks_page_needs_no_kernel(site, browser):
    "The film that came with the page plays, and a layer opens."
    models, scheduler, _ = load_masked('showcase/maskpro')
    page, wrong = browser.new_page(reduced_motion='reduce'), []
    page.on('pageerror', lambda e: wrong.append(str(e)))
    page.goto(f'{site[1]}/masks.html')
    app = page.locator('[data-app=masks] .masks')
    app.locator('canvas[width]').wait_for()
    urls = app.locator('.film').evaluate_all("""rows => rows.map(row =>
        getComputedStyle(row.firstChild).backgroundImage.slice(5, -2))""")
    drawn = denoise({name: models[name] for name in row_names(models, {})}, scheduler,
                    *(masks.KNOBS[name] for name in ('images', 'steps', 'seed')))
    assert urls == [film(x) for x in drawn.values()]
    assert app.locator('.group').inner_text() != '' and wrong == []
    page.close()
