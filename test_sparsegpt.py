"""Properties of sparsegpt.py, tasks.py and prune.py, each test named for the one it checks.

    python -m pytest test_sparsegpt.py

Numeric tests run on NumPy, on CuPy where there is a GPU, and on `Strict`, a stand-in array module
that refuses what CuPy refuses, so that code which would fail on a GPU fails on every machine.
"""
import ast
import dataclasses
import doctest
import functools
import html.parser
import io
import json
import math
import operator
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import types
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import prune
import sparsegpt as sg
import tasks

# Without Phase.explain: it traces every line, which takes minutes where an error is planted.
settings.register_profile("suite", deadline=None, max_examples=20, derandomize=True, database=None,
                          suppress_health_check=list(HealthCheck),
                          phases=[phase for phase in Phase if phase is not Phase.explain])
settings.load_profile("suite")

SEEDS = st.integers(0, 2**32 - 1)
FLOATS = st.sampled_from([np.float32, np.float64])


def quiet(*_):
    """A log that says nothing."""


# ---- backends -----------------------------------------------------------------------------------

def bare(x):
    """What Strict wraps, inside tuples and lists too. Refuses host arrays, as CuPy does."""
    if isinstance(x, np.ndarray):
        raise TypeError("a host array where a device array is needed")
    if isinstance(x, (tuple, list)):
        return type(x)(map(bare, x))
    return x.a if isinstance(x, Strict) else x


def device(fn, **also):
    """A NumPy function or method on Strict arrays, with only the keywords of CuPy."""
    def call(*args, **kwargs):
        extra = kwargs.keys() - {"axis", "dtype", "keepdims", "out", *also.get("also", ())}
        if extra:
            raise TypeError(f"CuPy's {fn} takes no {extra}")
        out = fn(*map(bare, args), **{name: bare(value) for name, value in kwargs.items()})
        return Strict(np.asarray(out)) if isinstance(out, (np.ndarray, np.generic)) else out
    return call


class Strict:
    """An array that meets NumPy only through `get`, as one on a GPU; sums stay here too."""
    __array_ufunc__ = None  # np.exp(x) is refused, and host + x asks x.__radd__, which refuses too

    def __init__(self, a):
        self.a = a

    def __array__(self, *_, **__):
        raise TypeError("implicit conversion to a host array")

    def __array_function__(self, *_):
        raise TypeError("a NumPy function on a device array")

    def __getitem__(self, at):  # CuPy takes host arrays as indices
        at = tuple(getattr(i, "a", i) for i in (at if isinstance(at, tuple) else (at,)))
        return Strict(np.asarray(self.a[at]))

    def __setitem__(self, at, value):
        self.a[bare(at)] = bare(value)

    def get(self):
        return self.a.copy()


for _name in "dtype shape ndim size nbytes".split():
    setattr(Strict, _name, property(operator.attrgetter(f"a.{_name}")))
for _name in "len float int bool index".split():
    setattr(Strict, f"__{_name}__", lambda self, f=f"__{_name}__": getattr(self.a, f)())
for _name in ("reshape transpose swapaxes astype copy view max min sum mean any all argmax ravel "
              "partition __neg__ __invert__ __abs__").split():
    setattr(Strict, _name, device(getattr(np.ndarray, _name)))
for _name in "add sub mul truediv floordiv mod pow matmul and or xor".split():
    _op = getattr(operator, f"__{_name}__")
    setattr(Strict, f"__{_name}__", device(_op))
    setattr(Strict, f"__r{_name}__", lambda self, other, op=device(_op): op(other, self))
    setattr(Strict, f"__i{_name}__", device(getattr(operator, f"__i{_name}__")))
for _name in "lt le gt ge eq ne".split():
    setattr(Strict, f"__{_name}__", device(getattr(operator, f"__{_name}__")))
Strict.T = property(lambda self: Strict(self.a.T))


class StrictModule:
    """The array module of Strict: those of NumPy's functions that CuPy has too."""
    asarray = staticmethod(lambda x, *a: x if isinstance(x, Strict) else Strict(np.array(x, *a)))
    array = staticmethod(lambda x, **k: Strict(np.array(getattr(x, "a", x), **k)))

    def __getattr__(self, name):
        if name not in """abs add arange argmax argsort bitwise_and clip concatenate copyto cumsum
                divide dot einsum empty empty_like exp flatnonzero full full_like greater
                greater_equal isfinite log matmul max maximum mean minimum multiply ones ones_like
                partition reciprocal sort sqrt stack subtract sum take tile triu where zeros
                zeros_like""".split():
            raise AttributeError(f"the stand-in has no {name}; add it if CuPy has it")
        return device(getattr(np, name), also=("where",) if name == "copyto" else ())


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """Every test in a folder of its own, on NumPy, whatever the one before it did."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPARSEGPT_DEVICE", raising=False)
    monkeypatch.setattr(sg, "xp", np)


@pytest.fixture(params=["numpy", "strict", "cupy"])
def backend(request, clean, monkeypatch):
    """Runs a test on each array module; on CuPy where it works, else a visible skip."""
    if request.param == "cupy":
        try:
            sg.use_device("gpu")  # `clean` puts NumPy back
        except sg.UserError as e:
            pytest.skip(str(e))
    elif request.param == "strict":
        monkeypatch.setattr(sg, "xp", StrictModule())
    return request.param


def dev(x):
    """A copy of a host array on the backend."""
    return sg.xp.asarray(np.array(x))


def host(x):
    """A host copy of a backend's array."""
    return np.array(sg.to_host(x))


@pytest.mark.parametrize("mix", [
    lambda s, h: s + h, lambda s, h: h + s, lambda s, h: h @ s, lambda s, h: np.exp(s),
    lambda s, h: np.asarray(s), lambda s, h: np.concatenate([s, s]),
    lambda s, h: operator.setitem(s, slice(0, 3), h), lambda s, h: operator.iadd(s, h),
    lambda s, h: sg.xp.add(s, h), lambda s, h: sg.xp.multiply(s, 2, out=h),
    lambda s, h: operator.iadd(h, s), lambda s, h: sg.xp.concatenate([s, h]),
    lambda s, h: sg.xp.take(s, 0, mode="clip"), lambda s, h: sg.xp.partition(s, 1, kind="x")])
def test_stand_in_refuses_what_cupy_refuses(mix, monkeypatch):
    """The stand-in itself: were it lax, a host array among device arrays would pass unseen."""
    monkeypatch.setattr(sg, "xp", StrictModule())
    with pytest.raises(TypeError):
        mix(dev(np.ones(3)), np.ones(3))


def test_device_is_chosen_as_asked_or_refused():
    """SPARSEGPT_DEVICE: never a silent fall-back to another device."""
    assert "NumPy" in sg.use_device("cpu") and sg.xp is np
    assert sg.use_device("auto").startswith("device: ")
    with pytest.raises(sg.UserError, match="nonsense"):
        sg.use_device("nonsense")


# ---- gradients ----------------------------------------------------------------------------------

@contextmanager
def selections():
    """A list that collects what AbsTopK and ReLU let through: it differs across a kink."""
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        for name in ("abstopk", "relu"):
            def spy(x, *k, op=getattr(sg, name)):
                out, cache = op(x, *k)
                seen.append(None if cache is None else host(cache).tobytes())
                return out, cache
            patch.setattr(sg, name, spy)
        yield seen


def slope(f):
    """df/dt at 0 by a 4-point stencil, from the largest step that crosses no kink; else None."""
    def watched(t):
        with selections() as seen:
            return f(t), seen
    centre = watched(0.0)[1]
    for h in (1e-3, 1e-4, 1e-5):
        at = [watched(t) for t in (h, -h, 2 * h, -2 * h)]
        if all(seen == centre for _, seen in at):
            (a, _), (b, _), (c, _), (d, _) = at
            return (8 * (a - b) - (c - d)) / (12 * h)
    return None


def mismatch(f, grad, way, size):
    """Relative error of the gradient `grad` along `way` against df/dt; None at a kink.

    Relative to the larger of both and to what the sum's terms would give without cancelling;
    `size` is that of f's own terms, below 1e-6 of which there is only rounding.
    """
    numeric, terms = slope(f), grad * way
    if numeric is None:
        return None
    analytic = terms.sum()
    scale = max(abs(analytic), abs(numeric), np.sqrt((terms**2).sum()), 1e-6 * size, 1e-300)
    return abs(analytic - numeric) / scale


def randoms(rng, *shape):
    return rng.standard_normal(shape)


def nans(*shape):
    """Where a gradient is to be written: one that is added to it, or left out, shows."""
    return dev(np.full(shape, np.nan))


# Each case draws shapes and options and returns (op, backward, inputs): op(*inputs) -> out, cache
# and backward(dout, cache) -> the gradient by each input.

def embedding_case(draw, rng):
    B, T, V, C = (draw(st.integers(1, n)) for n in (3, 5, 6, 4))
    ids, positions = rng.integers(0, V, (B, T)), draw(st.booleans())

    def back(dout, cache):
        grads = nans(V, C), nans(T + 2, C) if positions else None
        sg.embedding_backward(dout, cache, *grads)
        return grads[:1 + positions]
    tables = [randoms(rng, V, C), randoms(rng, T + 2, C)][:1 + positions]
    return lambda wte, wpe=None: sg.embedding(dev(ids), wte, wpe), back, tables


def rmsnorm_case(draw, rng):
    x = randoms(rng, draw(st.integers(1, 5)), draw(st.integers(2, 9)))
    x *= draw(st.sampled_from([0.5, 1, 20])) / np.linalg.norm(x, axis=1, keepdims=True)
    return sg.rmsnorm, lambda dout, cache: [sg.rmsnorm_backward(dout, cache)], [x]


def linear_case(draw, rng):
    N, i, o = (draw(st.integers(1, 6)) for _ in range(3))

    def back(dout, cache):
        dw, db = nans(i, o), nans(o)
        return sg.linear_backward(dout, cache, dw, db), dw, db
    return sg.linear, back, [randoms(rng, N, i), randoms(rng, i, o), randoms(rng, o)]


def abstopk_case(draw, rng):
    C = draw(st.integers(1, 9))
    k, shape = draw(st.integers(1, C + 1)), draw(st.sampled_from([(3, C), (2, 3, C)]))
    return (lambda x: sg.abstopk(x, k), lambda dout, mask: [sg.abstopk_backward(dout, mask)],
            [randoms(rng, *shape)])


def gelu_case(draw, rng, op="gelu"):
    x = randoms(rng, draw(st.integers(1, 9)), 3) * draw(st.sampled_from([0.1, 1, 4]))
    return (lambda x: getattr(sg, op)(x),
            lambda dout, slope: [sg.activation_backward(dout, slope)], [x])


def relu_case(draw, rng):
    return gelu_case(draw, rng, "relu")


def attention_case(draw, rng):
    B, H, D, T = (draw(st.integers(1, n)) for n in (3, 3, 4, 9))
    block = draw(st.sampled_from([1, 2, 3, 4, 64]))
    shapes = [(H,) if draw(st.booleans()) else None, (H, T + 2) if draw(st.booleans()) else None]

    def with_nones(given):
        given = iter(given)
        return [None if shape is None else next(given) for shape in shapes]

    def back(dout, cache):
        grads = [nans(*shape) for shape in shapes if shape]
        return [sg.attention_backward(dout, cache, *with_nones(grads)), *grads]
    inputs = [randoms(rng, *shape) for shape in [(B * T, 3, H * D), *filter(None, shapes)]]
    at = dev(np.arange(B) * T + rng.integers(T, size=B)) if draw(st.booleans()) else None
    return (lambda qkv, *given: sg.attention(qkv, *with_nones(given), B, D, at, block), back,
            inputs)


def cross_entropy_case(draw, rng):
    N, V = draw(st.integers(1, 6)), draw(st.integers(2, 9))
    targets = rng.integers(0, V, N)
    return (lambda logits: sg.cross_entropy(logits, dev(targets)),
            lambda dout, cache: [sg.cross_entropy_backward(dout, cache)], [3 * randoms(rng, N, V)])


OPS = [embedding_case, rmsnorm_case, linear_case, abstopk_case, gelu_case, relu_case,
       attention_case, cross_entropy_case]


def op_error(case, draw, seed):
    """The largest mismatch over an op's inputs, with a random cotangent; None at a kink."""
    rng = np.random.default_rng(seed)
    op, back, inputs = case(draw, rng)
    out, cache = op(*map(dev, inputs))
    out = host(out)
    dout = rng.standard_normal(out.shape)
    grads, errors = [host(g) for g in back(dev(dout), cache)], []
    assert [g.shape for g in grads] == [x.shape for x in inputs]
    for i, (x, grad) in enumerate(zip(inputs, grads)):
        way = rng.standard_normal(x.shape)

        def along(t):
            moved = [y + t * way if j == i else y for j, y in enumerate(inputs)]
            return (host(op(*map(dev, moved))[0]) * dout).sum()
        errors.append(mismatch(along, grad, way, abs(out * dout).sum()))
    return None if None in errors else max(errors)


@given(data=st.data(), seed=SEEDS)
def check_op(case, data, seed):
    """Fails unless an op's backward is its derivative, over its shapes and options."""
    error = op_error(case, data.draw, seed)
    assume(error is not None)
    assert error < 1e-6


@pytest.mark.parametrize("case", OPS)
def test_backward_of_an_op_is_its_derivative(backend, case):
    """Every op's backward."""
    check_op(case)


def scaled(f):
    """A plant: a backward that is wrong by 1 %."""
    return lambda *args, **kwargs: f(*args, **kwargs) * 1.01


def overwrite_rows(f):
    """A plant: rows that share an id overwrite each other in place of adding up."""
    return lambda ids, rows, out: [f(ids, 0 * rows, out), operator.setitem(out, ids, rows)]


def wrong_sink(f):
    """A plant: the sink's gradient with the wrong sign."""
    def back(dout, cache, dsink=None, dtable=None):
        dqkv = f(dout, cache, dsink, dtable)
        dsink *= -1
        return dqkv
    return back


def no_bias(f):
    """A plant: the bias' gradient is left at zero."""
    def back(dout, cache, dw=None, db=None):
        dx = f(dout, cache, dw, db)
        db *= 0
        return dx
    return back


def one_off(f):
    """A plant: the gradient of a distance is that of the next."""
    return lambda dout, dtable: [f(dout, dtable),
                                 operator.setitem(dtable, ..., sg.xp.roll(dtable, 1, axis=1))]


PLANTS = [(name, scaled) for name in ("rmsnorm_backward", "linear_backward", "activation_backward",
                                      "attention_backward", "cross_entropy_backward")]
PLANTS += [("rmsnorm_backward", lambda f: lambda dout, cache: dout * cache[1]),
           ("abstopk_backward", lambda f: lambda dout, mask: dout),
           ("scatter_rows", overwrite_rows), ("attention_backward", wrong_sink),
           ("linear_backward", no_bias), ("distance_logits_backward", one_off)]


@pytest.mark.parametrize("name, plant", PLANTS[:7])
def test_planted_error_in_an_op_is_caught(name, plant, monkeypatch):
    """The checker of ops: it must be able to fail."""
    monkeypatch.setattr(sg, name, plant(getattr(sg, name)))
    case = globals().get(name[:-9] + "_case", gelu_case)
    with pytest.raises(AssertionError):
        check_op(case)


# ---- the model ----------------------------------------------------------------------------------

@st.composite
def configs(draw, **fixed):
    """Tiny float64 configs with every option of the model."""
    d_head = draw(st.sampled_from([2, 4]))
    some = dict(
        n_layer=draw(st.integers(1, 2)), d_head=d_head, d_model=d_head * draw(st.integers(1, 3)),
        n_ctx=draw(st.integers(2, 6)), vocab_size=draw(st.sampled_from([257, 300])),
        act=draw(st.sampled_from(["gelu", "relu"])), afrac=draw(st.sampled_from([0.25, 0.5, 1.0])),
        batch_size=draw(st.integers(1, 3)), min_per_neuron=0, dtype="float64", threads=1)
    some |= {name: draw(st.booleans()) for name in ("sink", "bigram")}
    some["positions"] = draw(st.sampled_from(["relative", "learned", "none"]))
    return sg.Config(**{**some, **fixed})


def tiny(**more):
    """A small config with every option on, to train."""
    return sg.Config(**{**dict(
        n_layer=2, d_model=16, d_head=4, n_ctx=8, vocab_size=280, batch_size=4, steps=12,
        afrac=0.5, density=0.25, min_per_neuron=2, idioms=0.0,
        weight_decay=0.1, dtype="float64", threads=1, data="prose.txt", out="model.npz"), **more})


def drawn(cfg, seed, T=None):
    """(params as host arrays of size 0.3, inputs, targets) at random; tokens repeat."""
    rng = np.random.default_rng(seed)
    flat = host(sg.init_flat(cfg)) + (0.3 * randoms(rng, sg.n_params(cfg))).astype(cfg.dtype)
    ids = rng.choice(rng.integers(0, cfg.vocab_size, 5), (cfg.batch_size, (T or cfg.n_ctx) + 1))
    return sg.views(flat, cfg), ids[:, :-1], ids[:, 1:]


def on_device(params):
    return {name: dev(w) for name, w in params.items()}


