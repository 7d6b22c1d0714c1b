"""A visit of a browser to the page, and the server that it visits, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from makers.paths import ROOT


@contextmanager
def served(arguments: Sequence[str] = ()) -> Iterator[str]:
    """A server's address, for as long as it is wanted."""
    command = [sys.executable, str(ROOT / "tests" / "doubles" / "page_server.py"), *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        try:
            port = process.stdout.readline().strip()
            assert port, f"the server ended with {process.wait(30)}"
            yield f"http://127.0.0.1:{port}"
        finally:
            process.stdin.close()
            process.wait(30)


class Visit:
    """One browser with a storage of its own, and all that its console said."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(15_000)
        self.page = self.context.new_page()
        self.address = address
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self._note(message.type, message.text))
        self.page.on("pageerror", lambda error: self._note("error", str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def _note(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.said.append(text)

    def open(self) -> Any:
        self.page.goto(self.address)
        self.page.wait_for_selector("body[data-ready]", state="attached")
        return self.page

    def ask(self, text: str) -> Any:
        """Send it, and wait for the answer's end: its box."""
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")
        return self.answer()

    def answer(self) -> Any:
        self.page.wait_for_selector("#send:not(.is-stop)")
        return self.page.locator("article.assistant").last

    def close(self) -> None:
        self.context.close()
