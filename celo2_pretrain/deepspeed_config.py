"""The DeepSpeed configuration that a run's config stands for."""

import copy

from celo2_pretrain.common.errors import UserError, shown
from celo2_pretrain.common.settings import merge
from celo2_pretrain.config import Config, accumulation_steps

# What the loop and the checkpoints rely on; change them by the keys named here.
OURS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "train.grad_clip",
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
    "checkpoint": "checkpoint.*",
    "zero_optimization.stage": "train.zero_stage",
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision",
    "bfloat16": "train.precision",  # which DeepSpeed reads only where there is no bf16
}


def deepspeed_config(config: Config, world_size: int) -> dict:
    """DeepSpeed's configuration as a dictionary. Raises UserError where the raw `deepspeed` section sets what other keys
    say, or what DeepSpeed refuses."""
    for name, instead in OURS.items():
        section, _, last = name.rpartition(".")
        raw = config.deepspeed.get(section, {}) if section else config.deepspeed
        if not isinstance(raw, dict):  # `true` would replace what is made from the other keys
            raise UserError(
                f"deepspeed.{section}={shown(raw)}: must be a mapping, and {name} is set from {instead}: change "
                f"that and remove deepspeed.{section}"
            )
        if last in raw:
            raise UserError(f"deepspeed.{name} is set from {instead}: change that and remove deepspeed.{name}")
    if config.train.precision == "fp16" and config.train.zero_stage == 0:
        # DeepSpeed 0.19's optimizer for this case divides gradients by a loss scale that the loss was never multiplied by.
        raise UserError(
            "train.precision=fp16 without ZeRO trains with wrong gradients in DeepSpeed 0.19: use "
            "train.zero_stage=1 (the same on one rank), or train.precision=bf16"
        )
    made = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(config, world_size),
        "gradient_clipping": config.train.grad_clip,
        "zero_optimization": {"stage": config.train.zero_stage},
        "zero_allow_untested_optimizer": True,  # DeepSpeed lists the optimizers that it knows to be elementwise
        "zero_force_ds_cpu_optimizer": False,  # or CPU offload would demand DeepSpeed's own Adam
        "bf16": {"enabled": config.train.precision == "bf16"},
        "fp16": {"enabled": config.train.precision == "fp16"},
        "steps_per_print": 2**31 - 1,  # the loop prints
    }
    if config.deepspeed:
        check_raw(made, config.deepspeed)
    return merge(made, config.deepspeed)


def check_raw(made: dict, raw: dict) -> None:
    """Raises UserError for what of `raw` DeepSpeed can't read: when it builds its engine, the run before has gone already."""
    from deepspeed.runtime.config import DeepSpeedConfig  # late: the command line quietens it first
    from deepspeed.utils import logger
    from pydantic import ValidationError

    for part in (*({name: value} for name, value in raw.items()), raw):  # one by one, to name what is wrong
        whole = copy.deepcopy(merge(made, part))
        del whole["train_batch_size"]  # it would be compared with the number of ranks, which haven't met yet
        logger.disabled = True  # the engine warns of the same, once
        try:
            DeepSpeedConfig(whole)
        except Exception as error:  # it reads what it is given, and fails as that comes
            why = str(error) or type(error).__name__
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                why = f"{'.'.join(map(str, first['loc']))}={shown(first['input'])}: {first['msg']}"
            name = f"deepspeed.{next(iter(part))[:100]}" if len(part) == 1 else "deepspeed"
            raise UserError(
                f"{name}: DeepSpeed can't read it: {why}; its keys are listed at https://www.deepspeed.ai/docs/config-json/"
            ) from None
        finally:
            logger.disabled = False
