"""The kinds of things that are damaged."""

from __future__ import annotations

from collections.abc import Mapping

from tests.fuzz import configs, outputs
from tests.fuzz.loop import Trial

KINDS: Mapping[str, Trial] = {
    "configs": configs.trial,
    "flips": outputs.flips,
    "manifests": outputs.manifests,
    "journals": outputs.journals,
    "places": outputs.places,
}
