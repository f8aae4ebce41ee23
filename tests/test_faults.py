"""Trainings under hostile use: whatever ends one, the same command goes on, to the same bits.

The points are named, or drawn with `SEED`. Each finished run is scored again, from the model on
the disk (`faults.rescore`).
"""
import json, multiprocessing, os, random, shutil, signal, time
from dataclasses import dataclass
from pathlib import Path

import numpy as np, psutil, pytest, torch
from safetensors.torch import load_file

import faults
from faults import Fault
from enigma_lab.lab.checkpoint import last_checkpoint
from enigma_lab.lab.runs import Run, beating, runs_in, write_json

SEED = 17 # of the drawn points

LM = 'enigma_lab.lm.train:task'
SMALL = ['preset=smoke', 'max_steps=16', 'eval_steps=2', 'save_steps=4', 'dropout=.1',
         'batch_size=4', 'decay_share=0', '--no-test'] # its best look is in the middle

STEP = 'transformers.trainer:Trainer.training_step'
WEIGHTS = 'transformers.modeling_utils:safe_save_file'

def learning(run):
    """Return what a history says of each update, clocks apart.

    The training loss is a mean since the line before, which a resume between two lines divides.
    """
    rows = [{k: v for k, v in row.items() if k != 'loss' and not k.endswith('_s')}
            for row in run.history]
    return [row for row in rows if 'step' in row and 'resumed_from' not in row]

@dataclass
class Training:
    "Say how a task trains, where, and what it came to undisturbed."
    address:str
    words:list
    home:Path
    text:Path
    file:str = 'model.safetensors'
    records:str = '' # their folder in runs/
    step:str = STEP # the call of an update
    saved:str = 'optimizer.pt' # the last file but one of a checkpoint
    newest:str = 'checkpoint-8/optimizer.pt' # what a save of it is given, in the middle
    save:str = 'torch:save' # which writes it
    weights:dict = None
    history:list = None
    moments:int = 0
    bring:Path|None = None # records of what it begins with

    def runs(self, home):
        "List the folders of its records, oldest first."
        name = self.records or {
            'lm.train': 'train_enigma', 'lm.lora': 'train_lora', 'sgdd.train': 'train_sgdd',
            'ddpm.train': 'train_ddpm'}[self.address[11:].partition(':')[0]]
        if 'sweeps' in name: return runs_in(home/'runs'/name) # packed when all are finished
        found = [Run(p) for p in (home/'runs'/name).glob('*') if p.is_dir()]
        return sorted(found, key=lambda run: run.path.stat().st_ctime if not (
            run.path/'config.json').exists() else (run.path/'config.json').stat().st_ctime)

    def train(self, home, *words, **how):
        if self.bring and not home.exists(): shutil.copytree(
            self.bring, home/'runs'/self.bring.name)
        return faults.train(home, self.address, [*self.words, *words], **how)

    def start(self, home, *words, **how):
        return faults.start(home, self.address, [*self.words, *words], **how)

    def learned(self, run): return load_file(run.checkpoint/self.file)

    def resume(self, home, **how):
        "Go on until the end, and compare every weight with the undisturbed training's."
        code, said = self.train(home, '--resume', 'auto', **how)
        assert code == 0, said
        run = self.runs(home)[-1]
        assert run.finished and f'{run.path.name}: ' in said, said
        mine = self.learned(run)
        assert mine.keys() == self.weights.keys()
        assert all(torch.equal(mine[k], self.weights[k]) for k in mine), said
        assert learning(run) == self.history
        return run, said

@pytest.fixture(scope='module')
def lm(tmp_path_factory):
    "Train a language model that nobody disturbs."
    home = tmp_path_factory.mktemp('lm')
    night = 'It was a dark and stormy night; the rain fell. '
    text = home/'text.txt'
    text.write_text('\n\n'.join(f'Chapter {i}. ' + night * (1 + i % 5) for i in range(60)))
    task = Training(LM, [f'data={text}', *SMALL], home, text)
    return undisturbed(task)

def undisturbed(task, **how):
    code, said = task.train(task.home/'whole', **how)
    assert code == 0, said
    run, = task.runs(task.home/'whole')
    task.weights, task.history = task.learned(run), learning(run)
    task.moments = int((task.home/'whole'/'moments.txt').read_text())
    return task

