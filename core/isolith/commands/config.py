"""`isolith config`: every setting, its value, where that came from, and what it means."""

import argparse
from typing import Any

from isolith import dispatch
from isolith.commands.command import Command, entries
from isolith.config import Settings, effective


def setting_rows(settings: Settings) -> list[dict[str, Any]]:  # Any: JSON
    """The settings in force."""
    return [
        {
            "name": row.name,
            "variable": row.variable,
            "value": dict(row.value) if row.name == "kernels" else row.value,
            "shown": shown(row.name, row.value),
            "source": row.source,
            "meaning": row.meaning,
        }
        for row in effective(settings)
    ]


def shown(name: str, value: Any) -> str:  # Any: settings are of several types
    """A value as one would write it in the environment."""
    if isinstance(value, bool):
        return str(int(value))
    if name == "kernels":
        return ",".join(f"{operator}={kernel}" for operator, kernel in value) or "unset"
    if isinstance(value, tuple):
        return ",".join(value)
    return value or "unset"


def answer(options: argparse.Namespace) -> list[dict[str, Any]]:  # Any: JSON
    """Every setting in force."""
    return setting_rows(dispatch.dispatcher().settings)


def text(rows: list[dict[str, Any]]) -> str:  # Any: JSON
    """For people."""
    return entries([(r["variable"], f"{r['shown']} ({r['source']}). {r['meaning']}") for r in rows], indent=0)


COMMAND = Command(
    name="config",
    summary="every setting, its value and where that came from",
    add_arguments=lambda _: None,
    answer=answer,
    text=text,
)
