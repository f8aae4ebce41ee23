"Records: names that are slugs, packing that loses nothing, and every committed run."
import json, random, re, shutil, subprocess, zipfile
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest

import enigma_lab
from enigma_lab.dev.records import PAGES, evaluation, headline, page_record
from enigma_lab.lab import runs, sweep
from enigma_lab.lab.runs import (Run, checkout, find_run, list_runs, load_runs, new_run_dir,
    open_run, pack_runs, pack_sweep, read_records, runs_in, slug, write_json)

ROOT = checkout(Path(enigma_lab.__file__).parent)
COMMITTED = ROOT/'runs'

def texts(number=3000, seed=0):
    "Random text from all of Unicode, from what is awkward in paths, and from what a slug may hold."
    rng = random.Random(seed)
    kinds = [lambda: chr(rng.randrange(0x110000)), lambda: rng.choice('aZ09.-_='),
        lambda: rng.choice('./\\ -_=:,^+~*?"<>|%$#\0\n\t\'`')]
    for _ in range(number):
        of = rng.choice([*([kind] for kind in kinds), kinds])
        yield ''.join(rng.choice(of)() for _ in range(rng.choice((0, 1, 2, 3, 10, 300))))

def test_slugs():
    safe = set('abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_=')
    for text in texts():
        word = slug(text)
        assert set(word) <= safe and len(word) <= 80 and slug(word) == word, (text, word)
        # so never '.' or '..', hidden, or an option
        assert bool(word) == bool(text) and word.strip('.-') == word, (text, word)
        assert (Path('x')/word).parts == ('x', *[word][:bool(word)])
        if set(text) <= safe and len(text) <= 80 and text.strip('.-') == text: assert word == text
    # notes in another script stay apart
    assert len({slug(chr(k)) for k in range(0x4e00, 0x4e40)}) == 64

