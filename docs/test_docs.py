"""Properties of what stands in docs/, each test named for the one it checks. Helpers are those of
test_sparsegpt.py.
"""
import dataclasses
import functools
import html.parser
import importlib.util
import io
import itertools
import json
import math
import operator
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

from docs import ask, compare, program, show, trace  # before NumPy: see docs/__init__.py
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import prune
import sparsegpt as sg
import tasks
from docs.stand_in import StrictModule
from test_sparsegpt import (
    FEW, NASTY, NODE, NODES, SEEDS, assert_refused, brief, clean, configs, ctrl_c, cue, cue_task,
    cues, dev, drawn_mask, files, flags, found_circuit, links_of, named, page, prose, quiet, ran,
    run_hook, run_main, same, slow_logits, small_model, tiny, wired, write, write_circuit)

__all__ = ["brief", "clean", "cues", "prose"]  # fixtures


# ---- interruptions, full disks, pipes, other processes ------------------------------------------

@pytest.mark.parametrize("moment", ["sparsegpt.adam", "sparsegpt.np.savez", "sparsegpt.report",
                                    "sparsegpt.np.savez_compressed"])
@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGHUP, signal.SIGINT]])
def test_signals_at_any_moment_leave_a_whole_model_or_state(
        prose, moment, signals, capsys, monkeypatch):
    """In a step, in a write and after all of them; a second one changes nothing. The command that
    is named then resumes, and does not open data that is only named in the state's file."""
    cfg, module = tiny(steps=6), operator.attrgetter(moment.removeprefix("sparsegpt."))
    whole, strikes, real = sg.train(cfg, log=quiet), itertools.count(), module(sg)
    originals = dict(adam=sg.adam, report=sg.report)
    Path("model.npz").unlink()

    def strike(*args, **more):
        if moment != "sparsegpt.adam" or next(strikes) == 2:
            for number in signals:
                signal.raise_signal(number)
        return real(*args, **more)

    if moment == "sparsegpt.np.savez":  # which writes the state of an interrupted run
        adam, steps = sg.adam, itertools.count()
        monkeypatch.setattr(sg, "adam", lambda *a: (adam(*a), next(steps) == 2 and ctrl_c()))
    monkeypatch.setattr(moment, strike)
    status, _, err = run_main(capsys, *flags(), "--steps=6")
    assert (status, err.count("\n")) == (130, 1) and "Traceback" not in err
    left = {str(path) for path in files()} - {prose}
    done = moment in ("sparsegpt.report", "sparsegpt.np.savez_compressed")
    assert left == {"model.npz" if done else "model.npz.partial"}
    for name in "adam", "report":
        monkeypatch.setattr(sg, name, originals[name])
    if not done:
        hint = re.search(r"python sparsegpt.py (--resume .*)", err)[1]
        assert_refused(capsys, "--data prose.txt", "--resume", "--out", "model.npz")
        assert run_main(capsys, *hint.split())[::2] == (0, "")
    assert same(sg.load("model.npz").params, whole.params)

def test_ignored_signals_stay_ignored(monkeypatch):
    """As those of nohup; and handlers are put back."""
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    with program.interrupts_noted() as noted, pytest.raises(KeyboardInterrupt):
        ctrl_c()
    assert noted == []

