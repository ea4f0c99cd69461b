"""Pictures of bench, compare and timeline: matplotlib without a screen."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FORMATS = (".png", ".svg", ".pdf")


def check(path: str | os.PathLike[str], option: str, error: type[Exception]) -> None:
    """Check that a picture can be drawn, before anything takes long.

    Raises:
        error: matplotlib is missing, or the ending of `path`, which `option` gave, is none of `FORMATS`.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise error(f"{option} {path} cannot be drawn: a picture's name ends in {', '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise error(f"{option} needs matplotlib: pip install matplotlib") from None


@contextlib.contextmanager
def figure(path: str | os.PathLike[str], option: str, error: type[Exception], **subplots: Any) -> Iterator[Any]:
    """Yield a figure and its axes, as `pyplot.subplots` returns them; written into `path` when the block ends.

    Raises:
        error: see `check`; or the file cannot be written.
    """
    check(path, option, error)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Text of other people is drawn as it is, and stays text in an SVG.
    with matplotlib.rc_context({"svg.fonttype": "none", "text.parse_math": False, "hatch.linewidth": 0.6}):
        drawn, axes = pyplot.subplots(layout="constrained", **subplots)
        try:
            yield drawn, axes
            drawn.savefig(path, dpi=130)
        except (OSError, ValueError) as problem:
            raise error(f"{option} {path} cannot be drawn: {getattr(problem, 'strerror', None) or problem}") from None
        finally:
            pyplot.close(drawn)
