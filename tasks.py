"""Twenty things a small model can know about Python, as snippets to train on and pairs to test
with; prompts as tokens, and scores.

Every behaviour (arXiv 2511.13653, section 2.2 and Table 1) is written down once, as a function
that makes two *sides*. A side is `(prompt, answer, rest)`, and `prompt + answer + rest` is valid
Python. The two prompts differ only in what decides the answer:

    print("good morning   ->  ")        print('good morning   ->  ')

`idiom` strings random sides together into training documents; `pairs` keeps the prompts and the
answers and drops the rest. Names and words are dealt out to three splits (train, eval, held) that
share none of them, and training has made-up ones too, so that a test cannot be answered from what
followed its names in a snippet. (Library code has names of its own, some of them the same.)

    python tasks.py                        three pairs of every task
    python tasks.py var_swap --n 10        ten pairs of one
    python tasks.py --idioms               three training documents

Two rules make a pair fair to a byte-level tokenizer that splits text into words, digits, runs of
punctuation, and newlines with the indentation after them. A prompt never ends in white space, and
the borders prompt|answer and answer|rest never cut such a piece in two: so the answer's tokens are
the very ones a model was trained on, and appending it leaves the prompt's tokens as they were.
"""
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it quietly
import argparse
import difflib
import functools
import keyword
import os
import random
import runpy
import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class TaskError(ValueError):
    """Something wrong with a task, a file of tasks or what is asked of them."""


# ---- words, dealt out to the splits -------------------------------------------------------------

SPLITS = ("train", "eval", "held")  # for training; to find circuits on; to check them on

# Split i takes every third word from place i: with six names per letter, two of each letter.
NAMES = """amount angle answer area array author balance batch border bottom branch bucket cell
change column cost count cursor data date degree delta depth distance edge element energy entry
error event factor field figure flag frame fraction gap goal grade graph grid group half head
height hint hour house image income index inner interval item job joint journal journey judge jump
kernel key kind kit knob knot label layer left length level limit margin mark mass matrix measure
member name needle neighbor node note number offset option orbit order outer owner page parent part
path pixel place quality quantity quarter query question quota radius rank rate ratio result row
sample scale score shape signal size table task temp time token total unit update upper usage user
utility value vector version view volume vote wait weight width window word worker""".split()
WORDS = """apple autumn banana beach bird blue bottle bread bridge bright brown butter candle
castle cherry circle city cloud coffee cold copper corner cotton dance dark desert dinner doctor
dream drum eagle early east evening family farm feather fire fish flower forest friend fruit garden
glass gold grass green guitar happy harbor heavy hello honey horse ice iron island jacket kitchen
ladder lake large lemon light lion little market meadow melon milk mirror moon morning mountain
music narrow night north ocean old onion orange paper pencil piano planet pocket purple quick quiet
rabbit rain red river road rocket salt sand school sharp silver simple sky slow small smoke snow
soft song south spring star stone storm summer sun sweet tall thunder tiger town tree valley violin
warm water west wheat white wind winter wolf wonder world yellow young zebra""".split()
VERBS = """adjust apply begin build check collect combine compare compute convert copy create
decide draw encode expand find finish flatten handle insert locate merge move normalize pack pick
plot process reduce remove render repeat replace reset resolve reverse rotate scan select send
shift shuffle solve split start trim validate""".split()
# What says whether a file is read or written. These are meanings a model has to know, not names it
# has to copy, so like `open` and `range` they belong to the language and every split shares them.
VERB_CUES = (("load", "save"), ("read", "write"))
NOUN_CUES = (("input", "output"), ("source", "target"))

ONSETS = """b c d f g h j k l m n p r s t v w z b c d f g h j k l m n p r s t v w z bl br ch cl cr
dr fl fr gl gr kn ph pl pr qu sc sh sk sl sm sn sp st str sw th tr tw wh y""".split()
VOWELS = "a e i o u a e i o u a e i o u a e i o u ai ea ee ia io oo ou y".split()
CODAS = "b ck d g l ll m n nd ng nt p r rd rk rt s ss st t th v x".split()


