"""Weight-sparse transformers, from scratch, in a single file: a GPT with almost all weights at
zero. Source: Gao et al., "Weight-sparse transformers have interpretable circuits", arXiv
2511.13653 (2025), "the paper" below, and its authors' released code, "the release".

    python sparsegpt.py                     # train on simple Python, about 15 minutes
    python sparsegpt.py --sample "def f("   # write code with the result

Part I is the method, in plain array code that reads from top to bottom. Part II is the machinery
around it. The file works alone, on text of yours: --data FILES --idioms 0. Zero weights are
multiplied like any others; sparsity buys interpretability, not speed.

Deliberate departures from the paper:
- q, k and v share one matrix, and the gradient is divided by its RMS even where that is below 1,
  as in the release. RMSNorm has no gains.
- The sizes are a laptop's, and the tokenizer has 512 tokens, learned from the training text.
- The share of channels that AbsTopK keeps falls from 1 to `afrac` while the density falls.
- A head may prefer some distances to others; the paper's models have no positions.
- Weights go earlier in the run, and weight decay is lower. Both made the loss lower here.
"""
import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends quietly while the modules load
# For BLAS, before NumPy: the threads are ours, see `parallel`; its own would change last bits.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import dataclasses
import math
from typing import NamedTuple

import numpy as np
xp = np  # NumPy or CuPy. Other files read sparsegpt.xp, as `use_device` may rebind it.

# =================================================================================================
# Part I: the method
# =================================================================================================
# Of Part II it calls check_config and check_ids, which refuse what is wrong; batch_gradient, which
# is loss_and_grads over parts of a batch; parallel and in_chunks, which use all cores; to_host.

# ---- settings -----------------------------------------------------------------------------------
def flag(default, text):
    """A Config field, with the text that --help shows for it."""
    return dataclasses.field(default=default, metadata=dict(help=text))


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run; every field is a flag. Raises UserError on a wrong value."""
    n_layer: int = flag(2, "blocks of attention and MLP")
    d_model: int = flag(256, "width of the residual stream")
    d_head: int = flag(16, "width of an attention head")
    n_ctx: int = flag(128, "context length in tokens")
    vocab_size: int = flag(512, "tokens: 256 bytes, a separator and learned merges")
    act: str = flag("gelu", "activation of the MLP")
    afrac: float = flag(1 / 2, "share of channels that AbsTopK keeps at a site; 1: all")
    positions: str = flag("relative", "relative: a logit per head and distance; learned; none")
    sink: bool = flag(True, "a learned attention sink per head")
    bigram: bool = flag(True, "a dense table of logits by the current token")

    density: float = flag(1 / 64, "share of nonzero weights in the matrices of blocks; 1: dense")
    embed_density: float = flag(0.0, "the same for (un)embeddings; 0: 4 x density")
    min_per_neuron: int = flag(4, "least nonzero weights of a neuron or head channel (j)")
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
    grad_scale: str = flag("divide", "divide the gradient by its RMS, or clip that to 1")
    idioms: float = flag(0.9, "share of the sequences drawn from generated idioms")
    seed: int = flag(0, "of initialisation, batches and samples")

    data: str = flag("stdlib", "files or folders, with commas; stdlib: Python's library")
    late: int = flag(1, "how many times as often idioms show tasks that are learned late")
    max_mb: float = flag(0.0, "read about this many megabytes of each source; 0: all")
    threads: int = flag(0, "threads; 0: one a core. The result does not depend on it")
    out: str = flag("out/sparse.npz", "checkpoint; --dense, --long and --quick name others")
    dtype: str = flag("float32", "float64 is for checks")

    def __post_init__(self):
        check_config(self)

    def n_active(self, width):
        """The number of channels that AbsTopK keeps out of `width`."""
        return max(1, int(self.afrac * width))


# ---- ops: each forward, and its backward right under it -----------------------------------------
# Most ops are `out, cache = op(x, ...)`, with `dx = op_backward(dout, cache)` under it. `dout` is
# the gradient of the loss by `out`; returned are those by the array inputs, in their order. Others
# are parts of ops. No op changes its input. N is batch x time: a linear map is one matrix product.

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
    for i, row in zip(ids, rows):  # three times as fast as np.add.at
        out[i] += row
    return out


def rmsnorm(x, eps=1e-5):  # [N, C] -> [N, C]
    """Each row divided by its root mean square. It has no gain: see the top."""
    scale = 1 / xp.sqrt((x * x).mean(1, keepdims=True) + eps)
    out = x * scale
    return out, (out, scale)

def rmsnorm_backward(dout, cache):
    out, scale = cache
    return (dout - out * (dout * out).mean(1, keepdims=True)) * scale


def linear(x, w, b):  # [N, in], [in, out], [out] -> [N, out]
    return x @ w + b, (x, w)

def linear_backward(dout, cache):
    x, w = cache
    return dout @ w.T, x.T @ dout, dout.sum(0)


def topk_mask(magnitude, k):  # [..., C] >= 0 -> bool [..., C]
    """True at the k >= 1 largest of each row of the last axis: exactly k, the first of equals."""
    bits = magnitude.view(f"i{magnitude.itemsize}")  # which sort alike, and faster
    kth = xp.partition(bits, -k, axis=-1)[..., -k, None]
    mask = bits >= kth
    if xp.count_nonzero(mask) == mask.size // mask.shape[-1] * k:
        return mask
    above, equal = bits > kth, bits == kth  # in some row the k-th has equals
    return above | (equal & (xp.cumsum(equal, axis=-1) <= k - above.sum(-1, keepdims=True)))


def abstopk(x, k):  # [..., C] -> [..., C]
    """Zero all but the k entries of largest |x| of each row (paper A.1). k >= C returns x itself.
    The cache is the mask of what is kept, or None."""
    if k >= x.shape[-1]:
        return x, None
    mask = topk_mask(abs(x), k)
    return x * mask, mask

def abstopk_backward(dout, mask):
    return dout if mask is None else dout * mask


def normal_cdf(x, bell):
    """Phi(x), the cumulative normal distribution, which NumPy lacks; bell: exp(-x*x/2). float32:
    Abramowitz and Stegun 7.1.26, to 1.5e-7. float64, for checks: to rounding, and slow."""
    if x.dtype != np.float32:
        return xp.asarray(np.vectorize(math.erfc, "d")(to_host(x) / -math.sqrt(2)) / 2)
    t = 1 / (1 + (0.3275911 / math.sqrt(2)) * abs(x))
    tail = 1.061405429 / 2 * t  # in the end 1 - Phi(|x|)
    for a in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail += a / 2
        tail *= t
    return 0.5 + xp.copysign(0.5 - tail * bell, x)


def gelu(x):
    """x * Phi(x), the exact GELU. The cache is its derivative, Phi(x) + x * phi(x)."""
    bell = xp.exp(-0.5 * x * x)
    cdf = normal_cdf(x, bell)
    return x * cdf, cdf + x * bell * (1 / math.sqrt(2 * math.pi))


def relu(x):
    """max(x, 0). The cache is its derivative."""
    return xp.maximum(x, 0), x > 0


ACTIVATIONS = {"gelu": gelu, "relu": relu}  # op(x) -> (out, derivative), by its name for --act

def activation_backward(dout, slope):
    return dout * slope


def relative_bias(table, T):  # [H, n_ctx] -> [H, T, T]
    """table[h, t - s] for query t and key s: what head h adds to the logit of a key so many tokens
    back (the relative positions of Raffel et al., 2020, section 2.1, without buckets). -inf for a
    key that comes after its query."""
    t, near = xp.arange(T), table[:, :T]
    near = xp.concatenate([near, xp.full_like(near, -math.inf)], axis=1)
    return near[:, t[:, None] - t], table  # a negative index counts from the end, where -inf is

def relative_bias_backward(dout, table):  # [H, T, T], 0 for keys to come -> [H, n_ctx]
    H, T, _ = dout.shape
    # Cut into rows that are one longer, entry (t, s) stands in column s - t, modulo T + 1.
    longer = xp.concatenate([dout.reshape(H, -1), xp.zeros((H, T), dout.dtype)], axis=1)
    dtable = xp.zeros((H, table.shape[1]), dout.dtype)
    dtable[:, :T] = longer.reshape(H, T, T + 1).sum(1)[:, -xp.arange(T)]
    return dtable


def softmax(logits, sink):  # [B, H, T, T], [H] or None -> [B, H, T, T]
    """Softmax over the keys. sink: a logit per head that joins the denominator only (paper A.1).
    The cache is the attention weights and the sink's share, which sum to 1 for each query."""
    sink = xp.full(1, -math.inf, logits.dtype) if sink is None else sink
    top = xp.maximum(logits.max(-1, keepdims=True), sink[:, None, None])
    e, e_sink = xp.exp(logits - top), xp.exp(sink[:, None, None] - top)  # which cannot overflow
    total = e.sum(-1, keepdims=True) + e_sink
    weights = e / total
    return weights, (weights, e_sink / total)

def softmax_backward(dout, cache):  # -> [B, H, T, T], [H]
    weights, sink_share = cache
    along = (dout * weights).sum(-1, keepdims=True)
    return weights * (dout - along), -(along * sink_share).sum((0, 2, 3))


