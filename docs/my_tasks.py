"""A task of one's own, for a trained model: python prune.py end_of_call --tasks docs/my_tasks.py

Every function here of one argument, a tasks.Writer, is a task. It returns two sides, each
(prompt, answer, rest), as those in tasks.py do. What a file imports or names _so is none. Only the
first token at which the answers differ is judged. A prompt must not end in a space, and no answer
may be the beginning of the other. To see pairs:

    python tasks.py end_of_call --tasks docs/my_tasks.py
"""


def end_of_call(w):
    """A call ends in a parenthesis, an index in a bracket: `y = f(x` -> `)`, `y = f[x` -> `]`."""
    f, x, y = w.names(3)
    return (f"{y} = {f}({x}", ")\n", ""), (f"{y} = {f}[{x}", "]\n", "")
