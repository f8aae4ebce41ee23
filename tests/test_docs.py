"The site in a real browser, from a folder and over http; and what must stop its build."
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jsonschema
import pytest
import yaml
from bs4 import BeautifulSoup
from execnb.nbio import dict2nb
from markdown_it import MarkdownIt
from nbdev.process import NBProcessor
from nbdev.processors import _do_eval
from playwright.sync_api import sync_playwright

from enigma_lab.dev.docs import (
    READMES, build_docs, check_imports, read_modules, read_sidebar, readme_text, write_readme)
from enigma_lab.lab.runs import checkout

pytestmark = pytest.mark.proof('dev.docs', 'dev.layout') # the site is built, and a browser reads it

ROOT = checkout(Path(__file__).parent)
QUARTO = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
SIDEBAR = read_sidebar(QUARTO)
PAGES = [name for _, name in SIDEBAR]
AXE = 'axe-core@4.14.1'
WIDTHS = 1600, 1280, 800, 390


# the site and a browser

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    return build_docs(tmp_path_factory.mktemp('docs')/'site').parent

@contextmanager
def served(folder):
    "The address of a folder over http."
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
        def copyfile(self, source, outputfile):
            with suppress(ConnectionError):  # the reader went on
                super().copyfile(source, outputfile)
    handler = partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}'
        httpd.shutdown()

@pytest.fixture(scope='module')
def server(site):
    with served(site) as address: yield address

@pytest.fixture(scope='module')
def browser():
    names = 'chromium', 'chromium-browser', 'google-chrome', 'chrome'
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, names)), own)
        if not Path(path).is_file():
            pytest.fail("the docs are tested in Chromium, and none was found; "
                        "install it or set CHROMIUM to its path")
        flags = ['--no-sandbox', '--disable-gpu']
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()

@pytest.fixture(params=['file', 'http'])
def tab(request, browser, site, server):
    "A tab that may load nothing from elsewhere and report no error."
    base = site.as_uri() if request.param == 'file' else server
    page = browser.new_page(base_url=base + '/', viewport=dict(width=1500, height=1000))
    page.set_default_timeout(20_000)
    wrong = []
    def note(wrongly, text):
        if wrongly: wrong.append(text)
    own = base + '/', 'data:', 'blob:'
    page.on('request', lambda r: note(not r.url.startswith(own), f'asks for {r.url}'))
    page.on('requestfailed', lambda r: note(r.failure != 'net::ERR_ABORTED',  # the reader went on
                                            f'cannot load {r.url}: {r.failure}'))
    page.on('response', lambda r: note(r.status >= 400 and not r.url.endswith('favicon.ico'),
                                       f'{r.status} for {r.url}'))
    page.on('console', lambda m: note(
        m.type == 'error' and 'favicon' not in m.text + m.location['url'], m.text))
    page.on('pageerror', lambda e: wrong.append(str(e)))
    page.visit = lambda name: page.goto(f'{base}/{name}')
    yield page
    page.close()
    assert not wrong, wrong

