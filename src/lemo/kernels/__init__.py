"""Tensors in, tensors out. Every op has a plain torch twin in `reference`; `dispatch` picks one and says why."""
