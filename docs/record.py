"""What a circuit's file must hold, so that all of it can be printed, drawn and computed again.

A file comes from anywhere, and its checksum only shows that it is whole: see prune.load.
"""
from typing import NamedTuple


class Maybe(NamedTuple):
    """What may be None."""
    what: object


# A type; a list [what all items are]; a tuple (what each item is); {str: what all values are}; or
# {name: what its value is}, with a ? where the name may be absent.
SIZE, LINK = {"nodes": int, "edges": int}, {"from": str, "to": str}
SCORE = {"binary": float, "full": float, "accuracy": float}
EXTREMES = {"high": [(str, str, float)], "low": [(str, str, float)]}
NUMBER = Maybe(float)
# A row of docs/compare.py, and what is said there of a model.
POINT = {"task": str, "target": float, "edges": int}
ROW = {"model": str, "task": str, "full": NUMBER, "points": [POINT | {"nodes": int}],
       "by_attribution": [POINT], "cleaned": Maybe(SIZE), "without": NUMBER, "random": NUMBER}
MODEL = {"name": str, "model": str, "kind": str, "seed": int, "d_model": int, "density": float,
         "afrac": float, "nonzero": int, "kurtosis": float, "loss": float, "code": float,
         "idioms?": float}
CHECKS = ("held-out prompts", "necessity", "resampled ablation", "full model's AbsTopK",
          "nonsense task", "inverted task", "shuffled weights", "attention", "other seeds")
RECORD = {
    "doc": str, "seeds": int, "prompts": {"search": int, "held": int},
    "model": {"path": str, "fingerprint": str, "config": {str: object}},
    "size": SIZE | dict.fromkeys(("model_nodes", "model_edges", "embed", "unembed"), int),
    "attribution": SIZE, "stages": [SIZE | {"stage": str, "loss": float}],
    "losses": {"full": {"search": SCORE, "held": SCORE},
               "circuit": {"search": SCORE, "held": SCORE}},
    "checks": [{"name": str, "passed": Maybe(bool), "text": str, "loss?": NUMBER, "edges?": NUMBER,
                "nodes?": NUMBER, "overlap?": NUMBER, "random?": NUMBER, "median?": NUMBER}],
    "nodes": [{"name": str, "importance": float, "bias": NUMBER, "mean": float,
               "task": EXTREMES, "text": EXTREMES}],
    "edges": [LINK | {"weight": float}], "residual": [LINK],
    "embed": [{"token": str, "to": str, "weight": float}],
    "unembed": [{"from": str, "token": str, "weight": float}],
    "groups": [{"nodes": [str], "effect": float}],
    "heads": [{"name": str, "nodes": [str], "sink": NUMBER, "overlap": float,
               "distances": [(int, float)],
               "attends": [{"context": str, "at": str, "to": [(str, float)], "rows": [[int]]}]}],
    "example": {"prompts": ([str], [str]), "answers": (str, str), "margins": (float, float),
                "values": {str: ([float], [float])}}}


def fit(value, what, name="it"):
    """Raise ValueError, with the name of the part, if a value is not what it must be."""
    def need(fits, must):
        if not fits:
            raise ValueError(f"{name} must be {must}")

    if isinstance(what, Maybe):
        if value is not None:
            fit(value, what.what, name)
    elif isinstance(what, (list, tuple)):
        need(isinstance(value, list), "a list")
        need(isinstance(what, list) or len(value) == len(what), f"of {len(what)} items")
        for i, item in enumerate(value):
            fit(item, what[0] if isinstance(what, list) else what[i], f"{name}[{i}]")
    elif isinstance(what, dict):
        need(isinstance(value, dict), "an object")
        if str in what:
            what = dict.fromkeys(value, what[str])
        names = {key.rstrip("?") for key in what}
        need(value.keys() <= names, f"without {', '.join(value.keys() - names)}")
        need({key for key in what if not key.endswith("?")} <= value.keys(), "complete")
        for key, item in what.items():
            if key.rstrip("?") in value:
                fit(value[key.rstrip("?")], item, f"{name}.{key.rstrip('?')}")
    elif what is not object:
        kinds = (int, float) if what is float else what
        need(isinstance(value, kinds) and isinstance(value, bool) == (what is bool), what.__name__)
        need(what is str or abs(value) <= 1e9, "of a usual size")  # nor is NaN


def check(record, names):
    """Raise ValueError unless all parts of a record are there, are of the right type, and agree.
    names: of its nodes, each once."""
    fit(record, RECORD)
    nodes, values = [node["name"] for node in record["nodes"]], record["example"]["values"]
    ends = [e[end] for kind, both in (("edges", ("from", "to")), ("residual", ("from", "to")),
                                      ("embed", ("to",)), ("unembed", ("from",)))
            for e in record[kind] for end in both]
    ends += [n for kind in ("groups", "heads") for part in record[kind] for n in part["nodes"]]
    size = {"nodes": len(nodes), "edges": len(record["edges"])}
    if nodes != names or values.keys() != set(names) or not set(ends) <= set(names) or (
            size != {name: record["size"][name] for name in size}) or not all(
            head["nodes"] for head in record["heads"]):
        raise ValueError("its nodes, their number, and the ends of its edges do not agree")
    lengths = [len(tokens) for tokens in record["example"]["prompts"]]
    if 0 in lengths or any([len(row) for row in rows] != lengths for rows in values.values()):
        raise ValueError("its example has not a value for each token")
    checks = {c["name"]: c for c in record["checks"]}
    if tuple(checks) != CHECKS or checks["necessity"].get("loss") is None or any(
            "edges" not in checks[name] for name in CHECKS[4:7]) or any(
            c["passed"] is False and {c.get(key) for key in ("loss", "edges", "overlap")} == {None}
            for c in record["checks"]):
        raise ValueError(f"its checks are not {', '.join(CHECKS)}, with a number each")
