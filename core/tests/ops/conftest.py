"""The tests of the operators' files call the references, not a backend's kernels, which have tests of their own."""

import pytest

from isolith import OPERATORS, override


@pytest.fixture(autouse=True)
def references():
    with override(kernels=dict.fromkeys(OPERATORS, "reference")):
        yield
