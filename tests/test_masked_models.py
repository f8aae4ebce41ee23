"A masked model lives as other models do: saved, copied, trained, merged, compiled."
import copy, inspect, io, json, pickle, warnings

import pytest, torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from enigma_lab.maskpro.layer import detach
from enigma_lab.maskpro.masks import (
    apply_masks, find_masks, remove_masks, verify_masks, verify_weights)
from enigma_lab.maskpro.storage import load_masks, save_masks
from enigma_lab.maskpro.subsets import subsets

pytestmark = pytest.mark.filterwarnings('ignore:.*written where the mask is zero')

def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2,
        n_head=2, bos_token_id=0, eos_token_id=0)), ['c_attn', 'c_fc']

def llama():
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2)), ['q_proj', 'down_proj']

def bert():
    from transformers import BertConfig, BertModel
    return BertModel(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=32, max_position_embeddings=16)), ['query']

def enigma():
    from enigma_lab.lm.model import EnigmaConfig, EnigmaForCausalLM
    return EnigmaForCausalLM(EnigmaConfig(vocab_size=40, dim=16, num_layers=2, num_heads=2,
        max_len=16, machine='none')), ['q_proj', 'down_proj']

def unet():
    from enigma_lab.ddpm.model import make_unet
    return make_unet('tiny'), ['to_q', 'conv1']

MODELS = [gpt2, llama, bert, unet, enigma]

def output(model): # one number for each of its outputs
    torch.manual_seed(1)
    own = getattr(model, '_orig_mod', model)
    own = own.get_base_model() if hasattr(own, 'get_base_model') else own
    if 'UNet' in type(own).__name__:
        return model(torch.randn(2, 1, 8, 8), torch.tensor([3, 150])).sample
    found = model(input_ids=torch.arange(16)[None] % 40)
    return found.last_hidden_state if hasattr(found, 'last_hidden_state') else found.logits

def loss(model): # weights all outputs differently
    found = output(model)
    return (found*torch.linspace(-1, 1, found.numel()).view_as(found)).sum()

def masked(make, seed=0):
    "Make a model with a mask that no weights suggest."
    torch.manual_seed(seed)
    model = make()[0].eval()
    masks = apply_masks(model)
    masks.set(subsets(2, 4)[torch.randint(6, (masks.num_groups,))])
    return model, masks

def same(a, b): return torch.equal(output(a), output(b))

def zeros(model, masks): # what is exported
    return verify_weights(model, masks.n, masks.m)

def adapted(make, model):
    "Put a LoRA on a model whose update is not zero."
    torch.manual_seed(3)
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=make()[1])).eval()
    for name, p in lora.named_parameters():
        if 'lora_B' in name: torch.nn.init.normal_(p, std=.1)
    return lora

@pytest.mark.parametrize('make', MODELS)
def test_save_pretrained(make, tmp_path, caplog):
    "The library's own loading gives the masked model, without a warning; the original keeps masks."
    model, masks = masked(make)
    before = masks.values(), masks.weights()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert same(loaded, model) and same(loaded, remove_masks(copy.deepcopy(model)))
    config = json.loads((tmp_path/'config.json').read_text())
    entry = config.get('sparsity', config.get('_sparsity'))
    assert entry == dict(n=2, m=4, groups='in_channels', layers=[x.name for x in masks.layers])
    kept = loaded.config['_sparsity'] if '_sparsity' in config else loaded.config.sparsity
    assert kept == entry
    file, = tmp_path.glob('*.safetensors')
    assert not any('parametrizations' in key for key in load_file(file))
    assert not caplog.text
    for a, b in zip(before, (masks.values(), masks.weights())): assert torch.equal(a, b)
    assert not hasattr(model.config, 'sparsity') and '_sparsity' not in dict(
        getattr(model, '_internal_dict', {}))
    # the masks are found again in the zeros
    assert torch.equal(apply_masks(loaded).values(), masks.values())
    # what has no masks any more is saved by the library
    remove_masks(model).save_pretrained(tmp_path/'bare')
    assert same(type(model).from_pretrained(tmp_path/'bare').eval(), model)

