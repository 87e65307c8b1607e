"""Which paths through a model's nonzero weights make it prefer a token? No task, no search:

    python prune.py --trace 'x = f("hello'                           # its top token, the runner-up
    python prune.py --trace 'print("hello' --answers '")' "')"       # or two answers

The difference of the logits of the top token and the runner-up is taken apart from the logits
back: weight x value x its effect on that difference per unit. What is not linear is
held as it is on this prompt: attention patterns, the scales of norms, AbsTopK's choice, and an
activation's output over its input. So the parts of a node add up to it, down to tokens and biases.
"""
import heapq
from collections import defaultdict

import numpy as np

import prune
import sparsegpt as sg
from docs import ask, readings
from docs.show import one_line


# The matrix that makes a site, and where its input stands.
MADE_BY = dict(v=("attn.wqkv", "attn_in"), attn_out=("attn.wo", "v"), neuron=("mlp.wfc", "mlp_in"),
               mlp_out=("mlp.wproj", "neuron"))


class Prompt:
    """One prompt in the full model. value: {site: [T, C]}; gate: value over what it is made of,
    the residual stream or a matrix's output."""

    def __init__(self, model, ids):
        self.model, self.ids, record = model, ids, prune.Recorder()
        self.p = {name: sg.to_host(w).astype(float) for name, w in model.params.items()}
        logits, cache = sg.forward(model.params, ids[None], model.cfg, record)
        self.logits = sg.to_host(logits)[0, -1].astype(float)
        self.value = {site: sg.to_host(x).astype(float) for site, x in record.seen.items()}
        self.gate = {site: (x != 0).astype(float) for site, x in self.value.items()
                     if not site.endswith((".q", ".k"))}  # attention patterns are held
        self.attention = {}
        self.gate["final"] *= sg.to_host(cache["norm"][1])
        for h in (f"h{i}" for i in range(model.cfg.n_layer)):
            self.attention[h] = prune.attention_weights(cache, int(h[1:]))[0]
            self.gate[f"{h}.attn_in"] *= sg.to_host(cache[f"{h}.norm1"][1])
            self.gate[f"{h}.mlp_in"] *= sg.to_host(cache[f"{h}.norm2"][1])
            w, b, source = self.matrix(h, "neuron")
            made_of = self.value[source] @ w + b
            self.gate[f"{h}.neuron"] = np.divide(
                self.value[f"{h}.neuron"], made_of, np.zeros_like(made_of), where=made_of != 0)

    def matrix(self, h, kind):
        """(w [in, out], b, site of its input) of the matrix that makes a site of a block."""
        name, source = MADE_BY[kind]
        name, C = f"{h}.{name}", self.model.cfg.d_model
        part = slice(2 * C, None) if kind == "v" else slice(None)
        b = self.p[prune.matrices(self.model.cfg)[name].bias]
        return self.p[name][:, part], b[part], f"{h}.{source}"

    def parts(self, site, t, c, slope):
        """[(amount, (site, t, c) or None for a leaf, slope, name)] of a node whose value is
        multiplied by slope further on."""
        slope, (h, _, kind) = slope * self.gate[site][t, c], site.rpartition(".")
        if kind in ("attn_in", "mlp_in", "final"):
            out = [(slope * self.p["wte"][self.ids[t], c], None, 0, "the token")]
            if "wpe" in self.p:
                out.append((slope * self.p["wpe"][t, c], None, 0, "the position"))
            sites = list(self.value)
            return out + [(slope * self.value[w][t, c], (w, t, c), slope, "")
                          for w in sites[:sites.index(site)] if w.endswith("_out")]
        w, b, source = self.matrix(h, kind)
        out = [(slope * b[c], None, 0, "bias")]
        for i in np.flatnonzero(w[:, c]):
            shares = {t: 1.0}  # of the input's positions
            if kind == "attn_out":
                shares = enumerate(self.attention[h][i // self.model.cfg.d_head, t, :t + 1])
            for at, share in dict(shares).items():
                factor = slope * w[i, c] * share
                out.append((factor * self.value[source][at, i], (source, at, i), factor, ""))
        return out


def trace(model, text, answers=None, share=0.8, most=60):
    """Lines of text: the tree of paths, largest first, until it holds `share` of all amounts,
    signs aside, or has `most` nodes; and a check of it by deleting its nodes one at a time.
    answers: two to compare in place of the top token and the runner-up. Raises UserError on an
    unusable prompt."""
    prompt = ask.own_prompt(model, text, answers)
    [ids], last = prompt.ids, int(prompt.last[0])
    one = Prompt(model, ids)
    if not answers:
        top = np.argsort(-one.logits[:len(model.tok.bytes)])
        prompt = prompt._replace(right=top[:1], wrong=top[1:2])
    [first], [second] = prompt.right, prompt.wrong
    head = one.p["head.w"][:, first] - one.p["head.w"][:, second]
    difference = one.logits[first] - one.logits[second]
    tree = [(head[c] * one.value["final"][last, c], ("final", last, c), head[c], "", [])
            for c in np.flatnonzero(head)]
    known = difference - sum(branch[0] for branch in tree)  # the bigram table and biases
    heap = [(-abs(b[0]), i, b) for i, b in enumerate(tree)]
    heapq.heapify(heap)
    named, count, leaves = set(), len(heap), abs(known)
    amounts = defaultdict(list)  # [(amount, slope)] of each node, of every path in the tree
    for amount, (site, _, c), slope, *_ in tree:
        amounts[f"{site}.{c}"].append((amount, slope))
    open_ = sum(-size for size, _, _ in heap)
    while heap and open_ > (1 - share) * (open_ + leaves) and len(named) < most:
        size, _, (amount, node, slope, _, children) = heapq.heappop(heap)
        open_ += size
        named.add(node)
        parts = one.parts(*node, slope)
        own = [part[0] for part in parts]
        if not abs(sum(own) - amount) <= 1e-4 * sum(map(abs, own)):
            raise sg.UserError(f"{node[0]}.{node[2]} is not the sum of its parts: docs/trace.py "
                               "does not know this model's forward pass")
        for part in parts:
            branch, count = (*part, []), count + 1
            children.append(branch)
            if part[1] is None:
                leaves += abs(part[0])
            else:
                amounts[f"{part[1][0]}.{part[1][2]}"].append((part[0], part[2]))
                heapq.heappush(heap, (-abs(part[0]), count, branch))
                open_ += abs(part[0])
    token = [readings.token(model, i) for i in ids]
    lines = [f"{one_line(model.tok.decode(ids[1:]))}  ->  `{readings.token(model, first)}` less "
             f"`{readings.token(model, second)}`: logits differ by {difference:+.3f}",
             f"{known:+8.3f}  bigram table and biases"]
    printed, seen = [], set()

    def shown(branches):  # (the large ones, largest first; the sum of the others)
        large = [b for b in branches if abs(b[0]) >= 0.05 * abs(difference)
                 and (b[1] is None or b[1] in named)]
        return (sorted(large, key=lambda b: -abs(b[0])),
                sum(b[0] for b in branches) - sum(b[0] for b in large))

    def show(branches, depth, t):
        large, rest = shown(branches)
        for branch in large:
            start, names, here = f"{branch[0]:+8.3f}  " + "  " * depth, [], t
            while True:  # a chain of nodes with one large part each goes on one line
                _, node, _, name, children = branch
                if node:
                    name = f"{node[0]}.{node[2]}"
                    printed.append(name)
                    name += f" at `{token[node[1]]}`" * (node[1] != here)
                    here = node[1]
                if node in seen:
                    names.append(name + ", as above")
                    children = []
                    break
                seen.update([node] if children else [])  # one that was followed
                names.append(name)
                parts, others = shown(children)
                if len(parts) != 1 or abs(others) >= 0.05 * abs(difference):
                    break
                [branch] = parts
            lines.append(start + " <- ".join(names))
            show(children, depth + 1, here)
        if abs(rest) >= 0.05 * abs(difference):
            lines.append(f"{rest:+8.3f}  " + "  " * depth + "others")

    show(tree, 0, last)
    lines.append(f"not followed to its end: {open_ / (open_ + leaves):.0%} of all amounts, signs "
                 "aside")
    return lines + check(model, prompt, {name: amounts[name] for name in printed}, difference)


def check(model, prompt, amounts, difference):
    """Lines of text: how the amounts of nodes correlate with what their deletion takes away."""
    cfg, means = model.cfg, prune.mean_activations(model, model.text)
    runner, rows = prune.PlainRunner(model, means, prompt), []
    for name, parts in amounts.items():
        n = prune.node_number(name, cfg)
        taken = sum(amount - slope * means[n] for amount, slope in parts)
        changed = prune.margins(runner.logits(prune.every_node(cfg).without([n])), prompt)[0]
        rows.append((taken, difference - changed))
    if len(rows) < 3:
        return ["too few nodes to check"]
    return [f"check: over these {len(rows)} nodes, amounts (beyond the nodes' means) and what "
            "deleting each node alone",
            f"takes away from the difference have a correlation of "
            f"{np.corrcoef(*zip(*rows))[0, 1]:.2f}"]