NAMED = dict(
    before_the_record=Fault('os:replace', 'config.json'),
    between_config_and_env=Fault('os:replace', 'env.json'),
    before_the_first_update=Fault(STEP),
    before_the_first_checkpoint=Fault(STEP, nth=2),
    within_the_first_checkpoint=Fault(WEIGHTS, 'checkpoint-2', how='within'),
    in_an_update=Fault('accelerate:Accelerator.clip_grad_norm_', nth=11),
    within_weights=Fault(WEIGHTS, 'checkpoint-8', how='within', room=100_000),
    within_the_optimizer=Fault('torch:save', 'checkpoint-8/optimizer.pt', how='within',
                               room=170_000),
    between_two_files=Fault('torch:save', 'checkpoint-8/scheduler.pt'),
    within_the_generators=Fault('torch:save', 'checkpoint-8/rng_state.pth', how='within'),
    within_the_state=Fault('transformers.trainer_callback:TrainerState.save_to_json',
                           'checkpoint-8', how='within'),
    before_the_digests=Fault('enigma_lab.lab.checkpoint:file_digests', 'checkpoint-8'),
    digests_not_in_place=Fault('os:replace', 'checkpoint-8/digests.json'),
    digests_in_place=Fault('os:replace', 'checkpoint-8/digests.json', how='after'),
    in_the_rotation=Fault('os:unlink', 'optimizer.pt', how='after'),
    after_the_rotation=Fault('os:rmdir', 'checkpoint-2', how='after'),
    in_a_look_at_validation=Fault('transformers.trainer:Trainer.prediction_step', nth=9),
    torn_history=Fault('enigma_lab.lab.runs:RunWriter.log', nth=7, how='within', room=1000),
    loading_the_best=Fault('transformers.trainer:Trainer._load_best_model'),
    within_the_model=Fault(WEIGHTS, 'checkpoint.part', how='within'),
    model_not_in_place=Fault('os:replace', 'checkpoint.part'),
    before_the_evaluation=Fault('os:replace', 'checkpoint.part', how='after'),
    in_the_evaluation=Fault('enigma_lab.lm.train:machine_report'),
    in_finish_run=Fault('os:replace', 'metrics.json'))

@pytest.mark.proof('lab.checkpoint', 'lab.task', 'lab.trainer', 'lab.runs', seeds=(0,))
@pytest.mark.parametrize('fault', NAMED.values(), ids=NAMED)
def test_killed_at_a_named_point(tmp_path, lm, fault):
    "Kill a training there; the same command with `resume=auto` goes on."
    code, said = lm.train(tmp_path, fault=fault)
    assert code in (-signal.SIGKILL, -signal.SIGXFSZ), said
    lm.resume(tmp_path)

SIGNALS = 'SIGKILL', 'SIGTERM', 'SIGKILL', 'SIGINT', 'SIGKILL', 'SIGHUP'
draw = random.Random(SEED)
DRAWN = [(round(draw.random(), 4), SIGNALS[i % len(SIGNALS)]) for i in range(24)]

@pytest.mark.proof('lab.checkpoint', 'lab.task', 'lab.trainer', 'lab.runs', seeds=(17,))
@pytest.mark.parametrize('share, name', DRAWN)
def test_ended_at_a_drawn_moment(tmp_path, lm, share, name):
    "Send a signal at a moment drawn among all batches and all changes of the record's folder."
    moment = 1 + int(share*lm.moments)
    code, said = lm.train(tmp_path, fault=Fault('moment', nth=moment, signal=name))
    assert code != 0, (moment, said)
    lm.resume(tmp_path)

FORK = multiprocessing.get_context('fork')
TINY = dict(
    in_an_update=Fault('accelerate:Accelerator.clip_grad_norm_', nth=6),
    within_weights=Fault(WEIGHTS, 'checkpoint-4', how='within', room=100_000),
    digests_not_in_place=Fault('os:replace', 'checkpoint-4/digests.json'))

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "Train for six updates."
    home = tmp_path_factory.mktemp('tiny')
    text = home/'text.txt'
    text.write_text('\n\n'.join(f'Chapter {i}. It was a dark night. ' * 3 for i in range(30)))
    words = [f'data={text}', *[w for w in SMALL if w[:2] not in ('ma', 'sa')],
             'max_steps=6', 'save_steps=2', 'eval_windows=4']
    return undisturbed(Training(LM, words, home, text), context=FORK)

