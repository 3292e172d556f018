"""Stage: look at a run while it goes on."""

import logging
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from mapet.recipe import Config, stage
from mapet.runs import refuse_no_run

log = logging.getLogger("mapet")


class WatchConfig(Config):
    """Options of `watch`."""

    positional: ClassVar[str | None] = "run"
    run: Path
    """Run folder of `pretrain` or `run`; it need not be there yet."""
    port: int = Field(0, ge=0, le=65535)
    """Port of 127.0.0.1 to serve on; 0 takes a free one."""


@stage
def watch(config: WatchConfig) -> None:
    """Serve a run's report to a browser on this machine, renewed while the run goes on; Ctrl-C ends it.

    Example:
      mapet watch runs/photos
      mapet watch runs/photos --port 8000
    """
    from mapet.errors import MapetError
    from mapet.files import is_free
    from mapet.reporting.live import LiveServer
    from mapet.reporting.run import RunFiles
    from mapet.stages.pretrain import PretrainConfig

    if config.run.is_file():
        raise MapetError(f"{config.run} is a file: give the run's folder")
    begins = (
        not config.run.exists() or is_free(config.run) or (config.run / "recipe.yaml").is_file()
    )  # of `run`, before it trains
    if not begins:
        refuse_no_run(config.run)
    with LiveServer(config.run, config.port, PretrainConfig) as server:
        missing = "holds no run yet" if config.run.exists() else "does not exist yet"
        there = "" if RunFiles(config.run).recipe else f", which {missing}: it is waited for"
        log.info("%s shows %s%s; Ctrl-C ends this, not the run", server.url, config.run, there)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            log.info("ended")
