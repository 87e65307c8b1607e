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
    """A kernel of docs/kernels.cu; width: the length of the rows of abstopk."""
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
    """One long row, such as a whole matrix, has kernels of its own."""
    if magnitude.ndim > 1:
        return abstopk(magnitude, k)[1]
    n, mask = np.int32(magnitude.size), cupy.empty(magnitude.shape, bool)
    keys, known, counts = magnitude.view("i4"), cupy.empty(10, "i4"), cupy.zeros(1024, "i4")
    blocks, threads, k = (min(1024, -(-magnitude.size // 1024)),), (256,), np.int32(k)
    for digit in map(np.int32, range(4)):
        cuda("count_digit")(blocks, threads, (n, keys, digit, k, known, counts))
    cuda("mask_from_kth")(blocks, threads, (n, keys, k, known, counts, mask))
    cuda("drop_ties")((1,), (32,), (n, keys, known, counts, mask))
    return mask


def rmsnorm(x, eps):
    (N, C), x, out = x.shape, cupy.ascontiguousarray(x), cupy.empty(x.shape, x.dtype)
    scale = cupy.empty((N, 1), x.dtype)
    run_rows(cuda("rmsnorm"), N, x, out, scale, np.int32(C), np.float32(eps))
    return out, (out, scale)


def rmsnorm_backward(dout, out, scale):
    dout, dx = cupy.ascontiguousarray(dout), cupy.empty(out.shape, out.dtype)
    run_rows(cuda("rmsnorm_backward"), len(out), dout, out, scale, dx, np.int32(out.shape[1]))
    return dx


def softmax(logits, sink):
    (B, H, T, _), e = logits.shape, cupy.ascontiguousarray(logits)
    total, sink_share = cupy.empty((2, B, H, T, 1), e.dtype)
    own = cupy.full(H, -math.inf, e.dtype) if sink is None else sink
    run_rows(cuda("softmax"), B * H * T, e, own, total, sink_share, np.int32(T), np.int32(H))
    e /= total  # so far it is exp(logits - the row's largest)
    return e, sink_share


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
