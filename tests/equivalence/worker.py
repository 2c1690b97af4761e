"""One rank of the matrix: runs the cells that standard input names, a line each, in one process group.

Started by `launch.py`. Rank 0 prints a line of JSON after each cell. A cell that raises ends the process:
the other ranks may be waiting in a collective that this one will never enter.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import threading
import time
import traceback
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from .cells import from_name
from .compare import compare
from .mutations import apply_mutation


def end_with_parent(parent: int) -> None:
    """Leave when the launcher was killed, instead of waiting for ranks that have left, too."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    order = json.loads(sys.argv[1])
    threading.Thread(target=end_with_parent, args=(order["launcher"],), daemon=True).start()
    rank = int(os.environ["RANK"])
    lines = os.fdopen(os.dup(1), "w")  # what the launcher reads; everything else that is printed goes to stderr
    os.dup2(2, 1)
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Without the CPU's own fp16 arithmetic DeepSpeed refuses fp16; torch computes it all the same, only slower.
    get_accelerator().is_fp16_supported = lambda: True
    # A compiled op for all-reduces in inference, which nothing here does: building it takes a compiler and a minute.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # `deepspeed.comm.torch` is torch itself
    on_gpu = order["device"] == "cuda"
    # NCCL wants a GPU for each rank.
    library = "nccl" if on_gpu and os.environ["WORLD_SIZE"] == "1" else "gloo"
    deepspeed.init_distributed(dist_backend=library, timeout=timedelta(seconds=order["timeout"]), verbose=False)
    torch.backends.cudnn.allow_tf32 = False  # gradients are compared with the CPU's
    if order["mutation"]:
        apply_mutation(order["mutation"])

    def tell(**record: object) -> None:
        if rank == 0 or record["event"] == "error":
            lines.write(json.dumps(record) + "\n")
            lines.flush()

    backend = os.environ.get("CELO2_BACKEND", "auto")
    for number, name in enumerate(line.rstrip("\n") for line in sys.stdin):
        # To the last bit the order of the reference, whose rounding is compared; kernels fuse multiply and add.
        os.environ["CELO2_BACKEND"] = "reference" if name.endswith(",fp8") else backend
        began = time.monotonic()
        try:
            errors = compare(from_name(name))
        except Exception as raised:  # reported as the cell's result, whatever it is
            traceback.print_exc()
            frames = traceback.extract_tb(raised.__traceback__)[-3:]
            where = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(frames))
            tell(event="error", cell=name, what=f"rank {rank}: {type(raised).__name__}: {raised} (in {where})")
            lines.flush()
            os._exit(1)  # not sys.exit: destructors of a half-built engine may wait for other ranks
        if number % 10 == 9:
            gc.collect()  # engines are full of cycles
        tell(event="done", cell=name, errors=errors, seconds=time.monotonic() - began)
    dist.barrier()
    dist.destroy_process_group()
    lines.close()
    os._exit(0)  # torch's own threads (FSDP2 over gloo) now and then abort the interpreter's exit


if __name__ == "__main__":
    main()
