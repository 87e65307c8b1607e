"""A stand-in for CuPy, on which tests run the path of a GPU, but for its kernels. It refuses what
CuPy refuses, so that code which would fail on a GPU fails on every machine.
"""
import operator

import numpy as np


def bare(x):
    """What Strict wraps, inside tuples and lists too. Refuses host arrays, as CuPy does."""
    if isinstance(x, np.ndarray):
        raise TypeError("a host array where a device array is needed")
    if isinstance(x, (tuple, list)):
        return type(x)(map(bare, x))
    return x.a if isinstance(x, Strict) else x


def device(fn):
    """A NumPy function or method on Strict arrays, with only the keywords of CuPy."""
    def call(*args, **kwargs):
        if extra := kwargs.keys() - {"axis", "dtype", "keepdims"}:
            raise TypeError(f"CuPy's {fn} takes no {extra}")
        out = fn(*map(bare, args), **kwargs)
        return Strict(np.asarray(out)) if isinstance(out, (np.ndarray, np.generic)) else out
    return call


class Strict:
    """An array that meets NumPy only through `get`, as one on a GPU; sums stay here too."""
    __array_ufunc__ = None  # np.exp(x) is refused, and host + x asks x.__radd__, which refuses too

    def __init__(self, a):
        self.a = a

    def __array__(self, *_, **__):
        raise TypeError("implicit conversion to a host array")

    def __getitem__(self, at):  # CuPy takes host arrays as indices
        at = tuple(getattr(i, "a", i) for i in (at if isinstance(at, tuple) else (at,)))
        return Strict(np.asarray(self.a[at]))

    def __setitem__(self, at, value):
        self.a[bare(at)] = bare(value)

    def get(self):
        return self.a.copy()


METHODS = """reshape repeat transpose swapaxes astype copy view max min sum mean any all argmax
    __neg__ __invert__ __abs__ __lt__ __le__ __gt__ __ge__ __eq__ __ne__ __len__ __float__
    __int__ __bool__ __index__""".split()
METHODS += [f"__{kind}{name}__" for kind in ("", "r", "i")
            for name in "add sub mul truediv mod matmul and or".split()]
for _name in METHODS:
    setattr(Strict, _name, device(getattr(np.ndarray, _name)))
for _name in "dtype shape ndim size itemsize T".split():
    setattr(Strict, _name, property(device(operator.attrgetter(_name))))


class StrictModule:
    """The array module of Strict: those of NumPy's functions that CuPy has too."""
    asarray = staticmethod(lambda x, *d: x if isinstance(x, Strict) else Strict(np.array(x, *d)))

    def __getattr__(self, name):
        if name not in """add arange ascontiguousarray concatenate copysign count_nonzero
                cumsum einsum empty exp full full_like log maximum ones ones_like partition
                sqrt tile where zeros zeros_like""".split():
            raise AttributeError(f"the stand-in has no {name}; add it if CuPy has it")
        return device(getattr(np, name))
