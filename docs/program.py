"""What all programs here share: whole files, locks, signals, output, flags."""
import argparse
import difflib
import os
import re
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Something the user can put right: a command prints it as one line and ends with status 2."""


# ---- files and locks ----------------------------------------------------------------------------

def temporary(path):
    """The name that a file has until it is whole. No other thread or process uses the same."""
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}.unfinished")


def write_whole(path, write):
    """Make a file by write(f), f open for bytes: whole or not at all, as it goes to a temporary
    file first, which is then renamed. Raises UserError if that cannot be done."""
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path  # the link stays
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary(path), "wb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary(path), path)
        finally:
            temporary(path).unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from e


def save_or_aside(save, path, *args):
    """save(path, *args), if need be in a new folder for temporary files. Raises UserError that
    says where, or that both failed."""
    try:
        save(path, *args)
    except UserError as e:
        aside = Path(tempfile.mkdtemp(prefix="sparsegpt-"), path.name)
        try:
            save(aside, *args)
        except UserError as second:
            aside.parent.rmdir()
            raise UserError(f"{e}; {second}") from e
        raise UserError(f"{e}; it was saved to {aside}: make room, and move it to {path}") from e


def read_bytes(path):
    """The content of a file. Raises ValueError on a device or a pipe, which may never end."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError("it is not a file")
    return path.read_bytes()


def write_text(path, text):
    """Write a text file, whole or not at all."""
    write_whole(path, lambda f: f.write(text.encode("utf-8", "surrogatepass")))


# What the files of this program have near their beginning.
MARKS = {".json": b'"format": "sparsegpt-circuit', ".html": b"<style>\n:root { --bg",
         ".dot": b"digraph{rankdir=LR"}


def check_output(path):
    """Raise UserError now, not after the work, if a file of this name cannot be written."""
    path = str(path)
    if os.path.basename(path) in ("", ".", "..") or (
            os.path.exists(path) and not os.path.isfile(path)):
        raise UserError(f"{path!r} is not the name of a file; choose another --out")
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary(Path(path)), "wb"):
            pass
        temporary(Path(path)).unlink()
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from e


def refuse_others(path, *suffixes):
    """Raise UserError if a file of these suffixes cannot be written, or is there and is not one of
    this program's."""
    for path in map(path.with_suffix, suffixes):
        check_output(path)
        if path.exists() and MARKS[path.suffix] not in read_bytes(path)[:999]:
            raise UserError(f"{path} exists, and this program did not write it; choose another "
                            "--out")


def lock_of(path):
    """The lock file of a file, or of all files of a folder."""
    return path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")


@contextmanager
def locked(path):
    """Keep other processes from writing a file, or the files of a folder, and clear away what dead
    ones left unfinished. Raises UserError if a living process holds the lock; a dead one's is
    free. Where the system has no such locks nothing is done."""
    lock = lock_of(Path(path))
    name = re.escape(lock.name[:-5]) + r"(\.partial)?" if lock.name != ".lock" else (
        r"\.\w+\.(json|html|dot)")  # not what training writes to that folder
    try:
        import fcntl  # not on Windows
        while True:
            f = os.fdopen(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                f.seek(0)
                raise UserError(f"process {f.read(20)} writes to {path} and holds {lock}: wait for"
                                " its end, or choose another --out") from e
            if os.fstat(f.fileno()).st_nlink:  # else its former owner has just removed it
                break
        f.truncate(0)
        print(os.getpid(), end="", file=f, flush=True)
    except (ImportError, OSError):
        yield
        return

    def clear():
        for left in lock.parent.glob(".*.unfinished"):
            if re.fullmatch(name + r"\.\d+-\d+\.unfinished", left.name):
                left.unlink(missing_ok=True)

    try:
        clear()
        yield
    finally:
        clear()  # after workers that were stopped
        lock.unlink(missing_ok=True)
        f.close()


# ---- signals ------------------------------------------------------------------------------------

ending = []  # not empty once a signal has come: a second one would only disturb the clearing up


@contextmanager
def signals_to(handler, then=None):
    """Give Ctrl-C, SIGTERM and SIGHUP to a handler, except those that are ignored, as by nohup;
    afterwards to another one, or as before. Only the main thread is told of signals: elsewhere
    nothing changes."""
    former = {}
    if threading.current_thread() is threading.main_thread():
        for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            if signal.getsignal(number) != signal.SIG_IGN:
                former[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler if then is None else then)


@contextmanager
def signals_blocked():
    """Hold Ctrl-C and SIGHUP back for a while, and for good from processes that begin then."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


@contextmanager
def interrupts_noted():
    """A list that signals are added to, in place of their usual effect, so that a step or a file
    can be finished. (The lock of a threading.Event could be held when the second one comes.)"""
    noted = []
    with signals_to(lambda number, _: (noted.append(number), ending.append(number))):
        yield noted


def end_quietly(name):
    """Let Ctrl-C end a program without a traceback while its modules load. name: its __name__."""
    if name == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


# ---- output, flags and the end ------------------------------------------------------------------

def printable(text, keep=""):
    """text with control characters written out: a terminal would obey them."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


class Output:
    """A stream whose lines are written at once, with control characters written out. A reader that
    goes away, such as `head`, or a full disk ends the output and not the work."""

    def __init__(self, stream, keep="\n\t"):
        self.stream, self.keep, self.error = stream, keep, None
        if hasattr(stream, "reconfigure"):  # a console may lack some letters
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, printable(text, self.keep))
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, act, *args):
        try:
            act(*args)
        except OSError as e:
            self.error = self.error or e
            # Else Python would fail to write the rest at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def fraction(text):
    """A float from "0.25" or "1/4". Raises ValueError on anything else."""
    top, _, bottom = text.partition("/")
    if bottom and float(bottom) == 0:
        raise ValueError(f"{text} divides by zero")
    return float(top) / float(bottom or 1)


