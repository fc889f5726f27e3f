import re
from xml.etree import ElementTree

import pytest

from sslbook.errors import UserError
from sslbook.notebook import schematic, style
from sslbook.notebook.schematic import Diagram
from tests.notebook import diagrams
from tests.notebook.color import PAGES, contrast, mix
from tests.site_browser import CHROMIUM, Browser

ALL = [diagrams.simclr, diagrams.byol, diagrams.mae]
each = pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
SVG = "{http://www.w3.org/2000/svg}"


def parse(diagram: Diagram) -> ElementTree.Element:
    return ElementTree.fromstring(diagram.svg())


def texts(diagram: Diagram) -> list[str]:
    return [element.text or "" for element in parse(diagram).iter(f"{SVG}text")]


@each
def test_it_is_one_image_with_alt_text_and_a_caption(make):
    diagram = make()
    root = parse(diagram)
    assert root.get("role") == "img"
    assert root.get("aria-label") == root.find(f"{SVG}desc").text == diagram.alt
    assert root.find(f"{SVG}title").text
    page = diagram._repr_html_()
    assert page.startswith("<figure")
    assert "<figcaption" in page
    assert diagram.alt in repr(diagram)
    assert page == make()._repr_html_()
    assert not [element for element in root.iter() if element.get("id")]  # two diagrams on a page cannot meet


@each
@pytest.mark.parametrize("page", PAGES)
def test_every_color_stands_out_on_every_page(make, page):
    ground, ink = PAGES[page]
    assert contrast(ink, ground) >= 4.5
    mixed = set()
    for element in parse(make()).iter():
        for shade in (element.get("fill"), element.get("stroke")):
            assert shade in (None, "none", "currentColor") or f"color-mix(in srgb,{shade} " in element.get("style", "")
        mixed |= set(re.findall(r"color-mix\(in srgb,(#\w{6}) (\d+)%,currentColor\)", element.get("style", "")))
    assert mixed
    for color, kept in mixed:
        assert contrast(mix(color, ink, int(kept) / 100), ground) >= 4.5


def test_every_word_of_the_vocabulary_is_in_the_examples():
    kinds = {node.kind for make in ALL for node in make().nodes}
    assert kinds == {"image", "view", "patches", "network", "frozen network", "EMA network", "vector", "loss"}
    marks = {mark for make in ALL for mark in make().marks}
    assert marks == {"stop-gradient", "EMA of the weights"}


def test_the_legend_names_what_is_used_and_nothing_else():
    assert {"EMA network", "stop-gradient", "EMA of the weights"} <= set(texts(diagrams.byol()))
    assert not {"EMA network", "stop-gradient", "frozen network"} & set(texts(diagrams.simclr()))
    assert "frozen network" in texts(diagrams.mae())
    quiet = Diagram(alt="x", caption=None, legend=False)
    quiet.frozen(0, 0)
    assert texts(quiet) == []


def test_kept_and_thrown_away_stand_in_words():
    told = texts(diagrams.byol())
    assert told.count("✓ kept") == 1
    assert told.count("✗ thrown away") == 2


def test_a_stopped_gradient_is_two_bars_across_the_arrow():
    counts = []
    for stop in (False, True):
        d = Diagram(alt="x", caption=None, legend=False)
        d.arrow(d.vector(0, 0), d.vector(2, 0), stop=stop)
        paths = [
            element.get("d") for element in parse(d).iter(f"{SVG}path") if style.ORANGE in element.get("stroke", "")
        ]
        counts.append(len(paths))
        for d in paths:
            (x1, y1), (x2, y2) = [[float(v) for v in point.split()] for point in re.split("[ML]", d)[1:]]
            assert x1 == x2  # across a level arrow
            assert abs((y1 + y2) / 2) < 0.1
            assert schematic.COLUMN * 2 / 3 < x1 < schematic.COLUMN * 4 / 3
    assert counts == [0, 2]


def test_an_arrow_joins_the_sides_that_face_each_other():
    d = Diagram(alt="x", caption=None)
    low = d.image(1, 1)
    for column, row, ends in ((0, 1, ("right", "left")), (1, 0, ("bottom", "top")), (2, 1, ("left", "right"))):
        d.lines.clear()
        start = d.image(column, row, "")
        d.arrow(start, low)
        points = [float(v) for v in re.findall(r"-?[\d.]+", re.search(' d="(.*?)"', d.lines[0])[1])]
        assert points[:2] == pytest.approx(start.port(ends[0]), abs=0.06)
        assert points[-2:] == pytest.approx(low.port(ends[1]), abs=0.06)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda d: d.svg(), "the schematic is empty"),
        (lambda d: d.patches(0, 0, visible="10 1"), "rows of 0 and 1 of one length"),
        (lambda d: d.patches(0, 0, visible="1x 10"), "rows of 0 and 1 of one length"),
        (lambda d: d.image(0, 0, keep=True), "image has no option 'keep'; it has kept, thrown"),
        (lambda d: d.arrow(d.image(0, 0), d.image(1, 0), out="down"), "an arrow has no side 'down'"),
    ],
)
def test_mistakes_are_named(act, message):
    with pytest.raises(UserError, match=message):
        act(Diagram(alt="x", caption=None))


def test_alt_text_and_a_known_name_are_asked_for():
    with pytest.raises(UserError, match="needs alt text"):
        Diagram(alt=" ", caption="x")
    with pytest.raises(UserError, match=r"no chapter lists the figure 'nowhere\.x'"):
        Diagram(alt="x", caption="y", name="nowhere.x")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt install chromium)")
def test_on_a_phone_letters_keep_ten_pixels_and_no_word_covers_another(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(f"<meta charset=utf-8><body>{''.join(make()._repr_html_() for make in ALL)}")
    boxes = (
        "[...document.querySelectorAll('svg')].map(s => [...s.querySelectorAll('text')].map(t => "
        "{const b = t.getBoundingClientRect(); return [t.textContent, b.left, b.top, b.right, b.bottom, b.height]}))"
    )
    with Browser(CHROMIUM, width=390, height=844) as browser:
        browser.open(page.as_uri())
        assert browser.js("document.documentElement.scrollWidth") <= 390
        scale = "[...document.querySelectorAll('svg')].map(s => s.getScreenCTM().a * parseFloat(s.getAttribute('font-size')))"
        assert min(browser.js(scale)) >= 10
        for words in browser.js(boxes):
            assert len(words) > 8
            slack = 0.3 * words[0][5]  # a line's box is higher than its letters
            for i, (a, left, top, right, bottom, _) in enumerate(words):
                for b, left2, top2, right2, bottom2, _ in words[:i]:
                    apart = right <= left2 or right2 <= left or bottom - slack <= top2 or bottom2 - slack <= top
                    assert apart, f"{a!r} covers {b!r}"
