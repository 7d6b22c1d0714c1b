"""Addresses; requests themselves are tested through the verbs that send them."""

from __future__ import annotations

from enginehouse.server.client.connection import parse_address


def test_an_address_may_have_the_path_of_the_api() -> None:
    bases = {"": "/v1", "/": "/v1", "/v1/": "/v1", "/v1/openai": "/v1/openai"}
    for path, base in bases.items():
        assert parse_address(f"http://127.0.0.1:8000{path}").base == base
    assert str(parse_address("https://[::1]/v1")) == "https://[::1]:443"


def test_only_what_is_this_machine_for_certain_is_loopback() -> None:
    for host in ("127.0.0.1", "127.1.2.3", "localhost:9/v1", "[::1]:9"):
        assert parse_address(f"http://{host}").is_loopback
    for host in ("192.0.2.1", "0.0.0.0", "localhost.example.test", "[2001:db8::1]"):
        assert not parse_address(f"http://{host}").is_loopback
