"""How large an error the matrix allows, by kind.

`update`: the Euclidean norm of parameter − expected over that of the expected *update*, tensor by tensor and step by
step, so that a wrong update can't hide behind a large parameter; one float32 rounding of the stored parameter (1.2e-7 of
its largest entry) is left out of each difference. `gradient`, `state`: largest |difference| over the largest |expected|
of the tensor. The last three are exact: what the forward pass sees is the rounded master, ranks agree bit for bit, a
skipped step changes nothing.
"""

from .cells import Cell

TOLERANCE = {"update": 1e-5, "gradient": 1e-5, "state": 5e-6, "model": 0.0, "ranks": 0.0, "overflow": 0.0}

# Round-robin cells are fed gradients that equal the used ones to round-off only (see `Cell.gradients_from_plain`), and
# Newton–Schulz amplifies that: small singular values grow up to 485-fold.
UPDATE_FROM_PLAIN = 1e-4

# A difference of 1e-7 in a direction makes a bfloat16 rounding fall the other way, and the next product's with it: up to
# bfloat16's own error of a few per cent. Small matrices, of which few roundings flip, mostly agree to 1e-6.
UPDATE_BF16_PRODUCTS = 0.05

# 16-bit gradients are only required to be the float32 ones in size and direction, all tensors taken together: that
# shows a wrong loss scale, a lost micro-batch or a missing rank.
GRADIENT_16BIT = 0.1


def allowed(cell: Cell, kind: str) -> float:
    if kind == "gradient" and cell.precision != "fp32":
        return GRADIENT_16BIT
    if kind == "update" and cell.extra == "bf16_products":
        return UPDATE_BF16_PRODUCTS
    return UPDATE_FROM_PLAIN if kind == "update" and cell.gradients_from_plain else TOLERANCE[kind]
