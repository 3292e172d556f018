"""The page of one run or of several side by side; and its server for a run that goes on, for browsers of this machine alone."""

import base64
import io
import json
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from PIL import Image

from mapet import distributed
from mapet.files import write_text
from mapet.reports.metrics import thinned
from mapet.reports.render import render, render_part
from mapet.reports.run import RunFiles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("mapet")
MOST_BYTES = 4_800_000
"""A report is under 5 MB, however many runs and images it shows."""
MOST_POINTS = 8_000
"""Points of one metric's curves, of all runs together."""
IMAGE_MARKUP = 1500
"""Bytes of HTML around an image, its caption twice, at most."""
NAME = "report.html"
"""What a run folder's own report is called."""
WHERE = {"images", "out", "tokenizer", "tokens", "probe_images"}
"""Options that say where, not what; images are told with their number."""
HOW_FAST = {"resume", "device", "micro_batch_size", "log_interval"}
ORDER = (
    *("token_maps", "patches_by_code", "nearest_codes", "code_usage", "attention_mask", "predictions"),
    *("cls_attention", "features", "neighbors", "confusion"),
)
"""Names of figures in the order of the report."""
TINY = 64
"""Images of up to so many pixels squared are kept as they are."""
STEPS = ((1.0, 84), (0.8, 78), (0.6, 72), (0.45, 66), (0.3, 60))
"""Scale and WebP quality, tried in turn."""
ADDRESS, PORT = "127.0.0.1", 6274
HOSTS = ("localhost", ADDRESS)
"""What a browser may have asked for. Any other name that leads here is a page elsewhere trying to read (DNS rebinding)."""
MOST_RECORDS = 20_000
"""Of one answer; the browser asks for the rest at once."""


# ---- raster images: data URIs that together stay below a size


class ReportImage(NamedTuple):
    """A raster image of a report."""

    name: str
    image: Image.Image


class EmbeddedImage(NamedTuple):
    """An image as the page has it; `src` is a data URI."""

    name: str
    width: int
    height: int
    src: str


def rasterize(name: str, figure: "Figure") -> ReportImage:
    """Make an image of a figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return ReportImage(name, Image.open(file).convert("RGB"))


def open_images(paths: Iterable[Path]) -> list[ReportImage]:
    """Read PNG files in the order of the report, with a warning for one that can't be read."""
    found = []
    for path in paths:
        try:
            with Image.open(path) as image:
                found.append(ReportImage(path.stem, image.convert("RGB")))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            log.warning("the report leaves out %s: %s", path, error)
    return sorted(found, key=lambda image: [*ORDER, image.name].index(image.name))


def embed_images(images: Sequence[ReportImage], budget: int) -> tuple[list[EmbeddedImage], list[str]]:
    """Encode images as large as `budget` bytes allow, leaving out the last first.

    Returns:
        images for the page, names of those left out.
    """
    kept: list[EmbeddedImage] = []
    for scale, quality in STEPS:
        kept = []
        for name, image in images:
            width, height = (max(1, round(scale * side)) for side in image.size)
            shrunk = image if scale == 1 else image.resize((width, height), Image.Resampling.LANCZOS)
            kept.append(EmbeddedImage(name, width, height, image_uri(shrunk, quality)))
        if sum(len(one.src) for one in kept) <= budget:
            break
    while sum(len(one.src) for one in kept) > budget:
        kept.pop()
    return kept, [name for name, _ in images[len(kept) :]]


def image_uri(image: Image.Image, quality: int = 84) -> str:
    """Encode an image as WebP; exact where it is so small that this takes little."""
    file = io.BytesIO()
    image.save(file, "webp", quality=quality, method=4, lossless=image.width * image.height <= TINY**2)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


# ---- the page


@dataclass
class RunView:
    """A run and what its report shows of it.

    Attributes:
        step_through: see the function of that name; None leaves it out.
        notes: what a reader should know about the report itself.
    """

    files: RunFiles
    images: list[ReportImage] = field(default_factory=list)
    step_through: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def saved(cls, files: RunFiles) -> "RunView":
        """Show what `run` left in its folder."""
        return cls(files, open_images(files.figures()), files.step_through())