def logits_of(params, ids, cfg, hook=None, at=None):
    return host(sg.forward(on_device(params), ids, cfg, hook, at)[0])


def loss_of(params, ids, targets, cfg, hook=None):
    """The mean loss by `forward` alone, and log-softmax written out once more."""
    z = logits_of(params, ids, cfg, hook)
    z = z - z.max(-1, keepdims=True)
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return -np.take_along_axis(logp, targets[..., None], -1).mean()


def loss_and_host_grads(params, ids, targets, cfg):
    loss, grads = sg.loss_and_grads(on_device(params), ids, targets, cfg)
    return float(loss), {name: host(g) for name, g in grads.items()}


@given(data=st.data(), seed=SEEDS)
def check_model(data, seed, **fixed):
    """Fails unless every parameter's gradient is the derivative of the loss."""
    cfg = data.draw(configs(**fixed))
    params, ids, targets = drawn(cfg, seed, data.draw(st.integers(1, cfg.n_ctx)))
    loss, grads = loss_and_host_grads(params, ids, targets, cfg)
    assert loss == pytest.approx(loss_of(params, ids, targets, cfg), rel=1e-12)
    rng = np.random.default_rng(seed)
    assert grads.keys() == params.keys() == sg.shapes(cfg).keys()
    for name, w in params.items():
        way = rng.standard_normal(w.shape)
        error = mismatch(lambda t: loss_of({**params, name: w + t * way}, ids, targets, cfg),
                         grads[name], way, loss)
        assume(error is not None)
        assert error < 1e-6, name


def test_gradient_of_every_parameter_is_the_derivative_of_the_loss(backend):
    """The whole backward pass, under every option."""
    check_model()


@pytest.mark.parametrize("name, plant", PLANTS)
def test_planted_error_in_the_model_is_caught(name, plant, monkeypatch):
    """The checker of the model: it must be able to fail."""
    monkeypatch.setattr(sg, name, plant(getattr(sg, name)))
    with pytest.raises(AssertionError):
        check_model(n_layer=1, sink=True, afrac=0.5, act="gelu")


def test_timings_are_of_what_they_name(monkeypatch):
    """--bench: each row of the table is of the config it names, with the figures measured."""
    cfg, lines, seen = tiny(dtype="float32"), [], []
    known = ("step", "forward", "backward", "optimizer", "top-k", "MB", "products")
    assert sg.measure(cfg).keys() == set(known)

    def measure(cfg):
        seen.append(cfg)
        return dict(zip(known, (80, 8, 16, 4, 2, 123, 60)))
    monkeypatch.setattr(sg, "measure_elsewhere", measure)
    sg.bench(cfg, lines.append)
    table = [re.split(r"  +", line) for line in lines[2:]]
    assert table[0] == ["as given", "80.0", "400", "123", "10%", "20%", "5%", "2%", "75%"]
    names = dict(width="d_model", threads="threads", context="n_ctx", density="density")
    for row, at in zip(table[1:], seen[1:], strict=True):
        name, value = row[0].split()
        assert getattr(at, names[name]) == pytest.approx(float(value), 1e-4)
        assert dataclasses.replace(at, **{names[name]: getattr(cfg, names[name])},
                                   batch_size=cfg.batch_size) == cfg


def test_gradcheck_passes_and_can_fail(backend, monkeypatch):
    """The program's own check, on each backend."""
    assert sg.gradcheck(quiet) < 1e-6
    monkeypatch.setattr(sg, "rmsnorm_backward", scaled(sg.rmsnorm_backward))
    assert sg.gradcheck(quiet) > 1e-4
    monkeypatch.setattr(sg, "rmsnorm_backward", lambda dout, cache: math.nan * dout)
    with np.errstate(invalid="ignore"):
        assert not sg.gradcheck(quiet) <= 1e-6


@given(cfg=configs(), seed=SEEDS, data=st.data())
def test_a_later_token_changes_no_earlier_logit(backend, cfg, seed, data):
    """Causality: the mask, and the blocks of attention."""
    params, ids, _ = drawn(cfg, seed)
    at, other = data.draw(st.integers(0, cfg.n_ctx - 1)), ids.copy()
    other[:, at] = (other[:, at] + 1) % cfg.vocab_size
    one, two = logits_of(params, ids, cfg), logits_of(params, other, cfg)
    assert np.array_equal(one[:, :at], two[:, :at])
    assert (one[:, at] != two[:, at]).any()
    assert np.allclose(logits_of(params, ids[:, :at + 1], cfg), one[:, :at + 1], 1e-9, 1e-12)


@given(cfg=configs(batch_size=3), seed=SEEDS)
def test_sequences_of_a_batch_are_independent(backend, cfg, seed):
    """No op mixes the rows of a batch."""
    params, ids, _ = drawn(cfg, seed)
    alone = np.concatenate([logits_of(params, row[None], cfg) for row in ids])
    assert np.allclose(logits_of(params, ids, cfg), alone, 1e-9, 1e-12)


@given(C=st.sampled_from([1024, 1536, 2048]), share=st.floats(0.001, 0.5), seed=SEEDS,
       kind=st.sampled_from(["even", "one piece", "equals"]))
def test_the_threshold_of_long_rows_is_that_of_a_sort(C, share, seed, kind):
    """Rows over 512 are searched in pieces, also where one piece holds all of the largest."""
    bits = np.random.default_rng(seed).integers(0, 10**6, (3, C)).astype(np.int32)
    if kind == "one piece":
        bits[:, :512] += 10**6
    elif kind == "equals":
        bits %= 3
    k, before = max(1, int(share * C)), bits.copy()
    least = sg.kth_in_rows(bits, k)
    assert np.array_equal(least[:, 0], np.sort(bits)[:, -k]) and np.array_equal(bits, before)


@given(B=st.integers(1, 2), T=st.integers(1, 9), H=st.integers(1, 3), D=st.integers(1, 3),
       block=st.integers(1, 10), sink=st.booleans(), table=st.booleans(),
       size=st.sampled_from([2, 40]), seed=SEEDS)
def test_attention_is_softmax_over_the_past(backend, B, T, H, D, block, sink, table, size, seed):
    """Attention in blocks, and at some rows alone, equals attention written out, query by
    query, also where exp would overflow without a shift."""
    rng = np.random.default_rng(seed)
    qkv, logit = size * randoms(rng, B * T, 3, H * D), size ** 2 * randoms(rng, H)
    far = size ** 2 * randoms(rng, H, T + 1)  # by distance
    some = np.arange(B) * T + rng.integers(T, size=B)
    out, at = (host(sg.attention(dev(qkv), dev(logit) if sink else None,
                                 dev(far) if table else None, B, D, rows, block)[0])
               for rows in (None, dev(some)))
    assert np.allclose(at, out[some], 1e-12, 1e-14)
    for b, t, h in np.ndindex(B, T, H):
        q, k, v = qkv[b * T:b * T + t + 1, :, h * D:h * D + D].transpose(1, 0, 2)
        logits = k @ q[-1] / math.sqrt(D) + (far[h, t::-1] if table else 0)
        logits = np.append(logits, logit[h] if sink else -np.inf)
        weights = np.exp(logits - logits.max())
        weights, total = weights[:-1], weights.sum()
        assert np.allclose(out[b * T + t, h * D:h * D + D], weights @ v / total, 1e-9, 1e-12)


def test_uninitialised_memory_never_reaches_a_result(monkeypatch):
    """Ops write every entry of what `empty` gives them before they read it."""
    cfg = tiny(batch_size=3)
    params, ids, targets = drawn(cfg, 0)
    clean_run = loss_and_host_grads(params, ids, targets, cfg)

    def dirty(shape, dtype):
        return np.full(shape, 0xFF if np.dtype(dtype).kind in "iub" else np.nan).astype(dtype)
    monkeypatch.setattr(sg, "empty", dirty)
    loss, grads = loss_and_host_grads(params, ids, targets, cfg)
    assert loss == clean_run[0]
    assert all(np.array_equal(grads[name], g) for name, g in clean_run[1].items())


@given(st.lists(st.one_of(st.integers(1, 300), st.none()), max_size=60), st.randoms())
def test_recycled_memory_is_never_shared_by_live_arrays(moves, rng):
    """`empty`: a block is free only when no array and no view of it is left."""
    live = []
    for tag, n in enumerate(moves):
        if n is None and live:
            live.pop(rng.randrange(len(live)))
        elif n:
            a = sg.empty((n,), rng.choice([np.float64, np.int32, np.uint8]))
            a[...] = tag
            a = rng.choice([a, a[n // 2:], a.view(np.uint8), a.reshape(1, -1)])
            live.append((a, a.copy()))
            del a
        assert all(np.array_equal(x, former) for x, former in live)


@pytest.mark.parametrize("ids", [
    [[1, 2]], np.array([[0.5, 1.0]]), np.array([[True]]), np.array([1, 2]),
    np.ones((1, 1, 1), int), np.ones((1, 9), int), np.ones((0, 3), int), np.ones((1, 0), int),
    np.array([[280]]), np.array([[-1]]), None])
def test_wrong_ids_raise_value_error(ids):
    """Ids of a wrong type, shape or range, as inputs and as targets: no wrap-around."""
    cfg = tiny()
    params, good = sg.init_params(cfg), np.zeros(np.shape(ids) or (1, 2), int)
    for call in (lambda: sg.forward(params, ids, cfg),
                 lambda: sg.loss_and_grads(params, ids, good, cfg),
                 lambda: sg.loss_and_grads(params, good, ids, cfg),
                 lambda: sg.loss_and_grads(params, good, np.zeros((5, 5), int), cfg)):
        with pytest.raises(ValueError):
            call()


@pytest.mark.parametrize("at", [[0, -1], [8, 0]])
def test_positions_outside_the_prompts_raise_value_error(at):
    """A position of -1 would be read from the row before."""
    cfg = tiny()
    with pytest.raises(ValueError, match="at must be"):
        sg.forward(sg.init_params(cfg), np.zeros((2, 8), int), cfg, at=at)


# ---- hooks --------------------------------------------------------------------------------------

PLACES = "attn_in q k v attn_out mlp_in neuron mlp_out".split()


class Push:
    """A hook that does AbsTopK, adds `amount` at one place and notes what passes."""

    def __init__(self, at=None, amount=None):
        self.at, self.amount, self.seen, self.back, self.k, self.masks = at, amount, {}, {}, {}, {}

    def forward(self, place, x, k):
        x, self.masks[place] = sg.abstopk(x, k)
        if place == self.at:
            x = x + dev(self.amount).reshape(x.shape)
        self.seen[place], self.k[place] = host(x), k
        return x

    def backward(self, place, dx):
        self.back[place] = host(dx)
        return sg.abstopk_backward(dx, self.masks[place])


def hooked_grads(params, ids, cfg, cotangent, hook=None, at=None):
    """Logits and the gradients of sum(cotangent * logits)."""
    logits, cache = sg.forward(on_device(params), ids, cfg, hook, at)
    logits, grads = host(logits), sg.views(nans(sg.n_params(cfg)), cfg)
    sg.backward(dev(cotangent), cache, cfg, grads)
    return logits, {name: host(g) for name, g in grads.items()}


@given(cfg=configs(), seed=SEEDS)
def test_a_hook_that_does_abstopk_sees_every_place_in_order_and_changes_nothing(
        backend, cfg, seed):
    """Hooks, which pruning builds on: bit for bit the same model, and k is that of the place."""
    params, ids, _ = drawn(cfg, seed)
    hook, cotangent = Push(), randoms(np.random.default_rng(seed), *ids.shape, cfg.vocab_size)
    with_hook, without = (hooked_grads(params, ids, cfg, cotangent, h) for h in (hook, None))
    assert list(hook.seen) == [f"h{i}.{p}" for i in range(cfg.n_layer) for p in PLACES] + ["final"]
    assert sorted(hook.back) == sorted(hook.seen)
    for place, k in hook.k.items():
        wide = cfg.d_model * (4 if "neuron" in place else 1)
        assert k == (wide if place == "final" else max(1, int(cfg.afrac * wide)))
    assert np.array_equal(with_hook[0], without[0])
    assert all(np.array_equal(with_hook[1][name], g) for name, g in without[1].items())


@given(cfg=configs(), seed=SEEDS, data=st.data())
def test_backward_hook_gets_the_gradient_at_its_place(backend, cfg, seed, data):
    """dx at a place is the derivative by what a hook adds there, without weights' gradients."""
    params, ids, _ = drawn(cfg, seed)
    place = data.draw(st.sampled_from([f"h{cfg.n_layer - 1}.{p}" for p in PLACES] + ["final"]))
    rng, hook = np.random.default_rng(seed), Push()
    cotangent = randoms(rng, *ids.shape, cfg.vocab_size)
    logits, cache = sg.forward(on_device(params), ids, cfg, hook)
    size = abs(host(logits) * cotangent).sum()
    sg.backward(dev(cotangent), cache, cfg)
    way = rng.standard_normal(hook.back[place].shape)
    error = mismatch(
        lambda t: (logits_of(params, ids, cfg, Push(place, t * way)) * cotangent).sum(),
        hook.back[place], way, size)
    assume(error is not None)
    assert error < 1e-6


@given(cfg=configs(), seed=SEEDS, with_hook=st.booleans())
def test_logits_and_gradients_at_positions_are_those_of_the_whole(backend, cfg, seed, with_hook):
    """`at`: what is left out is what nothing depends on, forward and backward."""
    params, ids, _ = drawn(cfg, seed)
    rng, rows = np.random.default_rng(seed), np.arange(len(ids))
    at = rng.integers(0, ids.shape[1], len(ids))
    some, every = randoms(rng, len(ids), cfg.vocab_size), np.zeros((*ids.shape, cfg.vocab_size))
    every[rows, at] = some
    hook = [Push(), Push()] if with_hook else [None, None]
    logits, grads = hooked_grads(params, ids, cfg, some, hook[0], at)
    full_logits, full_grads = hooked_grads(params, ids, cfg, every, hook[1])
    assert np.allclose(logits, full_logits[rows, at], 1e-12, 1e-13)
    assert all(np.allclose(grads[name], g, 1e-9, 1e-12) for name, g in full_grads.items())
    if with_hook:  # at each place the same gradient, on all rows or on those asked for
        for place, dx in hook[1].back.items():
            few = len(hook[0].back[place]) < len(dx)
            dx = dx.reshape(*ids.shape, -1)[rows, at] if few else dx
            assert np.allclose(hook[0].back[place], dx, 1e-9, 1e-12), place


# ---- top-k and GELU -----------------------------------------------------------------------------

def few_values(dtype, max_dims=2, min_dims=2):
    """Arrays full of ties: small integers, zeros and negative zeros."""
    shape = hnp.array_shapes(min_dims=min_dims, max_dims=max_dims, max_side=9)
    return hnp.arrays(dtype, shape, elements=st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0]))


def first_largest(row, k):
    """The indices of the k largest |x|, the first of equals: a stable sort."""
    return sorted(range(len(row)), key=lambda i: -abs(row[i]))[:k]


@given(dtype=FLOATS, data=st.data())
def test_abstopk_keeps_exactly_k_the_first_of_equals(backend, dtype, data):
    """Ties let no more through, zeros count as values, and k >= width is the identity."""
    x = data.draw(few_values(dtype, max_dims=3))
    k = data.draw(st.integers(1, x.shape[-1] + 1))
    given_x = dev(x)
    out, mask = sg.abstopk(given_x, k)
    if k >= x.shape[-1]:
        assert out is given_x and mask is None
        return
    expected = np.zeros(x.shape, bool)
    for at in np.ndindex(x.shape[:-1]):
        expected[at][first_largest(x[at], k)] = True
    assert np.array_equal(host(mask), expected)
    assert np.array_equal(host(out), np.where(expected, x, 0))
    assert np.array_equal(host(given_x), x)


def slow_keep_largest(w, k, j, axis):
    """keep_largest written out: each neuron's j largest, then the largest of the rest."""
    chosen = set()
    for n in range(w.shape[axis]) if j else ():
        for i in first_largest(np.take(w, n, axis), j):
            chosen.add((n, i) if axis == 0 else (i, n))
    for at in sorted(np.ndindex(w.shape), key=lambda at: -abs(w[at])):
        if len(chosen) < k:
            chosen.add(at)
    mask = np.zeros(w.shape, bool)
    mask[tuple(zip(*chosen))] = True
    return mask


@given(dtype=FLOATS, data=st.data(), axis=st.sampled_from([0, 1]))
def test_keep_largest_keeps_exactly_k_and_j_for_each_neuron(backend, dtype, data, axis):
    """The weight top-k, with and without ties."""
    w = data.draw(few_values(dtype))
    j = data.draw(st.integers(0, w.shape[1 - axis]))
    k = data.draw(st.integers(max(1, j * w.shape[axis]), w.size))
    if data.draw(st.booleans()):
        w += (np.arange(1, w.size + 1).reshape(w.shape) * 1e-3).astype(dtype)  # no ties, no zeros
    cut = dev(w)
    sg.keep_largest(cut, k, j, axis)
    mask = slow_keep_largest(w, k, j, axis)
    assert mask.sum() == k and (mask.sum(1 - axis) >= j).all()
    assert np.array_equal(host(cut), np.where(mask, w, 0))


def test_keep_largest_keeps_exactly_k_of_equal_weights(backend):
    """Ties at a value that is not zero, where one entry too many would show."""
    for k in (1, 2, 7, 34, 35):
        w = dev(np.full((5, 7), -3.0))
        sg.keep_largest(w, k)
        assert np.flatnonzero(host(w)).tolist() == list(range(k))


def test_keep_largest_ends_on_weights_that_are_not_finite():
    """Not even NaNs of the highest bits stand in the way of the j of a neuron."""
    w = np.ones((4, 3), np.float32)
    w[3] = 2  # the largest of the others stand behind the NaNs
    w[:, 0] = np.array([0x7FFFFFFF], np.int32).view(np.float32)
    sg.keep_largest(w, 3, 1, 1)
    assert ((w != 0).sum(0) >= 1).all()


def test_keep_largest_refuses_fewer_than_j_for_each_neuron(backend):
    """A floor that cannot be met is an error, never fewer weights than promised."""
    with pytest.raises(ValueError, match="do not hold"):
        sg.keep_largest(dev(np.ones((4, 5))), 9, 2, 1)


@given(n=st.sampled_from([1, 100, 4096, 4097, 9000, 64 * 128]),
       period=st.sampled_from([1, 63, 64, 65]),
       order=st.sampled_from(["sampled small", "sampled large", "up", "down", "drawn", "ties"]),
       share=st.floats(0, 1), seed=SEEDS)
def test_kth_largest_equals_sorting(backend, n, period, order, share, seed):
    """Also where every 64th entry, from which a bound is guessed, misleads in either direction."""
    bits = np.random.default_rng(seed).integers(0, 2**31 - 1, n)
    sampled = np.arange(n) % period == 0
    bits = {"sampled small": np.where(sampled, bits // 1000, bits), "up": np.sort(bits),
            "sampled large": np.where(sampled, bits, bits // 1000), "drawn": bits,
            "down": np.sort(bits)[::-1], "ties": bits % 3}[order]
    k = 1 + int(share * (n - 1))
    assert int(sg.kth_largest(dev(bits), k)) == np.sort(bits)[n - k]


def exact_gelu(x):
    """(GELU, its derivative) by math.erf."""
    phi = [0.5 * math.erfc(-v / math.sqrt(2)) for v in x]
    slope = [p + v * math.exp(-v * v / 2) / math.sqrt(2 * math.pi) for p, v in zip(phi, x)]
    return x * np.array(phi), np.array(slope)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-6), (np.float64, 1e-12)])
