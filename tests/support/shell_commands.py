"""The shell commands of a Markdown page, and whether the programs they name would take them: nothing is run."""

import contextlib
import io
import re
import shlex
import tomllib
from pathlib import Path

from celo2_pretrain import cli

from support.paths import ROOT

PLACEHOLDERS = re.compile(r"…|\.\.\.|[A-Z]{3,}")  # of what the reader fills in: "RUN", "--config …"
PROGRAMS = r"(?:[A-Z_0-9]+=\S+ )*(?:celo2-pretrain|deepspeed|torchrun|python|sbatch|srun|launch/\S+) "


def commands(text: str) -> list[str]:
    """The commands of bash blocks, of lines after a "$ " in other blocks, of indented blocks, and those in `backticks`."""
    found, plain = [], []
    for k, part in enumerate(re.split(r"^```(.*(?:\n(?!```).*)*)\n```$", text, flags=re.M)):
        if k % 2 == 0:
            plain.append(part)
            continue
        language, _, body = part.partition("\n")
        joined = re.sub(r"\\\n\s*", "", body).splitlines()
        if language in ("bash", "sh"):
            found += joined
        elif language in ("", "console"):
            found += [line[2:] for line in joined if line.startswith("$ ")]
    prose = re.sub(r"\\\n\s*", "", "\n".join(plain))
    found += re.findall(rf"^    ({PROGRAMS}.*)$", prose, re.M)
    spans = [
        " ".join(span.split())
        for span in re.findall(r"`([^`]+)`", prose)
        if re.match(PROGRAMS, span) and "|" not in span and "\n\n" not in span
    ]
    # The bare name of a command is right where there is such a command.
    found += [f"{span} --help" if re.fullmatch(r"celo2-pretrain \S+", span) else span for span in spans]
    return [command for command in found if command.strip() and not command.lstrip().startswith("#")]


def problem(command: str) -> str | None:
    """Why the command would be refused before it does anything, or None."""
    words = shlex.split(command, comments=True)
    while words and (words[0] in ("nohup", "time", "env", "exec") or re.fullmatch(r"[A-Z_][A-Z_0-9]*=.*", words[0])):
        words = words[1:]
    words = [word for word in words if word != "&"]
    for joint in ("&&", ";", "|"):
        if joint in words:
            at = words.index(joint)
            return problem(shlex.join(words[:at])) or problem(shlex.join(words[at + 1 :]))
    if ">" in words:
        words = words[: words.index(">")]
    if not words:
        return None
    program, *arguments = words
    check = PROGRAM_CHECKS.get(Path(program).name)
    if check is None and "/" in program and program.endswith((".sh", ".py")):
        return script(program, arguments)
    return f"nothing here knows the program {program!r}" if check is None else check(arguments)


def unfilled(words: list[str]) -> bool:
    return any(PLACEHOLDERS.search(word) for word in words)


def driver(arguments: list[str]) -> str | None:
    """`celo2-pretrain` with these arguments: its own parser, the configuration's keys and their values."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            args = cli.parser().parse_args(arguments)
    except SystemExit as end:
        return None if not end.code else output.getvalue().splitlines()[-1]
    return configuration(args) if "overrides" in args else None


def configuration(args) -> str | None:
    if args.command == "meta-train":
        from celo2_pretrain.meta.config import load_config
    else:
        from celo2_pretrain.config import load_config
    path, overrides = args.config, list(args.overrides)
    if path is not None and unfilled([path]):
        path = None
    if getattr(args, "resume", None) and "=" in args.resume:
        overrides.insert(0, args.resume)
    try:
        load_config(str(ROOT / path) if path else None, [o for o in overrides if not unfilled([o])])
    except Exception as error:  # the message is the problem
        return str(error)
    if args.command == "plan":
        from celo2_pretrain.common.devices import device

        for name in args.gpu.split(","):
            device(name, 1)
    if getattr(args, "launch", None):
        return problem(re.sub(r"\{[a-z]+\}", "2", args.launch))  # {ranks}, filled in by the driver
    return None


def script(path: str, arguments: list[str]) -> str | None:
    """A script of this repository exists and speaks of every --option that it is given."""
    file = ROOT / path
    if unfilled([path]):
        return None
    if not file.is_file():
        return f"there is no file {path}"
    if file == ROOT / "launch/pretrain.py":
        return driver(["train", *arguments])
    text, overrides = file.read_text(), [argument for argument in arguments if re.match(r"[a-z_.]+=", argument)]
    if "launch/pretrain.py" in text and overrides:
        wrong = driver(["train", *overrides])
        if wrong:
            return wrong
    passed_on = driver(["train", *arguments]) is None and "launch/pretrain.py" in text
    for option in (argument.partition("=")[0] for argument in arguments if argument.startswith("-")):
        if option not in text and not passed_on and option not in ("-h", "--help"):
            return f"{path} has no option {option}"
    return None


def launcher(parse):
    """A launcher's own parser, then the script it starts."""

    def check(arguments: list[str]) -> str | None:
        output = io.StringIO()
        try:
            with contextlib.redirect_stderr(output):
                started, rest = parse(arguments)
        except SystemExit:
            return output.getvalue().splitlines()[-1]
        return script(started, rest)

    return check


