"""Towers that give several layers of an encoder."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers

from protoclip.models.joined import JoinedImageTower, read_layers, shortlist
from protoclip.models.projections import FrozenEncoders
from protoclip.models.start import resolve_start
from testing import build_model
from tiny_hugging_face import save_bert
from tiny_starts import save_encoders

IMAGES = torch.linspace(-2, 2, 2 * 3 * 64 * 64).view(2, 3, 64, 64)


def with_layers(section, image: str | None, text: str | None):
    """The settings with these layers."""
    towers = {
        "image": replace(section.image, joined_layers=image),
        "text": replace(section.text, joined_layers=text),
    }
    return replace(section, **towers)


@pytest.mark.parametrize(
    ("name", "module"),
    [("test_resnet", "layer2"), ("test_efficientnet", "blocks.2"), ("test_vit", "blocks.3")],
)
@torch.no_grad()
def test_layers_are_means_over_places_of_what_blocks_give(name, module, tmp_path):
    """By hooks on timm's own model. The last layer comes first, as timm pools it."""
    section = save_encoders(tmp_path, name, size=64)
    section = with_layers(section, "last+3" if name != "test_vit" else "last+4", "plain")
    tower = FrozenEncoders(build_model(section, seed=0).towers).eval().visual
    assert isinstance(tower, JoinedImageTower)
    seen = []
    tower.trunk.get_submodule(module).register_forward_hook(lambda *given: seen.append(given[2]))
    last = F.normalize(tower.trunk(IMAGES), dim=1)
    maps = seen[0][:, 1:].mean(1) if seen[0].ndim == 3 else seen[0].mean((2, 3))
    features = tower(IMAGES)
    torch.testing.assert_close(features[:, : last.shape[1]], last)
    (span,) = tower.columns(tower.chosen[1:])
    torch.testing.assert_close(features[:, slice(*span)], F.normalize(maps, dim=1))


@torch.no_grad()
def test_layers_of_a_text_are_pooled_as_the_last_one(tmp_path):
    """With padding left out, and states as `transformers` gives them."""
    section = save_encoders(tmp_path)
    bert = save_bert(tmp_path / "deep", num_hidden_layers=3)
    section = replace(section, text=replace(section.text, name=str(bert)))
    section = with_layers(section, "plain", "last+1")
    start = resolve_start(section)
    tower = FrozenEncoders(build_model(section, seed=0).towers).eval().text
    tokens = start.tokenizer()(["a cat"])
    (mask,) = tokens >= 0
    model = transformers.BertModel.from_pretrained(bert).eval()
    states = model(tokens[:, mask], output_hidden_states=True).hidden_states
    wanted = [F.normalize(states[layer].mean(1), dim=1) for layer in (3, 2, 1)]
    assert tower.given == [0, 2, 1]
    torch.testing.assert_close(tower(tokens), torch.cat(wanted, dim=1))


def test_a_choice_keeps_the_weights_of_its_columns(tmp_path):
    model = build_model(
        with_layers(save_encoders(tmp_path, "test_resnet", size=64), "auto", "plain"), seed=0
    )
    tower = model.towers.visual
    before, (first, last) = tower.head.proj.weight.clone(), tower.columns([4])[0]
    tower.choose([0, 4])
    assert tower.head.proj.weight[:, -(last - first) :].equal(before[:, first:last])
    features = torch.randn(2, sum(tower.widths))
    kept = torch.cat([features[:, : tower.widths[0]], features[:, first:last]], dim=1)
    torch.testing.assert_close(tower.head(features), kept @ tower.head.proj.weight.T)


def test_the_short_list_is_the_last_the_one_before_and_two_thirds():
    assert [shortlist(depth) for depth in (1, 2, 6, 7, 12)] == [
        [0],
        [0, 1],
        [0, 5, 4],
        [0, 6, 5],
        [0, 11, 8],
    ]


@pytest.mark.parametrize("value", ["first", "last+13", "0", "", "last,4"])
def test_what_is_no_list_of_layers_is_refused(value):
    with pytest.raises(
        ValueError, match=r"^model\.text\.joined_layers: '.*' is not a list of layers"
    ):
        read_layers("model.text.joined_layers", value, 12)