def split_heads(x, B, d_head):  # [B*T, C] -> a view [B, H, T, D]
    return x.reshape(B, len(x) // B, x.shape[1] // d_head, d_head).transpose(0, 2, 1, 3)

def merge_heads(x):  # [B, H, T, D] -> [B*T, C]
    return x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1] * x.shape[3])


def attention(q, k, v, sink, table, B, d_head):  # three times [B*T, C] -> [B*T, C]
    """Causal softmax attention. sink: see `softmax`. table: see `relative_bias`, or None."""
    T, (q, k, v) = len(q) // B, (split_heads(x, B, d_head) for x in (q, k, v))
    logits = (q / math.sqrt(d_head)) @ k.swapaxes(2, 3)  # [B, H, T, T]
    bias, bias_cache = relative_bias(xp.zeros((1, T), q.dtype) if table is None else table, T)
    logits += bias  # -inf for keys to come
    weights, softmax_cache = softmax(logits, sink)
    return merge_heads(weights @ v), (q, k, v, softmax_cache, bias_cache)

def attention_backward(dout, cache):  # -> three times [B*T, C], [H], [H, n_ctx]
    q, k, v, softmax_cache, bias_cache = cache
    dout = split_heads(dout, len(q), q.shape[3])
    dv = softmax_cache[0].swapaxes(2, 3) @ dout
    dlogits, dsink = softmax_backward(dout @ v.swapaxes(2, 3), softmax_cache)
    dtable = relative_bias_backward(dlogits.sum(0), bias_cache)
    dq = dlogits @ k / math.sqrt(q.shape[3])
    dk = dlogits.swapaxes(2, 3) @ q / math.sqrt(q.shape[3])
    return *map(merge_heads, (dq, dk, dv)), dsink, dtable


def cross_entropy(logits, targets):  # [N, V], [N] -> [N]
    """-log softmax(logits)[target] of each row, in nats."""
    rows = xp.arange(len(targets))
    logits = logits - logits.max(-1, keepdims=True)
    p = xp.exp(logits)
    total = p.sum(-1, keepdims=True)
    return xp.log(total[:, 0]) - logits[rows, targets], (p / total, rows, targets)

def cross_entropy_backward(dout, cache):  # [N] -> [N, V]
    p, rows, targets = cache
    dlogits = p * dout[:, None]
    dlogits[rows, targets] -= dout
    return dlogits


# ---- a block's wiring: all that counts, prunes or draws weights goes by these tables ------------
# Parameters and sites of block 0 are called h0.attn.wqkv, h0.attn_in and so on.

class Site(NamedTuple):
    """A hook point of a block. Its channels are the nodes of circuits (paper A.1, A.5)."""
    width: int      # channels, in multiples of d_model
    link: str = ""  # "reads" the stream, "adds" to it, or the site whose channels it takes over


class Matrix(NamedTuple):
    """A matrix [in, out] of a block. Its nonzero weights are the edges of circuits."""
    bias: str
    reads: str      # the site of its rows; attention stands between v and wo
    writes: tuple   # the sites of its columns, side by side
    neurons: int    # the axis of neurons or heads' channels, which keep j weights each (release)


SITES = {  # in the order of computation
    "attn_in": Site(1, "reads"), "q": Site(1), "k": Site(1), "v": Site(1),
    "attn_out": Site(1, "adds"), "mlp_in": Site(1, "reads"), "neuron": Site(4),
    "mlp_out": Site(1, "adds")}

MATRICES = {
    "attn.wqkv": Matrix("attn.bqkv", "attn_in", ("q", "k", "v"), neurons=1),
    "attn.wo": Matrix("attn.bo", "v", ("attn_out",), neurons=0),
    "mlp.wfc": Matrix("mlp.bfc", "mlp_in", ("neuron",), neurons=1),
    "mlp.wproj": Matrix("mlp.bproj", "neuron", ("mlp_out",), neurons=0)}
EMBEDDINGS = ("wte", "wpe", "head.w")


def block_matrix(name):
    """The Matrix of a parameter, or None if it is no matrix of a block."""
    return MATRICES.get(name.partition(".")[2])


def is_matrix(name):
    """Whether a parameter is drawn at random, made sparse and decayed; others start at 0."""
    return name in EMBEDDINGS or block_matrix(name) is not None


# ---- parameters: one flat array with named views ------------------------------------------------
def shapes(cfg):
    """{name: shape} of every parameter, in the order of the flat array. Matrices are [in, out]."""
    C, V, H = cfg.d_model, cfg.vocab_size, cfg.d_model // cfg.d_head
    out = {"wte": (V, C)}
    if cfg.positions == "learned":
        out["wpe"] = (cfg.n_ctx, C)
    for h in (f"h{i}." for i in range(cfg.n_layer)):
        for name, m in MATRICES.items():
            width = C * sum(SITES[site].width for site in m.writes)
            out |= {h + name: (C * SITES[m.reads].width, width), h + m.bias: (width,)}
        if cfg.sink:
            out[h + "attn.sink"] = (H,)
        if cfg.positions == "relative":
            out[h + "attn.relbias"] = (H, cfg.n_ctx)
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


def init_flat(cfg):
    """Fresh parameters, [n_params]: normal of deviation 0.02, divided by sqrt(2 n_layer) in output
    projections; all else 0 (paper A.1). NumPy draws, also for a GPU."""
    rng, flat = np.random.default_rng(cfg.seed), np.zeros(n_params(cfg), cfg.dtype)
    for name, w in views(flat, cfg).items():
        if is_matrix(name):
            w[...] = 0.02 * rng.standard_normal(w.shape)
            m = block_matrix(name)
            if m and any(SITES[site].link == "adds" for site in m.writes):
                w /= math.sqrt(2 * cfg.n_layer)
    return xp.asarray(flat)


# ---- the model ----------------------------------------------------------------------------------
# Each op's cache is kept under a name. The backward pass is the call list of the forward pass in
# reverse, and takes the caches out again. `g` collects the gradients under the parameters' names.

def hook_point(x, k, hook, site):  # [N, C] -> [N, C], without a hook
    """AbsTopK over the channels of a site, or what a hook does in its place. A hook has
    `forward(site, x, k) -> x`, where k is what AbsTopK would keep, and `backward(site, dx) -> dx`.
    It may return another width than C, if the parameters fit that."""
    out, mask = abstopk(x, k) if hook is None else (hook.forward(site, x, k), None)
    return out, (mask, hook, site)

def hook_point_backward(dout, cache):
    mask, hook, site = cache
    return abstopk_backward(dout, mask) if hook is None else hook.backward(site, dout)


def attention_layer(x, p, i, cfg, B, hook, cache):  # [N, C] -> [N, C]
    """The residual stream x after the attention of block i."""
    h, k = f"h{i}.", cfg.n_active(cfg.d_model)
    y, cache[h + "norm1"] = rmsnorm(x)
    y, cache[h + "attn_in"] = hook_point(y, k, hook, h + "attn_in")
    y, cache[h + "wqkv"] = linear(y, p[h + "attn.wqkv"], p[h + "attn.bqkv"])
    qkv, C = [], y.shape[1] // 3  # queries, keys and values stand side by side
    for n, site in enumerate((h + "q", h + "k", h + "v")):
        part, cache[site] = hook_point(y[:, n * C:(n + 1) * C], k, hook, site)
        qkv.append(part)
    y, cache[h + "attention"] = attention(
        *qkv, p.get(h + "attn.sink"), p.get(h + "attn.relbias"), B, cfg.d_head)
    y, cache[h + "wo"] = linear(y, p[h + "attn.wo"], p[h + "attn.bo"])
    y, cache[h + "attn_out"] = hook_point(y, k, hook, h + "attn_out")
    return x + y

def attention_layer_backward(dx, g, i, cache):
    h = f"h{i}."
    dy = hook_point_backward(dx, cache.pop(h + "attn_out"))
    dy, g[h + "attn.wo"], g[h + "attn.bo"] = linear_backward(dy, cache.pop(h + "wo"))
    *dqkv, g[h + "attn.sink"], g[h + "attn.relbias"] = attention_backward(
        dy, cache.pop(h + "attention"))
    dy = xp.concatenate([hook_point_backward(d, cache.pop(site)) for d, site in zip(
        dqkv, (h + "q", h + "k", h + "v"))], axis=1)
    dy, g[h + "attn.wqkv"], g[h + "attn.bqkv"] = linear_backward(dy, cache.pop(h + "wqkv"))
    dy = hook_point_backward(dy, cache.pop(h + "attn_in"))
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

def mlp_layer_backward(dx, g, i, cache):
    h = f"h{i}."
    dy = hook_point_backward(dx, cache.pop(h + "mlp_out"))
    dy, g[h + "mlp.wproj"], g[h + "mlp.bproj"] = linear_backward(dy, cache.pop(h + "wproj"))
    dy = hook_point_backward(dy, cache.pop(h + "neuron"))
    dy = activation_backward(dy, cache.pop(h + "act"))
    dy, g[h + "mlp.wfc"], g[h + "mlp.bfc"] = linear_backward(dy, cache.pop(h + "wfc"))
    dy = hook_point_backward(dy, cache.pop(h + "mlp_in"))
    return dx + rmsnorm_backward(dy, cache.pop(h + "norm2"))


