"""Shows a circuit: as text, as a self-contained HTML page, and as a graph for Graphviz.

All of it is made from a circuit's saved record, without the model: see prune.describe.
"""
import html
import itertools
import math
import shlex
import textwrap
from collections import Counter, defaultdict, namedtuple
from statistics import fmean, geometric_mean


def one_line(text, space=" "):
    """Text on one line, with visible newlines, tabs and control characters."""
    seen = {" ": space, "\n": "⏎", "\t": "⇥"}
    return "".join(seen.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in text)


# ---- text ---------------------------------------------------------------------------------------

LEGEND = """<-, -> edges with weights (tokens and answers are not counted); == the same channel of
the residual stream, to which tokens and blocks add. ␣ a space. Deleted: frozen at {}.
importance: the loss if this node is deleted too, less the circuit's. values: on
the two prompts, at the token (from the end) where they differ most; of final at the last one."""


def listing(circuit, verbose=False):
    """A circuit as text: task, size, losses, checks, then its nodes and edges in the order of
    computation. verbose: all stages, checks and nodes, and tokens with high and low values."""
    r, size, example = circuit.record, circuit.record["size"], circuit.record["example"]
    frozen = {"mean": "the mean over training text", "zero": "zero"}[circuit.settings.ablation]
    lines = textwrap.wrap(f"{circuit.task}: {r['doc']}", 99, subsequent_indent="    ")
    lines += [f"    prompt {i}: {''.join(tokens[1:])}    answer: {one_line(answer, '␣')}"
              for i, (tokens, answer) in enumerate(zip(example["prompts"], example["answers"]), 1)]
    lines += ["{nodes} nodes and {edges} edges of {model_nodes:,} and {model_edges:,}. "
              "Ranking nodes by attribution takes ".format(**size)
              + "{nodes:,} and {edges:,}.".format(**r["attribution"]),
              f"{'loss in nats':<14}" + "".join(
                  f" {f'{n} {name} prompts':^26}  "
                  for name, n in zip(("search", "held-out"), r["prompts"].values())),
              f"{'':<14}" + f" {'binary':>8} {'full':>8} {'accuracy':>8}  " * 2]
    for key, name in (("full", "full model"), ("circuit", "circuit")):
        scores = (r["losses"][key][split] for split in ("search", "held"))
        lines.append(f"{name:<14}" + "".join(
            f" {s['binary']:8.4f} {s['full']:8.4f} {s['accuracy']:8.1%}  " for s in scores))
    lines.append(f"{'target':<14} {circuit.settings.target:8.4f} (chance: {math.log(2):.4f})")
    if verbose:
        lines += ["not counted: biases, {embed} embeddings of tokens that differ in a pair, "
                  "{unembed} unembeddings of answers".format(**size), "",
                  "search" + f"{'nodes':>25} {'edges':>8} {'loss':>8}"]
        lines += [f"    {s['stage']:<20} {s['nodes']:>6,} {s['edges']:>8,} {s['loss']:8.4f}"
                  for s in r["stages"]]
        marks = {True: "passed", False: "FAILED", None: "-"}
        lines += ["", "checks", *(f"    {marks[c['passed']]:<7} {c['name']}: {c['text']}"
                                  for c in r["checks"])]
    else:
        lines += textwrap.wrap(check_line(r["checks"]), 99, subsequent_indent="    ")
        lines += textwrap.wrap(control_line(r["checks"]), 99, subsequent_indent="    ")
    lines += ["", *textwrap.wrap(LEGEND.format(frozen), 99)]
    return "\n".join(lines) + "\n\n" + ("\n\n" if verbose else "\n").join(
        "\n".join(block) for block in blocks(circuit, verbose))


def next_commands(circuit, flags="", out=""):
    """Three commands to go on with, a line each. flags, out: those that they need."""
    nodes, (prompt, _) = circuit.record["nodes"], circuit.record["example"]["prompts"]
    start = f"\n    python prune.py {circuit.task}{flags}"
    text = shlex.quote("".join(prompt[1:]).replace("⏎", "\n").replace("⇥", "\t"))
    lines = f"next:{start}{out} --explain{start}{out} --ask {text}"
    if nodes:
        lines += f"{start} --ablate {max(nodes, key=lambda node: node['importance'])['name']}"
    return lines


