"""YAML as a person may write it, and nothing worse: no expanding aliases, no key given twice, no objects of Python."""

import yaml

from celo2_pretrain.common.errors import UserError, one_line, shown

LONGEST = 1 << 20  # characters; the longest configuration here has a thousand
MOST_VALUES = 100_000  # with every alias written out
DEEPEST = 50
LARGEST = 2**63


class Loader(yaml.SafeLoader):
    """SafeLoader that refuses what a configuration never means."""

    def compose_document(self):
        node = super().compose_document()
        written_out(node, {})
        return node

    def construct_mapping(self, node, deep=False):
        given = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = (key.tag, str(key.value))
            if name in given and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"key {shown(key.value)} is given twice", key.start_mark)
            given.add(name)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node):
        # Also keeps Python's own limit away: decimal numbers above 4,300 digits can't even be shown.
        text = self.construct_scalar(node).lower()
        if len(text) > 200 or abs(value := super().construct_yaml_int(node)) >= LARGEST:
            raise yaml.constructor.ConstructorError(None, None, f"number {shown(text)} is too large", node.start_mark)
        return value


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)


def written_out(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How many values `node` stands for when its aliases are written out, and how deeply they are nested. Raises
    ComposerError above MOST_VALUES or DEEPEST, and for a node that contains itself."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1, 0
    if id(node) in known:
        if known[id(node)] is None:
            raise yaml.composer.ComposerError(None, None, "an alias contains itself", node.start_mark)
        return known[id(node)]
    known[id(node)] = None
    inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    counts, depths = zip(*(written_out(part, known) for part in inner)) if inner else ((0,), (0,))
    known[id(node)] = total, depth = 1 + sum(counts), 1 + max(depths)
    if total > MOST_VALUES:
        raise yaml.composer.ComposerError(None, None, f"aliases stand for more than {MOST_VALUES:,} values", node.start_mark)
    if depth > DEEPEST:
        raise yaml.composer.ComposerError(None, None, f"it is nested more than {DEEPEST} deep", node.start_mark)
    return total, depth


def parse_yaml(text: str, where: str):
    """The tree that YAML `text` stands for: dicts, lists, text, numbers, booleans, None, dates, bytes and sets.

    Args: `where` stands at the front of error messages, e.g. "config a.yaml".
    Raises UserError for anything else, in one line that says where.
    """
    if len(text) > LONGEST:
        raise UserError(f"{where} is no configuration: it has {len(text):,} characters")
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {one_line(error)}") from None
    except RecursionError:
        raise UserError(f"{where} is not valid YAML here: it is nested too deeply") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # PyYAML's on a tag that its value doesn't fit
        raise UserError(f"{where} is not valid YAML: a value does not fit its tag or form ({one_line(error)})") from None


def dump_yaml(tree: dict) -> str:
    """Text that `parse_yaml` reads back as `tree`."""
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    if parse_yaml(text, "config") == tree:
        return text
    return yaml.safe_dump(tree, sort_keys=False)  # PyYAML writes some line ends of Unicode as they are, and reads spaces
