"Claims: every number of the documents has its place; the table says what the records say."
import hashlib
import json
import re

import pytest
from conftest import ROOT

from enigma_lab.dev.gpu_jobs import flow_jobs, jobs, more_jobs
from enigma_lab.lab.notebooks import check_parameters
from enigma_lab.lm.model import EnigmaConfig
from enigma_lab.results import claims

LIST, PAGE = ROOT/'tests'/'numbers.tsv', ROOT/'nbs'/'results'/'10_claims.ipynb'
DOCUMENTS = ROOT.parent/'shared'/'brief'
NUMBER = re.compile(r'(?<![A-Za-z0-9_.])\d+(?:,\d{3})*(?:\.\d+)*(?:e-?\d+)?')
WORDLESS = {2, 5, 30, 32}           # claims of the documents without a number
# in words or other signs, a ratio of two numbers, the length of a list
REASONED = {6: '⁻¹', 20: '4.8', 24: 'sparsity', 29: '17', 35: 'five'}
SLOW = (13, 14, 19, 22, 24, 34)     # computed in seconds each, and tested by the page

def numbers_of(text, width=16):
    "Find the numbers of a text, each marked in the words around it."
    found = []
    for line in text.splitlines():
        line = ' '.join(line.split())
        for m in NUMBER.finditer(line):
            a, b = m.span()
            found.append(f'{line[max(0, a - width):a]}«{m[0]}»{line[b:b + width]}')
    return list(dict.fromkeys(found))

def listed():
    "Read the committed list: document → digest, and rows of document, marked words, place."
    lines = LIST.read_text(encoding='utf-8').splitlines()[1:]
    digests = dict(line.split()[1:] for line in lines if line.startswith('# 0'))
    return digests, [line.split('\t') for line in lines if not line.startswith('# 0')]

def test_every_number_is_in_a_row_or_has_a_reason():
    "And every row that has a number shares one with the documents."
    digests, rows = listed()
    assert set(digests) == {document for document, *_ in rows} and len(rows) > 900
    claimed = {}
    for document, words, place in rows:
        number, = re.findall('«(.*?)»', words)
        row = re.fullmatch(r'claim (\d+)', place)
        if row: claimed.setdefault(int(row[1]), set()).add(number)
        else: assert len(place.split()) > 1, (document, words, place)
    assert set(claimed) == set(claims.rows) - WORDLESS
    for row, (text, *_) in claims.rows.items():
        named = set(NUMBER.findall(text))
        if row in REASONED: assert REASONED[row] in text
        elif row not in WORDLESS: assert {n.rstrip('0').rstrip('.') for n in named} & {
            n.rstrip('0').rstrip('.') for n in claimed[row]}, (row, text, claimed[row])

@pytest.mark.skipif(not DOCUMENTS.is_dir(), reason='the documents are not beside this checkout')
def test_the_list_is_of_the_documents():
    digests, rows = listed()
    files = sorted(DOCUMENTS.glob('*.txt'))
    assert len(files) == len(digests)
    for name, file in zip(sorted(digests), files):
        assert hashlib.sha256(file.read_bytes()).hexdigest() == digests[name]
        found = numbers_of(file.read_text(encoding='utf-8'))
        assert found == [words for document, words, _ in rows if document == name]

def committed_table():
    "Read the table as the page shows it: number → (verdict, ours)."
    cells = json.loads(PAGE.read_text(encoding='utf-8'))['cells']
    outputs = [out.get('data', {}) for cell in cells for out in cell.get('outputs', [])]
    texts = [''.join(data.get('text/markdown', '')) for data in outputs]
    text, = (text for text in texts if text.startswith('| # | verdict |'))
    rows = [re.split(r'(?<!\\)\|', line) for line in text.splitlines()[2:]]
    return {int(r[1]): (r[2].strip(), r[4].strip().replace('\\|', '|')) for r in rows}

def test_the_page_says_what_the_records_say():
    "No number of ours is typed: the rows give the committed text again, from runs/."
    shown = committed_table()
    assert list(shown) == list(range(1, 37)) and not any('not yet' in v for v, _ in shown.values())
    for number in sorted(set(shown) - set(SLOW)):
        ours, verdict = claims.rows[number][-1]()
        assert (verdict, ours) == shown[number], number

def test_what_needs_hardware_has_a_job_that_is_ready(tmp_path):
    words = claims.READY['five'].split()
    assert words[:3] == ['enigma-lab', 'train', 'train_enigma']
    given = dict(zip(words[4::3], words[5::3]))
    check_parameters(ROOT/'nbs'/'train_enigma.ipynb', given)
    assert EnigmaConfig.preset(given['preset']).dim == 768 and given['gpus'] == '5'
    _, _, module, _, *names = claims.READY['one'].split()
    known = [*jobs(tmp_path, tmp_path, True), *more_jobs(tmp_path, tmp_path, True),
             *flow_jobs(tmp_path, True)]
    assert module == 'enigma_lab.dev.gpu_jobs' and set(names) <= {job.name for job in known}

def test_measuring_again(tmp_path, monkeypatch, capsys):
    "A benchmark that runs has a new record, one that fails its old one; the rest are links."
    new = claims.measure_again(tmp_path, {'budget': ['--small'], 'rotors': ['--no-such-option']})
    assert new == {'bench_budget'} and 'no-such-option' in capsys.readouterr().out
    assert not (tmp_path/'bench_budget').is_symlink() and (tmp_path/'bench_rotors').is_symlink()
    assert (tmp_path/'sweeps').resolve() == (ROOT/'runs'/'sweeps').resolve()
    with claims.other_runs(tmp_path):
        # a small record does not have the cases of the document
        assert claims._outcome(claims.rows[11][-1])[0] == ''
        assert claims._outcome(claims.rows[6][-1])[1] == 'holds'
    # verdicts that differ are told
    monkeypatch.setattr(claims, 'measure_again', lambda folder, again: set())
    verdicts = iter([{1: ('holds', set(), ''), 2: ('holds', set(), '')},
                     {1: ('holds', set(), ''), 2: ('undecided', {'bench_x'}, '')}])
    monkeypatch.setattr(claims, 'judge_all', lambda: next(verdicts))
    assert claims.main({}) == [2]
    assert '2 holds: now undecided' in capsys.readouterr().out
