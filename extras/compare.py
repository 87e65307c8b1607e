"""Compare the sizes of circuits in several models, at ten target losses (paper Figures 2, 31, 32).

    python -m extras.compare out/dense.npz out/sparse.npz [--tasks var_if for_while]

Run it from the repository's root. One model gives its sizes alone. circuits/compare.json keeps
finished rows. Models that differ only in their seeds are pooled. A size is that of the smallest
circuit by rank: every nonzero weight between its nodes counts.
"""
import signal
import sys
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends quietly while the modules load
import dataclasses
import functools
import json
import math
import os
import time
from collections import Counter, defaultdict

import sparsegpt as sg  # before NumPy: it sets the number of BLAS threads
import numpy as np

import prune
import tasks

SWEEP = (0.5, 0.3, 0.2, 0.15, 0.1, 0.075, 0.05, 0.03, 0.02, 0.01)  # target losses, in nats
AIMS = (0.15, 0.05)  # targets that masks are trained for
EMPTY = dict(full=None, points=(), by_attribution=(), cleaned=None, without=None, random=None)


# ---- circuits of one model ----------------------------------------------------------------------

def curve(task, targets, progress):
    """[(target, mask, (nodes, edges))]: the smallest circuit by rank at each target, the lowest
    first.

    Masks are trained for each of AIMS, and a target takes the best of their rankings. Targets
    below the full model's own loss are skipped, as they would take nearly all of it. One aim below
    that loss is trained for: masks that aim at a target just above it may miss it.
    """
    lowest, rankings = task.full_loss(), []
    aims = [aim for aim in AIMS if aim >= min(targets)] or [min(targets)]
    for i, aim in enumerate(aims[:1 + sum(aim > lowest for aim in aims)]):
        goal = prune.training_target(dataclasses.replace(task.settings, target=aim), lowest)
        order, tau = prune.learn_masks(task, *prune.TRIALS[0], [task.settings.seed, i], progress,
                                       goal)
        rankings.append((order, int((tau >= 0).sum())))
    out, best = [], (math.inf, math.inf, None)  # edges, nodes, mask
    for target in sorted(target for target in targets if target >= lowest):
        for order, learned in rankings:
            mask = prune.bisect(order, lambda m: task.holds(m, target), learned)
            if mask is not None:  # what reaches a lower target reaches this one too
                best = min(best, (*task.size(mask)[::-1], mask), key=lambda found: found[:2])
        if best[2] is not None:
            out.append((target, best[2], best[1::-1]))
    return out


def compare_one(contexts, settings, targets, job):
    """The row of compare.json for a job, (number of a ModelContext, task): the full model's loss,
    the sizes along the `curve` and by attribution; and at the target of settings the size after
    cleaning, and the full model's loss without the circuit and without as many random nodes."""
    context, name = contexts[job[0]], job[1]
    row = dict(EMPTY, model=context.fingerprint, task=name, points=[], by_attribution=[])
    try:
        task = prune.PruningTask(context.model, context.frozen_values, name, settings)
    except prune.CannotPrune:
        return row
    row["full"] = task.full_loss()
    if not row["full"] <= max(targets):  # nor is NaN
        return row
    progress, order = sg.Progress(), prune.rank_by_attribution(task)
    for target, mask, (nodes, edges) in curve(task, targets, progress):
        point = dict(task=name, target=target)
        row["points"].append(dict(point, nodes=nodes, edges=edges))
        ranked = prune.bisect(order, lambda m: task.loss(m) <= target)
        if ranked is not None:
            row["by_attribution"].append(dict(point, edges=task.size(ranked)[1]))
        if target == settings.target:
            # Trials by resampling take too long, and large circuits stay as they are.
            if settings.ablation != "resample" and edges <= prune.TOO_LARGE:
                cleaned = prune.clean(task, mask, lambda *_: None, progress)
                row["cleaned"] = dict(zip(("nodes", "edges"), task.size(cleaned)))
            needed = prune.check_necessity(task, mask)
            row |= {"without": needed["loss"], "random": needed["median"]}
    return row


# ---- several models -----------------------------------------------------------------------------

