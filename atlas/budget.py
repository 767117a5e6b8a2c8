"""From a budget of device memory to frames, and back to the smallest budget that works."""

from __future__ import annotations

from atlas.errors import BudgetError
from atlas.eviction import CacheShape, PoolPlan, plan_pool
from atlas.frame_pool import frame_cost_bytes, pool_overhead_bytes
from atlas.ops.crc32_tables import TABLE_WORDS
from atlas.ops.swap_state import swap_state_bytes
from atlas.swap import N_LANES, lane_bytes
from atlas.swap_queue import LIST_BYTES
from forge.pages import PAGE_BYTES
from forge.sgmap import ShardMap
from forge.sizes import Size, format_bytes

_SCRATCH_BYTES = 16 << 10  # shard numbers of loads under way and other passing arrays


def plan_budget(
    shard_map: ShardMap,
    shape: CacheShape,
    budget: Size,
    *,
    policy: str | None,
    prefetch_distance: int | None,
    reserved_bytes: int,
    on_device: bool,
) -> tuple[PoolPlan, int]:
    """Divide a budget.

    Parameters
    ----------
    shard_map, shape
        The model, and what a pool has to serve of it.
    budget
        Bytes for everything; or a share of the cached pages, to which the rest is added. The high
        zone is resident whatever the share.
    policy, prefetch_distance
        None for what the map says.
    reserved_bytes
        Spent by the caller.
    on_device
        Whether kernels drive the cache (`atlas.device_cache`), or the host does.

    Returns
    -------
    plan, budget_bytes
        How the pool is used, and the budget in bytes.

    Raises
    ------
    BudgetError
        If the budget is too small; the message says the smallest that works.
    GGUFShardError
        If the policy is not known.
    """
    settings = shard_map.atlas
    fixed, per_frame = cache_cost_bytes(shard_map, on_device)
    fixed += reserved_bytes
    if budget.n_bytes is not None:
        n_frames = (budget.n_bytes - fixed) // per_frame
    else:
        assert budget.fraction is not None
        n_frames = shape.n_high + round(budget.fraction * (shape.n_shards - shape.n_high))
    distance = settings.prefetch_distance if prefetch_distance is None else prefetch_distance
    try:
        plan = plan_pool(
            shape, n_frames, policy or settings.cache_policy, distance, by_kernels=on_device
        )
    except BudgetError as error:
        smallest = fixed + error.smallest_bytes * per_frame
        given = f"{budget.n_bytes} bytes" if budget.n_bytes else f"{budget.fraction:.3%}"
        raise BudgetError(
            f"budget {given}: too small, the smallest that works is {smallest} bytes "
            f"({format_bytes(smallest)})",
            smallest,
        ) from None
    return plan, budget.n_bytes or fixed + plan.n_frames * per_frame


def cache_cost_bytes(shard_map: ShardMap, on_device: bool) -> tuple[int, int]:
    """Memory of a cache without frames, and of each frame."""
    n_pages, n_shards = shard_map.n_pages, shard_map.n_shards
    shard_bytes = shard_map.pages_per_shard * PAGE_BYTES
    if not on_device:
        fixed = pool_overhead_bytes(n_pages, n_shards) + N_LANES * lane_bytes(shard_bytes)
        return fixed + _SCRATCH_BYTES, frame_cost_bytes(shard_map.shard_shift)
    state = swap_state_bytes(n_shards, 0)
    # Beside that: the published table, numbers and host addresses of shards, the CRCs, and tables.
    fixed = state + n_shards * (4 + 4 + 8) + n_pages * 4 + TABLE_WORDS * 4
    return fixed + LIST_BYTES + _SCRATCH_BYTES, shard_bytes + swap_state_bytes(n_shards, 1) - state
