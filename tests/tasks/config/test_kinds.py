"""The table of run kinds names what is there."""

import inspect

import pytest

from tasks.config.kinds import RUN_KINDS, load, run_classes, studies
from tasks.config.run_file import RunFile


@pytest.mark.parametrize("name", RUN_KINDS)
def test_every_name_of_a_row_is_that_of_something(name):
    kind = RUN_KINDS[name]
    assert issubclass(kind.run_class, RunFile)
    arguments = {"plan": 1, "count_steps": 2, "work": 2, "repair": 1, "compare": 3}
    for field, n_arguments in arguments.items():
        if getattr(kind, field):
            assert len(inspect.signature(load(getattr(kind, field)), follow_wrapped=True).parameters) >= n_arguments
    assert kind.summary.endswith(".")
    assert f"neg {name}" in kind.full_help


def test_every_kind_of_run_file_is_a_command_and_has_one_class():
    assert list(run_classes()) == ["pipeline", "mceval8k", "linearity", "skills", "campaign"]
    assert all(RUN_KINDS[kind].run_class is run_class for kind, run_class in run_classes().items())


def test_a_campaign_can_carry_out_every_kind_that_has_something_to_compare():
    assert list(studies()) == ["mceval8k", "linearity", "skills"]
