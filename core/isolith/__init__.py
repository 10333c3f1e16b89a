"""One set of MoE and hybrid-attention operators, the same on every accelerator.

import torch, isolith
y = isolith.rms_norm(torch.randn(4, 4096), torch.ones(4096))
"""

from isolith.backend import API_VERSION, Backend
from isolith.dispatch import FallbackRecord, Handle, bind, explain, fallbacks, override
from isolith.errors import (
    ArgumentError,
    ConfigError,
    FallbackWarning,
    FrozenError,
    IsolithError,
    NoKernelError,
    PluginError,
    Unsupported,
)
from isolith.freeze import Manifest, freeze
from isolith.hooks import hookimpl
from isolith.kernel import Kernel, Requires, WhyNot, implements
from isolith.numerics.rope_tables import rope_frequencies, rope_tables
from isolith.operator import Cost, Operator
from isolith.ops import OPERATORS
from isolith.ops.norm import rms_norm
from isolith.sample import ErrorSample, Make, Sample
from isolith.select import Explanation

__version__ = "0.1.0.dev0"

__all__ = [
    "API_VERSION",
    "OPERATORS",
    "ArgumentError",
    "Backend",
    "ConfigError",
    "Cost",
    "ErrorSample",
    "Explanation",
    "FallbackRecord",
    "FallbackWarning",
    "FrozenError",
    "Handle",
    "IsolithError",
    "Kernel",
    "Make",
    "Manifest",
    "NoKernelError",
    "Operator",
    "PluginError",
    "Requires",
    "Sample",
    "Unsupported",
    "WhyNot",
    "bind",
    "explain",
    "fallbacks",
    "freeze",
    "hookimpl",
    "implements",
    "override",
    "rms_norm",
    "rope_frequencies",
    "rope_tables",
]
