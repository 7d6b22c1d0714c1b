"""The views of the engine, which a chat keeps at work, and of its build, in a real Chromium."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from makers.page_visit import Visit

KINDS = ("shared", "held", "kept", "free")


def test_it_shows_a_sequence_from_its_first_token_to_its_cancel(visit: Visit, site: str) -> None:
    page = visit.open()
    assert not [url for url in visit.asked if "engine" in url], "nobody has looked"
    page.click("#view-engine")
    page.wait_for_selector("#engine >> text=The engine takes requests.")
    assert "8 at most" in page.inner_text("#engine .card >> nth=0")
    page.click("#view-chat")
    page.fill("#prompt", "slow")
    page.press("#prompt", "Enter")
    page.wait_for_selector("article.assistant .answer > .text >> text=On and on")
    page.click("#view-engine")
    page.wait_for_selector(".lanes td >> text=decode")
    assert page.locator(".lanes .strip rect.k-decode").count() >= 1
    page.keyboard.press("Escape")
    page.wait_for_selector(".lanes td >> text=cancelled")
    info = page.inner_text("#engine .card >> nth=-1")
    for words in ("1 × 1", "1.00 GiB, 1024 blocks of 32 tokens", "sha256:0"):
        assert words in info


def test_it_shows_each_block_and_who_gave_way(visit: Visit) -> None:
    page = visit.open()
    page.fill("#prompt", "slow, and give way")
    page.press("#prompt", "Enter")
    page.wait_for_selector("article.assistant .answer > .text >> text=On and on")
    page.click("#view-engine")
    page.wait_for_selector(".lanes td >> text=preempted")
    assert page.locator(".lanes .strip rect.k-preempted").count() == 1
    counts = {kind: page.locator(f"#engine svg rect.k-{kind}").count() for kind in KINDS}
    assert counts == {"shared": 20, "held": 20, "kept": 100, "free": 160}
    told = page.inner_text("#engine")
    assert "A cell is one of 3.4 blocks." in told and "held by several" in told
    page.keyboard.press("Escape")


def test_the_server_is_left_alone_while_nobody_sees_it(visit: Visit) -> None:
    page = visit.open()
    page.click("#view-engine")
    page.wait_for_selector("#engine >> text=The engine takes requests.")
    with page.expect_event("requestfailed") as ended:
        page.click("#view-chat")
    assert ended.value.url.endswith("/v1/engine/events")


def test_the_build_is_told_from_the_manifest(visit: Visit) -> None:
    page = visit.open()
    page.click("#view-build")
    page.wait_for_selector("#build .card")
    told = page.inner_text("#build")
    for words in (
        *("256.0 MiB", "90.0 MiB, 35.2 %", "0.134 B parameters, 5.63 bits each"),
        *("int4_awq, groups of 64", "0.137 in the mean, 2.50 at most", "87.0 % of 537 tokens"),
        *("most at layer 11: 12.0 %", "convert", "2 min 15 s", "1.00 GiB"),
        *("Each h100, as planned: 79.00 GiB", "68.00 GiB, 86.1 %", "8192 tokens", "17"),
    ):
        assert words in told, told
    assert "plan" not in [one.inner_text() for one in page.locator("#build .bar-row span").all()]
    drawn = "[...document.querySelectorAll('#build .k-held')].map((r) => r.width.baseVal.value)"
    assert page.evaluate(drawn)[:2] == pytest.approx([320, 320 * 90 / 256])
    page.click("#view-chat")
    page.click("#view-build")
    assert len([url for url in visit.asked if url.endswith("/v1/engine/events")]) == 1


def test_axe_finds_nothing_and_nothing_is_wider_than_the_screen(visit: Visit, shots: Path) -> None:
    page = visit.open()
    page.click("#view-engine")
    page.wait_for_selector("#engine >> text=The engine takes requests.")
    page.click("#view-chat")
    page.fill("#prompt", "slow")
    page.press("#prompt", "Enter")
    page.wait_for_selector("article.assistant .answer > .text >> text=On and on")
    for view, sign in (("engine", ".lanes td >> text=decode"), ("build", "#build .card")):
        page.click(f"#view-{view}")
        page.wait_for_selector(sign)
        for width in (360, 1280):
            page.set_viewport_size({"width": width, "height": 900})
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                page.screenshot(path=shots / f"{view}-{width}-{scheme}.jpg", quality=75)
                assert_reads_well(page)


def assert_reads_well(page: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wide) == 0
    found = Axe().run(page).response["violations"]
    assert [(one["id"], [node["html"][:200] for node in one["nodes"][:3]]) for one in found] == []
