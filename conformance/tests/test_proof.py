"""The suite's proof, a sample of it: wrong kernels die, right ones live, and each fault is seen by its own check."""

import importlib.util
from pathlib import Path

import harness
import pytest
from faults import FAULTS, Fault

from isolith import OPERATORS

MUTANTS = harness.listed("mutants", "MUTANTS")
RIGHT = harness.listed("right", "RIGHT")
DUE = [mutant for mutant in MUTANTS if not mutant.equivalent]


def named(entries):
    return [pytest.param(entry, id=f"{entry.operator}-{entry.name}") for entry in entries]


@pytest.mark.parametrize("mutant", named(harness.sample(DUE, 1)))
def test_a_mutant_of_the_sample_dies(mutant):
    assert harness.first_problem(mutant.load(), mutant.operator, 1) is not None


@pytest.mark.slow
@pytest.mark.parametrize("mutant", named(DUE))
def test_every_mutant_dies(mutant):
    assert harness.first_problem(mutant.load(), mutant.operator, 1) is not None


@pytest.mark.parametrize("variant", named(harness.sample(RIGHT, 1)))
def test_a_right_variant_of_the_sample_lives(variant):
    assert harness.first_problem(variant.load(), variant.operator, 1, quick=True) is None


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("variant", named(RIGHT))
def test_every_right_variant_lives(variant, seed):
    assert harness.first_problem(variant.load(), variant.operator, seed) is None


@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.name) for fault in FAULTS])
def test_a_fault_is_seen_by_its_check(fault):
    assert harness.fails(harness.CHECKS[fault.check], harness.unit_of(fault), fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.name) for fault in FAULTS])
def test_a_fault_is_seen_by_no_other_check(fault):
    assert harness.killers(fault) == [fault.check]


def test_a_claim_of_batch_invariance_is_checked_where_parts_of_results_are_undefined():
    def make():
        return OPERATORS["moe_gate"].reference

    right = Fault(name="right", check="batch invariance", operator="moe_gate", make=make, batch_invariant=True)
    assert not harness.fails(harness.CHECKS["batch invariance"], harness.unit_of(right), right)


def test_every_edit_of_a_mutant_finds_its_text():
    sources = {}
    for mutant in MUTANTS:
        for edit in mutant.edits:
            source = sources.setdefault(edit.module, Path(importlib.util.find_spec(edit.module).origin).read_text())
            assert source.count(edit.old) == edit.count or len(mutant.edits) > 1, (mutant.name, edit.old)


def test_names_of_mutants_are_unique():
    names = [(mutant.operator, mutant.name) for mutant in MUTANTS]
    assert len(set(names)) == len(names)


def test_every_operator_has_mutants_and_right_variants():
    assert {mutant.operator for mutant in MUTANTS} == set(OPERATORS)
    assert {variant.operator for variant in RIGHT} == set(OPERATORS)
