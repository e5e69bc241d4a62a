"""Every formula of the LoRA family once, as pure functions of tensors.

Symbols: W (out, in) or (out, in, k, k) original weight; A (r, in[, k, k]) down; B (out, r[, 1, 1]) up;
s = alpha/r; V = W + s B A; m the DoRA magnitude. LoRA arXiv 2106.09685, rsLoRA 2312.03732, DoRA 2402.09353,
LoHa 2108.06098, LoKr 2309.14859, (IA)³ 2205.05638, GLoRA 2306.07967, OFT 2306.07280, BOFT 2311.06243.
Results are fp32 whatever the inputs are in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Many = Sequence[Tensor]
# elements of a weight taken to fp32 at a time where only sums along its rows are wanted: these 2 MB stay in a cache
ROWS = 2**19
NEAREST = 8  # rows of a layer computed densely where it is not asked whether any must be
CANCELLING, CANCELLING_HALF = (
    1e-3,
    0.5,
)  # shares of |W|^2 below which |V|^2 is computed densely: row_norms_together


def lora_scale(*, alpha: float, rank: int, rank_stabilized: bool = False) -> float:
    """s = alpha/r, or alpha/sqrt(r) for rsLoRA."""
    return alpha / rank**0.5 if rank_stabilized else alpha / rank


def flat(weight: Tensor) -> Tensor:
    """(out, in, k, k) -> fp32 (out, in*k*k); a matrix stays one, and a norm's (out,) becomes a column."""
    return weight.float().flatten(1) if weight.dim() > 1 else weight.float()[:, None]


def low_rank(down: Tensor, up: Tensor, mid: Tensor | None = None, *, scale: float) -> Tensor:
    """s B A. Linear -> (out, in); convolution -> (out, in, k, k). `mid` (r, r, k, k) is LyCORIS' Tucker core."""
    if mid is not None:
        down = compose_tucker(down, mid)
    product = flat(up) @ flat(down)  # (out, in*k*k)
    return (scale * product).reshape(up.shape[0], *down.shape[1:])


def compose_tucker(down: Tensor, mid: Tensor) -> Tensor:
    """A (r, in, 1, 1) and core (r', r, k, k) -> one kernel (r', in, k, k): exact, so the rest of the house
    needs no third factor."""
    return torch.einsum("qrkl,ri->qikl", mid.float(), flat(down))


def down_and_up(a: Tensor, b: Tensor, core: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """LyCORIS' a and b of a LoHa or LoKr -> fp32 down (r, in[, k, k]) and up (out, r), whose product is theirs.

    Stored a (out, r), b (r, in[, k, k]). With a Tucker core (r, r, k, k) a is stored the other way round, (r, out),
    and b is (r, in): the core composes into b exactly.
    """
    if core is None:
        return b.float(), flat(a)
    return compose_tucker(b, core), flat(a).T


def hadamard(
    w1_a: Tensor,
    w1_b: Tensor,
    w2_a: Tensor,
    w2_b: Tensor,
    t1: Tensor | None = None,
    t2: Tensor | None = None,
    *,
    scale: float,
) -> Tensor:
    """LoHa: s (w1_a w1_b) * (w2_a w2_b), element by element -> (out, in[, k, k]). Shapes as in down_and_up."""
    first, second = down_and_up(w1_a, w1_b, t1), down_and_up(w2_a, w2_b, t2)
    return low_rank(*first, scale=scale) * low_rank(*second, scale=1.0)


def khatri_rao(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], *, scale: float
) -> tuple[Tensor, Tensor]:
    """Two (down, up) of ranks r1, r2 -> the (down, up) of rank r1 r2 whose product is s times the elementwise
    product of theirs. Exact: sum_i a_i b_i times sum_j c_j d_j is the sum over all pairs (i, j)."""
    (down1, up1), (down2, up2) = first, second
    down = (down1.float()[:, None] * down2.float()[None]).flatten(0, 1)
    up = (flat(up1)[:, :, None] * flat(up2)[:, None]).flatten(1)
    return down, scale * up


def kronecker(left: Tensor, right: Tensor, *, scale: float) -> Tensor:
    """LoKr: s kron(left (out1, in1), right (out2, in2[, k, k])) -> (out1 out2, in1 in2[, k, k])."""
    spread = left.float().reshape(*left.shape, *[1] * (right.dim() - 2))
    return scale * torch.kron(spread, right.float().contiguous())


