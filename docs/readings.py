"""Reads a circuit's nodes, edges and heads off the model, for its file: see prune.describe."""
import numpy as np

import prune
import sparsegpt as sg
from docs import show


def token(model, i):
    """A token id as text on one line."""
    return "<start>" if i == model.tok.EOT else show.one_line(model.tok.decode([int(i)]))


def run(model, params, ids, hook=None):
    """One run over ids [B, T]: logits [B, T, V], the values of all nodes [B, T, n_nodes], and the
    caches of the forward pass."""
    record = prune.Recorder(hook)
    logits, cache = sg.forward(params, ids, model.cfg, record)
    values = np.concatenate([sg.to_host(x) for x in record.seen.values()], axis=1)
    return sg.to_host(logits), values.reshape(*ids.shape, -1), cache


def extremes(model, values, ids, n=4):
    """{"high": [[text before, token, value]], "low": ...}: the tokens with the largest and the
    smallest of values [B, T]. NaN marks positions that do not count."""
    out = {}
    for side, sign in (("high", -1), ("low", 1)):
        rows, order = {}, np.argsort(sign * values, axis=None, kind="stable")  # NaN comes last
        for b, t in zip(*np.unravel_index(order, values.shape)):
            if len(rows) == n or np.isnan(values[b, t]):
                break
            if ids[b, t] not in rows:
                before = "".join(token(model, i) for i in ids[b, max(0, t - 6):t])
                value = round(float(values[b, t]), 4)
                rows[ids[b, t]] = [before[-24:], token(model, ids[b, t]), value]
        out[side] = list(rows.values())
    return out


def node_readings(context, task, nodes):
    """[{"task": extremes, "text": extremes}] of some nodes in the full model: on the task's
    prompts and on training text."""
    model, pool, out = context.model, task.pool, [{} for _ in nodes]
    for kind, ids, valid in (("task", pool.ids, pool.inside()), ("text", model.text, True)):
        parts = (ids[i:i + 4] for i in range(0, len(ids), 4))  # small, as all nodes are recorded
        values = np.concatenate([run(model, model.params, x)[1][..., nodes] for x in parts])
        for i, reading in enumerate(out):
            reading[kind] = extremes(model, np.where(valid, values[..., i], np.nan), ids)
    return out


def connections(model, mask, prompts):
    """{"edges" | "residual" | "embed" | "unembed": links} of a circuit: its edges; the pairs of
    nodes that write and read a channel of the residual stream; and at its channels the nonzero
    embeddings of tokens that differ within a pair, and the nonzero unembeddings of answers."""
    cfg, out = model.cfg, dict(edges=[], residual=[], embed=[], unembed=[])
    for name, i, j in prune.edge_list(mask.edges):
        source, target = (part.start for part in prune.matrices(cfg)[name][1:])
        out["edges"].append({"from": prune.node_name(source + i, cfg),
                             "to": prune.node_name(target + j, cfg),
                             "weight": float(model.params[name][i, j])})
    counts = np.array([np.bincount(ids[:end + 1], minlength=cfg.vocab_size)
                       for ids, end in zip(prompts.ids, prompts.last)])
    cues = np.flatnonzero((counts[::2] != counts[1::2]).any(0))
    answers = np.unique([prompts.right, prompts.wrong])
    out["residual"] = [{"from": prune.node_name(a, cfg), "to": prune.node_name(b, cfg)}
                       for a, b in prune.residual_links(mask, cfg)]
    for name in (prune.node_name(n, cfg) for n in np.flatnonzero(mask.nodes)):
        site, channel = name.rsplit(".", 1)
        if site.endswith("_in") or site == "final":
            column = model.params["wte"][:, int(channel)]
            out["embed"] += [{"token": token(model, i), "to": name, "weight": float(column[i])}
                             for i in cues if column[i] != 0]
        if site == "final":
            row = model.params["head.w"][int(channel)]
            out["unembed"] += [{"from": name, "token": token(model, i), "weight": float(row[i])}
                               for i in answers if row[i] != 0]
    return out


def pair_readings(model, mask, frozen, pair, overlap):
    """(example, heads) of a circuit's run on one pair of prompts (Prompts of two rows).

    example: {"prompts", "answers", "margins", "values": {node: [value by token, of each prompt]}}.
    heads: what each head of overlap, {(block, head): attention shared with the full model},
    attends to from the deciding positions; "rows" is its whole pattern in percent, a row for each
    token with its shares of the tokens up to there, and the rest in the sink.
    """
    cfg, params = model.cfg, prune.PlainRunner(model, frozen, pair).params(mask)
    logits, values, cache = run(model, params, pair.ids, prune.Ablation(mask.nodes, frozen, cfg))
    margin = prune.margins(logits[np.arange(len(pair.last)), pair.last], pair)
    prompts = [[token(model, i) for i in ids[:end + 1]] for ids, end in zip(pair.ids, pair.last)]
    values = {prune.node_name(n, cfg): [[round(float(x), 3) for x in values[b, :len(tokens), n]]
                                  for b, tokens in enumerate(prompts)]
              for n in np.flatnonzero(mask.nodes)}
    heads = []
    for (i, head), share in overlap.items():
        attends = []
        for tokens, weights in zip(prompts, prune.attention_weights(cache, i)[:, head]):
            w = weights[len(tokens) - 1]  # past the last token there is only the sink
            to = [[[*tokens, "sink"][min(t, len(tokens))], round(float(w[t]), 3)]
                  for t in np.argsort(-w, kind="stable")[:4] if w[t] >= 0.01]
            rows = [np.rint(100 * weights[t, :t + 1]).astype(int).tolist()
                    for t in range(len(tokens))]
            attends.append(dict(context="".join(tokens[1:]), at=tokens[-1], to=to, rows=rows))
        sink, table = (model.params.get(f"h{i}.attn.{name}") for name in ("sink", "relbias"))
        bias = np.zeros(0) if table is None else sg.to_host(table[head])[:pair.ids.shape[1]]
        nodes = [prune.node_name(n, cfg) for n in prune.head_nodes(mask, cfg, f"h{i}", head)]
        heads.append(dict(name=f"h{i}.head.{head}", nodes=nodes,
                          attends=attends, sink=None if sink is None else float(sink[head]),
                          distances=[[int(d), float(bias[d])] for d in np.argsort(-bias)[:3]],
                          overlap=share))
    return dict(prompts=prompts, answers=[token(model, i) for i in pair.right],
                margins=[round(float(x), 3) for x in margin], values=values), heads
