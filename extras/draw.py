"""Draws a circuit: a page of HTML that needs no other file, and a graph for Graphviz.

All of it is made from what a circuit's file holds, without the model. sparsegpt.SITES gives the
order of the columns. A site that is not in it has a column of its own, after the others.
"""
import html
import math
from collections import Counter, defaultdict, namedtuple
from pathlib import Path
from statistics import fmean

import prune
import sparsegpt as sg

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
# A column is (block, step, title), which sorts in the order of computation.
IN, FINAL, OUT = (-1, -1, "tokens in"), (math.inf, 98, "final"), (math.inf, 99, "tokens out")
WIDE, HIGH, ROW, LANE, LABEL = 64, 32, 42, 13, 26  # pixels: a box; the height of box, wire, label
WINDOW = 1660  # pixels between the first column and the last that a window of 1400 can show

# A node; a token, with site "token" and its text as channel; or, with site "", the point where a
# wire passes a column.
Box = namedtuple("Box", "column site channel")


def write(path, circuit):
    """Write the page and the graph of a circuit beside its file: path with .html and .dot."""
    sg.write_text(Path(path).with_suffix(".html"), page(circuit))
    sg.write_text(Path(path).with_suffix(".dot"), dot(circuit.report))


def write_summary(path, rows):
    """Write a page of all tasks. rows: {task: (its Circuit or None, why there is none)}."""
    sg.write_text(path, summary_page(rows))


# ---- text in HTML -------------------------------------------------------------------------------

def visible(text, space=" ", most=999):
    """Text for HTML, on one line of at most `most` letters."""
    text = sg.one_line(text, space)
    return html.escape(text if len(text) <= most else text[:most - 1] + "…")


def lines_of(text):
    """Text of several lines for HTML."""
    return "\n".join(map(visible, text.split("\n")))


def document(title, *body, note=""):
    """A whole HTML page, with a note beside its title."""
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f"<title>{visible(title)}</title>\n<style>{CSS}</style></head>\n<body>"
            f"<h1>{visible(title)} <small>{visible(note)}</small></h1>\n"
            f"{''.join(body)}</body></html>\n")


# ---- the circuit as boxes and links -------------------------------------------------------------

def column_of(site):
    """The column of a site's full name, as h0.neuron. The sites of one matrix share a column."""
    block, _, name = site.rpartition(".")
    if not block:
        return *FINAL[:2], site
    sites = next((m.writes for m in sg.MATRICES.values() if name in m.writes), (name,))
    return int(block[1:]), [*sg.SITES, sites[0]].index(sites[0]), f"{block}.{' '.join(sites)}"


def in_stream(box):
    """Whether a box is a channel of the residual stream, or before or after it all."""
    block, _, name = box.site.rpartition(".")
    return not block or (name in sg.SITES and sg.SITES[name].link in ("reads", "adds"))


def box_name(box):
    """The name of a node, or the text of a token."""
    return box.channel if box.site == "token" else f"{box.site}.{box.channel}"


