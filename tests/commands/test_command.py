"""Commands as Python shows and calls them."""

import inspect

import pytest

import mapet
from mapet.cli import create_parser
from mapet.commands import COMMANDS
from mapet.commands.command import command
from mapet.config.base import Config, iter_options
from tests.refused import refused

HIDDEN = ("debug-step",)
MAX_OPTIONS = 317


class AddConfig(Config):
    first: int
    second: int = 2


@command(AddConfig)
def add(config: AddConfig) -> int:
    """Add."""
    return config.first + config.second


def test_a_command_takes_keywords_or_a_config():
    assert add(first=1) == 3 and add(AddConfig(first=1, second=5)) == 6
    with refused("add(first=1", kind=TypeError):
        add(1)
    with pytest.raises(TypeError):
        add(AddConfig(first=1), second=2)


def test_an_error_carries_the_option_its_value_and_what_was_expected():
    with refused(field="first", value="x") as error:
        add(first="x")
    assert (error.value.field, error.value.value, error.value.expected) == ("first", "x", "must be a whole number")


def test_signatures_show_keywords_types_and_defaults():
    assert str(inspect.signature(add)) == "(*, first: int, second: int = 2) -> int"
    for function in COMMANDS.values():
        parameters = inspect.signature(function).parameters
        assert list(parameters) and set(parameters) == set(function.config_type.model_fields)
        assert all("Annotated" not in str(parameter) for parameter in parameters.values())
    assert inspect.signature(mapet.pretrain).parameters["objective"].default == "mapet"


def test_dir_lists_the_commands():
    names = {name.replace("-", "_") for name in COMMANDS}
    assert names <= set(dir(mapet)) and all(getattr(mapet, name) is COMMANDS[name.replace("_", "-")] for name in names)


@pytest.mark.parametrize(("rank", "result"), [("0", 3), ("1", None)])
def test_rank_0_works_alone_where_no_work_is_distributed(rank, result, monkeypatch):
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "TQDM_DISABLE": ""}.items():
        monkeypatch.setenv(name, value)
    assert add(first=1) == result


def test_help_is_short_first_and_options_are_few():
    """At most 15 options at first, each under a heading; those of sections are counted where they are defined."""
    total = 0
    for name, function in COMMANDS.items():
        own = [option for option, _ in iter_options(function.config_type) if "." not in option]
        first, every = (create_parser(function, hide).format_help() for hide in (True, False))
        assert first.count("\n  --") - 1 <= 15 and every.count("\n  --") >= len(own)
        total += 0 if name in HIDDEN else len(own)
    assert total <= MAX_OPTIONS


def test_help_names_other_options_by_their_flags():
    """Names of the same section first, then those of the command; other text is unchanged."""
    options = {name: COMMANDS[name] for name in ("run", "study", "report")}
    run, study, report = (" ".join(create_parser(each).format_help().split()) for each in options.values())
    assert "at most --pretrain.lr." in run and "auto: --images, if" in run
    assert "options of `fit-tokenizer`" in study and "folders of `mapet pretrain`" in report


def test_a_page_is_served_by_one_process_only(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "TQDM_DISABLE": ""}.items():
        monkeypatch.setenv(name, value)
    with refused(field="serve", value=True):
        mapet.report(run=tmp_path, serve=True)
