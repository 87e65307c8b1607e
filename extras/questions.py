"""Asks a model and its circuits: what they answer, along which paths, and what changes if a node
does. The command line is that of prune.py:

    python prune.py single_double_quote --ask 'print("hello'      # needs the circuit to be found
    python prune.py single_double_quote --ablate h0.neuron.17     # the model, without a node
    python prune.py --trace 'x = f("hello'                        # needs no task and no circuit
    python prune.py --trace 'print("hello' --answers '")' "')"
    python prune.py --trace 'print("hello' --head h1.head.8       # why a head looks where it looks

Every question returns lines of text.
"""
import itertools
import re
import textwrap
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import prune
import sparsegpt as sg
import tasks


# ---- of a circuit -------------------------------------------------------------------------------

def explain(circuit, model, text=None, answers=None, columns=5):
    """Each node of a circuit in it and in the full model, at each token of its pair of prompts;
    nodes that are alike on both are left out. Or of a prompt of one's own, below what both answer,
    see `ask`. Then what the margin is made of, what the circuit's heads look at from the last
    token, most first, and where these nodes are highest and lowest in training text. A list of
    lines."""
    cfg, s, lines = model.cfg, circuit.settings, []
    if text is None:
        pool = prune.make_prompts(model, circuit.task, 2 * s.search_pairs, s.seed)
        prompts = prune.shortest_pair(pool)
    else:
        prompts = prune.own_prompt(model, text, answers)
        lines = ask(circuit, model, [text], answers)
    if not circuit.mask.nodes.any():
        return [*lines, "the circuit has no nodes"]
    heads, frozen = dict.fromkeys(prune.heads_of(circuit.mask, cfg), 1.0), (
        circuit.frozen_values(model))
    (own, looks), (full, looked) = (prune.pair_readings(model, mask, frozen, prompts, heads)
                                    for mask in (circuit.mask, prune.every_node(cfg)))
    names = list(own["values"])
    if text is None:
        names = sg.extra("draw", "prompts are not compared").differing(circuit.report)
        if left := len(own["values"]) - len(names):
            lines = [f"{left} nodes that do not differ between the prompts are left out"]
    which = [*enumerate(own["prompts"])]
    for start, (p, tokens) in itertools.product(range(0, len(names), columns), which):
        some = names[start:start + columns]
        lines.append("" if text is not None else (
            f"\nprompt {p + 1}, right answer {own['answers'][p]}, margin "
            f"{own['margins'][p]:+.3f}, of the full model {full['margins'][p]:+.3f}"))
        lines += [" " * 14 + "".join(f"{name:>16}" for name in some),
                  " " * 14 + f"{'circuit':>8}{'model':>8}" * len(some)]
        lines += [f"{token:<14}" + "".join(f"{side['values'][name][p][t] + 0:8.2f}"  # + 0: no -0
                                           for name in some for side in (own, full))
                  for t, token in enumerate(tokens)]
    lines.append("")
    if text is None or answers:
        for (p, _), (side, said) in itertools.product(which, (("circuit", own), ("model", full))):
            finals = {name: said["values"][name][p][-1] for name in own["values"]
                      if name.startswith("final.")}
            lines += textwrap.wrap(f"margin of prompt {p + 1}, {side:<7} " + margin_sum(
                model, said["margins"][p], prompts.right[p], prompts.wrong[p], finals), 99,
                subsequent_indent="    ")
    for (p, _), *both in itertools.product(which, zip(looks, looked)):
        for side, head in zip(("circuit", "model"), *both):
            lines.append(f"{head['name']}, end of prompt {p + 1}, {side:<7} looks at " + ", ".join(
                f"{sg.one_line(token, '␣')} {w:.2f}" for token, w in head["attends"][p]["to"]))
    lines += ["", "where these are highest and lowest in training text, a row for each [token]"]
    for node in circuit.report["nodes"]:
        if node["name"] in names:
            lines += [node["name"], *prune.reading_lines(node)]
    return lines


def margin_sum(model, margin, right, wrong, values):
    """A margin as a sum: of values of final channels, {name: value}, times their weight for it."""
    w = sg.to_host(sg.unembedding(model.params)).astype(float)
    parts = [(value, w[int(name[6:]), right] - w[int(name[6:]), wrong], name)
             for name, value in values.items()]
    parts = [part for part in parts if part[1]]
    rest = margin - sum(value * weight for value, weight, _ in parts)
    return f"{margin:+.2f} = " + " + ".join(
        [f"{name} {value:+.2f} x {weight:+.2f}" for value, weight, name in parts]
        + [f"all else {rest:+.2f}"])