def compare(contexts, settings, targets, path, workers, names, log=print):
    """Prune the named tasks in all models alike and report size against loss. path: compare.json,
    whose rows of these models or others are kept. Raises UserError if it is of other settings."""
    began, prints = time.perf_counter(), [context.fingerprint for context in contexts]
    head = dict(settings=dataclasses.asdict(settings), targets=[*targets], aims=[*AIMS])
    rows = read(path, head) if path.exists() else []
    models = facts(contexts)  # before the work: the text may have changed
    finished = {(row["model"], row["task"]) for row in rows}
    jobs = [(prints.index(model), task) for task in names for model in dict.fromkeys(prints)
            if (model, task) not in finished]
    one = functools.partial(compare_one, contexts, settings, targets)
    for n, row in enumerate(prune.on_cores(one, jobs, workers, in_order=False), 1):
        rows.append(row)
        sg.write_text(path, json.dumps({**head, "models": models, "rows": rows}))
        left = (time.perf_counter() - began) / n * (len(jobs) - n)
        edges = edges_of(row, "points", settings.target)
        log(f"{n:>3} of {len(jobs)}  {contexts[prints.index(row['model'])].model.cfg.out:<20} "
            f"{row['task']:<27} {'no' if edges is None else edges} edges; {sg.clock(left)} left")
    log(comparison(by_kind(models), [row for row in rows if row["task"] in names],
                   settings.target))


def read(path, head):
    """The rows of a compare.json. Raises UserError if it is of other settings than head, or not a
    comparison."""
    try:
        saved = json.loads(sg.read_bytes(path))
        rows = saved["rows"]
        if any(row.keys() != {"model", "task", *EMPTY} for row in rows):
            raise ValueError("its rows are others")
        other = any(saved[key] != value for key, value in head.items())
    except Exception as e:  # it may be damaged in any way
        raise sg.UserError(f"{path} exists but is not a comparison ({type(e).__name__}: {e}); "
                           "choose another --out") from e
    if other:
        raise sg.UserError(f"{path} is of other settings: choose another --out, or delete it")
    return rows


def kurtosis(model, ids):
    """The median kurtosis of the channels of the final normed residual stream, on ids [n, T]: 3
    for a Gaussian, more with heavier tails (paper Figure 10)."""
    x = sg.to_host(prune.observe(model, ids)[1]["final"]).astype(np.float64)
    x = (x - x.mean(0))[:, x.std(0) > 0]
    return float(np.median((x ** 4).mean(0) / (x ** 2).mean(0) ** 2)) if x.size else math.nan


def facts(contexts):
    """What the tables say of the models, which were trained on the same text."""
    cfg, out = contexts[0].model.cfg, []
    corpus = sg.load_corpus(cfg, lambda line: None)
    for context in contexts:
        model, cfg = context.model, context.model.cfg
        if model.tok.merges != corpus.tok.merges:
            raise sg.UserError(f"{cfg.out} was trained on other text than the first model, or "
                               f"than --data {cfg.data} now")
        loss, streams = sg.evaluate(model.params, corpus.val, cfg, 256)
        out.append(dict(
            name=cfg.out, model=context.fingerprint, kind=kind_of(cfg), seed=cfg.seed,
            d_model=cfg.d_model, density=cfg.density, afrac=cfg.afrac, loss=loss, **streams,
            kurtosis=kurtosis(model, model.text[:16]),
            nonzero=sum(int((model.params[name] != 0).sum()) for name in prune.matrices(cfg))))
    return out


def kind_of(cfg):
    """What pooled models have in common. Another seed may need other steps for the same loss."""
    return json.dumps({**dataclasses.asdict(cfg), "seed": 0, "steps": 0, "threads": 0, "out": ""})


def by_kind(models):
    """The dicts of `facts` in lists of one kind, by seed. A repeated model starts a list."""
    out, times = defaultdict(list), Counter()
    for m in models:
        own = m["kind"], m["seed"]
        out[m["kind"], times[own]].append(m)
        times[own] += 1
    return [sorted(kind, key=lambda m: m["seed"]) for kind in out.values()]


