"""`mapet COMMAND [config.yaml] --option value`: turns words into a config and calls the command. No logic."""

import argparse
import inspect
import os
import sys
from pathlib import Path
from shlex import quote
from types import NoneType
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

import shtab
import yaml

import mapet
from mapet.commands import COMMANDS, GROUPS
from mapet.commands.command import Command
from mapet.config.base import build, fields, meaning_of_none, read_recipe
from mapet.config.groups import BASIC, GROUP_OF, MAX_BASIC, RANK
from mapet.errors import Interrupted, MapetError, did_you_mean, option, spell_as_flags, way_out
from mapet.run_state import CONFIG_FILE, check_resume_folder, command_of, find_config
from mapet.signals import RESUME_HINT

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
EPILOG = """\
example:
  mapet run --images PHOTOS --out RUN     all of it with defaults
  mapet COMMAND --help                    options, defaults and an example
  source <(mapet completion bash)         let the shell complete commands and options (or zsh, fish, ...)"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("MPLBACKEND", "Agg")  # figures go into files; in Python, and in a notebook, its user decides
    name = argv[0] if argv else "help"
    try:
        with spell_as_flags():
            if name in ("-h", "--help", "help"):
                print(overview())
            elif name in ("-V", "--version"):
                print(f"mapet {mapet.__version__}")
            elif name == "completion":
                print(completion(argv[1] if len(argv) > 1 else Path(os.environ.get("SHELL", "bash")).name), end="")
            else:
                run_command(name, argv[1:])
    except MapetError as error:
        if not (isinstance(error, Interrupted) and int(os.environ.get("RANK", 0))):  # one of several ranks says it
            print(f"mapet {name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"mapet {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # disk full, permission denied, ...: the system's own message names the file
        text = f"{error.strerror or error} ({error.filename or 'while writing'}){way_out(error.errno)}"
        print(f"mapet {name}: {text}", file=sys.stderr)
        return 2
    return 0


def overview() -> str:
    """Return the text of `mapet --help`."""
    lines = [
        "usage: mapet COMMAND [config.yaml] [--option value ...]",
        "",
        (mapet.__doc__ or "").split("\n")[0][7:],
        "",
    ]
    for heading, names in GROUPS.items():
        lines += [f"{heading}:", *(f"  {name:<20}{_summary(COMMANDS[name])}" for name in names), ""]
    return "\n".join([*lines, EPILOG])


def completion(shell: str) -> str:
    """Return the script that completes commands and options in a shell.

    Raises:
        MapetError: unknown shell.
    """
    if shell not in shtab.SUPPORTED_SHELLS:
        known = shtab.SUPPORTED_SHELLS
        raise MapetError(f"no completion for '{shell}'{did_you_mean(shell, known) or '.'} Shells: {', '.join(known)}")
    root = argparse.ArgumentParser(prog="mapet")
    commands = root.add_subparsers()
    for name, function in COMMANDS.items():
        commands.add_parser(name, help=_summary(function), parents=[_parser(name, function)], add_help=False)
    return shtab.complete(root, shell)


def run_command(name: str, argv: list[str]) -> Any:
    """Parse `argv` for one command and call it."""
    if name not in COMMANDS:
        raise MapetError(
            f"unknown command '{name}'{did_you_mean(name, COMMANDS) or '.'} Commands: {', '.join(COMMANDS)}"
        )
    function = COMMANDS[name]
    config_type, parser = function.config_type, _parser(name, function)
    if "--help-all" in argv or "-h" in argv or "--help" in argv:
        print(_parser(name, function, hide="--help-all" not in argv).format_help(), end="")
        return None
    namespace, unknown = parser.parse_known_args(argv)
    for word in unknown:
        if not word.startswith("--"):
            raise MapetError(f"unexpected word '{word}'; options are written --name value")
        given = word.split("=")[0].replace("_", "-")
        if given[2:].replace("-", "_") in config_type.file_only:
            raise MapetError(
                f"{given} is for config files: `mapet {name} config.yaml` with `{given[2:].replace('-', '_')}: ...` in it"
            )
        known = [option(known) for known, _ in fields(config_type)]
        raise MapetError(f"unknown option '{given}'{did_you_mean(given, known) or '.'} See `mapet {name} --help`")
    options = vars(namespace)
    path = _take_words(name, options)
    typed: dict[str, Any] = {}
    for dotted, value in options.items():
        *sections, last = dotted.split(".")
        inner = typed
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    if path and path.is_dir():
        raise MapetError(f"{path} is a folder, not a config: {_way_in(name, path, 'resume' in typed)}")
    if path and path.suffix.lower() not in CONFIG_SUFFIXES:
        raise MapetError(
            f"{path} is not a config, a file .yaml: options are written --name value, see `mapet {name} --help`"
        )
    try:
        config = build(config_type, read_recipe(path) if path else {}, path, typed)
    except MapetError as error:
        other = command_of(path.parent) if path and path.name == CONFIG_FILE else None
        if other not in (None, name):
            raise MapetError(f"{path} is a config of `mapet {other}`, not of `mapet {name}`") from None
        raise error
    RESUME_HINT[0] = "the same command, and --resume if it had begun" if "resume" in config_type.model_fields else ""
    if path and getattr(config, "resume", False):
        check_resume_folder(path, config.out)  # type: ignore[attr-defined]
    return function(config)


def _take_words(name: str, options: dict[str, Any]) -> Path | None:
    """Give words without an option to the command's positional option; return the first if it is a config file."""
    words, config_type = options.pop("words", []), COMMANDS[name].config_type
    positional = config_type.positional
    is_config = bool(words) and (positional is None or Path(words[0]).suffix in CONFIG_SUFFIXES)
    path, words = (Path(words[0]), words[1:]) if is_config else (None, words)
    if words and positional is None:
        raise MapetError(f"unexpected word '{words[0]}'; options are written --name value")
    if words and positional:
        if positional in options:
            raise MapetError(f"'{' '.join(words)}' and {option(positional)} are mutually exclusive")
        several = "nargs" in _arguments(config_type.model_fields[positional].annotation)
        if len(words) > 1 and not several:
            raise MapetError(f"unexpected word '{words[1]}'; mapet {name} takes one {option(positional)}")
        options[positional] = words if several else words[0]
    return path


