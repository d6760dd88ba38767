"""Reading a report as a browser would, as far as the tests need it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input"}


@dataclass
class Element:
    """A tag, its attributes, and what is inside: text and elements."""

    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    inside: list[str | Element] = field(default_factory=list)

    def all(self, tag: str, style: str | None = None) -> list[Element]:
        """Every element of this name, and class, inside."""
        return [
            one
            for one in self.walk()
            if one.tag == tag and (style is None or style in (one.attributes.get("class") or "").split())
        ]

    def walk(self) -> Iterator[Element]:
        for one in self.inside:
            if isinstance(one, Element):
                yield one
                yield from one.walk()

    @property
    def text(self) -> str:
        """What is to be read, in single spaces."""
        return " ".join("".join(one if isinstance(one, str) else f" {one.text} " for one in self.inside).split())

    def section(self, heading: str) -> Element:
        """The section under this heading."""
        (found,) = [one for one in self.all("section") if [h.text for h in one.all("h2")] == [heading]]
        return found

    def rows(self) -> list[list[str]]:
        """Texts of the cells of the rows of the first table's body."""
        table = self.all("table")[0]
        cells = [[one for one in row.walk() if one.tag in ("td", "th")] for row in table.all("tbody")[0].all("tr")]
        return [[cell.text for cell in row] for row in cells]


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.stack = [Element("page")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        made = Element(tag, dict(attrs))
        self.stack[-1].inside.append(made)
        if tag not in VOID:
            self.stack.append(made)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.stack[-1].inside.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack[-1].tag == tag, f"</{tag}> closes <{self.stack[-1].tag}>"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        self.stack[-1].inside.append(data)


def parse(text: str) -> Element:
    """The page; every tag must be closed by its own."""
    parser = _Parser()
    parser.feed(text)
    parser.close()
    assert len(parser.stack) == 1, [one.tag for one in parser.stack]
    return parser.stack[0]


def assert_self_contained(text: str) -> None:
    """Nothing is fetched: no scripts, no links, pictures as data alone."""
    page = parse(text)
    assert not {one.tag for one in page.walk()} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for one in page.walk():
        assert not {name for name in one.attributes if name.startswith("on")}, one.attributes
        for name in ("src", "href", "xlink:href", "data", "action", "srcset", "poster"):
            assert (one.attributes.get(name) or "data:").startswith("data:"), one.attributes
        assert "url(" not in (one.attributes.get("style") or "")
    (style,) = page.all("style")
    assert "url(" not in style.text
    assert "@import" not in style.text
