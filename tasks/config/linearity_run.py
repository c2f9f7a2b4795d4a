"""The run file of linearity studies."""

from typing import Any, Literal, get_args

from pydantic import Field

from negcore.targets import DEFAULT_SHIFT_UNIT, DEFAULT_TARGET, ShiftUnit, Target
from tasks.config.run_file import CountOrAll, PositiveFloat, RunFile, Several

EstimatorName = Literal[
    "neurgrad",
    "gradient",
    "gradient_x_activation",
    "integrated_gradients",
    "log_probability_increase",
    "ablation",
]
PatchingName = Literal["attribution_patching", "atp_star", "relp", "mean_ablation", "resample_ablation"]
"""Estimators that take activations from other prompts; they are measured where they are asked for."""


class LinearityRun(RunFile):
    """Measure NEGs by shifting neurons step by step, and compare every estimator with them.

    Example: `neg linearity --model smollm2-135m --prompts 10 --neurons 60 --out runs/linearity`

    Tables and figures are in DIR/linearity. `neg linearity DIR/run.yaml` repeats the run and measures only what is
    missing.
    """

    kind: Literal["linearity"] = "linearity"

    facts: str = Field(
        "mini/facts",
        description="Single-answer facts: mini/facts, or a .feather, .parquet or .jsonl file in MyriadLAMA's form, "
        "on disk or hf://datasets/ORG/NAME/FILE; each may have a counterfactual.",
    )
    prompts: int = Field(30, ge=1, description="Prompts, a sample of whole facts: a fact comes in all its wordings.")
    neurons: CountOrAll = Field(
        600,
        description="Neurons that are swept in every prompt, as many in each layer, drawn once at random; or all.",
    )
    ranges: Several[PositiveFloat] = Field(
        (0.5, 1.0, 2.0, 5.0, 10.0),
        alias="range",
        description="Range of shifts, from minus to plus so many units (see shift_unit). Repeatable.",
    )
    shift_unit: ShiftUnit = Field(
        DEFAULT_SHIFT_UNIT,
        description="Unit of shifts: activation; or sd, the standard deviation of each neuron's own activation over "
        "the run's prompts.",
    )
    points: int = Field(
        5, ge=2, description="Shifts on each side of zero in a range, evenly spaced; a range has the smaller ones' too."
    )
    nodes: int | None = Field(
        None,
        ge=4,
        description="Measure so many Gauss nodes of each range (5 cost 4 shifts), and every shift only of neurons that "
        "need it; see docs/analyses.md. By default every shift of every neuron.",
    )
    target: Target = Field(
        DEFAULT_TARGET,
        description="The number of an option whose slope NEG is: probability; log-probability; or logit-difference, "
        "its logit less the largest of the answers of the run's other facts.",
    )
    estimator: Several[Literal[EstimatorName, PatchingName]] = Field(
        get_args(EstimatorName),
        description="Estimator to compare with the sweep. By default those that need no other prompt. Repeatable.",
    )
    set_shift: Several[PositiveFloat] = Field(
        (0.5, 1.0, 2.0), description="Shift of neurons that are shifted together, in units of shift_unit. Repeatable."
    )
    largest_set: int = Field(
        4096, ge=1, description="Most neurons shifted together: sets hold 1, 2, 4... up to it or all of the model."
    )
    draws: int = Field(4, ge=1, description="Random sets of each size.")
    bootstrap: int = Field(1000, ge=1, description="Samples of prompts behind the 95 % intervals.")
    shard_rows: int = Field(5, ge=1, description="Prompts in a shard: with block-layers, what a crash can cost.")
    block_layers: int = Field(5, ge=1, description="Layers that are swept together.")

    not_science = RunFile.not_science | {"shard_rows", "block_layers"}

    @property
    def science(self) -> dict[str, Any]:
        science = super().science
        for name in ("nodes", "target", "shift_unit"):
            if science[name] == type(self).model_fields[name].default:
                del science[name]  # runs have the names from before there was a choice
        return science

    @property
    def subjects(self) -> tuple[str, ...]:
        return (self.facts,)

    @property
    def main_range(self) -> float:
        """The range nearest to the paper's +-2: tables that need one range are about it."""
        return min(self.ranges, key=lambda largest: abs(largest - 2))
