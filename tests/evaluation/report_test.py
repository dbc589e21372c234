"""The report in a browser: heard, switched, told apart, by pointer and by keyboard alone; and without scripts."""

import base64
import importlib.util
import io
import json
import re
import shutil

import numpy as np
import pytest
import scipy.stats
import soundfile

from audiolm_jax.evaluation import report
from audiolm_jax.evaluation.report import GENERATED, ORIGINAL, RECONSTRUCTION, Clip, Group, IntervalPlot, Table
from audiolm_jax.evaluation.statistics import Estimate

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="no Chromium (apt-get install chromium) or no playwright",
)
RATE = 16_000
BOUNDARY = 1.0


def noise_clip(title, seconds, kind=None, boundary=None):
    wave_W = np.random.default_rng().uniform(-0.5, 0.5, round(seconds * RATE))
    return Clip(title, wave_W, RATE, boundary, kind)


def speech_page():
    """Groups of an original, its reconstruction and two continuations; then one that nothing is held against."""
    groups = [
        Group(
            f"line <{number}>",
            "",
            [
                noise_clip("original", 4.0, ORIGINAL),
                noise_clip("reconstruction", 4.0, RECONSTRUCTION),
                noise_clip("continuation 1", 3.0, GENERATED, BOUNDARY),
                noise_clip("continuation 2", 3.5, GENERATED, BOUNDARY),
            ],
        )
        for number in range(2)
    ]
    groups.append(Group("unconditional", "", [noise_clip("sample", 3.0, GENERATED)]))
    plot = IntervalPlot("a measure", "steps", {name: [(1.0, Estimate(0.5, 0.4, 0.6, 9))] for name in "abc"})
    page = report.render("A report", "Noise.", [Table("Table", ["name"], [["<b>"]])], [plot], groups)
    return report.with_details(page, {"Seed": "7", "Fingerprints": {"codec": "<0123>"}})


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def report_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(speech_page())
    return path


@pytest.fixture
def opened(browser):
    """Opens a file in a browser that remembers within a test; at its end nothing was complained of or fetched."""
    context = browser.new_context(accept_downloads=True)
    complaints, requested = [], []

    def open_file(path):
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requested.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_file
    context.close()
    assert complaints == []
    assert requested and {url.partition(":")[0] for url in requested} <= {"file", "data"}


def times(page, group=0):
    """Position and whether it is heard, of each clip of a group."""
    script = "audios => audios.map(audio => [audio.currentTime, !audio.paused])"
    return page.locator(".group").nth(group).locator("audio").evaluate_all(script)


def wait_for_time(page, clip, condition):
    """Until the position of a clip of the page meets a condition, such as "> 1"."""
    page.wait_for_function(f"clip => document.querySelectorAll('audio')[clip].currentTime {condition}", arg=clip)


def heard(page, group=0):
    """The number of the one clip of a group that plays, once there is one, and its position."""
    page.wait_for_function(
        """group => {
          const found = [...document.querySelectorAll(".group")[group].querySelectorAll("audio")]
            .map((audio, index) => [index, audio.currentTime, !audio.paused]).filter(([, , playing]) => playing);
          window.found = found[0];
          return found.length === 1;
        }""",
        arg=group,
    )
    return page.evaluate("() => window.found")[:2]


