"""64.04 M parameters on one FineWeb file, as stated for an RTX 4070.

Not 110 M: that would be n_embd 768. 250,000 steps of 491,520 tokens are 123 B tokens, about 170 times through the file
and four weeks of the card. train_fineweb_4070_one_shard_right.py is the same model for one file, put right.
"""

out_dir = "out/fineweb_4070_one_shard"
data_dir = "data/fineweb"
dtype = "bfloat16"
compile = True  # noqa: A001

n_layer = 12
n_head = 8
n_embd = 512
block_size = 1024
vocab_size = 50304
bias = False
batch_size = 12
gradient_accumulation_steps = 40

max_iters = 250_000
warmup_iters = 2_000
lr_decay_iters = 250_000
learning_rate = 6e-4
min_lr = 6e-5
beta2 = 0.99
