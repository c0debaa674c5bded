"""40.95 M parameters on FineWeb, put right: six heads of 64 instead of twelve of 32, which GPUs multiply faster.

20,000 steps of 524,288 tokens are 10.5 B tokens, 2.55e18 FLOP without attention, 3.15e18 with it: 37 h at 40 % of a
4070's 58.3 TFLOP/s. 1,600 steps are 0.84 B tokens, 20 for each parameter: about one pass through a file, 3 h.
"""

out_dir = "out/fineweb_40m_12gb"
data_dir = "data/fineweb"
dtype = "bfloat16"
compile = True  # noqa: A001

n_layer = 12
n_head = 6
n_embd = 384
block_size = 1024
vocab_size = 50304
batch_size = 16
global_batch_size = 512

max_iters = 1_600
warmup_iters = 100
learning_rate = 1e-3
min_lr = 1e-4
eval_interval = 200
checkpoint_interval = 100
