"""The Enigma language model, put together from the modules of enigma_lab 0.1.0.

MIT License. transformers imports this file with trust_remote_code=True, where the library is
not installed: pip install enigma_lab makes it unnecessary.
"""

from abc import ABC, abstractmethod
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from functools import partial
from functools import wraps
from importlib import import_module
from importlib.util import find_spec, resolve_name
from pathlib import Path
from torch import Tensor
from torch import Tensor, nn
from torch import nn
from torch._C import _functorch
from torch._subclasses import FakeTensor
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, initialization as init
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from types import FunctionType
import ast
import contextlib, threading, weakref
import inspect, itertools, warnings
import math
import math, re
import math, warnings
import sys
import torch
import torch.nn.functional as F


# enigma_lab.lm.attention

# far tokens have denormal weights, which CPUs handle slowly; must precede the first parallel
# operation
torch.set_flush_denormal(True)

def alibi_slopes(
    num_heads:int, # H
)->Tensor: # (H,) float32, from large to small
    "Compute a slope for each head, `2^(-8h/H)` (ALiBi, arXiv:2108.12409, section 3)."
    return 2. ** (-8. * torch.arange(1, num_heads+1) / num_heads)

def rounded_slopes(
    num_heads:int, # H
    head_dim:int, # D, features of a head
)->Tensor: # (H,) float32, exact in bfloat16: μ = slope * D^.5
    "Compute the slopes in units of the unscaled scores."
    return (alibi_slopes(num_heads) * head_dim**.5).bfloat16().float()

ALIBI_DIMS = 3 # numbers appended to each query and key

def alibi_dims(
    positions:Tensor, # (B, T) int64, the position of each token in its text
    num_heads:int, # H
    head_dim:int, # D, features of a head
    dtype:torch.dtype=torch.float32, # of queries and keys
)->tuple[Tensor,Tensor]: # for queries (B, H, T, 3) and for keys (B, 1, T, 3)
    """Compute the numbers that are appended to queries and keys.

    With them their dot product, times `D^-0.5`, gains `-slope * (i - j)`.
    """
    # (H, 1)
    mu = rounded_slopes(num_heads, head_dim).to(positions.device)[:, None]
    # (B, 1, T)
    i = positions[:, None].float()
    everywhere = lambda x: x.expand(i.shape[0], -1, i.shape[-1])
    q = torch.stack([everywhere(256*mu), everywhere(mu), -mu*i], -1)
    k = torch.stack([positions // 256, positions % 256, torch.ones_like(positions)], -1)[:, None]
    return q.to(dtype), k.to(dtype)

def alibi_mask(
    length:int, # T
    num_heads:int, # H
    head_dim:int, # D, features of a head
    device=None, # of the result
)->Tensor: # (1, H, T, T) float32: -slope * (i - j), and -inf where j > i
    "Write distance and causality as terms of the scores (ALiBi, arXiv:2108.12409, figure 3)."
    i = torch.arange(length, device=device)
    distance = (i[:, None] - i).float()
    mu = rounded_slopes(num_heads, head_dim).to(distance.device)[:, None, None]
    return (-mu * head_dim**-.5 * distance).masked_fill(distance < 0, -torch.inf)[None]

def append_alibi(
    x:Tensor, # (B, H, T, D)
    front:Tensor|None=None, # (B, 1 or H, T, 3) to put first; `None`: nothing
)->Tensor: # (B, H, T, W), W the next multiple of 8 from D + 3
    "Put `front` before the features and zeros behind them."
    D = x.shape[-1]
    fill = -(D + ALIBI_DIMS) % 8
    if front is None: return F.pad(x, (0, ALIBI_DIMS + fill))
    return F.pad(torch.cat([front.expand(*x.shape[:-1], -1), x], -1), (0, fill))

def attention_weights(
    q:Tensor, # (B, H, T, W) queries, widened or not
    k:Tensor, # (B, H, S, W) keys
    scale:float, # factor on the scores
    # bool (B, 1, T, S), True where a query sees a key, or floats added to scores; `None`: causal
    mask:Tensor|None=None,
)->Tensor: # (B, H, T, S), rows sum to 1; to 0 where a query sees nothing
    "Compute what each query takes from each key, which fused kernels do not tell."
    scores = q @ k.mT * scale
    T, S = scores.shape[-2:]
    if mask is None: mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if mask.is_floating_point(): return (scores + mask).softmax(-1)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return weights.masked_fill(~mask.any(-1, keepdim=True), 0.)

def causal_attention(
    q:Tensor, # (B, H, T, W) queries, widened or not
    k:Tensor, # (B, H, S, W) keys
    v:Tensor, # (B, H, S, W) values
    scale:float, # factor on the scores
    # bool (B, 1, T, S), True where a query sees a key, or floats added to scores; `None`: causal
    mask:Tensor|None=None,
    dropout=0., # probability of dropping a weight, or a function that drops some of (B, H, T, S)
)->Tensor: # (B, H, T, W)
    "Compute attention that sees no later key, by torch's fused kernels."
    T, S = q.shape[-2], k.shape[-2]
    if callable(dropout): return (dropout(attention_weights(q, k, scale, mask)) @ v).to(q.dtype)
    if mask is None:
        if T not in (1, S):
            raise ValueError(f"several queries ({T}) after a prefix of keys ({S}) need a mask")
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1,
                                              scale=scale)
    # a processor that multiplies bfloat16 is faster with three plain operations
    if q.device.type == 'cpu' and q.dtype == mask.dtype == torch.bfloat16 and not dropout:
        return ((q*scale) @ k.mT + mask).softmax(-1) @ v
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return out if mask.is_floating_point() else out.masked_fill(~mask.any(-1, keepdim=True), 0.)

def causal_alibi_attention(
    q:Tensor, # (B, H, T, D)
    k:Tensor, # (B, H, T, D)
    v:Tensor, # (B, H, T, D)
    positions:Tensor, # (B, T) int64
)->Tensor: # (B, H, T, D)
    """Compute causal attention with ALiBi, all in one.

    The model shares the appended numbers between its layers.
    """
    H, D = q.shape[1], q.shape[-1]
    q_front, k_front = alibi_dims(positions, H, D, q.dtype)
    wide = append_alibi(q, q_front), append_alibi(k, k_front), append_alibi(v)
    return causal_attention(*wide, D**-.5)[..., :D]

def alibi_weights(
    q:Tensor, # (B, H, T, D)
    k:Tensor, # (B, H, T, D)
    positions:Tensor, # (B, T) int64
    causal:bool=True, # False: the original network's mistake, for controls
)->Tensor: # (B, H, T, T) float64, rows sum to 1
    """Compute attention weights by the definition (ALiBi, arXiv:2108.12409, section 3).

    They are `softmax(q·k / sqrt(D) - slope |i - j|)`.
    """
    distance = (positions[:, :, None] - positions[:, None, :])[:, None].double()
    slopes = alibi_slopes(q.shape[1]).double()[:, None, None]
    scores = q.double() @ k.double().mT * q.shape[-1]**-.5 - slopes * distance.abs()
    if causal: scores = scores.masked_fill(distance < 0, -torch.inf)
    return scores.softmax(-1)


# enigma_lab.lm.grams

def recent_tokens(
    ids:Tensor, # (B, S) int64 above 0, or 0 where nothing is known
    place:Tensor, # (T,) int64, where in `ids` the new tokens are
    positions:Tensor, # (B, T) int64, where they are in their texts
    length:int, # N, tokens of the longest run
)->Tensor: # (B, T, N), the newest first; 0 where the text has not begun
    "List the last tokens at each place of a text."
    lag = torch.arange(length, device=ids.device)
    before = place[:, None] - lag
    return ids[:, before.clamp(min=0)] * ((before >= 0) & (positions[..., None] >= lag))

def mix(
    h:Tensor, # int64, below 2³²
)->Tensor: # int64, below 2³²; each bit depends on every bit of `h`
    "Mix the bits of numbers (lowbias32, github.com/skeeto/hash-prospector)."
    for shift, factor in ((16, 0x7feb352d), (15, 0x846ca68b)):
        h = (h ^ h >> shift)*factor & 0xffffffff
    return h ^ h >> 16

def gram_rows(
    recent:Tensor, # (B, T, N), from `recent_tokens`
    rows:int, # R, of each table
)->Tensor: # (B, T, N - 1) int64, a row for each length 2 … N, the tables one below the other
    "Hash runs of tokens."
    h, found = torch.zeros_like(recent[..., 0]), []
    for i in range(recent.shape[-1]):
        h = mix((h*1_000_003 + recent[..., i]) & 0xffffffff)
        if i: found.append(h % rows + (i - 1)*rows)
    return torch.stack(found, -1)

def note_tokens(
    cache, # keys and values of earlier tokens; `None`: there are none
    ids:Tensor, # (B, T) int64 above 0, or 0 where nothing is known
    layer:int, # L, that of the tokens, after those of attention
)->tuple[Tensor,Tensor]: # tokens so far (B, S), and places (T,) of the new ones among them
    "Note new tokens in a cache."
    new = torch.arange(ids.shape[1], device=ids.device)
    if cache is None: return ids, new
    if getattr(cache, 'layer_class_to_replicate', ...) is None: # a list of layers, too short
        while len(cache.layers) <= layer:
            first = cache.layers[0]
            cache.layers.append(StaticLayer(first.max_cache_len) if isinstance(first, StaticLayer)
                                else DynamicLayer())
    place, ids = new + cache.get_seq_length(layer), ids[:, None, :, None]
    return cache.update(ids, ids, layer)[0][:, 0, :, 0], place

class Grams(nn.Embedding):
    "Embed runs of tokens; zeros at the start (hashed n-grams, arXiv:0902.2206, arXiv:1607.04606)."
    def __init__(self,
        dim:int, # d, features of a token
        rows:int, # R, of the table for each length of runs
        length:int, # N, tokens of the longest run
    ):
        self.rows, self.length = rows, length
        super().__init__((length - 1)*rows, dim)

    def reset_parameters(self):
        "Set all rows to zero."
        init.zeros_(self.weight)

    def forward(self,
        ids:Tensor, # (B, S) int64 above 0, or 0 where nothing is known
        place:Tensor, # (T,) int64, where in `ids` the new tokens are
        positions:Tensor, # (B, T) int64, where they are in their texts
    )->Tensor: # (B, T, d)
        "Add up the rows of the runs that end at each new token."
        rows = gram_rows(recent_tokens(ids, place, positions, self.length), self.rows)
        return super().forward(rows).sum(-2)


# enigma_lab.lm.copies

def run_hashes(
    ids:Tensor, # (B, S) int64
    lengths:tuple, # n, rising
)->list: # for each n a hash (B, S) int64 below 2³² of the n tokens that end at each place
    "Hash runs of several lengths."
    h, found = torch.zeros_like(ids), []
    for lag in range(max(lengths)):
        shifted = torch.nn.functional.pad(ids, (lag, 0))[:, :ids.shape[1]]
        h = mix((h*1_000_003 + shifted) & 0xffffffff)
        if lag + 1 in lengths: found.append(h)
    return found

PLACES = 30 # bits for a place in a text, beside the 32 of a hash: a billion tokens

def last_time(
    hashes:Tensor, # (B, S) int64 below 2³²
)->Tensor: # (B, S) int64, the place before with the same hash; -1 where there is none
    "Find the last occurrence of each hash before it."
    place = torch.arange(hashes.shape[1], device=hashes.device)
    ordered = (hashes << PLACES | place).sort().values
    place, hashes = ordered & (1 << PLACES) - 1, ordered >> PLACES
    neighbour = lambda t: torch.nn.functional.pad(t, (1, 0), value=-1)[:, :t.shape[1]]
    before = torch.where(hashes == neighbour(hashes), neighbour(place), -1)
    return torch.zeros_like(place).scatter(1, place, before)

def copied_tokens(
    ids:Tensor, # (B, S) int64 above 0, or 0 where nothing is known
    place:Tensor, # (T,) int64, where in `ids` the new tokens are
    positions:Tensor, # (B, T) int64, where they are in their texts
    lengths:tuple, # n, rising
)->Tensor: # (B, T, number of lengths) int64: what followed the last time, 0 where nothing did
    "Look up what followed the same runs the last time in the same text."
    found = []
    for n, hashes in zip(lengths, run_hashes(ids, lengths)):
        last = last_time(hashes)[:, place]
        within = (positions >= n - 1) & (last - n + 1 >= place - positions)
        found.append(ids.gather(1, (last + 1).clamp(max=ids.shape[1] - 1)) * within)
    return torch.stack(found, -1)

LENGTHS = 3, 5, 8, 13, 21 # n, of which the first few are looked up

class Copies(nn.Embedding):
    "Embed what followed the last time; zeros at the start (n-gram heads, arXiv:2401.12973)."
    def __init__(self,
        dim:int, # d, features of a token
        tokens:int, # V, rows of the vocabulary
        count:int, # how many of `LENGTHS`
    ):
        self.tokens, self.lengths = tokens, LENGTHS[:count]
        super().__init__(count*(tokens + 1), dim)

    def reset_parameters(self):
        "Set all rows to zero."
        init.zeros_(self.weight)

    def forward(self,
        ids:Tensor, # (B, S) int64, tokens + 1, or 0 where nothing is known
        place:Tensor, # (T,) int64, where in `ids` the new tokens are
        positions:Tensor, # (B, T) int64, where they are in their texts
    )->Tensor: # (B, T, d)
        "Add up the rows of what the new tokens' runs were followed by."
        found = copied_tokens(ids, place, positions, self.lengths)
        table = torch.arange(len(self.lengths), device=ids.device) * (self.tokens + 1)
        return super().forward(found + table).sum(-2)


# enigma_lab.lm.one_file

def read_module(
    name:str, # with dots
)->tuple[str,ast.Module]: # text and syntax tree
    "Read a module without importing it."
    text = Path(find_spec(name).origin).read_text(encoding='utf-8')
    return text, ast.parse(text)

def modules_before(
    name:str, # of a module of this library
    found:tuple=(), # modules that are listed already
)->tuple: # names, each after those that it imports from, `name` at the end
    "List what a module is made of."
    if name in found: return found
    for node in read_module(name)[1].body:
        if isinstance(node, ast.ImportFrom) and node.level:
            imported = resolve_name('.'*node.level + node.module, name.rpartition('.')[0])
            found = modules_before(imported, found)
    return *found, name

def is_left_out(
    node:ast.stmt, # at the top of a module
    first:bool, # of its statements
)->bool: # True: it has no place in a file of several modules
    "Tell whether a statement is a title, an import or a list of names."
    if isinstance(node, (ast.Import, ast.ImportFrom)): return True
    if isinstance(node, ast.Assign): return ast.unparse(node.targets[0]) in ('__all__', '_all_')
    return first and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)

def names_of(
    node:ast.stmt, # at the top of a module
)->list: # of functions, classes and values
    "List the names that a statement gives."
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)): return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)
            and isinstance(n.ctx, ast.Store)]

def body_of(
    name:str, # of a module
    owners:dict, # name -> the module that gives it; gets those of this one
)->tuple[str,list]: # text without what is left out; lines that import from other libraries
    "Take from a module what it adds. Raise a ValueError for a name that is taken."
    text, tree = read_module(name)
    lines, imports = text.splitlines(), []
    for i, node in enumerate(tree.body):
        for given in names_of(node):
            if owners.setdefault(given, name) != name and not is_left_out(node, False):
                raise ValueError(f"in one file each name has one meaning, got {given!r} of {name} "
                                 f"and of {owners[given]}; rename one of them")
        if not is_left_out(node, i == 0): continue
        if not getattr(node, 'level', 0) and isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.append(ast.unparse(node))
        for n in range(node.lineno - 1, node.end_lineno): lines[n] = None
    kept = [line for line in lines if line is not None and not line.startswith('# %%')
            and not line.startswith('# AUTOGENERATED')]
    return '\n'.join(kept).strip('\n'), imports

HEAD = '''"""The Enigma language model, put together from the modules of enigma_lab {version}.

MIT License. transformers imports this file with trust_remote_code=True, where the library is
not installed: pip install enigma_lab makes it unnecessary.
"""
'''

@cache
def one_file(
    name:str='enigma_lab.lm.model', # of a module of this library
)->str: # Python
    "Put a module and all that it is made of into one file."
    owners, bodies, imports = {}, [], {}
    for module in modules_before(name):
        body, lines = body_of(module, owners)
        imports.update(dict.fromkeys(lines))
        bodies.append(f'# {module}\n\n{body}')
    head = HEAD.format(version=import_module('enigma_lab').__version__)
    return '\n\n\n'.join([head + '\n' + '\n'.join(sorted(imports)), *bodies]) + '\n'

CODE = 'modeling_enigma' # the file, without its ending
CLASSES = { # what extends another comes before it
    'enigma_lab.lm.hybrid': dict(AutoConfig='HybridConfig',
                                 AutoModelForCausalLM='HybridForCausalLM'),
    'enigma_lab.lm.model': dict(AutoConfig='EnigmaConfig', AutoModel='EnigmaModel',
                                AutoModelForCausalLM='EnigmaForCausalLM')}

def classes_of(
    kind:type, # a model's class, or one that extends it
)->tuple[str,dict]: # the module that holds it; transformers' names for its classes
    "Look up which of our models a class is."
    configs = [config.__name__ for config in kind.config_class.__mro__]
    return next((home, names) for home, names in CLASSES.items() if names['AutoConfig'] in configs)

def write_code(
    folder, # a path; made if it is not there
    kind:type, # the model's class
)->dict: # for `auto_map` of the configuration: transformers' names, and where they lead
    "Write a model's code beside its weights."
    (home, names), folder = classes_of(kind), Path(folder)
    copied = [k.__module__ for k in kind.__mro__ if k.__module__.startswith('transformers_modules')]
    text = read_module(copied[0])[0] if copied else one_file(home)
    folder.mkdir(parents=True, exist_ok=True)
    (folder/f'{CODE}.py').write_text(text, encoding='utf-8')
    return {auto: f'{CODE}.{name}' for auto, name in names.items()}


# enigma_lab.machine.dropout

def hash32(
    x:Tensor, # int64, of which the lowest 32 bits count
)->Tensor: # int64 in [0, 2³²)
    "Hash 32-bit numbers one to one (`lowbias32`, nullprogram.com/blog/2018/07/31)."
    x = x & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)

def keep_mask(
    shape, # of the tensor
    p:float, # probability of a zero
    key:Tensor, # int64, a scalar
    layer:int=0, # a number for each place that drops
)->Tensor: # bool
    "Decide where dropout keeps, as a pure function."
    index = torch.arange(shape.numel(), device=key.device).view(shape)
    return hash32(hash32(index ^ key) + 0x9E3779B9*layer) >= int(p * 2**32)

def new_key(
    device=None, # where the model is
)->Tensor: # int64, a scalar
    "Draw a key from torch's generator, one for each forward pass."
    return torch.randint(2**32, (), device=device)

class CounterDropout(nn.Module):
    "Drop numbers by a mask that is a hash of key, layer and place (Salmon et al., SC 2011)."
    def __init__(self,
        p:float=.1, # probability of a zero, in [0, 1)
        layer:int=0, # a number for each place that drops
    ):
        super().__init__()
        if not 0 <= p < 1: raise ValueError(f"p must be in [0, 1), got {p}")
        self.p, self.layer = p, layer

    def forward(self,
        x, # any shape
        key, # int64, a scalar; not read in eval mode
    ): # the shape of `x`
        if not self.training or not self.p: return x
        return x * keep_mask(x.shape, self.p, key, self.layer) * (1/(1 - self.p))

    def extra_repr(self): # 'p=0.1, layer=0'
        "Describe the layer for `print`."
        return f'p={self.p}, layer={self.layer}'


# enigma_lab.machine.bijection

def as_call(
    method, # of a class, with arguments (x, positions)
    name:str, # of the method
): # the same, which goes through the module's call
    "Let a method run as a call of its module does: within the hooks that others put around it."
    @wraps(method)
    def called(self, x, positions=None):
        kind = type(self) # whose own method it is, not one that it builds on
        whole = getattr(kind, name) is called and kind.forward is Called.forward
        return self(x, positions, method) if whole else method(self, x, positions)
    called.itself = method
    return called

class Called(nn.Module):
    "Run what a module can do, forwards and backwards, as calls of it."
    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name in ('forward_and_log_det', 'inverse_and_log_det'):
            method = getattr(cls, name)
            if not (hasattr(method, 'itself') or getattr(method, '__isabstractmethod__', False)):
                setattr(cls, name, as_call(method, name))

    def forward(self,
        x:Tensor, # (..., dim)
        positions:Tensor|None=None, # int64, broadcastable to `x.shape[:-1]`; `None`: all zero
        method:Callable|None=None, # of the class, to be run in this call; `None`: as follows
    )->Tensor: # y, (..., dim)
        "Map `x` at `positions`."
        if method is not None: return method(self, x, positions)
        return type(self).forward_and_log_det.itself(self, x, positions)[0]

class Bijection(Called, ABC):
    "Map vectors invertibly, stepped by position (the protocol of Distrax)."
    @abstractmethod
    def forward_and_log_det(self,
        x:Tensor, # (..., dim)
        positions:Tensor|None=None, # int64, broadcastable to `x.shape[:-1]`; `None`: all zero
    )->tuple[Tensor,Tensor]: # y (..., dim); log|det dy/dx| (...), nats
        "Map `x` at `positions`, and measure how the map changes volume there."

    @abstractmethod
    def inverse_and_log_det(self,
        y:Tensor, # (..., dim)
        positions:Tensor|None=None, # int64, broadcastable to `y.shape[:-1]`; `None`: all zero
    )->tuple[Tensor,Tensor]: # x (..., dim); log|det dx/dy| (...), nats
        "Undo `forward_and_log_det` at the same `positions`."

    def inverse(self,
        y:Tensor, # (..., dim)
        positions:Tensor|None=None, # int64, broadcastable to `y.shape[:-1]`; `None`: all zero
    )->Tensor: # x, (..., dim)
        "Undo `forward` at the same `positions`."
        return self.inverse_and_log_det(y, positions)[0]

def check_width(
    x:Tensor, # (..., dim)
    dim:int, # channels that `x` must have
):
    "Raise a ValueError unless the last axis of `x` has `dim` channels."
    if x.ndim == 0 or x.shape[-1] != dim:
        raise ValueError(f"the last axis must have dim={dim} channels, got shape {tuple(x.shape)}")

