"Prune four folders that other libraries wrote, from outside, and load what comes out without us."
import json
import subprocess
import sys

import pytest
import torch

from enigma_lab.data.images import load_images
from enigma_lab.data.sentences import draw_sentences, hard
from enigma_lab.data.text import builtin_documents
from enigma_lab.sgdd.encoder import minilm_folder

def fit(model, loss, steps, rate=3e-3):
    "Train a few seconds."
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        schedule.step()
    return model.eval()

def noise_loss(model, images, scheduler, labels=None):
    "Predict the noise of diffusers' own schedule."
    def loss(step):
        rows = torch.randint(len(images), (64,))
        x, t = images[rows], torch.randint(scheduler.config.num_train_timesteps, (64,))
        noise = torch.randn(x.shape)
        more = {} if labels is None else dict(class_labels=labels[rows])
        out = model(scheduler.add_noise(x, noise, t), t, **more).sample
        return (out - noise).square().mean()
    return loss

def make_unet(folder):
    "Save a DDPM pipeline of diffusers."
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
        up_block_types=('AttnUpBlock2D', 'UpBlock2D'), attention_head_dim=8)
    scheduler = DDPMScheduler(200, beta_schedule='squaredcos_cap_v2')
    fit(unet, noise_loss(unet, load_images('digits').train, scheduler), 300)
    DDPMPipeline(unet, scheduler).save_pretrained(folder)

def make_dit(folder):
    "Save a DiT of diffusers with its schedule, conditioned on the class."
    from diffusers import DDPMScheduler, DiTTransformer2DModel
    images = load_images('digits')
    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=1, out_channels=1, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=1)
    scheduler = DDPMScheduler(200, beta_schedule='squaredcos_cap_v2')
    fit(dit, noise_loss(dit, images.train, scheduler, images.labels['train']), 300)
    dit.save_pretrained(folder)
    scheduler.save_pretrained(folder)

def make_gpt2(folder):
    "Save a language model of GPT-2's shape with a tokenizer of characters."
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    text = '\n'.join(builtin_documents()[:400])[:200_000]
    (folder.parent/'text.txt').write_text(text, encoding='utf-8')
    vocab = {c: i for i, c in enumerate(sorted(set(text)))}
    vocab['<unk>'] = len(vocab)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab, [], unk_token='<unk>')), unk_token='<unk>')
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=len(vocab), n_positions=64, n_embd=64, n_layer=2, n_head=4,
        resid_pdrop=0., embd_pdrop=0., attn_pdrop=0., bos_token_id=None, eos_token_id=None))
    ids = torch.tensor(tokenizer(text)['input_ids'])[:180_000]
    def loss(step):
        rows = torch.randint(len(ids) - 64, (16, 1)) + torch.arange(64)
        return model(input_ids=ids[rows], labels=ids[rows]).loss
    fit(model, loss, 250)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

def command(*words):
    return subprocess.run(['enigma-lab', *map(str, words)],
                          capture_output=True, text=True)

def report_of(out):
    return json.loads((out/'sparsity.json').read_text(encoding='utf-8'))

LOAD = '''
import json, sys
sys.modules['enigma_lab'] = None # nothing of ours
import torch
{load}
report = json.load(open(sys.argv[1] + '/sparsity.json'))
layers = dict(model.named_modules())
for name in report['layers']:
    weight = layers[name].weight
    rows = (weight.T if type(layers[name]).__name__ == 'Conv1D' else weight).movedim(1, -1)
    assert ((rows.reshape(-1, 4) != 0).sum(1) <= 2).all(), name
print(len(report['layers']), 'layers are 2:4')
'''
LOADERS = {
    'unet': 'from diffusers import DDPMPipeline; '
            'model = DDPMPipeline.from_pretrained(sys.argv[1]).unet',
    'dit': 'from diffusers import DiTTransformer2DModel as D; '
           'model = D.from_pretrained(sys.argv[1])',
    'gpt2': 'from transformers import AutoModelForCausalLM as A, AutoTokenizer as T; '
            'model = A.from_pretrained(sys.argv[1]); T.from_pretrained(sys.argv[1])',
    'minilm': 'from transformers import AutoModel as A, AutoTokenizer as T; '
              'model = A.from_pretrained(sys.argv[1]); T.from_pretrained(sys.argv[1])'}

@pytest.fixture
def foreign(tmp_path):
    "Make one of the four: name -> folder, data."
    def make(name):
        torch.manual_seed(0)
        if name == 'minilm':
            data = tmp_path/'sentences.txt'
            data.write_text('\n'.join(draw_sentences(hard, 'train', 1200)))
            return minilm_folder(), data
        dict(unet=make_unet, dit=make_dit, gpt2=make_gpt2)[name](tmp_path/name)
        return tmp_path/name, tmp_path/'text.txt' if name == 'gpt2' else 'digits'
    return make

@pytest.mark.proof('maskpro.folders', 'maskpro.prune', 'maskpro.layer', 'maskpro.sparsegpt',
                   'maskpro.masks', seeds=(0,))
@pytest.mark.parametrize('name', LOADERS)
def test_a_foreign_folder(foreign, tmp_path, name):
    "From a folder to a folder that its own library loads; better than magnitude, and 2:4."
    folder, data = foreign(name)
    out = tmp_path/'new'/'pruned'
    out.parent.mkdir()
    done = command('maskpro', 'prune', folder, out, '--data', data)
    assert done.returncode == 0, done.stderr
    held_out = report_of(out)['held_out']
    assert held_out['pruned_minus_magnitude_to'] < 0, held_out
    assert 'this - magnitude' in done.stdout
    code = LOAD.format(load=LOADERS[name])
    loaded = subprocess.run([sys.executable, '-c', code, str(out)], capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    again = command('maskpro', 'prune', folder, out, '--method', 'magnitude', '--data', data)
    assert again.returncode != 0 and 'exists; give another' in again.stderr
    assert [p.name for p in out.parent.iterdir()] == ['pruned']
