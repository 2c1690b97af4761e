"""Which form of Newton–Schulz for which shape and dtype: error and time.

    python benchmarks/newton_schulz.py      -> results/newton_schulz.csv and a table

`round-off` is the Frobenius distance to the same iteration in float64, `to polar` that to the float64 polar factor
U Vᵀ (what the iteration aims at), both relative to the exact result's norm, the largest over random matrices whose
singular values fall evenly over 0, 1, 3 and 5 decades. Times are medians of calls that take turns; `ratio` is to
the direct float32 form.
"""
from __future__ import annotations

import argparse
import statistics
import time

import torch

from celo2_pretrain.kernels.newton_schulz import COEFFICIENTS, _direct, _gram, use_gram
from report import RESULTS, device_name, write_csv

SHAPES = [(64, 64), (64, 256), (256, 256), (256, 512), (256, 1024), (768, 768), (768, 3072)]


def matrix(rows: int, cols: int, decades: float) -> torch.Tensor:
    u = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(cols, rows, dtype=torch.float64))[0]
    return u * 10 ** -(decades * torch.linspace(0, 1, rows, dtype=torch.float64)) @ v.mT


def forms(coefficients):
    return {"direct fp32": lambda x: _direct(x, coefficients), "gram fp32": lambda x: _gram(x, coefficients),
            "direct bf16": lambda x: _direct(x.bfloat16(), coefficients).float()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    rows = []
    for shape in SHAPES:
        cases = []
        for decades in (0, 1, 3, 5):
            x = matrix(*shape, decades)
            u, _, v = torch.linalg.svd(x, full_matrices=False)
            cases.append((x / x.norm(), u @ v))
        for name, coefficients in COEFFICIENTS.items():
            made = forms(coefficients)
            times = {form: [] for form in made}
            x32 = cases[1][0].float().to(device)
            for number in range(args.rounds + 1):
                for form, run in made.items():
                    begin = time.perf_counter()
                    run(x32).sum().item()
                    if number:
                        times[form].append(time.perf_counter() - begin)
            for form, run in made.items():
                roundoff = polar = 0.0
                for x, factor in cases:
                    exact, ours = _direct(x, coefficients), run(x.float().to(device)).cpu().double()
                    roundoff = max(roundoff, ((ours - exact).norm() / exact.norm()).item())
                    polar = max(polar, ((ours - factor).norm() / factor.norm()).item())
                ratios = [a / b for a, b in zip(times[form], times["direct fp32"])]
                low, middle, high = statistics.quantiles(ratios, n=4)
                rows.append({"device": device_name(device), "threads": torch.get_num_threads(),
                             "shape": f"{shape[0]}x{shape[1]}", "coefficients": name, "form": form,
                             "roundoff": f"{roundoff:.1e}", "to_polar": round(polar, 3),
                             "ms": round(1e3 * statistics.median(times[form]), 2), "ratio": round(middle, 2),
                             "ratio_q1": round(low, 2), "ratio_q3": round(high, 2),
                             "chosen": form == ("gram fp32" if use_gram(shape) else "direct fp32")})
                row = rows[-1]
                print(f"{row['shape']:>9} {name:13s} {form:11s} round-off {row['roundoff']}  to polar {row['to_polar']:.3f}  "
                      f"{row['ms']:8.2f} ms  {row['ratio']:.2f} x ({row['ratio_q1']:.2f} to {row['ratio_q3']:.2f})"
                      f"{'  <- used' if row['chosen'] else ''}")
    write_csv(RESULTS / "newton_schulz.csv", rows)


if __name__ == "__main__":
    main()
