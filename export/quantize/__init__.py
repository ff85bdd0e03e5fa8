"""Checkpoint matrices → quantized matrices, and the gate that a quantized model has to pass.

forward    the decoder over one text, layer by layer, matrices read in blocks of rows
gate       that forward twice in lockstep, source beside quantized: errors by matrix and layer, then the logits
"""
