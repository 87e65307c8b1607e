"""Draws a circuit as a self-contained HTML page and as a graph for Graphviz.

All of it is made from a circuit's saved record, without the model: see prune.describe.
"""
import html
import math
from collections import Counter, namedtuple
from statistics import fmean


def one_line(text, space=" "):
    """Text on one line, with visible newlines, tabs and control characters."""
    seen = {" ": space, "\n": "⏎", "\t": "⇥"}
    return "".join(seen.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in text)


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


def page(record, title, text):
    """A circuit as a self-contained HTML page: its picture above its listing, text."""
    wires = (("pos", "positive weight (width: relative to the largest of its kind)"),
             ("neg", "negative weight"), ("", "residual channel"))
    return document(
        title, f"<p>{visible(record['doc'])}</p>\n",
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
