"""Normalisation."""

from isolith.ops.norm.head_rms_norm import head_rms_norm as head_rms_norm
from isolith.ops.norm.rms_norm import rms_norm as rms_norm
