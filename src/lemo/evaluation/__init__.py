"""How good a model is: dense held-out loss, facts found in long text, a completion to look at; and how far sparse
gradients are from dense ones."""

from lemo.evaluation.completion import Sample, sample_completion
from lemo.evaluation.gradients import GradientAgreement, gradient_agreement
from lemo.evaluation.perplexity import BucketLoss, DocumentLoss, EvaluationResult, compare_positions, evaluate
from lemo.evaluation.retrieval import Answer, accuracy, by_depth, retrieval_answers

__all__ = [
    "Answer",
    "BucketLoss",
    "DocumentLoss",
    "EvaluationResult",
    "GradientAgreement",
    "Sample",
    "accuracy",
    "by_depth",
    "compare_positions",
    "evaluate",
    "gradient_agreement",
    "retrieval_answers",
    "sample_completion",
]
