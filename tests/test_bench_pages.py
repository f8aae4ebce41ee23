"Small runs of benchmarks, which take too long for each test of the pages: cells marked `proof`."
import json, subprocess

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
