"""The DeepSpeed configuration that a run's config stands for."""
from celo2_pretrain.train.config import Config, accumulation_steps, merge
from celo2_pretrain.train.errors import UserError, shown

# What the loop and the checkpoints rely on; change them by the keys named here.
OURS = {
    "train_batch_size": "train.global_batch_size", "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size", "gradient_clipping": "train.grad_clip",
    "optimizer": "optimizer.*", "scheduler": "schedule.*", "checkpoint": "checkpoint.*",
    "zero_optimization.stage": "train.zero_stage", "bf16.enabled": "train.precision", "fp16.enabled": "train.precision",
    "bfloat16": "train.precision",  # which DeepSpeed reads only where there is no bf16
}


def deepspeed_config(config: Config, world_size: int) -> dict:
    """DeepSpeed's configuration as a dictionary. Raises UserError where the raw `deepspeed` section sets what other keys
    say."""
    for name, instead in OURS.items():
        section, _, last = name.rpartition(".")
        raw = config.deepspeed.get(section, {}) if section else config.deepspeed
        if not isinstance(raw, dict):  # `true` would replace what is made from the other keys
            raise UserError(f"deepspeed.{section}={shown(raw)}: must be a mapping, and {name} is set from {instead}: change "
                            f"that and remove deepspeed.{section}")
        if last in raw:
            raise UserError(f"deepspeed.{name} is set from {instead}: change that and remove deepspeed.{name}")
    if config.train.precision == "fp16" and config.train.zero_stage == 0:
        # DeepSpeed 0.19's optimizer for this case divides gradients by a loss scale that the loss was never multiplied by.
        raise UserError("train.precision=fp16 without ZeRO trains with wrong gradients in DeepSpeed 0.19: use "
                        "train.zero_stage=1 (the same on one rank), or train.precision=bf16")
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
    return merge(made, config.deepspeed)
