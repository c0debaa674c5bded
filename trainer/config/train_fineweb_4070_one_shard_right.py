"""64.04 M parameters on one FineWeb file, put right: as long as the file has something to teach.

5,700 steps of 491,520 tokens are 2.8 B tokens, four passes through a 0.7 B-token file; up to about four, a repeated
token is worth nearly as much as a new one (Muennighoff et al. 2023). About fifteen hours of an RTX 4070 at 40 % of its
peak, by calculation. beta2 0.95 forgets old gradients sooner, which large batches bear well (Brown et al. 2020).
"""

out_dir = "out/fineweb_4070_one_shard_right"
data_dir = "data/fineweb"
dtype = "bfloat16"
compile = True  # noqa: A001

n_layer = 12
n_head = 8
n_embd = 512
block_size = 1024
vocab_size = 50304
batch_size = 12
global_batch_size = 480

max_iters = 5_700
warmup_iters = 200
learning_rate = 6e-4
min_lr = 6e-5
beta2 = 0.95
eval_interval = 250
checkpoint_interval = 100
