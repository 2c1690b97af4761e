"""`python -m tests.equivalence [--world 2] [--filter zero3,bf16] [--backend reference]`: run the matrix, print its table."""

from __future__ import annotations

import argparse
import sys
import time

from .cells import extra_cells, few_cells, half_of_the_cells, matching, pairwise_cells, product_cells, valid_cells
from .launch import Result, run_cells
from .limits import TOLERANCE


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.equivalence", description=__doc__)
    parser.add_argument("--world", default="1,2,3,4", help="numbers of ranks, comma-separated (default %(default)s)")
    parser.add_argument("--filter", default="", help="only cells with all of these words, e.g. zero3,bf16")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--half", action="store_true", help="only half of the matrix")
    part.add_argument("--pairwise", action="store_true", help="only so many cells that every pair of settings is among them")
    part.add_argument("--few", action="store_true", help="only a cell of each stage and precision")
    parser.add_argument(
        "--backend",
        default="",
        choices=("compile", "reference", "triton"),
        help="what computes the passes; triton in its interpreter, which is slow (default: CELO2_BACKEND)",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        choices=("cpu", "cuda"),
        help="cuda: all ranks on one GPU, by NCCL where there is one rank and by gloo where there are more",
    )
    parser.add_argument("--mutation", default="", help="break the optimizer first (see mutations.py)")
    args = parser.parse_args(argv)
    try:
        worlds = [int(word) for word in args.world.split(",")]
        if any(not 1 <= world <= 64 for world in worlds):
            raise ValueError(f"--world wants numbers from 1 to 64, got {args.world!r}")
        some = (
            half_of_the_cells()
            if args.half
            else pairwise_cells()
            if args.pairwise
            else few_cells()
            if args.few
            else valid_cells()
        )
        cells = matching(some, args.filter)
        if not cells:
            raise ValueError(f"no valid cell matches --filter {args.filter}")
    except ValueError as error:
        parser.error(str(error))
    failed = 0
    everything: dict[int, list[Result]] = {}
    print(f"{'ranks':5}  {'cell':42}  " + "  ".join(f"{kind:8}" for kind in TOLERANCE))
    for world in worlds:
        began, tried = time.monotonic(), cells
        if args.device == "cuda" and world > 1:  # over gloo
            tried = [cell for cell in cells if cell.stage != "fsdp2"]
            if tried != cells:
                print(
                    f"{world:5}  fsdp2: not tried, torch's fully_shard over gloo ends with a segmentation fault on "
                    "CUDA tensors"
                )
        results = run_cells(
            world,
            tried,
            backend=args.backend,
            mutation=args.mutation,
            device=args.device,
            progress=lambda result: show(world, result),
        )
        everything[world] = results
        bad = sum(bool(result.failures()) for result in results)
        failed += bad + (not results)  # a world in which nothing was tried has shown nothing
        print(
            f"{world} ranks: {len(results) - bad} of {len(results)} cells hold ({time.monotonic() - began:.0f} s)", flush=True
        )
    print("\n" + summary(everything))
    if cells == valid_cells():
        reasons: dict[str, int] = {}
        for cell in product_cells() + extra_cells():
            if cell.invalid():
                reasons[cell.invalid()] = reasons.get(cell.invalid(), 0) + 1
        for reason, count in reasons.items():
            print(f"invalid: {count:3} cells  {reason}")
    return 1 if failed else 0


def summary(everything: dict[int, list[Result]]) -> str:
    """A Markdown table by stage and precision: cells that hold, and the largest errors over cells and worlds."""
    kinds = ("update", "gradient", "state")
    lines = [
        "| stage | precision | "
        + " | ".join(f"{world} rank{'s' * (world > 1)}" for world in everything)
        + " | "
        + " | ".join(kinds)
        + " |",
        "| --- " * (2 + len(everything) + len(kinds)) + "|",
    ]
    rows = dict.fromkeys((result.cell.stage, result.cell.precision) for results in everything.values() for result in results)
    for stage, precision in rows:
        found = {
            world: [result for result in results if (result.cell.stage, result.cell.precision) == (stage, precision)]
            for world, results in everything.items()
        }
        counts = [f"{sum(not result.failures() for result in results)}/{len(results)}" for results in found.values()]
        numbers = [
            max(
                (
                    result.errors[kind][0]
                    for results in found.values()
                    for result in results
                    if kind in result.errors and not result.cell.gradients_from_plain
                ),
                default=float("nan"),
            )
            for kind in kinds
        ]
        lines.append(" | ".join([f"| {stage}", precision, *counts, *(f"{number:.1e}" for number in numbers)]) + " |")
    return "\n".join(lines)


def show(world: int, result: Result) -> None:
    numbers = "  ".join(f"{result.errors[kind][0]:8.1e}" if kind in result.errors else " " * 8 for kind in TOLERANCE)
    failures = result.failures()
    print(f"{world:5}  {result.cell.name:42}  {numbers}" + ("  FAILS: " + "; ".join(failures) if failures else ""), flush=True)


if __name__ == "__main__":
    sys.exit(main())
