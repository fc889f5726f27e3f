"""Instant checks for exercises, whose messages name the misconception.

A check runs the reader's function on random inputs and compares it with a reference. Where the answer is wrong it looks
among the answers that known mistakes give, and says which mistake it was. A chapter's checks live in its folder,
`book/chapters/NAME/exercises.py`:

    @exercise
    def knn_vote(check, answer):
        scores = check.call(answer, similarity, labels, ...)
        check.shape(scores, (8, 3), "one row per query, one column per class")
        check.close(scores, expected, mistakes={"the temperature divides ...": wrong_scores})

In a chapter `from sslbook.book.chapters.NAME import exercises as check`, then `check.knn_vote(knn_vote)`. It prints
one line that lists what was compared, or raises `CheckFailed`. A stub (it returns `...` or raises NotImplementedError)
is reported as not written yet and raises nothing, so that a chapter with unsolved exercises runs to its end.
"""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class CheckFailed(AssertionError):
    """The answer is wrong; the message is one line that names the mistake."""

    def _render_traceback_(self) -> list[str]:  # in a notebook: the line alone, not the check's own source
        return [f"CheckFailed: {self}"]


class _NotWritten(Exception):
    pass


class Check:
    """What a check function compares with; keeps the list of what was compared. Made by `exercise`.

    Args:
        name: the exercise's function.
    """

    def __init__(self, name: str):
        self.name = name
        self.compared: list[str] = []
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))  # the same inputs every time

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, generator=self.generator, dtype=dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers from 0 to `high - 1`."""
        return torch.randint(high, shape, generator=self.generator)

    def call(self, answer: Callable, *args: Any, **kwargs: Any) -> Any:
        """What the reader's function returns; errors become one line, and its inputs must be left as they were."""
        before = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
        try:
            returned = answer(*args, **kwargs)
        except NotImplementedError:
            raise _NotWritten from None
        except CheckFailed:
            raise
        except Exception as error:
            self.fail(f"raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        if returned is ...:  # pyrefly: ignore
            raise _NotWritten
        if returned is None:
            self.fail("returned None: is the return statement missing?")
        for i, (a, b) in enumerate(zip(args, before)):
            if isinstance(a, Tensor) and not torch.equal(a.detach().nan_to_num(), b.nan_to_num()):
                self.fail(f"changed its argument number {i + 1} in place: work on a copy, the caller still needs it")
        return returned

    def that(self, holds: bool | Tensor, message: str, what: str | None = None) -> None:
        """Any condition; `what` is added to the list of what was compared."""
        if not bool(holds):
            self.fail(message)
        self._note(what)

    def shape(self, value: Any, shape: Sequence[int], hint: str = "") -> None:
        if not isinstance(value, Tensor):
            self.fail(f"must return a tensor, not {type(value).__name__}")
        if tuple(value.shape) != tuple(shape):
            self.fail(f"returned shape {tuple(value.shape)}, expected {tuple(shape)}{': ' * bool(hint)}{hint}")
        self._note("shape")

    def dtype(self, value: Tensor, dtype: torch.dtype, hint: str = "") -> None:
        if value.dtype != dtype:
            self.fail(f"returned {value.dtype}, expected {dtype}{': ' * bool(hint)}{hint}")
        self._note("dtype")

    def close(
        self,
        value: Any,
        expected: Any,
        *,
        mistakes: Mapping[str, Any] | None = None,
        what: str = "values",
        rtol: float = 1e-4,
        atol: float = 1e-5,
    ) -> None:
        """`value` equals `expected`; if it equals one of the `mistakes` instead, that message is the error.

        Args:
            value: what the reader's function returned.
            expected: the reference.
            mistakes: from a message to the value that this mistake would give.
            what: the name in the list of what was compared.
            rtol: relative tolerance.
            atol: absolute tolerance.
        """
        value, expected = torch.as_tensor(value).detach(), torch.as_tensor(expected).detach()
        if not torch.isfinite(value).all() and torch.isfinite(expected).all():
            self.fail(f"{what}: {int((~torch.isfinite(value)).sum())} of {value.numel()} are not finite (NaN or Inf)")

        def same(a: Tensor, b: Any) -> bool:
            b = torch.as_tensor(b).detach()
            return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=rtol, atol=atol)

        if not same(value, expected):
            for message, wrong in (mistakes or {}).items():
                if same(value, wrong):
                    self.fail(message)
            if value.shape != expected.shape:
                self.fail(f"{what}: shape {tuple(value.shape)}, expected {tuple(expected.shape)}")
            off = (value.double() - expected.double()).abs()
            at = tuple(int(i) for i in torch.unravel_index(off.argmax(), off.shape))
            place = f" at {list(at)}" if at else ""
            self.fail(f"{what}: {value[at].item():.5g}{place}, expected {expected[at].item():.5g}")
        self._note(what)

    def gradient(
        self,
        answer: Callable[..., Tensor],
        reference: Callable[..., Tensor],
        *inputs: Tensor,
        mistakes: Mapping[str, Callable[..., Tensor]] | None = None,
        what: str = "gradient",
    ) -> None:
        """The gradients of `answer(*inputs).sum()` equal the reference's, for every floating-point input."""

        def gradients(fn: Callable[..., Tensor], call: bool = False) -> list[Tensor]:
            copies = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
            out = (self.call(fn, *copies) if call else fn(*copies)).sum()
            if not out.requires_grad:
                self.fail("no gradient flows back: is there a .detach(), .item() or torch.no_grad() on the way?")
            wanted = [x for x in copies if x.requires_grad]
            found = torch.autograd.grad(out, wanted, allow_unused=True)
            return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found)]

        wrongs = {message: gradients(fn) for message, fn in (mistakes or {}).items()}
        expected = gradients(reference)
        for i, (value, right) in enumerate(zip(gradients(answer, call=True), expected)):
            self.close(value, right, mistakes={message: wrong[i] for message, wrong in wrongs.items()}, what=what)

    def fail(self, message: str) -> Any:
        raise CheckFailed(f"{self.name}: {message}")

    def _note(self, what: str | None) -> None:
        if what and what not in self.compared:
            self.compared.append(what)


def exercise(test: Callable[..., None]) -> Callable[[Callable], None]:
    """Turn `test(check, answer)` into the check a chapter calls with the reader's function."""

    @functools.wraps(test)
    def run(answer: Any) -> None:
        check = Check(test.__name__)
        if not callable(answer):
            check.fail(f"give the function itself, as in check.{test.__name__}(my_function)")
        try:
            test(check, answer)
        except _NotWritten:
            print(f"{test.__name__}: not written yet")
            return
        print(f"{test.__name__}: passed ({', '.join(check.compared)})")

    return run