def test_gelu_is_the_exact_one(backend, dtype, tolerance):
    """GELU and its derivative against math.erf, not against the tanh approximation."""
    x = np.concatenate([np.linspace(-10, 10, 20001), [0.0, -0.0, 1e-30, -1e-30, 30, -30]])
    x = x.astype(dtype)
    for got, exact in zip(sg.gelu(dev(x)), exact_gelu(x.astype(np.float64))):
        got = host(got)
        assert got.dtype == dtype and abs(got - exact).max() < tolerance


# ---- schedules, optimizer, sparsity -------------------------------------------------------------

@given(steps=st.integers(1, 400), ends=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
       target=st.floats(1e-3, 1))
@example(steps=10, ends=[0.5, 0.5], target=0.1)
@example(steps=10, ends=[1.0, 1.0], target=0.1)
def test_density_falls_linearly_from_one_to_its_target(steps, ends, target):
    """Annealing: 1 before it starts, a straight line, the target from its end on."""
    cfg = tiny(steps=steps, anneal_start=ends[0], anneal_end=ends[1])
    seen = np.array([sg.annealed(target, step, cfg) for step in range(steps + 1)])
    start, end = ends[0] * steps, min(ends[1] * steps, steps - 1)  # the last step is at the target
    for step, density in enumerate(seen):
        part = 1.0 if step >= end else 0.0 if step <= start else (step - start) / (end - start)
        assert density == pytest.approx(1 - (1 - target) * part, abs=1e-12)
    assert (np.diff(seen) <= 0).all() and seen[-1] == target  # to the last bit


@given(steps=st.integers(1, 400), warmup=st.floats(0, 1), density=st.floats(1e-3, 1),
       sharkfin=st.booleans())
def test_learning_rate_is_the_sharkfin(steps, warmup, density, sharkfin):
    """Linear warm-up times linear decay, and a fin that ends at 1."""
    cfg = tiny(steps=steps, warmup=warmup, density=density, sharkfin=sharkfin, lr=0.5)
    for step in range(steps):
        rising = min(1, (step + 1) / (warmup * steps)) if warmup * steps > 1 else 1
        fin = (density / sg.annealed(density, step, cfg))**0.5 if sharkfin else 1
        rate = 0.5 * rising * (1 - step / steps) * fin
        assert sg.learning_rate(step, cfg) == pytest.approx(rate)
    assert fin <= 1 + 1e-12


def floor_and_size(name, shape, j):
    """(fewest nonzeros, size) of a parameter: j for each neuron, where there is a floor."""
    kind = name.split(".")[-1]
    per = {"wqkv": shape[-1], "wfc": shape[-1], "wo": shape[0], "wproj": shape[0]}.get(kind, 0)
    return max(1, j * per), math.prod(shape)


@given(density=st.floats(1e-6, 1), j=st.integers(0, 16))
@example(density=1e-3, j=0)
@example(density=1e-6, j=16)
def test_a_matrix_keeps_its_density_or_its_floor(density, j):
    """The share asked for, lifted to j for each neuron, never nothing, never over the size."""
    cfg = tiny(density=density, min_per_neuron=j)
    for name, shape in sg.shapes(cfg).items():
        if sg.is_matrix(name):
            least, size = floor_and_size(name, shape, j)
            expected = min(size, max(round(density * size), least))
            assert sg.kept(name, shape, density, cfg) == expected, name


@pytest.mark.parametrize("sparse_bias", [False, True])
@pytest.mark.parametrize("j", [0, 2])
def test_nonzeros_of_a_training_run_follow_the_schedule(backend, sparse_bias, j):
    """At every step exactly the scheduled number in each matrix; what is dense stays dense."""
    cfg = tiny(sparse_bias=sparse_bias, min_per_neuron=j, density=0.1 if j else 0.004, steps=10)
    params, ids, targets = drawn(cfg, 3)
    flat = dev(np.concatenate([w.reshape(-1) for w in params.values()]))
    for step, params, _ in steps_of(cfg, flat, ids, targets):
        for name, w in params.items():
            w = host(w)
            least, size = floor_and_size(name, w.shape, j)
            wide = name in ("wte", "wpe", "head.w")
            target = min(1, cfg.density * 4) if wide else cfg.density
            k = min(size, max(round(sg.annealed(target, step, cfg) * size), least))
            if sg.is_matrix(name):
                assert np.count_nonzero(w) == k, name
                if not wide:
                    axis = 0 if "wqkv" in name or "wfc" in name else 1
                    assert (np.count_nonzero(w, axis=axis) >= j).all()
            elif sparse_bias and ".b" in name:
                assert np.count_nonzero(w) <= k
            else:
                assert np.count_nonzero(w) > 0.8 * size or name == "bigram"


def steps_of(cfg, flat, ids, targets):
    """Train on one batch: (step, params, loss) after each step of the program's own loop."""
    m, v, params = sg.xp.zeros_like(flat), sg.xp.zeros_like(flat), sg.views(flat, cfg)
    work = nans(cfg.shards, len(flat)).astype(cfg.dtype)
    for step in range(cfg.steps):
        loss, _ = sg.loss_and_grads(params, ids, targets, cfg, work)
        sg.adam_step(flat, m, v, work, step, cfg)
        sg.sparsify(params, step, cfg)
        yield step, params, float(loss)


@given(n=st.sampled_from([1, 50, 70_000]), seed=SEEDS, eps=st.sampled_from([1e-8, 0.1]),
       scale=st.sampled_from(["divide", "clip", "none"]), size=st.sampled_from([0.01, 1.0, 30.0]),
       betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)))
@settings(max_examples=12)
def test_adam_equals_adam_written_out(backend, n, seed, eps, scale, size, betas):
    """Three steps, each scaling of the gradient, also where it is cut into several chunks."""
    cfg = tiny(grad_scale=scale, eps=eps, beta1=betas[0], beta2=betas[1])
    rng, work = np.random.default_rng(seed), nans(2, n)
    x, m, v = rng.standard_normal(n), np.zeros(n), np.zeros(n)
    flat, m_dev, v_dev = dev(x), dev(m), dev(v)
    for step in range(3):
        g = size * rng.standard_normal(n)
        work[0, :] = dev(g)
        sg.adam_step(flat, m_dev, v_dev, work, step, cfg)
        rms = math.sqrt((g**2).mean())
        g = g / {"divide": rms, "clip": max(rms, 1), "none": 1}[scale]
        m, v = cfg.beta1 * m + (1 - cfg.beta1) * g, cfg.beta2 * v + (1 - cfg.beta2) * g**2
        unbiased = m / (1 - cfg.beta1**(step + 1)), v / (1 - cfg.beta2**(step + 1))
        x = x - sg.learning_rate(step, cfg) * unbiased[0] / (np.sqrt(unbiased[1]) + eps)
        assert np.allclose(host(flat), x, 1e-10, 1e-12)
    assert np.allclose(host(m_dev), m, 1e-10) and np.allclose(host(v_dev), v, 1e-10)


def test_a_zero_gradient_moves_nothing(backend):
    """Division by the gradient's RMS survives a gradient of zero."""
    cfg, flat = tiny(), dev(np.ones(5))
    sg.adam_step(flat, dev(np.zeros(5)), dev(np.zeros(5)), dev(np.zeros((1, 5))), 0, cfg)
    assert np.array_equal(host(flat), np.ones(5))


def test_weight_decay_shrinks_the_matrices_only(backend):
    """A dense model: matrices by the factor 1 - lr x decay, all else untouched, bit for bit."""
    cfg = tiny(density=1.0, weight_decay=0.5, lr=0.1)
    before = drawn(cfg, 1)[0]
    after = on_device(before)
    sg.sparsify(after, 5, cfg)
    for name, w in before.items():
        matrix = name in ("wte", "wpe", "head.w") or name.split(".")[-1].startswith("w")
        expected = w * (1 - sg.learning_rate(5, cfg) * 0.5) if matrix else w
        assert np.array_equal(host(after[name]), expected), name


GOLDEN = {
    "gelu": [5.7636769401, 5.369176888, 5.1431349559, 4.9293401127, 4.7700519769, 4.6539909466],
    "relu": [5.6593758073, 5.3326521743, 5.1060291547, 4.8762683971, 4.7152827943, 4.5274287623]}


def golden_run(act):
    """Losses of six steps on a fixed batch that no random generator and no text has a part in."""
    cfg = tiny(act=act, positions={"gelu": "learned", "relu": "relative"}[act], steps=6, lr=0.02,
               anneal_start=0.0, anneal_end=0.6, sparse_bias=True)
    ids = np.arange(cfg.batch_size * (cfg.n_ctx + 1)).reshape(cfg.batch_size, -1)**2 * 7 % 61
    wave = np.sin(np.arange(sg.n_params(cfg)) * 1.7) * 0.1
    return [loss for *_, loss in steps_of(cfg, dev(wave), ids[:, :-1], ids[:, 1:])]


@pytest.mark.parametrize("act", GOLDEN)
def test_golden_loss_trace(backend, act):
    """Any change of the arithmetic of model, optimizer or sparsity shows in these numbers."""
    assert golden_run(act) == pytest.approx(GOLDEN[act], rel=1e-9)


@pytest.mark.parametrize("density", [1.0, 0.1])
def test_one_batch_is_overfitted(density):
    """Model and optimizer together learn: a repeated batch is known by heart, sparse or dense."""
    cfg = tiny(density=density, steps=120, lr=0.05, bigram=False, d_model=32, dtype="float32",
               positions="learned", anneal_end=0.3, weight_decay=0.0)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, cfg.vocab_size, (cfg.batch_size, cfg.n_ctx + 1))
    losses = [loss for *_, loss in steps_of(cfg, sg.init_flat(cfg), ids[:, :-1], ids[:, 1:])]
    assert losses[0] == pytest.approx(math.log(cfg.vocab_size), rel=0.02)
    assert losses[-1] < 0.1


def test_backends_agree_on_a_training_step_evaluation_and_sampling(backend, monkeypatch):
    """All that a GPU runs gives NumPy's numbers, to rounding."""
    cfg = tiny(steps=4, n_ctx=128, batch_size=2)
    params, ids, targets = drawn(cfg, 5)
    flat = np.concatenate([w.reshape(-1) for w in params.values()])
    tok = sg.Tokenizer.learn(["def f(x): return x\n" * 3], cfg.vocab_size)

    def run():
        *_, (_, trained, loss) = steps_of(cfg, dev(flat), ids, targets)
        val = sg.evaluate(trained, {"code": np.arange(280, dtype=np.uint16)}, cfg, 6)
        model = sg.Model(trained, cfg, tok)
        scores = sg.evaluate_tasks(model, 2)["for_while"]
        sg.save("model.npz", model)
        assert same(sg.load("model.npz").params, trained)
        weights = np.concatenate([host(w).reshape(-1) for w in trained.values()])
        return sg.sample(model, "def", n=20), loss, val["code"], weights, scores
    text, *got = run()
    monkeypatch.setattr(sg, "xp", np)
    same_text, *expected = run()
    assert text == same_text
    assert all(np.allclose(a, b, 1e-9, 1e-11) for a, b in zip(got, expected))


# ---- tokenizer ----------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=()), max_size=60)  # surrogates too
CODE = st.text(st.sampled_from("aab \n_1(=\"'é"), max_size=40)


@functools.cache
def python_tokenizer():
    """512 tokens from a part of the standard library."""
    return sg.Tokenizer.learn(sg.read_documents("stdlib", 0.3, quiet), 512)


@given(text=st.one_of(TEXTS, CODE), learned=st.lists(st.one_of(TEXTS, CODE), max_size=4))
@settings(max_examples=60)
def test_tokenizer_round_trip(text, learned):
    """Any string comes back from its tokens, each character in exactly one piece."""
    tok = sg.Tokenizer.learn(learned, 280)
    for t in (tok, python_tokenizer()):
        ids = t.encode(text)
        assert t.decode(ids) == text
        assert all(0 <= i < 257 + len(t.merges) and i != t.EOT for i in ids)
        assert t.encode(text) == ids
    assert "".join(sg.PIECES.findall(text)) == text


def slow_bpe(texts, vocab_size):
    """Byte-pair encoding as in a textbook: recount everything, replace everywhere."""
    words = [list(piece.encode("utf-8", "surrogatepass")) for t in texts
             for piece in sg.PIECES.findall(t)]
    merges = []
    while len(merges) < vocab_size - 257:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts or max(counts.values()) < 2:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [256 + len(merges)]
                i += 1
    return merges, [i for word in words for i in word]


@given(texts=st.lists(CODE, max_size=6), size=st.integers(257, 300))
@settings(max_examples=60)
def test_learned_merges_equal_textbook_bpe(texts, size):
    """Incremental counts equal a recount, ties go alike, and encoding replays the merges."""
    tok = sg.Tokenizer.learn(texts, size)
    merges, ids = slow_bpe(texts, size)
    assert tok.merges == merges == sg.Tokenizer.learn(texts, size).merges
    assert [i for t in texts for i in tok.encode(t)] == ids


def test_examples_in_docstrings_are_true():
    """The tokenizer's worked example, and any other."""
    failed, tried = doctest.testmod(sg)
    assert tried and not failed


@pytest.mark.parametrize("merges", [[(97, 257)], [(97, 98), (258, 97)], [(-1, 97)]])
def test_merges_of_tokens_that_do_not_exist_are_refused(merges):
    """A corrupt merge list would decode to other text."""
    with pytest.raises(ValueError):
        sg.Tokenizer(merges)


# ---- tasks --------------------------------------------------------------------------------------

NAMES = """single_double_quote bracket_counting bracket_brace set_or_string
    set_or_string_fixedvarname class_init var_swap with_as with_open for_while else_elif if_equals
    var_if if_ternary lambda_func enumerate_range fstring_brace final_kwarg indent_for
    while_return_true""".split()


def test_the_tasks_are_the_twenty_of_the_paper():
    """Their names and their order."""
    assert list(tasks.TASKS) == NAMES


@pytest.mark.parametrize("split", tasks.SPLITS)
@pytest.mark.parametrize("task", NAMES)
def test_pairs_are_different_repeatable_and_fair(task, split):
    """Each pair fits the default context, and its answers keep the prompts' own tokens."""
    found = tasks.pairs(task, 40, 7, split)
    assert len(set(found)) == len({pair.prompts for pair in found}) == 40
    assert tasks.pairs(task, 40, 7, split) == found
    assert tasks.pairs(task, 15, 7, split) == found[:15]
    assert tasks.pairs(task, 15, 8, split) != found[:15]
    tok = python_tokenizer()
    batch = sg.task_batch(tok, found, sg.Config.n_ctx)
    rows = zip(batch.ids, batch.last, batch.right, batch.wrong)
    for prompts, answers in found:
        assert prompts[0] != prompts[1] and answers[0] != answers[1]
        for prompt, answer, other in zip(prompts, answers, answers[::-1]):
            ids, last, right, wrong = next(rows)
            own, full = ([tok.EOT, *tok.encode(text)] for text in (prompt, prompt + answer))
            assert prompt == prompt.rstrip() and full[:len(own)] == own
            assert [*ids[:last + 1], right] == full[:last + 2] and last + 1 >= len(own)
            assert wrong == ([tok.EOT] + tok.encode(prompt + other))[last + 1] != right