def ask(circuit, model, texts, answers=None, values=None):
    """Of each prompt: the full model's five likeliest next tokens; and to which of two answers it
    and the circuit lean. The two are the given ones, or else those of the task's pairs that the
    full model finds likeliest there. With values, the same of the full model as `changed`. Raises
    UserError on an unusable prompt."""
    s, lines, tok = circuit.settings, [], model.tok
    frozen, every = circuit.frozen_values(model), prune.every_node(model.cfg)
    sides = {"the full model": (frozen, every), "the circuit": (frozen, circuit.mask)}
    if values:
        sides["the changed model"] = changed(model, values)
    pool = prune.make_prompts(model, circuit.task, 2 * s.search_pairs, s.seed)
    known = np.unique(np.stack([pool.right, pool.wrong], 1)[pool.sign > 0], axis=0)

    def quoted(i):
        return f"`{prune.token(model, i)}`"

    for text in texts:
        one = prune.own_prompt(model, text, answers)
        two = np.stack([one.right, one.wrong], 1) if answers else known
        logits = {side: prune.PlainRunner(model, nodes, one).logits(mask)[0, :len(tok.bytes)]
                  .astype(float) for side, (nodes, mask) in sides.items()}
        p = {side: np.exp(x - np.logaddexp.reduce(x)) for side, x in logits.items()}
        first, second = max(two, key=lambda pair: p["the full model"][pair].sum())
        leans = [x[first] - x[second] for x in logits.values()]
        lines.append(sg.one_line(tok.decode(one.ids[0][1:])))  # with what the answers share
        lines += [f"    {side}'s likeliest: " + ", ".join(
            f"{quoted(i)} {p[side][i]:.1%}" for i in np.argsort(-p[side])[:5])
            for side in sides if side != "the circuit"]
        lines += [f"    logit of {quoted(first)} less that of {quoted(second)}: " + ", ".join(
            f"{side[4:]} {lean:+.3f}" for side, lean in zip(sides, leans))
            + ": full model and circuit DISAGREE" * bool(leans[0] * leans[1] <= 0),
            f"    P of {quoted(first)} and of {quoted(second)}: " + ", ".join(
                f"{side[4:]} {x[first]:.1%} and {x[second]:.1%}" for side, x in p.items())]
    return lines


# ---- of a model ---------------------------------------------------------------------------------

def nodes_to_change(settings, names, cfg):
    """{node number: value, or None for its mean}, of --set, as h0.neuron.504=4.4, and of --ablate:
    nodes, and heads, as h1.head.5, with all their q, k and v channels. Raises UserError."""
    heads = {f"h{i}.head.{head}": nodes
             for (i, head), nodes in prune.heads_of(prune.every_node(cfg), cfg).items()}
    found = [(name, None) for name in names]
    for text in settings:
        name, _, value = text.partition("=")
        with suppress(ValueError):
            if abs(float(value)) <= 1e9:  # NaN is not; larger numbers overflow
                found.append((name, float(value)))
                continue
        raise sg.UserError(f"--set {text[:60]!r} is not NODE=VALUE, with a value from -1e9 to 1e9")
    return {node: value for name, value in found
            for node in heads.get(name if value is None else "") or [
                prune.node_number(name, cfg)]}


def changed(model, values):
    """(values by node, CircuitMask) of the full model with nodes frozen at values, {node number:
    value, or None for its mean}."""
    frozen = prune.mean_activations(model, model.text)
    for node, value in values.items():
        frozen[node] = frozen[node] if value is None else value
    return frozen, prune.every_node(model.cfg).without(values)


def intervene(model, task, values, settings):
    """The full model on a task, unchanged and as `changed`."""
    prompts = prune.make_prompts(model, task, settings.search_pairs, settings.seed)
    frozen, mask = changed(model, values)
    runner = prune.PlainRunner(model, frozen, prompts)
    margins = [runner.margins(kept) for kept in (prune.every_node(model.cfg), mask)]
    lines = [f"full model on {len(prompts.last)} prompts of {task}, unchanged and changed:"]
    lines += [f"    loss {prune.logistic(m):.4f}, accuracy {(m > 0).mean():.1%}" for m in margins]
    for sign, right, wrong in ((1, "first", "second"), (-1, "second", "first")):
        before, after = (m[prompts.sign == sign] for m in margins)
        flipped = ((before > 0) & (after <= 0)).sum()
        lines.append(f"of {len(before)} prompts that should get the {right} answer, {flipped} "
                     f"flip to the {wrong}; mean margin {before.mean():+.3f}, then "
                     f"{after.mean():+.3f}")
    return lines


