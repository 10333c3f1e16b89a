import functools
import json
import random
import sys
import threading

import pytest
import torch

import isolith
from isolith import OPERATORS, FrozenError, implements
from isolith.__main__ import main
from isolith.bisect import Flips
from isolith.dispatch import Process, using

X, WEIGHT = torch.randn(4, 64), torch.ones(64)
TABLES = torch.ones(8, 32), torch.zeros(8, 32)


def kernels(**wrong):
    """A kernel for every operator, that runs the reference and changes what it gives where told to."""
    made = []
    for name, operator in OPERATORS.items():
        change = wrong.get(name, lambda y: y)

        def run(*args, own=operator, change=change, **kwargs):
            return change(own.reference(*args, **kwargs))

        made.append(implements(operator)(functools.wraps(operator.reference)(run)))
        object.__setattr__(made[-1], "name", name)
    return made


@pytest.fixture
def over(backend, dispatcher, monkeypatch):
    """Use a dispatcher over these kernels, as the process's own."""

    def make(*given, **settings):
        active = dispatcher(backend(*given), **settings)
        monkeypatch.setattr(Process, "default", active)
        return active

    return make


def run():
    y = isolith.swiglu(isolith.rms_norm(X, WEIGHT))
    y = isolith.rope(isolith.head_rms_norm(y[:, None].repeat(1, 1, 2)), torch.arange(4), *TABLES)
    y = isolith.hadamard(y.float())
    idx, weights = isolith.moe_gate(y[:, 0], 2)
    return isolith.fused_moe(y[:, 0], idx, weights, torch.ones(64, 8, 64) / 64, torch.ones(64, 64, 4) / 8)


def check(y):
    with isolith.override(kernels=dict.fromkeys(OPERATORS, "reference")):
        assert torch.equal(y, EXPECTED)


EXPECTED = None


@pytest.fixture(autouse=True)
def expected(monkeypatch):
    with isolith.override(kernels=dict.fromkeys(OPERATORS, "reference")):
        monkeypatch.setattr(sys.modules[__name__], "EXPECTED", run())


def slightly(y):
    return y * 1.001


def culprits(made):
    assert made.outcome == "found", made.sentence
    return [(each.kernel, each.alone) for each in made.culprits]


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "rope", "hadamard", "grouped_gemm", "fused_moe"])
def test_one_wrong_kernel_is_found(over, name):
    over(*kernels(**{name: slightly}))
    made = isolith.bisect(run, check)
    assert culprits(made) == [(f"test.{name}", True)]
    assert made.runs <= 12


@pytest.mark.parametrize(
    "wrong", [("rms_norm", "hadamard"), ("swiglu", "fused_moe"), ("rms_norm", "rope", "grouped_gemm")], ids=" ".join
)
def test_several_wrong_kernels_are_found(over, wrong):
    over(*kernels(**dict.fromkeys(wrong, slightly)))
    made = isolith.bisect(run, check)
    assert sorted(culprits(made)) == sorted((f"test.{name}", True) for name in wrong)


def test_kernel_that_is_wrong_only_after_another_is_found_and_said_so(over):
    seen = []

    def first(y):
        seen.append(1)
        return y

    def second(y):
        return y * 1.5 if seen else y

    over(*kernels(rms_norm=first, hadamard=second))
    made = isolith.bisect(lambda: seen.clear() or run(), check)
    assert culprits(made) == [("test.rms_norm", False)]
    assert "though with all others on references it is right too" in made.sentence


def test_kernel_that_raises_is_found(over):
    def breaks(y):
        raise RuntimeError("device on fire")

    over(*kernels(hadamard=breaks))
    made = isolith.bisect(run)
    assert culprits(made) == [("test.hadamard", True)]
    assert "device on fire" in made.problem


def test_of_two_kernels_of_one_operator_the_wrong_one_is_found(over):
    @implements(isolith.rms_norm, why_not=lambda x, **_: None if x.shape[-1] == 64 else "takes 64")
    def of_64(x, weight, eps=1e-6, round_before_weight=False):
        return slightly(isolith.rms_norm.reference(x, weight, eps, round_before_weight))

    over(of_64, *kernels())
    made = isolith.bisect(
        lambda: (isolith.rms_norm(X, WEIGHT), isolith.rms_norm(X[:, :8], WEIGHT[:8])),
        lambda y: torch.equal(y[0], isolith.rms_norm.reference(X, WEIGHT)),
    )
    assert culprits(made) == [("test.of_64", True)]


def test_pin_of_the_user_does_not_keep_a_kernel_from_being_flipped(over):
    over(*kernels(hadamard=slightly), kernels=(("hadamard", "test.hadamard"),), fallback="error")
    assert culprits(isolith.bisect(run, check)) == [("test.hadamard", True)]


def test_right_as_it_is(over):
    over(*kernels())
    made = isolith.bisect(run, check)
    assert (made.outcome, made.runs) == ("right", 2)
    assert str(made).startswith("It is right as it is: there is nothing to find. 2 runs, ")


def test_wrong_with_references_too(over):
    over(*kernels(rope=slightly))
    made = isolith.bisect(lambda: run() + 1, check)
    assert (made.outcome, made.runs, made.culprits) == ("not a kernel", 4, ())
    assert made.sentence.startswith("It is wrong with every kernel flipped to the reference too")


def test_callable_that_runs_no_kernel(over):
    over(*kernels(rope=slightly))
    assert isolith.bisect(lambda: False).outcome == "no kernel ran"


def test_check_that_is_flaky_is_said(over):
    over(*kernels())
    answers = iter([True, False])
    made = isolith.bisect(lambda: next(answers))
    assert made.outcome == "flaky"
    assert made.sentence == (
        "Two equal runs differ, as it is: one is right, the other is not (the callable returned False)."
    )


