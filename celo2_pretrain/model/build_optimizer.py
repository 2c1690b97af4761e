"""The optimizer of a run, and how its rates are set (train/schedule.py says to what)."""
import contextlib
import logging

import torch

from celo2_pretrain import Celo2, param_groups
from celo2_pretrain.common.errors import UserError
from celo2_pretrain.config import Optimizer
from celo2_pretrain.optimizer.backends import choose
from celo2_pretrain.train.guard import GuardedAdamW
from celo2_pretrain.train.record.metrics import Metrics


def build_optimizer(model: torch.nn.Module, config: Optimizer) -> torch.optim.Optimizer:
    """Celo2, Celo2-base or AdamW(0.9, 0.95), to be wrapped by DeepSpeed.

    All three sort the tensors alike. Hidden matrices are stepped at `lr` with `weight_decay`. The others, which are
    embeddings, head and 1-D tensors, have `adamw_weight_decay`, and AdamW at `adamw_lr_multiplier` × lr steps them, or
    Celo2-base's own rule at `lr`.
    """
    groups = param_groups(model)
    if config.name == "adamw":
        return GuardedAdamW([
            {"params": group["params"], "rule": group["rule"],  # for the norms' names
             "weight_decay": config.weight_decay if group["rule"] == "celo2" else config.adamw_weight_decay,
             "lr": config.lr * (1.0 if group["rule"] == "celo2" else config.adamw_lr_multiplier)}
            for group in groups], betas=(0.9, 0.95), eps=1e-8)
    base = config.name == "celo2_base"
    try:
        return Celo2(model.parameters() if base else groups, lr=config.lr, weights=config.weights,
                     weight_decay=config.weight_decay, adamw_weight_decay=config.adamw_weight_decay, orthogonalize=not base,
                     adamw_lr_multiplier=config.adamw_lr_multiplier, state_dtype=config.state_dtype,
                     newton_schulz_dtype=config.newton_schulz_dtype, check_replicas_every=config.check_replicas_every,
                     nonfinite="skip")  # train/guard.py counts them
    except (ValueError, OSError) as error:  # the weights: a path or repository that isn't there, or holds other arrays
        raise UserError(f"optimizer.weights={config.weights!r}: {error}") from None


@contextlib.contextmanager
def telling_backend(metrics: Metrics):
    """On rank 0 say what computes Celo2's passes, and why: Celo2 logs it in its first step, when it sees where its tensors
    are, and a log at that level is shown to nobody."""
    log, handler = logging.getLogger(choose.__name__), logging.Handler()
    handler.emit = lambda record: metrics.say(record.getMessage())
    if metrics.active:  # other ranks' warnings stay where they are
        log.setLevel(logging.INFO)
        log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


class Rates:
    """Sets the rates of DeepSpeed's optimizer. The peaks are those at construction: a checkpoint that is loaded
    afterwards brings its own, and `set` puts this run's back, with the other options that may change between runs.

    A Celo2-base checkpoint of an earlier version keeps `weight_decay` on all tensors, as its run had it."""

    KEYS = ("lr", "weight_decay", "adamw_weight_decay", "adamw_lr_multiplier", "newton_schulz_dtype")

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.peaks = [{key: group[key] for key in self.KEYS if key in group} for group in optimizer.param_groups]

    def set(self, factor: float) -> None:
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            earlier = group.get("rule") == "celo2" and group.get("adamw_weight_decay") is None
            kept = {"adamw_weight_decay": None} if earlier and "adamw_weight_decay" in peak else {}
            group.update(peak | kept, lr=peak["lr"] * factor)
