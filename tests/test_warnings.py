"Trainings that are built to go wrong, each in one way, and a healthy one beside them."
import random
from unittest.mock import patch

import pytest, torch
import torch.nn.functional as F

from enigma_lab.data.text import Corpus
from enigma_lab.lab.task import main, warning_lines
from enigma_lab.lm import model as lm_model, train as lm_train

pytestmark = [pytest.mark.usefixtures('own_runs'),
              pytest.mark.proof('lm.warnings', 'lm.train', 'lab.task', seeds=(0,))]

LETTERS = 'bcdfghklmnprstvw', 'aeiou'

def words(draw, count=60):
    "Make words of two or three syllables."
    syllable = lambda: ''.join(draw.choice(part) for part in LETTERS)
    return [''.join(syllable() for _ in range(draw.choice((2, 3)))) for _ in range(count)]

HEAD = 'once upon a time in ' # twenty characters, the prompt of a sample

def documents(count, length=40, seed=0):
    "Write documents that begin alike; words follow one another by chance, with some stops."
    known, draw = words(random.Random(0)), random.Random(seed)
    ends = lambda: draw.choice(['', '', '', '.'])
    text = lambda: ' '.join(draw.choice(known) + ends() for _ in range(length))
    return [HEAD + text() for _ in range(count)]

def trained(train, validation, **changes):
    "Train on given documents; return what the record says."
    how = dict(machine='none', dim=64, max_len=64, max_chars=0, max_steps=300, eval_steps=50,
               save_steps=50, warmup_steps=20, batch_size=8, test=False)
    config = lm_train.make_config('smoke', **how | changes)
    corpus = Corpus('built', train, validation, validation)
    with patch.object(lm_train, 'load_text', lambda *args, **how: corpus):
        return lm_train.train(config).metrics

def names(metrics): return {warning['name'] for warning in metrics['warnings']}

def test_a_healthy_training():
    "Text of many documents, new text to judge by: no warning."
    metrics = trained(documents(400), documents(40, seed=1))
    assert metrics['warnings'] == []
    assert metrics['held_out_copied_share'] < .05 and metrics['sample_copied_share'] < .1
    assert warning_lines(metrics) == ['no warning: all that was measured lies within its limits']

def test_validation_text_in_the_training_text():
    "A leak: a perplexity near 1 and no gap, for both parts are known by heart."
    metrics = trained(few := documents(12), few[:6])
    assert 'perplexity' in names(metrics) and 'gap' not in names(metrics)
    # copies are no sign here: the held-out text stands in the training text, too
    assert metrics['held_out_copied_share'] == 1. and 'copies' not in names(metrics)

def test_text_learned_by_heart():
    "One document, a hundred times: validation far above training, samples that are all its copy."
    # with a single look, the last model is the best one, and is kept
    metrics = trained(documents(1, seed=5)*100, documents(40, seed=1), max_steps=200,
                      eval_steps=200, save_steps=200)
    assert {'gap', 'alike', 'copies'} <= names(metrics)
    assert not {'perplexity', 'repeats'} & names(metrics)
    assert any('warning: ' in line and 'by heart' in line for line in warning_lines(metrics))

def test_one_sentence_for_ever():
    "A training text that repeats itself: so do the samples."
    rain = HEAD + 'the rain fell and fell. '*12
    metrics = trained([rain]*100, documents(40, seed=1), max_steps=100)
    assert 'repeats' in names(metrics) and metrics['sample_repeated_share'] > .3

def test_attention_that_sees_the_future():
    "A mask that is late by one: a perplexity near 1 on text that is new, samples of no sense."
    def leaks(q, k, v, scale, mask=None, dropout=0.): # each row has the mask of the next
        if mask is None: late = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(1)
        else: late = torch.cat([mask[..., 1:, :], mask[..., -1:, :]], -2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=late, scale=scale)
    with patch.object(lm_model, 'causal_attention', leaks):
        metrics = trained(documents(400), documents(40, seed=1), max_steps=200)
    assert {'perplexity', 'gibberish'} <= names(metrics)
    assert metrics['held_out_unseen_share'] <= .1 < .35 < metrics['sample_unseen_share']

def test_a_training_that_was_too_short():
    "Twenty updates: gibberish, and nothing else."
    metrics = trained(documents(400), documents(40, seed=1), max_steps=20, eval_steps=10,
                      save_steps=10)
    assert names(metrics) == {'gibberish'}

def test_a_shell_prints_them(tmp_path, capsys):
    "The last lines of a training in a terminal."
    (tmp_path/'text.txt').write_text('\n\n'.join(documents(60)))
    main(lm_train.task, ['preset=smoke', f'data={tmp_path/"text.txt"}', '--no-test'])
    assert 'warning: ' in (said := capsys.readouterr().out) and 'train longer' in said
    assert torch.is_grad_enabled()