def channel_scale(weight: Tensor, vector: Tensor, *, on_input: bool) -> Tensor:
    """(IA)³: W' - W with W' = W (1 + v) -> W times v (n,) along the inputs or the outputs. Shape of W."""
    spread = [1] * weight.dim()
    spread[1 if on_input else 0] = -1
    scaled: Tensor = weight.float() * vector.float().reshape(spread)
    return scaled


def change_to(original: Tensor, value: Tensor) -> Tensor:
    """W' - W for a whole new W' of as many elements. Shape of W, fp32."""
    found: Tensor = value.float().reshape(original.shape) - original.float()
    return found


def glora_factors(
    weight: Tensor, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], *, scale: float
) -> tuple[Tensor, Tensor]:
    """GLoRA: dW = s (W x a1 a2 + b1 b2) as down (R, in[, k, k]) and up (out, R), the scale folded into `up`.

    a = (a1 (in, r), a2 (r, in)) acts on W's inputs, b = (b1 (out, r), b2 (r, in[, k, k])) beside W. W a1 is a thin
    matrix, for a kernel one for each of its k*k places: R = r k k + r. Exact.
    """
    (a1, a2), (b1, b2) = a, b
    places = weight[0, 0].numel()  # k*k
    thin = torch.einsum("oi...,ir->or...", weight.float(), flat(a1)).flatten(1)  # (out, r*k*k)
    at = torch.eye(places, device=weight.device).reshape(places, 1, places)
    spread = (flat(a2)[:, None, :, None] * at[None]).reshape(-1, *weight.shape[1:])  # (r*k*k, in[, k, k])
    down = torch.cat([spread, b2.float().reshape(-1, *weight.shape[1:])])
    return down, scale * torch.cat([thin, flat(b1)], dim=1)


def glora(weight: Tensor, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], *, scale: float) -> Tensor:
    """The same as dW, of W's shape: for large r k k the shorter way."""
    (a1, a2), (b1, b2) = a, b
    acted: Tensor = torch.einsum("oi...,ij->oj...", weight.float(), flat(a1) @ flat(a2))
    beside = (flat(b1) @ flat(b2)).reshape(weight.shape)
    return scale * (acted + beside)


def cayley_change(blocks: Tensor, *, limit: float) -> Tensor:
    """R - I for the rotation R = (I + Q) (I - Q)^-1 of each skew-symmetric Q = B - Bᵀ; blocks B (..., n, n).

    As 2 Q (I - Q)^-1, which keeps the digits of a small Q. `limit` above 0 holds |Q|, over all blocks together,
    within it (COFT); 0 is no limit.
    """
    skew = blocks.float() - blocks.float().transpose(-1, -2)
    norm = torch.linalg.vector_norm(skew) + 1e-8
    if limit > 0 and bool(norm > limit):
        skew = skew * (limit / norm)
    eye = torch.eye(skew.shape[-1], device=skew.device)
    change: Tensor = torch.linalg.solve(eye - skew, 2 * skew, left=False)
    return change


def butterfly_order(out: int, reach: int) -> Tensor:
    """Which rows come together in a stage of BOFT: those `reach` apart, in runs of 2 reach -> (out,) indices."""
    return torch.arange(out).view(-1, 2, reach).transpose(1, 2).reshape(-1)


def turned(
    y: Tensor, stages: Sequence[tuple[Tensor, Tensor | None]], rescale: Tensor | None = None
) -> Tensor:
    """OFT, BOFT: g R y - y for R = R_m ... R_1, each block-diagonal in an order of its own. y (out, n) -> (out, n).

    stages: (R_i - I as blocks (k, b, b), order (out,) or None for the rows as they stand); g `rescale` (out,).
    The difference itself is carried along: y, which is much larger, would round it away.
    """
    change = torch.zeros_like(y)
    for blocks, order in stages:
        rows = y + change
        rows = rows if order is None else rows[order]
        moved = torch.bmm(blocks, rows.reshape(len(blocks), blocks.shape[-1], -1)).reshape(y.shape)
        change = change + (moved if order is None else torch.empty_like(moved).index_copy(0, order, moved))
    return rescaled(y, change, rescale)


def rescaled(y: Tensor, change: Tensor, rescale: Tensor | None) -> Tensor:
    """g (y + change) - y, g `rescale` (out,) or none. (out, n)."""
    if rescale is None:
        return change
    return rescale[:, None] * change + (rescale[:, None] - 1) * y


