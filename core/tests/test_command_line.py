import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from isolith import OPERATORS
from isolith.__main__ import main
from isolith.commands import COMMANDS
from isolith.commands.cost import parse_context
from isolith.registry import Registry


def run(capsys, *argv):
    code = main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def answer(capsys, *argv):
    code, out, err = run(capsys, *argv, "--json")
    assert code == 0, err
    return json.loads(out)


# Markdown of `table` has a line for a row, however many backends there are.
WRITING = ("new-backend", "new-op")
WRAPPED = [["why", "sparse_attn"], *([name] for name in COMMANDS if name not in ("why", "bisect", "table", *WRITING))]


@pytest.mark.parametrize("argv", WRAPPED, ids=" ".join)
@pytest.mark.parametrize("columns", [60, 200])
def test_output_fits_a_narrow_terminal(capsys, monkeypatch, argv, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = run(capsys, *argv)
    assert code == 0
    # A word longer than the line, such as a URL, cannot be wrapped.
    assert all(len(line) <= 100 for line in out.splitlines())


def test_status_is_what_runs_without_a_command(capsys):
    assert run(capsys)[1] == run(capsys, "status")[1]


def test_status_lists_the_cpu_backend_as_available(capsys):
    rows = {row["name"]: row for row in answer(capsys, "status")["backends"]}
    assert rows["cpu"]["available"]


def test_status_tells_where_a_setting_came_from():
    done = subprocess.run(
        [sys.executable, "-m", "isolith", "config", "--json"],
        env={"ISOLITH_FALLBACK": "error"},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = {row["variable"]: (row["value"], row["source"]) for row in json.loads(done.stdout)}
    assert rows["ISOLITH_FALLBACK"] == ("error", "environment variable ISOLITH_FALLBACK")


def test_ops_lists_every_operator(capsys):
    assert {row["name"] for row in answer(capsys, "ops")} == set(OPERATORS)


def test_ops_prints_the_whole_contract_of_one(capsys):
    out = run(capsys, "ops", "rms_norm")[1]
    assert "mean_j(x[..., j]^2)" in out
    assert "weight is" in out


def test_why_explains_an_example(capsys):
    # With a compiler, and without one.
    assert answer(capsys, "why", "rms_norm")["chosen"] in ("cpu.rms_norm_native", "reference")


def test_why_takes_shapes(capsys):
    found = answer(capsys, "why", "rms_norm", "--shapes", "x=4x128:bfloat16", "weight=128:float32", "eps=1e-5")
    assert found["arguments"]["x"] == "4x128:bfloat16"


def test_why_for_another_device_ends_at_the_host(capsys):
    found = answer(capsys, "why", "rms_norm", "--device", "sim")
    assert [row["name"] for row in found["candidates"]] == ["reference", "cpu with copies"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["why", "rmsnorm"], "isolith: there is no operator 'rmsnorm'; did you mean rms_norm?\n"),
        (["why", "rms_norm", "--shapes", "y=3"], "isolith: why: rms_norm has no argument 'y'; known: eps, "),
        (
            ["why", "rms_norm", "--shapes", "x=3y"],
            "isolith: why: a tensor is written like 16x4096:bfloat16; got '3y' for x",
        ),
        (
            ["why", "rms_norm", "--shapes", "x=3:int8"],
            "isolith: why: x of rms_norm may be bfloat16, float16, float32, ",
        ),
        (["why", "rms_norm", "--shapes", "x"], "isolith: why: an argument is written name=value; got 'x'."),
        (["why", "rms_norm", "--shapes", "x=3x4"], "isolith: rms_norm: missing a required argument: 'weight'"),
        (["why", "rms_norm", "--shapes", "x=3x4", "weight=5"], "isolith: rms_norm: hidden is 4 in x but 5 in weight."),
        (["ops", "nothing"], "isolith: there is no operator 'nothing'; known: "),
        (["cost", "--context", "much"], "isolith: cost: --context is a number of tokens such as 4096, 64K, 64Ki or 1M"),
    ],
)
def test_mistake_gets_one_sentence_and_exit_code_2(capsys, argv, says):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith(says)


