"Compressed files: written by one process and read by another, or refused with the reason."
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from enigma_lab.cli import main
from enigma_lab.data import coding
from enigma_lab.data.coding import open_stream
from enigma_lab.data.images import digit_images
from enigma_lab.lab.runs import checkout, runs_root
from enigma_lab.lm.model import EnigmaConfig, EnigmaForCausalLM
from enigma_lab.lm.tokenizer import train_char_tokenizer

pytest.importorskip('constriction')
ROOT = checkout(__file__)
COMMAND = 'from enigma_lab.cli import main; main()'
ANY_BYTES = [b'', b'a', 'An enigma — 谜 — é.\n'.encode()*9, bytes(range(256)), b'\xff\xc3'*40]

def enigma(*words, code=COMMAND, **more):
    "Run a command in a process of its own, with one thread."
    env = os.environ | dict(OMP_NUM_THREADS='1') | more
    words = [sys.executable, '-c', code, *map(str, words)]
    return subprocess.run(words, env=env, capture_output=True, text=True, cwd=ROOT, timeout=300)

@pytest.fixture(autouse=True)
def one_thread():
    "Compute as the processes do."
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(was)

@pytest.fixture(scope='module')
def models(tmp_path_factory):
    "Save two small models of one alphabet, as a training does."
    folder = tmp_path_factory.mktemp('models')
    tokenizer = train_char_tokenizer(['an enigma is a machine.\n'])
    config = EnigmaConfig.preset('smoke', vocab_size=len(tokenizer), max_len=32)
    for name in ('one', 'other'):
        torch.manual_seed(len(name))
        EnigmaForCausalLM(config).save_pretrained(folder/name)
        tokenizer.save_pretrained(folder/name)
    return folder

@pytest.fixture(scope='module')
def packed(models, tmp_path_factory):
    "Compress a text in a process of its own."
    folder = tmp_path_factory.mktemp('packed')
    (folder/'text').write_bytes(b'an enigma is a machine; a machine is an enigma.\n'*8)
    done = enigma('compress', folder/'text', folder/'stream', '--model', models/'one')
    assert done.returncode == 0, done.stderr
    assert 'bits a byte' in done.stdout
    return folder

def test_another_process_reads_it(models, packed, tmp_path):
    done = enigma('decompress', packed/'stream', tmp_path/'back', '--model', models/'one')
    assert done.returncode == 0, done.stderr
    assert (tmp_path/'back').read_bytes() == (packed/'text').read_bytes()
    assert (packed/'stream').stat().st_size < .6*(packed/'text').stat().st_size

@pytest.mark.parametrize('number', range(len(ANY_BYTES)))
def test_any_bytes(models, number, tmp_path):
    "Characters without a row, no UTF-8, nothing: in this process."
    (tmp_path/'a').write_bytes(ANY_BYTES[number])
    model = ['--model', str(models/'one')]
    main(['compress', str(tmp_path/'a'), str(tmp_path/'b'), *model, '--parts', '3'])
    main(['decompress', str(tmp_path/'b'), str(tmp_path/'c'), *model])
    assert (tmp_path/'c').read_bytes() == ANY_BYTES[number]

def test_another_model_or_number_of_threads(models, packed, tmp_path):
    words = 'decompress', packed/'stream', tmp_path/'back', '--model'
    other = enigma(*words, models/'other')
    assert other.returncode == 2 and 'by the model that wrote it' in other.stderr
    threads = enigma(*words, models/'one', OMP_NUM_THREADS='2')
    assert threads.returncode == 2 and 'OMP_NUM_THREADS' in threads.stderr
    assert not (tmp_path/'back').exists()
    for done in (other, threads): assert len(done.stderr.splitlines()) == 1

