"""The plan: how one scene is cut into tiles under one budget. Integers only; nothing is read, nothing is listed.

    +-----------------------------+   grid of the scene
    |        +-----------+        |
    |        |  . . . .  |  read: what a tile needs
    |        | . +---+ . |        |
    |        | . |   | . |  core: what it alone writes
    |        | . +---+ . |        |
    |        |  . . . .  |  window: what the network sees at once (dots): one with a halo in exact and
    |        +-----------+        |  measured mode, several on one lattice over the whole scene in blend mode
    +-----------------------------+

Cores and reads lie on the scene's own grid. Windows lie on the network's grid, which is the same one unless the model
wants another spacing; `Plan.rescale` leads from the scene's grid to the network's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from math import log2, prod
from typing import Literal

from segcore.box import Box
from segcore.errors import PlanError, SceneError
from segcore.grid import Grid, Rescale, mirrored
from segcore.spec import GDAL_CACHE, Cost, Mode, Runner, Sides, Sight, format_bytes, times
from segcore.staging import ONE_PASS, Stages, Staging

Index = tuple[int, ...]
Tiling = Literal["exact", "measured", "blend"]
"""How tiles are joined: what `auto` and the settings come to."""

#: Bytes of a worker process with its libraries before it holds any tile, and what is added by what the network is run
#: in (measured).
PROCESS_BYTES, RUNNER_BYTES = 256 * 2**20, {"onnxruntime": 0, "openvino": 100 * 2**20, "torch": 164 * 2**20}
#: Bytes that it takes to write scores, beside GDAL's cache: of one scene, with what its network still keeps, or of two
#: while the tiles of others are labelled (measured).
_PUBLISHING = 96 * 2**20
#: Bytes that heaps of several threads keep in holes, where tiles are under way side by side: of a process that gives
#: back what it frees, where OpenVINO, which keeps its arrays by itself, and torch have them counted above, and of one
#: that does not (measured).
_HOLES, _MORE_HOLES = {"onnxruntime": 32 * 2**20, "openvino": 0, "torch": 0}, 64 * 2**20
#: Copies of the weights that there are besides, while a network is loaded and compared with another one (measured).
_LOADING = 4
#: Bytes of what runs the parts of a level, unless OpenVINO does, which is counted with it (measured).
PART_BYTES = 32 * 2**20
#: Budgets below which a process is to give freed memory back at once, which takes up to a tenth of the time of small
#: windows: its heaps grow by 100 MiB and more otherwise, and the plan may need all of the budget (measured).
_TIGHT = 2**32
#: Pixels of a core beyond which a larger one saves little and a lost one costs much.
LARGEST_CORE = 2**22
#: Pixels of a core below which smaller ones are taken only where memory wants it.
SMALLEST_CORE = 2**19
#: Larger cores are taken where they save work: so much of it for each doubling.
_STAKE = 0.06
#: Time in which a process takes the memory from the system that a pixel needs in the engine, relative to that in which
#: the pixel is inferred (measured on OpenVINO: 0.25 to 0.9). OpenVINO takes it once; the others do for every window, so
#: that it is in their pace.
_TAKING = {"onnxruntime": 0.1, "openvino": 0.5, "torch": 0.1}
#: Scenes of so many pixels and more are cut alike, so that memory does not follow the scene.
_LARGE = 4000**2
#: Pixels of a place where shorter numbers are compared with fp32, at most (`segcore.precision`), but in blend mode.
_PROVED = 2**18
#: Tiles at each end of an axis that are looked at for the one that needs most.
_ENDS = 32
#: Time of a multiply-add, relative to OpenVINO (measured: 1.7 of it in one pass, 1.3 to 1.7 in stages).
_PACE = {"onnxruntime": 2.2, "openvino": 1.0, "torch": 3.0}
#: Time of a multiply-add in stages, relative to one in a pass over a large window (measured): ONNX Runtime gains by
#: smaller arrays, which stay in cache; OpenVINO keeps its arrays from window to window, and pays for new ones.
_STAGED_PACE = {"onnxruntime": 0.75, "openvino": 1.25, "torch": 1.0}
#: Pixels of a core where a halo was measured: always the same, since there a pixel may depend on where tiles end.
MEASURED_CORE = 2**20
#: Pixels of the network's grid for one of the scene's, beyond which something must be wrong.
LARGEST_GROWTH = 1000
#: Tiles of a process that are under way at once: one read, one inferred, one written.
TILES_IN_FLIGHT = 3


@dataclass(frozen=True, slots=True)
class Tile:
    """The unit of work. `core` and `read` are boxes on the scene's grid, `target` and `windows` on the network's.

    `target` is where scores are needed to label the core. A window may reach outside the network's grid; it is
    padded there.
    """

    index: Index
    core: Box
    read: Box
    target: Box
    windows: tuple[Box, ...]

    @property
    def hull(self) -> Box:
        """The smallest box around the tile's windows, which stand in the order of their lattice."""
        return self.windows[0] | self.windows[-1]


