"""Properties of what stands in extras/, each test named for the one it checks. Helpers are those
of test_sparsegpt.py.
"""
import dataclasses
import functools
import html
import inspect
import itertools
import json
import math
import operator
import re
import shlex
import shutil
import subprocess
import sys
import types
from contextlib import suppress
from pathlib import Path

import sparsegpt as sg  # before NumPy: it sets the number of BLAS threads
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import prune
import tasks
from extras import compare, draw, predict, questions
from extras.stand_in import StrictModule
from test_sparsegpt import (
    FEW, HERE, NASTY, NODES, SEEDS, assert_refused, brief, clean, configs, ctrl_c, cue,
    cue_task, cues, dev, drawn_mask, files, found_circuit, links_of, logits_of, named, page,
    program, ran, run_main, slow_logits, wired, write, write_circuit)

__all__ = ["brief", "clean", "cues"]  # fixtures
NODE = r"\b(?:h\d+\.(?:attn_in|q|k|v|attn_out|mlp_in|neuron|mlp_out)|final)\.\d+"


# ---- drawings -----------------------------------------------------------------------------------

def nasty(x):
    """A report with a hostile end to every text that is no node's name."""
    if isinstance(x, str):
        return x if re.fullmatch(NODE, x) else x + NASTY
    if isinstance(x, dict):
        return {key: nasty(value) for key, value in x.items()}
    return list(map(nasty, x)) if isinstance(x, (list, tuple)) else x

