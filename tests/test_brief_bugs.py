"""Every bug that document 004 lists, on every task to which it applies.

| bug of the document                       | test                               | tasks          |
|-------------------------------------------|------------------------------------|----------------|
| 1 an imported name does not exist         | test_every_public_name_exists      | all            |
| 2 `batch_size` passed twice               | test_batches_and_looks             | T              |
| 3 FutureWarning of `torch.cuda.amp`       | any training here: it is an error  | T, loop, masks |
| 4 a tensor stays on another device        | test_nothing_stays_behind          | T, masks       |
| 5 a method is missing, no look each epoch | test_encode_from_tokens            | sgdd           |
|                                           | test_a_look_…, test_masks_rate     | T, masks       |
| 6 gradients cleared, the loss not divided | test_an_update_is_one_batch        | T, loop        |
|                                           | test_masks_parts_are_one_batch     | masks          |
| 7 a schedule of hard-coded length         | test_the_schedule                  | T, loop        |
| 12 a schedule that counts batches         | test_the_schedule, test_masks_rate | T, loop, masks |
| 8 no condition ever, not sometimes        | test_some_conditions_are_dropped   | sgdd           |
| 9, 13 the best by a wrong key, or from    | test_the_best_is_kept              | T              |
|   a best loss of 0                        | test_masks_best_and_resume         | masks          |
| 10 `vocab_size` written into the code     | test_rows_of_the_tokenizer         | enigma, lora,  |
|                                           |                                    | sgdd           |
| 11 validation in smaller batches          | test_batches_and_looks             | T              |
| 14 the last group of an epoch is lost     | test_batches_and_looks,            | T, loop        |
|                                           | test_an_update_is_one_batch        |                |
| 15 clipping in each batch                 | test_clipped_once                  | T, loop        |
| 16 `global_step` is 0 after resuming      | test_resumed                       | T, loop        |
|                                           | test_masks_best_and_resume         | masks          |
| 17 another path in half precision         | test_half_precision_is_the_same    | T, loop        |
| `num_workers` on Windows                  | test_no_workers                    | T              |

T: train_enigma, train_lora, train_sgdd, train_ddpm. loop: `lab.train_loop`. masks: `learn_masks`,
which has no optimizer steps to clip and draws a batch for each step, so no group is left over.
"""
import copy, importlib, signal, warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest, torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from enigma_lab.ddpm.train import make_ddpm_config, prepare_ddpm, task as ddpm
from enigma_lab.lab import train_loop as loop, trainer as engine
from enigma_lab.lab.checkpoint import resume_from
from enigma_lab.lab.config import TrainingConfig, count_steps
from enigma_lab.lab.optimizer import make_optimizer
from enigma_lab.lab.runs import start_run
from enigma_lab.lm.lora import make_tune_config, prepare_tuning, task as lora
from enigma_lab.lm.train import make_config, prepare, task as enigma, train
from enigma_lab.maskpro.estimators import make_method
from enigma_lab.maskpro.learn import learn_masks
from enigma_lab.maskpro.masks import apply_masks
from enigma_lab.sgdd.train import make_sgdd_config, prepare_sgdd, task as sgdd

TASKS = {task.name: task for task in (enigma, lora, sgdd, ddpm)}
# nine windows in batches of two, three batches an update: 2, 2, 2 and 2, 1, twice
SMALL = dict(epochs=2., max_steps=0, minutes=0., batch_size=2, gradient_accumulation_steps=3,
             optimizer='adamw', learning_rate=1e-2, warmup_steps=2, decay_share=.5, eval_steps=1,
             eval_windows=4, save_steps=1)
RATES = [.5, 1., 1., .5] # by hand: shares of the peak at 0, 1/4, 2/4, 3/4 of the budget

# quick: what needs no training

@pytest.mark.quick
@pytest.mark.parametrize('name', ['lm.train', 'lm.lora', 'sgdd.train', 'sgdd.encoder',
                                  'ddpm.train', 'maskpro.learn', 'maskpro.train',
                                  'lab.train_loop', 'lab.trainer'])
