"""RandAugment: each operation against PIL and arithmetic, directions, and that its draws decide everything."""

import numpy as np
from PIL import Image, ImageEnhance
from support.vl_helpers import picture

from apt_diffusion.data.augmentation import OPERATIONS, rand_augment
from apt_diffusion.data.order import Purpose, random_at


def test_operations_of_rand_augment():
    """At magnitude 9 of 30, against PIL and arithmetic."""
    image = picture("green", 3, (20, 12))
    pixels = np.asarray(image).astype(int)
    strength = {index: low + 0.3 * (high - low) for index, (_, low, high, _) in enumerate(OPERATIONS)}

    def apply(index, sign=1):
        return np.asarray(OPERATIONS[index][0](image, sign * strength[index])).astype(int)

    assert set(np.unique(apply(3))) <= {0, 128}  # posterize: 1.2 bits are 1
    assert np.array_equal(apply(4), np.where(pixels < 76.8, pixels, 255 - pixels))  # solarize
    added = np.minimum(pixels + 33, 255)
    assert np.array_equal(apply(5), np.where(added < 128, added, 255 - added))  # add, then solarize at 128
    assert added.min() < 128 <= added.max()
    assert np.array_equal(apply(8), np.asarray(ImageEnhance.Brightness(image).enhance(0.64)))
    assert np.array_equal(apply(12)[:, :-30], 0 * pixels[:, :-30])  # 30 pixels are more than this picture has
    wide = Image.fromarray(np.tile(np.arange(120, dtype=np.uint8)[None, :, None], (4, 1, 3)))
    moved = np.asarray(OPERATIONS[12][0](wide, 30.0))
    assert np.array_equal(moved[:, :90, 0], np.asarray(wide)[:, 30:, 0]) and not moved[:, 90:].any()


def test_rand_augment_follows_its_draws_and_reaches_every_operation():
    image = picture("blue", 1, (40, 40))
    seen = set()
    for position in range(200):
        draws = [random_at(0, position, Purpose.SAMPLE) for _ in range(3)]
        first, second = (rand_augment(image, own) for own in draws[:2])
        assert first.size == image.size and first.mode == "RGB" and np.array_equal(first, second)
        seen |= set(draws[2].integers(len(OPERATIONS), size=2).tolist())
    assert seen == set(range(14))


def test_operations_with_a_direction_go_either_way():
    """Rotation, shearing and moving: as often to one side as to the other."""
    ramp = np.tile(np.arange(0, 240, 6, dtype=np.uint8)[None, :, None], (40, 1, 3))
    image = Image.fromarray(ramp + np.arange(0, 10, dtype=np.uint8).repeat(4)[:, None, None])
    for index in (2, 10, 11, 12, 13):
        operation, low, high, signed = OPERATIONS[index]
        value = low + 0.3 * (high - low)
        ways = [np.asarray(operation(image, sign * value)) for sign in (1, -1)]
        assert signed and not np.array_equal(*ways)
    assert [index for index, row in enumerate(OPERATIONS) if row[3]] == [2, 10, 11, 12, 13]
    turned = np.asarray(OPERATIONS[2][0](image, 9.0))
    assert np.array_equal(turned, np.asarray(image.rotate(9.0)))
    both = set()
    for position in range(400):
        draws = random_at(1, position, Purpose.SAMPLE)
        first = draws.integers(len(OPERATIONS), size=1)[0]
        if first == 2:
            result = np.asarray(rand_augment(image, random_at(1, position, Purpose.SAMPLE), operations=1))
            both |= {sign for sign in (1, -1) if np.array_equal(result, np.asarray(image.rotate(sign * 9.0)))}
    assert both == {1, -1}
