"The papermill door: real papermill, in a real terminal and without one."
import fcntl, hashlib, json, os, pty, re, struct, subprocess, sys, sysconfig, termios

import nbformat
import pytest

SETTINGS = "steps: int = 3  # training steps\ndata = 'auto'"
START = (
    "from enigma_lab.lab.runs import start_run, finish_run\n"
    "run = start_run('{name}', dict(steps=steps))"
)
TRAIN = """import time
for step in range(1, steps + 1):
    time.sleep(.6)
    run.log(step=step, progress=step/steps, loss=3/step, tokens_per_s=5100.)
    if step == 5: run.log(step=step, val_bits_per_char=2.011)"""
NOTEBOOKS = {
    'nbs/train_toy.ipynb': [
        START.format(name='train_toy'),
        TRAIN,
        'finish_run(run, dict(val_nll_nats=.5))',
    ],
    'nbs/train_bad.ipynb': [
        START.format(name='train_bad'),
        "print('so far')",
        '1/0',
        "finish_run(run, dict(val_nll_nats=.5))",
    ],
    'nbs/train_quick.ipynb': [
        "import os\nprint(repr(data), steps, os.environ.get('ENIGMA_RUN_DIR'))"
    ],
    'foreign.ipynb': ['1 + 1'],
}

def write_checkout(folder):
    "A folder that passes for a checkout of Enigma Lab, with notebooks that cost nothing."
    (folder/'nbs').mkdir(parents=True)
    (folder/'settings.ini').write_text('[DEFAULT]\nlib_name = enigma_lab\n')
    for name, sources in NOTEBOOKS.items():
        cells = [
            nbformat.v4.new_code_cell(SETTINGS, metadata=dict(tags=['parameters'])),
            *map(nbformat.v4.new_code_cell, sources),
        ]
        kernel = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder/name)
    return folder

def environment():
    "As in a fresh shell with this Python's scripts in the path."
    own = {k: v for k, v in os.environ.items() if not k.startswith('ENIGMA_')}
    return dict(own, PATH=sysconfig.get_path('scripts') + os.pathsep + own['PATH'])

def screen(text):
    "The lines that a terminal shows after printing a text."
    lines, column = [''], 0
    for part in re.findall('\r|\n|\x1b\\[K|[^\r\n\x1b]+|\x1b', text):
        if part == '\r': column = 0
        elif part == '\n': lines, column = [*lines, ''], 0
        elif part == '\x1b[K': lines[-1] = lines[-1][:column]
        else:
            lines[-1], column = (
                lines[-1][:column] + part + lines[-1][column + len(part) :],
                column + len(part),
            )
    return [line.rstrip() for line in lines]

def in_terminal(*command, cwd):
    "Run a command in a terminal of 100 columns: its exit code and all that it wrote."
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 100, 0, 0))
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    chunks = []
    while True:
        try: chunks.append(os.read(ours, 65536))
        except OSError: break # the last process has closed the terminal
        if not chunks[-1]: break
    os.close(ours)
    return process.wait(60), b''.join(chunks).decode()

def piped(*command, cwd):
    "Run a command with pipes for stdin, stdout and stderr."
    return subprocess.run(
        command, cwd=cwd, env=environment(), input='', capture_output=True, text=True, timeout=120
    )

def run_folders(root, name):
    return sorted((root / 'runs' / name).glob('*')) if (root / 'runs').exists() else []

def sources(root):
    return {name: hashlib.md5((root / name).read_bytes()).hexdigest() for name in NOTEBOOKS}

@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    root = write_checkout(tmp_path_factory.mktemp('checkout')/'enigma').resolve()
    before = sources(root)
    yield root
    assert sources(root) == before # no command below has touched a notebook

def test_as_typed(toy):
    code, text = in_terminal('papermill', 'nbs/train_toy.ipynb', '-p', 'steps', '8', cwd=toy)
    assert code == 0, text
    folder, = run_folders(toy, 'train_toy')
    assert {p.name for p in folder.iterdir()} == {
        'config.json',
        'env.json',
        'history.jsonl',
        'metrics.json',
        'train_toy.ipynb',
    }
    assert json.loads((folder/'config.json').read_text()) == {'steps': 8}
    executed = nbformat.read(folder/'train_toy.ipynb', 4)
    assert (
        'steps = 8' in executed.cells[1].source
        and executed.cells[-1].metadata.papermill.status == 'completed'
    )
    seen = screen(text)
    assert f'enigma-lab: this run is recorded in runs/train_toy/{folder.name}' in seen
    assert 'step 5 · val 2.011 bits/char' in seen  # a validation keeps its line
    assert 'step 8 · 100 % · loss 0.375 · 5,100 tokens/s' in seen  # and so does the last row
    assert not any(line.startswith('step 1 ') for line in seen)  # the others were written over,
    assert len(re.findall(r'\r\x1b\[Kstep \d+ · \d+ % · loss', text)) >= 3  # as they came
    assert sum('step' in line for line in seen) == 2 and not any(
        'Executing' in line and 'loss' in line for line in seen
    )