@pytest.mark.parametrize('make', MODELS)
def test_a_state_has_masks_weights_and_products(make):
    model, masks = masked(make)
    state = model.state_dict()
    # 1. into another masked model: everything
    other, others = masked(make, 1)
    other.load_state_dict(state)
    assert same(other, model) and torch.equal(others.weights(), masks.weights())
    assert torch.equal(others.values(), masks.values())
    # 2. into a plain one: the products
    torch.manual_seed(2)
    plain = make()[0].eval()
    assert not plain.load_state_dict(state, strict=False).missing_keys and same(plain, model)
    # 3. a plain state into a masked one: its zeros are the mask
    third, thirds = masked(make, 4)
    third.load_state_dict(remove_masks(copy.deepcopy(model)).state_dict())
    assert same(third, model) and torch.equal(thirds.values(), masks.values())
    # 4. a dense one leaves the mask
    torch.manual_seed(5)
    dense = make()[0].eval()
    third.load_state_dict(dense.state_dict())
    assert torch.equal(thirds.values(), masks.values())
    again = apply_masks(dense, values=masks.values())
    assert same(third, dense) and torch.equal(thirds.weights(), again.weights())

@pytest.mark.parametrize('make', MODELS)
def test_copies(make):
    "A deep copy, a pickle and a file of torch are masked, and are not the model itself."
    model, masks = masked(make)
    file = io.BytesIO()
    torch.save(model, file); file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
                  torch.load(file, weights_only=False)):
        others = find_masks(other)
        assert same(other, model) and torch.equal(others.values(), masks.values())
        assert [n for n, _ in other.named_parameters()] == [n for n, _ in model.named_parameters()]
        others.set(1 - masks.values())
        assert not same(other, model) and not torch.equal(others.values(), masks.values())
        assert same(pickle.loads(pickle.dumps(other)), other)
        assert 'parametrizations' not in ''.join(remove_masks(other).state_dict())

@pytest.mark.parametrize('make', MODELS)
def test_bfloat16(make, tmp_path):
    model, masks = masked(make)
    model.bfloat16()
    find_masks(model).check(find_masks(model).values())
    copied = copy.deepcopy(model)
    remove_masks(copied)
    if make is unet: # its convolutions are of one type with their input
        image, t = torch.randn(2, 1, 8, 8).bfloat16(), torch.tensor([3, 150])
        assert torch.equal(copied(image, t).sample, model(image, t).sample)
    else: assert same(copied, model) and output(model).dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    weights = loaded.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in copied.state_dict().items())

@pytest.mark.parametrize('make', MODELS)
def test_compile(make):
    "The compiled model gives the same, gradients too, and sees masks and weights that are changed."
    torch._dynamo.reset() # other tests' models may have used up the number of recompilations
    model, masks = masked(make)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=make in (llama,))
    assert torch.allclose(output(compiled), output(model), atol=1e-5)
    masks.set(1 - masks.values())
    with torch.no_grad(): masks.layers[0].module.weight.mul_(2.)
    assert torch.allclose(output(compiled), output(model), atol=1e-5)
    grads = []
    for of in (compiled, model):
        model.zero_grad(); loss(of).backward()
        grads.append([torch.zeros(()) if (g := layer.weight.grad) is None else g
            for layer in masks.layers]) # a pooler that the output does not need has none
    assert max(g.abs().max() for g in grads[1]) > 1e-2
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(*grads))

@pytest.mark.parametrize('make', MODELS)
def test_optimizer(make):
    "A state of AdamW goes on in a copy, bit for bit; one made before the masks does the same."
    model, masks = masked(make)
    def train(model, optimizer, steps=3):
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=.1)
    train(model, optimizer)
    other, _ = masked(make, 1)
    other.load_state_dict(model.state_dict())
    twin = torch.optim.AdamW(other.parameters(), 1e-2, weight_decay=.1)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for of, opt in ((model, optimizer), (other, twin)): train(of, opt)
    assert same(model, other)
    # an optimizer that was made before the masks moves the same parameters
    torch.manual_seed(0)
    dense = make()[0].eval()
    early = torch.optim.AdamW(dense.parameters(), 1e-2, weight_decay=.1)
    apply_masks(dense, values=masks.values())
    train(dense, early, 6)
    torch.testing.assert_close(output(dense), output(model), atol=1e-4, rtol=1e-3)

