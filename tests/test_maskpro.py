"Learn masks from outside: four commands, presets, a kill, two processes, language models."
import json, os, re, shutil, signal, socket, subprocess, sys, time

import nbformat, pytest, torch
from safetensors.torch import load_file

from enigma_lab.lab.runs import checkout, list_runs, runs_in
from enigma_lab.ddpm.train import make_ddpm_config, train_ddpm
from enigma_lab.maskpro.learn import learn_masks
from enigma_lab.maskpro.masks import verify_masks
from enigma_lab.maskpro.presets import paper_presets, make_maskpro_config
from enigma_lab.maskpro.train import baseline, evaluate, learn, make_masks, train_maskpro
from enigma_lab.maskpro.modes import run_mode
from enigma_lab.maskpro.storage import read_masks

ROOT = checkout(__file__)

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Runs of their own, and a dense model of a few seconds."
    home = tmp_path_factory.mktemp('maskpro')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('ENIGMA_RUNS', str(home / 'runs'))
        patch.setenv('ENIGMA_CACHE', str(home / 'cache'))
        train_ddpm(make_ddpm_config('smoke'), test=False)
        yield home

def command(*words): return subprocess.run(words, capture_output=True, text=True)

def newest(): return list_runs('train_maskpro')[-1]

def same_masks(a, b): # of two records
    a, b = (read_masks(run.path/'learned_masks.safetensors') for run in (a, b))
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b))

@pytest.mark.proof(
    'maskpro.train', 'maskpro.config', 'maskpro.presets', 'maskpro.modes', 'maskpro.learn',
    'maskpro.estimators', 'maskpro.masks', 'maskpro.export', seeds=(0,))
def test_four_commands(home):
    "One after the other; each names the one before when it is missing."
    wrong = command('enigma-lab', 'maskpro', 'baseline')
    assert wrong.returncode == 1 and 'run `enigma-lab maskpro masks` first' in wrong.stderr
    begun = command('enigma-lab', 'maskpro', 'masks', 'preset=smoke', 'estimator=pge',
                    'protect=mid_block')
    assert begun.returncode == 0, begun.stderr
    dense = json.loads((newest().path/'initial_masks.json').read_text())['dense']
    assert dense['mid_block.attentions.0.to_q'] == "protected by 'mid_block'"
    for early, needed in (('learn', 'baseline'), ('evaluate', 'learn')):
        wrong = command('enigma-lab', 'maskpro', early)
        assert (
            wrong.returncode == 1
            and f'run `enigma-lab maskpro {needed}` first' in wrong.stderr
            and wrong.stderr.count('\n') == 1
        )
    for step in ('baseline', 'learn'):
        done = command('enigma-lab', 'maskpro', step)
        assert done.returncode == 0, done.stderr
    watched = command('enigma-lab', 'maskpro', 'monitor', '--rounds', '1')
    assert 'learned' in watched.stdout and newest().name in watched.stdout
    done = command('enigma-lab', 'maskpro', 'evaluate', '--num_samples', '12')
    assert done.returncode == 0 and 'learned_frechet' in done.stdout, done.stderr
    assert 'generated 12\n' in done.stdout
    assert 'a Fréchet distance needs more images than features, 32' in done.stderr
    path = newest().path
    for name in (
        'checkpoint/model_index.json',
        'checkpoint/unet/config.json',
        'checkpoint/scheduler/scheduler_config.json',
        'logits/logits.safetensors',
        'loss_training.npy',
        'loss_improvements.npy',
        'training_summary.json',
        'figures/training_curves.png',
        'evaluation_results.json',
        'initial_masks.safetensors',
        'learned_masks.safetensors',
        'baseline_losses.npz',
        'metrics.json',
    ):
        assert (path/name).is_file(), name
    again = command('enigma-lab', 'maskpro', 'learn')
    assert again.returncode == 1 and 'masks are learned once' in again.stderr

@pytest.mark.proof(
    'maskpro.train', 'maskpro.config', 'maskpro.presets', 'maskpro.modes', 'maskpro.learn',
    'maskpro.estimators', 'maskpro.masks', 'maskpro.export', seeds=(0,))
def test_presets_at_one_percent(home):
    table = run_mode(
        'full', parallel=0, name='presets', share=0.01, compute_fid=False, repeats=1, test=False
    )
    assert table['preset'].tolist() == paper_presets and (table['state'] == 'finished').all(), (
        table['state'].tolist()
    )
    assert table['train_steps'].tolist() == [50, 150, 250, 120, 300]

@pytest.mark.proof(
    'maskpro.train', 'maskpro.config', 'maskpro.presets', 'maskpro.modes', 'maskpro.learn',
    'maskpro.estimators', 'maskpro.masks', 'maskpro.export', seeds=(0,))
