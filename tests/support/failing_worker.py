"""`train`, in which one rank fails in a step: failing_worker.py RANK STEP HOW, then train's arguments."""

import os
import signal
import sys
import time

from celo2_pretrain import cli
from celo2_pretrain.common.errors import UserError
from celo2_pretrain.train import trainer

bad_rank, bad_step, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
calls = 0
real = trainer.training_loss


def training_loss(*arguments):
    global calls
    calls += 1
    if os.environ["RANK"] == bad_rank and calls == bad_step:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hung":
            time.sleep(10000)
        if how == "drifted":
            next(arguments[0].module.parameters()).data.add_(1)
            return real(*arguments)
        if how == "refused":
            raise UserError("this rank alone refuses")
        raise ZeroDivisionError("made to fail")
    return real(*arguments)


trainer.training_loss = training_loss
sys.exit(cli.main(["train", *sys.argv[4:]]))
