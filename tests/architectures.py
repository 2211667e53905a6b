"""Architectures of Transformers as tiny models: random weights, a config made small by hand, one batch to learn by heart.

:data:`ARCHITECTURES` is the table of docs/support.md: ``tests/architectures_table.py`` writes it, and trains each.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

__all__ = ["ARCHITECTURES", "FAILS", "INCLUDED", "LEAVES", "RANK", "SEQUENCES", "Architecture", "batch_of", "build"]

RANK = 4
SEQUENCES = 4  # in a batch
VOCABULARY, LENGTH = 96, 24
IMAGE = 95  # the token that stands for a part of an image
_SIDE, _PATCH = 16, 4

# What every config is told; one without such a name keeps it and does nothing with it.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "image_size": _SIDE, "patch_size": _PATCH, "num_channels": 3,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
EXPERTS |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 8)
LATENT = {
    "head_dim": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
GROUPED = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
BOTH = {"layer_types": ["linear_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
SEQ2SEQ: dict[str, Any] = {"d_model": 32, "decoder_start_token_id": 2}
T5 = {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2}
SEQ2SEQ |= dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
SEQ2SEQ |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
SEQ2SEQ |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48)

Batch = dict[str, Tensor]


class Architecture(NamedTuple):
    """A class of Transformers, by its name, as a small model.

    Attributes:
        cls: the class.
        family: heading of its part of the table.
        config: what its config is told beside :data:`SMALL`; of what is ``...`` nothing.
        inputs: makes a batch of so many sequences for a config; every tensor can be cut among processes by its rows.
    """

    cls: str
    family: str
    config: Mapping[str, Any]
    inputs: Callable[[Any, int], Batch]


def build(one: Architecture) -> nn.Module:
    """The model in train mode, without dropout; of the global generator, in the default dtype."""
    cls = getattr(transformers, one.cls)
    told = copy.deepcopy({key: value for key, value in {**SMALL, **one.config}.items() if value is not ...})
    config = cls.config_class(**told)
    _without_noise(config)
    return cls(config).train()


def _without_noise(config: Any) -> None:
    """Nothing is dropped or masked at random: the loss is a function of the weights."""
    for key, value in vars(config).items():
        if isinstance(value, transformers.PreTrainedConfig):
            _without_noise(value)
        elif ("drop" in key or "jitter" in key) and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, key, type(value)(0))


def batch_of(one: Architecture, model: nn.Module, sequences: int = SEQUENCES) -> Batch:
    """The batch, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return one.inputs(model.config, sequences)


def _ids(sequences: int, length: int = LENGTH) -> Tensor:
    return torch.randint(3, IMAGE, (sequences, length))


def tokens(config: Any, sequences: int) -> Batch:
    ids = _ids(sequences)
    return {"input_ids": ids, "labels": ids.clone()}


def classified(config: Any, sequences: int) -> Batch:
    return {"input_ids": _ids(sequences), "labels": torch.arange(sequences) % 2}


def translated(config: Any, sequences: int) -> Batch:
    return {"input_ids": _ids(sequences), "labels": _ids(sequences)}


def _pixels(*size: int) -> Tensor:
    return torch.randn(*size, 3, _SIDE, _SIDE)


def images(config: Any, sequences: int) -> Batch:
    return {"pixel_values": _pixels(sequences), "labels": torch.arange(sequences) % 2}


def pairs(config: Any, sequences: int) -> Batch:
    """Images and their texts, told apart within each process."""
    return {"pixel_values": _pixels(sequences), "input_ids": _ids(sequences), "return_loss": torch.tensor(True)}


def sound(config: Any, sequences: int) -> Batch:
    return {"input_values": torch.randn(sequences, 400), "labels": torch.arange(sequences) % 2}


def spectrogram(config: Any, sequences: int) -> Batch:
    return {"input_values": torch.randn(sequences, 32, 16), "labels": torch.arange(sequences) % 2}


def speech(config: Any, sequences: int) -> Batch:
    return {"input_features": torch.randn(sequences, 16, 32), "labels": _ids(sequences)}


def frames(config: Any, sequences: int) -> Batch:
    return {"input_features": torch.randn(sequences, 32, 16), "labels": _ids(sequences)}


