"""Aux hidden states of models that SGLang cannot be asked for them: hooks on the decoder layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from specforge.errors import EngineError
from specforge.target.sglang import names as sgl


class LayerHooks:
    """Keeps the outputs of the aux layers of one forward pass.

    SGLang's layers hand on their output (OLMo-2), or a pair (hidden, residual) whose sum it is: the addition is left to
    the next layer's norm (Granite). Newer models keep the residual, and what is still owed to it, in the batch
    (`residual_stream`). All is overwritten later, so the sum is taken here, by SGLang's own function."""

    def __init__(self, model: nn.Module, num_layers: int, aux_layers: tuple[int, ...]) -> None:
        self._aux_layers, self._states = aux_layers, dict[int, Tensor]()
        stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        fitting = [stack for stack in stacks if len(stack) == num_layers and _is_decoder(stack)]
        if not fitting:
            raise EngineError(
                f"the decoder layers of SGLang's {type(model).__name__} cannot be found",
                where="the target's architecture",
                fix="try --engine hf, or a target of another architecture",
            )
        self._hooks = [
            fitting[0][layer].register_forward_hook(self._keeper(layer), with_kwargs=True) for layer in aux_layers
        ]

    def _keeper(self, layer: int) -> Any:
        def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            hidden, residual = output if isinstance(output, tuple) else (output, None)
            batch = next(one for one in (*args, *kwargs.values()) if isinstance(one, sgl.ForwardBatch))
            self._states[layer] = sgl.snapshot(
                hidden, residual if batch.residual_stream is None else batch.residual_stream
            )

        return keep

    def states(self) -> list[Tensor]:
        """The states [T, H] of the last pass, and forgets them."""
        states = [self._states[layer] for layer in self._aux_layers]
        self._states.clear()
        return states

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _is_decoder(stack: nn.ModuleList) -> bool:
    """A vision tower may have as many layers; it has no KV cache."""
    return any(isinstance(module, sgl.RadixAttention) for module in stack.modules())
