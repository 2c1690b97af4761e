"""What the fuzz tests share: how files and trees are spoiled, and what must hold for whoever reads them.

The cases are drawn by hypothesis from a fixed seed: a run of the tests is the same everywhere. `FUZZ_TIMES=5 python -m pytest
tests -k fuzz` looks at five times as many, at random, and with the constants of our sources among them.
"""

import contextlib
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers

from celo2_pretrain.common.errors import LONGEST, UserError

CPU_SECONDS = 30  # of this process's own time for one case: what others do on the machine doesn't count
SECONDS = 600  # for a case that waits without computing
MEMORY = 1 << 30  # bytes by which all cases of a test may raise the process's peak
TIMES = int(os.environ.get("FUZZ_TIMES", 0))
EVERYTHING = False  # set by conftest.py
BY_DEFAULT = 5  # one case in so many
if not TIMES:  # hypothesis also draws constants of the modules imported so far: any edit would change the cases
    providers._get_local_constants = lambda: providers.Constants()


def cases(count: int) -> settings:
    """Decorator: that many generated cases with `--everything`, else a fifth of them; with FUZZ_TIMES, that many times as
    many, which are others each time."""
    return settings(
        max_examples=count * TIMES or count if EVERYTHING else max(count // BY_DEFAULT, 1),
        derandomize=not TIMES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


class Hangs(BaseException):
    """Not an Exception, so that nobody's `except Exception` takes it for bad input."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raise Hangs in the code below when it takes too long, and fail when it takes too much memory."""

    def stop(number, frame):
        raise Hangs(f"took more than {CPU_SECONDS} s of computing or {SECONDS} s of waiting")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGVTALRM, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MEMORY, f"took {grown / 1e9:.1f} GB of memory"


def works_or_refuses(call: Callable, *errors: type[Exception]):
    """What `call` returns, or None where it raises UserError (or one of `errors`) with a message of one line.

    Anything else that it raises fails the test, and so does taking too long or too much memory.
    """
    with limited():
        try:
            return call()
        except (UserError, *errors) as error:
            message = str(error)
    assert message.strip() and len(message.splitlines()) == 1, f"not a line: {message[:500]!r}"
    assert len(message) <= LONGEST, f"{len(message)} characters: {message[:200]!r} …"
    message.encode()  # it can be printed
    return None


def snapshot(folder: Path, leave_out: tuple[str, ...] = ()) -> dict[str, tuple]:
    """What lies below `folder`, by path: kind, size and time of the last change."""
    found = {}
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = os.path.join(parent, name)
            relative = os.path.relpath(path, folder)
            if relative.split(os.sep)[0] not in leave_out:
                state = os.lstat(path)
                found[relative] = state.st_mode, state.st_size if name in names else 0, state.st_mtime_ns
    return found


# --- spoiled bytes ----------------------------------------------------------------------------------------------------


@st.composite
def spoilers(draw) -> Callable[[bytes], bytes]:
    """A function that spoils bytes in one place, which it finds by a fraction of their length."""
    kind = draw(st.sampled_from(["cut", "flip", "overwrite", "insert", "drop", "repeat", "zero", "swap", "number"]))
    where = draw(st.floats(0, 1, exclude_max=True))
    head = draw(st.booleans())  # headers are short and matter most
    length = draw(st.integers(1, 64))
    noise = draw(st.binary(min_size=1, max_size=16))

    def spoil(data: bytes) -> bytes:
        at = int(where * (min(len(data), 512) if head else len(data)))
        end = at + length
        if kind == "cut":
            return data[:at]
        if kind == "flip" and data:
            return data[:at] + bytes([data[at] ^ (1 << (length % 8))]) + data[at + 1 :]
        if kind == "overwrite":
            return data[:at] + noise + data[at + len(noise) :]
        if kind == "insert":
            return data[:at] + noise + data[at:]
        if kind == "drop":
            return data[:at] + data[end:]
        if kind == "repeat":
            return data[:end] + data[at:]
        if kind == "zero":
            return data[:at] + bytes(len(data[at:end])) + data[end:]
        if kind == "swap":
            return data[at:] + data[:at]
        return data[:at] + b"\xff\xff\xff\x7f" + data[at + 4 :]

    return spoil


# --- spoiled trees ----------------------------------------------------------------------------------------------------

PATHS = ["../x", "../../x", "/etc/passwd", "/tmp", ".", "..", "", "a/b", "~", "con\0", "x" * 300, "outside", "-rf", "a\nb"]
ODD_TEXT = [
    "",
    " ",
    "nan",
    "null",
    "uint16",
    "float64",
    "object",
    "O",
    "V8",
    "U5",
    "i4,i4",
    "0",
    "-1",
    "1e9",
    "é",
    "\u202e",
    "\ud800",
    "😀" * 50,
    "{}",
    "[]",
]
numbers = st.one_of(
    st.integers(-3, 3), st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([10**30, -(10**30), 10**400, 2**31, 2**63])
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20), st.sampled_from(ODD_TEXT), st.sampled_from(PATHS)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(tree, at: tuple = ()) -> list[tuple]:
    """The paths to everything in a tree of dicts and lists, the whole included."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [at] + [place for key, value in inside for place in places(value, (*at, key))]


def put(tree, place: tuple, change: Callable):
    """A copy of `tree` with `change(container, key)` made at `place`."""
    if not place:
        holder = {"whole": tree}
        change(holder, "whole")
        return holder.get("whole")
    copy = json.loads(json.dumps(tree))
    holder = copy
    for key in place[:-1]:
        holder = holder[key]
    change(holder, place[-1])
    return copy


@st.composite
def spoiled_trees(draw, tree) -> object:
    """`tree` with one or two of its parts replaced, left out, moved to another name, or doubled."""
    for _ in range(draw(st.integers(1, 2))):
        found = places(tree)
        place = found[draw(st.integers(0, len(found) - 1))]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "delete", "rename", "copy"]))
        value, name = draw(values), draw(st.text(max_size=5))
        other = found[draw(st.integers(0, len(found) - 1))]

        def change(holder, key):
            if kind == "delete":
                del holder[key]
            elif kind == "rename" and isinstance(holder, dict):
                holder[name] = holder.pop(key)
            elif kind == "copy":
                source = tree
                for step in other:
                    source = source[step]
                holder[key] = json.loads(json.dumps(source))
            else:
                holder[key] = value

        tree = put(tree, place, change)
    return tree
