"""Weight-sparse transformers, from scratch: a GPT trained with almost all of its weights at zero.

Source: Gao et al., "Weight-sparse transformers have interpretable circuits", arXiv 2511.13653
(2025), "the paper" below, and its authors' released code, "the release". This is not SparseGPT,
the one-shot pruning method.

    python sparsegpt.py                     # train on simple Python, about 15 minutes
    python sparsegpt.py --sample "def f("   # write code with the result

Part I is the method: settings, operations with their gradients, model, sparsity, optimizer and
training loop, in plain array code that reads from top to bottom. Part II is the machinery: checks,
batches, checkpoints, scores, the run around the loop, threads, processes, command line, GPU.

Most ops are `out, cache = op(x, ...)`, with `dx = op_backward(dout, cache)` under it. Functions
without a backward are parts of ops. Parameters are one flat array, of which the model sees named
views. Zero weights are multiplied like any others; sparsity buys interpretability, not speed.

Deliberate departures from the paper:
- q, k and v share one matrix, and the gradient is divided by its RMS even where that is below 1,
  as in the release. RMSNorm has no gains.
- The sizes are a laptop's, and the tokenizer has 512 tokens, learned from the training text.
- The share of channels that AbsTopK keeps falls from 1 to `afrac` while the density falls.
- A head may prefer some distances to others; the paper's models have no positions.
- Weights go earlier in the run, and weight decay is lower. Both made the loss lower here.
"""
import argparse
import ctypes
import dataclasses
import functools
import io
import json
import math
import os
import shlex
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from docs import program  # before NumPy: docs sets the number of BLAS threads

program.end_quietly(__name__)
import numpy as np

import tasks
from docs.program import UserError, clock
from tasks import Tokenizer, load_corpus, score, task_prompts

xp = np  # NumPy or CuPy. Other files read sparsegpt.xp, as `use_device` may rebind it.

# =================================================================================================
# Part I: the method
# =================================================================================================
# Part I calls these functions of Part II:
#   check_config, check_ids    refuse wrong values
#   draw_batch                 random windows of the training text
#   batch_gradient             loss_and_grads over parts of a batch at once, into one flat array
#   parallel, in_chunks        run a function over items, or over parts of arrays, on all cores
#   shifted                    logits and sink, made safe for exp
#   normal_cdf                 Phi(x), which NumPy lacks
#   fused, gpu                 whether a GPU runs a kernel in place of the lines below, and which

# ---- settings -----------------------------------------------------------------------------------

def flag(default, text, **more):
    """A Config field, with the text that --help shows for it."""
    return dataclasses.field(default=default, metadata=dict(help=text, **more))


@dataclass(frozen=True)
class Config:
    """Everything that decides a run; every field is a flag. Raises UserError on a wrong value."""
    n_layer: int = flag(2, "blocks of attention and MLP")
    d_model: int = flag(256, "width of the residual stream")
    d_head: int = flag(16, "width of an attention head")
    n_ctx: int = flag(128, "context length in tokens")
    vocab_size: int = flag(512, "tokens: 256 bytes, a separator and learned merges")
    act: str = flag("gelu", "activation of the MLP")
    afrac: float = flag(1 / 2, "share of channels that AbsTopK keeps at a site; 1: all")
    positions: str = flag("relative", "relative: a logit per head and distance; learned; none",
                          choices=("relative", "learned", "none"))
    sink: bool = flag(True, "a learned attention sink per head")
    bigram: bool = flag(True, "a dense table of logits by the current token")

    density: float = flag(1 / 64, "share of nonzero weights in the matrices of blocks; 1: dense")
    embed_density: float = flag(0.0, "the same for (un)embeddings; 0: 4 x density")
    min_per_neuron: int = flag(4, "least nonzero weights of a neuron or head channel (j)")
    sparse_bias: bool = flag(False, "biases are sparsified too")
    anneal_start: float = flag(0.01, "share of training before density falls from 1")
    anneal_end: float = flag(0.3, "share of training before it reaches its target")

    steps: int = flag(11000, "optimizer steps")
    batch_size: int = flag(8, "sequences a step")
    lr: float = flag(0.024, "learning rate without warm-up, decay and sharkfin")
    warmup: float = flag(0.01, "share of training with rising learning rate")
    sharkfin: bool = flag(True, "learning rate x sqrt(final density / density now)")
    beta1: float = flag(0.9, "Adam: decay of the mean gradient")
    beta2: float = flag(0.95, "Adam: decay of the mean square")
    eps: float = flag(0.1, "Adam: added to the root mean square")
    weight_decay: float = flag(0.02, "decoupled decay of the matrices")
    grad_scale: str = flag("divide", "divide the gradient by its RMS; clip the RMS to 1; or none",
                           choices=("divide", "clip", "none"))
    seed: int = flag(0, "of initialisation, batches and samples")

    data: str = flag("stdlib", "files or folders, with commas; stdlib: Python's library")
    idioms: float = flag(0.9, "share of the sequences drawn from generated idioms")
    late: int = flag(1, "how many times as often idioms show tasks that are learned late")
    max_mb: float = flag(0.0, "read about this many megabytes of each source; 0: all")

    threads: int = flag(0, "threads; 0: one a core. The result does not depend on it")
    out: str = flag("out/sparse.npz", "checkpoint; --dense, --long and --quick name others")
    dtype: str = flag("float32", "float64 is for checks", choices=("float32", "float64"))

    def __post_init__(self):
        check_config(self)

    def n_active(self, width):
        """The number of channels that AbsTopK keeps out of `width`."""
        return max(1, int(self.afrac * width))


# ---- ops: each forward, and its backward right under it -----------------------------------------
# N is batch x time: every x is [N, channels], so that each linear map is one matrix product.
# `dout` is the gradient of the loss with respect to an op's output. A backward returns those with
# respect to the op's array inputs, in their order.

def embedding(ids, wte, wpe):  # [B, T], [V, C], [n_ctx, C] or None -> [B*T, C]
    """Rows of the token table, plus learned positions if there are any."""
    x = wte[ids]
    if wpe is not None:
        x += wpe[:ids.shape[1]]
    return x.reshape(-1, wte.shape[1]), (ids, wte, wpe)

def embedding_backward(dout, cache):
    ids, wte, wpe = cache
    dwte, dwpe = scatter_rows(ids.reshape(-1), dout, len(wte)), None
    if wpe is not None:
        dwpe = xp.zeros_like(wpe)
        dwpe[:ids.shape[1]] = dout.reshape(*ids.shape, -1).sum(0)
    return dwte, dwpe


def scatter_rows(ids, rows, V):  # [N], [N, C] -> [V, C]: the backward of table[ids]
    """out[v]: the sum of the rows whose id is v."""
    if xp is not np:  # a GPU adds in any order; a product gives the same sum in every run
        return (ids == xp.arange(V)[:, None]).astype(rows.dtype) @ rows
    out = np.zeros((V, rows.shape[1]), rows.dtype)
    for i, row in zip(ids, rows):  # five times as fast as np.add.at
        out[i] += row
    return out


def take_rows(x, rows):  # [N, C], [n] -> [n, C]
    """Some rows of x, each at most once; all of them if rows is None."""
    return (x, None) if rows is None else (x[rows], (rows, x.shape))

def take_rows_backward(dout, cache):
    if cache is None:
        return dout
    rows, shape = cache
    dx = xp.zeros(shape, dout.dtype)
    dx[rows] = dout
    return dx


def rmsnorm(x, eps=1e-5):  # [N, C] -> [N, C]
    """Each row divided by its root mean square. It has no gain: see the top."""
    if fused(x):
        return gpu.rmsnorm(x, eps)
    scale = 1 / xp.sqrt((x * x).mean(1, keepdims=True) + eps)
    out = x * scale
    return out, (out, scale)

def rmsnorm_backward(dout, cache):
    out, scale = cache
    if fused(out):
        return gpu.rmsnorm_backward(dout, out, scale)
    return (dout - out * (dout * out).mean(1, keepdims=True)) * scale


def linear(x, w, b):  # [N, in], [in, out], [out] -> [N, out]
    return x @ w + b, (x, w)

def linear_backward(dout, cache, weights=True):
    """weights: whether the gradients of w and b are wanted; they are None otherwise."""
    x, w = cache
    dx = dout @ w.T
    return (dx, x.T @ dout, dout.sum(0)) if weights else (dx, None, None)


