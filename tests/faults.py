"""Faults for trainings: a process that dies, or cannot write, at a call that is named or drawn.

A server imports the library once and forks a process for each training (`multiprocessing`'s
forkserver), so that a point costs a training and no import. What is patched is patched in that
process: nothing in the library knows about it.
"""
import multiprocessing, os, resource, signal, sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from enigma_lab.lab.runs import list_runs, runs_in, runs_root
from enigma_lab.lab.settings import make_settings
from enigma_lab.lab.sweep import check_complete, sweep
from enigma_lab.lab.task import best_val_loss, find_task, main, read_words, run_task
from enigma_lab.lab.progress import measure_of
from enigma_lab.lab.trainer import thinned

SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload([
    'enigma_lab.lm.train', 'enigma_lab.lm.lora', 'enigma_lab.sgdd.train', 'enigma_lab.ddpm.train',
    'enigma_lab.maskpro.train', 'transformers.trainer', 'transformers.modeling_utils', 'peft',
    'diffusers', 'psutil', 'yaml'])

@dataclass(frozen=True)
class Fault:
    "Describe what goes wrong at a call."
    call:str # 'module:name', or 'moment' for the `nth` of the moments of `count_moments`
    word:str='' # of a path among the arguments
    nth:int=1 # of the calls with that word
    how:str='before' # 'before' | 'after' | 'within' (of a write) | 'full' (disk) | an exception
    signal:str='SIGKILL' # that the process sends to itself
    room:int=1000 # bytes that a file may have, of 'within' and 'full'
    rank:int|None=None # the only process of several that it strikes; `None`: each

def limit_files(room, deadly):
    "Let no file grow beyond its room: a write beyond it kills the process, or fails."
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

def named_error(how):
    "Make an exception of its name and its text."
    name, _, text = how.partition(': ')
    kinds = dict(MemoryError=MemoryError, RuntimeError=RuntimeError,
                 OutOfMemoryError=torch.OutOfMemoryError)
    return kinds[name](text)

def strike(fault):
    "Do what a fault does before, or in the place of, its call."
    if fault.how in ('within', 'full'): limit_files(fault.room, fault.how == 'within')
    elif fault.how == 'before': os.kill(os.getpid(), signal.Signals[fault.signal])
    elif fault.how != 'after': raise named_error(fault.how)

def install(fault):
    "Put a function that counts in the place of the one that is called."
    module, _, path = fault.call.partition(':')
    *owners, name = path.split('.')
    home = import_module(module)
    for owner in owners: home = getattr(home, owner)
    called, count = getattr(home, name), [0]
    def counting(*args, **kwargs):
        paths = (str(a) for a in (*args, *kwargs.values()) if isinstance(a, (str, os.PathLike)))
        count[0] += not fault.word or any(fault.word in path for path in paths)
        here = fault.rank in (None, int(os.environ.get('RANK', 0)))
        if count[0] != fault.nth or not here: return called(*args, **kwargs)
        count[0] += 1
        strike(fault)
        try: return called(*args, **kwargs)
        finally:
            if fault.how == 'after': os.kill(os.getpid(), signal.Signals[fault.signal])
    setattr(home, name, counting)

WRITES = {'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.link'}

def count_moments(home, act):
    "Call a function at each batch, and at each event by which Python changes a folder."
    from transformers import Trainer
    from enigma_lab.maskpro.learn import Learner
    count = [0]
    def moment():
        count[0] += 1
        act(count[0])
    def changes(event, args):
        if event == 'open': return isinstance(args[1], str) and set(args[1]) & set('wax+')
        return event in WRITES
    def listen(event, args):
        if changes(event, args) and home in str(args[0]): moment()
    sys.addaudithook(listen)
    batches = (Trainer, 'training_step'), (Trainer, 'prediction_step'), (Learner, 'step')
    for owner, name in batches:
        def step(self, *args, called=getattr(owner, name), **kwargs):
            moment()
            return called(self, *args, **kwargs)
        setattr(owner, name, step)
    return count

