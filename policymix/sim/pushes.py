"""PushT's expert: tries many pushes in a world of its own and makes the best, again and again."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import shapely
from pymunk.vec2d import Vec2d

from policymix.sim import pusht

SPACING = 15.0  # of the places around the block where pushes begin
TURNS = (0.0, -0.35, 0.35)  # rad, of a push's direction about the inward normal
LONGEST = 160.0  # of the way from touching the block on; all lengths are in pixels, 512 a side
RADIUS = 15.0  # of the disc that pushes
CLEARANCE = 22.0  # from the surface to the disc's centre before a push
ADVANCE = 14.0  # of the disc's target per step while it pushes
STRIDE = 30.0  # and while it walks around the block
RETREAT = 24.0
MARGIN = 15.0  # between disc and block on the way around it; the disc cuts corners
HOPELESS = 12.0  # further from the target than before: such a push is not tried to its end
PROMISING = 5  # pushes of which other lengths are tried
FINER = (-10.5, -7.0, -3.5, 0.0, 3.5, 7.0)  # these, added
LEAST = 2.0  # of the way from touching the block on
STILL = 0.2  # a push that changes the distance from the target by less does nothing
STUCK = 1.0  # one that gained less is followed by one from other places
FAR = 0.03  # of the way to where a push begins, added to how far off it leaves the block,
NEAR = 40.0  # but the less, the nearer the target


@dataclasses.dataclass(frozen=True)
class _Push:
    """Where the disc starts [2], which way it goes [2], and how far."""

    start: np.ndarray
    direction: np.ndarray
    travel: float

    def ways(self) -> np.ndarray:
        """[n]: how far its targets are from the start, without the retreat."""
        return np.append(np.arange(ADVANCE, self.travel, ADVANCE), self.travel)

    def targets(self) -> np.ndarray:
        """[n, 2], retreat included."""
        ways = np.append(self.ways(), [self.travel - RETREAT] * 3)
        return np.clip(self.start + ways[:, None] * self.direction, 0, pusht.SIZE)


def plan(world: pusht.World, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Actions [2] without end; each is to be executed in `world` before the next is asked for.

    Equal poses of the block are answered by equal pushes, as far as the disc's way to them allows,
    so that pictures say what is to be done. `rng` draws where that leads nowhere.
    """
    scratch, last = _Scratch(), np.inf
    while True:
        off = scratch.off(_pose(world))
        stuck, last = off > last - STUCK, off
        push = _best(world, scratch, rng.uniform() if stuck else 0.5)
        yield from _route(_position(world), push.start, _hull(world))
        for _ in range(6):  # a push is planned from rest
            if np.linalg.norm(_position(world) - push.start) < 1.5:
                break
            yield push.start
        yield from push.targets()


class _Scratch(pusht.World):
    """The simulator as the planner's model of itself."""

    def __init__(self):
        super().__init__()
        self.reset()
        self._goal = _corners(self, self.goal_pose)

    def _get_coverage(self) -> float:
        return 0.0  # the costly half of a step, and not used here

    def off(self, pose: tuple[float, float, float]) -> float:
        """Mean distance of a T's corners from the target's."""
        return float(np.linalg.norm(_corners(self, pose) - self._goal, axis=1).mean())

    def trial(self, push: _Push, pose: tuple[float, float, float]) -> Iterator[float]:
        """How far off a push leaves the block after each of its steps, from a pose."""
        self._setup()
        self.agent.position = tuple(push.start.tolist())
        self.block.angle = pose[2]  # before the position: it turns about the centre of mass
        self.block.position = pose[:2]
        self.space.reindex_shapes_for_body(self.block)
        for target in push.targets():
            self.step(Vec2d(*target))  # quicker than arrays, ten times per step
            yield self.off(_pose(self))


def _best(world: pusht.World, scratch: _Scratch, shift: float) -> _Push:
    """The push that leaves the block nearest to the target, a little for the nearer start.

    Long pushes are tried from all around. The most promising, ended where each was best, are then
    tried in lengths around that.
    """
    pose, here = _pose(world), _position(world)
    now = scratch.off(pose)
    tried = []
    for push in _candidates(scratch, pose, shift):
        best, travel = np.inf, 0.0
        for way, off in zip(push.ways(), scratch.trial(push, pose), strict=False):
            if off < best:
                best, travel = off, way
            if off > now + HOPELESS:
                break
        far = FAR * min(1.0, now / NEAR) * np.linalg.norm(push.start - here)
        tried.append((best + far, far, dataclasses.replace(push, travel=float(travel))))
    tried.sort(key=lambda one: one[0])
    scored = []
    for _, far, push in tried[:PROMISING]:
        for travel in push.travel + np.array(FINER):
            if travel > CLEARANCE - RADIUS + LEAST:
                finer = dataclasses.replace(push, travel=float(travel))
                *_, off = scratch.trial(finer, pose)
                scored.append((off + far, abs(off - now) > STILL, finer))
    moving = [one for one in scored if one[1]] or scored
    return min(moving, key=lambda one: one[0])[-1]


