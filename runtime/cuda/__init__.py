"""The session for NVIDIA GPUs: needs onnxruntime-gpu and the plugin library; neither torch nor CUDA's Python packages.

Modules, from the outside in:

    session      prefill, decode steps, tokens back: the `PagedExecutor`
    bench        timing of a session
    model        a model in device memory: what is allocated in which order
    steps        calls of the graph, captured steps
    counts       token counts of rows with penalties
    sampling     what the device knows of each row, the `sample` op
    weights      where weights lie, and loaders
    graph        the graph on ONNX Runtime's CUDA provider
    memory       allocations, KV size, the memory report
    cudart       the CUDA runtime
"""
