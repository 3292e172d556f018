"""The pages of the site: their Python and recipes run, their links, figures and messages are those there are.

The convention for blocks is in CONTRIBUTING.md; what `test_docs` does with commands holds for these pages, too.
"""

import ast
import importlib.util
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml
from markdown.extensions.toc import slugify

import mapet
from mapet.cli import create_parser
from mapet.commands import COMMANDS
from mapet.models.export_formats import FORMATS
from tests.integration.test_docs import ROOT, parse_command

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
OPTIONAL = {"transformers", "onnxruntime"}
"""Libraries of an extra: blocks that import them are skipped without it."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.S | re.M)


def parametrize_blocks(language: str) -> list:
    result = [(page, number, text) for page in PAGES for number, text in enumerate(blocks(page, language), 1)]
    return [pytest.param(page, text, id=f"{page.stem}-{number}") for page, number, text in result]


@pytest.fixture(scope="session")
def products(run_dir, tokenizer_dir, digits, tmp_path_factory):
    """Photos, and what the pages' commands leave: an export in all formats whose libraries are there, and features."""
    out = tmp_path_factory.mktemp("products")
    shutil.copytree(digits / "test" / "7", out / "PHOTOS")
    next((out / "PHOTOS").iterdir()).rename(out / "PHOTOS" / "photo.png")
    formats = [name for name, f in FORMATS.items() if all(importlib.util.find_spec(needed) for needed in f.requires)]
    mapet.export(backbone=run_dir, out=out / "backbone", format=formats)
    mapet.embed(backbone=run_dir, images=out / "PHOTOS", out=out / "features", device="cpu")
    return out


@pytest.fixture
def place(run_dir, tokenizer_dir, digits, products, tmp_path, monkeypatch):
    """A folder with the names that the pages use."""
    names = {"LABELED": digits} | {name: products / name for name in ("PHOTOS", "backbone", "features")}
    for run in ("photos", "digits"):
        names |= {f"runs/{run}/pretrain": run_dir, f"runs/{run}/tokenizer": tokenizer_dir}
    for name, target in names.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("page", "code"), parametrize_blocks("python"))
