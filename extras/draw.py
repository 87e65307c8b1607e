"""Draws a circuit: a page of HTML that needs no other file, and a graph for Graphviz.

All of it is made from what a circuit's file holds, without the model. sparsegpt.SITES gives the
order of the columns. A site that is not in it has a column of its own, after the others.
"""
import dataclasses
import html
import math
from collections import Counter, defaultdict, namedtuple
from itertools import takewhile
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
pre { margin: 14px 0 } .wide, .scroll { overflow: auto } .scroll { max-height: 80vh }
pre, table, summary, mark, .tok { font: 11px/1.5 ui-monospace, Menlo, Consolas, monospace }
pre, summary { white-space: pre-wrap } table, .tok { white-space: pre; --shade: 0 }
details pre { margin: 0 0 8px; scroll-margin-top: 40px } summary { cursor: pointer }
details pre:not([id]) { display: inline-block; min-width: 440px; vertical-align: top }
mark { color: inherit; background: rgb(var(--pos) / .3) } svg { max-width: 100%; height: auto }
.mute { color: rgb(var(--ink) / .65); fill: rgb(var(--ink) / .65) } p.mute { font-size: 12px }
text { fill: rgb(var(--ink)); font-size: 11px; text-anchor: middle } .ch { font-weight: 600 }
path { fill: none; stroke: rgb(var(--ink) / .4) } .pos { stroke: rgb(var(--pos)) }
.neg { stroke: rgb(var(--neg)); stroke-dasharray: 6 3 }
rect { fill: var(--bg); stroke: rgb(var(--ink) / .4); rx: 5px }
.soft { fill: rgb(var(--ink) / .05); stroke: rgb(var(--ink) / .12) }
th { font-weight: 400; padding: 0 4px } tr :first-child { text-align: left }
.scroll th:first-child { position: sticky; left: 0; background: var(--bg) }
td { text-align: right; padding: 0 3px; background: rgb(var(--pos) / calc(.6 * var(--shade)));
  color: rgb(var(--ink) / calc(.6 + 4 * var(--shade))); print-color-adjust: exact }
td.neg { background: repeating-linear-gradient(135deg, rgb(var(--neg) / calc(.5 * var(--shade)))
  0 5px, rgb(var(--neg) / calc(.3 * var(--shade))) 5px 8px) }
.heads, .heads div { display: flex; flex-wrap: wrap; align-items: start; gap: 14px }
.heads { column-gap: 40px } .heads tr:first-child th { writing-mode: vertical-rl; padding: 4px 0 }
@media print { svg { min-width: 0 !important } .scroll { max-height: none } }"""
# A column is (block, step, title), which sorts in the order of computation.
IN, FINAL, OUT = (-1, -1, "tokens in"), (math.inf, 98, "final"), (math.inf, 99, "tokens out")
WIDE, HIGH, ROW, LANE, LABEL = 64, 32, 42, 13, 26  # pixels: a box; the height of box, wire, label
TOO_LARGE, MOST = 120, 60  # nodes: a circuit of more is drawn with its most important ones
SAME = 0.005  # the largest difference between two prompts that does not count

KEY = """<p class="mute">line: blue, a positive weight; orange and dashed, a negative one (width:
relative to the largest of its kind); grey, a residual channel. Box: a channel, and the last token,
counted from the end, at which it differs between the prompts (at a token of one alone: from its
mean over training text) by half of its largest difference or more, on the prompt where it is
farther from that mean (↑ above, ↓ below); no token: the same on both; the fainter, the less
important. Tokens with the same edges share a box.
Not drawn: token weights under a third of their node's largest, and all but 10 boxes a side.</p>"""

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

