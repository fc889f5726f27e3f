"""The site is built without a warning, and its pages are whole and quiet in a browser without a network."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from sslbook.methods import METHODS
from sslbook.notebook import portable
from tests.site_browser import CHROMIUM, Browser

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGES = [m[1] for m in re.finditer(r"^(?:root:|\s*- file:) (book/\S+)$", (ROOT / "_toc.yml").read_text(), re.M)]
CHAPTERS = [page for page in PAGES if page.startswith("book/chapters/")]
FRONT, RESULTS = "book/intro", "book/reference/results"
LOOKS = {
    "desktop": (1280, 900, False),
    "desktop-dark": (1280, 900, True),
    "phone": (390, 844, False),
    "phone-dark": (390, 844, True),
}

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt install chromium)")
each_page = pytest.mark.parametrize("page", PAGES)
each_chapter = pytest.mark.parametrize("page", CHAPTERS)


def cells(page: str) -> list[dict]:
    """The code cells of a chapter's notebook."""
    notebook = json.loads((ROOT / f"{page}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def predictions(page: str) -> int:
    return sum(bool(re.match(r"predict\(", line)) for cell in cells(page) for line in cell["source"])


def folded(page: str) -> int:
    return sum("hide-output" in cell["metadata"].get("tags", []) and bool(cell["outputs"]) for cell in cells(page))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if built := os.environ.get("SSLBOOK_SITE"):  # a site that is built already, when a person works on its pages
        return Path(built)
    where = tmp_path_factory.mktemp("site")
    program = "from jupyter_book.cli.main import main; main()"  # this Python's, whatever PATH says
    build = [sys.executable, "-c", program, "build", str(ROOT), "--path-output", str(where)]
    # -W: a warning is an error; -n: so is a reference to nothing.
    run = subprocess.run([*build, "--all", "-W", "-n", "--keep-going"], capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    assert (where / "_build" / "html" / "index.html").is_file()
    return where / "_build" / "html"


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM) as tab:
        yield tab


@pytest.fixture
def browser(tab: Browser) -> Browser:
    """The tab, as wide as a laptop and light."""
    tab.look(*LOOKS["desktop"])
    return tab


def address(site: Path, page: str) -> str:
    return (site / f"{page}.html").as_uri()


def number_of(page: str) -> int:
    return CHAPTERS.index(page) + 1


# -- pages -------------------------------------------------------------------------------------------------------------


def test_pages_are_built_and_hold_no_unresolved_markup(site: Path):
    for page in PAGES:
        text = (site / f"{page}.html").read_text()
        visible = re.sub(r"<(script|style|pre|code)\b.*?</\1>", "", text, flags=re.S)
        assert re.findall(r"```\{|:::\{|\{(?:eq|ref|doc|fig|term|cite:?\w*|prf:ref)\}", visible) == [], page


@needs_chromium
@each_page
def test_page_is_whole_without_a_network(site: Path, browser: Browser, page: str):
    browser.open(address(site, page))
    assert [url for url in browser.requests() if not url.startswith("file:")] == []
    unnamed = "i => !i.closest('[aria-hidden=true]') && !i.alt.trim() || (i.complete && !i.naturalWidth)"
    assert browser.js(f"[...document.querySelectorAll('article img')].filter({unnamed}).length") == 0
    assert browser.js("document.querySelectorAll('.math').length <= document.querySelectorAll('mjx-container').length")
    wrong = "[...document.querySelectorAll('mjx-merror, [data-mml-node=merror]')].map(e => e.textContent)"
    assert browser.js(wrong) == []


@needs_chromium
@each_page
@pytest.mark.parametrize("look", LOOKS)
def test_page_is_quiet_and_no_wider_than_its_window(site: Path, tab: Browser, page: str, look: str):
    width, _, dark = LOOKS[look]
    tab.look(*LOOKS[look])
    tab.open(address(site, page))
    assert tab.js("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    assert tab.messages() == []
    assert tab.js("document.documentElement.scrollWidth") <= width
    boxes = "[...document.querySelectorAll('.cell_output .text_html:not(:has(table))')]"
    fills = set(tab.js(f"{boxes}.map(e => getComputedStyle(e).backgroundColor)"))
    assert fills <= {"rgba(0, 0, 0, 0)"}, "a white box around a figure"
    if folder := os.environ.get("SSLBOOK_SCREENSHOTS"):  # to look at, when a person works on the site
        tab.screenshot(Path(folder) / f"{page.replace('/', '-')}-{look}.png")


@needs_chromium
def test_fonts_are_the_books_own(site: Path, browser: Browser):
    browser.open(address(site, FRONT))
    loaded = (
        "fonts => [...new Set([...fonts].filter(f => f.status === 'loaded').map(f => f.family.replaceAll('\"', '')))]"
    )
    assert {"Source Serif 4", "Source Sans 3"} <= set(browser.js(f"document.fonts.ready.then({loaded})"))


@needs_chromium
def test_formulas_are_rendered_and_readable_to_a_screen_reader(site: Path, browser: Browser):
    browser.open(address(site, "book/reference/notation"))
    assert browser.js("document.querySelectorAll('mjx-container mjx-math').length") > 40
    assert browser.js("document.querySelectorAll('mjx-assistive-mml math').length") > 40
    assert browser.js("document.querySelector('mjx-container').getBoundingClientRect().width") > 4
    loaded = "fonts => [...fonts].some(f => /MJX/.test(f.family) && f.status === 'loaded')"
    assert browser.js(f"document.fonts.ready.then({loaded})")


# -- numbers -----------------------------------------------------------------------------------------------------------


@needs_chromium
@each_chapter
def test_everything_in_a_chapter_counts_by_its_number(site: Path, browser: Browser, page: str):
    browser.open(address(site, page))
    n = number_of(page)

    def numbered(*kinds: str) -> list[str]:
        return [f"{n}.{i}" for i in range(1, 1 + len(kinds))]

    assert browser.texts("article h1 .section-number") == [f"{n}."]
    sections = browser.texts("article h2 .section-number")
    assert len(sections) > 8
    assert sections == [f"{number}." for number in numbered(*sections)]
    equations = [re.match(r"\((.*?)\)", text)[1] for text in browser.texts("article .eqno")]
    assert len(equations) >= 8
    assert equations == numbered(*equations)
    titles = browser.texts("article .admonition-title .caption-number")
    for kind, least in {"Exercise": 6, "Proposition": 1, "Lemma": 0}.items():
        found = [title.split()[1] for title in titles if title.split()[0] == kind]
        assert len(found) >= least, kind
        assert found == numbered(*found), kind
    captions = browser.js("[...document.querySelectorAll('article figcaption')].map(e => e.textContent.trim())")
    figures = [re.match(rf"Figure {n}\.(\d+)\.", caption) for caption in captions]
    assert all(figures), captions
    counted = [int(figure[1]) for figure in figures]
    assert counted == sorted(set(counted)), "figures out of order"


@needs_chromium
@each_page
def test_a_reference_says_the_number_of_what_it_leads_to(site: Path, browser: Browser, page: str):
    browser.open(address(site, page))
    links = browser.js(
        "[...document.querySelectorAll('article a[href]:not(.headerlink)')].filter(a => a.hash && a.protocol === 'file:')"
        ".map(a => [a.href.split('#')[0], decodeURIComponent(a.hash.slice(1)), a.innerText.trim()])"
    )
    checked = 0
    for file, anchor, text in links:
        target = Path(file.removeprefix("file://")).read_text(encoding="utf-8")
        assert f'id="{anchor}"' in target, f"{page} leads to {anchor}, which is not in {file}"
        place = target.index(f'id="{anchor}"')
        if text.startswith("(") and anchor.startswith("equation-"):
            assert re.search(r'class="eqno">(\([\d.]+\))', target[place:])[1] == text
            checked += 1
        elif text.startswith(("Exercise ", "Proposition ", "Lemma ", "Figure ")):
            found = re.search(r'class="caption-number">(?:<strong>)?(\w+ [\d.]*\d)', target[place:])
            assert text.startswith(found[1].split(" (")[0]), (text, found[1])
            checked += 1
    assert checked > 0 or page not in CHAPTERS


@needs_chromium
def test_reference_pages_have_no_numbers(site: Path, browser: Browser):
    for page in PAGES:
        if page not in CHAPTERS:
            browser.open(address(site, page))
            assert browser.texts("article .section-number") == [], page


# -- head --------------------------------------------------------------------------------------------------------------


def test_pages_describe_themselves(site: Path):
    told = {}
    for page in PAGES:
        head = (site / f"{page}.html").read_text(encoding="utf-8").partition("</head>")[0]
        metas = dict(re.findall(r'<meta (?:name|property)="([^"]+)" content="([^"]*)"', head))
        told[page] = metas.get("description", "")
        assert 20 < len(told[page]) <= 210, page
        assert not re.search(r"[\\${}]", told[page]), page
        assert metas["og:description"] == told[page]
        assert metas["og:image"] == f"{portable.SITE}/_static/social.png"
        assert metas["og:url"] == f"{portable.SITE}/{page}.html"
        assert metas["og:title"] in re.search(r"<title>(.*?)</title>", head, re.S)[1]
        icon = re.search(r'<link rel="icon" href="([^"]+)"', head) or re.search(r'href="([^"]+)"[^>]*rel="icon"', head)
        assert (site / page).parent.joinpath(icon[1]).resolve().is_file()
    assert len(set(told.values())) == len(PAGES), "two pages have the same description"
    with Image.open(site / "_static" / "social.png") as image:
        assert image.size == (1200, 630)


# -- front page --------------------------------------------------------------------------------------------------------


@needs_chromium
def test_cards_say_what_the_chapters_say_of_themselves(site: Path, browser: Browser):
    browser.open(address(site, FRONT))
    cards = {
        name: browser.texts(f".chapter-card .chapter-{name}")
        for name in ("number", "title", "question", "times", "before")
    }
    before = "[...document.querySelectorAll('.chapter-card .chapter-before')]"
    prerequisites = browser.js(f"{before}.map(e => [...e.querySelectorAll('a')].map(a => a.href))")
    assert len(cards["number"]) == len(CHAPTERS)
    listed = (ROOT / "_toc.yml").read_text().partition("- caption: Background")[0]
    assert browser.texts(".chapter-part") == re.findall(r"- caption: (.+)", listed)
    for i, page in enumerate(CHAPTERS):
        browser.open(address(site, page))
        title = browser.js("document.querySelector('article h1').firstElementChild.nextSibling.textContent.trim()")
        box = browser.js("document.querySelector('article .admonition').innerText")
        assert (cards["number"][i], cards["title"][i]) == (str(i + 1), title)
        assert f"Question. {cards['question'][i]}" in box
        read, run = re.match(r"(\d+) min to read, (\d+) min to run", cards["times"][i]).groups()
        assert re.search(rf"\bread\W+(\w+ )?{read} min.*\brun\W+(\w+ )?{run} min", box, re.I | re.S)
        assert cards["before"][i].partition(":")[2].strip() in box
        here = browser.js("[...document.querySelector('article .admonition').querySelectorAll('a')].map(a => a.href)")
        assert set(prerequisites[i]) <= set(here)


@needs_chromium
def test_cards_open_what_can_be_run(site: Path, browser: Browser):
    browser.open(address(site, FRONT))
    rows = "[...document.querySelectorAll('.chapter-card .chapter-launch')]"
    links = browser.js(f"{rows}.map(row => [...row.querySelectorAll('a')].map(a => a.href))")
    assert len(links) == len(CHAPTERS)
    for page, (colab, kaggle, download) in zip(CHAPTERS, links):
        assert (colab, kaggle) == (portable.colab(page), portable.kaggle(page))
        notebook = json.loads(Path(download.removeprefix("file://")).read_text(encoding="utf-8"))
        assert notebook["nbformat"] == 4
        browser.open(address(site, page))
        buttons = browser.js("[...document.querySelectorAll('.dropdown-launch-buttons a')].map(a => a.href)")
        assert {colab, kaggle, download} <= set(buttons), "the rocket of the page opens the same"


@needs_chromium
def test_the_map_shows_each_chapter_once_and_leads_to_it(site: Path, browser: Browser):
    for look in ("desktop", "phone"):
        browser.look(*LOOKS[look])
        browser.open(address(site, FRONT))
        shown = "[...document.querySelectorAll('svg.chapter-map')].filter(e => e.getBoundingClientRect().width > 0)"
        assert browser.js(f"{shown}.length") == 1
        targets = browser.js(
            f"[...{shown}[0].querySelectorAll('a')].map(a => new URL(a.getAttribute('href'), location).href)"
        )
        assert targets == [address(site, page) for page in CHAPTERS]
        right = browser.js(f"{shown}[0].getBoundingClientRect().right")
        assert right <= LOOKS[look][0]
        inside = "a => a.getBBox().width <= a.querySelector('rect').getBBox().width + 1"
        inside = f"[...{shown}[0].querySelectorAll('a')].every({inside})"
        assert browser.js(inside), "a title leaves its box"
    browser.click("svg.chapter-map.standing a", 0)
    browser.until(f"location.href === {json.dumps(address(site, CHAPTERS[0]))}")


# -- what moves --------------------------------------------------------------------------------------------------------


@needs_chromium
@each_chapter
def test_sliders_of_a_chapter_move(site: Path, browser: Browser, page: str):
    browser.open(address(site, page))
    count = browser.js("document.querySelectorAll('.sslbook-sweep').length")
    assert count > 0, "a chapter has a slider"
    shown = "[...document.querySelectorAll('.sslbook-sweep')[{0}].querySelectorAll('img')].filter(i => i.offsetWidth)"
    for i in range(count):
        visible = shown.format(i)
        assert browser.js(f"{visible}.length") == 1
        before = browser.js(f"{visible}[0].src")
        browser.js(
            f"(() => {{const input = document.querySelectorAll('.sslbook-sweep')[{i}].querySelector('input');"
            "input.value = input.value === input.max ? 0 : Number(input.value) + 1;"
            "input.dispatchEvent(new Event('input', {bubbles: true}))})()"
        )
        assert browser.js(f"{visible}.length") == 1
        assert browser.js(f"{visible}[0].src") != before, f"slider {i + 1} shows the same image for two values"


@needs_chromium
@pytest.mark.parametrize("page", [page for page in CHAPTERS if predictions(page)])
def test_a_prediction_is_answered_by_a_click_and_not_before(site: Path, browser: Browser, page: str):
    browser.open(address(site, page))
    count = browser.js("document.querySelectorAll('.sslbook-predict').length")
    assert count == predictions(page)
    for i in range(count):
        box = f"document.querySelectorAll('.sslbook-predict')[{i}]"
        assert not re.search(r"Right\.|No\.", browser.js(f"{box}.innerText")), "answered before the click"
        options = browser.js(f"{box}.querySelectorAll('button').length")
        verdicts = []
        for k in range(options):
            browser.js(f"{box}.querySelectorAll('button')[{k}].click()")
            verdicts.append(browser.js(f"{box}.querySelectorAll('[role=status]')[{k}].innerText"))
        assert sum("Right." in verdict for verdict in verdicts) == 1
        assert sum("No." in verdict for verdict in verdicts) == options - 1
    assert browser.messages() == []


@needs_chromium
@pytest.mark.parametrize("page", [page for page in CHAPTERS if folded(page)])
def test_outputs_that_settle_a_prediction_are_folded(site: Path, browser: Browser, page: str):
    browser.open(address(site, page))
    outputs = "[...document.querySelectorAll('.cell.tag_hide-output details.below-input')]"
    assert browser.js(f"{outputs}.length") == folded(page)
    assert browser.js(f"{outputs}.every(d => !d.open)")
    browser.click(".cell.tag_hide-output details.below-input > summary")
    assert browser.js(f"{outputs}[0].open")
    assert browser.js(f"{outputs}[0].querySelector('.cell_output').getBoundingClientRect().height") > 10


@needs_chromium
def test_tables_of_results_are_sorted_by_their_heads(site: Path, browser: Browser):
    browser.open(address(site, RESULTS))
    rows = "[...document.querySelector('section#all-methods table').tBodies[0].rows]"

    def column(index: int) -> list[str]:
        return browser.js(f"{rows}.map(r => r.cells[{index}].innerText.trim())")

    def heads() -> list[str | None]:
        return browser.js(
            "[...document.querySelectorAll('section#all-methods th')].map(h => h.getAttribute('aria-sort'))"
        )

    def press() -> None:
        browser.js("document.querySelectorAll('section#all-methods th button')[1].focus()")
        browser.key(" ", 32)

    names, before = column(0), [float(x) for x in column(1) if x]
    assert len(names) == len(METHODS) + 4
    assert set(heads()) == {None}
    press()
    assert heads()[1] == "descending"
    assert [float(x) for x in column(1) if x] == sorted(before, reverse=True)
    assert set(column(0)) == set(names)
    press()
    assert heads()[1] == "ascending"
    assert [float(x) for x in column(1) if x] == sorted(before)
    browser.click("section#all-methods th button", 0)
    assert heads()[:2] == ["ascending", None]
    assert [x.lower() for x in column(0)] == sorted(x.lower() for x in names)
    links = browser.js("[...document.querySelectorAll('section#all-methods td a')].map(a => a.href)")
    for name in METHODS:
        for file in (f"sslbook/methods/{name}.py", f"sslbook/recipes/{name}/shapes.yaml"):
            assert any(link.endswith(f"/blob/main/{file}") for link in links), file
            assert (ROOT / file).is_file()


@needs_chromium
def test_numbers_in_a_table_keep_apart_on_a_phone(site: Path, browser: Browser):
    browser.look(*LOOKS["phone"])
    for page in [RESULTS, *CHAPTERS]:
        browser.open(address(site, page))
        numeric = "c => /^-?[\\d.,]+( ± [\\d.]+)?$/.test(c.innerText.trim())"
        crowded = (
            "c => {const s = getComputedStyle(c), r = document.createRange(); r.selectNodeContents(c.querySelector('p') || c);"
            "const lines = new Set([...r.getClientRects()].map(x => Math.round(x.top)));"
            "return lines.size > 1 || parseFloat(s.paddingLeft) + parseFloat(s.paddingRight) < 8}"
        )
        wrapped = f"[...document.querySelectorAll('article table td')].filter({numeric}).filter({crowded})"
        assert browser.js(f"{wrapped}.map(c => c.innerText)") == [], page


# -- search ------------------------------------------------------------------------------------------------------------


@needs_chromium
@pytest.mark.parametrize("word", ["uniformity", "temperature", "gradient", "variance"])
def test_search_shows_where_a_word_stands_without_tex(site: Path, browser: Browser, word: str):
    browser.open((site / "search.html").as_uri() + f"?q={word}")
    browser.until("/found \\d+ page/.test(document.querySelector('#search-results').innerText)")
    browser.until("document.querySelectorAll('#search-results li .context').length > 0")
    items = browser.texts("#search-results li")
    assert any(word in item.lower() for item in items)
    assert len(set(items)) == len(items), "the same result twice"
    assert [item for item in items if re.search(r"[\\$]|\{|\}", item)] == []
    assert browser.messages() == []
    assert [url for url in browser.requests() if not url.startswith("file:")] == []


@needs_chromium
def test_search_says_when_it_finds_nothing(site: Path, browser: Browser):
    browser.open((site / "search.html").as_uri() + "?q=xyzzyplugh")
    browser.until("/did not match|found 0/.test(document.querySelector('#search-results').innerText)")


def test_search_texts_hold_prose_and_no_code(site: Path):
    text = (site / "_static" / "search_texts.js").read_text(encoding="utf-8")
    texts = json.loads(text.removeprefix("window.SEARCH_TEXTS = ").rstrip(";\n"))
    assert set(PAGES) <= set(texts)
    chapter = " ".join(body for _, body in texts[CHAPTERS[0]])
    assert "Self-supervised learning" in chapter
    assert "import torch" not in chapter
    assert "base64" not in text


# -- portable notebooks ------------------------------------------------------------------------------------------------


@each_chapter
def test_portable_notebook_numbers_as_the_page_does(site: Path, page: str):
    notebook = json.loads((site / "notebooks" / f"{portable.name_of(page)}.ipynb").read_text())
    text = "\n\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown")
    html = (site / f"{page}.html").read_text()
    proofs = r"Theorem|Proposition|Lemma|Corollary|Definition|Algorithm|Remark|Example|Conjecture"
    for in_page, in_notebook in (
        (r'<span class="eqno">\(([\d.]+)\)', r"\\tag\{([\d.]+)\}"),
        (r'caption-number">(Exercise [\d.]+\d)', r"^(?:### |\*\*)(Exercise [\d.]+\d)"),
        (rf'caption-number">((?:{proofs}) [\d.]+\d)', rf"^> \*\*((?:{proofs}) [\d.]+\d)\*\*"),
        (r'<h2><span class="section-number">([\d.]+)\. ', r"^## ([\d.]+\d)\. "),
    ):
        numbers = re.findall(in_page, html)
        assert numbers
        assert re.findall(in_notebook, text, re.M) == numbers


@each_chapter
def test_launch_buttons_open_portable_notebooks(site: Path, page: str):
    html = (site / f"{page}.html").read_text()
    for address in (portable.colab(page), portable.kaggle(page)):
        assert f'href="{address}"' in html
    opened = re.findall(r'href="https://colab.research.google.com/github/([^"]*)"', html)
    assert all(f"/blob/{portable.BRANCH}/" in address for address in opened), "a button that opens a source"
