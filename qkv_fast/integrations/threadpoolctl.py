"""Importing this module shows our thread pool to threadpoolctl.

``import qkv_fast`` does so by itself if threadpoolctl has been imported before it. From then on
``threadpoolctl.threadpool_info()`` lists the pool (``user_api`` is ``"qkv_fast"``), and
``threadpoolctl.threadpool_limits`` limits it, for the current thread or asyncio task like :func:`qkv_fast.num_threads`.

Examples
--------
>>> import qkv_fast.integrations.threadpoolctl
>>> from threadpoolctl import threadpool_limits
>>> with threadpool_limits(1, user_api="qkv_fast"):
...     qkv_fast.get_num_threads()
1
"""

from .. import _threadpoolctl  # noqa: F401 (it registers itself)
