r"""Ray casting of solids on a ground: every ray is intersected with every solid in closed form.

Lengths are in units of the world, whose axes are x to the right, y upwards and z away from the viewer; the ground is
y = 0. Nothing is random here.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor

from ddpm.data.dataset import height_width

SHAPES = ("sphere", "cube", "cylinder", "cone")
TEXTURES = ("plain", "stripes", "checks")
BAND = 0.5  # height of a stripe, and of a check, as a share of the radius of a sphere of that size
SECTORS = 8  # checks around a solid
HALF_EDGE, RADIUS, HEIGHT = 0.78, 0.8, 1.6  # of a cube; of a cylinder: as shares of the radius of a sphere of that size
BASE, TIP = 1.0, 2.0  # radius and height of a cone, likewise

EYE, PITCH, SPREAD = (0.0, 7.9, -9.6), math.radians(38.0), 0.235  # the camera: see `rays`
KEY = (-0.55, 0.72, -0.42)  # towards the light that casts shadows, from the left, above and before
BACK = (0.0, 0.62, 0.78)  # towards a window behind: it lies on what is shiny and looks up, and nowhere else
AMBIENT, DIFFUSE, GLOSS = 0.42, 0.68, (0.9, 0.55)  # strengths; of the highlights of KEY and of BACK
POLISH = 24.0  # exponent of the highlights: so broad that they are seen at 32 pixels
GROUND = (0.56, 0.55, 0.53)  # its colour
AT_ONCE = 1 << 18  # rays, which the caches of a CPU hold
TINY = 1e-9  # in place of a component 0 of a direction, by which is divided
INFINITE = float("inf")

Vector = tuple[Tensor, Tensor, Tensor]  # x, y and z, of shapes that fit each other


class Solids(NamedTuple):
    """N scenes of S solids each, tensors on one device."""

    shape: Tensor  # (N, S), numbers in `SHAPES`; -1 for none
    radius: Tensor  # (N, S), float
    colour: Tensor  # (N, S, 3), of red, green and blue in [0, 1]
    shiny: Tensor  # (N, S), bool
    place: Tensor  # (N, S, 3), float: x and z of what stands there, and the angle that it is turned by
    second: Tensor | None = None  # (N, S, 3), a colour that alternates with the first; None where all are plain
    texture: Tensor | None = None  # (N, S), numbers in `TEXTURES`: the pattern of the two colours

    def rows(self, select: slice | Tensor) -> "Solids":
        """Return some of the scenes."""
        second, texture = (None if values is None else values[select] for values in (self.second, self.texture))
        shape, radius, colour, shiny, place = (values[select] for values in self[:5])
        return Solids(shape, radius, colour, shiny, place, second, texture)


class View(NamedTuple):
    """A camera's view of N scenes of S solids."""

    picture: Tensor  # uint8 (N, 3, H, W)
    depth: Tensor  # float32 (N, 1, H, W): along the camera's axis, of what the centre of a pixel shows
    masks: Tensor  # bool (N, 1 + S, H, W): where the centre of a pixel shows the ground, or each solid; one of them


class Hits(NamedTuple):
    """The first hit of each of N x P rays."""

    depth: Tensor  # (N, P)
    which: Tensor  # (N, P), int64: 0 for the ground, s + 1 for solid s


def rays(size: int | Sequence[int], samples: int = 1, device: torch.device | str = "cpu") -> Tensor:
    r"""Return the directions of rays from the camera's eye, on a grid of samples^2 rays per pixel.

    .. math:: w = f + a\,e_x + b\,u, \quad a = k \frac{2 i - W}{\max(H, W)}, \quad
        b = k \frac{H - 2 j}{\max(H, W)}
        \qquad \text{[Pinhole (ray)]}

    with f ahead, u upwards in the picture, k the tangent of half the angle of view, and (i, j) a place in the picture
    in pixels from its left upper corner. As f has length 1 and the others are normal to it, EYE + t w is at depth t.

    Args:
        size: of the picture, a side or (H, W).
        samples: a side of a pixel.
    Returns: float32 (H W samples^2, 3), the samples of a pixel side by side.
    """
    height, width = height_width(size)
    k, longer = SPREAD, max(height, width)
    f = torch.tensor([0.0, -math.sin(PITCH), math.cos(PITCH)], dtype=torch.float64, device=device)
    u = torch.tensor([0.0, math.cos(PITCH), math.sin(PITCH)], dtype=torch.float64, device=device)
    e_x = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64, device=device)
    i, j = ((torch.arange(n * samples, device=device).double() + 0.5) / samples for n in (width, height))
    a, b = k * (2 * i - width) / longer, k * (height - 2 * j) / longer
    w = f + a[None, :, None] * e_x + b[:, None, None] * u
    return rearrange(w, "(h p) (w q) c -> (h w p q) c", p=samples, q=samples).float()