def title(name):
    cells = json.loads((ROOT/'nbs'/name).read_text(encoding='utf-8'))['cells']
    texts = (''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown')
    first = next(text for text in texts if text.startswith('# '))
    return first.splitlines()[0].removeprefix('# ').replace('`', '').strip()


# the site

def test_home(tab):
    tab.visit('index.html')
    assert 'Enigma Lab' in tab.title()
    assert tab.locator('article h1').count() == 1

@pytest.mark.parametrize('tab', ['http'], indirect=True)
def test_every_page_is_in_the_sidebar(tab):
    tab.visit('index.html')
    links = tab.locator('.sidebar-tree a.reference')
    names = [name for name in PAGES if name != 'index.ipynb']
    assert [text.strip() for text in links.all_text_contents()] == [title(name) for name in names]
    for name, address in zip(names, links.evaluate_all('links => links.map(link => link.href)')):
        tab.goto(address)
        heads = tab.locator('article h1').all_inner_texts()
        assert [text.strip('¶# ') for text in heads] == [title(name)]
        assert tab.locator('article p.lead').count() == 1, name
        sources = tab.locator('div.cell_input pre').all_inner_texts()
        assert not any(text.startswith('#|') for text in sources), name
        assert 0 not in widths(tab), name

def test_math_is_drawn(tab):
    tab.visit('machine/rotor.html')
    tab.locator('mjx-container svg').first.wait_for(state='attached')
    tab.evaluate('MathJax.startup.promise')
    assert tab.locator('mjx-container svg').count() == tab.locator('.math').count() > 5
    assert tab.locator('mjx-merror, [data-mjx-error]').count() == 0

def widths(tab):
    "The natural width of every image of the page, 0 for one that did not load."
    images = '[...document.querySelectorAll("article img")]'
    tab.evaluate(f'{images}.forEach(image => {{ image.loading = "eager"; }})')
    tab.wait_for_function(f'{images}.every(image => image.complete)')
    return tab.evaluate(f'{images}.map(image => image.naturalWidth)')

def test_figures_and_outputs(tab):
    tab.visit('machine/rotor.html')
    assert widths(tab) and 0 not in widths(tab)
    assert 'solved back: [1.0, 2.0, 3.0]' in tab.locator('article').inner_text()

def test_a_card_documents_its_symbol(tab):
    tab.visit('machine/rotor.html')
    card = tab.locator('section', has=tab.get_by_role('heading', name='SteppingRotor')).last
    table = card.locator('table.docutils').first
    assert table.inner_text().split()[:3] == ['parameter', 'type', 'meaning']
    assert 'ValueError' in table.inner_text()
    assert 'stands_at(' in card.inner_text()  # a method, below
    assert 'SteppingRotor(' in card.locator('pre').first.inner_text()  # its call
    source = card.locator('.tag_exported details').last
    assert not source.locator('pre').is_visible()
    source.locator('summary').click()
    assert 'class SteppingRotor' in source.locator('pre').inner_text()
    assert '/enigma_lab/machine/rotor.py#L' in card.locator('a.source').get_attribute('href')

def test_the_source_of_a_card_is_its_definition(site):
    "A name that many modules have leads to the page's own."
    seen = Counter()
    for page in read_modules(ROOT/'nbs'):
        text = (ROOT/'nbs'/page).read_text(encoding='utf-8')
        own = {name.replace('.', '/') for name in re.findall(
            r'"#\|\s*(?:default_exp|exports?) ([\w.]+)', text)}
        html = (site/re.sub(r'(^|/)\d+_', r'\1', page)).with_suffix('.html').read_text()
        links = r'<a class="source[^>]*href="[^"]*/blob/main/enigma_lab/([^"#]+)[.]py#L(\w+)"'
        for path, line in re.findall(links, html):
            source = (ROOT/'enigma_lab'/f'{path}.py').read_text(encoding='utf-8').splitlines()
            assert path in own, (page, path)
            assert re.match(r'\s*(async )?(def|class|@)', source[int(line) - 1]), (page, path, line)
            seen[path] += 1
    assert len(seen) > 150 and seen['machine/rotor'] > 5
    links = lambda page, name: {a['href'] for a in BeautifulSoup(
        (site/page).read_text(), 'html.parser').find_all('a') if a.get_text() == name}
    assert all('lm/generate' in link for link in links('bench/lm.html', 'generate')) # as imported
    assert not links('lm/model.html', 'generate') # what transformers has
    assert links('machine/plugboard.html', 'Plugboard') | links('machine/enigma.html', 'Plugboard')

def test_a_link_between_notebooks_lands(tab):
    tab.visit('machine/plugboard.html')
    tab.locator('article p a', has_text='reversible blocks').first.click()
    tab.wait_for_url('**/machine/rev_block.html')
    assert 'Reversible block' in tab.locator('h1').inner_text()

def test_next_and_previous(tab):
    tab.visit('machine/plugboard.html')
    tab.locator('a.next-page').click()
    tab.wait_for_url('**/machine/rotor.html')
    tab.locator('a.prev-page').click()
    tab.wait_for_url('**/machine/plugboard.html')

def test_dark(tab):
    tab.visit('index.html')
    colour = lambda: tab.evaluate('getComputedStyle(document.body).backgroundColor')
    seen = {colour()}
    for _ in range(2):
        tab.locator('.theme-toggle:visible').first.click()
        seen.add(colour())
    assert len(seen) == 2

def test_a_plot_is_turned_over_by_night_and_not_on_paper(site, browser):
    def looks(page, ground, media='screen'):
        tab = browser.new_page(color_scheme=ground)
        tab.emulate_media(media=media)
        tab.goto((site/page).as_uri())
        seen = tab.locator('div.cell_output img').evaluate_all(
            'all => all.map(one => [one.alt, getComputedStyle(one).filter])')
        tab.close()
        return seen
    page = 'machine/dropout.html' # a plot, and a picture of black and white
    night = looks(page, 'dark')
    named = {any(word in alt for word in ('black', 'white')): how != 'none' for alt, how in night}
    assert named == {True: False, False: True}
    for light in (looks(page, 'light'), looks(page, 'dark', 'print')):
        assert {how for _, how in light} == {'none'}

@pytest.mark.parametrize('tab', ['http'], indirect=True)
def test_search(tab):
    tab.visit('index.html')
    tab.locator('input.sidebar-search').fill('plugboard')
    tab.keyboard.press('Enter')
    hit = tab.locator('ul.search li a[href*="machine/plugboard.html"]').first
    hit.wait_for()
    tab.wait_for_function('document.querySelector("#search-results .search-summary")'
                          '?.textContent.includes("page")')
    hit.click()
    tab.wait_for_url('**/machine/plugboard.html*')

# `_quarto.yml`, for those who have Quarto

def closed(required=(), **properties):
    return dict(type='object', properties=properties, required=[*required],
                additionalProperties=False)

FLAG, TEXT = dict(type='boolean'), dict(type='string')
CONTENTS = dict(type='array', items=dict(anyOf=[
    TEXT, closed(('section', 'contents'), section=TEXT, contents={'$ref': '#/$defs/contents'})]))
# the part that we use of Quarto's src/resources/schema/definitions.yml: base-website,
# sidebar-contents, both closed
SCHEMA = {'$defs': dict(contents=CONTENTS), **closed(
    project=closed(type=dict(enum=['default', 'website', 'book', 'manuscript'])),
    format=closed(html=closed(theme=closed(light=TEXT, dark=TEXT), toc=FLAG)),
    website=closed(title=TEXT, sidebar=closed(
        style=dict(enum=['docked', 'floating']), search=FLAG, contents={'$ref': '#/$defs/contents'},
        **{'collapse-level': dict(type='number')}), **{'page-navigation': FLAG}),
    **{'metadata-files': dict(type='array', items=TEXT)})}

def test_quarto_would_read_the_settings():
    jsonschema.validate(QUARTO, SCHEMA)
    wrong = {**QUARTO, 'website': {**QUARTO['website'], 'side-bar': {}}}
    with pytest.raises(jsonschema.ValidationError): jsonschema.validate(wrong, SCHEMA)


# what each page looks like

MEASURE = """() => {
    const page = document.documentElement, boxes = [...document.querySelectorAll('pre')];
    const clipped = boxes.filter(box => box.scrollWidth > box.clientWidth + 1);
    return [page.scrollWidth - page.clientWidth, clipped.map(box => box.textContent.slice(0, 60))];
}"""

def test_no_page_is_wider_than_the_window_and_no_code_is_cut(site, browser):
    tab, wrong = browser.new_page(viewport=dict(width=WIDTHS[0], height=900)), []
    for path in sorted(site.rglob('*.html')):
        name = path.relative_to(site).as_posix()
        if name.startswith('_static'): continue
        tab.goto(path.as_uri())
        tab.evaluate("""async () => { await window.MathJax?.startup?.promise;
            for (const part of document.querySelectorAll('details')) part.open = true; }""")
        for width in WIDTHS:
            tab.set_viewport_size(dict(width=width, height=900))
            beyond, clipped = tab.evaluate(MEASURE)
            if beyond > 0 or clipped: wrong.append((name, width, beyond, clipped))
    tab.close()
    assert not wrong

def test_the_contents_are_seen_at_1280_and_the_verdict_on_a_phone(browser, site):
    tab = browser.new_page(viewport=dict(width=1280, height=900))
    tab.goto((site/'results/claims.html').as_uri())
    box = tab.locator('.toc-drawer').bounding_box()
    assert box['x'] + box['width'] <= 1280 and tab.locator('.toc-tree').is_visible()
    for width in WIDTHS:
        tab.set_viewport_size(dict(width=width, height=900))
        for table in tab.locator('article table', has_text='verdict').all():
            last = table.locator('tr').last.locator('td').last.bounding_box()
            assert last['x'] >= 0 and last['x'] + last['width'] <= width
    tab.close()

def articles(site): # page -> the HTML of its article
    html = {path.relative_to(site).as_posix(): path.read_text(encoding='utf-8')
            for path in sorted(site.rglob('*.html'))}
    return {name: text[text.index('<article role="main"'):text.rindex('</article>')]
            for name, text in html.items() if not name.startswith(('_static', 'search'))}

def test_two_other_pages_lead_to_each_and_each_picture_is_described(site):
    leads, undescribed, found = Counter(), [], articles(site)
    for name, article in found.items():
        links, here = set(re.findall(r'href="([^"#:]+)[#"]', article)), posixpath.dirname(name)
        leads.update({posixpath.normpath(posixpath.join(here, link)) for link in links} - {name})
        for image in re.findall(r'<img [^>]*>', article):
            text = re.search(r'alt="([^"]*)"', image)
            words = re.findall(r'[\u4e00-\u9fff]|[^\s\u4e00-\u9fff]+', text[1] if text else '')
            if len(words) < 3: undescribed.append(name)
    del found['index.html'] # every page leads there, by its name in the corner
    assert {name: leads[name] for name in found if leads[name] < 2} == {}
    assert undescribed == []

@pytest.fixture(scope='session')
def axe(tmp_path_factory):
    "The script of axe-core, from npm or where `AXE_CORE` points."
    if path := os.environ.get('AXE_CORE'): return Path(path).read_text(encoding='utf-8')
    if not shutil.which('npm'): pytest.skip('axe-core comes from npm, and npm is not installed')
    home = tmp_path_factory.mktemp('axe')
    done = subprocess.run(['npm', 'install', '--no-save', '--prefix', home, AXE], cwd=home,
                          capture_output=True, text=True, timeout=120)
    if done.returncode: pytest.skip(f'npm cannot fetch {AXE}: {done.stderr[-200:]}')
    return (home/'node_modules/axe-core/axe.min.js').read_text(encoding='utf-8')

LOOKED_AT = ['index', 'guides/clusters', 'train_enigma', 'machine/rotor', 'lm/model', 'bench/lm',
             'results/claims', 'apps/lampboard', 'cli', 'lab/plot', 'search']

@pytest.mark.parametrize('ground', ['light', 'dark'])
def test_axe_finds_nothing_serious(site, browser, axe, ground):
    tab = browser.new_page(viewport=dict(width=1280, height=900), color_scheme=ground,
                           reduced_motion='reduce')
    wrong = []
    for name in LOOKED_AT:
        tab.goto((site/f'{name}.html').as_uri() + ('?q=plugboard' if name == 'search' else ''))
        tab.evaluate('document.querySelectorAll("details").forEach(part => part.open = true)')
        tab.evaluate(axe)
        found = tab.evaluate('axe.run().then(found => found.violations)')
        wrong += [(name, part['id'], part['nodes'][0]['html'][:100]) for part in found
                  if part['impact'] in ('serious', 'critical')]
    tab.close()
    assert not wrong

def test_on_paper_folded_parts_are_open_and_the_sides_are_gone(site, browser):
    tab = browser.new_page()
    tab.emulate_media(media='print')
    tab.goto((site/'machine/rotor.html').as_uri())
    assert tab.locator('.tag_exported pre').first.bounding_box()['height'] > 10
    assert not tab.locator('.sidebar-drawer').is_visible()
    tab.close()


# what a reader asks

QUESTIONS = [line.split(' -> ') for line in """\
own data -> guides/your_text
train on my own text -> guides/your_text
how do I train it on my documents? -> guides/your_text
five gpus -> guides/clusters
several machines with GPUs -> guides/clusters
resume a training that was stopped -> guides/clusters
how do I install it? -> guides/install
pip install -> guides/install
requirements -> guides/install
my own encoder -> guides/your_encoder
turn a vector back into a sentence -> guides/your_encoder
prune my model -> guides/prune
2:4 sparsity -> guides/prune
make my model reversible -> guides/reversible
train with less memory -> guides/reversible
upload to the hub -> guides/publish
share my model on Hugging Face -> guides/publish
add a component -> guides/new_component
how do I contribute -> guides/new_component
where are my results -> guides/read_a_run
read a run -> guides/read_a_run
error message -> guides/troubleshooting
something went wrong -> guides/troubleshooting
meaning of a word -> guides/glossary
bibtex -> guides/references
papers -> guides/references
MaskPro original settings -> guides/old_projects|dev/migrate_maskpro
plugboard -> machine/plugboard
how does a rotor step -> machine/rotor
SteppingRotor -> machine/rotor
sinkhorn -> machine/sinkhorn
crack the enigma -> machine/cracking
EnigmaConfig -> lm/model
fine-tune -> guides/finetune_and_chat
fine-tune with LoRA -> guides/finetune_and_chat
LoRA or all weights? -> guides/finetune_and_chat
talk to my model -> guides/finetune_and_chat|apps/chat
lora -> train_lora|lm/lora|guides/finetune_and_chat
train a diffusion model of images -> train_ddpm
train a language model -> guides/your_text|train_enigma
onnx -> lm/onnx
tokenizer -> lm/tokenizer
learning rate schedule -> lab/trainer|lab/optimizer
what is claimed and what holds -> results/claims
claims -> results/claims
chat with the model -> apps/chat
command line -> cli
watch a training -> apps/monitor|lab/monitor|guides/read_a_run
sweep -> lab/sweep
how fast does it train -> bench/throughput
leaks of test data -> data/leaks|bench/leaks
build the docs -> dev/docs
wandb -> lab/trackers|guides/read_a_run""".splitlines()]

def test_a_question_finds_its_page_among_the_first_three(site, browser):
    tab, wrong = browser.new_page(), []
    tab.goto((site/'search.html').as_uri())
    there = {page for question, pages in QUESTIONS for page in pages.split('|')
             if (site/f'{page}.html').is_file()}
    for question, pages in QUESTIONS:
        expected = there.intersection(pages.split('|'))
        found = tab.evaluate('asked => findPages(asked).map(({page}) => page.name)', question)
        if not expected: assert pages.startswith('guides/'), pages  # a guide to be written
        elif not expected.intersection(found[:3]): wrong.append((question, pages, found[:3]))
    tab.close()
    assert not wrong

def test_the_way_of_a_newcomer(tab):
    "From the front page to a guide, by the search to a training, by the sidebar to the results."
    tab.visit('index.html')
    first = next(name for around, name in SIDEBAR if around == ('Guides',))
    tab.get_by_role('link', name=title(first)).first.click()
    assert title(first) in tab.locator('h1').inner_text()
    tab.locator('input.sidebar-search').fill('train a language model')
    tab.keyboard.press('Enter')
    tab.locator('ul.search a[href*="train_enigma.html"]').first.click()
    assert title('train_enigma.ipynb') in tab.locator('h1').inner_text()
    tab.locator('.sidebar-tree summary', has_text='Results').click()
    tab.get_by_role('link', name=title('results/10_claims.ipynb'), exact=True).first.click()
    assert title('results/10_claims.ipynb') in tab.locator('h1').inner_text()

def test_sections_fold_and_open_where_the_reader_is(tab):
    tab.visit('machine/rotor.html')
    assert tab.locator('.sidebar-tree a[aria-current=page]').is_visible()
    other = tab.locator('.sidebar-tree a', has_text=title('lm/30_model.ipynb')).first
    assert not other.is_visible()
    sections = tab.locator('.sidebar-tree nav > ul > li > details > summary').all_inner_texts()
    assert sections == ['Guides', 'Ideas', 'Train', 'Results', 'Apps', 'Reference', 'Internals']

def test_benchmarks_stand_in_groups():
    groups = Counter(around for around, _ in SIDEBAR if 'Benchmarks' in around)
    assert len(groups) > 5 and max(groups.values()) < 10 and {*map(len, groups)} == {3}

def test_the_code_of_a_result_is_folded_and_a_link_opens_it(tab):
    tab.visit('bench/rotors.html')
    code = tab.locator('details.harness')
    assert code.count() == 1 and tab.locator('#how-to-reproduce').is_visible()
    assert tab.locator('#limits').is_visible()
    place = code.locator('section').last
    assert not place.is_visible()
    tab.goto(f"{tab.url}#{place.get_attribute('id')}")
    place.wait_for(state='visible')
    assert code.evaluate('part => part.open')


def tables(html): # each a list of rows of text
    words = lambda cell: ' '.join(cell.get_text().split())
    return [[[words(cell) for cell in row.find_all(['th', 'td'])] for row in table.find_all('tr')]
            for table in BeautifulSoup(html, 'html.parser').find_all('table')]

@pytest.mark.parametrize('name, page, least',
                         [('index', 'index', 3), ('results/10_claims', 'results/claims', 3)])
def test_result_tables_are_those_of_the_notebook(site, name, page, least):
    html = (site/f'{page}.html').read_text(encoding='utf-8')
    nb = json.loads((ROOT/f'nbs/{name}.ipynb').read_text(encoding='utf-8'))
    shown = [''.join(output['data']['text/markdown']) for cell in nb['cells']
             for output in cell.get('outputs', []) if 'text/markdown' in output.get('data', {})]
    kept = tables(MarkdownIt().enable('table').render('\n\n'.join(shown)))
    assert len(kept) >= least
    built = tables(html)
    for table in kept: assert table in built
    assert 'No record runs yet.' not in html

def test_the_count_of_verdicts_is_that_of_the_notebook(site):
    text = (ROOT/'nbs/results/10_claims.ipynb').read_text(encoding='utf-8')
    count = re.search(r'"(36 claims: .*?)\\n"', text)[1]
    html = (site/'results/claims.html').read_text(encoding='utf-8')
    assert count in BeautifulSoup(html, 'html.parser').get_text()


# what must stop a build, on a project of two pages

def notebook(*cells):
    made = [dict(cell_type=kind, id=f'cell{i}', metadata={}, source=text)
            for i, (kind, text, _) in enumerate(cells)]
    for cell, (kind, _, outputs) in zip(made, cells):
        if kind == 'code': cell.update(outputs=outputs, execution_count=None)
    kernel = dict(name='python3', display_name='python3', language='python')
    return dict(cells=made, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)

def write(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook(*cells)), encoding='utf-8')

