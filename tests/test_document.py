"Say every setting that SGDD's document lists, and see what it does."
import math
from dataclasses import fields, replace

import pytest
import torch
from transformers import TrainerCallback

from enigma_lab.data.pairs import get_dataloader, named_source
from enigma_lab.lab.runs import checkout
from enigma_lab.lab.task import run_task
from enigma_lab.lab.trainer import training_arguments
from enigma_lab.sgdd.encoder import minilm_folder
from enigma_lab.sgdd.model import save_best_model
from enigma_lab.sgdd.sampling import maskgit_sample
from enigma_lab.sgdd.train import (
    EngineSettings, SGDDTrainConfig, cosine_rate, make_sgdd_config, new_model, prepare_sgdd,
    read_corpus, read_yaml, sampling_of, settings, task, train_sgdd)

ROOT = checkout(__file__)
TEXTS = ['the shy baker sold the rusty anchor', 'two clever nurses opened the golden basket']

def made(**changes):
    torch.manual_seed(0)
    return new_model(make_sgdd_config('smoke', **changes), TEXTS).eval()

def count(model, part): return sum(p.numel() for p in getattr(model, part).parameters())

def hears_time(model): # whether the share that is hidden changes what the decoder says
    x, c = torch.full((1, 4), 5), model.vector(torch.ones(1, model.config.encoder_dim))
    return not torch.equal(model.decoder.hidden(x, c, torch.zeros(1)),
                           model.decoder.hidden(x, c, torch.ones(1)))

MODEL = { # field: (value, what is looked at, what is seen)
    'encoder': (str(minilm_folder()), lambda m: m.encoder.source, str(minilm_folder())),
    'proj_dim': (512, lambda m: count(m, 'projection'), 384*512 + 512),
    'num_layers': (6, lambda m: len(m.decoder.layers), 6),
    'dim': (512, lambda m: m.decoder.embed.weight.shape[1], 512),
    'num_heads': (8, lambda m: m.config.num_heads, 8),
    'ffn_dim': (2048, lambda m: max(p.shape[0] for p in m.decoder.parameters()), 2048),
    'max_len': (64, lambda m: m.length.out_features, 64),
    'conditioning': ('cross', lambda m: m.config.conditioning, 'cross'),
    'positions': ('rope', lambda m: m.config.positions, 'rope'),
    'norm': ('post', lambda m: m.config.norm, 'post'),
    'time': (True, hears_time, True),
    'schedule': ('cosine', lambda m: type(m.diffusion.schedule).__name__, 'CosineNoiseSchedule'),
    'null_share': (.2, lambda m: m.config.null_share, .2),
    'learned_null': (False, lambda m: isinstance(m.null, torch.nn.Parameter), False),
    'length_head': (False, lambda m: m.length, None),
    'standardise': (False, lambda m: (m.fit_statistics(torch.randn(9, 384)),
                                      m.z_std.unique().tolist())[1], [1.]),
    'dropout': (.1, lambda m: m.config.dropout, .1),
    'num_vectors': (2, lambda m: m.config.encoder_dim, 768),
    'size': ('base', lambda m: len(m.decoder.layers), 6)}

# go with them: by place the coefficients stay as they are, and the length must be known
MORE = dict(conditioning=dict(proj_dim=32), norm=dict(conditioning='memory'),
            proj_dim=dict(conditioning='adaln'), length_head=dict(conditioning='adaln'))

@pytest.fixture(scope='module')
def plain(): return made()

@pytest.mark.parametrize('field', MODEL)
def test_a_setting_of_the_model(field, plain):
    value, look, wanted = MODEL[field]
    assert field in settings.all
    assert look(made(**{field: value}, **MORE.get(field, {}))) == wanted
    if field != 'encoder': assert look(plain) != wanted or getattr(plain.config, field) == value

def engine(**changes):
    "The arguments of the Trainer, after our callback has seen them."
    config = make_sgdd_config('smoke', **changes)
    args = training_arguments(config, ROOT/'none', 20)
    EngineSettings(config).on_init_end(args, None, None)
    return args

ENGINE = { # field: (value, what the Trainer is told, what that is)
    'batch_size': (32, 'per_device_train_batch_size', 32),
    'gradient_accumulation_steps': (4, 'gradient_accumulation_steps', 4),
    'grad_clip': (.5, 'max_grad_norm', .5),
    'workers': (4, 'dataloader_num_workers', 4),
    'keep_checkpoints': (5, 'save_total_limit', 5),
    'eval_steps': (5, 'eval_steps', 5),
    'save_steps': (20, 'save_steps', 20),
    'precision': ('bf16', 'bf16', True),
    'gradient_checkpointing': (True, 'activation_checkpointing', True),
    'seed': (42, 'seed', 42)}

