"What the world brings to pruning: other libraries' files, names, precisions, models with a state."
import copy, json, subprocess, sys

import pytest, torch
from torch import nn

from enigma_lab.maskpro.finetune import finetune
from enigma_lab.maskpro.folders import (
    PruneTask, encoder_task, kind_of_folder, sentence_task, stored_dtype)
from enigma_lab.maskpro.layerwise import SideBySide, layerwise_mask
from enigma_lab.maskpro.masks import apply_masks, find_masks
from enigma_lab.maskpro.prune import (
    PruneConfig, check_out, dense_digest, layer_errors, prune, prune_model, put_masks, unreached)
from enigma_lab.maskpro.sparsegpt import input_columns, input_hessians, sparsegpt

square = lambda model, x: model(x).square().mean()

class Block(nn.Module):
    def __init__(self): super().__init__(); self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
    def forward(self, x): return x + self.out(self.fc(x).relu())

class Two(nn.Module):
    "A model with an unused layer that is called as others are."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = Block(), Block(), nn.Linear(8, 8)
    def forward(self, x): return self.b(self.a(x))

def task_of(model, loss=square, count=12):
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(16, 8, generator=g) for _ in range(count)]
    return PruneTask('own', model, loss, lambda k: batches[k % 6], batches[6:9], batches[9:], 'x')

def silent(*words): pass

def test_an_unused_layer_protects_itself_alone():
    report = prune_model(task_of(Two()), PruneConfig(), silent)
    assert sorted(report['layers']) == ['a.fc', 'a.out', 'b.fc', 'b.out']
    assert report['dense'] == {'fc': 'the loss does not reach it'}

def test_names_to_protect_are_checked():
    masks = put_masks(Two(), PruneConfig(protect=' a.fc , b'))
    assert [layer.name for layer in masks.layers] == ['a.out', 'fc']
    with pytest.raises(ValueError, match="command line --protect. must.*nearest names are.*'a.fc'"):
        put_masks(Two(), PruneConfig(protect='a.fcc'))
    with pytest.raises(ValueError, match="command line --targets. must.*nearest names are.*'a.fc'"):
        put_masks(Two(), PruneConfig(targets='a.fcc'))

class Attends(Two):
    "A model that hides what its weights multiply."
    def __init__(self): super().__init__(); self.a = nn.MultiheadAttention(8, 2, bias=False)
    def forward(self, x): return self.b(self.a(x, x, x)[0])

@pytest.mark.parametrize('option', ['method', 'start'])
@pytest.mark.parametrize('kind', ['wanda', 'sparsegpt', 'layerwise'])
def test_another_method_is_chosen_by_its_option(option, kind):
    settings = dict(method=kind) if option == 'method' else dict(method='simple', start=kind)
    with pytest.raises(ValueError, match=f'choose another score with {option}, .*--{option}, or'):
        prune_model(task_of(Attends()), PruneConfig(**settings), silent)

def test_the_module_of_commands_is_the_command(tmp_path):
    "The oracle is the script that is installed."
    (tmp_path/'model').mkdir()
    torch.save(nn.Linear(8, 8).state_dict(), tmp_path/'model'/'w.pt')
    (tmp_path/'loss.py').write_text("""
import torch
def load(folder): return torch.nn.Sequential(torch.nn.Linear(8, 8))
def loss(model, x): return model(x).square().mean()
def save(model, folder): pass
batches = [torch.randn(16, 8, generator=torch.Generator().manual_seed(k)) for k in range(12)]
""")
    prune = ('maskpro', 'prune', 'model', 'out', '--loss', 'loss.py', '--protect', 'nobody')
    for words, code, said in (((), 0, 'COMMAND'), (('nonsense',), 2, 'nonsense'),
                              (prune, 2, '--protect) must name a layer')):
        ours, theirs = (subprocess.run([*how, *words], capture_output=True, text=True, cwd=tmp_path)
                        for how in ((sys.executable, '-m', 'enigma_lab.cli'), ('enigma-lab',)))
        assert ours.returncode == theirs.returncode == code
        assert (ours.stdout, ours.stderr) == (theirs.stdout, theirs.stderr)
        assert said in ours.stdout + ours.stderr