def test_a_task_that_needs_no_node_has_an_empty_circuit(cues, monkeypatch):
    """What the bigram table alone does: checked, saved and drawn like any other."""
    monkeypatch.setitem(tasks.TASKS, "trivial", functools.partial(cue, form="{junk}{cue}"))
    model = wired(bigram=True)
    model.params["bigram"][[ord("<"), ord(">")], [ord("x"), ord("y")]] = 30
    circuit = prune.find(prune.ModelContext(model), "trivial", FEW, "circuits", 2)
    assert (circuit.report["size"]["nodes"], circuit.report["size"]["edges"]) == (0, 0)
    draw.write(Path("circuits/trivial"), circuit)
    page("circuits/trivial.html")
    necessity, = (c for c in circuit.report["checks"] if c["name"] == "necessity")
    assert necessity["passed"] is None
    json.loads(Path("circuits/trivial.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert "trivial" in prune.listing(circuit)
    assert questions.explain(circuit, model) == ["the circuit has no nodes"]
    assert questions.explain(circuit, model, "a<", ("x", "y")) == [
        *questions.ask(circuit, model, ["a<"], ("x", "y")), "the circuit has no nodes"]

def test_the_listing_has_every_node_and_edge_and_no_other(cues):
    """Text: each node is a heading once, its edges with their weights are under it."""
    report = found_circuit().report
    largest = max(node["importance"] for node in report["nodes"])
    for verbose in True, False:
        headings, found = [], {"<-": set(), "->": set()}
        for line in prune.listing(found_circuit(), verbose).splitlines():
            headings += re.findall(f"^{NODE}", line)
            for way, name, weight in re.findall(rf"(<-|->) ({NODE}) ([+-]\d\.\d+)", line):
                ends = (name, headings[-1])[::1 if way == "<-" else -1]
                found[way].add((*ends, float(weight)))
        assert headings == [node["name"] for node in report["nodes"]
                            if verbose or node["importance"] >= 0.1 * largest]
        edges = {(e["from"], e["to"], round(e["weight"], 2)) for e in report["edges"]}
        assert found["<-"] == {e for e in edges if e[1] in headings}
        assert found["->"] == {e for e in edges if e[0] in headings}
    zero = dataclasses.replace(found_circuit(), settings=prune.Settings(ablation="zero"))
    assert "rozen at zero" in prune.listing(zero) and ", zero " in prune.listing(zero, True)

@pytest.mark.parametrize("change", [dict, nasty])
def test_the_drawings_have_every_node_and_edge_and_nothing_from_outside(cues, change):
    """HTML and DOT: well formed, self-contained; no text of a model or a task becomes markup."""
    plain = found_circuit()
    circuit = dataclasses.replace(plain, report=change(plain.report))
    draw.write(Path("plain"), plain)
    draw.write(Path("drawn"), circuit)
    links = {tuple(x if re.fullmatch(NODE, x) else html.unescape(draw.visible(x, "␣"))
                   for x in link) for link in links_of(circuit.report)}
    text, root = Path("drawn.html").read_text("utf-8"), page("drawn.html")
    tags = [element.tag for element in root.iter()]
    assert tags == [element.tag for element in page("plain.html").iter()]
    assert not re.search(r"https?:|src=|@import|url\((?!#|data:)|<(link|img|iframe|object)", text)
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    led = [element.get("href")[1:] for element in root.iter("a") if element.get("href")]
    assert len(set(ids)) == len(ids) and set(led) == NODES <= set(ids)
    said = set(re.findall(NODE, " ".join(c["text"] for c in plain.report["checks"])))
    assert NODES <= set(re.findall(NODE, " ".join(root.itertext()))) <= NODES | said
    values, attention = root.findall(".//div[@class='scroll']/table"), root.findall(".//table")[1:]
    names = draw.differing(plain.report)
    assert [row[0].text for row in values[0]][2:] == names
    assert f"hidden: {len(NODES) - len(names)} nodes" in text and len(attention) == 2
    assert len(root.findall(".//mark")) == sum(
        len(rows) for node in plain.report["nodes"] for rows in node["text"].values())
    text = Path("drawn.dot").read_text("utf-8")
    boxes = re.findall(r'^(n\d+) \[label="((?:[^"\\]|\\\\)*)"\]$', text, re.M)
    boxes = {box: html.unescape(label.replace(r"\\", "\\")) for box, label in boxes}
    arrows = re.findall(r"^(n\d+) -> (n\d+) \[.*\]$", text, re.M)
    assert text.count("\n") == 2 + len(boxes) + len(arrows) and len(arrows) == len(links)
    assert {(boxes[a], boxes[b]) for a, b in arrows} == links and NODES <= set(boxes.values())

def test_a_large_circuit_is_drawn_by_its_most_important_nodes(cues, monkeypatch):
    """Alone, with the edges among them. A summary leads to the rows of its nodes elsewhere."""
    monkeypatch.setattr(draw, "TOO_LARGE", 5)
    monkeypatch.setattr(draw, "MOST", 5)
    whole = found_circuit()
    report = draw.readable(whole).report
    least = min(node["importance"] for node in report["nodes"])
    kept, gone = draw.readable(whole).nodes, NODES - {node["name"] for node in report["nodes"]}
    assert kept == [name for name in whole.nodes if name not in gone] and len(kept) == 5
    assert all(node["importance"] <= least for node in whole.report["nodes"]
               if node["name"] in gone)
    ends = links_of(report)
    assert ends == {link for link in links_of(whole.report) if not gone & {*link}}
    draw.write(Path("small"), whole)
    draw.write_summary("s.html", {"cue": (whole, ""), "again": (
        dataclasses.replace(whole, task="again"), ""), "none": (None, "why")})
    for name, start in ("small.html", {"#"}), ("s.html", {"cue.html#", "again.html#"}):
        text, root = Path(name).read_text("utf-8"), page(name)
        led = [e.get("href") for e in root.findall(".//{*}svg/{*}a[@href]")]
        assert {*led} == {to + node for to in start for node in kept}
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert len({*ids}) == len(ids) and f"the 5 most important of {len(NODES)}" in text

@pytest.mark.parametrize("values, shown", [
    ([[9, 8, 5, 1], [8, 0, 0]], "↑ x"), ([[0, 0, 1, 0], [0, -5, 0]], "↓ while"),
    ([[9, 0, 4, 3], [0, 0, 0]], "↑ y"), ([[0, 9, 4, 2], [9, 4, 2]], "↑ if"),
    ([[0, 0.5, 4, 2], [9, 4, 2]], "")])
def test_a_box_shows_the_last_token_at_which_the_prompts_differ(values, shown):
    """By half of the most, where it is farther from its mean; nothing if there is no such. A token
    that the other prompt does not have is compared with the mean."""
    example = dict(prompts=[["<start>", "if", "x", "y"], ["<start>", "while", "y"]])
    example["values"] = {"final.0": values}
    node = dict(name="final.0", mean=0.5)
    assert draw.telling_token(node, example) == shown

@given(st.dictionaries(st.tuples(st.sampled_from("abcdef"), st.integers(0, 3)),
                       st.floats(-3, 3).filter(lambda x: abs(x) > 0.1)), st.booleans())
def test_tokens_share_a_box_only_if_they_share_their_wires(weights, after):
    """Every token is in one box at most, and each of its wires has the sign of its weights."""
    side, turn = (draw.OUT, -1) if after else (draw.IN, 1)
    links = [(*(draw.Box(side, "token", token), draw.Box(draw.FINAL, "final", c))[::turn], w)
             for (token, c), w in weights.items()]
    drawn = [(*link[:2][::turn], link[2]) for link in draw.grouped(
        sorted(links, key=lambda link: -abs(link[2])), weak=0)]
    assert sum(len(box.channel) for box, _, _ in drawn) == len(links)
    for box, node, weight in drawn:
        assert all(weights[token, node.channel] * weight > 0 for token in box.channel)
    boxes = {box for box, _, _ in drawn}
    signs = {frozenset((n, w > 0) for b, n, w in drawn if b == box) for box in boxes}
    assert len(signs) == len(boxes)


# ---- circuits from anywhere ---------------------------------------------------------------------

VALUES = ["gone", "twice", None, 5, -1, True, 1e300, 10**9, 10**400, math.nan, "<b>\x1b", "x", [],
          {}, ["x"], [[]], {"x": 5}]

def damaged(data, content):
    """The keys on the way to a part of a circuit's file that is now another, or gone."""
    keys, at = [], content
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        keys.append(key)
        if not at[key] or not isinstance(at[key], (dict, list)) or data.draw(st.booleans()):
            break
        at = at[key]
    new = data.draw(st.sampled_from(VALUES))
    assume(at[key] != new)
    at[key] = [at[key]] * 2 if new == "twice" else new
    if new == "gone":
        del at[key]
    return keys

@given(data=st.data())
@settings(max_examples=200)
def test_a_forged_circuit_is_refused_or_harmless(cues, capsys, data):
    """Any part is replaced or gone, and the checksum is right: it is shown, drawn and checked
    without markup, and what the model does not bear out is seen."""
    content, model = write_circuit(), wired()
    del content["sha256"]
    keys = damaged(data, content)
    with suppress(ValueError):  # NaN has no checksum
        content["sha256"] = prune.digest(content)
    sg.write_text("forged.json", json.dumps(content))
    status, out, err = run_main(capsys, "--show", "forged.json", main=prune.main)
    assert (status, err.count("\n")) in ((0, 0), (2, 1)) and "\x1b" not in out + err
    if status == 2:
        return
    circuit = prune.load_circuit("forged.json")
    with suppress(Exception):  # which is one line of the command
        for text in (draw.page(circuit), draw.summary_page({"cue": (circuit, "")}),
                     draw.dot(circuit.report)):
            assert "<b>" not in text and "\x1b" not in text
    try:
        wrong = prune.verify(circuit, prune.ModelContext(model, circuit.settings.ablation))
    except Exception:
        return
    assert wrong or not set(keys) & {"losses", "weight", "size", "mean"}

FOREIGN = [b"", b"5", b"null", b'"x"', b"[]", b"{}", b"[" * 10**5, b'{"format": 1}', b"\xff",
           b"PK\x03", json.dumps(dict(format=prune.FORMAT)).encode()]

@given(data=st.data())
@settings(max_examples=60)
def test_a_damaged_or_foreign_file_is_no_circuit(cues, capsys, data):
    """A key or a value is missing or another, anywhere; or the end of the file; or all of it."""
    content, kind = write_circuit(), data.draw(st.sampled_from(["changed", "cut", *FOREIGN]))
    if kind == "changed":
        damaged(data, content)
    text = kind if isinstance(kind, bytes) else json.dumps(content).encode()
    end = data.draw(st.integers(0, len(text) - 1)) if kind == "cut" else None
    write({"circuits/cue.json": text[:end]})
    for line in ("--check circuits/cue.json --model model.npz", "cue --explain --model model.npz"):
        assert assert_refused(capsys, "cue.json", *line.split(), main=prune.main) == ""

@pytest.mark.parametrize("path", sorted(HERE.glob("docs/circuits/*.json")),
                         ids=lambda path: path.stem)
def test_the_included_circuits_are_readable(path):
    """Each belongs to the included model, and up to 30 nodes fit on 80 lines, without checks. The
    pages beside it are of it."""
    circuit = prune.load_circuit(path)
    lines = prune.listing(circuit).splitlines()
    assert circuit.is_of(sg.load_model(path.parents[1] / "long.npz")) and circuit.task == path.stem
    few = len(prune.portrait(circuit).partition("\n\nchecks")[0].splitlines()) <= 80
    assert max(map(len, lines)) <= 100 and (len(circuit.nodes) > 30 or few)
    assert path.with_suffix(".html").read_text("utf-8") == draw.page(circuit)
    row = prune.summary({circuit.task: (circuit, "")}).splitlines()[1]
    assert row[28:] in path.with_name("summary.html").read_text("utf-8")


# ---- the GPU ------------------------------------------------------------------------------------

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

@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs CUDA's compiler")
def test_the_kernels_compile():
    command = ["nvcc", "-cubin", "-DWIDTH=77", HERE / "extras" / "kernels.cu"]
    assert subprocess.run(command, capture_output=True).returncode == 0

def test_kernels_stand_in_the_place_of_ops_while_a_gpu_is_in_use(monkeypatch):
    """With the ops' arguments, for arrays in float32 alone; but not of an op that was edited,
    which a line says. CuPy is NumPy here, and the kernels are the ops."""
    cupy, calls = types.ModuleType("cupy"), []
    cupy.__getattr__ = lambda name: getattr(np, name)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "extras.gpu", None)
    del sys.modules["extras.gpu"]
    gpu, ops = sg.extra("gpu", ""), dict(vars(sg))
    kernels = {name: fn for name, fn in vars(gpu).items() if inspect.isfunction(fn)
               and fn.__module__ == gpu.__name__ and inspect.isfunction(ops.get(name))}

    def stand_in(name):
        def kernel(*args):
            calls.append(name)
            return ops[name](*(arg for arg in args if arg is not sg))
        return kernel
    for name, fn in kernels.items():
        own = [arg for arg in inspect.signature(fn).parameters if arg != "sg"]
        assert own == [*inspect.signature(ops[name]).parameters][:len(own)]
        monkeypatch.setattr(gpu, name, stand_in(name))
        monkeypatch.setattr(sg, name, ops[name])  # which is as it was in the end
    for _ in range(2):
        assert sg.use_device("gpu").endswith(f"CuPy {np.__version__}")
    for name in kernels:
        args = gpu.arguments(sg, name)
        calls.clear()
        getattr(sg, name)(*args)
        assert calls[0] == name
    calls.clear()
    assert sg.ACTIVATIONS["gelu"](np.ones(1))[0] == pytest.approx(0.8413447) and not calls
    assert sg.ACTIVATIONS["gelu"](np.ones(1, "f4")) and calls == ["gelu"]
    assert len(kernels) == 9
    gpu.install.cache_clear()
    vars(sg).update({name: ops[name] for name in kernels})
    sg.ACTIVATIONS["gelu"] = ops["gelu"]
    sg.rmsnorm = lambda x: ops["rmsnorm"](2 * x + 1)
    assert "rmsnorm do not give" in sg.use_device("gpu")
    calls.clear()
    sg.rmsnorm(np.ones((1, 2), "f4")), sg.gelu(np.ones(1, "f4"))
    assert calls == ["gelu"]


# ---- without extras/ ----------------------------------------------------------------------------

OWN = """
def mine(w):
    junk = "".join(w.rng.choices("abcd", k=4))
    return (junk + "<", "x", ""), (junk + ">", "y", "")
"""

def test_without_extras_a_circuit_is_found_saved_and_printed():
    """By the three programs, beside each other. One line names each file that is missing. Without
    stderr, as by 2>&-, all is done too."""
    cfg = sg.Config(n_layer=1, d_model=4, d_head=2, n_ctx=99, vocab_size=257, min_per_neuron=0)
    params = sg.views(np.zeros(sg.n_params(cfg), "f4"), cfg)
    params["bigram"][[ord("<"), ord(">")], [ord("x"), ord("y")]] = 30
    sg.save_model("model.npz", sg.Model(params, cfg, sg.Tokenizer([]), np.zeros((2, 99), int)))
    write({"own.py": OWN.encode()})
    for name in "sparsegpt", "tasks", "prune":
        shutil.copy(HERE / f"{name}.py", ".")
    line = ["prune.py", "mine", "--tasks=own.py", "--model=model.npz"]
    found = program(*line)
    assert found.returncode == 0 and "wrote circuits/mine.json;" in found.stdout
    assert re.fullmatch(r".*extras/draw.py.*\n", found.stderr)
    asked = program(*line, "--ask", "ab<")
    assert asked.returncode == 2 and re.fullmatch(r".*extras/questions.py.*\n", asked.stderr)
    text = Path("circuits/mine.json").read_text()
    Path("circuits/mine.json").unlink()
    assert subprocess.run(f"{sys.executable} {shlex.join(line)} 2>&-", shell=True,
                          capture_output=True).returncode == 0
    assert Path("circuits/mine.json").read_text() == text


# ---- questions ----------------------------------------------------------------------------------

@given(cfg=configs(), seed=SEEDS)
def test_the_parts_of_a_traced_node_add_up_to_it(cfg, seed):
    """Down to tokens and biases, so that what is not printed is known."""
    model, _, prompts, _ = drawn_mask(cfg, seed)
    one = questions.Traced(model, prompts.ids[0])
    assert np.allclose(one.logits, logits_of(model.params, prompts.ids[:1], cfg)[0, -1])
    for site, gate in one.gate.items():
        for t, c in np.argwhere(gate != 0):
            parts = [branch.amount for branch in one.parts((site, t, c), 2.0)]
            assert np.isclose(sum(parts), 2 * one.value[site][t, c], 1e-6, 1e-9)
    heads = itertools.product(range(cfg.n_layer), range(cfg.d_model // cfg.d_head))
    for i, head in heads if cfg.sink or len(one.ids) > 1 else ():
        s, other, bias, *sides = one.contest(i, head, len(one.ids) - 1)
        weights = one.attention[f"h{i}"][head, -1]
        assert weights[s] == weights[:-1].max() and other != s
        for tree in sides:  # the keys, and as well the queries
            logit = bias + sum(branch.amount for branch in tree)
            assert np.isclose(weights[s], weights[other] * np.exp(logit), 1e-5, 1e-9)

def test_the_whole_path_of_pruning_runs(brief, capsys, monkeypatch):
    """Ctrl-C, which leaves nothing behind; then prune, check, explain, ask, set and ablate. --set
    is the same as a circuit in which that node alone is deleted and has that value."""
    command, model = "cue --model model.npz", wired()
    with monkeypatch.context() as patch:
        patch.setattr(prune, "learn_masks", lambda *_: ctrl_c())
        status, _, err = run_main(capsys, *command.split(), main=prune.main)
    assert status == 130 and "Traceback" not in err and not list(Path("circuits").iterdir())
    out = ran(capsys, command)
    assert "h1.neuron.5" in out and "circuits/cue.json" in out
    assert {path.suffix for path in Path("circuits").iterdir()} == {".json", ".html", ".dot"}
    circuit = prune.load_circuit("circuits/cue.json")
    assert named(circuit.mask, model) == named(found_circuit().mask, model)
    assert ran(capsys, "--show cue").rstrip("\n") in out
    out = ran(capsys, f"{command} --explain")
    alike = NODES - set(re.findall(NODE, out))
    assert out.startswith(f"{len(alike)} nodes that do not differ") and len(alike) < 3
    example, node = circuit.report["example"], prune.node_number("h1.neuron.5", model.cfg)
    both = re.findall(r"\nprompt ., .* margin (\S+), of the full model (\S+)\n", out)[:2]
    assert [float(own) for own, _ in both] == pytest.approx(example["margins"], abs=1e-3)
    pool = prune.make_prompts(model, "cue", 32, 0)
    full = prune.margins(logits_of(model.params, pool.ids, model.cfg)[range(64), pool.last], pool)
    for (_, margin), tokens in zip(both, example["prompts"]):
        [row] = [row for row, ids in enumerate(pool.ids[:, :len(tokens)])
                 if [prune.token(model, i) for i in ids] == tokens]
        assert float(margin) == pytest.approx(full[row], abs=1e-3)
    asked = "".join(" --ask " + "".join(prompt[1:]) for prompt in example["prompts"])
    out = ran(capsys, command + asked)
    own = [float(x) for x in re.findall(r"circuit +([+-]\S+)", out)]  # of first, then of second
    assert own == pytest.approx([example["margins"][0], -example["margins"][1]], abs=2e-3)
    assert out.count("logit of `x` less that of `y`: full model") == 2
    mean = prune.ModelContext(model).frozen_values[node]
    outs = [ran(capsys, f"{command} {change}") for change in (
        "--ablate h1.neuron.5", "--set final.1=2 --set final.3=1",
        *(f"--set h1.neuron.5={value}" for value in (mean, 0, 1.5)))]
    assert outs[0] == outs[2] and len(set(outs)) == 4
    full = circuit.report["losses"]["full"]["search"]["binary"]
    for out in outs:
        assert f":\n    loss {full:.4f}, accuracy 100.0%\n" in out and "accuracy 50.0%" in out
        assert len(re.findall(r"of 16 prompts .* (0|16) flip", out)) == 2
    prompts, rest = prune.make_prompts(model, "cue", 16, 0), prune.every_node(model.cfg)
    for value, out in zip((mean, 0, 1.5), outs[2:]):
        logits = slow_logits(model, np.full(368, value, "f4"), prompts, rest.without([node]))
        loss = prune.logistic(prune.margins(logits, prompts))
        assert f"\n    loss {loss:.4f}, accuracy 50.0%" in out

def test_a_prompt_is_traced_and_asked_about(brief, capsys, monkeypatch):
    """The trace is checked by deletions, and refuses a forward pass that it does not know; the
    circuit leans as its own run on the prompt does."""
    write_circuit()
    assert "not followed to its end" in ran(capsys, "--trace if --model model.npz")
    with monkeypatch.context() as patch, pytest.raises(sg.UserError, match="sum of its parts"):
        patch.setattr(sg, "rmsnorm", lambda x, real=sg.rmsnorm: (2 * real(x)[0], real(x)[1]))
        questions.trace(wired(), "if a")
    line = "--model model.npz --trace <ab="
    for at, token in enumerate("=ba<", 1):
        out = ran(capsys, f"{line} --head h0.head.1 --at {at}")
        assert f"h0.head.1 looks from `{token}` at `" in out and "check" in out.splitlines()[-1]
    for said, more in {"no head 'h2": "--head h2.head.0", "takes no --at": "--at 1",
                       "from 1 to 5": "--head h0.head.1 --at 6",
                       "no --answers": "--head h0.head.1 --answers x y"}.items():
        assert_refused(capsys, said, *f"{line} {more}".split(), main=prune.main)
    assert_refused(capsys, "needs --trace", "--head", "h0.head.1", main=prune.main)
    model, circuit = sg.load_model("model.npz"), prune.load_circuit("circuits/cue.json")
    prompts = prune.make_prompts(model, "cue", 2, 0).rows([0])
    [text, *_], [a, b] = tasks.pairs("cue", 1)[0]
    margin = prune.margins(circuit.logits(model, prompts), prompts)[0]
    assert re.search(rf"circuit [+-]{abs(margin):.3f}", questions.ask(circuit, model, [text])[2])
    assert f"circuit {-margin:+.3f}" in questions.ask(circuit, model, [text], (b, a))[2]
    shared = questions.ask(circuit, model, ["if"], (" a", " b"))
    assert shared[0] == "if "  # they share the space
    seen = prune.activations(model, text)
    assert {len(x) for x in seen.values()} == {1 + len(text)}
    other = wired()
    other.params["head.b"][0] += 1
    with pytest.raises(sg.UserError, match="of another model"):
        circuit.logits(other, prompts)
    config = circuit.report["model"]["config"]
    del config["late"]  # as if Config had got this field later
    assert circuit.is_of(model)
    config["act"] = "gelu"
    assert not circuit.is_of(model)
    with pytest.raises(sg.UserError, match="exceed the context"):
        prune.activations(model, 999 * "a")

def test_tasks_of_ones_own_are_listed_and_known_to_workers(brief, capsys):
    write_circuit()
    write({"own.py": b"def mine(w): return ('if a', ' =', ''), ('a', ' +', '')\n"})
    out = ran(capsys, "--model model.npz --tasks own.py")
    assert re.search("(?m)^mine .* - +mine makes", out)
    assert re.search("(?m)^cue .* nodes, .* edges$", out)
    assert list(prune.on_cores(known_tasks, [0, 1], 2))[0][-1] == "mine"

def known_tasks(_):
    return list(tasks.TASKS)

def test_the_readmes_python_runs(capsys):
    """Every block, one after the other; the checkpoint of theirs holds many windows of text."""
    Path("docs").symlink_to(HERE / "docs")
    names, blocks = {}, re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text("utf-8"),
                                   re.S)
    for block in blocks:
        exec(block, names)
    assert len(blocks) >= 2 and "trained in" in capsys.readouterr().out
    assert len({row.tobytes() for row in names["model"].text}) > 30


def test_the_page_on_circuit_files_names_all_that_is_in_them(capsys):
    Path("docs").symlink_to(HERE / "docs")
    page, names = (HERE / "docs" / "circuit.md").read_text("utf-8"), {}
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(block, names)
    assert set(re.findall("`([a-z_0-9]+)`", page)) >= {*names["circuit"].report, "task", "format"}
    assert {kind for _, _, kind, _ in names["circuit"].links} == {
        "edge", "residual", "attention", "token", "answer"}
    assert {node for link in names["circuit"].links for node in link[:2]} >= {
        *names["circuit"].nodes}  # none stands apart

def test_the_lesson_prints_what_it_says(capsys):
    """Every command of it, and every line that is quoted below one, but for rounding elsewhere."""
    number = r"[+-]?\d+(?:\.\d+)?"
    for name in "docs", "prune.py":
        Path(name).symlink_to(HERE / name)
    page = (HERE / "docs" / "lesson.md").read_text("utf-8")
    commands = re.split("(?m)^    (?=python )", page)[1:]
    for command, *below in (part.split("\n") for part in commands):
        words = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], check=True,
                               capture_output=True, text=True).stdout.split("\0")[2:-1]
        status, out, _ = run_main(capsys, *words, main=prune.main)
        assert status == 0
        for line in (x for x in below if x.startswith("    ") and x.strip() != "..."):
            said, *same = (
                (re.sub(number, "", text).split(), [*map(float, re.findall(number, text))])
                for text in (line, *out.splitlines()))
            assert any(words == said[0] and numbers == pytest.approx(said[1], 0.05, 0.05)
                       for words, numbers in same), line
    assert len(commands) == 9