def test_every_public_name_exists(name):
    "Bug 1: whatever a module offers can be imported from it."
    module = importlib.import_module(f'enigma_lab.{name}')
    assert [word for word in module.__all__ if not hasattr(module, word)] == []

@pytest.mark.quick
def test_updates_are_counted_by_hand():
    "Bugs 7, 12 and 14: updates, not batches; a group that is left over is an update."
    config = TrainingConfig(**SMALL)
    assert count_steps(config, 9) == 2*2
    for windows in range(1, 30):
        batches = list(range(0, windows, 2))
        groups = [batches[i:i + 3] for i in range(0, len(batches), 3)]
        assert count_steps(config, windows) == 2*len(groups)
        assert count_steps(replace(config, max_steps=3), windows) == min(3, 2*len(groups))

@pytest.mark.quick
def test_no_workers(tmp_path):
    "The plan's cure on Windows, where data loaders with processes of their own hang."
    args = engine.training_arguments(TrainingConfig(**SMALL), tmp_path, 4)
    assert args.dataloader_num_workers == 0

# the tasks, as their notebooks prepare them

class Seen(Dataset):
    "Hold some windows, and note which are asked for."
    def __init__(self, windows, count): self.windows, self.count, self.asked = windows, count, []
    def __len__(self): return self.count
    def __getitem__(self, i):
        if not 0 <= i < self.count: raise IndexError(i)
        self.asked.append(i)
        return self.windows[i]

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Runs and a cache of their own, a text, and a base to tune."
    home = tmp_path_factory.mktemp('bugs')
    night = 'It was a dark and stormy night; the rain fell. '
    (home/'text.txt').write_text('\n\n'.join(f'Chapter {i}. ' + night*(1 + i % 5)
                                             for i in range(150)))
    with pytest.MonkeyPatch.context() as own:
        own.setenv('ENIGMA_RUNS', str(home/'runs'))
        own.setenv('ENIGMA_CACHE', str(home/'cache'))
        yield home

@pytest.fixture(scope='module')
def prepared(home):
    "Prepare each task once: a function from its name to its config and parts."
    known = {}
    def tuning():
        train(make_config('smoke', data='tasks', max_chars=60_000, shape=dict(max_len=64),
                          max_steps=2, eval_steps=2, save_steps=2, test=False))
        return make_tune_config('smoke')
    makers = dict(train_enigma=lambda: make_config('smoke', data=str(home/'text.txt')),
                  train_lora=tuning, train_sgdd=lambda: make_sgdd_config('smoke'),
                  train_ddpm=lambda: make_ddpm_config('smoke'))
    prepare_of = dict(train_enigma=prepare, train_lora=prepare_tuning, train_sgdd=prepare_sgdd,
                      train_ddpm=prepare_ddpm)
    def get(name):
        if name not in known:
            config = replace(makers[name](), **SMALL)
            known[name] = config, prepare_of[name](config)
        return known[name]
    return get

# what happens in a training, seen from outside

@dataclass
class Update:
    "Hold what an optimizer is given."
    batches:list # of the update
    weights:dict # before it
    gradients:dict # accumulated, clipped
    rates:set # learning rates

class Witness:
    "Note batches, gradients and rates of a training, whatever drives it."
    def __init__(self, model, scale):
        self.model, self.updates, self.waiting, self.looks = model, [], [], []
        model.register_forward_pre_hook(self.batch, with_kwargs=True)
        self.learns = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for p in self.learns.values(): p.register_hook(lambda gradient: gradient*scale)

    def batch(self, module, args, kwargs):
        given = {k: v for k, v in kwargs.items()
                 if isinstance(v, torch.Tensor) and k != 'num_items_in_batch'}
        (self.waiting if module.training else self.looks).append(given)

    def update(self, optimizer, args, kwargs):
        copies = [{n: x.detach().clone() for n, p in self.learns.items()
                   if (x := of(p)) is not None} for of in (lambda p: p, lambda p: p.grad)]
        rates = {group['lr'] for group in optimizer.param_groups}
        self.updates.append(Update(self.waiting, *copies, rates))
        self.waiting = []

