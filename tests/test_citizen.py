"Other libraries reach into a model: they move, divide, quantise and prune it; the logits stay."
import copy, os, subprocess, sys, warnings
from pathlib import Path

import accelerate, foreign, pytest, torch
import torch.nn.utils.prune as pruning
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import DynamicCache, StaticCache

from enigma_lab.bench.reversible_checks import group_of_one
from enigma_lab.lm.attention import alibi_weights
from enigma_lab.lm.model import EnigmaConfig, EnigmaForCausalLM, Linear
from enigma_lab.machine.exact import FixedLinear

KINDS = dict(
    none=dict(machine='none'), both=dict(machine='both'),
    scaled=dict(machine='both', rev_scale=True, parametrization='plu', rotor='roll'),
    between=dict(machine='between', reversible=True),
    reversible=dict(machine='none', reversible=True),
    exact=dict(machine='both', reversible=True, exact=True),
    permutation=dict(machine='both', rotor='permutation', reciprocal=True),
    sinkhorn=dict(machine='both', rotor='sinkhorn'),
    quick=dict(machine='none', activation='relu2', norm='layer', qk_norm=True, bias=False,
               gram_rows=64, gram_copies=3, tie_word_embeddings=False))
IDS = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(0))

def make(kind):
    torch.manual_seed(0)
    config = EnigmaConfig.preset('smoke', vocab_size=40, **KINDS[kind])
    model = EnigmaForCausalLM(config).eval()
    with torch.no_grad(): # away from the start, where all positions are alike
        for p in model.parameters(): p.add_(.1*torch.randn_like(p))
    return model

@pytest.fixture(params=KINDS)
def model(request): return make(request.param)

def difference(model, other, **kwargs):
    with torch.no_grad(): return (model(IDS).logits - other(IDS, **kwargs).logits).abs().max()

def test_hooks_are_called(model):
    "Each part is called, and as often as the signal passes it: no library has to read it."
    calls = {name: 0 for name, m in model.named_modules() if not isinstance(m, nn.ModuleList)
             and not name.endswith('drop_weights')} # a probability, which the kernel gets
    def count(name):
        def hook(*_): calls[name] += 1
        return hook
    for name in calls: model.get_submodule(name).register_forward_hook(count(name))
    model(IDS)
    base, c = model.model, model.config
    ends = (c.machine == 'both') + 1 if base.enigma is not None else 0
    for name, n in calls.items():
        part = name.removeprefix('model.enigma.')
        there_and_back = part.startswith(('plugboard', 'rev_blocks')) or c.reciprocal
        machine = ends * (2 if there_and_back and part not in ('reflector', name) else 1)
        assert n == (machine if name.startswith('model.enigma') else 1), (name, n)

def test_offload_to_the_processor_and_to_the_disk(model, tmp_path):
    for offload, args in ((accelerate.cpu_offload, ()), (accelerate.disk_offload, (tmp_path,))):
        moved = offload(copy.deepcopy(model), *args, execution_device=torch.device('cpu'))
        assert next(moved.model.layers[0].parameters()).is_meta
        assert difference(model, moved) == 0

def test_a_map_with_parts_on_the_disk(model, tmp_path):
    model.save_pretrained(tmp_path)
    places = {name: where for where, names in dict(
        disk=('model.enigma', 'model.wheels', 'model.layers.1'),
        cpu=('model.embed_tokens', 'model.embed_grams', 'model.embed_copies', 'model.norm',
             'model.layers.0', 'lm_head')
    ).items() for name in names if any(n.startswith(name) for n, _ in model.named_parameters(
        remove_duplicate=False))}
    loaded = EnigmaForCausalLM.from_pretrained(tmp_path, device_map=places,
                                               offload_folder=tmp_path/'offload')
    assert difference(model, loaded) < 1e-5 # a kernel's last bits hang on where a file lies
    assert loaded.generate(IDS[:, :4], max_new_tokens=3, do_sample=False).shape[1] <= 7

def shard(model, places):
    "Divide a model among one process, as FSDP2 does."
    base, mesh = model.model, init_device_mesh('cpu', (1,))
    parts = dict(root=[], blocks=base.layers, parts=[m for b in base.layers for m in b.children()])
    wheels = [] if places == 'root' else [m for m in (base.enigma, *(base.wheels or ())) if m]
    for part in (*parts[places], *wheels, model): fully_shard(part, mesh=mesh)
    return model

