"""What the launch scripts hand on to other hosts and to the driver, and which threads they give to each rank."""

import base64
import os
import re
import runpy
import shutil
import subprocess
import sys

import pytest

from celo2_pretrain import cli
from celo2_pretrain.config import accumulation_steps, load_config
from celo2_pretrain.train.start import hostfile

from support.paths import ROOT
from support.processes import environment

# In the place of Python: takes any hostfile, and shows what DeepSpeed's launcher would hand on.
PYTHON = """#!/usr/bin/env bash
case "$*" in *deepspeed.launcher.runner*) cat "$DS_ENV_FILE" ;; esac
"""


@pytest.fixture
def handed_on(tmp_path):
    """Calls multinode.sh on a machine without a GPU; gives the variables that it hands on to all hosts."""
    for name, text in (
        ("python", PYTHON),
        ("nvidia-smi", "#!/bin/sh\nexit 1\n"),
        ("nproc", "#!/bin/sh\necho 48\n"),
        ("pdsh", "#!/bin/sh\n"),
        ("ssh", "#!/bin/sh\n"),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def call(hosts: str, lines: str = "", **variables: str) -> dict[str, str]:
        (tmp_path / "hosts").write_text(hosts)
        (tmp_path / ".deepspeed_env").write_text(lines)
        mine = environment(PYTHON=str(tmp_path / "python"), PATH=f"{tmp_path}:{os.environ['PATH']}", HOME="/nonexistent")
        for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS"):
            mine.pop(name, None)
        result = subprocess.run(
            [str(ROOT / "launch/multinode.sh"), "--hostfile", str(tmp_path / "hosts")],
            cwd=tmp_path,
            env=mine | variables,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        pairs = [line.partition("=")[::2] for line in result.stdout.splitlines() if not line.startswith("multinode: ")]
        return dict(pairs)  # the last one counts, as for DeepSpeed

    return call


def test_a_launching_machine_without_gpus_does_not_send_gpu_hosts_to_the_cpu(handed_on):
    hosts = "node1 slots=8\n"
    assert "DS_ACCELERATOR" not in handed_on(hosts)
    assert handed_on(hosts, DS_ACCELERATOR="cpu")["DS_ACCELERATOR"] == "cpu"
    assert handed_on(hosts, "DS_ACCELERATOR=cpu\n")["DS_ACCELERATOR"] == "cpu"


@pytest.mark.parametrize(
    "hosts, threads",
    [
        ("node1 slots=8\n", "6"),
        ("node1 slots=08\nnode2 slots=16 # slots=64\n", "3"),
        ("node1 slots=64\n", "1"),
    ],
)
def test_the_cores_of_a_host_are_shared_out_to_its_ranks(handed_on, hosts, threads):
    assert handed_on(hosts)["OMP_NUM_THREADS"] == threads
    if threads == "1":
        assert handed_on(hosts, OMP_NUM_THREADS="5")["OMP_NUM_THREADS"] == "5"
        assert handed_on(hosts, "OMP_NUM_THREADS=7\n")["OMP_NUM_THREADS"] == "7"


def test_deepspeeds_timeout_is_the_one_that_is_told():
    line = next(line for line in (ROOT / "launch/environment.sh").read_text().splitlines() if "DEEPSPEED_TIMEOUT" in line)
    code = "from deepspeed.constants import default_pg_timeout as t; print(int(t.total_seconds() / 60))"
    mine = environment()
    mine.pop("DEEPSPEED_TIMEOUT", None)
    minutes = subprocess.run([sys.executable, "-c", code], env=mine, capture_output=True, text=True).stdout.split()[-1]
    assert line.endswith(f"(default: {minutes})")
    assert (
        f"`DEEPSPEED_TIMEOUT` | minutes that a rank waits for another; {minutes} by default"
        in (ROOT / "docs/launch.md").read_text()
    )


def test_the_slurm_jobs_that_are_shown_can_train():
    text = (ROOT / "docs/launch.md").read_text() + (ROOT / "launch/slurm.sh").read_text()
    jobs = re.findall(r"sbatch --nodes (\d+) launch/slurm.sh --config (\S+?)[` ]", text)
    assert len(jobs) == 2
    for nodes, config in jobs:
        accumulation_steps(load_config(str(ROOT / config)), 8 * int(nodes))  # GPUs


@pytest.mark.parametrize("value", [[], [""], ["a:b"], ["/w=="], ["YQ=="], ["AA==", "more"]])
def test_arguments_that_are_no_base64_are_refused_in_one_line(value, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--base64", *value])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "launch/pretrain.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("pretrain: error: --base64 ") and error.count("\n") == 1


@pytest.mark.parametrize("given", [[], ["a", "b"]])
def test_a_hostfile_is_one_argument(given, capsys):
    assert hostfile.main(given) == 2
    assert capsys.readouterr().err == (
        f"multinode: error: {len(given)} arguments: give one hostfile, with a line for each host, for example: node1 slots=8\n"
    )


def test_arguments_arrive_as_they_were_given(monkeypatch):
    given = []
    monkeypatch.setattr(cli, "main", lambda arguments: given.extend(arguments))
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--base64", base64.b64encode('a b="ä$"\0\0c\0'.encode()).decode()])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "launch/pretrain.py"), run_name="__main__")
    assert given == ["train", 'a b="ä$"', "", "c"]


@pytest.mark.parametrize("gpus, told", [(0, "--num_gpus 2, cpu, 24"), (1, "--num_gpus 1, , 48"), (4, "--num_gpus 2, , 24")])
def test_quickstart_takes_the_gpus_and_cores_there_are(tmp_path, gpus, told):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "launch/setup.sh").write_text("VIRTUAL_ENV=$PWD/.venv\n")
    (tmp_path / "data/python").mkdir(parents=True)
    (tmp_path / "data/python/index.json").touch()
    (tmp_path / "bin").mkdir()
    for name, text in (
        ("nvidia-smi", f"for ((k = 0; k < {gpus}; k++)); do echo GPU $k; done"),
        ("nproc", "echo 48"),
        ("deepspeed", 'echo "$*, $DS_ACCELERATOR, $OMP_NUM_THREADS"'),
    ):
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    mine = environment(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS"):
        mine.pop(name, None)
    result = subprocess.run([str(tmp_path / "launch/quickstart.sh"), "a.b=1 2"], env=mine, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if "--num_gpus" in line)
    options, *variables = told.split(", ")
    assert f" {options} " in line and " a.b=1 2, " in line and line.split(", ")[1:] == variables
