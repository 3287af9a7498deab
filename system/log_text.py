"""What this package logs, in whatever program: names of files and the like without what a terminal would obey."""

from __future__ import annotations

import logging

from .plain_text import printable_lines


class PlainRecords(logging.Handler):
    """Stands before every other handler of the package's loggers, and writes nothing itself.

    (A logger's filters do not see what the loggers below it log; its handlers do, and before those above it.)
    """

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args = printable_lines(record.getMessage()).replace("\r", "\\x0d"), None
        last = logging.lastResort  # where nobody has set up logging, this handler stands in its way
        if last is not None and not logging.getLogger().handlers and record.levelno >= last.level:
            last.handle(record)


def log_plainly(package: str) -> None:
    """Have all loggers of the package log so; calling it again changes nothing."""
    logger = logging.getLogger(package)
    if not any(isinstance(handler, PlainRecords) for handler in logger.handlers):
        logger.addHandler(PlainRecords())
