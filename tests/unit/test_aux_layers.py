"""Which layers are captured, down to the smallest targets."""

from __future__ import annotations

import pytest

from specforge.errors import ConfigError
from specforge.target.weights import check_aux_layers, default_aux_layers


@pytest.mark.parametrize("depth", range(4, 100))
def test_the_default_can_be_captured_at_every_depth(depth):
    layers = default_aux_layers(depth)
    check_aux_layers(layers, depth)
    if depth > 6:
        assert layers == (1, depth // 2 - 1, depth - 4)  # what servers take


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_targets_without_three_layers_are_refused(depth):
    with pytest.raises(ConfigError, match="no three aux layers"):
        default_aux_layers(depth)
    with pytest.raises(ConfigError, match="no three aux layers"):
        check_aux_layers((0, 1, 2), depth)


@pytest.mark.parametrize("layers", [(0, 1), (0, 1, 2, 3), (2, 1, 3), (1, 1, 3), (-1, 0, 1), (0, 1, 4)])
def test_other_layers_are_refused_and_the_default_is_named(layers):
    with pytest.raises(ConfigError) as raised:
        check_aux_layers(layers, 5)
    assert "0 1 3" in raised.value.fix
