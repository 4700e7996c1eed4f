"""What the benchmark scripts share: ``--only SECTION``, what they ran on, and a stopwatch."""
import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from cli.memory import keep_freed_memory

T = TypeVar("T")
CPU = torch.device("cpu")


def run_sections(description: str, sections: dict[str, Callable[[], None]]) -> None:
    """Parse the command line and run all sections, or the one asked for."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sections)
    only = parser.parse_args().only
    keep_freed_memory()  # as the scripts do
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    for key, section in sections.items():
        if only in (None, key):
            section()


def timed(call: Callable[[], T], device: torch.device = CPU) -> tuple[T, float]:
    """Return what ``call`` returns, and the seconds until the device was done with it."""
    wait_for(device)
    began = time.perf_counter()
    result = call()
    wait_for(device)
    return result, time.perf_counter() - began


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
