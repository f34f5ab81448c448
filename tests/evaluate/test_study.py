"""The preference study: its page in a browser, what the page hides from participants, and the statistics."""

import base64
import io
import json
import math
import pathlib
import re
import time

import av
import numpy as np
import pytest

from jsurgery.cli import main
from jsurgery.data.video_writer import write_video
from jsurgery.errors import InputError
from jsurgery.evaluate.study import read_key, statistics, table, tally
from jsurgery.report.study_page import build_study, join
from tests.browser import CHROMIUM, Browser

FRAMES, FPS, SIZE = 9, 8, (40, 56)
PROMPTS = tuple(f"a {color} thing, <b>no. {i} & more" for i, color in enumerate(["red", "blue", "green"] * 2))


def clip(red, offset=0):
    """A red or blue clip, whose green channel is 24 times the number of the frame."""
    video = np.zeros((FRAMES, *SIZE, 3), np.uint8)
    video[..., 0 if red else 2] = 200
    video[..., 1] = (24 * (np.arange(FRAMES) + offset))[:, None, None]
    return video


@pytest.fixture
def folders(tmp_path):
    """Two folders in VBench's layout with two videos a prompt: secretA/videos are red, secretB/videos blue."""
    names = {}
    for side, red in (("a", True), ("b", False)):
        names[side] = tmp_path / f"secret{side.upper()}" / "videos"
        for prompt in PROMPTS:
            for index in range(2):
                write_video(names[side] / f"{prompt}-{index}.mp4", clip(red), FPS, {"prompt": "x"})
    dimensions = (["color"], ["overall_consistency", "aesthetic_quality"])
    entries = [{"prompt_en": prompt, "dimension": dimensions[i % 2]} for i, prompt in enumerate(PROMPTS)]
    (tmp_path / "secretA" / "full_info.json").write_text(json.dumps(entries))
    return names


def build(folders, tmp_path, *arguments):
    command = ["evaluate", "study", f"--a={folders['a']}", f"--b={folders['b']}", f"--output={tmp_path / 'study'}"]
    return main([*command, *arguments])


@pytest.fixture
def browser(tmp_path):
    if CHROMIUM is None:
        pytest.skip("NOT CHECKED in a browser: there is no Chromium here")
    browser = Browser(tmp_path)
    browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "saved"))
    yield browser
    browser.close()


def browser_errors(browser):
    return [log for log in browser.logs if "readback" not in log]  # caused by COLORS


COLORS = """["one", "two"].map((id) => {
  const canvas = document.getElementById(id);
  return [...canvas.getContext("2d").getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data];
})"""


def colors(browser):
    browser.wait(f"Math.max(...({COLORS})[0]) > 150 && ({COLORS})[0][3] === 255")
    return browser.run(COLORS)


