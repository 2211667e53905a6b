"""The package as pip installs it, away from the clone: for tests of what users have."""

import subprocess
import sys
from pathlib import Path

__all__ = ["install"]

_ROOT = Path(__file__).resolve().parents[1]


def install(source: Path, folder: Path) -> tuple[Path, Path]:
    """Make a wheel of the files that git knows, copied to ``source``, and unpack it below ``folder``.

    Returns:
        The wheel, and the folder to put on ``PYTHONPATH``; its bin/ has the commands.
    """
    listed = subprocess.run(["git", "ls-files"], cwd=_ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if not name.startswith(("tests/", "experiments/")) and (_ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((_ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True, timeout=300)
    [wheel] = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True, timeout=300)
    return wheel, folder / "site"
