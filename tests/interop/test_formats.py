"""Tables of formats as a whole: no row is idle, every config comes back, and settings of any type are refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from nexus_scale.config import registry
from nexus_scale.contracts import UserError
from nexus_scale.interop.formats import Format
from nexus_scale.interop.published import families, family, named

# what makes every row of a family's tables be used, at sizes that build in a moment
ARGS: dict[str, dict[str, Any]] = {
    "clip_text": {"depth": 2, "projection_dim": 6},
    "cogvideox": {"depth": 1},
    "dit": {"depth": 2},
    "flux": {"hidden_size": 32, "depth_double": 1, "depth_single": 1, "num_heads": 2, "rope_dims": (4, 6, 6), "guidance_embed": True},
    "flux_control_net": {"depth_double": 1, "depth_single": 1},
    "mmdit_control_net": {"depth": 1},
    "mlp_vae": {"hidden_sizes": (512,)},
    "mmdit": {"depth": 2, "qk_norm": "rms_norm", "dual_attention_blocks": 1},
    "pixart": {"depth": 1, "latent_size": 128, "micro_conditions": True},
    "patch_discriminator": {"norm": "affine_instance"},
    "translation_resnet": {"norm": "affine_instance"},
    "translation_unet": {"norm": "affine_instance"},
    "valle_ar": {"depth": 1},
    "valle_nar": {"depth": 1},
}  # fmt: skip
ALL = [(name, kind, form) for name in families() for kind, form in family(name).formats.items()]
WITH_CONFIG = [(name, form) for name, _, form in ALL if form.class_name]
STRANGE = (None, "x", -1, 0, [], {}, [[]], 1.5, float("nan"), [-1, 2])


# of adapters, what they adapt
BASES = {
    "flux_control_net": "flux",
    "ip_adapter": "unet_condition",
    "mmdit_control_net": "mmdit",
    "unet_control_net": "unet_condition",
}


def built(name: str, form: Format, args: Mapping[str, Any]) -> Any:
    if name not in BASES:
        return form.network_of(args)
    settings = ARGS.get(BASES[name], {})
    return form.network_of({**args, "base": lambda: registry.find("models", BASES[name])(**settings)})


class Watched(dict[str, Any]):
    """A table that knows which of its rows were used."""

    def __init__(self, rows: Any):
        super().__init__(rows)
        self.used: set[str] = set()

    def __getitem__(self, row: str) -> Any:
        self.used.add(row)
        return super().__getitem__(row)


@pytest.mark.parametrize(("name", "kind", "form"), ALL, ids=[f"{name}-{kind}" for name, kind, _ in ALL])
def test_every_tensor_has_a_row_and_every_row_a_tensor(name: str, kind: str, form: Format) -> None:
    net = built(name, form, ARGS.get(name, {}))
    rows = Watched(form.table(net))
    layout = replace(form, table=lambda net: rows).layout(net)
    assert layout.keys() == net.state_dict().keys()
    assert rows.used == set(rows), "no row is idle"
    keys = [one.key for parts in layout.values() for one in parts]
    whole = {one.key: one.shape[0] for parts in layout.values() for one in parts}
    assert not set(keys) & set(form.computed(net))
    used = sum(one.stop - one.start for parts in layout.values() for one in parts)
    assert used == sum(whole.values()) - (name == "valle_nar"), "its table for padding has a row that nothing looks at"


@pytest.mark.parametrize(("name", "form"), WITH_CONFIG, ids=[name for name, _ in WITH_CONFIG])
def test_a_config_comes_back_and_strange_ones_are_refused(name: str, form: Format) -> None:
    config = json.loads(json.dumps(form.config_of(built(name, form, ARGS.get(name, {})))))
    assert json.loads(json.dumps(form.config_of(built(name, form, form.model_args(config))))) == config
    for key in form.constants:
        with pytest.raises(UserError, match=f"config.json: {key} is 'other'"):
            form.model_args({**config, key: "other"})
    for key in form.config:
        for value in STRANGE:
            try:
                form.model_args({**config, key: value})
            except UserError:
                continue
    with pytest.raises(UserError, match="Other"):
        form.model_args({**config, "_class_name": "Other", "model_type": "Other"})


def test_a_class_of_another_library_is_found_by_its_name() -> None:
    assert named("diffusers", "vae", "PatchAutoencoder") == "vae"
    assert named("diffusers", "vae", "AutoencoderKLCogVideoX") == "causal_vae3d"
    assert named("transformers", "codec", "encodec") == "codec"
    assert named("diffusers", "vae", "SD3Transformer2DModel") is None and named("transformers", "codec", None) is None
    assert named("diffusers", "vae", None) is None, "a config that names no class"