def test_splits_share_no_names_or_words():
    """No test can be answered from memory: every pool of words is dealt out without overlap."""
    for seed in range(20):
        pools = [tasks.Writer(random.Random(seed), split) for split in tasks.SPLITS]
        for field in ("words", "verbs", "scope"):
            words = [word for w in pools for word in set(getattr(w, field))]
            assert len(words) == len(set(words)), field
    names = [[name for group in tasks.NAME_GROUPS[s] for name in group] for s in tasks.SPLITS]
    assert len({n for ns in names for n in ns}) == sum(map(len, names)) > 100


def test_idioms_are_valid_python_and_repeatable():
    """Training documents parse."""
    texts = [tasks.idiom(random.Random(seed)) for seed in range(300)]
    for text in texts:
        ast.parse(text)
    assert texts == [tasks.idiom(random.Random(seed)) for seed in range(300)]
    assert len(set(texts)) > 290
    assert sg.idiom_documents(5000) == sg.idiom_documents(5000)


@pytest.mark.parametrize("args", [("nonsense", 1), ("var_swap", 0), ("var_swap", 1, 0, "test")])
def test_pairs_refuses_what_it_cannot_make(args):
    """A wrong task, number or split is a ValueError that names it."""
    with pytest.raises(ValueError, match=rf"{args[0] if args[0] not in NAMES else args[-1]}"):
        tasks.pairs(*args)


@pytest.mark.parametrize("argv, said", [(["var_swop"], "var_swap"), (["--n", "0"], "--n"),
                                        (["var_swap", "--split", "tset"], "eval")])
def test_command_line_of_tasks_refuses_in_one_line(argv, said, capsys):
    """Exit status 2 and the nearest name."""
    assert tasks.main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and said in err


@pytest.mark.parametrize("argv", [["var_swap", "--n", "2"], ["--idioms"], []])
def test_command_line_of_tasks_shows(argv, capsys):
    """The three commands of its docstring."""
    assert tasks.main(argv) == 0
    assert capsys.readouterr().out.count("\n") > 5


@pytest.mark.parametrize("prompt, right, wrong, said", [
    ("aaa", "a", ";", "changes"), ("aaa", ";", "a", "changes"), ("x", ";", ";", "decides"),
    ("x", "=", "", "decides")])
def test_answers_that_merge_or_do_not_decide_are_refused(prompt, right, wrong, said):
    """deciding_tokens: an unfair pair is an error, not a score."""
    tok = sg.Tokenizer.learn(["aaaa aaaa x= x="], 262)
    with pytest.raises(ValueError, match=said):
        sg.deciding_tokens(tok, prompt, right, wrong)


@given(seed=SEEDS, n=st.integers(1, 6), size=st.sampled_from([1, 50, 2000]))
def test_score_equals_the_losses_written_out(seed, n, size):
    """Binary and full cross-entropy and accuracy, prompt by prompt; no overflow."""
    rng = np.random.default_rng(seed)
    logits = size * rng.standard_normal((n, 9))
    right, wrong = np.array([rng.permutation(9)[:2] for _ in range(n)]).T
    got = sg.score(logits.copy(), sg.TaskBatch(None, None, right, wrong))
    binary = full = hits = 0
    for z, r, w in zip(logits, right, wrong):
        binary += max(0, z[w] - z[r]) + math.log1p(math.exp(-abs(z[w] - z[r])))
        full += math.log(sum(math.exp(v - max(z)) for v in z)) + max(z) - z[r]
        hits += z[r] > z[w]
    assert got == pytest.approx((binary / n, full / n, hits / n), rel=1e-9, abs=1e-12)


# ---- training -----------------------------------------------------------------------------------

def write_prose(path="prose.txt", seed=0, n=300):
    """A file of short functions to train on; its name."""
    rng = random.Random(seed)
    Path(path).write_text("\n\n".join(
        f"def {rng.choice('abcd')}{i}(x):\n    return x + {rng.randrange(99)}" for i in range(n)))
    return str(path)


@pytest.fixture
def prose():
    return write_prose()


def same(one, two):
    """Whether two dicts of parameters are equal, bit for bit."""
    return one.keys() == two.keys() and all(
        host(w).tobytes() == host(two[name]).tobytes() for name, w in one.items())


def at_step(step, act):
    """A log that calls `act` when training reports a step."""
    return lambda line: act() if line.split()[:1] == [str(step)] else None


signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("stops", [(1,), (5, 8), (11,)])
def test_a_resumed_run_equals_an_uninterrupted_one(prose, backend, dtype, stops):
    """Ctrl-C, once or twice, at any step: bit for bit the same parameters."""
    whole = sg.train(tiny(dtype=dtype, out="whole.npz"), log=quiet)
    cfg, handler = tiny(dtype=dtype, out="cut.npz", idioms=0.0), signal.getsignal(signal.SIGINT)
    for i, stop in enumerate(stops):
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            sg.train(cfg, i > 0, at_step(stop, ctrl_c))
        assert signal.getsignal(signal.SIGINT) is handler
        assert sg.partial_path(cfg.out).exists() and not Path(cfg.out).exists()
    assert same(sg.train(cfg, True, quiet).params, whole.params)
    assert same(sg.load("cut.npz").params, whole.params)
    assert not sg.partial_path(cfg.out).exists()


def test_a_crashed_run_goes_on_from_its_automatic_save(prose, monkeypatch):
    """The state saved once a minute is as good as one saved by Ctrl-C."""
    def crash():
        raise ZeroDivisionError
    whole, cfg = sg.train(tiny(out="whole.npz"), log=quiet), tiny(out="cut.npz")
    clock = iter(range(0, 10**6, 50))  # each look at the clock is 50 seconds later
    monkeypatch.setattr(sg, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    with pytest.raises(ZeroDivisionError):
        sg.train(cfg, log=at_step(7, crash))
    assert same(sg.train(cfg, True, quiet).params, whole.params)


def test_a_run_to_resume_must_fit(prose):
    """Other data or another config is refused; the unfinished run stays."""
    cfg = tiny()
    with pytest.raises(sg.UserError, match="no unfinished run"):
        sg.train(cfg, True, quiet)
    with pytest.raises(KeyboardInterrupt):
        sg.train(cfg, log=at_step(3, ctrl_c))
    before = sg.partial_path(cfg.out).read_bytes()
    with pytest.raises(sg.UserError):
        sg.train(dataclasses.replace(cfg, n_layer=1), True, quiet)
    with pytest.raises(sg.UserError):
        sg.train(dataclasses.replace(cfg, n_layer=3), True, quiet)
    write_prose(seed=1)
    with pytest.raises(sg.UserError, match="other data"):
        sg.train(cfg, True, quiet)
    assert sg.partial_path(cfg.out).read_bytes() == before


def test_equal_runs_write_equal_files(prose):
    """Nothing but config and data decides a run; the second takes its data from the cache."""
    def run():
        sg.train(tiny(dtype="float32", idioms=0.5, max_mb=0.02), log=quiet)
        return Path("model.npz").read_bytes()
    assert run() == run()


WIDE = dict(batch_size=48, n_ctx=64, steps=3, dtype="float32")  # enough tokens for several shards


@pytest.mark.parametrize("blas", [1, 3])
def test_training_is_the_same_for_any_number_of_threads(prose, blas):
    """Bit for bit, also where BLAS was set to threads of its own before; BLAS gets them back."""
    before = sg.set_blas_threads(blas)
    try:
        runs = [sg.train(tiny(**WIDE, threads=n), log=quiet).params for n in (1, 2, 4, 0)]
        assert before is None or sg.set_blas_threads(blas) == blas
    finally:
        if before is not None:
            sg.set_blas_threads(before)
    assert all(same(runs[0], run) for run in runs[1:])


def test_gradients_do_not_depend_on_threads_and_hardly_on_shards(monkeypatch):
    """Sums over shards have a fixed order, and equal those over the whole batch to rounding."""
    cfg = tiny(**{**WIDE, "dtype": "float64", "batch_size": 49})
    assert cfg.shards > 2
    params, ids, targets = drawn(cfg, 2)
    runs = [loss_and_host_grads(params, ids, targets, dataclasses.replace(cfg, threads=threads))
            for threads in (1, 2, 3)]
    assert all(run[0] == runs[0][0] and same(run[1], runs[0][1]) for run in runs)
    few = loss_and_host_grads(params, ids[:2], targets[:2], cfg)  # fewer rows than shards
    monkeypatch.setattr(sg.Config, "shards", 1)
    for got, rows in ((runs[0], slice(None)), (few, slice(2))):
        loss, grads = loss_and_host_grads(params, ids[rows], targets[rows], cfg)
        assert got[0] == pytest.approx(loss, rel=1e-12)
        assert all(np.allclose(got[1][name], g, 1e-9, 1e-12) for name, g in grads.items())


def test_an_error_in_a_thread_is_raised_and_blas_gets_its_threads_back():
    """`parallel` hides no error and leaves nothing behind."""
    before = sg.set_blas_threads(2)
    try:
        for threads in (1, 2):
            assert sg.parallel(lambda x: x * x, range(5), threads) == [0, 1, 4, 9, 16]
            with pytest.raises(ZeroDivisionError):
                sg.parallel(lambda x: 1 / x, [1, 0], threads)
            assert before is None or sg.set_blas_threads(2) == 2
    finally:
        if before is not None:
            sg.set_blas_threads(before)


@pytest.mark.parametrize("plant", ["loss", "weight"])
@pytest.mark.parametrize("step", [4, 12])
def test_a_diverging_run_leaves_the_former_checkpoint(prose, step, plant, monkeypatch):
    """A loss, or after the last step a weight, that is not finite: the step, and nothing saved."""
    sg.train(tiny(), log=quiet)
    before, real, count = Path("model.npz").read_bytes(), sg.loss_and_grads, iter(range(1, 99))

    def planted(*args):
        loss, grads = real(*args)
        if next(count) == step:
            grads["wte"][...] = np.nan
            return loss * (np.nan if plant == "loss" else 1), grads
        return loss, grads
    monkeypatch.setattr(sg, "loss_and_grads", planted)
    with pytest.raises(FloatingPointError, match=rf"step ({step}|{step + 1})\b"):
        sg.train(tiny(), log=quiet)
    assert Path("model.npz").read_bytes() == before
    assert not sg.partial_path("model.npz").exists()


def small_model(seed=0, **more):
    """An untrained Model of random weights."""
    cfg, tok = tiny(**more), sg.Tokenizer.learn(["def f(x): return x\n" * 3], 270)
    return sg.Model(drawn(cfg, seed)[0], cfg, tok)


@given(seed=st.integers(0, 99), prompt=st.text(max_size=12))
@settings(max_examples=8)
def test_samples_are_repeatable_and_greedy_at_temperature_zero(backend, seed, prompt):
    """A seed writes the same text, after the prompt; 0 takes the likeliest token."""
    model = small_model()
    model = model._replace(params=on_device(model.params))
    assert sg.sample(model, prompt, 9, seed=seed) == sg.sample(model, prompt, 9, seed=seed)
    assert sg.sample(model, prompt, 0) == prompt
    ids, known = [model.tok.EOT, *model.tok.encode(prompt)], 257 + len(model.tok.merges)
    start = len(ids)
    while len(ids) < start + 9 and (len(ids) == start or ids[-1] != model.tok.EOT):
        logits = host(sg.forward(model.params, np.array([ids[-8:]]), model.cfg)[0])
        ids.append(int(logits[0, -1, :known].argmax()))
    assert sg.sample(model, prompt, 9, 0, seed=seed) == model.tok.decode(ids)


# ---- checkpoints and the data cache -------------------------------------------------------------

@given(cfg=configs(), seed=SEEDS)
def test_a_checkpoint_gives_back_what_was_saved(cfg, seed):
    """Config, tokenizer and every bit of the parameters."""
    params = drawn(cfg, seed)[0]
    model = sg.Model(params, cfg, sg.Tokenizer([(97, 97)] if cfg.vocab_size > 257 else []))
    sg.save("model.npz", model)
    params_back, cfg_back, tok = sg.load("model.npz")
    assert cfg_back == cfg and tok.merges == model.tok.merges and same(params_back, params)


@functools.cache
def checkpoint_bytes():
    """A whole checkpoint, as a file's content."""
    saved = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sg, "write_npz", lambda path, arrays: saved.append(arrays))
        sg.save("model.npz", small_model())
    out = io.BytesIO()
    np.savez(out, **saved[0])
    return out.getvalue()


def load_or_refuse(content):
    """What `load` makes of a file of this content: None if it is refused as damaged."""
    Path("damaged.npz").write_bytes(content)
    try:
        return sg.load("damaged.npz")
    except sg.UserError as e:
        assert "damaged.npz" in str(e) and "\n" not in str(e)
        return None


@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_checkpoint_is_refused(cut):
    """Cut anywhere: a UserError, no other exception and no half a model."""
    assert load_or_refuse(checkpoint_bytes()[:int(cut * len(checkpoint_bytes()))]) is None


@given(at=st.one_of(st.integers(0, 2500), st.integers(1, 2500).map(lambda i: -i), st.integers(0)),
       flip=st.integers(1, 255), n=st.integers(1, 3))
@settings(max_examples=150)
def test_a_checkpoint_with_changed_bytes_is_refused_or_unharmed(at, flip, n):
    """Damage anywhere, above all in headers: refused, unless it hits what carries no value."""
    content = bytearray(checkpoint_bytes())
    for i in range(n):
        content[(at + i) % len(content)] ^= flip
    model, good = load_or_refuse(bytes(content)), small_model()
    if model is not None:
        assert (model.cfg, model.tok.merges) == (good.cfg, good.tok.merges)
        assert same(model.params, good.params)


def test_damage_to_an_array_header_is_seen_in_large_files():
    """A smaller shape or type in a header must not pass for a shorter array."""
    arrays = dict(stream=np.arange(30_000, dtype=np.uint16))
    sg.write_npz("large.npz", arrays)
    content, wrong = Path("large.npz").read_bytes(), []
    start = content.index(b"\x93NUMPY")
    for at in range(start, start + 128):
        for flip in (1, 2, 4, 6):
            changed = bytes([content[at] ^ flip])
            Path("large.npz").write_bytes(content[:at] + changed + content[at + 1:])
            try:
                if not np.array_equal(sg.read_npz("large.npz").get("stream"), arrays["stream"]):
                    wrong.append((at - start, flip))
            except sg.UserError:
                pass
    assert not wrong


class Payload:
    """Pickled, it creates a file when it is loaded."""

    def __reduce__(self):
        return open, ("payload-ran", "w")


def test_pickles_are_never_loaded():
    """A checkpoint from somewhere else must not run code."""
    arrays = dict(np.load(io.BytesIO(checkpoint_bytes())))
    for name in (*arrays, "more"):
        np.savez("bad.npz", **{**arrays, name: np.array([Payload()], object)})
        with pytest.raises(sg.UserError):
            sg.load("bad.npz")
    Path("bad.npz").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(sg.UserError):
        sg.load("bad.npz")
    assert not Path("payload-ran").exists()


def edited(**changes):
    """The arrays of a checkpoint with some replaced (by None: left out)."""
    arrays = {**np.load(io.BytesIO(checkpoint_bytes())), **changes}
    return {name: a for name, a in arrays.items() if a is not None}


CONFIG, N_PARAMS = dataclasses.asdict(tiny()), sg.n_params(tiny())


@pytest.mark.parametrize("changes, said", [
    (dict(format="sparsegpt-0"), "sparsegpt-0"), (dict(format=None), "not a sparsegpt"),
    (dict(params=None), "params"), (dict(config=None), "config"), (dict(merges=None), "merges"),
    (dict(params=np.zeros(5)), "params"), (dict(params=np.full(N_PARAMS, np.nan)), "finite"),
    (dict(params=np.zeros(N_PARAMS, "f4")), "float32"), (dict(config="{"), "model.npz"),
    (dict(config="[]"), "model.npz"), (dict(config='{"n_layer": "2"}'), "n_layer"),
    (dict(config=json.dumps({**CONFIG, "d_head": 5})), "d_head"),
    (dict(config=json.dumps({**CONFIG, "unknown": 5})), "unknown"),
    (dict(config=json.dumps({**CONFIG, "n_layer": 1})), "params"),
    (dict(merges=np.array([[97, 999]])), "merge"), (dict(merges=np.arange(3)), "model.npz"),
    (dict(merges=np.array([[97, 97]] * 99)), "tokenizer"),
    (dict(merges=np.array([[0.5, np.inf]])), "model.npz")])
