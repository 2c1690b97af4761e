"""Do the tests notice a broken line? Breaks 30 lines one by one, and runs the default tests until one goes red.

    python benchmarks/mutations.py            all, or what is missing since it was stopped; hours on two cores
    python benchmarks/mutations.py decay      only those with this word in their name

It edits this checkout, which must be clean, and puts each line back. Results: runs/mutations.jsonl, a line for each.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "runs/mutations.jsonl"


class Mutation(NamedTuple):
    """A line of `file` in which `whole` becomes `broken`; `first` are the tests that are tried before all others."""

    name: str
    file: str
    whole: str
    broken: str
    first: str


MUTATIONS = [
    Mutation(
        "clamp",
        "celo2_pretrain/optimizer/backends/passes.py",
        "g.float().clamp(-GRAD_CLAMP, GRAD_CLAMP)",
        "g.float().clamp(-GRAD_CLAMP, 2 * GRAD_CLAMP)",
        "tests/optimizer/test_reference.py tests/kernels/test_kernels_cpu.py",
    ),
    Mutation(
        "rms decay of packed states",
        "celo2_pretrain/optimizer/backends/passes.py",
        "values.append(v * RMS_DECAY + g * g * (1 - RMS_DECAY))",
        "values.append(v * RMS_DECAY + g * g)",
        "tests/optimizer/test_packed.py",
    ),
    Mutation(
        "row sums over the other axis",
        "celo2_pretrain/optimizer/backends/passes.py",
        "piece.within(row_sum).add_(s.sum(d0, keepdim=True))",
        "piece.within(row_sum).add_(s.mean(d0, keepdim=True))",
        "tests/optimizer/test_view_steps.py",
    ),
    Mutation(
        "mean of the factored moments",
        "celo2_pretrain/optimizer/backends/passes.py",
        "    mean = total / count\n",
        "    mean = total / (count + 1)\n",
        "tests/optimizer/test_celo2.py",
    ),
    Mutation(
        "all-reduce of pass A",
        "celo2_pretrain/optimizer/step/learned.py",
        "        reduce(sums, self.layout)\n",
        "        reduce(sums[:0], self.layout)\n",
        "tests/optimizer/test_layouts.py",
    ),
    Mutation(
        "all-reduce of pass B",
        "celo2_pretrain/optimizer/step/learned.py",
        "        self.backend.norms(parts, self._tensors_of(parts), self.factors, squares)\n        reduce(flat, self.layout)\n",
        "        self.backend.norms(parts, self._tensors_of(parts), self.factors, squares)\n",
        "tests/optimizer/test_layouts.py",
    ),
    Mutation(
        "decay of tensors that aren't hidden",
        "celo2_pretrain/optimizer/step/learned.py",
        "hidden=self.layout.slices[number].original.hidden)",
        "hidden=True)",
        "tests/optimizer/test_weight_decay.py tests/optimizer/test_groups.py",
    ),
    Mutation(
        "step count of rounded states",
        "celo2_pretrain/optimizer/step/learned.py",
        '                state["step"] += 1\n',
        '                state["step"] += 0\n',
        "tests/optimizer/test_view_steps.py tests/optimizer/test_packed.py",
    ),
    Mutation(
        "where a traveller begins",
        "celo2_pretrain/optimizer/step/exchange.py",
        "cursor[rank] = cursor[rank - 1] + come[rank - 1]",
        "cursor[rank] = cursor[rank - 1] + to[rank - 1]",
        "tests/optimizer/test_view_steps.py",
    ),
    Mutation(
        "own part of an owned matrix",
        "celo2_pretrain/optimizer/step/exchange.py",
        "to_fill.append((part.of(self.directions[unit.slice_in_bucket]), inside))",
        "pass",
        "tests/optimizer/test_view_steps.py",
    ),
    Mutation(
        "place of stacked matrices",
        "celo2_pretrain/optimizer/step/exchange.py",
        "index[0] = slice(index[0].start - unit.first, index[0].stop - unit.first)",
        "index[0] = slice(index[0].start, index[0].stop)",
        "tests/optimizer/test_view_steps.py",
    ),
    Mutation(
        "owner of what one rank holds",
        "celo2_pretrain/optimizer/sharding/owners.py",
        "if len(holders) == 1:",
        "if len(holders) == 1 and holders[0]:",
        "tests/optimizer/test_layouts.py tests/plan",
    ),
    Mutation(
        "places of v_row in a storage",
        "celo2_pretrain/optimizer/sharding/plan.py",
        "rows[storage] = rows.get(storage, 0) + prod(shape.row)",
        "rows[storage] = rows.get(storage, 0) + prod(shape.row) - 1",
        "tests/optimizer/test_celo2.py",
    ),
    Mutation(
        "sizes are checked before a step",
        "celo2_pretrain/optimizer/celo2.py",
        '            check_step(plans, group["rule"], self.state)\n',
        "",
        "tests/optimizer/test_sizes.py",
    ),
    Mutation(
        "ranges that replicas write",
        "celo2_pretrain/optimizer/state/save_load.py",
        "start + (stop - start) * (place + 1) // of",
        "start + (stop - start) * (place + 1) // of - (of > 1)",
        "tests/optimizer/test_state.py",
    ),
    Mutation(
        "a state of other parameters",
        "celo2_pretrain/optimizer/state/save_load.py",
        "if extra := sorted(set(saved) - {t.name for t in tensors}):",
        "if extra := []:",
        "tests/optimizer/test_state.py",
    ),
    Mutation(
        "decays in C++",
        "kernels/cpu.cpp",
        "decay[3] = {0.9f, 0.99f, 0.999f}",
        "decay[3] = {0.9f, 0.99f, 0.99f}",
        "tests/kernels/test_kernels_cpu.py",
    ),
    Mutation(
        "second moment in C++",
        "kernels/cpu.cpp",
        "rms_decay + g * g * one_minus_rms_decay",
        "rms_decay + g * one_minus_rms_decay",
        "tests/kernels/test_kernels_cpu.py",
    ),
    Mutation(
        "transpose of tall matrices",
        "kernels/newton_schulz.py",
        "return (unit.mT if matrices is not x else unit).to(x.dtype)",
        "return unit.to(x.dtype)",
        "tests/kernels/test_newton_schulz.py",
    ),
    Mutation(
        "stochastic rounding",
        "kernels/rounding.py",
        "x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK\n    return (x ^ (x >> 16)) >> 16",
        "x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK\n    return (x ^ (x >> 16)) >> 17",
        "tests/optimizer/test_rounding.py tests/optimizer/test_packed.py",
    ),
    Mutation(
        "scales of packed words",
        "kernels/packed.py",
        "exponent = (torch.frexp(v).exponent - 1) >> 1",
        "exponent = torch.frexp(v).exponent >> 1",
        "tests/optimizer/test_packed.py",
    ),
    Mutation(
        "checksum of a checkpoint's file",
        "celo2_pretrain/train/checkpoints/manifest.py",
        'if sha256(folder / name) != content["files"][name]["sha256"]:',
        "if False:",
        "tests/train/test_checkpoint.py",
    ),
    Mutation(
        "paths out of a checkpoint",
        "celo2_pretrain/train/checkpoints/manifest.py",
        'if {"", ".", ".."} & set(parts)',
        'if {"", "."} & set(parts)',
        "tests/train/test_checkpoint.py tests/train/test_fuzz_checkpoints.py",
    ),
    Mutation(
        "what an abandoned trajectory saved",
        "celo2_pretrain/train/checkpoints/checkpoint.py",
        "        os.rename(path, to)\n",
        "        shutil.rmtree(path)\n",
        "tests/train/test_checkpoint.py tests/train/test_restarts_leftovers.py",
    ),
    Mutation(
        "checkpoints that are kept",
        "celo2_pretrain/train/checkpoints/checkpoint.py",
        "if not keep_every or step_of(path) % keep_every]",
        "if step_of(path) % max(keep_every, 1) or not keep_every or True]",
        "tests/train/test_checkpoint.py",
    ),
    Mutation(
        "random states after a resume",
        "celo2_pretrain/train/checkpoints/checkpoint.py",
        '        set_random_states(load_plain(checkpoint / f"random_state_rank_{dist.get_rank()}.pt"))\n',
        "        pass\n",
        "tests/train/test_driver_ranks.py tests/train/test_kill.py",
    ),
    Mutation(
        "order of a rank's windows",
        "celo2_pretrain/data/loader.py",
        "first = samples + (micro * self.world_size + self.rank) * self.micro_batch_size",
        "first = samples + (micro + self.rank) * self.micro_batch_size",
        "tests/data/test_data.py",
    ),
    Mutation(
        "weight of rows beyond the last window",
        "celo2_pretrain/data/loader.py",
        "(self.weights[row] * (n < self.sequences))",
        "(self.weights[row] * (n <= self.sequences))",
        "tests/data/test_data.py",
    ),
    Mutation(
        "tokens across shard ends",
        "celo2_pretrain/data/shards.py",
        'int(np.searchsorted(self.starts, start + done, "right")) - 1',
        'int(np.searchsorted(self.starts, start + done, "left")) - 1',
        "tests/data/test_data.py",
    ),
    Mutation(
        "tokens outside the vocabulary",
        "celo2_pretrain/data/shards.py",
        "if part.max() >= self.vocab_size:",
        "if part.max() > self.vocab_size:",
        "tests/data/test_data.py tests/data/test_fuzz_data.py",
    ),
]


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def red_test(tests: list[str]) -> str:
    """The first test that fails, "" where all pass."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "--no-header",
            "-rfE",
            "-p",
            "no:cacheprovider",
            "--numprocesses",
            "2",
            "--dist",
            "loadfile",
            *tests,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return ""
    red = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return red[0].split(" - ")[0] if red else f"pytest ended with {done.returncode}"