def test_the_readmes_print_out_is_that_of_the_included_circuit():
    readme = (HERE / "README.md").read_text("utf-8")
    said = readme.partition("single_double_quote` prints:")[2].partition("## From Python")[0]
    circuit = prune.load_circuit(HERE / "docs" / "circuits" / "single_double_quote.json")
    lines = [line.strip() for line in prune.listing(circuit).splitlines()]
    assert {line.strip() for line in said.splitlines()} <= {*lines, ""}


# ---- predictions --------------------------------------------------------------------------------

def escaped(text):
    """Text as it stands in a file of predictions."""
    for this, other in ("\\", r"\\"), ("\n", r"\n"), ("\t", r"\t"), ("{", "{{"), ("}", "}}"):
        text = text.replace(this, other)
    return text

@given(st.text("ab{}\\\n\t #", max_size=9).filter(lambda text: text[:1] != "#"), SEEDS)
def test_a_predicted_prompt_is_read_as_it_is_meant(cues, text, seed):
    """Any text, by its escapes. A letter is one name all over a line, another in each context."""
    write({"p.txt": f"# none\n\n{escaped(text)}{{x}}{{A}}{{y}}-{{x}}\tx\ty{{A}}\r\n".encode()})
    [(number, fields)], model = predict.read("p.txt").items(), wired(n_ctx=64)
    prompts = predict.in_contexts(model, fields, 3, seed)
    form = re.escape(text) + r"(?P<x>\w+)\w+-(?P=x)"
    found = [re.fullmatch(form, model.tok.decode(ids[1:end + 1]))
             for ids, end in zip(prompts.ids, prompts.last)]
    assert number == 3 and len(found) == 3 and len({one["x"] for one in found}) > 1
    assert {*prompts.right} == {ord("x")} and {*prompts.wrong} == {ord("y")}