@pytest.mark.parametrize("spare", [True, False])
def test_a_full_disk_costs_no_training(prose, spare, capsys, monkeypatch):
    """An automatic save that fails is said once, and tried again. The last one goes elsewhere."""
    whole, real = sg.train(tiny(steps=6), log=quiet), program.write_whole
    looks = itertools.count(0, 50)
    Path("spare").mkdir()
    full = {Path("model.npz").resolve().parent} | (set() if spare else {Path("spare").resolve()})
    monkeypatch.setattr(program.tempfile, "tempdir", "spare")
    monkeypatch.setattr(sg, "time", types.SimpleNamespace(perf_counter=lambda: next(looks)))

    def write(path, fill):
        if full & set(Path(path).resolve().parents[:1 if spare else 3]):
            raise sg.UserError(f"cannot write {path}: No space left on device")
        real(path, fill)

    monkeypatch.setattr(program, "write_whole", write)
    status, out, err = run_main(capsys, *flags(), "--steps=6")
    assert (status, err.count("\n")) == (2, 1) and "write model.npz: No space" in err
    assert out.count("the run goes on") == 1
    kept = list(Path("spare").rglob("model.npz"))
    assert all(str(path) in err for path in kept) and len(kept) == spare
    assert all(same(sg.load(path).params, whole.params) for path in kept)

@pytest.mark.parametrize("main, line, place, left", [
    (sg.main, " ".join(flags()), "model.npz", ".model.npz.partial.1-2.unfinished"),
    (prune.main, "else_elif --model model.npz", "circuits", "circuits/.cue.json.1-2.unfinished")])
def test_of_two_runs_that_write_the_same_files_one_is_refused(
        prose, main, line, place, left, capsys):
    """The lock and the unfinished files of a dead process stand in nobody's way."""
    sg.save("model.npz", small_model(n_ctx=128))
    Path("circuits").mkdir()
    with program.locked(place):
        assert_refused(capsys, f"process {os.getpid()} writes", *line.split(), main=main)
    others = [".model.npz.2.1-2.unfinished", "circuits/.b.npz.1-2.unfinished", ".x.unfinished"]
    lock = program.lock_of(Path(place))
    write({lock: b"1", left: b"", **{other: b"" for other in others}})
    run_main(capsys, *line.split(), main=main)
    assert not Path(left).exists() and not lock.exists()
    assert all(Path(other).exists() for other in others)
    lock.symlink_to("precious")  # is not followed
    write({"precious": b"x"})
    run_main(capsys, *line.split(), main=main)
    assert Path("precious").read_bytes() == b"x"

@pytest.mark.parametrize("where", ["nobody", "/dev/full", "text", None])
def test_output_that_nobody_takes_does_not_end_the_work(prose, where, capsys, monkeypatch):
    """A reader that goes away is no error; a full disk is one. A notebook has no file."""
    reader, writer = os.pipe()
    os.close(reader)
    full = where == "/dev/full"
    for line in (flags(), ["--help"])[:1 if where is None else 2]:
        stream = {"nobody": lambda: open(os.dup(writer), "w"), "text": io.StringIO,
                  "/dev/full": lambda: open("/dev/full", "w"), None: lambda: None}[where]()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            assert sg.main(line) == 2 * full
        assert capsys.readouterr().err.count("\n") == full and Path("model.npz").exists()

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
                     sg.load("model.npz").params))
        Path("model.npz").unlink()
    assert len(runs[0][0]) == 3 and runs[0][0] == runs[1][0]
    assert all(np.allclose(w, runs[1][1][name], 1e-9, 1e-12) for name, w in runs[0][1].items())
    assert subprocess.run(["mpirun", "-n", "2", *command, "--batch_size=1"], env=env).returncode

def test_every_line_is_written_at_once():
    raw = io.BytesIO()
    stream = program.Output(io.TextIOWrapper(io.BufferedWriter(raw), "ascii"))
    print("line\x1b[2J", file=stream)
    assert raw.getvalue() == rb"line\x1b[2J" + b"\n"

@given(text=st.text())
def test_control_characters_never_reach_a_terminal(text):
    seen = program.printable(text, "\n")
    assert all(c.isprintable() or c == "\n" for c in seen)
    assert seen == text or not text.replace("\n", "").isprintable()

def test_threads_that_write_one_file_leave_one_of_their_texts():
    texts = [str(i) * 10**5 for i in range(8)]
    sg.parallel(lambda text: program.write_text("text", text), texts, 4)
    assert Path("text").read_text() in texts and list(files()) == [Path("text")]


