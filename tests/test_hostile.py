"Give a sentence decoder what nobody should: each call gives a result, or a reason in one line."
import json, math

import numpy as np
import pytest
import torch

from enigma_lab.cli import main
from enigma_lab.lab.runs import checkout, find_run
from enigma_lab.sgdd.metrics import evaluate_generation
from enigma_lab.sgdd.model import SGDDConfig, SGDDModel
from enigma_lab.sgdd.read import load_vectors, read_file, read_vectors, save_vectors
from enigma_lab.sgdd.reconstruct import reconstruct
from enigma_lab.sgdd.sampling import maskgit_sample, unmask
from enigma_lab.sgdd.train import evaluate_run, make_sgdd_config

ROOT = checkout(__file__)
SENTENCE = 'the shy baker sold the rusty anchor near the red market yesterday'

class Given:
    "Hold a trained decoder, a vector, and a folder for files."
    def __init__(self, model, folder):
        self.model, self.folder = model, folder
        self.z = model.encoder.encode([SENTENCE])

    def file(self, name, content):
        path = self.folder/name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def saved(self, name, array):
        np.save(self.folder/name, array)
        return self.folder/name

    def spoilt(self, value):
        z = self.z.repeat(3, 1)
        z[1, 4] = value
        return z

    def canvas(self, T=5):
        return torch.full((1, T), self.model.config.mask_id), torch.ones(1, T, dtype=torch.bool)

@pytest.fixture(scope='module')
def given(tmp_path_factory):
    model = SGDDModel.from_pretrained(find_run(str(ROOT/'runs'/'showcase'/'sgdd')).checkpoint)
    return Given(model, tmp_path_factory.mktemp('hostile'))

