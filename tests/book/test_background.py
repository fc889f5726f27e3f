"""The page *Background*: every block runs, checks something, and is short; every section has its label."""

import re
from pathlib import Path

import pytest
import torch

from sslbook import results

PAGE = results.book() / "background" / "background.md"
SECTIONS = {
    label: text
    for label, text in re.findall(r"^\((bg-[a-z-]+)\)=\n(.*?)(?=^\(bg-|\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
}
LABELS = "softmax entropy kl mutual-information jensen attention batch-norm ema whitening"


def test_sections_have_their_labels() -> None:
    assert list(SECTIONS) == [f"bg-{name}" for name in LABELS.split()]
    assert all("**Property" in text and "*Proof.*" in text for text in SECTIONS.values())


@pytest.mark.parametrize("label", SECTIONS)
def test_block_runs_alone_and_checks_its_property(label: str) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", SECTIONS[label], re.MULTILINE | re.DOTALL)
    assert len(block.splitlines()) <= 12
    assert max(map(len, block.splitlines())) <= 86
    assert "assert " in block
    for seed in range(5):
        torch.manual_seed(seed)
        exec(compile(block, str(Path(PAGE.name)), "exec"), {})
