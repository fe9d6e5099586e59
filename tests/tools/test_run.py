"""`hf-fsam run`: other people's scripts train with the split step, and notice nothing else of it."""

import functools
import json
import os
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from torch import Tensor

from hf_fsam import FSAMTrainingArguments, cli, run, swap
from hf_fsam.studies.compare import main as compare
from tests import reference, zoo
from tests.toys import ON_DEVICE, same_bits
from tests.zoo import CASES

ROOT = Path(__file__).parents[2]
RUN = [sys.executable, "-m", "hf_fsam", "run"]
RHO, STEPS, BATCH_SIZE = 0.3, 6, 2
FLAGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH_SIZE,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "train_sampling_strategy": "sequential",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    **ON_DEVICE,
}

# Each is written as its users write it: nothing in it knows of hf_fsam. They leave the weights in weights.pt.
HEAD = f"""
import sys
from dataclasses import dataclass, field
import torch
import transformers
from transformers import HfArgumentParser, Trainer, TrainingArguments
from tests.zoo import CASES

@dataclass
class ModelArguments:
    case: str = field(default="llama", metadata={{"help": "The model."}})

def finish(trainer):
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    weights = {{name: weight.detach().cpu() for name, weight in trainer.model.state_dict().items()}}
    torch.save(weights, trainer.args.output_dir + "/weights.pt")

def data(case):
    return CASES[case].examples({STEPS * BATCH_SIZE})
"""
# As transformers' examples are: flags, or one JSON or YAML file.
EXAMPLE = (
    HEAD
    + """
def main():
    parser = HfArgumentParser((ModelArguments, TrainingArguments))
    if sys.argv[1].endswith(".yaml"):
        model_args, args = parser.parse_yaml_file(sys.argv[1])
    elif sys.argv[1].endswith(".json"):
        model_args, args = parser.parse_json_file(sys.argv[1])
    else:
        model_args, args = parser.parse_args_into_dataclasses()
    rows = data(model_args.case)
    trainer = Trainer(model=CASES[model_args.case].model(), args=args, train_dataset=rows, eval_dataset=rows)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    finish(trainer)

if __name__ == "__main__":
    main()
"""
)
# As run_qa.py is: a subclass with an evaluation of its own. This one has a step of its own, too.
SUBCLASS = (
    HEAD
    + """
class QuestionAnsweringTrainer(Trainer):
    def __init__(self, *args, post_process=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.post_process = post_process

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()

    def evaluate(self, *args, **kwargs):
        return {**super().evaluate(*args, **kwargs), "eval_processed": self.post_process()}

model_args, args = HfArgumentParser((ModelArguments, TrainingArguments)).parse_args_into_dataclasses()
rows = data(model_args.case)
model = CASES[model_args.case].model()
trainer = QuestionAnsweringTrainer(
    model=model, args=args, train_dataset=rows, eval_dataset=rows, post_process=lambda: 7
)
assert type(trainer).__name__ == "QuestionAnsweringTrainer" and isinstance(trainer, QuestionAnsweringTrainer)
trainer.train()
finish(trainer)
"""
)
# As run_summarization.py is: it evaluates on what the model generates.
SEQ2SEQ = (
    HEAD
    + """
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

model_args, args = HfArgumentParser((ModelArguments, Seq2SeqTrainingArguments)).parse_args_into_dataclasses()
args.predict_with_generate, args.generation_max_length = True, 4
rows = data(model_args.case)
model = CASES[model_args.case].model()
trainer = Seq2SeqTrainer(
    model=model,
    args=args,
    train_dataset=rows,
    eval_dataset=rows,
    compute_metrics=lambda predictions: {"length": predictions.predictions.shape[-1]},
)
trainer.train()
finish(trainer)
"""
)
# As notebooks are: the arguments are written down, and a class of them extends transformers'.
IN_CODE = (
    HEAD
    + """
@dataclass
class MyArguments(TrainingArguments):
    beta: float = 1.0

args = MyArguments(OUTPUT_DIR, **FLAGS)
rows = data("llama")
trainer = Trainer(CASES["llama"].model(), args, train_dataset=rows, eval_dataset=rows)
trainer.train()
finish(trainer)
"""
)
SCRIPTS = {"example": EXAMPLE, "subclass": SUBCLASS, "seq2seq": SEQ2SEQ, "in_code": IN_CODE}
MODELS = {"example": "llama", "subclass": "bert_question_answering", "seq2seq": "t5", "in_code": "llama"}