def test_a_checkpoint_that_does_not_fit_is_refused(changes, said):
    """Another version, a missing part, a wrong shape, type or value: the error says which."""
    np.savez("model.npz", **edited(**changes))
    with pytest.raises(sg.UserError, match=said):
        sg.load("model.npz")


def fail_halfway(f, **arrays):
    f.write(b"half")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("owner, name, fail, error", [
    (np, "savez", fail_halfway, sg.UserError),
    (np, "savez", lambda f, **_: ctrl_c(), KeyboardInterrupt),
    (os, "replace", lambda *_: open("missing/file"), sg.UserError),
    (os, "fsync", lambda *_: open("missing/file"), sg.UserError)])
def test_a_failing_write_leaves_the_former_file_alone(owner, name, fail, error, monkeypatch):
    """Whole or not at all, whatever breaks it off."""
    sg.save("model.npz", small_model())
    before = Path("model.npz").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(owner, name, fail)
        sg.save("model.npz", small_model(seed=1))
    assert os.listdir() == ["model.npz"] and Path("model.npz").read_bytes() == before


def test_the_data_cache_is_used_when_whole_and_rebuilt_when_not(prose):
    """The same corpus from a cache that is new, whole, damaged, foreign or out of date."""
    def built(**more):
        lines = []
        corpus = sg.load_corpus(tiny(**more), lines.append)
        return corpus, any("learned" in line for line in lines)
    first, fresh = built()
    [cache] = Path("cache").iterdir()
    content = cache.read_bytes()
    assert fresh and not built()[1]
    other = io.BytesIO()
    np.savez(other, other=np.zeros(3))
    bad_merges = io.BytesIO()
    np.savez(bad_merges, **{**np.load(cache), "merges": np.array([[97, 999]])})
    for damage in (b"", content[:-9], content[:99], b"x" + content[1:], other.getvalue(),
                   bad_merges.getvalue()):
        cache.write_bytes(damage)
        corpus, fresh = built()
        assert fresh and corpus.digest == first.digest and corpus.tok.merges == first.tok.merges
    assert built(vocab_size=270)[1] and built(idioms=0.5, max_mb=0.01)[1]
    write_prose(seed=1)
    corpus, fresh = built()
    assert fresh and corpus.digest != first.digest


def test_a_cached_corpus_too_short_for_this_config_is_refused(prose):
    """Text that a first run found long enough can be too short for a second."""
    sg.load_corpus(tiny(), quiet)
    for more in (dict(n_ctx=5000), dict(batch_size=5000)):
        with pytest.raises(sg.UserError, match="--data"):
            sg.load_corpus(tiny(**more), quiet)


def test_held_out_documents_are_never_trained_on(prose):
    """A document is on one side only, and both sides together are the whole text."""
    train, val = sg.split(sg.read_documents(prose, log=quiet))
    assert train and val and not set(train) & set(val)
    assert sorted("".join(train + val)) == sorted(Path(prose).read_text())


# ---- command line -------------------------------------------------------------------------------

def flags(**more):
    """A tiny run, as command-line arguments."""
    cfg = dataclasses.asdict(tiny(steps=3, **more))
    return [f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"
            for name, value in cfg.items()]


def run_main(capsys, *argv, main=sg.main):
    """(status, stdout, stderr) of the command line."""
    try:
        status = main(list(argv))
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()


def write(contents):
    for path, content in contents.items():
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(content)


def files():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize("line, said", [
    ("--densty 0.1", "did you mean --density"), ("--density 0", "--density"),
    ("--density 1.5", "--density"), ("--density nan", "--density"), ("--density x", "--density"),
    ("--density 1/0", "--density"), ("--d_head 5", "does not divide"), ("--n_ctx 1", "--n_ctx"),
    ("--vocab_size 100", "--vocab_size"), ("--steps 0", "--steps"), ("--act tanh", "--act"),
    ("--batch_size 2.5", "--batch_size"), ("--seed -1", "--seed"), ("--lr inf", "--lr"),
    ("--anneal_start 0.5 --anneal_end 0.2", "--anneal_end"), ("--data missing", "missing"),
    ("--data hollow", "holds no files"), ("--data binary", "not UTF-8"),
    ("--data short.txt", "--data"), ("--batch_size 9000", "--batch_size"),
    ("--n_ctx 60000", "--n_ctx"),
    ("--out prose.txt/model.npz", "cannot write"), ("--out hollow", "is a folder"),
    ("--sample x --out none.npz", "none.npz"), ("--sample x --out garbage.npz", "garbage.npz"),
    ("--sample x --out cut.npz", "cut.npz"), ("--sample x --out hollow", "hollow"),
    ("--resume --out none.npz", "no unfinished run"), ("--resume --lr 0.5 --out run.npz", "--lr"),
    ("--resume --out cut.npz", "cut.npz.partial"), ("--out run.npz", "unfinished run"),
    ("--out short.txt", "no checkpoint"), ("--out other.zip", "no checkpoint"),
    ("--data prose.txt,,", "empty path"),
    ("--sample x --bench", "not allowed with"), ("--dense --quick", "not allowed with")])
def test_wrong_input_is_one_line_and_status_two(line, said, prose, capsys):
    """No traceback, nothing written over, and the line names what is wrong."""
    whole = checkpoint_bytes()
    Path("hollow").mkdir()
    write({"binary/a": b"\xff\xfe", "short.txt": b"x", "garbage.npz": b"PK\x03\x04!",
           "cut.npz": whole[:-99], "cut.npz.partial": whole[:999], "run.npz.partial": whole,
           "model.npz": whole})
    np.savez("other", np.zeros(3))
    Path("other.npz").rename("other.zip")
    before = files()
    base = [] if "--sample" in line or "--resume" in line else flags()  # of --out model.npz
    status, _, err = run_main(capsys, *base, *line.split())
    assert status == 2 and err.count("\n") == 1 and "Traceback" not in err
    assert said in err
    after = files()
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in after if path.suffix == ".tmp"]


@pytest.mark.parametrize("wanted", ["gpu", "nonsense"])
def test_an_unusable_device_is_refused(wanted, capsys, monkeypatch):
    """SPARSEGPT_DEVICE: asked for and not there is an error."""
    if sg.use_device("auto").startswith("device: GPU") and wanted == "gpu":
        pytest.skip("there is a GPU")
    monkeypatch.setenv("SPARSEGPT_DEVICE", wanted)
    status, _, err = run_main(capsys, "--gradcheck")
    assert status == 2 and err.count("\n") == 1 and "SPARSEGPT_DEVICE" in err


def test_undecodable_files_are_skipped_and_counted():
    """A picture among the sources does not end a run, and does not go unsaid."""
    write({"mixed/a": b"good text", "mixed/b": b"\xff\xd8", "mixed/c": b"a\0b", "mixed/d": b""})
    lines = []
    assert sg.read_documents("mixed", log=lines.append) == ["good text"]
    assert "2 files" in "".join(lines)


@pytest.mark.parametrize("n_ctx", [8, 128])
def test_the_whole_path_runs(prose, n_ctx, capsys, monkeypatch):
    """Train, report and sample, also where the tasks' prompts are longer than the context."""
    monkeypatch.setattr(sg, "evaluate_tasks", functools.partial(sg.evaluate_tasks, n=3))
    status, out, err = run_main(capsys, *flags(n_ctx=n_ctx))
    assert (status, err) == (0, "") and "saved to model.npz" in out and "trained" in out
    assert "first loss" in out and f"{math.log(280):.4f}" in out
    scored, _, left_out = out.partition("not scored")
    assert ("for_while" in scored, "for_while" in left_out) == (n_ctx == 128, n_ctx == 8)
    status, out, err = run_main(capsys, "--sample", "def f(", "--out", "model.npz")
    assert (status, err) == (0, "") and out.startswith("def f(")


def test_ctrl_c_is_status_130_and_the_hint_resumes(prose, capsys, monkeypatch):
    """The command that an interrupted run prints is the one that goes on with it."""
    adam, count = sg.adam_step, iter(range(1, 99))
    monkeypatch.setattr(sg, "adam_step", lambda *a: (adam(*a), next(count) == 2 and ctrl_c()))
    status, _, err = run_main(capsys, *flags(), "--steps", "6")
    assert status == 130 and "Traceback" not in err
    hint = re.search(r"python sparsegpt.py (--resume .*)", err).group(1).split()
    status, out, err = run_main(capsys, *hint)
    assert (status, err) == (0, "") and "resuming at step 2 of 6" in out


def test_a_high_learning_rate_stops_with_the_step_named(prose, capsys):
    """A run that really diverges: status 2, no checkpoint."""
    more = "--lr 1000 --steps 60 --dtype float32".split()
    with np.errstate(all="ignore"):
        status, _, err = run_main(capsys, *flags(), *more)
    assert status == 2 and err.count("\n") == 1 and re.search(r"step \d+", err)
    assert not Path("model.npz").exists()


def test_every_config_field_is_a_flag_with_help():
    """Flags and Config cannot drift apart, and a parsed value has its field's type."""
    text = sg.make_parser().format_help()
    given = vars(sg.make_parser().parse_args(flags()))
    assert given == {**CONFIG, "steps": 3}
    for field in dataclasses.fields(sg.Config):
        assert f"--{field.name}" in text and field.metadata["help"]
        assert type(given[field.name]) is field.type
    assert sg.fraction("1/4") == 0.25


def test_the_program_runs_as_a_script_from_anywhere():
    """A real process: --gradcheck succeeds, a mistake is one line, and importing has no effect."""
    def script(*argv):
        return subprocess.run([sys.executable, sg.__file__, *argv], capture_output=True, text=True)
    good, bad = script("--gradcheck"), script("--density", "2")
    assert good.returncode == 0 and "largest relative error" in good.stdout and not good.stderr
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and not bad.stdout
    assert not os.listdir()


# ---- circuits: nodes, edges, losses -------------------------------------------------------------