def try_one(mutation: Mutation) -> str:
    path = ROOT / mutation.file
    text = path.read_text()
    if text.count(mutation.whole) != 1:
        raise ValueError(
            f"{mutation.name}: {mutation.file} has {mutation.whole!r} {text.count(mutation.whole)} times, not once"
        )
    try:
        path.write_text(text.replace(mutation.whole, mutation.broken))
        return red_test(mutation.first.split()) or red_test([])
    finally:
        path.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only mutations whose names have one of these words")
    words = parser.parse_args().words
    if changed := git("status", "--porcelain", "--untracked-files=no"):
        parser.error(f"commit or restore these first, lines are broken and put back here:\n{changed}")
    commit = git("rev-parse", "HEAD")
    RESULTS.parent.mkdir(exist_ok=True)
    done = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    found = {record["name"]: record for record in done if record["commit"] == commit}
    for mutation in MUTATIONS:
        if mutation.name in found or (words and not any(word in mutation.name for word in words)):
            continue
        began = time.monotonic()
        record = {
            "commit": commit,
            "name": mutation.name,
            "red": try_one(mutation),
            "seconds": round(time.monotonic() - began),
        }
        found[mutation.name] = record
        with open(RESULTS, "a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{mutation.name:32} {record['seconds']:5} s  {record['red'] or 'NOTHING WENT RED'}", flush=True)
    missed = [name for name, record in found.items() if not record["red"]]
    print(
        f"{len(found) - len(missed)} of {len(found)} broken lines turned a test red"
        + (f"; not {', '.join(missed)}" if missed else "")
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