def unembedding(p):  # -> [C, V]
    """The matrix that makes logits."""
    return p["head.w"]


def unembed(x, current, p, cfg, hook, cache):  # [n, C], [n] -> [n, V]
    """Logits of the next token. current: the tokens of these rows, for the bigram table."""
    y, cache["norm"] = rmsnorm(x)
    y, cache["final"] = hook_point(y, cfg.d_model, hook, "final")  # k = C: no AbsTopK here
    logits, cache["head"] = linear(y, unembedding(p), p["head.b"])
    if cfg.bigram:
        logits += p["bigram"][current]
    cache["current"] = current
    return logits

def unembed_backward(dlogits, g, cache):
    g["bigram"] = scatter_rows(cache.pop("current"), dlogits, dlogits.shape[1])
    dy, g["head.w"], g["head.b"] = linear_backward(dlogits, cache.pop("head"))
    dy = hook_point_backward(dy, cache.pop("final"))
    return rmsnorm_backward(dy, cache.pop("norm"))


def forward(params, ids, cfg, hook=None, at=None):
    """Logits [B, T, V] for token ids [B, T], and the caches that `backward` takes. hook: see
    `hook_point`. at: [B], a place in each row: the logits there alone, [B, V]; the last MLP and
    the unembedding run for these only. Raises ValueError on ids that do not fit."""
    check_ids(ids, cfg, at)
    ids, (B, T), cache = xp.asarray(ids), ids.shape, {}
    rows = slice(None) if at is None else xp.arange(B) * T + xp.asarray(at)
    x, cache["embedding"] = embedding(ids, params["wte"], params.get("wpe"))
    for i in range(cfg.n_layer):
        x = attention_layer(x, params, i, cfg, B, hook, cache)
        if i == cfg.n_layer - 1:
            x, cache["rows"] = x[rows], (rows, x.shape)
        x = mlp_layer(x, params, i, cfg, hook, cache)
    logits = unembed(x, ids.reshape(-1)[rows], params, cfg, hook, cache)
    return logits.reshape(*(ids.shape if at is None else (B,)), -1), cache

def backward(dlogits, cache, cfg):
    """{name: gradient} of the parameters, from that of the logits. Uses up the cache."""
    g = {}
    dx = unembed_backward(dlogits.reshape(-1, cfg.vocab_size), g, cache)
    for i in reversed(range(cfg.n_layer)):
        dx = mlp_layer_backward(dx, g, i, cache)
        if i == cfg.n_layer - 1:
            (rows, shape), some = cache.pop("rows"), dx
            dx = xp.zeros(shape, some.dtype)
            dx[rows] = some
        dx = attention_layer_backward(dx, g, i, cache)
    g["wte"], g["wpe"] = embedding_backward(dx, cache.pop("embedding"))
    assert not cache, f"no backward took the cache of {', '.join(cache)}"
    return {name: g[name] for name in shapes(cfg)}


def loss_and_grads(params, ids, targets, cfg, hook=None):
    """The mean cross-entropy in nats per token, and {name: gradient}. ids, targets: [B, T]."""
    check_ids(targets, cfg, like=ids)
    logits, cache = forward(params, ids, cfg, hook)
    losses, ce = cross_entropy(logits.reshape(-1, cfg.vocab_size), xp.asarray(targets).reshape(-1))
    dlogits = cross_entropy_backward(xp.full_like(losses, 1 / ids.size), ce)
    return losses.sum() / ids.size, backward(dlogits, cache, cfg)


# ---- sparsity (paper A.2) -----------------------------------------------------------------------
def target_density(name, cfg):
    """The share of nonzeros that a parameter keeps at the end; 1 for what stays dense."""
    if name in EMBEDDINGS:
        return cfg.embed_density or min(1.0, 4 * cfg.density)
    return cfg.density if block_matrix(name) else 1.0


def density_at(target, step, cfg):
    """The share at a step: 1 until anneal_start, then linearly down to target at anneal_end."""
    start, end = cfg.anneal_start * cfg.steps, min(cfg.anneal_end * cfg.steps, cfg.steps - 1)
    if step >= end:
        return target  # to the last bit: AbsTopK's k is rounded down from it
    return 1 + (target - 1) * (0.0 if step <= start else (step - start) / (end - start))


def annealed_config(step, cfg):
    """The config with AbsTopK's share as of a step: it falls with the density."""
    return dataclasses.replace(cfg, afrac=density_at(cfg.afrac, step, cfg))


def n_nonzero(name, shape, step, cfg):
    """How many entries a step leaves: density x size, but at least j for each neuron. At the
    default width and final density the two are equal: every neuron keeps its four largest."""
    m, size = block_matrix(name), math.prod(shape)
    least = max(1, cfg.min_per_neuron * shape[m.neurons]) if m else 1
    return min(size, max(round(density_at(target_density(name, cfg), step, cfg) * size), least))


def keep_largest(w, k, j=0, axis=None):
    """Zero all but k entries of w, in place: those of largest |w|, exactly k, the first of equals.
    With j, the j largest at each index of `axis`, a neuron's, go first: k >= j x neurons."""
    magnitude = abs(w)
    if j and axis is not None:
        rows = magnitude if axis == 0 else magnitude.T  # a view: a neuron a row
        rows[topk_mask(xp.ascontiguousarray(rows), j)] = math.inf
    w[...] = xp.where(topk_mask(magnitude.reshape(-1), k).reshape(w.shape), w, 0)


def cuts(params, step, cfg):
    """[(w, k, j, axis)], what `keep_largest` takes, of the parameters that are to be sparse."""
    return [(w, n_nonzero(name, w.shape, step, cfg), cfg.min_per_neuron,
             m.neurons if (m := block_matrix(name)) else None)
            for name, w in params.items() if target_density(name, cfg) < 1]


def sparsify(params, step, cfg):
    """Cut the parameters that are to be sparse to their numbers of nonzeros, in place."""
    parallel(lambda cut: keep_largest(*cut), cuts(params, step, cfg), cfg.threads)


# ---- optimizer ----------------------------------------------------------------------------------
def learning_rate(step, cfg):
    """Linear warm-up and decay, with the sharkfin: times sqrt(final density / density now)."""
    ramp = min(1.0, (step + 1) / max(1.0, cfg.warmup * cfg.steps)) * (1 - step / cfg.steps)
    fin = math.sqrt(cfg.density / density_at(cfg.density, step, cfg)) if cfg.sharkfin else 1.0
    return cfg.lr * ramp * fin


def gradient_scale(g, cfg):  # [n] -> 0-d
    """What the gradient is multiplied by: 1 / its RMS over all parameters, at most 1 if clipped.
    Without it, Adam's large epsilon has no meaning."""
    least = 1e-20 if cfg.grad_scale == "divide" else 1
    return (1 / xp.maximum(xp.sqrt(g @ g / len(g)), least)).astype(g.dtype)


def adam(w, g, m, v, step, cfg):  # [n] each
    """One step of Adam; w and the moments m and v change in place, each entry by itself."""
    rate = learning_rate(step, cfg) / (1 - cfg.beta1 ** (step + 1))
    unbias = 1 - cfg.beta2 ** (step + 1)
    m += (1 - cfg.beta1) * (g - m)
    v += (1 - cfg.beta2) * (g * g - v)
    w -= rate * m / (xp.sqrt(v / unbias) + cfg.eps)


# ---- training and sampling ----------------------------------------------------------------------
def draw_batch(streams, rng, n, n_ctx, idioms):
    """n random windows, a share `idioms` of them from the stream of idioms: inputs and next
    tokens, int64 [n, n_ctx] each. streams: {"code": tokens, and perhaps "idioms"}."""
    n_idioms = int(idioms * n + rng.random()) if "idioms" in streams else 0
    rows = []
    for name, count in (("code", n - n_idioms), ("idioms", n_idioms)):
        if count:
            starts = rng.integers(0, len(streams[name]) - n_ctx, count)
            rows.append(streams[name][starts[:, None] + np.arange(n_ctx + 1)])
    rows = np.concatenate(rows).astype(np.int64)
    rng.shuffle(rows)  # so that the parts that the threads take are alike
    return rows[:, :-1], rows[:, 1:]


def training_steps(flat, m, v, start, streams, cfg):
    """Train from step `start` on; yields (step, loss) after each, for `train` to log and save.
    flat, m, v: parameters and Adam's moments, [n_params], which change in place."""
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


def sample(model, prompt="", n=200, temperature=0.8, seed=0):
    """The prompt continued by n tokens, or up to the end of the document. temperature 0 takes the
    likeliest. Every token runs the whole context again: short, and fast enough here."""
    params, cfg, tok, *_ = model
    rng, ids = np.random.default_rng(seed), [tok.EOT] + tok.encode(prompt)
    known = 257 + len(tok.merges)  # a small corpus may teach fewer than the model has room for
    for _ in range(n):
        context = np.array([ids[-cfg.n_ctx:]])
        logits, _ = forward(params, context, cfg, at=[context.shape[1] - 1])
        logits = to_host(logits)[0, :known].astype(np.float64)
        noise = rng.gumbel(size=known) * temperature  # makes the arg max a draw from the softmax
        ids.append(int(np.argmax(logits + noise)))
        if ids[-1] == tok.EOT:
            break
    return tok.decode(ids)


