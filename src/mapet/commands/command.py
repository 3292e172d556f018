"""Commands: functions that take their config, or its fields as keywords."""

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from mapet.config.base import Config, build, fields
from mapet.errors import MapetError
from mapet.run_state import run_state

C = TypeVar("C", bound=Config)
R_co = TypeVar("R_co", covariant=True)


class Stage(Protocol[R_co]):
    """A stage as users call it: with a config, or with its fields as keywords."""

    __name__: str
    config_type: type[Config]

    def __call__(self, config: Any = None, /, **options: Any) -> R_co: ...


def stage(function: Callable[[C], R_co]) -> Stage[R_co]:
    """Let a stage be called with its config, or with the config's fields as keywords.

    Where `torchrun` started several processes, the first does the work and the others wait, unless the stage is
    `shared_stage`.

    >>> pretrain(PretrainConfig(images="photos", out="run"))      # doctest: +SKIP
    >>> pretrain(images="photos", out="run")                      # doctest: +SKIP
    """
    return _stage(function, shared=False)


def shared_stage(function: Callable[[C], R_co]) -> Stage[R_co]:
    """A stage whose work the processes that `torchrun` started share."""
    return _stage(function, shared=True)


def _stage(function: Callable[[C], R_co], shared: bool) -> Stage[R_co]:
    config_type = function.__annotations__["config"]

    @functools.wraps(function)
    def call(config: C | None = None, /, **options: Any) -> R_co:
        if config is None:
            config = build(config_type, options)
        elif not isinstance(config, config_type):
            if config_type.positional is None:
                first = next(iter(fields(config_type)))[0] if not (needed := _required(config_type)) else needed[0]
                raise TypeError(f"{function.__name__}() takes keywords: {function.__name__}({first}={config!r}, ...)")
            config = build(config_type, {config_type.positional: config, **options})
        elif options:
            raise TypeError(f"{function.__name__}() takes a config or keywords, not both")
        _refuse_out_among_images(config)
        _show_progress()
        with _naming_dead_workers(), _state_of(function.__name__, config):
            if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
                return function(config)
            from mapet import distributed  # imports torch, which --help can do without

            with distributed.process_group():
                result = function(config) if shared or distributed.rank() == 0 else cast(R_co, None)
                distributed.barrier()
                return result

    call.config_type = config_type  # type: ignore[attr-defined]
    return cast(Stage[R_co], call)


def _state_of(name: str, config: Config) -> AbstractContextManager[object]:
    """The run.json of the folder that a command writes, if it writes one."""
    out = getattr(config, "out", None)
    return nullcontext() if out is None or config.out_is_file else run_state(out, name.replace("_", "-"), config)


def _required(config_type: type[Config]) -> list[str]:
    return [name for name, field in fields(config_type) if field.is_required()]


def _refuse_out_among_images(config: "Config") -> None:
    """Pictures and arrays that a stage leaves among the images would be images from then on."""
    images, out = getattr(config, "images", None), getattr(config, "out", None)
    if images is None or out is None or config.out_is_file:
        return
    folder, target = Path(images).resolve(), Path(out).resolve()
    if folder.is_dir() and folder in (target, *target.parents):
        raise MapetError(
            f"--out {out} lies in --images {images}: what is written there would be taken for images. Choose a folder outside"
        )


@contextmanager
def _naming_dead_workers() -> Iterator[None]:
    """PyTorch tells of a loader's dead process by a signal, which may interrupt any line of a stage."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise MapetError(
            f"a process that reads images died: {str(error).splitlines()[0]} If it was killed, memory may have run out: try "
            "fewer --workers. What was saved is whole: go on with --resume"
        ) from None


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """Print above a progress bar, not into it."""
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stdout)


def _show_progress() -> None:
    """Print what stages report, unless the program has set up logging of its own."""
    if int(os.environ.get("RANK", 0)):
        os.environ["TQDM_DISABLE"] = "1"  # the first process shows how far all are
    log = logging.getLogger("mapet")
    if not log.handlers and not logging.getLogger().handlers:
        handler = _Console()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
