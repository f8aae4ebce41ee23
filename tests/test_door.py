"The papermill door: real papermill, in a real terminal and without one."
import fcntl, hashlib, json, os, pty, re, signal, struct, subprocess, sys, sysconfig, termios, time

import nbformat
import pytest

from enigma_lab.lab.runs import Run, checkout, run_state
from enigma_lab.lab.system import process_exists

ROOT = checkout(__file__)

SETTINGS = "steps: int = 3  # training steps\ndata = 'auto'"
START = (
    "from enigma_lab.lab import runs\n"
    "from enigma_lab.lab.runs import start_run, finish_run\n"
    "runs.environment = dict # the real one imports torch, for seconds\n"
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

@pytest.fixture(scope='module', autouse=True)
def children_hear_hangups():
    "Let children hear SIGHUP, also under `nohup`: what is ignored stays so in a child."
    before = signal.getsignal(signal.SIGHUP)
    if before is signal.SIG_IGN: signal.signal(signal.SIGHUP, lambda *_: None)
    yield
    signal.signal(signal.SIGHUP, before)

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

def in_terminal(*command, cwd, columns=100, **environ):
    "Run a command in a terminal: its exit code and all that it wrote."
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**environment(), **environ},
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
    # a validation keeps its line, with what was known beside it, and so does the last row
    assert 'step 5 · 62 % · loss 0.600 · val 2.011 bits/char · 5,100 tokens/s' in seen
    assert 'step 8 · 100 % · loss 0.375 · val 2.011 bits/char · 5,100 tokens/s' in seen
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

@pytest.mark.proof('lab.papermill_plugin')
def test_a_given_output(toy, tmp_path):
    "The executed notebook goes where it was wanted; the record is made, and has a copy."
    before = run_folders(toy, 'train_toy')
    out = str(tmp_path/'out_{steps}.ipynb')
    result = piped('papermill', 'nbs/train_toy.ipynb', out, '-p', 'steps', '1', cwd=toy)
    assert result.returncode == 0, result.stderr
    folder, = set(run_folders(toy, 'train_toy')) - set(before)
    assert f'enigma-lab: this run is recorded in runs/train_toy/{folder.name}' in result.stderr
    assert (folder/'metrics.json').exists() and 'step 1 · 100 %' in result.stderr
    executed = (tmp_path/'out_1.ipynb').read_bytes()
    assert (folder/'out_1.ipynb').read_bytes() == executed and b'completed' in executed

@pytest.mark.proof('lab.papermill_plugin')
def test_no_record_leaves_no_folder(toy, tmp_path):
    result = piped('papermill', 'nbs/train_quick.ipynb', str(tmp_path/'out.ipynb'), cwd=toy)
    assert result.returncode == 0, result.stderr
    assert (tmp_path/'out.ipynb').exists() and not run_folders(toy, 'train_quick')

REFUSED = [
    ['-p', 'stepz', '5'], ['-r', 'stepz', '5'], ['-y', '{stepz: 5}'], ['-f', 'given.yaml'],
    ['-b', 'e3N0ZXB6OiA1fQ=='], ['--engine', 'nbclient', '-p', 'stepz', '5', '--cwd', '/']]
COMMAND_LINES = """
import sys
from enigma_lab.lab import papermill_plugin
for words in {!r}:
    sys.argv = ['papermill', *words]
    try: papermill_plugin.install
    except SystemExit as end: print(end.code)
    else: print('goes on')"""

def test_an_output_path_switches_no_check_off(toy, tmp_path):
    (toy/'given.yaml').write_text('stepz: 5')
    paths = [], [str(tmp_path/'out.ipynb')], ['-']
    lines = [['nbs/train_quick.ipynb', *path, *words] for words in REFUSED for path in paths]
    result = piped(sys.executable, '-c', COMMAND_LINES.format(lines), cwd=toy)
    assert result.stdout.split() == ['2']*18, result.stderr
    said = result.stderr.splitlines()
    assert len(said) == 18 and all('did you mean steps?' in line for line in said)
    real = piped('papermill', *lines[1], cwd=toy)
    assert real.returncode == 2 and real.stderr.splitlines() == said[:1] and real.stdout == ''
    assert not run_folders(toy, 'train_quick') and not list(tmp_path.iterdir())

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

# inside the notebook, where no command line is read

PLAIN = """from dataclasses import dataclass

from enigma_lab.lab.settings import Settings, from_notebook

@dataclass(frozen=True)
class Plain:
    steps:int = 3
    rate:float = .1
    preset:str = 'cpu'

config = from_notebook(Settings(Plain, dict(cpu={})), globals())
print(config)"""

def notebook_of(path, *sources):
    "A notebook whose first cell has the parameters."
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata['tags'] = ['parameters']
    kernel = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path

def executed(path, **parameters):
    "What a notebook prints when a program runs it, or the error that ends it."
    import papermill
    out = path.with_name('executed.ipynb')
    try: papermill.execute_notebook(path, out, parameters, progress_bar=False)
    except papermill.PapermillExecutionError as error: return error.evalue
    return nbformat.read(out, 4).cells[-1].outputs[0].text

