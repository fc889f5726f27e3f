import base64
import io
import re
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from sslbook.data.views import IMAGENET_MEAN, IMAGENET_STD
from sslbook.errors import UserError
from sslbook.notebook import plots, style
from tests.notebook.color import PAGES, contrast, mix


def pixels(figure):
    figure.canvas.draw()
    return torch.from_numpy(__import__("numpy").asarray(figure.canvas.buffer_rgba()).copy())


@pytest.mark.parametrize("color", [*style.COLORS, style.GRAY])
@pytest.mark.parametrize("page", [page for page, _ in PAGES.values()])
def test_lines_stand_out_on_every_page(color, page):
    assert contrast(color, page) >= 3  # WCAG 2.2, 1.4.11: graphical objects


def words(figure) -> list[dict]:
    """The attributes of the text that a page sets over a figure's image, with the text itself as "text"."""
    over = re.search("<svg.*</svg>", figure.html(), re.S)
    elements = ElementTree.fromstring(over[0].replace("<svg ", '<svg xmlns="" ', 1)) if over else []
    return [{"text": e.text, "tag": e.tag, **e.attrib} for e in elements]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_text_of_a_figure_reaches_a_contrast_of_four_and_a_half(page):
    ground, ink = PAGES[page]
    figure, ax = style.figure(alt="x", caption=None)
    ax.set(title="a title", xlabel="step", ylabel="loss")
    ax.plot([0, 1], label="a line")
    ax.legend()
    ax.annotate("gray", (0.5, 0.5), color=style.GRAY)
    for i, color in enumerate(style.COLORS):
        ax.annotate(f"color {i}", (0.5, i / 10), color=color)
    found = words(figure)
    assert {"a title", "step", "loss", "a line", "gray", *(f"color {i}" for i in range(6))} <= {
        w["text"] for w in found
    }
    for word in found:
        if shade := word.get("style"):  # a color mixed with the page's own
            color, kept = re.fullmatch(r"fill:color-mix\(in srgb,(#\w{6}) (\d+)%,currentColor\)", shade).groups()
            assert contrast(mix(color, ink, int(kept) / 100), ground) >= 4.5, word["text"]
        else:
            assert "fill" not in word
            assert contrast(ink, ground) >= 4.5
    assert sum("style" in word for word in found) == 6


def test_text_that_a_page_sets_is_no_part_of_the_image():
    figure, ax = style.figure(alt="x", caption=None)
    ax.set_axis_off()
    ax.text(0.5, 0.5, "page", transform=ax.transAxes)
    assert image_of(figure).getextrema()[3] == (0, 0)  # not one opaque pixel
    ax.text(0.5, 0.5, "own", color="#000000", transform=ax.transAxes)  # on a background of its own, such as an image
    assert image_of(figure).getextrema()[3][1] == 255
    assert [word["text"] for word in words(figure)] == ["page"]


def test_text_stands_where_it_was_aligned_and_turns():
    figure, ax = style.figure(alt="x", width=4, height=2, caption=None)
    ax.set(xlim=(0, 1), ylim=(0, 1), ylabel="upright", xticks=[], yticks=[])
    for side in ("left", "center", "right"):
        ax.text(0.5, 0.5, side, ha=side)
    at = {word["text"]: word for word in words(figure)}
    middle = ax.transData.transform((0.5, 0.5))[0] * 96 / figure.dpi
    assert [at[side].get("text-anchor") for side in ("left", "center", "right")] == [None, "middle", "end"]
    for side in ("left", "center", "right"):
        assert float(at[side]["x"]) == pytest.approx(middle, abs=0.1)
    assert at["upright"]["transform"].endswith("rotate(-90)")


def test_formulas_are_outlines():
    figure, ax = style.figure(alt="x", caption=None)
    ax.set(yscale="log", ylim=(1e-3, 1))
    ax.plot([1, 2], [1e-3, 1])
    formulas = [word for word in words(figure) if word["tag"] == "path"]
    assert len(formulas) >= 2
    assert all(re.fullmatch(r"[MLQCZ0-9. -]+", word["d"]) for word in formulas)


