"""The perturbation against the momentum, which is what Momentum-SAM does, in place of along it.

With `fsam_ascent_direction="momentum"` the Jacobian is taken at θ + ρ m/‖m‖, which is uphill as far as the last
gradients tell. Momentum-SAM (arXiv 2401.12033) subtracts: θ − ρ m/‖m‖ lies ahead on the optimizer's own way. Its code
has one norm over all weights, as here, and the first moment of Adam as it is, not divided by the second; it runs with
ρ = 3 where its SAM has 0.2. Unlike here, it takes the whole gradient there, the cotangent included.

    class MyTrainer(MomentumSignMixin, FSAMTrainer): ...
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor


@dataclass
class MomentumSignArguments:
    """Put it before FSAMTrainingArguments."""

    momentum_sign: Literal["plus", "minus"] = field(
        default="plus",
        metadata={
            "help": "For fsam_ascent_direction='momentum': perturb along the momentum (plus), or against it, as "
            "Momentum-SAM does (minus). The first step has no momentum, and goes along or against its gradient."
        },
    )

    def __post_init__(self) -> None:
        if self.momentum_sign not in ("plus", "minus"):
            raise ValueError(f"momentum_sign={self.momentum_sign!r} is unknown: choose 'plus' or 'minus'.")
        direction = getattr(self, "fsam_ascent_direction", None)
        if self.momentum_sign == "minus" and direction != "momentum":
            raise ValueError(
                f"momentum_sign='minus' would turn an ascent along fsam_ascent_direction={direction!r} into a descent: "
                "set fsam_ascent_direction='momentum', or momentum_sign='plus'."
            )
        parent: Any = super()
        if hasattr(parent, "__post_init__"):
            parent.__post_init__()


class MomentumSignMixin:
    """Put it before a class with `FSAMMixin`; its arguments have the field of :class:`MomentumSignArguments`."""

    def fsam_direction(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        super().fsam_direction(weights, gradients)
        if self.args.momentum_sign == "minus":
            for gradient in gradients:
                gradient.neg_()
