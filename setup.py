"""What pyproject.toml cannot say: a wheel has three folders of the clone inside of the package, where `ds-mofa` finds them.

launch/ and profiling/ are scripts that run by their paths, with the folder around them first on Python's path. In
site-packages their names would be anybody's; under ds_mofa/commands/shipped/ they, and the configs that they name, are as
they are in a clone. Everything else is in pyproject.toml.
"""

from setuptools import find_namespace_packages, setup

SHIPPED = {f"ds_mofa.commands.shipped.{folder}": folder for folder in ("configs", "launch", "profiling")}

setup(
    packages=[*find_namespace_packages(include=["ds_mofa*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={"ds_mofa.commands.shipped.configs": ["*.json", "*.yaml", "models/*.json"]},
)
