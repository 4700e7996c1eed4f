"""ADM's five numbers of a set of images, and how they are shown."""
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


def score(
    reference: ImageSet,
    samples: ImageSet,
    half: bool = False,
    device: str | torch.device = "cpu",
) -> Scores:
    """Compute the five numbers of ``samples``.

    Args:
        half: compute the distances behind precision and recall in float16, as ADM's evaluator does.

    Raises:
        ValueError: the images are of different resolutions.
    """
    check_sizes(reference, samples)
    precision, recall, inception = None, None, None
    if reference.pool_features is not None and samples.pool_features is not None:
        precision, recall = precision_recall(
            reference.pool_features, samples.pool_features, half, device)
    if samples.logits is not None:
        inception = inception_score(samples.logits)
    return Scores(
        n=samples.count,
        fid=frechet_distance(reference.pool, samples.pool),
        sfid=frechet_distance(reference.spatial, samples.spatial),
        inception_score=inception,
        precision=precision,
        recall=recall)


def check_sizes(reference: ImageSet, samples: ImageSet) -> None:
    """Check that two sets are of one resolution, as far as their sizes are known.

    Raises:
        ValueError: they are not.
    """
    if reference.size is None or samples.size is None or reference.size == samples.size:
        return
    expected = "x".join(map(str, reference.size))
    given = "x".join(map(str, samples.size))
    raise ValueError(
        f"images of '{reference.name}' are {expected}, those of '{samples.name}' {given}: "
        "expected one resolution")


HEADINGS = ("N", "FID", "sFID", "IS", "precision", "recall")
_FORMATS = ("d", ".3f", ".3f", ".2f", ".4f", ".4f")


def cells(scores: Scores) -> list[str]:
    """Format the scores under ``HEADINGS``; n/a where a file does not hold what is needed."""
    return [
        "n/a" if value is None else format(value, form)
        for value, form in zip(dataclasses.astuple(scores), _FORMATS)
    ]