def test_check_that_contradicts_itself_later_is_said(over):
    over(*kernels())
    answers = iter([False, False, True, True])
    made = isolith.bisect(lambda: run() is None or next(answers, True))
    assert made.outcome == "flaky"


def test_handle_that_is_bound_in_the_run_is_flipped(over):
    over(*kernels(rms_norm=slightly))
    made = isolith.bisect(
        lambda: isolith.bind(isolith.rms_norm, X, WEIGHT)(X, WEIGHT),
        lambda y: torch.equal(y, isolith.rms_norm.reference(X, WEIGHT)),
    )
    assert culprits(made) == [("test.rms_norm", True)]


def test_handle_that_was_bound_before_is_no_kernel_to_flip(over):
    over(*kernels(rms_norm=slightly))
    handle = isolith.bind(isolith.rms_norm, X, WEIGHT)

    def mixed():
        isolith.swiglu(X)
        return torch.equal(handle(X, WEIGHT), isolith.rms_norm.reference(X, WEIGHT))

    made = isolith.bisect(mixed)
    assert made.outcome == "not a kernel"
    assert "one that was bound before" in made.sentence


def test_settings_and_threads_of_the_run_are_flipped_too(over):
    over(*kernels(rms_norm=slightly))

    def threaded():
        found = []
        with isolith.override(fallback="allow"), isolith.record():
            found.append(isolith.rms_norm(X, WEIGHT))
        thread = threading.Thread(target=lambda: found.append(isolith.rms_norm(X, WEIGHT)))
        thread.start()
        thread.join()
        return all(torch.equal(y, isolith.rms_norm.reference(X, WEIGHT)) for y in found)

    made = isolith.bisect(threaded)
    assert culprits(made) == [("test.rms_norm", True)]
    assert made.culprits[0].calls == 2


def test_every_run_draws_the_same_numbers(over):
    over(*kernels(rms_norm=slightly))
    drawn = []
    made = isolith.bisect(
        lambda: drawn.append((torch.rand(()).item(), random.random())) or isolith.rms_norm(X, WEIGHT),
        lambda y: torch.equal(y, isolith.rms_norm.reference(X, WEIGHT)),
    )
    assert made.outcome == "found"
    assert len(set(drawn)) == 1


def test_frozen_process_is_refused(over, monkeypatch):
    monkeypatch.setattr(Process, "frozen", True)
    with pytest.raises(FrozenError) as caught:
        isolith.bisect(run, check)
    assert str(caught.value) == "isolith is frozen: kernels can no longer be flipped in this process."


def test_callable_that_freezes_is_refused(over, monkeypatch):
    over(*kernels(rms_norm=slightly))
    monkeypatch.setattr(Process, "frozen", False)
    with pytest.raises(FrozenError) as caught:
        isolith.bisect(lambda: isolith.freeze() and run(), check)
    assert str(caught.value).endswith("leave isolith.freeze() out of it.")
    assert not Process.frozen


def test_process_is_as_before(over):
    active = over(*kernels(rms_norm=slightly))
    isolith.bisect(run, check)
    assert Process.default is active
    assert torch.equal(isolith.rms_norm(X, WEIGHT), slightly(isolith.rms_norm.reference(X, WEIGHT)))


@pytest.mark.parametrize("answer", [False, torch.tensor(False), torch.tensor([[False]])], ids=str)
def test_no_is_said_in_several_ways(over, answer):
    over(*kernels())
    assert isolith.bisect(run, lambda _: answer).problem == "the check returned False"


@pytest.mark.parametrize("answer", [None, True, 0, "", torch.zeros(2), torch.tensor(0.0)], ids=str)
def test_any_other_answer_is_yes(over, answer):
    over(*kernels())
    assert isolith.bisect(run, lambda _: answer).outcome == "right"


def test_flip_of_a_composite_takes_the_references_of_its_parts(over):
    active = over(*kernels(grouped_gemm=slightly))
    flips = Flips([("fused_moe", "test.fused_moe")])
    with using(type(active)(active.registry, active.settings, flips)):
        assert torch.equal(run(), EXPECTED)
    assert ("grouped_gemm", "test.grouped_gemm") not in flips.ran


PROGRAM = """
import torch, isolith
X, W = torch.randn(4, 8), torch.ones(8)
def run(): return isolith.rms_norm(X, W)
class checks:
    def right(y): return torch.equal(y, isolith.rms_norm.reference(X, W))
"""


def test_command_finds_it(over, tmp_path, monkeypatch, capsys):
    over(*kernels(rms_norm=slightly))
    (tmp_path / "a_program_to_bisect.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = ["bisect", "a_program_to_bisect:run", "--check", "a_program_to_bisect:checks.right"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.out.replace("\n    ", " ").splitlines() == [
        "One kernel makes the difference, verified in both directions: the check returned False. 6 runs, 1 kernels.",
        "  rms_norm: test.rms_norm, 1 calls, wrong by itself",
    ]
    assert said.err.splitlines()[0] == "run 1, as it is: wrong: the check returned False"
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["culprits"] == [
        {"operator": "rms_norm", "kernel": "test.rms_norm", "calls": 1, "alone": True}
    ]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("json", "bisect: a callable is written MODULE:CALLABLE; got 'json'."),
        ("json:dump_", "bisect: json has no 'dump_'; did you mean dump?"),
        ("json:__name__", "bisect: json:__name__ is no callable; got str."),
        ("no_such_module:run", "bisect: no_such_module cannot be imported: ModuleNotFoundError: "),
    ],
)
def test_callable_that_is_not_there_is_one_sentence(capsys, word, says):
    assert main(["bisect", word]) == 2
    assert capsys.readouterr().err.startswith(f"isolith: {says}")