@dataclass
class Written:
    """A script in a folder, and where it leaves what it trained."""

    folder: Path
    path: Path = field(init=False)

    def write(self, text: str) -> "Written":
        self.path = self.folder / "train.py"
        self.path.write_text(f"OUTPUT_DIR = {str(self.folder / 'out')!r}\nFLAGS = {FLAGS!r}\n{text}")
        return self

    def flags(self, case: str, **settings: object) -> list[str]:
        named = {"case": case, "output_dir": self.folder / "out", **FLAGS, **settings}
        return [f"--{name}={value}" for name, value in named.items()]

    def weights(self) -> dict[str, Tensor]:
        return torch.load(self.folder / "out" / "weights.pt")


@pytest.fixture
def script(tmp_path: Path) -> Written:
    return Written(tmp_path)


@functools.cache
def wanted(case: str, variant: reference.Variant) -> reference.Tensors:
    """The weights that the formulas give, in plain torch."""
    return reference.train(
        CASES[case].model(),
        CASES[case].problem,
        zoo.batches(CASES[case].examples(STEPS * BATCH_SIZE), BATCH_SIZE),
        variant=variant,
        rho=RHO,
        optimizer_factory=lambda model: torch.optim.SGD(reference.trainable(model).values(), lr=FLAGS["learning_rate"]),
    )


