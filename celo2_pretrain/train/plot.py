"""Loss curves of one or more runs in one picture."""
from pathlib import Path

from celo2_pretrain.train.errors import UserError
from celo2_pretrain.train.metrics import read_metrics


def plot_runs(runs: list[str], out: str, title: str = "") -> None:
    """Draw training (thin) and validation loss (thick, with points) against steps into the PNG, PDF or SVG `out`.

    Raises UserError for a run without metrics, or a kind of file that cannot be drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    suffix = Path(out).suffix
    if suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"cannot draw {out!r}: its name must end in .png, .pdf or .svg")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    highest, names = 0.0, [Path(run).resolve().name for run in runs]
    for color, (run, name) in enumerate(zip(runs, names)):
        records = read_metrics(run)
        train = [(r["step"], r["loss"]) for r in records if "loss" in r]
        val = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
        if not train and not val:
            raise UserError(f"{run!r} has no metrics.jsonl with losses: give folders of runs")
        label = name if names.count(name) == 1 else run
        if train:
            axes.plot(*zip(*train), color=f"C{color}", linewidth=0.8, alpha=0.5, label=None if val else label)
        if val:
            label = f"{label} (validation {val[-1][1]:.3f})"
            axes.plot(*zip(*val), color=f"C{color}", marker="o", markersize=3, label=label)
        # The first few steps would squeeze the rest of the curve.
        losses = sorted(loss for _, loss in train or val)
        highest = max(highest, losses[-1 - len(losses) // 30])
    axes.set_ylim(top=highest * 1.02)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = Path(out).with_name(f".{Path(out).name}.unfinished{suffix}")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(temporary, dpi=130)
    plt.close(figure)
    temporary.replace(out)
