"""The model families, keyed by `architectures[0]` of config.json."""

from __future__ import annotations

from typing import NamedTuple

from jaxrank.errors import UnsupportedError
from jaxrank.models.xlm_roberta import XLMRoberta, XLMRobertaConfig
from jaxrank.types import Config


class Family(NamedTuple):
    """What makes a model family: its module and how its config.json is read."""

    module: type[XLMRoberta]
    config: type[XLMRobertaConfig]


FAMILIES = {"XLMRobertaForSequenceClassification": Family(XLMRoberta, XLMRobertaConfig)}


def family_of(config: Config) -> Family:
    """The family that config.json names; UnsupportedError lists the known ones."""
    architectures = config.get("architectures") or []
    if len(architectures) == 1 and architectures[0] in FAMILIES:
        return FAMILIES[architectures[0]]
    raise UnsupportedError(f"config.json: architectures is {architectures!r}; jaxrank knows {', '.join(FAMILIES)}")
