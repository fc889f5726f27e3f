import pytest
import torch

from sslbook.data.views import IMAGENET_MEAN, IMAGENET_STD
from sslbook.notebook import plots, style


def pixels(figure):
    figure.canvas.draw()
    return torch.from_numpy(__import__("numpy").asarray(figure.canvas.buffer_rgba()).copy())


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


@pytest.mark.parametrize("color", [*style.COLORS, style.GRAY])
@pytest.mark.parametrize("page", ["#ffffff", "#121212"])
def test_colors_stand_out_on_the_light_and_the_dark_page(color, page):
    light, dark = sorted([luminance(color), luminance(page)], reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 3  # WCAG 2.2, 1.4.11: graphical objects


def test_a_figure_is_transparent_and_carries_its_alt_text():
    figure, ax = style.figure(alt='a "falling" line')
    ax.plot([2, 1])
    assert pixels(figure)[0, 0, 3] == 0
    assert 'alt="a &quot;falling&quot; line"' in figure.html()
    assert "data:image/webp;base64," in figure.html()
    assert figure.html() == figure.html()


def test_a_notebook_gets_one_image_and_the_text(monkeypatch):
    import IPython.display

    sent = []
    monkeypatch.setattr(IPython.display, "display", lambda data, raw: sent.append((data, raw)))
    figure, _ = style.figure(alt="nothing yet")
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
    figure = plots.grid(torch.zeros(10, 3, 4, 4, dtype=torch.uint8), [str(i) for i in range(10)], alt="x", columns=4)
    assert [ax.get_title() for ax in figure.axes] == [*map(str, range(10)), "", ""]
    assert [len(ax.images) for ax in figure.axes] == [1] * 10 + [0] * 2


@pytest.mark.parametrize("as_uint8", [True, False])
def test_grid_shows_the_colors(as_uint8):
    red = torch.tensor([1.0, 0, 0])[None, :, None, None].expand(1, 3, 8, 8)
    image = pixels(plots.grid((red * 255).to(torch.uint8) if as_uint8 else red, alt="red"))
    middle = image[image.shape[0] // 2, image.shape[1] // 2]
    assert middle.tolist() == [255, 0, 0, 255]


def test_gray_images_are_shown():
    figure = plots.grid(torch.ones(1, 1, 4, 4), alt="white")
    image = pixels(figure)
    assert image[image.shape[0] // 2, image.shape[1] // 2].tolist() == [255, 255, 255, 255]


def test_neighbors_of_other_classes_have_other_frames():
    same = torch.tensor([[True, False]])
    figure = plots.neighbors(torch.rand(1, 3, 4, 4), torch.rand(1, 2, 3, 4, 4), same, alt="x")
    frames = [next(iter(ax.spines.values())) for ax in figure.axes[2:]]
    assert frames[0].get_edgecolor() != frames[1].get_edgecolor()
    assert frames[0].get_linestyle() != frames[1].get_linestyle()  # not by color alone


def test_map_labels_each_class_at_one_of_its_points():
    points = torch.tensor([[0.0, 0.0], [0.1, 0.0], [5.0, 5.0], [5.1, 5.0]])
    figure = plots.scatter(points, torch.tensor([0, 0, 2, 2]), ["disk", "ring", "star"], alt="x")
    labels = {t.get_text(): t.xy for t in figure.axes[0].texts}
    assert set(labels) == {"disk", "star"}
    assert labels["star"][0] >= 5


def test_labels_of_a_map_do_not_overlap():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(400, 2, generator=generator)  # ten classes with nearly the same median
    figure = plots.scatter(points, torch.arange(400) % 10, [f"class {i}" for i in range(10)], alt="x", title="a map")
    figure.canvas.draw()
    boxes = [text.get_bbox_patch().get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 10
    assert not [(i, j) for i in range(10) for j in range(i) if boxes[i].overlaps(boxes[j])]
    assert figure.axes[0].get_title() == "a map"
