"""Draw web-run.png, web-run-dark.png and web-compare.png: photograph the page of two runs in Chromium.

`make pictures` runs it on two demonstrations of four ranks, the first with a slow one. For runs of your own:
`.venv/bin/python docs/images/page_pictures.py RUNS_DIR RUN_A RUN_B`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from traceml.supervise.page_process import PageProcess

FOLDER = Path(__file__).resolve().parent
DESK, SHORT_DESK = {"width": 1280, "height": 1740}, {"width": 1280, "height": 900}


def main(*runs: str) -> None:
    """Write the three pictures of a folder and two runs, by default of demonstrations."""
    if runs:
        draw(*runs)
        return

    with tempfile.TemporaryDirectory() as folder:
        draw(folder, demonstrate(folder, "forward"), demonstrate(folder, "none"))


def demonstrate(runs_dir: str, fault: str) -> str:
    """Run `traceml demo` with four ranks; return the run's id."""
    command = [
        sys.executable,
        "-m",
        "traceml",
        "demo",
        "--ranks",
        "4",
        "--rank",
        "2",
        "--fault",
        fault,
        "--ms",
        "200",  # seen also where other programs use the cores
        "--steps",
        "120",
        "--live",
        "none",
    ]
    subprocess.run(command, env={**os.environ, "TRACEML_RUNS_DIR": runs_dir}, check=True)
    return Path(runs_dir, "latest").resolve().name


def draw(runs_dir: str, run_a: str, run_b: str) -> None:
    """Photograph the pages of two runs."""
    pictures = (
        ("web-run.png", f"run/{run_a}", DESK, "light"),
        ("web-run-dark.png", f"run/{run_a}", DESK, "dark"),
        ("web-compare.png", f"compare/{run_a}/{run_b}", SHORT_DESK, "light"),
    )
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with PageProcess(Path(runs_dir), 0) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, path, size, scheme in pictures:
            page = browser.new_context(viewport=size, color_scheme=scheme).new_page()
            page.goto(server.address(run_a))  # with the token, for the cookie
            page.goto(f"http://127.0.0.1:{server.port}/{path}")
            page.wait_for_selector("canvas")
            page.wait_for_timeout(3_000)  # the charts' animation
            page.screenshot(path=FOLDER / name)
            page.context.close()

        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
