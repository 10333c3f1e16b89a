"""A vendor's tests are a conformance run, with options that its own pyproject.toml gives; core's tests replay them."""

collect_ignore = ["isolith-acme/tests"]