@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ('ENIGMA_RUNS', 'ENIGMA_RUN_DIR'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('ENIGMA_RUNS', str(tmp_path/'runs'))
    return (tmp_path/'runs').resolve()

def test_a_note_makes_one_folder(home, monkeypatch):
    monkeypatch.setenv('TZ', 'Pacific/Auckland')
    runs.time.tzset()
    for k, text in enumerate(texts(60, 1)):
        path = new_run_dir('toy', text)
        assert path.parent == home/'toy' and path.is_dir() and (home/'toy').is_dir()
        now = runs.time.time()
        early, late = (datetime.fromtimestamp(t, timezone.utc) for t in (now - 60, now))
        assert f'{early:%Y%m%d-%H%M%S}' <= path.name[:15] <= f'{late:%Y%m%d-%H%M%S}'
    monkeypatch.undo(); runs.time.tzset()

def test_trial_names():
    rng = random.Random(2)
    for text in texts(500, 3):
        text = text.encode('utf-8', 'replace').decode()
        cell = dict(seed=rng.randrange(9), text=text, rate=rng.random())
        name = sweep.trial_name(cell, ['seed', 'text', 'rate'])
        assert slug(name) == name
        assert sweep.trial_name(dict(cell, seed=10), ['seed', 'text', 'rate']) != name

def make(folder, rng, arrays=True, checkpoint=False):
    "A finished run with whatever JSON can hold, and its bytes."
    run = Run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    words = lambda: ''.join(rng.choice('aé中\u2028\x85\n"\\😀') for _ in range(rng.randrange(6)))
    simple = [rng.random, lambda: rng.randrange(-9**20, 9**20), words, lambda: None, lambda: True]
    flat = lambda: rng.choice(simple)()
    value = lambda: rng.choice([flat, lambda: [flat(), flat()], lambda: {words(): flat()}])()
    for part in ('config', 'env', 'metrics'):
        write_json(folder/f'{part}.json', {f'{part}{k}': value() for k in range(5)})
    for step in range(rng.randrange(4)):
        loss = rng.choice([rng.random(), float('nan'), float('inf')])
        run.log(step=step, loss=loss, more=value())
    if arrays: np.save(folder/'losses.npy', np.array([rng.random() for _ in range(5)]))
    (folder/'figures').mkdir(exist_ok=True); (folder/'figures'/'loss.png').write_bytes(b'picture')
    if checkpoint:
        run.checkpoint.mkdir()
        (run.checkpoint/'model.safetensors').write_bytes(b'weights')
    return run

def seen(run):
    parts = run.config, run.env, run.metrics, run.history
    return run.name, run.finished, *map(json.dumps, parts)

@pytest.mark.parametrize('seed', range(5))
def test_packing_loses_nothing(home, seed):
    rng, sweep = random.Random(seed), home/'sweeps'/'x'
    made = [make(sweep/task/f'{k}', rng, rng.random() < .5, rng.random() < .5)
        for task in ('a', 'b') for k in range(3)]
    open_ = Run(sweep/'a'/'open'); open_.path.mkdir(); write_json(open_.path/'config.json', {})
    arrays = lambda run: {p.name: p.read_bytes() for p in run.path.glob('*.npy')}
    before = {run.path: (seen(run), arrays(run)) for run in made}
    pictures = sorted(sweep.glob('*/*/*/*'))
    # and the second time changes nothing
    for again in range(2):
        assert len(pack_sweep(sweep)) == 6
        for path, (told, files) in before.items():
            run = find_run(path.relative_to(home).as_posix())
            assert seen(run) == told and run.path == path and not (path/'config.json').exists()
            assert {name: run.open(name).read() for name in files} == files
        # what is not packed is where it was
        assert sorted(sweep.glob('*/*/*/*')) == pictures
        assert [run.path.name for run in runs_in(sweep/'a')] == ['0', '1', '2', 'open']
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
    # another run of the same name
    make(home/'toy'/'1', rng)
    with pytest.raises(FileExistsError, match='has other records'): pack_runs(home/'toy', [first])
    assert (home/'toy'/'1'/'config.json').exists() and seen(read_records(home/'toy')[0]) == told[0]
    (home/'toy'/'1'/'metrics.json').unlink()
    with pytest.raises(ValueError, match='only a finished run'): pack_runs(home/'toy', [first])

def test_what_reads_back_otherwise_is_kept(home, monkeypatch):
    run = make(home/'toy'/'1', random.Random(0))
    files = {p: p.read_bytes() for p in run.path.rglob('*') if p.is_file()}
    true = runs.write_whole
    spoils = {'records.jsonl': lambda text: text.replace(b'config1', b'config9'),
        'files.zip': lambda data: empty(home)}
    for name, spoil in spoils.items():
        def spoiled(path, content): true(path, spoil(content) if path.name == name else content)
        monkeypatch.setattr(runs, 'write_whole', spoiled)
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
    new = sweep.trial_name(cell, list(cell))
    made = make(folder/f'0-input,_roll,_no_-0.01-{new[-6:]}+2', random.Random(0))
    assert ',' not in new and sweep.finished_run(folder, new) == made
    assert not sweep.finished_run(folder, new[:-1] + 'x')
    pack_sweep(folder.parent)
    assert sweep.finished_run(folder, new).path == made.path and sweep.task_name(task) == 'cell'

def test_aliases(home, monkeypatch):
    run = make(home/'toy'/'1', random.Random(0))
    both = dict(chart=1, parametrization=2)
    write_json(run.path/'config.json', dict(chart='plu', shape=dict(chart='orthogonal'), a=both))
    # where there are both, the new one counts
    run.log(parametrization='new', chart='old')
    run.log(chart='plu', step=9)
    monkeypatch.setitem(runs.ALIASES, 'chart', 'parametrization')
    monkeypatch.setitem(runs.ALIASES, 'metrics0', 'first')
    for packed in (False, True):
        if packed: run, = pack_runs(home/'toy', [run])
        of = lambda name, **more: dict(parametrization=name, **more)
        assert run.config == of('plu', shape=of('orthogonal'), a=of(2))
        assert run.history[-2:] == [of('new'), of('plu', step=9)]
        assert 'first' in run.metrics and 'metrics0' not in run.metrics
        assert 'metrics0' in run.part('metrics')
        # a copy is given, not the record
        run.config['shape'].clear(); run.env.clear()
        assert run.config['shape'] and run.env

def test_every_committed_run(monkeypatch):
    monkeypatch.setenv('ENIGMA_RUNS', str(COMMITTED))
    sweeps = sorted((COMMITTED/'sweeps').iterdir())
    found = list_runs() + [run for sweep in sweeps for run in read_records(sweep)]
    assert len(found) > 400 and len({run.path for run in found}) == len(found)
    for run in found:
        config, metrics, env, history = run.config, run.metrics, run.env, run.history
        assert run.finished and metrics and env['started'] and isinstance(history, list), run.name
        for part in (config, metrics, *history): assert not set(part) & set(runs.ALIASES), run.name
        name = run.path.relative_to(COMMITTED).as_posix()
        assert find_run(name).path == run.path
    # numbers as the original files had them
    old = find_run('train_enigma/20261121-063830-record-seed0')
    assert (old.config['machine'], len(old.history)) == ('input', 313)
    assert old.metrics['test_bits_per_char'] == 1.6640517468961797
    for run in runs_in(COMMITTED/'sweeps'/'maskpro'/'mask_trial'):
        mean = np.load(run.open('losses.npy')).mean()
        assert mean == pytest.approx(run.metrics['loss'], rel=1e-6)

def test_a_table_for_each_sweep():
    "Each number of table.csv is a record's."
    import pandas as pd
    for folder in sorted((COMMITTED/'sweeps').iterdir()):
        table, packed = pd.read_csv(folder/'table.csv'), read_records(folder)
        known = {key for run in packed for key in run.metrics} & set(table)
        scores = ('bits_per_token', 'loss', 'exact_match', 'learned_loss', 'val_nll_nats',
                  'val_mse', 'val_nats_16')
        column = next(c for c in scores if c in known)
        recorded = [run.metrics[column] for run in packed if column in run.metrics]
        assert len(table) <= len(packed)
        for x in table[column]: assert min(abs(x - y) for y in recorded) <= 1e-9*abs(x), folder.name

@pytest.mark.skipif(not shutil.which('git') or not (ROOT/'.git').exists(), reason='needs git')
def test_tracked_paths():
    git = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True)
    listed = git.stdout.split('\0')[:-1]
    records = [path for path in listed if path.startswith('runs/')] # the rest is code and pages
    assert len(records) <= 256, len(records)
    assert not [path for path in listed if {',', ' ', '^', '+'} & set(path)]

