"""Why something that ran was not captured: one member for each reason in `maps.missed`.

Nothing is imported here, so that every package can name its reasons. What each means, and what can
be done, is the table in docs/missed.md.
"""

from __future__ import annotations

import re
from enum import Enum
from functools import lru_cache

__all__ = ["Reason"]


class Reason(Enum):
    """A reason, whose value is its text; what differs from case to case stands in braces.

    ```python
    if any(missed.why is Reason.GRAPH_BREAK for missed in maps.missed): ...
    ```
    """

    # -- what runs out of sight: in one call, or without Python -------------------------------

    FUSED_RECURRENT = "{function} runs its {part} inside one fused call"
    FUSED_QUANTIZED_CELL = "a quantized {kind} cell runs all of it in one call"
    FUSED_TRANSFORMER = "the fused {function} runs its {part} inside"
    FUSED_QUANTIZED = (
        "{function} runs its nonlinearity inside one call, together with what comes before: its "
        "response, preactivation and activation are not seen as such"
    )
    FUSED_PATH = (
        "torch runs it as one fused kernel here, whose inside nobody can see: its output is the "
        "fused one's, bit for bit, and its maps are those of the same layer run unfused, beside it"
    )
    FUSED_PATH_ALONE = (
        "torch runs it as one fused kernel here, whose inside nobody can see: run unfused, for its "
        "maps, the same layer raised {error}, and has those alone that came before"
    )
    FUSED_PATH_OWN_CODE = (
        "torch runs it as one fused kernel here, which leaves out the code of {names}: that would "
        "run for the maps alone, so there are none of what is inside"
    )
    FUSED_PATH_EDITED = (
        "torch runs it as one fused kernel here, in which nothing can be edited: for the edit it "
        "ran unfused, which differs from the fused one in the last bits, also where nothing was "
        "edited"
    )
    SCRIPTED = "it is scripted: torch runs it without Python, unseen by hooks"
    SCRIPTED_FUNCTION = "it calls {function}, which is scripted: unseen by Python"
    COMPILED_FUNCTION = (
        "it calls {function}, which torch runs as it compiles it: what runs inside is unseen by "
        "hooks"
    )
    CUDA_GRAPH = (
        "it was recorded into a CUDA graph: nothing has run yet, and replays of the graph run "
        "without Python"
    )
    RECORDED = (
        "it was recorded by {function} here, which would record what fmapkit does, too: such a "
        "call is left alone, and is not captured"
    )

    # -- what runs outside of the captured pass -----------------------------------------------

    OUTSIDE_OF_FORWARD = (
        "it was called outside {model}.forward, and only what runs inside a forward pass of the "
        "captured model is captured; for its own passes, capture that module{hint}"
    )
    PAST_HOOKS_OUTPUT = "{how}: what it returns is not seen"
    PAST_HOOKS_WHOLE = "{how}: what it is as a whole is not seen"
    PAST_HOOKS_PASS = "{how}, and without these there is no pass to capture"
    DATA_PARALLEL = (
        "nn.DataParallel runs copies of it in threads of their own, one for each device, and only "
        "the thread that entered the block is captured; use DistributedDataParallel, or one device"
    )
    STOPPED_BY_OTHER_CAPTURE = (
        "another capture, with stop=True, ended the pass at the last map that it wants: what comes "
        "after that does not run, so it is not captured here either"
    )
    NUMBERS_OF_OTHERS = (
        "batch() gave {count} numbers, and no input of the pass that followed has an axis of so "
        "many entries: the maps of that pass have no ids"
    )
    MASK_OF_OTHERS = (
        "batch() gave a mask of {count} samples, and no input of the pass that followed has an "
        "axis of so many entries: analyses were shown its padding, too"
    )
    CALLED_ON_ITS_OWN = (
        "it was called on its own, so far only as a part of another module: in this pass it was "
        "seen by the functions it called, not as a whole; later on as a module"
    )

    # -- control flow -------------------------------------------------------------------------

    NEW_PATH = (
        "in a pass, it took a way through its code that no earlier pass had taken; the maps of "
        "that pass are not kept, and the next one is traced"
    )
    NEW_PATH_INSIDE = (
        "in a pass, a part of it took a way through its code that no earlier pass had taken; the "
        "maps of that pass are not kept"
    )
    BROKEN_OFF = (
        "in a pass, an exception ended the call of a part of it, and the pass went on; the maps of "
        "that pass are not complete, and that part is traced from then on"
    )

    # -- tensors that cannot be held ----------------------------------------------------------

    NESTED_STRIDED = (
        "it runs on nested tensors of the strided layout, which have no shape, and maps of them "
        "are not supported; those of layout=torch.jagged are"
    )
    TRANSFORMED = (
        "it runs under a torch.func transform (vmap, grad, …): its tensors live only inside the "
        "transform, and cannot be held"
    )
    CANNOT_BE_STORED = (
        "torch cannot store this {kind} as asked (filters=, dtype=, device=): {error}"
    )
    CLOSED_OUTPUT = "it returned a {kind}{place}, which cannot be looked into for tensors"
    NO_TENSOR = "it returned no tensor, but a {kind}"

    # -- whose filters ------------------------------------------------------------------------

    WEIGHT_WITHOUT_NAME = "{function}: its weight belongs to no module, so it has no name"
    COMPARED_BY_HAND = (
        "a nonlinearity of it is written by hand, by a comparison of what it computes: "
        "torch.{function} chooses between values of it and is not given the one that was compared; "
        "in a module of its own it would be captured"
    )
    ON_LISTS = (
        "{function} works on lists of tensors, in one call: what it is given and what it makes of "
        "each have no maps here; torch.{name} of each has them"
    )
    SIGMA_IN_A_HOOK = (
        "a hook on it applies another nonlinearity ({sigma}) to its result, whose maps are missing"
    )
    FILTERS_NOT_ON_ONE_AXIS = "filters= was given, but its filters do not lie along one axis"
    FILTERS_OUT_OF_RANGE = "filters={filters} asks for filters outside {there}"
    FILTERS_ON_ANOTHER_RANK = "filters= was given, and some may lie on another rank"
    FILTERS_OF_INPUT = "filters= was given, and its input is not of its own filters"
    FILTERS_OF_OUTPUT = "filters= was given, and what a module returns is held whole"
    FILTERS_WITHOUT_MAP = "filters= was given for it, and this pass had no map of it"

    # -- attention ----------------------------------------------------------------------------

    NO_ATTENTION = (
        "kinds='attention' was asked for, and no attention was seen in this pass: no softmax that "
        "weighs other data, and no scaled_dot_product_attention"
    )
    FUSED_ATTENTION = (
        "{function}: it runs attention inside one fused call, whose probabilities nobody can see"
    )
    ATTENTION_OF_WRAPPED = (
        "{function}: its probabilities are not computed for tensors of this kind ({kind})"
    )
    ATTENTION_WITHOUT_GRADIENT = (
        "its probabilities are computed beside the fused kernel, which does not use them: no "
        "gradient gets to them"
    )

    # -- gradients and checks -----------------------------------------------------------------

    NO_GRAPH = (
        "it ran inside the forward of a torch.autograd.Function, as reentrant checkpointing runs "
        "it, where no graph is recorded: its maps are right, but are not part of the graph and "
        "have no gradient; checkpoint(..., use_reentrant=False) keeps both"
    )
    GRADIENT_OF_VIEW = (
        "it is a view that the model writes to in place, and torch computes no gradient for what "
        "such a view was before: the map is right, its gradient is None"
    )
    CHECK_OF_COMPILED = (
        "check='finite' looks at the forward alone of a model that torch.compile has compiled: a "
        "gradient inside of compiled code is nobody's to see"
    )
    CHECK_DID_NOT_SEE = "the check did not see it: {error}"
    ANALYSES_DID_NOT_SEE = "analyses did not see it: {error}"

    # -- torch.compile ------------------------------------------------------------------------

    NO_CALL_SEEN = (
        "no call of it was seen: no pass ran inside the block, or it ran in code that "
        "torch.compile had compiled around it, where no hook runs: compile the captured model "
        "itself, or capture what is compiled"
    )
    CALLED_FROM_COMPILED_CODE = (
        "it was called by code that torch.compile has compiled around it, where no hook runs; "
        "compile the captured model itself, or capture what is compiled"
    )
    COMPILED_UNREADABLY = (
        "it is compiled by torch.compile in a way that fmapkit cannot look into ({why}): hooks "
        "never run in code that is compiled already"
    )
    COMPILED_IN_THE_BLOCK = (
        "it was compiled inside the block: its first call, which compiles it, is not captured, and "
        "the later ones are"
    )
    GRAPH_UNREADABLE = "fmapkit cannot read its compiled graph: {why}"
    GRAPH_BREAK = (
        "torch.compile broke the graph here, and what was computed between the graphs ran outside "
        "of compiled code: nonlinearities in it are not captured"
    )
    GRAPH_WITHOUT_MAP = "its graph was compiled without this map"
    ONE_CALL_IN_GRAPH = "it runs inside {function}, which torch.compile keeps as one call"
    OUTPUT_INSIDE_GRAPH = (
        "what a module inside compiled code returns does not exist outside of its graph; only its "
        "preactivations, activations, responses and inputs are captured"
    )

    # -- fmapkit itself -----------------------------------------------------------------------

    FAILED = "fmapkit failed here: {error}"
    OF_ANOTHER_VERSION = "{text}"

    def text(self, **values: object) -> str:
        """The reason in full.

        Args:
            values: what stands in the place of each pair of braces.
        """
        template: str = self.value
        return template.format(**values) if values else template

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(text: str) -> Reason:
        """Which reason a text is.

        Args:
            text: in full, as `Missed.reason` has it. One of a saved capture may be of another
                version of fmapkit, which this one does not know: `OF_ANOTHER_VERSION`.
        """
        found = [reason for reason, pattern in _patterns() if pattern.fullmatch(text)]
        return max(found, key=lambda reason: len(_BRACES.sub("", reason.value)))


_BRACES = re.compile(r"\{\w+\}")


@lru_cache(maxsize=1)
def _patterns() -> list[tuple[Reason, re.Pattern[str]]]:
    """What the text of each reason looks like."""
    pieces = {reason: map(re.escape, _BRACES.split(reason.value)) for reason in Reason}
    return [(reason, re.compile("(?s:.*)".join(p))) for reason, p in pieces.items()]
