"""Log lines: text for people, or one JSON object a line for machines.

Only our own loggers follow the level that is asked for. Libraries say what is wrong and no more, whatever it is: at
`debug` some of them write headers, and a header may be a key.
"""

import json
import logging
import sys
import time
from typing import Any, Literal, TextIO

Format = Literal["text", "json"]

FIELDS = "behest_fields"
"""In `extra`: a mapping of what belongs to the line beside its text. Only the JSON form shows it."""
OUR_LOGGERS = ("behest_proxy", "behest_ledger", "behest_operator")


class JsonFormatter(logging.Formatter):
    """One JSON object (RFC 8259) a line, ASCII only, so that no value can begin a line of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        members: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        members |= getattr(record, FIELDS, None) or {}
        if record.exc_info:
            members["exception"] = self.formatException(record.exc_info)
        return json.dumps(members, ensure_ascii=True, default=str)


def configure(level: str, form: Format = "text", stream: TextIO | None = None) -> None:
    """Write lines to standard error from now on: ours from `level`, others' from `warning`."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        JsonFormatter() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(level.upper())
