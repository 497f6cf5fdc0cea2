"""One map in a line: what a row of the table says of it, and what `repr` does."""

from __future__ import annotations

from fmapkit.readable import ReadableMap


def size(nbytes: int) -> str:
    """A number of bytes, as people write it."""
    if nbytes < 1024:
        return f"{nbytes} B"
    power = min((nbytes.bit_length() - 1) // 10, 3)
    return f"{nbytes / 1024**power:.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"


def row(fm: ReadableMap) -> tuple[str, ...]:
    """Layer, kind, filters, shape, dtype, device, bytes and σ."""
    name = fm.layer + fm.path + (f" #{fm.call}" if fm.call else "")
    return (
        name,
        fm.kind,
        str(len(fm.filters)) if fm.filters is not None else "–",
        "×".join(map(str, fm.shape)) or "scalar",
        str(fm.dtype).removeprefix("torch."),
        str(fm.device),
        size(fm.nbytes),
        fm.nonlinearity or "",
    )


def map_line(fm: ReadableMap) -> str:
    """`FeatureMap(layer='conv1', kind='activation', shape=8×16×32×32, float32, cpu, σ=relu)`."""
    parts = [f"layer={fm.layer!r}", f"kind={fm.kind!r}"]
    if fm.filter is not None:
        parts.append(f"filter={fm.filter}")
    if fm.path:
        parts.append(f"path={fm.path!r}")
    if fm.call:
        parts.append(f"call={fm.call}")
    _, _, _, shape, dtype, device, _, sigma = row(fm)
    parts += [f"step={fm.step}", f"shape={shape}", dtype, device]
    if sigma:
        parts.append(f"σ={sigma}")
    return f"FeatureMap({', '.join(parts)})"
