"""`neg steer`: a run's model answers before and after some of its neurons are shifted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.terminal import quiet_libraries, reading
from flows.show.console import console, tell
from tasks.config.dataset_runs import ProbeName
from tasks.steps import Progress

if TYPE_CHECKING:
    from flows.show.display import Display


def steer(
    directory: Annotated[str, typer.Argument(metavar="RUN", help="Directory of a run on datasets.")],
    dataset: Annotated[
        str | None, typer.Option(help="Dataset of the run whose probe and rows are taken. By default its only one.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model of the run. By default its only one.")] = None,
    probe: Annotated[
        ProbeName | None,
        typer.Option(help="Probe whose best neurons are shifted, each by its polarity, as magn or polar."),
    ] = None,
    k: Annotated[
        int | None, typer.Option(min=1, help="So many of the probe's best neurons. By default those that it keeps.")
    ] = None,
    neurons: Annotated[
        str | None,
        typer.Option(
            help="Neurons by hand in place of a probe's: LAYER.NEURON or LAYER.NEURON=SIZE, with commas; with experts "
            "LAYER.EXPERT.UNIT."
        ),
    ] = None,
    size: Annotated[
        float, typer.Option(help="Size of the shift in units of activation, away from zero where it is positive.")
    ] = 2.0,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Prompt to answer in place of the dataset's rows. Repeatable.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Test rows of the dataset to answer.")] = 5,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 20,
    effect_rows: Annotated[
        int,
        typer.Option(min=0, help="Most test rows of each dataset whose accuracy is compared; 0 to leave that out."),
    ] = 100,
) -> None:
    """Shift neurons while a run's model writes answers, and show them before and after, with the side effects.

    Examples: `neg steer runs/fact --probe magn --k 64 --size 2`, `neg steer runs/fact --neurons 10.901 --prompt "Who?"`

    A shift is made at the prompt's last token and at every written token. The accuracy on all datasets of the run shows
    what else it does. Nothing is written to the run.
    """
    quiet_libraries()
    from flows.show.display import Display
    from flows.show.steer_tables import answers_table, effects_table
    from negcore.measure.loading import load_model
    from negcore.measure.steering import steered_answers
    from tasks.steer import n_side_rows, plan_steering, side_effect

    with reading():
        steering = plan_steering(
            directory,
            model=model,
            dataset=dataset,
            probe=probe,
            k=k,
            neurons=neurons,
            size=size,
            prompts=prompt or (),
            n_rows=rows,
        )
    run, planned = steering.run, steering.planned
    with console.status("loading the model") if console.is_terminal else nullcontext():
        lm = load_model(planned.card, **run.loading)
    prompts, answers, effects = [one.prompt for one in steering.asked], [], []
    beside = [(of, n_side_rows(of, effect_rows)) for of in planned.datasets if effect_rows]
    with Display(console, "steering", len(prompts) + sum(total for _, total in beside)) as display:
        with _watched(display, "answers", len(prompts)) as advance:
            for answer in steered_answers(lm, prompts, steering.shifts, max_tokens=max_tokens):
                answers.append(answer)
                advance(len(answers))
        for of, total in beside:
            with _watched(display, f"accuracy {of.dataset.name}", total) as advance:
                effects.append(side_effect(lm, of, steering.shifts, total, advance))
    console.print(answers_table(steering.asked, answers, f"{planned.card.name}, {steering.about}"))
    if effects:
        console.print(effects_table(effects, steering.chosen_on))
    for problem in planned.problems:
        tell("left out", problem)
    if planned.problems:
        raise typer.Exit(1)


@contextmanager
def _watched(display: "Display", step: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a step from its first moment until it ends."""
    display.advance(Progress(step, 0, total))
    yield lambda done: display.advance(Progress(step, done, total))
    display.finish(step, None)
