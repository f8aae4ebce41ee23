"A masked model lives as other models do: saved, copied, trained, merged, compiled."
import copy, io, json, pickle, warnings

import pytest, torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from enigma_lab.maskpro.masks import apply_masks, find_masks, remove_masks, verify_weights
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