def gram_inner(down1: Tensor, up1: Tensor, down2: Tensor, up2: Tensor) -> Tensor:
    """<dW1, dW2>, the sum of the elementwise product of dW1 = up1 down1 and dW2 = up2 down2, without forming them:
    sum((up1ᵀ up2) * (down1 down2ᵀ)), two products of r1 x r2. Scalar, fp32; with itself it is |dW|^2.

    down (r, in[, k, k]), up (out, r[, 1, 1]), any scale folded in; the ranks may differ.
    In float64, for LoRAs that cancel: of 0.7, 0.3 and -1 times one LoRA, stacked, |dW| should be 0; fp32 leaves
    2.3e-4 of that LoRA's |dW|, float64 4e-8, and 2e-8 is in the factors already (1280 x 1280, rank 16, measured).
    Where nothing cancels fp32 would do: relative error 7e-8.
    """
    factors = [flat(t) for t in (down1, up1, down2, up2)]
    # Apple's GPUs have no float64; the factors are small enough to travel
    a1, b1, a2, b2 = (t.cpu().double() if t.device.type == "mps" else t.double() for t in factors)
    return ((b1.T @ b2) * (a1 @ a2.T)).sum().float()


def svd_of_product(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of up · down without forming it: QR of both factors, then the SVD of an R x R core.

    down (R, n), up (m, R) -> Vᵀ (K, n), U S (m, K), S (K), K = min(R, m, n), the largest singular value first.
    """
    left, core_left = torch.linalg.qr(up.float())
    right, core_right = torch.linalg.qr(down.float().T)
    u, values, vh = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
    return vh @ right.T, left @ (u * values), values


def difference(down: Tensor, up: Tensor, down0: Tensor, up0: Tensor) -> tuple[Tensor, Tensor]:
    """B A - B0 A0 of rank r as factors of rank 2r: [B - B0, B] [A0; A - A0].

    Equal to [B, -B0] [A; A0], whose products cancel: of a difference that is small beside B A, fp16 factors of that
    spelling lose 0.9 % and bf16 ones 7.5 %; of this one 0.03 % and 0.2 % (1280 x 1280, rank 16, measured). Shapes as in
    low_rank.
    """
    return torch.cat([down0, down - down0]), torch.cat([up - up0, up], dim=1)


def row_norms_squared(weight: Tensor) -> Tensor:
    """n0 = rowsum(W^2), (out,)."""
    return torch.cat([flat(rows).square().sum(1) for rows in some_rows(weight)])


def some_rows(weight: Tensor) -> tuple[Tensor, ...]:
    """Its rows, a few at a time: no second tensor of a weight's size is made."""
    return torch.split(weight, max(1, ROWS // weight[0].numel()))


def row_norms(weight: Tensor, down: Tensor, up: Tensor, *, scale: float, n0: Tensor | None = None) -> Tensor:
    """|V| per output row, (out,): `row_norms_together` of one layer."""
    n0 = row_norms_squared(weight) if n0 is None else n0
    return row_norms_together([weight], [down], [up], scale=scale, n0=n0[None])[0]


def row_norms_together(weights: Many, downs: Many, ups: Many, *, scale: float, n0: Tensor) -> Tensor:
    """|V| per output row of L layers of one shape and dtype, (L, out), without forming V (out x in); `n0` (L, out).

    |V|^2 = n0 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B (A A^T)) * B). Relative error <= 2.5e-7 for ordinary
    rows; where V nearly cancels W (|V|^2 < 1e-3 n0) the terms cancel too, and those rows are computed densely.

    A bf16 W meets A in bf16, as in the layer's own product and in a third of the time. The error is 5e-5 then where
    |BA| is a tenth of |W|, and 2e-4 where it is as large: W's rounding to bf16 has changed the norm by 4e-4 already.
    Rows with |V|^2 < n0 / 2 are computed densely.
    """
    a, b = torch.stack([flat(down) for down in downs]), torch.stack([flat(up) for up in ups])
    if half := weights[0].dtype == torch.bfloat16:
        parts = [w.flatten(1) @ at for w, at in zip(weights, a.bfloat16().mT, strict=True)]
    else:
        parts = [torch.cat([flat(r) @ at for r in some_rows(w)]) for w, at in zip(weights, a.mT, strict=True)]
    wa = torch.stack(parts).float()  # (L, out, r)
    squared = n0 + (torch.baddbmm(wa, b, a @ a.mT, beta=2 * scale, alpha=scale**2) * b).sum(2)

    def dense(layer: int, rows: Tensor) -> Tensor:
        return (flat(weights[layer][rows]) + scale * (b[layer, rows] @ a[layer])).square().sum(1)

    return _with_dense(squared, n0, dense, CANCELLING_HALF if half else CANCELLING).sqrt()


def _with_dense(
    squared: Tensor, n0: Tensor, dense: Callable[[int, Tensor], Tensor], share: float = CANCELLING
) -> Tensor:
    """`squared` (L, out) with `dense(layer, row numbers)` where its terms cancel, below that share of n0. Whether any
    do is free to ask on a CPU; a GPU would be waited for in every step, so there the NEAREST to it of each layer are
    always computed."""
    if squared.device.type != "cpu":
        return _with_nearest_dense(squared, n0, dense)
    layers, rows = (squared < share * n0).nonzero(as_tuple=True)
    for layer in set(layers.tolist()) if len(layers) else ():
        some = rows[layers == layer]
        squared[layer, some] = dense(layer, some)
    return squared


def _with_nearest_dense(squared: Tensor, n0: Tensor, dense: Callable[[int, Tensor], Tensor]) -> Tensor:
    rows = (squared / n0).topk(min(NEAREST, squared.shape[1]), largest=False).indices  # (L, NEAREST)
    found = torch.stack([dense(layer, some) for layer, some in enumerate(rows)])
    return squared.scatter(1, rows, found).maximum(1e-9 * n0)


def kronecker_row_norms(weight: Tensor, left: Tensor, right: Tensor, *, n0: Tensor) -> Tensor:
    """|W + left ⊗ right| per output row, (out,), without forming the product; left (out1, in1), right
    (out2, in2[, k, k]), `n0` rowsum(W²). Rows where it nearly cancels W are computed densely, as in row_norms."""
    (out1, in1), out2 = left.shape, right.shape[0]
    c, d = left.float(), right.float().reshape(out2, -1, *weight.shape[2:])
    w = weight.float().reshape(out1, out2, in1, d.shape[1], -1)  # in2 and k·k apart from in1
    cross = torch.einsum("abijk,ai,bjk->ab", w, c, d.flatten(2) if d.dim() > 2 else d[:, :, None])
    product = c.square().sum(1)[:, None] * d.flatten(1).square().sum(1)  # (out1, out2)
    squared = n0 + (2 * cross + product).flatten()
    whole = d.reshape(out2, d.shape[1], -1)  # (out2, in2, k·k)

    def dense(_: int, rows: Tensor) -> Tensor:
        i, j = rows // out2, rows % out2
        return (w[i, j] + c[i][:, :, None, None] * whole[j][:, None]).square().flatten(1).sum(1)

    return _with_dense(squared[None], n0[None], dense)[0].sqrt()


def magnitude_axis(magnitude: Tensor, weight_shape: torch.Size) -> int:
    """0: one magnitude per output row (the paper, PEFT); 1: per input column (older LyCORIS, OneTrainer).

    Told from the shape: (out,), (out, 1[, 1, 1]) or PEFT's (1, out, 1, 1) against (1, in[, 1, 1]).
    On a square layer a leading 1 decides for the input axis, as its writers mean it. The weight's own dimensions do not
    count: a 1x1 convolution of one model is a linear layer of another, and its factors may be stored as either's.
    """
    shape, (out, inn), n = tuple(magnitude.shape), tuple(weight_shape[:2]), magnitude.numel()
    if shape[:1] == (out,) and n == out:
        return 0
    if shape[:2] == (1, inn) and n == inn:
        return 1
    if shape == (1, out, 1, 1):
        return 0
    raise ValueError(
        f"magnitude of shape {shape} fits neither the {out} outputs nor the {inn} inputs of {tuple(weight_shape)}"
    )


def dora_delta(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """W'(1) - W with W' = m * V/|V| along the magnitude's own axis, V = W + delta. Shape of W."""
    v = weight.float() + delta
    axis = magnitude_axis(magnitude, weight.shape)
    over = [d for d in range(v.dim()) if d != axis]
    norm = torch.linalg.vector_norm(v, dim=over, keepdim=True)
    changed: Tensor = magnitude.float().reshape(norm.shape) * v / norm
    return changed - weight.float()
