"""The commands of BRINGUP.md run: on the twin they give what is likely."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from isolith_backends import ascend

TEXT = (Path(ascend.__file__).parent / "BRINGUP.md").read_text()
COMMANDS = re.findall(r'^ *python -c "(.*)"$', TEXT, re.MULTILINE)
CHIPS = {
    # A word of a command, the chip that it is for, and what is printed.
    "kv_compress_epilog": ("a5", r"\[0, 64, 0, 64, .*"),
    "norm_type": ("a3", r".*0\.8808.*"),
    "npu_grouped_matmul": ("a3", r".*64\., *64\., *64\., *64\.,.*nan.*"),
    "quant_lightning_indexer": ("a5", r".*\[ *0, *1, *2,.* 63\].*"),
}
PROGRAM = """
import contextlib, io, json, sys, isolith_backends.ascend.twin
said = []
for code in json.loads(sys.stdin.read()):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    said.append(" ".join(out.getvalue().split()))
print(json.dumps(said))
"""


def of_chip(chip):
    """The words of the commands for a chip, with the commands."""
    return {word: next(c for c in COMMANDS if word in c) for word, (its, _) in CHIPS.items() if its == chip}


@functools.cache
def said(chip):
    """What the commands of a chip print on its twin."""
    commands = of_chip(chip)
    environment = {**os.environ, "ISOLITH_TWIN": chip}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(list(commands.values())),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(commands, json.loads(done.stdout), strict=True))


def test_every_command_is_tried():
    assert len(COMMANDS) == len(CHIPS)


@pytest.mark.parametrize("word", CHIPS)
def test_command_gives_what_is_likely(word):
    chip, likely = CHIPS[word]
    assert re.fullmatch(likely, said(chip)[word])
