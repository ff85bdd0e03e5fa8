"""The session for compiled engines: needs TensorRT or TensorRT-RTX and a CUDA runtime; neither torch nor ONNX Runtime.

Modules, from the outside in:

    session      prefill and decode over leased rows of the cache: what `engine.Engine` runs on
    steps        captured decode steps
    cache        keys and values of all rows, bound once; leases of rows
    engine       the deserialized engine: its tensors, its profiles, execution contexts
    card         what the engine was compiled for, checked first
    platform     TensorRT's module, full or for RTX, and the CUDA runtime
"""
