"""What an exercise's check accepts, refuses and says."""

import numpy as np
import pytest
import torch

from sslbook.notebook.exercises import CheckFailed, Random, exercise


@exercise(
    inputs=lambda r: [(r.normal(3, 2), 2.0), (r.normal(1, 2), 5.0)],
    returns={"product": "one number for each"},
    mistakes={
        "you squared: multiply": [lambda x, c: x * x, lambda x, c: x**2 / 2],
        "divided: multiply by c": {"power": -1},
        "added": lambda x, c: x + c,
        "the gradient passes twice": lambda x, c: c * (2 * x - x.detach()),
    },
    gradient=True,
)
def scaled(x, c, *, power=1):
    """x times c."""
    return x * c**power


@exercise(
    inputs=lambda r: [(r.normal(9),), (r.normal(4),)],
    returns={"lowest": "", "highest": "one number"},
    mistakes={"exchanged": lambda x: (x.max(), x.min())},
)
def ends(x):
    return x.min(), x.max()


@exercise(
    inputs=lambda r: [(r.uniform(4),)],
    returns={"fractions": ""},
    compare=lambda p: p / p.sum(),
    mistakes={"all alike": torch.ones_like},
)
def fractions(x):
    return x


def test_passing_prints_what_was_compared(capsys):
    scaled(lambda x, c: c * x)
    assert capsys.readouterr().out == "scaled: passed (product, gradient; inputs: 2)\n"
    assert scaled.__doc__ == "x times c."


@pytest.mark.parametrize("stub", [lambda *_: ..., lambda *_: (_ for _ in ()).throw(NotImplementedError)])
def test_a_stub_is_no_mistake(stub, capsys):
    for check in (scaled, ends):
        check(stub)
        assert capsys.readouterr().out == f"{check.name}: not written yet\n"


def test_an_operation_that_torch_lacks_is_reported():
    with pytest.raises(CheckFailed, match="ends: raised NotImplementedError: clamp is not supported"):
        ends(lambda x: x.to(torch.complex64).clamp(0))


def in_place(x, c):
    return x.mul_(c)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x, c: x**2, "scaled: you squared: multiply"),
        (lambda x, c: x * x / 2, "scaled: you squared: multiply"),
        (lambda x, c: x / c, "scaled: divided: multiply by c"),
        (lambda x, c: x + c if len(x) == 1 else x * c, "scaled: added"),  # the first wrong case tells
        (lambda x, c: x * c + 0 if len(x) == 3 else -x, r"scaled: product: \S+ at \[0, \d\], expected"),
        (lambda x, c: c * x[0], r"scaled: product: shape \(2,\), expected \(3, 2\): one number for each"),
        (lambda x, c: c * x + 1, r"scaled: product: \S+ at \[\d, \d\], expected"),
        (lambda x, c: x / 0, "scaled: product: 6 of 6 are not finite"),
        (lambda x, c: c * x.detach(), "scaled: no gradient flows back"),
        (lambda x, c: (c * x.detach()).tolist(), "scaled: no gradient flows back"),
        (lambda x, c: c * (2 * x - x.detach()), "scaled: the gradient passes twice"),
        (lambda x, c: c * (3 * x - 2 * x.detach()), r"scaled: gradient: \S+ at"),
        (lambda x, c: None, "scaled: returned None: is the return statement missing"),
        (lambda x, c: "six", r"scaled: must return numbers \(a tensor, an array, a list\), not str"),
        (lambda x, c: x.nonsense, "scaled: raised AttributeError: 'Tensor' object has no attribute 'nonsense'"),
        (in_place, "scaled: changed its argument number 1 in place"),
    ],
)
def test_mistakes_are_named_in_one_line(answer, message):
    with pytest.raises(CheckFailed, match=message) as failure:
        scaled(answer)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: (x.max(), x.min()), "ends: exchanged"),
        (lambda x: x.min(), "ends: return 2 values: lowest, highest"),
        (lambda x: (x.min(), x.sort().values), r"ends: highest: shape \(9,\), expected \(\): one number"),
        (lambda x: (x.max(), 0.0), "ends: exchanged"),  # one part tells, though the other is another mistake
        (lambda x: (x.min(), x.max() + 1), "ends: highest: "),
    ],
)
def test_several_values(answer, message):
    with pytest.raises(CheckFailed, match=message):
        ends(answer)


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: (float(x.min()), float(x.max())),
        lambda x: [x.min().double(), x.amax(0, keepdim=True)],
        lambda x: (np.min(x.numpy()), x.numpy().max()),
        lambda x: x.aminmax(),
        lambda x: torch.stack([x.min(), x.max()]),
        lambda x: (min(x.tolist()), max(x)),
    ],
)
def test_any_kind_of_number_is_accepted(answer, capsys):
    ends(answer)
    assert "passed (lowest, highest; inputs: 2)" in capsys.readouterr().out


def test_only_what_matters_is_compared():
    fractions(lambda x: 7 * x)
    with pytest.raises(CheckFailed, match="all alike"):
        fractions(lambda x: 0 * x + 3)


def test_rejects_what_is_not_a_function():
    with pytest.raises(CheckFailed, match="give the function itself"):
        scaled(torch.zeros(3))


def test_inputs_are_the_same_every_time():
    for draw in (lambda r: r.normal(5), lambda r: r.uniform(5), lambda r: r.integers(99, 5)):
        assert torch.equal(draw(Random("a")), draw(Random("a")))
        assert not torch.equal(draw(Random("a")), draw(Random("b")))
