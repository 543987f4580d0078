"""The page in Chromium."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import Page, expect

from tests.diagnosis.fabricated import Job
from tests.display.web.conftest import LiveJob, Visit
from tests.display.web.runs import NASTY
from tests.runs.fabricated_store import run_facts, store_run
from traceml.database.store.store import StoreWriter
from traceml.run_folder import STORE_NAME
from traceml.runs.find import describe_run
from traceml.runs.remove import remove_ended, remove_run
from traceml.runs.run_labels import RunLabels, write_labels

Visits = Callable[..., Visit]
SLOW, FAST, MANY = "20260105-000000-slow-0001", "20260104-000000-fast-0002", "20260103-000000-many-0003"
PHONE = {"viewport": {"width": 390, "height": 844}}
_PIXELS = """title => {
  const colors = new Set();
  for (const canvas of document.querySelectorAll(`section[aria-label="${title}"] canvas`)) {
    if (!canvas.width || !canvas.height) continue;  // one that has just become visible
    const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    for (let at = 0; at < data.length; at += 4) {
      if (data[at + 3] > 200) colors.add((data[at] >> 4) * 256 + (data[at + 1] >> 4) * 16 + (data[at + 2] >> 4));
    }
  }
  return colors.size;
}"""
OPTION = """title => {
  const canvas = document.querySelector(`section[aria-label="${title}"] .canvas`);
  return (canvas && getElement(Number(canvas.id.slice(1)))?.chart?.getOption()) ?? {};
}"""


def is_drawn(page: Page, title: str) -> None:
    """Wait until a chart has lines or areas of several colors."""
    is_built(page)  # before, the browser may load the page again, whose charts are others
    page.locator(f'section[aria-label="{title}"]').scroll_into_view_if_needed()
    page.wait_for_function(f"({_PIXELS})({title!r}) > 4")


def option(page: Page, title: str) -> dict[str, object]:
    """Return what ECharts draws, when it has been given something."""
    page.wait_for_function(f"({OPTION})({title!r}).series?.length > 0")
    return dict(page.evaluate(OPTION, title))


def is_built(page: Page) -> None:
    """Wait until the page's scripts have replaced what the server has sent, with which a focus would be lost."""
    page.wait_for_function("document.getElementById('content') && !document.getElementById('first-paint')")
    page.wait_for_function("window.did_handshake")


def test_the_list_has_every_run_the_newest_first(visit: Visits, runs_dir: Path) -> None:
    """Damaged runs and those of another version are listed too, each with its state."""
    page = visit().open("/")

    expect(page.locator("a.name")).to_have_count(len(list(runs_dir.iterdir())))
    ids = page.locator(".id").all_text_contents()
    assert ids.index(SLOW) < ids.index("20260101-000000-empty-0008")
    row = page.locator("tr", has_text=SLOW)
    expect(row).to_contain_text("finished")
    expect(row).to_contain_text("Compute straggler")
    expect(row).to_contain_text(re.compile("|".join(time.tzname)))  # this machine's, which need not be the reader's
    expect(page.locator("tr", has_text="older-0005").locator(".pill").first).to_have_text("older")
    is_built(page)
    page.locator("a.name", has_text="train").first.focus()
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(r"/run/2026"))


def test_the_list_is_searched_as_one_types(visit: Visits) -> None:
    """With the conditions of `traceml runs --where`; the address keeps them; unknown names are told."""
    page = visit().open("/")
    page.wait_for_selector("a.name")
    is_built(page)

    page.keyboard.press("/")
    page.keyboard.type("straggler ranks<10")
    expect(page.locator("a.name:visible")).to_have_count(1)
    expect(page).to_have_url(re.compile("ranks%3C10"))
    page.reload()
    expect(page.locator("a.name:visible")).to_have_count(1)
    is_built(page)
    page.locator("#search").fill("lr<1")
    expect(page.locator(".id", has_text=SLOW)).to_be_visible()
    expect(page.locator("a.name:visible")).to_have_count(1)
    page.locator("#search").fill("straggler nothing")
    expect(page.locator("#none-found")).to_be_visible()
    page.locator("#search").fill("unheard=1")
    expect(page.locator(".problem")).to_contain_text("no run has a field, parameter or metric 'unheard'")


