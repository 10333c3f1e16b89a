import json

import pytest
from benches import TINY_V4, dispatcher_of
from distributions import HOOK

from isolith import models
from isolith.dispatch import using
from isolith_conformance import __main__ as command_line
from isolith_conformance.bench import command, machine
from isolith_conformance.bench.record import read

TINY = ["--model", "tiny-v4", "--seconds", "0.005", "--no-peers"]


@pytest.fixture
def tiny(monkeypatch):
    """A tiny model under its own name, and limits that take no time."""
    monkeypatch.setitem(models.MODELS, "tiny-v4", TINY_V4)
    monkeypatch.setitem(machine.STREAM_BYTES, "cpu", 2**20)
    monkeypatch.setitem(machine.PRODUCT_SIZE, "cpu", 128)
    monkeypatch.setattr(machine, "SECONDS", 0.01)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        pytest.param(["--context", "many"], "--context is a number of tokens such as 4096", id="context"),
        pytest.param(["--context", "0"], "--context is a number of tokens such as 4096", id="no_context"),
        pytest.param(["--context", "4K", "--context", "4000"], "--context names one number twice", id="twice"),
        pytest.param(["--tokens", "0"], "--tokens must be at least 1; got 0", id="tokens"),
        pytest.param(
            ["--phase", "prefill", "--context", "16"], "--tokens must be at most --context = 16", id="prefill"
        ),
        pytest.param(["--experts", "5"], "--experts of v4-flash must be in 6..256; got 5", id="experts"),
        pytest.param(["--model", "v3.2", "--experts", "17"], "in 16..256 and a multiple of 8, its groups", id="groups"),
        pytest.param(["--op", "rms_nrom"], "there is no operator 'rms_nrom'; the nearest is rms_norm", id="operator"),
        pytest.param(["--op", "mla_attention"], "v4-flash has none of mla_attention in decode", id="not_of_the_model"),
        pytest.param(["--seconds", "0"], "--seconds must be positive; got 0", id="seconds"),
        pytest.param(["--plot", "x.png"], "--plot must end with .svg; got x.png", id="plot"),
        pytest.param(["--json", "/nowhere/x.json"], "--json is in a folder that there is not: /nowhere", id="folder"),
        pytest.param(["--backend", "quda"], "there is no backend 'quda'", id="backend"),
        pytest.param(["--tokens", "4000000", "--op", "hc_pre"], "--tokens lowers that", id="memory"),
    ],
)
def test_illegal_request_ends_with_2_and_says_why(words, says, capsys):
    assert (command.bench_command(words), says in capsys.readouterr().err) == (2, True)


def test_unknown_option_ends_with_2():
    with pytest.raises(SystemExit, match="2"):
        command.bench_command(["--speed"])


def test_unavailable_backend_is_told_with_its_reason(plugin, capsys):
    plugin(
        "sleepy",
        "",
        hook=HOOK.replace("return backend()", "return backend(why_unavailable=lambda: 'no device of ours')"),
    )
    code = command.bench_command(["--backend", "sleepy", "--op", "sinkhorn"])
    assert (code, "no device of ours" in capsys.readouterr().err) == (2, True)


def test_run_writes_a_record_that_can_be_read(tiny, tmp_path):
    command.bench_command([*TINY, "--op", "rms_norm", "--json", str(tmp_path / "a.json")])
    assert [row.operator for row in read(tmp_path / "a.json").rows] == ["rms_norm", "rms_norm"]


def test_run_writes_picture_and_page(tiny, tmp_path):
    names = ["--plot", str(tmp_path / "a.svg"), "--page", str(tmp_path / "a.html")]
    command.bench_command([*TINY, "--op", "rms_norm", *names])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.svg"]


def test_right_run_ends_with_0(tiny):
    assert command.bench_command([*TINY, "--op", "sinkhorn"]) == 0


def test_wrong_kernel_ends_with_1(tiny):
    def wrong(logits, iters=20, eps=1e-6):
        return logits

    from isolith.ops import residual

    with using(dispatcher_of(wrong, residual.sinkhorn)):
        assert command.bench_command([*TINY, "--op", "sinkhorn"]) == 1


def test_progress_goes_to_stderr(tiny, capsys):
    command.bench_command([*TINY, "--op", "sinkhorn"])
    assert "[1/1] sinkhorn, layer, context 4096, tokens 1 ..." in capsys.readouterr().err


def test_contexts_are_rows_of_one_run(tiny, tmp_path):
    path = tmp_path / "a.json"
    command.bench_command([*TINY, "--op", "sinkhorn", "--context", "128", "--context", "1K", "--json", str(path)])
    assert [row.context for row in read(path).rows] == [128, 1000]


def test_list_measures_nothing(capsys):
    command.bench_command(["--list", "--op", "fused_moe", "--experts", "8"])
    assert "8 of 256 experts" in capsys.readouterr().out


def test_floors_are_bytes_and_flops_over_the_rates_of_a_chip(capsys):
    # 128 sequences that see 640 entries of 584 bytes: 65 MB, 21.5 us at 3 TB/s.
    code = command.bench_command(
        ["--floors", "h100", "--op", "sparse_attn", "--tokens", "128", "--context", "64K", "--backend", "nowhere"]
    )
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if " CSA " in line)
    assert code == 0
    assert row == ["sparse_attn", "CSA", "64000", "128", "64.98", "10.74", "21.7", "us", "memory"]


def test_compare_takes_records_of_the_benchmark(tiny, tmp_path, capsys):
    path = str(tmp_path / "a.json")
    command.bench_command([*TINY, "--op", "sinkhorn", "--json", path])
    capsys.readouterr()
    command_line.main(["compare", path, path, "--json"])
    assert json.loads(capsys.readouterr().out)["pairs"][0]["operator"] == "sinkhorn"


def test_several_numbers_of_tokens_and_experts_are_measured_one_by_one(tiny, capsys):
    command.bench_command([*TINY, "--op", "moe_permute", "--tokens", "1", "--tokens", "2", "--warm"])
    out = capsys.readouterr().out
    assert "against" in out
    assert "caches are warm before every repeat" in out