@pytest.mark.parametrize('make', MODELS)
def test_weight_decay(make):
    "What is masked away has no slope; weight decay alone moves it."
    for decay in (0., .1):
        model, masks = masked(make)
        start, off = masks.weights(), masks.values() == 0
        loss(model).backward()
        for layer in masks.layers: # a pooler that the output does not need stays as it is
            if layer.weight.grad is None: off[layer.start:layer.stop] = False
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=decay)
        for _ in range(5):
            optimizer.zero_grad(); loss(model).backward(); optimizer.step()
        torch.testing.assert_close(masks.weights()[off], start[off]*(1 - 1e-2*decay)**5)
        kept = masks.values() == 1
        assert not torch.equal(masks.weights()[kept], start[kept])

@pytest.mark.parametrize('make', MODELS)
@pytest.mark.parametrize('order', ['lora on masks', 'masks on lora'])
@pytest.mark.parametrize('safe', [False, True])
def test_lora_merges(make, order, safe):
    "The update goes into all of the weight, the mask stays; unmerging takes it out again."
    model, masks = masked(make)
    dense, values = masks.weights(), masks.values()
    if order == 'lora on masks': lora = adapted(make, model)
    else:
        lora = adapted(make, remove_masks_unbaked(model))
        masks = apply_masks(lora, values=values)
        assert set(masks.dense.values()) >= {'belongs to an adapter'}
    masks = find_masks(lora)
    assert not any('lora_' in layer.name for layer in masks.layers)
    deltas = {name: m.get_delta_weight('default') for name, m in lora.named_modules()
        if hasattr(m, 'get_delta_weight')}
    assert deltas
    full = masks.pack({layer.name: deltas.get(layer.name.removesuffix('.base_layer'),
        torch.zeros(layer.shape)) for layer in masks.layers})
    assert full.abs().max() > 1e-3
    lora.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(masks.weights(), dense + full, atol=1e-6, rtol=1e-5)
    assert torch.equal(masks.values(), values)
    lora.unmerge_adapter()
    torch.testing.assert_close(masks.weights(), dense, atol=1e-6, rtol=1e-5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        merged = lora.merge_and_unload(safe_merge=safe).eval()
    assert any('written where the mask is zero' in str(w.message) for w in caught)
    masks = find_masks(merged)
    torch.testing.assert_close(masks.weights(), dense + full, atol=1e-6, rtol=1e-5)
    # the oracle: a plain model with the merged weights, masked by hand
    torch.manual_seed(0)
    plain = make()[0].eval()
    for name, weight in masks.unpack((dense + full)*values).items():
        plain.get_submodule(name).weight.data.copy_(weight)
    torch.testing.assert_close(output(merged), output(plain), atol=1e-5, rtol=1e-4)

def remove_masks_unbaked(model):
    "Take the masks off and leave the weights."
    from enigma_lab.maskpro.masks import detach, let_save
    for layer in find_masks(model).layers: detach(layer.module, bake=False)
    let_save(model, False)
    return model

def test_adapters_are_saved_alone(tmp_path):
    "A LoRA on a masked model is saved and loaded by peft."
    from peft import PeftModel
    model, _ = masked(llama)
    lora = adapted(llama, model)
    lora.save_pretrained(tmp_path)
    assert all('lora_' in k for k in load_file(tmp_path/'adapter_model.safetensors'))
    again = PeftModel.from_pretrained(masked(llama)[0], tmp_path).eval()
    assert same(again, lora)

def holder():
    "A model of a user: a masked UNet beside an autoencoder."
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    vae = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(4,), norm_num_groups=2,
                        latent_channels=2, sample_size=8)
    return nn.ModuleDict(dict(unet=unet()[0], vae=vae)).eval()

