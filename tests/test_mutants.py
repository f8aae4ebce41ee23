"Break the reversible engine in many ways, and see that its tests notice each."
import os, shutil, subprocess, sys

import pytest

from enigma_lab.lab.runs import checkout

ROOT = checkout(__file__)

# room -> pairs of what stands there and what a tired hand might have written
MUTANTS = dict(
    steps=[
        # randomness and modes
        ("if not all(map(torch.equal, before, after)): self.state = before", "pass"),
        ("set_random_state(device, state)\n", "pass\n"),
        ("finally: set_random_state(device, now)", "finally: pass"),
        ("for m in moved: m.training = not m.training\n        try", "pass\n        try"),
        ("if self.amp is None: return contextlib.nullcontext()", "return contextlib.nullcontext()"),
        # tensors that are read
        ("held[name] = t if i is None else params[i]", "held[name] = t"),
        ("for (held, name, *_), t in zip(self.places, before): held[name] = t", "pass"),
        ("i = found.setdefault(t, len(found)) if t.requires_grad else None",
         "i = len(found) if t.requires_grad else None; found[t] = len(found)"),
        ("self.sharded = any(map(is_sharded, self.modules))", "self.sharded = False"),
        ("for i, t in zip(self.places, tensors): leaves[i] = t", "pass"),
        # refusals
        ("if not same_input:", "if False:"),
        ("if not same_buffers:", "if False:"),
        ("if left := left_behind(step.modules, since):", "if left := []:"),
        ("    if older or strange:", "    if False:"),
        ("    if older or strange:", "    if strange:"),
        ("if self.versions != [version(t) for t in self.buffers]:", "if False:"),
        ("if isinstance(out, Tensor): return out", "return out"),
        ("if out.shape != a.shape:", "if False:"),
        ("check_known(self, out, since, (*extras, *self.params), known)\n        try_twice",
         "try_twice"),
        ("try_twice(self, out, repeat, b, extras)\n        return out\n\n# %%",
         "return out\n\n# %%"),
        # gradients and values
        ("return (gy, -gy) if self.inverse else (gy if s is None else s*gy, gy)",
         "return gy if s is None else s*gy, gy"),
        ("gs = -(gy*y).sum()/s if self.inverse else (gy*a).sum()", "gs = (gy*a).sum()"),
        ("        else: g = gb + g\n", "        else: g = gb\n"),
        ("return y - out if s is None else (y - out)/s", "return y - out"),
        ("create_graph=torch.is_grad_enabled()", "create_graph=False"),
        ("return (s.abs().log()*(-n if self.inverse else n)).expand(like.shape)",
         "return (s.abs().log()*n).expand(like.shape)"),
        ("streams = [b, a] if self.inverse else [a, b]", "streams = [a, b]")],
    reversible=[
        ("a, b = a.view_as(a), b.view_as(b)\n        ctx.save_for_backward(a, b)",
         "ctx.save_for_backward(a, b)\n        a, b = a.view_as(a), b.view_as(b)"),
        ("begin = frozen_steps(steps, a, b)", "begin = 0"),
        ("if a.requires_grad or b.requires_grad:\n            raise",
         "if False:\n            raise"),
        ("if self.memory == 'reverse' and not in_forward_mode(self, steps, streams):",
         "if self.memory == 'reverse':"),
        ("def append(self,", "def append_(self,"),
        ("if exact: check_range(peaks.max(), exact[0].grid, a.dtype)", "pass")],
    internals=[
        ("elif node._sequence_nr() < since: older = True",
         "elif node._sequence_nr() < since: pass"),
        ("        raise refusal\n", "        pass\n")],
    compile=[
        ("if torch.compiler.is_compiling() and draws(func, args, kwargs or {}):", "if False:"),
        ("    check_owned(module)\n", ""),
        ("return repeat.again(call, *args)", "return call(*args)")])

FIRST = ['tests/test_engine.py', 'tests/test_reversible.py', 'tests/test_compile.py']
CASES = [(room, i) for room, pairs in MUTANTS.items() for i in range(len(pairs))]

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the package, which is broken and mended again."
    root = tmp_path_factory.mktemp('mutants')
    shutil.copytree(ROOT/'enigma_lab', root/'enigma_lab')
    for name in ('tests', 'nbs', 'runs', 'pyproject.toml', 'settings.ini'):
        (root/name).symlink_to(ROOT/name)
    return root

def run_tests(root):
    env = dict(os.environ, PYTHONPATH=str(root), PYTHONDONTWRITEBYTECODE='1')
    return subprocess.run(
        [sys.executable, '-m', 'pytest', '-xq', '-p', 'no:cacheprovider', *FIRST,
         '-k', 'not process and not 48 and not memory'],
        cwd=root, env=env, capture_output=True, text=True)

@pytest.mark.proof('machine.steps', 'machine.reversible', 'machine.internals', 'machine.compile')
@pytest.mark.parametrize('room, i', CASES, ids=[f'{room} {i}' for room, i in CASES])
def test_a_broken_engine_is_noticed(copy, room, i):
    path = copy/f'enigma_lab/machine/{room}.py'
    whole, (good, bad) = path.read_text(encoding='utf-8'), MUTANTS[room][i]
    assert whole.count(good) == 1, good
    path.write_text(whole.replace(good, bad), encoding='utf-8')
    try: done = run_tests(copy)
    finally: path.write_text(whole, encoding='utf-8')
    assert done.returncode == 1, f'{good} -> {bad}\n{done.stdout[-1500:]}{done.stderr[-1500:]}'
