"""Settings: dataclasses whose fields are documented keys, read from YAML and from `key=value` arguments.

Unknown keys, wrong types and impossible values raise UserError naming the key, the value and what to do.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from celo2_pretrain.common.bundled import config_file
from celo2_pretrain.common.errors import UserError, shown
from celo2_pretrain.common.yaml_text import LONGEST, parse_yaml

LARGEST = 2**53  # whole numbers are exact up to here when they pass through a float, as 1e6 does
# Half of a pair can be written in YAML, and comes from arguments that aren't UTF-8: no file can have it.
SURROGATE = re.compile("[\ud800-\udfff]")
TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping", list: "a list"}


def key(default, doc: str, least: float | None = None, most: float | None = None):
    """A dataclass field with a line of documentation and the range of values that make sense."""
    metadata = {"doc": doc, "least": least, "most": most}
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Key:
    """What may be given under one name: a value of `kind` between `least` and `most`, or null if `optional`."""

    name: str
    kind: Any
    doc: str
    least: float | None = None
    most: float | None = None
    optional: bool = False
    attribute: str = ""

    def convert(self, value):
        """`value` as this key's type. Raises UserError."""
        if value is None and self.optional:
            return None
        try:
            value = cast(value, self.kind)
        except (TypeError, ValueError, OverflowError):
            choices = list(map(str, typing.get_args(self.kind)))
            near = difflib.get_close_matches(shown(value).strip("'"), choices, 1)
            wanted = f"one of {', '.join(choices)}" if choices else TYPES[self.kind]
            raise self.refusal(
                shown(value),
                f"must be {wanted}{' or null' if self.optional else ''}",
                f"; did you mean {near[0]}?" if near else "",
            ) from None
        if self.kind is str and ("\0" in value or SURROGATE.search(value)):
            raise self.refusal(shown(value), "holds characters that no file or text can have")
        if self.kind is float and not math.isfinite(value):
            raise self.refusal(value, "must be a finite number")
        if self.kind is int and abs(value) > LARGEST:
            raise self.refusal(shown(value), "must be at most 2**53")
        if self.kind is dict:
            check_json(self.name, value)
        if (self.least is not None and value < self.least) or (self.most is not None and value > self.most):
            bounds = f"at least {self.least:g}" if self.most is None else f"between {self.least:,} and {self.most:,}"
            raise self.refusal(value, f"must be {bounds}")
        return value

    def refusal(self, value, what: str, hint: str = "") -> UserError:
        return UserError(f"{self.name}={value}: {what} ({self.doc}){hint}")


def cast(value, kind):
    """`value` as `kind`. Raises ValueError, TypeError or OverflowError for what is none. YAML reads 2e-3 as text."""
    if isinstance(value, bool) and kind is not bool:
        raise TypeError
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        return choices[choices.index(value)]  # 2 for 2.0
    if kind is float:
        return float(value)
    if kind is int and isinstance(value, (str, float)):
        if float(value) != int(float(value)):
            raise ValueError
        return int(float(value))
    if kind is str and isinstance(value, (int, float)):
        return str(value)
    if not isinstance(value, kind):
        raise TypeError
    return value


def check_json(name: str, value) -> None:
    """Raise UserError where `value` is not what JSON can say."""
    if isinstance(value, dict):
        for key_, inner in value.items():
            if not isinstance(key_, str) or SURROGATE.search(key_):
                raise UserError(f"{name}: the key {shown(key_)} must be text")
            check_json(f"{name}.{key_[:60]}" if name.count(".") < 6 else name, inner)
    elif isinstance(value, list):
        for inner in value:
            check_json(name, inner)
    elif (
        (isinstance(value, str) and SURROGATE.search(value))
        or (isinstance(value, float) and not math.isfinite(value))
        or not (value is None or isinstance(value, (bool, int, float, str)))
    ):
        raise UserError(f"{name}={shown(value)}: must be text, a finite number, true, false, null, a list or a mapping")


def keys_of(cls, prefix: str = "") -> dict[str, Key]:
    """All keys of a dataclass and its sections, by dotted name."""
    hints, out = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        attribute, kind = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(kind):
            out |= keys_of(kind, f"{attribute}.")
        else:
            name, optional = attribute.rstrip("_"), isinstance(kind, types.UnionType)
            out[name] = Key(
                name, typing.get_args(kind)[0] if optional else kind, **field.metadata, optional=optional, attribute=attribute
            )
    return out


def as_tree(section) -> dict[str, Any]:
    """A dataclass of settings as nested mappings by key: as asdict, without the underscore of `from_`."""
    return dataclasses.asdict(section, dict_factory=lambda items: {name.rstrip("_"): value for name, value in items})


def merge(base: dict, over: dict) -> dict:
    """`base` with the entries of `over` put over it, mappings merged entry by entry."""
    out = dict(base)
    for name, value in over.items():
        out[name] = merge(out[name], value) if isinstance(out.get(name), dict) and isinstance(value, dict) else value
    return out


