import re
from html.parser import HTMLParser

import pytest

from sslbook.errors import UserError
from sslbook.notebook.predict import predict
from tests.site_browser import CHROMIUM, Browser

OPTIONS = {
    "about <4 %": "It tempts: a `histogram` knows no shapes.",
    "about 40 %": "It tempts: half of the colors go.",
    "over 80 %": "Two crops share their colors.",
}


def question():
    return predict("How many crops does a `histogram` pair?", OPTIONS, answer="over 80 %")


class Outside(HTMLParser):
    """The text of a page outside `<details>` and `<noscript>`: what stands there before a click."""

    def __init__(self):
        super().__init__()
        self.depth, self.text, self.tags = 0, "", []

    def handle_starttag(self, tag, attrs):
        self.depth += tag in ("details", "noscript")
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self.depth -= tag in ("details", "noscript")

    def handle_data(self, data):
        self.text += data if not self.depth else ""


def read(page: str) -> Outside:
    parser = Outside()
    parser.feed(page)
    return parser


def test_before_a_click_only_question_and_options_are_read():
    seen = read(question()._repr_html_()).text
    assert "How many crops does a histogram pair?" in seen
    assert all(option in seen for option in OPTIONS)
    assert not any(why.replace("`", "") in seen for why in OPTIONS.values())
    assert "Right" not in seen
    assert "✓" not in seen


def test_nothing_before_a_click_tells_the_options_apart():
    page = question()._repr_html_()
    buttons = re.findall(r"<button(.*?)>.*?<span>(.*?)</span></button>", page, re.S)
    assert len(buttons) == 3
    assert len({attributes for attributes, _ in buttons}) == 1


def test_without_scripts_the_folded_list_holds_the_answers():
    (folded,) = re.findall("<details.*?</details>", question()._repr_html_(), re.S)
    assert re.findall("<dt>(.*?)</dt><dd><strong>(.) ", folded) == [
        ("about &lt;4 %", "✗"),
        ("about 40 %", "✗"),
        ("over 80 %", "✓"),
    ]
    assert "a <code>histogram</code> knows no shapes" in folded
    assert " open" not in folded.split(">")[0]


def test_it_is_no_figure_and_asks_for_nothing():
    page = question()._repr_html_()
    for absent in ("<figure", "<svg", "data:image", "<script", "http", " id="):
        assert absent not in page
    assert page == question()._repr_html_()


def test_options_are_buttons_in_a_named_group():
    tags = read(question()._repr_html_()).tags
    (group,) = [attrs for tag, attrs in tags if attrs.get("role") == "group"]
    assert group["aria-label"] == "How many crops does a `histogram` pair?"
    assert [attrs["type"] for tag, attrs in tags if tag == "button"] == ["button"] * 3
    assert [attrs["role"] for tag, attrs in tags if attrs.get("role") == "status"] == ["status"] * 3


def test_the_text_lists_the_options_and_not_the_answer():
    told = repr(question())
    assert told.splitlines()[1:] == [f"  ( ) {option}" for option in OPTIONS]
    assert not any(why in told for why in OPTIONS.values())


@pytest.mark.parametrize(
    ("options", "answer", "message"),
    [
        ({"a": "b"}, "a", "needs two options or more, not 1"),
        ({"many": "x", "few": "y"}, "man", r"the answer 'man' is none of the options; did you mean many\?"),
        ({"many": "x", "few": " "}, "many", "the option 'few' has no explanation"),
    ],
)
def test_mistakes_are_named_in_one_line(options, answer, message):
    with pytest.raises(UserError, match=message):
        predict("?", options, answer=answer)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt install chromium)")
def test_keys_choose_and_every_chosen_option_is_explained(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(  # as a notebook does it: by innerHTML, with a second question beside it
        "<meta charset=utf-8><div id=a></div><div id=b></div><script>for (const at of ['a', 'b'])"
        f"document.querySelector('#' + at).innerHTML = {question()._repr_html_()!r}</script>"
    )
    told = "[...document.querySelectorAll('#{} [role=status]')].map(e => e.innerText.trim())"
    pressed = "[...document.querySelectorAll('#a button')].map(b => b.getAttribute('aria-pressed'))"
    with Browser(CHROMIUM) as browser:
        browser.open(page.as_uri())
        assert browser.js(told.format("a")) == ["", "", ""]
        browser.js("document.querySelector('#a button').focus()")
        browser.key(" ", 32)
        assert browser.js(told.format("a")) == ["✗ No. It tempts: a histogram knows no shapes.", "", ""]
        for _ in range(2):
            browser.key("Tab", 9)
        browser.key(" ", 32)
        first, second, third = browser.js(told.format("a"))
        assert (first[:5], second, third) == ("✗ No.", "", "✓ Right. Two crops share their colors.")
        assert browser.js(pressed) == ["true", "false", "true"]
        marks = "[...document.querySelectorAll('#a .mark')].map(e => e.textContent)"
        assert browser.js(marks) == ["✗", "○", "✓"]
        lines = "[...document.querySelectorAll('#a button')].map(b => getComputedStyle(b).borderTopStyle)"
        assert browser.js(lines) == ["dashed", "solid", "solid"]
        assert browser.js(told.format("b")) == ["", "", ""]  # untouched
        assert browser.js("Math.min(...[...document.querySelectorAll('button')].map(b => b.offsetHeight)) >= 24")
        assert browser.errors() == []
