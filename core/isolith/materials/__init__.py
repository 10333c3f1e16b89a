"""What the samples of several operators are made of."""
