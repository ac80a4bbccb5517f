"""Joining the calls of several rows, and sharing out what comes back."""

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from apt_diffusion.serving.batches import Joiner, arguments_of, batch_size, can_join, share_out


def call(rows: int, time, text=None, **more):
    return {
        "sample": torch.full((rows, 4, 2, 2), float(rows)),
        "timestep": time,
        "encoder_hidden_states": torch.ones(rows, 7, 3) if text is None else text,
    } | more


def test_rows_stand_one_after_another_with_their_own_times():
    calls = [call(2, torch.tensor(981)), call(1, 5), call(3, torch.tensor([1.5]))]
    assert all(can_join(calls[0], other) for other in calls)
    joined = Joiner().join(calls)
    assert joined["timestep"].tolist() == [981, 981, 5, 1.5, 1.5, 1.5]
    assert joined["sample"][:, 0, 0, 0].tolist() == [2, 2, 1, 3, 3, 3]
    parts = share_out((joined["sample"], {"kept": joined["timestep"]}, None), [2, 1, 3])
    assert [tuple(part[0].shape) for part in parts] == [(2, 4, 2, 2), (1, 4, 2, 2), (3, 4, 2, 2)]
    assert [part[1]["kept"].tolist() for part in parts] == [[981, 981], [5], [1.5] * 3] and parts[0][2] is None
    output = share_out(UNet2DConditionOutput(sample=joined["sample"]), [2, 1, 3])
    assert isinstance(output[1], UNet2DConditionOutput) and output[1].sample.shape[0] == 1


def test_what_is_within_dicts_and_lists_is_joined_too():
    extra = [{"added": {"ids": torch.full((rows, 6), rows)}, "residuals": [torch.ones(rows, 2)]} for rows in (1, 2)]
    joined = Joiner().join([call(rows, 1, **more) for rows, more in zip((1, 2), extra, strict=True)])
    assert joined["added"]["ids"][:, 0].tolist() == [1, 2, 2] and joined["residuals"][0].shape == (3, 2)


def test_only_what_is_alike_can_join():
    first = call(2, 1, scale=0.5, img_ids=torch.arange(6.0).view(2, 3), mode=None)
    assert can_join(first, first | {"timestep": 7})
    for changed in (
        {"sample": torch.ones(2, 4, 2, 3)},
        {"sample": torch.ones(2, 4, 2, 2, dtype=torch.float64)},
        {"encoder_hidden_states": torch.ones(2, 8, 3)},
        {"scale": 0.6},
        {"mode": "other"},
        {"img_ids": torch.zeros(2, 3)},  # positions of tokens are no rows, whatever their number
        {"timestep": torch.ones(3)},
    ):
        assert not can_join(first, first | changed), changed
    assert not can_join(first, {key: value for key, value in first.items() if key != "mode"})
    assert batch_size({"timestep": torch.tensor(3)}) == 0 and not can_join({"x": 1}, {"x": 1})
    assert Joiner().join([first, first])["img_ids"] is first["img_ids"]


def test_the_same_parts_are_the_same_tensor_as_in_the_last_pass():
    texts, joiner = [torch.ones(1, 7, 3), torch.zeros(1, 7, 3)], Joiner()
    passes = [joiner.join([call(1, time, text) for text in texts])["encoder_hidden_states"] for time in (3, 2)]
    assert passes[0] is passes[1]
    texts[0].add_(1)
    changed = joiner.join([call(1, 1, text) for text in texts])["encoder_hidden_states"]
    assert changed is not passes[1] and changed[0, 0, 0] == 2


def test_arguments_have_names():
    def forward(sample, timestep=0, *, scale=1.0, **kwargs):
        return sample

    assert arguments_of(forward, (1, 2), {"scale": 3, "other": 4}) == {
        "sample": 1, "timestep": 2, "scale": 3, "other": 4,
    }  # fmt: skip