def test_two_processes_learn_the_mask_of_one(home):
    "Each does one part of every batch; one process does both."
    for estimator in ('pge', 'simple'):
        runs = []
        for how in (dict(processes=2), dict(gradient_accumulation_steps=2)):
            run = make_masks(
                make_maskpro_config('smoke', estimator=estimator, batch_size=8, budget=60, **how)
            )
            baseline(run); learn(run)
            runs.append(run)
        assert same_masks(*runs), estimator
        losses = [[row['loss'] for row in run.history if 'loss' in row] for run in runs]
        assert losses[0] == losses[1]

LONG = dict(budget=300, eval_steps=5, compute_fid=False, test=False, seed=5)

def wait_for_checkpoint(process, folder):
    "Wait until a checkpoint below a folder is whole; return its record's folder."
    deadline = time.time() + 240
    while not (found := list(folder.glob('**/checkpoints/checkpoint-*/digests.json'))):
        assert process.poll() is None and time.time() < deadline
        time.sleep(.01)
    return found[0].parents[2]

def end_after_a_checkpoint(process, folder, number):
    "Send a signal to the process that learns in a folder of records, after its first checkpoint."
    record = wait_for_checkpoint(process, folder)
    os.kill(json.loads((record/'env.json').read_text())['pid'], number)
    return process.wait()

@pytest.fixture(scope='module')
def whole(home):
    "The learning that nobody disturbs."
    return train_maskpro('smoke', **LONG)

def same_end(run, whole):
    "Compare everything that was learned and found with the undisturbed run's, bit for bit."
    logits = [load_file(r.path/'logits'/'logits.safetensors') for r in (run, whole)]
    assert all(torch.equal(logits[0][k], logits[1][k]) for k in logits[1])
    of = lambda r: {k: v for k, v in r.metrics.items() if not k.endswith('_s')}
    losses = lambda r: [row['loss'] for row in r.history if 'loss' in row]
    return same_masks(run, whole) and of(run) == of(whole) and losses(run) == losses(whole)

LEARN = (
    "import sys; from enigma_lab.maskpro.train import learn, open_record\n"
    "learn(open_record(sys.argv[1]))"
)
TRAIN = "import json, sys; from enigma_lab.maskpro.train import train_maskpro\n" \
        "train_maskpro('smoke', **json.loads(sys.argv[1]))"
PROOF = pytest.mark.proof('maskpro.train', 'maskpro.learn', 'maskpro.layer', 'lab.checkpoint',
                          'maskpro.masks', 'lab.sweep', seeds=(5,))

def start(*words): return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)

@PROOF
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_a_record_goes_on(home, whole, number):
    "Its step of learning is called again."
    words = [f'{k}={v}' for k, v in LONG.items()]
    begun = command('enigma-lab', 'maskpro', 'masks', 'preset=smoke', *words)
    assert begun.returncode == 0, begun.stderr
    cut = newest()
    process = start(sys.executable, '-c', LEARN, cut.name)
    wait_for_checkpoint(process, cut.path)
    process.send_signal(number)
    process.wait()
    assert not (cut.path/'learned_masks.safetensors').exists()
    assert cut.env.get('stopped') == (number.name if number == signal.SIGTERM else None)
    learn(cut); evaluate(cut)
    assert same_end(cut, whole)

@PROOF
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_resume_auto(home, whole, number, tmp_path, monkeypatch):
    "All four steps in a new record, after the runs folder has moved; then it is the answer."
    first, second = tmp_path/'first', tmp_path/'second'
    shutil.copytree(home/'runs'/'train_ddpm', first/'train_ddpm')
    monkeypatch.setenv('ENIGMA_RUNS', str(first))
    process = start(sys.executable, '-c', TRAIN, json.dumps(LONG))
    end_after_a_checkpoint(process, first/'train_maskpro', number)
    said = process.stderr.read()
    assert (number == signal.SIGKILL) or 'the same command with resume=auto goes on' in said
    first.rename(second)
    monkeypatch.setenv('ENIGMA_RUNS', str(second))
    killed, = list_runs('train_maskpro')
    words = [f'{k}={v}' for k, v in LONG.items()] + ['preset=smoke', 'resume=auto']
    for _ in range(2):
        done = command('enigma-lab', 'train', 'train_maskpro', *words)
        assert done.returncode == 0, done.stderr
        assert len(list_runs('train_maskpro')) == 2
    resumed = newest()
    assert same_end(resumed, whole) and killed.name in [
        row.get('resumed_from') for row in resumed.history]

