"Draw random reversible chains and ways to run them: equal to plain autograd, or refused."
import random
from collections import Counter
from dataclasses import fields, replace

import pytest, torch
from torch import nn

from enigma_lab.bench import fuzz as page
from enigma_lab.bench.fuzz import (BODIES, EXTRAS, FOREIGN, NOISES, NORMS, PATHS, Case, Plain,
                                   Trial, attempt, draw_case, fuzz, judge, kind_of, make_blocks,
                                   usual, write_report)
from enigma_lab.machine.reversible import ReversibleSequence

# the bars

def check(report, few):
    "No silent difference, no foreign error, one verdict at every size, few refusals."
    text = write_report(report)
    print(text)
    assert not report.found('DIFFERENT') and not report.found('crash'), text
    assert not report.by_size(), text
    assert len(report.found('invalid')) <= .005*len(report.verdicts), text
    eager = lambda case: case.path == 'eager'
    assert report.refused(lambda case: eager(case) and usual(case)) == 0, text
    assert report.refused(eager) <= few[0], text
    assert report.refused(lambda case: not eager(case)) <= few[1], text

def test_200_cases():
    "The compiler inductor alone takes a quarter of a minute; it has its turn in the proof."
    check(fuzz(200, seed=0, choose=lambda case: case.flavour != 'inductor'), (.1, .3))

@pytest.mark.proof('machine.reversible', 'bench.fuzz', seeds=(0,))
def test_2000_cases():
    check(fuzz(2000, seed=0), (.1, .3))

# the generator

def test_a_case_is_its_seed():
    for seed in range(300):
        case = draw_case(seed)
        assert eval(repr(case)) == case == draw_case(seed)
    one, other = (attempt(replace(draw_case(3), path='eager', flavour='plain'), True)[0]
                  for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)

def test_everything_is_drawn():
    cases = [draw_case(seed) for seed in range(2000)]
    assert {(c.path, c.flavour) for c in cases} == {
        (path, flavour) for path, (_, flavours) in PATHS.items() for flavour in flavours}
    for column, names in enumerate((BODIES, NORMS, {'none': 1, **NOISES})):
        assert {part.split()[column] for c in cases for part in c.parts} == {*names}
    assert {e for c in cases for e in c.extras} == {*EXTRAS}
    assert {c.foreign for c in cases} == {*FOREIGN}
    for field in fields(Case)[4:]: # each setting in several values, none of them nearly always
        counts = Counter(getattr(c, field.name) for c in cases)
        if field.name in ('parts', 'extras', 'width', 'foreign'): continue
        assert len(counts) > 1 and max(counts.values()) < .9*len(cases), (field.name, counts)

# the oracle

@pytest.mark.parametrize('seed', range(6))
def test_oracle_is_differentiated_rightly(seed):
    "Finite differences know no gradient."
    case = replace(draw_case(seed), path='eager', flavour='plain', exact=False, dtype='float64',
                   rows=2, hooks=False)
    trial = Trial(case, False)
    def run(*values):
        torch.manual_seed(0)
        random.seed(0)
        for part in trial.module.modules():
            if getattr(part, 'own', None): part.own.manual_seed(0)
        return trial.call(dict(zip(trial.leaves(), values)))
    case.buffer == 'update' or torch.autograd.gradcheck(
        run, tuple(trial.leaves().values()), fast_mode=True)

@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_exact_oracle_is_on_the_grid(dtype):
    "The oracle's own rounding gives the engine's bits, and streams that are undone to the last."
    case = Case(4, parts=('mlp layer none', 'conv none none')*3, exact=True, dtype=dtype)
    ours, plain = (Trial(case, own) for own in (True, False))
    with torch.no_grad():
        y, expected = ours.module(ours.x), plain.module(plain.x)
        assert torch.equal(y, expected) and torch.equal(y, (y/page.GRID).round()*page.GRID)
        back = ours.module.inverse(y)
    assert torch.equal(back, torch.cat(ours.module.split(ours.x), -1))

# the judge: engines that are broken on purpose

class Broken(Plain):
    "Be an engine without a fault; those below have one each."
    def __init__(self, blocks, exact=False, grid=None, axis=-1, keep=None):
        super().__init__(blocks, exact, axis)

class Forgets(Broken):
    "The last block's parameters get no gradient."
    def forward(self, x, *extras, **named):
        for p in self.blocks[-1].parameters(): p.requires_grad_(False)
        y = super().forward(x, *extras, **named)
        for p in self.blocks[-1].parameters(): p.requires_grad_(True)
        return y

