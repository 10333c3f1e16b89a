import hashlib
import json
from dataclasses import replace

import pytest
import torch

from isolith import OPERATORS
from isolith_conformance.bundle import (
    manifest_hash,
    read_expectation,
    read_inputs,
    read_manifest,
    write_bundle,
    write_results,
)
from isolith_conformance.bundle_judge import bundle_command, judge_bundle, judge_bundle_command
from isolith_conformance.bundle_tensors import BundleError, read_tensors, tensor_bytes
from isolith_conformance.case import arguments_of, expectation_of
from isolith_conformance.family import evaluate
from isolith_conformance.report_json import canonical


def reference_results(folder, case):
    operator = OPERATORS[case.operator]
    return evaluate(operator, operator.reference, read_inputs(folder, case))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A bundle of operators of every kind, with the references' results."""
    folder = tmp_path_factory.mktemp("whole")
    operators = ["rms_norm", "swiglu", "moe_gate", "indexer_topk", "kv_cache_write", "act_quant_int8", "moe_permute"]
    manifest = write_bundle(folder / "bundle", operators, [torch.bfloat16], seed=3)
    for case in manifest.cases:
        write_results(folder / "results", case, reference_results(folder / "bundle", case))
    return folder / "bundle", folder / "results"


@pytest.fixture
def bundle(tmp_path):
    """A bundle of one case, with the reference's results."""
    manifest = write_bundle(tmp_path / "bundle", ["rms_norm"], [torch.bfloat16], 3, ["odd_width"])
    write_results(tmp_path / "results", manifest.cases[0], reference_results(tmp_path / "bundle", manifest.cases[0]))
    return tmp_path / "bundle", tmp_path / "results"


FOLDER = "rms_norm/odd_width/bfloat16"


def refusal(bundle, **more):
    with pytest.raises(BundleError) as caught:
        judge_bundle(*bundle, **more)
    return str(caught.value)


def edited(bundle, change):
    """Change the manifest, and hash it anew."""
    path = bundle[0] / "manifest.json"
    document = json.loads(path.read_text())
    change(document["manifest"])
    document["sha256"] = hashlib.sha256(canonical(document["manifest"]).encode()).hexdigest()
    path.write_text(json.dumps(document))


def test_references_pass_in_every_case(whole):
    assert {case.verdict for case in judge_bundle(*whole)} == {"PASS"}


def test_stored_expectation_judges_as_the_one_computed_here(whole):
    def verdicts(case):
        results = [result.clone() for result in reference_results(whole[0], case)]
        for result in results:
            if result.dtype == torch.bfloat16 and result.numel():
                result.view(-1)[0] += 1
        here = expectation_of(case.operator, case.sample, case.dtype, 3)
        return [one.judge(results) for one in (read_expectation(whole[0], case), here)]

    pairs = [verdicts(case) for case in read_manifest(whole[0]).cases]
    assert all(one == other for one, other in pairs)


def test_inputs_are_those_of_the_samples(whole):
    case = next(case for case in read_manifest(whole[0]).cases if case.operator == "kv_cache_write")
    read, made = read_inputs(whole[0], case), arguments_of(case.operator, case.sample, case.dtype, 3)
    same = {
        name: torch.equal(read[name], value) if isinstance(value, torch.Tensor) else read[name] == value
        for name, value in made.items()
    }
    assert all(same.values()), same


def test_wrong_result_fails(bundle):
    path = bundle[1] / FOLDER / "results.safetensors"
    y = read_tensors(path)["y"].clone()
    y[1] = 0
    path.write_bytes(tensor_bytes({"y": y}))
    assert [(case.verdict, case.rule) for case in judge_bundle(*bundle)] == [("FAIL", "R1")]


def test_missing_result_is_an_error(bundle):
    (bundle[1] / FOLDER / "results.safetensors").unlink()
    path = bundle[1] / FOLDER / "results.safetensors"
    case = judge_bundle(*bundle)[0]
    assert (case.verdict, case.problem) == ("ERROR", f"{path}: there is no such file.")


def test_result_by_another_name_is_an_error(bundle):
    (bundle[1] / FOLDER / "results.safetensors").write_bytes(tensor_bytes({"z": torch.zeros(3)}))
    assert judge_bundle(*bundle)[0].problem == "results.safetensors lacks y."


def test_result_too_many_is_an_error(bundle):
    path = bundle[1] / FOLDER / "results.safetensors"
    path.write_bytes(tensor_bytes(read_tensors(path) | {"z": torch.zeros(3)}))
    assert judge_bundle(*bundle)[0].problem == "results.safetensors has 'z', which is no result."


