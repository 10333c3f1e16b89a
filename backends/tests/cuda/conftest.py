"""Kernels run in Triton's interpreter here; Triton asks for it when a kernel is defined, so before any is."""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))
