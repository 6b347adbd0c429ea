"""What pyproject.toml can't say: a wheel carries configs/, eval/ and scripts/launch/ in mohd_train/_data.

They stay at the top of the repository, where people look for them and edit them; mohd_train.resources finds either.
"""

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "src"))

from mohd_train.resources import CARRIED  # noqa: E402 (needs the standard library only)


class BuildWithData(build_py):
    """Copies the carried files into the wheel; an editable installation reads them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        shutil.rmtree(Path(self.build_lib, "mohd_train", "_data"), ignore_errors=True)  # of an earlier build
        for source, target in self._carried().items():
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        carried = [] if self.editable_mode else [str(target) for target in self._carried().values()]
        return [*super().get_outputs(include_bytecode), *carried]

    def _carried(self) -> dict[Path, Path]:
        """File of the repository -> where it goes."""
        files = [
            file for name in CARRIED for file in [HERE / name, *sorted((HERE / name).rglob("*"))] if file.is_file()
        ]
        files = [file for file in files if "__pycache__" not in file.parts]
        return {file: Path(self.build_lib, "mohd_train", "_data", file.relative_to(HERE)) for file in files}


setup(cmdclass={"build_py": BuildWithData})
