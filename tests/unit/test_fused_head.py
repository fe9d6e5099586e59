"""The fused head: the gradient that logits in memory give, but without them; and the logits where a loss reads them."""

import copy
import ctypes
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from hf_fsam import FSAMTrainer
from hf_fsam.heads import deferred_logits, fused_head, fused_loss, unperturbed
from hf_fsam.passes import CleanPass, Crossing
from tests import reference, zoo
from tests.engines.distributed import normed
from tests.parity import test_parity
from tests.parity.test_parity import Setting, check_parity
from tests.reference import IGNORED, Batch, Window
from tests.toys import DEVICE, VOCABULARY, distance, gpt2, llama, make_trainer, sentences, train, weights_of
from tests.zoo import CASES


@pytest.fixture
def crossings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the losses of the clean passes asked of the head, in order: 'cross_entropy', 'log_sum_exp', 'values'."""
    seen: list[str] = []

    def watch(name: str) -> None:
        taken = getattr(fused_head.CleanCall, name)

        def seen_taken(self: Any, *args: Any) -> Tensor:
            seen.append(name)
            return taken(self, *args)

        monkeypatch.setattr(fused_head.CleanCall, name, seen_taken)

    for name in ("cross_entropy", "log_sum_exp", "values"):
        watch(name)
    return seen


CACHED = {"some_cached": 5 * zoo.VOCABULARY, "none_cached": 0, "all_cached": 1 << 20}


@pytest.fixture(params=[pytest.param(name, marks=() if name == "some_cached" else pytest.mark.slow) for name in CACHED])
def in_tiles(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits in tiles of three tokens, or of a few columns; cotangents cached for five tokens, for none or for all."""
    monkeypatch.setitem(fused_loss._TILE, DEVICE.type, 3 * zoo.VOCABULARY)
    monkeypatch.setitem(fused_loss._KEPT, DEVICE.type, CACHED[request.param])


split = pytest.mark.parametrize(
    "setting",
    [
        Setting("functional", accumulation=3),
        Setting("functional", True, 3, "optimizer_step"),
        pytest.param(Setting("functional", accumulation=3, scope="optimizer_step"), marks=pytest.mark.slow),
        Setting("logit", accumulation=3),
    ],
    ids=str,
)


# Models ---------------------------------------------------------------------------------------------------------------


def cohere() -> nn.Module:
    """Tied weights, a scale on the logits, and a layer norm where others have an RMS norm."""
    options = {name: value for name, value in zoo.DECODER.items() if name != "head_dim"}
    return transformers.CohereForCausalLM(transformers.CohereConfig(**options, logit_scale=0.3))


def granite() -> nn.Module:
    options = {name: value for name, value in zoo.DECODER.items() if name != "head_dim"}
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**options, logits_scaling=2.5))


def phi() -> nn.Module:
    """Its head has a bias."""
    options = {name: value for name, value in zoo.DECODER.items() if name not in ("head_dim", "num_key_value_heads")}
    model = transformers.PhiForCausalLM(transformers.PhiConfig(**options, resid_pdrop=0.0))
    nn.init.normal_(model.lm_head.bias)
    return model


def frozen_head() -> nn.Module:
    model = zoo.llama()
    model.lm_head.requires_grad_(False)
    return model


def scaled(factor: float) -> reference.Problem:
    """A model that scales its logits: the boundary is the head's output, before the scale."""

    def loss(logits: reference.Logits, batch: Batch, window: Window) -> Tensor:
        return reference.causal_lm_loss((logits[0] * factor,), batch, window)

    return replace(CASES["llama"].problem, loss=loss, logits=reference.head_logits("lm_head"))


MODELS = {
    "gpt2": CASES["gpt2"],
    "llama": CASES["llama"],
    "gemma2": CASES["gemma2"],
    "t5": CASES["t5"],
    "llama_lora": CASES["llama_lora"],
    "cohere": replace(CASES["llama"], build=cohere, problem=scaled(0.3)),
    "granite": replace(CASES["llama"], build=granite, problem=scaled(1 / 2.5)),
    "phi": replace(CASES["llama"], build=phi),
    "frozen_head": replace(CASES["llama"], build=frozen_head),
}


@split
@pytest.mark.parametrize("name", MODELS)
def test_the_tiled_head_agrees_with_the_formulas(
    name: str, setting: Setting, tmp_path: Path, in_tiles: None, crossings: list[str]
) -> None:
    check_parity(MODELS[name], setting, tmp_path)
    assert set(crossings) == {"cross_entropy"}


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device, where the host would have to wait in order to leave out the tokens that do not count."""
    monkeypatch.setattr(deferred_logits, "leaving_out_is_free", lambda device: False)


@split
@pytest.mark.parametrize("name", ["llama", "phi", "t5"])
def test_with_tokens_that_do_not_count_the_head_agrees_with_the_formulas(
    name: str, setting: Setting, tmp_path: Path, in_tiles: None, as_on_a_device: None
) -> None:
    check_parity(MODELS[name], setting, tmp_path)
    smoothed = reference.label_smoothing(shift=name != "t5", factor=0.2)
    if name == "phi":
        case = replace(MODELS[name], problem=replace(MODELS[name].problem, loss=smoothed))
        check_parity(case, setting, tmp_path, label_smoothing_factor=0.2)


@pytest.mark.parametrize("kind", ["sum", "smoothed", "mean"])
@pytest.mark.parametrize("setting", [Setting("functional"), Setting("logit")], ids=str)
def test_an_optimizer_step_without_labels_has_a_zero_gradient_on_a_device(
    setting: Setting, kind: str, tmp_path: Path, as_on_a_device: None
) -> None:
    test_parity.test_an_optimizer_step_without_labels_has_a_zero_gradient(setting, kind, tmp_path)


@split
@pytest.mark.parametrize("name", ["phi", "gpt2"])
def test_label_smoothing_in_tiles_agrees_with_the_formulas(
    name: str, setting: Setting, tmp_path: Path, in_tiles: None, crossings: list[str]
) -> None:
    smoothed = reference.label_smoothing(shift=True, factor=0.2)
    case = replace(MODELS[name], problem=replace(MODELS[name].problem, loss=smoothed))
    check_parity(case, setting, tmp_path, label_smoothing_factor=0.2)
    assert set(crossings) == {"cross_entropy"}


def loss_with_z_loss(logits: Tensor, labels: Tensor, count: int | Tensor) -> Tensor:
    """A loss with a penalty on every position's log Σ exp z, as Bamba has one."""
    scores, targets = logits[..., :-1, :].reshape(-1, logits.size(-1)), labels[..., 1:].flatten()
    loss = F.cross_entropy(scores.float(), targets, reduction="sum") / count
    return loss + 0.05 * logits.logsumexp(dim=-1).to(dtype=loss.dtype).pow(2).mean()


