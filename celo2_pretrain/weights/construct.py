"""With what does our meta-training begin? Run `python -m celo2_pretrain.weights.construct` to make these weights again.

They are constructed: a linear combination of normalised input features that the MLP passes
through exactly. A unit pair relu(x), relu(-x) in the first layer, the identity in the second, and the
difference of the pair at output 0 give x itself. Both use features of the first 15 only, so that they also
serve 1-D tensors.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from celo2_pretrain.weights.files import save_weights
from celo2_pretrain.weights.load import BUNDLED
from celo2_pretrain.weights.mlp import DIMS, MLP

# Rows of w0, in the order of `reference.features`; of three decays, 0.9 comes first.
G, M_FAST, M_FAST_RSQRT_V, G_RSQRT_V = 0, 3, 7, 14

RECIPES = {
    "constructed": ("m(0.9) + 0.2 g", {M_FAST: 1.0, G: 0.2}),
    # Without orthogonalisation nothing else evens out the scale of the elements: use Adam's normalisation.
    "constructed-base": ("m(0.9) rsqrt(v) + 0.2 g rsqrt(v)", {M_FAST_RSQRT_V: 1.0, G_RSQRT_V: 0.2}),
}


# Those that change sign with the gradient: g, clipped g, m, m rsqrt(v), g and m over the factored moments, g rsqrt(v).
# The parameter itself is left out: it makes weights grow or decay, and growth looks good in short trainings only.
ODD = (0, 1, 3, 4, 5, 7, 8, 9, 11, 12, 13, 14, 27, 28, 29)


def construct(coefficients: dict[int, float], slope: float = 1.0) -> MLP:
    """The MLP whose output 0 is `x = sum_i coefficients[i] · feature_i` exactly; outputs 1 and 2 are zero.

    Where |x| is above 1, what is above counts `slope` times.
    """
    features, hidden, _, outputs = DIMS
    w0, w2 = torch.zeros(features, hidden), torch.zeros(hidden, outputs)
    for feature, coefficient in coefficients.items():
        w0[feature, 0], w0[feature, 1] = coefficient, -coefficient
    w2[0, 0], w2[1, 0] = 1.0, -1.0
    w1, b1 = torch.eye(hidden), torch.zeros(hidden)
    if slope != 1:  # two more units of the second layer, relu(relu(x) - 1) and relu(relu(-x) - 1)
        for unit, of, sign in ((2, 0, 1.0), (3, 1, -1.0)):
            w1[unit, unit], w1[of, unit], b1[unit], w2[unit, 0] = 0.0, 1.0, -1.0, sign * (slope - 1)
    return MLP(w0, torch.zeros(hidden), w1, b1, w2, torch.zeros(outputs))


def write(directory: Path) -> list[Path]:
    """Write every constructed file into `directory`; the same bytes each time."""
    paths = []
    for name, (formula, coefficients) in RECIPES.items():
        paths.append(directory / BUNDLED[name].name)
        save_weights(
            construct(coefficients),
            paths[-1],
            {"made_by": "celo2_pretrain.weights.construct", "direction": formula, "meta_trained": False},
        )
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description="Construct the weights that meta-training begins with.")
    parser.add_argument(
        "--output",
        type=Path,
        default=BUNDLED["constructed"].parent,
        help="directory to write into (default: the package, replacing the bundled files)",
    )
    for path in write(parser.parse_args().output):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