# ---- drawings -----------------------------------------------------------------------------------

def nasty(x):
    """A record with a hostile end to every text that is no node's name."""
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
    circuit = prune.finish(
        "circuits", prune.prune(model, "trivial", FEW), prune.ModelContext(model))
    assert (circuit.record["size"]["nodes"], circuit.record["size"]["edges"]) == (0, 0)
    page("circuits/trivial.html")
    necessity, = (c for c in circuit.record["checks"] if c["name"] == "necessity")
    assert necessity["passed"] is None
    json.loads(Path("circuits/trivial.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert "trivial" in show.listing(circuit)
    assert show.explain(circuit.record["example"]) == "the circuit has no nodes"

def test_the_listing_has_every_node_and_edge_and_no_other(cues):
    """Text: each node is a heading once, its edges with their weights are under it."""
    record = found_circuit().record
    largest = max(node["importance"] for node in record["nodes"])
    for verbose in True, False:
        headings, found = [], {"<-": set(), "->": set()}
        for line in show.listing(found_circuit(), verbose).splitlines():
            headings += re.findall(f"^{NODE}", line)
            for way, name, weight in re.findall(rf"(<-|->) ({NODE}) ([+-]\d\.\d+)", line):
                ends = (name, headings[-1])[::1 if way == "<-" else -1]
                found[way].add((*ends, float(weight)))
        assert headings == [node["name"] for node in record["nodes"]
                            if verbose or node["importance"] >= 0.1 * largest]
        edges = {(e["from"], e["to"], round(e["weight"], 2)) for e in record["edges"]}
        assert found["<-"] == {e for e in edges if e[1] in headings}
        assert found["->"] == {e for e in edges if e[0] in headings}
    zero = dataclasses.replace(found_circuit(), settings=prune.Settings(ablation="zero"))
    assert "frozen at zero" in show.listing(zero) and ", zero " in show.listing(zero, True)

@pytest.mark.parametrize("change", [dict, nasty])
def test_the_drawings_have_every_node_and_edge_and_nothing_from_outside(cues, change):
    """HTML and DOT: well formed, self-contained; no text of a model or a task becomes markup."""
    plain = found_circuit()
    circuit = dataclasses.replace(plain, record=change(plain.record))
    prune.save_drawings(Path("plain"), plain)
    prune.save_drawings(Path("drawn"), circuit)
    links = {tuple(x if re.fullmatch(NODE, x) else html.unescape(show.visible(x, "␣"))
                   for x in link) for link in links_of(circuit.record)}
    text, root = Path("drawn.html").read_text("utf-8"), page("drawn.html")
    tags = [element.tag for element in root.iter()]
    assert tags == [element.tag for element in page("plain.html").iter()]
    assert not re.search(r"https?:|src=|@import|url\((?!#|data:)|<(link|img|iframe|object)", text)
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    lit = {x for element in root.iter() for x in element.get("data-lit", "").split()}
    assert len(set(ids)) == len(ids) and lit <= set(ids)
    assert set(re.findall(NODE, " ".join(root.itertext()))) == NODES
    values, attention = root.findall(".//div[@class='scroll']/table"), root.findall(".//table")[1:]
    names = show.differing(plain.record["example"])
    assert [row[0].text for row in values[0]][2:] == names
    assert f"hidden: {len(NODES) - len(names)} nodes" in text and len(attention) == 2
    assert '<pre class="panel" hidden>' in text and "print { .panel { display: none }" in text
    text = Path("drawn.dot").read_text("utf-8")
    boxes = re.findall(r'^(n\d+) \[label="((?:[^"\\]|\\\\)*)"\]$', text, re.M)
    boxes = {box: html.unescape(label.replace(r"\\", "\\")) for box, label in boxes}
    arrows = re.findall(r"^(n\d+) -> (n\d+) \[.*\]$", text, re.M)
    assert text.count("\n") == 2 + len(boxes) + len(arrows) and len(arrows) == len(links)
    assert {(boxes[a], boxes[b]) for a, b in arrows} == links and NODES <= set(boxes.values())

@given(st.dictionaries(st.tuples(st.sampled_from("abcdef"), st.integers(0, 3)),
                       st.floats(-3, 3).filter(lambda x: abs(x) > 0.1)), st.booleans())
def test_tokens_share_a_box_only_if_they_share_their_wires(weights, after):
    """Every token is in one box at most, and each of its wires has the sign of its weights."""
    side, turn = (show.OUT, -1) if after else (show.IN, 1)
    links = [(*(show.Box(side, "token", token), show.Box(show.FINAL, "final", c))[::turn], w)
             for (token, c), w in weights.items()]
    drawn = [(*link[:2][::turn], link[2]) for link in show.grouped(
        sorted(links, key=lambda link: -abs(link[2])), weak=0)]
    assert sum(len(box.channel) for box, _, _ in drawn) == len(links)
    for box, node, weight in drawn:
        assert all(weights[token, node.channel] * weight > 0 for token in box.channel)
    boxes = {box for box, _, _ in drawn}
    signs = {frozenset((n, w > 0) for b, n, w in drawn if b == box) for box in boxes}
    assert len(signs) == len(boxes)


# ---- files --------------------------------------------------------------------------------------

@given(data=st.data())
@settings(max_examples=200)
def test_a_forged_circuit_is_refused_or_can_be_shown_and_checked(cues, data):
    """Any part is replaced or gone, and the checksum is right."""
    record, model = write_circuit(), prune.load_model("model.npz")
    del record["sha256"]
    parts, at = [], record
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        parts.append((at, key))
        if not at[key] or not isinstance(at[key], (dict, list)) or data.draw(st.booleans()):
            break
        at = at[key]
    new = data.draw(st.sampled_from([*DAMAGES[2:-2], True, 10**400, 1e300, 10**9, "<b>\x1b", ["x"],
                                     [[]], {"x": 5}, "gone", "twice", record["nodes"]]))
    at[key] = [at[key]] * 2 if new == "twice" else new
    if new == "gone":
        del at[key]
    program.write_text("forged.json", json.dumps(dict(record, sha256=prune.digest(record))))
    try:
        circuit = prune.load("forged.json")
    except sg.UserError:
        return
    for verbose in False, True:
        assert show.listing(circuit, verbose) + show.next_commands(circuit)
    for text in (show.page(circuit), show.summary_page({"cue": (circuit, "")}),
                 show.dot(circuit.record)):
        assert "<b>" not in text and "\x1b" not in text
    try:
        wrong = prune.verify(circuit, prune.ModelContext(model, circuit.settings.ablation))
    except sg.UserError:
        return
    touched = {key for _, key in parts}
    assert wrong or not touched & {"losses", "weight"}

@pytest.mark.parametrize("change, said", [
    (lambda r: r["settings"].update(search_pairs=10**9), "search_pairs"),
    (lambda r: r["losses"]["full"].pop("held"), "losses.full"),
    (lambda r: r["edges"][0].pop("weight"), "edges"), (lambda r: r["checks"].pop(), "checks"),
    (lambda r: r["model"]["config"].update(d_model=1 << 16, d_head=16), "too large"),
    (lambda r: r.update(task="<b>"), "no such search"),
    (lambda r: r["heads"][0].update(nodes=[]), "do not agree"),
    (lambda r: r["size"].update(nodes="<b>"), "size.nodes")])
def test_what_a_forged_circuit_lacks_is_named(cues, change, said):
    record = write_circuit()
    del record["sha256"]
    change(record)
    program.write_text("forged.json", json.dumps(dict(record, sha256=prune.digest(record))))
    with pytest.raises(sg.UserError, match=said):
        prune.load("forged.json")

DAMAGES = ["gone", "cut", None, 5, -1, "x", [], {}, math.nan, 10**400]
FOREIGN = [b"", b"5", b"null", b'"x"', b"[]", b"{}", b"[" * 10**5, b'{"format": 1}', b"\xff",
           b"PK\x03", json.dumps(dict(format=prune.FORMAT)).encode()]

@pytest.mark.parametrize("value", DAMAGES + FOREIGN)
@given(data=st.data())
@settings(max_examples=6)
def test_a_damaged_or_foreign_file_is_no_circuit(cues, capsys, value, data):
    """A key or a value is missing or another, anywhere; or the end of the file; or all of it."""
    content = at = write_circuit()
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not at[key] or not isinstance(at[key], (dict, list)) or data.draw(st.booleans()):
            break
        at = at[key]
    assume(at[key] != value)
    at[key] = "x" if isinstance(value, bytes) else value
    if value == "gone":
        del at[key]
    text = value if isinstance(value, bytes) else json.dumps(content).encode()
    end = data.draw(st.integers(0, len(text) - 1)) if value == "cut" else None
    write({"circuits/cue.json": text[:end]})
    for line in ("--check circuits/cue.json --model model.npz", "cue --explain --model model.npz"):
        assert assert_refused(capsys, "cue.json", *line.split(), main=prune.main) == ""

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
    command = ["nvcc", "-cubin", "-DWIDTH=77", Path(sg.__file__).with_name("docs") / "kernels.cu"]
    assert subprocess.run(command, capture_output=True).returncode == 0

@pytest.mark.parametrize("path", sorted(Path(prune.__file__).parent.glob("docs/circuits/*.json")),
                         ids=lambda path: path.stem)
def test_the_included_circuits_are_readable(path):
    """Each belongs to the included model, and up to 30 nodes fit on 80 lines."""
    circuit = prune.load(path)
    lines = show.listing(circuit).splitlines()
    assert circuit.record["model"]["fingerprint"] == prune.fingerprint(prune.load_model(
        path.parents[1] / "long.npz"))
    assert max(map(len, lines)) <= 100 and (len(circuit.nodes) > 30 or len(lines) <= 80)
    show.page(circuit), show.dot(circuit.record)


# ---- questions ----------------------------------------------------------------------------------

@given(cfg=configs(), seed=SEEDS)
def test_the_parts_of_a_traced_node_add_up_to_it(cfg, seed):
    """Down to tokens and biases, so that what is not printed is known."""
    model, _, prompts, _ = drawn_mask(cfg, seed)
    one = trace.Prompt(model, prompts.ids[0])
    assert np.allclose(one.logits, run_hook(model, prompts.ids[:1])[0, -1])
    for site, gate in one.gate.items():
        for t, c in np.argwhere(gate != 0):
            parts = [amount for amount, *_ in one.parts(site, t, c, 2.0)]
            assert np.isclose(sum(parts), 2 * one.value[site][t, c], 1e-6, 1e-9)

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
    circuit = prune.load("circuits/cue.json")
    assert named(circuit.mask, model) == named(found_circuit().mask, model)
    assert ran(capsys, "--check circuits/cue.json --model model.npz").count("\n") == 1
    out = ran(capsys, f"{command} --explain")
    alike = NODES - set(re.findall(NODE, out))
    assert out.startswith(f"{len(alike)} nodes that do not differ") and len(alike) < 3
    assert set(re.findall(NODE, ran(capsys, f"{command} --explain <"))) == NODES
    example, node = circuit.record["example"], prune.node_number("h1.neuron.5", model.cfg)
    asked = "".join(" --ask " + "".join(prompt[1:]) for prompt in example["prompts"])
    out = ran(capsys, command + asked)
    own = [float(x) for x in re.findall(r"circuit +(\S+)", out)]  # first over second; then reverse
    assert own == pytest.approx([example["margins"][0], -example["margins"][1]], abs=2e-3)
    assert out.count("logit of `x` less that of `y`: full model") == 2
    mean = prune.ModelContext(model).frozen[node]
    outs = [ran(capsys, f"{command} {change}") for change in (
        "--ablate h1.neuron.5", "--set final.1=2 --set final.3=1",
        *(f"--set h1.neuron.5={value}" for value in (mean, 0, 1.5)))]
    assert outs[0] == outs[2] and len(set(outs)) == 4
    full = circuit.record["losses"]["full"]["search"]["binary"]
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
    status, out, err = run_main(capsys, "--trace", "if a", "--model", "model.npz", main=prune.main)
    assert (status, err) == (0, "") and "not followed to its end" in out
    with monkeypatch.context() as patch, pytest.raises(sg.UserError, match="sum of its parts"):
        patch.setattr(sg, "rmsnorm", lambda x, real=sg.rmsnorm: (2 * real(x)[0], real(x)[1]))
        trace.trace(wired(), "if a")
    model, circuit = prune.load_model("model.npz"), prune.load("circuits/cue.json")
    prompts = prune.make_prompts(model, "cue", 2, 0).rows([0])
    [text, *_] = tasks.pairs("cue", 1)[0].prompts
    lines = ask.ask(circuit, model, [text])
    margin = prune.margins(circuit.run(model, prompts), prompts)[0]
    assert f"circuit {margin:+.3f}" in lines[2] or f"circuit {-margin:+.3f}" in lines[2]
    [a, b] = tasks.pairs("cue", 1)[0].answers
    named = ask.ask(circuit, model, [text], (b, a))[2]
    assert f"circuit {-margin:+.3f}" in named
    assert ask.ask(circuit, model, ["if"], (" a", " b"))[0] == "if "  # they share the space
    walk = ask.walk(circuit, model, text)
    assert set(walk["values"]) == set(circuit.nodes) and len(walk["prompts"]) == 1
    assert circuit.edges == [tuple(e.values()) for e in circuit.record["edges"]]
    seen = prune.activations(model, text)
    assert [len(x) for x in seen.values()] == [len(walk["prompts"][0])] * len(seen)
    other = wired()
    other.params["head.b"][0] += 1
    with pytest.raises(sg.UserError, match="of another model"):
        circuit.run(other, prompts)
    config = circuit.record["model"]["config"]
    del config["late"]  # as if Config had got this field later
    assert circuit.is_of(model)
    config["act"] = "gelu"
    assert not circuit.is_of(model)
    with pytest.raises(sg.UserError, match="exceed the context"):
        prune.activations(model, 999 * "a")

def test_tasks_of_ones_own_are_listed_and_searched(brief, capsys, monkeypatch):
    """A file adds its functions of one argument; worker processes know them too."""
    monkeypatch.setattr(tasks, "added", [])
    write_circuit()
    write({"own.py": b"import math\ndef _no(w): pass\ndef mine(w):\n"
                     b"    return ('if a', ' =', ''), ('a', ' +', '')\n",
           "leaves.py": b"def leaves(w): raise SystemExit(5)\n",
           "none.py": b"x = 1\n", "known.py": b"def cue(w): pass\n", "broken.py": b"1 / 0\n",
           "all.py": b"def compare(w): pass\n", "ends.py": b"import sys\nsys.exit(3)\n"})
    line = "--model model.npz --tasks"
    status, out, err = run_main(capsys, *line.split(), "own.py", main=prune.main)
    assert (status, err) == (0, "") and re.search("(?m)^mine .* - +mine makes", out)
    with pytest.raises(sg.UserError, match="at least 1"):
        sg.evaluate_tasks(prune.load_model("model.npz"), 0)
    assert_refused(capsys, "SystemExit", "leaves", *line.split(), "leaves.py", main=prune.main)
    with pytest.raises(sg.UserError, match="only 1 different"):
        tasks.pairs("mine", 2)
    write({"odd.py": b"def odd(w): return None\ndef three(w): return [('a', 'b', '')] * 3\n"
                     b"def number(w): return [(1, 2, 3)] * 2\ndef wrong(w): return 1 / 0\n"})
    for task in "odd", "three", "number", "wrong":
        assert_refused(capsys, f"{task} must return two sides", task, *line.split(), "odd.py",
                       main=prune.main)
        tasks.TASKS = {name: tasks.TASKS[name] for name in ("cue", "mine")}
        del tasks.added[1:]
    assert re.search("(?m)^cue .* nodes, .* edges$", out)
    assert tasks.added == [os.path.abspath("own.py")]
    for name, said in (("none", "no function"), ("known", "already"), ("broken", "division"),
                       ("all", "already"), ("ends", "SystemExit"), ("gone", "No such file")):
        assert_refused(capsys, said, *line.split(), f"{name}.py", main=prune.main)
    assert list(prune.on_cores(known_tasks, [0, 1], 2))[0][-1] == "mine"

def known_tasks(_):
    return list(tasks.TASKS)

def test_the_readmes_python_runs(capsys, monkeypatch):
    """Every block, one after the other; the checkpoint of theirs holds many windows of text."""
    text = Path(prune.__file__).with_name("README.md").read_text("utf-8")
    Path("docs").symlink_to(Path(prune.__file__).with_name("docs"))
    names, blocks = {}, re.findall(r"```python\n(.*?)```", text, re.S)
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))  # what a block adds is gone afterwards
    monkeypatch.setattr(sg, "ACTIVATIONS", dict(sg.ACTIVATIONS))
    for block in blocks:
        exec(block, names)
    assert len(blocks) >= 3 and "trained in" in capsys.readouterr().out
    assert len({row.tobytes() for row in names["model"].text}) > 30