def check_line(checks):
    """The checks on one line: how many passed, and which did not, with their numbers."""
    failed = []
    for c in (c for c in checks if c["passed"] is False):
        if c.get("overlap") is not None:
            failed.append(f"{c['name']} {c['overlap']:.0%}")
        elif c.get("edges") is not None:
            failed.append(f"{c['name']} {c['edges']:.0f} edges")
        else:
            failed.append(f"{c['name']} {c['loss']:.2f}")
    line = f"checks: passed {sum(c['passed'] is True for c in checks)}"
    return line + (f", FAILED {len(failed)}: {', '.join(failed)}" if failed else "")


def control_line(checks):
    """What the same search needs where there should be no circuit, on one line."""
    edges = {c["name"].removesuffix(" task"): "none" if c["edges"] is None else int(c["edges"])
             for c in checks if "edges" in c and c["passed"] is not None}
    return "controls (edges; none or far more is good): " + (
        ", ".join(f"{name} {found}" for name, found in edges.items()) or "not run")


def packed(items, wide=99):
    """Lines of items, two spaces apart and indented."""
    lines = []
    for item in items:
        if lines and len(lines[-1]) + len(item) + 2 <= wide:
            lines[-1] += f"  {item}"
        else:
            lines.append(f"    {item}")
    return lines


def blocks(circuit, verbose, most=3):
    """[[line]]: a block for each head and node of a circuit in the order of computation; of a
    node's embeddings at most the `most` heaviest. Without verbose, nodes of less than a tenth of
    the largest importance are one block."""
    record, before, after, out = circuit.record, defaultdict(list), defaultdict(list), []
    for e in record["edges"] + record["residual"]:
        before[e["to"]].append(f"<- {e['from']} {e['weight']:+.2f}" if "weight" in e else
                               f"== {e['from']}")
        if "weight" in e:
            after[e["from"]].append(f"-> {e['to']} {e['weight']:+.2f}")
    for name in {e["to"] for e in record["embed"]}:
        rows = sorted((e for e in record["embed"] if e["to"] == name),
                      key=lambda e: -abs(e["weight"]))
        before[name].insert(0, "<- tokens " + ", ".join(
            f"{one_line(e['token'], '␣')} {e['weight']:+.2f}" for e in rows[:most])
            + f" and {len(rows) - most} more" * (len(rows) > most))
    asked = record["example"]["answers"]
    for e in sorted(record["unembed"], key=lambda e: (e["token"] not in asked, -e["weight"])):
        answer = one_line(e["token"], "␣")
        after[e["from"]].append(f"-> answer {answer} {e['weight']:+.2f}")
    heads = {head["nodes"][0]: head for head in record["heads"]}  # by their first nodes
    largest = max((node["importance"] for node in record["nodes"]), default=0)
    minor = [node["name"] for node in record["nodes"] if node["importance"] < 0.1 * largest]
    for node in record["nodes"]:
        name, values = node["name"], record["example"]["values"][node["name"]]
        if h := heads.get(name):
            fixed = "" if any(".q." in n for n in h["nodes"]) else "; its queries are frozen"
            out.append([f"{h['name']}  {h['overlap']:.0%} of its attention is where the full "
                        f"model's is{fixed}"])
            out[-1] += packed(f"end of prompt {i}: looks at " + ", ".join(
                f"{one_line(t, '␣')} {w:.2f}" for t, w in a["to"][:3])
                for i, a in enumerate(h["attends"], 1))
            if verbose:
                sink = "none" if h["sink"] is None else f"{h['sink']:+.2f}"
                out[-1].append(f"    logits: sink {sink}" + "".join(
                    f", {d} back {x:+.2f}" for d, x in h["distances"]))
        if name in minor and not verbose:
            continue
        back = 1 if name.startswith("final") else max(
            range(1, 1 + min(map(len, values))), key=lambda t: abs(values[0][-t] - values[1][-t]))
        tokens = " | ".join(dict.fromkeys(
            one_line(p[-back], "␣") for p in record["example"]["prompts"]))
        block = [f"{name:<16} importance {node['importance']:6.3f}   values "
                 f"{values[0][-back]:+7.2f} {values[1][-back]:+7.2f}  at -{back}, {tokens}"]
        block += packed(before[name] + after[name])
        if verbose:
            bias = "none" if node["bias"] is None else f"{node['bias']:+.3f}"
            block.append(f"    bias and frozen inputs {bias}, {circuit.settings.ablation} "
                         f"{node['mean']:+.3f}")
            block += [f"    {kind} {side:<5}" + "   ".join(
                f"{text}[{t}] {v:+.2f}" for text, t, v in node[kind][side][:3])
                for kind, side in itertools.product(("task", "text"), ("high", "low"))]
        out.append(block)
    if minor and not verbose:
        out.append([f"and {len(minor)} of less than a tenth of the largest importance"])
        groups = [g for g in record["groups"] if len(g["nodes"]) > 1]
        out[-1] += [f"    {len(g['nodes'])} of them, connected, have together {g['effect']:.3f}"
                    for g in sorted(groups, key=lambda g: -g["effect"])[:3]]
    return out


