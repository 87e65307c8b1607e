"""Ops of sparsegpt.py as a few CUDA kernels each, in float32: what the plain lines there compute,
with fewer launches. A launch costs about 5 us, and small models wait for launches.

A function with the name of an op gives the same as that op, to rounding. The CUDA code is in
kernels.cu.
"""
import functools
import math
from collections import defaultdict
from pathlib import Path

import cupy
import numpy as np


def install(sg):
    """Put the kernels in the place of the ops of sg, the module sparsegpt. Other arrays than a
    GPU's in float32 still take the plain ops. Returns a function that puts these back. An op that
    is edited there must be edited in kernels.cu too, or leave this list."""
    kernels = dict(abstopk=abstopk, topk_mask=topk_mask, rmsnorm=rmsnorm,
                   rmsnorm_backward=rmsnorm_backward, softmax=softmax,
                   softmax_backward=softmax_backward, gelu=gelu,
                   sparsify=functools.partial(sparsify, sg), adam=functools.partial(adam, sg))
    places = [(vars(sg), name) for name in kernels]
    if sg.ACTIVATIONS.get("gelu") is sg.gelu:
        places.append((sg.ACTIVATIONS, "gelu"))
    plain = [(names, name, names[name]) for names, name in places]

    def either(op, kernel):
        @functools.wraps(op)
        def call(x, *args, **more):
            first = x["wte"] if isinstance(x, dict) else x  # sparsify takes all parameters
            ours = isinstance(first, cupy.ndarray) and first.dtype == np.float32
            return (kernel if ours else op)(x, *args, **more)
        return call

    def restore():
        for names, name, op in plain:
            names[name] = op

    for names, name, op in plain:
        names[name] = either(op, kernels[name])
    return restore


@functools.cache
def cuda(name, width=1024):
    """A kernel of kernels.cu; width: the length of the rows of which keep_k keeps some."""
    code = Path(__file__).with_name("kernels.cu").read_text()
    return cupy.RawModule(code=code, options=(f"-DWIDTH={width}",)).get_function(name)


def launch_rows(kernel, n, *args):
    """Launch a kernel that takes a warp for each of n rows."""
    kernel((-(-n // 4),), (32, 4), (np.int32(n), *args))


def keep_k(x, k):  # any C, but the fewer the faster: a row's values stay in registers
    C = x.shape[-1]
    out, mask = cupy.empty(x.shape, x.dtype), cupy.empty(x.shape, bool)
    launch_rows(cuda("abstopk", C), x.size // C, cupy.ascontiguousarray(x), out, mask, np.int32(k))
    return out, mask


def abstopk(x, k):
    return (x, None) if k >= x.shape[-1] else keep_k(x, k)


def topk_mask(magnitude, k):
    return keep_k(magnitude, k)[1]


def sparsify(sg, params, step, cfg):
    by_width = defaultdict(list)  # of the neurons
    for cut in sg.cuts(params, step, cfg):
        w, _, _, axis = cut
        by_width[cfg.d_model if axis is None else w.shape[1 - axis]].append(cut)
    for width, cuts in by_width.items():
        keep_largest(cuts, width)


def keep_largest(cuts, width):
    """sparsegpt.keep_largest(w, k, j, axis) of each of the cuts, all at once. width: of a neuron,
    in all that have neurons."""
    most, n = max(w.size for w, *_ in cuts), len(cuts)
    keys, table = [cupy.empty(w.size, "i4") for w, *_ in cuts], []
    for own, (w, k, j, axis) in zip(keys, cuts):
        table.append((w.data.ptr, own.data.ptr, w.size, k, 0 if axis is None else j,
                      w.shape[1] if axis == 1 else 1))
    counts, known = cupy.zeros((n, 4, 256), "i4"), cupy.empty((n, 5, 2), "i4")
    table, blocks = cupy.asarray(np.array(table)), (min(256, -(-most // 1024)), n)
    cuda("neuron_keys", width)((-(-most // (4 * width)), n), (32, 4), (table,))
    for digits in map(np.int32, range(4)):
        cuda("count_digit", width)(blocks, (256,), (table, digits, known, counts))
    cuda("drop_ties", width)((1, n), (256,), (table, known, counts))
    cuda("cut", width)(blocks, (256,), (table, known, counts))


def rmsnorm(x, eps=1e-5):
    (N, C), x, out = x.shape, cupy.ascontiguousarray(x), cupy.empty(x.shape, x.dtype)
    scale = cupy.empty((N, 1), x.dtype)
    launch_rows(cuda("rmsnorm"), N, x, out, scale, np.int32(C), np.float32(eps))
    return out, (out, scale)


def rmsnorm_backward(dout, cache):
    out, scale = cache
    dout, dx = cupy.ascontiguousarray(dout), cupy.empty(out.shape, out.dtype)
    launch_rows(cuda("rmsnorm_backward"), len(out), dout, out, scale, dx, np.int32(out.shape[1]))
    return dx


def softmax(logits, sink):
    (B, H, T, _), logits = logits.shape, cupy.ascontiguousarray(logits)
    weights = cupy.empty(logits.shape, logits.dtype)
    sink_share = cupy.empty((B, H, T, 1), logits.dtype)
    own = cupy.full(H, -math.inf, logits.dtype) if sink is None else sink
    launch_rows(cuda("softmax"), B * H * T, logits, weights, own, sink_share, np.int32(T),
             np.int32(H))
    return weights, (weights, sink_share)


def softmax_backward(dout, cache):
    weights, sink_share = cache
    dout, dlogits = cupy.ascontiguousarray(dout), cupy.empty(dout.shape, dout.dtype)
    along = cupy.empty(sink_share.shape, dout.dtype)
    launch_rows(cuda("softmax_backward"), along.size, dout, weights, dlogits, along,
             np.int32(dout.shape[3]))
    return dlogits, -(along * sink_share).sum((0, 2, 3))


@functools.cache
def elementwise(*definition):
    """An ElementwiseKernel of CuPy."""
    return cupy.ElementwiseKernel(*definition)


def gelu(x):
    return elementwise("T x", "T y, T slope", """
        T cdf = T(0.5) * erfc(x * T(-0.7071067811865476));
        y = x * cdf;
        slope = cdf + x * exp(x * x * T(-0.5)) * T(0.3989422804014327)""", "gelu")(x)


def adam(sg, w, g, m, v, step, cfg):
    rate = sg.learning_rate(step, cfg) / (1 - cfg.beta1 ** (step + 1))
    unbias = 1 - cfg.beta2 ** (step + 1)
    elementwise("T g, T rate, T unbias, T beta1, T beta2, T eps", "T w, T m, T v", """
        m += (1 - beta1) * (g - m);
        v += (1 - beta2) * (g * g - v);
        w -= rate * m / (sqrt(v / unbias) + eps)""", "adam")(
            g, rate, unbias, cfg.beta1, cfg.beta2, cfg.eps, w, m, v)
