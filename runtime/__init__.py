"""Bundle → tokens → text. Needs onnxruntime, tokenizers, jinja2 and numpy; neither torch nor transformers.

Modules, from the outside in:

    llm              the Python API
    engine           continuous batching: who runs in which row
    request          one request: its tokens, its text, when it ends
    session          the graph on ONNX Runtime
    kv_cache         keys and values, written in place
    sampler          the next token from logits, as `sampling_params` asks
    tokenizer, chat_template, detokenizer, stopping    text in and out
"""