def drawn_cut(cfg, seed, density=0.6):
    """(model, fill, prompts, cut) at random: zero weights, deleted nodes, often deleted edges."""
    rng, V = np.random.default_rng(seed), cfg.vocab_size
    params = {name: w * (rng.random(w.shape) < density) if sg.is_matrix(name) else w
              for name, w in drawn(cfg, seed)[0].items()}
    n, T = 2 * rng.integers(1, 4), rng.integers(1, cfg.n_ctx + 1)
    answers = np.array([rng.permutation(V)[:2] for _ in range(n)]).T
    prompts = prune.Prompts(rng.integers(0, V, (n, T)), rng.integers(0, T, n), *answers,
                            np.tile([1, -1], n // 2))
    keep = np.concatenate([rng.random(part.stop - part.start) < rng.choice([0, 0.3, 0.7, 1])
                           for part in prune.node_slices(cfg).values()])
    edges = {name: rng.random(params[name].shape) < 0.5 for name in prune.matrices(cfg)}
    model = sg.Model(on_device(params), cfg, sg.Tokenizer([]))
    return (model, rng.standard_normal(len(keep)), prompts,
            prune.Cut(keep, edges if rng.random() < 0.7 else None))


def run_hook(model, ids, hook=None, at=None):
    return host(sg.forward(model.params, ids, model.cfg, hook, at)[0])


def slow_circuit(model, fill, ids, cut):
    """({place: nodes [T, C]}, logits [T, V]) of a circuit on one prompt, written out."""
    cfg, seen, at = model.cfg, {}, prune.node_slices(model.cfg)
    p, T, D = {name: host(w) for name, w in model.params.items()}, len(ids), cfg.d_head

    def node(place, x):
        keep = np.flatnonzero(cut.keep[at[place]])
        seen[place] = np.tile(fill[at[place]], (T, 1))
        seen[place][:, keep] = 0
        for row, out in zip(x, seen[place]):
            k = len(row) if place == "final" else cfg.k(len(row))
            best = keep[first_largest(row[keep], k)]
            out[best] = row[best]
        return seen[place]

    def linear(x, name):
        m, w = prune.matrices(cfg)[name], p[name]
        gone = np.outer(cut.keep[m.source], cut.keep[m.target])
        gone &= False if cut.edges is None else ~cut.edges[name]
        return x @ np.where(gone, 0, w) + fill[m.source] @ np.where(gone, w, 0) + p[m.bias]

    def norm(x):
        return x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5)

    x = p["wte"][ids] + (p["wpe"][:T] if cfg.positions == "learned" else 0)
    for h in (f"h{i}." for i in range(cfg.n_layer)):
        y = np.split(linear(node(h + "attn_in", norm(x)), h + "attn.wqkv"), 3, 1)
        q, k, v = (node(h + place, part) for place, part in zip("qkv", y))
        z = np.zeros_like(x)
        for t, head in np.ndindex(T, cfg.d_model // D):
            own = slice(head * D, head * D + D)
            weights = np.exp(k[:t + 1, own] @ q[t, own] / math.sqrt(D) + (
                p[h + "attn.distance"][head, t::-1] if cfg.positions == "relative" else 0))
            total = weights.sum() + (np.exp(p[h + "attn.sink"][head]) if cfg.sink else 0)
            z[t, own] = weights @ v[:t + 1, own] / total
        x = x + node(h + "attn_out", linear(z, h + "attn.wo"))
        y = linear(node(h + "mlp_in", norm(x)), h + "mlp.wfc")
        y = np.maximum(y, 0) if cfg.act == "relu" else exact_gelu(y.ravel())[0].reshape(y.shape)
        x = x + node(h + "mlp_out", linear(node(h + "neuron", y), h + "mlp.wproj"))
    logits = node("final", norm(x)) @ p["head.w"] + p["head.b"]
    return seen, logits + (p["bigram"][ids] if cfg.bigram else 0)


@given(cfg=configs(), seed=SEEDS)
@settings(max_examples=40)
def test_a_circuit_computes_what_its_definition_says(backend, cfg, seed):
    """Whole and Compact against a circuit written out: AbsTopK among kept nodes, deleted nodes at
    their fill, deleted edges at weight x fill."""
    model, fill, prompts, cut = drawn_cut(cfg, seed)
    whole, compact = (kind(model, fill, prompts) for kind in (prune.Whole, prune.Compact))
    logits, order = whole.logits(cut), whole.prompts
    assert sorted(order.last) == sorted(prompts.last)
    for ids, last, row in zip(order.ids, order.last, logits):
        expected = slow_circuit(model, fill, ids[:last + 1], cut)[1][last]
        assert np.allclose(row, expected, 1e-9, 1e-9)
    assert np.allclose(compact.logits(cut), logits, 1e-8, 1e-9)
    rng = np.random.default_rng(seed)
    for _ in range(4):  # what it remembers of one cut must not be taken for another's
        one = int(rng.integers(len(cut.keep)))
        changed = cut._replace(keep=np.where(np.arange(len(cut.keep)) == one, ~cut.keep, cut.keep))
        if cut.edges is not None:
            name = rng.choice(list(cut.edges))
            changed = changed._replace(edges={**cut.edges, name: cut.edges[name] & (
                rng.random(cut.edges[name].shape) < 0.7)})
        assert np.allclose(compact.logits(changed), whole.logits(changed), 1e-8, 1e-9)
    assert np.allclose(compact.logits(cut), logits, 1e-8, 1e-9)
    assert all(np.array_equal(*columns) for columns in zip(order, compact.prompts))


@given(cfg=configs(), seed=SEEDS)
def test_all_nodes_are_the_model_and_no_nodes_are_constant(backend, cfg, seed):
    """The two ends of ablation: the model bit for bit, nothing but the fill and the bigrams."""
    model, fill, prompts, _ = drawn_cut(cfg, seed)
    p, ids = model.params, prompts.ids
    every, none = (prune.Ablation(np.full(len(fill), keep), fill, cfg) for keep in (True, False))
    assert np.array_equal(run_hook(model, ids, every), run_hook(model, ids))
    final = fill[prune.node_slices(cfg)["final"]] @ host(p["head.w"]) + host(p["head.b"])
    final = final + (host(p["bigram"])[ids] if cfg.bigram else 0)
    assert np.allclose(run_hook(model, ids, none), final, 1e-12, 1e-12)


class Mixed(prune.Ablation):
    """Ablation with one node at m x + (1 - m) fill, x what it is or would be if it were kept."""

    def forward(self, place, x, k):
        out, part, (node, m, fill) = super().forward(place, x, k), self.at[place], self.mixed
        if part.start <= node < part.stop:
            keep, c = host(self.keep[part]), node - part.start
            keep[c] = True
            out[:, c] = m * sg.abstopk(x * dev(keep), k)[0][:, c] + (1 - m) * fill[node]
        return out


@given(cfg=configs(), seed=SEEDS, data=st.data())
def test_the_gradient_of_a_mask_is_the_derivative_of_the_loss(backend, cfg, seed, data):
    """What masks are learned by, of kept and of deleted nodes, with AbsTopK and without."""
    model, fill, prompts, (keep, _) = drawn_cut(cfg, seed)
    scale, shift = data.draw(st.sampled_from([(1.0, 0.0), (1.7, -0.6), (0.5, 1.0)]))
    margin, grad = prune.gradient(model, prompts, keep, fill, prune.Calibration(scale, shift))
    loss = prune.logistic(scale * margin + shift * prompts.sign)
    rows, errors = np.arange(len(prompts.last)), []
    for node in data.draw(st.lists(st.integers(0, len(fill) - 1), min_size=3, max_size=3)):
        def along(t):
            hook = Mixed(keep, fill, cfg)
            hook.mixed = node, keep[node] + t, fill
            z = run_hook(model, prompts.ids, hook, prompts.last)
            margin = z[rows, prompts.right] - z[rows, prompts.wrong]
            return np.logaddexp(0, -scale * margin - shift * prompts.sign).mean()
        assert loss == pytest.approx(along(0.0), rel=1e-9)
        errors.append(mismatch(along, grad[node:node + 1], np.ones(1), loss))
    assume(None not in errors)
    assert max(errors) < 1e-6


ENDS = dict(wqkv=["attn_in", "q", "k", "v"], wo=["v", "attn_out"], wfc=["mlp_in", "neuron"],
            wproj=["neuron", "mlp_out"])


def named(cut, model):
    """({the kept nodes' names}, {(source, target): (matrix, row, column)} of the edges), counted
    one by one."""
    kept, edges = {prune.node_name(n, model.cfg) for n in np.flatnonzero(cut.keep)}, {}
    for name in prune.matrices(model.cfg):
        (h, _, kind), w = re.split(r"\b", name)[1:6:2], host(model.params[name])
        source, *targets = ENDS[kind]
        width = w.shape[1] // len(targets)
        for i, j in np.argwhere(w if cut.edges is None else w * cut.edges[name]):
            ends = f"{h}.{source}.{i}", f"{h}.{targets[j // width]}.{j % width}"
            if kept >= set(ends):
                edges[ends] = name, i, j
    return kept, edges


@given(cfg=configs(), seed=SEEDS)
def test_edges_are_the_nonzero_weights_between_kept_nodes(backend, cfg, seed):
    """The numbers that are reported; a smaller cut is less by what was asked, the first as it
    was."""
    model, _, _, cut = drawn_cut(cfg, seed)
    kept, edges = named(cut, model)
    cut = cut._replace(edges=prune.kept_edges(cut, model.params, cfg))
    assert sorted(prune.edge_list(cut.edges)) == sorted(edges.values())
    assert prune.sizes(cut, model.params, cfg) == (len(kept), len(edges))
    lost, gone = (set(sorted(x)[::2]) for x in (edges, kept))
    less = cut.without([edges[ends] for ends in lost])
    assert named(less, model)[1].keys() == edges.keys() - lost
    less = cut.without([prune.node_number(name, cfg) for name in gone])
    assert named(less, model)[0] == kept - gone and named(cut, model) == (kept, edges)


def test_every_node_has_a_name_and_no_other_name_has_a_node():
    """Names, as the command line and the files have them, in the order of computation."""
    cfg = tiny(n_layer=1, d_model=4)
    names = [f"h0.{p}.{c}" for p in PLACES for c in range(16 if p == "neuron" else 4)]
    names += [f"final.{c}" for c in range(4)]
    assert [prune.node_name(n, cfg) for n in range(prune.n_nodes(cfg))] == names
    assert [prune.node_number(name, cfg) for name in names] == list(range(len(names)))
    for bad in ("", "final", "final.4", "final.-1", "final.1.0", "h1.q.0", "h0.q.x", "h0.w.0"):
        with pytest.raises(sg.UserError, match="h0.neuron"):
            prune.node_number(bad, cfg)


def reached(links, start):
    """What paths from `start` lead to."""
    found, before = {start}, 0
    while before < len(found):
        before = len(found)
        found |= {b for a, b in links if a in found}
    return found


@given(cfg=configs(), seed=SEEDS)
@settings(max_examples=60)
def test_orphans_are_the_kept_nodes_on_no_path(cfg, seed):
    """A path search: edges, residual channels, and towards the logits from q and k to v."""
    model, _, prompts, cut = drawn_cut(cfg, seed, 0.15)
    p, C, L = model.params, cfg.d_model, cfg.n_layer
    kept, edges = named(cut, model)
    links = set(edges)
    for i, c in np.ndindex(2 * L, C):  # (i, c): channel c before the i-th reader
        reader, writer = (f"h{i // 2}.{x}.{c}" for x in (
            ("attn_in", "attn_out"), ("mlp_in", "mlp_out"))[i % 2])
        links |= {((i, c), (i + 1, c)), ((i, c), reader), (writer, (i + 1, c))}
    for c in range(C):
        links.add(((2 * L, c), f"final.{c}"))
        if p["wte"][np.unique(prompts.ids), c].any() or (
                cfg.positions == "learned" and p["wpe"][:, c].any()):
            links.add(("tokens", (0, c)))
        if p["head.w"][c].any():
            links.add((f"final.{c}", "logits"))
    deleted = {prune.node_name(n, cfg) for n in np.flatnonzero(~cut.keep)}
    mixed = {(f"h{i}.{x}.{a}", f"h{i}.v.{b}") for i, a, b in np.ndindex(L, C, C) for x in "qk"
             if a // cfg.d_head == b // cfg.d_head}
    ahead, back = ({link for link in some if not deleted & set(link)}
                   for some in (links, links | mixed))
    alive = reached(ahead, "tokens") & reached({(b, a) for a, b in back}, "logits")
    found = {prune.node_name(n, cfg) for n in prune.orphans(cut, model, prompts)}
    assert found == kept - alive


@given(seed=SEEDS, n=st.integers(1, 12), size=st.sampled_from([0.1, 1, 10]),
       bias=st.sampled_from([0, 1, 5]))
@settings(max_examples=60)
def test_a_calibration_is_the_best_within_its_bounds(seed, n, size, bias):
    """Scale and shift against a grid, no scale under 1/2 or over 2; calibrated logits have the
    calibrated margins, so the loss of a search is the one that is reported."""
    rng, sign = np.random.default_rng(seed), np.tile([1, -1], n)
    logits, answers = size * randoms(rng, 2 * n, 9), np.tile([[0, 1], [1, 0]], (n, 1)).T
    logits[:, 0] += bias
    prompts = prune.Prompts(None, None, *answers, sign)
    margin = prune.margins(logits, prompts)

    def objective(scale, shift):
        loss = np.logaddexp(0, -scale * margin - shift * sign).mean()
        return loss + 0.005 * ((scale - 1)**2 + shift**2)
    found = prune.calibrate(margin, sign)
    losses = (prune.logistic(found.margins(logits, prompts)),
              prune.logistic(found.scale * margin + found.shift * sign))
    assert losses == pytest.approx((sg.score(found.logits(logits, prompts), prompts).binary,) * 2)
    best = min(objective(scale, shift) for scale in np.linspace(0.5, 2, 16)
               for shift in np.linspace(-8, 8, 81))
    assert 0.5 <= found.scale <= 2 and objective(*found) <= best + 1e-9


# ---- circuits: cutting down ---------------------------------------------------------------------

@given(data=st.data(), n=st.integers(1, 3000))
@settings(max_examples=60)
def test_bisection_finds_the_fewest_in_few_steps(data, n):
    """The true minimum where more never hurts, or None, in a logarithmic number of steps."""
    least, calls = data.draw(st.integers(0, n + 1)), []
    order = np.random.default_rng(n).permutation(n)

    def good(cut):
        calls.append(cut)
        return cut.keep.sum() >= least
    found = prune.bisect(order, good)
    assert len(calls) <= 4 + 2 * math.log2(min(least, n) + 1) and (found is None) == (least > n)
    assert found is None or set(np.flatnonzero(found.keep)) == set(order[:least])


@given(n=st.integers(0, 9), seed=SEEDS, monotone=st.booleans(), target=st.floats(0.1, 2))
@settings(max_examples=60)
def test_cleaning_ends_where_nothing_can_go_alone(n, seed, monotone, target):
    """Never over the target, also where what can go alone cannot go together."""
    weights = np.random.default_rng(seed).random(n)

    def loss(cut):
        if monotone:
            return sum(w for i, w in enumerate(weights) if i not in cut)
        return 2 * random.Random(f"{seed} {sorted(cut)}").random() * (len(cut) < n)
    found = prune.spare(frozenset(range(n)), sorted, lambda cut, items: cut - set(items), loss,
                        target, quiet, "")
    assert loss(found) <= target < min((loss(found - {i}) for i in found), default=math.inf)


# A network wired by hand, whose circuit is known, and tasks of its own. From `=`, head 0 looks for
# the first token, whose value a neuron of the next block sends on to `x` and `y`.
CIRCUIT = {("h0.attn.wqkv", 5, 0): 2, ("h0.attn.wqkv", 4, 16): 1, ("h0.attn.wqkv", 0, 32): 1,
           ("h0.attn.wo", 0, 1): 1, ("h1.mlp.wfc", 1, 5): 1, ("h1.mlp.wproj", 5, 3): 2}
EDGES = {("h0.attn_in.5", "h0.q.0"), ("h0.attn_in.4", "h0.k.0"), ("h0.attn_in.0", "h0.v.0"),
         ("h0.v.0", "h0.attn_out.1"), ("h1.mlp_in.1", "h1.neuron.5"),
         ("h1.neuron.5", "h1.mlp_out.3")}
NODES = {name for ends in EDGES for name in ends} | {"final.3"}
NEEDLESS = {  # edges of little effect between these, a weak copy of v.0, noise on channel 3
    ("h0.attn.wqkv", 0, 16): 0.1, ("h0.attn.wqkv", 5, 16): -0.1, ("h0.attn.wqkv", 4, 32): 0.1,
    ("h0.attn.wqkv", 0, 33): 0.3, ("h0.attn.wo", 1, 1): 0.3, ("h0.mlp.wfc", 9, 20): 0.5,
    ("h0.mlp.wproj", 20, 3): 0.1}
FEW = prune.Settings(runs=1, steps=60, search_pairs=16)


def cue(w):
    """The first token decides: `<ab=` -> `x`, `>ab=` -> `y`."""
    junk = "".join(w.rng.choices("abcd", k=6 if w.large else w.pick(3, 4, 5)))
    return (f"<{junk}=", "x", ""), (f">{junk}=", "y", "")


def hopeless(w):
    """Nothing in the network tells what decides: `c` -> `x`, `d` -> `y`."""
    return tuple((f"{'cd'[i]}{side[0][1:]}", *side[1:]) for i, side in enumerate(cue(w)))


def trivial(w):
    """The last token decides, which the bigram table knows."""
    return tuple((side[0][1:-1] + side[0][0], *side[1:]) for side in cue(w))


def endless(w):
    """Longer than the context."""
    return tuple((9 * side[0], *side[1:]) for side in cue(w))


@contextmanager
def own_tasks():
    """The network's tasks, and text in which `=` is rare."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "TASKS", {f.__name__: f for f in (cue, hopeless, endless)})
        patch.setattr(tasks, "surround", lambda w, sides: list(sides))
        patch.setattr(prune, "text_windows", lambda model, n, seed=0: np.random.default_rng(
            seed).choice(list(b"<>abcd" * 5 + b"="), (n, 16)))
        yield


@pytest.fixture
def cues(clean):
    with own_tasks():
        yield


def wired(seed=0, threads=1):
    """The network. Channels from 8 on are busy with something else; v.0 sees `a` and `b` too."""
    cfg = sg.Config(n_layer=2, d_model=16, d_head=4, n_ctx=16, vocab_size=257, act="relu",
                    afrac=1.0, positions="none", sink=False, bigram=False, threads=threads,
                    out="model.npz")
    rng, p = np.random.default_rng(seed), sg.views(np.zeros(sg.n_params(cfg), cfg.dtype), cfg)

    def busy(w, size):
        w[...] = size * rng.standard_normal(w.shape) * (rng.random(w.shape) < 0.4)
    busy(p["wte"][:, 8:], 0.3)
    busy(p["head.w"][8:], 1)
    for h in ("h0.", "h1."):
        busy(p[h + "attn.wqkv"].reshape(16, 3, 16)[8:, :, 8:], 1)
        busy(p[h + "attn.wo"][8:, 8:], 0.1)
        busy(p[h + "mlp.wfc"][8:, 32:], 1)
        busy(p[h + "mlp.wproj"][32:, 8:], 0.1)
    for c, values in (0, {"<": 1, ">": -1, "a": 1, "b": -1}), (4, {"<": 1, ">": 1}), (5, {"=": 1}):
        p["wte"][list(map(ord, values)), c] = list(values.values())
    for (name, i, j), w in (CIRCUIT | NEEDLESS).items():
        p[name][i, j] = w
    p["h1.mlp.bproj"][3], p["head.w"][3, ord("x")], p["head.w"][3, ord("y")] = -3.5, 1.5, -1.5
    return sg.Model(on_device(p), cfg, sg.Tokenizer([]))


@functools.cache
def found_circuit():
    """The Circuit that `prune` finds in the network."""
    with own_tasks():
        return prune.prune(wired(), "cue", FEW, log=quiet)


@pytest.mark.parametrize("ablation, tied", [("mean", True), ("zero", False)])
def test_the_circuit_of_a_network_wired_by_hand_is_found(backend, cues, ablation, tied):
    """Ground truth: every node and every edge of it, and no other."""
    model, s = wired(), dataclasses.replace(FEW, ablation=ablation, tied=tied)
    problem = prune.Problem(model, prune.Study(model, ablation).fill, "cue", s)
    found = prune.search(problem, quiet)
    nodes, edges = named(found.cut, model)
    assert (nodes, edges.keys()) == (NODES, EDGES)
    assert prune.full_loss(problem) < 0.05 and found.loss < 0.05 and found.stages[-1] == dict(
        stage="edges cleaned", nodes=11, edges=6, loss=pytest.approx(found.loss))


@pytest.mark.parametrize("nonsense, aim", [(False, 0.135), (True, 0.135)])
def test_a_control_is_searched_as_hard_as_its_task(cues, monkeypatch, nonsense, aim):
    """Masks are trained to the same loss, however bad the full model is at a control."""
    model, aims = wired(), []
    problem = prune.Problem(model, prune.Study(model).fill, "cue", FEW, nonsense)
    assert (prune.full_loss(problem) > 2) == nonsense

    def learn_masks(*args):
        aims.append(args[-1])
        return np.arange(368), np.ones(368)
    monkeypatch.setattr(prune, "learn_masks", learn_masks)
    monkeypatch.setattr(prune, "clean", lambda problem, cut, *_: (cut, prune.Calibration(), 0.0))
    prune.search(problem, quiet)
    assert aims == [pytest.approx(aim)]


def test_a_huge_circuit_is_not_cleaned_and_says_so(cues, monkeypatch):
    """It is returned as it came, within the target."""
    model, stages = wired(), []
    problem = prune.Problem(model, prune.Study(model).fill, "cue", FEW)
    every = prune.Cut(np.ones(368, bool))
    monkeypatch.setattr(prune, "TOO_LARGE", problem.size(every)[1] - 1)
    cut, calibration, loss = prune.clean(problem, every, lambda *stage: stages.append(stage), quiet)
    assert cut is every and loss == problem.loss(every, calibration) <= FEW.target
    assert [name for name, *_ in stages] == ["not cleaned: too large"]


def test_learned_masks_rank_the_nodes_of_a_circuit_first(cues):
    """The search before it is cleaned: few of 368 nodes do the task. The baseline, attribution, is
    the gradient on all prompts."""
    model = wired()
    problem = prune.Problem(model, prune.Study(model).fill, "cue", dataclasses.replace(
        FEW, steps=150))
    order, _ = prune.learn_masks(problem, 1e-3, 0.01, 1.0, [0, 1], quiet)
    assert prune.bisect(order, lambda cut: problem.loss(cut) < 0.15).keep.sum() < 20
    _, grad = prune.gradient(model, problem.pool, np.ones(368, bool), problem.fill)
    assert (np.diff(grad[prune.rank_by_attribution(problem)]) >= -1e-9).all()


def test_no_circuit_is_found_where_there_is_none(cues):
    """The controls: answers dealt out at random to the same prompts, and the same weights at
    other places among the nonzero ones."""
    study = prune.Study(wired())
    real, nonsense = (prune.Problem(study.model, study.fill, "cue", FEW, nonsense=x)
                      for x in (False, True))
    one, two = real.pool, nonsense.pool
    assert np.array_equal(one.ids, two.ids) and np.array_equal(two.right[::2], two.wrong[1::2])
    assert 10 < (one.right != two.right)[::2].sum() < 22
    assert np.array_equal(two.right == ord("x"), two.sign > 0)
    other = prune.Problem(study.shuffled, study.shuffled_fill, "cue", FEW)
    for problem in (nonsense, other):
        found = prune.search(problem, quiet)
        assert found.cut is None and found.loss > 0.15
    for name, w in study.model.params.items():
        dealt = study.shuffled.params[name]
        assert np.array_equal(np.sort(w, None), np.sort(dealt, None))
        assert np.array_equal(w != 0, dealt != 0)


def test_a_task_that_needs_no_node_has_an_empty_circuit(cues, monkeypatch):
    """What the bigram table alone does: checked, saved and drawn like any other."""
    monkeypatch.setitem(tasks.TASKS, "trivial", trivial)
    params = dict(wired().params, bigram=np.zeros((257, 257), "f4"))
    params["bigram"][[ord("<"), ord(">")], [ord("x"), ord("y")]] = 30
    model = wired()._replace(params=params, cfg=dataclasses.replace(wired().cfg, bigram=True))
    circuit = prune.finish("circuits", prune.prune(model, "trivial", FEW, log=quiet), model)
    assert (circuit.record["size"]["nodes"], circuit.record["size"]["edges"]) == (0, 0)
    Page(Path("circuits/trivial.html").read_text())
    json.loads(Path("circuits/trivial.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert "trivial" in prune.listing(circuit) and not prune.explain(circuit.record["example"])


def test_a_circuit_is_judged_by_prompts_that_it_was_not_calibrated_on(cues):
    """No pair is on both sides; the loss is that of the one side, calibrated on the other."""
    problem = prune.Problem(wired(), np.zeros(368, "f4"), "cue", FEW)
    sides = [{row.tobytes() for row in some.prompts.ids} for some in (problem.on, problem.fit_on)]
    assert not sides[0] & sides[1] and len(sides[0]) == len(sides[1]) == 32
    cut = prune.Cut(np.random.default_rng(0).random(368) < 0.9)
    on, fit_on = (prune.Whole(problem.model, problem.fill, some.prompts)
                  for some in (problem.on, problem.fit_on))
    fitted = prune.calibrate(prune.margins(fit_on.logits(cut), fit_on.prompts),
                             fit_on.prompts.sign)
    loss = sg.score(fitted.logits(on.logits(cut), on.prompts), on.prompts).binary
    assert problem.loss(cut) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_masks_are_learned_by_adamw_through_a_sigmoid(cues, monkeypatch, tied):
    """The rule (paper A.5) written out, with the sigmoid's slope taken numerically."""
    s = dataclasses.replace(FEW, steps=40, tied=tied)
    problem = prune.Problem(wired(), np.zeros(368, "f4"), "cue", s)
    rng, group, kept = np.random.default_rng(1), np.arange(368), []
    noise, need = 0.2 * randoms(rng, 40, 1) * randoms(rng, 40, 368), 0.2 * randoms(rng, 368)
    for h, c in np.ndindex(2 * tied, 16):
        q, k = (prune.node_number(f"h{h}.{x}.{c}", problem.model.cfg) for x in "qk")
        group[k] = q

    def gradient(model, prompts, keep, fill, calibration):
        kept.append(keep)  # and at the target, where k_coef stays as it is
        margin = np.full(len(prompts.last), -math.log(math.expm1(s.target)))
        return margin, need * (1 + keep) + noise[len(kept) - 1]
    monkeypatch.setattr(prune, "gradient", gradient)
    monkeypatch.setattr(prune, "calibrate", lambda margin, sign: prune.Calibration())
    _, t = prune.learn_masks(problem, 0.02, 0.0, 0.2, [0, 0], quiet)  # at rate 0: as it starts
    kept.clear()
    order, tau = prune.learn_masks(problem, 0.02, 0.06, 0.2, [0, 0], quiet)
    m = v = use = np.zeros(368)
    for step, keep in enumerate(kept):
        assert np.array_equal(keep, t >= 0)
        low, high = (1 / (1 + np.exp(-(t + d) / 0.2)) for d in (-1e-5, 1e-5))
        by_node = need * (1 + keep) + noise[step]
        g = np.bincount(group, by_node + 0.02, 368)[group] * (high - low) / 2e-5
        g /= max(1, np.linalg.norm(g[np.unique(group)]))
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        use = 0.95 * use - 0.05 * np.bincount(group, by_node, 368)[group]
        way = m / (1 - 0.9**(step + 1)) / (np.sqrt(v / (1 - 0.95**(step + 1))) + 1e-8)
        t = np.clip(t - 0.06 * (1 - step / 40) * (way + 1e-3 * t), -1, 1)
    assert len(kept) == 40 and np.allclose(tau, t, 1e-4, 1e-5) and 9 < (tau == 1).sum() < 150
    assert (np.diff(tau[order]) <= 0).all() and sorted(order) == list(range(368))
    assert (np.diff(use[order][tau[order] == 1]) <= 1e-12).all()


def test_the_same_seed_finds_the_same_circuit_with_any_number_of_processes(cues):
    """Everything that is saved, digit for digit, but the number of threads itself."""
    one = found_circuit()
    other = prune.prune(wired(threads=3), "cue", FEW, log=prune.quiet, workers=2)
    other.record["model"]["config"]["threads"] = 1
    assert one.record == other.record and one.calibration == other.calibration
    assert np.array_equal(one.cut.keep, other.cut.keep) and np.array_equal(one.fill, other.fill)


# ---- circuits: what is measured and printed -----------------------------------------------------

@given(cfg=configs(), seed=SEEDS, threads=st.integers(1, 3))
def test_mean_activations_are_those_of_the_model_as_it_runs(backend, cfg, seed, threads):
    """The mean over all tokens, with AbsTopK, in parts of a batch on any number of threads."""
    model, _, prompts, _ = drawn_cut(cfg, seed)
    total = 0
    for row in prompts.ids:
        run_hook(model, row[None], hook := Push())
        total = total + np.concatenate([x.sum(0) for x in hook.seen.values()])
    model = model._replace(cfg=dataclasses.replace(cfg, threads=threads))
    means = prune.mean_activations(model, prompts.ids)
    assert np.allclose(means, total / prompts.ids.size, 1e-9, 1e-12)


def test_text_windows_are_of_the_text_that_was_trained_on(prose):
    """Frozen values are means over it; other text, with another tokenizer, is refused."""
    model = sg.train(tiny(steps=1), log=quiet)
    stream = sg.load_corpus(model.cfg, quiet).train["code"].tobytes()
    windows = prune.text_windows(model, 5)
    assert windows.shape == (5, 8) and len({row.tobytes() for row in windows}) == 5
    assert all(row.astype(np.uint16).tobytes() in stream for row in windows)
    Path(prose).write_text(Path(prose).read_text().replace("return", "other words"))
    with pytest.raises(sg.UserError, match="another tokenizer"):
        prune.text_windows(model, 5)


@given(B=st.integers(1, 2), T=st.integers(1, 6), H=st.integers(1, 3), sink=st.booleans(),
       table=st.booleans(), seed=SEEDS)
def test_attention_weights_are_those_that_attention_uses(B, T, H, sink, table, seed):
    """Patterns that are printed and compared, the sink's share and distances included."""
    rng = np.random.default_rng(seed)
    qkv, logit = 2 * randoms(rng, B * T, 3, 2 * H), randoms(rng, H) if sink else None
    far = randoms(rng, H, T + 1) if table else None
    weights = prune.attention_weights(qkv[:, 0], qkv[:, 1], logit, far, B, 2)
    [(_, _, _, e, total, to_sink)] = sg.attention(qkv, logit, far, B, 2)[1][-1]
    assert np.allclose(weights[..., :-1], e / total) and np.allclose(weights.sum(-1), 1)
    assert np.allclose(weights[..., -1:], to_sink if sink else 0)


@given(cfg=configs(act="relu", afrac=1.0, sink=False), seed=SEEDS)
def test_weights_and_effective_biases_add_up_to_the_nodes(cfg, seed):
    """A node is its printed bias and its edges x where these come from; without any, constant."""
    model, fill, prompts, cut = drawn_cut(cfg, seed)
    cut = cut._replace(edges=prune.kept_edges(cut, model.params, cfg))
    seen, _ = slow_circuit(model, fill, prompts.ids[0, :1], cut)  # one token attends to itself
    value, bias = np.concatenate([x[0] for x in seen.values()]), prune.effective_bias(
        model, cut, fill)
    kept, edges = named(cut, model)
    total = {prune.node_name(n, cfg): x for n, x in bias.items()}
    assert total.keys() == {name for name in kept if not re.search("_in|final", name)}
    for (source, target), (name, i, j) in edges.items():
        total[target] += value[prune.node_number(source, cfg)] * model.params[name][i, j]
    for name, x in total.items():
        x = max(x, 0) if "neuron" in name else x
        assert value[prune.node_number(name, cfg)] == pytest.approx(x, abs=1e-9)


@given(cfg=configs(), seed=SEEDS, data=st.data())
def test_a_node_set_by_hand_has_that_value(backend, cfg, seed, data):
    """--set: the same as a hook that adds the difference; the value it has changes nothing."""
    model, _, prompts, _ = drawn_cut(cfg, seed)
    node = data.draw(st.integers(0, prune.n_nodes(cfg) - 1))
    place, _, channel = prune.node_name(node, cfg).rpartition(".")
    for ids in (prompts.ids[:1, :1], prompts.ids):
        logits = run_hook(model, ids, hook := Push())
        now = hook.seen[place][:, int(channel)]
        if ids.size == 1:
            hook = prune.Set({node: float(now[0])}, cfg)
            assert np.array_equal(run_hook(model, ids, hook), logits)
        amount = np.zeros((ids.size, cfg.d_model * (4 if "neuron" in place else 1)))
        amount[:, int(channel)] = 1.5 - now
        assert np.allclose(run_hook(model, ids, prune.Set({node: 1.5}, cfg)),
                           run_hook(model, ids, Push(place, amount)))


def test_what_is_said_of_the_known_circuit_is_true(cues):
    """Its links, its losses, the walk through a prompt pair, attention, checks, --set."""
    model, circuit = wired(), found_circuit()
    r, score = circuit.record, sg.evaluate_tasks(model, 16)["cue"]._asdict()
    assert {(e["from"], e["to"]) for e in r["edges"]} == EDGES
    assert links_of(r) - EDGES == {
        ("h0.attn_out.1", "h1.mlp_in.1"), ("h1.mlp_out.3", "final.3"), ("final.3", "x"),
        ("final.3", "y"), *((token, f"h0.attn_in.{c}") for token in "<>" for c in (0, 4))}
    assert r["losses"]["full"]["search"] == pytest.approx(score, rel=1e-5)
    for row, tokens in enumerate(r["example"]["prompts"]):
        ids = [sg.Tokenizer.EOT, *map(ord, tokens[1:])]
        seen, logits = slow_circuit(model, circuit.fill, ids, circuit.cut)
        assert r["example"]["values"].keys() == NODES
        for name, values in r["example"]["values"].items():
            place, _, channel = name.rpartition(".")
            assert np.allclose(values[row], seen[place][:, int(channel)], atol=2e-3)
        margin = circuit.calibration.scale * (logits[-1, ord("x")] - logits[-1, ord("y")])
        margin = (1 - 2 * row) * (margin + circuit.calibration.shift)
        assert r["example"]["margins"][row] == pytest.approx(margin, abs=2e-3)
        assert r["example"]["answers"][row] == "xy"[row] and tokens[1] == "<>"[row]
        [head] = r["heads"]
        [[token, weight], *_] = head["attends"][row]["to"]
        assert head["name"] == "h0.head.0" and token == "<>"[row] and weight > 0.9
    checks = {check["name"]: check for check in r["checks"]}
    assert len(checks) == 8 and checks.pop("necessity")["loss"] > 0.5
    assert all(check["passed"] for check in checks.values())
    frozen = r["losses"]["circuit"]["search"]["binary"]
    assert checks["resampled ablation"]["loss"] > 1.5 * frozen > 0  # not the mean once more
    neuron = prune.node_number("h1.neuron.5", model.cfg)
    problem = prune.Problem(model, circuit.fill, "cue", FEW)
    seen, patterns = [], prune.patterns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prune, "patterns", lambda *a: (seen.append(len(a[3])), patterns(*a))[1])
        prune.check_attention(problem, circuit.cut, [(0, 0)])
    assert sum(seen) == 2 * len(problem.judged.last)  # every prompt, in both models
    assert not prune.check_resampled(problem, circuit.cut.without([neuron]),
                                     circuit.calibration, prune.text_windows(model, 64))["passed"]
    as_it_is, changed = prune.intervene(model, "cue", {neuron: 0.0}, FEW)[-2:]
    assert "100.0%" in as_it_is and f"{score['binary']:.4f}" in as_it_is and " 50.0%" in changed


NODE = r"\b(?:h\d+\.(?:attn_in|q|k|v|attn_out|mlp_in|neuron|mlp_out)|final)\.\d+"
NASTY = "</script><b>\"&' \\\ud800"


def nasty(x):
    """A record with a hostile end to every text that is no node's name."""
    if isinstance(x, str):
        return x if re.fullmatch(NODE, x) else x + NASTY
    if isinstance(x, dict):
        return {key: nasty(value) for key, value in x.items()}
    return list(map(nasty, x)) if isinstance(x, (list, tuple)) else x


def whole_record():
    """What the drawings are made from."""
    circuit = found_circuit()
    return dict(circuit.record, task=circuit.task, settings=dataclasses.asdict(circuit.settings),
                calibration=circuit.calibration._asdict())


def links_of(record):
    """{(from, to)} of all connections, tokens among them."""
    return {(e.get("from", e.get("token")), e.get("to", e.get("token")))
            for kind in ("edges", "residual", "embed", "unembed") for e in record[kind]}


def test_the_listing_has_every_node_and_edge_and_no_other():
    """Text: each node is a heading once, its edges with their weights are under it."""
    headings, found, record = [], set(), found_circuit().record
    for line in prune.listing(found_circuit()).splitlines():
        headings += re.findall(f"^{NODE}", line)
        if edge := re.match(rf"    <- ({NODE})  ([+-]\d\.\d+)", line):
            found.add((edge[1], headings[-1], float(edge[2])))
    assert sorted(headings) == sorted(NODES)
    assert found == {(e["from"], e["to"], round(e["weight"], 3)) for e in record["edges"]}
    assert set(re.findall(NODE, prune.explain(record["example"]))) == NODES


class Page(html.parser.HTMLParser):
    """The tags of a page, which have to balance, its texts and its attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        self.open += [tag] * (tag not in ("meta", "br"))

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)


@pytest.mark.parametrize("change", [dict, nasty])
def test_the_drawings_have_every_node_and_edge_and_nothing_from_outside(change):
    """HTML and DOT: well formed, self-contained; no text of a model or a task becomes markup."""
    record = change(whole_record())
    text, links = prune.page(record), {
        tuple(x if re.fullmatch(NODE, x) else html.unescape(prune.visible(x)) for x in link)
        for link in links_of(record)}
    found, (_, *lines, _) = Page(text), prune.dot(record).splitlines()
    assert found.tags == Page(prune.page(whole_record())).tags and text.encode("utf-8")
    assert not re.search(r"https?:|src=|@import|url\((?!#|data:)", text)
    assert not {"link", "img", "iframe", "object"} & set(found.tags)
    ids = [f"#{value}" for name, value in found.attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    assert {value for name, value in found.attributes if name == "href"} <= set(ids)
    assert {x for text in found.texts for x in re.findall(NODE, text)} == NODES
    assert links == {tuple(x.rsplit(" ", 1)[0].split(" → ")) for x in found.texts
                     if re.search(". → .", x)}
    boxes, arrows = {}, []
    for line in lines:
        if box := re.fullmatch(r'(n\d+) \[label="((?:[^"\\]|\\\\)*)"\]', line):
            boxes[box[1]] = html.unescape(box[2].replace(r"\\", "\\"))
        elif arrow := re.fullmatch(r"(n\d+) -> (n\d+) \[.*\]", line):
            arrows.append(arrow)
        else:
            assert re.fullmatch(r'}|subgraph "[^"]*" {label="[^"]*"', line)
    assert {(boxes[arrow[1]], boxes[arrow[2]]) for arrow in arrows} == links
    assert NODES <= set(boxes.values()) and len(arrows) == len(links)


# ---- circuits: files and command line -----------------------------------------------------------

def write_circuit():
    """The network and its circuit as files; the latter's content."""
    sg.save("model.npz", wired())
    prune.save("circuits/cue.json", found_circuit())
    return json.loads(Path("circuits/cue.json").read_text())


def run_prune(capsys, line):
    return run_main(capsys, *line.split(), main=prune.main)


def test_a_circuit_file_gives_back_the_circuit_and_its_losses(cues):
    """Cut, calibration, means and settings; every printed loss comes out again."""
    write_circuit()
    one = dataclasses.replace(found_circuit(), record=dict(found_circuit().record, doc=NASTY))
    prune.save("circuits/cue.json", one)
    two = prune.load("circuits/cue.json")
    model = prune.load_model("model.npz")
    assert (two.task, two.settings, two.calibration) == ("cue", one.settings, one.calibration)
    assert one.fill.dtype == two.fill.dtype and np.array_equal(one.fill, two.fill)
    assert named(two.cut, model) == named(one.cut, model)
    assert two.record == json.loads(json.dumps(one.record))
    assert prune.same_model(two, model, "cue.json") is None and prune.verify(two, model) == []


@pytest.mark.parametrize("change", ["weight", "edge", "loss", "mean"])
def test_a_circuit_that_is_not_the_models_is_seen(cues, change, capsys):
    """A weight changed in the model is another model; what is changed in the file differs."""
    content, model = write_circuit(), wired()
    if change == "weight":
        model.params["h0.attn.wo"][0, 1] *= 1.001
        sg.save("model.npz", model)
    elif change == "edge":
        del content["edges"][2]
    elif change == "mean":
        content["fill"] = [x + 0.1 for x in content["fill"]]
    else:
        content["losses"]["circuit"]["held"]["full"] += 0.01
    del content["sha256"]
    content["sha256"] = prune.digest(content)
    write({"circuits/cue.json": json.dumps(content).encode()})
    status, out, err = run_prune(capsys, "--check circuits/cue.json")
    if change == "weight":
        assert (status, out) == (2, "") and "another model" in err
    else:
        assert (status, err) == (1, "") and "circuit" in out and "the file says" in out


def check_refused(capsys, content):
    """Fails unless each command that reads a circuit refuses this one in a line."""
    write({"circuits/cue.json": content})
    for line in ("--check circuits/cue.json", "cue --explain"):
        status, out, err = run_prune(capsys, line + " --model model.npz")
        assert (status, out, err.count("\n")) == (2, "", 1) and "cue.json" in err


@pytest.mark.parametrize("content", [
    "", "5", "null", '"x"', "[]", "{}", "[" * 10**5, '{"format": 1}', "\xff", "PK\x03",
    json.dumps(dict(format=prune.FORMAT)), "circuit-0", 0.1, 0.6, 0.99])
def test_a_foreign_old_or_truncated_file_is_no_circuit(cues, content, capsys):
    """One line and status 2, from each command that reads one."""
    text = json.dumps(write_circuit())
    if isinstance(content, float):
        content = text[:int(content * len(text))]
    elif content == "circuit-0":
        content = text.replace(prune.FORMAT, content)
    check_refused(capsys, content.encode("latin-1"))


@given(data=st.data(),
       value=st.sampled_from(["gone", None, 5, -1, "x", [], {}, math.nan, 10**400]))
@settings(max_examples=60)
def test_a_damaged_circuit_file_is_refused(cues, capsys, data, value):
    """A key, an item or a value missing, other or of another type, anywhere: the checksum tells."""
    content = at = write_circuit()
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not at[key] or not isinstance(at[key], (dict, list)) or data.draw(st.booleans()):
            break
        at = at[key]
    assume(at[key] != value)
    at[key] = value
    if value == "gone":
        del at[key]
    check_refused(capsys, json.dumps(content).encode())


def test_a_circuit_under_another_tasks_name_is_not_its_circuit(cues, capsys):
    """Neither explained nor kept: a file that was copied or renamed."""
    write_circuit()
    Path("circuits/cue.json").rename("circuits/hopeless.json")
    status, out, err = run_prune(capsys, "hopeless --explain --model model.npz")
    assert (status, out) == (2, "") and "circuit of cue" in err


@pytest.fixture
def brief(cues, monkeypatch):
    """Searches as short as FEW, from the command line too."""
    real = prune.settings_of
    monkeypatch.setattr(prune, "TRIALS", prune.TRIALS[:1])
    monkeypatch.setattr(prune, "SWEEP", (0.3, 0.15))
    monkeypatch.setattr(prune, "AIMS", (0.1,))
    monkeypatch.setattr(prune, "settings_of", lambda args: dataclasses.replace(
        real(args), steps=60, search_pairs=16))
    sg.save("model.npz", wired())


@pytest.mark.parametrize("line, said", [
    ("ceu", "cue"), ("", "name a task"), ("cue --sede 3", "did you mean --seed"),
    ("cue --model none.npz", "none.npz"), ("cue --model text.txt", "text.txt"),
    ("cue --model cut.npz", "cut.npz"), ("cue --explain --out none", "none"),
    ("--check none.json", "none.json"), ("--check text.txt", "text.txt"),
    ("--check circuits/cue.json --model other.npz", "another model"),
    ("cue --explain --model other.npz", "another model"), ("cue --target 0", "--target"),
    ("cue --target nan", "--target"), ("cue --target 5", "--target"), ("cue --out c/a", "c/a"),
    ("cue --target x", "--target"), ("cue --budget -1", "--budget"), ("cue --seeds 0", "--seeds"),
    ("cue --budget nan", "--budget"), ("cue --seed -1", "--seed"),
    ("all --set final.1=0", "one task"), ("all --explain", "one task"), ("cue --model", "--model"),
    ("cue --set h1.neuron.5", "h1.neuron.5"), ("cue --set h1.neuron.99=1", "h1.neuron.99"),
    ("cue --set h1.neuron.5=x", "--set"), ("cue --set h1.neuron.5=nan", "nan"),
    ("cue --set h1.neuron.5=1e39", "1e9"), ("cue --sweep --explain", "--sweep"),
    ("cue --check x.json", "no task"),
    ("cue --ablate final.99", "final.99"), ("cue --set final.1=1 --explain", "not allowed with"),
    ("cue --ablation foo", "--ablation"), ("cue --out text.txt", "text.txt"),
    ("cue --out text.txt/x", "text.txt"), ("hopeless", "over the target"), ("endless", "context"),
    ("cue --ablation resample", "--compare"), ("cue --target 1e-4", "target"),
    ("--compare model.npz", "two models"),
    ("ceu --compare model.npz model.npz", "cue"),
    ("cue wide --explain", "one task"), ("all --compare model.npz model.npz", "cue"),
    ("all --ask <", "one task"), ("cue --ask < --ask " + 99 * "<", "context"),
    ("--compare model.npz none.npz", "none.npz"),
    ("--compare model.npz model.npz --target 0.4", "one of 0.3"),
    ("--compare model.npz model.npz --model model.npz", "no --model"),
    ("--compare model.npz model.npz --budget 9", "no --budget"),
    ("--compare model.npz model.npz --sweep", "no --sweep"),
    ("--check circuits/cue.json --target 0.2", "no --target"),
    ("cue --explain --seeds 3", "no --seeds"), ("cue --ask < --seed 3", "no --seed"),
    ("cue --set final.1=0 --out c", "no --out"), ("cue --ablate final.1 --untied", "no --untied")])
def test_a_mistake_in_pruning_is_one_line_and_status_two(brief, line, said, capsys):
    """No traceback, nothing written, nothing printed beside the line that says what is wrong."""
    write_circuit()
    sg.save("other.npz", wired(seed=1))
    write({"text.txt": b"x", "cut.npz": Path("model.npz").read_bytes()[:-99], "c/a": b""})
    before = files()
    has_model = "--model" in line or "--compare" in line
    status, out, err = run_prune(capsys, line + " --model model.npz" * (not has_model))
    assert (status, out, err.count("\n")) == (2, "", 1) and "Traceback" not in err and said in err
    assert files() == before


def test_the_whole_path_of_pruning_runs(brief, capsys):
    """Prune, check, explain, set, ablate."""
    status, out, err = run_prune(capsys, "cue --model model.npz")
    assert (status, err) == (0, "") and "h1.neuron.5" in out and "circuits/cue.json" in out
    assert {path.suffix for path in Path("circuits").iterdir()} == {".json", ".html", ".dot"}
    nodes, edges = named(prune.load("circuits/cue.json").cut, wired())
    assert (nodes, edges.keys()) == (NODES, EDGES)
    status, out, err = run_prune(capsys, "--check circuits/cue.json")
    assert (status, err) == (0, "") and out.count("\n") == 1
    status, out, err = run_prune(capsys, "cue --model model.npz --explain")
    assert (status, err) == (0, "") and set(re.findall(NODE, out)) == NODES
    mean = float(found_circuit().fill[prune.node_number("h1.neuron.5", wired().cfg)])
    outs = [run_prune(capsys, "cue --model model.npz " + change) for change in (
        f"--set h1.neuron.5={mean}", "--ablate h1.neuron.5", "--set final.1=2 --set final.3=1")]
    assert outs[0] == outs[1] != outs[2]
    for status, out, err in outs:
        assert (status, err) == (0, "") and "100.0%" in out and re.search("changed .* 50.0%", out)
    example = prune.load("circuits/cue.json").record["example"]
    status, out, err = run_prune(capsys, "cue --model model.npz" + "".join(
        " --ask " + "".join(prompt[1:]) for prompt in example["prompts"]))
    own = [float(x) for x in re.findall(r"circuit +(\S+)", out)]  # first over second; then reverse
    assert own == pytest.approx([example["margins"][0], -example["margins"][1]], abs=2e-3)
    assert (status, err) == (0, "") and "first answer 'x', second 'y'" in out


def test_all_tasks_are_pruned_and_finished_circuits_are_kept(brief, capsys):
    """A task that cannot be pruned ends nothing. A second run does only what is missing, damaged
    or asked for otherwise."""
    def run(more="--sweep"):
        status, out, err = run_prune(
            capsys, "all --model model.npz --seeds 1 --out circuits " + more)
        assert (status, err) == (0, "") and "11 nodes, 6 edges" in out
        assert all(re.search(f"{task} .*not pruned", out) for task in ("hopeless", "endless"))
        Page(Path("circuits/summary.html").read_text())
        return files(), "kept" in out
    assert run("") and "sweep" not in prune.load("circuits/cue.json").record
    first, kept = run()
    assert kept and len(prune.load("circuits/cue.json").record["sweep"]) == 2
    assert sorted(path.name for path in first if path.parent.name == "circuits") == [
        "cue.dot", "cue.html", "cue.json", "summary.html"]
    assert run() == (first, True)
    Path("circuits/cue.html").unlink()  # a run that was cut off before it drew
    assert run() == (first, True)
    write({"circuits/hopeless.json": Path("circuits/cue.json").read_bytes()})  # not its circuit
    assert run()[1]
    Path("circuits/hopeless.json").unlink()
    write({"circuits/cue.json": first[Path("circuits/cue.json")][:-99]})
    assert run() == (first, False)
    assert run("--target 0.1")[1] is False


def test_a_curve_reaches_its_targets_and_only_grows(brief):
    """What a point says is so, a lower target never takes fewer edges, and what the full model
    does not reach is not asked for."""
    model = wired()
    problem = prune.Problem(model, prune.Study(model).fill, "cue",
                            dataclasses.replace(FEW, steps=60))
    points = prune.curve(problem, prune.Progress("", quiet))
    assert [target for target, *_ in points] == [0.15, 0.3]
    for target, cut, size in points:
        assert problem.loss(cut) <= target and problem.size(cut) == size
    assert points[0][2][1] >= points[1][2][1] >= 6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prune, "SWEEP", (0.3, 0.99 * prune.full_loss(problem)))
        assert [target for target, *_ in prune.curve(problem, prune.Progress("", quiet))] == [0.3]


def test_the_masks_of_a_curve_are_trained_once_under_the_full_models_loss(brief, monkeypatch):
    """Else a target just above that loss is missed by masks that end a little over it."""
    model, aims, real = wired(), [], prune.learn_masks
    problem = prune.Problem(model, prune.Study(model).fill, "cue",
                            dataclasses.replace(FEW, steps=9))
    full = prune.full_loss(problem)

    def spy(*args):
        aims.append(args[-1])
        return real(*args)

    monkeypatch.setattr(prune, "learn_masks", spy)
    monkeypatch.setattr(prune, "AIMS", (1.05 * full, 0.9 * full, 0.8 * full))
    prune.curve(problem, prune.Progress("", quiet))
    assert aims == pytest.approx([1.025 * full, 0.81 * full])


def test_nothing_is_done_by_no_worker():
    """A second run with every item finished asks for none."""
    assert list(prune.on_cores(abs, [], 2)) == []


def test_models_are_compared_alike_and_finished_rows_are_kept(brief, capsys):
    """A model against itself is 1 to 1; a model whose loss differs is said to be no fair pair."""
    Path("copy.npz").write_bytes(Path("model.npz").read_bytes())
    line = "--compare model.npz copy.npz --out c"
    status, out, err = run_prune(capsys, line)
    assert (status, err) == (0, "") and "WARNING" not in out and out.count(" left\n") == 3
    ratios = re.findall(r"([\d.]+) +([\d.]+) +([\d.]+) \(x/ 1.00\)", out)
    assert len(ratios) == 5 and all(a == b and c == "1.00" for a, b, c in ratios)
    [row] = [json.loads(Path("c/compare.json").read_text())["rows"][i] for i in range(3)
             if json.loads(Path("c/compare.json").read_text())["rows"][i]["task"] == "cue"]
    assert row["cleaned"]["edges"] == 6 and f"{row['full']:.3f}" in out
    Page(Path("c/compare.html").read_text())
    status, again, err = run_prune(capsys, line)
    assert (status, err) == (0, "") and again == out[out.index("\n    model"):]
    other = wired()
    other.params["head.b"][:] += np.arange(len(other.params["head.b"])) % 7
    sg.save("other.npz", other)
    assert "no fair pair" in run_prune(capsys, "--compare model.npz other.npz --out c")[1]
    assert run_prune(capsys, line)[1] == again  # what other models have left in the file is no harm
    assert "hopeless" in again and "hopeless" not in run_prune(capsys, "cue " + line)[1]
    before = Path("c/compare.json").read_bytes()
    status, _, err = run_prune(capsys, line + " --target 0.3")
    assert status == 2 and "other settings" in err and Path("c/compare.json").read_bytes() == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prune, "TOO_LARGE", 1)
        row = prune.compare_one([prune.Study(wired())], dataclasses.replace(FEW, steps=60),
                                (0, "cue"))
        assert row["points"] and row["cleaned"] is None  # what is left as it is, is not cleaned