def test_a_program_that_runs_a_notebook(tmp_path):
    path = notebook_of(tmp_path/'plain.ipynb', "steps = None\nrate = None\npreset = 'cpu'", PLAIN)
    assert 'steps=5' in executed(path, steps=5)
    assert executed(path, stepps=5) == ("this notebook has no parameter 'stepps'; it has [steps, "
                                        "rate, preset, config]; did you mean steps?")

def real(name):
    "The sources of a training notebook's cells, to the one that makes the config."
    sources = [c.source for c in nbformat.read(ROOT/'nbs'/f'{name}.ipynb', 4).cells
               if c.cell_type == 'code']
    last = next(i for i, source in enumerate(sources) if 'from_notebook(' in source)
    return [*sources[:last], sources[last] + '\nprint(config)']

@pytest.mark.proof('lab.settings', seeds=(0,))
@pytest.mark.parametrize('name', sorted(path.stem for path in (ROOT/'nbs').glob('train_*.ipynb')))
def test_every_training_refuses_what_it_does_not_have(tmp_path, name):
    path = notebook_of(tmp_path/'a.ipynb', *real(name))
    assert 'did you mean max_steps?' in executed(path, max_stepss=5)

@pytest.mark.proof('lab.settings', seeds=(0,))
@pytest.mark.parametrize('given, said', [
    (dict(max_steps=5), 'max_steps=5'), (dict(max_steps='5'), 'max_steps=5'),
    (dict(max_steps=5.5), 'max_steps must be a whole number, got 5.5'),
    (dict(max_steps='5.5'), "max_steps must be a whole number, got '5.5'"),
    (dict(max_steps=True), 'max_steps must be a whole number, got True'),
    (dict(learning_rate=float('nan')), 'learning_rate must be a finite number'),
    (dict(preset='smok'), 'preset must be one of')])
def test_values_given_by_a_program(tmp_path, given, said):
    path = notebook_of(tmp_path/'a.ipynb', *real('train_maskpro'))
    assert said in executed(path, **given)

@pytest.mark.proof('lab.settings', seeds=(0,))
def test_an_edited_parameters_cell(tmp_path):
    "As in JupyterLab: nobody injects, the cell itself is changed, run, corrected and run again."
    import nbclient
    first, *rest = real('train_maskpro')
    def run(*sources):
        nb = nbformat.read(notebook_of(tmp_path/'a.ipynb', *sources), 4)
        try: nbclient.NotebookClient(nb).execute()
        except nbclient.exceptions.CellExecutionError as error: return error.evalue
        return nb.cells[-1].outputs[0].text
    wrong = first + '\nmax_stepss: int = 5'
    assert 'did you mean max_steps?' in run(wrong, *rest)
    assert 'did you mean max_steps?' in run(first, *rest[:-1], 'max_stepss = 5', rest[-1])
    tried = f"try:\n    {rest[-1].splitlines()[-2]}\nexcept ValueError: print('refused')"
    assert 'max_steps=5' in run(wrong, *rest[:-1], tried, first + '\nmax_steps = 5', rest[-1])

# the end of a run

def wait_for(condition, seconds=400):
    until = time.monotonic() + seconds # long, for the machine may be busy with other things
    while not condition() and time.monotonic() < until: time.sleep(.2)
    assert condition()

def lines_of(root):
    return sum(len(path.read_text().splitlines()) for path in root.rglob('history.jsonl'))

@pytest.mark.proof('lab.papermill_plugin', 'lab.trainer', seeds=(0,))
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_papermill_saves_a_checkpoint(tmp_path, number):
    environ = dict(environment(), ENIGMA_RUNS=str(tmp_path))
    command = ['papermill', str(ROOT/'nbs'/'train_enigma.ipynb'), '-p', 'preset', 'smoke',
               '-p', 'max_steps', '4000', '-p', 'test', 'False']
    process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    try:
        wait_for(lambda: lines_of(tmp_path) > 4)
        process.send_signal(number)
        said = process.communicate(timeout=200)[1]
    finally: process.kill()
    run = Run(next((tmp_path/'train_enigma').iterdir()))
    assert process.returncode == 1 and 'the same command with resume=auto goes on' in said
    assert run_state(run) == 'stopped' and run.env['stopped'] == number.name
    assert (run.path/'checkpoints'/f"checkpoint-{run.env['stopped_step']}").is_dir()
    assert 'stopped by' in (run.path/'train_enigma.ipynb').read_text() # papermill has saved it

@pytest.mark.proof('lab.trainer')
def test_nohup_is_heard():
    "A signal that is ignored does not end a training."
    from enigma_lab.lab.trainer import StopOnSignal, listening
    before, stop = signal.signal(signal.SIGHUP, signal.SIG_IGN), StopOnSignal()
    try:
        with listening(stop):
            signal.raise_signal(signal.SIGHUP)
            assert stop.number == 0
            signal.raise_signal(signal.SIGTERM)
            assert stop.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally: signal.signal(signal.SIGHUP, before)

