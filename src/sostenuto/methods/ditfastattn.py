"""DiTFastAttn: self-attention over a window, or shared between steps or guidance halves (arXiv 2406.08552)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from sostenuto.anatomy import SiteKind
from sostenuto.attention_tap import AttentionTap, ConditionalHalf, usual_half
from sostenuto.errors import MethodError
from sostenuto.methods.checks import check_choice, check_whole
from sostenuto.methods.tabled import TableMethod
from sostenuto.sites import Site, inspect
from sostenuto.table import CacheTable


@dataclass(frozen=True)
class DiTFastAttn(TableMethod):
    """DiTFastAttn (arXiv 2406.08552): a calibrated plan says for every step and layer how self-attention is compressed.

    With ``proj`` the output projection, the actions of the plan are, cheapest first:

    - ``reuse`` (AST, sharing across timesteps): ``out`` is the last step's output;
    - ``window+share-guidance``: both of the next two;
    - ``window`` (WA-RS, window attention with residual sharing): ``out = proj(W + R)``, where ``W`` is this step's
      attention over a window and ``R = full − W`` was kept at the last step with full attention;
    - ``share-guidance`` (ASC, sharing across conditional and unconditional): full attention of the conditional half of the
      batch, copied to the unconditional half;
    - ``compute``: the module's own forward.

    What a step keeps follows from what later steps read; ``W`` is computed besides full attention only where ``R`` is read.
    The window runs over the flattened tokens, as published, not over the image's two dimensions.

    Attributes:
        table: the calibrated table, or its file: a map from every self-attention to its action at every step.
        window: tokens to each side that a token attends to, 1 or more; one that covers all tokens is full attention. By
            default the table's, where that has none an eighth of the tokens, as published for every image size.
        conditional_half: where the conditional pass lies in a guided batch: ``"first"`` as in diffusers' DiT pipeline, or
            ``"second"`` as in its text-to-image pipelines. By default the table's, else that of diffusers' pipelines for such
            a network.
        forecast_order: how a reused output is filled: 0, as in the paper, with the last value; 1 by linear extrapolation; …
    """

    window: int | None = None
    conditional_half: ConditionalHalf | None = None

    name: ClassVar[str] = "ditfastattn"
    paper: ClassVar[str] = "arXiv 2406.08552"
    summary: ClassVar[str] = (
        "plain self-attention (no mask, no rotary embedding) over a window, or shared between steps or guidance halves"
    )
    state: ClassVar[str] = "of each self-attention the last output and the last residual, where a later step reads them"
    bytes_per_token: ClassVar[str] = "2 × b × d × attentions"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_attention(self.window, self.conditional_half)

    @classmethod
    def dit_xl_2(cls, table: CacheTable | str | Path | None = None) -> DiTFastAttn:
        """The window published for DiT-XL/2 at 512²: 128 of 1024 tokens."""
        return cls(table, window=128, conditional_half="first")

    @classmethod
    def pixart_alpha(cls, table: CacheTable | str | Path | None = None) -> DiTFastAttn:
        """The window published for PixArt at 1024²: 512 of 4096 tokens."""
        return cls(table, window=512, conditional_half="second")

    @classmethod
    def pixart_sigma(
        cls, table: CacheTable | str | Path | None = None, image_size: Literal[1024, 2048] = 2048
    ) -> DiTFastAttn:
        """The windows published for PixArt: 2048 tokens at 2048², 512 at 1024²."""
        published = {1024: 512, 2048: 2048}
        if image_size not in published:
            raise MethodError(
                f"a window is published for images of 1024 and 2048, not {image_size!r}: choose one yourself"
            )
        return cls(table, window=published[image_size], conditional_half="second")

    @classmethod
    def open_sora(cls, table: CacheTable | str | Path | None = None, window: Literal[50, 200] = 200) -> DiTFastAttn:
        """The windows published for Open-Sora: 50 and 200 tokens."""
        if window not in (50, 200):
            raise MethodError(f"windows of 50 and 200 are published for Open-Sora, not {window!r}: choose one yourself")
        return cls(table, window=window, conditional_half="first")

    def sites(self, denoiser: nn.Module) -> list[Site]:
        """Every self-attention."""
        return [site for site in inspect(denoiser) if site.kind is SiteKind.SELF_ATTENTION]

    def tap(self, site: Site, denoiser: nn.Module) -> AttentionTap:
        """Attention that can run over a window or for half of the batch."""
        return AttentionTap(site, denoiser, self.window, self.conditional_half or usual_half(denoiser))

    def prepare(self, denoiser: nn.Module, scheduler: Any) -> DiTFastAttn:
        """Load the table, refuse one that was made for something else, and take from it what was not given."""
        method = super().prepare(denoiser, scheduler)
        assert isinstance(method, DiTFastAttn)
        assert isinstance(method.table, CacheTable)
        made_with = method.table.calibration
        window = made_with.get("window") if self.window is None else self.window
        half = self.conditional_half or made_with.get("conditional_half") or usual_half(denoiser)
        check_attention(window, half)
        return replace(method, window=window, conditional_half=half)


def check_attention(window: object, conditional_half: object) -> None:
    """Refuse what is no window or no half of a batch; ``None`` is for the default.

    Raises:
        MethodError: with the value.
    """
    if window is not None:
        check_whole("DiTFastAttn's window", window, least=1)
    if conditional_half is not None:
        check_choice("DiTFastAttn's conditional_half", conditional_half, ("first", "second"))
