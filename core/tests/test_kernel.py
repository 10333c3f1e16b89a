import pytest
import torch

from isolith import Requires, implements, ops
from isolith.kernel import in_range


@pytest.mark.parametrize(
    ("version", "wanted", "holds"),
    [
        ("9.0", ">=9.0", True),
        ("8.9", ">=9.0", False),
        ("10.0", ">=9.0", True),
        ("2.8.0.post2", ">=2.8,<3", True),
        ("3.0", ">=2.8,<3", False),
        ("5.1", "==5.x", True),
        ("50.1", "==5.x", False),
        ("5.1", "!=5.x", False),
        ("1.12.1", "==1.12.1", True),
        ("1.12.1", "!=1.12.1", False),
        ("2.0", ">1,<=2.0", True),
    ],
)
def test_version_lies_in_the_range(version, wanted, holds):
    assert in_range(version, wanted) is holds


def test_malformed_range_is_refused():
    with pytest.raises(ValueError, match="a range is written like"):
        in_range("1", "~1")


def test_dtype_of_the_first_tensor_is_refused_by_name():
    requires = Requires(dtypes=(torch.float32, torch.bfloat16))
    assert requires.why_not({"k": 1, "x": torch.zeros(1).half()}) == "x is float16; takes bfloat16, float32"


def test_dtypes_can_be_required_of_any_argument():
    requires = Requires(dtypes={"w": (torch.float32,)})
    assert requires.why_not({"x": torch.zeros(1).half(), "w": torch.zeros(1)}) is None


def test_strided_tensor_is_refused_where_contiguity_is_required():
    x = torch.zeros(2, 3).t()
    assert Requires(contiguous=True).why_not({"x": x}) == "x is not contiguous; strides (1, 3)"


def test_unknown_architecture_is_refused(backend):
    assert Requires(arch=">=9").why_not_here(backend()) == "arch=unknown; needs >=9"


def test_architecture_out_of_range_is_refused(backend):
    assert Requires(arch=">=9").why_not_here(backend(arch=lambda: "8.6")) == "arch=8.6; needs >=9"


def test_missing_software_is_refused(backend):
    here = backend(versions=dict)
    assert Requires(sdk={"flash_mla": ">=1"}).why_not_here(here) == "flash_mla is not installed; needs flash_mla>=1"


def test_old_software_is_refused(backend):
    here = backend(versions=lambda: {"flash_mla": "0.9"})
    assert Requires(sdk={"flash_mla": ">=1"}).why_not_here(here) == "flash_mla=0.9; needs >=1"


def test_what_the_installation_lacks_is_refused(backend):
    assert Requires(missing=lambda: "flash_mla has no run").why_not_here(backend()) == "flash_mla has no run"
    assert Requires(missing=lambda: None).why_not_here(backend()) is None


def test_nothing_is_looked_for_on_a_device_that_does_not_do(backend):
    requires = Requires(arch=">=9", missing=lambda: pytest.fail("it imports a library"))
    assert requires.why_not_here(backend(arch=lambda: "8.6")) == "arch=8.6; needs >=9"


def test_numerics_that_the_operator_does_not_allow_cannot_be_declared():
    with pytest.raises(ValueError, match="rms_norm allows none to be declared; got 'tf32'"):
        implements(ops.norm.rms_norm, declares=("tf32",))
