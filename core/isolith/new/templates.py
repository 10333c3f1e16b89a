"""The templates: plain files of this package, with `$name` where the name goes."""

from importlib.resources import files
from string import Template

FOLDER = files("isolith.new") / "templates"


def filled(kind: str, source: str, /, **words: str) -> str:
    """The text of a template with its words; the empty name stands for an empty file."""
    return Template((FOLDER / kind / f"{source}.tmpl").read_text()).substitute(words) if source else ""
