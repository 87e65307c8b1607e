"""Prune a trained model, task by task, to the few nodes and edges that do the task: a circuit.

Source: Gao et al., arXiv 2511.13653 (2025), "the paper", sections 2.2 and A.5.

    python prune.py --show single_double_quote   # a circuit that comes with the source
    python prune.py single_double_quote          # find it, in out/sparse.npz or docs/long.npz
    python prune.py all                          # every task, and circuits/summary.html

A *node* is one channel at one of a block's hook points (sites), or of the final normalized
residual stream, at all positions of all prompts at once. A deleted node is frozen at its mean over
training text. An *edge* is a nonzero weight between two kept nodes. A deleted edge is frozen at
the weight times the mean of its source node. Biases, embeddings and unembeddings are never pruned.

What a circuit computes is `sparsegpt.forward` with the hook `Ablation`. A circuit must hold
(`PruningTask.holds`): reach the target loss alone, as in the paper; reach it in the mean beside
random shares of the other nodes; and carry the answer. The search has three steps: learn a mask
over nodes by gradient descent through a hard threshold; keep the fewest nodes by rank that hold;
delete every node and edge that it can do without (the paper did this by hand, kept all edges).

Part I is the method, in the order of its story. Part II is what it stands on, from nodes and edges
to the command line. Drawings of a circuit, and questions to it, are in extras/.
"""
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it quietly while the modules load
sys.modules.setdefault("prune", sys.modules[__name__])  # for extras, if this is the program
import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import textwrap
import threading
import time
from collections import defaultdict, namedtuple
from concurrent import futures
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

import sparsegpt as sg  # before NumPy: it sets the number of BLAS threads
import numpy as np

import tasks

# =================================================================================================
# Part I: the method
# =================================================================================================
# A vector over all nodes, in the order of computation, is "by node". Names that are not defined
# here are of Part II: masks with their edges and links, prompts and margins, runners, checks.

