"""Video denoisers in diffusers, beyond those that `zoo_named` holds."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo import CROSS, Case
from tests.zoo_more_kit import (
    GRID,
    HEAD,
    HEADS,
    NO_GRID,
    NO_IMAGE,
    ROPE,
    TEXT,
    TOKENS,
    WIDTH,
    case,
    noise,
    padded_mask,
    steps,
)
from tests.zoo_more_unets import DOWN, UNET, UP

FRAMES = 2
LATENT = (FRAMES, 2 * GRID[0], 2 * GRID[1])


def video(channels: int = 4) -> dict[str, Any]:
    return {
        "hidden_states": noise(2, channels, *LATENT), "timestep": steps(), "encoder_hidden_states": noise(2, TEXT, 12),
    }  # fmt: skip


def rotary(width: int = HEAD) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of ``(tokens, width)`` angles."""
    angles = noise(FRAMES * TOKENS, width)
    return angles.cos(), angles.sin()


def allegro() -> dict[str, Any]:
    t, h, w = torch.meshgrid(*(torch.arange(size) for size in (FRAMES, *GRID)), indexing="ij")
    angles = tuple((noise(8, 6), noise(8, 6)) for _ in range(3))
    grid = tuple(positions.reshape(1, -1) for positions in (t, h, w))
    return video() | {
        "image_rotary_emb": (angles, grid), "attention_mask": torch.ones(2, *LATENT),
        "encoder_attention_mask": padded_mask().float(),
    }  # fmt: skip


def frames_first() -> dict[str, Any]:
    return video() | {"hidden_states": noise(2, FRAMES, 4, *LATENT[1:])}


def anyflow() -> dict[str, Any]:
    times = steps()[:, None].expand(-1, FRAMES).contiguous()
    return frames_first() | {"timestep": times, "r_timestep": times / 2}


def cosmos() -> dict[str, Any]:
    return video() | {"timestep": steps() / 1000}


def hunyuan_video() -> dict[str, Any]:
    return video() | {
        "encoder_attention_mask": padded_mask(), "pooled_projections": noise(2, 14), "guidance": steps(),
    }  # fmt: skip


def hunyuan_video15() -> dict[str, Any]:
    return video() | {
        "encoder_attention_mask": padded_mask(), "encoder_hidden_states_2": noise(2, 3, 10),
        "encoder_attention_mask_2": torch.ones(2, 3), "image_embeds": noise(2, 3, 14),
    }  # fmt: skip


def framepack() -> dict[str, Any]:
    return hunyuan_video() | {
        "image_embeds": noise(2, 3, 14), "indices_latents": torch.arange(FRAMES),
        "latents_clean": noise(2, 4, 1, *LATENT[1:]), "indices_latents_clean": torch.zeros(1, dtype=torch.long),
        "latents_history_2x": noise(2, 4, 2, *LATENT[1:]), "indices_latents_history_2x": torch.arange(2),
        "latents_history_4x": noise(2, 4, 4, *LATENT[1:]), "indices_latents_history_4x": torch.arange(4),
    }  # fmt: skip


def kandinsky5() -> dict[str, Any]:
    return {
        "hidden_states": noise(1, *LATENT, 4), "encoder_hidden_states": noise(1, TEXT, 12), "timestep": steps()[:1],
        "pooled_projections": noise(1, 14), "text_rope_pos": torch.arange(TEXT),
        "visual_rope_pos": [torch.arange(size) for size in (FRAMES, *GRID)],
    }  # fmt: skip


def kandinsky6() -> dict[str, Any]:
    return {
        "hidden_states": noise(1, *LATENT, 4), "encoder_hidden_states": noise(1, TEXT, 12), "timestep": steps()[:1],
        "pooled_projections": noise(1, 14), "audio_hidden_states": noise(1, 7, 6),
    }  # fmt: skip


def ltx2() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, FRAMES * TOKENS, 8), "audio_hidden_states": noise(2, 7, 6),
        "encoder_hidden_states": noise(2, TEXT, 12), "audio_encoder_hidden_states": noise(2, TEXT, 12),
        "timestep": steps(), "num_frames": FRAMES, "height": GRID[0], "width": GRID[1], "audio_num_frames": 7,
    }  # fmt: skip


