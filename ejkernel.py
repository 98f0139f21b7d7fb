"""ejKernel's ways in, as thin faces over the operation, so that code written for it moves over.

`unified_attention` and `ragged_page_attention_v2` are here only, and not in the package itself: their caches lie as
ejKernel's do, and are read where they are.
"""

from collections.abc import Callable
import contextlib
import functools
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from paged_prefill.lowering.call import Problem, flatten
from paged_prefill.lowering.choose import KERNELS, choose, default_platform, device_of
from paged_prefill.primitive import checks, masks
from paged_prefill.primitive.api import prefill_page_attention, ragged_paged_prefill
from paged_prefill.primitive.binding import shapes_of
from paged_prefill.primitive.checks import DEFAULT_MASK_VALUE, Platform
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive.cut import cut_of_specs
from paged_prefill.primitive.layout import DEFAULT_LAYOUT
from paged_prefill.primitive.operands import ATTENTION_DTYPES, PREFILL
from paged_prefill.primitive.prefill import parameters_of
from paged_prefill.sharding.partition import Call, on_one_device


class PrefillPageAttention:
    """Chunked prefill over a paged cache, with the methods of ejKernel's operation.

    An *invocation*, where a method takes one, is any object whose `kwargs` hold the arguments of
    `prefill_page_attention` by name: query, key_cache, value_cache, context_len, page_indices (arrays or
    `jax.ShapeDtypeStruct`), and as far as they are given softmax_scale, attn_logits_soft_cap, sliding_window, platform.
    """

    op_id = "prefill_page_attention"

    def get_impl(self, cfg: PrefillPageAttentionConfig):
        """The operation with `cfg` settled: a function of the arguments of `run`, all by name.

        It also takes the sizes block_k (`cfg.block_kv`), num_warps and num_stages, which stand before those of `cfg`.
        """

        def run(*, block_k=None, num_warps=None, num_stages=None, **arguments):
            sizes = PrefillPageAttentionConfig(block_k=block_k, num_warps=num_warps, num_stages=num_stages)
            return self.run(cfg=sizes.over(cfg or PrefillPageAttentionConfig()), **arguments)

        return run

    def run(
        self, query, key_cache, value_cache, context_len, page_indices, platform=None, *, cfg=None, **parameters
    ) -> jax.Array:
        """`prefill_page_attention`, whose arguments these are and whose errors it raises. cfg None leaves it open."""
        return prefill_page_attention(
            query, key_cache, value_cache, context_len, page_indices, platform=platform, cfg=cfg, **parameters
        )

    def create_shard_map_wrapper(
        self, query, key_cache, value_cache, context_len, page_indices, platform=None, *, cfg=None, **parameters
    ):
        """`paged_prefill.create_shard_map_wrapper`, whose arguments these are: (function, call_args)."""
        return create_shard_map_wrapper(
            query, key_cache, value_cache, context_len, page_indices, platform=platform, cfg=cfg, **parameters
        )

    def heuristic_cfg(self, invocation=None) -> PrefillPageAttentionConfig:
        """What the kernel of this machine would run an invocation with; everything left open for None."""
        if invocation is None:
            return PrefillPageAttentionConfig()
        return self._configurations(invocation, default_platform())[0]

    def candidate_cfgs(self, invocation) -> list[PrefillPageAttentionConfig]:
        """The configurations worth timing for an invocation, the heuristic one first."""
        return self._configurations(invocation, default_platform())[1]

    def candidate_cfgs_gpu(self, invocation) -> list[PrefillPageAttentionConfig]:
        """Those for a GPU: of this process, or the one that `jax.sharding.use_abstract_mesh` says; else for any."""
        return self._configurations(invocation, "rocm" if default_platform() == "rocm" else "cuda")[1]

    def candidate_cfgs_tpu(self, invocation) -> list[PrefillPageAttentionConfig]:
        """Likewise for a TPU."""
        return self._configurations(invocation, "tpu")[1]

    def _configurations(self, invocation, platform):
        arguments = invocation.kwargs
        problem = _problem(arguments)
        device = device_of(platform)
        name, _ = choose(problem, device, arguments.get("platform") or "auto")
        kernel = KERNELS[device.platform][name]
        return kernel.heuristic(problem, device), kernel.candidates(problem, device)