# what: (call, what the reason must say)
REFUSED = {
    'NaN in a vector': (lambda g: read_vectors(g.model, g.spoilt(math.nan)),
                        'a vector must be finite, and 1 of these 3 are not, the first is number 1'),
    'NaN, by generate': (lambda g: g.model.generate(g.spoilt(math.nan)), 'must be finite'),
    'NaN, by the loop': (lambda g: reconstruct(g.model, g.spoilt(math.nan)), 'must be finite'),
    'infinity': (lambda g: read_vectors(g.model, g.spoilt(math.inf)), 'must be finite'),
    'too large for single precision': (
        lambda g: read_vectors(g.model, g.z.double().numpy()*1e300), 'must be finite'),
    'zeros': (lambda g: read_vectors(g.model, 0*g.z), 'must be other than zero'),
    'a vector too short': (lambda g: read_vectors(g.model, g.z[:, :384]),
                           'a vector must have 1536 numbers, as the encoder\'s, got 384'),
    'three axes': (lambda g: read_vectors(g.model, g.z[None]), 'must have 1536 numbers'),
    'one number': (lambda g: read_vectors(g.model, 3.), 'there must be one vector at least'),
    'nothing': (lambda g: read_vectors(g.model, []), 'there must be one vector at least'),
    'None': (lambda g: read_vectors(g.model, None), 'there must be one vector at least'),
    'no rows': (lambda g: read_vectors(g.model, np.zeros((0, 1536))), 'one vector at least'),
    'rows of two lengths': (lambda g: read_vectors(g.model, [[1., 2.], [3.]]),
                            'numbers in rows of equal length'),
    'a dictionary': (lambda g: read_vectors(g.model, dict(z=1)), 'vectors must be real numbers'),
    'complex numbers': (lambda g: read_vectors(g.model, g.z.to(torch.complex64)),
                        'vectors must be real numbers'),
    'texts and numbers': (lambda g: read_vectors(g.model, ['a text', 3]), 'must be real numbers'),
    'a vector of nobody, of norm 1': (lambda g: read_vectors(g.model, torch.ones(20, 1536)/39),
                          'made by another encoder?'),
    'vectors of nobody': (lambda g: read_vectors(
        g.model, torch.randn(20, 1536, generator=torch.Generator().manual_seed(0))),
                          'made by another encoder?'),
    'a file of another encoder': (
        lambda g: read_vectors(g.model, load_vectors(save_vectors(
            g.folder/'other.npz', g.z[:, :384], ConstantEncoder()))),
        "made by 'ConstantEncoder' with 1 × 384"),
    'an empty text': (lambda g: g.model.generate(['']), 'a text must hold a word at least'),
    'spaces': (lambda g: reconstruct(g.model, ['   \n']), 'a text must hold a word at least'),
    '500 words': (lambda g: g.model.generate(['word '*500]),
                  'at most max_tokens=128 tokens, got 502'),
    'no text': (lambda g: g.model.generate([]), 'there must be one vector at least'),
    'texts without an encoder': (
        lambda g: SGDDModel(SGDDConfig(9, 8, 0)).generate(['a text']), 'texts need the encoder'),
    'the loop without an encoder': (
        lambda g: reconstruct(SGDDModel(SGDDConfig(9, 8, 0)), torch.ones(1, 384)),
        'the encoder is the judge'),
    'no mask to fill': (lambda g: g.model.infill('the shy baker', g.z[0]), 'must hold [MASK]'),
    'nothing to fill': (lambda g: g.model.infill('', g.z[0]), 'must hold [MASK]'),
    'a canvas too long': (lambda g: g.model.infill('[MASK] '*500, g.z[0]), 'at most max_len=64'),
    'two vectors for one text': (lambda g: g.model.infill('[MASK]', g.z.repeat(2, 1)),
                                 'filled in by one vector, got 2'),
    'an unknown formula': (lambda g: unmask(g.model, g.z, *g.canvas(), guidance=1., formula='x'),
                           "formula must be one of ('log', 'prob'), got 'x'"),
    'an unknown formula, unused': (lambda g: unmask(g.model, g.z, *g.canvas(), formula='x'),
                                   "formula must be one of ('log', 'prob'), got 'x'"),
    'an unknown order': (lambda g: g.model.generate(g.z, order='left'), 'order must be one of'),
    'no steps': (lambda g: g.model.generate(g.z, steps=0), 'steps must be at least 1, got 0'),
    'half a step': (lambda g: g.model.generate(g.z, steps=2.5), 'steps must be a whole number'),
    'a negative temperature': (lambda g: g.model.generate(g.z, temperature=-1.), 'at least 0'),
    'a temperature of NaN': (lambda g: g.model.generate(g.z, temperature=math.nan), 'at least 0'),
    'a negative guidance': (lambda g: g.model.generate(g.z, guidance=-2.), 'at least 0'),
    'a negative spread': (lambda g: g.model.generate(g.z, spread=-1.), 'spread must be at least 0'),
    'a threshold of 2': (lambda g: g.model.generate(g.z, threshold=2.), 'must lie in (0, 1]'),
    'a length of 0': (lambda g: maskgit_sample(g.model, g.z, torch.tensor([0])),
                      'a length must lie in 1 … max_len=64, got 0'),
    'a length beyond the canvas': (lambda g: maskgit_sample(g.model, g.z, torch.tensor([65])),
                                   'a length must lie in 1 … max_len=64'),
    'two lengths for one vector': (lambda g: maskgit_sample(g.model, g.z, torch.tensor([5, 5])),
                                   'every vector needs a length'),
    'no drafts': (lambda g: reconstruct(g.model, g.z, drafts=0), 'drafts and redrafts'),
    'negative rounds': (lambda g: reconstruct(g.model, g.z, rounds=-1), 'rounds at least 0'),
    'a batch of none': (lambda g: read_vectors(g.model, g.z, batch_size=0), 'at least 1, got 0'),
    'targets without sources': (lambda g: evaluate_generation(g.model, [SENTENCE]*2, [SENTENCE]),
                                'got 1 and 2'),
    'nothing to judge': (lambda g: evaluate_generation(g.model, []), 'got 0 and 0'),
    'no file': (lambda g: load_vectors(g.folder/'none.npy'), 'vectors are read from a file'),
    'an empty file': (lambda g: load_vectors(g.file('empty.npy', '')), 'as numpy.save'),
    'an empty list of lines': (lambda g: load_vectors(g.file('empty.jsonl', '\n\n')),
                               'one vector of numbers at least'),
    'a text for an array': (lambda g: load_vectors(g.file('text.npy', SENTENCE)), 'as numpy.save'),
    'an array of objects': (lambda g: load_vectors(g.saved('objects.npy', np.array([{}]))),
                            'as numpy.save'),
    'an array of words': (lambda g: load_vectors(g.saved('words.npy', np.array([['a', 'b']]))),
                          'one vector of numbers at least'),
    'half a line of JSON': (lambda g: load_vectors(g.file('half.jsonl', '[1, 2]\n[1, ')),
                            'a line must be JSON, got \'[1, \' in line 2'),
    'a null among the numbers': (lambda g: read_vectors(g.model, load_vectors(
        g.file('null.jsonl', json.dumps([1.]*1535 + [None])))), 'must be finite'),
    'a text for a table': (lambda g: load_vectors(g.file('text.parquet', SENTENCE)), 'of parquet'),
    'an unknown kind of file': (lambda g: load_vectors(g.file('v.csv', '1,2')), 'ends in .npy'),
    'a file that exists': (lambda g: read_file(
        g.model, load_vectors(g.saved('one.npy', g.z.numpy())), g.file('there.jsonl', 'mine\n')),
        'a file is written once'),
    'an unknown shape': (lambda g: make_sgdd_config('smoke', dim=-8), 'dim must be'),
    'a negative size': (lambda g: SGDDConfig(9, 8, 0, dim=-8), 'dim must be at least 1, got -8'),
    'an unknown setting': (lambda g: make_sgdd_config('smoke', guidence=2.), 'guidance'),
    'a negative setting': (lambda g: make_sgdd_config('smoke', guidance=-1.), 'at least 0'),
    'settings of no sampler': (lambda g: evaluate_run(find_run(str(ROOT/'runs/showcase/sgdd')),
                                                      num_samples=2, w=2.), 'no parameter'),
}

