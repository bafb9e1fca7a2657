"""fuse at the end of residual blocks of models that others wrote: their tails are found, and compute the same."""

import copy

import pytest
import torch

from braze.kernels import fuse, use_backend


@pytest.fixture(autouse=True)
def eager():
    with use_backend("eager"):
        yield


def joints(report):
    return [record.now for record in report]


MODELS = {
    "timm:vit_tiny_patch16_224": ({"img_size": 32, "init_values": 0.1, "drop_path_rate": 0.1}, "scale_add", 24),
    "timm:convnext_atto": ({}, "scale_add", 12),
    "timm:swin_tiny_patch4_window7_224": ({"img_size": 56, "drop_path_rate": 0.2}, "scale_add", 22),
    "torchvision:efficientnet_b0": ({}, "scale_add", 9),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_images(name):
    library, _, model = name.partition(":")
    package, (options, operator, count) = pytest.importorskip(library), MODELS[name]
    torch.manual_seed(0)
    make = package.create_model if library == "timm" else package.models.get_model
    model = make(model, num_classes=3, **options)
    plain, x = copy.deepcopy(model).double().eval(), torch.randn(2, 3, 56, 56, dtype=torch.float64)
    x = x[..., :32, :32] if "vit" in name else x
    assert joints(fuse(model)).count(operator) == count
    torch.testing.assert_close(model.double().eval()(x), plain(x))


@pytest.mark.parametrize(
    ("config", "options", "operator", "count"),
    [
        ("BertConfig", {}, "add_layer_norm", 5),
        ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "dropout_add", 4),
        ("Dinov2Config", {"image_size": 28, "drop_path_rate": 0.1}, "scale_add", 4),
    ],
)
def test_models_of_transformers(config, options, operator, count):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(getattr(transformers, config)(**sizes, **options))
    plain = copy.deepcopy(model).double().eval()
    assert joints(fuse(model)).count(operator) == count
    x = torch.randn(2, 3, 28, 28, dtype=torch.float64) if config == "Dinov2Config" else torch.arange(12).view(2, 6)
    got, expected = (m(x).last_hidden_state for m in (model.double().eval(), plain))
    torch.testing.assert_close(got, expected)
