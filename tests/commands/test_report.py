"""`mapet report` on a real run, as a file and served, through the command line and in a real browser."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

import mapet
from mapet.cli import main
from mapet.reports.page import LiveServer
from mapet.run_state import RunState

FIGURES = [
    "token_maps",
    "patches_by_code",
    "attention_mask",
    "predictions",
    "cls_attention",
    "features",
    "neighbors",
    "confusion",
]


def data_of(html):
    (result,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, flags=re.S)
    return json.loads(result)


def longer(run, folder):
    """A copy of a run with the metrics of a longer one."""
    shutil.copytree(run, folder)
    lines = [
        {
            "step": 10 * i, "epoch": i, "loss": 3.5 - i / 60, "unigram_entropy": 3.4, "token_accuracy": i / 200, "majority_token_accuracy": 0.1,
            "grad_norm": 1.0, "skipped_steps": 0, "images_per_second": 400.0, "data_time_fraction": 0.05, "lr": 1e-3 * (1 - i / 100),
        }
        for i in range(1, 101)
    ]  # fmt: skip
    lines += [{"step": 10 * i, "probe/logistic": i / 200, "probe/knn": i / 300} for i in (20, 40, 60, 80, 100)]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["step"]))
    )
    return folder


@pytest.fixture(scope="module")
def run(run_dir, tmp_path_factory):
    return longer(run_dir, tmp_path_factory.mktemp("long") / "a")


@pytest.fixture(scope="module")
def report(run, digits, tmp_path_factory):
    """The report of a run, its figures of labeled images."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    args = [
        "report",
        run,
        "--out",
        out,
        "--images",
        digits / "test",
        "--device",
        "cpu",
    ]
    assert main([str(arg) for arg in args]) == 0
    return out


def test_report_of_a_run(report):
    html = report.read_text()
    (run,) = data_of(html)["runs"]
    assert "<dt>images</dt><dd>288 images in " in html
    assert "<dt>teacher</dt><dd>pixels (label-free)</dd>" in html
    assert re.findall(r"<figure class=\"figure\"><h3>(.*?)</h3>", html) == [
        name.replace("_", " ") for name in sorted(FIGURES, key=lambda name: name not in ("predictions", "neighbors"))
    ]  # those of the first screen, then the others
    assert len(run["curves"]["loss"][0]) == 100 and len(run["curves"]["probe/logistic"][0]) == 5
    assert report.stat().st_size < 1_000_000


def test_step_through_is_what_the_model_predicts(report):
    """Token ids are those of the tokenizer; each masked patch has a prediction, in the permuted order."""
    (run,) = data_of(report.read_text())["runs"]
    steps = run["steps"]
    assert (steps["grid"], steps["num_masked"], steps["attends_to_targets"], steps["attends_to_positions"]) == (
        [4, 4],
        12,
        True,
        True,
    )
    assert len(steps["images"]) == 6
    for image in steps["images"]:
        assert sorted(image["order"]) == list(range(16))
        hidden = [image["tokens"][patch] for patch in image["order"][4:]]
        assert len(image["predicted"]) == 12
        for predicted, true, sure, chance in zip(
            image["predicted"], hidden, image["sure"], image["chance"], strict=True
        ):
            assert chance <= sure and (predicted != true or chance == sure)
        sources = [image[name] for name in ("src", "true_src", "colors_src", "predicted_src")]
        assert all(source.startswith("data:image/webp;base64,") for source in sources)


def test_several_runs_without_figures(run, run_dir, tmp_path, capsys):
    args = ["report", run, run_dir, "--out", tmp_path / "r.html", "--no-figures"]
    assert main([str(arg) for arg in args]) == 0
    html = (tmp_path / "r.html").read_text()
    assert len(data_of(html)["runs"]) == 2 and "None but names of folders." in html
    assert main(["report", str(run), "--run", str(run), "--out", str(tmp_path / "s.html")]) == 2
    assert f"'{run}' and --run are mutually exclusive" in capsys.readouterr().err
    (tmp_path / "report.yaml").write_text(
        json.dumps({"run": [str(run)], "out": str(tmp_path / "t.html"), "figures": False})
    )
    assert main(["report", str(tmp_path / "report.yaml")]) == 0
    assert len(data_of((tmp_path / "t.html").read_text())["runs"]) == 1


