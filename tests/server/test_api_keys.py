"""Where keys come from, what a line of them says, and that none is kept."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.api_keys import ApiKey, KeyLimits, make_key, read_keys

DIGEST = hashlib.sha256(b"sk-1").hexdigest()


def test_keys_come_from_the_environment_and_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    env = {"ENGINEHOUSE_API_KEYS": "a, b,"}
    assert read_keys({}) == ()
    assert read_keys(env) == (make_key("a"), make_key("b"))
    env["ENGINEHOUSE_API_KEYS_FILE"] = str(file)
    for text in (None, "", "\n \n", "# none\n"):
        if text is not None:
            file.write_text(text)
        with pytest.raises(EnginehouseError, match=r"ENGINEHOUSE_API_KEYS_FILE.*wanted"):
            read_keys(env)
    every = tuple(map(make_key, "abcd"))
    file.write_text("c\n\n d \n")
    assert read_keys(env) == every
    file.write_text("# ours\nc # mine\n  # theirs\nd\n", encoding="utf-8-sig")
    assert read_keys(env) == every


@pytest.mark.parametrize(
    ("line", "name", "limits"),
    [
        ("sk-1", f"key-{DIGEST[:8]}", KeyLimits(rpm=9)),
        ("alice sk-1", "alice", KeyLimits(rpm=9)),
        (f"alice sha256:{DIGEST.upper()}", "alice", KeyLimits(rpm=9)),
        ("alice sk-1 rpm=60 tpm=5000 concurrent=4", "alice", KeyLimits(60, 5000, 4)),
        ("tpm=7 sk-1", f"key-{DIGEST[:8]}", KeyLimits(9, 7)),
    ],
)
def test_a_line_names_a_key_its_digest_and_its_limits(
    line: str, name: str, limits: KeyLimits
) -> None:
    (found,) = read_keys({"ENGINEHOUSE_API_KEYS": line, "ENGINEHOUSE_KEY_RPM": "9"})
    assert found == ApiKey(name, bytes.fromhex(DIGEST), limits)
    assert "sk-1" not in repr(found)


@pytest.mark.parametrize(
    "env",
    [
        {"ENGINEHOUSE_API_KEYS": "two words sk-1"},
        {"ENGINEHOUSE_API_KEYS": "b@d/name sk-1"},
        {"ENGINEHOUSE_API_KEYS": "rpm=5"},
        {"ENGINEHOUSE_API_KEYS": "sk-1", "ENGINEHOUSE_KEY_TPM": "many"},
        {"ENGINEHOUSE_API_KEYS": "sk-1", "ENGINEHOUSE_KEY_CONCURRENT": "0"},
    ],
)
def test_what_is_no_key_is_refused_and_shows_none(env: dict[str, str]) -> None:
    with pytest.raises(EnginehouseError, match=r"ENGINEHOUSE_(API_KEYS|KEY_).*wanted") as caught:
        read_keys(env)
    assert "sk-1" not in str(caught.value)
