"""Weight-sparse transformers, from scratch: a GPT trained with almost all of its weights at
exactly zero.

Source: Gao et al., "Weight-sparse transformers have interpretable circuits", arXiv 2511.13653
(2025), "the paper" below, and its authors' released code ("the release"). This is not SparseGPT,
the one-shot pruning method.

    python sparsegpt.py                     # train on the standard library, about 20 minutes
    python sparsegpt.py --sample "def f("   # write code with the result

The file reads from top to bottom: backend, Config, data, ops (each backward under its forward),
parameters, the model, optimizer and weight top-k, checkpoints, task scores and sampling, training,
checks and timings, command line. An op is `out, cache = op(x, ...)` and `dx = op_backward(dout,
cache, ...)`. Parameters are one flat buffer, a vector to the optimizer; the model sees a dict of
named views of it. Zeros are multiplied like any number: sparsity is for reading the model.

Departures from the paper, on purpose: q, k and v share one matrix and the gradient is always
divided by its RMS, as in the release; RMSNorm has no gains (they fold into the next matrix); the
sizes are a laptop's and the tokenizer has 512 tokens, learned on the spot. AbsTopK's share falls
from 1 to --afrac as the density falls; a head may prefer a distance, in place of no positions at
all; training is sparse for longer and weight decay is lower: more was learned so.
"""
import argparse
import ctypes
import dataclasses
import functools
import hashlib
import inspect
import io
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import signal
import sys
import sysconfig
import tempfile
import threading
import time
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

import tasks
from tasks import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None

FORMAT = "sparsegpt-2"  # the version of the checkpoint format


# ---- backend: NumPy or CuPy, threads, recycled memory -------------------------------------------

xp = np  # the array module in use; always read as sparsegpt.xp, as `use_device` rebinds it


def use_device(name):
    """Choose the array module: "cpu" (NumPy), "gpu" (CuPy) or "auto". Returns a line that says
    what was chosen.

    Raises UserError if a GPU is asked for and CuPy or a device is missing: never a silent
    fall-back.
    """
    global xp
    if name not in ("cpu", "gpu", "auto"):
        raise UserError(f"SPARSEGPT_DEVICE must be cpu, gpu or auto, not {name!r}")
    why = "as asked"
    if name != "cpu":
        try:
            import cupy
            cupy.zeros(1).sum()  # a driver without a usable device fails here, not at import
            xp = cupy
            return f"device: GPU through CuPy {cupy.__version__}"
        except Exception as e:
            why = f"no usable GPU: {type(e).__name__}: {e}".split("\n")[0]
            if name == "gpu":
                raise UserError(f"SPARSEGPT_DEVICE=gpu, but {why}; install CuPy for your CUDA "
                                "version (pip install cupy-cuda12x) or set SPARSEGPT_DEVICE=cpu"
                                ) from e
    xp = np
    return f"device: CPU through NumPy {np.__version__} ({why})"


def to_host(x):
    """A NumPy array with the values of x, from either backend."""
    return x.get() if hasattr(x, "get") else np.asarray(x)


@functools.cache
def blas_functions():
    """The functions that (get, set) the number of threads of the BLAS that NumPy has loaded, or
    None where it is none of those known here."""
    wheel = Path(np.__file__).parent.parent / "numpy.libs"  # where Windows wheels keep OpenBLAS
    for path in [np.linalg._umath_linalg.__file__, *sorted(wheel.glob("*openblas*.dll"))]:
        lib = ctypes.CDLL(str(path))  # finds the symbols of the libraries that this one loads too
        for name in ("scipy_openblas_%s_num_threads64_", "scipy_openblas_%s_num_threads",
                     "openblas_%s_num_threads64_", "openblas_%s_num_threads", "MKL_%s_Threads"):
            get, put = ("Get_Max", "Set_Num") if name.startswith("MKL") else ("get", "set")
            if hasattr(lib, name % get) and hasattr(lib, name % put):
                return getattr(lib, name % get), getattr(lib, name % put)
    return None


def set_blas_threads(n):
    """Hold BLAS to n threads, however long ago it was loaded. Returns its former number, or None
    where it is not known how; then results are still right, but may depend on BLAS' threads."""
    if blas_functions() is None:
        return None
    get, put = blas_functions()
    before = get()
    put(n)
    return before


def n_cores():
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def thread_pool(size):
    """The pool of `size` threads, made when first used."""
    return ThreadPoolExecutor(size, "sparsegpt")


def parallel(fn, items, threads=0):
    """[fn(item) for item in items], on `threads` threads (0: one a core), with BLAS on one thread
    meanwhile.

    NumPy's elementwise work runs on one core and leaves the interpreter free, so whole shards of a
    batch go one to a thread; the matrix products alone run 1.2 times faster so than on a threaded
    BLAS (width 128, two cores). What an item computes does not depend on the thread that it runs
    on, so results are the same, bit for bit, for any number of threads.
    """
    size = threads or n_cores()
    before = set_blas_threads(1)
    try:
        if size == 1 or xp is not np:
            return [fn(item) for item in items]
        return list(thread_pool(size).map(fn, items))
    finally:
        if before is not None:
            set_blas_threads(before)


def unused(blocks, count):
    """The first of the blocks whose reference count, as seen here, is `count`, or None."""
    for block in blocks:
        if sys.getrefcount(block) == count:
            return block
    return None


class _Recycler(threading.local):
    """What `empty` takes its memory from; skip it on a first reading. This thread's blocks by
    size; one is free when only its list refers to it."""
    # The count of such a block differs between versions of Python, so it is measured.
    free = next(n for n in range(1, 9) if unused([np.empty(1)], n) is not None)

    def __init__(self):
        self.blocks = defaultdict(list)

    def take(self, n_bytes):
        """A free block of at least n_bytes."""
        size = 1 << max(6, (n_bytes - 1).bit_length())  # rounded up to 2^n or to 3/4 of it
        size = size * 3 // 4 if n_bytes <= size * 3 // 4 else size
        block = unused(self.blocks[size], self.free)
        if block is None:
            block = np.empty(size, np.uint8)
            self.blocks[size].append(block)
        return block


_recycler = _Recycler()


def empty(shape, dtype):
    """An uninitialised array, in memory that is used again as soon as nobody refers to it.

    Fresh pages cost NumPy more than the arithmetic: this makes a training step 1.2 times faster.
    CuPy has a pool.
    """
    if xp is not np:
        return xp.empty(shape, dtype)
    dtype = np.dtype(dtype)
    return np.ndarray(shape, dtype, _recycler.take(dtype.itemsize * math.prod(shape)))


def empty_like(x):
    """An uninitialised array of x's shape and dtype; see `empty`."""
    return empty(x.shape, x.dtype)


def fused():
    """Whether to run the fused kernels: on a GPU they do in one pass over memory what the plain
    lines beside them do."""
    return hasattr(xp, "RawKernel")


@functools.cache
def kernel(kind, *definition):
    """A "RawKernel" or an "ElementwiseKernel" of CuPy, which compiles it when it is first run."""
    return getattr(xp, kind)(*definition)


