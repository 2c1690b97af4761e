"""Whatever stands in a configuration, or on the command line: it is used, or refused in a line."""

import json
import os

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from celo2_pretrain.common.errors import UserError
from celo2_pretrain.config import KEYS, dump_config, load_config
from celo2_pretrain.deepspeed_config import deepspeed_config
from celo2_pretrain.train.schedule import BatchSizes, lr_factor

from support.fuzz import ODD_TEXT, PATHS, cases, numbers, spoilers, values, works_or_refuses

# YAML's tags, aliases, odd numbers and half-written things.
ODD_YAML = [
    "nan",
    ".nan",
    ".inf",
    "-.inf",
    "1e999",
    "9" * 5000,
    "0x" + "f" * 5000,
    "0b1",
    "0o8",
    "1:60:99",
    "1_0",
    "~",
    "2001-01-01",
    "2001-99-99",
    "!!timestamp 2001-99-99",
    "!!binary x",
    "!!binary aGk=",
    "!!int ''",
    "!!int a",
    "!!bool x",
    "!!float x",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!pairs [a: 1]",
    "!!python/object/apply:os.getcwd []",
    "!!python/name:os.system",
    "!x y",
    "&a [*a]",
    "&a {b: *a}",
    "*nowhere",
    "[1,",
    "{",
    "}",
    "a: b: c",
    "? [a]",
    "{[a]: b}",
    "{1: 2}",
    "{null: 1}",
    "<<",
    "{<<: 1}",
    "{<<: {a: 1}}",
    "=",
    "|",
    ">-",
    "%",
    "@",
    "`",
    "'",
    '"',
    '"\\ud800"',
    '"\\x00"',
    "[" * 5000,
    "{a: " * 500,
    "- " * 900,
    "[{path: a, weight: 1}, {path: b, weight: 0.5}]",
    "[{steps: 2, global_batch_size: 8}]",
    "[{tokens: 1e6, global_batch_size: 8}]",
    "[{tokens: 1e-300, global_batch_size: 1e18}]",
    "#",
    "\t",
    "\r\n",
    "\x85",
    "---\n---",
]
BOMB = "x0: &x0 [a, a, a, a, a, a, a, a, a]\n" + "".join(
    f"x{k}: &x{k} [{', '.join([f'*x{k - 1}'] * 9)}]\n" for k in range(1, 12)
)
names = st.one_of(
    st.sampled_from(sorted(KEYS)),
    st.sampled_from(
        [
            "deepspeed.a",
            "deepspeed.zero_optimization.stage",
            "deepspeed",
            "deepspeed.",
            "deepspeed..a",
            "deepspeed.bf16",
            "model",
            "train",
            "",
            ".",
            "optimizer.",
            ".lr",
            "lr",
            "x" * 50_000,
            "model.from_",
            "schedule.steps.x",
            "deepspeed.zero_optimization",
        ]
    ),
    st.text(max_size=12),
)
texts = st.one_of(
    st.sampled_from(ODD_YAML),
    st.sampled_from(ODD_TEXT),
    st.sampled_from(PATHS),
    st.text(max_size=30),
    numbers.map(repr),
    st.integers(1, 64).map(str),
    st.sampled_from(["true", "false", "null", "1e-3", "0.1", "2", "64"]),
    values.map(json.dumps),
)
overrides = st.lists(st.one_of(st.tuples(names, texts).map("=".join), st.text(max_size=10)), min_size=1, max_size=4)


