"""An error that nobody thought of -> one sentence, and the place of its traceback."""

from __future__ import annotations

import tempfile
import traceback


def unexpected_fault(error: Exception, prog: str) -> str:
    """prog: the program's name, with which the file that holds the traceback begins."""
    what = f"stopped by an unexpected {type(error).__name__}"
    what += f" ({' '.join(str(error).split())[:200]})" if str(error).strip() else ""
    try:
        descriptor, log = tempfile.mkstemp(prefix=f"{prog}-", suffix=".log")
        with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
            traceback.print_exception(error, file=file)
    except OSError as failure:
        return f"{what}, whose traceback could not be kept: {failure.strerror}"
    return f"{what}, which is a fault of enginehouse: report it with its traceback, {log}"
