"""Judge a quantised video model by its FVD, so that a search can choose group sizes.

The FVD of its videos to real ones is its loss (Q-DiT, equation 5). Less is better.
"""
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

import config
from evaluation.judge import Judge
from evaluation.metrics import frechet_distance, statistics
from evaluation.video import VideoExtractor, load_video_set, video_features

BATCH = 3  # videos at a time

# Samples the videos of these numbers from a model, uint8 (N, F, H, W, 3).
SampleVideos = Callable[[nn.Module, range], NDArray]


def fvd_judge(
    sample: SampleVideos,
    extractor: VideoExtractor,
    reference: Path,
    description: str,
) -> Judge:
    """Judge by the FVD of ``config.judge_fvd_videos`` videos to those of an ``.npz``.

    Args:
        description: of ``sample``; changes whenever its videos would.

    Raises:
        ValueError: the reference cannot be read, or the network does not take its videos.
    """
    real = load_video_set(reference, extractor, BATCH).features
    count = config.judge_fvd_videos

    def loss(quantised: nn.Module) -> float:
        batches = []
        for start in range(0, count, BATCH):
            indices = range(start, min(start + BATCH, count))
            videos = sample(quantised, indices)
            batches.append(video_features(videos, extractor, BATCH, "features"))
        return frechet_distance(statistics(np.concatenate(batches)), real)

    text = f"FVD of {count} videos to {reference.name}, features {extractor.name}, {description}"
    return Judge(loss, text)
