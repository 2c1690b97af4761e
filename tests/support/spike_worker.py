"""`train`, where the batch that begins at window SPIKE has a loss 5 nats too high: spike_worker.py SPIKE, then arguments."""

import os
import sys

from celo2_pretrain import cli
from celo2_pretrain.data.loader import TrainLoader
from celo2_pretrain.train import trainer

spike, at = int(sys.argv[1]), -1
real_batch, real_loss = TrainLoader.batch, trainer.training_loss


def batch(self, samples, micro):
    global at
    at = samples
    return real_batch(self, samples, micro)


def training_loss(*arguments):
    loss, cross_entropy = real_loss(*arguments)
    return (loss + 5, cross_entropy + 5) if at == spike else (loss, cross_entropy)


TrainLoader.batch, trainer.training_loss = batch, training_loss
code = cli.main(["train", *sys.argv[2:]])
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
