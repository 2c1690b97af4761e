"""The files of an optimizer state that any world can read: ranges of named tensors, and one index over them.

    index.json                      format version, every tensor's name, full shape and matrix view, param groups,
                                    and for each file its sha256 and which flat range of which tensors it holds
    rank_00003_000.safetensors      "<name>|<key>": 1-D float32, the elements [start, stop) of the flattened tensor
    shared.safetensors              what is the same on all ranks: theta, "<name>|v_row", "<name>|v_col", "<name>|step"

A folder under its final name is whole: it is written as `<folder>.incomplete` and renamed at the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from math import prod
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...common.durable import sha256, sync
from ..matrices.views import MatrixView
from ..names import match
from .index import check_index, check_options, view_entry

FORMAT, VERSION = "celo2-optimizer-state", 1
INDEX, SHARED = "index.json", "shared.safetensors"
FILE_BYTES = 1 << 28  # what a rank gathers in memory before it writes it out


class StateError(RuntimeError):
    """A saved optimizer state is incomplete, damaged, or of another model."""


def tensor_entry(shape: Iterable[int], rule: str, view: MatrixView) -> dict[str, Any]:
    """What the index says of a tensor."""
    vector = rule == "celo2" and len(view.blocks(tuple(shape))[0].shape) < 2
    return {"shape": list(shape), "rule": rule, "vector": vector, "view": view_entry(view)}


def building(folder: Path) -> Path:
    """Where `folder` is written until it is whole."""
    return folder.with_name(folder.name + ".incomplete")


def begin(folder: Path) -> None:
    """Make the folder to write into. Raises StateError where `folder` exists."""
    if folder.exists():
        raise StateError(f"{str(folder)!r} already exists and is not overwritten: choose another folder or remove it")
    unfinished = building(folder)
    for path in unfinished.glob("*") if unfinished.is_dir() else ():
        path.unlink()  # left by a run that was killed while it saved
    unfinished.mkdir(parents=True, exist_ok=True)


def write_ranges(
    folder: Path,
    prefix: str,
    ranges: Iterable[tuple[str, int, int]],
    fetch: Callable[[str, int, int], dict[str, Tensor]],
    most: int = FILE_BYTES,
) -> dict[str, Any]:
    """Write flat ranges of tensors, about `most` bytes a file.

    Args:
        ranges: (name, start, stop) in flat elements of the whole tensor.
        fetch: gives for such a range its keys' values: 1-D float32 tensors of stop − start elements, not shared.
    Returns the files' entries of the index: `{file name: {"sha256": …, "ranges": {name: [start, stop]}}}`.
    """
    files: dict[str, Any] = {}
    written: dict[str, list[int]] = {}
    tensors: dict[str, Tensor] = {}

    def flush() -> None:
        if written:
            path = folder / f"{prefix}_{len(files):03d}.safetensors"
            files[path.name] = {"sha256": write_tensors(path, tensors), "ranges": dict(written)}
            written.clear()
            tensors.clear()

    used, step = 0, max(1, most // 32)  # up to 8 keys of 4 bytes an element
    for name, first, last in ranges:
        for start in range(first, last, step):
            stop = min(start + step, last)
            values = {f"{name}|{key}": value for key, value in fetch(name, start, stop).items()}
            size = sum(value.nbytes for value in values.values())
            if name in written or used + size > most:
                flush()
                used = 0
            written[name] = [start, stop]
            tensors.update(values)
            used += size
    flush()
    return files


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write one safetensors file through to the disk; returns its sha256."""
    save_file(tensors, path)
    sync(path)
    return sha256(path)


def finish(folder: Path, index: dict[str, Any]) -> None:
    """Write the index and give the folder its name: from then on it counts as whole."""
    unfinished = building(folder)
    text = json.dumps({"format": FORMAT, "version": VERSION, **index})
    (unfinished / INDEX).write_text(text, encoding="utf-8")
    sync(unfinished / INDEX)
    sync(unfinished)
    os.rename(unfinished, folder)
    sync(folder.parent)


def abandon(folder: Path) -> None:
    """Remove what was written of a folder that can't be finished."""
    unfinished = building(folder)
    if unfinished.is_dir():
        for path in unfinished.glob("*"):
            path.unlink(missing_ok=True)
        unfinished.rmdir()