def test_a_part_that_runs_without_gradients_is_reached():
    class Frozen(Two):
        def forward(self, x):
            with torch.no_grad(): h = self.a(x)
            return self.b(h)
    assert unreached(Frozen(), square, torch.randn(9, 8), PruneConfig()) == ['fc']

def test_an_expert_of_another_batch_is_reached():
    class Experts(Two):
        def forward(self, x): return (self.a if x[0, 0] > 0 else self.b)(x)
    x = torch.randn(9, 8).abs()
    assert unreached(Experts(), square, x, PruneConfig()) == ['b.fc', 'b.out', 'fc']
    assert unreached(Experts(), square, x, PruneConfig(), [-x]) == ['fc']

def test_any_number_of_columns():
    "Groups stay whole, and the lazy updates of blocks change nothing."
    for nm in ('2:3', '3:6', '1:5'): # a group lies across the 128th of 150 columns
        model = nn.Sequential(nn.Linear(150, 150), nn.ReLU(), nn.Linear(150, 150))
        g = torch.Generator().manual_seed(0)
        batches = [torch.randn(64, 150, generator=g) for _ in range(12)]
        task = PruneTask('own', model, square, lambda k: batches[k % 6], batches[6:9],
                         batches[9:], 'x')
        n, m = map(int, nm.split(':'))
        masks = [sparsegpt(apply_masks(copy.deepcopy(model), n, m), square, batches, block=block)[0]
                 for block in (128, 150)]
        assert torch.equal(*masks)
        prune_model(task, PruneConfig(nm=nm), silent)
        assert ((model[0].weight != 0).view(150, -1, m).sum(-1) == n).all()

@pytest.mark.parametrize('mode', ['mean', 'cls', 'max', 'lasttoken'])
def test_pooling_as_sentence_transformers_writes_it(tmp_path, mode):
    "The file is that library's own, and so is the vector."
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel
    from enigma_lab.sgdd.encoder import SemanticEncoder
    SemanticEncoder().tokenizer.save_pretrained(tmp_path/'bert')
    torch.manual_seed(0)
    BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=32)).save_pretrained(tmp_path/'bert')
    theirs = SentenceTransformer(device='cpu', modules=[
        models.Transformer(str(tmp_path/'bert')), models.Pooling(16, mode)])
    theirs.save(str(tmp_path/'st'))
    assert kind_of_folder(tmp_path/'st') == 'sentences'
    texts = [f'{a} shy baker {b}' for a in ('a', 'the old') for b in ('', 'sold a piano in april')]
    task = encoder_task(tmp_path/'st', dict(train=texts, validation=texts, test=texts))
    batch = task.test[0]
    order = theirs.tokenizer.batch_decode(batch.ids, skip_special_tokens=True)
    ours = task.loss.pool(task.model(batch.ids, batch.mask).last_hidden_state, batch.mask)
    assert torch.allclose(ours, theirs.encode(order, convert_to_tensor=True), atol=1e-5)

