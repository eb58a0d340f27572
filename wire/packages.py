"""Which packages are installed, by the names that pip knows, without importing them."""

from __future__ import annotations

import importlib.metadata


def installed(distribution: str) -> bool:
    """Whether this environment has the distribution, in any version."""
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
