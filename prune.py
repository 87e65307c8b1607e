"""Cut a trained model down, task by task, to the few nodes and edges that do the job: a circuit.

Source: Gao et al., arXiv 2511.13653 (2025), "the paper", sections 2.2 and A.5.

    python prune.py single_double_quote     # after python sparsegpt.py; about a minute
    python prune.py all                     # every task, and circuits/summary.html

A *node* is one channel at one of a block's eight places, or of the final normed residual, over all
positions and prompts at once; a deleted one is frozen at its mean over training text. An *edge* is
a nonzero weight between two kept nodes; a deleted one is frozen at the weight times the mean of
the node that it comes from. Biases, embeddings and unembeddings are never pruned.

The file reads from top to bottom: nodes and edges, prompts and losses, running a circuit, the
search, checks, what a person reads, files, drawings, comparing models, command line. The search:
learn a mask over nodes by gradient descent through a hard threshold (the paper's method), keep the
fewest nodes that reach the target loss, then try to do without every node and every edge that is
left, one at a time (the paper did this by hand and kept all edges).
"""
import dataclasses
import functools
import hashlib
import html
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, defaultdict, deque, namedtuple
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import NamedTuple

import numpy as np

import sparsegpt as sg
import tasks

FORMAT = "sparsegpt-circuit-1"
PLACES = ("attn_in", "q", "k", "v", "attn_out", "mlp_in", "neuron", "mlp_out")


# ---- nodes and edges ----------------------------------------------------------------------------
# Nodes have one flat numbering, in the order of computation; a vector over it is "by node".

@functools.cache
def node_slices(cfg):
    """{place: slice of the node numbers of its channels}, h0.attn_in first, final last."""
    out, start = {}, 0
    for place in [f"h{i}.{p}" for i in range(cfg.n_layer) for p in PLACES] + ["final"]:
        width = 4 * cfg.d_model if place.endswith("neuron") else cfg.d_model
        out[place] = slice(start, start + width)
        start += width
    return out


def n_nodes(cfg):
    """The number of nodes of a model."""
    return node_slices(cfg)["final"].stop


def node_name(node, cfg):
    """Place and channel of a node number, as in h0.neuron.17."""
    for place, part in node_slices(cfg).items():
        if part.start <= node < part.stop:
            return f"{place}.{node - part.start}"
    raise ValueError(f"no node {node}")


def node_number(name, cfg):
    """The number of the node of a name. Raises UserError if the model has no such node."""
    place, _, channel = name.rpartition(".")
    part = node_slices(cfg).get(place)
    if part is None or not channel.isdecimal() or int(channel) >= part.stop - part.start:
        raise sg.UserError(f"no node {name!r}: nodes are like h0.neuron.17 or final.3, the places "
                           f"{', '.join(node_slices(cfg))}, channels from 0")
    return part.start + int(channel)


class Matrix(NamedTuple):
    """A matrix whose weights are edges: the name of its bias, the node numbers of its rows and of
    its columns (for wqkv, q, k and v stand side by side)."""
    bias: str
    source: slice
    target: slice


@functools.cache
def matrices(cfg):
    """{parameter: Matrix}, in the order of computation."""
    at, out = node_slices(cfg), {}
    for i in range(cfg.n_layer):
        h = f"h{i}."
        qkv = slice(at[h + "q"].start, at[h + "v"].stop)
        out[h + "attn.wqkv"] = Matrix(h + "attn.bqkv", at[h + "attn_in"], qkv)
        out[h + "attn.wo"] = Matrix(h + "attn.bo", at[h + "v"], at[h + "attn_out"])
        out[h + "mlp.wfc"] = Matrix(h + "mlp.bfc", at[h + "mlp_in"], at[h + "neuron"])
        out[h + "mlp.wproj"] = Matrix(h + "mlp.bproj", at[h + "neuron"], at[h + "mlp_out"])
    return out


class Cut(NamedTuple):
    """What is left of a model. keep: bool by node. edges: {matrix: bool [in, out]}, or None for
    every nonzero weight; those that do not join two kept nodes do not count."""
    keep: np.ndarray
    edges: dict | None = None

    def without(self, items):
        """The cut less some nodes, given by number, and edges, given as (matrix, row, column)."""
        keep, edges = self.keep.copy(), self.edges and dict(self.edges)
        for name in {item[0] for item in items if isinstance(item, tuple)}:
            edges[name] = edges[name].copy()
        for item in items:
            if isinstance(item, tuple):
                edges[item[0]][item[1:]] = False
            else:
                keep[item] = False
        return Cut(keep, edges)


def kept_edges(cut, params, cfg):
    """{matrix: bool [in, out]} of the nonzero weights between two kept nodes that are not
    deleted."""
    out = {}
    for name, m in matrices(cfg).items():
        out[name] = sg.to_host(params[name]) != 0
        out[name] &= np.outer(cut.keep[m.source], cut.keep[m.target])
        if cut.edges is not None:
            out[name] &= cut.edges[name]
    return out


def edge_list(edges):
    """[(matrix, row, column)] of the edges that are left, in the order of computation."""
    return [(name, int(i), int(j)) for name, mask in edges.items() for i, j in np.argwhere(mask)]


def sizes(cut, params, cfg):
    """(nodes, edges) of a cut: the numbers that are reported."""
    edges = kept_edges(cut, params, cfg)
    return int(cut.keep.sum()), int(sum(mask.sum() for mask in edges.values()))


# ---- prompts and losses -------------------------------------------------------------------------

class Prompts(NamedTuple):
    """Right-padded prompts, two of each pair in turn, and where and between which tokens they
    decide: see sparsegpt.TaskBatch. sign: +1 where the pair's first answer is right, -1 where its
    second is."""
    ids: np.ndarray    # [n, T]
    last: np.ndarray   # [n]
    right: np.ndarray  # [n]
    wrong: np.ndarray  # [n]
    sign: np.ndarray   # [n]

    def rows(self, index):
        """Some of the prompts, padded no more than these need."""
        some = Prompts(*(column[index] for column in self))
        return some._replace(ids=some.ids[:, :some.last.max() + 1])

    def parts(self, size=16):
        """The prompts in parts of like length, so that little of a part is padding."""
        order = np.argsort(self.last, kind="stable")
        return [self.rows(order[i:i + size]) for i in range(0, len(order), size)]


class CannotPrune(sg.UserError):
    """The model cannot do the task at the target loss, or cannot read its prompts."""