def stopped_in_the_middle(task, home, step=11, **how):
    "Kill a training after some updates; return its record."
    code, said = task.train(home, fault=Fault(STEP, nth=step), **how)
    assert code == -signal.SIGKILL, said
    run, = task.runs(home)
    return run

def checkpoints(run):
    "List the folders of a run's checkpoints, oldest first."
    return sorted((run.path/'checkpoints').glob('checkpoint-*'),
                  key=lambda path: int(path.name.split('-')[1]))

@pytest.mark.proof('lab.checkpoint', 'lab.task', 'lab.trainer', 'lab.runs', seeds=(0,))
@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT', 'SIGHUP'])
def test_an_end_that_is_asked_for(tmp_path, lm, name):
    "End with a checkpoint of this update, exit code 128 + the signal, and the words that resume."
    code, said = lm.train(tmp_path, fault=Fault(STEP, nth=11, signal=name))
    assert code == 128 + signal.Signals[name] and 'resume=auto goes on' in said, said
    run, = lm.runs(tmp_path)
    assert (run.env['stopped'], run.env['stopped_step']) == (name, 11)
    assert checkpoints(run)[-1].name == 'checkpoint-11'
    lm.resume(tmp_path)

TWICE = dict(
    history_copied=Fault('enigma_lab.lab.runs:RunWriter.log', nth=6),
    origin_named=Fault('enigma_lab.lab.checkpoint:take_checkpoints'),
    within_the_links=Fault('os:link', 'optimizer.pt'),
    links_in_place=Fault('os:replace', 'part-checkpoint', how='after'),
    nothing_learned=Fault(STEP))

@pytest.mark.proof('lab.checkpoint', 'lab.task', 'lab.trainer', 'lab.runs', seeds=(0,))
@pytest.mark.parametrize('fault', TWICE.values(), ids=TWICE)
def test_killed_twice(tmp_path, lm, fault):
    "Kill the run that takes over, too."
    stopped_in_the_middle(lm, tmp_path)
    code, said = lm.train(tmp_path, '--resume', 'auto', fault=fault)
    assert code == -signal.SIGKILL, said
    lm.resume(tmp_path)

FULL = dict(
    weights=Fault(WEIGHTS, 'checkpoint-8', how='full', room=100_000),
    optimizer=Fault('torch:save', 'checkpoint-8/optimizer.pt', how='full', room=170_000),
    history=Fault('enigma_lab.lab.runs:RunWriter.log', nth=7, how='full', room=1000),
    model=Fault(WEIGHTS, 'checkpoint.part', how='full', room=100_000))

@pytest.mark.proof('lab.checkpoint', 'lab.task', 'lab.trainer', 'lab.runs', seeds=(0,))
@pytest.mark.parametrize('fault', FULL.values(), ids=FULL)
def test_full_disk(tmp_path, lm, fault):
    "Say where there is no room, and what to do; with room, the record goes on."
    code, said = lm.train(tmp_path, fault=fault)
    assert code == 1 and 'Traceback' not in said, said
    for words in ('a run must be writable, but', str(tmp_path), 'space' if fault.nth == 7 else
                  'GB free'):
        assert words in said, said
    run, = lm.runs(tmp_path)
    assert not run.checkpoint.exists() and not (run.path/'checkpoint.part').exists()
    lm.resume(tmp_path)

FILES = ('model.safetensors', 'optimizer.pt', 'scheduler.pt', 'rng_state.pth', 'config.json',
         'trainer_state.json', 'training_args.bin', 'generation_config.json', 'end.json',
         'digests.json')