@pytest.mark.parametrize('places', ['root', 'blocks', 'parts'])
def test_sharded(model, places):
    with group_of_one(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert difference(model, shard(copy.deepcopy(model), places)) == 0
        whole, divided = copy.deepcopy(model).train(), shard(copy.deepcopy(model).train(), places)
        for m in (whole, divided): m(IDS, labels=IDS).loss.backward()
        for (name, p), q in zip(whole.named_parameters(), divided.parameters()):
            if p.grad is not None:
                assert torch.allclose(q.grad.full_tensor(), p.grad, rtol=1e-5, atol=1e-6), name

def quantised_is_the_same(kind):
    "The control has the numbers that the quantised weights stand for."
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    model = make(kind)
    quantised, control = copy.deepcopy(model), copy.deepcopy(model)
    quantize_(quantised, Int8WeightOnlyConfig())
    with torch.no_grad():
        for m, n in zip(quantised.modules(), control.modules()):
            if isinstance(m, nn.Linear) and m.weight is not model.model.embed_tokens.weight:
                n.weight = nn.Parameter(m.weight.dequantize().clone())
    kinds = (Linear, FixedLinear) if model.config.exact else (Linear,)
    assert all(type(m.weight) is not nn.Parameter for m in quantised.modules()
               if isinstance(m, kinds))
    assert difference(control, quantised) < 1e-4 < difference(model, quantised)

@pytest.mark.proof('lm.model', 'machine.rotor', 'machine.exact', 'machine.enigma')
def test_quantised(tmp_path):
    "By torchao, in a process of its own: where it is installed, transformers and peft import it."
    try: foreign.pip('install', '--target', tmp_path, 'torchao==0.18.0')
    except foreign.NotFetched as e: pytest.skip(f'torchao could not be fetched: {e}')
    here = Path(__file__).parent
    code = 'import test_citizen as t\nfor kind in t.KINDS: t.quantised_is_the_same(kind)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={
        **os.environ, 'PYTHONPATH': os.pathsep.join(map(str, (here, here.parent, tmp_path)))})
    assert done.returncode == 0, done.stderr[-3000:]

def test_pruned(model):
    pruned, control = copy.deepcopy(model), copy.deepcopy(model)
    for m, n in zip(list(pruned.modules()), control.modules()):
        for name, p in list(m.named_parameters(recurse=False)):
            if p.ndim < 2 or p is pruned.lm_head.weight: continue
            pruning.random_unstructured(m, name, .5)
            with torch.no_grad(): getattr(n, name).mul_(getattr(m, name + '_mask'))
    assert difference(control, pruned) == 0 < difference(model, pruned)

def test_numbers_without_an_axis(model, tmp_path):
    "A checkpoint of 0.1 holds single numbers, which sharding refuses."
    assert all(p.ndim for p in model.parameters())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path/'model.safetensors')
    old = {k: v.squeeze() if v.numel() == 1 else v for k, v in saved.items()}
    save_file(old, tmp_path/'model.safetensors', {'format': 'pt'})
    assert difference(model, EnigmaForCausalLM.from_pretrained(tmp_path)) == 0
    again = EnigmaForCausalLM(model.config)
    again.load_state_dict(old, strict=False) # the head is the embedding
    assert difference(model, again.eval()) == 0

def chunks(model, cache, cuts, **kwargs):
    with torch.no_grad():
        return torch.cat([model(IDS[:, a:b], past_key_values=cache, **{
            k: v[:, :b] for k, v in kwargs.items()}).logits for a, b in zip(cuts, cuts[1:])], 1)

def test_a_cache_holds_heads_of_the_usual_width(model):
    c = model.config
    width = c.hidden_size // c.num_attention_heads
    close = 4*c.grid if c.exact else 1e-5 # a number may be rounded to the next step of the grid
    whole, mask = model(IDS, use_cache=False).logits, torch.ones_like(IDS)
    grown, fixed = DynamicCache(), StaticCache(config=c, max_cache_len=20)
    fixed.early_initialization(2, c.num_attention_heads, width, torch.float32, 'cpu')
    for cache in (grown, fixed):
        assert torch.allclose(chunks(model, cache, (0, 5, 6, 10, 12)), whole, atol=close)
        assert cache.layers[0].keys.shape[-1] == width
    mask[0, :3] = 0 # padding on the left
    padded = model(IDS, attention_mask=mask, use_cache=False).logits
    found = chunks(model, DynamicCache(), (0, 6, 7, 12), attention_mask=mask)
    assert torch.allclose(found[mask.bool()], padded[mask.bool()], atol=close)

def test_several_texts_in_a_row(model):
    "A row with several texts is each text alone; a cache that was given could not tell them apart."
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = model(IDS, position_ids=positions)
    alone = torch.cat([model(IDS[:, :5]).logits, model(IDS[:, 5:]).logits], 1)
    close = 4*model.config.grid if model.config.exact else 1e-5
    assert torch.allclose(packed.logits, alone, atol=close) and packed.past_key_values is None
    with pytest.raises(ValueError, match='position_ids that begin again'):
        model(IDS, position_ids=positions, past_key_values=DynamicCache())

def test_positions_of_ones_own_beside_a_mask(model):
    "A new cache changes nothing, and what is cached keeps its distance from what comes."
    close = 4*model.config.grid if model.config.exact else 1e-5
    mask = torch.ones_like(IDS)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6],
                              [3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]])
    given = dict(attention_mask=mask, position_ids=positions)
    with torch.no_grad():
        whole = model(IDS, use_cache=False, **given).logits
        assert torch.allclose(model(IDS, past_key_values=DynamicCache(), **given).logits, whole,
                              atol=close)
        assert (whole - model(IDS).logits).abs().max() > 1e-2
        later = dict(attention_mask=mask, position_ids=positions[1:] + torch.tensor([[4], [0]]))
        later['position_ids'][:, 1:] = later['position_ids'][:, :1] + torch.arange(1, 12)
        whole, cache = model(IDS, use_cache=False, **later).logits, DynamicCache()
        for a, b in ((0, 5), (5, 6), (6, 12)):
            part = model(IDS[:, a:b], attention_mask=mask[:, :b], past_key_values=cache,
                         position_ids=later['position_ids'][:, a:b]).logits
            assert torch.allclose(part, whole[:, a:b], atol=close)

