"""Whole layers: compositions of operators, with the parts that an operator has, checked as one."""

from isolith import OPERATORS
from isolith.operator import AnyOperator
from isolith_conformance.layers.csa_layer import csa_layer
from isolith_conformance.layers.decoder_block import decoder_block
from isolith_conformance.layers.hca_layer import hca_layer
from isolith_conformance.layers.swa_layer import swa_layer

LAYERS: dict[str, AnyOperator] = {layer.name: layer for layer in (swa_layer, hca_layer, csa_layer, decoder_block)}

UNITS: dict[str, AnyOperator] = {**OPERATORS, **LAYERS}
"""Whatever a sample can be made of: single operators and whole layers."""
