"""The HTML page of one run or of several side by side, and a server that shows a training run to browsers of this machine."""

import base64
import io
import json
import logging
import secrets
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIEnvironment

from PIL import Image

from mapet import distributed
from mapet.errors import first_line
from mapet.files import write_text
from mapet.reports.metrics import History, downsample
from mapet.reports.render import render, render_macro
from mapet.reports.run import RunFiles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("mapet")
MAX_BYTES = 4_800_000
"""Bytes of a report's HTML, just under 5 MB, that figures and step-throughs are fitted to; text, tables and curves are never omitted."""
DPI = 120
"""Dots per inch of figures in the page."""
MIN_POINTS = 50
"""Points of a curve that show its course, whatever the number of runs."""
MAX_POINTS = 8_000
"""Most points of one metric's curves, of all runs of a page together."""
IMAGE_MARKUP_BYTES = 1500
"""Upper bound of the HTML around an image, with its caption twice."""
REPORT_FILE = "report.html"
PATH_OPTIONS = {"images", "out", "tokenizer", "tokens", "probe_images"}
SPEED_OPTIONS = {"resume", "device", "micro_batch_size", "log_interval"}
"""With `PATH_OPTIONS` the options that do not change what is learned: runs are not compared by them."""
FIGURE_ORDER = (
    *("token_maps", "patches_by_code", "attention_mask", "predictions"),
    *("cls_attention", "features", "neighbors", "confusion"),
)
MAX_LOSSLESS_SIDE = 64
"""Images of up to this many pixels squared are encoded losslessly, which takes few bytes."""
ENCODINGS = ((1.0, 84), (0.8, 78), (0.6, 72), (0.45, 66), (0.3, 60))
"""Scale and WebP quality of figures, tried in turn until they fit."""
ADDRESS, PORT = "127.0.0.1", 6274
HOSTS = ("localhost", ADDRESS)
"""Host names that requests may have: another name that resolves to this machine is another site's attempt to read (DNS rebinding)."""
MAX_BODY_BYTES = 1 << 20
"""Most bytes of a request's body that are read to be dropped."""
HEADERS = [
    ("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"), ("X-Frame-Options", "DENY"), ("Referrer-Policy", "no-referrer"),
]  # fmt: skip


# ---- images as data URIs


class EmbeddedImage(NamedTuple):
    """An image of the page; its size is that at which it is shown, `src` a data URI."""

    name: str
    width: int
    height: int
    src: str


def rasterize(figure: "Figure") -> Image.Image:
    """Render a matplotlib figure as an RGB image, at `DPI`."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return Image.open(file, formats=["PNG"]).convert("RGB")


def open_images(paths: Iterable[Path]) -> dict[str, Image.Image]:
    """Read the figures of a report from PNG files; a file that can't be read is skipped with a warning.

    Returns:
        Name of the file without .png -> RGB image, in the order of `FIGURE_ORDER`; other names follow.
    """
    images = {}
    for path in paths:
        try:
            with Image.open(path, formats=["PNG"]) as image:
                images[path.stem] = image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            log.warning(
                "the report omits %s: %s. Redraw it with `mapet report RUN --out NEW.html`", path, first_line(error)
            )
    return {name: images[name] for name in sorted(images, key=lambda name: [*FIGURE_ORDER, name].index(name))}


def embed_images(images: Mapping[str, Image.Image], max_bytes: int) -> list[EmbeddedImage]:
    """Encode images as data URIs at the first (best) scale and quality of `ENCODINGS` at which all fit into `max_bytes` together.

    If they don't fit even at the last one, the last images are omitted, so that fewer are returned.

    Args:
        images: name -> image; the order is kept.
        max_bytes: length of all data URIs together.

    Returns:
        The images that fit, in their order.
    """

    def embed(name: str, image: Image.Image, scale: float, quality: int) -> EmbeddedImage:
        """Resize an image by `scale` and encode it with a WebP quality (0..100)."""
        size = max(1, round(scale * image.width)), max(1, round(scale * image.height))
        scaled = image if scale == 1 else image.resize(size, Image.Resampling.LANCZOS)
        return EmbeddedImage(name, *size, image_uri(scaled, quality))

    embedded: list[EmbeddedImage] = []
    for scale, quality in ENCODINGS:
        embedded = [embed(name, image, scale, quality) for name, image in images.items()]
        if sum(len(image.src) for image in embedded) <= max_bytes:
            break
    while sum(len(image.src) for image in embedded) > max_bytes:
        embedded.pop()
    return embedded


def image_uri(image: Image.Image, quality: int = 84) -> str:
    """Encode an image as a WebP data URI, losslessly if it has at most `MAX_LOSSLESS_SIDE` squared pixels; quality is 0 to 100."""
    file = io.BytesIO()
    lossless = image.width * image.height <= MAX_LOSSLESS_SIDE**2
    image.save(file, "webp", quality=quality, method=4, lossless=lossless)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


# ---- the page


@dataclass
class RunView:
    """A run, and what its report shows of it besides the files.

    Attributes:
        files: the run's folder.
        images: name of a figure -> image, in the order in which they are shown.
        step_through: data of the viewer of single predictions, see `reports.figures.step_through`; None omits the viewer.
        notes: sentences about the report itself, e.g. what it omits.
    """

    files: RunFiles
    images: dict[str, Image.Image] = field(default_factory=dict)
    step_through: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def from_files(cls, files: RunFiles) -> "RunView":
        """Make the view of a run, with the figures and step-through in the run's folder, if `mapet run` has written them there."""
        return cls(files, open_images(files.figures()), files.step_through())