def test_the_list_is_sorted_grouped_and_its_columns_are_chosen(visit: Visits) -> None:
    """By any field, parameter or last value of a metric; a heading pressed twice sorts the other way round."""
    page = visit().open("/")
    is_built(page)
    page.get_by_role("button", name="Ranks", exact=True).click()
    expect(page.locator("th[aria-sort=ascending]")).to_have_text(re.compile("Ranks"))
    page.get_by_role("button", name="Ranks", exact=True).click()
    expect(page.locator(".id").first).to_have_text(MANY)
    page.locator("#columns").click()
    page.get_by_role("checkbox", name="train/loss").check()
    expect(page.locator("tr", has_text=SLOW).locator("td").last).to_have_text("0.1")
    page.locator("#group").select_option("verdict")
    expect(page.locator(".groupline").first).to_have_text(re.compile("verdict: COMPUTE_STRAGGLER [(]2 runs[)]"))
    expect(page).to_have_url(re.compile("group=verdict"))
    expect(page).to_have_url(re.compile("sort=-ranks"))


def test_runs_are_labeled_and_deleted(visit: Visits, runs_dir: Path) -> None:
    """Those that are picked: tags, note, name, archive; deleting is asked twice, a running job is refused."""
    for name in ("20250101-000000-gone-0001", "20250101-000000-kept-0002"):
        store_run(runs_dir / name, Job(ranks=1, steps=5))

    page = visit().open("/")
    page.locator('input[data-run="20250101-000000-gone-0001"]').check()
    edit = page.locator("#edit-text")
    for text, button in (("<i>base", "Add tag"), ("a note", "Set note"), ("another name", "Rename")):
        edit.fill(text)
        page.get_by_role("button", name=button, exact=True).click()

    row = page.locator("tr", has_text="gone-0001")
    for said in ("<i>base", "a note", "another name"):
        expect(row).to_contain_text(said)

    edit.fill("a, b")
    page.get_by_role("button", name="Add tag", exact=True).click()
    expect(page.locator(".editbar [role=status]")).to_contain_text("not a tag: 'a,'")
    page.locator('input[data-run="20250101-000000-kept-0002"]').check()
    expect(page.locator(".editbar b")).to_have_text("2 runs selected")
    page.get_by_role("button", name="Archive", exact=True).click()
    expect(row).to_have_count(0)
    expect(page.locator("#found")).to_contain_text("2 archived not listed")
    page.locator("#archived").click()
    expect(row).to_have_count(1)
    page.locator('input[data-run="20250101-000000-kept-0002"]').uncheck()
    page.get_by_role("button", name="Delete", exact=True).click()
    page.locator("#confirm-delete").click()
    expect(page.locator("#confirm-delete")).to_contain_text("Press again")
    assert (runs_dir / "20250101-000000-gone-0001").is_dir()
    page.locator("#confirm-delete").click()
    expect(row).to_have_count(0)
    assert not (runs_dir / "20250101-000000-gone-0001").exists()
    remove_ended([describe_run(runs_dir / "20250101-000000-kept-0002")])


def test_the_first_paint_of_the_list_is_what_the_scripts_build(visit: Visits) -> None:
    """It is in the server's response: with heading, arrow, tags and all rows; its controls take no input yet."""
    elements = """() => [...document.querySelectorAll("#app .top, #app .top *, #content *")].map((each) => [
      each.tagName, each.className, each.hidden, each.getAttribute("href"),
      [...each.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data.trim()).join("")])"""
    settled = visit().open("/")
    expect(settled.locator("#found")).not_to_contain_text("archived")  # which the test before has removed
    built = []
    for scripts in (False, True):
        mine = visit(java_script_enabled=scripts)
        mine.open("/")  # with the token
        page = mine.open("/?group=verdict&sort=-ranks", token=False)
        if scripts:
            page.wait_for_function("window.did_handshake")
        else:
            controls = page.locator("input:not([inert]), button:not([inert], #close-keys), select:not([inert])")
            assert controls.count() == 0

        built.append(page.evaluate(elements))

    assert len(built[0]) > 150
    assert built[0] == built[1]