def topk_mask(magnitude, k):  # [..., C] >= 0 -> bool [..., C]
    """True at the k >= 1 largest of each row of the last axis: exactly k, the first of equals."""
    if fused(magnitude):
        return gpu.topk_mask(magnitude, k)
    bits = magnitude.view(f"i{magnitude.itemsize}")  # which sort alike, and faster
    kth = xp.partition(bits, -k, axis=-1)[..., -k, None]
    mask = bits >= kth
    if xp is np and np.count_nonzero(mask) == mask.size // mask.shape[-1] * k:
        return mask
    above, equal = bits > kth, bits == kth  # in some row the k-th has equals
    return above | (equal & (xp.cumsum(equal, axis=-1) <= k - above.sum(-1, keepdims=True)))


def abstopk(x, k):  # [..., C] -> [..., C]
    """Zero all but the k entries of largest |x| of each row (paper A.1). k >= C returns x itself.
    The cache is the mask of what is kept, or None."""
    if k >= x.shape[-1]:
        return x, None
    if fused(x):
        return gpu.abstopk(x, k)
    mask = topk_mask(abs(x), k)
    return x * mask, mask

def abstopk_backward(dout, mask):
    return dout if mask is None else dout * mask


def gelu(x):
    """x * Phi(x), the exact GELU. The cache is its derivative, Phi(x) + x * phi(x)."""
    if fused(x):
        return gpu.gelu(x)
    bell = xp.exp(-0.5 * x * x)
    cdf = normal_cdf(x, bell)
    return x * cdf, cdf + x * bell * (1 / math.sqrt(2 * math.pi))


def relu(x):
    """max(x, 0). The cache is its derivative."""
    return xp.maximum(x, 0), x > 0


# An activation is one op(x) -> (out, derivative) and one line here. --act takes its name.
ACTIVATIONS = {"gelu": gelu, "relu": relu}

def activation_backward(dout, slope):
    return dout * slope


def relative_bias(table, T):  # [H, n_ctx] -> [H, T, T]
    """table[h, t - s] for query t and key s: what head h adds to the logit of a key so many tokens
    back (the relative positions of Raffel et al., 2020, section 2.1, without buckets). -inf for a
    key that comes after its query."""
    t, table = xp.arange(T), table[:, :T]
    table = xp.concatenate([table, xp.full_like(table, -math.inf)], axis=1)
    return table[:, t[:, None] - t]  # a negative index counts from the end, where -inf stands

def relative_bias_backward(dout, n_ctx):  # [H, T, T], 0 for keys to come -> [H, n_ctx]
    H, T, _ = dout.shape
    rows = xp.zeros((H, T, 2 * T), dout.dtype)
    rows[:, :, :T] = dout[:, :, ::-1]
    # Reversed, key s stands in column T - 1 - s. Cut into rows that are one shorter, row t moves t
    # columns to the right: all entries of a distance then stand in column T - 1 + t - s.
    rows = rows.reshape(H, -1)[:, :T * (2 * T - 1)].reshape(H, T, 2 * T - 1)
    dtable = xp.zeros((H, n_ctx), dout.dtype)
    dtable[:, :T] = rows[:, :, T - 1:].sum(1)
    return dtable


def softmax(logits, sink):  # [B, H, T, T], [H] or None -> [B, H, T, T], [B, H, T, 1]
    """Softmax over the keys. sink: a logit per head that joins the denominator only (paper A.1).
    Returns the attention weights and the share of the sink, which sum to 1 for each query."""
    if fused(logits):
        return gpu.softmax(logits, sink)
    logits, sink = shifted(logits, sink)
    e, e_sink = xp.exp(logits), xp.exp(sink)
    total = xp.einsum("bhts->bht", e)[..., None] + e_sink  # 3 times as fast as e.sum(-1)
    e /= total
    return e, e_sink / total

def softmax_backward(dout, weights, sink_share):  # -> [B, H, T, T], [H]
    if fused(dout):
        return gpu.softmax_backward(dout, weights, sink_share)
    along = xp.einsum("bhts,bhts->bht", dout, weights)[..., None]
    dout -= along
    dout *= weights
    return dout, -(along * sink_share).sum((0, 2, 3))


def split_heads(x, B, d_head):  # [B*T, C] -> a view [B, H, T, D]
    return x.reshape(B, len(x) // B, x.shape[1] // d_head, d_head).transpose(0, 2, 1, 3)


def merge_heads(x):  # [B, H, T, D] -> [B*T, C]
    return x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1] * x.shape[3])


def attention(qkv, sink, table, B, d_head):  # [B*T, 3C] -> [B*T, C]
    """Causal softmax attention. qkv: queries, keys and values side by side. sink: see `softmax`.
    table: see `relative_bias`, or None."""
    C, T = qkv.shape[1] // 3, len(qkv) // B
    q, k, v = (split_heads(qkv[:, i * C:(i + 1) * C], B, d_head) for i in range(3))
    logits = (q / math.sqrt(d_head)) @ k.swapaxes(2, 3)  # [B, H, T, T]
    # This adds -inf to the keys in the future, too.
    logits += relative_bias(xp.zeros((1, T), qkv.dtype) if table is None else table, T)
    weights, sink_share = softmax(logits, sink)
    return merge_heads(weights @ v), (q, k, v, weights, sink_share, table)

def attention_backward(dout, cache):
    q, k, v, weights, sink_share, table = cache
    B, H, T, D = q.shape
    dout = split_heads(dout, B, D)
    dv = weights.swapaxes(2, 3) @ dout
    dlogits, dsink = softmax_backward(dout @ v.swapaxes(2, 3), weights, sink_share)
    dtable = None if table is None else relative_bias_backward(dlogits.sum(0), table.shape[1])
    dq = dlogits @ k / math.sqrt(D)
    dk = dlogits.swapaxes(2, 3) @ q / math.sqrt(D)
    return xp.concatenate([merge_heads(x) for x in (dq, dk, dv)], axis=1), dsink, dtable


def cross_entropy(logits, targets):  # [N, V], [N] -> [N]
    """-log softmax(logits)[target] of each row, in nats."""
    rows = xp.arange(len(targets))
    logits = logits - logits.max(-1, keepdims=True)
    p = xp.exp(logits)
    total = p.sum(-1, keepdims=True)
    p /= total
    return xp.log(total[:, 0]) - logits[rows, targets], (p, rows, targets)

def cross_entropy_backward(dout, cache):  # [N] -> [N, V]
    p, rows, targets = cache
    dlogits = p * dout[:, None]
    dlogits[rows, targets] -= dout
    return dlogits


# ---- parameters: one flat array with named views ------------------------------------------------