def rescore(run, task):
    """Check the numbers of a finished run on the model that lies on the disk.

    Loss on validation, window by window as its look was; the measure of the record on all of it.
    """
    config = import_module(task.address.partition(':')[0]).settings.kind(**run.config)
    parts = task.prepare(config)
    load = getattr(sys.modules[__name__], 'load_' + task.name, task.load)
    load(run, parts)
    windows, size = thinned(parts.validation, config.eval_windows), 2*config.batch_size
    model, total = parts.model.eval(), 0.
    for i in range(0, len(windows), size):
        rows = [windows[j] for j in range(i, min(i + size, len(windows)))]
        batch = {k: torch.stack([torch.as_tensor(row[k]) for row in rows]) for k in rows[0]}
        with torch.no_grad(): total += model(**batch).loss.item() * len(rows)
    mine, key = total / len(windows), measure_of(run.history).key
    told = [run.env['kept_loss'], best_val_loss(run), min(r[key] for r in run.history if key in r)]
    wrong = [x for x in told if abs(x - mine) > 1e-5*abs(mine)]
    again = task.evaluate(run, parts, **{name: False for name in task.options})
    for name in ('val_bits_per_char', 'val_mse', 'val_exact_all', 'val_answer_nats'):
        if name in run.metrics and abs(again[name] - run.metrics[name]) > 1e-6:
            wrong.append((name, again[name], run.metrics[name]))
    assert not wrong, f'{run.name}: the saved model has {mine}, the record says {wrong}'

def load_train_ddpm(run, parts):
    "Take the averaged weights of a saved pipeline."
    from enigma_lab.ddpm.train import load_pipeline
    parts.model.average.module.load_state_dict(load_pipeline(run)[0].state_dict())

def rescore_masks(run):
    "Check the loss of learned masks on the pipeline that was saved with them."
    from enigma_lab.ddpm.model import fixed_batches
    from enigma_lab.ddpm.train import load_pipeline
    from enigma_lab.maskpro.train import config_of, load_task
    task = load_task(config_of(run))
    task.unet = load_pipeline(str(run.checkpoint))[0].eval()
    batches = fixed_batches(task.images.validation, task.config.repeats, num_steps=task.num_steps)
    rows = sum(len(batch.t) for batch in batches)
    with torch.no_grad():
        mine = sum(task.loss(task.unet, b).item() * len(b.t) for b in batches) / rows
    told = run.metrics['learned_loss']
    assert abs(told - mine) < 1e-5*mine, f'{run.name}: the pipeline has {mine}, it says {told}'

def train_enigma(resume='none', **changes):
    "Train a language model, a trial of a sweep."
    task = find_task('enigma_lab.lm.train:task')
    run_task(task, make_settings(task.settings, dict(changes, resume=resume), text=True))

def enter(address, words):
    "Train as a command line does; return the record and how it is scored again."
    if address.endswith(':task'):
        main(task := find_task(address), words)
        return list_runs(task.name)[-1], lambda run: rescore(run, task)
    resumes = words[-2:] == ['--resume', 'auto']
    settings = [word for word in words if '=' in word]
    if address.endswith(':train_maskpro'):
        from enigma_lab.maskpro.config import read_settings
        from enigma_lab.maskpro.train import train_maskpro
        given = read_settings(settings)
        try: run = train_maskpro(resume='auto' if resumes else 'none', test=False, **given)
        except (ValueError, OSError) as e: sys.exit(f'{type(e).__name__}: {e}')
        found = run, rescore_masks
    else: # a sweep goes on without a word
        given = read_words(settings)
        table = sweep(address, [{}], 'one', parallel=0, **given)
        check_complete(table, 'one')
        run, = runs_in(runs_root()/'sweeps'/'one'/address.partition(':')[2])
        found = run, lambda run: rescore(run, find_task('enigma_lab.lm.train:task'))
    print(f'{run.path}: finished')
    return found

def one_training(home, address, words, fault):
    "Train in this process, with its records and its words in a folder of its own."
    home = Path(home)
    home.mkdir(parents=True, exist_ok=True)
    os.environ['ENIGMA_RUNS'] = str(home/'runs')
    os.environ.pop('ENIGMA_RUN_DIR', None)
    os.chdir(home)
    said = os.open(home/'said.txt', os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    for stream in (1, 2): os.dup2(said, stream)
    sys.stdout, sys.stderr = (open(n, 'w', buffering=1, closefd=False) for n in (1, 2))
    torch.set_num_threads(1)
    from enigma_lab.lab import launch
    launch.is_notebook = lambda: True # processes are forked, and what is patched here is there, too
    act = lambda n: None
    if fault and fault.call == 'moment':
        act = lambda n: n == fault.nth and os.kill(os.getpid(), signal.Signals[fault.signal])
        count_moments(str(home), act)
    elif fault: install(fault)
    else: moments = count_moments(str(home), act)
    run, score = enter(address, words)
    if fault: return
    (home/'moments.txt').write_text(str(moments[0]))
    score(run)

def start(home, address, words, fault=None, context=SERVER):
    "Start a training in a process of its own."
    process = context.Process(target=one_training, args=(str(home), address, list(words), fault))
    process.start()
    return process

def train(home, address, words, fault=None, context=SERVER):
    "Train in a process of its own; return its exit code and its words."
    process = start(home, address, words, fault, context)
    process.join(300)
    if process.is_alive(): process.kill()
    return process.exitcode, (Path(home)/'said.txt').read_text()
