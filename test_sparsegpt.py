"""Properties of the code, each test named for the one it checks.

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
import itertools
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

import sparsegpt as sg  # before NumPy, whose BLAS then runs on one thread: see `sg.parallel`
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st

import prune
import tasks
from docs import compare, show

# Without Phase.explain: it traces every line, which takes minutes where an error is planted.
settings.register_profile("suite", deadline=None, max_examples=20, derandomize=True, database=None,
                          suppress_health_check=list(HealthCheck),
                          phases=[phase for phase in Phase if phase is not Phase.explain])
settings.load_profile("suite")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

SEEDS = st.integers(0, 2**32 - 1)
FLOATS = st.sampled_from([np.float32, np.float64])


# ---- backends -----------------------------------------------------------------------------------

def bare(x):
    """What Strict wraps, inside tuples and lists too. Refuses host arrays, as CuPy does."""
    if isinstance(x, np.ndarray):
        raise TypeError("a host array where a device array is needed")
    if isinstance(x, (tuple, list)):
        return type(x)(map(bare, x))
    return x.a if isinstance(x, Strict) else x

def device(fn):
    """A NumPy function or method on Strict arrays, with only the keywords of CuPy."""
    def call(*args, **kwargs):
        if extra := kwargs.keys() - {"axis", "dtype", "keepdims"}:
            raise TypeError(f"CuPy's {fn} takes no {extra}")
        out = fn(*map(bare, args), **kwargs)
        return Strict(np.asarray(out)) if isinstance(out, (np.ndarray, np.generic)) else out
    return call

class Strict:
    """An array that meets NumPy only through `get`, as one on a GPU; sums stay here too."""
    __array_ufunc__ = None  # np.exp(x) is refused, and host + x asks x.__radd__, which refuses too

    def __init__(self, a):
        self.a = a

    def __array__(self, *_, **__):
        raise TypeError("implicit conversion to a host array")

    def __getitem__(self, at):  # CuPy takes host arrays as indices
        at = tuple(getattr(i, "a", i) for i in (at if isinstance(at, tuple) else (at,)))
        return Strict(np.asarray(self.a[at]))

    def __setitem__(self, at, value):
        self.a[bare(at)] = bare(value)

    def get(self):
        return self.a.copy()

METHODS = """reshape transpose swapaxes astype copy view max min sum mean any all argmax __neg__
    __invert__ __abs__ __lt__ __le__ __gt__ __ge__ __eq__ __ne__ __len__ __float__ __int__ __bool__
    __index__""".split()
METHODS += [f"__{kind}{name}__" for kind in ("", "r", "i")
            for name in "add sub mul truediv mod matmul and or".split()]
for _name in METHODS:
    setattr(Strict, _name, device(getattr(np.ndarray, _name)))
for _name in "dtype shape ndim size itemsize T".split():
    setattr(Strict, _name, property(device(operator.attrgetter(_name))))

class StrictModule:
    """The array module of Strict: those of NumPy's functions that CuPy has too."""
    asarray = staticmethod(lambda x, *d: x if isinstance(x, Strict) else Strict(np.array(x, *d)))

    def __getattr__(self, name):
        if name not in """add arange ascontiguousarray concatenate copysign cumsum einsum empty exp
                full full_like log maximum ones ones_like partition sqrt tile where zeros
                zeros_like""".split():
            raise AttributeError(f"the stand-in has no {name}; add it if CuPy has it")
        return device(getattr(np, name))

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

@pytest.mark.parametrize("mix", [
    lambda s, h: s + h, lambda s, h: h + s, lambda s, h: h @ s, lambda s, h: np.exp(s),
    lambda s, h: np.asarray(s), lambda s, h: np.concatenate([s, s]),
    lambda s, h: operator.setitem(s, slice(0, 3), h), lambda s, h: operator.iadd(s, h),
    lambda s, h: operator.iadd(h, s), lambda s, h: sg.xp.add(s, h),
    lambda s, h: sg.xp.exp(s, out=h), lambda s, h: sg.xp.concatenate([s, h])])
def test_stand_in_refuses_what_cupy_refuses(mix, monkeypatch):
    monkeypatch.setattr(sg, "xp", StrictModule())
    with pytest.raises(TypeError):
        mix(dev(np.ones(3)), np.ones(3))

@pytest.mark.parametrize("wanted", ["gpu", "nonsense"])
def test_device_is_chosen_as_asked_or_refused(wanted, capsys, monkeypatch):
    if sg.use_device("auto").startswith("device: GPU") and wanted == "gpu":
        pytest.skip("there is a GPU")
    assert "NumPy" in sg.use_device("cpu") and sg.xp is np
    monkeypatch.setenv("SPARSEGPT_DEVICE", wanted)
    assert_refused(capsys, f"SPARSEGPT_DEVICE.*{wanted}", "--gradcheck")


# ---- helpers ------------------------------------------------------------------------------------

def quiet(*_):
    pass

def dev(x):
    """A copy of a host array on the backend."""
    return sg.xp.asarray(np.array(x))

def host(x):
    """A host copy of a backend's array."""
    return np.array(sg.to_host(x))

def on_device(params):
    return {name: dev(w) for name, w in params.items()}

def flat_of(params):
    """Host parameters as one flat array on the backend."""
    return dev(np.concatenate([w.reshape(-1) for w in params.values()]))

def same(one, two):
    """Whether two dicts of arrays are equal, bit for bit."""
    return one.keys() == two.keys() and all(
        host(w).tobytes() == host(two[name]).tobytes() for name, w in one.items())

def randoms(rng, *shape):
    return rng.standard_normal(shape)

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

def small_model(seed=0, **more):
    """An untrained Model of random weights."""
    cfg, tok = tiny(**more), tasks.Tokenizer.learn(["def f(x): return x\n" * 3], 270)
    params, text, _ = drawn(cfg, seed)
    return sg.Model(params, cfg, tok, text)

def logits_of(params, ids, cfg, hook=None, positions=None):
    return host(sg.forward(on_device(params), ids, cfg, hook, positions)[0])

def loss_of(params, ids, targets, cfg):
    """The mean loss by `forward` alone, and log-softmax written out once more."""
    z = logits_of(params, ids, cfg)
    z = z - z.max(-1, keepdims=True)
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return -np.take_along_axis(logp, targets[..., None], -1).mean()

def ctrl_c():
    signal.raise_signal(signal.SIGINT)

def run_main(capsys, *argv, main=sg.main):
    """(status, stdout, stderr) of the command line."""
    try:
        status = main(list(argv))
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()

def assert_refused(capsys, said, *argv, main=sg.main):
    """A mistake is one line on stderr that names what is wrong, and status 2: no traceback."""
    status, out, err = run_main(capsys, *argv, main=main)
    assert (status, err.count("\n")) == (2, 1) and "Traceback" not in err and re.search(said, err)
    return out

def write(contents):
    for path, content in contents.items():
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(content)

def files():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}

@pytest.fixture
def prose(clean):
    """A file of short functions to train on; its name."""
    rng = random.Random(0)
    Path("prose.txt").write_text("\n\n".join(
        f"def {rng.choice('abcd')}{i}(x):\n    return x + {rng.randrange(99)}"
        for i in range(300)))
    return "prose.txt"


# ---- gradients ----------------------------------------------------------------------------------

def slope(f):
    """df/dt at 0 by a 4-point stencil, from the largest step that crosses no kink; else None."""
    seen = []  # what AbsTopK and ReLU let through: it differs across a kink

    def watched(op):
        def call(*args):
            out, cache = op(*args)
            seen.append(None if cache is None else host(cache).tobytes())
            return out, cache
        return call

    def at(t):
        seen.clear()
        return f(t), seen[:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sg, "abstopk", watched(sg.abstopk))
        patch.setitem(sg.ACTIVATIONS, "relu", watched(sg.relu))
        centre = at(0.0)[1]
        for h in (1e-3, 1e-4, 1e-5):
            (a, b, c, d), masks = zip(*map(at, (h, -h, 2 * h, -2 * h)))
            if all(mask == centre for mask in masks):
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

def op_case(name, rng):
    """(op, inputs) of random shapes and options: op(*inputs) -> out, cache. Inputs that are left
    out are None."""
    B, T, H, D, N, C, V = map(int, rng.integers([1, 1, 1, 1, 1, 2, 2], [4, 10, 4, 5, 6, 9, 9]))
    ids, x, cube = dev(rng.integers(0, V, (B, T))), randoms(rng, N, C), randoms(rng, 2, N, C)
    k, left_out = int(rng.integers(1, C + 2)), rng.random(2) < 0.5
    rows = None if left_out[0] else dev(rng.permutation(N)[:rng.integers(1, N + 1)])
    targets, act = dev(rng.integers(0, C, N)), rng.choice(sorted(sg.ACTIVATIONS))
    op, inputs = {
        "embedding": (functools.partial(sg.embedding, ids),
                      [randoms(rng, V, C), randoms(rng, T + 2, C)]),
        "take_rows": (lambda x: sg.take_rows(x, rows), [x]),
        "rmsnorm": (sg.rmsnorm, [x / abs(x).max() * rng.choice([0.5, 1, 20])]),
        "linear": (sg.linear, [x, randoms(rng, C, V), randoms(rng, V)]),
        "abstopk": (lambda x: sg.abstopk(x, k), [x if left_out[0] else cube]),
        "activation": (lambda x: sg.ACTIVATIONS[act](x), [x * rng.choice([0.1, 1, 4])]),
        "attention": (lambda *three: sg.attention(*three, B, D),
                      [randoms(rng, B * T, 3 * H * D), randoms(rng, H), randoms(rng, H, T + 2)]),
        "cross_entropy": (lambda x: sg.cross_entropy(x, targets), [3 * x])}[name]
    optional = {"embedding": [1], "attention": [1, 2]}.get(name, [])
    for i, out in zip(optional, left_out):
        inputs[i] = None if out else inputs[i]
    return op, inputs

OPS = "embedding take_rows rmsnorm linear abstopk activation attention cross_entropy".split()

@given(seed=SEEDS)
def check_op(name, seed):
    """Fails unless an op's backward is its derivative, with a random cotangent."""
    rng = np.random.default_rng(seed)
    op, inputs = op_case(name, rng)

    def run(inputs):
        out, cache = op(*(x if x is None else dev(x) for x in inputs))
        return host(out), cache
    out, cache = run(inputs)
    dout = randoms(rng, *out.shape)
    grads = getattr(sg, f"{name}_backward")(dev(dout), cache)
    grads = grads if isinstance(grads, tuple) else (grads,)
    for i, (x, grad) in enumerate(zip(inputs, grads, strict=True)):
        if x is not None:
            way = randoms(rng, *x.shape)
            assert grad.shape == x.shape
            error = mismatch(
                lambda t: (run([*inputs[:i], x + t * way, *inputs[i + 1:]])[0] * dout).sum(),
                host(grad), way, abs(out * dout).sum())
            assume(error is not None)
            assert error < 1e-6

@given(data=st.data(), seed=SEEDS)
def check_model(data, seed, **fixed):
    """Fails unless every parameter's gradient is the derivative of the loss."""
    cfg = data.draw(configs(**fixed))
    params, ids, targets = drawn(cfg, seed, data.draw(st.integers(1, cfg.n_ctx)))
    loss, grads = sg.loss_and_grads(on_device(params), ids, targets, cfg)
    assert float(loss) == pytest.approx(loss_of(params, ids, targets, cfg), rel=1e-12)
    assert list(grads) == list(params) == list(sg.shapes(cfg))
    rng = np.random.default_rng(seed)
    for name, w in params.items():
        way = randoms(rng, *w.shape)
        assert grads[name].shape == w.shape
        error = mismatch(lambda t: loss_of({**params, name: w + t * way}, ids, targets, cfg),
                         host(grads[name]), way, float(loss))
        assume(error is not None)
        assert error < 1e-6, name

@pytest.mark.parametrize("name", OPS)
def test_backward_of_an_op_is_its_derivative(backend, name):
    check_op(name)

def test_gradient_of_every_parameter_is_the_derivative_of_the_loss(backend):
    check_model()

def overwrite_rows(ids, rows, V):
    """Wrong: rows that share an id overwrite each other in place of adding up."""
    out = np.zeros((V, rows.shape[1]))
    out[ids] = rows
    return out

