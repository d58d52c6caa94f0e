"""ViT's own: other resolutions, dropped patches, the published sizes, images that do not fit."""

import pytest
import torch
from transformers import ViTConfig

from .test_parity import assert_close, official_gradients
from .tiny import config_for, make_inputs, make_pair, native_class, rows_entering


@pytest.mark.parametrize("size", [(12, 12), (20, 20), (8, 16), (24, 4), (21, 14)])
def test_other_resolutions_than_trained(tmp_path, size):
    model, native = make_pair("vit", "ViTForImageClassification", tmp_path)
    pixels = torch.randn(2, 2, *size, generator=torch.Generator().manual_seed(1))
    inputs = {"pixel_values": pixels, "interpolate_pos_encoding": True}
    assert_close(native(**inputs).logits, model(**inputs).logits, f"logits of {size}")


def test_pixels_are_made_for_images_that_are_not_square(tmp_path):
    """The official class takes a square for granted."""
    model, native = make_pair("vit", "ViTForMaskedImageModeling", tmp_path)
    hidden = torch.zeros(1, 8, dtype=torch.bool)
    hidden[0, 5] = True  # row 1, column 1 of 2 x 4 patches
    pixels = torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(1))
    output = native(pixel_values=pixels, bool_masked_pos=hidden, interpolate_pos_encoding=True)
    assert output.reconstruction.shape == pixels.shape
    patch = (slice(None), slice(None), slice(4, 8), slice(4, 8))
    assert_close(output.loss, (pixels[patch] - output.reconstruction[patch]).abs().mean() * 16 / (16 + 1e-5), "loss")


def test_hidden_patches_are_replaced_and_not_dropped(tmp_path):
    """Each enters every layer, and the pixels beneath it change nothing but the loss."""
    model, native = make_pair("vit", "ViTForMaskedImageModeling", tmp_path)
    inputs = make_inputs("vit", "ViTForMaskedImageModeling", "none")
    torch.nn.init.normal_(native.vit.embeddings.mask_token)
    model.vit.embeddings.mask_token.data.copy_(native.vit.embeddings.mask_token)
    native.set_ragged("on")
    rows = rows_entering(native, lambda: native(**inputs))
    assert rows["vit.layers.0.mlp.fc1"] == 3 * 10
    ours, theirs = native(**inputs), model(**inputs)
    assert_close(ours.reconstruction, theirs.reconstruction, "pixels")
    assert_close(ours.loss, theirs.loss, "loss")
    number, patch = inputs["bool_masked_pos"].nonzero()[0].tolist()
    moved = inputs["pixel_values"].clone()
    moved[number, :, 4 * (patch // 3) : 4 * (patch // 3) + 4, 4 * (patch % 3) : 4 * (patch % 3) + 4] += 5
    changed = native(**inputs | {"pixel_values": moved})
    assert torch.equal(changed.reconstruction, ours.reconstruction) and changed.loss > ours.loss


SIZES = [(12, 12), (8, 20), (4, 4), (12, 12), (20, 16)]


def images_of(sizes) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, *size, generator=generator) for size in sizes]


PATHS = {"ragged": ("sdpa", "on"), "padded": ("sdpa", "off"), "eager": ("eager", "auto")}


@pytest.mark.parametrize("path", PATHS)
def test_images_of_several_sizes_are_as_each_is_alone(tmp_path, path):
    implementation, ragged = PATHS[path]
    model, native = make_pair("vit", "ViTModel", tmp_path, implementation)
    native.set_ragged(ragged)
    weights = {"output_attentions": True} if path == "eager" else {}
    ours = native(images_of(SIZES), interpolate_pos_encoding=True, output_hidden_states=True, **weights)
    for row, image in enumerate(images_of(SIZES)):
        alone = model(image.unsqueeze(0), interpolate_pos_encoding=True, output_hidden_states=True, **weights)
        tokens = alone.last_hidden_state.shape[1]
        assert tokens == 1 + image.shape[1] * image.shape[2] // 16
        assert_close(ours.pooler_output[row], alone.pooler_output[0], "pooled")
        states = zip(ours.hidden_states, alone.hidden_states, strict=True)
        for mine, theirs in ((ours.last_hidden_state, alone.last_hidden_state), *states):
            assert_close(mine[row, :tokens], theirs[0], f"states of image {row}")
            assert (mine[row, tokens:] == 0).all()
        for mine, theirs in zip(ours.attentions or (), alone.attentions or (), strict=True):
            assert_close(mine[row, :, :tokens, :tokens], theirs[0], "weights")


@pytest.mark.parametrize("path", PATHS)
def test_gradients_of_images_of_several_sizes_are_those_of_each_alone(tmp_path, path):
    implementation, ragged = PATHS[path]
    model, native = make_pair("vit", "ViTForImageClassification", tmp_path, implementation)
    native.set_ragged(ragged)
    labels = torch.arange(len(SIZES)) % 5
    output = native(images_of(SIZES), labels=labels, interpolate_pos_encoding=True)
    output.loss.backward()
    losses = []
    for row, image in enumerate(images_of(SIZES)):
        alone = model(image.unsqueeze(0), labels=labels[row : row + 1], interpolate_pos_encoding=True)
        assert_close(output.logits[row], alone.logits[0], f"logits of image {row}")
        losses.append(alone.loss)
    mean = torch.stack(losses).mean()
    mean.backward()
    assert_close(output.loss, mean, "loss")
    ours, theirs = official_gradients(native), official_gradients(model)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, name)


