"""A hook of mkdocs: pages that do not lie in docs/, the pages of the docstrings, and links that leave docs/.

Not a page of the site (``exclude_docs``). A link to a file of the repository leads to its page, if it has one; else to the file
in ``repo_url``, if mkdocs.yml has one; else its text alone stays.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# Files of the repository that are pages of the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "configs/README.md": "configs.md",
    "tests/README.md": "tests.md",
    "examples/README.md": "examples.md",
    "experiments/results/README.md": "learning.md",
    "profiling/results/benchmarks/README.md": "benchmarks.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^()\s]+)\)")
_FENCE = re.compile(r"(```.*?```)", re.DOTALL)
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>(~?)([^<]*)</code>")


def on_files(files, config):
    """Add the pages that are made."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for source in sorted(_images()):
        files.append(File.generated(config, f"images/{source}", abs_src_path=str(ROOT / source)))
    for page, modules in api_pages().items():
        title = page.removeprefix("api/").removesuffix(".md")
        body = "\n\n".join(f"::: {module}" for module in modules)
        files.append(File.generated(config, page, content=f"# {title}\n\n{body}\n"))
    return files


def on_config(config):
    """Name the docstrings' pages in the navigation."""
    names = [page for page in api_pages() if page != "api/ds_mofa.md"]
    pages = [{page.removeprefix("api/").removesuffix(".md"): page} for page in ["api/ds_mofa.md", *names]]
    if not any("Reference" in item for item in config.nav):
        config.nav.append({"Reference": pages})
    return config


def on_page_markdown(markdown, page, config, files):
    """Lead links that leave docs/ somewhere, or nowhere."""
    here = page.file.src_uri
    source = SOURCES.get(here, f"docs/{here}")
    parts = _FENCE.split(markdown)
    return "".join(
        part if part.startswith("```") else _LINK.sub(_led(source, here, config, files), part) for part in parts
    )


def on_page_content(html, page, config, files):
    """Docstrings have Sphinx's roles; the site shows the name."""
    return _ROLE.sub(lambda match: f"<code>{match[2].rpartition('.')[2] if match[1] else match[2]}</code>", html)


def api_pages() -> dict[str, list[str]]:
    """A page for the package, and one for each of its folders, with the modules on it."""
    pages: dict[str, list[str]] = {"api/ds_mofa.md": ["ds_mofa"]}
    for path in sorted((ROOT / "ds_mofa").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if any(part.startswith("_") and part != "__init__" for part in parts) or "templates" in parts:
            continue
        folder = ".".join(parts[:-1])
        module = folder if parts[-1] == "__init__" else ".".join(parts)
        if module != "ds_mofa":
            pages.setdefault(f"api/{folder}.md", []).append(module)
    return pages


def _images() -> set[str]:
    """The images that pages from outside of docs/ show."""
    shown = set()
    for source in PAGES:
        for _, _, link in _LINK.findall((ROOT / source).read_text()):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
            if target.endswith(".png") and not target.startswith("docs/"):
                shown.add(target)
    return shown


def _led(source: str, here: str, config, files):
    """What replaces each link of the file ``source``, whose page is ``here``."""

    def replace(match: re.Match) -> str:
        image, text, link = match.groups()
        if re.match(r"[a-z]+:", link) or link.startswith("#"):
            return match[0]
        path, _, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        page = _page_of(target, files)
        if page is not None:
            relative = posixpath.relpath(page, posixpath.dirname(here) or ".")
            return f"{image}[{text}]({relative}{'#' + anchor if anchor else ''})"
        if config.repo_url:
            return f"{image}[{text}]({config.repo_url.rstrip('/')}/blob/main/{target})"
        return text

    return replace


def _page_of(target: str, files) -> str | None:
    """The page of a file or folder of the repository."""
    if target in PAGES:
        return PAGES[target]
    if target.startswith("docs/") and files.get_file_from_path(target.removeprefix("docs/")):
        return target.removeprefix("docs/")
    if f"images/{target}" in (file.src_uri for file in files):
        return f"images/{target}"
    folder = target if target.startswith("ds_mofa") and not target.endswith(".py") else posixpath.dirname(target)
    page = f"api/{folder.replace('/', '.')}.md"
    return page if files.get_file_from_path(page) else None