# =================================================================================================
# Part II: the machinery
# =================================================================================================

import argparse
import ctypes
import fcntl
import functools
import hashlib
import importlib
import json
import re
import shlex
import sysconfig
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace


class UserError(ValueError):
    """Something the user can put right: a command prints it as one line and ends with status 2."""


# ---- checks of what is given --------------------------------------------------------------------
# (lowest, highest) of numbers; of other floats (0, 1), of other integers (1, 65536).
RANGES = dict(n_layer=(1, 99), n_ctx=(2, 1 << 16), vocab_size=(257, 1 << 16), steps=(1, 1 << 31),
              late=(1, 9), seed=(0, 1 << 31), threads=(0, 1 << 10), afrac=(1e-9, 1),
              density=(1e-9, 1), lr=(1e-9, 1e3), eps=(1e-12, 1e3), beta1=(0, 0.999999),
              beta2=(0, 0.999999), weight_decay=(0, 1e3), max_mb=(0, 1e6))


def choices(name):
    """The values that a Config field may have, or None for a number or a path."""
    return dict(act=ACTIVATIONS, positions=("relative", "learned", "none"),
                grad_scale=("divide", "clip"), dtype=("float32", "float64")).get(name)


def check_config(cfg):
    """Raise UserError on a field of a wrong type or value, and on a matrix of a block that is not
    in MATRICES: it would be neither sparse nor counted."""
    ranges = RANGES | dict(anneal_end=(cfg.anneal_start, 1), min_per_neuron=(0, cfg.d_model))
    for f in dataclasses.fields(cfg):
        value, kind = getattr(cfg, f.name), (int, float) if f.type is float else f.type
        if not isinstance(value, kind) or (isinstance(value, bool) and f.type is not bool):
            raise UserError(f"--{f.name} must be of type {f.type.__name__}, not {value!r}")
        if (allowed := choices(f.name)) and value not in allowed:
            raise UserError(f"--{f.name} must be one of {', '.join(allowed)}, not {value!r}")
        if f.type in (int, float):
            low, high = ranges.get(f.name, (0, 1) if f.type is float else (1, 1 << 16))
            if not low <= value <= high:  # nor is NaN
                raise UserError(f"--{f.name} must be from {low} to {high}, not {value}")
    if cfg.d_model % cfg.d_head:
        raise UserError(f"--d_head {cfg.d_head} does not divide --d_model {cfg.d_model}")
    if n_params(cfg) > 1 << 30:  # four arrays of so many float32 take 16 GB
        raise UserError(f"{n_params(cfg):,} parameters are too many; lower --vocab_size, say")
    for name, shape in shapes(cfg).items():
        if re.match(r"h\d+\.(?!attn.relbias)", name) and shape[1:] and not block_matrix(name):
            raise UserError(f"{name} is a matrix of a block, and not in MATRICES of sparsegpt.py: "
                            "it would be neither made sparse nor pruned")


def check_ids(ids, cfg, at=None, like=None):
    """Raise ValueError unless ids is an integer array [B, T], T <= n_ctx, of token ids, of the
    shape of `like`, and the places `at` are within T. A GPU's arrays are not looked into."""
    if getattr(ids, "dtype", np.dtype(float)).kind not in "iu" or ids.ndim != 2 or not (
            0 < ids.size and ids.shape[1] <= cfg.n_ctx):
        raise ValueError(f"ids must be an array of integers [B, T] with 1 <= T <= {cfg.n_ctx}")
    if like is not None and getattr(like, "shape", None) != ids.shape:
        raise ValueError(f"ids must be of the targets' shape, {ids.shape}")
    if isinstance(ids, np.ndarray) and not 0 <= ids.min() <= ids.max() < cfg.vocab_size:
        raise ValueError(f"token ids must be in 0..{cfg.vocab_size - 1}")
    if at is not None and not hasattr(at, "get") and not (
            len(at) == len(ids) and all(0 <= t < ids.shape[1] for t in at)):
        raise ValueError(f"at must be a place in 0..{ids.shape[1] - 1} for each row, not {at}")


# ---- text: documents, tokenizer, token streams --------------------------------------------------
SKIP = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "site-packages"}


def source_files(source):
    """Sorted paths of the files behind one entry of --data, but hidden ones; of the standard
    library plain code alone. Raises UserError if there is none."""
    root = Path(sysconfig.get_paths()["stdlib"] if source == "stdlib" else source)
    files = [root] if root.is_file() else sorted(
        p for p in root.rglob("*") if p.is_file()
        and not any(part.startswith(".") for part in p.relative_to(root).parts))
    if source == "stdlib":
        files = [p for p in files
                 if p.suffix == ".py" and SKIP.isdisjoint(p.relative_to(root).parts)]
    if not source or not files:
        raise UserError(f"--data {source!r}: there is no such file, or no file in it")
    return files


def read_documents(data, max_mb=0.0, log=print):
    """The texts behind --data, one a file. Files that are not UTF-8 text are skipped and counted.
    Raises UserError where there is no text."""
    texts, skipped = [], 0
    for source in data.split(","):
        size = 0
        for path in source_files(source):
            if max_mb and size >= max_mb * 1e6:
                break
            text = "\0"
            with suppress(UnicodeDecodeError):
                text = path.read_text("utf-8")
            if "\0" in text:
                skipped += 1
            elif text.strip():
                texts.append(text)
                size += len(text)
    if skipped:
        log(f"data: skipped {skipped} files that are not UTF-8 text")
    if not texts:
        raise UserError(f"--data {data}: every file is empty or not UTF-8 text")
    return texts


def split_documents(texts):
    """(training documents, validation documents). A document's own content decides, so none is on
    both sides. Too few to fill both sides are first cut at blank lines, or else at all lines."""
    def held_out(text):
        return hashlib.sha256(text.encode()).digest()[0] < 13  # 5 %

    whole = "\n\n".join(texts)
    for docs in texts, re.findall(r"(?s).+?(?:\n\n+|\Z)", whole), whole.splitlines(keepends=True):
        train, val = ([d for d in docs if held_out(d) == side] for side in (False, True))
        if train and val:
            return train, val
    raise UserError("--data: too little text to hold some out for validation; add more")


# A word with the space before it, a digit, a run of punctuation, a newline with the indentation
# after it, other white space. Every character is in exactly one piece.
PIECES = re.compile(r"\n *| ?[A-Za-z_]+| ?[0-9]| ?[^\sA-Za-z_0-9]+|[^\S\n]+")


class Tokenizer:
    """Byte-level BPE: tokens 0..255 are the bytes, 256 separates documents, the rest are merges in
    the order in which they were learned. decode(encode(s)) == s for all that UTF-8 can hold.

    >>> t = Tokenizer.learn(["aaab aaab"], 259)
    >>> t.merges, t.encode("aab")
    ([(97, 97), (97, 98)], [257, 98])
    """
    EOT = 256  # the document separator, and what every prompt starts with

    def __init__(self, merges):
        """merges: list of (left id, right id); merge i makes token 257 + i. Raises UserError on an
        id that does not exist yet, and on more text than 65,536 tokens can need."""
        self.merges = [(int(a), int(b)) for a, b in merges]
        self.bytes, size = [bytes([i]) for i in range(256)] + [b""], 0
        for a, b in self.merges:
            if not (0 <= min(a, b) and max(a, b) < len(self.bytes)):
                raise UserError(f"the merge {a}, {b} uses a token that does not exist yet")
            size += len(self.bytes[a]) + len(self.bytes[b])
            if size > 1 << 22:  # each token may be twice as long as the one before
                raise UserError("the tokens of the text are too long")
            self.bytes.append(self.bytes[a] + self.bytes[b])
        self.rank = {pair: i for i, pair in enumerate(self.merges)}
        self.cache = {}

    @classmethod
    def learn(cls, texts, vocab_size):
        """Learn merges until there are vocab_size tokens or nothing repeats; of pairs that are as
        frequent, the smallest. Only the pieces that a merge touches are counted again."""
        counts = Counter(piece for text in texts for piece in PIECES.findall(text))
        words = [(list(word.encode()), n) for word, n in sorted(counts.items())]
        pairs, where, merges = Counter(), defaultdict(set), []

        def count(i, sign=1):  # puts the pairs of word i into `pairs`, or takes them out
            word, n = words[i]
            for pair in zip(word, word[1:]):
                pairs[pair] += sign * n
                where[pair].add(i)

        for i in range(len(words)):
            count(i)
        while len(merges) < vocab_size - 257 and pairs:
            best = max(pairs, key=lambda p: (pairs[p], -p[0], -p[1]))
            if pairs[best] < 2:
                break
            merges.append(best)
            for i in where.pop(best):
                count(i, -1)
                words[i][0][:] = cls.merge(words[i][0], best, 256 + len(merges))
                count(i)
            pairs = +pairs  # drops those that no longer occur
        return cls(merges)

    @staticmethod
    def merge(word, pair, new):
        """The list `word` with every occurrence of `pair`, from the left, replaced by `new`."""
        out, i = [], 0
        while i < len(word):
            hit = i + 1 < len(word) and (word[i], word[i + 1]) == pair
            out.append(new if hit else word[i])
            i += 2 if hit else 1
        return out

    def encode(self, text):
        """The token ids of a string, as a list; without the document separator."""
        out = []
        for piece in PIECES.findall(text):
            ids = self.cache.get(piece)
            if ids is None:
                ids = list(piece.encode("utf-8", "replace"))
                while len(ids) > 1:
                    best = min(zip(ids, ids[1:]), key=lambda p: self.rank.get(p, math.inf))
                    if best not in self.rank:
                        break
                    ids = self.merge(ids, best, 257 + self.rank[best])
                self.cache[piece] = ids
            out += ids
        return out

    def decode(self, ids):
        """The string of token ids. What is no UTF-8, as a sample's end may be, becomes U+FFFD."""
        return b"".join(self.bytes[i] for i in ids).decode("utf-8", "replace")


