"""Exercises with instant checks, each declared once: solution, inputs, mistakes.

A chapter's exercises live in its folder, `book/chapters/NAME/exercises.py`:

    @exercise(
        inputs=lambda random: [(random.normal(8, 40), tau) for tau in (0.1, 0.5)],
        returns={"weights": "one row per query, one column per neighbor"},
        mistakes={
            "the temperature multiplies: divide by it": {"power": 1},
            "a constant factor is missing": lambda s, tau: 2 * weights.solution(s, tau),
        },
    )
    def weights(similarity, temperature, *, power=-1):
        return (similarity * temperature**power).exp()

A mistake is a wrong function, or the solution with other values of its keyword-only options, or a list of such. In a
chapter `from sslbook.book.chapters.NAME import exercises as check`, then `check.weights(my_function)`. It prints one
line that lists what was compared, or raises `CheckFailed` with the message of the mistake that gives the same wrong
values. A stub (it returns `...` or raises NotImplementedError) is reported as not written yet and raises nothing, so
that a chapter with unsolved exercises runs to its end.

One test (`tests/book/test_chapter_exercises.py`) proves of every exercise what the declaration promises.
"""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

NO_GRADIENT = "no gradient flows back: is there a .detach(), .item() or torch.no_grad() on the way?"


class CheckFailed(AssertionError):
    """The answer is wrong; the message is one line that names the mistake."""

    def _render_traceback_(self) -> list[str]:  # in a notebook: the line alone, not the check's own source
        return [f"CheckFailed: {self}"]


class _NotWritten(Exception):
    pass


class Random:
    """Seeded random inputs: an exercise has the same ones every time.

    Args:
        name: the exercise's name, from which the seed is made.
    """

    def __init__(self, name: str):
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers from 0 to `high - 1`."""
        return torch.randint(high, shape, generator=self.generator)


@dataclass
class Outcome:
    """What a function gave for one case: its parts by name, and an error that the solution does not have."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    error: str = ""


