"""Configurations: dotted overrides, what is resolved, and one clear line for whatever is wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from peft import LoraConfig

from continual.compat.jsonargparse import keys_of
from continual.config import experiment
from continual.config.overrides import KEYS
from continual.errors import ConfigError

Tree = dict[str, Any]
LORA = "model.adapter={class_path: peft.LoraConfig, init_args: {r: 3, target_modules: [q_proj]}}"


def load(tree: Tree, *overrides: str) -> experiment.Experiment:
    return experiment.parse(yaml.safe_dump(tree), "tiny", overrides)


def fault(tree: Tree, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tree, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key, rows", [("colours", [None, 5]), ("0", [5, None]), ("1", [None, 5]), ("*", [5, 5])])
def test_a_stage_is_named_by_name_index_or_star(tree: Tree, key: str, rows: list[int | None]) -> None:
    stages = load(tree, f"stages.{key}.task.init_args.train_rows=5").stages
    assert [stage.task.train_rows for stage in stages] == rows  # type: ignore[attr-defined]


def test_values_are_typed_by_yaml(tree: Tree) -> None:
    loaded = load(
        tree,
        "seed=7",
        "threads=null",
        "trainer.gradient_clip_val=0.5",
        "model.gradient_checkpointing=true",
        "model.adapter.init_args.target_modules=[q_proj, o_proj]",
        "stages.animals.task.init_args.instruction=a = b",
        "stages.animals.max_epochs=3",
        "model.optimizer.init_args.lr=1.0e-3",
    )
    assert (loaded.seed, loaded.threads, loaded.trainer["gradient_clip_val"]) == (7, None, 0.5)
    assert loaded.model.gradient_checkpointing is True
    assert loaded.model.adapter.target_modules == ["o_proj", "q_proj"]  # type: ignore[attr-defined]
    assert loaded.stages[0].task.instruction == "a = b"
    assert [loaded.epochs(stage) for stage in loaded.stages] == [3, 1]


def test_a_later_override_wins_and_a_missing_group_is_made(tree: Tree) -> None:
    del tree["data"]
    assert load(tree, "data.batch_size=2", "data.batch_size=3").data["batch_size"] == 3


def test_the_adapter_is_replaced_whole(tree: Tree) -> None:
    adapter = load(tree, LORA).model.adapter
    assert isinstance(adapter, LoraConfig) and adapter.r == 3
    assert "num_atoms" not in load(tree, LORA).resolved


@pytest.mark.parametrize(
    "override, words",
    [
        ("seed", "cannot understand 'seed': an override is dotted.key=value"),
        ("=1", "cannot understand"),
        ("seed=[1", "the value of 'seed=[1' is not valid YAML"),
        ("stages.nope.max_epochs=1", "there is no 'nope'; there are animals, colours"),
        ("stages.2.max_epochs=1", "there is no '2'; there are animals, colours"),
        ("seed.deep=1", "not a mapping"),
        ("seed.deep.er=1", "not inside a mapping"),
        ("sede=1", "unknown key 'sede' in the configuration; did you mean seed?"),
        ("stages=none", "at least one stage"),
    ],
)
def test_a_wrong_override_is_named(tree: Tree, override: str, words: str) -> None:
    assert words in fault(tree, override)


# -- what is resolved -------------------------------------------------------------------------------------------------


def test_the_resolved_text_says_the_same_again(tree: Tree) -> None:
    for overrides in ((), (LORA,), ("model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 0.1}}",)):
        first = load(tree, *overrides)
        again = experiment.parse(first.resolved, "experiment")
        assert (again.resolved, again.name) == (first.resolved, first.name)


def test_the_name_tells_configurations_apart(tree: Tree) -> None:
    names = {load(tree, *overrides).name for overrides in ((), ("seed=1",), ("name=other",), (LORA,))}
    assert len(names) == 4
    assert load(tree).name == load(tree).name
    assert load(tree).name.startswith("tiny-") and load(tree, "name=other").name.startswith("other-")


def test_parsing_leaves_the_objects_out_of_the_resolved_text(tree: Tree) -> None:
    loaded = load(tree, LORA)
    before = loaded.resolved
    loaded.model.configure_model()  # get_peft_model writes into its configuration
    assert load(tree, LORA).resolved == before


def test_each_stage_has_a_trainer_of_its_own(tree: Tree, tmp_path: Path) -> None:
    loaded = load(
        tree, "stages.colours.max_epochs=4", "trainer.callbacks={class_path: lightning.pytorch.callbacks.ModelSummary}"
    )
    first, second = (loaded.make_trainer(stage, tmp_path, []) for stage in loaded.stages)
    assert first is not second and (first.max_epochs, second.max_epochs) == (1, 4)
    own = [[c for c in trainer.callbacks if type(c).__name__ == "ModelSummary"] for trainer in (first, second)]  # type: ignore[attr-defined]
    assert len(own[0]) == len(own[1]) == 1 and own[0][0] is not own[1][0]
    assert isinstance(own[0][0], L.Callback)


# -- bad input --------------------------------------------------------------------------------------------------------


def set_in(*path: Any, **values: Any) -> Callable[[Tree], None]:
    """Return a change that updates the mapping at ``path``."""

    def change(tree: Tree) -> None:
        node: Any = tree
        for key in path:
            node = node.setdefault(key, {}) if isinstance(node, dict) else node[key]
        node.update(values)

    return change


def without(*path: Any) -> Callable[[Tree], None]:
    """Return a change that drops the key at ``path``."""

    def change(tree: Tree) -> None:
        node: Any = tree
        for key in path[:-1]:
            node = node[key]
        del node[path[-1]]

    return change


ADAPTER, TASK, OPTIMIZER = ("model", "adapter", "init_args"), ("stages", 1, "task"), ("model", "optimizer", "init_args")
BAD: dict[str, tuple[Callable[[Tree], None], list[str]]] = {
    "unknown key at the top": (set_in(sede=1), ["'sede'", "the configuration", "seed"]),
    "unknown key of the trainer": (set_in("trainer", max_epoch=1), ["'max_epoch'", "trainer", "max_epochs"]),
    "unknown key of the data": (set_in("data", batchsize=1), ["'batchsize'", "data", "batch_size"]),
    "unknown key of the model": (set_in("model", warmup=1), ["'warmup'", "model", "warmup_steps"]),
    "unknown key of the adapter": (
        set_in(*ADAPTER, num_atom=1),
        ["model.adapter", "'num_atom'", "QueryableLoraConfig", "num_atoms"],
    ),
    "unknown key of the backbone": (
        set_in("model", "backbone", "init_args", num_layer=1),
        ["model.backbone", "'num_layer'", "TinyCausalLM", "num_layers"],
    ),
    "unknown key of the optimizer": (set_in(*OPTIMIZER, lrr=1), ["model.optimizer", "'lrr'", "AdamW", "mean lr?"]),
    "unknown key of a task": (
        set_in(*TASK, "init_args", train_row=1),
        ["stages.colours.task", "'train_row'", "TextTask", "train_rows"],
    ),
    "unknown key of a stage": (
        set_in("stages", 1, max_epoch=1),
        ["stages.colours", "'max_epoch'", "Stage", "max_epochs"],
    ),
    "unknown class": (set_in(*TASK, class_path="tasks.TexTask"), ["stages.colours.task", "'TexTask'", "TextTask"]),
    "unknown method": (set_in("model", "adapter", class_path="peft.LoraConfg"), ["model.adapter", "LoraConfig"]),
    "unknown module": (set_in("model", "adapter", class_path="peff.LoraConfig"), ["model.adapter", "'peff'"]),
    "unknown optimizer": (set_in("model", "optimizer", class_path="torch.optim.Adamm"), ["model.optimizer", "Adam"]),
    "class of another kind": (set_in("model", "adapter", class_path="tasks.TextTask"), ["model.adapter", "PeftConfig"]),
    "class without its module": (
        set_in("model", "backbone", class_path="TinyLM"),
        ["model.backbone", "'TinyLM'", "continual.backbones.CausalLM"],
    ),
    "no class for the adapter": (without("model", "adapter", "class_path"), ["model.adapter needs a class_path"]),
    "no class for a task": (without(*TASK, "class_path"), ["stages.colours.task", "class_path", "Task"]),
    "unknown key in the place of stages": (
        lambda tree: tree.update(stagse=tree.pop("stages")),
        ["unknown key 'stagse' in the configuration; did you mean stages?"],
    ),
    "unknown key like no other": (set_in(qwxz=1), ["unknown key 'qwxz' in the configuration; there are name, seed"]),
    "no stages": (without("stages"), ["stages has to list at least one stage"]),
    "empty stages": (set_in(stages=[]), ["stages has to list at least one stage"]),
    "stages as a mapping": (set_in(stages={"animals": {}}), ["stages has to list at least one stage"]),
    "two stages of one name": (set_in("stages", 1, name="animals"), ["'animals'", "stages.0", "stages.1"]),
    "stage without a name": (without("stages", 1, "name"), ["stages.1 has no name"]),
    "stage without a task": (without(*TASK), ["stages.colours", "task"]),
    "no model": (without("model"), ["model.backbone", "model.adapter"]),
    "no adapter": (without("model", "adapter"), ["model.adapter"]),
    "top_k above num_atoms": (set_in(*ADAPTER, top_k=9), ["model.adapter", "top_k (9)", "num_atoms (4)"]),
    "rank 0": (set_in(*ADAPTER, r=0), ["model.adapter", "r must be at least 1, got 0"]),
    "rank as text": (set_in(*ADAPTER, r="four"), ["model.adapter.r", "expected int, got four"]),
    "seed as text": (set_in(seed="x"), ["seed", "'x'"]),
    "seed below 0": (set_in(seed=-1), ["seed", "-1"]),
    "no threads": (set_in(threads=0), ["threads", "got 0"]),
    "epochs as text": (set_in("trainer", max_epochs="many"), ["trainer.max_epochs", "expected int or null, got many"]),
    "epochs not given": (set_in("trainer", max_epochs=None), ["trainer.max_epochs", "None"]),
    "no epochs": (set_in("trainer", max_epochs=0), ["trainer.max_epochs", "got 0"]),
    "seed too large": (set_in(seed=2**32), ["seed must lie below 2**32"]),
    "too many threads": (set_in(threads=100_000), ["threads must be at most 1024"]),
    "no batch to a step": (set_in("trainer", accumulate_grad_batches=0), ["trainer.accumulate_grad_batches", "got 0"]),
    "clipped at no number": (set_in("trainer", gradient_clip_val=float("nan")), ["trainer.gradient_clip_val", "nan"]),
    "an adapter in half precision": (set_in("trainer", precision="bf16-true"), ["bf16-true", "bf16-mixed"]),
    "some test rows": (set_in("trainer", limit_test_batches=0.5), ["trainer.limit_test_batches=0.5"]),
    "no epochs of a stage": (set_in("stages", 1, max_epochs=0), ["stages.colours.max_epochs", "got 0"]),
    "batch as text": (set_in("data", batch_size="x"), ["data.batch_size", "expected int, got x"]),
    "rate as text": (set_in(*OPTIMIZER, lr="x"), ["model.optimizer", "expected float", "got x"]),
    "warm-up below 0": (set_in("model", warmup_steps=-1), ["model.warmup_steps", "-1"]),
    "rate left above 1": (set_in("model", final_lr_fraction=2), ["model.final_lr_fraction", "2"]),
    "task that refuses": (set_in(*TASK, "init_args", train_rows=0), ["stages.colours", "train_rows", "got 0"]),
    "trainer as a number": (set_in(trainer=3), ["trainer has to be a mapping", "3"]),
    "data as a list": (set_in(data=[1]), ["data has to be a mapping"]),
    "model as text": (set_in(model="tiny"), ["model has to be a mapping"]),
}


@pytest.mark.parametrize("path", ["os.system", "subprocess.run", "builtins.print", "torch.nn.Linear"])
def test_what_is_no_optimizer_is_never_called(tree: Tree, path: str, tmp_path: Path) -> None:
    """A configuration may come from somebody else."""
    tree["model"]["optimizer"] = {"class_path": path, "init_args": {"command": f"touch {tmp_path / 'called'}"}}
    message = fault(tree)
    assert "model.optimizer" in message and not (tmp_path / "called").exists()
    assert path != "os.system" or message == "model.optimizer: os.system is no subclass of torch.optim.Optimizer"


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_on_one_line(tree: Tree, name: str) -> None:
    change, words = BAD[name]
    change(tree)
    message = fault(tree)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("text", ["3", "- 3", "", "seed", "null"])
def test_a_text_that_is_no_mapping_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="has to be a mapping"):
        experiment.parse(text, "tiny")


def test_the_keys_that_are_known_are_those_of_the_parser() -> None:
    assert {*KEYS} == {key.split(".")[0] for key in keys_of(experiment.make_parser())} - {"help"}


def test_malformed_yaml_is_placed() -> None:
    with pytest.raises(ConfigError, match=r"not valid YAML.*line 2") as caught:
        experiment.parse("seed: 0\nstages: [1", "tiny")
    assert "\n" not in str(caught.value)


def test_a_trainer_that_lightning_refuses_is_a_configuration_error(tree: Tree, tmp_path: Path) -> None:
    for override in ("trainer.accelerator=abacus", "trainer.accelerator=tpu", "trainer.devices=0"):
        with pytest.raises(ConfigError, match=r"^trainer: "):
            load(tree, override).make_trainer(None, tmp_path, [])
