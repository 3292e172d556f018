"""What the README, the docs, the recipes and the help texts show is what the program takes."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

import mapet
from mapet import cli
from mapet.commands import COMMANDS
from mapet.config.base import build_config, read_config
from mapet.config.pipeline import StudyConfig
from mapet.evaluation.protocols import PROTOCOLS
from mapet.models.backbone import create_vit
from mapet.models.context_autoencoder import ContextAutoencoder
from mapet.models.objectives import CAE, OBJECTIVES
from mapet.models.pretraining import ViTForPreTraining
from mapet.studies.trials import grid_trials
from mapet.training.flops import training_flops
from tests.models.test_backbone import images_of_every_kind

ROOT = Path(__file__).parents[2]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").glob("*.yaml"))]

OTHERS_NEED = {
    "finetune": ", backbone: c", "pretrain": ", tokenizer: c", "study": ", test_images: c, tokenizers: {a: {}}, grid: {objective: [mim, mapet]}",
}  # fmt: skip


def commands() -> list[str]:
    texts = [path.read_text() for path in TEXTS] + [function.__doc__ for function in COMMANDS.values()]
    result = [line for text in texts for line in re.findall(r"^[#\s$]*(mapet [a-z-]+(?: .*)?)$", text, flags=re.M)]
    return [line for line in dict.fromkeys(result) if line.split()[1] in COMMANDS]


@pytest.mark.parametrize("command", commands())
def test_every_command_shown_is_understood(command, monkeypatch, tmp_path):
    """Each command's options build a config; the command itself is replaced."""
    _, name, *args = shlex.split(command, comments=True)
    if args and args[0].endswith(".yaml") and not (ROOT / args[0]).exists():  # a recipe of the reader's
        (tmp_path / "own.yaml").write_text(f"{{images: a, out: b{OTHERS_NEED.get(name, '')}}}")
        args[0] = str(tmp_path / "own.yaml")
    monkeypatch.chdir(ROOT)
    assert parse_command(name, args, monkeypatch) is not None


def parse_command(name, args, monkeypatch):
    """Return the config that the arguments after `mapet NAME` build, without running the command."""
    seen = []

    def stand_in(config):
        seen.append(config)

    stand_in.config_type = COMMANDS[name].config_type
    stand_in.__doc__ = COMMANDS[name].__doc__
    monkeypatch.setitem(COMMANDS, name, stand_in)
    cli.run_command(name, args)
    [config] = seen
    return config


SMALL = {
    "fit-tokenizer": "--image-size 8 --patch-size 2 --vocab-size 16",
    "pretrain": "--model-args depth=2 embed_dim=32 num_heads=2 --batch-size 64 --epochs 1",
    "finetune": "--epochs 1 --labels-per-class 4",
    "evaluate": "--protocols knn",
}
"""Options that replace those of the page of commands, for 8 x 8 digits."""


def test_commands_of_the_page_run_in_order(digits, tmp_path, monkeypatch, caplog):
    """Every command of the list, one after the other, on what those before it made; the page in a browser is omitted."""
    (block,) = re.findall(r"(?:^    mapet .*\n){10,}", (ROOT / "docs" / "commands.md").read_text(), flags=re.M)
    monkeypatch.chdir(tmp_path)
    Path("PHOTOS").symlink_to(digits / "test")
    Path("LABELED").symlink_to(digits)
    ran = []
    for line in block.splitlines():
        _, name, *args = shlex.split(line, comments=True)
        if name == "export" and importlib.util.find_spec("onnxscript") is None:
            args = args[: args.index("--format")]
        own_recipe = args[0].endswith(".yaml")
        if "--serve" not in args:
            ran.append(name)
            cli.run_command(name, [*args, *([] if own_recipe else SMALL.get(name, "").split())])
    assert ran == [
        "fit-tokenizer", "tokenize", "pretrain", "pretrain", "evaluate", "evaluate", "finetune",
        "predict", "search", "inspect-tokenizer", "report", "report", "export",
    ]  # fmt: skip


def test_commands_are_found():
    assert len(commands()) > 20


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_builds(recipe):
    name = recipe.stem.partition("_")[0]
    stage = name if name in COMMANDS else "fit-tokenizer" if name == "tokenizer" else "run"
    more = {"finetune": {"backbone": "c"}, "study": {"test_images": "c"}}.get(stage, {})
    build_config(COMMANDS[stage].config_type, read_config(recipe), recipe, {"images": "a", "out": "b"} | more)


def test_readme_python(run_dir, photos, monkeypatch, tmp_path):
    """The README's Python runs as it stands, on a run of ours, on images of every kind."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "photos").symlink_to(run_dir)
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert len(code) == 1
    images = [image for image, _ in images_of_every_kind(photos).values()]
    images[0].save(tmp_path / "image.png")
    scope = {"images": [*images, tmp_path / "image.png", "image.png"]}
    exec(code[0], scope)
    features = scope["features"]
    assert features.shape == (len(images) + 2, 32) and features.isfinite().all()
    assert torch.equal(features[0], features[-1]) and not torch.equal(features[0], features[2])


def test_study_of_the_page_of_commands():
    """The page's study file is one."""
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "commands.md").read_text(), flags=re.S)
    cells = grid_trials(build_config(StudyConfig, yaml.safe_load(text)))
    assert len(cells) == 3 * 3 * 3


def test_objectives_page_names_every_objective_and_its_cost():
    text = (ROOT / "docs" / "objectives.md").read_text()
    costs = {}
    for name, objective in OBJECTIVES.items():
        vit = create_vit("vit_base_patch16_224", (224, 224))
        model = ContextAutoencoder(vit, 8192, 49) if objective is CAE else ViTForPreTraining(vit, 8192, objective, 49)
        costs[name] = training_flops(model.to("meta").train(), [49])
    for name, cost in costs.items():
        (row,) = re.findall(rf"^\| `{name}` .*\|$", text, flags=re.M)
        assert float(row.split("|")[-2]) == pytest.approx(cost / costs["mim"], abs=0.006), name


def test_every_command_is_on_the_page_and_in_the_api():
    page = (ROOT / "docs" / "commands.md").read_text()
    for name in COMMANDS:
        assert f"`{name}`" in page
        assert getattr(mapet, name.replace("-", "_")) is COMMANDS[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_defaults_and_an_example(name, capsys):
    assert cli.main([name, "--help-all"]) == 0
    text = capsys.readouterr().out
    assert f"mapet {name}" in text
    assert "example:" in text
    assert "(default:" in text or "(required)" in text
    assert not re.search(r"\(default: ?[\[{(')]", text), "as one would type it"


def test_every_protocol_has_a_row():
    text = (ROOT / "docs" / "evaluation.md").read_text()
    for protocol in PROTOCOLS:
        assert f"| `{protocol}` |" in text, protocol


def test_architecture_names_every_package():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for path in (ROOT / "src" / "mapet").glob("*/__init__.py"):
        contents = ast.get_docstring(ast.parse(path.read_text()))
        assert contents and f"| `{path.parent.name}/` | {contents.splitlines()[0]} |" in text, path
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert path.read_text().startswith("#")


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900
