"""The page of a run while it goes on, served to browsers of this machine alone."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shlex import quote
from typing import Any
from urllib.parse import parse_qs, urlsplit

from mapet.reports.page import RunView, page
from mapet.reports.render import render_part, span
from mapet.reports.run import RunFiles

ADDRESS, PORT = "127.0.0.1", 6274
HOSTS = ("localhost", ADDRESS)
"""What a browser may have asked for. Any other name that leads here is a page elsewhere trying to read (DNS rebinding)."""
MOST_RECORDS = 20_000
"""Of one answer; the browser asks for the rest at once."""


class RunFollower:
    """Reads a run folder again and again, each time what is new; the folder need not be there yet."""

    def __init__(self, folder: Path) -> None:
        self._lock = threading.Lock()
        self._files = RunFiles(folder)
        self._shown: tuple[Any, dict[str, str]] = None, {}

    def page(self) -> str:
        with self._lock:
            self._files.refresh()
            return page([RunView.saved(self._files)], live=True)

    def updates(self, generation: int | None, have: int) -> dict[str, Any]:
        """Return records from number `have` on, if the reader's are of this generation, else from the first, and what changed."""
        with self._lock:
            files, history = self._files, self._files.history
            files.refresh()
            first = have if generation == history.generation and 0 <= have <= len(history.records) else 0
            records = history.records[first : first + MOST_RECORDS]
            state = history.generation, len(history.records), files.state, files.recipe, files.status, files.probe
            if state != self._shown[0]:
                run = files.data() | {"notes": []}
                self._shown = (
                    state,
                    {part: render_part("macros.html", f"{part}_now", run) for part in ("facts", "warnings", "metrics")},
                )
            return {
                "generation": history.generation,
                "first": first,
                "records": records,
                "more": first + len(records) < len(history.records),
                "status": _status(files),
                "started": bool(files.recipe),
                "steps_per_epoch": history.steps_per_epoch,
                "sections": self._shown[1],
            }


def _status(files: RunFiles) -> str:
    if not files.recipe:
        return f"Waiting: no run in {files.given} yet."
    if files.finished and files.figures():
        return "Finished. Reload this page for its figures."
    if files.finished:
        return f"Finished. `mapet report {quote(str(files.given))} --out NEW.html` adds figures."
    if files.ended_early:
        return files.status
    if not files.history.records:
        return "Started; nothing recorded yet."
    left = files.seconds_left if files.status == "running" else None
    ends = f", about {span(left)} left" if left is not None else ""
    return f"{files.status.capitalize()}; last figures {span(files.age)} ago{ends}."


class LiveServer(ThreadingHTTPServer):
    """Serves one run on 127.0.0.1.

    Args:
        port: another one is taken where this is not free.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = PORT) -> None:
        self.follower = RunFollower(folder)
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError:
            super().__init__((ADDRESS, 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    server: LiveServer

    def do_GET(self) -> None:
        url, follower = urlsplit(self.path), self.server.follower
        if self.headers.get("Host", "").rpartition("@")[2].partition(":")[0] not in HOSTS:
            self._answer(403, "text/plain", "This server answers to localhost alone.\n")
        elif url.path == "/":
            self._answer(200, "text/html", follower.page())
        elif url.path == "/updates":
            asked = {name: values[0] for name, values in parse_qs(url.query).items()}
            updates = follower.updates(_whole(asked.get("generation", "")), _whole(asked.get("have", "")) or 0)
            self._answer(200, "application/json", json.dumps(updates))
        else:
            self._answer(404, "text/plain", "There is / and /updates.\n")

    def _answer(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
        }
        headers |= {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"}
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *values: Any) -> None:
        """Nothing: the terminal is the user's."""


def _whole(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None