STALE = [dict(output_type='stream', name='stdout', text=['an old number'])]
TABLE = '| number |\\n|---|\\n| [of the part](parts/10_part.ipynb) |'
INDEX = [
    ('markdown', '# Small\n\n> Two pages.', None),
    ('markdown', 'To the [part](parts/10_part.ipynb#One-heading). $x^2$', None),
    ('code', 'from pathlib import Path\nfrom IPython.display import Markdown', []),
    ('code', '#| exec_doc\nprint(Path("number.txt").read_text())', STALE),
    ('code', f'#| exec_doc\nMarkdown("{TABLE}")', STALE),
    ('code', """#| exec_doc
import os, sys, warnings
os.environ["LEFT"] = sys.argv[0] = warnings.left = "behind"
sys.path.append("behind"); os.chdir("nbs")""", [])]
PART = [
    ('code', """#| exec_doc
import os, sys, warnings
from pathlib import Path
behind = "behind" in [*sys.argv, *sys.path], hasattr(warnings, "left")
print("found", os.environ.get("LEFT"), *behind, Path("number.txt").read_text())""", []),
    ('markdown', '# Part\n\n> A part.', None),
    ('markdown', '## One heading\n\nBack to the [start](../index.ipynb).', None),
    ('code', 'never_run()', STALE)]

