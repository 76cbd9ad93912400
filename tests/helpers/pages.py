"""Checks that every HTML page passes."""

import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CROSSING = r"""() => {
    const texts = [...document.querySelectorAll("svg text")].map(
        t => [t.textContent.replace(/\s+/g, ""), t.getBoundingClientRect()])
    const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top
    return texts.flatMap(([name, a], n) =>
        texts.slice(n + 1).filter(([, b]) => !apart(a, b)).map(([other]) => name + " | " + other))
}"""
"""Words of figures that overlap."""
OUTSIDE = r"""() => {
    const shown = [...document.querySelectorAll("h1, h2, h3, p, li, td, th, figcaption, img, svg, summary")].filter(
        e => e.checkVisibility() && e.getBoundingClientRect().width > 1)
    const beyond = e => {
        const box = e.getBoundingClientRect()
        return box.left < -1 || box.right > innerWidth + 1
    }
    const cut = [...document.querySelectorAll("svg text")].filter(t => {
        const [a, b] = [t.getBoundingClientRect(), t.closest("svg").getBoundingClientRect()]
        const across = a.left < b.left - 1 || a.right > b.right + 1
        return b.width && (across || a.top < b.top - 1 || a.bottom > b.bottom + 1)
    })
    const scrolled = [...document.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth + 1)
    return [...shown.filter(beyond), ...cut, ...scrolled].map(e => e.tagName + " " + e.textContent.slice(0, 40))
}"""
"""What is not inside the window, and words of figures that are cut off."""


class Elements(HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def assert_self_contained(page: str) -> None:
    """Nothing in it is fetched or run."""
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", re.sub(r"base64,[A-Za-z0-9+/=]+", "", page))
    for tag, attributes in Elements(page).found:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "action", "xlink:href"):
            value = attributes.get(name) or "#"
            assert re.match("#|data:image/(png|jpeg);base64,", value), (tag, name, value[:50])


def assert_has_words(page: str) -> None:
    """Pictures, figures and table heads have text for those who do not see them; identities are unique.

    The last section says what to do next.
    """
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", page, re.DOTALL)[-1].strip() == "Next"
    elements = Elements(page).found
    assert all(attributes.get("alt") for tag, attributes in elements if tag == "img")
    assert all(attributes.get("aria-label") for tag, attributes in elements if attributes.get("role") == "img")
    assert all(attributes.get("scope") for tag, attributes in elements if tag == "th")
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def assert_light_and_dark(page: str) -> None:
    """Every colour is a variable with two values."""
    light, dark = re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    assert re.findall(r"--[\w-]+(?=:)", light) == re.findall(r"--[\w-]+(?=:)", dark)
    shown = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page[page.index("</style>") :])
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", shown)
    assert set(re.findall(r"var\((--[\w-]+)\)", page)) <= set(re.findall(r"--[\w-]+(?=:)", light))


def assert_opens(path: Path, most_height: int = 0) -> None:
    """A browser without a network shows it, wide and narrow, light and dark; skips where there is no browser.

    Nothing is asked for or complained of, nothing is outside the window, every picture is drawn, and no two words of
    a figure overlap. `most_height`: of the page on a phone. With PAGE_SCREENSHOTS set to a folder, pictures are left
    there.
    """
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
            page, complaints = context.new_page(), []
            page.on("console", lambda said, to=complaints: to.append(said.text))
            page.on(
                "request",
                lambda asked, to=complaints: None if asked.url[:5] in ("file:", "data:") else to.append(asked.url),
            )
            page.goto(path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
            assert page.evaluate(CROSSING) == []
            assert page.evaluate(OUTSIDE) == []
            assert complaints == []
            if most_height and width == 390:
                assert page.evaluate("document.documentElement.scrollHeight") <= most_height
            if folder := os.environ.get("PAGE_SCREENSHOTS"):
                name = f"{path.parent.name}-{path.stem}-{width}-{scheme}.png"
                page.screenshot(path=Path(folder) / name, full_page=True)
        browser.close()
