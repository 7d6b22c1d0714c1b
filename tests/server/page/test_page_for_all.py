"""The page for everybody: keys, storage, narrow screens, the dark, keyboards, and no attacker."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from makers.page_visit import Visit, served

PHONE = {"width": 360, "height": 740}
MOST_BYTES = 150_000


def test_a_server_with_keys_is_asked_for_once_one_is_given(browser: Any) -> None:
    with served(["--key", "sesame"]) as address:
        visit = Visit(browser, address)
        page = visit.page
        page.goto(address)
        page.wait_for_selector("#key-dialog[open]")
        assert "wanted the header Authorization" in page.inner_text("#key-words")
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-words >> text=an unknown key")
        page.fill("#key", "sesame")
        page.keyboard.press("Enter")
        page.wait_for_selector("body[data-ready]", state="attached")
        assert "Paris" in visit.ask("Hello").inner_text()
        visit.open()
        assert not page.is_visible("#key-dialog"), "it is kept with the tab"
        assert page.evaluate("localStorage.length") == 0
        assert {text for text in visit.said if "401" not in text} == set()
        visit.close()


def test_a_reload_keeps_conversations_and_they_go_out_and_in_as_a_file(
    visit: Visit, tmp_path: Path, browser: Any, site: str
) -> None:
    page = visit.open()
    visit.ask("Hello")
    page.click("#new")
    visit.ask("think")
    visit.open()
    assert page.locator("#conversations .title").all_inner_texts() == ["think", "Hello"]
    assert page.inner_text("article.user .text") == "think"
    assert page.inner_text(".answer > .text") == "Then I say it."
    page.get_by_role("button", name="Hello", exact=True).click()
    assert "Paris" in page.inner_text(".answer > .text")
    with page.expect_download() as download:
        page.click("#export")
    path = tmp_path / "kept.json"
    download.value.save_as(path)
    other = Visit(browser, site)
    there = other.open()
    there.set_input_files("#import-file", str(path))
    there.wait_for_selector("#kept >> text=2 imported")
    there.get_by_role("button", name="think", exact=True).click()
    assert there.inner_text(".answer > .text") == "Then I say it."
    there.get_by_role("button", name="Delete think").click()
    there.wait_for_selector("#conversations .title >> text=think", state="detached")
    assert len(other.open().locator("#conversations .title").all()) == 1
    assert other.said == []
    other.close()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "The file is no JSON"),
        ('{"format": "other"}', "holds no conversations"),
        (
            '{"format": "enginehouse.conversations", "conversations": [{"nodes": {"root": '
            '{"children": ["a"]}}}]}',
            "is damaged; nothing was imported",
        ),
    ],
)
def test_a_file_that_is_no_export_is_refused_in_words(
    visit: Visit, tmp_path: Path, text: str, words: str
) -> None:
    page = visit.open()
    (tmp_path / "bad.json").write_text(text, encoding="utf-8")
    page.set_input_files("#import-file", str(tmp_path / "bad.json"))
    page.wait_for_selector(f"#kept >> text={words}")
    assert page.locator("#conversations li").count() == 0


def test_what_a_model_says_stays_text(browser: Any) -> None:
    name = "<img src=x onerror=window.hacked=1>"
    with served(["--model", name]) as address:
        visit = Visit(browser, address)
        page = visit.open()
        assert page.inner_text("#model").startswith(name)
        assert page.title() == "enginehouse"
        tool = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
        page.fill("#tools", json.dumps([tool]))
        call = visit.ask("evil tool")
        assert "<img src=x" in call.locator(".call pre").inner_text()
        page.get_by_label("Result of get_weather").fill("<script>window.hacked=1</script>")
        page.get_by_role("button", name="Send results").click()
        page.wait_for_selector("article.tool")
        visit.answer()
        answer = visit.ask("attack")
        said = answer.locator(".answer > .text")
        assert "<script>window.hacked = 1</script>" in said.inner_text()
        assert page.locator("main img, main script, main iframe").count() == 0
        hrefs = [link.get_attribute("href") for link in page.locator("main a").all()]
        assert hrefs and all(href.startswith("https://example.com/") for href in hrefs)
        assert page.evaluate("window.hacked") is None
        assert visit.said == []
        assert all(url.startswith((address, "blob:")) for url in visit.asked)
        visit.close()


def test_nothing_is_wider_than_the_screen(visit: Visit, shots: Path) -> None:
    page = visit.open()
    visit.ask("markdown")
    for width in (320, 360, 768, 1280, 2560):
        page.set_viewport_size({"width": width, "height": 800})
        page.evaluate("document.body.classList.remove('shows-settings')")
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(wide) == 0, width
        for name in ("#prompt", "#send", "#model"):
            box = page.locator(name).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width, (name, width)
        if width < 1000:
            page.click("#toggle-settings")
            assert page.is_visible("#field-temperature")
            page.click("#toggle-settings")
            page.click("#toggle-list")
            page.get_by_role("button", name="markdown", exact=True).click()
            assert not page.is_visible("#list")
        page.screenshot(path=shots / f"chat-{width}.jpg", quality=75)


@pytest.mark.parametrize("size", [PHONE, {"width": 1280, "height": 800}], ids=["phone", "desktop"])
def test_axe_finds_nothing_in_the_light_or_in_the_dark(
    browser: Any, site: str, size: dict[str, int], shots: Path
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    visit = Visit(browser, site, viewport=size)
    page = visit.open()
    if size is not PHONE:
        page.click("text=More fields")
        page.select_option("#field-logprobs", "true")
    visit.ask("think")
    if size is not PHONE:
        page.fill("#field-n", "2")
    answer = visit.ask("markdown")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, paper[4:-1].split(", "))) > 3 * 128) == (scheme == "light")
        page.screenshot(path=shots / f"chat-{size['width']}-{scheme}.jpg", quality=75)
        if size is not PHONE:
            answer.get_by_role("button", name="Probabilities").click()
            page.locator(".token").first.hover()
            page.screenshot(path=shots / f"probabilities-{scheme}.jpg", quality=75)
        found = Axe().run(page)
        told = [
            (one["id"], one["impact"], [node["html"][:200] for node in one["nodes"][:3]])
            for one in found.response["violations"]
        ]
        assert told == [], scheme
        if size is not PHONE:
            answer.get_by_role("button", name="Probabilities").click()
    assert visit.said == []
    visit.close()


def test_the_colours_can_be_chosen_and_stay(visit: Visit) -> None:
    page = visit.open()
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.click("#theme")
    page.click("#theme")
    dark = page.evaluate(paper)
    assert dark != light
    visit.open()
    assert page.evaluate(paper) == dark
    page.click("#theme")
    assert page.evaluate(paper) == light


def test_all_of_it_can_be_done_with_the_keyboard(visit: Visit) -> None:
    page = visit.open()
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    page.keyboard.press("Enter")
    answer = visit.answer()
    assert page.inner_text("article.user .text") == "Hello\nthere"
    assert "Paris" in answer.inner_text()
    assert "The answer: " in page.text_content("#status")
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "(e => e.id || e.getAttribute('aria-label') || e.textContent)"
                "(document.activeElement)"
            )
        )
    wanted = {"new", "export", "theme", "set-key", "send", "Regenerate", "Edit", "Copy answer"}
    assert wanted | {"system", "field-temperature", "tools"} <= reached
    page.focus("#set-key")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key-dialog[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("#key-dialog", state="hidden")


def test_the_first_visit_takes_little_and_the_second_nearly_nothing(
    visit: Visit, record_property: Callable[[str, object], None]
) -> None:
    session = visit.context.new_cdp_session(visit.page)
    session.send("Network.enable")
    sizes: list[float] = []
    session.on("Network.loadingFinished", lambda event: sizes.append(event["encodedDataLength"]))
    page = visit.open()
    first, num = sum(sizes), len(sizes)
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    sizes.clear()
    visit.open()
    record_property("transferred", f"{first:.0f} bytes in {num}, then {sum(sizes):.0f}")
    record_property("first_paint_ms", round(paint))
    print(f"{first:.0f} bytes in {num} files, then {sum(sizes):.0f}; first paint {paint:.0f} ms")
    assert 10_000 < first < MOST_BYTES
    assert sum(sizes) < first / 2


def test_what_is_copied_as_code_asks_the_same(visit: Visit) -> None:
    page = visit.open()
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.fill("#system", 'It\'s "brief"; \\ $HOME\u2028')
    page.fill("#field-top_k", "20")
    page.fill("#field-temperature", "0.5")
    answer = visit.ask("Say 'hello' — 你好 🙂")
    copied = {}
    for name in ("curl", "Python", "JavaScript"):
        answer.locator("summary", has_text="Copy as").click()
        answer.get_by_role("button", name=name, exact=True).click()
        page.wait_for_selector(f"#status >> text={name} copied", state="attached")
        copied[name] = page.evaluate("navigator.clipboard.readText()")
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    for command in (["bash", "-c", copied["curl"]], [sys.executable, "-c", copied["Python"]]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
        assert done.returncode == 0, done.stderr
        assert "Paris" in done.stdout
    assert "top_k" in copied["JavaScript"]
    if node := shutil.which("node"):
        done = subprocess.run(
            [node, "--input-type=module", "-e", copied["JavaScript"]],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "Paris" in done.stdout, done.stderr