class Reader:
    """Reads a dataclass of settings from YAML and from `key=value` arguments.

    Args:
        cls: a dataclass whose fields are made by `key`, or are sections: such dataclasses themselves.
        command: the command whose --list-keys lists them.
        folder: where configurations come with the project.
        example: an argument as it should be.
    """

    def __init__(self, cls, command: str, folder: str, example: str):
        self.cls, self.command, self.folder, self.example = cls, command, folder, example
        self.keys = keys_of(cls)
        self.sections = {name.split(".")[0] for name in self.keys if "." in name}

    def load(self, path: str | None, arguments: list[str]) -> tuple[Any, dict[str, Any]]:
        """The settings of YAML file `path` (None: the defaults) with `key=value` arguments, and the values that were given,
        by dotted name. Raises UserError."""
        given = merge(self.read(path) if path else {}, self.parse(arguments))
        settings = self.cls()
        for name, value in given.items():
            section, _, attribute = self.keys[name].attribute.rpartition(".")
            setattr(getattr(settings, section) if section else settings, attribute, self.keys[name].convert(value))
        return settings, given

    def read(self, path: str) -> dict[str, Any]:
        """The values in a YAML file, by dotted name."""
        try:
            file_path = config_file(path)
            if not file_path.is_file():
                raise UserError(
                    f"config {shown(path)} does not exist: the configs that come with the project are in {self.folder}"
                )
            with open(file_path, encoding="utf-8") as file:
                text = file.read(LONGEST + 1)
        except UnicodeDecodeError as error:
            raise UserError(f"config {path} is not valid YAML: it is not UTF-8 text (byte {error.start})") from None
        except (OSError, ValueError) as error:
            raise UserError(f"config {shown(path)} can't be read: {getattr(error, 'strerror', None) or error}") from None
        tree = parse_yaml(text, f"config {path}")
        if tree is not None and not isinstance(tree, dict):
            raise UserError(f"config {path} must be a mapping of sections, not {type(tree).__name__}")
        return self.flatten(tree or {}, path)

    def parse(self, arguments: list[str]) -> dict[str, Any]:
        """The values of `key=value` arguments, which are YAML, by dotted name. Where KEY is a mapping, KEY.a.b=1 sets one
        of its entries."""
        out = {}
        for argument in arguments:
            name, equals, text = argument.partition("=")
            if not equals:
                raise UserError(f"argument {shown(argument)} is not of the form key=value, for example {self.example}")
            is_text = name in self.keys and self.keys[name].kind is str and not self.keys[name].optional
            value = text if is_text else parse_yaml(text, f"argument {shown(argument)}")
            first, *inner = name.split(".")
            if inner and first in self.keys and self.keys[first].kind is dict:
                entries = out.setdefault(first, {})
                for parent in inner[:-1]:
                    entries = entries.setdefault(parent, {}) if isinstance(entries, dict) else entries
                if not isinstance(entries, dict):
                    raise UserError(f"argument {shown(argument)}: another argument gives a value to a part of this key")
                # YAML reads 2e-3 as text.
                numeric = isinstance(value, str) and re.fullmatch(r"(\d+\.?\d*|\.\d+)e[+-]?\d+", value)
                entries[inner[-1]] = float(value) if numeric else value
            else:
                out |= self.flatten({name: value}, "command line")
        return out

    def flatten(self, tree: dict, where: str, prefix: str = "") -> dict[str, Any]:
        """The values in nested sections by dotted name. Raises UserError for an unknown one."""
        out = {}
        for name, value in tree.items():
            full = f"{prefix}{name}"
            if full in self.sections and isinstance(value, dict):
                out |= self.flatten(value, where, f"{full}.")
            elif full in self.sections:
                inside = ", ".join(k for k in self.keys if k.startswith(f"{full}."))
                raise UserError(f"{where}: {full} is a section, not a value (got {shown(value)}); its keys are {inside}")
            elif full not in self.keys:
                raise UserError(f"{where}: unknown key {shown(full)}; {self._hint(full)}")
            else:
                out[full] = value
        return out

    def _hint(self, name: str) -> str:
        # A key given without its section, or in another one, is found by its last part.
        near = [k for k in self.keys if k.split(".")[-1] == name.split(".")[-1]]
        near = near or difflib.get_close_matches(name[:100], self.keys, 1, 0.5)
        return f"did you mean {near[0]!r}?" if near else f"`{self.command} --list-keys` lists them"

    def values(self, settings) -> dict[str, Any]:
        """All values by dotted name."""
        return {name: attrgetter(key_.attribute)(settings) for name, key_ in self.keys.items()}

    def list_keys(self) -> str:
        """One line a key: name, default, meaning."""
        width, default = max(map(len, self.keys)) + 2, self.values(self.cls())
        return "\n".join(f"  {name:<{width}} {default[name]!s:<14} {key_.doc}" for name, key_ in self.keys.items())
