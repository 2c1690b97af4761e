"""Every block of Python, JSON or YAML in README.md, docs/ and the weights' card runs, or is read, as it is printed."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import ROOT, environment

from celo2_pretrain.train.config import load_config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "celo2_pretrain").rglob("*.md"))]
WORKER = Path(__file__).with_name("docs_worker.py")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
# Languages of blocks, and what tests them.
TESTED = {"python": "here", "diff": "here", "yaml": "here", "bash": "test_docs_commands.py", "": "output"}


def blocks(page: Path, language: str) -> list[str]:
    return [body for found, body in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def with_code() -> list[Path]:
    return [page for page in PAGES if blocks(page, "python") or blocks(page, "diff")]


def run(page: Path, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, WORKER, page], cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("page", with_code(), ids=lambda page: page.name)
def test_the_code_of_a_page_runs_as_it_is_printed(page, tmp_path):
    result = run(page, tmp_path)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


def test_code_that_fails_is_found(tmp_path):
    (tmp_path / "swap.md").write_text("```python\nfrom celo2_pretrain import Celo2\nCelo2(model.parameters(), lr=-1)\n```\n")
    result = run(tmp_path / "swap.md", tmp_path)
    assert result.returncode and "lr must be" in result.stderr


def test_every_block_is_of_a_language_that_is_tested():
    languages = {language for page in PAGES for language, _ in BLOCK.findall(page.read_text(encoding="utf-8"))}
    assert languages <= set(TESTED), languages - set(TESTED)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=lambda page: page.name)
def test_the_yaml_of_a_page_is_read(page, tmp_path):
    for number, body in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(body)
        if page.name == "configuration.md":
            load_config(str(path), [])
        else:
            assert isinstance(yaml.safe_load(body), dict)
