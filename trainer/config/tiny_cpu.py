"""A few minutes on two CPU cores, on the text in data/prose: 6.9 M parameters, most of them the embedding."""

device = "cpu"
dtype = "float32"
compile = False  # noqa: A001
threads = 2

n_layer = 2
n_head = 2
n_embd = 128
block_size = 128
batch_size = 12
gradient_accumulation_steps = 4

max_iters = 300
eval_interval = 100
warmup_iters = 20
learning_rate = 1e-3
min_lr = 1e-4