def node_and_value(text):
    """(name, value) of a node to set, from "h0.neuron.504=4.4"."""
    name, _, value = text.partition("=")
    try:
        if abs(float(value)) <= 1e9:  # NaN is not; larger numbers overflow
            return name, float(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text[:60]!r} is not NODE=VALUE, with a value from -1e9 to "
                                     "1e9")


def clock(seconds):
    """Seconds as m:ss or h:mm:ss."""
    m, s = divmod(round(seconds), 60)
    return f"{m}:{s:02}" if m < 60 else f"{m // 60}:{m % 60:02}:{s:02}"


class Progress:
    """One line on stderr that rewrites itself; silent without a name, and where stderr is not a
    terminal."""

    def __init__(self, name=""):
        self.name, self.stage = name, None
        self.began = self.last = time.perf_counter()
        self.shown = bool(name) and sys.stderr.isatty()

    def __call__(self, stage, done, total, note=""):
        """Say that `done` of `total` of a stage are done."""
        now = time.perf_counter()
        if stage != self.stage:
            self.stage, self.began = stage, now
        elif self.shown and now - self.last > 1 and done:
            self.last = now
            left = clock((now - self.began) * (total - done) / done)
            print(f"\r\033[K{self.name}: {stage}, {done} of {total}, {note}{left} left\r", end="",
                  file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """argparse with one line on stderr for a mistake, and the nearest flag."""

    def __init__(self, **more):
        super().__init__(allow_abbrev=False, **more)

    def parse_args(self, argv=None):
        for word in sys.argv[1:] if argv is None else argv:
            if re.fullmatch(r"--\w+=--", word):  # of which argparse makes an empty list
                self.error(f"{word}: -- is not a value")
        return super().parse_args(argv)

    def error(self, message):
        if "unrecognized" in message:
            for word in re.findall(r"--\w+", message):
                near = difflib.get_close_matches(word, self._option_string_actions, 1)
                message += f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"{message}; see --help")


def command(name: str, run: Callable, argv: Sequence[str] | None, kept: str = "") -> int:
    """The exit status of run(argv), of a program `name`: a mistake is one line on stderr and
    status 2, Ctrl-C, SIGTERM and SIGHUP are 130. kept: what is said after these."""
    def complain(message):
        if sys.stderr:
            print(f"{name}: {printable(' '.join(message.splitlines())[:2000])}", file=sys.stderr)

    def interrupt(number, _):
        if not ending:
            ending.append(number)
            raise KeyboardInterrupt

    ending.clear()
    former, status = (sys.stdout, sys.stderr), 2
    sys.stdout = former[0] and Output(former[0])
    sys.stderr = former[1] and Output(former[1], "\n\t\r\033")  # with a line that rewrites itself
    try:
        # A program has nothing to interrupt at its end; a caller of main(argv) goes on.
        with signals_to(interrupt, signal.SIG_IGN if argv is None else None), \
                warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # NaN is looked for where it matters
            try:
                status = run(argv)
            except SystemExit as e:  # after --help
                status = e.code
            except MemoryError:
                complain("error: not enough memory; take a smaller model or batch")
            except (UserError, FloatingPointError, OSError) as e:
                complain(f"error: {e}")
            error = sys.stdout and sys.stdout.error
            if status == 0 and error and not isinstance(error, BrokenPipeError):
                complain(f"error: cannot write the output: {error.strerror}")
                status = 2
    except KeyboardInterrupt as e:  # from anywhere above
        complain("; ".join(["interrupted", *map(str, e.args), *filter(None, [kept])]))
        status = 130
    finally:
        sys.stdout, sys.stderr = former
    return status