def build_site(root, pages, contents, **env):
    "Build a site of a few pages, path -> cells, by the command; return what it prints."
    shutil.copy(ROOT/'settings.ini', root)
    quarto = dict(website=dict(title='Small', sidebar=dict(contents=contents)))
    (root/'_quarto.yml').write_text(yaml.safe_dump(quarto), encoding='utf-8')
    for name, cells in pages.items(): write(root/'nbs'/name, *cells)
    (root/'nbs/_quarto.yml').symlink_to('../_quarto.yml')
    command = [sys.executable, '-m', 'enigma_lab.dev.docs']
    env = {**os.environ, 'PYTHONPATH': str(ROOT), **env}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout

def app_site(root, *names, **env):
    "Build a site with the first cells of some apps' pages; return what it prints."
    pages = {'index.ipynb': [('markdown', '# Small\n\n> Some apps.', None)]}
    for name in names:
        cells = json.loads((ROOT/'nbs/apps'/name).read_text(encoding='utf-8'))['cells'][1:4]
        pages[name] = [(cell['cell_type'], ''.join(cell['source']), []) for cell in cells]
        assert pages[name][2][1].startswith('#| exec_doc')
    return build_site(root, pages, [*pages], **env)

@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "A project of two pages, built by the command."
    root = tmp_path_factory.mktemp('small')
    (root/'number.txt').write_text('a fresh number', encoding='utf-8')
    contents = ['index.ipynb', dict(section='Parts', contents=['parts/10_part.ipynb'])]
    said = build_site(root, {'index.ipynb': INDEX, 'parts/10_part.ipynb': PART}, contents)
    assert said.strip().endswith(str(Path('_docs')/'index.html'))
    return root

