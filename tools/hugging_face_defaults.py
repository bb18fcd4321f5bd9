"""Write the table of what config.json of a Hugging Face model means by not saying it.

    python tools/hugging_face_defaults.py megatron_dynmix/config/hugging_face_defaults.json

For each family: the defaults of the class with which the installed `transformers` reads config.json, and the
other names that it takes for some of them.
"""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from megatron_dynmix.families import FAMILIES

LEFT_OUT = {
    *("self", "kwargs", "rope_parameters", "rope_scaling", "num_mtp_layers", "num_nextn_predict_layers"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "use_cache", "output_router_logits"),
    *("initializer_range", "router_aux_loss_coef", "pretraining_tp"),
}
"""Settings that change nothing of what a model computes, and those of the rotary embedding but its base."""


def defaults_table() -> dict[str, dict[str, dict[str, Any]]]:
    """Return family -> `defaults` (setting -> value) and `names` (another name -> the setting)."""
    own = {name for name, family in FAMILIES.items() if family.dialect.alias or family.dialect.defaults}
    return {name: _row(CONFIG_MAPPING[name]) for name in FAMILIES if name not in own}


def _row(kind: type[PretrainedConfig]) -> dict[str, dict[str, Any]]:
    general = inspect.signature(PretrainedConfig.__init__).parameters
    parameters = {
        name: parameter.default
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if name not in {*general} - {"tie_word_embeddings"} | LEFT_OUT
    }
    pairs = {pair for one, other in kind.attribute_map.items() for pair in ((one, other), (other, one))}
    names = {one: other for one, other in sorted(pairs) if other in parameters and one not in parameters}
    base = parameters.pop("rope_theta", None) or kind.default_theta  # transformers 4, 5
    share = kind().rope_parameters.get("partial_rotary_factor", 1.0)
    rotary = {"rope_theta": base, **({"partial_rotary_factor": share} if share != 1 else {})}
    return {"defaults": {**parameters, **rotary}, "names": names}


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("output", type=Path)
    text = json.dumps(defaults_table(), indent=1) + "\n"
    parser.parse_args().output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
