"""Operators of the decode path: CUDA kernels, their launchers and bindings, and one slow reference for each.

    reference   every step of Qwen2 in numpy float64: what a kernel is tested against

Nothing here imports `qwen_rt.export` or `qwen_rt.runtime`.
"""
