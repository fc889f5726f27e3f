"""The site is built without a warning, and its pages are whole in a browser without a network."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.site_browser import CHROMIUM, Browser

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGES = [m[1] for m in re.finditer(r"^(?:root:|\s*- file:) (book/\S+)$", (ROOT / "_toc.yml").read_text(), re.M)]
CHAPTERS = [page for page in PAGES if (ROOT / f"{page}.ipynb").is_file()]

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt install chromium)")
each_page = pytest.mark.parametrize("page", PAGES)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("site")
    program = "from jupyter_book.cli.main import main; main()"  # this Python's, whatever PATH says
    build = [sys.executable, "-c", program, "build", str(ROOT), "--path-output", str(where)]
    # -W: a warning is an error; -n: so is a reference to nothing.
    run = subprocess.run([*build, "--all", "-W", "-n", "--keep-going"], capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    assert (where / "_build" / "html" / "index.html").is_file()
    return where / "_build" / "html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM) as tab:
        yield tab


@pytest.fixture(scope="module")
def phone() -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM, width=360, height=740, dark=True) as tab:
        yield tab


def address(site: Path, page: str) -> str:
    return (site / f"{page}.html").as_uri()


def test_pages_are_built_and_hold_no_unresolved_markup(site: Path):
    for page in PAGES:
        text = (site / f"{page}.html").read_text()
        visible = re.sub(r"<(script|style|pre|code)\b.*?</\1>", "", text, flags=re.S)
        assert re.findall(r"```\{|:::\{|\{(?:eq|ref|doc|term|cite:?\w*|prf:ref)\}", visible) == [], page


@needs_chromium
@each_page
def test_page_is_whole_without_a_network(site: Path, browser: Browser, page: str):
    browser.open(address(site, page))
    assert [url for url in browser.requests() if not url.startswith("file:")] == []
    assert browser.errors() == []
    assert browser.js("[...document.images].filter(i => !i.alt.trim() || (i.complete && !i.naturalWidth)).length") == 0
    assert browser.js("document.querySelectorAll('.math').length <= document.querySelectorAll('mjx-container').length")
    wrong = "[...document.querySelectorAll('mjx-merror, [data-mml-node=merror]')].map(e => e.textContent)"
    assert browser.js(wrong) == []


@needs_chromium
def test_formulas_are_rendered_and_readable_to_a_screen_reader(site: Path, browser: Browser):
    browser.open(address(site, "book/reference/notation"))
    assert browser.js("document.querySelectorAll('mjx-container mjx-math').length") > 40
    assert browser.js("document.querySelectorAll('mjx-assistive-mml math').length") > 40
    assert browser.js("document.querySelector('mjx-container').getBoundingClientRect().width") > 4
    loaded = "fonts => [...fonts].some(f => /MJX/.test(f.family) && f.status === 'loaded')"
    assert browser.js(f"document.fonts.ready.then({loaded})")


@needs_chromium
@pytest.mark.parametrize("page", CHAPTERS)
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
def test_search_finds_a_word(site: Path, browser: Browser):
    browser.open((site / "search.html").as_uri() + "?q=uniformity")
    browser.until("document.querySelectorAll('#search-results li a').length > 0")
    assert "Glossary" in browser.js("document.querySelector('#search-results').innerText")
    browser.open((site / "search.html").as_uri() + "?q=xyzzyplugh")
    browser.until("/did not match|found 0/.test(document.querySelector('#search-results').innerText)")


@needs_chromium
@each_page
def test_page_fits_a_phone_in_dark_mode(site: Path, phone: Browser, page: str):
    phone.open(address(site, page))
    assert phone.js("document.documentElement.dataset.theme") == "dark"
    assert phone.js("document.documentElement.scrollWidth") <= 360
    boxes = "[...document.querySelectorAll('.cell_output .text_html:not(:has(table))')]"
    fills = set(phone.js(f"{boxes}.map(e => getComputedStyle(e).backgroundColor)"))
    assert fills <= {"rgba(0, 0, 0, 0)"}, "a white box around a figure"
    if folder := os.environ.get("SSLBOOK_SCREENSHOTS"):  # to look at, when a person works on the site
        phone.screenshot(Path(folder) / f"{page.replace('/', '-')}-phone-dark.png")
