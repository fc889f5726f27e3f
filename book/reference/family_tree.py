"""The family tree of all methods, who took what from whom: `book/_static/family_tree.svg`, and as a list in `methods.md`.

    python book/reference/family_tree.py

A line leads from a method to one that kept something of it. Years are those of the first version on arXiv. Columns are
families; the boxes with dashed lines have no file in this package.
"""

import html
from dataclasses import dataclass
from pathlib import Path

from sslbook.notebook import numbering, style

HERE = Path(__file__).parent
SVG = HERE.parent / "_static" / "family_tree.svg"
PAGE = HERE / "methods.md"
BEGIN, END = "<!-- family tree -->", "<!-- /family tree -->"

# Families: title, color, first column, row of the title.
FAMILIES = {
    "pretext": ("Pretext tasks", style.AMBER, 0, 0),
    "clusters": ("Clustering", style.GREEN, 0, 5),
    "instances": ("Instance discrimination", style.BLUE, 2, -1),
    "pairs": ("No negatives", style.VIOLET, 4, 8),
    "teachers": ("Self-distillation", style.PINK, 5, 11),
    "masks": ("Masked image modeling", style.ORANGE, 6, 1),
}
COLUMNS = 10
CAPTION = (
    "Who took what from whom. A line leads from a method to one that kept something of it; pointing at a line or a box "
    "tells what. Years are those of the first version on arXiv. Dashed boxes have no file here."
)
MIDDLES = {"pretext": 0.5, "clusters": 0.5, "instances": 0.5, "pairs": 0, "teachers": 0, "masks": 2}  # of the titles


@dataclass(frozen=True)
class Method:
    """A node of the tree.

    Args:
        title: as the page names it; a line break where it is too long for the box.
        year: of the first version on arXiv.
        family: key of `FAMILIES`.
        column: within the family.
        row: from the top.
        took: for each method it builds on, what it kept of it, or what it put in its place.
        outside: whether this package has no file of it.
    """

    title: str
    year: int
    family: str
    column: float
    row: int
    took: dict[str, str]
    outside: bool = False

    @property
    def name(self) -> str:
        return self.title.replace("-\n", "").replace("\n", " ")


