"""φ beside torchvision's extractor and timm's features: the same bits, where those are right."""

from __future__ import annotations

import copy
import importlib.util
import sys
from typing import Any

import pytest
import torch

from benchmarks import extractor, torchvision_operators
from fmapkit import feature_map
from tests.truth import assert_same_gradients


def _imported(name: str) -> Any:
    if importlib.util.find_spec("torchvision") is not None:
        torchvision_operators.declare()  # where its compiled library does not load
    return pytest.importorskip(name)


MODELS = {
    "resnet18": ["relu", "layer1", "layer3", "layer4", "avgpool"],
    "mobilenet_v3_small": ["features.0", "features.3", "features.8"],
    "densenet121": ["features.denseblock1", "features.transition2", "features.norm5"],
    "googlenet": ["inception3a", "inception4e"],
    "convnext_tiny": ["features.1", "features.4"],
    "swin_t": ["features.1", "features.3"],
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_as_torchvisions_extractor_gradients_too(name: str, train: bool) -> None:
    models = _imported("torchvision.models")
    from torchvision.models.feature_extraction import create_feature_extractor

    torch.manual_seed(0)
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = getattr(models, name)(weights=None, **options).train(train)
    twin = copy.deepcopy(model)
    layers = MODELS[name]
    phi = feature_map(model, dict(zip(layers, layers, strict=True)), kind="output")
    extractor = create_feature_extractor(twin, layers)
    x = torch.randn(2, 3, 64, 64)
    for step in range(2):
        torch.manual_seed(step)
        ours = phi(x)
        torch.manual_seed(step)
        theirs = extractor(x)
        assert list(ours) == list(theirs) == layers
        assert all(torch.equal(ours[layer], theirs[layer]) for layer in layers)
    if name in ("resnet18", "mobilenet_v3_small"):
        for found in (ours, theirs):
            sum(f.square().mean() for f in found.values()).backward()
        assert_same_gradients(model, twin)


def test_where_torchvisions_is_overwritten_phi_is_not() -> None:
    models = _imported("torchvision.models")
    from torchvision.models.feature_extraction import create_feature_extractor

    model, x = models.resnet18(weights=None).eval(), torch.randn(2, 3, 64, 64)
    right = model.bn1(model.conv1(x))
    wrong = create_feature_extractor(model, ["bn1", "layer1"])(x)["bn1"]  # by the in-place ReLU
    assert torch.equal(wrong, right.relu())
    phi = feature_map(model, ["bn1", "layer1"])
    for _ in range(3):
        assert torch.equal(phi(x)[0], right)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto"])
def test_the_same_bits_as_timms_features(name: str) -> None:
    timm = _imported("timm")
    torch.manual_seed(0)
    extractor = timm.create_model(name, features_only=True, pretrained=False).eval()
    model = timm.create_model(name, pretrained=False).eval()
    state = {
        k.replace("stages_", "stages.").replace("stem_", "stem."): v
        for k, v in extractor.state_dict().items()
    }
    known = model.state_dict()
    model.load_state_dict({k: v for k, v in state.items() if k in known}, strict=False)
    layers = [n.replace("stages_", "stages.") for n in extractor.feature_info.module_name()]
    phi = feature_map(model, layers, call=0)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for _ in range(3):
            for ours, theirs in zip(phi(x), extractor(x), strict=True):
                assert torch.equal(ours, theirs)


def test_a_vision_transformers_token_and_intermediates() -> None:
    timm = _imported("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=64).eval()
    x = torch.randn(2, 3, 64, 64)
    token = feature_map(model, "norm", pool="token")
    block = feature_map(model, "blocks.3", pool=lambda t: t[:, 1:])
    with torch.no_grad():
        theirs = model.forward_intermediates(
            x, indices=[3], intermediates_only=True, output_fmt="NLC", norm=False
        )
        for _ in range(3):
            assert torch.equal(token(x), model.forward_features(x)[:, 0])
            assert torch.equal(block(x), theirs[0])


def test_the_benchmark_runs_and_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    case = extractor.Case("resnet18", "layer1", (1, 3, 32, 32))
    assert case.name == "resnet18, layer1, 1×3×32×32"
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(SystemExit, match="torchvision is needed here"):
        extractor.measure(case, 0.0)
    monkeypatch.undo()
    _imported("torchvision.models")
    assert extractor.measure(case, 0.0).pairs >= 5
