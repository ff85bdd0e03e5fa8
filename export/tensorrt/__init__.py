"""Compiled engines of TensorRT and TensorRT-RTX, through one code path: the two modules have the same API.

options    what can be asked for, and what of it fits
flavour    the two libraries: which is installed, which GPUs it compiles for
pack       graph → graph: matrices that read the same rows become one
weights    initializers as addresses of mapped files; pages that were read are given back
network    ONNX graph → network, through the parser
histogram  what the network and the engine consist of, and whether the graph fell apart
builder    network → engine, written while it is serialized
engines    the engines of a bundle, one for each rank, and their card
"""