def check_even(
    dim:int, # channels
    why:str, # what the even number is needed for, such as 'to swap its halves'
):
    "Raise a ValueError unless `dim` is a positive even number."
    if dim < 2 or dim % 2: raise ValueError(f"dim must be even and at least 2 {why}, got {dim}")

def as_positions(
    positions:Tensor|None, # int64, broadcastable to `x.shape[:-1]`; `None`: all zero
    x:Tensor, # (..., dim)
)->Tensor: # int64, `x.shape[:-1]`
    "Expand positions to every vector of `x`; refuse what is no integer or does not fit."
    if positions is None: return torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
    if positions.is_floating_point() or positions.dtype == torch.bool:
        raise ValueError(f"positions must be integers, got {positions.dtype}")
    try: return positions.to(torch.int64).expand(x.shape[:-1])
    except RuntimeError:
        raise ValueError(f"positions must broadcast to {tuple(x.shape[:-1])}, "
                         f"got shape {tuple(positions.shape)}") from None

class CompositeBijection(Bijection):
    "Compose a bijection of others, each passed forwards or backwards."
    @abstractmethod
    def route(self)->list: # [(bijection, True if passed forwards)], in the order of the signal
        "List the parts on the signal's way."

    def forward_and_log_det(self, x, positions=None):
        return apply_in_order(self.route(), x, positions)

    def inverse_and_log_det(self, y, positions=None):
        return apply_in_order(
            [(part, not ahead) for part, ahead in reversed(self.route())], y, positions)

def apply_in_order(
    route:list, # [(bijection, True if passed forwards)]
    x:Tensor, # (..., dim)
    positions:Tensor|None=None, # int64, broadcastable to `x.shape[:-1]`; `None`: all zero
)->tuple[Tensor,Tensor]: # where `x` arrives (..., dim); the sum of the log-determinants (...), nats
    "Send `x` along `route` and add up the log-determinants (arXiv:1505.05770, eq. 7)."
    log_det = x.new_zeros(x.shape[:-1])
    for part, ahead in route:
        x, ld = (part.forward_and_log_det if ahead else part.inverse_and_log_det)(x, positions)
        log_det = log_det + ld
    return x, log_det

class Chain(CompositeBijection):
    "Apply bijections one after the other: `Chain(f, g)(x) = g(f(x))`."
    def __init__(self,
        *parts, # bijections, in the order of the signal
    ):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def route(self): # [(part, True)], in the order of the signal
        "List the parts, each passed forwards."
        return [(part, True) for part in self.parts]

class Inverse(CompositeBijection):
    "Exchange the two directions of a bijection."
    def __init__(self,
        part:Bijection, # to be passed backwards
    ):
        super().__init__()
        self.part = part

    def route(self): # [(part, False)]
        "List the one part, passed backwards."
        return [(self.part, False)]

def jacobian_log_det(
    f, # bijection, or any function `(x, positions) -> y`
    x:Tensor, # (dim,)
    positions:Tensor|None=None, # int64, a scalar
)->Tensor: # log|det dy/dx|, a scalar, nats
    "Compute log|det| of the whole Jacobian by automatic differentiation: the slow oracle of tests."
    return torch.autograd.functional.jacobian(lambda v: f(v, positions), x).slogdet()[1]


# enigma_lab.machine.internals

def in_transform()->bool: # True: within `torch.func.grad`, `vmap` and the like
    "Tell whether a functional transform is at work."
    return torch._C._are_functorch_transforms_active()

def is_traced()->bool: # True: within a compiler or a functional transform
    "Tell whether tensors may stand for others."
    return torch.compiler.is_compiling() or in_transform()

def plain_value(
    t:Tensor, # perhaps a wrapper of a functional transform
)->Tensor: # without wrappers; with the axis over which `vmap` runs, if there is one
    "Take a tensor out of the wrappers of functional transforms."
    while _functorch.is_functorch_wrapped_tensor(t): t = _functorch.get_unwrapped(t)
    return t

def has_values(
    t:Tensor, # any
)->bool: # False: on the meta device, or a fake tensor
    "Tell whether a tensor's values can be looked at."
    return not t.is_meta and not isinstance(t, FakeTensor)

def ensure(
    ok:Tensor, # boolean
    message:str, # of the error
    error:type=RuntimeError, # its type; of compiled code always a RuntimeError
):
    "Raise an error unless all of `ok` is True, also from compiled code; never wait for a GPU."
    if not has_values(ok): return
    if torch.compiler.is_compiling() or not in_transform() and ok.device.type != 'cpu':
        torch._assert_async(ok.all(), message)
    elif not plain_value(ok).all():
        refusal = error(message)
        raise refusal

def version(
    t:Tensor, # any
)->int: # 0 for a tensor of inference mode, which has none
    "Count the in-place operations on a tensor."
    return 0 if t.is_inference() else t._version

def node_number(
    t:Tensor|None=None, # made just now; `None`, or one without a graph: a new one is made
)->int: # nodes made from now on in this thread have this number or a higher one
    "Return the number of the newest node."
    if t is None or t.grad_fn is None:
        with torch.enable_grad(): t = torch.empty(0, requires_grad=True).view(0)
    return t.grad_fn._sequence_nr()

_Leaf = type(torch.autograd.graph.get_gradient_edge(torch.empty(0, requires_grad=True)).node)

def entrances(
    out:Tensor, # result of a run
    since:int, # number of the first node of the run
    known=(), # nodes at which the walk ends
)->tuple[list[Tensor],bool]: # leaves that require a gradient; True: an older graph is read, too
    "List what the graph of a run reads beside the nodes that are known."
    todo, seen, leaves, older = [out.grad_fn], {None, *known}, [], False
    for node in todo:
        if node in seen: continue
        seen.add(node)
        if node.__class__ is _Leaf: leaves.append(node.variable)
        elif node._sequence_nr() < since: older = True
        else: todo += [edge for edge, _ in node.next_functions]
    return leaves, older

def has_tangents(
    tensors, # a function that lists them
)->bool: # True: one of them carries a tangent of forward mode
    "Tell whether forward mode passes through any of some tensors."
    mode = torch.autograd.forward_ad
    if mode._current_level < 0: return False
    # a transform within forward mode hides the tangents
    return in_transform() or any(mode.unpack_dual(t).tangent is not None for t in tensors())

def is_sharded(
    module:nn.Module, # any
)->bool: # True: `fully_shard` has it in its care
    "Tell whether a module gathers its own parameters."
    fsdp = sys.modules.get('torch.distributed.fsdp') # never loaded for this question
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)

def any_sharded(
    modules, # any number
)->bool: # True: `fully_shard` has one of them in its care
    "Tell whether one of several modules gathers its own parameters."
    return 'torch.distributed.fsdp' in sys.modules and any(map(is_sharded, modules))


# enigma_lab.machine.grid

GRID = 2**-12 # the step, when nothing else is said

def snapped(
    x:Tensor, # any shape, floating point
    grid:float=GRID, # a power of two
)->Tensor: # float32, or float64 where `x` is
    "Round to the nearest points of the grid, without gradient."
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide / grid).round_().mul_(grid)

class StraightThrough(torch.autograd.Function):
    "Apply `snapped` with a gradient that passes straight through."
    generate_vmap_rule = True
    @staticmethod
    def forward(x, grid): return snapped(x, grid)
    @staticmethod
    def setup_context(
        ctx, # of autograd
        inputs, # `x` and `grid`
        output, # the points
    ):
        "Keep the type of the input."
        ctx.dtype = inputs[0].dtype
    @staticmethod
    def backward(
        ctx, # of autograd
        g, # gradient of the points
    ): # gradient of `x` in the type of `x`; `None` for `grid`
        "Pass the gradient on."
        return g.to(ctx.dtype), None

class StraightTangent(StraightThrough):
    "Let tangents of forward mode pass, too; compilers know no function that does."
    @staticmethod
    def jvp(
        ctx, # of autograd
        t, # tangent of `x`
        grid, # `None`
    ): # tangent of the points
        "Pass the tangent on."
        return t.clone()

def snap(
    x:Tensor, # any shape, floating point
    grid:float=GRID, # a power of two
)->Tensor: # float32, or float64 where `x` is
    "Round to the nearest points of the grid, with a straight-through gradient (arXiv:1308.3432)."
    way = StraightTangent if has_tangents(lambda: [x]) else StraightThrough
    return way.apply(x, grid)

def grid_limit(
    grid:float=GRID, # the step
    dtype:torch.dtype=torch.float32, # of the streams
)->float: # sums below it are exact
    "Return the largest value up to which every multiple of the step is a number."
    return grid / torch.finfo(dtype).eps * 2

def check_grid(
    grid:float, # the step
):
    "Raise a ValueError unless the step is a power of two."
    if not grid > 0 or math.frexp(grid)[0] != .5:
        raise ValueError(f"grid must be a power of two such as 2**-12, got {grid}")

def check_range(
    peak:Tensor, # largest absolute value met, a scalar
    grid:float, # the step
    dtype:torch.dtype, # of the streams
):
    "Raise an OverflowError where sums were no longer exact, or no numbers."
    limit = grid_limit(grid, dtype)
    shown = has_values(peak) and not is_traced() and peak.device.type == 'cpu'
    ensure(peak <= limit, f"exact streams must stay within ±{limit:g} (grid={grid:g} in "
           f"{str(dtype)[6:]}){f', got {peak:g}' if shown else ''}: use a coarser grid, float64, "
           "or a smaller F", OverflowError)


# enigma_lab.machine.reflector

def swap_halves(
    x:Tensor, # (..., dim), dim even
)->Tensor: # (..., dim)
    "Exchange the first and the second half of the channels: an involution without fixed points."
    return x.roll(x.shape[-1]//2, -1)

class SwapHalves(Bijection):
    "Exchange channel i and channel i + dim/2: the reflector without parameters."
    def __init__(self,
        dim:int, # channels, even
    ):
        super().__init__()
        check_even(dim, 'to swap its halves')
        self.dim = dim

    def forward_and_log_det(self, x, positions=None):
        check_width(x, self.dim)
        return swap_halves(x), x.new_zeros(x.shape[:-1])

    inverse_and_log_det = forward_and_log_det

@torch.no_grad()
def draw_normal(
    seed:int, # the same numbers for the same seed, on any device
    *pairs, # (tensor, standard deviation)
):
    "Fill tensors with normal numbers."
    g = torch.Generator().manual_seed(seed)
    for t, deviation in pairs:
        t.copy_(torch.randn(t.shape, generator=g, device='cpu') * deviation)

class Reflector(SwapHalves):
    """Reflect vectors by `U = H S H`, a learned symmetric involution with trace 0.

    H is the reflection of A. S. Householder (1958).
    """
    def __init__(self,
        dim:int, # channels, even
        seed:int=0, # of the first `v`
    ):
        super().__init__(dim)
        self.seed, self.v = seed, nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self):
        "Draw `v` as it was at the start."
        draw_normal(self.seed, (self.v, 1.))

    def mirror(self,
        x:Tensor, # (..., dim)
    )->Tensor: # H x, (..., dim)
        "Mirror vectors at the plane orthogonal to `v`."
        v = self.v.to(x.dtype)
        return x - 2 * (x @ v)[..., None] * v / (v @ v)

    def forward_and_log_det(self, x, positions=None):
        check_width(x, self.dim)
        return self.mirror(swap_halves(self.mirror(x))), x.new_zeros(x.shape[:-1])

    inverse_and_log_det = forward_and_log_det


# enigma_lab.machine.rotor

def signed_permutation(
    dim:int, # channels
    seed:int, # which permutation
)->tuple[Tensor,Tensor]: # permutation (dim,) int64; signs (dim,), ±1
    "Draw a random wiring with signs, from a generator of its own."
    g = torch.Generator().manual_seed(seed)
    permutation = torch.randperm(dim, generator=g, device='cpu')
    return permutation, torch.randint(2, (dim,), generator=g, device='cpu') * 2. - 1

class Wired(nn.Module):
    "Hold what all matrices share: a fixed permutation with signs, saved with the parameters."
    def __init__(self,
        dim:int, # channels
        seed:int, # which permutation and signs
    ):
        super().__init__()
        self.seed = seed
        self.register_buffer('permutation', torch.empty(dim, dtype=torch.int64))
        self.register_buffer('sign', torch.empty(dim))
        Wired.reset_parameters(self)

    def forward(self,
        read:Callable, # (this module) -> anything: what is done with the matrices
    ): # what `read` returns
        "Let a function read the matrices, within the hooks of this module."
        return read(self)

    @torch.no_grad()
    def reset_parameters(self):
        "Begin again with the wiring alone: what is learned is zero."
        for t, drawn in zip((self.permutation, self.sign),
                            signed_permutation(len(self.sign), self.seed)): t.copy_(drawn)
        for p in self.parameters(recurse=False): p.zero_()

def at_least_float32(
    x:Tensor, # any shape, floating point
)->Tensor: # `x`, or `x` as float32 where its type is shorter
    "Widen half-precision numbers: triangular solves need the digits."
    return x if x.dtype in (torch.float32, torch.float64) else x.float()

def as_nats(
    log_det:Tensor, # float64, of any shape
    x:Tensor, # the vectors that it belongs to, floating point
)->Tensor: # in the type of `x`, or in float32 where that is shorter
    "Give a log-determinant, summed in float64, the type of the vectors."
    return log_det.to(torch.promote_types(x.dtype, torch.float32))

class PackedFactors(Wired):
    "Hold L, U and the log-scales s of each matrix in one packed parameter."
    def __init__(self,
        dim:int, # channels
        count:int=1, # matrices
        seed:int=0, # of the fixed permutation and signs, which all `count` share
    ):
        super().__init__(dim, seed)
        self.packed = nn.Parameter(torch.zeros(count, dim, dim))

    def log_scales(self,
        packed:Tensor, # (..., dim, dim)
    )->Tensor: # s (..., dim), between -1 and 1
        "Read the bounded log-scales from the diagonal."
        return packed.diagonal(dim1=-2, dim2=-1).tanh()

    def entries(self,
        k:int, # which matrix, 0 … count-1
    )->tuple[Tensor,Tensor]: # L and U in one (dim, dim); U's diagonal (dim,); in float32 or better
        "Read a matrix's factors, still packed."
        packed = at_least_float32(self.packed[k])
        return packed, self.sign.to(packed.dtype) * self.log_scales(packed).exp()

    def factors(self,
        k:int, # which matrix, 0 … count-1
    )->tuple[Tensor,Tensor]: # L, U (dim, dim), in float32 or better
        "Unpack the two factors of a matrix."
        packed, diagonal = self.entries(k)
        L = packed.tril(-1) + torch.ones_like(diagonal).diag()
        return L, packed.triu(1) + diagonal.diag()

class PLU(PackedFactors):
    "Multiply and solve by `W = P L (U + diag(sign e^s))` (Glow, arXiv:1807.03039, eq. 10)."
    def matmul(self,
        x:Tensor, # (..., dim)
        k:int, # which matrix, 0 … count-1
    )->Tensor: # W x, (..., dim)
        "Multiply vectors by a matrix, factor by factor."
        packed, diagonal = (t.to(x.dtype) for t in self.entries(k))
        z = x*diagonal + x @ packed.triu(1).T
        return (z + z @ packed.tril(-1).T)[..., self.permutation]

    def solve(self,
        y:Tensor, # (..., dim)
        k:int, # which matrix, 0 … count-1
    )->Tensor: # W⁻¹ y, (..., dim)
        "Undo `matmul` by two triangular solves, each of which reads its half of the matrix."
        packed, diagonal = self.entries(k)
        z = at_least_float32(y)[..., self.permutation.argsort()]
        z = z.reshape(-1, y.shape[-1]).to(packed.dtype)
        z = torch.linalg.solve_triangular(
            packed.T, z, upper=True, left=False, unitriangular=True)
        upper = packed.diagonal_scatter(diagonal)
        x = torch.linalg.solve_triangular(upper.T, z, upper=False, left=False)
        return x.view(y.shape).to(y.dtype)

    def log_dets(self)->Tensor: # log|det W| (count,), nats, summed in float64
        "Sum the log-scales of every matrix."
        return self.log_scales(self.packed.double()).sum(-1)

def lower_triangle(
    entries:Tensor, # (dim*(dim-1)/2,), row by row
    dim:int, # rows and columns
)->Tensor: # (dim, dim), strictly lower triangular
    "Unpack a triangle into a matrix."
    i, j = torch.tril_indices(dim, dim, -1, device=entries.device)
    return entries.new_zeros(dim, dim).index_put((i, j), entries)

def cayley(
    entries:Tensor, # (dim*(dim-1)/2,), what A has below its diagonal
    dim:int, # channels
)->Tensor: # Q (dim, dim)
    "Compute the rotation `(I + A)⁻¹ (I - A)` of a skew matrix A (A. Cayley, 1846)."
    A = lower_triangle(entries, dim)
    A, eye = A - A.T, torch.eye(dim, dtype=A.dtype, device=A.device)
    return torch.linalg.solve(eye + A, eye - A)

def unchanged(
    old:Tensor|None, # a copy made earlier; `None`: there is none
    new:Tensor, # what it is compared with
)->bool:
    "Tell whether a tensor is what it was: its device, its type, its values."
    return (old is not None and old.device == new.device and old.dtype == new.dtype
            and torch.equal(old, new))

def remember(
    found:dict, # what is remembered: key -> (a copy of the source, a value)
    key, # of this value
    source:Tensor, # what the value is computed from
    compute:Callable, # gives the value
): # the value
    "Compute a value again only where its source has changed."
    old, value = found.get(key, (None, None))
    if not unchanged(old, source):
        value = compute()
        found[key] = source.clone(), value
    return value

