"""How much a count of successes says: intervals, and whether two policies differ."""

import math
from collections.abc import Sequence

from scipy import special

_Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson(successes: int, trials: int, z: float = _Z95) -> tuple[float, float]:
    """Wilson's interval of a success rate, 95 % by default, inside [0, 1].

    (p + z²/2n ± z √(p(1 - p)/n + z²/4n²)) / (1 + z²/n) with p = successes / trials. Unlike
    p ± z √(p(1 - p)/n) it is right near 0 and 1 (E. B. Wilson 1927, JASA 22:209).

    Raises:
      ValueError: no trials, or successes outside 0..trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials: expected 0..trials, of some")
    p, n = successes / trials, trials
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return max(0.0, low if successes else 0.0), min(1.0, high if successes < trials else 1.0)


def mean(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of a mean of numbers in [0, 1], to which a zero and a one are added.

    x̄ ± t s / √m inside [0, 1], of the n values, a zero and a one: m = n + 2, s² their unbiased
    variance, t the 97.5 % quantile of m - 1 degrees of freedom (Student 1908, Biometrika 6:1). A
    success and a failure more are what A. Agresti and B. Caffo (2000, The American Statistician
    54:280) add to a sample. Without them n values that are all 1 had the interval [1, 1], as if a
    lower one could not be. Of zeros and ones, which vary most, it holds the mean in 93 % of samples
    or more wherever that lies, from n = 10 on.

    Raises:
      ValueError: no values, or one outside [0, 1].
    """
    if not len(values) or not all(0 <= x <= 1 for x in values):
        raise ValueError(f"the interval of a mean is of numbers in [0, 1]; found {list(values)}")
    more = [*values, 0.0, 1.0]
    m = len(more)
    middle = math.fsum(more) / m
    variance = math.fsum((x - middle) ** 2 for x in more) / (m - 1)
    half = float(special.stdtrit(m - 1, 0.975)) * math.sqrt(variance / m)
    return max(0.0, middle - half), min(1.0, middle + half)


def separate(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether two intervals have no point in common."""
    return a[0] > b[1] or b[0] > a[1]


def mcnemar(a: list[bool], b: list[bool]) -> float:
    """Two-sided p-value that two policies, tried on the same starts, are equally good.

    Exact: of the starts where just one succeeded, each is a fair coin under that hypothesis
    (Q. McNemar 1947, Psychometrika 12:153). 1.0 where none differ.

    Raises:
      ValueError: lists of different lengths.
    """
    pairs = list(zip(a, b, strict=True))
    only_a = sum(x and not y for x, y in pairs)
    n = only_a + sum(y and not x for x, y in pairs)
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(min(only_a, n - only_a) + 1)) / 2**n
    return min(1.0, 2 * tail)
