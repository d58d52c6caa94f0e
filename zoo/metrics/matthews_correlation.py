"""Matthews correlation as a metric module: recipes name it under `task.metrics`."""

import datasets
import evaluate
from sklearn.metrics import matthews_corrcoef


class MatthewsCorrelation(evaluate.Metric):
    def _info(self):
        numbers = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Correlation of gold and predicted classes: 1 perfect, 0 chance, -1 always wrong.",
            citation="Matthews, Biochimica et Biophysica Acta 405 (1975); several classes: Gorodkin (2004)",
            features=datasets.Features({"predictions": numbers, "references": numbers}),
        )

    def _compute(self, predictions, references):
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
