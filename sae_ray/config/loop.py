"""What the RLAIF loop does from round to round: whom it judges, what it keeps, and what it holds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sae_ray.config.sections import Fraction, Section


class LoopConfig(Section):
    choose: Literal["first", "value", "random"] = Field(
        "first",
        description="latents of later rounds. first: the first round's again; value: those whose verdicts are expected "
        "to lower the error of the rewards most (uncertain, frequent, turned); random: drawn anew over all densities",
    )
    keep_rounds: Annotated[int, Field(ge=0)] = Field(
        0,
        description="earlier rounds whose verdicts on a latent's present explanation still teach; texts are then "
        "drawn anew each round; 0: only the newest round's verdicts teach",
    )
    reexplain_cosine: Fraction | None = Field(
        None,
        description="a trusted explanation is kept, and no new one asked for, while encoder and decoder row have at "
        "least this cosine with what they were when it was written; null: every round explains anew",
    )
    reexplain_overlap: Fraction = Field(
        0.5,
        description="and while the contexts in which the latent is active overlap by this much with those of then: "
        "|both| / sqrt(|then| |now|)",
    )
    max_fvu_rise: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="share by which RLAIF may raise the training FVU above what it was when rewards first came: gamma "
        "is lowered to hold it, and never raised above itself to reach it; deltas are not held; null: not held",
    )
    max_l0_fall: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="share by which RLAIF may lower the training L0 (gates that close leave fewer than k): gamma is "
        "lowered to hold it, as with max_fvu_rise; null: not held",
    )
    gate_threshold: Literal["moving", "fitted"] = Field(
        "moving",
        description="what gates are pulled to either side of: the threshold of the moment, or as it was when rewards "
        "arrived, which gates that close cannot drag along (not for jumprelu, whose thresholds are learned)",
    )