def test_the_first_paint_of_a_run_has_its_verdict(visit: Visits) -> None:
    """Also without scripts. A first visit may take longer than a page waits, so there was one before."""
    expect(visit().open(f"/run/{SLOW}").locator("h1")).to_contain_text("Rank 2 is slow in forward")
    page = visit(java_script_enabled=False).open(f"/run/{SLOW}")

    expect(page.locator("h1")).to_contain_text("Rank 2 is slow in forward")
    assert page.locator("link[rel=stylesheet]").count() == 0
    assert "@import" not in page.content()


def test_a_run_tells_what_limits_it_first(visit: Visits) -> None:
    """Verdict, evidence and advice are at the top, charts below; the address has no token."""
    mine = visit()
    page = mine.open(f"/run/{SLOW}")

    expect(page.locator("h1")).to_contain_text("Rank 2 is slow in forward")
    expect(page.locator(".verdict")).to_contain_text("COMPUTE STRAGGLER")
    expect(page.locator(".evidence dt").first).to_have_text("costs")
    expect(page.locator(".next")).to_contain_text("rank 2")
    assert page.url.endswith(f"/run/{SLOW}")
    for title in ("Step time", "Where a step goes", "Slow ranks", "Each rank's step"):
        is_drawn(page, title)

    for title in ("Memory", "Hosts and devices"):
        assert len(option(page, title)["series"][0]["data"]) == 40  # type: ignore[index]

    expect(page.locator("tr.slow td").first).to_have_text("2")
    mine.open(f"/run/{SLOW}", token=False)
    expect(page.locator("h1")).to_contain_text("Rank 2 is slow")


def test_a_single_rank_is_compared_with_no_other(visit: Visits) -> None:
    """The map of slow ranks has no place on the page of one rank."""
    page = visit().open("/run/20260101-000000-alone-0010")

    is_drawn(page, "Each rank's step")
    expect(page.locator('section[aria-label="Slow ranks"]')).to_be_hidden()


def test_a_restart_is_reported_beside_the_verdict(visit: Visits) -> None:
    page = visit().open("/run/20260101-000000-again-0009")

    expect(page.locator(".verdict .note")).to_have_text(
        re.compile("Restarted once: rank 1, RuntimeError at step 30 [(]lost 12 s[)]")
    )


def test_the_heat_map_shows_the_straggler(visit: Visits) -> None:
    """Among a thousand ranks the slow one's row is the brightest; the page loads within about a second."""
    page = visit().open(f"/run/{MANY}")
    is_drawn(page, "Slow ranks")

    drawn = option(page, "Slow ranks")
    cells = drawn["series"][0]["data"]  # type: ignore[index]
    labels = drawn["yAxis"][0]["data"]  # type: ignore[index]
    sums: dict[int, float] = {}
    for _, row, value in cells:
        sums[row] = sums.get(row, 0.0) + value

    first, _, last = labels[max(sums, key=lambda row: sums[row])].removeprefix("ranks ").partition("-")
    assert int(first) <= 412 <= int(last)
    expect(page.locator("h1")).to_contain_text("Rank 412")
    expect(page.locator("#ranks .note")).to_contain_text("976 more ranks")


def test_metrics_are_drawn_the_loss_beside_the_step_time(visit: Visits) -> None:
    """Each name has a chart; names are shown as text, and whole under the pointer, where there is no room."""
    page = visit().open(f"/run/{SLOW}#metrics")

    for title in ("Loss next to step time", "train/loss"):
        is_drawn(page, title)

    named = page.locator("#metrics h3", has_text="val <img")
    shown = f"val {NASTY}".replace("\u2028", "\\u2028")
    expect(named).to_have_text(shown)
    expect(named).to_have_attribute("title", shown)


