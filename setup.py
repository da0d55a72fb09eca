"""Put the workflow, with an example of its configuration, into the wheel, from where `hamscale init` takes them."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("workflow", "config", "envs")


class BuildWithWorkflow(build_py):
    """Build the package, with folders of the project as hamscale/project."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an editable package finds them where they are
            for name in FOLDERS:
                shutil.copytree(name, Path(self.build_lib, "hamscale", "project", name), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithWorkflow})
