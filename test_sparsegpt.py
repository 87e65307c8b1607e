"""Properties of the code, each test named for the one it checks.

    python -m pytest             # all of them and those of extras/, some minutes on two cores
    python -m pytest -m quick    # gradients, model, steps, tokenizer: half a minute

Numeric tests run on NumPy, on CuPy where there is a GPU, and on a stand-in for CuPy that refuses
what CuPy refuses. extras/test_extras.py tests what stands in extras/.
"""
import ast
import dataclasses
import doctest
import errno
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import types
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import sparsegpt as sg  # before NumPy: it sets the number of BLAS threads
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, example, given, reject, settings
from hypothesis import strategies as st

import prune
import tasks
from extras import compare, draw
from extras.stand_in import StrictModule

# Without Phase.explain: it traces every line, which takes minutes where an error is planted.
settings.register_profile("suite", deadline=None, max_examples=20, derandomize=True, database=None,
                          suppress_health_check=list(HealthCheck),
                          phases=[phase for phase in Phase if phase is not Phase.explain])
settings.load_profile("suite")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

SEEDS = st.integers(0, 2**32 - 1)
FLOATS = st.sampled_from([np.float32, np.float64])
HERE = Path(sg.__file__).parent


# ---- backends and helpers -----------------------------------------------------------------------

@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path, use_device=sg.use_device):
    """Every test in a folder of its own, on NumPy, whatever the one before it did or added."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    monkeypatch.setattr(tasks, "added", [])
    monkeypatch.setattr(sg, "ACTIVATIONS", dict(sg.ACTIVATIONS))
    monkeypatch.delenv("SPARSEGPT_DEVICE", raising=False)
    yield
    use_device("cpu")

@pytest.fixture(params=["numpy", "strict", "cupy"])
def backend(request, clean, monkeypatch):
    """Runs a test on each array module; on CuPy where it works, else a visible skip."""
    if request.param == "cupy":
        try:
            sg.use_device("gpu")
        except sg.UserError as e:
            pytest.skip(str(e))
    elif request.param == "strict":
        monkeypatch.setattr(sg, "xp", StrictModule())
    return request.param

def quiet(*_):
    pass

def dev(x):
    """A copy of a host array on the backend."""
    return sg.xp.asarray(np.array(x))

def host(x):
    """A host copy of a backend's array."""
    return np.array(sg.to_host(x))

def on_device(params):
    return {name: dev(host(w)) for name, w in params.items()}

def flat_of(params):
    """Host parameters as one flat array on the backend."""
    return dev(np.concatenate([w.reshape(-1) for w in params.values()]))

def same(one, two):
    """Whether two dicts of arrays are equal, bit for bit."""
    return one.keys() == two.keys() and all(
        host(w).tobytes() == host(two[name]).tobytes() for name, w in one.items())

def same_model(one, two):
    return (one.cfg, one.tok.merges) == (two.cfg, two.tok.merges) and np.array_equal(
        one.text, two.text) and same(one.params, two.params) and same(one.state, two.state)

def randoms(rng, *shape):
    return rng.standard_normal(shape)

@st.composite
def configs(draw, **fixed):
    """Tiny float64 configs with every option of the model."""
    d_head = draw(st.sampled_from([2, 4]))
    return sg.Config(**dict(
        n_layer=draw(st.integers(1, 2)), d_head=d_head, d_model=d_head * draw(st.integers(1, 3)),
        n_ctx=draw(st.integers(2, 6)), vocab_size=draw(st.sampled_from([257, 300])),
        act=draw(st.sampled_from(["gelu", "relu"])), afrac=draw(st.sampled_from([0.25, 0.5, 1.0])),
        batch_size=draw(st.integers(1, 3)), sink=draw(st.booleans()), bigram=draw(st.booleans()),
        positions=draw(st.sampled_from(["relative", "learned", "none"])), min_per_neuron=0,
        dtype="float64", threads=1, out="model.npz") | fixed)

def tiny(**more):
    """A small config with every option on, to train."""
    return sg.Config(**dict(
        n_layer=2, d_model=16, d_head=4, n_ctx=8, vocab_size=280, batch_size=4, steps=12,
        afrac=0.5, density=0.25, min_per_neuron=2, idioms=0.0, weight_decay=0.1, dtype="float64",
        threads=1, data="prose.txt", out="model.npz") | more)

def flags(**more):
    """A tiny run, as command-line arguments."""
    cfg = dataclasses.asdict(tiny(**dict(steps=3) | more))
    return [f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"
            for name, value in cfg.items()]

def drawn(cfg, seed, T=None):
    """(params as host arrays of size 0.3, inputs, targets) at random; tokens repeat."""
    rng = np.random.default_rng(seed)
    flat = host(sg.init_flat(cfg)) + (0.3 * randoms(rng, sg.n_params(cfg))).astype(cfg.dtype)
    ids = rng.choice(rng.integers(0, cfg.vocab_size, 5), (cfg.batch_size, (T or cfg.n_ctx) + 1))
    return sg.views(flat, cfg), ids[:, :-1], ids[:, 1:]

def small_model(seed=0, **more):
    """An untrained Model of random weights."""
    cfg, tok = tiny(**more), sg.Tokenizer.learn(["def f(x): return x\n" * 3], 270)
    params, text, _ = drawn(cfg, seed)
    return sg.Model(params, cfg, tok, text)

def logits_of(params, ids, cfg, hook=None, at=None):
    return host(sg.forward(on_device(params), ids, cfg, hook, at)[0])

def loss_of(params, ids, targets, cfg):
    """The mean loss by `forward` alone, and log-softmax written out once more."""
    z = logits_of(params, ids, cfg)
    logp = z - np.logaddexp.reduce(z, -1, keepdims=True)
    return -np.take_along_axis(logp, targets[..., None], -1).mean()

def ctrl_c():
    signal.raise_signal(signal.SIGINT)

def run_main(capsys, *argv, main=sg.main):
    """(status, stdout, stderr) of the command line."""
    return main(list(argv)), *capsys.readouterr()

def ran(capsys, line, main=prune.main, status=0):
    """What is printed by a command that has to end with a status and without a complaint."""
    found, out, err = run_main(capsys, *line.split(), main=main)
    assert (found, err) == (status, "")
    return out

def assert_refused(capsys, said, *argv, main=sg.main):
    """A mistake is one line on stderr that names what is wrong, status 2, and no file written."""
    before = files()
    status, out, err = run_main(capsys, *argv, main=main)
    assert (status, err.count("\n")) == (2, 1) and "Traceback" not in err and re.search(said, err)
    assert files() == before
    return out

def program(*argv, **env):
    """A finished process that ran `python argv`."""
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True,
                          env=os.environ | env)

def write(contents):
    for path, content in contents.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)

def files():
    """{path: content}; of a huge file, which is a hole, its size."""
    return {path: path.read_bytes() if path.stat().st_size < 1 << 30 else path.stat().st_size
            for path in Path().rglob("*") if path.is_file()}

@pytest.fixture
def prose(clean):
    """A file of short functions to train on; its name."""
    rng = random.Random(0)
    functions = [f"def {rng.choice('abcd')}{i}(x):\n    return x + {rng.randrange(99)}"
                 for i in range(300)]
    Path("prose.txt").write_text("\n\n".join(functions))
    return "prose.txt"


# ---- gradients ----------------------------------------------------------------------------------

def mismatch(f, grad, way, size):
    """Relative error of the gradient `grad` along `way` against df/dt, by a 4-point stencil.

    Relative to what its terms would give without cancelling; `size` is that of f's terms, below
    1e-6 of which there is only rounding. A wrong gradient differs from two steps that agree; a
    draw at a kink, where none agree, is rejected."""
    analytic = former = (grad * way).sum()
    scale = max(abs(analytic), np.sqrt(((grad * way)**2).sum()), 1e-6 * size, 1e-300)
    for h in (1e-3, 1e-4, 1e-5, 1e-6):
        numeric = (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)
        if abs(numeric - former) < 1e-6 * scale:
            return abs(numeric - analytic) / scale
        former = numeric
    reject()

def check_model(phases=settings.default.phases, **fixed):
    """Fails unless every parameter's gradient is the derivative of the loss, or if one changed."""
    @given(cfg=configs(**fixed), seed=SEEDS, data=st.data())
    @settings(phases=phases)
    def check(cfg, seed, data):
        params, ids, targets = drawn(cfg, seed, data.draw(st.integers(1, cfg.n_ctx)))
        loss, grads = sg.loss_and_grads(given_params := on_device(params), ids, targets, cfg)
        assert same(given_params, params)
        assert float(loss) == pytest.approx(loss_of(params, ids, targets, cfg), rel=1e-12)
        assert list(grads) == list(params) == list(sg.shapes(cfg))
        rng = np.random.default_rng(seed)
        for name, w in params.items():
            way = randoms(rng, *w.shape)
            assert grads[name].shape == w.shape
            assert mismatch(lambda t: loss_of({**params, name: w + t * way}, ids, targets, cfg),
                            host(grads[name]), way, float(loss)) < 1e-6, name
    check()

def test_gradient_of_every_parameter_is_the_derivative_of_the_loss(backend):
    check_model()

def overwrite_rows(ids, rows, V):  # wrong: rows that share an id should add up
    out = np.zeros((V, rows.shape[1]))
    out[ids] = rows
    return out

# (function, i, change): what the function returns at i is changed; without i, what it is.
PLANTS = [(f"{op}_backward", 0, lambda g: 1.01 * g) for op in (
    "embedding", "rmsnorm", "linear", "abstopk", "activation", "attention", "softmax",
    "cross_entropy")]
PLANTS += [
    ("linear_backward", 1, lambda dw: 1.01 * dw), ("linear_backward", 2, lambda db: 0 * db),
    ("attention_backward", 1, lambda dk: 1.01 * dk), ("attention_backward", 2, lambda dv: -dv),
    ("softmax_backward", 1, lambda dsink: -dsink), ("scatter_rows", None, overwrite_rows),
    ("relative_bias_backward", 0, lambda dtable: np.roll(dtable, 1, axis=1)),
    ("rmsnorm_backward", None, lambda dout, cache: dout * cache[1]),
    ("abstopk_backward", None, lambda dout, mask: dout)]

@pytest.mark.parametrize("name, i, change", PLANTS)
def test_an_error_planted_in_any_op_is_caught(name, i, change, monkeypatch):
    real = getattr(sg, name)

    def planted(*args):
        out = real(*args)
        return (*out[:i], change(out[i]), *out[i + 1:]) if type(out) is tuple else change(out)
    monkeypatch.setattr(sg, name, change if i is None else planted)
    with pytest.raises(AssertionError):
        check_model([Phase.generate], n_layer=1, sink=True, positions="relative", afrac=0.5,
                    act="gelu")

@pytest.mark.parametrize("backend, factor, status", [
    ("numpy", 1, 0), ("strict", 1, 0), ("cupy", 1, 0), ("numpy", 1.01, 1), ("numpy", math.nan, 1)],
    indirect=["backend"])
def test_gradcheck_checks_the_config_it_is_given(backend, factor, status, capsys, monkeypatch):
    """And can fail. A third activation is one line of one table, whose name --act takes."""
    monkeypatch.setattr(sg, "use_device", quiet)  # the backend stays
    monkeypatch.setitem(sg.ACTIVATIONS, "square", lambda x: (x * x, factor * 2 * x))
    real, shares = sg.loss_and_grads, set()
    monkeypatch.setattr(sg, "loss_and_grads", lambda *a: (shares.add(a[3].afrac), real(*a))[1])
    line = "--gradcheck --act square --afrac 1/4 --positions learned --no-sink --no-bigram"
    with np.errstate(invalid="ignore"):
        ended, out, _ = run_main(capsys, *line.split())
    assert (ended, shares) == (status, {0.25})
    assert "wpe" in out and not re.search("sink|relbias|bigram", out)

def test_gradcheck_accuses_no_right_model_at_a_near_tie(capsys, monkeypatch):
    """As AbsTopK has where its k-th values cross: a jump at the first point that is tried."""
    real, first = sg.embedding, []

    def jumping(ids, wte, wpe):
        first[:] = first or [wte[0, 0].copy()]
        out, cache = real(ids, wte, wpe)
        return out + (wte[0, 0] > first[0]), cache
    monkeypatch.setattr(sg, "embedding", jumping)
    assert run_main(capsys, "--gradcheck")[0] == 0

@pytest.mark.parametrize("site", [*sg.SITES, "final"])
def test_gradcheck_catches_a_forgotten_backward_of_a_hook_point(site, capsys, monkeypatch):
    """Without AbsTopK no parameter's gradient shows it; circuits would get no gradient there."""
    real = sg.hook_point_backward
    monkeypatch.setattr(sg, "hook_point_backward", lambda dout, cache: dout if (
        cache[2].endswith(site)) else real(dout, cache))
    status, out, _ = run_main(capsys, "--gradcheck", "--afrac", "1")
    wrong = re.findall(r"^\S*?(\w+) .* \d\.\de(?:\+|-0[0-5])", out, re.M)
    assert status == 1 and {*wrong} - {"largest"} == {site}

def test_a_cache_that_no_backward_took_is_an_error(capsys, monkeypatch):
    """An op without its backward is one line that names it."""
    real = sg.mlp_layer

    def longer(x, p, i, cfg, hook, cache):
        y = real(x, p, i, cfg, hook, cache)
        _, cache[f"h{i}.more"] = sg.rmsnorm(y)
        return y
    monkeypatch.setattr(sg, "mlp_layer", longer)
    assert_refused(capsys, "cache of h0.more, h1.more", "--gradcheck")


# ---- the model ----------------------------------------------------------------------------------

@given(seed=SEEDS, dtype=FLOATS, level=st.sampled_from([-1000, 0, 1000]),
       sink=st.sampled_from([-1000, 0, 1000, None]))
def test_softmax_equals_softmax_written_out(backend, seed, dtype, level, sink):
    """Also where exp would overflow, or all of a row underflow, without a shift."""
    logits = (level + 3 * randoms(np.random.default_rng(seed), 2, 3, 5, 5)).astype(dtype)
    logits[..., np.triu(np.ones((5, 5), bool), 1)] = -np.inf
    own = np.full((2, 3, 5, 1), -np.inf if sink is None else sink)
    weights, cache = sg.softmax(dev(logits), None if sink is None else dev(
        own[0, :, 0, 0].astype(dtype)))
    z = np.concatenate([logits, own], axis=3)
    expected = np.exp(z - np.logaddexp.reduce(z, 3, keepdims=True))
    assert np.allclose(np.concatenate([*map(host, cache)], axis=3), expected, 1e-5, 1e-7)
    assert np.array_equal(host(weights), host(cache[0]))

@pytest.mark.parametrize("ids", [
    [[1, 2]], None, *map(np.array, ([[0.5, 1.0]], [[True]], [[280]], [[-1]])),
    *(np.ones(shape, int) for shape in [(2,), (1, 1, 1), (1, 9), (0, 3), (1, 0)])])