def unet_video() -> dict[str, Any]:
    return {
        "sample": noise(1, 4, FRAMES, *LATENT[1:]), "timestep": steps()[:1],
        "encoder_hidden_states": noise(1, TEXT, 12),
    }  # fmt: skip


def i2vgen() -> dict[str, Any]:
    return unet_video() | {
        "fps": torch.tensor([8]), "image_latents": noise(1, 4, FRAMES, *LATENT[1:]), "image_embeddings": noise(1, 12),
    }  # fmt: skip


def svd() -> dict[str, Any]:
    return {
        "sample": noise(1, FRAMES, 4, *LATENT[1:]), "timestep": steps()[:1], "encoder_hidden_states": noise(1, 1, 12),
        "added_time_ids": torch.ones(1, 3),
    }  # fmt: skip


def wan_animate() -> dict[str, Any]:
    return {
        "hidden_states": noise(1, 12, FRAMES, *LATENT[1:]), "timestep": steps()[:1],
        "encoder_hidden_states": noise(1, TEXT, 12), "encoder_hidden_states_image": noise(1, 3, 10),
        "pose_hidden_states": noise(1, 4, FRAMES - 1, *LATENT[1:]), "face_pixel_values": noise(1, 3, 5, 16, 16),
    }  # fmt: skip


def far() -> dict[str, Any]:
    return anyflow() | {"chunk_partition": [1, 1]}


def cosmos3() -> dict[str, Any]:
    """One prompt, then one video, packed as one row of tokens without a batch."""
    length = TEXT + FRAMES * TOKENS
    return {
        "input_ids": torch.randint(0, 20, (TEXT,)), "text_indexes": torch.arange(TEXT), "und_len": TEXT,
        "position_ids": torch.arange(length).expand(3, -1).contiguous(), "sequence_length": length,
        "vision_tokens": [noise(1, 4, *LATENT)], "vision_token_shapes": [(FRAMES, *GRID)],
        "vision_sequence_indexes": torch.arange(TEXT, length), "vision_mse_loss_indexes": torch.arange(TEXT, length),
        "vision_timesteps": torch.full((FRAMES * TOKENS,), 700.0),
        "vision_noisy_frame_indexes": [torch.arange(FRAMES)],
    }  # fmt: skip


def minimax() -> dict[str, Any]:
    sizes = (TEXT, FRAMES * TOKENS, 7)
    text, image, audio = torch.arange(sum(sizes)).split(sizes)
    return {
        "hidden_states": noise(1, FRAMES * TOKENS, 16), "audio_hidden_states": noise(1, 7, 6),
        "encoder_hidden_states": noise(1, TEXT, 12), "timestep": steps(), "video_indices": image,
        "timestep_indices": torch.zeros(sum(sizes), dtype=torch.long), "audio_indices": audio, "text_indices": text,
        "token_tags": torch.tensor([0] * sizes[0] + [1] * sizes[1] + [2] * sizes[2]),
        "position_ids": torch.arange(sum(sizes))[:, None].expand(-1, 3).contiguous(),
    }  # fmt: skip


def sana_wm() -> dict[str, Any]:
    return {
        "hidden_states": noise(1, 4, FRAMES, *GRID), "timestep": torch.full((1, 1, FRAMES), 700.0),
        "encoder_hidden_states": noise(1, 1, TEXT, 12), "encoder_attention_mask": torch.ones(1, TEXT),
    }  # fmt: skip


def refiner() -> dict[str, Any]:
    angles = noise(2, FRAMES * TOKENS, WIDTH)
    return {
        "hidden_states": noise(2, FRAMES * TOKENS, 8), "encoder_hidden_states": noise(2, TEXT, 12),
        "timestep": steps(), "video_rotary_emb": (angles.cos(), angles.sin()),
    }  # fmt: skip


