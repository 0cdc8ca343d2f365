"""Bound propagation: IBP, CROWN, alpha-CROWN and beta-CROWN as thin methods on one backward walk."""
