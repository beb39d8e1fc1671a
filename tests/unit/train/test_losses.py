import pytest
import torch

from sepdeploy.errors import UnsupportedModelError, UsageError
from sepdeploy.train.losses import feature_loss, label_loss, output_loss


def scores(seed, images=6, classes=5):
    return torch.randn(images, classes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_class_scores_are_compared_by_their_divergence_at_a_temperature(temperature):
    p, q = (torch.softmax(scores(seed) / temperature, 1) for seed in (0, 1))
    expected = (p * (p / q).log()).sum(1).mean() * temperature**2
    assert output_loss(scores(1), scores(0), temperature).item() == pytest.approx(expected.item(), rel=1e-5)
    assert output_loss(scores(0) + 3, scores(0), temperature).item() == pytest.approx(0, abs=1e-6)


def test_other_outputs_are_compared_relative_to_their_energy_tensor_by_tensor():
    teacher = {"boxes": torch.full((2, 3, 4), 10.0), "deep": [torch.ones(2, 7), None], "ids": torch.tensor([1, 2])}
    student = {"boxes": torch.full((2, 3, 4), 9.0), "deep": [torch.zeros(2, 7), None], "ids": torch.tensor([5, 5])}
    assert output_loss(student, teacher).item() == pytest.approx((0.01 + 1) / 2)


def test_gradients_reach_the_student_only_and_halves_do_not_overflow():
    student = torch.full((4, 1000, 8), 300.0, dtype=torch.half, requires_grad=True)
    teacher = torch.full((4, 1000, 8), 200.0, dtype=torch.half, requires_grad=True)
    loss = output_loss(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(0.25)
    assert loss.dtype == torch.float32
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_a_dead_feature_counts_with_its_squared_error():
    assert feature_loss([torch.full((2, 3), 2.0)], [torch.zeros(2, 3)]).item() == pytest.approx(4)
    assert feature_loss([torch.zeros(2, 3)], [torch.zeros(2, 3)]).item() == 0


def test_features_weigh_the_same_whatever_their_size():
    teacher = [torch.ones(2, 3), torch.full((2, 99), 100.0)]
    assert feature_loss([torch.zeros(2, 3), teacher[1]], teacher).item() == pytest.approx(0.5)


def test_outputs_that_differ_in_shape_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"\(3, 4\).*\(5, 4\).*depend on the image"):
        output_loss([torch.ones(3, 4)], [torch.ones(5, 4)])
    with pytest.raises(UnsupportedModelError, match="depend on the image"):
        output_loss(torch.ones(1, 5), torch.ones(3, 5))
    with pytest.raises(UnsupportedModelError, match="no tensors of real numbers"):
        output_loss([torch.tensor([1, 2])], [torch.tensor([1, 2])])


def test_labels_are_for_class_scores():
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    expected = -torch.log_softmax(scores(0), 1)[range(6), labels].mean()
    assert label_loss(scores(0), labels).item() == pytest.approx(expected.item())
    with pytest.raises(UsageError, match=r"\(6, 5, 2\) for 6 images"):
        label_loss(torch.ones(6, 5, 2), labels)
