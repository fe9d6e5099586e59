"""FSAMTrainer ends on the weights that the formulas give, for every kind of model, variant, window and scope.

Each test trains twice from the same start, once through the Trainer and once through `tests.reference`, for eight
optimizer steps in fp32. `pytest -m "slow or not slow"` runs the whole product of models and settings.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from hf_fsam import FSAMTrainer, FSAMTrainingArguments
from tests import reference, zoo
from tests.reference import IGNORED, Batch, Problem, Tensors, Window
from tests.toys import DEVICE, ON_DEVICE
from tests.zoo import CASES, Case, Example

RHO = 0.3
BATCH_SIZE = 2
STEPS = 8
WEIGHT_TOLERANCE = 1e-5  # ‖θ - θ_ref‖ / ‖θ_ref‖
MOVEMENT_TOLERANCE = 1e-4  # ‖θ - θ_ref‖ / ‖θ_ref - θ₀‖: weights that never moved, or moved elsewhere, are far off
DISTINCT = 0.05  # how far apart two variants end at least, by the same measure, so that a mix-up would show
SLIGHT = 0.01  # the same for settings that make less of a difference


OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]


def sgd(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(reference.trainable(model).values(), lr=learning_rate, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """eps is large: with a small one, gradients that are zero except for rounding would be as large as all others."""
    return torch.optim.AdamW(reference.trainable(model).values(), lr=0.005, betas=(0.9, 0.95), eps=1e-3)


@dataclass(frozen=True)
class Setting:
    """How to train. The Trainer gets it as arguments, the reference as parameters."""

    variant: reference.Variant
    precondition: bool = False
    accumulation: int = 1
    scope: str = "micro_batch"
    rho: float = RHO
    max_grad_norm: float = 0.0
    one_epoch: bool = False
    direction: str = "gradient"
    every: int = 1

    def __str__(self) -> str:
        variant = f"preconditioned_{self.variant}" if self.precondition else self.variant
        return f"{variant}-accumulate_{self.accumulation}-{self.scope}"

    @property
    def epochs(self) -> int:
        return 1 if self.one_epoch or self.accumulation == 1 else 2

    @property
    def examples(self) -> int:
        """As many as make eight steps. An epoch's last micro-batch holds one example; where there are two epochs, the
        last window of each lacks a micro-batch."""
        if self.epochs == 1:
            return STEPS * self.accumulation * BATCH_SIZE - 1
        return (STEPS // 2 * self.accumulation - 1) * BATCH_SIZE - 1


def optimizer_for(case: Case, setting: Setting) -> OptimizerFactory:
    return adamw if setting.precondition else functools.partial(sgd, learning_rate=case.learning_rate)


def train_with_trainer(
    model: nn.Module,
    examples: list[Example],
    setting: Setting,
    optimizer_factory: OptimizerFactory,
    output_dir: Path,
    *,
    boundary: str | None = None,
    compute_loss_func: Callable[..., Tensor] | None = None,
    trainer_class: type[transformers.Trainer] = FSAMTrainer,
    **arguments: object,
) -> None:
    """Train `model` in place."""
    trainer = trainer_class(
        model,
        args=FSAMTrainingArguments(
            output_dir=str(output_dir),
            fsam_variant=setting.variant,
            fsam_rho=setting.rho,
            fsam_precondition=setting.precondition,
            fsam_ascent_scope=setting.scope,
            fsam_ascent_direction=setting.direction,
            fsam_every_steps=setting.every,
            fsam_boundary=boundary,
            per_device_train_batch_size=BATCH_SIZE,
            gradient_accumulation_steps=setting.accumulation,
            num_train_epochs=setting.epochs,
            max_grad_norm=setting.max_grad_norm,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **ON_DEVICE,
            **arguments,
        ),
        train_dataset=examples,
        optimizers=(optimizer_factory(model), None),
        compute_loss_func=compute_loss_func,
    )
    trainer.train()
    assert trainer.state.global_step == STEPS


def train_with_reference(
    model: nn.Module,
    problem: Problem,
    examples: list[Example],
    setting: Setting,
    optimizer_factory: OptimizerFactory,
) -> Tensors:
    return reference.train(
        model,
        problem,
        zoo.batches(examples, BATCH_SIZE),
        variant=setting.variant,
        rho=setting.rho,
        precondition=setting.precondition,
        scope=setting.scope,
        momentum=setting.direction == "momentum",
        perturbs=lambda step: step % setting.every == 0,
        accumulation=setting.accumulation,
        epochs=setting.epochs,
        max_grad_norm=setting.max_grad_norm,
        optimizer_factory=optimizer_factory,
    )


@functools.cache
def expected(name: str, setting: Setting) -> Tensors:
    """The reference's weights, for the zoo's model called `name`."""
    case = CASES[name]
    return train_with_reference(
        case.model(), case.problem, case.examples(setting.examples), setting, optimizer_for(case, setting)
    )


def distance(a: Tensors, b: Tensors) -> float:
    assert a.keys() == b.keys()
    return float(reference.norm({name: a[name].detach().double() - b[name].detach().double() for name in a}))


def assert_same_weights(model: nn.Module, start: nn.Module, wanted: Tensors) -> None:
    """The trained weights are the reference's, and all other weights and buffers have not changed by a bit."""
    trained, before = reference.trainable(model), reference.trainable(start)
    weights = {name: weight.detach().cpu() for name, weight in trained.items()}
    apart = distance(weights, wanted)
    by_weight = apart / float(reference.norm(wanted))
    by_movement = apart / distance(before, wanted)
    assert by_movement < MOVEMENT_TOLERANCE, f"{by_movement:.2e} of the way the reference went, {by_weight:.2e} of it"
    assert by_weight < WEIGHT_TOLERANCE, f"{by_weight:.2e} of the weights, {by_movement:.2e} of the way they went"

    for name, weight in weights.items():
        if torch.equal(wanted[name], before[name]):
            assert torch.equal(weight, before[name]), f"{name} gets no gradient, and changed (by weight decay?)"

    ids = {id(parameter) for parameter in trained.values()}
    for (name, after), value in zip(
        model.state_dict(keep_vars=True).items(), start.state_dict(keep_vars=True).values(), strict=True
    ):
        if id(after) not in ids:
            assert torch.equal(after.cpu(), value), f"{name} is not trained, and changed"


