"""What a whole checkpoint consists of: manifest.json lists each file with its size and sha256, and its own sha256.

A folder is compared with it in two steps: `structure` looks at names and sizes only, `damage` reads the files.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from celo2_pretrain.common.durable import sha256, sync

NAME = "manifest.json"
FORMAT = "celo2-checkpoint-1"


class Damaged(Exception):
    """A checkpoint isn't what its manifest lists: which file, and how."""


class Hashing:
    """A binary file that hashes what is written to it, in order.

    An error is kept for `write_file`: torch.save would hide it behind one of its own.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.sha256, self.size, self.error = file, hashlib.sha256(), 0, None

    def write(self, data) -> int:
        count = memoryview(data).nbytes
        try:
            if self.error is None:
                self.file.write(data)
        except OSError as error:
            self.error = error
        self.sha256.update(data)
        self.size += count
        return count

    def flush(self) -> None:
        pass


def write_file(path: Path, write: Callable[[Hashing], None]) -> dict[str, Any]:
    """Have `write` fill a new file, and bring it to the disk; returns its entry of the manifest.

    Raises OSError where the disk is full or may not be written.
    """
    with open(path, "xb") as file:
        hashing = Hashing(file)
        write(hashing)
        if hashing.error:
            raise hashing.error
        file.flush()
        os.fsync(file.fileno())
    return {"size": hashing.size, "sha256": hashing.sha256.hexdigest()}


def as_text(content: dict[str, Any]) -> str:
    """The manifest's text, with its own sha256."""
    return json.dumps(content | {"sha256": own_digest(content)}, indent=1) + "\n"


def own_digest(content: dict[str, Any]) -> str:
    """The sha256 of all of the manifest but itself."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def listing(folder: Path) -> set[str]:
    """The names of all files below `folder`, with / between folders. Raises Damaged for anything that is no plain file."""
    names = set()
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink():
                raise Damaged(f"{relative} is a symbolic link, which a checkpoint has none of")
            if name in files:
                if not path.is_file():
                    raise Damaged(f"{relative} is no plain file")
                names.add(relative)
    return names


def write(folder: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
    """Make `folder` whole. Raises Damaged when `files` aren't the files that lie there."""
    found = listing(folder)
    if found != files.keys():
        raise Damaged(
            f"{sorted(found ^ files.keys())[0]} was written by no rank, or is not there: the ranks need a file "
            f"system that they share"
        )
    content = {"format": FORMAT, "step": step, "files": dict(sorted(files.items()))}
    write_file(folder / NAME, lambda file: file.write(as_text(content).encode()))
    for parent, _, _ in os.walk(folder):
        sync(Path(parent))


def read(folder: Path) -> dict[str, Any]:
    """The manifest. Raises Damaged when it is missing, changed, or lists what lies outside the folder."""
    path = folder / NAME
    if path.is_symlink() or not path.is_file():
        raise Damaged(f"{NAME} is missing")
    try:
        text = path.read_bytes()
        content = json.loads(text)
        intact = content["sha256"] == own_digest(content) and text == as_text(content).encode()
        known = content["format"] == FORMAT
        for name, entry in content["files"].items():
            parts = name.split("/")
            if {"", ".", ".."} & set(parts) or "\\" in name or "\0" in name:  # "" begins an absolute path
                raise Damaged(f"{NAME} lists {name!r}, which is no path inside the checkpoint")
            known = known and type(entry["size"]) is int and re.fullmatch("[0-9a-f]{64}", entry["sha256"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # no UTF-8, no JSON, or of another form
        raise Damaged(f"{NAME} is damaged") from None
    if not intact:
        raise Damaged(f"{NAME} is damaged (its sha256 is another)")
    if not known:
        raise Damaged(f"{NAME} is not of the format {FORMAT!r}")
    return content


def structure(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that has the right files of the right sizes. Raises Damaged naming one that isn't."""
    content = read(folder)
    files, found = content["files"], listing(folder) - {NAME}
    if missing := sorted(files.keys() - found):
        raise Damaged(f"{missing[0]} is missing" + (f", and {len(missing) - 1} more" if len(missing) > 1 else ""))
    if extra := sorted(found - files.keys()):
        raise Damaged(f"{extra[0]} is not a file of this checkpoint")
    for name, entry in files.items():
        size = (folder / name).stat().st_size
        if size != entry["size"]:
            raise Damaged(f"{name} has {size} bytes instead of {entry['size']}{of_a_sibling(folder, name)}")
    return content


def damage(folder: Path, content: dict[str, Any], part: int = 0, parts: int = 1) -> str | None:
    """What is wrong in the contents of every `parts`-th file; None when they are as listed."""
    for name in sorted(content["files"])[part::parts]:
        if sha256(folder / name) != content["files"][name]["sha256"]:
            return f"{name} is damaged (its sha256 is another){of_a_sibling(folder, name)}"
    return None


def of_a_sibling(folder: Path, name: str) -> str:
    """A hint when the file is one of another checkpoint beside this one."""
    digest = sha256(folder / name)
    for other in sorted(folder.parent.glob("step_*")):
        try:
            if other != folder and read(other)["files"].get(name, {}).get("sha256") == digest:
                return f": it is the one of {other.name}"
        except Damaged:
            continue
    return ""