def _problem(arguments: dict[str, Any]) -> Problem:
    """The static description of a call of `prefill_page_attention` on one device."""
    names = ("query", "key_cache", "value_cache", "context_len", "page_indices")
    operands = checks.abstract_pack_of_one(*(arguments[name] for name in names))
    checks.check_operands(PREFILL, operands, cache_batch_dims=0, cache_layout=DEFAULT_LAYOUT)
    attention = checks.attention_of(
        softmax_scale=arguments.get("softmax_scale"),
        attn_logits_soft_cap=arguments.get("attn_logits_soft_cap"),
        sliding_window=arguments.get("sliding_window"),
        head_dim=operands["query"].shape[-1],
    )
    kv_heads = operands["key_cache"].shape[0]
    local = functools.partial(flatten, cache_batch_dims=0, num_kv_heads=kv_heads, attention=attention)
    return jax.eval_shape(local, operands | dict(kv_head_start=jax.ShapeDtypeStruct((), jnp.int32))).problem


def create_shard_map_wrapper(
    query: Float[Array, "chunk q_heads head_dim"],
    key_cache: Float[Array, "kv_heads num_pages page_size head_dim"],
    value_cache: Float[Array, "kv_heads num_pages page_size value_dim"],
    context_len: Int[Array, "1"],
    page_indices: Int[Array, " pages_per_seq"],
    platform: Platform | None = None,
    *,
    softmax_scale: float | None = None,
    mask_value: float = DEFAULT_MASK_VALUE,
    attn_logits_soft_cap: float | None = None,
    sliding_window: int | None = None,
    cfg: PrefillPageAttentionConfig | None = None,
    mesh: jax.sharding.Mesh | None = None,
    in_specs: tuple[PartitionSpec, ...] | None = None,
    out_specs: PartitionSpec | None = None,
    check_vma: bool = False,
) -> tuple[Callable[..., Float[Array, "chunk q_heads value_dim"]], tuple[Array, ...]]:
    """`prefill_page_attention` under `jax.shard_map`, cut as the specs say: `function, call_args`, as in ejKernel.

    Where `in_specs` cuts the query's heads by more axes than the caches', each device attends to those of its KV heads
    that its query heads read, so caches with fewer heads than devices stay whole. Where `prefill_page_attention` is
    called on a mesh directly, none of this is needed.

    Args:
      query, key_cache, value_cache, context_len, page_indices: arrays, or anything with their shapes.
      platform, softmax_scale, mask_value, attn_logits_soft_cap, sliding_window, cfg: as in `prefill_page_attention`.
      mesh: the mesh to cut over.
      in_specs: one PartitionSpec each for the five arrays.
      out_specs: that of the output, which is cut as the query is.
      check_vma: as in `jax.shard_map`.

    Returns:
      A function of the five arrays, and the five arrays.

    Raises:
      ValueError: mesh, in_specs or out_specs is missing, or they cut anything but heads and pages; names which.
    """
    missing = [n for n, x in (("mesh", mesh), ("in_specs", in_specs), ("out_specs", out_specs)) if x is None]
    if missing:
        missing = " and no ".join(missing)
        raise ValueError(f"create_shard_map_wrapper needs mesh, in_specs and out_specs, got no {missing}")
    call_args = (query, key_cache, value_cache, context_len, page_indices)
    if len(in_specs) != len(call_args):
        raise ValueError(f"in_specs must have one PartitionSpec for each of {len(call_args)} arrays, got {in_specs}")
    checks.check_mask_value(mask_value)
    names = ("query", "key_cache", "value_cache", "context_lens", "page_indices", "out")
    given = dict(zip(names, (*in_specs, out_specs), strict=True))
    run = _on_one_device(
        mesh,
        given,
        checks.abstract_pack_of_one(*call_args),
        softmax_scale=softmax_scale,
        attn_logits_soft_cap=attn_logits_soft_cap,
        sliding_window=sliding_window,
        platform=platform,
        config=cfg,
    )

    def local(*arrays):
        indices = checks.indices_of_one(*arrays)
        return run(*checks.pack_of_one(*arrays[:3], *indices))

    function = jax.shard_map(local, mesh=mesh, in_specs=tuple(in_specs), out_specs=out_specs, check_vma=check_vma)
    return function, call_args


