"Records: names that are slugs, packing that loses nothing, and every committed run."
import json, os, random, shutil, subprocess, unicodedata, zipfile
from pathlib import Path

import numpy as np
import pytest

import enigma_lab
from enigma_lab.lab import launch, runs
from enigma_lab.lab.runs import Run, checkout, find_run, list_runs, load_runs, new_run_dir, open_run, pack_runs, pack_sweep, read_records, runs_in, slug, write_json

ROOT = checkout(Path(enigma_lab.__file__).parent)
COMMITTED = ROOT/'runs'

def texts(number=3000, seed=0):
    "Random text from all of Unicode, from what is awkward in paths, and from what a slug may hold."
    rng = random.Random(seed)
    kinds = [lambda: chr(rng.randrange(0x110000)), lambda: rng.choice('./\\ -_=:,^+~*?"<>|%$#\0\n\t\'`'), lambda: rng.choice('aZ09.-_=')]
    for _ in range(number):
        of = rng.choice([*([kind] for kind in kinds), kinds])
        yield ''.join(rng.choice(of)() for _ in range(rng.choice((0, 1, 2, 3, 10, 300))))

def test_slugs():
    safe = set('abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_=')
    for text in texts():
        word = slug(text)
        assert set(word) <= safe and len(word) <= 80 and slug(word) == word, (text, word)
        assert bool(word) == bool(text) and word.strip('.-') == word, (text, word)      # so never '.' or '..', hidden, or an option
        assert Path('x')/word == Path('x', word) and (Path('x')/word).parts == ('x', *[word][:bool(word)])
        if text and set(text) <= safe and len(text) <= 80 and text.strip('.-') == text: assert word == text
    assert len({slug(unicodedata.lookup(f'CJK UNIFIED IDEOGRAPH-{k:X}')) for k in range(0x4e00, 0x4e40)}) == 64   # notes in another script stay apart

@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith('ENIGMA_RUN')]: monkeypatch.delenv(name)
    monkeypatch.setenv('ENIGMA_RUNS', str(tmp_path/'runs'))
    return (tmp_path/'runs').resolve()

def test_a_note_makes_one_folder(home, monkeypatch):
    monkeypatch.setenv('TZ', 'Pacific/Auckland')
    runs.time.tzset()
    for k, text in enumerate(texts(60, 1)):
        path = new_run_dir('toy', text)
        assert path.parent == home/'toy' and path.is_dir() and (home/'toy').is_dir()
        now = runs.time.time()
        assert runs.time.strftime('%Y%m%d-%H%M', runs.time.gmtime(now - 2))[:11] <= path.name[:11] <= runs.time.strftime('%Y%m%d-%H%M', runs.time.gmtime(now))[:11]
    monkeypatch.undo(); runs.time.tzset()

def test_cell_names():
    rng = random.Random(2)
    for text in texts(500, 3):
        cell = dict(seed=rng.randrange(9), text=text.encode('utf-8', 'replace').decode(), rate=rng.random())
        name = launch.cell_name(cell, ['seed', 'text', 'rate'])
        assert slug(name) == name
        assert launch.cell_name(dict(cell, seed=10), ['seed', 'text', 'rate']) != name

def make(folder, rng, arrays=True, checkpoint=False):
    "A finished run with whatever JSON can hold, and its bytes."
    run = Run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    words = lambda: ''.join(rng.choice('aé中\u2028\x85\n"\\😀') for _ in range(rng.randrange(6)))
    value = lambda depth=0: rng.choice([rng.random, lambda: rng.randrange(-9**20, 9**20), words, lambda: None, lambda: True,
        *([lambda: [value(1) for _ in range(3)], lambda: {words(): value(1)}] if not depth else [])])()
    for part in ('config', 'env', 'metrics'): write_json(folder/f'{part}.json', {f'{part}{k}': value() for k in range(5)})
    for step in range(rng.randrange(4)): run.log(step=step, loss=rng.choice([rng.random(), float('nan'), float('inf')]), more=value())
    if arrays: np.save(folder/'losses.npy', np.array([rng.random() for _ in range(5)]))
    (folder/'figures').mkdir(exist_ok=True); (folder/'figures'/'loss.png').write_bytes(b'picture')
    if checkpoint: run.checkpoint.mkdir(); (run.checkpoint/'model.safetensors').write_bytes(b'weights')
    return run