def wan_animate2() -> dict[str, Any]:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [noise(4, *LATENT)], "condition_latents": [noise(4, *LATENT)], "timestep": steps()[:1],
        "encoder_hidden_states": [noise(TEXT, 12)], "kv_cache": WanAnimate2KVCache(1), "kv_cache_mode": "extract",
        "seq_len": FRAMES * TOKENS, "offset_grid_sizes": torch.tensor([[FRAMES, *GRID]]),
    }  # fmt: skip


FRAMES_AT_ONCE = "frames x rows x columns"
FRAMEWISE = {"*.attn1": FRAMES_AT_ONCE}
"""Why the self-attention of a video is kept: its tokens are those of all frames."""
FRAMEWISE_CROSS = FRAMEWISE | CROSS
THROUGH_TIME = {"*.temp_attentions.*": "across images", "transformer_in.*": "across images"}
"""Why what U-Nets put between the attentions of a frame is kept."""
SIZES = {"num_attention_heads": HEADS, "attention_head_dim": HEAD, "num_layers": 1}
WAN = SIZES | {
    "in_channels": 4, "out_channels": 4, "text_dim": 12, "freq_dim": 16, "ffn_dim": 48, "rope_max_seq_len": 16,
}  # fmt: skip
HUNYUAN = SIZES | {
    "in_channels": 4, "out_channels": 4, "num_single_layers": 1, "num_refiner_layers": 1,
    "text_embed_dim": 12, "pooled_projection_dim": 14, "rope_axes_dim": ROPE,
}  # fmt: skip
THREE_D: dict[str, Any] = {
    "down_block_types": ("DownBlock3D", "CrossAttnDownBlock3D"), "attention_head_dim": 8,
    "up_block_types": ("CrossAttnUpBlock3D", "UpBlock3D"),
}  # fmt: skip
MOTION = {
    "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion"),
    "up_block_types": ("CrossAttnUpBlockMotion", "UpBlockMotion"), "motion_num_attention_heads": 2,
    "motion_max_seq_length": 4, "num_attention_heads": 2,
}  # fmt: skip
LTX2 = SIZES | {
    "in_channels": 8, "out_channels": 8, "cross_attention_dim": WIDTH, "audio_in_channels": 6, "audio_out_channels": 6,
    "audio_num_attention_heads": HEADS, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16,
    "caption_channels": 12,
}  # fmt: skip

