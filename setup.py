"""What pyproject.toml cannot say: a wheel's three folders of the clone, and its description.

launch/ and profiling/ are scripts that run by their paths, with the folder around them first on Python's path. In
site-packages their names would be anybody's; under ds_mofa/commands/clone/ they, and the configs that they name, are as
they are in a clone. The description is README.md without what leads nowhere from a package index: pictures, and links into
the clone. Everything else is in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

CLONE = {f"ds_mofa.commands.clone.{folder}": folder for folder in ("configs", "launch", "profiling")}
PICTURE_AND_CAPTION = r"!\[[^]]*\]\([^)]*\)\n(?:\n\*[^*]+\*\n)?\n?"
LINK_INTO_THE_CLONE = r"\[([^]]+)\]\((?!https:)[^)]*\)"

readme = re.sub(PICTURE_AND_CAPTION, "", Path(__file__).with_name("README.md").read_text(encoding="utf-8"))
readme = re.sub(LINK_INTO_THE_CLONE, r"\1", readme)

setup(
    packages=[*find_namespace_packages(include=["ds_mofa*"]), *CLONE],
    package_dir=CLONE,
    long_description=f"{readme}\nThe documents that are named here come with the sources.\n",
    long_description_content_type="text/markdown",
)
