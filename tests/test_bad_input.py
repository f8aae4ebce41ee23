"Show what goes wrong in other hands: the rule, the value, an exit code, and no half record."
import os, subprocess

import pytest, torch

from enigma_lab.lab.sweep import locked, sweep
from enigma_lab.lab.runs import checkout, list_runs
from enigma_lab.lm.generate import generate, stream
from enigma_lab.lm.model import EnigmaConfig, EnigmaForCausalLM
from enigma_lab.lm.tokenizer import train_char_tokenizer
from enigma_lab.lm.train import make_config, read_config, train

ROOT = checkout(__file__)

@pytest.fixture(autouse=True)
def no_waiting(own_runs, monkeypatch):
    monkeypatch.setenv('HF_HUB_DOWNLOAD_TIMEOUT', '2')

def file(tmp_path, name, content):
    path = tmp_path/name
    path.write_bytes(content)
    return str(path)

novel = '\n\n'.join('It was a dark and stormy night. ' * 20 for _ in range(40)).encode()
smoke = lambda **changes: train(make_config('smoke', **changes))

def toy():
    tokenizer = train_char_tokenizer(['ab'])
    return EnigmaForCausalLM(
        EnigmaConfig.preset('smoke', vocab_size=len(tokenizer))
    ).eval(), tokenizer

def hold_and_sweep(path):
    with locked(path / 'runs' / 'sweeps' / 'x'):
        sweep(
            'enigma_lab.bench.ablation:cell',
            [dict(variant='none', text='builtin', seed=0, learning_rate=0.1)],
            'x',
        )

TABLE = {  # what: (call, fragments of the message)
    'odd dim': (
        lambda p: __import__('enigma_lab.lm.model').lm.model.EnigmaConfig(dim=33, num_heads=3),
        ['dim must be even', '33'],
    ),
    'heads that do not divide': (
        lambda p: __import__('enigma_lab.lm.model').lm.model.EnigmaConfig(dim=32, num_heads=5),
        ['must divide dim=32', '5'],
    ),
    'unknown preset': (lambda p: make_config('huge'), ["got 'huge'", 'smoke']),
    'unknown field': (lambda p: make_config('smoke', lr=1), ["no parameter 'lr'", 'learning_rate']),
    'too many GPUs': (lambda p: make_config('smoke', gpus=99), ['gpus=99 asked', 'use -p gpus']),
    'no budget': (
        lambda p: make_config('smoke', max_steps=0),
        ['set epochs, max_steps or minutes'],
    ),
    'missing file': (
        lambda p: smoke(data=str(p / 'none.txt')),
        ['an existing file or folder', 'none.txt'],
    ),
    'unreachable hub': (
        lambda p: smoke(data='nobody-at-all/nothing-here'),
        ["got 'nobody-at-all/nothing-here'"],
    ),
    'empty text': (
        lambda p: smoke(data=file(p, 'empty.txt', b'')),
        ['must hold text', 'empty.txt'],
    ),
    'binary text': (
        lambda p: smoke(data=file(p, 'photo.txt', b'\x89PNG\r\n\x1a\n')),
        ['must be UTF-8', '0x89 at 0 of photo.txt'],
    ),
    'zero bytes': (
        lambda p: smoke(data=file(p, 'zeros.txt', b'ab\0c')),
        ['must not be binary', 'at 2'],
    ),
    'too short text': (
        lambda p: smoke(
            data=file(p, 'short.txt', b'one two three four five six seven eight nine ten ' * 5)
        ),
        ['at least one window of 16 tokens', 'give more text'],
    ),
    'unknown format': (
        lambda p: smoke(data=file(p, 'text.docx', b'x')),
        ['must end in one of', 'text.docx'],
    ),
    'broken json lines': (
        lambda p: smoke(data=file(p, 'a.jsonl', b'{"text": ')),
        ['must hold JSON', 'a.jsonl'],
    ),
    'config that is no JSON': (
        lambda p: read_config(file(p, 'c.json', b'{,}')),
        ['must be YAML', 'c.json'],
    ),
    'diverging loss': (
        lambda p: smoke(
            data=file(p, 'n.txt', novel), learning_rate=1e30, warmup_steps=0, max_steps=20
        ),
        ['must stay finite', 'lower learning_rate'],
    ),
    'no such tokenizer': (
        lambda p: smoke(data=file(p, 'n.txt', novel), tokenizer='nowhere'),
        ['a vocab.txt', "got 'nowhere'"],
    ),
    'vocab.txt with duplicates': (
        lambda p: smoke(
            data=file(p, 'n.txt', novel), tokenizer=file(p, 'vocab.txt', b'[PAD]\na\na')
        ),
        ['each token once', "['a']"],
    ),
    'half precision on the CPU': (
        lambda p: make_config('brief-002'),
        ["'fp16' needs a GPU", 'use -p precision fp32'],
    ),
    'no such tracker': (
        lambda p: make_config('smoke', tracker='paper'),
        ["'none', or of 'wandb', 'tensorboard'", "got 'paper'"],
    ),
    'processes on GPUs': (
        lambda p: make_config('smoke', processes=0),
        ['processes and nodes at least 1', 'processes=0'],
    ),
    'a batch that does not divide': (
        lambda p: make_config('smoke', effective_batch=12),
        ['a multiple of batch_size × processes = 8 × 1', 'got 12'],
    ),
    'wheels between one stream': (
        lambda p: make_config('smoke', machine='between'),
        ['mixes two streams', 'set reversible=True'],
    ),
    'sweep over an unknown name': (
        lambda p: sweep(str(ROOT / 'nbs' / 'train_enigma.ipynb'), dict(lr=[1]), 'x'),
        ["no parameter 'lr'", 'learning_rate'],
    ),
    'two sweeps on one folder': (
        lambda p: hold_and_sweep(p),
        ['one sweep at a time', str(os.getpid())],
    ),
    'beams with streaming': (
        lambda p: next(stream(*toy(), 'a', num_beams=4)),
        ['beams may replace it', 'got num_beams=4'],
    ),
    'padding on the right': (
        lambda p: generate(
            toy()[0], torch.tensor([[263, 0]]), attention_mask=torch.tensor([[1, 0]])
        ),
        ['padded on the left', "padding_side='left'"],
    ),
    'resume from nothing': (
        lambda p: smoke(data=file(p, 'n.txt', novel), resume='train_enigma/20000101-000000'),
        ['no finished run', '20000101'],
    ),
}