def test_an_encoder_is_opened_as_its_folder_says(tmp_path):
    "Its length, its case, its place in the folder; what is behind the pooling is refused."
    from transformers import BertConfig, BertModel, T5Config, T5EncoderModel, T5Model
    from enigma_lab.sgdd.encoder import SemanticEncoder
    place, settings = tmp_path/'0_Transformer', tmp_path/'modules.json'
    tokenizer = SemanticEncoder().tokenizer
    tokenizer.save_pretrained(place)
    BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=32, max_position_embeddings=12)).save_pretrained(place)
    (place/'sentence_bert_config.json').write_text('{"max_seq_length": 9, "do_lower_case": true}')
    (tmp_path/'1_Pooling').mkdir()
    (tmp_path/'1_Pooling'/'config.json').write_text('{"pooling_mode_cls_token": true}')
    kinds = [dict(type='models.Transformer', path='0_Transformer'),
             dict(type='models.Pooling', path='1_Pooling')]
    settings.write_text(json.dumps(kinds))
    lines = tmp_path/'lines.txt'
    lines.write_text('\n'.join(f'One long line of MANY words, number {i}, ' + 'and on'*i
                               for i in range(30)))
    task = sentence_task(tmp_path, str(lines))
    assert (task.place, task.loss.pooling) == ('0_Transformer', 'cls')
    assert max(batch.ids.shape[1] for batch in task.test) == 9
    thin = tmp_path.parent/'thin'
    prune(tmp_path, thin, data=str(lines), method='magnitude', say=silent)
    assert (thin/'1_Pooling'/'config.json').is_file()
    kept = BertModel.from_pretrained(thin/'0_Transformer').encoder.layer[0].output.dense.weight
    assert ((kept != 0).view(-1, 4).sum(1) == 2).all()
    settings.write_text(json.dumps([*kinds, dict(type='models.Dense', path='2_Dense')]))
    with pytest.raises(ValueError, match='Dense'): sentence_task(tmp_path, str(lines))
    whole, alone = T5Config(vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1,
                            num_heads=2, decoder_start_token_id=0), tmp_path.parent/'t5'
    T5Model(whole).save_pretrained(alone), tokenizer.save_pretrained(alone)
    with pytest.raises(ValueError, match='stand alone'): sentence_task(alone, str(lines))
    T5EncoderModel.from_pretrained(alone).save_pretrained(alone)
    prune(alone, tmp_path.parent/'thin-t5', data=str(lines), method='sparsegpt', say=silent)

def test_the_precision_of_what_is_loaded(tmp_path):
    from safetensors.torch import save_file
    save = lambda name, **types: save_file(
        {k: torch.zeros(2, dtype=t) for k, t in types.items()}, tmp_path/name)
    save('adapter_model.safetensors', a=torch.float16)
    assert stored_dtype(tmp_path) == torch.float32
    save('diffusion_pytorch_model.fp16.safetensors', a=torch.float16)
    save('diffusion_pytorch_model.safetensors', a=torch.float32)
    assert stored_dtype(tmp_path) == torch.float32
    for name in ('bin', 'mixed', 'half'): (tmp_path/name).mkdir()
    torch.save({'a': torch.zeros(2, dtype=torch.float16)}, tmp_path/'bin'/'pytorch_model.bin')
    assert stored_dtype(tmp_path/'bin') == torch.float16
    save('mixed/model.safetensors', a=torch.bfloat16, b=torch.float32, c=torch.int64)
    save('half/model-00001-of-00002.safetensors', a=torch.bfloat16)
    assert stored_dtype(tmp_path/'mixed') == torch.float32
    assert stored_dtype(tmp_path/'half') == torch.bfloat16

class Keeps(nn.Module):
    "A model that hands a tensor on by way of an attribute."
    def __init__(self): super().__init__(); self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
    def forward(self, x):
        self.skip = x
        return self.b(self.a(x) + self.skip)

class Caches(Keeps):
    "A model that makes a table once."
    def forward(self, x):
        if not hasattr(self, 'table'): self.table = torch.ones(8)
        return self.b(self.a(x)*self.table + x)

def test_a_state_between_batches_is_refused():
    batches = [torch.randn(9, 8) for _ in range(3)]
    masks = apply_masks(Keeps())
    before = masks.values()
    with pytest.raises(ValueError, match="got .'skip of Keeps'"):
        layerwise_mask(masks, square, batches)
    assert torch.equal(masks.values(), before)
    layerwise_mask(masks, square, batches[:1])
    layerwise_mask(apply_masks(Caches()), square, batches)

def test_layerwise_refuses_what_is_no_number():
    batches = [torch.randn(9, 8) for _ in range(3)]
    batches[1][0, 0] = torch.nan
    masks = apply_masks(Two(), targets=['a', 'b'])
    with pytest.raises(ValueError, match="finite numbers, got others in front of 'a.fc'"):
        layerwise_mask(masks, square, batches)

def test_threads_compute_as_the_caller_does():
    masks, seen = apply_masks(Two(), targets=['a', 'b']), {}
    def run(): masks.model(torch.randn(9, 8))
    for kind in (torch.bfloat16, torch.float32):
        with torch.autocast('cpu', torch.bfloat16, enabled=kind == torch.bfloat16):
            keep = lambda layer, x: seen.update({layer.name: x[0]})
            SideBySide(masks.layers, 2, keep).run([run]*2)
        assert seen['a.out'].dtype == kind

