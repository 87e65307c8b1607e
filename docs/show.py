"""Shows a circuit: as text, as a self-contained HTML page, and as a graph for Graphviz.

All of it is made from a circuit's saved record, without the model: see prune.describe.
"""
import html
import itertools
import math
from collections import Counter, defaultdict, namedtuple
from statistics import fmean, geometric_mean


def one_line(text, space=" "):
    """Text on one line, with visible newlines, tabs and control characters."""
    seen = {" ": space, "\n": "⏎", "\t": "⇥"}
    return "".join(seen.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in text)


# ---- text ---------------------------------------------------------------------------------------

def listing(circuit):
    """A circuit as text: sizes, losses, nodes and edges, checks."""
    r, c, size = circuit.record, circuit.calibration, circuit.record["size"]
    full = dict(stage="full model", nodes=size["model_nodes"], edges=size["model_edges"],
                loss=r["losses"]["full"]["search"]["binary"])
    lines = [f"{circuit.task}: {r['doc']}", "", f"{'':<24} {'nodes':>7} {'edges':>8} {'loss':>8}"]
    lines += [f"{s['stage']:<24} {s['nodes']:>7,} {s['edges']:>8,} {s['loss']:8.4f}"
              for s in (full, *r["stages"])]
    ranked = r["attribution"]
    lines += [f"{'ranked by attribution':<24} {ranked['nodes']:>7,} {ranked['edges']:>8,}"
              "          (fewest nodes by rank at the same target)",
              f"Not counted as edges: biases, {size['embed']} embeddings of tokens that differ "
              f"within a pair, {size['unembed']} unembeddings of answers.", "",
              f"{'loss in nats':<24} {'search prompts':^26}   {'held-out prompts':^26}",
              f"{'':<24}" + f" {'binary':>8} {'full':>8} {'accuracy':>8}  " * 2]
    for key, name in (("full", "full model"), ("circuit", "circuit"),
                      ("uncalibrated", "circuit, uncalibrated")):
        scores = (r["losses"][key][split] for split in ("search", "held"))
        lines.append(f"{name:<24}" + "".join(
            f" {s['binary']:8.4f} {s['full']:8.4f} {s['accuracy']:8.1%}  " for s in scores))
    lines += [f"Calibration: logits x {c.scale:.3f} (allowed: 1/2 to 2), first answer's logit "
              f"{c.shift:+.3f}; fitted on other prompts.",
              f"The target, {circuit.settings.target:g}, is for the binary loss of the calibrated "
              "circuit on the search prompts.", "", "The circuit in the order of computation. <- "
              "is an edge with its weight, == the same channel of the residual stream."]
    marks = {True: "passed", False: "FAILED", None: "-"}
    return "\n".join([*lines, *node_lines(r), "", "checks", *(
        f"    {marks[c['passed']]:<7} {c['name']}: {c['text']}" for c in r["checks"])])


def node_lines(record, most=8):
    """Lines of text: the heads and nodes of a circuit in the order of computation, a blank line
    before each; of a node's embeddings at most the `most` heaviest."""
    into, tokens, answers, lines = *(defaultdict(list) for _ in range(3)), []
    for e in record["edges"] + record["residual"]:
        link = f"<- {e['from']}  {e['weight']:+.3f}" if "weight" in e else f"== {e['from']}"
        into[e["to"]].append(f"    {link}")
    for e in sorted(record["embed"], key=lambda e: -abs(e["weight"])):
        tokens[e["to"]].append(f"  {e['token']} {e['weight']:+.2f}")
    for e in sorted(record["unembed"], key=lambda e: -e["weight"]):
        answers[e["from"]].append(f"  {e['token']} {e['weight']:+.2f}")
    heads = {head["nodes"][0]: head for head in record["heads"]}  # by their first nodes
    for node in record["nodes"]:
        name = node["name"]
        if h := heads.get(name):
            sink = "none" if h["sink"] is None else f"{h['sink']:+.2f}"
            bias = "".join(f", {d} back {x:+.2f}" for d, x in h["distances"])
            lines += ["", f"{h['name']}  logits: sink {sink}{bias}; {h['overlap']:.0%} of the "
                          "attention is as in the full model"]
            lines += [f"    at the end of {a['context']}  attends to " + ", ".join(
                f"{t} {w:.2f}" for t, w in a["to"]) for a in h["attends"]]
        bias = "" if node["bias"] is None else f"  bias {node['bias']:+.3f}"
        lines += ["", f"{name}{bias}  mean {node['mean']:+.3f}"]
        if rows := tokens[name]:
            more = f"  and {len(rows) - most} more" if len(rows) > most else ""
            lines.append("    <- tokens" + "".join(rows[:most]) + more)
        lines += into[name]
        for kind, side in itertools.product(("task", "text"), ("high", "low")):
            lines.append(f"    {kind} {side:<5}" + "   ".join(
                f"{before}[{t}] {v:+.2f}" for before, t, v in node[kind][side][:3]))
        if answers[name]:
            lines.append("    -> answers" + "".join(answers[name]))
    return lines


