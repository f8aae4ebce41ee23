"""The guides, as a reader types them: each command parses, and each runs at a small size.

A command is a line of a fence that begins with ```sh. What needs more than two cores says so behind
it, as in `# needs 5 GPUs`; it is run with two processes in their place, or counted in `NOT_RUN`.
"""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from configparser import ConfigParser

import pytest
import yaml

from enigma_lab.cli import COMMANDS, command_line, find_notebook, read_settings
from enigma_lab.dev.lists import find_messages, find_papers, read_bib
from enigma_lab.lab.notebooks import check_parameters
from enigma_lab.lab.runs import checkout

ROOT = checkout(__file__)
SIDEBAR = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']
GUIDES, = [item['contents'] for item in SIDEBAR['contents']
           if isinstance(item, dict) and item['section'] == 'Guides']
NOT_RUN = { # what a command needs -> how many do
    'the network': 8, 'two machines': 2, 'Slurm': 1, 'a person who ends it': 4, 'a minute': 2}
RUN_OTHERWISE = {'', '5 GPUs', 'a clone'}
SMALL = [ # what a guide says -> what is run here
    (r' minutes=\d+', ''), (r'\bgpus=5', 'processes=2'),
    (r'--nproc_per_node 5', '--nproc_per_node 2'),
    (r'launch --config_file \S+', 'launch --cpu'), (r'--finetune 400', '--finetune 2'),
    (r'(train_\w+ (?!.*preset).*=.*|lm\.train .*)', r'\1 preset=smoke'),
    (r'(train_enigma .*=.*)', r'\1 max_len=64'), # a question and its answer fit
    (r'(train_sgdd .*=.*)', r'\1 loop=False test_sentences=8 max_steps=4'),
    (r'sgdd read - "a cat ran" .*', 'sgdd read - "a cat ran"')]

def markdown(page):
    "The text of a page."
    cells = json.loads((ROOT/'nbs'/page).read_text(encoding='utf-8'))['cells']
    return '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')

def fences(page, language): return re.findall(rf'(?ms)^```{language}\n(.*?)^```', markdown(page))

def commands(page):
    "The commands of a page, each with what it needs ('' for nothing)."
    lines = ''.join(fences(page, 'sh')).splitlines()
    return [line.partition('  # needs ')[::2] for line in lines]

def links(page): return {link.removeprefix('./') for link in re.findall(
    r'\]\(([^)#:]+\.ipynb)', markdown(page)) if '/' not in link}

@pytest.mark.quick
def test_what_is_not_run_is_listed():
    needs = Counter(need for page in GUIDES for _, need in commands(page))
    assert {need: n for need, n in needs.items() if need not in RUN_OTHERWISE} == NOT_RUN
    assert needs[''] > 35

@pytest.mark.quick
@pytest.mark.parametrize('page', GUIDES)
def test_every_command_parses(page):
    "Commands, options and names of settings are there."
    for command, _ in commands(page):
        words = shlex.split(command)
        if words[0] == 'enigma-lab' and '--help' not in words:
            given = vars(command_line().parse_args(words[1:]))
            if given['command'] != 'train': continue
            notebook, settings = find_notebook(given['notebook']), given['settings']
        elif 'enigma_lab.lm.train' in words:
            notebook = find_notebook('train_enigma')
            settings = words[words.index('enigma_lab.lm.train') + 1:]
        else: continue
        check_parameters(notebook, read_settings(notebook, settings))

@pytest.mark.quick
def test_each_guide_helps_and_leads_on():
    "A way out where a command fails, and two links from any guide to any other."
    for page in GUIDES:
        here = links(page)
        near = here.union(*(links(f'guides/{name}') for name in here))
        assert {f'guides/{name}' for name in near} >= {*GUIDES} - {page}, page
        if commands(page): assert '## If it fails' in markdown(page), page

@pytest.mark.quick
def test_the_installation_names_what_there_is():
    settings = ConfigParser(delimiters=['='])
    settings.read(ROOT/'settings.ini', encoding='utf-8')
    extras = {key.removesuffix('_requirements') for key in settings['DEFAULT']
              if key.endswith('_requirements')} | {'all'}
    text = markdown('guides/install.ipynb')
    rows = re.findall(r'(?m)^\| (`.*?) \|', text)
    assert {name for row in rows for name in re.findall(r'`(\w+)`', row)} == extras
    assert settings['DEFAULT']['git_url'] in text
    assert f"Python {settings['DEFAULT']['min_python']}" in text

# the lists

@pytest.mark.quick
def test_the_glossary_leads_where_its_words_are():
    "Each term stands in its order, and on the page that it names."
    entries = re.findall(r'(?m)^\*\*(.+?)\*\*: .*\]\(\.\./(.+?)\)',
                         markdown('guides/glossary.ipynb'))
    terms = [term.lower() for term, _ in entries]
    assert len(terms) > 50 and terms == sorted(terms)
    lost = [(term, page) for term, page in entries if term.lower() not in
            (ROOT/'nbs'/page).read_text(encoding='utf-8').lower()]
    assert not lost