def readable(circuit):
    """A circuit; one that is too large to be seen, with its most important nodes alone."""
    report = circuit.report
    ranked = sorted(report["nodes"], key=lambda node: -node["importance"])
    if len(ranked) <= TOO_LARGE:
        return circuit
    kept = {node["name"] for node in ranked[:MOST]}
    less = {key: [x for x in report[key] if {*map(x.get, ("name", "from", "to"))} <= kept | {None}]
            for key in ("nodes", "edges", "residual", "embed", "unembed")}
    heads = [head for head in report["heads"] if kept & {*head["nodes"]}]
    values = {name: x for name, x in report["example"]["values"].items() if name in kept}
    return dataclasses.replace(circuit, report=report | less | dict(
        heads=heads, example=report["example"] | dict(values=values)))


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
    """{(Box, Box): weight} from column to column. A link over several columns that ends in the
    residual stream passes the boxes of its channel there."""
    stream = {(b.column, b.channel): b for b in boxes if in_stream(b)}
    hops = {}
    for a, b, weight in links:
        channel = b.channel if in_stream(b) else b  # an own one: no other wire joins this
        between = columns[columns.index(a.column) + 1:columns.index(b.column)]
        way = [a, *(stream.get((c, channel), Box(c, "", channel)) for c in between), b]
        for hop in zip(way, way[1:]):  # the weight adds to the channel where the link begins
            hops.setdefault(hop, weight if hop[0] == a else 0)
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

def differing(report):
    """The names of the nodes that differ between two prompts, counted from the end."""
    return [node["name"] for node in report["nodes"] if max(map(abs, prune.gaps(
        report["example"]["values"][node["name"]], node["mean"]))) > SAME]


def telling_token(node, example):
    """The token that a node's box shows, as KEY has it, as text for HTML."""
    values = example["values"][node["name"]]
    if max(map(abs, prune.gaps(values, node["mean"]))) <= SAME:
        return ""
    back = prune.telling(values, node["mean"])
    _, up, token = max((abs(row[-back] - node["mean"]), row[-back] > node["mean"], tokens[-back])
                       for row, tokens in zip(values, example["prompts"]) if back < len(tokens))
    return f"{'↑' if up else '↓'} {visible(token, '␣', 7)}"


