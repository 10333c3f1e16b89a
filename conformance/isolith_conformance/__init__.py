"""Whether a backend computes the operators correctly."""
