"""Every error and warning of the package: what provokes it, a piece of its text, and that the cure it names works."""

import ast
import copy
import functools
import itertools
import json
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, TorchDynamoPlugin
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

import hf_fsam
from hf_fsam import FSAMDiagnosticsCallback, FSAMMixin, FSAMTrainer
from hf_fsam.diagnostics.probe import Probe
from hf_fsam.engines import base, select_engine
from hf_fsam.engines.deepspeed import (
    FlatDeepSpeedEngine,
    ReplicatedDeepSpeedEngine,
)
from hf_fsam.engines.fsdp import FSDPEngine
from hf_fsam.optimizer_state import second_moments_of_shards
from hf_fsam.rho import main as rho
from hf_fsam.run import main as run_script
from hf_fsam.studies.compare import parse, run_study
from hf_fsam.studies.runner import Runner, read_results
from hf_fsam.studies.study import load_studies
from tests.engines.test_selection import config, select, select_fsdp
from tests.tools.studies import RECIPE
from tests.toys import VOCABULARY, adapted, gpt2, llama, make_trainer
from tests.unit.test_arguments import _Lion
from tests.unit.test_find_boundary import ROWS, _Headless
from tests.unit.test_step import SkipsNotFinite

PACKAGE = Path(hf_fsam.__file__).parent
Run = Callable[[Path], Any]


@dataclass(frozen=True)
class Row:
    """
    Attributes:
        text: a piece of the message, as it stands in the source and is shown.
        provoke: raises the message or, where `logged`, trains and logs it.
        cure: does what the message says, and neither raises nor logs it. None: the message asks for nothing.
    """

    text: str
    provoke: Run
    cure: Run | None
    logged: bool = False


def trains(model: Callable[[], nn.Module] = llama, **kwargs: Any) -> Run:
    """Two training steps of the toy model."""

    def run(folder: Path) -> Trainer:
        made = {name: value() if name == "trainer" and callable(value) else value for name, value in kwargs.items()}
        trainer = make_trainer(folder, model(), **{"max_steps": 2, "logging_steps": 1, **made})
        trainer.train()
        assert trainer.state.global_step == trainer.args.max_steps
        return trainer

    return run


def argument(text: str, bad: dict[str, Any], good: dict[str, Any]) -> Row:
    return Row(text, trains(**bad), trains(**good))


# ---- Arguments and boundary ----