def _with_image(sequences: int, parts: int) -> Batch:
    ids = torch.cat([torch.full((sequences, parts), IMAGE), _ids(sequences)], 1)
    return {"input_ids": ids, "labels": ids.masked_fill(ids == IMAGE, -100), "token_type_ids": (ids == IMAGE).long()}


def seen(parts: int, *images: int, drop: tuple[str, ...] = ()) -> Callable[[Any, int], Batch]:
    """An image of ``parts`` tokens before the text."""

    def made(config: Any, sequences: int) -> Batch:
        batch = _with_image(sequences, parts) | {"pixel_values": _pixels(sequences, *images)}
        return {key: value for key, value in batch.items() if key not in drop}

    return made


def patches(config: Any, sequences: int) -> Batch:
    """As Qwen's: the patches of all images in one list, and of each image how many."""
    vision, side = config.vision_config, _SIDE // _PATCH
    batch = _with_image(sequences, side**2 // vision.spatial_merge_size**2)
    batch["mm_token_type_ids"] = batch.pop("token_type_ids")
    size = 3 * vision.temporal_patch_size * vision.patch_size**2
    batch["pixel_values"] = torch.randn(sequences * side**2, size)
    return batch | {"image_grid_thw": torch.tensor([[1, side, side]] * sequences)}


def family(
    title: str, inputs: Callable[[Any, int], Batch], base: Mapping[str, Any], **classes: Any
) -> list[Architecture]:
    """Architectures of one kind: of each, what its config is told, and before that its inputs if it has its own."""
    made = []
    for cls, told in classes.items():
        own, config = told if isinstance(told, tuple) else (inputs, told)
        made.append(Architecture(cls, title, {**base, **config}, own))
    return made


_DENSE = family(
    "dense decoders", tokens, {"head_dim": 8},
    LlamaForCausalLM={},
    MistralForCausalLM={},
    Ministral3ForCausalLM={},
    Qwen2ForCausalLM={},
    Qwen3ForCausalLM={},
    GemmaForCausalLM={},
    Gemma2ForCausalLM={},
    Gemma3ForCausalLM={},
    Gemma4ForCausalLM={"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 8},
    Phi3ForCausalLM={},
    Olmo2ForCausalLM={},
    Cohere2ForCausalLM={},
    GraniteForCausalLM={},
    Glm4ForCausalLM={},
    SmolLM3ForCausalLM={},
    StableLmForCausalLM={},
    Starcoder2ForCausalLM={},
    NemotronForCausalLM={},
    Exaone4ForCausalLM={},
)  # fmt: skip
_OLDER = family(
    "older decoders", tokens, {},
    GPT2LMHeadModel={},
    GPTNeoXForCausalLM={},
    GPTJForCausalLM={"rotary_dim": 4},
    OPTForCausalLM={"word_embed_proj_dim": 32, "ffn_dim": 48},
    BloomForCausalLM={},
    MptForCausalLM={},
    FalconForCausalLM={},
    XGLMForCausalLM={"ffn_dim": 48},
)  # fmt: skip
_EXPERTS = family(
    "mixtures of experts", tokens, {"head_dim": 8, **EXPERTS},
    MixtralForCausalLM={},
    Qwen2MoeForCausalLM={"shared_expert_intermediate_size": 24},
    Qwen3MoeForCausalLM={},
    Qwen3NextForCausalLM={**DELTA, **BOTH, "shared_expert_intermediate_size": 24},
    Qwen3_5MoeForCausalLM={**DELTA, **BOTH, "shared_expert_intermediate_size": 24},
    OlmoeForCausalLM={},
    FlexOlmoForCausalLM={},
    DeepseekV2ForCausalLM={**LATENT, **GROUPED},
    DeepseekV3ForCausalLM={**LATENT, **GROUPED},
    GptOssForCausalLM={},
    GraniteMoeForCausalLM={},
    GraniteMoeHybridForCausalLM={**MAMBA, **BOTH, "shared_intermediate_size": 24},
    JetMoeForCausalLM={"kv_channels": 8},
    Llama4ForCausalLM={"intermediate_size_mlp": 48},
    AriaTextForCausalLM={"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1},
    PhimoeForCausalLM={},
    Ernie4_5_MoeForCausalLM={"moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 1},
    Glm4MoeForCausalLM=GROUPED,
    Dots1ForCausalLM={**GROUPED, "n_shared_experts": 1},
    HunYuanMoEV1ForCausalLM={"moe_topk": 2},
    MiniMaxForCausalLM=BOTH,
    MiniMaxM2ForCausalLM={},
    Lfm2MoeForCausalLM={"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    AfmoeForCausalLM={"num_dense_layers": 1},
    SolarOpenForCausalLM={},
    LongcatFlashForCausalLM={**LATENT, "num_layers": 1, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 24,
                             "moe_topk": 2, "zero_expert_num": 2},
    DbrxForCausalLM={"n_layers": 2, "d_model": 32, "n_heads": 4, "max_seq_len": 64,
                     "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2},
                     "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}},
    Step3p7ForConditionalGeneration={"text_config": {**SMALL, **EXPERTS, "head_dim": 8, "share_expert_dim": 24,
                                                     "mlp_layer_types": ["dense", "sparse"],
                                                     "sliding_window": 8},
                                     "vision_config": SMALL, "image_token_id": IMAGE},
    NllbMoeForConditionalGeneration=(translated, {**SEQ2SEQ, "encoder_sparse_step": 2, "decoder_sparse_step": 2,
                                                  "expert_capacity": 128}),
    SwitchTransformersForConditionalGeneration=(translated, {**SEQ2SEQ, **T5, **EXPERTS, "num_sparse_encoder_layers": 1,
                                                           "num_sparse_decoder_layers": 1}),
)  # fmt: skip
_STATES = family(
    "state-space and hybrid", tokens, {},
    MambaForCausalLM={"state_size": 8},
    Mamba2ForCausalLM={"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8, "chunk_size": 8},
    FalconMambaForCausalLM={"state_size": 8},
    JambaForCausalLM={"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0,
                      "mamba_d_state": 8, "use_mamba_kernels": False},
    BambaForCausalLM={**MAMBA, "attn_layer_indices": [1]},
    FalconH1ForCausalLM={**MAMBA, "mamba_d_ssm": 64, "head_dim": 8},
    Zamba2ForCausalLM={"layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 8, "n_mamba_heads": 8, "chunk_size": 8,
                       "use_mamba_kernels": False, "num_key_value_heads": 4, "adapter_rank": 4},
    RecurrentGemmaForCausalLM={"block_types": ["recurrent", "attention"], "attention_window_size": 16},
    RwkvForCausalLM={"attention_hidden_size": 32},
    Lfm2ForCausalLM={"layer_types": ["conv", "full_attention"]},
    Qwen3_5ForCausalLM={**DELTA, **BOTH, "head_dim": 8},
)  # fmt: skip
_TRANSLATORS = family(
    "encoder and decoder", translated, SEQ2SEQ,
    T5ForConditionalGeneration=T5,
    UMT5ForConditionalGeneration=T5,
    BartForConditionalGeneration={},
    MBartForConditionalGeneration={},
    PegasusForConditionalGeneration={},
    M2M100ForConditionalGeneration={},
    MarianMTModel={},
    BlenderbotForConditionalGeneration={},
    FSMTForConditionalGeneration={"langs": ["en", "de"], "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY},
)  # fmt: skip
_ENCODERS = family(
    "encoders", tokens, {},
    BertForMaskedLM={},
    RobertaForMaskedLM={},
    AlbertForMaskedLM={"embedding_size": 16},
    ElectraForMaskedLM={"embedding_size": 16},
    DebertaV2ForMaskedLM={"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ModernBertForMaskedLM={},
    MobileBertForMaskedLM={"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    IBertForSequenceClassification=(classified, {}),
    XLNetLMHeadModel={"max_position_embeddings": ..., "d_inner": 48, "d_head": 8},
)  # fmt: skip
_SIGHT = family(
    "vision", images, {},
    ViTForImageClassification={},
    DeiTForImageClassification={},
    BeitForImageClassification={},
    Dinov2ForImageClassification={},
    SwinForImageClassification={"num_attention_heads": ..., "num_hidden_layers": ...,
                                "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2},
    ConvNextForImageClassification={"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2,
                                   "layer_scale_init_value": 1.0},
    SiglipForImageClassification={"vision_config": SMALL},
    CLIPForImageClassification={"vision_config": SMALL},
    CLIPModel=(pairs, {"text_config": SMALL, "vision_config": SMALL, "projection_dim": 16}),
)  # fmt: skip
_HEARING = family(
    "speech", sound, {"num_mel_bins": 16},
    Wav2Vec2ForSequenceClassification={"conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 4],
                                       "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
                                       "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False,
                                       "classifier_proj_size": 16},
    HubertForSequenceClassification={"conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 4],
                                     "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
                                     "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False,
                                     "classifier_proj_size": 16},
    WhisperForConditionalGeneration=(speech, {**SEQ2SEQ, "max_source_positions": 16, "max_target_positions": 64}),
    Speech2TextForConditionalGeneration=(frames, {**SEQ2SEQ, "input_feat_per_channel": 16, "conv_channels": 16,
                                                  "max_target_positions": 64}),
    ASTForAudioClassification=(spectrogram, {"max_length": 32}),
)  # fmt: skip
_QWEN = {"depth": 2, "num_heads": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_MANY = family(
    "multimodal", seen(16), {"text_config": {**SMALL, "head_dim": 8}, "vision_config": SMALL,
                             "image_token_id": IMAGE, "image_token_index": IMAGE},
    Gemma3ForConditionalGeneration=(seen(4), {"mm_tokens_per_image": 4}),
    PaliGemmaForConditionalGeneration={"projection_dim": 32},
    LlavaForConditionalGeneration=(seen(16, drop=("token_type_ids",)), {}),
    Idefics3ForConditionalGeneration=(seen(4, 1, drop=("token_type_ids",)), {"scale_factor": 2}),
    Qwen2VLForConditionalGeneration=(patches, {"text_config": {**SMALL, **_ROPE},
                                               "vision_config": {**_QWEN, "embed_dim": 32, "hidden_size": 32,
                                                                 "patch_size": _PATCH, "mlp_ratio": 2}}),
    Qwen3VLForConditionalGeneration=(patches, {"text_config": {**SMALL, **_ROPE, "head_dim": 8},
                                               "vision_config": {**SMALL, **_QWEN, "out_hidden_size": 32,
                                                                 "num_position_embeddings": 16,
                                                                 "deepstack_visual_indexes": [0]}}),
    Qwen3VLMoeForConditionalGeneration=(patches, {"text_config": {**SMALL, **_ROPE, **EXPERTS, "head_dim": 8},
                                                  "vision_config": {**SMALL, **_QWEN, "out_hidden_size": 32,
                                                                    "num_position_embeddings": 16,
                                                                    "deepstack_visual_indexes": [0]}}),
)  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {
    one.cls: one
    for part in (_DENSE, _OLDER, _EXPERTS, _STATES, _TRANSLATORS, _ENCODERS, _SIGHT, _HEARING, _MANY)
    for one in part
}

# Stacked experts of classes that are not known: matrices by the option alone, whose gradients are formed.
INCLUDED: dict[str, str] = {
    "LongcatFlashForCausalLM": "experts[.].*_proj$",
    "Step3p7ForConditionalGeneration": "experts[.].*_proj$",
}

# Modules that run so often as tokens want them: ranks would gather at different times, if stage 3 were not told to gather
# what is around them.
LEAVES: dict[str, str] = {
    "DbrxForCausalLM": "DbrxExperts",
    "NllbMoeForConditionalGeneration": "NllbMoeSparseMLP",
    "SwitchTransformersForConditionalGeneration": "SwitchTransformersSparseMLP",
}

# What does not train, by class and engine, and a piece of what it says.
FAILS: dict[tuple[str, str], str] = {
    # DeepSpeed's and FSDP2's own, with any optimizer: a parameter without a dimension, the temperature.
    ("CLIPModel", "zero2"): "dim() cannot be 0",
    ("CLIPModel", "zero3"): "dim() cannot be 0",
    ("CLIPModel", "fsdp2"): "scalar parameters",
}