def test_standard_arguments(model):
    whole = model(IDS)
    logits, *_ = model(IDS, return_dict=False)
    assert torch.equal(logits, whole.logits)
    assert isinstance(model.model(IDS, return_dict=False), tuple)
    for kept, expected in ((torch.tensor([0, 5]), [0, 5]), (3, [9, 10, 11])):
        found = model(IDS, logits_to_keep=kept).logits
        assert torch.allclose(found, whole.logits[:, expected], atol=1e-5)

def test_attentions_and_hidden_states_while_learning(model):
    "Asked for, they are there, in two streams, too; and the loss and its gradients stay."
    c, ways = model.config, {}
    for asked in (False, True):
        model.zero_grad()
        out = model(IDS, labels=IDS, output_hidden_states=asked, output_attentions=asked)
        out.loss.backward()
        ways[asked] = out, {name: p.grad for name, p in model.named_parameters()
                            if p.grad is not None}
    (plain, grads), (told, others) = ways.values()
    assert plain.attentions is None and len(told.hidden_states) == c.num_layers + 1
    assert len(told.attentions) == c.num_layers
    for weights in told.attentions:
        assert weights.shape == (2, c.num_heads, 12, 12) and (weights.triu(1) == 0).all()
        assert torch.allclose(weights.sum(-1), torch.ones(2, c.num_heads, 12))
    close = dict(rtol=.05, atol=4*c.grid) if c.exact else dict(rtol=1e-3, atol=1e-5)
    assert torch.allclose(told.loss, plain.loss, **close)
    assert grads.keys() == others.keys()
    for name, grad in grads.items(): assert torch.allclose(others[name], grad, **close), name

def test_attentions_by_the_definition():
    "What the first layer looks at, beside ALiBi's formula in float64."
    torch.manual_seed(0)
    model = EnigmaForCausalLM(EnigmaConfig.preset('smoke', vocab_size=40, machine='none')).eval()
    attn, seen = model.model.layers[0].attn, {}
    for name in ('q_proj', 'k_proj'):
        nn.init.normal_(getattr(attn, name).weight)
        getattr(attn, name).register_forward_hook(
            lambda m, _, out, name=name: seen.update({name: out}))
    found = model(IDS, output_attentions=True).attentions[0]
    q, k = (seen[name].view(2, 12, 2, -1).transpose(1, 2) for name in ('q_proj', 'k_proj'))
    expected = alibi_weights(q, k, torch.arange(12).expand(2, -1))
    assert torch.allclose(found.double(), expected, atol=3e-3) # slopes are rounded to bfloat16

def test_what_is_refused_or_said():
    exact = EnigmaForCausalLM(EnigmaConfig.preset('smoke', **KINDS['exact'])).bfloat16()
    with pytest.raises(ValueError, match='exact streams need float32'): exact(IDS)
    reversible = EnigmaForCausalLM(EnigmaConfig.preset('smoke', **KINDS['reversible']))
    with pytest.warns(UserWarning, match='stores no activations'):
        reversible.gradient_checkpointing_enable()

def test_no_tokens(model):
    "An empty text has no logits, and an empty batch no texts."
    for ids in (IDS[:, :0], IDS[:0]):
        assert model(ids, use_cache=False).logits.shape == (*ids.shape, 40)

def compiled_is_the_same(model):
    "What `_can_compile_fullgraph` says is so: one graph, for positions that are not known."
    assert model._can_compile_fullgraph
    assert difference(model, torch.compile(model, fullgraph=True, backend='eager')) < 1e-5

class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids): return self.model(ids, use_cache=False).logits

def exported_is_the_same(model):
    "torch.export has the whole model in one graph, at another length, too."
    length = torch.export.Dim('length', min=2, max=60)
    with torch.no_grad():
        program = torch.export.export(Logits(model), (IDS,), dynamic_shapes=({1: length},))
    for n in (5, 12):
        found = program.module()(IDS[:, :n])
        assert torch.allclose(found, model(IDS[:, :n]).logits, atol=1e-5)

# the exact machine is undone channel by channel, which makes a graph of minutes
SHORT = [kind for kind in KINDS if kind != 'exact']

@pytest.mark.parametrize('model', SHORT, indirect=True)
def test_one_graph(model): compiled_is_the_same(model)

@pytest.mark.parametrize('model', SHORT, indirect=True)
def test_exported(model): exported_is_the_same(model)

@pytest.mark.proof('lm.model', 'machine.rotor', 'machine.exact', 'machine.enigma')
@pytest.mark.parametrize('model', ['exact'], indirect=True)
def test_the_exact_machine_in_one_graph(model):
    compiled_is_the_same(model)
    exported_is_the_same(model)
