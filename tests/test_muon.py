"""Muon against PyTorch's own, which multiplies in bfloat16, and against what it promises of singular values."""

import pytest
import torch

from mfllm_ref.muon import Muon, orthogonalised

SHAPES = ((24, 24), (24, 24), (8, 24), (24, 64), (64, 24))


def trained(make, steps=6):
    """Matrices after some steps of what `make` returns for them, on the same gradients every time; the second of them gets
    none in the first step."""
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = make(matrices)
    for step in range(steps):
        for index, matrix in enumerate(matrices):
            gradient = torch.randn(matrix.shape, generator=generator)
            matrix.grad = None if step == 0 and index == 1 else gradient
        optimizer.step()
    return [matrix.detach() for matrix in matrices]


def torchs(matrices):
    return torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw")


@pytest.mark.parametrize("products", [torch.bfloat16, torch.float32])
def test_the_update_is_pytorchs(products):
    theirs, ours = trained(torchs), trained(lambda some: Muon(some, 0.02, weight_decay=0.05, products=products))
    start = trained(torchs, steps=0)
    for before, a, b in zip(start, theirs, ours, strict=True):
        assert (a - b).norm() < 0.02 * (a - before).norm(), "apart by the rounding of bfloat16 products"


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 48), (2, 48, 16)])
def test_singular_values_are_brought_near_one_and_directions_kept(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    made = orthogonalised(matrices)
    values = torch.linalg.svdvals(made)
    assert made.shape == shape and values.min() > 0.3 and values.max() < 1.3
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    aligned = u.mT @ made @ vh.mT
    off = aligned - torch.diag_embed(aligned.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 1e-4, "the same singular vectors"


def test_a_gradient_of_zero_moves_nothing_but_by_the_decay():
    matrix = torch.nn.Parameter(torch.ones(4, 4))
    matrix.grad = torch.zeros(4, 4)
    Muon([matrix], 0.1, weight_decay=0.5).step()
    torch.testing.assert_close(matrix.detach(), torch.full((4, 4), 0.95))
