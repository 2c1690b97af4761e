"""Every block of Python, JSON or YAML in README.md, docs/ and the weights' card runs, or is read, as it is printed."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from celo2_pretrain import Celo2
from celo2_pretrain.config import load_config

from support import docs_worker
from support.paths import ROOT, SUPPORT
from support.processes import run_script

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "celo2_pretrain").rglob("*.md"))]
WORKER = SUPPORT / "docs_worker.py"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
TESTED = {"python", "diff", "yaml"}  # languages
OTHERS = {"bash", "", "mermaid"}  # commands and output are in test_docs_commands.py; a picture is looked at


def blocks(page: Path, language: str) -> list[str]:
    return [body for found, body in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def with_code() -> list[Path]:
    return [page for page in PAGES if blocks(page, "python") or blocks(page, "diff")]


@pytest.mark.parametrize("page", with_code(), ids=lambda page: page.name)
def test_the_code_of_a_page_runs_as_it_is_printed(page, tmp_path):
    result = run_script(WORKER, str(page), folder=tmp_path)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


@pytest.mark.parametrize(
    "page",
    [
        "```python\nfrom celo2_pretrain import Celo2\n\nCelo2(model.parameters(), lr=-1)\n```\n",
        "```diff\n-Celo2(model.parameters(), lr=1)\n+Celo2(model.parameters(), lr=-1)\n```\n",
    ],
)
def test_code_that_fails_is_found(page):
    with pytest.raises(ValueError, match="lr must be"):
        docs_worker.run(page, {"model": torch.nn.Linear(2, 2), "Celo2": Celo2})


def test_every_block_is_of_a_language_that_is_tested():
    languages = {language for page in PAGES for language, _ in BLOCK.findall(page.read_text(encoding="utf-8"))}
    assert languages <= TESTED | OTHERS, languages - TESTED - OTHERS


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=lambda page: page.name)
def test_the_yaml_of_a_page_is_read(page, tmp_path):
    for number, body in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(body)
        if page.name == "configuration.md":
            load_config(str(path), [])
        else:
            assert isinstance(yaml.safe_load(body), dict)
