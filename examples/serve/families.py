"""The families: what each reads off its config.json, what its tensors are called, and how they become this model's.

A family is a `Family` in `FAMILIES`, by the `model_type` of its config.json. The weights of a layer are a dict; which
names it has decides what the layer does (model.py), so a family says no more than which tensor is which.
"""

import dataclasses
import math
from typing import Callable

import numpy as np

from paged_prefill.examples.serve.config import Config, Experts, Latent, Layer, Reader, frequencies, yarn_scale

Tensors = dict[str, np.ndarray]

# Names here: names in the checkpoint, behind `model.layers.N.`.
ATTENTION = dict(
    query="self_attn.q_proj.weight",
    key="self_attn.k_proj.weight",
    value="self_attn.v_proj.weight",
    out="self_attn.o_proj.weight",
)
BIASES = {f"{name}_bias": theirs.replace(".weight", ".bias") for name, theirs in ATTENTION.items()}
HEAD_NORMS = dict(query_norm="self_attn.q_norm.weight", key_norm="self_attn.k_norm.weight")
MLP = dict(gate="mlp.gate_proj.weight", up="mlp.up_proj.weight", down="mlp.down_proj.weight")
NORMS_BEFORE = dict(attention_norm="input_layernorm.weight", mlp_norm="post_attention_layernorm.weight")
NORMS_AROUND = dict(
    attention_norm="input_layernorm.weight",
    attention_post_norm="post_attention_layernorm.weight",
    mlp_norm="pre_feedforward_layernorm.weight",
    mlp_post_norm="post_feedforward_layernorm.weight",
)
NORMS_BEHIND = dict(
    attention_post_norm="post_attention_layernorm.weight", mlp_post_norm="post_feedforward_layernorm.weight"
)


@dataclasses.dataclass(frozen=True)
class Family:
    """How to read one.

    Attributes:
      config: makes a Config of a Reader.
      names: what the tensors of every layer are called.
      optional: what those are called that only some layers or checkpoints have.
      prepare: turns a layer's tensors, by the names of the checkpoint, into ones that `names` knows, or adds to them.
        Gets (tensors, config, number of the layer) and may return names of this model for what is ready as it is.
    """

    config: Callable[[Reader], Config]
    names: dict[str, str]
    optional: dict[str, str] = dataclasses.field(default_factory=lambda: BIASES)
    prepare: Callable[[Tensors, Config, int], Tensors] = lambda tensors, config, number: tensors


def decoder(read: Reader, *, layers=None, head_dim=None, activation="hidden_act", **fields) -> Config:
    """What most families have alike. `layers(read, head_dim)` makes the layers; `fields` go into the Config."""
    read("intermediate_size", None)  # the tensors say it, and whether there are biases
    read("attention_bias", None)
    read.only("use_bidirectional_attention", False)
    q_heads, width, stop = read("num_attention_heads"), read("hidden_size"), read("eos_token_id", ())
    head_dim = head_dim or read.all.get("head_dim") or width // q_heads
    return Config(
        **dict(
            family=read.all["model_type"],
            vocabulary=read("vocab_size"),
            width=width,
            q_heads=q_heads,
            layers=(layers or usual_layers)(read, head_dim),
            softmax_scale=head_dim**-0.5,
            norm_eps=read("rms_norm_eps"),
            max_positions=read("max_position_embeddings"),
            activation=activation_of(read, activation),
            tied=read("tie_word_embeddings", False),
            stop_tokens=tuple(stop) if isinstance(stop, (list, tuple)) else (stop,),
        )
        | fields
    )


def activation_of(read: Reader, name: str) -> str:
    """The activation that the field of that name asks for, by its name in model.py."""
    known = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    value = read.values.get(name)
    read.only(name, *known)
    return known.get(value, "silu")


def usual_layers(read: Reader, head_dim: int) -> tuple[Layer, ...]:
    """Layers by `layer_types`, which may have windows and rotary embeddings of their own; without, all are alike."""
    count, kv_heads = read("num_hidden_layers"), read("num_key_value_heads", read.all["num_attention_heads"])
    window, rope = read("sliding_window", None), read.rope()
    types = layer_types(read, ["sliding_attention" if window else "full_attention"] * count)

    def layer(kind):
        own = rope[kind] if kind in rope else rope
        rotary = frequencies(own, head_dim, read.all["max_position_embeddings"])
        return Layer(kv_heads, head_dim, *rotary, window=window if kind == "sliding_attention" else None)

    made = {kind: layer(kind) for kind in {*types}}
    return tuple(made[kind] for kind in types)