def overview(model, folder):
    """The tasks with the model's binary loss, and the circuits in a folder; of this model those
    that come with the source, too."""
    lines, scores = [f"{'task':<28}    loss   circuit in {folder}"], sg.evaluate_tasks(model)
    for task in tasks.TASKS:
        path, found = Path(folder, f"{task}.json"), "-"
        try:
            included = prune.included_path(task)
            if included.exists() and not path.exists() and (
                    circuit := prune.load_circuit(included)).is_of(model):
                found = "included: {nodes} nodes, {edges} edges".format(**circuit.report["size"])
            elif path.exists():
                circuit = prune.load_circuit(path)
                found = "{nodes} nodes, {edges} edges".format(**circuit.report["size"])
                if circuit.task != task:
                    found = "of another task"
                elif not circuit.is_of(model):
                    found = "of another model"
            elif task not in scores:
                prune.make_prompts(model, task, 100, 0)  # raises what is wrong with the task
        except (ValueError, OSError) as e:
            found = sg.one_line(str(e))[:150]
        loss = f"{scores[task].binary:8.3f}" if task in scores else "       -"
        lines.append(f"{task:<28}{loss}   {found}")
    return lines


# ---- paths through the full model ---------------------------------------------------------------
# The difference of two logits is taken apart, from the logits back: weight x value x its effect on
# that difference per unit. What is not linear is held as it is on this prompt: attention patterns,
# the scales of norms, AbsTopK's choice, and an activation's output over its input. So the parts of
# a node add up to it, down to tokens and biases.

NORMS = {"attn_in": "norm1", "mlp_in": "norm2"}  # whose scale is part of the gate of a site


@dataclass(eq=False)
class Branch:
    """The end of a path. node: (site, t, c), or None for a token, a position or a bias. slope: the
    difference of the logits per unit of the node, along this path."""
    name: str
    amount: float
    node: tuple | None = None
    slope: float = 0.0
    children: list = field(default_factory=list)


