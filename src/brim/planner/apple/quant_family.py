"""What a quant's name says about the cost of its weights: bits, and how they are unpacked."""

import re

_BITS = {
    "F32": 32.0, "F16": 16.0, "BF16": 16.0, "FP16": 16.0,
    "Q8_0": 8.5, "Q6_K": 6.57, "Q5_0": 5.5, "Q5_1": 6.0,
    "Q5_K_M": 5.69, "Q5_K_S": 5.54, "Q4_K_M": 4.85, "Q4_K_S": 4.58, "Q4_0": 4.55, "Q4_1": 5.0,
    "IQ4_NL": 4.5, "IQ4_XS": 4.3, "Q3_K_L": 4.27, "Q3_K_M": 3.91, "Q3_K_S": 3.5,
    "IQ3_M": 3.7, "IQ3_S": 3.44, "IQ3_XXS": 3.1, "Q2_K": 3.0, "IQ2_M": 2.7, "IQ2_S": 2.5,
    "IQ2_XS": 2.4, "IQ2_XXS": 2.1, "IQ1_M": 1.8, "IQ1_S": 1.6, "TQ2_0": 2.1, "TQ1_0": 1.7,
    "Q2_0": 2.1, "Q1_0": 1.1, "MXFP4": 4.25, "NVFP4": 4.5, "MXFP8": 8.25,
}  # fmt: skip
"""Bits a weight of whole files: block scales counted, and the wider tensors of mixed recipes.

Source: sizes that llama-bench prints for 7 to 8 B models; the block layouts of ggml for the rest.
"""

DEFAULT_BITS = 4.85
"""Q4_K_M: what an unnamed tag of a public registry almost always is."""


def bits_per_weight(quant: str) -> float:
    """Bits that one weight takes in a file of this quant, scales included.

    Example:
        >>> bits_per_weight("Q4_K_M"), bits_per_weight("MLX 4bit"), bits_per_weight("F16")
        (4.85, 4.5, 16.0)
    """
    upper = quant.upper()
    if "MXFP4" in upper:
        return _BITS["MXFP4"]
    if match := re.search(r"(\d+)[- ]?BIT", upper):
        # MLX's affine quants: groups of 64 share a 16-bit scale and bias.
        return float(match[1]) + 0.5
    for name in sorted(_BITS, key=len, reverse=True):
        if re.search(rf"(?<![A-Z0-9]){name}(?![A-Z0-9])", upper):
            return _BITS[name]
    if match := re.search(r"(?<![A-Z])I?Q(\d)_", upper):
        return float(match[1]) + 0.6
    return 4.5 if "MLX" in upper or "INT4" in upper else DEFAULT_BITS


def other_bits_per_weight(quant: str) -> float:
    """Bits of the weights outside routed experts, where a recipe packs only those.

    Example:
        >>> other_bits_per_weight("MXFP4 (Ollama, bf16 attention)"), other_bits_per_weight("Q4_0")
        (16.0, 4.55)
    """
    upper = quant.upper()
    if "MXFP4" not in upper:
        return bits_per_weight(quant)
    return 16.0 if "BF16" in upper else 8.5


def quant_family(quant: str) -> str:
    """The group of quants that are unpacked alike: 'float', 'q8', 'q4', 'k4', 'k2', 'mlx4', ...

    Example:
        >>> quant_family("Q4_K_M"), quant_family("MLX 3bit"), quant_family("UD-Q2_K_XL")
        ('k4', 'mlx3', 'k2')
    """
    upper = quant.upper()
    bits = bits_per_weight(quant)
    if bits >= 16:
        return "float"
    if "MLX" in upper or "BIT" in upper:
        return f"mlx{int(bits)}"
    if re.search(r"FP[48]", upper):
        return "fp"
    if re.search(r"IQ[123]|TQ|Q[12]_0", upper):
        return "iq"
    if bits >= 8:
        return "q8"
    if match := re.search(r"Q(\d)_[01](?!\d)", upper):
        return f"q{match[1]}"
    match = re.search(r"Q(\d)_K", upper)
    return f"k{match[1] if match else int(bits)}"
