"""Whether a hostfile for DeepSpeed's launcher is right, in one line: `python -m celo2_pretrain.train.start.hostfile FILE`.

DeepSpeed itself answers a bad file with a traceback, and trains on this machine alone where there is none.
"""

import re
import sys
from pathlib import Path

from celo2_pretrain.common.errors import UserError

EXAMPLE = "a line for each host, for example: node1 slots=8"
LARGEST = 1 << 20  # bytes; 1,000 hosts are 20 kB


def read_hostfile(path: str) -> dict[str, int]:
    """Hosts in the file's order, with the ranks (slots) of each. Raises UserError naming the file and the line."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"hostfile {path!r} does not exist: make it, with {EXAMPLE}")
    try:
        if file.stat().st_size > LARGEST:
            raise UserError(f"hostfile {path!r} has {file.stat().st_size} bytes: that is no list of hosts; give {EXAMPLE}")
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"hostfile {path!r} is not text: give {EXAMPLE}") from None
    except OSError as error:
        raise UserError(f"hostfile {path!r} can't be read: {error.strerror}") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        where = f"hostfile {path!r}, line {number}"
        found = re.fullmatch(r"([A-Za-z0-9_][\w.:-]{0,252})(?:\s+slots=(\S+))?", line, re.ASCII)
        if not found:
            raise UserError(f"{where}: {line[:80]!r} is not of the form: node1 slots=8")
        host, slots = found.groups()
        if slots is None:
            raise UserError(f"{where}: {host} has no slots: write how many ranks it takes, as in: {host} slots=8")
        if not re.fullmatch(r"[0-9]{1,4}", slots) or int(slots) == 0:
            raise UserError(f"{where}: slots={slots[:40]}: must be a whole number from 1 to 9999, the ranks on {host}")
        if host in hosts:
            raise UserError(f"{where}: {host} is there twice: give it once, with all its slots")
        hosts[host] = int(slots)
    if not hosts:
        raise UserError(f"hostfile {path!r} names no host: give {EXAMPLE}")
    return hosts


def main(arguments: list[str]) -> int:
    """Say what the file asks for, or in one line what is wrong with it."""
    try:
        if len(arguments) != 1:
            raise UserError(f"{len(arguments)} arguments: give one hostfile, with {EXAMPLE}")
        hosts = read_hostfile(arguments[0])
    except UserError as error:
        print(f"multinode: error: {error}", file=sys.stderr)
        return 2
    print(f"multinode: {sum(hosts.values())} rank(s) on {len(hosts)} host(s): {', '.join(hosts)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