def test_a_participant_answers_six_pairs_by_keyboard(tmp_path, folders, browser, capsys):
    assert build(folders, tmp_path, "--prompts=6") == 0
    page = pathlib.Path(capsys.readouterr().out.strip())
    browser.screen(1440, 900)
    browser.open(page)
    assert browser.run("document.getElementById('pair').hidden")
    browser.press("Enter")
    for number in range(6):
        assert browser.run("document.getElementById('place').textContent") == f"{number + 1} of 6"
        shown = colors(browser)
        red = [color[0] > color[2] for color in shown]
        assert sorted(red) == [False, True]  # one video is red, the other blue
        for _ in range(6):
            one, two = (color[1] / 24 for color in browser.run(COLORS))
            assert abs(one - two) < 0.5  # both show the same frame
            time.sleep(0.1)
        if number == 0:
            browser.wait(f"({COLORS})[0][1] > 24 * 6")
            browser.wait(f"({COLORS})[0][1] < 24 * 3")  # the videos loop
        if number == 2:
            browser.press(" ")
            time.sleep(0.3)
            still = browser.run(COLORS)
            time.sleep(0.4)
            assert browser.run(COLORS) == still
            browser.press("ArrowLeft")
            browser.press("Backspace")  # the third pair again
            assert browser.run("document.querySelector('.chosen').dataset.answer") == "one"
            assert browser.run("document.getElementById('place').textContent") == "3 of 6"
        browser.press("ArrowDown" if number == 5 else "ArrowRight" if red[1] else "ArrowLeft")
        if number == 3:
            order = browser.run("localStorage.getItem(localStorage.key(0))")
            browser.reload()
            assert browser.run("localStorage.getItem(localStorage.key(0))") == order
            assert browser.run("document.getElementById('bar').value") == 4
    browser.wait("!document.getElementById('end').hidden")
    browser.run("document.getElementById('save').click()")
    saved = tmp_path / "saved"
    deadline = time.monotonic() + 60
    while not list(saved.glob("study-*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    (answers,) = saved.glob("study-*.json")
    assert [request for request in browser.requests if not request.startswith(("file://", "data:", "blob:"))] == []
    assert {request for request in browser.requests if request.startswith("file:")} == {page.resolve().as_uri()}
    assert browser_errors(browser) == []

    report = tmp_path / "report.json"
    assert main(["evaluate", "study-results", str(answers), f"--key={page.parent / 'study.key.json'}",
                 f"--json={report}"]) == 0  # fmt: skip
    rows = json.loads(report.read_text())["rows"]
    assert {choice: rows["Total"][choice]["count"] for choice in ("a", "none", "b")} == {"a": 5, "none": 1, "b": 0}
    assert list(rows) == ["aesthetic quality", "color", "overall consistency", "Total"]
    assert rows["color"]["n"] == rows["overall consistency"]["n"] == 3
    assert f"| Total | {100 * 5 / 6:.1f}" in capsys.readouterr().out


@pytest.mark.parametrize("size", [(1440, 900), (390, 844)])
def test_every_page_fits_the_screen(tmp_path, folders, browser, size):
    assert build(folders, tmp_path, "--prompts=2") == 0
    for dark in (False, True):
        browser.screen(*size, dark)
        browser.open(tmp_path / "study" / "study.html")
        for place in ("intro", "pair", "end"):
            browser.wait(f"!document.getElementById('{place}').hidden")
            assert browser.run("document.documentElement.scrollWidth <= innerWidth")
            assert browser.run("document.documentElement.scrollHeight <= innerHeight")
            if place == "pair":
                colors(browser)
            for _ in range({"intro": 1, "pair": 2, "end": 0}[place]):
                browser.press("Enter" if place == "intro" else "ArrowDown")
        browser.run("localStorage.clear()")
    assert browser_errors(browser) == []


def test_the_page_does_not_reveal_the_sides(tmp_path, folders):
    assert build(folders, tmp_path) == 0
    text = (tmp_path / "study" / "study.html").read_text()
    data = json.loads(re.search(r'id="study">(.*?)</script>', text)[1])
    assert all(pair.keys() == {"id", "prompt", "width", "height", "offset"} for pair in data["pairs"])
    videos = dict(re.findall(r'id="video-(\w+)">([^<]*)<', text))
    assert videos.keys() == {pair["id"] for pair in data["pairs"]} and len(videos) == len(PROMPTS)
    secrets = ["secret", "videos/", "mp4", 'first":', str(tmp_path)]
    text_without_videos = re.sub(r'(?s)<script type="text/plain".*?</script>', "", text)
    script = (pathlib.Path(__file__).parents[2] / "jsurgery" / "report" / "study.js").read_text()
    assert not [word for word in secrets if word in text_without_videos.replace(script, "")]
    for video in videos.values():
        content = base64.b64decode(video)
        assert not [word for word in (b"secret", b"prompt", b"mp4", b"comment") if word in content]
    assert sorted(file.name for file in (tmp_path / "study").iterdir()) == ["study.html", "study.key.json"]
    key = read_key(tmp_path / "study" / "study.key.json")
    assert key["study"] == data["study"] and key["pairs"].keys() == videos.keys()
    for name, entry in key["pairs"].items():  # the key names the right sides
        with av.open(io.BytesIO(base64.b64decode(videos[name]))) as container:
            frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
        offset = data["pairs"][0]["offset"]
        halves = [frame[: SIZE[0], start : start + SIZE[1]].mean(axis=(0, 1)) for start in (0, offset)]
        assert [half[0] > half[2] for half in halves] == [entry["first"] == "a", entry["first"] == "b"]
        assert entry["prompt"] in PROMPTS


def test_sides_are_random(tmp_path, folders):
    drawn = set()
    for number in range(4):
        build_study(str(folders["a"]), str(folders["b"]), str(tmp_path / str(number)))
        key = read_key(tmp_path / str(number) / "study.key.json")
        drawn.add(tuple(pair["first"] for pair in key["pairs"].values()))
    assert len(drawn) > 1 and any(len(set(sides)) == 2 for sides in drawn)


def test_prompts_are_escaped(tmp_path, folders):
    assert build(folders, tmp_path) == 0
    text = (tmp_path / "study" / "study.html").read_text()
    assert "<b>" not in text and "\\u003cb\\u003eno. 1" in text


def test_joined_videos_keep_their_frames(tmp_path):
    videos = [clip(True), clip(False, offset=1)[:7]]
    for name, video in zip("ab", videos, strict=True):
        write_video(tmp_path / f"{name}.mp4", video, FPS)
    pair = join(tmp_path / "a.mp4", tmp_path / "b.mp4")
    with av.open(io.BytesIO(base64.b64decode(pair["video"]))) as container:
        assert container.streams.video[0].codec_context.name == "vp9" and container.streams.video[0].average_rate == FPS
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float)
    assert (pair["width"], pair["height"], pair["offset"]) == (SIZE[1], SIZE[0], 64) and len(frames) == 7
    for start, video in zip((0, 64), videos, strict=True):
        half = frames[:, : SIZE[0], start : start + SIZE[1]]
        assert np.abs(half - video[:7]).mean() < 4 and np.abs(half - video[:7]).max() < 16  # at the seam too


def answers_of(folder, key, participant, votes):
    """Writes a participant's export, in which `votes` (a, b or none) answer the key's pairs in order."""
    answers = []
    for (name, entry), vote in zip(key["pairs"].items(), votes, strict=False):
        answers.append(
            {"pair": name, "answer": vote if vote == "none" else "first" if vote == entry["first"] else "second"}
        )
    file = folder / f"{participant}.json"
    file.write_text(json.dumps({"study": key["study"], "participant": participant, "answers": answers}))
    return str(file)


@pytest.fixture
def key():
    dimensions = (["color"], ["color", "scene"], [])
    pairs = {f"p{i}": {"prompt": "", "dimensions": dimensions[i % 3], "first": "ab"[i % 2]} for i in range(6)}
    return {"study": "s", "a": "ours", "b": "theirs", "pairs": pairs}


def test_tally_by_dimension_and_total(tmp_path, key):
    files = [
        answers_of(tmp_path, key, "one", ["a", "b", "none", "a", "a", "a"]),
        answers_of(tmp_path, key, "two", ["b", "none"]),
    ]
    rows, participants = tally([*files, files[0]], key)  # the same export twice counts once
    counts = {name: [row[choice]["count"] for choice in ("a", "none", "b")] for name, row in rows.items()}
    assert counts == {"color": [3, 1, 2], "scene": [1, 1, 1], "Total": [4, 2, 2]} and participants == 2
    text = table(rows, key)
    assert text.splitlines()[0] == "| prompt dimension | ours % | no preference % | theirs % | n | sign test p |"
    assert "| Total | 50.0 (22 to 78) | 25.0 (7 to 59) | 25.0 (7 to 59) | 8 | 0.688 |" in text


@pytest.mark.parametrize(("a", "none", "b"), [(5, 1, 0), (174, 223, 165), (0, 4, 0), (7, 0, 7), (1, 0, 30)])
def test_sign_test_and_wilson_intervals_follow_their_definitions(a, none, b):
    """The sign test, summed over all outcomes that are not likelier, and the equation of Wilson's interval."""
    found, n = statistics(a, none, b), a + none + b
    if a + b:
        outcomes = [math.comb(a + b, k) for k in range(a + b + 1)]
        tail = sum(outcome for outcome in outcomes if outcome <= outcomes[a])
        assert found["p"] == pytest.approx(tail / 2 ** (a + b), rel=1e-9)
    else:
        assert found["p"] is None
    z = 1.959963984540054
    for name, count in (("a", a), ("none", none), ("b", b)):
        share = count / n
        for bound in found[name]["interval"]:  # (bound - share)^2 = z^2 bound (1 - bound) / n
            assert (bound - share) ** 2 == pytest.approx(z**2 * bound * (1 - bound) / n, abs=1e-9)


def test_statistics_of_the_study_of_the_paper():
    """Of 562 comparisons, 31.0, 39.7 and 29.3 %. The paper concludes that neither model is preferred."""
    found = statistics(174, 223, 165)
    assert [round(100 * found[name]["share"], 1) for name in ("a", "none")] == [31.0, 39.7]
    assert found["b"]["share"] == pytest.approx(0.293, abs=0.001) and found["p"] > 0.5


def test_a_study_without_answers_has_an_empty_table(key):
    rows, participants = tally([], key)
    assert participants == 0 and rows["Total"]["p"] is None
    assert "| Total | – | – | – | 0 | – |" in table(rows, key)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "that a study's page exported"),
        ('{"study": "s"}', "that a study's page exported"),
        ('{"study": "t", "participant": "x", "answers": []}', "of study s, found those of t"),
        ('{"study": "s", "participant": "x", "answers": [{"pair": "p9", "answer": "none"}]}', "to the key's pairs"),
        ('{"study": "s", "participant": "x", "answers": [{"pair": "p1", "answer": "a"}]}', "found 'a'"),
    ],
)
def test_a_bad_file_of_answers_is_refused(tmp_path, key, content, message):
    (tmp_path / "answers.json").write_text(content)
    with pytest.raises(InputError, match=message):
        tally([str(tmp_path / "answers.json")], key)