def render_page(runs: Sequence[RunView], live: bool = False) -> str:
    """Render the HTML page of one run, or of several side by side; see `page_content` for its size.

    Args:
        live: whether the page is served by `LiveServer`: its script then requests it again every two seconds.
    """
    return render("run.html", **page_content(runs, live))


def page_content(runs: Sequence[RunView], live: bool = False) -> dict[str, Any]:
    """Return the variables of the template run.html, with step-throughs and figures as far as `MAX_BYTES` leaves room for them.

    `MAX_BYTES` limits step-throughs and figures alone: text, tables and curves are never omitted, so that the page of many runs may be
    larger. If it is larger without any figure, step-throughs (viewers of single predictions) are omitted, beginning with the first run,
    until it fits. The bytes that are left are divided equally among the runs; the figures of a run are encoded smaller, and then its last
    ones omitted, until they fit into its part. The notes of a run say what is omitted.

    Args:
        runs: the runs of the page; they are not changed.
        live: whether the page is requested again while the run trains.

    Returns:
        "runs": for each run "name" (unique), "files" (`RunFiles`), "notes" (sentences), "images" (list of `EmbeddedImage`) and "data",
        which the page's scripts read as JSON: "name", "steps" (the step-through, or None), "steps_per_epoch", "curves" (metric ->
        [steps, values]); "comparison": see `compare_runs`, None for one run; "live"; "status": the line at the top of the page.
    """
    views: list[dict[str, Any]] = []
    for run, name in zip(runs, make_unique([run.files.name for run in runs]), strict=True):
        history = run.files.history
        curves = downsample_curves(history, max(MIN_POINTS, MAX_POINTS // len(runs)))
        data = {"name": name, "steps": run.step_through, "steps_per_epoch": history.steps_per_epoch, "curves": curves}
        views.append({"name": name, "files": run.files, "notes": [*run.notes], "images": [], "data": data})
    comparison = compare_runs([run.files for run in runs]) if len(runs) > 1 else None
    status = runs[0].files.status if len(runs) == 1 else ", ".join(view["name"] for view in views)
    if live:
        status = render_macro("diagnostics.md", "status", runs[0].files)
    content = {"runs": views, "comparison": comparison, "live": live, "status": status}
    bytes_left = MAX_BYTES - len(render("run.html", **content))  # for images: so far the page has none
    for view in views:
        if bytes_left < 0 and view["data"]["steps"]:
            bytes_left += len(json.dumps(view["data"]["steps"]))
            view["data"]["steps"] = None
            view["notes"].append("The step-through of this run is omitted to keep the page small.")
    for index, (run, view) in enumerate(zip(runs, views, strict=True)):
        # What is left is divided equally among this run and the runs after it.
        view["images"] = embed_images(run.images, max(0, bytes_left) // (len(views) - index))
        bytes_left -= sum(len(image.src) + IMAGE_MARKUP_BYTES for image in view["images"])
        if omitted := [*run.images][len(view["images"]) :]:
            view["notes"].append(f"Figures omitted to keep the page small: {', '.join(omitted)}.")
    return content


def downsample_curves(history: History, max_points: int) -> dict[str, list[list[float]]]:
    """Return metric -> [steps, values] of a run's recorded metrics, averaged to at most `max_points` points each.

    Steps are rounded to integers and values to six significant digits, more than a screen shows, which keeps the page small.
    """
    curves = {name: downsample(series, max_points) for name, series in history.series.items()}
    return {
        name: [[*map(round, steps)], [float(f"{value:.6g}") for value in values]]
        for name, (steps, values) in curves.items()
    }


def compare_runs(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Compare final metrics and options of runs, for tables with a column per run.

    Returns:
        "comparable": whether losses can be compared, because all runs predict the same tokens from the same patches; "metrics": a row
        [label, text of each run] for every final metric; "options": such rows for those options, images and tokenizer properties that
        differ, without paths and options of speed. '-' stands for what a run lacks.
    """
    not_compared = PATH_OPTIONS | SPEED_OPTIONS
    settings = [
        run.inputs | {name: text for name, text in run.options.items() if name not in not_compared} for run in runs
    ]
    return {
        "comparable": all(run.prediction_task == runs[0].prediction_task for run in runs),
        "metrics": _align([run.metrics for run in runs]),
        "options": [row for row in _align(settings) if len(set(row[1:])) > 1],
    }


def _align(columns: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Return a row [name, text of each column] for every name in any column; '-' where a column lacks it."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [[name, *(column.get(name, "-") for column in columns)] for name in names]


def make_unique(names: Sequence[str]) -> list[str]:
    """Return names with the repetitions of a name numbered: ['a', 'b', 'a'] gives ['a', 'b', 'a (2)']."""
    repetitions = [names[:index].count(name) for index, name in enumerate(names)]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, repetitions, strict=True)]


def write_run_report(folder: Path) -> None:
    """Write `report.html` from the files in a run's folder, replacing an earlier one; ranks other than 0 do nothing.

    No error is raised: a failure to write the report is logged as a warning, because the run's results are saved already.

    Args:
        folder: of `mapet pretrain` or `mapet run`; if the pre-training is part of a `mapet run`, the report goes into the folder of the
            latter.
    """
    if distributed.rank() > 0:
        return
    path = folder / REPORT_FILE
    try:
        files = RunFiles.open(folder)
        text = render_page([RunView.from_files(files)])
        path = files.folders[-1] / REPORT_FILE
        write_text(path, text)
    except Exception as error:
        hint = f"All else of the run is saved; write the report with `mapet report {folder} --out NEW.html`"
        log.warning("%s could not be written: %s. %s", path, error or type(error).__name__, hint)


# ---- the live page


class LiveServer(ThreadingMixIn, WSGIServer):
    """HTTP server, on 127.0.0.1, of the live page of one run: the page's script requests it again to show new metrics.

    Args:
        folder: of `mapet pretrain` or `mapet run`; it need not exist yet.
        port: TCP port to listen at; if it is in use, the system chooses a free one (see `url`).
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = PORT) -> None:
        self._run, self._lock = RunFiles(folder), threading.Lock()
        try:
            super().__init__((ADDRESS, port), _RequestHandler)
        except OSError:
            super().__init__((ADDRESS, 0), _RequestHandler)
        self.token = secrets.token_urlsafe(16)
        self.set_app(self.respond)

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_address[1]}/?token={self.token}"

    def respond(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        """Answer a WSGI request: `/` with the page of the run's files as they are now, other paths with 404, other methods with 405.

        A request whose Host header (of its environ) is not in `HOSTS` gets 403: it comes from another site whose name resolves to this
        machine (DNS rebinding). So does one without the token of `url`: it comes from another user or program of this machine. A body is
        read, up to `MAX_BODY_BYTES`, and dropped, as the connection would otherwise be reset before the answer has arrived.

        Args:
            environ, start_response: as in PEP 3333.

        Returns:
            The body, UTF-8.
        """
        host, status, kind = environ.get("HTTP_HOST", ""), "200 OK", "text/html"
        length = environ.get("CONTENT_LENGTH") or "0"
        environ["wsgi.input"].read(min(int(length), MAX_BODY_BYTES) if length.isdecimal() else 0)
        token = "".join(parse_qs(environ.get("QUERY_STRING", "")).get("token", []))
        if host.rpartition("@")[2].partition(":")[0] not in HOSTS:
            status, kind, text = (
                "403 Forbidden",
                "text/plain",
                f"This host name is refused: open the address at {ADDRESS} that mapet printed\n",
            )
        elif not secrets.compare_digest(token.encode(), self.token.encode()):
            status, kind, text = (
                "403 Forbidden",
                "text/plain",
                "The token is missing: open the whole address that mapet printed\n",
            )
        elif environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            status, kind, text = "405 Method Not Allowed", "text/plain", "The page can only be read: use GET\n"
        elif environ["PATH_INFO"] != "/":
            status, kind, text = "404 Not Found", "text/plain", f"Not found: the only page is {self.url}\n"
        else:
            with self._lock:  # requests are answered in threads, and share the files
                self._run.refresh()
                text = render_page([RunView.from_files(self._run)], live=True)
        start_response(status, [("Content-Type", f"{kind}; charset=utf-8"), *HEADERS])
        return [text.encode()]

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore a browser that disconnects before it has its answer."""


class _RequestHandler(WSGIRequestHandler):
    timeout = 60

    def log_message(self, format: str, *values: object) -> None:
        """Log nothing: the terminal is the user's."""
