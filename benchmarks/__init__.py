"""Timing, reference checks and the nano checkpoint behind the numbers qwen-rt reports."""