def explain(example, columns=7):
    """One pair of prompts through a circuit, as text: the value of each node at each token."""
    lines, names = [], list(example["values"])
    for start, p in itertools.product(range(0, len(names), columns), range(2)):
        some = names[start:start + columns]
        lines += ["", f"prompt {p + 1}, right answer {example['answers'][p]}, calibrated margin "
                  f"{example['margins'][p]:+.3f}", " " * 14 + "".join(f"{x:>16}" for x in some)]
        for t, text in enumerate(example["prompts"][p]):
            lines.append(f"{text:<14}" + "".join(
                f"{example['values'][name][p][t]:>16.3f}" for name in some))
    return "\n".join(lines)


def summary(rows):
    """The table of all tasks, as text. rows: {task: (its Circuit or None, why there is none)}."""
    names = "full circuit held-out nodes edges without random nonsense shuffled".split()
    lines, sizes_ = [f"{'task':<28}" + "".join(f"{name:>10}" for name in names)], []
    for task, (circuit, text) in rows.items():
        if circuit:
            r, checks = circuit.record, {c["name"]: c for c in circuit.record["checks"]}
            full, own, size = r["losses"]["full"], r["losses"]["circuit"], r["size"]
            sizes_.append([max(1, size["nodes"]), max(1, size["edges"])])
            cells = [full["search"]["binary"], own["search"]["binary"], own["held"]["binary"],
                     size["nodes"], size["edges"], checks["necessity"]["loss"],
                     checks["random circuits"]["loss"]]
            controls = (checks[name]["edges"] for name in ("nonsense task", "shuffled weights"))
            cells += ["none" if edges is None else int(edges) for edges in controls]
            text = "".join(f"{x:>10.3f}" if isinstance(x, float) else f"{x:>10}" for x in cells)
        lines.append(f"{task:<28}{'' if circuit else '  '}{text}")
    means = [geometric_mean(column) for column in zip(*sizes_)] or [0, 0]
    return "\n".join([
        *lines, "{} circuits: geometric mean {:.1f} nodes, {:.1f} edges (0 counts as 1)".format(
            len(sizes_), *means),
        "full, circuit: binary losses in nats on the search prompts; held-out: the circuit's on "
        "other prompts",
        "without: the full model's loss without the circuit; random: the lowest of ten random "
        "circuits of this size",
        "nonsense, shuffled: edges that the same search needs for the two controls"])


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
    for box in (box for box in y if box.site):
        title, text, kind, low = "", visible(box_name(box), "␣", 9), "soft", 4
        if node := boxes[box]:
            title, kind, low = box.channel, "", 11
            if heads[box] != box:
                title = f"{box.site[-1]}.{box.channel}"
            text = "".join(visible(row[1], "␣", 9) for row in node["task"]["high"][:1])
        out.append(f'<a id="{ids[box]}" data-lit="{" ".join(sorted(ids[b] for b in lit[box]))}" '
                   f'transform="translate({x[box.column]} {y[box]:.1f})"><title>'
                   f'{visible(box_name(box))}</title><rect class="{kind}" y="-{HIGH / 2}" '
                   f'width="{WIDE}" height="{HIGH}"/><text class="ch" x="{mid}" y="-3">{title}'
                   f'</text><text class="tok" x="{mid}" y="{low}">{text}</text></a>')
    return (f'<svg class="graph" viewBox="-12 {top:.0f} {wide:.0f} {tall:.0f}" width="{wide:.0f}">'
            + "\n".join(out) + "</svg>\n")


def page(circuit):
    """A circuit as a self-contained HTML page: its picture above its listing."""
    record, text = circuit.record, f"{listing(circuit)}\n\n{explain(circuit.record['example'])}"
    wires = (("pos", "positive weight (width: relative to the largest of its kind)"),
             ("neg", "negative weight"), ("", "residual channel"))
    return document(
        circuit.task, f"<p>{visible(record['doc'])}</p>\n",
        '<p class="mute">box: channel, and the token with its highest value; at most 12 tokens a '
        "side", *(f'<svg width="32" height="8"><path class="{kind}" d="M0 4H32"/></svg>{what}'
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
