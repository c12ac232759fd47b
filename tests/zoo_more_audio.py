"""Audio denoisers: tokens of a waveform lie on a line and are left alone, those of a spectrogram on a grid."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo import CROSS, Case, site
from tests.zoo_more_kit import GRID, HEAD, HEADS, NO_GRID, TEXT, WIDTH, case, noise, padded_mask, steps
from tests.zoo_more_unets import UNET

LENGTH = 24
"""As many as `GRID` has cells."""
ON_A_LINE = {"*.self_attn": NO_GRID, "*.cross_attn": "cross-attention"}
"""Why the attentions of a waveform are kept."""


def ace() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 2 * LENGTH, 4), "timestep": steps() / 1000, "timestep_r": steps() / 2000,
        "encoder_hidden_states": noise(2, TEXT, 12), "context_latents": noise(2, 2 * LENGTH, 8),
    }  # fmt: skip


def longcat() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, LENGTH, 4), "encoder_hidden_states": noise(2, TEXT, 12),
        "encoder_attention_mask": padded_mask(), "timestep": steps() / 1000,
    }  # fmt: skip


def waveform() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, LENGTH), "timestep": steps() / 1000, "encoder_hidden_states": noise(2, TEXT, 12),
    }  # fmt: skip


def stable_audio() -> dict[str, Any]:
    angles = noise(LENGTH + 1, HEAD // 2)
    return waveform() | {
        "global_hidden_states": noise(2, 1, 10), "rotary_embedding": (angles.cos(), angles.sin()),
    }  # fmt: skip


def spectrogram() -> dict[str, Any]:
    return {
        "sample": noise(2, 4, 2 * GRID[0], 2 * GRID[1]), "timestep": steps(),
        "encoder_hidden_states": noise(2, TEXT, 12), "encoder_hidden_states_1": noise(2, 3, 12),
    }  # fmt: skip


def film() -> dict[str, Any]:
    return {
        "encodings_and_masks": [(noise(2, TEXT, WIDTH), torch.ones(2, TEXT))], "decoder_noise_time": steps() / 1000,
        "decoder_input_tokens": noise(2, LENGTH, 8),
    }  # fmt: skip


SPECTRAL = tuple(
    site(f"{path}.transformer_blocks.0.attn{which}", GRID, f"{path}.transformer_blocks.0.norm{which}")
    for path, layers in (("down_blocks.1", 2), ("mid_block", 2), ("up_blocks.0", 4))
    for path, which in [(f"{path}.attentions.{index}", which) for index in range(layers) for which in (1, 2)]
    if which == 1 or path[-1] in "02"
)
"""Every other transformer has no prompt, and attends to itself twice."""

AUDIO: tuple[Case, ...] = (
    case(
        "AceStepTransformer1DModel",
        {
            "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS,
            "num_key_value_heads": 1, "head_dim": HEAD, "in_channels": 12, "audio_acoustic_hidden_dim": 4,
            "sliding_window": 4, "encoder_hidden_size": 12,
        },
        ace, kept=ON_A_LINE,
    ),
    case("AudioLDM2UNet2DConditionModel", UNET | {"attention_head_dim": 2, "cross_attention_dim": ((None, 12),) * 2},
         spectrogram, sites=SPECTRAL, kept=CROSS),
    case(
        "LongCatAudioDiTTransformer",
        {"dit_dim": WIDTH, "dit_depth": 1, "dit_heads": HEADS, "dit_text_dim": 12, "latent_dim": 4},
        longcat, kept=ON_A_LINE,
    ),
    case(
        "MiniMaxMusic3Transformer1DModel",
        {
            "in_channels": 4, "condition_dim": 12, "num_layers": 1, "num_attention_heads": HEADS,
            "attention_head_dim": HEAD, "ff_inner_dim": 48, "rotary_dim": 8, "fourier_embedding_dim": 16,
        },
        lambda: waveform() | {"encoder_hidden_states": noise(2, LENGTH, 12)}, kept={"*.attn": NO_GRID},
    ),
    case(
        "StableAudio3DiTModel",
        {
            "io_channels": 4, "embed_dim": WIDTH, "depth": 1, "num_heads": HEADS, "cond_token_dim": 12,
            "global_cond_dim": 10, "local_add_cond_dim": 5, "timestep_features_dim": 16, "num_memory_tokens": 4,
        },
        lambda: waveform() | {"global_hidden_states": noise(2, 10)}, kept=ON_A_LINE,
    ),
    case(
        "StableAudioDiTModel",
        {
            "sample_size": LENGTH, "in_channels": 4, "num_layers": 1, "attention_head_dim": HEAD,
            "num_attention_heads": HEADS, "num_key_value_attention_heads": 1, "out_channels": 4,
            "cross_attention_dim": 12, "time_proj_dim": 16, "global_states_input_dim": 10,
            "cross_attention_input_dim": 12,
        },
        stable_audio, kept=CROSS | {"*.attn1": NO_GRID},
    ),
    case(
        "T5FilmDecoder",
        {"input_dims": 8, "targets_length": LENGTH, "d_model": WIDTH, "num_layers": 1, "num_heads": HEADS,
         "d_kv": HEAD, "d_ff": 48},
        film, kept={"*": "spelled out"},
    ),
    case(
        "UNet1DModel",
        {
            "sample_size": 64, "in_channels": 4, "out_channels": 4, "extra_in_channels": 64,
            "block_out_channels": (32, 32, 64),
        },
        lambda: {"sample": noise(2, 4, 64), "timestep": steps()}, kept={"*": "spelled out"},
    ),
)  # fmt: skip