def test_names_with_html_in_them_are_text(visit: Visits) -> None:
    """In the list, on the page, in charts and their tooltips, in the address and in the title."""
    page = visit().open("/")
    expect(page.locator("a.name", has_text="<img")).to_have_text(NASTY.replace("\u2028", "\\u2028"))
    page.locator("a.name", has_text="<img").click()
    expect(page.locator("#overview")).to_contain_text(NASTY.split("\u2028")[0].strip())
    assert page.title() == "20260102-000000-<b>nasty<-0004 - traceml"

    page.goto(page.url.replace(quote("20260102-000000-<b>nasty<-0004", safe=""), SLOW) + "#metrics")
    is_drawn(page, "Loss next to step time")
    page.locator("#metrics canvas").last.hover()
    page.wait_for_timeout(200)
    assert page.evaluate("window.pwned") is None
    assert page.locator("img:not(.thumbs img)").count() == 0


def test_the_page_holds_what_was_logged(visit: Visits) -> None:
    """Parameters, source, packages, texts, images, histograms and files; names in them are text; some search."""
    page = visit().open(f"/run/{SLOW}")
    overview = page.locator("#overview")
    for said in ("lr", "optimizer.name", "goal=speed", "c0ffee", "with uncommitted changes", "numpy 2.3.1"):
        expect(overview).to_contain_text(said)

    is_built(page)
    overview.locator("summary", has_text="Uncommitted changes").click()
    expect(overview.locator("pre", has_text="-old")).to_contain_text("+<img src=x")
    page.get_by_label("search parameters").fill("adam")
    expect(page.locator("#parameters tbody tr:visible")).to_have_count(1)
    expect(page.locator("#media figure")).to_have_count(24)
    expect(page.locator("#media")).to_contain_text("6 older ones are not shown.")
    expect(page.locator("#media pre.logged")).to_have_text(NASTY.replace("\u2028", "\\u2028"))
    expect(page.locator(".file", has_text="huge.bin")).to_contain_text("not stored: it is too large")
    is_drawn(page, "weights")
    assert page.evaluate("window.pwned") is None


def test_a_run_without_its_source_tells_how_it_is_recorded(visit: Visits) -> None:
    """Uncommitted changes, packages and variables are read with an experiment, a tracker or a setting only."""
    told = "TRACEML_COLLECTORS=git"
    expect(visit().open(f"/run/{FAST}").locator("#overview .note:visible", has_text=told)).to_have_count(1)
    page = visit().open(f"/run/{SLOW}")
    expect(page.locator("#overview")).to_contain_text("c0ffee")
    expect(page.locator("#overview .note:visible", has_text=told)).to_have_count(0)


def test_files_of_a_run_are_downloaded_and_nothing_else_is(visit: Visits) -> None:
    """Logged files, logs and reports; no script in them can run; paths out of the run's folder are refused."""
    page = visit().open(f"/run/{SLOW}")
    is_built(page)
    for name in ("out/model.svg", "report.json", "Download report.html", "passwd"):
        expect(page.locator("#media .file a, #overview a").filter(has_text=name).first).to_be_attached()

    links = {
        each.inner_text(): each.get_attribute("href") for each in page.locator("#media .file a, #overview a").all()
    }

    for name, begins in (("out/model.svg", "<svg"), ("report.json", "{"), ("Download report.html", "<!doctype html>")):
        answer = page.request.get(f"http://127.0.0.1:{page.url.split(':')[2].split('/')[0]}{links[name]}")
        assert answer.text().startswith(begins)
        assert answer.headers["content-disposition"].startswith("attachment")
        assert "sandbox" in answer.headers["content-security-policy"]

    base = page.url.replace("/run/", "/files/")
    for path in (
        links["passwd"].split("/")[-1],
        "traceml.store",
        "artifacts/../traceml.store",
        "logs/%2e%2e/store.log",
    ):
        assert page.request.get(f"{base}/{path}").status == 404

    assert page.request.get(page.url.replace(f"/run/{SLOW}", "/files/%2e%2e/report.json")).status == 404


