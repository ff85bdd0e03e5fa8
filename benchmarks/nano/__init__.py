"""The nano checkpoint: a small Qwen2 model trained from scratch on synthetic maths.

``problems`` makes the questions and their worked solutions, ``tokenizer`` the vocabulary, ``train`` the
weights in ``core/nano/``, and ``evaluate`` the exact match on the 1,000 held-out questions of ``heldout.jsonl``.
"""