def test_circuits_for_resampled_values_are_found_by_resampled_values(brief, capsys):
    """Masks, losses and sizes are of the stronger ablation: what is said to reach the target does,
    with the deleted nodes at values of other text."""
    settings = dataclasses.replace(FEW, steps=60, ablation="resample")
    study = prune.Study(wired(), settings.ablation)
    problem = prune.Problem(study.model, study.fill, "cue", settings, text=study.text)
    keep = prune.random_like(np.arange(len(study.fill)) % 2 > 0, np.random.default_rng(0),
                             study.model.cfg)
    part, other = problem.on.parts[0], problem.on.fills[0]
    for place, x in other.items():
        [*_, C] = x.shape
        assert len(x) in (part.ids.size, len(part.last)) and C == len(study.fill[
            prune.node_slices(study.model.cfg)[place]])
    frozen = prune.Problem(study.model, study.fill, "cue", FEW)
    assert abs(problem.loss(prune.Cut(keep)) - frozen.loss(prune.Cut(keep))) > 1e-3
    every = prune.Cut(np.ones_like(keep))
    assert np.allclose(problem.on.logits(every), frozen.on.logits(every), atol=1e-4)
    for target, cut, _ in prune.curve(problem, prune.Progress("", quiet)):
        assert problem.loss(cut) <= target
    status, out, err = run_prune(capsys, "cue --compare model.npz model.npz --ablation resample "
                                         "--out r")
    assert (status, err) == (0, "")
    [row, *_] = json.loads(Path("r/compare.json").read_text())["rows"]
    assert row["points"] and row["cleaned"] is None and row["without"] is not None


