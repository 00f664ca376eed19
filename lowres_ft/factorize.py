"""The matrix of low rank that is nearest to a given one, as two factors."""

import torch
from torch import Tensor

_EXACT_UP_TO = 1024  # rows or columns; an exact decomposition of 2048 x 2048 takes 5 s, and a base has hundreds
_ITERATIONS = 8
_MORE = 16  # dimensions of the subspace beyond the rank


def principal(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, columns) and B (rows, rank) in fp32 whose product B A is nearest to `matrix`, equal in norm.

    They are the principal singular vectors times the roots of their values, zero beyond the matrix's own rank, found in
    float64 from the Gram matrix of the smaller side. Signs are fixed, so that no library's choice shows.
    """
    if matrix.shape[0] > matrix.shape[1]:
        b, a = principal(matrix.t(), rank)
        return a.t().contiguous(), b.t().contiguous()
    whole = matrix.detach().cpu().double()  # MPS has no float64
    basis = _subspace(whole, rank + _MORE) if min(whole.shape) > _EXACT_UP_TO else None
    small = whole if basis is None else basis.t() @ whole
    _, vectors = torch.linalg.eigh(small @ small.t())  # of ascending values
    left = vectors.flip(1)[:, :rank]
    left = left if basis is None else basis @ left
    left = left * left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    right = left.t() @ whole  # singular values times right singular vectors
    roots = right.norm(dim=1).sqrt()
    a, b = matrix.new_zeros(rank, whole.shape[1], dtype=torch.float32), matrix.new_zeros(len(whole), rank).float()
    a[: len(roots)] = (right / roots.clamp_min(1e-30)[:, None]).to(a)
    b[:, : len(roots)] = (left * roots).to(b)
    return a, b


def _subspace(matrix: Tensor, size: int) -> Tensor:
    """An orthonormal basis (rows, size) of about the principal space (Halko et al. 2011, arXiv:0909.4061)."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(len(matrix), min(size, len(matrix)), generator=generator, dtype=matrix.dtype)
    for _ in range(_ITERATIONS):
        basis, _ = torch.linalg.qr(matrix @ (matrix.t() @ basis))
    return basis
