"The command line, as a shell sees it."
import json, sys
from pathlib import Path

import nbformat
import pytest

import enigma_lab
from enigma_lab.cli import main
from enigma_lab.lab.runs import checkout, find_run, list_runs
from test_door import in_terminal, piped, run_folders, screen, write_checkout

@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    return write_checkout(tmp_path_factory.mktemp('commands')/'enigma').resolve()

def enigma(toy, *words): return piped('enigma-lab', *words, cwd=toy)

def test_help(toy):
    overview = enigma(toy, '--help')
    assert overview.returncode == 0
    for name in 'train generate runs docs bench'.split():
        assert f'    {name}' in overview.stdout
        help = enigma(toy, name, '--help')
        assert help.returncode == 0 and help.stdout.startswith(
            f'usage: enigma-lab {name} ') and help.stderr == ''
    assert '--max_new_tokens' in enigma(toy, 'generate', '--help').stdout

def test_help_is_quick(toy):
    code = (
        "import sys\nfrom enigma_lab.cli import main\nmain([])\nassert not {'torch', 'papermill', "
        "'pandas', 'transformers'} & set(sys.modules)")
    assert piped(sys.executable, '-c', code, cwd=toy).returncode == 0

def test_train_and_runs(toy):
    code, text = in_terminal('enigma-lab', 'train', 'train_toy', 'steps=6', cwd=toy)
    assert code == 0, text
    first, = run_folders(toy, 'train_toy')
    assert json.loads((first/'metrics.json').read_text()) == {'val_nll_nats': .5} and (
        first/'train_toy.ipynb').exists()
    # the same progress as papermill's door
    assert 'step 5 · 83 % · loss 0.600 · val 2.011 bits/char · 5,100 tokens/s' in screen(text)
    alone = enigma(toy, 'runs', 'compare', 'train_toy')
    assert alone.returncode == 2 and 'takes two runs' in alone.stderr
    # by its path, without a terminal
    result = enigma(toy, 'train', 'nbs/train_toy.ipynb', 'steps=1')
    assert result.returncode == 0, result.stderr
    head, *listed = enigma(toy, 'runs').stdout.splitlines()
    assert head.split() == ['name', 'state', 'data', 'score', 'also', 'age']
    assert [line.split()[1:5] for line in listed] == [['finished', '0.5', 'val', 'nats']]*2
    # the newest comes first
    assert listed[1].startswith(f'train_toy/{first.name} ')
    compared = enigma(toy, 'runs', 'compare', 'train_toy').stdout.splitlines()
    assert [line.split() for line in compared if line.startswith('steps')] == [['steps', '6', '1']]

@pytest.mark.parametrize('words, message', [
    (['trian'], "invalid choice: 'trian'"),
    (['train'], 'arguments are required: NOTEBOOK'),
    (['train', 'train_nothing'], 'there are [train_bad, train_quick, train_toy]'),
    (['train', 'foreign.ipynb'], 'got foreign.ipynb; there are [train_bad'),
    (['train', 'train_toy', 'step=5'], "train_toy.ipynb has no parameter 'step'; it has [steps, "
                                       "data]"),
    (['train', 'train_toy', 'steps'], 'a setting is written name=value, got steps'),
    (['runs', 'list', 'train_other'], 'no runs of train_other'),
    (['runs', 'train_tyo'], 'near are [train_toy'),
    (['runs', 'train_toy', '--columns', 'name,stepz'], "got ['stepz']; near are [steps]"),
    (['runs', 'one', 'two'], "runs takes one name, got ['one', 'two']"),
    (['runs', '-n', '-1'], '-n must be at least 0, got -1'),
    (['bench', 'nothing'], 'no benchmark called nothing; there are ['),
    (['generate', '-', 'text', '--seed', 'x'], "invalid int value: 'x'")])
def test_wrong_question(toy, words, message):
    before = run_folders(toy, 'train_toy')
    result = enigma(toy, *words)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.stdout == ''
    assert run_folders(toy, 'train_toy') == before

@pytest.fixture
def committed(monkeypatch):
    "All runs of the repository, and the command in this process."
    monkeypatch.setenv('ENIGMA_RUNS', str(checkout(Path(enigma_lab.__file__).parent)/'runs'))
    return list_runs()

def said(capsys, *words):
    try: code = main(list(words)) or 0
    except SystemExit as end: code = end.code
    return code, *capsys.readouterr()

@pytest.mark.parametrize('width', [20, 40, 80, 132, 400])
def test_a_table_fits(committed, monkeypatch, capsys, width):
    monkeypatch.setenv('COLUMNS', str(width))
    code, out, err = said(capsys, 'runs', '-n', '0')
    assert code == 0 and err == '' and len(out.splitlines()) == len(committed) + 1
    assert max(map(len, out.splitlines())) <= width
    ages = [run.env['started'] for run in sorted(committed, key=lambda run: -run.env['started'])]
    # where there is room nothing is cut
    if width == 400:
        assert '…' not in out
        assert [find_run(line.split()[0]).env['started'] for line in out.splitlines()[1:]] == ages
    # the time in a name is what tells runs apart
    if width >= 80:
        for line, run in zip(out.splitlines()[1:],
                             sorted(committed, key=lambda run: -run.env['started'])):
            assert line[:19].startswith(run.name[:19]) and ' finished ' in line
    code, out, err = said(capsys, 'runs')
    assert len(out.splitlines()) == 21
    assert err == f'{len(committed) - 20} older runs are left out; -n 0 shows all\n'
    wide = ','.join(list(committed[-1].metrics)[:30])
    assert max(map(len, said(capsys, 'runs', committed[-1].path.parent.name, '-n', '0', '--columns',
                             'name,' + wide)[1].splitlines())) <= width

