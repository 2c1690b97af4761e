"""JSON files as this program wrote them, or a line that says which one is damaged."""

import json
from pathlib import Path

from celo2_pretrain.common.errors import UserError, one_line


def parse_json(text: str | bytes):
    """As json.loads, but whatever is wrong is a ValueError: UTF-8, syntax, nesting, numbers of thousands of digits."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path, advice: str) -> dict:
    """The object in the file `path`; `advice` ends the message of the UserError where there is none."""
    try:
        tree = parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): {advice}") from None
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): {advice}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is damaged (it holds no object): {advice}")
    return tree


def look_up(tree, *path: str, kind: type = dict, least: int | None = None):
    """`tree[path[0]][path[1]]…`, of that kind. Raises ValueError that names the place, where it is absent or of another
    kind, or a number below `least`."""
    name = ".".join(path)
    for key in path:
        if not isinstance(tree, dict) or key not in tree:
            raise ValueError(f"it has no {name}")
        tree = tree[key]
    if not isinstance(tree, kind) or (kind is int and isinstance(tree, bool)):
        raise ValueError(f"{name} is a {type(tree).__name__}, not a {kind.__name__}")
    if least is not None and tree < least:
        raise ValueError(f"{name} is below {least}")
    return tree
