"""Which pages tensors go to: zones, order, shard boundaries."""

from __future__ import annotations

from itertools import pairwise

import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given
from hypothesis import strategies as st

from experiments.validation import gguf_factory as factory
from experiments.validation.gguf_factory import Tensor
from forge.gguf_file import GGUFHeader, parse_header
from forge.page_plan import (
    PagePlan,
    RawPlan,
    choose_pages_per_shard,
    padding_ranges,
    plan_pages,
    zone_of,
)


def header_of(*tensors: Tensor, **options: object) -> GGUFHeader:
    return parse_header(factory.gguf(tensors, **options), "model.gguf")


def plan_of(*tensors: Tensor, per_shard: int | None = None) -> PagePlan:
    return plan_pages([header_of(*tensors)], [[]], "column_major", per_shard)


def matrix(name: str, shape: tuple[int, ...] = (32, 8)) -> Tensor:
    return factory.tensor(name, Type.F32, shape)


def assert_apart(plan: PagePlan) -> None:
    """No page belongs to two runs, and the last page is the plan's last."""
    spans = sorted((run.first_page, run.first_page + run.pages) for run in plan.runs)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert spans[-1][1] == plan.n_pages


@pytest.mark.parametrize(
    ("name", "shape", "has_output", "zone"),
    [
        ("output_norm.weight", (32,), True, "high"),
        ("blk.0.attn_norm.weight", (32, 1, 1), True, "high"),
        ("blk.0.ffn_gate_inp.weight", (32, 8), True, "high"),
        ("blk.0.ffn_gate_inp.weight", (1024, 257), True, "normal"),
        ("rope_freqs.weight", (1 << 18,), True, "high"),
        ("enormous_vector", ((1 << 18) + 1,), True, "normal"),
        ("blk.0.attn_q.weight", (32, 8), True, "normal"),
        ("output.weight", (32, 8), True, "normal"),
        ("token_embd.weight", (32, 8), True, "cold"),
        ("token_embd.weight", (32, 8), False, "normal"),
        ("blk.0.ffn_up_exps.weight", (32, 8, 4), True, "cold"),
        ("blk.0.ffn_up_exps.weight", (32, 1, 1), True, "cold"),
        ("blk.0.ffn_up_exps.bias", (32, 8), True, "cold"),
    ],
)
def test_zones(name: str, shape: tuple[int, ...], has_output: bool, zone: str) -> None:
    (info,) = header_of(factory.tensor(name, Type.F32, shape)).tensors
    assert zone_of(info, has_output) == zone


def test_pages_come_in_the_order_of_a_forward_pass() -> None:
    names = [
        "token_embd.weight", "output_norm.weight", "output.weight",
        "blk.10.attn_q.weight", "blk.2.ffn_down.weight", "blk.2.ffn_gate.weight",
        "blk.2.something_new.weight", "blk.2.attn_output.weight", "blk.2.attn_k.weight",
        "blk.2.attn_q.weight", "blk.2.attn_norm.weight",
    ]  # fmt: skip
    vectors = {"output_norm.weight", "blk.2.attn_norm.weight"}
    tensors = [matrix(name, (32,) if name in vectors else (32, 8)) for name in names]
    plan = plan_of(*tensors, per_shard=4)
    assert [s.tensor.name for s in plan.slices] == [
        "blk.2.attn_norm.weight", "output_norm.weight",
        "blk.2.attn_q.weight", "blk.2.attn_k.weight", "blk.2.attn_output.weight",
        "blk.2.ffn_gate.weight", "blk.2.ffn_down.weight", "blk.2.something_new.weight",
        "blk.10.attn_q.weight", "output.weight",
        "token_embd.weight",
    ]  # fmt: skip
    assert plan.zones == (("high", 0, 2), ("normal", 4, 8), ("cold", 12, 1))
    assert [run.first_page for run in plan.raw] == [16]
    assert_apart(plan)