def damage(file, how):
    "Spoil a file: half of it zero, cut off, gone, or with another beside it."
    whole = file.read_bytes()
    file.unlink() # its bytes may be linked elsewhere
    half = whole[:len(whole)//2]
    if how == 'zeroed': file.write_bytes(half + bytes(len(whole) - len(half)))
    if how == 'truncated': file.write_bytes(half)
    if how == 'beside':
        file.write_bytes(whole)
        file.with_name('stale_' + file.name).write_bytes(half)

@pytest.fixture(scope='module')
def half(lm):
    "Keep a killed training with two sealed checkpoints."
    stopped_in_the_middle(lm, lm.home/'half')
    return lm.home/'half'

@pytest.mark.proof('lab.checkpoint', 'lab.task', 'lab.trainer', 'lab.runs', seeds=(0,))
@pytest.mark.parametrize('how', ['zeroed', 'truncated', 'deleted', 'beside'])
def test_each_file_of_a_checkpoint(tmp_path, half, monkeypatch, how):
    "Spoil one file of the newest: it is named, and the one before is taken."
    for name in FILES[:1] if how == 'beside' else FILES:
        home = tmp_path/name
        shutil.copytree(half, home)
        run = Run(next((home/'runs'/'train_enigma').iterdir()))
        before, newest = checkpoints(run)[-2:]
        damage(newest/name, how)
        with pytest.warns(UserWarning, match=f'{newest.name} is set aside') as said:
            assert last_checkpoint(run) == before
        assert name in str(said[0].message)

@pytest.mark.proof('lab.checkpoint', 'lab.task', 'lab.trainer', 'lab.runs', seeds=(0,))
@pytest.mark.parametrize('name', ['model.safetensors', 'optimizer.pt', 'rng_state.pth'])
def test_damaged_newest(tmp_path, lm, half, name):
    "Go on from the one before, aloud, to the same weights; where none is whole, refuse."
    shutil.copytree(half, tmp_path/'home')
    run, = lm.runs(tmp_path/'home')
    before, newest = checkpoints(run)[-2:]
    damage(newest/name, 'zeroed')
    shutil.copytree(tmp_path/'home', tmp_path/'none')
    for place in checkpoints(lm.runs(tmp_path/'none')[0]): damage(place/name, 'truncated')
    if newest.name != 'checkpoint-8': # the best, whose loss is said; the others come back
        after, said = lm.resume(tmp_path/'home')
        assert f'{newest.name} is set aside: {name}' in said, said
    code, said = lm.train(tmp_path/'none', '--resume', 'auto')
    assert code == 1 and f"['{name}'] is not what was saved" in said, said
    assert len(lm.runs(tmp_path/'none')) == 1

def move(home):
    "Give a folder another name."
    elsewhere = home.with_name('elsewhere')
    home.rename(elsewhere)
    return elsewhere

def refused(task, home, rule):
    "Ask to go on, and be refused with a reason, without a record."
    before = len(task.runs(home))
    code, said = task.train(home, '--resume', 'auto')
    assert code == 1 and rule in said and 'Traceback' not in said, said
    assert len(task.runs(home)) == before

@pytest.mark.proof('lab.checkpoint', 'lab.task', 'lab.trainer', 'lab.runs', seeds=(0,))
def test_live_rival(tmp_path, lm):
    "Leave a run at work alone, here or elsewhere; take over one whose number another has."
    process = lm.start(tmp_path, fault=Fault(STEP, nth=11, signal='SIGSTOP'))
    deadline = time.time() + 120
    while not (state := psutil.Process(process.pid).status()) == psutil.STATUS_STOPPED:
        assert time.time() < deadline and process.is_alive(), state
        time.sleep(.02)
    (tmp_path/'said.txt').rename(tmp_path/'first.txt')
    refused(lm, tmp_path, 'a run that is at work cannot be resumed')
    run, = lm.runs(tmp_path)
    write_json(run.path/'env.json', dict(run.env, host='elsewhere'))
    os.kill(process.pid, signal.SIGCONT) # its signs of life are seen from elsewhere
    process.join(120)
    assert process.exitcode == 0 and lm.runs(tmp_path)[-1].finished
    assert all(torch.equal(x, lm.weights[k]) for k, x in lm.learned(run).items())

@pytest.mark.proof('lab.checkpoint', 'lab.task', 'lab.trainer', 'lab.runs', seeds=(0,))
def test_dead_process_whose_number_is_used_again(tmp_path, lm, half):
    shutil.copytree(half, tmp_path/'home')
    run, = lm.runs(tmp_path/'home')
    write_json(run.path/'env.json', dict(run.env, pid=os.getpid(), pid_started=1.))
    lm.resume(tmp_path/'home')

@pytest.mark.proof('lab.checkpoint', 'lab.task', 'lab.trainer', 'lab.runs', seeds=(0,))
def test_run_of_another_machine(tmp_path, lm, half):
    "Refuse while its file is touched; go on when it is not, however new the copy is."
    shutil.copytree(half, tmp_path/'home')
    run, = lm.runs(tmp_path/'home')
    write_json(run.path/'env.json', dict(run.env, host='elsewhere'))
    with beating(run):
        refused(lm, tmp_path/'home', 'a run that is at work cannot be resumed')
    (run.path/'beat').touch() # what a killed process leaves
    lm.resume(tmp_path/'home')

@pytest.mark.proof('lab.checkpoint', 'lab.task', 'lab.trainer', 'lab.runs', seeds=(0,))
@pytest.mark.parametrize('how', ['MemoryError: ', 'OutOfMemoryError: CUDA out of memory',
                                 "RuntimeError: DefaultCPUAllocator: can't allocate memory"])
@pytest.mark.parametrize('call', [STEP, 'transformers.trainer:Trainer.prediction_step'],
                         ids=['update', 'look'])
def test_out_of_memory(tmp_path, lm, call, how):
    "Say the step, the batch, and what helps; the record goes on."
    code, said = lm.train(tmp_path, fault=Fault(call, nth=11, how=how))
    assert code == 1 and 'Traceback' not in said, said
    for words in ('memory ran out at step', 'batch_size=4', 'batch_size=2 with gradient_accum'):
        assert words in said, said
    lm.resume(tmp_path)

# Six points on each other task.

@pytest.fixture(scope='module')
def others(tmp_path_factory, lm):
    "Train each other task undisturbed, when it is asked for."
    made = {}
    def other(name):
        if name not in made: made[name] = undisturbed(OTHERS[name](tmp_path_factory, lm))
        return made[name]
    return other

def sentences(home):
    "Write a file of short sentences."
    words = 'baker sold found hid the shy rusty old red anchor lamp boat'.split()
    rng, text = random.Random(0), home/'sentences.txt'
    drawn = sorted({' '.join(rng.sample(words, 5)) for _ in range(300)})
    text.write_text('\n\n'.join(f'{line.capitalize()}.' for line in drawn))
    return text

def sgdd(factory, lm):
    home = factory.mktemp('sgdd')
    text = sentences(home)
    return Training('enigma_lab.sgdd.train:task',
                    [f'data={text}', 'preset=smoke', 'max_steps=12', 'eval_steps=4',
                     'save_steps=4', 'loop=false', '--no-test'], home, text)

def lora(factory, lm):
    home = factory.mktemp('lora')
    text = home/'chats.jsonl'
    ask = lambda i: dict(instruction=f'{i}', output=['dark', 'it was', 'night'][i % 3])
    text.write_text(''.join(json.dumps(ask(i)) + '\n' for i in range(40)))
    base = lm.home/'whole'/'runs'/'train_enigma'
    return Training('enigma_lab.lm.lora:task',
                    [f'data={text}', f'base=train_enigma/{next(base.iterdir()).name}',
                     'preset=smoke', 'max_chats=0', 'eval_steps=4', 'save_steps=4',
                     'lora_dropout=.1', '--no-test'],
                    home, text, 'adapter_model.safetensors', bring=base)

def pictures(home, name='pictures.npz', swapped=0):
    "Write an archive of small pictures: digits, of which some change places between the parts."
    from sklearn.datasets import load_digits
    x = load_digits().images.astype('uint8')[:400]*15
    order = list(range(400))
    order[:swapped], order[-swapped or 400:] = order[-swapped or 400:], order[:swapped]
    np.savez(home/name, x_train=x[order[:300]], x_val=x[order[300:350]], x_test=x[order[350:]])
    return home/name

def ddpm(factory, lm):
    home = factory.mktemp('ddpm')
    data = pictures(home)
    return Training('enigma_lab.ddpm.train:task',
                    [f'data={data}', 'preset=smoke', 'max_steps=12', 'eval_steps=4',
                     'save_steps=4', '--no-test'],
                    home, data, 'unet/diffusion_pytorch_model.safetensors')

def maskpro(factory, lm):
    home = factory.mktemp('maskpro')
    dense = undisturbed(ddpm(factory, lm))
    base, = dense.runs(dense.home/'whole')
    return Training('enigma_lab.maskpro.train:train_maskpro',
                    ['preset=smoke', 'eval_steps=4', 'budget=80', 'estimator=pge',
                     f'dataset={dense.text}', f'model=train_ddpm/{base.path.name}',
                     'compute_fid=false'],
                    home, dense.text, 'unet/diffusion_pytorch_model.safetensors',
                    'train_maskpro', 'enigma_lab.maskpro.learn:Learner.step', 'state.safetensors',
                    'checkpoint-8/state.safetensors', 'enigma_lab.maskpro.learn:save_file',
                    bring=base.path.parent)

def a_sweep(factory, lm):
    home = factory.mktemp('sweep')
    text = home/'text.txt'
    shutil.copy(lm.text, text)
    words = [f'data={text}', *[word for word in SMALL if word[0] != '-'], 'test=false']
    return Training('faults:train_enigma', words, home, text, records='sweeps/one/train_enigma')

OTHERS = dict(lora=lora, sgdd=sgdd, ddpm=ddpm, maskpro=maskpro, sweep=a_sweep)

@pytest.mark.proof('lab.checkpoint', 'lab.sweep', 'lab.task', 'lm.lora', 'sgdd.train',
                   'ddpm.train', 'maskpro.train', 'maskpro.learn', seeds=(17,))
@pytest.mark.parametrize('point', ['drawn', 'asked', 'within', 'damaged', 'moved', 'changed'])
@pytest.mark.parametrize('name', OTHERS)
def test_other_tasks(tmp_path, others, name, point):
    "SIGKILL at a drawn moment, SIGTERM, within a checkpoint, a damaged one, a move, other data."
    task, home = others(name), tmp_path/'home'
    moment = 1 + int(random.Random(f'{SEED} {name}').random()*task.moments)
    fault = dict(drawn=Fault('moment', nth=moment),
                 asked=Fault(task.step, nth=7, signal='SIGTERM'),
                 within=Fault(task.save, task.newest, how='within')
                 ).get(point, Fault(task.step, nth=11))
    code, said = task.train(home, fault=fault)
    assert code != 0, said
    if point == 'moved': home = move(home)
    if point == 'damaged': damage(checkpoints(task.runs(home)[-1])[-1]/task.saved, 'zeroed')
    if point != 'changed':
        task.resume(home)
        return
    was = task.text.read_bytes()
    if task.text.suffix == '.npz': pictures(task.text.parent, swapped=40)
    else: task.text.write_bytes(was.replace(b'old', b'new').replace(b'dark', b'rain'))
    try: refused(task, home, 'has changed since')
    finally: task.text.write_bytes(was)

@pytest.fixture(scope='module')
def pair(tmp_path_factory, lm):
    "Train in two processes that nobody disturbs."
    home = tmp_path_factory.mktemp('pair')
    return undisturbed(Training(LM, [*lm.words, 'processes=2', 'batch_size=2'], home, lm.text))

@pytest.mark.proof('lab.checkpoint', 'lab.launch', 'lab.task', 'lab.trainer', seeds=(0,))
@pytest.mark.parametrize('name', ['SIGKILL', 'SIGTERM', 'SIGINT', 'SIGHUP'])
@pytest.mark.parametrize('rank', [0, 1, None], ids=['first', 'second', 'all'])
def test_processes_that_train_together(tmp_path, pair, rank, name):
    "One rank is struck in its eleventh update, or all are: the same command goes on as two."
    code, said = pair.train(tmp_path, fault=Fault(STEP, nth=11, signal=name, rank=rank))
    assert code != 0, said
    run, = pair.runs(tmp_path)
    asked = run.env.get('stopped')
    assert asked == (None if name == 'SIGKILL' else name), said
    pair.resume(tmp_path)

@pytest.mark.proof('lab.checkpoint', 'lab.task', 'lab.trainer', seeds=(0,))
def test_moved_and_changed(tmp_path, lm, half):
    "Go on in another place; refuse other text under the same name; a finished run is the answer."
    shutil.copytree(half, tmp_path/'home')
    home, was = move(tmp_path/'home'), lm.text.read_text()
    lm.text.write_text(was.replace('stormy', 'starry'))
    try: refused(lm, home, 'has changed since train_enigma/')
    finally: lm.text.write_text(was)
    run, _ = lm.resume(home)
    assert str(tmp_path) not in (run.path/'env.json').read_text()
    count = len(lm.runs(home))
    lm.resume(home)
    assert len(lm.runs(home)) == count

@pytest.mark.parametrize('name', ['in_an_update', 'within_weights', 'digests_not_in_place'])
def test_slice(tmp_path, tiny, name):
    "Run three of the named points in a process that is forked from this one."
    code, said = tiny.train(tmp_path, fault=TINY[name], context=FORK)
    assert code in (-signal.SIGKILL, -signal.SIGXFSZ), said
    tiny.resume(tmp_path, context=FORK)