def test_wrong_ids_and_places_raise_value_error(ids):
    """As inputs and as targets: of a wrong type, shape or range, or of unequal shapes."""
    params, cfg, two = sg.views(sg.init_flat(tiny()), tiny()), tiny(), np.zeros((2, 8), int)
    good = np.zeros(np.shape(ids) or (1, 2), int)
    for wrong in (ids, good), (good, ids), (two, two[:1]):
        with pytest.raises(ValueError, match="ids must be"):
            sg.loss_and_grads(params, *wrong, cfg)
    for wrong, at in (ids, None), (two, [0, -1]), (two, [8, 0]), (two, [0]):
        with pytest.raises(ValueError, match="ids must be|at must be"):
            sg.forward(params, wrong, cfg, at=at)

class Push:
    """A hook that does AbsTopK, adds `amount` at one site and notes what passes."""

    def __init__(self, where=None, amount=None):
        self.where, self.amount = where, amount
        self.seen, self.back, self.k, self.masks = {}, {}, {}, {}

    def forward(self, site, x, k):
        x, self.masks[site] = sg.abstopk(x, k)
        if site == self.where:
            x = x + dev(self.amount).reshape(x.shape)
        self.seen[site], self.k[site] = host(x), k
        return x

    def backward(self, site, dx):
        self.back[site] = host(dx)
        return sg.abstopk_backward(dx, self.masks[site])

def hooked_grads(params, ids, cfg, cotangent, hook=None, at=None):
    """Logits and the gradients of sum(cotangent * logits)."""
    logits, cache = sg.forward(on_device(params), ids, cfg, hook, at)
    return host(logits), sg.backward(dev(cotangent), cache, cfg)

@given(cfg=configs(), seed=SEEDS, data=st.data())
def test_hooks_see_every_site_and_places_give_what_the_whole_gives(backend, cfg, seed, data):
    """A hook gets every site, its k and its derivative; one that does AbsTopK leaves all bit for
    bit as it is. Logits and gradients at places are those of the whole, and the logits those of
    the row's tokens so far alone."""
    params, ids, _ = drawn(cfg, seed)
    rng, rows = np.random.default_rng(seed), np.arange(len(ids))
    full, few, at = Push(), Push(), rng.integers(0, ids.shape[1], len(ids))
    some, every = randoms(rng, len(ids), cfg.vocab_size), np.zeros((*ids.shape, cfg.vocab_size))
    every[rows, at] = some
    logits, grads = hooked_grads(params, ids, cfg, every, full)
    plain_logits, plain_grads = hooked_grads(params, ids, cfg, every)
    assert np.array_equal(logits, plain_logits) and same(grads, plain_grads)
    sites = [f"h{i}.{site}" for i in range(cfg.n_layer) for site in sg.SITES] + ["final"]
    assert list(full.seen) == sites and sorted(full.back) == sorted(sites)
    for site, k in full.k.items():
        width = cfg.d_model * (1 if site == "final" else sg.SITES[site.split(".")[1]].width)
        assert k == (width if site == "final" else max(1, int(cfg.afrac * width)))
        assert full.seen[site].shape == full.back[site].shape == (ids.size, width)
    site = data.draw(st.sampled_from(sites[-9:]))
    way = randoms(rng, *full.back[site].shape)
    assert mismatch(
        lambda t: (logits_of(params, ids, cfg, Push(site, t * way)) * every).sum(),
        full.back[site], way, abs(logits * every).sum()) < 1e-6
    few_logits, few_grads = hooked_grads(params, ids, cfg, some, few, at)
    assert np.allclose(few_logits, logits[rows, at], 1e-12, 1e-13)
    assert all(np.allclose(host(few_grads[name]), host(g), 1e-9, 1e-12)
               for name, g in grads.items())
    assert same(hooked_grads(params, ids, cfg, some, None, at)[1], few_grads)
    for site, dx in full.back.items():  # the same, on all rows or on those asked for
        if len(few.back[site]) < len(dx):
            dx = dx.reshape(*ids.shape, -1)[rows, at]
        assert np.allclose(few.back[site], dx, 1e-9, 1e-12), site
    for row, t, z in zip(ids, at, few_logits):
        assert np.allclose(logits_of(params, row[None, :t + 1], cfg)[0, t], z, 1e-9, 1e-12)

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

@given(shape=st.sampled_from([(1,), (9,), (4999,), (5, 9), (2, 3, 9), (3, 1536)]),
       share=st.floats(0, 1), kind=KINDS, dtype=FLOATS, seed=SEEDS)
@settings(max_examples=60)
def test_abstopk_keeps_exactly_k_the_first_of_equals(backend, shape, share, kind, dtype, seed):
    """Ties let no more through, zeros count as values, and k >= width is the identity."""
    x, k, expected = signed(kind, shape, dtype, seed), 1 + int(share * shape[-1]), np.zeros(shape)
    for at in np.ndindex(shape[:-1]):
        expected[at][first_largest(x[at], k)] = 1
    given_x = dev(x)
    out, mask = sg.abstopk(given_x, k)
    assert np.array_equal(host(given_x), x) and np.array_equal(host(out), np.where(expected, x, 0))
    if k >= shape[-1]:
        assert out is given_x and mask is None
    else:
        for found in mask, sg.topk_mask(abs(given_x), k):
            assert np.array_equal(host(found), expected)

@given(shape=st.tuples(*[st.integers(2, 9)] * 2), kind=KINDS, dtype=FLOATS, seed=SEEDS,
       axis=st.sampled_from([0, 1]), data=st.data())
@settings(max_examples=40)
def test_keep_largest_keeps_exactly_k(backend, shape, kind, dtype, seed, axis, data):
    """Each neuron's j largest, then the largest of the rest, the first of equals."""
    w, first, mask = signed(kind, shape, dtype, seed), np.zeros(shape, bool), np.zeros(shape, bool)
    j = data.draw(st.integers(0, shape[1 - axis]))
    k = data.draw(st.integers(max(1, j * shape[axis]), w.size))
    for neuron, chosen in zip(np.moveaxis(w, axis, 0), np.moveaxis(first, axis, 0)):
        chosen[first_largest(neuron, j)] = True
    order = sorted(np.ndindex(shape), key=lambda at: (not first[at], -abs(w[at])))
    mask[tuple(zip(*order[:k]))] = True
    sg.keep_largest(cut := dev(w), k, j, axis)
    assert np.array_equal(host(cut), np.where(mask, w, 0))

def exact_gelu(x):
    """(GELU, its derivative, the cumulative normal distribution) by math.erf."""
    phi = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
    return x * phi, phi + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi), phi

@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-6), (np.float64, 1e-12)])
def test_gelu_is_the_exact_one(backend, dtype, tolerance):
    """Not the tanh approximation; nor is its normal distribution, which NumPy lacks."""
    x = np.array([*np.linspace(-10, 10, 20001), 0.0, -0.0, 1e-30, -1e-30, 30, -30], dtype)
    found = *sg.gelu(dev(x)), sg.normal_cdf(dev(x), dev(np.exp(-x * x / 2)))
    for got, exact, share in zip(map(host, found), exact_gelu(x.astype(float)), (1, 1, 1 / 4)):
        assert got.dtype == dtype and abs(got - exact).max() < tolerance * share


# ---- schedules, optimizer, sparsity -------------------------------------------------------------

@given(steps=st.integers(1, 400), ends=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
       target=st.floats(1e-3, 1), warmup=st.floats(0, 1), sharkfin=st.booleans())
@example(steps=10, ends=[0.5, 0.5], target=0.1, warmup=0.5, sharkfin=True)
@example(steps=10, ends=[1.0, 1.0], target=0.1, warmup=0.0, sharkfin=True)
def test_density_and_learning_rate_follow_their_schedules(steps, ends, target, warmup, sharkfin):
    """1, a straight line, its target to the last bit; warm-up x decay x a fin that ends at 1."""
    cfg = tiny(steps=steps, anneal_start=ends[0], anneal_end=ends[1], warmup=warmup, lr=0.5,
               density=target, sharkfin=sharkfin)
    start, end = ends[0] * steps, min(ends[1] * steps, steps - 1)  # the last step is at the target
    seen = np.array([sg.density_at(target, step, cfg) for step in range(steps + 1)])
    assert (np.diff(seen) <= 0).all() and seen[-1] == seen[-2] == target
    for step, density in enumerate(seen[:-1]):
        part = 1.0 if step >= end else 0.0 if step <= start else (step - start) / (end - start)
        assert density == pytest.approx(1 - (1 - target) * part, abs=1e-12)
        ramp = min(1, (step + 1) / max(1, warmup * steps)) * (1 - step / steps)
        fin = (target / density)**0.5 if sharkfin else 1
        assert sg.learning_rate(step, cfg) == pytest.approx(0.5 * ramp * fin)

def steps_of(cfg, flat, ids, targets):
    """Train on one batch: (step, loss) after each step of the program's own loop."""
    m, v = sg.xp.zeros_like(flat), sg.xp.zeros_like(flat)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sg, "draw_batch", lambda *_: (ids, targets))
        for step, loss in sg.training_steps(flat, m, v, 0, {}, cfg):
            yield step, float(loss)

GOLDEN = {  # by activation, and whether AbsTopK's share falls to 1/2 or is 1/2 from the start
    ("gelu", False):
        [5.7052392595, 5.2838777187, 5.1047718781, 4.9013638892, 4.7184798029, 4.579711079],
    ("gelu", True):
        [5.746815381, 5.3247545647, 5.0823061497, 4.9120254013, 4.7405894787, 4.7000887656],
    ("relu", False):
        [5.7922591506, 5.4489075482, 5.2245935276, 4.9700519215, 4.7489982468, 4.5405991767],
    ("other", False):  # other settings of the optimizer; parameters for more than one chunk
        [6.3667908829, 6.08694829, 5.7083130399, 5.2726520994, 4.9429657892, 4.6830653055]}
OTHER = dict(grad_scale="clip", beta1=0.5, beta2=0.9, eps=1e-3, lr=0.05, weight_decay=0.5,
             min_per_neuron=6, density=0.1, vocab_size=520, afrac=1.0, sink=False)

@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("act, falls", GOLDEN)
def test_golden_loss_trace(backend, act, falls, bits, monkeypatch):
    """Six steps on a fixed batch: any change of the arithmetic shows, also of a GPU's kernels. In
    the end as many weights are left as the config says, and of each neuron at least j."""
    error = 1e-9 if bits == 64 else 2e-3 if falls else 1e-6  # one near tie falls the other way
    more = dict(gelu=dict(positions="learned"), relu=dict(act="relu"),
                other=dict(OTHER, positions="none"))[act]
    cfg = tiny(**dict(steps=6, lr=0.02, anneal_start=0.0, anneal_end=0.6, dtype=f"float{bits}")
               | more)
    if not falls:
        monkeypatch.setattr(sg, "annealed_config", lambda step, cfg: cfg)
    ids = np.arange(cfg.batch_size * (cfg.n_ctx + 1)).reshape(cfg.batch_size, -1)**2 * 7 % 61
    flat = dev((np.sin(np.arange(sg.n_params(cfg)) * 1.7) * 0.1).astype(cfg.dtype))
    losses = [loss for *_, loss in steps_of(cfg, flat, ids[:, :-1], ids[:, 1:])]
    assert losses == pytest.approx(GOLDEN[act, falls], rel=error)
    for name, w in sg.views(host(flat), cfg).items():
        left, m = np.count_nonzero(w), sg.block_matrix(name)
        if m or name in sg.EMBEDDINGS:
            least = cfg.min_per_neuron * w.shape[m.neurons] if m else 0
            assert left == max(round((1 if m else 4) * cfg.density * w.size), least)
            assert not m or ((w != 0).sum(1 - m.neurons) >= cfg.min_per_neuron).all()
        else:
            assert left > 0.9 * w.size

@pytest.mark.parametrize("density", [1.0, 0.1])
def test_one_batch_is_overfitted(density):
    cfg = tiny(density=density, steps=120, lr=0.05, bigram=False, d_model=32, dtype="float32",
               positions="learned", anneal_end=0.3, weight_decay=0.0)
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (cfg.batch_size, cfg.n_ctx + 1))
    first, *_, last = (x for _, x in steps_of(cfg, sg.init_flat(cfg), ids[:, :-1], ids[:, 1:]))
    assert first == pytest.approx(math.log(cfg.vocab_size), rel=0.02) and last < 0.1


# ---- tokenizer, tasks ---------------------------------------------------------------------------

TEXTS = st.text(st.sampled_from("aab \n_1(=\"'é"), max_size=40) | st.text(max_size=60)

@functools.cache
def python_tokenizer():
    """512 tokens from a part of the standard library."""
    return sg.Tokenizer.learn(sg.read_documents("stdlib", 0.3, quiet), 512)

def slow_bpe(texts, vocab_size):
    """Byte-pair encoding as in a textbook: recount everything, replace everywhere."""
    words = [list(piece.encode()) for t in texts for piece in sg.PIECES.findall(t)]
    merges = []
    while len(merges) < vocab_size - 257:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if counts[best] < 2:
            break
        merges.append(best)
        for word in words:
            for i, _ in enumerate(word):  # which becomes shorter
                if tuple(word[i:i + 2]) == best:
                    word[i:i + 2] = [256 + len(merges)]
    return merges, [i for word in words for i in word]

@given(texts=st.lists(TEXTS, max_size=6), size=st.integers(257, 300))
@settings(max_examples=100)
def test_tokens_are_those_of_textbook_bpe_and_give_any_string_back(texts, size):
    learned = sg.Tokenizer.learn(texts, size)
    merges, expected = slow_bpe(texts, size)
    assert learned.merges == merges
    assert [i for text in texts for i in learned.encode(text)] == expected
    for text, tok in itertools.product(texts, (learned, python_tokenizer())):
        ids = tok.encode(text)
        assert tok.decode(ids) == text and tok.encode(text) == ids
        assert all(0 <= i < 257 + len(tok.merges) and i != tok.EOT for i in ids)

for test in [x for name, x in globals().items() if name.startswith("test_")]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pytest asks for a file that lists its marks
        pytest.mark.quick(test)  # all so far: gradients and the core

def test_examples_in_docstrings_are_true():
    failed, tried = map(sum, zip(*map(doctest.testmod, (tasks, sg, prune))))
    assert tried and not failed

@pytest.mark.parametrize("split", tasks.SPLITS)
@pytest.mark.parametrize("task", list(tasks.TASKS))
def test_pairs_are_different_repeatable_and_fair(task, split):
    """Each pair fits the default context, and its answers keep the prompts' own tokens."""
    found, tok = tasks.pairs(task, 40, 7, split), python_tokenizer()
    assert len(found) == len({pair.prompts for pair in found}) == 40
    assert tasks.pairs(task, 15, 7, split) == found[:15] != tasks.pairs(task, 15, 8, split)
    with pytest.raises(tasks.TaskError, match="1, not 0"):
        tasks.pairs(task, 0, 7, split)
    rows = zip(*tasks.task_prompts(tok, found, sg.Config.n_ctx))
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
    assert len(tasks.TASKS) == 20 and {task.__name__ for task in tasks.LATE} < tasks.TASKS.keys()
    for seed, field in itertools.product(range(20), ("words", "verbs", "scope")):
        pools = [set(getattr(tasks.Writer(random.Random(seed), split), field))
                 for split in tasks.SPLITS]
        assert len(set.union(*pools)) == sum(map(len, pools)), field
    names = [name for s in tasks.SPLITS for group in tasks.NAME_GROUPS[s] for name in group]
    assert len(set(names)) == len(names) > 100

