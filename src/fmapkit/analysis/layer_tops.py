"""`LayerTops`: what `TopInputs` knows of one layer, and the parts of the inputs that it means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from fmapkit.analysis._inputs import fields_for, image_of, sequence_of
from fmapkit.errors import ArgumentError, FilterRangeError
from fmapkit.tables import Shown, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fmapkit.explain import ReceptiveField

_ROWS = 16  # filters that a table shows


class Hit(NamedTuple):
    """One of the inputs that excite a filter most.

    Attributes:
        input: its number: its place in the data set, as a rule.
        score: how strong it is.
        at: the location of the map where it is strongest: (row, column) of an image's, (position,)
            of a sequence's, () of a map without locations.
    """

    input: int
    score: float
    at: tuple[int, ...]


class Patch(NamedTuple):
    """The part of an input that a filter saw where it was strongest.

    Attributes:
        hit: which input, how strong, and where in the map.
        box: its pixels: (top, left, bottom, right), half open, cut at the border.
        pixels: (channels, rows, columns) of the input there, a view.
        image: the input.
    """

    hit: Hit
    box: tuple[int, int, int, int]
    pixels: Tensor
    image: Tensor


class Context(NamedTuple):
    """The tokens around the one at which a filter was strongest.

    Attributes:
        hit: which input, how strong, and which position.
        tokens: what is around it, decoded.
        marked: which of them it is.
    """

    hit: Hit
    tokens: tuple[Any, ...]
    marked: int

    def __str__(self) -> str:
        parts = [f"«{t}»" if i == self.marked else str(t) for i, t in enumerate(self.tokens)]
        return " ".join(part.strip() for part in parts)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LayerTops(Shown):
    """The k inputs that excite each filter of a layer most; tensors on the maps' device.

    Attributes:
        layer: its qualified name.
        kind: of the maps.
        nonlinearity: σ; None where there is none.
        path: place in a nested output; else "".
        filters: the filters that the rows belong to, in order.
        seen: inputs that were looked at.
        scores: (filters, k), the strongest first; -inf where fewer inputs have come.
        inputs: (filters, k) int64, their numbers; -1 where fewer have come.
        at: (filters, k, axes of locations) int64, where in the map each was strongest; -1 likewise.
    """

    layer: str
    kind: str
    nonlinearity: str | None
    path: str
    filters: tuple[int, ...]
    seen: int
    scores: Tensor
    inputs: Tensor
    at: Tensor

    def __len__(self) -> int:
        """Number of filters."""
        return len(self.filters)

    def __getitem__(self, filter: int) -> list[Hit]:
        """The inputs of one filter, by the layer's own numbering, the strongest first.

        Waits for the device.

        Raises:
            FilterRangeError: there is no such filter.
        """
        row = self._row(filter)
        found = zip(
            self.inputs[row].tolist(), self.scores[row].tolist(), self.at[row].tolist(), strict=True
        )
        return [Hit(i, score, tuple(at)) for i, score, at in found if i >= 0]

    def _row(self, filter: int) -> int:
        if isinstance(filter, bool) or not isinstance(filter, int) or filter not in self.filters:
            raise FilterRangeError(
                f"filter {filter!r} is out of range: of the {self.kind} of layer {self.layer!r}, "
                f"{len(self)} filters were seen, {self.filters[0]} to {self.filters[-1]}",
                filter=filter,
                candidates=self.filters,
                layer=self.layer,
                kind=self.kind,
            )
        return self.filters.index(filter)

    def strongest(self, count: int) -> list[int]:
        """The filters with the highest scores, the highest first; waits for the device."""
        order = self.scores[:, 0].argsort(dim=0, descending=True, stable=True)[:count]
        return [self.filters[i] for i in order.tolist()]

    def _table(self) -> Table:
        rows = []
        for filter in self.filters[:_ROWS]:
            hits = self[filter]
            first: tuple[str, ...] = ("–", "–", "–")
            for hit in hits[:1]:
                first = f"{hit.score:.4g}", str(hit.input), ", ".join(map(str, hit.at))
            then = ", ".join(str(h.input) for h in hits[1:5]) + ", …" * (len(hits) > 5)
            rows.append((str(filter), *first, then))
        heads = ("filter", "strongest", "input", "at", "then")
        more = f", {len(self) - _ROWS} more filters" if len(self) > _ROWS else ""
        last = f"LayerTops: {self.layer + self.path!r}, {self.kind}, {self.seen} inputs{more}"
        return Table(heads, rows, range(len(heads)), last)

    # -- the parts of the inputs -----------------------------------------------------------------

    def patches(
        self,
        dataset: Any,
        *,
        filters: int | Iterable[int] | None = None,
        model: nn.Module | None = None,
        field: ReceptiveField | None = None,
        image: Callable[[Any], Tensor] | None = None,
    ) -> dict[int, list[Patch]]:
        """The part of each input that the filter saw where it was strongest.

        Of maps with rows and columns, and of the tokens of a vision transformer.

        Args:
            dataset: gives the inputs by their numbers: `dataset[number]` is an image (channels,
                rows, columns), as the model gets it but without the axis of samples, or a tuple or
                dict that begins with one.
            filters: one or several; None for all.
            model: the one that was captured, to find its receptive field; or
            field: that field, of images of the same size.
            image: the image of what the data set gives, where it is none of the above.

        Returns:
            By filter, the strongest first.

        Raises:
            ArgumentError: neither a model nor a field is given, the data set ends before an input,
                or what it gives is no image.
            FilterRangeError: there is no such filter.
        """
        hits = {filter: self[filter] for filter in self._chosen(filters)}
        if self.at.shape[2] not in (1, 2):
            raise ArgumentError(
                "patches are of maps with rows and columns, or tokens of an image, and the "
                f"{self.kind} of layer {self.layer!r} has {self.at.shape[2]} axes of locations",
                layer=self.layer,
                kind=self.kind,
            )
        fields = fields_for(self.layer, self.kind, self.path, model, field)

        def patch(hit: Hit) -> Patch:
            whole = image_of(dataset, hit.input, image)
            top, left, bottom, right = fields(whole).box(*hit.at)
            pixels = whole[:, top:bottom, left:right]
            return Patch(hit, (top, left, bottom, right), pixels, whole)

        return {filter: [patch(hit) for hit in its] for filter, its in hits.items()}

    def contexts(
        self,
        dataset: Any,
        *,
        filters: int | Iterable[int] | None = None,
        decode: Callable[[int], Any] | None = None,
        before: int = 8,
        after: int = 2,
        tokens: Callable[[Any], Any] | None = None,
    ) -> dict[int, list[Context]]:
        """The tokens around the one at which each filter was strongest, for models of sequences.

        Args:
            dataset: gives the inputs by their numbers: `dataset[number]` is a sequence of tokens,
                or a tuple or dict that begins with one.
            filters: one or several; None for all.
            decode: what a token says, such as `tokenizer.decode`; None: the token itself.
            before: how many tokens to give before it.
            after: how many after it.
            tokens: the sequence of what the data set gives, where it is none of the above.

        Returns:
            By filter, the strongest first. `str()` of one marks the token.

        Raises:
            ArgumentError: the data set ends before an input, a sequence is shorter than the map, or
                the maps have no positions.
            FilterRangeError: there is no such filter.
        """
        for name, value in (("before", before), ("after", after)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ArgumentError(f"{name} must be a number of tokens, 0 or more, not {value!r}")
        if self.at.shape[2] != 1:
            raise ArgumentError(
                f"contexts are of maps with positions, and the {self.kind} of layer "
                f"{self.layer!r} has {self.at.shape[2]} axes of locations"
                + ("; see patches()" if self.at.shape[2] == 2 else ""),
                layer=self.layer,
                kind=self.kind,
            )
        said = decode or (lambda token: token)
        found: dict[int, list[Context]] = {}
        for filter in self._chosen(filters):
            found[filter] = []
            for hit in self[filter]:
                sequence = sequence_of(dataset, hit.input, tokens)
                place = hit.at[0]
                if place >= len(sequence):
                    raise ArgumentError(
                        f"input {hit.input} of the data set has {len(sequence)} tokens, and filter "
                        f"{filter} was strongest at position {place}: it is another data set, or "
                        "one that the model got in another form"
                    )
                first = max(0, place - before)
                around = sequence[first : place + after + 1]
                found[filter].append(Context(hit, tuple(map(said, around)), place - first))
        return found

    def plot(
        self,
        dataset: Any,
        *,
        filters: int | Iterable[int] | str | None = None,
        model: nn.Module | None = None,
        field: ReceptiveField | None = None,
        image: Callable[[Any], Tensor] | None = None,
        max_filters: int = 8,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        below: Mapping[int, Sequence[Tensor]] | None = None,
        title: str | None = None,
    ) -> Figure:
        """Draw the k patches of each filter (extra: `plot`): figure 2 of Zeiler & Fergus (2014).

        Args:
            dataset: as in `patches`.
            filters: one or several; "strongest" for those with the highest scores; None for all.
            model: as in `patches`; or
            field: as there.
            image: as there.
            max_filters: how many filters are drawn at most.
            mean: of the images' channels, where they were normalised by it; with `std`.
            std: of the images' channels.
            below: by filter, an image (channels, rows, columns) for each of its inputs, whose patch
                is drawn beneath: what `fmapkit.explain.project` gives, for one.
            title: stands above the figure.

        Returns:
            The figure.

        Raises:
            ImportError: matplotlib is not installed.
            ArgumentError: as in `patches`, or a number is not positive.
            FilterRangeError: there is no such filter.
        """
        from fmapkit.plot import check_strongest, plot_patches

        if isinstance(filters, str):
            check_strongest(filters)
            filters = self.strongest(max_filters)
        chosen = self._chosen(filters)[:max_filters]
        found = self.patches(dataset, filters=chosen, model=model, field=field, image=image)
        more = len(self._chosen(filters)) - len(chosen)
        return plot_patches(
            found, self.layer + self.path, mean=mean, std=std, below=below, title=title, more=more
        )

    def _chosen(self, filters: int | Iterable[int] | None) -> tuple[int, ...]:
        if filters is None:
            return self.filters
        chosen = (filters,) if isinstance(filters, int) else tuple(filters)
        for filter in chosen:
            self._row(filter)
        return chosen