# ---- comparisons --------------------------------------------------------------------------------

@pytest.mark.parametrize("ablation", ["mean", "resample"])
def test_a_curve_reaches_its_targets_and_only_grows(brief, monkeypatch, ablation):
    """What a point says is so, and a lower target never takes fewer edges. Masks are trained once
    under the full model's loss, or they miss targets just above it; none below it is asked for."""
    task, progress, goals = cue_task(ablation=ablation), program.Progress(), []
    points, full, real = compare.curve(task, progress), task.full_loss(), prune.learn_masks
    assert [target for target, *_ in points] == [0.15, 0.3]
    assert points[0][2][1] >= points[1][2][1] >= 6
    for target, mask, size in points:
        assert task.loss(mask) <= target and task.size(mask) == size
    monkeypatch.setattr(prune, "learn_masks",
                        lambda *args: goals.append(args[-1]) or real(*args))
    monkeypatch.setattr(compare, "SWEEP", (0.3, 0.99 * full))
    monkeypatch.setattr(compare, "AIMS", (1.05 * full, 0.9 * full, 0.8 * full))
    assert [target for target, *_ in compare.curve(task, progress)] == [0.3]
    assert goals == pytest.approx([1.025 * full, 0.45 * full])

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
    page("c/compare.html")
    again = run(line)
    assert again == out[out.index("\n    model"):]
    other = wired()
    other.params["head.b"][:] += np.arange(258) % 7
    sg.save("other.npz", other)
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
    row = compare.compare_one([prune.ModelContext(wired())], FEW, (0, "cue"))
    assert row["points"] and row["cleaned"] is None  # what is left as it is, is not cleaned

def test_resampled_values_are_those_of_other_text(brief, capsys):
    """Of every site and position. They change what a circuit computes, and not the full model."""
    task, frozen, every = cue_task(ablation="resample"), cue_task(), prune.every_node(wired().cfg)
    shapes, (_, part) = {x.shape for x in task.runner.values[0].values()}, task.runner.parts[0]
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