IDIOM_BYTES = 24_000_000  # of generated idioms: --long sees each of them about four times


class Corpus(NamedTuple):
    """Token streams, uint16, with a separator before every document: {"code": ..., "idioms": ...}
    for each side. digest: of the streams, as a resumed run must see the same data."""
    tok: Tokenizer
    train: dict
    val: dict
    digest: str


def load_corpus(cfg, log=print):
    """The Corpus of a config: read, split, tokenized, in about 15 seconds. Raises UserError on a
    stream that is too short to draw from, and on idioms without tasks.py."""
    began, texts = time.perf_counter(), read_documents(cfg.data, cfg.max_mb, log)
    kinds = {"code": split_documents(texts)}
    if cfg.idioms:
        n_bytes = int(min(IDIOM_BYTES, cfg.max_mb * 1e6 or IDIOM_BYTES))
        kinds["idioms"] = split_documents(tasks_module().idiom_documents(n_bytes, cfg.late))
    tok = Tokenizer.learn((doc for two in kinds.values() for doc in two[0]), cfg.vocab_size)
    sides, digest = ({}, {}), hashlib.sha256()
    for name, two in kinds.items():
        for side, docs, rows in zip(sides, two, (cfg.batch_size, 1)):
            ids = (i for doc in docs for i in (tok.EOT, *tok.encode(doc)))
            side[name] = np.fromiter(ids, np.uint16)
            digest.update(side[name].tobytes())
            if len(side[name]) < rows * (cfg.n_ctx + 1):
                raise UserError(f"--data: {name} has too few tokens, {len(side[name])} on one side"
                                "; add text, or lower --batch_size or --n_ctx")
    n_train, n_val = (sum(map(len, side.values())) for side in sides)
    log(f"data: {len(texts)} files, {sum(map(len, texts)) / 1e6:.1f} MB; {len(tok.merges)} merges "
        f"learned; {n_train:,} tokens, {n_val:,} held out; {time.perf_counter() - began:.0f} s")
    return Corpus(tok, *sides, digest.hexdigest())


def tasks_module():
    """tasks.py, needed for idioms and tasks alone. Raises UserError if it is not there."""
    try:
        import tasks
    except ModuleNotFoundError as e:
        raise UserError(f"{Path(__file__).with_name('tasks.py')} is missing, which has the idioms "
                        "and the tasks; train without them: --idioms 0") from e
    return tasks


# ---- checkpoints --------------------------------------------------------------------------------
FORMAT = "sparsegpt-5"  # the version of the checkpoint format
PARTS = {"format", "config", "shapes", "merges", "nonzero", "values", "text", "logits", "m", "v",
         "step", "digest"}


class Model(NamedTuple):
    """A trained model: what `train` returns, `save_model` writes and `load_model` reads."""
    params: dict
    cfg: Config
    tok: Tokenizer
    text: np.ndarray  # [n, T] windows of its training text, for means of activations
    state: dict = {}  # what else is in its file: the moments, the step and the data of a run


def window_logits(model):
    """[T], the logit of each next token of a model's first window: a mark of its forward pass."""
    ids = model.text[:1]
    logits, _ = forward(model.params, ids, model.cfg)
    return to_host(logits)[0, np.arange(ids.shape[1]), np.roll(ids[0], -1)]


def save_model(path, model):
    """Write a Model to path: see `write_whole`. Raises FloatingPointError if a parameter is not
    finite: the former file stays as it was."""
    flat = np.concatenate([to_host(model.params[name]).reshape(-1) for name in shapes(model.cfg)])
    if not np.isfinite(flat).all():
        raise FloatingPointError("a weight is no longer finite: most likely --lr "
                                 f"{model.cfg.lr:g} is too high; {path} is as it was")
    arrays = dict(format=FORMAT, config=json.dumps(dataclasses.asdict(model.cfg)),
                  shapes=json.dumps(shapes(model.cfg)), logits=window_logits(model),
                  nonzero=np.packbits(flat != 0), values=flat[flat != 0],
                  merges=np.array(model.tok.merges, np.int32).reshape(-1, 2),
                  text=model.text.astype(np.uint16), **model.state)
    write = np.savez if model.state else np.savez_compressed  # quick, or small: most are zeros
    write_whole(path, lambda f: write(f, **arrays))


def read_parts(path):
    """(Config, {part: array}) of a checkpoint, read without pickle, and in no more memory than its
    size allows. Raises an error if it is damaged, or does not fit this source."""
    with open_file(path) as file, np.load(file, allow_pickle=False) as f:
        infos = {info.filename.removesuffix(".npy"): info for info in f.zip.infolist()}
        size = {name: info.file_size for name, info in infos.items()}
        if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
               for info in infos.values()) or len(infos) < len(f.zip.infolist()):
            raise ValueError("its parts are not packed as this program does it")
        if max(size["format"], size["config"]) > 1 << 16 or str(f["format"]) != FORMAT:
            raise ValueError(f"it is not of this version, {FORMAT}; train the model again")
        cfg = Config(**json.loads(str(f["config"])) | dict(out=str(path)))
        need = n_params(cfg) * np.dtype(cfg.dtype).itemsize * (3 if "m" in size else 1)
        if size.keys() - PARTS or need > 100 * os.fstat(file.fileno()).st_size + (1 << 30) or (
                sum(size.values()) > 2 * need + (1 << 24)):
            raise ValueError("its parts do not fit its config")
        if broken := f.zip.testzip():  # NumPy alone does not check all of a part
            raise ValueError(f"{broken} does not match its checksum")
        return cfg, {name: f[name] for name in infos if name not in ("format", "config")}


def load_model(path):
    """The Model in a checkpoint, with cfg.out = path. Raises UserError if it is missing, damaged,
    not a checkpoint, or of other parameters than those of this source. A line on stderr says so
    if the source now gives other logits than when it was saved."""
    try:
        cfg, arrays = read_parts(path)
        saved, own = map(json.loads, (str(arrays.pop("shapes")), json.dumps(shapes(cfg))))
        if [*saved.items()] != [*own.items()]:
            name = next((n for n in [*saved, *own] if saved.get(n) != own.get(n)), "order")
            raise ValueError(f"its parameter {name} is {saved.get(name, 'missing')}, and in this "
                             f"source {own.get(name, 'missing')}: another model was trained")
        tok = Tokenizer(arrays.pop("merges").reshape(-1, 2))
        flat, text = np.zeros(n_params(cfg), cfg.dtype), arrays.pop("text").astype(np.int64)
        nonzero = np.unpackbits(arrays.pop("nonzero"), count=flat.size).view(bool)
        values, logits = arrays.pop("values"), arrays.pop("logits")
        for what, array, n in (("params", values, nonzero.sum()),
                               ("moments", arrays.get("m", flat), flat.size),
                               ("moments", arrays.get("v", flat), flat.size)):
            if array.shape != (n,) or array.dtype != cfg.dtype or not np.isfinite(array).all():
                raise ValueError(f"{what} are no finite {cfg.dtype} [{n}]: {array.dtype}")
        flat[nonzero] = values
        check_ids(text, cfg)
        if len(text) > 1024 or 257 + len(tok.merges) > cfg.vocab_size:
            raise ValueError("it has more text, or more tokens, than the model takes")
        model = Model(views(xp.asarray(flat), cfg), cfg, tok, text, arrays)
        # Most of the logits: rounding may change a near tie of AbsTopK, and what follows from it.
        gap = np.median(abs(window_logits(model) - logits))
    except FileNotFoundError as e:
        raise UserError(f"no file {path}; train one with: python sparsegpt.py --out {path}") from e
    except Exception as e:  # a zip can be broken in many ways, each with an exception of its own
        raise UserError(f"{path} cannot be read or is no checkpoint of this source "
                        f"({type(e).__name__}: {e})") from e
    if not gap <= 1e-3:
        print(f"{path}: this source gives other logits than the one that saved the model (by "
              f"{gap:.2g}, the median of a text): its forward pass is another", file=sys.stderr)
    return model


def default_model():
    """The path of the default checkpoint or, if there is none, of the one that comes with the
    source, which python sparsegpt.py --long made; a line on stderr says so."""
    included = Path(__file__).with_name("docs") / "long.npz"
    if Path(Config.out).exists() or not included.exists():
        return Config.out
    path = os.path.relpath(included)
    print(f"there is no {Config.out}: using {path}, the included model", file=sys.stderr)
    return path


# ---- scores -------------------------------------------------------------------------------------
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


