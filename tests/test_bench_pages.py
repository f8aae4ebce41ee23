"The order of a page of results; and small runs of benchmarks, in cells marked `proof`."
import json, re, subprocess

import pytest

from enigma_lab.lab.runs import checkout

ROOT = checkout(__file__)

def is_proof(cell):
    "Tell whether a cell is run by `make proof` alone."
    return cell['cell_type'] == 'code' and '#| proof\n' in ''.join(cell['source'])

PAGES = [p.relative_to(ROOT).as_posix() for p in sorted((ROOT/'nbs').rglob('*.ipynb'))
         if any(map(is_proof, json.loads(p.read_text(encoding='utf-8'))['cells']))]

@pytest.mark.proof('bench.ablation_sgdd', 'bench.lm', 'bench.maskpro', 'bench.memory',
                   'bench.reversible', 'bench.reversible_checks', 'bench.reversible_fit',
                   'bench.reversible_peers', 'bench.sgdd_peers',
                   'bench.timing', seeds=(0,))
@pytest.mark.parametrize('page', PAGES)
def test_the_page_with_its_small_run(page):
    done = subprocess.run(['nbdev_test', '--path', page, '--flags', 'proof'], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and 'Success.' in done.stdout, done.stderr[-3000:]

HARNESS = '## How it is measured'

def texts(page):
    "The cells of a page, and what each says."
    cells = json.loads(page.read_text(encoding='utf-8'))['cells']
    return [(cell, ''.join(cell['source'])) for cell in cells]

RESULTS = [page for page in sorted((ROOT/'nbs/bench').glob('*.ipynb'))
           if any(text.startswith(HARNESS) for _, text in texts(page))]

@pytest.mark.parametrize('page', RESULTS, ids=lambda page: page.stem)
def test_a_result_opens_with_its_answer_and_ends_with_its_code(page):
    "After the question comes what a record says; code that is exported comes after all else."
    cells = texts(page)
    shown = [(cell, text) for cell, text in cells if cell['cell_type'] == 'markdown'
             or any('text/markdown' in output.get('data', {}) for output in cell['outputs'])]
    (_, title), (answer, source) = shown[:2]
    assert title.startswith('# ') and '\n> ' in title
    assert answer['cell_type'] == 'code' and 'echo: false' in source
    assert re.match(r'#\| (exec_doc|proof)\n', source)
    said = ''.join(answer['outputs'][0]['data']['text/markdown'])
    assert re.search(r'\d', said) and not re.match('Not measured|[Nn]o record', said)
    heads = [text.splitlines()[0] for cell, text in cells if cell['cell_type'] == 'markdown']
    assert heads.index('## How to reproduce') < heads.index(HARNESS)
    before = cells[:[text.startswith(HARNESS) for _, text in cells].index(True)]
    # a function that the page shows gets a card, so none stands above
    assert not any(re.search(r'(?m)^(def|class) [^_]', text) for _, text in before)

def test_most_benchmarks_are_pages_of_results():
    assert len(RESULTS) >= 20
