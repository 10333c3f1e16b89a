"""Every wrong adapter is found on the twin by the samples of its operator; the twin runs in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_at_least_forty_wrong_adapters_are_all_found():
    words = [sys.executable, str(HERE / "wrong_adapters.py")]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=600)
    found = json.loads(done.stdout)
    assert (len(found) >= 40, [name for name, shown in found.items() if not shown]) == (True, [])