def picture(circuit, page=""):
    """A circuit as inline SVG, below its prompts. Boxes lead to their nodes' rows in a page."""
    report, example = circuit.report, circuit.report["example"]
    boxes, links = graph(report)
    links = grouped(links)
    nodes = {box_name(box): box for box in boxes if boxes[box]}
    drawn = list(dict.fromkeys([*nodes.values(), *(box for link in links for box in link[:2])]))
    columns = sorted({box.column for box in drawn})
    hops = route(drawn, columns, links)
    heads = {box: box for box in [*drawn, *(box for hop in hops for box in hop)]}
    heads |= {nodes[name]: (nodes[name].column, head["name"].partition(".")[2].replace(".", " "))
              for head in report["heads"] for name in head["nodes"] if name in nodes}
    y = arrange(heads, hops)
    if not y:
        return "<p>No node is needed: the bigram table and the frozen values do the task.</p>"
    top, tall = min(y.values()) - 68, max(y.values()) - min(y.values()) + 98
    pitch = max(104, min(170, 1330 // len(columns)))  # steep wires need room, within a window
    x = {column: i * pitch - WIDE * (column == IN) for i, column in enumerate(columns)}
    width = {column: WIDE * (1 + (column in (IN, OUT))) for column in columns}
    left = x[columns[0]] - 12
    wide = x[columns[-1]] + width[columns[-1]] + 12 - left
    out = [f'<text class="mute" x="{x[column] + width[column] / 2}" y="{top + 20:.0f}">'
           f"{visible(column[2])}</text>" for column in columns]
    for column, head in dict.fromkeys(head for box, head in heads.items() if head != box):
        ys = [y[box] for box in heads if heads[box] == (column, head)]
        out.append(f'<rect class="soft" x="{x[column] - 7}" y="{min(ys) - 38:.1f}" '
                   f'width="{WIDE + 14}" height="{max(ys) - min(ys) + 61:.1f}"/>'
                   f'<text class="mute" x="{x[column] + WIDE / 2}" y="{min(ys) - 23:.1f}">'
                   f"{visible(head)}</text>")
    largest = Counter()
    for (a, _), weight in hops.items():
        largest[a.column[1]] = max(largest[a.column[1]], abs(weight))
    for (a, b), weight in reversed(hops.items()):  # the heaviest are drawn last, on top
        end = x[a.column] + width[a.column]
        start = end if a.site else x[a.column]
        dx, dy = x[b.column] - end, y[b] - y[a]
        out.append(f'<path class="{"pos" if weight > 0 else "neg" if weight else ""}" '
                   f'stroke-width="{1 + 3 * abs(weight) / (largest[a.column[1]] or 1):.1f}" '
                   f'd="M{start} {y[a]:.1f}H{end}c{dx / 2} 0 {dx / 2} {dy:.1f} {dx} {dy:.1f}"/>')
    most = max((node["importance"] for node in report["nodes"]), default=0)
    for box in (box for box in y if box.site):
        title, kind, low, shade, link = "", "soft", 4, 1, ""
        if node := boxes.get(box):
            name, title, kind, low = box_name(box), box.channel, "", 11
            shade = 0.45 + 0.55 * min(1, max(0, node["importance"]) / (most or 1))
            if box.column[2] != box.site:  # a column of several sites
                title = visible(name.partition(".")[2])
            text, link = telling_token(node, example), f' href="{page}#{name}"'
        else:
            texts = [sg.one_line(text, "␣") for text in box.channel]
            name, text = "  ".join(texts), visible("  ".join(texts[:3]), most=14)
            text += f" +{len(texts) - 3}" * (len(texts) > 3)
        mid = width[box.column] / 2
        out.append(f'<a{link} opacity="{shade:.2f}" transform="translate({x[box.column]} '
                   f'{y[box]:.1f})"><title>{visible(name)}</title><rect class="{kind}" '
                   f'y="-{HIGH / 2}" width="{2 * mid:.0f}" height="{HIGH}"/><text class="ch" '
                   f'x="{mid}" y="-3">{title}</text><text class="tok" x="{mid}" y="{low}">{text}'
                   "</text></a>")
    prompts = "; ".join(f"{visible(''.join(tokens[1:]), '␣')} → {visible(answer, '␣')}"
                        for tokens, answer in zip(example["prompts"], example["answers"]))
    n, few = report["size"]["nodes"], len(nodes)
    few = f"; the {few} most important of {n} nodes, with the edges among them" * (few < n)
    return (f'<p class="mute">example prompts: {prompts}{few}</p>'
            f'<div class="wide"><svg viewBox="{left} {top:.0f} {wide} {tall:.0f}" width="{wide}" '
            f'style="min-width: {min(0.7 * wide, 1300):.0f}px">{"".join(out)}</svg></div>\n')


def headings(texts):
    """Texts as headings of a table."""
    return "".join(f"<th>{visible(text, '␣')}</th>" for text in texts)


def table_row(heading, cells):
    """A row of a table: its heading, and a cell for each (-1 to 1 as colour, text)."""
    return f"<tr>{headings([heading])}" + "".join(
        "<td" + ' class="neg"' * (shade < 0) + f' style="--shade:{abs(shade):.2f}"' * (
            abs(shade) >= 0.005) + f">{text}</td>" for shade, text in cells) + "</tr>\n"


def heat_map(report):
    """A table of the nodes' values on the two prompts. Its colours show where they differ."""
    example, rows = report["example"], []
    nodes = {node["name"]: node for node in report["nodes"]}
    shades = {name: [math.copysign(abs(gap * max(0, nodes[name]["importance"])) ** 0.5, gap)
                     for gap in prune.gaps(example["values"][name], nodes[name]["mean"])]
              for name in differing(report)}
    if not shades:
        return ""
    largest = max(max(map(abs, row)) for row in shades.values()) or 1
    for name, row in shades.items():
        cells = []
        for own, sign in zip(example["values"][name], (1, -1)):
            row = row[:len(own) - 1]  # all but <start>
            padded = [*row, *[0] * (len(own) - len(row))][::-1]
            cells += [(0, ""), *((sign * shade / largest, f"{x:.2f}")
                                 for shade, x in zip(padded, own))]
        rows.append(table_row(name, cells))
    one, two = example["prompts"]
    answers = [f'<th></th><th colspan="{len(tokens)}">answer {visible(answer, "␣")} (margin '
               f"{margin:+.2f})</th>" for tokens, answer, margin in zip(
                   (one, two), example["answers"], example["margins"])]
    return ('<h2>Values on the two prompts</h2><p class="mute">colour: the value less that on the '
            "other prompt, counted from the end (blue: higher; orange, striped: lower), times the "
            "node's importance; its root, relative to the table's largest; hidden: "
            f"{len(example['values']) - len(shades)} nodes that do not differ</p>"
            f'<div class="scroll"><table><tr><th></th>{"".join(answers)}</tr><tr>'
            f"{headings(['', '', *one, '', *two])}</tr>\n{''.join(rows)}</table></div>\n")


def attention_maps(report):
    """Tables of what each head of a circuit looks at on the two prompts."""
    out = ['<h2>Attention</h2><p class="mute">row: the token that looks; column: the one it looks '
           'at; in percent; the rest of a row is in the sink</p><div class="heads">']
    for head in report["heads"]:
        out.append("<div>")
        for tokens, attends in zip(report["example"]["prompts"], head["attends"]):
            rows = [table_row(query, ((x / 100, x or "") for x in row))
                    for query, row in zip(tokens, attends["rows"])]
            out.append(f"<table><caption>{visible(head['name'])}</caption>"
                       f"<tr>{headings(['', *tokens])}</tr>\n{''.join(rows)}</table>")
        out.append("</div>")
    return "".join(out) + "</div>\n" if report["heads"] else ""


def node_rows(circuit):
    """A row for each head and node, which opens on its edges, and on where it is high and low."""
    nodes = {node["name"]: node["text"] for node in circuit.report["nodes"]}
    out = ['<h2>Nodes</h2><p class="mute">a click on a row, or on its box above, opens it: edges, '
           "and the training text at which the node is highest and lowest</p>\n"]
    for first, *rest in prune.blocks(circuit, True):
        name = first.split()[0]
        edges = takewhile(lambda line: not line.startswith("    high "), rest)
        out.append(f"<details><summary>{visible(first)}</summary>"
                   f'<pre id="{visible(name)}">{lines_of(chr(10).join(edges))}</pre>\n')
        for side, windows in nodes.get(name, {}).items():
            rows = [f"{value:+8.2f}  {visible(f'{before:>24}')}"
                    f"<mark>{visible(token, '␣')}</mark>{visible(after)}"
                    for before, token, value, after in windows]
            out.append("\n".join([f"<pre>{visible(side)}", *rows]) + "</pre>")
        out.append("</details>\n")
    return "".join(out)


# ---- whole drawings -----------------------------------------------------------------------------

def check_line(checks):
    """The checks on one line: how many passed, and which did not, with their numbers."""
    failed = [f"{c['name']} {prune.amount(c)}" for c in checks if c["passed"] is False]
    return f"checks: passed {sum(c['passed'] is True for c in checks)}" + (
        f", FAILED {len(failed)}: {', '.join(failed)}" if failed else "")


def page(circuit):
    """A circuit as an HTML page: its picture, values, attention, losses and checks, and nodes."""
    circuit = readable(circuit)
    report = circuit.report
    bare = dataclasses.replace(circuit, report=report | dict(nodes=[], heads=[]))
    return document(
        circuit.task, f"<p>{visible(report['doc'])}</p>\n", KEY, picture(circuit),
        heat_map(report), attention_maps(report),
        f"<pre>{lines_of(prune.listing(bare, verbose=True))}</pre>\n", node_rows(circuit),
        note=check_line(report["checks"]))


def summary_page(rows):
    """The table of all tasks above the pictures of their circuits, as an HTML page."""
    text, body = lines_of(prune.summary(rows)), []
    for circuit in (circuit for circuit, _ in rows.values() if circuit):
        name, report = visible(circuit.task), circuit.report
        text = text.replace(f"\n{name} ", f'\n<a href="#{name}">{name}</a> ')
        body += [f'<h2 id="{name}"><a href="{name}.html">{name}</a> <small>'
                 f"{visible(check_line(report['checks']))}</small></h2>\n"
                 f"<p>{visible(report['doc'])}</p>", picture(readable(circuit), f"{name}.html")]
    return document("Circuits", f"<pre>{text}</pre>", KEY, *body)


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
