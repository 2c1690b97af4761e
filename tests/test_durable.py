"""A file is the old one or the new one, whatever ends the writing."""

import pytest

from celo2_pretrain.common import durable


@pytest.mark.parametrize("old", [None, "old"])
def test_what_fails_while_it_is_written_changes_nothing(tmp_path, old):
    path = tmp_path / "file.txt"
    if old:
        path.write_text(old)
    with pytest.raises(OSError), durable.replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError("disk full")
    assert [file.read_text() for file in tmp_path.iterdir()] == ([old] if old else [])


def test_the_new_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(durable, "sync", lambda path: done.append(path.name))
    replace = durable.os.replace
    monkeypatch.setattr(durable.os, "replace", lambda old, new: (done.append("replace"), replace(old, new)))
    for content in ("text ä", b"bytes"):
        durable.write_atomically(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert done[1:3] == ["replace", tmp_path.name] and done[0].startswith(".file.") and len(done) == 6
