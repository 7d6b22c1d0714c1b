"""`enginehouse families`: which architectures can be built, and which backends run them."""

from __future__ import annotations

from enginehouse.verbs.base import VerbParser


def main(argv: list[str]) -> int:
    parser = VerbParser(
        "families",
        "",
        "List the Hugging Face architectures that can be built, the models they are, and which "
        "backends run them; docs/families.md says how each differs from Llama. A checkpoint of "
        "another one is refused.",
        "enginehouse families",
    )
    parser.parse_args(argv)
    from rich.console import Console
    from rich.table import Table

    from enginehouse.build.hf_keys.support import support

    shown = Table(box=None)
    shown.add_column("architecture", no_wrap=True)
    for heading in ("models", "torch", "cpu", "tensorrt", "tensorrt_llm"):
        shown.add_column(heading)
    for architecture, note, beyond, for_trtllm in support():
        by_network = "yes" if beyond is None else f"no: {beyond}"
        models, by_trtllm = note.models.replace("`", ""), "yes" if for_trtllm else "no"
        shown.add_row(architecture, models, "yes", "yes", by_network, by_trtllm)
    Console().print(shown)
    return 0
