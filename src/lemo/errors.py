"""The error that means "the user can fix this": the command line prints it as one line and exits with status 2."""

from __future__ import annotations


class UserError(ValueError):
    """Something in the user's input is wrong. The message names it and carries the remedy."""
