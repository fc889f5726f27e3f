"""The one exception a user is meant to read."""


class UserError(ValueError):
    """Something the user can mend; the message is one line that says what is wrong and what to do about it.

    The command line prints it as ``error: ...`` without a traceback and leaves with status 2. From Python it is an
    ordinary `ValueError`.
    """


def nearest(word: str, words: list[str]) -> str:
    """`; did you mean X?` for the closest of `words`, or an empty string."""
    import difflib

    by_lower = {known.lower(): known for known in words}  # SimCLR is simclr
    found = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.5)
    return f"; did you mean {by_lower[found[0]]}?" if found else ""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def at_least_one(**counts: int) -> None:
    """Refuse a count below 1, by its name.

    Raises:
        UserError: one of them is below 1.
    """
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name} is {count}: give 1 or more")
