"""`python -m sslbook.train`: parse, pre-train, report.

python -m sslbook.train                                   SimCLR on Shapes, two minutes on a CPU
python -m sslbook.train simclr --data.folder PHOTOS --epochs 50
torchrun --nproc-per-node 8 -m sslbook.train moco --recipe imagenet --data.root data
"""

import sys
from pathlib import Path

import torch

from sslbook import distributed
from sslbook.cli.recipes import resolve
from sslbook.cli.slurm import submit
from sslbook.engine.loop import pretrain
from sslbook.engine.preemption import requeue
from sslbook.errors import UserError

ERROR_HINTS = {  # what torch says of batches and images that are too small or too large, and what to do about it
    "Expected more than 1 value per channel": "batch norm needs more than one image at a time: raise --batch_size, or "
    "lower --grad_accum_steps",
    "Kernel size can't be greater than actual input size": "the views are too small for the backbone: raise their size",
    "doesn't match model": "this timm model takes images of one size: give the views that size, or the backbone theirs "
    "by --method.backbone.dict_kwargs.img_size, or by --method.backbone.dict_kwargs.dynamic_img_size true",
    "Connection closed by peer": "another process of this run ended: its output says why; go on with --resume",
    "Connection reset by peer": "another process of this run ended: its output says why; go on with --resume",
    "can't allocate memory": "out of memory: lower --batch_size or the views' size, or raise --grad_accum_steps",
}


def main(argv: list[str] | None = None) -> None:
    """Train what the command line says, and report it.

    Raises:
        UserError: something the user can mend.
    """
    words = sys.argv[1:] if argv is None else argv
    parser, config, resolved = resolve(words, pretrain)
    if config.launcher is not None:
        return submit(words, parser.construct(config).slurm, config.out_dir and Path(config.out_dir))
    torch.manual_seed(config.seed)  # the initial weights
    distributed.setup(device=config.device)  # from here on, what is printed is printed once
    try:
        options = vars(parser.construct(config))
        for name in ("config", "recipe", "trust", "launcher", "slurm"):
            options.pop(name, None)
        report_kind, protocols = options.pop("report"), options.pop("protocols")
        if protocols is not None:  # what cannot be measured is refused now, not after the training
            from sslbook.evaluation.base import chosen, require

            backbone, data = options["method"].backbone, options["data"]
            require(chosen(protocols, backbone, data), backbone, data)
        if distributed.is_main():
            print(options["data"].describe())
        run = pretrain(**options, config=resolved)
        is_main = distributed.is_main()
        distributed.shutdown()  # what is measured now is one process's work, and must not wait for the others
        if is_main:
            if run.finished and not run.metrics:  # no step was left to take
                print(
                    f"{run.folder} is finished: {run.clock.step} of {run.clock.total_steps} steps; --epochs takes it on"
                )
            if not run.finished:
                print(f"stopped after step {run.clock.step}; go on with: python -m sslbook.train --resume {run.folder}")
                requeue(run.stopped_by)
            elif report_kind != "none":
                from sslbook.report import report

                report(run, full=report_kind == "full", protocols=protocols)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"out of GPU memory: lower --batch_size or raise --grad_accum_steps ({reason})") from None
    except (ValueError, RuntimeError, AssertionError) as error:
        hint = next((hint for words, hint in ERROR_HINTS.items() if words in str(error)), None)
        if isinstance(error, UserError) or hint is None:
            raise
        raise UserError(hint) from None
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    from sslbook.cli.common import run

    run(main)