# the line of a run

LINE = re.compile(r'step ([\d,]+) · (\d+) % · (\d+:\d\d)(?: · ETA (\d+:\d\d))? · loss \d+\.\d{3} · '
                  r'val \d+\.\d{3}(?: nats/token)? · [\d,]+ tokens/s')

def seconds(text): return sum(60**i * int(part) for i, part in enumerate(text.split(':')[::-1]))

@pytest.mark.proof('lab.progress', 'lab.task', seeds=(0,))
def test_the_line_of_a_run_and_of_its_resume(tmp_path, toy_text):
    command = [sys.executable, '-m', 'enigma_lab.lm.train', 'preset=smoke', f'data={toy_text}',
               'max_steps=150', 'eval_steps=10', 'save_steps=10', 'test=false', 'resume=auto']
    process = subprocess.Popen(command, env=dict(environment(), ENIGMA_RUNS=str(tmp_path/'runs')),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: lines_of(tmp_path) > 10)
        process.terminate()
        assert process.wait(200) == 128 + signal.SIGTERM
    finally: process.kill()
    first = Run(next((tmp_path/'runs'/'train_enigma').iterdir()))
    spent = max(row['wall_s'] for row in first.history if 'wall_s' in row)
    code, text = in_terminal(*command, cwd=tmp_path, columns=80, ENIGMA_RUNS=str(tmp_path/'runs'))
    assert code == 0, text
    shown = [LINE.fullmatch(line) for line in screen(text) if line.startswith('step')]
    assert all(shown) and 'loss in nats per token' in screen(text), text
    assert all(len(line) < 80 for line in screen(text) if line.startswith('step'))
    run = Run(max((tmp_path/'runs'/'train_enigma').iterdir()))
    looks = {row['step']: row for row in run.history if 'val_nll_nats' in row}
    assert [int(line[1]) for line in shown] == [*looks] == [*range(10, 151, 10)]
    for line, row in zip(shown, looks.values()):
        share, wall = row['progress'], row['wall_s']
        assert (int(line[2]), seconds(line[3])) == (round(100*share), round(wall))
        left = wall*(1 - share)/share
        assert line[4] is None if share == 1 else seconds(line[4]) == round(left)
    # what was spent before the resume counts
    later = [row for row in looks.values() if row['step'] > first.env['stopped_step']]
    assert later and later[0]['wall_s'] >= spent and later[0]['progress'] < 1

# without a terminal

def close_terminal_after(line, word, cwd):
    "Run a shell line in a terminal that is closed once it has shown a word: what it has shown."
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(cwd)
        os.execvpe('sh', ['sh', '-c', line], environment())
    shown = b''
    while word not in shown: shown += os.read(terminal, 65536)
    os.close(terminal)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGHUP # the shell has heard it
    return shown.decode()

@pytest.mark.proof('cli', 'lab.notebooks', 'lab.papermill_plugin')
def test_a_detached_training_survives_its_terminal(toy):
    before = run_folders(toy, 'train_toy')
    shown = close_terminal_after('enigma-lab train train_toy steps=8 --detach; sleep 60',
                                 b'goes on\r\n', toy)
    folder, = set(run_folders(toy, 'train_toy')) - set(before)
    assert f'this run is recorded in runs/train_toy/{folder.name}\r\n' in shown
    assert f'tail -f runs/train_toy/{folder.name}/log.txt' in shown
    wait_for((folder/'metrics.json').exists)
    pid = int(re.search(r'as process (\d+)', shown)[1])
    wait_for(lambda: not process_exists(pid))
    log = (folder/'log.txt').read_text()
    assert 'step 8 · 100 % · loss 0.375 · val 2.011 bits/char · 5,100 tokens/s\n' in log
    assert '\r' not in log and log.count('step ') == 3 # the first, the look, the last

def test_a_detached_training_is_checked_first(toy):
    before = run_folders(toy, 'train_toy')
    for word, said in {'stepz=5': 'did you mean steps?', 'steps': 'written name=value'}.items():
        result = piped('enigma-lab', 'train', 'train_toy', word, '--detach', cwd=toy)
        assert result.returncode == 2 and said in result.stderr and result.stdout == ''
    assert run_folders(toy, 'train_toy') == before

@pytest.mark.proof('cli', 'lab.notebooks')
@pytest.mark.parametrize('word, said', [('gpus=99', 'gpus=99 asked, this machine has'),
                                        ('max_steps=5.5', 'max_steps must be a whole number')])
def test_values_of_a_detached_training(tmp_path, word, said):
    environ = dict(environment(), ENIGMA_RUNS=str(tmp_path))
    result = subprocess.run(['enigma-lab', 'train', 'train_enigma', word, '--detach'], cwd=ROOT,
                            env=environ, capture_output=True, text=True)
    assert result.returncode == 2 and said in result.stderr and not list(tmp_path.iterdir())
