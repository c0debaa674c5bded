"""The configurations that come with the trainer, and the arithmetic their texts rest on."""

from pathlib import Path

import pytest
import torch
from gpusup.trainer import flops, options
from gpusup.trainer.model import GPT, Shape
from trainer_runs import PACKAGE

KNOBS = options.declared((PACKAGE / "train.py").read_text())
CONFIGS = sorted((PACKAGE / "config").glob("*.py"))


def parameters(config: Path) -> int:
    """Of the model a configuration describes."""
    values = options.parse([str(config)], KNOBS)
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")
    with torch.device("meta"):
        return GPT(Shape(**{name: values[name] for name in names}), 0.0).parameter_count()  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [path for path in CONFIGS if path.stem != "__init__"], ids=lambda path: path.stem)
def test_every_configuration_is_valid(config: Path) -> None:
    values = options.parse([str(config)], KNOBS)
    assert values["n_embd"] % values["n_head"] == 0  # type: ignore[operator]


@pytest.mark.parametrize(
    ("stated", "right", "count", "samples"),
    [
        ("train_fineweb", "train_fineweb_12gb", 77_355_072, 512),
        ("train_fineweb_40m", "train_fineweb_40m_12gb", 40_953_216, 512),
        ("train_fineweb_4070_one_shard", "train_fineweb_4070_one_shard_right", 64_041_472, 480),
    ],
)
def test_right_run_is_the_stated_model_with_the_stated_batch(stated: str, right: str, count: int, samples: int) -> None:
    for name in (stated, right):
        path = PACKAGE / "config" / f"{name}.py"
        values = options.parse([str(path)], KNOBS)
        product = values["batch_size"] * values["gradient_accumulation_steps"]  # type: ignore[operator]
        assert parameters(path) == count
        assert (values["global_batch_size"] or product) == samples


def test_flops_of_the_40_million_run_are_those_of_its_text() -> None:
    shape = Shape(n_layer=12, n_head=12, n_embd=384, block_size=1024, vocab_size=50304, bias=False)
    run_tokens = 20_000 * 512 * 1024
    assert flops.per_token(40_953_216, shape, 0) * run_tokens == pytest.approx(2.55e18, rel=1e-3)
    assert flops.per_token(40_953_216, shape, 1024) * run_tokens == pytest.approx(3.146e18, rel=1e-3)


@pytest.mark.parametrize(
    ("card", "dtype", "tflops"),
    [
        ("NVIDIA GeForce RTX 4070", "bfloat16", 58.3),
        ("NVIDIA GeForce RTX 4070", "float32", 29.15),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "float16", 88.2),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312.0),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA L40S", "bfloat16", 362.0),
        ("Tesla T4", "float16", 65.0),
    ],
)
def test_peak_is_of_the_very_card(card: str, dtype: str, tflops: float) -> None:
    assert flops.peak(card, dtype) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "card", ["NVIDIA GeForce RTX 4070 Laptop GPU", "AMD Instinct MI300X", "NVIDIA GeForce GTX 1080"]
)
def test_peak_is_not_guessed_when_the_card_is_not_known(card: str) -> None:
    assert flops.peak(card, "bfloat16") is None
