"""How many there were in the last so many seconds, counted in the cache that all processes share."""

import logging
import math
import time
from dataclasses import dataclass

from django.core.cache import cache

from fl_server_api.guessing import AWAY

log = logging.getLogger("fl.server")
PARTS = 10


@dataclass(frozen=True)
class Window:
    """At most `most` in any `seconds`, whenever they begin: no edge at which twice as many pass.

    Time is cut into tenths of the period, each with a count of its own, and the last eleven are added up: the tenth
    that has begun, and ten whole ones. So never more than `most` pass within a period, and a request is remembered for a
    tenth of a period too long at most, which is the error: at worst ten elevenths of the rate pass.

    Counting comes before looking, and what is refused is taken back. Of several at the same moment for the last
    place, all may be refused, but no two pass. That needs a cache that adds atomically: Redis and the local memory do;
    Django's database cache does not, and forgets one of two that come at the same instant. Clocks of several
    machines that differ shift the tenths by as much.
    """

    key: str
    most: int
    seconds: int

    def take(self) -> float:
        """One more: 0.0; or, if these are too many, in how many seconds there is room, and it does not count.

        Where the cache is away nobody is stopped.
        """
        now, width = time.time(), self.seconds / PARTS
        part = int(now // width)
        keys = [f"{self.key}:{part - age}" for age in range(PARTS + 1)]  # from new to old
        try:
            kept = math.ceil(self.seconds + 2 * width)  # Redis takes whole seconds, rounded down
            if not cache.add(keys[0], 1, kept):
                cache.incr(keys[0])
            found = cache.get_many(keys)
            left = sum(found.values()) - self.most
            if left <= 0:
                return 0.0
            cache.decr(keys[0])
        except ValueError:  # forgotten between two of these
            return 0.0
        except AWAY as error:
            log.warning("requests are not counted: %s", error)
            return 0.0
        for age in range(PARTS, 0, -1):
            left -= found.get(keys[age], 0)
            if left <= 0:
                return (part - age + PARTS + 1) * width - now
        return (part + PARTS + 1) * width - now
