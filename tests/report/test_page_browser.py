"""The report in headless Chromium: synchronous clips, the slider, tooltips; and no request to the network."""

import json
import time

import numpy as np
import pytest

from jsurgery.data.video_writer import write_video
from jsurgery.report.page import write_report
from jsurgery.report.run_files import read_run
from jsurgery.surgery.knapsack import solve
from jsurgery.surgery.plan import block_costs
from tests.browser import CHROMIUM, Browser
from tests.report.made_up_run import HOSTILE, MODEL, MODELS, tiny_config, write_made_by, write_run

GREEN_STEP, FRAMES = 24, 9  # each frame has more green than the frame before
COLORS = """["left", "right", "difference"].map((id) => {
  const canvas = document.getElementById(id);
  return [...canvas.getContext("2d").getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data];
})"""

# Elements that reach beyond the screen or would have to be scrolled sideways, and texts wider than their cells.
OVERFLOWING = """() => [...document.querySelectorAll("main *")].filter((element) => {
  const style = getComputedStyle(element);
  const wide = element.clientWidth > 0 && element.scrollWidth > element.clientWidth + 1;
  const text = element.matches("td, th, dd, dt, li, p, h1, h2, h3, figcaption, label");
  return element.getBoundingClientRect().right > innerWidth + 0.5 || (wide && (text || style.overflowX !== "visible"));
}).map((element) => element.tagName + "." + element.className)"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Clips whose green encodes the number of the frame; only those of the fine-tuned model have red."""
    if CHROMIUM is None:
        pytest.skip("NOT CHECKED in a browser: there is no Chromium here")
    folder = tmp_path_factory.mktemp("browser")
    config = tiny_config(folder / "teacher")
    write_run(folder / "run", config, videos=0)
    for name in MODELS:
        for number in range(2):
            clip = np.zeros((FRAMES, 40, 56, 3), np.uint8)
            clip[..., 1] = (GREEN_STEP * np.arange(FRAMES))[:, None, None]
            clip[..., 0] = 40 if name == "finetuned" else 0
            clip[..., 2] = 200 * number
            write_video(folder / "run" / "evaluation" / "videos" / name / f"{number:04d}.mp4", clip, 8)
    (folder / "run" / "evaluation" / "videos" / "distilled" / "0001.mp4").unlink()
    write_made_by(folder / "run")
    write_report(config, folder / "run")
    return folder / "run"


@pytest.fixture
def browser(run, tmp_path):
    browser = Browser(tmp_path)
    browser.screen(1440, 900)
    browser.open(run / "report.html")
    yield browser
    assert [log for log in browser.logs if "readback" not in log] == []  # a warning caused by these tests
    assert [request for request in browser.requests if not request.startswith(("file://", "data:"))] == []
    browser.close()


def set_value(browser, selector, value, event):
    code = f"element.value = {json.dumps(value)}; element.dispatchEvent(new Event('{event}'))"
    browser.run(f"(() => {{ const element = document.querySelector('{selector}'); {code} }})()")


def test_clips_play_in_sync_and_follow_the_frame_slider(browser):
    browser.wait(f"({COLORS})[0][3] === 255")
    seen = set()
    deadline = time.monotonic() + 60
    while len(seen) < 4 and time.monotonic() < deadline:
        left, right, difference = browser.run(COLORS)
        assert abs(left[1] - right[1]) < GREEN_STEP / 2 and difference[1] < 4 * GREEN_STEP / 2  # the same frame
        assert left[0] < 20 and right[0] > 25 and 80 < difference[0] < 240  # the difference of 40, amplified four times
        seen.add(round(left[1] / GREEN_STEP))
    assert len(seen) >= 4  # they play
    for frame in (7, 2):
        set_value(browser, "#player [type=range]", frame, "input")
        browser.wait(f"Math.abs(({COLORS})[0][1] - {GREEN_STEP * frame}) < {GREEN_STEP // 2}")
        browser.wait(f"document.querySelector('#player output').textContent === 'frame {frame + 1} of {FRAMES}'")
    assert browser.run("document.querySelector('#player button').textContent") == "Play"
    still = browser.run(COLORS)
    time.sleep(0.4)
    assert browser.run(COLORS) == still


def test_choosing_prompts_and_models(browser):
    browser.wait(f"({COLORS})[0][3] === 255")
    assert browser.run("document.querySelector('.prompts span').textContent") == HOSTILE
    browser.run("document.querySelectorAll('.prompts input')[1].click()")
    browser.wait(f"({COLORS})[0][2] > 150")
    set_value(browser, "#right-model", "teacher", "change")
    browser.wait(f"Math.max(...({COLORS})[2].slice(0, 3)) === 0")
    assert browser.run("document.getElementById('difference-note').textContent").startswith("mean 0.0")
    set_value(browser, "#right-model", "distilled", "change")
    browser.wait("document.getElementById('right-note').textContent.startsWith('This clip is missing')")
    assert browser.run(COLORS)[1][3] == 0


