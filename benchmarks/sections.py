"""What the benchmark scripts share: ``--only SECTION``, and a first line that says what they ran on."""
import argparse
from collections.abc import Callable

import torch

from cli.memory import keep_freed_memory


def run_sections(description: str, sections: dict[str, Callable[[], None]]) -> None:
    """Parse the command line and run all sections, or the one asked for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sections)
    only = parser.parse_args().only
    keep_freed_memory()  # as the scripts do
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    for key, section in sections.items():
        if only in (None, key):
            section()
