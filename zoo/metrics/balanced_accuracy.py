"""Balanced accuracy as a metric module: recipes name it under `task.metrics`."""

import datasets
import evaluate
from sklearn.metrics import balanced_accuracy_score


class BalancedAccuracy(evaluate.Metric):
    def _info(self):
        numbers = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="The mean of the classes' recalls: each class counts the same, however rare.",
            citation="Brodersen et al., ICPR 2010",
            features=datasets.Features({"predictions": numbers, "references": numbers}),
        )

    def _compute(self, predictions, references):
        return {"balanced_accuracy": float(balanced_accuracy_score(references, predictions))}