def test_logs_are_searched(visit: Visits) -> None:
    """By words and by level, beyond the lines that are shown at first."""
    page = visit().open(f"/run/{SLOW}")
    is_built(page)
    page.locator("#log-level").select_option("error")
    expect(page.locator("#logs pre:visible")).to_contain_text("ValueError: <img src=x")
    expect(page.locator("#logs pre:visible")).not_to_contain_text("is fine")
    page.locator("#log-search").fill("no such words")
    expect(page.locator("#logs")).to_contain_text("No line contains this.")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("older-0005", "has format 0, this traceml reads"),
        ("damaged-0006", "damaged"),
        ("empty-0008", "Not enough data for a verdict"),
        ("partial-0009", "1 of 3 ranks have never reported"),
        ("halved-0007", "The store of this run is gone; this page shows its report."),
        ("nowhere", "There is no such run"),
    ],
)
def test_a_run_with_something_wrong_says_what(visit: Visits, name: str, said: str) -> None:
    """The page shows the problem and what can be read; other runs are not affected."""
    page = visit().open(f"/run/20260101-000000-{name}")

    is_built(page)
    expect(page.locator(".banner, .page").filter(has_text=said).first).to_be_visible()
    expect(page.locator(".tabs a:visible")).to_have_count(0 if page.locator(".empty-state:visible").count() else 11)


def test_an_address_without_a_page_leads_to_the_list(visit: Visits) -> None:
    """It looks like a page of ours, not like the web framework's."""
    page = visit().open("/settings")

    expect(page.locator("h1")).to_have_text("There is no such page.")
    page.get_by_role("link", name="All runs").click()
    expect(page.locator("h1")).to_have_text("Runs")


def test_what_is_not_judged_is_not_green(visit: Visits) -> None:
    """The verdict has the color of what is idle, as in the list."""

    page = visit().open("/run/20260101-000000-empty-0008")
    expect(page.locator(".pill.kind")).to_have_text("INSUFFICIENT DATA")
    assert "info" not in (page.locator(".pill.kind").get_attribute("class") or "").split()
    assert "info" not in (page.locator(".card.verdict").get_attribute("class") or "").split()


@pytest.mark.parametrize("path", ["/run/..", "/run/%2e%2e", "/run/..%2f..%2fetc", "/run/.hidden", "/compare/../x"])
def test_nothing_outside_the_folder_is_read(visit: Visits, path: str) -> None:
    page = visit().open(path)

    assert "root:" not in page.content()
    expect(page.locator(".verdict:visible")).to_have_count(0)


def test_a_run_that_goes_on_is_followed_in_place(visit: Visits, live_job: LiveJob) -> None:
    """The page waits for the first rows, then updates; charts stay the same elements, and nothing jumps."""
    page = visit().open(f"/run/{live_job.id}")
    expect(page.locator("body")).to_contain_text("Not enough data")
    live_job.train(100)
    expect(page.locator("h1:visible")).to_contain_text("Rank 1 is slow in forward")
    is_drawn(page, "Step time")
    # A busy machine is silent for longer than 5 s, which is told above the charts.
    page.locator(".banner").evaluate("banner => { banner.style.display = 'none'; }")
    page.evaluate("""() => {
      window.mark = document.querySelector('section[aria-label="Step time"] canvas');
      window.moved = 0;
      new PerformanceObserver(list => { for (const each of list.getEntries()) window.moved += each.value; })
        .observe({type: "layout-shift", buffered: false});
    }""")

    live_job.train(60)
    expect(page.locator(".figures > div", has_text="Steps").nth(1)).to_contain_text("160")
    page.wait_for_function(f"(({OPTION})('Step time').xAxis?.[0]?.data ?? []).length >= 32")
    assert page.evaluate("window.mark === document.querySelector('section[aria-label=\"Step time\"] canvas')")
    assert page.evaluate("window.moved") < 0.02
    expect(page.locator(".tags .pill", has_text="running")).to_be_visible()
    live_job.end()
    expect(page.locator(".tags .pill", has_text="finished")).to_be_visible()


