"""ADM's five numbers of a set of images."""
import dataclasses
from dataclasses import dataclass

import torch

from evaluation.features import ImageSet
from evaluation.metrics import frechet_distance, inception_score, precision_recall


@dataclass(frozen=True)
class Scores:
    """ADM's five numbers for ``n`` samples; None where the files do not hold what is needed."""

    n: int | None
    fid: float
    sfid: float
    inception_score: float | None
    precision: float | None
    recall: float | None


def score(reference: ImageSet, samples: ImageSet, half: bool = False, device: str | torch.device = "cpu") -> Scores:
    """The five numbers of ``samples``.

    Args:
        half: compute the distances behind precision and recall in float16, as ADM's evaluator does.

    Raises:
        ValueError: the images are of different resolutions.
    """
    if reference.size is not None and samples.size is not None and reference.size != samples.size:
        raise ValueError(f"images of '{reference.name}' are {'x'.join(map(str, reference.size))}, those of '{samples.name}' "
                         f"{'x'.join(map(str, samples.size))}: expected one resolution")
    both = reference.pool_features is not None and samples.pool_features is not None
    precision, recall = precision_recall(reference.pool_features, samples.pool_features, half, device) if both else (None, None)
    return Scores(samples.count, frechet_distance(reference.pool, samples.pool), frechet_distance(reference.spatial, samples.spatial),
                  None if samples.logits is None else inception_score(samples.logits), precision, recall)


HEADINGS = ("N", "FID", "sFID", "IS", "precision", "recall")


def cells(scores: Scores) -> list[str]:
    """The scores as text under ``HEADINGS``; n/a where a file does not hold what is needed."""
    forms = ("d", ".3f", ".3f", ".2f", ".4f", ".4f")
    return ["n/a" if value is None else format(value, form) for value, form in zip(dataclasses.astuple(scores), forms)]