@pytest.mark.parametrize('kind', PAGES)
def test_a_training_page_shows_its_record(kind):
    "What is committed is what the record's files say: its name, its seconds, each number."
    cells = json.loads((ROOT/'nbs'/f'{kind}.ipynb').read_text(encoding='utf-8'))['cells']
    cell, = (c for c in cells if f"show_record('{kind}')" in ''.join(c['source']))
    shown = [out['data'] for out in cell['outputs'] if 'data' in out]
    texts = [''.join(data['text/markdown']) for data in shown if 'text/markdown' in data]
    run = page_record(kind, PAGES[kind].note)
    assert texts[:2] == [headline(run), evaluation(run, PAGES[kind].judged)]
    assert run.path.is_relative_to(COMMITTED) and run.name in texts[0]
    words = dict(re.findall(r'^\| ([^|]+) \| ([^|]+) \|$', texts[1], re.M))
    for text, key in PAGES[kind].judged.items():
        if key in run.metrics: # said to three digits, by no code of ours
            assert abs(float(words[text].replace(',', '')) - run.metrics[key]) <= .00051, text
    pictures = [data for data in shown if 'image/png' in data]
    sample = any(text.startswith('```') and len(text) > 80 for text in texts)
    assert len(pictures) + sample == 2, 'a curve, and what the model makes'
