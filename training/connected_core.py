"""The core of a set of images that may be of several kinds: what is connected with its center, through neighbors.

`find_core` alone describes one cloud. Images of ten classes are ten clouds, and foreign images may be as near to their
common center as the rarest class. But the classes touch each other, and foreign images touch hardly any: of the ten
nearest neighbors of a usual image, next to none is foreign. So the core starts at the center and grows through
neighbors (a random walk with restart: Page et al., 1999; Tong et al., ICDM 2006):

    r = RESTART u + (1 - RESTART) P^T r,    u: uniform on the core; P[i,j] = 1/k for the k nearest neighbors j of i

Those with N r > REACHED are the next core, and so on until it no longer changes. Groups that the walk reaches faintly
join it if they are not far from it, as rare kinds are not. A group of more than GROUP of the points that the walk does
not reach gets a center of its own, from which the core grows as well. Whether the walk reaches a kind that is barely
connected can hang on the center. So there are several starts, and the core is what most of them reach.

A walk that enters a closed group stays there, so it reaches foreign images by a few bridges, if they are many and of
several kinds. So groups that hardly anything connects with the rest (their conductance, the share of their edges that
leave them, is small: Shi and Malik, TPAMI 2000) are left out before the growth if they are far from the rest, or if
hardly any of them is near the center. There most usual images are, and in all sets tried many of every kind.
Foreign images that are all alike lie so densely that they could be the center. So the search for it thins dense places
out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy.sparse import coo_array, csr_array, diags_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import ArpackNoConvergence, eigsh

from training.robust_core import find_core, whitened

__all__ = ["FEW", "connected_core", "far_groups", "nearest", "neighbor_graph", "outer_groups", "reached", "thinned"]

NEIGHBORS, NEARBY = 10, 20  # neighbors of the walk, and of the search for dense places
STARTS, VOTES = 7, 4  # starts, with other points thinned out; the core is what most of them reach
CENTER, AROUND = 0.5, 0.7  # shares of the thinned points: the center from which the core grows, and a wider one
RESTART, REACHED, FAINT = 0.05, 0.12, 0.02
SMOOTH = 0.02  # restart of the walk that tells how central the neighbors are
STEPS, ROUNDS, JOINS = 100, 20, 8  # of the walk, of the growth at most, and of groups that join
GROUP = 0.25  # largest share of the points that are left out as groups
VECTORS, LEAST = 8, 0.005  # eigenvectors along which groups are sought; smallest share of the edges in a group
FAR_CUT, OUTER_CUT = 0.012, 0.06  # largest conductance of the cut of a group far from the rest, and outside the center
CENTRAL = 0.2  # share of a group at the wider center from which on it is usual; digits among clothes have 0.1
GAP, NEAR = 1.15, 2.5  # squared distances: a far group is farther than GAP, a faint one joins up to NEAR
USUAL = 0.99  # quantile of the core's distances from each other that counts as usual
FEWER = 4  # where groups join, one point in so many says what is usual
FEW = 50  # so few points are all core
CHUNK = 1024


def connected_core(x: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return which of the points x [N,d] form the core, bool [N]. It takes memory for a few times N x (d + CHUNK)."""
    n = len(x)
    if n < FEW:
        return np.ones(n, dtype=bool)
    rows, distances = nearest(x, x, NEARBY, own=np.arange(n))
    edges = neighbor_graph(rows[:, :NEIGHBORS])
    starts = [thinned(rows, distances, [seed, start]) for start in range(STARTS)]
    apart = far_groups(x, edges)
    central = np.mean([_center(x, ~apart, kept, AROUND) for kept in starts], axis=0)
    apart = outer_groups(edges, central, apart)
    votes = np.sum([_core(x, rows[:, :NEIGHBORS], edges, apart, kept) for kept in starts], axis=0)
    return votes >= min(VOTES, votes.max())  # never empty, even if no point has so many votes


