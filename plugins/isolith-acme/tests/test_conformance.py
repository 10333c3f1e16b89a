"""The conformance suite is the test suite."""

from isolith_conformance.suite import *  # noqa: F403
