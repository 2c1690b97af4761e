"""Which launcher started this process, and the command that goes on with its run."""

import os
import shlex
import sys

from celo2_pretrain.config import Config
from celo2_pretrain.train.start.ranks import world_from_environment


def resume_command(config: Config, max_steps: int | None = None) -> str:
    """The command that trains on from the run's newest checkpoint, for the launcher that started this process.

    Args:
        max_steps: where that is to end, if elsewhere than this run.
    """
    env = os.environ
    _, world_size = world_from_environment()
    arguments = f"--resume {shlex.quote(config.run_dir)}" + (f" train.max_steps={max_steps}" if max_steps else "")
    names = [name for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS") if name in env]
    variables = "".join(f"{name}={shlex.quote(env[name])} " for name in names)
    script = shlex.quote(os.path.relpath(sys.argv[0]))
    by_module = os.path.basename(sys.argv[0]) in ("__main__.py", "cli.py", "celo2-pretrain")  # not by launch/pretrain.py
    if "TORCHELASTIC_RUN_ID" in env:
        nodes, here = int(env.get("GROUP_WORLD_SIZE", 1)), env.get("LOCAL_WORLD_SIZE", str(world_size))
        if "SLURM_JOB_ID" in env and "SLURM_NODEID" in env:
            return f"sbatch --nodes {nodes} launch/slurm.sh {arguments}"
        if nodes > 1:
            return (
                f"{variables}launch/torchrun.sh --nnodes {nodes} --node-rank {env['GROUP_RANK']} --master "
                f"{env['MASTER_ADDR']}:{env['MASTER_PORT']} --nproc {here} {arguments}   (on each node, with its own "
                f"--node-rank)"
            )
        return f"{variables}torchrun --nproc_per_node {here} {'-m celo2_pretrain train' if by_module else script} {arguments}"
    if int(env.get("CROSS_SIZE", 1)) > 1:  # DeepSpeed's launcher sets it to the number of nodes
        return f"{variables}launch/multinode.sh --hostfile HOSTFILE {arguments}"
    if world_size == 1:
        return f"celo2-pretrain train {arguments}"
    driver = "--module celo2_pretrain train" if by_module else script
    return f"{variables}deepspeed --no_local_rank --quiet --num_gpus {world_size} {driver} {arguments}"
