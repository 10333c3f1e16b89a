"""The guide for vendors is replayed from its Markdown, and ends with the repository that it is the README of."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from guide import Replay, blocks_of, changed, missing, own_environment

ROOT = Path(__file__).parents[2]
ACME = ROOT / "plugins" / "isolith-acme"


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["sample", "whole"])
def test_the_guide_for_vendors_makes_the_repository_that_it_stands_in(tmp_path, slow):
    programs = own_environment(tmp_path)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "ISOLITH": str(ROOT), "HOME": str(tmp_path)}
    replay = Replay(tmp_path, {**environment, "COLUMNS": "100", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})
    for block in blocks_of((ACME / "README.md").read_text()):
        if slow or "slow" not in block.options:
            replay.replay(block)
    made = tmp_path / "isolith-acme"
    for path in sorted(ACME.rglob("*")):
        name = path.relative_to(ACME)
        if path.is_file() and path.suffix in (".py", ".toml", ".typed") and "__pycache__" not in path.parts:
            assert (made / name).read_text() == path.read_text(), name


@pytest.mark.parametrize(
    ("expected", "printed", "absent"),
    [
        (["a 1"], "a 27\n", None),
        (["a 1"], "b 1\n", "a 1"),
        (["a 1"], "a 1\nb\n", "b"),
        (["a", "…", "c"], "a\nb\nc\n", None),
        (["a", "…", "c"], "a\nc\nb\n", "b"),
        (["…", "3 passed"], "3 passed, 1 FAIL\n", "3 passed"),
        (["a … c"], "a  b c\n", None),
        ([], "anything\n", None),
    ],
)
def test_a_transcript_that_is_not_printed_is_seen(expected, printed, absent):
    assert missing(expected, printed) == absent


def test_a_change_of_lines_that_are_not_there_is_seen():
    assert changed("a\nb\nc\n", " a\n-b\n+x\n") == "a\nx\nc\n"
    with pytest.raises(AssertionError, match="0 times"):
        changed("a\nb\n", "-x\n")
