"""77.36 M parameters on FineWeb, put right for a 12 GB card: the same model and the same 512 samples in a step.

The logits are computed in pieces, so micro-batch 16 fits and nothing has to be given up. 20,000 steps would be 10.5 B
tokens, 15 times through one 0.7 B-token file; 3,000 steps are 1.57 B tokens, 20 for each parameter (Hoffmann et al.
2022), about two passes. Prepare three files or more and each text is seen once.
"""

out_dir = "out/fineweb_12gb"
data_dir = "data/fineweb"
dtype = "bfloat16"
compile = True  # noqa: A001

n_layer = 12
n_head = 12
n_embd = 576
block_size = 1024
vocab_size = 50304
batch_size = 16
global_batch_size = 512

max_iters = 3_000
warmup_iters = 150
learning_rate = 6e-4
min_lr = 6e-5
eval_interval = 250
checkpoint_interval = 100