class ConstantEncoder(torch.nn.Module):
    "Look like an encoder to `fingerprint`."
    source, num_vectors, pooling, normalise = 'ConstantEncoder', 1, 'mean', False
    def encode(self, texts): return torch.ones(len(texts), 384)

@pytest.mark.parametrize('what', REFUSED)
def test_a_reason(what, given):
    call, reason = REFUSED[what]
    with pytest.raises((ValueError, FileNotFoundError, FileExistsError)) as error: call(given)
    said = str(error.value)
    assert reason in said and '\n' not in said and len(said) < 1200, said

ANSWERED = { # a call that gives texts, and how many
    'one vector with one axis': (lambda g: read_vectors(g.model, g.z[0]), 1),
    'a list of one': (lambda g: read_vectors(g.model, [g.z[0]]), 1),
    'a list of numbers': (lambda g: read_vectors(g.model, g.z[0].tolist()), 1),
    'half precision': (lambda g: read_vectors(g.model, g.z.half()), 1),
    'bfloat16': (lambda g: read_vectors(g.model, g.z.bfloat16()), 1),
    'numpy, the other byte order': (lambda g: read_vectors(g.model, g.z.numpy().astype('>f4')), 1),
    'a view with gaps': (lambda g: read_vectors(g.model, g.z.repeat(4, 1).numpy()[::-2]), 2),
    'a tensor that needs gradients': (
        lambda g: read_vectors(g.model, g.z.clone().requires_grad_()), 1),
    'one text': (lambda g: g.model.generate(SENTENCE), 1),
    'emoji': (lambda g: g.model.generate(['🦊 jumps over 🐶 🎉']), 1),
    'right to left': (lambda g: g.model.generate(['שלום עולם', 'مرحبا بالعالم']), 2),
    'Chinese': (lambda g: g.model.generate(['狐狸跳过懒狗']), 1),
    'special tokens': (lambda g: g.model.generate(['[MASK] [PAD] [CLS] [SEP] [UNK]']), 1),
    'marks without letters': (lambda g: g.model.generate(['?!… — «»']), 1),
    'control characters': (lambda g: g.model.generate(['a\x00b\x07c\u200bd']), 1),
    'a surrogate pair apart': (lambda g: g.model.generate(['a \u0301\u0301\u0301 b']), 1),
    'the same text 40 times': (lambda g: read_vectors(g.model, g.z.repeat(40, 1)), 40),
    'vectors of nobody, unchecked': (
        lambda g: read_vectors(g.model, torch.randn(2, 1536), check=False), 2),
    'more steps than places': (lambda g: g.model.generate(g.z, steps=500), 1),
    'a huge guidance': (lambda g: g.model.generate(g.z, guidance=1e4), 1),
    'a huge temperature': (lambda g: g.model.generate(g.z, temperature=1e6), 1),
    'one place': (lambda g: g.model.generate(g.z, length=torch.tensor([1])), 1),
    'the whole canvas': (lambda g: g.model.generate(g.z, length=torch.tensor([64])), 1),
    'nothing but masks': (lambda g: [g.model.infill('[MASK]', g.z[0])], 1),
    'a canvas that is full': (
        lambda g: g.model.read(unmask(g.model, g.z, torch.tensor([[5, 6]]),
                                      torch.ones(1, 2, dtype=torch.bool)).tokens), 1),
}