# (op, function, i, change): what the function returns at i is changed; without i, what it is.
PLANTS = [(name, f"{name}_backward", 0, lambda g: 1.01 * g) for name in OPS if name != "take_rows"]
PLANTS += [
    ("linear", "linear_backward", 1, lambda dw: 1.01 * dw),
    ("linear", "linear_backward", 2, lambda db: 0 * db),
    ("attention", "attention_backward", 1, lambda dsink: -dsink),
    ("attention", "relative_bias_backward", 0, lambda dtable: np.roll(dtable, 1, axis=1)),
    ("rmsnorm", "rmsnorm_backward", None, lambda dout, cache: dout * cache[1]),
    ("abstopk", "abstopk_backward", None, lambda dout, mask: dout),
    ("embedding", "scatter_rows", None, overwrite_rows)]

@pytest.mark.parametrize("op, name, i, change", PLANTS)
def test_planted_error_is_caught_in_the_op_and_in_the_model(op, name, i, change, monkeypatch):
    real = getattr(sg, name)

    def planted(*args):
        out = real(*args)
        return (*out[:i], change(out[i]), *out[i + 1:]) if type(out) is tuple else change(out)
    monkeypatch.setattr(sg, name, change if i is None else planted)
    with pytest.raises(AssertionError):
        check_op(op)
    with pytest.raises(AssertionError):
        check_model(n_layer=1, sink=True, positions="relative", afrac=0.5, act="gelu")

def test_gradcheck_passes_and_can_fail(backend, monkeypatch):
    real = sg.rmsnorm_backward
    with np.errstate(invalid="ignore"):
        for factor, passes in (1, True), (1.01, False), (math.nan, False):
            monkeypatch.setattr(sg, "rmsnorm_backward", lambda *args: factor * real(*args))
            assert (sg.gradcheck(tiny(), quiet) <= 1e-6) == passes

def test_gradcheck_is_of_the_config_it_is_given(capsys, monkeypatch):
    real, seen = sg.loss_and_grads, []
    monkeypatch.setattr(sg, "loss_and_grads", lambda *a: (seen.append(a[3]), real(*a))[1])
    line = "--gradcheck --act relu --afrac 1/4 --positions learned --no-sink --no-bigram"
    status, out, _ = run_main(capsys, *line.split())
    assert status == 0 and "wpe" in out and not re.search("sink|relbias|bigram", out)
    assert {(cfg.act, cfg.afrac, cfg.positions, cfg.sink, cfg.bigram) for cfg in seen} == {
        ("relu", 0.25, "learned", False, False)}

def test_a_third_activation_is_one_line_of_one_table(prose, capsys, monkeypatch):
    """Config and --act take its name, it trains and is checked; a wrong derivative is caught."""
    monkeypatch.setitem(sg.ACTIVATIONS, "square", lambda x: (x * x, 2 * x))
    sg.train(tiny(act="square", steps=2), log=quiet)
    assert sg.load("model.npz").cfg.act == "square"
    assert run_main(capsys, "--gradcheck", "--act", "square")[0] == 0
    monkeypatch.setitem(sg.ACTIVATIONS, "square", lambda x: (x * x, x))
    assert run_main(capsys, "--gradcheck", "--act", "square")[0] == 1


# ---- the model ----------------------------------------------------------------------------------

@given(cfg=configs(batch_size=3), seed=SEEDS, data=st.data())
def test_a_logit_depends_on_its_own_row_up_to_its_token_alone(backend, cfg, seed, data):
    params, ids, _ = drawn(cfg, seed)
    at, other = data.draw(st.integers(0, cfg.n_ctx - 1)), ids.copy()
    other[0, at] = (other[0, at] + 1) % cfg.vocab_size
    one, two = logits_of(params, ids, cfg), logits_of(params, other, cfg)
    assert np.array_equal(one[0, :at], two[0, :at]) and np.array_equal(one[1:], two[1:])
    assert (one[0, at] != two[0, at]).any()
    for row, logits in zip(ids, one):
        alone = logits_of(params, row[None, :at + 1], cfg)[0]
        assert np.allclose(alone, logits[:at + 1], 1e-9, 1e-12)

@given(shape=st.tuples(*[st.integers(1, 3)] * 2, st.integers(1, 9)), dtype=FLOATS, seed=SEEDS,
       level=st.sampled_from([-1000, 0, 1000]), sink=st.sampled_from([-1000, 0, 1000, None]))
@settings(max_examples=60)
def test_softmax_equals_softmax_written_out(backend, shape, dtype, seed, level, sink):
    """Also where exp would overflow, or all of a row underflow, without a shift."""
    (B, H, T), rng = shape, np.random.default_rng(seed)
    logits = (level + 3 * randoms(rng, B, H, T, T)).astype(dtype)
    logits[..., np.triu(np.ones((T, T), bool), 1)] = -np.inf
    own = None if sink is None else (sink + randoms(rng, H)).astype(dtype)
    got = map(host, sg.softmax(dev(logits), None if own is None else dev(own)))
    own = np.broadcast_to(-np.inf if own is None else own[:, None, None], (B, H, T, 1))
    z = np.concatenate([logits, own], axis=3).astype(float)
    expected = np.exp(z - z.max(3, keepdims=True))
    expected /= expected.sum(3, keepdims=True)
    assert np.allclose(np.concatenate([*got], axis=3), expected, 1e-5, 1e-7)

@pytest.mark.parametrize("ids, positions", [
    ([[1, 2]], None), (np.array([[0.5, 1.0]]), None), (np.array([[True]]), None), (None, None),
    *((np.ones(shape, int), None) for shape in [(2,), (1, 1, 1), (1, 9), (0, 3), (1, 0)]),
    (np.array([[280]]), None), (np.array([[-1]]), None),
    (np.zeros((2, 8), int), [0, -1]), (np.zeros((2, 8), int), [8, 0])])
def test_wrong_ids_and_positions_raise_value_error(ids, positions):
    """As inputs and as targets: of a wrong type, shape or range."""
    params, cfg = sg.init_params(tiny()), tiny()
    with pytest.raises(ValueError, match="ids must be|positions must be"):
        sg.forward(params, ids, cfg, positions=positions)
    good = np.zeros(np.shape(ids) or (1, 2), int)
    if positions is None:
        for two in ((ids, good), (good, ids), (np.zeros((5, 5), int), np.zeros((5, 4), int))):
            with pytest.raises(ValueError, match="ids must be"):
                sg.loss_and_grads(params, *two, cfg)

class Push:
    """A hook that does AbsTopK, adds `amount` at one site and notes what passes."""

    def __init__(self, at=None, amount=None):
        self.at, self.amount, self.seen, self.back, self.k, self.masks = at, amount, {}, {}, {}, {}

    def forward(self, site, x, k):
        x, self.masks[site] = sg.abstopk(x, k)
        if site == self.at:
            x = x + dev(self.amount).reshape(x.shape)
        self.seen[site], self.k[site] = host(x), k
        return x

    def backward(self, site, dx):
        self.back[site] = host(dx)
        return sg.abstopk_backward(dx, self.masks[site])

def hooked_grads(params, ids, cfg, cotangent, hook=None, positions=None, weights=True):
    """Logits and the gradients of sum(cotangent * logits)."""
    logits, cache = sg.forward(on_device(params), ids, cfg, hook, positions)
    return host(logits), sg.backward(dev(cotangent), cache, cfg, weights)

@given(cfg=configs(), seed=SEEDS, data=st.data())
def test_a_hook_gets_every_site_and_its_gradient_and_may_change_nothing(backend, cfg, seed, data):
    """One that does AbsTopK: bit for bit the same model. k is that of the site; dx is the
    derivative by what a hook adds there, also where the weights' gradients are not wanted."""
    params, ids, _ = drawn(cfg, seed)
    rng, hook, quick = np.random.default_rng(seed), Push(), Push()
    cotangent = randoms(rng, *ids.shape, cfg.vocab_size)
    logits, grads = hooked_grads(params, ids, cfg, cotangent, hook)
    plain_logits, plain_grads = hooked_grads(params, ids, cfg, cotangent)
    assert np.array_equal(logits, plain_logits) and same(grads, plain_grads)
    assert hooked_grads(params, ids, cfg, cotangent, quick, weights=False)[1] == {}
    sites = "attn_in q k v attn_out mlp_in neuron mlp_out".split()
    assert list(hook.seen) == [f"h{i}.{s}" for i in range(cfg.n_layer) for s in sites] + ["final"]
    assert hook.back.keys() == hook.seen.keys() and same(hook.back, quick.back)
    for site, k in hook.k.items():
        width = cfg.d_model * (4 if "neuron" in site else 1)
        assert k == (width if site == "final" else max(1, int(cfg.afrac * width)))
    site = data.draw(st.sampled_from([f"h{cfg.n_layer - 1}.{s}" for s in sites] + ["final"]))
    way = randoms(rng, *hook.back[site].shape)
    error = mismatch(
        lambda t: (logits_of(params, ids, cfg, Push(site, t * way)) * cotangent).sum(),
        hook.back[site], way, abs(logits * cotangent).sum())
    assume(error is not None)
    assert error < 1e-6

@given(cfg=configs(), seed=SEEDS)
def test_logits_and_gradients_at_positions_are_those_of_the_whole(backend, cfg, seed):
    params, ids, _ = drawn(cfg, seed)
    rng, rows = np.random.default_rng(seed), np.arange(len(ids))
    at = rng.integers(0, ids.shape[1], len(ids))
    some, every = randoms(rng, len(ids), cfg.vocab_size), np.zeros((*ids.shape, cfg.vocab_size))
    every[rows, at] = some
    few, full = Push(), Push()
    logits, grads = hooked_grads(params, ids, cfg, some, few, at)
    full_logits, full_grads = hooked_grads(params, ids, cfg, every, full)
    assert np.allclose(logits, full_logits[rows, at], 1e-12, 1e-13)
    assert all(np.allclose(host(grads[name]), host(g), 1e-9, 1e-12)
               for name, g in full_grads.items())
    assert same(hooked_grads(params, ids, cfg, some, None, at)[1], grads)
    for site, dx in full.back.items():  # the same, on all rows or on those asked for
        if len(few.back[site]) < len(dx):
            dx = dx.reshape(*ids.shape, -1)[rows, at]
        assert np.allclose(few.back[site], dx, 1e-9, 1e-12), site


# ---- top-k and GELU -----------------------------------------------------------------------------

KINDS = st.sampled_from(["drawn", "rising", "falling", "few values", "equal"])

def signed(kind, shape, dtype, seed):
    """Numbers of both signs; few values: full of ties, zeros and negative zeros."""
    rng = np.random.default_rng(seed)
    x = abs(randoms(rng, *shape))
    x = {"drawn": x, "rising": np.sort(x), "falling": np.sort(x)[..., ::-1],
         "few values": np.floor(2 * x), "equal": np.full(shape, 3.0)}[kind]
    return (x * rng.choice([-1, 1], shape)).astype(dtype)

def first_largest(row, k):
    """The indices of the k largest |x|, the first of equals: a stable sort."""
    return sorted(range(len(row)), key=lambda i: -abs(row[i]))[:k]

@given(shape=st.sampled_from([(1,), (9,), (5, 9), (2, 3, 9), (3, 1536)]), share=st.floats(0, 1),
       kind=KINDS, dtype=FLOATS, seed=SEEDS)
@settings(max_examples=60)
def test_abstopk_keeps_exactly_k_the_first_of_equals(backend, shape, share, kind, dtype, seed):
    """Ties let no more through, zeros count as values, and k >= width is the identity."""
    x, k = signed(kind, shape, dtype, seed), 1 + int(share * shape[-1])
    given_x = dev(x)
    out, mask = sg.abstopk(given_x, k)
    assert np.array_equal(host(given_x), x)
    if k >= shape[-1]:
        assert out is given_x and mask is None
        return
    expected = np.zeros(shape, bool)
    for at in np.ndindex(shape[:-1]):
        expected[at][first_largest(x[at], k)] = True
    assert np.array_equal(host(mask), expected)
    assert np.array_equal(host(sg.topk_mask(abs(given_x), k)), expected)
    assert np.array_equal(host(out), np.where(expected, x, 0))

@given(shape=st.tuples(*[st.integers(2, 9)] * 2), kind=KINDS, dtype=FLOATS, seed=SEEDS,
       axis=st.sampled_from([0, 1]), data=st.data())
