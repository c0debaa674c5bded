"""Code that runs inside the trainer's interpreter, before the trainer: the memory budget. Standard library only."""
