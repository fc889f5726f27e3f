"""Start-up: what `import sslbook` adds to `import torch`, and how long `--help` takes."""

import argparse
import subprocess
import sys

from timing import table, take_turns

from sslbook import results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()

    def run(*words: str):
        return lambda: subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)

    sides = {
        "import torch": run("-c", "import torch"),
        "import torch, sslbook": run("-c", "import torch, sslbook"),
        "import torchvision": run("-c", "import torchvision"),
        "python -m sslbook.train --help": run("-m", "sslbook.train", "--help"),
    }
    rows = table(take_turns(sides, options.repetitions), 1, "starts")
    if options.save:
        print(results.save("benchmark_startup", rows, settings=vars(options)))


if __name__ == "__main__":
    main()
