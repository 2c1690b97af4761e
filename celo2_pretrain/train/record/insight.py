"""What a logged step tells beside its loss: norms by rule, time by phase, memory, and the share of the device's peak."""

import contextlib
import math

import deepspeed.comm as dist
import psutil
import torch

from celo2_pretrain.config import Config
from celo2_pretrain.train.record.norms import SUMS, Norms, by_rule, sum_of_squares
from celo2_pretrain.train.record.peak_flops import Peak
from celo2_pretrain.train.record.timers import Timers

GIB = 1 << 30
LARGEST_EXPONENT = 700.0  # exp of more is no float


class Insight:
    """Watches the steps that are logged, and no others. Every rank has one, and calls its methods alike."""

    def __init__(
        self, engine, optimizer: torch.optim.Optimizer, config: Config, parameters: int, flops_per_token: float, peak: Peak
    ):
        """
        Args:
            optimizer: what `engine` wraps.
            parameters: of the model.
            flops_per_token: of forward and backward pass, as `plan` counts them.
        """
        self.engine, self.config, self.parameters = engine, config, parameters
        self.flops_per_token, self.peak = flops_per_token, peak
        self.timers = Timers(engine.device)
        self.norms = Norms(optimizer) if config.track.norms else None
        self._watched = False
        # In float32 without ZeRO DeepSpeed clips gradients and tells nobody by how much.
        self._tells_norm = config.train.zero_stage > 0 or config.train.precision != "fp32"
        self._unclipped: float | None = None

    @contextlib.contextmanager
    def installed(self):
        with self.timers.watch_communication():
            yield

    def begin(self, step: int) -> None:
        """Before step `step`, counted from 1."""
        size = self.config.train
        self._watched = step % size.log_every == 0 or step == size.max_steps
        if self._watched:
            self._unclipped = None
            self.timers.begin()
            if self.norms:
                self.norms.begin()

    def mark(self, phase: str) -> None:
        """The next of timers.PHASES begins."""
        self.timers.mark(phase)
        if (
            phase == "optimizer"
            and self._watched
            and self.norms
            and not self._tells_norm
            and self.engine.is_gradient_accumulation_boundary()
        ):
            squares = [sum_of_squares(p.grad) for p in self.engine.module.parameters() if p.grad is not None]
            self._unclipped = float(torch.stack(squares).sum()) ** 0.5

    def end(self) -> None:
        """After the step."""
        self.timers.end()
        if self.norms:
            self.norms.watching = False

    def record(self, loss: float, tokens_per_s: float) -> dict:
        """The fields that docs/insight.md lists, of the step that was watched last; none where it wasn't this one.

        Args:
            loss: nats a token.
            tokens_per_s: of all ranks.
        """
        out = {"perplexity": perplexity(loss)}
        world = dist.get_world_size()
        if self.peak.flops:
            out["mfu"] = tokens_per_s * self.flops_per_token / (world * self.peak.flops)
        memory = torch.tensor(memory_bytes(self.engine.device), dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        out["memory_gib"] = round(float(memory) / GIB, 3)
        if not self._watched:
            return out
        times = self.timers.seconds()
        squares = self.norms.squares if self.norms else None
        if squares is None:  # nothing was stepped; the collective has the same size nevertheless
            squares = torch.zeros(SUMS, dtype=torch.float64)
        total = torch.cat(
            [
                torch.tensor(list(times.values()), dtype=torch.float64, device=self.engine.device),
                squares.to(self.engine.device),
            ]
        )
        dist.all_reduce(total)
        total = total.tolist()
        norm = self.engine.get_global_grad_norm() if self._tells_norm else self._unclipped
        if norm is not None:
            out["grad_norm"] = float(norm)
        out |= by_rule(total[len(times) :], self.parameters, None if norm is None else float(norm))
        return out | {f"time/{phase}": round(seconds / world, 5) for phase, seconds in zip(times, total)}


def perplexity(loss: float) -> float | None:
    """exp(loss); None where no float holds it (JSON has no infinity)."""
    return math.exp(loss) if loss < LARGEST_EXPONENT else None


def memory_bytes(device: torch.device) -> float:
    """GPU: what torch's allocator gave out at most since the last call. CPU: what the process holds now."""
    if device.type != "cuda":
        return psutil.Process().memory_info().rss
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak
