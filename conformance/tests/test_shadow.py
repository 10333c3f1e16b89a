"""Calls that shadow runs keep: judged, written, read again, run again."""

import json
import subprocess
import sys

import pytest
import torch
from distributions import RIGHT_RMS_NORM

from isolith.ops import norm
from isolith_conformance.__main__ import main
from isolith_conformance.bundle_tensors import BundleError
from isolith_conformance.judge import Verdict
from isolith_conformance.shadow import MOST_KEPT, keep, problem
from isolith_conformance.shadow_reproduce import read_call, reproduce_call

WRONG = RIGHT_RMS_NORM.replace("+ eps", "+ 2 * eps")
X, WEIGHT = 1e-3 * torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), torch.ones(64)
GIVEN = norm.rms_norm.arguments(X, WEIGHT)
PROGRAM = """
import torch, isolith
torch.manual_seed(0)
y = isolith.rms_norm(1e-3 * torch.randn(4, 64).t()[:, 1:3], torch.ones(2))
(record,) = isolith.shadows()
print(record.wrong, record.inputs)
"""


@pytest.fixture
def kept(plugin, tmp_path, monkeypatch):
    """The folder of a call that a shadow run has found wrong, and what it warned of."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("ISOLITH_SHADOW", "1")
    monkeypatch.setenv("ISOLITH_BACKEND", "bad")
    plugin("bad", WRONG)
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True)
    monkeypatch.delenv("ISOLITH_BACKEND")
    wrong, folder = run.stdout.split()
    assert wrong == "1", run.stderr
    return tmp_path / "state" / "isolith" / "shadow" / folder.rpartition("/")[2], run.stderr


def test_kept_call_fails_again_and_passes_when_the_kernel_is_mended(kept, plugin, capsys):
    folder, warned = kept
    assert f"reproduce {folder}" in warned
    assert main(["reproduce", str(folder)]) == 1
    assert "run again, rms_norm bad.rms_norm: FAIL: result 0: " in capsys.readouterr().out
    plugin("bad", RIGHT_RMS_NORM)
    assert main(["reproduce", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "the results kept: FAIL: " in said
    assert "run again, rms_norm bad.rms_norm: PASS" in said


def test_kept_call_runs_on_another_backend_by_the_kernel_that_it_selects(kept, plugin):
    plugin("good", RIGHT_RMS_NORM)
    right, said = reproduce_call(kept[0], backend="good")
    assert right
    assert said.endswith("run again, rms_norm good.rms_norm: PASS")


def test_kept_call_is_the_users_alone(kept):
    assert kept[0].stat().st_mode & 0o077 == 0


def stored(tmp_path, **changes):
    given = {**GIVEN, **changes}
    place = keep(tmp_path, norm.rms_norm, "bad.rms_norm", "hardware", "wrong", given, [torch.zeros(4, 64)])
    return place, given


def test_arguments_come_back_with_their_strides(tmp_path):
    place, given = stored(tmp_path, x=X.t().contiguous().t())
    call, arguments, results = read_call(place)
    assert torch.equal(arguments["x"], given["x"])
    assert arguments["x"].stride() == given["x"].stride() == (1, 4)
    assert (call.kernel, call.problem, results[0].shape) == ("bad.rms_norm", "wrong", (4, 64))


def test_equal_call_is_kept_once(tmp_path):
    assert stored(tmp_path)[0] == stored(tmp_path)[0]


def test_calls_kept_of_one_kernel_are_bounded(tmp_path):
    for number in range(MOST_KEPT):
        stored(tmp_path, eps=0.1 + number)
    with pytest.raises(BundleError, match=f"{MOST_KEPT} earlier calls of it are kept in"):
        stored(tmp_path, eps=0.01)


def test_tampered_inputs_are_refused(tmp_path, capsys):
    place, _ = stored(tmp_path)
    path = place / "inputs.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x11")
    assert main(["reproduce", str(place)]) == 2
    assert "its content has the hash" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("operator", "rms_nrom", "there is no operator 'rms_nrom'"),
        ("signature", "0" * 64, "the call was kept for another signature of rms_norm"),
        ("strides", {"x": [1]}, "x has 2 axes and 1 strides"),
        ("arguments", {"x": {"tensor": "y"}}, "x: there is no tensor 'y'"),
    ],
)
def test_record_that_does_not_fit_is_refused(tmp_path, part, value, says):
    place, _ = stored(tmp_path)
    path = place / "call.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), part: value}))
    with pytest.raises(BundleError) as caught:
        read_call(place)
    assert says in str(caught.value)


def test_kernel_that_is_gone_is_said(tmp_path, plugin):
    place, _ = stored(tmp_path)
    plugin("bad", RIGHT_RMS_NORM.replace("def rms_norm", "def rms_norm_faster"))
    with pytest.raises(BundleError) as caught:
        reproduce_call(place)
    assert str(caught.value) == "rms_norm has no kernel bad.rms_norm here; known: bad.rms_norm_faster."


def test_variants_pass_and_a_factor_fails():
    given = norm.rms_norm.arguments(X.bfloat16(), torch.full((64,), 0.3), round_before_weight=True)
    due = norm.rms_norm.reference(**given)
    assert problem(norm.rms_norm, given, [norm.rms_norm.variants[0](**given)]) is None
    assert problem(norm.rms_norm, given, [due * 1.02]).startswith("result 0: ")


@pytest.mark.parametrize(("gold", "right"), [(2**40, True), (-1, False)], ids=["small", "large"])
def test_gold_has_the_last_word_where_it_can_be_had(monkeypatch, gold, right):
    monkeypatch.setattr("isolith_conformance.shadow.MOST_FOR_GOLD", gold)
    no = Verdict(problem="too far", check="D", statistics={})
    monkeypatch.setattr("isolith_conformance.shadow.judge_beside", lambda *_: no)
    assert (problem(norm.rms_norm, GIVEN, [norm.rms_norm.reference(**GIVEN)]) is None) == right
