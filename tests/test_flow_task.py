"The flow's training under hostile use: ended, moved, damaged, in two processes."
import random

import numpy as np, pytest

from faults import Fault
from test_faults import (
    SEED, STEP, Training, checkpoints, damage, move, refused, stopped_in_the_middle, undisturbed)
from enigma_lab.flow.train import judge, load_flow
from enigma_lab.flow.data import load_points

def write_table(file, shift=0.):
    "Write a table of two columns, of which one depends on the other."
    x = np.random.RandomState(0).randn(400, 2)
    x[:, 1] = np.sin(2*x[:, 0]) + .1*x[:, 1] + shift
    np.savetxt(file, x, delimiter=',', header='a,b', comments='')
    return file

WORDS = ['preset=smoke', 'max_steps=12', 'eval_steps=4', 'save_steps=4', 'batch_size=16',
         '--no-test']

@pytest.fixture(scope='module')
def flow(tmp_path_factory):
    "Train a flow that nobody disturbs."
    home = tmp_path_factory.mktemp('flow')
    table = write_table(home/'table.csv')
    return undisturbed(Training('enigma_lab.flow.train:task', [f'data={table}', *WORDS], home,
                                table, records='train_flow'))

@pytest.mark.proof('flow.train', 'flow.data', 'lab.task', seeds=(17,))
@pytest.mark.parametrize('point', ['drawn', 'asked', 'within', 'damaged', 'moved'])
def test_the_same_command_goes_on(tmp_path, flow, point):
    "SIGKILL at a drawn moment, SIGTERM, within a checkpoint, a damaged one, another place."
    home = tmp_path/'home'
    moment = 1 + int(random.Random(f'{SEED} flow').random()*flow.moments)
    fault = dict(drawn=Fault('moment', nth=moment), asked=Fault(STEP, nth=7, signal='SIGTERM'),
                 within=Fault(flow.save, flow.newest, how='within', room=500)
                 ).get(point, Fault(STEP, nth=11))
    code, said = flow.train(home, fault=fault)
    assert code != 0, said
    if point == 'moved': home = move(home)
    if point == 'damaged': damage(checkpoints(flow.runs(home)[-1])[-1]/flow.saved, 'zeroed')
    flow.resume(home)

@pytest.mark.proof('flow.train', 'flow.data', 'lab.task', seeds=(0,))
def test_another_table_is_refused(tmp_path, flow):
    "Refuse to go on with other numbers under the same name."
    stopped_in_the_middle(flow, tmp_path)
    try:
        write_table(flow.text, shift=.5)
        refused(flow, tmp_path, 'has changed since')
    finally: write_table(flow.text)
    flow.resume(tmp_path)

@pytest.mark.proof('flow.train', 'flow.data', 'lab.task', seeds=(0,))
def test_two_processes_train_as_one(tmp_path, flow):
    "Give each of two processes half of every batch: the same losses, and the saved flow's numbers."
    halves = [word for word in flow.words if not word.startswith('batch_size')]
    pair = Training(flow.address, [*halves, 'batch_size=8', 'processes=2'], flow.home, flow.text,
                    records='train_flow')
    code, said = pair.train(tmp_path)
    assert code == 0, said
    (run,), (one,) = pair.runs(tmp_path), flow.runs(flow.home/'whole')
    looks = lambda run: [row['val_nats'] for row in run.history if 'val_nats' in row]
    assert len(looks(run)) > 2 and np.allclose(looks(run), looks(one), atol=1e-4)
    points = load_points(str(flow.text))
    mine = judge('val', load_flow(run)[0], points, points.validation, 1)['val_nats']
    assert abs(mine - run.metrics['val_nats']) < 1e-6