def test_result_cells_run_again_and_others_do_not(small):
    index, part = ((small/'_docs'/name).read_text(encoding='utf-8')
                   for name in ('index.html', 'parts/part.html'))
    assert 'a fresh number' in index and 'an old number' not in index
    assert 'an old number' in part
    assert 'href="parts/part.html#one-heading"' in index
    # a table made by a cell, with a link
    assert re.search(r'<td>.*href="parts/part.html".*of the part', index)

def test_what_a_page_sets_is_not_seen_by_the_next(small):
    part = (small/'_docs/parts/part.html').read_text(encoding='utf-8')
    assert 'found None False False a fresh number' in part

@pytest.mark.parametrize('text', [
    'import os', 'import os\nos.getcwd()', 'import os\nx = 1', 'x = 1', '#| hide\nimport os\nx = 1',
    'def f():\n    import os\n    return os.name', '#| eval: false\nimport os\nx = 1',
    '#| exec_doc\nimport os\nx = 1', '#| export\nimport os\nx = 1', '%time import os',
    'for x in []: import os'])
def test_no_cell_passes_that_nbdev_runs_unasked(text, recwarn):
    nb = notebook(('markdown', '# Page', None), ('code', text, []))
    try: check_imports(nb, 'page.ipynb')
    except ValueError: return
    cell = NBProcessor(nb=dict2nb(nb)).nb.cells[1]
    runs = _do_eval(cell)
    assert not recwarn.list  # nbdev's, of mixed cells
    assert not runs or text == 'import os' or text.startswith(('#| exec_doc', '#| export'))

