"""The samples of one shard, from its beginning to its end: a file, a `pipe:` command, or a URL."""

from collections.abc import Callable, Iterator

from webdataset.handlers import reraise_exception
from webdataset.tariterators import group_by_keys, tar_file_expander, tarfile_samples

from ..config import UserError
from ..remote import is_url, open_url


def stream_samples(
    shard: str,
    handler: Callable[[Exception], bool] = reraise_exception,
    select_files: Callable[[str], bool] | None = None,
) -> Iterator[dict]:
    """As webdataset's `tarfile_samples` of one shard.

    Args:
        handler: is given what goes wrong; where it returns true, reading goes on with what can be read.
        select_files: by their names, the members to read.
    """
    if not is_url(shard):
        yield from tarfile_samples(iter([{"url": shard}]), handler=handler, select_files=select_files)
        return
    try:
        file = open_url(shard)
    except UserError as error:
        handler(error)
        return
    with file:
        members = tar_file_expander(iter([{"url": shard, "stream": file}]), handler=handler, select_files=select_files)
        yield from group_by_keys(members, handler=handler)
