"""Every wrong adapter is found on the twin by the samples of its operator; the twin runs in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cut_adapters import CUTS
from wrong_adapters import WRONG

HERE = Path(__file__).parent
SOME = (
    "epsilon_is_the_default",
    "cos_and_sin_exchanged",
    "index_k_major",
    "bias_is_the_default",
    "counts_as_group_list",
    "zeros_divided_by_zero",
)
CHIPS = ("a3", "a5")


def trials(*words: str, chip: str = "a3") -> dict[str, object]:
    """What `trials.py` prints on a chip."""
    command = [sys.executable, str(HERE / "trials.py"), *words]
    environment = {**os.environ, "ISOLITH_TWIN": chip}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1200, env=environment)
    return json.loads(done.stdout)


def test_there_are_at_least_forty():
    assert len({wrong.name for wrong in (*WRONG, *CUTS)}) == len(WRONG) + len(CUTS) >= 40


def test_every_one_is_of_a_chip_that_is_tried():
    assert {wrong.twin for wrong in (*WRONG, *CUTS)} <= set(CHIPS)


def test_every_text_that_is_cut_stands_once():
    backend = HERE.parents[1] / "isolith_backends" / "ascend"
    texts = {cut.name: (backend / f"{cut.module}.py").read_text().count(cut.before) for cut in CUTS}
    assert {name: count for name, count in texts.items() if count != 1} == {}


def test_every_one_changes_a_call_that_the_vendor_has():
    schemas = json.loads((HERE.parents[1] / "isolith_backends" / "ascend" / "schemas.json").read_text())
    known = {entry["name"].partition("::")[2].partition(".")[0] for entry in schemas["ops"]}
    assert {wrong.call for wrong in WRONG} <= known


def test_some_are_found():
    assert [name for name, found in trials("wrong", *SOME).items() if not found] == []


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_all_are_found(chip):
    assert [name for name, found in trials("wrong", chip=chip).items() if not found] == []


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_the_right_adapters_are_not(chip):
    assert {name: found for name, found in trials("right", chip=chip).items() if found} == {}
