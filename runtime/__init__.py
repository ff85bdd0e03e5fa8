"""Bundle → tokens → text. Needs onnxruntime, tokenizers, jinja2 and numpy; neither torch nor transformers.

A bundle of target cpu runs in `engine` on a `session`, one with compiled engines in `engine` on a `tensorrt` session,
one of target cuda in `paged_engine` on a `cuda` session.

Modules, from the outside in:

    llm              the Python API
    engine           continuous batching: who runs in which row
    paged_engine     the same over a paged cache, one step behind the device
    request          one request: its tokens, its text, when it ends
    session          the graph on ONNX Runtime
    executor         what the paged engine needs of a device
    cuda             the graph, its buffers and its steps on a GPU
    tensorrt         a compiled engine, its buffers and its steps on a GPU
    kv_cache         keys and values, written in place
    block_pool       which blocks of a paged cache are free
    sampler          the next token from logits, as `sampling_params` asks
    tokenizer, chat_template, detokenizer, stopping    text in and out
"""
