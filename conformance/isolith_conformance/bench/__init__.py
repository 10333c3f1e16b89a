"""The benchmark: how fast each operator of a model runs here, beside what the machine can do."""