@split
def test_a_z_loss_in_tiles_agrees_with_the_formulas(
    setting: Setting, tmp_path: Path, in_tiles: None, crossings: list[str]
) -> None:
    def through_the_trainer(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return loss_with_z_loss(outputs.logits, labels, num_items_in_batch)

    def through_the_reference(logits: reference.Logits, batch: Batch, window: Window) -> Tensor:
        return loss_with_z_loss(logits[0], batch["labels"], window.num_items)

    case = replace(MODELS["phi"], problem=replace(MODELS["phi"].problem, loss=through_the_reference))
    check_parity(case, setting, tmp_path, compute_loss_func=through_the_trainer)
    assert set(crossings) == {"cross_entropy", "log_sum_exp"}


@split
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "llama_lora"])
def test_without_the_fused_head_the_logits_in_memory_agree_with_the_formulas(
    name: str, setting: Setting, tmp_path: Path, crossings: list[str]
) -> None:
    check_parity(CASES[name], setting, tmp_path, fsam_fused_head=False)
    assert not crossings


class OwnMeans(FSAMTrainer):
    """The model is not told how many targets the window holds. Its loss is the mean of a micro-batch, which the Trainer
    divides by the number of micro-batches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


@split
def test_mean_losses_that_the_trainer_divides_agree_with_the_formulas(
    setting: Setting, tmp_path: Path, in_tiles: None
) -> None:
    def loss(logits: reference.Logits, batch: Batch, window: Window) -> Tensor:
        scores, targets = reference.shifted(logits[0], batch["labels"])
        return reference.nll_sum(scores, targets) / (targets != IGNORED).sum() / len(window.batches)

    case = replace(CASES["llama"], problem=replace(CASES["llama"].problem, loss=loss))
    check_parity(case, setting, tmp_path, trainer_class=OwnMeans)


def test_with_hidden_states_offloaded_to_the_host_the_head_agrees_with_the_formulas(tmp_path: Path) -> None:
    setting = Setting("functional", accumulation=3, scope="optimizer_step")
    check_parity(CASES["gpt2"], setting, tmp_path, fsam_offload_hidden_states=True)


# Memory ---------------------------------------------------------------------------------------------------------------


class _Largest(TorchDispatchMode):
    """Records how many numbers the largest tensor holds that is made inside."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.numbers = max(self.numbers, leaf.untyped_storage().nbytes() // leaf.itemsize)
        return result


