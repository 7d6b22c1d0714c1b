"""A model hub on the loopback: folders as repositories at their revisions, in the real one's HTTP.

What it was asked is kept, and how many bytes of each file went out.
Source: huggingface_hub's requests, 0.36 and 2.4.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """folders: what {revision: folder} a repository has; commits are made from both their names.

    asked: (method, path) in order. sent: bytes by file name.
    """

    def __init__(self) -> None:
        self.folders: dict[str, dict[str, Path]] = {}
        self.asked: list[tuple[str, str]] = []
        self.sent: Counter[str] = Counter()
        self.url = ""

    def commit(self, repo: str, revision: str) -> str:
        return hashlib.sha1(f"{repo} {revision}".encode()).hexdigest()

    def folder(self, repo: str, revision: str) -> tuple[str, Path] | None:
        """The commit and its files, by the name of a revision or the commit itself."""
        for name, folder in self.folders.get(repo, {}).items():
            commit = self.commit(repo, name)
            if revision in (name, commit):
                return commit, folder
        return None

    def gets(self, name: str) -> int:
        """How often a file was asked for, whole or in part."""
        return sum(method == "GET" and path.endswith(f"/{name}") for method, path in self.asked)


@contextmanager
def hub_on_loopback() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append((self.command, path))
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/(.+)|/tree/([^/]+).*)?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if api is not None:
                self._listing(api[1], api[3] or api[4] or "main", tree=api[4] is not None)
            elif file is not None:
                self._file(*file.groups())
            else:
                self._answer(404, {})

        do_HEAD = do_GET

        def _listing(self, repo: str, revision: str, *, tree: bool) -> None:
            found = self._found(repo, revision)
            if found is None:
                return
            commit, folder = found
            sizes = {
                str(path.relative_to(folder)): path.stat().st_size
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
            body: Any = [
                {"type": "file", "path": name, "size": size, "oid": _oid(folder / name)}
                for name, size in sizes.items()
            ]
            if not tree:
                files = [{"rfilename": name, "size": size} for name, size in sizes.items()]
                body = {"id": repo, "sha": commit, "siblings": files}
            data = json.dumps(body).encode()
            self._answer(200, {"Content-Type": "application/json"}, data)

        def _file(self, repo: str, revision: str, name: str) -> None:
            found = self._found(repo, revision)
            if found is None:
                return
            commit, folder = found
            if not (folder / name).is_file():
                return self._answer(404, {"X-Error-Code": "EntryNotFound"})
            data, total = (folder / name).read_bytes(), (folder / name).stat().st_size
            headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(folder / name)}"'}
            headers["Accept-Ranges"] = "bytes"
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if wanted is not None:
                first, last = int(wanted[1]), min(int(wanted[2] or total), total - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{total}"
                data = data[first : last + 1]
            if self.command == "GET":
                hub.sent[name] += len(data)
            self._answer(206 if wanted else 200, headers, data)

        def _found(self, repo: str, revision: str) -> tuple[str, Path] | None:
            found = hub.folder(repo, revision)
            if found is None:
                code = "RevisionNotFound" if repo in hub.folders else "RepoNotFound"
                self._answer(404, {"X-Error-Code": code})
            return found

        def _answer(self, status: int, headers: dict[str, str], data: bytes = b"") -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