def test_bad_folders_and_flags_are_refused(tmp_path, folders, capsys):
    def refused(*parts):
        message = capsys.readouterr().err.splitlines()[-1]
        return message.startswith("jsurgery: ") and all(part in message for part in parts)

    assert build(folders | {"b": tmp_path / "none"}, tmp_path) == 2 and refused("--b=", "expected a folder")
    assert build(folders, tmp_path, "--seed=-1") == 2 and refused("--seed")
    (tmp_path / "empty").mkdir()
    assert build(folders | {"b": tmp_path / "empty"}, tmp_path) == 2 and refused("found none in both")
    assert main(["evaluate", "study-results", str(tmp_path / "x.json")]) == 2 and refused("study.key.json")
    assert not (tmp_path / "study").exists()
    assert build(folders, tmp_path, "--prompts=1") == 0
    capsys.readouterr()
    assert build(folders, tmp_path) == 2 and refused("a study is there already")

    odd = tmp_path / "odd"
    for name, video in (("a", clip(True)), ("b", clip(True)[:, :32])):
        write_video(odd / name / "x.mp4", video, FPS)
    assert build({side: odd / side for side in "ab"}, odd) == 2 and refused("56 x 40", "56 x 32")
    (odd / "b" / "x.mp4").write_bytes(b"no video")
    assert build({side: odd / side for side in "ab"}, odd) == 2 and refused("x.mp4", "that decodes")