def test_seeds_of_a_model_are_pooled_and_shown_apart():
    """Ratios are taken within a run of one model of each kind, and a task counts where all models
    of the run reach the target."""
    def model(name, kind, seed):
        return dict(name=name, model=name, kind=kind, seed=seed, d_model=8, density=1.0, afrac=1.0,
                    nonzero=9, kurtosis=3.0, loss=2.0, code=2.0)

    def row(name, task, edges):
        points = [] if edges is None else [dict(task=task, target=0.15, nodes=1, edges=edges)]
        return dict(model=name, task=task, full=0.1, points=points, by_attribution=[],
                    cleaned=None, without=0.5, random=0.25)
    kinds = prune.by_kind([model("s1", "sparse", 1), model("d0", "dense", 0),
                           model("s0", "sparse", 0), model("d1", "dense", 1)])
    assert [[m["name"] for m in kind] for kind in kinds] == [["s0", "s1"], ["d0", "d1"]]
    edges = dict(s0=(4, 2), s1=(1, None), d0=(8, 32), d1=(128, 7))
    rows = [row(name, task, n) for name, two in edges.items()
            for task, n in zip(("for_while", "var_if"), two)]
    text = prune.comparison(kinds[::-1], rows, 0.15)
    assert re.search(r"learned masks +3 +32.0 +2.0 +16.00 \(x/ 5.46\)  5.66 128.00\n", text)
    assert re.search(r"var_if +0.100/0.100 +32/7 +-/- +0.100/0.100 +2/- +-/-\n", text)
    assert re.search(r"\nB +4 +0.500 +0.250$", text) and "WARNING" not in text
    twice = prune.by_kind([model("s0", "sparse", 0), model("copy", "sparse", 0)])
    assert [len(kind) for kind in twice] == [1, 1]
    short, long = sg.Config(steps=10, seed=1, out="short.npz"), sg.Config()
    assert prune.kind_of(short) == prune.kind_of(long)  # equal loss may take fewer steps
    assert prune.kind_of(dataclasses.replace(short, lr=1.0)) != prune.kind_of(long)


def test_an_interrupted_search_is_status_130_and_the_next_one_runs(brief, capsys, monkeypatch):
    """Ctrl-C ends that run, writes nothing, and leaves nothing behind."""
    def interrupted(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(prune, "learn_masks", interrupted)
        status, _, err = run_prune(capsys, "cue --model model.npz")
    assert status == 130 and "Traceback" not in err and not list(Path("circuits").iterdir())
    assert run_prune(capsys, "cue --model model.npz --seeds 1")[0] == 0
