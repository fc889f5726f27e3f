"""Contrast of colors by WCAG 2.2, on the pages of the site and of Jupyter."""

# (page, its text): the site's two themes, JupyterLab's, Colab's
PAGES = {
    "site, light": ("#ffffff", "#222832"),
    "site, dark": ("#121212", "#ced6dd"),
    "site, dark card": ("#14181e", "#ced6dd"),
    "JupyterLab, light": ("#ffffff", "#212121"),
    "JupyterLab, dark": ("#111111", "#ffffff"),
}


def channels(color: str) -> list[int]:
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]


def luminance(color: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in channels(color))]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(color: str, page: str) -> float:
    light, dark = sorted([luminance(color), luminance(page)], reverse=True)
    return (light + 0.05) / (dark + 0.05)


def mix(color: str, other: str, kept: float) -> str:
    """What CSS makes of `color-mix(in srgb, color kept, other)`."""
    return "#" + "".join(f"{round(kept * a + (1 - kept) * b):02x}" for a, b in zip(channels(color), channels(other)))
