"The command line, as a shell sees it."
import json, sys

import pytest

from test_door import in_terminal, piped, run_folders, screen, write_checkout

@pytest.fixture(scope='module')
def toy(tmp_path_factory): return write_checkout(tmp_path_factory.mktemp('commands')/'enigma').resolve()

def enigma(toy, *words): return piped('enigma-lab', *words, cwd=toy)

def test_help(toy):
    overview = enigma(toy, '--help')
    assert overview.returncode == 0
    for name in 'train generate runs docs bench'.split():
        assert f'    {name}' in overview.stdout
        help = enigma(toy, name, '--help')
        assert help.returncode == 0 and help.stdout.startswith(f'usage: enigma-lab {name} ') and help.stderr == ''
    assert '--max_new_tokens' in enigma(toy, 'generate', '--help').stdout

def test_help_is_quick(toy):
    code = "import sys\nfrom enigma_lab.cli import main\nmain([])\nassert not {'torch', 'papermill', 'pandas', 'transformers'} & set(sys.modules)"
    assert piped(sys.executable, '-c', code, cwd=toy).returncode == 0

def test_train_and_runs(toy):
    code, text = in_terminal('enigma-lab', 'train', 'train_toy', 'steps=6', cwd=toy)
    assert code == 0, text
    first, = run_folders(toy, 'train_toy')
    assert json.loads((first/'metrics.json').read_text()) == {'val_nll_nats': .5} and (first/'train_toy.ipynb').exists()
    assert 'step 5 · val 2.011 bits/char' in screen(text)                    # the same progress as papermill's door
    alone = enigma(toy, 'runs', 'compare', 'train_toy')
    assert alone.returncode == 2 and 'takes two runs' in alone.stderr
    result = enigma(toy, 'train', 'nbs/train_toy.ipynb', 'steps=1')          # by its path, without a terminal
    assert result.returncode == 0, result.stderr
    listed = enigma(toy, 'runs').stdout.splitlines()
    assert [line.split()[1:] for line in listed] == [['finished', 'val_nll_nats', '0.5']]*2
    assert listed[0].startswith(f'train_toy/{first.name} ')
    compared = enigma(toy, 'runs', 'compare', 'train_toy').stdout.splitlines()
    assert [line.split() for line in compared if line.startswith('steps')] == [['steps', '6', '1']]

@pytest.mark.parametrize('words, message', [
    (['trian'], "invalid choice: 'trian'"),
    (['train'], 'arguments are required: NOTEBOOK'),
    (['train', 'train_nothing'], 'there are [train_bad, train_quick, train_toy]'),
    (['train', 'foreign.ipynb'], 'got foreign.ipynb; there are [train_bad'),
    (['train', 'train_toy', 'step=5'], "train_toy.ipynb has no parameter 'step'; it has [steps, data]"),
    (['train', 'train_toy', 'steps'], 'a setting is written name=value, got steps'),
    (['runs', 'list', 'train_other'], 'no runs of train_other'),
    (['bench', 'nothing'], 'no benchmark called nothing; there are ['),
    (['generate', '-', 'text', '--seed', 'x'], "invalid int value: 'x'")])
def test_wrong_question(toy, words, message):
    before = run_folders(toy, 'train_toy')
    result = enigma(toy, *words)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.stdout == ''
    assert run_folders(toy, 'train_toy') == before

def test_no_model(toy):
    result = enigma(toy, 'generate', '-', 'text')
    assert result.returncode == 1 and 'no finished run with a checkpoint' in result.stderr
    assert len(result.stderr.splitlines()) == 1

def test_generate(toy, monkeypatch):
    from enigma_lab.lab.runs import finish_run, start_run
    from enigma_lab.lm.model import EnigmaConfig, EnigmaForCausalLM
    from enigma_lab.lm.tokenizer import train_char_tokenizer
    monkeypatch.setenv('ENIGMA_RUNS', str(toy/'runs'))
    tokenizer = train_char_tokenizer(['the bombe stopped at noon'])
    run = start_run('train_enigma', dict(dim=16))
    model = EnigmaForCausalLM(EnigmaConfig(vocab_size=len(tokenizer), dim=16, num_layers=1, num_heads=2, max_len=32))
    for saved in (model, tokenizer): saved.save_pretrained(run.checkpoint)
    finish_run(run, dict(val_nll_nats=5.))
    first, again, other = [enigma(toy, 'generate', which, 'the bombe', '--max_new_tokens', '20', '--seed', seed)
                           for which, seed in (('-', '1'), (run.name, '1'), (str(run.path), '2'))]
    assert first.returncode == 0 and len(first.stdout) > 1, first.stderr
    assert first.stderr == ''                                                # nothing but the text
    assert first.stdout == again.stdout != other.stdout                      # by -, by name, by folder; a seed decides
    assert enigma(toy, 'generate', 'train_toy', 'x').returncode == 1         # finished, but without a model