def test_idioms_are_valid_python_and_repeatable():
    texts, again = ([tasks.idiom(random.Random(seed)) for seed in range(300)] for _ in range(2))
    assert texts == again and len(set(texts)) > 290 and all(map(ast.parse, texts))
    assert tasks.idiom_documents(5000) == tasks.idiom_documents(5000)

@pytest.mark.parametrize("prompt, right, wrong, said", [
    ("aaa", "a", ";", "changes"), ("aaa", ";", "a", "changes"), ("x", ";", ";", "decides"),
    ("x", "=", "", "decides")])
def test_answers_that_merge_or_do_not_decide_are_refused(prompt, right, wrong, said):
    tok = sg.Tokenizer.learn(["aaaa aaaa x= x="], 262)
    with pytest.raises(ValueError, match=said):
        tasks.deciding_tokens(tok, prompt, right, wrong)

@given(seed=SEEDS, n=st.integers(1, 40), size=st.sampled_from([1, 50, 2000]))
def test_score_equals_the_losses_written_out(seed, n, size):
    """Prompt by prompt, without overflow. Prompts come in parts, padded no more than needed."""
    rng = np.random.default_rng(seed)
    logits, last = size * rng.standard_normal((n, 9)), rng.integers(0, 9, n)
    right, wrong = np.array([rng.permutation(9)[:2] for _ in range(n)]).T
    prompts = tasks.Prompts(rng.integers(0, 9, (n, 9)), last, right, wrong, np.ones(n))
    expected = [(max(0, z[w] - z[r]) + math.log1p(math.exp(-abs(z[w] - z[r]))),
                 math.log(sum(math.exp(v - max(z)) for v in z)) + max(z) - z[r],
                 z[r] > z[w]) for z, r, w in zip(logits, right, wrong)]
    found = tasks.score(logits.copy(), prompts)
    assert found == pytest.approx(np.mean(expected, axis=0), rel=1e-9, abs=1e-12)
    assert sorted(i for index, _ in prompts.parts() for i in index) == list(range(n))
    for index, part in prompts.parts():
        assert np.array_equal(part.ids, prompts.ids[index, :last[index].max() + 1])

OWN_TASKS = {  # a file of tasks, the first of which is asked for: what is said
    "def mine(w): return ('if a', ' =', ''), ('a', ' +', '')\ndef _no(w): pass": None,
    "def f(w): return ('if a', ' =', ''), ('a', ' +', '')\nf.__doc__ = 5": None,
    "x = 1": "no function", "def var_if(w): pass": "already", "1 / 0": "division",
    "def compare(w): pass": "already", "import sys; sys.exit(3)": "SystemExit", "(": "SyntaxError",
    **{f"def odd(w): {body}": "odd must return two sides" for body in (
        "return None", "return [('a', 'b', '')] * 3", "return [(1, 2, 3)] * 2", "return 1 / 0",
        "raise SystemExit(5)")}}

@pytest.mark.parametrize("text, said", OWN_TASKS.items())
def test_tasks_of_ones_own_are_added_or_refused(text, said, capsys):
    """A file adds its functions of one argument. What is wrong with it is one line."""
    write({"own.py": text.encode()})
    name = (re.findall(r"def (\w+)", text) or ["odd"])[0]
    line = f"{name} --n=1 --tasks=own.py"
    if said:
        assert_refused(capsys, said, *line.split(), main=tasks.main)
        return
    out = ran(capsys, line, tasks.main)
    assert out.startswith(f"== {name}: ") and out.count("| ") > 1
    assert list(tasks.TASKS)[20:] == [name] and tasks.added == [os.path.abspath("own.py")]

@pytest.mark.parametrize("line, said", [
    ("nonsense", "nonsense"), ("var_swop", "var_swap"), ("--sede 3", "--sede"),
    *((f"--n {n}", "--n") for n in ("0", "x", "10001")), ("var_swap --split tset", "eval"),
    *((f"--tasks {path}", "no such file") for path in ("none", "pipe", ".")),
    ("var_swap --n 2", None), ("--idioms", None), ("", None)])
def test_command_line_of_tasks_shows_or_refuses(line, said, capsys):
    """A pipe is not waited for."""
    os.mkfifo("pipe")
    if said:
        assert not assert_refused(capsys, said, *line.split(), main=tasks.main)
    else:
        assert ran(capsys, line, tasks.main).count("\n") > 5


# ---- training and checkpoints -------------------------------------------------------------------

@pytest.fixture
def slow_clock(monkeypatch):
    """Each look at the clock is 50 seconds later, so that a run saves itself at each report."""
    looks = itertools.count(step=50)
    monkeypatch.setattr(sg, "time", types.SimpleNamespace(perf_counter=lambda: next(looks)))

@pytest.mark.parametrize("dtype, act, stops", [
    ("float32", ctrl_c, [1]), ("float64", ctrl_c, [5, 8]), ("float64", ctrl_c, [10]),
    ("float32", lambda: 1 / 0, [7])])
def test_a_resumed_run_equals_a_whole_one(prose, backend, dtype, act, stops, slow_clock):
    """A crashed one goes on from its automatic save. Other data or another config is refused."""
    whole = sg.train(tiny(dtype=dtype, out="whole.npz"), log=quiet)
    cfg, handler = tiny(dtype=dtype, out="cut.npz"), signal.getsignal(signal.SIGINT)
    for i, stop in enumerate(stops):
        def log(line):
            if re.match(rf" *{stop}( +\S+){{6}}$", line):  # the report of this step
                act()
        with pytest.raises((KeyboardInterrupt, ZeroDivisionError), match="--resume|division"):
            sg.train(cfg, i > 0, log)
        assert signal.getsignal(signal.SIGINT) is handler
        assert sg.partial_path(cfg.out).exists() and not Path(cfg.out).exists()
    before, text = files(), Path(prose).read_text()
    for n_layer, word, said in (1, "return", "config"), (3, "return", "config"), (2, "x", "data"):
        Path(prose).write_text(text.replace("return", word))
        with pytest.raises(sg.UserError, match=f"other {said}"):
            sg.train(dataclasses.replace(cfg, n_layer=n_layer), True, quiet)
    write({prose: text.encode()})
    assert files() == before
    assert same(sg.train(cfg, True, quiet).params, whole.params)
    assert same(sg.load_model("cut.npz").params, whole.params)
    assert not sg.partial_path(cfg.out).exists()

WIDE = dict(batch_size=48, n_ctx=64, steps=3)  # enough tokens for several shards

def test_config_and_data_alone_decide_a_run(prose):
    """Not threads, nor what BLAS is told: the parameters are the same bit for bit, and equal runs
    write equal files. The text of a model is windows of what it was trained on."""
    cfg, runs = tiny(**WIDE, dtype="float32", idioms=0.5, max_mb=0.02), []
    for threads in (1, 1, 2, 4, 0):
        model = sg.train(dataclasses.replace(cfg, threads=threads), log=quiet)
        runs.append((model.params, Path("model.npz").read_bytes()))
    assert runs[0][1] == runs[1][1] and all(same(runs[0][0], run[0]) for run in runs)
    streams = sg.load_corpus(cfg, quiet).train.values()
    assert model.text.shape == (64, 64) and all(stream[0] == model.tok.EOT for stream in streams)
    for row in model.text.astype(np.uint16):
        assert any(row.tobytes() in stream.tobytes() for stream in streams)
    wide = flags(d_model=128, d_head=16, n_ctx=64, batch_size=8, dtype="float32")
    runs = [(program(sg.__file__, *wide, OPENBLAS_NUM_THREADS=n), Path("model.npz").read_bytes())
            for n in "12"]
    assert runs[0][0].returncode == 0 and runs[0][1] == runs[1][1]

@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("rows", [49, 4])  # in the end fewer than there are shards
def test_the_shards_of_a_batch_add_up_to_its_gradient(rows, processes, monkeypatch):
    """Over the threads of a process, and over the processes of mpirun."""
    cfg = tiny(**{**WIDE, "batch_size": 49, "threads": 2})
    params, ids, targets = drawn(cfg, 2)
    batch = params, ids[:rows], targets[:rows], cfg
    monkeypatch.setattr(sg, "summed", lambda loss, flat: (loss, flat))
    parts = []
    for i in range(processes):
        one = types.SimpleNamespace(rank=i, size=processes)
        monkeypatch.setattr(sg, "processes", lambda one=one: one)
        parts.append(sg.batch_gradient(*batch))
    loss, flat = map(sum, zip(*parts))
    whole_loss, grads = sg.loss_and_grads(*batch)
    assert sg.n_shards(cfg) > 2 and loss == pytest.approx(whole_loss, rel=1e-12)
    assert np.allclose(flat, flat_of(grads), 1e-9, 1e-12)