def graph(report):
    """({Box: its node's dict, or None for a token}, [(from, to, weight, or 0 for a residual
    channel)], the heaviest first)."""
    def box(name):
        site, _, channel = name.rpartition(".")
        return Box(column_of(site), site, int(channel))

    links = [(box(e["from"]), box(e["to"]), e.get("weight", 0))
             for e in report["edges"] + report["residual"]]
    links += [(Box(IN, "token", e["token"]), box(e["to"]), e["weight"]) for e in report["embed"]]
    links += [(box(e["from"]), Box(OUT, "token", e["token"]), e["weight"])
              for e in report["unembed"]]
    boxes = {box(node["name"]): node for node in report["nodes"]}
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
    columns that ends in the residual stream passes the boxes of its channel there."""
    stream = {(b.column, b.channel): b for b in boxes if in_stream(b)}
    hops = {}
    for a, b, weight in links:
        channel = b.channel if in_stream(b) else b  # an own one: no other wire joins this
        between = columns[columns.index(a.column) + 1:columns.index(b.column)]
        way = [a, *(stream.get((c, channel), Box(c, "", channel)) for c in between), b]
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


# ---- pictures and tables ------------------------------------------------------------------------

def picture(circuit):
    """A circuit as inline SVG. data-lit: the ids of the boxes that light up a box or a wire."""
    report = circuit.report
    boxes, links = graph(report)
    links = grouped(links)
    nodes = {box_name(box): box for box in boxes if boxes[box]}
    drawn = list(dict.fromkeys([*nodes.values(), *(box for link in links for box in link[:2])]))
    ids = {box: f"{circuit.task}-{i}" for i, box in enumerate(drawn)}
    columns = sorted({box.column for box in drawn})
    hops = route(drawn, columns, links)
    heads = {box: box for box in [*drawn, *(box for hop in hops for box in hop)]}
    heads |= {nodes[name]: (nodes[name].column, head["name"].partition(".")[2].replace(".", " "))
              for head in report["heads"] for name in head["nodes"] if name in nodes}
    y = arrange(heads, hops)
    if not y:
        return "<p>No node is needed: the bigram table and the frozen values do the task.</p>"
    top, tall = min(y.values()) - 68, max(y.values()) - min(y.values()) + 98
    pitch = max(104, min(170, 1330 // len(columns)),  # steep wires need room, within a window
                min(tall // 12, WINDOW // (len(columns) - 1 or 1)))
    x = {column: i * pitch - WIDE * (column == IN) for i, column in enumerate(columns)}
    width = {column: WIDE * (1 + (column in (IN, OUT))) for column in columns}
    left = x[columns[0]] - 12
    wide = x[columns[-1]] + width[columns[-1]] + 12 - left
    out = [f'<text class="mute" x="{x[column] + width[column] / 2}" y="{top + 20:.0f}">'
           f"{visible(column[2])}</text>" for column in columns]
    for column, head in dict.fromkeys(head for box, head in heads.items() if head != box):
        ys = [y[box] for box in heads if heads[box] == (column, head)]
        out.append(f'<rect class="soft" data-lit="" x="{x[column] - 7}" y="{min(ys) - 38:.1f}" '
                   f'width="{WIDE + 14}" height="{max(ys) - min(ys) + 61:.1f}"/>'
                   f'<text class="mute" x="{x[column] + WIDE / 2}" y="{min(ys) - 23:.1f}">'
                   f"{visible(head)}</text>")
    lit, largest = {box: {box} for box in y}, Counter()
    for (a, b), (weight, ends) in hops.items():
        largest[a.column[1]] = max(largest[a.column[1]], abs(weight))
        lit[a] |= ends
        lit[b] |= ends

    def lights(ends):
        return " ".join(sorted(ids[box] for box in ends))

    for (a, b), (weight, ends) in reversed(hops.items()):  # the heaviest are drawn last, on top
        end = x[a.column] + width[a.column]
        start = end if a.site else x[a.column]
        dx, dy = x[b.column] - end, y[b] - y[a]
        out.append(f'<path class="{"pos" if weight > 0 else "neg" if weight else ""}" '
                   f'data-lit="{lights(ends)}" '
                   f'stroke-width="{1 + 3 * abs(weight) / (largest[a.column[1]] or 1):.1f}" '
                   f'd="M{start} {y[a]:.1f}H{end}c{dx / 2} 0 {dx / 2} {dy:.1f} {dx} {dy:.1f}"/>')
    most = max((node["importance"] for node in report["nodes"]), default=0)
    for box in (box for box in y if box.site):
        title, kind, low, shade = "", "soft", 4, 1
        if node := boxes.get(box):
            name, title, kind, low = box_name(box), box.channel, "", 11
            shade = 0.45 + 0.55 * min(1, max(0, node["importance"]) / (most or 1))
            if box.column[2] != box.site:  # a column of several sites
                title = visible(name.partition(".")[2])
            text = "".join(visible(row[1], "␣", 9) for row in node["task"]["high"][:1])
        else:
            texts = [sg.one_line(text, "␣") for text in box.channel]
            name, text = "  ".join(texts), visible("  ".join(texts[:3]), most=14)
            text += f" +{len(texts) - 3}" * (len(texts) > 3)
        mid = width[box.column] / 2
        out.append(f'<a id="{ids[box]}" opacity="{shade:.2f}" data-lit="{lights(lit[box])}" '
                   f'transform="translate({x[box.column]} {y[box]:.1f})"><title>'
                   f'{visible(name)}</title><rect class="{kind}" y="-{HIGH / 2}" '
                   f'width="{2 * mid:.0f}" height="{HIGH}"/><text class="ch" x="{mid}" y="-3">'
                   f'{title}</text><text class="tok" x="{mid}" y="{low}">{text}</text></a>')
    return (f'<div class="wide"><svg class="graph" viewBox="{left} {top:.0f} {wide} {tall:.0f}" '
            f'width="{wide}" style="min-width: {0.7 * wide:.0f}px">' + "\n".join(out)
            + "</svg></div>\n")


def headings(texts):
    """Texts as headings of a table."""
    return "".join(f"<th>{visible(text, '␣')}</th>" for text in texts)


def table_row(heading, cells):
    """A row of a table: its heading, and a cell for each (-1 to 1 as colour, title, text)."""
    return f"<tr>{headings([heading])}" + "".join(
        f'<td class="{"neg" if shade < 0 else ""}" style="--shade:{abs(shade):.2f}" '
        f'title="{visible(title)}">{text}</td>' for shade, title, text in cells) + "</tr>\n"


def differing(example):
    """The names of the nodes that differ between two prompts, counted from the end."""
    return [name for name, values in example["values"].items() if any(
        abs(x - y) > 0.005 for x, y in zip(*(v[::-1] for v in values)))]


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


def attention_maps(report):
    """Tables of what each head of a circuit looks at on the two prompts."""
    out = ['<h2>Attention</h2><p class="mute">row: the token that looks; column: the one it looks '
           'at; the rest of a row is in the sink</p><div class="heads">']
    for head in report["heads"]:
        out.append("<div>")
        for tokens, attends in zip(report["example"]["prompts"], head["attends"]):
            out.append(f"<table><caption>{visible(head['name'])}</caption>"
                       f"<tr>{headings(['', *tokens])}</tr>\n")
            out += [table_row(query, ((x / 100, f"{query} looks at {key}: {x}%", "")
                                      for key, x in zip(tokens, row)))
                    for query, row in zip(tokens, attends["rows"])]
            out.append("</table>")
        out.append("</div>")
    return "".join(out) + "</div>\n" if report["heads"] else ""


# ---- whole drawings -----------------------------------------------------------------------------

def check_line(checks):
    """The checks on one line: how many passed, and which did not, with their numbers."""
    failed = [f"{c['name']} {prune.amount(c)}" for c in checks if c["passed"] is False]
    return f"checks: passed {sum(c['passed'] is True for c in checks)}" + (
        f", FAILED {len(failed)}: {', '.join(failed)}" if failed else "")


def control_line(checks):
    """What the same search needs where there should be no circuit, on one line."""
    edges = [f"{c['name'].removesuffix(' task')} {prune.amount(c).removesuffix(' edges')}"
             for c in checks if c["name"] in prune.CONTROLS and c["passed"] is not None]
    return f"controls (edges; none or far more is good): {', '.join(edges) or 'not run'}"


def page(circuit):
    """A circuit as an HTML page: its picture, values and attention, its listing."""
    report = circuit.report
    wires = (("pos", "positive weight (width: relative to the largest of its kind)"),
             ("neg", "negative weight"), ("", "residual channel"))
    return document(
        circuit.task, f"<p>{visible(report['doc'])}</p>\n",
        f"<p>{visible(control_line(report['checks']))}</p>",
        '<p class="mute">box: channel, and the token with its highest value; the fainter, the '
        "less important; tokens with the same edges share a box; not drawn: token weights under "
        "a third of their node's largest, and all but 10 boxes on each side</p>\n"
        '<p class="mute">', *(
            f'<svg width="32" height="8"><path class="{kind}" d="M0 4H32"/></svg>{what}'
            for kind, what in wires), "</p>\n",
        picture(circuit), '<pre class="panel" hidden></pre>\n', heat_map(report["example"]),
        attention_maps(report), f"<pre>{lines_of(prune.listing(circuit, verbose=True))}"
        f"</pre><script>{SCRIPT}</script>", note=check_line(report["checks"]))


def summary_page(rows):
    """The table of all tasks above the pictures of their circuits, as an HTML page."""
    text, body = lines_of(prune.summary(rows)), []
    for circuit in (circuit for circuit, _ in rows.values() if circuit):
        name, report = visible(circuit.task), circuit.report
        text = text.replace(f"\n{name} ", f'\n<a href="#{name}">{name}</a> ')
        body += [f'<h2 id="{name}">{name} <small>',
                 f"{visible(check_line(report['checks']))}</small></h2>",
                 f"<p>{visible(report['doc'])}</p>",
                 picture(circuit) if len(circuit.nodes) <= 120 else
                 "<p>Too large to be seen here.</p>"]
    return document("Circuits", f"<pre>{text}</pre>", *body)


def dot(report):
    """The same graph for Graphviz. Colour, dash and width show weights."""
    boxes, links = graph(report)
    ids = {box: f"n{i}" for i, box in enumerate(boxes)}
    out = ["digraph{rankdir=LR;node[shape=box]"]
    for box in boxes:
        name = visible(box_name(box), "␣").replace("\\", "\\\\")
        out.append(f'{ids[box]} [label="{name}"]')
    for a, b, weight in links:
        look = '"#0062a8"' if weight > 0 else '"#ce5400" style=dashed' if weight else "gray"
        out.append(f"{ids[a]} -> {ids[b]} [color={look} penwidth={min(6, 1 + abs(weight)):.1f}]")
    return "\n".join(out) + "\n}\n"
