"""Real models, as their packages build them, with random weights: nothing is downloaded.

Images are 1x3x64x64, or as small as the model takes them; texts are 32 tokens. What is large for
no other reason than its number of layers has four of width 256: small enough for a CPU, and the
Python code that runs is that of the large one. Where a package is not there, the models of it are
named as such in the table.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import GPT, BranchingGPT, BranchingResNet, ResNet

__all__ = ["BRANCHING", "COMPUTE", "MODELS", "PACKAGES", "RealModel", "images", "tokens"]

PACKAGES = ("timm", "torchvision", "pytorchcv", "transformers")

Inputs = Callable[[int], tuple[Tensor, ...]]  # of a batch


@dataclass(frozen=True)
class RealModel:
    """A model by its parts; nothing is imported or built yet.

    Attributes:
        name: of its package, and within it.
        build: makes the model.
        inputs: makes what goes in, of a batch.
        package: that has to be there; "" for none.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    package: str = ""


def images(size: int = 64) -> Inputs:
    """Square images with three channels."""
    return lambda batch: (torch.randn(batch, 3, size, size),)


def tokens(count: int = 32) -> Inputs:
    """Texts of so many tokens."""
    return lambda batch: (torch.randint(1024, (batch, count)),)


# -- timm, torchvision, pytorchcv -----------------------------------------------------------------


def _of_timm(name: str, **options: Any) -> nn.Module:
    timm: Any = importlib.import_module("timm")
    model: nn.Module = timm.create_model(name, pretrained=False, **options)
    return model


def _of_torchvision(name: str, **options: Any) -> nn.Module:
    models: Any = importlib.import_module("torchvision.models")
    model: nn.Module = models.get_model(name, weights=None, **options)
    return model


def _vision_transformer() -> nn.Module:
    models: Any = importlib.import_module("torchvision.models")
    model: nn.Module = models.VisionTransformer(64, 16, 4, 4, 256, 1024)
    return model


def _of_pytorchcv(name: str) -> nn.Module:
    provider: Any = importlib.import_module("pytorchcv.model_provider")
    model: nn.Module = provider.get_model(name, pretrained=False)
    for module in list(model.modules()):
        for child, pool in list(module.named_children()):
            # The last pooling has the window of 224 pixels.
            if isinstance(pool, nn.AvgPool2d) and pool.kernel_size == 7:
                module.add_module(child, nn.AdaptiveAvgPool2d(1))
    return model


def _timm(name: str, size: int = 64, **options: Any) -> RealModel:
    return RealModel(f"timm/{name}", partial(_of_timm, name, **options), images(size), "timm")


def _torchvision(name: str, size: int = 64, **options: Any) -> RealModel:
    build = partial(_of_torchvision, name, **options)
    return RealModel(f"torchvision/{name}", build, images(size), "torchvision")


def _pytorchcv(name: str) -> RealModel:
    return RealModel(f"pytorchcv/{name}", partial(_of_pytorchcv, name), images(), "pytorchcv")


# -- transformers ---------------------------------------------------------------------------------

_SIZES = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}
_DECODER = _SIZES | {"num_key_value_heads": 4, "max_position_embeddings": 64, "use_cache": False}
_PATCHES = {key: value for key, value in _SIZES.items() if key != "vocab_size"}
_PATCHES |= {"image_size": 64, "patch_size": 16}


def _of_transformers(model: str, config: str, **sizes: Any) -> nn.Module:
    library: Any = importlib.import_module("transformers")
    built: nn.Module = getattr(library, model)(getattr(library, config)(**sizes))
    return built


