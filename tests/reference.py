"""The loss as the formula says it: loops in float64 on one value at a time."""

import math


def f(variant, r, alpha, b):
    log1p, expm1 = math.log1p, math.expm1  # log(1 + r) and exp(x) - 1, also for tiny r
    return {
        "O": lambda: r,
        "Iu": lambda: (1 + r) * log1p(r),
        "Ib": lambda: (b * r - log1p(b * r)) / b**2,
        "Ds": lambda: log1p(r),
        "Dq": lambda: -expm1(-alpha * log1p(r)),  # 1 - 1 / (1 + r)^alpha
    }[variant]()


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def pnp_losses(
    s, positives, negatives, own, *, variant="O", alpha=1, b=2, anneal=0.01, k=1, include_self=True
):
    """{query: L(query)} of the counted queries.

    s: N x M nested lists; positives, negatives: for each query the set of its references, without
    itself; own: N similarities to itself.
    """
    losses = {}
    for a in range(len(s)):
        if not positives[a]:
            continue
        targets = [s[a][p] for p in positives[a]]
        if include_self:
            targets.append(own[a])
        total = 0.0
        for target in targets:
            r = sum(sigmoid(k * (s[a][n] - target) / anneal) for n in negatives[a])
            total += f(variant, r, alpha, b)
        losses[a] = total / len(targets)
    return losses
