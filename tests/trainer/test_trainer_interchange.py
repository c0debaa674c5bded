"""Exported models compute the same under the other program's names, and come back bit for bit."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from gpusup.trainer import checkpoint, interchange, safetensors_file, snapshot
from gpusup.trainer.errors import TrainerError
from gpusup.trainer.model import GPT, Shape
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

ROOT = Path(__file__).resolve().parents[2]
INPUTS = torch.arange(24).view(2, 12) % 50


def trained(bias: bool) -> tuple[GPT, torch.optim.AdamW]:
    """A model whose every parameter, biases and gains too, has left its initial value."""
    torch.manual_seed(3)
    model = GPT(Shape(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=50, bias=bias), dropout=0.0)
    optimizer = torch.optim.AdamW(model.decay_groups(0.1), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(INPUTS, INPUTS.roll(1)).backward()
        optimizer.step()
    return model, optimizer


def saved(folder: Path, model: GPT, optimizer: torch.optim.AdamW, **meta: object) -> Path:
    config = {"learning_rate": 1e-2, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "dropout": 0.0, "device": "cpu"}
    checkpointer = checkpoint.Checkpointer(folder)
    content = {"shape": asdict(model.shape), "config": config, "best_val_loss": 2.5, **meta}
    checkpointer.save(3, snapshot.tensors(model, optimizer), content)
    (done,) = checkpointer.wait()
    return done.path


def export(path: Path, to: str, out: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "trainer" / "export.py"), str(path), "--to", to, "-o", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def gpt2_logits(weights: dict[str, Tensor], n_layer: int, n_head: int, transposed: bool) -> Tensor:
    """GPT-2 in a few lines, written from its description: not our model's code."""

    def linear(x: Tensor, name: str) -> Tensor:
        weight = weights[f"{name}.weight"]
        return x @ (weight if transposed else weight.t()) + weights.get(f"{name}.bias", torch.zeros(()))

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights.get(f"{name}.bias", torch.zeros(()))

    rows, tokens = INPUTS.shape
    x = weights["transformer.wte.weight"][INPUTS] + weights["transformer.wpe.weight"][:tokens]
    future = torch.ones(tokens, tokens).triu(1).bool()
    for layer in (f"transformer.h.{n}" for n in range(n_layer)):
        query, key, value = (
            part.view(rows, tokens, n_head, -1).transpose(1, 2)
            for part in linear(norm(x, f"{layer}.ln_1"), f"{layer}.attn.c_attn").chunk(3, -1)
        )
        scores = (query @ key.transpose(2, 3) / key.shape[-1] ** 0.5).masked_fill(future, -torch.inf).softmax(-1)
        x = x + linear((scores @ value).transpose(1, 2).flatten(2), f"{layer}.attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{layer}.ln_2"), f"{layer}.mlp.c_fc")), f"{layer}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ weights["transformer.wte.weight"].t()


def assert_same_training(foreign: interchange.Foreign, model: GPT, optimizer: torch.optim.AdamW) -> None:
    """Applied to a fresh model, it is the one that was exported, and its next update too."""
    fresh, its_optimizer = trained(model.shape.bias)
    for tensor in snapshot.tensors(fresh, its_optimizer).values():
        tensor.detach().zero_()
    snapshot.put_back(foreign.tensors, fresh, its_optimizer)
    for each, adamw in ((model, optimizer), (fresh, its_optimizer)):
        adamw.zero_grad()
        each(INPUTS, INPUTS.roll(1)).backward()
        adamw.step()
    own, other = snapshot.tensors(model, optimizer), snapshot.tensors(fresh, its_optimizer)
    assert all(torch.equal(tensor, other[name]) for name, tensor in own.items())