@contextmanager
def witnessed(model, scale):
    "Watch a model's training; a deprecated name is an error."
    witness = Witness(model, scale)
    def make(*args):
        optimizer = make_optimizer(*args)
        optimizer.register_step_pre_hook(witness.update)
        return optimizer
    with patch.object(engine, 'make_optimizer', make), patch.object(loop, 'make_optimizer', make), \
            warnings.catch_warnings():
        warnings.simplefilter('error', FutureWarning) # bug 3
        yield witness

class StopAt(TrainerCallback):
    def __init__(self, step): self.step = step
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1: signal.raise_signal(signal.SIGTERM)

def fitted(prepared, name, note, scale=1e-3, stop=0, resume=False, drop=0., **changes):
    "Train a task by its own parts; return witness, run, trainer and the training windows."
    task, (config, parts) = TASKS[name], prepared(name)
    torch.manual_seed(0)
    parts = replace(parts, model=copy.deepcopy(parts.model))
    for module in parts.model.modules():
        if isinstance(module, nn.Dropout): module.p = drop
    windows, config = Seen(parts.train, 9), replace(config, **changes)
    if resume: config = replace(config, resume='auto')
    origin = resume_from(config, note) if resume else None
    run = start_run(note, config)
    callbacks = [*task.callbacks(parts), *([StopAt(stop)] if stop else [])]
    with witnessed(parts.model, scale) as witness, task.within():
        # peft names old functions of transformers; `within` of its task hides exactly these
        try: trainer = engine.fit(run, config, parts.model, windows, parts.validation, origin,
                                  None, tuple(callbacks), task.measure)
        except engine.Stopped: trainer = None
    return witness, run, trainer, windows

def looped(prepared, scale=1e-3, **changes):
    "Train the language model by the loop in forty lines."
    config, parts = prepared('train_enigma')
    model, windows = copy.deepcopy(parts.model), Seen(parts.train, 9)
    with witnessed(model, scale) as witness:
        loop.train_loop(model, windows, replace(config, **changes))
    return witness, None, None, windows

@pytest.fixture(scope='module')
def trained(prepared):
    "Train each task once in each way that several tests look at."
    known = {}
    def get(name, scale=1e-3, **changes):
        key = name, scale, *changes.items()
        if key not in known:
            how = dict(scale=scale, **changes)
            known[key] = (looped(prepared, **how) if name == 'train_loop'
                          else fitted(prepared, name, f'bugs-{name}-{len(known)}', **how))
        return known[key]
    return get

def expected(prepared, name, update, scale):
    "Compute the gradient of an update in plain torch: one batch, and one clipping of the whole."
    model = copy.deepcopy(prepared('train_enigma' if name == 'train_loop' else name)[1].model)
    learns = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for n, p in learns.items(): p.copy_(update.weights[n])
    if name in ('train_sgdd', 'train_ddpm'): # each batch counts alike
        loss = sum(model.train()(**batch).loss for batch in update.batches)/len(update.batches)
    else: # each target counts alike
        whole = {k: torch.cat([b[k] for b in update.batches]) for k in update.batches[0]}
        loss = model.train()(**whole).loss
    found = torch.autograd.grad(loss, learns.values(), allow_unused=True)
    found = {n: scale*g for n, g in zip(learns, found) if g is not None}
    norm = sum(g.square().sum() for g in found.values()).sqrt()
    return {n: g/max(1., norm) for n, g in found.items()}, norm

def distance(a, b): # of two gradients, relative
    flat = lambda x: torch.cat([x[n].flatten() for n in sorted(b)])
    return ((flat(a) - flat(b)).norm()/flat(b).norm()).item()

proof = pytest.mark.proof(
    'ddpm.train', 'lab.checkpoint', 'lab.config', 'lab.train_loop', 'lab.trainer', 'lm.lora',
    'lm.train', 'maskpro.learn', 'sgdd.model', 'sgdd.train', seeds=(0,))
each = pytest.mark.parametrize('name', [*TASKS, 'train_loop'])
each_task = pytest.mark.parametrize('name', TASKS)

