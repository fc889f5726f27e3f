import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from sslbook.errors import UserError
from sslbook.notebook import slider, style
from sslbook.notebook.slider import sweep
from tests.site_browser import CHROMIUM, Browser
from tests.test_notebooks import Images

calls = []


def plot(tau, k=1):
    calls.append((tau, k))
    fig, ax = style.figure(alt=f"tau {tau:.2f}, k {k}", width=2, height=1, caption=None)
    ax.bar([0, 1], [tau, k])
    return fig


def shown(widget) -> list[str]:
    parts = widget._repr_html_().split('<div class="sslbook-frame" style="display:')[1:]
    seen = []
    for part in parts:
        page = Images()
        page.feed(part)
        seen += [image["alt"] for image in page.found if part.startswith("block")]
    return seen


def test_one_frame_per_value_and_the_default_is_shown():
    widget = sweep(plot, caption=None, tau=[0.1, 0.5, 1.0], default=0.1)
    assert len(widget.frames) == 3
    assert len({data for data, _ in widget.frames}) == 3
    assert shown(widget) == ["tau 0.10, k 1"]
    assert shown(sweep(plot, caption=None, tau=[0.1, 0.5, 1.0])) == ["tau 0.50, k 1"]  # the middle one


def test_two_parameters_the_last_fastest():
    widget = sweep(plot, caption=None, tau=[0.1, 0.5], k=[1, 2, 3], default={"tau": 0.5, "k": 1})
    assert [alt for _, alt in widget.frames[:4]] == ["tau 0.10, k 1", "tau 0.10, k 2", "tau 0.10, k 3", "tau 0.50, k 1"]
    assert shown(widget) == ["tau 0.50, k 1"]
    assert 'data-stride="3"' in widget._repr_html_()


def test_the_page_is_the_same_every_time_and_asks_for_nothing_outside():
    html = sweep(plot, caption=None, tau=[0.1, 0.5])._repr_html_()
    assert html == sweep(plot, caption=None, tau=[0.1, 0.5])._repr_html_()
    assert "http" not in html
    assert "<script" not in html
    assert " id=" not in html  # two sliders on a page cannot meet


def test_alt_text_is_a_format_a_function_or_the_figures_and_is_escaped():
    assert sweep(plot, caption=None, tau=[0.123456], alt="at {tau}").frames[0][1] == "at 0.123"
    assert sweep(plot, caption=None, tau=[2], alt=lambda tau: f'"{tau}" < 3').frames[0][1] == '"2" < 3'
    assert (
        'alt="&quot;2&quot; &lt; 3"' in sweep(plot, caption=None, tau=[2], alt=lambda tau: f'"{tau}" < 3')._repr_html_()
    )


def test_values_may_be_numpy_or_words():
    widget = sweep(lambda how: plot(1.0), caption=None, how=["random", "block"], alt="masked: {how}", default="block")
    assert shown(widget) == ["masked: block"]
    assert "0.316" in sweep(plot, caption=None, tau=np.geomspace(0.1, 1, 3))._repr_html_()


def test_a_slider_is_one_figure_with_number_and_caption(monkeypatch):
    monkeypatch.setattr(style.numbering, "number", {"simclr.weights": "3.4"}.__getitem__)
    widget = sweep(plot, caption="Low `tau`.", name="simclr.weights", tau=[0.1, 0.5])
    page = widget._repr_html_()
    assert page.startswith('<figure id="fig-simclr-weights"')
    assert page.count("<figcaption") == page.count("<figure") == 1
    assert "Figure 3.4." in page
    assert repr(widget).startswith("Figure 3.4. Low `tau`.\nslider over tau (2 values)")


def test_text_for_readers_without_images():
    assert repr(sweep(plot, caption=None, tau=[0.1, 0.5], default=0.1)) == "slider over tau (2 values): tau 0.10, k 1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": list(range(25))}, "25 frames are more than 24"),
        ({"tau": [1], "k": [1], "n": [1]}, "one or two parameters with values, not"),
        ({}, "one or two parameters with values, not {}"),
        ({"tau": []}, "one or two parameters with values"),
        ({"tau": [0.1, 0.5], "default": 0.2}, "default for tau must be one of its values: 0.1, 0.5"),
        ({"tau": [1], "alt": ""}, "need alt text"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        sweep(plot, caption=None, **arguments)


def test_too_heavy_a_slider_is_refused(monkeypatch):
    monkeypatch.setattr(slider, "BUDGET", 1000)
    with pytest.raises(UserError, match=r"takes \d+ kB of 1; plot fewer frames"):
        sweep(plot, caption=None, tau=[0.1, 0.5])


def test_live_asks_the_kernel_only_for_what_ipywidgets_7_has(monkeypatch):
    made = {}
    stub = ModuleType("ipywidgets")
    stub.SelectionSlider = lambda **options: made.update(options) or SimpleNamespace(**options)
    stub.interactive_output = lambda fn, controls: fn(**{name: c.value for name, c in controls.items()})
    stub.VBox = lambda children: children
    monkeypatch.setitem(sys.modules, "ipywidgets", stub)
    widget = sweep(plot, caption=None, tau=[0.1, 0.5], default=0.5)
    calls.clear()
    assert len(widget.live()) == 2
    assert calls == [(0.5, 1)]
    assert set(made) == {"options", "value", "description", "continuous_update"}
    assert made["options"] == [("0.1", 0.1), ("0.5", 0.5)]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt install chromium)")
def test_arrow_keys_choose_the_frame_in_a_browser(tmp_path):
    two = sweep(plot, caption=None, tau=[0.1, 0.5, 1.0], k=[1, 2], default={"tau": 0.1, "k": 1})
    page = tmp_path / "page.html"
    # as a notebook does it: by innerHTML, with a second slider beside it
    page.write_text(
        "<meta charset=utf-8><div id=a></div><div id=b></div><script>"
        f"document.querySelector('#a').innerHTML = {two._repr_html_()!r};"
        f"document.querySelector('#b').innerHTML = {sweep(plot, caption=None, tau=[3, 4], default=3)._repr_html_()!r}</script>"
    )
    visible = "[...document.querySelectorAll('#{} img')].filter(i => i.offsetWidth).map(i => i.alt)"
    with Browser(CHROMIUM) as browser:
        browser.open(page.as_uri())
        assert browser.js(visible.format("a")) == ["tau 0.10, k 1"]
        browser.js("document.querySelectorAll('#a input')[0].focus()")
        browser.key("ArrowRight", 39)
        assert browser.js(visible.format("a")) == ["tau 0.50, k 1"]
        browser.js("document.querySelectorAll('#a input')[1].focus()")
        browser.key("ArrowRight", 39)
        assert browser.js(visible.format("a")) == ["tau 0.50, k 2"]
        assert browser.js("[...document.querySelectorAll('#a output')].map(o => o.textContent)") == ["0.5", "2"]
        assert browser.js("document.querySelector('#a input').getAttribute('aria-valuetext')") == "0.5"
        assert browser.js(visible.format("b")) == ["tau 3.00, k 1"]  # untouched
        assert browser.errors() == []