@pytest.mark.parametrize("bias", [False, True])
def test_export_to_nanogpt_computes_the_same_and_comes_back_bit_for_bit(tmp_path: Path, bias: bool) -> None:
    model, optimizer = trained(bias)
    path = saved(tmp_path / "out", model, optimizer)
    assert export(path, "nanogpt", tmp_path / "nano").stdout == f"wrote {tmp_path}/nano/ckpt.pt\n"
    content: dict[str, Any] = torch.load(tmp_path / "nano" / "ckpt.pt", weights_only=True)
    assert content.keys() == {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}
    assert (content["iter_num"], content["best_val_loss"].item()) == (3, 2.5)
    assert content["model_args"] == {**asdict(model.shape), "dropout": 0.0}
    assert content["model"]["lm_head.weight"] is content["model"]["transformer.wte.weight"]
    logits = gpt2_logits(content["model"], 2, 2, transposed=False)
    assert torch.allclose(logits, model.logits(INPUTS), atol=1e-5)
    groups = content["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    numbers = [number for group in groups for number in group["params"]]
    assert numbers == list(range(len(list(model.parameters()))))

    content["model"] = {f"_orig_mod.{name}": tensor for name, tensor in content["model"].items()}  # as if compiled
    torch.save(content, tmp_path / "compiled.pt")
    foreign = interchange.load(tmp_path / "compiled.pt")
    assert (foreign.shape, foreign.step, foreign.notes) == (model.shape, 3, ())
    assert_same_training(foreign, model, optimizer)


@pytest.mark.parametrize("bias", [False, True])
def test_export_to_hugging_face_computes_the_same_and_comes_back_bit_for_bit(tmp_path: Path, bias: bool) -> None:
    model, optimizer = trained(bias)
    path = saved(tmp_path / "out", model, optimizer)
    assert export(path, "hf", tmp_path / "hf").returncode == 0
    weights = safetensors_file.read(tmp_path / "hf" / "model.safetensors")
    assert "lm_head.weight" not in weights, "tied"
    assert "transformer.h.1.mlp.c_fc.bias" in weights, "it has biases, zero or not"
    assert weights["transformer.h.0.attn.c_attn.weight"].shape == (16, 48)
    assert torch.allclose(gpt2_logits(weights, 2, 2, transposed=True), model.logits(INPUTS), atol=1e-5)
    for place in (tmp_path / "hf", tmp_path / "hf" / "model.safetensors"):
        foreign = interchange.load(place)
        assert (foreign.shape, foreign.step, foreign.notes) == (model.shape, 0, ())
        own = {name: value for name, value in snapshot.tensors(model, optimizer).items() if "model." in name}
        assert foreign.tensors.keys() == own.keys()
        assert all(torch.equal(foreign.tensors[name], value) for name, value in own.items())


def test_gpt2_as_published_is_loaded_with_a_note_about_its_activation(tmp_path: Path) -> None:
    """No prefix, masks among the weights, half precision, the tanh approximation of GELU."""
    model, optimizer = trained(bias=True)
    export(saved(tmp_path / "out", model, optimizer), "hf", tmp_path / "hf")
    weights = safetensors_file.read(tmp_path / "hf" / "model.safetensors")
    published = {name.removeprefix("transformer."): tensor.half() for name, tensor in weights.items()}
    published["h.0.attn.bias"] = torch.ones(1, 1, 12, 12)
    safetensors_file.write(tmp_path / "hf" / "model.safetensors", published)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["bias"], config["activation_function"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    foreign = interchange.load(tmp_path / "hf")
    assert foreign.shape == model.shape
    assert "its activation is gelu_new" in foreign.notes[0]
    assert torch.allclose(foreign.tensors["model.tokens.weight"], model.tokens.weight, atol=1e-3)
    assert foreign.tensors["model.tokens.weight"].dtype == torch.float32


class Attack:
    """Would run code when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (exec, ("raise SystemExit",))


def test_file_that_is_no_model_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="no such file; give nanoGPT's"):
        interchange.load(tmp_path)
    torch.save({"model": Attack()}, tmp_path / "attack.pt")
    with pytest.raises(TrainerError, match="more than plain data"):
        interchange.load(tmp_path / "attack.pt")
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(TrainerError, match="not a checkpoint of nanoGPT"):
        interchange.load(tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(TrainerError, match=r"text\.pt"):
        interchange.load(tmp_path / "text.pt")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(TrainerError, match=r"not the config\.json of a GPT-2"):
        interchange.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(TrainerError, match="a model of the type llama; only gpt2"):
        interchange.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [({"n_embd": 32}, r"is \[50, 16\], not \[50, 32\]"), ({"n_layer": 3}, r"transformer\.h\.2\..* is missing")],
)
def test_model_of_another_shape_than_it_states_is_refused(tmp_path: Path, change: dict[str, int], told: str) -> None:
    model, optimizer = trained(bias=False)
    export(saved(tmp_path / "out", model, optimizer), "hf", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(TrainerError, match=told):
        interchange.load(tmp_path / "hf")


def test_export_is_refused_where_something_is_already_or_nothing_can_be_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "out", *trained(bias=False))
    (tmp_path / "ckpt.pt").touch()
    refused = export(path, "nanogpt", tmp_path)
    assert (refused.returncode, refused.stderr) == (
        2, f"export.py: {tmp_path}/ckpt.pt is there already; give another folder\n"
    )  # fmt: skip
    assert "no such checkpoint" in export(tmp_path / "none", "hf", tmp_path / "hf").stderr
