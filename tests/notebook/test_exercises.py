import pytest
import torch

from sslbook.notebook.exercises import Check, CheckFailed, exercise


@exercise
def double(check, answer):
    x = check.random(3, 2)
    got = check.call(answer, x)
    check.shape(got, (3, 2), "one number for each")
    check.dtype(got, torch.float32)
    check.close(got, 2 * x, mistakes={"you squared: multiply by two": x**2})
    check.gradient(answer, lambda x: 2 * x, x, mistakes={"the gradient of a square": lambda x: x**2})


def test_passing_prints_what_was_compared(capsys):
    double(lambda x: x + x)
    assert capsys.readouterr().out == "double: passed (shape, dtype, values, gradient)\n"


@pytest.mark.parametrize("stub", [lambda x: ..., lambda x: (_ for _ in ()).throw(NotImplementedError)])
def test_a_stub_is_no_mistake(stub, capsys):
    double(stub)
    assert capsys.readouterr().out == "double: not written yet\n"


def in_place(x):
    return x.mul_(2)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x**2, "double: you squared: multiply by two"),
        (lambda x: 2 * x[0], r"double: returned shape \(2,\), expected \(3, 2\): one number for each"),
        (lambda x: (2 * x).double(), "double: returned torch.float64, expected torch.float32"),
        (lambda x: 2 * x + 1, r"double: values: \S+ at \[\d, \d\], expected"),
        (lambda x: x / 0, "double: values: 6 of 6 are not finite"),
        (lambda x: 2 * x.detach(), "double: no gradient flows back"),
        (lambda x: x + x.detach(), "double: gradient: 1 at"),
        (lambda x: None, "double: returned None: is the return statement missing"),
        (lambda x: 3.0, "double: must return a tensor, not float"),
        (lambda x: x.nonsense, "double: raised AttributeError: 'Tensor' object has no attribute 'nonsense'"),
        (in_place, "double: changed its argument number 1 in place"),
    ],
)
def test_mistakes_are_named_in_one_line(answer, message):
    with pytest.raises(CheckFailed, match=message) as failure:
        double(answer)
    assert "\n" not in str(failure.value)


def test_rejects_what_is_not_a_function():
    with pytest.raises(CheckFailed, match="give the function itself"):
        double(torch.zeros(3))


def test_inputs_are_the_same_every_time():
    assert torch.equal(Check("a").random(5), Check("a").random(5))
    assert not torch.equal(Check("a").random(5), Check("b").random(5))


def test_that_and_integers(capsys):
    @exercise
    def parity(check, answer):
        n = check.integers(10, 50)
        check.that((check.call(answer, n) == n % 2).all(), "use the remainder by two", "50 integers")

    parity(lambda n: n & 1)
    assert capsys.readouterr().out == "parity: passed (50 integers)\n"
    with pytest.raises(CheckFailed, match="parity: use the remainder by two"):
        parity(lambda n: n // 2)
