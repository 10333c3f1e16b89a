"""The vendor's functions, called by their registered schemas on tensors of the host: no device is set up for it."""

import json
from pathlib import Path

import pytest
import torch

from isolith_backends.ascend import vendor
from isolith_backends.ascend.vendor import soc, table

ROWS = json.loads((Path(vendor.__file__).parents[1] / "schemas.json").read_text())["ops"]
SCHEMAS = {row["name"]: row["schema"] for row in ROWS if row["source"] != "sgl-kernel-npu"}
FUNCTIONS = {name: (function, families) for name, function, families in table.OFFERED}


@pytest.fixture(scope="session")
def arguments_of():
    """The registered arguments of an operator."""
    return lambda name: torch._C.parse_schema(SCHEMAS[name]).arguments


@pytest.fixture
def call(arguments_of):
    """Call an operator as on a chip, an A3 unless told otherwise, with the defaults of its schema."""

    def run(name, chip="a3", **given):
        with soc.chip(chip) as found:
            function, families = FUNCTIONS[name]
            assert found.name in families, f"{name} is not on {found.name}"
            arguments = arguments_of(name)
            defaults = {each.name: each.default_value for each in arguments if each.has_default_value()}
            assert set(given) <= {each.name for each in arguments}
            return function(**defaults | given)

    return run
