"""Where a step's time goes: data, forward, backward, optimizer, and in all of them the wait for communication.

On a CPU these are seconds of this process. On a GPU they are seconds of the compute stream, between events that are
recorded in passing and read after the step: nothing waits for the GPU. Only steps that are logged are timed.
"""

import contextlib
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

PHASES = ("data", "forward", "backward", "optimizer")
COMMUNICATION = "communication"
COLLECTIVES = tuple(
    name
    for name in (
        "allreduce",
        "allreduce_coalesced",
        "reduce",
        "broadcast",
        "allgather",
        "allgather_coalesced",
        "_allgather_base",
        "allgather_into_tensor_coalesced",
        "all_gather_single",
        "all_gather_single_coalesced",
        "gather",
        "scatter",
        "reduce_scatter",
        "_reduce_scatter_base",
        "reduce_scatter_single",
        "reduce_scatter_single_coalesced",
        "reduce_scatter_tensor_coalesced",
        "alltoall",
        "alltoall_base",
        "all_to_all_single",
        "send",
        "recv",
        "barrier",
        "_end_coalescing",
    )
    if hasattr(dist.ProcessGroup, name)
)  # torch renames them now and then


class Clock:
    """Moments, and the seconds between two of them."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.stream = torch.cuda.current_stream(device) if self.cuda else None

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return event

    def here(self) -> bool:
        """Whether what is started now holds up the computation: a side stream's work doesn't."""
        return not self.cuda or torch.cuda.current_stream() == self.stream

    def between(self, begin, end) -> float:
        return begin.elapsed_time(end) / 1e3 if self.cuda else end - begin

    def finish(self) -> None:
        if self.cuda:
            self.stream.synchronize()


class Timers:
    """The phases of one step at a time: `begin`, then `mark` at the beginning of each phase, then `end`; then `seconds`."""

    def __init__(self, device: torch.device):
        self.clock = Clock(device)
        self.watching = False
        self._marks: list[tuple[str, object]] = []
        self._waits: list[tuple[object, object]] = []
        self._depth = 0

    def begin(self) -> None:
        self.watching, self._marks, self._waits = True, [], []

    def mark(self, phase: str) -> None:
        if self.watching:
            self._marks.append((phase, self.clock.now()))

    def end(self) -> None:
        self.mark("")
        self.watching = False

    def seconds(self) -> dict[str, float]:
        """Of the last step that was timed, by phase; communication is a part of the others, not one beside them."""
        self.clock.finish()
        out = dict.fromkeys((*PHASES, COMMUNICATION), 0.0)
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:]):
            out[phase] += self.clock.between(begin, end)
        out[COMMUNICATION] = sum(self.clock.between(*wait) for wait in self._waits)
        return out

    @contextlib.contextmanager
    def watch_communication(self):
        """Have the waits of torch.distributed's collectives timed until the end: DeepSpeed's and the optimizer's.

        A collective is started by a method of the process group and waited for by a method of its handle, whoever calls
        them and however; so these are what is wrapped. What runs behind the computation isn't waited for, and isn't counted.
        """
        places = [(dist.ProcessGroup, name) for name in COLLECTIVES] + [(dist.Work, "wait")]
        # As they lie in the class: what getattr gives of a method written in C++ isn't bound to an object when it is put back.
        before = [(cls, name, vars(cls)[name]) for cls, name in places]
        for cls, name, _ in before:
            setattr(cls, name, self._timed(getattr(cls, name)))
        try:
            yield
        finally:
            for cls, name, method in before:
                setattr(cls, name, method)

    def _timed(self, method: Callable) -> Callable:
        def timed(*args, **kwargs):
            if not self.watching or self._depth or not self.clock.here():
                return method(*args, **kwargs)
            self._depth += 1  # a method that calls another is counted once
            begin = self.clock.now()
            try:
                return method(*args, **kwargs)
            finally:
                self._waits.append((begin, self.clock.now()))
                self._depth -= 1

        return timed
