"""Values of options: odd numbers, empty texts, and YAML that means something else than it seems to."""

import pytest

from mapet.config.base import build_config, dump_yaml, parse_yaml, read_config
from mapet.config.data import PrepareConfig
from mapet.config.evaluation import EvaluateConfig, FinetuneConfig
from mapet.config.pipeline import RunConfig, StudyConfig
from mapet.config.tokenizers import FitTokenizerConfig
from tests.refused import refused

DIGITS = "123456789012345678901234567890"
GIVEN = {"images": "photos", "out": "out"}
PRETRAIN_FLOATS = [
    "lr",
    "weight_decay",
    "min_lr",
    "clip_grad",
    "warmup_epochs",
    "color_jitter",
    "checkpoint_interval_min",
    "layer_scale_init",
]


@pytest.mark.parametrize("number", ["inf", "-inf", "nan"])
@pytest.mark.parametrize("name", [f"pretrain.{name}" for name in PRETRAIN_FLOATS] + ["max_unreadable"])
def test_numbers_that_are_no_finite_number(name, number, tmp_path):
    """In a file and on the command line alike; the message has the option's whole name."""
    *section, last = name.split(".")
    file = tmp_path / "a.yaml"
    line = f"{last}: {number.replace('inf', '.inf').replace('nan', '.nan')}\n"
    file.write_text(f"pretrain:\n  {line}" if section else line)
    with refused(name, f"got {number}", file, field=last, expected="must be a finite number"):
        build_config(RunConfig, read_config(file) | GIVEN, file)
    with refused(name, f"got '{number}'", field=last):
        build_config(RunConfig, GIVEN, None, {section[0]: {last: number}} if section else {last: number})


@pytest.mark.parametrize(
    ("kind", "options", "field", "named"),
    [
        (FitTokenizerConfig, {"seed": int(DIGITS)}, "seed", [DIGITS]),
        (FitTokenizerConfig, {"seed": 2**64}, "seed", [2**64, 2**32 - 1]),
        (FitTokenizerConfig, {"seed": -1}, "seed", [-1]),
        (FitTokenizerConfig, {"patch_size": DIGITS}, "patch_size", [DIGITS, 2**63 - 1]),
        (FitTokenizerConfig, {"image_size": [int(DIGITS), 32]}, "image_size", [DIGITS]),
        (FitTokenizerConfig, {"out": "out", "image_size": ["32x32"]}, "image_size", ["32x32"]),
        (FitTokenizerConfig, {"out": "out", "image_size": [32, 32, 32]}, "image_size", [2, "[32, 32, 32]"]),
        (PrepareConfig, {"out": "out", "images": ""}, "images", ["''"]),
        (PrepareConfig, {"out": ""}, "out", ["''"]),
        (EvaluateConfig, {"backbone": [""]}, "backbone", ["['']"]),
        (EvaluateConfig, {"backbone": "a", "few_shot": ["0"]}, "few_shot", ["0"]),
        (PrepareConfig, {"value_range": ["4095"]}, "value_range", ["4095"]),
        (PrepareConfig, {"value_range": [0, float("nan")]}, "value_range", ["nan"]),
        (PrepareConfig, {"value_range": [4095, 0]}, "value_range", [4095, 0]),
        (FinetuneConfig, {"backbone": "a", "warmup_epochs": 100, "epochs": 1}, None, ["warmup_epochs", 100, "epochs"]),
        (StudyConfig, {"test_images": "b", "tokenizers": {"a": {}}, "grid": {"lr": [1]}, "seeds": [int(DIGITS)]}, "seeds", [DIGITS]),
    ],
)  # fmt: skip
def test_odd_values_are_refused_by_the_name_of_the_option(kind, options, field, named):
    with refused(*named, field=field) as error:
        build_config(kind, GIVEN | options)
    assert all(name in str(error.value) for name in [field or "_"])


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("1e-3", 0.001), ("-2E+4", -2e4), ("1.5", 1.5), ("1.e5", 1e5)]
)
def test_numbers_with_an_exponent_are_numbers(text, value):
    """YAML 1.1, which PyYAML reads, takes 1e-5 for a text. What is written is read as the same again."""
    assert parse_yaml(f"a: {{b: {text}}}") == {"a": {"b": value}}
    for written in ({"a": text}, {"a": value}):
        assert parse_yaml(dump_yaml(written)) == written


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("pretrain:\n  lr: 1\n  epochs: 1\n  lr: 2\n", ["'lr'", "line 4"]),
        ("a: &a [*a]", ["alias"]),
        ("a: &a {b: *a}", ["alias"]),
        ("a0: &a0 [1]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(12)), ["alias"]),
        ("a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 9)}]}}\n" for i in range(12)), ["alias"]),
        ("pretrain:\n\tepochs: 1\n", ["line 2"]),
        ("[" * 5000, []),
        ("lr: " + "9" * 5000, []),
        ("when: 2026-13-01", []),
        ("run: !!python/object/apply:os.system [ls]", ["python"]),
    ],
)  # fmt: skip
def test_yaml_that_would_hang_or_run_or_lose_a_value(text, named, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with refused(file, *named):
        read_config(file)


def test_anchors_are_read(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("base: &base {epochs: 3, lr: 1e-3}\npretrain: {<<: *base, lr: 2}\n")
    assert read_config(file)["pretrain"] == {"epochs": 3, "lr": 2}
