"""A DeepSeek-V4 on the backends' twins, prompt and decoding with paged caches, against transformers in float32."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "whole_model.py"
SHORT = ("--layers", "csa", "hca", "--tokens", "130", "--decode", "3")
BY_VENDOR = {
    "ascend": {"fused_moe", "hybrid_attention", "kv_cache_write", "kv_compress", "moe_gate", "rms_norm", "rope"},
    "cambricon": {"fused_moe", "hybrid_attention", "kv_cache_write", "lightning_indexer", "moe_gate", "rms_norm"},
}
"""Operators that the vendor's calls must have run, so that a comparison of references does not pass."""


def run(backend: str, twin: str, *options: str) -> dict[str, Any]:  # Any: JSON
    """What the script found, in a process of its own: a process has one simulated device."""
    environment = {**os.environ, "ISOLITH_TWIN": twin, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), backend, "--twin", "--json", *options],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr or ran.stdout
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def check(found: dict[str, Any], backend: str) -> None:  # Any: JSON
    """Errors like the host's own in the same dtype, and the vendor's calls made."""
    assert found["order"] > 0.5
    for error in found["errors"].values():
        assert 0 < error["host"] < 0.05
        assert 0 < error["backend"] <= 1.5 * error["host"]
    of_vendor = {name.split(":")[0] for name in found["calls"] if f": {backend}." in name}
    assert BY_VENDOR[backend] <= of_vendor


@pytest.mark.parametrize(("backend", "twin"), [("ascend", "a3"), ("cambricon", "mlu590-1.12.1")])
def test_a_short_prompt_and_three_tokens(backend: str, twin: str) -> None:
    check(run(backend, twin, *SHORT), backend)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "twin", "options"),
    [
        ("ascend", "a3", ("--hidden", "4096")),
        ("ascend", "a2", ()),
        ("cambricon", "mlu590-1.12.1", ()),
        ("cambricon", "mlu590-day0", ()),
    ],
)
def test_a_long_prompt_and_ten_tokens(backend: str, twin: str, options: tuple[str, ...]) -> None:
    check(run(backend, twin, *options), backend)
