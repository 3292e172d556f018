"""Start a command again and again and kill it at random moments; print how often it was killed and how it ended.

    python -m tests.crash SEED KILLS SECONDS STAGE --OPTION ...

Each attempt is a fork of this process, which has imported all there is to import and has computed nothing, so that nearly
all of an attempt is the command's own work. `--resume` is part of the command. After KILLS kills it may run to its end.
"""

import contextlib
import importlib
import json
import os
import pkgutil
import random
import signal
import sys
import time
from pathlib import Path

import mapet
from mapet.cli import main


def attempt(argv: list[str], patience: float | None) -> int | None:
    """Exit code, or None if it was killed after `patience` seconds."""
    child = os.fork()
    if child == 0:
        os._exit(main(argv))
    deadline = None if patience is None else time.monotonic() + patience
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() > deadline:
            for process in [*descendants(child), child]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.001)


def descendants(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [below for child in map(int, children) for below in [*descendants(child), child]]


def read_one_by_one() -> None:
    """Let frozen networks take one image at a time, so that there is time to be killed in."""
    for module in list(sys.modules.values()):
        if hasattr(module, "inference_batch_size"):
            module.inference_batch_size = lambda _: 1


if __name__ == "__main__":
    seed, kills, seconds, *argv = sys.argv[1:]
    for module in pkgutil.walk_packages(mapet.__path__, "mapet."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    import torch.utils.tensorboard  # noqa: F401

    if argv[0] == "tokenize":
        read_one_by_one()

    rng = random.Random(int(seed))
    killed, code = 0, None
    while code is None:
        code = attempt(argv, rng.uniform(0, float(seconds)) if killed < int(kills) else None)
        killed += code is None
    print(json.dumps({"killed": killed, "code": code}))
    sys.exit(code)