@PROOF
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_a_preset_of_a_mode_goes_on(home, whole, number):
    "The trial is killed, its sweep is called again: one folder, and the end of the undisturbed."
    words = [f'{k}={v}' for k, v in LONG.items() if k != 'test']
    call = ['enigma-lab', 'maskpro', 'custom', 'smoke', *words, '--validation']
    folder = home/'runs'/'sweeps'/'maskpro-presets'/'train_maskpro'
    shutil.rmtree(folder.parent, ignore_errors=True)
    end_after_a_checkpoint(start(*call), folder, number)
    assert len(list(folder.iterdir())) == 1 and not runs_in(folder)[0].finished
    done = command(*call)
    assert done.returncode == 0 and 'finished' in done.stdout, done.stderr
    run, = runs_in(folder)
    assert len(list(folder.iterdir())) == 1 and any('resumed_from' in row for row in run.history)
    assert same_end(run, whole)

@PROOF
def test_two_processes_go_on(home):
    "Both are killed; both go on from the state that one of them wrote."
    how = dict(LONG, processes=2, batch_size=8, budget=200)
    undisturbed = train_maskpro('smoke', **how)
    process = subprocess.Popen([sys.executable, '-c', TRAIN, json.dumps(how)],
                               stderr=subprocess.DEVNULL, start_new_session=True)
    while newest() == undisturbed:
        assert process.poll() is None
        time.sleep(.01)
    wait_for_checkpoint(process, newest().path)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert same_end(train_maskpro('smoke', resume='auto', **how), undisturbed)

