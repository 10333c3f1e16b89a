"""What has changed between schemas.json and a wheel is told, and the wheel's own look where one is given."""

import copy
import ctypes
import json
import os
import shutil
import subprocess

import pytest

from isolith_backends.ascend.drift import __main__ as program
from isolith_backends.ascend.drift import calls, schemas, stand_ins

GIVEN = os.environ.get("TORCH_NPU_VENV")  # a virtual environment with torch, pluggy and torch_npu


def row(schema, keys=("Meta", "PrivateUse1")):
    name = schema.partition("(")[0]
    return {"name": name, "schema": schema, "keys": list(keys), "in_torch_npu_namespace": True}


def wheel(*schemas_of_it, version="2.13.0"):
    return {"version": version, "torch": "2.13.0", "git": "abc", "ops": [row(each) for each in schemas_of_it]}


NORM = "npu::norm(Tensor x, *, float eps=0.5) -> Tensor"
GATE = "npu::gate(Tensor x, int k) -> (Tensor, Tensor)"
ELSEWHERE = {"name": "custom::rope", "schema": "custom::rope(Tensor x) -> Tensor", "source": "recipes"}
FILE = {
    "sources": {"torch_npu": {"version": "2.13.0", "torch": "2.13.0", "git": "abc"}},
    "ops": [
        {
            "name": "npu::norm",
            "schema": NORM,
            "source": "torch_npu",
            "version": "2.13.0",
            "keys": ["Meta", "PrivateUse1"],
            "in_torch_npu_namespace": True,
            "older_wheels": {"2.8.0": {"arguments_added_later": ["eps"]}, "2.7.0": "absent"},
        },
        ELSEWHERE,
    ],
    "registered_total": {"torch_npu": 2, "recipes": 1},
    "not_kept": {"torch_npu": ["npu::gate"]},
}


def test_nothing_new_is_no_difference():
    assert schemas.differences(FILE, wheel(NORM, GATE)) == []


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ((NORM, GATE, "npu::more(Tensor x) -> ()"), "added    npu::more(Tensor x) -> ()"),
        ((GATE,), "removed  npu::norm"),
        ((NORM,), "removed  npu::gate"),
        (
            (NORM.replace("eps=0.5", "eps=0.5, int k=1"), GATE),
            "changed  npu::norm: argument *, int k=1 is new",
        ),
        ((NORM.replace("float eps=0.5", "int k=1"), GATE), "argument eps is gone"),
        ((NORM.replace("0.5", "0.25"), GATE), "changed  npu::norm: *, float eps=0.5 is now *, float eps=0.25"),
        ((NORM.replace("-> Tensor", "-> (Tensor, Tensor)"), GATE), "returns Tensor, Tensor instead of Tensor"),
    ],
    ids=["added", "removed", "removed_though_not_kept", "argument_new", "argument_gone", "default", "results"],
)
def test_difference_is_a_line(found, says):
    (line,) = schemas.differences(FILE, wheel(*found))
    assert says in line


def test_other_order_of_arguments_is_a_change():
    assert schemas.changes("npu::f(Tensor a, Tensor b) -> ()", "npu::f(Tensor b, Tensor a) -> ()") == [
        "the order of arguments is now b, a"
    ]


def test_lost_meta_kernel_is_a_change():
    found = wheel(NORM, GATE)
    found["ops"][0]["keys"] = ["PrivateUse1"]
    assert schemas.differences(FILE, found) == ["changed  npu::norm: the kernel for Meta is gone"]


def test_refresh_by_the_same_wheel_changes_nothing():
    assert schemas.refreshed(FILE, wheel(NORM, GATE)) == FILE


NEWER = NORM.replace("eps=0.5", "eps=0.5, int k=1")


@pytest.fixture
def newer():
    return schemas.refreshed(copy.deepcopy(FILE), wheel(NEWER, GATE, "npu::more(Tensor x) -> ()", version="2.14.0"))


def test_refresh_leaves_no_difference(newer):
    found = wheel(NEWER, GATE, "npu::more(Tensor x) -> ()", version="2.14.0")
    assert schemas.differences(newer, found) == []


def test_refresh_keeps_what_comes_from_elsewhere(newer):
    assert ELSEWHERE in newer["ops"]


def test_refresh_keeps_what_is_new_and_leaves_out_what_was(newer):
    assert [each["name"] for each in newer["ops"]] == ["npu::norm", "npu::more", "custom::rope"]


def test_refresh_makes_the_wheel_before_an_older_one(newer):
    assert newer["ops"][0]["older_wheels"] == {
        "2.8.0": {"arguments_added_later": ["eps", "k"]},
        "2.7.0": "absent",
        "2.13.0": {"arguments_added_later": ["k"]},
    }