def layer_types(read: Reader, default, windowed="sliding_attention"):
    """The kind of each layer; complains of those that there are none of."""
    types = read("layer_types", default)
    others = sorted({*types} - {windowed, "full_attention"})
    if others:
        read.complaints.append(f"layer_types={others!r} (there is {windowed!r} and 'full_attention')")
    return types


def all_but_every(period: int, read: Reader) -> None:
    """What an older file, without layer_types, means: windows in all layers but every `period`-th."""
    kinds = ["sliding_attention"] * (period - 1) + ["full_attention"]
    count = read.all["num_hidden_layers"]
    read.values.setdefault("layer_types", [kinds[number % period] for number in range(count)])


def llama(read: Reader) -> Config:
    """Llama 3: what most families have, and nothing else."""
    read.only("mlp_bias", False)
    return decoder(read)


def qwen3(read: Reader) -> Config:
    """Qwen 3: its window counts only where `use_sliding_window` says so."""
    if not read("use_sliding_window", False):
        read("sliding_window", None)
    return decoder(read)


def gemma2(read: Reader) -> Config:
    """Gemma 2: windows in every second layer, and soft caps."""
    all_but_every(2, read)
    return gemma(
        read, softmax_scale=read("query_pre_attn_scalar") ** -0.5, soft_cap=read("attn_logit_softcapping", None)
    )


def gemma3(read: Reader) -> Config:
    """Gemma 3: windows in all layers but every sixth, and a rotary embedding of their own there."""
    all_but_every(read("sliding_window_pattern", 6), read)
    if local := read("rope_local_base_freq", None):  # the form before rope_parameters
        read.values["rope_parameters"] = dict(full_attention=read.rope(), sliding_attention=dict(rope_theta=local))
    return gemma2(read)


def gemma(read: Reader, **fields) -> Config:
    """What Gemma 2, 3 and 4 have alike."""
    read("hidden_act", None)  # an older file has both, and hidden_activation counts
    scale, cap = math.sqrt(read.all["hidden_size"]), read("final_logit_softcapping", None)
    defaults = dict(activation="hidden_activation", norm_offset=1.0, embedding_scale=scale, final_soft_cap=cap)
    # Fields at their default are not always written.
    read.values.setdefault("tie_word_embeddings", True)
    return decoder(read, **defaults | fields)


def gpt_oss(read: Reader) -> Config:
    """gpt-oss: windows in every second layer, sinks, and experts."""
    all_but_every(2, read)
    read("num_local_experts", None)
    experts = Experts(
        "softmax_of_chosen",
        per_token=read("num_experts_per_tok"),
        swiglu_alpha=read("swiglu_alpha", 1.702),
        swiglu_limit=read("swiglu_limit", 7.0),
    )
    return decoder(read, experts=experts)