def _on_one_device(mesh, specs, operands, **parameters) -> Callable[..., Array]:
    """The output of what one device runs, a function of its operands in the table's order.

    `operands` are all those of the whole call, by name, and `specs` those that the caller gave, of the output too.
    """
    parameters = parameters_of(operands, **parameters)
    present = PREFILL.present(operands)
    shapes = shapes_of(PREFILL, present, [operands[name] for name in present], 0, parameters["cache_layout"])
    cut = cut_of_specs(mesh.shape, shapes, specs)
    run = on_one_device(mesh.shape, cut, shapes, Call(PREFILL, present, 0, tuple(parameters.items())))
    return lambda *local: run(*local)[0]


def unified_attention(
    queries: Float[Array, "tokens q_heads head_dim"],
    key_cache: Float[Array, "num_pages page_size kv_heads head_dim"],
    value_cache: Float[Array, "num_pages page_size kv_heads head_dim"],
    kv_lens: Int[Array, " seqs"],
    block_tables: Int[Array, "seqs pages_per_seq"],
    query_start_loc: Int[Array, " seqs_plus_1"],
    alibi_slopes: Float[Array, " q_heads"] | None = None,
    qq_bias: Float[Array, "chunk chunk"] | None = None,
    softmax_aux: Float[Array, " q_heads"] | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    seq_threshold_3d: int | None = None,
    platform: Platform | None = None,
    mesh: jax.sharding.Mesh | None = None,
    in_specs: tuple[PartitionSpec | None, ...] | None = None,
    out_specs: PartitionSpec | None = None,
    cfg: object | None = None,
) -> Float[Array, "tokens q_heads head_dim"]:
    """ejKernel's `unified_attention`, argument for argument: `ragged_paged_prefill` over caches laid out as "pskd".

    Args:
      queries: the new tokens of all sequences, back to back. Where the caches have another float dtype it is multiplied
        in theirs; the output has the queries' own.
      key_cache, value_cache: the page pools, the new tokens already written.
      kv_lens: tokens of each sequence in the cache, the new ones included.
      block_tables: the pages of each sequence, in order.
      query_start_loc: sequence s owns tokens query_start_loc[s] : query_start_loc[s + 1].
      alibi_slopes, qq_bias: must be None: here logits have no bias. A qq_bias of 0 and -inf is a tree, which
        `ragged_paged_prefill` takes as `tree_mask`.
      softmax_aux: sinks, a logit of each query head.
      softmax_scale: multiplies query . key; 1 / sqrt(head_dim) by default.
      causal: False lets each row see all keys of its sequence, or with a window all from the window's first on.
      sliding_window: keys that a row sees, its own included; None or 0 for all.
      logits_soft_cap: logits become cap * tanh(logits / cap); None or 0 leaves them.
      seq_threshold_3d: accepted, without effect: how keys are split follows from the call.
      platform: as in `ragged_paged_prefill`.
      mesh, in_specs, out_specs: where all three are given, the call runs under `jax.shard_map`, cut as they say: a
        PartitionSpec or None for each of the nine arrays, and that of the output. Only heads and pages can be cut.
      cfg: a `PrefillPageAttentionConfig`, or ejKernel's own, of which the platform and backend are taken: its sizes are
        those of other kernels.

    Returns:
      The output in the queries' dtype; 0 where a row sees no key, and for tokens that no sequence owns.

    Raises:
      NotImplementedError: alibi_slopes or qq_bias is given.
      ValueError, TypeError: as `ragged_paged_prefill`, in its terms; a note on the error has these names.
    """
    _refuse("unified_attention", alibi_slopes=alibi_slopes, qq_bias=qq_bias)
    checks.check_flag("causal", causal)
    arrays = dict(
        query=queries,
        key_cache=key_cache,
        value_cache=value_cache,
        context_lens=kv_lens,
        page_indices=block_tables,
        query_offsets=query_start_loc,
    )
    with _named(context_lens="kv_lens"):
        return _attend(
            arrays,
            softmax_aux,
            cache_layout="pskd",
            causal=causal,
            sliding_window=sliding_window,
            softmax_scale=softmax_scale,
            attn_logits_soft_cap=logits_soft_cap,
            platform=platform,
            cfg=cfg,
            cut=(mesh, in_specs, out_specs),
            order=(*arrays, None, None, "sinks"),
        )


