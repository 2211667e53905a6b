"""What pyproject.toml cannot say: a wheel has three folders of the clone inside of the package, where `ds-mofa` finds them.

launch/ and profiling/ are scripts that run by their paths, with the folder around them first on Python's path. In
site-packages their names would be anybody's; under ds_mofa/commands/clone/ they, and the configs that they name, are as
they are in a clone. Everything else is in pyproject.toml.
"""

from setuptools import find_namespace_packages, setup

CLONE = {f"ds_mofa.commands.clone.{folder}": folder for folder in ("configs", "launch", "profiling")}

setup(
    packages=[*find_namespace_packages(include=["ds_mofa*"]), *CLONE],
    package_dir=CLONE,
)
