"""Views: shifts and mirror images by hand, what is random, what symmetry is, averaged answers."""

import numpy as np
import pytest
import torch
from torch import nn

import data
from augment import ASYMMETRY, TEST_SHIFTS, augment, fold, mirror_matters, normalize, predict, view
from conftest import FOLDER
from model import NetConfig, build

N = 400


def one(dy: int = 0, dx: int = 0, mirror: bool = False, side: int = 3) -> list[list[int]]:
    """A view of the picture 0 … side² − 1."""
    picture = torch.arange(side * side, dtype=torch.uint8).view(1, 1, side, side)
    how = (torch.tensor([dy]), torch.tensor([dx]), torch.tensor([mirror]))
    return view(picture, *how)[0, 0].tolist()


def test_fold_reflects_at_the_outermost_pixel():
    assert fold(torch.arange(-3, 8), 5).tolist() == [3, 2, 1, 0, 1, 2, 3, 4, 3, 2, 1]


def test_views_by_hand():
    """0 1 2 / 3 4 5 / 6 7 8: what comes in at the edge is the row or column inside of it."""
    assert one() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert one(mirror=True) == [[2, 1, 0], [5, 4, 3], [8, 7, 6]]
    assert one(dy=1) == [[3, 4, 5], [0, 1, 2], [3, 4, 5]]
    assert one(dx=1) == [[1, 0, 1], [4, 3, 4], [7, 6, 7]]
    assert one(dy=-1, dx=-1) == [[4, 5, 4], [7, 8, 7], [4, 5, 4]]
    assert one(dx=1, mirror=True) == [[1, 2, 1], [4, 5, 4], [7, 8, 7]]


def test_all_channels_and_pictures_move_as_told():
    images = torch.randint(256, (3, 2, 5, 7), dtype=torch.uint8)
    dy, dx, mirror = torch.tensor([0, 2, -1]), torch.tensor([0, -3, 1]), torch.tensor([0, 0, 1]) > 0
    seen = view(images, dy, dx, mirror)
    assert torch.equal(seen[0], images[0])
    assert torch.equal(seen[1, :, 2:, :4], images[1, :, :3, 3:])
    assert torch.equal(seen[2, :, :4, 1:], images[2].flip(2)[:, 1:, :-1])


def augmented(shift=0, flip=False, cutout=0, seed=3, n=N, side=8) -> tuple:
    images = torch.randint(1, 250, (n, 1, side, side), dtype=torch.uint8)
    return images, augment(images, shift, flip, cutout, np.random.default_rng(seed))


def test_nothing_asked_is_nothing_done():
    images, seen = augmented()
    assert torch.equal(images, seen)


def test_half_of_the_pictures_are_mirrored():
    images, seen = augmented(flip=True)
    mirrored = (seen == images.flip(3)).all(3).all(2).squeeze(1)
    same = (seen == images).all(3).all(2).squeeze(1)
    assert (mirrored ^ same).all()
    assert 0.4 * N < mirrored.sum() < 0.6 * N


def test_every_shift_happens_and_none_is_larger():
    images, seen = augmented(shift=2)
    middle = {}
    for dy in range(-3, 4):
        for dx in range(-3, 4):
            inner = images[:, :, 3 - dy : 5 - dy, 3 - dx : 5 - dx]
            here = (seen[:, :, 3:5, 3:5] == inner).flatten(1).all(1)
            middle[dy, dx] = int(here.sum())
    expected = {(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)}
    assert {place for place, n in middle.items() if n} == expected
    assert min(middle[place] for place in expected) > N / 25 / 3


def test_the_same_dice_throw_the_same():
    assert torch.equal(augmented(2, True, 3, seed=5)[1], augmented(2, True, 3, seed=5)[1]) is False
    torch.manual_seed(1)
    first = augmented(2, True, 3, seed=5)[1]
    torch.manual_seed(1)
    assert torch.equal(first, augmented(2, True, 3, seed=5)[1])


def test_cutout_hides_a_square():
    images, seen = augmented(cutout=3)
    hidden = seen != images
    grey = int(images.float().mean())
    assert (seen[hidden] == grey).all()
    rows, columns = hidden.any(3).sum(2).squeeze(1), hidden.any(2).sum(2).squeeze(1)
    assert rows.max() == columns.max() == 3
    assert hidden.sum((1, 2, 3)).max() == 9
    assert (hidden.sum((1, 2, 3)) >= 3).all()  # 2 × 2 in a corner, less what was grey already


