"""Every registered method keeps the contract, on all kinds of layers at once."""

import pytest

from mace_lora import AdapterConfig
from mace_lora.adapters.registry import METHODS
from mace_lora.testing import AdapterContract


class TestContract(AdapterContract):
    @pytest.fixture(params=sorted(METHODS))
    def config(self, request) -> AdapterConfig:
        return AdapterConfig.create(request.param, targets=("all",))
