"""Informativeness of token blocks, and the plans made from it."""