@PROOF
@pytest.mark.parametrize('estimator', ['simple', 'pge'])
def test_two_machines_learn_the_mask_of_one(home, estimator, tmp_path, monkeypatch):
    "Give two launchers the same command: one record, and the mask of one process."
    shutil.copytree(home/'runs'/'train_ddpm', tmp_path/'train_ddpm')
    monkeypatch.setenv('ENIGMA_RUNS', str(tmp_path))
    how = dict(estimator=estimator, batch_size=8, budget=60, seed=5, compute_fid=False, test=False)
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    machines = [start(sys.executable, '-c', TRAIN, json.dumps(dict(
        how, nodes=2, node_rank=k, master=f'127.0.0.1:{port}'))) for k in (1, 0)]
    said = [machine.communicate(timeout=400)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    two, = list_runs('train_maskpro')
    assert two.finished and two.config['node_rank'] == 0
    assert two.env['launcher'] == 'spawn, because there are several machines'
    one = train_maskpro('smoke', gradient_accumulation_steps=2, **how)
    losses = [[row['loss'] for row in run.history if 'loss' in row] for run in (one, two)]
    assert same_masks(one, two) and losses[1] == pytest.approx(losses[0], abs=1e-6)

# step, share, elapsed, ETA, loss, validation, rate
LINE = (r'step \d+ · \d+ % · \d+:\d\d · ETA \d+:\d\d · loss [\d.]+ · val_loss [\d.]+ · '
        r'[\d.,]+ forwards/s')

@PROOF
def test_a_terminal_shows_how_long_it_will_take(home, tmp_path, monkeypatch):
    "Read the line of a step, of a notebook that is killed, and of one that goes on with it."
    shutil.copytree(home/'runs'/'train_ddpm', tmp_path/'train_ddpm')
    monkeypatch.setenv('ENIGMA_RUNS', str(tmp_path))
    assert command('enigma-lab', 'maskpro', 'masks', 'preset=smoke', 'seed=1').returncode == 0
    done = command('enigma-lab', 'maskpro', 'learn')
    assert re.search(LINE, done.stdout), done
    words = [f'{k}={v}' for k, v in LONG.items()] + ['preset=smoke']
    process = start('enigma-lab', 'train', 'train_maskpro', *words)
    while len(list_runs('train_maskpro')) < 2: time.sleep(.1)
    end_after_a_checkpoint(process, newest().path, signal.SIGKILL)
    table = command('enigma-lab', 'maskpro', 'monitor', '--rounds', '1').stdout
    assert re.search(r'learning +\d+ +\d+ +\d+:\d\d ', table), table
    killed, begun = newest(), time.time()
    done = command('enigma-lab', 'train', 'train_maskpro', *words, 'resume=auto')
    took = time.time() - begun
    assert done.returncode == 0 and re.search(LINE, done.stderr), done.stderr
    at = max(row['step'] for row in newest().history if 'resumed_from' in row)
    clocks = [[(row['step'], row['wall_s']) for row in run.history if 'wall_s' in row]
              for run in (killed, newest())]
    done = [[(step, s) for step, s in rows if step <= at] for rows in clocks]
    assert done[0] == done[1] # what was done is not done again
    before = max(s for step, s in clocks[0] if step <= at)
    seconds = [s for _, s in clocks[1]]
    assert seconds == sorted(seconds) and before < seconds[-1] < before + took

@PROOF
def test_the_parent_starts_no_pool(home, tmp_path):
    "Prepare a model with layers that several threads would share; a forked child can compute."
    code = ("import sys, torch; torch.set_num_threads(4)\n"
            "from enigma_lab.lab.launch import pool_is_lost\n"
            "from enigma_lab.maskpro import train as t\n"
            "t.why_spawn = lambda *_: '' # as in a kernel\n"
            "c = t.make_maskpro_config('smoke', processes=2, model=sys.argv[1], estimator='pge')\n"
            "task = t.load_task(c); run = t.make_masks(c, task=task)\n"
            "t.baseline(run, task); print(pool_is_lost(4), end=' ')\n"
            "torch.ones(2**21).sum(); print(pool_is_lost(4))")
    dense = str(ROOT/'runs'/'showcase'/'maskpro'/'dense')
    result = subprocess.run([sys.executable, '-c', code, dense], capture_output=True, text=True,
                            timeout=200, env={**os.environ, 'OMP_NUM_THREADS': '4',
                                              'ENIGMA_RUNS': str(tmp_path)})
    assert result.stdout.split() == ['False', 'True'], result

@pytest.mark.proof(
    'maskpro.train', 'maskpro.config', 'maskpro.presets', 'maskpro.modes', 'maskpro.learn',
    'maskpro.estimators', 'maskpro.masks', 'maskpro.export', seeds=(0,))
def test_the_notebooks(home):
    for name, words in dict(train_ddpm=(), train_maskpro=('-p', 'estimator', 'pge')).items():
        result = command(
            'papermill',
            str(ROOT / 'nbs' / f'{name}.ipynb'),
            '-p',
            'preset',
            'smoke',
            '-p',
            'test',
            'False',
            *words,
        )
        assert result.returncode == 0, result.stderr
        path = max((home/'runs'/name).iterdir(), key=lambda p: p.stat().st_mtime)
        assert all(
            cell.get('execution_count')
            for cell in nbformat.read(path / f'{name}.ipynb', 4).cells
            if cell.cell_type == 'code'
        )
    metrics = json.loads((path/'metrics.json').read_text())
    assert {
        'learned_loss',
        'initial_loss',
        'dense_loss',
        'learned_minus_initial_from',
        'floor_frechet',
        'train_changed',
    } <= metrics.keys()

@pytest.mark.parametrize('name', ['initial', 'learned'])
def test_masks_of_the_showcase(name):
    "Its dense model with its learned masks is its pipeline, to the last bit."
    from enigma_lab.ddpm.train import load_pipeline
    from enigma_lab.maskpro.masks import remove_masks
    from enigma_lab.maskpro.storage import load_masks
    folder = ROOT/'runs'/'showcase'/'maskpro'
    saved, (unet, _) = load_pipeline(folder/'checkpoint')[0].state_dict(), load_pipeline(
        folder/'dense')
    with pytest.warns(UserWarning, match='did not note for which weights'):
        load_masks(folder/f'{name}_masks.safetensors', unet)
    found = remove_masks(unet).state_dict()
    assert all(torch.equal(found[k], v) for k, v in saved.items()) == (name == 'learned')

@pytest.mark.parametrize('kind', ['gpt2', 'enigma'])
def test_language_models(kind):
    "The same call for any causal language model; embeddings and head stay dense."
    torch.manual_seed(0)
    if kind == 'gpt2':
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=2)
        )
    else:
        from enigma_lab.lm.model import EnigmaConfig, EnigmaForCausalLM

        model = EnigmaForCausalLM(
            EnigmaConfig(
                vocab_size=40, dim=32, num_layers=2, num_heads=2, max_len=16, machine='none'
            )
        )
    text = torch.arange(16)[None].repeat(4, 1) + torch.arange(4)[:, None]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=text, labels=text).loss.backward()
        optimizer.step()
    loss = lambda model, ids: model(input_ids=ids, labels=ids).loss
    for estimator, batches in (('simple', lambda step: text), ('pge', [text[:2], text[2:]])):
        run = learn_masks(model, loss, batches, estimator, budget=60, initial='random')
        verify_masks(model)
        assert not any(
            'embed' in layer.name or 'wte' in layer.name or 'head' in layer.name
            for layer in run.masks.layers
        )
        if estimator == 'simple':
            first, last = (run.masks.loss(loss, text, mask) for mask in (run.initial, run.learned))
            assert last < first