@pytest.mark.parametrize("said, text", {
    "p.txt: no prompt": "# a\tb\tc", "line 2: it is not": "\na\tx", "line 1: it is not": "a\t\tx",
    "line 1: the prompt ends": "a \tx\ty", "line 2: the last": "a\tx\ty\na\tx\ty\tz",
    "line 1: a lone": r"\a	x	y", "1: a lone": "{xy}\tx\ty", "line 1: no pair": "a\tx\tx",
    "do not fit": 18 * "a" + "\tx\ty",
    "than 8 names": "{a}{b}{c}{d}{e}{f}{g}{h}{i}\tx\ty"}.items())
def test_a_wrong_file_of_predictions_is_one_line(brief, capsys, said, text):
    write_circuit()
    write({"p.txt": text.encode()})
    line = "cue --model model.npz --predict p.txt".split()
    assert_refused(capsys, said, *line, main=prune.main)

def test_predictions_are_counted_for_both_sides(brief, capsys):
    """Every number of a line is that of the model, of the circuit, and of the changed model."""
    write_circuit()
    rows = [("<ab=", "x", "y", "y"), (">ab=", "y", "x"), ("cab=", "x", "y"), ("ab<=", "y", "x")]
    write({"p.txt": "\n".join(map("\t".join, rows)).encode()})
    model, circuit = wired(), found_circuit()
    frozen, every = prune.ModelContext(model).frozen_values, prune.every_node(model.cfg)
    node = prune.node_number("h1.neuron.5", model.cfg)
    changed = np.where(np.arange(368) == node, 1.5, frozen), every.without([node])
    for flags, *other in ("", frozen, circuit.mask), (" --set h1.neuron.5=1.5", *changed):
        out = ran(capsys, f"cue --model model.npz --predict p.txt{flags}")
        for (prompt, *answers), line in zip(rows, out.splitlines()[-len(rows) - 3:-3]):
            one, said = prune.own_prompt(model, prompt, answers[:2]), []
            for values, kept in (frozen, every), other:
                logits = slow_logits(model, values, one, kept)[:, :257].astype(float)
                p, margin = np.exp(logits[0] - np.logaddexp.reduce(logits[0])), (
                    prune.margins(logits, one)[0])
                said += [p[ord(x)] for x in answers[:2]] + [margin]
            found = [float(x) for x in re.findall(r"(?<![±\d])[+-]?\d+\.\d+", line)]
            assert found[:6] == pytest.approx(said, abs=0.0051) and line.startswith(prompt)
            assert line.count("hit") == sum(x > 0 for x in (said[2], said[5]))
            assert found[6:] == pytest.approx([said[5] - said[2]] * bool(flags), abs=0.051)
        assert "; correct Python 0 of 1\n" in out  # as the first line's last field has it
    assert predict.totals([(2, 1), (-2, 1, False), (3, 2, False), (-3, -4)], "circuit") == [
        "hits: full model 2 of 4, circuit 3; correct Python 1 of 2", "full model and circuit agree"
        " on 3 of 4, 75% (95% interval 30% to 95%); correlation of their margins 0.75"]

