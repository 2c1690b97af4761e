"""How the rates of a run's optimizer are set (schedule.py says to what)."""


class Rates:
    """Sets the rates of DeepSpeed's optimizer. The peaks are those at construction: a checkpoint that is loaded
    afterwards brings its own, and `set` puts this run's back, with the other options that may change between runs.

    Each group has its peak as `initial_lr`, as torch's schedulers write it.

    A Celo2-base checkpoint of an earlier version keeps `weight_decay` on all tensors, as its run had it."""

    KEYS = ("lr", "weight_decay", "adamw_weight_decay", "adamw_lr_multiplier", "newton_schulz_dtype")

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.peaks = [{key: group[key] for key in self.KEYS if key in group} for group in optimizer.param_groups]

    def set(self, factor: float) -> None:
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            earlier = group.get("rule") == "celo2" and group.get("adamw_weight_decay") is None
            kept = {"adamw_weight_decay": None} if earlier and "adamw_weight_decay" in peak else {}
            group.update(peak | kept, lr=peak["lr"] * factor, initial_lr=peak["lr"])