TREE = {
    "exemplar": Method("Exemplar", 2014, "instances", 0.5, 0, {}),
    "relative_location": Method("Relative\nlocation", 2015, "pretext", 0, 1, {}),
    "jigsaw": Method("Jigsaw", 2016, "pretext", 0, 2, {"relative_location": "patches whose arrangement is predicted"}),
    "colorization": Method("Colorization", 2016, "pretext", 1, 2, {}),
    "context_encoder": Method("Context\nencoder", 2016, "masks", 2, 2, {}),
    "rotation": Method(
        "Rotation", 2018, "pretext", 0, 4, {"jigsaw": "classify what was done to the image, no patches, so no borders"}
    ),
    "npid": Method(
        "NPID",
        2018,
        "instances",
        0,
        4,
        {"exemplar": "every image its own class, a memory bank replaces the classifier"},
    ),
    "cpc": Method("CPC", 2018, "instances", 1, 4, {}, outside=True),
    "bert": Method("BERT (text)", 2018, "masks", 1, 4, {}, outside=True),
    "deepcluster": Method("DeepCluster", 2018, "clusters", 0.5, 6, {}),
    "moco": Method(
        "MoCo",
        2019,
        "instances",
        1,
        7,
        {"npid": "features stored as negatives, a queue instead of a memory bank", "cpc": "the InfoNCE loss"},
    ),
    "pirl": Method(
        "PIRL", 2019, "instances", 0, 7, {"npid": "the memory bank", "jigsaw": "shuffled patches, now to be ignored"}
    ),
    "simclr": Method(
        "SimCLR",
        2020,
        "instances",
        0,
        8,
        {"npid": "every image its own class", "cpc": "the InfoNCE loss, negatives from the batch"},
    ),
    "odc": Method(
        "ODC",
        2020,
        "clusters",
        1,
        8,
        {"deepcluster": "clusters as labels, updated with every batch", "npid": "a memory bank of features"},
    ),
    "byol": Method(
        "BYOL",
        2020,
        "pairs",
        0,
        9,
        {"moco": "the EMA network", "simclr": "augmentations and projector, a predictor instead of negatives"},
    ),
    "swav": Method(
        "SwAV",
        2020,
        "clusters",
        0,
        9,
        {"deepcluster": "clusters as targets, within the batch", "simclr": "two views, augmentations and projector"},
    ),
    "deepcluster_v2": Method(
        "Deep-\nCluster v2",
        2020,
        "clusters",
        0.5,
        10,
        {"deepcluster": "k-means between epochs", "swav": "multi-crop and projector"},
    ),
    "densecl": Method("DenseCL", 2020, "instances", 1, 9, {"moco": "queue and loss, also for local features"}),
    "interclr": Method(
        "InterCLR",
        2020,
        "instances",
        0.3,
        10,
        {"moco": "the loss within an image", "odc": "online clusters, from which other positives come"},
    ),
    "wmse": Method(
        "W-MSE", 2020, "pairs", 0, 10, {"simclr": "two views and projector, whitening instead of negatives"}
    ),
    "simsiam": Method("SimSiam", 2020, "pairs", 0, 11, {"byol": "predictor and stop-gradient, without the EMA"}),
    "dvae": Method("dVAE", 2021, "masks", 0, 12, {}),
    "clip": Method("CLIP", 2021, "masks", 3, 12, {}, outside=True),
    "barlow_twins": Method(
        "Barlow Twins",
        2021,
        "pairs",
        0,
        12,
        {"simclr": "two views and projector, decorrelated dimensions instead of negatives"},
    ),
    "moco_v3": Method(
        "MoCo v3",
        2021,
        "instances",
        1,
        12,
        {"moco": "the EMA network", "simclr": "negatives from the batch", "byol": "the predictor"},
    ),
    "nnclr": Method(
        "NNCLR", 2021, "instances", 0, 13, {"simclr": "loss and negatives", "moco": "a queue, searched for a positive"}
    ),
    "dino": Method(
        "DINO",
        2021,
        "teachers",
        0,
        12,
        {"byol": "an EMA network as the target", "swav": "multi-crop, outputs as distributions"},
    ),
    "vicreg": Method(
        "VICReg", 2021, "pairs", 0, 13, {"barlow_twins": "decorrelated dimensions, in each view by itself"}
    ),
    "beit": Method(
        "BEiT", 2021, "masks", 1, 13, {"bert": "predict masked tokens", "dvae": "the vocabulary of the tokens"}
    ),
    "ibot": Method(
        "iBOT",
        2021,
        "teachers",
        0,
        14,
        {"dino": "the EMA teacher's distributions", "beit": "masked patches, with the teacher as tokenizer"},
    ),
    "mae": Method(
        "MAE",
        2021,
        "masks",
        2,
        14,
        {
            "context_encoder": "reconstruct pixels from the rest",
            "beit": "transformer and masked patches, here not encoded",
        },
    ),
    "simmim": Method("SimMIM", 2021, "masks", 1, 14, {"beit": "mask tokens in the encoder, pixels as the target"}),
    "maskfeat": Method(
        "MaskFeat", 2021, "masks", 0.4, 15, {"beit": "mask tokens in the encoder, gradient histograms as the target"}
    ),
    "data2vec": Method(
        "data2vec",
        2022,
        "teachers",
        0,
        16,
        {"byol": "the EMA network's features as the target", "beit": "blocks of masked patches"},
    ),
    "msn": Method(
        "MSN",
        2022,
        "teachers",
        0,
        17,
        {"dino": "EMA teacher, multi-crop, distributions", "mae": "patches dropped from the student's view"},
    ),
    "cae": Method(
        "CAE",
        2022,
        "masks",
        1.4,
        16,
        {"beit": "tokens as targets", "mae": "an encoder of visible patches, a regressor before the decoder"},
    ),
    "mixmim": Method(
        "MixMIM",
        2022,
        "masks",
        2.4,
        16,
        {
            "mae": "reconstruct pixels, patches of another image in place of masked ones",
            "simmim": "hierarchical encoders",
        },
    ),
    "vqkd": Method(
        "VQ-KD",
        2022,
        "masks",
        0,
        17,
        {"dvae": "a vocabulary of tokens", "clip": "features to reconstruct instead of pixels"},
    ),
    "milan": Method(
        "MILAN", 2022, "masks", 3, 17, {"mae": "encoder of visible patches", "clip": "features as the target"}
    ),
    "beit_v2": Method(
        "BEiT v2", 2022, "masks", 0.4, 18, {"beit": "predict masked tokens", "vqkd": "the vocabulary of the tokens"}
    ),
    "eva": Method(
        "EVA", 2022, "masks", 2, 18, {"beit": "mask tokens in the encoder", "clip": "features as the target"}
    ),
    "ijepa": Method(
        "I-JEPA",
        2023,
        "teachers",
        0,
        19,
        {
            "data2vec": "the EMA teacher's features as the target",
            "mae": "an encoder of visible patches, a small predictor",
        },
    ),
    "spark": Method("SparK", 2023, "masks", 1, 19, {"mae": "masked pixels, for convolutional networks"}),
    "pixmim": Method(
        "PixMIM", 2023, "masks", 2, 19, {"mae": "all but the target, without high frequencies, and the crop"}
    ),
    "mff": Method("MFF", 2023, "masks", 3, 19, {"mae": "all, shallow layers reach the decoder too"}),
    "lejepa": Method(
        "LeJEPA",
        2025,
        "pairs",
        0,
        20,
        {"vicreg": "agreement and a condition on the distribution, now a Gaussian", "ijepa": "prediction of features"},
    ),
}

