"""A rank that leaves without Python's finalisation waits for threads that have work left, and not for idle pools."""

import subprocess
import sys

from support.processes import environment

LEAVE = """
import sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from celo2_pretrain.cli import leave
pool = ThreadPoolExecutor(1)
pool.submit(print, "pool").result()
threading.Thread(target=lambda: (time.sleep(0.5), print("copied"))).start()
leave(75)
"""


def test_a_rank_that_leaves_waits_for_work_and_not_for_idle_threads():
    result = subprocess.run([sys.executable, "-c", LEAVE], env=environment(), capture_output=True, text=True, timeout=60)
    assert result.returncode == 75 and result.stdout.split() == ["pool", "copied"], result
