"""A figure with a slider that needs neither a kernel nor a network.

`sweep` renders one frame per value beforehand and stores them all in the notebook; moving the slider only chooses which
one is visible. So it works in the built site, opened from a local file, in JupyterLab, VS Code and Colab. Without
scripts (GitHub's preview) the default frame stands there as an ordinary image.

>>> sweep(plot, tau=[0.03, 0.1, 0.3, 1.0], default=0.1, alt="Weights of the negatives at temperature {tau}.")
"""

import html
import itertools
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import matplotlib.figure

from sslbook.errors import UserError
from sslbook.notebook import style

FRAMES = 24
BUDGET = 300_000  # bytes of one slider; a page may hold five
DPI = 108  # a slider's frames are many, so coarser than a single figure

# Inline, not a <script>: notebooks insert outputs by innerHTML, which runs handlers but no scripts.
_SHOW = """
var root=this.closest('.sslbook-sweep'),frame=0;
root.querySelectorAll('input').forEach(function(input){
var text=JSON.parse(input.dataset.texts)[input.value];
frame+=input.value*input.dataset.stride;
input.setAttribute('aria-valuetext',text);
input.parentNode.querySelector('output').textContent=text});
root.querySelectorAll('img').forEach(function(img,i){img.style.display=i===frame?'block':'none'})
""".replace("\n", "")


class Sweep:
    """Frames of one figure over one or two parameters; made by `sweep`."""

    def __init__(
        self,
        fn: Callable[..., matplotlib.figure.Figure],
        values: dict[str, list],
        default: dict[str, Any],
        alt: str | Callable[..., str] | None,
        labels: dict[str, str],
    ):
        self.fn, self.values, self.default, self.labels = fn, values, default, labels
        self.frames: list[tuple[str, str]] = []  # (data URL, alt text), the last parameter fastest
        self.width = 0.0
        for chosen in itertools.product(*values.values()):
            given = dict(zip(values, chosen))
            figure = fn(**given)
            self.width = max(self.width, figure.get_figwidth())
            self.frames.append((style.encode(figure, DPI), _alt(alt, given, figure)))
        if (size := len(self._repr_html_())) > BUDGET:
            raise UserError(
                f"the slider over {', '.join(values)} takes {size // 1000} kB of {BUDGET // 1000}; "
                "plot fewer frames, a smaller figure or fewer points"
            )

    def _repr_html_(self) -> str:
        shown = self._index(self.default)
        images = "".join(
            f'<img class="dark-light" src="{data}" alt="{html.escape(alt)}" '
            f'style="display:{"block" if i == shown else "none"};width:{round(self.width * 96)}px;'
            'max-width:100%;height:auto;background:transparent">'
            for i, (data, alt) in enumerate(self.frames)
        )
        stride, inputs = len(self.frames), []
        for name, values in self.values.items():
            stride //= len(values)
            texts = [_text(v) for v in values]
            at = values.index(self.default[name])
            inputs.append(
                '<label style="display:flex;align-items:center;gap:.6em;margin:.3em 0">'
                f"<span>{html.escape(self.labels.get(name, name))}</span>"
                f'<input type="range" min="0" max="{len(values) - 1}" step="1" value="{at}" autocomplete="off" '
                f'style="flex:1;min-width:6em;max-width:22em" aria-valuetext="{html.escape(texts[at])}" '
                f'data-stride="{stride}" data-texts="{html.escape(json.dumps(texts))}" oninput="{_SHOW}">'
                f'<output style="min-width:4em">{html.escape(texts[at])}</output></label>'
            )
        return (
            f'<div class="sslbook-sweep" style="max-width:{round(self.width * 96)}px">{"".join(inputs)}{images}'
            "<noscript>Without scripts only this frame is shown.</noscript></div>"
        )

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} ({len(values)} values)" for name, values in self.values.items())
        return f"slider over {counts}: {self.frames[self._index(self.default)][1]}"

    def _index(self, given: dict[str, Any]) -> int:
        index = 0
        for name, values in self.values.items():
            index = index * len(values) + values.index(given[name])
        return index

    def live(self) -> Any:
        """The same figure, plotted on demand by the running kernel, through ipywidgets (7.7 or later)."""
        import ipywidgets
        from IPython.display import display

        controls = {
            name: ipywidgets.SelectionSlider(
                options=[(_text(v), v) for v in values],
                value=self.default[name],
                description=self.labels.get(name, name),
                continuous_update=False,
            )
            for name, values in self.values.items()
        }
        output = ipywidgets.interactive_output(lambda **given: display(self.fn(**given)), controls)
        return ipywidgets.VBox([*controls.values(), output])


def sweep(
    fn: Callable[..., matplotlib.figure.Figure],
    *,
    default: Any = None,
    alt: str | Callable[..., str] | None = None,
    labels: dict[str, str] | None = None,
    **values: Iterable,
) -> Sweep:
    """A slider over the one or two parameters named in `values`; `fn(**parameters)` plots a frame and changes nothing.

    Args:
        fn: a pure function of the parameters that returns a figure.
        default: the value shown first; for two parameters a dict. Without it, the middle one.
        alt: alt text of a frame: a format string over the parameters, or a function of them. Without it, the figure's.
        labels: what stands beside a slider instead of the parameter's name.
        values: the values of each parameter, at most 24 combinations.
    """
    listed = {name: [v.item() if hasattr(v, "item") else v for v in given] for name, given in values.items()}
    count = math.prod(map(len, listed.values()))
    if len(values) not in (1, 2) or not count:
        raise UserError(f"a sweep has one or two parameters with values, not {listed}: write tau=[0.1, 0.5]")
    if count > FRAMES:
        raise UserError(f"{count} frames are more than {FRAMES}: thin out the values of {' or '.join(listed)}")
    if default is None:
        default = {name: given[len(given) // 2] for name, given in listed.items()}
    elif not isinstance(default, dict):
        default = dict.fromkeys(listed, default)
    for name, given in listed.items():
        if default.get(name) not in given:
            raise UserError(f"default for {name} must be one of its values: {', '.join(map(_text, given))}")
    return Sweep(fn, listed, default, alt, labels or {})


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _alt(alt: str | Callable[..., str] | None, given: dict[str, Any], figure: matplotlib.figure.Figure) -> str:
    if isinstance(alt, str):
        alt = alt.format(**{name: _text(v) for name, v in given.items()})
    text = alt(**given) if callable(alt) else getattr(figure, "alt", "") if alt is None else alt
    if not text:
        raise UserError("a slider's frames need alt text: pass alt=..., or make them with style.figure(alt=...)")
    return text
