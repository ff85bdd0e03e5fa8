"""Checkpoint → portable graph → bundle. Needs the extra `export` (torch, onnxscript, onnx-ir).

Modules, in the order in which data passes through them:

    modeling   the Qwen2 decoder as torch modules that emit ONNX operators
    trace      one layer, traced once under fake tensors: no weight is loaded
    stamp      that layer repeated, each copy with its own weights and cache
    portable   initializers as references into the checkpoint's own shards
    passes     graph → graph lowerings, one file each
    lower      the graph of a target, as an object or as bytes
    weights    initializers that have to change, written once
    build      the bundle: staged, hashed, resumable, renamed when whole
"""
