"""The split with ε in the last blocks alone, in a step that runs the others once. For step_cost.py; not in the package,
because too little of the gain is left (docs/COST.md).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer


class LastBlocksTrainer(Trainer):
    """Trains a Llama whose head is not tied, without labels that are left out.

    Its gradient is J(θ+ε)ᵀu(θ), where ε is zero outside of the last `blocks` blocks, the last norm and the head.

    1. The first blocks run once, and keep their graph.
    2. The last blocks run at θ, from what the first have returned. From the cotangent u goes back what ε needs, unless
       ε lies along the optimizer's momentum.
    3. They run again at θ+ε. One backward pass goes from u through them, and on through the graph of the first.
    """

    def __init__(self, *args: Any, blocks: int, rho: float, along_momentum: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.base, self.head = self.model.model, self.model.lm_head.weight
        self.first, self.last = self.base.layers[:-blocks], self.base.layers[-blocks:]
        self.moved = [*self.last.parameters(), *self.base.norm.parameters(), self.head]
        self.rho, self.along_momentum = rho, along_momentum

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        # Autocast is otherwise in the model's own forward. It is entered twice, because it keeps the weights that it
        # has cast until it ends.
        with self.accelerator.autocast():
            stored = self.run(self.base.embed_tokens(inputs["input_ids"]), self.first, nn.Identity())  # (B, T, D)
            with torch.set_grad_enabled(not self.along_momentum):
                clean = self.run(stored.detach(), self.last, self.base.norm)
            loss, u = self.cotangent(clean.detach(), inputs["labels"])
            epsilon = self.momentum() if self.along_momentum else self.ascent_gradient(clean, u)
            del clean
        scale = self.rho / torch.stack([direction.norm() for direction in epsilon]).norm().clamp_min(1e-12)
        theta = [weight.data for weight in self.moved]
        for weight, direction in zip(self.moved, epsilon, strict=True):
            weight.data = torch.add(weight.data, direction, alpha=float(scale))
        del epsilon
        cut = stored.detach().requires_grad_()
        with self.accelerator.autocast():
            self.head_backward(self.run(cut, self.last, self.base.norm), u)
        for weight, value in zip(self.moved, theta, strict=True):
            weight.data = value
        stored.backward(cut.grad)
        return loss

    def run(self, states: Tensor, blocks: nn.ModuleList, norm: nn.Module) -> Tensor:
        """What the model's code makes of `states` (B, T, D) with these blocks in the place of all."""
        whole = self.base.layers, self.base.norm
        self.base.layers, self.base.norm = blocks, norm
        try:
            return self.base(inputs_embeds=states, use_cache=False).last_hidden_state
        finally:
            self.base.layers, self.base.norm = whole

    @torch.no_grad()
    def cotangent(self, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy of the next tokens, and its derivative by the logits, (B, T - 1, V)."""
        u = (states[:, :-1] @ self.head.T).log_softmax(-1)
        targets = labels[:, 1:, None]
        loss = -u.gather(-1, targets).mean()
        u = u.exp_().scatter_add_(-1, targets, u.new_full((), -1).expand(targets.shape))
        return loss, u.div_(targets.numel())

    def ascent_gradient(self, clean: Tensor, u: Tensor) -> list[Tensor]:
        *weights, head = self.moved
        gradients = torch.autograd.grad(clean[:, :-1], weights, u @ head)
        return [*gradients, u.flatten(0, 1).T @ clean[:, :-1].detach().flatten(0, 1)]

    def momentum(self) -> list[Tensor]:
        """Adam's first moments, and zeros before there are any."""
        states = [self.optimizer.state.get(weight, {}) for weight in self.moved]
        return [state.get("exp_avg", torch.zeros_like(w)) for state, w in zip(states, self.moved, strict=True)]

    def head_backward(self, perturbed: Tensor, u: Tensor) -> None:
        """Back from u at the logits, which need not be computed for that."""
        shifted = perturbed[:, :-1]
        gradient = (u.flatten(0, 1).T @ shifted.detach().flatten(0, 1)).to(self.head.dtype)
        self.head.grad = gradient if self.head.grad is None else self.head.grad.add_(gradient)
        shifted.backward(u @ self.head.detach())