@pytest.mark.parametrize("scope", ["micro_batch", "optimizer_step"])
def test_no_tensor_is_as_large_as_the_logits(scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, rows = 4096, 40  # 400 tokens against a width of 16
    monkeypatch.setitem(fused_loss._TILE, DEVICE.type, 1 << 15)
    monkeypatch.setitem(fused_loss._KEPT, DEVICE.type, 1 << 15)

    def largest(fused: bool) -> int:
        trainer = make_trainer(
            tmp_path,
            llama(vocab_size=vocabulary),
            fsam_ascent_scope=scope,
            fsam_fused_head=fused,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=2,
            max_steps=2,
            trainer={"train_dataset": sentences(2 * rows)},
        )
        with _Largest() as mode:
            trainer.train()
        return mode.numbers

    logits = rows * len(sentences()[0]["input_ids"]) * vocabulary
    assert largest(fused=True) <= vocabulary * 16 < logits / 10
    assert largest(fused=False) >= logits


# Rounding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [0, 1 << 20])
@pytest.mark.parametrize("tile", [1 << 12, 1 << 20])
def test_in_bfloat16_rounding_is_no_worse_than_with_logits_in_memory(
    cached: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with float64: the gradients of hidden states and of weights, in the clean and in the second pass."""
    monkeypatch.setitem(fused_loss._TILE, "cpu", tile)
    monkeypatch.setitem(fused_loss._KEPT, "cpu", cached)
    torch.manual_seed(0)
    tokens, width, vocabulary = 128, 32, 512
    clean = torch.randn(tokens, width), torch.randn(vocabulary, width)
    moved = tuple(each + 0.3 * torch.randn_like(each) for each in clean)
    targets = torch.randint(vocabulary, (tokens,))

    def in_memory(dtype: torch.dtype) -> list[Tensor]:
        (h, w), (h2, w2) = ([x.bfloat16().to(dtype).requires_grad_() for x in pair] for pair in (clean, moved))
        z = h @ w.t()
        z.retain_grad()
        (F.cross_entropy(z.to(torch.promote_types(dtype, torch.float32)), targets, reduction="sum") / tokens).backward()
        (h2 @ w2.t()).backward(z.grad)
        return [each.grad for each in (h, w, h2, w2)]

    def fused() -> list[Tensor]:
        (h, w), (h2, w2) = ([x.bfloat16().requires_grad_() for x in pair] for pair in (clean, moved))
        loss = fused_loss.FusedLoss(
            h.detach(), w.detach(), None, torch.bfloat16, fused_loss.LogitTransform(), targets=targets
        )
        loss.cached = unperturbed.CotangentCache().take(tokens, w, torch.bfloat16)
        upstream = torch.tensor(1 / tokens)
        ours = fused_loss.cross_entropy_sum(loss, (True, True, False))
        again, _ = fused_loss.vjp(loss, None, h2.detach(), w2, None, (True, False))
        assert ours is not None
        return [g for gradients in (ours, again) for g in gradients.times_(upstream) if g is not None]

    def error(gradient: Tensor, exact: Tensor) -> float:
        return float((gradient.detach().double() - exact).norm() / exact.norm())

    for one, other, exact in zip(fused(), in_memory(torch.bfloat16), in_memory(torch.float64), strict=True):
        assert 0 < error(one, exact) <= 1.05 * error(other, exact)


# Where logits can't be deferred ---------------------------------------------------------------------------------------


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings about the fused head."""
    said: list[str] = []
    monkeypatch.setattr(fused_head.logger, "warning", said.append)
    return said


def lora_on_the_head(**config: Any) -> nn.Module:
    model = get_peft_model(zoo.llama(), LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **config))
    return model


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"target_modules": ["lm_head", "q_proj"]}, "Linear"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "ModulesToSaveWrapper"),
    ],
)
def test_a_head_with_adapters_makes_its_logits_and_warns_once(
    config: dict, name: str, tmp_path: Path, lines: list[str], crossings: list[str]
) -> None:
    case = replace(CASES["llama_lora"], build=lambda: lora_on_the_head(**config))
    check_parity(case, Setting("functional", accumulation=3), tmp_path)
    assert not crossings
    assert len(lines) == 1
    assert name in lines[0]


def own_log_softmax(logits: Tensor, labels: Tensor, count: int | Tensor) -> Tensor:
    """A loss that reads all of the logits."""
    scores, targets = reference.shifted(logits, labels)
    return reference.nll_sum(scores, targets) / count


def cross_entropy_and_more(logits: Tensor, labels: Tensor, count: int | Tensor) -> Tensor:
    scores, targets = logits[..., :-1, :].reshape(-1, logits.shape[-1]), labels[..., 1:].reshape(-1)
    return F.cross_entropy(scores, targets, reduction="sum") / count + 1e-3 * (logits + 1).square().mean()


def cross_entropy_and_accuracy(logits: Tensor, labels: Tensor, count: int | Tensor) -> Tensor:
    with torch.no_grad():
        (logits.argmax(-1)[..., :-1] == labels[..., 1:]).float().mean()
    scores, targets = logits[..., :-1, :].reshape(-1, logits.shape[-1]), labels[..., 1:].reshape(-1)
    return F.cross_entropy(scores, targets, reduction="sum") / count