def test_a_page_that_is_killed_comes_back_with_what_it_missed(
    visit: Visits, live_job: LiveJob, page_process: object, kill_page: Callable[[], None]
) -> None:
    """The browser reports the lost connection, then reconnects to the new server at the same address."""
    live_job.train(60)
    page = visit().open(f"/run/{live_job.id}")
    steps = page.locator(".figures > div", has_text="Steps").nth(1)
    expect(steps.locator("dd")).to_have_text("60")  # not what the page knows of a run of another test
    page.wait_for_function("window.did_handshake")  # before, the browser would load the page again and wait

    kill_page()
    expect(page.get_by_text("Connection lost")).to_be_visible()
    live_job.train(60)
    deadline = time.monotonic() + 120
    while "120" not in (steps.text_content() or "") and time.monotonic() < deadline:
        page_process.restart_if_dead()  # type: ignore[attr-defined]
        page.wait_for_timeout(200)

    expect(steps).to_contain_text("120")
    expect(page.get_by_text("Connection lost")).to_be_hidden()


def test_a_run_that_falls_silent_says_so(visit: Visits, live_job: LiveJob) -> None:
    """The page shows that its data is old when ranks or the aggregator stop."""
    live_job.train(60)
    page = visit().open(f"/run/{live_job.id}")

    expect(page.locator(".banner")).to_contain_text("No data from this run for")
    for _ in range(300):  # a busy machine may read the rows so late that they are old again
        live_job.train(1)
        page.wait_for_timeout(200)
        if page.locator(".banner").is_hidden():
            return

    pytest.fail("the banner has stayed")


def test_two_browsers_see_the_same(visit: Visits, live_job: LiveJob) -> None:
    """Each browser has its own theme."""
    pages = [visit(color_scheme=scheme).open(f"/run/{live_job.id}") for scheme in ("light", "dark")]
    live_job.train(120)

    for page in pages:
        expect(page.locator("h1:visible")).to_contain_text("Rank 1 is slow")
        is_drawn(page, "Where a step goes")

    themes = [page.evaluate("document.documentElement.dataset.theme") for page in pages]
    colors = [option(page, "Where a step goes")["textStyle"]["color"] for page in pages]  # type: ignore[index]
    assert themes == ["light", "dark"]
    assert colors[0] != colors[1]


def test_two_runs_are_picked_and_compared(visit: Visits) -> None:
    """The older run is A; the result is above the charts."""
    page = visit().open("/")
    for run in (SLOW, FAST):
        page.locator(f'input[data-run="{run}"]').check()

    page.locator("#compare").click()
    expect(page).to_have_url(re.compile(f"/compare/{FAST}/{SLOW}$"))
    expect(page.locator("h1")).to_contain_text("B is slower")
    expect(page.locator("table").first).to_contain_text("p99")
    expect(page.locator("tr", has_text="wall time")).to_contain_text(re.compile(r"\d s.*\d s"))
    for title in ("Step time", "Phases", "Each rank's own work"):
        is_drawn(page, title)


def test_keys_do_what_the_list_of_keys_says(visit: Visits) -> None:
    """Sections, theme, search, help; the focus order begins with the link to the content."""
    page = visit().open(f"/run/{SLOW}")
    is_drawn(page, "Step time")

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    page.keyboard.press("3")
    expect(page.locator("#ranks h2").first).to_be_in_viewport()
    page.keyboard.press("t")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(13, 19, 27)"
    page.keyboard.press("?")
    expect(page.locator("dialog")).to_be_visible()
    page.keyboard.press("?")
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.keyboard.press("r")
    expect(page.locator("h1")).to_have_text("Runs")
    newest = page.locator("a.name").first
    expect(newest).to_have_attribute("href", re.compile(SLOW))  # not a run that another test has just removed
    page.keyboard.press("j")
    expect(newest).to_be_focused()


