"""Rotary embedding and the Hadamard rotation."""
