"""`celo2-pretrain train` for launchers that start a script on every rank: deepspeed, torchrun, srun.

    deepspeed --no_local_rank launch/pretrain.py --config configs/gpt2_124m.yaml optimizer.lr=5e-4

`--base64 TEXT` stands for arguments, each ended by a null byte, that have to pass a shell (launch/multinode.sh).
"""

import base64
import sys

from celo2_pretrain.cli import main

if __name__ == "__main__":
    if sys.argv[1:2] == ["--base64"]:
        try:
            (text,) = sys.argv[2:]
            *arguments, rest = base64.b64decode(text, validate=True).decode().split("\0")
            if rest or not arguments:
                raise ValueError
        except ValueError:
            print(
                f"pretrain: error: --base64 {' '.join(sys.argv[2:])[:80]}: give train's arguments, each ended by a null "
                "byte, as base64",
                file=sys.stderr,
            )
            sys.exit(2)
        sys.argv[1:] = arguments  # the run's record shows the real ones
    sys.exit(main(["train", *sys.argv[1:]]))
