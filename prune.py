"""Prune a trained model, task by task, to the few nodes and edges that do the task: a circuit.

Source: Gao et al., arXiv 2511.13653 (2025), "the paper", sections 2.2 and A.5.

    python prune.py single_double_quote     # of out/sparse.npz, else of docs/long.npz; 2 minutes
    python prune.py all                     # every task, and circuits/summary.html

A *node* is one channel at one of a block's eight hook points (sites), or of the final normalized
residual stream, at all positions of all prompts at once. A deleted node is frozen at its mean over
training text. An *edge* is a nonzero weight between two kept nodes. A deleted edge is frozen at
the weight times the mean of its source node. Biases, embeddings and unembeddings are never pruned.

What a circuit computes is `sparsegpt.forward` with the hook `Ablation`. The search has three
steps: learn a mask over nodes by gradient descent through a hard threshold (the paper's method);
keep the fewest nodes that reach the target loss; delete every node and edge that the circuit can
do without, one at a time (the paper did this by hand, and kept all edges).

The file reads from top to bottom: nodes and edges, prompts, runners, the search, a model's tasks,
checks, files, command line. docs/ has what prints, draws and questions a circuit.
"""
import argparse
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import shlex
import sys
import threading
import time
from collections import defaultdict
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

from docs import program  # before NumPy: docs sets the number of BLAS threads

program.end_quietly(__name__)
import numpy as np

import sparsegpt as sg
import tasks
from docs import ask, readings, record as records, show, trace
from docs.show import explain, listing

FORMAT = "sparsegpt-circuit-5"  # the version of a circuit's file


# ---- nodes and edges ----------------------------------------------------------------------------
# Nodes are numbered in the order of computation; a vector over all of them is "by node".

@functools.cache
def node_slices(cfg):
    """{site: slice of the node numbers of its channels}, h0.attn_in first, final last."""
    out, start = {}, 0
    for site in [f"h{i}.{s}" for i in range(cfg.n_layer) for s in sg.SITES] + ["final"]:
        width = 4 * cfg.d_model if site.endswith("neuron") else cfg.d_model
        out[site] = slice(start, start + width)
        start += width
    return out


def n_nodes(cfg):
    """The number of nodes of a model."""
    return node_slices(cfg)["final"].stop


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
    if part is None or channel not in map(str, range(part.stop - part.start)):
        raise sg.UserError(f"no node {name!r}; a node is a site and a channel, as in h0.neuron.17 "
                           f"or final.3; the sites are {', '.join(node_slices(cfg))}")
    return part.start + int(channel)


