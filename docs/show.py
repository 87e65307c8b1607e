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

LEGEND = """<-, -> edges with weights; == the same channel of the residual stream. Deleted: frozen
at the mean over training text. importance: the loss if this node is deleted too, less the
circuit's. values: on the two prompts, at the token (counted from the end) where they differ most;
of final at the last token."""


def listing(circuit, verbose=False):
    """A circuit as text: task, size, losses, checks, then its nodes and edges in the order of
    computation. verbose: all stages, checks and nodes, and tokens with high and low values."""
    r, size, example = circuit.record, circuit.record["size"], circuit.record["example"]
    lines = textwrap.wrap(f"{circuit.task}: {r['doc']}", 99, subsequent_indent="    ")
    lines += [f"    {''.join(tokens[1:])}  ->  {answer}"
              for tokens, answer in zip(example["prompts"], example["answers"])]
    lines += ["{nodes} nodes and {edges} edges of {model_nodes:,} and {model_edges:,}. "
              "By attribution, ".format(**size)
              + "{nodes:,} and {edges:,} reach the target.".format(**r["attribution"]),
              f"{'loss in nats':<14}" + "".join(
                  f" {f'{n} {name} prompts':^26}  "
                  for name, n in zip(("search", "held-out"), r["prompts"].values())),
              f"{'':<14}" + f" {'2 tokens':>8} {'all':>8} {'accuracy':>8}  " * 2]
    for key, name in (("full", "full model"), ("circuit", "circuit")):
        scores = (r["losses"][key][split] for split in ("search", "held"))
        lines.append(f"{name:<14}" + "".join(
            f" {s['binary']:8.4f} {s['full']:8.4f} {s['accuracy']:8.1%}  " for s in scores))
    lines.append(f"{'target, chance':<14} {circuit.settings.target:8.4f} {math.log(2):8.4f}")
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
    lines += ["", *textwrap.wrap(LEGEND, 99)]
    return "\n".join(lines) + "\n\n" + ("\n\n" if verbose else "\n").join(
        "\n".join(block) for block in blocks(r, verbose))


def next_commands(circuit, model="", out=""):
    """Three commands to go on with, a line each. model, out: flags that they need."""
    nodes, (prompt, _) = circuit.record["nodes"], circuit.record["example"]["prompts"]
    start = f"\n    python prune.py {circuit.task}{model}"
    text = shlex.quote("".join(prompt[1:]).replace("⏎", "\n"))
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
    edges = {c["name"]: "none found" if c["edges"] is None else f"{c['edges']:.0f} edges"
             for c in checks if "edges" in c and c["passed"] is not None}
    return "controls: " + (", ".join(f"{name} {found}" for name, found in edges.items())
                           or "not run")


def packed(items, wide=99):
    """Lines of items, two spaces apart and indented."""
    lines = []
    for item in items:
        if lines and len(lines[-1]) + len(item) + 2 <= wide:
            lines[-1] += f"  {item}"
        else:
            lines.append(f"    {item}")
    return lines


def blocks(record, verbose, most=3):
    """[[line]]: a block for each head and node of a circuit in the order of computation; of a
    node's embeddings at most the `most` heaviest. Without verbose, nodes of less than a tenth of
    the largest importance are one block."""
    before, after, out = defaultdict(list), defaultdict(list), []
    for e in record["edges"] + record["residual"]:
        before[e["to"]].append(f"<- {e['from']} {e['weight']:+.2f}" if "weight" in e else
                               f"== {e['from']}")
        if "weight" in e:
            after[e["from"]].append(f"-> {e['to']} {e['weight']:+.2f}")
    for name in {e["to"] for e in record["embed"]}:
        rows = sorted((e for e in record["embed"] if e["to"] == name),
                      key=lambda e: -abs(e["weight"]))
        before[name].insert(0, "<- tokens " + ", ".join(
            f"{e['token']} {e['weight']:+.2f}" for e in rows[:most])
            + f" and {len(rows) - most} more" * (len(rows) > most))
    for e in sorted(record["unembed"], key=lambda e: -e["weight"]):
        after[e["from"]].append(f"-> answer {e['token']} {e['weight']:+.2f}")
    heads = {head["nodes"][0]: head for head in record["heads"]}  # by their first nodes
    largest = max((node["importance"] for node in record["nodes"]), default=0)
    minor = [node["name"] for node in record["nodes"] if node["importance"] < 0.1 * largest]
    for node in record["nodes"]:
        name, values = node["name"], record["example"]["values"][node["name"]]
        if h := heads.get(name):
            fixed = "" if any(".q." in n for n in h["nodes"]) else "; its queries are constant"
            out.append([f"{h['name']}  {h['overlap']:.0%} of its attention is where the full "
                        f"model's is{fixed}"])
            out[-1] += packed(f"end of prompt {i}: looks at " + ", ".join(
                f"{t} {w:.2f}" for t, w in a["to"][:3]) for i, a in enumerate(h["attends"], 1))
            if verbose:
                sink = "none" if h["sink"] is None else f"{h['sink']:+.2f}"
                out[-1].append(f"    logits: sink {sink}" + "".join(
                    f", {d} back {x:+.2f}" for d, x in h["distances"]))
        if name in minor and not verbose:
            continue
        back = 1 if name.startswith("final") else max(
            range(1, 1 + min(map(len, values))), key=lambda t: abs(values[0][-t] - values[1][-t]))
        tokens = " | ".join(dict.fromkeys(p[-back] for p in record["example"]["prompts"]))
        block = [f"{name:<16} importance {node['importance']:6.3f}   values "
                 f"{values[0][-back]:+7.2f} {values[1][-back]:+7.2f}  at -{back}, {tokens}"]
        block += packed(before[name] + after[name])
        if verbose:
            bias = "none" if node["bias"] is None else f"{node['bias']:+.3f}"
            block.append(f"    bias and frozen inputs {bias}, mean {node['mean']:+.3f}")
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


