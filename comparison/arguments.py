"""Command lines, written."""

# Floating point on every machine alike, so that rows differ by their recipes alone.
SAMPLING_ARITHMETIC = {"tf32": False, "backend": "fake"}


def flags(**values) -> list[str]:
    """Write a command line: ``flags(cfg_scale=1.5, tf32=False, vae=None)``.

    That one is ``--cfg-scale 1.5 --no-tf32``.
    """
    arguments = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            arguments += [f"--{flag}", str(value)]
    return arguments
