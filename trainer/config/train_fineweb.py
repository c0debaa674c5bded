"""77.36 M parameters on FineWeb, as stated: the run that ran out of memory on a 12 GB card.

`loss_chunks = 1` keeps the logits whole, as that run did. train_fineweb_12gb.py is the same model, put right.
"""

out_dir = "out/fineweb"
data_dir = "data/fineweb"
dtype = "bfloat16"
compile = True  # noqa: A001

n_layer = 12
n_head = 12
n_embd = 576
block_size = 1024
vocab_size = 50304
batch_size = 16
gradient_accumulation_steps = 32
loss_chunks = 1

max_iters = 20_000
