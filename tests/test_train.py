"Whole trainings: the notebook through papermill, the module, a kill in the middle."
import json, os, signal, subprocess, sys, time

import nbformat, pytest, torch
from safetensors.torch import load_file

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
    code = (
        "import enigma_lab.lm.model\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"path = {str(run / 'checkpoint')!r}\n"
        "m, t = (k.from_pretrained(path) for k in (AutoModelForCausalLM, AutoTokenizer))\n"
        "out = m.generate(**t('Chapter', return_tensors='pt'), max_new_tokens=8)\n"
        "print(len(out[0]), type(m).__name__)"
    )
    loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert loaded.returncode == 0 and 'EnigmaForCausalLM' in loaded.stdout, loaded.stderr

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

def test_kill_and_resume(tmp_path, toy_text):
    "Kill after a checkpoint; the resumed run ends with the weights of the whole one, bit for bit."
    long = dict(max_steps=120, eval_steps=10, save_steps=10, dropout=.1)
    whole = subprocess.run(
        module(tmp_path, '--note', 'whole', **long), capture_output=True, text=True
    )
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        module(tmp_path, '--note', 'killed', **long),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    find = lambda note: [
        p for p in (tmp_path / 'runs' / 'train_enigma').iterdir() if p.name.endswith(note)
    ]
    deadline = time.time() + 120
    while not (
        find('killed')
        and list(find('killed')[0].glob('checkpoints/checkpoint-*/digests.json'))
    ):
        assert process.poll() is None and time.time() < deadline
        time.sleep(.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed, = find('killed')
    assert not (killed/'metrics.json').exists()
    resumed = subprocess.run(
        module(tmp_path, '--note', 'resumed', '--resume', 'auto', **long),
        capture_output=True,
        text=True,
    )
    assert resumed.returncode == 0, resumed.stderr
    after, = find('resumed')
    a, b = (load_file(run/'checkpoint'/'model.safetensors') for run in (find('whole')[0], after))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    origin = [
        json.loads(line)
        for line in (after / 'history.jsonl').read_text().splitlines()
        if 'resumed_from' in line
    ]
    assert (
        origin[0]['resumed_from'] == f'train_enigma/{killed.name}' and 0 < origin[0]['step'] < 120
    )

def test_builtin_data_by_module(tmp_path):
    result = subprocess.run(
        module(tmp_path, data='auto', max_chars=30_000), capture_output=True, text=True
    )
    assert result.returncode == 0 and ' bpc' in result.stdout, result.stderr
