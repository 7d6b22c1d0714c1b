"""What the environment says of a server, the engine's own choices, and what is no setting."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest

from doubles.scripted_client import ScriptedClient
from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.app import create_app
from enginehouse.server.settings import ServerSettings
from makers.text_engine import write_text_engine

ENVIRONMENT = {"ENGINEHOUSE_HOST_ADDRESS": "ipc:///tmp/x"}


def test_settings_come_from_the_environment_with_the_page_s_prices(
    settings: ServerSettings,
) -> None:
    env = {**ENVIRONMENT, "ENGINEHOUSE_ENGINE": str(settings.engine_dir)}
    plain = ServerSettings.from_environment(env)
    assert (plain.model_name, plain.max_body_bytes) == ("tiny/chat", 16 * 2**20)
    assert (plain.price_input, plain.price_output) == (Decimal("0.35"), Decimal("0.40"))
    env |= {"ENGINEHOUSE_MODEL_NAME": "m", "ENGINEHOUSE_KEEPALIVE_S": "2.5"}
    assert ServerSettings.from_environment(env).model_name == "m"
    assert ServerSettings.from_environment(env).keepalive_s == 2.5
    env |= {"ENGINEHOUSE_HOST_ADDRESS": "tcp://10.0.0.1:5555", "ENGINEHOUSE_OPEN_HOST": "1"}
    env |= {"ENGINEHOUSE_OPEN_PAGES": "docs"}
    opened = ServerSettings.from_environment(env)
    assert (opened.host_address, opened.open_pages) == ("tcp://10.0.0.1:5555", ("docs",))
    assert not opened.log_prompts and opened.is_open and opened.host_key_path is None
    named = {"ENGINEHOUSE_OPEN_HOST": "0", "ENGINEHOUSE_HOST_KEY_FILE": "/k"}
    locked = ServerSettings.from_environment({**env, **named, "ENGINEHOUSE_REPLICAS_FILE": "/r"})
    assert (locked.host_key_path, locked.is_open) == (Path("/k"), False)
    assert locked.replicas_path == Path("/r")
    env |= {"ENGINEHOUSE_OPEN_PAGES": "none", "ENGINEHOUSE_LOG_PROMPTS": "1"}
    assert ServerSettings.from_environment(env).open_pages == ()
    assert ServerSettings.from_environment(env).log_prompts


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ENGINEHOUSE_ENGINE", ""),
        ("ENGINEHOUSE_ENGINE", "/nonexistent"),
        ("ENGINEHOUSE_HOST_ADDRESS", ""),
        ("ENGINEHOUSE_HOST_ADDRESS", "tcp://10.0.0.1:5555"),
        ("ENGINEHOUSE_OPEN_PAGES", "metrics, chat"),
        ("ENGINEHOUSE_LOG_PROMPTS", "yes"),
        ("ENGINEHOUSE_PRICE_INPUT", "-1"),
        ("ENGINEHOUSE_PRICE_OUTPUT", "NaN"),
        ("ENGINEHOUSE_PRICE_OUTPUT", "free"),
        ("ENGINEHOUSE_MAX_BODY_BYTES", "16M"),
        ("ENGINEHOUSE_MAX_BODY_BYTES", "0"),
        ("ENGINEHOUSE_KEEPALIVE_S", "0"),
        ("ENGINEHOUSE_KEEPALIVE_S", "inf"),
        ("ENGINEHOUSE_CORS_ORIGINS", "chat.example.com"),
        ("ENGINEHOUSE_CORS_ORIGINS", "https://chat.example.com/"),
        ("ENGINEHOUSE_CORS_ORIGINS", "https://a.example, https://b.example/app"),
        ("ENGINEHOUSE_CORS_ORIGINS", "https://*.example.com"),
        ("ENGINEHOUSE_CORS_ORIGINS", "https://me@a.example"),
        ("ENGINEHOUSE_CORS_ORIGINS", "*, https://a.example"),
        ("ENGINEHOUSE_CORS_ORIGINS", "null"),
    ],
)
def test_a_bad_setting_is_one_clear_sentence(
    settings: ServerSettings, variable: str, value: str
) -> None:
    env = {**ENVIRONMENT, "ENGINEHOUSE_ENGINE": str(settings.engine_dir), variable: value}
    with pytest.raises(EnginehouseError, match="wanted") as caught:
        ServerSettings.from_environment(env)
    assert (value if value == "/nonexistent" else variable) in str(caught.value)


def test_origins_are_kept_in_the_form_that_browsers_send(settings: ServerSettings) -> None:
    env = {**ENVIRONMENT, "ENGINEHOUSE_ENGINE": str(settings.engine_dir)}

    def origins(text: str) -> tuple[str, ...]:
        given = {**env, "ENGINEHOUSE_CORS_ORIGINS": text}
        return ServerSettings.from_environment(given).cors_origins

    assert origins("") == () and origins(" * ") == ("*",)
    assert origins("https://A.example:443,http://b:80, http://[::1]:3000") == (
        "https://a.example",
        "http://b",
        "http://[::1]:3000",
    )
    assert origins("http://b:443,https://c:80,app://-") == (
        "http://b:443",
        "https://c:80",
        "app://-",
    )


def test_the_server_takes_the_engine_s_formats_and_the_environment_s_before_them(
    tmp_path: Path,
) -> None:
    write_text_engine(tmp_path)
    env = {"ENGINEHOUSE_ENGINE": str(tmp_path), "ENGINEHOUSE_HOST_ADDRESS": "ipc:///tmp/x"}

    def formats(**more: str) -> tuple[str, str]:
        settings = ServerSettings.from_environment({**env, **more})
        assert settings.price_input == Decimal("0.35")
        return settings.tool_format, settings.reasoning_format

    def write(**choices: object) -> None:
        manifest = {"model": {"name": "tiny/chat"}, "choices": choices}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))

    assert formats() == ("auto", "auto")
    write(tool_format="hermes", reasoning_format="think", tp=1)
    assert formats() == ("hermes", "think")
    assert formats(ENGINEHOUSE_TOOL_FORMAT="json") == ("json", "think")
    assert formats(ENGINEHOUSE_REASONING_FORMAT="none") == ("hermes", "none")
    with pytest.raises(EnginehouseError, match="ENGINEHOUSE_TOOL_FORMAT='xml' is not known"):
        formats(ENGINEHOUSE_TOOL_FORMAT="xml")
    write(tool_format=7)
    with pytest.raises(EnginehouseError, match="tool_format=7 is not known"):
        formats()


def test_metrics_tell_when_the_master_and_not_the_worker_started(
    settings: ServerSettings, engine: ScriptedClient
) -> None:
    env = {**ENVIRONMENT, "ENGINEHOUSE_ENGINE": str(settings.engine_dir)}
    env |= {"ENGINEHOUSE_STARTED_S": "1700000000.250"}
    http = create_app(ServerSettings.from_environment(env), engine).test_client()
    assert "\nenginehouse_start_time_seconds 1.70000000025e+09\n" in http.get("/metrics").text
