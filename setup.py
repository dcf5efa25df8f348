"""Build step of the wheel. The package itself is described in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
DEFAULTS = ("configs", "ds_configs", "data/movie-reviews", "launcher", "slurm/train.sbatch")
"""Files and folders of the checkout that an installed package also needs, in `pkd_dist/defaults/`.

`pkd_dist.config.paths.packaged_path` finds them in both places.
"""


class BuildWithDefaults(build_py):
    """Copy the defaults into the wheel; an editable install reads those of the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "pkd_dist" / "defaults"
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build
        for name in DEFAULTS:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / name, target / name)


setup(cmdclass={"build_py": BuildWithDefaults})
