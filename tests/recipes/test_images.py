"""Augmentation: what comes out is a part of the padded image, mirrored or not."""

import torch
from _images import augment


def test_each_image_is_a_crop_of_its_own_padded_one_mirrored_or_not():
    torch.manual_seed(0)
    images = torch.randint(1, 255, (40, 3, 6, 5), dtype=torch.uint8)
    found = set()
    for image, changed in zip(images, augment(images, shift=2), strict=True):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        crops = {
            (top, left, mirrored): crop.flip(-1) if mirrored else crop
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            for crop in [padded[:, top : top + 6, left : left + 5]]
        }
        (which,) = [key for key, crop in crops.items() if torch.equal(crop, changed)]
        found.add(which)
    assert changed.dtype == torch.uint8
    assert {mirrored for _, _, mirrored in found} == {False, True}
    assert len(found) > 15, "the shift is another for each image"