def test_normalize_by_hand():
    """(51/255 − 0.1) / 0.5 = 0.2 and (255/255 − 0.5) / 0.25 = 2."""
    images = torch.tensor([51, 255], dtype=torch.uint8).view(1, 2, 1, 1)
    assert normalize(images, [0.1, 0.5], [0.5, 0.25]).flatten().tolist() == pytest.approx([0.2, 2])


def letters(n: int = 60) -> data.Split:
    """Two classes: bright on the left, and bright above."""
    dice = np.random.default_rng(0)
    x = dice.integers(0, 50, (n, 1, 6, 6))
    x[: n // 2, :, :, :2] += 150
    x[n // 2 :, :, :2] += 150
    return data.Split(
        torch.tensor(x.astype(np.uint8)), torch.tensor([0] * (n // 2) + [1] * (n - n // 2))
    )


def test_mirror_images_matter_where_left_is_not_right():
    """By hand: (x − mirror)² is (±150)² in 4 of 6 columns of half of the pictures, noise aside."""
    split = letters()
    assert mirror_matters(split) > 0.9
    assert mirror_matters(split[torch.arange(30, 60)]) < 0.05  # bright above: symmetric
    both = torch.cat((split.images, split.images.flip(3)))
    assert mirror_matters(data.Split(both, split.labels.repeat(2))) < 0.02


def test_mirror_images_matter_for_real_digits_and_not_for_shapes():
    digits = data.load(str(FOLDER / "data" / "digits.npz")).train
    assert mirror_matters(digits) > 5 * ASYMMETRY
    assert mirror_matters(data.load().train[:4000]) < ASYMMETRY / 5


def test_one_picture_a_class_says_nothing():
    split = letters(4)
    assert mirror_matters(split[torch.tensor([0, 3])]) == 0.0


class Corner(nn.Module):
    """Logits that are the top left pixel and its negative: sensitive to every view."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        corner = self.weight * x[:, :1, 0, 0]
        return torch.cat((corner, -corner), 1)


@pytest.mark.parametrize("averaged", [(), ("flip",), ("shift",), ("flip", "shift")])
def test_answers_are_the_mean_over_views(averaged):
    images = torch.randint(256, (7, 1, 4, 4), dtype=torch.uint8)
    model, expected, n = Corner(), 0, 0
    for dy, dx in TEST_SHIFTS if "shift" in averaged else [(0, 0)]:
        for mirror in (False, True) if "flip" in averaged else (False,):
            how = (torch.full((7,), dy), torch.full((7,), dx), torch.full((7,), mirror))
            seen = normalize(view(images, *how), [0.5], [0.2])
            expected, n = expected + model(seen).double().softmax(1).detach(), n + 1
    found = predict(model, images, [0.5], [0.2], averaged, batch=3)
    torch.testing.assert_close(found, expected / n)
    torch.testing.assert_close(found.sum(1), torch.ones(7, dtype=torch.float64))


@pytest.mark.parametrize("training", [True, False])
def test_predict_leaves_the_mode_of_the_model(training):
    model = Corner().train(training)
    predict(model, torch.zeros(1, 1, 4, 4, dtype=torch.uint8), [0.5], [0.2])
    assert model.training == training


def test_pictures_do_not_see_one_another_and_leave_no_trace():
    """In training mode too: batch normalisation by the running statistics, which stay."""
    model = build(NetConfig(width=4, image_height=8, image_width=8)).train()
    nn.init.normal_(model.fc.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)
    constants = ([0.5] * 3, [0.2] * 3)
    alone = torch.cat([predict(model, image[None], *constants) for image in images])
    torch.testing.assert_close(predict(model, images, *constants), alone, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_averaged_shifts_are_one_pixel_along_the_diagonals():
    assert {(abs(dy), abs(dx)) for dy, dx in TEST_SHIFTS[1:]} == {(1, 1)}
    assert len(set(TEST_SHIFTS)) == 5 and TEST_SHIFTS[0] == (0, 0)
