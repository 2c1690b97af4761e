"""What `train --max-restarts` makes of checkpoints that an earlier run, another run, or half a save has left."""

import pytest
from test_restarts import supervised  # noqa: F401


def begun_from_another(supervised) -> list[str]:
    another = supervised.folder / "another"
    another.mkdir()
    (another / "config.yaml").write_text("")
    return ["--resume", str(another / "config.yaml"), "--config", str(another / "config.yaml")]


@pytest.mark.parametrize(
    "left, again",
    [
        (".tmp-step_00000002", "from the other"),
        ("step_00000002", "auto"),  # named, but `latest` wasn't written yet
    ],
)
def test_a_run_begun_from_another_that_failed_while_it_first_saved(supervised, left, again):
    given = begun_from_another(supervised)
    line = f"(run_dir / 'checkpoints/{left}').mkdir(parents=True); sys.exit(1)"
    assert supervised("sys.exit(1)", line, "save(2); sys.exit(1)", "save(4)", arguments=given) == 0
    first, second, third, last = map(sorted, supervised.starts)
    auto = sorted(["--config", given[3], "--resume", "auto"])
    assert first == second == sorted(given) and last == auto
    assert third == (auto if again == "auto" else sorted([*given, "--overwrite"]))


def test_an_earlier_runs_last_step_does_not_finish_a_run_that_replaces_it(supervised):
    latest = supervised.run_dir / "checkpoints" / "latest"
    latest.parent.mkdir(parents=True)
    latest.write_text("step_00000004")
    assert supervised("sys.exit(0)", "save(4)", arguments=["--overwrite"]) == 0  # its launcher was killed, then it trained
    assert supervised.starts == [["--overwrite"]] * 2
    assert "exit code 0 before the last step: its launcher was killed" in supervised.told


def test_resume_auto_of_a_finished_run_finishes(supervised):
    latest = supervised.run_dir / "checkpoints" / "latest"
    latest.parent.mkdir(parents=True)
    latest.write_text("step_00000004")
    assert supervised("sys.exit(0)", arguments=["--resume", "auto"]) == 0
    assert len(supervised.starts) == 1


def earlier(supervised, step: int) -> None:
    checkpoints = supervised.run_dir / "checkpoints"
    (checkpoints / f"step_{step:08d}").mkdir(parents=True)
    (checkpoints / f"step_{step:08d}/manifest.json").write_text("")
    (checkpoints / "latest").write_text(f"step_{step:08d}")


def test_going_on_with_a_checkpoint_is_no_progress(supervised):
    earlier(supervised, 2)
    given = ["--resume", "auto"]
    assert supervised("name(2); sys.exit(1)", "name(2); sys.exit(1)", "save(4)", arguments=given, ranks="4,2,1") == 0
    assert [start[1] for start in supervised.starts] == ["4", "2", "1"]
    assert "starting again in 0.1 s with 2" in supervised.told and "starting again in 0.2 s with 1" in supervised.told


def test_the_same_step_of_a_run_that_replaces_another_is_progress(supervised):
    earlier(supervised, 2)
    assert supervised("save(2); sys.exit(1)", "save(4)", arguments=["--overwrite"]) == 0
    assert supervised.starts == [["--overwrite"], ["--resume", "auto"]]
    assert "from step_00000002" in supervised.told