class Traced:
    """One prompt in the full model. value: {site: [T, C]}; gate: value over what it is made of,
    the residual stream or a matrix's output."""

    def __init__(self, model, ids):
        self.model, self.ids = model, ids
        self.p = {name: sg.to_host(w).astype(float) for name, w in model.params.items()}
        logits, seen, cache = prune.observe(model, ids[None])
        self.logits = sg.to_host(logits)[0, -1].astype(float)
        self.value = {site: sg.to_host(x).astype(float) for site, x in seen.items()}
        self.attention = {f"h{i}": prune.attention_weights(cache, i)[0]
                          for i in range(model.cfg.n_layer)}
        self.gate = {site: (x != 0).astype(float) for site, x in self.value.items()}
        for site, x in self.value.items():
            h, _, kind = site.rpartition(".")
            if prune.link(site) == "reads":
                norm = f"{h}.{NORMS[kind]}" if h else "norm"
                self.gate[site] *= sg.to_host(cache[norm][1])
            elif prune.link(site) != "adds":  # an activation may be between a matrix and these
                source, w, b = self.made_by(site)
                made_of = self.read(source) @ w + b
                self.gate[site] = np.divide(x, made_of, np.zeros_like(x), where=made_of != 0)

    def made_by(self, site):
        """(site, w [in, out], b) that a site is made of. Raises ValueError if it is of more."""
        cfg, part = self.model.cfg, prune.node_slices(self.model.cfg)[site]
        if prune.link(site) in sg.SITES:  # of its channels, one by one
            n = part.stop - part.start
            return f"{site.split('.')[0]}.{prune.link(site)}", np.eye(n), np.zeros(n)
        found = {name: m for name, m in prune.matrices(cfg).items() if part.start in m.target}
        if len(found) != 1:
            raise ValueError(f"{site} is made by {' and '.join(found) or 'no matrix'}")
        [(name, m)] = found.items()
        columns = (part.start <= m.target) & (m.target < part.stop)
        source, _, _ = prune.node_name(m.source[0], cfg).rpartition(".")
        return source, self.p[name][:, columns], self.p[m.bias][columns]

    def read(self, site):
        """The values of a site [T, C] as the next one gets them: v passes attention first."""
        h, _, kind = site.rpartition(".")
        if kind != "v":
            return self.value[site]
        heads = self.value[site].reshape(len(self.ids), -1, self.model.cfg.d_head)
        weights = self.attention[h][:, :, :-1]  # without the sink
        return np.einsum("hts,shd->thd", weights, heads).reshape(len(self.ids), -1)

    def branch(self, node, slope):
        """The Branch of a node whose value is multiplied by slope further on."""
        site, t, c = node
        return Branch(f"{site}.{c}", slope * self.value[site][t, c], node, slope)

    def contest(self, block, head, t):
        """Why a head looks from token t at token s, most of all, and not at the runner-up, a token
        or the sink: number len(ids). (s, runner-up, bias, keys, queries): s's logit less the other
        is the bias, of distances and the sink, plus the sum of the amounts of the branches of the
        keys, where queries are held, or as well of the queries, where keys are held."""
        h, d, T = f"h{block}", self.model.cfg.d_head, len(self.ids)
        weights, (q, k) = self.attention[h][head, t], (self.value[f"{h}.{x}"] for x in "qk")
        s = int(np.argmax(weights[:t + 1]))
        table, sink = (self.p.get(f"{h}.attn.{name}") for name in ("relbias", "sink"))
        others = [at for at in (*range(t + 1), T) if at != s and (at < T or sink is not None)]
        if not others:
            raise sg.UserError("the head can look at one token only, and has no sink")
        other = max(others, key=lambda at: weights[at])
        fixed = [sink[head] if at == T else 0.0 if table is None else table[head, t - at]
                 for at in (s, other)]
        signs = {at: sign / np.sqrt(d) for at, sign in ((s, 1), (other, -1)) if at < T}
        channels = range(head * d, (head + 1) * d)
        keys = [self.branch((f"{h}.k", at, c), sign * q[t, c]) for c in channels
                for at, sign in signs.items()]
        queries = [self.branch((f"{h}.q", t, c), sum(sign * k[at, c] for at, sign in
                                                     signs.items())) for c in channels]
        return s, other, fixed[0] - fixed[1], keys, queries

    def parts(self, node, slope):
        """The branches of what a node is made of. slope: see `branch`."""
        site, t, c = node
        slope *= self.gate[site][t, c]
        if prune.link(site) == "reads":
            out = [Branch("the token", slope * self.p["wte"][self.ids[t], c])]
            if "wpe" in self.p:
                out.append(Branch("the position", slope * self.p["wpe"][t, c]))
            before = itertools.takewhile(lambda other: other != site, self.value)
            return out + [self.branch((other, t, c), slope)
                          for other in before if prune.link(other) == "adds"]
        source, w, b = self.made_by(site)
        out = [Branch("bias", slope * b[c])]
        for i in np.flatnonzero(w[:, c]):
            shares = {t: 1.0}  # of the input's positions
            if source.endswith(".v"):
                head = i // self.model.cfg.d_head
                shares = dict(enumerate(self.attention[site.split(".")[0]][head, t, :t + 1]))
            out += [self.branch((source, at, i), slope * w[i, c] * share)
                    for at, share in shares.items()]
        return out


def follow(one, tree, known, share, most):
    """Add to the branches of a tree what they are made of, the largest first, until `share` of all
    amounts, signs aside, is followed to its end, or `most` nodes are. Returns (these nodes, the
    share that is left). Raises ValueError on a node that is not the sum of its parts."""
    ends, followed, ended = list(tree), set(), abs(known)
    left = sum(abs(branch.amount) for branch in tree)
    while ends and left > (1 - share) * (left + ended) and len(followed) < most:
        branch = max(ends, key=lambda branch: abs(branch.amount))
        ends.remove(branch)
        left -= abs(branch.amount)
        followed.add(branch.node)
        branch.children += one.parts(branch.node, branch.slope)
        amounts = [part.amount for part in branch.children]
        if not abs(sum(amounts) - branch.amount) <= 1e-4 * sum(map(abs, amounts)):
            raise ValueError(f"{branch.name} is not the sum of its parts")
        nodes = [part for part in branch.children if part.node]
        ends += nodes
        left += sum(abs(part.amount) for part in nodes)
        ended += sum(abs(part.amount) for part in branch.children if not part.node)
    return followed, left / (left + ended or 1)


