"""Normalisation."""

from isolith.ops.norm.rms_norm import rms_norm as rms_norm