@settings(max_examples=40)
def test_keep_largest_keeps_exactly_k_and_j_for_each_neuron(
        backend, shape, kind, dtype, seed, axis, data):
    """Each neuron's j largest, then the largest of the rest, the first of equals."""
    w, first, mask = signed(kind, shape, dtype, seed), np.zeros(shape, bool), np.zeros(shape, bool)
    j = data.draw(st.integers(0, shape[1 - axis]))
    k = data.draw(st.integers(max(1, j * shape[axis]), w.size))
    for neuron, chosen in zip(np.moveaxis(w, axis, 0), np.moveaxis(first, axis, 0)):
        chosen[first_largest(neuron, j)] = True
    order = sorted(np.ndindex(shape), key=lambda at: (not first[at], -abs(w[at])))
    mask[tuple(zip(*order[:k]))] = True
    cut = dev(w)
    sg.keep_largest(cut, k, j, axis)
    assert np.array_equal(host(cut), np.where(mask, w, 0))

def exact_gelu(x):
    """(GELU, its derivative) by math.erf."""
    phi = [0.5 * math.erfc(-v / math.sqrt(2)) for v in x]
    slope = [p + v * math.exp(-v * v / 2) / math.sqrt(2 * math.pi) for p, v in zip(phi, x)]
    return x * np.array(phi), np.array(slope)

@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-6), (np.float64, 1e-12)])
def test_gelu_is_the_exact_one(backend, dtype, tolerance):
    """Not the tanh approximation; nor is its normal distribution, which NumPy lacks."""
    x = np.concatenate([np.linspace(-10, 10, 20001), [0.0, -0.0, 1e-30, -1e-30, 30, -30]])
    x = x.astype(dtype)
    for got, exact in zip(map(host, sg.gelu(dev(x))), exact_gelu(x.astype(np.float64))):
        assert got.dtype == dtype and abs(got - exact).max() < tolerance
    cdf = host(sg.normal_cdf(dev(x), dev(np.exp(-x * x / 2))))
    assert abs(cdf - [0.5 * math.erfc(-v / math.sqrt(2)) for v in x]).max() < tolerance / 4


# ---- schedules, optimizer, sparsity -------------------------------------------------------------

@given(steps=st.integers(1, 400), ends=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
       target=st.floats(1e-3, 1), warmup=st.floats(0, 1), sharkfin=st.booleans())
@example(steps=10, ends=[0.5, 0.5], target=0.1, warmup=0.5, sharkfin=True)
@example(steps=10, ends=[1.0, 1.0], target=0.1, warmup=0.0, sharkfin=True)
def test_density_and_learning_rate_follow_their_schedules(steps, ends, target, warmup, sharkfin):
    """Density: 1, a straight line, its target to the last bit. Learning rate: linear warm-up times
    linear decay, and a fin that ends at 1."""
    cfg = tiny(steps=steps, anneal_start=ends[0], anneal_end=ends[1], warmup=warmup, lr=0.5,
               density=target, sharkfin=sharkfin)
    start, end = ends[0] * steps, min(ends[1] * steps, steps - 1)  # the last step is at the target
    seen = np.array([sg.density_at(target, step, cfg) for step in range(steps + 1)])
    for step, density in enumerate(seen[:-1]):
        part = 1.0 if step >= end else 0.0 if step <= start else (step - start) / (end - start)
        assert density == pytest.approx(1 - (1 - target) * part, abs=1e-12)
        rising = min(1, (step + 1) / (warmup * steps)) if warmup * steps > 1 else 1
        fin = (target / density)**0.5 if sharkfin else 1
        rate = 0.5 * rising * (1 - step / steps) * fin
        assert sg.learning_rate(step, cfg) == pytest.approx(rate)
    assert (np.diff(seen) <= 0).all() and seen[-1] == seen[-2] == target and fin <= 1 + 1e-12

def steps_of(cfg, flat, ids, targets):
    """Train on one batch: (step, params, loss) after each step of the program's own loop."""
    m, v = sg.xp.zeros_like(flat), sg.xp.zeros_like(flat)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sg, "draw_batch", lambda *_: (ids, targets))
        for step, loss in sg.training_steps(flat, m, v, 0, {}, cfg):
            yield step, sg.views(flat, cfg), float(loss)

@pytest.mark.parametrize("sparse_bias", [False, True])
@pytest.mark.parametrize("density, j", [(1e-6, 0), (0.004, 0), (0.1, 2), (1e-6, 16)])
def test_nonzeros_of_a_training_run_follow_the_schedule(backend, sparse_bias, density, j):
    """At every step exactly the scheduled number in each matrix, at least 1 and at least j for
    each neuron; what is dense stays dense."""
    cfg = tiny(sparse_bias=sparse_bias, min_per_neuron=j, density=density, steps=10)
    params, ids, targets = drawn(cfg, 3)
    for step, params, _ in steps_of(cfg, flat_of(params), ids, targets):
        for name, w in params.items():
            w, wide = host(w), name in ("wte", "wpe", "head.w")
            axis = {"wqkv": 1, "wfc": 1, "wo": 0, "wproj": 0}.get(name.split(".")[-1])
            density = sg.density_at(min(1, 4 * cfg.density) if wide else cfg.density, step, cfg)
            k = max(1, round(density * w.size), 0 if axis is None else j * w.shape[axis])
            if sg.is_matrix(name):
                assert np.count_nonzero(w) == min(k, w.size), name
                assert wide or (np.count_nonzero(w, axis=1 - axis) >= j).all()
            elif sparse_bias and ".b" in name:
                assert np.count_nonzero(w) <= k
            else:
                assert np.count_nonzero(w) > 0.8 * w.size or name == "bigram"

@given(n=st.sampled_from([1, 50, 300_000]), seed=SEEDS, eps=st.sampled_from([1e-8, 0.1]),
       kind=st.sampled_from(["divide", "clip", "none"]), size=st.sampled_from([0, 0.01, 1, 30]),
       betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)))
@settings(max_examples=12)
def test_adam_equals_adam_written_out(backend, n, seed, eps, kind, size, betas):
    """Three steps, each scaling of the gradient, in several chunks; a zero gradient too."""
    cfg = tiny(grad_scale=kind, eps=eps, beta1=betas[0], beta2=betas[1])
    rng = np.random.default_rng(seed)
    x, m, v = rng.standard_normal(n), np.zeros(n), np.zeros(n)
    on_dev = dev(x), dev(m), dev(v)
    for step in range(3):
        g = size * rng.standard_normal(n)
        scale = sg.gradient_scale(dev(g), cfg)
        sg.in_chunks(lambda w, m, v, g: sg.adam(w, g * scale, m, v, step, cfg), *on_dev, dev(g))
        rms = max(math.sqrt((g**2).mean()), 1e-20)
        g = g / {"divide": rms, "clip": max(rms, 1), "none": 1}[kind]
        m, v = cfg.beta1 * m + (1 - cfg.beta1) * g, cfg.beta2 * v + (1 - cfg.beta2) * g**2
        unbiased = m / (1 - cfg.beta1**(step + 1)), v / (1 - cfg.beta2**(step + 1))
        x = x - sg.learning_rate(step, cfg) * unbiased[0] / (np.sqrt(unbiased[1]) + eps)
        assert all(np.allclose(host(a), b, 1e-10, 1e-12) for a, b in zip(on_dev, (x, m, v)))

def test_weight_decay_shrinks_the_matrices_only(backend, monkeypatch):
    """By 1 - lr x decay; where there is no gradient, all else is untouched, bit for bit."""
    cfg = tiny(density=1.0, weight_decay=0.5, lr=0.1, steps=3)
    expected, *batch = drawn(cfg, 1)
    flat = flat_of(expected)
    monkeypatch.setattr(sg, "batch_gradient", lambda *_: (0.0, sg.xp.zeros_like(flat)))
    for step, params, _ in steps_of(cfg, flat, *batch):
        for name, w in expected.items():
            if name in ("wte", "wpe", "head.w") or name.split(".")[-1].startswith("w"):
                w *= 1 - sg.learning_rate(step, cfg) * 0.5
        assert same(params, expected)

GOLDEN = {  # by activation, and whether AbsTopK's share falls to 1/2 or is 1/2 from the start
    ("gelu", False):
        [5.7636769401, 5.369176888, 5.1431349559, 4.9293401127, 4.7700519769, 4.6539909466],
    ("gelu", True):
        [5.8020503298, 5.367782972, 5.1312365761, 5.0361166994, 4.8420947059, 4.7181575354],
    ("relu", False):
        [5.6593758073, 5.3326521743, 5.1060291547, 4.8762683971, 4.7152827943, 4.5274287623]}

@pytest.mark.parametrize("act, falls", GOLDEN)
def test_golden_loss_trace(backend, act, falls, monkeypatch):
    """Any change of the arithmetic of model, optimizer or sparsity shows in these numbers: six
    steps on a fixed batch that no random generator and no text has a part in."""
    cfg = tiny(act=act, positions={"gelu": "learned", "relu": "relative"}[act], steps=6, lr=0.02,
               anneal_start=0.0, anneal_end=0.6, sparse_bias=True)
    if not falls:
        monkeypatch.setattr(sg, "annealed_config", lambda step, cfg: cfg)
    ids = np.arange(cfg.batch_size * (cfg.n_ctx + 1)).reshape(cfg.batch_size, -1)**2 * 7 % 61
    wave = np.sin(np.arange(sg.n_params(cfg)) * 1.7) * 0.1
    losses = [loss for *_, loss in steps_of(cfg, dev(wave), ids[:, :-1], ids[:, 1:])]
    assert losses == pytest.approx(GOLDEN[act, falls], rel=1e-9)

@pytest.mark.parametrize("density", [1.0, 0.1])
def test_one_batch_is_overfitted(density):
    cfg = tiny(density=density, steps=120, lr=0.05, bigram=False, d_model=32, dtype="float32",
               positions="learned", anneal_end=0.3, weight_decay=0.0)
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (cfg.batch_size, cfg.n_ctx + 1))
    losses = [loss for *_, loss in steps_of(cfg, sg.init_flat(cfg), ids[:, :-1], ids[:, 1:])]
    assert losses[0] == pytest.approx(math.log(cfg.vocab_size), rel=0.02)
    assert losses[-1] < 0.1


# ---- tokenizer and tasks ------------------------------------------------------------------------

CODE = st.text(st.sampled_from("aab \n_1(=\"'é"), max_size=40)
TEXTS = CODE | st.text(st.characters(exclude_categories=()), max_size=60)  # surrogates too

@functools.cache
def python_tokenizer():
    """512 tokens from a part of the standard library."""
    return tasks.Tokenizer.learn(tasks.read_documents("stdlib", 0.3, quiet), 512)

def slow_bpe(texts, vocab_size):
    """Byte-pair encoding as in a textbook: recount everything, replace everywhere."""
    words = [list(piece.encode("utf-8", "surrogatepass")) for t in texts
             for piece in tasks.PIECES.findall(t)]
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

@given(texts=st.lists(TEXTS, max_size=6), size=st.integers(257, 300))
@settings(max_examples=100)
def test_tokens_are_those_of_textbook_bpe_and_give_any_string_back(texts, size):
    learned = tasks.Tokenizer.learn(texts, size)
    merges, expected = slow_bpe(texts, size)
    assert learned.merges == merges
    assert [i for text in texts for i in learned.encode(text)] == expected
    for text, tok in itertools.product(texts, (learned, python_tokenizer())):
        ids = tok.encode(text)
        assert tok.decode(ids) == text and tok.encode(text) == ids
        assert all(0 <= i < 257 + len(tok.merges) and i != tok.EOT for i in ids)

def test_examples_in_docstrings_are_true():
    failed, tried = map(sum, zip(*map(doctest.testmod, (tasks, sg, prune))))
    assert tried and not failed

NAMES = """single_double_quote bracket_counting bracket_brace set_or_string
    set_or_string_fixedvarname class_init var_swap with_as with_open for_while else_elif if_equals
    var_if if_ternary lambda_func enumerate_range fstring_brace final_kwarg indent_for
    while_return_true""".split()  # the twenty of the paper's Table 1

