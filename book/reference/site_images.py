"""`book/_static/favicon.svg` and `book/_static/social.png`, the image that other sites show of this one.

    python book/reference/site_images.py           needs Chromium, which sets the text

The mark is the book's subject: two views of one image, and what they have in common.
"""

import base64
import io
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from PIL import Image

from sslbook.data.datasets.shapes import Shapes
from sslbook.data.executors import apply_batch
from sslbook.data.views import View

STATIC = Path(__file__).parents[1] / "_static"
ACCENT, INK = "#0f6674", "#14181c"
TITLE = "Self-supervised learning for vision"
LINE = "Derived, run and proved: a book of notebooks and the PyTorch package behind it."
SHAPES = ("house", "boat", "crown")
NUM_VIEWS = 2

MARK = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">'
    '<rect x="2" y="2" width="20" height="20" rx="4" fill="{color}" fill-opacity="0.55"/>'
    '<rect x="10" y="10" width="20" height="20" rx="4" fill="{color}" fill-opacity="0.55"/>'
    '<circle cx="16" cy="16" r="3.2" fill="#fff"/></svg>'
)


def png(image: torch.Tensor, size: int = 150) -> str:
    """An image (3, H, W) of bytes as a `data:` URL, enlarged without smoothing."""
    file = io.BytesIO()
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
    pixels.resize((size, size), Image.Resampling.NEAREST).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def rows() -> str:
    """A row for each of three images: the image and two views of it."""
    shapes = Shapes(num_train=200, num_test=1, size=24, lighting=0.1, position=0.3, scale=0.3, seed=3)
    images, factors = shapes.render("train")
    view = View(size=24, crop=(0.35, 0.8), color_jitter=(0.3, 0.3, 0.3, 0.3), mean=(0, 0, 0), std=(1, 1, 1))
    found = []
    for name in SHAPES:
        at = (factors["shape"] == Shapes.class_names.index(name)).nonzero()[1]
        views = [apply_batch(view, images[at], 0, 0, at, stream)[0] for stream in range(NUM_VIEWS)]
        bytes_ = [images[at][0], *[(v.clamp(0, 1) * 255).byte() for v in views]]
        cells = [f'<img src="{png(image)}" alt="">' for image in bytes_]
        found.append(f'{cells[0]}<span class="arrow">→</span>{"".join(cells[1:])}')
    return "".join(f'<div class="row">{row}</div>' for row in found)


def page() -> str:
    """The social image as a page of 1200 by 630 pixels."""
    font = (STATIC / "fonts").as_uri()
    return f"""<!doctype html><meta charset="utf-8"><style>
@font-face {{ font-family: BookSerif; src: url("{font}/source-serif-4.woff2"); font-weight: 200 900 }}
@font-face {{ font-family: BookSans; src: url("{font}/source-sans-3.woff2"); font-weight: 200 900 }}
* {{ box-sizing: border-box; margin: 0 }}
body {{ width: 1200px; height: 630px; background: #fff; border-left: 18px solid {ACCENT}; color: {INK}; display: flex }}
.text {{ width: 580px; padding: 64px 20px 56px 60px; display: flex; flex-direction: column }}
.text svg {{ width: 84px; height: 84px; margin-bottom: 44px; align-self: flex-start }}
h1 {{ font: 600 60px/1.12 BookSerif; letter-spacing: -0.012em }}
p {{ font: 400 29px/1.35 BookSans; color: #4a545d; margin-top: 28px }}
.images {{ flex: 1; display: flex; flex-direction: column; justify-content: center; gap: 24px; padding-right: 40px }}
.row {{ display: flex; align-items: center; justify-content: flex-end; gap: 14px }}
.row img {{ width: 150px; height: 150px; border-radius: 8px }}
.arrow {{ font: 300 44px BookSans; color: {ACCENT}; width: 50px; text-align: center }}
</style><body><div class="text">{MARK.format(color=ACCENT)}<h1>{TITLE}</h1><p>{LINE}</p></div>
<div class="images">{rows()}</div></body>"""


def main() -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    (STATIC / "favicon.svg").write_text(MARK.format(color=ACCENT) + "\n", encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        source, shot = Path(folder) / "page.html", Path(folder) / "shot.png"
        source.write_text(page(), encoding="utf-8")
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,900"]
        command = [chromium, *options, "--allow-file-access-from-files", f"--screenshot={shot}", source.as_uri()]
        subprocess.run(command, check=True, capture_output=True)
        image = Image.open(shot).convert("RGB").crop((0, 0, 1200, 630))
        image.save(STATIC / "social.png", optimize=True)


if __name__ == "__main__":
    main()