@pytest.mark.parametrize('field', ENGINE)
def test_a_setting_of_the_engine(field):
    value, told, wanted = ENGINE[field]
    assert getattr(engine(**{field: value}), told) == wanted != getattr(engine(), told)

def test_the_validation_batch_is_twice_as_large():
    assert engine(batch_size=32).per_device_eval_batch_size == 64

def test_half_precision_needs_a_gpu():
    "The document's FP16 can be said, and where it cannot be computed that is said, too."
    assert make_sgdd_config('brief-test', precision='bf16').precision == 'bf16'
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='needs a GPU'):
            make_sgdd_config('smoke', precision='fp16')

def test_a_cosine_with_a_warm_up():
    linear = lambda step: min(1, (step + 1)/10) * (1 - step/100)
    rate = cosine_rate(linear, 10)
    for step in range(100):
        wanted = min(1, (step + 1)/10)*(1 + math.cos(math.pi*step/100))/2
        assert rate(step) == pytest.approx(wanted)
    assert make_sgdd_config('brief-phase1').rate == 'cosine'

SAMPLER = dict(steps=4, guidance=2., order='random', temperature=1.)

@pytest.mark.parametrize('field', SAMPLER)
def test_a_setting_of_the_sampler(field, plain):
    "It is a field of the config, goes to the sampler, and changes what is written."
    config = make_sgdd_config('smoke', **{field: SAMPLER[field]})
    before, after = (sampling_of({f.name: getattr(c, f.name) for f in fields(SGDDTrainConfig)})
                     for c in (make_sgdd_config('smoke'), config))
    assert {k for k in before if before[k] != after[k]} == {field}
    z, seen = torch.randn(4, 384, generator=torch.Generator().manual_seed(0)), []
    for how in (before, after):
        t = maskgit_sample(plain, z, torch.full((4,), 16), **how,
                           generator=torch.Generator().manual_seed(0))
        seen.append((t.evaluations, t.call.tolist(), t.tokens.tolist()))
    assert seen[0] != seen[1]

def test_the_formula_of_guidance(plain):
    "The document adds w (p_cond − p_uncond) to probabilities; ours adds to their logarithms."
    from enigma_lab.sgdd.sampling import guided
    a, b = torch.tensor([[.7, .2, .1], [.5, .3, .2]]).log(), torch.full((2, 3), 1/3).log()
    p = (a.exp() + 2*(a.exp() - b.exp())).clamp(min=0)
    assert torch.allclose(guided(a, b, 2., 'prob').exp(), p/p.sum(1, keepdim=True))
    assert not torch.allclose(guided(a, b, 2.).exp(), p/p.sum(1, keepdim=True))
    assert sampling_of(dict(formula='prob', ramp=False))['formula'] == 'prob'

DOCUMENT = { # what 004 says of both phases, and of each
    '': dict(encoder='roberta-base', size='brief', batch_size=32, max_sentences=100_000,
             optimizer='adamw', rate='cosine', eval_epochs=True, steps=16, guidance=2.,
             formula='prob', ramp=False, order='confidence', workers=4, svd=True),
    'phase1_wiki': dict(phase=1, data='wikipedia', epochs=10),
    'phase2_qqp': dict(phase=2, data='qqp', epochs=5, base='train_sgdd')}

@pytest.mark.parametrize('name', ['phase1_wiki', 'phase2_qqp'])
def test_the_files_are_the_document(name):
    config = make_sgdd_config(**read_yaml(ROOT/'configs'/f'{name}.yaml'))
    for field, value in {**DOCUMENT[''], **DOCUMENT[name]}.items():
        assert getattr(config, field) == value, field
    # and whatever a person says goes before the file
    assert replace(config, guidance=0., workers=0).guidance == 0

def test_names_of_data():
    "One table says what a name stands for; training, loaders and evaluation read it."
    assert named_source('wikipedia').startswith('wikimedia/wikipedia')
    assert named_source('qqp').startswith('sentence-transformers/quora')
    assert named_source('hard') == 'hard' and named_source('./qqp') == './qqp'
    assert len(read_corpus('small', most=50).train) == 50
    assert isinstance(read_corpus('paraphrase', phase=2, most=5).train[0], tuple)