def ragged_page_attention_v2(
    queries: Float[Array, "tokens q_heads head_dim"],
    kv_pages: Float[Array, "num_pages page_size 2*kv_heads head_dim"],
    context_lens: Int[Array, " seqs"],
    block_tables: Int[Array, "seqs pages_per_seq"],
    query_start_loc: Int[Array, " seqs_plus_1"],
    num_seqs: Int[Array, " 1"] | int,
    softmax_aux: Float[Array, " q_heads"] | None = None,
    *,
    softmax_scale: float | None = None,
    logits_soft_cap: float | None = None,
    compute_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    optimized: bool = False,
    sliding_window: int | None = None,
    mask_value: float | None = None,
    vmem_limit_bytes: int | None = None,
    platform: Platform | None = None,
    cfg: object | None = None,
    mesh: jax.sharding.Mesh | None = None,
    in_specs: tuple[PartitionSpec | None, ...] | None = None,
    out_specs: PartitionSpec | None = None,
) -> Float[Array, "tokens q_heads head_dim"]:
    """ejKernel's `ragged_page_attention_v2`, argument for argument: `ragged_paged_prefill` over caches as "ps(k2)d".

    Args:
      queries, context_lens, block_tables, query_start_loc, softmax_aux: as in `unified_attention`.
      kv_pages: keys and values in one array, each key's head followed by its value's.
      num_seqs: how many sequences there are: a number, also traced, or an array whose first element it is. What context
        lens, block tables and query_start_loc hold past it does not count.
      softmax_scale, logits_soft_cap, sliding_window, platform, cfg: as in `unified_attention`.
      compute_dtype, optimized, vmem_limit_bytes: accepted, without effect: sums are in float32, products in the dtype
        of the caches, and kernels know their memory.
      mask_value: accepted; masked keys have weight exactly 0 whatever it is.
      mesh, in_specs, out_specs: as in `unified_attention`, for the seven arrays.

    Returns, Raises:
      As `unified_attention`.
    """
    if mask_value is not None:
        checks.check_mask_value(mask_value)
    arrays = dict(
        query=queries,
        key_cache=kv_pages,
        context_lens=context_lens,
        page_indices=block_tables,
        query_offsets=query_start_loc,
    )
    with _named(key_cache="kv_pages"):
        indices = checks.int32_indices(num_seqs=num_seqs, **{name: arrays[name] for name in _PACK})
        return _attend(
            arrays | _of_the_first(indices.pop("num_seqs"), **indices),
            softmax_aux,
            cache_layout="ps(k2)d",
            causal=True,
            sliding_window=sliding_window,
            softmax_scale=softmax_scale,
            attn_logits_soft_cap=logits_soft_cap,
            platform=platform,
            cfg=cfg,
            cut=(mesh, in_specs, out_specs),
            order=(*arrays, None, "sinks"),
        )


_PACK = ("context_lens", "page_indices", "query_offsets")
_THEIRS = dict(
    query="queries",
    page_indices="block_tables",
    query_offsets="query_start_loc",
    sinks="softmax_aux",
    attn_logits_soft_cap="logits_soft_cap",
)


def _refuse(function, **arguments) -> None:
    """NotImplementedError where any is given of those that the operation has no counterpart for."""
    if given := [name for name, value in arguments.items() if value is not None]:
        raise NotImplementedError(
            f"{function} takes no {' and no '.join(given)} here: logits have no bias. A qq_bias of 0 and -inf is a "
            "tree, which ragged_paged_prefill takes as tree_mask"
        )


@contextlib.contextmanager
def _named(**theirs):
    """Adds what ejKernel calls the arguments to errors, which are in the operation's terms; `theirs` are this call's."""
    try:
        yield
    except (ValueError, TypeError) as error:
        names = ", ".join(f"{name} is {other}" for name, other in (_THEIRS | theirs).items())
        error.add_note(f"ejKernel's names: {names}")
        raise