def test_prompts_come_from_the_evaluation_the_metadata_or_the_file_name(tmp_path, capsys):
    """Numbered files have the prompts of their evaluation or of their metadata; other files have their names."""
    for name in ("teacher", "model"):
        for number in range(2):
            write_video(tmp_path / "evaluation" / "videos" / name / f"{number:04d}.mp4", clip(True), FPS)
        write_video(tmp_path / "evaluation" / "videos" / name / "only.mp4", clip(True), FPS)
    (tmp_path / "evaluation" / "evaluation.json").write_text(json.dumps({"prompts": ["a cat", "a dog"]}))
    write_video(tmp_path / "evaluation" / "videos" / "model" / "alone.mp4", clip(True), FPS)
    write_video(tmp_path / "evaluation" / "videos" / "model" / "0001.mp4", clip(True), FPS, {"prompt": "a wolf"})
    sides = {side: tmp_path / "evaluation" / "videos" / name for side, name in (("a", "model"), ("b", "teacher"))}
    assert build(sides, tmp_path) == 0
    key = read_key(tmp_path / "study" / "study.key.json")
    assert sorted(pair["prompt"] for pair in key["pairs"].values()) == ["a cat", "a wolf", "only"]
    assert "1 videos are in one folder only" in capsys.readouterr().err
