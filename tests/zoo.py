"""Real architectures, each small enough for a training step in well under a second on two cores.

`ZOO` lists them; `entry.build()` gives a seeded `(model, args, kwargs)`. pytorchcv models keep
their depth, widths and wiring; only the input is small, and where a fixed 7x7 pooling would ask
for 224 pixels it becomes a global one. transformers models have tiny random configurations. The
rest is written here: what people write by hand and no library has.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.truth import seed
from tests.zoo_research import RESEARCH

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One architecture: its name, and a function that builds it with inputs."""

    name: str
    build_unseeded: Callable[[], Built]

    def build(self) -> Built:
        """The model and its inputs, the same at every call."""
        seed(0)
        return self.build_unseeded()


def vary(args: tuple[Any, ...], kwargs: dict[str, Any], step: int) -> Inputs:
    """Other inputs of the same shapes for pass `step`; step 0 gives the inputs themselves."""

    def other(value: Any) -> Any:
        if not isinstance(value, Tensor) or step == 0:
            return value
        if value.is_floating_point():
            generator = torch.Generator().manual_seed(step)
            return value + 0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        return value.roll(step, -1)

    return tuple(other(a) for a in args), {k: other(v) for k, v in kwargs.items()}


def _words(text: str) -> list[str]:
    return text.split()


# -- pytorchcv ----------------------------------------------------------------------------------


def _first(size: Any) -> int:
    return int(size[0] if isinstance(size, tuple) else size)


def _cv(name: str, size: int = 64, batch: int = 2, classes: bool = True, **kwargs: Any) -> Built:
    from pytorchcv.model_provider import get_model

    if classes:
        kwargs["num_classes"] = 10
    # RegNet's constructor still says `np.int`, which numpy has dropped.
    with mock.patch.object(np, "int", int, create=True):
        model = get_model(name, pretrained=False, **kwargs)
    for module in model.modules():
        for child_name, child in list(module.named_children()):
            # Only the last pooling has such a window; that of Inception's branches is 3.
            if isinstance(child, nn.AvgPool2d) and _first(child.kernel_size) >= 5:
                module.add_module(child_name, nn.AdaptiveAvgPool2d(1))
    return model, (torch.randn(batch, 3, size, size),), {}


def _fully_connected(name: str, features: int) -> Built:
    """AlexNet and VGG keep their convolutions; 4096 units and 224 pixels would cost seconds."""
    model, args, kwargs = _cv(name)
    model.output.fc1.fc = nn.Linear(features, 64)
    model.output.fc2.fc = nn.Linear(64, 64)
    model.output.fc3 = nn.Linear(64, 10)
    return model, args, kwargs


def _segmentation(name: str, size: int = 64) -> Built:
    return _cv(name, size, classes=False, in_size=(size, size))


_CV_64 = _words(
    """
    bninception resnet10 preresnet10 resnext14_16x4d seresnet10 senet16 resnestabc14
    cbam_resnet18 regnetx002 diaresnet10 diracnet18v2 sharesnet18 densenet121 peleenet
    condensenet74_c8_g8 channelnet revnet38 dla46xc fishnet99 espnetv2_wd2 hrnet_w18_small_v1
    vovnet27s hardnet39ds squeezenet_v1_1 shufflenet_g3_wd4 shufflenetv2_wd2 shufflenetv2b_wd2
    mobilenet_wd4 mobilenetv2_wd4 mobilenetv3_small_w7d20 igcv3_wd4 ghostnet mnasnet_a1 darts
    proxylessnas_cpu efficientnet_b0 efficientnet_edge_small_b mixnet_s isqrtcovresnet18
    resneta10 octresnet10_ad2 nasnet_4a1056 dicenet_wd5
    """
)
_CV_224 = ["darknet_ref"]
_CV_96 = _words("dpn68 xception inceptionv3 ")
_CV_32 = _words(
    """
    nin_cifar10 resnet20_cifar10 preresnet20_cifar10 resnext20_16x4d_cifar10 seresnet20_cifar10
    pyramidnet110_a48_cifar10 densenet40_k12_bc_cifar10 rir_cifar10 wrn16_10_cifar10
    """
)
# Their constructors set the number of classes themselves.
_CV_RANDOM_DEPTH = _words(
    "resdropresnet20_cifar10 shakeshakeresnet20_2x16d_cifar10 shakedropresnet20_cifar10"
)
_CV_DENSE = _words(
    """
    fastscnn_cityscapes cgnet_cityscapes dabnet_cityscapes fpenet_cityscapes ctxnet_cityscapes
    lednet_cityscapes esnet_cityscapes edanet_cityscapes enet_cityscapes erfnet_cityscapes
    bisenet_resnet18_celebamaskhq simplepose_mobile_mobilenet_w1_coco centernet_resnet18_voc
    """
)