class _Identity(_Headless):
    """The cure for a loss that takes two tensors of the function."""

    def __init__(self) -> None:
        super().__init__(past=True)
        self.boundary = nn.Identity()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.boundary(self.body(x))
        logits = self.boundary(self.top(self.body(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels) + hidden.square().mean(), "logits": logits}


class _Unused(_Headless):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(4, 3)


own = partial(trains, trainer={"train_dataset": ROWS})
with_identity = own(_Identity, fsam_boundary="boundary")

ARGUMENTS = [
    argument("is unknown: choose one of", {"fsam_variant": "SAM"}, {"fsam_variant": "sam"}),
    argument("is not a radius: give 0", {"fsam_rho": 1e39}, {"fsam_rho": 0}),
    argument("is not a count of steps: give a whole", {"fsam_every_steps": 0}, {"fsam_every_steps": 1}),
    argument("is neither True nor False: give one", {"fsam_precondition": "yes"}, {"fsam_precondition": True}),
    argument("is not a module's name: give one of", {"fsam_boundary": ""}, {"fsam_boundary": "lm_head"}),
    argument(
        "Set fsam_ascent_direction='gradient'",
        {"fsam_ascent_direction": "momentum", "fsam_variant": "sam"},
        {"fsam_ascent_direction": "gradient", "fsam_variant": "sam"},
    ),
    Row("no boundary between function and loss", own(_Headless), own(_Headless, fsam_boundary="top")),
    Row("none', which need none", own(_Headless), own(_Headless, fsam_variant="sam")),
    Row("Where several modules make together what", own(_Identity), with_identity),
    Row("is no module of", trains(fsam_boundary="head"), trains(fsam_boundary="lm_head")),
    Row("fsam_boundary='' is no module of", trains(fsam_boundary="lm_head,"), trains(fsam_boundary="lm_head")),
    Row("nothing crossed the boundary", own(_Unused), own(_Unused, fsam_boundary="top")),
    Row(
        "but the boundary must return",
        trains(lambda: adapted(gpt2()), fsam_boundary="base_model.model"),
        trains(lambda: adapted(gpt2()), fsam_boundary="lm_head"),
    ),
    Row("one tensor is computed from", own(_Headless, fsam_boundary="body, top"), own(_Headless, fsam_boundary="top")),
    Row("on ways past the boundary", trains(fsam_boundary="model.embed_tokens"), trains(fsam_boundary="lm_head")),
    Row(
        "on a way past the boundary",
        own(partial(_Headless, past=True), fsam_boundary="top"),
        with_identity,
        logged=True,
    ),
]

# ---- Ways of running ----


def runs(where: str, bad: Any, good: Any) -> dict[str, Run]:
    """Hands `select_engine` a trainer whose attribute `where` is set by hand, for ways of running that take minutes, or
    more than one device."""

    def provoke(value: Any, folder: Path) -> None:
        trainer = make_trainer(folder, fsam_variant="none")
        accelerator = SimpleNamespace(
            distributed_type=trainer.accelerator.distributed_type,
            parallelism_config=None,
            mixed_precision="no",
            state=SimpleNamespace(dynamo_plugin=TorchDynamoPlugin()),
        )
        view = SimpleNamespace(
            args=trainer.args,
            accelerator=accelerator,
            is_model_parallel=False,
            is_distributed_loading_by_transformers=False,
            model=trainer.model,
        )
        *path, name = where.split(".")
        setattr(getattr(view, path[0]) if path else view, name, value() if callable(value) else value)
        select_engine(view)

    return {"provoke": partial(provoke, bad), "cure": partial(provoke, good)}


def compiled(mode: str | None = None, inner: bool = False, wrapped: bool = False, **options: Any) -> nn.Module:
    model = llama()
    if wrapped:
        return torch.compile(model, mode=mode, **options)
    (model.model.layers[0] if inner else model).compile(mode=mode, **options)
    return model


def replaced(mode: str) -> nn.Module:
    model = llama()
    model.forward = torch.compile(model.forward, mode=mode)
    return model


def of_dtype(dtype: torch.dtype, frozen: bool = False) -> Callable[[], nn.Module]:
    class Odd(_Headless):
        def __init__(self) -> None:
            super().__init__()
            self.odd = nn.Parameter(torch.zeros(3).to(dtype), requires_grad=not frozen)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            outputs = super().forward(x, labels)
            odd = torch.view_as_real(self.odd) if self.odd.is_complex() else self.odd
            return outputs | {"loss": outputs["loss"] + odd.float().sum()}

    return Odd


def hooked(hook: bool) -> nn.Module:
    model = llama()
    if hook:
        model.lm_head.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    return model


def embedding(sparse: bool) -> nn.Module:
    model = llama()
    model.model.embed_tokens = nn.Embedding(VOCABULARY, 16, sparse=sparse)
    return model


class _Generates(Trainer):
    """Trains on text that it generates in the loss."""

    @property
    def generates_now(self) -> bool:
        return True

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.generates_now:
            self.text = model.generate(inputs["input_ids"][:, :2], max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
        return super().compute_loss(model, {"input_ids": self.text, "labels": self.text}, *args, **kwargs)


class _FSAMGenerates(FSAMMixin, _Generates):
    pass


class _FSAMGeneratesOnce(_FSAMGenerates):
    @property
    def generates_now(self) -> bool:
        return self.fsam_pass != "second"


class _Prepares(Trainer):
    """Trains on text that it generates before the loss."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        start = inputs["input_ids"][:, :2]
        text = self.model.generate(start, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
        return super()._prepare_inputs({"input_ids": text, "labels": text})


class _FSAMPrepares(FSAMMixin, _Prepares):
    pass


class _Counts(_Prepares):
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().training_step(*args, **kwargs)


class _FSAMCounts(FSAMMixin, _Counts):
    pass


class _Samples(TrainerCallback):
    """Generates text to look at, not to train on."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=2)


def inductor(graphs: bool) -> Run:
    def run(folder: Path) -> None:
        import torch._inductor.config

        with torch._inductor.config.patch("triton.cudagraphs", graphs):
            make_trainer(folder, torch_compile=True)

    return run


def deepspeed(bad: dict[str, Any], good: dict[str, Any]) -> dict[str, Run]:
    def run(settings: dict[str, Any], folder: Path) -> None:
        arguments = {name: value for name, value in settings.items() if name.startswith("fsam_")}
        select(config(2) | {name: value for name, value in settings.items() if name not in arguments}, **arguments)

    return {"provoke": partial(run, bad), "cure": partial(run, good)}


def enters(engine: Any, average: bool) -> Run:
    def run(folder: Path) -> None:
        engine(Accelerator(cpu=True)).ascent(llama(), [], average=average, passes=1).__enter__()

    return run


def adam_inside(betas: tuple[float, float]) -> Run:
    def run(folder: Path) -> None:
        weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
        groups = [{"params": weights[:1]}, {"params": weights[1:], "betas": betas}]
        optimizer = torch.optim.AdamW(groups)
        sum(weight.sum() for weight in weights).backward()
        optimizer.step()
        second_moments_of_shards(optimizer, [])

    return run


def geometry(engine: type, **arguments: Any) -> Run:
    def run(folder: Path) -> None:
        trainer = make_trainer(folder, **arguments)
        trainer.fsam_engine = lambda: engine(trainer.accelerator)
        trainer.fsam.forget_engine()
        if trainer.args.fsam_diagnostics_steps:
            Probe(trainer.fsam, 1)

    return run


ENGINES = [
    Row("DataParallel (n_gpu=", **runs("args._n_gpu", 2, 1)),
    Row("distributed_type=", **runs("accelerator.distributed_type", DistributedType.XLA, DistributedType.MULTI_GPU)),
    Row(
        "parallel_mode=",
        **runs("args", lambda: _args("sagemaker_model_parallel"), lambda: _args("distributed")),
    ),
    Row("choose mixed_precision='bf16'", **runs("accelerator.mixed_precision", "fp8", "bf16")),
    Row("load it without device_map", **runs("is_model_parallel", True, False)),
    Row("load it without distributed_config", **runs("is_distributed_loading_by_transformers", True, False)),
    Row(
        "set these sizes to 1",
        **runs("accelerator.parallelism_config", SimpleNamespace(tp_enabled=True), SimpleNamespace(tp_enabled=False)),
    ),
    Row("steps inside the backward pass", **runs("args.optim", "galore_adamw_layerwise", "galore_adamw")),
    Row("steps inside the backward pass", **runs("args.optim", "adalomo", "adamw_torch")),
    Row("set torch_compile_mode=", **runs("args.torch_compile_mode", "reduce-overhead", "default")),
    Row("set torch_compile_backend='inductor'", **runs("args.torch_compile_backend", "cudagraphs", "inductor")),
    Row(
        "compile it with mode='default'",
        **runs("model", partial(compiled, "reduce-overhead"), partial(compiled, "default")),
    ),
    Row(
        "model.layers.0 is compiled with them",
        **runs("model", partial(compiled, "max-autotune", inner=True), partial(compiled, inner=True)),
    ),
    Row(
        "OptimizedModule is compiled with them",
        **runs(
            "model",
            partial(compiled, wrapped=True, options={"triton.cudagraphs": True}),
            partial(compiled, "max-autotune-no-cudagraphs", wrapped=True),
        ),
    ),
    Row(
        "LlamaForCausalLM is compiled with them",
        **runs("model", partial(replaced, "reduce-overhead"), partial(replaced, "default")),
    ),
    Row(
        "Generate it in _prepare_inputs",
        trains(trainer_class=_FSAMGenerates),
        trains(trainer_class=_FSAMPrepares, trainer={"callbacks": [_Samples()]}),
    ),
    Row(
        "_FSAMGenerates: compute_loss generates text",
        trains(trainer_class=_FSAMGenerates),
        trains(trainer_class=_FSAMGeneratesOnce),
    ),
    *(
        Row(
            "whose _prepare_inputs may go by how often",
            trains(trainer_class=_FSAMCounts, gradient_accumulation_steps=2, fsam_ascent_scope="optimizer_step"),
            trains(trainer_class=_FSAMCounts, **settings),
        )
        for settings in (
            {"gradient_accumulation_steps": 2, "fsam_ascent_scope": "micro_batch"},
            {"gradient_accumulation_steps": 1, "fsam_ascent_scope": "optimizer_step"},
        )
    ),
    Row("torch.view_as_real", own(of_dtype(torch.complex64)), own(of_dtype(torch.float32), fsam_boundary="top")),
    Row(
        "torch.float8_e4m3fn (odd)",
        own(of_dtype(torch.float8_e4m3fn)),
        own(of_dtype(torch.float8_e4m3fn, frozen=True), fsam_boundary="top"),
    ),
    Row(
        "; or set fsam_variant='none'",
        trains(trainer_class=_FSAMCounts, gradient_accumulation_steps=2, fsam_ascent_scope="optimizer_step"),
        trains(trainer_class=_FSAMCounts, gradient_accumulation_steps=2, fsam_variant="none"),
    ),
    Row("set it to False, or 0", inductor(True), inductor(False)),
    Row("post-accumulate-gradient hooks", trains(partial(hooked, True)), trains(partial(hooked, False))),
    Row(
        "build the embedding with sparse=False",
        trains(partial(embedding, True), optim="sgd"),
        trains(partial(embedding, False), optim="sgd"),
    ),
    Row(
        "under DeepSpeed. Change that setting",
        **deepspeed({"pipeline": {"stages": 2}}, {}),
    ),
    Row(
        "under DeepSpeed. Change that setting",
        **deepspeed({"fsam_ascent_scope": "rank"}, {"fsam_ascent_scope": "rank", "fsam_precondition": False}),
    ),
    Row("under FSDP. Change that setting", lambda _: select_fsdp(version=1), lambda _: select_fsdp(version=2)),
    Row(
        base.RANK_SET_LATE,
        enters(FlatDeepSpeedEngine, False),
        lambda _: select(config(2), fsam_ascent_scope="micro_batch"),
    ),
    Row(
        base.RANK_SET_LATE,
        enters(ReplicatedDeepSpeedEngine, False),
        lambda _: select(config(1), fsam_ascent_scope="optimizer_step"),
    ),
    Row(base.RANK_SET_LATE, enters(FSDPEngine, False), lambda _: select_fsdp(fsam_ascent_scope="micro_batch")),
    Row("with one β₂ and one epsilon", adam_inside((0.9, 0.9)), adam_inside((0.9, 0.999))),
    Row("shards weights or gradients", geometry(FSDPEngine, fsam_diagnostics_steps=1), geometry(FSDPEngine)),
]


def _args(mode: str) -> Any:
    args = copy.copy(TrainingArguments("out", use_cpu=True))
    values = {name: getattr(args, name) for name in ("optim", "use_liger_kernel", "torch_compile_mode")}
    values |= {"n_gpu": 1, "torch_compile": False, "torch_compile_backend": None, "fsam_variant": "functional"}
    values |= {"fsam_ascent_scope": "micro_batch"}
    return SimpleNamespace(**values, parallel_mode=SimpleNamespace(value=mode))


# ---- Optimizers ----


class _Keeps(torch.optim.Optimizer):
    """Has Adam's settings, and keeps what a subclass's `kept` makes of a weight."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-8):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight] = {"step": 1, **self.kept(weight)}


class _LowRank(_Keeps):
    """One momentum and one second moment for each row of a weight."""

    def kept(self, weight: Tensor) -> dict[str, Tensor]:
        return {"exp_avg": weight.grad.mean(0), "exp_avg_sq": weight.grad.square().mean(0)}


class _Quantized(Tensor):
    """Stands for a format of an optimizer's own."""


class _EightBit(_Keeps):
    """Quantizes the state of large weights alone, as torchao's do."""

    def kept(self, weight: Tensor) -> dict[str, Tensor]:
        average = torch.zeros_like(weight)
        if weight.numel() >= 4096:
            average = average.as_subclass(_Quantized)
        return dict.fromkeys(("exp_avg", "exp_avg_sq"), average)


class _ScheduleFree(torch.optim.Optimizer):
    """Steps only in training mode, and begins in evaluation mode. The group counts its steps."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-8):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "k": 0})
        self.training = False

    def train(self) -> None:
        self.training = True

    def eval(self) -> None:
        self.training = False

    def step(self, closure: Any = None) -> None:
        if not self.training:
            raise RuntimeError("Optimizer was not in train mode when step is called.")
        for group in self.param_groups:
            group["k"] += 1
            for weight in group["params"]:
                self.state[weight] = {"z": weight.detach(), "exp_avg_sq": weight.grad.square()}


def with_optimizer(make: Callable[..., torch.optim.Optimizer], **arguments: Any) -> Run:
    def run(folder: Path) -> Trainer:
        model = llama()
        trainer = {"optimizers": (make(model.parameters()), None)}
        return trains(lambda: model, trainer=trainer, max_steps=4, **arguments)(folder)

    return run


class _PerturbsTheHead(FSAMTrainer):
    def fsam_perturbs(self, name: str, weight: Tensor) -> bool:
        return name == "lm_head.weight"


def head_trained(frozen: bool, **arguments: Any) -> Run:
    """The optimizer has the head's weights alone."""

    def run(folder: Path) -> Trainer:
        model = llama()
        model.model.requires_grad_(not frozen)
        return trains(lambda: model, trainer={"optimizers": (sgd(model.lm_head.parameters()), None)}, **arguments)(
            folder
        )

    return run


sgd = partial(torch.optim.SGD, lr=1e-3)
along_momentum = {"fsam_ascent_direction": "momentum"}
OPTIMIZERS = [
    Row(
        "divides by the optimizer's second moment",
        with_optimizer(sgd, fsam_precondition=True),
        with_optimizer(torch.optim.AdamW, fsam_precondition=True),
    ),
    Row(
        "_Lion keeps none that is known here: no 'exp_avg_sq', no 'step', no 'eps' (its state is exp_avg)",
        with_optimizer(_Lion, fsam_precondition=True),
        with_optimizer(_Lion, fsam_precondition=False),
    ),
    Row(
        "_ScheduleFree keeps none that is known here: no 'step' (its state is z, exp_avg_sq)",
        with_optimizer(_ScheduleFree, fsam_precondition=True),
        with_optimizer(_ScheduleFree, fsam_precondition=False),
    ),
    Row(
        "_EightBit keeps it in a format of its own (_Quantized)",
        with_optimizer(_EightBit, fsam_precondition=True),
        with_optimizer(_EightBit),
    ),
    Row(
        "keeps its momentum in a format of its own",
        with_optimizer(_EightBit, **along_momentum),
        with_optimizer(_EightBit, fsam_ascent_direction="gradient"),
    ),
    Row(
        "as low-rank optimizers do. Set fsam_precondition",
        with_optimizer(_LowRank, fsam_precondition=True),
        with_optimizer(_LowRank),
    ),
    Row(
        "as low-rank optimizers do. Choose optim='adamw_torch', or fsam_ascent_direction",
        with_optimizer(_LowRank, **along_momentum),
        with_optimizer(_LowRank),
    ),
    Row(
        "Choose an optimizer that has one, or fsam_ascent_direction='gradient'",
        with_optimizer(torch.optim.Adagrad, **along_momentum),
        with_optimizer(torch.optim.Adagrad, fsam_ascent_direction="gradient"),
    ),
    Row("are in no parameter group of the optimizer", head_trained(False), head_trained(True), logged=True),
    Row(
        "or let fsam_perturbs be false for them",
        head_trained(False),
        head_trained(False, trainer_class=_PerturbsTheHead),
        logged=True,
    ),
    Row(
        "the optimizer has none yet",
        with_optimizer(sgd, **along_momentum),
        with_optimizer(partial(sgd, momentum=0.9), **along_momentum),
        logged=True,
    ),
]

# ---- The step ----


def takes(trainer_class: type[Trainer], **arguments: Any) -> Run:
    return trains(trainer_class=trainer_class, **arguments)


class _Plain(Trainer):
    """A `training_step` of its own that never calls super."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


class _Above(FSAMTrainer):
    training_step = _Plain.training_step


class _Below(FSAMMixin, _Plain):
    pass


class _Fetches(FSAMTrainer):
    """Fetches the micro-batches by itself."""

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any = None) -> Any:
        return list(itertools.islice(epoch_iterator, num_batches)), None


over_window = {"gradient_accumulation_steps": 2, "fsam_ascent_scope": "optimizer_step"}


class _Twice(Trainer):
    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.compute_loss(model, self._prepare_inputs(inputs))
        return super().training_step(model, inputs, num_items_in_batch)


class _FSAMTwice(FSAMMixin, _Twice):
    pass


class _ReturnsDict(Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return {"loss": super().compute_loss(*args, **kwargs)}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)["loss"]
        self.accelerator.backward(loss)
        return loss.detach()


class _FSAMReturnsDict(FSAMMixin, _ReturnsDict):
    pass


class _Own(Trainer):
    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = model(**self._prepare_inputs(inputs)).loss
        self.accelerator.backward(loss)
        return loss.detach()


class _FSAMOwn(FSAMMixin, _Own):
    pass


class _BackPropagates(FSAMTrainer):
    """In its loss. What it returns is back-propagated by the Trainer."""

    by_itself = True

    def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().compute_loss(*args, **kwargs)
        if self.by_itself:
            self.accelerator.backward(loss.square(), retain_graph=True)
        return loss


class _ReturnsTheLoss(_BackPropagates):
    by_itself = False


class _Swaps(FSAMTrainer):
    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        return super().training_step(model, dict(inputs), *args)


def with_lock(locked: bool) -> Run:
    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return batch | ({"lock": threading.Lock()} if locked else {})

    return trains(trainer={"data_collator": collate})


def changes_the_logits(retried: bool, **arguments: Any) -> Run:
    """retried: the engine can run a forward pass again."""

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        outputs.logits[..., 0] = 0.0
        return nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())

    def run(folder: Path) -> None:
        trainer = make_trainer(folder, max_steps=1, trainer={"compute_loss_func": loss}, **arguments)
        trainer.fsam.engine.forward_can_be_retried = retried
        trainer.train()

    return run


def reads_in_the_second_pass(read: bool) -> Run:
    class Reads(FSAMTrainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            return loss + outputs.logits.square().mean() if read and self.fsam_pass == "second" else loss

    return trains(trainer_class=Reads)


def both_orders(first: str) -> Run:
    class OfMine(Trainer):
        pass

    return lambda _: type("Mine", (FSAMMixin, OfMine) if first == "mixin" else (OfMine, FSAMMixin), {})


class _Fickle(_Headless):
    """Its second pass computes another function."""

    def __init__(self, first: int, then: int, classes: int = 3) -> None:
        super().__init__()
        self.calls, self.crossings, self.then, self.classes = 0, first, then, classes

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        again = self.calls % 2 == 0
        logits = sum(self.top(self.body(x)) for _ in range(self.then if again else self.crossings))
        if again and self.classes != 3:
            logits = self.top(self.body(x[:1])).expand(len(x), 3)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def fickle(*settings: int) -> Run:
    return own(lambda: _Fickle(*settings), fsam_boundary="top")


def resumes(rho_then: float) -> Run:
    def run(folder: Path) -> None:
        if not (folder / "checkpoint-1").exists():
            trains(max_steps=1, save_strategy="steps", save_steps=1, fsam_rho=0.1)(folder)
        make_trainer(folder, max_steps=2, fsam_rho=rho_then).train(resume_from_checkpoint=str(folder / "checkpoint-1"))

    return run


def own_log_softmax(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return -(outputs.logits * outputs.logits).softmax(-1).log().mean()


class _WritesAscentInputs(FSAMTrainer):
    def fsam_ascent_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs["labels"][:, :2] = -100
        return inputs


class _RebindsAscentInputs(FSAMTrainer):
    def fsam_ascent_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs["labels"] = inputs["labels"].flip(0)
        return inputs


class _ReturnsAscentInputs(FSAMTrainer):
    def fsam_ascent_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs | {"labels": inputs["labels"].flip(0)}


class _PerturbsNothing(FSAMTrainer):
    def fsam_perturbs(self, name: str, weight: Tensor) -> bool:
        return False


STEP = [
    Row("names no trainable weight to perturb", takes(_PerturbsNothing), takes(_Below)),
    Row("stands before FSAMMixin", both_orders("trainer"), both_orders("mixin")),
    Row("does not call FSAMMixin's", takes(_Above), takes(_Below)),
    Row(
        "get_batch_samples of _Fetches does not call", takes(_Fetches, **over_window), takes(FSAMTrainer, **over_window)
    ),
    Row(
        "Let it call super().get_batch_samples, or",
        takes(_Fetches, **over_window),
        takes(_Fetches, gradient_accumulation_steps=2, fsam_ascent_scope="micro_batch"),
    ),
    Row("compute_loss was called twice", takes(_FSAMTwice), takes(_Below)),
    Row("it return a tensor, or a tuple that begins", takes(_FSAMReturnsDict), takes(_Below)),
    Row("returned a dict for the loss", takes(_FSAMReturnsDict), takes(_FSAMReturnsDict, fsam_variant="none")),
    Row("did not back-propagate the loss", takes(_FSAMOwn), takes(_Below)),
    Row("the batch counts as skipped", takes(type("Skips", (FSAMMixin, SkipsNotFinite), {})), None, logged=True),
    Row("_BackPropagates: compute_loss back-propagates by itself", takes(_BackPropagates), takes(_ReturnsTheLoss)),
    Row("which training_step back-propagates, or", takes(_BackPropagates), takes(_BackPropagates, fsam_variant="none")),
    Row("that cannot be copied", with_lock(True), with_lock(False)),
    Row("which takes logits in memory", changes_the_logits(False), changes_the_logits(False, fsam_fused_head=False)),
    Row("depends on the logits' values", reads_in_the_second_pass(True), reads_in_the_second_pass(False)),
    Row(
        "compute_loss was given another",
        takes(_Swaps, fsam_ascent_scope="optimizer_step"),
        takes(_Swaps, fsam_ascent_scope="micro_batch"),
    ),
    *(
        Row(
            "which the second pass has yet to take: leave",
            takes(trainer_class, fsam_ascent_scope=scope),
            takes(_ReturnsAscentInputs, fsam_ascent_scope=scope),
        )
        for trainer_class, scope in ((_WritesAscentInputs, "micro_batch"), (_RebindsAscentInputs, "optimizer_step"))
    ),
    Row("train_dataset is empty", trains(trainer={"train_dataset": []}), trains()),
    Row("recorded cotangents met no tensor", fickle(2, 1), fickle(1, 1)),
    Row("the second pass crossed the boundary", fickle(1, 2), fickle(2, 2)),
    Row("The checkpoint was trained with", resumes(0.2), resumes(0.1), logged=True),
    Row(
        "The fused head is off",
        trains(trainer={"compute_loss_func": own_log_softmax}),
        trains(trainer={"compute_loss_func": own_log_softmax}, fsam_fused_head=False),
        logged=True,
    ),
]

# ---- Diagnostics ----


class _Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()


def opaque() -> nn.Module:
    model = llama()
    model.model.norm.register_forward_hook(lambda module, args, output: _Opaque.apply(output))
    return model


def starved(method: str) -> Run:
    def run(folder: Path) -> None:
        def fail(*args: Any) -> None:
            raise torch.OutOfMemoryError

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Probe, method, fail)
            trains(fsam_diagnostics_steps=1)(folder)

    return run


def with_callback(every: int, **arguments: Any) -> Run:
    return trains(trainer=lambda: {"callbacks": [FSAMDiagnosticsCallback(every=every)]}, **arguments)


def plain_with_callback(folder: Path) -> None:
    plain = partial(TrainingArguments)
    with_callback(1, trainer_class=Trainer, arguments_class=plain)(folder)


DIAGNOSTICS = [
    Row(
        "the diagnostics and hf-fsam rho prepare a batch by themselves",
        trains(trainer_class=_FSAMCounts, fsam_diagnostics_steps=1),
        trains(trainer_class=_FSAMCounts, fsam_diagnostics_steps=0),
    ),
    Row(
        "and choose fsam_rho by hf-fsam compare",
        with_callback(1, trainer_class=_FSAMCounts),
        trains(trainer_class=_FSAMCounts),
    ),
    Row("is not a count: give 1 or more", with_callback(0), with_callback(1)),
    Row("give it to an FSAMTrainer", plain_with_callback, with_callback(1)),
    Row("needs a radius above 0", with_callback(1, fsam_rho=0), with_callback(1, fsam_rho=0.1)),
    Row("No Hessian for this model", trains(opaque, fsam_diagnostics_steps=1), None, logged=True),
    Row("computes its own backward pass", trains(opaque, fsam_diagnostics_steps=1), None, logged=True),
    Row("The diagnostics are not logged", starved("paths"), None, logged=True),
    Row("fsam/top_curvature is not logged: the device", starved("top_curvature"), None, logged=True),
]

# ---- Commands ----


def study(bad: dict[str, Any], good: dict[str, Any], overrides: dict[str, Any] | None = None) -> dict[str, Run]:
    def run(keys: dict[str, Any], given: dict[str, Any], folder: Path) -> None:
        (folder / "recipe.py").write_text(RECIPE)
        whole = {"recipe": "recipe.py", "arms": {"A": {}}, "seeds": [0]} | keys
        (folder / "study.yaml").write_text(yaml.safe_dump({name: each for name, each in whole.items() if each != ""}))
        list(load_studies(folder / "study.yaml", given))

    return {"provoke": partial(run, bad, overrides or {}), "cure": partial(run, good, {})}


def written(text: str) -> Run:
    def run(folder: Path) -> None:
        (folder / "config.yaml").write_text(text)
        study({}, {"config": "config.yaml"})["cure"](folder)

    return run


def compares(bad: dict[str, Any], good: dict[str, Any], recipe: str = RECIPE) -> dict[str, Run]:
    def run(recipe: str, keys: dict[str, Any], folder: Path) -> None:
        (folder / "recipe.py").write_text(recipe)
        whole = {"recipe": "recipe.py", "arms": {"A": {}}, "seeds": [0]} | keys
        (folder / "study.yaml").write_text(yaml.safe_dump(whole))
        for each in load_studies(folder / "study.yaml"):
            with Runner(each, folder / "out") as runner:
                run_study(each, runner)

    return {"provoke": partial(run, recipe, bad), "cure": partial(run, RECIPE, good)}


def line(*words: str) -> Run:
    def run(folder: Path) -> None:
        (folder / "study.yaml").touch()
        parse([str(folder / "study.yaml") if word == "STUDY" else word for word in words], "compare")

    return run


def in_use(busy: bool) -> Run:
    def run(folder: Path) -> None:
        (folder / "recipe.py").write_text(RECIPE)
        (folder / "study.yaml").write_text(yaml.safe_dump({"recipe": "recipe.py", "arms": {"A": {}}}))
        (only,) = load_studies(folder / "study.yaml")
        with Runner(only, folder / "out"), Runner(only, folder / ("out" if busy else "another")):
            pass

    return run


def left(name: str) -> Run:
    def run(folder: Path) -> None:
        (folder / name).write_text(json.dumps({"metrics": {"eval_loss": 1.0}}))
        read_results(folder, "eval_loss")

    return run


def finds(*options: str, named: str = "train.py", train: str = "trainer.train()") -> Run:
    def run(folder: Path) -> None:
        (folder / "train.py").write_text(
            f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n"
            "from tests.toys import make_trainer\n"
            f"trainer = make_trainer({str(folder)!r}, max_steps=2)\n"
            f"{train}\n"
        )
        rho(["--batches", "1", "--out", str(folder / "rho.png"), *(options or ("--after", "1")), str(folder / named)])

    return run


class Before(Trainer):
    """A class that is there before the script runs."""


RECIPE_WITH_A_TRAINER = """
from tests.toys import make_trainer
import transformers
classes = {"trainer_class": transformers.Trainer, "arguments_class": transformers.TrainingArguments}
make_trainer("FOLDER", max_steps=1, **classes).train()
"""
OF_A_CLASS_FROM_BEFORE = RECIPE_WITH_A_TRAINER.replace(
    "transformers.Trainer,", "__import__('tests.promises.test_messages').promises.test_messages.Before,"
)


def runs(script: str, *, before: tuple[str, ...] = (), after: tuple[str, ...] = ()) -> Run:
    def run(folder: Path) -> None:
        (folder / "train.py").write_text(script.replace("FOLDER", str(folder)))
        run_script([*before, str(folder / "train.py"), *after])

    return run


@functools.cache  # once is enough for several rows
def found() -> None:
    with tempfile.TemporaryDirectory() as folder:
        finds()(Path(folder))


COMMANDS = [
    Row("is not a key of", **study({"seedz": [1]}, {"seeds": [1]})),
    Row("} needs {".replace("}", "").replace("{", ""), **study({"arms": {}}, {"arms": {"A": None}})),
    Row("does not exist: give the path of a file", **study({"recipe": "nowhere.py"}, {"recipe": "recipe.py"})),
    Row("not `name: value` lines", written("- a list"), written("name: value")),
    Row("can't be read as YAML", written("a: b: c"), written("a: 'b: c'")),
    Row("`studies` is a list of YAML files", **study({"studies": ["a.yaml"]}, {})),
    Row(" is not a list of names", **study({"metrics": "eval_loss"}, {"metrics": ["eval_loss"]})),
    Row("not a mapping of settings to values", **study({"arms": {"A": "none"}}, {"arms": {"A": {"b": 1}}})),
    Row("is set by `compare` for every run", **study({"arms": {"A": {"seed": 3}}}, {"seeds": [3]})),
    Row(
        "would apply to all arms, but",
        **study({"arms": {"A": {"rate": 1}}}, {"arms": {"A": {"rate": 2}}}, overrides={"rate": 2}),
    ),
    Row("is not an arm; there are", **study({"baseline": "B"}, {"baseline": "A"})),
    Row(
        "are not better in the same direction",
        **study({"tune_on": "test_accuracy"}, {"tune_on": "test_loss"}),
    ),
    Row("is not the name of a file beside it", **study({"extends": "a/b.yaml"}, {})),
    Row("is not a list of whole numbers", **study({"seeds": [0.5]}, {"seeds": [5]})),
    Row("is not a number above 0", **study({"arms": {"A": {"passes": 0}}}, {"arms": {"A": {"passes": 2}}})),
    Row(
        "so tune on seeds that are not",
        **study(
            {"tuning_seeds": [0], "arms": {"A": {"rate": [1, 2]}}},
            {"tuning_seeds": [1], "arms": {"A": {"rate": [1, 2]}}},
        ),
    ),
    Row(
        "`greater_is_better: true`, or false",
        **study({"metrics": ["accuracy"]}, {"metrics": ["accuracy"], "greater_is_better": True}),
    ),
    Row("has no candidates", **study({"arms": {"A": {"rate": []}}}, {"arms": {"A": {"rate": [1]}}})),
    Row(
        "needs max_steps or num_train_epochs",
        **study({"arms": {"A": {"longer": 2}}}, {"arms": {"A": {"longer": 2, "max_steps": 3}}}),
    ),
    Row(
        "does not multiply the values of",
        **study(
            {"arms": {"A": {"longer": 2, "num_train_epochs": [3, 6]}}}, {"arms": {"A": {"num_train_epochs": [6, 12]}}}
        ),
    ),
    Row("each other in a circle", **study({"arms": {"A": {"like": "A"}}}, {"arms": {"A": {}}})),
    Row(" is none of ", **study({"arms": {"A": {"fsam_rh": 1}}}, {"arms": {"A": {"fsam_rho": 1}}})),
    Row("no candidate ended with a finite", **compares({"arms": {"A": {"diverge": [1, 2]}}}, {})),
    Row("has no metric", **compares({"metrics": ["loss"]}, {"metrics": ["eval_loss"]})),
    Row("the same command goes on from there", **compares({}, {}, recipe="raise SystemExit(3)")),
    Row("is in use by another `compare`", in_use(True), in_use(False)),
    Row("let the recipe write the first", left("other.json"), left("results.json")),
    Row("the study's YAML file comes before", line("--max_steps", "0", "STUDY"), line("STUDY", "--max_steps", "0")),
    Row("--parallel 0: give 1 or more", line("STUDY", "--parallel", "0"), line("STUDY", "--parallel", "1")),
    Row(
        "--parallel with --launch",
        line("STUDY", "--parallel", "2", "--launch", "torchrun"),
        line("STUDY", "--launch", "torchrun"),
    ),
    Row("a value without its name after", line("STUDY", "--a", "1", "2"), line("STUDY", "--a", "1")),
    Row("its value can't be read as YAML", line("STUDY", "--a", "[1"), line("STUDY", "--a", "[1]")),
    Row("has no value: give", line("STUDY", "--a"), line("STUDY", "--a", "1")),
    Row("nothing was trained with", runs("pass"), runs(RECIPE_WITH_A_TRAINER)),
    Row("would train plainly", runs(OF_A_CLASS_FROM_BEFORE), runs(RECIPE_WITH_A_TRAINER)),
    Row(
        "did not reach the training arguments",
        runs(RECIPE_WITH_A_TRAINER, after=("--fsam_rho", "0.2")),
        runs(RECIPE_WITH_A_TRAINER, before=("--fsam_rho", "0.2")),
    ),
    Row("are both what to run", **study({"script": "recipe.py"}, {})),
    Row("there is no module", **study({"recipe": None, "script": "-m nowhere.train"}, {"script": None})),
    Row("nothing was measured", finds(train=""), lambda _: found()),
    Row("give the path of a training script", finds(named="nowhere.py"), lambda _: found()),
    Row("--after 0: give 1 or more", finds("--after", "0"), lambda _: found()),
]

ROWS_OF_MESSAGES = [*ARGUMENTS, *ENGINES, *OPTIMIZERS, *STEP, *DIAGNOSTICS, *COMMANDS]

# Messages without a row: the test that provokes them, or why none does.
ELSEWHERE = {
    "can't be cut at the same places": "two tensors of the package's own that are not of one shape",
    "of no inputs": "test_extending.py",
    "and these take no fsam_* fields": "test_training_arguments_that_trl_cannot_take_name_the_class_that_it_can",
    "fsam_direction returned something": "as the row before",
    "The ascent has no gradient": "as the row before",
    "the Triton kernels do not start": "test_without_triton_plain_pytorch_moves_the_weights_and_says_so",
    "weights on different ": "test_processes_that_do_not_agree_on_the_weights_are_told",
    "ddp_static_graph=True": "test_a_static_graph_is_refused_where_ddp_would_follow_it",
    "hf_fsam uses a name of DeepSpeed": "test_a_deepspeed_without_a_name_that_is_used_is_refused_before_training",
    "tokens' logits where the first had": "test_a_second_pass_that_takes_other_tokens_is_an_error",
    "log-probabilities of": "as the row before, in TRL's fused head",
    "called TRL's fused head where the first did not": "as the row before",
    "needs the model's own loss": "test_a_loss_of_ligers_that_is_asked_for_is_refused",
    "which needs the model's own: with": "test_a_split_step_leaves_out_ligers_losses_alone",
    "a model whose forward pass is Liger's": "test_a_model_whose_forward_is_ligers_is_refused",
    "is Liger's, made without the logits": "test_diagnostics_of_ligers_loss_are_refused",
    "the fused head of this TRL, which": "test_a_trl_whose_fused_head_has_another_name_is_refused",
    "puts a hook on the logits' gradient": "a part of 'which takes logits in memory', which has a row",
    "keeps the logits' gradient": "as the row before",
    "depends on a gradient that it has taken": "as the row before",
    "is differentiated more than once": "as the row before",
    "is multiplied with weights that are trained": "as the row before",
    "changes the logits in place": "as the row before",
    "asks for the logits'": "as the row before",
    "logits are read after their pass has ended": "test_logits_that_are_read_after_their_pass_has_ended_are_…",
    "and the head's weights are no longer here": "where ZeRO-3 has gathered and released them",
    ", whose loss makes its logits by itself, in pieces": "test_a_head_that_no_boundary_can_be_put_into_is_refused",
    "is no setting of {}.": "test_names_that_a_recipe_does_not_have_are_told_before_its_first_run",
    "is no metric of {}, which": "as the row before",
    "is not in {}, which has": "test_a_study_extends_another",
    "is a circle: break it": "test_a_study_extends_another",
    "pip install 'hf-fsam[studies]'": "test_cli.py",
    "give a JSON file of one object": "test_run.py",
    " has no attribute ": "test_cli.py",
    "is no setting of hf_fsam": "test_axolotl.py",
    ", or set fsam_variant: none.": "test_axolotl.py",
    "has no FSAMMixin, so that it would train plainly": "test_axolotl.py",
    "whose loss replaces the model's own": "test_axolotl.py",
    "leave out {}, and shard with FSDP2": "test_axolotl.py",
    "whose trainer Axolotl lets no plugin extend": "test_axolotl.py",
    "with a trainer of Axolotl's own": "test_axolotl.py",
    "is in none of DeepSpeed's flat groups": "a layout that no version has had",
    "was set after the start with fsam_ascent_scope": "an engine's state in the middle of a training",
    ": give 1 or more.": "a row for each option",
}


def tell_anew() -> None:
    logging.enable_propagation()
    logging.get_logger("hf_fsam").warning_once.cache_clear()


@pytest.mark.parametrize("row", ROWS_OF_MESSAGES, ids=lambda row: row.text[:40])
def test_the_cure_that_a_message_names_works(
    row: Row, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    tell_anew()
    if row.logged:
        row.provoke(tmp_path)
        assert row.text in caplog.text
    else:
        with pytest.raises((ValueError, TypeError, RuntimeError, FileNotFoundError, SystemExit)) as error:
            row.provoke(tmp_path)
        assert row.text in str(error.value) + capsys.readouterr().err
    if row.cure is not None:
        caplog.clear()
        tell_anew()
        row.cure(tmp_path)
        assert row.text not in caplog.text


def messages() -> Iterator[tuple[str, str]]:
    """Where each message stands in the package, and its text with {} for what is filled in."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            told: ast.expr | None = None
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                told = node.exc.args[0]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                told = node.args[0] if node.func.attr in SAYING else None
            elif isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple):
                yield f"{path.name}:{node.lineno}", "".join(map(template, node.value.elts))
            if told is not None:
                yield f"{path.name}:{node.lineno}", template(told)


SAYING = ("warning", "warning_once", "error", "exit", "add_note")


def template(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return "{}"


def test_every_message_has_a_row_or_names_its_test_elsewhere() -> None:
    texts = [*(row.text for row in ROWS_OF_MESSAGES), *ELSEWHERE]
    found = [(where, text) for where, text in messages() if len(text.replace("{}", "")) > 10]
    assert len(found) > 80
    assert not [f"{where}: {text}" for where, text in found if not any(piece in text for piece in texts)]


def named() -> Iterator[str]:
    """The messages that are constants of a module, and raised by their names."""
    rows = [*(row.text for row in ROWS_OF_MESSAGES), *ELSEWHERE]
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and any(row in template(node.value) for row in rows):
                yield template(node.value)


def test_every_message_is_explained_in_the_docs() -> None:
    """By a piece of it, in the first column of a table of docs/troubleshooting.md."""
    page = (PACKAGE.parent / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    pieces = [each.replace("…", "{}") for each in re.findall(r"^\| `(.+?)` \| ", page, flags=re.MULTILINE)]
    texts = [*named(), *(text for _, text in messages() if len(text.replace("{}", "")) > 10)]
    assert not [text for text in texts if not any(piece in text for piece in pieces)]
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py"))
    said = "\n".join(template(node) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.expr))
    assert not [piece for piece in pieces if piece not in said]  # what the package no longer says
