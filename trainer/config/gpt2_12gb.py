"""77 M parameters on a 12 GB card: 512 samples of 1024 tokens in an optimizer step, contexts doubled from 256."""

out_dir = "out/gpt2_12gb"
device = "cuda"
dtype = "bfloat16"
compile = True  # noqa: A001

n_layer = 12
n_head = 12
n_embd = 576
block_size = 1024
block_size_start = 256
block_size_warmup_iters = 2000
batch_size = 16
global_batch_size = 512

max_iters = 20_000
eval_interval = 250
checkpoint_interval = 250
warmup_iters = 500
learning_rate = 6e-4
min_lr = 6e-5
