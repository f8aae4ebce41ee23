"Undo the machine at the sizes that are used, within the bound of the record."
import pytest, torch

from enigma_lab.bench.machine import measure_blocks, measure_enigma, measure_rotors
from enigma_lab.machine.enigma import Enigma

@pytest.mark.parametrize('dim', [64, 512, 768])
def test_rotors_invert_within_the_bound(dim):
    "Bound the relative error by 50 eps cond: both orders, three off-diagonals, two dtypes."
    rows = list(measure_rotors((dim,), (0,), 'cpu'))
    assert len(rows) == 2*3*2
    assert all(row['error_over_bound'] <= 1 for row in rows), rows
    assert all(row['repeatable'] for row in rows)
    # away from the special point
    assert all(
        row['condition_number'] > 1.01 for row in rows if row['parametrization'] == 'plu'
    )

@pytest.mark.proof('bench.machine', 'machine.rotor', seeds=(1, 2))
@pytest.mark.parametrize('seed', [1, 2])
@pytest.mark.parametrize('dim', [64, 512, 768, 1024])
def test_rotors_invert_within_the_bound_for_other_seeds(dim, seed):
    rows = list(measure_rotors((dim,), (seed,), 'cpu'))
    assert len(rows) == 2*3*2
    assert all(row['error_over_bound'] <= 1 and row['repeatable'] for row in rows), rows

@pytest.mark.parametrize('dim', [64, 512])
def test_the_whole_machine_inverts(dim):
    for row in measure_enigma((dim,), (0,), 'cpu'):
        limit = 1e-4 if row['dtype'] == 'float32' else 1e-12
        assert row['relative_error'] < limit and row['repeatable'], row
        assert row.get('twice_relative_error', 0) < limit, row
    assert all(
        row['relative_error'] < (1e-6 if row['dtype'] == 'float32' else 1e-14)
        for row in measure_blocks((dim,), (0,), 'cpu')
    )

@pytest.mark.quick
def test_reciprocal_is_not_the_identity():
    torch.manual_seed(0)
    f = Enigma(64, reciprocal=True, num_rotors=2, num_positions=4).double()
    x, t = torch.randn(50, 64, dtype=torch.float64), torch.arange(50)
    with torch.no_grad():
        y = f(x, t)
        assert (f(y, t) - x).abs().max() < 1e-10
        assert ((y - x).norm(dim=-1) > .5 * x.norm(dim=-1)).all()