@pytest.mark.parametrize("split", tasks.SPLITS)
@pytest.mark.parametrize("task", NAMES)
def test_pairs_are_different_repeatable_and_fair(task, split):
    """Each pair fits the default context, and its answers keep the prompts' own tokens."""
    found, tok = tasks.pairs(task, 40, 7, split), python_tokenizer()
    assert len(set(found)) == len({pair.prompts for pair in found}) == 40
    assert tasks.pairs(task, 40, 7, split) == found
    assert tasks.pairs(task, 15, 7, split) == found[:15] != tasks.pairs(task, 15, 8, split)
    with pytest.raises(ValueError, match="1, not 0"):
        tasks.pairs(task, 0, 7, split)
    rows = zip(*sg.task_prompts(tok, found, sg.Config.n_ctx))
    for prompts, answers in found:
        assert prompts[0] != prompts[1] and answers[0] != answers[1]
        for prompt, answer, other, side in zip(prompts, answers, answers[::-1], (1, -1)):
            ids, last, right, wrong, sign = next(rows)
            own, full, unlike = ([tok.EOT, *tok.encode(prompt + x)] for x in ("", answer, other))
            assert prompt == prompt.rstrip() and full[:len(own)] == own and sign == side
            assert [*ids[:last + 1], right] == full[:last + 2] and last + 1 >= len(own)
            assert wrong == unlike[last + 1] != right

def test_splits_share_no_names_or_words():
    """No test can be answered from memory: every pool of words is dealt out without overlap."""
    assert list(tasks.TASKS) == NAMES
    for seed in range(20):
        pools = [tasks.Writer(random.Random(seed), split) for split in tasks.SPLITS]
        for field in ("words", "verbs", "scope"):
            words = [word for w in pools for word in set(getattr(w, field))]
            assert len(words) == len(set(words)), field
    names = [[name for group in tasks.NAME_GROUPS[s] for name in group] for s in tasks.SPLITS]
    assert len({n for ns in names for n in ns}) == sum(map(len, names)) > 100

def test_idioms_are_valid_python_and_repeatable():
    texts = [tasks.idiom(random.Random(seed)) for seed in range(300)]
    for text in texts:
        ast.parse(text)
    assert texts == [tasks.idiom(random.Random(seed)) for seed in range(300)]
    assert len(set(texts)) > 290
    assert tasks.idiom_documents(5000) == tasks.idiom_documents(5000)

@pytest.mark.parametrize("prompt, right, wrong, said", [
    ("aaa", "a", ";", "changes"), ("aaa", ";", "a", "changes"), ("x", ";", ";", "decides"),
    ("x", "=", "", "decides")])
def test_answers_that_merge_or_do_not_decide_are_refused(prompt, right, wrong, said):
    tok = tasks.Tokenizer.learn(["aaaa aaaa x= x="], 262)
    with pytest.raises(ValueError, match=said):
        tasks.deciding_tokens(tok, prompt, right, wrong)

@given(seed=SEEDS, n=st.integers(1, 40), size=st.sampled_from([1, 50, 2000]))
def test_score_equals_the_losses_written_out(seed, n, size):
    """Prompt by prompt, without overflow. Prompts come in parts, padded no more than needed."""
    rng = np.random.default_rng(seed)
    logits, last = size * rng.standard_normal((n, 9)), rng.integers(0, 9, n)
    right, wrong = np.array([rng.permutation(9)[:2] for _ in range(n)]).T
    prompts = sg.Prompts(rng.integers(0, 9, (n, 9)), last, right, wrong, np.ones(n))
    binary = full = hits = 0
    for z, r, w in zip(logits, right, wrong):
        binary += max(0, z[w] - z[r]) + math.log1p(math.exp(-abs(z[w] - z[r])))
        full += math.log(sum(math.exp(v - max(z)) for v in z)) + max(z) - z[r]
        hits += z[r] > z[w]
    expected = binary / n, full / n, hits / n
    assert sg.score(logits.copy(), prompts) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert sorted(i for index, _ in prompts.parts() for i in index) == list(range(n))
    for index, part in prompts.parts():
        assert np.array_equal(part.ids, prompts.ids[index, :last[index].max() + 1])


# ---- training -----------------------------------------------------------------------------------

def at_step(step, act):
    """A log that calls `act` when training reports a step."""
    return lambda line: act() if re.match(rf" *{step}( +\S+){{6}}$", line) else None

@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("stops", [(1,), (5, 8), (11,)])
def test_a_resumed_run_equals_an_uninterrupted_one(prose, backend, dtype, stops):
    whole = sg.train(tiny(dtype=dtype, out="whole.npz"), log=quiet)
    cfg, handler = tiny(dtype=dtype, out="cut.npz"), signal.getsignal(signal.SIGINT)
    for i, stop in enumerate(stops):
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            sg.train(cfg, i > 0, at_step(stop, ctrl_c))
        assert signal.getsignal(signal.SIGINT) is handler
        assert sg.partial_path(cfg.out).exists() and not Path(cfg.out).exists()
    assert same(sg.train(cfg, True, quiet).params, whole.params)
    assert same(sg.load("cut.npz").params, whole.params)
    assert not sg.partial_path(cfg.out).exists()

