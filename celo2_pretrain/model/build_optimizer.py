"""The optimizer of a run."""

import torch

from celo2_pretrain import Celo2, param_groups
from celo2_pretrain.common.errors import UserError
from celo2_pretrain.config import Optimizer
from celo2_pretrain.model.guarded_adamw import GuardedAdamW


def build_optimizer(model: torch.nn.Module, config: Optimizer) -> torch.optim.Optimizer:
    """Celo2, Celo2-base or AdamW(0.9, 0.95), to be wrapped by DeepSpeed.

    All three sort the tensors alike. Hidden matrices are stepped at `lr` with `weight_decay`. The others, which are
    embeddings, head and 1-D tensors, have `adamw_weight_decay`, and AdamW at `adamw_lr_multiplier` × lr steps them, or
    Celo2-base's own rule at `lr`.
    """
    groups = param_groups(model)
    if config.name == "adamw":
        return GuardedAdamW(
            [
                {
                    "params": group["params"],
                    "rule": group["rule"],  # for the norms' names
                    "weight_decay": config.weight_decay if group["rule"] == "celo2" else config.adamw_weight_decay,
                    "lr": config.lr * (1.0 if group["rule"] == "celo2" else config.adamw_lr_multiplier),
                }
                for group in groups
            ],
            betas=(0.9, 0.95),
            eps=1e-8,
        )
    base = config.name == "celo2_base"
    try:
        return Celo2(
            model.parameters() if base else groups,
            lr=config.lr,
            weights=config.weights,
            weight_decay=config.weight_decay,
            adamw_weight_decay=config.adamw_weight_decay,
            orthogonalize=not base,
            adamw_lr_multiplier=config.adamw_lr_multiplier,
            state_dtype=config.state_dtype,
            newton_schulz_dtype=config.newton_schulz_dtype,
            check_replicas_every=config.check_replicas_every,
            nonfinite="skip",
        )  # train/guard.py counts them
    except (ValueError, OSError) as error:  # the weights: a path or repository that isn't there, or holds other arrays
        raise UserError(f"optimizer.weights={config.weights!r}: {error}") from None