class StateReader:
    """Read any range of any tensor of a saved state.

    Raises StateError for a folder that is no complete state of this format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if building(self.folder).is_dir() and not self.folder.exists():
            raise StateError(
                f"{str(folder)!r} was not finished (only {building(self.folder).name!r} exists): "
                "its save was interrupted; use an earlier checkpoint"
            )
        if not (self.folder / INDEX).is_file():
            raise StateError(
                f"no optimizer state at {str(folder)!r}: it has no {INDEX}; give the folder that save_state wrote"
            )
        try:
            index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        except (ValueError, RecursionError, OSError) as error:
            raise StateError(f"{self.folder / INDEX} is damaged ({error}); use another checkpoint") from None
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise StateError(f"{self.folder / INDEX} is not of the format {FORMAT!r}; give the folder that save_state wrote")
        if index.get("version") != VERSION:
            raise StateError(
                f"{str(folder)!r} has format version {short(index.get('version'))}, this program reads version "
                f"{VERSION}: load it with the version of Celo2-Pretrain that wrote it"
            )
        try:
            check_index(index)
        except ValueError as error:
            raise StateError(f"{self.folder / INDEX} is damaged ({error}); use another checkpoint") from None
        self.tensors: dict[str, dict[str, Any]] = index["tensors"]
        self.groups: list[dict[str, Any]] = index["groups"]
        self.files: dict[str, dict[str, Any]] = index["files"]
        self.extra: Any = index["extra"]
        self.loss_scale: dict[str, Any] | None = index.get("loss_scale")  # of an fp16 run with a dynamic one
        missing = [name for name in self.files if not (self.folder / name).is_file()]
        if missing:
            raise StateError(
                f"{str(folder)!r} lacks {missing[0]!r} ({len(missing)} of {len(self.files)} files are "
                "missing): copy the folder again, or use another checkpoint"
            )
        self._ranges: dict[str, list[tuple[int, int, str]]] = {name: [] for name in self.tensors}
        for file, entry in self.files.items():
            for name, (start, stop) in entry["ranges"].items():
                self._ranges[name].append((start, stop, file))
        for name, ranges in self._ranges.items():
            ranges.sort()
            ends = [0, *(stop for _, stop, _ in ranges)]
            if [start for start, _, _ in ranges] != ends[:-1] or ends[-1] != prod(self.tensors[name]["shape"]):
                raise StateError(
                    f"{str(folder)!r} does not hold {short(name)} exactly once: its files have the flat ranges "
                    f"{short([list(x[:2]) for x in ranges])} of {prod(self.tensors[name]['shape'])} elements"
                )
        self._saved_names: dict[str, str] = {}  # by the names that `rename` gave
        self._open = lru_cache(maxsize=8)(lambda file: safe_open(self.folder / file, framework="pt"))

    def rename(self, names: Iterable[str]) -> None:
        """Call the tensors by these names where both mean the same tensor of a model, whatever wrapped it."""
        new = match(self.tensors, names)
        self._saved_names = {name: saved for saved, name in new.items()}
        self.tensors = {new.get(name, name): entry for name, entry in self.tensors.items()}
        self._ranges = {new.get(name, name): ranges for name, ranges in self._ranges.items()}
        self.groups = [{**group, "names": [new.get(name, name) for name in group["names"]]} for group in self.groups]

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compare the checksums of every `parts`-th file. Raises StateError naming a damaged file."""
        for file in sorted(self.files)[part::parts]:
            if sha256(self.folder / file) != self.files[file]["sha256"]:
                raise StateError(
                    f"{self.folder / file} is damaged (its sha256 is not the index's): copy it again, or "
                    "use another checkpoint"
                )

    def check_options(self, now: dict[str, dict[str, Any]]) -> None:
        """Raises StateError for saved options that the optimizer's groups, `now` by parameter name, can't take."""
        try:
            check_options(self.groups, now)
        except ValueError as error:
            raise StateError(f"{self.folder / INDEX} is damaged ({error}); use another checkpoint") from None

    def require(self, keys: Iterable[str]) -> None:
        """Raises StateError where one of `keys` is not among what is the same on all ranks."""
        try:
            there = set(self._open(SHARED).keys()) if SHARED in self.files else set()
        except (SafetensorError, OSError) as error:
            raise StateError(f"{self.folder / SHARED} is damaged ({error}); use another checkpoint") from None
        if missing := [key for key in keys if self._key(key) not in there]:
            raise StateError(f"{str(self.folder)!r} has no {missing[0]!r} ({len(missing)} such): use another checkpoint")

    def read(self, name: str, key: str, start: int, stop: int) -> Tensor:
        """The flat elements [start, stop) of one tensor's `key`, 1-D float32, read from whichever files hold them."""
        found = []
        for first, last, file in self._ranges[name]:
            low, high = max(first, start), min(last, stop)
            if low < high:
                found.append(self._get(file, self._key(f"{name}|{key}"), slice(low - first, high - first)))
        return torch.cat(found) if found else torch.empty(0)

    def whole(self, name: str, key: str) -> Tensor:
        """One tensor's `key` in its full shape."""
        return self.read(name, key, 0, prod(self.tensors[name]["shape"])).view(self.tensors[name]["shape"])

    def shared(self, key: str) -> Tensor | None:
        """A tensor that is the same on all ranks, None where the state has none of this key."""
        key = self._key(key)
        if SHARED not in self.files or key not in self._open(SHARED).keys():
            return None
        return self._get(SHARED, key, slice(None))

    def theta(self) -> dict[str, Tensor] | None:
        """The weights of the learned rule; None in the state of an AdamW run."""
        names = [key for key in self._open(SHARED).keys() if key.startswith("theta|")] if SHARED in self.files else []
        return {key.split("|")[1]: self._get(SHARED, key, slice(None)) for key in names} or None

    def _key(self, key: str) -> str:
        """The key in the files: "<name>|<key>" with the name that was saved."""
        name, _, rest = key.rpartition("|")
        return f"{self._saved_names.get(name, name)}|{rest}"

    def _get(self, file: str, key: str, part: slice) -> Tensor:
        try:
            if part == slice(None):
                return self._open(file).get_tensor(key)
            return self._open(file).get_slice(key)[part]
        except (SafetensorError, OSError) as error:
            raise StateError(f"{self.folder / file}: can't read {key!r} ({error}); use another checkpoint") from None