def test_the_included_predictions_can_be_asked():
    """Each file belongs to a task, and every prompt of it fits the included model."""
    model = sg.load_model(HERE / "docs/long.npz")
    paths = sorted(HERE.glob("docs/near/*.txt"))
    assert len(paths) >= 10 and {path.stem for path in paths} <= tasks.TASKS.keys()
    for path in paths:
        found = predict.read(path)
        assert len(found) >= 8
        for fields in found.values():
            assert len(predict.in_contexts(model, fields, 4, 0).last) == 4

def test_a_prompt_is_explained_beside_the_full_model(brief, capsys):
    """The values of every node in the circuit and in the full model, below what both answer."""
    write_circuit()
    model, circuit = wired(), found_circuit()
    out = ran(capsys, "cue --model model.npz --explain <ab=")
    assert out.startswith("\n".join(questions.ask(circuit, model, ["<ab="])))
    seen, example = prune.activations(model, "<ab="), prune.pair_readings(
        model, circuit.mask, prune.ModelContext(model).frozen_values,
        prune.own_prompt(model, "<ab="), {})[0]
    names = {}
    *blocks, readings = out.split("\n\n")[1:]
    for block in blocks:
        head, _, *rows = block.splitlines()
        columns = np.array([re.findall(r"[+-]?\d+\.\d\d", row) for row in rows]).astype(float)
        for i, name in enumerate(re.findall(NODE, head)):
            names[name] = columns[:, 2 * i], columns[:, 2 * i + 1]
    assert names.keys() == NODES
    for name, (own, full) in names.items():
        site, _, channel = name.rpartition(".")
        assert own == pytest.approx(example["values"][name][0], abs=0.0051)
        assert full == pytest.approx(seen[site][:, int(channel)], abs=0.0056)  # rounded twice
    assert re.findall(NODE, readings) == circuit.nodes and max(map(len, out.splitlines())) < 100

