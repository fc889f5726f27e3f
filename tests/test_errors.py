"""Errors of others in one line, and names that are not known."""

from pathlib import Path

import pytest

from sslbook.errors import UserError, explained, require_known


def test_errors_of_some_kinds_are_said_in_one_line() -> None:
    with pytest.raises(
        UserError, match=r"^x\.txt: cannot be read \(No such file or directory\): name another$"
    ) as caught:
        with explained("x.txt: cannot be read", OSError, cure="name another"):
            Path("/no/such/file").read_text()
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(UserError, match=r"^optimizer: two lines$"), explained("optimizer", ValueError):
        raise ValueError("two\n  lines.")
    with pytest.raises(UserError, match=r"^optimizer: ValueError$"), explained("optimizer", ValueError):
        raise ValueError


def test_what_a_user_can_read_already_and_other_kinds_pass() -> None:
    with pytest.raises(UserError, match=r"^read me$"), explained("what", ValueError):
        raise UserError("read me")
    with pytest.raises(KeyError), explained("what", ValueError):
        raise KeyError("other")


def test_an_unknown_name_is_answered_with_the_nearest_or_with_all_of_few() -> None:
    require_known("b", {"a": 1, "b": 2}, "no letter b")
    with pytest.raises(UserError, match=r"^no method simclar; did you mean simclr\?$"):
        require_known("simclar", ["simclr", "mae"], "no method simclar")
    with pytest.raises(UserError, match=r"^no method 77; choose one of simclr, mae$"):
        require_known("77", ["simclr", "mae"], "no method 77")
    with pytest.raises(UserError, match=r"^no number zz$"):
        require_known("zz", map(str, range(13)), "no number zz")