def test_another_build_or_no_model(models, packed, tmp_path, monkeypatch, capsys):
    words = ['decompress', str(packed/'stream'), str(tmp_path/'back'), '--model']
    monkeypatch.setattr(coding, 'build_stamp', lambda: 'torch 99.0 NEON, 1 thread')
    for model, code, said in ((models/'one', 2, 'torch 99.0'), ('no/run', 1, 'make train')):
        with pytest.raises(SystemExit) as stopped: main([*words, str(model)])
        error = capsys.readouterr().err
        assert stopped.value.code == code and said in error.splitlines()[-1]
    assert not (tmp_path/'back').exists()

def test_damage(packed, tmp_path, capsys):
    "Every bit that flips, every cut: noticed before a model is loaded."
    stream = (packed/'stream').read_bytes()
    for i in range(8*len(stream)):
        altered = bytearray(stream)
        altered[i//8] ^= 1 << i % 8
        with pytest.raises(ValueError, match='altered'): open_stream(bytes(altered), b'T')
    for n in range(len(stream)):
        with pytest.raises(ValueError, match='a compressed file'): open_stream(stream[:n], b'T')
    (tmp_path/'cut').write_bytes(stream[:-5])
    words = ['decompress', str(tmp_path/'cut'), str(tmp_path/'back'), '--model', 'no/run']
    with pytest.raises(SystemExit): main(words)
    assert 'cut off or altered' in capsys.readouterr().err
    assert not (tmp_path/'back').exists()

def test_nothing_is_written_over(models, packed, tmp_path):
    (tmp_path/'there').write_text('mine')
    words = ['compress', str(packed/'text'), str(tmp_path/'there'), '--model', str(models/'one')]
    with pytest.raises(SystemExit): main(words)
    assert (tmp_path/'there').read_text() == 'mine'
    main([*words, '--force'])
    assert (tmp_path/'there').read_bytes() == (packed/'stream').read_bytes()

@pytest.mark.proof('lm.compress', 'data.coding')
@pytest.mark.skipif(not (runs_root()/'showcase'/'train_enigma'/'checkpoint').is_dir(),
                    reason='no showcase here')
def test_the_showcase_is_the_default(tmp_path):
    (tmp_path/'a').write_text('Return the first element of a list, or raise a ValueError.\n'*3)
    for words in (('compress', 'a', 'b'), ('decompress', 'b', 'c')):
        done = enigma(words[0], *(tmp_path/name for name in words[1:]))
        assert done.returncode == 0, done.stderr
    assert (tmp_path/'c').read_bytes() == (tmp_path/'a').read_bytes()

WRITE = """
import sys
from pathlib import Path
from enigma_lab.data.images import digit_images
from enigma_lab.flow.coding import CodingConfig, compress_images
c = CodingConfig(updates=40, hidden=32, batch=16, **eval(sys.argv[2]))
Path(sys.argv[1]).write_bytes(compress_images(digit_images()[''][0][:90], c))
"""
READ = """
import sys
from pathlib import Path
import enigma_lab.lm.model # which treats denormal numbers otherwise than a fresh process
import numpy as np
from enigma_lab.flow.coding import decompress_images
np.save(sys.argv[2], decompress_images(Path(sys.argv[1]).read_bytes()))
"""

@pytest.mark.proof('flow.coding', 'data.coding')
@pytest.mark.parametrize('settings', [{}, dict(mixtures=3, layers=2), dict(stored=True)])
def test_images_in_two_processes(settings, tmp_path):
    "No weights are sent: the second process learns what the first one learned."
    for code, words in ((WRITE, ('stream', repr(settings))), (READ, ('stream', 'x.npy'))):
        words = [word if word[0] == '{' else tmp_path/word for word in words]
        done = enigma(*words, code=code)
        assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path/'x.npy'), digit_images()[''][0][:90])
    altered = bytearray((tmp_path/'stream').read_bytes())
    altered[200] ^= 4
    (tmp_path/'stream').write_bytes(altered)
    done = enigma(tmp_path/'stream', tmp_path/'y.npy', code=READ)
    assert done.returncode and 'cut off or altered' in done.stderr