@pytest.mark.parametrize('what', TABLE)
def test_message(what, tmp_path):
    call, fragments = TABLE[what]
    with pytest.raises((ValueError, OSError, RuntimeError, FloatingPointError)) as error:
        call(tmp_path)
    for fragment in fragments: assert fragment in str(error.value)
    assert not any(run.finished for run in list_runs())

def test_resume_from_another_config(tmp_path):
    data = file(tmp_path, 'n.txt', novel)
    run = smoke(data=data)
    with pytest.raises(ValueError, match=r"same config.*'seed': \(0, 1\)"):
        smoke(data=data, seed=1, resume=str(run.path))

def test_wrong_vocabulary(tmp_path):
    from transformers import AutoModelForCausalLM
    run = smoke(data=file(tmp_path, 'n.txt', novel))
    model = AutoModelForCausalLM.from_pretrained(run.checkpoint)
    with pytest.raises(ValueError, match='same vocabulary, got 263 rows'):
        next(stream(model, train_char_tokenizer(['a']), 'a'))

@pytest.mark.parametrize('place', ['a file', 'no room'])
def test_runs_that_cannot_be_written(place, tmp_path, monkeypatch):
    "A runs folder that is a file (nothing can be made in it), and a device without room."
    monkeypatch.setenv(
        'ENIGMA_RUNS',
        file(tmp_path, 'runs_is_a_file', b'') if place == 'a file' else str(tmp_path / 'runs'),
    )
    if place == 'no room':
        (tmp_path/'runs'/'train_enigma').mkdir(parents=True)
        real = os.replace
        def full(a, b):
            if str(b).endswith('config.json'): raise OSError(28, 'No space left on device')
            return real(a, b)
        monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(OSError, match='ENIGMA_RUNS'): smoke(data=file(tmp_path, 'n.txt', novel))
    monkeypatch.undo()
    monkeypatch.setenv('ENIGMA_RUNS', str(tmp_path/'runs'))
    assert not any(run.finished for run in list_runs())

@pytest.mark.skipif(os.name != 'posix' or os.geteuid() == 0, reason='root may write everywhere')
def test_read_only_runs(tmp_path):
    (tmp_path/'runs').mkdir(mode=0o500)
    with pytest.raises(OSError, match='ENIGMA_RUNS'): smoke(data=file(tmp_path, 'n.txt', novel))

def test_exit_code(train_from_shell):
    "From a shell: one line, no traceback, not 0."
    result = train_from_shell(preset='smoke', data='missing.txt')
    assert result.returncode == 1
    assert 'missing.txt' in result.stderr
    assert 'Traceback' not in result.stderr

def test_unknown_papermill_parameter(tmp_path):
    result = subprocess.run(
        ['papermill', str(ROOT / 'nbs' / 'train_enigma.ipynb'), '-p', 'learningrate', '1'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (
        result.returncode == 2
        and "no parameter 'learningrate'" in result.stderr
        and 'learning_rate' in result.stderr
    )
    assert not (tmp_path/'runs').exists()