def page(runs: Sequence[RunView], live: bool = False) -> str:
    """Render HTML of at most `MOST_BYTES`; a live page asks its server for the curves."""
    return render("run.html", **page_content(runs, live))


def page_content(runs: Sequence[RunView], live: bool = False) -> dict[str, Any]:
    """Gather what the page shows; where it is too much, leave out the step-through first, then shrink images."""
    views = []
    for run, name in zip(runs, distinct([run.files.name for run in runs]), strict=True):
        drawn = {"name": name, "steps": run.step_through, "steps_per_epoch": run.files.history.steps_per_epoch}
        drawn["curves"] = {} if live else curves(run.files, max(50, MOST_POINTS // len(runs)))
        views.append(run.files.data() | {"name": name, "notes": list(run.notes), "images": [], "drawn": drawn})
    content = {"runs": views, "comparison": comparison(views) if len(views) > 1 else None, "live": live}
    room = MOST_BYTES - len(render("run.html", **content))
    for view in views:
        if room < 0 and view["drawn"]["steps"]:
            room += len(json.dumps(view["drawn"]["steps"]))
            view["drawn"]["steps"] = None
            view["notes"].append("The step-through of this run is left out to keep the page small.")
    for number, (run, view) in enumerate(zip(runs, views, strict=True)):
        view["images"], left_out = embed_images(run.images, max(0, room) // (len(views) - number))
        room -= sum(len(image.src) + IMAGE_MARKUP for image in view["images"])
        if left_out:
            view["notes"].append(f"Figures left out to keep the page small: {', '.join(left_out)}.")
    return content


def curves(files: RunFiles, points: int) -> dict[str, list[list[float]]]:
    """Return metric -> [steps, values], rounded to six digits, more than a screen shows."""

    def short(value: float) -> float:
        return int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.6g}")

    series = {name: thinned(files.history[name], points) for name in files.history.names}
    return {name: [[short(value) for value in column] for column in columns] for name, columns in series.items()}


def comparison(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compare final metrics and the options in which runs differ: rows of [name, a text for each run]; and losses, if they can be."""

    def rows(columns: Sequence[Mapping[str, str]]) -> list[list[str]]:
        names = dict.fromkeys(name for column in columns for name in column)
        return [[name, *(column.get(name, "-") for column in columns)] for name in names]

    made_of = [
        run["data"] | {name: text for name, text in run["config"].items() if name not in WHERE | HOW_FAST}
        for run in runs
    ]
    return {
        "comparable": all(run["predicts"] == runs[0]["predicts"] for run in runs),
        "metrics": rows([run["metrics"] for run in runs]),
        "options": [row for row in rows(made_of) if len(set(row[1:])) > 1],
    }


def distinct(names: Sequence[str]) -> list[str]:
    """Tell equal names apart: further ones get a number."""
    before = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, before, strict=True)]


def write_run_report(folder: Path) -> None:
    """Write `report.html` of a run from what lies in its folder, in place of an earlier one; an error is a warning.

    A pre-training that is part of a `mapet run` has the one report of that.
    """
    if distributed.rank() > 0:
        return
    path = folder / NAME
    try:
        files = RunFiles.open(folder)
        text = page([RunView.saved(files)])
        path = files.around[-1] / NAME
        write_text(path, text)
    except Exception as error:  # whatever it is, the run itself is complete
        log.warning("%s could not be written: %s", path, error or type(error).__name__)


# ---- while the run goes on


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
                parts = ("facts", "warnings", "metrics")
                self._shown = state, {part: render_part("macros.html", f"{part}_now", run) for part in parts}
            return {
                "generation": history.generation,
                "first": first,
                "records": records,
                "more": first + len(records) < len(history.records),
                "status": render_part("advice.md", "status", files),
                "started": bool(files.recipe),
                "steps_per_epoch": history.steps_per_epoch,
                "sections": self._shown[1],
            }


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
