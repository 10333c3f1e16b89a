import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import isolith
from isolith import FrozenError, implements
from isolith.dispatch import Process
from isolith.freeze import describe


@implements(isolith.rms_norm)
def rms_norm(x, weight, eps=1e-6, round_before_weight=False):
    return torch.zeros_like(x)


@pytest.fixture
def thawed(monkeypatch):
    monkeypatch.setattr(Process, "frozen", False)


def test_settings_cannot_change_after_freezing(thawed):
    isolith.freeze()
    with pytest.raises(FrozenError) as caught, isolith.override(fallback="error"):
        pass
    assert str(caught.value) == "isolith is frozen: settings can no longer change in this process."


def test_calls_still_run_after_freezing(thawed):
    isolith.freeze()
    assert isolith.rms_norm(torch.ones(3, 5), torch.ones(5)).shape == (3, 5)


def test_manifest_lists_the_kernels_of_an_operator(backend, dispatcher):
    manifest = describe(dispatcher(backend(rms_norm, name="chip")))
    assert list(manifest.kernels["rms_norm"]) == ["chip.rms_norm"]


def test_fingerprint_changes_with_a_setting(backend, dispatcher):
    chip = backend(rms_norm, name="chip")
    one, two = describe(dispatcher(chip)), describe(dispatcher(chip, fallback="error"))
    assert one.fingerprint != two.fingerprint


def test_fingerprint_is_equal_in_another_process():
    code = "import isolith; print(isolith.freeze().fingerprint)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout


def test_manifest_is_json():
    assert json.loads(json.dumps(describe(isolith.dispatch.dispatcher()).as_dict()))["fingerprint"]


def test_manifest_has_the_hash_of_a_kernels_source(backend, dispatcher):
    manifest = describe(dispatcher(backend(rms_norm, name="chip")))
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    assert manifest.kernels["rms_norm"] == {"chip.rms_norm": source}