def apart(weights: dict[str, Tensor], case: str, variant: reference.Variant) -> float:
    """The distance to the reference's weights, as a share of the way that these went."""
    end, start = wanted(case, variant), reference.trainable(CASES[case].model())
    missed = reference.norm({name: end[name] - weights[name] for name in end})
    return float(missed / reference.norm({name: end[name] - start[name].detach() for name in end}))


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_script_without_an_edit_trains_by_the_formulas(
    kind: str, script: Written, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    script.write(SCRIPTS[kind])
    flags = [] if kind == "in_code" else script.flags(MODELS[kind])
    monkeypatch.setattr(sys, "argv", [str(script.path), *flags])
    runpy.run_path(str(script.path), run_name="__main__")
    plain = script.weights()
    assert apart(plain, MODELS[kind], "none") < 1e-5
    assert apart(plain, MODELS[kind], "functional") > 1e-2
    capsys.readouterr()
    for variant in ("none", "functional"):
        options = [f"--fsam_variant={variant}", f"--fsam_rho={RHO}"]
        run.main([*options, str(script.path)] if kind == "in_code" else [str(script.path), *flags, *options])
        if variant == "none":
            assert same_bits(script.weights(), plain)
        else:
            assert apart(script.weights(), MODELS[kind], variant) < 1e-5
        line, *_ = capsys.readouterr().err.splitlines()
        assert "Trainer, Seq2SeqTrainer, TrainingArguments and Seq2SeqTrainingArguments" in line
    assert transformers.Trainer is swap.TRAINERS["Trainer"]  # after the script all is as it was
    assert json.loads((script.folder / "out" / "eval_results.json").read_text())["eval_loss"] > 0


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_file_of_arguments_may_hold_ours(suffix: str, script: Written) -> None:
    settings = {"case": "llama", "output_dir": str(script.folder / "out"), **FLAGS, "fsam_rho": RHO}
    path = script.folder / f"arguments.{suffix}"
    path.write_text(yaml.safe_dump(settings) if suffix == "yaml" else json.dumps(settings))
    run.main([str(script.write(EXAMPLE).path), str(path)])
    assert apart(script.weights(), "llama", "functional") < 1e-5


def test_settings_in_a_file_become_flags_and_the_log_is_left(script: Written) -> None:
    """As compare calls it. This script saves no state."""
    settings = {"case": "llama", "output_dir": str(script.folder / "out"), **FLAGS, "fsam_rho": RHO}
    settings |= {"adam_beta1": None, "lr_scheduler_kwargs": {}, "label_names": ["labels"], "logging_steps": 1}
    settings |= {"max_steps": float(STEPS), "label_smoothing_factor": -0.0, "weight_decay": -1e-30}
    (script.folder / "settings.json").write_text(json.dumps(settings))
    script.write(EXAMPLE.replace("    trainer.save_state()\n", ""))
    run.main(["--settings", str(script.folder / "settings.json"), str(script.path)])
    assert apart(script.weights(), "llama", "functional") < 1e-5
    log = json.loads((script.folder / "out" / "trainer_state.json").read_text())["log_history"]
    assert log[0]["fsam/radius"] == pytest.approx(RHO, rel=1e-4)
    assert "eval_loss" in log[-1]


OURS = """
from dataclasses import dataclass
from transformers import Trainer, TrainingArguments
from hf_fsam import FSAMArguments, FSAMMixin, FSAMTrainer
from tests.zoo import CASES

class Theirs(Trainer):
    pass

class Mine(FSAMMixin, Theirs):
    pass

@dataclass
class TheirArguments(TrainingArguments):
    pass

@dataclass
class MyArguments(FSAMArguments, TheirArguments):
    pass

for trainer_class in (Mine, FSAMTrainer, Theirs):
    args = MyArguments(OUTPUT_DIR, fsam_rho=0.2, **{**FLAGS, "max_steps": 1})
    trainer = trainer_class(CASES["llama"].model(), args, train_dataset=CASES["llama"].examples(2))
    assert [each.__name__ for each in type(trainer).__mro__].count("FSAMMixin") == 1
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0
    assert trainer.fsam.entered
"""


def test_our_classes_are_related_as_theirs_are_and_hide_tokens() -> None:
    assert issubclass(swap.Seq2SeqTrainer, swap.Trainer)
    assert issubclass(swap.Seq2SeqTrainer, transformers.Seq2SeqTrainer)
    args = swap.Seq2SeqTrainingArguments("out", use_cpu=True, fsam_rho=0.2)
    assert isinstance(args, swap.TrainingArguments)
    assert isinstance(args, transformers.Seq2SeqTrainingArguments)
    with pytest.raises(ValueError, match="fsam_rho=-1 is not a radius"):
        swap.Seq2SeqTrainingArguments("out", use_cpu=True, fsam_rho=-1)
    for arguments_class in (swap.TrainingArguments, FSAMTrainingArguments):
        shown = repr(arguments_class("out", use_cpu=True, hub_token="a secret", fsam_rho=0.2))
        assert "fsam_rho=0.2" in shown
        assert "a secret" not in shown


def test_a_script_that_uses_hf_fsam_runs_as_it_did(script: Written) -> None:
    run.main([str(script.write(OURS).path)])


def ended(command: list[str], **options: object) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)  # type: ignore


LATER = """
import sys
from pathlib import Path
from trl import SFTConfig, SFTTrainer, TrlParser
from hf_fsam import FSAMMixin
from tests.parity.test_trl import SFT, check, conversations, make_trainer
from tests.toys import llama

(args,) = TrlParser((SFTConfig,)).parse_args_and_config(args=["--config", sys.argv[1]])
print(args.fsam_every_steps, args.fsam_rho)
trainer = make_trainer(Path(OUTPUT_DIR), SFTTrainer, SFTConfig, llama(), conversations())
assert type(trainer).__name__ == "SFTTrainer" and isinstance(trainer, FSAMMixin)
check(trainer, llama(), SFT, "functional")
"""


