"""A checkpoint → a TensorRT-LLM checkpoint: `config.json` and one `rank{r}.safetensors` for each GPU.

    layout.py     which rows and columns of which parameter a rank holds, under which name
    encoding.py   how a block of rows is stored: floats, fp8 with a scale a row, int4 with a scale a group
    smoothquant.py  int8 for int8 activations: what is stored beside it, and what fits
    config.py     config.json, and the command that builds an engine
    writer.py     one pass over the source that writes all ranks side by side

Written for the last release line of TensorRT-LLM that builds TensorRT engines, 1.2.
"""

from qwen_rt.export.trtllm.writer import TrtllmOptions, TrtllmResult, convert

__all__ = ["TrtllmOptions", "TrtllmResult", "convert"]
