"""Small models of diffusers' transformers and their calls: of images, of videos, of sound."""
from architectures.audio_examples import AUDIO_EXAMPLES
from architectures.example_parts import TEXT, TEXT_WIDTH, Example, build, draw_call
from architectures.image_examples import IMAGE_EXAMPLES
from architectures.video_examples import VIDEO_EXAMPLES

__all__ = ["EXAMPLES", "IMAGE_EXAMPLES", "TEXT", "TEXT_WIDTH", "VIDEO_EXAMPLES", "Example", "build",
           "draw_call", "examples_of"]

EXAMPLES = (*IMAGE_EXAMPLES, *VIDEO_EXAMPLES, *AUDIO_EXAMPLES)


def examples_of(class_name: str) -> list[Example]:
    """List the examples of a class."""
    return [example for example in EXAMPLES if example.class_name == class_name]