def _deepspeed(arguments: list[str]):
    from deepspeed.launcher.runner import parse_args

    args = parse_args(arguments)
    return args.user_script, args.user_args


def _torchrun(arguments: list[str]):
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args(arguments)
    return args.training_script, args.training_script_args


def python(arguments: list[str]) -> str | None:
    if arguments[:2] == ["-m", "pytest"]:
        missing = [a for a in arguments[2:] if a.startswith("tests") and not (ROOT / a.partition("::")[0]).exists()]
        return f"there is no {missing[0]}" if missing else None
    if arguments[0] == "-m":
        module = ROOT / (arguments[1].replace(".", "/"))
        main = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
        sources = "".join(p.read_text() for p in (module.glob("*.py") if module.is_dir() else [main]) if p.exists())
        missing = [a for a in arguments[2:] if a.startswith("--") and a.partition("=")[0] not in sources]
        return (
            f"python -m {arguments[1]}: no such module"
            if not main.exists()
            else (f"python -m {arguments[1]} has no option {missing[0]}" if missing else None)
        )
    return None if arguments[0] == "-c" else script(arguments[0], arguments[1:])


def pip(arguments: list[str]) -> str | None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for argument in arguments:
        for extra in re.findall(r"^(?:celo2-pretrain|\.)\[(.*)\]", argument):
            unknown = [name for name in extra.split(",") if name not in extras]
            if unknown:
                return f"pyproject.toml has no extra {unknown[0]!r}"
    return None


def git(arguments: list[str]) -> str | None:
    missing = [a for a in arguments[1:] if arguments[0] == "apply" and not unfilled([a]) and not (ROOT / a).is_file()]
    return f"there is no file {missing[0]}" if missing else None


def started_by_a_scheduler(arguments: list[str]) -> str | None:
    """sbatch, srun, bash, source: the script among the arguments, and what follows it."""
    for k, argument in enumerate(arguments):
        if argument.endswith((".sh", ".py", ".sbatch")):
            return script(argument, arguments[k + 1 :])
    return None


PROGRAM_CHECKS = {
    "celo2-pretrain": driver,
    "deepspeed": launcher(_deepspeed),
    "torchrun": launcher(_torchrun),
    "python": python,
    "pip": pip,
    "git": git,
    **dict.fromkeys(("sbatch", "srun", "bash", "source", "salloc"), started_by_a_scheduler),
    # Of the operating system, or of a library of its own: nothing of ours to be wrong.
    **dict.fromkeys(
        (
            "cd",
            "export",
            "cat",
            "echo",
            "ls",
            "touch",
            "kill",
            "mkdir",
            "tensorboard",
            "wandb",
            "tail",
            "squeue",
            "scancel",
            "scontrol",
            "rm",
            "cp",
            "accelerate",
            "ssh",
            "rsync",
            "nvidia-smi",
            "unset",
        ),
        lambda arguments: None,
    ),
}
