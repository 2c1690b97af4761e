"""How a figure of matplotlib is begun without a display, and how it becomes a file."""

import io
from pathlib import Path

from celo2_pretrain.common.durable import replacing
from celo2_pretrain.common.errors import UserError


def new_figure(path: str | Path, **options):
    """(figure, axes) of matplotlib for the file `path`. Raises UserError for a kind of file that can't be drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if Path(path).suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"cannot draw {str(path)!r}: its name must end in .png, .pdf or .svg")
    return plt.subplots(**{"layout": "constrained", **options})


def save_figure(figure, path: str | Path, dpi: int = 130, **options) -> None:
    """Write the figure, whole or not at all, and close it. A .png gets 128 colours, which makes it a third as large."""
    from matplotlib import pyplot as plt
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        if path.suffix == ".png":
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=dpi, **options)
            # This method keeps the colour of a thin line, where others merge it with a neighbour's.
            image = Image.open(buffer).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE, 3, dither=Image.Dither.NONE)
            image.save(temporary, "PNG", optimize=True)
        else:
            figure.savefig(temporary, format=path.suffix[1:], **options)
    plt.close(figure)
