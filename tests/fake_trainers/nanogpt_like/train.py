"""A trainer with nanoGPT's interface and bad habits, small enough for a test; its memory is real.

It saves at evaluations only, rewrites `ckpt.pt` in place, restores no random state, ignores its dtype on a CPU, and
knows nothing of gpusup. Each row of a micro-batch takes `row_mb` MB, `late_row_mb` from step `late_step` on.
"""

import os
import sys
import time

import torch

out_dir = "out"
eval_interval = 2000
eval_iters = 200
log_interval = 1
always_save_checkpoint = True
init_from = "scratch"
gradient_accumulation_steps = 2 * 4
batch_size = 12
block_size = 64
max_iters = 600000
device = "cuda"
dtype = "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float16"
compile = True  # noqa: A001
row_mb = 1
late_row_mb = 1
late_step = 1000000
step_s = 0.0
crash_at = -1
torn_at = -1
exec(open(os.path.join(os.path.dirname(__file__), "configurator.py")).read())  # noqa: SIM115

os.makedirs(out_dir, exist_ok=True)
torch.manual_seed(1337)
weight = torch.zeros(1000, requires_grad=True)
optimizer = torch.optim.AdamW([weight], lr=1e-3)
iter_num = 0
path = os.path.join(out_dir, "ckpt.pt")
if init_from == "resume":
    checkpoint = torch.load(path)
    weight.data.copy_(checkpoint["model"]["weight"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    iter_num = checkpoint["iter_num"]
print(f"tokens per iteration will be: {batch_size * gradient_accumulation_steps * block_size:,}")

while True:
    if iter_num % eval_interval == 0:
        print(f"step {iter_num}: train loss 1.0000, val loss 1.0000")
        if iter_num > 0:
            print(f"saving checkpoint to {out_dir}")
            content = {"model": {"weight": weight.detach()}, "optimizer": optimizer.state_dict(), "model_args": {}}
            torch.save({**content, "iter_num": iter_num, "best_val_loss": 1.0, "config": {}}, path)
            if iter_num == torn_at:
                with open(path, "r+b") as f:
                    f.truncate(os.path.getsize(path) // 2)
                os.kill(os.getpid(), 9)
    if iter_num == crash_at:
        raise KeyError("the column 'txet' does not exist")
    begin = time.time()
    for _ in range(gradient_accumulation_steps):
        rows = torch.ones(batch_size, (late_row_mb if iter_num >= late_step else row_mb) * 250_000)
        loss = (rows.mean(dim=1).sum() * 0 + (weight**2).sum() + 1) / gradient_accumulation_steps
        loss.backward()
        del rows
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    time.sleep(step_s)
    mean, ms = loss.item() * gradient_accumulation_steps, 1000 * (time.time() - begin)
    print(f"iter {iter_num}: loss {mean:.4f}, time {ms:.2f}ms, mfu -100.00%")
    iter_num += 1
    if iter_num > max_iters:
        break
sys.exit(0)
