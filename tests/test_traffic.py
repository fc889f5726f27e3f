"""What methods send between processes is what the page on costs says."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sslbook.methods import load
from sslbook.schedules import Clock
from tests.methods.cases import case, make, make_batch

SCRIPT = Path(__file__).parents[1] / "book" / "reference" / "costs.py"
spec = importlib.util.spec_from_file_location("costs", SCRIPT)
costs = importlib.util.module_from_spec(spec)
sys.modules["costs"] = costs
spec.loader.exec_module(costs)


def within_batch_norm() -> bool:
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.endswith("batch_norm.py"):
        frame = frame.f_back
    return frame is not None


def sent(name: str, images: int) -> tuple[int, tuple[int, ...]]:
    """Values that a step sends, batch norm and gradients left out; and the sizes that the formulas take."""
    count = 0

    def counted(collective: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            parts, x = ([None], args[0]) if isinstance(args[0], torch.Tensor) else args[:2]
            if x.is_floating_point() and not within_batch_norm():
                count += len(parts) * x.numel()
            return collective(*args, **kwargs)

        return run

    names = ("all_gather", "all_reduce")
    originals = [getattr(torch.distributed, one) for one in names]
    for one, original in zip(names, originals):
        setattr(torch.distributed, one, counted(original))
    try:
        method = make(name).train()
        batch = make_batch(method, images)
        method(batch, Clock())["loss"].backward()
        method.before_optimizer_step(Clock())
        method.after_step(Clock(1))
    finally:
        for one, original in zip(names, originals):
            setattr(torch.distributed, one, original)
    outputs = getattr(method, "prototypes", getattr(method, "score_sum", torch.empty(0)))
    width = case(name).options.get("projector_dim", 0)
    return count, (
        2 * images,
        width,
        len(outputs),
        getattr(method, "sinkhorn_iterations", 0),
        batch.views[0][0].numel(),
    )


@pytest.mark.parametrize("name", costs.SENT)
def test_two_processes_send_what_the_formula_says(name: str, pool) -> None:
    for images in (4, 8):
        (count, sizes), other = pool.run(sent, name, images)
        assert other[0] == count
        assert count == costs.SENT[name][1](costs.Sizes(*sizes))


def test_the_sizes_are_those_of_the_recipes() -> None:
    sizes, parameters = costs.sizes_of("simclr")
    assert (sizes.N, sizes.d, sizes.P) == (4096, 128, 3 * 224**2)
    resnet_50, hidden = 23_508_032, 2048
    # Two layers of 2,048 with batch norm, and one of 128 whose norm has no shift; none has a bias.
    assert parameters == resnet_50 + 2 * hidden**2 + 128 * hidden + 2 * 2 * hidden + 128
    assert load("simclr").__name__ in costs.sent_table()


def test_the_page_is_up_to_date() -> None:
    text = costs.PAGE.read_text(encoding="utf-8")
    assert text == costs.page(text), "python book/reference/costs.py"
