"""What follows the gradients of a step, recorded: clipping, Adam or AdamW, averages of the weights.

The arithmetic is torch's own, operation by operation, with all parameters of a group in one call.
State stays where torch and torch-ema keep it, so that checkpoints, schedulers and a change of the
way know no difference. Numbers that change from step to step, such as learning rates, are computed
outside and handed over in one small tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mace_lora.backends.recording import Called, Replayed

_EXACTLY = (torch.optim.Adam, torch.optim.AdamW)
_NUMBERS = 3  # per group: -rate / first bias correction, root of the second, weight decay


class Update:
    """One optimiser step from given gradients.

    Args:
        optimizer: one that `serves` accepts.
        ema: torch-ema's average of all its parameters, or None.
        max_norm: gradients are scaled down to this norm, over all of them; None: they are not.
        recorder: records it.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        ema: Any,
        max_norm: float | None,
        recorder: Replayed | Called,
    ) -> None:
        self._optimizer, self._ema, self._max_norm = optimizer, ema, max_norm
        self.parameters = parameters_of(optimizer)
        self._averaged = _parameters_of_average(ema)  # in an order of their own
        first = self.parameters[0]
        self._flat = first.new_zeros(sum(p.numel() for p in self.parameters)).detach()
        parts = self._flat.split([p.numel() for p in self.parameters])
        self._gradients = [g.view(p.shape) for g, p in zip(parts, self.parameters, strict=True)]
        groups = len(optimizer.param_groups)
        self._numbers = torch.zeros(groups * _NUMBERS + 1, dtype=first.dtype, device=first.device)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                _begin(optimizer.state[parameter], parameter, group["amsgrad"])
        self._hand_over()
        before = [(t, t.clone()) for t in self._changed()]
        recorder.warm_up(self._apply)
        self._recorded = recorder.record(self._apply)
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)

    @staticmethod
    def serves(optimizer: Any, ema: Any, model: torch.nn.Module) -> bool:
        """Whether optimiser and averages are of a kind that can be recorded, for all of `model`."""
        if type(optimizer) not in _EXACTLY:
            return False
        if any(g["maximize"] or g["differentiable"] for g in optimizer.param_groups):
            return False
        if any(isinstance(g["lr"], Tensor) for g in optimizer.param_groups):
            return False
        mine = {id(p) for p in parameters_of(optimizer)}
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        averaged = mine if ema is None else {id(p) for p in _parameters_of_average(ema)}
        return mine == trained == averaged

    def fits(self, optimizer: Any, ema: Any, max_norm: float | None) -> bool:
        """Whether it was recorded for these."""
        return (self._optimizer, self._ema, self._max_norm) == (optimizer, ema, max_norm)

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor | None]) -> None:
        """One step.

        Args:
            gradients: of `parameters`; None is zero.
        """
        pairs = zip(gradients, self._gradients, strict=True)
        found = [torch.zeros_like(mine) if g is None else g for g, mine in pairs]
        torch.cat([g.reshape(-1) for g in found], out=self._flat)
        steps = [self._optimizer.state[p]["step"] for p in self.parameters]
        torch._foreach_add_(steps, 1.0)
        if self._ema is not None:
            self._ema.num_updates += 1
        self._hand_over()
        self._recorded()

    def _hand_over(self) -> None:
        numbers: list[float] = []
        for group in self._optimizer.param_groups:
            beta1, beta2 = group["betas"]
            step = max(1.0, float(self._optimizer.state[group["params"][0]]["step"]))
            rate = float(group["lr"])
            correction = (1 - beta2**step) ** 0.5
            decay = 1 - rate * group["weight_decay"]
            numbers += [-rate / (1 - beta1**step), correction, decay]
        numbers.append(self._one_minus_decay())
        self._numbers.copy_(torch.tensor(numbers, dtype=torch.float64))

    def _one_minus_decay(self) -> float:
        if self._ema is None:
            return 0.0
        done = self._ema.num_updates
        return 1.0 - min(self._ema.decay, (1 + done) / (10 + done))

    def _changed(self) -> Iterator[Tensor]:
        yield from self.parameters
        yield from () if self._ema is None else self._ema.shadow_params
        for parameter in self.parameters:
            state = self._optimizer.state[parameter]
            yield from (t for name, t in state.items() if name != "step")

    @torch.no_grad()
    def _apply(self) -> list[Tensor]:
        if self._max_norm is not None:
            norms = torch.stack(torch._foreach_norm(self._gradients))
            norm = torch.linalg.vector_norm(norms)
            self._flat.mul_((self._max_norm / (norm + 1e-6)).clamp(max=1.0))
        start = 0
        for i, group in enumerate(self._optimizer.param_groups):
            end = start + len(group["params"])
            numbers = self._numbers[i * _NUMBERS : (i + 1) * _NUMBERS].unbind()
            self._adam(group, self._gradients[start:end], *numbers)
            start = end
        if self._ema is not None:
            gaps = torch._foreach_sub(self._ema.shadow_params, self._averaged)
            torch._foreach_mul_(gaps, self._numbers[-1])
            torch._foreach_sub_(self._ema.shadow_params, gaps)
        return []

    def _adam(
        self,
        group: dict[str, Any],
        gradients: list[Tensor],
        size: Tensor,
        correction: Tensor,
        decay: Tensor,
    ) -> None:
        """torch's `_single_tensor_adam`, for a list."""
        parameters, (beta1, beta2) = group["params"], group["betas"]
        states = [self._optimizer.state[p] for p in parameters]
        if group["weight_decay"] != 0 and _is_decoupled(self._optimizer, group):
            torch._foreach_mul_(parameters, decay)
        elif group["weight_decay"] != 0:
            gradients = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
        means = [s["exp_avg"] for s in states]
        squares = [s["exp_avg_sq"] for s in states]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        if group["amsgrad"]:
            highest = [s["max_exp_avg_sq"] for s in states]
            torch._foreach_maximum_(highest, squares)
            squares = highest
        below = torch._foreach_sqrt(squares)
        torch._foreach_div_(below, correction)
        torch._foreach_add_(below, group["eps"])
        change = torch._foreach_div(means, below)
        torch._foreach_mul_(change, size)
        torch._foreach_add_(parameters, change)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """In the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _parameters_of_average(ema: Any) -> list[Any]:
    return [] if ema is None else [reference() for reference in ema._params_refs]


def _is_decoupled(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Older versions of torch tell AdamW by its class alone."""
    return group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))


def _begin(state: dict[str, Tensor], parameter: Tensor, amsgrad: bool) -> None:
    """The state that torch's Adam begins with at its first step."""
    if not state:
        double = torch.get_default_dtype() == torch.float64
        state["step"] = torch.tensor(0.0, dtype=torch.float64 if double else torch.float32)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
        if amsgrad:
            state["max_exp_avg_sq"] = torch.zeros_like(parameter)