def tree_lines(tree, followed, least, tokens):
    """(lines, names of the nodes in them) of a tree. Branches under `least` are summed up as
    others, and so are those that were not followed."""
    lines, printed, seen = [], [], set()

    def split(branches):  # (the large ones, largest first; the sum of the others)
        large = sorted((b for b in branches if abs(b.amount) >= least
                        and (b.node is None or b.node in followed)), key=lambda b: -abs(b.amount))
        return large, sum(b.amount for b in branches) - sum(b.amount for b in large)

    def add(branches, depth, t):
        large, rest = split(branches)
        for branch in large:
            names, here, parts, others = [], t, [branch], 0
            while len(parts) == 1 and abs(others) < least:  # a chain of nodes goes on one line
                [end] = parts
                names.append(end.name)
                if end.node:
                    printed.append(end.name)
                    names[-1] += f" at `{tokens[end.node[1]]}`" * (end.node[1] != here)
                    here = end.node[1]
                children = [] if end.node in seen else end.children
                names[-1] += ", as above" * (end.node in seen)
                seen.update([end.node] if children else [])
                parts, others = split(children)
            lines.append(f"{branch.amount:+8.3f}  {'  ' * depth}{' <- '.join(names)}")
            add(children, depth + 1, here)
        if abs(rest) >= least:
            lines.append(f"{rest:+8.3f}  {'  ' * depth}others")

    add(tree, 0, len(tokens) - 1)
    return lines, printed


def deletions(model, tree, printed, difference, without):
    """How the amounts of the printed nodes, over all paths of a tree, correlate with what their
    deletion takes away from the difference. without(mask, means): it in a part of the model."""
    cfg, means = model.cfg, prune.mean_activations(model, model.text)
    taken, branches, every = dict.fromkeys(printed, 0.0), list(tree), prune.every_node(cfg)
    for branch in branches:  # which grows
        branches += branch.children
        if branch.name in taken:
            mean = means[prune.node_number(branch.name, cfg)]
            taken[branch.name] += branch.amount - branch.slope * mean
    rows = [(amount, difference - without(every.without([prune.node_number(name, cfg)]), means))
            for name, amount in taken.items()]
    if len(rows) < 3:
        return ["too few nodes to check"]
    return [f"check: over these {len(rows)} nodes, amounts (beyond the nodes' means) and what "
            "deleting each node alone",
            f"takes away from the difference have a correlation of "
            f"{np.corrcoef(*zip(*rows))[0, 1]:.2f}"]


