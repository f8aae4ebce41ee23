"From documents to tokens: memory, pieces, caches, sets of tokens, tokenizers by name."
import json
import os
import random
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from enigma_lab.cli import main
from enigma_lab.data.text import builtin_documents
from enigma_lab.data.tokens import TokenWindows, load_tokens
from enigma_lab.data.windows import cut_text, document_tokens, encode_plain, encode_texts
from enigma_lab.lm.tokenizer import bert_tokenizer, train_char_tokenizer
from enigma_lab.lm.train import make_config, prepare

ROWS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'恩尼格玛机天地玄黄宇宙洪荒',
        'the', 'en', '##ig', '##ma', ',', '.', '。']

def words_of(documents):
    "Learn byte-level pairs as GPT-2 does."
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(documents, trainers.BpeTrainer(
        vocab_size=500, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token='e')

def pieces_of(documents, split):
    "Learn pieces as T5 (with words) or Llama (without) does: a blank is a letter."
    made = Tokenizer(models.Unigram())
    if split: made.pre_tokenizer = pre_tokenizers.Metaspace()
    else: made.normalizer = normalizers.Sequence([normalizers.Prepend('▁'),
                                                  normalizers.Replace(' ', '▁')])
    made.train_from_iterator(documents, trainers.UnigramTrainer(
        vocab_size=300, show_progress=False, unk_token='?', special_tokens=['?', 'end']))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token='end')

@pytest.mark.parametrize('kind', ['characters', 'words', 'bert', 'metaspace', 'no words'])
def test_pieces_are_the_whole(kind, tmp_path):
    "The oracle is the tokenizer itself, given the whole text in one call."
    documents = [d[:500] for d in builtin_documents()[:300]]
    (tmp_path/'vocab.txt').write_text('\n'.join(ROWS), encoding='utf-8')
    tokenizer = dict(characters=lambda: train_char_tokenizer(documents[:5]),
                     words=lambda: words_of(documents),
                     bert=lambda: bert_tokenizer(tmp_path/'vocab.txt'),
                     metaspace=lambda: pieces_of(documents, True)).get(
                         kind, lambda: pieces_of(documents, False))()
    draw = random.Random(0)
    bits = ['the', ' ', '\n', '\n\n', '\t', '   ', '恩尼', '。', ', ', 'enigma', "don't", '12',
            'é☃']
    texts = ['\n'.join(documents)[:6000], ''.join(draw.choices(bits, k=3000)), ' ' * 2000,
             'x' * 1500, ' '.join(documents)[:3000], '', '<|eos|>[SEP]</s>' * 100]
    cut = 0
    for text in texts:
        for size in (300, 1000):
            pieces = list(cut_text(tokenizer, text, size))
            cut += len(pieces) - 1
            assert ''.join(pieces) == text
            assert sum(encode_plain(tokenizer, pieces), []) == encode_plain(tokenizer, [text])[0]
    assert cut > 20 or kind == 'no words' # such a tokenizer gets its texts whole
    assert encode_texts(tokenizer, texts) == encode_plain(tokenizer, texts)
    eos = tokenizer.eos_token_id
    found = [i for ids in document_tokens(tokenizer, texts) for i in ids.tolist()]
    assert found == sum([ids + [eos] for ids in encode_plain(tokenizer, texts)], [])

PEAK = r"""
import re, sys, warnings
from enigma_lab.data.leaks import remove_leaks
from enigma_lab.data.text import load_text
from enigma_lab.data.windows import Windows
from enigma_lab.lab.checkpoint import digest_dataset
from enigma_lab.lm.tokenizer import train_char_tokenizer
warnings.simplefilter('ignore')
corpus, leaks = remove_leaks(load_text(sys.argv[1])) # as a training does
assert leaks.lost < .01*leaks.characters
tokenizer = train_char_tokenizer(corpus.train)
for part in (corpus.train, corpus.validation):
    windows = Windows(part, tokenizer, 256)
    digest_dataset(windows)
    for i in range(0, len(windows), 10): windows[i]
# of this process alone: ru_maxrss begins with the peak of the one that started it
peak = re.search(r'VmHWM:\s+(\d+) kB', open('/proc/self/status').read())
print(corpus.card()['train_characters'], int(peak[1]) * 1024)
"""

