"""`make demo`: minutes on two CPU cores. The context doubles after six steps, and with it what a step needs."""

device = "cpu"
dtype = "bfloat16"
compile = True  # noqa: A001
threads = 2

n_layer = 2
n_head = 2
n_embd = 32
block_size = 64
block_size_start = 32
block_size_warmup_iters = 6
batch_size = 32
gradient_accumulation_steps = 1
loss_chunks = 1  # the plain loss: it is the logits that run out of memory

max_iters = 40
eval_interval = 0
checkpoint_interval = 3
warmup_iters = 6
learning_rate = 1e-3
min_lr = 1e-4