def check_parity(
    case: Case, setting: Setting, output_dir: Path, wanted: Tensors | None = None, **trainer_options: object
) -> None:
    examples = case.examples(setting.examples)
    optimizer_factory = optimizer_for(case, setting)
    model = case.model()
    start = copy.deepcopy(model)
    case.check(copy.deepcopy(model), zoo.batches(examples, BATCH_SIZE)[0])
    if wanted is None:
        wanted = train_with_reference(model, case.problem, examples, setting, optimizer_factory)
    train_with_trainer(
        model, examples, setting, optimizer_factory, output_dir, boundary=case.boundary, **trainer_options
    )
    assert_same_weights(model, start, wanted)


# Every model and every setting ----------------------------------------------------------------------------------------

VARIANTS = [("none", False), ("sam", False), ("functional", False), ("logit", False), ("functional", True)]
SETTINGS = [
    Setting(variant, precondition, accumulation, scope)
    for variant, precondition in VARIANTS
    for accumulation in (1, 3)
    for scope in ("micro_batch", "optimizer_step")
]
ALWAYS = {
    *(Setting(variant, precondition, accumulation=3) for variant, precondition in VARIANTS),
    Setting("functional"),
    Setting("functional", accumulation=3, scope="optimizer_step"),
    Setting("functional", precondition=True, accumulation=3, scope="optimizer_step"),
}
ALWAYS_WHOLE = {"gpt2"}


def product() -> Iterator[object]:
    for name in CASES:
        for setting in SETTINGS:
            marks = () if setting in ALWAYS or name in ALWAYS_WHOLE else pytest.mark.slow
            yield pytest.param(name, setting, marks=marks, id=f"{name}-{setting}")


