"""The launch scripts, as far as one machine can: nodes are process groups, network namespaces, or hosts of stand-ins."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from celo2_pretrain.common.errors import UserError
from celo2_pretrain.config import load_config
from celo2_pretrain.train.start.hostfile import read_hostfile
from celo2_pretrain.train.start.ranks import free_port
from celo2_pretrain.train.start.resume_command import resume_command

from support.paths import ROOT
from support.processes import environment

SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in [*(ROOT / "launch").glob("*.sh"), ROOT / ".ci/run"])
HARD = """it's "$HOME" `x` & a\\b; *"""  # what shells would take for their own
SMALL = [
    "model.layers=1",
    "model.width=16",
    "model.heads=1",
    "model.context=16",
    "train.micro_batch_size=2",
    "train.global_batch_size=4",
    "train.log_every=1",
    "train.max_steps=2",
    "eval.sequences=4",
    "eval.sample_tokens=2",
    "checkpoint.any_world=false",
    "optimizer.adamw_lr_multiplier=2",
]
# Without a network: hosts are processes here. srun and pdsh run the command once a host, and fail if one fails.
STAND_INS = {
    "scontrol": "echo localhost\necho node2\n",
    "srun": """
while [ "$1" != bash ]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "${code:-0}"
""",
    "ssh": """
while [ "$1" != node1 ]; do shift; done
if [ "$3" = -I ]; then echo 127.0.0.1; else echo node1; fi
""",
    "pdsh": """
while [ "$1" != -w ]; do shift; done
hosts="$2" node=0
shift 2
for host in ${hosts//,/ }; do
    line="$*"
    env -i HOME="$HOME" PATH="$PATH" bash -c "${line//%n/$node}" & pids+=($!)
    node=$((node + 1))
done
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "${code:-0}"
""",
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> str:
    """A PATH on which the cluster's commands come first."""
    folder = tmp_path_factory.mktemp("bin")
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def variables(**more: str) -> dict[str, str]:
    return environment(PYTHON=sys.executable, GLOO_SOCKET_IFNAME="lo", **more)


def arguments(data: str, folder: Path) -> list[str]:
    """Train's arguments, some of which need care with quotes."""
    (folder / "a b.yaml").write_text(yaml.safe_dump({"data": {"path": data}, "eval": {"prompt": "overridden"}}))
    return ["--config", str(folder / "a b.yaml"), *SMALL, f"run_dir={folder / 'run 1'}", f"eval.prompt={HARD}"]


def check_run(folder: Path, output: str, resume: str) -> None:
    """Two ranks trained to the end, with the arguments as they were given, and the way on is shown."""
    assert "2 rank(s)" in output and output.count("to train further: ") == 1, output
    assert resume in output.split("to train further: ")[1], output
    config = yaml.safe_load((folder / "run 1/config.yaml").read_text())
    assert config["eval"]["prompt"] == HARD and (folder / "run 1/loss.png").is_file()


def run_nodes(nodes: list[list[str]], **more: str) -> list[str]:
    """Start the nodes' commands together; what each printed. Fails with the output of one that failed."""
    started = [
        subprocess.Popen(node, env=variables(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for node in nodes
    ]
    try:
        outputs = [process.communicate(timeout=1500)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), "\n".join(outputs)
    return outputs


@pytest.mark.slow
@pytest.mark.multiprocess
def test_torchrun_on_two_nodes_of_one_rank_each(data, tmp_path):
    common = ["--nnodes", "2", "--nproc", "1", "--master", f"127.0.0.1:{free_port()}"]
    line = [str(ROOT / "launch/torchrun.sh"), *common, "--node-rank"]
    first, second = run_nodes([[*line, str(rank), "--", *arguments(data, tmp_path)] for rank in (0, 1)])
    check_run(tmp_path, first, "launch/torchrun.sh --nnodes 2 --node-rank 0 --master 127.0.0.1:")
    assert "step" not in second and "to train further" not in second


@pytest.fixture
def namespaces():
    """Two network namespaces that see each other and nothing else, at 10.87.0.1 and .2."""
    ip = shutil.which("ip") or "/usr/sbin/ip"
    names = [f"celo2-{os.getpid()}-{k}" for k in (0, 1)]
    lines = [
        f"netns add {names[0]}",
        f"netns add {names[1]}",
        f"link add celo2a netns {names[0]} type veth peer name celo2b netns {names[1]}",
    ]
    for name, link, address in zip(names, ("celo2a", "celo2b"), ("10.87.0.1", "10.87.0.2")):
        lines += [f"-n {name} addr add {address}/24 dev {link}", f"-n {name} link set {link} up", f"-n {name} link set lo up"]
    try:
        for line in lines:
            try:
                result = subprocess.run([ip, *line.split()], capture_output=True, text=True)
            except OSError as error:
                pytest.skip(f"no ip command (Debian: iproute2): {error}")
            if result.returncode:
                pytest.skip(f"network namespaces are not permitted here: ip {line}: {result.stderr.strip()}")
        yield [
            [ip, "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={link}"] for name, link in zip(names, ("celo2a", "celo2b"))
        ]
    finally:
        for name in names:
            subprocess.run([ip, "netns", "del", name], capture_output=True) if Path(ip).exists() else None


@pytest.mark.slow
@pytest.mark.multiprocess
def test_torchrun_between_two_network_namespaces(data, tmp_path, namespaces):
    first, _ = run_nodes(
        [
            [
                *enter,
                str(ROOT / "launch/torchrun.sh"),
                "--nnodes",
                "2",
                "--nproc",
                "1",
                "--master",
                "10.87.0.1",
                "--node-rank",
                str(rank),
                *arguments(data, tmp_path),
            ]
            for rank, enter in enumerate(namespaces)
        ]
    )
    check_run(tmp_path, first, "--master 10.87.0.1:29500")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_deepspeed_with_a_hostfile_of_two_hosts(data, tmp_path, stand_ins):
    (tmp_path / "host file").write_text("# ours\nnode1 slots=1\nnode2 slots=1  # the new one\n")
    line = [str(ROOT / "launch/multinode.sh"), "--hostfile", str(tmp_path / "host file"), "--port", str(free_port())]
    (output,) = run_nodes([[*line, *arguments(data, tmp_path)]], PATH=stand_ins)
    assert "multinode: 2 rank(s) on 2 host(s): node1, node2" in output
    check_run(tmp_path, output, "launch/multinode.sh --hostfile HOSTFILE --resume")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_slurm_on_two_nodes(data, tmp_path, stand_ins):
    copy = shutil.copy(ROOT / "launch/slurm.sh", tmp_path / "slurm_script")  # sbatch runs a copy too
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": str(free_port()), "SLURM_SUBMIT_DIR": str(ROOT)}
    (output,) = run_nodes([["bash", copy, *arguments(data, tmp_path)]], PATH=stand_ins, NPROC="1", **job)
    assert "on 2 node(s): localhost node2; they meet at localhost:" in output
    check_run(tmp_path, output, "sbatch --nodes 2 launch/slurm.sh --resume")


@pytest.mark.parametrize("script", ["torchrun", "slurm", "multinode"])
def test_help_is_the_comment_at_the_top(script):
    result = subprocess.run([str(ROOT / f"launch/{script}.sh"), "--help"], env=variables(), capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.startswith("Trains ") and f"launch/{script}.sh" in result.stdout
    assert "set -euo" not in result.stdout and "SBATCH --" not in result.stdout


def test_the_package_is_a_command_too():
    helps = [
        subprocess.run(command, env=variables(), capture_output=True, text=True, check=True).stdout
        for command in ([sys.executable, "-m", module, "--help"] for module in ("celo2_pretrain", "celo2_pretrain.cli"))
    ]
    assert helps[0] == helps[1] and "meta-train" in helps[0]


@pytest.mark.parametrize(
    "line, message",
    [
        ("torchrun --nproc x", "torchrun: error: --nproc x: must be a whole number"),
        ("torchrun --nproc 0", "torchrun: error: --nnodes 1 --nproc 0: must be above 0"),
        ("torchrun --nnodes 2 --nproc 1", "needs --node-rank, 0 to 1"),
        ("torchrun --nnodes 2 --nproc 1 --node-rank 0", "needs --master"),
        ("torchrun --nnodes 2 --nproc 1 --node-rank 2 --master a", "--node-rank 2: must be below --nnodes 2"),
        ("torchrun --nnodes", "--nnodes needs a value"),
        ("multinode optimizer.lr=1", "multinode: error: give --hostfile FILE"),
        ("multinode --hostfile /no/such/file", "multinode: error: hostfile '/no/such/file' does not exist"),
        ("slurm optimizer.lr=1", "slurm: error: not in a Slurm job"),
    ],
)
def test_wrong_options_are_refused_in_one_line(line, message):
    script, *options = line.split()
    result = subprocess.run([str(ROOT / f"launch/{script}.sh"), *options], env=variables(), capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert message in result.stderr and result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "does not exist"),
        ("", "names no host"),
        ("# nothing\n\n", "names no host"),
        ("node1 slots=8\nnode2\n", "line 2: node2 has no slots"),
        ("node1 slots=8\nnode1 slots=4\n", "line 2: node1 is there twice"),
        ("node1 slots=0\n", "slots=0: must be a whole number from 1"),
        ("node1 slots=many\n", "slots=many: must be a whole number"),
        ("node1 slots=8 max=9\n", "line 1: 'node1 slots=8 max=9' is not of the form"),
        ("$(reboot) slots=1\n", "is not of the form"),
        (b"\xff\xfe\x00\x81" * 9, "is not text"),
    ],
)
def test_bad_hostfile_is_refused_by_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "hosts").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        read_hostfile(str(tmp_path / "hosts"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_hostfile_keeps_its_order(tmp_path):
    (tmp_path / "hosts").write_text("b.example slots=2\n\n10.0.0.1\tslots=16 # new\na-1 slots=1")
    assert list(read_hostfile(str(tmp_path / "hosts")).items()) == [("b.example", 2), ("10.0.0.1", 16), ("a-1", 1)]


@pytest.mark.parametrize(
    "launched, command",
    [
        ({}, "celo2-pretrain train --resume 'runs/a b' train.max_steps=8"),
        ({"WORLD_SIZE": "4", "CROSS_SIZE": "1"}, "deepspeed --no_local_rank --quiet --num_gpus 4 "),
        ({"WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "1"}, "torchrun --nproc_per_node 1 "),
    ],
)
def test_resume_command_is_for_the_launcher_that_started_the_run(monkeypatch, launched, command):
    for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS", "RANK", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert resume_command(load_config(None, ["run_dir=runs/a b", "train.max_steps=4"]), 8).startswith(command)


@pytest.mark.parametrize(
    "launched, command",
    [
        (
            {"WORLD_SIZE": "2", "CROSS_SIZE": "1"},
            "deepspeed --no_local_rank --quiet --num_gpus 2 --module celo2_pretrain train --resume ",
        ),
        (
            {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"},
            "torchrun --nproc_per_node 2 -m celo2_pretrain train --resume ",
        ),
    ],
)
def test_resume_command_of_an_installed_package_names_the_module(monkeypatch, launched, command):
    for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS", "RANK", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["/site-packages/celo2_pretrain/__main__.py", "train"])
    assert resume_command(load_config(None, ["run_dir=runs/a"])).startswith(command)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script):
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert checker, "shellcheck is missing: pip install -e .[dev]"
    # SC2317, SC2329: it takes what follows a sourced setup.sh, which ends in `return || exit`, for unreachable.
    result = subprocess.run([checker, "-x", "-e", "SC2317,SC2329", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
