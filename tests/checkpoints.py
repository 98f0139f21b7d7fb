"""A small checkpoint of Llama's, for tests that have no transformers."""

import json
from pathlib import Path

import numpy as np

LLAMA = dict(
    model_type="llama", vocab_size=16, hidden_size=8, intermediate_size=12, num_attention_heads=2,
    num_key_value_heads=1, num_hidden_layers=2, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=10_000.0,
    hidden_act="silu", eos_token_id=2,
)  # fmt: skip


def tensors() -> dict[str, np.ndarray]:
    """Random tensors of what `LLAMA` describes."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (16, 8), "model.norm.weight": (8,), "lm_head.weight": (16, 8)}
    for number in range(LLAMA["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8),
            "self_attn.o_proj": (8, 8), "mlp.gate_proj": (12, 8), "mlp.up_proj": (12, 8), "mlp.down_proj": (8, 12),
            "input_layernorm": (8,), "post_attention_layernorm": (8,),
        }  # fmt: skip
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def save(folder: Path, values: dict, own: dict[str, np.ndarray], files: int = 1) -> None:
    """Writes a config.json and tensors, in so many files."""
    from safetensors import numpy as safetensors

    (folder / "config.json").write_text(json.dumps(values))
    for number in range(files):
        part = dict(list(own.items())[number::files])
        safetensors.save_file(part, folder / f"model-{number}-of-{files}.safetensors")