def test_result_of_another_shape_fails(bundle):
    (bundle[1] / FOLDER / "results.safetensors").write_bytes(tensor_bytes({"y": torch.zeros(3)}))
    assert judge_bundle(*bundle)[0].rule == "shape"


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_changed_byte_of_the_expectation_is_found(bundle):
    flip_last_byte(bundle[0] / FOLDER / "expected.safetensors")
    assert "expected.safetensors: its content has the hash" in refusal(bundle)


def test_changed_byte_of_the_inputs_is_found(bundle):
    flip_last_byte(bundle[0] / FOLDER / "inputs.safetensors")
    with pytest.raises(BundleError, match="its content has the hash"):
        read_inputs(bundle[0], read_manifest(bundle[0]).cases[0])


def test_edited_manifest_is_found(bundle):
    path = bundle[0] / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 4'))
    assert "manifest.json: its content has the hash" in refusal(bundle)


def test_bundle_of_another_hash_is_refused(bundle):
    assert refusal(bundle, sha256="0" * 64).endswith(f"{'0' * 64} is due.")


def test_bundle_of_the_known_hash_is_judged(bundle):
    assert judge_bundle(*bundle, sha256=manifest_hash(read_manifest(bundle[0])))[0].verdict == "PASS"


@pytest.mark.parametrize("name", ["..", "../../etc", "/etc", "a/b", "a\\b", "", "."])
def test_path_out_of_the_folder_is_refused(bundle, name):
    edited(bundle, lambda manifest: manifest["cases"][0].update(sample=name))
    assert "cases[0].sample must be text that matches" in refusal(bundle)


def test_case_that_stands_twice_is_refused(bundle):
    edited(bundle, lambda manifest: manifest["cases"].append(manifest["cases"][0]))
    assert refusal(bundle).endswith(f"the case {FOLDER} stands twice.")


def test_unknown_operator_is_refused(bundle):
    edited(bundle, lambda manifest: manifest["cases"][0].update(operator="nobody"))
    assert "there is no such file" in refusal(bundle)


def test_changed_signature_is_refused(bundle):
    edited(bundle, lambda manifest: manifest["cases"][0].update(signature="0" * 64))
    assert refusal(bundle).endswith("the bundle was made for another signature of rms_norm.")


def test_expectation_with_tensors_exchanged_is_refused(bundle):
    def exchange(manifest):
        bar = manifest["cases"][0]["expectation"]["due"][0]["bar"]
        bar["due"] = {"tensor": "due.0.reference"}

    edited(bundle, exchange)
    assert refusal(bundle).startswith(f"The expectation of {FOLDER} does not fit together")


def test_unknown_tensor_is_refused(bundle):
    def rename(manifest):
        manifest["cases"][0]["expectation"]["due"][0]["bar"]["r1"] = {"tensor": "none"}

    edited(bundle, rename)
    assert refusal(bundle).endswith("expectation.due[0].bar.r1: there is no tensor 'none'.")


def test_equal_bundles_are_equal_bytes(bundle, tmp_path):
    again = write_bundle(tmp_path / "again", ["rms_norm"], [torch.bfloat16], 3, ["odd_width"])
    assert manifest_hash(again) == manifest_hash(read_manifest(bundle[0]))


def test_seed_changes_the_bundle(bundle, tmp_path):
    again = write_bundle(tmp_path / "again", ["rms_norm"], [torch.bfloat16], 4, ["odd_width"])
    assert replace(again, seed=3) != read_manifest(bundle[0])


def test_folder_with_something_in_it_is_not_written(bundle):
    with pytest.raises(BundleError, match="is not empty"):
        write_bundle(bundle[0], ["rms_norm"])


def test_command_ends_with_0_where_all_pass(bundle):
    assert judge_bundle_command(*bundle) == 0


def test_command_ends_with_1_where_a_result_is_missing(bundle, tmp_path):
    assert judge_bundle_command(bundle[0], tmp_path / "none") == 1


def test_command_ends_with_2_where_the_bundle_is_none(tmp_path):
    assert judge_bundle_command(tmp_path, tmp_path) == 2


def test_command_refuses_an_unknown_operator(tmp_path, capsys):
    assert (bundle_command(tmp_path / "b", ("nobody",)), capsys.readouterr().out) == (
        2,
        "There is no operator 'nobody'.\n",
    )
