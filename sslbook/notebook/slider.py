"""A figure with a slider that needs neither a kernel nor a network.

`sweep` renders one frame per value beforehand and stores them all in the notebook; moving the slider only chooses which
one is visible. So it works in the built site, opened from a local file, in JupyterLab, VS Code and Colab. Without
scripts (GitHub's preview) the default frame stands there as an ordinary image.

>>> sweep(plot, tau=[0.03, 0.1, 0.3, 1.0], default=0.1, alt="Weights of the negatives at temperature {tau}.",
...       caption="Low temperatures single out the hardest negative.", name="simclr.weights")
"""

import html
import itertools
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import matplotlib.figure

from sslbook.errors import UserError
from sslbook.notebook import numbering, style

FRAMES = 24
BUDGET = 300_000  # bytes of one slider; a page may hold five
DPI = 144  # a slider's frames are many, so coarser than a single figure; its text is as sharp

# Inline, not a <script>: notebooks insert outputs by innerHTML, which runs handlers but no scripts.
_SHOW = """
var root=this.closest('.sslbook-sweep'),frame=0;
root.querySelectorAll('input').forEach(function(input){
var text=JSON.parse(input.dataset.texts)[input.value];
frame+=input.value*input.dataset.stride;
input.setAttribute('aria-valuetext',text);
input.parentNode.querySelector('output').textContent=text});
root.querySelectorAll('.sslbook-frame').forEach(function(one,i){one.style.display=i===frame?'block':'none'})
""".replace("\n", "")


class Sweep:
    """Frames of one figure over one or two parameters; made by `sweep`.

    Raises:
        UserError: the frames together exceed `BUDGET` bytes.
    """

    def __init__(
        self,
        fn: Callable[..., matplotlib.figure.Figure],
        values: dict[str, list],
        default: dict[str, Any],
        alt: str | Callable[..., str] | None,
        labels: dict[str, str],
        caption: str | None = None,
        name: str | None = None,
    ):
        self.fn, self.values, self.default, self.labels = fn, values, default, labels
        self.caption, self.name = caption, name
        self.label = numbering.number(name) if name else ""
        self.frames: list[tuple[str, str]] = []  # (HTML, alt text), the last parameter fastest
        self.width = 0.0
        for chosen in itertools.product(*values.values()):
            given = dict(zip(values, chosen))
            figure = fn(**given)
            self.width = max(self.width, figure.get_figwidth())
            text = _alt(alt, given, figure)
            self.frames.append((style.layers(figure, text, DPI, getattr(figure, "least", 0.0)), text))
        if (size := len(self._repr_html_())) > BUDGET:
            raise UserError(
                f"the slider over {', '.join(values)} takes {size // 1000} kB of {BUDGET // 1000}; "
                "plot fewer frames, a smaller figure or fewer points"
            )

    def _repr_html_(self) -> str:
        shown = self._index(self.default)
        images = "".join(
            f'<div class="sslbook-frame" style="display:{"block" if i == shown else "none"}">{frame}</div>'
            for i, (frame, _) in enumerate(self.frames)
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
        content = (
            f'<div class="sslbook-sweep" style="max-width:{round(self.width * 96)}px">{"".join(inputs)}{images}'
            "<noscript>Without scripts only this frame is shown.</noscript></div>"
        )
        return style.with_caption(content, self.caption, self.name, self.label)

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} ({len(values)} values)" for name, values in self.values.items())
        shown = f"slider over {counts}: {self.frames[self._index(self.default)][1]}"
        return style.plain(shown, self.caption, self.label)

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
    caption: str | None,
    name: str | None = None,
    default: Any = None,
    alt: str | Callable[..., str] | None = None,
    labels: dict[str, str] | None = None,
    **values: Iterable,
) -> Sweep:
    """A slider over the one or two parameters named in `values`; `fn(**parameters)` plots a frame and changes nothing.

    Args:
        fn: a pure function of the parameters that returns a figure, made with `caption=None`.
        caption: the finding in one or two sentences; None for none.
        name: the slider's name in `FIGURES` of the chapter's `figures.py`, which gives it its number.
        default: the value shown first; for two parameters a dict. Without it, the middle one.
        alt: alt text of a frame: a format string over the parameters, or a function of them. Without it, the figure's.
        labels: what stands beside a slider instead of the parameter's name.
        values: the values of each parameter, at most 24 combinations.

    Raises:
        UserError: no or too many values, a default that is none of them, no alt text, a name that no chapter lists, or
            frames of more than 300 kB together.
    """
    listed = {key: [v.item() if hasattr(v, "item") else v for v in given] for key, given in values.items()}
    count = math.prod(map(len, listed.values()))
    if len(values) not in (1, 2) or not count:
        raise UserError(f"a sweep has one or two parameters with values, not {listed}: write tau=[0.1, 0.5]")
    if count > FRAMES:
        raise UserError(f"{count} frames are more than {FRAMES}: thin out the values of {' or '.join(listed)}")
    if default is None:
        default = {key: given[len(given) // 2] for key, given in listed.items()}
    elif not isinstance(default, dict):
        default = dict.fromkeys(listed, default)
    for key, given in listed.items():
        if default.get(key) not in given:
            raise UserError(f"default for {key} must be one of its values: {', '.join(map(_text, given))}")
    return Sweep(fn, listed, default, alt, labels or {}, caption, name)


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _alt(alt: str | Callable[..., str] | None, given: dict[str, Any], figure: matplotlib.figure.Figure) -> str:
    if isinstance(alt, str):
        alt = alt.format(**{name: _text(v) for name, v in given.items()})
    text = alt(**given) if callable(alt) else getattr(figure, "alt", "") if alt is None else alt
    if not text:
        raise UserError("a slider's frames need alt text: pass alt=..., or make them with style.figure(alt=...)")
    return text