# What deleted nodes are frozen at: (function of a Model -> values by node, what is said of it).
ABLATIONS = {
    "mean": (lambda model: mean_activations(model, model.text), "the mean over training text"),
    "zero": (lambda model: np.zeros(n_nodes(model.cfg)), "zero")}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides a search. Raises UserError on a wrong value."""
    target: float = 0.15     # binary loss in nats that the circuit may have
    ablation: str = "mean"   # one of ABLATIONS; or resample, to compare sizes by
    runs: int = 1            # mask trainings; one more, to half the goal, if all fell short
    steps: int = 400         # of each
    pairs: int = 8           # prompt pairs a step
    search_pairs: int = 64   # pairs that losses are measured on; masks see these and as many more
    restore: float = 1.0     # largest share of other nodes restored beside a circuit; 0: the paper
    seed: int = 0

    def __post_init__(self):
        if self.ablation not in (*ABLATIONS, "resample"):
            raise sg.UserError(f"there is no ablation {self.ablation!r}")
        for name, low, high in (("target", 0.0001, 0.69), ("runs", 1, 9), ("steps", 1, 100_000),
                                ("pairs", 1, 1000), ("search_pairs", 1, 1000),
                                ("restore", 0, 1), ("seed", 0, 1 << 31)):
            value = getattr(self, name)
            kind = (int, float) if name in ("target", "restore") else int
            if not (isinstance(value, kind) and low <= value <= high):  # nor is NaN
                raise sg.UserError(f"--{name} must be from {low} to {high}, not {value!r}")

    def limit(self):
        """(loss, what it is) up to which checks of a loss pass: chance proves nothing."""
        return min((2 * self.target, "twice the target"), (HALF_CHANCE, "half of chance"))


# k_coef (loss per node kept), rate and temperature of the runs, in the order of their use.
TRIALS = ((1e-3, 0.03, 1.0), (1e-3, 0.01, 1.0), (1e-3, 0.03, 0.3))
TOO_LARGE = 2000  # a circuit of more edges is not cleaned: thousands of trials of 0.1 s each
HALF_CHANCE = math.log(2) / 2
# The stages' shares of a search's time, of a circuit of 20 edges. Larger ones are cleaned longer.
SHARES = {"learning masks": 0.5, "cleaning nodes": 0.2, "cleaning edges": 0.3}


# ---- a task's circuit, and its controls ---------------------------------------------------------

def prune(model, name, settings=Settings(), context=None, seeds=2, workers=1, checks=True,
          progress=True, found=lambda circuit, check: None):
    """The Circuit of a task, with its checks (paper 2.2, A.5; the method is at the top).

    context: shared by the tasks of a model. seeds: searches with different mask seeds; the first
    is reported, the others are compared with it. workers: processes; the result is the same.
    checks: without, there are no controls or other seeds, and it takes a fifth of the time.
    progress: whether it is shown. found: called with the circuit and None when its search has
    ended, then with the circuit and each check when that has.

    Raises CannotPrune if the model cannot do the task, UserError on an unknown task, another
    context, or values to resample, for which extras/compare.py alone is made.
    """
    context = context or ModelContext(model, settings.ablation)
    if (context.fingerprint, context.ablation) != (fingerprint(model), settings.ablation) or (
            settings.ablation not in ABLATIONS):
        raise sg.UserError("the context is of another model or ablation, or of resampling")
    task = PruningTask(model, context.frozen_values, name, settings)
    if not (full := task.full_loss()) <= settings.target:  # NaN is neither
        raise CannotPrune(f"the full model's loss on {name} is {full:.3f}, over the target of "
                          f"{settings.target:g}")
    jobs = [("circuit", task, 0)]
    if checks:
        control = ModelContext(shuffled(model), settings.ablation)
        # With all other nodes restored a control is the full model, which fails it: that would
        # show nothing. With half of them it may succeed.
        half = dataclasses.replace(settings, restore=min(0.5, settings.restore))
        for key, of, labels in zip(CONTROLS, (context, context, control),
                                   ("nonsense", "inverted", "true")):
            jobs.append((key, PruningTask(of.model, of.frozen_values, name, half, labels), 0))
        jobs += [(f"seed {i}", task, i) for i in range(1, seeds)]
    began = time.perf_counter()
    said = [sg.Progress(progress and f"{name}, search {i + 1} of {len(jobs)}, {key}", SHARES,
                        (i, len(jobs), began)) for i, (key, _, _) in enumerate(jobs)]
    results = on_cores(search_job, list(zip(said, jobs)), workers)
    _, own = next(results)
    if own.mask is None:
        raise CannotPrune(f"no set of nodes that was tried does {name} alone and beside others")
    circuit = make_circuit(context, task, own)
    found(circuit, None)
    for check in checks_of(circuit, task, results):
        circuit.add(check)
        found(circuit, check)
    return circuit


def search_job(job):
    """(key, SearchResult) of a job: (its Progress, (key, PruningTask, seed))."""
    progress, (key, task, seed) = job
    to_clean = key not in CONTROLS or not task.settings.restore
    return key, search(task, progress, seed, to_clean)


class PruningTask:
    """A model and a task to find circuits for: the prompts, the values of deleted nodes, and what
    a circuit must do, see `holds`.

    Masks are learned on `pool`. Losses are measured on `judged`, the first half of it. Nothing is
    chosen by the held-out prompts. labels: see `make_prompts`.
    """

    def __init__(self, model, frozen_values, name, settings, labels="true"):
        self.model, self.frozen_values, self.name = model, frozen_values, name
        self.settings, self.known = settings, {}  # what was measured, by a digest of the mask
        self.text = None if settings.ablation in ABLATIONS else model.text
        self.pool = make_prompts(model, name, 2 * settings.search_pairs, settings.seed,
                                 labels=labels)
        self.judged = self.pool.rows(slice(len(self.pool.last) // 4 * 2 or None))  # whole pairs
        self.held = make_prompts(model, name, settings.search_pairs, settings.seed, "held")
        rng = np.random.default_rng([settings.seed, 1])
        self.restoring = PlainRunner(model, frozen_values, self.judged, restored=restored_nodes(
            len(self.judged.last), settings.restore, rng, model.cfg))
        self.runner = quickest(model, frozen_values, self.judged) if self.text is None else (
            PlainRunner(model, frozen_values, self.judged, self.text,
                        np.random.default_rng(settings.seed)))

    def values_for(self, prompts, rng):
        """The values of deleted nodes in one run on some prompts."""
        return self.frozen_values if self.text is None else (
            resampled(self.model, prompts, self.text, rng))

    def loss(self, mask):
        """The binary loss of a mask. It is remembered: cleaning asks for many of them twice."""
        if (key := mask_key(mask)) not in self.known:
            self.known[key] = logistic(self.runner.margins(mask))
        return self.known[key]

    def full_loss(self):
        """The binary loss of the full model."""
        return self.loss(every_node(self.model.cfg))

    def holds(self, mask, target=None):
        """Whether a mask does the task at the target loss: alone, and in the mean over random
        shares of other nodes beside it. Where all of them may be restored, it must also carry the
        answer in the full model. (Judged by restored nodes alone, cleaning leaves circuits that do
        not: see docs/defaults.md.)"""
        target = self.settings.target if target is None else target
        if self.loss(mask) > target:
            return False
        if (key := (mask_key(mask), target)) not in self.known:
            self.known[key] = self.carries(mask, target) and (
                self.restored_loss(mask, target) <= target)
        return self.known[key]

    def restored_loss(self, mask, most=math.inf):
        """`loss`, or if larger, the mean with other nodes restored: for every pair others, in all
        shares up to `Settings.restore`. A deleted edge between two nodes of the mask stays deleted
        beside restored nodes. Once the mean is sure to be over `most`, what it is at least."""
        loss, total, n = self.loss(mask), 0.0, len(self.judged.last)
        if self.settings.restore:
            for index, logits in self.restoring.logits_by_part(mask):
                total += len(index) * logistic(margins(logits, self.judged.rows(index)))
                if total > n * most:
                    break
        return max(loss, total / n)

    def carries(self, mask, target):
        """Whether the full model gives the other answer where the mask's nodes take the values of
        the pair's other prompt. The loss, with right and wrong swapped, must be at most that of
        `training_target`, with all nodes swapped as the full model. (With the target itself as the
        limit fewer circuits carry the answer on held-out prompts.) Only nodes on a path of the
        mask from a token to the logits are swapped: another one carries nothing itself, but what
        reads it in the rest of the model may. Nothing is asked if `restore` is under 1, or if all
        nodes together fail, as where the last token alone decides."""
        def swapped(nodes):
            key = nodes.tobytes()
            if key not in self.known:
                margin = interchanged(self.model, self.pairs_seen, nodes)
                self.known[key] = logistic(-margin)
            return self.known[key]

        if self.settings.restore < 1 or (every := swapped(np.ones_like(mask.nodes))) > target:
            return True
        goal = training_target(dataclasses.replace(self.settings, target=target), every)
        return swapped(self.on_paths(mask)) <= goal

    def on_paths(self, mask):
        """Bool by node: the kept nodes that are not `disconnected_nodes`."""
        return mask.without(disconnected_nodes(mask, self.model, self.pool)).nodes

    @functools.cached_property
    def pairs_seen(self):
        """See `seen_pairs`."""
        return seen_pairs(self.model, self.judged)

    def size(self, mask):
        """(nodes, edges) of a mask: the numbers that are reported."""
        edges = kept_edges(mask, self.model.params, self.model.cfg)
        return int(mask.nodes.sum()), int(sum(kept.sum() for kept in edges.values()))


def restored_nodes(n_prompts, largest, rng, cfg, none=0.0):
    """Bool [n_prompts, nodes]: the nodes that are restored beside a circuit for each prompt, the
    two of a pair alike. They are a share of all nodes, at random. Over the pairs the shares are
    spread evenly from 0 to the largest, after the part `none` of the pairs, which get no node."""
    n = n_prompts // 2
    spread = rng.permutation((np.arange(n) + rng.random(n)) / n)
    share = largest * np.maximum(0, (spread - none) / (1 - none))
    return np.repeat(rng.random((n, n_nodes(cfg))) < share[:, None], 2, 0)


class SearchResult(NamedTuple):
    """What a search ends with. mask: a CircuitMask, or None if no ranking reached the target."""
    mask: object
    loss: float
    stages: list  # size and loss after each


def search(task, progress, seed=0, to_clean=True):
    """Find a small circuit: learn masks, take the fewest nodes by rank that hold, clean.

    The runs differ in hyperparameters and seed; the one with the fewest edges at the target is
    cleaned. The same settings and seed give the same circuit.
    """
    s, best, best_loss, stages = task.settings, None, math.inf, []

    def stage(name, mask):
        nodes, edges = task.size(mask)
        stages.append(dict(stage=name, nodes=nodes, edges=edges, loss=task.restored_loss(mask)))

    def of_all_runs(name, done, total, note):
        progress(name, i * total + done, max(s.runs, i + 1) * total, note)

    goal, i, short = training_target(s, task.full_loss()), 0, True
    while i < s.runs or (short and i == s.runs):
        k_coef, lr, temperature = TRIALS[i % len(TRIALS)]
        order, tau = learn_masks(task, k_coef, lr, temperature, [seed, i], of_all_runs,
                                 goal / 2 if i == s.runs else goal)
        learned, i = CircuitMask(tau >= 0), i + 1
        mask = bisect(order, task.holds, int(learned.nodes.sum()))
        loss, size = task.restored_loss(learned), mask and task.size(mask)
        best_loss = min(best_loss, loss)
        # All masks so far fell short, and their ranking needs far too many nodes.
        short = short and s.target < loss < 3 * s.target and (
            mask is None or mask.nodes.sum() > 2 * learned.nodes.sum())
        if mask is not None and (best is None or size[::-1] < best[0][::-1]):
            best = size, mask, learned
    if best is None:
        return SearchResult(None, best_loss, stages)
    _, mask, learned = best
    stage("learned masks", learned)
    stage("fewest by rank", mask)
    mask = clean(task, mask, stage, progress) if to_clean else mask
    return SearchResult(mask, task.restored_loss(mask), stages)


def training_target(settings, full):
    """The loss that masks are trained to, for the full model's loss: on the way from this to the
    target. Masks that are trained to nearly the target often end over it: see docs/defaults.md. A
    control, whose full model is over the target, is treated like a task that it does perfectly."""
    share = 0.3 if settings.restore == 1 else 0.5
    return share * settings.target + (1 - share) * (full if full < settings.target else 0)


# ---- step 1: learn a mask over nodes (paper A.5) ------------------------------------------------

def learn_masks(task, k_coef, lr, temperature, seed, progress, target):
    """Train a mask over nodes; returns (nodes from most to least needed, tau by node).

    A node is kept where its tau >= 0; the gradient passes as that of a sigmoid (paper A.5). AdamW,
    gradient norm at most 1, rate falling to 0, tau held to [-1, 1]. Nodes are ranked by tau; those
    at 1 by the average estimated loss increase if removed. k_coef, the cost of a node, rises while
    the loss is under `target` and falls while it is over: the right cost differs ten times between
    tasks, and a wrong one gives circuits that are far too large, or useless. Where the answer must
    be carried, every second step trains for that, at half of the rate.
    """
    s, model = task.settings, task.model
    rng, index = np.random.default_rng([s.seed, *seed]), tau_index(model.cfg)
    count = np.bincount(index)  # nodes of each tau
    tau = rng.normal(0.1, 0.01, len(count))
    m, v, increase = np.zeros_like(tau), np.zeros_like(tau), np.zeros_like(tau)
    n_pairs, smooth = len(task.pool.last) // 2, target
    turns = 2 if s.restore == 1 else 1  # what a circuit must do, by turns: see docs/defaults.md
    for step in range(s.steps):
        pick = 2 * rng.choice(n_pairs, min(s.pairs, n_pairs), replace=False)
        batch = task.pool.rows(np.sort(np.concatenate([pick, pick + 1])))
        kept = (tau >= 0)[index]
        if step % turns:  # as in `carries`, but AbsTopK chooses among the other nodes alone
            batch = batch._replace(right=batch.wrong, wrong=batch.right)
            loss, by_node = gradient(model, batch, ~kept, values_of_other(model, batch)[1])
            by_node = -by_node
        else:
            if s.restore:  # others are restored at random, in a quarter of the pairs none
                kept = kept | restored_nodes(len(batch.last), s.restore, rng, model.cfg, 0.25)
            loss, by_node = gradient(model, batch, kept, task.values_for(batch, rng))
        by_tau = np.bincount(index, by_node)
        increase = 0.95 * increase - 0.05 * by_tau
        smooth = 0.9 * smooth + 0.1 * loss
        k_coef = max(1e-5, k_coef * math.exp(0.05 * (1 - min(2, smooth / target))))
        soft = 1 / (1 + np.exp(-tau / temperature))
        g = (by_tau + k_coef * count) * soft * (1 - soft) / temperature
        g /= max(1, math.sqrt(g @ g))
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        move = m / (1 - 0.9 ** (step + 1)) / (np.sqrt(v / (1 - 0.95 ** (step + 1))) + 1e-8)
        tau = np.clip(tau - lr / turns * (1 - step / s.steps) * (move + 1e-3 * tau), -1, 1)
        progress("learning masks", step + 1, s.steps,
                 f"loss {loss:.3f}, {count[tau >= 0].sum()} nodes, ")
    rank = np.empty(len(tau), np.int64)
    rank[np.lexsort((-increase, -tau))] = np.arange(len(tau))
    return np.argsort(rank[index], kind="stable"), tau[index]


def tau_index(cfg):
    """The number of the tau of every node: a query channel and its key channel share one."""
    index, slices = np.arange(n_nodes(cfg)), node_slices(cfg)
    for i in range(cfg.n_layer):
        index[slices[f"h{i}.k"]] = index[slices[f"h{i}.q"]]
    return np.unique(index, return_inverse=True)[1].reshape(-1)


def gradient(model, prompts, nodes, frozen_values):
    """(binary loss, its gradient by how much each node is kept) of prompts."""
    hook = Ablation(nodes, frozen_values, model.cfg)
    logits, cache = sg.forward(model.params, prompts.ids, model.cfg, hook, prompts.last)
    logits, rows = sg.to_host(logits), np.arange(len(prompts.last))
    margin, dlogits = margins(logits, prompts), np.zeros_like(logits)
    slope = np.exp(-np.logaddexp(0, margin)) / len(rows)  # the wrong answer's probability
    dlogits[rows, prompts.right], dlogits[rows, prompts.wrong] = -slope, slope
    linear_backward, none = sg.linear_backward, sg.xp.zeros((1, 1), logits.dtype)
    # A mask needs no gradients of weights: without them a step takes two thirds of the time.
    sg.linear_backward = lambda dout, cache: (dout @ cache[1].T, none, none)
    try:
        sg.backward(sg.xp.asarray(dlogits), cache, model.cfg)
    finally:
        sg.linear_backward = linear_backward
    return logistic(margin), sg.to_host(hook.grad).astype(np.float64)


class Ablation:
    """A hook for `sparsegpt.forward`: kept nodes pass, the others are frozen. This defines what a
    circuit computes.

    AbsTopK chooses among the kept nodes alone, so a circuit computes with nothing but its own
    nodes; or, with `seen`, the full model's values {site: [N, C]}, a node is active where it is
    active in the full model. nodes: bool by node, or [B, nodes] with a set for each prompt.
    frozen_values: by node, or {site: [N, C]} with one for each token.
    After a backward pass, `grad` is by node the gradient of the loss by a number m in
    m x + (1 - m) frozen, where x is the value that the node has, or would have if it were kept.
    """

    def __init__(self, nodes, frozen_values, cfg, seen=None):
        self.slices, self.saved, self.seen = node_slices(cfg), {}, seen
        if not isinstance(frozen_values, dict):
            frozen_values = sg.xp.asarray(frozen_values, cfg.dtype)
            frozen_values = {site: frozen_values[part] for site, part in self.slices.items()}
        self.frozen_values, self.nodes = frozen_values, sg.xp.asarray(nodes)
        self.most = {site: int(nodes[..., part].sum(-1).max())
                     for site, part in self.slices.items()}
        self.grad = sg.xp.zeros(n_nodes(cfg), cfg.dtype)

    def kept(self, site, x):
        """Which of a site's nodes are kept: bool [C], or [N, C] for the tokens of x."""
        kept = self.nodes[..., self.slices[site]]
        return kept if kept.ndim == 1 else kept.repeat(len(x) // len(kept), 0)

    def forward(self, site, x, k):
        xp, kept, active = sg.xp, self.kept(site, x), None
        if self.seen and k < x.shape[1]:
            active = self.seen[site] != 0
        elif k < x.shape[1] and k <= self.most[site]:  # else all kept nodes stay active
            size = abs(x)
            winners = sg.topk_mask(size * kept, k)
            # A deleted node, if it were kept, would have to exceed the least active one.
            least = xp.where(winners, size * kept, math.inf).min(1, keepdims=True)
            active = xp.where(kept, winners, size >= least)
        x = x if active is None else x * active
        self.saved[site] = x, active
        return xp.where(kept, x, self.frozen_values[site])

    def backward(self, site, dx):
        part, (x, active) = self.slices[site], self.saved.pop(site)
        self.grad[part] = sg.xp.einsum("nc,nc->c", dx, x - self.frozen_values[site])
        dx = dx * self.kept(site, dx)
        return dx if active is None else dx * active


# ---- step 2: the fewest nodes by rank -----------------------------------------------------------

def bisect(order, good, guess=0):
    """The mask of the fewest first nodes of an order for which `good` holds, or None if it does
    not hold for all of them. Bisection assumes that more nodes never hurt, which is nearly true.
    So it first looks at `guess` nodes, those of a learned mask, and doubles from there."""
    def first(n):
        nodes = np.zeros(len(order), bool)
        nodes[order[:n]] = True
        return CircuitMask(nodes)

    low, high, middle = -1, len(order), min(guess, len(order) - 1)
    while high - low > 1:
        if good(first(middle)):
            high = middle
        else:
            low = middle
        middle = (low + high) // 2 if high < len(order) else min(2 * low + 1, high - 1)
    return first(high) if high < len(order) or good(first(high)) else None


def rank_by_attribution(task):
    """Nodes by the estimated loss increase if each is removed: gradient x (activation - frozen
    value), the paper's baseline for learned masks (Figure 31)."""
    nodes, rng = every_node(task.model.cfg).nodes, np.random.default_rng(0)
    increase = sum(-gradient(task.model, part, nodes, task.values_for(part, rng))[1] * len(index)
                   for index, part in task.pool.parts())
    return np.argsort(-increase, kind="stable")


# ---- step 3: delete what can go -----------------------------------------------------------------

def clean(task, mask, stage, progress):
    """The mask without every node and edge that can go alone, one after another, until none can,
    and without disconnected nodes and groups of minor ones if it still holds. A circuit of over
    TOO_LARGE edges stays as it is."""
    model = task.model
    if task.size(mask)[1] > TOO_LARGE:
        stage("not cleaned: too large", mask)
        return mask

    def nodes(m):
        return np.flatnonzero(m.nodes).tolist()

    def nodes_and_edges(m):
        return nodes(m) + edge_list(kept_edges(m, model.params, model.cfg))

    mask = mask._replace(edges=kept_edges(mask, model.params, model.cfg))
    mask = delete_greedily(mask, nodes, task, progress, "cleaning nodes", {})
    stage("nodes cleaned", mask)
    size, loss_without = None, {}
    while task.size(mask) != size:
        size = task.size(mask)
        mask = delete_greedily(mask, nodes_and_edges, task, progress, "cleaning edges",
                               loss_without)
        groups = minor_groups(task, mask, importance(task, mask))
        for group in (disconnected_nodes(mask, model, task.pool), *groups):
            if len(group) and task.holds(mask.without(group)):
                mask = mask.without(group)
    stage("edges cleaned", mask)
    return mask


def delete_greedily(mask, items, task, progress, stage, loss_without):
    """The mask without every item that it can do without: none that is left can go alone.

    Items are tried in passes, in the order of the loss without each (kept in `loss_without`, from
    when it was last tried alone). They go in groups that double where the mask still holds, and
    are halved where it does not. The last pass tries every item that is left.
    """
    left, loss, target = items(mask), task.loss, task.settings.target
    new = [item for item in left if item not in loss_without]
    for i, item in enumerate(new):
        loss_without[item] = loss(mask.without([item]))
        progress(stage, i + 1, len(new))
    left.sort(key=loss_without.get)
    if len(new) == len(left):  # those that have just failed alone can wait for the next pass
        left = [item for item in left if loss_without[item] <= target]
    while left:
        i, size, deleted = 0, 1, False
        while i < len(left):
            group = left[i:i + size]
            if task.holds(trial := mask.without(group)):
                mask, deleted, i, size = trial, True, i + len(group), 2 * size
            elif len(group) > 1:
                size = len(group) // 2
            else:
                loss_without[group[0]], i = loss(trial), i + 1
            progress(stage, i, len(left))
        left = sorted(items(mask), key=loss_without.get) if deleted else []
    return mask


def importance(task, mask):
    """{node: the loss if it alone is deleted, less the circuit's} of the kept nodes."""
    loss = task.loss(mask)
    return {int(n): task.loss(mask.without([n])) - loss for n in np.flatnonzero(mask.nodes)}


def importance_in_model(task, nodes):
    """{node: the full model's loss if it alone is deleted, less its own} of some nodes."""
    quarter = task.judged.rows(slice(len(task.judged.last) // 8 * 2 or None))  # whole pairs
    runner = PlainRunner(task.model, task.frozen_values, quarter)
    every = every_node(task.model.cfg)
    full = logistic(runner.margins(every))
    return {int(n): logistic(runner.margins(every.without([n]))) - full for n in nodes}


def minor_groups(task, mask, effect):
    """The nodes of less than a tenth of the largest importance, in connected groups, [[node]]: by
    an edge, a channel of the residual stream, or as neighbours in a head. effect: `importance`."""
    links = node_links(mask, task.model)
    for nodes in heads_of(mask, task.model.cfg).values():
        links += zip(nodes, nodes[1:])
    minor = {n for n in effect if effect[n] < 0.1 * max(effect.values())}
    group = {n: {n} for n in minor}
    for a, b in links:
        if a in minor and b in minor and group[a] is not group[b]:
            group[a] |= group[b]
            group |= dict.fromkeys(group[b], group[a])
    return [sorted(nodes) for nodes in {id(g): g for g in group.values()}.values()]


def disconnected_nodes(mask, model, prompts):
    """The kept nodes without a path of links from a token of the prompts, or without one to the
    logits; towards these, a head's query and key channels lead to its values."""
    slices, p = node_slices(model.cfg), model.params
    fed, used = (np.zeros_like(mask.nodes) for _ in range(2))
    tokens = (sg.to_host(p["wte"])[np.unique(prompts.ids)] != 0).any(0)
    if "wpe" in p:
        tokens |= (sg.to_host(p["wpe"]) != 0).any(0)
    for site, part in slices.items():
        if link(site) == "reads":
            fed[part] = tokens
    used[slices["final"]] = (sg.to_host(sg.unembedding(p)) != 0).any(1)
    links = node_links(mask, model)
    for a, b in sorted(links):  # in the order of computation
        fed[b] |= fed[a]
    for (i, _), own in heads_of(mask, model.cfg).items():
        values = {n for n in own if n >= slices[f"h{i}.{HEADS[-1]}"].start}
        links += itertools.product({*own} - values, values)
    for b, a in sorted(((b, a) for a, b in links), reverse=True):
        used[a] |= used[b]
    return np.flatnonzero(mask.nodes & ~(fed & used))


# =================================================================================================
# Part II: what the method stands on
# =================================================================================================

# ---- nodes and edges ----------------------------------------------------------------------------
# How they are wired is read off sparsegpt.SITES and sparsegpt.MATRICES.

HEADS = ("q", "k", "v")  # the sites that attention reads; it has an output for each channel of v


@functools.cache
def node_slices(cfg):
    """{site: slice of the node numbers of its channels}, h0.attn_in first, final last."""
    out, start = {}, 0
    widths = {f"h{i}.{name}": site.width for i in range(cfg.n_layer)
              for name, site in sg.SITES.items()}
    for site, width in (widths | {"final": 1}).items():
        out[site] = slice(start, start + width * cfg.d_model)
        start = out[site].stop
    return out


def n_nodes(cfg):
    """The number of nodes of a model."""
    return node_slices(cfg)["final"].stop


def link(site):
    """How a site's channels come about: see sparsegpt.Site."""
    return "reads" if site == "final" else sg.SITES[site.partition(".")[2]].link


def node_name(node, cfg):
    """Site and channel of a node number, as in h0.neuron.17."""
    for site, part in node_slices(cfg).items():
        if part.start <= node < part.stop:
            return f"{site}.{node - part.start}"
    raise ValueError(f"no node {node}")


def node_number(name, cfg):
    """The number of the node with a name. Raises UserError if the model has no such node."""
    site, _, channel = name.rpartition(".")
    part = node_slices(cfg).get(site)
    if part is None or not re.fullmatch("0|[1-9][0-9]{0,8}", channel) or (
            int(channel) >= part.stop - part.start):
        raise sg.UserError(f"no node {name[:60]!r}; a node is a site and a channel, as in "
                           "h0.neuron.17 or final.3; the sites are " + ", ".join(node_slices(cfg)))
    return part.start + int(channel)


# A matrix whose weights are edges: its bias, and the node numbers of its rows and of its columns.
Wires = namedtuple("Wires", "bias source target")


@functools.cache
def matrices(cfg):
    """{parameter: Wires}, in the order of computation."""
    slices = node_slices(cfg)
    return {f"h{i}.{name}": Wires(f"h{i}.{m.bias}", np.r_[slices[f"h{i}.{m.reads}"]],
                                  np.r_[tuple(slices[f"h{i}.{site}"] for site in m.writes)])
            for i in range(cfg.n_layer) for name, m in sg.MATRICES.items()}


class CircuitMask(NamedTuple):
    """The kept part of a model. nodes: bool by node. edges: {matrix: bool [in, out]}, or None for
    every nonzero weight. An edge counts only if it joins two kept nodes."""
    nodes: np.ndarray
    edges: dict | None = None

    def without(self, items):
        """The mask without some nodes, by number, and listed edges, as (matrix, row, column). The
        edges of such nodes stay listed: `kept_edges` drops them."""
        nodes, edges = self.nodes.copy(), self.edges and dict(self.edges)
        for name in {item[0] for item in items if isinstance(item, tuple)}:
            edges[name] = edges[name].copy()
        for item in items:
            if isinstance(item, tuple):
                edges[item[0]][item[1:]] = False
            else:
                nodes[item] = False
        return CircuitMask(nodes, edges)


def mask_key(mask):
    """Bytes that tell masks apart, with a list of edges or without."""
    kept = mask.nodes, *(mask.edges or {}).values()
    return hashlib.sha256(b"".join(np.packbits(x).tobytes() for x in kept)).digest()


def every_node(cfg):
    """The CircuitMask of the full model."""
    return CircuitMask(np.ones(n_nodes(cfg), bool))


def kept_edges(mask, params, cfg):
    """{matrix: bool [in, out]} of the nonzero weights between two kept nodes, if not deleted."""
    out = {}
    for name, m in matrices(cfg).items():
        out[name] = sg.to_host(params[name]) != 0
        out[name] &= np.outer(mask.nodes[m.source], mask.nodes[m.target])
        if mask.edges is not None:
            out[name] &= mask.edges[name]
    return out


def edge_list(edges):
    """[(matrix, row, column)] of {matrix: bool [in, out]}, in the order of computation."""
    return [(name, int(i), int(j)) for name, kept in edges.items() for i, j in np.argwhere(kept)]


def heads_of(mask, cfg):
    """{(block, head): its kept q, k and v channels, by number} of the heads that have one."""
    out = {}
    for i, head in itertools.product(range(cfg.n_layer), range(cfg.d_model // cfg.d_head)):
        own = [node_slices(cfg)[f"h{i}.{site}"].start + head * cfg.d_head for site in HEADS]
        own = [n for start in own for n in range(start, start + cfg.d_head) if mask.nodes[n]]
        out |= {(i, head): own} if own else {}
    return out


def residual_links(mask, cfg):
    """[(from, to)] of the kept nodes at one channel of the residual stream, which one adds to and
    the other reads; or of a site that is made of another's channels. By number."""
    links, writers, slices = [], defaultdict(list), node_slices(cfg)
    for site, part in slices.items():
        kind, made_of = link(site), slices.get(f"{site.partition('.')[0]}.{link(site)}")
        for c in np.flatnonzero(mask.nodes[part]).tolist():
            if kind == "reads":
                links += [(writer, part.start + c) for writer in writers[c]]
            elif kind == "adds":
                writers[c].append(part.start + c)
            elif made_of and mask.nodes[made_of][c]:
                links.append((made_of.start + c, part.start + c))
    return links


def node_links(mask, model):
    """[(from, to)] of the kept nodes that are joined by an edge or by `residual_links`."""
    links, wires = residual_links(mask, model.cfg), matrices(model.cfg)
    for name, i, j in edge_list(kept_edges(mask, model.params, model.cfg)):
        links.append((int(wires[name].source[i]), int(wires[name].target[j])))
    return links


# ---- prompts and losses -------------------------------------------------------------------------

class CannotPrune(sg.UserError):
    """The model cannot do the task at the target loss, or cannot read its prompts."""


def make_prompts(model, task, n, seed, split="eval", labels="true"):
    """The Prompts of n pairs of a task. labels: "nonsense" draws the right answer of each pair at
    random, so that no rule decides it; "inverted" swaps right and wrong of all. Raises CannotPrune
    if the model can use none of them."""
    try:
        pairs = tasks.pairs(task, n, seed, split)
        prompts = tasks.task_prompts(model.tok, pairs, model.cfg.n_ctx)
    except ValueError as e:
        raise CannotPrune(str(e)) from e
    if labels != "true":
        chance = dict(nonsense=0.5, inverted=1.0)[labels]
        swap = np.repeat(np.random.default_rng(seed).random(len(prompts.last) // 2) < chance, 2)
        prompts = prompts._replace(right=np.where(swap, prompts.wrong, prompts.right),
                                   wrong=np.where(swap, prompts.right, prompts.wrong),
                                   sign=np.where(swap, -prompts.sign, prompts.sign))
    return prompts


def shortest_pair(prompts):
    """The pair of Prompts that a circuit is shown on."""
    return prompts.rows(2 * np.argmin(prompts.last.reshape(-1, 2).max(1)) + np.arange(2))


def own_prompt(model, text, answers=None):
    """The Prompts of one prompt of one's own, with the tokens that decide between two answers, or
    with zeros in their place. Raises UserError on an unusable one."""
    ids, two = [model.tok.EOT, *model.tok.encode(text)], (0, 0)
    try:
        if answers:
            ids, *two = tasks.deciding_tokens(model.tok, text, *answers)
        if len(ids) > model.cfg.n_ctx:
            raise ValueError(f"{len(ids)} tokens exceed the context of {model.cfg.n_ctx}")
    except ValueError as e:
        raise sg.UserError(f"{text[:60]!r}: {e}") from e
    return tasks.Prompts(*(np.array([x]) for x in (ids, len(ids) - 1, *two, 1)))


def margins(logits, prompts):
    """The right logit minus the wrong one: float64 [n] from [n, V]."""
    rows = np.arange(len(logits))
    return (logits[rows, prompts.right] - logits[rows, prompts.wrong]).astype(np.float64)


def logistic(margin):
    """The binary loss in nats of margins [n]."""
    return float(np.logaddexp(0, -margin).mean())


# ---- the values of nodes ------------------------------------------------------------------------

class Recorder:
    """A hook that keeps the nodes' values: `seen` is {site: [N, C]}. hook: computes them in place
    of the model's AbsTopK."""

    def __init__(self, hook=None):
        self.seen, self.hook = {}, hook

    def forward(self, site, x, k):
        x = self.hook.forward(site, x, k) if self.hook else sg.abstopk(x, k)[0]
        self.seen[site] = x
        return x


def observe(model, ids, at=None, hook=None):
    """A forward pass, see `sparsegpt.forward`: (logits, {site: [N, C]} of all nodes, cache)."""
    recorder = Recorder(hook)
    logits, cache = sg.forward(model.params, ids, model.cfg, recorder, at)
    return logits, recorder.seen, cache


def mean_activations(model, ids):
    """The mean of every node of the full model over all tokens of ids [n, T] (paper A.5)."""
    def sums(i):
        total = np.zeros(n_nodes(model.cfg))
        for site, x in observe(model, ids[i:i + 4])[1].items():
            total[node_slices(model.cfg)[site]] = sg.to_host(sg.xp.ones(len(x), x.dtype) @ x)
        return total

    totals = sg.parallel(sums, range(0, len(ids), 4), model.cfg.threads)
    return (sum(totals) / ids.size).astype(model.cfg.dtype)


def activations(model, prompt):
    """{site: [T, C]} of every node of the full model on one prompt, <start> first."""
    _, seen, _ = observe(model, own_prompt(model, prompt).ids)
    return {site: sg.to_host(x) for site, x in seen.items()}


def resampled(model, prompts, text, rng):
    """{site: [N, C]}: the values of every node, position by position, in the full model on windows
    of text [n, T], one drawn for each prompt."""
    windows = text[rng.choice(len(text), len(prompts.ids))][:, :prompts.ids.shape[1]]
    return observe(model, windows, prompts.last)[1]


def seen_pairs(model, prompts):
    """[(Prompts, margins [n], `values_of_other`)] of the full model, in parts of whole pairs."""
    parts = (prompts.rows(slice(i, i + 16)) for i in range(0, len(prompts.last), 16))
    return [(part, *values_of_other(model, part)) for part in parts]


def values_of_other(model, prompts):
    """(margins [n], {site: [N, C]}) of the full model: the values that all nodes have on the other
    prompt of each pair, aligned from the end."""
    logits, seen, _ = observe(model, prompts.ids, prompts.last)
    B, T = prompts.ids.shape
    other, t = np.arange(B) ^ 1, np.arange(T)
    there = t + (prompts.last[other] - prompts.last)[:, None]
    # Tokens that the other prompt does not have keep their own values, and so does <start>.
    rows = np.where((there <= 0) | (t == 0), np.arange(B)[:, None] * T + t,
                    other[:, None] * T + np.minimum(there, T - 1)).reshape(-1)
    return margins(sg.to_host(logits), prompts), {
        site: x[sg.xp.asarray(rows if len(x) == len(rows) else other)] for site, x in seen.items()}


class Interchange:
    """A hook: the full model, but some nodes, bool by node, have other values, {site: [N, C]}."""

    def __init__(self, nodes, values, cfg):
        self.nodes, self.values, self.slices = sg.xp.asarray(nodes), values, node_slices(cfg)

    def forward(self, site, x, k):
        return sg.xp.where(self.nodes[self.slices[site]], self.values[site], sg.abstopk(x, k)[0])


def interchanged(model, pairs_seen, nodes):
    """Margins [n] of the full model where some nodes, bool by node, take the values that they have
    on the pair's other prompt (interchange). pairs_seen: see `seen_pairs`."""
    out = []
    for part, _, values in pairs_seen:
        hook = Interchange(nodes, values, model.cfg)
        logits, _ = sg.forward(model.params, part.ids, model.cfg, hook, part.last)
        out.append(margins(sg.to_host(logits), part))
    return np.concatenate(out)


def attention_weights(cache, block):
    """[B, H, T, T + 1] on the host, the sink's share last, from the cache of a forward pass."""
    _, _, _, (weights, sink_share), *_ = cache[f"h{block}.attention"]
    return sg.to_host(sg.xp.concatenate([weights, sink_share], axis=3))


# ---- running a circuit --------------------------------------------------------------------------

def delete_weights(w, b, frozen_values, deleted):  # [in, out], [out], [in], bool [in, out]
    """(w, b) without some weights: what these give for frozen inputs is in the bias."""
    gone = w * deleted
    return w - gone, b + frozen_values @ gone


class PlainRunner:
    """Runs circuits of a model on fixed prompts: the whole model, with a hook that freezes nodes.
    This is the definition of a circuit, and of its losses. Searches run the same, faster.

    frozen_values: by node. text, rng: deleted nodes take values on other text instead, which is a
    stronger ablation, as these can mislead. Deleted edges stay frozen at `frozen_values`.
    restored: see `restored_nodes`; these are kept too, with all their edges. gated: those nodes
    are active that are so in the full model. constant: deleted values of heads are frozen after
    attention, not before it, so that what its sink takes is not lost.
    """

    def __init__(self, model, frozen_values, prompts, text=None, rng=None, restored=None,
                 gated=False, constant=False):
        self.model, self.frozen_values, self.prompts = model, frozen_values, prompts
        self.constant = constant
        self.gated, self.parts = gated, [
            (index, part, frozen_values if text is None else resampled(model, part, text, rng),
             False if restored is None else restored[index]) for index, part in prompts.parts()]

    def params(self, mask):
        """The parameters with deleted edges: weight 0, and the frozen input in the bias."""
        if mask.edges is None:
            return self.model.params
        out = dict(self.model.params)
        for name, m in matrices(self.model.cfg).items():
            deleted = np.outer(mask.nodes[m.source], mask.nodes[m.target]) & ~mask.edges[name]
            if self.constant and sg.MATRICES[name.partition(".")[2]].reads == HEADS[-1]:
                deleted |= ~mask.nodes[m.source][:, None]
            out[name], out[m.bias] = delete_weights(
                out[name], out[m.bias], sg.xp.asarray(self.frozen_values[m.source]),
                sg.xp.asarray(deleted))
        return out

    def hook(self, mask, params, part, values, restored):
        """The hook for one part of the prompts."""
        seen = self.gated and observe(self.model, part.ids, part.last)[1]
        return Ablation(mask.nodes | restored, values, self.model.cfg, seen)

    def logits_by_part(self, mask):
        """Yields (index, logits at the deciding positions [n, V]) of the parts of the prompts."""
        params = self.params(mask)
        for index, part, values, restored in self.parts:
            hook = self.hook(mask, params, part, values, restored)
            logits, _ = sg.forward(params, part.ids, self.model.cfg, hook, part.last)
            yield index, sg.to_host(logits)

    def logits(self, mask):
        """Logits at the deciding positions [n, V], on the host, in the order of the prompts."""
        index, logits = zip(*self.logits_by_part(mask))
        return np.concatenate(logits)[np.argsort(np.concatenate(index))]

    def margins(self, mask):
        """Margins at the deciding positions [n], in the order of the prompts."""
        return margins(self.logits(mask), self.prompts)


class FastRunner(PlainRunner):
    """The numbers of PlainRunner, to rounding, about 30 times as fast for 24 nodes of 5,888. It is
    the same forward pass, with the kept rows and columns of the matrices alone, and a hook that
    returns arrays of kept channels. Raises ValueError on wiring that this does not fit.

    A head is live if it has a kept node that matters: a kept channel reads the head, or AbsTopK
    compares the node with those of other heads. All channels of a live head are run, the frozen
    ones from their bias. What the other heads write, the idle ones, depends on the position alone.
    """

    def __init__(self, model, frozen_values, prompts):
        super().__init__(model, frozen_values, prompts)
        cfg, p, slices, self.idle = model.cfg, model.params, node_slices(model.cfg), {}
        self.host = {name: sg.to_host(w) for name, w in p.items()}
        if other := [name for name, site in sg.SITES.items()
                     if site.link not in ("reads", "adds", "")]:
            raise ValueError(f"{other[0]} is made of {sg.SITES[other[0]].link}")
        [self.out] = [name for name, m in sg.MATRICES.items() if m.reads == HEADS[-1]]
        for h in (f"h{i}." for i in range(cfg.n_layer)):
            # Outputs of all heads by position [n_ctx, C], with all nodes frozen.
            qkv = (sg.xp.tile(sg.xp.asarray(frozen_values[slices[h + site]]), (cfg.n_ctx, 1))
                   for site in HEADS)
            self.idle[h] = sg.to_host(sg.attention(
                *qkv, p.get(h + "attn.sink"), p.get(h + "attn.relbias"), 1, cfg.d_head)[0])

    def sliced(self, mask, h, name, columns):
        """`delete_weights` of some columns of a matrix, for the deleted nodes and edges."""
        m, kept = matrices(self.model.cfg)[h + name], mask.nodes[node_slices(
            self.model.cfg)[h + sg.MATRICES[name].reads], None]
        # Frozen values of heads still pass through attention.
        deleted = np.zeros_like(kept) if name == self.out else ~kept
        if mask.edges is not None:
            deleted = deleted | (kept & ~mask.edges[h + name][:, columns])
        return delete_weights(self.host[h + name][:, columns], self.host[m.bias][columns],
                              self.frozen_values[m.source], deleted)

    def live_channels(self, mask, h):
        """Bool [C]: the channels of a block's live heads: at least one, as attention needs it."""
        cfg, wires = self.model.cfg, matrices(self.model.cfg)[h + self.out]
        q, k, v = (mask.nodes[node_slices(cfg)[h + site]] for site in HEADS)
        compared = max(x.sum() for x in (q, k, v)) > cfg.n_active(cfg.d_model)
        read = (self.host[h + self.out][:, mask.nodes[wires.target]] != 0).any(1)
        live = np.array([q | k | v, read | compared]).reshape(2, -1, cfg.d_head).any(2).all(0)
        live[0] |= not live.any()
        return np.repeat(live, cfg.d_head)

    def params(self, mask):
        """The kept rows and columns of the parameters, with frozen inputs in the biases. Beside
        them, for the hook: {site: where its kept channels stand in x}, and what idle heads write
        by position, h0.attn_out.idle [n_ctx, kept channels]."""
        cfg, slices, p = self.model.cfg, node_slices(self.model.cfg), dict(self.host)
        kept = {site: mask.nodes[part] for site, part in slices.items()}
        for h in (f"h{i}." for i in range(cfg.n_layer)):
            live = self.live_channels(mask, h)
            run = {site: live if site in HEADS else kept[h + site] for site in sg.SITES}
            for name, m in sg.MATRICES.items():
                wires = matrices(cfg)[h + name]
                columns = np.flatnonzero(np.concatenate([run[site] for site in m.writes]))
                w, b = self.sliced(mask, h, name, columns)
                if name == self.out:
                    p[f"{h}{m.writes[0]}.idle"] = self.idle[h][:, ~live] @ w[~live]
                target = wires.target[columns]
                p[h + name] = w[run[m.reads]] * mask.nodes[target]
                p[wires.bias] = np.where(mask.nodes[target], b, self.frozen_values[target])
            p |= {name: p[name][live[::cfg.d_head]]
                  for name in (h + "attn.sink", h + "attn.relbias") if name in p}
            kept |= {h + site: kept[h + site][live] for site in HEADS}
        if "head.w" in p:  # else it is tied to the embedding, and takes all channels
            w, p["head.b"] = delete_weights(p["head.w"], p["head.b"], self.frozen_values[
                slices["final"]], ~kept["final"][:, None])
            p["head.w"] = w[kept["final"]]
        p = {name: sg.xp.asarray(x, cfg.dtype) for name, x in p.items()}
        return p | {site: sg.xp.asarray(np.flatnonzero(x)) for site, x in kept.items()}

    def hook(self, mask, params, part, values, restored):
        return KeptChannels(self.model.cfg, params, part, values)

    def logits(self, mask):
        """On the host: a GPU would only wait for the launches of so small arrays."""
        device, sg.xp = sg.xp, np
        try:
            return super().logits(mask)
        finally:
            sg.xp = device


class KeptChannels:
    """The hook of FastRunner for one part of its prompts. params: see `FastRunner.params`."""

    def __init__(self, cfg, params, part, frozen_values):
        self.slices, self.params, self.part = node_slices(cfg), params, part
        self.frozen_values = frozen_values

    def forward(self, site, x, k):
        xp, p, columns = sg.xp, self.params, self.params[site]
        if site.partition(".")[2] in HEADS:  # where x has all channels of the live heads
            if k < len(columns):
                x = x.copy()
                x[:, columns] = sg.abstopk(x[:, columns], k)[0]
            return x
        if link(site) == "reads":
            x = x[:, columns]
        if site + ".idle" in p:
            x = x + p[site + ".idle"][xp.arange(len(x)) % self.part.ids.shape[1]]
        x = sg.abstopk(x, k)[0]
        if link(site) != "adds" and not (site == "final" and "head.w" not in p):
            return x
        frozen = xp.asarray(self.frozen_values[self.slices[site]], x.dtype)
        out = xp.tile(frozen, (len(x), 1))
        out[:, columns] = x
        return out


def quickest(model, frozen_values, prompts):
    """A FastRunner if it agrees with the model as it runs, else a PlainRunner. They are compared
    on random circuits, in float64, as rounding can change what AbsTopK keeps."""
    cfg, rng = dataclasses.replace(model.cfg, dtype="float64"), np.random.default_rng(0)
    exact = model._replace(cfg=cfg, params={name: w.astype(float)
                                            for name, w in model.params.items()})
    few = prompts.rows(slice(4))
    try:
        plain, fast = (kind(exact, frozen_values.astype(float), few)
                       for kind in (PlainRunner, FastRunner))
        of_heads = sg.MATRICES[fast.out].writes
        # Shares of kept nodes. In the last circuit, no kept channel reads some heads.
        for share, reading in (0.05, 0.05), (0.3, 0.3), (0.9, 0.9), (0.9, 0.02):
            mask = CircuitMask(np.concatenate([
                rng.random(part.stop - part.start) < (
                    reading if site.partition(".")[2] in of_heads else share)
                for site, part in node_slices(cfg).items()]))
            mask = mask._replace(edges={
                name: kept & (rng.random(kept.shape) < 0.8)
                for name, kept in kept_edges(mask, exact.params, cfg).items()})
            right, found = plain.logits(mask), fast.logits(mask)
            if not abs(found - right).max() <= 1e-8 * (1 + abs(right).max()):
                raise ValueError("it gives other logits")
        return FastRunner(model, frozen_values, prompts)
    except Exception as e:  # it may fail in any way
        say_once(f"FastRunner does not fit the forward pass ({type(e).__name__}: {e}); circuits "
                 "are tried with the model itself, about 30 times slower")
        return PlainRunner(model, frozen_values, prompts)


@functools.cache
def say_once(line):
    """Print a line on stderr, once in a process."""
    print(line, file=sys.stderr)


# ---- a model, its control and its circuits ------------------------------------------------------

def fingerprint(model):
    """16 hex digits that name a model: of its parameters and merges."""
    found = hashlib.sha256(json.dumps(model.tok.merges).encode())
    for name in sorted(model.params):
        found.update((sg.to_host(model.params[name]) + 0).tobytes())  # a file has no -0
    return found.hexdigest()[:16]


def shuffled(model, seed=0):
    """The model with the nonzero weights of every matrix dealt out anew among their places: a
    control with the same shape and numbers that has learned nothing."""
    rng, params = np.random.default_rng(seed), dict(model.params)
    for name, w in params.items():
        if sg.is_matrix(name):
            w = sg.to_host(w).copy()
            w[w != 0] = rng.permutation(w[w != 0])
            params[name] = sg.xp.asarray(w)
    return model._replace(params=params)


class ModelContext:
    """A model, and what its tasks share: its fingerprint, and the values of deleted nodes."""

    def __init__(self, model, ablation="mean"):
        self.model, self.ablation, self.fingerprint = model, ablation, fingerprint(model)
        values, _ = ABLATIONS["mean" if ablation == "resample" else ablation]
        self.frozen_values = np.asarray(values(model), model.cfg.dtype)


@dataclasses.dataclass
class Circuit:
    """A task's circuit. report: all that is saved, printed and drawn, whatever mask is set."""
    task: str
    settings: Settings
    mask: CircuitMask
    report: dict

    @property
    def nodes(self):
        """The names of its nodes, in the order of computation."""
        return [node["name"] for node in self.report["nodes"]]

    @property
    def edges(self):
        """[(name, name, weight)] of its edges."""
        return [(e["from"], e["to"], e["weight"]) for e in self.report["edges"]]

    def frozen_values(self, model):
        """The values of deleted nodes, by node. Raises UserError if it is of another model."""
        if not self.is_of(model):
            raise sg.UserError(f"the circuit of {self.task} is of another model")
        return ModelContext(model, self.settings.ablation).frozen_values

    @property
    def links(self):
        """[(from, to, kind, weight)]: the whole graph, edges among them. kind: "edge"; "residual",
        the same channel of the residual stream; "attention", from a query or key channel to the
        values of its head; "token" and "answer", an embedding and an unembedding. Their tokens are
        named as in "token def". The weight of those without one is 1."""
        r = self.report
        out = [(e["from"], e["to"], "edge", e["weight"]) for e in r["edges"]]
        out += [(e["from"], e["to"], "residual", 1.0) for e in r["residual"]]
        out += [(f"token {e['token']}", e["to"], "token", e["weight"]) for e in r["embed"]]
        out += [(e["from"], f"token {e['token']}", "answer", e["weight"]) for e in r["unembed"]]
        for head in r["heads"]:
            values = [name for name in head["nodes"] if name.split(".")[1] == HEADS[-1]]
            out += [(name, value, "attention", 1.0)
                    for name in head["nodes"] for value in values if name not in values]
        return out

    def add(self, check):
        """Put a check that has ended in the place of that which was not run."""
        checks = self.report["checks"]
        checks[[c["name"] for c in checks].index(check["name"])] = check

    def is_of(self, model):
        """Whether it is of this model's weights, merges and config. Config fields that are newer
        than its file are not compared, as long as the parameters have the same shapes."""
        saved, config = self.report["model"], dataclasses.asdict(model.cfg)
        return saved["fingerprint"] == fingerprint(model) and (
            sg.shapes(sg.Config(**saved["config"])) == sg.shapes(model.cfg)) and all(
            config[name] == value for name, value in saved["config"].items()
            if name not in ("threads", "out"))

    def logits(self, model, prompts):
        """Its logits at the deciding positions of Prompts [n, V], in the model that is its own."""
        return PlainRunner(model, self.frozen_values(model), prompts).logits(self.mask)


def measured(context, task, mask):
    """What a circuit's report says of its model, and `verify` computes again: losses of the full
    model and of the circuit, by PlainRunner, its links, sizes and means."""
    cfg, losses = task.model.cfg, {"full": {}, "circuit": {}}
    for split, prompts in (("search", task.judged), ("held", task.held)):
        runner = PlainRunner(task.model, context.frozen_values, prompts)
        for name, which in (("full", every_node(cfg)), ("circuit", mask)):
            losses[name][split] = tasks.score(runner.logits(which), prompts)._asdict()
    links, (nodes, edges) = connections(task.model, mask, task.pool), task.size(mask)
    all_nodes, all_edges = task.size(every_node(cfg))
    return dict(
        links, losses=losses, prompts=dict(search=len(task.judged.last), held=len(task.held.last)),
        size=dict(nodes=nodes, edges=edges, model_nodes=all_nodes, model_edges=all_edges,
                  embed=len(links["embed"]), unembed=len(links["unembed"])),
        nodes=[dict(name=node_name(n, cfg), mean=float(context.frozen_values[n]))
               for n in np.flatnonzero(mask.nodes)])


def make_circuit(context, task, result):
    """The Circuit of a SearchResult, with all that is printed and drawn of it but its checks."""
    model, cfg, s = context.model, context.model.cfg, task.settings
    mask = result.mask._replace(edges=kept_edges(result.mask, model.params, cfg))
    report, kept = measured(context, task, mask), np.flatnonzero(mask.nodes)
    bias, effect = effective_bias(model, mask, task.frozen_values), importance(task, mask)
    in_model = importance_in_model(task, kept)
    for n, node, reading in zip(kept, report["nodes"], node_readings(model, kept)):
        node |= dict(importance=effect[n], in_model=in_model[n], bias=bias.get(n), text=reading)
    example, heads = pair_readings(model, mask, task.frozen_values, shortest_pair(task.pool),
                                   attention_overlap(task, mask))
    ranked = bisect(rank_by_attribution(task), lambda m: task.loss(m) <= s.target)
    groups = [dict(nodes=[node_name(n, cfg) for n in group],
                   effect=task.loss(mask.without(group)) - task.loss(mask))
              for group in minor_groups(task, mask, effect)]
    return Circuit(task.name, s, mask, dict(
        report, doc=tasks.title(task.name), stages=result.stages, groups=groups, heads=heads,
        model=dict(path=cfg.out, fingerprint=context.fingerprint, config=dataclasses.asdict(cfg)),
        attribution=dict(zip(("nodes", "edges"), task.size(ranked))), example=example, seeds=1,
        checks=[verdict(name, None, "not run") for name in CHECKS]))


# ---- checks -------------------------------------------------------------------------------------

CONTROLS = ("nonsense task", "inverted task", "shuffled weights")
CHECKS = ("held-out prompts", "others restored", "necessary at every share", "necessity",
          "interchange", "recall", "resampled ablation", "full model's AbsTopK", "true constants",
          "attention", *CONTROLS, "other seeds")


def verdict(name, passed, text, **numbers):
    """One check of a circuit: passed is True, False, or None where it does not apply."""
    if name in CONTROLS:
        numbers = {"edges": None} | numbers
    return dict(name=name, passed=None if passed is None else bool(passed), text=text,
                **{k: None if v is None else float(v) for k, v in numbers.items()})


def loss_check(settings, name, loss, text):
    """A check that a loss passes up to `Settings.limit`."""
    limit, why = settings.limit()
    return verdict(name, loss <= limit, f"{text} (pass: at most {limit:.2f}, {why})", loss=loss)


def checks_of(circuit, task, results):
    """The checks of a circuit, each as it ends: those of its own, then for each of the results,
    (key, SearchResult) of other searches, what it shows."""
    seeds = []
    yield check_held_out(circuit)
    yield from check_restored(task, circuit.mask)
    for check in (check_necessity, check_interchange, check_recall, check_resampled, check_gated,
                  check_constants):
        yield check(task, circuit.mask)
    yield check_attention(circuit)
    for key, result in results:
        if key in CONTROLS:
            yield check_control(key, result, circuit.report["stages"], circuit.settings.target)
        else:
            seeds.append(result)
    circuit.report["seeds"] = 1 + len(seeds)
    yield check_seeds(seeds, circuit.mask)


def check_held_out(circuit):
    """The loss on prompts of other words and shapes."""
    full, own = (circuit.report["losses"][x]["held"]["binary"] for x in ("full", "circuit"))
    return loss_check(circuit.settings, "held-out prompts", own, "other words and larger shapes: "
                      f"loss {own:.3f}, full model {full:.3f}")


def check_restored(task, mask):
    """Two checks on fresh draws of other nodes: beside the circuit, and without it."""
    nothing, by_share = CircuitMask(np.zeros_like(mask.nodes)), []
    for i, (kept, prompts) in enumerate(((mask, task.judged), (mask, task.held),
                                         (nothing, task.judged))):
        rng, loss, share = np.random.default_rng([3, i]), [], []
        for _ in range(2):
            nodes = restored_nodes(len(prompts.last), 1.0, rng, task.model.cfg)
            nodes &= kept.nodes | ~mask.nodes
            runner = PlainRunner(task.model, task.frozen_values, prompts, restored=nodes)
            loss.append(np.logaddexp(0, -runner.margins(kept)))
            share.append(nodes.mean(1))
        loss, order = np.concatenate(loss), np.argsort(np.concatenate(share), kind="stable")
        by_share.append([float(loss[part].mean()) for part in np.array_split(order, 5)])
    (search, held, without), (limit, why) = by_share, task.settings.limit()
    text = [" ".join(f"{x:.2f}" for x in losses) for losses in by_share]
    loss = max(np.mean(search), np.mean(held))
    yield verdict("others restored", loss <= limit, "a random share of the other nodes restored "
                  f"beside it, drawn anew for every pair: loss {np.mean(search):.3f}, on held-out "
                  f"prompts {np.mean(held):.3f} ({text[1]} by fifths of the shares; pass: both at "
                  f"most {limit:.2f}, {why})", loss=loss, search=np.mean(search))
    passed = min(without) > HALF_CHANCE if mask.nodes.any() else None
    yield verdict("necessary at every share", passed, "such shares restored without the circuit: "
                  f"loss {text[2]} by fifths (pass: all above 0.35 nats, half of chance)",
                  loss=min(without))


def random_like(nodes, rng, cfg):
    """Random nodes, as many at every site as there are in `nodes`; both bool by node."""
    return np.concatenate([rng.permutation(nodes[part]) for part in node_slices(cfg).values()])


def check_necessity(task, mask):
    """Only the circuit's nodes deleted, beside as many random nodes at the same sites."""
    rng, loss, cfg = np.random.default_rng(0), task.loss(CircuitMask(~mask.nodes)), task.model.cfg
    other = sorted(task.loss(CircuitMask(~random_like(mask.nodes, rng, cfg))) for _ in range(10))
    passed = loss > max(HALF_CHANCE, other[-2]) if mask.nodes.any() else None
    return verdict("necessity", passed, f"full model without the circuit's "
                   f"{mask.nodes.sum()} nodes: loss {loss:.3f}; without as many random nodes at "
                   f"the same sites: {other[0]:.3f} to {other[-1]:.3f} (pass: above 0.35 nats "
                   "(half of chance) and above 9 of 10 random draws)", loss=loss,
                   random=other[-2], median=np.median(other))


def check_interchange(task, mask):
    """In the full model nodes take the values of the pair's other prompt: the circuit's, or as
    many random ones at the same sites."""
    model, rng = task.model, np.random.default_rng(4)
    pairs_seen = seen_pairs(model, task.held)
    own = np.concatenate([margin for _, margin, _ in pairs_seen])
    flips, drops = [], []
    carrying = task.on_paths(mask)
    for nodes in carrying, *(random_like(carrying, rng, model.cfg) for _ in range(4)):
        swapped = interchanged(model, pairs_seen, nodes)
        flips.append((swapped[own > 0] < 0).mean())
        drops.append((own - swapped).mean())
    passed = flips[0] >= 0.9 if mask.nodes.any() else None
    return verdict("interchange", passed, "full model with the circuit's nodes as on the pair's "
                   f"other prompt, held-out: {flips[0]:.0%} of its answers flip, the margin of "
                   f"{own.mean():.2f} falls by {drops[0]:.2f}; with as many random nodes "
                   f"{np.mean(flips[1:]):.0%} and {np.mean(drops[1:]):.2f} (pass: from 90%)",
                   overlap=flips[0], random=np.mean(flips[1:]))


def check_recall(task, mask, n=20, candidates=60):
    """How many of the full model's most important nodes are in it: each is deleted alone."""
    effect = importance_in_model(task, rank_by_attribution(task)[:candidates])
    top = sorted(effect, key=effect.get, reverse=True)[:n]
    missing = [node_name(node, task.model.cfg) for node in top if not mask.nodes[node]]
    share = mask.nodes[top].mean()
    return verdict("recall", share >= 0.5 if mask.nodes.any() else None, f"{n - len(missing)} of "
                   f"the full model's {n} most important nodes are in it"
                   + f"; missing: {', '.join(missing[:4])}" * bool(missing)
                   + " (pass: from half)", overlap=share)


def check_resampled(task, mask):
    """Deleted nodes take the values that they have on other text."""
    rng = np.random.default_rng(2)
    losses = [logistic(PlainRunner(task.model, task.frozen_values, task.judged, task.model.text,
                                   rng).margins(mask)) for _ in range(4)]
    loss = float(np.mean(losses))
    return loss_check(task.settings, "resampled ablation", loss, "deleted nodes at their values "
                      f"on random training text: mean loss of 4 draws {loss:.3f}, "
                      f"{min(losses):.3f} to {max(losses):.3f}")


def check_gated(task, mask):
    """AbsTopK takes its winners in the full model, not among the kept nodes alone."""
    runner = PlainRunner(task.model, task.frozen_values, task.judged, gated=True)
    loss = logistic(runner.margins(mask))
    return loss_check(task.settings, "full model's AbsTopK", loss, "only nodes that are active in "
                      f"the full model are: loss {loss:.3f}")


def check_constants(task, mask):
    """Deleted values of heads are constants after attention too."""
    runner = PlainRunner(task.model, task.frozen_values, task.judged, constant=True)
    loss = logistic(runner.margins(mask))
    return loss_check(task.settings, "true constants", loss, "deleted values of heads frozen "
                      f"after attention, whatever goes to its sink: loss {loss:.3f}")


def attention_overlap(task, mask):
    """{(block, head): share}: how much of its attention each head of the circuit puts where it
    does in the full model, the mean over all positions of the prompts."""
    cfg, shared = task.model.cfg, defaultdict(list)
    params = PlainRunner(task.model, task.frozen_values, task.judged.rows([0, 1])).params(mask)
    for _, part in task.judged.parts():
        _, full = sg.forward(task.model.params, part.ids, cfg)
        _, own = sg.forward(params, part.ids, cfg, Ablation(mask.nodes, task.frozen_values, cfg))
        for i, head in heads_of(mask, cfg):
            both = np.minimum(*(attention_weights(cache, i)[:, head] for cache in (full, own)))
            shared[i, head].append(both.sum(-1)[part.inside()])
    return {head: float(np.concatenate(x).mean()) for head, x in shared.items()}


def check_attention(circuit):
    """Whether its heads look where they do in the full model: see `attention_overlap`."""
    heads = circuit.report["heads"]
    if not heads:
        return verdict("attention", None, "the circuit has no attention head")
    lowest, text = min(head["overlap"] for head in heads), ", ".join(
        f"{head['name']} {head['overlap']:.0%}" for head in heads)
    return verdict("attention", lowest >= 0.8, f"shared with the full model's pattern: {text} "
                   "(pass: from 80% each)", overlap=lowest)


def check_control(name, result, stages, target):
    """A search that should find nothing as small as the circuit at the same stage of its own."""
    if result.mask is None:
        return verdict(name, True, f"the same search did not reach the target of {target:g}; its "
                       f"best loss was {result.loss:.3f}", loss=result.loss, nodes=None)
    last = result.stages[-1]
    own = next((stage for stage in stages if stage["stage"] == last["stage"]), stages[-1])
    note = "" if own is stages[-1] else ", both before cleaning"
    return verdict(name, last["edges"] > 2 * own["edges"], "the same search found "
                   f"{last['nodes']} nodes and {last['edges']} edges, for the circuit's "
                   f"{own['nodes']} and {own['edges']}{note} (pass: more than twice its edges)",
                   loss=result.loss, edges=last["edges"], nodes=last["nodes"])


def check_seeds(others, mask):
    """How many nodes the circuits of other mask seeds share with the first."""
    shared, notes = [], []
    if not others:
        return verdict("other seeds", None, "not run")
    for other in (other for other in others if other.mask is not None):
        both, either = mask.nodes & other.mask.nodes, mask.nodes | other.mask.nodes
        shared.append(both.sum() / either.sum() if either.any() else 1.0)
        notes.append(f"{other.stages[-1]['nodes']} nodes and {other.stages[-1]['edges']} edges, "
                     f"{shared[-1]:.0%} of both circuits' nodes are shared")
    least = min(shared) if len(shared) == len(others) else 0.0  # one has found nothing
    return verdict("other seeds", least >= 0.5, "; ".join(notes) + " (pass: from 50%)",
                   overlap=least)


# ---- readings of nodes, edges and heads ---------------------------------------------------------

def token(model, i):
    """A token id as text on one line."""
    return "<start>" if i == model.tok.EOT else sg.one_line(model.tok.decode([int(i)]))


def values_of(seen, nodes, cfg):
    """The values of some nodes [N, n], from what a Recorder has seen."""
    return np.concatenate([sg.to_host(seen[site]) for site in node_slices(cfg)], 1)[:, nodes]


def extremes(model, values, ids, n=5):
    """{"high": [[text before, token, value, text after]], "low": ...}: the n tokens with the
    largest and the smallest of values [B, T], each token once: else most rows would be of one, and
    not show at what else a node is high."""
    out = {}
    for side, sign in (("high", -1), ("low", 1)):
        rows, order = {}, np.argsort(sign * values, axis=None, kind="stable")
        for b, t in zip(*np.unravel_index(order, values.shape)):
            if len(rows) == n:
                break
            if ids[b, t] not in rows:
                before, after = ("".join(token(model, i) for i in part)
                                 for part in (ids[b, max(0, t - 6):t], ids[b, t + 1:t + 5]))
                rows[ids[b, t]] = [before[-24:], token(model, ids[b, t]),
                                   round(float(values[b, t]), 4), after[:12]]
        out[side] = list(rows.values())
    return out


def node_readings(model, nodes):
    """[`extremes` on training text] of some nodes."""
    parts = (model.text[i:i + 4] for i in range(0, len(model.text), 4))  # all nodes are recorded
    values = np.concatenate([values_of(observe(model, part)[1], nodes, model.cfg)
                             for part in parts]).reshape(*model.text.shape, len(nodes))
    return [extremes(model, values[..., i], model.text) for i in range(len(nodes))]


def effective_bias(model, mask, frozen_values):
    """{node: its bias plus all that frozen inputs give} of the kept nodes that one matrix writes;
    of what heads write, as if no head looked at its sink, which gives nothing."""
    out, edges = {}, kept_edges(mask, model.params, model.cfg)
    for name, m in matrices(model.cfg).items():
        w, b = (sg.to_host(model.params[x]).astype(np.float64) for x in (name, m.bias))
        _, b = delete_weights(w, b, frozen_values[m.source], ~edges[name])
        for j in np.flatnonzero(mask.nodes[m.target]):
            out[m.target[j]] = None if m.target[j] in out else float(b[j])
    return out


def connections(model, mask, prompts):
    """{"edges" | "residual" | "embed" | "unembed": links} of a circuit: its edges; the pairs of
    nodes of `residual_links`; and at channels of the residual stream the nonzero embeddings of
    tokens that differ within a pair, and the nonzero unembeddings of answers."""
    cfg, p, out = model.cfg, model.params, dict(edges=[], residual=[], embed=[], unembed=[])
    for name, i, j in edge_list(mask.edges):
        m = matrices(cfg)[name]
        out["edges"].append({"from": node_name(m.source[i], cfg), "to": node_name(
            m.target[j], cfg), "matrix": name, "weight": float(p[name][i, j])})
    out["residual"] = [{"from": node_name(a, cfg), "to": node_name(b, cfg)}
                       for a, b in residual_links(mask, cfg)]
    counts = np.array([np.bincount(ids[:end + 1], minlength=cfg.vocab_size)
                       for ids, end in zip(prompts.ids, prompts.last)])
    cues = np.flatnonzero((counts[::2] != counts[1::2]).any(0))
    answers = np.unique([prompts.right, prompts.wrong])
    for name in (node_name(n, cfg) for n in np.flatnonzero(mask.nodes)):
        site, _, channel = name.rpartition(".")
        if link(site) == "reads":
            column = p["wte"][:, int(channel)]
            out["embed"] += [{"token": token(model, i), "to": name, "weight": float(column[i])}
                             for i in cues if column[i] != 0]
        if site == "final":
            row = sg.unembedding(p)[int(channel)]
            out["unembed"] += [{"from": name, "token": token(model, i), "weight": float(row[i])}
                               for i in answers if row[i] != 0]
    return out


def pair_readings(model, mask, frozen_values, pair, overlap):
    """(example, heads) of a circuit's run on one pair of prompts (Prompts of two rows).

    example: {"prompts", "answers", "margins", "values": {node: [value by token, of each prompt]}}.
    heads: what each head of overlap, {(block, head): attention shared with the full model},
    attends to from the deciding positions; "rows" is its whole pattern in percent, a row for each
    token with its shares of the tokens up to there, and the rest in the sink.
    """
    cfg, params = model.cfg, PlainRunner(model, frozen_values, pair).params(mask)
    kept, hook = np.flatnonzero(mask.nodes), Ablation(mask.nodes, frozen_values, model.cfg)
    logits, seen, cache = observe(model._replace(params=params), pair.ids, hook=hook)
    logits = sg.to_host(logits)[np.arange(len(pair.last)), pair.last]
    prompts = [[token(model, i) for i in ids[:end + 1]] for ids, end in zip(pair.ids, pair.last)]
    values = values_of(seen, kept, cfg).reshape(*pair.ids.shape, len(kept))
    values = {node_name(n, cfg): [[round(float(x), 3) for x in row[:len(tokens), i]]
                                  for row, tokens in zip(values, prompts)]
              for i, n in enumerate(kept)}
    heads = []
    for (i, head), share in overlap.items():
        attends = []
        for tokens, weights in zip(prompts, attention_weights(cache, i)[:, head]):
            w = weights[len(tokens) - 1]  # past the last token there is only the sink
            to = [[[*tokens, "sink"][min(t, len(tokens))], round(float(w[t]), 3)]
                  for t in np.argsort(-w, kind="stable")[:4] if w[t] >= 0.01]
            rows = [np.rint(100 * weights[t, :t + 1]).astype(int).tolist()
                    for t in range(len(tokens))]
            attends.append(dict(context="".join(tokens[1:]), at=tokens[-1], to=to, rows=rows))
        nodes = [node_name(n, cfg) for n in heads_of(mask, cfg)[i, head]]
        heads.append(dict(name=f"h{i}.head.{head}", nodes=nodes, attends=attends, overlap=share))
    margin = [round(float(x), 3) for x in margins(logits, pair)]
    return dict(prompts=prompts, answers=[token(model, i) for i in pair.right], margins=margin,
                values=values), heads


# ---- the print-out ------------------------------------------------------------------------------
# It is made from a circuit's report, without the model.

LEGEND = """<-, -> edges with weights (tokens and answers are not counted); == the same channel of
the residual stream, to which tokens and blocks add, and which is then divided by the stream's RMS.
␣ a space. Deleted: frozen at {}.
importance: how much the circuit's loss rises without this node; model: how much the full
model's loss does. values: in the circuit, on the two prompts, at the last token (counted from the
end) where they differ by at least half of their largest difference."""
CHECKS_HEAD = """checks: a loss of the circuit passes up to twice the target, without it from 0.35.
The last ones repeat the search where there should be no circuit, and with another seed."""


def listing(circuit, verbose=False):
    """A circuit as text: `portrait`, then its checks."""
    lines = (check_text(c, verbose) for c in circuit.report["checks"])
    return "\n".join([portrait(circuit, verbose), *lines])


def portrait(circuit, verbose=False):
    """A circuit as text, up to the head of its checks: task, size, losses, its nodes and edges in
    the order of computation. verbose: all stages and nodes, tokens with high and low values."""
    r, size, example = circuit.report, circuit.report["size"], circuit.report["example"]
    lines = textwrap.wrap(f"{circuit.task}: {r['doc']}", 99, subsequent_indent="    ")
    lines += [f"    prompt {i}: {''.join(tokens[1:])}    answer: {sg.one_line(answer, '␣')}"
              for i, (tokens, answer) in enumerate(zip(example["prompts"], example["answers"]), 1)]
    found = "{nodes} nodes and {edges} edges of {model_nodes:,} and {model_edges:,}".format(**size)
    ranked = "{nodes:,} nodes and {edges:,} edges.".format(**r["attribution"])
    lines += textwrap.wrap(f"{found}. With nodes ranked by attribution, in place of learned "
                           f"masks, the target takes {ranked}", 99)
    lines += [f"{'loss in nats':<14}" + "".join(
                  f" {f'{n} {name} prompts':^26}  "
                  for name, n in zip(("search", "held-out"), r["prompts"].values())),
              f"{'':<14}" + f" {'binary':>8} {'full':>8} {'accuracy':>8}  " * 2]
    for key, name in (("full", "full model"), ("circuit", "circuit")):
        splits = (r["losses"][key][split] for split in ("search", "held"))
        lines.append(f"{name:<14}" + "".join(
            f" {s['binary']:8.4f} {s['full']:8.4f} {s['accuracy']:8.1%}  " for s in splits))
    lines.append(f"{'target':<14} {circuit.settings.target:8.4f} (chance: {math.log(2):.4f})")
    if verbose:
        lines += ["not counted: biases, {embed} embeddings of tokens that differ in a pair, "
                  "{unembed} unembeddings of answers".format(**size), "",
                  "search" + f"{'nodes':>25} {'edges':>8} {'loss':>8}"]
        lines += [f"    {s['stage']:<20} {s['nodes']:>6,} {s['edges']:>8,} {s['loss']:8.4f}"
                  for s in r["stages"]]
    lines += ["", *textwrap.wrap(LEGEND.format(ABLATIONS[circuit.settings.ablation][1]), 99)]
    body = ("\n\n" if verbose else "\n").join(map("\n".join, blocks(circuit, verbose)))
    return "\n".join([*lines, "", body, "", CHECKS_HEAD])


def check_text(check, verbose=False):
    """A check as text, most often on one line."""
    mark = {True: "passed", False: "FAILED", None: "-"}[check["passed"]]
    short = check["passed"] is True and check.get("edges") is None
    text = amount(check) if short and not verbose else check["text"]
    if text == "none" and check.get("loss") is not None:
        text = f"none (best loss {check['loss']:.2f} nats)"
    return "\n".join(textwrap.wrap(f"    {mark:<7} {check['name']}: {text}", 99,
                                   subsequent_indent=12 * " "))


def amount(check):
    """The number that a check goes by."""
    if check.get("overlap") is not None:
        return f"{check['overlap']:.0%}"
    if "edges" in check:
        return "none" if check["edges"] is None else f"{check['edges']:.0f} edges"
    return f"{check['loss']:.2f} nats"


def packed(items, wide=99):
    """Lines of items, two spaces apart and indented."""
    lines = []
    for item in items:
        if lines and len(lines[-1]) + len(item) + 2 <= wide:
            lines[-1] += f"  {item}"
        else:
            lines.append(f"    {item}")
    return lines


def wire_texts(report, most=3):
    """({node: what leads to it}, {node: what it leads to}), as texts. Of a node's embeddings at
    most the `most` heaviest; a matrix is named where several join two sites."""
    before, after, tokens, joining = (defaultdict(list) for _ in range(4))

    def ends(e):
        return e["from"].rpartition(".")[0], e["to"].rpartition(".")[0]

    for e in report["edges"]:
        joining[ends(e)].append(e["matrix"])
    for e in report["edges"]:
        by = f" by {e['matrix']}" if len({*joining[ends(e)]}) > 1 else ""
        before[e["to"]].append(f"<- {e['from']} {e['weight']:+.2f}{by}")
        after[e["from"]].append(f"-> {e['to']} {e['weight']:+.2f}{by}")
    for e in report["residual"]:
        before[e["to"]].append(f"== {e['from']}")
    for e in sorted(report["embed"], key=lambda e: -abs(e["weight"])):
        tokens[e["to"]].append(f"{sg.one_line(e['token'], '␣')} {e['weight']:+.2f}")
    for name, texts in tokens.items():
        more = f" and {len(texts) - most} more" * (len(texts) > most)
        before[name].insert(0, f"<- tokens {', '.join(texts[:most])}{more}")
    asked = report["example"]["answers"]
    for e in sorted(report["unembed"], key=lambda e: (e["token"] not in asked, -e["weight"])):
        after[e["from"]].append(f"-> answer {sg.one_line(e['token'], '␣')} {e['weight']:+.2f}")
    return before, after


def reading_lines(node):
    """[line] of where a node of a report is highest and lowest in training text, see `extremes`:
    its value, then the [token] in its text."""
    return [line for side in ("high", "low") for line in packed([side, *(
        f"{value:+.2f} {before[-12:]}[{sg.one_line(token, '␣')}]{after[:6]}"
        for before, token, value, after in node["text"][side])])]


def gaps(values, mean):
    """A node's values on one prompt less those on the other, token by token from the end, without
    <start>. Tokens that the other prompt does not have are compared with the node's mean."""
    return [x - y for x, y in itertools.zip_longest(
        *(row[:0:-1] for row in values), fillvalue=mean)] or [0.0]


def telling(values, mean):
    """The token, counted from the end, that tells a node's values on two prompts apart: the last
    at which they differ by half of the most, as what differs early is often moved on."""
    sizes = [abs(gap) for gap in gaps(values, mean)]
    return next(t for t, size in enumerate(sizes, 1) if size >= max(sizes) / 2)


def head_block(head):
    """[line] of a head of a circuit: what it looks at."""
    fixed = "" if any(n.split(".")[1] == "q" for n in head["nodes"]) else (
        "; its queries are frozen")
    lines = [f"{head['name']}  {head['overlap']:.0%} of its attention is where the full model's is"
             f"{fixed}"]
    lines += packed(f"end of prompt {i}: looks at " + ", ".join(
        f"{sg.one_line(t, '␣')} {w:.2f}" for t, w in a["to"][:3])
        for i, a in enumerate(head["attends"], 1))
    return lines


def blocks(circuit, verbose):
    """[[line]]: a block for each head and node of a circuit in the order of computation. Without
    verbose, nodes of less than a tenth of the largest importance are one block."""
    report, out = circuit.report, []
    before, after = wire_texts(report)
    heads = {head["nodes"][0]: head for head in report["heads"]}  # by their first nodes
    largest = max((node["importance"] for node in report["nodes"]), default=0)
    minor = [node["name"] for node in report["nodes"] if node["importance"] < 0.1 * largest]
    for node in report["nodes"]:
        name, values = node["name"], report["example"]["values"][node["name"]]
        if name in heads:
            out.append(head_block(heads[name]))
        if name in minor and not verbose:
            continue
        back = telling(values, node["mean"])
        tokens = " | ".join(dict.fromkeys(  # a prompt may be too short for it
            sg.one_line(p[-back], "␣") for p in report["example"]["prompts"] if back < len(p)))
        at = (f"{row[-back]:+7.2f}" if back < len(row) else f"{'-':>7}" for row in values)
        block = [f"{name:<16} importance {node['importance']:6.3f}, model {node['in_model']:6.3f}"
                 f"   values {' '.join(at)}  at -{back}, {tokens}"]
        block += packed(before[name] + after[name])
        if verbose:
            bias = "none" if node["bias"] is None else f"{node['bias']:+.3f}"
            block.append(f"    bias and frozen inputs {bias}, {circuit.settings.ablation} "
                         f"{node['mean']:+.3f}")
            block += reading_lines(node)
        out.append(block)
    if minor and not verbose:
        out.append([f"and {len(minor)} more, each less than a tenth as important as the most "
                    "important one"])
        groups = [g for g in report["groups"] if len(g["nodes"]) > 1]
        out[-1] += [f"    {len(g['nodes'])} of them, connected, have together {g['effect']:.3f}"
                    for g in sorted(groups, key=lambda g: -g["effect"])[:3]]
    return out


def next_commands(circuit, flags="", out=""):
    """Three commands to go on with, a line each. flags, out: those that they need."""
    nodes, (prompt, _) = circuit.report["nodes"], circuit.report["example"]["prompts"]
    start = f"\n    python prune.py {circuit.task}{flags}"
    text = shlex.quote("".join(prompt[1:]).replace("⏎", "\n").replace("⇥", "\t"))
    lines = f"next:{start}{out} --explain{start}{out} --ask {text}"
    if nodes:
        most = max(nodes, key=lambda node: node["in_model"])
        lines += f"{start} --ablate {most['name']}"
    return lines


def summary(rows):
    """The table of all tasks, as text. rows: {task: (its Circuit or None, why there is none)}."""
    names = "full held-out others without flips nodes edges nonsense inverted shuffled".split()
    lines, sizes = [f"{'task':<28}" + "".join(f"{name:>9}" for name in names)], []
    for task, (circuit, text) in rows.items():
        if circuit:
            r, checks = circuit.report, {c["name"]: c for c in circuit.report["checks"]}
            sizes.append([max(1, r["size"]["nodes"]), max(1, r["size"]["edges"])])
            cells = [f"{r['losses'][which][split]['binary']:.3f}"
                     for which, split in (("full", "search"), ("circuit", "held"))]
            cells += ["-" if checks[name]["passed"] is None else amount(checks[name]).split()[0]
                      for name in ("others restored", "necessity", "interchange")]
            cells += [r["size"]["nodes"], r["size"]["edges"], *(
                "-" if checks[name]["passed"] is None else amount(checks[name]).split()[0]
                for name in CONTROLS)]
            text = "".join(f"{x:>9}" for x in cells)
        alone = circuit and circuit.settings.restore < 1
        lines.append(f"{task + ' *' * bool(alone):<28}{'' if circuit else '  '}{text}")
    means = [geometric_mean(column) for column in zip(*sizes)] or [0, 0]
    return "\n".join([
        *lines, "{} circuits: geometric mean {:.1f} nodes, {:.1f} edges (0 counts as 1)".format(
            len(sizes), *means),
        "full: binary loss in nats of the full model; without: the same without the circuit",
        "held-out, others: the circuit's loss on other prompts, and beside restored nodes",
        "*: searched with --restore under 1, so that a circuit need not hold beside all shares",
        "flips: answers of the full model that flip if the circuit's nodes are as on the pair's "
        "other prompt",
        "nonsense, inverted, shuffled: edges of the controls; without a *, before cleaning"])


# ---- several processes --------------------------------------------------------------------------

def on_cores(fn, items, workers, in_order=True):
    """Yields fn(item) of every item, computed in `workers` processes; without in_order, each as
    soon as it is done. Raises UserError if a process ends too early.

    Processes, not threads: with arrays so small, these would wait for the interpreter's lock. One
    worker, and a GPU, stay in this process. Under mpirun the first process deals out the items.
    """
    if workers > 1 and sg.processes().size > 1:
        from mpi4py.futures import MPICommExecutor
        with MPICommExecutor(sg.processes(), 0) as pool:
            if pool:
                yield from pool.map(fn, items, unordered=not in_order)
        return
    if workers == 1 or len(items) < 2 or sg.xp is not np:
        yield from map(fn, items)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
    with sg.signals_blocked():  # also in the process that watches over semaphores
        pool = futures.ProcessPoolExecutor(min(workers, len(items)), context, start_worker,
                                           [tasks.added])
    before = set(multiprocessing.active_children())
    try:
        with sg.signals_blocked():  # also in the workers, which begin here: they are for us
            jobs = [pool.submit(fn, item) for item in items]
        for job in jobs if in_order else futures.as_completed(jobs):
            yield job.result()
    except futures.process.BrokenProcessPool as e:
        raise sg.UserError(
            "a worker process was killed, or could not start; a script that uses workers must be "
            'a file, with all that it does under if __name__ == "__main__"') from e
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(added):
    """What a worker process does first. added: files with tasks of one's own."""
    def end_with_parent():  # even if that was killed: nobody is left to take the results
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    for path in added:
        tasks.add_file(path)
    sg.keep_freed_memory()


# ---- files --------------------------------------------------------------------------------------

FORMAT = "sparsegpt-circuit-7"  # the version of a circuit's file


def digest(content):
    """The checksum that a circuit's file holds of its content. Raises ValueError on NaN."""
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def circuit_json(circuit):
    """A Circuit as the text of its file: all that reproduces its losses."""
    content = dict(format=FORMAT, task=circuit.task,
                   settings=dataclasses.asdict(circuit.settings), **circuit.report)
    return json.dumps(dict(content, sha256=digest(content)), indent=1, ensure_ascii=False)


def parse_circuit(text):
    """The Circuit in the text of a file. Raises ValueError, or another error, if it is damaged,
    cannot be printed, or is no circuit."""
    report = json.loads(text)
    if report.pop("sha256") != digest(report):
        raise ValueError("its content does not match its checksum")
    if report.pop("format") != FORMAT:
        raise ValueError("it is of another version")
    cfg, settings = sg.Config(**report["model"]["config"]), Settings(**report.pop("settings"))
    if not report["task"].isidentifier() or settings.ablation not in ABLATIONS:
        raise ValueError("there is no such search")
    nodes = np.zeros(n_nodes(cfg), bool)
    nodes[[node_number(node["name"], cfg) for node in report["nodes"]]] = True
    edges = {name: np.zeros(sg.shapes(cfg)[name], bool) for name in matrices(cfg)}
    for e in report["edges"]:
        m = matrices(cfg)[e["matrix"]]
        [i] = np.flatnonzero(m.source == node_number(e["from"], cfg))
        [j] = np.flatnonzero(m.target == node_number(e["to"], cfg))
        edges[e["matrix"]][i, j] = True
    circuit = Circuit(report.pop("task"), settings, CircuitMask(nodes, edges), report)
    # All that is printed of a circuit must be there.
    listing(circuit), listing(circuit, True), summary({circuit.task: (circuit, "")})
    next_commands(circuit)
    return circuit


def save_circuit(path, circuit):
    """Write a Circuit as JSON. Raises UserError if it cannot be written."""
    sg.write_text(path, circuit_json(circuit))


def load_circuit(path):
    """The Circuit in a file. Raises UserError if it is missing, damaged, or not a circuit."""
    try:
        return parse_circuit(sg.read_bytes(path).decode("utf-8", "surrogatepass"))
    except FileNotFoundError as e:
        raise sg.UserError(f"no file {path}; make one with: python prune.py TASK") from e
    except Exception as e:  # what is forged may fail anywhere
        raise sg.UserError(f"{path} cannot be read, or is damaged or no circuit "
                           f"({type(e).__name__}: {e})") from e


def verify(circuit, context):
    """Measure a circuit and its model again. Returns a line for each number or name that is not
    as in its report. Rounding differs between machines, and near ties of AbsTopK with it."""
    task = PruningTask(context.model, context.frozen_values, circuit.task, circuit.settings)
    found = measured(context, task, circuit.mask)
    return [*differences(circuit.report["losses"], found.pop("losses"), "losses", 1e-3),
            *differences(circuit.report, found, "", 1e-4)]


def differences(said, found, name, allowed):
    """A line for each part of `found` that is not so in `said`."""
    if isinstance(found, dict):
        for key, part in found.items():
            yield from differences(said[key], part, f"{name} {key}", allowed)
    elif isinstance(found, list) and len(said) == len(found):
        for i, (a, b) in enumerate(zip(said, found), 1):
            yield from differences(a, b, f"{name} {i}", allowed)
    elif isinstance(found, list):
        yield f"{name.strip()}: the file has {len(said)}, the model {len(found)}"
    elif not (abs(said - found) <= allowed if isinstance(found, (int, float)) else said == found):
        yield f"{name.strip()}: the file says {said}, the model gives {found}"


def included_path(task):
    """Where the circuit of a task that comes with the source is, if there is one."""
    return Path(os.path.relpath(Path(__file__).with_name("docs") / "circuits" / f"{task}.json"))


def saved_path(name, given):
    """The path of a saved circuit, by its file or its task: in --out or, if there is none, of the
    one that comes with the source; a line on stderr says so."""
    if name.endswith(".json") or os.sep in name or Path(name).is_file():
        return Path(name)
    path, included = Path(given.get("out", "circuits"), f"{name}.json"), included_path(name)
    if "out" in given or path.exists() or not included.exists():
        return path
    print(f"there is no {path}: using {included}, an included circuit", file=sys.stderr)
    return included


def drawing():
    """The module extras/draw.py, or None; a line on stderr then says so, once."""
    try:
        return sg.extra("draw", "nothing is drawn")
    except sg.UserError as e:
        say_once(str(e))


# ---- command line -------------------------------------------------------------------------------

def find(context, name, settings, folder, seeds, workers=1, verbose=False, tell=None):
    """The Circuit of a task: saved as soon as its search has ended, and again with all checks.
    tell: gets the print-out meanwhile. Before a circuit replaces a former one it is read back from
    its text. Raises UserError if that does not reproduce its losses, or cannot be saved."""
    path = Path(folder, f"{name}.json")

    def found(circuit, check):
        if check is None:
            if wrong := verify(parse_circuit(circuit_json(circuit)), context):
                raise sg.UserError(f"the circuit of {name} is not reproduced: {wrong[0]}")
            try:
                sg.save_or_aside(save_circuit, path, circuit)
            except sg.UserError as e:
                print(f"{e}; the search goes on", file=sys.stderr)
        if tell:
            tell(check_text(check, verbose) if check else portrait(circuit, verbose))

    circuit = prune(context.model, name, settings, context, seeds, workers, progress=bool(tell),
                    found=found)
    sg.save_or_aside(save_circuit, path, circuit)
    return circuit


def prune_one(context, settings, folder, seeds, task):
    """(task, its Circuit or None, a line of text). A finished circuit in the folder is kept if it
    is of this model and these settings, and has its losses on the task as it is now."""
    path, asked = Path(folder, f"{task}.json"), (task, settings, seeds)
    try:
        circuit = load_circuit(path)
        ran = {c["name"] for c in circuit.report["checks"] if c["passed"] is not None}
        kept = (circuit.task, circuit.settings, circuit.report["seeds"]) == asked and (
            ran >= set(CONTROLS)) and circuit.is_of(context.model) and (
            not verify(circuit, context))
    except Exception:  # what is forged may fail anywhere
        kept = False
    try:
        if not kept:
            circuit = find(context, task, settings, folder, seeds)
    except CannotPrune as e:
        return task, None, f"not pruned: {e}"
    text = "{nodes} nodes, {edges} edges".format(**circuit.report["size"])
    return task, circuit, text + ", kept from an earlier run" * kept


def prune_all(context, settings, folder, seeds, workers, log=print):
    """Prune every task, several at a time, and write the summary."""
    began, rows, n = time.perf_counter(), dict.fromkeys(tasks.TASKS), len(tasks.TASKS)
    one, pages = functools.partial(prune_one, context, settings, folder, seeds), drawing()
    for i, (task, circuit, text) in enumerate(on_cores(one, [*tasks.TASKS], workers, False), 1):
        rows[task] = circuit, text
        left = (time.perf_counter() - began) * (n - i) / i
        log(f"{i:>2} of {n}  {task:<28} {text}; {sg.clock(left)} left")
        if circuit and pages:
            pages.write(Path(folder, f"{task}.json"), circuit)
    log(f"\n{summary(rows)}")
    if pages:
        pages.write_summary(Path(folder, "summary.html"), rows)
        log(f"wrote {Path(folder, 'summary.html')}, which shows all of them")


def make_parser():
    """The flags. Those that are not given are absent from the result."""
    parser = sg.Parser(description="Prune a trained model to the circuit of a task.")
    parser.add_argument("task", nargs="?", help="a task's name, or all; without: list them")
    add_settings(parser, ABLATIONS)
    modes = parser.add_mutually_exclusive_group()
    change = parser.add_mutually_exclusive_group()  # a mode, or part of --ask or --predict
    number, file = dict(type=int), dict(metavar="FILE")
    prompt = dict(metavar="PROMPT")
    for group, name, options, text in (
            (parser, "verbose", dict(action="store_true"), "print all that was found: stages, "
             "checks, every node with the tokens at which it is high and low"),
            (parser, "model", {}, "checkpoint (default out/sparse.npz, else docs/long.npz)"),
            (parser, "out", {}, "folder for circuits (default circuits)"),
            (parser, "tasks", {}, "a Python file with tasks of one's own, as docs/my_tasks.py"),
            (parser, "runs", number, "mask trainings in a search, 1 to 9 (default 1)"),
            (parser, "pairs", number, "prompt pairs in a step of mask training (default 8)"),
            (parser, "seeds", number, "searches that are compared (default 2)"),
            (parser, "contexts", number, "with --predict: contexts of each prompt (default 8)"),
            (parser, "answers", dict(nargs=2, metavar="ANSWER"), "with --ask, "
             "--explain PROMPT or --trace: the two to compare"),
            (modes, "show", file, "print a saved circuit, by its file or its task"),
            (modes, "check", file, "compute a saved circuit's losses again"),
            (modes, "explain", dict(prompt, nargs="?"), "print the values of the saved circuit's "
             "nodes on its prompts, or on PROMPT"),
            (modes, "trace", prompt, "the paths through the full model that make it prefer its "
             "likeliest token after PROMPT; no task is needed"),
            (parser, "head", {}, "with --trace: why a head, as h1.head.8, looks where it looks"),
            (parser, "at", number, "with --head: from which token, counted from the end "
             "(default 1, the last)"),
            (modes, "predict", file, "what the full model and the saved circuit answer to the "
             "prompts of a file, as docs/near/var_if.txt"),
            (modes, "ask", dict(prompt, action="append"), "what the full model and the saved "
             "circuit answer; may be repeated"),
            (change, "set", dict(metavar="NODE=VALUE", action="append"), "run the full model with "
             "a node frozen, on the task, --ask or --predict; may be repeated"),
            (change, "ablate", dict(metavar="NODE", action="append"), "the same at its mean; of a "
             "head, as h1.head.5: all of it; may be repeated")):
        group.add_argument(f"--{name}", help=text, **options)
    return parser


def add_settings(parser, ablations):
    """Add the flags of a search that extras/compare.py shares."""
    add = parser.add_argument
    add("--target", type=float, help="binary loss in nats of a circuit (default 0.15)")
    add("--ablation", choices=[*ablations], help="what deleted nodes are frozen at (default mean)")
    add("--restore", type=float, help="largest share of other nodes that is restored beside a "
        "circuit (default 1; 0: none, as in the paper)")
    add("--seed", type=int, help="of prompts and masks (default 0)")


def settings_of(given):
    """The Settings of parsed flags. Raises UserError on a value out of range."""
    if not 1 <= given.get("seeds", 1) <= 100:
        raise sg.UserError(f"--seeds must be from 1 to 100, not {given['seeds']}")
    names = (field.name for field in dataclasses.fields(Settings))
    return Settings(**{name: given[name] for name in names if name in given})


# The first of these that is given is the mode.
MODES = ("show", "check", "explain", "head", "trace", "predict", "ask", "set", "ablate")
# The modes that look at a flag. Elsewhere it is refused, as it would mislead.
USED_BY = dict.fromkeys(("target", "ablation", "runs", "pairs", "restore", "seeds"),
                        {"search"}) | dict(
    seed={"search", "predict", "set", "ablate"}, verbose={"search", "show"},
    answers={"ask", "explain", "trace"}, contexts={"predict"}, trace={"head", "trace"},
    at={"head"}, set={"predict", "ask", "set"}, ablate={"predict", "ask", "ablate"},
    task={"search", "explain", "predict", "ask", "set", "ablate"},
    model={"list", "search", *MODES} - {"show"},
    out={"list", "search", "show", "check", "explain", "predict", "ask"})


def act(argv):
    """What `main` does, if nothing goes wrong."""
    given = vars(make_parser().parse_args(argv))
    if "tasks" in given:
        tasks.add_file(given["tasks"])
    task, settings = given.get("task"), settings_of(given)
    mode = next((name for name in MODES if name in given), "list" if task is None else "search")
    for name in given:
        if mode not in USED_BY.get(name, {mode}):
            who = dict(list="without a task, prune.py", search="a search").get(mode, f"--{mode}")
            raise sg.UserError(f"{who} takes no {'--' * (name != 'task')}{name}")
    if mode == "explain" and "answers" in given and given["explain"] is None:
        raise sg.UserError("--explain takes --answers only with a PROMPT")
    if task == "all" and (mode != "search" or "verbose" in given):
        raise sg.UserError("all takes no " + ("--verbose: it prints a line a task"
                                              if mode == "search" else f"--{mode}"))
    if task not in (None, "all"):
        tasks.pairs(task, 1)  # raises TaskError on an unknown task
    elif mode in USED_BY["task"] - {"search"}:
        raise sg.UserError(f"--{mode} needs one task; tasks: {', '.join(tasks.TASKS)}")
    if mode == "head" and "trace" not in given:
        raise sg.UserError("--head needs --trace PROMPT")
    circuit = path = None
    if mode in ("show", "check", "explain", "predict", "ask"):
        path = saved_path(task or given[mode], given)
        circuit = load_circuit(path)
    if mode == "show":
        print(listing(circuit, "verbose" in given))
        return 0
    sg.use_device(os.environ.get("SPARSEGPT_DEVICE", "cpu"))
    sg.keep_freed_memory()
    model = sg.load_model(given["model"] if "model" in given else sg.default_model())
    if circuit and not circuit.is_of(model):
        raise sg.UserError(f"{path} is a circuit of another model, not of {model.cfg.out}; name "
                           f"its own with --model: it was {circuit.report['model']['path']}")
    if circuit and task not in (None, circuit.task):
        raise sg.UserError(f"{path} is a circuit of {circuit.task}")
    if mode == "check":
        wrong = verify(circuit, ModelContext(model, circuit.settings.ablation))
        print("\n".join(wrong or [f"{path}: its losses and weights are reproduced"]))
        return int(bool(wrong))
    if mode == "search":
        return act_search(given, model, settings)
    questions, answers = sg.extra("questions", "no questions are answered"), given.get("answers")
    values = questions.nodes_to_change(given.get("set", ()), given.get("ablate", ()), model.cfg)
    print("\n".join(
        sg.extra("predict", "no predictions are tested").predict(
            circuit, model, given["predict"], values, given.get("contexts", 8), settings.seed)
        if mode == "predict" else
        questions.explain(circuit, model, given["explain"], answers) if mode == "explain" else
        questions.ask(circuit, model, given["ask"], answers, values) if mode == "ask" else
        questions.look(model, given["trace"], given["head"], given.get("at", 1))
        if mode == "head" else
        questions.trace(model, given["trace"], answers) if mode == "trace" else
        questions.intervene(model, task, values, settings) if values else
        questions.overview(model, given.get("out", "circuits"))))
    return 0


def act_search(given, model, settings):
    """Search the circuit of a task, or of all."""
    if sg.processes().rank:
        return len([*on_cores(None, (), 2)])  # which deals it work, in the end
    task, folder, seeds = given["task"], Path(given.get("out", "circuits")), given.get("seeds", 2)
    workers = max(model.cfg.threads or sg.n_cores(), sg.processes().size)
    sg.check_output(folder / f"{task}.json")  # makes the folder
    with sg.locked(folder):
        context = ModelContext(model, settings.ablation)
        if task == "all":
            prune_all(context, settings, folder, seeds, workers)
            return 0
        circuit = find(context, task, settings, folder, seeds, workers, "verbose" in given, print)
        if pages := drawing():
            pages.write(folder / f"{task}.json", circuit)
    *flags, out = (f" --{name} {shlex.quote(given[name])}" if name in given else ""
                   for name in ("tasks", "model", "out"))
    print(f"\nwrote {folder / task}.json{', .html and .dot' if pages else ''}; "
          f"{next_commands(circuit, ''.join(flags), out)}")
    return 0


def main(argv=None):
    """The command line. Returns the exit status: 0, 1 for a circuit that does not reproduce its
    losses, 2 for a mistake, 130 for Ctrl-C."""
    return sg.command("prune.py", act, argv, "with `all`, finished circuits are kept and "
                      "the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
