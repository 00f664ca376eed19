"""Factors of low rank against the singular value decomposition."""

import pytest
import torch

from lowres_ft import factorize
from lowres_ft.factorize import principal


@pytest.mark.parametrize(("rows", "columns", "rank"), [(40, 64, 4), (64, 40, 4), (6, 20, 9)])
def test_principal_factors_are_those_of_the_singular_values(rows: int, columns: int, rank: int):
    matrix = torch.randn(rows, columns)
    a, b = principal(matrix, rank)
    assert (a.shape, b.shape) == ((rank, columns), (rows, rank))
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    nearest = (left[:, :rank] * values[:rank]) @ right[:rank]
    torch.testing.assert_close((b.double() @ a.double()), nearest, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))
    torch.testing.assert_close(principal(matrix.clone(), rank), (a, b), rtol=0, atol=0)


def test_principal_factors_of_a_large_matrix_are_near_the_exact_ones(monkeypatch: pytest.MonkeyPatch):
    values = torch.linspace(0, 1, 200).pow(2)
    left, right = (torch.linalg.qr(torch.randn(width, 200))[0] for width in (300, 240))
    matrix = (left * values) @ right.t()
    exact = principal(matrix, 8)
    monkeypatch.setattr(factorize, "_EXACT_UP_TO", 100)
    found = principal(matrix, 8)
    left_out, least = ((matrix - b @ a).norm() for a, b in (found, exact))
    assert least <= left_out <= 1.001 * least
    torch.testing.assert_close(found[0], principal(matrix, 8)[0], rtol=0, atol=0)