@pytest.mark.quick
def test_the_references_are_those_of_the_pages():
    "Neither a paper without a title nor a title without a page."
    known = read_bib((ROOT/'nbs'/'guides'/'references.bib').read_text(encoding='utf-8'))
    assert {*known} == {*find_papers(ROOT/'nbs')}
    keys = [paper['key'] for paper in known.values()]
    assert len({*keys}) == len(keys) and all(
        paper['title'] and paper['author'] and re.fullmatch(r'20[0-2]\d', paper['year'])
        for paper in known.values())

@pytest.mark.quick
def test_cures_name_what_exists():
    "A command in a message is one of ours, and a message is said once."
    messages = find_messages(ROOT/'enigma_lab')
    assert len({(m.said, m.cure) for m in messages}) == len(messages) > 150
    named = {word for m in messages for word in re.findall(r'`enigma-lab (\w+)', m.said + m.cure)}
    assert named and not named - {*COMMANDS}

@pytest.mark.quick
def test_the_renaming_tables_are_whole():
    "Every table of the old words is on the page, and leads to modules that exist."
    code = (ROOT/'nbs'/'guides'/'old_projects.ipynb').read_text(encoding='utf-8')
    for table in ('migrate_lm.RENAMED', "'22_migrate_sgdd.ipynb', 'RENAMED'",
                  'migrate_maskpro.SCRIPTS', 'migrate_maskpro.OPTIONS', 'aliases.MOVED',
                  'aliases.RENAMED'): assert table in code

# the commands, in one folder, in the order of the guides

ENV = {name: value for name, value in os.environ.items() if not name.startswith('ENIGMA')}

def run(command, place):
    for pattern, ours in SMALL: command = re.sub(pattern, ours, command)
    done = subprocess.run(command, shell=True, cwd=place, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, f'{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}'
    return done.stdout

def run_page(page, place):
    "Type what a guide says; return the folder in which the reader is then."
    for command, need in commands(page):
        if need in NOT_RUN: continue
        if command.startswith('cd '): place = place/command[3:]
        else: run(command, place)
    return place

WRITE = '''
import json, shutil, sys
from pathlib import Path
import numpy as np, torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from enigma_lab.data.sentences import draw_sentences, small
from enigma_lab.data.text import builtin_documents
from enigma_lab.sgdd.kinds import store_roberta
texts, docs = draw_sentences(small, 'train', 150), builtin_documents()
night = 'It was a dark and stormy night; the rain fell. '
novel = '\\n\\n'.join(f'Chapter {i}. ' + night*(1 + i % 5) for i in range(150))
Path('novel.txt').write_text(novel)
Path('another.txt').write_text(novel[:2000])
Path('book.txt').write_text('\\n'.join(docs[:200])[:60_000])
Path('sentences.txt').write_text('\\n'.join(texts))
rows = [dict(instruction=f'Chapter {i}.', input='', output=f'It was {i}.') for i in range(80)]
Path('asked.txt').write_text('Chapter 3.\\nWhat was it?')
Path('questions.jsonl').write_text(''.join(json.dumps(row) + '\\n' for row in rows))
vectors = np.random.default_rng(0).normal(size=(150, 48))
rows = [dict(text=t, vector=v) for t, v in zip(texts, vectors.tolist())]
Path('mine.jsonl').write_text(''.join(json.dumps(row) + '\\n' for row in rows))
np.save('vectors.npy', vectors[:20])
letters = {c: i for i, c in enumerate(sorted({*Path('book.txt').read_text()}))}
letters['<unk>'] = len(letters)
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.BPE(letters, [], unk_token='<unk>')), unk_token='<unk>')
tokenizer.save_pretrained('my-model')
GPT2LMHeadModel(GPT2Config(
    vocab_size=len(letters), n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=None,
    eos_token_id=None)).save_pretrained('my-model')
Path('my-encoder').mkdir()
store_roberta(Path('my-encoder'))
shutil.copytree(sys.argv[1], 'my-diffusion')
Path('my-network').mkdir()
model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
torch.save(model.state_dict(), 'my-network/weights.pt')
'''

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "Install, make the folder, train once; then lay the reader's files into it."
    place = run_page('guides/install.ipynb', tmp_path_factory.mktemp('reader'))
    dense = ROOT/'runs'/'showcase'/'maskpro'/'dense'
    subprocess.run([sys.executable, '-c', WRITE, str(dense)], cwd=place, env=ENV, check=True)
    for page in GUIDES:
        for text in fences(page, 'python'):
            if name := re.match(r'# (\w+\.py)\n', text): (place/name[1]).write_text(text)
    return place

def clone(folder):
    "A clone as far as the last guide's commands look at it."
    for name in ('nbs', 'enigma_lab', 'tests'):
        shutil.copytree(ROOT/name, folder/name, symlinks=True,
                        ignore=shutil.ignore_patterns('__py*', '.*'))
    for name in ('settings.ini', '_quarto.yml', 'pyproject.toml', 'setup.py', 'README.md'):
        shutil.copy(ROOT/name, folder)
    return folder

@pytest.mark.proof('cli', 'lab.folder', 'lab.publish', 'maskpro.prune', 'sgdd.read')
@pytest.mark.parametrize('page', [page for page in GUIDES if commands(page)])
def test_every_command_runs(lab, tmp_path, page):
    "A reader types the guide from its first line to its last."
    if page == 'guides/install.ipynb': assert 'finished' in run('enigma-lab runs', lab)
    else: run_page(page, clone(tmp_path) if '# needs a clone' in markdown(page) else lab)