def test_a_library_that_the_script_imports_gets_the_step(script: Written) -> None:
    """TRL's SFT trains by the formulas. In a process of its own, since TRL's classes are made when TRL is imported."""
    settings = {"fsam_every_steps": 2, "output_dir": "out", "use_cpu": True, "bf16": False}
    (script.folder / "sft.yaml").write_text(yaml.safe_dump(settings))
    options = ["--fsam_rho", "0.3", "--fsam_precondition", "False"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*RUN, *options, str(script.write(LATER).path), str(script.folder / "sft.yaml")]
    result = ended(command, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[:2] == ["2", "0.3"]


@pytest.mark.slow
def test_the_scripts_of_trl_train(tmp_path: Path) -> None:
    """`none` is their own run to the bit, and `functional` is another."""
    from tests.parity.test_trl import tokenizer
    from tests.toys import llama

    tokenizer().save_pretrained(tmp_path / "model")
    llama().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"t{i} t{i + 1}", "completion": f" t{i + 2} t{i + 3} t2"} for i in range(3, 30)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    ends = {}
    for name in ("plain", "none", "functional"):
        settings = {**FLAGS, "model_name_or_path": tmp_path / "model", "dataset_name": tmp_path / "data"}
        settings |= {"output_dir": tmp_path / name, "bf16": False, "gradient_checkpointing": False}
        settings |= {} if name == "plain" else {"fsam_variant": name}
        start = [sys.executable] if name == "plain" else RUN
        flags = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
        result = ended([*start, "-m", "trl.scripts.sft", *flags])
        assert result.returncode == 0, result.stderr
        ends[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert ends["plain"] == ends["none"] != ends["functional"]


FAILING = """
import sys

def inner():
    return {}["key"]

class Outer:
    def call(self):
        try:
            inner()
        except KeyError as error:
            raise RuntimeError("the script's own") from error

if __name__ == "__main__":
    print("printed", sys.argv[1:], __file__, __name__)
    Outer().call()
"""


def test_what_it_prints_its_status_and_traceback_are_its_own(script: Written) -> None:
    script.write(FAILING)
    plain = ended([sys.executable, str(script.path), "--a", "b c"])
    result = ended([*RUN, str(script.path), "--a", "b c"])
    assert (result.stdout, result.returncode) == (plain.stdout, plain.returncode)
    assert result.stderr.endswith(plain.stderr)
    assert result.stderr.count("Traceback") == plain.stderr.count("Traceback") == 2


def test_a_signal_ends_it_as_it_would_the_script(script: Written) -> None:
    script.write("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)")
    assert ended([*RUN, str(script.path)]).returncode == -signal.SIGTERM


def test_an_exit_status_is_the_scripts_own(script: Written) -> None:
    with pytest.raises(SystemExit) as exit:
        run.main([str(script.write("import sys\nsys.exit(3)").path)])
    assert exit.value.code == 3
    with pytest.raises(SystemExit) as exit:  # of a script that only prints its help nothing else is wanted
        run.main([str(script.write("import sys\nsys.exit(0)").path), "--help"])
    assert exit.value.code == 0
    run.main([str(script.write(EXAMPLE + "sys.exit(0)").path), *script.flags("llama", max_steps=1)])


OWN_LOOP = """
class Mine(Trainer):
    def train(self, **kwargs):
        for inputs in self.get_train_dataloader():
            self.accelerator.backward(self.compute_loss(self.model, inputs))
"""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "import sys\nsys.exit(0)",
        "import transformers\ntransformers.Trainer",
        EXAMPLE.replace("def main():", OWN_LOOP + "\ndef main():").replace(
            "    trainer = Trainer(", "    trainer = Mine("
        ),
    ],
    ids=["empty", "exit", "no_train", "own_loop"],
)
def test_a_script_that_does_not_train_ends_in_an_error(text: str, script: Written) -> None:
    message = r"train\.py ended without training with a Trainer of transformers"
    with pytest.raises(SystemExit, match=message):
        run.main([str(script.write(text).path), *script.flags("llama")])


class Early(transformers.Trainer):
    """A trainer whose class is there before the script runs."""


def test_a_trainer_that_would_train_plainly_is_refused(script: Written) -> None:
    script.write("from tests.tools.test_run import Early as Trainer\n" + EXAMPLE.replace("Trainer, Tr", "Tr"))
    with pytest.raises(ValueError, match=r"Put FSAMMixin before it.*class MyEarly\(FSAMMixin, Early\)"):
        run.main([str(script.path), *script.flags("llama")])


@pytest.mark.parametrize("flag", [f"--fsam_rho={RHO}", "--fsam-variant=sam", "--no_fsam_fused_head"])
def test_an_argument_that_the_script_does_not_read_is_refused(flag: str, script: Written) -> None:
    script.write(IN_CODE)
    with pytest.raises(
        ValueError, match=r"did not reach the training arguments.*before the script: --fsam_\w+ \w[\w.]* SCRIPT"
    ):
        run.main([str(script.path), flag])
    run.main([f"--fsam_rho={RHO}", str(script.path), f"--fsam_rho={RHO}"])  # these are what it trains with
    assert apart(script.weights(), "llama", "functional") < 1e-5