def nodes_named(name, cfg):
    """The node of a name as [number]; of a head, as h1.head.5, its q, k and v channels."""
    block, _, head = name.partition(".head.")
    if f"{block}.q" in node_slices(cfg) and head in map(str, range(cfg.d_model // cfg.d_head)):
        return head_nodes(every_node(cfg), cfg, block, int(head))
    return [node_number(name, cfg)]


class Matrix(NamedTuple):
    """A matrix whose weights are edges: the name of its bias, and the node numbers of its rows and
    of its columns. The columns of wqkv are q, k and v, side by side."""
    bias: str
    source: slice
    target: slice


@functools.cache
def matrices(cfg):
    """{parameter: Matrix}, in the order of computation."""
    slices, out = node_slices(cfg), {}
    for i in range(cfg.n_layer):
        h = f"h{i}."
        qkv = slice(slices[h + "q"].start, slices[h + "v"].stop)
        out[h + "attn.wqkv"] = Matrix(h + "attn.bqkv", slices[h + "attn_in"], qkv)
        out[h + "attn.wo"] = Matrix(h + "attn.bo", slices[h + "v"], slices[h + "attn_out"])
        out[h + "mlp.wfc"] = Matrix(h + "mlp.bfc", slices[h + "mlp_in"], slices[h + "neuron"])
        out[h + "mlp.wproj"] = Matrix(h + "mlp.bproj", slices[h + "neuron"], slices[h + "mlp_out"])
    return out


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


def every_node(cfg):
    """The CircuitMask of the full model."""
    return CircuitMask(np.ones(n_nodes(cfg), bool))


def kept_edges(mask, params, cfg):
    """{matrix: bool [in, out]} of the nonzero weights between two kept nodes that are not
    deleted."""
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
    """[(block, head)] of the heads with a kept query, key or value."""
    return [(i, head) for i in range(cfg.n_layer) for head in range(cfg.d_model // cfg.d_head)
            if head_nodes(mask, cfg, f"h{i}", head)]


def head_nodes(mask, cfg, block, head):
    """The kept q, k and v channels of a head, by number. block: as in h0."""
    starts = [node_slices(cfg)[f"{block}.{site}"].start + head * cfg.d_head for site in "qkv"]
    channels = np.concatenate([np.arange(start, start + cfg.d_head) for start in starts])
    return channels[mask.nodes[channels]].tolist()


def residual_links(mask, cfg):
    """[(writer, reader)] of the kept nodes at one channel of the residual stream, by number."""
    links, writers = [], defaultdict(list)
    for site, part in node_slices(cfg).items():
        for channel in np.flatnonzero(mask.nodes[part]):
            if site.endswith(("_in", "final")):
                links += [(writer, int(part.start + channel)) for writer in writers[channel]]
            elif site.endswith("_out"):
                writers[channel].append(int(part.start + channel))
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


def margins(logits, prompts):
    """The right logit minus the wrong one: float64 [n] from [n, V]."""
    rows = np.arange(len(logits))
    return (logits[rows, prompts.right] - logits[rows, prompts.wrong]).astype(np.float64)


def logistic(margin):
    """The binary loss in nats of margins [n]."""
    return float(np.logaddexp(0, -margin).mean())


# ---- running a circuit --------------------------------------------------------------------------

class Ablation:
    """A hook for `sparsegpt.forward`: kept nodes pass, the others are frozen.

    AbsTopK chooses among the kept nodes alone, so a circuit computes with nothing but its own
    nodes. nodes: bool by node. frozen: values by node, or {site: [N, C]} with one for each token.
    After a backward pass, `grad` is by node the gradient of the loss by a number m in
    m x + (1 - m) frozen, where x is the value that the node has, or would have if it were kept.
    """

    def __init__(self, nodes, frozen, cfg):
        self.slices, self.saved = node_slices(cfg), {}
        if not isinstance(frozen, dict):
            frozen = sg.xp.asarray(frozen, cfg.dtype)
            frozen = {site: frozen[part] for site, part in self.slices.items()}
        self.frozen, self.nodes = frozen, sg.xp.asarray(nodes)
        self.n_kept = {site: int(nodes[part].sum()) for site, part in self.slices.items()}
        self.grad = sg.xp.zeros(n_nodes(cfg), cfg.dtype)

    def forward(self, site, x, k):
        xp, kept, active = sg.xp, self.nodes[self.slices[site]], None
        if k < x.shape[1] and k <= self.n_kept[site]:  # else all kept nodes stay active
            size = abs(x)
            mask = sg.topk_mask(size * kept, k)
            # A deleted node, if it were kept, would have to exceed the least active one.
            least = xp.where(mask, size * kept, math.inf).min(1, keepdims=True)
            active = xp.where(kept, mask, size >= least)
            x = x * active
        self.saved[site] = x, active
        return xp.where(kept, x, self.frozen[site])

    def backward(self, site, dx):
        part, (x, active) = self.slices[site], self.saved.pop(site)
        self.grad[part] = sg.xp.einsum("nc,nc->c", dx, x - self.frozen[site])
        dx = dx * self.nodes[part]
        return dx if active is None else dx * active


class Gated(Ablation):
    """An Ablation in which those of the kept nodes are active that are so in the full model. seen:
    the values of its nodes, of a Recorder."""

    def __init__(self, nodes, frozen, cfg, seen):
        super().__init__(nodes, frozen, cfg)
        self.seen = seen

    def forward(self, site, x, k):
        if k < x.shape[1]:
            x = x * (self.seen[site] != 0)
        return sg.xp.where(self.nodes[self.slices[site]], x, self.frozen[site])


class Recorder:
    """A hook that keeps the nodes' values: `seen` is {site: [N, C]}. hook: computes them in place
    of the model's AbsTopK."""

    def __init__(self, hook=None):
        self.seen, self.hook = {}, hook

    def forward(self, site, x, k):
        x = self.hook.forward(site, x, k) if self.hook else sg.abstopk(x, k)[0]
        self.seen[site] = x
        return x


def mean_activations(model, ids):
    """The mean of every node over all tokens of ids [n, T], by node, in the full model with its
    AbsTopK (paper A.5)."""
    def sums(i):
        total, record = np.zeros(n_nodes(model.cfg)), Recorder()
        sg.forward(model.params, ids[i:i + 4], model.cfg, record)
        for site, x in record.seen.items():
            total[node_slices(model.cfg)[site]] = sg.to_host(sg.xp.ones(len(x), x.dtype) @ x)
        return total

    totals = sg.parallel(sums, range(0, len(ids), 4), model.cfg.threads)
    return (sum(totals) / ids.size).astype(model.cfg.dtype)


def activations(model, prompt):
    """{site: [T, C]} of every node of the full model on one prompt, <start> first."""
    record = Recorder()
    sg.forward(model.params, ask.own_prompt(model, prompt).ids, model.cfg, record)
    return {site: sg.to_host(x) for site, x in record.seen.items()}


def resample(model, prompts, text, rng):
    """{site: [N, C]}: the values of every node, position by position, in the full model on windows
    of text [n, T], one drawn for each prompt."""
    record, (B, T) = Recorder(), prompts.ids.shape
    windows = text[rng.choice(len(text), B)][:, :T]
    sg.forward(model.params, windows, model.cfg, record, prompts.last)
    return record.seen


def attention_weights(cache, block):
    """[B, H, T, T + 1] on the host, the sink's share last, from the cache of a forward pass."""
    _, _, _, weights, sink_share, _ = cache[f"h{block}.attention"]
    return sg.to_host(sg.xp.concatenate([weights, sink_share], axis=3))


def delete_weights(w, b, frozen, deleted):  # [in, out], [out], [in], bool [in, out]
    """(w, b) of a matrix with some weights deleted: they are 0, and what they give for frozen
    inputs is in the bias."""
    gone = w * deleted
    return w - gone, b + frozen @ gone


def effective_bias(model, mask, frozen):
    """{node: its bias plus all that frozen inputs give} of the kept nodes that have a bias; of
    attn_out as if no head looked at its sink, which gives nothing."""
    out, edges = {}, kept_edges(mask, model.params, model.cfg)
    for name, m in matrices(model.cfg).items():
        w, b = (sg.to_host(model.params[x]).astype(np.float64) for x in (name, m.bias))
        _, b = delete_weights(w, b, frozen[m.source], ~edges[name])
        out |= {m.target.start + int(j): float(b[j]) for j in np.flatnonzero(mask.nodes[m.target])}
    return out


class PlainRunner:
    """Runs circuits of a model on fixed prompts: the whole model, with a hook that freezes nodes.
    This is the definition of a circuit, and of its losses. Searches run the same, faster.

    frozen: by node. text, rng: deleted nodes take values on other text instead, which is a
    stronger ablation, as these can mislead. Deleted edges stay frozen at `frozen`.
    """

    def __init__(self, model, frozen, prompts, text=None, rng=None):
        self.model, self.frozen, self.parts = model, frozen, prompts.parts()
        self.values = [frozen if text is None else resample(model, part, text, rng)
                       for _, part in self.parts]

    def params(self, mask):
        """The parameters with deleted edges: weight 0, and the frozen input in the bias."""
        if mask.edges is None:
            return self.model.params
        out = dict(self.model.params)
        for name, m in matrices(self.model.cfg).items():
            deleted = np.outer(mask.nodes[m.source], mask.nodes[m.target]) & ~mask.edges[name]
            out[name], out[m.bias] = delete_weights(
                out[name], out[m.bias], sg.xp.asarray(self.frozen[m.source]),
                sg.xp.asarray(deleted))
        return out

    def hook(self, mask, params, part, values):
        """The hook for one part of the prompts."""
        return Ablation(mask.nodes, values, self.model.cfg)

    def logits(self, mask):
        """Logits at the deciding positions [n, V], on the host, in the order of the prompts."""
        params, n = self.params(mask), sum(len(index) for index, _ in self.parts)
        out = np.empty((n, self.model.cfg.vocab_size), self.model.cfg.dtype)
        for (index, part), values in zip(self.parts, self.values):
            hook = self.hook(mask, params, part, values)
            logits, _ = sg.forward(params, part.ids, self.model.cfg, hook, part.last)
            out[index] = sg.to_host(logits)
        return out


class FastRunner(PlainRunner):
    """The numbers of PlainRunner, to rounding, about 30 times as fast for 24 nodes of 5,888. It is
    the same forward pass, with the kept rows and columns of the matrices alone, and a hook that
    returns arrays of kept channels.

    A head is live if it has a kept node that matters: a kept channel reads the head, or AbsTopK
    compares the node with those of other heads. All channels of a live head are run, the frozen
    ones from their bias. What the other heads write, the idle ones, depends on the position alone.
    """

    def __init__(self, model, frozen, prompts):
        super().__init__(model, frozen, prompts)
        cfg, p = model.cfg, model.params
        self.host, self.idle = {name: sg.to_host(w) for name, w in p.items()}, {}
        for i in range(cfg.n_layer):  # outputs of all heads by position [n_ctx, C], nodes frozen
            h = f"h{i}."
            qkv = sg.xp.asarray(frozen[matrices(cfg)[h + "attn.wqkv"].target])
            self.idle[h] = sg.to_host(sg.attention(
                sg.xp.tile(qkv, (cfg.n_ctx, 1)), p.get(h + "attn.sink"),
                p.get(h + "attn.relbias"), 1, cfg.d_head)[0])

    def sliced(self, mask, name, columns):
        """(w [in, columns], b) of a matrix, without the weights of deleted nodes and edges: see
        `delete_weights`."""
        m = matrices(self.model.cfg)[name]
        deleted = ~mask.nodes[m.source, None]
        if name.endswith("wo"):  # frozen values still pass through attention
            deleted = np.zeros_like(deleted)
        if mask.edges is not None:
            deleted = deleted | (mask.nodes[m.source, None] & ~mask.edges[name][:, columns])
        return delete_weights(self.host[name][:, columns], self.host[m.bias][columns],
                              self.frozen[m.source], deleted)

    def live_channels(self, mask, h):
        """Bool [C]: the channels of a block's live heads; at least one head, as attention needs
        one."""
        cfg = self.model.cfg
        q, k, v, out = (mask.nodes[node_slices(cfg)[h + x]] for x in ("q", "k", "v", "attn_out"))
        compared = max(x.sum() for x in (q, k, v)) > cfg.n_active(cfg.d_model)
        matters = (self.host[h + "attn.wo"][:, out] != 0).any(1) | compared
        live = np.array([q | k | v, matters]).reshape(2, -1, cfg.d_head).any(2).all(0)
        live[0] |= not live.any()
        return np.repeat(live, cfg.d_head)

    def params(self, mask):
        """The kept rows and columns of the parameters, with frozen inputs in the biases. Beside
        them, for the hook: {site: where its kept channels stand in x}, and what idle heads write
        by position, h0.idle [n_ctx, kept attn_out]."""
        cfg, slices, p = self.model.cfg, node_slices(self.model.cfg), {}
        kept = {site: mask.nodes[channels] for site, channels in slices.items()}
        for h in (f"h{i}." for i in range(cfg.n_layer)):
            live = self.live_channels(mask, h)
            columns = np.flatnonzero(np.tile(live, 3))
            w, b = self.sliced(mask, h + "attn.wqkv", columns)
            alive = np.concatenate([kept[h + x][live] for x in "qkv"])
            frozen = np.concatenate([self.frozen[slices[h + x]][live] for x in "qkv"])
            p[h + "attn.wqkv"] = w[kept[h + "attn_in"]] * alive
            p[h + "attn.bqkv"] = np.where(alive, b, frozen)
            p |= {name: self.host[name][live[::cfg.d_head]]
                  for name in (h + "attn.sink", h + "attn.relbias") if name in self.host}
            w, p[h + "attn.bo"] = self.sliced(mask, h + "attn.wo",
                                              np.flatnonzero(kept[h + "attn_out"]))
            p[h + "attn.wo"], p[h + "idle"] = w[live], self.idle[h][:, ~live] @ w[~live]
            for name, ins, outs in (("fc", "mlp_in", "neuron"), ("proj", "neuron", "mlp_out")):
                w, p[f"{h}mlp.b{name}"] = self.sliced(mask, f"{h}mlp.w{name}",
                                                      np.flatnonzero(kept[h + outs]))
                p[f"{h}mlp.w{name}"] = w[kept[h + ins]]
            kept |= {h + x: kept[h + x][live] for x in "qkv"}
        w, p["head.b"] = delete_weights(self.host["head.w"], self.host["head.b"],
                                        self.frozen[slices["final"]], ~kept["final"][:, None])
        p["head.w"] = w[kept["final"]]
        p = {name: sg.xp.asarray(x, cfg.dtype) for name, x in (self.host | p).items()}
        return p | {site: sg.xp.asarray(np.flatnonzero(x)) for site, x in kept.items()}

    def hook(self, mask, params, part, values):
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

    def __init__(self, cfg, params, part, frozen):
        self.slices, self.params, self.part, self.frozen = node_slices(cfg), params, part, frozen

    def forward(self, site, x, k):
        xp, (h, _, kind), columns = sg.xp, site.rpartition("."), self.params[site]
        if kind == "neuron":
            return sg.abstopk(x, k)[0]
        if kind in ("attn_in", "mlp_in", "final"):
            return sg.abstopk(x[:, columns], k)[0]
        if kind in ("q", "k", "v"):  # where x has all channels of the live heads
            if k < len(columns):
                x = x.copy()
                x[:, columns] = sg.abstopk(x[:, columns], k)[0]
            return x
        if kind == "attn_out":
            last, T = xp.asarray(self.part.last), self.part.ids.shape[1]
            position = last if len(x) == len(last) else xp.arange(len(x)) % T
            x = x + self.params[h + ".idle"][position]
        out = xp.empty((len(x), self.slices["final"].stop - self.slices["final"].start), x.dtype)
        out[...] = xp.asarray(self.frozen[self.slices[site]])
        out[:, columns] = sg.abstopk(x, k)[0]
        return out


def agree(model, frozen, prompts):
    """Compare the fast runner with the plain one on four random circuits, in float64, as rounding
    can change what AbsTopK keeps. Raises RuntimeError, with the first site that differs."""
    cfg, rng = dataclasses.replace(model.cfg, dtype="float64"), np.random.default_rng(0)
    params = {name: w.astype(float) for name, w in model.params.items()}
    model, frozen = model._replace(params=params, cfg=cfg), frozen.astype(float)
    few = prompts.rows(np.arange(min(4, len(prompts.last))))
    runners = [kind(model, frozen, few) for kind in (PlainRunner, FastRunner)]
    # Shares of kept nodes. In the last circuit, no kept channel reads some heads.
    for share, attn_out in (0.05, 0.05), (0.3, 0.3), (0.9, 0.9), (0.9, 0.02):
        mask = CircuitMask(np.concatenate([
            rng.random(part.stop - part.start) < (attn_out if "attn_out" in site else share)
            for site, part in node_slices(cfg).items()]))
        mask = mask._replace(edges={name: kept & (rng.random(kept.shape) < 0.8) for name, kept in
                                    kept_edges(mask, params, cfg).items()})
        seen = []
        for runner in runners:
            (_, part), p = runner.parts[0], runner.params(mask)
            record = Recorder(runner.hook(mask, p, part, frozen))
            logits, _ = sg.forward(p, part.ids, cfg, record, part.last)
            seen.append({site: x for site, x in record.seen.items() if site.endswith("_out")}
                        | {"the unembedding": logits})
        for site, plain in seen[0].items():
            error = float(abs(plain - seen[1][site]).max())
            if not error <= 1e-8 * (1 + float(abs(plain).max())):
                raise RuntimeError(f"it is off by {error:.2g}, first at {site}")


def quickest(model, frozen, prompts):
    """A FastRunner if it agrees with the model as it runs, else a PlainRunner."""
    try:
        agree(model, frozen, prompts)
        return FastRunner(model, frozen, prompts)
    except Exception as e:  # it may fail in any way
        print(f"FastRunner does not fit the forward pass ({type(e).__name__}: {e}); circuits are "
              "tried with the model itself, about 30 times slower", file=sys.stderr)
        return PlainRunner(model, frozen, prompts)


# ---- the search ---------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides a search. Raises UserError on a wrong value."""
    target: float = 0.15     # binary loss in nats that the circuit may have
    ablation: str = "mean"   # what deleted nodes are frozen at: mean, zero, or resample
    runs: int = 1            # mask trainings; one more, to half the goal, if all fell short
    steps: int = 400         # of each
    pairs: int = 8           # prompt pairs a step
    search_pairs: int = 64   # pairs that the loss is measured on; masks see twice as many
    seed: int = 0

    def __post_init__(self):
        if self.ablation not in ("mean", "zero", "resample"):
            raise sg.UserError(f"ablation must be mean, zero or resample, not {self.ablation!r}")
        for name, low, high in (("target", 0.0001, 0.69), ("runs", 1, 9), ("steps", 1, 100_000),
                                ("pairs", 1, 1000), ("search_pairs", 1, 1000),
                                ("seed", 0, 1 << 31)):
            value = getattr(self, name)
            if not isinstance(value, (int, float) if name == "target" else int) or (
                    not low <= value <= high):  # nor is NaN
                raise sg.UserError(f"--{name} must be from {low} to {high}, not {value!r}")

    def limit(self):
        """(loss, what it is) up to which checks of a loss pass: chance proves nothing."""
        return min((2 * self.target, "twice the target"), (0.35, "half of chance"))


# k_coef (loss per node kept), rate and temperature of the runs, in the order of their use.
TRIALS = ((1e-3, 0.03, 1.0), (1e-3, 0.01, 1.0), (1e-3, 0.03, 0.3))
TOO_LARGE = 2000  # edges that are not cleaned: thousands of trials, a tenth of a second each


class PruningTask:
    """A model and a task to find circuits for: the prompts, and the values of deleted nodes.

    Masks are learned on `pool`. Losses are measured on `judged`, the first half of it. Nothing is
    chosen by the held-out prompts. labels: see `make_prompts`.
    """

    def __init__(self, model, frozen, name, settings, labels="true"):
        self.model, self.frozen, self.name, self.settings = model, frozen, name, settings
        self.text = model.text if settings.ablation == "resample" else None
        self.pool = make_prompts(model, name, 2 * settings.search_pairs, settings.seed,
                                 labels=labels)
        n = len(self.pool.last)
        self.judged = self.pool.rows(np.arange(n // 4 * 2 or n))  # whole pairs
        self.held = make_prompts(model, name, settings.search_pairs, settings.seed, "held")
        self.losses = {}  # by a digest of the mask
        self.runner = quickest(model, frozen, self.judged) if self.text is None else PlainRunner(
            model, frozen, self.judged, self.text, np.random.default_rng(settings.seed))

    def frozen_for(self, prompts, rng):
        """The values of deleted nodes in one run on some prompts."""
        return self.frozen if self.text is None else resample(self.model, prompts, self.text, rng)

    def loss(self, mask):
        """The binary loss of a mask. It is remembered: cleaning asks for many of them twice."""
        kept = mask.nodes, *(mask.edges or {}).values()
        key = hashlib.sha256(b"".join(np.packbits(x).tobytes() for x in kept)).digest()
        if key not in self.losses:
            self.losses[key] = logistic(margins(self.runner.logits(mask), self.judged))
        return self.losses[key]

    def full_loss(self):
        """The binary loss of the full model."""
        return self.loss(every_node(self.model.cfg))

    def size(self, mask):
        """(nodes, edges) of a mask: the numbers that are reported."""
        edges = kept_edges(mask, self.model.params, self.model.cfg)
        return int(mask.nodes.sum()), int(sum(kept.sum() for kept in edges.values()))


def shared_masks(cfg):
    """The number of the mask of every node: a query channel and its key channel share one."""
    mask, slices = np.arange(n_nodes(cfg)), node_slices(cfg)
    for i in range(cfg.n_layer):
        mask[slices[f"h{i}.k"]] = mask[slices[f"h{i}.q"]]
    return np.unique(mask, return_inverse=True)[1].reshape(-1)


def gradient(model, prompts, nodes, frozen):
    """(binary loss, its gradient by every node's mask) of prompts."""
    hook = Ablation(nodes, frozen, model.cfg)
    logits, cache = sg.forward(model.params, prompts.ids, model.cfg, hook, prompts.last)
    logits, rows = sg.to_host(logits), np.arange(len(prompts.last))
    margin, dlogits = margins(logits, prompts), np.zeros_like(logits)
    slope = np.exp(-np.logaddexp(0, margin)) / len(rows)  # the wrong answer's probability
    dlogits[rows, prompts.right], dlogits[rows, prompts.wrong] = -slope, slope
    sg.backward(sg.xp.asarray(dlogits), cache, model.cfg, weights=False)
    return logistic(margin), sg.to_host(hook.grad).astype(np.float64)


def learn_masks(task, k_coef, lr, temperature, seed, progress, target):
    """Train a mask over nodes; returns (nodes from most to least needed, tau by node).

    A node is kept where its tau >= 0; the gradient passes as that of a sigmoid (paper A.5). AdamW,
    gradient norm at most 1, rate falling to 0, tau held to [-1, 1]. Nodes are ranked by tau; those
    at 1 by importance, the average estimated loss increase if removed. k_coef, the cost of a node,
    rises while the loss is under `target` and falls while it is over: the right cost differs ten
    times between tasks, and a wrong one gives circuits that are far too large, or useless.
    """
    s, model = task.settings, task.model
    rng, mask = np.random.default_rng([s.seed, *seed]), shared_masks(model.cfg)
    count = np.bincount(mask)  # nodes of each mask
    tau = rng.normal(0.1, 0.01, len(count))
    m, v, importance = np.zeros_like(tau), np.zeros_like(tau), np.zeros_like(tau)
    n_pairs, smooth = len(task.pool.last) // 2, target
    for step in range(s.steps):
        pick = 2 * rng.choice(n_pairs, min(s.pairs, n_pairs), replace=False)
        batch = task.pool.rows(np.sort(np.concatenate([pick, pick + 1])))
        loss, by_node = gradient(model, batch, (tau >= 0)[mask], task.frozen_for(batch, rng))
        by_mask = np.bincount(mask, by_node)
        importance = 0.95 * importance - 0.05 * by_mask
        smooth = 0.9 * smooth + 0.1 * loss
        k_coef = max(1e-5, k_coef * math.exp(0.05 * (1 - min(2, smooth / target))))
        soft = 1 / (1 + np.exp(-tau / temperature))
        g = (by_mask + k_coef * count) * soft * (1 - soft) / temperature
        g /= max(1, math.sqrt(g @ g))
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        move = m / (1 - 0.9 ** (step + 1)) / (np.sqrt(v / (1 - 0.95 ** (step + 1))) + 1e-8)
        tau = np.clip(tau - lr * (1 - step / s.steps) * (move + 1e-3 * tau), -1, 1)
        progress("learning masks", step + 1, s.steps,
                 f"loss {loss:.3f}, {count[tau >= 0].sum()} nodes, ")
    rank = np.empty(len(tau), np.int64)
    rank[np.lexsort((-importance, -tau))] = np.arange(len(tau))
    return np.argsort(rank[mask], kind="stable"), tau[mask]


def rank_by_attribution(task):
    """Nodes by the estimated loss increase if each is removed: gradient x (activation - frozen
    value). Learned masks are compared with this baseline."""
    nodes, rng = every_node(task.model.cfg).nodes, np.random.default_rng(0)
    increase = sum(-gradient(task.model, part, nodes, task.frozen_for(part, rng))[1] * len(index)
                   for index, part in task.pool.parts())
    return np.argsort(-increase, kind="stable")


def top_nodes(order, n):
    """The mask of the first n nodes of an order."""
    nodes = np.zeros(len(order), bool)
    nodes[order[:n]] = True
    return CircuitMask(nodes)


def bisect(order, good, guess=0):
    """The mask of the fewest first nodes of an order for which `good` holds, or None if it does
    not hold for all of them. Bisection assumes that more nodes never hurt, which is nearly true.
    So it first looks at `guess` nodes, those of a learned mask, and doubles from there."""
    low, high, middle = -1, len(order), min(guess, len(order) - 1)
    while high - low > 1:
        if good(top_nodes(order, middle)):
            high = middle
        else:
            low = middle
        middle = (low + high) // 2 if high < len(order) else min(2 * low + 1, high - 1)
    return top_nodes(order, high) if high < len(order) or good(top_nodes(order, high)) else None


def delete_greedily(mask, items, loss, target, progress, stage, loss_without):
    """The mask without every item that it can do without: none that is left can go alone.

    Items are tried in passes, in the order of the loss without each (kept in `loss_without`, from
    when it was last tried alone). They go in groups that double where the loss stays within the
    target, and are halved where it does not. The last pass tries every item that is left.
    """
    left = items(mask)
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
            value = loss(trial := mask.without(group))
            if value <= target:
                mask, deleted, i, size = trial, True, i + len(group), 2 * size
            elif len(group) > 1:
                size = len(group) // 2
            else:
                loss_without[group[0]], i = value, i + 1
            progress(stage, i, len(left))
        left = sorted(items(mask), key=loss_without.get) if deleted else []
    return mask


def disconnected_nodes(mask, model, prompts):
    """The kept nodes without a path of edges from a token of the prompts, or without one to the
    logits. Between blocks a path follows a channel of the residual stream; a head's query and key
    channels lead to its values."""
    cfg, slices, nodes = model.cfg, node_slices(model.cfg), mask.nodes
    edges, writers = kept_edges(mask, model.params, cfg), ("wo", "wproj")
    stream = (sg.to_host(model.params["wte"])[np.unique(prompts.ids)] != 0).any(0)
    if cfg.positions == "learned":
        stream |= (sg.to_host(model.params["wpe"]) != 0).any(0)
    fed, used = np.zeros_like(nodes), np.zeros_like(nodes)
    for name, m in matrices(cfg).items():  # forward: what can depend on a token
        if not name.endswith(writers):
            fed[m.source] = stream
        fed[m.target] |= (edges[name] & fed[m.source][:, None]).any(0)
        if name.endswith(writers):
            stream = stream | fed[m.target]
    fed[slices["final"]] = stream
    used[slices["final"]] = (sg.to_host(model.params["head.w"]) != 0).any(1)
    stream = used[slices["final"]] & nodes[slices["final"]]
    for name, m in reversed(matrices(cfg).items()):  # backward: what the logits can depend on
        if name.endswith(writers):
            used[m.target] = stream
        used[m.source] |= (edges[name] & used[m.target]).any(1)
        if name.endswith("wo"):
            h = name.split(".")[0]
            heads = (used[m.source] & nodes[m.source]).reshape(-1, cfg.d_head).any(1)
            used[slices[f"{h}.q"]] = used[slices[f"{h}.k"]] = np.repeat(heads, cfg.d_head)
        elif not name.endswith("wproj"):  # a reader of the residual stream
            stream = stream | (used[m.source] & nodes[m.source])
    return np.flatnonzero(nodes & ~(fed & used))


def importance(task, mask):
    """{node: the loss if it alone is deleted, less the circuit's} of the kept nodes."""
    loss = task.loss(mask)
    return {int(n): task.loss(mask.without([n])) - loss for n in np.flatnonzero(mask.nodes)}


def minor_groups(task, mask, effect):
    """The nodes of less than a tenth of the largest importance, in connected groups, [[node]]: by
    an edge, a channel of the residual stream, or as neighbours in a head. effect: `importance`."""
    cfg, model = task.model.cfg, task.model
    minor = {n for n in effect if effect[n] < 0.1 * max(effect.values())}
    links = residual_links(mask, cfg)
    for name, i, j in edge_list(kept_edges(mask, model.params, cfg)):
        m = matrices(cfg)[name]
        links.append((m.source.start + i, m.target.start + j))
    for i, head in heads_of(mask, cfg):
        nodes = head_nodes(mask, cfg, f"h{i}", head)
        links += zip(nodes, nodes[1:])
    group = {n: {n} for n in minor}
    for a, b in links:
        if a in minor and b in minor and group[a] is not group[b]:
            group[a] |= group[b]
            group |= dict.fromkeys(group[b], group[a])
    return [sorted(nodes) for nodes in {id(g): g for g in group.values()}.values()]


class SearchResult(NamedTuple):
    """What a search ends with. mask: None if no ranking reached the target."""
    mask: CircuitMask | None
    loss: float
    stages: list  # size and loss after each


def training_target(target, full):
    """The loss that masks are trained to, for a target and the full model's loss: midway. Masks
    that are trained to nearly the target end over it about half of the time. Their ranking may
    then need all nodes, and differs more between seeds: see docs/defaults.md. A control, whose
    full model is over the target, is treated like a task that the model does perfectly."""
    return (target + (full if full < target else 0)) / 2


def search(task, progress, seed=0):
    """Find a small circuit: learn masks, take the fewest nodes by rank, clean nodes and edges.

    The runs differ in hyperparameters and seed; the one with the fewest edges at the target is
    cleaned. The same settings and seed give the same circuit.
    """
    s, best, best_loss, stages = task.settings, None, math.inf, []

    def stage(name, mask):
        nodes, edges = task.size(mask)
        stages.append(dict(stage=name, nodes=nodes, edges=edges, loss=task.loss(mask)))

    goal, i, short = training_target(s.target, task.full_loss()), 0, True
    while i < s.runs or (short and i == s.runs):
        k_coef, lr, temperature = TRIALS[i % len(TRIALS)]
        order, tau = learn_masks(task, k_coef, lr, temperature, [seed, i], progress,
                                 goal / 2 if i == s.runs else goal)
        learned, i = CircuitMask(tau >= 0), i + 1
        mask = bisect(order, lambda m: task.loss(m) <= s.target, int(learned.nodes.sum()))
        loss, size = task.loss(learned), mask and task.size(mask)
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
    mask = clean(task, mask, stage, progress)
    return SearchResult(mask, task.loss(mask), stages)


def clean(task, mask, stage, progress):
    """The mask without every node and edge that can go alone, one after another, until none can,
    and without disconnected nodes and groups of minor ones if the loss allows. A circuit of over
    TOO_LARGE edges stays as it is."""
    model, target = task.model, task.settings.target
    if task.size(mask)[1] > TOO_LARGE:
        stage("not cleaned: too large", mask)
        return mask

    def nodes(m):
        return np.flatnonzero(m.nodes).tolist()

    def nodes_and_edges(m):
        return nodes(m) + edge_list(kept_edges(m, model.params, model.cfg))

    mask = mask._replace(edges=kept_edges(mask, model.params, model.cfg))
    mask = delete_greedily(mask, nodes, task.loss, target, progress, "cleaning nodes", {})
    stage("nodes cleaned", mask)
    size, loss_without = None, {}
    while task.size(mask) != size:
        size = task.size(mask)
        mask = delete_greedily(mask, nodes_and_edges, task.loss, target, progress,
                               "cleaning edges", loss_without)
        groups = minor_groups(task, mask, importance(task, mask))
        for group in (disconnected_nodes(mask, model, task.pool), *groups):
            if len(group) and task.loss(mask.without(group)) <= target:
                mask = mask.without(group)
    stage("edges cleaned", mask)
    return mask


# ---- a model and its tasks ----------------------------------------------------------------------

def fingerprint(model):
    """16 hex digits that name a model: of its parameters and merges."""
    digest = hashlib.sha256(json.dumps(model.tok.merges).encode())
    for name in sg.shapes(model.cfg):
        digest.update((sg.to_host(model.params[name]) + 0).tobytes())  # a file has no -0
    return digest.hexdigest()[:16]


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
    """A model, and what its tasks share: its fingerprint, and the values of deleted nodes, frozen,
    by node."""

    def __init__(self, model, ablation="mean"):
        self.model, self.ablation, self.fingerprint = model, ablation, fingerprint(model)
        self.frozen = np.zeros(n_nodes(model.cfg), model.cfg.dtype) if ablation == "zero" else (
            mean_activations(model, model.text))


@dataclasses.dataclass
class Circuit:
    """A task's circuit. record: all that is saved, printed and drawn, whatever mask is set."""
    task: str
    settings: Settings
    mask: CircuitMask
    record: dict

    @property
    def nodes(self):
        """The names of its nodes, in the order of computation."""
        return [node["name"] for node in self.record["nodes"]]

    @property
    def edges(self):
        """[(name, name, weight)] of its edges."""
        return [(e["from"], e["to"], e["weight"]) for e in self.record["edges"]]

    def is_of(self, model):
        """Whether it is of this model's weights, merges and config, but for newer Config fields."""
        record, config = self.record["model"], dataclasses.asdict(model.cfg)
        return record["fingerprint"] == fingerprint(model) and all(
            config[name] == value for name, value in record["config"].items()
            if name not in ("threads", "out"))

    def run(self, model, prompts):
        """Its logits at the deciding positions of Prompts, [n, V]. Raises UserError on a model
        that is not its own."""
        if not self.is_of(model):
            raise sg.UserError(f"the circuit of {self.task} is of another model")
        frozen = ModelContext(model, self.settings.ablation).frozen
        return PlainRunner(model, frozen, prompts).logits(self.mask)


def on_cores(fn, items, workers):
    """fn(item) of every item as they are done, in `workers` processes. Raises UserError if these
    end too early.

    Processes, not threads: with arrays so small, these would wait for the interpreter's lock. One
    worker, and a GPU, stay in this process. Under mpirun the first process deals out the items.
    """
    if workers > 1 and sg.processes().size > 1:
        from mpi4py.futures import MPICommExecutor
        with MPICommExecutor(sg.processes(), 0) as pool:
            if pool:
                yield from pool.map(fn, items, unordered=True)
        return
    if workers == 1 or len(items) < 2 or sg.xp is not np:
        yield from map(fn, items)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
    with program.signals_blocked():  # also in the process that watches over semaphores
        pool = futures.ProcessPoolExecutor(min(workers, len(items)), context, start_worker,
                                           [tasks.added])
    before = set(multiprocessing.active_children())
    try:
        with program.signals_blocked():  # also in the workers, which begin here: they are for us
            jobs = [pool.submit(fn, item) for item in items]
        for job in futures.as_completed(jobs):
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
    def end_with_parent():  # nobody is left to take the results
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    for path in added:
        tasks.load(path)
    sg.keep_freed_memory()


def run_search(name, job):
    """(job's name, SearchResult) of a job (name, PruningTask, seed of the masks)."""
    key, task, seed = job
    return key, search(task, program.Progress(name and f"{name}, {key}"), seed)


def prune(model, name, settings=Settings(), context=None, seeds=2, workers=1, shown=True,
          checks=True):
    """The Circuit of a task, with its checks (paper 2.2, A.5; the method is at the top).

    context: shared by the tasks of a model. seeds: searches with different mask seeds; the first
    is reported, the others are compared with it. workers: processes; the result is the same.
    shown: whether progress is. checks: without, there are no controls or other seeds, and it takes
    a fifth of the time. Raises CannotPrune if the model cannot do the task, UserError on an
    unknown task, another context, or values to resample, for which docs/compare.py alone is made.
    """
    context = context or ModelContext(model, settings.ablation)
    if (context.fingerprint, context.ablation) != (fingerprint(model), settings.ablation) or (
            settings.ablation == "resample"):
        raise sg.UserError("the context is of another model or ablation, or of resampling")
    task = PruningTask(model, context.frozen, name, settings)
    if not (full := task.full_loss()) <= settings.target:  # NaN is neither
        raise CannotPrune(f"the full model's loss on {name} is {full:.3f}, over the target of "
                          f"{settings.target:g}")
    jobs = [("circuit", task, 0)]
    if checks:
        control = ModelContext(shuffled(model), settings.ablation)
        jobs += [("shuffled", PruningTask(control.model, control.frozen, name, settings), 0)]
        jobs += [(labels, PruningTask(model, context.frozen, name, settings, labels), 0)
                 for labels in ("nonsense", "inverted")]
        jobs += [(f"seed {i}", task, i) for i in range(1, seeds)]
    found = dict(on_cores(functools.partial(run_search, shown and name), jobs, workers))
    return describe(context, task, found)


# ---- checks -------------------------------------------------------------------------------------

def check(name, passed, text, **numbers):
    """One check of a circuit: passed is True, False, or None where it does not apply."""
    return dict(name=name, passed=None if passed is None else bool(passed), text=text,
                **{k: None if v is None else float(v) for k, v in numbers.items()})


def random_like(nodes, rng, cfg):
    """Random nodes, as many at every site as there are in `nodes`; both bool by node."""
    return np.concatenate([rng.permutation(nodes[part]) for part in node_slices(cfg).values()])


def check_necessity(task, mask):
    """Only the circuit's nodes deleted, beside as many random nodes at the same sites."""
    rng, loss = np.random.default_rng(0), task.loss(CircuitMask(~mask.nodes))
    other = sorted(task.loss(CircuitMask(~random_like(mask.nodes, rng, task.model.cfg)))
                   for _ in range(10))
    passed = loss > max(0.35, other[-2]) if mask.nodes.any() else None
    return check("necessity", passed, f"full model without the circuit's "
                 f"{mask.nodes.sum()} nodes: loss {loss:.3f}; without as many random nodes at the "
                 f"same sites: {other[0]:.3f} to {other[-1]:.3f} (pass: above 0.35 nats (half of "
                 "chance) and above 9 of 10 random draws)", loss=loss,
                 random=other[-2], median=np.median(other))


def check_resampled(task, mask, text):
    """Deleted nodes take the values that they have on other text."""
    rng, losses = np.random.default_rng(2), []
    for _ in range(4):
        runner = PlainRunner(task.model, task.frozen, task.judged, text, rng)
        losses.append(logistic(margins(runner.logits(mask), task.judged)))
    (limit, why), loss = task.settings.limit(), float(np.mean(losses))
    return check("resampled ablation", loss <= limit, "deleted nodes at their values on random "
                 f"training text: mean loss of 4 draws {loss:.3f}, {min(losses):.3f} to "
                 f"{max(losses):.3f} (pass: at most {limit:.2f}, {why})", loss=loss)


def check_gated(task, mask):
    """AbsTopK takes its winners in the full model, not among the kept nodes alone."""
    model, margin = task.model, np.zeros(len(task.judged.last))
    params = PlainRunner(model, task.frozen, task.judged).params(mask)
    for index, part in task.judged.parts():
        record = Recorder()
        sg.forward(model.params, part.ids, model.cfg, record, part.last)
        hook = Gated(mask.nodes, task.frozen, model.cfg, record.seen)
        logits, _ = sg.forward(params, part.ids, model.cfg, hook, part.last)
        margin[index] = margins(sg.to_host(logits), part)
    (limit, why), loss = task.settings.limit(), logistic(margin)
    return check("full model's AbsTopK", loss <= limit, "only nodes that are active in the full "
                 f"model are: loss {loss:.3f} (pass: at most {limit:.2f}, {why})", loss=loss)


def check_control(name, found, size, target):
    """A search that should find nothing as small as the circuit; None if it was not run."""
    if found is None:
        return check(name, None, "not run", edges=None)
    if found.mask is None:
        return check(name, True, f"the same search did not reach the target of {target:g}; its "
                     f"best loss was {found.loss:.3f}", loss=found.loss, edges=None, nodes=None)
    last = found.stages[-1]
    note = " (not cleaned)" * ("not cleaned" in last["stage"])
    return check(name, last["edges"] > 2 * size[1], f"the same search found {last['nodes']} nodes "
                 f"and {last['edges']} edges{note}; the circuit has {size[0]} and {size[1]} "
                 "(pass: more than twice its edges)", loss=found.loss, edges=last["edges"],
                 nodes=last["nodes"])


def check_seeds(found, mask):
    """How many nodes the circuits of other mask seeds share with the first."""
    others = [result for job, result in found.items() if job.startswith("seed")]
    if not others:
        return check("other seeds", None, "not run")
    shared, notes = [], []
    for other in others:
        both, either = mask.nodes & other.mask.nodes, mask.nodes | other.mask.nodes
        shared.append(both.sum() / either.sum() if either.any() else 1.0)
        notes.append(f"{other.stages[-1]['nodes']} nodes and {other.stages[-1]['edges']} edges, "
                     f"{shared[-1]:.0%} of both circuits' nodes are shared")
    return check("other seeds", min(shared) >= 0.5, "; ".join(notes) + " (pass: from 50%)",
                 overlap=min(shared))


def check_attention(task, mask):
    """(check, {(block, head): share}): how much of its attention each head of the circuit puts
    where it does in the full model, the mean over all positions of the prompts."""
    cfg, shared = task.model.cfg, defaultdict(list)
    params = PlainRunner(task.model, task.frozen, task.judged.rows([0, 1])).params(mask)
    for _, part in task.judged.parts():
        _, full = sg.forward(task.model.params, part.ids, cfg)
        _, own = sg.forward(params, part.ids, cfg, Ablation(mask.nodes, task.frozen, cfg))
        for i, head in heads_of(mask, cfg):
            both = np.minimum(*(attention_weights(cache, i)[:, head] for cache in (full, own)))
            shared[i, head].append(both.sum(-1)[part.inside()])
    overlap = {head: float(np.concatenate(x).mean()) for head, x in shared.items()}
    if not overlap:
        return check("attention", None, "the circuit has no attention head"), {}
    text = ", ".join(f"h{i}.head.{head} {x:.0%}" for (i, head), x in overlap.items())
    lowest = min(overlap.values())
    return check("attention", lowest >= 0.8, f"shared with the full model's pattern: {text} "
                 "(pass: from 80% each)", overlap=lowest), overlap


# ---- what a circuit's file holds ---------------------------------------------------------------
# A circuit's `record` holds all that is printed and drawn, as plain values: see docs/show.py.

def losses(task, mask):
    """{"full" | "circuit": {"search" | "held": tasks.Score as a dict}} by PlainRunner, on the
    prompts of the search and on held-out ones."""
    out = dict(full={}, circuit={})
    for split, prompts in (("search", task.judged), ("held", task.held)):
        runner = PlainRunner(task.model, task.frozen, prompts)
        for name, which in (("full", every_node(task.model.cfg)), ("circuit", mask)):
            out[name][split] = tasks.score(runner.logits(which), prompts)._asdict()
    return out


def describe(context, task, found):
    """The Circuit of a finished search, with all that is printed and drawn of it. found:
    {"circuit", "nonsense", "inverted", "shuffled", "seed 1", ...: SearchResult}."""
    model, cfg, s, best = context.model, context.model.cfg, task.settings, found["circuit"]
    mask = best.mask._replace(edges=kept_edges(best.mask, model.params, cfg))
    kept, bias = np.flatnonzero(mask.nodes), effective_bias(model, mask, task.frozen)
    effect = importance(task, mask)
    nodes = [dict(name=node_name(n, cfg), importance=effect[n], bias=bias.get(n),
                  mean=float(task.frozen[n]), **reading)
             for n, reading in zip(kept, readings.node_readings(context, task, kept))]
    attention, overlap = check_attention(task, mask)
    shortest = np.argmin(task.pool.last.reshape(-1, 2).max(1))
    pair = task.pool.rows(2 * shortest + np.arange(2))
    example, heads = readings.pair_readings(model, mask, task.frozen, pair, overlap)
    ranked = bisect(rank_by_attribution(task), lambda m: task.loss(m) <= s.target)
    scores, (limit, why), size = losses(task, mask), s.limit(), task.size(mask)
    full, held = (scores[x]["held"]["binary"] for x in ("full", "circuit"))
    checks = [
        check("held-out prompts", held <= limit, f"other words and larger shapes: loss {held:.3f},"
              f" full model {full:.3f} (pass: at most {limit:.2f}, {why})", loss=held),
        check_necessity(task, mask), check_resampled(task, mask, model.text),
        check_gated(task, mask),
        check_control("nonsense task", found.get("nonsense"), size, s.target),
        check_control("inverted task", found.get("inverted"), size, s.target),
        check_control("shuffled weights", found.get("shuffled"), size, s.target),
        attention, check_seeds(found, mask)]
    groups = [dict(nodes=[node_name(n, cfg) for n in group],
                   effect=task.loss(mask.without(group)) - task.loss(mask))
              for group in minor_groups(task, mask, effect)]
    links = readings.connections(model, mask, task.pool)
    numbers = *size, *task.size(every_node(cfg)), len(links["embed"]), len(links["unembed"])
    return Circuit(task.name, s, mask, dict(
        links, doc=tasks.title(task.name),
        prompts={"search": len(task.judged.last), "held": len(task.held.last)},
        model=dict(path=cfg.out, fingerprint=context.fingerprint, config=dataclasses.asdict(cfg)),
        size=dict(zip(("nodes", "edges", "model_nodes", "model_edges", "embed", "unembed"),
                      numbers)),
        attribution=dict(zip(("nodes", "edges"), task.size(ranked))),
        losses=scores, stages=best.stages, checks=checks, nodes=nodes, groups=groups,
        heads=heads, example=example, seeds=1 + sum(job.startswith("seed") for job in found)))


# ---- files --------------------------------------------------------------------------------------

def digest(record):
    """The checksum that a circuit's file holds of its content. Raises ValueError on NaN."""
    text = json.dumps(record, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def save(path, circuit):
    """Write a Circuit as JSON: all that reproduces its losses. Raises UserError if it cannot be
    written."""
    record = dict(format=FORMAT, task=circuit.task,
                  settings=dataclasses.asdict(circuit.settings), **circuit.record)
    text = json.dumps(dict(record, sha256=digest(record)), indent=1, ensure_ascii=False)
    program.write_text(path, text)


def load(path):
    """The Circuit in a file. Raises UserError if it is missing, damaged, or not a circuit."""
    try:
        record = json.loads(program.read_bytes(path).decode("utf-8", "surrogatepass"))
        if record.pop("sha256") != digest(record):
            raise ValueError("its content does not match its checksum")
        if record.pop("format") != FORMAT:
            raise ValueError("it is of another version")
        cfg = sg.Config(**record["model"]["config"])
        if not record["task"].isidentifier() or record["settings"]["ablation"] == "resample":
            raise ValueError("there is no such search")
        if sg.n_params(cfg) > 1 << 30:
            raise ValueError("its model is too large")
        nodes = np.zeros(n_nodes(cfg), bool)
        nodes[[node_number(node["name"], cfg) for node in record["nodes"]]] = True
        edges = {name: np.zeros(sg.shapes(cfg)[name], bool) for name in matrices(cfg)}
        for e in record["edges"]:
            i, j = node_number(e["from"], cfg), node_number(e["to"], cfg)
            [(name, m)] = [(name, m) for name, m in matrices(cfg).items()
                           if m.source.start <= i < m.source.stop
                           and m.target.start <= j < m.target.stop]
            edges[name][i - m.source.start, j - m.target.start] = True
        circuit = Circuit(record.pop("task"), Settings(**record.pop("settings")),
                          CircuitMask(nodes, edges), record)
        records.check(record, [node_name(n, cfg) for n in np.flatnonzero(nodes)])
        return circuit
    except FileNotFoundError as e:
        raise sg.UserError(f"no file {path}; make one with: python prune.py TASK") from e
    except OSError as e:
        raise sg.UserError(f"cannot read {path}: {e.strerror or e}") from e
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError,
            RecursionError) as e:
        raise sg.UserError(f"{path} is damaged or not a circuit ({type(e).__name__}: {e})") from e


def verify(circuit, context):
    """Compute the losses of a circuit and of the full model again, and read weights, means and
    sizes off the model; not what checks and cleaning measured. Returns a line for each that
    differs from the file by more than 1e-4; rounding differs between machines."""
    task = PruningTask(context.model, context.frozen, circuit.task, circuit.settings)
    again, r, said = losses(task, circuit.mask), circuit.record, circuit.record["losses"]
    pairs = {f"{which}, {split} prompts, {name}": (said[which][split][name], new)
             for which, by_split in again.items() for split, score in by_split.items()
             for name, new in score.items()}
    for kind, links in readings.connections(context.model, circuit.mask, task.pool).items():
        old, new = (sorted(([e[key] for key in ("from", "token", "to") if key in e],
                            e.get("weight", 0)) for e in some) for some in (r[kind], links))
        pairs[f"the number of {kind}"] = len(old), len(new)
        pairs |= {f"{kind}, {' '.join(a)}": (w, v if a == b else math.nan)
                  for (a, w), (b, v) in zip(old, new)}
    for node in r["nodes"]:
        mean = context.frozen[node_number(node["name"], context.model.cfg)]
        pairs[f"the mean of {node['name']}"] = node["mean"], float(mean)
    sizes_ = *task.size(circuit.mask), *task.size(every_node(context.model.cfg))
    pairs |= {name: (r["size"][name], n)
              for name, n in zip(("nodes", "edges", "model_nodes", "model_edges"), sizes_)}
    pairs |= {f"{split} prompts": (r["prompts"][split], len(prompts.last))
              for split, prompts in (("search", task.judged), ("held", task.held))}
    return [f"{name}: the file says {old}, the model gives {new}"
            for name, (old, new) in pairs.items() if not abs(old - new) <= 1e-4]


def save_drawings(path, circuit):
    """Write the page and the graph beside a circuit's file."""
    program.write_text(path.with_suffix(".html"), show.page(circuit))
    program.write_text(path.with_suffix(".dot"), show.dot(circuit.record))


# ---- command line -------------------------------------------------------------------------------

def finish(folder, circuit, context):
    """Save a circuit and its drawings. Returns the circuit as read back from its file. Raises
    UserError if that does not reproduce its losses."""
    path = Path(folder, f"{circuit.task}.json")
    save(path, circuit)
    saved = load(path)
    if wrong := verify(saved, context):
        raise sg.UserError(f"{path} does not reproduce its losses: {wrong[0]}")
    save_drawings(path, saved)
    return saved


def prune_one(context, settings, folder, seeds, task):
    """(task, its Circuit or None, a line of text). A finished circuit in the folder is kept if it
    is of this model and these settings, and has its losses on the task as it is now."""
    path, asked = Path(folder, f"{task}.json"), (task, settings, seeds)
    try:
        circuit = load(path)
        r = circuit.record
        kept = (circuit.task, circuit.settings, r["seeds"]) == asked
        kept &= all(c["passed"] is not None for c in r["checks"] if "edges" in c)  # with controls
        kept = kept and circuit.is_of(context.model) and not verify(circuit, context)
    except sg.UserError:
        kept = False
    try:
        if kept:
            save_drawings(path, circuit)  # the earlier run may have been stopped before it drew
        else:
            circuit = prune(context.model, task, settings, context, seeds, shown=False)
            circuit = finish(folder, circuit, context)
    except CannotPrune as e:
        return task, None, f"not pruned: {e}"
    size = circuit.record["size"]
    note = ", kept from an earlier run" if kept else ""
    return task, circuit, f"{size['nodes']} nodes, {size['edges']} edges{note}"


def prune_all(context, settings, folder, seeds, workers, log=print):
    """Prune every task, several at a time, and write the summary."""
    began, rows, n = time.perf_counter(), dict.fromkeys(tasks.TASKS), len(tasks.TASKS)
    one = functools.partial(prune_one, context, settings, folder, seeds)
    for i, (task, *row) in enumerate(on_cores(one, list(tasks.TASKS), workers), 1):
        rows[task] = row
        left = (time.perf_counter() - began) * (n - i) / i
        log(f"{i:>2} of {n}  {task:<28} {row[1]}; {program.clock(left)} left")
    path = Path(folder, "summary.html")
    log(f"\n{show.summary(rows)}")
    program.write_text(path, show.summary_page(rows))
    log(f"wrote {path}, which shows all of them")


def make_parser():
    """The flags. Those that are not given are absent from the result."""
    parser = program.Parser(description="Prune a trained model to the circuit of a task.",
                          argument_default=argparse.SUPPRESS)
    parser.add_argument("task", nargs="?", help="a task's name, or all; without: list them")
    add_settings(parser, ("mean", "zero"))
    parser.add_argument("--verbose", action="store_true", help="print all that was found: stages, "
                        "checks, every node with the tokens at which it is high and low")
    for name, kind, text in (
            ("model", str, "checkpoint (default out/sparse.npz, else docs/long.npz)"),
            ("out", str, "folder for circuits (default circuits)"),
            ("tasks", str, "a Python file with tasks of one's own, as docs/my_tasks.py"),
            ("runs", int, "mask trainings in a search, 1 to 9 (default 1)"),
            ("pairs", int, "prompt pairs in a step of mask training (default 8)"),
            ("seeds", int, "searches that are compared (default 2)")):
        parser.add_argument(f"--{name}", type=kind, help=text)
    parser.add_argument("--answers", nargs=2, metavar="ANSWER",
                        help="with --ask or --trace: the two to compare")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--check", metavar="FILE", help="compute a saved circuit's losses again")
    modes.add_argument("--explain", nargs="?", metavar="PROMPT", help="print the values "
                       "of the saved circuit's nodes on a pair of prompts, or on PROMPT")
    modes.add_argument("--trace", metavar="PROMPT", help="the paths through the full model that "
                       "make it prefer its likeliest token after PROMPT; no task is needed")
    for name, metavar, kind, text in (
            ("ask", "PROMPT", str, "what the full model and the saved circuit answer to a prompt"),
            ("set", "NODE=VALUE", program.node_and_value, "run the full model with a node frozen"),
            ("ablate", "NODE", str, "the same at its mean; of a head, as h1.head.5: all of it")):
        modes.add_argument(f"--{name}", action="append", type=kind, metavar=metavar,
                           help=f"{text}; may be repeated")
    return parser


def add_settings(parser, ablations):
    """Add the flags of a search that docs/compare.py shares."""
    add = parser.add_argument
    add("--target", type=float, help="binary loss in nats of a circuit (default 0.15)")
    add("--ablation", choices=ablations, help="what deleted nodes are frozen at (default mean)")
    add("--seed", type=int, help="of prompts and masks (default 0)")


def settings_of(given):
    """The Settings of parsed flags. Raises UserError on a value out of range."""
    if not 1 <= given.get("seeds", 1) <= 100:
        raise sg.UserError(f"--seeds must be from 1 to 100, not {given['seeds']}")
    names = given.keys() & {"target", "ablation", "runs", "pairs", "seed"}
    return Settings(**{name: given[name] for name in names})


def load_model(path):
    """The model in a checkpoint, with its path as cfg.out."""
    model = sg.load(path)
    return model._replace(cfg=dataclasses.replace(model.cfg, out=str(path)))


# The flags that each mode looks at beside its own. It refuses the others.
TAKES = dict(list={"model", "out"}, check={"model"}, trace={"model", "answers"},
             explain={"task", "model", "out"}, ask={"task", "model", "out", "answers"},
             set={"task", "model", "seed"}, ablate={"task", "model", "seed"},
             search={"task", "model", "out", "target", "ablation", "runs", "pairs", "seeds",
                     "seed", "verbose"})


def run(argv):
    """What `main` does, if nothing goes wrong."""
    given = vars(make_parser().parse_args(argv))
    if "tasks" in given:
        tasks.load(given["tasks"])
    [mode] = given.keys() & TAKES or ["search" if "task" in given else "list"]
    if more := given.keys() - TAKES[mode] - {mode, "tasks"}:
        raise sg.UserError(f"{'--' * (mode in given)}{mode} takes no "
                           f"{'' if more == {'task'} else '--'}{min(more)}")
    if given.get("task") == "all" and "verbose" in given:
        raise sg.UserError("all takes no --verbose: it prints a line a task")
    settings, task, folder = settings_of(given), given.get("task"), given.get("out", "circuits")
    path = Path(given.get("check", Path(folder, f"{task}.json")))
    if task not in (None, "all"):
        tasks.pairs(task, 1)  # raises UserError on an unknown task
    elif mode not in ("list", "check", "search", "trace"):
        raise sg.UserError(f"--{mode} needs one task; tasks: {', '.join(tasks.TASKS)}")
    sg.use_device(os.environ.get("SPARSEGPT_DEVICE", "cpu"))
    sg.keep_freed_memory()
    circuit = load(path) if mode in ("check", "explain", "ask") else None
    model = load_model(given["model"] if "model" in given else sg.default_model())
    if circuit and not circuit.is_of(model):
        raise sg.UserError(f"{path} is a circuit of another model, not of {model.cfg.out}; name "
                           f"its own with --model: it was {circuit.record['model']['path']}")
    if circuit and task not in (None, circuit.task):
        raise sg.UserError(f"{path} is a circuit of {circuit.task}")
    if mode == "check":
        wrong = verify(circuit, ModelContext(model, circuit.settings.ablation))
        print("\n".join(wrong or [f"{path}: its losses and weights are reproduced"]))
        return int(bool(wrong))
    if mode == "explain":
        text = given["explain"]
        print(explain(circuit.record["example"] if text is None else
                      ask.walk(circuit, model, text)))
    elif mode == "ask":
        print("\n".join(ask.ask(circuit, model, given["ask"], given.get("answers"))))
    elif mode == "trace":
        print("\n".join(trace.trace(model, given["trace"], given.get("answers"))))
    elif mode in ("set", "ablate"):
        values = given.get("set", [(name, None) for name in given.get("ablate", ())])
        values = {n: value for name, value in values for n in nodes_named(name, model.cfg)}
        print("\n".join(ask.intervene(model, task, values, settings)))
    elif mode == "list":
        print("\n".join(ask.overview(model, folder)))
    else:
        if sg.processes().rank:
            return len([*on_cores(None, (), 2)])  # which deals it work, in the end
        for name in tasks.TASKS if task == "all" else [task]:
            program.refuse_others(Path(folder, name), ".json", ".html", ".dot")
        if task == "all":
            program.refuse_others(Path(folder, "summary"), ".html")
        context, seeds = ModelContext(model, settings.ablation), given.get("seeds", 2)
        workers = max(model.cfg.threads or sg.n_cores(), sg.processes().size)
        with program.locked(folder):
            if task == "all":
                prune_all(context, settings, folder, seeds, workers)
                return 0
            circuit = prune(model, task, settings, context, seeds, workers=workers)
            circuit = finish(folder, circuit, context)
        print(listing(circuit, "verbose" in given))
        *flags, out = (f" --{name} {shlex.quote(given[name])}" if name in given else ""
                       for name in ("tasks", "model", "out"))
        print(f"\nwrote {path}, .html and .dot; "
              f"{show.next_commands(circuit, ''.join(flags), out)}")
    return 0


def main(argv=None):
    """The command line. Returns the exit status: 0, 1 for a circuit that does not reproduce its
    losses, 2 for a mistake, 130 for Ctrl-C."""
    return sg.ended(program.command("prune.py", run, argv, "finished circuits are kept; the same "
                                  "command continues"))


if __name__ == "__main__":
    import prune as module  # so that docs/ask.py and worker processes see the same classes
    sys.exit(module.main())