WIDE, HIGH, ACROSS, DOWN, LEFT, TOP, SIZE = 82, 34, 90, 56, 48, 34, 12


def place(method: Method) -> tuple[float, float]:
    """The center of a method's box, in the page's pixels."""
    column = FAMILIES[method.family][2] + method.column
    return LEFT + (column + 0.5) * ACROSS, TOP + (method.row + 0.5) * DOWN


def chapter(name: str) -> int | None:
    """The number of the chapter about a method, if there is one."""
    chapters = numbering.chapters(HERE.parent)
    return chapters.index(name) + 1 if name in chapters else None


def svg() -> str:
    """The tree as an SVG element whose colors follow the page's, or, as a file by itself, the reader's preference."""
    width = LEFT + ACROSS * COLUMNS
    height = TOP + DOWN * (max(method.row for method in TREE.values()) + 1)
    body = [*_years(width), *_lines(), *_titles(), *(_box(name) for name in TREE)]
    alt = f"Family tree of {sum(not m.outside for m in TREE.values())} methods; the list below holds every line of it."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="sslbook-tree" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{alt}" font-family="{style.FONT}" font-size="{SIZE}" fill="currentColor" '
        f'style="display:block;height:auto;width:{width}px;min-width:{width * 10.2 / SIZE:.0f}px;max-width:100%">'
        f"<title>Family tree of the methods</title><desc>{alt}</desc>\n<style>{_pointing()}</style>\n"
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _pointing() -> str:
    """Rules by which pointing at a box, or reaching it by the keyboard, brings out its lines and fades the others."""
    lines = ".sslbook-tree path{stroke-opacity:.75}.sslbook-tree path:hover{stroke-width:3}"
    for name in TREE:
        on = f".sslbook-tree:has(.at-{name}:hover,a:focus-visible .at-{name})"
        lines += f"{on} path:not(.of-{name}){{stroke-opacity:.12}}{on} .of-{name}{{stroke-width:2.4;stroke-opacity:1}}"
    return lines


def _years(width: float) -> list[str]:
    found = []
    for i, year in enumerate(sorted({method.year for method in TREE.values()})):
        rows = [method.row for method in TREE.values() if method.year == year]
        top, count = TOP + min(rows) * DOWN, max(rows) - min(rows) + 1
        if i % 2 == 0:
            found.append(f'<rect x="0" y="{top}" width="{width}" height="{count * DOWN}" fill-opacity=".05"/>')
        found.append(f'<text x="8" y="{top + DOWN / 2 + 4:.0f}" font-weight="600">{year}</text>')
    return found


def _titles() -> list[str]:
    found = []
    for family, (title, color, column, row) in FAMILIES.items():
        x, y = LEFT + (column + MIDDLES[family] + 0.5) * ACROSS, TOP + (row + 1) * DOWN + 3
        found.append(
            f'<text x="{x:.0f}" y="{y}" text-anchor="middle" font-weight="600" font-size="13" fill="{color}" '
            f'stroke="Canvas" stroke-width="5" stroke-linejoin="round" style="fill:{style.mixed(color)};paint-order:stroke;'
            f'stroke:var(--pst-color-background,Canvas)">{title}</text>'
        )
    return found