@needs_browser
def test_players_load_and_pictures_are_drawn(opened, report_file):
    page = opened(report_file)
    page.wait_for_function("() => [...document.querySelectorAll('audio')].every(audio => audio.readyState >= 1)")
    durations = page.locator("audio").evaluate_all("audios => audios.map(audio => audio.duration)")
    assert durations == pytest.approx([4.0, 4.0, 3.0, 3.5] * 2 + [3.0], abs=0.01)
    for image in page.locator("img").all():
        image.scroll_into_view_if_needed()
        image.evaluate("image => image.decode()")
    widths = page.locator("img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert len(widths) == 10 and min(widths) > 300
    page.locator("summary").click()
    assert page.locator("#details dd").all_inner_texts() == ["7", '{\n  "codec": "<0123>"\n}']


@needs_browser
def test_a_click_seeks_and_the_position_moves(opened, report_file):
    page = opened(report_file)
    picture = page.locator(".picture").nth(2)
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    picture.click(position={"x": 0.25 * box["width"], "y": 20})
    assert times(page)[2] == [pytest.approx(0.75, abs=0.02), False]
    position = "() => parseFloat(document.querySelectorAll('.position')[2].style.left)"
    page.wait_for_function(f"() => ({position})() > 0")
    assert page.evaluate(position) == pytest.approx(25, abs=0.6)
    page.locator("audio").nth(2).evaluate("audio => audio.play()")
    wait_for_time(page, 2, "> 1")
    page.locator("audio").nth(2).evaluate("audio => audio.pause()")
    share = times(page)[2][0] / 3
    page.wait_for_function(f"() => Math.abs(({position})() - {100 * share}) < 0.5")
    # The boundary is marked a third of the way: green there in the picture, and nowhere else.
    page.locator("img").nth(2).evaluate("image => image.decode()")
    green_W = np.array(
        page.locator("img")
        .nth(2)
        .evaluate(
            """image => {
              const canvas = new OffscreenCanvas(image.naturalWidth, 1), context = canvas.getContext("2d");
              context.drawImage(image, 0, -4);
              const pixels = context.getImageData(0, 0, canvas.width, 1).data;
              return Array.from({length: canvas.width}, (_, x) =>
                pixels[4 * x + 3] > 200 && pixels[4 * x + 1] > 180 && pixels[4 * x] < 120);
            }"""
        )
    )
    assert green_W.any() and np.flatnonzero(green_W) / len(green_W) == pytest.approx(1 / 3, abs=0.005)


@needs_browser
def test_versions_are_switched_at_one_position(opened, report_file):
    page = opened(report_file)
    # A tenth of the speed: what the test does in between takes little of a clip.
    page.evaluate("() => document.querySelectorAll('audio').forEach(audio => { audio.playbackRate = 0.1; })")
    page.keyboard.press("1")
    wait_for_time(page, 0, "> 0.15")
    index, before = heard(page)
    assert index == 0
    page.keyboard.press("3")
    index, after = heard(page)
    assert index == 2 and before - 0.01 <= after < 2
    page.keyboard.press("x")
    index, back = heard(page)
    assert index == 0 and after - 0.01 <= back < 2
    page.keyboard.press("x")
    assert heard(page)[0] == 2
    # Four keys before the browser has told of the first start.
    page.evaluate("""() => {
      for (const key of "1234") document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
    }""")
    wait_for_time(page, 3, f"> {back}")
    assert heard(page)[0] == 3 and page.locator("figure.heard").get_attribute("data-title") == "continuation 2"
    page.keyboard.press("3")
    page.locator("audio").nth(2).evaluate("audio => { audio.currentTime = 2.5; }")
    page.keyboard.press("p")
    wait_for_time(page, 2, "< 2")
    assert heard(page)[0] == 2
    # Where the other group has the focus the keys are its own, and nothing else is heard.
    page.locator(".group").nth(1).locator(".picture").first.focus()
    page.keyboard.press("2")
    index, time = heard(page, 1)
    assert index == 1 and time < 2 and not any(playing for _, playing in times(page, 0))
    page.keyboard.press("9")
    assert heard(page, 1)[0] == 1


def tab_to(page, name):
    """Tab, from where the focus is, until a control of that name has it."""
    for _ in range(60):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            "document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent"
        )
        if focused.startswith(name):
            return
    raise AssertionError(f"no {name}")


def exported(page):
    with page.expect_download() as download:
        page.get_by_role("button", name="Save the answers").click()
    return json.loads(open(download.value.path()).read())


def answer(page, letter):
    for side in "AB":
        page.keyboard.press(side.lower())
    page.keyboard.press(f"Shift+{letter}")