def test_failing_notebook(toy):
    code, text = in_terminal('papermill', 'nbs/train_bad.ipynb', cwd=toy)
    assert code == 1 and 'ZeroDivisionError' in text
    folder, = run_folders(toy, 'train_bad')
    assert (folder/'config.json').exists() and not (folder/'metrics.json').exists()
    cells = nbformat.read(folder/'train_bad.ipynb', 4).cells
    assert any('so far' in o.get('text', '') for c in cells for o in c.get('outputs', []))

def test_pipes_and_another_folder(toy, tmp_path):
    before = run_folders(toy, 'train_toy')
    result = piped(
        sys.executable,
        '-m',
        'papermill',
        str(toy / 'nbs' / 'train_toy.ipynb'),
        '-p',
        'steps',
        '2',
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    # in the notebook's checkout, not where it was typed
    (folder,) = set(run_folders(toy, 'train_toy')) - set(
        before
    )
    assert (
        (folder / 'metrics.json').exists()
        and (folder / 'train_toy.ipynb').exists()
        and not list(tmp_path.iterdir())
    )
    assert result.stdout == ''
    lines = result.stderr.splitlines()
    assert (
        'step 2 · 100 % · loss 1.500 · 5,100 tokens/s' in lines
        and '\r' not in result.stderr
        and 'Executing:' not in result.stderr
    )

def test_a_given_output_is_stock(toy, tmp_path):
    code, text = in_terminal(
        'papermill',
        'nbs/train_quick.ipynb',
        str(tmp_path / 'out.ipynb'),
        '-p',
        'nonsense',
        '1',
        cwd=toy,
    )
    assert code == 0 and 'enigma-lab' not in text and 'Passed unknown parameter: nonsense' in text
    assert "'auto' 3 None" in str(nbformat.read(tmp_path/'out.ipynb', 4).cells[-1].outputs)
    assert not run_folders(toy, 'train_quick')

def test_a_foreign_notebook_is_stock(toy):
    code, text = in_terminal('papermill', 'foreign.ipynb', '-p', 'steps', '5', cwd=toy)
    assert code == 2 and "Missing argument 'OUTPUT_PATH'" in text and 'enigma-lab' not in text

def test_help_is_stock(toy):
    result = piped('papermill', 'nbs/train_quick.ipynb', '--help-notebook', cwd=toy)
    assert (
        'steps: int (default 3)' in result.stdout
        and 'enigma-lab' not in result.stdout + result.stderr
    )
    assert not run_folders(toy, 'train_quick')

def test_unknown_parameter(toy):
    before = run_folders(toy, 'train_toy')
    code, text = in_terminal('papermill', 'nbs/train_toy.ipynb', '-p', 'step', '5', cwd=toy)
    assert (
        code == 2
        and screen(text)[0]
        == "enigma-lab: train_toy.ipynb has no parameter 'step'; it has [steps, data]; "
        "did you mean steps?"
    )
    assert run_folders(toy, 'train_toy') == before and 'Traceback' not in text

def test_run_notebook(toy):
    code = (
        "from enigma_lab.lab.notebooks import run_notebook\n"
        "print(run_notebook('nbs/train_quick.ipynb', 'runs/train_quick/mine', "
        "data='5', steps=7).path)"
    )
    result = piped(sys.executable, '-c', code, cwd=toy)
    assert result.returncode == 0, result.stderr
    folder = toy/'runs'/'train_quick'/'mine'
    assert result.stdout.strip() == str(folder)
    assert f"'5' 7 {folder}" in str(nbformat.read(folder/'train_quick.ipynb', 4).cells[-1].outputs)
    again = piped(sys.executable, '-c', code, cwd=toy)
    assert again.returncode == 1 and 'a run is written once' in again.stderr

def test_the_door_costs_nothing_elsewhere():
    code = (
        "import sys, enigma_lab.lab.papermill_plugin\n"
        "heavy = 'torch', 'click', 'fastcore', 'yaml', 'papermill', 'nbformat'\n"
        "print([m for m in heavy if m in sys.modules])\n"
        "from papermill.iorw import papermill_io, LocalHandler\n"
        "print([s for s, h in papermill_io._handlers if s.startswith('enigma')], "
        "type(papermill_io.get_handler('nbs/a.ipynb')) is LocalHandler, 'torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, '-c', code], env=environment(), capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == ['[]', "['enigma-lab-door'] True False"]