def seen(run): return run.name, run.finished, *(json.dumps(part) for part in (run.config, run.env, run.metrics, run.history))

@pytest.mark.parametrize('seed', range(5))
def test_packing_loses_nothing(home, seed):
    rng, sweep = random.Random(seed), home/'sweeps'/'x'
    made = [make(sweep/task/f'{k}', rng, rng.random() < .5, rng.random() < .5) for task in ('a', 'b') for k in range(3)]
    open_ = Run(sweep/'a'/'open'); open_.path.mkdir(); write_json(open_.path/'config.json', {})
    before = {run.path: (seen(run), {p.name: p.read_bytes() for p in run.path.glob('*.npy')}) for run in made}
    pictures = sorted(sweep.glob('*/*/*/*'))
    for again in range(2):                                                              # and the second time changes nothing
        assert len(pack_sweep(sweep)) == 6
        for path, (told, files) in before.items():
            run = find_run(path.relative_to(home).as_posix())
            assert seen(run) == told and run.path == path and not (path/'config.json').exists()
            assert {name: run.open(name).read() for name in files} == files
        assert sorted(sweep.glob('*/*/*/*')) == pictures                                # what is not packed is where it was
        assert [run.path for run in runs_in(sweep/'a')] == [sweep/'a'/name for name in ('0', '1', '2', 'open')]
        assert open_run(open_.path) == open_
    assert {p.name for p in sweep.iterdir()} - {'files.zip'} == {'a', 'b', 'records.jsonl'}

def test_packing_adds(home):
    rng = random.Random(0)
    first, second = (make(home/'toy'/name, rng) for name in ('1', '2'))
    told = [seen(first), seen(second)]
    pack_runs(home/'toy', [first]); pack_runs(home/'toy', [second])
    assert [seen(run) for run in list_runs('toy')] == told and len(load_runs()) == 2
    for run in list_runs():
        assert len(run.open('losses.npy').read()) > 5
        with pytest.raises(FileExistsError, match='written once'): run.log(step=1)
        with pytest.raises(FileNotFoundError, match='packed as x'): run.open('x')
    make(home/'toy'/'1', rng)                                                           # another run of the same name
    with pytest.raises(FileExistsError, match='has other records'): pack_runs(home/'toy', [first])
    assert (home/'toy'/'1'/'config.json').exists() and seen(read_records(home/'toy')[0]) == told[0]
    (home/'toy'/'1'/'metrics.json').unlink()
    with pytest.raises(ValueError, match='only a finished run'): pack_runs(home/'toy', [first])

def test_what_reads_back_otherwise_is_kept(home, monkeypatch):
    run = make(home/'toy'/'1', random.Random(0))
    files = {p: p.read_bytes() for p in run.path.rglob('*') if p.is_file()}
    true = runs.write_whole
    for name, spoil in {'records.jsonl': lambda text: text.replace(b'config1', b'config9'), 'files.zip': lambda data: empty(home)}.items():
        monkeypatch.setattr(runs, 'write_whole', lambda path, content: true(path, spoil(content) if path.name == name else content))
        with pytest.raises(OSError, match='must equal'): pack_runs(home/'toy', [run])
        assert {p: p.read_bytes() for p in run.path.rglob('*') if p.is_file()} == files
        (home/'toy'/'records.jsonl').unlink(); (home/'toy'/'files.zip').unlink()

def empty(folder):
    with zipfile.ZipFile(folder/'empty.zip', 'w'): pass
    return (folder/'empty.zip').read_bytes()