@pytest.mark.parametrize('what', ANSWERED)
def test_an_answer(what, given):
    call, n = ANSWERED[what]
    found = call(given)
    assert len(found) == n
    for v in found:
        assert isinstance(getattr(v, 'text', v), str)
        if hasattr(v, 'verdict'): assert v.verdict in ('proved', 'probable', 'failed')

LINES = { # words of `enigma-lab sgdd` -> what the line on stderr must say
    'a file that is not there': (['read', 'none.npy'], 'vectors are read from a file'),
    'two files': (['read', 'showcase/sgdd', 'a.npy', 'b.npy'], 'one file of vectors'),
    'nothing to read': (['read', 'showcase/sgdd'], 'a file of vectors, got none'),
    'another kind of file': (['read', 'showcase/sgdd', __file__], 'a file of vectors ends in'),
    'a folder': (['read', 'showcase/sgdd', str(ROOT/'nbs')], 'vectors are read from a file'),
    'a file for a sentence': (['read', 'showcase/sgdd', SENTENCE, '--out', 'x.jsonl'],
                              'out must stand beside a file of vectors'),
    'an unknown sampler': (['read', 'showcase/sgdd', SENTENCE, '--order', 'x'], 'order must be'),
    'a negative guidance': (['read', 'showcase/sgdd', SENTENCE, '--guidance', '-3'], 'at least 0'),
    'a word for a number': (['read', 'showcase/sgdd', SENTENCE, '--steps', 'few'], 'invalid int'),
}

@pytest.mark.parametrize('what', LINES)
def test_a_line_of_the_shell(what, capsys):
    words, reason = LINES[what]
    with pytest.raises(SystemExit) as end: main(['sgdd', *words])
    out, err = capsys.readouterr()
    assert end.value.code in (1, 2) and reason in err and 'Traceback' not in err and not out

def test_from_file_to_file(given, capsys):
    "Read a thousand vectors in half precision by one command; a second one does not overwrite."
    z = given.z.repeat(1000, 1).half().numpy()
    path, out = given.saved('many.npy', z), given.folder/'texts.jsonl'
    main(['sgdd', 'read', str(path), '--out', str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row['row'] for row in rows] == [*range(1000)]
    assert {row['text'] for row in rows} == {given.model.generate(given.z, steps=1)[0]}
    assert all(row.keys() == {'row', 'text', 'verdict', 'distance', 'tries'} for row in rows)
    assert '1,000 of 1,000 vectors' in capsys.readouterr().err
    before = out.read_bytes()
    with pytest.raises(SystemExit): main(['sgdd', 'read', str(path), '--out', str(out)])
    assert 'written once' in capsys.readouterr().err and out.read_bytes() == before
    out.write_bytes(before[:len(before)//2]) # killed
    main(['sgdd', 'read', str(path), '--out', str(out), '--resume'])
    assert out.read_bytes() == before
