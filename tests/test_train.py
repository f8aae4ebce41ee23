"Whole trainings: the notebook through papermill, and the module."
import json, os, subprocess, sys

import nbformat, pytest, torch

from enigma_lab.lab.runs import checkout

ROOT = checkout(__file__)

pytestmark = pytest.mark.usefixtures('own_runs')

def module(tmp_path, *words, **config):
    (tmp_path / 'config.json').write_text(
        json.dumps(dict(dict(preset='smoke', data=str(tmp_path / 'text.txt')), **config))
    )
    return [
        sys.executable,
        '-m',
        'enigma_lab.lm.train',
        '--config',
        str(tmp_path / 'config.json'),
        *words,
    ]

def only_run(tmp_path): return next((tmp_path/'runs'/'train_enigma').iterdir())

def loaded(path, module, tmp_path):
    "Load a model and let it speak: with the library, without it, and untold to trust its code."
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"path = {str(path)!r}\n"
        "m, t = (k.from_pretrained(path, **how) for k in (AutoModelForCausalLM, AutoTokenizer))\n"
        "ids = t('Chapter', return_tensors='pt')\n"
        "out = m.generate(**ids, max_new_tokens=8, do_sample=False)\n"
        "print(type(m).__name__, m(**ids).logits.double().sum().item(), out.tolist())"
    )
    missing = "import sys\nsys.modules['enigma_lab'] = None\n" # as if it were not installed
    heads = (f"import {module}\nhow = {{}}\n",
             missing + "how = dict(trust_remote_code=True)\n", missing + "how = {}\n")
    env = os.environ | dict(HF_MODULES_CACHE=str(tmp_path/'modules'))
    return [subprocess.run([sys.executable, '-c', head + code], capture_output=True, text=True,
                           env=env, stdin=subprocess.DEVNULL) for head in heads]

@pytest.mark.proof('lm.train', 'lab.task', 'lab.trainer', seeds=(0,))
def test_the_notebook(tmp_path, toy_text):
    "Run papermill: every cell, a finished record, a checkpoint that loads in a fresh process."
    result = subprocess.run(
        [
            'papermill',
            str(ROOT / 'nbs' / 'train_enigma.ipynb'),
            '-p',
            'preset',
            'smoke',
            '-p',
            'data',
            str(toy_text),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    run = only_run(tmp_path)
    assert {p.name for p in run.iterdir()} >= {
        'config.json',
        'env.json',
        'history.jsonl',
        'metrics.json',
        'train_enigma.ipynb',
        'figures',
        'checkpoint',
    }
    assert all(
        cell.get('execution_count')
        for cell in nbformat.read(run / 'train_enigma.ipynb', 4).cells
        if cell.cell_type == 'code'
    )
    assert {p.name for p in (run/'figures').iterdir()} == {'loss.png', 'bits_per_char.png'}
    metrics = json.loads((run/'metrics.json').read_text())
    assert metrics['reconstruction_max_error_f32'] <= 1e-5 and metrics['test_bits_per_char'] > 0
    here, elsewhere, untold = loaded(run/'checkpoint', 'enigma_lab.lm.model', tmp_path)
    assert here.returncode == 0 and 'EnigmaForCausalLM' in here.stdout, here.stderr
    assert elsewhere.stdout == here.stdout, elsewhere.stderr
    assert untold.returncode != 0 and 'trust_remote_code=True' in untold.stderr

@pytest.mark.proof('lm.hybrid', 'lm.hybrid_train', 'lm.one_file', 'lm.publish', seeds=(0,))
def test_a_published_hybrid(tmp_path, own_runs):
    "Train a hybrid, publish it, and load the folder with and without the library."
    from enigma_lab.lab.settings import make_settings
    from enigma_lab.lm.hybrid_train import settings, train
    from enigma_lab.lm.publish import publish_run
    run = train(make_settings(settings, dict(preset='smoke')), test=False)
    folder = publish_run(str(run.path), tmp_path/'published')
    here, elsewhere, untold = loaded(folder, 'enigma_lab.lm.hybrid', tmp_path)
    assert here.returncode == 0 and 'HybridForCausalLM' in here.stdout, here.stderr
    assert elsewhere.stdout == here.stdout, elsewhere.stderr
    assert untold.returncode != 0 and 'trust_remote_code=True' in untold.stderr

def test_five_gpus_on_a_machine_without(tmp_path):
    "The line of the brief: a clear error in seconds, a partial notebook, no result."
    if torch.cuda.device_count() >= 5: pytest.skip('this machine has five GPUs')
    result = subprocess.run(
        ['papermill', str(ROOT / 'nbs' / 'train_enigma.ipynb'), '-p', 'gpus', '5'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode != 0
    assert (
        f'gpus=5 asked, this machine has {torch.cuda.device_count()} CUDA device(s); use -p gpus'
        in result.stderr
    )
    run = only_run(tmp_path)
    assert [p.name for p in run.iterdir()] == ['train_enigma.ipynb']

@pytest.mark.proof('lm.train', 'lab.task', seeds=(0,))
def test_builtin_data_by_module(tmp_path):
    result = subprocess.run(
        module(tmp_path, data='auto', max_chars=30_000), capture_output=True, text=True
    )
    assert result.returncode == 0 and ' bpc' in result.stdout, result.stderr
