"""What stands in for the rows left out: exact where every row's branch does the same (docs/decisions/0007)."""

from __future__ import annotations

import pytest
import torch

from lemo.selection.layout import build_layout
from lemo.selection.ranking import plan_from_blocks
from lemo.sparse.compensation import Compensation

CPU = torch.device("cpu")


def left_out(kept_rows: list[int], on: bool = True, T: int = 8) -> tuple[Compensation, torch.Tensor, torch.Tensor]:
    layout = build_layout(2, T, 1, CPU)
    kept = torch.zeros(2 * T, dtype=torch.bool)
    kept[kept_rows] = True
    plan = plan_from_blocks(kept, layout)
    grad = torch.randn(2 * T, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Compensation(grad, plan, layout, on), grad, plan.rows


def test_a_multiple_of_the_identity_is_passed_back_exactly_at_every_row() -> None:
    rest, grad, rows = left_out([0, 3, 4, 9, 12])
    into = grad.clone()
    into[rows] += -0.3 * rest.entering
    rest.add(into, -0.3 * rest.entering)
    torch.testing.assert_close(into, 0.7 * grad)


def test_one_matrix_for_all_rows_is_passed_back_exactly_in_the_sum() -> None:
    rest, grad, rows = left_out([0, 3, 4, 9, 12])
    jacobian = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / 8
    into = grad.clone()
    into[rows] += rest.entering @ jacobian
    rest.add(into, rest.entering @ jacobian)
    for document in (slice(0, 8), slice(8, 16)):
        torch.testing.assert_close(into[document].sum(0), (grad + grad @ jacobian)[document].sum(0))


def test_the_first_row_takes_no_share_and_alone_leaves_only_the_fitted_part() -> None:
    rest, grad, rows = left_out([0, 3, 8])
    torch.testing.assert_close(rest.entering[[0, 2]], grad[[0, 8]])
    torch.testing.assert_close(rest.entering[1], grad[1:8].sum(0))
    into = grad.clone()
    into[rows] += 0.5 * rest.entering
    rest.add(into, 0.5 * rest.entering)
    torch.testing.assert_close(into, 1.5 * grad)


@pytest.mark.parametrize("on", [True, False])
def test_nothing_changes_where_all_is_kept_or_it_is_off(on: bool) -> None:
    rest, grad, rows = left_out(list(range(16)) if on else [0, 3, 9], on)
    into = grad.clone()
    rest.add(into, rest.entering)
    assert torch.equal(into, grad)
    assert torch.equal(rest.entering, grad[rows])


def test_a_branch_that_returns_more_than_it_got_is_bounded() -> None:
    rest, grad, rows = left_out([0, 3, 4, 9, 12])
    into = grad.clone()
    rest.add(into, 5.0 * rest.entering)
    out = [row for row in range(16) if row not in rows.tolist()]
    torch.testing.assert_close(into[out], 2.0 * grad[out])
