"""Reads a page as a browser would, strictly: what is opened is closed, and everything that it says or refers to is collected."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """text: all of it, as it is read. tags: (name, attributes) in order. Asserts that every tag is closed where it should be."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    @property
    def text(self) -> str:
        return " ".join("".join(self.parts).split())

    def found(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        """The tags of this name with these attributes (`class_` for class)."""
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [own for name, own in self.tags if name == tag and wanted.items() <= own.items()]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else, inside {self.open}"
        self.parts.append(" " if tag in ("p", "td", "th", "li", "h1", "h2", "h3", "summary", "pre") else "")

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.parts.append(data)
