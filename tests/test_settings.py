"""Every setting of every training is reached by papermill, by words, by a file and by `python -m`.

None is written twice.
"""
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from enigma_lab.dev.parameters import training_notebooks
from enigma_lab.lab.notebooks import find_settings, notebook_parameters, read_head
from enigma_lab.lab.runs import checkout
from enigma_lab.lab.settings import (
    check_value, from_notebook, kinds_of, make_settings, write_settings)
from enigma_lab.lab.task import read_arguments, read_words

ROOT = checkout(Path(__file__).parent)
NOTEBOOKS = {path.stem: path for path in training_notebooks(ROOT)}
VALID = dict( # another value than the default, where not any will do
    preset='smoke', optimizer='adamw', precision='fp32', tracker='tensorboard', machine='both',
    rotor='roll', leaks='report',
    method='full', initial='random', estimator='pge', groups='flat', schedule='linear', size='tiny',
    parametrization='plu', grid=2**-10, reversible=True, exact=True, conditioning='cross',
    positions='rope', activation='relu2', architecture='multiscale', coupling='affine',
    memory='reverse', formula='prob', order='random', rate='cosine', pooling='cls',
    norm=dict(pre='post', rms='layer'), weights='bound', data='small', phase=2,
    base='a run', effective_batch=0,
    shape={}, save_steps=6000, position_rows=512, eval_steps=50, n=1, num_positions=8, dim=96,
    num_heads=4, epochs=2, processes=2,
    gradient_accumulation_steps=2, max_steps=7, minutes=4, budget=77, share=.5, dropout=.1, gpus=0,
    config='', nodes=2, node_rank=1, master='localhost:29500')
MACHINES = dict(nodes=2, master='localhost:29500') # two machines, which must meet somewhere
# need more than themselves, or a device
LOOSE = {'gpus', 'sharded', 'config', 'effective_batch', 'shape', 'rev_scale', 'exact'}

def source(path):
    cells = nbformat.read(path, 4).cells
    return next(c.source for c in cells if 'parameters' in c.metadata.get('tags', []))

def settings_of(name): return find_settings(read_head(source(NOTEBOOKS[name])))

def another(setting):
    "A value that is not the default."
    if setting.name in VALID: # one value, or one for each default
        value = VALID[setting.name]
        return value.get(setting.default, value) if isinstance(value, dict) else value
    kind, now = kinds_of(setting.kind)[0], setting.default
    if kind is bool: return not now
    if kind in (int, float): return kind((now or 0) + 1 if kind is int else (now or 0)/2 + .01)
    return 'else'

def reached(settings, config, name, value):
    "Whether a config holds a value under its name, or in the model's shape."
    found = getattr(config, name) if name in settings.own else config.shape.get(name)
    return found == value

def ways(settings, name, value, folder):
    "A config by each way of starting a training."
    both = (dict(data='small', phase=2, base='a run') if name in ('phase', 'base')
            and 'phase' in settings.all else MACHINES if name in ('nodes', 'node_rank') else {})
    given = {**both, name: value}
    # as papermill fills a cell of which nothing else is set
    cell = {key: None for key in settings.all}
    yield from_notebook(settings, {**cell, **given})
    # -r, and words of enigma-lab
    yield from_notebook(settings, {**cell, **{k: str(v) for k, v in given.items()}})
    file = Path(folder)/'settings.yaml'
    file.write_text(yaml.safe_dump(given), encoding='utf-8')
    yield from_notebook(settings, {**cell, 'config': str(file)})
    yield make_settings(settings, dict(config=str(file)))
    yield read_arguments(settings, 'train', ['--config', str(file)])
    yield read_arguments(settings, 'train', [f'{k}={v}' for k, v in given.items()])

@pytest.mark.parametrize('name', NOTEBOOKS)
def test_every_setting_by_every_way(name, tmp_path):
    settings, count = settings_of(name), 0
    assert set(notebook_parameters(NOTEBOOKS[name])) == settings.all.keys()
    for setting in settings.all.values():
        if setting.name in LOOSE: continue
        value = another(setting)
        check_value(setting, value)
        for config in ways(settings, setting.name, value, tmp_path):
            assert reached(settings, config, setting.name, value), (setting.name, value)
            count += 1
    assert count >= 6*(len(settings.all) - len(LOOSE))

