"""Kernels run in Triton's interpreter here; Triton asks for it when a kernel is defined, so before any is."""

import os

os.environ["TRITON_INTERPRET"] = "1"
