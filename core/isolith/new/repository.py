"""A new vendor's repository: it installs, is found, claims nothing, and its conformance run is its test suite."""

import keyword
import re
from pathlib import Path
from string import Template

import torch

from isolith import plugins
from isolith.backend import API_VERSION
from isolith.errors import ConfigError
from isolith.new.templates import filled
from isolith.ops import OPERATORS

FILES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "isolith_$name/__init__.py": "init.py",
    "isolith_$name/norm.py": "norm.py",
    "isolith_$name/twin.py": "twin.py",
    "isolith_$name/waivers.toml": "waivers.toml",
    "isolith_$name/py.typed": "",
    "tests/test_conformance.py": "test_conformance.py",
}
"""Every file of the repository, and the template that it is made of."""


def check_name(name: str) -> None:
    """Raise ConfigError for a name that no backend can have here."""
    # torch reads the name of a device type as letters and underscores.
    if not re.fullmatch(r"[a-z]+(_[a-z]+)*", name) or keyword.iskeyword(name):
        raise ConfigError(f"new-backend: a name has lower-case letters, with single _ between them; got {name!r}.")
    if name in OPERATORS:
        raise ConfigError(f"new-backend: {name} is the name of an operator.")
    for row in plugins.discover():
        if row.name == name:
            raise ConfigError(f"new-backend: {row.origin} offers a backend {name!r} already.")
    if hasattr(torch, name) or is_device_type(name):
        raise ConfigError(f"new-backend: torch.{name} or a device type {name!r} is torch's own; choose another name.")


def is_device_type(name: str) -> bool:
    """Whether torch reads the name as a device."""
    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True


def new_backend(name: str, parent: Path) -> tuple[Path, ...]:
    """Write `isolith-NAME` below a folder; gives its files.

    Raises:
        ConfigError: for a name that is illegal or taken, or where the repository's folder exists; nothing is written.
    """
    check_name(name)
    folder = parent / f"isolith-{name}"
    if folder.exists():
        raise ConfigError(f"new-backend: {folder} exists; nothing was written.")
    words = {"name": name, "api_version": str(API_VERSION)}
    texts = {
        folder / Template(path).substitute(words): filled("backend", source, **words) for path, source in FILES.items()
    }
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tuple(texts)
