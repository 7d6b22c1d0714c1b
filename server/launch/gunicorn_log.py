"""gunicorn's own lines, among those of our processes: one form, and no worker waits for them.

What a configuration sends elsewhere (`errorlog`) goes there as gunicorn writes it.
"""

from __future__ import annotations

from typing import Any

from gunicorn.glogging import Logger as GunicornLogger

from enginehouse.server.launch import gunicorn_hooks


class Logger(GunicornLogger):
    """Is made before gunicorn says anything."""

    def __init__(self, cfg: Any) -> None:
        gunicorn_hooks.start_log()
        super().__init__(cfg)

    def setup(self, cfg: Any) -> None:
        """When it starts, and when its configuration is read again."""
        super().setup(cfg)
        if cfg.errorlog == "-":
            for handler in list(self.error_log.handlers):
                if getattr(handler, "_gunicorn", False):
                    self.error_log.removeHandler(handler)
            self.error_log.propagate = True