@pytest.mark.parametrize('make', MODELS)
def test_the_saver_takes_what_the_library_takes(make, tmp_path):
    "The signature is the library's, and a state is taken by place as by name."
    model, masks = masked(make)
    plain = remove_masks(copy.deepcopy(model))
    wanted = inspect.signature(plain.save_pretrained)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert inspect.signature(other.save_pretrained) == wanted
        assert other.save_pretrained.model is other
    if make is unet: return # diffusers takes no state
    model.save_pretrained(tmp_path, True, model.state_dict())
    assert same(type(model).from_pretrained(tmp_path).eval(), model)
    assert not any('parametrizations' in key for key in load_file(tmp_path/'model.safetensors'))

def test_a_pipeline_is_saved_as_asked(tmp_path):
    "diffusers looks up what the saver takes: the variant, the kind of file, the size of a part."
    from diffusers import DDPMPipeline, DDPMScheduler
    model, masks = masked(unet)
    pipe = DDPMPipeline(model, DDPMScheduler(200))
    names = lambda folder: {p.name for p in (tmp_path/folder/'unet').iterdir()} - {'config.json'}
    pipe.save_pretrained(tmp_path/'half', variant='fp16')
    assert names('half') == {'diffusion_pytorch_model.fp16.safetensors'}
    pipe.save_pretrained(tmp_path/'bin', safe_serialization=False)
    assert names('bin') == {'diffusion_pytorch_model.bin'}
    pipe.save_pretrained(tmp_path/'parts', max_shard_size='5KB')
    assert len(names('parts')) > 2
    for folder, variant in dict(half='fp16', bin=None, parts=None).items():
        again = DDPMPipeline.from_pretrained(tmp_path/folder, variant=variant,
                                             use_safetensors=folder != 'bin').unet.eval()
        assert same(again, model) and zeros(again, masks)

def test_a_saver_of_the_user_is_given_back(tmp_path):
    seen, model = [], llama()[0]
    own = model.save_pretrained = lambda folder, **how: seen.append(
        (folder, type(model).state_dict(model), model.config.sparsity['n']))
    apply_masks(model)
    model.save_pretrained('here')
    (folder, state, n), = seen
    assert (folder, n) == ('here', 2) and not any('parametrizations' in key for key in state)
    assert remove_masks(model).save_pretrained is own

def test_parts_without_masks_are_saved(tmp_path):
    "A part of a masked model that has no masks, and a whole whose part has none any more."
    from diffusers import AutoencoderKL
    from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel
    both = holder()
    apply_masks(both, targets='unet')
    assert 'save_pretrained' not in vars(both.vae) # it is the library's
    both.vae.save_pretrained(tmp_path/'vae')
    state = AutoencoderKL.from_pretrained(tmp_path/'vae').state_dict()
    assert all(torch.equal(state[k], v) for k, v in both.vae.state_dict().items())
    assert '_sparsity' not in json.loads((tmp_path/'vae'/'config.json').read_text())
    both.unet.save_pretrained(tmp_path/'unet')
    assert same(type(both.unet).from_pretrained(tmp_path/'unet').eval(), both.unet)
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=16)
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(config, config))
    apply_masks(model, targets='encoder.encoder')
    model.decoder.save_pretrained(tmp_path/'decoder')
    again = type(model.decoder).from_pretrained(tmp_path/'decoder').state_dict()
    assert all(torch.equal(again[k], v) for k, v in model.decoder.state_dict().items())
    remove_masks(model.encoder)
    model.save_pretrained(tmp_path/'whole')
    again = type(model).from_pretrained(tmp_path/'whole').state_dict()
    assert all(torch.equal(again[k], v) for k, v in model.state_dict().items())

@pytest.mark.parametrize('make', [llama, unet])
def test_what_is_saved_is_what_is_said(make, tmp_path):
    "Relaxed masks are refused; a configuration does not keep an earlier pattern."
    model, masks = masked(make)
    hard = masks.values()
    masks.set(torch.rand(masks.num_groups, 4), strict=False)
    with pytest.raises(ValueError, match='masks of zeros and ones first'):
        model.save_pretrained(tmp_path/'relaxed')
    assert not list(tmp_path.rglob('*.safetensors'))
    masks.set(hard)
    model.save_pretrained(tmp_path/'first')
    again = type(model).from_pretrained(tmp_path/'first')
    remove_masks(apply_masks(again, 1, 4).model).save_pretrained(tmp_path/'second')
    config = json.loads((tmp_path/'second'/'config.json').read_text())
    assert config.get('sparsity', config.get('_sparsity'))['n'] == 1
    assert verify_weights(type(model).from_pretrained(tmp_path/'second'), 1, 4)