@proof
@each
def test_an_update_is_one_batch(prepared, trained, name):
    "Bugs 6 and 14: the gradient of each update is that of its windows in one batch."
    for update in trained(name)[0].updates:
        want, norm = expected(prepared, name, update, 1e-3)
        assert norm < 1 and want.keys() == update.gradients.keys()
        assert distance(update.gradients, want) < 1e-4

@proof
@each
def test_clipped_once(prepared, trained, name):
    "Bug 15: where gradients are large, the whole of an update is clipped, and nothing before."
    for update in trained(name, 1e3)[0].updates:
        want, norm = expected(prepared, name, update, 1e3)
        assert norm > 1 and distance(update.gradients, want) < 1e-3
        total = sum(g.square().sum() for g in update.gradients.values()).sqrt().item()
        assert total == pytest.approx(1., abs=1e-3)

@proof
@each
def test_the_schedule(trained, name):
    "Bugs 7 and 12: the rate of each update, computed by hand."
    rates = [update.rates for update in trained(name)[0].updates]
    assert all(len(rate) == 1 for rate in rates)
    assert [rate.pop()/1e-2 for rate in rates] == pytest.approx(RATES)

@proof
@each
def test_batches_and_looks(trained, name):
    "Bugs 2, 5, 11 and 14: sizes of batches, every window once an epoch, looks at validation."
    witness, run, trainer, windows = trained(name)
    sizes = [[len(b['labels']) for b in update.batches] for update in witness.updates]
    assert sizes == [[2, 2, 2], [2, 1]]*2 and not witness.waiting
    if name == 'train_loop': return
    asked = windows.asked
    assert [sorted(asked[:9]), sorted(asked[9:])] == [[*range(9)]]*2
    assert {len(batch['labels']) for batch in witness.looks} == {4} # twice the batch of training
    steps = [row['step'] for row in run.history if trainer_key(name) in row]
    assert steps == [1, 2, 3, 4]

def trainer_key(name): return TASKS[name].measure.key

@proof
@each_task
def test_a_look_after_each_epoch(trained, name):
    "Bug 5: with as many updates between looks as an epoch has, each epoch ends with one."
    run = trained(name, eval_steps=2, save_steps=2)[1]
    looks = [(row['step'], row['epoch']) for row in run.history if trainer_key(name) in row]
    assert looks == [(2, 1.), (4, 2.)]

@proof
@each_task
def test_the_best_is_kept(prepared, trained, name):
    "Bugs 9 and 13: what comes out has the lowest loss of all looks, scored anew."
    _, run, trainer, _ = trained(name, 1., learning_rate=.5, warmup_steps=1, decay_share=0.)
    key, (_, parts) = trainer_key(name), prepared(name)
    looks = {row['step']: row[key] for row in run.history if key in row}
    best = min(looks, key=looks.get)
    assert (run.env['kept_step'], run.env['kept_loss']) == (best, looks[best])
    every = len(parts.validation)//4
    rows = [parts.validation[i*every] for i in range(4)]
    batch = {k: torch.stack([row[k] for row in rows]) for k in rows[0]}
    with torch.no_grad(): loss = trainer.model.eval()(**batch).loss.item()
    assert loss == pytest.approx(looks[best], rel=1e-4)
    assert max(looks.values()) > looks[best] > 0 # there was something to choose

@proof
@each_task
def test_resumed(prepared, name):
    "Bug 16: stopped after two updates and taken up: steps, gradients and weights to the last bit."
    whole = fitted(prepared, name, f'whole-{name}', drop=.1)
    fitted(prepared, name, f'broken-{name}', drop=.1, stop=2)
    torch.randn(5) # someone else draws
    again = fitted(prepared, name, f'broken-{name}', drop=.1, resume=True)
    rows = lambda run: [(row['step'], row['epoch'], row.get('learning_rate'))
                        for row in run.history if 'step' in row and 'resumed_from' not in row]
    assert rows(again[1]) == rows(whole[1])
    assert len(again[0].updates) == 2
    for a, b in zip(again[0].updates, whole[0].updates[2:]):
        assert a.rates == b.rates
        for part in ('weights', 'gradients'):
            ours, theirs = getattr(a, part), getattr(b, part)
            assert all(torch.equal(ours[n], theirs[n]) for n in theirs), part
    same = zip(again[2].model.parameters(), whole[2].model.parameters())
    assert all(torch.equal(a, b) for a, b in same)