# ---- tables -------------------------------------------------------------------------------------

def edges_of(row, which, target):
    """The edges of a row's circuit, or None. which: "points", "by_attribution" or "cleaned"."""
    if which == "cleaned":
        return row["cleaned"] and row["cleaned"]["edges"]
    return next((p["edges"] for p in row[which] if p["target"] == target), None)


def interval(values, groups, draws=10_000):
    """The 95 % bootstrap interval of a mean, with whole groups drawn anew."""
    _, group = np.unique(list(groups), return_inverse=True)
    sums = np.stack([np.bincount(group, values), np.bincount(group)], axis=1)
    picks = np.random.default_rng(0).integers(0, len(sums), (draws, len(sums)))
    total, n = sums[picks].sum(1).T
    return np.percentile(total / n, [2.5, 97.5])


def comparison(kinds, rows, target):
    """The tables of `compare`, as text. Kinds of models are A, B and so on; seeds are pooled."""
    by = {(row["model"], row["task"]): row for row in rows}
    names = [task for task in tasks.TASKS if task in {row["task"] for row in rows}]
    letters, most = "ABCDEFGH"[:len(kinds)], max(map(len, kinds))
    # One of each kind, by seed; a kind of one model stands beside every seed of the others.
    matched = list(zip(*(kind * most if len(kind) == 1 else kind for kind in kinds)))
    out = ["", f"{'':<4}{'model':<26} width density  AbsTopK nonzero edges  kurtosis  "
           "validation loss (code, idioms)"]
    for letter, kind in zip(letters, kinds):
        out += [f"{letter:<4}{m['name']:<26} {m['d_model']:>5} {m['density']:>7.4g} "
                f"{m['afrac']:>8.4g} {m['nonzero']:>13,}  {m['kurtosis']:>8.1f}  {m['loss']:.4f} "
                f"({m['code']:.4f}, {m.get('idioms', math.nan):.4f})" for m in kind]
    for models in matched:
        ratio = max(m["loss"] for m in models) / min(m["loss"] for m in models)
        if ratio > 1.02:
            out.append(f"WARNING: {', '.join(m['name'] for m in models)}: losses differ by "
                       f"{ratio - 1:.1%}, more than 2 %: not a matched comparison")

    def row_of(m, task):
        return by.get((m["model"], task), EMPTY)

    def cells(values, form):
        return "/".join("-" if x is None else format(x, form) for x in values)

    def means(title, choices):
        """Lines of geometric means over the tasks that all matched models reach."""
        lines = ["", f"{title:<22} tasks" + "".join(f"{'edges ' + c:>10}" for c in letters)
                 + "".join(f"{'A/' + c:>8} {'95 % interval':>15} {'median':>7}"
                           + "  by seed" * (len(matched) > 1) for c in letters[1:])]
        for label, which, at, least in choices:
            found = [(i, task, edges) for i, models in enumerate(matched) for task in names
                     if None not in (edges := [edges_of(row_of(m, task), which, at)
                                               for m in models]) and min(edges) >= least]
            if not found:
                continue
            seeds, tasks_, edges = zip(*found)
            seeds, logs = np.array(seeds), np.log(np.maximum(1, edges))  # [found, kind]
            line = f"{label:<22} {len(found):>5}"
            line += "".join(f"{x:>10.1f}" for x in np.exp(logs.mean(0)))
            for i in range(1, len(kinds)):
                ratio = logs[:, 0] - logs[:, i]
                ends = "{:.2f} to {:.2f}".format(*np.exp(interval(ratio, tasks_)))
                line += f"{np.exp(ratio.mean()):>8.2f} {ends:>15} {np.exp(np.median(ratio)):>7.2f}"
                if len(matched) > 1:
                    line += "  " + " ".join(f"{np.exp(ratio[seeds == j].mean()):.2f}"
                                            if j in seeds else "-" for j in range(len(matched)))
            lines.append(line)
        return lines

    out += means("target", [(f"{t:g}", "points", t, 0) for t in SWEEP])
    out += means(f"at {target:g}", [("learned masks", "points", target, 0),
                                    ("without 0 edges", "points", target, 1),
                                    ("cleaned", "cleaned", target, 0),
                                    ("attribution", "by_attribution", target, 0)])
    wide, cell = (9, 8) if len(matched) == 1 else (18, 8 * len(matched))
    out += ["edges: geometric means over the tasks (of every seed) that all models reach; 0 "
            "counts as 1", "interval: of the mean ratio, if the tasks were drawn anew", "",
            f"{f'at {target:g}':<28}" + "".join(
                f"{'loss ' + c:>{wide}}{'edges':>{cell}}{'cleaned':>{cell}}" for c in letters)]
    for task in names:
        line = f"{task:<28}"
        for kind in kinds:
            seeds = [row_of(m, task) for m in kind]
            line += f"{cells((row['full'] for row in seeds), '.3f'):>{wide}}"
            for which in ("points", "cleaned"):
                edges = (edges_of(row, which, target) for row in seeds)
                line += f"{cells(edges, 'd'):>{cell}}"
        out.append(line)
    out += ["", f"{'full model without':<22} tasks  the circuit  as many random nodes  (loss)"]
    for letter, kind in zip(letters, kinds):
        pairs = [(row["without"], row["random"]) for m in kind for task in names
                 if (row := row_of(m, task))["without"] is not None]
        if pairs:
            circuit, random = np.mean(pairs, 0)
            out.append(f"{letter:<22} {len(pairs):>5}  {circuit:>11.3f}  {random:>20.3f}")
    return "\n".join(out)


