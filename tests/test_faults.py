"""Trainings under hostile use: whatever ends one, the same command goes on, to the same bits.

The points are named, or drawn with `SEED`. Each finished run is scored again, from the model on
the disk (`faults.rescore`).
"""
import json, os, random, shutil, signal, time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil, pytest, torch
from safetensors.torch import load_file

import faults
from faults import Fault
from enigma_lab.lab.runs import Run, read_json, write_json

SEED = 17 # of the drawn points

LM = 'enigma_lab.lm.train:task'
SMALL = ['preset=smoke', 'max_steps=16', 'eval_steps=2', 'save_steps=4', 'dropout=.1',
         'batch_size=4', 'decay_share=0', '--no-test'] # its best look is in the middle

def learning(run):
    "Return what a history says of each update, clocks apart."
    clocks = 'wall_s', 'tokens_per_s', 'images_per_s', 'sentences_per_s'
    rows = [{k: v for k, v in row.items() if k not in clocks} for row in run.history]
    return [row for row in rows if 'step' in row and 'resumed_from' not in row]

@dataclass
class Training:
    "Say how a task trains, where, and what it came to undisturbed."
    address:str
    words:list
    home:Path
    text:Path
    file:str = 'model.safetensors'
    weights:dict = None
    history:list = None
    moments:int = 0

    def runs(self, home):
        "List the folders of its records, oldest first."
        name = {'lm.train': 'train_enigma', 'lm.lora': 'train_lora', 'sgdd.train': 'train_sgdd',
                'ddpm.train': 'train_ddpm'}[self.address[11:].partition(':')[0]]
        found = [Run(p) for p in (home/'runs'/name).glob('*') if p.is_dir()]
        return sorted(found, key=lambda run: run.path.stat().st_ctime if not (
            run.path/'config.json').exists() else (run.path/'config.json').stat().st_ctime)

    def train(self, home, *words, **how):
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

SAVE = 'transformers.trainer:Trainer._save_checkpoint'
STEP = 'transformers.trainer:Trainer.training_step'
WEIGHTS = 'transformers.modeling_utils:safe_save_file'

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
