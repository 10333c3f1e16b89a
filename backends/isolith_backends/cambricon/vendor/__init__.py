"""The twin: torch_mlu and torch_mlu_ops as vendor documents and public stacks describe them, on a simulated device.

Here are the functions, over tensors of the host; `isolith_backends.cambricon.twin` sets the device up. They are written
from public descriptions of tmo alone, none of them run on a device. Where a description leaves something open that a
caller can do without, the twin takes the inconvenient side: rows of an expert and selected entries come in an odd
order, what is undefined is NaN or a large negative integer, and the lse of a call with a sink is undefined. Which of
equal scores a selection takes cannot be done without: lowest index, unless a test asks otherwise.
"""