# ---- command line -------------------------------------------------------------------------------

def act(argv):
    """What `main` does, if nothing goes wrong."""
    parser = sg.Parser(description="Compare the sizes of circuits in several models.")
    parser.add_argument("models", nargs="+", metavar="FILE", help="checkpoints")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="default: all")
    parser.add_argument("--out", help="folder for compare.json (default circuits)")
    parser.add_argument("--targets", nargs="+", type=float, choices=SWEEP, metavar="LOSS",
                        help="some of the ten target losses, which takes less time")
    parser.add_argument("--data", default=sg.Config.data, help="what the models were trained on "
                        "(default stdlib)")
    prune.add_settings(parser, [*prune.ABLATIONS, "resample"])
    given = vars(parser.parse_args(argv))
    settings, folder = prune.settings_of(given), Path(given.get("out", "circuits"))
    if settings.ablation == "resample":  # of which nothing is restored
        settings = dataclasses.replace(settings, restore=0.0)
    targets = sorted(given.get("targets", SWEEP), reverse=True)
    sg.use_device(os.environ.get("SPARSEGPT_DEVICE", "cpu"))
    sg.keep_freed_memory()
    if settings.target not in targets:
        raise sg.UserError(f"--target must be one of {', '.join(map(str, targets))}")
    for task in given.get("tasks", ()):
        tasks.pairs(task, 1)  # raises TaskError on an unknown task
    models = [sg.load_model(model) for model in given["models"]]
    if other := [m.cfg for m in models if m.cfg.data != given["data"]]:  # no file decides it
        raise sg.UserError(f"{other[0].out} was trained on --data {other[0].data}: name it")
    kinds = by_kind([dict(kind=kind_of(m.cfg), seed=m.cfg.seed) for m in models])
    if len(kinds) > 8 or len({1, *map(len, kinds)}) > 2:
        raise sg.UserError("give at most 8 models, one or equally many seeds of each; these have "
                           f"{', '.join(str(len(kind)) for kind in kinds)}")
    path = sg.check_output(folder / "compare.json")  # makes the folder
    with sg.locked(folder):
        compare([prune.ModelContext(m, settings.ablation) for m in models], settings, targets, path,
                max(m.cfg.threads or sg.n_cores() for m in models),
                list(dict.fromkeys(given.get("tasks", tasks.TASKS))))
    return 0


def main(argv=None):
    """The command line. Returns the exit status: 0, 2 for a mistake, 130 for Ctrl-C."""
    return sg.command("extras.compare", act, argv, "finished rows are kept; the same command "
                      "continues")


if __name__ == "__main__":
    sys.exit(main())