@pytest.mark.parametrize('name', NOTEBOOKS)
def test_a_run_can_be_repeated_from_its_file(name, tmp_path):
    settings = settings_of(name)
    config = make_settings(settings, dict(preset='smoke', seed=3))
    path = write_settings(config, tmp_path/'config.yaml')
    assert make_settings(settings, dict(config=str(path))) == config
    assert read_arguments(settings, 'train', ['--config', str(path)]) == config

@pytest.mark.parametrize('name', NOTEBOOKS)
def test_each_setting_has_a_meaning(name):
    "Its comment stands beside the field and in the notebook, and papermill lists it."
    settings, lines = settings_of(name), source(NOTEBOOKS[name]).splitlines()
    for setting in settings.all.values():
        assert setting.comment, f'{name}: {setting.name} needs a comment beside the field'
        assert any(line.startswith(f'{setting.name}: ') and line.endswith(f'# {setting.comment}')
                   for line in lines)

BAD = dict(minutes="'3'", learning_rate='nan', seed='1.5', batch_size='2.5',
           gradient_checkpointing='perhaps')

@pytest.mark.parametrize('name', ['train_enigma', 'train_lora', 'train_ddpm'])
def test_what_makes_no_sense_is_refused_by_every_way(name, tmp_path):
    settings = settings_of(name)
    for field, text in BAD.items():
        cell = {key: None for key in settings.all}
        file = tmp_path/'bad.yaml'
        file.write_text(yaml.safe_dump({field: yaml.safe_load(text) if field != 'learning_rate'
                                        else float('nan')}))
        tries = [lambda: from_notebook(settings, {**cell, field: text}),
                 lambda: make_settings(settings, dict(config=str(file))),
                 lambda: read_arguments(settings, 'train', [f'{field}={text}'])]
        for attempt in tries:
            with pytest.raises(ValueError, match=f'{field} must be'): attempt()
    for both in (dict(effective_batch=32, gradient_accumulation_steps=3, batch_size=8),
                 dict(max_char=1)):
        with pytest.raises(ValueError): make_settings(settings, both)
    with pytest.raises(ValueError, match='name=value'): read_words(['seed'])

A_NEW_FIELD = """
from contextlib import redirect_stdout
from io import StringIO
from enigma_lab.ddpm.train import settings
from enigma_lab.dev.parameters import main
from enigma_lab.lab.settings import from_notebook, make_settings
from enigma_lab.lab.task import read_arguments
def code(*words):
    try: main(words)
    except SystemExit as e: return e.code
    return 0
before = code('--check')
with redirect_stdout(StringIO()): main([])
ways = (from_notebook(settings, dict(warmth=.25)), make_settings(settings, dict(warmth=.25)),
        read_arguments(settings, 'x', ['warmth=.25']))
print(f"|{before}|{code('--check')}|{' '.join(str(way.warmth) for way in ways)}")
"""

def test_a_new_field_is_reached_after_one_command(tmp_path):
    "In a copy of the package; without the command the check fails."
    import shutil
    shutil.copytree(ROOT/'enigma_lab', tmp_path/'enigma_lab',
                    ignore=shutil.ignore_patterns('__pycache__'))
    (tmp_path/'nbs').mkdir()
    shutil.copy(ROOT/'settings.ini', tmp_path)
    for path in NOTEBOOKS.values(): shutil.copy(path, tmp_path/'nbs')
    module = tmp_path/'enigma_lab/ddpm/train.py'
    text = module.read_text(encoding='utf-8')
    field = "    preset:str = 'cpu' # preset, see `presets`\n"
    assert field in text
    module.write_text(text.replace(field,
                                   field + "    warmth:float = .5 # of the colours, 0 … 1\n"),
                      encoding='utf-8')
    done = subprocess.run([sys.executable, '-c', A_NEW_FIELD], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, 'PYTHONPATH': str(tmp_path)})
    said = done.stdout.split('|')
    assert 'train_ddpm.ipynb' in said[0] and said[1:] == ['1', '0', '0.25 0.25 0.25\n'], (
        done.stdout + done.stderr)
    assert 'warmth: float = 0.5  # of the colours, 0 … 1' in source(tmp_path/'nbs/train_ddpm.ipynb')