def evaluate_tasks(model, n=100):
    """{task: Score} of a Model on n prompt pairs of each of the twenty tasks (paper Table 1). A
    task that has no prompt of use is left out: see `tasks.task_prompts`."""
    tasks = tasks_module()
    tasks.check_draw(n, "eval")

    def one(task):
        try:
            prompts = tasks.task_prompts(model.tok, tasks.pairs(task, n), model.cfg.n_ctx)
        except ValueError:
            return None
        logits = np.empty((len(prompts.last), model.cfg.vocab_size))
        for index, part in prompts.parts():
            logits[index] = to_host(forward(model.params, part.ids, model.cfg, at=part.last)[0])
        return tasks.score(logits, prompts)

    scores = parallel(one, list(tasks.TASKS), model.cfg.threads)
    return {task: s for task, s in zip(tasks.TASKS, scores) if s is not None}


# ---- the run around the loop --------------------------------------------------------------------
def partial_path(out):
    """Where an unfinished run keeps its state: beside what `out` is a link to, if it is one."""
    return Path(f"{os.path.realpath(out)}.partial")


def load_partial(out):
    """The Model of the unfinished run of --out. Raises UserError if there is none."""
    path = partial_path(out)
    if not path.is_file():
        raise UserError(f"no unfinished run at {path} to resume; start one without --resume")
    model = load_model(path)
    step = model.state.get("step", np.zeros(1))
    if not {"m", "v", "digest"} <= model.state.keys() or step.shape != () or (
            step not in range(model.cfg.steps + 1)):
        raise UserError(f"{path} is not the state of an unfinished run")
    return model


def starting_state(cfg, path, resume, digest):
    """(flat, m, v, step) of a new run, or of the unfinished run of path. Raises UserError if that
    does not fit cfg and the data, or if it stands in a new run's way."""
    partial = partial_path(path)
    if not resume:
        if partial.exists():
            raise UserError(f"{partial} holds an unfinished run: --resume it, or delete it")
        flat = init_flat(cfg)
        return flat, xp.zeros_like(flat), xp.zeros_like(flat), 0
    model = load_partial(path)
    state = model.state
    if dataclasses.replace(model.cfg, threads=cfg.threads, out=cfg.out) != cfg:
        raise UserError(f"{partial} is of a run with another config")
    if str(state["digest"]) != digest:
        raise UserError(f"{partial} was trained on other data: resume with its files and Python")
    flat = xp.concatenate([model.params[name].reshape(-1) for name in shapes(cfg)])
    return flat, xp.asarray(state["m"]), xp.asarray(state["v"]), int(state["step"])


def train(cfg, resume=False, log=print):
    """Train a Model by `training_steps`, save it to cfg.out, print what it can do, and return it.
    Ctrl-C saves the state beside cfg.out and raises KeyboardInterrupt. resume=True goes on from
    there, or from the last automatic save, and ends with the same parameters, bit for bit, as a
    run that was never interrupted. Raises UserError on unusable data or output, and
    FloatingPointError if the loss or a weight stops being finite."""
    if cfg.batch_size < processes().size:
        raise UserError(f"--batch_size must be at least {processes().size}, one row a process")
    path = check_output(cfg.out)
    if processes().rank:
        follow(load_corpus(cfg, lambda line: None), cfg, path, resume)
    with locked(path):
        try:
            if path.exists():
                read_parts(path)
        except Exception as e:
            raise UserError(f"--out {cfg.out} exists and is not a checkpoint of this source; "
                            "choose another name") from e
        corpus = load_corpus(cfg, log)
        model = train_on(corpus, cfg, path, resume, log)
        print_results(model, corpus.val, log)
    return model


def train_on(corpus, cfg, path, resume, log):
    """What `train` does with its Corpus, up to the Model saved at path."""
    flat, m, v, start = starting_state(cfg, path, resume, corpus.digest)
    text = draw_batch(corpus.train, np.random.default_rng(0), 64, cfg.n_ctx, cfg.idioms)[0]
    model, losses, every = Model(views(flat, cfg), cfg, corpus.tok, text), [], cfg.steps // 40 or 1
    log(f"{n_params(cfg):,} parameters; from step {start} of {cfg.steps}; ln(vocabulary) is "
        f"{math.log(cfg.vocab_size):.4f}\n"
        f"{'step':>6} {'loss':>7} {'val':>7} {'density':>8} {'lr':>8} {'tok/s':>8} {'left':>6}")
    began = saved = line = time.perf_counter()
    ending.clear()
    with signals_to(note):
        for step, loss in training_steps(flat, m, v, start, corpus.train, cfg):
            done, stopped = step + 1, anywhere(ending)
            losses.append(loss)  # read only below: a GPU is not kept waiting
            if step == 0:
                log(f"{1:>6} {float(loss):7.4f}")
            if done % every and done < cfg.steps and not stopped:
                continue
            losses = np.array([float(x) for x in losses])
            if not np.isfinite(losses).all():
                raise FloatingPointError(f"the loss is not finite before step {done}: most likely "
                                         f"--lr {cfg.lr:g} is too high; {cfg.out} is as it was")
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
                save_or_aside(save_model, partial_path(path), state)
                raise KeyboardInterrupt(
                    f"saved step {done} of {cfg.steps}; go on with: python sparsegpt.py --resume "
                    f"--data {shlex.quote(cfg.data)} --out {shlex.quote(cfg.out)}")
            try:
                save_model(partial_path(path), state)
                saved = time.perf_counter()
            except UserError as e:
                log(f"{e}; the run goes on, and tries again")
        save_or_aside(save_model, path, model)
        partial_path(path).unlink(missing_ok=True)
        log(f"trained in {clock(time.perf_counter() - began)}; saved to {cfg.out}")
    if ending:
        raise KeyboardInterrupt(f"{cfg.out} is whole, and not scored")
    return model


def print_results(model, val, log):
    """Print what a trained model can do: validation losses, the twenty tasks and a sample."""
    loss, by_stream = evaluate(model.params, val, model.cfg, 256)
    log(f"validation loss {loss:.4f} nats a token ("
        + ", ".join(f"{name} {x:.4f}" for name, x in by_stream.items()) + ")")
    start = "def" if model.cfg.idioms else ""
    if model.cfg.idioms:  # else the model need not have seen Python
        log(f"\n{'task':<28} {'binary':>8} {'full':>8} {'accuracy':>8}   100 pairs, unseen names")
        scores, n = evaluate_tasks(model), len(tasks_module().TASKS)
        for name, s in scores.items():
            log(f"{name:<28} {s.binary:8.4f} {s.full:8.4f} {s.accuracy:8.1%}")
        low, most = (sum(s.binary < level for s in scores.values()) for level in (0.05, 0.15))
        log(f"binary loss under 0.05 on {low}, under 0.15 on {most} of {n} tasks"
            + f"; {n - len(scores)} not scored: no prompt is of use" * (len(scores) < n))
    log(f"\nsample after {start!r}:\n    " + sample(model, start).replace("\n", "\n    "))


# ---- threads and memory -------------------------------------------------------------------------
def n_cores():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@functools.cache
def thread_pool(size, process):
    """A pool for each size, made when first used; and for each process: a fork has no threads."""
    return ThreadPoolExecutor(size)


def parallel(fn, items, threads=0):
    """[fn(item) for item in items], on `threads` threads (0: one a core), each with BLAS on one:
    1.2 times as fast as a threaded BLAS (width 128, two cores). What an item computes does not
    depend on its thread, so results are the same bits for any number of threads. If NumPy was
    imported before this file, BLAS has threads of its own, and results agree up to rounding."""
    size = threads or n_cores()
    if size == 1 or xp is not np:
        return [fn(item) for item in items]
    return list(thread_pool(size, os.getpid()).map(fn, items))


def in_chunks(fn, *arrays, threads=0):
    """Run fn on parts of flat arrays, of about a core's cache each: smaller ones wait for each
    other at the interpreter's lock. A GPU takes all at once."""
    size = 1 << 18 if xp is np else len(arrays[0])
    parts = [slice(start, start + size) for start in range(0, len(arrays[0]), size)]
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
    thread, whose gradients are added up in a fixed order, each times its share of the rows. Under
    mpirun each process takes a part of the rows, and all get the sum."""
    rank, size, B = processes().rank, processes().size, len(ids)
    first, end = (B * (rank + i) // size for i in (0, 1))
    n = min(n_shards(cfg), end - first)
    cuts = [slice(first + s * (end - first) // n, first + (s + 1) * (end - first) // n)
            for s in range(n)]
    shares = [(rows.stop - rows.start) / B for rows in cuts]
    losses, grads = zip(*parallel(lambda rows: loss_and_grads(
        params, ids[rows], targets[rows], cfg), cuts, cfg.threads))
    flat = xp.empty(n_params(cfg), cfg.dtype)
    total = views(flat, cfg)

    def add_up(name):
        total[name][...] = functools.reduce(xp.add, [
            grad[name] * share for grad, share in zip(grads, shares)])

    parallel(add_up, sorted(total, key=lambda name: -total[name].size), cfg.threads)
    return summed(sum(loss * share for loss, share in zip(losses, shares)), flat)


def keep_freed_memory():
    """Make glibc keep what is freed for the next array: fresh pages cost NumPy more than the
    arithmetic, 1.1 times a training step. Elsewhere than on glibc nothing is done."""
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
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


def follow(corpus, cfg, path, resume):
    """What processes other than the first do: the same steps, and no output."""
    state = starting_state(cfg, path, resume, corpus.digest)
    ending.clear()
    with signals_to(note):
        any(anywhere(ending) for _ in training_steps(*state, corpus.train, cfg))
    sys.exit(0)


# ---- files: whole or not at all, one writer -----------------------------------------------------
def open_file(path):
    """A file opened for reading. Raises ValueError on a device or a pipe, which may never end."""
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError("it is not a file")
    return open(path, "rb")


def read_bytes(path, most=1 << 26):
    """The content of a file. Raises ValueError if it is no file, or has more than `most` bytes."""
    with open_file(path) as f:
        if os.fstat(f.fileno()).st_size > most:
            raise ValueError(f"it has more than {most:,} bytes")
        return f.read()


def write_whole(path, write):
    """Make a file by write(f), f open for bytes: whole, with the mode of the former file, or not
    at all, as it goes to a temporary file beside it first. Raises UserError if it cannot."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path = path.resolve()  # a link stays
        temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.unfinished")
        try:
            with open(temporary, "xb") as f:
                if path.exists():
                    os.chmod(temporary, path.stat().st_mode)
                write(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except (OSError, RuntimeError) as e:  # RuntimeError: a loop of links
        raise UserError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}") from e


