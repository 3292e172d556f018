"""The terms that docs/terminology.md refuses are in no module, page or README."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "terminology.md"
REFUSED = PAGE.read_text(encoding="utf-8").split("## Refused")[1]
TERMS = re.findall(
    r"`([^`]+)`", "\n".join(line.split("|")[1] for line in REFUSED.splitlines() if line.startswith("| `"))
)
PATTERN = re.compile(rf"\b({'|'.join(re.escape(term).replace('words', 'words?') for term in TERMS)})\b", re.I)


def find_refused(text: str) -> list[str]:
    """Return the lines of a text that hold a refused term, also one that a line break divides."""
    joined = re.sub(r"\s*\n[\s#*]*", " ", text)
    return [joined[max(0, found.start() - 60) : found.end() + 30] for found in PATTERN.finditer(joined)]


def test_no_refused_term():
    names = subprocess.run(
        ["git", "ls-files", "src", "docs", "README.md"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [
        ROOT / name
        for name in names.stdout.split("\n")
        if name.endswith((".py", ".md", ".html", ".js", ".css", ".yaml"))
    ]
    assert len(files) > 100
    found = {
        str(file.relative_to(ROOT)): lines
        for file in files
        if file != PAGE
        and "vendor" not in file.parts
        and file.exists()
        and (lines := find_refused(file.read_text(encoding="utf-8")))
    }
    assert not found, "\n".join(f"{name}: ...{line}..." for name, lines in found.items() for line in lines)


def test_the_search_finds_them():
    assert len(TERMS) > 30
    assert find_refused("its visual\n    words") and find_refused("A word.") and find_refused("It goes on.")
    assert not find_refused("a keyword, its wording, password")
