"Texts beside stored vectors: a decoder is trained, judged and used without any encoder."
import json, re

import numpy as np, pytest, torch, yaml

from enigma_lab.cli import main
from enigma_lab.data.sentences import draw_sentences, small
from enigma_lab.lab.runs import list_runs, read_json
from enigma_lab.lab.task import main as train_by_words, warning_lines
from enigma_lab.sgdd.model import SGDDModel
from enigma_lab.sgdd.read import save_vectors
from enigma_lab.sgdd.train import (
    evaluate_run, find_base, make_sgdd_config, prepare_sgdd, task, train_sgdd)

TEXTS = draw_sentences(small, 'train', 150)
WORDS = sorted({word for text in TEXTS for word in text.split()})

def made_elsewhere(texts):
    "Vectors that no encoder of ours makes: a direction for each word in its place."
    rng = np.random.default_rng(0)
    table = {word: rng.normal(size=(9, 48)) for word in WORDS}
    return np.array([sum(table[w][i] for i, w in enumerate(text.split())) for text in texts])

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Runs of their own, the files in three forms, and a trained decoder."
    home = tmp_path_factory.mktemp('given')
    rows = [dict(text=t, vector=v) for t, v in zip(TEXTS, made_elsewhere(TEXTS).tolist())]
    (home/'mine.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    save_vectors(home/'mine.npz', made_elsewhere(TEXTS), texts=TEXTS)
    (home/'mine.yaml').write_text(yaml.safe_dump(dict(
        preset='smoke', encoder='none', data=str(home/'mine.jsonl'), max_steps=200,
        learning_rate=.01, eval_steps=50, save_steps=50, max_words=9, dim=64)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('ENIGMA_RUNS', str(home/'runs'))
        patch.setenv('ENIGMA_CACHE', str(home/'cache'))
        yield home

@pytest.fixture(scope='module')
def run(home):
    "Trained by the command's words, from YAML."
    train_by_words(task, [f'config={home/"mine.yaml"}'])
    return list_runs('train_sgdd')[-1]

def test_it_learns_and_says_that_nobody_judged(run):
    assert run.metrics['test_exact_match'] > .2 > 20*run.metrics['test_nearest_exact_match']
    told, = warning_lines(run.metrics)
    assert 'texts are read without loop and verdict' in told
    assert 'test_cosine' not in run.metrics and 'test_loop_exact_match' not in run.metrics
    model = SGDDModel.from_pretrained(run.checkpoint)
    assert (model.encoder, model.origin, model.config.encoder_dim) == (None, None, 48)

def test_vectors_are_read_by_the_command(run, home, capsys):
    np.save(home/'v.npy', made_elsewhere(TEXTS[:20]).astype('float16'))
    main(['sgdd', 'read', run.name, str(home/'v.npy')])
    found = capsys.readouterr()
    lines = [json.loads(line) for line in found.out.splitlines()]
    assert {line['verdict'] for line in lines} == {'unchecked'} and len(lines) == 20
    assert sum(line['text'] == text for line, text in zip(lines, TEXTS)) > 4
    assert 'no loop, no verdict' in found.err
    for words, rule in {(str(home/'v.npy'), '--loop'): 'the loop compares',
                        ('a text',): 'texts need the encoder'}.items():
        with pytest.raises(SystemExit): main(['sgdd', 'read', run.name, *words])
        assert rule in capsys.readouterr().err

def test_it_is_judged_by_the_command(run, home, capsys):
    "On its own validation, and on a file of which it has learned a part."
    others = draw_sentences(small, 'validation', 30)
    some = [text for text in others if {*text.split()} <= {*WORDS}]
    save_vectors(home/'others.npz', made_elsewhere(some + TEXTS), texts=some + TEXTS)
    main(['sgdd', 'evaluate', run.name])
    main(['sgdd', 'evaluate', run.name, '--dataset', str(home/'others.npz')])
    own, foreign = [line for line in capsys.readouterr().out.splitlines() if 'judged' in line]
    learned = run.metrics['train_documents']
    assert f"judged {run.metrics['validation_documents']} rows of the validation part" in own
    assert f'judged {len(some) + len(TEXTS) - learned} rows of all parts' in foreign
    assert f'in the training data {learned}' in foreign
    with pytest.raises(ValueError, match='the loop needs the encoder'): evaluate_run(run, loop=True)

def test_it_is_published_and_no_base(run, home, capsys):
    "The card says that it only reads, and its code runs; phase 2 passes it by."
    main(['publish', run.name, str(home/'published')])
    card = (home/'published'/'README.md').read_text()
    assert 'without their encoder: it reads, and judges nothing' in card
    code = re.search(r'```python\n(.*?)```', card, re.S)[1]
    exec(code.replace("folder = '.'", f"folder = {str(home/'published')!r}"), {})
    assert capsys.readouterr().out.splitlines()[-1].split()
    with pytest.raises(FileNotFoundError, match='phase 2 begins from'): find_base('train_sgdd')

def test_the_form_of_the_file_does_not_matter(home):
    lines, arrays = (prepare_sgdd(make_sgdd_config(
        'smoke', encoder='none', data=str(home/f'mine.{form}'))) for form in ('jsonl', 'npz'))
    assert torch.equal(lines.train.labels, arrays.train.labels)
    assert torch.allclose(lines.train.z, arrays.train.z, rtol=2e-3, atol=2e-3)

def test_a_decoder_with_its_encoder_can_be_read_without(home, capsys):
    "The command's option, where the encoder that trained it is not at hand."
    run = train_sgdd(make_sgdd_config('smoke', max_steps=2), loop=False, test=False)
    texts = draw_sentences(small, 'validation', 8) + draw_sentences(small, 'train', 1)
    z = SGDDModel.from_pretrained(run.checkpoint).encoder.encode(texts)
    save_vectors(home/'mini.npz', z, texts=texts)
    main(['sgdd', 'read', run.name, str(home/'mini.npz'), '--encoder', 'none'])
    found = capsys.readouterr()
    assert found.out.count('unchecked') == 9 and 'no loop, no verdict' in found.err
    found = read_json(evaluate_run(run, str(home/'mini.npz'), encoder='none'))
    counts = found['counts']
    assert (found['verdicts'], counts['judged'], counts['in_training']) == (False, 8, 1)

WRONG = { # settings: what the error says
    'no vectors': (dict(data='hard'), 'vectors are read from a file, and hard is none'),
    'pairs': (dict(pairs=True), 'phase 2 and pairs need an encoder'),
    'phase 2': (dict(phase=2, base='x'), 'phase 2 and pairs need an encoder'),
    'coefficients': (dict(num_vectors=4), 'num_vectors must be 1'),
    'no texts': (dict(data='v.npy'), 'in a column called text')}

@pytest.mark.parametrize('what', WRONG)
def test_refused(home, what):
    changes, rule = WRONG[what]
    np.save(home/'v.npy', np.ones((3, 4)))
    changes = {k: str(home/v) if v == 'v.npy' else v for k, v in changes.items()}
    with pytest.raises(ValueError if what != 'no vectors' else FileNotFoundError, match=rule):
        prepare_sgdd(make_sgdd_config('smoke', **{'encoder': 'none',
                                                  'data': str(home/'mine.npz'), **changes}))