@pytest.mark.parametrize("threads", [1, 2])
def test_parallel_keeps_the_order_and_hides_no_error(threads):
    """Also in a process that was forked, which has no threads of the pool."""
    assert sg.parallel(lambda x: x * x, range(5), threads) == [0, 1, 4, 9, 16]
    with pytest.raises(ZeroDivisionError):
        sg.parallel(lambda x: 1 / x, [1, 0], threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends it if it hangs
        os._exit(sum(sg.parallel(abs, range(4), threads)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 6

@pytest.mark.parametrize("factor, step, said", [
    (math.nan, 4, "step 4"), (math.nan, 12, "step 12"), (1, 4, "not finite before step 5"),
    (1, 12, "a weight is no longer finite")])
def test_a_diverging_run_is_refused(prose, factor, step, said, capsys, monkeypatch):
    """Where the loss or only a weight is not finite; the former checkpoint stays as it was."""
    write({"model.npz": checkpoint_bytes()})
    real, count = sg.batch_gradient, itertools.count(1)

    def planted(*args):
        loss, grad = real(*args)
        if next(count) == step:
            grad[0], loss = math.nan, loss * factor
        return loss, grad
    monkeypatch.setattr(sg, "batch_gradient", planted)
    with np.errstate(all="ignore"):
        assert_refused(capsys, said, *flags(steps=12))

@given(seed=st.integers(0, 99), prompt=st.text(max_size=12))
def test_samples_are_repeatable_and_greedy_at_temperature_zero(backend, seed, prompt):
    model = small_model()
    model = model._replace(params=on_device(model.params))
    one, again, other = (sg.sample(model, prompt, 9, seed=s) for s in (seed, seed, seed + 1))
    assert one == again != other and sg.sample(model, prompt, 0) == prompt
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
    with pytest.raises(tasks.TaskError, match="at least 1"):
        sg.evaluate_tasks(on_dev, 0)

@given(cfg=configs(), seed=SEEDS)
def test_a_checkpoint_gives_back_what_was_saved(cfg, seed):
    params, text, _ = drawn(cfg, seed)
    state = dict(m=randoms(np.random.default_rng(seed), sg.n_params(cfg)), step=np.array(3))
    tok = sg.Tokenizer([(97, 97)] if cfg.vocab_size > 257 else [])
    for model in sg.Model(params, cfg, tok, text), sg.Model(params, cfg, tok, text, state):
        sg.save_model("model.npz", model)
        loaded = sg.load_model("model.npz")
        assert same_model(loaded, model) and loaded.text.dtype == np.int64

@functools.cache
def checkpoint_bytes():
    """A whole checkpoint, as a file's content."""
    sg.save_model("whole.npz", small_model())
    content = Path("whole.npz").read_bytes()
    Path("whole.npz").unlink()
    return content

def test_a_checkpoint_of_another_forward_pass_is_told_of_and_loaded(backend, capsys, monkeypatch):
    """LayerNorm in place of RMSNorm fits the same parameters. One line on stderr says so."""
    write({"model.npz": checkpoint_bytes()})
    sg.load_model("model.npz")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sg, "rmsnorm", lambda x, real=sg.rmsnorm: real(
        x - x.mean(1, keepdims=True)))
    assert same_model(sg.load_model("model.npz"), small_model())
    assert re.fullmatch("model.npz: .* other logits .*\n", capsys.readouterr().err)

SHAPES = sg.shapes(tiny())

@pytest.mark.parametrize("own, said", [
    (SHAPES | {"h0.mlp.bgate": (5,)}, "h0.mlp.bgate"), (SHAPES | {"head.w": (7,)}, "head.w"),
    ({name: SHAPES[name] for name in SHAPES if name != "wte"}, "wte"),
    (dict(reversed(SHAPES.items())), "order")])
def test_a_checkpoint_of_other_parameters_is_refused_and_the_first_is_named(
        own, said, monkeypatch):
    """The source has one more, as a gated MLP does, one less, or others: views would shift."""
    write({"model.npz": checkpoint_bytes()})
    monkeypatch.setattr(sg, "shapes", lambda cfg: own)
    with pytest.raises(sg.UserError, match=f"parameter {said} is"):
        sg.load_model("model.npz")

def load_or_refuse(content):
    """What load_model makes of a file of this content: None if it is refused as damaged."""
    write({"model.npz": content})
    try:
        return sg.load_model("model.npz")
    except sg.UserError as e:
        assert "model.npz" in str(e) and "\n" not in str(e)

def test_a_truncated_checkpoint_or_a_changed_array_is_refused():
    """Compressed or not; not even a smaller shape or type in a large array's header passes."""
    large = small_model()._replace(text=np.ones((1024, 8), int))
    for state in {}, dict(step=np.array(3)):
        sg.save_model("model.npz", large._replace(state=state))
        whole = Path("model.npz").read_bytes()
        assert not any(load_or_refuse(whole[:cut]) for cut in range(0, len(whole), 997))
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
    model = load_or_refuse(bytes(content))
    assert model is None or same_model(model, small_model())

class Payload:
    def __reduce__(self):  # pickled, it creates a file when it is loaded
        return open, ("payload-ran", "w")

CONFIG, FIVE = dataclasses.asdict(tiny()), np.packbits(np.arange(sg.n_params(tiny())) < 5)

@pytest.mark.parametrize("changes, said", [
    *(({name: None}, name) for name in ("format", "shapes", "nonzero", "values", "config",
                                         "merges", "text", "logits")),
    (dict(format="sparsegpt-0"), "not of this version"),
    (dict(text=np.full((4, 8), 280)), "token ids"), (dict(logits=np.zeros(99)), "model.npz"),
    (dict(text=np.zeros((4, 9))), "ids must be"), (dict(text=np.zeros((1025, 8), int)), "text"),
    (dict(m=np.zeros(5)), "moments"),
    *((dict(values=values, nonzero=FIVE), said) for values, said in [
        (np.zeros(4), "params"), (np.full(5, np.nan), "finite"), (np.zeros(5, "f4"), "float32")]),
    *((dict(config=json.dumps({**CONFIG, name: value})), said) for name, value, said in [
        ("d_head", 5, "d_head"), ("unknown", 5, "unknown"), ("n_layer", 1, "h1.attn.wqkv")]),
    (dict(config="{"), "model.npz"), (dict(config="[]"), "model.npz"),
    (dict(shapes="[]"), "model.npz"), (dict(merges=np.array([[97, 257]])), "merge"),
    (dict(merges=np.array([[-1, 97]])), "merge"), (dict(merges=np.arange(3)), "model.npz"),
    (dict(merges=np.array([[97, 97]] * 99)), "more tokens"),
    *(({name: np.array([Payload()], object)}, "allow_pickle")
      for name in ("format", "values", "config", "merges", "text")),
    (dict(more=np.zeros(1)), "parts"), (dict(text=np.zeros(1 << 22)), "parts"),
    (dict(config=json.dumps({**CONFIG, "d_model": 1 << 12})), "parts"),
    (dict(merges=np.array([[97, 97]] + [[257 + i] * 2 for i in range(22)])), "too long")])
def test_a_checkpoint_that_does_not_fit_is_refused(changes, said):
    """Pickles are not loaded, and a small file takes little memory."""
    arrays = {**np.load(io.BytesIO(checkpoint_bytes())), **changes}
    np.savez("model.npz", **{name: a for name, a in arrays.items() if a is not None})
    with pytest.raises(sg.UserError, match=said):
        sg.load_model("model.npz")
    assert os.listdir() == ["model.npz"]

@pytest.mark.parametrize("kind", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_checkpoint_packed_in_another_way_is_refused(kind):
    """These can hold a thousand times more than deflate can, and are as slow."""
    whole = zipfile.ZipFile(io.BytesIO(checkpoint_bytes()))
    with zipfile.ZipFile("model.npz", "w", kind) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    with pytest.raises(sg.UserError, match="not packed"):
        sg.load_model("model.npz")


# ---- files and signals --------------------------------------------------------------------------

def fail_halfway(f, **arrays):
    f.write(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")

@pytest.mark.parametrize("name, fail, error", [
    ("np.savez_compressed", fail_halfway, sg.UserError),
    ("np.savez_compressed", lambda f, **_: ctrl_c(), KeyboardInterrupt),
    ("os.replace", lambda *_: open("missing/file"), sg.UserError),
    ("os.fsync", lambda *_: open("missing/file"), sg.UserError)])
def test_a_failing_write_leaves_the_former_file_alone(name, fail, error, monkeypatch):
    write({"model.npz": checkpoint_bytes()})
    before = files()
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(f"sparsegpt.{name}", fail)
        sg.save_model("model.npz", small_model(seed=1))
    assert files() == before

def test_writes_keep_modes_and_links_and_never_meet():
    """A file that others may not read stays so. Checks and other writes of the same name, as of a
    process of the same number in another container, do not touch what is being written."""
    write({"real/text": b""})
    os.chmod("real/text", 0o600)
    Path("link").symlink_to("real/text")

    def outer(f):
        f.write(b"outer")
        sg.check_output("link")
        sg.write_text("real/text", "inner")
    sg.write_whole("link", outer)
    assert files() == {Path("link"): b"outer", Path("real/text"): b"outer"}
    assert os.path.islink("link") and os.stat("link").st_mode & 0o777 == 0o600
    texts, umask = [str(i) * 10**5 for i in range(8)], os.umask(0o027)
    sg.parallel(lambda text: sg.write_text("new", text), texts, 4)
    os.umask(umask)
    assert Path("new").read_text() in texts and os.stat("new").st_mode & 0o777 == 0o640
    assert sorted(os.listdir()) == ["link", "new", "real"]

@pytest.mark.parametrize("moment", ["adam", "np.savez", "print_results", "np.savez_compressed"])
@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGHUP, signal.SIGINT],
                                     [signal.SIGTERM]])
def test_signals_at_any_moment_leave_a_whole_model_or_state(
        prose, moment, signals, capsys, monkeypatch):
    """In a step, in a write and after all of them; a second one changes nothing. The command that
    is named then resumes, and does not open data that is only named in the state's file."""
    whole, strikes, real = sg.train(tiny(steps=6), log=quiet), itertools.count(), sg
    for part in moment.split("."):
        real = getattr(real, part)
    Path("model.npz").unlink()

    def strike(*args, **more):
        if moment != "adam" or next(strikes) == 2:
            for number in signals:
                signal.raise_signal(number)
        return real(*args, **more)

    with monkeypatch.context() as patch:
        if moment == "np.savez":  # which writes the state of an interrupted run
            adam, steps = sg.adam, itertools.count()
            patch.setattr(sg, "adam", lambda *a: (adam(*a), next(steps) == 2 and ctrl_c()))
        patch.setattr(f"sparsegpt.{moment}", strike)
        status, _, err = run_main(capsys, *flags(steps=6))
    assert (status, err.count("\n")) == (130, 1) and "Traceback" not in err
    done = moment in ("print_results", "np.savez_compressed")
    assert sorted(map(str, files())) == sorted([prose, "model.npz" + ".partial" * (not done)])
    if not done:
        hint = re.search(r"python sparsegpt.py (--resume .*)", err)[1]
        assert_refused(capsys, "--data prose.txt", "--resume", "--out", "model.npz")
        assert run_main(capsys, *hint.split())[::2] == (0, "")
    assert same(sg.load_model("model.npz").params, whole.params)

def test_ignored_signals_stay_ignored(monkeypatch):
    """As those of nohup; and handlers are put back."""
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    with sg.signals_to(sg.note), pytest.raises(KeyboardInterrupt):
        ctrl_c()

@pytest.mark.parametrize("name", ["sparsegpt.py", "prune.py", "tasks.py", "extras/compare.py"])
def test_ctrl_c_while_the_modules_load_ends_a_program_without_a_word(name):
    write({"slow/numpy.py": b"import signal; signal.raise_signal(signal.SIGINT)"})
    done = program(HERE / name, "--help", PYTHONPATH=f"slow:{HERE}")
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")

def fill_disk(monkeypatch, spare, kind=sg.UserError):
    """From now on no file can be written, unless `spare`: then in the folder of that name."""
    real = sg.write_whole
    Path("spare").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", os.path.abspath("spare"))

    def write(path, fill):
        if "spare" not in Path(path).parts or not spare:
            error = sg.UserError if path.suffix == ".partial" else kind
            raise error(f"cannot write {path}: No space left on device")
        real(path, fill)
    monkeypatch.setattr(sg, "write_whole", write)

@pytest.mark.parametrize("kind", [sg.UserError, KeyError])
@pytest.mark.parametrize("spare", [True, False])
def test_a_full_disk_costs_no_training(prose, spare, kind, slow_clock, capsys, monkeypatch):
    """An automatic save that fails is tried again. The last one goes elsewhere, whatever went
    wrong."""
    whole = sg.train(tiny(steps=6), log=quiet)
    fill_disk(monkeypatch, spare, kind)
    status, out, err = run_main(capsys, *flags(steps=6))
    assert (status, err.count("\n")) == (2, 1) and re.search("write .*model.npz: No space", err)
    assert "the run goes on" in out
    kept = list(Path("spare").rglob("model.npz"))
    assert all(str(path) in err for path in kept) and len(kept) == spare
    assert all(same(sg.load_model(path).params, whole.params) for path in kept)

@pytest.mark.parametrize("main, line, place", [
    (sg.main, " ".join(flags(out="a/link")), "model.npz"),
    (prune.main, "else_elif --model model.npz", "circuits/cue.json")])
def test_of_two_runs_that_write_the_same_files_one_is_refused(prose, main, line, place, capsys):
    """Also through a link. It touches nothing of the other's; what a dead one has left is in
    nobody's way, and is cleared away."""
    sg.save_model("model.npz", small_model(n_ctx=128))
    write({"a/x": b"", "circuits/x": b""})
    Path("a/link").symlink_to("../model.npz")
    folder, name = os.path.split(place)
    left = [Path(folder, f".{name}.abc_defg.unfinished")]
    others = [Path(x) for x in (".model.npz.2.abcdefgh.unfinished", "circuits/.b.unfinished",
                                ".x.unfinished")]
    write({path: b"" for path in left + others})
    with sg.locked(Path(folder or place).resolve()):
        assert not left[0].exists()
        write({left[0]: b"the working run's"})
        assert_refused(capsys, "another process writes", *line.split(), main=main)
    lock = Path("circuits/.lock" if folder else ".model.npz.lock")
    write({path: b"" for path in (*left, lock)})
    assert main(line.split()) in (0, 2)  # no pair of prompts needs to be of use to this model
    assert not left[0].exists() and not lock.exists() and all(map(Path.exists, others))

def test_a_lock_hides_nothing():
    """The message of a run whose folder is gone at its end comes through."""
    with pytest.raises(sg.UserError, match="where it was saved"):
        with sg.locked(sg.check_output("new/model.npz")):
            shutil.rmtree("new")
            raise sg.UserError("where it was saved")

@pytest.mark.parametrize("end", ["| true", "2>&-", ">&-", ">/dev/full"])
def test_output_that_nobody_takes_does_not_end_the_work(prose, end):
    """A reader that goes away is no error; a full disk is one. Where there is no stderr, a file
    that is opened then may get its number."""
    full = end == ">/dev/full"
    for program in [sg.__file__, *flags()], [tasks.__file__]:
        line = shlex.join([sys.executable, *program])
        done = subprocess.run(["bash", "-c", f"set -o pipefail; {line} {end}"], text=True,
                              capture_output=True)
        assert (done.returncode, done.stderr.count("\n")) == (2 * full, full)
    assert sg.load_model("model.npz").cfg == tiny(steps=3)

@given(text=st.text())
def test_output_is_written_at_once_and_never_commands_a_terminal(text):
    """What the stream's encoding lacks, too, is written out."""
    raw = io.BytesIO()
    stream = sg.Output(io.TextIOWrapper(io.BufferedWriter(raw), "ascii"))
    print(text, file=stream)
    seen = raw.getvalue().decode("ascii")
    assert all(c.isprintable() or c in "\n\t" for c in seen)
    assert seen == text + "\n" or not (text.isascii() and text.isprintable())
    assert sg.one_line(text).isprintable()

@pytest.mark.skipif(not (shutil.which("mpirun") and importlib.util.find_spec("mpi4py")),
                    reason="needs mpirun and mpi4py")
def test_processes_of_mpirun_train_as_one(prose):
    """The same losses and parameters to rounding, in one set of lines. A mistake ends them all."""
    command = [sys.executable, sg.__file__, *flags(idioms=0.5, max_mb=0.02), "--batch_size=5"]
    env = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    runs = []
    for mpirun in [], ["mpirun", "-n", "2"]:
        done = subprocess.run([*mpirun, *command], env=env, capture_output=True, text=True)
        runs.append((re.findall(r"^ +\d+ +\d\.\d+ .*\d\.\d{4} ", done.stdout, re.M),
                     sg.load_model("model.npz").params))
        Path("model.npz").unlink()
    assert len(runs[0][0]) == 3 and runs[0][0] == runs[1][0]
    assert all(np.allclose(w, runs[1][1][name], 1e-9, 1e-12) for name, w in runs[0][1].items())
    assert subprocess.run(["mpirun", "-n", "2", *command, "--batch_size=1"], env=env).returncode


# ---- the command line ---------------------------------------------------------------------------

@pytest.mark.parametrize("line, said", [
    *((line, line.split()[0]) for line in (
        "--density 0", "--density nan", "--density x", "--density 1/0", "--vocab_size 65536",
        "--act tanh", "--batch_size 2.5", "--lr inf", "--steps " + "9" * 5000, "--data short.txt",
        "--anneal_end 0.2 --anneal_start 0.5", "--batch_size 9000", "--min_per_neuron 17")),
    *((f"--sample x --out {name}", name)
      for name in ("none.npz", "garbage.npz", "cut.npz", "hollow")),
    *((f"--resume --out {name}", said) for name, said in [
        ("none.npz", "no unfinished run"), ("cut.npz", "cut.npz.partial"),
        ("odd.npz", "not the state"), ("run.npz --lr 1", "no --lr")]),
    ("--densty 0.1", "unrecognized"), ("--d_head 5", "does not divide"),
    ("--data missing", "missing"), ("--data hollow", "no file"),
    ("--data binary", "not UTF-8"), ("--data prose.txt,,", "--data ''"),
    ("--out prose.txt/model.npz", "prose.txt"), ("--out hollow", "hollow"),
    *((f"--out={name}", "not the name of a file") for name in (
        "new/", "new/..", "", "pipe", "/dev/null", "new.npz.partial")),
    *((f"--out={name}", "cannot write") for name in ("loop", "loop/x", 5000 * "a/" + "x")),
    ("--sample x --out pipe", "not a file"), (f"--out {'x' * 239}", "name too long"),
    *((f"--out {name}", "is not a checkpoint") for name in (
        "short.txt", "other.zip", "format.npz", "cut.npz")),
    # A lock that cannot be had, or else both would run: a folder, a link to a file.
    *((f"--out {name}", "cannot lock") for name in ("folder.npz", "link.npz")),
    ("--out run.npz", "unfinished run"), ("--sample x --bench", "not allowed with"),
    ("--dense --quick", "not allowed with")])
def test_wrong_input_is_refused_and_nothing_is_written_over(line, said, prose, capsys):
    whole = checkpoint_bytes()
    Path("hollow").mkdir()
    os.mkfifo("pipe")
    os.symlink("loop", "loop")
    os.mkdir(".folder.npz.lock")
    os.symlink("short.txt", ".link.npz.lock")
    write({"binary/a": b"\xff\xfe", "short.txt": b"x", "garbage.npz": pickle.dumps(Payload()),
           "cut.npz": whole[:-99], "cut.npz.partial": whole[:999], "run.npz.partial": whole,
           "model.npz": whole})
    flat = np.zeros(sg.n_params(tiny()))
    sg.save_model("odd.npz.partial", small_model()._replace(
        state=dict(m=flat, v=flat, digest="x", step=np.array("x"))))
    np.savez("format", format="my own")
    np.savez("other", np.zeros(3))
    Path("other.npz").rename("other.zip")
    base = [] if re.match("--(sample|resume)", line) else flags()
    assert_refused(capsys, re.escape(said), *base, *line.split(" "))

@pytest.mark.parametrize("error", [
    RuntimeError("can't start new thread"), RecursionError("two\nlines \x1b[2J"), MemoryError(),
    AssertionError(), OSError(errno.ENAMETOOLONG, "File name too long"), FloatingPointError("x"),
    tasks.TaskError("x")])
def test_an_error_of_any_kind_is_one_line(error, capsys, monkeypatch):
    """And status 2. Streams and handlers are those of before."""
    def act(argv):
        raise error
    before = sys.stdout, sys.stderr, signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sg, "act", act)
    assert assert_refused(capsys, "^sparsegpt.py: error: ") == ""
    assert (sys.stdout, sys.stderr, signal.getsignal(signal.SIGINT)) == before

@pytest.mark.parametrize("name, value", [
    ("SPARSEGPT_DEVICE", "gpu"), ("SPARSEGPT_DEVICE", "nonsense"), ("PMI_SIZE", "x")])
def test_a_device_or_a_number_of_processes_is_as_asked_or_refused(
        name, value, capsys, monkeypatch):
    assert "NumPy" in sg.use_device("cpu") and sg.xp is np
    monkeypatch.setitem(sys.modules, "cupy", None)  # as if it were not installed
    monkeypatch.setattr(sg, "processes", functools.cache(sg.processes.__wrapped__))
    monkeypatch.setenv(name, value)
    assert_refused(capsys, f"(SPARSEGPT_DEVICE|invalid).*{value}", *flags())

