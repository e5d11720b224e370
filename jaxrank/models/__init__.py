"""The model families, by `architectures[0]` of config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxrank.errors import CheckpointError, UnsupportedError
from jaxrank.models.qwen3 import Qwen3, Qwen3Config
from jaxrank.models.qwen3_vl import Qwen3VL, Qwen3VLConfig
from jaxrank.models.xlm_roberta import XLMRoberta, XLMRobertaConfig
from jaxrank.types import Config


class Family(NamedTuple):
    """What makes a model family.

    Models that read a prompt answer yes or no, and their score is the probability of yes. The others read query and
    document side by side.

    Attributes:
        module: the class of the model.
        config: the class that reads its config.json.
        prompts: the family of its prompts. None is for models without a prompt.
    """

    module: type[Any]
    config: type[XLMRobertaConfig] | type[Qwen3Config] | type[Qwen3VLConfig]
    prompts: str | None


XLM_ROBERTA = Family(XLMRoberta, XLMRobertaConfig, None)
QWEN3 = Family(Qwen3, Qwen3Config, "qwen3")
QWEN3_VL = Family(Qwen3VL, Qwen3VLConfig, "qwen3_vl")

FAMILIES = {
    "XLMRobertaForSequenceClassification": XLM_ROBERTA,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3ForSequenceClassification": QWEN3,
    "Qwen3VLForConditionalGeneration": QWEN3_VL,
}


MOST_LAYERS = 1000


def settings_of(config: Config) -> tuple[Family, Any]:
    """Return the family that a config.json names, and its settings.

    Raises:
        UnsupportedError: jaxrank does not implement the architecture or a setting.
        CheckpointError: a field is missing or wrong.
    """
    architectures = config.get("architectures") or []
    if architectures not in [[name] for name in FAMILIES]:
        raise UnsupportedError(f"config.json: architectures is {architectures!r}; jaxrank knows {', '.join(FAMILIES)}")
    family = FAMILIES[architectures[0]]
    try:
        settings = family.config.read(config)
    except KeyError as error:
        raise CheckpointError(f"config.json lacks {error}; fetch it again") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise CheckpointError(f"config.json has a field of a wrong type or size ({reason}); fetch it again") from error
    for name, value in whole_numbers(settings):
        least, most = (0 if name == "pad_id" else 1), (MOST_LAYERS if name == "layers" else 2**40)
        if type(value) is not int or not least <= value <= most:
            raise CheckpointError(
                f"config.json has a field of a wrong type or size (the model's {name} would be {value!r:.80}, it "
                f"must be a whole number from {least} to {most}); fetch it again"
            )
    return family, settings


def whole_numbers(settings: Any) -> Iterator[tuple[str, Any]]:
    """Yield the fields that must be whole numbers, by name, of the settings and of settings within them."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from whole_numbers(value)
        elif field.type == "int":
            yield field.name, value
