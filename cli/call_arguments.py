"""With what a pipeline is called: arguments that its folder has, that flags give, and JSON gives.

``call.json`` in a pipeline's folder holds arguments of its call as a JSON object. QuantDiT.py
writes those that it calibrated with, so that sampling goes on with them. diffusers does not read
it.
"""
import json
from pathlib import Path
from typing import Any

from errors import UserError

NAME = "call.json"
Arguments = dict[str, Any]
# Our own loops give these.
OURS = ("prompt", "generator", "output_type", "return_dict", "num_images_per_prompt",
        "num_videos_per_prompt")


def call_arguments(
    folder: Path,
    pipeline_args: str | None,  # of --pipeline-args
    **flags: Any,  # arguments that flags give; None: the flag was not given
) -> Arguments:
    """Collect the arguments of a pipeline's call: JSON is stronger than flags, flags than folders.

    Raises:
        UserError: a JSON text is no object, or gives what we give.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    more = _object(pipeline_args or "{}", f"--pipeline-args '{pipeline_args}'")
    for name in OURS:
        if name in more:
            raise UserError(f"--pipeline-args gives '{name}', which is ours to give: drop it")
    return {**read(folder), **given, **more}


def read(folder: Path) -> Arguments:
    """Read a folder's ``call.json``; without one there are no arguments.

    Raises:
        UserError: it is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        return {}
    return _object(path.read_text(encoding="utf-8"), f"'{path}'")


def write(folder: Path, arguments: Arguments) -> None:
    """Write a folder's ``call.json``."""
    (folder / NAME).write_text(json.dumps(arguments, indent=1) + "\n", encoding="utf-8")


def number_of_steps(text: str) -> int:
    """Read ``--num-sampling-steps`` as a pipeline's scheduler takes it.

    Raises:
        UserError: it is no whole number from 1 on.
    """
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--num-sampling-steps {text} is no number of steps: a pipeline's "
                        "scheduler takes a whole number from 1 on")
    return int(text)


def _object(text: str, what: str) -> Arguments:
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{what} is no JSON object: "
                        "expected one such as '{\"guidance_scale\": 3.5}'")
    return values
