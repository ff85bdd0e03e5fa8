"""Checkpoint matrices → quantized matrices, and the gate that a quantized model has to pass.

| module                          | does                                                                          |
|---------------------------------|-------------------------------------------------------------------------------|
| `plan`, `prepare`               | which matrix gets which scheme; everything that is decided before writing     |
| `rounding`, `pieces`            | rows → stored numbers and scales; quantized matrices as pieces of files       |
| `calibrate`, `balance`, `texts` | factors from the activations of a text                                        |
| `mixed`, `sensitivity`          | precision by measured error within a size                                     |
| `kv`, `kv_error`                | which part of a bias a quantized cache leaves out, head by head               |
| `forward`                       | the decoder over a text, layer by layer, matrices read in blocks of rows      |
| `gate`, `tensor_check`, `folds` | that forward twice in lockstep, source beside quantized: errors and logits    |
| `gate_text`, `check`            | what the gate reads; the gate on what a build has just written                |
"""