def test_the_slider_changes_the_plan(browser, run):
    strip = "[...document.querySelectorAll('#strip b')].map((cell) => cell.textContent)"
    own = browser.run(strip)
    assert own == ["softmax", "R8", "R4", "R8", "linear", "softmax"]
    files = read_run(run)
    costs = block_costs(files.config, MODEL)
    errors = np.insert(np.array(files.errors["velocity_errors"]), 0, 0.0, axis=1)
    of_rates = np.stack([costs.at(rate) for rate in files.config.plan.rates], axis=1)
    named = ["softmax", "R2", "R4", "R8", "linear"]
    shown = []
    for budget in (45.0, 60.0, 85.0):
        set_value(browser, "#budget-slider", budget, "input")
        best = solve(errors, of_rates, budget / 100 * costs.teacher)
        assert browser.run(strip) == [named[i] for i in best.indices]
        assert browser.run("document.getElementById('budget-error').textContent") == f"{best.error:.4f}"
        shown.append(browser.run("document.querySelector('#front .mark').style.left"))
        differ = sum(a != named[b] for a, b in zip(own, best.indices, strict=True))
        assert browser.run("document.querySelectorAll('#strip .differs').length") == differ
    assert len(set(shown)) == 3
    browser.run("document.getElementById('own-plan').click()")
    assert browser.run(strip) == own


def test_tooltips_show_numbers(browser, run):
    error = read_run(run).errors["errors"][0][0]
    tip = "document.getElementById('tip')"
    for target, text in (("[data-tip^='Block 0, R2']", f"error {error:.4f}"), ("#training .plot", "R2: ")):
        found = f"document.querySelector({json.dumps(target)})"
        browser.run(f"{found}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = browser.run(f"{found}.getBoundingClientRect().toJSON()")
        time.sleep(0.3)  # the scrolling hides a tooltip
        for step in range(2):
            x, y = box["x"] + box["width"] / 2 + step, box["y"] + box["height"] / 2
            browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        browser.wait(f"!{tip}.hidden && {tip}.textContent.includes('{text}')")


def test_nothing_is_cut_or_scrolls_sideways_on_a_phone(browser, run):
    browser.screen(390, 844, dark=True)
    browser.open(run / "report.html")
    assert browser.run("document.documentElement.scrollWidth") == 390
    assert browser.run(f"({OVERFLOWING})()") == []
    browser.run("document.querySelector('h1').style.whiteSpace = 'nowrap'")
    assert browser.run(f"({OVERFLOWING})()") == ["H1."], "the control is not found"


def test_a_rate_has_one_colour_in_all_charts(browser):
    colours = """(legend) => Object.fromEntries([...document.querySelectorAll(legend + " .line")].map((line) =>
      [line.textContent.split(/[ ,]/)[0], getComputedStyle(line.querySelector("i")).backgroundColor]))"""
    front = browser.run(f"({colours})('.front .legend')")
    training = browser.run(f"({colours})('#training .legend')")
    rates = {"R2", "R4", "R8", "linear"}
    assert {rate: training[rate] for rate in rates} == {rate: front[rate] for rate in rates}
    assert len({training[rate] for rate in rates}) == 4


def test_labels_of_charts_end_within_the_printed_page(browser, run):
    browser.screen(718, 900)  # A4 without its margins, beyond which nothing is printed
    browser.send("Emulation.setEmulatedMedia", media="print")
    browser.open(run / "report.html")
    right = "Math.max(...[...document.querySelectorAll('.plot .x')].map((x) => x.getBoundingClientRect().right))"
    edge = browser.run("document.querySelector('main').getBoundingClientRect().right")
    assert edge == 718 and edge - 20 < browser.run(right) <= edge
    browser.run("document.querySelectorAll('.plot').forEach((plot) => { plot.style.marginRight = '6px'; })")
    assert browser.run(right) > edge, "the control is not found"


@pytest.mark.parametrize("width, height", [(390, 844), (1440, 900)])
def test_the_clips_and_their_number_are_on_the_first_screen(browser, run, width, height):
    browser.screen(width, height)
    browser.open(run / "report.html")
    browser.wait(f"({COLORS})[0][3] === 255")
    for part in ("#left", "#right", ".verdict strong"):
        box = browser.run(f"document.querySelector('{part}').getBoundingClientRect().toJSON()")
        assert box["top"] > 0 and box["bottom"] < height and box["left"] >= 0 and box["right"] <= width, part
    assert box["top"] > browser.run("document.querySelector('#left').getBoundingClientRect().bottom")
