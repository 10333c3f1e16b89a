"""The vendor's functions as its documents describe them, in plain torch on tensors of the host: the twin's inside.

They are written from the vendor's documents, tests and kernels alone, and know nothing of this project's contract:
names and order of arguments by the registered schemas, dtypes, shapes and limits as errors, index formats, tails and
invalid rows as poison. Importing them sets nothing up; `isolith_backends.ascend.twin` does.

Sources: Ascend/op-plugin 517f2e7d (npu), vllm-project/vllm-ascend 182b75ea csrc (_C_ascend), hicann/cann-recipes-infer
fbc225d2 ops/ascendc (custom).
"""