def image_of(figure):
    data = re.search('base64,([^"]+)', figure.html())[1]
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA")


def test_the_image_has_twice_the_pixels_of_the_page():
    figure, _ = style.figure(alt="x", width=3, height=2, caption=None)
    assert image_of(figure).size == (2 * 3 * 96, 2 * 2 * 96)
    assert "width:288px" in figure.html()


def test_a_caption_makes_a_figure_and_a_name_numbers_it(monkeypatch):
    monkeypatch.setattr(style.numbering, "number", {"simclr.circle": "3.2"}.__getitem__)
    figure, _ = style.figure(alt="x", caption="The `loss` < 3.", name="simclr.circle")
    page = figure.html()
    assert page.startswith('<figure id="fig-simclr-circle"')
    assert "<strong>Figure 3.2.</strong>" in page
    assert "The <code>loss</code> &lt; 3.</span></figcaption></figure>" in page
    own, _ = style.figure(alt="x", caption="A reader's own.")
    assert "<figure class" in own.html()
    assert "Figure" not in own.html()
    frame, _ = style.figure(alt="x", caption=None)
    assert "<fig" not in frame.html()


def test_a_name_that_no_chapter_lists_is_refused_at_once():
    with pytest.raises(UserError, match=r"no chapter lists the figure 'nowhere.x'"):
        style.figure(alt="x", caption="y", name="nowhere.x")


@pytest.mark.slow
def test_a_figure_is_transparent_and_carries_its_alt_text():
    figure, ax = style.figure(alt='a "falling" line', caption=None)
    ax.plot([2, 1])
    assert pixels(figure)[0, 0, 3] == 0
    assert 'alt="a &quot;falling&quot; line"' in figure.html()
    assert "data:image/webp;base64," in figure.html()
    assert figure.html() == figure.html()


def test_a_notebook_gets_one_image_and_the_text(monkeypatch):
    import IPython.display

    sent = []
    monkeypatch.setattr(IPython.display, "display", lambda data, raw: sent.append((data, raw)))
    figure, _ = style.figure(alt="nothing yet", caption=None)
    figure._ipython_display_()
    ((data, raw),) = sent
    assert raw
    assert set(data) == {"text/html", "text/plain"}
    assert data["text/plain"] == "nothing yet"


def test_denormalize_undoes_normalization():
    x = torch.rand(2, 3, 4, 4)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    back = plots.denormalize((x - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(back, x)
    assert plots.denormalize(torch.full((1, 3, 2, 2), 9.0)).max() == 1


def test_grid_shows_each_image_under_its_title():
    figure = plots.grid(
        torch.zeros(10, 3, 4, 4, dtype=torch.uint8), [str(i) for i in range(10)], alt="x", caption=None, columns=4
    )
    assert [ax.get_title() for ax in figure.axes] == [*map(str, range(10)), "", ""]
    assert [len(ax.images) for ax in figure.axes] == [1] * 10 + [0] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "inch"), [(14, 0.3), (8, 0.75), (3, 1.2)])
def test_no_image_of_a_grid_is_smaller_than_64_pixels_even_on_a_phone(columns, inch):
    figure = plots.grid(torch.zeros(columns, 3, 4, 4), alt="x", caption=None, columns=columns, inch=inch)
    least = float(re.search(r"min-width:(\d+)px", figure.html())[1])
    figure.html()
    sides = [ax.get_window_extent().width * 96 / figure.dpi for ax in figure.axes]
    assert min(sides) * least / (figure.get_figwidth() * 96) >= 64 - 0.5
    assert "overflow-x:auto" in figure.html()