def test_slices_of_an_expert_lie_together_on_shard_boundaries() -> None:
    tensors = [
        matrix(f"blk.{layer}.ffn_{which}_exps.weight", (32, 40, 3))
        for layer in (1, 0)
        for which in ("down", "gate", "up")
    ]
    plan = plan_of(matrix("token_embd.weight"), matrix("output.weight"), *tensors, per_shard=8)
    experts = [s for s in plan.slices if "_exps" in s.tensor.name]
    assert [(s.tensor.name.split(".", 2)[1], s.index) for s in experts[::3]] == [
        (layer, expert) for layer in "01" for expert in range(3)
    ]
    for first, *rest in zip(experts[::3], experts[1::3], experts[2::3], strict=True):
        assert first.first_page % 8 == 0
        assert [s.tensor.name.split(".")[2] for s in (first, *rest)] == [
            "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps",
        ]  # fmt: skip
        for before, after in pairwise((first, *rest)):
            assert after.first_page == before.first_page + before.pages
    for s in experts:
        assert s.bytes == 32 * 40 * 4
        assert s.offset == s.tensor.offset + s.index * s.bytes
    assert [zone for zone, _, _ in plan.zones] == ["normal", "cold"]
    assert_apart(plan)


def test_layers_may_have_different_numbers_of_experts() -> None:
    plan = plan_of(
        matrix("blk.0.ffn_gate_exps.weight", (32, 4, 3)),
        matrix("blk.0.ffn_up_exps.weight", (32, 4, 1)),
        matrix("blk.0.ffn_down_exps.weight", (32, 1, 1)),
    )
    found = [(s.tensor.name.split(".")[2], s.index) for s in plan.slices]
    assert sorted(found) == [
        ("ffn_down_exps", 0), ("ffn_gate_exps", 0), ("ffn_gate_exps", 1), ("ffn_gate_exps", 2),
        ("ffn_up_exps", 0),
    ]  # fmt: skip
    assert_apart(plan)


def test_padding_is_what_lies_between_and_behind() -> None:
    data = factory.gguf(
        [factory.tensor("a", Type.F32, (3,)), factory.tensor("b", Type.F32, (8,))], tail=b"tail"
    )
    header = parse_header(data, "x")
    first, second = header.tensors
    assert padding_ranges(header) == [
        (header.header_bytes, first.offset - header.header_bytes),
        (first.offset + 12, 20),
        (second.offset + 32, 4),
    ]
    exact = parse_header(factory.gguf(), "x")
    assert padding_ranges(exact) == []


def test_raw_pages_come_last() -> None:
    strange = Tensor("strange", factory.UNKNOWN_TYPE, (4,), bytes(5000))
    header = header_of(strange, matrix("a"), tail=b"x")
    plan = plan_pages([header], [[(header.file_bytes - 1, 1)]], "row_major", 1)
    assert plan.raw == (
        RawPlan(0, 0, header.header_bytes, 1),
        RawPlan(0, header.data_offset, header.tensors[0].bytes, 2),
        RawPlan(0, header.file_bytes - 1, 1, 4),
    )
    assert plan.n_pages == 5


@pytest.mark.parametrize(
    ("n_pages", "per_shard"),
    [(0, 1), (1, 1), (1023, 1), (1024, 2), (2047, 2), (2048, 4), (131071, 128), (131072, 256),
     (10**7, 256)],
)  # fmt: skip
def test_a_model_has_512_shards_if_it_can(n_pages: int, per_shard: int) -> None:
    assert choose_pages_per_shard(n_pages) == per_shard


names = st.sampled_from(
    ["token_embd.weight", "output.weight", "output_norm.weight", "rope_freqs.weight"]
) | st.builds(
    "blk.{}.{}.weight".format,
    st.integers(0, 12),
    st.sampled_from(["attn_q", "ffn_gate_exps", "ffn_down_exps", "ffn_gate_inp", "other"]),
)
shapes = st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple)


@given(st.dictionaries(names, shapes, max_size=12), st.sampled_from([1, 2, 16, 256]))
def test_any_model_has_a_place_for_every_byte(
    model: dict[str, tuple[int, ...]], per_shard: int
) -> None:
    header = header_of(*(matrix(name, shape) for name, shape in model.items()))
    plan = plan_pages([header], [padding_ranges(header)], "column_major", per_shard)
    assert_apart(plan)
    spans = sorted((run.offset, run.offset + run.bytes) for run in plan.runs)
    assert spans[0][0] == 0 and spans[-1][1] == header.file_bytes
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    for zone, first, pages in plan.zones:
        assert first % per_shard == 0
        inside = [s for s in plan.slices if first <= s.first_page < first + pages]
        assert {s.zone for s in inside} == {zone}
    assert sum(pages for _, _, pages in plan.zones) >= sum(s.pages for s in plan.slices)
