"""The plugin ops as layers of TensorRT: IPluginV3 classes made from the op table, whose `enqueue` calls our launchers.

Only the full TensorRT takes plugins; TensorRT-RTX does not. A call from TensorRT into Python costs host time in every
uncaptured run and nothing in a captured one, where only what it has enqueued is replayed.

Modules:

    plugin      a class for an op: shapes, dtypes, workspace, enqueue
    creator     a creator for an op, and their registration
    shapes      output shapes as expressions of input shapes
    graph       a lowered graph of target cuda, made ready for TensorRT's ONNX parser
"""
