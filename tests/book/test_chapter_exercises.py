"""Every exercise of every chapter keeps what its declaration promises (`sslbook.notebook.exercises`)."""

import importlib
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sslbook.book import chapters
from sslbook.notebook.exercises import CheckFailed, Exercise, Outcome


def declared() -> Iterator[tuple[str, Exercise]]:
    for chapter in chapters.CHAPTERS:
        if not find_spec(f"{chapters.__name__}.{chapter}.exercises"):
            continue  # named by test_all_chapters_declare_exercises
        module = importlib.import_module(f"{chapters.__name__}.{chapter}.exercises")
        yield from ((f"{chapter}.{name}", v) for name, v in vars(module).items() if isinstance(v, Exercise))


EXERCISES = dict(declared())
MISTAKES = [(name, message) for name, exercise in EXERCISES.items() for message in exercise.mistakes]


def test_all_chapters_declare_exercises() -> None:
    assert len({name.split(".")[0] for name in EXERCISES}) == len(chapters.CHAPTERS)
    assert all(name.endswith(f".{exercise.name}") for name, exercise in EXERCISES.items())


@pytest.fixture(params=EXERCISES)
def exercise(request: pytest.FixtureRequest) -> Exercise:
    return EXERCISES[request.param]


def test_the_solution_passes(exercise: Exercise, capsys: pytest.CaptureFixture[str]) -> None:
    exercise(exercise.solution)
    assert capsys.readouterr().out.startswith(f"{exercise.name}: passed (")


@pytest.mark.parametrize(("name", "message"), MISTAKES, ids=[f"{n}-{m[:40].replace(' ', '_')}" for n, m in MISTAKES])
def test_a_mistake_is_named(name: str, message: str) -> None:
    for wrong in EXERCISES[name].mistakes[message]:
        with pytest.raises(CheckFailed, match=f"^{re.escape(f'{EXERCISES[name].name}: {message}')}$"):
            EXERCISES[name](wrong)


def test_mistakes_differ_from_each_other_and_from_the_solution(exercise: Exercise) -> None:
    def agree(a: list[Outcome], b: list[Outcome]) -> bool:
        return all(exercise.same(x, y) and exercise.same(y, x) and x.error == y.error for x, y in zip(a, b))

    seen = {"the solution": exercise.outcomes(exercise.solution)}
    for message, variants in exercise.mistakes.items():
        new = [exercise.outcomes(wrong) for wrong in variants]
        for other, known in seen.items():
            assert not any(agree(outcomes, known) for outcomes in new), f"{message} gives the same as {other}"
        seen |= {f"{message} ({i})": outcomes for i, outcomes in enumerate(new)}


@pytest.mark.parametrize("stub", [lambda *_: ..., lambda *_: (_ for _ in ()).throw(NotImplementedError)])
def test_a_stub_is_not_written_yet(exercise: Exercise, stub: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    exercise(stub)
    assert capsys.readouterr().out == f"{exercise.name}: not written yet\n"


def parts(convert: Callable[[Tensor], Any], returned: Any) -> Any:
    if isinstance(returned, (tuple, list)):
        return [parts(convert, value) for value in returned]
    return convert(torch.as_tensor(returned))


KINDS = {
    "numpy": lambda x: x.numpy(),
    "lists and floats": lambda x: x.tolist(),
    "float64": lambda x: x.double(),
    "one element": lambda x: x.reshape(1) if x.ndim == 0 else x,
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_number_is_accepted(exercise: Exercise, kind: str) -> None:
    if exercise.gradient and kind in ("numpy", "lists and floats"):
        with pytest.raises(CheckFailed, match="no gradient flows back"):
            exercise(lambda *args: parts(KINDS[kind], exercise.solution(*args)))
    else:
        exercise(lambda *args: parts(KINDS[kind], exercise.solution(*args)))


def test_nothing_changes_its_inputs(exercise: Exercise) -> None:
    for function in (exercise.solution, *(fn for variants in exercise.mistakes.values() for fn in variants)):
        assert not any("in place" in outcome.error for outcome in exercise.outcomes(function))


def test_changing_an_input_is_refused(exercise: Exercise) -> None:
    def in_place(*args: Any) -> Any:
        returned = parts(lambda x: x.clone(), exercise.solution(*args))
        for a in args:
            if isinstance(a, Tensor):
                a.zero_() if a.dtype == torch.bool else a.mul_(2).add_(1)
        return returned

    if any(isinstance(a, Tensor) for case in exercise_inputs(exercise) for a in case):
        with pytest.raises(CheckFailed, match=r"changed its argument number \d in place"):
            exercise(in_place)


def exercise_inputs(exercise: Exercise) -> list[tuple]:
    seen: list[tuple] = []
    exercise(lambda *args: seen.append(args) or exercise.solution(*args))
    return seen


def test_an_unforeseen_mistake_fails(exercise: Exercise) -> None:
    with pytest.raises(CheckFailed):
        exercise(
            lambda *args: parts(
                lambda x: 1.37 * x.double() + torch.rand(x.shape).double() + 0.2, exercise.solution(*args)
            )
        )
    assert np.isfinite(exercise.rtol)
    assert exercise.rtol <= 2e-2