def write_text(path, text):
    """Write a text file, whole or not at all."""
    write_whole(path, lambda f: f.write(text.encode("utf-8", "surrogatepass")))


def save_or_aside(save, path, *args):
    """save(path, *args), if need be in a new folder for temporary files. Raises UserError that
    says where, or that both failed."""
    try:
        save(path, *args)
    except Exception as e:
        try:
            aside = Path(tempfile.mkdtemp(prefix="sparsegpt-"), Path(path).name)
            save(aside, *args)
        except Exception as second:
            raise UserError(f"{e}; {second}") from e
        raise UserError(f"{e}; it was saved to {aside}: make room, and move it to {path}") from e


def check_output(path):
    """The absolute Path of a file to write, with its links followed once, for the whole run.
    Raises UserError now, not after the work, if it cannot be written."""
    try:
        found = Path(path).resolve()
        if os.path.basename(path) in ("", ".", "..") or found.suffix == ".partial" or (
                found.exists() and not found.is_file()):
            raise UserError(f"{str(path)!r} is not the name of a file to write; choose another "
                            "--out")
        found.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=found.parent, prefix=f".{found.name}.partial.",
                                         suffix=".unfinished"):  # the longest name that is used
            return found
    except (OSError, RuntimeError) as e:
        raise UserError(f"cannot write {str(path)[:200]}: "
                        f"{getattr(e, 'strerror', None) or e}") from e


@contextmanager
def locked(path):
    """Keep other processes from writing a file, or the files of a folder, and clear away what dead
    ones left unfinished. Raises UserError if a living process holds the lock, or it cannot be
    had; a dead one's is free."""
    if path.is_dir():
        folder, lock, name = path, path / ".lock", r".+\.(json|html|dot)"
    else:
        folder, lock = path.parent, path.with_name(f".{path.name}.lock")
        name = re.escape(path.name) + r"(\.partial)?"
    try:
        # Neither through a link, nor waiting at a pipe; for writing, as NFS asks.
        mode = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(lock, mode, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(descriptor).st_nlink:
            raise BlockingIOError  # its owner ends at this moment, and has just removed it
    except BlockingIOError as e:
        raise UserError(f"another process writes to {path}: wait, or choose another --out") from e
    except OSError as e:
        raise UserError(f"cannot lock {path} by {lock}: {e.strerror or e}") from e

    def clear():
        for left in folder.iterdir():
            if re.fullmatch(rf"\.{name}\.[a-z0-9_]{{8}}\.unfinished", left.name):
                left.unlink(missing_ok=True)

    try:
        clear()
        yield
    finally:
        with suppress(OSError):  # the folder may be gone, or read-only by now
            clear()  # after workers that were stopped
            lock.unlink()
        os.close(descriptor)


# ---- signals ------------------------------------------------------------------------------------
ending = []  # not empty once a signal has come: a second one would only disturb the clearing up


def note(number, _):
    """A handler after which a step or a file can be finished."""
    ending.append(number)


@contextmanager
def signals_to(handler, then=None):
    """Give Ctrl-C, SIGTERM and SIGHUP to a handler, except those that are ignored, as by nohup;
    afterwards to `then`, or as before. In other threads than the main one nothing changes."""
    former = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                former[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler if then is None else then)


@contextmanager
def signals_blocked():
    """Hold Ctrl-C and SIGHUP back for a while, and for good from processes that begin then."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


# ---- output, flags and the end ------------------------------------------------------------------
def one_line(text, space=" "):
    """Text on one line, with visible newlines, tabs and control characters."""
    return printable(text.translate({32: space, 10: "⏎", 9: "⇥"}))


def printable(text, keep=""):
    """text with control characters written out: a terminal would obey them."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


class Output:
    """A stream that is written to at once, with control characters written out. A reader that goes
    away, such as `head`, or a full disk ends the output and not the work."""

    def __init__(self, stream, keep="\n\t"):
        self.stream, self.keep, self.error = stream or open(os.devnull, "w"), keep, None
        if hasattr(self.stream, "reconfigure"):  # a console may lack some letters
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(printable(text, self.keep))
            self.stream.flush()
        except OSError as e:
            self.error = self.error or e
            # Else Python would fail to write the rest at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)


def clock(seconds):
    """Seconds as m:ss or h:mm:ss."""
    m, s = divmod(round(seconds), 60)
    return f"{m}:{s:02}" if m < 60 else f"{m // 60}:{m % 60:02}:{s:02}"


class Progress:
    """One line on stderr that rewrites itself, if it has a name and stderr is a terminal: a stage
    of a job, and the estimated time that is left of all jobs.

    stages: {name: its share of the job}, in their order; without, there is one. A stage that
    begins anew gets half of what was left of its share. jobs: (those before this one, all, when
    the first began).
    """

    def __init__(self, name="", stages=None, jobs=(0, 1, None)):
        self.name, self.stages, self.jobs = name, stages or {}, jobs
        self.stage, self.before, self.share, self.part, self.last = None, 0.0, 1.0, 0.0, 0.0
        self.began = time.perf_counter() if jobs[2] is None else jobs[2]

    def __call__(self, stage, done, total, note=""):
        """Say that `done` of `total` of a stage are done."""
        if stage != self.stage:
            self.before += self.share * (self.stage is not None)
            self.stage, self.share = stage, self.stages.get(stage, 1 - self.before)
        elif done / total < self.part:
            self.before, self.share = self.before + self.share / 2, self.share / 2
        self.part, now = done / total, time.perf_counter()
        if self.name and now - self.last > 1 and sys.stderr and sys.stderr.isatty():  # or None
            self.last, (earlier, jobs, _) = now, self.jobs
            share = (earlier + self.before + self.share * self.part) / jobs
            left = clock((now - self.began) * (1 - share) / share) if share else "?"
            print(f"\r\033[K{self.name}: {stage}, {done} of {total}, {note}{left} left\r", end="",
                  file=sys.stderr, flush=True)


def fraction(text):
    """A float from "0.25" or "1/4". Raises ValueError on anything else."""
    top, _, bottom = text.partition("/")
    if bottom and float(bottom) == 0:
        raise ValueError(f"{text} divides by zero")
    return float(top) / float(bottom or 1)


class Parser(argparse.ArgumentParser):
    """argparse with one line on stderr for a mistake."""

    def __init__(self, **more):
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **more)

    def error(self, message):
        raise UserError(f"{message}; see --help")


def command(name, act, argv, kept=""):
    """The exit status of act(argv), of a program `name`: a mistake is one line on stderr and
    status 2, Ctrl-C, SIGTERM and SIGHUP are 130. kept: what is said after these. Under mpirun a
    mistake ends all processes: none waits for this one. python -X dev shows tracebacks."""
    def complain(message):
        print(f"{name}: {printable(' '.join(message.splitlines())[:2000])}", file=sys.stderr)

    def interrupt(number, _):
        if not ending:
            ending.append(number)
            raise KeyboardInterrupt

    ending.clear()
    former, status = (sys.stdout, sys.stderr), 2
    sys.stdout = Output(former[0])
    sys.stderr = Output(former[1], "\n\t\r\033")  # with a line that rewrites itself
    try:
        # A program has nothing to interrupt at its end; a caller of main(argv) goes on.
        with signals_to(interrupt, signal.SIG_IGN if argv is None else None), \
                warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # NaN is looked for where it matters
            status = act(argv)
    except SystemExit as e:  # after --help
        status = e.code
    except KeyboardInterrupt as e:
        status = 130
        complain("; ".join(["interrupted", *map(str, e.args), *filter(None, [kept])]))
    except (UserError, FloatingPointError, OSError,
            getattr(sys.modules.get("tasks"), "TaskError", UserError)) as e:
        complain(f"error: {e}")
    except Exception as e:
        if sys.flags.dev_mode:
            raise
        *_, at = traceback.extract_tb(e.__traceback__)
        complain(f"error: {type(e).__name__}: {e} (line {at.lineno} of "
                 f"{os.path.basename(at.filename)}; python -X dev shows the traceback)")
    error = sys.stdout.error
    if status == 0 and error and not isinstance(error, BrokenPipeError):
        status = 2
        complain(f"error: cannot write the output: {error.strerror}")
    sys.stdout, sys.stderr = former
    if status > 1 and "mpi4py" in sys.modules:
        processes().Abort(status)
    return status


