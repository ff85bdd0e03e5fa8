"""Graph → graph lowerings: one file a pass, each leaves the graph's outputs equal.

| pass               | does                                                                             |
|--------------------|----------------------------------------------------------------------------------|
| `compute_dtype`    | sets the dtype in which the graph computes; weights keep their stored dtype      |
| `attention`        | RoPE + cache write + attention → one GroupQueryAttention on shared buffers       |
| `flatten`          | tokens of all rows on one axis, so that every linear layer is a 2-D product      |
| `linear`           | Transpose + MatMul + Add → Gemm on the stored layout; q, k and v packed          |
| `quantized_linear` | products and look-ups on quantized matrices → MatMulNBits, or what folds at load |
| `norm`             | residual Add + RMSNormalization → SkipSimplifiedLayerNormalization               |
| `activation`       | x · sigmoid(x) → QuickGelu with alpha 1                                          |
| `kv_cache_cpu`     | new keys and values rounded as a quantized cache rounds them, if asked for       |
| `decoder`          | no change: every node of a portable graph checked against the model's spec       |
| `lower_cpu`        | that check, then all of the above in the order that ONNX Runtime wants           |
| `lower_cuda`       | that check, then a new graph of our plugin ops over a paged cache                |
| `dequantize`       | DequantizeLinear on quantized matrices, in the forms that TensorRT takes         |
| `shard`            | tensor parallel: what one rank of several has of the weights                     |
| `lower_tensorrt`   | that check, then a new graph for TensorRT's ONNX parser                          |

`graph_tools` and `matcher` are what they share to edit and to read a graph, `graph_writer` writes one of standard
operators, `plugin_node` makes a node from the op table.
"""