def projected(points: Tensor) -> Tensor:
    r"""Return the place in the picture, and the depth, of points in space.

    .. math:: t = f \cdot (p - \text{EYE}), \quad \frac a k = \frac{p_x - \text{EYE}_x}{k t}, \quad
        \frac b k = \frac{u \cdot (p - \text{EYE})}{k t} \qquad \text{[Pinhole (projection)]}

    Args:
        points: (..., 3).
    Returns: (..., 3): a / k and b / k, in -1..1 from left to right and from below to above in a square picture; and
        the depth t.
    """
    x, y, z = (points - torch.tensor(EYE, dtype=points.dtype, device=points.device)).unbind(-1)
    sin, cos = math.sin(PITCH), math.cos(PITCH)
    t = -sin * y + cos * z
    return torch.stack([x / (SPREAD * t), (cos * y + sin * z) / (SPREAD * t), t], -1)


# ------------------------------------------------------------------------------------------------- where a ray enters


def sphere(o: Vector, w: Vector, r: Tensor) -> Tensor:
    r"""Return how far along rays they enter a sphere that touches the ground at the origin.

    .. math:: |o + t w - c|^2 = r^2, \quad c = (0, r, 0), \quad t = \frac{-B - \sqrt{B^2 - A C}}{A}, \quad
        A = w \cdot w, \quad B = (o - c) \cdot w, \quad C = |o - c|^2 - r^2 \qquad \text{[Quadric (sphere)]}

    Args:
        o, w: where rays begin, outside of the solid, and their directions; of any length.
        r: radius.
    Returns: t > 0; infinite where the solid is missed, or lies behind.
    """
    x, y, z = o[0], o[1] - r, o[2]
    A, B = _dot(w, w), x * w[0] + y * w[1] + z * w[2]
    C = x * x + y * y + z * z - r * r
    D = B * B - A * C
    return _ahead((-B - D.clamp(min=0).sqrt()) / A, D > 0)


def cube(o: Vector, w: Vector, r: Tensor) -> Tensor:
    r"""Return how far along rays they enter a cube of half the edge a = `HALF_EDGE` r, whose faces look along the axes.

    .. math:: t = \max_i \min(t_i^-, t_i^+) \le \min_i \max(t_i^-, t_i^+), \quad
        t_i^\pm = \frac{c_i \pm a - o_i}{w_i}, \quad c = (0, a, 0) \qquad \text{[Slabs (cube)]}
    """
    a = HALF_EDGE * r
    near, far = _slab(o[1], w[1], 0 * a, 2 * a)
    for axis in (0, 2):
        enters, leaves = _slab(o[axis], w[axis], -a, a)
        near, far = torch.maximum(near, enters), torch.minimum(far, leaves)
    return _ahead(near, near < far)


def cylinder(o: Vector, w: Vector, r: Tensor) -> Tensor:
    r"""Return how far along rays they enter an upright cylinder of radius R = `RADIUS` r and height h = `HEIGHT` r.

    .. math:: x^2 + z^2 \le R^2, \quad 0 \le y \le h \qquad \text{[Quadric (cylinder)]}

    Inside of both for the rays' interval that lies in both.
    """
    R, h = RADIUS * r, HEIGHT * r
    A, B = w[0] * w[0] + w[2] * w[2], o[0] * w[0] + o[2] * w[2]
    A = A.clamp(min=TINY) if isinstance(A, Tensor) else max(A, TINY)
    D = B * B - A * (o[0] * o[0] + o[2] * o[2] - R * R)
    root = D.clamp(min=0).sqrt()
    enters, leaves = _slab(o[1], w[1], 0 * h, h)
    near, far = torch.maximum(enters, (-B - root) / A), torch.minimum(leaves, (-B + root) / A)
    return _ahead(near, (D > 0) & (near < far))


