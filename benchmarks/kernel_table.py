"""What do the Triton kernels cost on each GPU? Compiled ahead of time, on any machine.

    python benchmarks/kernel_table.py        -> results/kernels.csv, and the table on the screen

`dtype` is that of parameters and gradients, `states` that of the accumulators. `streamed` are the bytes that a kernel
loads and stores for each element, `bound` what it can't do without; `shared` are bytes of vectors, weights and partial
sums, which neighbouring programs share and caches serve. Kernels without a bound work on vectors and sums, which are
small beside the tensors.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from itertools import product
from pathlib import Path

from celo2_pretrain.kernels.resources import DTYPES, TARGETS, kernels, measure

COLUMNS = ("kernel", "dtype", "states", "aligned", "target", "registers", "spilled", "streamed", "bound", "shared")


def rows(dtypes: list[str], targets: list[str]) -> list[tuple]:
    """One row a kernel, dtype, dtype of the accumulators, alignment and target, in the order of COLUMNS."""
    found, seen = [], set()
    for target, dtype, states, aligned in product(targets, dtypes, ("fp32", "bf16", "fp8"), (True, False)):
        for kernel in kernels(dtype, aligned, target.startswith("gfx"), states):
            varies = {"G", "P", "S", "ALIGNED"} & set(kernel.constants)  # the rest is always float32
            if kernel.name == "symmetric_product":
                varies = {"P", "ALIGNED"}
            kind = (
                dtype if varies & {"G", "P"} else "fp32",
                states if "S" in varies else "",
                ("yes" if aligned else "no") if "ALIGNED" in varies else "",
            )
            if (kernel.name, target, kind) in seen:
                continue
            seen.add((kernel.name, target, kind))
            cost = measure(kernel, target)
            moved = (f"{cost.streamed:g}", kernel.bound, f"{cost.shared:.2f}") if kernel.bound else ("", "", "")
            found.append((kernel.name, *kind, target, cost.registers, cost.spilled, *moved))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=sorted(DTYPES), action="append", help="of parameters and gradients (all)")
    parser.add_argument("--target", choices=sorted(TARGETS), action="append", help="(all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernels.csv")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 replaces the compiler that this measures: unset it")
    table = rows(options.dtype or list(DTYPES), options.target or list(TARGETS))
    widths = [max(len(str(row[k])) for row in [COLUMNS, *table]) for k in range(len(COLUMNS))]
    for row in [COLUMNS, *table]:
        print("  ".join(str(x).ljust(width) for x, width in zip(row, widths)).rstrip())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *table])
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