def test_typo_in_the_environment_gets_one_sentence():
    done = subprocess.run(
        [sys.executable, "-m", "isolith"], env={"ISOLITH_BAKEND": "cpu"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (
        2,
        "isolith: ISOLITH_BAKEND is not a setting; did you mean ISOLITH_BACKEND?\n",
    )


@pytest.mark.parametrize(
    ("text", "tokens"), [("4096", 4096), ("64K", 64000), ("64Ki", 65536), ("1M", 10**6), ("1Mi", 2**20)]
)
def test_context_is_a_number_with_a_unit(text, tokens):
    assert parse_context(text) == tokens


@pytest.mark.parametrize(
    ("model", "bytes_per_token", "cache_share", "flop_share"),
    [("v4-pro", 5031, 10.5, 27.1), ("v4-flash", 3514, 7.3, 10.2)],
)
def test_published_costs_are_reproduced_at_one_million_tokens(capsys, model, bytes_per_token, cache_share, flop_share):
    models = answer(capsys, "cost", "--model", model, "--context", "1M")["models"]
    ours, base = models[model], models["v3.2"]
    assert int(ours["cache_bytes_per_token"]) == bytes_per_token
    assert base["cache_bytes_per_token"] == 48068
    assert round(100 * ours["cache_bytes"] / base["cache_bytes"], 1) == cache_share
    assert round(100 * ours["fp8_equivalent_flops"] / base["fp8_equivalent_flops"], 1) == flop_share


def cell_after(capsys, tmp_path, operator, kernels, *verdicts, scope="full"):
    """The cpu's cell of an operator, given what a report says of its kernels."""
    case = {"backend": "cpu", "operator": operator, "how": "hardware"}
    cases = [{**case, "kernel": kernel, "verdict": verdict} for kernel in kernels for verdict in verdicts]
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"run": {"scope": scope}, "cases": cases}))
    return answer(capsys, "table", str(report))["operators"][operator]["cpu"]


@pytest.mark.parametrize(
    ("verdicts", "cell"),
    [
        ((), "reference, declared"),
        (("PASS", "NOT-CLAIMED"), "reference, hardware"),
        (("NOT-CLAIMED",), "reference, declared"),
        (("PASS", "FAIL", "WAIVED"), "reference, 2 of 3 failed (hardware)"),
    ],
)
def test_the_table_says_what_reports_show(capsys, tmp_path, monkeypatch, verdicts, cell):
    monkeypatch.setattr(Registry, "kernels", lambda *_: ())
    assert cell_after(capsys, tmp_path, "rms_norm", ["reference"], *verdicts) == cell


def test_the_table_tells_a_quick_run(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(Registry, "kernels", lambda *_: ())
    assert cell_after(capsys, tmp_path, "rms_norm", ["reference"], "PASS", scope="quick") == (
        "reference, hardware (quick)"
    )


def test_the_table_counts_kernels_that_no_report_shows(capsys, tmp_path, monkeypatch):
    kernels = tuple(SimpleNamespace(full_name=f"cpu.{name}") for name in ("sparse_attn", "sparse_attn_of_a_library"))
    monkeypatch.setattr(Registry, "kernels", lambda *_: kernels)
    assert cell_after(capsys, tmp_path, "sparse_attn", ["cpu.sparse_attn"], "PASS") == (
        "2 kernels, hardware; 1 declared"
    )
    assert cell_after(capsys, tmp_path, "sparse_attn", [], "PASS") == "2 kernels, declared"
    assert cell_after(capsys, tmp_path, "sparse_attn", ["reference"], "PASS") == "2 kernels, declared"


def test_a_file_that_is_no_report_is_refused(capsys, tmp_path):
    path = tmp_path / "page.html"
    path.write_text("<html>")
    code, _, err = run(capsys, "table", str(path))
    assert code != 0
    assert f"{path} is no conformance report: " in err
