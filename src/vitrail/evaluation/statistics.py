"""Intervals of measured shares. Importing this imports no NumPy."""

Z95 = 1.959963984540054  # the normal quantile of a 95 % interval


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share, 0 to 1, of `count` images: bounds in percent, 0 and 100 for no images.

    Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if not count:
        return 0.0, 100.0
    z2 = Z95**2
    middle = share + z2 / (2 * count)
    half = (z2 * (share * (1 - share) / count + z2 / (4 * count**2))) ** 0.5
    low, high = (100 * (middle + sign * half) / (1 + z2 / count) for sign in (-1, 1))
    return max(low, 0.0), min(high, 100.0)


def has_top5(classes: int) -> bool:
    """Whether top-5 accuracy says anything: of five classes it is always 100 %."""
    return classes > 5
