"Tune from outside: the notebook, two processes, a fresh process, a conversation in a pipe."
import json, os, shutil, subprocess, sys

import nbformat, pytest, torch

from enigma_lab.lab.runs import checkout, find_run
from enigma_lab.lm.lora import load_adapted, make_tune_config, prepare_tuning, tune
from enigma_lab.lm.train import make_config, train

NOTEBOOK = checkout(__file__)/'nbs'/'train_lora.ipynb'

@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "A base that has hardly learned anything, but knows the tasks' characters."
    runs = tmp_path_factory.mktemp('lora')/'runs'
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('ENIGMA_RUNS', str(runs))
        yield train(make_config('smoke', data='tasks', max_chars=60_000, shape=dict(max_len=64)))

def notebook(base, *words):
    return subprocess.run(
        ['papermill', str(NOTEBOOK), '-p', 'preset', 'smoke', *words],
        capture_output=True,
        text=True,
        env=dict(os.environ, ENIGMA_RUNS=str(base.path.parents[1])),
    )

def newest(base):
    return max(
        (base.path.parents[1] / 'train_lora').iterdir(), key=lambda path: path.stat().st_mtime
    )

@pytest.mark.proof('lm.lora', 'data.instruct', 'lab.task', 'lab.trainer', seeds=(0,))
def test_the_notebook(base):
    "Run every cell; the adapter loads in a fresh process, merged = adapted, and answers in a pipe."
    result = notebook(base)
    assert result.returncode == 0, result.stderr
    run = newest(base)
    assert all(
        cell.get('execution_count')
        for cell in nbformat.read(run / 'train_lora.ipynb', 4).cells
        if cell.cell_type == 'code'
    )
    metrics = json.loads((run/'metrics.json').read_text())
    assert (
        metrics['base'] == base.name
        and 0 <= metrics['test_exact_easy'] <= 1
        and {p.name for p in (run / 'figures').iterdir()} == {'loss.png', 'exam.png'}
    )
    code = (
        "import torch\nfrom enigma_lab.lm.lora import load_adapted\n"
        "ids = torch.arange(262, 300)[None]\n"
        f"a, b = (load_adapted({str(run)!r}, merge=m)[0](ids).logits for m in (True, False))\n"
        "print((a - b).abs().max().item() < 1e-5)"
    )
    loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert loaded.stdout.strip() == 'True', loaded.stderr
    said = subprocess.run(
        ['enigma-lab', 'chat', str(run), '--max_new_tokens', '8'],
        input='Repeat the word.\nCopy it.\n\nnever asked\n',
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0 and '>' not in said.stdout, said.stderr

@pytest.mark.proof('lm.lora', 'data.instruct', 'lab.launch', 'lab.trainer', seeds=(0,))
def test_two_processes(base):
    "By DDP: the same loss as one process with the same global batch, and a record of rank 0."
    result = notebook(base, '-p', 'processes', '2', '-p', 'batch_size', '2')
    assert result.returncode == 0, result.stderr
    losses = lambda path: [
        row['loss']
        for row in map(json.loads, (path / 'history.jsonl').read_text().splitlines())
        if 'loss' in row
    ]
    two = newest(base)
    assert (two/'checkpoint'/'base.json').is_file()
    one = tune(make_tune_config('smoke', base=base.name), note='one')
    assert losses(two) == pytest.approx(losses(one.path), abs=1e-4)

@pytest.mark.proof('lm.lora', 'lab.runs', 'lab.task', seeds=(0,))
def test_a_base_anywhere(base, tmp_path, monkeypatch):
    """Tune on a run by name, on its folder elsewhere, its checkpoint, a folder without a record.

    Each adapter is the same, and is loaded again from another directory and after a move of both.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    here, there = tmp_path/'here', tmp_path/'there'
    shutil.copytree(base.path, here/'old')
    for load in (AutoModelForCausalLM, AutoTokenizer):
        load.from_pretrained(base.checkpoint).save_pretrained(here/'final_model')
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('ENIGMA_RUNS', str(here/'runs'))
    monkeypatch.chdir(here)
    shutil.copytree(base.path, here/'runs'/base.name)
    names = base.name, 'old/', '~/here/old/checkpoint', str(here/'final_model'), 'final_model/'
    runs = [tune(make_tune_config('smoke', base=name, max_steps=2), test=False) for name in names]
    ids = torch.arange(262, 300)[None]
    logits = lambda name: load_adapted(str(name))[0](ids).logits
    wanted = logits(runs[0].path)
    monkeypatch.chdir('/')
    monkeypatch.setenv('HOME', '/')
    for run in runs: assert torch.equal(logits(run.path), wanted)
    here.rename(there) # absolute names lead nowhere any more, but the way from adapter to base does
    for run in runs: assert torch.equal(logits(there/run.path.relative_to(here)), wanted)
    # alone, an adapter asks for its base, and takes it where it is said to be
    (there/'final_model').rename(tmp_path/'moved')
    alone = there/runs[-1].path.relative_to(here)
    with pytest.raises(ValueError, match='name the run or the folder where it is now as base'):
        load_adapted(str(alone))
    model, _ = load_adapted(str(alone), base=str(tmp_path/'moved'))
    assert torch.equal(model(ids).logits, wanted)
    # what is no base is refused before anything is trained
    refused = {str(alone): 'whole model', str(tmp_path/'none'): 'no finished run'}
    gpt2 = tmp_path/'gpt2'
    shutil.copytree(tmp_path/'moved', gpt2)
    about = json.loads((gpt2/'config.json').read_text())
    (gpt2/'config.json').write_text(json.dumps(dict(about, model_type='gpt2')))
    refused[str(gpt2)] = "of the kind 'enigma'"
    for name, why in refused.items():
        with pytest.raises((ValueError, FileNotFoundError), match=why):
            prepare_tuning(make_tune_config('smoke', base=name))
    assert find_run(str(tmp_path/'moved')).checkpoint == tmp_path/'moved'
