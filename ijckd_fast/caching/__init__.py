"""Makes a teacher cache (`make_cache`, which `ijckd-fast cache` runs), and checks it against the teacher."""

from ijckd_fast.caching.make import make_cache

__all__ = ["make_cache"]