def test_no_neighbor_is_smaller_than_64_pixels():
    figure = plots.neighbors(torch.rand(2, 3, 4, 4), torch.rand(2, 7, 3, 4, 4), alt="x", caption=None, inch=0.2)
    least = float(re.search(r"min-width:(\d+)px", figure.html())[1])
    sides = [ax.get_window_extent().width * 96 / figure.dpi for ax in figure.axes if ax.images]
    assert min(sides) * least / (figure.get_figwidth() * 96) >= 64 - 0.5


def test_pairs_are_bracketed_and_parted():
    figure = plots.grid(torch.rand(8, 3, 4, 4), alt="x", caption=None, columns=4, pairs=True)
    shown = [ax for ax in figure.axes if ax.images]
    figure.html()
    boxes = [ax.get_window_extent() for ax in shown]
    assert len(boxes) == 8
    assert boxes[2].x0 - boxes[1].x1 > 3 * (boxes[1].x0 - boxes[0].x1)
    joined = [(p.axesA, p.axesB) for p in figure.artists if p.axesA is not p.axesB]
    assert joined == [(shown[i], shown[i + 1]) for i in range(0, 8, 2)]
    for patch in figure.artists:  # between the two rows, over no image
        for box in boxes:
            assert not patch.get_path().get_extents(patch.get_transform()).overlaps(box)


@pytest.mark.parametrize(("count", "columns"), [(6, 3), (5, 4)])
def test_pairs_cannot_be_torn_apart(count, columns):
    with pytest.raises(UserError, match="are torn apart: give an even number of both"):
        plots.grid(torch.rand(count, 3, 4, 4), alt="x", caption=None, columns=columns, pairs=True)


@pytest.mark.parametrize("as_uint8", [True, False])
def test_grid_shows_the_colors(as_uint8):
    red = torch.tensor([1.0, 0, 0])[None, :, None, None].expand(1, 3, 8, 8)
    image = pixels(plots.grid((red * 255).to(torch.uint8) if as_uint8 else red, alt="red", caption=None))
    middle = image[image.shape[0] // 2, image.shape[1] // 2]
    assert middle.tolist() == [255, 0, 0, 255]


def test_gray_images_are_shown():
    figure = plots.grid(torch.ones(1, 1, 4, 4), alt="white", caption=None)
    image = pixels(figure)
    assert image[image.shape[0] // 2, image.shape[1] // 2].tolist() == [255, 255, 255, 255]


def test_neighbors_of_other_classes_have_other_frames():
    same = torch.tensor([[True, False]])
    figure = plots.neighbors(torch.rand(1, 3, 4, 4), torch.rand(1, 2, 3, 4, 4), same, alt="x", caption=None)
    frames = [next(iter(ax.spines.values())) for ax in figure.axes[2:]]
    assert frames[0].get_edgecolor() != frames[1].get_edgecolor()
    assert frames[0].get_linestyle() != frames[1].get_linestyle()  # not by color alone


def test_map_labels_each_class_at_one_of_its_points():
    points = torch.tensor([[0.0, 0.0], [0.1, 0.0], [5.0, 5.0], [5.1, 5.0]])
    figure = plots.scatter(points, torch.tensor([0, 0, 2, 2]), ["disk", "ring", "star"], alt="x", caption=None)
    labels = {t.get_text(): t.xy for t in figure.axes[0].texts}
    assert set(labels) == {"disk", "star"}
    assert labels["star"][0] >= 5


def test_labels_of_a_map_do_not_overlap():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(400, 2, generator=generator)  # ten classes with nearly the same median
    figure = plots.scatter(
        points, torch.arange(400) % 10, [f"class {i}" for i in range(10)], alt="x", caption=None, title="a map"
    )
    figure.canvas.draw()
    boxes = [text.get_bbox_patch().get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 10
    assert not [(i, j) for i in range(10) for j in range(i) if boxes[i].overlaps(boxes[j])]
    assert figure.axes[0].get_title() == "a map"
