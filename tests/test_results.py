import json
import re
import subprocess

import pytest

from sslbook import results
from sslbook.errors import UserError


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "book" / "results").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "book")
    return tmp_path


VALUES = {"SimCLR": {"kNN": [68.0, 70.0], "linear": [71.0, 71.5]}, "pixels": {"kNN": 20.0}}


def test_what_is_saved_is_loaded_with_its_origin(checkout):
    path = results.save("shapes", VALUES, command="python -m sslbook.train", seeds=[0, 1])
    assert path == checkout / "book" / "results" / "shapes.json"
    loaded = results.load("shapes")
    assert loaded["pixels"] == {"kNN": 20.0}
    assert loaded.seeds == [0, 1]
    assert loaded.versions["torch"]
    assert loaded.hardware["cores"] >= 1
    assert "`python -m sslbook.train`; seeds 0, 1;" in loaded.origin()
    assert [p.name for p in path.parent.iterdir()] == ["shapes.json"]  # nothing half-written stays


def test_the_commit_is_kept_and_a_changed_tree_is_marked(checkout):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments], cwd=checkout, check=True)

    (checkout / "file").write_text("1")
    git("init", "-q")
    git("add", "file")
    git("commit", "-qm", "one")
    results.save("shapes", VALUES)
    clean = results.load("shapes").commit
    assert len(clean) == 40
    assert clean == results.commit()
    git("add", "book/results/shapes.json")
    git("commit", "-qm", "two")
    results.save("shapes", {"SimCLR": {"kNN": 1.0}})  # a tracked result changes
    results.save("factors", VALUES)
    assert not results.load("factors").commit.endswith("+")
    (checkout / "file").write_text("2")
    results.save("shapes", VALUES)
    assert results.load("shapes").commit == results.load("factors").commit + "+"


def test_a_result_that_json_cannot_hold_leaves_the_old_one(checkout):
    path = results.save("shapes", VALUES)
    before = path.read_text()
    with pytest.raises(ValueError, match="JSON"):
        results.save("shapes", {"loss": float("nan")})
    assert path.read_text() == before


def test_table(checkout):
    results.save("shapes", VALUES, seeds=[0, 1])
    table = results.show("shapes")
    assert repr(table).splitlines()[1].split("  ") == ["SimCLR", "69.0 ± 1.4", "71.2 ± 0.4"]
    part = results.show("shapes", rows=["pixels"], columns=["kNN"], digits=0)
    assert repr(part).splitlines()[1].split() == ["pixels", "20"]
    assert "book/results/shapes.json" in table._repr_html_()
    assert '<th scope="row"' in table._repr_html_()


def test_numbers_of_a_table_stand_apart_and_never_wrap(checkout):
    results.save("shapes", {"a": {"x": 95.0, "y": 90.0, "z": [80.0, 82.0]}})
    page = results.show("shapes")._repr_html_()
    cells = re.findall(r'<td style="(.*?)">(.*?)</td>', page)
    assert [text for _, text in cells] == ["95.0", "90.0", "81.0 ± 1.4"]
    for look, _ in cells:
        assert "white-space:nowrap" in look
        assert re.search(r"padding:\S+ \.8em", look)
    assert page.startswith('<div style="overflow-x:auto')  # a wide one scrolls by itself on a phone


CLAIMS = {"source": "chen2020simclr", "claims": {"linear": {"value": 69.3, "unit": "%", "where": "table 6"}}}


@pytest.fixture
def paper(checkout):
    results.save("shapes", VALUES, seeds=[0, 1])
    results.save("other", {"tau": {"best": 0.1}})
    folder = checkout / "book" / "results" / "papers"
    folder.mkdir()
    claims = CLAIMS | {"claims": CLAIMS["claims"] | {"temperature": {"value": 0.5, "unit": "", "where": "figure 9"}}}
    (folder / "simclr.json").write_text(json.dumps(claims))
    return folder / "simclr.json"


