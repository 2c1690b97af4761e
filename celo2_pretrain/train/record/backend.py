"""What computes Celo2's passes is recorded once, when its first step chooses it."""

import contextlib
import logging

from celo2_pretrain.optimizer.backends import choose
from celo2_pretrain.train.record.metrics import Metrics


@contextlib.contextmanager
def telling_backend(metrics: Metrics):
    """On rank 0 say what computes Celo2's passes, and why: Celo2 logs it in its first step, when it sees where its tensors
    are, and a log at that level is shown to nobody."""
    log, handler = logging.getLogger(choose.__name__), logging.Handler()
    handler.emit = lambda record: metrics.print_line(record.getMessage())
    if metrics.active:  # other ranks' warnings stay where they are
        log.setLevel(logging.INFO)
        log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