def test_a_matrix_that_is_not_in_the_table_is_an_error_at_the_start(capsys, monkeypatch):
    """A gate's, say, would be neither sparse nor counted nor pruned."""
    real = sg.shapes
    monkeypatch.setattr(sg, "shapes", lambda cfg: real(cfg) | {"h0.mlp.wgate": (4, 4)})
    assert_refused(capsys, "h0.mlp.wgate .* not in MATRICES", "--gradcheck")

def test_documents_are_read_and_split_with_nothing_lost_unsaid(prose):
    """Undecodable files are counted. A document is held out or trained on, not both. Locks and
    other hidden files are no data."""
    write({"mixed/a": b"good text", "mixed/b": b"\xff\xd8", "mixed/c": b"a\0b", "mixed/d": b"",
           "mixed/.model.npz.lock": b"5", "mixed/.git/x": b"x"})
    lines = []
    assert sg.read_documents("mixed", log=lines.append) == ["good text"]
    assert "2 files" in "".join(lines)
    text = Path(prose).read_text()
    for docs in [text], [text.replace("\n\n", "\n")]:  # with blank lines and without
        train, val = sg.split_documents(docs)
        assert train and val and not set(train) & set(val)
        assert sorted("".join(train + val)) == sorted(docs[0])

@pytest.mark.parametrize("n_ctx, idioms", [(8, 0.5), (128, 0.5), (8, 0)])
def test_a_run_prints_its_scores(prose, n_ctx, idioms, capsys, monkeypatch):
    """Training, with tasks that are scored, too long for the context, or of no interest as there
    are no idioms."""
    monkeypatch.setattr(sg, "evaluate_tasks", functools.partial(sg.evaluate_tasks, n=3))
    monkeypatch.setattr(sg, "IDIOM_BYTES", 30_000)
    out = ran(capsys, " ".join(flags(n_ctx=n_ctx, idioms=idioms)), sg.main)
    assert f"ln(vocabulary) is {math.log(280):.4f}" in out and "saved to model" in out
    assert ("for_while" in out) == (n_ctx == 128)
    assert ("20 not scored" in out) == (n_ctx == 8 and idioms > 0)

def test_every_config_field_is_a_flag_with_help_and_a_preset_changes_defaults():
    """What is given goes before the preset."""
    parser = sg.make_parser()
    assert vars(parser.parse_args([*flags(), "--density", "1/4"])) == {**CONFIG, "steps": 3}
    text = " ".join(parser.format_help().split())
    for field in dataclasses.fields(sg.Config):
        assert re.search(rf"--{field.name} .*?\w.*?\(default ", text)
    for name, preset in sg.PRESETS.items():
        given_flags = vars(parser.parse_args([f"--{name}", "--steps=9"]))
        assert sg.configure(given_flags) == sg.Config(**{**preset, "steps": 9})

def test_without_a_model_sample_takes_the_included_one(capsys, monkeypatch):
    """And says so on stderr. The default file goes before it."""
    monkeypatch.setattr(sg, "__file__", os.path.abspath("sparsegpt.py"))
    for path, said in ("docs/long.npz", "there is no out/sparse.npz.* docs/long.npz.*\n"), (
            "out/sparse.npz", ""):
        write({path: checkpoint_bytes()})
        status, out, err = run_main(capsys, "--sample", "def")
        assert status == 0 and out.startswith("def") and re.fullmatch(said, err)

def test_sparsegpt_alone_in_a_folder_is_whole(prose):
    """Checked, timed, trained on one's own text, interrupted, resumed and sampled; what needs
    tasks.py or extras/ says so in a line."""
    shutil.copy(sg.__file__, "sparsegpt.py")
    line = ["sparsegpt.py", *flags(steps=40)]
    for more, said in (["--gradcheck"], "largest relative error"), (
            ["--bench", "--quick", "--n_ctx=8", "--steps=1"], "batch 8 x 8, "):
        done = program("sparsegpt.py", *more)
        assert done.returncode == 0 and said in done.stdout and not done.stderr
    with subprocess.Popen([sys.executable, *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as run:
        for text in run.stdout:
            if re.match(" +1 ", text):  # the first step is done
                run.send_signal(signal.SIGINT)
    assert run.returncode == 130 and Path("model.npz.partial").exists()
    resumed = program("sparsegpt.py", "--resume", "--data", prose, "--out", "model.npz")
    assert resumed.returncode == 0 and "of 40" in resumed.stdout
    sampled = program("sparsegpt.py", "--sample", "def f(", "--out", "model.npz")
    assert sampled.returncode == 0 and sampled.stdout.startswith("def f(")
    asked = program(*line, "--idioms=0.5")
    assert asked.returncode == 2 and asked.stderr.count("\n") == 1 and "tasks.py" in asked.stderr
    assert {path.name for path in Path().iterdir()} == {"sparsegpt.py", prose, "model.npz"}


# ---- the source ---------------------------------------------------------------------------------

SOURCES = [path.relative_to(HERE).as_posix() for path in [*HERE.glob("*.py"),
                                                         *HERE.glob("extras/*.py")]]

def test_files_import_in_one_direction_and_extras_are_called_late():
    """tasks <- sparsegpt <- prune <- extras, and docs/ is only read. Each program names each of
    the extras in one place."""
    house = {"tasks", "sparsegpt", "prune", "extras", "docs"}

    def used(name, before=""):
        text = (HERE / name).read_text()
        found = re.findall(rf"^{before}(?:import|from) (\w+)(?:, (\w+))?", text, re.M)
        return {x for two in found for x in two} & house
    assert used("tasks.py", " *") == set() and used("sparsegpt.py", " *") == {"tasks"}
    assert used("sparsegpt.py") == set()  # late: in a function
    assert used("prune.py", " *") == {"tasks", "sparsegpt"}
    assert not any("docs" in used(name, " *") for name in SOURCES)
    for name in "sparsegpt.py", "prune.py":
        calls = re.findall(r'\bextra\("(\w+)"', (HERE / name).read_text())
        assert len(calls) == len(set(calls)) > 0

def test_nothing_happens_when_a_file_is_imported():
    """It defines; handlers, paths and folders stay. Only BLAS is told to take one thread."""
    names = [name[:-3].replace("/", ".") for name in SOURCES
             if not re.search("test_|gpu|__init__", name)]
    code = f"""if True:
        import importlib, os, signal, sys
        def state():
            handlers = [signal.getsignal(i) for i in range(1, 32)]
            environment = [name for name in os.environ if not name.endswith("_NUM_THREADS")]
            return handlers, environment, sys.path[:], sys.argv, os.listdir()
        before = state()
        for name in {names}:
            importlib.import_module(name)
            assert state() == before, name"""
    done = program("-c", code, PYTHONPATH=str(HERE), PYTHONDONTWRITEBYTECODE="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

def test_part_one_is_short_and_plain_and_says_what_it_calls():
    """The method, which people read, has no threads, files, messages or checks in it."""
    text = Path(sg.__file__).read_text()
    part_one, _, part_two = text.partition("\n# Part II")
    method = part_one.partition("# Part I: the method")[2]
    nodes = list(ast.walk(ast.parse(method)))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    called = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    assert part_one.count("\n") <= 620, "Part I is read in one go: move machinery to Part II"
    assert not names & {"threading", "signal", "os", "open", "print"}
    assert not any(isinstance(node, ast.Raise) for node in nodes)
    theirs = set(re.findall(r"^def (\w+)", part_two, re.M))
    [comment] = re.findall(r"\n# Of Part II (.*\n# .*)\n", part_one)
    assert called & theirs == set(re.findall(r"\w+", comment)) & theirs


# ---- circuits: nodes, edges, losses -------------------------------------------------------------

def drawn_mask(cfg, seed, density=0.6):
    """(model, frozen, prompts, mask) at random: zero weights, deleted nodes, often edges."""
    rng, V = np.random.default_rng(seed), cfg.vocab_size
    params = {name: w * (rng.random(w.shape) < density) if sg.is_matrix(name) else w
              for name, w in drawn(cfg, seed)[0].items()}
    n, T = 2 * rng.integers(1, 12), rng.integers(1, cfg.n_ctx + 1)
    answers = np.array([rng.permutation(V)[:2] for _ in range(n)]).T
    prompts = tasks.Prompts(rng.integers(0, V, (n, T)), rng.integers(0, T, n), *answers,
                            np.tile([1, -1], n // 2))
    nodes = np.concatenate([rng.random(part.stop - part.start) < rng.choice([0, 0.3, 0.7, 1])
                            for part in prune.node_slices(cfg).values()])
    edges = {name: rng.random(params[name].shape) < 0.5 for name in prune.matrices(cfg)}
    model = sg.Model(on_device(params), cfg, sg.Tokenizer([]), prompts.ids)
    return (model, rng.standard_normal(len(nodes)), prompts,
            prune.CircuitMask(nodes, edges if rng.random() < 0.7 else None))

WRITTEN_OUT = dict(relu=lambda y: np.maximum(y, 0), square=lambda y: y * y,
                   gelu=lambda y: exact_gelu(y.ravel())[0].reshape(y.shape))

def slow_circuit(model, frozen, ids, mask, full=None):
    """({site: nodes [T, C]}, logits [T, V]) of a circuit on one prompt, written out. full: the
    nodes of the full model, which tell what is active in place of AbsTopK among kept nodes."""
    cfg, seen, at = model.cfg, {}, prune.node_slices(model.cfg)
    p, T, D = {name: host(w) for name, w in model.params.items()}, len(ids), cfg.d_head

    def node(site, x):
        keep = np.flatnonzero(mask.nodes[at[site]])
        seen[site] = np.tile(frozen[at[site]], (T, 1))
        seen[site][:, keep] = 0
        for t, row in enumerate(x):
            k = len(row) if site == "final" else cfg.n_active(len(row))
            gate = full and k < len(row)
            best = keep[full[site][t, keep] != 0 if gate else first_largest(row[keep], k)]
            seen[site][t, best] = row[best]
        return seen[site]

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
        q, k, v = (node(h + site, part) for site, part in zip("qkv", y))
        z = np.zeros_like(x)
        for t, head in np.ndindex(T, cfg.d_model // D):
            own = slice(head * D, head * D + D)
            weights = np.exp(k[:t + 1, own] @ q[t, own] / math.sqrt(D) + (
                p[h + "attn.relbias"][head, t::-1] if cfg.positions == "relative" else 0))
            total = weights.sum() + (np.exp(p[h + "attn.sink"][head]) if cfg.sink else 0)
            z[t, own] = weights @ v[:t + 1, own] / total
        x = x + node(h + "attn_out", linear(z, h + "attn.wo"))
        y = WRITTEN_OUT[cfg.act](linear(node(h + "mlp_in", norm(x)), h + "mlp.wfc"))
        x = x + node(h + "mlp_out", linear(node(h + "neuron", y), h + "mlp.wproj"))
    logits = node("final", norm(x)) @ p["head.w"] + p["head.b"]
    return seen, logits + (p["bigram"][ids] if cfg.bigram else 0)

def slow_logits(model, frozen, prompts, mask, gated=False, restored=None):
    """Logits [n, V] of a circuit, prompt by prompt. restored: nodes beside it [n, nodes], with all
    their edges."""
    every, out = prune.every_node(model.cfg), []
    for i, (ids, last) in enumerate(zip(prompts.ids, prompts.last)):
        full = slow_circuit(model, frozen, ids[:last + 1], every)[0] if gated else None
        own = mask
        if restored is not None:
            edges = mask.edges and {
                name: mask.edges[name] | ~np.outer(mask.nodes[m.source], mask.nodes[m.target])
                for name, m in prune.matrices(model.cfg).items()}
            own = prune.CircuitMask(mask.nodes | restored[i], edges)
        out.append(slow_circuit(model, frozen, ids[:last + 1], own, full)[1][-1])
    return np.array(out)

@given(cfg=configs(), act=st.sampled_from(sorted(WRITTEN_OUT)), seed=SEEDS, crowd=st.booleans())
@settings(max_examples=60)
def test_a_circuit_computes_what_its_definition_says(backend, monkeypatch, cfg, act, seed, crowd):
    """Both runners, written out: AbsTopK among kept nodes, deleted nodes at their frozen values,
    deleted edges at weight x frozen value; logits in the order of the prompts. The two ends: all
    nodes are the model bit for bit, and none is constant. So are the circuit beside restored
    nodes, and the check in which the full model tells what is active. A third activation, added
    to one table, needs no word in prune.py."""
    monkeypatch.setitem(sg.ACTIVATIONS, "square", lambda x: (x * x, 2 * x))
    model, frozen, prompts, mask = drawn_mask(dataclasses.replace(cfg, act=act), seed)
    if crowd:  # heads that are not read compete, too
        mask.nodes[prune.matrices(cfg)["h0.attn.wqkv"].target] = True
        model.params["h0.attn.wo"][:cfg.d_head] = 0
    runners = [kind(model, frozen, prompts) for kind in (prune.PlainRunner, prune.FastRunner)]
    every = prune.every_node(cfg)
    for some in (mask, every.without(range(len(frozen)))):
        plain, fast = (runner.logits(some) for runner in runners)
        assert np.allclose(plain, slow_logits(model, frozen, prompts, some), 1e-9, 1e-9)
        assert np.allclose(fast, plain, 1e-8, 1e-9)
    restored = prune.restored_nodes(len(prompts.last), 1.0, np.random.default_rng(seed), cfg)
    plain = prune.PlainRunner(model, frozen, prompts, restored=restored).logits(mask)
    expected = slow_logits(model, frozen, prompts, mask, restored=restored)
    assert np.allclose(plain, expected, 1e-9, 1e-9)
    logits = logits_of(model.params, prompts.ids, cfg, record := prune.Recorder())
    for seen in None, record.seen:
        hook = prune.Ablation(every.nodes, frozen, cfg, seen)
        assert np.array_equal(logits_of(model.params, prompts.ids, cfg, hook), logits)
    task = types.SimpleNamespace(model=model, frozen_values=frozen, judged=prompts, settings=FEW)
    expected = slow_logits(model, frozen, prompts, mask, gated=True)
    loss, found = prune.logistic(prune.margins(expected, prompts)), prune.check_gated(task, mask)
    assert found["loss"] == pytest.approx(loss, 1e-9) and found["passed"] == (loss <= 0.3)

@pytest.mark.parametrize("site", [
    None, "h0.v", "h0.neuron", "h1.attn_in", "h1.attn_out", "h1.mlp_out", "final"])
def test_a_search_does_without_a_fast_runner_that_differs(cues, monkeypatch, capsys, site):
    """A line says so, and circuits are tried with the plain one. Their loss is the same, on the
    first half of the prompts; masks are learned on all."""
    right = prune.KeptChannels.forward
    monkeypatch.setattr(prune.KeptChannels, "forward", lambda hook, at, x, k: right(
        hook, at, x, k) * (1.1 if at == site else 1))
    task = cue_task()
    said, kind = capsys.readouterr().err, prune.PlainRunner if site else prune.FastRunner
    assert ("does not fit" in said) == bool(site) and type(task.runner) is kind
    mask = prune.CircuitMask(np.random.default_rng(0).random(368) < 0.9)
    half = task.pool.rows(np.arange(32))
    assert len(task.pool.last) == 64 and all(map(np.array_equal, task.judged, half))
    logits = prune.PlainRunner(task.model, task.frozen_values, half).logits(mask)
    assert task.loss(mask) == pytest.approx(tasks.score(logits, half).binary, 1e-4)

class Mixed(prune.Ablation):
    """Ablation with one node at m x + (1 - m) frozen, m more by t than whether it is kept, and x
    what it is or would be if it were kept."""

    def forward(self, site, x, k):
        out, (node, t) = super().forward(site, x, k), self.mixed
        kept, c = host(self.kept(site, x)), node - self.slices[site].start
        if 0 <= c < kept.shape[-1]:
            m = dev(kept[..., c] + t)
            kept[..., c] = True
            frozen = self.frozen_values[site][..., c]
            out[:, c] = m * sg.abstopk(x * dev(kept), k)[0][:, c] + (1 - m) * frozen
        return out

@given(cfg=configs(), seed=SEEDS, data=st.data(),
       where=st.sampled_from(["alone", "beside others", "interchange"]))
def test_the_gradient_of_a_mask_is_the_derivative_of_the_loss(backend, cfg, seed, data, where):
    """What masks are learned by, of kept and of deleted nodes, with AbsTopK and without; alone,
    beside nodes that are restored for some of the prompts, and in place of the other prompt's."""
    model, frozen, prompts, (keep, _) = drawn_mask(cfg, seed)
    if where == "beside others":
        rng = np.random.default_rng(seed)
        keep = keep | prune.restored_nodes(len(prompts.last), 1.0, rng, cfg)
    elif where == "interchange":
        frozen = prune.values_of_other(model, prompts)[1]
    (loss, grad), errors = prune.gradient(model, prompts, keep, frozen), []
    for node in data.draw(st.lists(st.integers(0, keep.shape[-1] - 1), min_size=3, max_size=3)):
        def along(t):
            hook = Mixed(keep, frozen, cfg)
            hook.mixed = node, t
            logits = logits_of(model.params, prompts.ids, cfg, hook, prompts.last)
            return prune.logistic(prune.margins(logits, prompts))
        assert loss == pytest.approx(along(0.0), rel=1e-9)
        errors.append(mismatch(along, grad[node:node + 1], np.ones(1), loss))
    assert max(errors) < 1e-6

@given(n=st.integers(1, 40), largest=st.sampled_from([0.0, 0.5, 1.0]), seed=SEEDS,
       none=st.sampled_from([0.0, 0.25]))
def test_shares_of_restored_nodes_are_spread_evenly_over_the_pairs(n, largest, seed, none):
    """From 0 to the largest, after the part that gets none; the two of a pair have the same."""
    cfg, rng = tiny(n_layer=3, d_model=64), np.random.default_rng(seed)
    nodes = prune.restored_nodes(2 * n, largest, rng, cfg, none)
    assert nodes.shape == (2 * n, prune.n_nodes(cfg)) and np.array_equal(nodes[::2], nodes[1::2])
    spread = np.maximum(0, ((np.arange(n) + 0.5) / n - none) / (1 - none))
    assert np.allclose(np.sort(nodes[::2].mean(1)), largest * spread, atol=1 / n + 0.06)
    assert (nodes[::2].sum(1) == 0).sum() >= int(none * n) if largest else not nodes.any()

@given(cfg=configs(), seed=SEEDS)
def test_interchanged_nodes_have_their_values_on_the_other_prompt(backend, cfg, seed):
    """Prompt by prompt, aligned from the end. What the other does not have, and <start>, stay."""
    model, frozen, prompts, (nodes, _) = drawn_mask(cfg, seed)
    assume(prompts.last.min() > 0)  # after <start> comes a token
    rows, expected = [ids[None, :end + 1] for ids, end in zip(prompts.ids, prompts.last)], []
    for i, ids in enumerate(rows):
        logits_of(model.params, rows[i ^ 1], cfg, record := prune.Recorder())

        class Swap(prune.Recorder):
            def forward(self, site, x, k):
                x, other = host(sg.abstopk(x, k)[0]), host(record.seen[site])
                n, some = min(len(x), len(other)) - 1, nodes[prune.node_slices(cfg)[site]]
                x[len(x) - n:, some] = other[len(other) - n:, some]
                return dev(x)
        expected.append(logits_of(model.params, ids, cfg, Swap())[0, -1])
    found = prune.interchanged(model, prune.seen_pairs(model, prompts), nodes)
    assert np.allclose(found, prune.margins(np.array(expected), prompts), 1e-8, 1e-9)
    if cfg.afrac == 1:  # else AbsTopK chooses among the others alone there
        hook = prune.Ablation(~nodes, prune.values_of_other(model, prompts)[1], cfg)
        assert np.allclose(logits_of(model.params, prompts.ids, cfg, hook, prompts.last), expected)

def test_the_time_that_is_left_counts_all_jobs(monkeypatch, capsys):
    """In the second of four jobs; a stage that begins anew gets half of what was left of it."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = sg.Progress("name", {"a": 0.5, "b": 0.5}, (1, 4, 0.0))
    for now, stage, done, share in ((100, "a", 5, 1.25), (200, "b", 5, 1.75), (300, "b", 0, 1.75)):
        monkeypatch.setattr(sg.time, "perf_counter", lambda now=now: now)
        progress(stage, done, 10)
        assert f"{sg.clock(now * (4 - share) / share)} left" in capsys.readouterr().err

def test_a_circuit_holds_alone_and_beside_others_and_carries_the_answer(cues):
    """Each of the three is asked for. The loss beside others is the mean over the prompts. A node
    carries nothing if no path of the circuit leads from it to the logits."""
    task, mask = cue_task(), found_circuit().mask
    nodes = mask._replace(edges=None)
    assert task.holds(mask) and task.holds(nodes) and task.holds(prune.every_node(wired().cfg))
    runner = prune.PlainRunner(task.model, task.frozen_values, task.judged, restored=(
        prune.restored_nodes(len(task.judged.last), 1.0, np.random.default_rng([0, 1]),
                             task.model.cfg)))
    loss = tasks.score(runner.logits(nodes), task.judged).binary
    assert task.restored_loss(nodes) == pytest.approx(max(loss, task.loss(nodes)), 1e-6)
    for node in "h1.neuron.5", "h0.v.0":
        assert not task.holds(mask.without([prune.node_number(node, task.model.cfg)]))
    for name in "loss", "restored_loss", "carries":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(task, name, lambda *_, name=name: False if name == "carries" else 9.0)
            task.known.clear()
            assert not task.holds(mask)
    idle, start = (np.arange(368) == prune.node_number(name, task.model.cfg)
                   for name in ("h0.neuron.20", "h0.attn_in.0"))
    assert task.carries(nodes, 0.15) and not task.carries(prune.CircuitMask(idle), 0.15)
    swapped = prune.interchanged(task.model, task.pairs_seen, start)  # by what reads it elsewhere
    assert (swapped < 0).all() and not task.carries(prune.CircuitMask(start), 0.15)
    assert prune.check_interchange(task, prune.CircuitMask(start))["overlap"] == 0
    for every, own, said in (-9, -2.25, False), (-9, -3.5, True), (-2, -2, True), (9, 9, True):
        with pytest.MonkeyPatch.context() as patch:  # losses of 0.10, 0.03; 0.13; all nodes fail
            patch.setattr(prune, "interchanged", lambda *x: every if x[-1].all() else own)
            task.known.clear()
            assert task.carries(nodes, 0.15) == said

def test_a_control_is_compared_and_shown_with_the_circuit_at_the_same_stage():
    """A control that was not cleaned is not held against a circuit that was."""
    ranked, cleaned = (dict(stage=name, nodes=9, edges=edges)
                       for name, edges in (("fewest by rank", 10), ("edges cleaned", 4)))
    for stage, edges, passed in (ranked, 20, False), (ranked, 21, True), (cleaned, 9, True):
        result = prune.SearchResult(object(), 0.1, [stage | {"edges": edges}])
        check = prune.check_control("inverted task", result, [ranked, cleaned], 0.15)
        said = " ".join(prune.check_text(check).split())
        assert check["passed"] == passed
        assert f"{edges} edges, for the circuit's 9 and {stage['edges']}" in said
        assert ("both before cleaning" in said) == (stage is ranked)

ENDS = dict(wqkv=["attn_in", "q", "k", "v"], wo=["v", "attn_out"], wfc=["mlp_in", "neuron"],
            wproj=["neuron", "mlp_out"])

def named(mask, model, ends=ENDS):
    """({the kept nodes' names}, {(source, target, matrix): (matrix, row, column)} of the edges),
    counted one by one."""
    kept, edges = {prune.node_name(n, model.cfg) for n in np.flatnonzero(mask.nodes)}, {}
    for name, w in model.params.items():
        if re.match(r"h\d.*\.w", name):
            (h, _, kind), w = name.split("."), host(w)
            source, *targets = ends[kind]
            width = w.shape[1] // len(targets)
            for i, j in np.argwhere(w if mask.edges is None else w * mask.edges[name]):
                two = f"{h}.{source}.{i}", f"{h}.{targets[j // width]}.{j % width}"
                if kept >= set(two):
                    edges[*two, name] = name, i, j
    return kept, edges

@given(cfg=configs(), seed=SEEDS)
def test_edges_are_the_nonzero_weights_between_kept_nodes(backend, cfg, seed):
    """A smaller mask is less by what was asked; the first one stays as it was."""
    model, _, _, mask = drawn_mask(cfg, seed)
    kept, edges = named(mask, model)
    mask = mask._replace(edges=prune.kept_edges(mask, model.params, cfg))
    assert sorted(prune.edge_list(mask.edges)) == sorted(edges.values())
    size = prune.PruningTask.size(types.SimpleNamespace(model=model), mask)
    assert size == (len(kept), len(edges))
    lost, gone = (set(sorted(x)[::2]) for x in (edges, kept))
    less = mask.without([edges[edge] for edge in lost])
    assert named(less, model)[1].keys() == edges.keys() - lost
    less = mask.without([prune.node_number(name, cfg) for name in gone])
    assert named(less, model)[0] == kept - gone and named(mask, model) == (kept, edges)

def test_every_node_has_a_name_and_no_other_name_has_a_node():
    """Names, as the command line and the files have them, in the order of computation."""
    cfg = tiny(n_layer=1, d_model=4)
    names = [f"h0.{site}.{c}" for site in sg.SITES for c in range(16 if site == "neuron" else 4)]
    names += [f"final.{c}" for c in range(4)]
    assert [prune.node_name(n, cfg) for n in range(prune.n_nodes(cfg))] == names
    assert [prune.node_number(name, cfg) for name in names] == list(range(len(names)))
    for bad in ("", "final", "final.4", "final.-1", "final.1.0", "h1.q.0", "h0.q.x", "h0.w.0"):
        with pytest.raises(sg.UserError, match="h0.neuron"):
            prune.node_number(bad, cfg)

def reached(links, found):
    """What paths from the set `found` lead to."""
    more = found | {b for a, b in links if a in found}
    return found if more == found else reached(links, more)

@given(cfg=configs(), seed=SEEDS)
@settings(max_examples=60)
def test_disconnected_nodes_are_the_kept_nodes_on_no_path(cfg, seed):
    """A path search: edges, residual channels, and towards the logits from q and k to v."""
    model, _, prompts, mask = drawn_mask(cfg, seed, 0.15)
    (kept, edges), p, C, D = named(mask, model), model.params, cfg.d_model, cfg.d_head
    links, used = {edge[:2] for edge in edges}, np.unique(prompts.ids)
    for c in range(C):  # every writer of a residual channel leads to every later reader of it
        learned = cfg.positions == "learned" and p["wpe"][:, c].any()
        writers = {"tokens"} if learned or p["wte"][used, c].any() else set()
        for site in prune.node_slices(cfg):
            if site.endswith("_out"):
                writers.add(f"{site}.{c}")
            elif site.endswith(("_in", "final")):
                links |= {(writer, f"{site}.{c}") for writer in writers}
        if p["head.w"][c].any():
            links.add((f"final.{c}", "logits"))
    heads = {(f"h{i}.{x}.{a}", f"h{i}.v.{b}") for i, a, b in np.ndindex(cfg.n_layer, C, C)
             for x in "qk" if a // D == b // D}
    ahead, back = ({link for link in some if kept | {"tokens", "logits"} >= set(link)}
                   for some in (links, links | heads))
    alive = reached(ahead, {"tokens"}) & reached({(b, a) for a, b in back}, {"logits"})
    found = {prune.node_name(n, cfg) for n in prune.disconnected_nodes(mask, model, prompts)}
    assert found == kept - alive


# ---- circuits: cutting down ---------------------------------------------------------------------

@given(data=st.data(), n=st.integers(1, 3000))
@settings(max_examples=60)
def test_bisection_finds_the_fewest_in_few_steps(data, n):
    """The true minimum where more never hurts, or None, in a logarithmic number of steps."""
    least, guess, calls = data.draw(st.integers(0, n + 1)), data.draw(st.integers(0, n)), []
    order = np.random.default_rng(n).permutation(n)

    def good(mask):
        calls.append(mask)
        return mask.nodes.sum() >= least
    found, most = prune.bisect(order, good, guess), max(min(least, n), guess)
    assert len(calls) <= 4 + 2 * math.log2(most + 1) and (found is None) == (least > n)
    assert found is None or set(np.flatnonzero(found.nodes)) == set(order[:least])

class Items(frozenset):
    """What cleaning needs of a CircuitMask."""

    def without(self, items):
        return Items(self.difference(items))

@given(n=st.integers(0, 9), seed=SEEDS, monotone=st.booleans(), target=st.floats(0.1, 2))
@settings(max_examples=60)
def test_cleaning_ends_where_nothing_can_go_alone(n, seed, monotone, target):
    """Never where the circuit does not hold, which may be more than its loss; also where some
    items were tried before, with another loss."""
    weights, tried = np.random.default_rng(seed).random(n), dict.fromkeys(range(0, n, 2), 9.0)

    def draw(kept):
        return random.Random(f"{seed} {sorted(kept)}").random() * (len(kept) < n)

    def loss(kept):
        if monotone:
            return sum(w for i, w in enumerate(weights) if i not in kept)
        return 2 * draw(kept)

    def holds(kept):
        return loss(kept) <= target and (monotone or draw(kept) < 0.5)
    task = types.SimpleNamespace(loss=loss, holds=holds,
                                 settings=types.SimpleNamespace(target=target))
    for before in ({}, tried):
        found = prune.delete_greedily(Items(range(n)), sorted, task, quiet, "", before)
        assert holds(found) and not any(holds(found.without([i])) for i in found)

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

def cue(w, form="{cue}{junk}=", cues="<>"):
    """The first token decides: `<ab=` -> `x`, `>ab=` -> `y`."""
    junk = "".join(w.rng.choices("abcd", k=6 if w.large else w.pick(3, 4, 5)))
    return tuple((form.format(cue=c, junk=junk), answer, "") for c, answer in zip(cues, "xy"))

@pytest.fixture
def cues(clean, monkeypatch):
    """Tasks of the network: its own, one that nothing in it decides, one that is too long."""
    monkeypatch.setattr(tasks, "TASKS", dict(
        cue=cue, hopeless=functools.partial(cue, cues="cd"),
        endless=functools.partial(cue, form=9 * "{cue}{junk}=")))
    monkeypatch.setattr(tasks, "surround", lambda w, sides: list(sides))
    prune.say_once.cache_clear()

def wired(**more):
    """The network. Channels from 8 on are busy with something else; v.0 sees `a` and `b` too; in
    its text `=` is rare."""
    cfg = dataclasses.replace(sg.Config(
        n_layer=2, d_model=16, d_head=4, n_ctx=16, vocab_size=258, act="relu", afrac=1.0,
        positions="none", sink=False, bigram=False, threads=1, out="model.npz"), **more)
    rng, p = np.random.default_rng(0), sg.views(np.zeros(sg.n_params(cfg), cfg.dtype), cfg)

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

def cue_task(labels="true", context=None, **changes):
    """A PruningTask of the network. changes: of the settings FEW."""
    few = dataclasses.replace(FEW, **changes)
    context = context or prune.ModelContext(wired(), few.ablation)
    return prune.PruningTask(context.model, context.frozen_values, "cue", few, labels)

@functools.cache
def found_circuit():
    """The Circuit that `prune` finds in the network, in a test with `cues`."""
    return prune.prune(wired(), "cue", FEW)

@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_the_circuit_of_a_network_wired_by_hand_is_found(backend, cues, ablation, monkeypatch):
    """Ground truth: every node and every edge of it, and no other."""
    task = cue_task(ablation=ablation)
    found = prune.search(task, quiet)
    kept, edges = named(found.mask, task.model)
    assert kept == NODES and {*edges.values()} == CIRCUIT.keys()
    anew = cue_task(ablation=ablation)  # losses are remembered by mask: nodes and edges
    edge = next(iter(CIRCUIT))
    for mask in found.mask, found.mask._replace(edges=None), found.mask.without([edge]):
        assert task.loss(mask) == anew.loss(mask) == task.loss(mask)
    assert len(anew.known) == 3
    assert task.full_loss() < 0.05 and found.loss < 0.05 and found.stages[-1] == dict(
        stage="edges cleaned", nodes=11, edges=6, loss=pytest.approx(found.loss))
    # The baseline, attribution, is the gradient on all prompts.
    _, grad = prune.gradient(task.model, task.pool, np.ones(368, bool), task.frozen_values)
    assert (np.diff(grad[prune.rank_by_attribution(task)]) >= -1e-9).all()
    every, stages = prune.every_node(task.model.cfg), []
    monkeypatch.setattr(prune, "TOO_LARGE", task.size(every)[1] - 1)  # a huge one is not cleaned
    assert prune.clean(task, every, lambda *stage: stages.append(stage), quiet) is every
    assert [name for name, *_ in stages] == ["not cleaned: too large"]

def test_the_answers_of_a_control_are_swapped_in_whole_pairs(cues):
    """Inverted: in all, twice is the identity. Nonsense: in about half."""
    true, nonsense, inverted = (
        cue_task(labels).pool for labels in ("true", "nonsense", "inverted"))
    twice = inverted._replace(right=inverted.wrong, wrong=inverted.right, sign=-inverted.sign)
    assert all(map(np.array_equal, twice, true))
    kept = nonsense.right == true.right
    mixed = (np.where(kept, *columns) for columns in zip(true[2:], inverted[2:]))
    assert all(map(np.array_equal, nonsense, (*true[:2], *mixed)))
    assert np.array_equal(kept[::2], kept[1::2]) and 10 < kept[::2].sum() < 22

def test_no_circuit_is_found_where_there_is_none(cues, monkeypatch):
    """The controls: random answers, swapped answers, and the same weights at other places. Masks
    are trained to the same loss, however bad the full model is at a control."""
    context, goals, real = prune.ModelContext(wired()), [], prune.learn_masks
    true, nonsense, inverted = (
        cue_task(labels, context) for labels in ("true", "nonsense", "inverted"))
    control = prune.ModelContext(prune.shuffled(context.model))
    shuffled = prune.PruningTask(control.model, control.frozen_values, "cue", FEW)
    monkeypatch.setattr(prune, "learn_masks", lambda *args: goals.append(args[-1]) or real(*args))
    for task in (true, nonsense, inverted, shuffled):
        goals.clear()
        found = prune.search(task, quiet)
        assert (found.mask is None) == (found.loss > FEW.target) == (task is not true)
        assert goals[0] == pytest.approx(0.045, abs=2e-4)
    assert nonsense.full_loss() > 2 and inverted.full_loss() > 2
    for name, w in context.model.params.items():
        dealt = control.model.params[name]
        assert np.array_equal(np.sort(w, None), np.sort(dealt, None))
        assert np.array_equal(w != 0, dealt != 0)

def test_settings_are_those_of_the_flags_and_checks_never_pass_at_chance():
    given = vars(prune.make_parser().parse_args("cue --pairs 32 --runs 2 --target 0.5".split()))
    assert prune.settings_of(given) == prune.Settings(target=0.5, pairs=32, runs=2)
    assert prune.settings_of(given).limit() == (math.log(2) / 2, "half of chance")
    assert prune.Settings(target=0.15).limit() == (0.3, "twice the target")

@pytest.mark.parametrize("short", [[1], [0], [1, 1, 1], [1, 0, 1]])
def test_if_all_masks_fell_short_one_more_is_trained_to_half_the_goal(short, monkeypatch):
    """Short: it ends over the target, and its ranking needs far more nodes."""
    queue, goals = iter([*short, 0]), []
    task = types.SimpleNamespace(
        settings=dataclasses.replace(FEW, runs=len(short), restore=0.0), full_loss=lambda: 0.05,
        size=lambda mask: (1, 1), holds=lambda mask: mask.nodes.all(),
        restored_loss=lambda mask: 0.0 if mask.nodes.all() else 0.3)
    monkeypatch.setattr(prune, "learn_masks", lambda *args: goals.append(args[-1]) or (
        np.arange(9), np.arange(9) - 8.0 * next(queue)))
    monkeypatch.setattr(prune, "clean", lambda task, mask, *_: mask)
    prune.search(task, quiet)
    assert goals == len(short) * [0.1] + [0.05] * all(short)

def test_masks_are_learned_as_before(cues, monkeypatch):
    """Golden numbers (paper A.5) for a made-up gradient; a query and its key share a mask. Beside
    others, in a quarter of the pairs beside none; in every other step by interchange."""
    rng, kept, answers = np.random.default_rng(1), [], []
    noise, need = 0.2 * randoms(rng, 40, 1) * randoms(rng, 40, 368), 0.2 * randoms(rng, 368)

    def gradient(model, prompts, nodes, frozen):
        kept.append(nodes)
        answers.append({*zip(prompts.sign, prompts.right)})
        by_node = need * (1 + np.atleast_2d(nodes).mean(0)) + noise[len(kept) - 1]
        return FEW.target * (0.5 + 2.5 * (len(kept) - 1) / 39), by_node

    def learn(**settings):
        kept.clear()
        return prune.learn_masks(cue_task(steps=40, **settings), 0.02, 0.06, 0.2, [0, 0], quiet,
                                 FEW.target)
    monkeypatch.setattr(prune, "gradient", gradient)
    order, tau = learn(restore=0.0)
    assert [tau.sum(), abs(tau).sum(), (tau == 1).sum()] == pytest.approx(
        [3.79707625258, 310.274958432, 132], 1e-9)
    assert order[:8].tolist() == [67, 64, 23, 39, 194, 210, 364, 330] and len(kept) == 40
    assert (np.diff(tau[order]) <= 0).all() and sorted(order) == list(range(368))
    slices = prune.node_slices(wired().cfg)
    assert all(np.array_equal(tau[slices[h + "q"]], tau[slices[h + "k"]]) for h in ("h0.", "h1."))
    _, tau = learn()
    assert [tau.sum(), abs(tau).sum(), (tau >= 0).sum()] == pytest.approx(
        [27.9153846739, 36.7392916996, 275], 1e-9)
    for nodes in kept[::2]:
        assert nodes.shape == (16, 368) and np.array_equal(nodes[::2], nodes[1::2])
        assert (nodes == nodes.min(0)).all(1).sum() >= 4
    assert not (nodes == nodes.min(0)).all()
    assert all(nodes.shape == (368,) for nodes in kept[1::2]) and not kept[1].all()
    assert answers[-1] == {(-sign, right) for sign, right in answers[-2]}

def test_the_same_seed_finds_the_same_circuit_with_any_number_of_processes(cues):
    """All that is saved, digit for digit. Where every item is finished, no process is started."""
    one = found_circuit()
    other = prune.prune(wired(threads=3), "cue", FEW, workers=2)
    other.report["model"]["config"]["threads"] = 1
    assert one.report == other.report and np.array_equal(one.mask.nodes, other.mask.nodes)
    assert list(prune.on_cores(abs, [], 2)) == []

def test_a_worker_that_dies_or_another_context_is_an_error(cues):
    """No search goes on without its processes, or with other frozen values than it says. Those
    of resampling change in every run."""
    with pytest.raises(sg.UserError, match="worker process was killed"):
        list(prune.on_cores(os._exit, [0, 1, 2], 2))
    for context, kind in ((prune.ModelContext(wired(), "zero"), "mean"), (None, "resample"),
                          (prune.ModelContext(small_model()), "mean")):
        with pytest.raises(sg.UserError, match="context"):
            prune.prune(wired(), "cue", dataclasses.replace(FEW, ablation=kind), context)


# ---- circuits: what is measured and printed -----------------------------------------------------

@given(cfg=configs(), seed=SEEDS, threads=st.integers(1, 3))
def test_mean_activations_are_those_of_the_model_as_it_runs(backend, cfg, seed, threads):
    """The mean over all tokens, with AbsTopK, in parts of a batch on any number of threads."""
    model, frozen, prompts, _ = drawn_mask(dataclasses.replace(cfg, threads=threads), seed)
    runs = (slow_circuit(model, frozen, ids, prune.every_node(cfg))[0] for ids in prompts.ids)
    mean = np.mean([np.concatenate([x.mean(0) for x in seen.values()]) for seen in runs], 0)
    assert np.allclose(prune.mean_activations(model, prompts.ids), mean, 1e-9, 1e-12)

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
    value = np.concatenate([x[0] for x in seen.values()])
    kept, edges = named(mask, model)
    biases = prune.effective_bias(model, mask, frozen)
    total = {prune.node_name(n, cfg): bias for n, bias in biases.items()}
    assert total.keys() == {name for name in kept if not re.search("_in|final", name)}
    for (source, target, _), (name, i, j) in edges.items():
        total[target] += value[prune.node_number(source, cfg)] * model.params[name][i, j]
    for name, x in total.items():
        x = max(x, 0) if "neuron" in name else x
        assert value[prune.node_number(name, cfg)] == pytest.approx(x, abs=1e-9)

def test_what_is_said_of_the_known_circuit_is_true(cues):
    """Its links, its losses, the walk through a prompt pair, attention, checks."""
    task, circuit = cue_task(), found_circuit()
    model, r, checks = task.model, circuit.report, {c["name"]: c for c in circuit.report["checks"]}
    assert links_of(r) == EDGES | {
        ("h0.attn_out.1", "h1.mlp_in.1"), ("h1.mlp_out.3", "final.3"), ("final.3", "x"),
        ("final.3", "y"), *((token, f"h0.attn_in.{c}") for token in "<>" for c in (0, 4))}
    score = sg.evaluate_tasks(model, 16)["cue"]._asdict()
    assert r["losses"]["full"]["search"] == pytest.approx(score, rel=1e-5)
    [head], example = r["heads"], r["example"]
    assert head["name"] == "h0.head.0" and example["answers"] == ["x", "y"]
    assert example["values"].keys() == NODES
    for row, tokens in enumerate(example["prompts"]):
        ids = [sg.Tokenizer.EOT, *map(ord, tokens[1:])]
        seen, logits = slow_circuit(model, task.frozen_values, ids, circuit.mask)
        for name, values in example["values"].items():
            site, _, channel = name.rpartition(".")
            assert np.allclose(values[row], seen[site][:, int(channel)], atol=2e-3)
        margin = (1 - 2 * row) * (logits[-1, ord("x")] - logits[-1, ord("y")])
        assert example["margins"][row] == pytest.approx(margin, abs=2e-3)
        [[token, weight], *_] = head["attends"][row]["to"]
        assert tokens[1] == token == "<>"[row] and weight > 0.9
        rows = head["attends"][row]["rows"]  # whole patterns, in percent: nothing looks ahead
        assert [len(x) for x in rows] == list(range(1, 1 + len(tokens)))
        assert rows[-1][1] == pytest.approx(100 * weight, abs=0.6)
        assert all(sum(x) == pytest.approx(100, abs=len(x) / 2) for x in rows)
    assert list(checks) == list(prune.CHECKS) and checks["necessity"]["loss"] > 0.5
    failed = {name for name, check in checks.items() if check["passed"] is not True}
    assert failed <= {"necessity", "recall"}  # where others are as important
    own = r["losses"]["circuit"]["search"]["binary"]  # resampling is not the mean once more
    assert checks["resampled ablation"]["loss"] > 1.5 * own > 0
    overlap = prune.attention_overlap(task, circuit.mask)
    assert overlap == {(0, 0): pytest.approx(checks["attention"]["overlap"])}
    less = circuit.mask.without([prune.node_number("h1.neuron.5", model.cfg)])
    assert not prune.check_resampled(task, less)["passed"]

NASTY = "</script><b>\"&' \\\ud800"

def links_of(report):
    """{(from, to)} of all connections, tokens among them."""
    return {(e.get("from", e.get("token")), e.get("to", e.get("token")))
            for kind in ("edges", "residual", "embed", "unembed") for e in report[kind]}

def page(path):
    """The root element of a saved page, which has to be well formed."""
    from xml.etree import ElementTree
    text = Path(path).read_text("utf-8").replace('<meta charset="utf-8">', "")
    return ElementTree.fromstring(text.replace(" hidden>", ">"))


# ---- circuits: files, command lines, the README -------------------------------------------------

def write_circuit():
    """The network and its circuit as files; the latter's content."""
    sg.save_model("model.npz", wired())
    prune.save_circuit("circuits/cue.json", found_circuit())
    return json.loads(Path("circuits/cue.json").read_text())

def test_a_circuit_file_gives_back_the_circuit_and_its_losses(cues, capsys, monkeypatch):
    """Every printed loss comes out again; what is changed, with a right checksum, is seen."""
    write_circuit()
    one = dataclasses.replace(found_circuit(), report=dict(found_circuit().report, doc=NASTY))
    prune.save_circuit("circuits/cue.json", one)
    two, model = prune.load_circuit("circuits/cue.json"), sg.load_model("model.npz")
    assert (two.task, two.settings) == ("cue", one.settings)
    assert named(two.mask, model) == named(one.mask, model)
    context = prune.ModelContext(model, two.settings.ablation)
    assert two.report == json.loads(json.dumps(one.report)) and prune.verify(two, context) == []
    less = two.mask.without([("h0.attn.wo", 0, 1)])
    zero = dataclasses.replace(two.settings, ablation="zero")
    for changed in (dict(mask=less), dict(settings=zero)):
        other = dataclasses.replace(two, **changed)
        assert prune.verify(other, prune.ModelContext(model, other.settings.ablation))
    forged = json.loads(json.dumps(two.report))  # with an edge that is there twice
    forged["edges"].insert(0, forged["edges"][0] | {"weight": 99.0})
    forged["size"]["edges"] += 1
    assert prune.verify(dataclasses.replace(two, report=forged), context)
    two.report["losses"]["circuit"]["held"]["full"] += 0.01
    prune.save_circuit("circuits/cue.json", two)
    out = ran(capsys, "--check circuits/cue.json --model model.npz", status=1)
    assert "losses circuit held full: the file says" in out
    monkeypatch.setattr(prune, "FORMAT", "sparsegpt-circuit-9")
    with pytest.raises(sg.UserError, match="version"):
        prune.load_circuit("circuits/cue.json")

def test_a_check_never_opens_the_model_that_a_circuit_names(cues, capsys, monkeypatch):
    """A file may come from anywhere: the model is that of --model, or the default one."""
    write_circuit()
    os.rename("model.npz", "default.npz")
    monkeypatch.setattr(sg, "default_model", lambda: "default.npz")
    assert found_circuit().report["model"]["path"] == "model.npz"
    ran(capsys, "--check circuits/cue.json")

@pytest.fixture
def brief(cues, monkeypatch):
    """Searches as short as FEW, from the command line too, and a corpus of a few tokens."""
    real, code = prune.settings_of, np.random.default_rng(0).integers(97, 101, 99)
    corpus = sg.Corpus(sg.Tokenizer([]), {}, dict(code=code.astype(np.uint16)), "")
    monkeypatch.setattr(prune, "settings_of", lambda given: dataclasses.replace(
        real(given), steps=60, search_pairs=16))
    monkeypatch.setattr(compare, "SWEEP", (0.3, 0.15))
    monkeypatch.setattr(compare, "AIMS", (0.1,))
    monkeypatch.setattr(sg, "load_corpus", lambda *_: corpus)
    sg.save_model("model.npz", wired())

# {what is said: the commands, without the program's name}
PRUNING = {
    "no node": [f"cue --ablate {node}" for node in (
        "final.99", "final." + "9" * 5000, "h1.head." + "9" * 5000, "h1.head.-1", "final.²")],
    "another model": ["--check circuits/cue.json --model b.npz", "cue --explain --model b.npz",
                      "--check deep.json"],
    "needs one task": ["--ask <", "--explain", "--set final.1=0"],
    "all takes no": ["all --explain", "all --ask <", "all --verbose"],
    "text.txt": [f"{x} text.txt" for x in ("cue --model", "--check", "cue --out", "cue --tasks")],
    "--set": [f"cue --set h1.neuron.5={x}" for x in ("x", "nan", "1e39")], "cue": ["ceu"],
    "not a file": ["cue --model=pipe", "cue --model=", "--check=pipe.json", "--show=pipe.json"],
    "--model": ["cue --model"], "--target": [f"cue --target {x}" for x in ("0", "nan", "5", "x")],
    "--ablation": ["cue --ablation foo", "cue --ablation resample"], "--seeds": ["cue --seeds 0"],
    "context": ["endless", "long_if_held_out", f"cue --ask < --ask {99 * '<'}"],
    "not allowed with": ["cue --ask < --explain"], "unrecognized": ["cue wide --explain"],
    "over the target": ["hopeless", "cue --target 1e-4"], "arguments: --sede": ["cue --sede 3"],
    "a search takes no --answers": ["cue --answers x y"],
    "no --seeds": ["cue --explain --seeds 3"], "no --runs": ["cue --ablate final.1 --runs 2"],
    "none/cue.json": ["cue --explain --out none"],
    "h1.neuron.99": ["cue --set h1.neuron.99=1"], "no --target": ["--check x.json --target 0.5"],
    "c/a": ["cue --out c/a", "cue --out c/a/b"],
    "--runs": ["cue --runs 0", "cue --runs x"], "--pairs": ["cue --pairs 0"],
    "circuit of cue": ["hopeless --explain"], "has more than": ["--show large.json"],
    "h1.neuron.5": ["cue --set h1.neuron.5"], "no --seed": ["cue --ask < --seed 3"],
    "without a task, prune.py takes no --runs": ["--runs 2"], "cut.npz": ["cue --model cut.npz"],
    "none": ["--check none.json", "cue --model none.npz"], "not the name": ["cue --out dirs"],
    "no task": ["cue --check x.json"], "no --model": ["--show cue --model b.npz"],
    "no task ''": ["''"], "no file no/cue;": ["--show no/cue"], "no --out": ["--trace < --out o"],
    "no node 'h1.head.0'": ["cue --set h1.head.0=1"],
    "--seed": ["cue --seed -1", "cue --seed=--"],
    "ymlink loop|name too long": [
        "cue --out loop", f"cue --out {5000 * 'a/'}x"]}
COMPARING = {
    "FILE": [""], "none.npz": ["none.npz"], "cue": ["model.npz --tasks ceu"],
    "one of 0.3": ["model.npz --target 0.4"], "--ablation": ["model.npz --ablation foo"],
    "--runs": ["model.npz --runs 2"], "other text": ["model.npz tokens.npz"]}

@pytest.mark.parametrize("main, said, line", [
    (main, said, line) for main, mistakes in ((prune.main, PRUNING), (compare.main, COMPARING))
    for said, lines in mistakes.items() for line in lines])
def test_a_mistake_is_one_line_and_status_two(brief, main, said, line, capsys, monkeypatch):
    """No traceback, no search, nothing written, nothing printed beside that line."""
    write_circuit()
    other = wired()
    other.params["h1.mlp.wproj"][-1, -1] += 0.001
    sg.save_model("b.npz", other)
    sg.save_model("tokens.npz", other._replace(tok=sg.Tokenizer([(97, 97)])))
    write({"text.txt": b"x", "cut.npz": Path("model.npz").read_bytes()[:-99], "c/a": b"",
           "circuits/hopeless.json": Path("circuits/cue.json").read_bytes(), "large.json": b"",
           "dirs/cue.json/x": b""})
    os.truncate("large.json", 1 << 30)  # all of it a hole
    deep = found_circuit().report
    config = deep["model"]["config"] | {"n_layer": 3}
    prune.save_circuit("deep.json", dataclasses.replace(
        found_circuit(), report=deep | {"model": deep["model"] | {"config": config}}))
    os.mkfifo("pipe")
    os.mkfifo("pipe.json")
    os.symlink("loop", "loop")
    monkeypatch.setattr(prune, "learn_masks", lambda *_: pytest.fail("it searches"))
    monkeypatch.setitem(tasks.TASKS, "long_if_held_out", lambda w: cue(
        w, form=(1 + 8 * w.large) * "{cue}{junk}="))
    line += " --model model.npz" * (main is prune.main and not re.search("--model|--show", line))
    assert assert_refused(capsys, said, *shlex.split(line), main=main) == ""

@pytest.mark.parametrize("spare", [True, False])
def test_a_full_disk_costs_no_circuit(brief, spare, capsys, monkeypatch):
    """It is printed, and saved elsewhere: when its search has ended, and with its checks."""
    fill_disk(monkeypatch, spare)
    status, out, err = run_main(capsys, "cue", "--model", "model.npz", main=prune.main)
    assert status == 2 and "h1.neuron.5 " in out and "other seeds" in out and "No space" in err
    kept = list(Path("spare").rglob("cue.json"))
    assert all(str(path) in err for path in kept) and len(kept) == 2 * spare
    saved = [prune.load_circuit(path).report["checks"] for path in kept]
    assert not spare or found_circuit().report["checks"] in saved

def test_a_circuit_that_is_not_reproduced_replaces_no_other(brief, capsys, monkeypatch):
    """What is read back from its text is measured again, before the former file goes."""
    write_circuit()
    real = prune.parse_circuit

    def damaged(text):
        circuit = real(text)
        return dataclasses.replace(circuit, mask=circuit.mask.without([("h0.attn.wo", 0, 1)]))
    monkeypatch.setattr(prune, "parse_circuit", damaged)
    assert_refused(capsys, "not reproduced", *"cue --model model.npz".split(), main=prune.main)

def test_all_tasks_are_pruned_and_finished_circuits_are_kept(brief, capsys):
    """A task that cannot be pruned ends nothing; a second run does what is missing or damaged."""
    def run(more=""):
        out = ran(capsys, "all --model model.npz --seeds 1 --out circuits " + more)
        assert "11 nodes, 6 edges" in out
        assert all(re.search(f"{task} .*not pruned", out) for task in ("hopeless", "endless"))
        page("circuits/summary.html")
        return files(), "kept" in out
    first, kept = run()
    names = sorted(path.name for path in Path("circuits").iterdir())
    assert not kept and names == ["cue.dot", "cue.html", "cue.json", "summary.html"]
    assert run() == (first, True)
    Path("circuits/cue.html").unlink()  # a run that was stopped before it drew
    assert run() == (first, True)
    write({"circuits/hopeless.json": Path("circuits/cue.json").read_bytes()})  # not its circuit
    assert run()[1]
    Path("circuits/hopeless.json").unlink()
    write({"circuits/cue.json": first[Path("circuits/cue.json")][:-99]})
    assert run() == (first, False) and not run("--target 0.1")[1]
    tasks.TASKS["cue"] = tasks.TASKS["hopeless"]  # not the task that it was
    assert "kept" not in ran(capsys, "all --model model.npz --seeds 1 --out circuits")


# ---- a changed model ----------------------------------------------------------------------------

# (title, module, diff) of the edits in docs/changing.md, and a wrong backward of each.
EDITS = re.findall(r"\*\*(.+?)\*\*[^`]*?\((\w+)\.py\).*?```diff\n(.*?)```",
                   (HERE / "docs" / "changing.md").read_text(), re.S)
WRONG = {"return dx - dx.mean(1, keepdims=True)": "return dx", "dy = dy + dgate": "pass",
         'g["wte"] += g["unembedding"].T': "pass",
         'dy = hook_point_backward(dy, cache.pop(h + "z"))': 'cache.pop(h + "z")'}

@pytest.fixture
def edit(cues, monkeypatch):
    """Applies a diff to a module: what it changes there is defined anew, until the test ends."""
    def forget():  # what was derived from the model's tables
        for cached in prune.node_slices, prune.matrices:
            cached.cache_clear()

    def apply(name, diff):
        module = sys.modules[name]
        text = source = Path(module.__file__).read_text()
        for hunk in re.findall(r"(?:[ -].*\n)+(?:\+.*\n)+", diff):
            old, new = ("".join(line[1:] + "\n" for line in hunk.splitlines() if line[0] in kind)
                        for kind in (" -", " +"))
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        before = set(map(ast.unparse, ast.parse(source).body))
        for node in ast.parse(text).body:
            if ast.unparse(node) not in before:
                name = getattr(node, "name", None) or node.targets[0].id
                monkeypatch.setattr(module, name, None)
                exec(compile(ast.Module([node], []), "diff", "exec"), vars(module))
        forget()
    yield apply
    forget()

@pytest.mark.parametrize("title, module, diff", EDITS, ids=[title for title, *_ in EDITS])
def test_a_changed_model_is_trained_checked_pruned_and_drawn(
        title, module, diff, edit, prose, capsys, monkeypatch):
    """Nothing else has to be told of it: every weight between kept nodes is an edge."""
    kinds = set(prune.ABLATIONS)
    edit(module, diff)
    few = dataclasses.replace(FEW, ablation=([*prune.ABLATIONS.keys() - kinds] or ["mean"])[0],
                              search_pairs=4, steps=5)
    assert run_main(capsys, "--gradcheck")[0] == 0
    model = sg.train(tiny(steps=2, n_ctx=16), log=quiet)
    assert same_model(sg.load_model("model.npz"), model)
    # A task that the bigram table does alone, so that any mask is a circuit.
    monkeypatch.setitem(tasks.TASKS, "cue", functools.partial(cue, form="{junk}{cue}"))
    model.params["bigram"][[ord("<"), ord(">")], [ord("x"), ord("y")]] = 50
    context = prune.ModelContext(model, few.ablation)
    task = prune.PruningTask(model, context.frozen_values, "cue", few)
    mask = prune.CircuitMask(np.random.default_rng(0).random(prune.n_nodes(model.cfg)) < 0.5)
    circuit = prune.make_circuit(context, task, prune.SearchResult(mask, task.loss(mask), []))
    ends, more = {**ENDS, "wgate": ENDS["wfc"]}, "z" in sg.SITES
    kept, edges = named(mask, model, {**ends, "wo": ["z", "attn_out"]} if more else ends)
    assert {(e["from"], e["to"], e["matrix"]) for e in circuit.report["edges"]} == edges.keys()
    assert task.size(mask) == (len(kept), len(edges)) and len(edges) > 50
    prune.save_circuit("cue.json", circuit)
    loaded = prune.load_circuit("cue.json")
    assert prune.verify(loaded, context) == [] and len(loaded.edges) == len(edges)
    draw.write(Path("cue"), loaded)
    assert page("cue.html") is not None and kept <= set(loaded.nodes)
    plain = prune.PlainRunner(model, context.frozen_values, task.judged).logits(mask)
    assert task.loss(mask) == pytest.approx(tasks.score(plain, task.judged).binary, abs=1e-6)
    assert prune.prune(model, "cue", few, checks=False).report["size"]["edges"] == 0

@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_backward_of_a_changed_model_is_caught(wrong, edit, capsys):
    [(module, diff)] = [rest for _, *rest in EDITS if wrong in rest[1]]
    edit(module, diff.replace(wrong, WRONG[wrong]))
    assert run_main(capsys, "--gradcheck")[0] == 1


# ---- circuits: what a person asks ---------------------------------------------------------------

def test_importance_is_what_deletion_costs_and_no_group_can_go(cues):
    """In the circuit, and in the full model on fewer prompts. Minor nodes are in one group each;
    cleaning ends where no group of them can go."""
    task, circuit = cue_task(), found_circuit()
    loss, effect = task.loss(circuit.mask), prune.importance(task, circuit.mask)
    assert effect == {n: cue_task().loss(circuit.mask.without([n])) - loss
                      for n in np.flatnonzero(circuit.mask.nodes)}
    assert [node["importance"] for node in circuit.report["nodes"]] == list(effect.values())
    few, every = task.judged.rows(np.arange(8)), prune.every_node(task.model.cfg)
    full, *without = (prune.logistic(prune.margins(
        slow_logits(task.model, task.frozen_values, few, every.without(nodes)), few))
        for nodes in ([], *([n] for n in effect)))
    in_model = [node["in_model"] for node in circuit.report["nodes"]]
    assert in_model == pytest.approx(np.array(without) - full, abs=1e-4)
    mask = circuit.mask._replace(nodes=np.ones_like(circuit.mask.nodes), edges=None)
    for one in circuit.mask, mask:
        effect = prune.importance(task, one)
        groups = prune.minor_groups(task, one, effect)
        minor = [n for n in effect if effect[n] < 0.1 * max(effect.values())]
        assert sorted(sum(groups, [])) == minor
    assert len(groups) < len(minor)  # in the whole network some are connected
    effect = prune.importance(task, circuit.mask)
    for group in prune.minor_groups(task, circuit.mask, effect):
        assert task.loss(circuit.mask.without(group)) > task.settings.target
