"""On a real NVIDIA GPU: the device budget, CUDA's own OOM messages, the ladder and the way back up."""

import pytest
from gpusup.supervisor.gpu import Nvml
from program import ROOT, Gpusup, of_kind

pytestmark = pytest.mark.gpu

GIB = 1 << 30
TRAINER = str(ROOT / "trainer" / "train.py")
MODEL = ("--n_layer=4", "--n_head=8", "--n_embd=512", "--block_size=1024", "--eval_interval=0", "--device=cuda")
BATCH = ("--batch_size=16", "--gradient_accumulation_steps=2")
LADDER = (
    "remediations:\n  - set: {compile: off}\n    undo_if_useless: false\n"
    "  - set: {dtype: float16}\n  - step: micro_batch\n"
    "restore: {after_steps: 6, order: [compile, micro_batch, dtype]}\n"
)


def data(gpusup: Gpusup) -> tuple[str, ...]:
    folder = gpusup.folder / "data"
    folder.mkdir()
    tokens = bytes(range(200)) * 20_000
    for name in ("train.bin", "val.bin"):
        (folder / name).write_bytes(tokens)
    return f"--data_dir={folder}", f"--out_dir={gpusup.folder / 'out'}"


def test_nvml_names_the_gpu_and_its_memory() -> None:
    nvml = Nvml()
    gpu = nvml.gpus()[0]
    memory = nvml.memory(gpu.uuid)
    assert gpu.uuid.startswith("GPU-")
    assert memory is not None
    assert 0 < memory.free_bytes <= gpu.total_bytes


def test_cuda_oom_under_a_device_budget_is_remediated_and_the_batch_held(gpusup: Gpusup) -> None:
    steps = ("--compile=False", "--dtype=bfloat16", "--max_iters=20", "--checkpoint_interval=5")
    warm = ("--block_size_start=512", "--block_size_warmup_iters=5")
    done = gpusup(
        "run",
        gpusup.policy(LADDER),
        "--memory-budget",
        "7GiB",
        "--",
        TRAINER,
        *data(gpusup),
        *MODEL,
        *BATCH,
        *steps,
        *warm,
    )
    log = gpusup.log()
    assert done.returncode == 0, done.stderr[-3000:]
    ooms = of_kind(log, "oom")
    assert ooms[0]["diagnosis"] == "device_oom"
    assert ooms[0]["step"] == 5
    assert abs(ooms[0]["numbers"]["allowed_bytes"] - 7 * GIB) < GIB // 50
    assert [event["where"] for event in of_kind(log, "budget_applied")] == ["device"] * len(log["attempts"])
    products = {a["settings"]["batch_size"] * a["settings"]["gradient_accumulation_steps"] for a in log["attempts"]}
    assert products == {32}
    assert of_kind(log, "resumed")[0]["step"] == 5
    peaks = [event for event in of_kind(log, "peak") if event["phase"] == "train"]
    assert peaks
    assert all(event["where"] == "device" and event["bytes"] <= 7 * GIB for event in peaks)


def test_device_memory_is_given_back_after_a_run(gpusup: Gpusup) -> None:
    nvml = Nvml()
    uuid = nvml.gpus()[0].uuid
    before = nvml.memory(uuid)
    steps = ("--compile=False", "--dtype=bfloat16", "--max_iters=3", "--checkpoint_interval=100")
    assert gpusup("run", gpusup.policy(LADDER), "--", TRAINER, *data(gpusup), *MODEL, *BATCH, *steps).returncode == 0
    after = nvml.memory(uuid)
    assert before is not None
    assert after is not None
    assert after.used_bytes - before.used_bytes < GIB // 2