def test_what_is_never_called_has_no_error():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    pruned = copy.deepcopy(encoder)
    pruned.self_attn.out_proj.weight.data.zero_()
    names = ['self_attn.out_proj', 'linear1']
    found = layer_errors(encoder.train(), pruned, names, square, [torch.randn(2, 3, 8)])
    assert list(found) == ['linear1']

def test_a_stop_is_looked_at():
    torch.manual_seed(0)
    masks, x = apply_masks(Two(), targets=['a', 'b']), torch.randn(64, 8)
    steps = iter(range(99))
    run = finetune(masks, square, [x], 1000, 1e-2, validation=[x], stop=lambda: next(steps) > 20)
    assert run.best_step == run.steps > 20 and run.best_loss < run.history[0]['val_loss']
    with pytest.raises(ValueError, match='finite loss at the start, got nan'):
        finetune(masks, square, [x], 9, validation=[x*torch.nan])

@pytest.mark.parametrize('padding', [(0, 0), (1, 0), (2, 1)])
def test_padding_as_it_is_now(padding):
    "The mean square of the outputs is that of torch's own convolution."
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 4, 3, padding=1, bias=False), torch.randn(5, 4, 6, 6)
    conv.padding = padding
    assert input_columns(conv, x).shape[2] == conv(x)[0, 0].numel()
    masks = apply_masks(nn.Sequential(conv), protect=())
    masks.set(torch.ones_like(masks.values()), strict=False)
    H = input_hessians(masks, square, [x])['0'][0]
    W = conv.weight.detach().movedim(1, -1).reshape(4, -1).double()
    wanted = conv(x).square().mean((0, 2, 3)).double()
    assert torch.allclose(((W @ H)*W).sum(1), wanted, rtol=1e-4)

def test_an_expert_without_tokens():
    masks = apply_masks(Two(), targets=['a', 'b'])
    sparsegpt(masks, square, [torch.randn(9, 8), torch.zeros(0, 8)])
    assert find_masks(masks.model).values().isfinite().all()

def test_nothing_of_the_user_is_lost(tmp_path):
    "Neither a folder of a name that we might have used, nor the time of a pruning."
    home, mine = tmp_path/'model', tmp_path/'part-of-out'
    home.mkdir(), mine.mkdir()
    (mine/'thesis.txt').write_text('x'), (tmp_path/'file').write_text('x')
    torch.save(nn.Linear(8, 8).state_dict(), home/'w.pt')
    file = tmp_path/'loss.py'
    file.write_text("""
import torch
from torch import nn
def load(folder):
    model = nn.Linear(8, 8)
    model.load_state_dict(torch.load(folder + '/w.pt'))
    return model
def loss(model, x): return model(x).square().mean()
batches = [torch.randn(16, 8, generator=torch.Generator().manual_seed(k)) for k in range(12)]
""")
    with pytest.raises(ValueError, match='outside of the dense'): check_out(home/'a'/'b', home)
    with pytest.raises(OSError, match='a file'): check_out(tmp_path/'file'/'out', home)
    with pytest.raises(ValueError, match='needs save'):
        prune(home, tmp_path/'out', file=str(file), say=silent)
    file.write_text(file.read_text() + """
def save(model, folder): torch.save(model.state_dict(), folder + '/w.pt')
""")
    prune(home, tmp_path/'out', file=str(file), say=silent)
    assert (mine/'thesis.txt').read_text() == 'x'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'loss.py', 'model', 'out',
                                                          'part-of-out']
    kept = (torch.load(tmp_path/'out'/'w.pt')['weight'] != 0).view(-1, 4).sum(1)
    assert (kept == 2).all()
    report = json.loads((tmp_path/'out'/'sparsity.json').read_text())
    assert report['dense_digest'] == dense_digest(home)
    torch.save(nn.Linear(8, 8).state_dict(), home/'w.pt')
    assert report['dense_digest'] != dense_digest(home)