def explain(example, columns=5):
    """Prompts through a circuit, as text: the value of each node at each token. Nodes that are
    alike on the prompts of a pair, counted from the end, are left out."""
    lines, names = [], list(example["values"])
    if len(example["prompts"]) == 2:
        names = [name for name in names if any(
            abs(x - y) > 0.005 for x, y in zip(*(v[::-1] for v in example["values"][name])))]
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
    return "\n".join(lines)


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
body { margin: 0 auto; padding: 28px 32px; max-width: 1740px; background: var(--bg);
  color: rgb(var(--ink)); font: 14px/1.5 system-ui, "Helvetica Neue", Arial, sans-serif }
h1 { font-size: 24px; margin: 0 } h2 { font-size: 16px; margin: 26px 0 4px }
p { margin: 4px 0 } a { color: rgb(var(--pos)) }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 14px 0 }
pre, .tok { font: 11px/1.5 ui-monospace, Menlo, Consolas, monospace }
.panel { border: 1px solid rgb(var(--ink) / .2); padding: 6px 14px }
.mute { color: rgb(var(--ink) / .65); font-size: 12px } .mute svg { margin: 0 8px 0 28px }
svg { max-width: 100%; height: auto } text.mute { fill: rgb(var(--ink) / .65) }
text { fill: rgb(var(--ink)); font-size: 11px; text-anchor: middle } .ch { font-weight: 600 }
path { fill: none; stroke: rgb(var(--ink) / .4) } .pos { stroke: rgb(var(--pos)) }
.neg { stroke: rgb(var(--neg)); stroke-dasharray: 6 3 }
rect { fill: var(--bg); stroke: rgb(var(--ink) / .4); rx: 5px }
.soft { fill: rgb(var(--ink) / .05); stroke: rgb(var(--ink) / .12) }
.graph:hover:has(.lit) [data-lit]:not(.lit) { opacity: .12 }"""
SCRIPT = """
const graph = document.querySelector(".graph"), [panel, listing] = document.querySelectorAll("pre")
for (const box of graph?.querySelectorAll("a") ?? []) box.onmouseenter = () => {
  const name = box.querySelector("title").textContent + "  "
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


def document(title, *body):
    """A whole HTML page."""
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f"<title>{visible(title)}</title>\n<style>{CSS}</style></head>\n<body>"
            f"<h1>{visible(title)}</h1>\n{''.join(body)}</body></html>\n")


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


def heaviest(links, most=12):
    """The links less those of all but the `most` heaviest tokens of each side."""
    for side, end in ((IN, 0), (OUT, 1)):
        tokens = dict.fromkeys(link[end] for link in links if link[end].column == side)
        hidden = list(tokens)[most:]
        links = [link for link in links if link[end] not in hidden]
    return links


