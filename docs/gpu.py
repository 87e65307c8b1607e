"""Ops of sparsegpt.py as a few CUDA kernels each, in float32: what the plain lines there compute,
with fewer launches. A launch costs about 5 us, and small models wait for launches.

A function with the name of an op gives the same as that op, to rounding. The CUDA code is in
kernels.cu.
"""
import functools
import math
from pathlib import Path

import cupy
import numpy as np


@functools.cache
def cuda(name, width=1024):
    """A kernel of docs/kernels.cu; width: the length of the rows of which keep_k keeps some."""
    code = Path(__file__).with_name("kernels.cu").read_text()
    return cupy.RawModule(code=code, options=(f"-DWIDTH={width}",)).get_function(name)


def run_rows(kernel, n, *args):
    """Run a kernel that takes a warp for each of n rows."""
    kernel((-(-n // 4),), (32, 4), (np.int32(n), *args))


def abstopk(x, k):  # any C, but the fewer the faster: a row's values stay in registers
    C, out, mask = x.shape[-1], cupy.empty(x.shape, x.dtype), cupy.empty(x.shape, bool)
    run_rows(cuda("abstopk", C), x.size // C, cupy.ascontiguousarray(x), out, mask, np.int32(k))
    return out, mask


def topk_mask(magnitude, k):
    return abstopk(magnitude, k)[1]


def keep_largest(cuts):
    """sparsegpt.keep_largest(w, k, j, axis) of each of the cuts. All have neurons of one size."""
    most, n = max(w.size for w, *_ in cuts), len(cuts)
    width = max((w.shape[1 - axis] for w, _, _, axis in cuts if axis is not None), default=1024)
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


def rmsnorm(x, eps):
    (N, C), x, out = x.shape, cupy.ascontiguousarray(x), cupy.empty(x.shape, x.dtype)
    scale = cupy.empty((N, 1), x.dtype)
    run_rows(cuda("rmsnorm"), N, x, out, scale, np.int32(C), np.float32(eps))
    return out, (out, scale)


def rmsnorm_backward(dout, out, scale):
    dout, dx = cupy.ascontiguousarray(dout), cupy.empty(out.shape, out.dtype)
    run_rows(cuda("rmsnorm_backward"), len(out), dout, out, scale, dx, np.int32(out.shape[1]))
    return dx


def softmax(logits, sink):  # in place
    (B, H, T, _), e = logits.shape, cupy.ascontiguousarray(logits)
    sink_share = cupy.empty((B, H, T, 1), e.dtype)
    own = cupy.full(H, -math.inf, e.dtype) if sink is None else sink
    run_rows(cuda("softmax"), B * H * T, e, own, sink_share, np.int32(T), np.int32(H))
    return e, sink_share


def softmax_backward(dout, weights, sink_share):  # in place
    along = cupy.empty(sink_share.shape, dout.dtype)
    run_rows(cuda("softmax_backward"), along.size, dout, weights, along, np.int32(dout.shape[3]))
    return dout, -(along * sink_share).sum((0, 2, 3))


@functools.cache
def elementwise(*definition):
    """An ElementwiseKernel of CuPy."""
    return cupy.ElementwiseKernel(*definition)


def gelu(x):
    return elementwise("T x", "T y, T slope", """
        T cdf = T(0.5) * erfc(x * T(-0.7071067811865476));
        y = x * cdf;
        slope = cdf + x * exp(x * x * T(-0.5)) * T(0.3989422804014327)""", "gelu")(x)


def adam(w, g, m, v, rate, unbias, cfg):
    elementwise("T g, T rate, T unbias, T beta1, T beta2, T eps", "T w, T m, T v", """
        m += (1 - beta1) * (g - m);
        v += (1 - beta2) * (g * g - v);
        w -= rate * m / (sqrt(v / unbias) + eps)""", "adam")(
            g, rate, unbias, cfg.beta1, cfg.beta2, cfg.eps, w, m, v)