def _of_the_first(num_seqs, context_lens, page_indices, query_offsets):
    """The index arrays of a pack whose sequences from `num_seqs` on own no token, so that nothing else of them counts."""
    checks.check_rank("context_lens", context_lens, "[seqs]", 1)
    checks.check_rank("query_offsets", query_offsets, "[seqs + 1]", 1)
    if not num_seqs.size:
        raise ValueError(f"num_seqs must be a number, or an array that begins with it, got shape {num_seqs.shape}")
    seqs = context_lens.shape[0]
    count = jnp.clip(num_seqs.reshape(-1)[0], 0, seqs)
    number = jnp.arange(seqs + 1, dtype=jnp.int32)
    offsets = jnp.asarray(query_offsets).at[jnp.minimum(number, count)].get(mode="clip")
    return dict(context_lens=context_lens, page_indices=page_indices, query_offsets=offsets)


def _attend(arrays, softmax_aux, *, causal, sliding_window, attn_logits_soft_cap, cfg, cut, order, **others):
    """The output of a call by ejKernel's rules: 0 is off, and dtypes may differ.

    `arrays` are the operands that there are in any case; `cut` is (mesh, in_specs, out_specs), and `order` names what
    stands where in in_specs.
    """
    for name in arrays.keys() - {*_PACK}:
        checks.check_array(name, arrays[name])
    query, cache_dtype = arrays["query"], arrays["key_cache"].dtype
    operands = arrays | checks.int32_indices(**{name: arrays[name] for name in _PACK})
    if cache_dtype != query.dtype and cache_dtype.name in ATTENTION_DTYPES and query.dtype.name in ATTENTION_DTYPES:
        operands["query"] = query.astype(cache_dtype)
    if softmax_aux is not None:
        operands |= checks.of_packs((), sinks=softmax_aux)
        if operands["sinks"].shape != query.shape[-2:-1]:
            raise ValueError(f"softmax_aux must have shape [q_heads], {query.shape[-2:-1]}, got {operands['sinks'].shape}")
    window = _none_for_0(sliding_window)
    if not causal:
        operands["key_ranges"], window = _not_causal(operands, window), None
    parameters = dict(others, sliding_window=window, attn_logits_soft_cap=_none_for_0(attn_logits_soft_cap))
    if any(x is None for x in cut):
        out = ragged_paged_prefill(**dict(value_cache=None) | operands, cfg=_config_of(cfg), **parameters)
    else:
        out = _under_shard_map(operands, order, *cut, config=_config_of(cfg), **parameters)
    return out.astype(query.dtype)


def _none_for_0(value):
    """What is off by ejKernel's rules as it is by this project's; arrays, traced ones too, are left to the checks."""
    return None if isinstance(value, numbers.Number) and value == 0 else value


def _under_shard_map(operands, order, mesh, in_specs, out_specs, **parameters):
    """The output of a call that is cut as its caller says."""
    if len(in_specs) != len(order):
        raise ValueError(
            f"in_specs must have one PartitionSpec or None for each of {len(order)} arrays, got {len(in_specs)} of them"
        )
    given = {name: spec or PartitionSpec() for name, spec in zip(order, in_specs) if name in operands}
    given |= {name: PartitionSpec() for name in operands if name not in given}
    present = PREFILL.present(operands)
    run = _on_one_device(mesh, given | dict(out=out_specs), operands, **parameters)
    specs = tuple(given[name] for name in present)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
    return mapped(*(operands[name] for name in present))


def _not_causal(operands, window):
    """The ranges of rows that see what comes after them too."""
    where = operands["context_lens"], operands["query_offsets"], operands["query"].shape[0]
    ranges = masks.full(*where)
    if window is None:
        return ranges
    low = jnp.minimum(masks.causal(*where, window=window)[..., 0], ranges[..., 1])
    return jnp.stack([low, ranges[..., 1]], axis=-1)


def _config_of(cfg) -> PrefillPageAttentionConfig | None:
    """A configuration of this project's, or what there is to take from one of ejKernel's."""
    if cfg is None or isinstance(cfg, PrefillPageAttentionConfig):
        return cfg
    if not hasattr(cfg, "platform"):
        got = checks.shown(cfg)
        raise TypeError(f"cfg must be a PrefillPageAttentionConfig, one of ejKernel's, or None, got {got}")
    platform, backend = (getattr(cfg, name, None) for name in ("platform", "backend"))
    return PrefillPageAttentionConfig(platform=platform, backend=getattr(backend, "value", backend))