@given(SEEDS)
def test_readings_are_the_extremes_of_distinct_tokens(seed):
    rng, model = np.random.default_rng(seed), wired()
    ids, values = rng.integers(97, 103, (3, 20)), rng.permutation(60).reshape(3, 20) * 1.0
    for side, best in ("high", max), ("low", min):
        of_token = [best(values[ids == i]) for i in set(ids.flat)]
        rows = prune.extremes(model, values, ids, 4)[side]
        assert [row[2] for row in rows] == sorted(of_token, reverse=side == "high")[:4]
        for before, token, value, after in rows:
            [[b, t]] = np.argwhere(values == value)
            text = model.tok.decode(ids[b])
            assert (before, token, after) == (text[max(0, t - 6):t], text[t], text[t + 1:t + 5])

def test_the_most_important_node_in_the_model_is_suggested_to_ablate(cues):
    """Its importance there is printed."""
    circuit = found_circuit()
    largest = max(circuit.report["nodes"], key=lambda node: node["in_model"])
    assert f"--ablate {largest['name']}" in prune.next_commands(circuit)
    said = re.findall(r", model +(\S+) ", prune.listing(circuit, True))
    assert said == [f"{n['in_model']:.3f}" for n in circuit.report["nodes"]]


# ---- comparisons --------------------------------------------------------------------------------