def test_json(committed, capsys):
    code, out, err = said(capsys, 'runs', '--json', '-n', '0')
    told = {run['name']: run for run in map(json.loads, out.splitlines())}
    assert code == 0 and told.keys() == {run.name for run in committed}
    for run in committed:
        assert (told[run.name]['config'], told[run.name]['metrics'],
                told[run.name]['state']) == (run.config, run.metrics, 'finished')
    some = [json.loads(line) for line in said(capsys, 'runs', 'train_enigma', '--json', '-n', '0',
                                              '--columns', 'name,seed')[1].splitlines()]
    assert some == [dict(name=run.name, seed=run.config['seed']) for run in reversed(committed)
                    if run.path.parent.name == 'train_enigma']

def test_one_run(committed, capsys):
    for run in committed[::5]:
        code, out, err = said(capsys, 'runs', run.name)
        assert code == 0 and err == '' and out.splitlines()[0] == run.name and str(run.path) in out
        for part in (run.config, run.metrics, run.env):
            for key, value in part.items():
                assert any(line.split() == f'{key} {value}'.split()
                           for line in out.splitlines()), (run.name, key)
        # some are called as a notebook
        if run.path.parent.name == 'showcase': continue
        # the time alone, where it is one run's
        short = run.path.name[:15]
        same = [other for other in committed if other.path.name.startswith(short)]
        if len(same) == 1: assert said(capsys, 'runs', short)[1].splitlines()[0] == run.name
        elif short not in [r.path.name for r in same]:
            code, out, err = said(capsys, 'runs', short)
            assert code == 2 and 'a name must mean one run' in err and same[0].name in err

def test_unknown_run(committed, capsys):
    code, out, err = said(capsys, 'runs', 'train_enigma/20261121-063830-record-seed9')
    assert code == 2 and out == '' and 'train_enigma/20261121-063830-record-seed0' in err and len(
        err.splitlines()) == 1

def test_nothing_there(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv('ENIGMA_RUNS', str(tmp_path))
    for words in (['runs'], ['runs', 'train_enigma'], ['runs', 'list'], ['runs', '--json']):
        code, out, err = said(capsys, *words)
        assert code == 2 and out == '' and '`enigma-lab train NOTEBOOK` makes one' in err

@pytest.mark.proof('cli', 'lab.settings', seeds=(0,))
def test_a_note_reaches_the_folder(toy):
    notebook = toy/'nbs'/'train_noted.ipynb'
    notebook.write_text((toy/'nbs'/'train_quick.ipynb').read_text().replace(
        "data = 'auto'", "data = 'auto'\\nnote = ''"))
    for words in (['-p', 'note', 'hup'], ['-y', 'note: hup'], ['-p', 'note', 'a/b']):
        before = set(run_folders(toy, 'train_noted'))
        result = piped('papermill', notebook, *words, cwd=toy)
        assert result.returncode == 0, result.stderr
        made, = set(run_folders(toy, 'train_noted')) - before
        assert made.name[15:18] in ('-hu', '-a-') and made.name.rstrip('-2').endswith(
            ('-hup', '-a-b')) and str(made) in nbformat.read(made/notebook.name,
                                                             4).cells[-1].outputs[0].text

def test_no_model(toy):
    result = enigma(toy, 'generate', '-', 'text')
    assert result.returncode == 1 and 'no finished run with a checkpoint' in result.stderr
    assert len(result.stderr.splitlines()) == 1

@pytest.mark.proof('cli', 'lm.generate', seeds=(0,))
def test_generate(toy, monkeypatch):
    from enigma_lab.lab.runs import finish_run, start_run
    from enigma_lab.lm.model import EnigmaConfig, EnigmaForCausalLM
    from enigma_lab.lm.tokenizer import train_char_tokenizer
    monkeypatch.setenv('ENIGMA_RUNS', str(toy/'runs'))
    tokenizer = train_char_tokenizer(['the bombe stopped at noon'])
    run = start_run('train_enigma', dict(dim=16))
    model = EnigmaForCausalLM(EnigmaConfig(vocab_size=len(tokenizer), dim=16, num_layers=1,
                                           num_heads=2, max_len=32))
    for saved in (model, tokenizer): saved.save_pretrained(run.checkpoint)
    finish_run(run, dict(val_nll_nats=5.))
    first, again, other = [enigma(toy, 'generate', which, 'the bombe', '--max_new_tokens', '20',
                                  '--seed', seed)
                           for which, seed in (('-', '1'), (run.name, '1'), (str(run.path), '2'))]
    assert first.returncode == 0 and len(first.stdout) > 1, first.stderr
    assert first.stderr == ''                                                # nothing but the text
    # by -, by name, by folder; a seed decides
    assert first.stdout == again.stdout != other.stdout
    # finished, but without a model
    assert enigma(toy, 'generate', 'train_toy', 'x').returncode == 1