def test_a_module_runs_as_python_runs_it(script: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    package = script.folder / "their_package"
    package.mkdir()
    (package / "__init__.py").touch()
    script.write(EXAMPLE.replace("def main():", "from their_package.part import NAME\ndef main():"))
    (package / "part.py").write_text("NAME = 'part'")
    (package / "train.py").write_text(script.path.read_text() + "\nassert __package__ == 'their_package'\n")
    monkeypatch.chdir(script.folder)
    run.main(["-m", "their_package.train", *script.flags("llama", fsam_rho=RHO)])
    assert apart(script.weights(), "llama", "functional") < 1e-5


def test_the_rank_that_deepspeeds_launcher_puts_first_reaches_the_script(
    script: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.write("import sys\nsys.exit(' '.join(sys.argv[1:]))")
    monkeypatch.setattr(sys, "argv", ["hf-fsam", "--local_rank=1", "run", str(script.path), "--a", "b"])
    with pytest.raises(SystemExit, match=r"^--local_rank=1 --a b$"):
        cli.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "nowhere.py does not exist: give the path of a training script, or -m"),
        (["--fsam_rho", "-1", "SCRIPT"], "fsam_rho=-1.0 is not a radius"),
        (["--fsam_roh", "1", "SCRIPT"], "--fsam_roh"),
        (["SCRIPT", "--fsam_variant", "sharp"], "fsam-variant: invalid choice: 'sharp'"),
        (["--settings", "nowhere.json", "SCRIPT"], "--settings nowhere.json: give a JSON file"),
        (["--settings", "SCRIPT", "SCRIPT"], "give a JSON file of one object"),
    ],
)
def test_a_mistake_is_named_before_the_script_runs(
    arguments: list[str], message: str, script: Written, capsys: pytest.CaptureFixture
) -> None:
    script.write("raise AssertionError('it ran')")
    with pytest.raises(SystemExit) as exit:
        run.main([str(script.path) if word == "SCRIPT" else word for word in arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_compare_runs_a_script_without_an_edit(script: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    """It saves no state and knows nothing of a file of settings."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # where the script finds its model
    script.write(EXAMPLE.replace("    trainer.save_state()\n", ""))
    arms = {"plain": {"fsam_variant": "none"}, "split": {"fsam_variant": "functional", "fsam_rho": RHO}}
    study = {"script": "train.py", "settings": {"case": "llama", **FLAGS}, "arms": arms, "seeds": [0]}
    (script.folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    compare([str(script.folder / "study.yaml"), "--out", str(script.folder / "studies"), "--keep"])
    for line in (script.folder / "studies" / "runs.jsonl").read_text().splitlines():
        row = json.loads(line)
        variant = row["settings"]["fsam_variant"]
        (folder,) = (script.folder / "studies" / "runs").glob(row["key"])
        assert apart(torch.load(folder / "weights.pt"), "llama", variant) < 1e-5
        assert row["metrics"]["eval_loss"] > 0
    assert "device" not in (script.folder / "studies" / "study.md").read_text()  # which a script does not tell


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        (["torchrun", "--nproc_per_node=2", "-m", "hf_fsam"], 2),
        (["accelerate", "launch", "--cpu", "--num_processes=1", "-m", "hf_fsam"], 1),  # more need MPI on a CPU
        (["deepspeed", "--num_gpus=2", "--module", "hf_fsam"], 2),
    ],
    ids=["torchrun", "accelerate", "deepspeed"],
)
def test_launchers_start_it(launcher: list[str], processes: int, script: Written) -> None:
    """Two processes with half of a batch each take the steps of one."""
    script.write(EXAMPLE)
    flags = script.flags("llama", fsam_rho=RHO, per_device_train_batch_size=BATCH_SIZE // processes)
    command = [str(Path(sys.executable).with_name(launcher[0])), *launcher[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    result = ended([*command, "run", str(script.path), *flags], env=environment)
    assert result.returncode == 0, result.stderr
    assert apart(script.weights(), "llama", "functional") < 1e-5
    assert result.stderr.count("of transformers split the step") == 1