class Exercise:
    """A declared exercise; called with the reader's function, it checks it.

    Args:
        solution: the right function; what a mistake may change stands behind `*`, with the right value as default.
        inputs: from `Random` to the cases, each a tuple of arguments.
        mistakes: from a message to a wrong function, to other values of the solution's options, or to a list of both.
        returns: what the solution returns, by name, with a hint that is shown where the shape is wrong.
        compare: from a returned value to what matters of it, where several are right (a ratio, an order).
        gradient: compare the gradients for all floating-point arguments, too.
        rtol: relative tolerance; it must let an epsilon in a denominator pass.
        atol: absolute tolerance.
    """

    def __init__(
        self,
        solution: Callable,
        *,
        inputs: Callable[[Random], Sequence[tuple]],
        mistakes: Mapping[str, Any],
        returns: Mapping[str, str] | None = None,
        compare: Callable[[Tensor], Tensor] = lambda value: value,
        gradient: bool = False,
        rtol: float = 1e-3,
        atol: float = 1e-5,
    ):
        self.solution, self.inputs, self.compare, self.gradient = solution, inputs, compare, gradient
        self.returns, self.rtol, self.atol = dict(returns or {"value": ""}), rtol, atol
        self.mistakes: dict[str, list[Callable]] = {}
        for message, wrong in mistakes.items():
            variants = wrong if isinstance(wrong, list) else [wrong]
            self.mistakes[message] = [functools.partial(solution, **v) if isinstance(v, dict) else v for v in variants]
        functools.update_wrapper(self, solution)
        self.name: str = solution.__name__

    def __call__(self, answer: Any) -> None:
        if not callable(answer):
            raise CheckFailed(f"{self.name}: give the function itself, as in check.{self.name}(my_function)")
        expected = self.outcomes(self.solution)
        try:
            found = self.outcomes(answer)
        except _NotWritten:
            print(f"{self.name}: not written yet")
            return
        if message := self._diagnose(found, expected):
            raise CheckFailed(f"{self.name}: {message}")
        print(f"{self.name}: passed ({', '.join(expected[0].parts)}; inputs: {len(expected)})")

    def outcomes(self, function: Callable) -> list[Outcome]:
        """What `function` gives for every case."""
        return [self._outcome(function, arguments) for arguments in self.inputs(Random(self.name))]

    def _outcome(self, function: Callable, arguments: tuple) -> Outcome:
        given = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        try:
            outcome = Outcome(self._parts(function(*given)))
        except _NotWritten:
            raise
        except _Malformed as error:
            return Outcome(error=str(error))
        except Exception as error:
            first = str(error).splitlines()[0] if str(error) else ""
            if isinstance(error, NotImplementedError) and not first:  # torch's own have a message
                raise _NotWritten from None
            return Outcome(error=f"raised {type(error).__name__}: {first}")
        for i, (now, before) in enumerate(zip(given, arguments)):
            if isinstance(now, Tensor) and not torch.equal(now.nan_to_num(), before.nan_to_num()):
                outcome.error = f"changed its argument number {i + 1} in place: work on a copy, the caller needs it"
        if self.gradient and not outcome.error:
            gradients = self._gradients(function, arguments)
            outcome.parts.update(gradients)
            outcome.error = "" if gradients else NO_GRADIENT
        return outcome

    def _parts(self, returned: Any) -> dict[str, Tensor]:
        """The returned values as tensors: Python numbers, lists, numpy arrays and bool are as good."""
        if returned is ...:  # pyrefly: ignore
            raise _NotWritten
        if returned is None:
            raise _Malformed("returned None: is the return statement missing?")
        if len(self.returns) == 1:
            returned = [returned]
        try:
            fits = len(returned) == len(self.returns)
        except TypeError:
            fits = False
        if not fits:
            raise _Malformed(f"return {len(self.returns)} values: {', '.join(self.returns)}")
        return {name: _tensor(value) for name, value in zip(self.returns, returned)}

    def _gradients(self, function: Callable, arguments: tuple) -> dict[str, Tensor]:
        """Of the sum of what is returned, for all floating-point arguments; empty where none flows back."""
        leaves = [a.clone().requires_grad_() for a in arguments if _differentiable(a)]
        each = iter(leaves)
        try:
            returned = function(*[next(each) * 1 if _differentiable(a) else a for a in arguments])
            gradients = torch.autograd.grad(returned.sum(), leaves, allow_unused=True, materialize_grads=True)
        except (RuntimeError, AttributeError, TypeError):
            return {}
        return {f"gradient {i + 1}" if len(leaves) > 1 else "gradient": g for i, g in enumerate(gradients)}

    def same(self, a: Outcome, b: Outcome, only: str | None = None) -> bool:
        """Whether two outcomes agree in what matters, or in one part of it."""
        names = [only] if only else list(b.parts)
        return all(name in a.parts and self._close(a.parts[name], b.parts[name]) for name in names)

    def _close(self, a: Tensor, b: Tensor) -> bool:
        if a.numel() == b.numel() == 1:
            a = a.reshape(b.shape)
        if a.shape != b.shape:
            return False
        a, b = self.compare(a.double()), self.compare(b.double())
        return torch.allclose(a, b, rtol=self.rtol, atol=self.atol, equal_nan=True)

    def _diagnose(self, found: list[Outcome], expected: list[Outcome]) -> str:
        """Empty if all agree; else the mistake that gives the same values, or where they differ."""
        for case, (value, right) in enumerate(zip(found, expected)):
            part = next((name for name in right.parts if not self.same(value, right, name)), None)
            if part is None and not value.error:
                continue
            if part is not None and part in value.parts:
                return self._named(found, case, part) or self._difference(value.parts[part], right.parts[part], part)
            return self._named(found, case, None) or value.error
        return ""

    def _named(self, found: list[Outcome], case: int, part: str | None) -> str:
        """The mistake that explains all cases; else, of those that explain this one, that which explains most."""
        known = [(m, self.outcomes(fn)) for m, variants in self.mistakes.items() for fn in variants]
        for message, wrong in known:
            if all(self.same(a, b) and self.same(b, a) and a.error == b.error for a, b in zip(found, wrong)):
                return message
        if part is None:
            return ""
        explained = {
            m: sum(part in b.parts and self.same(a, b, part) for a, b in zip(found, wrong))
            for m, wrong in known
            if part in wrong[case].parts and self.same(found[case], wrong[case], part)
        }
        return max(explained, key=explained.__getitem__, default="")

    def _difference(self, value: Tensor, right: Tensor, name: str) -> str:
        if value.shape != right.shape and not value.numel() == right.numel() == 1:
            hint = self.returns.get(name, "")
            return f"{name}: shape {tuple(value.shape)}, expected {tuple(right.shape)}{': ' * bool(hint)}{hint}"
        value, right = self.compare(value.double().reshape(right.shape)), self.compare(right.double())
        lost = ~torch.isfinite(value) & torch.isfinite(right)
        if lost.any():
            return f"{name}: {int(lost.sum())} of {value.numel()} are not finite (NaN or Inf)"
        off = (value - right).abs()
        at = tuple(int(i) for i in torch.unravel_index(off.argmax(), off.shape))
        place = f" at {list(at)}" if at else ""
        return f"{name}: {value[at].item():.5g}{place}, expected {right[at].item():.5g}"


class _Malformed(Exception):
    pass


def _tensor(value: Any) -> Tensor:
    try:
        if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
            value = torch.stack([torch.as_tensor(v) for v in value])
        return torch.as_tensor(value if isinstance(value, Tensor) else np.asarray(value)).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise _Malformed(f"must return numbers (a tensor, an array, a list), not {type(value).__name__}") from None


def _differentiable(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


def exercise(**declaration: Any) -> Callable[[Callable], Exercise]:
    """Declare the decorated function an exercise's solution; see `Exercise` for the arguments."""
    return lambda solution: Exercise(solution, **declaration)
