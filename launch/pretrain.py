"""`celo2-pretrain train` for launchers that start a script on every rank: deepspeed, torchrun, srun.

    deepspeed --no_local_rank launch/pretrain.py --config configs/gpt2_124m.yaml optimizer.lr=5e-4
"""
import sys

from celo2_pretrain.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
