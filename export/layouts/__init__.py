"""Folders that other runtimes load: optimum's `ORTModelForCausalLM`, and ONNX Runtime GenAI."""