def differing(example):
    """The names of the nodes that differ between two prompts, counted from the end."""
    return [name for name, values in example["values"].items() if any(
        abs(x - y) > 0.005 for x, y in zip(*(v[::-1] for v in values)))]


def explain(example, columns=5):
    """Prompts through a circuit, as text: the value of each node at each token. Nodes that are
    alike on the prompts of a pair are left out."""
    lines, names = [], list(example["values"])
    if len(example["prompts"]) == 2:
        names = differing(example)
        if left := len(example["values"]) - len(names):
            lines.append(f"{left} nodes that do not differ between the prompts are left out")
    both = range(len(example["prompts"]))
    for start, p in itertools.product(range(0, len(names), columns), both):
        some = names[start:start + columns]
        lines += ["", f"prompt {p + 1}, right answer {example['answers'][p]}, margin "
                  f"{example['margins'][p]:+.3f}" if len(both) == 2 else "",
                  " " * 14 + "".join(f"{x:>16}" for x in some)]
        for t, text in enumerate(example["prompts"][p]):
            lines.append(f"{text:<14}" + "".join(
                f"{example['values'][name][p][t]:>16.3f}" for name in some))
    return "\n".join(lines) or "the circuit has no nodes"


def summary(rows):
    """The table of all tasks, as text. rows: {task: (its Circuit or None, why there is none)}."""
    names = "full circuit held-out nodes edges without nonsense inverted shuffled".split()
    lines, sizes_ = [f"{'task':<28}" + "".join(f"{name:>10}" for name in names)], []
    for task, (circuit, text) in rows.items():
        if circuit:
            r, checks = circuit.record, {c["name"]: c for c in circuit.record["checks"]}
            full, own, size = r["losses"]["full"], r["losses"]["circuit"], r["size"]
            sizes_.append([max(1, size["nodes"]), max(1, size["edges"])])
            cells = [full["search"]["binary"], own["search"]["binary"], own["held"]["binary"],
                     size["nodes"], size["edges"], checks["necessity"]["loss"]]
            controls = (checks[name]["edges"]
                        for name in ("nonsense task", "inverted task", "shuffled weights"))
            cells += ["none" if edges is None else int(edges) for edges in controls]
            text = "".join(f"{x:>10.3f}" if isinstance(x, float) else f"{x:>10}" for x in cells)
        lines.append(f"{task:<28}{'' if circuit else '  '}{text}")
    means = [geometric_mean(column) for column in zip(*sizes_)] or [0, 0]
    return "\n".join([
        *lines, "{} circuits: geometric mean {:.1f} nodes, {:.1f} edges (0 counts as 1)".format(
            len(sizes_), *means),
        "full, circuit: binary losses in nats on the search prompts; held-out: the circuit's on "
        "other prompts",
        "without: the full model's loss without the circuit's nodes",
        "nonsense, inverted, shuffled: edges that the same search needs for the controls"])


