"""PushT's expert: tries many pushes in a world of its own and makes the best, again and again."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import shapely
from pymunk.vec2d import Vec2d

from policymix.sim import pusht

CANDIDATES = 96  # 48 and fewer fail now and then
RADIUS = 15.0  # of the disc that pushes; all lengths are in pixels of the world, 512 wide
CLEARANCE = 22.0  # from the surface to the disc's centre before a push
ADVANCE = 14.0  # of the disc's target per step while it pushes
STRIDE = 30.0  # and while it walks around the block
RETREAT = 24.0
MARGIN = 15.0  # between disc and block on the way around it; the disc cuts corners
SPREAD = 0.35  # rad, of a push's direction about the inward normal
LENGTHS = (12.0, 150.0)  # of the way from touching the block on


@dataclasses.dataclass(frozen=True)
class _Push:
    """Where the disc starts [2] and the targets [n, 2] that it follows, retreat included."""

    start: np.ndarray
    targets: np.ndarray


def plan(world: pusht.World, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Actions [2] without end; each is to be executed in `world` before the next is asked for."""
    scratch = _Scratch()
    while True:
        push = _best(world, scratch, rng)
        yield from _route(_position(world), push.start, _hull(world))
        for _ in range(6):  # a push is planned from rest
            if np.linalg.norm(_position(world) - push.start) < 1.5:
                break
            yield push.start
        yield from push.targets


class _Scratch(pusht.World):
    """The simulator as the planner's model of itself."""

    def __init__(self):
        super().__init__()
        self.reset()

    def _get_coverage(self) -> float:
        return 0.0  # the costly half of a step, and not used here

    def distance_after(self, push: _Push, pose: tuple[float, float, float]) -> float:
        """Mean distance of the T's corners from the target's, after a push from a pose."""
        self._setup()
        self.agent.position = tuple(push.start.tolist())
        self.block.angle = pose[2]  # before the position: it turns about the centre of mass
        self.block.position = pose[:2]
        self.space.reindex_shapes_for_body(self.block)
        for target in push.targets:
            self.step(Vec2d(*target))  # quicker than arrays, ten times per step
        found = _corners(self, _pose(self))
        return float(np.linalg.norm(found - _corners(self, self.goal_pose), axis=1).mean())


def _best(world: pusht.World, scratch: _Scratch, rng: np.random.Generator) -> _Push:
    pushes = _candidates(_outline(world), rng)
    pose = _pose(world)
    return min(pushes, key=lambda push: scratch.distance_after(push, pose))


def _candidates(outline: shapely.Polygon, rng: np.random.Generator) -> list[_Push]:
    """Straight pushes from around the block, none of which starts outside the walls."""
    edge = shapely.get_exterior_ring(shapely.geometry.polygon.orient(outline))  # inside on the left
    pushes = []
    while len(pushes) < CANDIDATES:
        at = rng.uniform(0, edge.length)
        turn, length = rng.normal(0, SPREAD), np.exp(rng.uniform(*np.log(LENGTHS)))
        here, ahead = (np.array(edge.interpolate(s).coords[0]) for s in (at, at + 0.01))
        along = (ahead - here) / max(np.linalg.norm(ahead - here), 1e-9)
        inward = np.array([-along[1], along[0]])
        start = here - CLEARANCE * inward
        if not np.all((start > RADIUS) & (start < pusht.SIZE - RADIUS)):
            continue
        c, s = np.cos(turn), np.sin(turn)
        direction = np.array([[c, -s], [s, c]]) @ inward
        travel = CLEARANCE - RADIUS + length
        ends = np.append(np.arange(ADVANCE, travel, ADVANCE), travel)
        back = ends[-1] - RETREAT
        targets = start + np.append(ends, [back, back, back])[:, None] * direction
        pushes.append(_Push(start, np.clip(targets, 0, pusht.SIZE)))
    return pushes


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
    c, s = np.cos(pose[2]), np.sin(pose[2])
    return local @ np.array([[c, s], [-s, c]]) + np.array(pose[:2])


def _outline(world: pusht.World) -> shapely.Polygon:
    corners = _corners(world, _pose(world)).reshape(2, 4, 2)
    return shapely.union_all([shapely.Polygon(bar).buffer(0.01) for bar in corners])


def _hull(world: pusht.World) -> shapely.Polygon:
    return _outline(world).convex_hull.buffer(RADIUS + MARGIN)
