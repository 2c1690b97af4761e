"""What a killed process leaves behind doesn't keep the next ones waiting."""

import os
import time

from celo2_pretrain.train.start import ranks


def test_a_lock_that_nobody_holds_is_cleared_and_one_that_somebody_holds_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    folder = tmp_path / "py311_cpu" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    (folder / "deepspeed_shm_comm.so").touch()
    lock, hour_ago = folder / "lock", time.time() - 3600
    with open(lock, "w"):
        os.utime(lock, (hour_ago, hour_ago))
        ranks.announce_compilation()
        assert lock.exists() and f"if there is none, remove {lock}" in capsys.readouterr().out
    ranks.announce_compilation()
    assert not lock.exists() and not capsys.readouterr().out
    lock.touch()  # a new one: its owner may be on another machine
    ranks.announce_compilation()
    assert lock.exists()


def test_shared_memory_of_this_rank_is_forgotten(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", "1")  # nobody's
    monkeypatch.setattr(ranks.torch.distributed, "barrier", lambda: None)
    mine, other = (ranks.Path("/dev/shm", f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_1_{rank}") for rank in (1, 0))
    mine.touch(), other.touch()
    try:
        ranks.forget_shared_memory()
        assert not mine.exists() and other.exists()
    finally:
        other.unlink()