# ---- drawings -----------------------------------------------------------------------------------

CSS = """
:root { --bg: #fff; --ink: 29 39 51; --pos: 0 98 168; --neg: 206 84 0; color-scheme: light }
@media screen and (prefers-color-scheme: dark) { :root { --bg: #14181c; --ink: 227 232 237;
  --pos: 98 178 240; --neg: 240 146 60; color-scheme: dark } }
body { margin: 0 auto; padding: 28px min(32px, 4vw); max-width: 1740px; background: var(--bg);
  color: rgb(var(--ink)); font: 14px/1.5 system-ui, "Helvetica Neue", Arial, sans-serif }
h1, h2 { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 16px }
h1 { font-size: 24px; margin: 0 } h2 { font-size: 16px; margin: 26px 0 4px }
small { font-size: 14px; font-weight: 400 } p { margin: 4px 0 } a { color: rgb(var(--pos)) }
pre { margin: 14px 0 } pre, .wide, .scroll { overflow: auto } .scroll { max-height: 80vh }
pre, table, .tok { font: 11px/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre }
.panel { position: sticky; bottom: 0; max-height: 40vh; padding: 6px 14px; background: var(--bg);
  border: 1px solid rgb(var(--ink) / .2) }
.mute { color: rgb(var(--ink) / .65); font-size: 12px } .mute svg { margin: 0 8px 0 28px }
svg { max-width: 100%; height: auto } text.mute { fill: rgb(var(--ink) / .65) }
text { fill: rgb(var(--ink)); font-size: 11px; text-anchor: middle } .ch { font-weight: 600 }
path { fill: none; stroke: rgb(var(--ink) / .4) } .pos { stroke: rgb(var(--pos)) }
.neg { stroke: rgb(var(--neg)); stroke-dasharray: 6 3 }
rect { fill: var(--bg); stroke: rgb(var(--ink) / .4); rx: 5px }
.soft { fill: rgb(var(--ink) / .05); stroke: rgb(var(--ink) / .12) }
.graph:hover:has(.lit) [data-lit]:not(.lit) { opacity: .12 }
th { font-weight: 400; padding: 0 4px } tr :first-child { text-align: left }
.scroll th:first-child { position: sticky; left: 0; background: var(--bg) }
td { text-align: right; padding: 0 3px; background: rgb(var(--pos) / calc(.6 * var(--shade)));
  color: rgb(var(--ink) / calc(.6 + 4 * var(--shade))); print-color-adjust: exact }
td.neg { background: repeating-linear-gradient(135deg, rgb(var(--neg) / calc(.5 * var(--shade)))
  0 5px, rgb(var(--neg) / calc(.3 * var(--shade))) 5px 8px) }
.heads, .heads div { display: flex; flex-wrap: wrap; align-items: start; gap: 14px }
.heads { column-gap: 40px } .heads td { min-width: 10px; height: 16px }
.heads tr:first-child th { writing-mode: vertical-rl; padding: 4px 0 }
@media print { .panel { display: none } .graph { min-width: 0 !important }
  pre { white-space: pre-wrap } .scroll { max-height: none } }"""
SCRIPT = """
const graph = document.querySelector(".graph"), [panel, listing] = document.querySelectorAll("pre")
for (const box of graph?.querySelectorAll("a") ?? []) box.onmouseenter = () => {
  const name = box.querySelector("title").textContent + " "
  panel.hidden = false
  panel.textContent = listing.textContent.split("\\n\\n").find(s => s.startsWith(name)) ?? name
  for (const e of graph.querySelectorAll("[data-lit]"))
    e.classList.toggle("lit", e.dataset.lit.split(" ").includes(box.id))
}"""
STEPS = dict(attn_in=0, q=1, k=1, v=1, attn_out=2, mlp_in=3, neuron=4, mlp_out=5)
# A column is (block, step, title), which sorts in the order of computation.
IN, FINAL, OUT = (-1, -1, "tokens in"), (math.inf, 6, "final"), (math.inf, 7, "tokens out")
WIDE, HIGH, ROW, LANE, LABEL = 64, 32, 42, 13, 26  # pixels: a box; the height of box, wire, label


