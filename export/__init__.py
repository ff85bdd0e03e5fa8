"""Checkpoint → portable graph → bundle. Needs the extra `export` (torch, onnxscript, onnx-ir).

Modules, in the order in which data passes through them:

    source     what a build is given: a checkpoint, or a portable graph
    settings   its options, every default replaced by its value
    modeling   the Qwen2 decoder as torch modules that emit ONNX operators
    trace      one layer, traced once under fake tensors: no weight is loaded
    stamp      that layer repeated, each copy with its own weights and cache
    portable   initializers as references into the checkpoint's own shards
    passes     graph → graph lowerings, one file each
    lower      the graph of a target, as an object or as bytes
    quantize   schemes, calibration, rounding, and the gate that a quantized model has to pass
    weights    initializers that have to change, written once
    tensorrt   graphs compiled to engines; tensor_parallel says which rank has what
    build      the bundle: staged, hashed, resumable, renamed when whole

Beside them `layouts` and `trtllm` write folders that other programs load.
"""
