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
]


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def red_test(tests: list[str]) -> str:
    """The first test that fails, "" where all pass."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-rfE", "-p", "no:cacheprovider",
                           "--numprocesses", "2", "--dist", "loadfile", *tests], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    red = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return red[0].split(" - ")[0] if red else f"pytest ended with {done.returncode}"


def try_one(mutation: Mutation) -> str:
    path = ROOT / mutation.file
    text = path.read_text()
    if text.count(mutation.whole) != 1:
        raise ValueError(f"{mutation.name}: {mutation.file} has {mutation.whole!r} {text.count(mutation.whole)} times, not once")
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
        if mutation.name in found or words and not any(word in mutation.name for word in words):
            continue
        began = time.monotonic()
        record = {"commit": commit, "name": mutation.name, "red": try_one(mutation), "seconds": round(time.monotonic() - began)}
        found[mutation.name] = record
        with open(RESULTS, "a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{mutation.name:32} {record['seconds']:5} s  {record['red'] or 'NOTHING WENT RED'}", flush=True)
    missed = [name for name, record in found.items() if not record["red"]]
    print(f"{len(found) - len(missed)} of {len(found)} broken lines turned a test red" + (f"; not {', '.join(missed)}" if missed else ""))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