@needs_browser
def test_blind_answers_are_saved_reloaded_and_exported(opened, report_file):
    page = opened(report_file)
    assert "4 pairs" in page.locator("#blind-status").inner_text()
    page.get_by_role("button", name="Start").click()
    assert page.get_by_role("button", name="A is generated").is_disabled()
    page.get_by_role("button", name="Hear A").click()
    page.get_by_role("button", name="Hear B").click()
    page.get_by_role("button", name="A is generated").click()
    answer(page, "B")
    page.keyboard.press("Shift+A")  # Neither of the third pair was heard.
    assert page.locator("#blind-status").inner_text() == "Pair 3 of 4."
    first = exported(page)

    page.reload()
    assert page.locator("#blind-status").inner_text() == "Pair 3 of 4."
    assert exported(page) == first
    answer(page, "A")
    answer(page, "A")
    found = exported(page)
    assert found["seed"] == first["seed"] and found["answers"][:2] == first["answers"]
    assert [one["answer"] for one in found["answers"]] == ["A", "B", "A", "A"]
    assert sorted((one["recording"], one["generated"]) for one in found["answers"]) == [
        (f"line <{group}>", f"continuation {number}") for group in (0, 1) for number in (1, 2)
    ]
    assert {one["against"] for one in found["answers"]} == {"reconstruction"}
    assert [one["right"] for one in found["answers"]] == [
        one["generated_was"] == one["answer"] for one in found["answers"]
    ]
    right = sum(one["right"] for one in found["answers"])
    exact = scipy.stats.binomtest(right, 4).proportion_ci(0.95, "exact")
    assert found["score"] == {
        "right": right,
        "answered": 4,
        "low": pytest.approx(exact.low, abs=1e-9),
        "high": pytest.approx(exact.high, abs=1e-9),
    }
    status = page.locator("#blind-status").inner_text()
    assert status.startswith(
        f"{right} of 4 right: {25 * right:.1f} %, 95 % interval {100 * exact.low:.1f} % to {100 * exact.high:.1f} %."
    )
    rows = page.locator("#blind-answers tbody tr").all()
    assert [row.locator("td").all_inner_texts() for row in rows] == [
        [*list(one.values())[:5], "yes" if one["right"] else "no"] for one in found["answers"]
    ]

    page.get_by_role("button", name="Start anew").click()
    assert page.locator("#blind-status").inner_text() == "Pair 1 of 4."


@needs_browser
def test_answers_go_from_browser_to_browser(opened, browser, report_file, tmp_path):
    page = opened(report_file)
    page.get_by_role("button", name="Start").click()
    answer(page, "A")
    answer(page, "B")
    page.get_by_role("button", name="Finish now").click()
    assert page.locator("#blind-status").inner_text().partition(" right")[0].endswith("of 2")
    found = exported(page)
    other = opened(report_file)
    files = {
        "good": found,
        "other": {**found, "report": "another"},
        "no": {"answers": []},
        "bad": {**found, "answers": [{"answer": "C"}]},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "text.json").write_text("A, B")
    other.evaluate("localStorage.clear()")
    other.reload()
    for name, message in (
        ("text", "cannot be used"),
        ("no", "no answers of a blind test"),
        ("other", "another report, A report"),
        ("bad", "damaged"),
    ):
        other.locator("#blind-import").set_input_files(tmp_path / f"{name}.json")
        other.get_by_text(message).wait_for()
    other.locator("#blind-import").set_input_files(tmp_path / "good.json")
    other.get_by_text(" of 2 right").wait_for()
    assert exported(other) == found


@needs_browser
def test_pairs_are_as_long_as_the_shorter_and_of_one_position(opened, report_file):
    page = opened(report_file)
    page.evaluate("""() => {
      window.made = [];
      const play = HTMLMediaElement.prototype.play;
      HTMLMediaElement.prototype.play = function () {
        if (!made.includes(this)) made.push(this);
        this.playbackRate = 0.2;
        return play.call(this);
      };
    }""")
    page.get_by_role("button", name="Start").click()
    page.keyboard.press("a")
    page.wait_for_function("() => made[0].currentTime > 0.3")
    page.keyboard.press("b")
    page.wait_for_function("() => made.length === 2 && made[0].paused")
    # It begins where the other was, and the other stays there.
    assert page.evaluate("() => made[1].currentTime - made[0].currentTime") > -0.05
    length = min(page.evaluate("() => made.map(audio => audio.duration)"))
    assert length in (pytest.approx(3.0, abs=0.01), pytest.approx(3.5, abs=0.01))
    for side in (1, 0):
        page.evaluate(f"() => {{ made[{side}].currentTime = {length - 0.3}; }}")
        page.wait_for_function(f"() => made[{side}].paused")
        assert page.evaluate(f"() => made[{side}].currentTime") == pytest.approx(length, abs=0.3)
        # Heard to the end, the other begins anew.
        page.keyboard.press("ab"[1 - side])
        page.wait_for_function(f"() => !made[{1 - side}].paused")
        assert page.evaluate(f"() => made[{1 - side}].currentTime") < length - 1