def _core(x: np.ndarray, rows: np.ndarray, edges: csr_array, apart: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return the core, bool [N], that grows from the center of the points that are `kept`."""
    core, left = np.zeros_like(apart), ~apart
    for _ in range(math.ceil(1 / GROUP)):
        core = _joined(x, rows, edges, _grown(rows, core | _center(x, left, kept), apart), apart)
        left = _largest_group(edges, ~core & ~apart)
        if left.mean() <= GROUP:  # larger groups are no outliers: each gets a center of its own
            break
    return core


def _center(x: np.ndarray, group: np.ndarray, kept: np.ndarray, share: float = CENTER) -> np.ndarray:
    """Return which points of a group (bool [N]) are around its center, found among those that are `kept`, bool [N]."""
    few = group & kept if (group & kept).any() else group
    distance = find_core(x[few], share, starts=0).distance(x)
    return group & (distance <= np.quantile(distance[few], share))


def _grown(rows: np.ndarray, core: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """Return the core, bool [N], once it reaches no more points that are not `apart`."""
    for _ in range(ROUNDS):
        grown = (reached(rows, core) > REACHED) & ~apart
        if not grown.any():
            break
        core, before = grown, core
        if (core != before).sum() <= len(core) / 1000:
            break
    return core


def _joined(x: np.ndarray, rows: np.ndarray, edges: csr_array, core: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """Return the core, bool [N], with the groups that the walk reaches faintly and that are not far from it."""
    for _ in range(JOINS):
        faint = (reached(rows, core) > FAINT) & ~apart & ~core
        joined = _near_groups(x, edges, core, faint)
        if not joined.any():
            break
        core = core | joined
    return core


def _largest_group(edges: csr_array, points: np.ndarray) -> np.ndarray:
    """Return the largest connected group of `points`, bool [N]."""
    largest, items = np.zeros_like(points), np.flatnonzero(points)
    if len(items):
        group = connected_components(edges[items][:, items], directed=False)[1]
        largest[items[group == np.bincount(group).argmax()]] = True
    return largest


def neighbor_graph(rows: np.ndarray) -> csr_array:
    """Return the graph of neighbors `rows` [N,k] in both directions, [N,N]; mutual neighbors count twice."""
    n, k = rows.shape
    edges = csr_array((np.ones(n * k), (np.repeat(np.arange(n), k), rows.ravel())), shape=(n, n))
    return (edges + edges.T).tocsr()


def _near_groups(x: np.ndarray, edges: csr_array, core: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Return which candidates belong to connected groups of them that are not far from the core, bool [N]."""
    near, items = np.zeros_like(core), np.flatnonzero(candidates)
    if len(items):
        relative = _distance(x, candidates, core, FEWER)
        group = connected_components(edges[items][:, items], directed=False)[1]
        for members in np.split(np.argsort(group, kind="stable"), np.bincount(group).cumsum()[:-1]):
            near[items[members]] = np.median(relative[members]) <= NEAR
    return near


def nearest(x: np.ndarray, anchors: np.ndarray, k: int, own: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return rows int64 and distances float32 [N,k] of the anchors [A,d] nearest to each point x [N,d], ascending.

    `own` int [A]: which point each anchor is, -1 where it is none. A point is not its own neighbor. k becomes smaller
    where there are fewer anchors.
    """
    k = min(k, max(len(anchors) - (own is not None), 1))
    points, anchors = (torch.from_numpy(np.asarray(a, dtype=np.float32)) for a in (x, anchors))
    rows, distances = [], []
    for start in range(0, len(points), CHUNK):
        distance = torch.cdist(points[start : start + CHUNK], anchors)
        if own is not None:
            inside = np.flatnonzero((own >= start) & (own < start + len(distance)))
            distance[own[inside] - start, inside] = torch.inf
        found = distance.topk(k, dim=1, largest=False)
        rows.append(found.indices)
        distances.append(found.values)
    return torch.cat(rows).numpy(), torch.cat(distances).numpy()


def thinned(rows: np.ndarray, distances: np.ndarray, seed: int | list[int]) -> np.ndarray:
    """Return which points stay, bool [N], if of neighbors closer than usual only one stays.

    `rows`, `distances` [N,k]: their neighbors. Usual is the median distance to the fifth one.
    """
    close = distances < np.median(distances[:, min(4, distances.shape[1] - 1)])
    kept, gone = np.zeros((2, len(rows)), dtype=bool)
    for i in np.random.default_rng(seed).permutation(len(rows)):
        if not gone[i]:
            kept[i] = True
            gone[rows[i, close[i]]] = True
    return kept


def reached(rows: np.ndarray, core: np.ndarray) -> np.ndarray:
    """Return N r [N] of the walk from the points `core` (bool [N]) through neighbors `rows` [N,k]; its mean is 1."""
    n, k = rows.shape
    backwards = csr_array((np.full(n * k, 1 / k), (rows.ravel(), np.repeat(np.arange(n), k))), shape=(n, n))
    u = core / core.sum()
    r = u
    for _ in range(STEPS):
        r = RESTART * u + (1 - RESTART) * (backwards @ r)
    return n * r


def far_groups(x: np.ndarray, edges: csr_array) -> np.ndarray:
    """Return which of the points x [N,d] belong to groups that are far from the rest, bool [N].

    `edges`: the graph of neighbors. The cut of such a group has a conductance of at most FAR_CUT, and the median of its
    squared distances from the rest is more than GAP.
    """
    apart = np.zeros(len(x), dtype=bool)
    return _cut_off(edges, apart, FAR_CUT, lambda group, rest: np.median(_distance(x, group, rest)) > GAP)


def outer_groups(edges: csr_array, central: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """Return the points that are `apart`, bool [N], and groups of the graph that are next to never at the center.

    `central` [N]: how often each point is there. The cut of such a group has a conductance of at most OUTER_CUT. Among
    the cuts is the one by how central the neighbors of each point are, and theirs (Andersen, Chung, and Lang 2006). A
    connected group of more than GROUP that is never at the center is another usual kind.
    """
    away = diags_array(1 / np.asarray(edges.sum(axis=1)).ravel()) @ edges
    smooth = central
    for _ in range(STEPS):
        smooth = SMOOTH * central + (1 - SMOOTH) * (away @ smooth)
    while (kind := _largest_group(edges, (smooth < CENTRAL) & ~apart)).mean() > GROUP:
        central, smooth = np.where(kind, 1, central), np.where(kind, 1, smooth)
    return _cut_off(edges, apart, OUTER_CUT, lambda group, rest: central[group].mean() < CENTRAL, smooth)


def _cut_off(
    edges: csr_array,
    apart: np.ndarray,
    conductance: float,
    foreign: Callable[[np.ndarray, np.ndarray], bool],
    order: np.ndarray | None = None,
) -> np.ndarray:
    """Return the points that are `apart`, bool [N], and groups that are `foreign` to the rest, GROUP in all at most.

    `order` [N]: values along which to look for cuts, besides the eigenvectors.
    """
    n, found = len(apart), True
    while found and (~apart).sum() >= FEW:
        left, found = np.flatnonzero(~apart), False
        for cut in _cuts(edges[left][:, left], conductance, None if order is None else order[left]):
            group = np.zeros(n, dtype=bool)
            group[left[cut]] = True
            if (apart | group).mean() <= GROUP and foreign(group, ~apart & ~group):
                apart, found = apart | group, True
                break
    return apart


def _cuts(edges: csr_array, most: float, order: np.ndarray | None) -> Iterator[np.ndarray]:
    """Yield groups with cuts of conductance `most` at most, bool [n]: up to one per eigenvector, and by `order` [n]."""
    n, degree = edges.shape[0], np.asarray(edges.sum(axis=1)).ravel()
    half = diags_array(1 / np.sqrt(np.maximum(degree, 1e-12)))
    try:
        values, vectors = eigsh(half @ edges @ half, k=VECTORS, which="LA", tol=1e-3, v0=np.ones(n), maxiter=300)
    except ArpackNoConvergence as e:
        values, vectors = e.eigenvalues, e.eigenvectors
    graph = edges.tocoo()
    for vector in (half @ vectors).T[np.argsort(-values)]:
        cuts = [_best_cut(graph, degree, end, 0.5) for end in (vector, -vector)]
        conductance, group = min(cuts, key=lambda cut: cut[0])
        if conductance <= most:
            yield group
    if order is not None:
        conductance, group = _best_cut(graph, degree, order, GROUP)
        if conductance <= most:
            yield group


def _best_cut(graph: coo_array, degree: np.ndarray, order: np.ndarray, most: float) -> tuple[float, np.ndarray]:
    """Return conductance and group, bool [n], of the best cut of points with small `order` [n] from the others.

    The group has at least the share LEAST and at most the share `most` of the edges.
    """
    items = np.argsort(order)
    place = np.empty(len(items), dtype=np.int64)
    place[items] = np.arange(len(items))
    a, b = place[graph.row], place[graph.col]
    first, last = (np.bincount(ends, graph.data / 2, len(items)) for ends in (np.minimum(a, b), np.maximum(a, b)))
    volume = degree[items].cumsum()
    conductance = (first - last).cumsum() / np.maximum(volume, 1e-12)
    conductance[(volume < volume[-1] * LEAST) | (volume > volume[-1] * most)] = np.inf
    best = int(conductance.argmin())
    return float(conductance[best]), place <= best


def _distance(x: np.ndarray, group: np.ndarray, rest: np.ndarray, fewer: int = 1) -> np.ndarray:
    """Return the squared distances of the points `group` (bool [N]) to the nearest one of `rest`.

    Their unit is what is usual among `rest`, by one in `fewer` of its points.
    """
    y, _, _ = whitened(x, rest)
    members = y[rest]
    own = np.full(len(members), -1)
    own[::fewer] = np.arange(len(own[::fewer]))
    usual = np.quantile(nearest(members[::fewer], members, 1, own=own)[1], USUAL)
    return np.square(nearest(y[group], members, 1)[1][:, 0] / max(float(usual), 1e-9))
