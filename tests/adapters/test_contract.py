"""Every registered method keeps the contract, on all kinds of layers at once."""

import pytest

from mace_lora import AdapterConfig
from mace_lora.adapters.registry import METHODS, get_method
from mace_lora.model.layers import KINDS
from mace_lora.testing import AdapterContract


@pytest.mark.parametrize("method", METHODS)
def test_the_kinds_of_layers_that_a_method_names_exist(method):
    found = get_method(method)
    assert set(found.default_kinds) <= set(found.kinds) <= set(KINDS)


class TestContract(AdapterContract):
    @pytest.fixture(params=sorted(METHODS))
    def config(self, request) -> AdapterConfig:
        return AdapterConfig.create(request.param, targets=("all",))
