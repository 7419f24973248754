"""Predictions for frames, and the proof that a merged model predicts what the adapted one did."""

import pytest
import torch

from mace_lora import AdapterConfig, inject, merge
from mace_lora.errors import MergeMismatch
from mace_lora.testing import randomise_
from mace_lora.upstream.predicting import frames_to_batch, predict, prove_merge


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_merge_is_proved_and_a_wrong_one_is_refused(model, frames, dtype):
    inject(model.to(dtype), AdapterConfig.create("lora"))
    randomise_(model)
    batches = [frames_to_batch(frames, model)]
    before = predict(model, batches)
    merged = merge(model)
    found = prove_merge(before, merged, batches, "nothing was written")
    assert set(found) == {"energy", "forces"}
    with torch.no_grad():
        next(merged.readouts[0].parameters()).mul_(1.01)
    with pytest.raises(MergeMismatch, match="nothing was written") as refused:
        prove_merge(before, merged, batches, "nothing was written")
    assert "forces" in str(refused.value)
