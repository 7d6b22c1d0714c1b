"""Long texts made here, the same everywhere: lines of a merchant's ledger, no two alike.

Knows no tokenizer.
"""

from __future__ import annotations

_WHO = ("The baker", "A glazier", "The ferryman", "Our cooper", "The widow Lang", "A pedlar")
_WHERE = ("Ulm", "Ghent", "Bergen", "Riga", "Cadiz", "Lyon", "Turin")
_WHAT = ("loaves of rye", "panes of glass", "barrels of herring", "bolts of linen", "wax candles")
_HOW = ("at the spring fair", "before the frost", "by the old bridge", "on credit", "in the rain")


def ledger(lines: int, first: int = 1) -> str:
    """So many lines, about 25 tokens each, numbered from `first`: another number is another text.
    A generator of Lehmer's chooses the words.
    """
    state = 20261 + first

    def pick(words: tuple[str, ...]) -> str:
        nonlocal state
        state = state * 48271 % 2147483647
        return words[state % len(words)]

    made = []
    for number in range(first, first + lines):
        who, where, what, how = pick(_WHO), pick(_WHERE), pick(_WHAT), pick(_HOW)
        made.append(f"{number}. {who} of {where} sold {state % 89 + 2} {what} {how}.")
    return "\n".join(made)


def repeated(text: str, times: int) -> str:
    return "\n".join([text.strip("\n")] * times)
