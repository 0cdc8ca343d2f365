"""Hooks of the site (``mkdocs.yml``): pages that are files outside ``docs/``, links from pages to such files, and
references in docstrings.

Links in the repository are relative to the file they stand in, so that they work wherever the repository is shown. On
the site, a link to a published page leads to that page, and a link to any other file leads to a copy of it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Pages of the site and the files that they are.
PUBLISHED = {
    "index.md": "README.md",
    "examples.md": "examples/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
_PAGE_OF = {file: page for page, file in PUBLISHED.items()}
_ROLE = re.compile(r":(?:class|func|meth|mod|attr):(?=<code>)")
_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the published pages, and the files that pages link to."""
    from mkdocs.structure.files import File

    for page, file in PUBLISHED.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / file)))
    for name in sorted(linked_files(page.src_uri for page in files.documentation_pages())):
        files.append(File.generated(config, f"files/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of a page as the site needs them."""
    return relinked(markdown, page.file.src_uri)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings without the roles of their references, which name the kind of what the code beside them names."""
    return _ROLE.sub("", html)


def source_of(page: str) -> Path:
    """The file that a page of the site is."""
    return ROOT / PUBLISHED.get(page, f"docs/{page}")


def linked_files(pages: Any) -> set[str]:
    """Files outside ``docs/`` that pages link to and that are no pages, relative to the repository."""
    found: set[str] = set()
    for page in pages:
        source = source_of(page)
        for link, _ in _LINK.findall(source.read_text(encoding="utf-8")):
            name = _in_repository(source, link)
            if (ROOT / name).is_file() and not name.startswith("docs/") and name not in _PAGE_OF:
                found.add(name)
    return found


def relinked(markdown: str, page: str) -> str:
    """The text of a page, its relative links changed to lead to pages and files of the site."""
    source, folder = source_of(page), os.path.dirname(page)

    def replace(match: re.Match[str]) -> str:
        name = _in_repository(source, match[1])
        if name.startswith("docs/"):
            target = name.removeprefix("docs/")
        elif name in _PAGE_OF:
            target = _PAGE_OF[name]
        elif (ROOT / name).is_file():
            target = f"files/{name}"
        else:
            return match[0]
        return f"]({os.path.relpath(target, folder or '.')}{match[2] or ''})"

    return _LINK.sub(replace, markdown)


def _in_repository(source: Path, link: str) -> str:
    """The target of a link in a file, relative to the repository."""
    return os.path.relpath(os.path.normpath(source.parent / link), ROOT)