def test_without_its_images_a_report_has_curves_and_says_so(run, tmp_path):
    out = mapet.report(run=run, out=tmp_path / "r.html", images=tmp_path / "gone")
    html = out.read_text()
    assert '<figure class="figure">' not in html and re.search("Note: No new figures: .*gone", html)


def test_serving_ends_cleanly(tmp_path):
    """Ctrl-C ends it with one line and exit code 0."""
    command = [sys.executable, "-m", "mapet", "report", str(tmp_path / "not-yet"), "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        with urllib.request.urlopen(line.split()[0], timeout=20) as answer:
            assert data_of(answer.read().decode())["live"] is True
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert (process.returncode, rest, errors) == (0, "the server has stopped\n", "")


# ---- in a browser: pip install selenium; apt-get install chromium chromium-driver


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    driver = shutil.which("chromedriver")
    if driver is None or not (shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("neither Chromium nor its driver is installed")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    result = webdriver.Chrome(options=options, service=webdriver.chrome.service.Service(driver))
    result.set_script_timeout(60)
    yield result
    result.quit()


@pytest.fixture(params=[(1280, 900), (375, 800)], ids=["desktop", "phone"])
def screen(browser, request):
    """The browser at a width; a page may log nothing, request no other server, and not scroll sideways."""
    width, height = request.param
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    yield browser
    assert [line for line in browser.get_log("browser") if "favicon" not in line["message"]] == []
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requested = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in requested if not url.startswith(("file:", "data:", "http://127.0.0.1:"))] == []


def shown_range(browser):
    """Return the range in the first chart's label: 'steps 10 to 1,000'."""
    label = browser.execute_script("return document.querySelector('.chart .plot').ariaLabel")
    result = re.search(r"(?:step|epoch)s [\d.,]+ to [\d.,]+", label)
    return result and result[0].rstrip(".")


def num_lines(browser):
    """Return the lines of the first chart's graph."""
    return browser.execute_script("return charts.charts[0].plot.series.slice(1).filter(one => one.show).length")


def text(browser, selector):
    """Return the text of an element now: a live page may reload at any moment."""
    return browser.execute_script("return document.querySelector(arguments[0])?.innerText || ''", selector)


def pixels(browser, caption):
    """Return the pixels of a canvas of the step-through, as one string."""
    figures = "[...document.querySelectorAll('#steps figure')]"
    canvas = f"{figures}.find(f => f.textContent.startsWith(arguments[0])).querySelector('canvas')"
    return browser.execute_script(f"return {canvas}.toDataURL()", caption)


@pytest.mark.slow
def test_curves_in_a_browser(screen, report):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    screen.get(report.as_uri())
    chart = screen.find_element(By.CSS_SELECTOR, ".chart .plot")
    readout = screen.find_element(By.CSS_SELECTOR, ".readout")
    screen.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    whole = shown_range(screen)
    width = chart.size["width"]
    ActionChains(screen).move_to_element(chart).perform()
    assert re.match(r"Step \d+: loss [\d.]+", readout.text)
    drag = ActionChains(screen).move_to_element_with_offset(chart, int(-width * 0.1), 0).click_and_hold()
    drag.move_by_offset(int(width * 0.2), 0).release().perform()
    zoomed = shown_range(screen)
    assert zoomed != whole
    chart.send_keys("+")
    assert shown_range(screen) != zoomed
    chart.send_keys(Keys.ESCAPE)
    assert shown_range(screen) == whole
    screen.execute_script(
        "arguments[0].dispatchEvent(new WheelEvent('wheel', {deltaY: -100, clientX: 200, cancelable: true}))", chart
    )
    assert shown_range(screen) != whole
    screen.find_element(By.XPATH, "//button[text()='Reset zoom']").click()
    assert shown_range(screen) == whole
    chart.send_keys(Keys.END)
    assert readout.text.startswith("Step 1,000: loss 1.833")
    chart.send_keys(Keys.HOME)
    assert readout.text.startswith("Step 10: loss 3.483")
    chart.send_keys(Keys.ARROW_RIGHT)
    assert readout.text.startswith("Step 20: loss 3.467")
    assert num_lines(screen) == 2
    screen.find_element(By.XPATH, "//label[contains(., 'unigram baseline')]").click()
    assert num_lines(screen) == 1 and "unigram baseline" not in readout.text


@pytest.mark.slow
def test_step_through_and_colors_in_a_browser(screen, report):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    screen.get(report.as_uri())
    sentence, slider = (
        screen.find_element(By.CSS_SELECTOR, f"#steps {one}") for one in (".sentence", "input[type=range]")
    )
    assert sentence.text.startswith("4 patches are given; 12 are to be predicted")
    empty = pixels(screen, "Predicted")
    screen.find_element(By.CSS_SELECTOR, "button[aria-label='One patch on']").click()
    assert sentence.text.startswith("Patch 1 of 12")
    one = pixels(screen, "Predicted")
    assert one != empty
    slider.send_keys(Keys.ARROW_RIGHT)
    assert sentence.text.startswith("Patch 2 of 12") and pixels(screen, "Predicted") != one
    slider.send_keys(Keys.END)
    assert sentence.text.startswith("Patch 12 of 12")
    assert not screen.find_element(By.CSS_SELECTOR, "button[aria-label='One patch on']").is_enabled()
    screen.find_element(By.CSS_SELECTOR, "button[aria-label='One patch back']").send_keys(Keys.ARROW_LEFT)
    assert sentence.text.startswith("Patch 11 of 12")
    paper = "return getComputedStyle(document.body).backgroundColor"
    light = screen.execute_script(paper)
    screen.find_element(By.ID, "theme").click()
    assert screen.execute_script(paper) != light
    screen.find_element(By.ID, "theme").click()
    assert screen.execute_script(paper) == light
    assert screen.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    controls = "[...document.querySelectorAll('button, select, input, img, .plot, canvas:not(.plot canvas)')]"
    named = "e.ariaLabel || e.alt || e.textContent.trim() || e.closest('label')"
    unnamed = f"return {controls}.filter(e => !({named})).length"
    assert screen.execute_script(unnamed) == 0


@pytest.mark.slow
def test_comparison_in_a_browser(screen, run, run_dir, tmp_path):
    from selenium.webdriver.common.by import By

    out = mapet.report(run=[run, run_dir], out=tmp_path / "r.html", figures=False)
    screen.get(out.as_uri())
    assert num_lines(screen) == 4
    screen.find_element(By.CSS_SELECTOR, "[aria-label=Runs] input").click()
    assert num_lines(screen) == 2
    screen.find_element(By.CSS_SELECTOR, "#runs summary").click()
    until(lambda: text(screen, "#facts-0 dl"))  # it is filled when it has opened, a moment later


@pytest.mark.slow
def test_live_page_grows_and_keeps_its_zoom(screen, run, tmp_path):
    from selenium.webdriver.common.by import By

    folder = tmp_path / "live"
    with LiveServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            screen.get(server.url)
            until(lambda: "no run in" in text(screen, "#status"))
            training = RunState.read(run).model_copy(update={"status": "running", "pid": os.getpid()})
            shutil.copytree(run, folder, ignore=shutil.ignore_patterns("backbone", "run.json"))
            training.write(folder)
            until(lambda: "Running" in text(screen, "#status") and shown_range(screen))
            assert text(screen, "#metrics h2") == "Metrics so far" and " left." in text(screen, "#status")
            screen.find_element(By.XPATH, "//button[@aria-label='Zoom in']").click()
            zoomed = shown_range(screen)
            with (folder / "metrics.jsonl").open("a") as file:
                file.write('{"step": 1010, "epoch": 101, "loss": 1.234}\n{"step": 1020, "epo')
            until(lambda: "1.234" in text(screen, ".readout"))
            assert shown_range(screen) == zoomed
            until(lambda: "1.234" in text(screen, "#metrics"))
            (folder / "backbone").mkdir()
            until(lambda: text(screen, "#metrics h2") == "Final metrics" and "Finished" in text(screen, "#status"))
        finally:
            screen.get("about:blank")
            server.shutdown()
            thread.join()


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come to pass"
        time.sleep(0.2)
