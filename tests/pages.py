"""What the README and the pages of docs/ show: commands, files in full, links."""

from __future__ import annotations

import re
from pathlib import Path

from vlmlab.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]
CONNECTOR = ROOT / "docs" / "tutorials" / "connector.md"
TRAINED = (
    "README", "ablations", "demo", "export", "models", "own_data", "questions", "recipes", "sweeps", "towers",
    "two_towers", "world",
)  # fmt: skip
"""Pages whose commands are run as they are, by a slow test; those of the others are composed."""
OURS = re.compile(rf"python (train|evaluate)\.py|vlmlab ({'|'.join(VERBS)}) ")


def commands(*pages: Path) -> list[str]:
    """Lines that call one of our scripts, without their comments, each once."""
    lines = [line.strip().split("  #")[0] for page in pages for line in page.read_text(encoding="utf-8").splitlines()]
    lines = [re.split(r"\s{3,}", line)[0] for line in lines if OURS.match(line) and "`" not in line]
    return list(dict.fromkeys(lines))


def trained() -> list[str]:
    """The commands that are run."""
    return commands(*(page for page in PAGES if page.stem in TRAINED))


def files(page: Path) -> dict[str, str]:
    """The files that a page shows in full: a line with the name and a colon, then the block."""
    text = page.read_text(encoding="utf-8")
    return dict(re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)```", text, re.MULTILINE | re.DOTALL)) | dict(
        re.findall(r"`([\w./]+\.yaml)`:\n\n```yaml\n(.*?)```", text, re.DOTALL)
    )


def write(page: Path, folder: Path) -> None:
    """Those files, in a folder."""
    for name, text in files(page).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
