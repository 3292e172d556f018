"""Stage: look at a run while it goes on."""

import logging

from mapet.commands.command import command
from mapet.config.watch import WatchConfig
from mapet.run_state import check_is_pretraining, command_of

log = logging.getLogger("mapet")


@command(WatchConfig)
def watch(config: WatchConfig) -> None:
    """Serve a run's report to a browser on this machine, renewed while the run goes on; Ctrl-C ends it.

    Example:
      mapet watch runs/photos
      mapet watch runs/photos --port 8000
    """
    from mapet.errors import MapetError
    from mapet.files import is_free
    from mapet.reports.live import LiveServer
    from mapet.reports.run import RunFiles

    if config.run.is_file():
        raise MapetError(f"{config.run} is a file: give the run's folder")
    begins = (
        not config.run.exists() or is_free(config.run) or command_of(config.run) in ("run", "demo")
    )  # of `run`, before it trains
    if not begins:
        check_is_pretraining(config.run)
    with LiveServer(config.run, config.port) as server:
        missing = "holds no run yet" if config.run.exists() else "does not exist yet"
        there = "" if RunFiles(config.run).recipe else f", which {missing}: it is waited for"
        log.info("%s shows %s%s; Ctrl-C ends this, not the run", server.url, config.run, there)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            log.info("ended")
