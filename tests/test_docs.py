"The site in a real browser, from a folder and over http; and what must stop its build."
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from bs4 import BeautifulSoup
from execnb.nbio import dict2nb
from markdown_it import MarkdownIt
from nbdev.process import NBProcessor
from nbdev.processors import _do_eval
from playwright.sync_api import sync_playwright

from enigma_lab.dev.docs import (
    READMES, build_docs, check_imports, read_sidebar, readme_text, write_readme)
from enigma_lab.lab.runs import checkout

pytestmark = pytest.mark.proof('dev.docs') # the site is built, and a browser reads it

ROOT = checkout(Path(__file__).parent)
QUARTO = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
PAGES = [name for _, names in read_sidebar(QUARTO) for name in names]


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
    assert [text.strip() for text in links.all_inner_texts()] == [title(name) for name in names]
    for i, name in enumerate(names):
        address = links.nth(i).evaluate('link => link.href')
        links.nth(i).click()
        tab.wait_for_url(address)
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
    assert 'class SteppingRotor' in card.locator('.tag_exported').inner_text()
    assert '/enigma_lab/machine/rotor.py#L' in card.locator('a.source').get_attribute('href')

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