def test_paper_and_here_stand_side_by_side_with_their_origins(paper):
    here = {"temperature": ("other", "tau", "best"), "linear": ("shapes", "SimCLR", "linear")}
    table = results.compare(paper="simclr", here=here)
    assert table.rows == [
        ["temperature", "0.5", "figure 9", "0.1"],
        ["linear", "69.3 %", "table 6", "71.2 ± 0.4 %"],
    ]
    text = repr(table).splitlines()
    assert text[0].split() == ["claim", "paper", "where", "here"]
    assert text[3] == "Paper: chen2020simclr."
    assert [line.split(":")[1] for line in text[4:]] == [" book/results/other.json", " book/results/shapes.json"]
    page = table._repr_html_()
    assert re.search(r'nowrap[^>]*">69.3 %</td>', page)
    assert not re.search(r'nowrap[^>]*">table 6</td>', page)
    assert all(origin in page for origin in ("chen2020simclr", "book/results/shapes.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"paper": "simlcr"}, "no paper 'simlcr' in book/results/papers; did you mean simclr"),
        (
            {"here": {"liner": ("shapes", "SimCLR", "linear")}},
            "simclr has no claim 'liner'; did you mean linear",
        ),
        ({"here": {"linear": ("shape", "SimCLR", "linear")}}, "no result 'shape'"),
        ({"here": {"linear": ("shapes", "SimCRL", "linear")}}, "shapes has no 'SimCRL'"),
        ({"here": {"linear": ("shapes", "SimCLR", "liner")}}, "shapes, SimCLR has no 'liner'; did you mean linear"),
        ({"here": {"linear": "shapes"}}, r"must be \(result, row, column\), not 'shapes'"),
    ],
)
def test_a_comparison_names_what_is_missing_in_one_line(paper, arguments, message):
    given = {"paper": "simclr", "here": {"linear": ("shapes", "SimCLR", "linear")}} | arguments
    with pytest.raises(UserError, match=message) as failure:
        results.compare(**given)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"claims": {}}, r"simclr.json: lacks source"),
        ({"source": "x", "claims": {"linear": {"value": 1}}}, r"simclr.json: claims\.linear: lacks unit"),
        ("{", r"simclr.json: not valid JSON"),
    ],
)
def test_a_broken_file_of_claims_is_named(paper, content, message):
    paper.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message):
        results.compare(paper="simclr", here={"linear": ("shapes", "SimCLR", "linear")})


def test_committed_claims_hold_values_units_and_tables():
    where = results.Path(results.__file__).parents[1] / "book" / "results" / "papers"
    bibliography = (where.parents[1] / "references.bib").read_text()
    for path in where.glob("*.json"):
        content = json.loads(path.read_text())
        assert f"{{{content['source']}," in bibliography, path.name
        for claim, told in content["claims"].items():
            assert isinstance(told["value"], int | float) or told["value"] == "fails", (path.name, claim)
            assert re.match(r"(table|figure|section|appendix|equation)s? \S|abstract", told["where"]), (path.name, claim)


def test_number():
    assert results.number(3) == "3.0"
    assert results.number([1.0]) == "1.0"
    assert results.number([1.0, 3.0], digits=2) == "2.00 ± 1.41"


def test_missing_things_name_the_cure(checkout, monkeypatch, tmp_path):
    results.save("shapes", VALUES)
    with pytest.raises(UserError, match="no result 'shape' in book/results; did you mean shapes"):
        results.load("shape")
    with pytest.raises(UserError, match="shapes has no 'SimCRL'; did you mean SimCLR"):
        results.load("shapes")["SimCRL"]
    monkeypatch.setattr(results, "folder", lambda: None)  # an installed package outside any checkout
    with pytest.raises(UserError, match="run from a checkout"):
        results.save("shapes", VALUES)


def test_outside_a_checkout_the_installed_results_are_read(monkeypatch):
    monkeypatch.setattr(results, "folder", lambda: None)
    assert results.load("mae_shapes")["MAE"]
    assert (results.book() / "checkpoints" / "mae_shapes.safetensors").is_file()


def test_profile(monkeypatch):
    monkeypatch.delenv("SSLBOOK_PROFILE", raising=False)
    assert results.profile() == "colab"
    monkeypatch.setenv("SSLBOOK_PROFILE", "smoke")
    assert results.choose(smoke=1, colab=2, full=3) == 1
    monkeypatch.setenv("SSLBOOK_PROFILE", "full")
    assert results.choose(smoke=1, colab=2) == 2
    assert results.choose(smoke=1, colab=2, full=3) == 3
    monkeypatch.setenv("SSLBOOK_PROFILE", "colba")
    with pytest.raises(UserError, match="one of smoke, colab, full; did you mean colab"):
        results.profile()


def test_committed_results_say_where_they_come_from():
    where = results.Path(results.__file__).parents[1] / "book" / "results"
    for path in where.glob("*.json"):
        content = json.loads(path.read_text())
        assert content["values"], path.name
        assert content["command"].startswith("python"), path.name
        assert content["commit"], path.name
        assert content["hardware"], path.name
        assert content["date"], path.name
