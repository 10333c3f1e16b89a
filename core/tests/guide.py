"""Replays a page of Markdown: runs its commands, writes its files, applies its changes, compares what is printed.

    ```console            lines behind "$ " are run; the lines below them must be printed, "…" standing for anything
    ```console exit=1     the last command ends so; `slow` beside it leaves the block to the slow tests
    ```python title="a"   is written to the file a
    ```diff title="a"     changes it: the lines with " " and "-" must be there, once

Numbers in what is printed may differ, so that a page does not go stale with every sample.
"""

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TITLE = re.compile(r'title="([^"]+)"')


@dataclass
class Block:
    language: str
    options: str
    text: str

    @property
    def title(self):
        found = TITLE.search(self.options)
        return found and found[1]

    @property
    def code(self):
        found = re.search(r"exit=(\d+)", self.options)
        return int(found[1]) if found else 0


def blocks_of(page):
    return [Block(*found.groups()) for found in FENCE.finditer(page)]


def commands_of(text):
    """(command, expected lines) of a transcript."""
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
    return [(part.splitlines()[0], part.splitlines()[1:]) for part in parts]


def pattern(line):
    """What a line of a transcript matches: any number where it has one, anything for "…"."""
    parts = re.split(r"( ?… ?|\d+)", " ".join(line.split()))
    return "".join(".*" if "…" in part else r"\d+" if part.isdigit() else re.escape(part) for part in parts)


def missing(expected, printed):
    """The first expected line that is not printed in its place; None where all are."""
    lines, anywhere = [" ".join(line.split()) for line in printed.splitlines() if line.strip()], False
    for line in expected:
        if not line.strip():
            continue
        if line.strip() == "…":
            anywhere = True
            continue
        while lines and anywhere and not re.fullmatch(pattern(line), lines[0]):
            del lines[0]
        if not lines or not re.fullmatch(pattern(line), lines.pop(0)):
            return line
        anywhere = False
    return lines[0] if lines and not anywhere and expected else None


def changed(source, change):
    """The text with a diff applied."""
    lines = change.splitlines(keepends=True)
    old = "".join(line[1:] or "\n" for line in lines if not line.startswith("+"))
    new = "".join(line[1:] or "\n" for line in lines if not line.startswith("-"))
    assert source.count(old) == 1, f"these lines are there {source.count(old)} times:\n{old}"
    return source.replace(old, new)


def own_environment(folder):
    """A virtual environment over this one, without network: what is installed in it stays in the folder."""
    bin_folder = folder / "venv" / "bin"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bin_folder.parent], check=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (site / "beneath.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in ours))
    offline = "--no-deps --no-build-isolation --no-index --quiet --disable-pip-version-check"
    programs = {"isolith": '-m isolith "$@"', "pytest": '-m pytest "$@"', "pip": f'-m pip "$@" {offline}'}
    for name, words in programs.items():
        (bin_folder / name).write_text(f'#!/bin/sh\nexec "{bin_folder}/python" {words}\n')
        (bin_folder / name).chmod(0o755)
    return bin_folder


class Replay:
    """A page in progress: the folder that its commands have gone to, and their environment."""

    def __init__(self, folder, environment):
        self.folder, self.environment = folder, environment
        self.place = folder

    def replay(self, block):
        path = self.place / (block.title or "")
        if block.language == "console":
            for command, expected in (commands := commands_of(block.text)):
                last = command == commands[-1][0]
                self.run(command, expected, block.code if last else 0)
        elif block.title and block.language == "diff":
            path.write_text(changed(path.read_text(), block.text))
        elif block.title:
            path.write_text(block.text)

    def run(self, command, expected, code):
        script = f"cd {shlex.quote(str(self.place))}\n{command}\ncode=$?\npwd >&3\nexit $code"
        done = subprocess.run(
            ["bash", "-c", f"exec 3>{shlex.quote(str(self.folder / 'place'))}\n{script}"],
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=900,
        )
        printed = done.stdout + done.stderr
        assert done.returncode == code, f"$ {command}\n{printed}"
        absent = missing(expected, printed)
        assert absent is None, f"$ {command}\nprinted\n{printed}\nand not\n{absent}"
        self.place = Path((self.folder / "place").read_text().strip())