def cone(o: Vector, w: Vector, r: Tensor) -> Tensor:
    r"""Return how far along rays they enter a cone of base radius R = `BASE` r and height h = `TIP` r by its side.

    .. math:: x^2 + z^2 = \kappa^2 (h - y)^2, \quad 0 \le y \le h, \quad \kappa = R / h \qquad \text{[Quadric (cone)]}

    Of the two roots the first that lies between the ground and the tip: beyond it the equation has a second cone.
    """
    h, kappa = TIP * r, BASE / TIP
    below = h - o[1]
    A = w[0] * w[0] + w[2] * w[2] - kappa**2 * w[1] * w[1]
    B = o[0] * w[0] + o[2] * w[2] + kappa**2 * below * w[1]
    C = o[0] * o[0] + o[2] * o[2] - (kappa * below) ** 2
    D = B * B - A * C
    q = -(B + torch.where(B < 0, -1, 1) * D.clamp(min=0).sqrt())  # C / q stays finite where A vanishes
    t = torch.full_like(D, INFINITE)
    for root in (q / A, C / q):
        y = o[1] + root * w[1]
        t = torch.where((D > 0) & (y >= 0) & (y <= h) & (root > 0), torch.minimum(t, root), t)
    return t


ENTERED: tuple[Callable[[Vector, Vector, Tensor], Tensor], ...] = (sphere, cube, cylinder, cone)


def _dot(a: Vector, b: Vector) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _ahead(t: Tensor, met: Tensor) -> Tensor:
    """Return t where a solid is hit in front of the eye, else infinity."""
    return torch.where(met & (t > 0), t, INFINITE)


