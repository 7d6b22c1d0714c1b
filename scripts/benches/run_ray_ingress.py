"""Ray Serve's HTTP ingress before a server: `run_ray_ingress.py PORT UPSTREAM COMMAND...`.

COMMAND is that server, a child of this process, which listens on port UPSTREAM. Serve's proxy takes
requests on PORT and hands them to one replica, which asks the server and passes on what comes,
as it comes: the least that Serve's ingress has to do where the API is the server's.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncIterator

import aiohttp
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

_NOT_HANDED_ON = ("content-length", "transfer-encoding", "connection", "date", "server")


@serve.deployment(max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
class Ingress:
    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, request: Request) -> Response:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0)
            timeout = aiohttp.ClientTimeout(total=None)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        kept = {name: text for name, text in request.headers.items() if name != "host"}
        answer = await self._session.request(
            request.method,
            self._upstream + request.url.path,
            data=await request.body(),
            headers=kept,
        )
        headers = {k: v for k, v in answer.headers.items() if k.lower() not in _NOT_HANDED_ON}
        if answer.headers.get("content-type", "").startswith("text/event-stream"):
            return StreamingResponse(_pieces(answer), answer.status, headers)
        return Response(await answer.read(), answer.status, headers)


async def _pieces(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async for piece in answer.content.iter_any():
        yield piece


def main() -> None:
    port, upstream, *command = sys.argv[1:]
    server = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        ray.init("local", include_dashboard=False, log_to_driver=False, num_cpus=2)
        serve.start(http_options={"host": "127.0.0.1", "port": int(port), "access_log": False})
        serve.run(Ingress.bind(f"http://127.0.0.1:{upstream}"), name="ingress")
        server.wait()
    finally:
        server.terminate()
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
