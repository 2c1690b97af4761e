"""What a user is told: one line, of a length that can be read, whatever a library said."""

import contextlib
import errno
import io
import os
import sys

from celo2_pretrain.common.console import print_line, print_notice
from celo2_pretrain.common.errors import LONGEST, UserError, one_line


def test_a_user_error_is_one_line_of_bounded_length():
    torchs = RuntimeError("Error(s) in loading state_dict for GPT2LMHeadModel:\n\tsize mismatch for wte:\r\n\n  (2, 3)\x85\n")
    assert str(UserError(f"cannot resume: {torchs}; start anew")) == (
        "cannot resume: Error(s) in loading state_dict for GPT2LMHeadModel: size mismatch for wte: (2, 3) ; start anew"
    )
    assert str(UserError("two  spaces 'a  b' stay")) == "two  spaces 'a  b' stay"
    long = str(UserError("first\n" + "word\n" * 1000 + "last"))
    assert len(long) <= LONGEST and long.startswith("first word") and long.endswith("last") and "\n" not in long


def test_a_librarys_error_becomes_a_part_of_a_line():
    assert one_line(ValueError("size\tmismatch:\n\n  (2, 3)\x1b[0m")) == "size mismatch: (2, 3)?[0m"
    assert one_line(MemoryError()) == "MemoryError" and len(one_line(ValueError("word " * 1000))) < 410


class Full(io.StringIO):
    """A file on a full disk."""

    def write(self, text: str = "") -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    flush = write


def test_what_cant_be_told_ends_no_run_and_takes_no_error_with_it(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Full())
    told = io.StringIO()
    monkeypatch.setattr(sys, "stderr", told)
    print_line("step 3")
    print_notice("error: the first one")
    assert told.getvalue() == "celo2-pretrain: error: the first one\n"
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        print_line("step 4")  # tee was interrupted
        monkeypatch.undo()
        with contextlib.suppress(BrokenPipeError):
            gone.close()
