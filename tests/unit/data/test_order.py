import numpy as np
import pytest

from sepdeploy.data.order import even_order, proportional_order
from sepdeploy.errors import UsageError

LABELS = np.repeat([0, 1, 2], [60, 30, 10])


@pytest.mark.parametrize("order", [even_order, proportional_order])
@pytest.mark.parametrize("labels", [None, LABELS])
def test_orders_are_seeded_permutations(order, labels):
    first = order(labels, 100, 3)
    assert sorted(first) == list(range(100))
    assert first.tolist() == order(labels, 100, 3).tolist()
    assert first.tolist() != order(labels, 100, 4).tolist()


def test_even_prefixes_have_classes_equally_often():
    order = even_order(LABELS, 100, 0)
    assert np.bincount(LABELS[order[:30]]).tolist() == [10, 10, 10]
    assert np.bincount(LABELS[order[:50]]).tolist() == [20, 20, 10]


def test_proportional_prefixes_have_the_proportions_of_the_whole():
    order = proportional_order(LABELS, 100, 0)
    assert np.bincount(LABELS[order[:50]]).tolist() == [30, 15, 5]


def test_negative_seed_is_refused():
    with pytest.raises(UsageError, match="seed must be at least 0, got -1"):
        even_order(None, 3, -1)
