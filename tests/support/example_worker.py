"""One rank of test_examples: runs a script as it is, and notes which optimizer stepped which tensor by which rule.

Arguments: the script, the JSON file to write. Launchers that add --local_rank may.
"""

import json
import os
import runpy
import sys
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook

from celo2_pretrain import Celo2

seen = {"optimizers": set(), "rules": {}, "steps": 0, "flat": False}


def note(optimizer, args, kwargs) -> None:
    seen["optimizers"].add(type(optimizer).__name__)
    if isinstance(optimizer, Celo2):
        seen["steps"] += 1
        for group in optimizer.param_groups:
            originals = optimizer.originals_of(group)
            seen["rules"].update({original.name: group["rule"] for original in originals})
            seen["flat"] |= any(id(p) not in {id(o.param) for o in originals} for p in group["params"])


register_optimizer_step_post_hook(note)
script, out = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
sys.argv = [script]
runpy.run_path(script, run_name="__main__")
if os.environ.get("RANK", "0") == "0":
    Path(out).write_text(json.dumps(seen | {"optimizers": sorted(seen["optimizers"])}))
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)  # gloo's threads now and then abort the interpreter's exit
