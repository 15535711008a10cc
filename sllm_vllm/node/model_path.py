"""Checks that a model given as a path exists, before vLLM does, which takes a minute to report it.

``vllm serve`` takes a path or a name on the Hub, and asks the Hub for a path that does not exist. A model that can only
be a path is checked at once by ``run``, by the node agent, and by the router when it reads its configuration or an
order to deploy.
"""

from __future__ import annotations

import os
from pathlib import Path

from sllm_vllm.errors import OrderRefused

_BEGINNINGS = ("/", "./", "../", "~/")


def is_path(model: str) -> bool:
    """Whether a model is written as a path and can't be a name on the Hub or a URL."""
    return model in {".", "..", "~"} or model.startswith(_BEGINNINGS)


def problem_with(model: str, directory: str | Path = "") -> str:
    """Why a model given as a path can't be served; empty if it can, or is not a path. Reads the disk.

    Args:
        directory: what a relative path starts at. Default: this process's.
    """
    if not is_path(model):
        return ""
    path = os.path.join(directory, os.path.expanduser(model))
    try:
        os.stat(path)
    except OSError as error:
        return f"{path}: {error.strerror}"
    except ValueError:  # the path contains a NUL
        return "it is no path"
    return "" if os.access(path, os.R_OK) else f"{path}: Permission denied"


def require_model(model: str, directory: str | Path) -> None:
    """Check an order's model. Reads the disk.

    Raises:
        OrderRefused: it is written as a path and can't be served.
    """
    if problem := problem_with(model, directory):
        raise OrderRefused(model, problem, "give a directory that exists, or a name on the Hub")