def test_python_runs(page, code, place):
    """Each block alone, as a reader would paste it."""
    imported = {name.split(".")[0] for name in re.findall(r"^(?:from|import) ([\w.]+)", code, flags=re.M)}
    for name in sorted(imported & OPTIONAL):
        pytest.importorskip(name)
    exec(compile(code, page.name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(("page", "text"), parametrize_blocks("yaml"))
def test_yaml_is_a_recipe(page, text, tmp_path, monkeypatch):
    """Its first line names it and its command, which takes it."""
    match = re.match(r"# (\S+\.yaml), for `mapet (.*)`\n", text)
    assert match, f"{page.name}: begin it with: # NAME.yaml, for `mapet COMMAND NAME.yaml ...`"
    (tmp_path / match[1]).write_text(text)
    name, *args = shlex.split(match[2])
    monkeypatch.chdir(tmp_path)
    given = {"run": ["--images", "PHOTOS", "--out", "OUT"]}.get(name, []) if "--images" not in args else []
    assert parse_command(name, args + given, monkeypatch)


def test_only_known_blocks():
    """A fence says what is done with it; `bash` runs in the tutorial's test alone."""
    for page in PAGES:
        fences = set(re.findall(r"^```(\S*)\n(?:.*?)^```", page.read_text(), flags=re.S | re.M))
        assert fences <= {"python", "yaml", "text"} | ({"bash"} if page.stem == "tutorial" else set()), page.name


def test_every_page_is_in_the_navigation():
    def files(part):
        return (
            [part]
            if isinstance(part, str)
            else [f for p in (part.values() if isinstance(part, dict) else part) for f in files(p)]
        )

    listed = files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == [page.name for page in PAGES]


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    return {slugify(re.sub(r"[`*]", "", title), "-") for title in re.findall(r"^#+ (.+)$", text, flags=re.M)}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", page.read_text())  # what is shown as code is no link
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        to = (page.parent / name).resolve() if name else page
        assert to.exists(), target
        assert page.parent != DOCS or to.is_relative_to(DOCS), f"{target} is not of the site"
        assert not anchor or anchor in anchors(to), target


def test_every_recipe_extra_and_command_has_its_place():
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert re.search(rf"^\| `{recipe.name}` \|", (DOCS / "recipes.md").read_text(), flags=re.M), recipe.name
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    install = (DOCS / "index.md").read_text().partition("## Install")[2].partition("\n## ")[0]
    for extra in project["optional-dependencies"]:
        assert f"| `{extra}` |" in install, extra
    api = (DOCS / "api.md").read_text()
    for command in COMMANDS.values():
        for documented in (command, command.config_type):
            assert f"::: {documented.__module__}.{documented.__name__}\n" in api


def flags_of(command) -> set[str]:
    return {flag for action in create_parser(command)._actions for flag in action.option_strings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_options_in_prose_exist(page):
    """Each option at the start of inline code is one of a command, or a field of a config: `--mask-ratio 0.5`, `--pretrain.epochs 10`."""
    others = {"--help", "--help-all", "--rdzv-endpoint"}
    known = others.union(*map(flags_of, COMMANDS.values()))
    for name in re.findall(r"`(--[a-z][\w.-]*)", page.read_text()):
        assert name in known, name


def test_recipes_page_names_options_without_a_flag():
    page = (DOCS / "recipes.md").read_text()
    sections = {"fit_tokenizer", "tokenize", "pretrain", "finetune"}
    for command in COMMANDS.values():
        for name in command.config_type.model_fields.keys() - sections:
            assert f"--{name.replace('_', '-')}" in flags_of(command) or f"`{name}`" in page, name


def test_export_page_has_every_format():
    for name in FORMATS:
        assert re.search(rf"^\| `?{name}`? ", (DOCS / "export.md").read_text(), flags=re.M), name


def test_figures_of_requirements_are_those_of_the_pages_linked():
    """Every number with a point, of each row that links to a page."""
    rows = [
        line for line in (DOCS / "requirements.md").read_text().splitlines() if line.startswith("|") and ".md" in line
    ]
    assert len(rows) > 10
    for row in rows:
        pages = "".join((DOCS / name).read_text() for name in re.findall(r"\]\((\w+\.md)", row))
        for figure in re.findall(r"\d+\.\d+", row):
            assert figure in pages, (figure, row)


def _text_of(part: ast.expr) -> str:
    """Return a constant as it is, an option as the command line spells it, and a blank for anything else."""
    match part:
        case ast.Constant(str(value)):
            return value
        case ast.FormattedValue(ast.Call(ast.Name("option"), [ast.Constant(str(name)), *values])):
            shown = [value for value in values if not isinstance(value, ast.Constant)]
            return f"--{name.replace('_', '-')}{' ...' if shown else ''}"
    return "\0"


def texts_of_source() -> list[str]:
    """Every text in the source and in the templates of warnings, with a blank \\0 for what is put in."""
    texts = [re.sub("{{.*?}}", "\0", path.read_text()) for path in (ROOT / "src").rglob("web/*.md")]
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(map(_text_of, node.values)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_messages_of_troubleshooting_are_in_the_source():
    texts = [re.sub(r"%[-+.\d]*[srdgf]|%%|\0", "\0", text) for text in texts_of_source()]
    messages = [line for block in blocks(DOCS / "troubleshooting.md", "text") for line in block.splitlines()]
    assert len(messages) > 40
    for message in messages:
        pieces = [piece for piece in message.split("...") if piece]
        assert max(map(len, pieces)) > 8, message
        pattern = re.compile(".*".join(map(re.escape, pieces)), flags=re.S)
        assert any(pattern.search(text) for text in texts), message


def test_figures_of_concepts_show_what_each_objective_attends_to():
    """The panels of docs/figures.py against the method, and each figure of the page is drawn by it."""
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    p = figures.PREDICTED
    for rank in figures.SHOWN:
        before, after = [j < rank for j in range(p)], [j >= rank for j in range(p)]
        expected = {
            "mim": {"mask": [True] * p},
            "pim": {"target": before},
            "mapet": {"target": before, "mask": after},
        }
        for objective in (figures.MIM, figures.PIM, figures.MAPET):
            seen = {segment: rows.tolist() for segment, rows in figures.attended_patches(objective, rank).items()}
            assert seen.pop("context") == [True] * (1 + figures.CONTEXT)
            assert seen == expected[objective.name], (objective.name, rank)
    source = (DOCS / "figures.py").read_text()
    for name in re.findall(r"\(images/([\w-]+)\.png\)", (DOCS / "concepts.md").read_text()):
        assert name in source or name.removeprefix("attention-mask-") in expected