class Rotations(Wired):
    "Hold rotations, each given by what a skew matrix has below its diagonal."
    def __init__(self,
        dim:int, # channels
        count:int=1, # matrices
        seed:int=0, # of the fixed permutation and signs, which all `count` share
    ):
        super().__init__(dim, seed)
        self.skew = nn.Parameter(torch.zeros(count, dim*(dim-1)//2))
        self.solved = {}  # what `rotation` remembers

    def rotation(self,
        k:int, # which matrix, 0 … count-1
        dtype:torch.dtype, # of the result
    )->Tensor: # Q (dim, dim)
        "Return a rotation; without gradients solve again only where the parameter has changed."
        solve = lambda: self.solve_rotation(k).to(dtype)
        if torch.is_grad_enabled() or torch.compiler.is_compiling(): return solve()
        return remember(self.solved, (k, dtype), self.skew[k], solve)

    def solve_rotation(self,
        k:int, # which matrix, 0 … count-1
    )->Tensor: # Q (dim, dim) float64
        "Solve for a rotation in float64, so that Qᵀ inverts it as well as any input shows."
        return cayley(self.skew[k].double(), len(self.sign))

class Orthogonal(Rotations):
    "Multiply and solve by orthogonal matrices `P diag(sign) Q`, Q a rotation."
    def matmul(self,
        x:Tensor, # (..., dim)
        k:int, # which matrix, 0 … count-1
    )->Tensor: # W x, (..., dim)
        "Multiply vectors by a matrix."
        signed = x @ self.rotation(k, x.dtype).T * self.sign.to(x.dtype)
        return signed[..., self.permutation]

    def solve(self,
        y:Tensor, # (..., dim)
        k:int, # which matrix, 0 … count-1
    )->Tensor: # W⁻¹ y = Wᵀ y, (..., dim)
        "Undo `matmul` by the transpose."
        signed = y[..., self.permutation.argsort()] * self.sign.to(y.dtype)
        return signed @ self.rotation(k, y.dtype)

    def log_dets(self)->Tensor: # 0 (count,)
        "Return the log-determinants, which are zero."
        return self.skew.new_zeros(len(self.skew), dtype=torch.float64)

parametrizations = {'plu': PLU, 'orthogonal': Orthogonal}

def make_parametrization(
    parametrization:str, # a name in `parametrizations`
    dim:int, # channels
    count:int, # matrices
    seed:int, # of the fixed permutation and signs
)->nn.Module: # with `matmul`, `solve` and `log_dets`
    "Make the named parametrization; raise a ValueError for a name that is none."
    if parametrization not in parametrizations:
        raise ValueError(f"parametrization must be one of {sorted(parametrizations)}, "
                         f"got {parametrization!r}")
    return parametrizations[parametrization](dim, count, seed)

def log_det_of(
    wiring, # a parametrization
    x:Tensor, # (..., dim)
)->Tensor: # (...), nats
    "Return log|det W| of the first matrix for every vector."
    return as_nats(wiring.log_dets()[0], x).expand(x.shape[:-1])

class InvertibleConv1x1(Bijection):
    "Apply one learned invertible matrix to the channels (Glow, arXiv:1807.03039, section 3.2)."
    def __init__(self,
        dim:int, # channels
        parametrization:str='plu', # 'plu': any volume; 'orthogonal': volume kept
        seed:int=0, # of the fixed permutation and signs
    ):
        super().__init__()
        self.dim, self.wiring = dim, make_parametrization(parametrization, dim, 1, seed)

    def forward_and_log_det(self, x, positions=None):
        check_width(x, self.dim)
        return self.wiring(lambda w: (w.matmul(x, 0), log_det_of(w, x)))

    def inverse_and_log_det(self, y, positions=None):
        check_width(y, self.dim)
        return self.wiring(lambda w: (w.solve(y, 0), -log_det_of(w, y)))

    def log_det(self,
        x:Tensor, # (..., dim)
    )->Tensor: # (...), nats
        "Return log|det W| for every vector."
        return self.wiring(lambda w: log_det_of(w, x))

class InvertibleConv1x1Stack(Chain):
    "Apply rotors one after the other that never step."
    def __init__(self,
        dim:int, # channels
        num_layers:int, # rotors
        parametrization:str='plu', # 'plu' or 'orthogonal'
        seed:int=0, # rotor i draws its wiring from seed + i
    ):
        super().__init__(*(
            InvertibleConv1x1(dim, parametrization, seed+i) for i in range(num_layers)))

def odometer(
    positions:Tensor, # int64, of any shape
    place:int, # which rotor, 0 the fastest
    num_positions:int, # K
    key:int=0, # where the machine starts
)->Tensor: # 0 … K-1, the shape of `positions`
    "Compute the position of rotor `place`: a digit of `positions + key` in base K."
    return (positions + key) // num_positions**place % num_positions

def reached_positions(
    context:int, # tokens
    num_rotors:int, # n
    num_positions:int, # K
)->list: # positions that each rotor takes within the context
    "Count how far each rotor gets in a text: what it never reaches, it cannot learn."
    return [len(odometer(torch.arange(context), i, num_positions).unique())
            for i in range(num_rotors)]

def by_position(
    x:Tensor, # (..., dim)
    where:Tensor, # the rotor's position at each vector, `x.shape[:-1]`
    f, # (rows (n, dim), position) -> (n, dim)
    count:int, # positions there are
)->Tensor: # (..., dim)
    "Apply `f` to the vectors of each position together; traced, to all vectors at each position."
    if not x.numel(): return x
    if is_traced(): # who knows no values cannot group by them
        y = f(x, 0)
        for k in range(1, count): y = torch.where((where == k)[..., None], f(x, k), y)
        return y
    rows, where = x.reshape(-1, x.shape[-1]), where.reshape(-1)
    order = where.argsort(stable=True)
    present, counts = where[order].unique_consecutive(return_counts=True)
    groups = rows.index_select(0, order).split(counts.tolist())
    mapped = torch.cat([f(group, k) for group, k in zip(groups, present.tolist())])
    return mapped.index_select(0, order.argsort()).view(x.shape)

def roll(
    x:Tensor, # (..., dim)
    steps:Tensor, # contacts to turn each vector by, `x.shape[:-1]`
)->Tensor: # (..., dim)
    "Turn every vector by its own number of contacts: `(S^p x)_i = x_{(i+p) mod dim}`."
    dim = x.shape[-1]
    return x.gather(-1, (torch.arange(dim, device=x.device) + steps[..., None]) % dim)

class SteppingRotor(Bijection):
    "Step a rotor: its digit of the odometer chooses how it stands."
    def __init__(self,
        dim:int, # channels
        num_positions:int=16, # K
        place:int=0, # which digit, 0 the fastest
        key:int=0, # where the odometer starts
    ):
        super().__init__()
        if num_positions < 1:
            raise ValueError(f"num_positions must be at least 1, got {num_positions}")
        self.dim, self.num_positions, self.place, self.key = dim, num_positions, place, key

    def stands_at(self,
        positions:Tensor|None, # int64, broadcastable to `x.shape[:-1]`
        x:Tensor, # (..., dim)
    )->Tensor: # 0 … K-1, `x.shape[:-1]`
        "Find where the rotor stands for every vector of `x`."
        check_width(x, self.dim)
        return odometer(as_positions(positions, x), self.place, self.num_positions, self.key)

    def extra_repr(self): # '26, num_positions=16, place=0, key=0'
        "Describe the rotor for `print`."
        return (f"{self.dim}, num_positions={self.num_positions}, "
                f"place={self.place}, key={self.key}")

class LearnedRotor(SteppingRotor):
    "Give a stepping rotor the matrices that it learns."
    def __init__(self,
        dim:int, # channels
        num_positions:int=16, # K
        place:int=0, # which digit of the odometer, 0 the fastest
        key:int=0, # where the odometer starts
        parametrization:str='plu', # 'plu' or 'orthogonal'
        seed:int=0, # of the permutation and signs, which all positions share
    ):
        super().__init__(dim, num_positions, place, key)
        self.wiring = make_parametrization(parametrization, dim, self.matrices(), seed)

    @abstractmethod
    def matrices(self)->int: # 1 or K
        "Count the matrices to learn."

class TableRotor(LearnedRotor):
    "Apply a learned matrix for each position."
    def matrices(self): # K
        "Count one matrix for each position."
        return self.num_positions

    def forward_and_log_det(self, x, positions=None):
        p, K = self.stands_at(positions, x), self.num_positions
        return self.wiring(
            lambda w: (by_position(x, p, w.matmul, K), as_nats(w.log_dets(), x)[p]))

    def inverse_and_log_det(self, y, positions=None):
        p, K = self.stands_at(positions, y), self.num_positions
        return self.wiring(
            lambda w: (by_position(y, p, w.solve, K), -as_nats(w.log_dets(), y)[p]))

def check_contacts(
    dim:int, # contacts of the wheel
    num_positions:int, # K
):
    "Raise a ValueError where a wheel has more positions than contacts."
    if num_positions > dim:
        raise ValueError(f"a wheel of dim={dim} contacts has at most {dim} positions, "
                         f"got num_positions={num_positions}")

class RollRotor(LearnedRotor):
    "Turn one learned wiring by p contacts, `S^-p W S^p`: the true rotor."
    def matrices(self): # 1
        "Count one matrix, if it has enough contacts to turn."
        check_contacts(self.dim, self.num_positions)
        return 1

    def turned(self,
        x, # (..., dim)
        positions, # int64, broadcastable to `x.shape[:-1]`; `None`: all zero
        way, # 'matmul' or 'solve'
    ): # the mapped vectors (..., dim); log|det W| (...), nats
        "Pass vectors through the wiring as it stands at each position."
        p = self.stands_at(positions, x)
        y, log_det = self.wiring(
            lambda w: (getattr(w, way)(roll(x, p), 0), log_det_of(w, x)))
        return roll(y, -p), log_det

    def forward_and_log_det(self, x, positions=None): return self.turned(x, positions, 'matmul')

    def inverse_and_log_det(self, y, positions=None):
        x, log_det = self.turned(y, positions, 'solve')
        return x, -log_det

class PermutationRotor(SteppingRotor):
    "Turn a fixed permutation by p contacts, as the historical rotor does; exact to the last bit."
    def __init__(self,
        dim, # channels
        num_positions=None, # K; `None`: `dim`
        place=0, # which digit of the odometer, 0 the fastest
        key=0, # where the odometer starts
        seed:int=0, # which permutation
    ):
        super().__init__(dim, dim if num_positions is None else num_positions, place, key)
        check_contacts(dim, self.num_positions)
        self.seed, self.wiring = seed, nn.Buffer(torch.empty(dim, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self):
        "Wire the rotor as it was at the start."
        self.wiring.copy_(signed_permutation(len(self.wiring), self.seed)[0])

    def turned(self,
        x, # (..., dim)
        positions, # int64, broadcastable to `x.shape[:-1]`; `None`: all zero
        wiring, # (dim,) int64, a permutation
    ): # the permuted vectors (..., dim); zeros (...), their log-determinants
        "Apply a permutation as it stands at each position."
        p = self.stands_at(positions, x)
        return roll(roll(x, p)[..., wiring], -p), x.new_zeros(p.shape)

    def forward_and_log_det(self, x, positions=None): return self.turned(x, positions, self.wiring)
    def inverse_and_log_det(self, y, positions=None):
        return self.turned(y, positions, self.wiring.argsort())

class DynamicInvertibleConv1x1Stack(Chain):
    "Step learned rotors like an odometer: rotor i is digit i of the position."
    def __init__(self,
        dim:int, # channels
        num_layers:int, # rotors n
        num_positions:int=16, # K
        stepping:str='table', # 'table': K matrices a rotor; 'roll': one wiring, turned
        parametrization:str='plu', # 'plu' or 'orthogonal'
        key:int=0, # where the odometer starts
        seed:int=0, # rotor i draws its wiring from seed + i
    ):
        kinds = {'table': TableRotor, 'roll': RollRotor}
        if stepping not in kinds:
            raise ValueError(f"stepping must be 'table' or 'roll', got {stepping!r}")
        super().__init__(*(
            kinds[stepping](dim, num_positions, i, key,
                            parametrization=parametrization, seed=seed+i)
            for i in range(num_layers)))

def condition_numbers(
    module:nn.Module, # anything that holds rotors
)->list: # cond₂(W) of every learned matrix in it, in order
    "Compute the condition number of each rotor matrix: an inverse loses log10(cond) digits."
    found = []
    for part in module.modules():
        if isinstance(part, tuple(parametrizations.values())):
            eye = torch.eye(len(part.sign), device=part.sign.device)
            for k in range(len(next(part.parameters()))):
                W = part.matmul(eye, k).detach().double().T
                found.append(torch.linalg.cond(W).item())
    return found


# enigma_lab.machine.exact

WEIGHT = 2**-20 # the step of fixed-point weights
LEAF = 32 # channels of a block

def lift(
    x:Tensor, # (N, d) float64, on the grid
    L:Tensor, # (d, d) float64, strictly lower triangular, multiples of `WEIGHT`
)->Tensor: # (N, d)
    "Compute `x + snap(L x)`, a bijection of the grid (Calderbank et al., 1998)."
    return x + snap(x @ L.T)

class BlockwiseInverse(torch.autograd.Function):
    "Undo `lift` block by block."
    @staticmethod
    def forward(ctx, y, L):
        x, rest, d = y.clone(), torch.zeros_like(y), y.shape[1]
        for s in range(0, d, LEAF):
            e = min(s + LEAF, d)
            for i in range(s, e): x[:, i] -= snapped(rest[:, i] + x[:, s:i] @ L[i, s:i])
            rest[:, e:] += x[:, s:e] @ L[e:, s:e].T
        ctx.save_for_backward(x, L)
        return x

    @staticmethod
    def backward(
        ctx, # of autograd
        grad, # gradient of the result
    ): # gradients of `y` and of `L`
        "Differentiate the triangular solve, as if nothing were rounded."
        x, L = ctx.saved_tensors
        gy = torch.linalg.solve_triangular(
            L + torch.eye(len(L), dtype=L.dtype, device=L.device), grad,
            upper=False, left=False, unitriangular=True)
        return gy, -(gy.T @ x).tril(-1)

def unlift(
    y:Tensor, # (N, d) float64, on the grid
    L:Tensor, # (d, d) float64, strictly lower triangular, multiples of `WEIGHT`
)->Tensor: # (N, d)
    "Undo `lift`."
    return BlockwiseInverse.apply(y, L)

class LiftedFactors(Wired):
    "Hold the fixed-point entries of two triangular factors for each matrix."
    def __init__(self,
        dim:int, # channels
        count:int=1, # matrices
        seed:int=0, # of the fixed permutation and signs, which all `count` share
    ):
        super().__init__(dim, seed)
        self.packed = nn.Parameter(torch.zeros(count, 2, dim*(dim-1)//2))

    def factors(self,
        k:int, # which matrix, 0 … count-1
    )->tuple[Tensor,Tensor]: # strictly lower triangular (dim, dim), twice
        "Build the two factors from the packed parameter: U seen from behind, and L."
        packed = snap(self.packed[k].double(), WEIGHT)
        return tuple(lower_triangle(entries, len(self.sign)) for entries in packed)

class Lifted(LiftedFactors):
    """Multiply and solve by `P diag(sign) L U`, as a bijection of the grid.

    L and U are unit triangular: two lifts (Calderbank et al., 1998).
    """
    def matmul(self,
        x:Tensor, # (..., dim)
        k:int, # which matrix, 0 … count-1
    )->Tensor: # W x, (..., dim), on the grid
        "Multiply vectors by a matrix."
        U, L = self.factors(k)
        # the upper factor is a lower one, seen from behind
        y = lift(x.double().reshape(-1, x.shape[-1]).flip(-1), U).flip(-1)
        return (lift(y, L) * self.sign)[:, self.permutation].view(x.shape).to(x.dtype)

    def solve(self,
        y:Tensor, # (..., dim)
        k:int, # which matrix, 0 … count-1
    )->Tensor: # W⁻¹ y, (..., dim), on the grid
        "Undo `matmul`."
        U, L = self.factors(k)
        z = y.double().reshape(-1, y.shape[-1])[:, self.permutation.argsort()] * self.sign
        return unlift(unlift(z, L).flip(-1), U).flip(-1).view(y.shape).to(y.dtype)

    def log_dets(self)->Tensor: # 0 (count,)
        "Return the log-determinants, which are zero."
        return self.packed.new_zeros(len(self.packed), dtype=torch.float64)

parametrizations['lifted'] = Lifted

class ExactReflector(SwapHalves):
    "Reflect vectors by `U = K⁻¹ S K`, K a lifted shear: an involution to the last bit."
    def __init__(self,
        dim:int, # channels, even
        seed:int=0, # of the first shear
    ):
        super().__init__(dim)
        self.seed = seed
        self.a, self.b = (nn.Parameter(torch.empty(dim//2)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self):
        "Draw the shear as it was at the start."
        draw_normal(self.seed, (self.a, 1.), (self.b, len(self.b)**-.5))

    def shear(self,
        x, # (..., dim) float64, on the grid
        way, # 1 for K, -1 for K⁻¹
    ): # (..., dim)
        "Shift the second half by the first, as K or K⁻¹ does."
        x1, x2 = x.chunk(2, -1)
        a, b = snap(self.a.double(), WEIGHT), snap(self.b.double(), WEIGHT)
        return torch.cat([x1, x2 + way*snap((x1 * b).sum(-1, keepdim=True) * a)], -1)

    def forward_and_log_det(self, x, positions=None):
        check_width(x, self.dim)
        y = self.shear(swap_halves(self.shear(x.double(), 1)), -1)
        return y.to(x.dtype), x.new_zeros(x.shape[:-1])

    inverse_and_log_det = forward_and_log_det

def as_numbers(
    weight:Tensor, # of any kind
)->Tensor: # the same values
    "Return what a quantised tensor stands for; others as they are."
    return weight if type(weight).dequantize is Tensor.dequantize else weight.dequantize()

def fixed_linear(
    layer:nn.Linear, # weights and bias
    x:Tensor, # (..., inputs) float64
)->Tensor: # (..., outputs) float64
    "Apply a linear layer with fixed-point weights: no sum is rounded."
    W, b = (snap(as_numbers(t).double(), WEIGHT) for t in (layer.weight, layer.bias))
    return x @ W.T + b

class FixedLinear(nn.Linear):
    "Map linearly with fixed-point weights."
    def forward(self, input): return fixed_linear(self, input) # (..., features) float64

class SavedNumbers(nn.Module):
    "Hold single numbers with an axis, as sharding asks; load those that were saved without."
    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name, p in self.named_parameters(recurse=False):
            saved = state_dict.get(prefix + name)
            if p.shape == (1,) and isinstance(saved, Tensor) and saved.ndim == 0:
                state_dict[prefix + name] = saved[None]
        super()._load_from_state_dict(state_dict, prefix, *args)

class ExactMLP(SavedNumbers):
    """Compute `F(x) = size * softsign(W₂ leaky_relu(W₁ x))`.

    The result is the same to the last bit in any batch.
    """
    def __init__(self,
        dim:int, # channels in and out
        size:float=.1, # bound on each output at the start
    ):
        super().__init__()
        self.up, self.down = FixedLinear(dim, dim), FixedLinear(dim, dim)
        self.first, self.size = size, nn.Parameter(torch.tensor([size]))

    def reset_parameters(self):
        "Set the bound as at the start; the two layers do likewise."
        nn.init.constant_(self.size, self.first)

    def forward(self, x:Tensor)->Tensor: # (..., dim), float64
        h = self.up(x.double()).clamp(-64, 64)
        h = snap(torch.where(h > 0, h, h/8), WEIGHT)
        o = self.down(h)
        return self.size * (o / (1 + o.abs()))


# enigma_lab.machine.plugboard

def draw_swaps(
    dim:int, # channels
    num_swaps:int, # pairs exchanged, 0 … dim // 2
    seed:int, # which pairs
)->Tensor: # a permutation (dim,) int64, its own inverse
    "Draw which channels are exchanged, from a generator of their own."
    if not 0 <= num_swaps <= dim // 2:
        raise ValueError(f"num_swaps must be between 0 and dim // 2 = {dim // 2}, "
                         f"got {num_swaps}")
    order = torch.randperm(dim, generator=torch.Generator().manual_seed(seed), device='cpu')
    a, b = order[:2*num_swaps].view(2, num_swaps)
    wiring = torch.arange(dim, device='cpu')
    wiring[a], wiring[b] = b, a
    return wiring

class FixedPermutation(Bijection):
    "Permute the channels by a wiring that is not learned, and saved with the parameters."
    def __init__(self,
        wiring:Tensor, # (dim,) int64: `y[i] = x[wiring[i]]`
    ):
        super().__init__()
        self.drawn = wiring.tolist() # numbers, which no `to` and no `load_state_dict` reaches
        self.register_buffer('wiring', wiring)

    def reset_parameters(self):
        "Wire the permutation as it was at the start."
        self.wiring.copy_(torch.tensor(self.drawn))

    def forward_and_log_det(self, x, positions=None):
        check_width(x, len(self.wiring))
        return x[..., self.wiring], x.new_zeros(x.shape[:-1])

    def inverse_and_log_det(self, y, positions=None):
        check_width(y, len(self.wiring))
        return y[..., self.wiring.argsort()], y.new_zeros(y.shape[:-1])

class Plugboard(FixedPermutation):
    "Exchange pairs of channels: an involution with log-determinant 0 (Enigma I's Steckerbrett)."
    def __init__(self,
        dim:int, # channels
        num_swaps:int|None=None, # pairs exchanged, 0 … dim // 2; `None`: all of them
        seed:int=0, # which pairs
    ):
        if num_swaps is None: num_swaps = dim // 2
        super().__init__(draw_swaps(dim, num_swaps, seed))

    @classmethod
    def from_permutation(cls,
        permutation, # a permutation of 0 … dim-1: `y[i] = x[permutation[i]]`
    )->'Plugboard':
        "Build a board with a given wiring, an involution or not."
        wiring = torch.as_tensor(permutation)
        if sorted(wiring.tolist()) != list(range(len(wiring))):
            raise ValueError(f"a wiring must name each of 0 … {len(wiring)-1} once, "
                             f"got {wiring.tolist()}")
        board = cls(len(wiring), num_swaps=0)
        board.drawn = wiring.tolist()
        board.reset_parameters()
        return board

    def extra_repr(self): # '26, swaps=10'
        "Describe the board for `print`."
        moved = self.wiring != torch.arange(len(self.wiring))
        return f"{len(self.wiring)}, swaps={moved.sum().item() // 2}"


# enigma_lab.machine.steps

def random_state(
    device:torch.device, # on which a function runs
): # a state for the CPU and, if the device is another, one for the device
    "Read the state of the generators that a kernel on this device may draw from."
    if device.type == 'cpu': return (torch.get_rng_state(),)
    there = torch.get_device_module(device)
    return torch.get_rng_state(), there.get_rng_state(device)

def set_random_state(
    device:torch.device, # on which a function runs
    state, # from `random_state`
):
    "Put a state of the generators back."
    torch.set_rng_state(state[0])
    if len(state) > 1: torch.get_device_module(device).set_rng_state(state[1], device)

_drawing = threading.RLock() # for the generators, which all threads share

@contextlib.contextmanager
def generators_at(
    device:torch.device, # on which a function runs
    state, # from `random_state`; `None`: leave the generators alone
):
    "Put the generators into an earlier state for a while."
    if state is None:
        yield
        return
    with _drawing:
        now = random_state(device)
        set_random_state(device, state)
        try: yield
        finally: set_random_state(device, now)

class AutocastContext:
    "Remember the autocast that is on, to enter it again."
    def __init__(self,
        where:str, # device type, 'cpu' or 'cuda'
    ):
        self.where = where
        self.amp = torch.get_autocast_dtype(where) if torch.is_autocast_enabled(where) else None

    def cast(self): # a context manager
        "Enter the remembered autocast."
        if self.amp is None: return contextlib.nullcontext()
        return torch.autocast(self.where, self.amp, cache_enabled=False)

class ModesContext(AutocastContext):
    "Remember the modes of modules, too."
    def __init__(self,
        stream:Tensor, # that a function reads
        modules=(), # `nn.Module`s
    ):
        self.device, self.modules, self.real = stream.device, modules, has_values(stream)
        super().__init__(self.device.type if self.real else 'cpu')
        self.modes = [m.training for m in modules]

    @contextlib.contextmanager
    def in_modes(self):
        "Put the modules into the remembered modes for a while."
        moved = [m for m, mode in zip(self.modules, self.modes) if m.training != mode]
        for m in moved: m.training = not m.training
        try: yield
        finally:
            for m in moved: m.training = not m.training

class ReplayContext(ModesContext):
    "Remember under which conditions a function ran, to run it again."
    state = None # of the generators before the first run, if it drew from them

    def first(self,
        function, # to be run
        *args, # of the function
    ): # its result
        "Run a function, and keep the generators' state if it draws from them."
        if not self.real: return function(*args)
        with _drawing, self.cast():
            before = random_state(self.device)
            out = function(*args)
            after = random_state(self.device)
        if not all(map(torch.equal, before, after)): self.state = before
        return out

    def again(self,
        function, # to be run
        *args, # of the function
    ): # its result
        "Run a function as the first time; whether with a graph, its caller says."
        same = self.modes == [m.training for m in self.modules]
        if self.state is None and self.amp is None and same: return function(*args)
        with generators_at(self.device, self.state), self.in_modes(), self.cast():
            return function(*args)

class Arguments:
    "Take the tensors out of arguments, and put others in their places."
    def __init__(self,
        args=(), # positional: tensors, `None`, flags, or nested ones
        named=None, # by keyword
    ):
        self.args, self.named = args, named or {}
        self.leaves, self.tree = (
            tree_flatten((tuple(args), named or {})) if named or any(
                t is not None and not isinstance(t, Tensor) for t in args) else (args, None))
        self.places = [i for i, t in enumerate(self.leaves) if isinstance(t, Tensor)]
        self.tensors = [self.leaves[i] for i in self.places]

    def __len__(self): return len(self.places) # how many tensors

    def filled(self,
        tensors, # one for each of `self.tensors`
    )->tuple: # positional arguments, and those by keyword
        "Return the arguments with other tensors in the places of theirs."
        leaves = list(self.leaves)
        for i, t in zip(self.places, tensors): leaves[i] = t
        return (leaves, {}) if self.tree is None else tree_unflatten(leaves, self.tree)

class ForwardLink:
    "Say how a link of a chain of two streams runs."
    def plain(self,
        a, # first stream
        b, # second stream
    ): # the two streams after the step
        "Run the step as autograd does it, storing everything."
        raise NotImplementedError

    def stored(self,
        a, # first stream
        b, # second stream
    ): # the two streams after the step
        "Run the step as autograd does it, under the rules of one that runs twice."
        raise NotImplementedError

class Link(ForwardLink):
    "Say how a link is undone, too; a `Coupling` or a `BijectionStep` does it."
    def undo(self,
        b, # first stream after the step
        y, # second stream after the step
    ): # the two streams before the step
        "Undo the step, without gradients."
        raise NotImplementedError

    def backward(self,
        b, # first stream after the step
        y, # second stream after the step
        gb, # gradient of `b`, or `None`
        gy, # gradient of `y`, or `None`
        tensors, # what `read` returned: the scale, extras, parameters
        needs, # for the input, then for each of `tensors`: whether it needs a gradient
        grads=(), # of the log-determinant, if the step measures one
    ): # two streams, their gradients, and the gradients of `tensors`
        "Turn values and gradients after the step into those before it."
        raise NotImplementedError

class Reader(Link):
    "Hold a module, and list the tensors that it reads."
    def __init__(self,
        module, # called with streams and extras
        extras=(), # further arguments, or `Arguments`
        s:Tensor|None=None, # scale, a scalar
        axis:int=-1, # of the channels
    ):
        self.arguments = extras if isinstance(extras, Arguments) else Arguments(extras)
        self.module, self.s, self.axis = module, s, axis
        self.extras = len(self.arguments)

    def read(self): # the scale, extras, and parameters that learn
        "List the tensors that the step reads, before a run that is to be repeated."
        self.modules, found = list(self.module.modules()), {}
        self.sharded = any_sharded(self.modules)
        self.buffers, self.params, self.places = [], [], []
        for m in self.modules:
            for t in m._buffers.values():
                if t is not None: self.buffers.append(t)
            for held in () if self.sharded else (m._parameters, m._buffers):
                for name, t in held.items():
                    if t is None: continue
                    i = found.setdefault(id(t), len(found)) if t.requires_grad else None
                    if i == len(self.params): self.params.append(t)
                    self.places.append((held, name, t, i))
        # a module that gathers its parameters hands out their gradients, too
        if self.sharded: self.params = [torch.empty(0, requires_grad=True)]
        self.tensors = self.s, *self.arguments.tensors, *self.params
        return self.tensors

class Placed(Reader):
    "Put tensors into the places that a module keeps for them."
    @contextlib.contextmanager
    def placed(self,
        params, # one for each that learns; the others are those of the first run
    ):
        "Let the module read other tensors for a while."
        before = [held[name] for held, name, *_ in self.places]
        for held, name, t, i in self.places: held[name] = t if i is None else params[i]
        try: yield
        finally:
            for (held, name, *_), t in zip(self.places, before): held[name] = t

    def size(self,
        stream, # one of the two
    ): # bytes
        "Estimate the bytes of the step's graph: what each weight matrix puts out, twice."
        numbers = sum(p.numel() for p in self.params) // max(1, stream.shape[self.axis])
        return (stream.element_size() * stream.numel() // max(1, stream.shape[self.axis])
                * max(2*numbers, 4*stream.shape[self.axis]))

def check_unchanged(
    name:str, # of a module's class
    same_input:bool, # it left its input as it was
    same_buffers:bool, # and its buffers
):
    "Raise a RuntimeError where a function changed what it will read again."
    if not same_input:
        raise RuntimeError(f"a reversible step needs its input again, but {name} changed it "
                           "in place: use x + 1 for x.add_(1)")
    if not same_buffers:
        raise RuntimeError(f"a reversible step runs twice, but {name} changed a buffer of its "
                           "own in training, as BatchNorm and spectral_norm do: use LayerNorm, "
                           "GroupNorm or weight_norm, or put that part in eval mode")

_plain = {int, float, bool, str, type(None), dict, list, tuple, set, OrderedDict}

def left_behind(
    modules, # of a step
    since:int, # number of the run's first node
)->list[str]: # names of attributes
    "List the tensors with a graph that a run has left on its modules."
    # the class first: isinstance takes its time for tensors
    return [f'{type(m).__name__}.{name}' for m in modules for name, t in vars(m).items()
            if t.__class__ not in _plain and isinstance(t, Tensor) and t.grad_fn is not None
            and t.grad_fn._sequence_nr() >= since]

def check_known(
    step, # a `Step`
    out:Tensor, # its function's result, with a graph
    since:int, # number of the run's first node
    inputs, # leaves that are known, or `None`
    known=(), # nodes that are known
)->list[Tensor]: # parameters that were read where they are, past their aliases
    "Raise a RuntimeError where a step reads a tensor whose gradient would be lost."
    name = type(step.module).__name__
    if out.grad_fn is None or step.sharded: return []
    leaves, older = entrances(out, since, known)
    inputs = {id(t) for t in inputs if t is not None}
    params = {id(p) for p in step.params}
    strange = [t for t in leaves if id(t) not in inputs and id(t) not in params]
    if older or strange:
        shapes = ', '.join(str(tuple(t.shape)) for t in strange)
        raise RuntimeError(f"a reversible step must own what it learns from, but {name} reads "
                           f"a tensor that requires a gradient ({shapes or 'a result'}) and is "
                           "neither its parameter nor an argument: register it as a parameter, "
                           "or pass it to the chain, chain(x, tensor)")
    return [t for t in leaves if id(t) in params and id(t) not in inputs]

def check_left(
    step, # a `Step`
    since:int, # number of the run's first node
):
    "Raise a RuntimeError where a run has left a tensor whose gradient would be lost."
    if left := left_behind(step.modules, since):
        raise RuntimeError(f"a reversible step is undone and run again, but "
                           f"{type(step.module).__name__} leaves {', '.join(left)} with a graph "
                           "that no loss would reach: store its detach(), or compute that loss "
                           "outside of the chain")

def looked_at(
    step, # a `Step`
)->set: # modes of its modules, to be added to
    "Recall in which modes the first run of a function was looked at: that costs time."
    return _looked.setdefault(step.module, set())

def check_repeated(
    step, # a `Step`
    out, # its function's result
    again, # the same, from a second run
):
    "Raise a RuntimeError where a function gives another result the second time."
    if not out.numel() or not has_values(out): return
    error, size = (out - again).abs().max(), out.abs().max()
    if not (error == 0 if step.grid else error <= .01*size) and size.isfinite():
        raise RuntimeError(f"a reversible step runs twice, but {type(step.module).__name__} gave "
                           f"another result the second time, by {error:g} at a size of {size:g}: "
                           "is it random, or does it remember?")

_tried = weakref.WeakKeyDictionary() # module -> modes in which it gave the same result twice
_looked = weakref.WeakKeyDictionary() # module -> modes in which what it leaves was looked at

def try_twice(
    step, # a `Step`
    out, # its function's first result
    repeat, # the `ReplayContext` of the first run
    *args, # of the first run
):
    "Compare a second run of a function with the first, once for each module and mode."
    tried = _tried.setdefault(step.module, set())
    if (modes := tuple(repeat.modes)) in tried: return
    with torch.no_grad(): check_repeated(step, out, repeat.again(step.call, *args))
    tried.add(modes)

def fresh(
    t:Tensor|None, # to be read in the second run
    need:bool, # it needs a gradient
): # the same values
    "Return a tensor from which the second run's graph may begin."
    if t is None: return None
    return t.view_as(t) if torch.is_grad_enabled() else t.detach().requires_grad_(need)

class Step(Placed):
    "Make a link of a reversible chain: a module, and the tensors that it reads."
    def call(self,
        b, # the stream that the function reads
        extras, # tensors
    ): # its result
        "Call the module."
        if not self.extras and self.arguments.tree is None:
            return self.module(b, *self.arguments.leaves)
        args, named = self.arguments.filled(extras)
        return self.module(b, *args, **named)

    def run(self,
        b, # the stream that the function reads
        extras, # tensors
    ): # its result
        "Run the function once, without a graph; refuse one that changes what it reads."
        self.repeat = ReplayContext(b, self.modules)
        before, self.versions = version(b), [version(t) for t in self.buffers]
        out = self.repeat.first(self.call, b, extras)
        check_unchanged(type(self.module).__name__, version(b) == before,
                        self.versions == [version(t) for t in self.buffers])
        try_twice(self, out, self.repeat, b, extras)
        return out

class RepeatedStep(Step):
    "Run a step a second time."
    def fresh(self,
        b, # the stream that the function reads
        tensors, # what `read` returned: the scale, extras, parameters
        needs, # for the input, then for each of `tensors`: whether it needs a gradient
    ): # the stream, and a list of extras and parameters
        "Return the tensors from which the second run's graph begins."
        if self.versions != [version(t) for t in self.buffers]:
            raise RuntimeError(f"a buffer of {type(self.module).__name__} has changed between "
                               "the forward and the backward pass, which reads it again")
        return fresh(b, needs[0]), [fresh(t, n) for t, n in zip(tensors[1:], needs[2:])]

    def again(self,
        b, # a fresh stream
        rest, # fresh extras and parameters, placed in the module
    ): # the result, and what it depends on
        "Run the function a second time, with a graph."
        known = [t.grad_fn for t in (b, *rest) if t is not None] if torch.is_grad_enabled() else ()
        with torch.enable_grad():
            b_ = b.view_as(b) # module trackers cannot hook a leaf
            since, inputs = node_number(b_), [b, *rest]
            out = self.repeat.again(self.call, b_, rest[:self.extras])
        if (modes := tuple(self.repeat.modes)) not in (looked := looked_at(self)):
            check_left(self, since)
            looked.add(modes)
        for p in check_known(self, out, since, inputs, known):
            i = next(i for i, own in enumerate(self.params) if own is p)
            inputs[1 + self.extras + i] = p
        return out, inputs

class KeptStep(RepeatedStep):
    "Run a step once, with a graph that is stored, under the rules of a repeated one."
    def kept(self,
        b, # the stream that the function reads
    ): # its result
        "Run the function as autograd does; refuse what a repeated step would refuse."
        before, versions = version(b), [version(t) for t in self.buffers]
        b_ = b.view_as(b)
        looked = looked_at(self)
        if (modes := tuple(m.training for m in self.modules)) in looked:
            out = self.call(b_, self.arguments.tensors)
        else:
            out = self.kept_first(b_)
            looked.add(modes)
        check_unchanged(type(self.module).__name__, version(b) == before,
                        versions == [version(t) for t in self.buffers])
        return out

    def kept_first(self,
        b, # a view of the stream that the function reads
    ): # its result
        "Run the function twice, and look at its graph."
        extras, since = self.arguments.tensors, node_number(b)
        repeat = ReplayContext(b, self.modules)
        out = repeat.first(self.call, b, extras)
        known = [t.grad_fn for t in (b, *extras, *self.params)]
        check_left(self, since)
        check_known(self, out, since, (*extras, *self.params), known)
        try_twice(self, out, repeat, b, extras)
        return out

def gradients(
    outs:list, # tensors with a graph
    inputs, # what they depend on
    needs, # for which of them a gradient is wanted
    grads:list, # of `outs`, each perhaps `None`
)->list: # a gradient or `None` for each of `inputs`
    "Compute vector-Jacobian products for those inputs that want them."
    wanted = [t for t, need in zip(inputs, needs) if need]
    given = [(out, g.to(out.dtype)) for out, g in zip(outs, grads)
             if g is not None and out.requires_grad]
    if not given or not wanted: return [None]*len(needs)
    outs, grads = zip(*given)
    found = iter(torch.autograd.grad(outs, wanted, grads, allow_unused=True,
                                     create_graph=torch.is_grad_enabled()))
    return [next(found) if need else None for need in needs]

def accumulated(
    outs:list, # tensors with a graph
    inputs, # what they depend on
    needs, # for which of them a gradient is wanted
    grads:list, # of `outs`, each perhaps `None`
)->list: # a gradient or `None` for each of `inputs`
    "Run the backward pass of a module that hands out the gradients of its parameters itself."
    if torch.is_grad_enabled():
        raise RuntimeError("a reversible chain of sharded parts has no second derivative: "
                           "shard the whole chain, fully_shard(chain)")
    given = [(out, g.to(out.dtype)) for out, g in zip(outs, grads)
             if g is not None and out.requires_grad]
    if given: torch.autograd.backward(*zip(*given))
    return [t.grad if need else None for t, need in zip(inputs, needs)]

def forth(
    a:Tensor, # the stream that changes
    out:Tensor, # F(b)
    s:Tensor|None, # scale, a scalar; `None`: 1
)->Tensor: # s a + F(b)
    "Add to a stream."
    return (a if s is None else s*a) + out

def back(
    y:Tensor, # the stream that has changed
    out:Tensor, # F(b)
    s:Tensor|None, # scale, a scalar; `None`: 1
)->Tensor: # (y - F(b)) / s
    "Subtract from a stream what was added."
    return y - out if s is None else (y - out)/s

class Addition(KeptStep):
    "Add a function of one stream to the other, perhaps on a grid."
    def __init__(self,
        module, # F, called with a stream and extras
        extras=(), # further arguments, or `Arguments`
        s=None, # scale, a scalar; `None`: 1
        axis=-1, # of the channels
        grid=None, # the step of exact streams; `None`: floats
        inverse=False, # subtract instead, and divide by the scale
    ):
        super().__init__(module, extras, s, axis)
        # peak: where to note the largest value
        self.grid, self.peak, self.inverse = grid, None, inverse

    def change(self,
        a, # the stream that changes
        out, # F(b), of the shape of `a`
        s, # scale, a scalar; `None`: 1
        undo=False, # the other way
    ): # the new stream
        "Add the function's result to a stream, or subtract it."
        if self.grid:
            rounded = snap if torch.is_grad_enabled() else snapped
            out = rounded(out, self.grid).to(a.dtype)
        return (back if self.inverse != undo else forth)(a, out, s)

class CheckedAddition(Addition):
    "Add a function's result, one tensor of the right shape, and note how large the stream is."
    def call(self, b, extras): # F(b, *extras)
        out = super().call(b, extras)
        if isinstance(out, Tensor): return out
        raise TypeError(f"{type(self.module).__name__} must return one tensor, got "
                        f"{type(out).__name__}: give the chain a module that returns the first "
                        "of several, and compute other losses from the streams outside of it")

    def add(self,
        a, # the stream that changes
        s, # scale, a scalar; `None`: 1
        out, # F(b), of the shape of `a`
    ): # the new stream
        "Add the function's result to the stream that changes."
        if out.shape != a.shape:
            raise ValueError(f"{type(self.module).__name__} must keep the shape of its stream, "
                             f"{tuple(a.shape)}, got {tuple(out.shape)}")
        y = self.change(a, out, s)
        if self.peak is not None:
            torch.linalg.vector_norm(y.detach(), torch.inf, out=self.peak)
        return y

class SharedAddition(CheckedAddition):
    "Share gradients out between a stream and what is added to it, and measure volume."
    def to_both(self,
        gy, # gradient of the stream that has changed, or `None`
        s, # scale, a scalar; `None`: 1
    ): # of the stream before, and of what was added
        "Share a gradient out."
        if gy is None: return None, None
        if self.inverse: gy = gy if s is None else gy/s
        return (gy, -gy) if self.inverse else (gy if s is None else s*gy, gy)

    def log_det(self,
        a, # the stream that changes
        s, # scale, a scalar; `None`: 1
    ): # of the shape of a stream without the channels, nats
        "Return the log-determinant of the step."
        n, like = a.shape[self.axis], a.select(self.axis, 0)
        if s is None: return torch.zeros_like(like)
        return (s.abs().log()*(-n if self.inverse else n)).expand(like.shape)

class Coupling(SharedAddition):
    "Map `(a, b)` to `(b, s a + F(b))` (RevNet, arXiv:1707.04585, eq. 8)."
    def plain(self, a, b):
        # a view gathers F's gradients before they are added: the same order, the same bits
        return b, self.add(a, self.s, self.call(b.view_as(b), self.arguments.tensors))

    def stored(self, a, b): return b, self.add(a, self.s, self.kept(b))

    def undo(self, b, y):
        return self.change(y, self.call(b, self.arguments.tensors), self.s, undo=True), b

    def forward(self, a, b, s, *tensors):
        return b, self.add(a, s, self.run(b, tensors[:self.extras]))

    def backward(self, b, y, gb, gy, tensors, needs, grads=()):
        s, (b0, rest) = tensors[0], self.fresh(b, tensors, needs)
        with self.placed(rest[self.extras:]): out, inputs = self.again(b0, rest)
        ga, g_out = self.to_both(gy, s)
        found = accumulated if self.sharded else gradients
        g, *rest = found([out], inputs, (needs[0], *needs[2:]), [g_out])
        # after the gradients, whose peak it would raise
        a = self.change(y, out if torch.is_grad_enabled() else out.detach(), s, undo=True)
        gs = None
        if s is not None and gy is not None and needs[1]:
            gs = -(gy*y).sum()/s if self.inverse else (gy*a).sum()
        if g is None or gb is None: g = gb if g is None else g
        else: g = gb + g
        return a, b, ga, g, (gs, *rest)

def full_precision(
    stream, # on the device that counts
): # a context manager
    "Switch autocast off, in which no inverse would fit its forward pass."
    return torch.autocast(stream.device.type, enabled=False)

class JoinedStreams(KeptStep):
    "Put two streams together for a bijection."
    def __init__(self,
        bijection, # of both streams together
        positions=None, # int64, for the bijection
        axis=-1, # along which the streams are put together
        ways=None, # `BijectionModule(bijection)`, made outside of compiled code
        inverse=False, # the streams come in the other order, and are led back
    ):
        super().__init__(bijection, (positions,), axis=axis)
        self.grid, self.ways, self.inverse = None, ways, inverse
        self.measures, self.measured = False, None # whether to measure volume; the last result

    def join(self,
        a, # first stream
        b, # second stream
    ): # both, with the channels last
        "Put the two streams together."
        streams = [b, a] if self.inverse else [a, b]
        return torch.cat(streams, self.axis).movedim(self.axis, -1)

    def part(self,
        x, # both, with the channels last
    ): # two streams
        "Take two streams apart."
        streams = x.movedim(-1, self.axis).chunk(2, self.axis)
        return streams[::-1] if self.inverse else streams

class TurnedStreams(JoinedStreams):
    "Lead two streams through a bijection, forwards or backwards."
    def map(self,
        x, # both streams, with the channels last
        extras, # the positions, or nothing
        undo=False, # the other way
    ): # of the same shape
        "Lead both streams through the bijection, and measure it if wanted."
        name = 'inverse' if self.inverse != undo else 'forward'
        if self.measures and not undo:
            x, self.measured = getattr(self.module, f'{name}_and_log_det')(x, *extras)
            return x
        return self.module.inverse(x, *extras) if name == 'inverse' else self.module(x, *extras)

    def call(self, b, extras): return self.map(b, extras)

    def plain(self, a, b):
        with full_precision(a):
            return self.part(self.call(self.join(a, b), self.arguments.tensors))

    def stored(self, a, b):
        with full_precision(a): return self.part(self.kept(self.join(a, b)))

    def undo(self, b, y):
        with full_precision(b):
            return self.part(self.map(self.join(b, y), self.arguments.tensors, undo=True))

class BijectionStep(TurnedStreams):
    "Map `(a, b)` to `f([a; b])`, f a bijection."
    def forward(self, a, b, s, *tensors):
        with full_precision(a):
            return self.part(self.run(self.join(a, b), tensors[:self.extras]))

    def backward(self, b, y, gb, gy, tensors, needs, grads=()):
        _, rest = self.fresh(b, tensors, needs)
        with self.placed(rest[self.extras:]):
            with full_precision(b):
                x = self.map(self.join(b, y), rest[:self.extras], undo=True)
            out, inputs = self.again(fresh(x, needs[0]), rest)
        grad = None
        if gb is not None or gy is not None:
            grad = self.join(torch.zeros_like(b) if gb is None else gb,
                             torch.zeros_like(y) if gy is None else gy)
        outs = [out, self.measured] if self.measures else [out]
        found = accumulated if self.sharded else gradients
        g, *rest = found(outs, inputs, (needs[0], *needs[2:]), [grad, *grads])
        self.measured = None # its graph holds a copy of the streams
        ga, gb = (None, None) if g is None else self.part(g)
        return *self.part(x), ga, gb, (None, *rest)

def sketch(
    stream:Tensor, # one of the two
    axis:int, # of the channels
    exact:bool, # it is on the grid
)->Tensor: # of its shape without the axis
    "Sum the first half of the channels, and subtract the sum of the others."
    n = stream.shape[axis]
    wide = torch.float64 if exact else torch.promote_types(stream.dtype, torch.float32)
    first, second = stream.detach().split([n//2, n - n//2], axis)
    return first.sum(axis, dtype=wide) - second.sum(axis, dtype=wide)


# enigma_lab.machine.compile

DRAWS = set('''rand rand_like randn randn_like randint randint_like randperm bernoulli bernoulli_
    multinomial normal normal_ uniform_ exponential_ geometric_ cauchy_ log_normal_ random_ poisson
    binomial gumbel_softmax'''.split())
# what switches others off, place and default: the probability, and the mode
SWITCHES = {
    **{f'{kind}dropout{size}{end}': (1, .5, 2, 'alpha' not in kind)
       for kind in ('', 'alpha_', 'feature_', 'feature_alpha_')
       for size in ('', '1d', '2d', '3d') for end in ('', '_')},
    **{name: (5, 0, 6, True) for name in ('lstm', 'gru', 'rnn_tanh', 'rnn_relu')},
    'scaled_dot_product_attention': (4, 0, 99, True), 'rrelu': (99, 1, 3, False),
    'multi_head_attention_forward': (10, 0, 13, True), 'rrelu_': (99, 1, 3, False)}

def argument(
    args, # positional
    named:dict, # by keyword
    place:int, # where it is, if positional
    names, # that it may have
    default, # if it is not given
): # its value
    "Find an argument of a call."
    for name in names:
        if name in named: return named[name]
    return args[place] if len(args) > place else default

def draws(
    function, # of torch
    args, # positional
    named:dict, # by keyword
)->bool: # True: it takes numbers from a generator
    "Tell whether a call draws random numbers."
    name = getattr(function, '__name__', '')
    if name not in SWITCHES: return name in DRAWS
    place, share, mode_place, mode = SWITCHES[name]
    share = argument(args, named, place, ('p', 'dropout_p', 'dropout'), share)
    return bool(share and argument(args, named, mode_place, ('training', 'train'), mode))

METHODS = {name for name, f in vars(Tensor).items()
           if isinstance(f, FunctionType) and not name.startswith('__')}

class RefuseDraws(TorchFunctionMode):
    "Raise a RuntimeError where a function draws while a compiler traces it."
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if torch.compiler.is_compiling() and draws(func, args, kwargs or {}):
            raise RuntimeError("a compiled reversible chain cannot repeat random numbers, but "
                               "an F draws them: use enigma_lab.machine.dropout.CounterDropout, "
                               "or compile without fullgraph")
        # a compiler knows a tensor's methods, but not how those written in Python call theirs
        if (name := getattr(func, '__name__', '')) in METHODS:
            return getattr(args[0], name)(*args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))

def wait_for(
    grad, # that has to be there first
    t, # an extra
): # `t`, of the same value
    "Make a scalar depend on a gradient: a dropout's key has to wait, too, or its mask is stored."
    return t + (grad.flatten()[0]*0).to(t.dtype) if t.ndim == 0 and t.dtype != torch.bool else t

def call(
    module, # to be called
    names, # of its parameters and buffers
    amp, # device type and dtype of autocast; `None`: without
    arguments, # `Arguments` of the module
    b, # first argument
    tensors, # those of the arguments, then what `names` name
): # the module's result
    "Call a module with its tensors given as arguments."
    n = len(arguments)
    args, named = arguments.filled(tensors[:n])
    with full_precision(b) if amp is None else torch.autocast(*amp, cache_enabled=False):
        return functional_call(module, dict(zip(names, tensors[n:])), (b, *args), named)

def first_run(
    repeat, # a `ReplayContext`
    *args, # of `call`
): # the module's result
    "Call a module, and remember what it needs to be called again."
    if not torch.compiler.is_compiling(): return repeat.first(call, *args)
    with RefuseDraws(): return call(*args)

def second_run(
    repeat, # a `ReplayContext`
    *args, # of `call`
): # the module's result
    "Call a module as the first time. Raise a RuntimeError where `vmap` forbids its random numbers."
    if torch.compiler.is_compiling(): return call(*args)
    try: return repeat.again(call, *args)
    except RuntimeError as error:
        if 'randomness' not in str(error): raise
        raise RuntimeError("a reversible chain cannot repeat random numbers within vmap, as jacrev "
                           "runs its backward pass: use memory='store', or "
                           "enigma_lab.machine.dropout.CounterDropout") from error

def pullback(
    run, # a function of tensors
    *inputs, # its arguments
    still=0, # how many of the last need no gradient
): # result, and the function from its gradient to those of `inputs`
    "Run a function and prepare its vector-Jacobian product."
    floats = [i for i, t in enumerate(inputs[:len(inputs) - still])
              if isinstance(t, Tensor) and t.is_floating_point()]
    def of_floats(*values):
        every = list(inputs)
        for i, v in zip(floats, values): every[i] = v
        return run(*every)
    out, pull = torch.func.vjp(of_floats, *(inputs[i] for i in floats))
    def all_gradients(grad):
        found = dict(zip(floats, pull(grad)))
        return [found.get(i) for i in range(len(inputs))]
    return out, all_gradients

class TracedCouplingForward(torch.autograd.Function):
    "Run the forward pass of `TracedCoupling`."
    @staticmethod
    def forward(step, module, names, amp, repeat, a, b, va, vb, s, *tensors):
        out = first_run(repeat, module, names, amp, step.arguments, b, tensors)
        y = step.change(a, out, s)
        return b.clone(), y, b.clone(), y.clone()

    @staticmethod
    def setup_context(
        ctx, # of autograd
        inputs, # of `forward`
        output, # of `forward`
    ):
        "Keep what the backward pass reads."
        ctx.step, ctx.module, ctx.names, ctx.amp, ctx.repeat = inputs[:5]
        ctx.scaled = inputs[9] is not None
        ctx.save_for_backward(*inputs[9 if ctx.scaled else 10:])

class TracedCoupling(TracedCouplingForward):
    "Apply `Coupling` under `torch.compile` and `torch.func`."
    generate_vmap_rule = True

    @staticmethod
    def backward(
        ctx, # of autograd
        gb, # gradient of `b`
        gy, # gradient of `y`
        b, # the stream that F reads
        y, # the stream that has changed
    ): # a gradient or `None` for each argument of `forward`
        "Turn values and gradients after the step into those before it."
        s, tensors = ((ctx.saved_tensors[0], ctx.saved_tensors[1:]) if ctx.scaled
                      else (None, ctx.saved_tensors))
        step, n = ctx.step, ctx.step.extras
        tensors = *(wait_for(gy, t) for t in tensors[:n]), *tensors[n:]
        out, pull = pullback(
            lambda b, *tensors: second_run(
                ctx.repeat, ctx.module, ctx.names, ctx.amp, step.arguments, b, tensors),
            b, *tensors, still=step.still)
        a = step.change(y, out, s, undo=True)
        ga, g_out = step.to_both(gy, s)
        gs = None if s is None else -(gy*y).sum()/s if step.inverse else (gy*a).sum()
        g, *rest = pull(g_out.to(out.dtype))
        return (None,)*5 + (ga, gb + g, a, b, gs, *rest)

class TracedTurnForward(torch.autograd.Function):
    "Run the forward pass of `TracedTurn`."
    @staticmethod
    def forward(step, ways, names, repeat, positions, a, b, va, vb, *params):
        way = Way(positions, step.inverse, step.measures)
        x, log_det = first_run(repeat, ways, names, None, way, step.join(a, b), params)
        a, b = step.part(x)
        return a.clone(), b.clone(), a.clone(), b.clone(), log_det.clone()

    @staticmethod
    def setup_context(
        ctx, # of autograd
        inputs, # of `forward`
        output, # of `forward`
    ):
        "Keep what the backward pass reads."
        ctx.step, ctx.ways, ctx.names, ctx.repeat, positions = inputs[:5]
        ctx.placed = positions is not None
        ctx.save_for_backward(*inputs[4:5] if ctx.placed else (), *inputs[9:])

class TracedTurn(TracedTurnForward):
    "Apply `BijectionStep` under `torch.compile` and `torch.func`."
    generate_vmap_rule = True

    @staticmethod
    def backward(
        ctx, # of autograd
        ga, # gradient of the first stream
        gb, # gradient of the second stream
        a, # value of the first stream
        b, # value of the second stream
        g_log_det, # gradient of the log-determinant
    ): # a gradient or `None` for each argument of `forward`
        "Turn values and gradients after the step into those before it."
        step, measures = ctx.step, ctx.step.measures
        positions, params = ((ctx.saved_tensors[0], ctx.saved_tensors[1:]) if ctx.placed
                             else (None, ctx.saved_tensors))
        def run(inverse, x, *params):
            way = Way(positions, inverse, measures and inverse == step.inverse)
            return second_run(ctx.repeat, ctx.ways, ctx.names, None, way, x, params)
        x, _ = run(not step.inverse, step.join(a, b), *params)
        outs, pull = pullback(lambda *inputs: run(step.inverse, *inputs), x, *params,
                              still=step.still)
        g, *rest = pull((step.join(ga, gb).to(outs[0].dtype), g_log_det.to(outs[1].dtype)))
        return (None,)*5 + (*step.part(g), *step.part(x), *rest)

class Way:
    "Hold the arguments of a `BijectionModule`, which are no tensors to be placed."
    def __init__(self,
        positions, # int64, for the bijection
        inverse, # True: its inverse
        measures, # with the log-determinant
    ):
        self.args = positions, inverse, measures

    def __len__(self): return 0

    def filled(self,
        tensors, # none
    )->tuple: # positional arguments, and those by keyword
        "Return the arguments."
        return self.args, {}

class BijectionModule(nn.Module):
    "Call a bijection in both directions through `forward`."
    def __init__(self,
        bijection, # to be called
    ):
        super().__init__()
        self.bijection = bijection

    def forward(self,
        x, # both streams together
        positions, # int64, for the bijection
        inverse, # True: its inverse
        measures=False, # with the log-determinant
    ): # of the shape of `x`; the log-determinant, or a zero
        extras = () if positions is None else (positions,)
        if measures:
            return (self.bijection.inverse_and_log_det if inverse else
                    self.bijection.forward_and_log_det)(x, *extras)
        y = self.bijection.inverse(x, *extras) if inverse else self.bijection(x, *extras)
        return y, x.new_zeros(())

class TracedEnd(torch.autograd.Function):
    "Mark where values begin their way back, and let them wait for the gradient."
    generate_vmap_rule = True
    @staticmethod
    def forward(a, b, va, vb): return a.clone(), b.clone()
    @staticmethod
    def setup_context(
        ctx, # of autograd
        inputs, # of `forward`
        output, # of `forward`
    ):
        "Keep the last streams."
        ctx.save_for_backward(*output)
    @staticmethod
    def backward(
        ctx, # of autograd
        ga, # gradient of the first stream
        gb, # gradient of the second stream
    ): # two gradients and two values
        "Put the last streams, made to depend on the gradient, into the slots of the values."
        return ga, gb, *(v + ga.flatten()[0]*0 for v in ctx.saved_tensors)

class TracedStart(torch.autograd.Function):
    "Mark where values end their way back, and compare them with what they were."
    generate_vmap_rule = True
    @staticmethod
    def forward(axis, a, b, *anchors):
        return a.clone(), b.clone(), sketch(a, axis, False), sketch(b, axis, False)
    @staticmethod
    def setup_context(
        ctx, # of autograd
        inputs, # of `forward`
        output, # of `forward`
    ):
        "Keep a sketch of the first streams."
        ctx.axis, ctx.anchors = inputs[0], len(inputs) - 3
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*output[2:])
    @staticmethod
    def backward(
        ctx, # of autograd
        a, # value of the first stream
        b, # value of the second stream
        *_, # no gradients of the sketches
    ): # `None` for each argument of `forward`
        "Compare a sketch of the values with what it was."
        for kept, back in zip(ctx.saved_tensors, (a, b)):
            error, size = (kept - sketch(back, ctx.axis, False)).abs().amax(), kept.abs().amax()
            ensure((error <= .01*size) | ~error.isfinite(),
                   "the streams of a reversible chain came back wrong: an F gave another result "
                   "the second time (is it random, or does it remember?)")
        return (None,)*(3 + ctx.anchors)

def check_owned(
    module, # of a step
):
    "Raise a RuntimeError where a module holds a tensor that learns and is no parameter of it."
    for m in module.modules():
        for name, value in m.__dict__.items():
            if name.startswith('_'): continue
            for t in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(t, Tensor) and t.requires_grad:
                    raise RuntimeError(
                        "a reversible step must own what it learns from, but "
                        f"{type(m).__name__}.{name} requires a gradient and is no parameter: "
                        "register it, or pass it to the chain, chain(x, tensor)")

def check_statistics(
    module, # of a step
):
    "Raise a RuntimeError where a module would count the statistics of a batch, twice."
    for m in module.modules():
        # an instance of BatchNorm without statistics has `None` there
        counts = getattr(m, 'running_mean', None) is not None
        if counts and m.training and getattr(m, 'track_running_stats', False):
            raise RuntimeError(f"a reversible step runs twice, but {type(m).__name__} changed a "
                               "buffer of its own in training: use LayerNorm or GroupNorm, or put "
                               "that part in eval mode")

def traced_step(
    step, # a link of the chain
    streams, # four: two streams, and the values that travel back
    amp, # device type and dtype of autocast; `None`: without
): # the four behind the step
    "Run one step as a pure function."
    coupling = not isinstance(step, BijectionStep)
    module = step.module if coupling else step.ways or BijectionModule(step.module)
    check_owned(module)
    check_statistics(module)
    state = dict(module.named_parameters())
    # a buffer that learns, as `functional_call` may bring one, comes before those that do not
    buffers = sorted(module.named_buffers(), key=lambda named: not named[1].requires_grad)
    state, step.still = {**state, **dict(buffers)}, sum(not t.requires_grad for _, t in buffers)
    repeat = ReplayContext(streams[0], list(module.modules()))
    if coupling:
        return TracedCoupling.apply(
            step, module, list(state), amp, repeat, *streams, step.s, *step.arguments.tensors,
            *state.values())
    positions = next(iter(step.arguments.tensors), None)
    *streams, step.measured = TracedTurn.apply(
        step, module, list(state), repeat, positions, *streams, *state.values())
    return streams

def traced(
    steps, # the chain's links
    a, # first stream
    b, # second stream
    check:bool=True, # compare what comes back with what was, and exact streams with their range
): # the two streams at the end
    "Run a chain under a compiler or a functional transform."
    check, peaks, grid = check and a.numel() > 0, [], None
    if not torch.is_grad_enabled():
        for step in steps:
            a, b = step.plain(a, b)
            if step.grid: peaks, grid = [*peaks, b.abs().amax()], step.grid
        if check and grid: check_range(torch.stack(peaks).max(), grid, a.dtype)
        return a, b
    where, (va, vb) = a.device.type, (a.detach(), b.detach())
    amp = (where, torch.get_autocast_dtype(where)) if torch.is_autocast_enabled(where) else None
    if check and steps:
        anchors = next(filter(None, ([*step.module.parameters()] for step in steps)), ())
        va, vb, *_ = TracedStart.apply(steps[0].axis, a, b, *anchors)
    for step in steps:
        a, b, va, vb = traced_step(step, (a, b, va, vb), amp)
        if step.grid: peaks, grid = [*peaks, b.detach().abs().amax()], step.grid
    if check and grid: check_range(torch.stack(peaks).max(), grid, a.dtype)
    return TracedEnd.apply(a, b, va, vb)


# enigma_lab.machine.reversible

def measures(
    step, # a link of the chain
)->bool: # True: it returns a log-determinant beside the streams
    "Tell whether a step measures how it changes volume."
    return getattr(step, 'measures', False)

class ReversibleSpan(torch.autograd.Function):
    "Run a few steps of the chain; the last two gradients are values."
    @staticmethod
    def forward(ctx, steps, a, b, va, vb, *tensors):
        ctx.set_materialize_grads(False)
        ctx.steps, rest = steps, iter(tensors)
        ctx.save_for_backward(*tensors)
        for step in steps: a, b = step.forward(a, b, *itertools.islice(rest, len(step.tensors)))
        return a, b, a.detach(), b.detach(), *(s.measured for s in steps if measures(s))

    @staticmethod
    def backward(
        ctx, # of autograd
        ga, # gradient of the first stream, or `None`
        gb, # gradient of the second stream, or `None`
        a, # value of the first stream
        b, # value of the second stream
        *measured, # gradients of log-determinants
    ): # a gradient or `None` for each argument of `forward`
        "Lead values and gradients back through the steps."
        tensors, needs, grads = ctx.saved_tensors, ctx.needs_input_grad[5:], ()
        below, i = any(ctx.needs_input_grad[1:3]), len(tensors)
        for step in reversed(ctx.steps):
            i, j = i - len(step.tensors), i
            *measured, g = measured if measures(step) else (*measured, None)
            a, b, ga, gb, found = step.backward(a, b, ga, gb, tensors[i:j],
                (below or any(needs[:i]), *needs[i:j]), (g,))
            grads = *found, *grads
        return None, ga, gb, a, b, *grads

class ChainEnd(torch.autograd.Function):
    "Mark where values begin their way back."
    @staticmethod
    def forward(ctx, a, b, va, vb):
        ctx.set_materialize_grads(False)
        # results, and not arguments: a second derivative passes here, too
        a, b = a.view_as(a), b.view_as(b)
        ctx.save_for_backward(a, b)
        return a, b

    @staticmethod
    def backward(
        ctx, # of autograd
        ga, # gradient of the first stream, or `None`
        gb, # gradient of the second stream, or `None`
    ): # two gradients and two values
        "Put the last streams into the gradient slots of the values."
        return ga, gb, *ctx.saved_tensors

SPAN = 2**17 # parameters that share a function

def spans(
    steps, # of the chain
    limit:int=SPAN, # parameters that share a function
)->list: # lists of steps
    "Gather neighbours whose parameters together are few."
    found, size = [], limit + 1
    for step in steps:
        n = sum(p.numel() for p in step.params)
        if size + n > limit: found, size = [*found, []], 0
        found[-1].append(step)
        size += n
    return found

KEEP = 24*2**20 # bytes

def kept_steps(
    steps, # of the chain
    stream:Tensor, # one of the two
    keep:int=KEEP, # bytes; 0: nothing is stored
)->int: # how many of the last steps to store
    "Count the last steps that fit in `keep` bytes, or in the room of the widest, by estimate."
    sizes = [step.size(stream) for step in reversed(steps)]
    room = max(keep, *sizes, 0) if keep else 0
    return sum(total <= room for total in itertools.accumulate(sizes))

class ChainStart(torch.autograd.Function):
    "Mark where values end their way back, and compare them with what they were."
    @staticmethod
    def forward(ctx, exact, axis, a, b, *anchors):
        ctx.anchors = len(anchors)
        ctx.kept, ctx.exact, ctx.axis = [sketch(v, axis, exact) for v in (a, b)], exact, axis
        return a.detach(), b.detach()

    @staticmethod
    def backward(
        ctx, # of autograd
        a, # value of the first stream
        b, # value of the second stream
    ): # `None` for each argument of `forward`
        "Compare a sketch of the values with what it was."
        check_return(ctx.kept, [sketch(v, ctx.axis, ctx.exact) for v in (a, b)], ctx.exact)
        return (None,)*(4 + ctx.anchors)

def check_return(
    kept:list[Tensor], # sketches of the streams as they were
    back:list[Tensor], # and as they came back
    exact:bool, # they must be equal
):
    "Raise a RuntimeError where streams did not come back; warn where they overflowed."
    if not kept[0].numel() or not has_values(kept[0]): return
    error, size = (torch.stack([f(v).max() for v in values]).max() for f, values in (
        (torch.abs, [u - v for u, v in zip(kept, back)]), (torch.abs, kept)))
    if error.device.type != 'cpu':
        ensure((error == 0) if exact else (error <= .01*size) | ~error.isfinite(),
               "the streams of a reversible chain came back wrong")
    elif exact and not error == 0:
        raise RuntimeError(f"exact streams must come back bit for bit, but differ by {error:g}: "
                           "an F gave another result the second time (is it random, or does it "
                           "remember?)")
    elif not error.isfinite():
        warnings.warn("the streams of a reversible chain overflowed on their way back: "
                      "gradients are not finite", stacklevel=2)
    elif error > .01*size:
        raise RuntimeError(f"the streams came back with an error of {error:g} at a size of "
                           f"{size:g}, so gradients would be wrong: an F gave another result "
                           "the second time (is it random, or does it remember?), or the chain "
                           "is too deep for its floats: use exact=True")

def frozen_steps(
    steps, # of the chain
    a:Tensor, # first stream
    b:Tensor, # second stream
)->int: # how many of the first steps have no gradient to pass on
    "Count the steps before the first that learns."
    if a.requires_grad or b.requires_grad: return 0
    learns = [any(t is not None and t.requires_grad for t in step.tensors) for step in steps]
    return [*learns, True].index(True)

def run_frozen(
    steps, # that have nothing to learn
    a:Tensor, # first stream
    b:Tensor, # second stream
)->tuple[Tensor,Tensor]: # the two streams behind them
    "Run steps as they are. Raise a RuntimeError where one learns after all."
    for step in steps:
        a, b = step.stored(a, b)
        if a.requires_grad or b.requires_grad:
            raise RuntimeError("a reversible step must own what it learns from, but "
                               f"{type(step.module).__name__} reads a tensor that requires a "
                               "gradient and is neither its parameter nor an argument: pass it "
                               "to the chain, chain(x, tensor)")
    return a, b

def run_head(
    steps, # the chain's links, each of which has listed what it reads
    a:Tensor, # first stream
    b:Tensor, # second stream
    check:bool, # compare what comes back with what was
)->tuple[Tensor,Tensor]: # the two streams behind them
    "Run steps that store nothing."
    if not steps: return a, b
    # a backward pass that asks for any gradient of the first step comes to the chain's start
    va, vb = ChainStart.apply(
        any(step.grid for step in steps), steps[0].axis, a, b, *steps[0].tensors,
    ) if check else (a.detach(), b.detach())
    for span in spans(steps):
        a, b, va, vb, *found = ReversibleSpan.apply(
            span, a, b, va, vb, *(t for step in span for t in step.tensors))
        for step, step.measured in zip(filter(measures, span), found): pass
    return ChainEnd.apply(a, b, va, vb)

def reversible(
    steps:list, # the chain's links
    a:Tensor, # first stream
    b:Tensor, # second, of the same shape
    check:bool=True, # compare what comes back with what was, and exact streams with their range
    keep:int=KEEP, # bytes at the end of the chain that are stored after all; 0: nothing is
)->tuple[Tensor,Tensor]: # the two streams at the end
    "Run a chain whose backward pass needs the memory of one step."
    if is_traced(): return traced(steps, a, b, check)
    exact = [step for step in steps if step.grid] if check and a.numel() else []
    peaks = a.new_zeros(len(exact))
    for step, step.peak in zip(exact, peaks): pass
    begin = end = len(steps)
    if torch.is_grad_enabled():
        for step in steps: step.read()
        begin = frozen_steps(steps, a, b)
        end = max(begin, end - kept_steps(steps, a, keep))
        a, b = run_head(steps[begin:end], *run_frozen(steps[:begin], a, b), check)
        for step in steps[end:]: a, b = step.stored(a, b)
    else:
        for step in steps: a, b = step.plain(a, b)
    if exact: check_range(peaks.max(), exact[0].grid, a.dtype)
    return a, b

def coupled(
    block, # of a `ReversibleSequence`
)->bool: # True: a pair of functions
    "Tell a pair of functions from a bijection of both streams."
    kind = type(block)
    return isinstance(block, nn.ModuleList) or (
        getattr(kind, 'halves', None) is not None and kind.forward is Bijection.forward
        and kind.forward_and_log_det.itself is kind.halves)

def as_block(
    block, # a pair (F, G) of modules, or a module
)->nn.Module: # as the chain holds it
    "Make a block of a chain. Raise a TypeError or ValueError for what is none."
    if isinstance(block, (tuple, list, nn.ModuleList)):
        if len(block) != 2 or not all(isinstance(part, nn.Module) for part in block):
            names = ', '.join(type(part).__name__ for part in block)
            raise ValueError(f"a block is a pair (F, G) of modules, got ({names})")
        return nn.ModuleList(block)
    if not isinstance(block, nn.Module) or not hasattr(block, 'inverse'):
        raise TypeError("a block is a pair (F, G) of modules, or a bijection with an inverse, got "
                        f"{type(block).__name__}: write [(f1, g1), (f2, g2)] for [f1, g1, f2, g2]")
    return block

class BlockList(nn.ModuleList):
    "Hold blocks; each may be given as a pair (F, G), as in a list of Python."
    def __init__(self,
        blocks=(), # each a `RevBlock`, a pair (F, G) of modules, or a `Bijection` of both streams
    ):
        super().__init__(as_block(b) for b in blocks)

    def append(self,
        module, # a block
    ): # the list
        "Add a block at the end."
        return super().append(as_block(module))

    def insert(self,
        index:int, # of the block before which the new one comes
        module, # a block
    ):
        "Add a block somewhere."
        super().insert(index, as_block(module))

    def extend(self,
        modules, # blocks
    ): # the list
        "Add blocks at the end."
        return super().extend(as_block(b) for b in modules)

    def __setitem__(self, index, module): super().__setitem__(index, as_block(module))

@torch.compiler.assume_constant_result
def takes(
    kind:type, # of a module
    name:str, # of an argument
)->bool: # True: its `forward` has that argument, or takes all that are named
    "Tell whether modules of a kind have an argument."
    found = inspect.signature(kind.forward).parameters
    return name in found or any(p.kind is p.VAR_KEYWORD for p in found.values())

def for_part(
    part, # F or G
    arguments, # `Arguments` of the chain
): # `Arguments` of the part
    "Keep the named arguments that a part takes."
    kind = type(getattr(part, '_orig_mod', part)) # of a part that is compiled by itself
    mine = {name: t for name, t in arguments.named.items() if takes(kind, name)}
    if len(mine) == len(arguments.named): return arguments
    return Arguments(arguments.args, mine)

def check_taken(
    steps, # of a chain
    named, # arguments by their names
):
    "Raise a TypeError for an argument that no part of a chain takes."
    lost = {*named} - {name for step in steps for name in step.arguments.named}
    if lost: raise TypeError(f"no F or G of the chain takes an argument {sorted(lost)[0]!r}")

MEMORY = 'reverse', 'store'

def couplings(
    block, # a pair of modules, or a `RevBlock`
    extras, # `Arguments`
    axis, # of the channels
    grid, # the step of exact streams; `None`: floats
    inverse=False, # the way back
): # two `Coupling`s
    "Make two half blocks of a pair of functions."
    parts = block if isinstance(block, nn.ModuleList) else (block.f, block.g)
    s = block.s if getattr(block, 'log_scale', None) is not None else None
    return [Coupling(part, for_part(part, extras), s, axis, grid, inverse) for part in parts]

def check_sequence(
    sequence, # with its blocks
):
    "Raise a ValueError for a setting that is none, or that does not fit the blocks."
    check_grid(sequence.grid)
    if sequence.memory not in MEMORY:
        raise ValueError(f"memory must be one of {list(MEMORY)}, got {sequence.memory!r}")
    for block in filter(coupled, sequence.blocks):
        scaled, grid = getattr(block, 'log_scale', None), getattr(block, 'grid', None)
        if sequence.exact and scaled is not None:
            raise ValueError("exact streams need blocks without a scale: "
                             "RevBlock(..., scale=False)")
        if grid and not sequence.exact:
            raise ValueError("an exact block needs exact streams: "
                             "ReversibleSequence(..., exact=True)")

def check_gathered(
    block, # of a chain
):
    "Raise a ValueError for a block in the care of `fully_shard`, whose hooks would not run."
    if is_sharded(block):
        raise ValueError("a reversible chain runs the parts of a block and not the block, so that "
                         "fully_shard(block) would never gather its parameters: use "
                         "fully_shard(f) and fully_shard(g), or fully_shard(chain)")

class ReversibleBlocks(nn.Module):
    "Hold reversible blocks, and how to run them."
    def __init__(self,
        blocks, # each a `RevBlock`, a pair (F, G) of modules, or a `Bijection` of both streams
        exact:bool=False, # streams on a grid: undone to the last bit, and gradients bit-equal
        grid:float=GRID, # its step, a power of two
        axis:int=-1, # of the channels, which are split in two streams
        memory:str='reverse', # 'reverse': compute again from the end; 'store': plain autograd
        check:bool=True, # of what comes back, see `reversible`
        keep:int=KEEP, # bytes at the end of the chain that are stored after all; 0: nothing is
    ):
        super().__init__()
        self.blocks, self.ways = BlockList(blocks), []
        self.exact, self.grid, self.axis, self.memory, self.check, self.keep = (
            exact, grid, axis, memory, check, keep)
        check_sequence(self)
        self.update_ways()

    def update_ways(self):
        "Give each bijection a module that calls it in both directions, in a list without names."
        if [way and way.bijection for way in self.ways] != [
                None if coupled(b) else b for b in self.blocks]:
            self.ways = [None if coupled(b) else BijectionModule(b) for b in self.blocks]

class ReversibleSteps(ReversibleBlocks):
    "Make the steps of a chain."
    def steps(self,
        extras, # for every F and G, or `Arguments`
        positions, # int64, for bijections
        inverse=False, # the way back
    ): # a list of steps
        "Make the steps of the chain for one pass."
        self.update_ways()
        extras = extras if isinstance(extras, Arguments) else Arguments(extras)
        steps = []
        for block, ways in zip(self.blocks, self.ways):
            check_gathered(block)
            grid = self.grid if self.exact else None
            if ways: steps.append(BijectionStep(block, positions, self.axis, ways, inverse))
            else: steps += couplings(block, extras, self.axis, grid, inverse)
        check_taken(steps, extras.named)
        return steps[::-1] if inverse else steps

def in_forward_mode(
    sequence, # with its parameters
    steps, # of the chain, with their arguments
    streams, # two
)->bool: # True: a tangent passes through the chain
    "Tell whether a pass is one of forward mode, which needs nothing on the way back."
    return has_tangents(lambda: [*streams, *sequence.parameters(), *(
        t for step in steps for t in step.arguments.tensors if t.is_floating_point())])

class ReversibleChain(ReversibleSteps):
    "Lead streams through the blocks, and back."
    def split(self, x, # with an even number of channels along `axis`
    ): # two tensors
        "Split the channels in two streams, on the grid if the chain is exact."
        if not x.is_floating_point():
            raise ValueError(f"a reversible chain needs real floats, got {x.dtype}")
        check_even(x.shape[self.axis], 'to split in two streams')
        return (snap(x, self.grid) if self.exact else x).chunk(2, self.axis)

    def lead(self,
        steps, # of the chain
        streams, # two
    ): # the two streams behind the steps
        "Run the chain, and store no more than `memory` and `keep` ask for."
        if self.memory == 'reverse' and not in_forward_mode(self, steps, streams):
            return reversible(steps, *streams, self.check, self.keep)
        for step in steps: streams = step.plain(*streams)
        return streams

    def lead_and_measure(self,
        steps, # of the chain
        streams, # two
    ): # two streams, and the log-determinant (shape without channels), nats
        "Run the chain, and add up how its steps change volume."
        for step in steps: step.measures = isinstance(step, BijectionStep)
        a, b = self.lead(steps, streams)
        parts = [step.measured if step.measures else step.log_det(a, step.s) for step in steps]
        for step in filter(measures, steps): step.measured = None # read, and let go
        return a, b, sum(parts, torch.zeros_like(a.select(self.axis, 0)))

class MeasuredSequence(ReversibleChain):
    "Measure how a chain changes volume."
    def forward_and_log_det(self,
        x, # with an even number of channels along `axis`
        positions=None, # int64, for bijections
        *extras, # for every F and G
        **named, # likewise, by keyword
    ): # of the shape of `x`; log|det| without the axis of the channels, nats
        "Run the chain, and measure how it changes volume."
        steps = self.steps(Arguments(extras, named), positions)
        a, b, log_det = self.lead_and_measure(steps, self.split(x))
        return torch.cat([a, b], self.axis), log_det

    def inverse_and_log_det(self,
        y, # a result of `forward`
        positions=None, # the same as there
        *extras, # the same as there
        **named, # the same as there
    ): # the input of `forward`; log|det| of the way back
        "Undo the chain, and measure how that changes volume."
        steps = self.steps(Arguments(extras, named), positions, inverse=True)
        a, b = self.split(y)
        b, a, log_det = self.lead_and_measure(steps, (b, a))
        return torch.cat([a, b], self.axis), log_det

class ReversibleSequence(MeasuredSequence):
    "Run reversible blocks in activation memory constant in depth (RevNet, arXiv:1707.04585)."
    def forward(self,
        x, # with an even number of channels along `axis`
        *extras, # for every F and G: tensors, flags, `None`, or tuples and dictionaries of them
        positions=None, # int64, for bijections
        **named, # by keyword, for every F and G that has an argument of that name
    ): # of the shape of `x`
        "Run the chain."
        steps = self.steps(Arguments(extras, named), positions)
        return torch.cat(self.lead(steps, self.split(x)), self.axis)

    def inverse(self,
        y, # a result of `forward`
        *extras, # the same as there
        positions=None, # the same as there
        **named, # the same as there
    ): # the input of `forward`
        "Undo the chain, in constant memory, too."
        steps = self.steps(Arguments(extras, named), positions, inverse=True)
        a, b = self.split(y)
        b, a = self.lead(steps, (b, a))
        return torch.cat([a, b], self.axis)


# enigma_lab.machine.rev_block

# its users look for it here

class BoundedMLP(SavedNumbers):
    "Compute `F(x) = size * tanh(W₂ leaky_relu(W₁ x))`, which one half adds to the other."
    def __init__(self,
        dim:int, # channels in and out
        size:float=.1, # bound on each output at the start
    ):
        super().__init__()
        self.up, self.down = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.first, self.size = size, nn.Parameter(torch.tensor([size]))

    def reset_parameters(self):
        "Set the bound as at the start; the two layers do likewise."
        nn.init.constant_(self.size, self.first)

    def forward(self, x:Tensor)->Tensor: # (..., dim)
        return self.size * torch.tanh(self.down(nn.functional.leaky_relu(self.up(x), .1)))

class CommonScale:
    """Give a block one scale for all channels.

    The block has `dim` and `log_scale`, the number `r`; `None` means s = 1.
    """
    @property
    def s(self)->Tensor|float: # the scale, between 1/e and e
        "Compute the scale."
        return 1. if self.log_scale is None else self.log_scale.squeeze().tanh().exp()

    def log_det(self,
        x:Tensor, # (..., dim), of which the shape counts
    )->Tensor: # dim * log s (...), nats
        "Return the log-determinant of the block."
        if self.log_scale is None: return x.new_zeros(x.shape[:-1])
        return (self.dim * self.log_scale.squeeze().tanh()).expand(x.shape[:-1])

class TwoHalves(SavedNumbers, Bijection):
    "Hold what a block of two halves is made of: what each adds to the other, and a scale."
    def __init__(self,
        dim:int, # channels, even
        f:nn.Module|None=None, # (..., dim/2) -> (..., dim/2), any function; `None`: `BoundedMLP`
        g:nn.Module|None=None, # likewise, from the first half to the second
        scale:bool|None=None, # learn s; False: s = 1, volume kept; `None`: unless exact
        exact:bool=False, # undone to the last bit, for inputs on the grid
        grid:float=GRID, # its step, a power of two
    ):
        super().__init__()
        check_even(dim, 'to split in two halves')
        check_grid(grid)
        if exact and scale: raise ValueError("an exact block keeps volume: use scale=False")
        if scale is None: scale = not exact
        part = ExactMLP if exact else BoundedMLP
        self.dim, self.grid = dim, grid if exact else None
        self.f, self.g = f or part(dim//2), g or part(dim//2)
        self.log_scale = nn.Parameter(torch.zeros(1)) if scale else None

    def reset_parameters(self):
        "Set the scale to 1; the parts do likewise."
        if self.log_scale is not None: nn.init.zeros_(self.log_scale)

    def added(self,
        part, # `f` or `g`
        x, # (..., dim/2), one half
    ): # (..., dim/2), what the other half gains
        "Compute what one half adds to the other, on the grid if the block is exact."
        return snap(part(x), self.grid).to(x.dtype) if self.grid else part(x)

class RevBlock(CommonScale, TwoHalves):
    "Couple two halves additively with a common scale (RevNet, arXiv:1707.04585, eq. 8)."
    def forward_and_log_det(self, x, positions=None):
        check_width(x, self.dim)
        x1, x2 = x.chunk(2, -1)
        y1 = self.s*x1 + self.added(self.f, x2)
        y2 = self.s*x2 + self.added(self.g, y1)
        return torch.cat([y1, y2], -1), self.log_det(x)

    def inverse_and_log_det(self, y, positions=None):
        check_width(y, self.dim)
        y1, y2 = y.chunk(2, -1)
        x2 = (y2 - self.added(self.g, y1)) / self.s
        x1 = (y1 - self.added(self.f, x2)) / self.s
        return torch.cat([x1, x2], -1), -self.log_det(y)

    halves = forward_and_log_det # a chain may run the two halves instead


# enigma_lab.machine.sinkhorn

def check_logits(
    logits:Tensor, # (..., n, n)
    temperature:float=1., # that they are divided by
    iterations:int=1, # of a scaling
):
    "Refuse numbers that give no soft permutation."
    if logits.ndim < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"logits must be square, (..., n, n), got shape {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, to have a gradient, got {logits.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}; at 0 the limit is "
                         "a permutation: use assign(logits)")
    if iterations < 1: raise ValueError(f"iterations must be at least 1, got {iterations}")
    ensure(logits.isfinite(), "logits must be finite, got NaN or infinity", ValueError)

def sinkhorn(
    logits:Tensor, # (..., n, n), floating point, finite
    iterations:int=20, # rounds; each ends with the columns, which then sum to 1
    temperature:float=1., # above 0; the lower, the nearer to a permutation
)->Tensor: # (..., n, n), nonnegative, float32 at least
    "Scale `exp(logits / temperature)` to rows and columns of sum 1 (arXiv:1802.08665, section 3)."
    check_logits(logits, temperature, iterations)
    log_S = at_least_float32(logits) / temperature
    for _ in range(iterations):
        log_S = log_S - log_S.logsumexp(-1, keepdim=True) # rows
        log_S = log_S - log_S.logsumexp(-2, keepdim=True) # columns
    return log_S.exp()

def gumbel_sinkhorn(
    logits:Tensor, # (..., n, n), floating point, finite
    iterations:int=20, # rounds of scaling
    temperature:float=1., # above 0
    generator:torch.Generator|None=None, # of the noise; `None`: torch's own
)->Tensor: # (..., n, n), nonnegative
    "Draw soft permutations (arXiv:1802.08665, section 4)."
    noise = torch.empty_like(logits).exponential_(generator=generator).log()
    return sinkhorn(logits - noise, iterations, temperature)

def as_operator(
    f:Callable, # (scores (n, n), …) -> wiring (n,) int64
)->Callable: # the same, which a compiler may meet
    "Register a function as an operator of PyTorch, which compilers and exporters leave whole."
    name = re.sub(r'\W', '_', __name__) # a copy of this code registers its own
    operator = torch.library.custom_op(f'{name}::{f.__name__}', f, mutates_args=())
    operator.register_fake(lambda scores, *_: scores.new_empty(len(scores), dtype=torch.int64))
    @wraps(f)
    def called(*args): return (operator if torch.compiler.is_compiling() else f)(*args)
    return called

@as_operator
def best_assignment(
    scores:Tensor, # (n, n)
)->Tensor: # (n,) int64
    "Find the permutation with the largest sum of scores, by scipy."
    try: from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ImportError("an assignment needs scipy: pip install 'enigma_lab[lm]'") from None
    numbers = scores.double().cpu()
    numbers = plain_value(numbers).tolist() if in_transform() else numbers.numpy()
    wiring = linear_sum_assignment(numbers, maximize=True)[1]
    return torch.as_tensor(wiring, dtype=torch.int64, device=scores.device)

def assign(
    scores:Tensor, # (n, n), of output i and input j
)->Tensor: # wiring (n,) int64: output i takes input `wiring[i]`
    "Find the permutation with the largest sum of scores, exactly (Jonker and Volgenant, 1987)."
    if scores.ndim != 2: raise ValueError(
        f"scores must be one square matrix, got shape {tuple(scores.shape)}")
    check_logits(scores)
    return best_assignment(scores.detach())

class LearnedWiring(ABC, nn.Module):
    "Hold logits, and a temperature for the soft matrix that they give."
    def __init__(self,
        shape:tuple, # of the logits
        hard:bool=True, # permute exactly, learn straight through; False: mix by the soft matrix
        temperature:float=1., # of the soft matrix at the start, above 0
        least:float=.1, # where `anneal` ends, above 0
        iterations:int=20, # rounds of scaling
    ):
        super().__init__()
        if not (temperature > 0 and least > 0): raise ValueError(
            f"temperature and least must be above 0, got {temperature} and {least}")
        self.hard, self.iterations = hard, iterations
        self.start, self.least, self.found = temperature, least, {}
        self.logits = nn.Parameter(torch.empty(shape))
        self.register_buffer('temperature', torch.empty(()))

    @abstractmethod
    def matrix(self)->Tensor: # S (dim, dim), row i for output i
        "Compute the soft permutation at the present temperature."

    @abstractmethod
    def solve(self,
        logits:Tensor, # numbers that can be looked at
    )->Tensor: # (dim,) int64
        "Find the best wiring for logits."

class HardWiring(LearnedWiring):
    "Find the hard wiring of the logits."
    def forward(self,
        read, # (this module) -> anything: what is done with the wiring
    ): # what `read` returns
        "Let a function read the wiring, within the hooks of this module."
        return read(self)

    def wiring(self)->Tensor: # (dim,) int64: output i takes input `wiring[i]`
        "Return the best wiring, and remember it until the logits change."
        if torch.compiler.is_compiling(): return self.solve(self.logits.detach())
        logits = plain_value(self.logits.detach())
        if not has_values(logits): # on the meta device
            return torch.empty(self.dim, dtype=torch.int64, device=logits.device)
        if in_transform(): return self.solve(logits)
        return remember(self.found, 'wiring', logits, lambda: self.solve(logits))

class Wires(HardWiring):
    "Pass signals through a wiring that learns."
    def passed(self,
        x:Tensor, # (..., dim)
        ahead:bool=True, # False: the way back
    )->Tensor: # (..., dim)
        "Permute channels exactly; while the wiring is soft, mix them by its matrix."
        if not self.hard and not ahead: raise ValueError(SOFT)
        if not self.hard: return x @ self.matrix().to(x.dtype).T
        wiring = self.wiring()
        y = x[..., wiring if ahead else wiring.argsort()]
        if not (torch.is_grad_enabled() and self.logits.requires_grad): return y
        S = self.matrix().to(x.dtype)
        soft = x.detach() @ (S.T if ahead else S)
        return y - (soft.detach() - soft) # minus zero, with the gradient of the soft one

SOFT = ("a soft permutation has no exact inverse, for its matrix is only nearly a permutation "
        "and may be singular; make it hard first: harden(module)")

class Assignment(Wires):
    "Learn any permutation: one logit for each pair of an output and an input."
    def __init__(self,
        dim:int, # channels
        seed:int=0, # which permutation it begins with
        hard:bool=True, # permute exactly, learn straight through; False: mix by the soft matrix
        temperature:float=1., # of the soft matrix at the start, above 0
        least:float=.1, # where `anneal` ends, above 0
        iterations:int=20, # rounds of scaling
    ):
        super().__init__((dim, dim), hard, temperature, least, iterations)
        self.dim, self.seed = dim, seed
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        "Give half of the soft matrix to a drawn permutation, and share the rest out evenly."
        drawn = F.one_hot(signed_permutation(self.dim, self.seed)[0], self.dim)
        self.logits.copy_(drawn * math.log(self.dim))
        self.temperature.fill_(self.start)

    def matrix(self): return sinkhorn(self.logits / self.temperature, self.iterations)
    def solve(self, logits): return assign(logits)

def soft_log_det(
    wires:Wires, # of any kind
    x:Tensor, # (..., dim)
)->Tensor: # (...), nats
    "Return log|det| of a wiring for every vector: 0 while it is hard."
    if wires.hard: return x.new_zeros(x.shape[:-1])
    return as_nats(wires.matrix().double().slogdet()[1], x).expand(x.shape[:-1])

class TurnedWires(SteppingRotor):
    "Turn a learned wiring, held as `wires`, by p contacts."
    def turned(self,
        x:Tensor, # (..., dim)
        positions:Tensor|None, # int64, broadcastable to `x.shape[:-1]`
        ahead:bool, # False: the way back
    )->tuple[Tensor,Tensor]: # (..., dim); log-determinants (...), nats
        "Pass vectors through the wiring as it stands at each position."
        p = self.stands_at(positions, x)
        y, log_det = self.wires(lambda w: (w.passed(roll(x, p), ahead), soft_log_det(w, x)))
        return roll(y, -p), log_det

    def forward_and_log_det(self, x, positions=None): return self.turned(x, positions, True)
    def inverse_and_log_det(self, y, positions=None): return self.turned(y, positions, False)

class SinkhornRotor(TurnedWires):
    "Turn a permutation that is learned (Gumbel-Sinkhorn, arXiv:1802.08665); exact while hard."
    def __init__(self,
        dim, # channels
        num_positions=None, # K; `None`: `dim`
        place=0, # which digit of the odometer, 0 the fastest
        key=0, # where the odometer starts
        seed:int=0, # which permutation it begins with
        hard:bool=True, # permute exactly, learn straight through; False: mix by the soft matrix
        temperature:float=1., # of the soft matrix at the start, above 0
        least:float=.1, # where `anneal` ends, above 0
        iterations:int=20, # rounds of scaling
    ):
        super().__init__(dim, dim if num_positions is None else num_positions, place, key)
        check_contacts(dim, self.num_positions)
        self.wires = Assignment(dim, seed, hard, temperature, least, iterations)

@torch.no_grad()
def anneal(
    module:nn.Module, # anything that holds learned wirings
    factor:float=.9, # that each temperature is multiplied by
)->list[float]: # the temperatures after it
    "Lower the temperature of every learned wiring in a module, down to the least one."
    found = [m for m in module.modules() if isinstance(m, LearnedWiring)]
    if not found: raise ValueError(
        f"a module that is annealed must hold a learned wiring, got {type(module).__name__}")
    return [m.temperature.mul_(factor).clamp_(min=m.least).item() for m in found]

def harden(
    module:nn.Module, # anything that holds learned wirings
    hard:bool=True, # False: make them soft
):
    "Make every learned wiring in a module permute exactly, or mix by its soft matrix."
    for m in module.modules():
        if isinstance(m, LearnedWiring): m.hard = hard

class SinkhornRotorStack(Chain):
    "Step learned permutations like an odometer: rotor i is digit i of the position."
    def __init__(self,
        dim:int, # channels
        num_rotors:int, # n
        num_positions:int|None=None, # K; `None`: `dim`
        key:int=0, # where the odometer starts
        seed:int=0, # rotor i begins with the permutation of seed + i
        **wires, # hard, temperature, least and iterations of each rotor
    ):
        super().__init__(*(SinkhornRotor(dim, num_positions, i, key, seed + i, **wires)
                           for i in range(num_rotors)))

    def anneal(self,
        factor:float=.9, # that each temperature is multiplied by
    )->list[float]: # the temperatures after it
        "Lower the temperature of all rotors."
        return anneal(self, factor)


# enigma_lab.machine.enigma

rotor_kinds = ('table', 'roll', 'static', 'permutation', 'sinkhorn', 'none')

def make_rotor(
    kind:str, # one of `rotor_kinds`
    dim:int, # channels
    num_positions:int, # K
    place:int=0, # which digit of the odometer, 0 the fastest
    parametrization:str='plu', # 'plu', 'orthogonal' or 'lifted', for learned rotors
    key:int=0, # where the odometer starts
    seed:int=0, # of the wiring
)->Bijection: # the identity for 'none'
    "Make one rotor by the name of its kind."
    if kind not in rotor_kinds:
        raise ValueError(f"rotor must be one of {list(rotor_kinds)}, got {kind!r}")
    if kind == 'none': return Chain()
    if kind == 'static': return InvertibleConv1x1(dim, parametrization, seed)
    if kind in ('permutation', 'sinkhorn'):
        wheel = PermutationRotor if kind == 'permutation' else SinkhornRotor
        return wheel(dim, num_positions, place, key, seed)
    return dict(table=TableRotor, roll=RollRotor)[kind](
        dim, num_positions, place, key, parametrization=parametrization, seed=seed)

def make_rotors(
    kind, # one of `rotor_kinds`
    dim, # channels
    num_rotors, # n
    num_positions, # K
    parametrization='plu', # 'plu', 'orthogonal' or 'lifted', for learned rotors
    key=0, # where the odometer starts
    seed=0, # rotor i draws its wiring from seed + i
)->Chain: # empty for 'none'
    "Make a row of rotors that step like an odometer."
    wheels = [make_rotor(kind, dim, num_positions, i, parametrization, key, seed + i)
              for i in range(num_rotors)]
    return Chain(*([] if kind == 'none' else wheels))

def make_reflector(
    dim:int, # channels, even
    reciprocal:bool, # an exchange of the halves, without parameters
    exact:bool, # undone to the last bit
    seed:int, # of its first parameters
)->SwapHalves: # a learned one is a `SwapHalves`, too
    "Make the reflector of a machine."
    if reciprocal: return SwapHalves(dim)
    return (ExactReflector if exact else Reflector)(dim, seed)

class EnigmaParts(CompositeBijection):
    "Build the parts of the machine."
    def __init__(self,
        dim:int, # channels, even
        num_rev_blocks:int=6, # nonlinear blocks N
        num_rotors:int=4, # rotors n
        num_positions:int=16, # positions of a rotor K; the machine repeats after K^n
        rotor:str='table', # 'table' | 'roll' | 'static' | 'permutation' | 'sinkhorn' | 'none'
        plugboard:bool=True, # exchange channels in pairs at both ends
        reciprocal:bool=False, # go back along the same path: f(f(x)) = x
        parametrization:str='plu', # how a learned rotor is written: 'plu' | 'orthogonal'
        scale:bool|None=None, # let blocks change volume; `None`: unless the machine is exact
        exact:bool=False, # undo to the last bit: all parts exact, inputs rounded to the grid
        key:int=0, # the position of the first letter
        seed:int=0, # of every fixed wiring
    ):
        super().__init__()
        check_even(dim, 'to split in two halves')
        self.dim, self.reciprocal, self.exact = dim, reciprocal, exact
        self.plugboard = Plugboard(dim, None if plugboard else 0, seed)
        if exact: parametrization = 'lifted'
        self.rotors = make_rotors(
            rotor, dim, num_rotors, num_positions, parametrization, key, seed)
        self.rev_blocks = nn.ModuleList(
            RevBlock(dim, scale=scale, exact=exact) for _ in range(num_rev_blocks))
        self.reflector = make_reflector(dim, reciprocal, exact, seed)

class Enigma(EnigmaParts):
    """Send vectors through the whole machine, a bijection that steps with the position.

    It is the network of github.com/lizixi-0x2F/Enigma, made exact.
    """
    def route(self): # [(bijection, True if passed forwards)]
        "List the parts on the signal's way in and back."
        blocks = [(block, True) for block in self.rev_blocks]
        way_in = [(self.plugboard, True), (self.rotors, True), *blocks]
        if self.reciprocal: way_back = [(part, False) for part, _ in reversed(way_in)]
        else: way_back = [*reversed(blocks), (self.plugboard, False)]
        return [*way_in, (self.reflector, True), *way_back]

    def forward_and_log_det(self, x, positions=None):
        return self.within_range(super().forward_and_log_det, x, positions)

    def inverse_and_log_det(self, y, positions=None):
        return self.within_range(super().inverse_and_log_det, y, positions)

    def within_range(self,
        way, # (x, positions) -> (y, log-determinants)
        x, # (..., dim)
        positions, # int64, broadcastable to `x.shape[:-1]`; `None`: all zero
    ): # what `way` returns
        "Pass vectors one way; an exact machine rounds them first and checks their range after."
        if not self.exact: return way(x, positions)
        y, log_det = way(snap(x), positions)
        if not torch.compiler.is_compiling():
            check_range(y.detach().abs().amax() if y.numel() else torch.zeros(()), GRID, y.dtype)
        return y, log_det


# enigma_lab.lm.model

class TransformersFields:
    "Describe the fields that every configuration of transformers has; it sets none of them."
    transformers_version:str|None # version that wrote the configuration
    architectures:list|None # names of the model classes that were saved with it
    output_hidden_states:bool # return the stream after each block
    return_dict:bool # results with names, in place of tuples
    dtype:str|None # of the weights; `None`: float32
    chunk_size_feed_forward:int # not used
    is_encoder_decoder:bool # False: a decoder alone
    id2label:dict|None # not used
    label2id:dict|None # not used
    problem_type:str|None # not used

class FieldNames:
    "Say the sizes of a configuration by the field's names, too; a file has ours alone."
    def to_dict(self)->dict: # of all fields, and of `attribute_map`'s names for them
        "List the fields under both names."
        return super().to_dict() | {name: getattr(self, name) for name in self.attribute_map}

    def to_diff_dict(self)->dict: # of the fields that differ from the defaults
        "List what is written to a file."
        found = super().to_diff_dict()
        return {name: value for name, value in found.items() if name not in self.attribute_map}

class EnigmaConfig(FieldNames, TransformersFields, PreTrainedConfig):
    "Hold the shape of an Enigma language model."
    model_type = 'enigma'
    keys_to_ignore_at_inference = ['past_key_values']
    attribute_map = dict(hidden_size='dim', num_hidden_layers='num_layers',
                         num_attention_heads='num_heads', max_position_embeddings='max_len')

    vocab_size:int = 512 # V, rows of the embedding
    dim:int = 192 # d, features of a token
    num_layers:int = 4 # L, transformer blocks
    num_heads:int = 6 # H, attention heads
    mlp_dim:int = 0 # features inside a block's network; 0: 4d
    max_len:int = 256 # tokens of context in training
    activation:str = 'gelu' # of a block's network: 'gelu' | 'relu2', the square of ReLU
    norm:str = 'rms' # before each part of a block: 'rms' | 'layer', quicker on a CPU
    qk_norm:bool = False # queries and keys of a head have one size
    bias:bool = True # the linear layers of a block have biases
    gram_rows:int = 0 # R, rows of a table for each length of runs of tokens; 0: no tables
    gram_length:int = 5 # N, tokens of the longest run
    gram_copies:int = 0 # C, of the lengths 3, 5, 8, 13, 21: runs whose last continuation is read
    use_alibi:bool = True # distances lower the attention
    position_rows:int = 0 # rows of a learned position table; 0: none
    attn_dropout:float = 0. # probability of dropping an attention weight
    dropout:float = 0. # probability of dropping a feature of a block's output
    machine:str = 'none' # 'none' | 'input' | 'both' | 'between'
    reversible:bool = False # two streams that change each other in turn, trained in constant memory
    exact:bool = False # streams and machine on a grid: undone to the last bit
    grid:float = GRID # the step of exact streams, a power of two
    num_rev_blocks:int = 2 # N, reversible blocks of the machine
    num_rotors:int = 2 # n, wheels
    num_positions:int = 16 # K, positions of a wheel
    rotor:str = 'table' # 'table' | 'roll' | 'static' | 'permutation' | 'sinkhorn' | 'none'
    parametrization:str = 'orthogonal' # how a learned wheel is written: 'orthogonal' | 'plu'
    plugboard:bool = True # swap channels at both ends of the machine
    reciprocal:bool = False # the machine is its own inverse
    rev_scale:bool = False # let reversible blocks change volume, as in `brief-*`
    machine_seed:int = 0 # of the fixed wiring
    tie_word_embeddings:bool = True # the head is the embedding
    use_cache:bool = True # keep keys and values while generating
    pad_token_id:int|None = 0 # row of <|pad|>
    bos_token_id:int|None = 1 # row of <|bos|>
    eos_token_id:int|None = 2 # row of <|eos|>

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_config(self)

    @classmethod
    def preset(cls,
        name:str, # a key of `presets`
        **changes, # fields that differ from the preset's
    )->'EnigmaConfig': # checked
        "Make a named configuration, with changes."
        if name not in presets:
            raise ValueError(f"preset must be one of {sorted(presets)}, got {name!r}")
        return cls(**{**presets[name], **changes})

machine_places = ('none', 'input', 'both', 'between')

def relu2(
    x:Tensor, # any shape
)->Tensor: # the same shape
    "Compute the square of what is above 0 (Primer, arXiv:2109.08668, section 4)."
    return F.relu(x).square()

activations = dict(gelu=F.gelu, relu2=relu2)
norms = dict(rms=F.rms_norm, layer=F.layer_norm)

def make_norm(
    config, # an `EnigmaConfig`
)->nn.Module: # over the features of a token
    "Make the norm before a part of a block."
    if config.norm == 'rms': return nn.RMSNorm(config.dim, eps=1e-6)
    return nn.LayerNorm(config.dim, eps=1e-6, bias=False)

def check_sizes(
    c:EnigmaConfig, # any
):
    "Refuse sizes and probabilities that no model can have."
    for name in ('vocab_size', 'dim', 'num_heads', 'max_len', 'num_positions'):
        if getattr(c, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(c, name)}")
    for name in ('num_layers', 'num_rev_blocks', 'num_rotors', 'position_rows', 'mlp_dim',
                 'gram_rows'):
        if getattr(c, name) < 0:
            raise ValueError(f"{name} must be at least 0, got {getattr(c, name)}")
    for name in ('dropout', 'attn_dropout'):
        if not 0 <= getattr(c, name) < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {getattr(c, name)}")
    if c.dim % 2:
        raise ValueError(f"dim must be even, for the machine splits it in two halves, got {c.dim}")
    if c.dim % c.num_heads:
        raise ValueError(f"num_heads must divide dim={c.dim}, got {c.num_heads}")
    if not 0 <= c.gram_copies <= len(LENGTHS):
        raise ValueError(f"gram_copies must lie in 0 … {len(LENGTHS)}, the number of {LENGTHS}, "
                         f"got {c.gram_copies}")
    if c.gram_length < 2:
        raise ValueError(f"gram_length must be at least 2, for one token has a row of its own, "
                         f"got {c.gram_length}")

def check_streams(
    c:EnigmaConfig, # any
):
    "Refuse a machine or a grid that does not go with the streams."
    if c.machine == 'between' and not c.reversible:
        raise ValueError(
            "machine='between' mixes two streams, got reversible=False; set reversible=True")
    if c.exact and not c.reversible:
        raise ValueError(
            "exact=True needs two streams that can be undone, got reversible=False; set "
            "reversible=True")
    check_grid(c.grid)
    if c.exact and c.machine != 'none' and c.grid != GRID:
        raise ValueError(f"an exact machine works on the grid of {GRID:g}, got grid={c.grid:g}")
    if c.exact and c.rev_scale:
        raise ValueError("an exact machine keeps volume, got rev_scale=True")

def check_config(
    c:EnigmaConfig, # any
):
    "Refuse a configuration that no model can have."
    check_sizes(c)
    if c.activation not in activations:
        raise ValueError(f"activation must be one of {list(activations)}, got {c.activation!r}")
    if c.norm not in norms:
        raise ValueError(f"norm must be one of {list(norms)}, got {c.norm!r}")
    if c.machine not in machine_places:
        raise ValueError(f"machine must be one of {list(machine_places)}, got {c.machine!r}")
    check_streams(c)
    if c.rotor not in rotor_kinds:
        raise ValueError(f"rotor must be one of {list(rotor_kinds)}, got {c.rotor!r}")
    if 0 < c.position_rows < c.max_len:
        raise ValueError(
            f"position_rows must be 0 or at least max_len={c.max_len}, got {c.position_rows}")

_brief = dict(machine='input', rotor='table', parametrization='plu', rev_scale=True,
              position_rows=8192, num_positions=16)
# what costs a processor least, for minutes of training
_quick = dict(dim=160, num_heads=2, max_len=256, activation='relu2', norm='layer', qk_norm=True,
              bias=False, tie_word_embeddings=False)
presets = {
    'smoke': dict(machine='input', dim=32, num_layers=2, num_heads=2, max_len=16, num_rev_blocks=1,
                  num_rotors=2, num_positions=4),
    'cpu': dict(dim=128, num_layers=4, num_heads=4, max_len=256, num_rev_blocks=2, num_rotors=2,
                num_positions=16),
    'quick': dict(_quick, num_layers=4, max_len=512, gram_rows=2**13, gram_copies=3),
    'hybrid': dict(_quick, num_layers=4),
    'base': dict(vocab_size=11_392, dim=640, num_layers=8, num_heads=10, max_len=2048,
                 num_rev_blocks=2, num_rotors=3, num_positions=16),
    'brief-148m': dict(_brief, vocab_size=21_128, dim=768, num_layers=12, num_heads=12,
                       max_len=2048, num_rev_blocks=6, num_rotors=4, dropout=.1),
    'brief-001': dict(_brief, vocab_size=21_128, dim=512, num_layers=6, num_heads=8, max_len=256,
                      num_rev_blocks=4, num_rotors=2, dropout=.1, attn_dropout=.15),
    'brief-50m': dict(_brief, vocab_size=21_128, dim=512, num_layers=8, num_heads=8, max_len=256,
                      num_rev_blocks=4, num_rotors=2, dropout=.1),
    'brief-002': dict(_brief, vocab_size=11_392, dim=512, num_layers=8, num_heads=8, max_len=2048,
                      num_rev_blocks=4, num_rotors=2, dropout=.1)}

class Linear(nn.Linear):
    "Map linearly, and know the spread of the weights at the start."
    def __init__(self,
        inputs:int, # features of the input
        outputs:int, # features of the result
        start:float, # standard deviation of the weights at the start
        bias:bool=True, # add a bias, zero at the start
    ):
        super().__init__(inputs, outputs, bias)
        self.start = start

    def reset_parameters(self):
        "Draw the weights; within the constructor as torch does, to be drawn again by the model."
        if not hasattr(self, 'start'): return super().reset_parameters()
        init.normal_(self.weight, std=self.start)
        if self.bias is not None: init.zeros_(self.bias)

class Dropout(nn.Dropout):
    "Drop features as `nn.Dropout` does, which draws its mask and needs no key."
    def __init__(self,
        p:float=.5, # probability of dropping a feature
        inplace:bool=False, # change the input
    ):
        super().__init__(p, inplace)

    def forward(self, x, key=None): return super().forward(x)

def make_dropout(
    config:EnigmaConfig, # of the model
    p:float, # probability of dropping a feature
    place:int, # a number for this dropout alone, of all in the model
)->nn.Module: # called with features and a key
    "Make a dropout that can be repeated where a block runs twice."
    return CounterDropout(p, place) if config.reversible else Dropout(p)

class AttentionWeights(nn.Module):
    "Hold the weights of an attention, and its dropouts."
    def __init__(self,
        config:EnigmaConfig, # shape
        layer_idx:int, # which layer, for the cache
    ):
        super().__init__()
        self.num_heads, self.layer_idx = config.num_heads, layer_idx
        d, start, last = config.dim, config.dim**-.5, .02/math.sqrt(2*config.num_layers)
        self.norm, self.size = make_norm(config), norms[config.norm] if config.qk_norm else None
        self.q_proj, self.k_proj, self.v_proj = (Linear(d, d, start, config.bias)
                                                 for _ in range(3))
        self.o_proj = Linear(d, d, last, config.bias)
        self.drop_weights = make_dropout(config, config.attn_dropout, 3*layer_idx)
        self.dropout = make_dropout(config, config.dropout, 3*layer_idx + 1)

    def weight_dropout(self,
        key:Tensor|None, # of this pass's dropout
    ): # probability for torch's kernel, or a function where the mask has to be repeated
        "Choose how attention weights are dropped."
        p = self.drop_weights.p if self.training else 0.
        counted = p and isinstance(self.drop_weights, CounterDropout)
        return partial(self.drop_weights, key=key) if counted else p

def note_weights(
    found:list, # gets the weights
    dropout, # a probability, or a function
    weights:Tensor, # (B, H, T, S) of an attention
)->Tensor: # (B, H, T, S), some of them dropped
    "Note an attention's weights on their way to the dropout."
    found.append(weights)
    return dropout(weights) if callable(dropout) else F.dropout(weights, dropout)

class Attention(AttentionWeights):
    "Compute a norm and causal self-attention with ALiBi (arXiv:2108.12409) in widened heads."
    is_causal = True

    def forward(self,
        x:Tensor, # (B, T, d)
        q_front:Tensor|None, # ALiBi's numbers to put before the queries; `None`: the mask has them
        k_front:Tensor|None, # the same for the keys, those in the cache included
        mask:Tensor|None=None, # see `causal_attention`
        key:Tensor|None=None, # of this pass's dropout
        cache=None, # keys and values of earlier tokens; `None`: there are none
        attentions:list|None=None, # gets the weights (B, H, T, S) of this layer
    )->Tensor: # (B, T, d)
        "Let each token look at those before it and at itself."
        (B, T, d), x = x.shape, self.norm(x)
        D = d // self.num_heads
        q, k, v = (proj(x).view(B, T, self.num_heads, D).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.size is not None: q, k = self.size(q, (D,)), self.size(k, (D,))
        if cache is not None: k, v = cache.update(k, v, self.layer_idx)
        # a static cache that is being filled: the rest of it is empty
        if mask is None and 1 < T < k.shape[2]: k, v = k[:, :, :T], v[:, :, :T]
        # (B, H, T, W) and (B, H, S, W): a cache holds keys as they are, for any library to handle
        if q_front is not None:
            k_front = k_front[:, :, :k.shape[2]]
            q, k, v = append_alibi(q, q_front), append_alibi(k, k_front), append_alibi(v)
        drop = self.weight_dropout(key)
        if attentions is not None: drop = partial(note_weights, attentions, drop)
        out = causal_attention(q, k, v, D**-.5, mask, drop)[..., :D]
        return self.dropout(self.o_proj(out.transpose(1, 2).reshape(B, T, d)), key)

class MLP(nn.Module):
    "Compute a norm and two layers."
    def __init__(self,
        config:EnigmaConfig, # shape
        layer_idx:int, # which layer
    ):
        super().__init__()
        width, last = config.mlp_dim or 4*config.dim, .02/math.sqrt(2*config.num_layers)
        self.norm = make_norm(config)
        self.up_proj = Linear(config.dim, width, config.dim**-.5, config.bias)
        self.down_proj = Linear(width, config.dim, last, config.bias)
        self.act = activations[config.activation]
        self.dropout = make_dropout(config, config.dropout, 3*layer_idx + 2)

    def forward(self, h, key=None): # (B, T, d)
        return self.dropout(self.down_proj(self.act(self.up_proj(self.norm(h)))), key)

class Block(GradientCheckpointingLayer):
    "Compute one pre-norm transformer block."
    def __init__(self,
        config:EnigmaConfig, # shape
        layer_idx:int, # which layer
    ):
        super().__init__()
        self.attn, self.mlp = Attention(config, layer_idx), MLP(config, layer_idx)
        self.grid = config.grid if config.exact else None

    def steps(self,
        *extras, # of the attention; the last, the key, is for the network, too
        **more, # of the attention: a cache, and where it notes its weights
    )->list: # two reversible steps
        "Write the block as reversible steps of two streams."
        more = {name: value for name, value in more.items() if value is not None}
        attn = partial(self.attn, **more) if more else self.attn
        return [Coupling(attn, extras, grid=self.grid),
                Coupling(self.mlp, extras[-1:], grid=self.grid)]

    # h, result: (B, T, d), or a pair of them, the two streams of a reversible model
    def forward(self, h, front, mask, key=None, cache=None, attentions=None):
        if isinstance(h, tuple):
            steps = self.steps(*front, mask, key, cache=cache, attentions=attentions)
            for step in steps: h = step.plain(*h)
            return h
        h = h + self.attn(h, *front, mask, key, cache, attentions)
        return h + self.mlp(h, key)

class OwnMemory:
    """Load models into memory of our own, and save them with their code.

    Tensors mapped from a file are aligned otherwise, which changes the last bits of a product.
    """
    @classmethod
    def from_pretrained(cls,
        *args, # of transformers' `from_pretrained`: a folder or a hub id first
        **kwargs, # of the same
    )->PreTrainedModel: # of this class; with output_loading_info a pair, as there
        "Load a model as transformers does, and copy its weights."
        loaded = super().from_pretrained(*args, **kwargs)
        for p in (loaded[0] if isinstance(loaded, tuple) else loaded).parameters():
            p.data = p.data.clone()
        return loaded

    def save_pretrained(self,
        save_directory, # a path
        is_main_process:bool=True, # of several, the one that writes
        *args, # of transformers' `save_pretrained`
        **kwargs, # of the same
    ):
        "Save a model as transformers does, with the code to load it elsewhere."
        if is_main_process:
            self.config.auto_map = write_code(save_directory, type(self))
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

def reset_missing(
    module:nn.Module, # with a `reset_parameters`
):
    "Reset the parameters and buffers of a module, but for those that a checkpoint has brought."
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    loaded = [(t, t.clone()) for _, t in own if getattr(t, '_is_hf_initialized', False)]
    module.reset_parameters()
    for t, values in loaded: t.copy_(values)

class Switches:
    "Answer what transformers switches on and off."
    def gradient_checkpointing_enable(self,
        *args, # of transformers' method
        **kwargs, # of the same
    ):
        "Store less while training, for more time; say so where nothing is stored anyway."
        super().gradient_checkpointing_enable(*args, **kwargs)
        if self.config.reversible: warnings.warn(
            "a reversible model stores no activations of its blocks, so gradient checkpointing "
            "does nothing", stacklevel=2)

    @classmethod
    def _can_set_attn_implementation(cls): return True # 'sdpa' and 'eager' give the same

class EnigmaPreTrainedModel(OwnMemory, Switches, PreTrainedModel):
    "Provide what the bare model and the language model share."
    config_class = EnigmaConfig
    base_model_prefix = 'model'
    supports_gradient_checkpointing = True
    _no_split_modules = ['Block']
    _supports_sdpa = True
    _can_compile_fullgraph = True

    def __init__(self,
        config:EnigmaConfig, # shape
    ):
        super().__init__(config)
        self.is_shape = torch.empty(0).is_meta # built without numbers, to be loaded

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, (Linear, Grams, Copies)): module.reset_parameters()
        elif isinstance(module, nn.Embedding): init.normal_(module.weight, std=.02)
        # what a checkpoint lacks; a constructor with numbers has done it
        elif self.is_shape and hasattr(module, 'reset_parameters'): reset_missing(module)

def key_positions(
    positions:Tensor, # (B, T), of the queries
    attention_mask:Tensor|None, # (B, S), 1 for tokens and 0 for padding
    cache, # keys and values of earlier tokens; `None`: there are none
)->Tensor|None: # (B, S), of all keys that the attention sees; `None`: those of the queries
    "Find the place in its text of each token that is in the cache or comes into it."
    if cache is None: return None
    T, device = positions.shape[1], positions.device
    S, _ = cache.get_mask_sizes(T, 0)
    if attention_mask is not None and attention_mask.ndim == 2:
        seen = F.pad(attention_mask.long(), (0, S - attention_mask.shape[1])) # static: has room
        known = (seen.cumsum(-1) - 1).clamp(min=0)
        if not T: return known
        new = torch.arange(T, device=device) + cache.get_seq_length()
        # positions may be counted from elsewhere: what is cached moves along
        first = seen[:, new].argmax(-1, keepdim=True)
        ahead = positions.gather(1, first) - known[:, new].gather(1, first)
        return (known + ahead).clamp(min=0).index_copy(1, new, positions)
    # without padding, what is cached stands right before
    ahead = torch.arange(S, device=device) - (cache.get_seq_length() + T - 1)
    return (positions[:, -1:] + ahead).clamp(min=0)

def last_columns(
    attention_mask:Tensor|None, # (B, N), 1 for tokens and 0 for padding
    length:int, # T, tokens that are given
    cache, # keys and values of earlier tokens; `None`: there are none
)->Tensor|None: # (B, S) at most, for the S tokens that are given or cached
    "Leave out of a mask the tokens that are neither given nor cached: they come first."
    if attention_mask is None or attention_mask.ndim != 2: return attention_mask
    S = length if cache is None else cache.get_mask_sizes(length, 0)[0]
    return attention_mask[:, -S:] if attention_mask.shape[1] > S > 0 else attention_mask

def is_packed(
    position_ids:Tensor|None, # (B, T) or (1, T)
    attention_mask:Tensor|None, # (B, S)
)->bool: # True: a row holds several texts
    "Tell whether positions begin again."
    if position_ids is None or attention_mask is not None or position_ids.shape[-1] == 1:
        return False
    return not torch.compiler.is_compiling() and bool((position_ids.diff(dim=-1) != 1).any())

def drop_cache(
    cache, # a new one, the one that was given, or `None`
    given, # the cache that was given, or `None`
)->None:
    "Drop a new cache; raise a ValueError for one that was given: it would mix a row's texts."
    if cache is not None and given is not None: raise ValueError(
        "a cache holds one text a row, got position_ids that begin again; leave past_key_values "
        "out, or give each text a row of its own")

def token_positions(
    h:Tensor, # (B, T, d), for its shape
    attention_mask:Tensor|None, # (B, S), 1 for tokens and 0 for padding
    position_ids:Tensor|None, # (B, T) or (1, T)
    past:int, # tokens in the cache
)->Tensor: # (B, T) int64
    "Find the place of each token in its text."
    B, T = h.shape[:2]
    if position_ids is not None: return position_ids.expand(B, T)
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
    return torch.arange(past, past + T, device=h.device).expand(B, T)

def alibi_features(
    config:EnigmaConfig, # shape
    positions:Tensor, # (B, T)
    dtype:torch.dtype, # of queries and keys
    keys:Tensor|None=None, # (B, S), positions of the keys; `None`: those of the queries
)->tuple[Tensor,Tensor]: # for queries and for keys; zeros without ALiBi
    "Compute what every layer puts in front of its queries and keys."
    shape = config.num_heads, config.dim//config.num_heads, dtype
    q, k = alibi_dims(positions, *shape)
    if keys is not None: _, k = alibi_dims(keys, *shape)
    return (q, k) if config.use_alibi else (torch.zeros_like(q), torch.zeros_like(k))

def short_on_cpu(
    config:EnigmaConfig, # shape
    length:int, # T
    device, # where the model is
    dtype:torch.dtype, # of queries and keys
)->bool: # True: the mask
    "Decide whether distances are quicker in a mask than in wider heads, and as exact."
    return (torch.device(device).type == 'cpu' and length <= 512 and dtype == torch.float32
        and config.use_alibi and config.dim//config.num_heads % 8 == 0
        and not (config.reversible and config.attn_dropout) and not torch.compiler.is_compiling())

class AttentionInputs:
    "Prepare what the attentions of an `EnigmaModel` share."
    def attention_inputs(self,
        positions:Tensor, # (B, T)
        dtype:torch.dtype, # of queries and keys
        mask:Tensor|None=None, # of transformers; `None`: causal
        ordinary:bool=True, # positions count from 0, and nothing is cached
        keys:Tensor|None=None, # (B, S), positions of the keys; `None`: those of the queries
    )->tuple: # two fronts, or `None` twice, and a mask or `None`
        "Prepare what every attention gets."
        c, T = self.config, positions.shape[1]
        if ordinary and mask is None and short_on_cpu(c, T, positions.device, dtype):
            mask = alibi_mask(T, c.num_heads, c.dim//c.num_heads, positions.device)
            short = torch.is_autocast_enabled('cpu')
            return None, None, mask.to(torch.get_autocast_dtype('cpu')) if short else mask
        return *alibi_features(c, positions, dtype, keys), mask

class BlockSteps:
    "Write the blocks of an `EnigmaModel` as reversible steps of two streams."
    def chain(self,
        positions:Tensor, # (B, T)
        extras:tuple, # what every attention gets; the last, the key, is for networks, too
    ): # an iterator: a list of reversible steps for each block
        "Write the blocks as reversible steps."
        for i, layer in enumerate(self.layers):
            yield [*self.turns(i, positions), *layer.steps(*extras)]

    def turns(self,
        i:int, # of the block that comes after
        positions:Tensor, # (B, T)
    )->list: # one reversible step, or none
        "Write the wheel before a block as a reversible step."
        if not i or self.wheels is None: return []
        return [BijectionStep(self.wheels[i - 1], positions, ways=self.ways[i - 1])]

    def read_out(self,
        a:Tensor, # (B, T, d)
        b:Tensor, # (B, T, d)
    )->Tensor: # (B, T, d)
        "Combine two streams into what they say."
        return (a + b) / 2

def wide_enough(
    h:Tensor, # (B, T, d), embeddings
)->Tensor: # (B, T, d), float32 at least
    "Prepare features for exact streams. Raise a ValueError for those of a half-precision model."
    if h.dtype in (torch.float16, torch.bfloat16): raise ValueError(
        f"exact streams need float32, got weights of {h.dtype}: load the model with "
        "dtype=torch.float32; autocast may shorten what its blocks compute")
    return h.float()

class TwoStreams(BlockSteps):
    "Pass two streams through the blocks of an `EnigmaModel`."
    def two_streams(self,
        h:Tensor, # (B, T, d)
        positions:Tensor, # (B, T)
        front, # ALiBi's numbers for queries and for keys
        mask:Tensor|None, # see `causal_attention`
        key:Tensor|None, # of this pass's dropout
        cache, # keys and values of earlier tokens
        attentions=None, # a list that gets the weights of each attention
        each=False, # after each block
    ): # an iterator: what the streams say after each block, or after the last alone, (B, T, d)
        "Run all blocks in two streams, which training can undo."
        exact, grid = self.config.exact, self.config.grid
        h = wide_enough(h) if exact else h
        # two tensors, whose gradients meet only here
        a, b = ((snap(h, grid) if exact else h).view_as(h) for _ in range(2))
        asked = each or cache is not None or attentions is not None
        # a layer that gathers its own parameters does so when it is called
        if torch.is_grad_enabled() and not asked and not any(map(is_sharded, self.layers)):
            blocks = self.chain(positions, (*front, mask, key))
            a, b = reversible([step for block in blocks for step in block], a, b)
            yield self.read_out(a, b)
            return
        for i, layer in enumerate(self.layers):
            for turn in self.turns(i, positions): a, b = turn.plain(a, b)
            a, b = layer((a, b), front, mask, key, cache, attentions)
            yield self.read_out(a, b)

class Streams(AttentionInputs, TwoStreams):
    "Pass a signal through the blocks of an `EnigmaModel`."
    def through_layers(self,
        h:Tensor, # (B, T, d)
        positions:Tensor, # (B, T)
        front, # ALiBi's numbers for queries and for keys
        mask:Tensor|None, # see `causal_attention`
        cache=None, # keys and values of earlier tokens; `None`: there are none
        attentions=None, # a list that gets the weights of each attention
        each=False, # after each block, also where training needs the last alone
    ): # an iterator: the stream after each block, (B, T, d)
        "Run all blocks, in one stream or in two with a wheel between each pair of blocks."
        c = self.config
        repeated = self.training and c.reversible and (c.dropout or c.attn_dropout)
        key = new_key(h.device) if repeated else None
        more = front, mask, key, cache, attentions
        if c.reversible: return self.two_streams(h, positions, *more, each)
        return self.one_stream(h, *more)

    def one_stream(self,
        h:Tensor, # (B, T, d)
        front, # ALiBi's numbers for queries and for keys
        mask:Tensor|None, # see `causal_attention`
        key:Tensor|None, # of this pass's dropout
        *more, # a cache, and a list for the attentions' weights
    ): # an iterator: the stream after each block, (B, T, d)
        "Run all blocks in one stream."
        for layer in self.layers: yield (h := layer(h, front, mask, key, *more))

def check_rows(
    positions:Tensor, # (B, T)
    rows:int, # of the position table
):
    "Raise a ValueError for a position that has no row; tracers have no numbers to look at."
    if not positions.numel() or is_traced() or not has_values(positions): return
    if positions.max() >= rows:
        raise ValueError(f"positions must be below position_rows={rows}, got {positions.max()}")

class WithGrams:
    "Tell the blocks of an `EnigmaModel` which runs of tokens end where."
    def add_grams(self,
        h:Tensor, # (B, T, d), embeddings
        ids:Tensor|None, # (B, T) int64; `None`: not known
        positions:Tensor, # (B, T)
        attention_mask:Tensor|None, # (B, S), 1 for tokens and 0 for padding
        cache, # of earlier tokens; `None`: there are none
    )->Tensor: # (B, T, d)
        "Add rows for runs of tokens and for what followed them, where there are tables."
        tables = [t for t in (self.embed_grams, self.embed_copies) if t is not None]
        if not tables: return h
        known = torch.zeros_like(positions) if ids is None else ids + 1
        if attention_mask is not None and attention_mask.ndim == 2:
            known = known * attention_mask[:, -h.shape[1]:].to(known.dtype)
        held, place = note_tokens(cache, known, self.config.num_layers)
        return h + sum(table(held, place, positions) for table in tables)

class Ends(WithGrams):
    "Lead a signal into the blocks of an `EnigmaModel`, and out of them."
    def encipher(self,
        h:Tensor, # (B, T, d), embeddings
        positions:Tensor, # (B, T)
    )->Tensor: # (B, T, d), as the blocks see them
        "Add the position table and pass the machine, where there are any."
        if self.embed_positions is not None:
            check_rows(positions, self.config.position_rows)
            h = h + self.embed_positions(positions)
        # under autocast, too, the stream keeps its digits
        return h if self.enigma is None else self.enigma(h, positions).to(h.dtype)

    def decipher(self,
        h:Tensor, # (B, T, d), features
        positions:Tensor, # (B, T)
    )->Tensor: # (B, T, d), as the head sees them
        "Undo the machine at the next letters' positions, with machine='both'."
        return self.enigma.inverse(h, positions + 1) if self.config.machine == 'both' else h

def make_machine(
    c:EnigmaConfig, # shape
)->Enigma|None: # `None`: no machine at the ends
    "Make the machine at the ends of the blocks."
    if c.machine not in ('input', 'both'): return None
    return Enigma(c.dim, c.num_rev_blocks, c.num_rotors, c.num_positions, c.rotor,
                  c.plugboard, c.reciprocal, c.parametrization, c.rev_scale, c.exact,
                  seed=c.machine_seed)

def make_wheels(
    c:EnigmaConfig, # shape
)->nn.ModuleList|None: # a wheel of 2d channels between each pair of blocks; `None`: no wheels
    "Make the wheels between the blocks."
    if c.machine != 'between': return None
    written = 'lifted' if c.exact else c.parametrization
    return nn.ModuleList(make_rotor(c.rotor, 2*c.dim, c.num_positions, i % max(1, c.num_rotors),
                                    written, seed=c.machine_seed + i)
                         for i in range(c.num_layers - 1))

class Within(Ends, Streams):
    "Lead what has been enciphered through the blocks of an `EnigmaModel`."
    def collect(self,
        h:Tensor, # (B, T, d), as the blocks see them
        positions:Tensor, # (B, T)
        front, # ALiBi's numbers for queries and for keys
        mask:Tensor|None, # see `causal_attention`
        cache, # keys and values of earlier tokens; `None`: there are none
        each:bool, # return the stream after each block
        attended:bool, # return the weights of each attention
    )->BaseModelOutputWithPast: # features (B, T, d)
        "Run all blocks, and note on the way what is asked for."
        states, attentions = (h,) if each else None, [] if attended else None
        for h in self.through_layers(h, positions, front, mask, cache, attentions, each):
            if each: states = *states, h
        return BaseModelOutputWithPast(
            last_hidden_state=self.decipher(self.norm(h), positions), past_key_values=cache,
            hidden_states=states, attentions=tuple(attentions) if attended else None)

class WholeWay(Within):
    "Lead tokens through machine and blocks."
    @can_return_tuple
    def forward(self,
        input_ids:Tensor|None=None, # (B, T) int64
        attention_mask:Tensor|None=None, # (B, S), 1 for tokens and 0 for padding
        position_ids:Tensor|None=None, # (B, T) int64; `None`: each row is one text
        past_key_values=None, # a cache
        inputs_embeds:Tensor|None=None, # (B, T, d) in place of input_ids
        use_cache:bool|None=None, # keep keys and values; `None`: as the configuration says
        output_hidden_states:bool|None=None, # return the stream after each block
        output_attentions:bool|None=None, # return the weights of each attention
        **kwargs, # not used
    )->BaseModelOutputWithPast: # features (B, T, d)
        "Compute the features of tokens, or of their embeddings."
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, got both or neither")
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self.make_cache(past_key_values, use_cache)
        if is_packed(position_ids, attention_mask): cache = drop_cache(cache, past_key_values)
        past = 0 if cache is None else cache.get_seq_length()
        positions = token_positions(h, attention_mask, position_ids, past)
        attention_mask = last_columns(attention_mask, h.shape[1], cache)
        keys = key_positions(positions, attention_mask, cache)
        mask = create_causal_mask(self.config, h, attention_mask, cache, position_ids)
        h = self.encipher(self.add_grams(h, input_ids, positions, attention_mask, cache), positions)
        ordinary = position_ids is None and cache is None
        *front, mask = self.attention_inputs(positions, h.dtype, mask, ordinary, keys)
        return self.collect(h, positions, front, mask, cache, output_hidden_states or
            self.config.output_hidden_states, output_attentions or self.config.output_attentions)

class EnigmaModel(WholeWay, EnigmaPreTrainedModel):
    "Turn tokens into features, by embedding, machine and blocks."
    def __init__(self,
        config:EnigmaConfig, # shape
    ):
        super().__init__(config)
        c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.dim)
        self.embed_positions = nn.Embedding(c.position_rows, c.dim) if c.position_rows else None
        self.embed_grams = Grams(c.dim, c.gram_rows, c.gram_length) if c.gram_rows else None
        self.embed_copies = (Copies(c.dim, c.vocab_size, c.gram_copies) if c.gram_copies
                             else None)
        self.enigma = make_machine(c)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.num_layers))
        self.wheels = make_wheels(c)
        # in a list, so that parameters keep their names
        self.ways = [BijectionModule(wheel) for wheel in self.wheels or ()]
        self.norm = nn.LayerNorm(c.dim)
        self.post_init()

    def make_cache(self,
        cache, # given, or `None`
        use_cache:bool|None, # keep keys and values; `None`: as the configuration says
    ): # the given cache, or a new one, or `None`
        "Make a cache where one is wanted; never while training."
        wanted = self.config.use_cache if use_cache is None else use_cache
        fresh = wanted and cache is None and not self.training
        return DynamicCache(config=self.config) if fresh else cache

class NextToken:
    "Predict the next token from features."
    @can_return_tuple
    def forward(self,
        input_ids:Tensor|None=None, # (B, T) int64
        attention_mask:Tensor|None=None, # (B, S), 1 for tokens and 0 for padding
        position_ids:Tensor|None=None, # (B, T) int64, from 0 in each text of a packed row
        past_key_values=None, # a cache
        inputs_embeds:Tensor|None=None, # (B, T, d) in place of input_ids
        labels:Tensor|None=None, # (B, T) int64, the same tokens; −100: nothing to learn
        use_cache:bool|None=None, # keep keys and values; never while training
        output_hidden_states:bool|None=None, # return the stream after each block
        output_attentions:bool|None=None, # return the weights of each attention
        logits_to_keep:int|Tensor=0, # the last few positions' logits, or those of indices; 0: all
        **kwargs, # of the loss, such as num_items_in_batch
    )->CausalLMOutputWithPast: # loss in nats per predicted token; logits (B, T, V)
        "Compute the logits of the next token at every position."
        if labels is not None or self.training: use_cache = False
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds,
                         use_cache, output_hidden_states, output_attentions, return_dict=True)
        whole = isinstance(logits_to_keep, int)
        kept = slice(-logits_to_keep, None) if whole else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels,
                                      vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=out.hidden_states,
                                      past_key_values=out.past_key_values,
                                      attentions=out.attentions)

class EnigmaForCausalLM(NextToken, EnigmaPreTrainedModel, GenerationMixin):
    "Predict the next token, causally: the Enigma language model (github.com/lizixi-0x2F/Enigma)."
    _tied_weights_keys = {'lm_head.weight': 'model.embed_tokens.weight'}

    def __init__(self,
        config:EnigmaConfig, # shape
    ):
        super().__init__(config)
        self.model = EnigmaModel(config)
        # a head of its own begins small: every letter is about as likely
        self.lm_head = (nn.Linear if config.tie_word_embeddings else partial(Linear, start=.02))(
            config.dim, config.vocab_size, bias=False)
        if config.tie_word_embeddings: self._keys_to_ignore_on_save = ['lm_head.weight']
        self.post_init()

# the copy of this code beside a model's weights registers nothing
if not __name__.startswith('transformers_modules'):
    AutoConfig.register('enigma', EnigmaConfig, exist_ok=True)
    AutoModel.register(EnigmaConfig, EnigmaModel, exist_ok=True)
    AutoModelForCausalLM.register(EnigmaConfig, EnigmaForCausalLM, exist_ok=True)

class AddAxis(ConversionOps):
    "Give single numbers the axis that they lack in checkpoints of 0.1."
    def convert(self,
        input_dict:dict, # a pattern -> tensors
        source_patterns:list, # unused
        target_patterns:list, # one
        **kwargs, # whatever else transformers passes
    )->dict: # the target pattern -> the same tensors, each with an axis at least
        "Convert what one parameter was saved as."
        tensors, = input_dict.values()
        return {target_patterns[0]: [t[None] if t.ndim == 0 else t for t in tensors]}

    @property
    def reverse_op(self): return self # what is saved keeps its axis

register_checkpoint_conversion_mapping(
    'enigma', [WeightConverter(name, name, [AddAxis()]) for name in ('log_scale', '.size')],
    overwrite=True)

def parameter_card(
    model:EnigmaForCausalLM, # on any device, 'meta' included
)->dict[str,int]: # component -> parameters, and 'total', and 'reachable' within max_len tokens
    "Count parameters by component."
    c, base, e = model.config, model.model, model.model.enigma
    count = lambda *modules: sum(p.numel() for m in modules if m is not None
                                 for p in m.parameters())
    card = dict(embedding=count(base.embed_tokens), position_table=count(base.embed_positions),
                n_grams=count(base.embed_grams), copies=count(base.embed_copies),
                rotors=count(e and e.rotors, base.wheels), rev_blocks=count(e and e.rev_blocks),
                reflector=count(e and e.reflector), blocks=count(base.layers),
                final_norm=count(base.norm),
                head=0 if c.tie_word_embeddings else count(model.lm_head))
    total = sum(card.values())
    unseen = sum(count(wheel) // wheel.num_positions * (wheel.num_positions - n)
                 for wheel, n in reached_matrices(model))
    unread = max(0, c.position_rows - c.max_len) * c.dim
    return dict(card, total=total, reachable=total - unseen - unread)

def reached_matrices(
    model:EnigmaForCausalLM, # on any device
)->list: # pairs: a wheel with a matrix for each position, and how many of them a text reaches
    "Count the matrices of the wheels that a text of max_len tokens reaches: only they can learn."
    context = torch.arange(model.config.max_len + (model.config.machine == 'both'), device='cpu')
    return [(m, len(odometer(context, m.place, m.num_positions, m.key).unique()))
            for m in model.modules() if isinstance(m, TableRotor)]
