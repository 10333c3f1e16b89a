"""Whether schemas.json and the adapters' calls still agree with an installed torch_npu; no NPU and no CANN are needed.

torch_npu must not be in the environment that isolith runs in, where a torch without CANN would not import any more. So
it is given in a virtual environment of its own:

    python -m venv DIR && DIR/bin/pip install torch==2.13.0 pluggy && DIR/bin/pip install torch-npu==2.13.0
    python -m isolith_backends.ascend.drift --venv DIR

A C compiler and `nm` make empty stand-ins for CANN's libraries, with which torch_npu imports.
"""