@pytest.mark.parametrize('scale', [1., 9.])
def test_products_meet_relaxed_masks(scale):
    "A pruned state is taken as it is, or refused; the oracle is the pruned model itself."
    pruned = remove_masks(masked(llama)[0])
    down = pruned.model.layers[0].mlp.down_proj.weight.data
    down[:, ::4] = 0. # fewer than the pattern allows
    model, masks = masked(llama, 1)
    relaxed = scale*torch.randn(masks.num_groups, 4)
    masks.set(relaxed, strict=False)
    model.load_state_dict(pruned.state_dict())
    assert same(model, pruned)
    masks.check(masks.values())
    masks.set(relaxed, strict=False)
    torch.manual_seed(7)
    with pytest.raises(RuntimeError, match='is not 2:4, and the mask is relaxed'):
        model.load_state_dict(llama()[0].state_dict())
    # weights and masks together are taken
    other, others = masked(llama, 2)
    others.set(relaxed, strict=False)
    model.load_state_dict(other.state_dict())
    assert same(model, other)

def test_a_state_may_change_the_type():
    "Assigned in half precision, the mask follows."
    pruned = remove_masks(masked(llama)[0]).bfloat16()
    model, masks = masked(llama, 1)
    model.load_state_dict(pruned.state_dict(), assign=True)
    assert same(model, pruned) and find_masks(model).layers[0].mask.dtype == torch.bfloat16

class Shift(nn.Module):
    "A parametrization of a user, which is zero nowhere."
    def forward(self, weight): return weight + 1.

def normed(how):
    "A model with a mask, and another parametrization after it."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    apply_masks(model)
    if how == 'user': parametrize.register_parametrization(model[0], 'weight', Shift())
    else: getattr(parametrizations, how)(model[0])
    return model.eval()

@pytest.mark.parametrize('how', ['spectral_norm', 'user'])
def test_a_parametrization_after_the_mask(how, tmp_path):
    "What the layer sees is saved by its parts alone; nobody calls it N:M."
    model, x = normed(how), torch.randn(3, 8)
    state = model.state_dict()
    assert '0.weight' not in state and '1.weight' in state
    twin = normed(how)
    for p in twin.parameters(): torch.nn.init.normal_(p)
    twin.load_state_dict(state)
    assert torch.equal(twin(x), model(x))
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(RuntimeError, match='Missing key.*0.weight'): plain.load_state_dict(state)
    with pytest.raises(RuntimeError, match='Missing key'): twin.load_state_dict(plain.state_dict())
    name = {'user': 'Shift', 'spectral_norm': '_SpectralNorm'}[how]
    for fails in (find_masks, remove_masks, verify_masks):
        with pytest.raises(ValueError, match=f"last before its layer, got .'{name}'"): fails(model)
    with pytest.raises(ValueError, match='take that off'): detach(model[0], True)
    del model[0].parametrizations['weight'][1:] # as the message says
    assert verify_weights(remove_masks(model)) == {'0': 16, '1': 16}

@pytest.mark.parametrize('how', ['weight_norm', 'orthogonal'])
def test_a_parametrization_that_stands_alone(how):
    "These of torch work with no other: their layer fails, and the state has no wrong weight."
    model = normed(how)
    assert '0.weight' not in model.state_dict()
    with pytest.raises(ValueError, match='last before its layer'): find_masks(model)

@pytest.mark.parametrize('how', ['weight_norm', 'spectral_norm', 'orthogonal', 'user'])
def test_a_parametrization_before_the_mask(how, tmp_path):
    "The layer stays dense with a reason, also when masks come from a file."
    make = lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    path = save_masks(apply_masks(make()), tmp_path/'masks.safetensors')
    model = make()
    if how == 'user': parametrize.register_parametrization(model[0], 'weight', Shift())
    else: getattr(parametrizations, how)(model[0])
    model.eval()
    before = model(torch.ones(1, 8))
    with pytest.raises(ValueError): load_masks(path, model, weights=False)
    assert torch.equal(model(torch.ones(1, 8)), before)
    dense = apply_masks(model).dense
    assert dense['0'] == 'its weight has a parametrization already'
    assert 'packed' not in ''.join(dense.values()) # a parametrization is a module called `weight`

