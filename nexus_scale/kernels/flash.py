"""FlashAttention 3 and 4 in the place of torch's own FlashAttention 2, for the whole process, as torch itself takes them in.

Source: torch.nn.attention.activate_flash_attention_impl (torch 2.11 to 2.13); Shah et al. 2024 (FlashAttention 3).
"""

from __future__ import annotations

import torch
from torch.nn import attention as torchs

from nexus_scale.kernels.identity import Identity, identify_flash_attn_3, identify_flash_attn_4

HOPPER, BLACKWELL = 9, 10

FORMS = {"flash_attn_3": "FA3", "flash_attn_4": "FA4"}
"""Torch's name of each."""

_SERVES = {"flash_attn_3": (HOPPER,), "flash_attn_4": (HOPPER, BLACKWELL)}


def why_not(name: str, device: torch.device) -> tuple[Identity, str | None]:
    """What is installed under a name of `FORMS`, and why it cannot serve; None if it can."""
    identity = identify_flash_attn_3() if name == "flash_attn_3" else identify_flash_attn_4()
    if not identity.genuine:
        return identity, identity.why
    if device.type != "cuda":
        return identity, f"{identity.why} serves CUDA only, and the device is {device.type}"
    known: list[str] = getattr(torchs, "list_flash_attention_impls", list)()
    if FORMS[name] not in known:
        return identity, f"torch {torch.__version__} cannot take {identity.why} in"
    if torch.cuda.get_device_capability(device)[0] not in _SERVES[name]:
        return identity, f"{identity.why} has no kernels for {torch.cuda.get_device_name(device)}"
    return identity, None


def take_in(name: str | None) -> None:
    """Has torch's FlashAttention be that of `FORMS`; None: its own again.

    Raises:
        ImportError, OSError, RuntimeError: it does not load here.
    """
    active = getattr(torchs, "current_flash_attention_impl", lambda: None)()
    wanted = None if name is None else FORMS[name]
    if active == wanted:
        return
    if wanted is None:
        torchs.restore_flash_attention_impl()
    else:
        torchs.activate_flash_attention_impl(wanted)
