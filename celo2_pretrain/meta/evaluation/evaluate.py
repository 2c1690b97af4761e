"""What do the options of `celo2-pretrain meta-eval` choose? Run what is missing of it, and write the report."""

from __future__ import annotations

import os
from pathlib import Path

from celo2_pretrain.common.errors import UserError

from .job import Job
from .optimizers import DEFAULT, FACTORS, SPECS, Spec, named_theta, with_weights
from .report import write_report
from .runner import duration, print_line, read_results, remaining, run_all
from .suite.problem import Task
from .suite.tasks import QUICK, QUICK_STEPS, TASKS

SEEDS = (0, 1, 2)


def listing() -> str:
    """The tasks and optimizers, with what is missing for those that can't run here."""
    lines = ["tasks (steps, seconds of a run on one core):"]
    for task in TASKS.values():
        note = f"  [skipped: {task.missing()}]" if task.missing() else ""
        lines.append(f"  {task.name:20s} {task.about} ({task.steps}, {task.seconds:.0f} s){note}")
    lines.append("optimizers (grid of learning rates; * by default):")
    for spec in SPECS.values():
        note = f"  [skipped: {spec.missing()}]" if spec.missing() else ""
        name, grid = spec.name + ("*" if spec.name in DEFAULT else ""), spec.grid()
        lines.append(f"  {name:20s} {grid[0]:.2g} … {grid[-1]:.2g}{note}")
    return "\n".join(lines)


def evaluate(args) -> None:
    """Run with the parsed arguments of the command line. Raises UserError for bad ones, before anything is run."""
    if args.list:
        print(listing())
        return
    if args.report:
        tell(write_report(Path(args.report)))
        return
    tasks, specs = choose_tasks(args), choose_optimizers(args)
    factors, seeds = choose_rates(args), choose_seeds(args)
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: must be at least 1")
    if not args.steps_scale > 0:
        raise UserError(f"--steps-scale {args.steps_scale}: must be above 0")
    scale = args.steps_scale * (QUICK_STEPS if args.quick else 1.0)
    jobs = make_jobs(tasks, specs, factors, seeds, scale)
    folder, processes = Path(args.out), args.jobs or os.cpu_count() or 1
    left = remaining(jobs, read_results(folder))
    seconds = sum(TASKS[job.task].seconds * job.steps / TASKS[job.task].steps for job in left) / processes
    print_line(
        f"{len(tasks)} tasks × {len(specs)} optimizers × {len(factors)} learning rates × {len(seeds)} seeds = "
        f"{len(jobs)} runs, about {duration(seconds)} on {processes} processes; results in {folder}"
    )
    run_all(jobs, folder, processes, print_line)
    tell(write_report(folder))


def tell(files: list[Path]) -> None:
    report = next(file for file in files if file.name == "report.md")
    print_line(report.read_text(encoding="utf-8").partition("## On how many")[0].rstrip())
    print_line(f"wrote {', '.join(str(file) for file in files)}")


def make_jobs(tasks: list[Task], specs: list[Spec], factors: list[float], seeds: list[int], scale: float) -> list[Job]:
    """All combinations; seed by seed, so that what is there early is a whole comparison of fewer seeds."""
    return [
        Job(task.name, spec, float(f"{spec.middle * factor * task.lr_scale:.3g}"), seed, max(1, round(task.steps * scale)))
        for seed in seeds
        for task in tasks
        for spec in specs
        for factor in factors
    ]


def choose_tasks(args) -> list[Task]:
    names = _split(args.tasks) or (list(QUICK) if args.quick else list(TASKS))
    return _available("--tasks", names, TASKS)


def choose_optimizers(args) -> list[Spec]:
    specs = _available("--optimizers", _split(args.optimizers) or list(DEFAULT), SPECS)
    specs = [with_weights(spec) for spec in specs]
    specs += [named_theta("celo2", text) for text in args.theta]
    specs += [named_theta("celo2-base", text) for text in args.theta_base]
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two optimizers are called {name}: give each --theta another NAME")
    return specs


def choose_rates(args) -> list[float]:
    factors = _numbers("--lrs", args.lrs, float) if args.lrs else list(FACTORS[1:-1] if args.quick else FACTORS)
    if any(not 0 < factor < float("inf") for factor in factors):
        raise UserError(f"--lrs {args.lrs}: multiples of each optimizer's middle rate must be above 0")
    return factors


def choose_seeds(args) -> list[int]:
    if not args.seeds:
        return list(SEEDS[:2] if args.quick else SEEDS)
    seeds = _numbers("--seeds", args.seeds, int)
    if any(seed < 0 for seed in seeds):
        raise UserError(f"--seeds {args.seeds}: must not be negative")
    return seeds


def _split(text: str | None) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))


def _numbers(option: str, text: str, kind: type) -> list:
    try:
        numbers = [kind(part) for part in _split(text)]
    except ValueError:
        numbers = []
    if not numbers:
        example = "0,1,2" if kind is int else "0.1,0.32,1,3.2,10"
        raise UserError(f"{option} {text!r}: give numbers with commas, as in {example}")
    return numbers


def _available(option: str, names: list[str], known: dict) -> list:
    """Those of `names` that can run here; the others are named with the reason."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"{option}: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    for name in names:
        if reason := known[name].missing():
            print_line(f"skipping {name}: {reason}")
    found = [known[name] for name in names if not known[name].missing()]
    if not found:
        raise UserError(f"{option}: nothing is left to run; {names[0]} {known[names[0]].missing()}")
    return found
