"""What the processes of tests have imported when they start: `warm.py` forks them from one that imports this module."""

import logging
import os

import torch

from celo2_pretrain.cli import quiet_libraries

quiet_libraries()

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (imported late, with all of torch's compiler)
import matplotlib.pyplot  # noqa: F401
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # noqa: F401

import celo2_pretrain.optimizer.celo2
import celo2_pretrain.train.loop  # noqa: F401

torch.set_num_threads(1)
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
assert len(os.listdir("/proc/self/task")) == 1, "a fork has only the thread that forks"