def write_text(path, size, one, kind):
    "Write words in no order, no passage of which is a copy: a book, or a row for each document."
    vocabulary = sorted({w for d in builtin_documents() if d.isascii() for w in d.split()})
    vocabulary, draw = np.array(vocabulary, object), np.random.default_rng(0)
    with open(path, 'w', encoding='utf-8') as f:
        if kind == 'emoji': f.write('😀' if one else '{"text": "😀"}\n')
        while f.tell() < size:
            lines = [' '.join(draw.choice(vocabulary, 12)) for _ in range(20)]
            text = '\n'.join(lines) + '\n\n'*one
            if kind == 'curly': text = '“' + text.replace("'", '’')
            f.write(text if one else json.dumps(dict(text=text), ensure_ascii=False) + '\n')
    return path

@pytest.mark.proof('data.text', 'data.windows', 'lab.checkpoint', seeds=(0,))
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='Linux says its peak there')
@pytest.mark.parametrize('name', ['book.txt', 'rows.jsonl'])
@pytest.mark.parametrize('kind', ['plain', 'curly', 'emoji'])
def test_memory_of_a_large_file(kind, name, tmp_path):
    "What is read, encoded, cut and digested: at most 4 bytes of memory for each byte of the file."
    half = kind != 'plain' and name == 'book.txt' # it is the same there, and takes less time
    peak, large = {}, 30_000_000 if half else 60_000_000
    for size in (1_000_000, large):
        path = write_text(tmp_path/f'{size}-{name}', size, name.endswith('txt'), kind)
        env = {**os.environ, 'ENIGMA_CACHE': str(tmp_path/'cache')}
        done = subprocess.run([sys.executable, '-c', PEAK, str(path)], capture_output=True,
                              text=True, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
        characters, peak[size] = map(int, done.stdout.split())
        assert characters > .8*size
        assert path.stat().st_size < size*1.01
    above = peak[large] - peak[1_000_000]
    print(f"{kind} {name}: {above/1e6:.0f} MB above the run on 1 MB, {above/large:.1f} x the file")
    assert above <= 4*large

RACE = """
import sys, time
from enigma_lab.data import windows
from enigma_lab.lm.tokenizer import train_char_tokenizer
table = windows.CharacterTable.encode
def slow(self, text):
    time.sleep(.2)
    print('encoded', flush=True)
    return table(self, text)
windows.CharacterTable.encode = slow
tokenizer = train_char_tokenizer(['a machine is no enigma'])
made = windows.Windows(['a machine', 'is no enigma']*2, tokenizer, 4)
print(made.digest())
"""

@pytest.mark.proof('data.windows')
def test_of_several_processes_one_encodes(tmp_path):
    env = {**os.environ, 'ENIGMA_CACHE': str(tmp_path)}
    ranks = [subprocess.Popen([sys.executable, '-c', RACE], stdout=subprocess.PIPE, text=True,
                              env=env) for _ in range(3)]
    lines = [rank.communicate()[0].split() for rank in ranks]
    assert sum(line.count('encoded') for line in lines) == 4 # one for each document
    assert len({line[-1] for line in lines}) == 1 and len(lines[0][-1]) == 64
    assert [p.suffix for p in sorted((tmp_path/'tokens').iterdir())] == ['.uint16', '.lock']

# document 002

SFT = [dict(instruction='把这句话翻译成英文', input='恩尼格玛', output='Enigma'),
       dict(instruction='Say it again.', input='', output='§ again'),
       dict(messages=None, instruction='Count', input='three', output='1 2 3')] + [
       dict(instruction=f'What is {i}?', input='', output=f'It is {i}.') for i in range(40)]

def test_a_tokenizer_of_instructions(tmp_path, monkeypatch):
    "Document 002 as typed: what is asked, what is given and what is answered make the alphabet."
    monkeypatch.setenv('ENIGMA_DEBUG', '1')
    rows = [{k: v for k, v in row.items() if k != 'messages'} for row in SFT]
    (tmp_path/'sft.jsonl').write_text('\n'.join(json.dumps(r, ensure_ascii=False) for r in rows))
    said = StringIO()
    with redirect_stdout(said):
        main(['tokenizer', str(tmp_path/'sft.jsonl'), str(tmp_path/'out'), '--max_length', '12'])
    made = AutoTokenizer.from_pretrained(tmp_path/'out')
    assert f'{len(made)} rows' in said.getvalue()
    asked = {c for row in rows for value in row.values() for c in value}
    lost = asked - set(made.get_vocab())
    assert len(lost) <= 30 and {*'What is?.It'} <= set(made.get_vocab())
    assert made.model_max_length == 12
    assert len(made('It is 7. It is 8.', truncation=True).input_ids) == 12
    chats = [dict(messages=[dict(role='user', content=r['instruction']),
                            dict(role='assistant', content=r['output'])]) for r in rows]
    (tmp_path/'chats.jsonl').write_text('\n'.join(map(json.dumps, chats)))
    main(['tokenizer', str(tmp_path/'chats.jsonl'), str(tmp_path/'of_chats')])
    assert AutoTokenizer.from_pretrained(tmp_path/'of_chats').model_max_length == 2048

def test_full_sequences_stay_whole(tmp_path, own_runs, monkeypatch):
    "002's folder: rows to 2048, padded to the longest, whole in windows of 2048."
    monkeypatch.setenv('ENIGMA_CACHE', str(tmp_path/'cache'))
    tokenizer = train_char_tokenizer(['abcdefgh'])
    tokenizer.save_pretrained(tmp_path/'tokenizer')
    draw, eos = random.Random(0), tokenizer.eos_token_id
    texts = [''.join(draw.choices('abcdefgh', k=n - 1)) for n in (2048, 7, 900, 901, 2047, 300)*8]
    ids = [[*row, eos] for row in encode_plain(tokenizer, texts)]
    mask = [[1]*len(row) + [0]*(2048 - len(row)) for row in ids]
    ids = [row + [tokenizer.pad_token_id]*(2048 - len(row)) for row in ids]
    rows = datasets.Dataset.from_dict(dict(input_ids=ids, attention_mask=mask))
    parts = dict(train=rows.select(range(40)), test=rows.select(range(40, 48)))
    datasets.DatasetDict(parts).save_to_disk(tmp_path/'am_0.9M_processed_hf')
    corpus = load_tokens(tmp_path/'am_0.9M_processed_hf', tokenizer)
    assert [*corpus._test] == texts[40:] and len(corpus.validation) == 2
    assert sorted([*corpus.train, *corpus.validation]) == sorted(texts[:40])
    windows, told = TokenWindows(corpus.train, tokenizer, 2048), []
    for window in windows:
        begins = (window['position_ids'] == 0).nonzero().flatten().tolist() + [2048]
        for a, b in zip(begins, begins[1:]):
            row, labels = window['input_ids'][a:b], window['labels'][a:b]
            if row[0] == tokenizer.pad_token_id: assert set(labels.tolist()) == {-100}
            else:
                told.append(tokenizer.decode(row[:-1]))
                assert row[-1] == eos and torch.equal(labels[1:], row[1:]) and labels[0] == -100
    assert told == [*corpus.train]
    config = make_config('smoke', data=str(tmp_path/'am_0.9M_processed_hf'), max_chars=0)
    with pytest.raises(ValueError, match="tokenizer='auto'; give its folder"): prepare(config)

# a BERT vocabulary by name, and 001's tensors

@pytest.fixture
def hub(tmp_path):
    "Fill a cache of the hub with a small bert-base-chinese, as a download leaves it."
    model = tmp_path/'hf'/'hub'/'models--bert-base-chinese'
    for folder in ('snapshots/abc', 'refs'): (model/folder).mkdir(parents=True)
    (model/'refs'/'main').write_text('abc')
    (model/'snapshots'/'abc'/'vocab.txt').write_text('\n'.join(ROWS), encoding='utf-8')
    (model/'snapshots'/'abc'/'tokenizer_config.json').write_text(
        json.dumps(dict(do_lower_case=False, model_max_length=512)))
    return {**os.environ, 'HF_HOME': str(tmp_path/'hf'), 'HF_HUB_OFFLINE': '1',
            'ENIGMA_RUNS': str(tmp_path/'runs'), 'ENIGMA_CACHE': str(tmp_path/'cache')}

BY_NAME = """
import json
from enigma_lab.data.windows import encode_texts
from enigma_lab.lm.tokenizer import load_tokenizer
made = load_tokenizer('bert-base-chinese')
texts = json.loads(input())
marks = made.eos_token, made.pad_token
print(json.dumps([made(texts).input_ids, encode_texts(made, texts), *marks]))
try: load_tokenizer('bert-base-cased')
except FileNotFoundError as e: print(e)
"""

@pytest.mark.proof('lm.tokenizer')
def test_a_vocabulary_by_name(hub, tmp_path):
    "The numbers of transformers' own BertTokenizer; what is not cached is an error that helps."
    texts = ['the enigma, 恩尼格玛机。', 'The  天地\n玄黄 ☃', '', '[SEP] the']
    done = subprocess.run([sys.executable, '-c', BY_NAME], input=json.dumps(texts),
                          capture_output=True, text=True, env=hub)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, plain, eos, pad = json.loads(done.stdout.splitlines()[0])
    own = BertTokenizer(vocab={t: i for i, t in enumerate(ROWS)}, do_lower_case=False)
    assert whole == own(texts).input_ids and (eos, pad) == ('[SEP]', '[PAD]')
    assert plain == own(texts, add_special_tokens=False, split_special_tokens=True).input_ids
    assert 'hf download bert-base-cased' in done.stdout and 'vocab.txt' in done.stdout

@pytest.mark.proof('data.tokens', 'lm.train', 'lm.tokenizer', 'cli', seeds=(0,))
def test_train_on_the_tensors_of_001(hub, tmp_path):
    "enigma-lab train train_enigma data=FOLDER tokenizer=bert-base-chinese preset=smoke."
    folder, draw = tmp_path/'processed', random.Random(0)
    folder.mkdir()
    row = lambda: [2, *draw.choices(range(5, len(ROWS)), k=draw.randint(100, 254)), 3]
    rows = [row() for _ in range(40)]
    table = torch.tensor([r + [0]*(256 - len(r)) for r in rows])
    for name, part in dict(train=table[:32], val=table[30:36], test=table[36:]).items():
        torch.save(part, folder/f'{name}_seq256_bert_fast.pt')
    words = ['train', 'train_enigma', f'data={folder}', 'tokenizer=bert-base-chinese',
             'preset=smoke']
    done = subprocess.run(
        [sys.executable, '-c', 'from enigma_lab.cli import main; import sys; main(sys.argv[1:])',
         *words], capture_output=True, text=True, env=hub)
    assert done.returncode == 0, done.stderr[-3000:]
    path, = (p for p in (tmp_path/'runs'/'train_enigma').iterdir() if p.is_dir())
    metrics = json.loads((path/'metrics.json').read_text())
    # two of train are in validation as well, and the held-out rows stay
    sizes = [metrics[f'{part}_documents'] for part in ('train', 'validation', 'test')]
    assert sizes == [30, 6, 4] and metrics['rows_dropped'] == {'in another part': 2}
    assert metrics['train_row_tokens'] == sum(map(len, rows[:30]))
    assert metrics['vocabulary'] == len(ROWS) and metrics['test_bits_per_char'] > 0
    assert metrics['test_tokens'] == sum(map(len, rows[36:]))
    saved = AutoTokenizer.from_pretrained(path/'checkpoint')
    assert saved.model_max_length == 16 and saved.eos_token == '[SEP]'
    assert len(saved('恩尼格玛'*20, truncation=True).input_ids) == 16
    assert Path(path/'checkpoint'/'model.safetensors').is_file()