@dataclass(frozen=True, slots=True)
class Plan:
    """The tiling of one scene.

    `grid`: the scene's; `canvas`: shape of the network's grid (pixels); `core`: shape of a core on the scene's grid;
    `memory`: predicted peak of one worker process, in bytes; `shortened`: a halo that was measured, instead of the one
    that the network's reach asks for; `staging`: how windows are run in stages, None for one pass each, and
    `staged_work`: multiply-adds of a window in stages, relative to those of one pass; `thrifty`: whether memory is so
    tight that a process should give back at once what it frees. Tiles are made on demand, so a plan of a million of
    them is as small as a plan of one.
    """

    grid: Grid
    canvas: tuple[int, ...]
    sight: Sight
    mode: Tiling
    core: tuple[int, ...]
    memory: int
    shortened: Sides | None = None
    staging: Staging | None = None
    staged_work: float = 1.0
    thrifty: bool = field(default=False, compare=False)

    @property
    def rescale(self) -> Rescale:
        return Rescale(self.grid.shape, self.canvas)

    @property
    def counts(self) -> Index:
        """Number of tiles per axis."""
        return tuple(-(-n // c) for n, c in zip(self.grid.shape, self.core, strict=True))

    def __len__(self) -> int:
        return prod(self.counts)

    @property
    def middle(self) -> Index:
        """The tile that shows most around it, of those alike the first."""
        return _middle_of(replace(self, memory=0, staging=None, staged_work=1.0))

    def indices(self) -> Iterator[Index]:
        """Every tile's index: of the one that needs most, then the others in the order of the scene's array.

        So an engine that keeps its arrays from window to window makes them once, and what does not fit shows at once.
        """
        first = self.middle
        yield first
        yield from (index for index in product(*map(range, self.counts)) if index != first)

    @property
    def halo(self) -> Sides:
        """What a window shows before and after its target, in pixels of the network's grid (none in blend mode)."""
        if self.mode == "blend":
            return ((0, 0),) * len(self.core)
        return self.shortened or self.sight.halo

    def with_halo(self, halo: Sides | None) -> Plan:
        """The same tiles with another halo, in multiples of the stride; with that of the whole reach for None."""
        return replace(self, shortened=halo)

    @property
    def window_counts(self) -> tuple[int, ...]:
        """Blend mode: number of windows per axis of the lattice that covers the whole scene."""
        assert self.sight.window is not None
        triples = zip(self.canvas, self.sight.window, self.sight.step, strict=True)
        return tuple(max(1, -(-(n - w) // s) + 1) for n, w, s in triples)

    def core_box(self, index: Index) -> Box:
        """The core of a tile; the last one of an axis ends at the edge of the scene."""
        return Box.cell(index, self.core, self.grid.shape)

    def tile(self, index: Index) -> Tile:
        """The tile of this index. Raises IndexError outside the plan."""
        if not all(0 <= i < n for i, n in zip(index, self.counts, strict=True)):
            raise IndexError(f"tile {index} is outside a plan of {self.counts} tiles")
        return self.tile_of(self.core_box(index), index)

    def tile_of(self, core: Box, index: Index = ()) -> Tile:
        """A tile with this core, wherever it lies in the scene: what any tiling of it would compute there."""
        target = self._target(core)
        if self.mode == "blend":
            windows = tuple(map(self._window, product(*self._window_ranges(target))))
        else:
            windows = (self._halo_window(target),)
        return Tile(index, core, self._read(windows[0] | windows[-1]), target, windows)

    def _target(self, core: Box) -> Box:
        """Where scores are needed to label this core, on the network's grid."""
        return self.rescale.inverse().support(core)

    def _read(self, hull: Box) -> Box:
        """What windows within this hull are made of, on the scene's grid."""
        return self.rescale.support(mirrored(hull, self.canvas))

    def _halo_window(self, target: Box) -> Box:
        """The target and its halo, on multiples of the stride, and never past the border of the scene.

        There it ends where the whole scene, padded to the stride, would end, so that the network pads a tile where
        it would pad the whole.
        """
        whole = Box.of(self.canvas).snap(self.sight.stride)
        return target.snap(self.sight.stride).grow(self.halo) & whole

    def _window_ranges(self, target: Box) -> list[range]:
        """Which windows of the scene's lattice touch the target, per axis."""
        assert self.sight.window is not None
        ranges = []
        for a, b, w, s, count in zip(
            target.start, target.stop, self.sight.window, self.sight.step, self.window_counts, strict=True
        ):
            first = max(0, (a - w) // s + 1)
            last = min(count - 1, (b - 1) // s)
            ranges.append(range(first, last + 1))
        return ranges

    def _window(self, index: Index) -> Box:
        """A window of the scene's lattice."""
        assert self.sight.window is not None
        start = tuple(i * s for i, s in zip(index, self.sight.step, strict=True))
        return Box(start, tuple(a + w for a, w in zip(start, self.sight.window, strict=True)))

    @property
    def work(self) -> float:
        """Work of the network, relative to one pass over the scene's pixels (1.00: not one of them twice)."""
        # What is computed along one axis does not depend on the others: it is added up per axis, not per tile.
        if self.mode != "blend":
            lengths = [sum(self._halo_window(t).shape[axis] for t in self._along(axis)) for axis in self._axes]
            return prod(lengths) / prod(self.canvas) * self.staged_work
        assert self.sight.window is not None
        counts = [sum(len(self._window_ranges(t)[axis]) for t in self._along(axis)) for axis in self._axes]
        return prod(counts) * prod(self.sight.window) / prod(self.canvas)

    def pace(self, runner: Runner) -> float:
        """Time of a multiply-add with it, relative to one of a pass over a whole window in the same runner."""
        return _STAGED_PACE[runner] if self.staging and self.staging.levels else 1.0

    def effort(self, runner: Runner) -> float:
        """Time that a scene takes with it, relative to other plans and in other runners."""
        return self.work * _PACE[runner] * self.pace(runner)

    @property
    def resting(self) -> int:
        """Bytes of a process that labels no tile, but makes statistics and products."""
        return PROCESS_BYTES + GDAL_CACHE

    @property
    def _axes(self) -> range:
        return range(len(self.core))

    def _along(self, axis: int) -> Iterator[Box]:
        """The targets of the tiles along one axis, at the beginning of the others."""
        for i in range(self.counts[axis]):
            yield self._target(self.core_box(tuple(i if a == axis else 0 for a in self._axes)))


def make_plan(
    grid: Grid,
    canvas: tuple[int, ...],
    sight: Sight,
    cost: Cost,
    memory: int,
    *,
    core: tuple[int, ...] | None = None,
    mode: Mode = "auto",
    measured: bool = False,
    stages: Stages | None = None,
    in_chunks: bool = True,
    alone: bool = True,
) -> Plan:
    """The tiling of a scene that fits `memory` bytes with the least work, or with cores of this shape.

    Exact mode is taken for a local network, with one tile for the whole scene where that is best, and blend mode for
    one with a window, however small the scene: what a network that is not local says depends on what it sees, and
    that must not depend on memory. A network that is neither, or that is asked for exact mode, is run on the whole
    scene in one piece. `measured`: the reach is not the network's own, but one that will do. `stages`: how the network
    can be run in stages, in exact mode; `in_chunks`: whether also in more than one pass; `alone`: whether a process has
    no tiles of other scenes under way. Raises PlanError, with the numbers, for what cannot work, and SceneError for a
    scene that is too small.
    """
    chosen = _choose_mode(sight, mode, measured)
    if prod(canvas) < prod(sight.stride):
        raise SceneError(
            f"a scene of {times(canvas)} pixels, as the network sees it, is smaller than one cell of the network's "
            f"coarsest level ({times(sight.stride)}): there is nothing to see but padding; label it together with its "
            f"surroundings"
        )
    if prod(canvas) > LARGEST_GROWTH * grid.size:
        raise PlanError(
            f"the model's spacing would make {times(canvas)} pixels of a scene of {grid}, more than {LARGEST_GROWTH} "
            f"for each; check the units of the scene's spacing and of the card's"
        )
    whole_only = chosen == "exact" and not sight.local

    def plan_of(core: tuple[int, ...], thorough: bool = True) -> Plan:
        """With the way to run its windows that takes the least work in this memory, or else the least memory."""
        tiling = Plan(grid, canvas, sight, chosen, core, 0, thrifty=memory < _TIGHT)
        plain = _with_memory(tiling, cost, alone)
        if stages is None or chosen != "exact" or whole_only:
            return plain
        if (
            not thorough
            and plain.memory - int(cost.engine_bytes_per_pixel * plain._halo_window(_middle(plain)).size) > memory
        ):
            return plain  # what the tile holds beside the network is too much already
        stagings = _stagings(plain, stages) if in_chunks else [ONE_PASS]
        ways = [plain, *(_with_memory(plain, cost, alone, stages, staging) for staging in stagings)]
        fitting = [way for way in ways if way.memory <= memory]
        return (
            min(fitting, key=lambda way: way.staged_work * way.pace(cost.runner))
            if fitting
            else min(ways, key=lambda way: way.memory)
        )

    if whole_only:
        if core is not None and any(n > c for n, c in zip(grid.shape, core, strict=True)):
            raise PlanError(
                f"tiles of {times(core)} would cut a scene of {grid} pixels, but this network is not local and is to "
                f"see the whole scene at once; leave --tile out{_or_blend(sight)}"
            )
        plan = plan_of(grid.shape)
        if plan.memory > memory:
            raise PlanError(
                f"the whole scene of {grid} pixels x {cost.channels} channels needs {format_bytes(plan.memory)} of the "
                f"{format_bytes(memory)} budget, and cannot be tiled, as this network is not local; use --memory "
                f"{_round_up(plan.memory)}{_or_blend(sight)}"
            )
        return plan
    if core is None and measured:
        side = max(1, round(MEASURED_CORE ** (1 / len(canvas))))
        core = tuple(max(s, side // s * s) for s in sight.stride)
    if core is not None:
        plan = plan_of(tuple(min(n, c) for n, c in zip(grid.shape, core, strict=True)))
        if plan.memory > memory:
            raise PlanError(
                f"tiles of {times(plan.core)} pixels x {cost.channels} channels need {format_bytes(plan.memory)} of "
                f"the {format_bytes(memory)} budget; use --memory {_round_up(plan.memory)} or a smaller --tile"
            )
        return plan

    def price(plan: Plan) -> float:
        if chosen == "blend":
            return plan.work * _stake(plan)
        target = _middle(plan)
        window = plan._halo_window(target)
        # In a large scene nearly every tile is as the one in the middle.
        work = window.size / target.size * plan.staged_work if prod(canvas) >= _LARGE else plan.work
        taken = _TAKING[cost.runner] * window.size / min(prod(canvas), _LARGE)
        return (work * plan.pace(cost.runner) + taken) * _stake(plan)

    best: Plan | None = None
    for side in _sides(grid, canvas, sight, chosen):
        plan = plan_of(tuple(min(n, s) for n, s in zip(grid.shape, side, strict=True)), thorough=False)
        if plan.memory > memory:
            continue
        best = min((plan, best), key=price) if best else plan
        if prod(plan.core) <= (LARGEST_CORE if chosen == "blend" else SMALLEST_CORE):
            break
    if best is not None:
        return best
    plan = plan_of(plan.core)
    raise PlanError(
        f"even tiles of {times(plan.core)} pixels x {cost.channels} channels need "
        f"{format_bytes(plan.memory)} of the {format_bytes(memory)} budget; use --memory {_round_up(plan.memory)}"
    )


def _stake(plan: Plan) -> float:
    """What large cores put at stake when a run is killed, as a factor of its time."""
    return 1 + _STAKE * max(0.0, log2(prod(plan.core) / LARGEST_CORE))


def _choose_mode(sight: Sight, mode: Mode, measured: bool) -> Tiling:
    if measured:
        if not sight.local or sight.fixed:
            raise PlanError(
                "--tolerance needs a local network that takes any size, and this one is not; leave --tolerance out"
            )
        return "measured"
    if mode == "exact":
        if sight.fixed:
            raise PlanError(
                f"--mode exact needs a network that takes any size, and this one only takes "
                f"{times(sight.window or ())}; use --mode blend"
            )
        return "exact"
    if mode == "blend":
        if sight.window is None:
            raise PlanError("--mode blend needs a window, and the model's card has none; use --mode exact")
        return "blend"
    if sight.local and not sight.fixed:
        return "exact"
    return "exact" if sight.window is None else "blend"


def _or_blend(sight: Sight) -> str:
    return ", or --mode blend" if sight.window is not None else ""


def _sides(grid: Grid, canvas: tuple[int, ...], sight: Sight, mode: Tiling) -> Iterator[tuple[int, ...]]:
    """Shapes of cores to try, largest first: the whole scene, then multiples of the window step, or of the stride."""
    if mode != "blend":
        yield grid.shape
    largest = LARGEST_CORE if mode == "blend" else 2**4 * LARGEST_CORE
    unit = sight.step if mode == "blend" else sight.stride
    # The network's pixels per pixel of the scene: a core is chosen on the scene's grid.
    native = [max(1, u * n // m) for u, n, m in zip(unit, grid.shape, canvas, strict=True)]
    side = max(1, round(largest ** (1 / len(native))))
    while True:
        shape = tuple(_balanced(n, side, u) for n, u in zip(grid.shape, native, strict=True))
        yield shape
        if side <= min(native):
            return
        side = side * 3 // 4


def _balanced(length: int, side: int, unit: int) -> int:
    """The side of a core, in multiples of `unit`, that cuts an axis into as few pieces as `side` would, all alike.

    A sliver at the end would show as much around it as any.
    """
    if length <= side:
        return length
    count = -(-length // max(unit, side // unit * unit))
    return -(-length // (count * unit)) * unit


@lru_cache(256)
def _middle_of(plan: Plan) -> Index:
    """See `Plan.middle`. What a tile shows along one axis does not depend on the others."""

    def shown(target: Box, axis: int) -> int:
        if plan.mode == "blend":
            return len(plan._window_ranges(target)[axis])
        return plan._halo_window(target).shape[axis]

    found = []
    for axis in plan._axes:
        # Tiles are alike but at the ends, and where they lie otherwise on the windows or on the network's grid.
        count = plan.counts[axis]
        looked_at = [i for i in range(count) if i < _ENDS or count - i <= _ENDS]
        targets = {i: plan._target(plan.core_box(tuple(i * (a == axis) for a in plan._axes))) for i in looked_at}
        found.append(max(looked_at, key=lambda i: (shown(targets[i], axis), targets[i].shape[axis], -i)))
    return tuple(found)


def _middle(plan: Plan) -> Box:
    """The target of the tile that needs most."""
    return plan._target(plan.core_box(plan.middle))


def _stagings(plan: Plan, stages: Stages) -> Iterator[Staging]:
    """Ways to run a plan's windows in stages."""
    return stages.choices(plan._halo_window(_middle(plan)).shape)


def _with_memory(
    plan: Plan, cost: Cost, alone: bool, stages: Stages | None = None, staging: Staging | None = None
) -> Plan:
    """The plan with its predicted memory, its windows run in these stages.

    Bytes of one worker process at its peak: arrays of the tiles under way, and one window in the engine. Sizes only:
    windows may be too many to list when the plan is about to be refused.
    """
    target = _middle(plan)
    core = plan.core_box(plan.middle)
    if plan.mode != "blend":
        hull = window = plan._halo_window(target)
        count = 1
    else:
        ranges = plan._window_ranges(target)
        window = plan._window(tuple(r[0] for r in ranges))
        hull = window | plan._window(tuple(r[-1] for r in ranges))
        count = prod(map(len, ranges))
    # What a tile is read from, and the physical values of it; what is shown, where that is padded or interpolated.
    blended, native = plan.mode == "blend", plan.rescale.identity
    in_flight = min(TILES_IN_FLIGHT, len(plan)) if alone else TILES_IN_FLIGHT
    padded = blended or hull not in Box.of(plan.canvas)
    array = 4 * cost.channels * (plan._read(hull).size + hull.size * (padded if native else 2))
    reading = 8 * cost.channels * plan._read(hull).size
    # What the engine gives back, the scores of it, and those on the scene's grid; labels, and what is valid.
    made = target.size * (blended if native else 1) + (0 if native else core.size)
    scores = 4 * cost.classes * (window.size + target.size + made) + 3 * core.size
    engine, relative = int(cost.engine_bytes_per_pixel * window.size), 1.0
    if stages is not None and staging is not None:
        wanted = target.shift([-start for start in window.start])
        if staging.levels:
            engine = stages.memory(window.shape, wanted, staging, cost.runner, cost.shortness)
        relative = stages.work(window.shape, wanted, staging) / (stages.inner[0].work * window.size)
    # Weights as the file has them, as the engine does, and as it has packed them; in stages several parts have some.
    copies = 4 if staging is not None and staging.levels else 3
    process = PROCESS_BYTES + RUNNER_BYTES[cost.runner] + copies * cost.weights
    if in_flight > 1:
        process += _HOLES[cost.runner] + (0 if plan.thrifty else _MORE_HOLES)
    process += PART_BYTES * staging.levels if staging is not None and cost.runner != "openvino" else 0
    labelling = in_flight * (array + scores + 500 * count) + reading + engine
    if in_flight == 1:
        # Nothing is read while it is inferred; and what stages give back is what they have counted.
        given = 4 * cost.classes * window.size if staging is not None and staging.levels else 0
        labelling = array + max(reading, scores + 500 * count + engine - given)
    proving = int(cost.proof_bytes_per_pixel * (window.size if plan.mode == "blend" else min(window.size, _PROVED)))
    # GDAL keeps blocks of a raster as they are stored, in up to four bytes.
    read, written = (
        min(GDAL_CACHE, 4 * count * plan.grid.size) if len(plan.canvas) == 2 else 0
        for count in (cost.channels, cost.classes)
    )
    publishing = _PUBLISHING + written if cost.scores else 0
    labelling += _PUBLISHING if cost.scores and not alone else 0
    memory = process + max(read + max(labelling, array + scores + proving), publishing, _LOADING * cost.weights)
    return replace(plan, memory=memory, staging=staging, staged_work=relative)


def _round_up(count: int) -> str:
    mib = -(-count // 2**20)
    return f"{mib}MiB" if mib < 1024 else f"{-(-mib * 10 // 1024) / 10:.1f}GiB"