# -- transformers -------------------------------------------------------------------------------

_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


def _ids(*shape: int, vocab: int = 60) -> Tensor:
    return torch.randint(3, vocab, shape)


def _hf(
    config: str, model: str, inputs: Callable[[], dict[str, Any]], eager: bool = False, **given: Any
) -> Built:
    import transformers

    if not hasattr(transformers, config):
        import pytest

        pytest.skip(f"transformers {transformers.__version__} has no {config}")
    # Each by its own import path: `transformers` resolves them lazily.
    configuration = getattr(transformers, config)(**given)
    if eager:
        configuration._attn_implementation = "eager"
    built = getattr(transformers, model)(configuration)
    return built, (), inputs()


def _text(length: int = 12, **more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"input_ids": _ids(2, length), **more}


def _pixels(size: int = 32, batch: int = 2, **more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(batch, 3, size, size), **more}


def _without(config: dict[str, Any], *names: str, **more: Any) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in names} | more


def _seq2seq(length: int = 10) -> Callable[[], dict[str, Any]]:
    return lambda: {"input_ids": _ids(2, length), "decoder_input_ids": _ids(2, 6)}


def _bart(name: str) -> partial[Built]:
    given: dict[str, Any] = {
        "vocab_size": 64,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
    }
    return partial(_hf, f"{name}Config", f"{name}Model", _seq2seq(), **given)


_KV = {**_TEXT, "num_key_value_heads": 2}
_MOE = {"num_experts_per_tok": 2}
_STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]}
_CLIP_TEXT = {**_TEXT, "projection_dim": 16}


def _two_towers(config: str, model: str, **more: Any) -> Built:
    return _hf(
        config,
        model,
        lambda: {"input_ids": _ids(2, 8), "pixel_values": torch.randn(2, 3, 32, 32)},
        text_config={**_CLIP_TEXT, **more},
        vision_config={**_VISION, **more},
    )


def _sam() -> Built:
    vision = {**_VISION, "mlp_dim": 48, "num_hidden_layers": 2, "output_channels": 16}
    vision |= {"global_attn_indexes": [1], "window_size": 2, "num_pos_feats": 8}
    prompt = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
    mask = {"hidden_size": 16, "mlp_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    mask |= {"iou_head_hidden_dim": 16, "iou_head_depth": 2}
    return _hf(
        "SamConfig",
        "SamModel",
        lambda: {
            "pixel_values": torch.randn(1, 3, 32, 32),
            "input_points": torch.tensor([[[[4.0, 7.0]]]]),
        },
        vision_config=vision,
        prompt_encoder_config=prompt,
        mask_decoder_config=mask,
    )


def _detr() -> Built:
    import transformers

    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    given: dict[str, Any] = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2}
    given |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 5}
    given |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    return _hf(
        "DetrConfig", "DetrForObjectDetection", _pixels(64), backbone_config=backbone,
        use_timm_backbone=False, backbone=None, use_pretrained_backbone=False, **given,
    )  # fmt: skip