# A node; a token, with site "token" and its text as channel; or, with site "", the point where a
# channel of the residual stream passes a column.
Box = namedtuple("Box", "column site channel")


def box_name(box):
    """The name of a node, or the text of a token."""
    return box.channel if box.site == "token" else f"{box.site}.{box.channel}"


def visible(text, space=" ", most=999):
    """Text for HTML, on one line of at most `most` letters."""
    text = one_line(text, space)
    return html.escape(text if len(text) <= most else text[:most - 1] + "…")


def document(title, *body, note=""):
    """A whole HTML page, with a note beside its title."""
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f"<title>{visible(title)}</title>\n<style>{CSS}</style></head>\n<body>"
            f"<h1>{visible(title)} <small>{visible(note)}</small></h1>\n"
            f"{''.join(body)}</body></html>\n")


def graph(record):
    """({Box: its node's dict, or None for a token}, [(from, to, weight, or 0 for a residual
    channel)], the heaviest first)."""
    def box(name):
        site, _, channel = name.rpartition(".")
        block, _, step = site.partition(".")
        title = f"{block}.q k v" if step in ("q", "k", "v") else site
        column = (int(block[1:]), STEPS[step], title) if step else FINAL
        return Box(column, site, int(channel))

    links = [(box(e["from"]), box(e["to"]), e.get("weight", 0))
             for e in record["edges"] + record["residual"]]
    links += [(Box(IN, "token", e["token"]), box(e["to"]), e["weight"]) for e in record["embed"]]
    links += [(box(e["from"]), Box(OUT, "token", e["token"]), e["weight"])
              for e in record["unembed"]]
    boxes = {box(node["name"]): node for node in record["nodes"]}
    boxes |= {b: None for link in links for b in link[:2] if b not in boxes}
    return boxes, sorted(links, key=lambda link: -abs(link[2]))


def grouped(links, most=10, weak=1 / 3):
    """The links, with one box, of a tuple of texts, for tokens that are linked to the same nodes
    with the same signs. So that few wires cross, a token's link weaker than `weak` of its node's
    heaviest is left out, and so are all but the `most` heaviest boxes of each side."""
    for side, end in ((IN, 0), (OUT, 1)):
        weights, largest, groups = defaultdict(dict), {}, defaultdict(list)
        for link in (link for link in links if link[end].column == side):  # the heaviest first
            token, node, weight = link[end], link[1 - end], link[2]
            if abs(weight) >= weak * largest.setdefault(node, abs(weight)):
                weights[token][node] = weight
        for token, row in weights.items():
            groups[frozenset((node, weight > 0) for node, weight in row.items())].append(token)
        links = [link for link in links if link[end].column != side]
        for tokens in list(groups.values())[:most]:
            box = Box(side, "token", tuple(token.channel for token in tokens))
            for node in weights[tokens[0]]:
                ends = (box, node) if side == IN else (node, box)
                links.append((*ends, fmean(weights[token][node] for token in tokens)))
    return sorted(links, key=lambda link: -abs(link[2]))


def route(boxes, columns, links):
    """{(Box, Box): (weight, {the ends of its links})} from column to column. A link over several
    columns follows the residual channel that it ends at, and passes the boxes of that channel."""
    inner = (".q", ".k", ".v", ".neuron")  # all others are of the residual stream
    stream = {(b.column, b.channel): b for b in boxes if not b.site.endswith(inner)}
    hops = {}
    for a, b, weight in links:
        between = columns[columns.index(a.column) + 1:columns.index(b.column)]
        way = [a, *(stream.get((c, b.channel), Box(c, "", b.channel)) for c in between), b]
        for hop in zip(way, way[1:]):  # the weight adds to the channel where the link begins
            hops.setdefault(hop, (weight if hop[0] == a else 0, set()))[1].update((a, b))
    return hops


