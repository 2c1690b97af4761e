"""What README.md and docs/*.md tell people to type is run by a test, or at least taken by the program it names."""

import ast
import importlib
import re

import pytest

from support.paths import ROOT, TESTS
from support.shell_commands import commands, problem

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Pages whose bash blocks a test runs whole, as they are printed.
RUN_WHOLE = {
    "data.md": "data/test_data_docs.py::test_commands_in_the_documents_run",
    "schedules.md": "data/test_data_docs.py::test_commands_in_the_documents_run",
}
# Single commands and the test that runs them, or the same with smaller numbers.
RUN = {
    "celo2-pretrain prepare --stdlib --out data/python": "data/test_data_docs.py::test_commands_in_the_documents_run",
    "deepspeed --no_local_rank --num_gpus 2 launch/pretrain.py --config configs/tiny_cpu.yaml optimizer.lr=2e-3 run_dir=runs/mine": "train/test_driver_ranks.py",
    "celo2-pretrain plan --config configs/gpt3_xl_1.3b.yaml --gpus 8": "plan/test_plan.py",
    "celo2-pretrain meta-eval --quick --theta mine=runs/meta/celo2/theta_000020.safetensors": "meta/test_meta_eval.py",
    "celo2-pretrain meta-select runs/meta/celo2 --steps 1500": "meta/test_meta_train.py",
    **{
        f"DS_ACCELERATOR=cpu deepspeed --num_gpus {ranks} examples/{name}.py": "test_examples.py::test_the_swapped_example_trains_with_celo2_and_ends_below_adamw"
        for name, ranks in (("hf_trainer", 1), ("accelerate_loop", 1), ("deepspeed_loop", 2))
    },
    "celo2-pretrain eval runs/tiny_cpu --json runs/tiny_cpu/eval.json": "model/test_score.py::test_eval_counts_every_token_once_and_the_bytes_they_stand_for",
    'celo2-pretrain generate runs/tiny_cpu --prompt "def main" --tokens 100': "train/test_driver.py::test_generate_continues_the_prompt",
    "celo2-pretrain export runs/tiny_cpu --out exported --dtype bfloat16": "model/test_score.py::test_the_exported_model_has_equal_logits_and_the_tokenizer_the_same_ids",
    "celo2-pretrain eval runs/tiny_cpu --tasks mine --task-folder my_tasks --limit 20": "model/test_score.py::test_tasks_are_scored_by_the_harness_on_the_exported_model",
    "torchrun --nproc_per_node 2 examples/fsdp2.py": "test_examples.py::test_the_swapped_example_trains_with_celo2_and_ends_below_adamw",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_taken_by_the_program_it_names(page):
    wrong = {command: why for command in commands(page.read_text(encoding="utf-8")) if (why := problem(command))}
    assert not wrong


def test_commands_that_tests_run_are_in_the_pages_and_the_tests_exist():
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    printed = {" ".join(command.split("#")[0].split()) for page in pages for command in commands(page)}
    assert set(RUN) <= printed, set(RUN) - printed
    for where in {*RUN.values(), *RUN_WHOLE.values()}:
        file, _, name = where.partition("::")
        assert f"def {name}" in (TESTS / file).read_text()
    for page, where in RUN_WHOLE.items():
        assert page in (TESTS / where.partition("::")[0]).read_text()


@pytest.mark.parametrize(
    "command, why",
    [
        ("celo2-pretrain trian --config configs/tiny_cpu.yaml", "invalid choice: 'trian'"),
        ("celo2-pretrain train --config configs/none.yaml", "none.yaml' does not exist"),
        ("celo2-pretrain train optimizer.lrr=1", "did you mean 'optimizer.lr'?"),
        ("celo2-pretrain eval runs/x --taks a", "unrecognized arguments: --taks a"),
        ("celo2-pretrain meta-train --config configs/meta/celo2.yaml outer_step=3", "outer_step"),
        ("deepspeed --num_gpu 2 launch/pretrain.py train.max_step=3", "train.max_step"),
        ("deepspeed launch/pretrian.py", "there is no file launch/pretrian.py"),
        ("A=1 torchrun --nproc_per_nod 2 examples/fsdp2.py && celo2-pretrain plott x", "invalid choice: 'plott'"),
        ("launch/quickstart.sh --fast", "launch/quickstart.sh has no option --fast"),
        ("launch/quickstart.sh train.max_step=600", "train.max_step"),
        ("python benchmarks/takeover.py --fast", "benchmarks/takeover.py has no option --fast"),
        ("pip install 'celo2-pretrain[evil]'", "no extra 'evil'"),
        ("megatron --train", "nothing here knows the program 'megatron'"),
    ],
)
def test_a_wrong_command_is_found(command, why):
    assert why in (problem(command) or "nothing")


def test_commands_are_found_wherever_they_stand():
    page = (
        "```bash\none a \\\n    b  # c\n# no command\n```\n```\n$ two\noutput\n```\n\n    celo2-pretrain three x\n\n"
        "`celo2-pretrain four\ny`, `celo2-pretrain plan` and `five`, `celo2-pretrain a | b`\n```python\nsix\n```\n"
    )
    assert commands(page) == [
        "one a b  # c",
        "two",
        "celo2-pretrain three x",
        "celo2-pretrain four y",
        "celo2-pretrain plan --help",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_pages_compiles_and_names_what_there_is(page):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"from {node.module} import {alias.name}"


def headings(page) -> dict[str, str]:
    """The headings of a page by their anchors, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    found = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-"): heading for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_the_pages_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http:", "https:", "mailto:")):
            path, _, anchor = target.partition("#")
            there = page.parent / path if path else page
            assert there.exists(), target
            assert not anchor or anchor in headings(there), target


def test_the_pages_and_sections_that_the_code_cites_exist():
    cited = set()
    for folder in ("celo2_pretrain", "kernels", "benchmarks", "launch", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".sh") and path.name != "test_docs_commands.py":
                cited |= set(re.findall(r"docs/(\w+\.md)(?:, \"?([A-Z][\w ]+))?", path.read_text(encoding="utf-8")))
    assert len(cited) > 10 and any(section for _, section in cited)
    for page, section in cited:
        there = ROOT / "docs" / page
        assert there.exists(), page
        assert not section or section in headings(there).values(), f"{page}, {section}"
