"""Names: no file has a term that docs/terminology.md refuses, in text or identifiers; test modules have the names of what they test."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "terminology.md"
REFUSED = PAGE.read_text(encoding="utf-8").split("## Refused")[1]
TERMS = re.findall(
    r"`([^`]+)`", "\n".join(line.split("|")[1] for line in REFUSED.splitlines() if line.startswith("| `"))
)
EXCLUDED = (PAGE, Path(__file__), ROOT / "tests" / "formats" / "0.1.0", ROOT / "src" / "mapet" / "reports" / "vendor")
NOT_OURS = re.compile(r'"image/png": "[^"]*"|COMP_C?WORDS?')
"""Images in notebooks, and bash's variables of completion."""
BREAKS = re.compile(r"_+|(?<=[a-z0-9])(?=[A-Z])|(?:\s|\\n)*(?:\n|\\n)[\s#*\"',]*")
"""Where a name has its next part, and line breaks of text, comments and notebooks: a space for the search."""


NAMES = {
    name
    for line in PAGE.read_text(encoding="utf-8").split("## Names")[1].split("## Refused")[0].splitlines()
    for quoted in re.findall(r"`([^`]+)`", "".join(line.split("|")[1:2]))
    for name in re.findall(r"[A-Za-z][\w.-]*", quoted)
}


def inflected(term: str) -> str:
    """Return a pattern for a term with any ending: `judge` also finds judges, judged and judging."""
    words = [re.escape(re.sub(r"(?:e|ed|s)$", "", word)) for word in term.split()]
    return r"(?:e|ed|es|er|ing|s)?\s+".join(words) + r"(?:e|ed|es|er|ing|s)?"


PATTERN = re.compile(rf"\b(?:{'|'.join(map(inflected, TERMS))})\b", re.I)


def find_refused(text: str) -> list[str]:
    """Return the refused terms of a text with what stands around them, also of names' parts and over line breaks."""
    text = BREAKS.sub(" ", NOT_OURS.sub(" ", text))
    return [text[max(0, match.start() - 60) : match.end() + 30] for match in PATTERN.finditer(text)]


def test_no_refused_term():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    texts, refused = 0, []
    for file in (ROOT / name for name in listed.stdout.splitlines()):
        if file.exists() and not any(file.is_relative_to(excluded) for excluded in EXCLUDED):
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # an image or weights
            texts += 1
            refused += [f"{file.relative_to(ROOT)}: ...{line}..." for line in find_refused(text)]
    assert texts > 200
    assert not refused, "\n".join(refused)


def test_names_of_the_page_are_in_the_source():
    files = (ROOT / "src").rglob("*.py")
    known = set(re.findall(r"[A-Za-z][\w.-]*|\w+", "\n".join(file.read_text(encoding="utf-8") for file in files)))
    known |= {part for name in known for part in name.split(".")}
    assert len(NAMES) > 100
    assert not NAMES - known


def test_the_search_finds_them():
    assert len(TERMS) > 30
    for text in (
        "its visual\n    words",
        "A word.",
        "It goes on.",
        "labelling",
        "def goes_on",
        "VisualWord",
        "two neighbours",
    ):
        assert find_refused(text), text
    assert not find_refused("a keyword, a password, someone, ongoing")


def test_tests_are_laid_out_as_the_source():
    """tests/FOLDER/test_MODULE.py or test_MODULE_TOPIC.py tests src/mapet/FOLDER/MODULE.py; other folders test the whole program."""
    tests, source = ROOT / "tests", ROOT / "src" / "mapet"
    for file in tests.rglob("test_*.py"):
        folder = source / file.parent.relative_to(tests)
        if folder.is_dir() and folder not in (source, source / "commands"):
            modules = [module.stem for module in folder.glob("*.py")]
            assert any(f"{file.stem}_".startswith(f"test_{module}_") for module in modules), file
