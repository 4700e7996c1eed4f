"""The story of sample_merge_TAS.py: choose what makes the images, join the others, sample."""
import argparse

from cli.pipeline_sampling import is_pipeline_folder, pipeline_sampling
from cli.sample_settings import sample_settings
from sampling.class_conditional import ClassConditional
from sampling.processes import reported_endings, start_processes
from sampling.source import Source
from sampling.story import assemble, sample


def sample_images(args: argparse.Namespace, launcher: int) -> None:
    """Make the images that the command line asks for, or assemble them.

    Args:
        launcher: the process id of this one's parent when it started.

    Raises:
        UserError: a flag is wrong, weights cannot be had, or the folder holds other images.
    """
    source = image_source(args)
    processes = start_processes(source.run.threads, source.run.tf32, launcher)
    with reported_endings(processes, source.folder):
        if source.run.assemble:
            assemble(source, processes)
        else:
            sample(source, processes)


def image_source(args: argparse.Namespace) -> Source:
    """Choose what makes the images: a DiT of this repository, or a pipeline.

    Raises:
        UserError: a flag is wrong.
    """
    if is_pipeline_folder(args):
        settings = pipeline_sampling(args)
        # It loads diffusers.
        from sampling.pipeline import PipelineSource
        return PipelineSource(settings)
    return ClassConditional(sample_settings(args))