def test_a_crashed_run_goes_on_from_its_automatic_save(prose, monkeypatch):
    whole, cfg = sg.train(tiny(out="whole.npz"), log=quiet), tiny(out="cut.npz")
    clock = iter(range(0, 10**6, 50))  # each look at the clock is 50 seconds later
    monkeypatch.setattr(sg, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    with pytest.raises(ZeroDivisionError):
        sg.train(cfg, log=at_step(7, lambda: 1 / 0))
    assert same(sg.train(cfg, True, quiet).params, whole.params)

def test_a_run_to_resume_must_fit(prose):
    cfg = tiny()
    with pytest.raises(KeyboardInterrupt):
        sg.train(cfg, log=at_step(3, ctrl_c))
    before = files()
    for n_layer in (1, 3):
        with pytest.raises(sg.UserError, match="another config"):
            sg.train(dataclasses.replace(cfg, n_layer=n_layer), True, quiet)
    Path(prose).write_text(before[Path(prose)].decode().replace("return", "yield"))
    with pytest.raises(sg.UserError, match="other data"):
        sg.train(cfg, True, quiet)
    assert files() | {Path(prose): before[Path(prose)]} == before

WIDE = dict(batch_size=48, n_ctx=64, steps=3)  # enough tokens for several shards

def test_config_and_data_alone_decide_a_run(prose):
    """Not threads: the parameters are the same bit for bit, and equal runs write equal files. The
    text of a model is windows of what it was trained on."""
    cfg, runs = tiny(**WIDE, dtype="float32", idioms=0.5, max_mb=0.02), []
    for threads in (1, 1, 2, 4, 0):
        model = sg.train(dataclasses.replace(cfg, threads=threads), log=quiet)
        runs.append((model.params, Path("model.npz").read_bytes()))
    assert runs[0][1] == runs[1][1] and all(same(runs[0][0], run[0]) for run in runs)
    streams = sg.load_corpus(cfg, quiet).train.values()
    assert model.text.shape == (64, 64) and all(stream[0] == model.tok.EOT for stream in streams)
    for row in model.text.astype(np.uint16):
        assert any(row.tobytes() in stream.tobytes() for stream in streams)

@pytest.mark.parametrize("rows", [49, 2])
def test_gradients_do_not_depend_on_threads_and_hardly_on_shards(rows):
    cfg = tiny(**{**WIDE, "batch_size": 49})
    params, ids, targets = drawn(cfg, 2)
    ids, targets = ids[:rows], targets[:rows]  # in the end fewer than there are shards
    assert sg.n_shards(cfg) > 2
    runs = [sg.batch_gradient(params, ids, targets, dataclasses.replace(cfg, threads=threads))
            for threads in (1, 2, 3)]
    assert all(run[0] == runs[0][0] and np.array_equal(run[1], runs[0][1]) for run in runs)
    loss, grads = sg.loss_and_grads(params, ids, targets, cfg)
    assert runs[0][0] == pytest.approx(loss, rel=1e-12)
    assert np.allclose(runs[0][1], flat_of(grads), 1e-9, 1e-12)

@pytest.mark.parametrize("threads", [1, 2])
def test_parallel_keeps_the_order_and_hides_no_error(threads):
    assert sg.parallel(lambda x: x * x, range(5), threads) == [0, 1, 4, 9, 16]
    with pytest.raises(ZeroDivisionError):
        sg.parallel(lambda x: 1 / x, [1, 0], threads)

@pytest.mark.parametrize("plant, step, said", [
    ("loss", 4, "step 4"), ("loss", 12, "step 12"), ("weight", 4, "step 5"),
    ("weight", 12, "a weight is no longer finite"), ("lr", 60, r"step \d")])
def test_a_diverging_run_leaves_the_former_checkpoint(prose, step, plant, said, capsys,
                                                      monkeypatch):
    write({"model.npz": checkpoint_bytes()})
    before, real, count = files(), sg.batch_gradient, iter(range(1, 99))

    def planted(*args):
        loss, grad = real(*args)
        if next(count) == step:
            grad[0] = np.nan
        return loss * (np.nan if plant == "loss" and np.isnan(grad[0]) else 1), grad
    monkeypatch.setattr(sg, "batch_gradient", planted)
    more = "--steps 60 --lr 1000 --dtype float32".split() if plant == "lr" else ["--steps", "12"]
    with np.errstate(all="ignore"):
        assert_refused(capsys, said, *flags(), *more)
    assert files() == before

@given(seed=st.integers(0, 99), prompt=st.text(max_size=12))
@settings(max_examples=8)
def test_samples_are_repeatable_and_greedy_at_temperature_zero(backend, seed, prompt):
    model = small_model()
    model = model._replace(params=on_device(model.params))
    texts = [sg.sample(model, prompt, 9, seed=s) for s in (seed, seed, seed + 1)]
    assert texts[0] == texts[1] != texts[2]
    assert sg.sample(model, prompt, 0) == prompt
    ids, known = [model.tok.EOT, *model.tok.encode(prompt)], 257 + len(model.tok.merges)
    for _ in range(9):
        logits = host(sg.forward(model.params, np.array([ids[-8:]]), model.cfg)[0])
        ids.append(int(logits[0, -1, :known].argmax()))
        if ids[-1] == model.tok.EOT:
            break
    assert sg.sample(model, prompt, 9, 0, seed=seed) == model.tok.decode(ids)

def test_batches_and_the_validation_loss_are_of_the_mixture(backend):
    model, window = small_model(n_ctx=128, idioms=0.25), np.arange(129)
    on_dev = model._replace(params=on_device(model.params))
    streams = dict(code=np.arange(140, 280, dtype=np.uint16), idioms=window.astype(np.uint16))
    ids, targets = sg.draw_batch(streams, np.random.default_rng(0), 40, 128, 0.25)
    assert np.array_equal(targets, ids + 1) and np.count_nonzero(ids[:, 0] == 0) == 10
    loss, by_stream = sg.evaluate(on_dev.params, streams, model.cfg, 6)
    assert loss == pytest.approx(0.75 * by_stream["code"] + 0.25 * by_stream["idioms"])
    assert by_stream["idioms"] == pytest.approx(
        loss_of(model.params, window[None, :-1], window[None, 1:], model.cfg))
    assert sg.evaluate_tasks(on_dev, 2)["for_while"].binary > 0


# ---- checkpoints --------------------------------------------------------------------------------

@given(cfg=configs(), seed=SEEDS)
def test_a_checkpoint_gives_back_what_was_saved(cfg, seed):
    params, text, _ = drawn(cfg, seed)
    tok = tasks.Tokenizer([(97, 97)] if cfg.vocab_size > 257 else [])
    state = dict(m=randoms(np.random.default_rng(seed), sg.n_params(cfg)), step=np.array(3))
    sg.save("model.npz", sg.Model(params, cfg, tok, text, state))
    model = sg.load("model.npz")
    assert (model.cfg, model.tok.merges, model.text.dtype) == (cfg, tok.merges, np.int64)
    assert same(model.params, params) and same(model.state, state)
    assert np.array_equal(model.text, text)

@functools.cache
def checkpoint_bytes():
    """A whole checkpoint, as a file's content."""
    sg.save("whole.npz", small_model())
    content = Path("whole.npz").read_bytes()
    Path("whole.npz").unlink()
    return content

def load_or_refuse(content):
    """What `load` makes of a file of this content: None if it is refused as damaged."""
    Path("damaged.npz").write_bytes(content)
    try:
        return sg.load("damaged.npz")
    except sg.UserError as e:
        assert "damaged.npz" in str(e) and "\n" not in str(e)

def test_a_truncated_checkpoint_or_a_changed_array_is_refused():
    """Not even a smaller shape or type in the header of a large array passes for less of it."""
    sg.save("large.npz", small_model()._replace(text=np.ones((9000, 8), int)))
    whole = Path("large.npz").read_bytes()
    assert not any(load_or_refuse(whole[:cut]) for cut in range(0, len(whole), 1997))
    start = whole.index(b"\x93NUMPY", whole.index(b"text.npy"))
    for at, flip in itertools.product(range(start, start + 128), (1, 2, 4, 6)):
        changed = bytes([whole[at] ^ flip])
        assert load_or_refuse(whole[:at] + changed + whole[at + 1:]) is None

@given(at=st.integers(0, 2500) | st.integers(-2500, -1) | st.integers(0, 10**6),
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
        assert same(model.params, good.params) and np.array_equal(model.text, good.text)

def edited(**changes):
    """The arrays of a checkpoint with some replaced (by None: left out)."""
    arrays = {**np.load(io.BytesIO(checkpoint_bytes())), **changes}
    return {name: a for name, a in arrays.items() if a is not None}

class Payload:
    """Pickled, it creates a file when it is loaded."""

    def __reduce__(self):
        return open, ("payload-ran", "w")

def test_pickles_are_never_loaded():
    for name in (*edited(), "more"):
        np.savez("bad.npz", **edited(**{name: np.array([Payload()], object)}))
        assert load_or_refuse(Path("bad.npz").read_bytes()) is None
    assert load_or_refuse(pickle.dumps(Payload())) is None
    assert not Path("payload-ran").exists()

CONFIG, N_PARAMS = dataclasses.asdict(tiny()), sg.n_params(tiny())

@pytest.mark.parametrize("changes, said", [
    (dict(format="sparsegpt-0"), "not of this version"), (dict(format=None), "format"),
    (dict(params=None), "params"), (dict(config=None), "config"), (dict(merges=None), "merges"),
    (dict(text=None), "text"), (dict(text=np.full((4, 8), 280)), "token ids"),
    (dict(text=np.zeros((4, 9))), "ids must be"), (dict(m=np.zeros(5)), "moments"),
    (dict(params=np.zeros(5)), "params"), (dict(params=np.full(N_PARAMS, np.nan)), "finite"),
    (dict(params=np.zeros(N_PARAMS, "f4")), "float32"), (dict(config="{"), "model.npz"),
    (dict(config="[]"), "model.npz"), (dict(config='{"n_layer": "2"}'), "n_layer"),
    (dict(config=json.dumps({**CONFIG, "d_head": 5})), "d_head"),
    (dict(config=json.dumps({**CONFIG, "unknown": 5})), "unknown"),
    (dict(config=json.dumps({**CONFIG, "n_layer": 1})), "params"),
    (dict(merges=np.array([[97, 257]])), "merge"), (dict(merges=np.array([[-1, 97]])), "merge"),
    (dict(merges=np.arange(3)), "model.npz"), (dict(merges=np.array([[0.5, 1e9]])), "model.npz"),
    (dict(merges=np.array([[97, 97]] * 99)), "tokenizer")])
def test_a_checkpoint_that_does_not_fit_is_refused(changes, said):
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
    sg.save("model.npz", small_model())
    before = files()
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(owner, name, fail)
        sg.save("model.npz", small_model(seed=1))
    assert files() == before


# ---- command line and files ---------------------------------------------------------------------

def flags(**more):
    """A tiny run, as command-line arguments."""
    cfg = dataclasses.asdict(tiny(steps=3, **more))
    return [f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"
            for name, value in cfg.items()]

@pytest.mark.parametrize("line, said", [
    *((line, line.split()[0]) for line in (
        "--density 0", "--density 1.5", "--density nan", "--density x", "--density 1/0",
        "--n_ctx 1", "--vocab_size 100", "--steps 0", "--act tanh", "--batch_size 2.5",
        "--seed -1", "--lr inf", "--anneal_end 0.2 --anneal_start 0.5", "--data short.txt",
        "--batch_size 9000", "--n_ctx 60000", "--min_per_neuron 17")),
    *((line, line.split()[1]) for line in (
        "--gradcheck --lr 1", "--gradcheck --steps 5", "--gradcheck --dense",
        "--resume --lr 0.5 --out run.npz")),
    *((f"--sample x --out {name}", name)
      for name in ("none.npz", "garbage.npz", "cut.npz", "hollow")),
    ("--sample x --lr 1", "--lr"), ("--densty 0.1", "did you mean --density"),
    ("--d_head 5", "does not divide"), ("--data missing", "missing"), ("--data hollow", "no file"),
    ("--data binary", "not UTF-8"), ("--data prose.txt,,", "--data ''"),
    ("--out prose.txt/model.npz", "prose.txt"), ("--out hollow", "hollow"),
    ("--out short.txt", "not a checkpoint"), ("--out other.zip", "not a checkpoint"),
    ("--out run.npz", "unfinished run"), ("--resume --out none.npz", "no unfinished run"),
    ("--resume --out cut.npz", "cut.npz.partial"), ("--resume --out run.npz", "not the state"),
    ("--sample x --bench", "not allowed with"), ("--dense --quick", "not allowed with")])
def test_wrong_input_is_refused_and_nothing_is_written_over(line, said, prose, capsys):
    whole = checkpoint_bytes()
    Path("hollow").mkdir()
    write({"binary/a": b"\xff\xfe", "short.txt": b"x", "garbage.npz": b"PK\x03\x04!",
           "cut.npz": whole[:-99], "cut.npz.partial": whole[:999], "run.npz.partial": whole,
           "model.npz": whole})
    np.savez("other", np.zeros(3))
    Path("other.npz").rename("other.zip")
    before = files()
    base = [] if re.match("--(sample|resume|gradcheck)", line) else flags()  # of --out model.npz
    assert_refused(capsys, re.escape(said), *base, *line.split())
    assert files() == before

@pytest.mark.parametrize("line, said", [
    ("nonsense", "nonsense"), ("var_swop", "var_swap"), ("--n 0", "--n"), ("--n x", "--n"),
    ("var_swap --split tset", "eval"), ("var_swap --idioms", "--idioms"),
    ("var_swap --n 2", None), ("--idioms", None), ("", None)])
def test_command_line_of_tasks_shows_or_refuses(line, said, capsys):
    if said:
        assert not assert_refused(capsys, said, *line.split(), main=tasks.main)
    else:
        status, out, _ = run_main(capsys, *line.split(), main=tasks.main)
        assert status == 0 and out.count("\n") > 5

def test_documents_are_read_and_split_with_nothing_lost_unsaid(prose):
    """Undecodable files are counted. A document is held out or trained on, not both."""
    write({"mixed/a": b"good text", "mixed/b": b"\xff\xd8", "mixed/c": b"a\0b", "mixed/d": b""})
    lines = []
    assert tasks.read_documents("mixed", log=lines.append) == ["good text"]
    assert "2 files" in "".join(lines)
    train, val = tasks.split(tasks.read_documents(prose, log=quiet))
    assert train and val and not set(train) & set(val)
    assert sorted("".join(train + val)) == sorted(Path(prose).read_text())

@pytest.mark.parametrize("n_ctx", [8, 128])
def test_the_whole_path_runs(prose, n_ctx, capsys, monkeypatch):
    monkeypatch.setattr(sg, "evaluate_tasks", functools.partial(sg.evaluate_tasks, n=3))
    status, out, err = run_main(capsys, *flags(n_ctx=n_ctx))
    assert (status, err) == (0, "") and "saved to model.npz" in out and "trained" in out
    assert f"ln(vocabulary) is {math.log(280):.4f}" in out
    scored, _, left_out = out.partition("not scored")
    assert ("for_while" in scored, "for_while" in left_out) == (n_ctx == 128, n_ctx == 8)
    status, out, err = run_main(capsys, "--sample", "def f(", "--out", "model.npz")
    assert (status, err) == (0, "") and out.startswith("def f(")
    status, out, err = run_main(capsys, *flags(n_ctx=n_ctx), "--bench")
    assert (status, err) == (0, "") and re.search(rf"batch 4 x {n_ctx}.* ms a step", out)

def test_ctrl_c_is_status_130_and_the_hint_resumes(prose, capsys, monkeypatch):
    adam, count = sg.adam, iter(range(1, 99))
    monkeypatch.setattr(sg, "adam", lambda *a: (adam(*a), next(count) == 2 and ctrl_c()))
    status, _, err = run_main(capsys, *flags(), "--steps", "6")
    assert status == 130 and "Traceback" not in err
    hint = re.search(r"python sparsegpt.py (--resume .*)", err).group(1).split()
    status, out, err = run_main(capsys, *hint)
    assert (status, err) == (0, "") and "from step 2 of 6" in out

def test_every_config_field_is_a_flag_with_help():
    text = sg.make_parser().format_help()
    given = vars(sg.make_parser().parse_args([*flags(), "--density", "1/4"]))
    assert given == {**CONFIG, "steps": 3}
    for field in dataclasses.fields(sg.Config):
        assert f"--{field.name}" in text and field.metadata["help"]
        assert type(given[field.name]) is field.type

def test_the_program_runs_as_a_script_from_anywhere():
    def script(*argv):
        return subprocess.run([sys.executable, sg.__file__, *argv], capture_output=True, text=True)
    good, bad = script("--gradcheck"), script("--density", "2")
    assert good.returncode == 0 and "largest relative error" in good.stdout and not good.stderr
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and not bad.stdout
    assert not os.listdir()

@pytest.mark.parametrize("module, forbidden", [
    (tasks, "numpy|sparsegpt|prune"), (sg, "prune"), (prune, "compare")])
def test_a_file_imports_none_above_it_and_does_nothing_when_imported(module, forbidden):
    """Only sparsegpt.py has a loop, which sets variables of the environment."""
    tree = ast.parse(Path(module.__file__).read_text())
    imports = [ast.unparse(node) for node in ast.walk(tree)
               if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not re.search(rf"\b({forbidden})\b", " ".join(imports))
    *body, end = tree.body[1:]  # after the docstring
    defines = ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.ClassDef
    others = [ast.unparse(node) for node in body if not isinstance(node, defines)]
    assert ast.unparse(end).startswith("if __name__ == '__main__':")
    assert len(others) == (module is sg) and all("environ.setdefault" in text for text in others)

def test_part_one_is_short_and_plain():
    """The method, which people read, has no threads, files, messages or checks in it."""
    part_one = Path(sg.__file__).read_text().partition("\n# Part II")[0]
    assert part_one.count("\n") <= 650
    nodes = list(ast.walk(ast.parse(part_one)))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    assert not names & {"threading", "signal", "open", "print"}
    assert not any(isinstance(node, ast.Raise) for node in nodes)
# ---- circuits: nodes, edges, losses -------------------------------------------------------------

def drawn_mask(cfg, seed, density=0.6):
    """(model, frozen, prompts, mask) at random: zero weights, deleted nodes, often edges."""
    rng, V = np.random.default_rng(seed), cfg.vocab_size
    params = {name: w * (rng.random(w.shape) < density) if sg.is_matrix(name) else w
              for name, w in drawn(cfg, seed)[0].items()}
    n, T = 2 * rng.integers(1, 4), rng.integers(1, cfg.n_ctx + 1)
    answers = np.array([rng.permutation(V)[:2] for _ in range(n)]).T
    prompts = sg.Prompts(rng.integers(0, V, (n, T)), rng.integers(0, T, n), *answers,
                         np.tile([1, -1], n // 2))
    nodes = np.concatenate([rng.random(part.stop - part.start) < rng.choice([0, 0.3, 0.7, 1])
                            for part in prune.node_slices(cfg).values()])
    edges = {name: rng.random(params[name].shape) < 0.5 for name in prune.matrices(cfg)}
    model = sg.Model(on_device(params), cfg, sg.Tokenizer([]), prompts.ids)
    return (model, rng.standard_normal(len(nodes)), prompts,
            prune.CircuitMask(nodes, edges if rng.random() < 0.7 else None))

def run_hook(model, ids, hook=None, positions=None):
    return host(sg.forward(model.params, ids, model.cfg, hook, positions)[0])

def slow_circuit(model, frozen, ids, mask):
    """({place: nodes [T, C]}, logits [T, V]) of a circuit on one prompt, written out."""
    cfg, seen, at = model.cfg, {}, prune.node_slices(model.cfg)
    p, T, D = {name: host(w) for name, w in model.params.items()}, len(ids), cfg.d_head

    def node(place, x):
        keep = np.flatnonzero(mask.nodes[at[place]])
        seen[place] = np.tile(frozen[at[place]], (T, 1))
        seen[place][:, keep] = 0
        for row, out in zip(x, seen[place]):
            k = len(row) if place == "final" else cfg.n_active(len(row))
            best = keep[first_largest(row[keep], k)]
            out[best] = row[best]
        return seen[place]

    def linear(x, name):
        m, w = prune.matrices(cfg)[name], p[name]
        gone = np.outer(mask.nodes[m.source], mask.nodes[m.target])
        gone &= False if mask.edges is None else ~mask.edges[name]
        return x @ np.where(gone, 0, w) + frozen[m.source] @ np.where(gone, w, 0) + p[m.bias]

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
                p[h + "attn.relbias"][head, t::-1] if cfg.positions == "relative" else 0))
            total = weights.sum() + (np.exp(p[h + "attn.sink"][head]) if cfg.sink else 0)
            z[t, own] = weights @ v[:t + 1, own] / total
        x = x + node(h + "attn_out", linear(z, h + "attn.wo"))
        y = linear(node(h + "mlp_in", norm(x)), h + "mlp.wfc")
        exact = dict(relu=lambda y: np.maximum(y, 0), square=lambda y: y * y,
                     gelu=lambda y: exact_gelu(y.ravel())[0].reshape(y.shape))
        y = exact[cfg.act](y)
        x = x + node(h + "mlp_out", linear(node(h + "neuron", y), h + "mlp.wproj"))
    logits = node("final", norm(x)) @ p["head.w"] + p["head.b"]
    return seen, logits + (p["bigram"][ids] if cfg.bigram else 0)

@given(cfg=configs(), seed=SEEDS, square=st.booleans())
@settings(max_examples=40)
def test_a_circuit_computes_what_its_definition_says(backend, cfg, seed, square):
    """Both runners against a circuit written out: AbsTopK among kept nodes, deleted nodes at their
    frozen values, deleted edges at weight x frozen value; logits in the order of the prompts. A
    third activation, added to one table, needs no word in prune.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sg.ACTIVATIONS, "square", lambda x: (x * x, 2 * x))
        model, frozen, prompts, mask = drawn_mask(
            dataclasses.replace(cfg, act="square" if square else cfg.act), seed)
        plain, fast = (kind(model, frozen, prompts).logits(mask)
                       for kind in (prune.PlainRunner, prune.FastRunner))
        crowded = mask._replace(nodes=mask.nodes.copy())  # heads that are not read compete, too
        for site in ("h0.q", "h0.k", "h0.v"):
            crowded.nodes[prune.node_slices(cfg)[site]] = True
        both = [kind(model, frozen, prompts).logits(crowded)
                for kind in (prune.PlainRunner, prune.FastRunner)]
    for ids, last, row in zip(prompts.ids, prompts.last, plain):
        expected = slow_circuit(model, frozen, ids[:last + 1], mask)[1][last]
        assert np.allclose(row, expected, 1e-9, 1e-9)
    assert np.allclose(fast, plain, 1e-8, 1e-9) and np.allclose(*both, 1e-8, 1e-9)

def test_a_runner_that_differs_is_named_before_a_search(cues, monkeypatch):
    """Agreement of the runners is checked at the start of every search."""
    task = cue_task()
    prune.agree(task)
    right = prune.FastRunner.params

    def wrong(self, mask):
        params = right(self, mask)
        params["h0.mlp.wproj"] = 1.1 * params["h0.mlp.wproj"]
        return params
    monkeypatch.setattr(prune.FastRunner, "params", wrong)
    with pytest.raises(RuntimeError, match="h0.mlp_out"):
        prune.search(task, quiet)

@given(cfg=configs(), seed=SEEDS)
def test_all_nodes_are_the_model_and_no_nodes_are_constant(backend, cfg, seed):
    """The two ends of ablation: the model bit for bit, nothing but the frozen and the bigrams."""
    model, frozen, prompts, _ = drawn_mask(cfg, seed)
    p, ids = model.params, prompts.ids
    every, none = (prune.Ablation(np.full(len(frozen), kept), frozen, cfg)
                   for kept in (True, False))
    assert np.array_equal(run_hook(model, ids, every), run_hook(model, ids))
    final = frozen[prune.node_slices(cfg)["final"]] @ host(p["head.w"]) + host(p["head.b"])
    final = final + (host(p["bigram"])[ids] if cfg.bigram else 0)
    assert np.allclose(run_hook(model, ids, none), final, 1e-12, 1e-12)

class Mixed(prune.Ablation):
    """Ablation with one node at m x + (1 - m) frozen, x what it is or would be if it were kept."""

    def forward(self, site, x, k):
        out, part, (node, m, frozen) = super().forward(site, x, k), self.slices[site], self.mixed
        if part.start <= node < part.stop:
            kept, c = host(self.nodes[part]), node - part.start
            kept[c] = True
            out[:, c] = m * sg.abstopk(x * dev(kept), k)[0][:, c] + (1 - m) * frozen[node]
        return out

@given(cfg=configs(), seed=SEEDS, data=st.data())
def test_the_gradient_of_a_mask_is_the_derivative_of_the_loss(backend, cfg, seed, data):
    """What masks are learned by, of kept and of deleted nodes, with AbsTopK and without."""
    model, frozen, prompts, (keep, _) = drawn_mask(cfg, seed)
    scale, shift = data.draw(st.sampled_from([(1.0, 0.0), (1.7, -0.6), (0.5, 1.0)]))
    margin, grad = prune.gradient(model, prompts, keep, frozen, prune.Calibration(scale, shift))
    loss = prune.logistic(scale * margin + shift * prompts.sign)
    rows, errors = np.arange(len(prompts.last)), []
    for node in data.draw(st.lists(st.integers(0, len(frozen) - 1), min_size=3, max_size=3)):
        def along(t):
            hook = Mixed(keep, frozen, cfg)
            hook.mixed = node, keep[node] + t, frozen
            z = run_hook(model, prompts.ids, hook, prompts.last)
            margin = z[rows, prompts.right] - z[rows, prompts.wrong]
            return np.logaddexp(0, -scale * margin - shift * prompts.sign).mean()
        assert loss == pytest.approx(along(0.0), rel=1e-9)
        errors.append(mismatch(along, grad[node:node + 1], np.ones(1), loss))
    assume(None not in errors)
    assert max(errors) < 1e-6

ENDS = dict(wqkv=["attn_in", "q", "k", "v"], wo=["v", "attn_out"], wfc=["mlp_in", "neuron"],
            wproj=["neuron", "mlp_out"])

def named(mask, model):
    """({the kept nodes' names}, {(source, target): (matrix, row, column)} of the edges), counted
    one by one."""
    kept, edges = {prune.node_name(n, model.cfg) for n in np.flatnonzero(mask.nodes)}, {}
    for name in prune.matrices(model.cfg):
        (h, _, kind), w = re.split(r"\b", name)[1:6:2], host(model.params[name])
        source, *targets = ENDS[kind]
        width = w.shape[1] // len(targets)
        for i, j in np.argwhere(w if mask.edges is None else w * mask.edges[name]):
            ends = f"{h}.{source}.{i}", f"{h}.{targets[j // width]}.{j % width}"
            if kept >= set(ends):
                edges[ends] = name, i, j
    return kept, edges

@given(cfg=configs(), seed=SEEDS)
def test_edges_are_the_nonzero_weights_between_kept_nodes(backend, cfg, seed):
    """The numbers that are reported; a smaller mask is less by what was asked, the first as it
    was."""
    model, _, _, mask = drawn_mask(cfg, seed)
    kept, edges = named(mask, model)
    mask = mask._replace(edges=prune.kept_edges(mask, model.params, cfg))
    assert sorted(prune.edge_list(mask.edges)) == sorted(edges.values())
    assert prune.sizes(mask, model.params, cfg) == (len(kept), len(edges))
    lost, gone = (set(sorted(x)[::2]) for x in (edges, kept))
    less = mask.without([edges[ends] for ends in lost])
    assert named(less, model)[1].keys() == edges.keys() - lost
    less = mask.without([prune.node_number(name, cfg) for name in gone])
    assert named(less, model)[0] == kept - gone and named(mask, model) == (kept, edges)

def test_every_node_has_a_name_and_no_other_name_has_a_node():
    """Names, as the command line and the files have them, in the order of computation."""
    cfg = tiny(n_layer=1, d_model=4)
    names = [f"h0.{p}.{c}" for p in sg.SITES for c in range(16 if p == "neuron" else 4)]
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
    model, _, prompts, mask = drawn_mask(cfg, seed, 0.15)
    p, C, L = model.params, cfg.d_model, cfg.n_layer
    kept, edges = named(mask, model)
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
    deleted = {prune.node_name(n, cfg) for n in np.flatnonzero(~mask.nodes)}
    mixed = {(f"h{i}.{x}.{a}", f"h{i}.v.{b}") for i, a, b in np.ndindex(L, C, C) for x in "qk"
             if a // cfg.d_head == b // cfg.d_head}
    ahead, back = ({link for link in some if not deleted & set(link)}
                   for some in (links, links | mixed))
    alive = reached(ahead, "tokens") & reached({(b, a) for a, b in back}, "logits")
    found = {prune.node_name(n, cfg) for n in prune.disconnected_nodes(mask, model, prompts)}
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
    prompts = sg.Prompts(None, None, *answers, sign)
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

    def good(mask):
        calls.append(mask)
        return mask.nodes.sum() >= least
    found = prune.bisect(order, good)
    assert len(calls) <= 4 + 2 * math.log2(min(least, n) + 1) and (found is None) == (least > n)
    assert found is None or set(np.flatnonzero(found.nodes)) == set(order[:least])

@given(n=st.integers(0, 9), seed=SEEDS, monotone=st.booleans(), target=st.floats(0.1, 2))
@settings(max_examples=60)
def test_cleaning_ends_where_nothing_can_go_alone(n, seed, monotone, target):
    """Never over the target, also where what can go alone cannot go together."""
    weights = np.random.default_rng(seed).random(n)

    def loss(mask):
        if monotone:
            return sum(w for i, w in enumerate(weights) if i not in mask)
        return 2 * random.Random(f"{seed} {sorted(mask)}").random() * (len(mask) < n)
    found = prune.delete_greedily(frozenset(range(n)), sorted, lambda mask, gone: mask - set(gone),
                                  loss, target, quiet, "")
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
    text = np.random.default_rng(0).choice(list(b"<>abcd" * 5 + b"="), (64, 16))
    return sg.Model(on_device(p), cfg, sg.Tokenizer([]), text)

def cue_task(model=None, name="cue", settings=None, **more):
    """A PruningTask of the network."""
    model = model or wired()
    frozen = prune.ModelContext(model).frozen
    return prune.PruningTask(model, frozen, name, settings or FEW, **more)

@functools.cache
def found_circuit():
    """The Circuit that `prune` finds in the network."""
    with own_tasks():
        return prune.prune(wired(), "cue", FEW, log=quiet)

@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_the_circuit_of_a_network_wired_by_hand_is_found(backend, cues, ablation):
    """Ground truth: every node and every edge of it, and no other."""
    model, s = wired(), dataclasses.replace(FEW, ablation=ablation)
    task = prune.PruningTask(model, prune.ModelContext(model, ablation).frozen, "cue", s)
    found = prune.search(task, quiet)
    nodes, edges = named(found.mask, model)
    assert (nodes, edges.keys()) == (NODES, EDGES)
    assert task.full_loss() < 0.05 and found.loss < 0.05 and found.stages[-1] == dict(
        stage="edges cleaned", nodes=11, edges=6, loss=pytest.approx(found.loss))

@pytest.mark.parametrize("nonsense, aim", [(False, 0.135), (True, 0.135)])
def test_a_control_is_searched_as_hard_as_its_task(cues, monkeypatch, nonsense, aim):
    """Masks are trained to the same loss, however bad the full model is at a control."""
    model, aims = wired(), []
    task = cue_task(model, nonsense=nonsense)
    assert (task.full_loss() > 2) == nonsense

    def learn_masks(*args):
        aims.append(args[-1])
        return np.arange(368), np.ones(368)
    monkeypatch.setattr(prune, "learn_masks", learn_masks)
    monkeypatch.setattr(prune, "clean", lambda task, mask, *_: (mask, prune.Calibration(), 0.0))
    prune.search(task, quiet)
    assert aims == [pytest.approx(aim)]

def test_a_huge_circuit_is_not_cleaned_and_says_so(cues, monkeypatch):
    """It is returned as it came, within the target."""
    model, stages = wired(), []
    task = cue_task(model)
    every = prune.CircuitMask(np.ones(368, bool))
    monkeypatch.setattr(prune, "TOO_LARGE", task.size(every)[1] - 1)
    mask, calibration, loss = prune.clean(task, every, lambda *stage: stages.append(stage),
                                          quiet)
    assert mask is every and loss == task.loss(every, calibration) <= FEW.target
    assert [name for name, *_ in stages] == ["not cleaned: too large"]

def test_learned_masks_rank_the_nodes_of_a_circuit_first(cues):
    """The search before it is cleaned: few of 368 nodes do the task. The baseline, attribution, is
    the gradient on all prompts."""
    model = wired()
    task = cue_task(model, settings=dataclasses.replace(FEW, steps=150))
    order, _ = prune.learn_masks(task, 1e-3, 0.01, 1.0, [0, 1], quiet)
    assert prune.bisect(order, lambda mask: task.loss(mask) < 0.15).nodes.sum() < 20
    _, grad = prune.gradient(model, task.pool, np.ones(368, bool), task.frozen)
    assert (np.diff(grad[prune.rank_by_attribution(task)]) >= -1e-9).all()

def test_no_circuit_is_found_where_there_is_none(cues):
    """The controls: answers dealt out at random to the same prompts, and the same weights at
    other places among the nonzero ones."""
    study = prune.ModelContext(wired())
    real, nonsense = (prune.PruningTask(study.model, study.frozen, "cue", FEW, nonsense=x)
                      for x in (False, True))
    one, two = real.pool, nonsense.pool
    assert np.array_equal(one.ids, two.ids) and np.array_equal(two.right[::2], two.wrong[1::2])
    assert 10 < (one.right != two.right)[::2].sum() < 22
    assert np.array_equal(two.right == ord("x"), two.sign > 0)
    other = prune.PruningTask(study.shuffled, study.shuffled_frozen, "cue", FEW)
    for task in (nonsense, other):
        found = prune.search(task, quiet)
        assert found.mask is None and found.loss > 0.15
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
    task = prune.PruningTask(wired(), np.zeros(368, "f4"), "cue", FEW)
    judged, fitted = ({row.tobytes() for row in x.ids} for x in (task.judged, task.fitted))
    assert not judged & fitted and len(judged) == len(fitted) == 32
    mask = prune.CircuitMask(np.random.default_rng(0).random(368) < 0.9)
    logits = [prune.PlainRunner(task.model, task.frozen, prompts).logits(mask)
              for prompts in (task.judged, task.fitted)]
    calibration = prune.calibrate(prune.margins(logits[1], task.fitted), task.fitted.sign)
    loss = sg.score(calibration.logits(logits[0], task.judged), task.judged).binary
    assert task.loss(mask) == pytest.approx(loss, rel=1e-4)

def test_masks_are_learned_by_adamw_through_a_sigmoid(cues, monkeypatch):
    """The rule (paper A.5) written out, with the sigmoid's slope taken numerically."""
    s = dataclasses.replace(FEW, steps=40)
    task = prune.PruningTask(wired(), np.zeros(368, "f4"), "cue", s)
    rng, group, kept = np.random.default_rng(1), np.arange(368), []
    noise, need = 0.2 * randoms(rng, 40, 1) * randoms(rng, 40, 368), 0.2 * randoms(rng, 368)
    for h, c in np.ndindex(2, 16):
        q, k = (prune.node_number(f"h{h}.{x}.{c}", task.model.cfg) for x in "qk")
        group[k] = q

    def gradient(model, prompts, nodes, frozen, calibration):
        kept.append(nodes)  # and at the target, where k_coef stays as it is
        margin = np.full(len(prompts.last), -math.log(math.expm1(s.target)))
        return margin, need * (1 + nodes) + noise[len(kept) - 1]
    monkeypatch.setattr(prune, "gradient", gradient)
    monkeypatch.setattr(prune, "calibrate", lambda margin, sign: prune.Calibration())
    _, t = prune.learn_masks(task, 0.02, 0.0, 0.2, [0, 0], quiet)  # at rate 0: as it starts
    kept.clear()
    order, tau = prune.learn_masks(task, 0.02, 0.06, 0.2, [0, 0], quiet)
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
    assert np.array_equal(one.mask.nodes, other.mask.nodes)
    assert np.array_equal(one.frozen, other.frozen)


# ---- circuits: what is measured and printed -----------------------------------------------------

@given(cfg=configs(), seed=SEEDS, threads=st.integers(1, 3))
def test_mean_activations_are_those_of_the_model_as_it_runs(backend, cfg, seed, threads):
    """The mean over all tokens, with AbsTopK, in parts of a batch on any number of threads."""
    model, _, prompts, _ = drawn_mask(cfg, seed)
    total = 0
    for row in prompts.ids:
        run_hook(model, row[None], hook := Push())
        total = total + np.concatenate([x.sum(0) for x in hook.seen.values()])
    model = model._replace(cfg=dataclasses.replace(cfg, threads=threads))
    means = prune.mean_activations(model, prompts.ids)
    assert np.allclose(means, total / prompts.ids.size, 1e-9, 1e-12)

def test_a_checkpoint_holds_windows_of_its_training_text(prose):
    """Frozen values are means over them, and need no corpus."""
    model = sg.train(tiny(steps=1), log=quiet)
    stream = sg.load_corpus(model.cfg, quiet).train["code"].tobytes()
    assert model.text.shape == (64, 8) and len({row.tobytes() for row in model.text}) > 30
    assert all(row.astype(np.uint16).tobytes() in stream for row in model.text)

@given(cfg=configs(), seed=SEEDS)
def test_attention_weights_sum_to_one_and_give_attentions_output(backend, cfg, seed):
    """Patterns that are printed and compared are those of the forward pass, the sink's last."""
    params, ids, _ = drawn(cfg, seed)
    cache = sg.forward(on_device(params), ids, cfg)[1]
    weights = prune.attention_weights(cache, 0)
    assert np.allclose(weights.sum(-1), 1) and (cfg.sink or not weights[..., -1].any())
    v, out = host(cache["h0.attention"][2]), host(cache["h0.wo"][0])
    if len(out) == ids.size:  # one block alone may go on with some rows only
        assert np.allclose((weights[..., :-1] @ v).transpose(0, 2, 1, 3).reshape(out.shape), out)

@given(cfg=configs(act="relu", afrac=1.0, sink=False), seed=SEEDS)
def test_weights_and_effective_biases_add_up_to_the_nodes(cfg, seed):
    """A node is its printed bias and its edges x where these come from; without any, constant."""
    model, frozen, prompts, mask = drawn_mask(cfg, seed)
    mask = mask._replace(edges=prune.kept_edges(mask, model.params, cfg))
    seen, _ = slow_circuit(model, frozen, prompts.ids[0, :1], mask)  # one token attends to itself
    value, bias = np.concatenate([x[0] for x in seen.values()]), prune.effective_bias(
        model, mask, frozen)
    kept, edges = named(mask, model)
    total = {prune.node_name(n, cfg): x for n, x in bias.items()}
    assert total.keys() == {name for name in kept if not re.search("_in|final", name)}
    for (source, target), (name, i, j) in edges.items():
        total[target] += value[prune.node_number(source, cfg)] * model.params[name][i, j]
    for name, x in total.items():
        x = max(x, 0) if "neuron" in name else x
        assert value[prune.node_number(name, cfg)] == pytest.approx(x, abs=1e-9)

def test_a_node_set_by_hand_is_frozen_in_the_full_model(cues):
    """--set: the same as a hook that gives the node that value, and nothing else is deleted."""
    model, lines = wired(), []
    neuron = prune.node_number("h1.neuron.5", model.cfg)
    prompts = prune.make_prompts(model, "cue", 16, 0)
    for value in (0.0, 1.5):
        class Give(Push):
            def forward(self, site, x, k):
                x = super().forward(site, x, k).copy()
                if site == "h1.neuron":
                    x[:, 5] = value
                return x
        logits = run_hook(model, prompts.ids, Give())[np.arange(32), prompts.last]
        loss = prune.logistic(prune.margins(logits, prompts))
        lines.append(prune.intervene(model, "cue", {neuron: value}, FEW)[-1])
        assert f"loss {loss:.4f}" in lines[-1]
    assert lines[0] != lines[1]

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
        seen, logits = slow_circuit(model, circuit.frozen, ids, circuit.mask)
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
    task = prune.PruningTask(model, circuit.frozen, "cue", FEW)
    check, overlap = prune.check_attention(task, circuit.mask)
    assert overlap.keys() == {(0, 0)} and check["overlap"] == overlap[0, 0] > 0.8
    assert not prune.check_resampled(task, circuit.mask.without([neuron]), circuit.calibration,
                                     model.text)["passed"]
    as_it_is, changed = prune.intervene(model, "cue", {neuron: 0.0}, FEW)[-2:]
    assert "accuracy 100.0%" in as_it_is and f"loss {score['binary']:.4f}" in as_it_is
    assert "accuracy 50.0%" in changed

NODE = r"\b(?:h\d+\.(?:attn_in|q|k|v|attn_out|mlp_in|neuron|mlp_out)|final)\.\d+"
NASTY = "</script><b>\"&' \\\ud800"

def nasty(x):
    """A record with a hostile end to every text that is no node's name."""
    if isinstance(x, str):
        return x if re.fullmatch(NODE, x) else x + NASTY
    if isinstance(x, dict):
        return {key: nasty(value) for key, value in x.items()}
    return list(map(nasty, x)) if isinstance(x, (list, tuple)) else x

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

def page_of(circuit):
    """A circuit's page, as it is saved."""
    prune.save_drawings(Path("drawn.json"), circuit)
    return Path("drawn.html").read_bytes().decode("utf-8", "surrogatepass")

@pytest.mark.parametrize("change", [dict, nasty])
def test_the_drawings_have_every_node_and_edge_and_nothing_from_outside(change):
    """HTML and DOT: well formed, self-contained; no text of a model or a task becomes markup."""
    plain = found_circuit()
    circuit = dataclasses.replace(plain, record=change(plain.record))
    text, (_, *lines, _) = page_of(circuit), show.dot(circuit.record).splitlines()
    links = {tuple(x if re.fullmatch(NODE, x) else html.unescape(show.visible(x, "␣"))
                   for x in link) for link in links_of(circuit.record)}
    found = Page(text)
    assert found.tags == Page(page_of(plain)).tags and text.encode("utf-8")
    assert not re.search(r"https?:|src=|@import|url\((?!#|data:)", text)
    assert not {"link", "img", "iframe", "object"} & set(found.tags)
    ids = [value for name, value in found.attributes if name == "id"]
    lit = {x for name, value in found.attributes if name == "data-lit" for x in value.split()}
    assert len(set(ids)) == len(ids) and lit <= set(ids)
    assert {x for text in found.texts for x in re.findall(NODE, text)} == NODES
    boxes, arrows = {}, []
    for line in lines:
        if box := re.fullmatch(r'(n\d+) \[label="((?:[^"\\]|\\\\)*)"\]', line):
            boxes[box[1]] = html.unescape(box[2].replace(r"\\", "\\"))
        else:
            arrows.append(re.fullmatch(r"(n\d+) -> (n\d+) \[.*\]", line))
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
    assert one.frozen.dtype == two.frozen.dtype and np.array_equal(one.frozen, two.frozen)
    assert named(two.mask, model) == named(one.mask, model)
    assert two.record == json.loads(json.dumps(one.record))
    assert prune.verify(two, model) == []

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
        content["frozen"] = [x + 0.1 for x in content["frozen"]]
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
    """A key, item or value missing, other or of another type, anywhere: the checksum tells."""
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
    monkeypatch.setattr(compare, "SWEEP", (0.3, 0.15))
    monkeypatch.setattr(compare, "AIMS", (0.1,))
    monkeypatch.setattr(compare.sg, "load_corpus", lambda *_: sg.Corpus(sg.Tokenizer([]), {}, dict(
        code=np.random.default_rng(0).integers(97, 101, 99).astype(np.uint16)), ""))
    monkeypatch.setattr(prune, "settings_of", lambda given: dataclasses.replace(
        real(given), steps=60, search_pairs=16))
    sg.save("model.npz", wired())

@pytest.mark.parametrize("line, said", [
    ("ceu", "cue"), ("", "name a task"), ("cue --sede 3", "did you mean --seed"),
    ("cue --model none.npz", "none.npz"), ("cue --model text.txt", "text.txt"),
    ("cue --model mask.npz", "mask.npz"), ("cue --explain --out none", "none"),
    ("--check none.json", "none.json"), ("--check text.txt", "text.txt"),
    ("--check circuits/cue.json --model other.npz", "another model"),
    ("cue --explain --model other.npz", "another model"), ("cue --target 0", "--target"),
    ("cue --target nan", "--target"), ("cue --target 5", "--target"), ("cue --out c/a", "c/a"),
    ("cue --target x", "--target"), ("cue --runs 0", "--runs"), ("cue --seeds 0", "--seeds"),
    ("cue --seed -1", "--seed"), ("cue --runs x", "--runs"),
    ("all --set final.1=0", "name a task"), ("all --explain", "name a task"),
    ("cue --model", "--model"),
    ("cue --set h1.neuron.5", "h1.neuron.5"), ("cue --set h1.neuron.99=1", "h1.neuron.99"),
    ("cue --set h1.neuron.5=x", "--set"), ("cue --set h1.neuron.5=nan", "nan"),
    ("cue --set h1.neuron.5=1e39", "--set"), ("cue --seeds 2 --explain", "--seeds"),
    ("cue --check x.json", "no task"),
    ("cue --ablate final.99", "final.99"), ("cue --set final.1=1 --explain", "not allowed with"),
    ("cue --ablation foo", "--ablation"), ("cue --out text.txt", "text.txt"),
    ("cue --out text.txt/x", "text.txt"), ("hopeless", "over the target"), ("endless", "context"),
    ("cue --ablation resample", "resample"), ("cue --target 1e-4", "target"),
    ("cue wide --explain", "unrecognized"), ("all --ask <", "name a task"),
    ("cue --ask < --ask " + 99 * "<", "context"),
    ("--check circuits/cue.json --target 0.2", "no --target"),
    ("cue --explain --seeds 3", "no --seeds"), ("cue --ask < --seed 3", "no --seed"),
    ("cue --set final.1=0 --out c", "no --out"), ("cue --ablate final.1 --runs 2", "no --runs")])
def test_a_mistake_in_pruning_is_one_line_and_status_two(brief, line, said, capsys):
    """No traceback, nothing written, nothing printed beside the line that says what is wrong."""
    write_circuit()
    sg.save("other.npz", wired(seed=1))
    write({"text.txt": b"x", "mask.npz": Path("model.npz").read_bytes()[:-99], "c/a": b""})
    before = files()
    status, out, err = run_prune(capsys, line + " --model model.npz" * ("--model" not in line))
    assert (status, out, err.count("\n")) == (2, "", 1) and "Traceback" not in err and said in err
    assert files() == before

def test_the_whole_path_of_pruning_runs(brief, capsys):
    """Prune, check, explain, set, ablate."""
    status, out, err = run_prune(capsys, "cue --model model.npz")
    assert (status, err) == (0, "") and "h1.neuron.5" in out and "circuits/cue.json" in out
    assert {path.suffix for path in Path("circuits").iterdir()} == {".json", ".html", ".dot"}
    nodes, edges = named(prune.load("circuits/cue.json").mask, wired())
    assert (nodes, edges.keys()) == (NODES, EDGES)
    status, out, err = run_prune(capsys, "--check circuits/cue.json")
    assert (status, err) == (0, "") and out.count("\n") == 1
    status, out, err = run_prune(capsys, "cue --model model.npz --explain")
    assert (status, err) == (0, "") and set(re.findall(NODE, out)) == NODES
    mean = float(found_circuit().frozen[prune.node_number("h1.neuron.5", wired().cfg)])
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
    def run(more=""):
        status, out, err = run_prune(
            capsys, "all --model model.npz --seeds 1 --out circuits " + more)
        assert (status, err) == (0, "") and "11 nodes, 6 edges" in out
        assert all(re.search(f"{task} .*not pruned", out) for task in ("hopeless", "endless"))
        Page(Path("circuits/summary.html").read_text())
        return files(), "kept" in out
    first, kept = run()
    assert not kept
    assert sorted(path.name for path in first if path.parent.name == "circuits") == [
        "cue.dot", "cue.html", "cue.json", "summary.html"]
    assert run() == (first, True)
    Path("circuits/cue.html").unlink()  # a run that was mask off before it drew
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
    task = cue_task(model, settings=dataclasses.replace(FEW, steps=60))
    points = compare.curve(task, prune.Progress("", quiet))
    assert [target for target, *_ in points] == [0.15, 0.3]
    for target, mask, size in points:
        assert task.loss(mask) <= target and task.size(mask) == size
    assert points[0][2][1] >= points[1][2][1] >= 6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "SWEEP", (0.3, 0.99 * task.full_loss()))
        points = compare.curve(task, prune.Progress("", quiet))
        assert [target for target, *_ in points] == [0.3]

def test_the_masks_of_a_curve_are_trained_once_under_the_full_models_loss(brief, monkeypatch):
    """Else a target just above that loss is missed by masks that end a little over it."""
    model, aims, real = wired(), [], prune.learn_masks
    task = cue_task(model, settings=dataclasses.replace(FEW, steps=9))
    full = task.full_loss()

    def spy(*args):
        aims.append(args[-1])
        return real(*args)

    monkeypatch.setattr(prune, "learn_masks", spy)
    monkeypatch.setattr(compare, "AIMS", (1.05 * full, 0.9 * full, 0.8 * full))
    compare.curve(task, prune.Progress("", quiet))
    assert aims == pytest.approx([1.025 * full, 0.81 * full])

def test_nothing_is_done_by_no_worker():
    """A second run with every item finished asks for none."""
    assert list(prune.on_cores(abs, [], 2)) == []

def run_compare(capsys, line):
    return run_main(capsys, *line.split(), main=compare.main)

def test_models_are_compared_alike_and_finished_rows_are_kept(brief, capsys):
    """A model against itself is 1 to 1; models of unequal loss are said not to match."""
    Path("copy.npz").write_bytes(Path("model.npz").read_bytes())
    line = "model.npz copy.npz --out c"
    status, out, err = run_compare(capsys, line)
    assert (status, err) == (0, "") and "WARNING" not in out and out.count(" left\n") == 3
    ratios = re.findall(r"([\d.]+) +([\d.]+) +([\d.]+) \(x/ 1.00\)", out)
    assert len(ratios) == 5 and all(a == b and c == "1.00" for a, b, c in ratios)
    [row] = [row for row in json.loads(Path("c/compare.json").read_text())["rows"]
             if row["task"] == "cue"]
    assert row["cleaned"]["edges"] == 6 and f"{row['full']:.3f}" in out
    Page(Path("c/compare.html").read_text())
    status, again, err = run_compare(capsys, line)
    assert (status, err) == (0, "") and again == out[out.index("\n    model"):]
    other = wired()
    other.params["head.b"][:] += np.arange(len(other.params["head.b"])) % 7
    sg.save("other.npz", other)
    assert "not a matched comparison" in run_compare(capsys, "model.npz other.npz --out c")[1]
    assert run_compare(capsys, line)[1] == again  # rows of other models in the file do no harm
    assert "hopeless" in again and "hopeless" not in run_compare(capsys, line + " --tasks cue")[1]
    assert "A/B" not in run_compare(capsys, "model.npz --out c")[1]  # one model: no ratio
    before = Path("c/compare.json").read_bytes()
    status, _, err = run_compare(capsys, line + " --target 0.3")
    assert status == 2 and "other settings" in err
    assert Path("c/compare.json").read_bytes() == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prune, "TOO_LARGE", 1)
        row = compare.compare_one([prune.ModelContext(wired())], FEW, (0, "cue"))
        assert row["points"] and row["cleaned"] is None  # what is left as it is, is not cleaned

@pytest.mark.parametrize("line, said", [
    ("", "FILE"), ("none.npz", "none.npz"), ("model.npz --tasks ceu", "cue"),
    ("model.npz --target 0.4", "one of 0.3"), ("model.npz --ablation foo", "--ablation"),
    ("model.npz --runs 2", "--runs"), ("model.npz other.npz", "tokenizers")])
def test_a_mistake_in_comparing_is_one_line_and_status_two(brief, line, said, capsys):
    """No traceback, nothing written."""
    sg.save("other.npz", wired()._replace(tok=sg.Tokenizer([(97, 97)]), cfg=dataclasses.replace(
        wired().cfg, vocab_size=258), params=sg.init_params(dataclasses.replace(
            wired().cfg, vocab_size=258))))
    before = files()
    status, out, err = run_compare(capsys, line)
    assert (status, out, err.count("\n")) == (2, "", 1) and said in err and files() == before

def test_circuits_for_resampled_values_are_found_by_resampled_values(brief, capsys):
    """Masks, losses and sizes are of the stronger ablation: what is said to reach the target does,
    with the deleted nodes at values of other text."""
    settings, model = dataclasses.replace(FEW, ablation="resample"), wired()
    task = cue_task(model, settings=settings, text=model.text)
    slices, (_, part) = prune.node_slices(model.cfg), task.on_judged.parts[0]
    for site, x in task.on_judged.values[0].items():
        assert x.shape[1] == slices[site].stop - slices[site].start
        assert len(x) in (part.ids.size, len(part.last))
    frozen = cue_task(model)
    half = prune.CircuitMask(np.arange(368) % 2 > 0)
    assert abs(task.loss(half) - frozen.loss(half)) > 1e-3
    every = prune.every_node(model.cfg)
    assert np.allclose(task.on_judged.logits(every), frozen.on_judged.logits(every), atol=1e-4)
    for target, mask, _ in compare.curve(task, prune.Progress("", quiet)):
        assert task.loss(mask) <= target
    line = "model.npz model.npz --tasks cue --ablation resample --out r"
    status, out, err = run_compare(capsys, line)
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
    kinds = compare.by_kind([model("s1", "sparse", 1), model("d0", "dense", 0),
                           model("s0", "sparse", 0), model("d1", "dense", 1)])
    assert [[m["name"] for m in kind] for kind in kinds] == [["s0", "s1"], ["d0", "d1"]]
    edges = dict(s0=(4, 2), s1=(1, None), d0=(8, 32), d1=(128, 7))
    rows = [row(name, task, n) for name, two in edges.items()
            for task, n in zip(("for_while", "var_if"), two)]
    text = compare.comparison(kinds[::-1], rows, 0.15)
    assert re.search(r"learned masks +3 +32.0 +2.0 +16.00 \(x/ 5.46\)  5.66 128.00\n", text)
    assert re.search(r"var_if +0.100/0.100 +32/7 +-/- +0.100/0.100 +2/- +-/-\n", text)
    assert re.search(r"\nB +4 +0.500 +0.250$", text) and "WARNING" not in text
    twice = compare.by_kind([model("s0", "sparse", 0), model("copy", "sparse", 0)])
    assert [len(kind) for kind in twice] == [1, 1]
    short, long = sg.Config(steps=10, seed=1, out="short.npz"), sg.Config()
    assert compare.kind_of(short) == compare.kind_of(long)  # equal loss may take fewer steps
    assert compare.kind_of(dataclasses.replace(short, lr=1.0)) != compare.kind_of(long)

def test_an_interrupted_search_is_status_130_and_the_next_one_runs(brief, capsys, monkeypatch):
    """Ctrl-C ends that run, writes nothing, and leaves nothing behind."""
    def interrupted(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(prune, "learn_masks", interrupted)
        status, _, err = run_prune(capsys, "cue --model model.npz")
    assert status == 130 and "Traceback" not in err and not list(Path("circuits").iterdir())
    assert run_prune(capsys, "cue --model model.npz --seeds 1")[0] == 0


# ---- the README ---------------------------------------------------------------------------------

def test_the_readmes_python_runs(capsys):
    """Every block of Python in README.md, one after the other."""
    text = Path(prune.__file__).with_name("README.md").read_text("utf-8")
    names, blocks = {}, re.findall(r"```python\n(.*?)```", text, re.S)
    with pytest.MonkeyPatch.context() as patch:  # what the blocks add is gone after them
        patch.setattr(tasks, "TASKS", dict(tasks.TASKS))
        patch.setattr(sg, "ACTIVATIONS", dict(sg.ACTIVATIONS))
        for block in blocks:
            exec(block, names)
    assert len(blocks) >= 4 and "trained in" in capsys.readouterr().out