class StdConv(nn.Conv2d):
    "A weight-standardised convolution, as in timm."
    def forward(self, x):
        w = self.weight
        mean, std = w.mean((1, 2, 3), keepdim=True), w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (w - mean)/(std + 1e-5), self.bias, self.stride, self.padding)

class StdWay(nn.Conv2d):
    "The same by way of the method that torch's own forward calls."
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)

@pytest.mark.parametrize('kind', [StdConv, StdWay, 'bit'])
def test_a_weight_that_is_changed_is_not_masked(kind, tmp_path):
    "The oracle is the derivative of the output by the input."
    if kind == 'bit': from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
    conv = WeightStandardizedConv2d(8, 8, 3, padding=0) if kind == 'bit' else kind(8, 8, 3)
    model = nn.Sequential(conv, nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8, 8))
    dense = copy.deepcopy(model)
    masks = apply_masks(model)
    assert [layer.name for layer in masks.layers] == ['1', '3']
    assert 'computes other numbers from its weight' in masks.dense['0']
    # each masked layer multiplies by N:M
    x = torch.randn(1, 8, 3, 3)
    J = torch.autograd.functional.jacobian(lambda x: model[1](x).sum((2, 3)), x)[0, :, 0, :, 0, 0]
    assert ((J != 0).view(-1, 4).sum(1) == 2).all()
    assert set(verify_weights(remove_masks(model))) == {'1', '3'}
    assert torch.equal(model[0](x), dense[0](x))
    # a mask file of a time when they were masked
    layer = nn.Sequential(nn.Conv2d(8, 8, 3, bias=conv.bias is not None))
    path = save_masks(apply_masks(layer), tmp_path/'masks.safetensors')
    with pytest.raises(ValueError, match='layers that can have them.*computes other numbers'):
        load_masks(path, nn.Sequential(copy.deepcopy(dense[0])), weights=False)

def test_a_model_of_changed_weights():
    "The convolutions of BiT are all standardised: nothing is left to mask, and that is said."
    from transformers import BitConfig, BitForImageClassification
    model = BitForImageClassification(BitConfig(embedding_size=8, hidden_sizes=[32, 32],
        depths=[1, 1], layer_type='bottleneck', num_groups=4))
    with pytest.raises(ValueError, match='WeightStandardizedConv2d computes other numbers'):
        apply_masks(model)

@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_a_forward_pass_of_its_own_that_keeps_the_weight():
    "Falcon's layers and those of old diffusers multiply by their weight, in their own words."
    from diffusers.models.lora import LoRACompatibleConv
    from transformers import FalconConfig, FalconForCausalLM
    from enigma_lab.maskpro.forward import own_forward
    make = lambda: (FalconForCausalLM(FalconConfig(vocab_size=40, hidden_size=16,
        num_hidden_layers=1, num_attention_heads=2, bos_token_id=0, eos_token_id=0)), [])
    model, masks = masked(make)
    assert len(masks.layers) == 4 and all(own_forward(layer.module) for layer in masks.layers)
    assert same(model, remove_masks(copy.deepcopy(model)))
    conv = nn.Sequential(LoRACompatibleConv(8, 8, 3))
    assert len(apply_masks(conv).layers) == 1

class Params4bit(nn.Parameter): "As of bitsandbytes."