@pytest.mark.parametrize(("name", "setting"), list(product()))
def test_trained_weights_agree_with_the_formulas(name: str, setting: Setting, tmp_path: Path) -> None:
    check_parity(CASES[name], setting, tmp_path, wanted=expected(name, setting))


@pytest.mark.parametrize("name", CASES)
def test_the_reference_tells_the_variants_apart(name: str) -> None:
    """Without this, parity could hold because nothing depends on the variant, the scope or the preconditioner."""
    start = reference.trainable(CASES[name].model())
    settings = [Setting(variant, accumulation=3) for variant in ("none", "sam", "functional", "logit")]
    settings += [Setting(variant, accumulation=3, scope="optimizer_step") for variant in ("sam", "functional", "logit")]
    ends = {setting: expected(name, setting) for setting in settings}
    movement = distance(start, ends[settings[0]])
    for i, one in enumerate(settings):
        for other in settings[:i]:
            assert distance(ends[one], ends[other]) > DISTINCT * movement, f"{one} and {other}"

    preconditioned = [Setting("functional", True, 3), Setting("functional", True, 3, "optimizer_step")]
    case = CASES[name]
    unpreconditioned = train_with_reference(
        case.model(), case.problem, case.examples(21), Setting("functional", accumulation=3), adamw
    )
    ends = [expected(name, setting) for setting in preconditioned] + [unpreconditioned]
    movement = distance(start, unpreconditioned)
    for i, one in enumerate(ends):
        for other in ends[:i]:
            assert distance(one, other) > SLIGHT * movement


# What else the plain Trainer does -------------------------------------------------------------------------------------

PERTURBED = [
    Setting("none", accumulation=3),
    Setting("sam", accumulation=3),
    Setting("functional", accumulation=3),
    Setting("logit", accumulation=3),
    Setting("functional", True, 3),
    Setting("functional", accumulation=3, scope="optimizer_step"),
    Setting("functional", True, 3, "optimizer_step"),
]
perturbed = pytest.mark.parametrize("setting", PERTURBED, ids=str)


@perturbed
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert_classification", "roberta_tokens"])
def test_label_smoothing_agrees_with_the_formulas(name: str, setting: Setting, tmp_path: Path) -> None:
    case = CASES[name]
    smoothed = reference.label_smoothing(shift=name in ("gpt2", "llama"), factor=0.1)
    case = replace(case, problem=replace(case.problem, loss=smoothed))
    check_parity(case, setting, tmp_path, label_smoothing_factor=0.1)


CHEAPER = {
    "momentum": Setting("functional", accumulation=3, direction="momentum"),
    "momentum-preconditioned": Setting("functional", True, 3, direction="momentum"),
    "momentum-optimizer_step": Setting("functional", True, 3, "optimizer_step", direction="momentum"),
    "every_third": Setting("functional", accumulation=3, every=3),
    "every_second_sam": Setting("sam", every=2),
    "every_second_window": Setting("functional", True, 3, "optimizer_step", every=2),
    "all_together": Setting("functional", True, 3, direction="momentum", every=2),
}


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "bert_classification",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama_lora", "llama_frozen")),
    ],
)
@pytest.mark.parametrize("cheaper", CHEAPER)
def test_cheaper_ascents_agree_with_the_formulas(name: str, cheaper: str, tmp_path: Path) -> None:
    setting = CHEAPER[cheaper]
    check_parity(CASES[name], setting, tmp_path, wanted=expected(name, setting))


@pytest.mark.parametrize("name", ["gpt2", "bert_classification"])
def test_the_reference_tells_cheaper_ascents_apart(name: str) -> None:
    start = reference.trainable(CASES[name].model())
    exact = [Setting("functional", accumulation=3), Setting("functional", True, 3), Setting("none", accumulation=3)]
    ends = {setting: expected(name, setting) for setting in [*exact, *CHEAPER.values()] if setting.accumulation == 3}
    movement = distance(start, ends[exact[0]])
    for one, end in ends.items():
        for other in ends:
            assert one == other or distance(end, ends[other]) > 1e-3 * movement, (one, other)


