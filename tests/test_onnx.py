"Graphs in ONNX, computed by onnxruntime: the logits of the model."
import numpy as np, onnxruntime, pytest, torch

from enigma_lab.lm.model import EnigmaConfig, EnigmaForCausalLM
from enigma_lab.lm.onnx import write_onnx
from test_citizen import KINDS, make

PRESETS = 'smoke', 'cpu', 'quick'

def make_any(name):
    if name in KINDS: return make(name)
    torch.manual_seed(0)
    model = EnigmaForCausalLM(EnigmaConfig.preset(name, vocab_size=90)).eval()
    with torch.no_grad(): # away from the start, where all wheels are alike
        for p in model.parameters(): p.add_(.05*torch.randn_like(p))
    return model

@pytest.mark.proof('lm.onnx', 'lm.model', 'lm.copies', 'lm.grams', 'machine.frozen',
                   'machine.rotor', 'machine.enigma', seeds=(0,))
@pytest.mark.parametrize('name', [*PRESETS, *(kind for kind in KINDS if kind != 'exact')])
def test_the_same_logits(name, tmp_path):
    "Three lengths, two numbers of texts."
    model = make_any(name)
    session = onnxruntime.InferenceSession(write_onnx(model, tmp_path/'model.onnx'))
    for rows, length in ((1, 2), (3, 9), (1, model.config.max_len)):
        ids = torch.randint(3, model.config.vocab_size, (rows, length))
        with torch.no_grad(): ours = model(ids, use_cache=False).logits.numpy()
        theirs, = session.run(['logits'], {'input_ids': ids.numpy()})
        assert np.abs(ours - theirs).max() < 1e-4*max(1, np.abs(ours).max())
