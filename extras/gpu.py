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


@functools.cache
def install(sg):
    """Put the kernels in the place of the ops of sg, the module sparsegpt, for a GPU's arrays in
    float32; all others still go to the ops. An op that gives other numbers than its kernel, as it
    was edited, stays; a UserError then says so at the end."""
    kernels = dict(abstopk=abstopk, topk_mask=topk_mask, rmsnorm=rmsnorm,
                   rmsnorm_backward=rmsnorm_backward, softmax=softmax,
                   softmax_backward=softmax_backward, gelu=gelu,
                   sparsify=functools.partial(sparsify, sg), adam=functools.partial(adam, sg))
    other = [name for name, kernel in kernels.items() if not agree(sg, name, kernel)]

    def either(op, kernel):
        @functools.wraps(op)
        def call(x, *args, **more):
            first = x["wte"] if isinstance(x, dict) else x  # sparsify takes all parameters
            ours = isinstance(first, cupy.ndarray) and first.dtype == np.float32
            return (kernel if ours else op)(x, *args, **more)
        return call

    for name in kernels.keys() - {*other}:
        op = vars(sg)[name]
        for names in vars(sg), sg.ACTIVATIONS:
            if names.get(name) is op:
                names[name] = either(op, kernels[name])
    if other:
        raise sg.UserError(f"the kernels of {', '.join(other)} do not give what the ops give")


def agree(sg, name, kernel):
    """Whether a kernel gives what the op of its name in sg gives, to 1e-4, on random numbers."""
    def numbers(x):  # all in nested arrays, flat, on the host
        parts = x.values() if isinstance(x, dict) else x if isinstance(x, (tuple, list)) else ()
        flat = sg.to_host(x).ravel() if hasattr(x, "shape") else ()
        return np.concatenate([flat, *map(numbers, parts)])

    try:
        args, same = (arguments(sg, name) for _ in range(2))  # as some change in place
        ours, own = numbers((kernel(*args), args)), numbers((vars(sg)[name](*same), same))
        return ours.shape == own.shape and np.allclose(ours, own, 1e-4, 1e-6)
    except Exception:  # an edited op may take and give anything
        return False


def arguments(sg, name):
    """Random arguments for an op, the same at each call."""
    rng = np.random.default_rng(0)
    cfg = sg.Config(n_layer=1, d_model=32, d_head=8, n_ctx=8, density=1 / 4)

    def draw(*shape):
        return cupy.asarray(rng.standard_normal(shape), "f4")

    x = draw(9, 32) * cupy.asarray(10.0 ** -np.arange(0, 4.5, 0.5)[:, None], "f4")
    logits = draw(2, 4, 8, 8) + cupy.asarray(np.where(np.tri(8), 0, -math.inf), "f4")
    return dict(
        abstopk=lambda: (x, 5), topk_mask=lambda: (abs(x), 5), gelu=lambda: (x,),
        rmsnorm=lambda: (x,), rmsnorm_backward=lambda: (draw(9, 32), sg.rmsnorm(x)[1]),
        softmax=lambda: (logits, draw(4)),
        softmax_backward=lambda: (draw(2, 4, 8, 8), sg.softmax(logits, draw(4))[1]),
        sparsify=lambda: (sg.views(sg.init_flat(cfg), cfg), cfg.steps, cfg),
        adam=lambda: (draw(9), draw(9), draw(9), abs(draw(9)), 3, cfg))[name]()


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
        n, most = len(cuts), max(w.size for w, *_ in cuts)
        keys = cupy.empty((n, most), "i4")
        table = cupy.asarray(np.array([
            (w.data.ptr, own.data.ptr, w.size, k, 0 if axis is None else j,
             w.shape[1] if axis == 1 else 1) for own, (w, k, j, axis) in zip(keys, cuts)]))
        cuda("neuron_keys", width)((-(-most // (4 * width)), n), (32, 4), (table,))
        cuda("cut", width)((n,), (1024,), (table,))


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