def make_prompts(model, task, n, seed, split="eval", nonsense=False):
    """The prompts of n pairs of a task. nonsense: which answer is right is drawn for each pair, so
    that no rule decides it. Raises CannotPrune if the model can use none of them."""
    try:
        pairs = tasks.pairs(task, n, seed, split)
        batch = sg.task_batch(model.tok, pairs, model.cfg.n_ctx)
    except ValueError as e:
        raise CannotPrune(str(e)) from e
    prompts = Prompts(*batch, np.where(np.arange(len(batch.last)) % 2, -1, 1))
    if nonsense:
        swap = np.repeat(np.random.default_rng(seed).random(len(batch.last) // 2) < 0.5, 2)
        prompts = prompts._replace(right=np.where(swap, batch.wrong, batch.right),
                                   wrong=np.where(swap, batch.right, batch.wrong),
                                   sign=np.where(swap, -prompts.sign, prompts.sign))
    return prompts


def margins(logits, prompts):
    """By how much the right logit is over the wrong one: [n] from [n, V]."""
    rows = np.arange(len(logits))
    return (logits[rows, prompts.right] - logits[rows, prompts.wrong]).astype(np.float64)


class Calibration(NamedTuple):
    """A scale of the logits and a shift of the first answer's logit against the second's."""
    scale: float = 1.0
    shift: float = 0.0

    def margins(self, logits, prompts):
        """The margins of calibrated logits."""
        return self.scale * margins(logits, prompts) + self.shift * prompts.sign

    def logits(self, logits, prompts):
        """Calibrated logits, float64 [n, V]."""
        out, rows = self.scale * logits.astype(np.float64), np.arange(len(logits))
        out[rows, prompts.right] += prompts.sign * self.shift / 2
        out[rows, prompts.wrong] -= prompts.sign * self.shift / 2
        return out


def calibrate(margin, sign, ridge=0.01):
    """The Calibration that fits margins best: Newton's method on their mean logistic loss (paper
    A.5).

    A free scale would take any circuit that gets every prompt right to any target, so it is held
    to at most 2 and at least 1/2, and a ridge draws both numbers to 1 and 0.
    """
    x, start = np.stack([margin, sign], 1).astype(np.float64), np.array([1.0, 0.0])
    at = start.copy()

    def loss(w):
        return np.logaddexp(0, -x @ w).mean() + ridge / 2 * ((w - start) ** 2).sum()

    for free in (slice(0, 2), slice(1, 2)):  # both, then the shift once the scale is in bounds
        for _ in range(10):
            p = np.exp(-np.logaddexp(0, x @ at))  # how wrong each is
            slope = ridge * (at - start) - (x * p[:, None]).mean(0)
            curve = (x * (p * (1 - p))[:, None]).T @ x / len(x) + ridge * np.eye(2)
            step, size = np.zeros(2), 1.0
            step[free] = np.linalg.solve(curve[free, free], slope[free])
            while loss(at - size * step) > loss(at) and size > 1e-9:
                size /= 2
            at = at - size * step
        at[0] = np.clip(at[0], 0.5, 2)
    return Calibration(float(at[0]), float(at[1]))


def logistic(margin):
    """The binary loss in nats of margins [n]."""
    return float(np.logaddexp(0, -margin).mean())


# ---- running a circuit --------------------------------------------------------------------------

class Ablation:
    """A hook for `sparsegpt.forward`: kept nodes pass, the others are frozen at `fill`.

    AbsTopK chooses among the kept nodes only, so a circuit computes with nothing but its own
    nodes. keep: bool by node. fill: values by node, or {place: [N, C]} with one for every token.
    After a backward pass, `grad` is by node the gradient of the loss by a mask m in
    m x + (1 - m) fill, x the value that the node has, or would have if it were kept.
    """

    def __init__(self, keep, fill, cfg):
        self.at, self.saved = node_slices(cfg), {}
        if not isinstance(fill, dict):
            fill = sg.xp.asarray(fill, cfg.dtype)
            fill = {place: fill[part] for place, part in self.at.items()}
        self.fill, self.keep = fill, sg.xp.asarray(keep)
        self.count = {place: int(keep[part].sum()) for place, part in self.at.items()}
        self.grad = sg.xp.zeros(n_nodes(cfg), cfg.dtype)

    def forward(self, place, x, k):
        keep, wins = self.keep[self.at[place]], None
        if k < x.shape[1] and k <= self.count[place]:  # else every node has room
            _, mask = sg.abstopk(x * keep, k)
            size = sg.xp.abs(x)
            least = sg.xp.where(mask, size * keep, math.inf).min(1, keepdims=True)
            wins = sg.xp.where(keep, mask, size >= least)
            x = x * wins
        out = sg.empty_like(x)
        out[...] = self.fill[place]
        sg.xp.copyto(out, x, where=keep)
        self.saved[place] = x, wins
        return out

    def backward(self, place, dx):
        part, (x, wins) = self.at[place], self.saved.pop(place)
        away = sg.xp.subtract(x, self.fill[place], out=sg.empty_like(x))
        self.grad[part] = sg.xp.einsum("nc,nc->c", dx, away)
        dx = sg.xp.multiply(dx, self.keep[part], out=away)
        return dx if wins is None else sg.xp.multiply(dx, wins, out=dx)


class Recorder:
    """A hook that keeps the nodes' values: `seen` is {place: [N, C]}. ablation: a hook that makes
    them, instead of the model's AbsTopK."""

    def __init__(self, ablation=None):
        self.seen, self.ablation = {}, ablation

    def forward(self, place, x, k):
        x = self.ablation.forward(place, x, k) if self.ablation else sg.abstopk(x, k)[0]
        self.seen[place] = x.copy()
        return x


def text_windows(model, n, seed=0):
    """n windows [n, n_ctx] of the text that the model was trained on."""
    corpus = sg.load_corpus(model.cfg, log=lambda _: None)
    if corpus.tok.merges != model.tok.merges:
        raise sg.UserError(f"--data {model.cfg.data} is not the text that the model was trained on:"
                           " it gives another tokenizer")
    rng = np.random.default_rng(seed)
    return sg.draw_batch(corpus.train, rng, n, model.cfg.n_ctx, model.cfg.idioms)[0]


def mean_activations(model, ids):
    """The mean of every node over all tokens of ids [n, T], by node, on the model as it runs, with
    its AbsTopK (paper A.5)."""
    at = node_slices(model.cfg)

    def part(i):
        total, hook = np.zeros(n_nodes(model.cfg)), Recorder()
        sg.forward(model.params, ids[i:i + 4], model.cfg, hook)
        for place, x in hook.seen.items():
            total[at[place]] = sg.to_host(sg.xp.ones(len(x), x.dtype) @ x)
        return total

    totals = sg.parallel(part, range(0, len(ids), 4), model.cfg.threads)
    return (sum(totals) / ids.size).astype(model.cfg.dtype)


class Whole:
    """Runs cuts of a model on fixed prompts, plainly: the whole model with a hook that freezes
    nodes. The reference: the losses that are saved with a circuit are computed so."""

    def __init__(self, model, fill, prompts):
        self.model, self.fill, self.parts = model, fill, prompts.parts()
        self.fills = [fill] * len(self.parts)  # what the deleted nodes of each part are
        order = np.argsort(prompts.last, kind="stable")
        self.prompts = prompts.rows(order)  # in the order of the logits

    def params(self, cut):
        """The parameters with deleted edges frozen: weight 0, the frozen input in the bias."""
        if cut.edges is None:
            return self.model.params
        out = dict(self.model.params)
        left = kept_edges(cut, out, self.model.cfg)
        every = kept_edges(Cut(cut.keep), out, self.model.cfg)
        for name, m in matrices(self.model.cfg).items():
            gone = sg.xp.asarray(every[name] & ~left[name])
            w, fill = out[name], sg.xp.asarray(self.fill[m.source])
            out[name] = sg.xp.where(gone, 0, w)
            out[m.bias] = out[m.bias] + fill @ sg.xp.where(gone, w, 0)
        return out

    def logits(self, cut):
        """The logits at the deciding positions [n, V], on the host."""
        cfg, params = self.model.cfg, self.params(cut)
        return np.concatenate([sg.to_host(sg.forward(
            params, part.ids, cfg, Ablation(cut.keep, fill, cfg), at=part.last)[0])
            for part, fill in zip(self.parts, self.fills)])


def resampled(model, prompts, text, rng):
    """{place: [N, C]}: what every node is, position by position, on windows drawn from text [n, T],
    one a prompt."""
    other, (B, T) = Recorder(), prompts.ids.shape
    windows = text[rng.choice(len(text), B)][:, :T]
    sg.forward(model.params, windows, model.cfg, other, at=prompts.last)
    return other.seen


class Resampled(Whole):
    """The same with deleted nodes at what they are on other text instead of a constant: a stronger
    ablation, as it also brings misleading values. Deleted edges stay frozen at `fill`."""

    def __init__(self, model, fill, prompts, text, rng):
        super().__init__(model, fill, prompts)
        self.fills = [resampled(model, part, text, rng) for part in self.parts]


class Compact(Whole):
    """The same numbers, to rounding, from the kept rows and columns alone: what it costs to try a
    cut. 34 times as fast on 21 nodes of the 5,888 of a model of width 256. A cut that is like an
    earlier one up to some step (a block's attention, or its MLP) is run from there: trials differ
    in one place."""

    def __init__(self, model, fill, prompts):
        super().__init__(model, fill, prompts)
        cfg, xp = model.cfg, sg.xp
        self.host = p = {name: sg.to_host(w) for name, w in model.params.items()}
        # The bias of every matrix with all of its inputs frozen; kept edges are taken out again.
        self.base = {name: p[m.bias] + fill[m.source] @ p[name]
                     for name, m in matrices(cfg).items()}
        self.base["head.w"] = p["head.b"] + fill[node_slices(cfg)["final"]] @ p["head.w"]
        self.start, self.rows, self.bigram = [], [], 0
        for part in self.parts:
            ids, last = xp.asarray(part.ids), xp.asarray(part.last)
            self.start.append(sg.embedding(ids, model.params["wte"], model.params.get("wpe"))[0])
            self.rows.append(xp.arange(len(ids)) * ids.shape[1] + last)
        if cfg.bigram:
            current = self.prompts.ids[np.arange(len(self.prompts.last)), self.prompts.last]
            self.bigram = p["bigram"][current]
        self.memory = [{} for _ in range(2 * cfg.n_layer)]  # by step: {what is kept: streams}

    def logits(self, cut):
        cfg, streams, key = self.model.cfg, self.start, ()
        for step, memory in enumerate(self.memory):
            i, in_mlp = divmod(step, 2)
            key += self.signature(cut, i, ("mlp.wfc", "mlp.wproj") if in_mlp else
                                  ("attn.wqkv", "attn.wo")),
            if key not in memory:
                memory[key] = (self.mlp if in_mlp else self.attention)(cut, i, streams)
            streams = memory[key] = memory.pop(key)  # the latest is the last
            if len(memory) > 3:
                del memory[next(iter(memory))]
        part = node_slices(cfg)["final"]
        rows = np.flatnonzero(cut.keep[part])
        w = self.host["head.w"][rows]
        x = np.concatenate([sg.to_host(sg.rmsnorm(x)[0]) for x in streams])
        return x[:, rows] @ w + self.base["head.w"] - self.fill[part][rows] @ w + self.bigram

    def signature(self, cut, i, names):
        """Bytes that are alike where a step of two cuts is."""
        out = []
        for name in names:
            m = matrices(self.model.cfg)[f"h{i}.{name}"]
            ends = cut.keep[m.source], cut.keep[m.target]
            out += [end.tobytes() for end in ends]
            if cut.edges is not None:
                out.append(cut.edges[f"h{i}.{name}"][np.ix_(*ends)].tobytes())
        return b"".join(out)

    def small(self, cut, name, rows, columns):
        """(weights, bias) of the rows and columns of a matrix, edges deleted, the rest frozen."""
        m = matrices(self.model.cfg)[name]
        w = self.host[name][np.ix_(rows, columns)]
        if cut.edges is not None:
            w = w * cut.edges[name][np.ix_(rows, columns)]
        b = self.base[name][columns] - self.fill[m.source][rows] @ w
        return sg.xp.asarray(w), sg.xp.asarray(b)

    def writes(self, cut, place):
        """(kept channels of a place that writes to the stream, what the frozen ones write)."""
        part = node_slices(self.model.cfg)[place]
        keep = cut.keep[part]
        return np.flatnonzero(keep), sg.xp.asarray(np.where(keep, 0, self.fill[part]))

    def mlp(self, cut, i, streams):
        """The streams after a block's MLP."""
        cfg, at, h = self.model.cfg, node_slices(self.model.cfg), f"h{i}."
        ins, mids = (np.flatnonzero(cut.keep[at[h + place]]) for place in ("mlp_in", "neuron"))
        columns, rest = self.writes(cut, h + "mlp_out")
        w, b = self.small(cut, h + "mlp.wfc", ins, mids)
        w2, b2 = self.small(cut, h + "mlp.wproj", mids, columns)
        k, k_mid, ins, columns = (cfg.k(cfg.d_model), cfg.k(4 * cfg.d_model), sg.xp.asarray(ins),
                                  sg.xp.asarray(columns))
        out = []
        for x in streams:
            out.append(x + rest)
            if len(columns):
                y = sg.abstopk(sg.rmsnorm(x)[0][:, ins], k)[0] @ w + b
                y = (sg.gelu if cfg.act == "gelu" else sg.relu)(y)[0]
                out[-1][:, columns] += sg.abstopk(sg.abstopk(y, k_mid)[0] @ w2 + b2, k)[0]
        return out

    def attention(self, cut, i, streams):
        """The streams after a block's attention; after the last block's, at the deciding positions
        alone.

        Heads without a kept node need no attention. A frozen v still passes on what its head's
        sink leaves of the attention: `left`, by head.
        """
        cfg, at, h, xp = self.model.cfg, node_slices(self.model.cfg), f"h{i}.", sg.xp
        p, fill, C, D, k = self.host, self.fill, cfg.d_model, cfg.d_head, cfg.k(cfg.d_model)
        final, (columns, rest) = i == cfg.n_layer - 1, self.writes(cut, h + "attn_out")
        keep = [cut.keep[at[h + place]] for place in "qkv"]
        alive = (keep[0] | keep[1] | keep[2]).reshape(-1, D).any(1)
        heads, others = np.flatnonzero(alive), np.flatnonzero(~alive)
        channels = (heads[:, None] * D + np.arange(D)).reshape(-1)
        m, qkv = matrices(cfg)[h + "attn.wqkv"], np.add.outer([0, C, 2 * C], channels).reshape(-1)
        ins, kept = np.flatnonzero(cut.keep[at[h + "attn_in"]]), cut.keep[m.target][qkv]
        w, b = self.small(cut, h + "attn.wqkv", ins, qkv)
        kept, frozen = xp.asarray(kept), xp.asarray(fill[m.target][qkv])
        w, b = w * kept, xp.where(kept, b, frozen)

        v_fill, wo, vs = fill[at[h + "v"]], p[h + "attn.wo"][:, columns], np.flatnonzero(keep[2])
        w2 = wo[vs]
        if cut.edges is not None:
            w2 = w2 * cut.edges[h + "attn.wo"][np.ix_(vs, columns)]
        b2 = p[h + "attn.bo"][columns] + v_fill[vs] @ (wo[vs] - w2)
        left = np.where(keep[2], 0, v_fill)[:, None] * wo
        left = left.reshape(len(alive), D, len(columns)).sum(1)
        table = p.get(h + "attn.distance")
        if cfg.sink:  # keys that differ in distance alone against the sink: heads without a node
            q, k_fill = (fill[at[h + x]].reshape(-1, D)[others] for x in "qk")
            n = np.ones((cfg.n_ctx, 1)) if table is None else np.exp(table[others].T)
            n, sink = n.cumsum(0), p[h + "attn.sink"]
            share = n / (n + np.exp(sink[others] - (q * k_fill).sum(1) / math.sqrt(D)))
            b2 = (b2 + share @ left[others]).astype(w2.dtype)
        else:
            b2 = np.tile(b2 + left.sum(0), (cfg.n_ctx, 1))
        sink = xp.asarray(sink[heads]) if cfg.sink else None
        table = None if table is None else xp.asarray(table[heads])
        ins, columns, w2, b2, left = (xp.asarray(a) for a in (ins, columns, w2, b2, left[heads]))
        among = [xp.asarray(np.flatnonzero(kept[channels])) for kept in keep]

        out = []
        for part, x, ends in zip(self.parts, streams, self.rows):
            B, T = part.ids.shape
            rows = ends if final else xp.arange(B * T)
            out.append(x[rows] + rest)
            if not len(columns):
                continue
            y = b2[rows % T]
            if len(heads):
                a = sg.abstopk(sg.rmsnorm(x)[0][:, ins], k)[0] @ w + b
                a = a.reshape(B * T, 3, -1)
                for place, some in enumerate(among):
                    if len(some) > k:
                        a[:, place, some] = sg.abstopk(a[:, place, some], k)[0]
                z, cache = sg.attention(a, sink, table, B, D, ends if final else None)
                y += z[:, among[2]] @ w2
                if cfg.sink:
                    share = 1 - xp.concatenate([to_sink for *_, to_sink in cache[-1]], axis=2)
                    y += share.transpose(0, 2, 1, 3).reshape(len(y), -1) @ left
            out[-1][:, columns] += sg.abstopk(y, k)[0]
        return out


# ---- the search ---------------------------------------------------------------------------------

@dataclass(frozen=True)
class Settings:
    """What decides a search."""
    target: float = 0.15     # binary loss in nats that the circuit may have, calibrated
    ablation: str = "mean"   # what deleted nodes are frozen at: their mean, zero, or resample
    tied: bool = True        # query and key channels share a mask
    runs: int = 1            # mask trainings, each with other hyperparameters and another seed; one
                             # more if those fell just short
    steps: int = 400         # of each
    pairs: int = 8           # prompt pairs a step
    search_pairs: int = 64   # pairs that the loss is measured on, and as many to calibrate on
    seed: int = 0


SWEEP = (0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)  # targets of a curve, in nats
AIMS = (0.4, 0.15, 0.05, 0.015)  # targets that the masks of a curve are trained for

TOO_LARGE = 2000  # edges that are not cleaned: thousands of trials of a quarter of a second each

# k_coef (loss per node kept), rate and temperature of the runs, in the order of their use.
TRIALS = ((1e-3, 0.03, 1.0), (1e-3, 0.01, 1.0), (1e-3, 0.03, 0.3))


class Progress:
    """Prints a line now and then."""

    def __init__(self, name, log=print, every=5.0):
        self.name, self.log, self.every = name, log, every
        self.began = self.last = time.perf_counter()
        self.stage = None

    def __call__(self, stage, done, total, note=""):
        """Say that `done` of `total` of a stage are done."""
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            os._exit(1)  # nobody is left to take the result
        now = time.perf_counter()
        if stage != self.stage:
            self.stage, self.began = stage, now
        elif now - self.last > self.every and done:
            self.last = now
            left = (now - self.began) * (total - done) / done
            self.log(f"  {self.name}: {stage}, {done} of {total}, {note}{sg.clock(left)} left")


class Problem:
    """A model and a task to find circuits for: its prompts and what deleted nodes are frozen at.

    The loss is measured on half of the prompts, with a calibration fitted to the other half. Masks
    are learned on both. Held-out prompts are not here: nothing is ever chosen by them.
    """

    def __init__(self, model, fill, task, settings, nonsense=False, text=None):
        if settings.ablation == "resample" and text is None:
            raise sg.UserError("--ablation resample goes with --compare only: a circuit that is "
                               "saved stands on constants")
        self.model, self.fill, self.task, self.settings = model, fill, task, settings
        # What the values of deleted nodes are drawn from, where they are not constant.
        self.text = text if settings.ablation == "resample" else None
        self.pool = make_prompts(model, task, 2 * settings.search_pairs, settings.seed,
                                 nonsense=nonsense)
        n = len(self.pool.last)
        half = n // 4 * 2 or n  # whole pairs
        self.judged = self.pool.rows(np.arange(half))
        self.on, self.fit_on = (
            Compact(model, fill, prompts) if self.text is None else
            Resampled(model, fill, prompts, text, np.random.default_rng(settings.seed))
            for prompts in (self.judged, self.pool.rows(np.arange(n - half, n))))

    def frozen(self, prompts, rng):
        """What the deleted nodes of a run on some prompts are."""
        return self.fill if self.text is None else resampled(self.model, prompts, self.text, rng)

    def fit(self, cut):
        """The Calibration of a cut."""
        prompts = self.fit_on.prompts
        return calibrate(margins(self.fit_on.logits(cut), prompts), prompts.sign)

    def loss(self, cut, calibration=None):
        """The binary loss of a cut; without a calibration, with its own."""
        calibration = calibration or self.fit(cut)
        return logistic(calibration.margins(self.on.logits(cut), self.on.prompts))

    def size(self, cut):
        """(nodes, edges) of a cut."""
        return sizes(cut, self.on.model.params, self.model.cfg)


def shared_masks(cfg, tied=True):
    """The number of the mask of every node; with `tied`, a query channel shares its key's."""
    mask, at = np.arange(n_nodes(cfg)), node_slices(cfg)
    for i in range(cfg.n_layer if tied else 0):
        mask[at[f"h{i}.k"]] = mask[at[f"h{i}.q"]]
    return np.unique(mask, return_inverse=True)[1].reshape(-1)


def gradient(model, prompts, keep, fill, calibration=Calibration()):
    """(margins, the gradient of the mean binary loss by every node's mask) of prompts."""
    hook = Ablation(keep, fill, model.cfg)
    logits, cache = sg.forward(model.params, prompts.ids, model.cfg, hook, at=prompts.last)
    logits = sg.to_host(logits)
    slope = np.exp(-np.logaddexp(0, calibration.margins(logits, prompts)))  # how wrong each is
    slope, rows = calibration.scale * slope / len(slope), np.arange(len(slope))
    dlogits = np.zeros(logits.shape, model.cfg.dtype)
    dlogits[rows, prompts.right], dlogits[rows, prompts.wrong] = -slope, slope
    sg.backward(sg.xp.asarray(dlogits), cache, model.cfg)
    return margins(logits, prompts), sg.to_host(hook.grad).astype(np.float64)


def learn_masks(problem, k_coef, lr, temperature, seed, progress, aim=None):
    """Train a mask over nodes; returns (nodes from most to least needed, tau by node).

    A node is kept where its tau >= 0; the gradient goes through as that of a sigmoid (paper A.5).
    AdamW, gradient norm at most 1, rate falling to 0, tau held to [-1, 1]. Many end at 1: those are
    ranked by the running mean of what the loss would gain by losing them. k_coef, what a node
    costs, rises while the loss is under `aim` (the target by default) and falls while it is over:
    the right one differs ten times between tasks, and a wrong one gives circuits that are much too
    large or useless.
    """
    s, model = problem.settings, problem.model
    rng, mask = np.random.default_rng([s.seed, *seed]), shared_masks(model.cfg, s.tied)
    count = np.bincount(mask)
    tau = rng.normal(0.1, 0.01, len(count))
    m, v, use = np.zeros_like(tau), np.zeros_like(tau), np.zeros_like(tau)
    n_pairs = len(problem.pool.last) // 2
    smooth = aim = aim or s.target
    calibration, recent = Calibration(), deque(maxlen=8)  # fitted to what the last batches gave
    for step in range(s.steps):
        pick = 2 * rng.choice(n_pairs, min(s.pairs, n_pairs), replace=False)
        batch = problem.pool.rows(np.sort(np.concatenate([pick, pick + 1])))
        margin, by_node = gradient(model, batch, (tau >= 0)[mask],
                                   problem.frozen(batch, rng), calibration)
        loss = logistic(calibration.scale * margin + calibration.shift * batch.sign)
        recent.append((margin, batch.sign))
        if len(recent) == recent.maxlen and step % 4 == 0:
            calibration = calibrate(*map(np.concatenate, zip(*recent)))
        by_mask = np.bincount(mask, by_node)
        use = 0.95 * use - 0.05 * by_mask
        soft = 1 / (1 + np.exp(-tau / temperature))
        smooth = 0.9 * smooth + 0.1 * loss
        k_coef = max(1e-5, k_coef * math.exp(0.05 * (1 - min(2, smooth / aim))))
        g = (by_mask + k_coef * count) * soft * (1 - soft) / temperature
        g /= max(1, math.sqrt(g @ g))
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        step_size = m / (1 - 0.9 ** (step + 1)) / (np.sqrt(v / (1 - 0.95 ** (step + 1))) + 1e-8)
        tau = np.clip(tau - lr * (1 - step / s.steps) * (step_size + 1e-3 * tau), -1, 1)
        progress("learning masks", step + 1, s.steps,
                 f"loss {loss:.3f}, {count[tau >= 0].sum()} nodes, ")
    rank = np.empty(len(tau), np.int64)
    rank[np.lexsort((-use, -tau))] = np.arange(len(tau))
    return np.argsort(rank[mask], kind="stable"), tau[mask]


def rank_by_attribution(problem):
    """Nodes by how much the loss would rise without them, to first order: gradient x (activation -
    frozen value). The baseline that learned masks are compared with."""
    keep, rng = np.ones(n_nodes(problem.model.cfg), bool), np.random.default_rng(0)
    rise = sum(-gradient(problem.model, part, keep, problem.frozen(part, rng))[1] * len(part.last)
               for part in problem.pool.parts(16))
    return np.argsort(-rise, kind="stable")


def first(order, n):
    """The cut of the first n nodes of an order."""
    keep = np.zeros(len(order), bool)
    keep[order[:n]] = True
    return Cut(keep)


def bisect(order, good, guess=0):
    """The cut of the fewest first nodes of an order for which `good` holds, or None if it does not
    hold for all of them. Like every bisection it takes for granted that more nodes never hurt; as
    that is nearly true only, it looks at first at `guess` nodes, those of a learned mask, and goes
    up from there by doubling."""
    low, high, middle = -1, len(order), guess
    while high - low > 1:
        if good(first(order, middle)):
            high = middle
        else:
            low = middle
        middle = (low + high) // 2 if high < len(order) else min(2 * low + 1, high - 1)
    return first(order, high) if high < len(order) or good(first(order, high)) else None


def spare(cut, items, without, loss, target, progress, stage, alone=None):
    """The cut less every item that it can do without: none of those left can go alone.

    Items are tried in passes, the least needed first by the loss without each when it was last
    tried alone (kept in `alone`), in groups that double where the loss stays within the target and
    are halved where it does not. The last pass has tried every item that is left, and none could
    go.
    """
    alone = {} if alone is None else alone
    left = items(cut)
    new = [item for item in left if item not in alone]
    for i, item in enumerate(new):
        alone[item] = loss(without(cut, [item]))
        progress(stage, i + 1, len(new))
    left.sort(key=alone.get)
    if len(new) == len(left):  # those that have just failed alone can wait for the next pass
        left = [item for item in left if alone[item] <= target]
    while left:
        i, size, taken = 0, 1, False
        while i < len(left):
            group = left[i:i + size]
            value = loss(trial := without(cut, group))
            if value <= target:
                cut, taken, i, size = trial, True, i + len(group), 2 * size
            elif len(group) > 1:
                size = len(group) // 2
            else:
                alone[group[0]], i = value, i + 1
            progress(stage, i, len(left))
        left = sorted(items(cut), key=alone.get) if taken else []
    return cut


def orphans(cut, model, prompts):
    """The kept nodes without a path of edges from a token of the prompts, or without one to the
    logits. Between blocks a path follows a channel of the residual stream; a head's query and key
    channels lead to its values."""
    cfg, at = model.cfg, node_slices(model.cfg)
    edges, D = kept_edges(cut, model.params, cfg), cfg.d_head
    wte = sg.to_host(model.params["wte"])[np.unique(prompts.ids)]
    live = (wte != 0).any(0)
    if cfg.positions == "learned":
        live |= (sg.to_host(model.params["wpe"]) != 0).any(0)
    fed, order = np.zeros_like(cut.keep), [m for m in matrices(cfg)]
    for name in order:  # forward: what can depend on a token
        m = matrices(cfg)[name]
        if not name.endswith(("wo", "wproj")):
            fed[m.source] = live
        fed[m.target] |= (edges[name] & fed[m.source][:, None]).any(0)
        if name.endswith(("wo", "wproj")):  # a writer; what is not kept is not read either
            live = live | fed[m.target]
    fed[at["final"]] = live
    used = np.zeros_like(cut.keep)
    used[at["final"]] = (sg.to_host(model.params["head.w"]) != 0).any(1)
    live = used[at["final"]] & cut.keep[at["final"]]
    for name in reversed(order):
        m = matrices(cfg)[name]
        if name.endswith(("wo", "wproj")):
            used[m.target] = live
        used[m.source] |= (edges[name] & used[m.target]).any(1)
        if name.endswith("wo"):
            h = name.split(".")[0]
            heads = (used[at[f"{h}.v"]] & cut.keep[at[f"{h}.v"]]).reshape(-1, D).any(1)
            used[at[f"{h}.q"]] = used[at[f"{h}.k"]] = np.repeat(heads, D)
        elif not name.endswith("wproj"):  # a reader of the residual stream
            live = live | (used[m.source] & cut.keep[m.source])
    return np.flatnonzero(cut.keep & ~(fed & used))


class Found(NamedTuple):
    """What a search ends with. cut: None if no ranking reached the target. stages: the size and the
    loss after each; trials: of each mask training; tau: by node."""
    cut: Cut | None
    calibration: Calibration
    loss: float
    stages: list
    trials: list
    tau: np.ndarray


def aim_below(target, full):
    """The loss to train masks to for a target, by the full model's. A mask that is learned at the
    target itself ends over it about half of the time. Where the full model is hardly better than
    the target, the aim is between the two. A control, whose full model is over the target, aims no
    higher than the task that it is a control of."""
    return max(0.9 * target, (target + full) / 2) if full < target else 0.9 * target


def search(problem, progress, seed=0):
    """Find a small circuit: learn masks, take the fewest nodes by rank, clean nodes and edges.

    The runs differ in hyperparameters and seed; the one with the fewest edges at the target is
    cleaned. Same settings and seed, same circuit.
    """
    s, best, best_loss = problem.settings, None, math.inf
    stages, trials = [], []

    def stage(name, cut, calibration):
        nodes, edges = problem.size(cut)
        stages.append(dict(stage=name, nodes=nodes, edges=edges,
                           loss=problem.loss(cut, calibration)))

    aim, i, short = aim_below(s.target, full_loss(problem)), 0, False
    while i < s.runs or (short and i == s.runs):
        k_coef, lr, temperature = TRIALS[i % len(TRIALS)]
        order, tau = learn_masks(problem, k_coef, lr, temperature, [seed, i], progress, aim)
        learned, i = Cut(tau >= 0), i + 1
        cut = bisect(order, lambda c: problem.loss(c) <= s.target, int(learned.keep.sum()))
        trials.append(dict(k_coef=k_coef, lr=lr, temperature=temperature,
                           learned=problem.size(learned), loss=problem.loss(learned),
                           bisected=cut and problem.size(cut)))
        best_loss = min(best_loss, trials[-1]["loss"])
        short = s.target < trials[-1]["loss"] < 2 * s.target and (
            cut is None or cut.keep.sum() > 2 * learned.keep.sum())
        aim /= 1 + short  # these masks fell just short, and their ranking needs far too many nodes
        if cut is not None and (best is None or trials[-1]["bisected"][::-1] < best[0][::-1]):
            best = trials[-1]["bisected"], cut, learned, tau
    if best is None:
        return Found(None, Calibration(), best_loss, stages, trials, tau)
    _, cut, learned, tau = best
    stage("learned masks", learned, None)
    stage("fewest by rank", cut, None)
    return Found(*clean(problem, cut, stage, progress), stages, trials, tau)


def curve(problem, progress):
    """[(target, cut, (nodes, edges))], targets rising: the smallest cut by rank at each target of
    SWEEP; every nonzero weight between its nodes counts (the paper's rule). Masks are trained for
    each of AIMS, and a target takes the best of their rankings. Targets under the full model's own
    loss are skipped: they would take all of it and a calibration. One aim under it is trained for,
    for the sake of targets just above it, which masks that aim at them may not reach."""
    least, rankings = full_loss(problem), []
    for i, aim in enumerate(AIMS[:1 + sum(aim > least for aim in AIMS)]):
        order, tau = learn_masks(problem, *TRIALS[0], [problem.settings.seed, i], progress,
                                 aim_below(aim, least))
        loss = functools.cache(lambda n, order=order: problem.loss(first(order, n)))
        rankings.append((order, int((tau >= 0).sum()), loss))
    out, best = [], (math.inf, math.inf, None)  # edges, nodes, cut
    for target in sorted(target for target in SWEEP if target >= least):
        for order, learned, loss in rankings:
            cut = bisect(order, lambda c: loss(int(c.keep.sum())) <= target, learned)
            if cut is not None:  # what reaches a lower target reaches this one
                best = min(best, (*problem.size(cut)[::-1], cut), key=lambda found: found[:2])
        if best[2] is not None:
            out.append((target, best[2], best[1::-1]))
    return out


def clean(problem, cut, stage, progress):
    """(cut, calibration, loss) less every node and every edge that can go alone, one after
    another, until none can, and the orphans if the loss allows. A circuit of over TOO_LARGE edges
    stays as it is."""
    model, target = problem.model, problem.settings.target
    calibration = problem.fit(cut)
    if problem.size(cut)[1] > TOO_LARGE:
        stage("not cleaned: too large", cut, calibration)
        return cut, calibration, problem.loss(cut, calibration)

    def loss(trial):
        return problem.loss(trial, calibration)

    def nodes(c):
        return np.flatnonzero(c.keep).tolist()

    def nodes_and_edges(c):
        return nodes(c) + edge_list(kept_edges(c, model.params, model.cfg))

    cut = spare(cut, nodes, Cut.without, loss, target, progress, "cleaning nodes")
    stage("nodes cleaned", cut, calibration)
    cut, alone = cut._replace(edges=kept_edges(cut, model.params, model.cfg)), {}
    while True:
        before = problem.size(cut)
        cut = spare(cut, nodes_and_edges, Cut.without, loss, target, progress, "cleaning edges",
                    alone)
        lost = orphans(cut, model, problem.pool)
        if len(lost) and loss(cut.without(lost)) <= target:
            cut = cut.without(lost)
        if problem.size(cut) == before:
            stage("edges cleaned", cut, calibration)
            return cut, calibration, loss(cut)
        again = problem.fit(cut)  # a calibration that fits what is left may free some more
        if problem.loss(cut, again) <= loss(cut):
            calibration = again


# ---- studies: what every task of a model shares -------------------------------------------------

def fingerprint(model):
    """16 hex digits that name a model: of its parameters, merges and shape."""
    config = {**dataclasses.asdict(model.cfg), "threads": 0, "out": ""}
    digest = hashlib.sha256(json.dumps([config, model.tok.merges]).encode())
    for name in sg.shapes(model.cfg):
        digest.update(sg.to_host(model.params[name]).tobytes())
    return digest.hexdigest()[:16]


def shuffled(model, seed=0):
    """The model with the nonzero weights of every matrix dealt out anew among their places: the
    control of the same shape and the same numbers that has learned nothing."""
    rng, params = np.random.default_rng(seed), dict(model.params)
    for name, w in params.items():
        if sg.is_matrix(name):
            w = sg.to_host(w).copy()
            w[w != 0] = rng.permutation(w[w != 0])
            params[name] = sg.xp.asarray(w)
    return model._replace(params=params)


class Study:
    """A model, windows of its training text, and what its deleted nodes are frozen at."""

    def __init__(self, model, ablation="mean", windows=64):
        self.model, self.ablation = model, ablation
        self.text = text_windows(model, windows)
        self.fingerprint = fingerprint(model)
        self.fill = self.constants(model)

    @functools.cached_property
    def shuffled(self):
        """The model with its weights shuffled."""
        return shuffled(self.model)

    @functools.cached_property
    def shuffled_fill(self):
        """What its deleted nodes are frozen at."""
        return self.constants(self.shuffled)

    def constants(self, model):
        """The values by node that deleted nodes are frozen at."""
        if self.ablation == "zero":
            return np.zeros(n_nodes(model.cfg), model.cfg.dtype)
        return mean_activations(model, self.text)


@dataclass
class Circuit:
    """A task's circuit and all that is known of it. `record` is what is saved beside the cut: see
    `describe`."""
    task: str
    settings: Settings
    cut: Cut
    calibration: Calibration
    fill: np.ndarray
    record: dict


def full_loss(problem):
    """The uncalibrated binary loss of the full model on the prompts that circuits are judged by."""
    every = Cut(np.ones(n_nodes(problem.model.cfg), bool))
    return problem.loss(every, Calibration())


def on_cores(fn, items, workers):
    """fn(item) of every item as they are done, in `workers` processes.

    Processes, not threads: the arrays are so small that the interpreter's lock would leave a second
    thread nearly nothing to do. One worker, and a GPU, stay in this process.
    """
    if workers == 1 or len(items) < 2 or sg.xp is not np:
        yield from map(fn, items)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main_thread else None
    try:  # Ctrl-C is for the main process: the others ignore it from their start
        pool = context.Pool(min(workers, len(items)), start_worker)
    finally:
        if main_thread:
            signal.signal(signal.SIGINT, before)
    with pool:  # its end stops all of them, in the middle of their work if need be
        yield from pool.imap_unordered(fn, items)
        # Done, they end by themselves: a signal that comes just before a worker waits is not heard.
        pool.close()
        pool.join()


def start_worker():
    """What a worker process does first."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that it removes its temporary file
    sg.set_blas_threads(1)


def run_search(name, log, job):
    """(job's name, Found) of a job (name, Problem, seed of the masks)."""
    key, problem, seed = job
    return key, search(problem, Progress(name + (f", {key}" if key != "circuit" else ""), log),
                       seed)


def prune(model, task, settings=Settings(), study=None, seeds=2, log=print, workers=1):
    """The Circuit of a task, with its checks (paper 2.2, A.5; method in the docstring above).

    study: shared by the tasks of a model. seeds: searches from different masks, the first of which
    is reported and the others compared with it. workers: processes for the independent searches;
    the result is the same. Raises CannotPrune if the model cannot do the task or no circuit reaches
    the target, UserError on an unknown task.
    """
    study = study or Study(model, settings.ablation)
    problem = Problem(model, study.fill, task, settings)
    if (full := full_loss(problem)) > settings.target:
        raise CannotPrune(f"the full model's loss on {task} is {full:.3f}, over the target of "
                          f"{settings.target:g}")
    jobs = [("circuit", problem, 0),
            ("nonsense", Problem(model, study.fill, task, settings, nonsense=True), 0),
            ("shuffled", Problem(study.shuffled, study.shuffled_fill, task, settings), 0)]
    jobs += [(f"seed {i}", problem, i) for i in range(1, seeds)]
    found = dict(on_cores(functools.partial(run_search, task, log), jobs, workers))
    if found["circuit"].cut is None:
        raise CannotPrune(f"no circuit of {task} reached the target of {settings.target:g}; the "
                          f"best mask reached {found['circuit'].loss:.3f}")
    return describe(study, problem, found)


# ---- checks -------------------------------------------------------------------------------------

def check(name, passed, text, **numbers):
    """One check of a circuit: passed is True, False, or None where it does not apply."""
    return dict(name=name, passed=None if passed is None else bool(passed), text=text,
                **{k: None if v is None else float(v) for k, v in numbers.items()})


def random_like(keep, rng, cfg):
    """A random mask with as many nodes at every place as another has."""
    out = np.zeros_like(keep)
    for part in node_slices(cfg).values():
        out[part] = rng.permutation(keep[part])
    return out


def spread(values):
    """Lowest to highest, as text."""
    return f"{min(values):.3f} to {max(values):.3f}"


def check_necessity(problem, cut, draws=10):
    """Only the circuit's nodes ablated, beside as many random nodes at the same places."""
    cfg, rng, plain = problem.model.cfg, np.random.default_rng(0), Calibration()
    loss = problem.loss(Cut(~cut.keep), plain)
    other = sorted(problem.loss(Cut(~random_like(cut.keep, rng, cfg)), plain)
                   for _ in range(draws))
    return check("necessity", loss > max(0.35, other[-2]), f"the full model without the circuit's "
                 f"{cut.keep.sum()} nodes: loss {loss:.3f}; without as many random ones at the "
                 f"same places, {draws} draws: {spread(other)} (passes over 0.35, half a coin "
                 "toss, and over nine of the ten)", loss=loss, random=other[-2],
                 median=np.median(other))


def check_random(problem, cut, draws=10):
    """Random circuits with as many nodes at every place, all their edges, calibrated."""
    rng = np.random.default_rng(1)
    losses = [problem.loss(Cut(random_like(cut.keep, rng, problem.model.cfg)))
              for _ in range(draws)]
    return check("random circuits", min(losses) > problem.settings.target,
                 f"{draws} circuits of random nodes, as many at every place: loss "
                 f"{spread(losses)}", loss=min(losses))


def check_resampled(problem, cut, calibration, text, draws=4):
    """Deleted nodes take the values that they have on other inputs."""
    rng, losses = np.random.default_rng(2), []
    for _ in range(draws):
        on = Resampled(problem.model, problem.fill, problem.on.prompts, text, rng)
        losses.append(logistic(calibration.margins(on.logits(cut), on.prompts)))
    limit, loss = 2 * problem.settings.target, float(np.mean(losses))
    return check("resampled ablation", loss <= limit, f"deleted nodes at their values on random "
                 f"training text: loss {loss:.3f}, {draws} draws {spread(losses)} (passes up to "
                 f"{limit:.2f}, twice the target)", loss=loss)


def check_control(name, found, size, target):
    """A search that should find nothing as small as the circuit did."""
    if found.cut is None:
        return check(name, True, f"the same search reached a loss of {found.loss:.3f} at best, "
                     f"never the target of {target:g}", loss=found.loss, edges=None, nodes=None)
    last = found.stages[-1]
    return check(name, last["edges"] > 2 * size[1], f"the same search found {last['nodes']} nodes "
                 f"and {last['edges']} edges, the circuit has {size[0]} and {size[1]} (passes over "
                 "twice its edges)", loss=found.loss, edges=last["edges"], nodes=last["nodes"])


def check_seeds(found, cut, model):
    """How much the circuits of other mask seeds share with the first."""
    others = [f for job, f in found.items() if job.startswith("seed")]
    if not others:
        return check("other seeds", None, "not run (--seeds 1)")
    nodes, notes = [], []
    for f in others:
        if f.cut is None:
            notes.append("one found none")
            continue
        nodes.append((f.cut.keep & cut.keep).sum() / max(1, (f.cut.keep | cut.keep).sum()))
        notes.append(f"{f.stages[-1]['nodes']} nodes, {f.stages[-1]['edges']} edges, "
                     f"{nodes[-1]:.0%} of both circuits' nodes shared")
    return check("other seeds", bool(nodes) and min(nodes) >= 0.5, "; ".join(notes)
                 + " (passes from 50%)", overlap=min(nodes, default=0.0))


def attention_weights(q, k, sink, table, B, d_head):
    """Causal softmax of query and key nodes: [B, H, T, T + 1], the sink's share last. q, k:
    [B*T, C] on the host; sink [H] and table [H, n_ctx] or None, as in `sparsegpt.attention`."""
    q, k = (sg.split_heads(x.astype(np.float64), B, d_head) for x in (q, k))
    logits = q @ k.swapaxes(2, 3) / math.sqrt(d_head)
    if table is not None:
        logits += sg.to_host(sg.distance_logits(table, logits.shape[2]))
    logits += np.triu(np.full(logits.shape[-2:], -np.inf), 1)
    last = np.full_like(logits[..., :1], -np.inf)
    if sink is not None:
        last[...] = sg.to_host(sink)[:, None, None]
    logits = np.concatenate([logits, last], axis=3)
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def heads_of(cut, cfg):
    """[(block, head)] of the heads with a kept query, key or value."""
    at, out = node_slices(cfg), []
    for i in range(cfg.n_layer):
        kept = sum(cut.keep[at[f"h{i}.{x}"]].astype(int) for x in "qkv").reshape(-1, cfg.d_head)
        out += [(i, int(head)) for head in np.flatnonzero(kept.sum(1))]
    return out


def patterns(model, params, hook, ids, heads):
    """{(block, head): attention weights [B, T, T + 1]} of a run."""
    cfg, record = model.cfg, Recorder(hook)
    sg.forward(params, ids, cfg, record)
    out = {}
    for i in {i for i, _ in heads}:
        q, k = (sg.to_host(record.seen[f"h{i}.{x}"]) for x in "qk")
        weights = attention_weights(q, k, params.get(f"h{i}.attn.sink"),
                                    params.get(f"h{i}.attn.distance"), len(ids), cfg.d_head)
        out |= {(i, head): weights[:, head] for block, head in heads if block == i}
    return out


def check_attention(problem, cut, heads):
    """How much of its attention each head of the circuit puts where it does in the full model."""
    if not heads:
        return check("attention", None, "the circuit has no attention head"), {}
    whole = Whole(problem.model, problem.fill, problem.on.prompts)
    params, cfg, shared = whole.params(cut), problem.model.cfg, defaultdict(list)
    for part in whole.parts:
        hook = Ablation(cut.keep, problem.fill, cfg)
        full = patterns(problem.model, problem.model.params, None, part.ids, heads)
        cut_down = patterns(problem.model, params, hook, part.ids, heads)
        real = np.arange(part.ids.shape[1]) <= part.last[:, None]
        for head in heads:
            shared[head].append(np.minimum(full[head], cut_down[head]).sum(-1)[real])
    overlap = {head: float(np.concatenate(x).mean()) for head, x in shared.items()}
    text = ", ".join(f"h{i}.head.{head} {x:.0%}" for (i, head), x in overlap.items())
    return check("attention", min(overlap.values()) >= 0.8, "shared with the full model's pattern: "
                 f"{text} (passes from 80% each)", overlap=min(overlap.values())), overlap


# ---- what a person reads ------------------------------------------------------------------------

def one_line(text):
    """Text on one line, with its spaces and newlines to be seen."""
    return json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"').replace("\\n", "⏎")


def token(model, i):
    """A token as text on one line."""
    return "<start>" if i == model.tok.EOT else one_line(model.tok.decode([int(i)]))


def extremes(model, values, ids, n=4):
    """{"high": [[text before, token, value]], "low": ...}: where values [B, T] (nan: not looked at)
    are largest and smallest, each token once."""
    flat, out = values.reshape(-1), {}
    for side, way in (("high", -1), ("low", 1)):
        rows, seen = [], set()
        for at in np.argsort(way * flat, kind="stable"):  # nan comes last
            b, t = divmod(int(at), ids.shape[1])
            if len(rows) == n or np.isnan(flat[at]):
                break
            if ids[b, t] not in seen:
                seen.add(ids[b, t])
                before = "".join(token(model, i) for i in ids[b, max(0, t - 6):t])
                rows.append([before[-24:], token(model, ids[b, t]), round(float(flat[at]), 4)])
        out[side] = rows
    return out


def node_readings(study, problem, nodes):
    """{node: {"task": extremes, "text": extremes}}: where nodes fire in the full model."""
    model, pool, out = study.model, problem.pool, {n: {} for n in nodes}
    real = np.arange(pool.ids.shape[1]) <= pool.last[:, None]
    for kind, ids, valid in (("task", pool.ids, real),
                             ("text", study.text, np.ones(study.text.shape, bool))):
        values = {n: [] for n in nodes}
        for i in range(0, len(ids), 4):  # few at a time, to keep memory small
            record = Recorder()
            sg.forward(model.params, ids[i:i + 4], model.cfg, record)
            for n in nodes:
                place, _, channel = node_name(n, model.cfg).rpartition(".")
                values[n].append(sg.to_host(record.seen[place][:, int(channel)]))
        for n in nodes:
            all_of = np.concatenate(values[n]).reshape(ids.shape)
            out[n][kind] = extremes(model, np.where(valid, all_of, np.nan), ids)
    return out


def walk(model, circuit_cut, calibration, fill, pair):
    """What a circuit does with one pair of prompts (Prompts of two rows): {"prompts", "answers",
    "margins", "values": {node: [activation by token, of each prompt]}}."""
    cfg, at, whole = model.cfg, node_slices(model.cfg), Whole(model, fill, pair)
    record = Recorder(Ablation(circuit_cut.keep, fill, cfg))
    logits = sg.to_host(sg.forward(whole.params(circuit_cut), pair.ids, cfg, record)[0])
    decided = logits[np.arange(len(pair.last)), pair.last]
    ends, values = pair.last + 1, {}
    for place, part in at.items():
        seen = sg.to_host(record.seen[place]).reshape(*pair.ids.shape, -1)
        for channel in np.flatnonzero(circuit_cut.keep[part]):
            values[f"{place}.{channel}"] = [[round(float(x), 3) for x in seen[b, :end, channel]]
                                            for b, end in enumerate(ends)]
    return dict(prompts=[[token(model, i) for i in ids[:end]] for ids, end in zip(pair.ids, ends)],
                answers=[token(model, i) for i in pair.right],
                margins=[round(float(x), 3) for x in calibration.margins(decided, pair)],
                values=values)


def losses(problem, cut, calibration):
    """{"full" | "circuit" | "uncalibrated": {"search" | "held": sparsegpt.Score as a dict}}: every
    printed loss, by the plain forward pass, on the prompts that the circuit was judged by and on
    held-out ones."""
    model, s = problem.model, problem.settings
    held = make_prompts(model, problem.task, s.search_pairs, s.seed, "held")
    every, out = Cut(np.ones(n_nodes(model.cfg), bool)), defaultdict(dict)
    for split, prompts in (("search", problem.judged), ("held", held)):
        whole = Whole(model, problem.fill, prompts)
        for name, which, how in (("full", every, Calibration()), ("circuit", cut, calibration),
                                 ("uncalibrated", cut, Calibration())):
            logits = how.logits(whole.logits(which), whole.prompts)
            out[name][split] = sg.score(logits, whole.prompts)._asdict()
    return dict(out)


def task_tokens(prompts):
    """(tokens that tell a pair's prompts apart, answer tokens), sorted: those that one prompt has
    more often than its partner."""
    cues = set()
    for a, b, end_a, end_b in zip(prompts.ids[::2], prompts.ids[1::2], prompts.last[::2],
                                  prompts.last[1::2]):
        counts = (np.bincount(x[:end + 1], minlength=1 << 16) for x, end in
                  ((a, end_a), (b, end_b)))
        cues |= set(np.flatnonzero(np.subtract(*counts)).tolist())
    return sorted(cues), sorted({*prompts.right.tolist(), *prompts.wrong.tolist()})


def describe(study, problem, found):
    """The Circuit of a finished search, with everything that is printed and drawn of it."""
    model, cfg, settings, fill = study.model, study.model.cfg, problem.settings, problem.fill
    best, at, params = found["circuit"], node_slices(cfg), study.model.params
    cut, calibration = best.cut._replace(edges=kept_edges(best.cut, params, cfg)), best.calibration
    size, every = problem.size(cut), Cut(np.ones(n_nodes(cfg), bool))
    kept = [int(n) for n in np.flatnonzero(cut.keep)]
    names = {n: node_name(n, cfg) for n in kept}
    readings, bias = node_readings(study, problem, kept), effective_bias(model, cut, fill)
    nodes = [dict(name=names[n], tau=round(float(best.tau[n]), 4), mean=float(fill[n]),
                  bias=bias.get(n), **readings[n]) for n in kept]
    edges = []
    for name, i, j in edge_list(cut.edges):
        m = matrices(cfg)[name]
        edges.append({"from": names[m.source.start + i], "to": names[m.target.start + j],
                      "weight": float(params[name][i, j])})
    edges.sort(key=lambda e: (node_number(e["to"], cfg), node_number(e["from"], cfg)))
    writers, residual, embed = defaultdict(list), [], []
    cues, answers = task_tokens(problem.pool)
    for n in kept:
        place, _, channel = names[n].rpartition(".")
        kind = place.split(".")[-1]
        if kind in ("attn_out", "mlp_out"):
            writers[channel].append(names[n])
        elif kind in ("attn_in", "mlp_in", "final"):
            residual += [{"from": writer, "to": names[n]} for writer in writers[channel]]
            embed += [{"token": token(model, i), "to": names[n],
                       "weight": float(params["wte"][i, int(channel)])}
                      for i in cues if params["wte"][i, int(channel)] != 0]
    unembed = [{"from": names[n], "token": token(model, i),
                "weight": float(params["head.w"][n - at["final"].start, i])}
               for n in kept if n >= at["final"].start for i in answers
               if params["head.w"][n - at["final"].start, i] != 0]
    pairs = problem.pool.last.reshape(-1, 2).max(1)
    pair = problem.pool.rows(2 * int(np.argmin(pairs)) + np.arange(2))
    heads = heads_of(cut, cfg)
    attention, overlap = check_attention(problem, cut, heads)
    order = bisect(rank_by_attribution(problem), lambda c: problem.loss(c) <= settings.target)
    record = dict(
        doc=tasks.TASKS[problem.task].__doc__.splitlines()[0],
        model=dict(path=cfg.out, fingerprint=study.fingerprint, config=dataclasses.asdict(cfg)),
        nodes=nodes, edges=edges, residual=residual, embed=embed, unembed=unembed,
        heads=head_readings(model, cut, fill, pair, heads, overlap),
        losses=losses(problem, cut, calibration),
        stages=best.stages, trials=best.trials,
        attribution=dict(zip(("nodes", "edges"), problem.size(order or every))),
        size=dict(nodes=size[0], edges=size[1], embed=len(embed), unembed=len(unembed),
                  **dict(zip(("model_nodes", "model_edges"), problem.size(every)))),
        checks=[check_necessity(problem, cut), check_random(problem, cut),
                check_resampled(problem, cut, calibration, study.text),
                check_control("nonsense task", found["nonsense"], size, settings.target),
                check_control("shuffled weights", found["shuffled"], size, settings.target),
                attention, check_seeds(found, cut, model)],
        example=walk(model, cut, calibration, fill, pair),
        seeds=1 + sum(job.startswith("seed") for job in found))
    held = record["losses"]["circuit"]["held"]["binary"]
    record["checks"].insert(0, check(
        "held-out prompts", held <= 2 * settings.target, f"other words, larger shapes: loss "
        f"{held:.3f}, the full model {record['losses']['full']['held']['binary']:.3f} (passes up "
        f"to {2 * settings.target:.2f}, twice the target)", loss=held))
    return Circuit(problem.task, settings, cut, calibration, fill, record)


def effective_bias(model, cut, fill):
    """{node: its bias with all that is frozen before it}, of the kept nodes that have one."""
    out, cfg = {}, model.cfg
    for name, m in matrices(cfg).items():
        w, b = (sg.to_host(model.params[x]).astype(np.float64) for x in (name, m.bias))
        total = b + fill[m.source] @ np.where(cut.edges[name], 0, w)
        out |= {m.target.start + int(j): float(total[j])
                for j in np.flatnonzero(cut.keep[m.target])}
    return out


def head_readings(model, cut, fill, pair, heads, overlap):
    """What the heads of a circuit attend to from the deciding positions of a pair of prompts."""
    cfg, out = model.cfg, []
    whole, hook = Whole(model, fill, pair), Ablation(cut.keep, fill, cfg)
    weights = patterns(model, whole.params(cut), hook, pair.ids, heads) if heads else {}
    for i, head in heads:
        span = range(head * cfg.d_head, (head + 1) * cfg.d_head)
        names = [f"h{i}.{x}.{c}" for x in "qkv" for c in span
                 if cut.keep[node_slices(cfg)[f"h{i}.{x}"].start + c]]
        attends = []
        for row, (ids, last) in enumerate(zip(pair.ids, pair.last)):
            w = weights[i, head][row, last]
            shown = [token(model, t) for t in ids[:last + 1]]
            to = [["sink" if t == len(w) - 1 else shown[t], round(float(w[t]), 3)]
                  for t in np.argsort(-w, kind="stable")[:4] if w[t] >= 0.01]
            attends.append(dict(context="".join(shown[1:]), at=shown[-1], to=to))
        sink, table = (model.params.get(f"h{i}.attn.{x}") for x in ("sink", "distance"))
        far = np.zeros(0) if table is None else sg.to_host(table[head])[:pair.ids.shape[1]]
        out.append(dict(name=f"h{i}.head.{head}", nodes=names, attends=attends,
                        sink=None if sink is None else float(sink[head]),
                        distances=[[int(d), float(far[d])] for d in np.argsort(-far)[:3]],
                        overlap=overlap[i, head]))
    return out


def listing(circuit):
    """A circuit as lines of text: sizes, losses, connections in the order of computation,
    checks."""
    r, lines = circuit.record, []
    add, size = lines.append, r["size"]
    add(f"{circuit.task}: {r['doc']}")
    add(f"\n{'':<24} {'nodes':>7} {'edges':>8} {'loss':>8}")
    add(f"{'full model':<24} {size['model_nodes']:>7,} {size['model_edges']:>8,} "
        f"{r['losses']['full']['search']['binary']:8.4f}")
    for s in r["stages"]:
        add(f"{s['stage']:<24} {s['nodes']:>7,} {s['edges']:>8,} {s['loss']:8.4f}")
    add(f"{'by attribution instead':<24} {r['attribution']['nodes']:>7,} "
        f"{r['attribution']['edges']:>8,}          (fewest by rank at the same target)")
    add(f"edges: nonzero weights between two kept nodes, no biases. Apart from them "
        f"{size['embed']} embedding entries of tokens\nthat tell the prompts apart and "
        f"{size['unembed']} unembedding entries of answers, at the kept channels")
    add(f"\n{'loss, in nats':<24} {'search prompts':^26}   {'held-out prompts':^26}")
    add(f"{'':<24}" + f" {'binary':>8} {'full':>8} {'right':>8}  " * 2)
    for name, text in (("full", "full model"), ("circuit", "circuit"),
                       ("uncalibrated", "circuit, uncalibrated")):
        add(f"{text:<24}" + "".join(f" {s['binary']:8.4f} {s['full']:8.4f} {s['accuracy']:8.1%}  "
                                    for s in r["losses"][name].values()))
    c = circuit.calibration
    add(f"calibration: logits x {c.scale:.3f} (held to 1/2 to 2), first answer {c.shift:+.3f}, "
        f"fitted on other prompts.\nThe target, {circuit.settings.target:g}, holds for the binary "
        "loss of the calibrated circuit on the search prompts")
    into, tokens_in, tokens_out = defaultdict(list), defaultdict(list), defaultdict(list)
    for e in r["edges"]:
        into[e["to"]].append((e["from"], e["weight"]))
    for e in r["embed"]:
        tokens_in[e["to"]].append((e["weight"], e["token"]))
    for e in r["unembed"]:
        tokens_out[e["from"]].append((e["weight"], e["token"]))
    for e in r["residual"]:
        into[e["to"]].append((e["from"], None))
    add("\nthe circuit, in the order of computation; <- is an edge with its weight, == the same "
        "channel of the residual stream")
    heads = {name: h for h in r["heads"] for name in h["nodes"]}
    said = set()
    for node in r["nodes"]:
        name = node["name"]
        if (head := heads.get(name)) and head["name"] not in said:
            said.add(head["name"])
            sink = "none" if head["sink"] is None else f"{head['sink']:+.2f}"
            add(f"\n{head['name']}  sink {sink}, " + "".join(
                f"{d} back {x:+.2f}, " for d, x in head["distances"])
                + f"pattern {head['overlap']:.0%} that of the full model")
            for a in head["attends"]:
                add(f"    at the end of {a['context']}  attends to "
                    + ", ".join(f"{t} {w:.2f}" for t, w in a["to"]))
        add(f"\n{name}" + (f"  bias {node['bias']:+.3f}" if node["bias"] is not None else "")
            + f"  mean {node['mean']:+.3f}")
        if rows := sorted(tokens_in[name], key=lambda x: -abs(x[0])):
            add("    <- tokens " + "  ".join(f"{t} {w:+.2f}" for w, t in rows[:8])
                + (f"  and {len(rows) - 8} more" if len(rows) > 8 else ""))
        for source, weight in into[name]:
            add(f"    == {source}" if weight is None else f"    <- {source}  {weight:+.3f}")
        for kind in ("task", "text"):
            for side in ("high", "low"):
                add(f"    {kind} {side:<5}" + "   ".join(
                    f"{before}[{t}] {v:+.2f}" for before, t, v in node[kind][side][:3]))
        if tokens_out[name]:
            add("    -> answers " + "  ".join(f"{t} {w:+.2f}" for w, t in
                                              sorted(tokens_out[name], reverse=True)))
    add("\nchecks")
    for c in r["checks"]:
        mark = {True: "passed", False: "FAILED", None: "-"}[c["passed"]]
        add(f"    {mark:<7} {c['name']}: {c['text']}")
    return "\n".join(lines)


def explain(example):
    """One pair of prompts through a circuit, as text: activations at each node on each token."""
    lines, names = [], list(example["values"])
    for start in range(0, len(names), 7):
        some = names[start:start + 7]
        for p, tokens in enumerate(example["prompts"]):
            lines.append(f"\nprompt {p + 1}, right answer {example['answers'][p]}, calibrated "
                         f"margin {example['margins'][p]:+.3f}")
            lines.append(f"{'':<14}" + "".join(f"{name:>16}" for name in some))
            for t, text in enumerate(tokens):
                lines.append(f"{text:<14}" + "".join(f"{example['values'][name][p][t]:>16.3f}"
                                                     for name in some))
    return "\n".join(lines)


def ask(circuit, model, texts):
    """Lines of text: what the full model and a circuit of it make of prompts of one's own, between
    the answers of the task's first pair. Raises UserError on a prompt that is of no use."""
    answers = tasks.pairs(circuit.task, 1, circuit.settings.seed)[0].answers
    lines = [f"first answer {answers[0]!r}, second {answers[1]!r}; first over second, logits:"]
    every = Cut(np.ones_like(circuit.cut.keep))
    for text in texts:
        try:
            ids, right, wrong = sg.deciding_tokens(model.tok, text, *answers)
            if len(ids) > model.cfg.n_ctx:
                raise ValueError(f"it has {len(ids)} tokens, over the context of {model.cfg.n_ctx}")
        except ValueError as e:
            raise sg.UserError(f"--ask {text!r}: {e}") from e
        one = Prompts(*(np.array([x]) for x in (ids, len(ids) - 1, right, wrong, 1)))
        whole = Whole(model, circuit.fill, one)
        full, own = (how.margins(whole.logits(cut), one)[0] for cut, how in (
            (every, Calibration()), (circuit.cut, circuit.calibration)))
        lines.append(f"full model {full:+8.3f}  circuit {own:+8.3f}  {text!r}")
    return lines


class Set:
    """A hook that sets nodes: {node number: value}."""

    def __init__(self, values, cfg):
        self.values, self.at = values, node_slices(cfg)

    def forward(self, place, x, k):
        part, x = self.at[place], sg.abstopk(x, k)[0].copy()
        for node, value in self.values.items():
            if part.start <= node < part.stop:
                x[:, node - part.start] = value
        return x


def intervene(model, task, values, settings):
    """Lines of text: the full model on a task, as it is and with nodes set by hand."""
    prompts = make_prompts(model, task, settings.search_pairs, settings.seed)
    lines = [f"the full model on {len(prompts.last)} prompts of {task}",
             f"{'':<16} {'binary':>8} {'right':>7} {'of first answers':>17} {'of second':>10} "
             f"{'first over second, logits after each':>37}"]
    for name, hook in (("as it is", None), ("changed", Set(values, model.cfg))):
        parts = prompts.parts()
        margin = np.concatenate([margins(sg.to_host(sg.forward(
            model.params, p.ids, model.cfg, hook, at=p.last)[0]), p) for p in parts])
        sign = np.concatenate([p.sign for p in parts])
        one, two = margin[sign > 0], margin[sign < 0]
        lines.append(f"{name:<16} {logistic(margin):8.4f} {(margin > 0).mean():7.1%} "
                     f"{(one > 0).mean():17.1%} {(two > 0).mean():10.1%} "
                     f"{one.mean():+25.3f} {-two.mean():+11.3f}")
    return lines


# ---- files --------------------------------------------------------------------------------------

def save(path, circuit):
    """Write a Circuit as JSON, whole or not at all: everything that reproduces its losses. Raises
    UserError if that cannot be done."""
    record = dict(
        format=FORMAT, task=circuit.task, settings=dataclasses.asdict(circuit.settings),
        calibration=circuit.calibration._asdict(), fill=[float(x) for x in circuit.fill],
        **circuit.record)
    write_text(path, json.dumps(dict(record, sha256=digest(record)), indent=1, ensure_ascii=False))


def digest(record):
    """What a circuit's file says of its own content, so that a damaged one is known."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def write_text(path, text):
    """Write a text file, whole or not at all."""
    sg.write_whole(path, lambda f: f.write(text.encode("utf-8", "surrogatepass")))


def finite(constant):
    """Refuses the NaN and Infinity that json would read."""
    raise ValueError(f"{constant} is no number")


def load(path):
    """The Circuit in a file. Raises UserError if it is missing, damaged, or not a circuit."""
    try:
        record = json.loads(Path(path).read_text("utf-8", "surrogatepass"), parse_constant=finite)
        if record.pop("sha256") != digest(record):
            raise ValueError("its content does not fit its checksum")
        if record.pop("format") != FORMAT:
            raise ValueError("it is of another version")
        cfg = sg.Config(**record["model"]["config"])
        keep = np.zeros(n_nodes(cfg), bool)
        keep[[node_number(node["name"], cfg) for node in record["nodes"]]] = True
        edges = {name: np.zeros((m.source.stop - m.source.start, m.target.stop - m.target.start),
                                bool) for name, m in matrices(cfg).items()}
        for e in record["edges"]:
            i, j = node_number(e["from"], cfg), node_number(e["to"], cfg)
            [(name, row, column)] = [
                (name, i - m.source.start, j - m.target.start) for name, m in matrices(cfg).items()
                if i in range(m.source.start, m.source.stop)
                and j in range(m.target.start, m.target.stop)]
            edges[name][row, column] = True
        fill = np.array(record.pop("fill"), cfg.dtype)
        if fill.shape != keep.shape or not np.isfinite(fill).all():
            raise ValueError("it has not one mean for every node")
        calibration = record.pop("calibration")
        calibration = Calibration(*(float(calibration[x]) for x in ("scale", "shift")))
        circuit = Circuit(str(record.pop("task")), Settings(**record.pop("settings")),
                          Cut(keep, edges), calibration, fill, record)
        listing(circuit), explain(record["example"])  # what cannot be printed is damaged
        return circuit
    except FileNotFoundError as e:
        raise sg.UserError(f"no file {path}; make one with: python prune.py TASK") from e
    except OSError as e:
        raise sg.UserError(f"cannot read {path}: {e.strerror or e}") from e
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError,
            RecursionError) as e:
        raise sg.UserError(f"{path} is damaged or not a circuit ({type(e).__name__}: {e})") from e


def same_model(circuit, model, path):
    """Raise UserError if a circuit was not cut out of this model."""
    if circuit.record["model"]["fingerprint"] != fingerprint(model):
        raise sg.UserError(f"{path} is a circuit of another model, not of {model.cfg.out}")


def evaluate(circuit, model):
    """Every loss of a circuit, computed on the model anew: see `losses`."""
    problem = Problem(model, circuit.fill, circuit.task, circuit.settings)
    return losses(problem, circuit.cut, circuit.calibration)


def verify(circuit, model):
    """Compute every loss of a circuit again: the lines that differ from what it says by more than
    1e-4 (rounding differs between machines)."""
    again = evaluate(circuit, model)
    return [f"{which}, {split} prompts, {name}: the file says {old}, the model gives {new}"
            for which, by_split in circuit.record["losses"].items()
            for split, score in by_split.items() for name, old in score.items()
            if not abs(old - (new := again[which][split][name])) <= 1e-4]


# ---- drawings -----------------------------------------------------------------------------------
CSS = """:root{--bg:#fff;--ink:29 39 51;--pos:0 98 168;--neg:206 84 0;color-scheme:light}
@media screen and (prefers-color-scheme:dark){:root{--bg:#14181c;--ink:227 232 237;
--pos:98 178 240;--neg:240 146 60;color-scheme:dark}}h1{font-size:24px;margin:0}
body{margin:0 auto;padding:28px 32px;max-width:1740px;background:var(--bg);color:rgb(var(--ink));
font:14px/1.5 system-ui,"Helvetica Neue",Arial,sans-serif}h2{font-size:16px;margin:26px 0 4px}
p{margin:4px 0}.mute,.all{font-size:12px}.mute,th{color:rgb(var(--ink)/.65)}th{font-weight:500}
code,.heat *,.tok{font:11px/1.5 ui-monospace,Menlo,Consolas,monospace;white-space:pre}
mark{background:rgb(var(--pos)/.2);color:inherit}a{color:rgb(var(--pos))}
.scroll{overflow:auto;display:inline-block;max-width:100%;margin-right:44px;vertical-align:top}
table{border-collapse:collapse}th,td{padding:4px 12px;text-align:right;vertical-align:top}
.all :is(th,td){padding:3px 6px}:is(.text *,tr>:first-child){text-align:left}.graph{margin:0}
td{border-top:1px solid rgb(var(--ink)/.15)}:is(.all td,tr>:first-child){white-space:nowrap}
table tr>:first-child{padding-left:0;background:var(--bg);position:sticky;left:0}
.heat :is(th,td){padding:0 0 0 1px;border:0}.heat :is(span,th){padding:2px 6px}
.heat span{display:block;background:rgb(var(--c)/var(--v))}.mute svg{margin:0 8px 0 28px}
.panel{position:sticky;bottom:0;max-height:230px;overflow:auto;padding:4px 14px;
background:var(--bg);border:1px solid rgb(var(--ink)/.2)}.graph svg{max-width:100%;height:auto}
text{fill:rgb(var(--ink));font-size:11px;text-anchor:middle}text.mute{fill:rgb(var(--ink)/.65)}
path{fill:none;stroke:rgb(var(--ink)/.4)}rect{fill:var(--bg);stroke:rgb(var(--ink)/.4);rx:5px}
.pos{stroke:rgb(var(--pos))}.neg{stroke:rgb(var(--neg));stroke-dasharray:6 3}
.soft{fill:rgb(var(--ink)/.05);stroke:rgb(var(--ink)/.12)}.node:hover rect{stroke-width:2}
.graph:is(:hover,:focus-within):has(.lit) [data-n]:not(.lit){opacity:.12}.ch{font-weight:600}
@page{size:landscape;margin:12mm}@media print{.graph svg{min-width:0!important;max-height:92vh}
body{padding:0;print-color-adjust:exact}.panel{display:none}.scroll{overflow:visible}
.all *,.heat *{font-size:8px}}"""
SCRIPT = """
const graph = document.querySelector(".graph"), panel = document.querySelector(".panel tbody")
for (const a of graph.querySelectorAll(".node")) a.onmouseenter = a.onfocus = () => {
  const id = a.getAttribute("href").slice(1)
  panel.innerHTML = document.getElementById(id).closest("tr")?.outerHTML ?? ""
  for (const e of graph.querySelectorAll("[data-n]"))
    e.classList.toggle("lit", e.dataset.n.split(" ").includes(id))
}"""
STEP = dict(attn_in=0, q=1, k=1, v=1, attn_out=2, mlp_in=3, neuron=4, mlp_out=5)
# A column is (block, step, title), which sorts in the order of computation.
IN, FINAL, OUT = (-1, -1, "tokens in"), (math.inf, 6, "final"), (math.inf, 7, "tokens out")
WIDE, HIGH, ROW, LANE = 64, 32, 42, 13  # pixels: a box; from a box or a lane to the next below
# A node; a token, its channel the text; more tokens; or a wire's lane between boxes, its place "".
Key = namedtuple("Key", "column place channel label")


def visible(text, space="␣", most=999):
    """Text for HTML, at most `most` letters, in which white space and control codes are seen."""
    seen = {" ": space, "\n": "⏎", "\t": "⇥"}
    text = "".join(seen.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in text)
    return html.escape(text if len(text) <= most else text[:most - 1] + "…")


def plain(x):
    """A value for HTML: a number with three digits and a true minus; a dash for None."""
    if isinstance(x, (int, float)):
        return (f"{x:,}" if isinstance(x, int) else f"{x:.3g}").replace("-", "−")
    return "–" if x is None else visible(str(x), " ")


def marked(before, token, value):
    """A token in its context, with a value, for HTML."""
    return f"<code>{visible(before[-16:], ' ')}<mark>{visible(token)}</mark></code> {plain(value)}"


def table(title, head, rows, kind=""):
    """A table of cells in HTML."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "</tr>\n<tr>".join("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    return (f'<div class="scroll">{title and f"<h2>{title}</h2>"}<table class="{kind}"><thead>'
            f"<tr>{top}</tr></thead><tbody><tr>{body}</tr></tbody></table></div>\n")


def document(title, doc, *body):
    """A whole HTML page."""
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f"<title>{plain(title)}</title>\n<style>{CSS}</style></head>\n<body>"
            f"<h1>{plain(title)}</h1>\n<p>{plain(doc)}</p>\n{''.join(body)}</body></html>\n")


def graph(record):
    """({key: node's dict, or None for a token}, [(from, to, weight or 0 for a residual wire)])."""
    def key(name, side=None):
        if side:
            return Key(side, "token", name, visible(name))
        place, _, channel = name.rpartition(".")
        block, _, step = place.partition(".")
        title = f"{block}.q k v" if step in ("q", "k", "v") else place
        column = (int(block[1:]), STEP[step], title) if step else FINAL
        return Key(column, place, int(channel), visible(name))
    links = [(key(e["token"], IN), key(e["to"]), e["weight"]) for e in record["embed"]]
    links += [(key(e["from"]), key(e["to"]), e["weight"]) for e in record["edges"]]
    links += [(key(e["from"]), key(e["to"]), 0) for e in record["residual"]]
    links += [(key(e["from"]), key(e["token"], OUT), e["weight"]) for e in record["unembed"]]
    keys = {key(n["name"]): n for n in record["nodes"]}
    keys |= {k: None for link in links for k in link[:2] if k not in keys}
    return keys, sorted(links, key=lambda link: -abs(link[2]))


def fold(links, most=12):
    """The links to draw: of a side's tokens `most`, by rank in their channels, the rest as one."""
    for side, end in ((IN, 0), (OUT, 1)):
        rank, seen = {}, Counter()
        for link in (link for link in links if link[end].column == side):
            rank.setdefault(link[end], seen[link[1 - end]])
            seen[link[1 - end]] += 1
        rest = sorted(rank, key=rank.get)[most:]
        more = dict.fromkeys(rest, Key(side, "more", None, f"+{len(rest)} more"))
        links = [(more.get(a, a), more.get(b, b), 0 if a in more or b in more else weight)
                 for a, b, weight in links]
    return links


def route(nodes, columns, links):
    """{(key, key): (weight, keys linked)} from column to column, on the way of the channel."""
    boxes = {(k.column, k.channel): k for k in nodes if k.column[1] not in (1, 4)}
    hops = {}
    for a, b, weight in links:
        between = columns[columns.index(a.column) + 1:columns.index(b.column)]
        way = [a, *(boxes.get((c, b.channel), Key(c, "", b.channel, "")) for c in between), b]
        for hop in zip(way, way[1:]):  # signed is what is added to a channel, not its wire
            hops.setdefault(hop, (weight if hop[0] == a else 0, set()))[1].update((a, b))
    return hops


def arrange(unit, columns, hops):
    """{key: y} near the means of the neighbours' y. A unit, as a head, stays under one label."""
    near = {k: [n for hop in hops if k in hop for n in hop if n != k] for k in unit}
    y = {k: i * ROW for i, k in enumerate(unit)}
    for sweep in range(27):
        both = 13 < sweep < 26  # one side untangles, both balance, one makes wires straight
        for c in columns[::-1 if sweep % 2 else 1]:
            want, start, at, pools = {}, {}, 0, []
            for k in (k for k in unit if k.column == c):
                ys = [y[n] for n in near[k] if both or (n.column > c) == sweep % 2]
                want[k] = sum(ys) / (len(ys) + 0.1 * (sweep < 14)) if ys else y[k]  # and inwards
            mean = {k: fmean(want[n] for n in want if unit[n] == unit[k]) for k in want}
            order = sorted(want, key=lambda k: (mean[k], str(unit[k]), k.place, want[k]))
            for k, last in zip(order, [None, *order]):
                half = ROW / 2 if k.place else LANE / 2
                start[k] = at + half + 26 * (unit[k] not in (k, unit.get(last)))
                at = start[k] + half
                pools.append([mean[k] - start[k]])  # least squares: pool adjacent violators
                while len(pools) > 1 and fmean(pools[-2]) >= fmean(pools[-1]):
                    pools[-2:] = [pools[-2] + pools[-1]]
            y |= zip(order, map(sum, zip(start.values(), (fmean(p) for p in pools for _ in p))))
    return y


def picture(keys, links, d_head):
    """The circuit as inline SVG. data-n: the ids of the boxes that light up a box or a link."""
    nodes, links = [k for k in keys if keys[k]], fold(links)
    columns = sorted({k.column for k in [*nodes, *(k for link in links for k in link[:2])]})
    hops = route(nodes, columns, links)
    unit = {k: k for k in [*nodes, *(k for hop in hops for k in hop)]}
    unit |= {k: (k.column, k.channel // d_head) for k in nodes if k.column[1] == STEP["q"]}
    y = arrange(unit, columns, hops)
    if not y:
        return "<p>No node is needed: the bigram table and the constants do the task.</p>"
    heads = {u: sorted((k for k in nodes if unit[k] == u), key=y.get)
             for u in unit.values() if len(u) == 2}
    ids = dict.fromkeys(y, "all") | {k: f"n{i}" for i, k in enumerate(keys)}
    lit = {k: {ids[n] for group in [*heads.values(), *zip(y), *links] if k in group
               for n in group if n in y} for k in y}
    top, tall, mid = min(y.values()) - 68, max(y.values()) - min(y.values()) + 98, WIDE / 2
    pitch = max(104, min(170, 1330 // len(columns)), tall // 12)  # steep links need room
    x = {c: i * pitch for i, c in enumerate(columns)}
    wide = x[columns[-1]] + WIDE + 24
    out = [f'<div class="scroll graph"><svg viewBox="-12 {top:.0f} {wide:.0f} {tall:.0f}" '
           f'width="{wide:.0f}" style="min-width:{min(wide, max(1100, wide * 0.8)):.0f}px">']
    out += [f'<text class="mute" x="{x[c] + mid}" y="{top + 20:.0f}">{plain(c[2])}</text>'
            for c in columns]
    for (c, head), group in heads.items():
        at = y[group[0]] - HIGH / 2 - 22
        out.append(f'<rect class="soft" data-n="" x="{x[c] - 7}" y="{at:.1f}" width="{WIDE + 14}" '
                   f'height="{y[group[-1]] + HIGH / 2 + 7 - at:.1f}"/>'
                   f'<text class="mute" x="{x[c] + mid}" y="{at + 15:.1f}">head {head}</text>')
    largest = {a.column[1]: abs(w) for (a, _), (w, _) in reversed(hops.items()) if w}  # by matrix
    for (a, b), (weight, ends) in reversed(hops.items()):
        start, dy = x[a.column] + WIDE, y[b] - y[a]
        dx, thick = x[b.column] - start, 1 + 3 * abs(weight) / largest.get(a.column[1], 1)
        out.append(f'<path class="{"pos" if weight > 0 else "neg" if weight else ""}" '
                   f'data-n="{" ".join(sorted(ids[k] for k in ends))}" stroke-width="{thick:.1f}" '
                   f'd="M{start - WIDE * (not a.place)} {y[a]:.1f}H{start}'
                   f'c{dx / 2} 0 {dx / 2} {dy:.1f} {dx} {dy:.1f}"/>')
    for k in (k for k in y if k.place):
        name, told = "", k.label if k.place == "more" else visible(str(k.channel), most=9)
        if k in nodes:
            name = k.channel if unit[k] == k else f"{k.place[-1]}.{k.channel}"
            told = "".join(visible(token, most=9) for _, token, _ in keys[k]["task"]["high"][:1])
        out.append(f'<a class="node" href="#{ids[k]}" data-n="{" ".join(sorted(lit[k]))}" '
                   f'transform="translate({x[k.column]} {y[k]:.1f})"><title>{k.label}</title>'
                   f'<rect class="{"" if k in nodes else "soft"}" y="-{HIGH / 2}" width="{WIDE}" '
                   f'height="{HIGH}"/><text class="ch" x="{mid}" y="-3">{name}</text><text '
                   f'class="tok" x="{mid}" y="{11 if k in nodes else 4}">{told}</text></a>')
    return "\n".join(out) + "</svg></div>\n"


def page(record):
    """One circuit as a self-contained HTML page."""
    (keys, links), rows = graph(record), []
    size, loss, model, pair = (record[k] for k in ("size", "losses", "model", "example"))
    for i, (k, n) in enumerate(keys.items()):
        facts = "".join(f"<br>{fact} {plain(n[fact])}" for fact in ("mean", "bias", "tau") if n)
        rows.append([f'<b id="n{i}">{k.label}</b>{facts}', *(
            "<br>".join(marked(*example) for example in n[where][end]) if n else ""
            for where in ("task", "text") for end in ("high", "low")), *(
            "<br>".join(f"{link[0].label} → {link[1].label} {plain(link[2] or None)}"
                        for link in links if link[end] == k) for end in (1, 0))])
    heads = ["", "task: highest", "task: lowest", "text: highest", "text: lowest", "in", "out"]
    splits = [(s, kind) for s in ("search", "held") for kind in ("binary", "full", "accuracy")]
    most = {k: max(abs(v or 0) for v in sum(two, [])) or 1 for k, two in pair["values"].items()}
    about = record["settings"] | record["calibration"]
    return document(
        record["task"], record["doc"], '<p class="mute">box: channel, token it is highest on', *(
            f'<svg width="32" height="8"><path class="{kind}" d="M0 4H32"/></svg>{what}'
            for kind, what in (("pos", "positive weight (width: its size in its matrix)"),
                               ("neg", "negative weight"), ("", "residual channel"))), "</p>\n",
        picture(keys, links, model["config"]["d_head"]), '<div class="panel">',
        table("", heads, [["Point at a box."]], "text all"), "</div>\n",
        table("Size", ["", "nodes", "edges", "task loss"], [map(plain, row) for row in [
            ("full model", size["model_nodes"], size["model_edges"], None),
            *((s["stage"], s["nodes"], s["edges"], s["loss"]) for s in record["stages"])]]),
        table("Loss among the two answers (binary) and among all tokens (full)", [
            "", *(f"{s} prompts:<br>{kind}" for s, kind in splits)],
              [[name, *(plain(loss[name][s][kind]) for s, kind in splits)] for name in loss]),
        table("Checks", ["", "passed", ""], [
            [plain(c["name"]), {True: "✓", False: "✗", None: "–"}[c["passed"]],
             plain(c["text"])] for c in record["checks"]], "text"),
        table("Heads", ["", "nodes", "sink", "logits by distance", "looks from … at",
                        "overlap with the full model"], [
            [plain(h["name"]), "<br>".join(map(plain, h["nodes"])), plain(h["sink"]), "<br>".join(
                f"{d} back {x:+.2f}" for d, x in h["distances"]), "<br>".join(
                marked(e["context"].removesuffix(e["at"]), e["at"], "→ ") + ", ".join(
                    f"<code>{visible(token)}</code> {plain(p)}" for token, p in e["to"])
                for e in h["attends"]), plain(h["overlap"])] for h in record["heads"]], "text"),
        *(table(f"Prompt {i + 1}: answer <code>{visible(pair['answers'][i])}</code>, margin "
                f"{plain(pair['margins'][i])} (coloured by row)", ["", *map(visible, prompt)], [
                    [visible(k), *("" if v is None else '<span style="--c:var(--'
                                   f'{"neg" if v < 0 else "pos"});--v:{0.7 * abs(v) / most[k]:.2f}'
                                   f'">{plain(round(v, 2) + 0)}</span>' for v in two[i])]
                    for k, two in pair["values"].items()], "heat")
          for i, prompt in enumerate(pair["prompts"])),
        table('<span id="all">All nodes, tokens and links</span>', heads, rows, "text all"),
        f'<p class="mute">{size["embed"]} embedding and {size["unembed"]} unembedding entries; '
        f'{plain(model["path"])}, {plain(model["fingerprint"])}; ', ", ".join(
            f"{plain(k)} {plain(v)}" for k, v in about.items()), f"<script>{SCRIPT}</script></p>")


def dot(record):
    """The same graph for Graphviz: a column is a cluster; colour, dash and width show weight."""
    keys, links = graph(record)
    ids, out = {k: f"n{i}" for i, k in enumerate(keys)}, ["digraph{rankdir=LR;node[shape=box]"]
    for c in sorted({k.column for k in keys}):
        out += [f'subgraph "cluster {c[2]}" {{label="{plain(c[2])}"', *(
            f'{ids[k]} [label="{k.label.replace(chr(92), chr(92) * 2)}"]'
            for k in keys if k.column == c), "}"]
    for a, b, weight in links:
        look = '"#0062a8"' if weight > 0 else '"#ce5400" style=dashed' if weight else "gray"
        out.append(f"{ids[a]} -> {ids[b]} [color={look} penwidth={min(6, 1 + abs(weight)):.1f}]")
    return "\n".join(out) + "\n}\n"


def mean_edges(points, target, tasks_):
    """The geometric mean of the edges of some tasks' circuits at a target; 0 counts as 1."""
    return geometric_mean(max(1, p["edges"]) for p in points
                          if p["target"] == target and p["task"] in tasks_)


def reached(curves, target):
    """The tasks that have a circuit at a target on each of some curves."""
    return set.intersection(*({p["task"] for p in points if p["target"] == target}
                              for points in curves.values()))


def plot(curves):
    """Edges against target loss, both logarithmic, of {name: [{"task", "target", "edges"}]}: a thin
    line a task, and bold their geometric mean, at each target over the tasks that all reach."""
    targets = sorted({p["target"] for points in curves.values() for p in points})
    common = {t: reached(curves, t) for t in targets}
    lines, looks = [], ("pos", "neg", "")
    for look, (name, points) in zip(looks * len(curves), curves.items()):
        by_task = defaultdict(dict)
        for p in points:
            by_task[p["task"]][p["target"]] = max(1, p["edges"])
        lines += [(look, 1, f"{name} {task}", line) for task, line in by_task.items()]
        lines.append((look, 3, f"{name}: geometric mean", {
            t: mean_edges(points, t, common[t]) for t in targets if common[t]}))
    edges = sorted(n for *_, line in lines for n in line.values())
    marks = [m * 10 ** e for e in range(9) for m in (1, 2, 5)]
    marks = [m for m in marks if edges[0] / 2.5 < m < edges[-1] * 2.5]
    x, y = ({v: at + wide * math.log(v / axis[0]) / (math.log(axis[-1] / axis[0]) or 1)
             for v in [*axis, *edges]}
            for axis, at, wide in ((targets, 70, 500), (marks, 320, -290)))
    return "".join([
        '<h2>Edges at each target loss</h2><svg width="640" height="400">',
        *(f'<path opacity=".4" d="M{x[t]:.0f} 320v-290"/><text x="{x[t]:.0f}" y="340">{t:g}</text>'
          f'<text x="{x[t]:.0f}" y="356" class="mute">{len(common[t])}</text>' for t in targets),
        *(f'<path opacity=".4" d="M70 {y[m]:.0f}h500"/><text x="46" y="{y[m] + 4:.0f}">{m}</text>'
          for m in marks),
        *(f'<path class="{look}" stroke-width="{wide}" opacity="{1 if wide > 1 else .35}" d="M'
          f'{"L".join(f"{x[t]:.0f} {y[line[t]]:.0f}" for t in targets if t in line)}">'
          f"<title>{plain(name)}</title></path>" for look, wide, name, line in lines),
        *(f'<path class="{look}" stroke-width="3" d="M{80 + 200 * i} 16h24"/><text y="20" '
          f'x="{110 + 200 * i}" style="text-anchor:start">{plain(name)}</text>'
          for i, (look, name) in enumerate(zip(looks, curves))),
        '<text x="46" y="20">edges</text><text x="320" y="380">target loss, and the tasks that '
        "reach it (bold: their geometric mean)</text></svg>"])


def summary_page(rows, points):
    """All tasks' circuits: a table, and a plot of edges by target loss. In means 0 counts as 1."""
    heads = {"full_loss": "full model's loss", "loss": "circuit's loss", "held": "held-out loss",
             "nodes": "nodes", "edges": "edges", "necessity": "loss without circuit",
             "random": "best random circuit", "nonsense": "edges (loss), nonsense task",
             "shuffled": "edges (loss), shuffled model", "status": "status"}
    done = [r for r in rows if r["status"] == "ok"]
    cells = [[f'<a href="{plain(r["task"])}.html">{plain(r["task"])}</a>' if r in done else
              plain(r["task"]), *(f"{plain(r[k]['edges'])} ({plain(r[k]['loss'])})" if isinstance(
                  r[k], dict) else plain(r[k]) for k in heads)] for r in rows]
    means = {k: geometric_mean(max(1, r[k]) for r in done) for k in ("nodes", "edges") if done}
    cells.append([f"geometric mean of {len(done)}", *(plain(means.get(k, "")) for k in heads)])
    return document("Circuits", "Edges –: no circuit reached the target loss.",
                    table("", ["task", *heads.values()], cells),
                    plot({"circuits": points}) if points else "")


# ---- comparing models ---------------------------------------------------------------------------

def compare_one(studies, settings, job):
    """What one model does with one task, job being (number of its Study, task): its `curve`, the
    same by attribution, and at the settings' target its circuit cleaned and the full model's loss
    without just the circuit's nodes, or as many random ones, the median of ten draws (paper Figure
    32)."""
    study, task = studies[job[0]], job[1]
    row = dict(model=study.fingerprint, task=task, full=None, points=[], by_attribution=[],
               cleaned=None, without=None, random=None)
    try:
        problem = Problem(study.model, study.fill, task, settings, text=study.text)
    except CannotPrune:
        return row
    row["full"] = full_loss(problem)
    if row["full"] > max(SWEEP):
        return row
    progress, order = Progress(task, quiet), rank_by_attribution(problem)
    loss = functools.cache(lambda n: problem.loss(first(order, n)))
    for target, cut, size in curve(problem, progress):
        row["points"].append(dict(task=task, target=target, nodes=size[0], edges=size[1]))
        ranked = bisect(order, lambda c: loss(int(c.keep.sum())) <= target)
        if ranked is not None:
            row["by_attribution"].append(dict(task=task, target=target,
                                              edges=problem.size(ranked)[1]))
        if target == settings.target:
            # Not where a trial takes long, or `clean` would leave all as it is.
            if settings.ablation != "resample" and size[1] <= TOO_LARGE:
                last = clean(problem, cut, lambda *_: None, progress)[0]
                row["cleaned"] = dict(zip(("nodes", "edges"), problem.size(last)))
            needed = check_necessity(problem, cut)
            row |= {"without": needed["loss"], "random": needed["median"]}
    return row


def compare(studies, settings, folder, workers, names, log=print):
    """Prune the named tasks in several models alike, and report size against loss: the first
    model's edges over each other's, seeds of a model pooled. What compare.json has already, of
    these models or others, is kept. Raises UserError if it is of other settings."""
    path, began, rows, known = Path(folder, "compare.json"), time.perf_counter(), [], {}
    head = json.loads(json.dumps(dict(settings=dataclasses.asdict(settings), targets=SWEEP,
                                      aims=AIMS)))
    prints = [study.fingerprint for study in studies]
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        same = all(old[k] == v for k, v in head.items())
        rows, known = old["rows"], {m["model"]: m for m in old["models"]}
    except (OSError, ValueError, KeyError, TypeError):
        same = True  # nothing is there that could be of use
    if not same:
        raise sg.UserError(f"{path} is of other settings: give another --out, or delete it")
    have = {(row["model"], row["task"]) for row in rows}
    jobs = [(i, task) for task in names for i in range(len(studies))
            if (prints[i], task) not in have and prints.index(prints[i]) == i]
    for n, row in enumerate(on_cores(functools.partial(compare_one, studies, settings), jobs,
                                     workers), 1):
        rows.append(row)
        write_text(path, json.dumps({**head, "models": [*known.values()], "rows": rows}))
        at = {p["target"]: p["edges"] for p in row["points"]}
        left = (time.perf_counter() - began) / n * (len(jobs) - n)
        log(f"{n:>3} of {len(jobs)}  {studies[prints.index(row['model'])].model.cfg.out:<20} "
            f"{row['task']:<27} {at.get(settings.target, 'no')} edges; {sg.clock(left)} left")
    models = [about(study) for study in studies]
    known, kinds = {**known, **{m["model"]: m for m in models}}, by_kind(models)
    write_text(path, json.dumps({**head, "models": [*known.values()], "rows": rows}))
    shown = [row for row in rows if row["task"] in names]
    text = comparison(kinds, shown, settings.target)
    log(text)
    curves = {kind[0]["name"]: [dict(p, task=f"{p['task']} {i or ''}") for i, m in enumerate(kind)
                                for row in shown if row["model"] == m["model"]
                                for p in row["points"]] for kind in kinds}
    write_text(path.with_suffix(".html"), document(
        "Circuits compared", "Edges: nonzero weights between two kept nodes, before cleaning.",
        plot(curves) if all(curves.values()) else "", f"<pre>{html.escape(text)}</pre>"))
    log(f"wrote {path} and .html")


def kurtosis(model, ids):
    """How heavy-tailed the normed residual stream before the unembedding is on ids [n, T]: the
    median over its channels of the fourth moment by the squared second (3 for a Gaussian; paper
    Figure 10)."""
    hook = Recorder()
    sg.forward(model.params, ids, model.cfg, hook)
    x = sg.to_host(hook.seen["final"]).astype(np.float64)
    x = (x - x.mean(0))[:, x.std(0) > 0]
    return float(np.median((x ** 4).mean(0) / (x ** 2).mean(0) ** 2)) if x.size else math.nan


def about(study):
    """What the comparison says of a model."""
    model, cfg = study.model, study.model.cfg
    val = sg.evaluate(model.params, sg.load_corpus(cfg, quiet).val, cfg, 256)
    return dict(name=cfg.out, model=study.fingerprint, kind=kind_of(cfg), seed=cfg.seed,
                d_model=cfg.d_model, density=cfg.density, afrac=cfg.afrac,
                loss=sg.mean_loss(val, cfg), **val,
                kurtosis=kurtosis(model, study.text[:16]),
                nonzero=sum(int((w != 0).sum()) for name, w in model.params.items()
                            if name in matrices(cfg)))


def kind_of(cfg):
    """What models share that differ in nothing but their seed, and their steps: for equal loss, a
    dense model of another seed may need others."""
    return json.dumps({**dataclasses.asdict(cfg), "seed": 0, "steps": 0, "threads": 0, "out": ""})


def by_kind(models):
    """The dicts of `about` in lists of one kind, the first seed of each kind first; a model that is
    given twice begins another list."""
    out = []
    for m in models:
        home = next((kind for kind in out if kind[0]["kind"] == m["kind"]
                     and m["seed"] not in [other["seed"] for other in kind]), None)
        if home is None:
            out.append(home := [])
        home.append(m)
    return [sorted(kind, key=lambda m: m["seed"]) for kind in out]


def comparison(kinds, rows, target):
    """The tables of `compare`, as text: kinds of models against each other, pooled over seeds."""
    by = {(row["model"], row["task"]): row for row in rows}
    names = [task for task in tasks.TASKS if task in {row["task"] for row in rows}]
    letters, runs = "ABCDEFGH"[:len(kinds)], list(zip(*kinds))  # a run is one model of each kind
    out = ["", f"{'':<4}{'model':<26} width density  AbsTopK nonzero edges  kurtosis  "
           "validation loss (code, idioms)"]
    for letter, kind in zip(letters, kinds):
        for m in kind:
            out.append(f"{letter:<4}{m['name']:<26} {m['d_model']:>5} {m['density']:>7.4g} "
                       f"{m['afrac']:>8.4g} {m['nonzero']:>13,}  {m['kurtosis']:>8.1f}  "
                       f"{m['loss']:.4f} ({m['code']:.4f}, {m.get('idioms', math.nan):.4f})")
    for run in runs:
        low, high = min(m["loss"] for m in run), max(m["loss"] for m in run)
        if high > 1.02 * low:
            out.append(f"WARNING: the losses of {', '.join(m['name'] for m in run)} differ by "
                       f"{high / low - 1:.1%}: over 2 % is no fair pair")

    def row_of(m, task):
        return by.get((m["model"], task), dict(full=None, points=[], by_attribution=[],
                                               cleaned=None, without=None, random=None))

    def pick(row, kind, at=target):
        if kind == "cleaned":
            return row["cleaned"] and row["cleaned"]["edges"]
        return next((p["edges"] for p in row[kind] if p["target"] == at), None)

    def table_of(title, choices):
        """Lines of geometric means over the tasks that all models of a run have, one a choice."""
        lines = ["", f"{title:<22} tasks" + "".join(
            f"{'edges ' + c:>10}" for c in letters) + "".join(
            f"{'A/' + c:>8} (spread)" + "  by seed" * (len(runs) > 1) for c in letters[1:])]
        for label, kind, at in choices:
            edges = [[[pick(row_of(m, task), kind, at) for m in run] for task in names]
                     for run in runs]
            logs = [np.log([[max(1, n) for n in line] for line in run if None not in line])
                    .reshape(-1, len(kinds)) for run in edges]
            every = np.concatenate(logs)
            if not len(every):
                continue
            line = f"{label:<22} {len(every):>5}" + "".join(
                f"{x:>10.1f}" for x in np.exp(every.mean(0)))
            for i in range(1, len(kinds)):
                ratio = every[:, 0] - every[:, i]
                line += f"{np.exp(ratio.mean()):>8.2f} (x/ {np.exp(ratio.std()):.2f})"
                if len(runs) > 1:
                    line += "  " + " ".join(f"{np.exp((x[:, 0] - x[:, i]).mean()):.2f}"
                                            if len(x) else "-" for x in logs)
            lines.append(line)
        return lines

    out += table_of("target", [(f"{t:g}", "points", t) for t in SWEEP])
    out += table_of(f"at {target:g}", [("learned masks", "points", target),
                                       ("the same, cleaned", "cleaned", target),
                                       ("attribution", "by_attribution", target)])
    out += ["edges: geometric means over the tasks (of every seed) that all models reach, 0 "
            "counted as 1; spread: one standard deviation of their ratios, as a factor", "",
            f"{'at ' + format(target, 'g'):<28}" + "".join(
                f"{'loss ' + c:>{9 if len(runs) == 1 else 18}}{'edges':>{8 * len(runs)}}"
                f"{'cleaned':>{8 * len(runs)}}" for c in letters)]
    for task in names:
        line = f"{task:<28}"
        for kind in kinds:
            of = [row_of(m, task) for m in kind]
            full = "/".join("-" if row["full"] is None else f"{row['full']:.3f}" for row in of)
            line += f"{full:>{9 if len(runs) == 1 else 18}}"
            for which in ("points", "cleaned"):
                edges = (pick(row, which) for row in of)
                text = "/".join("-" if n is None else str(n) for n in edges)
                line += f"{text:>{8 * len(runs)}}"
        out.append(line)
    out += ["", f"{'only the circuit ablated':<26} tasks   loss   as many random nodes"]
    for letter, kind in zip(letters, kinds):
        losses = [(row["without"], row["random"]) for m in kind for task in names
                  if (row := row_of(m, task))["without"] is not None]
        if losses:
            out.append(f"{letter:<26} {len(losses):>5} {np.mean(losses, 0)[0]:>6.3f} "
                       f"{np.mean(losses, 0)[1]:>9.3f}")
    return "\n".join(out)


# ---- command line -------------------------------------------------------------------------------

def sweep(study, task, settings, log=print):
    """[{"task", "target", "nodes", "edges"}]: `curve` for a task."""
    problem = Problem(study.model, study.fill, task, settings)
    return [dict(task=task, target=target, nodes=nodes, edges=edges)
            for target, _, (nodes, edges) in curve(problem, Progress(f"{task}, sweep", log))]


def runs_within(seconds, cfg, settings):
    """Mask trainings a search that fit into a budget: a count by the model's size, not a clock, so
    that the same command gives the same circuit on any machine."""
    # Of all searches, on two cores: 38 s at width 128 and 76 at 256 were measured.
    one = 4.6e-5 * settings.steps * settings.pairs * cfg.n_layer * cfg.d_model
    return max(1, min(len(TRIALS), int(seconds / one)))


def finish(folder, circuit, model):
    """Save a circuit and its drawings, read it back, compute its losses again; returns what was
    read. Raises UserError if they differ."""
    path = Path(folder, f"{circuit.task}.json")
    save(path, circuit)
    saved = load(path)
    if wrong := verify(saved, model):
        raise sg.UserError(f"{path} does not reproduce its losses: {wrong[0]}")
    draw(path, saved)
    return saved


def draw(path, circuit):
    """Write the page and the graph beside a circuit's file."""
    record = dict(circuit.record, task=circuit.task, calibration=circuit.calibration._asdict(),
                  settings=dataclasses.asdict(circuit.settings))
    write_text(path.with_suffix(".html"), page(record))
    write_text(path.with_suffix(".dot"), dot(record))


COLUMNS = ("task", "status", "full_loss", "loss", "held", "nodes", "edges", "necessity", "random",
           "nonsense", "shuffled")  # of the summary; None in the row of a task that is not pruned


def summary_row(circuit):
    """A finished circuit as a row of the summary."""
    r, checks = circuit.record, {c["name"]: c for c in circuit.record["checks"]}
    return dict(task=circuit.task, status="ok", nodes=r["size"]["nodes"], edges=r["size"]["edges"],
                full_loss=r["losses"]["full"]["search"]["binary"],
                loss=r["losses"]["circuit"]["search"]["binary"],
                held=r["losses"]["circuit"]["held"]["binary"],
                necessity=checks["necessity"]["loss"], random=checks["random circuits"]["loss"],
                nonsense=checks["nonsense task"], shuffled=checks["shuffled weights"])


def summarize(folder, rows, points, log):
    """Print the table of all tasks and write summary.html."""
    log(f"\n{'task':<28} {'full':>7} {'circuit':>8} {'held':>7} {'nodes':>6} {'edges':>6} "
        f"{'without':>8} {'random':>7}  {'nonsense':>8}  {'shuffled':>8}")
    for r in rows:
        if r["status"] != "ok":
            log(f"{r['task']:<28} {r['status']}")
            continue
        control = ["none" if r[x]["edges"] is None else f"{r[x]['edges']:.0f}"
                   for x in ("nonsense", "shuffled")]
        log(f"{r['task']:<28} {r['full_loss']:7.3f} {r['loss']:8.3f} {r['held']:7.3f} "
            f"{r['nodes']:>6} {r['edges']:>6} {r['necessity']:8.3f} {r['random']:7.3f}  "
            f"{control[0]:>8}  {control[1]:>8}")
    done = [r for r in rows if r["status"] == "ok"]
    if done:
        nodes, edges = (geometric_mean(max(1, r[k]) for r in done) for k in ("nodes", "edges"))
        log(f"{len(done)} circuits; geometric mean {nodes:.1f} nodes, {edges:.1f} edges (0 counts "
            "as 1)")
    log("binary losses in nats on the search prompts, held: on held-out ones; without: the full "
        "model less the\ncircuit; random: the best of ten random circuits of the same size; "
        "nonsense, shuffled: edges that\nthe same search needed where it should find nothing")
    write_text(Path(folder, "summary.html"), summary_page(rows, points))
    log(f"wrote {Path(folder, 'summary.html')}")


def quiet(line):
    """A log that keeps nothing."""


def prune_one(study, settings, folder, seeds, with_sweep, task):
    """(row of the summary, its points of the curve, what to say) of a task; a circuit of this model
    and these settings that is there already is kept."""
    row, path = dict.fromkeys(COLUMNS), Path(folder, f"{task}.json")
    try:
        circuit = load(path)
        r = circuit.record
        kept = (circuit.task == task and circuit.settings == settings and r["seeds"] == seeds
                and r["model"]["fingerprint"] == study.fingerprint)
    except (sg.UserError, KeyError):
        kept = False
    try:
        if not kept:
            circuit = prune(study.model, task, settings, study, seeds, quiet)
            circuit = finish(folder, circuit, study.model)
        if with_sweep and "sweep" not in circuit.record:
            circuit.record["sweep"] = sweep(study, task, settings, quiet)
            circuit = finish(folder, circuit, study.model)
        elif not all(path.with_suffix(end).exists() for end in (".html", ".dot")):
            draw(path, circuit)
    except CannotPrune as e:
        status = f"not pruned: {e}"
        return dict(row, task=task, status=status), [], status
    row = summary_row(circuit)
    points = circuit.record.get("sweep", [])
    return row, points, f"{row['nodes']} nodes, {row['edges']} edges{', kept' if kept else ''}"


def prune_all(study, settings, folder, seeds, with_sweep, workers, log=print):
    """Prune every task, as many at a time as there are workers, and write the summary."""
    began, rows, curves, n = time.perf_counter(), {}, [], len(tasks.TASKS)
    one = functools.partial(prune_one, study, settings, folder, seeds, with_sweep)
    for row, points, text in on_cores(one, list(tasks.TASKS), workers):
        rows[row["task"]] = row
        curves += points
        left = (time.perf_counter() - began) * (n - len(rows)) / len(rows)
        log(f"{len(rows):>2} of {n}  {row['task']:<28} {text}; {sg.clock(left)} left")
    summarize(folder, [rows[task] for task in tasks.TASKS], curves, log)


def make_parser():
    """The flags."""
    parser = tasks.Parser(description="Cut a trained model down to the circuit of a task.")
    parser.add_argument("task", nargs="*", help="a task's name (see tasks.py), or all; with "
                        "--compare several may stand before it, and none means all")
    parser.add_argument("--model", help="checkpoint (default out/sparse.npz; with --check, the "
                        "circuit's own)")
    parser.add_argument("--out", default="circuits", help="folder for circuits (default circuits)")
    parser.add_argument("--target", type=float, default=Settings.target,
                        help="binary loss in nats that a circuit may have (default 0.15)")
    parser.add_argument("--ablation", default="mean", metavar="mean|zero|resample",
                        help="what deleted nodes are frozen at (default mean); with --compare also "
                        "what they are on other text")
    parser.add_argument("--untied", action="store_true",
                        help="a mask for queries and one for keys")
    parser.add_argument("--budget", type=float, default=120, metavar="SECONDS",
                        help="about how long a task may take on two cores (default 120: one way "
                        "to train the masks of the default model; from 151 two, from 227 three)")
    parser.add_argument("--seeds", type=int, default=2,
                        help="searches to compare, from different masks (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and masks (default 0)")
    parser.add_argument("--sweep", action="store_true", help="also the "
                        "size at ten targets, from 0.5 down to 0.01")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--compare", nargs="+", metavar="FILE",
                       help="prune the tasks in several models and compare their sizes")
    modes.add_argument("--explain", action="store_true",
                       help="walk a prompt pair through the saved circuit of the task")
    modes.add_argument("--ask", action="append", metavar="PROMPT", default=[],
                       help="what the full model and the task's saved circuit make of a prompt of "
                       "your own; may be repeated")
    modes.add_argument("--set", action="append", metavar="NODE=VALUE", default=[],
                       help="run the full model on the task with a node set; may be repeated")
    modes.add_argument("--ablate", action="append", metavar="NODE", default=[],
                       help="the same with the node frozen at its mean; may be repeated")
    modes.add_argument("--check", metavar="FILE", help="compute a saved circuit's losses again")
    return parser


# A search takes all of these flags; each other mode, only those that it would look at.
SEARCH = ("model", "out", "target", "ablation", "untied", "budget", "seeds", "seed", "sweep")
TAKES = {"check": ("model",), "compare": ("out", "target", "ablation", "untied", "seed"),
         "explain": ("model", "out"), "ask": ("model", "out"),
         "set": ("model", "seed"), "ablate": ("model", "seed")}


def refuse_unused(args, parser):
    """Raise UserError on a flag of a search that the mode asked for would not look at."""
    for mode, takes in TAKES.items():
        if getattr(args, mode) not in (None, False, []):
            for flag in SEARCH:
                if flag not in takes and getattr(args, flag) != parser.get_default(flag):
                    raise sg.UserError(f"--{mode} takes no --{flag}")


def nodes_to_set(args, model):
    """{node number: value} of --set and --ablate. Raises UserError on what is no node or no
    number."""
    values = {}
    for text in args.set:
        name, equals, value = text.partition("=")
        try:
            values[node_number(name, model.cfg)] = float(value)
        except ValueError as e:
            if isinstance(e, sg.UserError):
                raise
            raise sg.UserError(f"--set {text}: give a node and a number, as in "
                               "h0.neuron.17=0") from e
        if not equals or not abs(float(value)) <= 1e9:  # nor NaN; a larger one would overflow
            raise sg.UserError(f"--set {text}: {value} is no number from -1e9 to 1e9")
    if args.ablate:
        numbers = [node_number(name, model.cfg) for name in args.ablate]
        fill = mean_activations(model, text_windows(model, 64))
        values |= {n: float(fill[n]) for n in numbers}
    return values


def run(argv):
    """What `main` does, if nothing goes wrong."""
    parser = make_parser()
    args = parser.parse_args(argv)
    refuse_unused(args, parser)
    sg.use_device(os.environ.get("SPARSEGPT_DEVICE", "cpu"))
    sg.set_blas_threads(1)  # as in every worker, so that the last digits do not tell which it was
    settings = settings_of(args)
    if len(args.task) > 1 and args.compare is None or args.task and args.check is not None:
        raise sg.UserError("name one task, or all; several go with --compare only, and --check "
                           "takes no task")
    for task in args.task:
        if task != "all" or args.compare is not None:
            tasks.pairs(task, 1)  # which refuses what is no task
    if args.check is not None:
        circuit = load(args.check)
        model = load_model(circuit.record["model"]["path"] if args.model is None else args.model)
        same_model(circuit, model, args.check)
        wrong = verify(circuit, model)
        for line in wrong or [f"{args.check}: every loss is reproduced"]:
            print(line)
        return int(bool(wrong))
    if args.compare is not None:
        return run_compare(args, settings)
    if not args.task:
        raise sg.UserError(f"name a task, or all; tasks: {', '.join(tasks.TASKS)}")
    [task] = args.task
    if task == "all" and (args.explain or args.ask or args.set or args.ablate):
        raise sg.UserError("--explain, --ask, --set and --ablate take one task, not all")
    model = load_model("out/sparse.npz" if args.model is None else args.model)
    path = Path(args.out, f"{task}.json")
    if args.explain or args.ask:
        circuit = load(path)
        same_model(circuit, model, path)
        if circuit.task != task:
            raise sg.UserError(f"{path} is a circuit of {circuit.task}")
        print("\n".join(ask(circuit, model, args.ask)) if args.ask else
              explain(circuit.record["example"]))
        return 0
    if values := nodes_to_set(args, model):
        print("\n".join(intervene(model, task, values, settings)))
        return 0
    settings = dataclasses.replace(settings, runs=runs_within(args.budget, model.cfg, settings))
    check_folder(args.out, tasks.TASKS if task == "all" else [task])
    study, workers = Study(model, settings.ablation), model.cfg.threads or sg.n_cores()
    if task == "all":
        prune_all(study, settings, args.out, args.seeds, args.sweep, workers)
        return 0
    circuit = prune(model, task, settings, study, args.seeds, workers=workers)
    if args.sweep:
        circuit.record["sweep"] = sweep(study, task, settings)
    circuit = finish(args.out, circuit, model)
    print(listing(circuit))
    print(f"\nwrote {path}, .html and .dot")
    return 0


def run_compare(args, settings):
    """--compare."""
    if len(args.compare) < 2:
        raise sg.UserError("--compare takes two models or more")
    if settings.target not in SWEEP:
        raise sg.UserError(f"--compare: --target must be one of {', '.join(map(str, SWEEP))}")
    models = [load_model(path) for path in args.compare]
    if any(m.tok.merges != models[0].tok.merges for m in models):
        raise sg.UserError("--compare: the models have different tokenizers")
    kinds = by_kind([dict(kind=kind_of(m.cfg), seed=m.cfg.seed) for m in models])
    if len(set(map(len, kinds))) > 1:
        raise sg.UserError("--compare: give as many seeds of each model; of these there are "
                           + " and ".join(str(len(kind)) for kind in kinds))
    if len(kinds) > 8:
        raise sg.UserError(f"--compare: at most 8 models, their seeds apart, not {len(kinds)}")
    check_folder(args.out, ["compare"])
    compare([Study(m, settings.ablation) for m in models], settings, args.out,
            max(m.cfg.threads or sg.n_cores() for m in models), args.task or list(tasks.TASKS))
    return 0


def settings_of(args):
    """The Settings of the flags. Raises UserError on values out of range."""
    for name, low, high in (("target", 0.0001, 0.69), ("budget", 1, 10**6), ("seeds", 1, 100),
                            ("seed", 0, 1 << 31)):
        if not low <= getattr(args, name) <= high:
            raise sg.UserError(f"--{name} must be from {low} to {high}, "
                               f"not {getattr(args, name)}")
    if args.ablation not in ("mean", "zero", "resample"):
        raise sg.UserError(f"--ablation must be mean, zero or resample, not {args.ablation!r}")
    return Settings(target=args.target, ablation=args.ablation, tied=not args.untied,
                    seed=args.seed)


def load_model(path):
    """The model in a checkpoint, which then says itself where it is."""
    model = sg.load(path)
    return model._replace(cfg=dataclasses.replace(model.cfg, out=str(path)))


def check_folder(folder, names):
    """Raise UserError now, not after the search, if files of these names cannot be put into a
    folder."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe = Path(folder, f".{os.getpid()}.tmp")
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise sg.UserError(f"--out {folder}: cannot write there: {e.strerror}") from e
    for path in (Path(folder, name + end) for name in [*names, "summary"]
                 for end in (".json", ".html", ".dot")):
        if path.is_dir():
            raise sg.UserError(f"{path} is a folder, where a file is to be written")


def main(argv=None):
    """The command line. Returns the exit status: 0, 1 for a circuit that does not reproduce its
    losses, 2 for a mistake, 130 for Ctrl-C, after which the same command goes on: finished circuits
    are kept."""
    return tasks.command("prune.py", run, argv, "finished circuits are kept, the same command "
                         "goes on")


if __name__ == "__main__":
    sys.exit(main())