def _whisper() -> Built:
    given: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "num_mel_bins": 8}
    given |= {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48}
    given |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    given |= {"max_source_positions": 20, "max_target_positions": 20, "pad_token_id": 0}
    given |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return _hf(
        "WhisperConfig",
        "WhisperModel",
        lambda: {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": _ids(2, 6)},
        **given,
    )


def _speech(name: str) -> Built:
    given: dict[str, Any] = {**_without(_TEXT, "max_position_embeddings")}
    given |= {"conv_dim": [16, 16], "conv_stride": [4, 2], "conv_kernel": [8, 4]}
    given |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    given |= {"mask_time_prob": 0.0, "layerdrop": 0.1}
    return _hf(
        f"{name}Config", f"{name}Model", lambda: {"input_values": torch.randn(2, 400)}, **given
    )


def _swin(name: str) -> partial[Built]:
    return partial(
        _hf, f"{name}Config", f"{name}Model", _pixels(), image_size=32, patch_size=4, embed_dim=8,
        depths=[2, 2], num_heads=[2, 4], window_size=4,
    )  # fmt: skip


_HF: dict[str, Callable[[], Built]] = {
    **{
        name.lower(): partial(_hf, f"{name}Config", f"{name}Model", _text(), **_TEXT)
        for name in ("Bert", "Roberta", "Electra", "Ernie", "Nystromformer", "MegatronBert")
    },
    "bert_mlm_gelu_new": partial(
        _hf, "BertConfig", "BertForMaskedLM", _text(), hidden_act="gelu_new", **_TEXT
    ),
    "bert_eager_quick_gelu": partial(
        _hf, "BertConfig", "BertForSequenceClassification", _text(), eager=True,
        hidden_act="quick_gelu", **_TEXT,
    ),
    "distilbert": partial(
        _hf, "DistilBertConfig", "DistilBertModel", _text(), vocab_size=64, dim=32, hidden_dim=48,
        n_layers=2, n_heads=4, max_position_embeddings=64,
    ),
    "albert": partial(
        _hf, "AlbertConfig", "AlbertModel", _text(), **_TEXT, embedding_size=16
    ),
    "deberta_v2": partial(
        _hf, "DebertaV2Config", "DebertaV2Model", _text(), **_TEXT, relative_attention=True,
        pos_att_type=["p2c", "c2p"], position_buckets=8,
    ),
    "mobilebert": partial(
        _hf, "MobileBertConfig", "MobileBertModel", _text(), **_TEXT, embedding_size=16,
        intra_bottleneck_size=16, num_feedforward_networks=2,
    ),
    "squeezebert": partial(
        _hf, "SqueezeBertConfig", "SqueezeBertModel", _text(), **_TEXT, embedding_size=32,
        q_groups=2, k_groups=2, v_groups=2, intermediate_groups=2, output_groups=2,
    ),
    "fnet": partial(
        _hf, "FNetConfig", "FNetModel", _text(), **_without(_TEXT, "num_attention_heads")
    ),
    "xlnet": partial(
        _hf, "XLNetConfig", "XLNetModel", _text(), vocab_size=64, d_model=32, n_layer=2, n_head=4,
        d_inner=48,
    ),
    "gpt2": partial(
        _hf, "GPT2Config", "GPT2LMHeadModel", _text(), vocab_size=64, n_embd=32, n_layer=2,
        n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2,
    ),
    "gptj": partial(
        _hf, "GPTJConfig", "GPTJModel", _text(), vocab_size=64, n_embd=32, n_layer=2, n_head=4,
        n_positions=64, rotary_dim=8,
    ),
    "gpt_neo": partial(
        _hf, "GPTNeoConfig", "GPTNeoModel", _text(), vocab_size=64, hidden_size=32, num_layers=2,
        num_heads=4, attention_types=[[["global", "local"], 1]], max_position_embeddings=64,
    ),
    "gpt_neox": partial(_hf, "GPTNeoXConfig", "GPTNeoXModel", _text(), **_TEXT),
    "opt": partial(
        _hf, "OPTConfig", "OPTModel", _text(), **_without(_TEXT, "intermediate_size"), ffn_dim=48,
        word_embed_proj_dim=16,
    ),
    "bloom": partial(
        _hf, "BloomConfig", "BloomModel", _text(), vocab_size=64, hidden_size=32, n_layer=2,
        n_head=4,
    ),
    "falcon": partial(
        _hf, "FalconConfig", "FalconModel", _text(), vocab_size=64, hidden_size=32,
        num_hidden_layers=2, num_attention_heads=4,
    ),
    "mpt": partial(
        _hf, "MptConfig", "MptModel", _text(), vocab_size=64, d_model=32, n_layers=2, n_heads=4
    ),
    **{
        name.lower(): partial(_hf, f"{name}Config", f"{name}Model", _text(), **_KV, **more)
        for name, more in {
            "Llama": {},
            "Mistral": {"sliding_window": 8},
            "Qwen2": {},
            "Qwen3": {"head_dim": 8},
            "Gemma": {"head_dim": 8},
            "Gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
            "Phi": {},
            "Phi3": {"pad_token_id": 0},
            "StableLm": {},
            "Olmo2": {},
            "Cohere": {},
        }.items()
    },
    "mixtral": partial(
        _hf, "MixtralConfig", "MixtralForCausalLM", _text(), **_KV, **_MOE, num_local_experts=4
    ),
    "qwen2_moe": partial(
        _hf, "Qwen2MoeConfig", "Qwen2MoeModel", _text(), **_KV, **_MOE, num_experts=4,
        moe_intermediate_size=24, shared_expert_intermediate_size=24,
    ),
    "mamba": partial(
        _hf, "MambaConfig", "MambaModel", _text(), vocab_size=64, hidden_size=16,
        num_hidden_layers=2, state_size=4, use_mambapy=False,
    ),
    "rwkv": partial(
        _hf, "RwkvConfig", "RwkvModel", _text(6), vocab_size=64, hidden_size=32,
        num_hidden_layers=2, context_length=64,
    ),
    "t5": partial(
        _hf, "T5Config", "T5Model", _seq2seq(), vocab_size=64, d_model=32, d_kv=8, d_ff=48,
        num_layers=2, num_heads=4,
    ),
    "flan_t5_gated": partial(
        _hf, "T5Config", "T5ForConditionalGeneration", _seq2seq(), vocab_size=64, d_model=32,
        d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
    ),
    "switch_transformers": partial(
        _hf, "SwitchTransformersConfig", "SwitchTransformersModel", _seq2seq(), vocab_size=64,
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, num_experts=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
    ),
    "bart": _bart("Bart"),
    "pegasus": _bart("Pegasus"),
    "whisper": _whisper,
    "wav2vec2": partial(_speech, "Wav2Vec2"),
    "hubert": partial(_speech, "Hubert"),
    **{
        name.lower(): partial(_hf, f"{name}Config", f"{name}Model", _pixels(), **_VISION)
        for name in ("ViT", "DeiT", "Dinov2", "ViTMAE")
    },
    "beit": partial(_hf, "BeitConfig", "BeitModel", _pixels(), **_VISION),
    "yolos": partial(
        _hf, "YolosConfig", "YolosModel", _pixels(),
        **_without(_VISION, "image_size", image_size=[32, 32]), num_detection_tokens=4,
    ),
    "swin": _swin("Swin"),
    "swinv2": _swin("Swinv2"),
    "convnext": partial(_hf, "ConvNextConfig", "ConvNextModel", _pixels(), **_STAGES),
    "convnextv2": partial(_hf, "ConvNextV2Config", "ConvNextV2Model", _pixels(), **_STAGES),
    "hf_resnet": partial(
        _hf, "ResNetConfig", "ResNetForImageClassification", _pixels(), embedding_size=8,
        **_STAGES, layer_type="bottleneck",
    ),
    "hf_regnet": partial(
        _hf, "RegNetConfig", "RegNetModel", _pixels(), embedding_size=8, **_STAGES, groups_width=8
    ),
    "levit": partial(
        _hf, "LevitConfig", "LevitForImageClassification", _pixels(64), image_size=64,
        hidden_sizes=[32, 48, 64], depths=[1, 1, 1], num_attention_heads=[2, 3, 4],
        key_dim=[8, 8, 8],
        down_ops=[["Subsample", 8, 4, 4, 2, 2], ["Subsample", 8, 6, 4, 2, 2]],
    ),
    "pvt": partial(
        _hf, "PvtConfig", "PvtModel", _pixels(64), image_size=64, depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 3, 4],
    ),
    "pvt_v2": partial(
        _hf, "PvtV2Config", "PvtV2Model", _pixels(64), image_size=64, depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 3, 4],
    ),
    "segformer": partial(
        _hf, "SegformerConfig", "SegformerForSemanticSegmentation", _pixels(64),
        depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 3, 4],
        decoder_hidden_size=16,
    ),
    "mobilevit": partial(
        _hf, "MobileViTConfig", "MobileViTModel", _pixels(64), image_size=64,
        hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 16, 24, 32],
        num_attention_heads=4,
    ),
    "mobilevitv2": partial(
        _hf, "MobileViTV2Config", "MobileViTV2Model", _pixels(64), image_size=64,
        width_multiplier=0.25,
    ),
    "focalnet": partial(
        _hf, "FocalNetConfig", "FocalNetModel", _pixels(), image_size=32, embed_dim=8,
        depths=[1, 1], hidden_sizes=[8, 16], focal_levels=[2, 2], focal_windows=[3, 3],
    ),
    "poolformer": partial(
        _hf, "PoolFormerConfig", "PoolFormerModel", _pixels(64), depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 24, 32],
    ),
    "hf_mobilenet_v2": partial(
        _hf, "MobileNetV2Config", "MobileNetV2Model", _pixels(64), depth_multiplier=0.35
    ),
    "swiftformer": partial(
        _hf, "SwiftFormerConfig", "SwiftFormerModel", _pixels(64), image_size=64,
        depths=[1, 1, 1, 1], embed_dims=[8, 16, 24, 32],
    ),
    "detr": _detr,
    "clip": partial(_two_towers, "CLIPConfig", "CLIPModel"),
    "siglip": partial(_two_towers, "SiglipConfig", "SiglipModel"),
    "sam": _sam,
    **{
        name.lower(): partial(_hf, f"{name}Config", f"{name}Model", _text(), **_KV, **more)
        for name, more in {
            "Apertus": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
            "GptOss": {"head_dim": 8, "num_local_experts": 4, **_MOE},
            "Olmoe": {"num_experts": 4, **_MOE},
            "NanoChat": {},
            "BitNet": {},
        }.items()
    },
    "wav2vec2_bert": partial(
        _hf, "Wav2Vec2BertConfig", "Wav2Vec2BertModel",
        lambda: {"input_features": torch.randn(2, 12, 16)},
        **_without(_TEXT, "vocab_size", "max_position_embeddings"), feature_projection_input_dim=16,
        conv_depthwise_kernel_size=5, mask_time_prob=0.0,
    ),
    "canine": partial(_hf, "CanineConfig", "CanineModel", _text(), **_without(_TEXT, "vocab_size")),
    "funnel": partial(
        _hf, "FunnelConfig", "FunnelModel", _text(), vocab_size=64, block_sizes=[1, 1],
        num_decoder_layers=1, d_model=32, n_head=4, d_head=8, d_inner=48,
    ),
    "vilt": partial(
        _hf, "ViltConfig", "ViltModel",
        lambda: {"input_ids": _ids(2, 8), "pixel_values": torch.randn(2, 3, 32, 32)},
        **{**_TEXT, **_VISION},
    ),
}  # fmt: skip