def use(path: str | None, arguments: list[str], folder) -> None:
    """All that `train` takes from a configuration before it opens the data."""
    config = load_config(path, arguments)
    deepspeed_config(config, 1)
    json.dumps(deepspeed_config(config, 1), allow_nan=False)
    sizes = BatchSizes(config.train, config.model.context)
    assert all(size >= 1 for size in sizes.all()) and sizes.at(0) in sizes.all()
    steps = config.train.max_steps
    assert all(0 <= lr_factor(step, config.schedule, steps) <= 1 for step in (0, steps // 2, steps - 1))
    again = folder / "again.yaml"
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(str(again)) == config


@cases(3000)
@given(overrides)
def test_arguments_are_used_or_refused(tmp_path_factory, arguments):
    folder = tmp_path_factory.getbasetemp()
    works_or_refuses(lambda: use(None, arguments, folder))


trees = st.dictionaries(
    st.sampled_from(sorted({name.split(".")[0] for name in KEYS} | {"modle", "", "<<"})),
    st.one_of(
        values,
        st.dictionaries(
            st.sampled_from(sorted(name.split(".")[-1] for name in KEYS)),
            st.one_of(
                values,
                st.sampled_from(ODD_YAML),
                st.integers(1, 64),
                st.sampled_from(["gpt2", "llama", "wsd", "adamw", "bf16"]),
            ),
            max_size=4,
        ),
    ),
    max_size=3,
)


@cases(2000)
@given(trees, st.sampled_from(["json", "yaml", "unquoted"]))
def test_files_with_odd_values_are_used_or_refused(tmp_path_factory, tree, how):
    folder = tmp_path_factory.getbasetemp()
    text = json.dumps(tree)
    if how == "yaml":
        try:
            text = yaml.safe_dump(tree, allow_unicode=True)
        except (yaml.YAMLError, ValueError):  # half characters, numbers of thousands of digits
            pass
    elif how == "unquoted":  # tags, aliases and odd numbers work only outside quotes
        text = text.replace('"', "")
    (folder / "odd.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    works_or_refuses(lambda: use(str(folder / "odd.yaml"), [], folder))


@cases(1500)
@given(st.lists(spoilers(), min_size=1, max_size=3), st.booleans())
def test_spoiled_files_are_used_or_refused(tmp_path_factory, spoil, llama):
    folder = tmp_path_factory.getbasetemp()
    config = load_config(
        None,
        ["model.family=llama", "train.batch_warmup=[{steps: 2, global_batch_size: 8}]"]
        if llama
        else ["data.mixture=[{path: a, weight: 1}]", "deepspeed.zero_optimization.overlap_comm=true"],
    )
    data = dump_config(config).encode()
    for change in spoil:
        data = change(data)
    (folder / "spoiled.yaml").write_bytes(data)
    works_or_refuses(lambda: use(str(folder / "spoiled.yaml"), [], folder))


@pytest.mark.parametrize(
    "text, message",
    [
        (BOMB, "aliases"),
        (f"{BOMB}deepspeed: {{a: *x11}}", "aliases"),
        (f"{BOMB}optimizer: {{lr: *x11}}", "aliases"),
        ("deepspeed: &a {b: *a}", "itself"),
        ("train: {seed: 1, seed: 2}", "twice"),
        ("train: {seed: 1}\ntrain: {max_steps: 2}", "twice"),
        ("[" * 100_000, "nested"),
        ("train: {seed: " + "9" * 5000 + "}", "seed"),
        ("deepspeed: {a: 2001-01-01}", "deepspeed"),
        ('run_dir: "a\\0b"', "run_dir"),
        ("deepspeed: {a: .nan}", "deepspeed"),
        ("train: !!timestamp 2001-99-99", "YAML"),
    ],
)
def test_tricks_of_yaml_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(str(path))
    assert works_or_refuses(lambda: load_config(str(path))) is None


def test_merge_keys_and_aliases_of_a_reasonable_size_still_work(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("deepspeed:\n  a: &a {b: 1, c: 2}\n  d: {<<: *a, c: 3}\n  e: *a\n")
    assert load_config(str(path)).deepspeed == {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}, "e": {"b": 1, "c": 2}}


def test_folders_and_special_files_are_no_configs(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / ("x" * 300), "a\0b"):
        with pytest.raises(UserError):
            load_config(str(path))
