"""Where memspan keeps what it can fetch or compute again (see :mod:`memspan.base.cache`)."""

from memspan.base.cache import cache_folder

__all__ = ["cache_folder"]