# -- our own ------------------------------------------------------------------------------------


class _ResBlock(nn.Module):
    """The residual block of diffusion U-Nets: functional silu, GroupNorm, a time embedding."""

    def __init__(self, inside: int, outside: int, time: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(4, inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.time = nn.Linear(time, outside)
        self.norm2 = nn.GroupNorm(4, outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        self.skip = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(t))[:, :, None, None]
        h = self.conv2(F.dropout(F.silu(self.norm2(h)), 0.1, self.training))
        return h + self.skip(x)


class DiffusionUNet(nn.Module):
    """A small DDPM-style U-Net: time embedding, skips by `cat`, attention in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.time1, self.time2 = nn.Linear(16, 32), nn.Linear(32, 32)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.ModuleList([_ResBlock(8, 8, 32), _ResBlock(8, 16, 32)])
        self.middle = _ResBlock(16, 16, 32)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up = nn.ModuleList([_ResBlock(32, 8, 32), _ResBlock(16, 8, 32)])
        self.norm = nn.GroupNorm(4, 8)
        self.out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-torch.arange(8, dtype=x.dtype))
        t = self.time2(F.silu(self.time1(torch.cat([angles.sin(), angles.cos()], 1))))
        h, skips = self.stem(x), []
        for block in self.down:
            h = block(h, t)
            skips.append(h)
            h = F.avg_pool2d(h, 2)
        h = self.middle(h, t)
        tokens = h.flatten(2).transpose(1, 2)
        h = h + self.attention(tokens, tokens, tokens)[0].transpose(1, 2).reshape(h.shape)
        for block in self.up:
            h = F.interpolate(h, scale_factor=2.0)
            h = block(torch.cat([h, skips.pop()], 1), t)
        return self.out(F.silu(self.norm(h)))


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **more: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.rnn = kind(8, 12, num_layers=2, batch_first=True, bidirectional=True, **more)
        self.head = nn.Sequential(nn.Linear(24, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(ids))[0][:, -1])


class _CellLoop(nn.Module):
    """A GRU cell written out, unrolled over time: one layer called at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.candidate = nn.Linear(20, 24), nn.Linear(20, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 12)
        for step in x.unbind(1):
            r, u = torch.sigmoid(self.gates(torch.cat([step, h], 1))).chunk(2, 1)
            n = torch.tanh(self.candidate(torch.cat([step, r * h], 1)))
            h = (1 - u) * n + u * h
        return self.head(h)


class Swish(nn.Module):
    """A hand-written activation: one site, named by its class."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class HandHardSwish(nn.Module):
    """MobileNetV3's, as most repositories write it, over an in-place child."""

    def __init__(self) -> None:
        super().__init__()
        self.relu6 = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.relu6(x + 3.0) / 6.0


class ErfGELU(nn.Module):
    """A GELU without any activation function of torch in it."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.erf(x / 2**0.5))


class ChannelPReLU(nn.Module):
    """Per-channel weights and no call of `prelu`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.full((channels,), 0.2))

    def forward(self, x: Tensor) -> Tensor:
        slope = self.slope.view(1, -1, *[1] * (x.dim() - 2))
        return x.clamp(min=0) + slope * x.clamp(max=0)


class HandWritten(nn.Module):
    """Hand-written activations between convolutions, one of them shared."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.conv3, self.conv4 = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.swish, self.hswish, self.gelu = Swish(), HandHardSwish(), ErfGELU()
        self.prelu = ChannelPReLU(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.swish(self.conv1(x))
        x = self.hswish(self.conv2(x))
        x = self.gelu(self.conv3(x))
        x = self.prelu(self.swish(self.conv4(x)))
        return self.head(x.mean((2, 3)))


class OddRoads(nn.Module):
    """In-place sums, a shared in-place ReLU, views, methods, slices: many traps at once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.conv3, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv1(x)))
        y = self.conv2(x)
        y += x
        y = self.relu(y)
        z = self.conv3(y)
        z = torch.cat([z[:, :4].tanh(), z[:, 4:].sigmoid_()], 1)
        z = F.leaky_relu(z + y, 0.1)
        v = z.mean((2, 3)).add_(1.0)
        return self.fc2(F.gelu(self.fc1(v)).relu_())


