"""Group fusion (eq. 9): a Monarch-structured map that carries the active sub-dimensions back to all d dims."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mohd_train.config.plan import SubDimPlan


class GroupFusion(nn.Module):
    """``y'_{i,j} = sum_k B_j[i, k] z_{k,j}``: dims at the same place j of each sub-dimension form group j.

    A block-diagonal matrix of c blocks N x N between two stride permutations. With ``monarch`` a second factor of N
    blocks c x c comes first, within the sub-dimensions: ``z_k <- C_k z_k``. It is folded into the down-projection's
    weight (``C (alpha g W h) = alpha g (C W) h``), so it costs no pass over the tokens. Both start as the identity.

    Parameters:
        mixing: [N (from k), N (to i), c (place j)], ``B_j[i, k] = mixing[k, i, j]``: the layout whose slices by source
            sub-dimension are contiguous. None for ``fusion: none``.
        within: [N, c, c], ``within[k] = C_k``; only for ``monarch``.
    """

    def __init__(self, plan: SubDimPlan, fusion: str) -> None:
        super().__init__()
        self.plan = plan
        n, c = plan.sub_dims, plan.width
        self.mixing = nn.Parameter(torch.empty(n, n, c)) if fusion in ("grouped", "monarch") else None
        self.within = nn.Parameter(torch.empty(n, c, c)) if fusion == "monarch" else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Identity: a fully active, unscaled layer equals the dense one."""
        if self.mixing is not None:
            n = self.plan.sub_dims
            self.mixing.copy_(torch.eye(n, device=self.mixing.device)[:, :, None].expand_as(self.mixing))
        if self.within is not None:
            c = self.plan.width
            self.within.copy_(torch.eye(c, device=self.within.device).expand_as(self.within))

    @property
    def blocks(self) -> Tensor | None:
        """``B`` [c, N, N] as a view: ``blocks[j, i, k] = B_j[i, k]``."""
        return None if self.mixing is None else self.mixing.permute(2, 1, 0)

    def fold(self, down_DF: Tensor) -> Tensor:
        """The down-projection's weight [D, F] with the ``within`` factor multiplied in."""
        if self.within is None:
            return down_DF
        n, c = self.plan.sub_dims, self.plan.width
        return torch.bmm(self.within, down_DF.view(n, c, -1)).view_as(down_DF)