def test_no_padding_of_smaller_images_enters_a_layer(tmp_path):
    _, native = make_pair("vit", "ViTModel", tmp_path)
    native.set_ragged("on")
    rows = rows_entering(native, lambda: native(images_of(SIZES), interpolate_pos_encoding=True))
    tokens = sum(1 + height * width // 16 for height, width in SIZES)
    assert rows.pop("pooler.dense") == len(SIZES)
    assert set(rows.values()) == {tokens} and len(rows) == 3 * 8 + 1


def test_patches_dropped_of_images_of_several_sizes(tmp_path):
    _, native = make_pair("vit", "ViTModel", tmp_path)
    kept = torch.ones(5, 21, dtype=torch.long)
    kept[1, 3] = kept[4, 20] = 0
    call = {"pixel_values": images_of(SIZES), "interpolate_pos_encoding": True, "attention_mask": kept}
    packed = native(**call)
    alone = native(call["pixel_values"][1].unsqueeze(0), interpolate_pos_encoding=True, attention_mask=kept[1:2, :11])
    assert_close(packed.last_hidden_state[1, :11], alone.last_hidden_state[0], "states")


def test_a_list_of_images_that_do_not_fit(tmp_path):
    _, native = make_pair("vit", "ViTModel", tmp_path)
    for images, says in (
        ([], "pixel_values is an empty list"),
        ([torch.zeros(2, 12, 12), torch.zeros(2, 12, 14)], "image 1 of the list has 12 x 14 pixels, no whole number"),
        ([torch.zeros(3, 12, 12)], r"image 0 of the list must be \(2, height, width\), not \(3, 12, 12\)"),
        ([torch.zeros(1, 2, 12, 12)], r"image 0 of the list must be \(2, height, width\)"),
        ([torch.zeros(2, 0, 12)], "smaller than a patch"),
    ):
        with pytest.raises(ValueError, match=says):
            native(images, interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="images of 8 x 20 pixels, but the model's are 12 x 12"):
        native(images_of(SIZES))
    two = images_of([(12, 12)] * 2)
    assert_close(native(two).pooler_output, native(torch.stack(two)).pooler_output, "all of the model's size")
    with pytest.raises(ValueError, match="bool_masked_pos is for images of one size"):
        native(two, bool_masked_pos=torch.ones(2, 9, dtype=torch.bool))
    masked = native_class("vit", "ViTForMaskedImageModeling")(native.config)
    with pytest.raises(ValueError, match="pixel_values must be one tensor here"):
        masked(two)


def test_dropped_patches_cost_nothing(tmp_path):
    """The class token of an image without some patches is that of an image that never had them."""
    _, native = make_pair("vit", "ViTModel", tmp_path)
    native.set_ragged("on")
    inputs = make_inputs("vit", "ViTModel", "holes")
    kept = int(inputs["attention_mask"].sum())
    assert kept < inputs["attention_mask"].numel()
    rows = rows_entering(native, lambda: native(**inputs))
    assert rows["layers.1.mlp.fc1"] == kept
    packed = native(**inputs)
    moved = inputs["pixel_values"].clone()
    # patch 1 of image 1 is dropped: token 2
    assert inputs["attention_mask"][1, 2] == 0
    moved[1, :, 0:4, 4:8] += 5
    assert torch.equal(native(**{**inputs, "pixel_values": moved}).pooler_output, packed.pooler_output)
    native.set_ragged("off")
    assert_close(native(**inputs).pooler_output, packed.pooler_output, "pooled")


def test_images_that_do_not_fit(tmp_path):
    _, native = make_pair("vit", "ViTModel", tmp_path)
    for shape, says in (
        ((1, 2, 16, 16), "images of 16 x 16 pixels, but the model's are 12 x 12; resize them, or say interpolate"),
        ((1, 3, 12, 12), r"pixel_values must be \(batch, 2, height, width\)"),
        ((2, 12, 12), r"pixel_values must be \(batch, 2, height, width\)"),
    ):
        with pytest.raises(ValueError, match=says):
            native(torch.zeros(shape))
    with pytest.raises(ValueError, match="smaller than a patch"):
        native(torch.zeros(1, 2, 3, 12), interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="pixel_values is missing"):
        native()
    with pytest.raises(ValueError, match="needs a model with a mask token"):
        native(torch.zeros(1, 2, 12, 12), bool_masked_pos=torch.ones(1, 9, dtype=torch.bool))


# shared/design/reference-values.md, "Attention": tokens with the class token
@pytest.mark.parametrize(
    ("image", "patch", "tokens"), [(224, 16, 197), (384, 16, 577), (512, 16, 1025), (224, 14, 257)]
)
def test_tokens_of_an_image(image, patch, tokens):
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                       image_size=image, patch_size=patch)  # fmt: skip
    zoo = native_class("vit", "ViTModel")
    model = zoo(zoo.config_class.from_dict(config.to_dict()))
    assert model(torch.zeros(1, 3, image, image)).last_hidden_state.shape == (1, tokens, 8)


def test_positions_are_those_of_the_trained_size_at_the_trained_size(tmp_path):
    _, native = make_pair("vit", "ViTModel", tmp_path)
    assert native.embeddings.positions(12, 12) is native.embeddings.position_embeddings
    assert config_for("vit", "ViTModel").image_size == 12