def test_weights_that_cannot_be_masked():
    "Each is an error with a rule, a value and a way out, and nothing has changed."
    two = lambda kind=nn.Linear: nn.Sequential(kind(8, 8), kind(8, 8))
    with torch.device('meta'): empty = two()
    lazy = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        packed = torch.ao.quantization.quantize_dynamic(two(), {nn.Linear})
        part = nn.Sequential(copy.deepcopy(packed[0]), nn.Linear(8, 8))
    pruned, old, bits = two(), two(), two()
    for layer in pruned: prune.l1_unstructured(layer, 'weight', .5)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for layer in old: nn.utils.weight_norm(layer)
    for layer in bits: layer.weight = Params4bit(torch.zeros(32, 1, dtype=torch.uint8),
                                                 requires_grad=False)
    words = {
        empty: "memory before it is masked, got 2 on the meta device.*load the weights first",
        lazy: "know its sizes.*got 2 parameters of lazy modules, such as .'0.weight'.*run",
        packed: "Linear holds its weight packed; mask the model before it is quantised",
        pruned: "L1Unstructured computes it; first call prune.remove",
        old: "WeightNorm computes it; first call remove_weight_norm",
        bits: "its weight is a Params4bit, mask it before it is quantised",
        two().to(torch.float8_e4m3fn): "its weight is of type torch.float8_e4m3fn"}
    for model, said in words.items():
        keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match=said): apply_masks(model)
        assert (keys, kinds) == (list(model.state_dict()), [type(m) for m in model.modules()])
    assert 'packed' in apply_masks(part).dense['0']
    half = nn.Sequential(pruned[0], nn.Linear(8, 8))
    dense = apply_masks(half).dense
    assert 'prune.remove' in dense['0'] and 'computes its weight from it' in dense['0.weight_orig']
    lazy(torch.ones(1, 8))
    assert len(apply_masks(lazy).layers) == 2 # as the message says
    prune.remove(pruned[0], 'weight')
    assert len(apply_masks(nn.Sequential(pruned[0])).layers) == 1

def test_masks_of_two_patterns_are_not_one(tmp_path):
    "Masked part by part: the parts have masks, the whole says that it has several."
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    apply_masks(model[0]), apply_masks(model[1], groups='flat')
    with pytest.raises(ValueError, match="one pattern.*'flat'.: '1'.*one by one"): find_masks(model)
    with pytest.raises(ValueError, match='one pattern'): remove_masks(model)
    for part in model: remove_masks(part)

def test_a_class_that_is_derived_later():
    "FSDP derives a class from the layer's: the state is the same, and the loading."
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    apply_masks(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for layer in model: layer.__class__ = type('Divided', (type(layer),), {})
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    model.load_state_dict({k: v for k, v in before.items() if 'parametrizations' not in k})
    assert torch.equal(model[0].weight.clone(), before['0.weight'])

def test_nothing_verified_is_an_error():
    with pytest.raises(ValueError, match='one layer at least must be verified'):
        verify_weights(nn.Sequential(nn.Linear(6, 8)))

def test_a_functional_call_leaves_the_weights():
    "Named parameters, products or a whole state stand in for a while; the oracle is by hand."
    from enigma_lab.maskpro.layer import without_parts
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    masks, call = apply_masks(model), torch.func.functional_call
    before, y = masks.weights().clone(), model(x)
    untouched = lambda: torch.equal(masks.weights(), before) and torch.equal(model(x), y)
    ones = call(model, {'0.weight': torch.ones(8, 8)}, (x,))
    expected = model[1](F.linear(x, masks.layers[0].mask, model[0].bias))
    assert torch.equal(ones, expected) and untouched()
    named = {k: v*2 for k, v in model.named_parameters()}
    assert not torch.equal(call(model, named, (x,)), y) and untouched()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match='weights and masks, or products, got both'):
        call(model, state, (x,))
    assert untouched()
    assert torch.equal(call(model, without_parts(state), (x,)), y) and untouched()
    with torch.no_grad(): model[0].weight += 1 # what is written in place is written, as before
    assert torch.equal(masks.weights()[:16], before[:16] + 1)

def test_masks_without_memory_are_reset():
    "As FSDP does it: memory without values, then `reset_parameters` of every module."
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(8, 8, 3))
    apply_masks(model)
    empty = copy.deepcopy(model).to_empty(device='cpu')
    for t in (*empty.parameters(), *empty.buffers()): t.data.fill_(torch.nan)
    for module in empty.modules():
        if hasattr(module, 'reset_parameters'): module.reset_parameters()
    assert verify_masks(empty).weights().isfinite().all()
    assert empty[0].weight.isfinite().all()

@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_a_prefix_by_place():
    layer = nn.Linear(8, 8)
    apply_masks(layer)
    assert all(key.startswith('at.') for key in layer.state_dict({}, 'at.'))