@needs_browser
def test_the_keyboard_alone_does_everything(opened, report_file):
    page = opened(report_file)
    tab_to(page, "Position in continuation 1, line <0>")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert times(page)[2] == [pytest.approx(0.5), False]
    page.keyboard.press("End")
    assert times(page)[2][0] == pytest.approx(3.0)
    page.wait_for_function("() => document.activeElement.getAttribute('aria-valuetext') === '3.0 of 3.0 seconds'")
    page.keyboard.press("Home")
    page.keyboard.press(" ")
    assert heard(page)[0] == 2
    page.keyboard.press(" ")
    page.wait_for_function("() => document.querySelectorAll('audio')[2].paused")
    outline = "document.activeElement.computedStyleMap().get('outline-style').value"
    assert page.evaluate(outline) == "solid"
    tab_to(page, "Start")
    page.keyboard.press("Enter")
    for number in range(4):
        assert page.locator("#blind-status").inner_text() == f"Pair {number + 1} of 4."
        assert page.evaluate("document.activeElement.textContent") == "Hear A"
        page.keyboard.press("Enter")
        tab_to(page, "Hear B")
        page.keyboard.press(" ")
        tab_to(page, "B is generated")
        assert page.evaluate(outline) == "solid"
        page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.textContent") == "Save the answers to a file"
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert download.value.suggested_filename == "a-report-answers.json"


@needs_browser
def test_it_reads_without_scripts(browser, report_file):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report_file.as_uri())
    assert page.locator("audio[controls]").count() == 9 and page.locator("audio").first.is_visible()
    assert page.locator("img").first.is_visible() and page.locator("table").last.is_visible()
    for hidden in ("#blind", "#keys", 'a[href="#blind"]'):
        assert page.locator(hidden).is_hidden()
    assert page.locator("kbd >> visible=true").count() == 0 and page.locator("[role=slider]").count() == 0
    context.close()


@needs_browser
def test_intervals_are_exact(opened, report_file, tmp_path):
    """Many answers: the page's own binomial intervals are scipy's."""
    path = tmp_path / "report.html"
    path.write_text(report_file.read_text().replace("const STORE", "window.interval = interval; const STORE"))
    page = opened(path)
    for right, count in ((0, 1), (1, 1), (3, 20), (512, 1000), (0, 50), (50, 50), (999, 1000)):
        exact = scipy.stats.binomtest(right, count).proportion_ci(0.95, "exact")
        assert page.evaluate(f"interval({right}, {count})") == pytest.approx([exact.low, exact.high], abs=1e-9)


def test_nothing_is_fetched_or_lost(report_file):
    page = report_file.read_text()
    assert "://" not in page and page.count("<audio") == 9 and page.count("<td>&lt;b&gt;</td>") == 1
    clip = noise_clip("x", 0.5)
    kind, _, data = clip.audio_uri().partition(",")
    wave_W, rate = soundfile.read(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:audio/wav;base64" and rate == RATE
    np.testing.assert_allclose(wave_W, clip.wave_W, atol=2**-15)


def test_answers_belong_to_what_is_heard():
    groups = [Group("g", "", [noise_clip("x", 0.1, GENERATED)])]
    pages = [report.render("t", "", [], [], found) for found in (groups, groups, [Group("h", "", groups[0].clips)])]
    first, second, third = (re.search('data-identity="([0-9a-f]{32})"', page)[1] for page in pages)
    assert first == second != third