def arrange(heads, hops):
    """{Box: y}, near the mean of the boxes that each is linked to. heads: {Box: (column, head), or
    itself}; the boxes of a head stay together, below its label."""
    near, y = {box: [] for box in heads}, dict.fromkeys(heads, 0)
    for a, b in hops:
        near[a].append(b)
        near[b].append(a)
    for sweep in range(26):
        for column in sorted({box.column for box in heads}, reverse=sweep % 2):
            want, offsets, pools, bottom = {}, [], [], 0
            for box in (box for box in heads if box.column == column):
                # Neighbours of one side untangle the wires; later, those of both balance them.
                ys = [y[n] for n in near[box] if sweep > 13 or (n.column > column) == sweep % 2]
                want[box] = fmean(ys) if ys else y[box]
            mean = {box: fmean(want[b] for b in want if heads[b] == heads[box]) for box in want}
            order = sorted(want, key=lambda b: (mean[b], str(heads[b]), b.site, want[b]))
            for box, above in zip(order, [None, *order]):
                height = ROW if box.site else LANE
                bottom += height + LABEL * (heads[box] not in (box, heads.get(above)))
                offsets.append(bottom - height / 2)
                # Boxes that would overlap form a pool, which moves as one to its mean.
                pools.append([mean[box] - offsets[-1]])
                while len(pools) > 1 and fmean(pools[-2]) >= fmean(pools[-1]):
                    pools[-2:] = [pools[-2] + pools[-1]]
            shifts = (fmean(pool) for pool in pools for _ in pool)
            y |= {box: offset + shift for box, offset, shift in zip(order, offsets, shifts)}
    return y


