"The benchmark lines of the documents, typed as the table of new names says."
import shlex

import pytest

from enigma_lab.bench import sequence
from enigma_lab.bench.timing import newest_run
from enigma_lab.cli import main
from enigma_lab.dev.migrate_lm import translate

LINES = {'copy': 'python scripts/benchmark.py --task copy --seq_len 50 --use_dynamic_conv1x1',
         'enwik8': 'python scripts/benchmark.py --task enwik8 --seq_len 100 --use_dynamic_conv1x1'}

@pytest.fixture
def little_effort(tmp_path, monkeypatch):
    "Let the benchmark take two updates, and read a file of some windows of a hundred bytes."
    path = tmp_path/'text.bin'
    path.write_bytes(b'It was a dark and stormy night; the rain fell. '*200)
    monkeypatch.setattr(sequence, 'ENWIK8', str(path))
    monkeypatch.setattr(sequence, 'RATES_TRIED', [.003])
    monkeypatch.setattr(sequence, 'SEEDS', [0])
    for task in LINES: monkeypatch.setitem(sequence.EFFORT, task, dict(
        seq_len=[9], updates=2, batch_size=2, eval_steps=1, layers=1))

@pytest.mark.quick
@pytest.mark.parametrize('task', LINES)
def test_the_lines_of_the_documents(task, own_runs, little_effort, capsys):
    program, *words = shlex.split(translate(LINES[task]))
    assert program == 'enigma-lab'
    main(words)
    said, run = capsys.readouterr().out, newest_run('bench_sequence')
    assert (run.config['task'], run.config['rotor']) == (task, 'table')
    assert run.config['seq_len'] == [50 if task == 'copy' else 100]
    for name in ('enigma', 'without', 'rotary', 'lstm'):
        assert f'test       {task}' in said and f' {name} ' in said
        assert run.metrics[f'{name}_{run.config["seq_len"][0]}_recall_nats'] > 0
    assert ('ppmd5_bits_per_byte' in run.metrics) == (task == 'enwik8')

@pytest.mark.quick
def test_a_missing_file_is_named(own_runs, capsys):
    words = shlex.split(translate(LINES['enwik8']))[1:]
    with pytest.raises(SystemExit) as end: main([*words, '--data', 'nowhere.bin'])
    assert end.value.code == 1
    assert 'nowhere.bin does not exist; get mattmahoney.net' in capsys.readouterr().err
    assert not own_runs.exists()

@pytest.mark.quick
def test_the_options_of_a_benchmark_are_its_own(capsys):
    with pytest.raises(SystemExit) as end: main(['bench', 'sequence', '--help'])
    assert end.value.code == 0 and '--seq_len' in capsys.readouterr().out
    with pytest.raises(SystemExit) as end: main(['bench', 'shakespeare', '--task', 'copy'])
    assert end.value.code == 2 and 'takes no options here' in capsys.readouterr().err
