"Break the reversible engine in many ways, and see that a test notices each."
import json, os, shutil, subprocess, sys

import pytest

from enigma_lab.lab.runs import checkout

ROOT = checkout(__file__)

# room -> what stands there, what a tired hand might have written, and a test that notices
MUTANTS = dict(
    steps=[
        ('if not all(map(torch.equal, before, after)): self.state = before',
         'pass',
         'test_engine.py::test_random_functions_under_func[dropout]'),
        ('set_random_state(device, state)\n',
         'pass\n',
         'test_engine.py::test_random_functions_under_func[dropout]'),
        ('for m in moved: m.training = not m.training\n        try',
         'pass\n        try',
         'test_engine.py::test_modes[0]'),
        ('if self.amp is None: return contextlib.nullcontext()',
         'return contextlib.nullcontext()',
         'test_reversible.py::test_behaviour[bf16 autocast-ours]'),
        ('for (held, name, *_), t in zip(self.places, before): held[name] = t',
         'pass',
         'test_engine.py::test_frozen_chains'),
        ('self.sharded = any_sharded(self.modules)',
         'self.sharded = False',
         'test_reversible.py::test_behaviour[FSDP2-ours]'),
        ('for i, t in zip(self.places, tensors): leaves[i] = t',
         'pass',
         'test_engine.py::test_arguments_of_every_kind[0]'),
        ('if not same_buffers:',
         'if False:',
         'test_engine.py::test_buffers_that_change_are_refused[BatchNorm-0]'),
        ('if left := left_behind(step.modules, since):',
         'if left := []:',
         'test_engine.py::test_a_loss_left_on_a_module_is_refused[0]'),
        ('    if older or strange:',
         '    if False:',
         'test_engine.py::test_borrowed_tensors_are_refused[attribute-0]'),
        ('    if older or strange:',
         '    if strange:',
         'test_engine.py::test_borrowed_tensors_are_refused[made-0]'),
        ('if isinstance(out, Tensor): return out',
         'return out',
         'test_engine.py::test_one_result_is_asked_for[0]'),
        ('check_known(self, out, since, (*extras, *self.params), known)\n        try_twice',
         'try_twice',
         'test_engine.py::test_borrowed_tensors_are_refused[attribute-25165824]'),
        ('        check_left(self, since)\n        check_known',
         '        check_known',
         'test_engine.py::test_a_loss_left_on_a_module_is_refused[25165824]'),
        ('            check_left(self, since)\n            looked',
         '            looked',
         'test_engine.py::test_a_loss_left_on_a_module_is_refused[0]'),
        ('try_twice(self, out, repeat, b, extras)\n        return out\n\n# %%',
         'return out\n\n# %%',
         'test_engine.py::test_frozen_chains'),
        ('        else: g = gb + g\n',
         '        else: g = gb\n',
         'test_engine.py::test_blocks_are_a_list'),
        ('create_graph=torch.is_grad_enabled()',
         'create_graph=False',
         'test_engine.py::test_gradient_penalties[0]'),
        ('streams = [b, a] if self.inverse else [a, b]',
         'streams = [a, b]',
         'test_engine.py::test_channels_on_another_axis')],
    reversible=[
        ('a, b = a.view_as(a), b.view_as(b)\n        ctx.save_for_backward(a, b)',
         'ctx.save_for_backward(a, b)\n        a, b = a.view_as(a), b.view_as(b)',
         'test_engine.py::test_gradient_penalties[0]'),
        ("if self.memory == 'reverse' and not in_forward_mode(self, steps, streams):",
         "if self.memory == 'reverse':",
         'test_engine.py::test_forward_mode[False]'),
        ('def append(self,', 'def append_(self,', 'test_engine.py::test_blocks_are_a_list')],
    internals=[
        ('elif node._sequence_nr() < since: older = True',
         'elif node._sequence_nr() < since: pass',
         'test_engine.py::test_borrowed_tensors_are_refused[made-0]')])
CASES = [(room, *mutant) for room, mutants in MUTANTS.items() for mutant in mutants]

# one process has imported torch already; each mutant gets a copy of that process
NURSERY = """
import json, os, sys
from pathlib import Path
import pytest, torch, torch._dynamo, torch.distributed.fsdp, torch.func

for room, good, bad, test in json.load(sys.stdin):
    path = Path('enigma_lab/machine')/(room + '.py')
    whole = path.read_text(encoding='utf-8')
    assert whole.count(good) == 1, good
    path.write_text(whole.replace(good, bad), encoding='utf-8')
    child = os.fork()
    if not child:
        os.dup2(2, 1)
        os._exit(pytest.main(['-xq', '-p', 'no:cacheprovider', 'tests/' + test]))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    path.write_text(whole, encoding='utf-8')
    print(json.dumps([room, good, bad, code]), flush=True)
"""

def try_mutants(cases, root):
    "Run the test of each mutant in a copy of the package; return pytest's exit codes."
    shutil.copytree(ROOT/'enigma_lab', root/'enigma_lab')
    for name in ('tests', 'nbs', 'runs', 'pyproject.toml', 'settings.ini'):
        (root/name).symlink_to(ROOT/name)
    env = dict(os.environ, PYTHONPATH=str(root), PYTHONDONTWRITEBYTECODE='1')
    done = subprocess.run([sys.executable, '-c', NURSERY], input=json.dumps(cases), cwd=root,
                          env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {(room, good, bad): code for room, good, bad, code in
            map(json.loads, done.stdout.splitlines())}

@pytest.mark.proof('machine.steps', 'machine.reversible', 'machine.internals', 'machine.compile')
def test_each_broken_engine_is_noticed(tmp_path):
    "A test of its own goes red for each; all of these tests are green for the engine as it is."
    found = try_mutants(CASES, tmp_path)
    assert len(found) == len(CASES) >= 20
    assert {case: code for case, code in found.items() if code != 1} == {}
