"""How good a model is: dense held-out loss, a completion to look at, and how far sparse gradients are from dense."""

from lemo.evaluation.completion import Sample, sample_completion
from lemo.evaluation.gradients import GradientAgreement, gradient_agreement
from lemo.evaluation.perplexity import BucketLoss, DocumentLoss, EvaluationResult, evaluate

__all__ = [
    "BucketLoss",
    "DocumentLoss",
    "EvaluationResult",
    "GradientAgreement",
    "Sample",
    "evaluate",
    "gradient_agreement",
    "sample_completion",
]