def _lines() -> list[str]:
    """The lines, each from its own place at the lower side of a box to its own place at the upper side of another."""
    found = []
    children = {name: sorted((place(TREE[c])[0], c) for c in TREE if name in TREE[c].took) for name in TREE}
    for name, method in TREE.items():
        parents = sorted((place(TREE[parent])[0], parent) for parent in method.took)
        for _, parent in parents:
            (x1, y1), (x2, y2) = place(TREE[parent]), place(method)
            x1 += _spread([child for _, child in children[parent]].index(name), len(children[parent]))
            x2 += _spread([other for _, other in parents].index(parent), len(parents))
            y1, y2 = y1 + HIGH / 2, y2 - HIGH / 2
            bend = max(18.0, (y2 - y1) / 2)
            color, told = (
                FAMILIES[TREE[parent].family][1],
                f"{method.name} from {TREE[parent].name}: {method.took[parent]}",
            )
            found.append(
                f'<path class="of-{name} of-{parent}" d="M{x1:.0f} {y1:.0f}C{x1:.0f} {y1 + bend:.0f} {x2:.0f} '
                f'{y2 - bend:.0f} {x2:.0f} {y2:.0f}" fill="none" stroke="{color}" stroke-width="1.4" '
                f'style="stroke:{style.mixed(color)}"><title>{html.escape(told)}</title></path>'
            )
    return found


def _spread(at: int, count: int) -> float:
    """Where, from the middle of a box, the line number `at` of `count` touches it."""
    return (at - (count - 1) / 2) * min(14.0, 0.8 * WIDE / max(1, count - 1))


def _box(name: str) -> str:
    method, at = TREE[name], chapter(name)
    (x, y), color = place(method), FAMILIES[method.family][1]
    dash = ' stroke-dasharray="4 3"' if method.outside else ""
    lines = [*method.title.split("\n"), *([f"chapter {at}"] if at else [])]
    under = ' text-decoration="underline"' if at else ""
    words = "".join(
        f'<text x="{x:.0f}" y="{y + 4 + 14 * (i - (len(lines) - 1) / 2):.0f}" text-anchor="middle"'
        f"{under if i == len(lines) - 1 else ''}>{html.escape(line)}</text>"
        for i, line in enumerate(lines)
    )
    told = "; ".join(f"from {TREE[parent].name}: {what}" for parent, what in method.took.items())
    box = (
        f"<g class='at-{name}'><title>{html.escape(f'{method.name}, {method.year}' + (f': {told}' if told else ''))}</title>"
        f'<rect x="{x - WIDE / 2:.0f}" y="{y - HIGH / 2:.0f}" width="{WIDE}" height="{HIGH}" rx="6" '
        f'fill="Canvas" stroke="{color}" stroke-width="{2.6 if at else 1.4}"{dash} '
        f'style="fill:var(--pst-color-background,Canvas);stroke:{style.mixed(color)}"/>{words}</g>'
    )
    return f'<a href="../chapters/{name}/chapter.html" style="color:inherit">{box}</a>' if at else box


def listed() -> str:
    """The tree as a table in Markdown: a row for every method."""
    rows = ["| method | year | took |", "|---|---|---|"]
    for method in TREE.values():
        if not method.outside:
            told = "; ".join(f"from {TREE[parent].name}: {what}" for parent, what in method.took.items())
            rows.append(f"| {method.name} | {method.year} | {told or 'begins a line'} |")
    return "\n".join(rows)


def block() -> str:
    """What stands between the marks in `methods.md`."""
    raw = "```{raw} html\n"
    parts = [
        f'{raw}<div><figure class="sslbook-figure"><div style="overflow-x:auto">\n```',
        f"{raw}:file: ../_static/family_tree.svg\n```",
        f'{raw}</div><figcaption style="text-align:left;max-width:46rem">{CAPTION}</figcaption></figure></div>\n```',
        f"````{{dropdown}} The family tree as a list\n{listed()}\n````",
    ]
    return "\n\n".join([BEGIN, *parts, END])


def main() -> None:
    SVG.write_text(svg(), encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + block() + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
