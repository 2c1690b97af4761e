"""Which form of Newton–Schulz for which shape and dtype: error and time.

    python benchmarks/newton_schulz.py                  -> results/newton_schulz.csv and a table
    python benchmarks/newton_schulz.py --rounds 0       -> errors only, for a machine too busy to time anything
    python benchmarks/newton_schulz.py --shape 768 3072 -> that shape only

For each spectrum of singular values (falling evenly over 0, 1, 3 and 5 decades, and a Gaussian matrix's) there are two
Frobenius distances: `off …` to the same iteration in float64, relative to that (what the form and the dtype cost), and
`polar …` to the float64 polar factor U Vᵀ that the iterations aim at, relative to that; the row `float64` shows
how far the iterations themselves are from it. Times are medians of calls that take turns; `ratio` is to the direct
float32 form in the same turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from celo2_pretrain.kernels.newton_schulz import BF16_GRAM_ITERATIONS, COEFFICIENTS, _direct, _gram, use_gram

from report import RESULTS, device_name, quartiles, write_csv

SHAPES = [(64, 64), (64, 256), (256, 256), (256, 512), (256, 1024), (768, 768), (768, 3072)]
SPECTRA = ("0", "1", "3", "5", "gauss")


def matrix(rows: int, cols: int, spectrum: str) -> tuple[Tensor, Tensor]:
    """(X of norm 1, its polar factor), float64, rows ≤ cols."""
    u = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(cols, rows, dtype=torch.float64))[0].mT
    values = (
        torch.linalg.svdvals(torch.randn(rows, cols, dtype=torch.float64))
        if spectrum == "gauss"
        else 10 ** -(float(spectrum) * torch.linspace(0, 1, rows, dtype=torch.float64))
    )
    x = u * values @ v
    return x / x.norm(), u @ v


def forms(coefficients: tuple) -> dict[str, Callable[[Tensor], Tensor]]:
    first, rest = coefficients[:BF16_GRAM_ITERATIONS], coefficients[BF16_GRAM_ITERATIONS:]
    return {
        "direct fp32": lambda x: _direct(x, coefficients),
        "gram fp32": lambda x: _gram(x, coefficients),
        "direct bf16": lambda x: _direct(x.bfloat16(), coefficients).float(),
        "gram bf16": lambda x: _gram(x.bfloat16(), coefficients).float(),
        f"gram {len(first)}+{len(rest)} bf16": lambda x: _gram(_gram(x.bfloat16(), first), rest).float(),
    }


def chosen(form: str, shape: tuple[int, int], coefficients: tuple) -> bool:
    """Whether kernels/newton_schulz.py takes this form where it computes in this dtype."""
    dtype = torch.bfloat16 if form.endswith("bf16") else torch.float32
    gram = use_gram(shape, coefficients, dtype)
    return (
        form.startswith(f"gram {BF16_GRAM_ITERATIONS}+" if dtype == torch.bfloat16 else "gram")
        if gram
        else (form.startswith("direct"))
    )


def times(made: dict[str, Callable[[Tensor], Tensor]], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each form in each round; the first round isn't counted."""
    found: dict[str, list[float]] = {form: [] for form in made}
    for number in range(rounds + 1):
        for form, run in made.items():
            begin = time.perf_counter()
            run(x).sum().item()
            if number:
                found[form].append(time.perf_counter() - begin)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="how often a form is timed; 0: not at all, else at least 2")
    parser.add_argument("--shape", type=int, nargs=2, help="rows and columns (rows ≤ columns), without writing the CSV")
    args = parser.parse_args()
    if args.shape and not 0 < args.shape[0] <= args.shape[1]:
        parser.error(f"--shape wants rows and columns with 0 < rows <= columns, got {args.shape[0]} {args.shape[1]}")
    if args.rounds < 0 or args.rounds == 1:
        parser.error(f"--rounds wants 0 or at least 2, got {args.rounds}")
    device = torch.device(args.device)
    torch.manual_seed(0)
    rows = []
    for shape in [tuple(args.shape)] if args.shape else SHAPES:
        cases = {spectrum: matrix(*shape, spectrum) for spectrum in SPECTRA}
        for name, coefficients in COEFFICIENTS.items():
            exact = {spectrum: _direct(x, coefficients) for spectrum, (x, _) in cases.items()}
            made = forms(coefficients)
            seconds = times(made, cases["1"][0].float().to(device), args.rounds) if args.rounds else {}
            for form, run in {"float64": None, **made}.items():
                row = {
                    "device": device_name(device),
                    "threads": torch.get_num_threads(),
                    "shape": f"{shape[0]}x{shape[1]}",
                    "coefficients": name,
                    "form": form,
                }
                off, polar = {}, {}
                for spectrum, (x, factor) in cases.items():
                    ours = run(x.float().to(device)).cpu().double() if run else exact[spectrum]
                    off[f"off {spectrum}"] = f"{((ours - exact[spectrum]).norm() / exact[spectrum].norm()).item():.1e}"
                    polar[f"polar {spectrum}"] = f"{((ours - factor).norm() / factor.norm()).item():.3g}"
                row |= off | polar
                row |= dict.fromkeys(("ms", "ratio", "ratio q1", "ratio q3"), "")
                if seconds and run:
                    ratios = [a / b for a, b in zip(seconds[form], seconds["direct fp32"])]
                    low, middle, high = quartiles(ratios)
                    row |= {
                        "ms": round(1e3 * statistics.median(seconds[form]), 2),
                        "ratio": round(middle, 2),
                        "ratio q1": round(low, 2),
                        "ratio q3": round(high, 2),
                    }
                row["chosen"] = chosen(form, shape, coefficients) if run else ""
                rows.append(row)
                print(
                    f"{row['shape']:>9} {name:13s} {form:13s} off {' '.join(off.values())}  polar "
                    f"{' '.join(f'{x:>8}' for x in polar.values())}  {row['ms']:>8} ms {row['ratio']:>5} x"
                    f"{'  <- used' if row['chosen'] else ''}",
                    flush=True,
                )
    if not args.shape:
        write_csv(RESULTS / "newton_schulz.csv", rows)


if __name__ == "__main__":
    main()