def loss_with_penalty(logits: Tensor, labels: Tensor, num_items: int | Tensor) -> Tensor:
    """The next-token loss with a penalty on the partition function, as a user's own loss may have one."""
    scores, targets = reference.shifted(logits, labels)
    penalty = (scores.logsumexp(-1).square() * (targets != IGNORED)).sum()
    return (reference.nll_sum(scores, targets) + 0.1 * penalty) / num_items


@perturbed
def test_a_compute_loss_func_agrees_with_the_formulas(setting: Setting, tmp_path: Path) -> None:
    def through_the_trainer(outputs: object, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return loss_with_penalty(outputs["logits"], labels, num_items_in_batch)

    def through_the_reference(logits: reference.Logits, batch: Batch, window: Window) -> Tensor:
        return loss_with_penalty(logits[0], batch["labels"], window.num_items)

    case = CASES["qwen3"]
    case = replace(case, problem=replace(case.problem, loss=through_the_reference))
    check_parity(case, setting, tmp_path, compute_loss_func=through_the_trainer)


@perturbed
@pytest.mark.parametrize("name", ["llama", "bert_question_answering"])
def test_clipping_leaves_the_ascent_gradient_alone(name: str, setting: Setting, tmp_path: Path) -> None:
    """The gradient that the optimizer gets is clipped, the ascent gradient is not."""
    setting = replace(setting, max_grad_norm=0.05)
    wanted = expected(name, setting)
    unclipped = expected(name, replace(setting, max_grad_norm=0.0))
    assert distance(wanted, unclipped) > DISTINCT * distance(reference.trainable(CASES[name].model()), wanted)
    check_parity(CASES[name], setting, tmp_path, wanted=wanted)


def grouped_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups whose settings all differ. The norms' weights are in neither: they get gradients, but no steps."""
    parameters = reference.trainable(model)
    one = [parameter for name, parameter in parameters.items() if "layers.0" in name and "norm" not in name]
    other = [parameter for name, parameter in parameters.items() if "layers.0" not in name and "norm" not in name]
    return torch.optim.AdamW(
        [
            {"params": one, "lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-2},
            {"params": other, "lr": 0.005, "weight_decay": 0.0, "betas": (0.9, 0.99), "eps": 1e-3},
        ]
    )


@perturbed
def test_parameter_groups_have_their_own_preconditioner_and_one_norm_together(setting: Setting, tmp_path: Path) -> None:
    """v̂ and eps come from each parameter's own group. The norm of d goes over all groups, and over the parameters that
    are in none."""
    case = CASES["llama"]
    model, examples = case.model(), case.examples(setting.examples)
    start = copy.deepcopy(model)
    wanted = train_with_reference(model, case.problem, examples, setting, grouped_adamw)
    train_with_trainer(model, examples, setting, grouped_adamw, tmp_path)
    assert_same_weights(model, start, wanted)


@perturbed
def test_a_micro_batch_without_labels_adds_nothing_to_its_window(setting: Setting, tmp_path: Path) -> None:
    """Its gradient is zero: there is no perturbation, no NaN, and no change to the gradients of the window's others."""
    case = CASES["llama"]

    def examples(count: int) -> list[Example]:
        drawn = case.examples(count)
        for silent in (2, 3, 20):  # the second micro-batch of the first window, and the epoch's last
            drawn[silent]["labels"] = torch.full_like(drawn[silent]["labels"], IGNORED)
        return drawn

    model, drawn = case.model(), examples(setting.examples)
    start = copy.deepcopy(model)
    factory = optimizer_for(case, setting)
    wanted = train_with_reference(model, case.problem, drawn, setting, factory)
    assert all(weight.isfinite().all() for weight in wanted.values())
    train_with_trainer(model, drawn, setting, factory, tmp_path)
    assert_same_weights(model, start, wanted)


def silent_where_nothing_counts(
    loss: Callable[[reference.Logits, Batch, Window], Tensor], of_window: bool
) -> Callable[[reference.Logits, Batch, Window], Tensor]:
    """The loss, with 0 in place of 0 / 0 where no label counts. The plain Trainer's gradient is 0 there, too."""

    def guarded(logits: reference.Logits, batch: Batch, window: Window) -> Tensor:
        count = window.num_items if of_window else reference.count_shifted_labels(batch)
        return loss(logits, batch, window) if count else 0.0 * logits[0].sum()

    return guarded


SILENT = {
    "micro_batch": [replace(setting, accumulation=1) for setting in PERTURBED[:5]],
    "window": [*PERTURBED[5:], Setting("functional", True, 3, "optimizer_step", direction="momentum")],
}


@pytest.mark.parametrize("kind", ["sum", "smoothed", "mean", "logits"])
@pytest.mark.parametrize("setting", [*SILENT["micro_batch"], *SILENT["window"]], ids=str)
def test_an_optimizer_step_without_labels_has_a_zero_gradient(setting: Setting, kind: str, tmp_path: Path) -> None:
    """As it has under the plain Trainer. The first step has no labels, nor have the third and the last."""
    case = CASES["llama"]
    loss, options = case.problem.loss, {}
    if kind == "smoothed":
        loss, options = reference.label_smoothing(shift=True, factor=0.1), {"label_smoothing_factor": 0.1}
    if kind == "logits":
        options = {"fsam_fused_head": False}
    if kind == "mean":

        def loss(logits: reference.Logits, batch: Batch, window: Window) -> Tensor:
            scores, targets = reference.shifted(logits[0], batch["labels"])
            return reference.nll_sum(scores, targets) / (targets != IGNORED).sum() / len(window.batches)

        options = {"trainer_class": type("OwnMeans", (FSAMTrainer,), {"loss_is_scaled_for_ga": False})}
    problem = replace(case.problem, loss=silent_where_nothing_counts(loss, of_window=kind != "mean"))
    drawn, window = case.examples(setting.examples), BATCH_SIZE * setting.accumulation
    for step in (0, 2, -(-setting.examples // window) - 1):
        for example in drawn[step * window : (step + 1) * window]:
            example["labels"] = torch.full_like(example["labels"], IGNORED)
    model = case.model()
    if kind == "mean":
        model.accepts_loss_kwargs = False
    start, factory = copy.deepcopy(model), optimizer_for(case, setting)
    wanted = train_with_reference(model, problem, drawn, setting, factory)
    train_with_trainer(model, drawn, setting, factory, tmp_path, **options)
    assert_same_weights(model, start, wanted)


@perturbed
@pytest.mark.parametrize(
    ("name", "boundary"),
    [("gpt2", "lm_head"), ("bert_classification", "classifier"), ("bert_question_answering", "qa_outputs")],
)
def test_a_head_named_as_the_boundary_is_the_head_that_is_found(
    name: str, boundary: str, setting: Setting, tmp_path: Path
) -> None:
    """Training ends where it does without `fsam_boundary`."""
    check_parity(replace(CASES[name], boundary=boundary), setting, tmp_path, wanted=expected(name, setting))


@pytest.mark.parametrize("setting", [s for s in PERTURBED if s.variant in ("functional", "logit")], ids=str)
def test_what_follows_a_boundary_before_the_head_belongs_to_the_loss(setting: Setting, tmp_path: Path) -> None:
    """A tanh and a linear layer follow the named module.

    The layer is frozen: the formulas do not cover a loss whose own weights move by ε.
    """

    def build() -> nn.Module:
        model = zoo.Classifier()
        model.last.requires_grad_(False)
        return model

    case = replace(CASES["own_module"], build=build, boundary="body.2")
    head = nn.Sequential(nn.Tanh(), case.model().last)

    def loss(logits: reference.Logits, batch: Batch, window: Window) -> Tensor:
        return reference.mean_loss_over_window((head(logits[0]),), batch, window)

    case = replace(case, problem=Problem(loss, logits=reference.head_logits("body.2")))
    wanted = train_with_reference(
        case.model(), case.problem, case.examples(setting.examples), setting, optimizer_for(case, setting)
    )
    whole = train_with_reference(
        case.model(),
        CASES["own_module"].problem,
        case.examples(setting.examples),
        setting,
        optimizer_for(case, setting),
    )
    assert distance(wanted, whole) > SLIGHT * distance(wanted, reference.trainable(case.model()))
    check_parity(case, setting, tmp_path, wanted=wanted)


@pytest.mark.parametrize("variant", ["sam", "functional", "logit"])
def test_in_one_process_the_scope_rank_is_micro_batch(variant: reference.Variant, tmp_path: Path) -> None:
    """m-SAM in a single process: the micro-batch of its rank is the whole micro-batch."""
    setting = Setting(variant, accumulation=3)
    check_parity(CASES["gpt2"], replace(setting, scope="rank"), tmp_path, wanted=expected("gpt2", setting))


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "bert_question_answering", "llama_lora"])
def test_variant_none_trains_bit_for_bit_as_the_plain_trainer(name: str, accumulation: int, tmp_path: Path) -> None:
    setting = Setting("none", accumulation=accumulation)
    case = CASES[name]
    ends = []
    for trainer_class in (FSAMTrainer, transformers.Trainer):
        model = case.model()
        train_with_trainer(
            model,
            case.examples(setting.examples),
            setting,
            optimizer_for(case, setting),
            tmp_path,
            trainer_class=trainer_class,
        )
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[1])


@pytest.mark.parametrize("variant", ["sam", "functional", "logit"])
def test_rho_zero_trains_as_the_plain_trainer(variant: reference.Variant, tmp_path: Path) -> None:
    wanted = expected("gpt2", Setting("none", accumulation=3))
    check_parity(CASES["gpt2"], Setting(variant, accumulation=3, rho=0.0), tmp_path, wanted=wanted)


def test_where_only_the_head_is_trained_functional_sam_gives_the_plain_gradient(tmp_path: Path) -> None:
    """F is linear in θ, so J does not depend on θ, and Functional-SAM's gradient is the plain one at any radius."""

    def build() -> nn.Module:
        model = zoo.vit()
        model.vit.requires_grad_(False)
        return model

    case = replace(CASES["vit"], build=build)
    setting = Setting("none", accumulation=3)
    wanted = train_with_reference(
        case.model(), case.problem, case.examples(setting.examples), setting, optimizer_for(case, setting)
    )
    check_parity(case, replace(setting, variant="functional"), tmp_path, wanted=wanted)


# Dropout --------------------------------------------------------------------------------------------------------------


class RandomStream:
    """The state of the random stream as the Trainer first calls the model."""

    def __init__(self, model: nn.Module) -> None:
        self.start: Tensor | None = None
        model.register_forward_pre_hook(self.remember)

    def remember(self, module: nn.Module, args: tuple[object, ...]) -> None:
        if self.start is None:
            self.start = torch.get_rng_state()


@pytest.mark.skipif(
    DEVICE.type != "cpu", reason="the reference draws on the CPU; `make gpu` compares masks with plain ones"
)
@pytest.mark.parametrize("setting", [replace(setting, one_epoch=True) for setting in SETTINGS], ids=str)
def test_dropout_masks_are_the_plain_trainers_in_both_passes(setting: Setting, tmp_path: Path) -> None:
    """Both passes draw the same masks, and the next micro-batch draws those that the plain Trainer would give it.

    In one epoch nothing but the model draws random numbers between its first call and its last.
    """
    case = replace(CASES["gpt2"], build=functools.partial(zoo.gpt2, dropout=0.2))
    examples = case.examples(setting.examples)
    factory = optimizer_for(case, setting)
    model = case.model()
    start = copy.deepcopy(model)

    stream = RandomStream(model)
    train_with_trainer(model, examples, setting, factory, tmp_path)
    end = torch.get_rng_state()
    assert stream.start is not None
    with torch.random.fork_rng():
        torch.set_rng_state(stream.start)
        wanted = train_with_reference(start, case.problem, examples, setting, factory)
        assert torch.equal(torch.get_rng_state(), end)
    assert_same_weights(model, start, wanted)


# The reference itself -------------------------------------------------------------------------------------------------


def in_double(name: str) -> tuple[nn.Module, Problem, list[Batch]]:
    case = CASES[name]
    drawn = zoo.batches(case.examples(5), BATCH_SIZE)
    double = [{key: x.double() if x.is_floating_point() else x for key, x in batch.items()} for batch in drawn]
    return case.model().double(), case.problem, double


@pytest.mark.parametrize("name", ["gpt2", "bert_question_answering", "roberta_tokens", "vit"])  # double throughout
@pytest.mark.parametrize("scope", ["micro_batch", "optimizer_step"])
def test_the_two_paths_of_the_reference_add_up_to_sam(name: str, scope: reference.Scope) -> None:
    """(functional - none) + (logit - none) = (sam - none) + O(ρ²): with a tenth of ρ, the rest is a hundredth."""
    model, problem, batches = in_double(name)
    theta = reference.trainable(model)

    def rest(rho: float) -> tuple[float, float]:
        none, sam, functional, logit = (
            reference.window_gradient(problem, model, theta, batches, variant=variant, rho=rho, scope=scope)
            for variant in ("none", "sam", "functional", "logit")
        )
        left = {key: functional[key] + logit[key] - none[key] - sam[key] for key in none}
        return float(reference.norm(left)), distance(sam, none)

    (small, first_order), (large, _) = rest(1e-4), rest(1e-3)
    assert small < 0.05 * first_order
    assert 80 < large / small < 125


@pytest.mark.parametrize(  # DoRA is not among them: it detaches a norm, so that its gradient has no potential
    "name", ["gpt2", "llama", "bert_question_answering", "t5", "llama_lora", "llama_prompt_tuning", "own_module"]
)
def test_the_reference_has_the_formulas_derivatives(name: str) -> None:
    """By double backward, with d̂ = g / ‖g‖: d/dρ of sam is H d̂, of functional Σₖ uₖ ∇²Fₖ d̂ with u held fixed."""
    model, problem, batches = in_double(name)
    theta = reference.trainable(model)
    batch = batches[0]
    window = Window([batch], problem.count(batch))

    def slope_at_zero(variant: reference.Variant, rho: float = 1e-3) -> Tensors:
        """A central difference. Its step is large because Llama and T5 normalize in fp32 even in a double model."""
        up, down = (
            reference.window_gradient(problem, model, theta, [batch], variant=variant, rho=r) for r in (rho, -rho)
        )
        return {key: (up[key] - down[key]) / (2 * rho) for key in up}

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the one with second derivatives
        weights = reference.leaves(theta)
        logits = problem.logits(model, weights, problem.inputs(batch))
        loss = problem.loss(logits, batch, window)
        cotangent = [u.detach() for u in torch.autograd.grad(loss, logits, retain_graph=True)]
        along_logits = sum((u * z).sum() for u, z in zip(cotangent, logits, strict=True))
        for variant, scalar in (("sam", loss), ("functional", along_logits)):
            names = list(weights)
            gradient = torch.autograd.grad(scalar, list(weights.values()), create_graph=True, allow_unused=True)
            used = {key: g for key, g in zip(names, gradient, strict=True) if g is not None}
            length = reference.norm(used).detach()
            slope = sum((g * g.detach()).sum() / length for g in used.values())
            curvature = torch.autograd.grad(
                slope, [weights[key] for key in used], retain_graph=True, allow_unused=True, materialize_grads=True
            )
            wanted = dict(zip(used, curvature, strict=True))
            got = slope_at_zero(variant)
            assert distance(got, wanted) < 2e-3 * float(reference.norm(wanted)), variant