class Shifts(Broken):
    "A number is drawn too many, so every mask is another."
    def forward(self, x, *extras, **named):
        torch.rand(1)
        return super().forward(x, *extras, **named)

class Slightly(Broken):
    "Gradients are off by a hundredth."
    def forward(self, x, *extras, **named):
        y = super().forward(x, *extras, **named)
        y.requires_grad and y.register_hook(lambda grad: 1.01*grad)
        return y

class Twice(Broken):
    "A buffer is updated twice."
    def forward(self, x, *extras, **named):
        with torch.no_grad(): super().forward(x, *extras, **named)
        return super().forward(x, *extras, **named)

class Refuses(Broken):
    def forward(self, x, *extras, **named):
        raise RuntimeError('a reversible step runs twice, but this one must not')

class Fails(Broken):
    def forward(self, x, *extras, **named): return x.view(-1, 7)

NOISY = Case(1, parts=('linear none functional', 'mlp none none')*2)
REMEMBERS = Case(1, buffer='update')
NORMED = Case(1, parts=('linear batch none',)*4) # what it remembers shows in buffers alone

@pytest.mark.parametrize('case', [NOISY, replace(NOISY, scale=True, dtype='float64'),
                                  replace(NOISY, exact=True, extras=('scalar', 'mask'))])
def test_the_engine_agrees(case): assert judge(case).verdict == 'equal'

@pytest.mark.parametrize('engine, case, verdict', [
    (Broken, NOISY, 'equal'), (Broken, REMEMBERS, 'equal'), (Forgets, NOISY, 'DIFFERENT'),
    (Shifts, NOISY, 'DIFFERENT'), (Slightly, NOISY, 'DIFFERENT'), (Twice, REMEMBERS, 'DIFFERENT'),
    (Broken, NORMED, 'equal'), (Twice, NORMED, 'DIFFERENT'),
    (Refuses, NOISY, 'refused'), (Fails, NOISY, 'crash')])
def test_a_broken_engine_is_found(engine, case, verdict, monkeypatch):
    monkeypatch.setattr(page, 'ReversibleSequence', engine)
    assert judge(case).verdict == verdict

@pytest.mark.parametrize('path', [path for path in PATHS if path != 'compile'])
def test_every_path_sees_a_fault(path, monkeypatch):
    "On every path, plain autograd is equal to itself, and a hundredth too much is not."
    flavour = next(iter(PATHS[path][1]))
    case = Case(2, path, flavour, parts=('mlp layer none', 'attention none none')*2,
                block='pair', dtype='float32' if path == 'amp' else 'float64')
    monkeypatch.setattr(page, 'ReversibleSequence', Broken)
    assert judge(case).verdict == 'equal'
    class Wrong(Broken):
        def forward(self, x, *extras, **named):
            y = super().forward(x, *extras, **named)
            return y + .2*(y - y.detach())
    monkeypatch.setattr(page, 'ReversibleSequence', Wrong)
    assert judge(case).verdict == 'DIFFERENT'

def test_finite_differences_are_asked(monkeypatch):
    "When both engines are wrong in the same way, the slope still tells."
    class Wrong(Plain):
        def __init__(self, blocks, exact=False, axis=-1, grid=None, keep=None):
            super().__init__(blocks, exact, axis)
        def forward(self, x, *extras, **named):
            y = super().forward(x, *extras, **named)
            return y + .5*(y - y.detach())
    monkeypatch.setattr(page, 'ReversibleSequence', Wrong)
    monkeypatch.setattr(page, 'Plain', Wrong)
    found = judge(Case(1, dtype='float64'))
    assert found.verdict == 'DIFFERENT' and 'slope' in found.kind

# whose words

def test_a_refusal_is_told_from_a_crash():
    chain = ReversibleSequence([(nn.BatchNorm1d(2), nn.Linear(2, 2))], keep=0)
    with pytest.raises(RuntimeError) as ours:
        chain(torch.randn(4, 4, requires_grad=True)).sum().backward()
    assert kind_of(ours.value)
    wrapped = ValueError('a compiler failed')
    wrapped.__cause__ = ours.value
    assert kind_of(wrapped)
    with pytest.raises(RuntimeError) as foreign: torch.randn(2, 3) @ torch.randn(2, 3)
    assert not kind_of(foreign.value)

def test_blocks_are_drawn_alike():
    "Two calls give equal weights: the engine and the oracle start from one place."
    case = replace(draw_case(8), block='rev', scale=True)
    one, other = (nn.ModuleList(make_blocks(case)).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
