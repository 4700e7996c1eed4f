"""CLIP score: how well images go with their prompts (Hessel et al., 2021).

``100 max(cos(image, text), 0)``, the mean over the pairs. The paper's factor is 2.5; that of 100 is
what tables of text-to-image models show.
"""
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from numpy.typing import NDArray

from errors import UserError

BATCH = 32  # pairs at a time

# Images uint8 (N, H, W, 3) and N prompts to their score.
ClipScore = Callable[[NDArray, Sequence[str]], float]


def load_clip(folder: Path, device: torch.device) -> ClipScore:
    """Load a CLIP model from a folder that transformers saved, with its processor.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import CLIPModel, CLIPProcessor
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True).float().eval().to(device)
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    # The loaders raise types of several libraries.
    except Exception as error:
        raise UserError(
            f"cannot load --clip '{folder}' ({type(error).__name__}: {error}): expected a folder "
            "with a CLIPModel and its processor") from None

    @torch.inference_mode()
    def score(images: NDArray, prompts: Sequence[str]) -> float:
        total = 0.0
        for start in range(0, len(images), BATCH):
            inputs = processor(
                images=list(images[start:start + BATCH]), text=list(prompts[start:start + BATCH]),
                return_tensors="pt", padding=True, truncation=True).to(device)
            output = model(**inputs)
            cosines = (output.image_embeds * output.text_embeds).sum(dim=1)
            total += float(cosines.clamp(min=0).sum())
        return 100 * total / len(images)

    return score
