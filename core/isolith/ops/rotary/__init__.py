"""Rotary embedding and the Hadamard rotation."""

from isolith.ops.rotary.hadamard import hadamard as hadamard
from isolith.ops.rotary.rope import rope as rope