def _candidates(scratch: _Scratch, pose: tuple[float, float, float], shift: float) -> list[_Push]:
    """Long straight pushes from around the block, none of which starts outside the walls.

    They are laid out in the block's frame; `shift`, from 0 to 1, moves and turns all of them.
    """
    bars = _corners(scratch, (0.0, 0.0, 0.0)).reshape(2, 4, 2)
    outline = shapely.union_all([shapely.Polygon(bar).buffer(0.01) for bar in bars])
    edge = shapely.get_exterior_ring(shapely.geometry.polygon.orient(outline))  # inside on the left
    number, block = int(edge.length / SPACING), _rotation(pose[2])
    pushes = []
    for at in (np.arange(number) + shift) * edge.length / number:
        here, ahead = (np.array(edge.interpolate(s).coords[0]) for s in (at, at + 0.01))
        along = (ahead - here) / max(np.linalg.norm(ahead - here), 1e-9)
        inward = np.array([-along[1], along[0]])
        start = block @ (here - CLEARANCE * inward) + pose[:2]
        if not np.all((start > RADIUS) & (start < pusht.SIZE - RADIUS)):
            continue
        for turn in np.array(TURNS) + TURNS[-1] * (shift - 0.5):
            direction = block @ _rotation(turn) @ inward
            pushes.append(_Push(start, direction, CLEARANCE - RADIUS + LONGEST))
    return pushes


def _rotation(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s], [s, c]])


def _route(here: np.ndarray, goal: np.ndarray, hull: shapely.Polygon) -> np.ndarray:
    """Targets [n, 2] from `here` to `goal`, by the shortest way outside the hull of the block."""
    first, last = _outside(here, hull), _outside(goal, hull)
    ways = [np.array([first, last])]
    if shapely.LineString([first, last]).intersection(hull.buffer(-0.1)).length > 0:
        # The shortest ways around a convex thing are the two halves of the hull of all three.
        whole = shapely.union_all([hull, shapely.Point(first), shapely.Point(last)])
        edge = whole.convex_hull.exterior
        start, stop = (edge.project(shapely.Point(p)) for p in (first, last))
        ways = [_around(edge, start, stop), _around(edge, stop, start)[::-1]]

    def cost(way):
        outside = not np.all((way >= 0) & (way <= pusht.SIZE))
        return outside, np.linalg.norm(np.diff(way, axis=0), axis=1).sum()

    line = shapely.LineString(np.vstack([here, min(ways, key=cost), goal]))
    marks = np.append(np.arange(STRIDE, line.length, STRIDE), line.length)
    points = np.array([line.interpolate(mark).coords[0] for mark in marks])
    return np.clip(points, 0, pusht.SIZE)


def _outside(point: np.ndarray, hull: shapely.Polygon) -> np.ndarray:
    """A point itself, or the nearest on the hull of one within."""
    if not hull.contains(shapely.Point(point)):
        return point
    edge = hull.exterior
    return np.array(edge.interpolate(edge.project(shapely.Point(point))).coords[0])


def _around(edge: shapely.LinearRing, start: float, stop: float) -> np.ndarray:
    """Points [n, 2] along a ring, forwards from one mark to another."""
    stop = stop if stop >= start else stop + edge.length
    marks = np.append(np.arange(start, stop, 5.0), stop) % edge.length
    return np.array([edge.interpolate(mark).coords[0] for mark in marks])


def _position(world: pusht.World) -> np.ndarray:
    return np.array(world.agent.position)


def _pose(world: pusht.World) -> tuple[float, float, float]:
    return (*world.block.position, world.block.angle)


def _corners(world: pusht.World, pose: np.ndarray | tuple[float, float, float]) -> np.ndarray:
    """Corners [8, 2] of the T's two bars, where a pose puts them."""
    local = np.array([v for shape in world._block_shapes for v in shape.get_vertices()])
    return local @ _rotation(pose[2]).T + np.array(pose[:2])


def _outline(world: pusht.World) -> shapely.Polygon:
    corners = _corners(world, _pose(world)).reshape(2, 4, 2)
    return shapely.union_all([shapely.Polygon(bar).buffer(0.01) for bar in corners])


def _hull(world: pusht.World) -> shapely.Polygon:
    return _outline(world).convex_hull.buffer(RADIUS + MARGIN)