def _way_in(name: str, folder: Path, resume: bool) -> str:
    """Return what the user may have meant by a folder in place of a config."""
    if found := find_config(folder, (name,)):
        return f"did you mean {found[1]}?"
    options = ["tokenizer"] if (folder / "visual_tokenizer.json").is_file() else ["run", "backbone", "bundle", "images"]
    options, known = ["out"] if resume else options, COMMANDS[name].config_type.model_fields
    return (
        f"give it as {option(next(name for name in [*options, 'images', 'out'] if name in known))} {quote(str(folder))}"
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise MapetError(f"{message}. See `{self.prog} --help`")


def _parser(name: str, function: Command[..., Any, Any], hide: bool = False) -> argparse.ArgumentParser:
    """Make the parser of a command.

    Args:
        hide: leave less usual options, and those of sections, out of the help.
    """
    config_type = function.config_type
    summary, _, example = (inspect.getdoc(function) or "").partition("Example:")
    words = f" [{config_type.positional.upper()} ...]" if config_type.positional else ""
    parser = _Parser(
        prog=f"mapet {name}", usage=f"mapet {name} [config.yaml]{words} [--option value ...]", description=summary.strip(),
        epilog=f"example:\n{example.strip(chr(10))}", formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False, add_help=False,
    )  # fmt: skip
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    own = [known for known, _ in fields(config_type) if "." not in known]
    shown = {known for known in own if known in BASIC or config_type.model_fields[known].is_required()}
    shown = set(own) if len(own) <= MAX_BASIC else shown
    groups: dict[str, Any] = {}
    for dotted, field in sorted(fields(config_type), key=_help_rank):
        section, _, last = dotted.rpartition(".")
        heading = f"Options of {section.replace('_', '-')}" if section else GROUP_OF.get(last, "Other")
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        flag = f"--{dotted.replace('_', '-')}"
        help_text = argparse.SUPPRESS if hide and dotted not in shown else _help(field)
        groups[heading].add_argument(flag, dest=dotted, help=help_text, **_arguments(field.annotation))
    helps = parser.add_argument_group("Help")
    helps.add_argument("-h", "--help", action="help", help="the usual options")
    helps.add_argument("--help-all", action="help", help="all options, those of sections included")
    return parser


def _help_rank(item: tuple[str, Any]) -> tuple[str, int]:
    section, _, last = item[0].rpartition(".")
    return section, RANK.get(last, len(RANK))


def _help(field: Any) -> str:
    """Return an option's description and default."""
    description = " ".join((field.description or "").split()).replace("%", "%%")
    default = None if field.is_required() else field.get_default(call_default_factory=True, validated_data={})
    if field.is_required():
        return f"{description} (required)"
    if default is None:
        return f"{description} (default: {meaning_of_none(field)})"
    if isinstance(default, (tuple, list, dict)):
        default = " ".join(map(str, default))
    return (
        f"{description} (default: {str(default).lower() if isinstance(default, bool) else default})"
        if default != ""
        else description
    )


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
    """Return what YAML makes of a text; the text if nothing."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        return text


def _arguments(annotation: Any) -> dict[str, Any]:
    """Return the keywords of `add_argument` for an option's type."""
    origin, parts = get_origin(annotation), [part for part in get_args(annotation) if part is not NoneType]
    none = {"type": lambda word: None if word == "none" else word} if NoneType in get_args(annotation) else {}
    if origin is Annotated:
        return _arguments(parts[0])
    if origin is Literal:
        return {"choices": [str(part) for part in parts], "metavar": "{" + ",".join(map(str, parts)) + "}"}
    if origin is dict:
        return {"metavar": "KEY=VALUE", "nargs": "+", "action": _KeyValues}
    if origin in (tuple, list):
        return _arguments(parts[0]) | {"nargs": "+"}
    if annotation is bool or parts == [bool]:
        return {"action": argparse.BooleanOptionalAction}
    if parts:  # of several types the first tells what to write
        return _arguments(parts[0]) | none
    names = {Path: "PATH", str: "TEXT", int: "INT", float: "FLOAT"}
    return {"metavar": names.get(annotation, "VALUE")}


def _summary(function: Command[..., Any, Any]) -> str:
    return (inspect.getdoc(function) or "").split("\n")[0]