class _Gated(nn.Module):
    """WaveNet's gate (one convolution, two nonlinearities), GLU, and SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 16, 3, padding=1)
        self.mix = nn.Conv1d(8, 16, 1)
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, 1)
        x = F.glu(self.mix(torch.tanh(a) * torch.sigmoid(b)), 1).mean(2)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class _EarlyExit(nn.Module):
    """Leaves early, loops, and branches as its data say."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.exit = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for n, layer in enumerate(self.layers):
            x = F.relu(layer(x)) if x.sum() > n else torch.tanh(layer(x))
            if x.mean() > 0.25:
                break
        return self.exit(x)


class _EveryNonlinearity(nn.Module):
    """Each activation module of torch once, each behind its own linear layer."""

    def __init__(self) -> None:
        super().__init__()
        kinds: list[nn.Module] = [
            nn.CELU(), nn.ELU(inplace=True), nn.GELU(), nn.GELU("tanh"), nn.Hardshrink(),
            nn.Hardsigmoid(), nn.Hardswish(inplace=True), nn.Hardtanh(-0.5, 0.5),
            nn.LeakyReLU(0.1, inplace=True), nn.LogSigmoid(), nn.Mish(), nn.PReLU(), nn.PReLU(8),
            nn.RReLU(), nn.RReLU(inplace=True), nn.ReLU(), nn.ReLU6(inplace=True), nn.SELU(),
            nn.SiLU(inplace=True), nn.Sigmoid(), nn.Softplus(), nn.Softshrink(0.1), nn.Softsign(),
            nn.Tanh(), nn.Tanhshrink(), nn.Threshold(0.1, 0.0),
        ]  # fmt: skip
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in kinds])
        self.sigmas = nn.ModuleList(kinds)
        self.glu = nn.Sequential(nn.Linear(8, 8), nn.GLU())

    def forward(self, x: Tensor) -> Tensor:
        total = self.glu(x).sum() * 0
        for layer, sigma in zip(self.layers, self.sigmas, strict=True):
            x = layer(x)
            x = sigma(x) + 0.5
            total = total + x.square().mean()
        return total


