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
from pydantic.fields import FieldInfo

import mapet
from mapet.commands import COMMANDS, GROUPS
from mapet.commands.command import AnyCommand, command_name
from mapet.config.base import (
    Config,
    build_config,
    format_none,
    is_multi_valued,
    iter_options,
    merge_options,
    read_config,
)
from mapet.errors import Interrupted, MapetError, did_you_mean, option, os_error_hint, spell_as_flags
from mapet.run_state import CONFIG_FILE, find_config, is_first_rank, read_command
from mapet.signals import RESUME_HINT

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
EPILOG = """\
example:
  mapet run --images PHOTOS --out RUN     all of it with defaults
  mapet COMMAND --help                    options, defaults and an example
  source <(mapet completion bash)         let the shell complete commands and options (or zsh, fish, ...)"""
HEADINGS = {
    "Data": "run bundle images test_images ood_images channels max_unreadable value_range views min_crop_scale num_views color_jitter seg_masks "
    "test_seg_masks ignore_labels annotations test_annotations short_side streaming labels_per_class num_seeds",
    "Model": "backbone model model_args image_size patch_size init_from from_scratch decoder_depth drop_path layer_scale_init pool format dtype",
    "Tokenizer": "tokenizer tokens trust_teacher sample teacher teacher_checkpoint teacher_image_size teacher_layer teacher_final_norm "
    "quantizer vocab_size fsq_levels pca_dim patches_per_code codebook_dim dead_code_threshold",
    "K-means": "kmeans_init kmeans_iters kmeans_n_init kmeans_batch_size kmeans_metric",
    "Objective": "objective target mask_ratio patch_order num_predict separate_query_token",
    "Optimization": "opt epochs warmup_epochs batch_size lr min_lr weight_decay clip_grad seed",
    "Regularization": "rand_augment mixup cutmix random_erasing label_smoothing layer_decay ema_decay",
    "Protocols": "protocols linear_epochs few_shot eval_image_sizes dense_epochs",
    "Study": "tokenizers grid seeds compare_by equal_compute report_only devices",
    "Hardware": "device precision micro_batch_size compile fsdp memory_gb benchmark",
    "Output": "out license resume figures figures_dir serve checkpoint_interval_min max_rollbacks log_interval probe_every probe_images track",
}
"""Heading -> its options, in the order of `--help`; the same for every command, since an option has one meaning everywhere."""
HEADING_OF = {name: heading for heading, names in HEADINGS.items() for name in names.split()}
RANK = {name: rank for rank, name in enumerate(HEADING_OF)}
BASIC = """images test_images backbone run tokenizer tokens teacher model image_size patch_size objective target mask_ratio quantizer
vocab_size views protocols labels_per_class tokenizers grid epochs batch_size lr device out resume"""
"""Options in the first `--help` of a command that has more than `MAX_BASIC`."""
MAX_BASIC = 15


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
        if is_first_rank() or not isinstance(error, Interrupted):  # one of several ranks says it
            print(f"mapet {name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"mapet {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # disk full, permission denied, ...: the system's own message names the file
        text = f"{error.strerror or error} ({error.filename or 'while writing'}){os_error_hint(error.errno)}"
        print(f"mapet {name}: {text}", file=sys.stderr)
        return 2
    return 0


def overview() -> str:
    """Return the text of `mapet --help`."""
    about = (mapet.__doc__ or "").split("\n")[0].removeprefix("mapet: ")
    lines = ["usage: mapet COMMAND [config.yaml] [--option value ...]", "", about, ""]
    for heading, functions in GROUPS.items():
        lines += [f"{heading}:", *(f"  {command_name(function):<20}{_summary(function)}" for function in functions), ""]
    return "\n".join([*lines, EPILOG])


def completion(shell: str) -> str:
    """Return the script that completes commands and options in a shell.

    Raises:
        MapetError: unknown shell.
    """
    if shell not in (known := shtab.SUPPORTED_SHELLS):
        raise MapetError(f"no completion for '{shell}'{did_you_mean(shell, known) or '.'} Shells: {', '.join(known)}")
    root = argparse.ArgumentParser(prog="mapet")
    commands = root.add_subparsers()
    for name, function in COMMANDS.items():
        commands.add_parser(name, help=_summary(function), parents=[_parser(function)], add_help=False)
    return shtab.complete(root, shell)


def run_command(name: str, argv: list[str]) -> Any:
    """Parse `argv` for one command and call it."""
    if name not in COMMANDS:
        known = f"{did_you_mean(name, COMMANDS) or '.'} Commands: {', '.join(COMMANDS)}"
        raise MapetError(f"unknown command '{name}'{known}")
    function = COMMANDS[name]
    config_type = function.config_type
    if {"--help-all", "--help", "-h"} & set(argv):
        print(_parser(function, hide="--help-all" not in argv).format_help(), end="")
        return None
    namespace, unknown = _parser(function).parse_known_args(argv)
    options = vars(namespace)
    words, positional, path = options.pop("words", []), config_type.positional, None
    several = positional is not None and is_multi_valued(config_type.model_fields[positional].annotation)
    if words and (positional is None or Path(words[0]).suffix in CONFIG_SUFFIXES):
        path = Path(words.pop(0))
    unknown += words if positional is None else [] if several else words[1:]
    if unknown:
        raise MapetError(_explain_unknown(name, unknown[0], config_type))
    if words and positional in options:
        raise MapetError(f"'{' '.join(words)}' and {option(positional)} are mutually exclusive")
    if words and positional:
        options[positional] = words if several else words[0]
    typed: dict[str, Any] = {}
    for dotted, value in options.items():
        value = dict(value) if isinstance(value, list) and isinstance(value[0], tuple) else value  # KEY=VALUE
        for part in reversed(dotted.split(".")):
            value = {part: value}
        typed = merge_options(typed, value)
    if path and path.is_dir():
        raise MapetError(f"{path} is a folder, not a config: {_suggest_option(name, path, 'resume' in typed)}")
    if path and path.suffix.lower() not in CONFIG_SUFFIXES:
        raise MapetError(f"{path} is no config (.yaml): options are written --name value, see `mapet {name} --help`")
    written_by = read_command(path.parent) if path and path.name == CONFIG_FILE else ""
    try:
        config = build_config(config_type, read_config(path) if path else {}, path, typed)
    except MapetError:
        if written_by not in ("", name):
            raise MapetError(f"{path} is a config of `mapet {written_by}`, not of `mapet {name}`") from None
        raise
    RESUME_HINT[0] = "the same command, and --resume if it had begun" if "resume" in config_type.model_fields else ""
    out = getattr(config, "out", None) if getattr(config, "resume", False) else None
    if path and out and written_by and path.parent.resolve() != out.resolve():
        raise MapetError(
            f"{path} is the config of the run in its own folder, but {option('out')} is {out}, seen from {Path.cwd()}: go to the folder "
            f"that the run was started in, or, if it was moved, give {option('out')} {quote(str(path.parent))}"
        )
    return function(config)


def _explain_unknown(name: str, word: str, config_type: type[Config]) -> str:
    """Say what is wrong with a word that the parser does not know."""
    if not word.startswith("--"):
        return f"unexpected word '{word}'; options are written --name value"
    given = word.split("=")[0].replace("_", "-")
    if (field := given[2:].replace("-", "_")) in config_type.file_only:
        return f"{given} is for config files: `mapet {name} config.yaml` with `{field}: ...` in it"
    known = [option(known) for known, _ in iter_options(config_type)]
    return f"unknown option '{given}'{did_you_mean(given, known) or '.'} See `mapet {name} --help`"


def _suggest_option(name: str, folder: Path, resume: bool) -> str:
    """Return what the user may have meant by a folder in place of a config."""
    if found := find_config(folder, (name,)):
        return f"did you mean {found[1]}?"
    tokenizer = (folder / "visual_tokenizer.json").is_file()
    likely = ["out"] if resume else ["tokenizer"] if tokenizer else ["run", "backbone", "bundle"]
    known = COMMANDS[name].config_type.model_fields
    likely = [option(name) for name in [*likely, "images", "out"] if name in known]
    return f"give it as {likely[0]} {quote(str(folder))}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise MapetError(f"{message}. See `{self.prog} --help`")


def _parser(function: AnyCommand, hide: bool = False) -> argparse.ArgumentParser:
    """Make the parser of a command.

    Args:
        hide: leave less usual options, and those of sections, out of the help.
    """
    config_type, name = function.config_type, command_name(function)
    summary, _, example = (inspect.getdoc(function) or "").partition("Example:")
    words = f" [{config_type.positional.upper()} ...]" if config_type.positional else ""
    parser = _Parser(
        prog=f"mapet {name}", usage=f"mapet {name} [config.yaml]{words} [--option value ...]", description=summary.strip(),
        epilog=f"example:\n{example.strip(chr(10))}", formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False, add_help=False,
    )  # fmt: skip
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    own = [(name, field) for name, field in iter_options(config_type) if "." not in name]
    shown = [name for name, field in own if len(own) <= MAX_BASIC or name in BASIC.split() or field.is_required()]
    groups: dict[str, Any] = {}
    options = [(*dotted.rpartition(".")[::2], dotted, field) for dotted, field in iter_options(config_type)]
    for section, last, dotted, field in sorted(options, key=lambda item: (item[0], RANK[item[1]])):
        heading = f"Options of {section.replace('_', '-')}" if section else HEADING_OF[last]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        help_text = argparse.SUPPRESS if hide and dotted not in shown else _help(field)
        flag = f"--{dotted.replace('_', '-')}"
        groups[heading].add_argument(flag, dest=dotted, help=help_text, **_arguments(field.annotation))
    helps = parser.add_argument_group("Help")
    helps.add_argument("-h", "--help", action="help", help="the usual options")
    helps.add_argument("--help-all", action="help", help="all options, those of sections included")
    return parser


def _help(field: FieldInfo) -> str:
    """Return an option's description and default."""
    description = " ".join((field.description or "").split()).replace("%", "%%")
    if field.is_required():
        return f"{description} (required)"
    default = format_none(field) if (value := field.get_default(call_default_factory=True)) is None else value
    shown = " ".join(map(str, default)) if isinstance(default, (tuple, list, dict)) else str(default)
    shown = shown.lower() if isinstance(default, bool) else shown
    return f"{description} (default: {shown})" if shown else description


def _key_value(word: str) -> tuple[str, Any]:
    """Split KEY=VALUE; the value is what YAML makes of it, or the text if nothing."""
    key, equals, text = word.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"takes key=value pairs, got {word}")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        return key, text
    if isinstance(value, dict) and any(inner is None and ":" in str(name) for name, inner in value.items()):
        raise argparse.ArgumentTypeError(f"'{word}': YAML wants a space after each colon")
    return key, value


def _arguments(annotation: Any) -> dict[str, Any]:
    """Return the keywords of `add_argument` for an option's type."""
    origin, parts = get_origin(annotation), [part for part in get_args(annotation) if part is not NoneType]
    if origin is Annotated:
        return _arguments(parts[0])
    if origin is Literal:
        return {"choices": [str(part) for part in parts], "metavar": "{" + ",".join(map(str, parts)) + "}"}
    if origin is dict:
        return {"metavar": "KEY=VALUE", "nargs": "+", "type": _key_value}
    if origin in (tuple, list):
        return _arguments(parts[0]) | {"nargs": "+"}
    if bool in (annotation, *parts):
        return {"action": argparse.BooleanOptionalAction}
    if parts:  # of several types the first tells what to write
        none = {"type": lambda word: None if word == "none" else word} if NoneType in get_args(annotation) else {}
        return _arguments(parts[0]) | none
    return {"metavar": {Path: "PATH", str: "TEXT", int: "INT", float: "FLOAT"}.get(annotation, "VALUE")}


def _summary(function: AnyCommand) -> str:
    return (inspect.getdoc(function) or "").split("\n")[0]
