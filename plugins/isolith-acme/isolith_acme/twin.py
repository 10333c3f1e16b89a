"""A simulated acme device: importing this module sets it up in this process, and nothing undoes it."""

from isolith.simulated import simulate
from isolith_acme.chip import LACKS

simulate("acme", LACKS)
