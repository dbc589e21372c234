"""A server of the protocol of gs:// on this machine, with the object generations that writers of one object rely on.

`python -m tests.training.bucket_server PORT` serves an empty bucket named audiolm, from memory, until it is killed.
"""

import sys
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects


def generation(storage, bucket: str, name: str) -> str:
    """Of an object as it is now; "0" where there is none, as the protocol has it."""
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def download(request, response, storage, *args, emulated=objects.download, **kwargs):
    """The emulator's own, whose answer lacks the generation of what it holds."""
    emulated(request, response, storage, *args, **kwargs)
    if response.status != HTTPStatus.NOT_FOUND:
        response["x-goog-generation"] = generation(storage, request.params["bucket_name"], request.params["object_id"])


def insert(request, response, storage, *args, emulated=objects.insert, **kwargs):
    """The emulator's own, which writes over an object that changed since its writer read it."""
    expected = request.query.get("ifGenerationMatch")
    if expected:
        now = generation(storage, request.params["bucket_name"], request.query["name"][0])
        if now != expected[0]:
            response.status = HTTPStatus.PRECONDITION_FAILED
            return
    emulated(request, response, storage, *args, **kwargs)


if __name__ == "__main__":
    objects.download, objects.insert = download, insert
    from gcp_storage_emulator.server import create_server  # Its table of handlers is made when it is imported.

    create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="audiolm").run()
