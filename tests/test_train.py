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

LONG = dict(preset='smoke', max_steps=120, eval_steps=10, save_steps=20, dropout=.1)

def training(home, text, *words, **config):
    "Say how a process trains on a text, with records in a home of its own."
    home.mkdir(exist_ok=True)
    (home/'config.json').write_text(json.dumps(dict(LONG, data=str(text), **config)))
    arguments = [sys.executable, '-m', 'enigma_lab.lm.train', '--config', str(home/'config.json')]
    return dict(args=[*arguments, *words], env=dict(os.environ, ENIGMA_RUNS=str(home/'runs')))

def wait_for_checkpoint(process, home):
    "Wait until a checkpoint is whole."
    deadline = time.time() + 120
    while not list(home.glob('runs/train_enigma/*/checkpoints/checkpoint-*/digests.json')):
        assert process.poll() is None and time.time() < deadline
        time.sleep(.02)

@pytest.fixture(scope='module')
def long_text(tmp_path_factory):
    "Write a text of 150 short chapters."
    night = 'It was a dark and stormy night; the rain fell. '
    path = tmp_path_factory.mktemp('text')/'text.txt'
    path.write_text('\n\n'.join(f'Chapter {i}. ' + night * (1 + i % 5) for i in range(150)))
    return path

def records(home, note): # folders of runs
    return [p for p in (home/'runs'/'train_enigma').iterdir() if p.name.endswith(note)]

def weights(run): return load_file(run/'checkpoint'/'model.safetensors')

@pytest.fixture(scope='module')
def whole(tmp_path_factory, long_text):
    "Weights of the training that nobody disturbs."
    home = tmp_path_factory.mktemp('whole')
    done = subprocess.run(**training(home, long_text), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return weights(records(home, '')[0])

@pytest.mark.proof('lab.checkpoint', 'lab.task', 'lab.trainer', seeds=(0,))
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_kill_and_resume(tmp_path, long_text, whole, number):
    """End a training by a signal, move its folder, and go on: the same weights, bit for bit.

    A third call finds the finished run, and trains nothing.
    """
    first = tmp_path/'first'
    process = subprocess.Popen(**training(first, long_text, '--note', 'killed'),
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for_checkpoint(process, first)
    process.send_signal(number)
    said = process.communicate()[1]
    killed, = records(first, 'killed')
    assert not (killed/'metrics.json').exists()
    if number == signal.SIGTERM:
        assert process.returncode == 128 + number and 'resume=auto goes on' in said, said
    second = tmp_path/'elsewhere'
    first.rename(second)
    go_on = training(second, long_text, '--note', 'resumed', '--resume', 'auto')
    resumed = subprocess.run(**go_on, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    after, = records(second, 'resumed')
    learned = weights(after)
    assert learned.keys() == whole.keys() and all(torch.equal(learned[k], whole[k]) for k in whole)
    history = [json.loads(line) for line in (after/'history.jsonl').read_text().splitlines()]
    origin = [row for row in history if 'resumed_from' in row]
    assert origin[0]['resumed_from'] == f'train_enigma/{killed.name}'
    assert 0 < origin[0]['step'] < 120
    assert str(tmp_path) not in (after/'env.json').read_text() + (after/'metrics.json').read_text()
    again = subprocess.run(**go_on, capture_output=True, text=True)
    assert again.returncode == 0 and str(after.relative_to(second)) in again.stdout, again.stderr
    assert len(records(second, '')) == 2

@pytest.mark.proof('lab.checkpoint', 'lab.task', 'lab.trainer', seeds=(0,))
def test_other_text_under_the_same_name_is_refused(tmp_path, long_text):
    "A checkpoint of one text does not go on with another."
    text = tmp_path/'text.txt'
    text.write_text(long_text.read_text())
    process = subprocess.Popen(**training(tmp_path, text), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    wait_for_checkpoint(process, tmp_path)
    process.kill(); process.wait()
    text.write_text(text.read_text().replace('stormy', 'starry'))
    changed = training(tmp_path, text, '--resume', 'auto')
    again = subprocess.run(**changed, capture_output=True, text=True)
    assert again.returncode == 1 and 'has changed since train_enigma/' in again.stderr, again.stderr
    assert len(records(tmp_path, '')) == 1

@pytest.mark.proof('lm.train', 'lab.task', seeds=(0,))
def test_builtin_data_by_module(tmp_path):
    result = subprocess.run(
        module(tmp_path, data='auto', max_chars=30_000), capture_output=True, text=True
    )
    assert result.returncode == 0 and ' bpc' in result.stdout, result.stderr
