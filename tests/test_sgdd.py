"Read sentences from vectors: the notebook, two processes, a file's config, the commands."
import json, subprocess

import nbformat, pytest, torch

from enigma_lab.lab.runs import checkout
from enigma_lab.sgdd.model import SGDDModel
from enigma_lab.sgdd.train import make_sgdd_config, prepare_sgdd, train_sgdd

ROOT = checkout(__file__)

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Runs and a cache of their own."
    home = tmp_path_factory.mktemp('sgdd')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('ENIGMA_RUNS', str(home / 'runs'))
        patch.setenv('ENIGMA_CACHE', str(home / 'cache'))
        yield home

def command(*words): return subprocess.run(words, capture_output=True, text=True)

def newest(home):
    return max((home / 'runs' / 'train_sgdd').iterdir(), key=lambda path: path.stat().st_mtime)

def losses(path):
    return [
        row['loss']
        for row in map(json.loads, (path / 'history.jsonl').read_text().splitlines())
        if 'loss' in row
    ]

@pytest.mark.proof(
    'sgdd.train', 'sgdd.model', 'sgdd.decoder', 'sgdd.diffusion', 'sgdd.sampling', 'sgdd.metrics',
    'sgdd.reconstruct', seeds=(0,))
def test_the_notebook_with_two_processes(home):
    "By DDP: the losses of one process with the same global batch, and every cell executed."
    result = command(
        'papermill',
        str(ROOT / 'nbs' / 'train_sgdd.ipynb'),
        '-p',
        'preset',
        'smoke',
        '-p',
        'processes',
        '2',
        '-p',
        'batch_size',
        '8',
        '-p',
        'max_sentences',
        '240',
    )
    assert result.returncode == 0, result.stderr
    two = newest(home)
    assert all(
        cell.get('execution_count')
        for cell in nbformat.read(two / 'train_sgdd.ipynb', 4).cells
        if cell.cell_type == 'code'
    )
    one = train_sgdd(
        make_sgdd_config('smoke', batch_size=8, max_sentences=240, gradient_accumulation_steps=2),
        note='one',
        loop=False,
    )
    assert len(losses(two)) == 2 and losses(two) == pytest.approx(losses(one.path), abs=1e-4)
    metrics = json.loads((two/'metrics.json').read_text())
    assert {
        'test_exact_match',
        'test_loop_exact_match',
        'test_nearest_exact_match',
        'val_place_difference',
    } <= metrics.keys()
    assert not any(
        'encoder' in name for name in SGDDModel.from_pretrained(two / 'checkpoint').state_dict()
    )

@pytest.mark.proof('sgdd.train', 'lab.settings', seeds=(0,))
def test_a_config_from_a_file(home):
    result = command(
        'papermill',
        str(ROOT / 'nbs' / 'train_sgdd.ipynb'),
        '-p',
        'config',
        str(ROOT / 'configs' / 'phase1_wiki_test.yaml'),
        '-p',
        'test_sentences',
        '20',
        '-p',
        'loop',
        'False',
    )
    assert result.returncode == 0, result.stderr
    config = json.loads((newest(home)/'config.json').read_text())
    assert (config['preset'], config['epochs'], config['batch_size'], config['test_sentences']) == (
        'brief-test',
        1,
        32,
        20,
    )
    # every sentence once, the last batch smaller
    assert (
        json.loads((newest(home) / 'metrics.json').read_text())['train_steps'] == 32
    )

@pytest.mark.proof(
    'sgdd.train', 'sgdd.model', 'sgdd.decoder', 'sgdd.diffusion', 'sgdd.sampling', 'sgdd.metrics',
    'sgdd.reconstruct', seeds=(0,))
def test_commands(home):
    run = str(newest(home))
    judged = command(
        'enigma-lab', 'sgdd', 'evaluate', run, '--dataset', 'small', '--num_samples', '12'
    )
    assert judged.returncode == 0, judged.stderr
    found, = newest(home).glob('evaluation-small-*.json')
    found = json.loads(found.read_text())
    assert (
        {'exact_match', 'perplexity', 'bleu'} <= found['metrics'].keys()
        and found['metrics']['sentences'] == 12
        and found['examples']
        and 'failures' in found
    )
    read = command(
        'enigma-lab', 'sgdd', 'read', run, 'the shy baker sold the rusty anchor', '--loop'
    )
    assert read.returncode == 0 and read.stdout.count('(distance') == 1, read.stderr
    for words, rule in (
        (('evaluate', run, '--num_samples', '1'), 'num_samples must be at least 2'),
        (('write', run), "action must be 'evaluate' or 'read'"),
        (('read', run), 'got none'),
        (('evaluate', 'no/run'), 'no finished run'),
    ):
        wrong = command('enigma-lab', 'sgdd', *words)
        assert (
            wrong.returncode == (1 if 'finished' in rule else 2)
            and rule in wrong.stderr
            and 'Traceback' not in wrong.stderr
        )

def test_the_brief_recipes_fit_their_model():
    "Whatever a document calls for can be configured, to the parameter."
    for name, epochs in (('brief-phase1', 10), ('brief-phase2', 5)):
        config = make_sgdd_config(name)
        assert (config.epochs, config.batch_size, config.max_sentences, config.size) == (
            epochs,
            32,
            100_000,
            'brief',
        )

def test_a_collapse_is_seen(home):
    "Train the original's choices: an empty canvas says the same everywhere; ours does not."
    difference = {}
    for name, shape in dict(
        brief=dict(positions='rope', conditioning='cross', proj_dim=32, norm='post', time=True),
        default={},
    ).items():
        parts = prepare_sgdd(make_sgdd_config('smoke', shape=shape))
        optimizer = torch.optim.AdamW(parts.model.parameters(), lr=3e-3)
        for step in range(60):
            rows = torch.randint(
                len(parts.train), (32,), generator=torch.Generator().manual_seed(step)
            )
            optimizer.zero_grad()
            parts.model.train()(
                parts.train.tokens[rows], parts.train.labels[rows], parts.train.z[rows]
            ).loss.backward()
            optimizer.step()
        model = parts.model.eval()
        logits = model.decoder(
            torch.full((4, 7), model.config.mask_id), model.vector(parts.z[:4]), torch.ones(4)
        )
        difference[name] = (logits - logits[:, :1]).abs().max().item()
    assert difference['brief'] < 1e-4 and difference['default'] > .1, difference