def _encoder(norm_first: bool, activation: str) -> Built:
    layer = nn.TransformerEncoderLayer(
        16, 2, 32, batch_first=True, norm_first=norm_first, activation=activation
    )
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return model, (torch.randn(2, 6, 16),), {}


_OWN: dict[str, Callable[[], Built]] = {
    "diffusion_unet": lambda: (
        DiffusionUNet(), (torch.randn(2, 3, 16, 16), torch.tensor([1.0, 7.0])), {},
    ),
    "lstm_classifier": lambda: (_Recurrent(nn.LSTM, dropout=0.1), (_ids(2, 6, vocab=32),), {}),
    "gru_classifier": lambda: (_Recurrent(nn.GRU), (_ids(2, 6, vocab=32),), {}),
    "rnn_classifier": lambda: (_Recurrent(nn.RNN), (_ids(2, 6, vocab=32),), {}),
    "gru_cell_loop": lambda: (_CellLoop(), (torch.randn(2, 5, 8),), {}),
    "transformer_encoder": lambda: _encoder(False, "relu"),
    "transformer_encoder_prenorm": lambda: _encoder(True, "gelu"),
    "transformer": lambda: (
        nn.Transformer(16, 2, 1, 1, 32, batch_first=True),
        (torch.randn(2, 6, 16), torch.randn(2, 4, 16)),
        {},
    ),
    "hand_written": lambda: (HandWritten(), (torch.randn(2, 3, 16, 16),), {}),
    "odd_roads": lambda: (OddRoads(), (torch.randn(2, 3, 8, 8),), {}),
    "gated": lambda: (_Gated(), (torch.randn(2, 4, 9),), {}),
    "early_exit": lambda: (_EarlyExit(), (torch.randn(2, 8),), {}),
    "every_nonlinearity": lambda: (_EveryNonlinearity(), (torch.randn(3, 8),), {}),
    "autoencoder": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(True), nn.Conv2d(8, 8, 3, 2, 1),
            nn.LeakyReLU(0.2, inplace=True), nn.ConvTranspose2d(8, 8, 4, 2, 1),
            nn.ELU(inplace=True), nn.ConvTranspose2d(8, 1, 4, 2, 1), nn.Sigmoid(),
        ),
        (torch.randn(2, 1, 16, 16),),
        {},
    ),
}  # fmt: skip


def available(module: str) -> bool:
    """Whether an optional extra of the tests is installed."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


ZOO: list[Entry] = [Entry(name, build) for name, build in (_OWN | RESEARCH).items()]
if available("pytorchcv"):
    ZOO += [Entry(name, partial(_cv, name)) for name in _CV_64]
    ZOO += [Entry(name, partial(_cv, name, 96)) for name in _CV_96]
    ZOO += [Entry(name, partial(_cv, name, 224)) for name in _CV_224]
    ZOO += [Entry(name, partial(_cv, name, 32)) for name in _CV_32]
    ZOO += [Entry(name, partial(_cv, name, 32, classes=False)) for name in _CV_RANDOM_DEPTH]
    ZOO += [
        Entry("alexnet", partial(_fully_connected, "alexnet", 256)),
        Entry("bn_vgg11b", partial(_fully_connected, "bn_vgg11b", 2048)),
    ]
    ZOO += [Entry(name, partial(_segmentation, name)) for name in _CV_DENSE]
if available("transformers"):
    ZOO += [Entry(f"hf_{name.removeprefix('hf_')}", build) for name, build in _HF.items()]