def run_rows(code, name, n, *args):
    """Run a CUDA kernel on n rows, each of them one warp's."""
    kernel("RawKernel", code, name)((-(-n // 4),), (32, 4), (np.int32(n), *args))


# ---- Config: every field is a flag --------------------------------------------------------------

def fraction(text):
    """A float from "0.25" or "1/4"."""
    top, _, bottom = text.partition("/")
    if bottom and float(bottom) == 0:
        raise ValueError  # which argparse turns into a message
    return float(top) / float(bottom or 1)


def flag(default, group, text, **more):
    """A Config field with the group and the text that --help shows for it."""
    return dataclasses.field(default=default, metadata=dict(group=group, help=text, **more))


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. Raises UserError on a value out of range."""
    n_layer: int = flag(2, "model", "blocks of attention and MLP")
    d_model: int = flag(256, "model", "width of the residual stream")
    d_head: int = flag(16, "model", "width of an attention head")
    n_ctx: int = flag(128, "model", "context length in tokens")
    vocab_size: int = flag(512, "model", "tokens: 256 bytes, a separator and learned merges")
    act: str = flag("gelu", "model", "activation of the MLP", choices=("gelu", "relu"))
    afrac: float = flag(1 / 2, "model", "share of channels AbsTopK keeps at each place; 1: all")
    positions: str = flag("relative", "model", "a logit per head and distance, learned absolute "
                          "positions, or none", choices=("relative", "learned", "none"))
    sink: bool = flag(True, "model", "a learned attention sink per head")
    bigram: bool = flag(True, "model", "a dense table of logits by the current token")

    density: float = flag(1 / 64, "sparsity", "share of nonzero weights in every matrix; 1: dense")
    embed_density: float = flag(0.0, "sparsity", "the same for embeddings and unembedding; 0: "
                                "4 x density, the release's rule")
    min_per_neuron: int = flag(4, "sparsity", "nonzero weights every neuron and channel keeps (j)")
    sparse_bias: bool = flag(False, "sparsity", "biases are sparsified too")
    anneal_start: float = flag(0.01, "sparsity", "share of training before density falls from 1")
    anneal_end: float = flag(0.3, "sparsity", "share of training before it reaches its target")

    steps: int = flag(11000, "training", "optimizer steps")
    batch_size: int = flag(8, "training", "sequences a step")
    lr: float = flag(0.024, "training", "learning rate, before warm-up, decay and sharkfin; the "
                     "default ones make 0.7 of it the largest used")
    warmup: float = flag(0.01, "training", "share of training with rising learning rate")
    sharkfin: bool = flag(True, "training", "learning rate x sqrt(final density / density now)")
    beta1: float = flag(0.9, "training", "Adam: decay of the mean gradient")
    beta2: float = flag(0.95, "training", "Adam: decay of the mean square")
    eps: float = flag(0.1, "training", "Adam: added to the root mean square")
    weight_decay: float = flag(0.02, "training", "decoupled decay of the matrices")
    grad_scale: str = flag("divide", "training", "by the gradient's RMS: the release's division "
                           "or the paper's clip to 1", choices=("divide", "clip", "none"))
    seed: int = flag(0, "training", "of initialisation, batches and samples")

    data: str = flag("stdlib", "data", "files or folders, separated by commas; 'stdlib' is the "
                     "Python standard library's source")
    idioms: float = flag(0.9, "data", "share of the batches drawn from generated simple idioms")
    max_mb: float = flag(0.0, "data", "read about this many megabytes of each source; 0: all")

    threads: int = flag(0, "running", "threads; 0: one a core. The result does not depend on it, "
                        "and a small batch has work for few")
    out: str = flag("out/sparse.npz", "running", "checkpoint; out/dense.npz with --dense, "
                    "out/quick.npz with --quick")
    dtype: str = flag("float32", "running", "float64 is for checks",
                      choices=("float32", "float64"))

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            kind = (int, float) if f.type is float else f.type
            if not isinstance(value, kind) or (isinstance(value, bool) and f.type is not bool):
                raise UserError(f"--{f.name} must be of type {f.type.__name__}, not {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{f.name} must be finite, not {value}")
            choices = f.metadata.get("choices")
            if choices and value not in choices:
                raise UserError(f"--{f.name} must be one of {', '.join(choices)}, not {value!r}")
        for name, low, high in [
                ("n_layer", 1, 99), ("d_model", 1, 1 << 16), ("d_head", 1, 1 << 16),
                ("n_ctx", 2, 1 << 16), ("vocab_size", 257, 1 << 16), ("steps", 1, 1 << 31),
                ("min_per_neuron", 0, self.d_model), ("batch_size", 1, 1 << 20),
                ("seed", 0, 1 << 31), ("threads", 0, 1 << 10), ("warmup", 0, 1),
                ("anneal_start", 0, 1), ("anneal_end", self.anneal_start, 1), ("idioms", 0, 1),
                ("embed_density", 0, 1), ("weight_decay", 0, 1e3), ("max_mb", 0, 1e6)]:
            if not low <= getattr(self, name) <= high:
                raise UserError(f"--{name} must be from {low} to {high}, "
                                f"not {getattr(self, name)}")
        for name, high in [("density", 1), ("afrac", 1), ("lr", 1e3), ("eps", 1e3)]:
            if not 0 < getattr(self, name) <= high:
                raise UserError(f"--{name} must be over 0 and at most {high}, "
                                f"not {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} must be from 0 to under 1, not {getattr(self, name)}")
        if self.d_model % self.d_head:
            raise UserError(f"--d_head {self.d_head} does not divide --d_model {self.d_model}")

    @property
    def shards(self):
        """Parts a batch is cut into, one a thread: fixed by the config, so that sums never depend
        on the number of cores. Two of at least 512 tokens, up to eight of at least 1024 (1.07 times
        as fast as 512), and at most 64 M gradients over all of them, to keep memory small."""
        if xp is not np:
            return 1
        tokens = self.batch_size * self.n_ctx
        parts = max(min(2, tokens // 512), min(8, tokens // 1024))
        return max(1, min(parts, self.batch_size, (64 << 20) // n_params(self)))

    def k(self, width):
        """Channels that AbsTopK keeps out of `width`."""
        return max(1, int(self.afrac * width))


# ---- data: documents, tokenizer, token streams --------------------------------------------------

SKIP = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "site-packages",
        "__pycache__"}  # of the standard library: not plain code
IDIOM_BYTES = 12_000_000  # of generated idioms: a default run sees each of them once or twice


def source_files(source):
    """Paths of the text files behind one entry of --data, sorted. Raises UserError if there is
    none."""
    root = Path(sysconfig.get_paths()["stdlib"] if source == "stdlib" else source)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UserError(f"--data {source}: no such file or folder")
    files = []
    def unreadable(e):
        raise UserError(f"--data {source}: cannot read {e.filename}: {e.strerror}") from e

    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        if source == "stdlib":
            subfolders[:] = [d for d in subfolders if d not in SKIP]
        files += [path for path in (Path(folder, name) for name in names) if path.is_file()
                  and (path.suffix == ".py" or source != "stdlib")]
    if not files:
        raise UserError(f"--data {source}: the folder holds no files")
    return sorted(files)


def read_documents(data, max_mb=0.0, log=print):
    """The texts behind --data, one per file. Files that are not UTF-8 text are skipped and
    counted."""
    texts, skipped = [], 0
    for source in data.split(","):
        if not source:
            raise UserError(f"--data {data!r} names an empty path")
        size = 0
        for path in source_files(source):
            if max_mb and size >= max_mb * 1e6:
                break
            try:
                text = path.read_text("utf-8")
            except UnicodeDecodeError:
                skipped += 1
                continue
            except OSError as e:
                raise UserError(f"--data {source}: cannot read {path}: {e.strerror}") from e
            if "\0" in text:
                skipped += 1
            elif text.strip():
                texts.append(text)
                size += len(text)
    if skipped:
        log(f"data: skipped {skipped} files that are not UTF-8 text")
    if not texts:
        raise UserError(f"--data {data}: every file is empty or not UTF-8 text")
    return texts


def idiom_documents(n_bytes, seed=0):
    """Generated simple idioms, about n_bytes of them; the paper mixes in such text too (A.2)."""
    rng, texts, size = random.Random(seed), [], 0
    while size < n_bytes:
        texts.append(tasks.idiom(rng))
        size += len(texts[-1])
    return texts


def is_validation(text):
    """Whether a document is held out: decided by its content alone, so no document is on both
    sides."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[0] < 13  # 5 %


def split(texts):
    """(training documents, validation documents). Too few to fill both sides are cut at blank
    lines first."""
    def by_side(docs):
        return [d for d in docs if not is_validation(d)], [d for d in docs if is_validation(d)]

    train, val = by_side(texts)
    if not (train and val):
        train, val = by_side(re.findall(r"(?s).+?(?:\n\n+|\Z)", "\n\n".join(texts)))
    if not (train and val):
        raise UserError("--data: too little text to hold some out for validation; add more")
    return train, val


# A word with the space before it, a digit, a run of punctuation, a newline with the indentation
# after it, other white space. Every character is in exactly one piece.
PIECES = re.compile(r"\n *| ?[A-Za-z_]+| ?[0-9]| ?[^\sA-Za-z_0-9]+|[^\S\n]+")


class Tokenizer:
    """Byte-level BPE: tokens 0..255 are the bytes, 256 separates documents, the rest are merges in
    the order in which they were learned. decode(encode(s)) == s for every string s.

    >>> t = Tokenizer.learn(["aaab aaab"], 259)
    >>> t.merges, t.encode("aab")
    ([(97, 97), (97, 98)], [257, 98])
    """
    EOT = 256  # the document separator, and what every prompt starts with

    def __init__(self, merges):
        """merges: list of (left id, right id); merge i makes token 257 + i. Raises ValueError on a
        forward id."""
        self.merges = [(int(a), int(b)) for a, b in merges]
        self.bytes = [bytes([i]) for i in range(256)] + [b""]
        for a, b in self.merges:
            if not (0 <= min(a, b) and max(a, b) < len(self.bytes)):
                raise ValueError(f"the merge {a}, {b} uses a token that does not exist yet")
            self.bytes.append(self.bytes[a] + self.bytes[b])
        self.rank = {pair: i for i, pair in enumerate(self.merges)}
        self.cache = {}

    @classmethod
    def learn(cls, texts, vocab_size):
        """Learn merges until vocab_size tokens or until nothing repeats. Counts each distinct
        piece once and recounts only the pieces that a merge touches. Ties go to the smallest
        pair."""
        counts = Counter(chain.from_iterable(PIECES.findall(t) for t in texts))
        words = [(list(w.encode("utf-8", "surrogatepass")), n) for w, n in sorted(counts.items())]
        pairs, where, merges = Counter(), defaultdict(set), []
        for i, (word, n) in enumerate(words):
            for pair in zip(word, word[1:]):
                pairs[pair] += n
                where[pair].add(i)
        while len(merges) < vocab_size - 257 and pairs:
            best = max(pairs, key=lambda p: (pairs[p], -p[0], -p[1]))
            if pairs[best] < 2:
                break
            merges.append(best)
            for i in where.pop(best):
                word, n = words[i]
                for pair in zip(word, word[1:]):
                    pairs[pair] -= n
                word[:] = cls.merge(word, best, 256 + len(merges))
                for pair in zip(word, word[1:]):
                    pairs[pair] += n
                    where[pair].add(i)
            pairs = +pairs  # drops those that no longer occur
        return cls(merges)

    @staticmethod
    def merge(word, pair, new):
        """The list `word` with every occurrence of `pair`, from the left, replaced by `new`."""
        out, i = [], 0
        while i < len(word):
            hit = i + 1 < len(word) and (word[i], word[i + 1]) == pair
            out.append(new if hit else word[i])
            i += 2 if hit else 1
        return out

    def encode(self, text):
        """The token ids of a string, as a list; without the document separator."""
        out = []
        for piece in PIECES.findall(text):
            ids = self.cache.get(piece)
            if ids is None:
                ids = list(piece.encode("utf-8", "surrogatepass"))
                while len(ids) > 1:
                    best = min(zip(ids, ids[1:]), key=lambda p: self.rank.get(p, math.inf))
                    if best not in self.rank:
                        break
                    ids = self.merge(ids, best, 257 + self.rank[best])
                self.cache[piece] = ids
            out += ids
        return out

    def decode(self, ids):
        """The string of token ids; bytes that are no UTF-8 (a sample may stop inside a character)
        become U+FFFD."""
        data = b"".join(self.bytes[i] for i in ids)
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")


class Corpus(NamedTuple):
    """Token streams with a separator before every document, uint16: {"code": ..., "idioms": ...}
    for each side."""
    tok: Tokenizer
    train: dict
    val: dict
    digest: str  # of the streams: a resumed run must see the same data


def load_corpus(cfg, log=print):
    """Read, split, tokenize; the result is cached beside the checkpoint and rebuilt if anything it
    depends on has changed or the file is damaged. Raises UserError if a stream is too short to
    draw from."""
    texts = read_documents(cfg.data, cfg.max_mb, log)
    n_bytes = min(IDIOM_BYTES, max(1, int(cfg.max_mb * 1e6))) if cfg.max_mb else IDIOM_BYTES
    key = hashlib.sha256(repr((FORMAT, cfg.vocab_size, n_bytes, cfg.idioms > 0)).encode())
    # Whoever changes how the streams are made gets new ones: the source of it is part of the key.
    code = map(inspect.getsource, (tasks, Tokenizer, build_streams, idiom_documents, split,
                                   is_validation))
    for source in (PIECES.pattern, *code, *texts):
        key.update(hashlib.sha256(source.encode("utf-8", "surrogatepass")).digest())
    cache = Path(cfg.out).parent / "cache" / f"{key.hexdigest()[:16]}.npz"
    try:
        corpus = read_corpus(cache)
    except UserError:  # none, stale or damaged: build it
        log("data: reading and tokenizing, once; kept in " + str(cache.parent))
        streams = build_streams(texts, n_bytes if cfg.idioms else 0, cfg.vocab_size, log)
        write_npz(cache, streams)
        corpus = read_corpus(cache)
    for side, least in (("train", cfg.batch_size * (cfg.n_ctx + 1)), ("val", cfg.n_ctx + 1)):
        for name, stream in getattr(corpus, side).items():
            if len(stream) < least:
                raise UserError(f"--data: the {side} side of {name} has {len(stream)} tokens, "
                                f"fewer than the {least} of one batch; add text, or lower "
                                "--batch_size or --n_ctx")
    return corpus


def build_streams(texts, n_bytes, vocab_size, log=print):
    """{"merges": ..., "train.code": ids, "val.code": ids, and the same of n_bytes of idioms}."""
    t0 = time.perf_counter()
    sides = {"code": split(texts)}
    if n_bytes:
        sides["idioms"] = split(idiom_documents(n_bytes))
    tok = Tokenizer.learn(chain.from_iterable(train for train, _ in sides.values()), vocab_size)
    log(f"data: {len(texts)} documents, {sum(map(len, texts)) / 1e6:.1f} MB of code; learned "
        f"{len(tok.merges)} merges ({time.perf_counter() - t0:.1f} s)")
    streams = {}
    for name, pair in sides.items():
        for side, docs in zip(("train", "val"), pair):
            ids = chain.from_iterable(chain([tok.EOT], tok.encode(doc)) for doc in docs)
            streams[f"{side}.{name}"] = np.fromiter(ids, np.uint16)
    log("data: " + ", ".join(f"{len(s):,} {n}" for n, s in streams.items())
        + f" tokens ({time.perf_counter() - t0:.1f} s)")
    return dict(merges=np.array(tok.merges, np.int32).reshape(-1, 2), **streams)


def read_corpus(path):
    """A Corpus from its cache file. Raises UserError if that is missing, damaged or not ours."""
    arrays = read_npz(path)
    try:
        tok, digest = Tokenizer(arrays.pop("merges")), hashlib.sha256()
        sides = {"train": {}, "val": {}}
        for name in sorted(arrays):
            digest.update(name.encode() + arrays[name].tobytes())
            side, _, stream = name.partition(".")
            sides[side][stream] = arrays[name]
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path} is no cache of ours ({type(e).__name__}: {e})") from e
    return Corpus(tok, sides["train"], sides["val"], digest.hexdigest())


def draw_batch(streams, rng, n, n_ctx, idioms):
    """n random windows: inputs and next tokens, int64 [n, n_ctx] each; a share `idioms` of them
    from there."""
    n_idioms = int(idioms * n + rng.random()) if "idioms" in streams else 0
    rows = []
    for name, count in (("code", n - n_idioms), ("idioms", n_idioms)):
        if count:
            starts = rng.integers(0, len(streams[name]) - n_ctx, count)
            rows.append(streams[name][starts[:, None] + np.arange(n_ctx + 1)])
    rows = np.concatenate(rows).astype(np.int64)
    rng.shuffle(rows)  # so that the shards are alike
    return rows[:, :-1], rows[:, 1:]


# ---- ops: forward, and backward under it --------------------------------------------------------
# N is batch x time; every x is [N, channels], so that each linear map is one matrix product. A
# backward gets dout, the gradient of the loss by the op's output, and returns the gradient by its
# input. Gradients of weights are written into the arrays given for them; where these are None they
# are not computed.

def embedding(ids, wte, wpe):  # [B, T], [V, C], [n_ctx, C] or None -> [B*T, C]
    """Rows of the token table, plus learned positions if there are any."""
    x = gather(wte, ids.reshape(-1))
    if wpe is not None:
        x.reshape(*ids.shape, -1)[...] += wpe[:ids.shape[1]]
    return x, ids


def embedding_backward(dout, ids, dwte, dwpe):
    scatter_rows(ids.reshape(-1), dout, dwte)
    if dwpe is not None:
        T = ids.shape[1]
        xp.sum(dout.reshape(*ids.shape, -1), axis=0, out=dwpe[:T])
        dwpe[T:] = 0


def gather(table, ids):  # [V, C], [N] -> [N, C]
    """table[ids], into recycled memory."""
    if xp is not np:
        return table[ids]
    out = empty((len(ids), table.shape[1]), table.dtype)
    return np.take(table, ids, axis=0, out=out, mode="clip")  # "raise" would copy once more


def scatter_rows(ids, rows, out):  # [N], [N, C], [V, C]: the backward of gather
    """out[v] = the sum of the rows whose id is v, in the order in which they stand: equal from run
    to run."""
    if xp is not np:  # atomic adds on a GPU come in any order; a product does not
        one_hot = (ids[None, :] == xp.arange(len(out))[:, None]).astype(rows.dtype)
        xp.matmul(one_hot, rows, out=out)
        return
    order = np.argsort(ids, kind="stable")
    starts = np.flatnonzero(np.diff(ids[order], prepend=-1))
    counts = np.diff(starts, append=len(ids))
    out[...] = 0
    for n in np.unique(counts):  # all ids that stand n times at once
        at = order[starts[counts == n, None] + np.arange(n)]
        some = np.take(rows, at, axis=0, out=empty((*at.shape, rows.shape[1]), rows.dtype),
                       mode="clip")
        out[ids[at[:, 0]]] = np.sum(some, axis=1, out=empty(some[:, 0].shape, rows.dtype))


def take_rows(x, rows):  # [N, C], [n] -> [n, C]
    """Some of the rows, each at most once."""
    return x[rows], (rows, len(x))


def take_rows_backward(dout, cache):
    rows, n = cache
    dx = xp.zeros((n, dout.shape[1]), dout.dtype)
    dx[rows] = dout
    return dx


def rmsnorm(x, eps=1e-5):  # [N, C] -> [N, C]
    """Each row divided by its root mean square; no gain (it folds into the next matrix)."""
    squares = xp.einsum("nc,nc->n", x, x)[:, None]
    scale = 1 / xp.sqrt(squares / x.shape[1] + eps)
    out = xp.multiply(x, scale, out=empty_like(x))
    return out, (out, scale)


def rmsnorm_backward(dout, cache):
    out, scale = cache
    along = xp.einsum("nc,nc->n", dout, out)[:, None] / out.shape[1]
    dx = xp.multiply(out, along, out=empty_like(out))
    xp.subtract(dout, dx, out=dx)
    dx *= scale
    return dx


def linear(x, w, b):  # [N, in], [in, out], [out] -> [N, out]
    out = xp.matmul(x, w, out=empty((len(x), w.shape[1]), x.dtype))
    out += b
    return out, (x, w)


def linear_backward(dout, cache, dw=None, db=None):
    x, w = cache
    if dw is not None:
        xp.matmul(x.T, dout, out=dw)
        xp.matmul(xp.ones(len(dout), dout.dtype), dout, out=db)  # 2 to 3 times as fast as .sum(0)
    return xp.matmul(dout, w.T, out=empty_like(x))


def as_integers(size):
    """Non-negative floats as the integers of the same bits: these sort alike, 2 times faster."""
    return size.view(np.int32 if size.dtype == np.float32 else np.int64)


def kth_in_rows(bits, k):  # [..., C] -> [..., 1]
    """The k-th largest of each row of non-negative integers."""
    C, part = bits.shape[-1], empty_like(bits)
    part[...] = bits
    if xp is np and C % 512 == 0 and C >= 1024 and 3 * k <= C:
        # NumPy partitions up to 512 numbers within a CPU's vector registers, 4 times faster a
        # number than 1024: so first the larger half of each 512, which mostly all of the k are in.
        pieces = part.reshape(-1, C // 512, 512)
        pieces.partition(255, axis=-1)
        least = kth_in_rows(pieces[..., 256:].reshape(-1, C // 2), k)
        if not (pieces[..., 255] > least).any():
            return least.reshape(*bits.shape[:-1], 1)
        part[...] = bits  # they are not: the plain way
    part.partition(C - k, axis=-1)
    return part[..., C - k:C - k + 1]


ABSTOPK = r"""
extern "C" __global__ void abstopk(int rows, const float* x, float* out, bool* mask, int k) {
    int lane = threadIdx.x, row = blockIdx.x * blockDim.y + threadIdx.y, v[(C + 31) / 32];
    if (row >= rows) return;
    long long at = (long long)row * C;
    #pragma unroll
    for (int i = 0; i < (C + 31) / 32; i++)  // |x| as integers, in registers
        v[i] = 32 * i + lane < C ? __float_as_int(x[at + 32 * i + lane]) & 0x7fffffff : -1;
    int least = 0;  // the k-th largest, found bit by bit: the largest that k of them reach
    for (int bit = 1 << 30; bit; bit >>= 1) {
        int n = 0;
        #pragma unroll
        for (int i = 0; i < (C + 31) / 32; i++) n += v[i] >= (least | bit);
        for (int s = 16; s; s /= 2) n += __shfl_xor_sync(~0u, n, s);
        if (n >= k) least |= bit;
    }
    int room = k;  // for equals of the k-th: what those above it leave
    #pragma unroll
    for (int i = 0; i < (C + 31) / 32; i++) room -= __popc(__ballot_sync(~0u, v[i] > least));
    #pragma unroll
    for (int i = 0; i < (C + 31) / 32; i++) {
        unsigned ties = __ballot_sync(~0u, v[i] == least);
        bool keep = v[i] > least
            || (v[i] == least && __popc(ties & ((1u << lane) - 1)) < room);
        room -= __popc(ties);
        if (32 * i + lane < C) {
            out[at + 32 * i + lane] = keep ? x[at + 32 * i + lane] : 0;
            mask[at + 32 * i + lane] = keep;
        }
    }
}"""


def abstopk(x, k):  # [..., C] -> [..., C]
    """Keep the k entries of largest |x| along the last axis, exactly k, the first of equals; zero
    the rest.

    k >= C returns x itself. Paper A.1. The cache is the mask, or None.
    """
    C = x.shape[-1]
    if k >= C:
        return x, None
    size, mask = empty_like(x), empty(x.shape, bool)
    if fused() and C <= 4096 and x.dtype == np.float32:
        run_rows(f"#define C {C}" + ABSTOPK, "abstopk", x.size // C, xp.ascontiguousarray(x), size,
                 mask, np.int32(k))
        return size, mask
    bits = as_integers(xp.abs(x, out=size))
    least = kth_in_rows(bits, k)
    xp.greater_equal(bits, least, out=mask)
    if xp is not np or np.count_nonzero(mask) != mask.size // C * k:  # the k-th has equals
        tie = bits == least
        above = mask & ~tie
        room = k - above.sum(-1, keepdims=True)
        mask = above | (tie & (xp.cumsum(tie, axis=-1) <= room))
    return xp.multiply(x, mask, out=size), mask


def abstopk_backward(dout, mask):
    return dout if mask is None else xp.multiply(dout, mask, out=empty_like(dout))


def gelu(x):
    """x * Phi(x), the exact GELU. The cache is the derivative, Phi(x) + x * phi(x).

    NumPy has no erf. float32: Abramowitz and Stegun 7.1.26, to 1.5e-7, whose exp(-x*x/2) the
    derivative shares. float64, for checks: the series of 7.1.6, whose terms are all positive, to
    rounding.
    """
    if fused():
        return kernel("ElementwiseKernel", "T x", "T y, T slope", """
            T cdf = T(0.5) * erfc(x * T(-0.7071067811865476));
            y = x * cdf;
            slope = cdf + x * exp(x * x * T(-0.5)) * T(0.3989422804014327)""", "gelu")(x)
    bell = xp.multiply(x, x, out=empty_like(x))
    bell *= -0.5
    xp.exp(bell, out=bell)  # exp(-x*x/2)
    if x.dtype == np.float32:
        t = xp.abs(x, out=empty_like(x))
        t *= 0.3275911 / math.sqrt(2)
        t += 1
        xp.reciprocal(t, out=t)
        half = xp.multiply(t, 0.5 * 1.061405429, out=empty_like(x))
        for a in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
            half += 0.5 * a
            half *= t
        half *= bell  # the tail, 1 - Phi(|x|)
        xp.subtract(0.5, half, out=half)
        sign, bits = t.view(np.int32), half.view(np.int32)
        xp.bitwise_and(x.view(np.int32), np.int32(-2 ** 31), out=sign)
        bits |= sign  # Phi(x) - 1/2; twice as fast as copysign
    else:
        z = xp.clip(x, -9, 9)  # erf is 1 to the last bit beyond
        term = z / math.sqrt(2 * math.pi)
        half = term.copy()
        for n in range(3, 300, 2):
            term = term * z * z / n
            half += term
        half *= xp.exp(-0.5 * z * z)
    half += 0.5  # Phi(x)
    out = xp.multiply(x, half, out=empty_like(x))
    bell *= x
    bell *= 1 / math.sqrt(2 * math.pi)  # x * phi(x)
    half += bell
    return out, half


def relu(x):
    """max(x, 0). The cache is the derivative."""
    out = xp.maximum(x, 0, out=empty_like(x))
    return out, x > 0


def activation_backward(dout, slope):
    return xp.multiply(dout, slope, out=empty_like(dout))


def split_heads(x, B, d_head):  # [B*T, C] -> a view [B, H, T, D]
    return x.reshape(B, len(x) // B, -1, d_head).transpose(0, 2, 1, 3)


def distance_logits(table, T):  # [H, n_ctx] -> [H, T, T]
    """table[h, t - s] for query t and key s: what head h adds to the logit of a key so many tokens
    back (the relative positions of Raffel et al., 2020, section 2.1, without buckets)."""
    t = xp.arange(T)
    return xp.take(table, xp.maximum(t[:, None] - t, 0), axis=1)


def distance_logits_backward(dout, dtable):  # dout is 0 where a key comes after its query
    H, T, _ = dout.shape
    rows = xp.zeros((H, T, 2 * T), dout.dtype)
    rows[:, :, :T] = dout[:, :, ::-1]
    # Cut into rows one shorter, each comes to stand one further right: equal distances in a column.
    rows = rows.reshape(H, -1)[:, :T * (2 * T - 1)].reshape(H, T, 2 * T - 1)
    xp.sum(rows[:, :, T - 1:], axis=1, out=dtable[:, :T])
    dtable[:, T:] = 0


def attention(qkv, sink, table, B, d_head, at=None, block=64):  # [B*T, 3, C] -> [B*T, C]
    """Causal softmax attention. sink: [H], a logit per head that joins the denominator only (paper
    A.1), or None; table: see `distance_logits`, or None. at: [B], a row of each sequence: the
    output [B, C] there alone.

    Queries go in blocks, each over just the keys up to its end, which skips nearly half of the
    products. The softmax is never divided out on the T x T weights but on the far smaller output.
    cache: see the backward.
    """
    T, C = len(qkv) // B, qkv.shape[2]
    q = qkv[:, 0] if at is None else qkv[at, 0]
    out = empty(q.shape, q.dtype)
    q, k, v, heads = (split_heads(a, B, d_head) for a in (q, qkv[:, 1], qkv[:, 2], out))
    # Scaled keys as columns, laid out so: the products with them run 1.5 times as fast.
    keys = xp.multiply(k.swapaxes(2, 3), 1 / math.sqrt(d_head), out=empty_like(k.swapaxes(2, 3)))
    blocks, far = [], None if table is None else distance_logits(table, T)
    if table is not None and at is not None:
        far = far[:, at % T].swapaxes(0, 1)[:, :, None]  # [B, H, 1, T]
    for i in range(0, q.shape[2], block):
        j = min(q.shape[2], i + block)
        end = j if at is None else T
        e = xp.matmul(q[:, :, i:j], keys[..., :end],
                      out=empty((B, C // d_head, j - i, end), out.dtype))  # logits
        if table is not None:
            e += far if at is not None else far[:, i:j, :end]
        if at is None:
            mask = causal_mask(j - i, e.dtype)
        else:
            mask = xp.where(xp.arange(T) > (at % T)[:, None], -math.inf, 0).astype(e.dtype)
            mask = mask[:, None, None]
        total, to_sink = exponentials(e, mask, sink)
        xp.matmul(e, v[:, :, :end], out=heads[:, :, i:j])
        heads[:, :, i:j] /= total
        blocks.append((i, j, end, e, total, to_sink))  # e / total are the attention weights
    return out, (q, keys, v, heads, at, blocks)


SOFTMAX = r"""
extern "C" __global__ void softmax(int rows, float* e, const float* sink, float* total,
                                   float* to_sink, int first, int queries, int heads, int keys) {
    int lane = threadIdx.x, row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    e += (long long)row * keys;
    int last = first + row % queries;  // the last key that this query sees
    float own = sink[row / queries % heads], top = own, sum = 0;
    for (int i = lane; i <= last; i += 32) top = fmaxf(top, e[i]);
    for (int s = 16; s; s /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, s));
    for (int i = lane; i < keys; i += 32) sum += e[i] = i <= last ? expf(e[i] - top) : 0;
    for (int s = 16; s; s /= 2) sum += __shfl_xor_sync(~0u, sum, s);
    own = expf(own - top);
    if (lane == 0) {
        total[row] = sum + own;
        to_sink[row] = own / (sum + own);
    }
}"""


def exponentials(e, mask, sink, limit=40):  # [B, H, t, s], [t, n] or [B, 1, 1, n], [H] or None
    """The softmax of logits e without its division: e becomes exp(e + mask - a shift of the row),
    the mask on the last n columns. Returns each row's sum [B, H, t, 1] with the sink's part in it,
    and that part's share, or None.

    The shift, the row's largest logit, is there to keep exp from overflow. Where all logits are
    within the limit there is none, which saves a quarter of the forward pass of attention.
    """
    B, H, t, s = e.shape
    if fused() and e.dtype == np.float32 and mask.ndim == 2:
        total, to_sink = xp.empty((2, B, H, t, 1), e.dtype)
        own = xp.full(H, -math.inf, e.dtype) if sink is None else sink
        run_rows(SOFTMAX, "softmax", B * H * t, e, own, total, to_sink,
                 *map(np.int32, (s - mask.shape[1], t, H, s)))
        return total, None if sink is None else to_sink
    top = 0
    within = xp is np and e.max() <= limit and e.min() >= -limit and (
        sink is None or abs(sink).max() <= limit)
    e[..., s - mask.shape[-1]:] += mask
    if not within:
        top = e.max(-1, keepdims=True)
        if sink is not None:
            top = xp.maximum(top, sink[:, None, None])
        e -= top
    xp.exp(e, out=e)
    total = xp.matmul(e.reshape(-1, s), xp.ones(s, e.dtype))  # 5 times as fast as .sum(-1)
    total = total.reshape(B, H, t, 1)
    if sink is None:
        return total, None
    own = xp.exp(sink[:, None, None] - top)
    total += own
    return total, own / total


def attention_backward(dout, cache, dsink=None, dtable=None):
    q, keys, v, heads, at, blocks = cache
    B, H, T, D = v.shape
    dqkv = empty((B * T, 3, H * D), dout.dtype)
    dq, dk, dv = (split_heads(dqkv[:, i], B, D) for i in range(3))
    if at is not None:
        dq = empty(q.shape, dout.dtype)
    dheads = split_heads(dout, B, D)
    if dsink is not None:
        dsink[...] = 0
    dfar = None if dtable is None else xp.zeros((H, T, T), dout.dtype)
    values = empty((B, H, D + 1, T), dout.dtype)  # as columns; the -1 below them subtracts `along`
    values[:, :, :D], values[:, :, D] = v.swapaxes(2, 3), -1
    for i, j, end, e, total, to_sink in reversed(blocks):
        both = empty((B, H, j - i, D + 1), dout.dtype)
        do, along = both[..., :D], both[..., D:]
        xp.divide(dheads[:, :, i:j], total, out=do)
        along[..., 0] = xp.einsum("bhtd,bhtd->bht", do, heads[:, :, i:j])
        if dsink is not None:
            dsink -= xp.einsum("bhts,bhts,bhts->h", along, to_sink, total)
        ds = xp.matmul(both, values[..., :end], out=empty_like(e))
        ds *= e  # the gradient by the logits
        if dtable is not None and at is None:  # over the batch, twice as fast as .sum(0)
            over = xp.matmul(xp.ones(B, ds.dtype), ds.reshape(B, -1))
            dfar[:, i:j, :end] = over.reshape(H, j - i, end)
        elif dtable is not None:
            for b, t in enumerate(at % T):
                dfar[:, t] += ds[b, :, 0]
        for grad, left, right in ((dv, e, do), (dk, ds, q[:, :, i:j])):
            left = left.swapaxes(2, 3)
            if end == T:  # the last block comes first and reaches every key: it writes, others add
                xp.matmul(left, right, out=grad)
            else:
                grad[:, :, :end] += xp.matmul(left, right, out=empty((B, H, end, D), e.dtype))
        xp.matmul(ds, keys[..., :end].swapaxes(2, 3), out=dq[:, :, i:j])
    if dtable is not None:
        distance_logits_backward(dfar, dtable)
    if at is not None:
        dqkv[:, 0] = 0
        dqkv[at, 0] = dq.reshape(B, -1)
    dqkv[:, 1] *= 1 / math.sqrt(D)
    return dqkv


def causal_mask(n, dtype):
    """[n, n]: -inf above the diagonal, 0 elsewhere."""
    return xp.triu(xp.full((n, n), -math.inf, dtype), 1)


def cross_entropy(logits, targets):  # [N, V], [N] -> [N]
    """-log softmax(logits)[target] in each row, in nats."""
    rows = xp.arange(len(targets))
    p = xp.subtract(logits, logits.max(-1, keepdims=True), out=empty_like(logits))
    right = p[rows, targets]
    xp.exp(p, out=p)
    total = p.sum(-1, keepdims=True)
    return xp.log(total[:, 0]) - right, (p, total, rows, targets)


def cross_entropy_backward(dout, cache):  # [N] -> [N, V]; writes over its cache
    p, total, rows, targets = cache
    p *= dout[:, None] / total
    p[rows, targets] -= dout
    return p


# ---- parameters: one flat buffer with named views -----------------------------------------------

def shapes(cfg):
    """{name: shape} of every parameter, in the order of the flat buffer. Matrices are [in,
    out]."""
    C, V, out = cfg.d_model, cfg.vocab_size, {"wte": (cfg.vocab_size, cfg.d_model)}
    if cfg.positions == "learned":
        out["wpe"] = (cfg.n_ctx, C)
    for i in range(cfg.n_layer):
        h = f"h{i}."
        out |= {h + "attn.wqkv": (C, 3 * C), h + "attn.bqkv": (3 * C,)}
        if cfg.sink:
            out[h + "attn.sink"] = (C // cfg.d_head,)
        if cfg.positions == "relative":
            out[h + "attn.distance"] = (C // cfg.d_head, cfg.n_ctx)
        out |= {h + "attn.wo": (C, C), h + "attn.bo": (C,), h + "mlp.wfc": (C, 4 * C),
                h + "mlp.bfc": (4 * C,), h + "mlp.wproj": (4 * C, C), h + "mlp.bproj": (C,)}
    out |= {"head.w": (C, V), "head.b": (V,)}
    if cfg.bigram:
        out["bigram"] = (V, V)
    return out


def n_params(cfg):
    """The number of parameters, zeros included."""
    return sum(map(math.prod, shapes(cfg).values()))


def views(flat, cfg):
    """{name: array} of views into a flat buffer of n_params(cfg) numbers."""
    out, start = {}, 0
    for name, shape in shapes(cfg).items():
        out[name] = flat[start:start + math.prod(shape)].reshape(shape)
        start += math.prod(shape)
    return out


def chunks(n):
    """Slices that cover range(n): parts for the threads (a GPU takes all at once). Smaller ones
    make the threads wait for each other at the interpreter's lock."""
    size = 1 << 18 if xp is np else n
    return [slice(i, min(n, i + size)) for i in range(0, n, size)]


def is_matrix(name):
    """Whether a parameter is one of the matrices that are made sparse and decayed."""
    return name in ("wte", "wpe") or ".w" in name


def init_flat(cfg):
    """The flat buffer behind `init_params`. Drawn by NumPy on the host, so both backends start
    alike."""
    rng, flat = np.random.default_rng(cfg.seed), np.zeros(n_params(cfg), cfg.dtype)
    for name, w in views(flat, cfg).items():
        if is_matrix(name):
            w[...] = 0.02 * rng.standard_normal(w.shape)
            if name.endswith(("attn.wo", "mlp.wproj")):
                w /= math.sqrt(2 * cfg.n_layer)
    return xp.asarray(flat)


def init_params(cfg):
    """Fresh parameters: N(0, 0.02), the two output projections divided by sqrt(2 n_layer), all
    else 0 (paper A.1)."""
    return views(init_flat(cfg), cfg)


# ---- the model ----------------------------------------------------------------------------------

def node(x, k, hook, *places):  # [N, len(places) * C] -> the same
    """AbsTopK over each place's C channels, or what a hook puts in its stead: where pruning reads,
    masks and replaces nodes.

    A hook has `forward(place, x, k) -> x`, k the channels that AbsTopK would keep, and
    `backward(place, dx) -> dx`, x and dx [N, C].
    """
    x, mask = x.reshape(len(x), len(places), -1), None
    if hook is None:
        out, mask = abstopk(x, k)
    else:
        out = empty_like(x)
        for i, place in enumerate(places):
            out[:, i] = hook.forward(place, x[:, i], k)
    return out.reshape(len(x), -1), (mask, hook, places)


def node_backward(dout, cache):
    mask, hook, places = cache
    dout = dout.reshape(len(dout), len(places), -1)
    if hook is None:
        return abstopk_backward(dout, mask).reshape(len(dout), -1)
    dx = empty_like(dout)
    for i, place in enumerate(places):
        dx[:, i] = hook.backward(place, dout[:, i])
    return dx.reshape(len(dx), -1)


def check_ids(ids, cfg):
    """Raise ValueError unless ids is an integer array [B, T], T <= n_ctx, of token ids."""
    dtype = getattr(ids, "dtype", None)
    if dtype is None or dtype.kind not in "iu":
        raise ValueError(f"ids must be an array of integers, not {dtype or type(ids)}")
    if ids.ndim != 2 or 0 in ids.shape or ids.shape[1] > cfg.n_ctx:
        raise ValueError(f"ids must be [B, T] with 1 <= T <= {cfg.n_ctx}, not {list(ids.shape)}")
    # Ids that are on a GPU already are not looked at: that would keep it waiting.
    if isinstance(ids, np.ndarray) and not 0 <= ids.min() <= ids.max() < cfg.vocab_size:
        raise ValueError(f"token ids must be in 0..{cfg.vocab_size - 1}, "
                         f"not {ids.min()}..{ids.max()}")


def forward(params, ids, cfg, hook=None, at=None):
    """Logits [B, T, vocab_size] for token ids [B, T], and the cache that `backward` takes.

    at: [B], a position in each row: the logits there alone, [B, vocab_size]; from the last
    attention's queries on, only these rows are run. hook: see `node`. Node places are h0.attn_in,
    h0.q, h0.k, h0.v, h0.attn_out, h0.mlp_in, h0.neuron, h0.mlp_out, h1.attn_in and so on (paper
    A.1), and `final`, the normed residual before the unembedding. Raises ValueError on ids that
    are not token ids of a right shape.
    """
    check_ids(ids, cfg)
    if at is not None and not hasattr(at, "get") and not all(0 <= t < ids.shape[1] for t in at):
        raise ValueError(f"at must be positions in 0..{ids.shape[1] - 1}, not {at}")
    ids, p, C, cache = xp.asarray(ids), params, cfg.d_model, []
    if at is not None:
        at = xp.arange(len(ids)) * ids.shape[1] + xp.asarray(at)

    def put(result):  # keeps an op's cache for the backward pass and passes its output on
        cache.append(result[1])
        return result[0]

    x = put(embedding(ids, p["wte"], p.get("wpe")))
    for i in range(cfg.n_layer):
        h = f"h{i}."
        y = put(rmsnorm(x))
        y = put(node(y, cfg.k(C), hook, h + "attn_in"))
        y = put(linear(y, p[h + "attn.wqkv"], p[h + "attn.bqkv"]))
        y = put(node(y, cfg.k(C), hook, h + "q", h + "k", h + "v"))
        rows = at if i == cfg.n_layer - 1 else None
        y = put(attention(y.reshape(len(y), 3, C), p.get(h + "attn.sink"),
                          p.get(h + "attn.distance"), len(ids), cfg.d_head, rows))
        if rows is not None:
            x = put(take_rows(x, rows))
        y = put(linear(y, p[h + "attn.wo"], p[h + "attn.bo"]))
        y = put(node(y, cfg.k(C), hook, h + "attn_out"))
        x = xp.add(x, y, out=empty_like(x))
        y = put(rmsnorm(x))
        y = put(node(y, cfg.k(C), hook, h + "mlp_in"))
        y = put(linear(y, p[h + "mlp.wfc"], p[h + "mlp.bfc"]))
        y = put(gelu(y) if cfg.act == "gelu" else relu(y))
        y = put(node(y, cfg.k(4 * C), hook, h + "neuron"))
        y = put(linear(y, p[h + "mlp.wproj"], p[h + "mlp.bproj"]))
        y = put(node(y, cfg.k(C), hook, h + "mlp_out"))
        x = xp.add(x, y, out=empty_like(x))
    y = put(rmsnorm(x))
    y = put(node(y, C, hook, "final"))
    logits = put(linear(y, p["head.w"], p["head.b"]))
    current = ids.reshape(-1) if at is None else ids.reshape(-1)[at]
    if cfg.bigram:
        logits += gather(p["bigram"], current)
    logits = logits.reshape(*(ids.shape if at is None else at.shape), -1)
    return logits, (cache, current, at is not None)


def backward(dlogits, cache, cfg, grads=None):
    """The backward pass: the call list of `forward` in reverse. Consumes the cache.

    dlogits: [B, T, vocab_size], or [B, vocab_size] where `forward` was given positions. grads:
    arrays under the parameters' names, written over; None skips the gradients of weights and only
    runs the hook's backward.
    """
    (cache, current, some), g, C = cache, grads or {}, cfg.d_model
    dy = dlogits.reshape(-1, cfg.vocab_size)
    if cfg.bigram and grads:
        scatter_rows(current, dy, g["bigram"])
    dy = linear_backward(dy, cache.pop(), g.get("head.w"), g.get("head.b"))
    dy = node_backward(dy, cache.pop())
    dx = rmsnorm_backward(dy, cache.pop())
    for i in reversed(range(cfg.n_layer)):
        h = f"h{i}."
        dy = node_backward(dx, cache.pop())
        dy = linear_backward(dy, cache.pop(), g.get(h + "mlp.wproj"), g.get(h + "mlp.bproj"))
        dy = node_backward(dy, cache.pop())
        dy = activation_backward(dy, cache.pop())
        dy = linear_backward(dy, cache.pop(), g.get(h + "mlp.wfc"), g.get(h + "mlp.bfc"))
        dy = node_backward(dy, cache.pop())
        dx += rmsnorm_backward(dy, cache.pop())
        dy = node_backward(dx, cache.pop())
        dy = linear_backward(dy, cache.pop(), g.get(h + "attn.wo"), g.get(h + "attn.bo"))
        if some and i == cfg.n_layer - 1:
            dx = take_rows_backward(dx, cache.pop())
        dy = attention_backward(dy, cache.pop(), g.get(h + "attn.sink"),
                                g.get(h + "attn.distance")).reshape(-1, 3 * C)
        dy = node_backward(dy, cache.pop())
        dy = linear_backward(dy, cache.pop(), g.get(h + "attn.wqkv"), g.get(h + "attn.bqkv"))
        dy = node_backward(dy, cache.pop())
        dx += rmsnorm_backward(dy, cache.pop())
    ids = cache.pop()
    if grads:
        embedding_backward(dx, ids, g["wte"], g.get("wpe"))


def token_losses(params, ids, targets, cfg):
    """The cross-entropy of every token [B*T], with the caches of `cross_entropy` and `forward`."""
    logits, cache = forward(params, ids, cfg)
    losses, ce = cross_entropy(logits.reshape(-1, cfg.vocab_size), xp.asarray(targets).reshape(-1))
    return losses, ce, cache


def loss_and_grads(params, ids, targets, cfg, work=None):
    """The mean cross-entropy in nats per token (a 0-d array) and its gradients, a dict like
    params.

    ids, targets: integers [B, T]. The batch is cut into cfg.shards parts, one a thread, whose
    gradients are summed in a fixed order. work: [shards, parameters], scratch to use again in the
    next step; grads are views on its first row. Raises ValueError on ids or targets that are not
    token ids or differ in shape.
    """
    check_ids(ids, cfg)
    check_ids(targets, cfg)
    if ids.shape != targets.shape:
        raise ValueError(f"ids {ids.shape} and targets {targets.shape} differ in shape")
    work = xp.empty((cfg.shards, n_params(cfg)), cfg.dtype) if work is None else work
    n, scale = min(cfg.shards, len(ids)), 1 / ids.size

    def shard(s):
        rows = slice(s * len(ids) // n, (s + 1) * len(ids) // n)
        losses, ce, cache = token_losses(params, ids[rows], targets[rows], cfg)
        dlogits = cross_entropy_backward(xp.full_like(losses, scale), ce)
        backward(dlogits, cache, cfg, views(work[s], cfg))
        return losses.sum() * scale

    def add_up(part):
        for s in range(1, n):
            work[0, part] += work[s, part]

    losses = parallel(shard, range(n), cfg.threads)
    if n > 1:
        parallel(add_up, chunks(work.shape[1]), cfg.threads)
    return sum(losses), views(work[0], cfg)


def evaluate(params, streams, cfg, n):
    """Mean loss in nats per token over n windows, the same at every call, of each stream: {name:
    loss}."""
    out = {}
    for name, stream in streams.items():
        starts = np.linspace(0, len(stream) - cfg.n_ctx - 1, n).astype(np.int64)
        rows = stream[starts[:, None] + np.arange(cfg.n_ctx + 1)].astype(np.int64)

        def part(i):
            return float(token_losses(params, rows[i:i + 4, :-1], rows[i:i + 4, 1:], cfg)[0].sum())

        out[name] = sum(parallel(part, range(0, n, 4), cfg.threads)) / (n * cfg.n_ctx)
    return out


# ---- the optimizer and the sparsity (paper A.2) -------------------------------------------------

def target_density(name, cfg):
    """The share of nonzeros that a parameter keeps once annealing has ended; 1 for what stays
    dense."""
    if name in ("wte", "wpe", "head.w"):
        return cfg.embed_density or min(1.0, 4 * cfg.density)
    return cfg.density if is_matrix(name) or (cfg.sparse_bias and ".b" in name) else 1.0


def annealed(target, step, cfg):
    """The density at a step, of weights or of AbsTopK: 1 until anneal_start, then linearly down to
    the target at anneal_end."""
    start, end = cfg.anneal_start * cfg.steps, min(cfg.anneal_end * cfg.steps, cfg.steps - 1)
    if step >= end:
        return target  # to the last bit: AbsTopK's k is cut from it
    return 1 + (target - 1) * (0.0 if step <= start else (step - start) / (end - start))


def kept(name, shape, density, cfg):
    """How many entries stay nonzero: density x size, but at least j for each neuron or channel of
    the matrix."""
    axis, size = per_neuron(name), math.prod(shape)
    least = 1 if axis is None else max(1, cfg.min_per_neuron * shape[axis])
    return min(size, max(round(density * size), least))


def per_neuron(name):
    """The axis along which a matrix [in, out] has one entry per neuron: 1, outputs, for wqkv and
    wfc, 0, inputs, for wo and wproj, None for the others, which have no floor (the release's rule
    for j)."""
    return {"attn.wqkv": 1, "mlp.wfc": 1, "attn.wo": 0, "mlp.wproj": 0}.get(name.split(".", 1)[-1])


def learning_rate(step, cfg):
    """The sharkfin: linear warm-up and decay, times sqrt(final density / density now), which ends
    at 1."""
    ramp = min(1.0, (step + 1) / max(1.0, cfg.warmup * cfg.steps)) * (1 - step / cfg.steps)
    fin = math.sqrt(cfg.density / annealed(cfg.density, step, cfg)) if cfg.sharkfin else 1.0
    return cfg.lr * ramp * fin


COUNT_DIGITS = r"""
extern "C" __global__ void count_digits(long long n, const int* bits, const int* found,
                                        int* counts, int shift, int known) {
    __shared__ int own[2048];
    for (int i = threadIdx.x; i < 2048; i += blockDim.x) own[i] = 0;
    __syncthreads();
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (long long)gridDim.x * blockDim.x)
        if (bits[i] >> known == *found >> known) atomicAdd(&own[bits[i] >> shift & 2047], 1);
    __syncthreads();
    for (int i = threadIdx.x; i < 2048; i += blockDim.x)
        if (own[i]) atomicAdd(&counts[i], own[i]);
}"""


def kth_by_digits(bits, k):
    """`kth_largest` on a GPU: its digits from the first to the last, each by one count. Neither
    sorts, as CuPy's partition does, nor waits for the device."""
    found = xp.zeros(1, np.int32)
    for shift, known in ((20, 31), (10, 20), (0, 10)):  # bits from `known` on are known
        counts = xp.zeros(2048, np.int32)
        kernel("RawKernel", COUNT_DIGITS, "count_digits")((256,), (512,), (
            np.int64(bits.size), bits, found, counts, np.int32(shift), np.int32(known)))
        reach = xp.cumsum(counts[::-1])  # how many have this digit or a larger one
        short = reach < k
        found |= ((2047 - short.sum()) << shift).astype(np.int32)
        k = k - xp.where(short, reach, 0).max()
    return found[0]


def kth_largest(bits, k):
    """The k-th largest of a flat array of non-negative integers."""
    if fused() and bits.dtype == np.int32:
        return kth_by_digits(bits, k)
    if xp is np and len(bits) > 4096:  # only those near it, by a sample: 2.5 to 7 times as fast
        sample = np.sort(bits[::64])
        rank = len(sample) - k / 64
        off = 4 * math.sqrt(k / 64) + 2  # four standard deviations
        low = sample[max(0, int(rank - off))]
        high = sample[int(rank + off)] if rank + off < len(sample) else np.iinfo(bits.dtype).max
        over = np.greater(bits, high, out=empty(bits.shape, bool))
        above = np.count_nonzero(over)
        over ^= np.greater_equal(bits, low, out=empty(bits.shape, bool))  # from low to high
        near = np.compress(over, bits)
        if above < k <= above + len(near):
            bits, k = near, k - above
    return xp.partition(bits, len(bits) - k)[len(bits) - k]


def keep_largest(w, k, j=0, axis=None):
    """Zero all but k entries of w, in place: those of largest |w|, exactly k, the first of equals.

    With j, no slice of a matrix at an index of `axis` is left with fewer than j: its j largest are
    taken first. Raises ValueError if k leaves no room for that.
    """
    if k >= w.size:
        return
    if j and j * w.shape[axis] > k:
        raise ValueError(f"{k} entries do not hold {j} for each of {w.shape[axis]} neurons")
    bits = as_integers(xp.abs(w, out=empty_like(w)))
    highest = np.iinfo(bits.dtype).max
    xp.minimum(bits, highest - 1, out=bits)  # no NaN may rank with what is promoted

    def choose():
        least = kth_largest(bits.reshape(-1), k)
        mask = xp.greater_equal(bits, least, out=empty(w.shape, bool))
        if xp is np and np.count_nonzero(mask) == k:
            return mask
        above, tie = bits > least, (bits == least).reshape(-1)
        tie &= xp.cumsum(tie) <= k - above.sum()
        return above | tie.reshape(w.shape)

    def promote(neurons):  # their j largest get the highest rank of all
        rows = bits[neurons] if axis == 0 else xp.array(bits[:, neurons].T, order="C")
        each = xp.arange(len(neurons))
        for _ in range(j):
            best = rows.argmax(1)
            rows[each, best] = -1  # so that the next round finds the next
            bits[(neurons, best) if axis == 0 else (best, neurons)] = highest

    if j and xp is not np:  # a GPU is not asked who needs it, which would keep it waiting
        promote(xp.arange(w.shape[axis]))
    mask = choose()
    while j and xp is np:  # only neurons left short are given theirs: up to twice as fast
        short = np.flatnonzero(mask.view(np.uint8).sum(1 - axis, dtype=np.uint32) < j)
        if not len(short):
            break
        promote(short)
        mask = choose()
    w *= mask


def adam_step(flat, m, v, work, step, cfg):
    """Scale the gradient in work[0] by its RMS over all parameters, then Adam. All in place, the
    gradient is used up, nothing is allocated."""
    g = work[0]
    squares = parallel(lambda part: xp.dot(g[part], g[part]), chunks(len(g)), cfg.threads)
    rms = xp.sqrt(sum(squares) / len(g))
    scale = {"divide": 1 / xp.maximum(rms, 1e-20), "clip": 1 / xp.maximum(rms, 1),
             "none": xp.ones_like(rms)}[cfg.grad_scale].astype(g.dtype)
    rate = learning_rate(step, cfg) / (1 - cfg.beta1 ** (step + 1))
    unbias = 1 / (1 - cfg.beta2 ** (step + 1))

    if fused():
        kernel("ElementwiseKernel", "T g, T scale, T rate, T unbias, T beta1, T beta2, T eps",
               "T w, T m, T v", """
               T scaled = g * scale;
               m = beta1 * m + (1 - beta1) * scaled;
               v = beta2 * v + (1 - beta2) * scaled * scaled;
               w -= rate * m / (sqrt(v * unbias) + eps)""", "adam")(
            g, scale, rate, unbias, cfg.beta1, cfg.beta2, cfg.eps, flat, m, v)
        return

    def update(part):
        gp, mp, vp = g[part], m[part], v[part]
        t = xp.multiply(gp, scale * (1 - cfg.beta1), out=empty_like(gp))
        mp *= cfg.beta1
        mp += t  # the mean gradient
        gp *= scale
        gp *= gp
        gp *= 1 - cfg.beta2
        vp *= cfg.beta2
        vp += gp  # the mean square
        xp.multiply(vp, unbias, out=t)
        xp.sqrt(t, out=t)
        t += cfg.eps
        xp.divide(mp, t, out=t)
        t *= rate
        flat[part] -= t  # zeroed weights too: they can come back

    parallel(update, chunks(len(g)), cfg.threads)


def sparsify(params, step, cfg):
    """Cut every sparse parameter to its number of nonzeros at this step, then decay the matrices,
    in place."""
    decay = 1 - learning_rate(step, cfg) * cfg.weight_decay

    def cut(name):
        w, target = params[name], target_density(name, cfg)
        if target < 1:
            k = kept(name, w.shape, annealed(target, step, cfg), cfg)
            axis = per_neuron(name)
            keep_largest(w, k, cfg.min_per_neuron if axis is not None else 0, axis)
        if is_matrix(name):
            w *= decay

    parallel(cut, sorted(params, key=lambda n: -params[n].size), cfg.threads)


# ---- checkpoints --------------------------------------------------------------------------------

class Model(NamedTuple):
    """A trained model: what `train` returns, `save` writes and `load` reads."""
    params: dict
    cfg: Config
    tok: Tokenizer


def write_npz(path, arrays):
    """Write arrays to an .npz file; see `write_whole`."""
    write_whole(path, lambda f: np.savez(f, **arrays))


def write_whole(path, write):
    """Make a file by write(f), f open for bytes: whole or not at all, as it goes to a temporary
    file first, which is then renamed. Raises UserError if that cannot be done."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from e


def read_npz(path):
    """{name: array} of an .npz file, without pickle. Raises UserError if it is missing or
    damaged."""
    try:
        data = io.BytesIO(Path(path).read_bytes())
        if broken := zipfile.ZipFile(data).testzip():  # NumPy alone does not check all of a part
            raise ValueError(f"{broken} does not match its checksum")
        data.seek(0)
        with np.load(data, allow_pickle=False) as f:
            return {name: f[name] for name in f.files}
    except FileNotFoundError as e:
        raise UserError(f"no file {path}; train one with: python sparsegpt.py --out {path}") from e
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    except Exception as e:  # a zip can be broken in many ways, each with an exception of its own
        raise UserError(f"{path} is damaged or not a checkpoint ({type(e).__name__}: {e})") from e


def save(path, model, **extra):
    """Write a Model, and any more arrays, to path; see `write_npz`. Raises UserError if it cannot
    be written."""
    flat = np.concatenate([to_host(model.params[name]).reshape(-1) for name in shapes(model.cfg)])
    config = json.dumps(dataclasses.asdict(model.cfg))
    merges = np.array(model.tok.merges, np.int32)
    write_npz(path, dict(format=FORMAT, config=config, params=flat, merges=merges.reshape(-1, 2),
                         **extra))


def load(path):
    """The Model in a checkpoint. Raises UserError if it is missing, damaged, not ours or of
    another version."""
    return load_all(path)[0]


def load_all(path):
    """(Model, {name: array} of what was saved beside it). Raises UserError as `load` does."""
    arrays = read_npz(path)
    if "format" not in arrays:
        raise UserError(f"{path} is not a sparsegpt checkpoint")
    if str(arrays["format"]) != FORMAT:
        raise UserError(f"{path} is of version {arrays['format']}, this program reads {FORMAT}; "
                        "train it anew")
    try:
        cfg = Config(**json.loads(str(arrays.pop("config"))))
        tok = Tokenizer(arrays.pop("merges").reshape(-1, 2))
        flat = arrays.pop("params")
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as e:
        raise UserError(f"{path} is not a whole checkpoint ({type(e).__name__}: {e})") from e
    for name, array in [("params", flat), *((n, arrays[n]) for n in ("m", "v") if n in arrays)]:
        if array.shape != (n_params(cfg),) or array.dtype != cfg.dtype:
            raise UserError(f"{path}: {name} is {array.dtype} {list(array.shape)}, its config "
                            f"needs {cfg.dtype} [{n_params(cfg)}]")
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} has values that are not finite")
    if 257 + len(tok.merges) > cfg.vocab_size:
        raise UserError(f"{path}: its tokenizer has more tokens than the model")
    return Model(views(xp.asarray(flat), cfg), cfg, tok), arrays


# ---- task scores and sampling -------------------------------------------------------------------

class TaskBatch(NamedTuple):
    """Prompts as arrays, right-padded: ids [n, T], last [n] (where the answer is read), right [n],
    wrong [n]."""
    ids: np.ndarray
    last: np.ndarray
    right: np.ndarray
    wrong: np.ndarray


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


def task_batch(tok, pairs, n_ctx):
    """Both prompts of every pair as a TaskBatch, one after the other. A pair that does not fit the
    context, or that no token of this tokenizer decides, is left out. Raises ValueError if that
    leaves none."""
    rows = []
    for pair in pairs:
        try:
            two = [deciding_tokens(tok, pair.prompts[i], pair.answers[i], pair.answers[1 - i])
                   for i in (0, 1)]
        except ValueError:
            continue
        if max(len(context) for context, _, _ in two) <= n_ctx:
            rows += two
    if not rows:
        raise ValueError(f"no prompt is of use with this tokenizer and a context of {n_ctx}")
    ids = np.full((len(rows), max(len(context) for context, _, _ in rows)), tok.EOT, np.int64)
    for row, (context, _, _) in zip(ids, rows):
        row[:len(context)] = context
    last = np.array([len(context) - 1 for context, _, _ in rows])
    return TaskBatch(ids, last, np.array([r for _, r, _ in rows]), np.array([w for *_, w in rows]))


class Score(NamedTuple):
    """binary: cross-entropy restricted to the right and the wrong token; full: over the
    vocabulary; both in nats, means over both prompts of every pair. accuracy: the share of prompts
    with the right logit over the wrong."""
    binary: float
    full: float
    accuracy: float


def score(logits, batch):  # [n, V] at the deciding position, host arrays
    """The Score of logits on a TaskBatch."""
    rows, logits = np.arange(len(logits)), logits.astype(np.float64)
    right, wrong = logits[rows, batch.right], logits[rows, batch.wrong]
    top = logits.max(1)
    full = top + np.log(np.exp(logits - top[:, None]).sum(1)) - right
    binary = np.logaddexp(0, wrong - right)
    return Score(float(binary.mean()), float(full.mean()), float((right > wrong).mean()))


def evaluate_tasks(model, n=100, seed=0, split="eval"):
    """{task: Score} of a Model on n prompt pairs of each of the twenty tasks (paper Table 1). A
    task of which `task_batch` can use no prompt is left out."""
    params, cfg, tok = model

    def one(task):
        try:
            batch = task_batch(tok, tasks.pairs(task, n, seed, split), cfg.n_ctx)
        except ValueError:
            return None
        logits = []
        for i in range(0, len(batch.ids), 32):  # few at a time: memory stays small
            rows = slice(i, i + 32)
            logits.append(to_host(forward(params, batch.ids[rows], cfg, at=batch.last[rows])[0]))
        return score(np.concatenate(logits), batch)

    scores = parallel(one, list(tasks.TASKS), cfg.threads)
    return {task: s for task, s in zip(tasks.TASKS, scores) if s is not None}


def sample(model, prompt="", n=200, temperature=0.8, seed=0):
    """The prompt continued by n tokens, or up to the end of the document. temperature 0 takes the
    likeliest. Every token runs the whole context again: short, and fast enough here."""
    params, cfg, tok = model
    rng, ids = np.random.default_rng(seed), [tok.EOT] + tok.encode(prompt)
    known = 257 + len(tok.merges)  # a small corpus may teach fewer than the model has room for
    for _ in range(n):
        context = np.array([ids[-cfg.n_ctx:]])
        logits, _ = forward(params, context, cfg, at=[context.shape[1] - 1])
        logits = to_host(logits)[0, :known].astype(np.float64)
        noise = rng.gumbel(size=known) * temperature  # makes the arg max a draw from the softmax
        ids.append(int(np.argmax(logits + noise)))
        if ids[-1] == tok.EOT:
            break
    return tok.decode(ids)


# ---- training -----------------------------------------------------------------------------------

def partial_path(out):
    """Where an unfinished run keeps its state: the finished checkpoint is replaced by a finished
    run only."""
    return Path(f"{out}.partial")


def is_checkpoint(path):
    """Whether a file is a checkpoint by its table of contents; it may be damaged."""
    try:
        with zipfile.ZipFile(path) as f:
            return "format.npy" in f.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def check_writable(path):
    """Raise UserError now, not after training, if a file cannot be put there, or if one is there
    that is not a checkpoint."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UserError(f"--out {path} is a folder; name a file in it")
        if path.exists() and not is_checkpoint(path):
            raise UserError(f"--out {path} is there and is no checkpoint; take another name")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as e:
        raise UserError(f"--out {path}: cannot write there: {e.strerror}") from e


def resume_state(cfg, digest):
    """(flat, m, v, step) of the unfinished run of cfg. Raises UserError if there is none or it
    does not fit."""
    path = partial_path(cfg.out)
    if not path.exists():
        raise UserError(f"no unfinished run at {path} to resume; start one without --resume")
    model, extra = load_all(path)
    if not {"m", "v", "step", "digest"} <= extra.keys() or extra["step"].ndim or not (
            extra["step"].dtype.kind == "i" and 0 <= extra["step"] <= cfg.steps):
        raise UserError(f"{path} is not the state of an unfinished run")
    same = dict(threads=0, out="")  # the two fields that a resumed run may change
    if dataclasses.replace(model.cfg, **same) != dataclasses.replace(cfg, **same):
        raise UserError(f"{path} is of a run with another config")
    if str(extra["digest"]) != digest:
        raise UserError(f"{path} was trained on other data; resume with the same --data, files "
                        "and Python")
    flat = xp.concatenate([model.params[name].reshape(-1) for name in shapes(cfg)])
    return flat, xp.asarray(extra["m"]), xp.asarray(extra["v"]), int(extra["step"])


def train(cfg, resume=False, log=print):
    """Train a model and save it to cfg.out; returns the Model. One step: gradient, its scaling,
    Adam, top-k, decay.

    Ctrl-C saves the state beside cfg.out and raises KeyboardInterrupt; resume=True goes on from
    there, or from the last automatic save, and ends with the same parameters, bit for bit, as a
    run that was never interrupted. Raises UserError on unusable data or output, and
    FloatingPointError if the loss stops being finite.
    """
    check_writable(cfg.out)
    corpus = load_corpus(cfg, log)
    if resume:
        flat, m, v, start = resume_state(cfg, corpus.digest)
        log(f"resuming at step {start} of {cfg.steps}")
    elif partial_path(cfg.out).exists():
        raise UserError(f"{partial_path(cfg.out)} holds an unfinished run; go on with it "
                        "(--resume) or delete it")
    else:
        flat, start = init_flat(cfg), 0
        m, v = xp.zeros_like(flat), xp.zeros_like(flat)
    params = views(flat, cfg)
    model = Model(params, cfg, corpus.tok)
    work = xp.empty((cfg.shards, len(flat)), flat.dtype)
    report_sizes(cfg, log)

    def check_and_save(path, done, **extra):
        if not bool(xp.isfinite(flat).all()):
            raise FloatingPointError(f"a weight is no longer finite after step {done}: most likely"
                                     f" --lr {cfg.lr:g} is too high; {path} is as it was")
        save(path, model, **extra)

    def save_state(done):
        check_and_save(partial_path(cfg.out), done, m=to_host(m), v=to_host(v), step=done,
                       digest=corpus.digest)

    stop = threading.Event()
    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread:  # finish the step, then save; a second Ctrl-C is not held back
        def on_interrupt(number, _):
            stop.set()
            signal.signal(number, former[number])
        former = {n: signal.signal(n, on_interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    every = max(1, cfg.steps // 40)
    began = saved = time.perf_counter()
    losses, last_line = [], began
    log(f"{'step':>6} {'loss':>7} {'val':>7} {'density':>8} {'lr':>8} {'tok/s':>8} {'left':>6}")
    try:
        for step in range(start, cfg.steps):
            rng = np.random.default_rng((cfg.seed, step))  # of the step alone: a run can resume
            ids, targets = draw_batch(corpus.train, rng, cfg.batch_size, cfg.n_ctx, cfg.idioms)
            current = dataclasses.replace(cfg, afrac=annealed(cfg.afrac, step, cfg))
            loss, _ = loss_and_grads(params, ids, targets, current, work)  # gradient, to work[0]
            adam_step(flat, m, v, work, step, cfg)                     # its scaling, Adam
            sparsify(params, step, cfg)                                # top-k, decay
            losses.append(loss)  # read only below: a GPU is not kept waiting
            done = step + 1
            if done == 1 and start == 0:
                log(f"{1:>6} {float(loss):7.4f}   first loss; ln(vocabulary) is "
                    f"{math.log(cfg.vocab_size):.4f}")
            if done % every == 0 or done == cfg.steps or stop.is_set():
                losses = [float(x) for x in losses]
                if not np.isfinite(losses).all():
                    bad = done - len(losses) + int(np.argmin(np.isfinite(losses)))
                    raise FloatingPointError(
                        f"the loss was {losses[bad - done]} at step {bad + 1}: most likely --lr "
                        f"{cfg.lr:g} is too high; nothing was saved since, {cfg.out} is as it was")
                if stop.is_set():
                    save_state(done)
                    raise KeyboardInterrupt(f"saved step {done} of {cfg.steps}; go on with: "
                                            "python sparsegpt.py --resume --out "
                                            f"{shlex.quote(cfg.out)}")
                now = time.perf_counter()
                rate = len(losses) * ids.size / (now - last_line)
                val = mean_loss(evaluate(params, corpus.val, current, 32), cfg)
                left = (cfg.steps - done) * (now - began) / (done - start)
                log(f"{done:>6} {np.mean(losses):7.4f} {val:7.4f} "
                    f"{annealed(cfg.density, step, cfg):8.4f} {learning_rate(step, cfg):8.2e} "
                    f"{rate:8,.0f} {clock(left):>6}")
                if time.perf_counter() - saved > 60 and done < cfg.steps:
                    save_state(done)
                    saved = time.perf_counter()
                losses, last_line = [], time.perf_counter()
    finally:
        if main_thread:
            for number, handler in former.items():
                signal.signal(number, handler)
    check_and_save(cfg.out, cfg.steps)
    partial_path(cfg.out).unlink(missing_ok=True)
    log(f"trained in {clock(time.perf_counter() - began)}; saved to {cfg.out}")
    return model


def mean_loss(by_stream, cfg):
    """The loss on the mixture that training draws: {"code": x, "idioms": y} weighted by the share
    of idioms."""
    share = cfg.idioms if "idioms" in by_stream else 0.0
    return (1 - share) * by_stream["code"] + share * by_stream.get("idioms", 0.0)


def clock(seconds):
    """Seconds as m:ss or h:mm:ss."""
    m, s = divmod(round(seconds), 60)
    return f"{m}:{s:02}" if m < 60 else f"{m // 60}:{m % 60:02}:{s:02}"


def report_sizes(cfg, log=print):
    """Print the parameter count, the L0 target and every matrix whose floor of j lifts it over its
    density."""
    sizes = {name: (shape, target_density(name, cfg)) for name, shape in shapes(cfg).items()}
    l0 = sum(kept(n, s, d, cfg) for n, (s, d) in sizes.items() if is_matrix(n))
    total = sum(math.prod(s) for n, (s, d) in sizes.items() if is_matrix(n))
    log(f"{n_params(cfg):,} parameters, {total:,} of them in matrices, of which {l0:,} stay "
        f"nonzero ({l0 / total:.2%}); {cfg.shards} shards")
    for name, (shape, density) in sizes.items():
        k, asked = kept(name, shape, density, cfg), round(density * math.prod(shape))
        if is_matrix(name) and k > max(1, asked):
            log(f"note: {name} keeps {k} weights, not {asked}: --min_per_neuron "
                f"{cfg.min_per_neuron} is a floor of density {k / math.prod(shape):.4f}")


def report(model, log=print):
    """Print what a trained model can do: validation losses, the twenty tasks, a sample and the L0
    per matrix."""
    cfg = model.cfg
    val = evaluate(model.params, load_corpus(cfg, log).val, cfg, 256)
    log("validation loss " + f"{mean_loss(val, cfg):.4f} nats a token ("
        + ", ".join(f"{name} {loss:.4f}" for name, loss in val.items()) + ")")
    log(f"\n{'task':<28} {'binary':>8} {'full':>8} {'right':>7}   100 pairs, unseen names")
    scores = evaluate_tasks(model)
    for name, s in scores.items():
        log(f"{name:<28} {s.binary:8.4f} {s.full:8.4f} {s.accuracy:7.1%}")
    if missing := [name for name in tasks.TASKS if name not in scores]:
        log("not scored, as no prompt is of use: " + ", ".join(missing))
    under = {level: sum(s.binary < level for s in scores.values()) for level in (0.05, 0.15)}
    log(f"binary loss under 0.05 on {under[0.05]}, under 0.15 on {under[0.15]} of "
        f"{len(tasks.TASKS)} tasks")
    log("\nsample after 'def':\n    " + sample(model, "def").replace("\n", "\n    "))
    log(f"\n{'matrix':<16} {'shape':>12} {'nonzero':>9} {'density':>8}")
    for name, w in model.params.items():
        if is_matrix(name):
            l0 = int((w != 0).sum())
            log(f"{name:<16} {' x '.join(map(str, w.shape)):>12} {l0:>9,} {l0 / w.size:8.4f}")


# ---- checks and timings -------------------------------------------------------------------------

def gradcheck(log=print):
    """Print each parameter's analytic and numeric derivative along a direction of random sizes, on
    the gradient's side, in float64, for a tiny model: AbsTopK, sinks, distances, bigram table and
    two query blocks. Returns the largest relative error."""
    cfg = Config(d_model=32, n_layer=2, d_head=8, n_ctx=80, vocab_size=300, batch_size=3,
                 afrac=0.25, dtype="float64", threads=1)
    rng, flat = np.random.default_rng(4), init_flat(cfg)  # with a seed at which no kept set changes
    flat += xp.asarray(0.3 * rng.standard_normal(len(flat)))  # gradients well above rounding
    ids = rng.integers(0, cfg.vocab_size, (3, cfg.n_ctx + 1))

    def run():
        return loss_and_grads(views(flat, cfg), ids[:, :-1], ids[:, 1:], cfg)

    _, grads = run()
    log(f"{'parameter':<16} {'shape':>12} {'analytic':>16} {'numeric':>16} {'relative':>9}")
    worst, h = 0.0, 2e-6  # small, so that no entry of an AbsTopK changes places on the way
    for name, w in views(flat, cfg).items():
        # Each entry moves to the gradient's side: else the terms may cancel and rounding be left.
        way = xp.asarray(abs(rng.standard_normal(w.shape))) * xp.where(grads[name] < 0, -1, 1)
        analytic, former, at = float((grads[name] * way).sum()), w.copy(), []
        for move in (h, -h, 2 * h, -2 * h):
            w[...] = former + move * way
            at.append(float(run()[0]))
        w[...] = former
        numeric = (8 * (at[0] - at[1]) - (at[2] - at[3])) / (12 * h)
        error = abs(analytic - numeric) / max(abs(analytic), abs(numeric), 1e-12)
        worst = float(np.maximum(worst, error))  # which stays NaN once it is
        log(f"{name:<16} {' x '.join(map(str, w.shape)):>12} {analytic:16.10f} {numeric:16.10f} "
            f"{error:9.1e}")
    log(f"largest relative error {worst:.1e}")
    return worst


def median_ms(fn, n=11, warmup=3, seconds=10):
    """The median milliseconds of n calls, after a warm-up; of fewer where these take long."""
    times, began = [], time.perf_counter()
    while len(times) < warmup + n and (len(times) < 4 or time.perf_counter() - began < seconds):
        t = time.perf_counter()
        fn()
        synchronize()
        times.append(time.perf_counter() - t)
    times = sorted(times[min(warmup, len(times) - 3):])
    return 1e3 * times[len(times) // 2]


def synchronize():
    """Wait until the device has done all it was given."""
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()


def products_alone(cfg):
    """A function that does only the dense matrix products of a step, sharded as in training, with
    every score of attention, also those that a step skips as no query sees them."""
    C, V, D, T = cfg.d_model, cfg.vocab_size, cfg.d_head, cfg.n_ctx
    b, rng = max(1, cfg.batch_size // cfg.shards), np.random.default_rng(0)

    def rand(*shape):
        return xp.asarray(rng.standard_normal(shape).astype(cfg.dtype))

    q, s = rand(b * C // D, T, D), rand(b * C // D, T, T)
    sizes = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)] * cfg.n_layer + [(C, V)]
    work = [(rand(b * T, i), rand(i, o), rand(b * T, o)) for i, o in sizes]

    def shard(_):
        for x, w, dy in work:
            xp.matmul(x, w, out=empty_like(dy))
            xp.matmul(dy, w.T, out=empty_like(x))
            xp.matmul(x.T, dy, out=empty_like(w))
        for _ in range(3 * cfg.n_layer):  # scores and mix, and the two gradients of each
            xp.matmul(q, q.swapaxes(1, 2), out=empty_like(s))
            xp.matmul(s, q, out=empty_like(q))

    return lambda: parallel(shard, range(cfg.shards), cfg.threads)


def measure(cfg):
    """{phase: median milliseconds} of a training step at the final density on random tokens, of
    the whole step and of its dense matrix products alone, and "MB", the most memory that this
    process has held (None where the system does not say), or that a GPU holds. "backward" is what
    a gradient takes over a forward pass: also the sum over the shards."""
    if xp is not np:
        xp.get_default_memory_pool().free_all_blocks()  # of the config before
    rng, flat = np.random.default_rng(0), init_flat(cfg)
    m, v, params = xp.zeros_like(flat), xp.zeros_like(flat), views(flat, cfg)
    work = xp.empty((cfg.shards, len(flat)), flat.dtype)
    ids = rng.integers(0, cfg.vocab_size, (cfg.batch_size, cfg.n_ctx + 1))
    shards, last, phases = np.array_split(ids, cfg.shards), cfg.steps - 1, defaultdict(list)

    def step():
        times = [time.perf_counter()]
        for phase in (lambda: loss_and_grads(params, ids[:, :-1], ids[:, 1:], cfg, work),
                      lambda: adam_step(flat, m, v, work, last, cfg),
                      lambda: sparsify(params, last, cfg)):
            phase()
            synchronize()
            times.append(time.perf_counter())
        for name, start, end in zip(("both", "optimizer", "top-k"), times, times[1:]):
            phases[name].append(1e3 * (end - start))

    out = {"step": median_ms(step)}
    out["forward"] = median_ms(lambda: parallel(
        lambda part: token_losses(params, part[:, :-1], part[:, 1:], cfg)[0], shards, cfg.threads))
    for name, times in phases.items():
        out[name] = sorted(times)[len(times) // 2]
    out["backward"] = out.pop("both") - out["forward"]
    out["MB"] = None
    if xp is not np:
        out["MB"] = xp.get_default_memory_pool().total_bytes() / 1e6
    elif resource:
        unit = 1 if sys.platform == "darwin" else 1024
        out["MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    out["products"] = median_ms(products_alone(cfg))
    return out


def measure_elsewhere(cfg):
    """What `measure` returns, from a process of its own, whose memory is that of this run alone."""
    if xp is not np:
        return measure(cfg)
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:  # Ctrl-C ends it
        return pool.apply(measure, (cfg,))


def bench(cfg, log=print):
    """Print how fast this machine trains: a config, and how its speed, memory and phases grow with
    width, threads, context and density, one of them changed at a time. "products" is the time of
    the step's dense matrix products alone by that of the step: see `products_alone`."""
    tokens, cores = cfg.batch_size * cfg.n_ctx, cfg.threads or n_cores()
    rows = [("as given", {})]
    rows += [(f"width {w}", dict(d_model=w)) for w in (64, 128, 256, 512, 1024)
             if w % cfg.d_head == 0]
    rows += [(f"threads {n}", dict(threads=n)) for n in sorted({1, 2, 4, cores}) if n <= cores]
    rows += [(f"context {t}", dict(n_ctx=t, batch_size=max(1, tokens // t)))
             for t in (64, 128, 256, 512)]
    rows += [(f"density {d:g}", dict(density=d)) for d in (1, 1 / 4, 1 / 16, 1 / 64)]
    log(f"{cfg.n_layer} layers, width {cfg.d_model}, heads of {cfg.d_head}, batch "
        f"{cfg.batch_size} x {cfg.n_ctx}, vocabulary {cfg.vocab_size}, density {cfg.density:g}, "
        f"AbsTopK {cfg.afrac:g}, {cores} threads; then one thing changed:")
    log(f"{'':<16}{'ms/step':>9} {'tokens/s':>9} {'MB':>6} {'forward':>8} {'backward':>8} "
        f"{'optimizer':>9} {'top-k':>6} {'products':>9}")
    for name, one in [(name, dataclasses.replace(cfg, **change)) for name, change in rows]:
        t = measure_elsewhere(one)
        shares = [t[phase] / t["step"] for phase in ("forward", "backward", "optimizer", "top-k")]
        log(f"{name:<16}{t['step']:9.1f} {1e3 * one.batch_size * one.n_ctx / t['step']:9,.0f} "
            + (f"{t['MB']:6.0f}" if t["MB"] else f"{'?':>6}")
            + "{:9.0%}{:9.0%}{:10.0%}{:7.0%}".format(*shares)
            + f"{t['products'] / t['step']:10.0%}")


# ---- command line -------------------------------------------------------------------------------

# A plain dense model, as the paper's are, that ends within 2 % of the sparse default's validation
# loss: 2.226 nats against 2.244.
DENSE = dict(d_model=64, density=1.0, afrac=1.0, lr=0.007, steps=7000, out="out/dense.npz")
QUICK = dict(n_layer=1, d_model=64, density=1 / 8, afrac=1.0, lr=0.016, steps=1000,
             max_mb=0.3, out="out/quick.npz")


def make_parser():
    """One flag for each Config field, in its groups, and the modes. Flags not given are absent."""
    parser = tasks.Parser(description="Train a weight-sparse transformer, in about 20 minutes.",
                          argument_default=argparse.SUPPRESS)
    presets = parser.add_argument_group("presets").add_mutually_exclusive_group()
    presets.add_argument("--dense", action="store_true", help="the dense twin")
    presets.add_argument("--quick", action="store_true", help="a tiny model, all done in seconds")
    modes = parser.add_argument_group("what to do (default: train)").add_mutually_exclusive_group()
    for name, text in [("resume", "go on with the interrupted run of --out"),
                       ("gradcheck", "check every gradient of a tiny model numerically"),
                       ("bench", "time a training step on this machine")]:
        modes.add_argument(f"--{name}", action="store_true", help=text)
    modes.add_argument("--sample", metavar="PROMPT", help="continue PROMPT with the model --out")
    groups = {f.metadata["group"]: None for f in dataclasses.fields(Config)}
    groups = {name: parser.add_argument_group(name) for name in groups}
    for f in dataclasses.fields(Config):
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        else:
            kind = dict(type=fraction if f.type is float else f.type,
                        metavar="|".join(f.metadata.get("choices", [f.type.__name__.upper()])))
        groups[f.metadata["group"]].add_argument(
            f"--{f.name}", help=f"{f.metadata['help']} (default {f.default})", **kind)
    return parser


def configure(given):
    """The Config of parsed flags: defaults, then the preset, then what was given. A resumed run
    keeps its own."""
    fields = {f.name for f in dataclasses.fields(Config)}
    values = {name: value for name, value in given.items() if name in fields}
    preset = DENSE if "dense" in given else QUICK if "quick" in given else {}
    if "resume" not in given:
        return Config(**{**preset, **values})
    path = partial_path(values.get("out", preset.get("out", Config.out)))
    if not path.exists():
        raise UserError(f"no unfinished run at {path} to resume; start one without --resume")
    cfg = load_all(path)[0].cfg
    for name, value in {**preset, **values}.items():
        if name not in ("threads", "out") and getattr(cfg, name) != value:
            raise UserError(f"--{name} {value} contradicts the run to resume, which has "
                            f"{getattr(cfg, name)}; leave it out, or start a new run")
    return dataclasses.replace(cfg, **{n: values[n] for n in ("threads", "out") if n in values})


def run(argv):
    """What `main` does, if nothing goes wrong."""
    given = vars(make_parser().parse_args(argv))
    device = use_device(os.environ.get("SPARSEGPT_DEVICE", "cpu"))
    cfg = configure(given)
    if "gradcheck" in given:
        return int(not gradcheck() <= 1e-6)
    if "sample" in given:
        print(sample(load(cfg.out), given["sample"], seed=cfg.seed))
        return 0
    print(device)
    if "bench" in given:
        bench(cfg)
        return 0
    resolved = dict(dataclasses.asdict(cfg), embed_density=target_density("wte", cfg),
                    threads=cfg.threads or n_cores())
    print("config: " + " ".join(f"{name}={value}" for name, value in resolved.items()))
    model = train(cfg, "resume" in given)
    report(model)
    print(f"\nnext: python sparsegpt.py --sample 'def f(' --out {shlex.quote(cfg.out)}")
    return 0


def main(argv=None):
    """The command line. Returns the exit status: 0, 1 for a check that failed, 2 for a mistake,
    130 for Ctrl-C."""
    return tasks.command("sparsegpt.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
