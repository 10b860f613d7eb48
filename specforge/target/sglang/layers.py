"""Aux hidden states of models that SGLang cannot be asked for them: hooks on the decoder layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from specforge.errors import EngineError


class LayerHooks:
    """Keeps the outputs of the aux layers of one forward pass.

    SGLang's layers hand on either their output (OLMo-2) or a pair (hidden, residual) whose sum it is: the addition is
    left to the next layer's norm (Granite). The pair's tensors are overwritten there, so the sum is taken here."""

    def __init__(self, model: nn.Module, num_layers: int, aux_layers: tuple[int, ...]) -> None:
        self._aux_layers, self._states = aux_layers, dict[int, Tensor]()
        stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        stack = next((stack for stack in stacks if len(stack) == num_layers), None)
        if stack is None:
            raise EngineError(
                f"the decoder layers of SGLang's {type(model).__name__} cannot be found",
                where="the target's architecture",
                fix="try --engine hf, or a target of another architecture",
            )
        for layer in aux_layers:
            stack[layer].register_forward_hook(self._keeper(layer))

    def _keeper(self, layer: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self._states[layer] = output.clone()
            else:
                hidden, residual = output
                self._states[layer] = hidden + residual

        return keep

    def states(self) -> list[Tensor]:
        """The states [T, H] of the last pass, and forgets them."""
        states = [self._states[layer] for layer in self._aux_layers]
        self._states.clear()
        return states
