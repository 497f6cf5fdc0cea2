"""scikit-learn is imported where something needs it; where it is not there, the extra is named."""

from __future__ import annotations

__all__ = ["sklearn_needed"]


def sklearn_needed() -> None:
    """Whether scikit-learn is there.

    Raises:
        ImportError: it is not.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "probes and transformers need scikit-learn: pip install fmapkit[sklearn]"
        ) from error
