"""The included networks: shapes, published sizes, causality, order of patches, one module at two places."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_experiments import gpt, mlp, resnet, tnt, vit
from torch import Tensor, nn

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments import (
    ACTIVATIONS,
    GPT,
    MLP,
    ResNet,
    TransformerInTransformer,
    VisionTransformer,
    make_activation,
)
from eafo_dynamic.experiments.blocks import SelfAttention
from eafo_dynamic.experiments.images.resnet import BasicBlock

IMAGE_MODELS = {"vit": vit, "tnt": tnt, "resnet": resnet, "mlp": mlp}


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def assert_every_parameter_learns(model: nn.Module, output: Tensor) -> None:
    (output * torch.randn_like(output)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("model", IMAGE_MODELS)
def test_image_models_learn_with_every_activation(model: str, name: str) -> None:
    torch.manual_seed(0)
    network = IMAGE_MODELS[model](name)
    output = network(torch.randn(4, 1, 8, 8))
    assert output.shape == (4, 10)
    assert any(type(module) is ACTIVATIONS[name] for module in network.modules())
    assert_every_parameter_learns(network, output)


@pytest.mark.parametrize("name", ["gelu", "relu", "silu"])
def test_gpt_learns(name: str) -> None:
    torch.manual_seed(0)
    network = gpt(name)
    output = network(torch.randint(256, (3, 16)))
    assert output.shape == (3, 16, 256)
    assert_every_parameter_learns(network, output)


def test_unknown_activation_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"activation='rleu'.*gelu.*relu.*silu"):
        MLP(4, 2, activation="rleu")


def test_in_place_only_where_torch_has_it() -> None:
    assert make_activation("relu", inplace=True).inplace is True
    assert make_activation("relu").inplace is False
    assert isinstance(make_activation("gelu", inplace=True), nn.GELU)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_torch_multihead_attention(causal: bool) -> None:
    torch.manual_seed(0)
    ours = SelfAttention(12, 3, causal=causal).double()
    theirs = nn.MultiheadAttention(12, 3, batch_first=True).double()
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.proj.weight,
            "out_proj.bias": ours.proj.bias,
        }
    )
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64) if causal else None
    expected, _ = theirs(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(ours(x), expected)


@pytest.mark.parametrize(
    ("build", "published"),
    [
        # ViT-Tiny/16 and DeiT-Tiny/16 at 224 pixels, GPT-2 small, ResNet-20 with projection shortcuts.
        (lambda: VisionTransformer(224, 16, num_classes=1000), 5_717_416),
        (lambda: VisionTransformer(224, 16, num_classes=1000, pool="distilled"), 5_910_800),
        (lambda: GPT(50257, block_size=1024, dim=768, depth=12, heads=12), 124_439_808),
        (lambda: ResNet(), 272_474),
    ],
)
def test_sizes_are_the_published_ones(build: Any, published: int) -> None:
    with torch.device("meta"):
        assert parameter_count(build()) == published


def test_tnt_has_about_the_published_size() -> None:
    with torch.device("meta"):
        network = TransformerInTransformer(224, 16, 4, dim=384, word_dim=24, heads=6, word_heads=4, num_classes=1000)
    assert parameter_count(network) == pytest.approx(23.8e6, rel=0.002)  # biases and the first convolution differ


def permute_patches(images: Tensor, order: Tensor, size: int) -> Tensor:
    patches = F.unfold(images, size, stride=size)
    return F.fold(patches[..., order], images.shape[-2:], size, stride=size)


@pytest.mark.parametrize("pool", ["cls", "mean", "distilled"])
def test_vit_knows_the_order_of_patches_by_positions_only(pool: str) -> None:
    torch.manual_seed(0)
    network = vit(pool=pool).double()
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    shuffled = permute_patches(images, torch.randperm(16), 2)
    assert not torch.allclose(network(images), network(shuffled))
    nn.init.zeros_(network.position_embedding)
    torch.testing.assert_close(network(images), network(shuffled))


def test_distilled_vit_answers_with_the_mean_of_two_heads() -> None:
    torch.manual_seed(0)
    network, seen = vit(pool="distilled"), []
    for head in (network.head, network.distilled_head):
        head.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    logits = network(torch.randn(2, 1, 8, 8))
    (one, first), (other, second) = seen
    assert not torch.equal(one, other)  # each reads a token of its own
    torch.testing.assert_close(logits, (first + second) / 2)
    assert_every_parameter_learns(network, logits)


def test_tnt_reads_every_word_of_its_own_patch() -> None:
    torch.manual_seed(0)
    network = tnt().double()
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    expected = F.unfold(images, 4, stride=4).mT.unflatten(-1, (4, 4))  # [batch, patches, 4, 4]
    nn.init.dirac_(network.word_embedding.weight)
    nn.init.zeros_(network.word_embedding.bias)
    with torch.no_grad():
        network.word_position.zero_()
        network.word_embedding.weight.zero_()
        network.word_embedding.weight[0] = 1.0  # the first feature of a word: the sum of its pixels
    words = network._words(images)[..., 0].unflatten(-1, (2, 2))
    torch.testing.assert_close(words, expected.unflatten(-1, (2, 2)).unflatten(-3, (2, 2)).sum((-3, -1)))


def test_tnt_options_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="patch_size=3: does not divide image_size=8"):
        tnt(patch_size=3)
    with pytest.raises(ConfigError, match="word_size=3: does not divide patch_size=4"):
        tnt(word_size=3)
    with pytest.raises(ConfigError, match="heads=5: does not divide dim=8"):
        tnt(word_heads=5)


def test_vit_options_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="patch_size=3: does not divide image_size=8"):
        vit(patch_size=3)
    with pytest.raises(ConfigError, match="heads=3: does not divide dim=16"):
        vit(heads=3)
    with pytest.raises(ConfigError, match="pool='max'"):
        vit(pool="max")


def test_resnet_block_calls_one_in_place_relu_twice() -> None:
    network = resnet()
    blocks = [module for module in network.modules() if isinstance(module, BasicBlock)]
    calls: Counter[nn.Module] = Counter()
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            assert module.inplace
            module.register_forward_hook(lambda module, inputs, output: calls.update([module]))
    network(torch.randn(2, 1, 8, 8))
    assert len(blocks) == 3
    assert [calls[block.activation] for block in blocks] == [2, 2, 2]
    assert len(calls) == 4  # and the stem's


def test_resnet_stages_halve_the_image_and_double_the_channels() -> None:
    network = ResNet(in_channels=1, width=4, depths=[1, 2, 1])
    features = network.blocks(network.stem(torch.randn(2, 1, 8, 8)))
    assert features.shape == (2, 16, 2, 2)
    strides = [block.conv1.stride[0] for block in network.blocks]
    assert strides == [1, 2, 1, 2]


def test_mlp_has_no_normalisation_unless_asked_for() -> None:
    plain = [type(layer) for layer in MLP(4, 2, hidden=[8])]
    assert plain == [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]
    full = [type(layer) for layer in MLP(4, 2, hidden=[8], dropout=0.1, normalisation="batch")]
    assert full == [nn.Flatten, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout, nn.Linear]
    with pytest.raises(ConfigError, match="normalisation='group'"):
        MLP(4, 2, normalisation="group")


@pytest.mark.parametrize("place", [1, 7, 15])
def test_gpt_is_causal(place: int) -> None:
    torch.manual_seed(0)
    network = gpt()
    tokens = torch.randint(256, (2, 16))
    changed = tokens.clone()
    changed[:, place] = (changed[:, place] + 1) % 256
    before, after = network(tokens), network(changed)
    torch.testing.assert_close(before[:, :place], after[:, :place])
    assert not torch.allclose(before[:, place], after[:, place])


def test_gpt_head_is_tied_or_not() -> None:
    tied, untied = gpt(tie_weights=True), gpt(tie_weights=False)
    assert tied.head.weight is tied.token_embedding.weight
    assert untied.head.weight is not untied.token_embedding.weight
    assert parameter_count(untied) - parameter_count(tied) == 256 * 16


def test_gpt_starts_near_the_uniform_distribution() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(256, (8, 16))
    loss = F.cross_entropy(gpt()(tokens).flatten(0, 1), torch.randint(256, (8 * 16,)))
    assert abs(loss.item() - math.log(256)) < 0.05


def test_gpt_refuses_a_sequence_that_is_too_long() -> None:
    with pytest.raises(ConfigError, match="block_size=16: the data has sequences of 17 tokens"):
        gpt()(torch.zeros(1, 17, dtype=torch.int64))
