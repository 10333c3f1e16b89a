"""The in-tree backends: how one vendor runs the operators."""