VIDEO: tuple[Case, ...] = (
    case(
        "AllegroTransformer3DModel",
        SIZES | {
            "attention_head_dim": 18, "cross_attention_dim": 36, "caption_channels": 12, "sample_height": 8,
            "sample_width": 12, "sample_frames": FRAMES,
        },
        allegro, kept=FRAMEWISE_CROSS,
    ),
    case("AnyFlowTransformer3DModel", WAN, anyflow, kept=FRAMEWISE_CROSS),
    case("ChronoEditTransformer3DModel", WAN | {"rope_temporal_skip_len": 2}, video, kept=FRAMEWISE_CROSS),
    case(
        "ConsisIDTransformer3DModel",
        SIZES | {
            "in_channels": 4, "out_channels": 4, "time_embed_dim": 16, "text_embed_dim": 12, "sample_width": 12,
            "sample_height": 8, "sample_frames": 5, "max_text_seq_length": TEXT,
            "use_rotary_positional_embeddings": True,
        },
        lambda: frames_first() | {"image_rotary_emb": rotary()}, kept=FRAMEWISE,
    ),
    case(
        "CosmosTransformer3DModel",
        SIZES | {"in_channels": 4, "out_channels": 4, "text_embed_dim": 12, "adaln_lora_dim": 8, "max_size": (4, 8, 12),
                 "concat_padding_mask": False},
        cosmos, kept=FRAMEWISE_CROSS,
    ),
    case(
        "EasyAnimateTransformer3DModel",
        SIZES | {
            "in_channels": 4, "out_channels": 4, "patch_size": 2, "time_embed_dim": 16, "text_embed_dim": 12,
            "num_layers": 2, "mmdit_layers": 1, "sample_width": 12, "sample_height": 8,
        },
        video, kept=FRAMEWISE,
    ),
    case(
        "HeliosTransformer3DModel",
        {key: value for key, value in WAN.items() if key != "rope_max_seq_len"} | {"rope_dim": (4, 6, 6)}, video,
        kept=FRAMEWISE_CROSS,
    ),
    case("HunyuanVideoTransformer3DModel", HUNYUAN, hunyuan_video,
         kept={"*transformer_blocks.*": FRAMES_AT_ONCE, "context_embedder.*": NO_IMAGE}),
    case(
        "HunyuanVideo15Transformer3DModel",
        SIZES | {
            "in_channels": 4, "out_channels": 4, "num_refiner_layers": 1, "patch_size": 2, "text_embed_dim": 12,
            "text_embed_2_dim": 10, "image_embed_dim": 14, "rope_axes_dim": ROPE,
        },
        hunyuan_video15,
    ),
    case(
        "HunyuanVideoFramepackTransformer3DModel",
        HUNYUAN | {"has_image_proj": True, "image_proj_dim": 14, "has_clean_x_embedder": True}, framepack,
    ),
    case(
        "Kandinsky5Transformer3DModel",
        {
            "in_text_dim": 12, "in_text_dim2": 14, "time_dim": 16, "model_dim": WIDTH, "ff_dim": 48,
            "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": ROPE,
        },
        kandinsky5,
        kept={"text_*": NO_IMAGE, "visual_*.self_attention": NO_GRID, "visual_*.cross_attention": "cross-attention"},
    ),
    case(
        "Kandinsky6Transformer3DModel",
        {
            "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 12, "in_text_dim2": 14, "time_dim": 16,
            "model_dim": WIDTH, "ff_dim": 48, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": ROPE,
            "visual_cond": False, "in_audio_dim": 6, "out_audio_dim": 6,
        },
        kandinsky6,
        kept={"*_text_transformer_blocks.*": NO_IMAGE, "*.video_dec_block.self_attention": NO_GRID,
              "*.audio_dec_block.self_attention": NO_IMAGE, "*cross_attention": "cross-attention"},
    ),
    case(
        "Kandinsky6SRTransformer3DModel",
        {
            "in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 16, "model_dim": WIDTH, "ff_dim": 48,
            "num_visual_blocks": 1, "axes_dims": ROPE,
        },
        lambda: {"hidden_states": noise(1, 2, 16, 16, 9), "timestep": steps()[:1]},
    ),
    case("LTX2VideoTransformer3DModel", LTX2, ltx2,
         kept=CROSS | {"*.attn1": NO_GRID, "*.audio_attn1": NO_IMAGE, "*.audio_attn2": "cross-attention",
                       "*_to_*_attn": "cross-attention"}),
    case(
        "MochiTransformer3DModel",
        SIZES | {"in_channels": 4, "pooled_projection_dim": 12, "text_embed_dim": 16, "time_embed_dim": 16,
                 "max_sequence_length": TEXT},
        lambda: video() | {"encoder_hidden_states": noise(2, TEXT, 16), "encoder_attention_mask": padded_mask()},
    ),
    case(
        "MotifVideoTransformer3DModel",
        SIZES | {"in_channels": 4, "out_channels": 4, "num_single_layers": 2, "num_decoder_layers": 1,
                 "text_embed_dim": 12, "rope_axes_dim": ROPE},
        lambda: video() | {"encoder_attention_mask": padded_mask()}, kept={"*.attn": FRAMES_AT_ONCE},
    ),
    case(
        "SanaVideoTransformer3DModel",
        SIZES | {"in_channels": 4, "out_channels": 4, "num_cross_attention_heads": HEADS,
                 "cross_attention_head_dim": HEAD, "cross_attention_dim": WIDTH, "caption_channels": 12,
                 "sample_size": 8},
        video, kept=CROSS | {"*.attn1": "linear attention"},
    ),
    case("SkyReelsV2Transformer3DModel", WAN, video, kept=FRAMEWISE_CROSS),
    case(
        "WanVACETransformer3DModel", WAN | {"vace_layers": [0], "vace_in_channels": 6},
        lambda: video() | {"control_hidden_states": noise(2, 6, *LATENT)}, kept=FRAMEWISE_CROSS,
    ),
    case(
        "WanAnimateTransformer3DModel",
        WAN | {
            "in_channels": 12, "latent_channels": 4, "image_dim": 10, "added_kv_proj_dim": WIDTH,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_encoder_size": 16,
            "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 8, "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2, "inject_face_latents_blocks": 1,
        },
        # The pose is written into a part of the video in place: what its tokens are is lost there.
        wan_animate, kept=CROSS | {"*.attn1": NO_GRID, "face_adapter.*": "cross-attention"},
    ),
    case("AnyFlowFARTransformer3DModel", WAN | {"chunk_partition": [1, 1]}, far),
    case(
        "Cosmos3OmniTransformer",
        {
            "head_dim": HEAD, "hidden_size": WIDTH, "intermediate_size": 48, "latent_channel": 4,
            "patch_latent_dim": 16, "num_attention_heads": HEADS, "num_hidden_layers": 1, "num_key_value_heads": 1,
            "vocab_size": 20, "rope_axes_dim": [3, 3, 2],
        },
        cosmos3, kept={"*.self_attn": "not (batch, tokens, channels)", "layers.*": "causal"},
    ),
    case(
        "MiniMaxH3Transformer3DModel",
        SIZES | {
            "hidden_size": WIDTH, "num_refiner_layers": 1, "ffn_dim": 48, "in_channels": 4, "audio_in_channels": 6,
            "text_dim": 12, "freq_dim": 16, "time_embed_hidden_dim": 16, "time_embed_dim": 16, "rope_freq_dim": 2,
        },
        minimax, kept={"token_refiner.*": NO_IMAGE, "transformer_blocks.*": NO_GRID},
    ),
    case(
        "SanaWMTransformer3DModel",
        {
            "in_channels": 4, "num_layers": 2, "hidden_size": WIDTH, "num_attention_heads": HEADS, "softmax_every_n": 2,
            "linear_head_dim": HEAD, "caption_channels": 12, "chunk_plucker_post_attn_blocks": 2, "image_size": 64,
        },
        sana_wm,
        kept={"blocks.0.attn.attn": "linear attention", "blocks.1.attn.attn": FRAMES_AT_ONCE,
              "*.cross_attn": "cross-attention"},
    ),
    case("SanaWMLTX2RefinerTransformer3DModel", LTX2, refiner, kept=CROSS | {"*.attn1": NO_GRID}),
    case(
        "WanAnimate2Transformer3DModel",
        {
            "text_len": TEXT, "in_dim": 8, "dim": WIDTH, "ffn_dim": 48, "freq_dim": 16, "text_dim": 12, "out_dim": 4,
            "num_heads": HEADS, "num_layers": 1, "use_img_emb": False,
        },
        wan_animate2,
    ),
    case("UNet3DConditionModel", UNET | THREE_D, unet_video, sites=DOWN + UP, kept=CROSS | THROUGH_TIME),
    case("I2VGenXLUNet", UNET | THREE_D, i2vgen, sites=DOWN + UP,
         kept=CROSS | THROUGH_TIME | {"image_latents_temporal_encoder.*": NO_IMAGE}),
    case(
        "UNetMotionModel", UNET | MOTION,
        lambda: unet_video() | {"encoder_hidden_states": noise(FRAMES, TEXT, 12)}, sites=DOWN + UP,
        kept=CROSS | {"*.motion_modules.*": "across images"},
    ),
    case(
        "UNetSpatioTemporalConditionModel",
        {
            "in_channels": 4, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 12,
            "down_block_types": ("DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"),
            "up_block_types": ("CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"),
            "num_attention_heads": (2, 2), "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24,
        },
        svd, sites=DOWN + UP, kept=CROSS | {"*.temporal_transformer_blocks.0.attn1": "across images"},
    ),
    case(
        "TransformerTemporalModel",
        {"num_attention_heads": HEADS, "attention_head_dim": HEAD, "in_channels": 16, "norm_num_groups": 4},
        # As many frames as a grid half as fine has cells, which is no reason to take them for an image.
        lambda: {"hidden_states": noise(6, 16, *GRID), "num_frames": 6}, kept={"*": "across images"},
    ),
)  # fmt: skip