def test_the_run_with_the_focus_keeps_it(visit: Visits, runs_dir: Path) -> None:
    """Rows move when a run begins or is removed; a pressed Escape is respected."""
    page = visit().open("/")
    mine = page.locator(f'a.name[href="/run/{SLOW}"]')
    expect(mine).to_be_visible()
    is_built(page)
    mine.focus()
    newer = runs_dir / "20260106-000000-newer-0001"
    newer.mkdir()
    with StoreWriter(newer / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(id=newer.name, name="newer", state="failed"))

    try:
        expect(page.locator(f'a.name[href="/run/{newer.name}"]')).to_be_visible()
        expect(mine).to_be_focused()
    finally:
        remove_run(newer)

    expect(page.locator(f'a.name[href="/run/{newer.name}"]')).to_have_count(0)
    expect(mine).to_be_focused()
    page.keyboard.press("Escape")
    page.wait_for_function("document.activeElement === document.body")


def test_a_list_that_changes_loses_no_click(visit: Visits, runs_dir: Path) -> None:
    """It changes every two seconds while runs go on, also between the press and the release of the button."""
    page = visit().open("/")
    mine = page.locator(f'a.name[href="/run/{SLOW}"]')
    # A row of a run that another test has just removed would go from above it.
    expect(page.locator("a.name").first).to_have_attribute("href", re.compile(SLOW))
    is_built(page)
    mine.hover()
    page.mouse.down()
    write_labels(runs_dir / SLOW, RunLabels(note="changed"))
    try:
        expect(page.locator("tr", has=mine)).to_contain_text("changed")
        page.mouse.up()
        expect(page).to_have_url(re.compile(f"/run/{SLOW}$"))
    finally:
        write_labels(runs_dir / SLOW, RunLabels())


def test_a_long_note_leaves_the_list_its_rows(runs_dir: Path, visit: Visits) -> None:
    """The list shows its beginning, and the run's page all of it."""
    note = "The paper's setting, to be repeated with warm-up. " * 100
    write_labels(runs_dir / SLOW, RunLabels(note=note.strip()))
    try:
        page = visit().open("/")
        row = page.locator("tr", has=page.locator(f'a.name[href="/run/{SLOW}"]'))
        expect(row).to_contain_text("The paper's setting")
        assert row.evaluate("row => row.offsetHeight") < 200
        page = visit().open(f"/run/{SLOW}")
        expect(page.locator("#overview dd", has_text=note.strip())).to_be_visible()
    finally:
        write_labels(runs_dir / SLOW, RunLabels())


@pytest.mark.parametrize("path", ["/", f"/run/{SLOW}", f"/compare/{FAST}/{SLOW}"])
def test_a_phone_needs_no_sideways_scrolling(visit: Visits, path: str) -> None:
    page = visit(**PHONE).open(path)
    page.wait_for_timeout(1000)

    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_long_name_leaves_the_buttons_their_words(visit: Visits) -> None:
    """On a phone the name is cut, and the texts of the buttons next to it stay inside of them."""
    page = visit(**PHONE).open(f"/run/{SLOW}")
    expect(page.locator(".crumb")).to_be_visible()
    page.locator(".crumb").evaluate("crumb => { crumb.textContent = 'long-name-'.repeat(20) }")

    cut = page.locator(".bar .tool").evaluate_all("each => each.map(one => one.scrollWidth - one.clientWidth)")
    assert len(cut) == 2
    assert max(cut) <= 0


def test_a_long_path_in_an_error_hides_no_figures(visit: Visits) -> None:
    """The text is broken: the columns after it stay on the screen."""
    page = visit().open("/run/20260101-000000-partial-0009")
    expect(page.locator("#ranks td", has_text="datadata")).to_be_visible()

    columns = page.locator("#ranks .scroll").evaluate("table => [table.scrollWidth, table.clientWidth]")
    assert columns[0] == columns[1]


def test_a_wrong_token_is_a_page_that_helps(visit: Visits) -> None:
    mine = visit()
    mine.page.goto(f"http://127.0.0.1:{mine.port}/?token=wrong")

    expect(mine.page.locator("h1")).to_have_text("The token in this address is wrong.")
    expect(mine.page.locator("body")).to_contain_text("traceml serve --web")
