"""Every model is checked before it measures anything: right ones pass, wrong ones are seen."""

import pytest
import torch
from support import CONFIGS, MASKED, tiny_model

from negcore.measure.model_check import check_model
from negcore.model.check import COMPARED


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_every_known_family_passes_in_every_number_type(family, dtype):
    check = check_model(tiny_model(family, dtype=dtype))
    assert check.failed == ()
    compared = [one.name for one in check.comparisons if one.applies]
    assert compared == [name for name in COMPARED if family not in MASKED or name not in ("prefix", "virtual")]