def _whisper_encoder() -> nn.Module:
    library: Any = importlib.import_module("transformers")
    config = library.WhisperConfig(
        d_model=256, encoder_layers=4, encoder_attention_heads=4, encoder_ffn_dim=1024,
        decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=1024, vocab_size=1024,
        num_mel_bins=80, max_source_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    encoder: nn.Module = library.WhisperModel(config).encoder
    return encoder


def _to_and_from(batch: int) -> tuple[Tensor, ...]:
    """A text, which of its tokens count, and the text to write."""
    text, written = (torch.randint(1024, (batch, 32)) for _ in range(2))
    return text, torch.ones_like(text), written


def _transformers(model: str, inputs: Inputs, **sizes: Any) -> RealModel:
    name = model.removesuffix("Model")
    build = partial(_of_transformers, model, f"{name}Config", **sizes)
    return RealModel(f"transformers/{name}", build, inputs, "transformers")


MODELS = [
    _timm("mobilenetv3_small_100"),
    _timm("regnetx_002"),
    _timm("efficientnet_b0"),
    _timm("resnet18"),
    _timm("resnet50"),
    _timm("vit_tiny_patch16_224", img_size=64),
    _timm("swin_tiny_patch4_window7_224", img_size=64),
    _timm("convnext_atto"),
    _timm("convnext_pico"),
    _timm("densenet121"),
    _timm("mixer_s32_224", img_size=64),
    _timm("levit_128s", size=224),
    _timm("ghostnet_100"),
    _timm("mobilevit_xxs"),
    _timm("repvgg_a0"),
    _torchvision("resnet18"),
    _torchvision("mobilenet_v2"),
    _torchvision("mobilenet_v3_small"),
    _torchvision("efficientnet_b0"),
    _torchvision("densenet121"),
    _torchvision("vgg11"),
    _torchvision("alexnet"),
    _torchvision("googlenet", init_weights=False),
    _torchvision("inception_v3", size=96, init_weights=False),
    _torchvision("shufflenet_v2_x0_5"),
    _torchvision("squeezenet1_1"),
    _torchvision("swin_t"),
    RealModel("torchvision/VisionTransformer", _vision_transformer, images(), "torchvision"),
    _pytorchcv("preresnet18"),
    _pytorchcv("mobilenetv2_w1"),
    _pytorchcv("shufflenet_g1_w1"),
    _pytorchcv("peleenet"),
    _transformers("BertModel", tokens(), **_SIZES),
    _transformers("RobertaModel", tokens(), **_SIZES),
    _transformers(
        "DistilBertModel", tokens(), vocab_size=1024, dim=256, hidden_dim=1024, n_layers=4,
        n_heads=4,
    ),
    _transformers(
        "GPT2Model", tokens(), vocab_size=1024, n_embd=256, n_layer=4, n_head=4, n_positions=64,
        use_cache=False, bos_token_id=1, eos_token_id=2,
    ),
    _transformers("LlamaModel", tokens(), **_DECODER),
    _transformers("MistralModel", tokens(), **_DECODER),
    _transformers("Qwen2Model", tokens(), **_DECODER),
    _transformers(
        "T5Model", _to_and_from, vocab_size=1024, d_model=256, d_kv=64, d_ff=1024, num_layers=4,
        num_heads=4, use_cache=False,
    ),
    _transformers("ViTModel", images(), **_PATCHES),
    _transformers("CLIPVisionModel", images(), **_PATCHES),
    _transformers(
        "ResNetModel", images(), embedding_size=32, hidden_sizes=[64, 128, 192, 256],
        depths=[2, 2, 2, 2],
    ),
    _transformers("ConvNextModel", images(), hidden_sizes=[64, 128, 192, 256], depths=[1, 1, 1, 1]),
    _transformers(
        "Wav2Vec2Model", lambda batch: (torch.randn(batch, 3200),), **_PATCHES, vocab_size=32,
        conv_dim=[128] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        apply_spec_augment=False, layerdrop=0.0,
    ),
    RealModel(
        "transformers/WhisperEncoder", _whisper_encoder,
        lambda batch: (torch.randn(batch, 80, 64),), "transformers",
    ),
]  # fmt: skip

# Where the kernels take the time: images of 160 pixels, for batches of eight.
COMPUTE = [
    _torchvision("resnet18", size=160),
    _torchvision("densenet121", size=160),
    _timm("efficientnet_b0", size=160),
    _timm("convnext_atto", size=160),
    _torchvision("vit_b_16", size=160, image_size=160),
]

# No package has them: each block branches on its data, beside the same without the branches.
BRANCHING = [
    RealModel("GPT", GPT, tokens()),
    RealModel("GPT, branches on data", BranchingGPT, tokens()),
    RealModel("ResNet-18", ResNet, images()),
    RealModel("ResNet-18, branches on data", BranchingResNet, images()),
]
