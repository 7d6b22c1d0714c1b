"""The table of docs/families.md, made of build/hf_keys/support.py.

python scripts/family_table.py    # writes it into the page, whose other words stay
"""

from __future__ import annotations

import re
from pathlib import Path

from enginehouse.build.hf_keys.support import support

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
HEAD = (
    "| Hugging Face architecture | models | what differs from Llama | `torch` | `cpu` | `tensorrt` "
    "| `tensorrt_llm` |\n| --- | --- | --- | --- | --- | --- | --- |\n"
)


def table() -> str:
    lines = []
    for architecture, note, beyond, for_trtllm in support():
        cells = [f"`{architecture}`", note.models, note.differs, "yes", "yes"]
        cells.append("yes" if beyond is None else f"no: {beyond}")
        cells.append("yes" if for_trtllm else "no")
        lines.append(f"| {' | '.join(cells)} |\n".replace("|  |", "| |"))
    return HEAD + "".join(lines)


def filled(text: str) -> str:
    """The page with the table as it is now, in the place of the one that it has."""
    begin = re.escape(HEAD.partition("\n")[0])
    made, count = re.subn(rf"^{begin}\n(?:\|.*\n)*", lambda _: table(), text, flags=re.M)
    assert count == 1, f"{PAGE} has {count} such tables"
    return made


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