def route(boxes, columns, links):
    """{(Box, Box): (weight, {the ends of its links})} from column to column. A link over several
    columns follows the residual channel that it ends at, and passes the boxes of that channel."""
    stream = {(b.column, b.channel): b for b in boxes if b.column[1] not in (1, 4)}
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
    near, y = {box: [] for box in heads}, {box: i * ROW for i, box in enumerate(heads)}
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
    ids, links = {box: f"n{i}" for i, box in enumerate(boxes)}, heaviest(links)
    nodes, d_head = [box for box in boxes if boxes[box]], record["model"]["config"]["d_head"]
    drawn = [*nodes, *(box for link in links for box in link[:2])]
    columns = sorted({box.column for box in drawn})
    hops = route(drawn, columns, links)
    heads = {box: box for box in [*drawn, *(box for hop in hops for box in hop)]}
    heads |= {b: (b.column, b.channel // d_head) for b in nodes if b.column[1] == STEPS["q"]}
    y = arrange(heads, hops)
    if not y:
        return "<p>No node is needed: the bigram table and the frozen values do the task.</p>"
    top, tall, mid = min(y.values()) - 68, max(y.values()) - min(y.values()) + 98, WIDE / 2
    pitch = max(104, min(170, 1330 // len(columns)), tall // 12)  # steep wires need room
    x = {column: i * pitch for i, column in enumerate(columns)}
    wide, out = x[columns[-1]] + WIDE + 24, []
    for column in columns:
        out.append(f'<text class="mute" x="{x[column] + mid}" y="{top + 20:.0f}">{column[2]}'
                   "</text>")
    for column, head in {heads[box]: None for box in nodes if heads[box] != box}:
        ys = [y[box] for box in nodes if heads[box] == (column, head)]
        out.append(f'<rect class="soft" data-lit="" x="{x[column] - 7}" y="{min(ys) - 38:.1f}" '
                   f'width="{WIDE + 14}" height="{max(ys) - min(ys) + 61:.1f}"/><text x="'
                   f'{x[column] + mid}" y="{min(ys) - 23:.1f}" class="mute">head {head}</text>')
    lit, largest = {box: {box} for box in y}, Counter()
    for (a, b), (weight, ends) in hops.items():
        largest[a.column[1]] = max(largest[a.column[1]], abs(weight))
        lit[a] |= ends
        lit[b] |= ends
    for (a, b), (weight, ends) in reversed(hops.items()):  # the heaviest are drawn last, on top
        start, end = x[a.column] + WIDE * bool(a.site), x[a.column] + WIDE
        dx, dy = x[b.column] - end, y[b] - y[a]
        out.append(f'<path class="{"pos" if weight > 0 else "neg" if weight else ""}" '
                   f'data-lit="{" ".join(sorted(ids[box] for box in ends))}" '
                   f'stroke-width="{1 + 3 * abs(weight) / (largest[a.column[1]] or 1):.1f}" '
                   f'd="M{start} {y[a]:.1f}H{end}c{dx / 2} 0 {dx / 2} {dy:.1f} {dx} {dy:.1f}"/>')
    most = max(node["importance"] for node in record["nodes"])
    for box in (box for box in y if box.site):
        title, text, kind, low, shade = "", visible(box_name(box), "␣", 9), "soft", 4, 1
        if node := boxes[box]:
            title, kind, low = box.channel, "", 11
            shade = 0.45 + 0.55 * min(1, max(0, node["importance"]) / (most or 1))
            if heads[box] != box:
                title = f"{box.site[-1]}.{box.channel}"
            text = "".join(visible(row[1], "␣", 9) for row in node["task"]["high"][:1])
        lights = " ".join(sorted(ids[b] for b in lit[box]))
        out.append(f'<a id="{ids[box]}" opacity="{shade:.2f}" data-lit="{lights}" '
                   f'transform="translate({x[box.column]} {y[box]:.1f})"><title>'
                   f'{visible(box_name(box))}</title><rect class="{kind}" y="-{HIGH / 2}" '
                   f'width="{WIDE}" height="{HIGH}"/><text class="ch" x="{mid}" y="-3">{title}'
                   f'</text><text class="tok" x="{mid}" y="{low}">{text}</text></a>')
    return (f'<svg class="graph" viewBox="-12 {top:.0f} {wide:.0f} {tall:.0f}" width="{wide:.0f}">'
            + "\n".join(out) + "</svg>\n")


def summary_page(rows):
    """The table of all tasks above the pictures of their circuits, as an HTML page."""
    found = [circuit for circuit, _ in rows.values() if circuit]
    text = html.escape(summary(rows))
    for name in (circuit.task for circuit in found):
        text = text.replace(f"\n{name} ", f'\n<a href="#{name}">{name}</a> ')
    drawn = {c.task: picture(c.record) if len(c.nodes) <= 120 else "<p>Too large to be seen here."
             for c in found}
    return document("Circuits", f"<pre>{text}</pre>", *(
        f'<h2 id="{c.task}">{c.task}</h2><p>{visible(c.record["doc"])}</p>{drawn[c.task]}'
        for c in found))


def page(circuit):
    """A circuit as a self-contained HTML page: its picture above its listing."""
    record = circuit.record
    text = f"{listing(circuit, verbose=True)}\n\n{explain(record['example'])}"
    wires = (("pos", "positive weight (width: relative to the largest of its kind)"),
             ("neg", "negative weight"), ("", "residual channel"))
    return document(
        circuit.task, f"<p>{visible(record['doc'])}</p>\n",
        *(f"<p>{visible(line(record['checks']))}</p>" for line in (check_line, control_line)),
        '<p class="mute">box: channel, and the token with its highest value; the fainter, the '
        "less important; at most 12 tokens a side", *(
            f'<svg width="32" height="8"><path class="{kind}" d="M0 4H32"/></svg>{what}'
            for kind, what in wires), "</p>\n",
        picture(record), '<pre class="panel" hidden></pre>\n<pre>',
        "\n".join(map(visible, text.split("\n"))), f"</pre><script>{SCRIPT}</script>")


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
