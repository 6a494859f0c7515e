"""MkDocs: pages link to files of the repository outside docs/, which get a place in the site."""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
MOVED = {"../benchmarks/results/": "results/", "../CHANGELOG.md": "changelog.md", "docs/": ""}


def on_files(files, config):
    """The recorded runs and the changelog, as if they were in docs/."""
    found = [("changelog.md", ROOT / "CHANGELOG.md")]
    for path in sorted((ROOT / "benchmarks" / "results").iterdir()):
        if path.suffix in (".md", ".png"):
            found.append((f"results/{path.name}", path))
    for place, path in found:
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    for old, new in MOVED.items():
        markdown = markdown.replace(f"]({old}", f"]({new}")
    return markdown
