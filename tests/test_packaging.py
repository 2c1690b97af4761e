"""What an installed package promises: every folder is importable, the weights are inside, names don't clash."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import celo2_pretrain

from support.paths import ROOT

BUNDLED = ("celo2.safetensors", "celo2_base.safetensors", "celo2.md")


def python(code: str, cwd: Path, *paths: Path) -> str:
    """Run `code` in a fresh interpreter in `cwd` and return what it prints."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the files a build reads, so that building leaves nothing in the working tree."""
    copy = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("celo2_pretrain", "kernels", "configs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, copy / file)
    (copy / "README.md").touch()
    return copy


def pip(*arguments: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(source))
    return next(out.glob("*.whl"))


def test_the_wheel_has_the_version_that_the_package_says(wheel):
    assert wheel.name.split("-")[1] == celo2_pretrain.__version__


def test_the_wheel_holds_the_weights_and_their_card(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for file in BUNDLED:
        assert f"celo2_pretrain/weights/{file}" in names
    assert (ROOT / "celo2_pretrain" / "weights" / BUNDLED[0]).read_bytes() == zipfile.ZipFile(wheel).read(
        f"celo2_pretrain/weights/{BUNDLED[0]}"
    )


def test_the_wheel_holds_every_module_of_the_repo(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        f"celo2_pretrain/{path.relative_to(ROOT / 'celo2_pretrain').as_posix()}"
        for path in (ROOT / "celo2_pretrain").rglob("*.py")
    }
    modules |= {f"celo2_pretrain/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert modules - names == set()
    assert not any(name.startswith("kernels/") for name in names), "a top-level kernels would replace Hugging Face's"


def test_the_wheel_holds_the_configs_and_the_source_of_the_kernels(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"celo2_pretrain/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert len(configs) >= 10 and configs | {"celo2_pretrain/kernels/cpu.cpp"} <= names


def test_a_plain_install_imports_kernels_and_loads_the_weights(wheel, tmp_path):
    pip("install", "-q", "--no-deps", "--target", str(tmp_path / "site"), str(wheel))
    printed = python(
        "import celo2_pretrain.kernels as k; from celo2_pretrain.weights import load_weights;"
        "print(k.__file__, sum(x.numel() for x in load_weights()))",
        tmp_path,
        tmp_path / "site",
    )
    assert printed == f"{tmp_path / 'site' / 'celo2_pretrain' / 'kernels' / '__init__.py'} 347"


def test_an_editable_install_imports_kernels_and_loads_the_weights(source, tmp_path):
    # Into a folder of its own, which `site` then reads like site-packages: the running environment stays as it is.
    pip("install", "-q", "--no-deps", "--no-build-isolation", "--target", str(tmp_path / "site"), "-e", str(source))
    printed = python(
        f"import site; site.addsitedir({str(tmp_path / 'site')!r});"
        "import celo2_pretrain.kernels as k; from celo2_pretrain.weights import load_weights;"
        "print(k.__file__, sum(x.numel() for x in load_weights()))",
        tmp_path,
    )
    assert printed.endswith("kernels/__init__.py 347")


def test_transformers_does_not_take_the_kernels_folder_for_its_own():
    """From the root, `kernels` is found on the path; it must carry a version that transformers finds too old."""
    printed = python(
        "import transformers, kernels; from transformers.utils import is_kernels_available;"
        "import transformers.integrations; print(is_kernels_available(), kernels.__version__)",
        ROOT,
    )
    assert printed == "False 0"


def test_the_kernels_folder_gives_way_to_the_installed_package(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("from kernels.part import name\n__version__ = '9'\n")
    (tmp_path / "kernels" / "part.py").write_text("name = 'theirs'\n")
    printed = python("import kernels; from kernels import name; print(name, kernels.__version__)", ROOT, tmp_path)
    assert printed == "theirs 9"


def with_the_core_only(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "tests/support/core_only.py", *arguments], capture_output=True, text=True)


def test_the_optimizer_and_its_state_need_torch_numpy_and_safetensors_only(tmp_path):
    done = with_the_core_only(str(ROOT / "tests/support/core_use.py"), str(tmp_path / "state"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == celo2_pretrain.__version__


COMMANDS = [
    "prepare --stdlib --out {out}",
    "train run_dir={out}",
    "train --max-restarts 1",
    "sweep --out {out}",
    "plan",
    "eval {out}",
    "generate {out}",
    "plot {out} --out {out}/x.png",
    "export {out} --out {out}/x",
    "meta-train out={out}",
    "meta-select {out}",
    "meta-eval --out {out}",
]


def test_a_command_without_its_packages_says_what_to_install(tmp_path):
    commands = [command.format(out=tmp_path).split() for command in COMMANDS]
    done = with_the_core_only("-c", f"from celo2_pretrain.cli import main\nprint([main(command) for command in {commands}])")
    assert done.stdout.strip() == str([2] * len(COMMANDS)), done.stdout + done.stderr
    for command, line in zip(COMMANDS, done.stderr.splitlines(), strict=True):
        extra = "meta" if command.startswith("meta") else "train"
        assert f'pip install "celo2-pretrain[{extra}]"' in line, line


def test_without_any_extra_the_command_line_still_helps():
    assert "meta-eval" in with_the_core_only("-m", "celo2_pretrain", "--help").stdout


@pytest.mark.parametrize("script", ["launch/setup.sh", "launch/test.sh", "launch/lint.sh", "launch/wheel.sh", ".ci/run"])
def test_scripts_are_executable_and_parse(script):
    assert os.access(ROOT / script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(ROOT / script)]).returncode == 0


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_the_committed_results_take_less_than_a_megabyte():
    listed = subprocess.check_output(["git", "ls-files", "-z", "benchmarks/results"], cwd=ROOT, text=True)
    sizes = {name: (ROOT / name).stat().st_size for name in listed.split("\0") if name}
    assert sum(sizes.values()) < 1_000_000, sorted(sizes.items(), key=lambda item: -item[1])[:5]
