"""What makes the images of sample_merge_TAS.py: a DiT of this repository, or a pipeline."""
import argparse

from cli.pipeline_sampling import is_pipeline_folder, pipeline_sampling
from cli.sample_settings import sample_settings
from sampling.class_conditional import ClassConditional
from sampling.source import Source


def image_source(args: argparse.Namespace) -> Source:
    """Choose what makes the images.

    Raises:
        UserError: a flag is wrong.
    """
    if is_pipeline_folder(args):
        settings = pipeline_sampling(args)
        # It loads diffusers.
        from sampling.pipeline import PipelineSource
        return PipelineSource(settings)
    return ClassConditional(sample_settings(args))
