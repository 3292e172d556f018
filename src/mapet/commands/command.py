"""Commands: functions that are called with their config, or with its fields as keywords."""

import functools
import inspect
import logging
import os
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar, cast, overload

from mapet.config.base import Config, build_config
from mapet.errors import MapetError, option
from mapet.run_state import is_first_rank, run_state

P = ParamSpec("P")
C = TypeVar("C")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Its environment variables."""


class Command(Protocol[P, R_co]):
    """A command as Python calls it: with the config's fields as keywords, or with the config."""

    __name__: str
    config_type: type[Config]

    @overload
    def __call__(self, config: Config, /) -> R_co: ...
    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


AnyCommand = Command[..., Any]


def command_name(function: Callable[..., Any] | AnyCommand) -> str:
    """The name of a command as it is typed."""
    return function.__name__.replace("_", "-")


def command(config_type: Callable[P, C], distributed: bool = False) -> Callable[[Callable[[C], R]], Command[P, R]]:
    """Let a function of a config be called with the config's fields as keywords too.

    A command whose `out` is a folder keeps a run.json there, and refuses one that holds something and is not resumed.

    Args:
        config_type: the config, whose fields become the keywords that mypy, `help()` and IDEs show.
        distributed: under `torchrun`, share the work over the ranks. Otherwise rank 0 works alone, without a process group, and
            the other ranks return None at once.

    >>> pretrain(images="photos", tokenizer="runs/tokenizer", out="run")      # doctest: +SKIP
    """
    kind = cast(type[Config], config_type)

    def decorate(function: Callable[[C], R]) -> Command[P, R]:
        signature = _signature(kind, inspect.signature(function).return_annotation)

        @functools.wraps(function)
        def call(config: Any = None, /, **options: Any) -> R | None:
            if not isinstance(config, kind):
                if config is not None and kind.positional is None:
                    example = f"{function.__name__}({next(iter(signature.parameters))}={config!r}, ...)"
                    raise TypeError(f"{function.__name__}() takes keywords: {example}")
                config = build_config(kind, options if config is None else {str(kind.positional): config} | options)
            elif options:
                raise TypeError(f"{function.__name__}() takes a config or keywords, not both")
            _check_out_is_not_among_images(config)
            _set_up_logging()
            with _translate_dead_workers():
                return _run(function, config, distributed)

        call.__dict__.update(config_type=kind, __signature__=signature)
        return cast(Command[P, R], call)

    return decorate


def _run(function: Callable[[Any], R], config: Config, distributed: bool) -> R | None:
    """Call the function on every rank of `torchrun`, or on rank 0 alone."""
    out, name = getattr(config, "out", None), command_name(function)
    state = nullcontext() if out is None or config.out_is_file else run_state(out, name, config)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        with state:
            return function(config)
    if not distributed:
        return _run_on_rank_0(function, config, state)
    from mapet.distributed import barrier, process_group  # imports torch, which --help can do without

    with state, process_group():
        result = function(config)
        barrier()
        return result


def _run_on_rank_0(function: Callable[[Any], R], config: Config, state: AbstractContextManager[None]) -> R | None:
    """Call the function on rank 0, without a process group; within a distributed command the other ranks wait for it."""
    distributed = sys.modules.get("mapet.distributed")  # not imported: nothing is distributed yet
    in_group = distributed is not None and distributed.is_initialized()
    result = None
    if getattr(config, "serve", False):
        hint = f"{option('serve', True)} runs in one process: start it without torchrun"
        raise MapetError(hint, field="serve", value=True)
    if is_first_rank():
        hidden = {name: os.environ.pop(name) for name in TORCHRUN if name in os.environ}
        try:
            with state, distributed.disable_collectives() if distributed else nullcontext():
                result = function(config)
        finally:
            os.environ.update(hidden)
    if distributed is not None and in_group:
        distributed.barrier()
    return result


def _signature(config_type: type[Config], returns: object) -> inspect.Signature:
    """A signature with the config's fields as keywords, required ones first: plain types (no validators), and defaults."""
    types, parameters = typing.get_type_hints(config_type), inspect.signature(config_type).parameters.values()
    keywords = [parameter.replace(annotation=types[parameter.name]) for parameter in parameters]
    keywords.sort(key=lambda keyword: keyword.default is not keyword.empty)
    return inspect.Signature(keywords, return_annotation=returns)


def _check_out_is_not_among_images(config: Config) -> None:
    """Raise MapetError if what the command writes would be listed as images from then on."""
    images, out = getattr(config, "images", None), getattr(config, "out", None)
    if images is None or out is None or config.out_is_file:
        return
    folder, target = Path(images).resolve(), Path(out).resolve()
    if folder.is_dir() and folder in (target, *target.parents):
        raise MapetError(
            f"{option('out')} {out} lies in {option('images')} {images}: what is written there would be taken for images. Choose a folder outside"
        )


@contextmanager
def _translate_dead_workers() -> Iterator[None]:
    """Turn the RuntimeError by which PyTorch reports a dead loader worker, at any line, into a MapetError."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise MapetError(
            f"a process that reads images died: {str(error).splitlines()[0]} If it was killed, memory may have run out: try fewer "
            f"of them (MAPET_WORKERS). The last checkpoint is intact: resume with {option('resume', True)}"
        ) from None


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """Print above a progress bar, not into it."""
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stdout)


def _set_up_logging() -> None:
    """Print what commands report, unless the program has set up logging of its own."""
    if not is_first_rank():
        os.environ["TQDM_DISABLE"] = "1"  # the first process shows how far all are
    log = logging.getLogger("mapet")
    if not log.handlers and not logging.getLogger().handlers:
        log.addHandler(_ConsoleHandler())
        log.setLevel(logging.INFO)