@split
@pytest.mark.parametrize("own", [own_log_softmax, cross_entropy_and_more, cross_entropy_and_accuracy])
@pytest.mark.parametrize("name", ["phi", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_loss_that_reads_the_logits_agrees_with_the_formulas_and_warns_once(
    name: str, own: Callable, setting: Setting, tmp_path: Path, lines: list[str], crossings: list[str]
) -> None:
    def through_the_trainer(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return own(outputs.logits, labels, num_items_in_batch)

    def through_the_reference(logits: reference.Logits, batch: Batch, window: Window) -> Tensor:
        return own(logits[0], batch["labels"], window.num_items)

    case = replace(MODELS[name], problem=replace(MODELS[name].problem, loss=through_the_reference))
    check_parity(case, setting, tmp_path, compute_loss_func=through_the_trainer)
    assert len(lines) == 1
    assert "needs them" in lines[0]
    assert crossings.count("values") <= 4  # all of them in the first step


def test_a_compiled_model_makes_its_logits_and_warns_once(tmp_path: Path, lines: list[str]) -> None:
    trainer = make_trainer(tmp_path, torch_compile=True, torch_compile_backend="eager", max_steps=1)
    trainer.train()
    assert len(lines) == 1
    assert "compiled" in lines[0]


def test_a_classifier_has_no_fused_head_and_no_warning(tmp_path: Path, lines: list[str], crossings: list[str]) -> None:
    check_parity(CASES["bert_classification"], Setting("functional"), tmp_path)
    assert not lines
    assert not crossings


def test_a_second_pass_that_takes_other_tokens_is_an_error(tmp_path: Path) -> None:
    calls = 0

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        scores = outputs.logits[..., :-calls, :].reshape(-1, VOCABULARY)
        return F.cross_entropy(scores, labels[..., calls:].flatten())

    trainer = make_trainer(tmp_path, trainer={"compute_loss_func": loss})
    with pytest.raises(RuntimeError, match="of 16 tokens' logits where the first had 18"):
        trainer.train()


# Deferred logits ------------------------------------------------------------------------------------------------------


def test_a_forward_pass_outside_of_the_step_makes_logits(tmp_path: Path) -> None:
    """Evaluation, generation and a callback's own forward pass get tensors."""

    class Asks(transformers.TrainerCallback):
        seen = 0

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            ids = sentences()[0]["input_ids"][None].to(model.device)
            logits = model(input_ids=ids).logits
            assert isinstance(logits, Tensor)
            model.generate(input_ids=ids, max_new_tokens=2)
            self.seen += 1

    asks = Asks()
    trainer = make_trainer(
        tmp_path, eval_strategy="steps", eval_steps=2, trainer={"callbacks": [asks], "eval_dataset": sentences(4)}
    )
    trainer.train()
    assert asks.seen == 6
    assert "eval_loss" in trainer.state.log_history[1]


@torch.jit.script
def _scripted(z: Tensor) -> Tensor:
    return z.exp().sum()


def _in_inference_mode(z: Tensor) -> Tensor:
    with torch.inference_mode():
        top = z.max()
    return z.exp().sum() + top.clone()


class _Squares(torch.autograd.Function):
    """Somebody's own kernel, which knows nothing of deferred logits."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.square().sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return gradient * 2 * z


def test_deferred_logits_answer_as_the_logits_do() -> None:
    """Whatever a loss asks of deferred logits, the result is that of the logits, and so is its gradient."""
    torch.manual_seed(0)
    linear, hidden = nn.Linear(4, 7), torch.randn(2, 5, 4, requires_grad=True)
    logits = linear(hidden)
    mask = torch.rand(2, 5) > 0.4
    targets = torch.randint(7, (10,))
    questions: dict[str, Callable[[Any], Any]] = {
        "shape": lambda z: torch.tensor([*z.shape, z.ndim, z.dim(), z.size(-1), *z.size(), len(z)]),
        "slice": lambda z: z[..., :-1, :].contiguous().view(-1, 7).logsumexp(-1),
        "slice_2": lambda z: z[:, 1:].reshape(-1, z.size(-1)).logsumexp(dim=1, keepdim=True),
        "int": lambda z: z[0].logsumexp(-1),
        "mask": lambda z: torch.logsumexp(z[mask], -1),
        "new_axis": lambda z: z[None, :, 0].logsumexp(-1),
        "last_axis": lambda z: z[..., :5].logsumexp(-1),
        "last_axis_int": lambda z: z[..., 3],
        "list": lambda z: z[:, [0, 2]].logsumexp(-1),
        "flat": lambda z: z.reshape(10, -1).logsumexp(-1),
        "wrong_view": lambda z: z.reshape(7, 10),
        "scaled": lambda z: (2 * z / 3).logsumexp(-1),
        "capped": lambda z: (torch.tanh(z / 3) * 3).float().logsumexp(-1),
        "twice": lambda z: z.tanh().tanh().logsumexp(-1),
        "other_dim": lambda z: z.logsumexp(1),
        "sum": lambda z: F.cross_entropy(z.view(-1, 7), targets, reduction="sum"),
        "mean": lambda z: nn.CrossEntropyLoss(ignore_index=3)(z.view(-1, 7), targets),
        "smoothed": lambda z: F.cross_entropy(z.view(-1, 7), targets, label_smoothing=0.3),
        "none": lambda z: F.cross_entropy(z.view(-1, 7), targets, reduction="none"),
        "weighted": lambda z: F.cross_entropy(z.view(-1, 7), targets, weight=torch.arange(7.0)),
        "soft": lambda z: F.cross_entropy(z.view(-1, 7), torch.full((10, 7), 1 / 7)),
        "of_images": lambda z: F.cross_entropy(z.transpose(1, 2), targets.view(2, 5)),
        "plus": lambda z: 1 + z + torch.ones(7),
        "minus": lambda z: torch.ones(7) - z,
        "times": lambda z: torch.arange(7.0) * z * torch.arange(7.0),
        "over": lambda z: 1 / z,
        "compare": lambda z: (z > 0) & (z != z.mean()),
        "negative": lambda z: -z,
        "softmax": lambda z: z.log_softmax(-1).gather(-1, targets.view(2, 5, 1)),
        "cat": lambda z: torch.cat([z, z]),
        "to": lambda z: z.to(torch.float64).sum(),
        "device": lambda z: z.to("cpu").logsumexp(-1),
        "max": lambda z: z.max(),
        "iterated": lambda z: torch.stack([row.sum() for row in z]),
        "flattened": lambda z: z.flatten(0, 1).logsumexp(-1),
        "is_a_tensor": lambda z: torch.tensor([isinstance(z, Tensor), torch.is_tensor(z), z.is_floating_point()]),
        "numpy": lambda z: torch.tensor(z.detach().numpy().sum()),
        "array": lambda z: torch.tensor(np.asarray(z.detach())[0, 0]),
        "list_of_numbers": lambda z: torch.tensor(z.tolist()),
        "saved": lambda z: pickle.loads(pickle.dumps(z.detach())),
        "copied": lambda z: copy.deepcopy(z.detach()),
        "scripted": lambda z: _scripted(z),
        "inference": _in_inference_mode,
        "kernel": lambda z: _Own.apply(z.view(-1, 7), targets),
        "kernel_of_all": lambda z: _Squares.apply(z),
        "kernel_of_scaled": lambda z: _Squares.apply(torch.tanh(z[:, 1:] / 3) * 2),
    }
    stayed = set()
    for name, question in questions.items():
        fused = fused_head.FusedHead(linear)
        call = fused_head.CleanCall(fused, hidden, Crossing(), CleanPass())
        z = deferred_logits.call_head(call, hidden, linear.weight, linear.bias)
        answer, wanted = question(z), question(logits)
        assert torch.allclose(answer.to(wanted.dtype), wanted, atol=1e-5, rtol=1e-5), name
        if not fused.off:
            stayed.add(name)
        assert wanted.requires_grad == answer.requires_grad, name
        if wanted.requires_grad:
            weights = [hidden, *linear.parameters()]
            found = torch.autograd.grad(answer.sum(), weights)
            for one, other in zip(found, torch.autograd.grad(wanted.sum(), weights, retain_graph=True), strict=True):
                assert torch.allclose(one, other, atol=1e-5, rtol=1e-4), name
    assert stayed == {
        *("shape", "slice", "slice_2", "int", "mask", "new_axis", "flat", "flattened", "scaled", "capped", "device"),
        *("sum", "mean", "smoothed", "is_a_tensor"),
    }
    with pytest.raises(AttributeError, match="no attribute 'no_such_thing'"):
        _ = z.no_such_thing


class _PassedOn(torch.autograd.Function):
    """The node that DeepSpeed puts on the output of every module, to learn when its backward pass begins."""

    __module__ = "deepspeed.runtime.zero.parameter_offload"

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        assert gradient.untyped_storage().nbytes() <= 8  # logits that nobody reads have none in memory
        return gradient


def test_logits_stay_deferred_behind_nodes_that_an_engine_adds() -> None:
    torch.manual_seed(0)
    linear, hidden = nn.Linear(4, 7), torch.randn(2, 5, 4, requires_grad=True)
    fused, crossing, targets = fused_head.FusedHead(linear), Crossing(), torch.randint(7, (10,))

    def loss_of(z: Tensor) -> Tensor:
        z = _PassedOn.apply(_PassedOn.apply(z).float() * 2)
        return F.cross_entropy(z.view(-1, 7), targets) + z.logsumexp(-1).square().mean()

    call = fused_head.CleanCall(fused, hidden, crossing, CleanPass())
    found = torch.autograd.grad(loss_of(deferred_logits.call_head(call, hidden, linear.weight, linear.bias)), hidden)
    z = 2 * linear(hidden)
    wanted = F.cross_entropy(z.view(-1, 7), targets) + z.logsumexp(-1).square().mean()
    torch.testing.assert_close(found, torch.autograd.grad(wanted, hidden))
    assert not fused.off
    assert not crossing.cotangents


# Losses that change what they are given -------------------------------------------------------------------------------


def shifted(logits: Any, labels: Tensor) -> tuple[Any, Tensor]:
    return logits[..., :-1, :].reshape(-1, logits.shape[-1]), labels[..., 1:].reshape(-1)


def writes_an_item(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    outputs.logits[..., 10:20] = -1e4
    return F.cross_entropy(*shifted(outputs.logits, labels % 10), reduction="sum") / num_items_in_batch


def fills_with_a_method(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    outputs.logits.clamp_(-0.5, 0.5)
    return F.cross_entropy(*shifted(outputs.logits.float(), labels), reduction="sum") / num_items_in_batch


def fills_with_a_function(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    F.relu(outputs.logits, inplace=True)
    return outputs.logits.logsumexp(-1).mean() + 0.0 * F.cross_entropy(*shifted(outputs.logits, labels))


def multiplies_under_another_name(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    z = outputs.logits
    z *= 3.0
    return F.cross_entropy(*shifted(outputs.logits, labels), reduction="sum") / num_items_in_batch


def hooks_the_gradient(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    outputs.logits.register_hook(lambda gradient: 2 * gradient)
    return F.cross_entropy(*shifted(outputs.logits, labels), reduction="sum") / num_items_in_batch


def changes_the_loss_in_place(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    loss = F.cross_entropy(*shifted(outputs.logits, labels), reduction="sum")
    loss *= 0.1
    return loss


def measures_on_the_way(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    with torch.no_grad():
        assert F.cross_entropy(*shifted(outputs.logits, labels)).exp() > 1
        assert outputs.logits.logsumexp(-1).mean() > 0
    return F.cross_entropy(*shifted(outputs.logits, labels), reduction="sum") / num_items_in_batch


def writes_into_a_part(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    part = outputs.logits[..., :-1, :]
    part[..., 0] = 0.0
    return F.cross_entropy(part.reshape(-1, VOCABULARY), labels[..., 1:].reshape(-1))


def writes_after_taking_a_part(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    part = outputs.logits[..., :-1, :]
    outputs.logits[..., 0] = 0.0
    return F.cross_entropy(part.reshape(-1, VOCABULARY), labels[..., 1:].reshape(-1))


def writes_under_another_name(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    turned = outputs.logits.transpose(1, 2)
    turned[:, 0] = 0.0
    scores = outputs.logits[..., :-1, :].log_softmax(-1)
    return F.nll_loss(scores.reshape(-1, VOCABULARY), labels[..., 1:].reshape(-1))


def writes_into_a_view_of_scaled_ones(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    z = outputs.logits * 0.5
    z[..., 5].fill_(-3.0)
    return F.cross_entropy(*shifted(z, labels))


def writes_into_a_view_of_a_part(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    with torch.no_grad():
        outputs.logits[:, :-1][..., 5].fill_(-3.0)
    return F.cross_entropy(*shifted(outputs.logits, labels))


def writes_past_autograd(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    outputs.logits.data[..., 5] = -3.0
    return F.cross_entropy(*shifted(outputs.logits, labels))


def hooks_the_node(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    outputs.logits.grad_fn.register_prehook(lambda gradients: (gradients[0] * 3,))
    return F.cross_entropy(*shifted(outputs.logits, labels))


def looks_at_the_memory(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    z = outputs.logits[:, :-1].contiguous()
    first = ctypes.c_float.from_address(z.data_ptr()).value
    return F.cross_entropy(*shifted(outputs.logits, labels)) * (1 + 0.1 * first)


class _Threefold(torch.autograd.Function):
    """Returns what `leave` makes of its input, and three times the gradient whatever that is."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, leave: Callable[[Tensor], Tensor]) -> Tensor:
        return leave(z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return 3 * gradient, None


def scales_the_gradient(leave: Callable[[Tensor], Tensor]) -> Callable:
    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(*shifted(_Threefold.apply(outputs.logits, leave), labels))

    loss.__name__ = f"scales_the_gradient_{leave.__name__}"
    return loss


def names_its_arguments(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    z = outputs.logits.contiguous(memory_format=torch.contiguous_format)
    flat = torch.reshape(input=z, shape=(-1, VOCABULARY)).reshape(shape=(-1, VOCABULARY))
    return torch.logsumexp(input=z, dim=-1).mean() + F.cross_entropy(input=flat, target=labels.flatten())


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(z.softmax(-1), y)
        return F.cross_entropy(z, y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        p, y = ctx.saved_tensors
        return gradient * (p - F.one_hot(y, p.shape[-1])) / len(y), None


def has_a_kernel_of_its_own(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return _Own.apply(*shifted(outputs.logits, labels))


def adds_a_kernel_of_its_own(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    scores, targets = shifted(outputs.logits, labels)
    return F.cross_entropy(scores, targets) + 2 * _Own.apply(scores, targets)


def takes_tensors_only(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    if not isinstance(outputs.logits, Tensor):
        raise TypeError("no tensor")
    return F.cross_entropy(*shifted(outputs.logits, labels))


LOSSES = [
    writes_into_a_part,
    writes_after_taking_a_part,
    writes_under_another_name,
    writes_into_a_view_of_scaled_ones,
    writes_into_a_view_of_a_part,
    writes_past_autograd,
    hooks_the_node,
    looks_at_the_memory,
    names_its_arguments,
    *map(scales_the_gradient, (torch.clone, Tensor.float, torch.neg, torch.detach)),
    has_a_kernel_of_its_own,
    adds_a_kernel_of_its_own,
    takes_tensors_only,
    writes_an_item,
    fills_with_a_method,
    fills_with_a_function,
    multiplies_under_another_name,
    hooks_the_gradient,
    changes_the_loss_in_place,
    measures_on_the_way,
]


def trains_as_with_logits(loss: Any, folder: Path, **arguments: Any) -> bool:
    """Whether two steps end where they do with logits in memory. In the first, the logits are deferred."""
    given = {"compute_loss_func": loss}
    fused, plain = (
        train(folder, fsam_rho=0.1, max_steps=2, fsam_fused_head=on, trainer=given, **arguments) for on in (True, False)
    )
    return distance(fused, plain) < 1e-6


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"fsam_ascent_direction": "momentum"}, {"fsam_variant": "logit"}],
    ids=["split", "momentum", "logit"],
)
def test_losses_that_change_or_inspect_the_logits_train_as_with_logits_in_memory(
    loss: Any, arguments: dict[str, Any], tmp_path: Path
) -> None:
    assert trains_as_with_logits(loss, tmp_path, **arguments)


def test_a_loss_term_under_reentrant_checkpointing_is_not_lost(tmp_path: Path) -> None:
    """Its forward pass runs without a graph, so its gradient could be missing without an error."""

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        z, y = outputs.logits, labels
        term = checkpoint(lambda z, y: F.cross_entropy(*shifted(z, y)), z, y, use_reentrant=True)
        return F.cross_entropy(*shifted(z, y)) + 3 * term

    assert trains_as_with_logits(loss, tmp_path)


def test_a_loss_term_that_is_compiled_is_not_lost(tmp_path: Path) -> None:
    @torch.compile(backend="eager")
    def term(z: Tensor) -> Tensor:
        return z.float().logsumexp(-1).square().mean() + (z[:, 1:] * z.softmax(-1)[:, 1:]).mean()

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(*shifted(outputs.logits, labels)) + 3 * term(outputs.logits)

    assert trains_as_with_logits(loss, tmp_path)


class _Weighed(transformers.LlamaForCausalLM):
    """It learns how much its loss counts for (Kendall et al. 2018), and has a term of its weights beside it."""

    def __init__(self, config: Any, weighs: bool = True) -> None:
        super().__init__(config)
        self.weighs, self.log_variance = weighs, nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        outputs = super().forward(input_ids, labels=labels, **kwargs)
        if self.weighs:
            outputs.loss = outputs.loss * torch.exp(-self.log_variance)
        outputs.loss = torch.stack([outputs.loss + self.log_variance, self.model.norm.weight.square().sum()]).sum()
        return outputs


@pytest.mark.parametrize("weighs", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"fsam_ascent_direction": "momentum"}, {"fsam_variant": "logit"}])
def test_a_loss_weight_that_is_learned_gets_the_gradient_of_logits_in_memory(
    weighs: bool, arguments: dict[str, Any], tmp_path: Path
) -> None:
    """Its gradient is the loss, which a fused head does not compute at θ+ε. Terms that are added need no logits."""
    fused, plain = (
        make_trainer(
            tmp_path, _Weighed(llama().config, weighs), fsam_rho=0.3, max_steps=2, fsam_fused_head=on, **arguments
        )
        for on in (True, False)
    )
    for trainer in (fused, plain):
        trainer.train()
    assert distance(weights_of(fused.model), weights_of(plain.model)) < 1e-6
    assert fused.fsam.boundary.head.off == weighs


def test_a_loss_that_its_own_logits_weigh_is_not_taken_for_one_with_a_learned_weight(tmp_path: Path) -> None:
    def focal(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        scores, targets = shifted(outputs.logits, labels)
        return F.cross_entropy(scores, targets) * (1 - scores.softmax(-1)).square().mean()

    trainer = make_trainer(tmp_path, fsam_rho=0.1, max_steps=2, trainer={"compute_loss_func": focal})
    trainer.fsam.engine.forward_can_be_retried = False  # a reason for logits would end the training
    trainer.train()
    assert trains_as_with_logits(focal, tmp_path)


def test_what_the_clean_pass_alone_takes_for_a_log_needs_no_logits(tmp_path: Path) -> None:
    class Logs(FSAMTrainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            z, y = model(inputs["input_ids"]).logits, inputs["labels"]
            if self.fsam_pass != "second":
                with torch.no_grad():
                    assert z.logsumexp(-1).isfinite().all()
                    assert F.cross_entropy(*shifted(z[:, :3], y[:, :3])) > 0
            return F.cross_entropy(z.flatten(0, 1), y.flatten())

    fused, plain = (
        make_trainer(tmp_path, trainer_class=Logs, fsam_rho=0.3, max_steps=2, fsam_fused_head=on)
        for on in (True, False)
    )
    for trainer in (fused, plain):
        trainer.train()
    assert distance(weights_of(fused.model), weights_of(plain.model)) < 1e-6
    assert not fused.fsam.boundary.head.off


def test_a_metric_of_some_steps_turns_the_fused_head_off_in_either_pass(tmp_path: Path) -> None:
    """The metric may first be computed in a second pass, after a clean pass that read no logits."""

    def accurate(every: int, first: int) -> Any:
        calls = -first

        def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > 0 and calls % every == 0:
                with torch.no_grad():
                    assert (outputs.logits.argmax(-1) == labels).float().mean() >= 0
            return F.cross_entropy(*shifted(outputs.logits, labels), reduction="sum") / num_items_in_batch

        return loss

    plain = train(tmp_path, fsam_rho=0.1, fsam_fused_head=False)
    for first in (0, 1):
        given = {"compute_loss_func": accurate(4, first)}
        assert distance(train(tmp_path, fsam_rho=0.1, trainer=given), plain) < 1e-6


def test_a_clean_pass_that_is_made_again_with_logits_counts_once_in_running_statistics(tmp_path: Path) -> None:
    given = {"compute_loss_func": writes_an_item}
    again = train(tmp_path, model=normed(gpt2()), trainer=given, max_steps=1)
    once = train(tmp_path, model=normed(gpt2()), trainer=given, max_steps=1, fsam_fused_head=False)
    assert again["transformer.ln_f.0.num_batches_tracked"] == 1
    assert distance(again, once) < 1e-6


def test_a_loss_that_depends_on_logits_which_only_the_second_pass_reads_is_an_error(tmp_path: Path) -> None:
    calls = 0

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        nonlocal calls
        calls += 1
        more = 0.0 if calls % 2 else outputs.logits.square().mean()
        return F.cross_entropy(*shifted(outputs.logits, labels)) + more

    with pytest.raises(
        RuntimeError, match="the loss of the second pass depends on the logits' values, that of the first did not"
    ):
        train(tmp_path, trainer={"compute_loss_func": loss})


def wrong(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return outputs.no_such_output


def test_an_error_that_the_loss_raises_is_neither_changed_nor_retried(tmp_path: Path) -> None:
    """A forward pass is retried where deferred logits raise, not where the loss does."""
    calls = []

    def out_of_memory(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        calls.append(1)
        raise RuntimeError("CUDA out of memory.")

    for loss, error, text in (
        (wrong, AttributeError, "no_such_output"),
        (out_of_memory, RuntimeError, "out of memory"),
    ):
        with pytest.raises(error, match=text) as caught:
            train(tmp_path, trainer={"compute_loss_func": loss})
        assert caught.value.__context__ is None
    assert len(calls) == 1


def test_logits_that_are_read_after_their_pass_has_ended_are_an_error_not_other_values(tmp_path: Path) -> None:
    taken: list[Tensor] = []

    def takes_away(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        taken.append(outputs.logits.detach())
        return F.cross_entropy(*shifted(outputs.logits, labels))

    train(tmp_path, trainer={"compute_loss_func": takes_away}, max_steps=1)
    for logits in taken:
        with pytest.raises(RuntimeError, match=r"after their pass has ended.*or set fsam_fused_head=False"):
            logits.max()
    taken.clear()
    train(tmp_path, trainer={"compute_loss_func": takes_away}, max_steps=1, fsam_fused_head=False)
    assert all(logits.max().isfinite() for logits in taken)


def test_where_a_forward_pass_cannot_be_retried_the_error_names_the_cure(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, trainer={"compute_loss_func": writes_an_item})
    trainer.fsam.engine.forward_can_be_retried = False  # as where a forward pass gathers weights from other processes
    with pytest.raises(deferred_logits.LogitsNeeded, match=r"changes the logits in place .*set fsam_fused_head=False"):
        trainer.train()
    assert trains_as_with_logits(writes_an_item, tmp_path)


# Losses that differentiate by themselves ------------------------------------------------------------------------------


class _Adversarial(FSAMTrainer):
    """The fast gradient method: a backward pass, a step of the embeddings along their gradient, and the loss there."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        loss.backward(retain_graph=self.retain)
        embeddings = model.get_input_embeddings().weight
        before, gradient = embeddings.data.clone(), embeddings.grad
        embeddings.data.add_(gradient, alpha=0.1 / float(gradient.norm()))
        try:
            attacked = super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            embeddings.data.copy_(before)
        return attacked + loss if self.retain else attacked

    retain = False


class _Retained(_Adversarial):
    retain = True


class _Penalized(FSAMTrainer):
    """Adds the squared norm of the loss's gradient with respect to the embeddings."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # has a second derivative
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            weight = model.get_input_embeddings().weight
            (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        return loss + 0.1 * gradient.square().sum()


class _Checkpointed(FSAMTrainer):
    def compute_loss(self, model, inputs, num_items_in_batch=None, **kwargs):
        def loss(ids: Tensor, labels: Tensor) -> Tensor:
            return model(input_ids=ids, labels=labels, num_items_in_batch=num_items_in_batch).loss

        return checkpoint(loss, inputs["input_ids"], inputs["labels"], use_reentrant=False)


class _CachedGradient(FSAMTrainer):
    """Runs the forward pass again in the backward pass, as the cached losses of sentence-transformers do."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        ours = super().compute_loss
        with torch.no_grad():
            value = ours(model, inputs, *args, **kwargs).detach().requires_grad_()

        def again(gradient: Tensor) -> None:
            with torch.enable_grad():
                (ours(model, inputs, *args, **kwargs) * gradient).backward()

        loss = value * 1.0
        loss.register_hook(again)
        return loss


@pytest.mark.parametrize("trainer_class", [_Adversarial, _Retained, _Penalized, _Checkpointed, _CachedGradient])
def test_losses_that_differentiate_by_themselves_train_as_with_logits_in_memory(
    trainer_class: type[FSAMTrainer], tmp_path: Path
) -> None:
    settings = {"trainer_class": trainer_class, "optim": "sgd", "max_steps": 3, "fsam_rho": 0.1}
    fused, plain, small, none = (
        train(tmp_path, **(settings | more))
        for more in ({}, {"fsam_fused_head": False}, {"fsam_rho": 1e-6}, {"fsam_variant": "none"})
    )
    assert distance(fused, plain) < 1e-6
    assert distance(small, none) < 1e-6  # nothing is lost or counted twice
    assert distance(fused, none) > 1e-4


def test_a_frequent_target_does_not_overflow_in_float16() -> None:
    """The gradient of the weights is a sum over 8192 tokens, which is divided by their number only later."""
    torch.manual_seed(0)
    hidden = torch.randn(8192, 64)
    hidden[:, 3] += 100  # an outlier channel, as trained models have one
    weight, targets = 0.02 * torch.randn(512, 64), torch.randint(512, (8192,))
    targets[::10] = 7
    hidden, weight = hidden.half(), weight.half().requires_grad_()
    loss = fused_loss.FusedLoss(
        hidden, weight.detach(), None, torch.float16, fused_loss.LogitTransform(), targets=targets
    )
    ours = fused_loss.cross_entropy_sum(loss, (True, True, False))
    again, _ = fused_loss.vjp(loss, None, hidden, weight, None, (True, False))
    assert ours is not None
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.double() @ exact.t(), targets).backward()
    assert exact.grad is not None
    for found in (ours.weight, again.weight):
        assert found is not None
        assert float((found.double() / 8192 - exact.grad).norm() / exact.grad.norm()) < 3e-3


def test_dot_products_longer_than_blas_can_count_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(3, 7), torch.randn(3, 7)
    wanted = (a * b).sum()
    monkeypatch.setattr(fused_loss, "_MOST_IN_A_DOT", 4)
    torch.testing.assert_close(fused_loss.dot(a, b), wanted)


@pytest.mark.parametrize(
    ("device", "hip", "capability", "takes", "wanted"),
    [
        ("cpu", None, (9, 0), True, False),
        ("cuda", None, (9, 0), True, True),
        ("cuda", None, (9, 0), False, False),  # torch 2.8
        ("cuda", None, (7, 5), True, False),  # a T4
        ("cuda", "6.2", (9, 4), True, False),  # ROCm
    ],
)
def test_products_of_mixed_dtypes_are_only_for_devices_and_a_torch_that_have_them(
    device: str,
    hip: str | None,
    capability: tuple[int, int],
    takes: bool,
    wanted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def addmm(*args: Any, **kwargs: Any) -> None:
        if not takes:
            raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")

    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "ones", lambda *shape, **kwargs: torch.empty(shape, device="meta"))
    monkeypatch.setattr(torch, "addmm", addmm)
    assert fused_loss._has_mixed_products.__wrapped__(torch.device(device), torch.bfloat16) == wanted


def test_on_a_device_a_tile_is_large_enough_to_outweigh_the_gradient_that_it_is_added_to() -> None:
    """With a vocabulary of 128k and a width of 2048, 523 tokens would be too few: for each tile, 128k x 2048 numbers of
    the weights' gradient are read and written."""
    meta = torch.device("meta")
    assert next(fused_loss.tiles(16_384, 131_072, 2048, meta)) == slice(0, 1024)
    assert next(fused_loss.tiles(16_384, 4096, 2048, meta)) == slice(0, 16_384)


def test_a_weight_that_its_engine_has_emptied_gets_its_gradient_and_no_uninitialized_memory() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    stands_in = deferred_logits.gradient_edge(weight)
    assert stands_in is not None
    assert not stands_in.any()
    weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    stands_in.backward(torch.ones(3, 4))
    assert not weight.data.any()
    assert torch.equal(weight.grad, torch.ones(3, 4))


def test_the_loss_of_confident_tokens_is_as_exact_as_from_logits_in_memory() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(256, 32), torch.randn(64, 32)
    targets = torch.randint(64, (256,))
    hidden += 0.8 * weight[targets]  # |z| about 40, losses about 0.002
    loss = fused_loss.FusedLoss(hidden, weight, None, torch.float32, fused_loss.LogitTransform(), targets=targets)
    exact = F.cross_entropy(hidden.double() @ weight.double().t(), targets, reduction="sum")
    fused_loss.cross_entropy_sum(loss, (False, False, False))
    assert float((loss.value - exact).abs() / exact) < 1e-5
