"""Cambricon MLUs through torch_mlu_ops."""
