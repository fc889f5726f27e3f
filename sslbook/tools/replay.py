"""Look at the step where a loss stopped being a number: `python -m sslbook.tools.replay RUN/failed-step-12-rank-0.pt`."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from sslbook.checkpoint import read
from sslbook.cli.common import cli, run
from sslbook.cli.recipes import require_own_code, resolve
from sslbook.data.loader import Batch
from sslbook.engine.loop import pretrain
from sslbook.errors import explained
from sslbook.files import Whole, check
from sslbook.schedules import Clock

CLOCK = {"step": Whole(), "total_steps": Whole(1), "steps_per_epoch": Whole(1), "seed": Whole(-(2**63))}
FAILURE = {
    **{"format": "sslbook failure 2", "method": {str: Tensor}, "views": [Tensor], "index": Tensor, "label": Tensor},
    **{"clock": CLOCK, "loss": object},
}


def replay(failure: str, trust: bool = False) -> None:
    """Compute a failed step again and say which part of the network was the first to give NaN or Inf.

    Args:
        failure: the file `failed-step-*.pt` that the run left in its folder, beside its config.yaml.
        trust: let that config.yaml import code from outside sslbook, such as a method of your own.

    Raises:
        UserError: it is no such file, or the config.yaml is not there.
    """
    path = Path(failure)
    state = read(path)
    check(path, state, FAILURE)
    if not trust:
        require_own_code(path.parent / "config.yaml")
    parser, config, _ = resolve(["--config", str(path.parent / "config.yaml")], pretrain)
    made = parser.construct(config)
    method = made.method
    method.setup(made.data)
    with explained(f"{path}: does not fit the run's config.yaml", RuntimeError):
        method.load_state_dict(state["method"])
    method.train()
    bad = [name for name, p in method.named_parameters() if not torch.isfinite(p).all()]
    print(f"weights: {len(bad)} parameters hold NaN or Inf{': ' + bad[0] if bad else ''}")
    for i, view in enumerate(state["views"]):
        print(f"view {i}: {tuple(view.shape)}, from {view.min():.3f} to {view.max():.3f}")
    batch = Batch(tuple(state["views"]), state["index"], state["label"])
    found = first_not_finite(method, batch, Clock(**state["clock"]))
    print(found or "computed again in float32, the loss is a number: the precision of the run was too low")


def first_not_finite(method: nn.Module, batch: Batch, clock: Clock) -> str | None:
    """The first module whose output holds NaN or Inf, in the order of computation."""
    found: list[str] = []

    def watch(name: str):
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            if not found and isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(f"first NaN or Inf: the output of {name} ({type(module).__name__})")

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in method.named_modules() if name]
    try:
        loss = method(batch, clock)["loss"].detach().item()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    return None if math.isfinite(loss) else f"every module's output is finite, the loss itself is {loss}"


def main(argv: list[str] | None = None) -> None:
    """`python -m sslbook.tools.replay`."""
    cli(replay, argv, prog="python -m sslbook.tools.replay")


if __name__ == "__main__":
    run(main)