def gpt_oss_tensors(tensors: Tensors, config: Config, number: int) -> Tensors:
    """Experts' gates and ups lie in turns, [experts, width, 2 * hidden]."""
    experts = {name: tensors.pop(f"mlp.experts.{name}") for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj")}
    gate_up, bias = experts["gate_up_proj"], experts["gate_up_proj_bias"]
    return tensors | dict(
        expert_gate=gate_up[..., ::2],
        expert_up=gate_up[..., 1::2],
        expert_gate_bias=bias[..., ::2],
        expert_up_bias=bias[..., 1::2],
        expert_down=experts["down_proj"],
        expert_down_bias=tensors.pop("mlp.experts.down_proj_bias"),
    )


def gemma4(read: Reader) -> Config:
    """Its layers without a window have heads of another size, and may take their values from the keys."""
    for name in ("enable_moe_block", "use_double_wide_mlp", "num_kv_shared_layers"):
        read.only(name, False, 0)
    read.only("hidden_size_per_layer_input", 0)
    for name in ("attention_k_eq_v", "vocab_size_per_layer_input"):  # the tensors say it; what there is none of
        read(name, None)
    return gemma(read, layers=gemma4_layers, softmax_scale=1.0, norm_offset=0.0)


def gemma4_layers(read: Reader, head_dim: int) -> tuple[Layer, ...]:
    """Layers without a window have heads of another size."""
    own = read("per_layer_config", {})
    full = dict(head_dim=read("global_head_dim", 512), num_key_value_heads=read("num_global_key_value_heads", None))
    rope = read.values.setdefault("rope_parameters", GEMMA4_ROPE)
    layers = usual_layers(read, head_dim)

    def resized(number, layer):
        sizes = own.get(str(number), {}) if own else full if layer.window is None else {}
        head_dim = sizes.get("head_dim", layer.head_dim)
        kind = "full_attention" if layer.window is None else "sliding_attention"
        return dataclasses.replace(
            layer,
            head_dim=head_dim,
            kv_heads=sizes.get("num_key_value_heads") or layer.kv_heads,
            frequencies=frequencies(rope[kind], head_dim, read.all["max_position_embeddings"])[0],
        )

    return tuple(resized(number, layer) for number, layer in enumerate(layers))


def gemma4_tensors(tensors: Tensors, config: Config, number: int) -> Tensors:
    """Values are normalised without a weight; where they have no matrix, the keys' is theirs too."""
    tensors.setdefault(ATTENTION["value"], tensors[ATTENTION["key"]])
    return tensors | dict(value_norm=np.ones(config.layers[number].head_dim, np.float32))


def llama4(read: Reader) -> Config:
    """Layers see their chunk of positions, or all without rotary embedding and with queries that grow."""
    for name in ("intermediate_size_mlp", "interleave_moe_layer_step", "num_local_experts", "moe_layers"):
        read(name, None)  # the tensors say it
    experts = Experts("sigmoid_of_chosen", per_token=read("num_experts_per_tok", 1), scales_inputs=True)
    floor = read("floor_scale", 8192)
    norms_rotated = read("use_qk_norm", True)
    return decoder(read, layers=llama4_layers, experts=experts, temperature_floor=floor, norms_rotated=norms_rotated)


def llama4_layers(read: Reader, head_dim: int) -> tuple[Layer, ...]:
    """Layers with a rotary embedding see their chunk of positions; the others see all keys."""
    count, kv_heads = read("num_hidden_layers"), read("num_key_value_heads")
    interval, chunk = read("no_rope_layer_interval", 4), read("attention_chunk_size", None)
    rotated = read("no_rope_layers", None) or [int((number + 1) % interval != 0) for number in range(count)]
    default = ["chunked_attention" if here and chunk else "full_attention" for here in rotated]
    rate = read("attn_scale", 0.1) if read("attn_temperature_tuning", True) else 0.0
    rotary, scale = frequencies(read.rope(), head_dim, read.all["max_position_embeddings"])
    return tuple(
        Layer(
            kv_heads,
            head_dim,
            rotary if here else (0.0,) * len(rotary),
            scale if here else 1.0,
            chunk=chunk if kind == "chunked_attention" else None,
            temperature=0.0 if here else rate,
        )
        for kind, here in zip(layer_types(read, default, "chunked_attention"), rotated, strict=True)
    )


def llama4_tensors(tensors: Tensors, config: Config, number: int) -> Tensors:
    """Rotary pairs lie side by side; experts' gates and ups are one matrix; what is rotated may be normalised."""
    for name in ("q_proj", "k_proj"):
        name = f"self_attn.{name}.weight"
        tensors[name] = pairs_apart(tensors[name], config.layers[number].head_dim)
    if any(config.layers[number].frequencies) and config.norms_rotated:
        tensors["rotated_norm"] = np.ones(config.layers[number].head_dim, np.float32)
    if "feed_forward.experts.gate_up_proj" in tensors:
        gate, up = np.split(tensors.pop("feed_forward.experts.gate_up_proj"), 2, axis=-1)
        tensors |= dict(expert_gate=gate, expert_up=up, expert_down=tensors.pop("feed_forward.experts.down_proj"))
    return {name.replace("shared_expert.", ""): tensor for name, tensor in tensors.items()}


def pairs_apart(matrix, head_dim: int):
    """Rows of a projection [heads * head_dim, width], whose rotary pairs lie side by side, as halves of each head."""
    heads = matrix.reshape(-1, head_dim // 2, 2, matrix.shape[-1])
    return heads.swapaxes(1, 2).reshape(matrix.shape)


def deepseek_v3(read: Reader) -> Config:
    """DeepSeek V3: latent caches, and experts in groups."""
    for name in ("num_key_value_heads", "moe_intermediate_size", "n_shared_experts", "n_routed_experts", "q_lora_rank"):
        read(name, None)  # the tensors say it, or it says nothing of latents
    for name in ("first_k_dense_replace", "num_mtp_layers"):
        read(name, None)
    read.only("scoring_func", "sigmoid")
    read.only("topk_method", "noaux_tc")
    read.only("moe_layer_freq", 1)
    read.only("rope_interleave", True)
    latent = Latent(read("kv_lora_rank"), read("qk_rope_head_dim"), read("qk_nope_head_dim"), read("v_head_dim"))
    experts = Experts(
        "sigmoid_in_groups",
        per_token=read("num_experts_per_tok"),
        groups=read("n_group"),
        top_groups=read("topk_group"),
        normalised=read("norm_topk_prob", True),
        scale=read("routed_scaling_factor", 1.0),
    )
    rope = read.rope()
    scale = (latent.head_dim + latent.rope_dim) ** -0.5
    if rope.get("mscale_all_dim") and rope.get("rope_type", rope.get("type")) != "default":
        scale *= yarn_scale(rope["factor"], rope["mscale_all_dim"]) ** 2

    def layers(read, head_dim):
        rotary = frequencies(rope, latent.rope_dim, read.all["max_position_embeddings"])
        return (Layer(1, latent.rank + latent.rope_dim, *rotary),) * read("num_hidden_layers")

    return decoder(read, layers=layers, experts=experts, latent=latent, softmax_scale=scale)


def deepseek_v3_tensors(tensors: Tensors, config: Config, number: int) -> Tensors:
    """Takes keys' and values' matrices apart, which absorb into queries and results; stacks the experts."""
    latent, heads = config.latent, config.q_heads
    per_head = tensors.pop("self_attn.kv_b_proj.weight").reshape(heads, -1, latent.rank)
    key, value = np.split(per_head, [latent.head_dim], axis=1)
    down = tensors.pop("self_attn.kv_a_proj_with_mqa.weight")
    down = np.concatenate([down[: latent.rank], pairs_apart(down[latent.rank :], latent.rope_dim)])
    up = "self_attn.q_b_proj.weight" if "self_attn.q_b_proj.weight" in tensors else "self_attn.q_proj.weight"
    query = tensors.pop(up)
    query = query.reshape(heads, -1, query.shape[-1])
    plain, rotary = np.split(query, [latent.head_dim], axis=1)
    rotary = np.stack([pairs_apart(head, latent.rope_dim) for head in rotary])
    ready = dict(
        key_up=key,
        value_up=value.swapaxes(1, 2),
        latent_down=down.T,
        query_up=np.concatenate([plain, rotary], axis=1).transpose(2, 0, 1),
    )
    experts = {name for name in tensors if name.startswith("mlp.experts.")}
    for ours in ("gate", "up", "down") if experts else ():
        count = len(experts) // 3
        ready[f"expert_{ours}"] = np.stack(
            [tensors.pop(f"mlp.experts.{expert}.{ours}_proj.weight").T for expert in range(count)]
        )
    return {name.replace("shared_experts.", ""): tensor for name, tensor in tensors.items()} | ready


GEMMA4_ROPE = dict(
    sliding_attention=dict(rope_theta=10_000.0),
    full_attention=dict(rope_type="proportional", partial_rotary_factor=0.25, rope_theta=1_000_000.0),
)
GPT_OSS = dict(sinks="self_attn.sinks", router="mlp.router.weight", router_bias="mlp.router.bias")
LLAMA4_FEEDS = {name: theirs.replace("mlp.", "feed_forward.") for name, theirs in MLP.items()}
DEEPSEEK = NORMS_BEFORE | MLP | dict(latent_norm="self_attn.kv_a_layernorm.weight", out=ATTENTION["out"])
DEEPSEEK_OPTIONAL = dict(
    query_down="self_attn.q_a_proj.weight",
    query_down_norm="self_attn.q_a_layernorm.weight",
    router="mlp.gate.weight",
    router_correction="mlp.gate.e_score_correction_bias",
)

FAMILIES = {
    "llama": Family(llama, NORMS_BEFORE | ATTENTION | MLP),
    "mistral": Family(decoder, NORMS_BEFORE | ATTENTION | MLP),
    "olmo2": Family(decoder, NORMS_BEHIND | ATTENTION | HEAD_NORMS | MLP),
    "qwen3": Family(qwen3, NORMS_BEFORE | ATTENTION | HEAD_NORMS | MLP),
    "gemma2": Family(gemma2, NORMS_AROUND | ATTENTION | MLP),
    "gemma3_text": Family(gemma3, NORMS_AROUND | ATTENTION | HEAD_NORMS | MLP),
    "gemma4_text": Family(
        gemma4, NORMS_AROUND | ATTENTION | HEAD_NORMS | MLP | dict(layer_scale="layer_scalar"), prepare=gemma4_tensors
    ),
    "gpt_oss": Family(gpt_oss, NORMS_BEFORE | ATTENTION | GPT_OSS, prepare=gpt_oss_tensors),
    "llama4_text": Family(
        llama4,
        NORMS_BEFORE | ATTENTION | LLAMA4_FEEDS,
        BIASES | dict(router="feed_forward.router.weight"),
        llama4_tensors,
    ),
    "deepseek_v3": Family(deepseek_v3, DEEPSEEK, DEEPSEEK_OPTIONAL, deepseek_v3_tensors),
}


def config_of(values: dict) -> Config:
    """The Config that a config.json asks for. Raises ValueError where it asks for what is not implemented."""
    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"config.json has model_type {kind!r}; families that there are: {', '.join(sorted(FAMILIES))}")
    read = Reader(values)
    config = FAMILIES[kind].config(read)
    read.finish()
    return config