@pytest.mark.parametrize("ablation", ["mean", "resample"])
def test_a_curve_reaches_its_targets_and_only_grows(brief, monkeypatch, ablation):
    """What a point says is so, and a lower target never takes fewer edges. Masks are trained once
    under the full model's loss, or they miss targets just above it; none below it is asked for."""
    task, progress, goals = cue_task(ablation=ablation), sg.Progress(), []
    points, real = compare.curve(task, compare.SWEEP, progress), prune.learn_masks
    full = task.full_loss()
    assert [target for target, *_ in points] == [0.15, 0.3]
    assert points[0][2][1] >= points[1][2][1] >= 6
    for target, mask, size in points:
        assert task.holds(mask, target) and task.size(mask) == size
    monkeypatch.setattr(prune, "learn_masks",
                        lambda *args: goals.append(args[-1]) or real(*args))
    monkeypatch.setattr(compare, "AIMS", (1.05 * full, 0.9 * full, 0.8 * full))
    points = compare.curve(task, (0.3, 0.5 * full), progress)
    assert [target for target, *_ in points] == [0.3]
    assert goals == pytest.approx([1.015 * full, 0.27 * full])

def test_models_are_compared_alike_and_finished_rows_are_kept(brief, capsys, monkeypatch):
    """A model against itself is 1 to 1; models of unequal loss are said not to match."""
    run, path = functools.partial(ran, capsys, main=compare.main), Path("c/compare.json")
    line = "model.npz model.npz --out c"
    out = run(line)
    assert "WARNING" not in out and out.count(" left\n") == 3
    ratios = re.findall(r"([\d.]+) +([\d.]+) +([\d.]+) +1.00 to 1.00 +1.00\n", out)
    assert len(ratios) == 6 and all(a == b and c == "1.00" for a, b, c in ratios)
    [row] = [row for row in json.loads(path.read_text())["rows"] if row["task"] == "cue"]
    assert row["cleaned"]["edges"] == 6 and f"{row['full']:.3f}" in out
    again = run(line)
    assert again == out[out.index("\n    model"):]
    other = wired()
    other.params["head.b"][:] += np.arange(258) % 7
    sg.save_model("other.npz", other)
    assert "not a matched comparison" in run("model.npz other.npz --out c")
    assert run(line) == again  # rows of other models in the file do no harm
    assert "hopeless" in again and "hopeless" not in run(line + " --tasks cue")
    assert "A/B" not in run("model.npz --out c")  # one model: no ratio
    before = path.read_bytes()
    for foreign in b"X", b"[]", b'{"rows": [1], "models": []}':
        write({"c/compare.json": foreign})
        assert_refused(capsys, "not a comparison", *line.split(), main=compare.main)
    write({"c/compare.json": before})
    assert_refused(capsys, "other settings", *line.split(), "--target", "0.3", main=compare.main)
    assert path.read_bytes() == before
    monkeypatch.setattr(prune, "TOO_LARGE", 1)
    row = compare.compare_one([prune.ModelContext(wired())], FEW, (0.15,), (0, "cue"))
    assert row["points"] and row["cleaned"] is None  # what is left as it is, is not cleaned

