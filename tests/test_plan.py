"""Laws 1 and 2 of the plan, and its refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from segcore.box import Box
from segcore.errors import PlanError, SceneError
from segcore.grid import Grid
from segcore.plan import LARGEST_GROWTH, PROCESS_BYTES, Plan, make_plan
from segcore.spec import Cost, Mode, Settings, Sight, format_bytes, parse_bytes, symmetric

COST = Cost(channels=2, classes=3, engine_bytes_per_pixel=100)
LOTS = 2**40
REACH = symmetric((92, 92))


@st.composite
def plans(draw: st.DrawFn, mode: str | None = None) -> Plan:
    ndim = draw(st.integers(1, 3))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(ndim))  # noqa: E731
    shape, stride = each(1, 60), tuple(2**n for n in each(0, 2))
    lattice = shape if draw(st.booleans()) else each(1, 60)
    if np.prod(lattice) < np.prod(stride):
        lattice = tuple(max(n, s) for n, s in zip(lattice, stride, strict=True))
    assume(np.prod(lattice) <= LARGEST_GROWTH * np.prod(shape))
    mode = mode or draw(st.sampled_from(["exact", "blend"]))
    if mode == "exact":
        sight = Sight(stride, tuple(zip(each(0, 9), each(0, 9), strict=True)))
    else:
        steps, shared = each(1, 4), each(0, 3)
        window = tuple((n + o) * s for n, s, o in zip(steps, stride, shared, strict=True))
        overlap = tuple(min(o * s + draw(st.integers(-1, 1)), w - 1) if o else 0
                        for o, s, w in zip(shared, stride, window, strict=True))  # fmt: skip
        sight = Sight(stride, None, window, overlap)
    return make_plan(Grid("zyx"[-ndim:], shape), lattice, sight, COST, LOTS, core=each(1, 40))


@given(plans())
def test_cores_partition_the_grid(plan: Plan) -> None:
    hits = np.zeros(plan.grid.shape, int)
    for index in plan.indices():
        tile = plan.tile(index)
        assert tile.core.size > 0
        assert tile.core.start == tuple(i * c for i, c in zip(index, plan.core, strict=True))
        hits[tile.core.slices()] += 1
    assert (hits == 1).all()
    assert len(list(plan.indices())) == len(plan)


@given(plans())
def test_reads_hold_what_windows_show(plan: Plan) -> None:
    for index in list(plan.indices())[:40]:
        tile = plan.tile(index)
        assert tile.read in plan.grid.box
        assert tile.target in tile.hull
        assert tile.target in Box.of(plan.canvas)
        for window in tile.windows:
            assert window in tile.hull
            assert (window & tile.target).size > 0


@given(plans("exact"))
def test_exact_windows_are_aligned_and_end_at_the_border(plan: Plan) -> None:
    whole = Box.of(plan.canvas).snap(plan.sight.stride)
    for index in list(plan.indices())[:40]:
        tile = plan.tile(index)
        (window,) = tile.windows
        assert window in whole
        for a, b, s, t, u, r, n in zip(
            window.start, window.stop, plan.sight.stride, tile.target.start, tile.target.stop, plan.sight.reach or (),
            whole.stop, strict=True,
        ):  # fmt: skip
            assert a % s == 0
            assert b % s == 0
            assert a == 0 or t - a >= r[0]
            assert b == n or b - u >= r[1]


@given(plans("blend"))
def test_windows_lie_on_one_lattice_that_covers_the_scene(plan: Plan) -> None:
    hits = np.zeros(plan.canvas, int)
    lattice = [set() for _ in plan.canvas]
    for index in plan.indices():
        for window in plan.tile(index).windows:
            hits[(window & Box.of(plan.canvas)).slices()] += 1
            for axis, start in enumerate(window.start):
                lattice[axis].add(start)
    assert (hits > 0).all()
    for starts, step, count in zip(lattice, plan.sight.step, plan.window_counts, strict=True):
        assert starts == {i * step for i in range(count)}


@given(plans())
def test_work_counts_every_window(plan: Plan) -> None:
    computed = sum(window.size for index in plan.indices() for window in plan.tile(index).windows)
    assert plan.work == pytest.approx(computed / np.prod(plan.canvas))


def test_a_plan_of_a_million_tiles_is_small() -> None:
    plan = make_plan(Grid("yx", (1_000_000, 1_000_000)), (1_000_000,) * 2, Sight((16, 16), REACH), COST, LOTS,
                     core=(1000, 1000))  # fmt: skip
    assert len(plan) == 1_000_000
    assert plan.tile((999, 999)).core == Box((999_000, 999_000), (1_000_000, 1_000_000))
    assert plan.work == pytest.approx((1 + 2 * 96 / 1000) ** 2, rel=0.02)


def test_the_largest_core_that_fits_is_taken() -> None:
    grid, sight = Grid("yx", (40_000, 40_000)), Sight((16, 16), REACH)
    large = make_plan(grid, grid.shape, sight, COST, 8 * 2**30)
    small = make_plan(grid, grid.shape, sight, COST, 600 * 2**20)
    assert 1800 <= large.core[0] == large.core[1] <= 4096
    assert small.core < large.core
    assert small.memory <= 600 * 2**20
    assert small.work > large.work > 1


def test_a_scene_that_fits_is_one_tile_of_a_local_network() -> None:
    grid = Grid("yx", (1000, 1000))
    assert len(make_plan(grid, grid.shape, Sight((16, 16), REACH), COST, LOTS)) == 1
    assert make_plan(grid, grid.shape, Sight((16, 16), REACH), COST, LOTS).work == pytest.approx(1, abs=0.02)
    assert len(make_plan(grid, grid.shape, Sight((16, 16), REACH), COST, 360 * 2**20)) > 1


def test_a_larger_scene_that_fits_is_cut_where_memory_takes_longer_than_halos() -> None:
    grid, cost = Grid("yx", (2000, 2000)), replace(COST, runner="openvino")
    enough = 2**31  # for the whole; with much more, holes of the heap would be counted of several tiles
    cut = make_plan(grid, grid.shape, Sight((16, 16), REACH), cost, enough)
    whole = make_plan(grid, grid.shape, Sight((16, 16), REACH), cost, enough, core=grid.shape)
    assert 2 <= len(cut) <= 9
    assert cut.work < 1.3
    assert cut.memory < 0.75 * whole.memory
    seen = Sight((16, 16), symmetric((400, 400)))  # a halo that is as large as the tiles would be
    assert len(make_plan(grid, grid.shape, seen, cost, LOTS)) == 1


def test_what_a_process_holds_of_scenes_side_by_side_is_counted() -> None:
    """And what is padded, where the stride does not divide a scene: a second image of it."""
    cost = replace(COST, channels=13)

    def memory(side: int, alone: bool) -> int:
        grid = Grid("yx", (side, side))
        return make_plan(grid, grid.shape, Sight((16, 16), REACH), cost, LOTS, core=grid.shape, alone=alone).memory

    image = 4 * 13 * 1600**2
    assert memory(1600, alone=False) - memory(1600, alone=True) > 2 * image
    assert memory(1599, alone=True) - memory(1600, alone=True) == pytest.approx(image, rel=0.02)


def test_memory_does_not_change_what_a_network_that_is_not_local_sees() -> None:
    grid, sight = Grid("yx", (300, 300)), Sight((16, 16), None, (256, 256), (64, 64))
    for memory in (600 * 2**20, LOTS):
        plan = make_plan(grid, grid.shape, sight, COST, memory)
        assert plan.mode == "blend"
        assert plan.window_counts == (2, 2)
    assert len(make_plan(grid, grid.shape, sight, COST, LOTS, mode="exact")) == 1


def test_where_a_halo_was_measured_tiles_do_not_follow_memory() -> None:
    grid, sight = Grid("yx", (9000, 9000)), Sight((16, 16), REACH)
    plans = [make_plan(grid, grid.shape, sight, COST, memory, measured=True) for memory in (2**31, LOTS)]
    assert {plan.core for plan in plans} == {(1024, 1024)}
    assert {plan.mode for plan in plans} == {"measured"}
    with pytest.raises(PlanError, match="smaller --tile"):
        make_plan(grid, grid.shape, sight, COST, 500 * 2**20, measured=True)


def test_sides_of_a_halo_differ_where_the_reach_does() -> None:
    sight = Sight((4, 4), ((3, 9), (0, 4)))
    assert sight.halo == ((4, 12), (0, 4))
    plan = make_plan(Grid("yx", (80, 80)), (80, 80), sight, COST, LOTS, core=(20, 20))
    assert plan.tile((1, 1)).windows[0] == Box((16, 20), (52, 44))


def test_memory_does_not_follow_the_scene() -> None:
    sight = Sight((16, 16), REACH)
    plans = [make_plan(Grid("yx", (n, n)), (n, n), sight, COST, 2**31) for n in (8_000, 80_000)]
    assert plans[0].memory == pytest.approx(plans[1].memory, rel=0.1)  # cores are of one size, but for what evens them


@pytest.mark.parametrize(
    ("sight", "options", "words"),
    [
        (Sight((16, 16), REACH), {"memory": 2**20}, r"budget; use --memory \d+MiB"),
        (Sight((16, 16), REACH), {"core": (4000, 4000), "memory": 500 * 2**20}, "smaller --tile"),
        (Sight((16, 16), None), {"core": (100, 100)}, "leave --tile out"),
        (Sight((16, 16), None), {"memory": 100 * 2**20}, "cannot be tiled"),
        (Sight((16, 16), None, (256, 256), fixed=True), {"mode": "exact"}, "use --mode blend"),
        (Sight((16, 16), None, (256, 256)), {"mode": "exact", "memory": 100 * 2**20}, "or --mode blend"),
        (Sight((16, 16), None, (256, 256)), {"measured": True}, "needs a local network"),
        (Sight((16, 16), REACH), {"mode": "blend"}, "needs a window"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(sight: Sight, options: dict, words: str) -> None:
    memory = options.pop("memory", LOTS)
    with pytest.raises(PlanError, match=words):
        make_plan(Grid("yx", (5000, 5000)), (5000, 5000), sight, COST, memory, **options)


def test_a_scene_smaller_than_a_cell_is_refused() -> None:
    with pytest.raises(SceneError, match="1 x 1 pixels"):
        make_plan(Grid("yx", (1, 1)), (1, 1), Sight((32, 32), None, (256, 256)), COST, LOTS)


@pytest.mark.parametrize(
    ("text", "count"), [("4GiB", 2**32), ("1.5g", 3 * 2**29), ("500MB", 5 * 10**8), ("64 k", 2**16)]
)
def test_amounts_of_memory(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["-3", "lots", "", "0GiB", "4 gigs", "1e9", "GiB"])
def test_bad_amounts_of_memory(text: str) -> None:
    with pytest.raises(PlanError, match="4GiB"):
        parse_bytes(text)


def test_amounts_are_written_for_people() -> None:
    assert [format_bytes(n) for n in (12, 4096, 5 * 2**20, 2**33)] == ["12 B", "4.0 KiB", "5.0 MiB", "8.0 GiB"]


@pytest.mark.parametrize("bad", [{"tile": 0}, {"memory": 0}, {"overlap": -1}, {"scale": 0.0}, {"mode": "fast"}])
def test_bad_settings_are_refused(bad: dict) -> None:
    with pytest.raises(PlanError):
        Settings(**bad)


@pytest.mark.parametrize(
    ("window", "overlap"), [((100, 100), None), ((256, 256), (256, 256)), ((256, 256), (-1, 0)), (None, (32, 32))]
)
def test_contradicting_windows_are_refused(window: tuple | None, overlap: tuple | None) -> None:
    with pytest.raises(PlanError):
        Sight((32, 32), None, window, overlap)


@given(plans())
def test_no_tile_needs_much_more_than_the_plan_predicts(plan: Plan) -> None:
    """The prediction is made for one tile; the arrays of every other one must fit, too."""
    predicted = plan.memory - PROCESS_BYTES
    most = max(plan.tile(index).hull.size + plan.tile(index).read.size for index in list(plan.indices())[:60])
    assert 4 * COST.channels * 2 * most <= 2 * predicted + 4096


@given(plans())
def test_the_tile_that_shows_most_comes_first(plan: Plan) -> None:
    first, *rest = plan.indices()
    assert rest == sorted(rest)
    assume(len(rest) < 400)
    assert sorted([first, *rest]) == sorted(np.ndindex(*plan.counts))
    assert plan.tile(first).hull.size == max(plan.tile(index).hull.size for index in [first, *rest])


def test_a_proof_counts_where_its_windows_are_large() -> None:
    def memory(sight: Sight, proof: float, mode: Mode = "auto") -> int:
        grid, cost = Grid("yx", (6000, 6000)), replace(COST, proof_bytes_per_pixel=proof)
        return make_plan(grid, grid.shape, sight, cost, LOTS, core=(2048, 2048), mode=mode).memory

    windowed = Sight((16, 16), None, (1024, 1024), (512, 512))
    assert memory(windowed, 2000.0) > memory(windowed, 0.0) + 2**29
    # Where windows are as large as tiles a proof has its own, small ones.
    assert memory(Sight((16, 16), REACH), 250.0) == memory(Sight((16, 16), REACH), 0.0)


def test_scenes_of_many_tiles_are_cut_alike() -> None:
    sight = Sight((8, 8), symmetric((22, 22)))
    sizes = (4_000, 8_000, 20_000, 40_000, 80_000)
    found = [make_plan(Grid("yx", (n, n)), (n, n), sight, COST, 2**31).memory for n in sizes]
    assert max(found) < 1.2 * min(found)


def test_a_sliver_at_the_end_does_not_hide_what_the_first_tile_needs() -> None:
    sight = Sight((16, 16), REACH)
    plans = [make_plan(Grid("yx", (n, n)), (n, n), sight, COST, LOTS, core=(2048, 2048)) for n in (2048, 2100)]
    assert plans[1].memory >= plans[0].memory


def test_absurd_spacings_are_refused_at_once() -> None:
    grid = Grid("zyx", (20, 30, 40))
    sight = Sight((16,) * 3, None, (32,) * 3, (16,) * 3)
    with pytest.raises(PlanError, match="check the units"):
        make_plan(grid, (20_000, 30_000, 40_000), sight, COST, LOTS)
    with pytest.raises(PlanError, match="budget"):
        make_plan(grid, (190, 290, 390), sight, COST, 400 * 2**20, core=(20, 30, 40))
