"""Follow every link of the built site: `python docs/check_links.py outputs/site`.  Exit status 1 names what is dead.

Of other sites, whose addresses cannot be followed without a network, only the form is looked at.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """What a page links to, and the places in it that can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note links and ids."""
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.places.add(value)


def dead(site: Path) -> list[str]:
    """Each link that leads nowhere, with its page."""
    pages = {file.resolve(): Page(file.read_text(encoding="utf-8")) for file in site.rglob("*.html")}
    found = [] if pages else [f"{site}: there is no page"]
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                if parts.scheme not in ("https", "http", "mailto") or not (parts.netloc or parts.path):
                    found.append(f"{file.name}: {link}")
                continue
            root = site.resolve() if parts.path.startswith("/") else file.parent
            target = (root / unquote(parts.path).lstrip("/")).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            there = target.is_file() and (target not in pages or unquote(parts.fragment) in pages[target].places)
            if not there:
                found.append(f"{file.name}: {link}")
    return found


def main() -> int:
    """Print what is dead."""
    found = dead(Path(sys.argv[1]))
    print("\n".join(found) or "every link leads somewhere")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
