"""Asks a model and a circuit about prompts of one's own, and changes nodes of the model.

    python prune.py single_double_quote --ask 'print("hello'      # needs the circuit to be found
    python prune.py single_double_quote --ablate h0.neuron.17     # the model, without a node
"""
from pathlib import Path

import numpy as np

import prune
import sparsegpt as sg
import tasks
from docs import readings
from docs.show import one_line


def own_prompt(model, text, answers=None):
    """The Prompts of one prompt of one's own, with the tokens that decide between two answers, or
    with zeros in their place. Raises UserError on an unusable one."""
    ids, two = [model.tok.EOT, *model.tok.encode(text)], (0, 0)
    try:
        if answers:
            ids, *two = tasks.deciding_tokens(model.tok, text, *answers)
        if len(ids) > model.cfg.n_ctx:
            raise ValueError(f"{len(ids)} tokens exceed the context of {model.cfg.n_ctx}")
    except ValueError as e:
        raise sg.UserError(f"{text[:60]!r}: {e}") from e
    return tasks.Prompts(*(np.array([x]) for x in (ids, len(ids) - 1, *two, 1)))


def ask(circuit, model, texts, answers=None):
    """Lines of text about each prompt: the full model's five likeliest next tokens; and which of
    two answers it and the circuit lean to. The two are the given ones, or else those of the task's
    pairs that the full model finds likeliest there. Raises UserError on an unusable prompt."""
    s, lines, tok = circuit.settings, [], model.tok
    frozen = prune.ModelContext(model, s.ablation).frozen
    pool = prune.make_prompts(model, circuit.task, 2 * s.search_pairs, s.seed)
    known = np.unique(np.stack([pool.right, pool.wrong], 1)[pool.sign > 0], axis=0)
    for text in texts:
        one = own_prompt(model, text, answers)
        two = np.stack([one.right, one.wrong], 1) if answers else known
        runner = prune.PlainRunner(model, frozen, one)
        full, own = (runner.logits(mask)[0, :len(tok.bytes)].astype(float)
                     for mask in (prune.every_node(model.cfg), circuit.mask))
        p = np.exp(full - full.max())
        p /= p.sum()
        first, second = max(two, key=lambda pair: p[pair].sum())
        names = [f"`{one_line(tok.decode([i]))}`" for i in (first, second)]
        leans = [logits[first] - logits[second] for logits in (full, own)]
        same = "" if leans[0] * leans[1] > 0 else ": they DISAGREE"
        top = (f"`{one_line(tok.decode([i]))}` {p[i]:.1%}" for i in np.argsort(-p)[:5])
        lines += [one_line(tok.decode(one.ids[0][1:])),  # with what the answers share
                  f"    the full model's likeliest: {', '.join(top)}",
                  f"    logit of {names[0]} less that of {names[1]}: full model {leans[0]:+.3f}, "
                  f"circuit {leans[1]:+.3f}{same}"]
    return lines


def walk(circuit, model, text):
    """What `show.explain` prints of a circuit, on a prompt of one's own."""
    frozen = prune.ModelContext(model, circuit.settings.ablation).frozen
    return readings.pair_readings(model, circuit.mask, frozen, own_prompt(model, text), {})[0]


def intervene(model, task, values, settings):
    """Lines of text: the full model on a task, unchanged and with nodes frozen at values, {node
    number: value, or None for its mean}."""
    prompts = prune.make_prompts(model, task, settings.search_pairs, settings.seed)
    every, frozen = prune.every_node(model.cfg), prune.mean_activations(model, model.text)
    for node, value in values.items():
        frozen[node] = frozen[node] if value is None else value
    runner = prune.PlainRunner(model, frozen, prompts)
    margins = [prune.margins(runner.logits(mask), prompts)
               for mask in (every, every.without(values))]
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
    """Lines of text: the tasks with the model's binary loss, and the circuits in a folder."""
    lines, scores = [f"{'task':<28}    loss   circuit in {folder}"], sg.evaluate_tasks(model)
    for task in tasks.TASKS:
        path = Path(folder, f"{task}.json")
        found = "-"
        try:
            if path.exists():
                circuit = prune.load(path)
                found = "{nodes} nodes, {edges} edges".format(**circuit.record["size"])
                if circuit.task != task:
                    found = "of another task"
                elif not circuit.is_of(model):
                    found = "of another model"
            elif task not in scores:
                prune.make_prompts(model, task, 100, 0)  # raises what is wrong with the task
        except ValueError as e:
            found = one_line(str(e))[:150]
        loss = f"{scores[task].binary:8.3f}" if task in scores else "       -"
        lines.append(f"{task:<28}{loss}   {found}")
    return lines
