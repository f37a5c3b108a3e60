"""The published models: as many parameters as their publishers counted."""

import pytest

from jaxdecode.models.known import KNOWN, parameters

PARAMETERS = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "opt-6.7b": 6_658_473_984,
    "chatglm2-6b": 6_243_584_000,
    "smollm2-135m": 134_515_008,
    "qwen2.5-7b": 7_615_616_512,
    "mistral-7b": 7_241_732_096,
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_model_has_the_published_size(name):
    assert parameters(KNOWN[name]) == PARAMETERS[name]
