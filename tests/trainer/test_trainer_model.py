"""The model: its initial weights, and the ways to run it that must not change what it computes."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gpusup.trainer.allocator import use_expandable_segments
from gpusup.trainer.model import GPT, Shape
from gpusup.trainer.optimizer import AdamW
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from trainer_runs import ENVIRONMENT, TINY, Launch

SHAPE = Shape(n_layer=3, n_head=2, n_embd=32, block_size=24, vocab_size=200, bias=True)
CPU = torch.device("cpu")
RELATIVE = 1e-5  # float32 sums in another order
HERE = Path(__file__).parent


def batch(rows: int, length: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(SHAPE.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(5))
    return tokens[:, :-1], tokens[:, 1:]


def loss_and_gradient(model: GPT, rows: int = 4, length: int = 24) -> tuple[Tensor, Tensor]:
    """The loss of a fixed batch under fixed dropout, and the gradient of all parameters as one vector."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(11)
    loss = model(*batch(rows, length))
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def assert_same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= RELATIVE * other.abs().max()


def test_weights_are_the_same_for_a_seed_whatever_was_drawn_before() -> None:
    first = GPT.new(SHAPE, 0.0, CPU, seed=3)
    torch.manual_seed(99)
    torch.rand(17)
    state = torch.get_rng_state()
    second = GPT.new(SHAPE, 0.1, CPU, seed=3, activation_checkpointing=True)
    assert torch.equal(torch.get_rng_state(), state)
    other = GPT.new(SHAPE, 0.0, CPU, seed=4)
    for (name, weight), same, different in zip(
        first.named_parameters(), second.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(weight, same), name
        assert weight.dim() < 2 or not torch.equal(weight, different), name


def test_weights_are_as_in_gpt2_when_new() -> None:
    """Standard deviation 0.02, less for what is added to the stream; gains 1, biases 0."""
    model = GPT.new(Shape(**{**SHAPE.__dict__, "n_embd": 128}), 0.0, CPU, seed=1)
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            assert torch.equal(weight, torch.full_like(weight, 0.0 if name.endswith("bias") else 1.0)), name
        else:
            std = 0.02 / math.sqrt(6) if name.endswith(("out.weight", "down.weight")) else 0.02
            assert weight.std().item() == pytest.approx(std, rel=0.05), name


def test_loss_is_the_sum_over_tokens_of_what_the_logits_give() -> None:
    model = GPT.new(SHAPE, 0.0, CPU, seed=1)
    inputs, targets = batch(3, 20)
    exact = F.cross_entropy(model.logits(inputs).flatten(0, 1).double(), targets.flatten(), reduction="sum")
    assert model(inputs, targets).dtype == torch.float32
    assert model(inputs, targets).item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("chunks", [0, 3, 7])
def test_gradients_are_the_same_when_the_loss_is_chunked(chunks: int) -> None:
    plain = GPT.new(SHAPE, 0.1, CPU, seed=1, loss_chunks=1)
    chunked = GPT.new(SHAPE, 0.1, CPU, seed=1, loss_chunks=chunks)
    for rows, length in ((4, 24), (3, 24), (4, 12)):  # a ragged micro-batch, another context
        assert_same(loss_and_gradient(chunked, rows, length), loss_and_gradient(plain, rows, length))


def test_gradients_are_identical_when_activations_are_checkpointed() -> None:
    """With dropout: what is computed again must drop the same values."""
    kept = loss_and_gradient(GPT.new(SHAPE, 0.3, CPU, seed=1))
    again = loss_and_gradient(GPT.new(SHAPE, 0.3, CPU, seed=1, activation_checkpointing=True))
    for one, other in zip(again, kept, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_evaluation_fits_where_training_just_fits(checkpointing: bool) -> None:
    """The smallest budget in which a step's passes succeed, and evaluation's, at the same micro-batch."""
    child = subprocess.run(
        [sys.executable, str(HERE / "lowest_budget.py"), json.dumps(checkpointing)],
        env={**os.environ, **ENVIRONMENT, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    lowest = json.loads(child.stdout)
    assert 0 < lowest["evaluate_kb"] < lowest["train_kb"]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it, of a block's input
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_equals_eager_and_has_one_graph_for_all_layers(checkpointing: bool) -> None:
    """By the compiler's front half; what it gives is run as it is, so differences are those of the graphs."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    torch.compiler.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    eager = GPT.new(SHAPE, 0.0, CPU, seed=1, loss_chunks=4)
    model = GPT.new(SHAPE, 0.0, CPU, seed=1, loss_chunks=4, activation_checkpointing=checkpointing)
    model.compile(dynamic=False, backend=aot_autograd(fw_compiler=backend))
    assert_same(loss_and_gradient(model), loss_and_gradient(eager))
    # A block forward and backward, and the chunk of the loss.
    assert len(graphs) == 3
    assert list(model.state_dict()) == list(eager.state_dict())


def trained(
    optimizer_class: Callable[..., torch.optim.Optimizer], **options: object
) -> tuple[list[Tensor], list[float]]:
    """The parameters after five steps under a loss scaler, one of which overflows, and the scales it went through."""
    model = GPT.new(SHAPE, 0.0, CPU, seed=1)
    optimizer = optimizer_class(model.decay_groups(0.1), lr=1e-2, betas=(0.9, 0.95), **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scales = []
    for step in range(5):
        loss = model(*batch(4, 24)) * (float("inf") if step == 2 else 1.0)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return [parameter.detach() for parameter in model.parameters()], scales


def test_optimizer_is_pytorch_s_bit_for_bit() -> None:
    ours, scales = trained(AdamW)
    theirs, same_scales = trained(torch.optim.AdamW, fused=True)
    assert scales == same_scales == [4.0, 4.0, 2.0, 2.0, 2.0]
    for one, other in zip(ours, theirs, strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)


def test_compiler_is_not_imported_when_nothing_is_compiled(tmp_path: Path, tokens: Path) -> None:
    """A second and 70 MB at every start: through a whole run of training, evaluating, saving."""
    probe = tmp_path / "probe.py"
    train = HERE.parents[1] / "trainer" / "train.py"
    probe.write_text(
        f"import runpy, sys\nrunpy.run_path({str(train)!r}, run_name='__main__')\n"
        "print('compiler imported:', 'torch._dynamo' in sys.modules)\n"
    )
    settings = {**TINY, "max_iters": 2, "eval_interval": 1, "grad_clip": 1.0}
    options = [f"--{name}={value}" for name, value in settings.items()]
    child = subprocess.run(
        [sys.executable, str(probe), *options, f"--data_dir={tokens}", f"--out_dir={tmp_path / 'out'}"],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    assert "compiler imported: False" in child.stdout


def test_losses_are_the_same_when_the_loss_is_chunked_and_blocks_are_checkpointed(tmp_path: Path, tokens: Path) -> None:
    """Whole runs of the trainer, with a ragged last micro-batch and a context that grows."""
    settings = {
        "global_batch_size": 10,
        "batch_size": 4,
        "block_size_start": 16,
        "block_size_warmup_iters": 5,
        "max_iters": 10,
        "eval_interval": 5,
    }
    plain = Launch(tmp_path / "plain", tokens, **settings, loss_chunks=1).run()
    savings = {"loss_chunks": 5, "activation_checkpointing": True, "activation_memory_budget": 0.5}
    lean = Launch(tmp_path / "lean", tokens, **settings, **savings).run()
    assert plain.status == lean.status == 0, lean.stderr
    assert "activation_memory_budget is the compiler's" in lean.stdout
    assert plain.losses.keys() == lean.losses.keys()
    for step, loss in plain.losses.items():
        assert lean.losses[step] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    ("environment", "kernel", "wanted"),
    [
        pytest.param({}, "6.8.0-generic", True, id="native Linux"),
        pytest.param({}, "5.15.153.1-microsoft-standard-WSL2", False, id="WSL2"),
        pytest.param({}, "5.15.148-tegra", False, id="Jetson"),
        pytest.param({}, None, False, id="no such file"),
        pytest.param({"PYTORCH_ALLOC_CONF": "backend:native"}, "6.8.0-generic", False, id="set by the user"),
        pytest.param({"PYTORCH_CUDA_ALLOC_CONF": ""}, "6.8.0-generic", False, id="set by the user, older name"),
    ],
)
def test_segments_are_expandable_only_where_that_is_known_to_work(
    tmp_path: Path, environment: dict[str, str], kernel: str | None, wanted: bool
) -> None:
    before = dict(environment)
    if kernel is not None:
        (tmp_path / "osrelease").write_text(f"{kernel}\n")
    assert use_expandable_segments(environment, tmp_path / "osrelease") is wanted
    added = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if wanted else {}
    assert environment == {**before, **added}
