"""40.95 M parameters (40.56 M without the positions) on FineWeb, as stated: train_fineweb.py with n_embd 384."""

out_dir = "out/fineweb_40m"
data_dir = "data/fineweb"
dtype = "bfloat16"
compile = True  # noqa: A001

n_layer = 12
n_head = 12
n_embd = 384
block_size = 1024
vocab_size = 50304
batch_size = 16
gradient_accumulation_steps = 32
loss_chunks = 1

max_iters = 20_000