def test_operator_that_is_new_is_absent_in_the_wheel_before(newer):
    assert newer["ops"][1]["older_wheels"] == {"2.13.0": "absent"}


@pytest.mark.parametrize(
    ("got", "says"),
    [
        ([((2, 3), "bfloat16"), ((2,), "int32")], ""),
        ([((2, 3), "bfloat16")], "1 results instead of 2"),
        ([((2, 3), "float32"), ((2,), "int32")], "result 0 is float32 [2, 3] instead of bfloat16 [2, 3]"),
        ([((2, 3), "bfloat16"), ((3,), "int32")], "result 1 is int32 [3] instead of int32 [2]"),
    ],
    ids=["same", "fewer", "dtype", "shape"],
)
def test_results_that_differ_are_told(got, says):
    assert calls.difference(got, [((2, 3), "bfloat16"), ((2,), "int32")]) == says


def test_report_counts_what_agrees_what_differs_and_what_nobody_knows():
    told = {"kernel": "norm.norm", "sample": "small", "dtype": "float32", "made": [["npu::norm", []]]}
    outcomes = ("agrees", "agrees", "differs: result 0", "npu::norm has no meta kernel")
    rows = [{**told, "outcome": outcome} for outcome in outcomes]
    lines, wrong = program.report("A3", {"rows": rows, "not_here": {"rope.rope": "custom::rope is not registered"}})
    assert (lines, wrong) == (
        [
            "A3: 2 calls of 1 kernels agree, through 1 of the vendor's operators; 1 differ; 1 without a meta kernel",
            "  npu::norm 2",
            "  npu::norm has no meta kernel",
            "  norm.norm small float32 differs: result 0",
            "  rope.rope is not here: custom::rope is not registered",
        ],
        1,
    )


def of_calls(*made, sample="small"):
    return {"kernel": "norm.norm", "sample": sample, "dtype": "float32", "made": [list(each) for each in made]}


def test_result_of_another_dtype_on_the_twin_is_told():
    metas = [of_calls(("npu::norm", [[[2], "float32"]]))]
    twins = [of_calls(("npu::quant", [[[2], "int8"]]), ("npu::norm", [[[2], "bfloat16"]]))]
    says = "npu::norm (norm.norm small float32): result 0 is bfloat16 [2] instead of float32 [2]"
    assert calls.between(metas, twins) == (1, [says])


def test_operator_that_was_called_more_often_on_the_twin_is_not_compared():
    made = ("npu::norm", [[[2], "float32"]])
    assert calls.between([of_calls(made)], [of_calls(made, made)]) == (0, [])


def test_folder_without_python_is_not_looked_at(tmp_path, capsys):
    assert program.main(["--venv", str(tmp_path)]) == program.NOT_LOOKED_AT
    assert "is no virtual environment" in capsys.readouterr().err


@pytest.mark.skipif(not (shutil.which("cc") and shutil.which("nm")), reason="there is no C compiler here")
def test_stand_ins_define_what_a_library_wants(tmp_path):
    (tmp_path / "lib").mkdir()
    wanting = (
        "int aclrtAnything(void); int _ZN3atb4MakeEv(void);int f(void) { return aclrtAnything() + _ZN3atb4MakeEv(); }"
    )
    (tmp_path / "f.c").write_text(wanting)
    library = str(tmp_path / "lib" / "libwanting.so")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, str(tmp_path / "f.c")], check=True)
    stand_ins.build(tmp_path, tmp_path)
    found = [ctypes.CDLL(str(tmp_path / name)) for name in ("libascendcl.so", "libatb.so")]
    assert (found[0].aclrtAnything(), found[1]._ZN3atb4MakeEv()) == (0, 0)


@pytest.mark.skipif(GIVEN is None, reason="TORCH_NPU_VENV names no virtual environment with torch_npu")
def test_installed_wheel_is_the_one_of_the_file(capsys):
    assert program.main(["--venv", str(GIVEN)]) == program.AGREED, capsys.readouterr()


@pytest.mark.slow
@pytest.mark.skipif(GIVEN is None, reason="TORCH_NPU_VENV names no virtual environment with torch_npu")
def test_calls_agree_with_the_vendors_meta_kernels(capsys):
    assert program.main(["--venv", str(GIVEN), "--calls"]) == program.AGREED, capsys.readouterr()


def test_file_is_written_as_refresh_writes_it():
    text = program.FILE.read_text()
    assert json.dumps(json.loads(text), indent=1, ensure_ascii=False) == text