def picture(record):
    """The circuit as inline SVG. data-lit: the ids of the boxes that light up a box or a wire."""
    boxes, links = graph(record)
    links = grouped(links)
    nodes, d_head = [box for box in boxes if boxes[box]], record["model"]["config"]["d_head"]
    drawn = list(dict.fromkeys([*nodes, *(box for link in links for box in link[:2])]))
    ids = {box: f"n{i}" for i, box in enumerate(drawn)}
    columns = sorted({box.column for box in drawn})
    hops = route(drawn, columns, links)
    heads = {box: box for box in [*drawn, *(box for hop in hops for box in hop)]}
    heads |= {b: (b.column, b.channel // d_head) for b in nodes if b.column[1] == STEPS["q"]}
    y = arrange(heads, hops)
    if not y:
        return "<p>No node is needed: the bigram table and the frozen values do the task.</p>"
    top, tall = min(y.values()) - 68, max(y.values()) - min(y.values()) + 98
    pitch = max(104, min(170, 1330 // len(columns)), tall // 12)  # steep wires need room
    x = {column: i * pitch - WIDE * (column == IN) for i, column in enumerate(columns)}
    width = {column: WIDE * (1 + (column in (IN, OUT))) for column in columns}
    left, out = x[columns[0]] - 12, []
    wide = x[columns[-1]] + width[columns[-1]] + 12 - left
    for column in columns:
        out.append(f'<text class="mute" x="{x[column] + width[column] / 2}" y="{top + 20:.0f}">'
                   f"{column[2]}</text>")
    for column, head in {heads[box]: None for box in nodes if heads[box] != box}:
        ys = [y[box] for box in nodes if heads[box] == (column, head)]
        out.append(f'<rect class="soft" data-lit="" x="{x[column] - 7}" y="{min(ys) - 38:.1f}" '
                   f'width="{WIDE + 14}" height="{max(ys) - min(ys) + 61:.1f}"/>'
                   f'<text class="mute" x="{x[column] + WIDE / 2}" y="{min(ys) - 23:.1f}">'
                   f"head {head}</text>")
    lit, largest = {box: {box} for box in y}, Counter()
    for (a, b), (weight, ends) in hops.items():
        largest[a.column[1]] = max(largest[a.column[1]], abs(weight))
        lit[a] |= ends
        lit[b] |= ends
    for (a, b), (weight, ends) in reversed(hops.items()):  # the heaviest are drawn last, on top
        end = x[a.column] + width[a.column]
        start = end if a.site else x[a.column]
        dx, dy = x[b.column] - end, y[b] - y[a]
        out.append(f'<path class="{"pos" if weight > 0 else "neg" if weight else ""}" '
                   f'data-lit="{" ".join(sorted(ids[box] for box in ends))}" '
                   f'stroke-width="{1 + 3 * abs(weight) / (largest[a.column[1]] or 1):.1f}" '
                   f'd="M{start} {y[a]:.1f}H{end}c{dx / 2} 0 {dx / 2} {dy:.1f} {dx} {dy:.1f}"/>')
    most = max(node["importance"] for node in record["nodes"])
    for box in (box for box in y if box.site):
        title, kind, low, shade = "", "soft", 4, 1
        if node := boxes.get(box):
            name, title, kind, low = box_name(box), box.channel, "", 11
            shade = 0.45 + 0.55 * min(1, max(0, node["importance"]) / (most or 1))
            if heads[box] != box:
                title = f"{box.site[-1]}.{box.channel}"
            text = "".join(visible(row[1], "␣", 9) for row in node["task"]["high"][:1])
        else:
            texts = [one_line(text, "␣") for text in box.channel]
            name, text = "  ".join(texts), visible("  ".join(texts[:3]), most=14)
            text += f" +{len(texts) - 3}" * (len(texts) > 3)
        mid, lights = width[box.column] / 2, " ".join(sorted(ids[b] for b in lit[box]))
        out.append(f'<a id="{ids[box]}" opacity="{shade:.2f}" data-lit="{lights}" '
                   f'transform="translate({x[box.column]} {y[box]:.1f})"><title>'
                   f'{visible(name)}</title><rect class="{kind}" y="-{HIGH / 2}" '
                   f'width="{2 * mid:.0f}" height="{HIGH}"/><text class="ch" x="{mid}" y="-3">'
                   f'{title}</text><text class="tok" x="{mid}" y="{low}">{text}</text></a>')
    return (f'<div class="wide"><svg class="graph" viewBox="{left} {top:.0f} {wide} {tall:.0f}" '
            f'width="{wide}" style="min-width: {0.7 * wide:.0f}px">' + "\n".join(out)
            + "</svg></div>\n")


def table_row(heading, cells):
    """A row of a table: its heading, and a cell for each (-1 to 1 as colour, title, text)."""
    return f"<tr>{headings([heading])}" + "".join(
        f'<td class="{"neg" if shade < 0 else ""}" style="--shade:{abs(shade):.2f}" '
        f'title="{visible(title)}">{text}</td>' for shade, title, text in cells) + "</tr>\n"


def headings(texts):
    """Texts as headings of a table."""
    return "".join(f"<th>{visible(text, '␣')}</th>" for text in texts)


def heat_map(example):
    """A table of the nodes' values on the two prompts. Its colours show where they differ."""
    names, rows = differing(example), []
    if not names:
        return ""
    for name in names:
        cells, sides = [], example["values"][name]
        for own, other in (sides, sides[::-1]):
            other = ["none"] * (len(own) - len(other)) + other[-len(own):]  # from the end
            gaps = [0 if y == "none" else x - y for x, y in zip(own, other)]
            largest = max(map(abs, gaps))
            cells += [(0, "", ""), *((gap / largest, f"{x}; other prompt {y}", f"{x:.2f}")
                                     for gap, x, y in zip(gaps, own, other))]
        rows.append(table_row(name, cells))
    one, two = example["prompts"]
    answers = [f'<th></th><th colspan="{len(tokens)}">answer {visible(answer, "␣")} (margin '
               f"{margin:+.2f})</th>" for tokens, answer, margin in zip(
                   (one, two), example["answers"], example["margins"])]
    return ('<h2>Values on the two prompts</h2><p class="mute">colour: the value less that on the '
            "other prompt, counted from the end (blue: higher; orange, striped: lower), relative "
            f"to the row's largest; hidden: {len(example['values']) - len(names)} nodes that do "
            f'not differ</p><div class="scroll"><table><tr><th></th>{"".join(answers)}</tr><tr>'
            f"{headings(['', '', *one, '', *two])}</tr>\n{''.join(rows)}</table></div>\n")


def attention_maps(record):
    """Tables of what each head of a circuit looks at on the two prompts."""
    out = ['<h2>Attention</h2><p class="mute">row: the token that looks; column: the one it looks '
           'at; the rest of a row is in the sink</p><div class="heads">']
    for head in record["heads"]:
        out.append("<div>")
        for tokens, attends in zip(record["example"]["prompts"], head["attends"]):
            out.append(f"<table><caption>{visible(head['name'])}</caption>"
                       f"<tr>{headings(['', *tokens])}</tr>\n")
            out += [table_row(query, ((x / 100, f"{query} looks at {key}: {x}%", "")
                                      for key, x in zip(tokens, row)))
                    for query, row in zip(tokens, attends["rows"])]
            out.append("</table>")
        out.append("</div>")
    return "".join(out) + "</div>\n" if record["heads"] else ""


def summary_page(rows):
    """The table of all tasks above the pictures of their circuits, as an HTML page."""
    found = [circuit for circuit, _ in rows.values() if circuit]
    text = html.escape(summary(rows))
    for name in (circuit.task for circuit in found):
        text = text.replace(f"\n{name} ", f'\n<a href="#{name}">{name}</a> ')
    drawn = {c.task: picture(c.record) if len(c.nodes) <= 120 else "<p>Too large to be seen here."
             for c in found}
    return document("Circuits", f"<pre>{text}</pre>", *(
        f'<h2 id="{c.task}">{c.task} <small>{visible(check_line(c.record["checks"]))}</small></h2>'
        f'<p>{visible(c.record["doc"])}</p>{drawn[c.task]}'
        for c in found))


def page(circuit):
    """A circuit as a self-contained HTML page: its picture, values and attention, its listing."""
    record = circuit.record
    wires = (("pos", "positive weight (width: relative to the largest of its kind)"),
             ("neg", "negative weight"), ("", "residual channel"))
    return document(
        circuit.task, f"<p>{visible(record['doc'])}</p>\n",
        f"<p>{visible(control_line(record['checks']))}</p>",
        '<p class="mute">box: channel, and the token with its highest value; the fainter, the '
        "less important; tokens with the same edges share a box; not drawn: token weights under "
        "a third of their node's largest, and all but 10 boxes on each side</p>\n"
        '<p class="mute">', *(
            f'<svg width="32" height="8"><path class="{kind}" d="M0 4H32"/></svg>{what}'
            for kind, what in wires), "</p>\n",
        picture(record), '<pre class="panel" hidden></pre>\n', heat_map(record["example"]),
        attention_maps(record), "<pre>",
        "\n".join(map(visible, listing(circuit, verbose=True).split("\n"))),
        f"</pre><script>{SCRIPT}</script>", note=check_line(record["checks"]))


def dot(record):
    """The same graph for Graphviz. Colour, dash and width show weights."""
    boxes, links = graph(record)
    ids = {box: f"n{i}" for i, box in enumerate(boxes)}
    out = ["digraph{rankdir=LR;node[shape=box]"]
    for box in boxes:
        name = visible(box_name(box), "␣").replace("\\", "\\\\")
        out.append(f'{ids[box]} [label="{name}"]')
    for a, b, weight in links:
        look = '"#0062a8"' if weight > 0 else '"#ce5400" style=dashed' if weight else "gray"
        out.append(f"{ids[a]} -> {ids[b]} [color={look} penwidth={min(6, 1 + abs(weight)):.1f}]")
    return "\n".join(out) + "\n}\n"
