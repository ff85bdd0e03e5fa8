"""Checkpoint matrices → quantized matrices, and the gate that a quantized model has to pass.

forward    the decoder over one text, layer by layer, matrices read in blocks of rows
gate       that forward twice in lockstep, source beside quantized: errors by matrix and layer, then the logits
kv         which part of the k and v biases a quantized cache leaves out, head by head
kv_error   what rounding does to the keys and values of a layer, as attention sees it
"""