@pytest.mark.parametrize('path, cells, message', [
    ('nbs/parts/10_part.ipynb', PART + [('markdown', 'To [nowhere](20_gone.ipynb).', None)],
     '20_gone.ipynb'),
    ('nbs/parts/10_part.ipynb', PART + [('markdown', '<a href="gone.html">raw</a>', None)],
     'no file for gone.html'),
    ('nbs/parts/10_part.ipynb', [('code', '1', [])], 'must start with `# Title`'),
    ('nbs/parts/10_part.ipynb', PART + [('code', 'import os\nos.environ["A"] = "b"', [])],
     f"in cell {len(PART)} of parts/10_part.ipynb move this to a cell of its own: "
     "\"os.environ['A'] = 'b'\""),
    ('nbs/parts/10_part.ipynb', PART + [('code', '#| exec_doc\n1/0', [])], 'ZeroDivisionError'),
    ('nbs/parts/20_new.ipynb', PART, 'not in the sidebar: parts/20_new.ipynb'),
    ('nbs/index.ipynb', None, 'not in nbs/: index.ipynb'),
], ids='link raw_link title mixed failing forgotten missing'.split())
def test_a_failed_build_keeps_the_old_site(small, tmp_path, monkeypatch, path, cells, message):
    root = tmp_path/'project'
    shutil.copytree(small, root, symlinks=True)
    if cells is None: (root/path).unlink()
    else: write(root/path, *cells)
    def built(): return {p: p.read_bytes() for p in (root/'_docs').rglob('*') if p.is_file()}
    before = built()
    monkeypatch.chdir(root)
    with pytest.raises((RuntimeError, ValueError), match=re.escape(message)): build_docs()
    assert built() == before
    assert sorted(p.name for p in root.iterdir() if p.name.startswith('_docs')) == ['_docs']

def test_readme(small, monkeypatch):
    monkeypatch.chdir(small)
    text = write_readme().read_text(encoding='utf-8')
    assert '(nbs/parts/10_part.ipynb#One-heading)' in text and '#|' not in text
    assert write_readme().read_text(encoding='utf-8') == text

def test_the_readmes_are_up_to_date():
    for name, readme in READMES.items():
        page = ROOT/'nbs'/name
        text = readme_text(json.loads(page.read_text(encoding='utf-8')),
                           page.parent.relative_to(ROOT).as_posix(), page.name)
        assert (ROOT/readme).read_text(encoding='utf-8') == text, 'run `make readme`'
