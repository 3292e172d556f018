"""`mapet STAGE [recipe.yaml] --key value`: turns words into a config and calls the stage. No logic."""

import argparse
import inspect
import os
import sys
from pathlib import Path
from shlex import quote
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml

import mapet
from mapet.commands import COMMANDS
from mapet.completion import completion
from mapet.config.base import build, fields, meaning_of_none, read_recipe
from mapet.errors import Interrupted, MapetError, did_you_mean, way_out
from mapet.run_state import CONFIG_FILE, check_resume_folder, command_of, find_config
from mapet.signals import RESUME_HINT

RECIPES = (".yaml", ".yml", ".json")


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"mapet {mapet.__version__}")
        return 0
    os.environ.setdefault("MPLBACKEND", "Agg")  # pictures go into files; in Python, and in a notebook, its user decides
    try:
        if argv[0] == "--completion":
            print(completion(argv[1] if len(argv) > 1 else Path(os.environ.get("SHELL", "bash")).name), end="")
            return 0
        if argv[0] not in COMMANDS:
            raise MapetError(
                f"unknown stage '{argv[0]}'{did_you_mean(argv[0], COMMANDS) or '.'} Stages: {', '.join(COMMANDS)}"
            )
        run_stage(argv[0], argv[1:])
    except MapetError as error:
        if not (isinstance(error, Interrupted) and int(os.environ.get("RANK", 0))):  # of several processes one says it
            print(f"mapet {argv[0]}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"mapet {argv[0]}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        # Disk full, permission denied, ...: the system's own message names the file.
        text = f"{error.strerror or error} ({error.filename or 'while writing'}){way_out(error.errno)}"
        print(f"mapet {argv[0]}: {text}", file=sys.stderr)
        return 2
    return 0


def overview() -> str:
    """The text of `mapet --help`."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{_summary(function)}" for name, function in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mapet STAGE [recipe.yaml] [--option value ...]",
            "",
            "Pre-train Vision Transformers on your own images by masked and permuted visual-token prediction.",
            "",
            "stages, in the order they are used:",
            *lines,
            "",
            "example:",
            "  mapet run --images PHOTOS --out RUN     all of it with defaults",
            "  mapet STAGE --help                      options, defaults and an example",
            "  source <(mapet --completion bash)       let the shell complete stages and options (or zsh)",
            "  mapet --completion fish | source        the same in fish",
        ]
    )


def run_stage(name: str, argv: list[str]) -> Any:
    """Parse `argv` for one stage and call it."""
    function = COMMANDS[name]
    config_type = function.config_type
    parser = _parser(name, function)
    namespace, unknown = parser.parse_known_args(argv)
    for word in unknown:
        if word.startswith("--"):
            given = word.split("=")[0].replace("_", "-")
            known = [f"--{_flag(option)}" for option, _ in fields(config_type)]
            raise MapetError(f"unknown option '{given}'{did_you_mean(given, known) or '.'} See `mapet {name} --help`")
        raise MapetError(f"unexpected word '{word}'; options are written --name value")
    options = vars(namespace)
    recipe = _take_words(name, options)
    typed: dict[str, Any] = {}
    for dotted, value in options.items():
        *path, last = dotted.split(".")
        inner = typed
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    if recipe and recipe.is_dir():
        raise MapetError(f"{recipe} is a folder, not a recipe: {_way_in(name, recipe, 'resume' in typed)}")
    if recipe and recipe.suffix.lower() not in RECIPES:
        raise MapetError(
            f"{recipe} is not a recipe, a file .yaml: options are written --name value, see `mapet {name} --help`"
        )
    try:
        config = build(config_type, read_recipe(recipe) if recipe else {}, recipe, typed)
    except MapetError as error:
        stage = command_of(recipe.parent) if recipe and recipe.name == CONFIG_FILE else None
        if stage not in (None, name):
            raise MapetError(f"{recipe} is a recipe of `mapet {stage}`, not of `mapet {name}`") from None
        raise error
    RESUME_HINT[0] = "the same command, and --resume if it had begun" if "resume" in config_type.model_fields else ""
    if recipe and getattr(config, "resume", False):
        check_resume_folder(recipe, config.out)  # type: ignore[attr-defined]
    return function(config)


def _take_words(name: str, options: dict[str, Any]) -> Path | None:
    """Words without an option go to the option that the stage names for them; the first may be a recipe, which is returned."""
    first, words = options.pop("recipe"), options.pop("words", [])
    option = COMMANDS[name].config_type.positional
    if first is None or option is None or first.suffix in RECIPES:
        recipe = first
    else:
        recipe, words = None, [str(first), *words]
    if option and words:
        if option in options:
            raise MapetError(f"'{' '.join(words)}' and --{_flag(option)} say the same in two ways: give one of them")
        several = _kind(COMMANDS[name].config_type.model_fields[option].annotation)[1]
        if len(words) > 1 and not several:
            raise MapetError(f"unexpected word '{words[1]}'; mapet {name} takes one --{_flag(option)}")
        options[option] = words if several else words[0]
    return recipe


def _way_in(name: str, folder: Path, resume: bool) -> str:
    """What somebody may have meant who gave a stage nothing but a folder."""
    if found := find_config(folder, (name,)):
        return f"did you mean {found[1]}?"
    options = ["tokenizer"] if (folder / "visual_tokenizer.json").is_file() else ["run", "backbone", "bundle", "images"]
    options, known = ["out"] if resume else options, COMMANDS[name].config_type.model_fields
    option = next(option for option in [*options, "images", "out"] if option in known)
    return f"give it as --{option} {quote(str(folder))}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise MapetError(f"{message}. See `{self.prog} --help`")


def _parser(name: str, function: Any) -> argparse.ArgumentParser:
    summary, _, example = (inspect.getdoc(function) or "").partition("Example:")
    parser = _Parser(
        prog=f"mapet {name}",
        usage=f"mapet {name} [recipe.yaml] [--option value ...]",
        description=summary.strip(),
        epilog=f"example:\n{example.rstrip()}".replace("\n\n", "\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "recipe", nargs="?", type=Path, default=None, help="YAML file of the same options; the command line wins"
    )
    if option := function.config_type.positional:
        parser.usage = f"mapet {name} [recipe.yaml] [{option.upper()} ...] [--option value ...]"
        parser.add_argument("words", nargs="*", metavar=option.upper(), help=f"the same as --{_flag(option)}")
    groups: dict[str, Any] = {}
    own = set(function.config_type.__annotations__)
    known = sorted(fields(function.config_type), key=lambda item: (not item[1].is_required(), item[0] not in own))
    for option, field in known:
        of_stage = option.rpartition(".")[0]
        if of_stage not in groups:
            groups[of_stage] = parser.add_argument_group(f"{_flag(of_stage)} options") if of_stage else parser
        description = " ".join((field.description or "").split()).replace("%", "%%")
        default = (
            "required"
            if field.is_required()
            else f"default: {_show(field.get_default(call_default_factory=True, validated_data={}))}"
        )
        kind, several = _kind(field.annotation)
        extra: dict[str, Any] = {"metavar": kind}
        if kind == "bool":
            extra |= {"nargs": "?", "const": True}
        elif kind == "KEY=VALUE":
            extra |= {"nargs": "+", "action": _KeyValues}
        elif several:
            extra |= {"nargs": "+"}
        if NoneType in get_args(field.annotation):
            extra["type"] = lambda word: None if word == "none" else word
        if field.default is None:
            default = f"default: {meaning_of_none(field)}"
        help_text = f"{description} ({default})".strip()
        groups[of_stage].add_argument(f"--{_flag(option)}", dest=option, help=help_text, **extra)
    return parser


class _KeyValues(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        pairs = [word.partition("=") for word in values]
        if not all(equals for _, equals, _ in pairs):
            parser.error(f"{option_string} takes key=value pairs, got {' '.join(values)}")
        found = {key: _value(value) for key, _, value in pairs}
        for key, value in found.items():
            if isinstance(value, dict) and any(inner is None and ":" in str(name) for name, inner in value.items()):
                parser.error(f"{option_string} '{key}={{{', '.join(value)}}}': YAML wants a space after each colon")
        setattr(namespace, self.dest, found)


def _value(text: str) -> Any:
    """What YAML makes of it; as it stands if nothing."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        return text


def _kind(annotation: Any) -> tuple[str, bool]:
    """(metavar, takes several words) of an option's type."""
    origin, arguments = get_origin(annotation), [a for a in get_args(annotation) if a is not NoneType]
    if origin is Annotated:
        return _kind(arguments[0])
    if origin is Literal:
        return "{" + ",".join(map(str, arguments)) + "}", False
    if origin is dict or annotation is dict:
        return "KEY=VALUE", True
    if origin in (tuple, list):
        return _kind(arguments[0])[0], True
    if arguments:  # Optional and unions
        kinds = [_kind(a) for a in arguments]
        return "|".join(dict.fromkeys(k for k, _ in kinds)), any(s for _, s in kinds)
    names = {Path: "PATH", str: "TEXT", int: "INT", float: "FLOAT", bool: "bool"}
    return names.get(annotation, getattr(annotation, "__name__", "VALUE").upper()), False


def _show(value: Any) -> str:
    """As one would type it."""
    if isinstance(value, (tuple, list, dict)):
        return " ".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _flag(option: str) -> str:
    return option.replace("_", "-")


def _summary(function: Any) -> str:
    return (inspect.getdoc(function) or "").split("\n")[0]
