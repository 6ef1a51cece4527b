"""Executing a decoder layer with blocks left out of it."""
