"""Tools of the charts, and several runs in one chart, in Chromium."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from tests.display.web.conftest import LiveJob
from tests.display.web.test_pages import FAST, MANY, OPTION, SLOW, Visits, is_built, is_drawn, option

LOSS = "train/loss"


def act(page: Page, title: str, action: str) -> None:
    """Open the menu of a chart and press a button of it."""
    card = page.locator(f'section[aria-label="{title}"]')
    card.locator("summary").click()
    card.get_by_role("button", name=action).click()


def series(page: Page, title: str) -> list[list[float]]:
    """Return the points of the first line that is drawn."""
    points: list[list[float]] = option(page, title)["series"][0]["data"]  # type: ignore[index]
    return points


def test_a_chart_is_zoomed_by_dragging(visit: Visits) -> None:
    """The other charts with the same axis follow; the menu shows the whole range again."""
    page = visit().open(f"/run/{SLOW}#metrics")
    is_drawn(page, LOSS)
    box = page.locator(f'section[aria-label="{LOSS}"] canvas').bounding_box()
    assert box is not None
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.3 * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], middle, steps=4)
    page.mouse.up()

    zoom = f"({OPTION})(title).dataZoom?.[0]"
    zoomed = f"title => {{ const zoom = {zoom}; return zoom ? zoom.end - zoom.start : 100; }}"
    page.wait_for_function(f"({zoomed})({LOSS!r}) < 60")
    page.wait_for_function(f"({zoomed})('Loss next to step time') < 60")
    act(page, LOSS, "Whole range")
    page.wait_for_function(f"({zoomed})({LOSS!r}) === 100")


def test_metrics_are_shown_as_one_chooses(visit: Visits) -> None:
    """Smoothed, on the axis of time, logarithmic; grouped by prefix and found by name; the choice is kept."""
    page = visit().open(f"/run/{SLOW}#metrics")
    is_drawn(page, LOSS)
    is_built(page)  # then the settings that are kept are shown
    plain = series(page, LOSS)
    page.locator("[data-setting=axis]").select_option("seconds")
    page.locator("[data-setting=log]").check()
    assert option(page, LOSS)["xAxis"][0]["name"] == "s"  # type: ignore[index]
    assert option(page, LOSS)["yAxis"][0]["type"] == "log"  # type: ignore[index]
    page.locator("[data-setting=axis]").select_option("step")
    page.locator("[data-setting=smooth]").fill("0.9")
    smooth = series(page, LOSS)
    assert smooth[0] == plain[0]
    assert smooth[-1][1] > 1.2 * plain[-1][1]  # of a falling line, the mean lags behind
    page.reload()
    is_drawn(page, LOSS)
    assert series(page, LOSS) == smooth

    expect(page.locator(".metricgroup summary").first).to_have_text("train")
    page.get_by_label("search metrics").fill("train")
    expect(page.locator(".metricgroup:visible")).to_have_count(1)


def test_a_chart_is_saved_and_read_as_a_table(visit: Visits, tmp_path: Path) -> None:
    """As a picture, as CSV, and as a table for screen readers; texts in it are text; it fills the screen."""
    page = visit().open(f"/run/{SLOW}#metrics")
    is_drawn(page, LOSS)
    for action, begins in (("Save as CSV", b"step,train/loss\n0,2\n"), ("Save as PNG", b"\x89PNG")):
        with page.expect_download() as waiting:
            act(page, LOSS, action)

        waiting.value.save_as(tmp_path / "saved")
        assert (tmp_path / "saved").read_bytes().startswith(begins)

    for title, cells in ((LOSS, ["0", "2"]), ("Each rank's step", ["rank 0"]), ("Slow ranks", ["0", "rank 0"])):
        act(page, title, "Show as table")
        table = page.get_by_role("region", name=f"data of {title}")
        expect(table.locator("tbody tr").first).to_be_visible()
        assert table.locator("tbody tr").first.locator("td").all_text_contents()[: len(cells)] == cells

    act(page, LOSS, "Full screen")
    page.wait_for_function("document.fullscreenElement?.getAttribute('aria-label') === 'train/loss'")
    assert page.evaluate("window.pwned") is None


def test_a_menu_is_used_by_keys_alone(visit: Visits) -> None:
    """Escape and each action close it, and the button that opens it has the focus again."""
    page = visit().open(f"/run/{SLOW}")
    is_drawn(page, "Step time")
    card = page.locator('section[aria-label="Step time"]')
    menu, summary = card.locator("details.menu"), card.locator("summary")
    for keys in (("Tab", "Escape"), ("Tab", "Tab", "Enter")):  # the second action shows the whole range
        summary.focus()
        page.keyboard.press("Enter")
        expect(menu).to_have_attribute("open", "")
        for key in keys:
            page.keyboard.press(key)

        expect(menu).not_to_have_attribute("open", "")
        expect(summary).to_be_focused()


def test_hovering_a_chart_tells_values_with_units_in_all_of_its_axis(visit: Visits) -> None:
    page = visit().open(f"/run/{SLOW}")
    is_drawn(page, "Step time")
    is_drawn(page, "Where a step goes")
    page.locator('section[aria-label="Step time"] canvas').hover()

    for title in ("Step time", "Where a step goes"):
        expect(page.locator(f'section[aria-label="{title}"] .canvas')).to_contain_text(re.compile(r"\d ms"))


def test_three_runs_are_picked_and_overlaid(visit: Visits) -> None:
    """Each is compared with the oldest; metrics of all are in one chart; parameters that differ are listed."""
    page = visit().open("/")
    for run in (SLOW, FAST, MANY):
        page.locator(f'input[data-run="{run}"]').check()

    page.locator("#compare").click()
    expect(page).to_have_url(re.compile(f"/compare/{MANY}/{FAST}/{SLOW}$"))
    expect(page.locator("h1")).to_have_text(re.compile("Compared with A: .*not comparable"))
    rows = page.get_by_role("region", name="table of the runs").locator("tbody tr")
    expect(rows).to_have_count(3)
    expect(rows.nth(2)).to_contain_text("A ran on 1,000 ranks, C on 4: a step is not the same work")
    expect(page.get_by_label("parameters that differ").first).to_contain_text("optimizer.name")
    is_drawn(page, "Step time of all runs")
    is_drawn(page, LOSS)
    assert [line["name"] for line in option(page, "Step time of all runs")["series"]] == ["A", "B", "C"]


# A busy browser: NiceGUI makes a chart by a timer of 0 ms, and sets its options by one of 10 ms; the page looks for the
# chart by timers of 25 ms, so many of them end before there is one.
_BUSY = """(() => {
  const start = window.setTimeout, late = new Map([[0, 800], [25, 1]]);
  window.timers = 0;
  window.setTimeout = (act, ms, ...rest) => {
    if (ms !== 10) return start(act, late.get(ms) ?? ms, ...rest);
    window.timers += 1;
    return start(() => { window.timers -= 1; act(...rest); }, 1600);
  };
})()"""


def test_a_chart_that_is_added_stays_drawn_however_late_the_browser_makes_it(visit: Visits, live_job: LiveJob) -> None:
    """A metric that is logged while the page is open."""
    live_job.train(60)
    page = visit(script=_BUSY).open(f"/run/{live_job.id}")
    expect(page.locator(".figures > div", has_text="Steps").nth(1)).to_contain_text("60")

    live_job.log("late", np.linspace(2, 0.1, 60))
    is_drawn(page, "late")
    page.wait_for_function("window.timers === 0")
    is_drawn(page, "late")
    assert len(series(page, "late")) == 60


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_have_no_violation_of_accessibility_rules(visit: Visits, scheme: str) -> None:
    """Contrast, names, headings, landmarks: axe-core's rules, on every kind of page; contrast depends on the scheme."""
    chosen = "" if scheme == "light" else "runOnly: ['color-contrast'], "
    rules = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    mine = visit(color_scheme=scheme, bypass_csp=True)
    for path, ready in (
        ("/", "a.name"),
        (f"/run/{SLOW}", "#media figure"),
        (f"/compare/{FAST}/{SLOW}", "h1:visible"),
        (f"/compare/{MANY}/{FAST}/{SLOW}", "h1:visible"),
        ("/run/nowhere", ".empty-state h2:visible"),
        ("/compare/nowhere/neither", ".empty-state h2:visible"),
    ):
        page = mine.open(path)
        page.wait_for_selector(ready)
        if "nowhere" not in path:
            page.wait_for_selector("canvas" if path != "/" else "table")

        page.evaluate(rules)
        found = page.evaluate(f"axe.run({{{chosen}resultTypes: ['violations']}}).then(found => found.violations)")
        assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
        # The web framework would show a bar without a name during each request.
        assert page.evaluate("XMLHttpRequest.prototype.send.toString()").endswith("{ [native code] }")


def test_what_opens_shows_that_it_does(visit: Visits) -> None:
    """A folded text has a triangle, a choice an arrow: the web framework's styles would remove both."""
    page = visit().open(f"/run/{SLOW}")
    for name in ("Packages (2 lines)", "Environment variables (1 line)"):
        expect(page.locator("summary", has_text=name)).to_have_css("display", "list-item")

    for chosen in ("#log-level", '[data-setting="axis"]'):
        expect(page.locator(chosen)).to_have_css("appearance", "auto")