@proof
def test_the_loop_resumes(prepared):
    "Bug 16 in the loop: two updates and two more are four, dropout included."
    config, parts = prepared('train_enigma')
    def model():
        made = copy.deepcopy(parts.model)
        for module in made.modules():
            if isinstance(module, nn.Dropout): module.p = .1
        return made
    windows, (whole, cut) = Seen(parts.train, 9), (model() for _ in range(2))
    torch.manual_seed(1); loop.train_loop(whole, windows, config)
    torch.manual_seed(1); _, state = loop.train_loop(cut, windows, config, steps=2)
    torch.randn(5)
    resumed = model()
    losses, state = loop.train_loop(resumed, windows, config, state=state)
    assert len(losses) == 2 and state['step'] == 4
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))

@proof
@each
def test_half_precision_is_the_same(trained, name):
    "Bug 17: in bf16 the same batches, rates and updates, and nearly the same gradients."
    half, full = (trained(name, precision=p)[0].updates for p in ('bf16', 'fp32'))
    assert [u.rates for u in half] == [u.rates for u in full]
    for a, b in zip(half, full, strict=True):
        assert all(torch.equal(x[k], y[k]) for x, y in zip(a.batches, b.batches, strict=True)
                   for k in y)
    assert 0 < distance(half[0].gradients, full[0].gradients) < .2

def plain_tensors(model):
    "Find tensors that `.to` does not move: attributes that are neither parameter nor buffer."
    return [f'{type(module).__name__}.{name}' for module in model.modules()
            for name, value in vars(module).items() if isinstance(value, torch.Tensor)]

@proof
@each_task
def test_nothing_stays_behind(prepared, name):
    "Bug 4: all of a model moves to another device."
    _, parts = prepared(name)
    model = copy.deepcopy(parts.model)
    assert plain_tensors(model) == []
    model.to('meta')
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {'meta'}

def test_masks_move_with_their_model():
    "Bug 4 in maskpro: masks are buffers."
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    apply_masks(model)
    assert plain_tensors(model) == []
    model.to('meta')
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {'meta'}

@proof
def test_encode_from_tokens(prepared):
    "Bug 5: the method is there, and says what `encode` says."
    encoder, texts = prepared('train_sgdd')[1].model.encoder, ['the cat', 'a longer sentence']
    tokens = encoder.tokenizer(texts, padding=True, return_tensors='pt')
    given = encoder.encode_from_tokens(tokens['input_ids'], tokens['attention_mask'])
    torch.testing.assert_close(given.cpu(), encoder.encode(texts).cpu(), rtol=1e-4, atol=1e-5)

@proof
def test_some_conditions_are_dropped(prepared):
    "Bug 8: about a tenth of the training rows has no vector, never all; in evaluation none."
    _, parts = prepared('train_sgdd')
    model = copy.deepcopy(parts.model)
    model.null.data.fill_(7.)
    rows = [parts.train[i % len(parts.train)] for i in range(1000)]
    batch = {k: torch.stack([row[k] for row in rows]) for k in rows[0]}
    looks = [parts.validation[i % len(parts.validation)] for i in range(50)]
    look = {k: torch.stack([row[k] for row in looks]) for k in looks[0]}
    def share(model, batch):
        with patch.object(model.decoder, 'hidden', wraps=model.decoder.hidden) as asked, \
                torch.no_grad(): model(**batch)
        return (asked.call_args.args[1] == 7).all(1).float().mean().item()
    # five standard deviations of a thousand draws
    assert abs(share(model.train(), batch) - .1) < 5*(.1*.9/1000)**.5
    assert share(model.eval(), look) == 0.