def test_older_trials_count_as_finished(home):
    "A sweep finds what it left under a name with commas and spaces, packed or not."
    task, folder = 'enigma_lab.bench.ablation:cell', home/'sweeps'/'old'/'cell'
    cell = dict(seed=0, variant='input, roll, no switch', learning_rate=.01)
    new = launch.cell_name(cell, list(cell))
    made = make(folder/f'0-input,_roll,_no_-0.01-{new[-6:]}+2', random.Random(0))
    assert ',' not in new and launch.finished_run(folder, new) == made and not launch.finished_run(folder, new[:-1] + 'x')
    pack_sweep(folder.parent)
    assert launch.finished_run(folder, new).path == made.path and launch.task_name(task) == 'cell'

def test_aliases(home, monkeypatch):
    run = make(home/'toy'/'1', random.Random(0))
    write_json(run.path/'config.json', dict(chart='plu', shape=dict(chart='orthogonal'), a=dict(chart=1, parametrization=2)))
    run.log(chart='plu', step=9)
    monkeypatch.setitem(runs.ALIASES, 'chart', 'parametrization')
    monkeypatch.setitem(runs.ALIASES, 'metrics0', 'first')
    for packed in (False, True):
        if packed: run, = pack_runs(home/'toy', [run])
        assert run.config == dict(a=dict(parametrization=2), parametrization='plu', shape=dict(parametrization='orthogonal'))
        assert run.history[-1] == dict(parametrization='plu', step=9)
        assert 'first' in run.metrics and 'metrics0' not in run.metrics and 'metrics0' in run.part('metrics')
        run.config['shape'].clear(); run.env.clear()                                    # a copy is given, not the record
        assert run.config['shape'] and run.env

def test_every_committed_run(monkeypatch):
    monkeypatch.setenv('ENIGMA_RUNS', str(COMMITTED))
    found = list_runs() + [run for sweep in sorted((COMMITTED/'sweeps').iterdir()) for run in read_records(sweep)]
    assert len(found) > 400 and len({run.path for run in found}) == len(found)
    for run in found:
        config, metrics, env, history = run.config, run.metrics, run.env, run.history
        assert run.finished and metrics and env['started'] and isinstance(history, list), run.name
        for part in (config, metrics, *history): assert not set(part) & set(runs.ALIASES), run.name
        name = run.path.relative_to(COMMITTED).as_posix()
        assert find_run(name).path == run.path
    old = find_run('train_enigma/20261121-063830-record-seed0')                         # numbers as the original files had them
    assert old.config['machine'] == 'input' and old.metrics['test_bits_per_char'] == 1.6640517468961797 and len(old.history) == 313
    assert len(np.load(find_run('sweeps/maskpro/mask_trial/' + next(r.path.name for r in read_records(COMMITTED/'sweeps'/'maskpro'))).open('losses.npy'))) > 100

def test_a_table_for_each_sweep():
    "Each number of table.csv is a record's; a sweep of two grids has the table of the last."
    import pandas as pd
    for folder in sorted((COMMITTED/'sweeps').iterdir()):
        table, packed = pd.read_csv(folder/'table.csv'), read_records(folder)
        column = next(c for c in ('bits_per_token', 'loss', 'exact_match', 'learned_loss', 'val_nll_nats') if c in table and any(c in run.metrics for run in packed))
        recorded = [run.metrics[column] for run in packed if column in run.metrics]
        assert all(min(abs(x - y) for y in recorded) <= 1e-9*abs(x) for x in table[column]) and len(table) <= len(packed), folder.name

@pytest.mark.skipif(not shutil.which('git') or not (ROOT/'.git').exists(), reason='not a git checkout')
def test_tracked_paths():
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split('\0')[:-1]
    assert len(listed) <= 450, len(listed)
    assert not [path for path in listed if {',', ' ', '^', '+'} & set(path)]
