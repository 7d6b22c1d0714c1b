"""A Chromium, and the page of a server whose engine is scripted, in a process of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from makers.page_visit import Visit, served

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> str:
    """.ci/run installs it; ENGINEHOUSE_CHROMIUM names another."""
    found = [os.environ.get("ENGINEHOUSE_CHROMIUM"), *map(shutil.which, NAMES)]
    for path in found:
        if path:
            return path
    pytest.skip("no Chromium is installed: apt-get install chromium, or ENGINEHOUSE_CHROMIUM=PATH")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Not for longer: while Playwright runs, an event loop does, which others would find."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # As root, in a container, there is no sandbox to be had; what is loaded is our own.
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
        made = playwright.chromium.launch(executable_path=path, args=arguments)
        yield made
        made.close()


@pytest.fixture(scope="session")
def site() -> Iterator[str]:
    with served() as address:
        yield address


@pytest.fixture
def visit(browser: Any, site: str) -> Iterator[Visit]:
    """A test that leaves an error on the console fails, unless it has looked at it."""
    made = Visit(browser, site)
    yield made
    made.close()
    assert made.said == []
    assert all(url.startswith((site, "blob:", "data:")) for url in made.asked)


@pytest.fixture(scope="session")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go: ENGINEHOUSE_SCREENSHOTS, else a temporary folder."""
    named = os.environ.get("ENGINEHOUSE_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