def test_resampled_values_are_those_of_other_text(brief, capsys):
    """Of every site and position. They change what a circuit computes, and not the full model."""
    task, frozen, every = cue_task(ablation="resample"), cue_task(), prune.every_node(wired().cfg)
    _, part, values, _ = task.runner.parts[0]
    shapes = {x.shape for x in values.values()}
    assert shapes == set(itertools.product((part.ids.size, len(part.last)), (16, 64)))
    half = prune.CircuitMask(np.arange(368) % 2 > 0)
    assert abs(task.loss(half) - frozen.loss(half)) > 1e-3
    assert np.allclose(task.runner.logits(every), frozen.runner.logits(every), atol=1e-4)
    ran(capsys, "model.npz model.npz --tasks cue --ablation resample --out r", compare.main)
    [row, *_] = json.loads(Path("r/compare.json").read_text())["rows"]
    assert row["points"] and row["cleaned"] is None and row["without"] is not None

def test_seeds_of_a_model_are_pooled_and_shown_apart():
    """Ratios are taken within a run of one model of each kind, and a task counts where all models
    of the run reach the target."""
    base = dict(d_model=8, density=1.0, afrac=1.0, nonzero=9, kurtosis=3.0, loss=2.0, code=2.0)
    s1, d0, s0, d1 = (dict(base, name=name, model=name, kind=name[0], seed=int(name[1]))
                      for name in ("s1", "d0", "s0", "d1"))
    kinds = compare.by_kind([s1, d0, s0, d1])
    assert kinds == [[s0, s1], [d0, d1]] and compare.by_kind([s0, s0]) == [[s0], [s0]]
    edges = dict(s0=(4, 2), s1=(1, None), d0=(8, 32), d1=(128, 7))
    rows = [dict(compare.EMPTY, model=name, task=task, full=0.1, without=0.5, random=0.25,
                 points=[dict(target=0.15, edges=n)] * (n is not None))
            for name, two in edges.items() for task, n in zip(("for_while", "var_if"), two)]
    text = compare.comparison(kinds[::-1], rows, 0.15)
    assert re.search(r"masks +3 +32.0 +2.0 +16.00 +16.00 to 16.00 +16.00  5.66 128.00\n", text)
    assert re.search(r"var_if +0.100/0.100 +32/7 +-/- +0.100/0.100 +2/- +-/-\n", text)
    assert re.search(r"\nB +4 +0.500 +0.250$", text) and "WARNING" not in text
    low, high = compare.interval([0, 0, 6], "aab")  # means over aa, ab and bb: 0, 2 and 6
    assert low == 0 and high == pytest.approx(6)
    short, long = sg.Config(steps=10, seed=1, out="short.npz"), sg.Config()
    assert compare.kind_of(short) == compare.kind_of(long)  # equal loss may take fewer steps
    assert compare.kind_of(dataclasses.replace(short, lr=1.0)) != compare.kind_of(long)