def test_the_call_of_the_document(plain):
    "Run its call of the loader, with its words."
    words = dict(batch_size=4, num_workers=0, pin_memory=False)
    loader = get_dataloader(dataset_name='paraphrase', split='validation', **words,
                            tokenizer=plain.tokenizer, num_samples=20)
    batch = next(iter(loader))
    assert {'input_ids', 'attention_mask', 'labels'} == batch.keys()
    assert batch['input_ids'].shape == (4, 64)
    loader = get_dataloader(dataset_name='small', split='train', tokenizer=plain.tokenizer,
                            num_samples=20, **words)
    assert sum(len(batch['input_ids']) for batch in loader) == 20

class SeesAndKeeps(TrainerCallback):
    "Keep the best model by the document's function; note the batches that a model is trained on."
    def __init__(self, model, folder):
        self.folder, self.best, self.losses, self.seen = folder, math.inf, [], []
        self.model = model
        model.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, model, _, batch):
        if model.training: self.seen.append({k: v.clone() for k, v in batch.items()})

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.losses.append(metrics['eval_loss'])
        self.best = save_best_model(self.model, self.losses[-1], self.folder, self.best)

@pytest.mark.parametrize('data, phase', [('small', 1), ('paraphrase', 2)])
def test_the_documents_names_are_the_training(own_runs, tmp_path, monkeypatch, data, phase):
    "Its loader gives the batches that the training sees; its best model is the training's."
    monkeypatch.setenv('ENIGMA_CACHE', str(tmp_path/'cache'))
    few = dict(data=data, max_sentences=40, test_sentences=8)
    first = make_sgdd_config('smoke', max_steps=1, **few)
    base = train_sgdd(first, loop=False, test=False).name if phase == 2 else ''
    config = make_sgdd_config('smoke', **few, phase=phase, base=base,
                              max_steps=9, eval_steps=3, save_steps=3, learning_rate=.3,
                              warmup_steps=9, decay_share=.001, seed=3) # the rate rises too far
    parts = prepare_sgdd(config)
    watch = SeesAndKeeps(parts.model, tmp_path/'best')
    more = lambda parts: (*task.callbacks(parts), watch)
    run = run_task(replace(task, callbacks=more), config, parts, loop=False, test=False)
    loader = get_dataloader(parts.train, config.batch_size, seed=config.seed)
    given = [batch for _ in range(3) for batch in loader]
    assert len(given) == len(watch.seen) == 9 # three epochs, in which order and noise differ
    for mine, trained in zip(given, watch.seen):
        assert mine.keys() == trained.keys()
        assert all(torch.equal(mine[k], trained[k]) for k in mine)
    # and the rows are those that the loader makes of the name
    named = get_dataloader(dataset_name=data, tokenizer=parts.model.tokenizer, shuffle=False,
                           num_samples=40, batch_size=40, max_length=parts.model.config.max_len)
    rows, = named
    written = rows.get('labels', rows['input_ids'])[:, :parts.train.tokens.shape[1]]
    assert torch.equal(torch.where(written == -100, parts.model.config.pad_id, written),
                       parts.train.tokens)
    assert watch.best == run.env['kept_loss'] == min(watch.losses) < watch.losses[-1]
    for name in ('model.safetensors', 'config.json', 'tokenizer.json'):
        assert (tmp_path/'best'/name).read_bytes() == (run.checkpoint/name).read_bytes()

def test_results_go_to_the_tracker(own_runs, tmp_path, monkeypatch):
    "Find the scores of a training and of an evaluation in the tracker that the run names."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from enigma_lab.lab.runs import read_json
    from enigma_lab.sgdd.train import evaluate_run, find_base
    monkeypatch.setenv('ENIGMA_CACHE', str(tmp_path/'cache'))
    with pytest.raises(FileNotFoundError, match='phase 2 begins from a finished run of phase 1'):
        find_base('train_sgdd')
    few = dict(max_steps=2, max_sentences=40, test_sentences=8, eval_windows=8,
               tracker='tensorboard')
    run = train_sgdd(make_sgdd_config('smoke', **few), loop=False, test=False)
    path = evaluate_run(run, num_samples=4, steps=2)
    found = EventAccumulator(str(run.path/'tensorboard')).Reload()
    scalar = lambda name: found.Scalars(name)[-1].value
    assert scalar('final/val_exact_match') == pytest.approx(run.metrics['val_exact_match'])
    assert scalar(f'{path.stem}/bleu') == pytest.approx(read_json(path)['metrics']['bleu'])
    assert read_json(path)['sampling'] == {**sampling_of(run.config), 'steps': 2}
    assert find_base('train_sgdd').name == run.name
