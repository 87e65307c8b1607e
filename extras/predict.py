r"""Tests predictions: a file of prompts, with the answer that is expected after each, in the full
model and in a circuit.

    python prune.py var_if --predict docs/near/var_if.txt
    python prune.py var_if --predict mine.txt --ablate h1.head.4   # the full model, and changed

A line of the file is a prompt, the expected answer and another one, with tabs between them; then,
if wanted, which of the two correct Python has. Lines that are blank or begin with # do not count.
Here <tab> is a tab:

    assert {x} == True<tab>\n<tab>:

`{x}`, or any small letter, is the name of a variable, drawn anew for each context; `{A}`, or any
capital, is a word. The same letter is the same name all over a line. `\n`, `\t`, `\\`, `{{` and
`}}` are a newline, a tab, a backslash and braces. The first token that differs decides.
"""
import math
import random
import re

import numpy as np

import prune
import sparsegpt as sg
import tasks
from extras import questions

PIECE = re.compile(r"\\[nt\\]|\{\{|\}\}|\{[a-zA-Z]\}")
PLAIN = {r"\n": "\n", r"\t": "\t", r"\\": "\\", "{{": "{", "}}": "}"}


def read(path):
    """{line number: its fields} of a file. Raises UserError, with the number of a wrong line."""
    try:
        lines, found = sg.read_bytes(path).decode().split("\n"), {}
    except (OSError, ValueError) as e:
        raise sg.UserError(f"--predict {path}: {e}") from e
    for number, line in enumerate(lines, 1):
        fields = line.rstrip("\r").split("\t")
        if not line.strip() or line.startswith("#"):
            continue
        wrong = (
            "it is not a prompt, an expected answer and another one, with tabs between them"
            if len(fields) not in (3, 4) or "" in fields else
            "the prompt ends in a space" if fields[0].endswith(" ") else
            "the last field is neither answer" if fields[3:] and fields[3] not in fields[1:3] else
            r"a lone backslash or brace; write \\, {{ or }}, and {x} for a name"
            if re.search(r"[\\{}]", PIECE.sub("", line)) else "")
        if wrong:
            raise sg.UserError(f"--predict {path}, line {number}: {wrong}")
        found[number] = fields
    if not found:
        raise sg.UserError(f"--predict {path}: no prompt is in it")
    return found


def in_contexts(model, fields, n, seed):
    """The Prompts of a line in n contexts as a task has them: with lines before it, in a function,
    a loop or a branch. All lines get the same contexts. The expected answer is the right one.
    Raises ValueError if the model cannot use the prompt."""
    letters = sorted({x[1] for x in PIECE.findall("".join(fields)) if x not in PLAIN})
    few, pairs = [x for x in letters if x.islower()], {}
    if len(few) > 8:
        raise ValueError("more than 8 names")
    for i in range(4 * n):  # some are too long, or the same
        w = tasks.Writer(random.Random(f"predict/{seed}/{i}"), "eval")
        names = dict(zip(letters, w.rng.sample(w.words, 26))) | dict(zip(few, w.names(8)))
        prompt, *answers = (PIECE.sub(lambda m: PLAIN.get(m[0]) or names[m[0][1]], field)
                            for field in fields[:3])
        (prompt, one, _), (_, two, _) = tasks.surround(w, [(prompt, x, "") for x in answers])
        pairs[prompt] = (prompt, prompt), (one, two)
    prompts = tasks.task_prompts(model.tok, pairs.values(), model.cfg.n_ctx)
    return prompts.rows(np.arange(0, min(len(prompts.last), 2 * n), 2))


def predict(circuit, model, path, values=None, n=8, seed=0):
    """A table of a file's predictions in the full model and in the circuit; or, with values (see
    `questions.changed`), in the full model unchanged and changed."""
    if not 1 <= n <= 1000:
        raise sg.UserError(f"--contexts must be from 1 to 1000, not {n}")
    found, progress, rows = read(path), sg.Progress("predict"), []
    frozen, name = circuit.frozen_values(model), "circuit"
    sides = [(frozen, prune.every_node(model.cfg)), (frozen, circuit.mask)]
    if values:
        name, sides[1] = "changed", questions.changed(model, values)
    lines = ["P of both answers; margin: logit of the first less that of the second, with its "
             f"deviation in {n} contexts", "", f"{'':44}{'full model':<27}{name}",
             f"{'prompt':<30}{'answers':<14}" + f"{'P':<11}{'margin':<16}" * 2
             + "effect" * bool(values)]
    for number, fields in found.items():
        progress("prompts", len(rows), len(found))
        try:
            prompts = in_contexts(model, fields, n, seed)
        except ValueError as e:
            raise sg.UserError(f"--predict {path}, line {number}: {e}") from e
        cells, means = "", []
        for side in sides:
            logits = prune.PlainRunner(model, side[0], prompts).logits(side[1])
            logits = logits[:, :len(model.tok.bytes)].astype(float)
            margin, total = prune.margins(logits, prompts), np.logaddexp.reduce(logits, 1)
            p = [np.exp(np.diag(logits[:, x]) - total).mean() for x in prompts[2:4]]
            means.append(margin.mean())
            cells += (f"{p[0]:4.2f} {p[1]:4.2f}{means[-1]:+7.2f}{f'±{margin.std():.1f}':>5}"
                      f"{' hit' if means[-1] > 0 else '':<6}")
        text = fields[0] if len(fields[0]) < 30 else f"…{fields[0][-28:]}"
        both = " ".join(field.replace(" ", "␣") for field in fields[1:3])
        lines.append(f"{text:<30}{both:<14}{cells}"
                     + f"{means[1] - means[0]:+6.1f}" * bool(values))
        rows.append((*means, *(x == fields[1] for x in fields[3:])))
    return [line.rstrip() for line in lines] + ["", *totals(rows, name)]


def totals(rows, name):
    """Lines on all predictions, [(margin of the full model, that beside it, and, if it is known,
    whether the expected answer is correct Python)]. The interval of a share is Wilson's."""
    full, own = np.array([row[:2] for row in rows]).T
    n, same, z = len(rows), int(((full > 0) == (own > 0)).sum()), 1.96
    python = [(row[0] > 0) == row[2] for row in rows if len(row) > 2]
    half = z * math.sqrt(same * (n - same) / n + z * z / 4)
    low, high = ((same + z * z / 2 + x) / (n + z * z) for x in (-half, half))
    r = np.corrcoef(full, own)[0, 1] if n > 2 else math.nan
    return [f"hits: full model {(full > 0).sum()} of {n}, {name} {(own > 0).sum()}"
            + f"; correct Python {sum(python)} of {len(python)}" * bool(python),
            f"full model and {name} agree on {same} of {n}, {same / n:.0%} (95% interval "
            f"{low:.0%} to {high:.0%}); correlation of their margins {r:.2f}"]
