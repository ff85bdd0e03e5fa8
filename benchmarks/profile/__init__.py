"""Where the time of a decode step or a prefill goes, op by op: `qwen-rt profile`.

cupti, driver           ctypes: what ran on the GPU; the nodes of a captured graph
gpu_steps               a CUDA session's steps and prefills, recorded or cut short
kernels                 names of kernels → ops
on_cuda, on_cpu         a model or a bundle → profiles
waterfall               intervals → figures of ops and causes; arithmetic only
profile                 what was measured, and its JSON
text, trace, picture    tables, a Chrome trace, a drawing
"""
