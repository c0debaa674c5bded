"""How each family of trainers spells its settings, its resume, its progress and its checkpoints."""