def shapes(cfg):
    """{name: shape} of every parameter, in the order of the flat array. Matrices are [in, out]."""
    C, V, out = cfg.d_model, cfg.vocab_size, {"wte": (cfg.vocab_size, cfg.d_model)}
    if cfg.positions == "learned":
        out["wpe"] = (cfg.n_ctx, C)
    for i in range(cfg.n_layer):
        h = f"h{i}."
        out |= {h + "attn.wqkv": (C, 3 * C), h + "attn.bqkv": (3 * C,)}
        if cfg.sink:
            out[h + "attn.sink"] = (C // cfg.d_head,)
        if cfg.positions == "relative":
            out[h + "attn.relbias"] = (C // cfg.d_head, cfg.n_ctx)
        out |= {h + "attn.wo": (C, C), h + "attn.bo": (C,), h + "mlp.wfc": (C, 4 * C),
                h + "mlp.bfc": (4 * C,), h + "mlp.wproj": (4 * C, C), h + "mlp.bproj": (C,)}
    return out | {"head.w": (C, V), "head.b": (V,)} | ({"bigram": (V, V)} if cfg.bigram else {})


def n_params(cfg):
    """The number of parameters, zeros included."""
    return sum(map(math.prod, shapes(cfg).values()))


def views(flat, cfg):
    """{name: array} of views into a flat array of n_params(cfg) numbers."""
    out, start = {}, 0
    for name, shape in shapes(cfg).items():
        out[name] = flat[start:start + math.prod(shape)].reshape(shape)
        start += math.prod(shape)
    return out


def is_matrix(name):
    """Whether a parameter is drawn at random, made sparse and decayed: by its name alone, so do
    not call a gain .w. All others start at 0 and stay dense, but for biases, .b: --sparse_bias."""
    return name in ("wte", "wpe") or ".w" in name


def init_flat(cfg):
    """The flat array of fresh parameters: normal with standard deviation 0.02, divided by
    sqrt(2 n_layer) in output projections; all else 0 (paper A.1). NumPy draws, also for a GPU."""
    rng, flat = np.random.default_rng(cfg.seed), np.zeros(n_params(cfg), cfg.dtype)
    for name, w in views(flat, cfg).items():
        if is_matrix(name):
            w[...] = 0.02 * rng.standard_normal(w.shape)
            if name.endswith(("attn.wo", "mlp.wproj")):
                w /= math.sqrt(2 * cfg.n_layer)
    return xp.asarray(flat)


# ---- the model ----------------------------------------------------------------------------------
# Each op's cache is kept under a name. The backward pass is the call list of the forward pass in
# reverse, and takes the caches out again. `g` collects the gradients under the parameters' names.

# The hook points of a block, in the order of computation; their full names are h0.attn_in and so
# on. A channel at one of them, or of `final`, is a node of a circuit (paper A.1, A.5). Pruning
# goes by the endings: what ends in _in reads the residual stream, what ends in _out writes to it.
SITES = ("attn_in", "q", "k", "v", "attn_out", "mlp_in", "neuron", "mlp_out")


def hook_point(x, k, hook, *sites):  # [N, len(sites) * C] -> the same, without a hook
    """AbsTopK over the C channels of each site, or what a hook does in its place.

    A hook has `forward(site, x, k) -> x`, where k is what AbsTopK would keep, and
    `backward(site, dx) -> dx`. It keeps what its backward needs. It may return another width than
    C, if the parameters fit that.
    """
    if hook is None:
        out, mask = abstopk(x.reshape(len(x), len(sites), -1), k)
        return out.reshape(len(x), -1), (mask, hook, sites)
    C = x.shape[1] // len(sites)
    out = [hook.forward(site, x[:, i * C:(i + 1) * C], k) for i, site in enumerate(sites)]
    return out[0] if len(out) == 1 else xp.concatenate(out, axis=1), (None, hook, sites)

def hook_point_backward(dout, cache):
    mask, hook, sites = cache
    if hook is None:
        dx = abstopk_backward(dout.reshape(len(dout), len(sites), -1), mask)
        return dx.reshape(len(dout), -1)
    C = dout.shape[1] // len(sites)
    dx = [hook.backward(site, dout[:, i * C:(i + 1) * C]) for i, site in enumerate(sites)]
    return dx[0] if len(dx) == 1 else xp.concatenate(dx, axis=1)


def attention_layer(x, p, i, cfg, B, hook, cache, rows=None):  # [N, C] -> [N, C], or [n, C]
    """The residual stream x after the attention of block i. rows: those of the N rows that go on
    after it, or None for all."""
    h, k = f"h{i}.", cfg.n_active(cfg.d_model)
    y, cache[h + "norm1"] = rmsnorm(x)
    y, cache[h + "attn_in"] = hook_point(y, k, hook, h + "attn_in")
    y, cache[h + "wqkv"] = linear(y, p[h + "attn.wqkv"], p[h + "attn.bqkv"])
    y, cache[h + "qkv"] = hook_point(y, k, hook, h + "q", h + "k", h + "v")
    y, cache[h + "attention"] = attention(
        y, p.get(h + "attn.sink"), p.get(h + "attn.relbias"), B, cfg.d_head)
    y, cache[h + "rows"] = take_rows(y, rows)
    y, cache[h + "wo"] = linear(y, p[h + "attn.wo"], p[h + "attn.bo"])
    y, cache[h + "attn_out"] = hook_point(y, k, hook, h + "attn_out")
    x, cache[h + "x_rows"] = take_rows(x, rows)
    return x + y

def attention_layer_backward(dx, g, i, cache, weights):
    h = f"h{i}."
    dy = hook_point_backward(dx, cache.pop(h + "attn_out"))
    dy, g[h + "attn.wo"], g[h + "attn.bo"] = linear_backward(dy, cache.pop(h + "wo"), weights)
    dy = take_rows_backward(dy, cache.pop(h + "rows"))
    dy, *bias_grads = attention_backward(dy, cache.pop(h + "attention"))
    g[h + "attn.sink"], g[h + "attn.relbias"] = bias_grads
    dy = hook_point_backward(dy, cache.pop(h + "qkv"))
    dy, g[h + "attn.wqkv"], g[h + "attn.bqkv"] = linear_backward(
        dy, cache.pop(h + "wqkv"), weights)
    dy = hook_point_backward(dy, cache.pop(h + "attn_in"))
    dx = take_rows_backward(dx, cache.pop(h + "x_rows"))
    return dx + rmsnorm_backward(dy, cache.pop(h + "norm1"))


def mlp_layer(x, p, i, cfg, hook, cache):  # [N, C] -> [N, C]
    """The residual stream x after the MLP of block i."""
    h, k = f"h{i}.", cfg.n_active(cfg.d_model)
    y, cache[h + "norm2"] = rmsnorm(x)
    y, cache[h + "mlp_in"] = hook_point(y, k, hook, h + "mlp_in")
    y, cache[h + "wfc"] = linear(y, p[h + "mlp.wfc"], p[h + "mlp.bfc"])
    y, cache[h + "act"] = ACTIVATIONS[cfg.act](y)
    y, cache[h + "neuron"] = hook_point(y, cfg.n_active(4 * cfg.d_model), hook, h + "neuron")
    y, cache[h + "wproj"] = linear(y, p[h + "mlp.wproj"], p[h + "mlp.bproj"])
    y, cache[h + "mlp_out"] = hook_point(y, k, hook, h + "mlp_out")
    return x + y

def mlp_layer_backward(dx, g, i, cache, weights):
    h = f"h{i}."
    dy = hook_point_backward(dx, cache.pop(h + "mlp_out"))
    dy, g[h + "mlp.wproj"], g[h + "mlp.bproj"] = linear_backward(
        dy, cache.pop(h + "wproj"), weights)
    dy = hook_point_backward(dy, cache.pop(h + "neuron"))
    dy = activation_backward(dy, cache.pop(h + "act"))
    dy, g[h + "mlp.wfc"], g[h + "mlp.bfc"] = linear_backward(dy, cache.pop(h + "wfc"), weights)
    dy = hook_point_backward(dy, cache.pop(h + "mlp_in"))
    return dx + rmsnorm_backward(dy, cache.pop(h + "norm2"))


def unembed(x, current, p, cfg, hook, cache):  # [n, C], [n] -> [n, V]
    """Logits of the next token. current: the tokens of these rows, for the bigram table."""
    y, cache["norm"] = rmsnorm(x)
    y, cache["final"] = hook_point(y, cfg.d_model, hook, "final")  # k = C: no AbsTopK here
    logits, cache["head"] = linear(y, p["head.w"], p["head.b"])
    if cfg.bigram:
        logits += p["bigram"][current]
    cache["current"] = current
    return logits

def unembed_backward(dlogits, g, cache, weights):
    current = cache.pop("current")
    if weights:
        g["bigram"] = scatter_rows(current, dlogits, dlogits.shape[1])
    dy, g["head.w"], g["head.b"] = linear_backward(dlogits, cache.pop("head"), weights)
    dy = hook_point_backward(dy, cache.pop("final"))
    return rmsnorm_backward(dy, cache.pop("norm"))


def forward(params, ids, cfg, hook=None, positions=None):
    """Logits [B, T, V] for token ids [B, T], and the caches that `backward` takes.

    positions: [B], a position in each row: the logits there alone, [B, V]; the last block runs for
    these only, from its attention's output on. hook: see `hook_point`. Raises ValueError on ids or
    positions that do not fit the model.
    """
    check_ids(ids, cfg, positions)
    ids, cache, rows = xp.asarray(ids), {}, None
    B, T = ids.shape
    if positions is not None:
        rows = xp.arange(B) * T + xp.asarray(positions)
    x, cache["embedding"] = embedding(ids, params["wte"], params.get("wpe"))
    for i in range(cfg.n_layer):
        last = i == cfg.n_layer - 1
        x = attention_layer(x, params, i, cfg, B, hook, cache, rows if last else None)
        x = mlp_layer(x, params, i, cfg, hook, cache)
    current = take_rows(ids.reshape(-1), rows)[0]
    logits = unembed(x, current, params, cfg, hook, cache)
    return logits.reshape(*(ids.shape if rows is None else rows.shape), -1), cache

def backward(dlogits, cache, cfg, weights=True):
    """{name: gradient} of the parameters, from the gradient of the loss by the logits. Uses up the
    cache. weights=False skips the weights' gradients and returns {}: it runs for the hook."""
    g = {}
    dx = unembed_backward(dlogits.reshape(-1, cfg.vocab_size), g, cache, weights)
    for i in reversed(range(cfg.n_layer)):
        dx = mlp_layer_backward(dx, g, i, cache, weights)
        dx = attention_layer_backward(dx, g, i, cache, weights)
    if not weights:
        return {}
    g["wte"], g["wpe"] = embedding_backward(dx, cache.pop("embedding"))
    return {name: g[name] for name in shapes(cfg)}


def loss_and_grads(params, ids, targets, cfg, n_tokens=None):
    """The mean cross-entropy in nats per token (a 0-d array), and its gradients by name.

    ids, targets: integers [B, T]. n_tokens: the tokens of the whole batch, if these are a part of
    it: the losses and gradients of all parts then add up to those of the batch.
    """
    check_ids(targets, cfg, like=ids)
    logits, cache = forward(params, ids, cfg)
    scale = 1 / (n_tokens or ids.size)
    losses, ce = cross_entropy(logits.reshape(-1, cfg.vocab_size), xp.asarray(targets).reshape(-1))
    dlogits = cross_entropy_backward(xp.full_like(losses, scale), ce)
    return losses.sum() * scale, backward(dlogits, cache, cfg)


# ---- sparsity (paper A.2) -----------------------------------------------------------------------

def target_density(name, cfg):
    """The share of nonzeros that a parameter keeps at the end; 1 for what stays dense."""
    if name in ("wte", "wpe", "head.w"):
        return cfg.embed_density or min(1.0, 4 * cfg.density)
    return cfg.density if is_matrix(name) or (cfg.sparse_bias and ".b" in name) else 1.0


def density_at(target, step, cfg):
    """The annealed share at a step, of weights or of AbsTopK: 1 until anneal_start, then linearly
    down to the target at anneal_end."""
    start, end = cfg.anneal_start * cfg.steps, min(cfg.anneal_end * cfg.steps, cfg.steps - 1)
    if step >= end:
        return target  # to the last bit: AbsTopK's k is rounded down from it
    return 1 + (target - 1) * (0.0 if step <= start else (step - start) / (end - start))


def annealed_config(step, cfg):
    """The config with AbsTopK's share as of a step: it falls with the density."""
    return dataclasses.replace(cfg, afrac=density_at(cfg.afrac, step, cfg))


def neuron_axis(name):
    """The axis of a matrix [in, out] along which neurons, or channels of heads, lie that keep j
    weights each: 1 for wqkv and wfc, 0 for wo and wproj, None for the others (the release)."""
    return {"attn.wqkv": 1, "mlp.wfc": 1, "attn.wo": 0, "mlp.wproj": 0}.get(name.split(".", 1)[-1])


def n_nonzero(name, shape, step, cfg):
    """How many entries a step leaves: density x size, but at least j for each neuron. At the
    default width and final density the two are equal: every neuron keeps its four largest."""
    axis, size = neuron_axis(name), math.prod(shape)
    least = 1 if axis is None else max(1, cfg.min_per_neuron * shape[axis])
    return min(size, max(round(density_at(target_density(name, cfg), step, cfg) * size), least))


def keep_largest(w, k, j=0, axis=None):
    """Zero all but k entries of w, in place: those of largest |w|, exactly k, the first of equals.
    With j, the j largest at each index of `axis`, a neuron's, are taken first: k >= j x neurons."""
    if fused(w):
        return gpu.keep_largest([(w, k, j, axis)])
    magnitude = abs(w)
    if j and axis is not None:
        rows = magnitude if axis == 0 else magnitude.T  # a view: a neuron a row
        rows[topk_mask(xp.ascontiguousarray(rows), j)] = math.inf
    w[...] = xp.where(topk_mask(magnitude.reshape(-1), k).reshape(w.shape), w, 0)


def sparsify(params, step, cfg):
    """Cut the parameters that are to be sparse to their numbers of nonzeros, in place."""
    cuts = [(w, n_nonzero(name, w.shape, step, cfg), cfg.min_per_neuron, neuron_axis(name))
            for name, w in params.items() if target_density(name, cfg) < 1]
    if cuts and fused(cuts[0][0]):
        return gpu.keep_largest(cuts)  # all at once
    parallel(lambda cut: keep_largest(*cut), cuts, cfg.threads)


# ---- optimizer ----------------------------------------------------------------------------------

def learning_rate(step, cfg):
    """Linear warm-up and decay. With the sharkfin, times sqrt(final density / density now), which
    rises to 1."""
    ramp = min(1.0, (step + 1) / max(1.0, cfg.warmup * cfg.steps)) * (1 - step / cfg.steps)
    fin = math.sqrt(cfg.density / density_at(cfg.density, step, cfg)) if cfg.sharkfin else 1.0
    return cfg.lr * ramp * fin


def gradient_scale(g, cfg):  # [n] -> 0-d
    """What the gradient is multiplied by: 1 / its RMS over all parameters, at most 1 if clipped;
    or 1. Without the division, Adam's large epsilon has no meaning."""
    rms = xp.sqrt(g @ g / len(g))
    return {"divide": 1 / xp.maximum(rms, 1e-20), "clip": 1 / xp.maximum(rms, 1),
            "none": xp.ones_like(rms)}[cfg.grad_scale].astype(g.dtype)


def adam(w, g, m, v, step, cfg):  # [n] each
    """One step of Adam; w and the moments m and v change in place, each entry by itself."""
    rate = learning_rate(step, cfg) / (1 - cfg.beta1 ** (step + 1))
    unbias = 1 - cfg.beta2 ** (step + 1)
    if fused(w):
        return gpu.adam(w, g, m, v, rate, unbias, cfg)
    m += (1 - cfg.beta1) * (g - m)
    v += (1 - cfg.beta2) * (g * g - v)
    w -= rate * m / (xp.sqrt(v / unbias) + cfg.eps)


# ---- training -----------------------------------------------------------------------------------

def training_steps(flat, m, v, start, streams, cfg):
    """Train from step `start` on; yields (step, loss) after each. Whoever runs it logs and saves:
    see `train`. flat, m, v: parameters and Adam's moments, [n_params], which change in place.
    streams: see `draw_batch`."""
    params = views(flat, cfg)
    for step in range(start, cfg.steps):
        # 1. A batch, drawn with a seed of this step: so a resumed run sees the same.
        rng = np.random.default_rng((cfg.seed, step))
        ids, targets = draw_batch(streams, rng, cfg.batch_size, cfg.n_ctx, cfg.idioms)
        # 2. The gradient, dense: a zeroed weight has one too, and may come back.
        loss, grad = batch_gradient(params, ids, targets, annealed_config(step, cfg))
        # 3. Adam, which takes the gradient divided by its RMS.
        scale = gradient_scale(grad, cfg)
        in_chunks(lambda w, g, m, v: adam(w, g * scale, m, v, step, cfg), flat, grad, m, v,
                  threads=cfg.threads)
        # 4. Zero all but the largest weights of every matrix that is to be sparse.
        sparsify(params, step, cfg)
        # 5. Decay what is left.
        decay = 1 - learning_rate(step, cfg) * cfg.weight_decay
        for name in filter(is_matrix, params):
            params[name] *= decay
        yield step, loss


# =================================================================================================
# Part II: the machinery
# =================================================================================================

# ---- checks of what is given --------------------------------------------------------------------

# (lowest, highest) of Config's numbers; for the others (0, 1) of floats, (1, 65536) of integers.
RANGES = dict(n_layer=(1, 99), n_ctx=(2, 1 << 16), vocab_size=(257, 1 << 16), steps=(1, 1 << 31),
              min_per_neuron=(0, 1 << 16), late=(1, 9), seed=(0, 1 << 31), threads=(0, 1 << 10),
              afrac=(1e-9, 1), density=(1e-9, 1), lr=(1e-9, 1e3), eps=(1e-12, 1e3),
              beta1=(0, 0.999999), beta2=(0, 0.999999), weight_decay=(0, 1e3), max_mb=(0, 1e6))


def choices(field):
    """The values that a Config field may have, or None for a number or a path."""
    return tuple(ACTIVATIONS) if field.name == "act" else field.metadata.get("choices")


def check_config(cfg):
    """Raise UserError on a field of a wrong type or value."""
    for f in dataclasses.fields(cfg):
        value, kind = getattr(cfg, f.name), (int, float) if f.type is float else f.type
        if not isinstance(value, kind) or (isinstance(value, bool) and f.type is not bool):
            raise UserError(f"--{f.name} must be of type {f.type.__name__}, not {value!r}")
        if (allowed := choices(f)) and value not in allowed:
            raise UserError(f"--{f.name} must be one of {', '.join(allowed)}, not {value!r}")
        if f.type in (int, float):
            low, high = RANGES.get(f.name, (0, 1) if f.type is float else (1, 1 << 16))
            if not low <= value <= high:  # nor is NaN
                raise UserError(f"--{f.name} must be from {low} to {high}, not {value}")
    if cfg.anneal_end < cfg.anneal_start:
        raise UserError(f"--anneal_end must be at least --anneal_start, {cfg.anneal_start}")
    if cfg.min_per_neuron > cfg.d_model:
        raise UserError(f"--min_per_neuron must be at most --d_model, {cfg.d_model}")
    if cfg.d_model % cfg.d_head:
        raise UserError(f"--d_head {cfg.d_head} does not divide --d_model {cfg.d_model}")


def check_ids(ids, cfg, positions=None, like=None):
    """Raise ValueError unless ids is an integer array [B, T], T <= n_ctx, of token ids, of the
    shape of `like`, and the positions are within T. Arrays on a GPU are not looked into: that
    would keep it waiting."""
    if getattr(ids, "dtype", np.dtype(float)).kind not in "iu" or ids.ndim != 2 or not (
            0 < ids.size and ids.shape[1] <= cfg.n_ctx):
        raise ValueError(f"ids must be an array of integers [B, T] with 1 <= T <= {cfg.n_ctx}")
    if like is not None and getattr(like, "shape", None) != ids.shape:
        raise ValueError(f"ids must be of the targets' shape, {ids.shape}")
    if isinstance(ids, np.ndarray) and not 0 <= ids.min() <= ids.max() < cfg.vocab_size:
        raise ValueError(f"token ids must be in 0..{cfg.vocab_size - 1}, not {ids.min()} to "
                         f"{ids.max()}")
    if positions is not None and not hasattr(positions, "get") and not all(
            0 <= t < ids.shape[1] for t in positions):
        raise ValueError(f"positions must be in 0..{ids.shape[1] - 1}, not {positions}")


# ---- data: token streams ------------------------------------------------------------------------

def draw_batch(streams, rng, n, n_ctx, idioms):
    """n random windows, a share `idioms` of them from the stream of idioms: inputs and next
    tokens, int64 [n, n_ctx] each."""
    n_idioms = int(idioms * n + rng.random()) if "idioms" in streams else 0
    rows = []
    for name, count in (("code", n - n_idioms), ("idioms", n_idioms)):
        if count:
            starts = rng.integers(0, len(streams[name]) - n_ctx, count)
            rows.append(streams[name][starts[:, None] + np.arange(n_ctx + 1)])
    rows = np.concatenate(rows).astype(np.int64)
    rng.shuffle(rows)  # so that the parts that the threads take are alike
    return rows[:, :-1], rows[:, 1:]


# ---- checkpoints --------------------------------------------------------------------------------

FORMAT = "sparsegpt-4"  # the version of the checkpoint format
PARTS = {"format", "config", "merges", "nonzero", "values", "text", "m", "v", "step", "digest"}


class Model(NamedTuple):
    """A trained model: what `train` returns, `save` writes and `load` reads."""
    params: dict
    cfg: Config
    tok: Tokenizer
    text: np.ndarray  # [n, n_ctx] windows of its training text, for means of activations
    state: dict = {}  # what else is in its file: the moments, the step and the data of a run


def save(path, model):
    """Write a Model to path: see `program.write_whole`. Raises FloatingPointError if a parameter
    is not finite: the former file stays as it was."""
    flat = np.concatenate([to_host(model.params[name]).reshape(-1) for name in shapes(model.cfg)])
    if not np.isfinite(flat).all():
        raise FloatingPointError("a weight is no longer finite: most likely --lr "
                                 f"{model.cfg.lr:g} is too high; {path} is as it was")
    arrays = dict(format=FORMAT, config=json.dumps(dataclasses.asdict(model.cfg)),
                  nonzero=np.packbits(flat != 0), values=flat[flat != 0],
                  merges=np.array(model.tok.merges, np.int32).reshape(-1, 2),
                  text=model.text.astype(np.uint16), **model.state)
    write = np.savez if model.state else np.savez_compressed  # quick, or small: most are zeros
    program.write_whole(path, lambda f: write(f, **arrays))


def load(path):
    """The Model in a checkpoint, read without pickle. Raises UserError if it is missing, damaged,
    not a checkpoint or of another version."""
    try:
        data = io.BytesIO(program.read_bytes(path))
        parts = zipfile.ZipFile(data).infolist()
        sizes = {part.filename.removesuffix(".npy"): part.file_size for part in parts}
        with np.load(data, allow_pickle=False) as f:
            if max(sizes["format"], sizes["config"]) > 1 << 16 or str(f["format"]) != FORMAT:
                raise ValueError(f"it is not of this version, {FORMAT}; train the model again")
            cfg = Config(**json.loads(str(f["config"])))
            # A small file must not take much memory: parameters, perhaps two moments, some text.
            need = n_params(cfg) * np.dtype(cfg.dtype).itemsize * (3 if "m" in sizes else 1)
            if sizes.keys() - PARTS or len(parts) > len(sizes) or (
                    need > 100 * data.getbuffer().nbytes + (1 << 30)) or (
                    sum(sizes.values()) > 2 * need + (1 << 24)):
                raise ValueError("its parts do not fit its config")
            if broken := f.zip.testzip():  # NumPy alone does not check all of a part
                raise ValueError(f"{broken} does not match its checksum")
            arrays = {name: f[name] for name in PARTS & sizes.keys() - {"format", "config"}}
        tok = Tokenizer(arrays.pop("merges").reshape(-1, 2))
        flat, text = np.zeros(n_params(cfg), cfg.dtype), arrays.pop("text").astype(np.int64)
        nonzero = np.unpackbits(arrays.pop("nonzero"), count=flat.size).view(bool)
        values = arrays.pop("values")
        if values.shape != (nonzero.sum(),) or values.dtype != cfg.dtype:
            raise ValueError(f"params are {values.dtype} {list(values.shape)}, the config needs "
                             f"{cfg.dtype} [{nonzero.sum()}]")
        flat[nonzero] = values
        check_ids(text, cfg)
        if 257 + len(tok.merges) > cfg.vocab_size:
            raise ValueError("its tokenizer has more tokens than the model")
        for array in flat, arrays.get("m", flat), arrays.get("v", flat):
            if array.shape != flat.shape or array.dtype != cfg.dtype:
                raise ValueError(f"moments are {array.dtype} {list(array.shape)}, the config "
                                 f"needs {cfg.dtype} [{flat.size}]")
            if not np.isfinite(array).all():
                raise ValueError("params or moments are not finite")
    except FileNotFoundError as e:
        raise UserError(f"no file {path}; train one with: python sparsegpt.py --out {path}") from e
    except Exception as e:  # a zip can be broken in many ways, each with an exception of its own
        raise UserError(f"{path} cannot be read or is no checkpoint of this source "
                        f"({type(e).__name__}: {e})") from e
    return Model(views(xp.asarray(flat), cfg), cfg, tok, text, arrays)


def default_model():
    """The path of the default checkpoint or, if there is none, of the one that comes with the
    source, which python sparsegpt.py --long made; a line on stderr says so."""
    if Path(Config.out).exists():
        return Config.out
    path = os.path.relpath(Path(__file__).parent / "docs/long.npz")
    print(f"there is no {Config.out}: using {path}, the included model", file=sys.stderr)
    return path


# ---- scores and samples -------------------------------------------------------------------------

def evaluate(params, streams, cfg, n):
    """The mean loss in nats per token on the mixture that training draws, over n windows of each
    stream that are the same at every call; and {name: loss} of the streams."""
    losses = {}
    for name, stream in streams.items():
        starts = np.linspace(0, len(stream) - cfg.n_ctx - 1, n).astype(np.int64)
        rows = stream[starts[:, None] + np.arange(cfg.n_ctx + 1)].astype(np.int64)

        def part(i):
            logits, _ = forward(params, rows[i:i + 4, :-1], cfg)
            targets = xp.asarray(rows[i:i + 4, 1:].reshape(-1))
            return float(cross_entropy(logits.reshape(len(targets), -1), targets)[0].sum())

        losses[name] = sum(parallel(part, range(0, n, 4), cfg.threads)) / (n * cfg.n_ctx)
    share = cfg.idioms if "idioms" in losses else 0.0
    return (1 - share) * losses["code"] + share * losses.get("idioms", 0.0), losses


def evaluate_tasks(model, n=100, seed=0, split="eval"):
    """{task: Score} of a Model on n prompt pairs of each of the twenty tasks (paper Table 1). A
    task that has no prompt of use is left out: see `tasks.task_prompts`."""
    tasks.check_draw(n, split)

    def one(task):
        try:
            prompts = task_prompts(model.tok, tasks.pairs(task, n, seed, split), model.cfg.n_ctx)
        except ValueError:
            return None
        logits = np.empty((len(prompts.last), model.cfg.vocab_size))
        for index, part in prompts.parts():
            logits[index] = to_host(
                forward(model.params, part.ids, model.cfg, positions=part.last)[0])
        return score(logits, prompts)

    scores = parallel(one, list(tasks.TASKS), model.cfg.threads)
    return {task: s for task, s in zip(tasks.TASKS, scores) if s is not None}


def sample(model, prompt="", n=200, temperature=0.8, seed=0):
    """The prompt continued by n tokens, or up to the end of the document. temperature 0 takes the
    likeliest. Every token runs the whole context again: short, and fast enough here."""
    params, cfg, tok, *_ = model
    rng, ids = np.random.default_rng(seed), [tok.EOT] + tok.encode(prompt)
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature must be a number from 0, not {temperature}")
    known = 257 + len(tok.merges)  # a small corpus may teach fewer than the model has room for
    for _ in range(n):
        context = np.array([ids[-cfg.n_ctx:]])
        logits, _ = forward(params, context, cfg, positions=[context.shape[1] - 1])
        logits = to_host(logits)[0, :known].astype(np.float64)
        noise = rng.gumbel(size=known) * temperature  # makes the arg max a draw from the softmax
        ids.append(int(np.argmax(logits + noise)))
        if ids[-1] == tok.EOT:
            break
    return tok.decode(ids)


# ---- the run around the loop --------------------------------------------------------------------

def partial_path(out):
    """Where an unfinished run keeps its state: a finished checkpoint stays until the end."""
    return Path(f"{out}.partial")


def load_partial(out):
    """The Model of the unfinished run of --out. Raises UserError if there is none."""
    path = partial_path(out)
    if not path.is_file():
        raise UserError(f"no unfinished run at {path} to resume; start one without --resume")
    model = load(path)
    if not {"m", "v", "step", "digest"} <= model.state.keys() or not (
            model.state["step"].shape == () and model.state["step"] in range(model.cfg.steps + 1)):
        raise UserError(f"{path} is not the state of an unfinished run")
    return model


def starting_state(cfg, resume, digest):
    """(flat, m, v, step) of a new run, or of the unfinished run of cfg. Raises UserError if that
    does not fit cfg and the data, or if it stands in a new run's way."""
    path = partial_path(cfg.out)
    if not resume:
        if path.exists():
            raise UserError(f"{path} holds an unfinished run; continue it with --resume, or "
                            "delete it")
        flat = init_flat(cfg)
        return flat, xp.zeros_like(flat), xp.zeros_like(flat), 0
    model = load_partial(cfg.out)
    state = model.state
    if dataclasses.replace(model.cfg, threads=cfg.threads, out=cfg.out) != cfg:
        raise UserError(f"{path} is of a run with another config")
    if str(state["digest"]) != digest:
        raise UserError(f"{path} was trained on other data; resume with the same --data, files "
                        "and Python")
    flat = xp.concatenate([model.params[name].reshape(-1) for name in shapes(cfg)])
    return flat, xp.asarray(state["m"]), xp.asarray(state["v"]), int(state["step"])


def check_writable(out):
    """Raise UserError now, not after training, if a checkpoint cannot be put there, or would
    replace something else."""
    for path in out, partial_path(out):  # the latter's is the longest name
        program.check_output(path)
    if Path(out).exists() and not (zipfile.is_zipfile(out)
                                   and "format.npy" in zipfile.ZipFile(out).namelist()):
        raise UserError(f"--out {out} exists but is not a checkpoint; choose another name")


def train(cfg, resume=False, log=print):
    """Train a model, save it to cfg.out, print what it can do; returns the Model. The method is
    `training_steps`.

    Ctrl-C saves the state beside cfg.out and raises KeyboardInterrupt; resume=True goes on from
    there, or from the last automatic save, and ends with the same parameters, bit for bit, as a
    run that was never interrupted. Raises UserError on unusable data or output, and
    FloatingPointError if the loss or a weight stops being finite.
    """
    if cfg.batch_size < processes().size:
        raise UserError(f"--batch_size must be at least {processes().size}, one row a process")
    if processes().rank:
        follow(load_corpus(cfg, lambda line: None), cfg, resume)
    check_writable(cfg.out)
    with program.locked(cfg.out):
        corpus = load_corpus(cfg, log)
        model = train_on(corpus, cfg, resume, log)
        report(model, corpus.val, log)
    return model


def train_on(corpus, cfg, resume, log):
    """What `train` does with its Corpus, up to the saved Model."""
    flat, m, v, start = starting_state(cfg, resume, corpus.digest)
    text = draw_batch(corpus.train, np.random.default_rng(0), 64, cfg.n_ctx, cfg.idioms)[0]
    model, losses, every = Model(views(flat, cfg), cfg, corpus.tok, text), [], cfg.steps // 40 or 1
    report_sizes(cfg, log)
    log(f"from step {start} of {cfg.steps}; ln(vocabulary) is {math.log(cfg.vocab_size):.4f}\n"
        f"{'step':>6} {'loss':>7} {'val':>7} {'density':>8} {'lr':>8} {'tok/s':>8} {'left':>6}")
    began = saved = line = time.perf_counter()
    warned = False
    with program.interrupts_noted() as interrupts:
        for step, loss in training_steps(flat, m, v, start, corpus.train, cfg):
            done, stopped = step + 1, anywhere(interrupts)
            losses.append(loss)  # read only below: a GPU is not kept waiting
            if step == 0:
                log(f"{1:>6} {float(loss):7.4f}")
            if done % every and done < cfg.steps and not stopped:
                continue
            losses = np.array([float(x) for x in losses])
            if not np.isfinite(losses).all():
                bad = done - len(losses) + int(np.argmin(np.isfinite(losses))) + 1
                raise FloatingPointError(f"the loss is not finite at step {bad}: most likely --lr "
                                         f"{cfg.lr:g} is too high; {cfg.out} is as it was")
            now, current = time.perf_counter(), annealed_config(step, cfg)
            val, _ = evaluate(model.params, corpus.val, current, 32)
            log(f"{done:>6} {losses.mean():7.4f} {val:7.4f} "
                f"{density_at(cfg.density, step, cfg):8.4f} {learning_rate(step, cfg):8.2e} "
                f"{len(losses) * cfg.batch_size * cfg.n_ctx / (now - line):8,.0f} "
                f"{clock((cfg.steps - done) * (now - began) / (done - start)):>6}")
            losses, line = [], time.perf_counter()
            if done == cfg.steps or not (stopped or line - saved > 60):
                continue
            state = model._replace(state=dict(
                m=to_host(m), v=to_host(v), step=done, digest=corpus.digest))
            if stopped:
                program.save_or_aside(save, partial_path(cfg.out), state)
                raise KeyboardInterrupt(
                    f"saved step {done} of {cfg.steps}; go on with: python sparsegpt.py --resume "
                    f"--data {shlex.quote(cfg.data)} --out {shlex.quote(cfg.out)}")
            try:
                save(partial_path(cfg.out), state)
                saved, warned = time.perf_counter(), False
            except UserError as e:
                if not warned:
                    log(f"{e}; the run goes on, and tries again")
                warned = True
        program.save_or_aside(save, Path(cfg.out), model)
        partial_path(cfg.out).unlink(missing_ok=True)
        log(f"trained in {clock(time.perf_counter() - began)}; saved to {cfg.out}")
        if interrupts:
            raise KeyboardInterrupt(f"{cfg.out} is whole, and not scored")
    return model


def report_sizes(cfg, log):
    """Print how many weights every matrix keeps: its density x its size, or the floor of j."""
    log(f"{n_params(cfg):,} parameters in {n_shards(cfg)} shards; weights that stay nonzero:")
    for name, shape in filter(lambda item: is_matrix(item[0]), shapes(cfg).items()):
        size, density = math.prod(shape), target_density(name, cfg)
        k = n_nonzero(name, shape, cfg.steps, cfg)
        log(f"{name:<16} {' x '.join(map(str, shape)):>12} {k:>9,} ({k / size:.4f})"
            + f", not {density:.4f}: --min_per_neuron is a floor" * (k > density * size + 1))


def report(model, val, log):
    """Print what a trained model can do: validation losses, the twenty tasks and a sample."""
    loss, by_stream = evaluate(model.params, val, model.cfg, 256)
    log(f"validation loss {loss:.4f} nats a token ("
        + ", ".join(f"{name} {x:.4f}" for name, x in by_stream.items()) + ")")
    start = "def" if model.cfg.idioms else ""
    if model.cfg.idioms:  # else the model need not have seen Python
        log(f"\n{'task':<28} {'binary':>8} {'full':>8} {'accuracy':>8}   100 pairs, unseen names")
        scores = evaluate_tasks(model)
        for name in tasks.TASKS:
            s = scores.get(name)
            log(f"{name:<28} " + (f"{s.binary:8.4f} {s.full:8.4f} {s.accuracy:8.1%}" if s else
                                  "not scored: no prompt is of use"))
        under = [sum(s.binary < level for s in scores.values()) for level in (0.05, 0.15)]
        log(f"binary loss under 0.05 on {under[0]}, under 0.15 on {under[1]} of "
            f"{len(tasks.TASKS)} tasks")
    log(f"\nsample after {start!r}:\n    " + sample(model, start).replace("\n", "\n    "))


# ---- threads and memory -------------------------------------------------------------------------

def n_cores():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


thread_pool = functools.cache(ThreadPoolExecutor)  # one for each size, made when first used


def parallel(fn, items, threads=0):
    """[fn(item) for item in items], on `threads` threads (0: one a core).

    NumPy leaves the interpreter free while it computes, so whole parts of a batch go one to a
    thread, each with BLAS on one thread: 1.2 times as fast as a threaded BLAS (width 128, two
    cores). What an item computes does not depend on its thread, so results are the same, bit for
    bit, for any number of threads. If NumPy was imported before this file, BLAS has threads of its
    own: that is slower, and results agree up to rounding.
    """
    size = threads or n_cores()
    if size == 1 or xp is not np:
        return [fn(item) for item in items]
    return list(thread_pool(size).map(fn, items))


def in_chunks(fn, *arrays, threads=0):
    """Run fn on parts of flat arrays, of about a core's cache each: smaller ones wait for each
    other at the interpreter's lock. A GPU takes all at once."""
    n = len(arrays[0])
    size = 1 << 18 if xp is np else n
    parts = [slice(start, start + size) for start in range(0, n, size)]
    parallel(lambda part: fn(*(array[part] for array in arrays)), parts, threads)


def n_shards(cfg):
    """Parts that a batch is cut into, one a thread: fixed by the config, so that sums do not
    depend on the number of cores. Two of at least 512 tokens, up to eight of at least 1024, and at
    most 64 M gradients over all of them, to keep memory small."""
    if xp is not np:
        return 1
    tokens = cfg.batch_size * cfg.n_ctx
    parts = max(min(2, tokens // 512), min(8, tokens // 1024))
    return max(1, min(parts, cfg.batch_size, (64 << 20) // n_params(cfg)))


def batch_gradient(params, ids, targets, cfg):
    """(loss, gradient as a flat array) of a batch: `loss_and_grads` in n_shards parts, one a
    thread, whose gradients are summed in a fixed order. Under mpirun each process takes a share of
    the parts' rows, and all get the sum."""
    all_of_them = processes()
    first, end = (len(ids) * (all_of_them.rank + i) // all_of_them.size for i in (0, 1))
    n = min(n_shards(cfg), end - first)
    cuts = [slice(first + s * (end - first) // n, first + (s + 1) * (end - first) // n)
            for s in range(n)]
    losses, grads = zip(*parallel(
        lambda rows: loss_and_grads(params, ids[rows], targets[rows], cfg, ids.size), cuts,
        cfg.threads))
    flat = xp.empty(n_params(cfg), cfg.dtype)
    total = views(flat, cfg)

    def add_up(name):
        total[name][...] = functools.reduce(xp.add, [g[name] for g in grads])

    parallel(add_up, sorted(total, key=lambda name: -total[name].size), cfg.threads)
    return summed(sum(losses), flat)


def keep_freed_memory():
    """Make glibc keep what is freed for the next array: fresh pages cost NumPy more than the
    arithmetic, 1.1 times a training step. Elsewhere than on glibc nothing is done."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: the largest that it takes
    mallopt(-1, 1 << 30)   # M_TRIM_THRESHOLD


# ---- several processes: mpirun -n 4 python sparsegpt.py -----------------------------------------
# Each takes a share of every batch, and all update alike. The first of them logs and saves.

@functools.cache
def processes():
    """MPI's communicator: its `size`, and `rank`, the number of this process, from 0. One process
    alone has a stand-in. Raises UserError if mpi4py is missing under mpirun."""
    if max(int(os.environ.get(name) or 1) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")) == 1:
        return SimpleNamespace(size=1, rank=0, allgather=lambda x: [x])
    try:
        from mpi4py import MPI
    except ImportError as e:
        raise UserError("mpirun needs mpi4py: pip install mpi4py") from e
    return MPI.COMM_WORLD


def summed(loss, flat):
    """A loss and a flat gradient, summed over the processes in one call."""
    if processes().size == 1:
        return loss, flat
    both = np.append(to_host(flat), to_host(loss))
    processes().Allreduce(both.copy(), both)
    return both[-1], xp.asarray(both[:-1])


def anywhere(true):
    """Whether something is true in any of the processes."""
    return any(processes().allgather(bool(true)))


def ended(status):
    """The exit status. If it is of a mistake or Ctrl-C, all processes end: none waits for this."""
    if status > 1 and "mpi4py" in sys.modules:
        processes().Abort(status)
    return status


def follow(corpus, cfg, resume):
    """What processes other than the first do: the same steps, and no output."""
    flat, m, v, start = starting_state(cfg, resume, corpus.digest)
    with program.interrupts_noted() as interrupts:
        for _ in training_steps(flat, m, v, start, corpus.train, cfg):
            if anywhere(interrupts):
                break
    sys.exit(0)


# ---- parts of ops -------------------------------------------------------------------------------

def shifted(logits, sink, limit=40):  # [B, H, T, T], [H] or None
    """(logits, sink [..., 1, 1]) less the largest logit of each row, so that exp does not
    overflow; as they are where exp is safe, as the largest takes a third of attention's time."""
    sink = xp.full(1, -math.inf, logits.dtype) if sink is None else sink
    own = xp.einsum("bhtt->bht", logits)  # a query's logit of itself: its row's largest is no less
    if xp is np and logits.max() <= limit and own.min() >= -limit and sink.max() <= limit:
        return logits, sink[:, None, None]
    top = xp.maximum(logits.max(-1, keepdims=True), sink[:, None, None])
    return logits - top, sink[:, None, None] - top


def normal_cdf(x, bell):
    """Phi(x), the cumulative normal distribution; bell: exp(-x*x/2). float32: Abramowitz and
    Stegun 7.1.26, to 1.5e-7. float64, for checks: to rounding, and slow."""
    if x.dtype != np.float32:
        return xp.asarray(np.vectorize(math.erfc, "d")(to_host(x) / -math.sqrt(2)) / 2)
    t = 1 / (1 + (0.3275911 / math.sqrt(2)) * abs(x))
    tail = 1.061405429 / 2 * t  # in the end 1 - Phi(|x|)
    for a in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail += a / 2
        tail *= t
    return 0.5 + xp.copysign(0.5 - tail * bell, x)


# ---- checks and timings -------------------------------------------------------------------------

TINY = dict(n_layer=2, d_model=32, d_head=8, n_ctx=12, vocab_size=300, batch_size=2,
            dtype="float64", threads=1, min_per_neuron=0)  # the sizes of --gradcheck


def gradcheck(cfg, log=print):
    """Print each parameter's analytic and numeric derivative along a random direction, in float64,
    for the model options of cfg at small sizes. Returns the largest relative error."""
    cfg = dataclasses.replace(cfg, **TINY)
    rng, flat, worst = np.random.default_rng(4), init_flat(cfg), 0.0
    flat += xp.asarray(0.3 * rng.standard_normal(len(flat)))  # gradients well above rounding
    ids = rng.integers(0, cfg.vocab_size, (cfg.batch_size, cfg.n_ctx + 1))
    run = functools.partial(loss_and_grads, views(flat, cfg), ids[:, :-1], ids[:, 1:], cfg)

    def compare(w, grad, h):  # (relative error, analytic, numeric) along a direction
        # Each entry moves to the gradient's side: else the terms may cancel and rounding be left.
        way = xp.asarray(abs(rng.standard_normal(w.shape))) * xp.where(grad < 0, -1, 1)
        former, at = w.copy(), []
        for move in (h, -h):
            w[...] = former + move * way
            at.append(float(run()[0]))
        w[...] = former
        analytic, numeric = float((grad * way).sum()), (at[0] - at[1]) / (2 * h)
        return abs(analytic - numeric) / max(abs(analytic), abs(numeric), 1e-12), analytic, numeric

    log(f"{'parameter':<16} {'shape':>12} {'analytic':>16} {'numeric':>16} {'relative':>9}")
    for name, grad in run()[1].items():
        # The best of three steps: a long one may cross a kink, where AbsTopK takes another entry.
        error, *two = min(compare(views(flat, cfg)[name], grad, h) for h in (1e-5, 1e-6, 1e-7))
        worst = float(np.maximum(worst, error))  # which stays NaN once it is
        log(f"{name:<16} {' x '.join(map(str, grad.shape)):>12} {two[0]:16.10f} {two[1]:16.10f} "
            f"{error:9.1e}")
    log(f"largest relative error {worst:.1e}")
    return worst


def bench(cfg, n=15, log=print):
    """Print the median time of n training steps of cfg on random tokens, at its final density."""
    cfg = dataclasses.replace(cfg, steps=max(cfg.steps, n + 2))
    flat, ends = init_flat(cfg), []
    streams = dict(code=np.random.default_rng(0).integers(0, cfg.vocab_size, 1 << 20))
    moments = xp.zeros((2, len(flat)), flat.dtype)
    for _ in training_steps(flat, *moments, cfg.steps - n - 1, streams, cfg):
        float(flat[0])  # waits for a GPU
        ends.append(time.perf_counter())
    step = float(np.median(np.diff(ends)))
    log(f"{cfg.n_layer} layers, width {cfg.d_model}, batch {cfg.batch_size} x {cfg.n_ctx}, "
        f"vocabulary {cfg.vocab_size}, density {cfg.density:g}, AbsTopK {cfg.afrac:g}, "
        f"{cfg.threads or n_cores()} threads: {1e3 * step:.1f} ms a step, "
        f"{cfg.batch_size * cfg.n_ctx / step:,.0f} tokens/s")


# ---- command line -------------------------------------------------------------------------------

# A plain dense model, as the paper's are, that ends within 2 % of the sparse default's validation
# loss: see docs/results.md.
DENSE = dict(d_model=64, density=1.0, afrac=1.0, lr=0.007, steps=6000, out="out/dense.npz")
# Five times the text, with smaller circuits and more tasks: see docs/defaults.md.
LONG = dict(afrac=1 / 4, batch_size=32, steps=13000, late=3, out="out/long.npz")
QUICK = dict(n_layer=1, d_model=64, density=1 / 8, afrac=1.0, lr=0.016, steps=1000,
             max_mb=0.3, out="out/quick.npz")
PRESETS = dict(dense=DENSE, long=LONG, quick=QUICK)
TAKES = dict(  # the flags that these modes look at; they refuse the others
    bench={*Config.__dataclass_fields__, *PRESETS} - {"data", "max_mb", "idioms", "late", "out"},
    gradcheck={"act", "afrac", "positions", "sink", "bigram"},
    resume={"out", "data", "threads", *PRESETS}, sample={"out", "seed", *PRESETS})


def make_parser():
    """One flag for each Config field, and the modes. Flags not given are absent."""
    parser = program.Parser(description="Train a weight-sparse transformer, in about 15 minutes.",
                          argument_default=argparse.SUPPRESS)
    presets = parser.add_argument_group("presets").add_mutually_exclusive_group()
    presets.add_argument("--dense", action="store_true", help="a dense model of about equal loss")
    presets.add_argument("--long", action="store_true", help="five times the text, smaller "
                         "circuits; 70 minutes")
    presets.add_argument("--quick", action="store_true", help="a tiny model, all done in seconds")
    modes = parser.add_argument_group("what to do (default: train)").add_mutually_exclusive_group()
    for name, text in [("resume", "go on with the interrupted run of --out"),
                       ("gradcheck", "check every gradient numerically, at small sizes"),
                       ("bench", "time a training step on this machine")]:
        modes.add_argument(f"--{name}", action="store_true", help=text)
    modes.add_argument("--sample", metavar="PROMPT", help="continue PROMPT with the model --out")
    for f in dataclasses.fields(Config):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(
            type=program.fraction if f.type is float else f.type,
            metavar="|".join(choices(f) or [f.type.__name__.upper()]))
        parser.add_argument(f"--{f.name}", help=f"{f.metadata['help']} (default {f.default})",
                            **kind)
    return parser


def configure(given):
    """The Config of parsed flags: defaults, then the preset, then what was given. A resumed run
    keeps its own, but its file decides neither what is read nor what is written. Raises UserError
    on a flag that the mode does not look at."""
    for mode, takes in TAKES.items():
        if mode in given and (more := given.keys() - takes - {mode}):
            raise UserError(f"--{mode} takes no --{min(more)}")
    [values] = [PRESETS[name] for name in PRESETS if name in given] or [{}]
    names = {f.name for f in dataclasses.fields(Config)}
    values = values | {name: value for name, value in given.items() if name in names}
    if "resume" not in given:
        return Config(**values)
    out = values.get("out", Config.out)
    cfg = load_partial(out).cfg
    if cfg.data != values.get("data", Config.data):
        raise UserError(f"the run was on --data {cfg.data}: name it to go on with it")
    return dataclasses.replace(cfg, out=out, threads=values.get("threads", cfg.threads))


def run(argv):
    """What `main` does, if nothing goes wrong."""
    given = vars(make_parser().parse_args(argv))
    device = use_device(os.environ.get("SPARSEGPT_DEVICE", "cpu"))
    keep_freed_memory()
    cfg = configure(given)
    if "gradcheck" in given:
        return int(not gradcheck(cfg) <= 1e-6)
    if "sample" in given:
        path = cfg.out if given.keys() & {"out", *PRESETS} else default_model()
        print(sample(load(path), given["sample"], seed=cfg.seed))
        return 0
    print(device)
    if "bench" in given:
        bench(cfg)
        return 0
    resolved = dict(dataclasses.asdict(cfg), embed_density=target_density("wte", cfg),
                    threads=cfg.threads or n_cores())
    print("config: " + " ".join(f"{name}={value}" for name, value in resolved.items()))
    train(cfg, "resume" in given)
    print(f"\nnext: python sparsegpt.py --sample 'def f(' --out {shlex.quote(cfg.out)}")
    return 0


def main(argv=None):
    """The command line. Returns the exit status: 0, 1 for a check that failed, 2 for a mistake,
    130 for Ctrl-C."""
    return ended(program.command("sparsegpt.py", run, argv))


# ---- the GPU ------------------------------------------------------------------------------------
# On CuPy the ops of Part I run as they are, but for those that docs/gpu.py has kernels for.

def use_device(name):
    """Choose the array module: "cpu" (NumPy) or "gpu" (CuPy). Returns a line that says what was
    chosen. Raises UserError if CuPy or a device is missing: never a silent fall-back."""
    global xp, gpu
    if name not in ("cpu", "gpu"):
        raise UserError(f"SPARSEGPT_DEVICE must be cpu or gpu, not {name!r}")
    if name == "cpu":
        xp = np
        return f"device: CPU through NumPy {np.__version__}"
    try:
        import cupy
        cupy.zeros(1).sum()  # a driver without a usable device fails here, not at import
    except Exception as e:
        raise UserError(f"SPARSEGPT_DEVICE=gpu, but there is no usable GPU: {type(e).__name__}: "
                        f"{e}; install CuPy for your CUDA version (pip install cupy-cuda12x) or "
                        "set SPARSEGPT_DEVICE=cpu") from e
    from docs import gpu
    xp = cupy
    if processes().rank:
        cupy.cuda.Device(processes().rank % cupy.cuda.runtime.getDeviceCount()).use()
    return f"device: GPU through CuPy {cupy.__version__}"


def to_host(x):
    """A NumPy array with the values of x, from either backend."""
    return x.get() if hasattr(x, "get") else np.asarray(x)


def fused(x):
    """Whether ops run as kernels of docs/gpu.py on x."""
    return hasattr(xp, "RawKernel") and x.dtype == np.float32


if __name__ == "__main__":
    sys.exit(main())
