"Exercises of the idea pages: nbdev_test runs each solution; here, that there is something to run."
import ast, json, re
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parent.parent/'nbs'
FOLD = '#| code-fold: true\n#| code-summary: Solution\n'

def exercises(page):
    "Return (kind, source) of each cell from the heading on; [] where a page has no exercises."
    cells = [(cell['cell_type'], ''.join(cell['source']))
             for cell in json.loads(page.read_text(encoding='utf-8'))['cells']]
    begins = [i for i, (_, text) in enumerate(cells) if text.startswith('## Exercises')]
    return cells[begins[0]:] if begins else []

PAGES = {path.relative_to(NBS).as_posix(): found for path in sorted(NBS.rglob('*.ipynb'))
         if (found := exercises(path))}

def calls(tree, name):
    "List the calls of a function."
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name) and node.func.id == name]

def check(cells):
    "Three times a task, a checker that refuses a wrong answer, and a folded solution that passes."
    assert [kind for kind, _ in cells] == ['markdown', 'code', 'code']*3
    for k, (task, checker, solution) in enumerate(zip(*[(text for _, text in cells)]*3), 1):
        assert re.search(rf'(?m)^\*\*{k}\. .+?\.\*\* .*\n(.*\n)*```python\ndef \w+\(', task), task
        tree = ast.parse(checker)
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)
                 and node.name.startswith('check_')]
        assert len(names) == 1 and '#|' not in checker, checker
        # it is called with a wrong answer, and the page's test fails unless it refuses that
        refused = [fail for fail in calls(tree, 'test_fail') if calls(fail, names[0])]
        assert len(refused) == 1 and 'exc=AssertionError' in ast.unparse(refused[0]), checker
        assert solution.startswith(FOLD) and '#|' not in solution[len(FOLD):], solution
        passed = [node for node in ast.parse(solution).body if isinstance(node, ast.Expr)]
        assert passed and calls(passed[-1], names[0]), solution

@pytest.mark.parametrize('page', PAGES)
def test_exercises_of_a_page(page): check(PAGES[page])

def test_every_system_has_exercises():
    assert len(PAGES) >= 12
    assert {page.split('/')[0] for page in PAGES} >= {'machine', 'lm', 'flow', 'sgdd', 'maskpro'}

def test_a_checker_that_cannot_fail_is_found():
    good = list(PAGES['machine/10_bijection.ipynb'])
    for i, old, new in ((1, 'exc=AssertionError', ''), (1, 'test_fail', 'print'),
                        (2, FOLD, ''), (2, '\ncheck_', '\n# check_'), (0, '**1. ', '**2. ')):
        bad = [*good]
        bad[i] = bad[i][0], bad[i][1].replace(old, new)
        with pytest.raises(AssertionError): check(bad)
    with pytest.raises(AssertionError): check(good[:-3])

@pytest.mark.parametrize('page', '''machine/00_history machine/52_reversible lm/10_tokenizer
    flow/10_elementwise sgdd/10_encoder ddpm/10_model maskpro/10_subsets'''.split())
def test_a_system_begins_with_a_few_plain_words(page):
    cells = json.loads((NBS/f'{page}.ipynb').read_text(encoding='utf-8'))['cells']
    text = ''.join(cells[2]['source'])
    assert text.startswith('**In short.** ') and len(text.split()) <= 120
    assert '$' not in text, 'no mathematics before the idea'
