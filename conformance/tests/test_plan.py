from typing import cast

import pytest

from isolith_conformance.plan import Found, environment
from isolith_conformance.runner import Runner


@pytest.fixture
def found():
    rows = [
        {"name": "cuda.rms_norm_library", "why_unavailable": "library is not installed"},
        {"name": "cuda.rms_norm", "why_unavailable": None},
    ]
    description = {
        "why_unavailable": None,
        "device": "cuda",
        "native": False,
        "kernels": {"rms_norm": rows, "swiglu": rows[:1], "rope": []},
    }
    return Found(name="cuda", runner=cast(Runner, None), description=description)


def test_a_kernel_that_cannot_run_here_has_no_cases(found):
    assert [unit.kernel for unit in found.units_of("rms_norm")] == ["cuda.rms_norm"]


def test_an_operator_whose_kernels_cannot_run_here_is_without_one(found):
    assert [unit.kernel for unit in found.units_of("swiglu")] == [""]


@pytest.mark.parametrize(
    ("name", "kernel"), [("fused_moe", ""), ("swa_layer", "composition"), ("decoder_block", "composition")]
)
def test_a_composition_is_checked_where_the_backend_has_a_kernel_for_a_part(found, name, kernel):
    assert [unit.kernel for unit in found.units_of(name)] == [kernel]


def test_a_report_tells_which_kernels_cannot_run_here_and_why(found):
    record = found.record()
    assert record.kernels == {"rms_norm": ("cuda.rms_norm",)}
    assert record.unavailable_kernels == {"cuda.rms_norm_library": "library is not installed"}


def test_a_report_tells_which_settings_were_in_force_and_no_path_of_the_machine(monkeypatch):
    monkeypatch.setenv("ISOLITH_TWIN", "a2")
    assert environment([]).more == {"ISOLITH_TWIN": "a2"}
