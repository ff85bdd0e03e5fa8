"""Answers to maths problems, graded: what `qwen-rt eval` runs.

``datasets`` reads problems, ``prompts`` puts them to a model, ``bundle_model`` and ``endpoint_model`` are the models,
``grading`` decides whether an answer is right, ``records`` keeps every answer, ``results`` counts, ``run`` joins them.
"""
