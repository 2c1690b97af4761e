"""`python -m celo2_pretrain COMMAND` is `celo2-pretrain COMMAND`."""

import sys

from celo2_pretrain.cli import main

if __name__ == "__main__":  # not in the processes that meta-eval starts
    sys.exit(main())