def extra(name, absent):
    """A module of extras/, beside this file. absent: what there is not without it. Raises a
    UserError that names the file which was expected."""
    try:
        return importlib.import_module(f"extras.{name}")
    except ModuleNotFoundError as e:
        path = Path(__file__).resolve().with_name("extras") / f"{name}.py"
        raise UserError(f"{absent}: that needs {path} ({e})") from e


# ---- checks and timings -------------------------------------------------------------------------
class Scales:
    """A hook that multiplies the channels of each site by numbers, after AbsTopK. After a backward
    pass, `grad` holds the gradients by these numbers."""

    def __init__(self):
        self.scale, self.grad, self.saved = {}, {}, {}

    def forward(self, site, x, k):
        self.saved[site] = x, _ = abstopk(x, k)
        return x * self.scale.setdefault(site, xp.ones(x.shape[1]))

    def backward(self, site, dx):
        x, mask = self.saved.pop(site)
        self.grad[site] = to_host((x * dx).sum(0))
        return abstopk_backward(dx * self.scale[site], mask)


def gradcheck(cfg, log=print):
    """The largest relative error of gradients, for cfg at small sizes in float64. Prints analytic
    and numeric derivatives along a random direction of each parameter, and of numbers that
    multiply a site's channels. Where they differ it tries other points: near ties of AbsTopK."""
    cfg = dataclasses.replace(cfg, n_layer=2, d_model=32, d_head=8, n_ctx=12, vocab_size=300,
                              batch_size=2, dtype="float64", threads=1, min_per_neuron=0)
    found, order = {}, []
    for seed in (4, 5, 6, 7):
        rng, flat, scales = np.random.default_rng(seed), init_flat(cfg), Scales()
        flat += xp.asarray(0.3 * rng.standard_normal(len(flat)))  # gradients well above rounding
        ids = rng.integers(0, cfg.vocab_size, (cfg.batch_size, cfg.n_ctx + 1))
        run = functools.partial(loss_and_grads, views(flat, cfg), ids[:, :-1], ids[:, 1:], cfg)
        (_, grads), _ = run(), run(scales)
        own = {name: (w, grads[name], None) for name, w in views(flat, cfg).items()} | {
            f"{site} (site)": (scale, scales.grad.get(site, xp.zeros_like(scale)), scales)
            for site, scale in scales.scale.items()}
        for name in order or own:
            w, grad, hook = own[name]
            # Each entry moves to the gradient's side: else the terms may cancel and rounding stay.
            way = abs(rng.standard_normal(w.shape)) * np.where(to_host(grad) < 0, -1, 1)
            way, analytic, former = xp.asarray(way), float((to_host(grad) * way).sum()), w.copy()
            for h in (1e-5, 1e-6, 1e-7):  # a long step may cross a kink of AbsTopK
                at = []
                for move in (h, -h):
                    w[...] = former + move * way
                    at.append(float(run(hook)[0]))
                numeric = (at[0] - at[1]) / (2 * h)
                w[...] = former
                error = abs(analytic - numeric) / max(abs(analytic), abs(numeric), 1e-12)
                if not error >= found.get(name, (math.inf,))[0]:
                    found[name] = error, grad.shape, analytic, numeric
        order = [name for name in own if not found[name][0] <= 1e-6]
        if not order:
            break
    log(f"{'parameter':<16} {'shape':>12} {'analytic':>16} {'numeric':>16} {'relative':>9}")
    for name, (error, shape, analytic, numeric) in found.items():
        log(f"{name:<16} {' x '.join(map(str, shape)):>12} {analytic:16.10f} {numeric:16.10f} "
            f"{error:9.1e}")
    worst = float(np.max([error for error, *_ in found.values()]))
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
PRESETS = dict(
    # As the paper's dense models: within 2 % of the sparse default's loss, see docs/results.md.
    dense=dict(d_model=64, density=1.0, afrac=1.0, lr=0.007, steps=6000, out="out/dense.npz"),
    # Smaller circuits and more tasks: see docs/defaults.md.
    long=dict(afrac=1 / 4, batch_size=32, steps=13000, late=3, out="out/long.npz"),
    quick=dict(n_layer=1, d_model=64, density=1 / 8, afrac=1.0, lr=0.016, steps=1000, max_mb=0.3,
               out="out/quick.npz"))


def make_parser():
    """One flag for each Config field, and the modes. Flags not given are absent."""
    parser = Parser(description="Train a weight-sparse transformer, in about 15 minutes.")
    for title, texts in (
            ("presets", dict(dense="a dense model of about equal loss",
                             long="five times the text, smaller circuits; 70 minutes",
                             quick="a tiny model, all done in seconds")),
            ("what to do (default: train)", dict(
                resume="go on with the interrupted run of --out", bench="time a training step",
                gradcheck="check every gradient numerically, at small sizes"))):
        group = parser.add_argument_group(title).add_mutually_exclusive_group()
        for name, text in texts.items():
            group.add_argument(f"--{name}", action="store_true", help=text)
    group.add_argument("--sample", metavar="PROMPT", help="continue PROMPT with the model --out")
    for f in dataclasses.fields(Config):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(
            type=fraction if f.type is float else f.type,
            metavar="|".join(choices(f.name) or [f.type.__name__.upper()]))
        parser.add_argument(f"--{f.name}", **kind,
                            help=f"{f.metadata['help']} (default {f.default})")
    return parser


def configure(given):
    """The Config of parsed flags: defaults, then the preset, then what was given. A resumed run
    keeps its own; its file decides neither what is read nor what is written. Raises UserError."""
    [values] = [PRESETS[name] for name in PRESETS if name in given] or [{}]
    names = {f.name for f in dataclasses.fields(Config)}
    values = values | {name: value for name, value in given.items() if name in names}
    if "resume" not in given:
        return Config(**values)
    if more := given.keys() & names - {"out", "data", "threads"}:
        raise UserError(f"--resume takes no --{min(more)}: the run keeps its own settings")
    out = values.get("out", Config.out)
    cfg = load_partial(out).cfg
    if cfg.data != values.get("data", Config.data):
        raise UserError(f"the run was on --data {cfg.data}: name it to go on with it")
    return dataclasses.replace(cfg, out=out, threads=values.get("threads", cfg.threads))


def act(argv):
    """What `main` does, if nothing goes wrong."""
    given = vars(make_parser().parse_args(argv))
    device = use_device(os.environ.get("SPARSEGPT_DEVICE", "cpu"))
    keep_freed_memory()
    cfg = configure(given)
    if "gradcheck" in given:
        return int(not gradcheck(cfg) <= 1e-6)
    if "sample" in given:
        path = cfg.out if given.keys() & {"out", *PRESETS} else default_model()
        print(sample(load_model(path), given["sample"], seed=cfg.seed))
        return 0
    print(device)
    if "bench" in given:
        bench(cfg)
        return 0
    shown = dict(dataclasses.asdict(cfg), embed_density=target_density("wte", cfg),
                 threads=cfg.threads or n_cores())
    print("config:", *(f"{name}={value}" for name, value in shown.items()))
    train(cfg, "resume" in given)
    print(f"\nnext: python sparsegpt.py --sample 'def f(' --out {shlex.quote(cfg.out)}")
    return 0


def main(argv=None):
    """The exit status of the command line: 1 is a failed check, 2 a mistake, 130 Ctrl-C."""
    return command("sparsegpt.py", act, argv)


# ---- the GPU ------------------------------------------------------------------------------------
# On CuPy the ops of Part I run as they are, but for those that extras/gpu.py has kernels for.

def use_device(name):
    """Choose the array module: "cpu" (NumPy) or "gpu" (CuPy). Returns a line that says what was
    chosen. Raises UserError if CuPy or a device is missing: never a silent fall-back."""
    global xp
    if name not in ("cpu", "gpu"):
        raise UserError(f"SPARSEGPT_DEVICE must be cpu or gpu, not {name!r}")
    if name == "cpu":
        xp = np
        return f"device: CPU through NumPy {np.__version__}"
    try:
        import cupy
        cupy.zeros(1).sum()  # a driver without a usable device fails here, not at import
    except Exception as e:
        raise UserError(f"SPARSEGPT_DEVICE=gpu, but no usable GPU ({type(e).__name__}: {e})"
                        "; CuPy for your CUDA version: pip install cupy-cuda12x") from e
    xp, note = cupy, ""
    if processes().rank:
        cupy.cuda.Device(processes().rank % cupy.cuda.runtime.getDeviceCount()).use()
    try:
        extra("gpu", "there are no kernels").install(sys.modules[__name__])
    except UserError as e:
        note = f"; {e}, and it is slower without them"
    return f"device: GPU through CuPy {cupy.__version__}{note}"


def to_host(x):
    """A NumPy array with the values of x, from either backend."""
    return x.get() if hasattr(x, "get") else np.asarray(x)


if __name__ == "__main__":
    sys.exit(main())
