"""Judge a quantised model of which only recorded calls are known, to choose its group sizes."""
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import config
from architectures.sites import Call
from architectures.tracing import tensors_of
from evaluation.judge import Judge
from evaluation.metrics import sqnr_db


def output_judge(model: nn.Module, calls: Sequence[Call]) -> Judge:
    """Judge by minus the SQNR in dB of what a quantised model returns in some of the calls.

    The reference is the float ``model``.
    """
    count = min(len(calls), config.judge_images)
    chosen = [calls[i * len(calls) // count] for i in range(count)]
    reference = _outputs(model, chosen)

    def negative_sqnr(quantised: nn.Module) -> float:
        return -sqnr_db(reference, _outputs(quantised, chosen))

    return Judge(negative_sqnr, f"SQNR of the outputs of {count} calls")


@torch.no_grad()
def _outputs(model: nn.Module, calls: Sequence[Call]) -> Tensor:
    outputs = [tensors_of(model(**call)) for call in calls]
    return torch.cat([value.flatten().float() for values in outputs for value in values])
