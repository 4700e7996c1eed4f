"""Build a wheel of one package, ``ditas``, with all that it imports from the rest of this folder.

Here the rooms lie side by side, and import each other by names that would be everybody's in
site-packages: ``config``, ``files``, ``models``. In the wheel they lie in ``ditas/rooms/``, and
their imports say so. Nothing else differs, and nothing happens when they are imported.
"""
import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PACKAGE = "ditas"
ROOMS = "ditas.rooms"


def source_of(module: str) -> Path | None:
    """Find the file of a module in this folder; None: it is from elsewhere."""
    path = ROOT.joinpath(*module.split("."))
    candidates = path.with_suffix(".py"), path / "__init__.py"
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def imported_by(path: Path) -> Iterator[str]:
    """Name all that a file may import, inside functions too, and the packages that it lies in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for parent in path.relative_to(ROOT).parents:
        yield ".".join(parent.parts)


def reached() -> list[Path]:
    """List the files of the package, and all in this folder that these need."""
    waiting = set((ROOT / PACKAGE).glob("*.py"))
    files: set[Path] = set()
    while waiting:
        path = waiting.pop()
        files.add(path)
        sources = {source_of(module) for module in imported_by(path) if module}
        waiting |= sources - files - {None}
    return sorted(files)


def is_room(module: str) -> bool:
    """Tell whether a module lies in this folder, beside the package."""
    top = module.partition(".")[0]
    return top != PACKAGE and source_of(top) is not None


def as_installed(text: str) -> str:
    """Let the imports of a file's text find the rooms inside the package."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and is_room(node.module):
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace("from ", f"from {ROOMS}.", 1)
        elif isinstance(node, ast.Import) and is_room(node.names[0].name):
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace("import ", f"from {ROOMS} import ", 1)
    return "".join(lines)


class BuildRooms(build_py):
    """Puts the rooms into the package. ``pip install --editable`` leaves them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        rooms = Path(self.build_lib, *ROOMS.split("."))
        # An earlier build may have left files that are gone.
        shutil.rmtree(rooms, ignore_errors=True)
        for path in reached():
            name = path.relative_to(ROOT)
            is_own = name.parts[0] == PACKAGE
            target = Path(self.build_lib, name) if is_own else rooms / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(as_installed(path.read_text()))

    def get_source_files(self) -> list[str]:
        """List what a source distribution has to hold."""
        return [str(path.relative_to(ROOT)) for path in reached()]


setup(packages=[PACKAGE], cmdclass={"build_py": BuildRooms})
