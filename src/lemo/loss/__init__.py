"""Language-model head and cross-entropy in chunks of labelled rows: T×V logits never exist."""

from lemo.loss.segmented import segmented_cross_entropy, token_losses

__all__ = ["segmented_cross_entropy", "token_losses"]
