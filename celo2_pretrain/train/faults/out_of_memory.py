"""Out of memory: what to do about it, in one line."""

import contextlib

import torch

from celo2_pretrain.config import Config


@contextlib.contextmanager
def explained(config: Config):
    """Turn a failed allocation, of Python, of torch on the CPU or on a GPU, into a MemoryError that says what saves memory.

    The kernel's own way (SIGKILL) can't be caught: the launcher and supervisor.py report it.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        first = str(error).split(". ")[:2] or ["MemoryError"]
        train, less = config.train, []
        if train.micro_batch_size > 1:
            less.append(f"a smaller train.micro_batch_size (now {train.micro_batch_size})")
        if not config.model.activation_checkpointing:
            less.append("model.activation_checkpointing=true")
        if train.zero_stage < 3:
            less.append(f"a higher train.zero_stage (now {train.zero_stage})")
        if config.optimizer.name != "adamw" and config.optimizer.state_dtype == "fp32":
            less.append("optimizer.state_dtype=bf16")
        less.append("deepspeed.zero_optimization.offload_optimizer.device=cpu")
        raise MemoryError(
            f"out of memory ({' '.join('. '.join(first).split())}): try {', '.join(less)}; "
            f"`celo2-pretrain plan` says what each takes"
        ) from error