@proof
def test_rows_of_the_tokenizer(prepared, home):
    "Bug 10: as many rows as the tokenizer has, whatever the text."
    (home/'few.txt').write_text('\n\n'.join(f'{a} saw {b}, who sang to {c}.' for a in 'abcde'
                                            for b in 'fghij' for c in 'klmno'))
    sizes = []
    for config in (make_config('smoke', data=str(home/'few.txt')), prepared('train_enigma')[0]):
        parts = prepare(config)
        assert parts.model.get_input_embeddings().num_embeddings == len(parts.tokenizer)
        sizes.append(len(parts.tokenizer))
    assert sizes[0] != sizes[1]
    tuned, written = prepared('train_lora')[1], prepared('train_sgdd')[1].model
    assert tuned.model.get_input_embeddings().weight.shape[0] == len(tuned.tokenizer)
    assert written.decoder.embed.num_embeddings == len(written.tokenizer)

# masks: weights stay, which of them are used is learned

def mask_problem():
    "A layer, its loss, 32 rows to learn from and 32 others."
    torch.manual_seed(0)
    model, wanted = nn.Sequential(nn.Linear(16, 8, bias=False)), torch.randn(16, 8)
    x = torch.randn(64, 16)
    data = torch.cat([x, x @ wanted], 1)
    loss = lambda model, rows: (model(rows[:, :16]) - rows[:, 16:]).square().mean()
    return model, loss, data[:32], data[32:]

def learned(batches, budget=120, **how):
    model, loss, _, held_out = mask_problem()
    with warnings.catch_warnings():
        warnings.simplefilter('error', FutureWarning) # bug 3
        return learn_masks(model, loss, batches, budget=budget, initial='random',
                           validation=[held_out], eval_steps=10, **how)

@proof
@pytest.mark.parametrize('estimator', ['simple', 'pge'])
def test_masks_parts_are_one_batch(estimator):
    "Bug 6 in maskpro: a batch in two parts is the batch."
    rows = mask_problem()[2]
    batches = rows.split(8)
    whole = learned([[b] for b in batches], estimator=estimator)
    parts = learned([[*b.split(4)] for b in batches], estimator=estimator)
    losses = [[row['loss'] for row in run.history if 'loss' in row] for run in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert torch.equal(whole.learned, parts.learned)

def test_masks_rate():
    "Bugs 7 and 12 in maskpro: the rate falls with the budget, and validation is seen to the end."
    run = learned(lambda step: mask_problem()[2], budget=150, learning_rate=3.)
    steps = [row for row in run.history if 'loss' in row]
    used = [0, *(row['forwards'] for row in steps)]
    final = make_method('simple').final_rate
    rates = [3.*(1 - (1 - final)*forwards/150) for forwards in used[:-1]]
    assert [row['learning_rate'] for row in steps] == pytest.approx(rates)
    looks = [row['step'] for row in run.history if 'val_loss' in row]
    assert looks == sorted({*range(10, len(steps) + 1, 10), len(steps)})

def test_masks_best_and_resume(tmp_path):
    "Bugs 9, 13 and 16 in maskpro: the best look is kept, and a stop in the middle changes nothing."
    rows = mask_problem()[2]
    how = dict(budget=400, learning_rate=100., patience=3)
    whole = learned(lambda step: rows, **how)
    looks = [row['val_loss'] for row in whole.history if 'val_loss' in row]
    _, loss, _, held_out = mask_problem()
    assert whole.masks.loss(loss, held_out, whole.learned) == pytest.approx(min(looks), rel=1e-6)
    class Stop(Exception): pass
    def log(row):
        if row['step'] == 15: raise Stop
    state = tmp_path/'state.safetensors'
    with pytest.raises(Stop): learned(lambda step: rows, state=state, log=log, **how)
    again = learned(lambda step: rows, state=state, **how)
    steps = [[(row['step'], row['loss']) for row in run.history if 'loss' in row]
             for run in (whole, again)]
    assert steps[0] == steps[1] and whole.steps == again.steps
    assert torch.equal(whole.learned, again.learned)