@contextmanager
def known_forward_pass():
    """Raises UserError in place of what goes wrong in a model that Traced is not made for."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as e:
        raise e if isinstance(e, sg.UserError) else sg.UserError(
            f"extras/questions.py does not know this model's forward pass ({type(e).__name__}: "
            f"{e})") from e


def trace(model, text, answers=None, share=0.8, most=60):
    """The paths that make the full model prefer its top token to the runner-up, or one of two
    answers to the other, as a tree; and a check of it by deleting its nodes one at a time. share,
    most: see `follow`. Raises UserError on an unusable prompt or an unknown forward pass."""
    prompt = prune.own_prompt(model, text, answers)
    [ids] = prompt.ids
    with known_forward_pass():
        one, last = Traced(model, ids), len(ids) - 1
        if not answers:
            top = np.argsort(-one.logits[:len(model.tok.bytes)])
            prompt = prompt._replace(right=top[:1], wrong=top[1:2])
        [first], [second] = prompt.right, prompt.wrong
        w, difference = sg.unembedding(one.p), one.logits[first] - one.logits[second]
        slopes = w[:, first] - w[:, second]
        tree = [one.branch(("final", last, c), slopes[c]) for c in np.flatnonzero(slopes)]
        known = difference - sum(branch.amount for branch in tree)
        followed, left = follow(one, tree, known, share, most)
    lines, printed = tree_lines(tree, followed, 0.05 * abs(difference),
                                [prune.token(model, i) for i in ids])
    heads = dict.fromkeys(re.sub(
        r"v\.(\d+)", lambda channel: f"head.{int(channel[1]) // model.cfg.d_head}", name)
        for name in printed if ".v." in name)
    return [f"{sg.one_line(model.tok.decode(ids[1:]))}  ->  `{prune.token(model, first)}` less "
            f"`{prune.token(model, second)}`: logits differ by {difference:+.3f}",
            f"{known:+8.3f}  bigram table and biases", *lines,
            f"not followed to its end: {left:.0%} of all amounts, signs aside",
            *deletions(model, tree, printed, difference, lambda mask, means: prune.PlainRunner(
                model, means, prompt).margins(mask)[0]),
            *[f"why a head looks where it looks: --head {' or '.join(heads)}"] * bool(heads)]


def look(model, text, name, back=1, share=0.8, most=60):
    """Why a head of the full model looks where it looks from a token, `back` from the end: its
    logit of the token that it looks at most less that of the runner-up, a token or the sink. It
    goes by products of channels; their keys and queries are followed and checked as in `trace`."""
    cfg, [ids] = model.cfg, prune.own_prompt(model, text).ids
    heads = {f"h{i}.head.{n}": (i, n) for i, n in prune.heads_of(prune.every_node(cfg), cfg)}
    if name not in heads:
        raise sg.UserError(f"no head {name[:60]!r}; the heads are {[*heads][0]} to {[*heads][-1]}")
    if not 1 <= back <= len(ids):
        raise sg.UserError(f"--at must be from 1 to {len(ids)} here, the prompt's tokens with "
                           f"<start>, not {back}")
    (block, head), t = heads[name], len(ids) - back
    with known_forward_pass():
        one = Traced(model, ids)
        s, other, bias, keys, queries = one.contest(block, head, t)
        weights = one.attention[f"h{block}"][head, t]
        difference = bias + sum(branch.amount for branch in queries)
        two = weights[s] + weights[other]
        if not abs(weights[s] / two - 1 / (1 + np.exp(-difference))) < 1e-4:
            raise ValueError(f"the attention of {name} is not made of distances and q x k")
        followed, left = follow(one, keys + queries, bias, share, most)

    def without(mask, means):  # the difference with a node deleted
        hook = prune.Ablation(mask.nodes, means, cfg)
        q, k = (sg.to_host(prune.observe(model, ids[None], hook=hook)[1][f"h{block}.{x}"]).astype(
            float)[:, head * cfg.d_head:(head + 1) * cfg.d_head] for x in "qk")
        return bias + q[t] @ (k[s] - (k[other] if other < len(ids) else 0)) / np.sqrt(cfg.d_head)

    tokens = [*(f"`{prune.token(model, i)}`" for i in ids), "the sink"]
    least = 0.05 * (abs(bias) + sum(abs(branch.amount) for branch in queries))
    large = sorted((b for b in queries if abs(b.amount) >= least), key=lambda b: -abs(b.amount))
    rest, top = sum(b.amount for b in queries if b not in large), np.argsort(-weights[:t + 1])[:3]
    lines = [f"{sg.one_line(model.tok.decode(ids[1:]))}  ->  {name} looks from {tokens[t]} at "
             + ", ".join(f"{tokens[at]} {weights[at]:.2f}" for at in top)
             + f"; at the sink {weights[-1]:.2f}",
             f"logit of {tokens[s]} less that of the runner-up, {tokens[other]}: "
             f"{difference:+.3f}",
             f"{bias:+8.3f}  distance, {t - s} back, less " + (
                 "the sink's logit" if other == len(ids) else f"that of {t - other}")]
    for branch in large:
        c = branch.node[2]
        q, k = one.value[f"h{block}.q"][t, c], one.value[f"h{block}.k"][:, c]
        key = f"(key {k[s]:+.2f} less {k[other]:+.2f})" if other < len(ids) else f"key {k[s]:+.2f}"
        lines.append(f"{branch.amount:+8.3f}  channel {c}: query {q:+.2f} x {key}"
                     f" / {np.sqrt(cfg.d_head):g}")
    lines, nodes = [*lines, f"{rest:+8.3f}  other channels"], []
    for what, held, tree in ("keys", "queries", keys), ("queries", "keys", queries):
        more, printed = tree_lines(tree, followed, least, [prune.token(model, i) for i in ids])
        lines += [f"{what}, with {held} held", *more]
        nodes += printed
    return [*lines, f"not followed to its end: {left:.0%} of all amounts, signs aside",
            *deletions(model, keys + queries, nodes, difference, without)]
