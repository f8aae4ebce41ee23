"Other libraries' own tests, run on our bijections and chains; see `foreign.py`."
from collections import Counter

import foreign
import pytest

LEAST = dict(nflows=78, normflows=110, zuko=28, revlib=12) # passes, as found; more are welcome
proof = pytest.mark.proof(
    'machine.bijection', 'machine.plugboard', 'machine.rotor', 'machine.reflector',
    'machine.rev_block', 'machine.reversible', 'machine.enigma', 'flow.elementwise',
    'flow.coupling', 'flow.multiscale', 'flow.density', 'flow.depth', seeds=(0, 1))

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "Run a suite in one folder for all tests; skip, with pip's words, what cannot be fetched."
    folder = tmp_path_factory.mktemp('foreign')
    def run(name, fault='', only=()):
        try: return foreign.run_suite(name, folder, fault, only)
        except foreign.NotFetched as e:
            pytest.skip(f'{name} {foreign.SUITES[name].version} could not be fetched: {e}')
    return run

def outcomes(records): return Counter(r['outcome'] for r in records.values())

def failures(records):
    return {test: r['reason'] for test, r in records.items() if r['outcome'] != 'passed'
            and not (r['outcome'] == 'refused' and r['reason'])}

@pytest.mark.parametrize('name', foreign.SUITES)
@proof
def test_a_suite_of_another_library_passes_on_ours(run, name):
    "Each of its tests passes, or is refused with a reason; and each that passes has reached ours."
    records = run(name)
    print(foreign.table({name: records}))
    assert failures(records) == {}
    assert outcomes(records)['passed'] >= LEAST[name]

@pytest.mark.parametrize('name, fault', [
    ('nflows', 'inverse'), ('nflows', 'log_det'), ('nflows', 'dtype'), ('normflows', 'inverse'),
    ('normflows', 'log_det'), ('zuko', 'inverse'), ('zuko', 'log_det'), ('zuko', 'dtype')])
@proof
def test_a_suite_finds_what_is_broken_on_purpose(run, name, fault):
    "An inverse that is off by 1 %, a log-determinant off by .01 nats, one of another dtype."
    of_ours = [f'{foreign.SUITES[name].folder}/ours_test.py']
    broken = run(name, fault, of_ours)
    assert outcomes(broken)['passed'] == 0 < outcomes(broken)['failed']

@proof
def test_a_wrong_gradient_is_found_by_revlib(run):
    broken = run('revlib', 'gradient', ['tests/backward_test.py'])
    assert outcomes(broken)['failed'] > outcomes(broken)['passed']

@pytest.mark.parametrize('name', foreign.NO_TESTS)
@proof
def test_some_source_distributions_have_no_tests(tmp_path, name):
    try: root = foreign.fetch_source(name, foreign.NO_TESTS[name], tmp_path)
    except foreign.NotFetched as e: pytest.skip(f'{name} could not be fetched: {e}')
    assert not [path for path in root.rglob('*.py') if 'test' in path.stem.lower()]

@proof
def test_what_cannot_be_fetched_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv('PIP_INDEX_URL', (tmp_path/'nowhere').as_uri())
    monkeypatch.setenv('PIP_EXTRA_INDEX_URL', '')
    monkeypatch.setenv('PIP_CONFIG_FILE', '/dev/null')
    with pytest.raises(foreign.NotFetched, match='nflows'):
        foreign.run_suite('nflows', tmp_path)