def _slab(o: Tensor, w: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return where rays enter and leave the space between two planes normal to an axis."""
    w = torch.where(w.abs() < TINY, TINY, w)
    one, other = (low - o) / w, (high - o) / w
    return torch.minimum(one, other), torch.maximum(one, other)


def normal(shape: int, p: Tensor, r: Tensor) -> Tensor:
    """Return the outer normals (n, 3), of length 1, at points (n, 3) of solids of radius r (n,) at the origin.

    Args:
        shape: a number in `SHAPES`.
    """
    x, y, z = p.unbind(-1)
    zero = torch.zeros_like(x)
    if SHAPES[shape] == "sphere":
        n = torch.stack([x, y - r, z], -1)
    elif SHAPES[shape] == "cube":
        q = torch.stack([x, y - HALF_EDGE * r, z], -1)
        face = q.abs().argmax(-1, keepdim=True)
        n = torch.zeros_like(q).scatter(-1, face, q.gather(-1, face))
    elif SHAPES[shape] == "cylinder":
        top = y > (HEIGHT - 1e-3) * r
        n = torch.stack([torch.where(top, zero, x), top.to(x.dtype), torch.where(top, zero, z)], -1)
    else:
        n = torch.stack([x, (BASE / TIP) ** 2 * (TIP * r - y), z], -1)
    return n / n.norm(dim=-1, keepdim=True).clamp(min=TINY)


def _turned(vector: Vector, angle: Tensor) -> Vector:
    """Return a vector turned about the vertical by an angle; minus the angle turns it back."""
    cos, sin = angle.cos(), angle.sin()
    return cos * vector[0] + sin * vector[2], vector[1], cos * vector[2] - sin * vector[0]


# ---------------------------------------------------------------------------------------------------- what is seen


def _groups(solids: Solids) -> list[tuple[int, int, Tensor]]:
    """Return solids that share an intersection routine: their index in a scene, their shape, and the scenes (n,)."""
    found = []
    for s in range(solids.shape.shape[1]):
        for kind in range(len(SHAPES)):
            rows = (solids.shape[:, s] == kind).nonzero()[:, 0]
            if len(rows):
                found.append((s, kind, rows))
    return found


def _entered(solids: Solids, s: int, kind: int, rows: Tensor, o: Vector, w: Vector) -> Tensor:
    """Return how far along rays the solid s of some scenes is entered, (n, P); o and w are (n or 1, P or 1) each."""
    x, z, angle = (values[:, None] for values in solids.place[rows, s].unbind(-1))
    o = (o[0] - x, o[1], o[2] - z)
    if SHAPES[kind] == "cube":
        o, w = _turned(o, angle), _turned(w, angle)
    return ENTERED[kind](o, w, solids.radius[rows, s, None])


def first_hits(solids: Solids, w: Tensor) -> Hits:
    """Return the first hits of rays (P, 3) from the eye, all of which point to the ground."""
    eye = tuple(torch.tensor([[value]], dtype=w.dtype, device=w.device) for value in EYE)
    ahead = tuple(w.T[:, None])
    depth = (-EYE[1] / ahead[1]).expand(len(solids.shape), -1).clone()
    which = torch.zeros(depth.shape, dtype=torch.int64, device=w.device)
    for s, kind, rows in _groups(solids):
        t = _entered(solids, s, kind, rows, eye, ahead)  # type: ignore[arg-type]
        closer = t < depth[rows]
        depth[rows] = torch.where(closer, t, depth[rows])
        which[rows] = torch.where(closer, s + 1, which[rows])
    return Hits(depth, which)


def shadowed(solids: Solids, points: Tensor, which: Tensor) -> Tensor:
    """Return which points (N, P, 3) are shadowed by another solid than their own (N, P): bool (N, P)."""
    light = tuple(torch.tensor([[value]], dtype=points.dtype, device=points.device) for value in _unit(KEY))
    dark = torch.zeros(which.shape, dtype=torch.bool, device=points.device)
    for s, kind, rows in _groups(solids):
        o = points[rows].unbind(-1)
        hidden = _entered(solids, s, kind, rows, o, light).isfinite()  # type: ignore[arg-type]
        dark[rows] |= hidden & (which[rows] != s + 1)
    return dark


def normals(solids: Solids, points: Tensor, row: Tensor, s: Tensor) -> Tensor:
    """Return the outer normals (n, 3) at points (n, 3) of the surfaces of the solids s (n,) of scenes (n,)."""
    n = torch.empty_like(points)
    for kind, name in enumerate(SHAPES):
        at = (solids.shape[row, s] == kind).nonzero()[:, 0]
        x, z, angle = solids.place[row[at], s[at]].unbind(-1)
        p_x, p_y, p_z = points[at].unbind(-1)
        p, angle = (p_x - x, p_y, p_z - z), angle if name == "cube" else torch.zeros_like(angle)
        own = normal(kind, torch.stack(_turned(p, angle), -1), solids.radius[row[at], s[at]])
        n[at] = torch.stack(_turned((own[:, 0], own[:, 1], own[:, 2]), -angle), -1)
    return n


def shaded(colour: Tensor, shiny: Tensor, n: Tensor, v: Tensor, lit: Tensor) -> Tensor:
    r"""Return the colours of points of a surface in the scene's light.

    .. math:: c \left(\text{AMBIENT}\, \frac{3 + n_y}{4} + \text{DIFFUSE} \cdot \text{lit} \max(n \cdot l, 0)\right)
        + \text{shiny} \sum_l g_l \max(n \cdot h_l, 0)^{\text{POLISH}}, \quad h_l = \frac{l + v}{|l + v|}
        \qquad \text{[Phong (light)]}

    with the light `KEY`, and in the sum `BACK` too; g is `GLOSS`, that of `KEY` only where it is lit.

    Args:
        colour: c, (..., 3).
        shiny, lit: (...), bool.
        n, v: of length 1, the outer normal and the direction towards the eye, (..., 3).
    Returns: (..., 3), 0 for black, 1 for white; lights may sum up to more.
    Source: Phong 1975; with half vectors h, Blinn 1977.
    """
    l = torch.tensor([_unit(KEY), _unit(BACK)], dtype=n.dtype, device=n.device)  # noqa: E741
    light = AMBIENT * (3 + n[..., 1]) / 4 + DIFFUSE * lit * (n @ l[0]).clamp(min=0)
    reflected = colour * light[..., None]
    for g, lamp, there in zip(GLOSS, l, (lit & shiny, shiny), strict=True):
        h = torch.nn.functional.normalize(lamp + v, dim=-1)
        reflected = reflected + (g * there * (n * h).sum(-1).clamp(min=0) ** POLISH)[..., None]
    return reflected


def textured(points: Tensor, r: Tensor, texture: Tensor) -> Tensor:
    r"""Return where a solid has its second colour.

    .. math:: i = \left\lfloor \frac{y}{\text{BAND}\, r} \right\rfloor, \quad
        j = \left\lfloor \frac{\text{SECTORS}}{2 \pi} \operatorname{atan2}(z, x) \right\rfloor, \quad
        \text{stripes}: i \bmod 2, \quad \text{checks}: (i + j) \bmod 2 \qquad \text{[Texture (turns)]}

    Args:
        points: (n, 3), of its surface, as seen from where it stands, in the directions that it is turned to.
        r: radius, (n,).
        texture: numbers in `TEXTURES`, (n,).
    Returns: (n,), bool.
    """
    x, y, z = points.unbind(-1)
    i, j = (y / (BAND * r)).floor(), (SECTORS / (2 * math.pi) * torch.atan2(z, x)).floor()
    return (((i % 2 == 1) & (texture == 1)) | (((i + j) % 2 == 1) & (texture == 2))).bool()


def _surface_colours(solids: Solids, points: Tensor, row: Tensor, s: Tensor) -> Tensor:
    """Return the colours (n, 3) of the solids s (n,) of scenes (n,) at points (n, 3) of their surfaces."""
    colour = solids.colour[row, s]
    if solids.second is None or solids.texture is None:
        return colour
    x, z, angle = solids.place[row, s].unbind(-1)
    own = torch.stack(_turned((points[:, 0] - x, points[:, 1], points[:, 2] - z), angle), -1)
    turns = textured(own, solids.radius[row, s], solids.texture[row, s])
    return torch.where(turns[:, None], solids.second[row, s], colour)


def _unit(vector: tuple[float, float, float]) -> tuple[float, ...]:
    length = math.sqrt(sum(value * value for value in vector))
    return tuple(value / length for value in vector)


def _colours(solids: Solids, w: Tensor, hits: Hits) -> Tensor:
    """Return red, green and blue (N, P, 3) at the hits of rays w (P, 3) from the eye."""
    points = torch.tensor(EYE, dtype=w.dtype, device=w.device) + hits.depth[..., None] * w
    lit, v = ~shadowed(solids, points, hits.which), -torch.nn.functional.normalize(w, dim=-1)
    up, ground = w.new_tensor([0.0, 1.0, 0.0]), w.new_tensor(GROUND)
    both = torch.tensor([False, True], device=w.device)
    colours = shaded(ground.expand(2, 3), both & ~both, up.expand(2, 3), up.expand(2, 3), both)[lit.long()]
    row, ray = hits.which.nonzero(as_tuple=True)
    s = hits.which[row, ray] - 1
    n = normals(solids, points[row, ray], row, s)
    colour = _surface_colours(solids, points[row, ray], row, s)
    colours[row, ray] = shaded(colour, solids.shiny[row, s], n, v[ray], lit[row, ray])
    return colours


def seen(solids: Solids, size: int | Sequence[int], samples: int = 3) -> View:
    """Render the view that the camera has of scenes.

    Args:
        size: of the pictures, a side or (H, W).
        samples: rays a side of a pixel, an odd number, so that one goes through its centre.
    """
    height, width = height_width(size)
    w = rays(size, samples, solids.place.device)
    parts = [_seen(rows, w, height, width) for rows in _chunks(solids, len(w))]
    return View(*(torch.cat(values) for values in zip(*parts, strict=True)))


def surfaces(solids: Solids, size: int | Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the depth and the masks of `seen`, in a fraction of its time."""
    height, width = height_width(size)
    w, parts = rays(size, 1, solids.place.device), []
    for rows in _chunks(solids, len(w)):
        parts.append(_maps(first_hits(rows, w), rows.shape.shape[1], height, width, 1))
    depth, masks = (torch.cat(values) for values in zip(*parts, strict=True))
    return depth, masks


def _chunks(solids: Solids, P: int) -> list[Solids]:
    """Split the scenes into chunks so small that P rays for each scene fit the cache."""
    step = max(1, AT_ONCE // P)
    return [solids.rows(slice(start, start + step)) for start in range(0, len(solids.shape), step)]


def _seen(solids: Solids, w: Tensor, height: int, width: int) -> View:
    hits = first_hits(solids, w)
    colours = _colours(solids, w, hits)
    samples = math.isqrt(len(w) // (height * width))
    picture = reduce(colours, "n (h w s) c -> n c h w", "mean", h=height, w=width)
    depth, masks = _maps(hits, solids.shape.shape[1], height, width, samples)
    return View((255 * picture.clamp(0, 1)).round().to(torch.uint8), depth, masks)


def _maps(hits: Hits, solids: int, height: int, width: int, samples: int) -> tuple[Tensor, Tensor]:
    """Return depth (N, 1, H, W) and masks (N, 1 + S, H, W) by the ray through the centre of each pixel."""
    middle = samples**2 // 2
    depth, which = (
        rearrange(values, "n (h w s) -> n s h w", h=height, w=width)[:, middle : middle + 1] for values in hits[:2]
    )
    numbers = torch.arange(solids + 1, device=which.device)
    return depth.contiguous(), which == numbers[:, None, None]
