"""Whatever lies in a checkpoints folder or a hostfile: a whole checkpoint is found, or the folder is refused in a line; and
looking for it changes nothing anywhere."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from celo2_pretrain.common.errors import UserError
from celo2_pretrain.train.checkpoints import manifest
from celo2_pretrain.train.checkpoints.select import find, newest_good, read_state, verify
from celo2_pretrain.train.start.hostfile import read_hostfile

from support.fuzz import PATHS, cases, snapshot, spoiled_trees, spoilers, works_or_refuses

DESCRIPTION = {"model.layers": 2, "number of ranks": 1}
STATE = {"step": 2, "samples": 8, "description": DESCRIPTION, "extra": {}}


def write_checkpoint(folder: Path, state=STATE) -> None:
    folder.mkdir(parents=True)
    files = {
        name: manifest.write_file(folder / name, lambda file: torch.save({"a": torch.arange(6)}, file))
        for name in ("mp_rank_00_model_states.pt", "random_state_rank_0.pt")
    }
    files["state.json"] = manifest.write_file(folder / "state.json", lambda file: file.write(json.dumps(state).encode()))
    manifest.write(folder, 2, files)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with two checkpoints, and another run beside it that paths could lead to."""
    for name in ("run/checkpoints/step_00000001", "run/checkpoints/step_00000002", "other/checkpoints/step_00000002"):
        write_checkpoint(tmp_path / name)
    (tmp_path / "run/checkpoints/latest").write_text("step_00000002")
    return tmp_path / "run"


def resume(run: Path) -> Path:
    """What `--resume` reads before the ranks meet; `--resume auto` too."""
    newest_good(run, print_line=lambda text: None)
    found = find(str(run))
    verify(found)
    state = read_state(found, DESCRIPTION)
    assert type(state["step"]) is int and isinstance(state["extra"], dict)
    assert found.resolve().parent == (run / "checkpoints").resolve()
    return found


def looked_at(run: Path) -> None:
    before = snapshot(run.parent)
    works_or_refuses(lambda: resume(run))
    assert snapshot(run.parent) == before


def test_a_whole_run_is_found(run):
    assert resume(run).name == "step_00000002"


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "mp_rank_00_model_states.pt", "../latest"])
def test_a_spoiled_file_of_a_checkpoint_is_refused(run, name):
    path = run / "checkpoints/step_00000002" / name
    whole = path.read_bytes()

    @cases(200)
    @given(st.lists(spoilers(), min_size=1, max_size=2))
    def check(spoils):
        data = whole
        for change in spoils:
            data = change(data)
        path.write_bytes(data)
        looked_at(run)
        if data != whole and name.endswith(".pt"):
            with pytest.raises(UserError, match=name):
                resume(run)

    check()


def test_any_manifest_is_used_or_refused(run):
    """By a hostile hand, which makes the manifest's own checksum right again."""
    path = run / "checkpoints/step_00000002/manifest.json"
    content = json.loads(path.read_text())

    @cases(400)
    @given(spoiled_trees(content), st.booleans())
    def check(tree, right):
        if right and isinstance(tree, dict):
            tree["sha256"] = manifest.own_digest(tree)
        path.write_text(json.dumps(tree))
        looked_at(run)

    check()


def test_any_state_is_used_or_refused(run):
    path = run / "checkpoints/step_00000002"

    @cases(400)
    @given(spoiled_trees(STATE))
    def check(tree):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
        write_checkpoint(path, tree)
        looked_at(run)

    check()


@pytest.mark.parametrize(
    "name",
    [
        *PATHS,
        "../../other/checkpoints/step_00000002",
        "step_00000002/../../../other",
        "step_00000009",
        "step_2\nstep_1",
        "state.json",
    ],
)
def test_latest_leads_nowhere_else(run, name):
    (run / "checkpoints/latest").write_bytes(name.encode("utf-8", "surrogatepass"))
    looked_at(run)
    with pytest.raises(UserError):
        resume(run)


@pytest.mark.parametrize("name", ["state.json", "manifest.json", "random_state_rank_0.pt"])
def test_a_link_in_a_checkpoint_is_refused(run, name):
    path = run / "checkpoints/step_00000002" / name
    path.unlink()
    os.symlink(run.parent / "other/checkpoints/step_00000002" / name, path)
    looked_at(run)
    with pytest.raises(UserError, match="damaged"):
        resume(run)


hosts = st.one_of(
    st.text(max_size=12), st.sampled_from(["node1", "10.0.0.1", "a b", "-oProxyCommand=x", "$(id)", "a;b", "::1"])
)
slots = st.one_of(
    st.text(max_size=6), st.integers(-3, 10**12).map(str), st.sampled_from(["8", "08", "1e3", "0x8", "٣", "9" * 5000])
)
lines = st.one_of(
    st.builds("{} slots={}".format, hosts, slots), st.text(max_size=20), st.sampled_from(["# nothing", "node2 slots=4"])
)


@cases(1200)
@given(st.lists(lines, max_size=4), st.lists(spoilers(), max_size=1))
def test_a_hostfile_is_used_or_refused(tmp_path_factory, found, spoils):
    path = tmp_path_factory.getbasetemp() / "hostfile"
    data = "\n".join(found).encode("utf-8", "surrogatepass")
    for change in spoils:
        data = change(data)
    path.write_bytes(data)

    def call():
        for host, ranks in read_hostfile(str(path)).items():
            assert 1 <= ranks <= 9999 and host[0].isalnum() | (host[0] == "_") and not set(host) & set(" ;$()'\"&|<>`\n")

    works_or_refuses(call)
