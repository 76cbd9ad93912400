"""What every page that people are given keeps to."""

import re
from html.parser import HTMLParser


class Elements(HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def assert_stands_alone(page: str) -> None:
    """Nothing in it is fetched or run."""
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", re.sub(r"base64,[A-Za-z0-9+/=]+", "", page))
    for tag, attributes in Elements(page).found:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "action", "xlink:href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:50])


def assert_has_words(page: str) -> None:
    """Pictures, figures and table heads are told to those who do not see them; identities are unique."""
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