@functools.cache
def invented(n: int = 30_000) -> list[list[str]]:
    """n different made-up words, like `zobe` or `twendal`, none of them a name, a word or a verb
    of the lists above, in groups of one first letter; with every letter alone, n / 260 times.

    Training draws most of its names and words from these. From a few dozen real ones, and still
    from thousands of one make, a model learns what follows each of them, not what follows a name,
    and fails on those of the tests.
    """
    rng, found, known = random.Random(0), {}, {*NAMES, *WORDS, *VERBS}
    while len(found) < n:
        word = ""
        for _ in range(rng.choice((1, 1, 1, 2, 2, 2, 3))):
            word += rng.choice(ONSETS) if rng.random() < 0.85 else ""
            word += rng.choice(VOWELS) + (rng.choice(CODAS) if rng.random() < 0.5 else "")
        word += rng.choice(("", "", "", "e", "y"))
        if 1 < len(word) < 9 and word not in known and not keyword.iskeyword(word):
            found[word] = None  # a dict keeps the order
    return by_letter([*found, *string.ascii_lowercase * (n // 260)])


def by_letter(names: Sequence[str]) -> list[list[str]]:
    """Names in groups of one first letter."""
    return [[name for name in names if name[0] == letter]
            for letter in sorted({name[0] for name in names})]


NAME_GROUPS = {split: by_letter(NAMES[i::3]) for i, split in enumerate(SPLITS)}


class Writer:
    """Draws words, names and numbers of one split: what every snippet below is written with.

    A writer has a scope of eight variables and uses no others, so that all it writes is about the
    same few things, as the lines of real code are. Their first letters all differ: where two names
    are the answers of a pair, their first tokens mostly tell them apart already.
    """

    def __init__(self, rng: random.Random, split: str):
        self.rng, self.choice = rng, rng.choice
        self.words, self.verbs = WORDS[SPLITS.index(split)::3], VERBS[SPLITS.index(split)::3]
        groups = NAME_GROUPS[split]
        if split == "train" and rng.random() < 0.8:  # now and then real ones, as in real code
            groups = invented()
            self.words = self.verbs = [rng.choice(rng.choice(groups)) for _ in range(20)]
        self.scope = [rng.choice(group) for group in rng.sample(groups, 8)]
        self.large = split == "held"  # longer and deeper; in training now and then, in eval never

    def pick(self, *choices):
        return self.choice(choices)

    def names(self, k: int) -> list[str]:
        """k different variables of the scope."""
        return self.rng.sample(self.scope, k)

    def number(self) -> str:
        return str(int(self.rng.random() * self.choice((10, 10, 100, 1000))))

    def func(self) -> str:
        verb = self.choice(self.verbs)
        return self.pick(verb, f"{verb}_{self.choice(self.words)}")

    def kind(self) -> str:
        """The name of a class."""
        return self.choice(self.words).capitalize()

    def text(self) -> str:
        """One to four words, unquoted."""
        return " ".join(self.rng.choices(self.words, k=self.pick(1, 2, 2, 3, 4)))

    def string(self) -> str:
        quote = self.choice("\"'")
        return f"{quote}{self.text()}{quote}"

    def file(self) -> str:
        quote = self.choice("\"'")
        return f"{quote}{self.choice(self.words)}.{self.pick('txt', 'csv', 'json', 'log')}{quote}"

    def plain(self) -> str:
        """A value that ends in a letter or a digit, which no punctuation after it can join."""
        return self.pick(self.number(), self.number(), self.choice(self.scope), "True", "None")

    def test(self, x: str) -> str:
        """A condition on the variable x, ending in a letter or a digit."""
        other = self.pick(self.number(), next(name for name in self.names(2) if name != x))
        return f"{x} {self.pick('==', '!=', '<', '>', '>=')} {other}"


# ---- what stands around the behaviours ----------------------------------------------------------

Side = tuple[str, str, str]  # prompt, answer, rest


def statement(w: Writer, x: str | None = None) -> str:
    """One simple line, the background of every snippet. It changes no variable but x."""
    a, b, c = [name for name in w.names(4) if name != x][:3]
    x, n, f = x or a, w.number(), w.func()
    return w.pick(
        f"{x} = {n}", f"{x} = {w.string()}", f"{x} = {f}({b})",
        f"{x} = {w.pick('True', 'False', 'None', '[]', '{}', 'set()')}", f'{x} = ""',
        f"{x} = {b}", f"{x} = {b} + {c}", f"{x} = {b} * {n}", f"{x} = len({b})", f"{x} += {n}",
        f"{x} = {f}({b}, {n})", f"{x} = [{b}, {c}]", f"{x}.append({b})", f"{x} = {b}[{n}]",
        f"{x} = {b}.{c}", f"{x}[{b}] = {n}", f"{x} = {b} == {c}", f"print({b})", f"{f}({b})")


def nest(header: str, side: Side) -> Side:
    """The same code one level deeper, under a line that ends in a colon."""
    prompt, answer, rest = side
    prompt = f"{header}\n{prompt}"  # its newline is indented with the others
    return tuple(part.replace("\n", "\n    ") for part in (prompt, answer, rest))


def surround(w: Writer, sides: Sequence[Side]) -> list[Side]:
    """All sides below the same few lines, often inside the same function, loop or branch."""
    depth = w.pick(1, 2) if w.large else w.pick(0, 0, 1)
    if sides[0][0].startswith(("def ", "class ")):
        depth = 0  # a definition inside a loop would be odd
    lines = [statement(w) for _ in range(w.pick(1, 2) if w.large else w.pick(0, 1, 2))]
    lines += w.pick([], [], [], [f"# {w.text()}"])
    sides = [("\n".join([*lines, prompt]), answer, rest) for prompt, answer, rest in sides]
    for level in range(1, depth + 1):
        x, y = w.names(2)
        if level == depth and (w.large or w.pick(True, False)):
            header = f"def {w.func()}({x}, {y}):"
            sides = [(prompt, answer, f"{rest}\nreturn {y}") for prompt, answer, rest in sides]
        else:
            header = w.pick(f"if {w.test(x)}:", f"if {x}:", f"for {x} in {y}:", f"while {x}:")
        sides = [nest(header, side) for side in sides]
    return sides


def filler(w: Writer) -> str:
    """Ordinary code about none of the twenty in particular, so they come in no fixed order."""
    x, y, z, v = w.names(4)
    f, g, s, t = w.func(), w.func(), w.string(), w.text()
    n, m, do, then = w.number(), w.number(), statement(w), statement(w)
    kind, word, quote = w.kind(), w.choice(w.words), w.pick('"', "'")
    return w.pick(
        f"import {w.pick('os', 'sys', 'math', 'json', 're', 'time')}\n{do}\n{then}",
        f"from {w.pick('os import path', 'math import sqrt', 'typing import Any')}\n{do}",
        f"def {f}({x}, {y}):\n    \"\"\"{t.capitalize()}.\"\"\"\n    return {x} + {y}",
        f"def {f}():\n    {do}\n    {then}\n    return {x}\nprint({f}())",
        f"def {f}({x}, {y}={n}):\n    return {g}({x}, {y})\n{z} = {f}({v}, {y}={m})",
        f"try:\n    {x} = {f}({y})\nexcept {w.pick('ValueError', 'KeyError')}:\n    {x} = None",
        f"{x} = [{y} for {y} in {z} if {w.test(y)}]\n{do}",
        f"{x} = {{{y}: {f}({y}) for {y} in {z}}}",
        f"for {x} in {y}:\n    print({x})\n    if {w.test(x)}:\n        break",
        f"for {x}, {y} in {z}.items():\n    print({s}, {x}, {y})",
        f"{x} = {n}\nwhile {x} < {m}:\n    {x} += 1\nprint({x})",
        f"{x} = f{quote}{{{y}}} {t} {{{z}}}{quote}\nprint({x})",
        f"class {kind}:\n    def {f}(self, {x}):\n        self.{y} = {x}\n        return self",
        f"if {x} in {y} and {z}:\n    {do}\nelse:\n    {then}",
        f"if not {x}:\n    raise ValueError({s})\n{do}",
        f"{x} = {kind}({y}, {z})\n{x}.{f}()\n{then}",
        f"# {t}\n{x} = {y}[{n}:{m}]\nassert {x} == {z}",
        f"{x} = {quote}, {quote}.join({y})\n{z} = {x}.split({quote}{word}{quote})")


# ---- the twenty behaviours ----------------------------------------------------------------------
# A docstring says what decides and shows a short example of each side, in the order of the sides.


def single_double_quote(w):
    """A string closes with the quote that opened it: `print("a` -> `")`, `print('a` -> `')`."""
    x, y = w.names(2)
    f, more = w.func(), "".join(f'"{w.text()}", ' for _ in range(1 + w.large))
    start, end, rest = w.pick(
        ('print("', '")', ""), (f'print({x}, "', '")', ""), (f'{x} = "', '"', f"\nprint({x})"),
        (f'{x} = {f}("', '",', f" {y})"), (f'{x}["', '"]', f" = {y}"),
        (f'{x} = [{more}"', '"]', ""), (f'{x} = {{"{w.text()}": "', '"}', ""),
        (f'if {x} == "', '":', f"\n    {y} = {f}({x})"))
    # All quotes change together, as in real code; the lines around keep quotes of either kind.
    double = start + w.text(), end, rest
    return double, tuple(part.replace('"', "'") for part in double)


def bracket_counting(w):
    """All open brackets close: `x = [1, 2` -> `]`, `x = [1, [2` -> `]]`.

    The newline belongs to the answers: without it the first would be the second's beginning.
    """
    x, y = w.names(2)
    item = w.pick(w.number, lambda: w.choice(w.scope))
    row = w.pick("{}, ", "[{}, {}], ")  # closed lists before the open one ask for real counting
    size = w.pick(2, 3, 4) if w.large else w.pick(0, 1, 2)
    rows = "".join(row.format(item(), item()) for _ in range(size))
    last = ", ".join(item() for _ in range(w.pick(2, 3)))
    start, close = w.pick((f"{x} = [", "]"), (f"{x} = [", "]"), (f"{x} += [", "]"),
                          (f"{x} = {w.func()}([", "])"), (f"print({y}, [", "])"))
    return ((f"{start}{rows}{last}", f"{close}\n", f"print({x})"),
            (f"{start}{rows}[{last}", f"]{close}\n", f"print({x})"))


def bracket_brace(w):
    """After an element a comma, after a key a colon: `x = [a, b` -> `,`, `x = {a: 1, b` -> `:`.

    A whole entry always stands before, as `{b` alone could still become a set.
    """
    x, *names = w.names(6)
    quote, keys = w.pick(('"', w.rng.sample(w.words, 5)), ("'", w.rng.sample(w.words, 5)),
                         ("", w.rng.sample(range(100), 5)), ("", names))
    *done, asked, last = [f"{quote}{key}" for key in keys[:w.pick(4, 5) if w.large else 3]]
    start, end = w.pick((f"{x} = ", ""), (f"{x} = ", ""), (f"{x} = {w.func()}(", ")"))
    first, sep, close = w.pick(("", " ", ""), ("\n    ", "\n    ", "\n"))  # in a line, a line each
    items = "".join(f"{key}{quote},{sep}" for key in done)
    entries = "".join(f"{key}{quote}: {w.plain()},{sep}" for key in done)
    return ((f"{start}[{first}{items}{asked}", f"{quote},", f"{sep}{last}{quote}{close}]{end}"),
            (f"{start}{{{first}{entries}{asked}", f"{quote}:", f" {w.plain()}{close}}}{end}"))


def set_or_string(w, name=None):
    """Sets grow by `.add`, strings by `+=`: `x = set() .. x` -> `.add`, `x = "" .. x` -> ` +=`."""
    x, y, z, other = w.names(4)
    # The lines in between change neither variable nor type: the cue is the first line alone.
    x, empty = name or x, w.pick('""', "''")
    use = f"{statement(w, other)}\n" if w.large or w.pick(True, False) else ""
    use += w.pick(f"{y} = {w.func()}({z})\n", f"for {y} in {z}:\n    ",
                  f"for {y} in {z}:\n    if {w.test(y)}:\n        ",
                  f"while {z}:\n    {y} = {z}.pop()\n    ")
    return ((f"{x} = set()\n{use}{x}", ".add", f"({y})\nprint({x})"),
            (f"{x} = {empty}\n{use}{x}", " +=", f" {y}\nprint({x})"))


def set_or_string_fixedvarname(w):
    """The same with one name for all, so that a circuit need not find out whose type is asked."""
    return set_or_string(w, name="current")


def class_init(w):
    """An attribute gets the argument named like it: `self.a =` -> ` a`, `self.b =` -> ` b`."""
    args = w.names(w.pick(3, 4) if w.large else w.pick(1, 2, 3, 4))
    # Any two may be asked for, not the first two: a model must not answer "the first argument".
    asked = w.rng.sample(args, 2) if len(args) > 1 else w.names(2)
    done = [arg for arg in args if arg not in asked][:w.pick(0, 1, 2)]
    intro = w.pick("", f'        """{w.text().capitalize()}."""\n') if w.large else ""
    intro += w.pick("", "", f"        self.{w.choice(w.words)} = {w.plain()}\n")
    intro += "".join(f"        self.{arg} = {arg}\n" for arg in done)
    kind, method = w.kind(), f"\n    def {w.func()}(self):\n        return self.{asked[0]}"
    after, sides = w.pick("", method), []
    for name in asked:
        signature = args if len(args) > 1 else [name]  # a lone argument is the one asked for
        left = [arg for arg in signature if arg != name and arg not in done]
        start = f"class {kind}:\n    def __init__(self, {', '.join(signature)}):\n{intro}"
        rest = "".join(f"\n        self.{arg} = {arg}" for arg in left) + after
        sides.append((f"{start}        self.{name} =", f" {name}", rest))
    return tuple(sides)


def var_swap(w):
    """What stood first goes last: `x, y = y,` -> ` x`, `y, x = x,` -> ` y`."""
    x, y, z, i = w.names(4)
    n, m = w.number(), w.number()
    before = w.pick("", f"{x} = {n}\n{y} = {m}\n", f"{x}, {y} = {n}, {m}\n",
                    f"if {x} > {y}:\n    ", f"while {y} != {n}:\n    ",
                    f"for {i} in range({n}):\n    ")
    third, moved = (f", {z}", f" {z},") if w.large and w.pick(True, False) else ("", "")
    rest = w.pick("", "", f" + {z}", f" % {n}")
    return ((f"{before}{x}, {y}{third} = {y},{moved}", f" {x}", rest),
            (f"{before}{y}, {x}{third} = {x},{moved}", f" {y}", rest))


def with_as(w):
    """`with` names what it opened: `with open(y)` -> ` as`, `x = open(y)` -> newline."""
    x, y, z = w.names(3)
    path = w.pick(w.file(), y)
    call = w.pick(f"open({path})", f"open({path})", f'open({path}, "r")', f"open({path}, 'w')",
                  f'open({path}, encoding="utf-8")', f"{w.func()}({y})")
    return ((f"with {call}", " as", f" {x}:\n    {z} = {x}.read()"),
            (f"{x} = {call}", "\n", f"{z} = {x}.read()\n{x}.close()"))


def with_open(w):
    """The mode suits the aim: `# load it .. open(p, "` -> `r`, `# save it .. open(p, "` -> `w`."""
    x, y, path = w.names(3)
    # The prompt ends inside the quotes, as ` "r"` and ` "w"` would begin with the same token.
    quote, word, file, sides = w.pick('"', '"', "'"), w.choice(w.words), w.file(), []
    verbs, nouns, form = w.pick(*VERB_CUES), w.pick(*NOUN_CUES), w.pick(0, 1, 2)
    bodies = f"{y} = {x}.read()", f"{x}.write({y})"
    for verb, noun, mode, body in zip(verbs, nouns, "rw", bodies):
        start, end = (
            (f"def {verb}_{word}({path}):\n    with open({path}", f" as {x}:\n        {body}"),
            (f"# {verb} the {word} {x}\nwith open({file}", f" as {x}:\n    {body}"),
            (f"with open({noun}_{word}", f" as {x}:\n    {body}"))[form]
        sides.append((f"{start}, {quote}", mode, f"{quote}){end}"))
    return tuple(sides)


def for_while(w):
    """`for` takes from something, `while` compares: `for x` -> ` in`, `while x` -> ` <`."""
    x, y = w.names(2)
    first, sign, bound, step = w.pick((w.pick("0", "1"), " <", w.number(), "+="),
                                      (w.pick("50", "99"), " >", "0", "-="))
    # A number is compared: without this line `while x in y` would be as good as `while x < 9`.
    before = w.pick("", f"{statement(w, y)}\n") + f"{x} = {first}\n"
    return ((f"{before}for {x}", " in", f" {y}:\n    print({x})"),
            (f"{before}while {x}", sign, f" {bound}:\n    {x} {step} 1"))


def else_elif(w):
    """`else` has no condition, `elif` one on the same variable: `else` -> `:`, `elif` -> ` x`."""
    x, y = w.names(2)
    branches = w.pick(f"if {x} == {w.string()}:\n    {y} = {w.plain()}\n",
                      f"if {w.test(x)}:\n    {statement(w)}\n")
    branches += f"elif {w.test(x)}:\n    {y} = {w.plain()}\n" if w.large else ""
    body, test = f"\n    {y} = {w.plain()}", f"{w.pick('==', '>', '<')} {w.number()}"
    return (f"{branches}else", ":", body), (f"{branches}elif", f" {x}", f" {test}:{body}")


def if_equals(w):
    """A condition compares, a statement assigns: `if x` -> ` ==`, `x` -> ` =`."""
    x, y, z = w.names(3)
    before, pad = w.pick((f"{statement(w, y)}\n", ""), (f"{y} = {w.func()}({x})\n", ""),
                         (f"for {y} in {z}:\n    ", "    "), (f"if {y}:\n    ", "    "))
    value = w.pick(w.plain(), w.string())
    return ((f"{before}if {x}", " ==", f" {value}:\n{pad}    {statement(w)}"),
            (f"{before}{x}", " =", f" {value}"))


def var_if(w):
    """A condition ends in a colon: `if x == True` -> `:`, `x = True` -> newline."""
    x, y = w.names(2)
    # Assigning a value is as common as comparing with it, so the value itself gives nothing away.
    value = w.pick("True", "True", "False", "None", w.number(), y)
    return ((f"if {x} {w.pick('==', '==', '!=')} {value}", ":", f"\n    {y} = {w.plain()}"),
            (f"{x} = {value}", "\n", f"print({y})"))


def if_ternary(w):
    """An `if` after a value needs its `else`: `if x > 1` -> `:`, `y = z if x > 1` -> ` else`."""
    x, y, z = w.names(3)
    test = w.test(x) + (f" and {w.test(z)}" if w.large else "")
    value = w.pick(z, w.plain(), f"{w.func()}({x})", w.string())
    start, end = w.pick((f"{y} = {value}", ""), (f"{y} = {value}", ""), (f"{y} += {value}", ""),
                        (f"print({value}", ")"), (f"{y} = {w.func()}({value}", ")"))
    return ((f"if {test}", ":", f"\n    {y} = {w.plain()}"),
            (f"{start} if {test}", " else", f" {w.plain()}{end}"))


def lambda_func(w):
    """A lambda's body follows, a function's arguments: `y = lambda x` -> `:`, `def x` -> `(`."""
    x, y, z = w.names(3)
    f, n = w.func(), w.number()
    # Both prompts end in the same variable, so the word before it has to be looked up.
    start, end = w.pick((f"{f} = lambda", ""), (f"{y} = lambda {z},", ""),
                        (f"{y} = sorted({z}, key=lambda", ")"), (f"{z}.sort(key=lambda", ")"),
                        (f"{y} = list(map(lambda", f", {z}))"), (f"{y} = {f}({z}, lambda", ")"))
    value = w.pick(f"{x}[{n}]", f"{x} + {n}", f"{x} * {x}", f"{f}({x})")
    return ((f"{start} {x}", ":", f" {value}{end}"),
            (f"def {x}", "(", f"{y}):\n    return {y} + {n}"))


def enumerate_range(w):
    """Two loop variables number things, one counts: `for i, x in` -> ` enumerate`, `for i in`."""
    i, x, y, z = w.names(4)
    value = w.pick(i, f"{w.func()}({i})", f"{i} * {w.number()}", f"{y}[{i}]")
    start, end = w.pick(("for", f":\n    print({value})"), ("for", f":\n    {z} += {value}"),
                        (f"{z} = [{value} for", "]"), (f"{z} = sum({value} for", ")"))
    before = w.pick("", f"{y} = [{w.string()}, {w.string()}]\n", f"{y} = {w.func()}({z})\n")
    return ((f"{before}{start} {i}, {x} in", " enumerate", f"({y}){end}"),
            (f"{before}{start} {i} in", " range", f"({w.pick(f'len({y})', w.number())}){end}"))


def fstring_brace(w):
    """Only an f-string holds variables: `print(f"size is` -> ` {`, `print("size is` -> `",`."""
    x, y = w.names(2)
    quote, f, text = w.pick('"', '"', "'"), w.func(), w.text()
    start, plain, rest, end = w.pick(
        ("print(", ",", f" {x})", ")"), (f"{y} = {f}(", ",", f" {x})", ")"),
        (f"{y} = ", "", f"\nprint({y}, {x})", ""), ("print(", ")", "", ")"),
        (f"{f}(", ")", "", ")"), ("raise ValueError(", ")", "", ")"))
    more = w.pick("", "", f" {w.choice(w.words)}")
    # The `f` stands up to four words back: the answer is not in the words just before.
    return ((f"{start}f{quote}{text}", " {", f"{x}}}{more}{quote}{end}"),
            (f"{start}{quote}{text}", f"{quote}{plain}", rest))


def final_kwarg(w):
    """After a default all need one: `def f(a, b=1, c` -> `=`, `def f(a, b, c` -> `):`."""
    # A default after `c` would be allowed in both, but is rare in training where none came before.
    *first, given, last = w.names(w.pick(3, 4) if w.large else w.pick(2, 3, 3))
    value, method, kind = w.pick(w.number(), "True", "None"), w.pick(w.large, False), w.kind()
    start = f"def {w.func()}({', '.join(['self'] * method + first + [given])}"
    body = f"\n    return {w.func()}({given}, {last})"
    sides = ((f"{start}={w.pick(w.number(), 'True', 'None')}, {last}", "=", f"{value}):{body}"),
             (f"{start}, {last}", "):", body))
    return tuple(nest(f"class {kind}:", side) for side in sides) if method else sides


def indent_for(w):
    """A loop's body is deeper: `for x in y:` -> newline and 4 spaces, `x = y` -> newline alone."""
    x, y, z = w.names(3)
    f, n = w.func(), w.number()
    # Whatever can be looped over can be assigned too: one line, with `for` and without.
    values = w.pick(y, f"{f}({y})", f"{f}({y}, {n})", f"range({n})", f"{y}[{n}:]", f"sorted({y})",
                    f"{y}.{z}", f"[{y}, {z}]", f"{y}.split()", f"reversed({y})")
    body = w.pick(f"print({x})", f"{z} = {x}", f"{z}.append({x})", f"{f}({x}, {n})", f"{z} += {x}")
    return (f"for {x} in {values}:", "\n    ", body), (f"{x} = {values}", "\n", body)


def while_return_true(w):
    """A loop has a body, a return none: `while True` -> `:`, `return True` -> newline."""
    x, y = w.names(2)
    start = f"def {w.func()}({x}):\n    " + w.pick("", f"{statement(w, y)}\n    ")
    # A return ends its block, so what follows it stands one level out: what `after` begins with.
    branch, loop = f"if {w.test(x)}:\n", f"for {y} in {x}:\n"
    inner, pad, after = w.pick(("", 8, ("\n", f"print({x})")),
                               (f"{branch}        ", 12, ("\n    ", "return False")),
                               (f"{loop}        ", 12, ("\n    ", "return False")))
    if w.large:
        inner, pad, after = f"{loop}        {branch}            ", 16, ("\n    ", "return False")
    body = f"\n{' ' * pad}{statement(w)}\n{' ' * pad}break"
    return (f"{start}{inner}while True", ":", body), (f"{start}{inner}return True", *after)


GENERATORS = (  # in the order of the table of tasks
    single_double_quote, bracket_counting, bracket_brace, set_or_string,
    set_or_string_fixedvarname, class_init, var_swap, with_as, with_open, for_while, else_elif,
    if_equals, var_if, if_ternary, lambda_func, enumerate_range, fstring_brace, final_kwarg,
    indent_for, while_return_true)
TASKS: dict[str, Callable] = {task.__name__: task for task in GENERATORS}

# A model learns these late: with equal shares, none of them was learned in 53 million tokens.
# --long shows them three times as often. In shorter runs that costs more tasks than it gains.
LATE = (set_or_string, class_init, var_swap, with_open, final_kwarg)

added = []  # the files that `add_file` has read: worker processes read them again


def add_file(path):
    """Add the tasks of a Python file: its functions of one argument, except _names. They are not
    part of training text. Raises TaskError if it has none, or one of a known name."""
    try:
        if not os.path.isfile(path):  # a pipe may never end
            raise OSError("there is no such file, or it is a pipe or folder")
        names = runpy.run_path(path)
    except (Exception, SystemExit) as e:  # it is the user's own program
        raise TaskError(f"--tasks {path}: {type(e).__name__}: {e}") from e
    found = {name: f for name, f in names.items() if not name.startswith("_")
             and getattr(f, "__module__", "") == "<run_path>"
             and getattr(getattr(f, "__code__", None), "co_argcount", 0) == 1}
    if not found or (known := found.keys() & (TASKS.keys() | {"all", "summary", "compare"})):
        raise TaskError(f"--tasks {path}: " + (
            f"there is a task {min(known)} already" if found else "no function of one argument"))
    TASKS.update(found)
    added.append(os.path.abspath(path))  # a worker process starts in another folder


# ---- what the other programs use ----------------------------------------------------------------

def title(task):
    """What a task is about: the first line of its docstring, which `python -OO` leaves out."""
    return (str(TASKS[task].__doc__ or "") or task).splitlines()[0]


class Pair(NamedTuple):
    """One test: answers[i] is right after prompts[i] and wrong after the other prompt."""
    prompts: tuple[str, str]
    answers: tuple[str, str]


def check_draw(n: int, split: str):
    """Raise TaskError if n pairs of a split cannot be drawn."""
    if split not in SPLITS:
        raise TaskError(f"no split {split!r}; splits: {', '.join(SPLITS)}")
    if n < 1:
        raise TaskError(f"n is the number of pairs and must be at least 1, not {n}")


def pairs(task: str, n: int, seed: int = 0, split: str = "eval") -> list[Pair]:
    """n different pairs of a task; a longer list begins with the shorter one of the same seed.

    "eval" is what circuits are found on. "held" has other words and larger shapes (deeper, longer,
    inside functions), to see whether a circuit is the rule or just fits its prompts.
    Raises TaskError for an unknown task or split, or n < 1.
    """
    if task not in TASKS:
        close = difflib.get_close_matches(task, TASKS, n=1, cutoff=0.0)[0]
        raise TaskError(f"no task {task!r}; the nearest is {close!r}; tasks: {', '.join(TASKS)}; "
                        "of your own: prune.py --tasks FILE")
    check_draw(n, split)
    rng = random.Random(f"{task}/{split}/{seed}")  # a string seeds alike on every platform
    found, draws = {}, 0  # by prompts: keeps the order and drops what was made before
    # A pair depends on those before it only through rng, so asking for more changes none of them.
    while len(found) < n:
        draws += 1
        if draws > 100 * n + 1000:
            raise TaskError(f"{task} makes only {len(found)} different pairs that are short "
                            f"enough; {n} are needed")
        w = Writer(rng, split)
        try:
            (prompt0, answer0, _), (prompt1, answer1, _) = sides = surround(w, TASKS[task](w))
            if not all(isinstance(text, str) for side in sides for text in side):
                raise TypeError("a part is not a string")
        except (Exception, SystemExit) as e:  # a task may be the user's own
            raise TaskError(f"the task {task} must return two sides, each (prompt, answer, rest): "
                            f"{type(e).__name__}: {e}") from e
        if max(len(prompt0), len(prompt1)) <= (230 if split == "held" else 200):
            found.setdefault((prompt0, prompt1), (answer0, answer1))
    return [Pair(prompts, answers) for prompts, answers in found.items()]


def idiom(rng: random.Random, late: int = 1) -> str:
    """One training document of valid Python: a few snippets, most of them one side of some task.
    Those of LATE occur `late` times as often as others.

    An eighth is other code, and a sixth has the larger shapes of "held": those are to be new to a
    circuit but not to the model, or a bad score would not say whose fault it is. Half stand alone:
    a short run must meet each behaviour often to learn it.
    """
    w, snippets = Writer(rng, "train"), []
    for _ in range(w.pick(1, 2, 3, 4, 5)):
        w.large = rng.random() < 0.16
        side = w.choice(w.choice(GENERATORS + (late - 1) * LATE)(w))
        if rng.random() < 0.125:
            snippets.append(filler(w))
        else:
            snippets.append("".join(side if rng.random() < 0.5 else surround(w, [side])[0]))
    return w.pick("\n", "\n\n").join(snippets) + "\n"


def idiom_documents(n_bytes, late=1, seed=0):
    """Generated simple idioms, about n_bytes of them; the paper mixes in such text too (A.2)."""
    rng, texts, size = random.Random(seed), [], 0
    while size < n_bytes:
        texts.append(idiom(rng, late))
        size += len(texts[-1])
    return texts


# ---- prompts and scores -------------------------------------------------------------------------

def deciding_tokens(tok, prompt, right, wrong):
    """(context, right token, wrong token): the first at which the encodings of the two answers
    differ, and all tokens before it. Raises ValueError if an answer changes the prompt's own
    tokens or none decides."""
    own, a, b = ([tok.EOT] + tok.encode(prompt + answer) for answer in ("", right, wrong))
    if a[:len(own)] != own or b[:len(own)] != own:
        raise ValueError(f"an answer changes the tokens of the prompt {prompt!r}")
    for i in range(len(own), min(len(a), len(b))):
        if a[i] != b[i]:
            return a[:i], a[i], b[i]
    raise ValueError(f"no token decides between {right!r} and {wrong!r} after {prompt!r}")


class Prompts(NamedTuple):
    """Prompts of a task, right-padded, the two of each pair one after the other."""
    ids: np.ndarray    # [n, T]
    last: np.ndarray   # [n] the position that decides: where the logits are read
    right: np.ndarray  # [n] the right token there
    wrong: np.ndarray  # [n] the wrong one
    sign: np.ndarray   # [n] +1 where the pair's first answer is right, -1 where its second is

    def rows(self, index):
        """Some of the prompts, padded no more than these need."""
        some = Prompts(*(column[index] for column in self))
        return some._replace(ids=some.ids[:, :some.last.max() + 1])

    def inside(self):  # bool [n, T]
        """Which positions are not padding."""
        return np.arange(self.ids.shape[1]) <= self.last[:, None]

    def parts(self, size=16):
        """[(index, Prompts)] in parts of like length, so that little of a part is padding."""
        order = np.argsort(self.last, kind="stable")
        cuts = [order[i:i + size] for i in range(0, len(order), size)]
        return [(index, self.rows(index)) for index in cuts]


def task_prompts(tok, pairs, n_ctx):
    """The Prompts of pairs. A pair that does not fit the context, or that no token of this
    tokenizer decides, is left out. Raises ValueError if that leaves none."""
    rows, why = [], "they do not fit"
    for (first, second), (a, b) in pairs:
        try:
            two = [deciding_tokens(tok, *asked)
                   for asked in ((first, a, b), (second, b, a))]
        except ValueError as e:
            why = e
            continue
        if max(len(context) for context, _, _ in two) <= n_ctx:
            rows += two
    if not rows:
        raise ValueError(f"no pair is of use in a context of {n_ctx} tokens; the last: {why}")
    contexts, right, wrong = zip(*rows)
    last = np.array([len(context) - 1 for context in contexts])
    ids = np.full((len(rows), last.max() + 1), tok.EOT, np.int64)
    for row, context in zip(ids, contexts):
        row[:len(context)] = context
    return Prompts(ids, last, np.array(right), np.array(wrong), np.tile([1, -1], len(rows) // 2))


class Score(NamedTuple):
    """binary: cross-entropy restricted to the right and the wrong token; full: over the
    vocabulary; both in nats, the mean over both prompts of every pair. accuracy: the share of
    prompts with the right logit over the wrong."""
    binary: float
    full: float
    accuracy: float


def score(logits, prompts):  # [n, V] at the deciding positions, on the host
    """The Score of logits on Prompts."""
    rows, logits = np.arange(len(logits)), logits.astype(np.float64)
    right, wrong = logits[rows, prompts.right], logits[rows, prompts.wrong]
    top = logits.max(1)
    full = top + np.log(np.exp(logits - top[:, None]).sum(1)) - right
    binary = np.logaddexp(0, wrong - right)
    return Score(float(binary.mean()), float(full.mean()), float((right > wrong).mean()))


# ---- command line -------------------------------------------------------------------------------

def print_pairs(task: str, n: int, seed: int, split: str) -> None:
    """Print n pairs: each prompt behind a bar, its right and wrong answer as Python strings."""
    found = pairs(task, n, seed, split)
    print(f"== {task}: {title(task)}\n")
    for prompts, answers in found:
        for prompt, right, wrong in zip(prompts, answers, answers[::-1]):
            print("\n".join(f"  | {line}" for line in prompt.split("\n")))
            print(f"  right {right!r}  wrong {wrong!r}\n")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise TaskError(f"{message}; see --help")


def main(argv=None) -> int:
    """The commands of the module's docstring; a wrong value is one line and status 2."""
    parser = Parser(description="Pairs and training text for the twenty tasks.")
    parser.add_argument("task", nargs="?", help="show this task only (all of them if left out)")
    parser.add_argument("--n", type=int, default=3, help="how many pairs or documents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="eval", help="train, eval or held")
    parser.add_argument("--tasks", help="a Python file with tasks of one's own")
    parser.add_argument("--idioms", action="store_true", help="show training documents instead")
    try:
        args = parser.parse_args(argv)
        if not 1 <= args.n <= 10_000:
            raise TaskError(f"--n must be from 1 to 10000, not {args.n}")
        if args.tasks:
            add_file(args.tasks)
        if args.idioms:
            rng = random.Random(f"idioms/{args.seed}")
            print("\n----\n".join(idiom(rng) for _ in range(args.n)))
        for task in () if args.idioms else TASKS if args.task is None else [args.task]:
            print_pairs(task, args.n, args.seed, args.split)
        print(end="", flush=True)
    except (TaskError, UnicodeError, OSError) as e:
        if isinstance(e, OSError):  # what is left to print has no place to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(e, BrokenPipeError):  # as by `| head`
            print(f"tasks.py: error: {e}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
