"""How fast the hardware could be, and how much of it a run uses: model FLOPs utilisation (MFU).

FLOPs of a token are counted as in the PaLM paper (Chowdhery et al. 2022, appendix B): 6 for each parameter that
multiplies something, and 12 x layers x width x context for attention, as if it were not causal.
"""

import re

from .model import Shape

# Dense TFLOP/s: (16-bit matrices with float32 accumulation, float32). GeForce cards accumulate in float32 at half their
# advertised 16-bit rate, which is twice the float32 rate (NVIDIA's Ampere, Ada and Blackwell white papers); for the
# others the data sheets' figures without sparsity.
PEAK_TFLOPS: dict[str, tuple[float, float]] = {
    "RTX 3060": (25.5, 12.7),
    "RTX 3060 Ti": (32.4, 16.2),
    "RTX 3070": (40.6, 20.3),
    "RTX 3070 Ti": (43.5, 21.7),
    "RTX 3080": (59.5, 29.8),
    "RTX 3080 Ti": (68.2, 34.1),
    "RTX 3090": (71.2, 35.6),
    "RTX 3090 Ti": (80.0, 40.0),
    "RTX 4060": (30.2, 15.1),
    "RTX 4060 Ti": (44.1, 22.1),
    "RTX 4070": (58.3, 29.15),
    "RTX 4070 SUPER": (71.0, 35.5),
    "RTX 4070 Ti": (80.2, 40.1),
    "RTX 4070 Ti SUPER": (88.2, 44.1),
    "RTX 4080": (97.5, 48.7),
    "RTX 4080 SUPER": (104.4, 52.2),
    "RTX 4090": (165.2, 82.6),
    "RTX 5060 Ti": (47.4, 23.7),
    "RTX 5070": (61.7, 30.9),
    "RTX 5070 Ti": (87.9, 43.9),
    "RTX 5080": (112.6, 56.3),
    "RTX 5090": (209.5, 104.8),
    "RTX A6000": (154.8, 38.7),
    "RTX 6000 Ada": (364.2, 91.1),
    "T4": (65.0, 8.1),
    "V100": (125.0, 15.7),
    "A10": (125.0, 31.2),
    "A40": (149.7, 37.4),
    "A100": (312.0, 19.5),
    "L4": (121.0, 30.3),
    "L40S": (362.0, 91.6),
    "H100": (989.4, 66.9),
    "H100 PCIe": (756.0, 51.2),
    "H200": (989.4, 66.9),
}


def per_token(parameters: int, shape: Shape, context: int) -> float:
    """Floating point operations to train on one token, forward and backward; `parameters` as the model counts them."""
    multiplied = parameters - shape.block_size * shape.n_embd  # positions are looked up and added, not multiplied
    return 6.0 * multiplied + 12.0 * shape.n_layer * shape.n_embd * context


def peak(card: str, dtype: str) -> float | None:
    """FLOP/s of a GPU by the name CUDA gives it ("NVIDIA GeForce RTX 4070"); None when it is not in the table.

    Laptop GPUs share the names of faster desktop cards, with a power limit of their own, so they are not guessed.
    """
    if "laptop" in card.lower():
        return None
    named = [name for name in PEAK_TFLOPS if re.search(rf"\b{re.escape(name)}\b", card, re.IGNORECASE)]
    if not named:
        return None
    half, single = PEAK_TFLOPS[max(named, key=len)]
    return (single if dtype == "float32" else half) * 1e12
