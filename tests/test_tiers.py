"The three tiers: nothing leaves one silently, and each proof says what it covers."
import shutil, subprocess

import pytest, yaml
from conftest import FOUND, ROOT, read_tiers

from enigma_lab.dev.proof import count_notebooks, digest_suite, find_suites, read_suite

pytestmark = pytest.mark.quick

CITED = set(
    'abstract authors cff-version commit contact date-released doi identifiers keywords license '
    'license-url message preferred-citation references repository repository-artifact '
    'repository-code title type url version'.split())

def test_no_test_has_left_its_tier(request):
    "What pytest has collected is what `tests/tiers.txt` lists, case by case; both ways."
    if any('::' in word for word in request.config.args): pytest.skip('a part of a file was asked')
    found, listed = request.config.stash[FOUND], read_tiers()
    files = {name.split(' ')[1].split('::')[0] for name in found}
    expected = {name: n for name, n in listed.items() if not name.startswith('notebook ')
                and (name.split(' ')[1].split('::')[0] in files
                     or not (ROOT/name.split(' ')[1].split('::')[0]).is_file())}
    assert dict(found) == expected, "if this is what you want, `make tiers` writes the new list"

def test_no_notebook_has_left_its_tier():
    "Every notebook is listed, with the number of cells that are not run."
    listed = {name.split(' ')[1]: n for name, n in read_tiers().items()
              if name.startswith('notebook ')}
    found = {name: left for name, (_, left) in count_notebooks(ROOT).items()}
    assert found == listed, "if this is what you want, `make tiers` writes the new list"

def test_every_proof_covers_modules_that_exist():
    suites = find_suites(ROOT)
    assert suites and all(len(digest_suite(suite, ROOT)) == 64 for suite in suites)

def test_the_list_and_the_markers_agree():
    "pytest's markers and the syntax tree's give the same proofs."
    listed = {name.split(' ')[1] for name in read_tiers() if name.startswith('proof ')}
    found = {f'tests/test_{suite.name}.py::{name}'
             for suite in find_suites(ROOT) for name in suite.tests}
    assert found == listed

def test_a_proof_must_name_what_it_covers(tmp_path):
    (tmp_path/'test_x.py').write_text('@pytest.mark.proof\ndef test_x(): pass')
    with pytest.raises(ValueError, match='must name the modules that it covers, got none'):
        read_suite(tmp_path/'test_x.py')

def test_the_citation_is_valid():
    "Keys and types of the Citation File Format 1.2.0; the version is that of settings.ini."
    cited = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8'))
    assert {'cff-version', 'message', 'title', 'authors'} <= cited.keys() <= CITED
    assert cited['cff-version'] == '1.2.0' and cited['type'] == 'software'
    assert all(isinstance(author['name'], str) for author in cited['authors'])
    assert f"version = {cited['version']}" in (ROOT/'settings.ini').read_text(encoding='utf-8')

def test_the_stand_ins_never_install(tmp_path):
    "Each command that would ask for Quarto runs our target or names it in one line."
    (tmp_path/'.venv'/'bin').mkdir(parents=True)
    (tmp_path/'Makefile').write_text('docs readme:\n\t@echo made $@\n')
    names = 'nbdev_readme nbdev_docs nbdev_preview nbdev_install nbdev_install_quarto'.split()
    said = {}
    for name in names:
        script = shutil.copy(ROOT/'.ci'/'nbdev', tmp_path/'.venv'/'bin'/name)
        done = subprocess.run([script], capture_output=True, text=True)
        said[name] = done.returncode, done.stdout.strip(), done.stderr.strip()
    assert said['nbdev_readme'] == (0, 'made readme', '')
    assert said['nbdev_docs'] == (0, 'made docs', '')
    for name in names[2:]:
        code, out, error = said[name]
        assert code == 1 and out == '' and error.startswith(name) and "'make docs'" in error
        assert error.count('\n') == 0
